"Path scores against `explain` and loops of autograd, baselines against loops, masks to the last entry, what is refused."
import io
import tarfile
from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr
from test_kernel import BATCHES, OPTIMIZERS, record
from torch import nn
from zoo import ZOO

from explaind_nb import pruning
from explaind_nb.influence import importance
from explaind_nb.kernel import explain
from explaind_nb.pruning import BASELINES, Task, along, apply_mask, by_row, compare, fine_tune, gradient_times_weight, groups, here, keep_mask, path_scores, prune, recorded, rank_correlation, straight


def outputs(model, batch): return model(batch[0]).log_softmax(-1)
def loss(model, batch): return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(27, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def points(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 5, 5, generator=g, dtype=torch.float64), torch.randint(4, (n,), generator=g)


def loop(model, outputs, points, theta, delta):
    "Gradient of every output of every point times a displacement, one by one: [rows, D]."
    rows, model = [], network()
    with torch.no_grad():
        for k, p in model.named_parameters(): p.copy_(theta[k])
    for i in range(len(points[0])):
        for out in outputs(model, (points[0][i:i + 1], points[1][i:i + 1])).flatten():
            grads = torch.autograd.grad(out, list(model.parameters()), retain_graph=True)
            rows.append(torch.cat([(g * delta[k]).flatten() for g, k in zip(grads, theta)]))
    return torch.stack(rows)


def flat(score): return torch.cat([v.flatten() for v in score.values()]).double()


@pytest.mark.parametrize("optimizer", ["adamw", "adam_l2", "nesterov"])
@pytest.mark.parametrize("spec", ["tensor", "neuron"])
def test_components_are_those_of_explain(tmp_path, optimizer, spec):
    "The signed scores of the parameters add up to `explain`'s data part; absolute after the sum, they are `influence.importance`"
    case = ZOO["mlp tanh"]
    model = record(tmp_path / "run", case, OPTIMIZERS[optimizer], BATCHES["unequal"])
    batch = case.data[torch.arange(5)]
    each = lambda m, b: m(b["x"]).flatten(1)
    found = path_scores(model, each, batch, partial(recorded, tmp_path / "run", model), spec)
    r = explain(tmp_path / "run", model, None, None, lambda m: each(m, batch).flatten(), keep=("target", "component"), component=spec, step_axis="update",
                rule="midpoint", progress=False)
    labels, place = groups(model, spec)
    assert labels == list(r.component.values)
    signed = torch.zeros(len(labels), dtype=torch.float64).index_add_(0, place, flat(found["signed"]))
    np.testing.assert_allclose(signed, r.data.sum("target"), atol=1e-12 * abs(r.data).max().item() + 1e-13, rtol=1e-9)
    np.testing.assert_allclose(list(found["components"].values()), importance(r), rtol=1e-9, atol=1e-13)


def test_rows_of_any_number_at_once():
    "How many rows are held changes nothing; one output per point or many"
    m, batch = network(), points()
    for f in (outputs, loss):
        whole, one = (along(m, f, batch, partial(straight, m, 3), lambda x: dict(a=x.abs().sum(0), s=x.sum(0)), held=held) for held in (None, 1))
        for k in whole: torch.testing.assert_close(whole[k], one[k], rtol=1e-12, atol=1e-14)


def test_along_against_a_loop():
    m, batch = network(), points(3)
    path = [({k: torch.randn_like(p) for k, p in m.named_parameters()}, {k: torch.randn_like(p) for k, p in m.named_parameters()}) for _ in range(3)]
    got = along(m, outputs, batch, lambda: iter(path), lambda x: dict(x=x.abs().sum(0), y=x.sum(0)))
    want = sum(loop(m, outputs, batch, *o) for o in path)
    torch.testing.assert_close(got["x"], want.abs().sum(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got["y"], want.sum(0), rtol=1e-10, atol=1e-12)


def test_integrated_gradients_are_complete():
    m, batch = network(), points()
    zero = apply_mask(network(), {k: torch.zeros_like(p, dtype=torch.bool) for k, p in m.named_parameters()})
    change = (outputs(m, batch) - outputs(zero, batch)).flatten()
    rows = along(m, outputs, batch, partial(straight, m, 200), lambda x: dict(sum=x.sum()))["sum"]
    coarse = along(m, outputs, batch, partial(straight, m, 20), lambda x: dict(sum=x.sum()))["sum"]
    assert abs(rows - change.sum()) < 1e-4 * change.abs().sum() and abs(coarse - change.sum()) < 1e-2 * change.abs().sum()


@pytest.mark.parametrize("name, reduce", [("Taylor", lambda x: x.abs().sum(0)), ("Fisher", lambda x: x.square().sum(0)), ("gradient × weight", lambda x: x.mean(0).abs())])
def test_baselines_of_the_gradient(name, reduce):
    m, batch = network(), points()
    want = reduce(loop(m, loss, batch, *next(here(m))))
    torch.testing.assert_close(flat(BASELINES[name](m, loss, batch)), want, rtol=1e-10, atol=1e-14)


def test_magnitude_and_random():
    m, batch = network(), points()
    for k, v in BASELINES["magnitude"](m, loss, batch).items(): torch.testing.assert_close(v, dict(m.named_parameters())[k].detach().abs())
    a, b = (flat(BASELINES["random"](m, loss, batch)) for _ in range(2))
    assert (a != b).all() and a.min() >= 0


def test_wanda_against_loops():
    "|W| times the norm of the input it multiplies, at every place of the image"
    m, (x, y) = network(), points(3)
    got = BASELINES["Wanda"](m, loss, (x, y))
    padded, total = nn.functional.pad(x, (1, 1, 1, 1)), torch.zeros(2, 3, 3).double()
    for i in range(3):
        for a in range(3):
            for b in range(3): total += padded[i, :, 2 * a:2 * a + 3, 2 * b:2 * b + 3]**2
    torch.testing.assert_close(got["0.weight"], m[0].weight.abs().detach() * total.sqrt())
    h = m[:3](x)
    for o in range(5):
        for j in range(27): assert abs(got["3.weight"][o, j].item() - abs(m[3].weight[o, j].item()) * h[:, j].norm().item()) < 1e-12
    torch.testing.assert_close(got["3.bias"], m[3].bias.abs().detach() * 3**.5)


def test_wanda_of_embeddings_and_groups():
    e = nn.Embedding(4, 2)
    batch = (torch.tensor([[1, 1], [2, 1]]), torch.zeros(2))
    got = BASELINES["Wanda"](e, lambda m, b: m(b[0]).sum((1, 2)), batch)["weight"]
    torch.testing.assert_close(got, e.weight.abs().detach() * torch.tensor([0, 3, 1, 0.]).sqrt()[:, None])
    with pytest.raises(ValueError, match="convolution in groups"): BASELINES["Wanda"](nn.Conv2d(2, 2, 1, groups=2), lambda m, b: m(b[0]), (torch.zeros(1, 2, 3, 3),))


def test_hooks_are_gone():
    "Also after an error"
    m = network()
    BASELINES["Wanda"](m, loss, points())
    with pytest.raises(IndexError): BASELINES["Wanda"](m, loss, (torch.zeros(1, 1, 1), torch.zeros(1)))
    assert not any(o._forward_pre_hooks for o in m.modules())


def test_a_parameter_without_gradient():
    class Idle(nn.Module):
        def __init__(self): super().__init__(); self.idle, self.w = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
        def forward(self, x): return x * self.w
    m, batch = Idle(), (torch.ones(2, 3), torch.tensor([0, 1]))
    assert not gradient_times_weight(m, loss, batch)["idle"].any()
    assert not path_scores(m, outputs, batch, partial(straight, m, 2))["importance"]["idle"].any()


def test_rows_lose_the_same_share():
    score = by_row(dict(w=torch.rand(6, 20), b=torch.rand(3)))
    assert score["b"].shape == (3,)
    assert (keep_mask(dict(w=score["w"]), .75)["w"].sum(1) == 5).all()
    assert (keep_mask(by_row(dict(a=torch.rand(8, 9), b=torch.rand(4, 100))), .9)["a"].sum(1) == 1).all()       # short rows keep their best
    w = torch.rand(6, 20)
    assert (by_row(dict(w=w))["w"].argsort(1) == w.argsort(1)).all()


@pytest.mark.parametrize("sparsity", [0, .1, .3, .5, .7, .9, .95, .99, .999, 1])
@pytest.mark.parametrize("ties", [False, True])
def test_exactly_so_many_stay(sparsity, ties):
    "Exactly n - floor(sparsity n), globally and in every tensor, whatever is equal"
    torch.manual_seed(0)
    score = {k: torch.randint(2, s).float() if ties else torch.rand(s) for k, s in dict(a=(10, 10), b=(7,), c=(3, 4, 5)).items()}
    cut = lambda n: int(np.floor(round(sparsity * n, 9)))
    got = keep_mask(score, sparsity)
    assert sum(int(v.sum()) for v in got.values()) == 167 - cut(167)
    assert all(int(v.sum()) == score[k].numel() - cut(score[k].numel()) for k, v in keep_mask(score, sparsity, True).items())
    kept, lost = (torch.cat([score[k][v if keep else ~v] for k, v in got.items()]) for keep in (True, False))
    if len(kept) and len(lost): assert kept.min() >= lost.max()


def test_the_order_of_ties():
    "The later one is cut first"
    assert keep_mask(dict(a=torch.ones(3), b=torch.ones(3)), .5)["a"].all()
    assert keep_mask(dict(a=torch.tensor([1., 0., 1., 0.])), .25)["a"].tolist() == [True, True, True, False]


def test_masks_nest():
    "What is cut stays cut at a higher sparsity"
    torch.manual_seed(0)
    score = dict(a=torch.randint(3, (50,)).float(), b=torch.rand(20))
    for per_layer in (False, True):
        masks = [keep_mask(score, s, per_layer) for s in (.2, .5, .9)]
        for more, less in zip(masks, masks[1:]): assert all((less[k] <= more[k]).all() for k in score)


def test_prune_and_fine_tune():
    m, (x, y) = network(), points(12)
    before = [p.clone() for p in m.parameters()]
    score = {k: v for k, v in BASELINES["magnitude"](m, loss, (x, y)).items() if k.endswith("weight")}
    mask, pruned = keep_mask(score, .8), prune(m, score, .8)
    assert all(torch.equal(a, b) for a, b in zip(before, m.parameters()))
    for k, p in pruned.named_parameters(): assert torch.equal(p != 0, mask[k]) if k in mask else torch.equal(p, dict(m.named_parameters())[k])
    was = loss(pruned, (x, y)).mean()
    optimizer = torch.optim.AdamW(pruned.parameters(), lr=.05, weight_decay=.1)
    fine_tune(pruned, mask, optimizer, loss, torch.utils.data.TensorDataset(x, y), [torch.arange(12)] * 20)
    assert loss(pruned, (x, y)).mean() < .7 * was
    assert all(not p[~mask[k]].any() for k, p in pruned.named_parameters() if k in mask)
    assert all(p.grad is None for p in pruned.parameters())


def test_metrics():
    m, batch = network(), points(50)
    with torch.no_grad(): p, q = outputs(m, batch), outputs(other := prune(m, BASELINES["magnitude"](m, loss, batch), .5), batch)
    got = compare(other, p, batch)
    assert got["accuracy"] == sum(int(a.argmax()) == int(b) for a, b in zip(q, batch[1])) / 50
    assert got["agreement"] == sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(p, q)) / 50
    assert abs(got["kl"] - np.mean([sum((a.exp() * (a - b)).tolist()) for a, b in zip(p, q)])) < 1e-12
    same = compare(m, p, batch)
    assert same["agreement"] == 1 and abs(same["kl"]) < 1e-12


def test_rank_correlation():
    assert rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1) and rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([0, 0, 1, 2], [0, 0, 5, 5]) == pytest.approx(np.corrcoef([1.5, 1.5, 3, 4], [1.5, 1.5, 3.5, 3.5])[0, 1])
    assert np.isnan(rank_correlation([0, 0], [1, 2]))


@pytest.mark.parametrize("call, message", [
    (lambda m: keep_mask(dict(a=torch.ones(2)), 1.5), "between 0 and 1"), (lambda m: keep_mask(dict(a=torch.ones(2)), -1), "between 0 and 1"),
    (lambda m: keep_mask(dict(a=torch.ones(2)), float("nan")), "between 0 and 1"),
    (lambda m: keep_mask({}, .5), "no scores"), (lambda m: keep_mask(dict(a=torch.tensor([1., float("nan")])), .5), "scores of 'a' are not finite"),
    (lambda m: prune(m, dict(nothing=torch.ones(2)), .5), "no parameter 'nothing'"), (lambda m: prune(m, {"5.bias": torch.ones(2)}, .5), "have shape"),
    (lambda m: along(m, lambda m, b: loss(m, b).mean(), points(), partial(here, m), None), "one row for each of the 6 points"),
])
def test_refused(call, message):
    with pytest.raises(ValueError, match=message): call(network())


def test_resnet9():
    "The paper's count; outputs and gradients on random images; its path scores over two recorded steps"
    torch.manual_seed(0)
    m, x, y = pruning.resnet9(), torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 1, 0])
    assert sum(p.numel() for p in m.parameters()) == 2_271_168
    out = m(x)
    assert out.shape == (4, 2)
    torch.testing.assert_close(out.exp().sum(1), torch.ones(4))
    nn.functional.nll_loss(out, y).backward()
    assert all(p.grad.abs().sum() > 0 for p in m.parameters())
    assert pruning.prunable(m, "9") == [k for k, _ in m.named_parameters()][:-1]


def test_resnet9_through_the_study(tmp_path):
    "The same code as for the small networks, over two steps"
    x, y = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0])
    task = Task(pruning.resnet9, partial(pruning.triangular, lr=.1, weight_decay=5e-3), None, loss, outputs, torch.utils.data.TensorDataset(x, y), (x[:1], y[:1]), (x, y), 3, 4, "9", pruning.channels("9"), held=2)
    m, initial = pruning.fit_recorded(task, 0, tmp_path / "run")
    found = path_scores(m, outputs, task.points, partial(recorded, tmp_path / "run", m), task.unit, task.held)
    assert set(found["importance"]) == {k for k, _ in m.named_parameters()} and all(v.isfinite().all() for v in found["importance"].values())
    assert sum(v.sum() for v in found["importance"].values()) > 0 and len(found["components"]) == 64 + 128 * 3 + 256 * 3 + 128 + 1


def test_cifar2_from_a_file(tmp_path):
    "Records of a label and 3072 bytes in an archive, as on the home page"
    rng = np.random.default_rng(0)
    record = lambda label: bytes([label]) + rng.integers(256, size=3072, dtype=np.uint8).tobytes()
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for name, labels in [*((f"data_batch_{i}", [3, 5, i]) for i in range(1, 6)), ("test_batch", [5, 0, 3])]:
            raw = b"".join(map(record, labels))
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin"); info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    (x, y), (x_test, y_test) = pruning.cifar2(tmp_path)
    assert x.shape == (12, 3, 32, 32) and y.tolist() == [0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 1, 1] and y_test.tolist() == [1, 0]
    raw = record(3)
    image = pruning.cats_and_dogs(raw)[0][0]
    assert abs(image[2, 1, 4] - (raw[1 + 2 * 1024 + 32 + 4] - 113.8575) / 51.255) < 1e-6


def test_study_is_written_and_read(tmp_path):
    task = pruning.digits_task(width=2, steps=12, points=5)
    ds = pruning.study(task, range(2), sparsities=(.5, .9), tune_from=.9)
    pruning.write(dict(a=ds, b=[1.5, "c"]), tmp_path / "r.json")
    back = pruning.read(tmp_path / "r.json")
    xr.testing.assert_allclose(back["a"], ds, rtol=1e-3)
    assert back["b"] == [1.5, "c"]
    assert ds.curves.sel(tuned=True, sparsity=.5).isnull().all() and ds.curves.sel(tuned=True, sparsity=.9).notnull().all() and ds.curves.sel(tuned=False).notnull().all()
    again = pruning.study(task, range(1), sparsities=(.5, .9), tune_from=.9)
    xr.testing.assert_identical(again.curves.sel(seed=0), ds.curves.sel(seed=0))
    for ax in (pruning.plot_curves(back["a"], "accuracy"), pruning.plot_correlation(back["a"], "2"), pruning.plot_ablation(back["a"])): assert ax.has_data()


def test_parts_of_the_run(tmp_path):
    "A window is that of `explain`: what the momentum brings into it is `initial`, not data. Every part of every seed has a correlation"
    task = pruning.digits_task(width=2, steps=12, points=5)
    model, _ = pruning.fit_recorded(task, 0, tmp_path / "run")
    found = path_scores(model, task.outputs, task.points, partial(recorded, tmp_path / "run", model, 1, (5, 12)))["components"]
    r = explain(tmp_path / "run", model, None, None, lambda m: task.outputs(m, task.points).flatten(), keep=("target", "component"), step_axis="update", steps=(5, 12),
                rule="midpoint", progress=False)
    assert abs(r.initial).max() > 0
    np.testing.assert_allclose(list(found.values()), importance(r), rtol=1e-4)
    ds = pruning.over_time(task, range(1), parts=3)
    assert ds.correlation.dims == ("kind", "part", "seed") and ds.correlation.shape == (3, 3, 1) and ds.part[-1] == 1
    assert pruning.plot_over_time(ds).has_data()
