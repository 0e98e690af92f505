"""The paper's network on a GPU: `python benchmarks/gpu.py [steps] [device]`.

Training with and without recording, all log-probabilities by tensor (midpoint 4 beside the secant rule), and the validation loss by window, layer and sample.
"""
import sys
import tempfile
import time
from contextlib import nullcontext

import torch

from explaind_nb import Recorder, explain, reconstruct
from explaind_nb.grokking import layer
from explaind_nb.modular import ModularTransformer, Pairs, make_optimizer, modular_pairs, nll

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 840
DEVICE = torch.device(sys.argv[2] if len(sys.argv) > 2 else "cuda")
train, val = (Pairs(p.tokens.to(DEVICE), p.classes.to(DEVICE)) for p in modular_pairs(113, 4000, 2000))


def timed(name, f, steps):
    "Milliseconds per step, printed."
    sync = torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None
    sync(); t = time.perf_counter()
    out = f()
    sync()
    print(f"{name}: {1e3 * (time.perf_counter() - t) / steps:.1f} ms per step", flush=True)
    return out


def fit(path, steps):
    torch.manual_seed(3)
    model = ModularTransformer(113).to(DEVICE)
    optimizer = make_optimizer(model)
    with Recorder(model, optimizer, path) if path else nullcontext() as recorder:
        for s in range(steps):
            ids = torch.randperm(len(train), generator=torch.Generator().manual_seed(s))
            if recorder: recorder.batch(ids)
            nll(model, train[ids.to(DEVICE)]).mean().backward(); optimizer.step(); optimizer.zero_grad()


if __name__ == "__main__":
    run, net, some = tempfile.mkdtemp(), ModularTransformer(113).to(DEVICE), (STEPS // 8, STEPS // 8 + min(20, STEPS // 2))
    fit(None, 20)
    timed("training, plain", lambda: fit(None, min(STEPS, 200)), min(STEPS, 200))
    timed("training, recorded", lambda: fit(run, STEPS), STEPS)
    for rule, nodes in (("secant", 1), ("midpoint", 1), ("midpoint", 4), ("secant", 1)):      # the first two warm up
        full = timed(f"all log-probabilities by tensor, {rule} {nodes}", lambda: reconstruct(run, net, lambda m: m(val.tokens), keep=("component",), rule=rule, nodes=nodes, steps=some, progress=False), some[1] - some[0])
        print(f"  quadrature {float(abs(full.quadrature).max()):.1e}, largest change {float(abs(full.prediction - full.baseline).max()):.1f}")
    few = torch.arange(200, device=DEVICE)
    for nodes in (1, 4):
        timed(f"mean validation loss by window, layer and sample, midpoint {nodes}", lambda: explain(run, net, train, nll, lambda m: nll(m, val[few]).mean().reshape(1), keep=("sample", "step", "component"), component=layer,
              steps=range(0, STEPS, max(1, STEPS // 20)), rule="midpoint", nodes=nodes, progress=False), STEPS)
