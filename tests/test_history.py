"Recording: round trips, refusals, kills. Every test is a small model and a few steps."
import itertools, json, multiprocessing, os, random, signal, time, warnings
import numpy as np
import pytest, torch
import torch.nn.functional as F
from torch import nn, optim
from explaind_nb import history
from explaind_nb.history import History, Indexed, Recorder, random_state, read_index

X, Y = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2

def mlp(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)

def backward(model, ids, scale=1.):
    (scale * F.cross_entropy(model(X[ids].to(next(model.parameters()).dtype)), Y[ids])).backward()

def batches(n, seed=0):
    "Unequal batches with repeated ids."
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(20, (5 - s % 3,), generator=g) for s in range(n)]

def train(model, opt, recorder, ids_of_steps, before_step=lambda: None):
    for ids in ids_of_steps:
        recorder.batch(ids)
        backward(model, ids)
        before_step()
        opt.step()
        opt.zero_grad()

def copy(model): return {n: p.detach().clone() for n, p in model.named_parameters()}
def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "dampened": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3, maximize=True),
    "nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "adamw": lambda p: optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "amsgrad": lambda p: optim.AdamW(p, lr=torch.tensor(1e-2), amsgrad=True, maximize=True),
}

@pytest.fixture
def small(monkeypatch): monkeypatch.setattr(history, "FILE_BYTES", 3 * 4096)   # three steps a file

# --- round trip

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_round_trip(name, dtype, tmp_path, small):
    model = mlp(dtype=dtype)
    opt, path, states = OPTIMIZERS[name](model.parameters()), [copy(model)], []
    with Recorder(model, opt, tmp_path) as r:
        for ids in batches(8):
            train(model, opt, r, [ids])
            path.append(copy(model))
            states.append({n: {k: v.clone() for k, v in opt.state[p].items() if isinstance(v, torch.Tensor)} for n, p in model.named_parameters()})
    h = History(tmp_path)
    assert len(h) == 8 and h.names == [n for n, _ in model.named_parameters()] and h.shapes["0.weight"] == (4, 3)
    assert all(equal(h.theta(s), path[s]) for s in range(9))
    for s, ids in enumerate(batches(8)):
        assert torch.equal(h.ids(s), ids) and torch.equal(h.weights(s), torch.full((len(ids),), 1/len(ids), dtype=torch.float64))
        steps, before = h.linear(s), h.state(s)
        assert list(steps) == h.names and h.scale(s) == {} and h.lr(s) == pytest.approx(0.1 if "lr" not in opt.defaults else float(opt.defaults["lr"]))
        assert (not before) == (s == 0 or name == "sgd")
        for n, st in steps.items():
            assert st.count == s + 1 and st.lr == h.lr(s)
            for k, v in states[s][n].items():
                if k != "step": assert torch.equal(st.rec[k], v.double())
            delta = (path[s + 1][n].double() - path[s][n].double())
            predicted = st.delta(before.get(n), path[s][n].double())
            assert (predicted - delta).abs().max() <= 4*torch.finfo(dtype).eps*path[s][n].abs().max() + 1e-5*delta.abs().max()
            if s and st.state is not None: assert torch.equal(before[n], states[s - 1][n]["exp_avg" if "exp_avg" in st.rec else "momentum_buffer"].double())
    h.verify()
    assert len(list(tmp_path.glob("steps-*"))) == 3 and not list((tmp_path/"partial").iterdir())

def test_reading_is_by_value(tmp_path):
    model = mlp()
    opt = OPTIMIZERS["adam"](model.parameters())
    with Recorder(model, opt, tmp_path) as r: train(model, opt, r, batches(3))
    h = History(tmp_path)
    before = h.theta(2)
    for t in h.theta(2).values(): t.zero_()
    assert equal(h.theta(2), before)
    assert h.theta(1, dtype=torch.float64)["0.bias"].dtype == torch.float64
    with pytest.raises(IndexError, match="Step 3 was not recorded"): h.ids(3)
    with pytest.raises(IndexError): h.theta(4)

def test_nothing_is_pickled(tmp_path):
    model = mlp()
    opt = OPTIMIZERS["adamw"](model.parameters())
    with Recorder(model, opt, tmp_path) as r: train(model, opt, r, batches(3))
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert {f.suffix for f in files} == {".json", ".jsonl", ".safetensors"}
    for f in files:
        data = f.read_bytes()
        assert not data.startswith((b"PK", b"\x80")) and (f.suffix == ".safetensors" or [json.loads(o) for o in ([data] if f.suffix == ".json" else data.splitlines())])

def test_files_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        model = mlp()
        opt = OPTIMIZERS["sgd"](model.parameters())
        with Recorder(model, opt, tmp_path/"run") as r: train(model, opt, r, batches(1))
    finally: os.umask(old)
    assert {f.stat().st_mode & 0o777 for f in (tmp_path/"run").iterdir() if f.is_file()} == {0o640}

# --- what a loop may do

def test_accumulation_adds_up(tmp_path):
    model = mlp()
    opt = OPTIMIZERS["adam"](model.parameters())
    with Recorder(model, opt, tmp_path) as r:
        for w in (None, 0.25, torch.tensor([0.5, 0., 2.])):
            r.batch(torch.tensor([3, 1, 3]), w)
            backward(model, torch.tensor([3, 1, 3]))
        opt.step()
    h = History(tmp_path)
    assert h.ids(0).tolist() == [3, 1, 3] * 3
    assert h.weights(0).tolist() == [1/3]*3 + [0.25]*3 + [0.5, 0., 2.] and h.scale(0) == {}

@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_clipping_by_norm_is_a_scale(kind, tmp_path):
    model, seen = mlp(), []
    opt = getattr(optim, kind)(model.parameters(), lr=0.01)
    def clip():
        g = model[0].weight.grad.clone()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        seen.append((model[0].weight.grad / g).mean().item())
    with Recorder(model, opt, tmp_path) as r: train(model, opt, r, batches(4), clip)
    h = History(tmp_path)
    for s in range(4): assert set(h.scale(s)) == set(h.names) and h.scale(s)["0.weight"] == pytest.approx(seen[s], rel=1e-6)

def test_unscaling_is_a_scale(tmp_path):
    model = mlp()
    opt = OPTIMIZERS["adam"](model.parameters())
    with Recorder(model, opt, tmp_path) as r:
        r.batch(torch.arange(4))
        backward(model, torch.arange(4), 1024.)
        for p in model.parameters(): p.grad.mul_(1/1024)
        opt.step()
    assert set(History(tmp_path).scale(0).values()) == {1/1024}

def test_bent_gradients_are_refused(tmp_path):
    model = mlp()
    opt = OPTIMIZERS["adam"](model.parameters())
    bend = {"noise": lambda: model[2].bias.grad.add_(1.), "decay": lambda: model[0].weight.grad.add_(model[0].weight.detach(), alpha=0.1),
            "sign": lambda: model[0].weight.grad.sign_(), "flip": lambda: model[0].weight.grad.copy_(model[0].weight.grad.flip(0))}
    for name, f in bend.items():
        model = mlp()
        opt = OPTIMIZERS["adam"](model.parameters())
        with pytest.raises(RuntimeError, match="Step 1: the gradient of .* neither scaled nor clipped.*penalty|regularizer"):
            with Recorder(model, opt, tmp_path/name) as r:
                train(model, opt, r, batches(1))
                train(model, opt, r, batches(2), f)
        assert len(History(tmp_path/name)) == 1

def test_clipping_by_value_is_a_diagonal(tmp_path):
    "In some steps, of some tensors, on top of a norm or not; what is kept gives back the gradient that was used."
    model, used, raw = mlp(), [], []
    opt = OPTIMIZERS["adam"](model.parameters())
    clips = [lambda: None, lambda: nn.utils.clip_grad_value_(model.parameters(), 0.01), lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.1),
             lambda: (nn.utils.clip_grad_norm_(model.parameters(), 0.1), nn.utils.clip_grad_value_(model[0].parameters(), 1e-3))]
    with Recorder(model, opt, tmp_path) as r:
        for ids in batches(8):
            opt.zero_grad(); r.batch(ids); backward(model, ids)
            raw.append({n: p.grad.clone() for n, p in model.named_parameters()})
            clips[r.step % 4]()
            used.append({n: p.grad.clone() for n, p in model.named_parameters()})
            opt.step()
    h, tensors = History(tmp_path), 0
    for s in range(8):
        for n, g in used[s].items():
            scale = h.scale(s).get(n, 1.)
            tensors += isinstance(scale, torch.Tensor)
            torch.testing.assert_close(scale * raw[s][n], g, rtol=1e-6, atol=0)
    assert tensors >= 6
    h.verify()

def test_random_states_are_kept_where_something_was_drawn(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    opt, states = OPTIMIZERS["sgd"](model.parameters()), []
    with Recorder(model, opt, tmp_path) as r:
        for ids in batches(6):
            model.train(r.step not in (2, 3))
            opt.zero_grad()
            for part in ids.split(4):
                states.append(random_state())
                r.batch(part, 1/len(ids)); backward(model, part)
            opt.step()
            torch.rand(3)                                                  # between steps: nobody's business
    h = History(tmp_path)
    assert [h.random(s) is None for s in range(6)] == [s in (2, 3) for s in range(6)] and [h.training(s) for s in (1, 2)] == [True, False]
    kept = torch.cat([h.random(s) for s in (0, 1)])
    assert torch.equal(kept, torch.stack(states[:len(kept)])) and [sum(h.calls(s)) for s in range(6)] == [len(h.ids(s)) for s in range(6)]
    h.verify()

def test_random_numbers_by_any_generator(tmp_path):
    model = mlp()
    opt = OPTIMIZERS["sgd"](model.parameters())
    draws = [lambda: None, random.random, lambda: np.random.rand(2), lambda: torch.rand(1), lambda: np.random.default_rng(0).random()]
    with Recorder(model, opt, tmp_path) as r:
        for draw, ids in zip(draws, batches(5)): r.batch(ids); draw(); backward(model, ids); opt.step(); opt.zero_grad()
    assert [History(tmp_path).random(s) is None for s in range(5)] == [True, False, False, False, True]

def test_the_mode_of_every_module(tmp_path):
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4).eval()), nn.Linear(4, 2))
    opt = OPTIMIZERS["sgd"](model.parameters())
    with Recorder(model, opt, tmp_path) as r: train(model, opt, r, batches(1))
    assert History(tmp_path).training(0) == ["", "0", "0.0", "1"]

def test_gradients_left_over_are_refused(tmp_path):
    model = mlp()
    opt = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(RuntimeError, match="Step 1.*zero_grad"):
        with Recorder(model, opt, tmp_path/"a") as r:
            for ids in batches(2): r.batch(ids); backward(model, ids); opt.step()
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="Step 1.*zero_grad"):
        with Recorder(model, opt, tmp_path/"b") as r:
            r.batch(torch.arange(3)); backward(model, torch.arange(3)); opt.step()
            r.batch(torch.arange(3)); opt.step()
    opt.zero_grad()
    with Recorder(model, opt, tmp_path/"c") as r:                          # zeroed in place, and after announcing: fine
        for ids in batches(3): r.batch(ids); opt.zero_grad(set_to_none=False); backward(model, ids); opt.step()
    assert len(History(tmp_path/"c")) == 3

def test_gradients_without_backward_are_taken(tmp_path):
    model = mlp()
    opt = OPTIMIZERS["adam"](model.parameters())
    with Recorder(model, opt, tmp_path) as r:
        for ids in batches(3):
            r.batch(ids)
            for p, g in zip(model.parameters(), torch.autograd.grad(F.cross_entropy(model(X[ids]), Y[ids]), list(model.parameters()))): p.grad = g
            opt.step()
    assert len(History(tmp_path)) == 3

def test_closure(tmp_path):
    model, ids = mlp(), torch.arange(5)
    opt = OPTIMIZERS["momentum"](model.parameters())
    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(model(X[ids]), Y[ids])
        loss.backward()
        return loss
    with Recorder(model, opt, tmp_path) as r:
        for _ in range(3): r.batch(ids); opt.step(closure)
    h = History(tmp_path)
    assert len(h) == 3 and len(h.linear(2)) == 4

def test_schedule_and_hyper_parameters(tmp_path):
    model = mlp()
    opt = optim.SGD([dict(params=model[0].parameters(), lr=0.1), dict(params=model[2].parameters(), lr=0.2, weight_decay=0.1)], momentum=0.5)
    schedule, used = optim.lr_scheduler.StepLR(opt, 2, 0.5), []
    with Recorder(model, opt, tmp_path) as r:
        for ids in batches(5):
            used.append([g["lr"] for g in opt.param_groups])
            train(model, opt, r, [ids])
            schedule.step()
    h = History(tmp_path)
    for s in range(5):
        assert [h.linear(s)[n].lr for n in ("0.bias", "2.bias")] == used[s] and h.lr(s) == used[s][0]
        assert h.linear(s)["2.weight"].hyper["weight_decay"] == 0.1
    assert h.lr(4) == 0.025

def test_frozen_then_thawed_and_added(tmp_path, small):
    model = nn.Sequential(*mlp(), nn.Linear(2, 2), nn.Linear(2, 2))
    first, second, third, fourth = model[0], model[2], model[3], model[4]
    first.requires_grad_(False); fourth.requires_grad_(False)
    opt, path = optim.Adam([*first.parameters(), *second.parameters()], lr=0.01), [copy(model)]
    third.requires_grad_(False)
    with Recorder(model, opt, tmp_path) as r:
        for s, ids in enumerate(batches(8)):
            if s == 3: first.requires_grad_(True)
            if s == 5: third.requires_grad_(True); opt.add_param_group(dict(params=third.parameters(), lr=0.5))
            train(model, opt, r, [ids])
            path.append(copy(model))
    h = History(tmp_path)
    h.verify()
    assert all(equal(h.theta(s), path[s]) for s in range(9))
    assert [len(h.linear(s)) for s in range(8)] == [2, 2, 2, 4, 4, 6, 6, 6]
    assert [len(h.state(s)) for s in range(8)] == [0, 2, 2, 2, 4, 4, 6, 6]
    assert h.linear(7)["0.weight"].count == 5 and h.linear(7)["3.bias"].count == 3 and h.linear(6)["3.bias"].lr == 0.5
    owned = {p["name"]: p["owned"] for p in h.meta["parameters"]}
    assert owned["0.weight"] and not owned["4.weight"]

def test_none_is_not_zero(tmp_path):
    model = mlp()
    opt = optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    def drop(): model[0].weight.grad = None
    with Recorder(model, opt, tmp_path) as r:
        train(model, opt, r, batches(2))
        state = {k: v.clone() for k, v in opt.state[model[0].weight].items()}
        train(model, opt, r, batches(2), drop)
        train(model, opt, r, batches(1))
    h = History(tmp_path)
    assert "0.weight" not in h.linear(2) and "0.bias" in h.linear(3) and h.linear(4)["0.weight"].count == 3
    assert torch.equal(h.theta(2)["0.weight"], h.theta(4)["0.weight"])
    for s in (2, 3, 4): assert torch.equal(h.state(s)["0.weight"], state["exp_avg"].double())

def test_two_optimizers(tmp_path):
    model = mlp()
    a, b = optim.AdamW(model[0].parameters(), lr=0.01), optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9)
    with Recorder(model, [a, b], tmp_path) as r:
        for ids in batches(3):                                            # both
            r.batch(ids); backward(model, ids); a.step(); b.step(); a.zero_grad(); b.zero_grad()
        for ids in batches(3):                                            # one of them: closed by the next batch, or the end
            r.batch(ids); backward(model, ids); b.step(); a.zero_grad(); b.zero_grad()
    h = History(tmp_path)
    assert len(h) == 6 and [sorted(h.linear(s)) for s in (2, 3)] == [sorted(h.names), ["2.bias", "2.weight"]]
    assert type(h.linear(1)["0.bias"]).__name__ == "AdamWStep" and type(h.linear(1)["2.bias"]).__name__ == "SGDStep"
    assert h.linear(5)["2.bias"].count == 6 and torch.equal(h.theta(6)["0.bias"], model[0].bias.detach())
    with pytest.raises(RuntimeError, match="backward pass came between"):
        with Recorder(model, [a, b], tmp_path) as r:
            r.batch(ids); backward(model, ids); a.step(); a.zero_grad(); b.zero_grad(); backward(model, ids); b.step()

def test_skipped_steps_are_logged(tmp_path):
    model = mlp()
    opt = OPTIMIZERS["adam"](model.parameters())
    with Recorder(model, opt, tmp_path) as r:
        train(model, opt, r, [torch.tensor([1, 2])])
        r.batch(torch.tensor([3, 4])); backward(model, torch.tensor([3, 4]), float("inf")); opt.zero_grad()       # zeroed before the next batch
        r.batch(torch.tensor([5])); backward(model, torch.tensor([5]), float("inf"))                              # or after
        r.batch(torch.tensor([6, 7])); opt.zero_grad(); backward(model, torch.tensor([6, 7])); opt.step(); opt.zero_grad()
        r.batch(torch.tensor([8])); opt.step()                                                                    # nothing to step with
        r.batch(torch.tensor([9])); backward(model, torch.tensor([9])); opt.zero_grad()                           # at the end
    h = History(tmp_path)
    assert len(h) == 2 and h.ids(1).tolist() == [6, 7] and h.skipped == [[3, 4], [5], [8], [9]]

def test_grad_scaler(tmp_path):
    for fused in (False, True):
        model = mlp()
        opt, scaler = optim.AdamW(model.parameters(), lr=0.01, fused=fused), torch.amp.GradScaler("cpu", init_scale=1024., growth_interval=100)
        with Recorder(model, opt, tmp_path/str(fused)) as r:
            for s, ids in enumerate(batches(4)):
                r.batch(ids, scaler.get_scale() / len(ids))               # the weight of what backward accumulates
                loss = F.cross_entropy(model(X[ids]), Y[ids]) * (float("inf") if s == 1 else 1.)
                scaler.scale(loss).backward()
                if not fused: scaler.unscale_(opt)
                scaler.step(opt); scaler.update(); opt.zero_grad()
        h = History(tmp_path/str(fused))
        assert len(h) == 3 and h.skipped == [batches(4)[1].tolist()]
        assert h.weights(1)[0] * h.scale(1)["0.bias"] == 1/len(h.ids(1))

def test_weights_of_a_loader(tmp_path):
    loader = torch.utils.data.DataLoader(Indexed(torch.utils.data.TensorDataset(X, Y)), batch_size=7, shuffle=True)
    model = mlp()
    opt = OPTIMIZERS["sgd"](model.parameters())
    with Recorder(model, opt, tmp_path) as r:
        for ids, x, y in loader:
            assert torch.equal(X[ids], x)
            r.batch(ids); F.cross_entropy(model(x), y).backward(); opt.step(); opt.zero_grad()
    h = History(tmp_path)
    assert sorted(torch.cat([h.ids(s) for s in range(3)]).tolist()) == list(range(20)) and len(h.ids(2)) == 6
    assert Indexed([5., 6.])[1] == (1, 6.) and len(Indexed([5., 6.])) == 2

def test_cost(tmp_path):
    model = mlp()
    opt = OPTIMIZERS["adam"](model.parameters())
    with Recorder(model, opt, tmp_path) as r: train(model, opt, r, batches(3))
    on_disk = sum(f.stat().st_size for f in tmp_path.glob("*") if f.suffix in (".safetensors", ".jsonl"))
    assert r.cost["steps"] == 3 and 0 < r.cost["seconds"] < 3 and 0.5 * on_disk < r.cost["bytes"] <= on_disk

# --- refusals

def refused(tmp_path, match, error=RuntimeError, model=None, opt=None, loop=None):
    model = model or mlp()
    opt = opt or OPTIMIZERS["adam"](model.parameters())
    with pytest.raises(error, match=match):
        with Recorder(model, opt, tmp_path) as r: (loop or (lambda m, o, r: train(m, o, r, batches(2))))(model, opt, r)

def test_step_without_batch(tmp_path):
    def loop(model, opt, r): backward(model, torch.arange(3)); opt.step()
    refused(tmp_path, "Step 0: .* no batch was announced.* recorder.batch", loop=loop)

def test_batch_outside(tmp_path):
    model = mlp()
    with pytest.raises(RuntimeError, match="outside of the recording"): Recorder(model, OPTIMIZERS["sgd"](model.parameters()), tmp_path).batch([1])

@pytest.mark.parametrize("ids", [torch.tensor([[1]]), torch.tensor(1), torch.tensor([]), torch.tensor([1.5]), torch.tensor([True]), torch.tensor([], dtype=torch.long)])
def test_bad_ids(ids, tmp_path): refused(tmp_path, "1-D tensor of integers", ValueError, loop=lambda m, o, r: r.batch(ids))

def test_more_bad_batches(tmp_path):
    refused(tmp_path/"a", "id -1 is negative", ValueError, loop=lambda m, o, r: r.batch([3, -1]))
    refused(tmp_path/"b", "weight has shape", ValueError, loop=lambda m, o, r: r.batch([3, 1], torch.ones(3)))
    refused(tmp_path/"c", "not finite", ValueError, loop=lambda m, o, r: r.batch([3, 1], float("nan")))

def test_parameters_must_move_by_the_optimizer(tmp_path):
    def ema(model, opt, r):
        train(model, opt, r, batches(2))
        with torch.no_grad(): model[0].bias.mul_(0.9)
        train(model, opt, r, batches(1))
    refused(tmp_path/"a", "Step 2: parameter '0.bias' changed since the step before", loop=ema)
    assert len(History(tmp_path/"a")) == 2
    def unowned(model, opt, r):
        train(model, opt, r, batches(1))
        with torch.no_grad(): model[2].bias.add_(1.)
        train(model, opt, r, batches(1))
    model = mlp()
    refused(tmp_path/"b", "parameter '2.bias' changed, but no step .*group of an optimizer", model=model, opt=optim.SGD(model[0].parameters(), lr=0.1), loop=unowned)
    def behind(model, opt, r):
        train(model, opt, r, batches(1))
        model[2].bias.data.add_(1.)                                       # leaves no trace in the version counter
    model = mlp()
    refused(tmp_path/"c", "parameter '2.bias' changed", model=model, opt=optim.SGD(model[0].parameters(), lr=0.1), loop=behind)
    def touched(model, opt, r):
        train(model, opt, r, batches(1))
        with torch.no_grad(): model[2].bias.mul_(1.)                      # touched, not changed
        train(model, opt, r, batches(1))
    model, opt = mlp(), None
    opt = optim.SGD(model[0].parameters(), lr=0.1)
    with Recorder(model, opt, tmp_path/"d") as r: touched(model, opt, r)

def test_changed_buffer(tmp_path):
    model = mlp()
    model.register_buffer("calls", torch.zeros(()))
    def loop(model, opt, r):
        train(model, opt, r, batches(1))
        model.calls += 1
        train(model, opt, r, batches(1))
    refused(tmp_path, "Step 1: buffer 'calls' changed", model=model, loop=loop)

@pytest.mark.parametrize("layer,match", [(nn.BatchNorm1d(4), "couples the samples.*eval"),
                                         (nn.InstanceNorm1d(4, track_running_stats=True), "running statistics")])
def test_coupling_modules(layer, match, tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), layer)
    refused(tmp_path, f"Module '1' .*{match}", ValueError, model=model)
    with Recorder(model.eval(), OPTIMIZERS["sgd"](model.parameters()), tmp_path): pass

def test_train_mode_later(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    def loop(model, opt, r): model.train(); train(model, opt, r, batches(1))
    refused(tmp_path, "Module '1' .BatchNorm1d. couples", ValueError, model=model, loop=loop)

def test_non_finite(tmp_path):
    def loop(model, opt, r):
        train(model, opt, r, batches(2))
        r.batch([1]); backward(model, torch.tensor([1]), float("nan")); opt.step()
    refused(tmp_path, "Step 2: the gradient or value of parameter '0.weight' is not finite", loop=loop)
    assert len(History(tmp_path)) == 2

def test_unknown_optimizer(tmp_path):
    model = mlp()
    class Mine(optim.Adam): pass
    for opt in (optim.LBFGS(model.parameters()), Mine(model.parameters())):
        with pytest.raises(TypeError, match="supported: SGD, Adam.*register|cannot be explained"): Recorder(model, opt, tmp_path)

def test_modified_optimizer(tmp_path):
    def loop(model, opt, r):
        train(model, opt, r, batches(2))
        opt.state[model[0].weight]["exp_avg"].mul_(2.)
        train(model, opt, r, batches(1))
    refused(tmp_path, "Step 2: the .* of parameter '0.weight' differs from its linear step", loop=loop)
    model = mlp()
    opt = OPTIMIZERS["sgd"](model.parameters())
    opt.register_step_post_hook(lambda *_: model[2].bias.data.add_(0.1))
    refused(tmp_path/"b", "Step 0: the displacement of parameter '2.bias'", model=model, opt=opt)

def test_sparse_gradients(tmp_path):
    model = nn.Sequential(nn.Embedding(20, 2, sparse=True))
    def loop(model, opt, r): r.batch([1]); model(torch.tensor([1])).sum().backward(); opt.step()
    refused(tmp_path, "gradient of '0.weight' is sparse.*sparse=False", model=model, opt=optim.SGD(model.parameters(), lr=0.1), loop=loop)

def test_wrong_owners(tmp_path):
    model = mlp()
    a, b = OPTIMIZERS["sgd"](model.parameters()), OPTIMIZERS["adam"](model[0].parameters())
    refused(tmp_path, "'0.weight' is in two optimizers", ValueError, model=model, opt=[a, b])
    refused(tmp_path, "not among model.named_parameters", ValueError, model=model, opt=OPTIMIZERS["sgd"](mlp().parameters()))

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path): refused(tmp_path, "float32", TypeError, model=mlp(dtype=dtype))

# --- directories

def record(path, n=6, name="adam", model=None):
    model = model or mlp()
    opt = OPTIMIZERS[name](model.parameters())
    with Recorder(model, opt, path) as r: train(model, opt, r, batches(n))
    return model, opt

def test_foreign_directory(tmp_path):
    (tmp_path/"notes.txt").write_text("mine")
    refused(tmp_path, "notes.txt.*new or empty directory", ValueError)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="holds no history"): History(tmp_path)
    with pytest.raises(ValueError, match="holds no history"): History(tmp_path/"nowhere")

def test_other_model(tmp_path):
    record(tmp_path)
    refused(tmp_path, r"it has also \['1.bias'", ValueError, model=nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    refused(tmp_path, r"other shapes than recorded: 0.weight \(5, 3\) \(recorded \(4, 3\)\)", ValueError, model=nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)))
    refused(tmp_path, "recorded with .*float32.*not .*float64", ValueError, model=mlp(dtype=torch.float64))
    model = mlp()
    refused(tmp_path, "recorded with", ValueError, model=model, opt=OPTIMIZERS["sgd"](model.parameters()))
    model = mlp()
    model.register_buffer("mask", torch.ones(2))
    with pytest.raises(ValueError, match="buffers are not"): History(tmp_path).check_model(model)
    History(tmp_path).check_model(mlp(3))

def test_goes_on_only_from_the_end(tmp_path):
    model, opt = record(tmp_path)
    with Recorder(model, opt, tmp_path) as r: train(model, opt, r, batches(2))
    h = History(tmp_path)
    assert len(h) == 8 and h.find(model) == 8
    other = mlp(5)
    refused(tmp_path, "at none of its steps.*restore", ValueError, model=other)
    with torch.no_grad():
        for n, p in other.named_parameters(): p.copy_(h.theta(3)[n])
    refused(tmp_path, "before its step 3.*restore", ValueError, model=other)
    assert h.find(other) == 3
    with torch.no_grad():
        for n, p in other.named_parameters(): p.copy_(h.theta(8)[n])
    refused(tmp_path, "optimizer's state is not.*restore", ValueError, model=other)
    opt = OPTIMIZERS["adam"](other.parameters())
    h.restore(other, opt)
    with Recorder(other, opt, tmp_path) as r: train(other, opt, r, batches(1))
    assert len(History(tmp_path)) == 9 and len(h) == 8
    History(tmp_path).verify()

def test_one_recorder_at_a_time(tmp_path):
    model = mlp()
    with Recorder(model, OPTIMIZERS["sgd"](model.parameters()), tmp_path): refused(tmp_path, "recorded to by another", model=model)

def test_an_attempt_without_a_step_is_begun_again(tmp_path):
    "Also with another network; nothing was recorded that could be lost."
    model = mlp()
    with pytest.raises(RuntimeError, match="no batch was announced"), Recorder(model, opt := OPTIMIZERS["adam"](model.parameters()), tmp_path): backward(model, torch.arange(3)); opt.step()
    other = torch.nn.Linear(5, 3)
    with Recorder(other, torch.optim.SGD(other.parameters(), lr=.1), tmp_path): pass
    with Recorder(fresh := mlp(), opt := OPTIMIZERS["sgd"](fresh.parameters()), tmp_path) as r: train(fresh, opt, r, batches(2))
    assert len(History(tmp_path)) == 2 and all(torch.equal(p, History(tmp_path).theta(2)[n]) for n, p in fresh.named_parameters())


def test_masks_drawn_before_the_batch_is_announced(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(.5), torch.nn.Linear(8, 1))
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    def step(r, early):
        if early: r.batch(torch.arange(3))
        out = model(torch.randn(3, 4)).mean() if early else model(torch.ones(3, 4)).mean()
        if not early: r.batch(torch.arange(3))
        out.backward(); opt.step(); opt.zero_grad()
    with Recorder(model, opt, tmp_path / "early") as r: step(r, True)
    with pytest.raises(RuntimeError, match="'1' is random.*before the forward pass"), Recorder(model, opt, tmp_path / "late") as r: step(r, False)
    opt.zero_grad()
    with Recorder(model.eval(), opt, tmp_path / "eval") as r: step(r, False)


def test_warm_start(tmp_path):
    for name in ("momentum", "adam", "amsgrad", "sgd"):
        model = mlp()
        opt = OPTIMIZERS[name](model.parameters())
        for ids in batches(3): backward(model, ids); opt.step(); opt.zero_grad()
        state = {n: {k: v.clone() for k, v in opt.state.get(p, {}).items()} for n, p in model.named_parameters()}
        with Recorder(model, opt, tmp_path/name) as r: train(model, opt, r, batches(2))
        h = History(tmp_path/name)
        key = {"momentum": "momentum_buffer", "sgd": None}.get(name, "exp_avg")
        assert set(h.state(0)) == (set(h.names) if key else set())
        for n, m in h.state(0).items(): assert torch.equal(m, state[n][key].double())
        if key == "exp_avg": assert h.linear(0)["0.bias"].count == 4
        if key == "momentum_buffer": assert h.linear(0)["0.bias"].count > 1
        fresh = mlp(1)
        other = OPTIMIZERS[name](fresh.parameters())
        h.restore(fresh, other, 0)
        for ids in batches(2): backward(fresh, ids); other.step(); other.zero_grad()
        assert equal(copy(fresh), copy(model))

def test_empty_history(tmp_path):
    model = mlp()
    with Recorder(model, OPTIMIZERS["sgd"](model.parameters()), tmp_path): pass
    h = History(tmp_path)
    assert len(h) == 0 and equal(h.theta(0), copy(model)) and h.state(0) == {}
    h.verify()
    record(tmp_path, model=model, name="sgd")
    assert len(History(tmp_path)) == 6

def test_torn_index(tmp_path, small):
    model, _ = record(tmp_path, 9)
    index = tmp_path/"index.jsonl"
    index.write_bytes(index.read_bytes()[:-20])
    with pytest.warns(UserWarning, match="torn"): h = History(tmp_path)
    assert len(h) == 8
    h.verify()
    other = mlp(1)
    opt = OPTIMIZERS["adam"](other.parameters())
    h.restore(other, opt)
    with pytest.warns(UserWarning, match="torn"):
        with Recorder(other, opt, tmp_path) as r: train(other, opt, r, batches(9)[8:])
    assert len(History(tmp_path)) == 9 and equal(History(tmp_path).theta(9), copy(model))
    History(tmp_path).verify()

def test_damaged_index(tmp_path):
    record(tmp_path)
    index = tmp_path/"index.jsonl"
    lines = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(b"".join(lines[:2] + [b'{"step": \n'] + lines[3:]))
    with pytest.raises(RuntimeError, match="index.jsonl .*line 3 is damaged"): History(tmp_path)
    index.write_bytes(b"".join(lines[:2] + lines[3:]))
    with pytest.raises(RuntimeError, match="does not count its steps"): History(tmp_path)

def test_damaged_data(tmp_path, small):
    record(tmp_path, 9)
    file = sorted(tmp_path.glob("steps-*"))[1]
    data = file.read_bytes()
    file.write_bytes(data[:-50])
    with pytest.raises(RuntimeError, match=f"{file.name} is missing or damaged"): History(tmp_path).theta(5)
    for offset in (60, len(data) - len(data) // 2):
        bad = bytearray(data); bad[-offset] ^= 1
        file.write_bytes(bad)
        with pytest.raises(RuntimeError, match=f"{file.name} .*checksum of step"): History(tmp_path).verify()
    file.unlink()
    h = History(tmp_path)
    assert len(h) == 9 and h.theta(2)
    with pytest.raises(RuntimeError, match="missing or damaged"): h.verify()

def test_leftovers_are_cleaned(tmp_path, small):
    model, opt = record(tmp_path, 4)
    (tmp_path/"partial"/"steps-0000004-0000006.safetensors").write_bytes(b"half")
    (tmp_path/"steps-0000004-0000006.safetensors").write_bytes(b"no lines")
    with Recorder(model, opt, tmp_path): pass
    assert not (tmp_path/"partial").exists() or not list((tmp_path/"partial").iterdir())
    assert not (tmp_path/"steps-0000004-0000006.safetensors").exists()

# --- the background writer

def test_a_slow_disk_keeps_the_order(tmp_path, small, monkeypatch):
    save, rng = history.save_file, random.Random(0)
    monkeypatch.setattr(history, "save_file", lambda *a: (time.sleep(rng.random() * 0.05), save(*a)))
    record(tmp_path, 20)
    steps = [o["step"] for o in read_index(tmp_path/"index.jsonl")[0]]
    assert steps == list(range(-1, 20))
    History(tmp_path).verify()

def test_a_full_disk_surfaces(tmp_path, small, monkeypatch):
    save, calls = history.save_file, []
    def fail(data, tmp):
        calls.append(tmp)
        if len(calls) == 3: raise OSError(28, "No space left on device")
        save(data, tmp)
    monkeypatch.setattr(history, "save_file", fail)
    with pytest.raises(RuntimeError, match="Writing the history .* failed.*No space left"): record(tmp_path, 30)
    h = History(tmp_path)
    assert len(h) == 3                                                    # nothing was written after the gap
    h.verify()

def test_flush_by_time(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "FLUSH_SECONDS", 0.)
    record(tmp_path, 3)
    assert len(list(tmp_path.glob("steps-*"))) == 3

def test_open_while_recording(tmp_path, small):
    model = mlp()
    opt = OPTIMIZERS["momentum"](model.parameters())
    with Recorder(model, opt, tmp_path) as r:
        train(model, opt, r, batches(9))
        while len(History(tmp_path)) < 6: time.sleep(0.01)
        h = History(tmp_path)
        h.verify()
        n = len(h)
        train(model, opt, r, batches(4))
        h.verify()
        assert len(h) == n
    assert len(History(tmp_path)) == 13

@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_loop_is_flushed(error, tmp_path):
    model = mlp()
    opt = OPTIMIZERS["adam"](model.parameters())
    with pytest.raises(error):
        with Recorder(model, opt, tmp_path) as r:
            train(model, opt, r, batches(5))
            raise error
    assert len(History(tmp_path)) == 5
    backward(model, torch.arange(3)); opt.step()                          # the hooks are gone
    assert len(History(tmp_path)) == 5

# --- kills

CONTEXT = multiprocessing.get_context("forkserver")                       # children of a clean process that has imported torch once
CONTEXT.set_forkserver_preload(["torch._dynamo", "pytest"])

def train_on(path, name, stop):
    "Record steps up to `stop`, going on with what is there."
    model, start = mlp(), 0
    opt = OPTIMIZERS[name](model.parameters())
    if began(path):
        start = len(History(path))
        History(path).restore(model, opt)
    with Recorder(model, opt, path) as r: train(model, opt, r, batches(stop)[start:])

def child(path, name, stop, steps_a_file, ready, die_at):
    "The same in a process of its own, which may die at the n-th sync or rename."
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    history.FILE_BYTES, calls = steps_a_file * 4096, itertools.count()
    def deadly(f): return lambda *a: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == die_at else f(*a)
    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
    ready.set()
    train_on(path, name, stop)

def began(path): return (path/"meta.json").exists() and bool(read_index(path/"index.jsonl")[0])

def spawn(path, name, stop, steps_a_file=3, die_at=None):
    ready = CONTEXT.Event()
    process = CONTEXT.Process(target=child, args=(path, name, stop, steps_a_file, ready, die_at))
    process.start()
    ready.wait(60)
    return process

@pytest.mark.filterwarnings("ignore:.*torn")
@pytest.mark.parametrize("name,seed", [("momentum", 0), ("adam", 1), ("amsgrad", 2), ("adam", 3)])
def test_killed_runs_go_on_bitwise(name, seed, tmp_path):
    rng, lengths = random.Random(seed), [0]
    for _ in range(5):
        process = spawn(tmp_path/"killed", name, 3000, rng.choice([1, 3, 10]))
        time.sleep(rng.choice([0.01, 0.1, 0.4]) * rng.random())
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        if not began(tmp_path/"killed"): continue                         # killed while the start was being written
        h = History(tmp_path/"killed")
        h.verify()
        assert len(h) >= lengths[-1]                                      # nothing that was indexed is lost
        lengths.append(len(h))
    stop = lengths[-1] + 10
    for path in (tmp_path/"killed", tmp_path/"whole"): train_on(path, name, stop)
    a, b = History(tmp_path/"killed"), History(tmp_path/"whole")
    assert len(a) == len(b) == stop and equal(a.theta(stop), b.theta(stop))
    assert [a.record(s)["crc32"] for s in range(stop)] == [b.record(s)["crc32"] for s in range(stop)]
    a.verify()

def test_killed_at_every_stage_of_a_write(tmp_path, small):
    record(tmp_path/"whole", 4)
    whole, n = History(tmp_path/"whole"), 0
    while True:                                                           # before each sync and each rename of a whole recording
        path = tmp_path/str(n)
        process = spawn(path, "adam", 4, die_at=n)
        process.join()
        if process.exitcode == 0: break
        found = len(History(path)) if began(path) else 0
        if began(path): History(path).verify()
        train_on(path, "adam", 4)
        h = History(path)
        assert len(h) == 4 and equal(h.theta(4), whole.theta(4)) and found in (0, 3, 4)
        h.verify()
        n += 1
    assert n == 4*4 - 1                                                   # 4 files, each two syncs and a rename, 3 appends

def test_restore_an_earlier_step(tmp_path):
    model, _ = record(tmp_path, 6, "amsgrad")
    h, other = History(tmp_path), mlp(1)
    opt = OPTIMIZERS["amsgrad"](other.parameters())
    h.restore(other, opt, 3)
    assert equal(copy(other), h.theta(3)) and type(opt.state[other[0].weight]["step"]) is torch.Tensor
    for ids in batches(6)[3:]: backward(other, ids); opt.step(); opt.zero_grad()
    assert equal(copy(other), copy(model))
    with pytest.raises(ValueError, match="does not own.*Add their parameter group"): h.restore(mlp(), OPTIMIZERS["amsgrad"](other.parameters()), 3)

@pytest.mark.parametrize("make", [lambda ps: optim.Adagrad(ps, lr=.1, initial_accumulator_value=.1), lambda ps: optim.NAdam(ps, lr=.1), lambda ps: optim.ASGD(ps, lr=.1), lambda ps: optim.Adafactor(ps, lr=.1),
                                  lambda ps: optim.RMSprop(ps, lr=.1, centered=True, momentum=.9), lambda ps: optim.Rprop(ps), lambda ps: optim.Adadelta(ps), lambda ps: optim.RAdam(ps), lambda ps: optim.Adamax(ps)])
@pytest.mark.parametrize("at", [0, 3])
def test_restore_any_optimizer(make, at, tmp_path):
    "From any step on the run is the same, bit by bit."
    model = mlp(); opt = make(model.parameters())
    with Recorder(model, opt, tmp_path/"a") as r: train(model, opt, r, batches(6))
    again = mlp(1); opt = make(again.parameters())
    History(tmp_path/"a").restore(again, opt, step=at)
    with Recorder(again, opt, tmp_path/"b") as r: train(again, opt, r, batches(6)[at:])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))
