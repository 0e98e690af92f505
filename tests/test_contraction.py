"Every engine against a loop of single-sample backward passes, over the zoo; and the errors."
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from explaind_nb.contraction import Contraction, components, heads
from explaind_nb.history import check_modules
from zoo import M, ZOO, Samples, cross_entropy, integers, noise, sample_gradients, slow_scores

IDS = torch.tensor([7, 2, 10, 2, 0, 5, 11])  # shuffled, one id twice, batch of 7 against sequences of 5
WEIGHTS = torch.tensor([0.3, -1.0, 0.0, 2.0, 0.1, 0.5, 1.7], dtype=torch.float64)
SPECS = {"tensor": "tensor", "module": "module", "neuron": "neuron",
         "callable": lambda name, shape: [f"row{j % 2}" for j in range(shape[0])] if "weight" in name else "rest"}


def random_psi(model, T=2, seed=5):
    return {n: noise(seed + j, T, *p.shape) for j, (n, p) in enumerate(model.named_parameters())}


def setup(name, spec="tensor", engine="auto", **kw):
    case = ZOO[name]
    model = case.make()
    return case, model, Contraction(model, case.loss, case.data, components(model, SPECS[spec]), engine, **kw)


def close(a, b, tol=1e-10):
    assert a.shape == b.shape and a.dtype == b.dtype == torch.float64
    error, largest = (a - b).abs().max(), b.abs().max()
    assert error <= tol * largest, f"off by {error:.1e}, largest entry {largest:.1e}"


@pytest.mark.filterwarnings("ignore:.*takes over", "ignore:.*engine failed")
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("engine", ["auto", "ghost", "jvp", "materialise", "loop"])
@pytest.mark.parametrize("name", ZOO)
def test_scores(name, engine, spec):
    if engine == "jvp" and spec == "neuron" and name not in ("mlp tanh", "raw parameters", "used twice"):
        pytest.skip("forward mode takes a pass per row")
    case, model, c = setup(name, spec, engine)
    psi = random_psi(model)
    scores, grad = c(IDS, WEIGHTS, psi)
    close(scores, slow_scores(model, case.loss, case.data, c.comps, IDS, WEIGHTS, psi))
    each = sample_gradients(model, case.loss, case.data, IDS)
    for n in psi: assert torch.allclose(grad[n], torch.einsum("b,b...->...", WEIGHTS, each[n]), atol=1e-12)


GHOST = {"mlp tanh", "mlp in-place relu", "mlp regression", "cnn groupnorm", "cnn frozen batchnorm", "conv1d rmsnorm",
         "conv3d", "transformer", "tied layer", "used twice"}


@pytest.mark.parametrize("name", ZOO)
def test_who_takes_what(name):
    "Ghost takes the layers it has rules for without a warning; what it cannot see moves, by name"
    case, model, c = setup(name)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", UserWarning)
        c.check(torch.arange(M))
        first = len(seen)
        c(IDS, WEIGHTS, random_psi(model))
    assert len(seen) == first  # told once
    moved = {n for n, e in c.engines.items() if e != "ghost"}
    expected = {"transformer positions without batch": {"place.weight"}, "tied functional": {"embed.weight"},
                "multihead attention": {f"block.attention.{o}" for o in ("in_proj_weight", "in_proj_bias", "out_proj.weight",
                                                                         "out_proj.bias")},
                "raw parameters": {"w", "gain", "unused"}, "sequence first": {"inner.weight", "inner.bias"},
                "lstm": {f"rnn.{o}_{i}h_l0" for o in ("weight", "bias") for i in "ih"}}
    assert moved == (set() if name in GHOST else expected[name])
    text = " ".join(str(w.message) for w in seen)
    for n in moved - {"unused"}: assert n in text
    assert ("takes over" in text) == bool(moved)


@pytest.mark.parametrize("engine", ["ghost", "materialise", "jvp"])
def test_chunks(engine):
    case, model, whole = setup("transformer", "tensor", engine)
    parts = Contraction(model, case.loss, case.data, whole.comps, engine, chunk=3)
    psi = random_psi(model)
    (a, ga), (b, gb) = whole(IDS, WEIGHTS, psi), parts(IDS, WEIGHTS, psi)
    close(a, b)
    for n in psi: assert torch.allclose(ga[n], gb[n], atol=1e-12)


def test_small_budget(monkeypatch):
    "Memory bounds cut batches and materialised gradients, results stay"
    case, model, c = setup("tied layer", "neuron", "materialise")
    psi = random_psi(model, T=30)
    expected = slow_scores(model, case.loss, case.data, c.comps, IDS, WEIGHTS, psi)
    monkeypatch.setattr("explaind_nb.contraction.BUDGET", 40_000)
    close(c(IDS, WEIGHTS, psi)[0], expected)
    assert 40_000 // (2 * c.bytes) < len(IDS)


@pytest.mark.parametrize("spec", ["tensor", "neuron"])
def test_many_targets(spec, monkeypatch):
    "The switches of `auto` change the way, not the result"
    monkeypatch.setattr("explaind_nb.contraction._many", lambda T, S: True)
    for name in ("transformer", "used twice", "cnn groupnorm"):
        case, model, c = setup(name, spec)
        psi = random_psi(model, T=40)
        close(c(IDS, WEIGHTS, psi)[0], slow_scores(model, case.loss, case.data, c.comps, IDS, WEIGHTS, psi))


def test_auto_picks_by_cost():
    case, model, c = setup("transformer")
    c.check(IDS)
    assert set(c._plan(random_psi(model, 1)).values()) == {"ghost"}
    c.positions = dict.fromkeys(c.positions, 1000)
    c.sites = []  # no layer with a switch of its own
    assert set(c._plan(random_psi(model, 2)).values()) == {"ghost"}
    assert set(c._plan(random_psi(model, 20)).values()) == {"materialise"}


def test_some_parameters():
    case, model, c = setup("mlp tanh")
    psi = {"body.2.weight": noise(1, 2, 6, 7)}
    scores, grad = c(IDS, WEIGHTS, psi)
    assert set(grad) == set(psi)
    assert scores.abs().sum((0, 2)).nonzero().flatten().tolist() == [c.comps.labels.index("body.2.weight")]
    close(scores, slow_scores(model, case.loss, case.data, c.comps, IDS, WEIGHTS, psi))


def test_leaves_no_trace():
    "Gradients, requires_grad and hooks are as they were; frozen parameters can be asked for"
    case, model, c = setup("mlp tanh")
    model.body[0].weight.requires_grad_(False)
    model.body[2].bias.grad = torch.ones(6).double()
    psi = random_psi(model)
    close(c(IDS, WEIGHTS, psi)[0], slow_scores(case.make(), case.loss, case.data, c.comps, IDS, WEIGHTS, psi))
    assert not model.body[0].weight.requires_grad and model.body[2].weight.requires_grad
    assert model.body[2].weight.grad is None and (model.body[2].bias.grad == 1).all()
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_samples_are_not_scrambled():
    "Swapping two ids swaps their columns; a duplicated sample scores the same twice; weight 0 scores 0"
    case, model, c = setup("transformer")
    psi, ones = random_psi(model), torch.ones(4, dtype=torch.float64)
    a = c(torch.tensor([3, 1, 8, 3]), ones, psi)[0]
    b = c(torch.tensor([3, 8, 1, 3]), ones, psi)[0]
    assert torch.allclose(a[..., [0, 2, 1, 3]], b, rtol=1e-12) and torch.allclose(a[..., 0], a[..., 3], rtol=1e-12)
    assert (a[..., 1] - a[..., 2]).abs().max() > 0.1 * a.abs().max()
    assert not c(torch.tensor([3, 1]), torch.tensor([1.0, 0.0]), psi)[0][..., 1].any()


def test_sequence_as_long_as_the_batch():
    "Five samples of five positions: the layout is known from the check, not from sizes"
    for name in ("sequence first", "transformer", "transformer positions without batch"):
        case, model, _ = setup(name)
        with pytest.warns(UserWarning, match="takes over") if name != "transformer" else warnings.catch_warnings():
            c = Contraction(model, case.loss, case.data, components(model))
            c.check(torch.arange(M))
        psi, ids = random_psi(model), torch.tensor([4, 0, 9, 6, 1])
        close(c(ids, WEIGHTS[:5], psi)[0], slow_scores(model, case.loss, case.data, c.comps, ids, WEIGHTS[:5], psi))


@pytest.mark.parametrize("name", sorted(GHOST))
def test_float32(name):
    "Single precision: same engine choice, no warning, error of rounding size"
    case, model, c64 = setup(name)
    psi = random_psi(model)
    exact, _ = c64(IDS, WEIGHTS, psi)
    c = Contraction(model.float(), case.loss, case.data, c64.comps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores, grad = c(IDS, WEIGHTS, psi)
    close(scores, exact, 1e-5)
    assert all(g.dtype == torch.float64 for g in grad.values())


def test_fallback_when_an_operation_has_no_forward_mode():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): ctx.save_for_backward(x); return x.exp()
        @staticmethod
        def backward(ctx, g): return g * ctx.saved_tensors[0].exp()
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.head = nn.Parameter(noise(1, 3, 5)), nn.Linear(3, 4).double()
        def forward(self, x): return self.head(Opaque.apply(F.linear(x, self.w)))
    model, data = Net(), ZOO["raw parameters"].data
    for engine in ("auto", "jvp", "materialise"):
        comps = components(model, "neuron" if engine == "auto" else "tensor")
        c = Contraction(model, cross_entropy, data, comps, engine)
        with pytest.warns(UserWarning) as seen: c.check(IDS)
        assert any("engine failed" in str(w.message) for w in seen)
        psi = random_psi(model)
        close(c(IDS, WEIGHTS, psi)[0], slow_scores(model, cross_entropy, data, c.comps, IDS, WEIGHTS, psi))
        assert c.engines["w"] == "loop" and (engine != "auto" or c.engines["head.weight"] == "ghost")


def test_heads():
    model = ZOO["transformer"].make()
    comps = components(model, heads(2, "block.q"))
    split = [o for o in comps.labels if ".head" in o]
    assert split == [f"block.q.{o}.head{j}" for o in ("weight", "bias") for j in range(2)]
    psi = random_psi(model)
    c = Contraction(model, cross_entropy, ZOO["transformer"].data, comps)
    close(c(IDS, WEIGHTS, psi)[0], slow_scores(model, cross_entropy, ZOO["transformer"].data, comps, IDS, WEIGHTS, psi))


def test_components_sum():
    model = ZOO["transformer"].make()
    psi = random_psi(model)
    for spec in SPECS.values():
        total = components(model, spec).sum(psi)
        assert torch.allclose(total.sum(1), sum(p.flatten(1).sum(1) for p in psi.values()))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert components(shapes, "neuron").labels == components(model, "neuron").labels


# Errors: each names what is wrong and the remedy


def refuse(match, model=None, loss=cross_entropy, data=None, ids=IDS, error=ValueError, **kw):
    case = ZOO["mlp tanh"]
    with pytest.raises(error, match=match):
        model = case.make() if model is None else model
        Contraction(model, loss, data or case.data, components(model), **kw).check(ids)


def test_loss_shape():
    refuse("returned shape \\(\\) for 3 samples.*reduction='none'", loss=lambda m, b: cross_entropy(m, b).mean())
    refuse("returned shape \\(3, 4\\)", loss=lambda m, b: m(b["x"]))
    refuse("returned type tuple", loss=lambda m, b: (cross_entropy(m, b), 0))


def test_coupled_samples():
    refuse("losses of samples.*couples the samples", loss=lambda m, b: cross_entropy(m, b) - cross_entropy(m, b).mean())
    refuse("differ: the loss is random", loss=lambda m, b: F.dropout(m(b["x"]), 0.5).sum(1))


def test_random_layers():
    model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.1))
    with pytest.raises(ValueError, match="'1' .Dropout. is random.*eval"): check_modules(model.named_modules())
    check_modules(model.eval().named_modules())
    with pytest.raises(ValueError, match="'0' .BatchNorm1d. couples the samples of a batch.*GroupNorm"):
        check_modules(nn.Sequential(nn.BatchNorm1d(3)).named_modules())
    with pytest.raises(ValueError, match="'0' .MultiheadAttention."):
        check_modules(nn.Sequential(nn.MultiheadAttention(4, 2, dropout=0.1)).named_modules())
    refuse("BatchNorm2d", model=nn.Sequential(nn.BatchNorm2d(6)).train())
    model = ZOO["mlp tanh"].make()
    c = Contraction(model, cross_entropy, ZOO["mlp tanh"].data, components(model))
    model.body.append(nn.Dropout(0.2))
    with pytest.raises(ValueError, match="Dropout"): c.check(IDS)


@pytest.mark.parametrize("option", [dict(max_norm=1.0), dict(scale_grad_by_freq=True)])
def test_embedding_options(option):
    refuse(f"Embedding '0' uses {list(option)[0]}", model=nn.Sequential(nn.Embedding(5, 2, **option)))


def test_ids():
    refuse("ids from .* to 99.*data of length 12", ids=torch.tensor([0, 99]), error=IndexError)
    refuse("ids from -1", ids=torch.tensor([-1]), error=IndexError)
    pair = noise(1, M, 5), integers(1, 4, M)
    refuse("data\\[ids\\] failed.*batch for a LongTensor", data=pair, ids=torch.tensor([0, 1]), error=IndexError)
    refuse("No sample ids", ids=torch.tensor([], dtype=torch.long))


def test_not_finite():
    x = noise(1, M, 5)
    x[10] = float("nan")
    refuse("loss is not finite for samples \\[10\\]", data=Samples(x, integers(1, 4, M)), ids=torch.tensor([0, 10]))
    def kink(m, b): return cross_entropy(m, b) + (m(b["x"])[:, 0] * (b["y"] == 3)).square().sqrt()  # 0 * inf unless y is 3
    model, data = ZOO["mlp tanh"].make(), ZOO["mlp tanh"].data
    c = Contraction(model, kink, data, components(model))
    with pytest.raises(ValueError, match="gradient is not finite for samples"): c(IDS, WEIGHTS, random_psi(model))


def test_psi():
    case, model, c = setup("mlp tanh")
    with pytest.raises(ValueError, match="psi names nothing"): c(IDS, WEIGHTS, {"nothing": noise(1, 2, 3)})
    with pytest.raises(ValueError, match="psi of body.0.bias has shape \\(2, 3\\). Give \\('T', 7\\)"):
        c(IDS, WEIGHTS, {"body.0.bias": noise(1, 2, 3)})
    with pytest.raises(ValueError, match="psi is empty"): c(IDS, WEIGHTS, {})


def test_names():
    model = ZOO["mlp tanh"].make()
    with pytest.raises(ValueError, match="Unknown engine 'fast'"):
        Contraction(model, cross_entropy, None, components(model), "fast")
    with pytest.raises(ValueError, match="Unknown component grouping 'head'"): components(model, "head")
    with pytest.raises(ValueError, match="no label for body.0.bias"): components(model, {"body.0.weight": "a"})
    with pytest.raises(ValueError, match="2 row labels for body.0.weight"): components(model, lambda n, s: ["a", "b"])
