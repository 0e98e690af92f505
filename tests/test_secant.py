"The secant rule: complete to rounding at every step, close to the line integral, forwards and backwards alike."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_graph import FUNCTIONS, One
from torch import nn
from zoo import ZOO, noise

from explaind_nb.graph import PRIMITIVES, LinearMap, trace
from explaind_nb.quadrature import nodes_weights
from explaind_nb.secant import KINKED, RULES, SLOPES, chord, fractions, inner_nodes, ramp, secant, secant_forward, slope

SIZES = (0., 1e-12, 1e-9, 1e-6, 1e-3, 1e-1, 1.)


def ends(model, size, seed=0):
    theta = {k: p.detach() for k, p in model.named_parameters()}
    return theta, {k: p + size * noise(seed, *p.shape, 1)[..., 0].to(p) for k, p in theta.items()}


def shares(graph, phi, theta0, theta1):
    "[parameters, T]"
    return torch.stack([(phi[k] * (theta1[k].double() - theta0[k].double())).reshape(len(phi[k]),
        -1).sum(1) for k in graph.shapes])


def gap(graph, theta0, theta1, **options):
    "What the multipliers leave of the change, relative to the largest share or value"
    parts = shares(graph, secant(graph, theta0, theta1, **options), theta0, theta1)
    ends = [graph.values(t).reshape(-1) for t in (theta0, theta1)]
    size = max(1, parts.abs().max().item(), *(e.abs().max().item() for e in ends))
    return (parts.sum(0) - (ends[1] - ends[0])).abs().max().item() / size


def off_middle(graph, theta0, theta1):
    "How far the multipliers of a short segment are from the gradients in its middle or, if there is a kink, at an end, relative to the largest; without the padding row, of which autograd knows nothing."
    rows = lambda g: {k: v[:, 1:] if k == "embed.weight" else v for k, v in g.items()}
    found = rows(secant(graph, theta0, theta1))
    near = [rows(graph.gradients({k: torch.lerp(theta0[k], theta1[k], t) for k in theta0})) for t in (.5, 0., 1.)]
    size = max(abs(g).max().item() for g in near[0].values())
    return min(max(abs(found[k] - g[k]).max().item() for k in g) for g in near) / size


def line_integral(graph, theta0, theta1, n=24, rule="gauss"):
    at = lambda t: {k: torch.lerp(theta0[k], theta1[k], float(t)) for k in theta0}
    found = [(w, graph.gradients(at(t))) for t, w in zip(*nodes_weights(rule, n))]
    return {k: sum(w * g[k] for w, g in found) for k in graph.shapes}


@pytest.mark.parametrize("name", ZOO)
def test_complete_on_the_zoo(name):
    case = ZOO[name]
    for fn in (case.target, lambda m: case.loss(m, case.data[torch.tensor([0, 5, 3])])):
        model = case.make()
        graph = trace(fn, model)
        for seed, size in enumerate(SIZES): assert gap(graph, *ends(model, size, seed)) < 2e-13, size
        for size in (1e-12, 1e-9, 1e-6): assert off_middle(graph, *ends(model, size, 9)) < 1e-3 * size + 2e-11, size
        assert gap(graph, *ends(model, .1), nodes=3) < 1e-13 and gap(graph, *ends(model, .1), richardson=True) < 1e-13


SMOOTH = [n for n in ZOO if not any(k in n for k in ("relu", "cnn", "tanh", "regression", "twice"))]  # the others have a ReLU


@pytest.mark.parametrize("name", SMOOTH)
def test_orders_on_smooth_networks(name):
    "Second order, fourth with Richardson; where the derivative hides a padding row, that row is left out."
    model = ZOO[name].make()
    graph, two = trace(ZOO[name].target, model), ends(model, .02)
    for k in ("embed.weight",):
        if k in two[1]: two[1][k][0] = two[0][k][0]
    true = shares(graph, line_integral(graph, *two), *two)
    far = lambda **o: (shares(graph, secant(graph, *two, **o), *two) - true).abs().max().item()
    one, three, extrapolated, further = far(), far(nodes=3), far(richardson=True), far(nodes=2, richardson=True)
    assert 8 < one / three < 10 and (extrapolated / further > 12 or further < 1e-12) and extrapolated < one / 20


def test_second_order_with_kinks():
    case, n = ZOO["mlp in-place relu"], 1500
    model = case.make()
    graph, two = trace(case.target, model), ends(model, .1)
    true = shares(graph, line_integral(graph, *two, n, "midpoint"), *two)
    errors = [(shares(graph, secant(graph, *two, nodes=k), *two) - true).abs().max().item() for k in (1, 2, 4, 8)]
    midpoint = [(shares(graph, line_integral(graph, *two, k, "midpoint"), *two) - true).abs().max().item() for k in (2, 4, 8, 16)]
    assert errors[0] / errors[3] > 20 and all(e < m for e, m in zip(errors, midpoint))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_complete_on_functions(name):
    "Every operation of the set, its two ends near and far"
    model = One(noise(3, 4, 6))
    graph = trace(lambda m: FUNCTIONS[name](m.x), model)
    for seed, size in enumerate((*SIZES[:5], .03)):
        try: assert gap(graph, *ends(model, size, seed)) < 1e-13, size
        except ValueError as e: assert "differently at the two ends" in str(e) and size > 1e-6


@pytest.mark.parametrize("name", ["transformer", "cnn groupnorm", "lstm", "low-rank adapters", "raw parameters"])
def test_forwards_equals_backwards(name):
    case = ZOO[name]
    model = case.make()
    graph, two = trace(case.target, model), ends(model, .3)
    tangents = {k: noise(i, 3, *p.shape) for i, (k, p) in enumerate(two[0].items())}
    phi = secant(graph, *two, nodes=2)
    want = sum(tangents[k].reshape(3, -1) @ phi[k].reshape(len(phi[k]), -1).T for k in phi)
    assert torch.allclose(secant_forward(graph, *two, tangents, nodes=2), want, rtol=0, atol=1e-12 * want.abs().max().item())
    first = {k: t[:1] for k, t in tangents.items()}
    assert torch.allclose(secant_forward(graph, *two, first, richardson=True)[0], sum(
        (first[k] * p).reshape(len(p), -1).sum(1) for k, p in secant(graph, *two, richardson=True).items()), rtol=0, atol=1e-11)
    k = next(iter(tangents))  # parameters left out do not move
    only = {n: t if n == k else torch.zeros_like(t) for n, t in tangents.items()}
    assert torch.allclose(secant_forward(graph, *two, {k: tangents[k]}), secant_forward(graph, *two, only), rtol=0, atol=1e-13)


def test_all_outputs_by_component():
    model, x = ZOO["transformer"].make(), torch.randint(9, (3, 5), generator=torch.Generator().manual_seed(0))
    graph, two = trace(lambda m: m(x).log_softmax(-1), model), ends(model, .2)
    delta = {k: two[1][k] - two[0][k] for k in two[0]}
    parts = secant_forward(graph, *two, {k: torch.stack([d * (k == c) for c in delta]) for k, d in delta.items()})
    assert parts.shape == (len(delta), 3, 5, 4)
    assert torch.allclose(parts.sum(0), graph.values(two[1]) - graph.values(two[0]), rtol=0, atol=1e-13)


def test_many_targets_in_chunks():
    model, x = ZOO["mlp tanh"].make(), noise(1, 50, 5)
    graph, two = trace(lambda m: m(x)[:, 0], model), ends(model, .1)
    together = secant(graph, *two)
    for t in (0, 31, 49):
        alone = secant(trace(lambda m: m(x)[t, :1], model), *two)
        for k in alone: assert torch.allclose(alone[k][0], together[k][t], rtol=0, atol=1e-14)


def test_the_ends_can_be_exchanged():
    model = ZOO["transformer"].make()
    graph, two = trace(ZOO["transformer"].target, model), ends(model, .3)
    there, back = secant(graph, *two), secant(graph, *two[::-1])
    for k in there: assert torch.allclose(there[k], back[k], rtol=0, atol=1e-13)


def test_what_does_not_move():
    "No step: the multipliers are the gradient. A parameter that stays has a share of 0, one that nothing uses a multiplier of 0."
    model = ZOO["raw parameters"].make()
    graph, (theta, _) = trace(ZOO["raw parameters"].target, model), ends(model, 0.)
    phi, gradient = secant(graph, theta, theta), graph.gradients(theta)
    for k in phi: assert torch.allclose(phi[k], gradient[k], rtol=0, atol=1e-14)
    assert not phi["unused"].any() and phi["unused"].shape[1:] == theta["unused"].shape


def test_float32_parameters():
    net, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3)), torch.randn(4, 5)
    graph = trace(lambda m: m(x).log_softmax(-1)[:, 0], net)
    assert gap(graph, *ends(net, 1e-4)) < 1e-14 and secant(graph, *ends(net, 1e-4))["0.bias"].dtype == torch.float64


def test_slopes_at_every_distance():
    "Against 20 Gauss nodes of the derivative"
    def derivative(f, x): return torch.func.vjp(f, x)[1](torch.ones_like(x))[0]
    def check(f, a, tol=1e-12):
        op = trace(lambda m: f(m.x), One(a)).ops[-1]
        for h in 10.**np.arange(-13, 0):
            b = a + h * noise(1, *a.shape)
            true = sum(w * derivative(f, a + t * (b - a)) for t, w in zip(*nodes_weights("gauss", 20)))
            found = LinearMap(trace(lambda m: f(m.x), One(a)), chord, {"x": a}, {"x": b}).push({"x": torch.ones_like(a)})
            assert (found - true).abs().max() <= tol * true.abs().max(), (op.name, h)
    for f in (torch.exp, torch.tanh, torch.sigmoid, F.silu, F.gelu, F.softplus, torch.erf, torch.sin, torch.cos, torch.sinh,
        torch.atan, F.mish): check(f, noise(0, 50))
    for f in (torch.log, torch.sqrt, torch.rsqrt, torch.reciprocal, torch.log1p, lambda x: x ** 3.3,
        lambda x: x ** -2): check(f, .5 + noise(0, 50).abs())
    assert set(SLOPES) | set(KINKED) <= {k for k, kind in PRIMITIVES.items() if kind == "elementwise"}


def test_far_and_extreme_ends():
    "No overflow and no 0/0 where the function itself has none"
    for f, a, b in ((torch.tanh, -800., 900.), (torch.sigmoid, -1e3, 1e3), (F.silu, -1e3, 1e3), (F.softplus, -1e3, 1e3),
        (torch.exp, -1e4, 5.), (torch.exp, 5., -1e4), (F.gelu, -50., 60.),
                    (torch.log, 1e-300, 1e300), (torch.sqrt, 0., 0.), (torch.sqrt, 0., 4.), (F.relu, 0., 0.), (torch.abs, 0.,
                        0.)):
        a, b = torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64)
        graph = trace(lambda m: f(m.x), One(torch.ones(1).double()))
        phi = secant(graph, {"x": a}, {"x": b})["x"][0]
        assert phi.isfinite() and torch.allclose(phi * (b - a), f(b) - f(a), rtol=1e-14, atol=0)


def test_ramp_is_the_part_of_the_way_above_zero():
    t = torch.linspace(0, 1, 100001, dtype=torch.float64)
    for a, b in ((-1., 3.), (2., -5.), (1., 2.), (-2., -1.), (-1e-9, 1e-9)):
        assert abs(ramp(torch.tensor(a), torch.tensor(b)) - ((1 - t) * a + t * b > 0).double().mean()) < 2e-5


def test_masked_and_fully_masked_attention():
    mask = torch.tensor([[True, False, True], [False] * 3, [False, False, True]])
    def fn(m):
        x = m.x[None]
        scores = (x @ x.mT).masked_fill(~torch.tensor([[True, False, True]] * 3), -torch.inf).softmax(-1)
        return torch.cat([(scores @ x).sum((0, 1)), F.scaled_dot_product_attention(x, x, x, attn_mask=mask).sum((0, 1))])
    model = One(noise(0, 3, 4))
    graph = trace(fn, model)
    for size in SIZES: assert gap(graph, *ends(model, size)) < 1e-14 and all(p.isfinite().all() for p in secant(graph,
        *ends(model, size)).values())


PRIMITIVE_FUNCTIONS = (lambda x: x.softmax(-1), lambda x: x.log_softmax(0), lambda x: x.logsumexp((0, 1)).reshape(1),
                       lambda x: F.rms_norm(x, (6,), eps=1e-6), lambda x: torch.matrix_exp(x[:, :4]))


@pytest.mark.parametrize("f", PRIMITIVE_FUNCTIONS)
def test_primitives_are_the_line_integral_of_their_jacobian(f):
    a = noise(0, 4, 6)
    for size, tol in ((1e-10, 1e-14), (1e-3, 1e-14), (1., 1e-11)):
        b = a + size * noise(1, 4, 6)
        exact = sum(w * torch.func.jacrev(f)(a + t * (b - a)) for t, w in zip(*nodes_weights("gauss", 60)))
        found = secant(trace(lambda m: f(m.x), One(a)), {"x": a}, {"x": b})["x"]
        assert (found - exact.reshape(found.shape)).abs().max() <= tol * exact.abs().max()


def test_large_moves_of_softmax_and_norm_stay_complete():
    for f in (lambda x: x.softmax(-1), lambda x: x.log_softmax(-1), lambda x: F.rms_norm(x, (6,), eps=1e-9)):
        model = One(noise(0, 4, 6))
        graph = trace(lambda m: f(m.x).flatten(), model)
        for size in (10., 100., 1000.): assert gap(graph, *ends(model, size)) < 1e-14 * size


def test_inner_nodes(): assert inner_nodes(0.) == 2 and inner_nodes(1e9) == 16 and inner_nodes(1.) < inner_nodes(5.)


def test_fractions():
    a, b = noise(0, 200, 7), noise(1, 200, 7)
    part, t = fractions(a, b), torch.linspace(0, 1, 4001, dtype=torch.float64)[:, None, None]
    assert torch.allclose(part.sum(-1), torch.ones(200).double()) and (part >= 0).all()
    assert torch.allclose((part * (b - a)).sum(-1), b.amax(-1) - a.amax(-1), rtol=0, atol=1e-14)
    counted = F.one_hot((a + t * (b - a)).argmax(-1), 7).double().mean(0)
    assert (part - counted).abs().max() < 2e-3
    order = torch.randperm(7)
    assert torch.allclose(fractions(a[:, order], b[:, order]), part[:, order], rtol=0, atol=1e-15)
    assert torch.allclose(fractions(b, a), part, rtol=0, atol=1e-13)


def test_fractions_with_ties_and_infinities():
    inf = torch.inf
    a = torch.tensor([[0., 0., -inf], [0., 0., 0.], [1., -inf, 0.], [0., 0., 0.]], dtype=torch.float64)
    b = torch.tensor([[1., 2., -inf], [0., 0., 0.], [1., -inf, 2.], [0., 1., -1.]], dtype=torch.float64)
    assert torch.equal(fractions(a, b), torch.tensor([[0., 1., 0.], [1., 0., 0.], [.5, 0., .5], [0., 1., 0.]], dtype=torch.float64))
    for size in 10.**np.arange(-15, 0):  # ends that nearly agree
        b = a + size * noise(3, 4, 3)
        b[a == -inf] = -inf
        part, moved = fractions(a, b), torch.where(a == b, 0., b - a)
        assert torch.allclose((part * moved).sum(-1), b.amax(-1) - a.amax(-1), rtol=0, atol=1e-15)


POOLS = (dict(kernel_size=2), dict(kernel_size=3, stride=1, padding=1), dict(kernel_size=(3, 2), stride=(1, 2), dilation=(1, 2)),
         dict(kernel_size=3, stride=2, padding=1, ceil_mode=True))


@pytest.mark.parametrize("options", POOLS)
def test_pooling(options):
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.MaxPool2d(**options)).double()
    x = noise(0, 2, 1, 8, 9)
    graph = trace(lambda m: m(x).flatten(1).sum(1), model)
    for size in SIZES: assert gap(graph, *ends(model, size)) < 1e-14


def test_choices_that_change_are_refused():
    x = torch.tensor([[1., 2.], [5., 3.]], dtype=torch.float64)
    other = torch.tensor([[1., 2.], [3., 5.]], dtype=torch.float64)
    for f in (lambda m: torch.where(m.x > 4, m.x, 2 * m.x).sum(0), lambda m: m.x.gather(1, m.x.argmax(1, keepdim=True)).sum(0),
        lambda m: (m.x * (m.x > 4)).sum(0), lambda m: m.x[m.x > 4].sum().reshape(1),
              lambda m: m.x.topk(1).values.sum(0) * m.x.topk(1).indices.sum(), lambda m: m.x.sort().values[:, 0]):
        graph = trace(f, One(x))
        with pytest.raises(ValueError, match=r"\(<lambda>, line \d+\).*differently"): secant(graph, {"x": x}, {"x": other})
        near = {"x": x + 1e-3}
        assert gap(graph, {"x": x}, near) < 1e-15


def test_rules_can_be_added():
    try:
        PRIMITIVES["digamma"] = "mine"
        model = One(torch.rand(3).double() + 1)
        graph = trace(lambda m: torch.digamma(m.x), model)
        with pytest.raises(ValueError, match=r"digamma .* has no secant rule.*RULES\['mine'\]"): secant(graph, *ends(model, .1))
        RULES["mine"] = RULES["elementwise"]
        assert gap(graph, *ends(model, .1)) < 1e-14
    finally: PRIMITIVES.pop("digamma"), RULES.pop("mine", None)


def test_arguments():
    model = One(noise(0, 2))
    with pytest.raises(ValueError, match="at least one piece"): secant(trace(lambda m: m.x, model), *ends(model, .1), nodes=0)


class Normalised(nn.Module):
    def __init__(self, zero):
        super().__init__()
        self.body, self.last, self.zero = nn.Linear(6, 4), nn.Linear(4, 4, bias=not zero), zero
        if zero: nn.init.zeros_(self.last.weight)
    def forward(self, x):
        h = self.last(self.body(x).tanh()) if self.zero else self.last(self.body(x).relu()).relu()
        return F.normalize(h, dim=-1)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("size", [1e-3, .05, .3])
def test_division_by_what_grows_from_nothing(zero, size):
    "Rows that are all zero at one end: complete, and no share beyond the size of things."
    torch.manual_seed(3)
    model, x = Normalised(zero).double(), noise(2, 60, 6, 1)[..., 0]
    graph, two = trace(lambda m: m(x)[:, 0], model), ends(model, size)
    parts = shares(graph, secant(graph, *two), *two)
    change = graph.values(two[1]) - graph.values(two[0])
    assert abs(parts.sum(0) - change).max() < 1e-13 and abs(parts).max() < 60


def test_division_is_the_integral_of_its_jacobian():
    for y, v in ((1., 1.), (1., 1 + 1e-9), (1., 1.05), (1., 1.0602), (1., 1.2), (1., 100.), (50., .5), (-2., -3.), (-1., 2.)):
        model = nn.ParameterDict(dict(x=torch.tensor([.7]), y=torch.tensor([y]))).double()
        two = [dict(x=torch.tensor([a]).double(), y=torch.tensor([b]).double()) for a, b in ((.7, y), (-1.9, v))]
        graph = trace(lambda m: m["x"] / m["y"], model)
        found, exact = secant(graph, *two), line_integral(graph, *two, n=400)
        assert abs(shares(graph, found, *two).sum() - (graph.values(two[1]) - graph.values(two[0]))) < 1e-13
        if y * v > 0: assert all(abs(found[k] - exact[k]).max() < 1e-10 * abs(exact[k]).max() for k in found), (y, v)
