"Every engine against a loop of single-sample backward passes, over the zoo; and the errors."
import random
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from explaind_nb.contraction import Contraction, components, heads
from explaind_nb.history import check_modules, random_state, set_random_state
from zoo import CLASSES, M, VOCAB, ZOO, Samples, Transformer, cross_entropy, integers, noise, sample_gradients, slow_scores

IDS = torch.tensor([7, 2, 10, 2, 0, 5, 11])  # shuffled, one id twice, batch of 7 against sequences of 5
WEIGHTS = torch.tensor([0.3, -1.0, 0.0, 2.0, 0.1, 0.5, 1.7], dtype=torch.float64)
SPECS = {"tensor": "tensor", "module": "module", "neuron": "neuron",
         "callable": lambda name, shape: [f"row{j % 2}" for j in range(shape[0])] if "weight" in name else "rest"}


def random_psi(model, T=2, seed=5):
    return {n: noise(seed + j, T, *p.shape) for j, (n, p) in enumerate(model.named_parameters()) if p.requires_grad}


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


def recurrent(*ends): return {f"rnn.{o}_{i}h_l{e}" for o in ("weight", "bias") for i in "ih" for e in ends}


def computed(layer, *ends): return {f"{layer}.parametrizations.weight.original{e}" for e in ends}


MOVED = {"transformer positions without batch": {"place.weight"}, "raw parameters": {"gain"},
         "cross attention": {"query", "attention.bias_k", "attention.bias_v"},
         "parametrized": computed("normed", 0, 1) | computed("conv", 0, 1) | computed("spectral", "") | computed("rotation", ""),
         "lstm": recurrent(0), "gru both ways": recurrent("0", "0_reverse"), "rnn two layers": recurrent(0, 1)}
GHOST = ZOO.keys() - MOVED


@pytest.mark.parametrize("name", ZOO)
def test_who_takes_what(name):
    "Ghost takes the layers it has rules for without a warning; what it cannot see moves, by name"
    case, model, c = setup(name)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", UserWarning)
        c.check(torch.arange(M))
        first = len(seen)
        c(IDS, WEIGHTS, random_psi(model))
    assert len([w for w in seen[first:] if "takes over" in str(w.message)]) == 0  # told once
    moved = {n for n, e in c.engines.items() if e != "ghost"}
    assert moved == MOVED.get(name, set())
    text = " ".join(str(w.message) for w in seen)
    for n in moved: assert n in text
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
    assert set(c._plan(random_psi(model, 1), 7).values()) == {"ghost"}
    c.positions = dict.fromkeys(c.positions, 1000)
    c.linear = set()  # no layer with a switch of its own
    assert set(c._plan(random_psi(model, 2), 7).values()) == {"ghost"}
    assert set(c._plan(random_psi(model, 20), 7).values()) == {"materialise"}
    c.replay = lambda: None  # a batch that must not be taken apart
    assert set(c._plan(random_psi(model, 20), 7).values()) == {"ghost"}


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
    psi = random_psi(model)
    model.body[0].weight.requires_grad_(False)
    model.body[2].bias.grad = torch.ones(6).double()
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
    "Five samples of five positions, four of four: the layout is known from small batches, not from sizes"
    for name in ("sequence first", "transformer", "transformer positions without batch", "attention sequence first"):
        case, model, _ = setup(name)
        with pytest.warns(UserWarning, match="takes over") if name in MOVED else warnings.catch_warnings():
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
        def forward(self, x): return self.head(Opaque.apply(torch.einsum("bi,oi->bo", x, self.w)))
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


# Uses and layouts


def test_an_adapter_that_starts_at_zero():
    "The inner factor has no gradient while the outer is zero; its layout is found when it first has one"
    case, model, c = setup("low-rank adapters")
    psi = random_psi(model)
    c(IDS, WEIGHTS, psi)
    assert not any("c" in names for names, *_ in c.layouts)
    with torch.no_grad(): model.d.copy_(noise(3, CLASSES, 2))
    close(c(IDS, WEIGHTS, psi)[0], slow_scores(model, case.loss, case.data, c.comps, IDS, WEIGHTS, psi))
    assert set(c.engines.values()) == {"ghost"} and any("c" in names for names, *_ in c.layouts)


def test_only_the_first_position_counts():
    "Four positions of three samples, one of them used: rows 0, 4, 8 of samples in front, 0, 1, 2 behind the positions"
    class Net(nn.Module):
        def __init__(self, turned):
            super().__init__()
            self.turned, self.inner, self.head = turned, nn.Linear(5, 6), nn.Linear(6, CLASSES)
        def forward(self, x):                                                     # [B, 4, 5]
            if self.turned: x = x.transpose(0, 1)
            h = self.inner(x.reshape(-1, 5)).view(*x.shape[:2], 6).tanh()         # flattened
            return self.head(h[0] if self.turned else h[:, 0])
    for turned in (False, True):
        for place in (0, 1, 3):
            model, data = Net(turned).double(), Samples(noise(place, M, 4, 5).roll(place, 1), integers(2, CLASSES, M))
            c = Contraction(model, cross_entropy, data, components(model))
            psi = random_psi(model)
            for n in (1, 2, 3, 4, 7):
                ids, w = IDS[:n], WEIGHTS[:n] + 1
                close(c(ids, w, psi)[0], slow_scores(model, cross_entropy, data, c.comps, ids, w, psi))
            assert set(c.engines.values()) == {"ghost"}


def test_a_batch_of_one_decides_nothing():
    "After a check on one sample the layout is still to be found"
    case, model, c = setup("multihead attention")
    c.check(torch.tensor([3]))
    assert c.checked == 1 and not c.layouts
    psi = random_psi(model)
    for ids in ([3], [3, 3], [4, 0, 9, 6, 1]):
        ids = torch.tensor(ids)
        close(c(ids, WEIGHTS[:len(ids)], psi)[0], slow_scores(model, case.loss, case.data, c.comps, ids, WEIGHTS[:len(ids)], psi))
    assert c.checked == 3 and set(c.engines.values()) == {"ghost"}


def test_samples_without_loss():
    "A hinge: most samples have neither loss nor gradient, and tell nothing of the layout"
    case = ZOO["sequence first"]
    def hinge(m, b): return F.relu(m(b[0])[:, 0] - shift)
    model = case.make()
    shift = model(case.data[torch.arange(M)][0])[:, 0].topk(4).values[-1].item()   # three samples are left
    c = Contraction(model, hinge, case.data, components(model))
    psi = random_psi(model)
    close(c(torch.arange(M), torch.ones(M).double(), psi)[0],
          slow_scores(model, hinge, case.data, c.comps, torch.arange(M), torch.ones(M), psi))
    assert set(c.engines.values()) == {"ghost"}


@pytest.mark.filterwarnings("ignore:.*not used any more")
def test_sparse_experts():
    "Layers that see some of the rows only have no batch axis"
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts, self.head = nn.ModuleList(nn.Linear(5, 5) for _ in range(3)), nn.Linear(5, CLASSES)
        def forward(self, x):
            flat, out = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
            which = (flat[:, 0] * 7).long() % 3
            for j, e in enumerate(self.experts): out = out.index_put((which == j,), e(flat[which == j]))
            return self.head(out.tanh().view_as(x).mean(1))
    model, data = Experts().double(), ZOO["used twice"].data
    c, psi = Contraction(model, cross_entropy, data, components(model)), random_psi(model)
    with pytest.warns(UserWarning, match="neither in front nor"): scores, _ = c(IDS, WEIGHTS, psi)
    close(scores, slow_scores(model, cross_entropy, data, c.comps, IDS, WEIGHTS, psi))


# Samples of other kinds: tokens, whole batches


class Tokens:
    "Sample = token: id = sequence * S + position. The batch holds each sequence once, sorted or as they come"
    def __init__(self, x, y, ordered): self.x, self.y, self.ordered = x, y, ordered
    def __len__(self): return self.x.numel()
    def __getitem__(self, ids):
        sequence, place = ids // self.x.shape[1], ids % self.x.shape[1]
        rows = sequence.unique() if self.ordered else torch.tensor(list(dict.fromkeys(sequence.tolist())))
        at = (sequence[:, None] == rows).long().argmax(1)
        return self.x[rows], at, place, self.y[sequence, place]


def token_loss(model, batch):
    x, at, place, y = batch
    return F.cross_entropy(model(x)[at, place], y, reduction="none")


@pytest.mark.filterwarnings("ignore:.*takes over", "ignore:.*engine failed")
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("engine", ["auto", "ghost", "jvp", "materialise", "loop"])
def test_token_samples(engine, ordered):
    "As many sequences as tokens but in another order; several tokens of a sequence; all tokens of two sequences"
    torch.manual_seed(0)
    model = Transformer().double()
    data = Tokens(integers(6, VOCAB, M, 5), integers(8, CLASSES, M, 5), ordered)
    c, psi = Contraction(model, token_loss, data, components(model), engine), random_psi(model)
    for ids in ([33, 12, 4], [4, 12, 33], [7, 33, 5, 5, 12], [*range(10, 20)], [48, 31, 27, 13, 2]):
        ids, w = torch.tensor(ids), noise(len(ids), len(ids))
        close(c(ids, w, psi)[0], slow_scores(model, token_loss, data, c.comps, ids, w, psi))
    if engine in ("auto", "ghost"): assert c.engines["head.weight"] != "ghost" and c.engines["block.q.weight"] != "ghost"


class Whole:
    "Sample = batch: `data[ids]` gives the pairs of views of the batches `ids`; with `alone` of one batch only"
    def __init__(self, alone): self.x, self.alone = noise(4, M, 6, 2, 5), alone
    def __len__(self): return M
    def __getitem__(self, ids):
        if self.alone and (not isinstance(ids, torch.Tensor) or len(ids) > 1): raise IndexError("one batch at a time")
        return self.x[ids]                                                         # [batches, pairs, 2, d]


def contrastive(model, x):
    "The other pairs of a batch are the negatives: one loss per batch"
    z = F.normalize(model(x.flatten(0, 2)).view(*x.shape[:3], -1), dim=-1)
    logits = torch.einsum("npd,nqd->npq", z[:, :, 0], z[:, :, 1]) / 0.2
    return F.cross_entropy(logits.flatten(0, 1), torch.arange(x.shape[1]).repeat(len(x)), reduction="none").view(len(x), -1).mean(1)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("engine", ["auto", "jvp", "materialise", "loop"])
def test_a_sample_may_be_a_batch(engine, alone):
    "In-batch negatives couple the pairs of a batch, but not batches"
    model, data = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double(), Whole(alone)
    pairs = Samples(data.x.flatten(0, 1))
    def coupled(m, b): return contrastive(m, b[0][None]).expand(len(b[0])) * torch.arange(1, len(b[0]) + 1)
    with pytest.raises(ValueError, match="couples the samples.*number whole batches"):
        Contraction(model, coupled, pairs, components(model), engine).check(IDS)
    c, psi = Contraction(model, contrastive, data, components(model), engine), random_psi(model)
    for ids in IDS[:, None] if alone else (IDS, IDS[:1]):
        w = WEIGHTS[:len(ids)]
        close(c(ids, w + 2, psi)[0], slow_scores(model, contrastive, data, c.comps, ids, w + 2, psi))
    if engine == "auto": assert set(c.engines.values()) == {"ghost"}


# Randomness, replayed


class Noisy(nn.Module):
    "Dropout on activations and inside of attention; a raw parameter for forward mode"
    def __init__(self):
        super().__init__()
        self.lift, self.drop, self.gain = nn.Linear(5, 6), nn.Dropout(0.4), nn.Parameter(torch.tensor(1.3))
        self.attention, self.head = nn.MultiheadAttention(6, 2, dropout=0.3, batch_first=True), nn.Linear(6, CLASSES)
    def forward(self, x):
        h = self.drop(self.lift(x))
        return self.head(self.drop(h + self.gain * self.attention(h, h, h)[0]).mean(1))


class Augmented(Samples):
    "Noise from torch, a flip by numpy and a scale by Python, drawn when the batch is fetched"
    def __getitem__(self, ids):
        x, y = super().__getitem__(ids)
        x = x + 0.3 * torch.randn(x.shape, dtype=x.dtype)
        flip = torch.from_numpy(np.random.rand(len(ids))) < 0.5
        return torch.where(flip[:, None, None], x.flip(1), x) * (1 + random.random()), y


def noisy_case():
    torch.manual_seed(3)
    model = Noisy().double()
    torch.manual_seed(8); np.random.seed(8); random.seed(8)
    return model, Augmented(noise(3, M, 5, 5), integers(7, CLASSES, M)), partial(set_random_state, random_state())


def replayed_scores(model, data, comps, psi, replay):
    "One backward pass per entry of the batch, each from the same random numbers"
    out = []
    for k, w in enumerate(WEIGHTS):
        replay()
        grads = torch.autograd.grad(cross_entropy(model, data[IDS])[k], list(model.parameters()))
        out.append(comps.sum({n: w * g * psi[n] for n, g in zip(psi, grads)}))
    return torch.stack(out, -1)


@pytest.mark.filterwarnings("ignore:.*takes over")
@pytest.mark.parametrize("T", [1, 12])
@pytest.mark.parametrize("engine", ["auto", "ghost", "jvp", "materialise", "loop"])
def test_replay(engine, T, monkeypatch):
    "The scores under the recorded masks and augmentation, by every engine; the generators stay as they are"
    model, data, replay = noisy_case()
    comps, psi = components(model), random_psi(model, T)
    expected = replayed_scores(model, data, comps, psi, replay)
    c = Contraction(model, cross_entropy, data, comps, engine, chunk=2)
    if T > 1: monkeypatch.setattr("explaind_nb.contraction.BUDGET", 10_000)         # batches stay whole, gradients come in parts
    torch.manual_seed(1); np.random.seed(1); random.seed(1)
    before = random_state()
    scores, grad = c(IDS, WEIGHTS, psi, replay)
    assert torch.equal(random_state(), before)
    close(scores, expected)
    close(comps.sum({n: grad[n] * psi[n] for n in psi}), expected.sum(-1))
    ghost = engine in ("auto", "ghost")
    assert {n for n, e in c.engines.items() if e != ("ghost" if ghost else engine)} == ({"gain"} if ghost else set())
    again = c(IDS, WEIGHTS, psi, replay)[0]
    assert torch.equal(scores, again)


@pytest.mark.filterwarnings("ignore:.*takes over")
def test_random_needs_replay():
    model, data, replay = noisy_case()
    c = Contraction(model, cross_entropy, data, components(model))
    with pytest.raises(ValueError, match="Dropout. is random"): c.check(IDS)
    c.check(IDS, replay)
    with pytest.raises(ValueError, match="Dropout. is random"): c(IDS, WEIGHTS, random_psi(model))
    with pytest.raises(ValueError, match="differ: the loss is random .dropout, augmentation.. Evaluate"):
        Contraction(model.eval(), cross_entropy, data, components(model)).check(IDS)
    own = torch.Generator()
    def hidden(m, b): return cross_entropy(m, b) * torch.rand(len(b[1]), generator=own)
    with pytest.raises(ValueError, match="not by the generators of torch"):
        Contraction(model, hidden, data, components(model)).check(IDS, replay)


def test_coupling_under_replay():
    "Masks differ from place to place, so samples are not run alone: the others are replaced"
    model, data, replay = noisy_case()
    def coupled(m, b): loss = cross_entropy(m, b); return loss - 0.1 * loss.mean()
    with pytest.raises(ValueError, match="couples the samples"):
        Contraction(model, coupled, data, components(model)).check(IDS, replay)
    class Padded(Augmented):
        "As long as the longest sample: replacing the others changes the number of masks drawn"
        def __getitem__(self, ids): x, y = super().__getitem__(ids); return x[:, :2 + int(ids.max()) % 4], y
    with pytest.warns(UserWarning, match="changes with the other ids"):
        Contraction(model, cross_entropy, Padded(*data.tensors), components(model), "jvp").check(IDS, replay)


# Errors: each names what is wrong and the remedy


def refuse(match, model=None, loss=cross_entropy, data=None, ids=IDS, error=ValueError, **kw):
    case = ZOO["mlp tanh"]
    with pytest.raises(error, match=match):
        model = case.make() if model is None else model
        Contraction(model, loss, data or case.data, components(model), **kw).check(ids)


def test_loss_shape():
    refuse("returned shape \\(\\) for 6 samples.*reduction='none'", loss=lambda m, b: cross_entropy(m, b).mean())
    refuse("returned shape \\(6, 4\\)", loss=lambda m, b: m(b["x"]))
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
