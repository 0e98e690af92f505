"Every trick around the step with momentum SGD and AdamW, on both step axes in float64, against the slow reference: alone, and all together."
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import clip_norm, clip_value
from test_kernel import BATCHES, close, compare, run_explain
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parametrizations
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from zoo import CLASSES, ZOO, Case, Samples, cross_entropy, noise

from explaind_nb.average import ema, swa
from explaind_nb.derivation import reference_kernel
from explaind_nb.history import History, Recorder
from explaind_nb.kernel import explain

CASE, M = next(iter(ZOO.values())), 12
UNEQUAL, MINIBATCH, REPEATS = BATCHES["unequal"], BATCHES["minibatch"], BATCHES["repeats"]
OPTIMIZERS = dict(momentum=lambda ps: torch.optim.SGD(ps, lr=.05, momentum=.9, weight_decay=.1),
                  adamw=lambda ps: torch.optim.AdamW(ps, lr=.02, weight_decay=.5))
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def as_list(x): return x if isinstance(x, list) else [x]


def mean_weights(parts): return [torch.full((len(ids),), 1 / sum(map(len, parts)), dtype=torch.float64) for ids in parts]


class Plain:
    "What a loop does with a loss and an optimizer, unless a gradient scaler does it"
    def scale(self, loss): return loss
    def unscale_(self, optimizer): pass
    def step(self, optimizer): optimizer.step()
    def update(self): pass


def train(path, case, make, batches, weights=mean_weights, schedule=None, clip=None, scaler=None, penalty=None, announce=None, after=None, model=None):
    "The user's loop, recorded; a batch may be a list of micro-batches. `announce` gives the weights that the recorder is told, if not those of the loop."
    model, scaler = model or case.make(), scaler or Plain()
    optimizers = as_list(make(model.parameters()))
    with Recorder(model, optimizers, path) as recorder:
        for s, parts in enumerate(map(as_list, batches)):
            if schedule: schedule(optimizers, s)
            for n, (ids, w) in enumerate(zip(parts, weights(parts))):
                recorder.batch(ids, announce(w) if announce else w)
                loss = (w * case.loss(model, case.data[ids])).sum()
                scaler.scale(loss + penalty(model) if penalty and not n else loss).backward()
            for o in optimizers: scaler.unscale_(o)
            if clip: clip(model.parameters())
            for o in optimizers: scaler.step(o)
            scaler.update()
            if after: after(model, s)
            for o in optimizers: o.zero_grad()
    return model


def refer(case, make, batches, weights=mean_weights, schedule=None, transform=None, average=None):
    model = case.make()
    optimizers, parts = as_list(make(model.parameters())), [as_list(b) for b in batches]
    return reference_kernel(model, optimizers, case.data, [torch.cat(p) for p in parts], case.loss, case.target, 2, [torch.cat(weights(p)) for p in parts],
                            schedule and (lambda s: schedule(optimizers, s)), None, transform, average)


def gathered(kernel, origin):
    "Scores [S, C, V, T] of the reference's samples, by the id that each of them stands for"
    return torch.zeros(*kernel.shape[:2], max(M, int(origin.max()) + 1), kernel.shape[3], dtype=torch.float64).index_add_(2, origin, kernel)


def compare_gathered(path, case, ref, origin=None, average=None, **kwargs):
    "Like `compare`, for averages too; the reference's sample `v` is our sample `origin[v]`, and the penalty if that is M."
    origin = torch.arange(M) if origin is None else origin
    for axis, summed, decay in (("gradient", 0, ref.decay_gradient), ("update", 1, ref.decay)):
        r, want = run_explain(path, case, step_axis=axis, average=average, **kwargs), gathered(ref.kernel.sum(summed), origin)
        C = [ref.names.index(n) for n in r.component.values]
        close(r.data.transpose("step", "component", "sample", "target"), want[:, C, :M])
        close(r.decay.transpose("step", "component", "target"), decay[:, C])
        if "penalty" in r: close(r.penalty.transpose("step", "component", "target"), want[:, C, M])
        assert r.closing_error < 1e-12 and abs(r.replay).max() < 1e-12 and abs(r.rounding).max() < 1e-12
        assert abs(r.prediction.values - ref.prediction.numpy()).max() < 1e-9
    march = run_explain(path, case, step_axis="update", average=average, keep=("target", "step", "component"))
    close(march.data.transpose("step", "component", "target"), want.sum(2)[:, C])
    close(march.decay.transpose("step", "component", "target"), ref.decay[:, C])


# --- schedulers and groups

SCHEDULERS = dict(
    step=lambda o: lr_scheduler.StepLR(o, 2, .5), multistep=lambda o: lr_scheduler.MultiStepLR(o, [1, 4], .3),
    exponential=lambda o: lr_scheduler.ExponentialLR(o, .7), constant=lambda o: lr_scheduler.ConstantLR(o, .2, 3),
    linear=lambda o: lr_scheduler.LinearLR(o, .1, 1., 4), polynomial=lambda o: lr_scheduler.PolynomialLR(o, 5, 2.),
    cosine=lambda o: lr_scheduler.CosineAnnealingLR(o, 6), restarts=lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    lambdas=lambda o: lr_scheduler.LambdaLR(o, lambda s: 1 / (1 + s)), multiplicative=lambda o: lr_scheduler.MultiplicativeLR(o, lambda s: .8),
    cyclic=lambda o: lr_scheduler.CyclicLR(o, .001, .05, 2), onecycle=lambda o: lr_scheduler.OneCycleLR(o, .05, total_steps=6), swa=lambda o: SWALR(o, .01, 3),
    sequential=lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o, .1, 1., 2), lr_scheduler.ExponentialLR(o, .5)], [2]),
    chained=lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o, .5, 2), lr_scheduler.ExponentialLR(o, .9)]),
    plateau=lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=.5))


def ticking(make):
    "A schedule by torch's scheduler, stepped after each step but the last"
    def schedule(optimizers, s):
        if s == 0: schedule.schedulers = [make(o) for o in optimizers]
        else:
            for o in schedule.schedulers: o.step(*[1.] * isinstance(o, lr_scheduler.ReduceLROnPlateau))
    return schedule


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@every_optimizer
def test_every_scheduler(tmp_path, name, scheduler):
    kwargs = dict(make=OPTIMIZERS[name], batches=UNEQUAL, schedule=ticking(SCHEDULERS[scheduler]))
    train(tmp_path / "run", CASE, **kwargs)
    compare(tmp_path / "run", CASE, refer(CASE, **kwargs))
    assert len({History(tmp_path / "run").lr(s) for s in range(len(UNEQUAL))}) > 1


def three_groups(ps):
    ps = list(ps)
    return torch.optim.AdamW([dict(params=ps[:2]), dict(params=ps[2:4], lr=.05, weight_decay=0.), dict(params=ps[4:], betas=(.5, .9), amsgrad=True)], lr=.01, weight_decay=.3)


def test_groups_under_one_scheduler(tmp_path):
    kwargs = dict(make=three_groups, batches=UNEQUAL, schedule=ticking(SCHEDULERS["restarts"]))
    train(tmp_path / "run", CASE, **kwargs)
    compare(tmp_path / "run", CASE, refer(CASE, **kwargs))


# --- clipping, accumulation, gradient scalers

@pytest.mark.parametrize("kind", [1., 2., float("inf")])
@every_optimizer
def test_clipping_by_any_norm(tmp_path, name, kind):
    def transform(gradients):
        norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients.values()]), kind).item()
        return dict.fromkeys(gradients, min(1., .1 / (norm + 1e-6)))
    train(tmp_path / "run", CASE, OPTIMIZERS[name], UNEQUAL, clip=lambda ps: clip_grad_norm_(ps, .1, kind))
    compare(tmp_path / "run", CASE, refer(CASE, OPTIMIZERS[name], UNEQUAL, transform=transform))


def both_clips(ps):
    ps = list(ps)
    clip_grad_norm_(ps, .1); clip_grad_value_(ps, .02)


def both_factors(gradients):
    by_norm = clip_norm(.1)(gradients)
    by_value = clip_value(.02)({n: by_norm[n] * g for n, g in gradients.items()})
    return {n: by_norm[n] * by_value[n] for n in gradients}


@every_optimizer
def test_clipping_by_norm_then_by_value(tmp_path, name):
    train(tmp_path / "run", CASE, OPTIMIZERS[name], UNEQUAL, clip=both_clips)
    compare(tmp_path / "run", CASE, refer(CASE, OPTIMIZERS[name], UNEQUAL, transform=both_factors))
    assert any(isinstance(c, torch.Tensor) for c in History(tmp_path / "run").scale(0).values())


MICRO = [list(b.split(2)) for b in UNEQUAL] + [[torch.tensor([1, 1]), torch.tensor([1]), torch.tensor([0, 1, 5])]]    # a sample may come in several


@pytest.mark.parametrize("clip,transform", [(None, None), (lambda ps: clip_grad_norm_(ps, .1), clip_norm(.1)), (lambda ps: clip_grad_value_(ps, .02), clip_value(.02))])
@every_optimizer
def test_accumulation(tmp_path, name, clip, transform):
    train(tmp_path / "run", CASE, OPTIMIZERS[name], MICRO, clip=clip)
    compare(tmp_path / "run", CASE, refer(CASE, OPTIMIZERS[name], MICRO, transform=transform))
    assert History(tmp_path / "run").calls(0) == [2, 2, 1]


def grad_scaler(**kwargs): return torch.amp.GradScaler("cpu", **dict(init_scale=2.**10, growth_interval=2) | kwargs)


SCALED = dict(momentum=OPTIMIZERS["momentum"], adamw=OPTIMIZERS["adamw"], fused=lambda ps: torch.optim.AdamW(ps, lr=.02, weight_decay=.5, fused=True))


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("announced", ["default", "scaled"])
@pytest.mark.parametrize("name", SCALED)
def test_gradient_scaler(tmp_path, name, announced, clip):
    "The growing scale is told from the recorded factors, or from the weights; credit is that of the run without a scaler."
    scaler = grad_scaler()
    announce = (lambda w: w * scaler.get_scale()) if announced == "scaled" else None
    train(tmp_path / "run", CASE, SCALED[name], UNEQUAL, scaler=scaler, announce=announce, clip=(lambda ps: clip_grad_norm_(ps, .1)) if clip else None)
    compare(tmp_path / "run", CASE, refer(CASE, SCALED[name], UNEQUAL, transform=clip_norm(.1) if clip else None))
    assert scaler.get_scale() == 2.**13


def test_the_scale_is_told_from_a_poor_gradient_too(tmp_path):
    "A revisited gradient that is some percent off (other precision, say) costs some percent, not the factor of the scaler."
    train(tmp_path / "run", CASE, OPTIMIZERS["adamw"], MINIBATCH, scaler=grad_scaler(), clip=lambda ps: clip_grad_norm_(ps, .1))
    bent = torch.zeros(M, dtype=torch.float64).index_fill(0, torch.cat(MINIBATCH[:2]).unique(), 1.)
    data = Samples(**CASE.data.named, bent=torch.where(bent == 1, 1., 1.3))
    case = CASE._replace(data=data, loss=lambda model, batch: CASE.loss(model, batch) ** batch["bent"])
    r = run_explain(tmp_path / "run", case)
    assert .01 < r.gradient_mismatch < .5


class Infinite(Samples):
    "Sample 11 has an infinite loss whenever `on` says so."
    def __init__(self): super().__init__(**CASE.data.named); self.on = True
    def __getitem__(self, ids): return super().__getitem__(ids) | dict(times=torch.where((ids == 11) & self.on, float("inf"), 1.).double())


@pytest.mark.parametrize("name", SCALED)
def test_a_step_that_the_scaler_skips(tmp_path, name):
    "Its samples get nothing; the run is the one without it."
    data, skipped = Infinite(), next(s for s, b in enumerate(UNEQUAL[:3]) if 11 in b)
    case = CASE._replace(data=data, loss=lambda model, batch: batch["times"] * CASE.loss(model, batch))
    def only_once(model, s): data.on = data.on and s < skipped
    train(tmp_path / "run", case, SCALED[name], UNEQUAL, scaler=grad_scaler(), after=only_once)
    left = [b for s, b in enumerate(UNEQUAL) if s != skipped]
    compare(tmp_path / "run", CASE, refer(CASE, SCALED[name], left))
    assert History(tmp_path / "run").skipped == [UNEQUAL[skipped].tolist()]


def test_a_skipped_step_of_micro_batches(tmp_path):
    data = Infinite()
    case = CASE._replace(data=data, loss=lambda model, batch: batch["times"] * CASE.loss(model, batch))
    bad = [torch.tensor([0, 11]), torch.tensor([1, 2])]
    train(tmp_path / "run", case, OPTIMIZERS["adamw"], [MICRO[0], bad, MICRO[1], bad[::-1], MICRO[2]], scaler=grad_scaler(growth_interval=100),
          schedule=lambda _, s: setattr(data, "on", s in (1, 3)))
    compare(tmp_path / "run", CASE, refer(CASE, OPTIMIZERS["adamw"], MICRO[:3]))
    assert sorted(sum(History(tmp_path / "run").skipped, [])) == [0, 0, 1, 1, 2, 2, 11, 11]


# --- losses, weights and penalties

def penalty(model): return .02 * sum(p.abs().sqrt().sum() if p.dim() > 1 else p.square().sum() for p in model.parameters())


def with_penalty(case):
    "The same with the penalty as loss of a sample M of its own"
    class Data:
        def __len__(self): return M + 1
        def __getitem__(self, ids): return case.data[ids % M], ids
    def loss(model, batch): return torch.where(batch[1] == M, penalty(model), case.loss(model, batch[0]))
    return case._replace(data=Data(), loss=loss)


def penalised(weights): return lambda parts: [*weights(parts[:-1]), torch.ones(1, dtype=torch.float64)]


@pytest.mark.parametrize("trick", ["plain", "clip", "scaler", "average"])
@every_optimizer
def test_penalty(tmp_path, name, trick):
    clip, average = trick == "clip", ema(.7) if trick == "average" else None
    batches = [[b, torch.tensor([M])] for b in UNEQUAL]
    train(tmp_path / "run", CASE, OPTIMIZERS[name], UNEQUAL, penalty=penalty, scaler=grad_scaler() if trick == "scaler" else None,
          clip=(lambda ps: clip_grad_norm_(ps, .1)) if clip else None)
    ref = refer(with_penalty(CASE), OPTIMIZERS[name], batches, penalised(mean_weights), transform=clip_norm(.1) if clip else None,
                average=average and average(len(batches)))
    compare_gathered(tmp_path / "run", CASE, ref, torch.arange(M + 1), penalty=penalty, average=average)


@every_optimizer
def test_class_weights_and_label_smoothing(tmp_path, name):
    "`CrossEntropyLoss(weight, label_smoothing)` is a mean weighted by the classes of the batch."
    rates = torch.tensor([1., 3., .5, 2.], dtype=torch.float64)
    loss = lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"], label_smoothing=.2, reduction="none")
    case = CASE._replace(loss=loss)
    weights = lambda parts: [(w := rates[CASE.data[ids]["y"]]) / w.sum() for ids in parts]
    train(tmp_path / "run", case, OPTIMIZERS[name], UNEQUAL, weights)
    compare(tmp_path / "run", case, refer(case, OPTIMIZERS[name], UNEQUAL, weights))


def test_weights_of_zero_and_below(tmp_path):
    "A sample of weight 0 gets nothing, one of negative weight is unlearned."
    weights = lambda parts: [torch.where(ids == 3, 0., torch.where(ids == 7, -.1, .3)).double() for ids in parts]
    train(tmp_path / "run", CASE, OPTIMIZERS["adamw"], REPEATS, weights)
    compare(tmp_path / "run", CASE, refer(CASE, OPTIMIZERS["adamw"], REPEATS, weights))
    assert abs(run_explain(tmp_path / "run", CASE).data.sel(sample=3)).max() == 0


TEXT = ZOO["tied layer"]


class Tokens:
    "Samples are single predictions of a text: id = row * S + place. A batch holds each sequence once."
    def __init__(self, x): self.x, self.S = x, x.shape[1] - 1
    def __len__(self): return len(self.x) * self.S
    def __getitem__(self, ids):
        rows, where = torch.unique(ids // self.S, return_inverse=True)
        return dict(x=self.x[rows], row=where, place=ids % self.S)
    def real(self, rows):
        "Ids of what is no padding in some sequences"
        ids = (rows[:, None] * self.S + torch.arange(self.S)).flatten()
        return ids[self.x[ids // self.S, ids % self.S + 1] != 0]


def token_loss(model, batch):
    x = batch["x"]
    losses = F.cross_entropy(model(x[:, :-1]).transpose(1, 2), x[:, 1:], reduction="none")
    return losses[batch["row"], batch["place"]]


def padded():
    x = TEXT.data[torch.arange(M)]["x"].clamp(min=1).clone()
    for k in range(M): x[k, 2 + k % 4:] = 0
    return x


def sequence_sum(model, batch):
    x = batch["x"]
    return F.cross_entropy(model(x[:, :-1]).transpose(1, 2), x[:, 1:], ignore_index=0, reduction="none").sum(1)


@every_optimizer
def test_language_model_by_token_and_by_sequence(tmp_path, name):
    "A mean over the tokens of a batch: both recordings equal the reference, and tokens add up to their sequences."
    tokens, rows = Tokens(padded()), UNEQUAL[:3]
    by_token = TEXT._replace(data=tokens, loss=token_loss)
    ids = [tokens.real(b) for b in rows]
    train(tmp_path / "token", by_token, OPTIMIZERS[name], ids)
    by_sequence = TEXT._replace(data=Samples(x=tokens.x), loss=sequence_sum)
    weights = lambda parts: [torch.full((len(b),), 1 / len(tokens.real(b)), dtype=torch.float64) for b in parts]
    train(tmp_path / "sequence", by_sequence, OPTIMIZERS[name], rows, weights)
    ref = refer(by_token, OPTIMIZERS[name], ids)
    compare(tmp_path / "token", by_token, ref, engine="jvp")
    compare(tmp_path / "sequence", by_sequence, refer(by_sequence, OPTIMIZERS[name], rows, weights))
    seen, summed = run_explain(tmp_path / "token", by_token, engine="jvp"), run_explain(tmp_path / "sequence", by_sequence)
    assert np.allclose(seen.data.values.reshape(*seen.data.shape[:-1], M, tokens.S).sum(-1), summed.data, atol=1e-12)
    never = np.setdiff1d(np.arange(len(tokens)), torch.cat(ids).numpy())
    assert len(never) and abs(seen.data.isel(sample=never)).max() == 0


def contrastive(model, batch):
    "InfoNCE with the other samples of the batch as negatives, [B]"
    a, b = (F.normalize(model(batch[k]), dim=-1) for k in ("x", "twin"))
    return F.cross_entropy(a @ b.mT / .5, torch.arange(len(a)), reduction="none")


class Whole:
    "One id is one batch of samples."
    def __init__(self, data, batches): self.data, self.batches = data, torch.stack(batches)
    def __len__(self): return len(self.batches)
    def __getitem__(self, ids): return self.data[self.batches[ids]]       # {name: [n, B, ...]}


def by_batch(loss):
    def losses(model, batch): return torch.stack([loss(model, {k: v[n] for k, v in batch.items()}).mean() for n in range(len(batch["x"]))])
    return losses


@every_optimizer
def test_in_batch_negatives(tmp_path, name):
    "A loss that couples samples is refused, and attributed to whole batches, each of them in one or in several steps."
    data = Samples(x=CASE.data[torch.arange(M)]["x"], twin=noise(20, M, 5))
    case = CASE._replace(data=data, loss=contrastive)
    train(tmp_path / "samples", case, OPTIMIZERS[name], MINIBATCH)
    with pytest.raises(ValueError, match="couples the samples"): run_explain(tmp_path / "samples", case)
    whole = case._replace(data=Whole(data, MINIBATCH), loss=by_batch(contrastive))
    ids = [torch.tensor(o) for o in ([0], [1], [2], [3], [4, 5], [0])]
    train(tmp_path / "batches", whole, OPTIMIZERS[name], ids)
    compare(tmp_path / "batches", whole, refer(whole, OPTIMIZERS[name], ids))


# --- optimizers and parameters that come and go

def mixed(ps):
    ps = list(ps)
    return [torch.optim.AdamW([p for p in ps if p.dim() > 1], lr=.02, weight_decay=.5), torch.optim.SGD([p for p in ps if p.dim() < 2], lr=.05, momentum=.9)]


@pytest.mark.parametrize("batches", [UNEQUAL, MICRO])
def test_two_optimizers(tmp_path, batches):
    kwargs = dict(make=mixed, batches=batches, schedule=ticking(SCHEDULERS["exponential"]))
    train(tmp_path / "run", CASE, **kwargs, clip=lambda ps: clip_grad_norm_(ps, .1))
    compare(tmp_path / "run", CASE, refer(CASE, **kwargs, transform=clip_norm(.1)))


def halves(optimizers, s):
    "First everything but the last layer is frozen, then nothing, then the last layer"
    params = [p for g in optimizers[0].param_groups for p in g["params"]]
    for p in params[:-2]: p.requires_grad_(s >= 2)
    for p in params[-2:]: p.requires_grad_(s < 4)


def grown(optimizers, s):
    "A second group joins with its own rate"
    optimizer = optimizers[0]
    for p in optimizer.later: p.requires_grad_(s >= 2)
    if s == 2: optimizer.add_param_group(dict(params=optimizer.later, lr=.03))


def last_layer(name):
    def make(ps):
        ps = list(ps)
        optimizer = OPTIMIZERS[name](ps[-2:])
        optimizer.later = ps[:-2]
        return optimizer
    return make


@pytest.mark.parametrize("average", [None, ema(.7, 1)])
@pytest.mark.parametrize("how", ["flag", "group"])
@every_optimizer
def test_unfreezing(tmp_path, name, how, average):
    make, schedule = (OPTIMIZERS[name], halves) if how == "flag" else (last_layer(name), grown)
    train(tmp_path / "run", CASE, make, UNEQUAL, schedule=schedule)
    compare_gathered(tmp_path / "run", CASE, refer(CASE, make, UNEQUAL, schedule=schedule, average=average and average(len(UNEQUAL))), average=average)
    r = run_explain(tmp_path / "run", CASE)
    assert abs(r.data.isel(component=0).sel(step=[0, 1])).max() == 0 < abs(r.data.isel(component=0)).max()


# --- averaged weights

AVERAGES = dict(ema=ema(.8), ema_late=ema(.6, 1, 2), swa=swa(2), swa_every=swa(1, 2), never=swa(100))


@pytest.mark.parametrize("average", AVERAGES)
@every_optimizer
def test_averages(tmp_path, name, average):
    average = AVERAGES[average]
    train(tmp_path / "run", CASE, OPTIMIZERS[name], UNEQUAL)
    compare_gathered(tmp_path / "run", CASE, refer(CASE, OPTIMIZERS[name], UNEQUAL, average=average(len(UNEQUAL))), average=average)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_average_is_torchs(tmp_path, kind):
    model = CASE.make()
    average, rates = (AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(.8)), ema(.8, 1)) if kind == "ema" else (AveragedModel(model), swa(1))
    def update(model, s):
        if s >= 1: average.update_parameters(model)
    train(tmp_path / "run", CASE, OPTIMIZERS["adamw"], UNEQUAL, model=model, after=update)
    with torch.no_grad(): want = CASE.target(average.module)
    assert np.allclose(run_explain(tmp_path / "run", CASE, average=rates).prediction, want, atol=1e-14)


@every_optimizer
def test_windows_of_an_average(tmp_path, name):
    "The windows (0, 3) and (3, N) meet: what the second one is behind at its start is `initial`."
    train(tmp_path / "run", CASE, OPTIMIZERS[name], UNEQUAL)
    ask = lambda **kw: run_explain(tmp_path / "run", CASE, average=ema(.7), **kw)
    first, second, whole = ask(steps=(0, 3)), ask(steps=(3, len(UNEQUAL))), ask(step_axis="update")
    assert np.allclose(first.prediction, second.baseline, atol=1e-14) and np.allclose(second.prediction, whole.prediction, atol=1e-14)
    assert second.closing_error < 1e-12 and abs(second.initial).max() > 1e-6
    late = ask(steps=(3, len(UNEQUAL)), step_axis="update")
    assert np.allclose(first.data.sum("step") , whole.data.sel(step=slice(0, 2)).sum("step"), atol=1e-13)
    moved = lambda r: (r.data.sum(("sample", "step")) + r.decay.sum("step") + r.get("initial", 0.)).transpose("target", "component").values
    assert np.allclose(moved(late), moved(whole.sel(step=slice(3, None)).drop_vars("initial")), atol=1e-12)


# --- models

class LoRA(nn.Module):
    "A frozen layer with a trained detour of low rank"
    def __init__(self, base, rank=2):
        super().__init__()
        self.base, self.down, self.up = base.requires_grad_(False), nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
    def forward(self, x): return self.base(x) + self.up(self.down(x))


class TiedAutoencoder(nn.Module):
    def __init__(self): super().__init__(); self.inner, self.bias, self.head = nn.Linear(5, 6), nn.Parameter(torch.zeros(5)), nn.Linear(5, CLASSES)
    def forward(self, x): return self.head(torch.tanh(F.linear(torch.tanh(self.inner(x)), self.inner.weight.T, self.bias)))


def normalised(parametrize): return nn.Sequential(parametrize(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, CLASSES))


MODELS = dict(
    lora=lambda: nn.Sequential(LoRA(nn.Linear(5, 7)), nn.Tanh(), LoRA(nn.Linear(7, CLASSES))),
    tied=TiedAutoencoder,
    weight_norm=lambda: normalised(parametrizations.weight_norm),
    orthogonal=lambda: normalised(parametrizations.orthogonal),
)


def seeded(build, seed=3):
    def make():
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build().double()
    return make


@pytest.mark.parametrize("model", MODELS)
@every_optimizer
def test_models(tmp_path, name, model):
    make = lambda ps: OPTIMIZERS[name]([p for p in ps if p.requires_grad])
    case = CASE._replace(make=seeded(MODELS[model]), target=lambda m: m(noise(30, 3, 5))[:, :2].mean(1))
    train(tmp_path / "run", case, make, UNEQUAL[:4])
    compare(tmp_path / "run", case, refer(case, make, UNEQUAL[:4]))
    if model == "lora": assert not any("base" in n for n in run_explain(tmp_path / "run", case).component.values)


# --- randomness, and everything at once

class Dropping(nn.Module):
    "A network with dropout; called with a mask, it takes that one."
    def __init__(self):
        super().__init__()
        self.inner, self.drop, self.head = nn.Linear(5, 7), nn.Dropout(.4), nn.Linear(7, CLASSES)
    def forward(self, x, mask=None):
        h = torch.tanh(self.inner(x))
        return self.head(self.drop(h) if mask is None else mask * h)


class Augmented(Samples):
    "Noise by every generator that a data set may use; `seen` keeps what was drawn."
    def __init__(self): super().__init__(**CASE.data[torch.arange(M)]); self.seen = []
    def __getitem__(self, ids):
        batch = super().__getitem__(ids)
        noises = (torch.randn(len(ids), 5, dtype=torch.float64), torch.from_numpy(np.random.randn(len(ids), 5)),
                  torch.tensor([[random.gauss(0., 1.)] for _ in ids], dtype=torch.float64))
        self.seen.append(batch["x"] + .1 * sum(noises))
        return dict(x=self.seen[-1], y=batch["y"])


def random_case(augmented=True):
    probe = noise(31, 3, 5)
    return Case("random", lambda: seeded(Dropping)().eval(), Augmented() if augmented else CASE.data, cross_entropy, lambda m: m(probe)[:, :2].mean(1))


def record_random(path, case, make, batches, masks, **kwargs):
    "Train in train mode; `masks` gets what dropout drew."
    model = case.make().train()
    model.drop.register_forward_hook(lambda m, args, out: masks.append((out != 0).double() / .6))
    return train(path, case, make, batches, model=model, **kwargs)


def fixed(case, masks, batches):
    "Every draw of a sample as a sample of its own, without randomness: the case, its batches, and the id that each one stands for."
    flat = torch.cat([ids for parts in batches for ids in as_list(parts)])
    x = torch.cat(case.data.seen) if isinstance(case.data, Augmented) else case.data[flat]["x"]
    data = Samples(x=x, y=CASE.data[flat]["y"], mask=torch.cat(masks))
    loss = lambda model, batch: F.cross_entropy(model(batch["x"], batch["mask"]), batch["y"], reduction="none")
    sizes = [[len(ids) for ids in as_list(parts)] for parts in batches]
    numbers = iter(torch.arange(len(flat)).split(sum(sizes, [])))
    return case._replace(data=data, loss=loss), [[next(numbers) for _ in row] for row in sizes], flat


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("batches", [UNEQUAL, REPEATS, MICRO])
@every_optimizer
def test_dropout_and_augmentation(tmp_path, name, batches, augmented):
    case, masks = random_case(augmented), []
    record_random(tmp_path / "run", case, OPTIMIZERS[name], batches, masks)
    twin, numbers, origin = fixed(case, masks, batches)
    state = torch.get_rng_state()
    compare_gathered(tmp_path / "run", case, refer(twin, OPTIMIZERS[name], numbers), origin)
    assert torch.equal(state, torch.get_rng_state())                                # explaining draws from nobody's generator


@pytest.mark.parametrize("engine", ["ghost", "jvp", "materialise", "loop"])
def test_every_engine_draws_the_same(tmp_path, engine):
    case, masks = random_case(), []
    record_random(tmp_path / "run", case, OPTIMIZERS["adamw"], MICRO[:3], masks)
    ask = lambda **kw: run_explain(tmp_path / "run", case, **kw).data
    assert abs(ask(engine=engine) - ask()).max() < 1e-12


def test_dropout_in_chunks(tmp_path, monkeypatch):
    "However many samples fit into memory at once, the masks are those of the run."
    case = random_case()
    record_random(tmp_path / "run", case, OPTIMIZERS["adamw"], UNEQUAL, [])
    whole = run_explain(tmp_path / "run", case)
    monkeypatch.setattr("explaind_nb.contraction.BUDGET", 1000)
    r = run_explain(tmp_path / "run", case)
    assert abs(r.data - whole.data).max() < 1e-12 and abs(r.replay).max() < 1e-12


class Functional(Dropping):
    def forward(self, x): return self.head(F.dropout(torch.tanh(self.inner(x)), .4, self.training))


def encoder():
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=.3, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (5, 1)), nn.Linear(1, 4), layer, nn.Flatten(), nn.Linear(20, CLASSES))


def recurrent(): return nn.Sequential(nn.Unflatten(1, (5, 1)), LastState(nn.LSTM(1, 4, 2, dropout=.3, batch_first=True)), nn.Linear(4, CLASSES))


class LastState(nn.Module):
    def __init__(self, rnn): super().__init__(); self.rnn = rnn
    def forward(self, x): return self.rnn(x)[0][:, -1]


@pytest.mark.parametrize("build", [Functional, encoder, recurrent])
def test_other_kinds_of_dropout(tmp_path, build):
    "Replayed bit for bit, and in nobody's way where it is switched off."
    case = random_case(False)._replace(make=lambda: seeded(build)().eval())
    model = case.make().train()
    train(tmp_path / "run", case, OPTIMIZERS["adamw"], MICRO, model=model)
    r = run_explain(tmp_path / "run", case)
    assert r.closing_error < 1e-12 and abs(r.replay).max() < 1e-12 and abs(r.data).max() > 1e-6
    with pytest.raises(ValueError, match="random"): explain(tmp_path / "run", model, case.data, case.loss, case.target, progress=False)


def test_dropout_switched_off_in_between(tmp_path):
    "The mode of every module is that of the step."
    case, masks = random_case(False), []
    model = case.make(); optimizer = OPTIMIZERS["adamw"](model.parameters())
    def note(m, args, out):
        if torch.is_grad_enabled(): masks.append((out != 0).double() / .6 if m.training else torch.ones_like(out))
    model.drop.register_forward_hook(note)
    with Recorder(model, optimizer, tmp_path / "run") as recorder:
        for s, ids in enumerate(UNEQUAL):
            model.train(); model.drop.train(s % 2 == 0)
            recorder.batch(ids); case.loss(model, case.data[ids]).mean().backward(); optimizer.step(); optimizer.zero_grad()
            model.eval()
            with torch.no_grad(): case.target(model)                                # a look at the validation in between
    twin, numbers, origin = fixed(case, masks, UNEQUAL)
    compare_gathered(tmp_path / "run", case, refer(twin, OPTIMIZERS["adamw"], numbers), origin)


def test_numbers_drawn_elsewhere_are_refused(tmp_path):
    "Before the batch was announced, or from a generator of one's own."
    case = random_case()
    class Early(Samples):
        "Augments as a loader's worker does: the batch is there before it is announced"
        def __getitem__(self, ids): return self.ready if self.ready is not None else case.data[ids]
    early = Early(**CASE.data.named)
    early.ready = None
    model = case.make(); optimizer = OPTIMIZERS["adamw"](model.parameters())
    with Recorder(model, optimizer, tmp_path / "early") as recorder:
        for ids in UNEQUAL[:3]:
            batch = early[ids]
            recorder.batch(ids); case.loss(model, batch).mean().backward(); optimizer.step(); optimizer.zero_grad()
    with pytest.raises(ValueError, match="random"): run_explain(tmp_path / "early", case)
    own = torch.Generator().manual_seed(0)
    private = case._replace(data=CASE.data, loss=lambda model, b: case.loss(model, dict(x=b["x"] + .1 * torch.randn(b["x"].shape, generator=own, dtype=torch.float64), y=b["y"])))
    train(tmp_path / "private", private, OPTIMIZERS["adamw"], UNEQUAL[:3])
    with pytest.raises(ValueError, match="random"): run_explain(tmp_path / "private", private)


def test_everything_at_once(tmp_path):
    "Two optimizers, groups under a schedule, micro-batches, weights, dropout, augmentation, a penalty, a growing scaler, clipping, and an average."
    for name, clip, transform in (("norm", lambda ps: clip_grad_norm_(ps, .1), clip_norm(.1)), ("value", lambda ps: clip_grad_value_(ps, .02), clip_value(.02))):
        case, masks, average = random_case(), [], ema(.6, 1)
        weights = lambda parts: [torch.linspace(.1, .5, len(ids), dtype=torch.float64) for ids in parts]
        schedule = ticking(SCHEDULERS["exponential"])
        record_random(tmp_path / name, case, mixed, MICRO, masks, weights=weights, schedule=schedule, clip=clip, scaler=grad_scaler(), penalty=penalty)
        twin, numbers, origin = fixed(case, masks, MICRO)
        V = len(origin)
        class Data:
            def __len__(self): return V + 1
            def __getitem__(self, ids): return twin.data[ids % V], ids
        whole = twin._replace(data=Data(), loss=lambda model, batch: torch.where(batch[1] == V, penalty(model), twin.loss(model, batch[0])))
        ref = refer(whole, mixed, [[*n, torch.tensor([V])] for n in numbers], penalised(weights), ticking(SCHEDULERS["exponential"]), transform, average(len(MICRO)))
        compare_gathered(tmp_path / name, case, ref, torch.cat([origin, torch.tensor([M])]), penalty=penalty, average=average)
