"The sweep against the independent slow reference, entry by entry in float64, and everything about a query that would bore a reader of the notebook."
import warnings

import numpy as np
import pytest
import torch
import xarray as xr
from torch.utils._pytree import tree_map
from zoo import ZOO

from explaind_nb.average import ema
from explaind_nb.derivation import reference_kernel
from explaind_nb.history import History, Indexed, Recorder
from explaind_nb.kernel import _check_memory, explain, load, reconstruct, save
from explaind_nb.optimizers import LinearStep, register

TOL = 1e-9  # of the largest entry

OPTIMIZERS = dict(
    sgd=lambda ps: torch.optim.SGD(ps, lr=.1),
    sgd_decay=lambda ps: torch.optim.SGD(ps, lr=.1, weight_decay=.1),
    momentum=lambda ps: torch.optim.SGD(ps, lr=.05, momentum=.9, weight_decay=.1),
    dampening=lambda ps: torch.optim.SGD(ps, lr=.05, momentum=.9, dampening=.5, weight_decay=.1),
    nesterov=lambda ps: torch.optim.SGD(ps, lr=.05, momentum=.9, nesterov=True, weight_decay=.1),
    maximize=lambda ps: torch.optim.SGD(ps, lr=.01, momentum=.9, weight_decay=.1, maximize=True),
    adam=lambda ps: torch.optim.Adam(ps, lr=.02),
    adam_l2=lambda ps: torch.optim.Adam(ps, lr=.02, weight_decay=.1, betas=(.8, .95)),
    adam_amsgrad=lambda ps: torch.optim.Adam(ps, lr=.02, weight_decay=.1, amsgrad=True, maximize=True),
    adamw=lambda ps: torch.optim.AdamW(ps, lr=.02, weight_decay=.5),
    adamw_amsgrad=lambda ps: torch.optim.AdamW(ps, lr=.02, weight_decay=.5, amsgrad=True, betas=(.8, .9)),
)

def order(seed): return torch.randperm(12, generator=torch.Generator().manual_seed(seed))

BATCHES = dict(
    full=[torch.arange(12)] * 4,
    shuffled_full=[order(s) for s in range(4)],
    minibatch=[b for s in range(2) for b in order(s).split(4)],
    unequal=[b for s in range(2) for b in order(s).split(5)],
    repeats=[torch.tensor([3, 3, 1]), torch.tensor([0, 3, 7, 7, 7]), torch.tensor([1]), torch.tensor([11, 3, 0, 0])],
)


def record(path, case, make_optimizer, batches, weights=None, schedule=None, model=None):
    "Record a run of a zoo case with the user's loop."
    model = model or case.make()
    optimizer = make_optimizer(model.parameters())
    with Recorder(model, optimizer, path) as recorder:
        for s, ids in enumerate(batches):
            if schedule: schedule(optimizer, s)
            w = torch.full((len(ids),), 1 / len(ids), dtype=torch.float64) if weights is None else weights[s]
            recorder.batch(ids, None if weights is None else w)
            (w * case.loss(model, case.data[ids])).sum().backward()
            optimizer.step(); optimizer.zero_grad()
    return model


def reference(case, make_optimizer, batches, weights=None, schedule=None, nodes=2):
    model = case.make(); optimizer = make_optimizer(model.parameters())
    return reference_kernel(model, optimizer, case.data, batches, case.loss, case.target, nodes, weights, schedule and (lambda s: schedule(optimizer, s)))


def close(ours, theirs, tol=TOL):
    theirs = theirs.numpy()
    assert ours.shape == theirs.shape
    assert abs(ours.values - theirs).max() <= tol * max(abs(theirs).max(), 1e-300)


def run_explain(path, case, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)     # engines may change, by name; the results are what is tested here
        return explain(path, case.make(), case.data, case.loss, case.target, rule="midpoint", nodes=2, progress=False, **kwargs)


def compare(path, case, ref, **kwargs):
    "Both step axes, decay, initial and residual against the reference."
    seen, moved = run_explain(path, case, **kwargs), run_explain(path, case, step_axis="update", **kwargs)
    assert list(seen.component.values) == [n for n in ref.names if n in seen.component.values]
    C = [ref.names.index(n) for n in seen.component.values]
    close(seen.data.transpose("step", "component", "sample", "target"), ref.kernel.sum(0)[:, C])
    close(moved.data.transpose("step", "component", "sample", "target"), ref.kernel.sum(1)[:, C])
    close(seen.decay.transpose("step", "component", "target"), ref.decay_gradient[:, C])
    close(moved.decay.transpose("step", "component", "target"), ref.decay[:, C])
    march = run_explain(path, case, step_axis="update", keep=("target", "step", "component"), **kwargs)     # the same without samples: no sweep at all
    close(march.data.transpose("step", "component", "target"), ref.kernel.sum((1, 3))[:, C])
    close(march.decay.transpose("step", "component", "target"), ref.decay[:, C])
    for r in (seen, moved, march):
        assert r.closing_error < 1e-12
        assert abs(r.prediction.values - ref.prediction.numpy()).max() < 1e-9
        size = abs(ref.residual).max() + 1e-9
        assert abs(r.quadrature.transpose("step", "target").values - ref.residual.numpy()).max() < 1e-6 * size + 1e-11


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_and_batch(tmp_path, optimizer, batches):
    case = ZOO[list(ZOO)[0]]
    record(tmp_path / "run", case, OPTIMIZERS[optimizer], BATCHES[batches])
    compare(tmp_path / "run", case, reference(case, OPTIMIZERS[optimizer], BATCHES[batches]))


@pytest.mark.parametrize("name", ZOO)
def test_every_model(tmp_path, name):
    case, batches = ZOO[name], BATCHES["unequal"][:3]
    record(tmp_path / "run", case, OPTIMIZERS["adamw"], batches)
    compare(tmp_path / "run", case, reference(case, OPTIMIZERS["adamw"], batches))


@pytest.mark.parametrize("name", ZOO)
def test_the_secant_rule_leaves_no_residual(tmp_path, name):
    "At one piece per step, both sweeps, all targets at once or summed; the shares are those of the reference up to second order."
    case = ZOO[name]
    record(tmp_path, case, OPTIMIZERS["adamw"], BATCHES["unequal"][:2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        ask = lambda **kw: explain(tmp_path, case.make(), case.data, case.loss, case.target, progress=False, **kw)
        whole, summed = ask(rule="secant"), ask(rule="secant", keep=("sample",))
        finer, near = (ask(rule="secant", nodes=4), ask(rule="midpoint", nodes=1000)) if "pooling" in name else (whole, ask(rule="gauss", nodes=8))    # kinks: four pieces, and a reference that sees them
    full = reconstruct(tmp_path, case.make(), case.target, rule="secant", progress=False)
    for r in (whole, summed, full): assert abs(r.residual).max() < 1e-13 and r.closing_error < 1e-13
    assert np.allclose(summed.data, whole.data.sum([d for d in whole.data.dims if d != "sample"]), rtol=0, atol=1e-11 * abs(whole.data).max())
    limit = .2 if name == "tied functional" else .02                       # autograd leaves out what the padding row does there
    assert abs(finer.data - near.data).max() < limit * abs(near.data).max()
    assert np.allclose(full.data.sum(("step", "component")), whole.data.sum(("step", "component", "sample")), rtol=0, atol=1e-11 * abs(whole.data).max())


@pytest.mark.parametrize("axis", ["gradient", "update"])
def test_the_secant_rule_with_an_average(small, axis):
    case, path = small
    r = run_rule(path, case, "richardson", step_axis=axis, average=ema(.7), keep=("target", "step", "component") if axis == "update" else ("step", "sample"))
    assert abs(r.residual).max() < 1e-13 and r.closing_error < 1e-13 and r.nodes_per_step == 3
    f = reconstruct(path, case.make(), case.target, rule="secant", average=ema(.7), progress=False)
    assert abs(f.residual).max() < 1e-13 and abs(f.prediction - explain(path, case.make(), None, None, case.target, keep=("target",), average=ema(.7), progress=False).prediction.values).max() < 1e-13


def run_rule(path, case, rule, **kwargs): return explain(path, case.make(), case.data, case.loss, case.target, rule=rule, progress=False, **kwargs)


def schedule(optimizer, s):
    for g in optimizer.param_groups: g["lr"] = 0. if s == 2 else g["lr"] * .8 if s != 3 else .03


@pytest.mark.parametrize("optimizer", ["momentum", "adam_l2", "adamw"])
def test_schedule_with_a_step_of_lr_zero(tmp_path, optimizer):
    case, batches = ZOO[list(ZOO)[0]], BATCHES["unequal"]
    record(tmp_path / "run", case, OPTIMIZERS[optimizer], batches, schedule=schedule)
    compare(tmp_path / "run", case, reference(case, OPTIMIZERS[optimizer], batches, schedule=schedule))
    moved = run_explain(tmp_path / "run", case, step_axis="update")
    assert abs(moved.data.sel(step=2)).max() == 0 and float(moved.lr[2]) == 0


def test_weights_and_accumulation(tmp_path):
    case = ZOO[list(ZOO)[0]]
    batches, weights = BATCHES["repeats"], [torch.rand(len(b), dtype=torch.float64) for b in BATCHES["repeats"]]
    record(tmp_path / "run", case, OPTIMIZERS["adamw"], batches, weights)
    compare(tmp_path / "run", case, reference(case, OPTIMIZERS["adamw"], batches, weights))
    model = case.make(); optimizer = OPTIMIZERS["adamw"](model.parameters())
    with Recorder(model, optimizer, tmp_path / "parts") as recorder:                # the same gradients, accumulated over two calls
        for ids, w in zip(batches, weights):
            for half in (slice(None, len(ids) // 2), slice(len(ids) // 2, None)):
                if not len(ids[half]): continue
                recorder.batch(ids[half], w[half])
                (w[half] * case.loss(model, case.data[ids[half]])).sum().backward()
            optimizer.step(); optimizer.zero_grad()
    compare(tmp_path / "parts", case, reference(case, OPTIMIZERS["adamw"], batches, weights))


def groups(ps):
    ps = list(ps)
    return torch.optim.AdamW([dict(params=ps[:1], lr=.05, weight_decay=0.), dict(params=ps[1:], lr=.01, betas=(.7, .9))], weight_decay=.3)


def test_parameter_groups(tmp_path):
    case = ZOO[list(ZOO)[0]]
    record(tmp_path / "run", case, groups, BATCHES["unequal"])
    compare(tmp_path / "run", case, reference(case, groups, BATCHES["unequal"]))


@pytest.mark.parametrize("optimizer", ["momentum", "adam_l2", "adamw"])
def test_clipping_scales_credit(tmp_path, optimizer):
    "Clipping by norm is a frozen factor: the run equals one whose sample weights were scaled."
    case, batches, factors = ZOO[list(ZOO)[0]], BATCHES["unequal"], []
    model = case.make(); opt = OPTIMIZERS[optimizer](model.parameters())
    with Recorder(model, opt, tmp_path / "run") as recorder:
        for ids in batches:
            recorder.batch(ids)
            case.loss(model, case.data[ids]).mean().backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), .1)
            factors.append(min(1., .1 / (norm.item() + 1e-6)))
            opt.step(); opt.zero_grad()
    assert min(factors) < 1
    weights = [torch.full((len(b),), f / len(b), dtype=torch.float64) for b, f in zip(batches, factors)]
    compare(tmp_path / "run", case, reference(case, OPTIMIZERS[optimizer], batches, weights))


def test_warm_optimizer_and_windows(tmp_path):
    "What happened before the window is `initial`; the windows of a run add up to the run."
    case, batches = ZOO[list(ZOO)[0]], BATCHES["unequal"]
    for name in ("momentum", "adam_l2", "adamw"):
        path = tmp_path / name
        record(path, case, OPTIMIZERS[name], batches)
        model = case.make(); optimizer = OPTIMIZERS[name](model.parameters())
        reference_kernel(model, optimizer, case.data, batches[:3], case.loss, case.target)           # leaves both warm
        ref = reference_kernel(model, optimizer, case.data, batches[3:], case.loss, case.target, 2)
        part = run_explain(path, case, steps=(3, len(batches)))
        close(part.data.transpose("step", "component", "sample", "target"), ref.kernel.sum(0))
        close(part.initial.transpose("component", "target"), ref.initial)
        assert abs(part.initial).sum() > 0 and list(part.step.values) == list(range(3, len(batches)))
        first, whole = run_explain(path, case, steps=(0, 3)), run_explain(path, case)
        assert np.allclose(first.prediction, part.baseline, atol=1e-13) and np.allclose(part.prediction, whole.prediction, atol=1e-13)
        gathered = run_explain(path, case, steps=range(0, len(batches), 2), step_axis="update")
        fine = run_explain(path, case, step_axis="update")
        assert np.allclose(gathered.data, np.add.reduceat(fine.data.values, np.arange(0, len(batches), 2), axis=fine.data.dims.index("step")), atol=1e-13)


def test_unused_and_frozen_parameters(tmp_path):
    case = ZOO[list(ZOO)[0]]
    model = case.make(); first = next(iter(model.parameters())); first.requires_grad_(False)
    name = next(n for n, p in model.named_parameters() if p is first)
    optimizer = torch.optim.AdamW(model.parameters(), lr=.02)
    with Recorder(model, optimizer, tmp_path / "run") as recorder:
        for ids in BATCHES["minibatch"]:
            recorder.batch(ids); case.loss(model, case.data[ids]).mean().backward(); optimizer.step(); optimizer.zero_grad()
    r = run_explain(tmp_path / "run", case)
    assert r.closing_error < 1e-12 and abs(r.data.sel(component=name)).max() == 0 and abs(r.residual).max() < 1e-2


def test_swapping_two_ids_swaps_their_columns(tmp_path):
    case = ZOO[list(ZOO)[0]]
    record(tmp_path / "run", case, OPTIMIZERS["adamw"], BATCHES["unequal"])

    class Swapped:
        perm = torch.tensor([5, 1, 2, 3, 4, 0, *range(6, 12)])
        def __len__(self): return 12
        def __getitem__(self, ids): return case.data[self.perm[ids]]
    swap = case._replace(data=Swapped())
    record(tmp_path / "swapped", swap, OPTIMIZERS["adamw"], [Swapped.perm[b] for b in BATCHES["unequal"]])
    a, b = run_explain(tmp_path / "run", case), run_explain(tmp_path / "swapped", swap)
    assert np.allclose(a.data.values, b.data.isel(sample=Swapped.perm.numpy()).values, atol=1e-13)
    assert not np.allclose(a.data.isel(sample=0), a.data.isel(sample=5), atol=1e-9)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    case, path = ZOO[list(ZOO)[0]], tmp_path_factory.mktemp("small") / "run"
    record(path, case, OPTIMIZERS["adamw"], BATCHES["unequal"])
    return case, path


@pytest.mark.parametrize("engine", ["ghost", "jvp", "materialise"])
def test_engines_agree(small, engine):
    case, path = small
    a, b = run_explain(path, case), run_explain(path, case, engine=engine)
    assert abs(a.data - b.data).max() < 1e-12 * abs(a.data).max()


KEEPS = [(), ("target",), ("step",), ("sample",), ("component",), ("target", "sample"), ("step", "component"), ("step", "sample"), ("target", "step", "component"), ("component", "sample")]
@pytest.mark.parametrize("axis", ["gradient", "update"])
@pytest.mark.parametrize("keep", KEEPS)
def test_any_subset_of_axes(small, keep, axis):
    "What is not kept is summed: the same numbers as summing the full result."
    case, path = small
    whole, part = run_explain(path, case, step_axis=axis), run_explain(path, case, keep=keep, step_axis=axis)
    assert set(part.data.dims) == set(keep) and "sample" not in part.decay.dims and part.closing_error < 1e-12
    for name in ("data", "decay", "initial", "residual"):
        want = whole[name].sum([d for d in whole[name].dims if d not in keep])
        assert set(part[name].dims) == set(want.dims), name
        assert abs(part[name] - want).max() < 1e-11 * max(1e-3, abs(whole.data).max()), name


@pytest.mark.parametrize("component", ["tensor", "module", "neuron"])
def test_components(small, component):
    case, path = small
    whole, part = run_explain(path, case, keep=("target",)), run_explain(path, case, keep=("target", "component", "sample"), component=component)
    assert abs(part.data.sum(("component", "sample")) - whole.data).max() < 1e-12
    split = run_explain(path, case, keep=("target", "component"), component=component)                  # by the recorded gradients
    assert abs(part.data.sum("sample") - split.data).max() < 1e-10 and list(part.component.values) == list(split.component.values)


def test_custom_component(small):
    case, path = small
    named = run_explain(path, case, component=lambda name, shape: "bias" if name.endswith("bias") else "weight")
    assert list(named.component.values) == ["weight", "bias"] and named.closing_error < 1e-12


def test_adaptive_meets_its_tolerance(small):
    case, path = small
    for tol in (1e-1, 1e-3):
        r = explain(path, case.make(), case.data, case.loss, case.target, keep=("step", "target"), tol=tol, progress=False)
        change = r.data + r.decay + r.residual
        average = abs(r.prediction - r.baseline).mean() / len(r.step)
        allowed = tol * np.maximum(abs(change).mean("target"), average)
        assert (abs(r.quadrature).mean("target") <= 1.001 * allowed + 1e-14).all() and r.nodes_total == int(r.nodes.sum())


def test_completion_removes_the_residual_and_says_so(small):
    case, path = small
    kwargs = dict(rule="midpoint", nodes=1, progress=False)
    plain = explain(path, case.make(), case.data, case.loss, case.target, **kwargs)
    full = explain(path, case.make(), case.data, case.loss, case.target, complete=True, **kwargs)
    assert abs(plain.quadrature).max() > 1e-8 and abs(full.residual).max() < 1e-12 and full.completed == 1 and full.closing_error < 1e-12


def test_penalty_is_its_own_part(tmp_path):
    case = ZOO[list(ZOO)[0]]
    penalty = lambda m: .01 * sum(p.square().sum() for p in m.parameters())
    for name in ("momentum", "adamw"):
        model = case.make(); optimizer = OPTIMIZERS[name](model.parameters())
        with Recorder(model, optimizer, tmp_path / name) as recorder:
            for ids in BATCHES["unequal"]:
                recorder.batch(ids); (case.loss(model, case.data[ids]).mean() + penalty(model)).backward(); optimizer.step(); optimizer.zero_grad()
        with pytest.raises(ValueError, match="penalty="): run_explain(tmp_path / name, case)
        r = run_explain(tmp_path / name, case, penalty=penalty)
        assert r.closing_error < 1e-12 and abs(r.replay).max() < 1e-12 and abs(r.penalty).max() > 1e-6
    # under SGD an L2 penalty of c is a weight decay of 2c
    decayed = lambda ps: torch.optim.SGD(ps, lr=.05, momentum=.9, weight_decay=.12)
    record(tmp_path / "decayed", case, decayed, BATCHES["unequal"])
    d, r = run_explain(tmp_path / "decayed", case), run_explain(tmp_path / "momentum", case, penalty=penalty)
    assert np.allclose(d.decay, r.decay + r.penalty, atol=1e-12) and np.allclose(d.data, r.data, atol=1e-12)


def test_a_new_optimizer_is_tens_of_lines(tmp_path):
    class SignedStep(torch.optim.Optimizer):
        "Plain descent with twice the gradient: an optimizer that the library does not know."
        def __init__(self, params, lr): super().__init__(params, dict(lr=lr))
        @torch.no_grad()
        def step(self):
            for g in self.param_groups:
                for p in g["params"]: p.sub_(2 * g["lr"] * p.grad)

    class Doubled(LinearStep):
        names, state = ("lr",), None
        @classmethod
        def state_keys(cls, group): return ["grad"]
        def forward(self, state, g): return -2 * self.lr * g, state
        def transpose(self, phi, carry=None): return -2 * self.lr * phi, carry
        def gradient(self, state_prev, theta): return self.rec["grad"]

    case = ZOO[list(ZOO)[0]]
    with pytest.raises(TypeError, match="register"): record(tmp_path / "no", case, lambda ps: SignedStep(ps, .05), BATCHES["unequal"])
    register(SignedStep, Doubled)
    record(tmp_path / "run", case, lambda ps: SignedStep(ps, .05), BATCHES["unequal"])
    record(tmp_path / "sgd", case, lambda ps: torch.optim.SGD(ps, lr=.1), BATCHES["unequal"])
    assert np.allclose(run_explain(tmp_path / "run", case).data, run_explain(tmp_path / "sgd", case).data, atol=1e-13)


def test_the_users_model_is_untouched(small):
    case, path = small
    model = case.make(); before = {k: v.clone() for k, v in model.state_dict().items()}; grads = [p.requires_grad for p in model.parameters()]
    explain(path, model, case.data, case.loss, case.target, keep=("sample",), progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and grads == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())


def test_float32_run_in_two_precisions(tmp_path):
    case = ZOO[list(ZOO)[0]]
    model = case.make().float()
    floats = lambda ids: tree_map(lambda x: x.float() if x.is_floating_point() else x, case.data[ids])
    optimizer = torch.optim.AdamW(model.parameters(), lr=.02)
    with Recorder(model, optimizer, tmp_path / "run") as recorder:
        for ids in BATCHES["unequal"]:
            recorder.batch(ids); case.loss(model, floats(ids)).mean().backward(); optimizer.step(); optimizer.zero_grad()
    target = lambda m: torch.cat([p.flatten() for p in m.parameters()])[:5].square()
    for dtype in (None, torch.float64):
        r = explain(tmp_path / "run", model, case.data, case.loss, target, dtype=dtype, progress=False)
        assert r.closing_error < 1e-12 and r.dtype == ("float32" if dtype is None else "float64")
        assert 0 < abs(r.rounding).max() < 1e-5 and abs(r.replay).max() < 1e-5 and r.gradient_mismatch < 1e-4


def test_reconstruct_tells_quadrature_from_rounding(tmp_path):
    "A float32 run: the secant rule leaves no quadrature, what is left is the rounding of the recorded steps; the two are the residual under every rule."
    case = ZOO["transformer"]
    record(tmp_path, case, lambda ps: torch.optim.AdamW(ps, lr=.02, weight_decay=.5), BATCHES["minibatch"], model=case.make().float())
    by = {rule: reconstruct(tmp_path, case.make(), case.target, rule=rule, nodes=1, progress=False) for rule in ("secant", "midpoint")}
    for full in by.values():
        np.testing.assert_allclose(full.residual, full.quadrature + full.rounding, rtol=0, atol=1e-15)
        assert "component" not in full.quadrature.dims and full.closing_error < 1e-12
    secant, midpoint = by["secant"], by["midpoint"]
    assert abs(secant.quadrature).max() < 1e-12 and 1e-12 < abs(secant.rounding).max() < 1e-5
    assert abs(midpoint.quadrature).max() > 100 * abs(secant.quadrature).max()
    assert abs(midpoint.rounding - secant.rounding).max() < .1 * abs(secant.rounding).max()


def test_reconstruct_keeps_and_closes(small):
    case, path = small
    fn = lambda m: case.target(m).reshape(1, -1)
    whole = reconstruct(path, case.make(), fn, progress=False)
    for keep in ((), ("step",), ("component",)):
        part = reconstruct(path, case.make(), fn, keep=keep, progress=False)
        assert part.closing_error < 1e-12 and set(part.data.dims) == {*keep, "target", "output"}
        assert np.allclose(part.data, whole.data.sum([d for d in ("step", "component") if d not in keep]), atol=1e-12)
    assert whole.closing_error < 1e-12


def test_save_and_load(small, tmp_path):
    case, path = small
    r = run_explain(path, case)
    save(r, tmp_path / "r.nc")
    xr.testing.assert_identical(load(tmp_path / "r.nc"), r)
    assert set(p.name for p in tmp_path.iterdir()) == {"r.nc"}


def test_refusals(small, tmp_path):
    case, path = small
    ask = lambda **kw: explain(path, **{**dict(model=case.make(), data=case.data, loss=case.loss, target=case.target, progress=False), **kw})
    class Short:
        def __len__(self): return 5
        def __getitem__(self, ids): return case.data[ids]
    calls = iter(range(10**6))
    def mutating(m):
        with torch.no_grad(): next(m.parameters()).mul_(1.01)
        return case.target(m)
    outside = case.make()
    bad = [(dict(target=lambda m: case.target(m) * (1 + next(calls))), "it is random"), (dict(target=mutating), "changes the model's parameters"),
           (dict(target=lambda m: case.target(outside)), "does not depend"), (dict(target=lambda m: case.target(m)[:0]), "no values"),
           (dict(data=None), "keep holds 'sample'"), (dict(data=torch.utils.data.DataLoader([1])), "loader.dataset"), (dict(data=(1, 2)), "TensorDataset"),
           (dict(keep="sample"), "keep is a tuple"), (dict(nodes=0), "positive integer"), (dict(tol=-1.), "positive number"), (dict(dtype="float64"), "torch.float64"),
           (dict(steps=5), "not a window"), (dict(steps=(0, None)), "not a window"), (dict(model=None), "nn.Module"),
           (dict(loss=lambda m, b: case.loss(outside, b)), "does not depend on its `model` argument"),
           (dict(data=Short()), "sample id"), (dict(target=lambda m: torch.ones(3)), "does not depend"), (dict(target=lambda m: 1.), "must return a Tensor"),
           (dict(target=lambda m: case.target(m) * float("nan")), "not finite"), (dict(steps=(3, 99)), "not a window"), (dict(step_axis="both"), "step_axis"),
           (dict(rule="simpson"), "Unknown quadrature"), (dict(samples=[0, 1]), "samples="), (dict(keep=("step",), penalty=lambda m: 0.), "keep 'sample'"),
           (dict(engine="magic"), "engine"), (dict(loss=lambda m, b: case.loss(m, b) - case.loss(m, b).mean()), "couples"),
           (dict(model=torch.nn.Sequential(case.make(), torch.nn.Dropout(.5))), "recorded|random")]
    for kw, text in bad:
        with pytest.raises((ValueError, TypeError), match=text): ask(**kw)
    with pytest.raises(ValueError, match="no history"): explain(tmp_path / "nothing", case.make(), case.data, case.loss, case.target)
    with pytest.raises(MemoryError, match="keep fewer axes"): _check_memory(("step", "sample"), dict(step=10**6, sample=10**9))


def test_parameters_outside_the_optimizer(tmp_path):
    "Fine-tuning: only some parameters are owned; what the model passed to explain holds elsewhere is replaced by the recording's."
    case = ZOO[list(ZOO)[0]]
    model = case.make(); named = dict(model.named_parameters()); names = list(named)[2:]
    for n in list(named)[:2]: named[n].requires_grad_(False)
    optimizer = torch.optim.AdamW([named[n] for n in names], lr=.02)
    with Recorder(model, optimizer, tmp_path / "run") as recorder:
        for ids in BATCHES["unequal"]:
            recorder.batch(ids); case.loss(model, case.data[ids]).mean().backward(); optimizer.step(); optimizer.zero_grad()
    final = case.target(model).detach()
    other = case.make()
    with torch.no_grad(): next(other.parameters()).add_(1.)
    for engine in ("ghost", "jvp", "materialise"):
        r = explain(tmp_path / "run", other, case.data, case.loss, case.target, engine=engine, progress=False)
        assert list(r.component.values) == names and r.closing_error < 1e-12 and np.allclose(r.prediction, final, atol=1e-12) and abs(r.replay).max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_batch_that_moves_nothing_is_no_mismatch(tmp_path, dtype):
    "Only dead units in the second step: the gradient recovered from Adam's moments is rounding, the revisited one is 0."
    nn = torch.nn
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False)).to(dtype)
    with torch.no_grad(): model[0].weight.copy_(-model[0].weight.abs() - .1)
    x, y = torch.tensor([[-1., -1.], [1., 1.], [-2., -1.]], dtype=dtype), torch.tensor([0, 1, 1])
    data, loss = torch.utils.data.TensorDataset(x, y), lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="none")
    optimizer = torch.optim.Adam(model.parameters(), lr=.01, weight_decay=.1)
    with Recorder(model, optimizer, tmp_path) as recorder:
        for ids in map(torch.tensor, ([0, 2], [1], [0])):
            recorder.batch(ids); loss(model, data[ids]).mean().backward(); optimizer.step(); optimizer.zero_grad()
    result = explain(tmp_path, model, data, loss, lambda m: m(x)[:, 0], progress=False)
    assert result.closing_error < 1e-12 and abs(result.data.sel(sample=1)).max() == 0
    with pytest.raises(ValueError, match="does not depend on its `model`"):
        explain(tmp_path, model, data, lambda m, b: loss(model, b) * 0, lambda m: m(x)[:, 0], progress=False)


def test_map_style_data_sets(small, tmp_path):
    "A list or a Subset, which take one number at a time, are collated; the result is the same."
    case, path = small
    items = [tree_map(lambda x, i=i: x[i], case.data[torch.arange(12)]) for i in range(12)]
    want = run_explain(path, case)
    for data in (items, torch.utils.data.Subset(items, range(12))):
        assert abs(run_explain(path, case._replace(data=data)).data - want.data).max() < 1e-13


def test_wrong_data_later_in_the_run_is_reported(small, tmp_path):
    "The first steps match and the later ones do not; targets that cancel do not hide it. The unrolled sweep, which has no account for it, refuses."
    case, batches = small[0], BATCHES["minibatch"]
    record(tmp_path, case, OPTIMIZERS["adamw"], batches)
    early = torch.cat(batches[:2])
    class Late:
        def __len__(self): return 12
        def __getitem__(self, ids): return tree_map(lambda a, b: torch.where(torch.isin(ids, early).reshape(-1, *[1] * (a.dim() - 1)), a, b), case.data[ids], case.data[11 - ids])
    both = lambda m: torch.stack([case.target(m)[0], -case.target(m)[0]])
    with pytest.warns(UserWarning, match="differ from the recorded ones.*recorded at step [2-5] is not the one revisited.*data"):
        r = explain(tmp_path, case.make(), Late(), case.loss, both, rule="midpoint", progress=False)
    assert r.gradient_mismatch > .01
    with pytest.raises(ValueError, match="recorded at step [2-5] is not the one revisited"): explain(tmp_path, case.make(), Late(), case.loss, both, sweep="unrolled", progress=False)


def test_uneven_batches_divided_by_a_constant_are_refused(small, tmp_path):
    "The first two batches are full; the third is smaller, but the loop divides by the size of a full one."
    case, batches = small[0], BATCHES["unequal"]
    model = case.make()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with Recorder(model, optimizer, tmp_path) as recorder:
        for ids in batches:
            recorder.batch(ids)
            (case.loss(model, case.data[ids]).sum() / 5).backward()
            optimizer.step(); optimizer.zero_grad()
    for sweep in ("frozen", "unrolled"):
        with pytest.raises(ValueError, match="step 2 .*0.4 times that one.*weight="): explain(tmp_path, case.make(), case.data, case.loss, case.target, sweep=sweep, progress=False)


def test_another_activation_is_noticed(small):
    case, path = small
    model = case.make()
    name = next(n for n, m in model.named_modules() if not list(m.parameters()))
    model.set_submodule(name, torch.nn.Softplus())
    with pytest.warns(UserWarning, match="print differently"): explain(path, model, None, None, case.target, keep=("step",), progress=False)


def test_another_precision_is_named(small):
    case, path = small
    with pytest.raises(RuntimeError, match="evaluated in torch.float32.*dtype="): explain(path, case.make(), case.data, case.loss, case.target, dtype=torch.float32, progress=False)


def test_arguments_that_do_nothing_are_refused(small):
    case, path = small
    for how, text in ((dict(sweep="unrolled", rule="secant"), "integrates nothing"), (dict(rule="secant", complete=True), "no residual"), (dict(keep=("step",), samples=["a"] * 12), "put 'sample' into keep")):
        with pytest.raises(ValueError, match=text): explain(path, case.make(), case.data, case.loss, case.target, progress=False, **how)
    for bad in (None, 3): 
        with pytest.raises(TypeError, match="directory of a recording"): explain(bad, case.make(), case.data, case.loss, case.target, progress=False)
    with pytest.raises(TypeError, match="function of the model"): explain(path, case.make(), case.data, case.loss, torch.ones(1), progress=False)
    r = explain(path, case.make(), case.data, case.loss, case.target, steps=(np.int64(0), np.int64(2)), progress=False)
    assert r.sizes["step"] == 2


@pytest.mark.parametrize("rule", ["midpoint", "secant"])
def test_a_weight_may_be_the_target(tmp_path, rule):
    "Weights are sums of updates: exact at any rule, the values not overwritten while the network moves."
    case = ZOO["raw parameters"]
    record(tmp_path, case, OPTIMIZERS["adamw"], BATCHES["unequal"])
    h, name = History(tmp_path), "head.bias"
    r = explain(tmp_path, case.make(), case.data, case.loss, lambda m: m.head.bias, rule=rule, progress=False)
    for k, s in (("baseline", 0), ("prediction", len(h))): np.testing.assert_array_equal(r[k], h.theta(s)[name].numpy())
    assert abs(r.residual).max() < 1e-14 and abs(r.data.sel(component=[c for c in r.component.values if c != name])).max() == 0 and abs(r.data).max() > 0
    f = reconstruct(tmp_path, case.make(), lambda m: m.head.bias, rule=rule, progress=False)
    np.testing.assert_allclose(f.data.sum(("step", "component")), r.data.sum(("step", "component", "sample")), atol=1e-14)
    assert abs(f.residual).max() < 1e-14


@pytest.mark.parametrize("engine", ["ghost", "jvp", "materialise"])
def test_the_secant_rule_in_every_engine(small, engine):
    case, path = small
    a, b = (run_rule(path, case, "secant", engine=e) for e in (engine, "auto"))
    assert np.allclose(a.data, b.data, rtol=0, atol=1e-12 * abs(b.data).max()) and abs(a.residual).max() < 1e-13


def test_data_may_be_indexed(small):
    case, path = small
    class Plain(torch.utils.data.Dataset):
        def __len__(self): return 12
        def __getitem__(self, i): return case.data[i]
    ask = lambda data: explain(path, case.make(), data, case.loss, case.target, keep=("sample",), progress=False).data.values
    np.testing.assert_array_equal(ask(Indexed(Plain())), ask(Plain()))


def test_reconstruct_refusals(small):
    case, path = small
    for fn, text in ((lambda m: (case.target(m),), "one Tensor"), (lambda m: case.target(m).log(), "not finite"), (lambda m: torch.ones(3), "do not depend"),
                     (lambda m: case.target(m) * torch.rand(()), "random")):
        with pytest.raises((ValueError, TypeError), match=text): reconstruct(path, case.make(), fn, progress=False)
    with pytest.raises(ValueError, match="use explain"): reconstruct(path, case.make(), case.target, keep=("sample",), progress=False)
    for keep in ((), ("step",), ("component",)):
        scalar = reconstruct(path, case.make(), lambda m: case.target(m).sum(), keep=keep, progress=False)
        assert set(scalar.data.dims) == set(keep) and scalar.closing_error < 1e-12
