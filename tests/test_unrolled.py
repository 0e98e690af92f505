"The unrolled sweep against finite differences of retraining, in float64."
import warnings

import numpy as np
import pytest
import torch
from reference import Lion, ScheduleFree
from test_kernel import BATCHES, OPTIMIZERS
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from zoo import ZOO

from explaind_nb.average import ema
from explaind_nb.every_optimizer import LionStep, ScheduleFreeStep
from explaind_nb.history import Recorder
from explaind_nb.kernel import explain
from explaind_nb.optimizers import register

register(ScheduleFree, ScheduleFreeStep)
register(Lion, LionStep)
CASE = ZOO["mlp tanh"]
MORE = dict(
    radam=lambda ps: torch.optim.RAdam(ps, lr=.02, betas=(.8, .9), weight_decay=.1), nadam=lambda ps: torch.optim.NAdam(ps, lr=.02, weight_decay=.1, maximize=True),
    adamax=lambda ps: torch.optim.Adamax(ps, lr=.02, weight_decay=.1), adagrad=lambda ps: torch.optim.Adagrad(ps, lr=.05, lr_decay=.1, initial_accumulator_value=.1),
    adadelta=lambda ps: torch.optim.Adadelta(ps, lr=5., weight_decay=.1), rmsprop=lambda ps: torch.optim.RMSprop(ps, lr=.01, momentum=.9, weight_decay=.1),
    centred=lambda ps: torch.optim.RMSprop(ps, lr=.01, centered=True, eps=.1), asgd=lambda ps: torch.optim.ASGD(ps, lr=.1, lambd=.1, t0=3, weight_decay=.1),
    adafactor=lambda ps: torch.optim.Adafactor(ps, lr=.05, weight_decay=.1),
    schedule_free=lambda ps: ScheduleFree(ps, lr=.02, weight_decay=.1, warmup_steps=3), schedule_free_late=lambda ps: ScheduleFree(ps, lr=.02, r=1., weight_lr_power=1.))
RUN = BATCHES["unequal"] + BATCHES["repeats"]
PENALTY = lambda m: .01 * sum(p.square().sum() ** 2 for p in m.parameters())


def train(make, weights, path=None, clip=None, penalty=None, average=None, dropout=0., decays=None, case=CASE):
    "The run with given sample weights, recorded if there is a path; the target at its end."
    model = model_with(dropout, case); optimizer = make(model.parameters())
    torch.manual_seed(3)
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(.8)) if average else None
    recorder = Recorder(model, list(getattr(optimizer, "of", [optimizer])), path).__enter__() if path else None
    for s, (ids, w) in enumerate(zip(RUN, weights)):
        if recorder: recorder.batch(ids, w)
        if decays: optimizer.param_groups[0]["weight_decay"] = decays[s]
        objective = (w * case.loss(model, case.data[ids])).sum() + (penalty(model) if penalty else 0.)
        objective.backward()
        if clip: clip(model)
        optimizer.step(); optimizer.zero_grad()
        if mean: mean.update_parameters(model)
    if recorder: recorder.__exit__(None, None, None)
    return case.target((mean.module if mean else model).eval()).detach()


def model_with(dropout, case=CASE):
    model = case.make()
    if dropout: model.body.insert(2, torch.nn.Dropout(dropout))
    return model


def even(): return [torch.full((len(b),), 1 / len(b), dtype=torch.float64) for b in RUN]


def differences(make, s, k, h=1e-6, **kwargs):
    "w_k df/dw_k at one step, by running the training twice more."
    ends = []
    for sign in (1, -1):
        w = even(); w[s][k] *= 1 + sign * h
        ends.append(train(make, w, **kwargs))
    return (ends[0] - ends[1]) / (2 * h)


def derivatives(path, dropout=0., case=CASE, **kwargs):
    return explain(path, model_with(dropout, case).eval(), case.data, case.loss, case.target, sweep="unrolled", progress=False, **kwargs)


def check(make, path, tol=1e-6, average=None, penalty=None, **kwargs):
    end = train(make, even(), path, average=average, penalty=penalty, **kwargs)
    result = derivatives(path, kwargs.get("dropout", 0.), kwargs.get("case", CASE), average=average, penalty=penalty)
    assert np.allclose(result.prediction, end, atol=1e-13) and result.sweep == "unrolled" and "residual" not in result
    got = result.data.sum("component").transpose("step", "sample", "target").values
    size = abs(got).max()
    for s, k in ((0, 0), (0, 3), (2, 1), (len(RUN) - 3, 1), (len(RUN) - 1, 2)):
        same = [j for j, i in enumerate(RUN[s].tolist()) if i == RUN[s][k]]               # an id that is there twice
        want = sum(differences(make, s, j, average=average, penalty=penalty, **kwargs) for j in same).numpy()
        assert abs(got[s, RUN[s][k]] - want).max() <= tol * size, (s, k, got[s, RUN[s][k]], want)
    return result


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, *MORE])
def test_every_optimizer(tmp_path, optimizer): check({**OPTIMIZERS, **MORE}[optimizer], tmp_path)


class Both:
    "Muon for the matrices, AdamW for the rest."
    def __init__(self, ps, **kw):
        ps = list(ps)
        self.of = torch.optim.Muon([p for p in ps if p.dim() == 2], lr=.02, weight_decay=.1, **kw), torch.optim.AdamW([p for p in ps if p.dim() != 2], lr=.02)
    def step(self):
        for o in self.of: o.step()
    def zero_grad(self):
        for o in self.of: o.zero_grad()


@pytest.mark.parametrize("name", ZOO)
def test_every_model(tmp_path, name):
    case = ZOO[name]
    if name.startswith("tied"): case = case._replace(make=lambda make=case.make: without_padding(make()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)                      # engines may change, by name
        check(lambda ps: torch.optim.AdamW(ps, lr=.02, weight_decay=.5, eps=1e-3), tmp_path, case=case)  # with a small eps the differences need a smaller h


def without_padding(model): model.embed.padding_idx = None; return model


def test_padding_that_moves_is_told(tmp_path):
    train(OPTIMIZERS["momentum"], even(), tmp_path, case=(case := ZOO["tied layer"]))
    ask = lambda **how: explain(tmp_path, case.make(), case.data, case.loss, case.target, progress=False, **how)
    with pytest.warns(UserWarning, match="Row 0 of 'embed.weight'.*missing from these derivatives"): ask(sweep="unrolled")
    with pytest.warns(UserWarning, match="Row 0 of 'embed.weight'.*stay in the residual"): ask(rule="midpoint", nodes=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Row 0")
        assert abs(ask(rule="secant").quadrature).max() < 1e-10


@pytest.fixture
def uncast(monkeypatch):
    "torch's Newton-Schulz iteration in the precision of the gradient instead of bfloat16."
    def iterate(x, coefficients, steps, eps):
        a, b, c = coefficients
        tall = x.shape[0] > x.shape[1]
        x = (x.T if tall else x) / x.norm().clamp(min=eps)
        for _ in range(steps): gram = x @ x.T; x = a * x + (b * gram + c * gram @ gram) @ x
        return x.T if tall else x
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", iterate)


MUON = dict(default={}, plain=dict(nesterov=False, momentum=.5), adamw=dict(adjust_lr_fn="match_rms_adamw", ns_steps=3))

@pytest.mark.parametrize("name", MUON)
def test_muon(tmp_path, uncast, name): check(lambda ps: Both(ps, **MUON[name]), tmp_path)


@pytest.mark.parametrize("optimizer, name", ((torch.optim.Rprop, "RpropStep"), (Lion, "LionStep")))
def test_rules_that_jump_are_refused(tmp_path, optimizer, name):
    train(lambda ps: optimizer(ps, lr=.01), even(), tmp_path)
    with pytest.raises(TypeError, match=f"{name} cannot be unrolled.*frozen"): derivatives(tmp_path)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("name", ["norm", "small norm", "value", "both"])
def test_clipping(tmp_path, optimizer, name):
    norm, value = torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_
    clip = {"norm": lambda m: norm(m.parameters(), .3), "small norm": lambda m: norm(m.parameters(), 1e-3), "value": lambda m: value(m.parameters(), .02),
            "both": lambda m: (norm(m.body[0].parameters(), .1), norm(m.body[2].parameters(), .05))}[name]
    check(OPTIMIZERS[optimizer], tmp_path, clip=clip)


@pytest.mark.parametrize("optimizer", ["momentum", "adam_l2", "adamw"])
def test_average_and_penalty(tmp_path, optimizer):
    check(OPTIMIZERS[optimizer], tmp_path / "a", average=ema(.8), penalty=PENALTY)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_dropout_and_clipping(tmp_path, optimizer):
    "The masks of the run, in the Hessian too."
    check(OPTIMIZERS[optimizer], tmp_path, dropout=.4, clip=lambda m: torch.nn.utils.clip_grad_norm_(m.parameters(), .3))


@pytest.mark.parametrize("optimizer", ["momentum", "adam_l2", "adamw", "adamax", "adagrad", "schedule_free"])
def test_weight_decay(tmp_path, optimizer):
    "decay holds lambda df/dlambda of every step."
    make, h = {**OPTIMIZERS, **MORE}[optimizer], 1e-6
    base = make(CASE.make().parameters()).param_groups[0]["weight_decay"]
    train(make, even(), tmp_path)
    got = derivatives(tmp_path).decay.sum("component").transpose("step", "target").values
    for s in (0, 3, len(RUN) - 1):
        ends = [train(make, even(), decays=[base * (1 + sign * h * (t == s)) for t in range(len(RUN))]) for sign in (1, -1)]
        assert abs(got[s] - ((ends[0] - ends[1]) / (2 * h)).numpy()).max() <= 1e-6 * abs(got).max()


def test_axes_windows_and_engines(tmp_path):
    train(OPTIMIZERS["adamw"], even(), tmp_path)
    whole = derivatives(tmp_path)
    for keep in ((), ("step",), ("sample",), ("component", "sample"), ("target",)):
        part = derivatives(tmp_path, keep=keep)
        assert set(part.data.dims) == set(keep)
        assert np.allclose(part.data, whole.data.sum([d for d in whole.data.dims if d not in keep]), atol=1e-12)
    late = derivatives(tmp_path, steps=(3, len(RUN)))                                     # the same derivatives: a window cuts off what is before it
    assert np.allclose(late.data, whole.data.isel(step=slice(3, None)), atol=1e-13)
    assert np.allclose(derivatives(tmp_path, engine="jvp").data, whole.data, atol=1e-12)
    frozen = explain(tmp_path, CASE.make(), CASE.data, CASE.loss, CASE.target, progress=False)
    assert abs(frozen.data - whole.data).max() > .1 * abs(whole.data).max()               # two questions, two answers


def test_the_last_step_of_sgd_is_the_same_in_both_sweeps(tmp_path):
    "Nothing comes after it: with a linear target there is no difference left."
    train(OPTIMIZERS["sgd"], even(), tmp_path)
    last = dict(steps=(len(RUN) - 1, len(RUN)), progress=False)
    linear = lambda m: torch.stack([(p * torch.linspace(-1, 1, p.numel()).reshape(p.shape)).sum() for p in m.parameters()])
    a, b = (explain(tmp_path, CASE.make(), CASE.data, CASE.loss, linear, sweep=sweep, **last) for sweep in ("frozen", "unrolled"))
    assert np.allclose(a.data, b.data, atol=1e-14)


def test_refusals(tmp_path):
    train(OPTIMIZERS["adamw"], even(), tmp_path / "a")
    ask = lambda path="a", **kw: explain(tmp_path / path, CASE.make(), **{**dict(data=CASE.data, loss=CASE.loss, target=CASE.target, progress=False), **kw})
    for kw, text in ((dict(sweep="both"), "'frozen' or 'unrolled'"), (dict(sweep="unrolled", step_axis="update"), "no update axis"), (dict(sweep="unrolled", complete=True), "no residual"),
                     (dict(sweep="unrolled", keep=("step",), data=None), "training data")):
        with pytest.raises((ValueError, TypeError), match=text): ask(**kw)
    bounds = iter([.3, .2] * 99)
    train(OPTIMIZERS["adamw"], even(), tmp_path / "b", clip=lambda m: torch.nn.utils.clip_grad_norm_(m.parameters(), next(bounds)))
    with pytest.raises(ValueError, match="another norm, or a changing bound"): ask("b", sweep="unrolled")
    both = lambda m: (torch.nn.utils.clip_grad_norm_(m.parameters(), .1), torch.nn.utils.clip_grad_value_(m.parameters(), .02))
    train(OPTIMIZERS["adamw"], even(), tmp_path / "c", clip=both)
    with pytest.raises(ValueError, match="by norm and by value"): ask("c", sweep="unrolled")
