"Every model of the zoo on a GPU, beside the CPU on the same recording, in float64. Skipped where there is no GPU."
import warnings

import pytest
import torch
from torch import nn
from zoo import ZOO

from explaind_nb.history import Recorder
from explaind_nb.kernel import explain, reconstruct

DEVICES = ["cuda"] if torch.cuda.is_available() else []
WAYS = dict(credit=dict(rule="midpoint", nodes=2), jvp=dict(engine="jvp"), materialise=dict(engine="materialise"), neurons=dict(component="neuron"),
            secant=dict(rule="secant"), derivative=dict(sweep="unrolled"), march=dict(step_axis="update", keep=("target", "step", "component")))


def record(path, case, device, dropout=None):
    "Four steps of AdamW on random batches of seven, gradients clipped"
    model, data = case.make().to(device), case.data.to(device)
    if dropout: model = nn.Sequential(model, dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=.02, weight_decay=.5)
    with Recorder(model, optimizer, path) as recorder:
        for s in range(4):
            ids = torch.randperm(12, generator=torch.Generator().manual_seed(s))[:7]
            recorder.batch(ids)
            case.loss(model, data[ids.to(device)]).mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), .5)
            optimizer.step(); optimizer.zero_grad()
    return model, data


def close(a, b, tol=1e-9):
    for k in ("data", "decay", "quadrature", "prediction"):
        if k not in b: continue                                           # a derivative has no decay and leaves nothing over
        x, y = a[k].transpose(*b[k].dims).values, b[k].values
        assert abs(x - y).max() <= tol * max(abs(b.data).values.sum(), abs(y).max()), k


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("device", DEVICES)
def test_as_on_the_cpu(tmp_path, device, name, way):
    case = ZOO[name]
    model, data = record(tmp_path, case, device)
    ask = lambda model, data: explain(tmp_path, model, data, case.loss, case.target, progress=False, **WAYS[way])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)                      # engines may change, by name
        here = ask(model, data)
        there = ask(case.make(), case.data)
    assert way == "derivative" or here.closing_error < 1e-10
    if way == "secant": assert abs(here.quadrature).max() < 1e-10
    close(here, there)


@pytest.mark.parametrize("device", DEVICES)
def test_prediction_of_a_batch_without_a_residual(tmp_path, device):
    case = ZOO["transformer"]
    model, _ = record(tmp_path, case, device)
    x = case.data.named["x"]
    full = reconstruct(tmp_path, model, lambda m: m(x.to(device)), keep=("component",), rule="secant", progress=False)
    assert abs(full.quadrature).max() < 1e-10 and abs(full.prediction.values - model(x.to(device)).detach().cpu().numpy()).max() < 1e-10


@pytest.mark.parametrize("device", DEVICES)
def test_the_generator_of_the_device_is_replayed(tmp_path, device):
    case = ZOO["mlp tanh"]
    torch.manual_seed(0)
    model, data = record(tmp_path, case, device, dropout=nn.Dropout(.3))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)                       # a gradient that is not the recorded one would warn or raise
        explain(tmp_path, model.eval(), data, case.loss, case.target, progress=False, sweep="frozen")
