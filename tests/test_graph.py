"The traced graph against autograd, entry by entry in float64, and what is refused."
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from zoo import ZOO, noise

from explaind_nb.graph import PRIMITIVES, REWRITES, LinearMap, derivative, rewrite, trace

TOL = 1e-12  # of the largest entry


class One(nn.Module):
    "A network that is one matrix"
    def __init__(self, x): super().__init__(); self.x = nn.Parameter(x)


def autograd(fn, model):
    "Gradients of all outputs, {name: [T, *shape]}, a backward pass each"
    with sdpa_kernel(SDPBackend.MATH): out = fn(model).reshape(-1)
    params = dict(model.named_parameters())
    rows = [torch.autograd.grad(o, params.values(), retain_graph=True, allow_unused=True) for o in out]
    return {k: torch.stack([torch.zeros_like(p) if g is None else g for g in gs]) for (k, p), gs in zip(params.items(),
        zip(*rows))}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    size = max(e.abs().max().item() for e in expected.values())
    for k in expected: assert (found[k] - expected[k]).abs().max() <= TOL * size, k


def same_as_autograd(fn, model, seed=0):
    "Values, reverse and forward interpretation, away from the parameters at which it was traced"
    graph = trace(fn, model.requires_grad_(True))
    with torch.no_grad():
        for p in model.parameters(): p += .1 * noise(seed, *p.shape, 1)[..., 0]
    theta, expected = dict(model.named_parameters()), autograd(fn, model)
    assert torch.allclose(graph.values(theta), fn(model), rtol=0, atol=TOL)
    assert_equal(graph.gradients(theta), expected)
    tangents = {k: noise(1, 2, *p.shape) for k, p in theta.items()}
    if "embed.weight" in tangents: tangents["embed.weight"][:, 0] = 0  # the padding row, which autograd hides backwards only
    pushed = LinearMap(graph, derivative, theta).push_all(tangents)
    want = sum(tangents[k].reshape(2, -1) @ expected[k].reshape(len(expected[k]), -1).T for k in theta)
    assert torch.allclose(pushed.flatten(1), want, rtol=0, atol=TOL * max(1, want.abs().max()))
    return graph


@pytest.mark.parametrize("name", ZOO)
def test_zoo_targets(name): same_as_autograd(ZOO[name].target, ZOO[name].make())


@pytest.mark.parametrize("name", ZOO)
def test_zoo_losses(name):
    case = ZOO[name]
    same_as_autograd(lambda m: case.loss(m, case.data[torch.tensor([0, 5, 3])]), case.make())


def overlapping(x):
    "Writes into views of views, a constant buffer, and memory that others look at"
    h = x * 2
    row, column = h[0], h[:, 1]
    column += row.sum()
    h.mul_(3).sub_(1)
    buffer = torch.zeros(4, 6, dtype=x.dtype)
    seen = buffer.T
    buffer[1:3, ::2] = h[:2, :3]
    buffer.add_(x[3, 0])
    buffer[0].fill_(x[1, 1])
    h[2].zero_()
    return torch.stack([row.sum(), (seen[2:] ** 2).sum(), buffer.sum(), h.sum(), column.prod()])


def constant_until_written(x):
    scale = torch.ones(3, dtype=x.dtype)
    y = x[:3, 0] + scale
    scale += 1
    return y + scale


def full(x, value): return torch.full_like(x, value)


SEVERAL = dict(
    memory=[overlapping, constant_until_written],
    matrices=[lambda x: torch.einsum("ij,kj->ik", x, x @ x.mT @ x), lambda x: torch.addmm(x[:, :4], x, x.T[:, :4]),
              lambda x: x @ x.T @ x.mv(x[0]), lambda x: torch.outer(x[0], x[1]), lambda x: x[0] @ x[1],
              lambda x: x[None] @ torch.stack([x.mT, 2 * x.mT]), lambda x: torch.baddbmm(x[None, :, :4], x[None], x.mT[None])],
    shapes=[lambda x: x.unflatten(1, (3, 2)).movedim(1, 0).flatten(1).contiguous().view(-1)[3:9].square(),
            lambda x: x.roll(1, 0).flip(1).diagonal() * x[0, :4], lambda x: x.unfold(0, 2, 1).sum((0, 2)),
            lambda x: x.repeat_interleave(2, 1).chunk(3, 1)[1] * x[:, :4], lambda x: x.expand(2, 4, 6).swapaxes(0, 1).square()],
    indexing=[lambda x: x[torch.tensor([0, 0, 2]), 1:4:2].square(), lambda x: x.gather(1, torch.tensor([[0, 2]])).exp(),
              lambda x: x[:, torch.tensor([True] + 5 * [False])].exp(),
              lambda x: torch.take_along_dim(x, torch.tensor([[1], [0], [3], [2]]), 1).exp(),
              lambda x: x.new_zeros(4, 3).index_add(1, torch.tensor([0, 1, 1, 2, 0, 2]), x).square(),
              lambda x: x.new_zeros(4, 3).scatter_add(0, torch.tensor([[0, 1, 1]]), x[:1, :3]).square(),
              lambda x: torch.where(x > 0, x, x.square()).masked_fill(torch.eye(4, 6) > 0, 2.).tril()],
    reductions=[torch.mean, torch.var, lambda x: x.std(1), torch.norm, lambda x: x.norm(1), lambda x: x.logsumexp((0, 1)),
                lambda x: x.cumsum(0).trace(), torch.amax, torch.max, torch.min, lambda x: x.amin(1), lambda x: x.max(1).values,
                lambda x: x.min(0).values, lambda x: x.sort(1).values, lambda x: x.topk(2, 0).values, lambda x: x[0].prod()],
    elementwise=[torch.exp, torch.expm1, torch.sin, torch.cos, torch.sinh, torch.cosh, torch.atan, torch.asinh, torch.erf,
                 torch.abs, torch.tanh, torch.sigmoid],
    positive=[lambda x, f=f: f(x * x + 1) for f in (torch.log, torch.log1p, torch.sqrt, torch.rsqrt, torch.reciprocal,
                                                     lambda y: y ** 1.5, lambda y: y ** -2, lambda y: 2 / y)],
    activations=[F.relu, F.leaky_relu, F.elu, F.celu, F.selu, F.silu, F.gelu, F.mish, F.softplus, F.hardswish, F.relu6,
                 F.hardtanh, F.logsigmoid, lambda x: F.gelu(x, approximate="tanh"), lambda x: F.prelu(x, x[0, :1].abs()),
                 lambda x: x.clamp(-.3, .4)],  # without hardsigmoid, whose derivative torch computes with a float32 1/6
    two_inputs=[lambda x: torch.maximum(x, x.flip(0)), lambda x: torch.minimum(x, 2 * x.flip(1)), lambda x: x[0] / (2 + x[1] ** 2),
                lambda x: torch.atan2(x[2], x[3]), lambda x: torch.logaddexp(x[0], x[3]), lambda x: x * x.sum(1, keepdim=True),
                lambda x: torch.addcdiv(x[0], x[1], 3 + x[2] ** 2), lambda x: torch.lerp(x[0], x[1], x[2]),
                lambda x: torch.addcmul(x[0], x[1], x[2], value=2)],
    losses=[lambda x: F.mse_loss(x, x.flip(0)), lambda x: F.l1_loss(x, full(x, 1.)), lambda x: F.smooth_l1_loss(x, x.flip(1)),
            lambda x: F.huber_loss(x, x.flip(1), delta=.3), lambda x: F.binary_cross_entropy(x.sigmoid(), full(x, .3)),
            lambda x: F.binary_cross_entropy_with_logits(x, full(x, .3), pos_weight=full(x[0], 2.)),
            lambda x: F.cross_entropy(x, torch.tensor([0, 1, 5, 2]), label_smoothing=.1, ignore_index=5),
            lambda x: F.cross_entropy(x, full(x, 1 / 6)), lambda x: F.kl_div(x.log_softmax(1), full(x, 1 / 6), reduction="sum"),
            lambda x: F.nll_loss(x.log_softmax(1), torch.arange(4), weight=torch.arange(6).to(x))],
    pools=[lambda x: F.max_pool1d(x, 2), lambda x: F.max_pool1d(x[None], 3, 2, 1, ceil_mode=True), lambda x: F.avg_pool1d(x, 2),
           lambda x: F.max_pool2d(x[None], 2, 1), lambda x: F.max_pool2d(x[None, None], 2, 2, 1, 2),
           lambda x: F.max_pool2d(x[None], 3, ceil_mode=True), lambda x: F.avg_pool2d(x[None], 2),
           lambda x: F.adaptive_avg_pool2d(x[None], 2), lambda x: F.adaptive_max_pool1d(x, 4), lambda x: F.adaptive_max_pool2d(x[None], (3, 4)), lambda x: F.adaptive_max_pool2d(x[None], 1),
           lambda x: F.adaptive_max_pool3d(x.reshape(1, 2, 3, 4), (1, 2, 3)), lambda x: F.max_pool3d(x.reshape(1, 2, 3, 4), 2, 1)],
    norms=[lambda x: F.layer_norm(x, (6,)), lambda x: F.rms_norm(x, (6,), eps=1e-3), F.normalize, lambda x: F.instance_norm(x[None]),
           lambda x: F.group_norm(x[None, :, :, None], 2, x[:, 0], x[:, 1]), lambda x: F.cosine_similarity(x, x.flip(0), 0),
           lambda x: F.batch_norm(x[..., None], torch.zeros(6).to(x), torch.ones(6).to(x))],
    padding=[lambda x, mode=mode: F.pad(x[None], (1, 2), mode).square() for mode in ("constant", "reflect", "replicate", "circular")],
    attention=[lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], is_causal=True),
               lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], attn_mask=(torch.arange(4) < 2).expand(4, 4)),
               lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], attn_mask=torch.zeros(4, 4) > 0)],
    exponential=[lambda x: torch.matrix_exp(x[:, :4])],
    powers=[lambda x: x.exp() ** x.flip(0), lambda x: 2. ** x, lambda x: (1 + x.square()) ** x[0, 0], torch.exp2, lambda x: (2 + x.square()).log2(), lambda x: (2 + x.square()).log10()],
    gates=[lambda x: F.glu(x, 1), lambda x: F.threshold(x, .3, .3), lambda x: F.softshrink(x, .3), F.relu6, lambda x: F.hardtanh(x, -.4, .7)],
    ratios=[lambda x: x / (1 + x.flip(0).square()), lambda x: 1 / (3 + x.cos()), lambda x: (x[0] - 2) / (x[1].exp() - 9)],
    in_place=[lambda x: (o := x.new_zeros(4, 6))[:2].add_(x[2:]) + o[2:].copy_(x[:2]), lambda x: torch.zeros_like(x).add_(x.square()),
              lambda x: x.new_ones(4, 6).index_add_(0, torch.tensor([1, 0, 3, 1]), x)],
)


def weighted(y): return (y * noise(9, *y.shape, 1)[..., 0]).sum()


FUNCTIONS = {name: lambda x, fs=fs: torch.stack([weighted(f(x)) for f in fs]) for name, fs in SEVERAL.items()}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name): same_as_autograd(lambda m: FUNCTIONS[name](m.x), One(noise(3, 4, 6)))


def test_attention_with_grouped_queries():
    q, k = noise(1, 1, 4, 3, 2), noise(2, 1, 2, 3, 2)
    same_as_autograd(lambda m: F.scaled_dot_product_attention(q * m.x, k * m.x, k, enable_gqa=True).sum((0, 2, 3)),
        One(noise(3, 2)))


def test_float32_models_are_evaluated_in_float64():
    net, x = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 3)), torch.randn(4, 5)
    def fn(m):
        p = next(m.parameters())
        return F.softmax(m(x.to(p)), -1, dtype=p.dtype).sum(0).square()
    graph = trace(fn, net)
    found, twin = graph.gradients(dict(net.named_parameters())), net.double()
    assert graph.values(dict(twin.named_parameters())).dtype == torch.float64
    assert_equal(found, autograd(fn, twin))


def test_bfloat16_models_can_be_traced():
    net = nn.Linear(5, 3).bfloat16()
    graph = trace(lambda m: m(torch.ones(2, 5, dtype=torch.bfloat16)).float().sum(0), net)
    assert torch.allclose(graph.values(dict(net.named_parameters())), 2 * (net.weight.double().sum(1) + net.bias.double()))


def test_names_choose_the_inputs():
    net, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double(), noise(1, 3, 5)
    graph = trace(lambda m: m(x).sum(0), net, ["2.weight"])
    assert list(graph.gradients(dict(net.named_parameters()))) == ["2.weight"]
    assert [op.name for op in graph.ops] == ["linear", "sum"]  # the first layer is a constant


def test_dead_ends_are_not_kept():
    graph = trace(lambda m: (m.x.exp().sort(0).values, m.x.argmax(), m.x.sum(0))[2], One(noise(1, 2, 3)))
    assert [op.name for op in graph.ops] == ["sum"]
    graph = trace(lambda m: m.x, One(noise(1, 2)))
    assert len(graph) == 0 and torch.equal(graph.gradients({"x": noise(1, 2)})["x"], torch.eye(2).double())


def test_the_model_is_left_alone():
    net, x = nn.Sequential(nn.Linear(3, 2), nn.ReLU(inplace=True)), torch.ones(4, 3)
    before = [p.detach().clone() for p in net.parameters()]
    trace(lambda m: m(x.mul_(1.)).sum(0), net)
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(net.parameters(), before))
    assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()


def test_discrete_tensors_are_recomputed():
    graph = trace(lambda m: torch.where(m.x > 0, m.x, 3 * m.x)[0] + m.x[m.x.argmax(0), torch.arange(2)], One(noise(1, 3, 2)))
    for seed in range(3):
        x = noise(seed, 3, 2)
        assert torch.allclose(graph.values({"x": x}), torch.where(x > 0, x, 3 * x)[0] + x.amax(0))


def refuses(fn, match, model=None):
    with pytest.raises(ValueError, match=match): trace(fn, model or One(noise(1, 2, 3)))


def test_what_is_refused():
    refuses(lambda m: torch.digamma(m.x).sum(), r"digamma \(<lambda>, line \d+\) is not an operation that is traced")
    refuses(lambda m: m.x.sum() * (2 if m.x.max() > 0 else 1), "Python number")
    refuses(lambda m: m.x.sum() * m.x.sum().item(), "Python number")
    refuses(lambda m: m.x.sum() * float(m.x.sum().tolist()), "other values")
    refuses(lambda m: (m.x * torch.randn(3)).sum(), "other values")
    refuses(lambda m: (m.x * m.x.detach()).sum(), "detach")
    refuses(lambda m: (m.x * m.x.data).sum(), "detach")
    refuses(lambda m: m.x.mul_(2).sum(), "in place")
    refuses(lambda m: F.dropout(m.x).sum(), "native_dropout")
    refuses(lambda m: torch.div(m.x, 2, rounding_mode="floor").sum(), "rounding_mode")
    refuses(lambda m: m.x.clone().transpose_(0, 1).sum(), "transpose_")
    refuses(lambda m: torch.fft.rfft(m.x).abs().sum(0), "_fft_r2c .* is not an operation that is traced")
    refuses(lambda m: torch.ones(3), "does not depend")
    refuses(lambda m: m.x.argmax(0), "does not depend")
    refuses(lambda m: F.batch_norm(m.x, None, None, training=True).sum(), "model.eval")
    def without_gradient(m):
        with torch.no_grad(): y = m.x * 2
        return (y * m.x).sum()
    refuses(without_gradient, "no_grad")
    with pytest.raises(TypeError, match="one Tensor"): trace(lambda m: 1., One(noise(1, 2)))


def test_choices_must_agree():
    graph = trace(lambda m: m.x.index_select(0, m.x.argmax().reshape(1)), One(torch.tensor([1., 2.])))
    ends = {"x": torch.tensor([1., 2.])}, {"x": torch.tensor([3., 2.])}
    both = lambda op, lo, hi: ([op(*lo), op(*hi)], *derivative(op, lo)[1:])
    with pytest.raises(ValueError, match=r"argmax \(<lambda>, line \d+\) comes out differently"): LinearMap(graph, both, *ends)


def test_operations_can_be_added():
    try:
        PRIMITIVES["digamma"] = "elementwise"
        rewrite("i1")(lambda x: torch.special.i1e(x) * x.abs().exp())
        PRIMITIVES["special_i1e"] = "elementwise"
        REWRITES["special_i1"] = REWRITES["i1"]
        same_as_autograd(lambda m: torch.digamma(2 + m.x).sum(0) + torch.special.i1(m.x).sum(0), One(noise(1, 2, 3).abs()))
    finally:
        for k in ("digamma", "special_i1e"): PRIMITIVES.pop(k)
        for k in ("i1", "special_i1"): REWRITES.pop(k)


def test_fused_recurrent_cells():
    "On GPUs these cells are one operation; their rewrites against torch's cells on the CPU."
    x, h, c, wx, bx, bh = noise(1, 4, 5), noise(2, 4, 3), noise(3, 4, 3), noise(4, 12, 5), noise(5, 12), noise(6, 12)
    wh = noise(7, 12, 3)
    found, want = REWRITES["_thnn_fused_lstm_cell"](x @ wx.T, h @ wh.T, c, bx, bh), torch.lstm_cell(x, (h, c), wx, wh, bx, bh)
    assert all(torch.allclose(f, w, rtol=0, atol=1e-14) for f, w in zip(found, want))
    wx, wh, bx, bh = wx[:9], wh[:9], bx[:9], bh[:9]
    found = REWRITES["_thnn_fused_gru_cell"](x @ wx.T, h @ wh.T, h, bx, bh)[0]
    assert torch.allclose(found, torch.gru_cell(x, h, wx, wh, bx, bh), rtol=0, atol=1e-14)


def test_the_graph_can_be_read():
    net, x = nn.Linear(3, 2).double(), noise(1, 4, 3)
    assert "linear(constant[4, 3], weight, bias)" in repr(trace(lambda m: m(x).sum(0), net))


@pytest.mark.parametrize("fn", [lambda m: F.normalize(m.x, dim=1).sum(0), lambda m: m.x.norm(dim=1), lambda m: F.cosine_similarity(m.x, noise(4, 4, 6), 1),
                                lambda m: m.x.std(1), lambda m: m.x.norm()], ids=["normalize", "norm", "cosine", "std", "one"])
def test_rows_of_zeros(fn):
    "As in autograd, a norm has gradient 0 at 0."
    x = noise(3, 4, 6)
    x[1] = 0.
    model = One(x)
    out = fn(model).reshape(-1)
    want = torch.stack([torch.autograd.grad(o, model.x, retain_graph=True)[0] for o in out])
    found = trace(lambda m: fn(m).reshape(-1), model).gradients({"x": model.x})["x"]
    assert want.isfinite().all() and abs(found - want).max() < 1e-12 * abs(want).max()


def test_indices_of_adaptive_pooling():
    x, pool = noise(5, 2, 3, 7, 5), lambda x: F.adaptive_max_pool2d(x, (3, 2), return_indices=True)
    values, indices = pool(x)
    graph = trace(lambda m: pool(m.x)[0] * pool(m.x)[1], One(x))
    assert abs(graph.values({"x": x}) - values * indices).max() < 1e-12


def test_a_threshold_that_jumps_is_refused():
    with pytest.raises(ValueError, match="jumps"): trace(lambda m: F.threshold(m.x, .3, 0.), One(noise(3, 4, 6)))


def test_resnet9_is_traced():
    from explaind_nb.pruning import resnet9
    torch.manual_seed(0)
    model, x = resnet9().double(), noise(1, 2, 3, 32, 32, 1)[..., 0]
    graph = trace(lambda m: m(x)[:, 0], model)
    theta = {k: p.detach() for k, p in model.named_parameters()}
    want = torch.autograd.grad(model(x)[0, 0], list(model.parameters()))
    found = graph.gradients(theta)
    assert all(abs(found[k][0] - g).max() < 1e-10 * (1 + abs(g).max()) for k, g in zip(theta, want))
