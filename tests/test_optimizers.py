"Every optimizer against the independent slow reference, entry by entry in float64: settings, options, planted cases, drawn at random; and what is refused."
import random
import sys
import warnings

import pytest
import torch
from reference import READERS, Lion, ScheduleFree, clip_norm, clip_value
from test_kernel import BATCHES, close, compare, run_explain
from torch import nn, optim
from zoo import ZOO, Samples

import explaind_nb.optimizers
from explaind_nb.average import ema, swa
from explaind_nb.derivation import reference_kernel
from explaind_nb.every_optimizer import AdadeltaStep, ASGDStep, LionStep, ScheduleFreeStep
from explaind_nb.history import Recorder
from explaind_nb.kernel import explain
from explaind_nb.optimizers import SGDStep, register

register(Lion, LionStep)
register(ScheduleFree, ScheduleFreeStep)

CASE = next(iter(ZOO.values()))
MINIBATCH, UNEQUAL = BATCHES["minibatch"], BATCHES["unequal"]


def adamw(params): return optim.AdamW(params, lr=.02, weight_decay=.5)


class Spec:
    "An optimizer class and its options; one that takes matrices only (`rest`) leaves the other parameters to AdamW."
    def __init__(self, cls, rest=False, **hyper): self.cls, self.rest, self.hyper = cls, rest, hyper
    def __call__(self, params, **hyper):
        mine = [p for p in params if p.dim() == 2 or not self.rest]
        others = [p for p in params if p.dim() != 2 and self.rest]
        return ([self.cls(self.groups(mine), **self.hyper | hyper)] if mine else []) + ([adamw(others)] if others else [])
    def groups(self, params): return params
    def __repr__(self): return f"{self.cls.__name__}({', '.join(f'{k}={v}' for k, v in self.hyper.items())})"


class TwoGroups(Spec):
    "The first half of the parameters with half the rate and a decay of their own"
    def __init__(self, spec): super().__init__(spec.cls, spec.rest, **spec.hyper)
    def groups(self, params):
        n, hyper = len(params) // 2, dict(lr=self.hyper["lr"] / 2)
        if self.cls is not optim.Rprop: hyper["weight_decay"] = .3
        return [dict(params=params[:n], **hyper), dict(params=params[n:])]


MAIN = dict(
    momentum=Spec(optim.SGD, lr=.05, momentum=.9, dampening=.5, weight_decay=.1),
    adam=Spec(optim.Adam, lr=.02, weight_decay=.1),
    adamw=Spec(optim.AdamW, lr=.02, weight_decay=.5),
    adamax=Spec(optim.Adamax, lr=.02, weight_decay=.1),
    nadam=Spec(optim.NAdam, lr=.02, weight_decay=.1),
    radam=Spec(optim.RAdam, lr=.02, weight_decay=.1, betas=(.8, .9)),     # the rectification switches on after some steps
    rmsprop=Spec(optim.RMSprop, lr=.01, momentum=.9, centered=True, weight_decay=.1),
    adagrad=Spec(optim.Adagrad, lr=.05, lr_decay=.1, weight_decay=.1),
    adadelta=Spec(optim.Adadelta, lr=1., weight_decay=.1),
    asgd=Spec(optim.ASGD, lr=.05, lambd=.2, weight_decay=.1),
    rprop=Spec(optim.Rprop, lr=.01),
    adafactor=Spec(optim.Adafactor, lr=.05, weight_decay=.1),
    muon=Spec(optim.Muon, rest=True, lr=.02, weight_decay=.1),
    lion=Spec(Lion, lr=.01, betas=(.8, .95), weight_decay=.1),
    schedule_free=Spec(ScheduleFree, lr=.02, weight_decay=.1, warmup_steps=3),
)

OPTIONS = dict(
    sgd=Spec(optim.SGD, lr=.1, weight_decay=.1),
    sgd_foreach=Spec(optim.SGD, lr=.05, momentum=.9, weight_decay=.1, foreach=True),
    sgd_fused=Spec(optim.SGD, lr=.05, momentum=.9, dampening=.3, weight_decay=.1, fused=True),
    nesterov=Spec(optim.SGD, lr=.05, momentum=.9, nesterov=True, weight_decay=.1, maximize=True),
    adam_amsgrad=Spec(optim.Adam, lr=.02, weight_decay=.1, amsgrad=True, betas=(.8, .5), maximize=True),
    adam_decoupled=Spec(optim.Adam, lr=.02, weight_decay=.1, decoupled_weight_decay=True),
    adam_foreach=Spec(optim.Adam, lr=.02, weight_decay=.1, foreach=True),
    adam_fused=Spec(optim.Adam, lr=.02, weight_decay=.1, fused=True),
    adamw_fused=Spec(optim.AdamW, lr=.02, weight_decay=.5, fused=True, amsgrad=True, maximize=True),
    adamax_foreach=Spec(optim.Adamax, lr=.02, weight_decay=.1, maximize=True, foreach=True),
    nadam_decoupled=Spec(optim.NAdam, lr=.02, weight_decay=.1, decoupled_weight_decay=True, momentum_decay=.1, maximize=True),
    nadam_foreach=Spec(optim.NAdam, lr=.02, weight_decay=.1, foreach=True),
    radam_never=Spec(optim.RAdam, lr=.02, weight_decay=.1, decoupled_weight_decay=True, maximize=True),
    radam_foreach=Spec(optim.RAdam, lr=.02, betas=(.9, .9), foreach=True),
    rmsprop=Spec(optim.RMSprop, lr=.01, weight_decay=.1, maximize=True),
    rmsprop_centered=Spec(optim.RMSprop, lr=.01, centered=True, foreach=True),
    rmsprop_momentum=Spec(optim.RMSprop, lr=.01, momentum=.5, alpha=.9),
    adagrad_fused=Spec(optim.Adagrad, lr=.05, lr_decay=.1, weight_decay=.1, fused=True),
    adagrad_start=Spec(optim.Adagrad, lr=.05, initial_accumulator_value=.1, maximize=True, foreach=True),
    adadelta_foreach=Spec(optim.Adadelta, lr=1., rho=.5, weight_decay=.1, maximize=True, foreach=True),
    asgd_foreach=Spec(optim.ASGD, lr=.05, lambd=.2, alpha=.5, t0=2, maximize=True, foreach=True),
    rprop_foreach=Spec(optim.Rprop, lr=.01, etas=(.3, 1.5), step_sizes=(1e-3, .02), maximize=True, foreach=True),
    adafactor_foreach=Spec(optim.Adafactor, lr=.05, weight_decay=.1, maximize=True, foreach=True),
    adafactor_unclipped=Spec(optim.Adafactor, lr=.5, d=1e3, eps=(1e-3, 1e-3), beta2_decay=-.5),
    muon_plain=Spec(optim.Muon, rest=True, lr=.02, weight_decay=.1, nesterov=False, momentum=.5),
    schedule_free_late=Spec(ScheduleFree, lr=.02, r=1., weight_lr_power=1.),
    muon_adamw=Spec(optim.Muon, rest=True, lr=.02, adjust_lr_fn="match_rms_adamw", ns_steps=3),
)


def onecycle(optimizers, steps):
    "Rates and momenta up and down, where there are momenta"
    cycles = lambda o: "betas" in o.defaults or bool(o.defaults.get("momentum"))
    return stepping([optim.lr_scheduler.OneCycleLR(o, .05, total_steps=steps, cycle_momentum=cycles(o)) for o in optimizers])


def cosine(optimizers, steps): return stepping([optim.lr_scheduler.CosineAnnealingLR(o, steps) for o in optimizers])


def jumps(optimizers, steps):
    "A plateau scheduler's jumps, with a step of rate 0; tensors are written in place"
    begin = [[float(g["lr"]) for g in o.param_groups] for o in optimizers]
    def set_rates(s):
        for o, rates in zip(optimizers, begin):
            for g, lr in zip(o.param_groups, rates): set_rate(g, lr * (1., 1., 0., .1, 3.)[s % 5])
    return set_rates


def set_rate(group, lr):
    if isinstance(group["lr"], torch.Tensor): group["lr"].fill_(lr)
    else: group["lr"] = lr


def stepping(schedulers):
    def step(s):
        if s:
            for o in schedulers: o.step()
    return step


def record(path, case, make, batches, weights=None, schedule=None, clip=None, model=None):
    "The user's loop, recorded; `batches` may hold lists of batches that are accumulated."
    model = model or case.make()
    optimizers = make(list(model.parameters()))
    tick = schedule(optimizers, len(batches)) if schedule else lambda s: None
    with Recorder(model, optimizers, path) as recorder:
        for s, ids in enumerate(batches):
            tick(s)
            for part, w in parts_of(ids, weights and weights[s]):
                recorder.batch(part, w)
                (w * case.loss(model, case.data[part])).sum().backward()
            if clip: clip(model.parameters())
            for o in optimizers: o.step()
            model.zero_grad()              # also what no optimizer owns, or clipping by norm would count it twice
    return model


def parts_of(ids, weights):
    "Micro-batches and their weights"
    ids = ids if isinstance(ids, list) else [ids]
    w = torch.full((sum(map(len, ids)),), 1 / sum(map(len, ids)), dtype=torch.float64) if weights is None else weights
    return zip(ids, w.split([len(i) for i in ids]))


def refer(case, make, batches, weights=None, schedule=None, transform=None, model=None, average=None):
    model = model or case.make()
    optimizers, flat = make(list(model.parameters())), [torch.cat(b) if isinstance(b, list) else b for b in batches]
    return reference_kernel(model, optimizers, case.data, flat, case.loss, case.target, 2, weights, schedule and schedule(optimizers, len(batches)), READERS,
                            transform, average)


SETTINGS = dict(
    full=dict(batches=BATCHES["full"]),
    minibatch=dict(batches=MINIBATCH),
    onecycle=dict(batches=UNEQUAL, schedule=onecycle),
    cosine=dict(batches=BATCHES["repeats"], schedule=cosine),
    groups=dict(batches=UNEQUAL),
    jumps=dict(batches=UNEQUAL, schedule=jumps),
    clip_norm=dict(batches=UNEQUAL, clip=lambda ps: nn.utils.clip_grad_norm_(ps, .1), transform=clip_norm(.1)),
    clip_value=dict(batches=UNEQUAL, clip=lambda ps: nn.utils.clip_grad_value_(ps, .02), transform=clip_value(.02)),
)


def compare_averaged(path, case, ref, average):
    "Like `compare`, with averaged weights explained."
    update = dict(average=average, step_axis="update")
    seen, moved = run_explain(path, case, average=average), run_explain(path, case, **update)
    march = run_explain(path, case, keep=("target", "step", "component"), **update)
    C = [ref.names.index(n) for n in seen.component.values]
    for r, axis in ((seen, 0), (moved, 1)): close(r.data.transpose("step", "component", "sample", "target"), ref.kernel.sum(axis)[:, C])
    for r, decay in ((seen, ref.decay_gradient), (moved, ref.decay), (march, ref.decay)): close(r.decay.transpose("step", "component", "target"), decay[:, C])
    close(march.data.transpose("step", "component", "target"), ref.kernel.sum((1, 3))[:, C])
    for r in (seen, moved, march): assert r.closing_error < 1e-12 and abs(r.prediction.values - ref.prediction.numpy()).max() < 1e-9


def check(path, make, batches, clip=None, transform=None, schedule=None, **kwargs):
    record(path, CASE, make, batches, schedule=schedule, clip=clip)
    compare(path, CASE, refer(CASE, make, batches, schedule=schedule, transform=transform), **kwargs)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", MAIN)
def test_every_optimizer_and_setting(tmp_path, name, setting):
    make = MAIN[name]
    if setting == "groups": make = TwoGroups(make)
    if setting == "jumps": make = lambda ps: MAIN[name](ps, lr=torch.tensor(MAIN[name].hyper["lr"], dtype=torch.float64))
    check(tmp_path / "run", make, **SETTINGS[setting])


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(tmp_path, name): check(tmp_path / "run", OPTIONS[name], MINIBATCH)


# --- runs with something special in the middle

@pytest.mark.parametrize("name", MAIN)
def test_frozen_and_thawed(tmp_path, name):
    "No gradient is not a gradient of zero: no decay, no filtering, no count, while the others go on."
    held = {}
    def make(params):
        held["p"] = params[1]
        return MAIN[name](params)
    def schedule(optimizers, steps):
        p = held["p"]
        return lambda s: p.requires_grad_(s not in (0, 3, 4))
    check(tmp_path / "run", make, UNEQUAL + UNEQUAL[:2], schedule=schedule)
    moved = run_explain(tmp_path / "run", CASE, step_axis="update")
    of = moved.sel(component=[n for n, _ in CASE.make().named_parameters()][1])
    assert not of.data.sel(step=[0, 3, 4]).any() and not of.decay.sel(step=[0, 3, 4]).any() and of.data.any()


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw", "rmsprop", "asgd", "muon"])
def test_a_gradient_of_zero_is_a_step(tmp_path, name):
    "The network is left out of the loss of some batches, but its zeros go through the optimizer: decay, filtering, count."
    def loss(model, batch):
        out = CASE.loss(model, batch)
        return out * (batch["y"] != 0)
    quiet = (CASE.data[torch.arange(12)]["y"] == 0).nonzero().flatten()
    batches = [UNEQUAL[0], UNEQUAL[1], quiet, UNEQUAL[3], quiet[:1]]
    case = CASE._replace(loss=loss)
    record(tmp_path / "run", case, MAIN[name], batches)
    compare(tmp_path / "run", case, refer(case, MAIN[name], batches))
    moved = run_explain(tmp_path / "run", case, step_axis="update")
    assert not moved.data.sel(sample=quiet.numpy()).any() and moved.decay.sel(step=2).any()


def test_added_parameters(tmp_path):
    "Layers join the optimizer during the run, in groups of their own."
    def make(params): return [optim.SGD(params[:2], lr=.05, momentum=.9)]
    held = {}
    def model(): held["model"] = CASE.make(); return held["model"]
    def schedule(optimizers, steps):
        params = list(held["model"].parameters())
        for p in params[2:]: p.requires_grad_(False)
        def join(s):
            if s not in (2, 4): return
            for p in params[s:s + 2]: p.requires_grad_(True)
            optimizers[0].add_param_group(dict(params=params[s:s + 2], lr=.02, weight_decay=.1))
        return join
    record(tmp_path / "run", CASE, make, UNEQUAL, schedule=schedule, model=model())
    compare(tmp_path / "run", CASE, refer(CASE, make, UNEQUAL, schedule=schedule, model=model()))


@pytest.mark.parametrize("name", [n for n in MAIN if n != "schedule_free"])
def test_windows(tmp_path, name):
    "What happened before a window of steps is its `initial`."
    record(tmp_path / "run", CASE, MAIN[name], UNEQUAL)
    model = CASE.make()
    optimizers = MAIN[name](list(model.parameters()))
    for window in ((0, 3), (3, 6)):
        ref = reference_kernel(model, optimizers, CASE.data, UNEQUAL[slice(*window)], CASE.loss, CASE.target, 2, readers=READERS)
        part = run_explain(tmp_path / "run", CASE, steps=window)
        close(part.data.transpose("step", "component", "sample", "target"), ref.kernel.sum(0))
        close(part.initial.transpose("component", "target"), ref.initial)
    assert part.initial.any() == (name not in ("adagrad", "adadelta", "asgd", "rprop", "adafactor"))


@pytest.mark.parametrize("average", [ema(.7), ema(.5, start=2), swa(1, 2)], ids=["ema", "late ema", "swa"])
@pytest.mark.parametrize("name", ["momentum", "adam", "rmsprop", "muon", "schedule_free"])
def test_averaged_weights(tmp_path, name, average):
    record(tmp_path / "run", CASE, MAIN[name], UNEQUAL)
    compare_averaged(tmp_path / "run", CASE, refer(CASE, MAIN[name], UNEQUAL, average=average(len(UNEQUAL))), average)


# --- refused

def late(step_class, keys):
    "The step class that takes what should be read before the step as it is after it"
    class Late(step_class):
        before_keys = ()
        @classmethod
        def state_keys(cls, group): return [*super().state_keys(group), *keys]
        def __init__(self, hyper, count, rec, before=None): super().__init__(hyper, count, rec, rec)
    return Late


class CopiedLate(SGDStep):
    keep = property(lambda self: 1. - self.hyper["dampening"])     # also for the first buffer, which is a copy


LATE = dict(adadelta=late(AdadeltaStep, ["acc_delta"]), asgd=late(ASGDStep, ["eta"]), lion=late(LionStep, []), momentum=CopiedLate)
@pytest.mark.parametrize("name, step_class", LATE.items())
def test_coefficients_read_late_are_refused(tmp_path, monkeypatch, name, step_class):
    spec = MAIN[name]
    monkeypatch.setitem(explaind_nb.optimizers._known, spec.cls, step_class)
    with pytest.raises(RuntimeError, match=r"Step \d: the (displacement|optimizer state) of parameter .* differs from its linear step"):
        record(tmp_path / "run", CASE, spec, UNEQUAL)


@pytest.mark.parametrize("name, factor", [(n, (4., .25)[i % 2]) for i, n in enumerate(MAIN)])
def test_wrong_weights_are_refused(tmp_path, name, factor):
    "A loop that sums its losses, or divides them once more, without saying so: its linear steps are as good as any, only the revisited gradient tells."
    case = CASE._replace(loss=lambda model, batch: factor * CASE.loss(model, batch))
    record(tmp_path / "run", case, MAIN[name], UNEQUAL)
    with pytest.raises(ValueError, match=f"it is {factor:.4g} times that one.*pass weight="): run_explain(tmp_path / "run", CASE)


class SAM(optim.SGD): pass
class SophiaG(optim.Adam): pass


@pytest.mark.parametrize("cls, why", [(optim.LBFGS, "no map of it is linear"), (optim.SparseAdam, "sparse gradients"), (SAM, "perturbed point"),
                                      (SophiaG, "second batch")])
def test_optimizers_that_are_no_linear_map(tmp_path, cls, why):
    with pytest.raises(TypeError, match=f"{cls.__name__} cannot be explained: .*{why}"): record(tmp_path / "run", CASE, lambda ps: [cls(ps, lr=.1)], UNEQUAL)


# --- planted cases: the answer is known

class Doubled(Samples):
    "Sample 2 is a copy of sample 1; `perm` says which sample an id means."
    def __init__(self, perm=range(12)):
        x, y = (CASE.data[torch.arange(12)][k] for k in ("x", "y"))
        which = torch.tensor([0, 1, 1, *range(3, 12)])[torch.tensor(list(perm))]
        super().__init__(x=x[which], y=y[which])


PLANTED = [torch.tensor(b) for b in ([1, 2, 3, 4], [5, 6], [7, 1, 2, 1, 2], [8, 9], [10, 11, 4], [5, 3])]   # 1 and 2 together, 0 never
SWAP = [0, 1, 2, 7, 4, 5, 6, 3, *range(8, 12)]


def still(make):
    "The optimizer of a model whose first tensor gets no gradient and whose second has rate 0"
    def made(params):
        params[0].requires_grad_(False)
        optimizers = make(params)
        for o in optimizers:
            for g in list(o.param_groups):
                if any(p is params[1] for p in g["params"]):
                    g["params"] = [p for p in g["params"] if p is not params[1]]
                    frozen = dict(step_sizes=(0., 0.)) if type(o) is optim.Rprop else {}   # which has no rate but that of its first step
                    o.add_param_group({k: v for k, v in g.items() if k != "params"} | dict(params=[params[1]], lr=0.) | frozen)
        return optimizers
    return made


def pause(optimizers, steps):
    "Rate 0 at step 2"
    begin = [[float(g["lr"]) for g in o.param_groups] for o in optimizers]
    def set_rates(s):
        for o, rates in zip(optimizers, begin):
            for g, lr in zip(o.param_groups, rates): g["lr"] = lr * (s != 2)
    return set_rates


def planted(path, make, data, batches, step_axis="gradient"):
    case = CASE._replace(data=data)
    record(path, case, still(make), batches, schedule=pause)
    return run_explain(path, case, step_axis=step_axis)


@pytest.mark.parametrize("name", MAIN)
def test_planted_cases(tmp_path, name):
    seen = planted(tmp_path / "run", MAIN[name], Doubled(), PLANTED)
    moved = run_explain(tmp_path / "run", CASE._replace(data=Doubled()), step_axis="update")
    size = abs(seen.data).max().item()
    for r in (seen, moved):
        assert abs(r.data.sel(sample=0)).max() == 0                                                # never seen
        assert abs(r.data.sel(sample=1) - r.data.sel(sample=2)).max() <= 1e-13 * size              # duplicates share
        assert abs(r.data.sel(sample=1)).max() > 0
        names = [n for n, _ in CASE.make().named_parameters()]
        for n in names[:2]:                                                                        # what never moved
            if n in r.component.values: assert abs(r.data.sel(component=n)).max() == 0 and abs(r.decay.sel(component=n)).max() == 0
    remembers = name not in ("adagrad", "adadelta", "asgd", "rprop", "adafactor")
    late = 3 if name == "asgd" else 2                                                              # its rate is the one set at the step before
    if name not in ("rprop", "schedule_free"):    # whose steps have sizes of their own; which still draws y towards z
        assert abs(moved.data.sel(step=late)).max() == 0 and abs(moved.decay.sel(step=late)).max() == 0
        assert (abs(seen.data.sel(step=late)).max() > 0) == remembers                              # a gradient seen at rate 0 acts later, or never
    swapped = planted(tmp_path / "swapped", MAIN[name], Doubled(SWAP), [torch.tensor(SWAP)[b] for b in PLANTED])
    assert abs(seen.data - swapped.data.isel(sample=SWAP).values).max() <= 1e-12 * size
    assert abs(seen.data.sel(sample=3) - seen.data.sel(sample=7)).max() > 1e-6 * size


# --- drawn at random

def rounded(x): return float(f"{x:.2g}")


KINDS = MAIN | OPTIONS
RANGES = dict(      # of the options a kind has, what else they may be
    weight_decay=lambda r: r.choice([0., rounded(r.uniform(.01, .5))]), maximize=lambda r: r.random() < .3, amsgrad=lambda r: r.random() < .5,
    betas=lambda r: (rounded(r.uniform(.1, .95)), rounded(r.uniform(.5, .99))), momentum=lambda r: rounded(r.uniform(.1, .95)),
    lambd=lambda r: rounded(r.uniform(0, .3)), rho=lambda r: rounded(r.uniform(.5, .95)), alpha=lambda r: rounded(r.uniform(.5, .99)),
    momentum_decay=lambda r: rounded(r.uniform(0, .3)), lr_decay=lambda r: rounded(r.uniform(0, .5)))


class Draw:
    "A run drawn at random; `repr` tells which."
    def __init__(self, seed):
        r = self.random = random.Random(seed)
        self.seed, self.said, self.steps = seed, [], r.randint(4, 7)
        self.case = self.draw_case()
        self.batches, self.weights = self.draw_batches()
        self.plan = [self.draw_optimizer() for _ in range(r.choice([1, 1, 2]))]
        row = lambda: (r.choice([1., 1., .3, 2., 0.]), rounded(r.uniform(.5, .99)), rounded(r.uniform(0, .3)))      # times the rate, a momentum, a decay
        self.tables = [[row() for _ in range(self.steps)] for _ in range(6)]     # for each group
        self.turns = self.say("momenta and decay change", r.random() < .4)
        self.clip, self.transform = self.draw_clip()
        whole = any(spec.hyper.get("fused") and spec.hyper.get("momentum") for spec, _ in self.plan)      # torch's fused SGD wants all buffers at once
        turn = (r.random(), r.randint(1, self.steps - 1), r.random() < .5)                # which tensor, when, from then on or until then
        self.frozen = self.say("frozen", None if whole or r.random() < .6 else turn)
        self.average = self.say("average", r.choice([None, None, [rounded(r.random()) for _ in range(self.steps)]]))

    def say(self, *what): self.said.append(" ".join(map(str, what))); return what[-1]
    def __repr__(self): return f"draw {self.seed}: " + "; ".join(self.said)

    def draw_case(self):
        "A network of the zoo, or a multilayer perceptron"
        r, some = self.random, ["cnn groupnorm", "conv1d rmsnorm", "transformer", "tied layer", "raw parameters", "lstm", "mlp regression"]
        if r.random() < .3: return ZOO[self.say("model", r.choice(some))]
        widths, bias = [5, *(r.randint(3, 7) for _ in range(r.randint(0, 2))), 4], r.random() < .8
        act, norm, seed = r.choice([nn.Tanh, nn.ReLU, nn.GELU]), r.random() < .3, r.random()
        self.say("model", widths, act.__name__, "norm", norm, "bias", bias)
        def make():
            torch.manual_seed(int(seed * 1e6))
            layers = []
            for a, b in zip(widths, widths[1:]): layers += [nn.Linear(a, b, bias=bias), *([nn.LayerNorm(b)] if norm else []), act()]
            return nn.Sequential(*layers[:-1]).double()
        return CASE._replace(make=make)

    def draw_batches(self):
        "Ids with repeats, in one batch or several micro-batches a step; weights that may be 0"
        r, kind = self.random, self.say("batches", self.random.choice(["full", "unequal", "accumulated", "weighted"]))
        if kind == "full": return [torch.tensor(r.sample(range(12), 12)) for _ in range(self.steps)], None
        parts = lambda: [torch.tensor(r.choices(range(12), k=r.randint(1, 5))) for _ in range(r.randint(1, 3))]
        batches = [parts() if kind == "accumulated" else parts()[0] for _ in range(self.steps)]
        weight = lambda n: torch.tensor([r.choice([0., r.random()]) for _ in range(n - 1)] + [r.random()], dtype=torch.float64)
        return batches, [weight(len(b)) for b in batches] if kind == "weighted" else None

    def draw_optimizer(self):
        "One of `MAIN` and `OPTIONS` with other numbers, on one or two groups, its rate a tensor or not"
        r, spec = self.random, self.random.choice(list(KINDS.values()))
        changed = {k: f(r) for k, f in RANGES.items() if k in spec.hyper and r.random() < .5}
        tensor = r.random() < .15 and not spec.hyper.get("foreach") and not spec.hyper.get("fused")
        spec = Spec(spec.cls, spec.rest, **spec.hyper | dict(lr=rounded(spec.hyper["lr"] * 10**r.uniform(-1, .3))) | changed)
        if r.random() < .3: spec = TwoGroups(spec)
        self.say(spec, *["two groups"] * isinstance(spec, TwoGroups), *["tensor rate"] * tensor)
        return spec, tensor

    def draw_clip(self):
        kind, limit = self.random.choice([None, None, "norm", "value"]), rounded(10**self.random.uniform(-2.5, 0))
        self.say("clip", kind, limit)
        return {None: (None, None), "norm": (lambda ps: nn.utils.clip_grad_norm_(ps, limit), clip_norm(limit)),
                "value": (lambda ps: nn.utils.clip_grad_value_(ps, limit), clip_value(limit))}[kind]

    def make(self, params):
        "The optimizers; they take every parameter in turn."
        split = [params[i::len(self.plan)] for i in range(len(self.plan))]
        rate = lambda spec, tensor: dict(lr=torch.tensor(spec.hyper["lr"], dtype=torch.float64)) if tensor else {}
        made = [o for (spec, tensor), some in zip(self.plan, split) if some for o in spec(some, **rate(spec, tensor))]
        self.params = [p for o in made for g in o.param_groups for p in g["params"]]
        return made

    def schedule(self, optimizers, steps):
        "Rates, sometimes momenta and decay too, by a table; a parameter that is frozen at the beginning or at the end"
        groups, params = [g for o in optimizers for g in o.param_groups], self.params
        begin = [float(g["lr"]) for g in groups]
        def before(s):
            for g, lr, table in zip(groups, begin, self.tables):
                factor, momentum, decay = table[s]
                set_rate(g, lr * factor)
                if not self.turns: continue
                if "betas" in g: g["betas"] = (momentum, g["betas"][1])
                if g.get("momentum"): g["momentum"] = momentum
                if "weight_decay" in g: g["weight_decay"] = decay
            if self.frozen and len(params) > 1:                # something else must move, or there is no step
                which, when, first = self.frozen
                params[int(which * len(params))].requires_grad_((s >= when) is first)
        return before

    def check(self, path):
        common = dict(weights=self.weights, schedule=self.schedule)
        record(path, self.case, self.make, self.batches, clip=self.clip, **common)
        ref = refer(self.case, self.make, self.batches, transform=self.transform, average=self.average, **common)
        compare(path, self.case, ref) if self.average is None else compare_averaged(path, self.case, ref, self.average)


@pytest.mark.parametrize("seed", range(40))
def test_drawn_at_random(tmp_path, seed):
    draw = Draw(seed)
    try: draw.check(tmp_path / "run")
    except Exception as e: raise AssertionError(repr(draw)) from e


CAPTURABLE = dict(adam=torch.optim.Adam, adamw=torch.optim.AdamW, adamax=torch.optim.Adamax, nadam=torch.optim.NAdam, radam=torch.optim.RAdam,
                  rmsprop=torch.optim.RMSprop, adadelta=torch.optim.Adadelta, asgd=torch.optim.ASGD, rprop=torch.optim.Rprop)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", CAPTURABLE)
def test_capturable_steps_give_the_same_history(tmp_path, monkeypatch, name, foreach):
    "The code for captured graphs (counters and rates as tensors on the device), which torch keeps for accelerators; here it is let run on the CPU."
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("torch.optim.") and hasattr(module, "_get_capturable_supported_devices"):
            monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])
    case, results = ZOO["mlp tanh"], []
    case = case._replace(make=lambda: ZOO["mlp tanh"].make().float(), data=Samples(**{k: v.float() if v.is_floating_point() else v for k, v in case.data.named.items()}))
    target = lambda m: m(case.data[torch.arange(3)]["x"].to(m.body[0].weight))[:, 0]
    for capturable in (False, True):
        rate = torch.tensor(.02) if capturable and name in ("adam", "adamw") else .02
        make = lambda ps: [CAPTURABLE[name](ps, lr=rate, foreach=foreach, capturable=capturable)]
        path = tmp_path / str(capturable)
        record(path, case, make, BATCHES["unequal"])
        results.append(explain(path, case.make(), case.data, case.loss, target, rule="midpoint", progress=False))
    plain, captured = results
    tol = .05 if name == "radam" else 1e-4                                              # what single precision makes of 1 - beta^n and of RAdam's rho
    assert captured.closing_error < 1e-12 and abs(captured.rounding).max() < tol * abs(captured.data).max()
    assert abs(captured.data - plain.data).max() < tol * abs(plain.data).max()
    assert abs(captured.prediction - plain.prediction).max() < tol * abs(plain.prediction - plain.baseline).max()
