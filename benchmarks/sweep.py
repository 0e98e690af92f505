"""What recording and the sweep cost, as ratios within one process: `python benchmarks/sweep.py [p] [steps]`.

Against the plain training loop of the same run, and, on a run small enough for it, against the slow reference that carries one gradient
stream per sample forward (the published algorithm). The committed numbers are in benchmarks/README.md.
"""
import sys
import tempfile
import time

import torch

from explaind_nb import Recorder, explain, reconstruct
from explaind_nb.cli import Meter, settings
from explaind_nb.derivation import reference_kernel
from explaind_nb.modular import ModularTransformer, fit, make_optimizer, modular_pairs, nll


def fresh(p, **kwargs):
    torch.manual_seed(0)
    model = ModularTransformer(p, **kwargs)
    return model, make_optimizer(model)


def against_training(p, steps):
    "Recording, attribution (all steps x components x samples) and reconstruction beside the plain loop."
    train, val = modular_pairs(p, *(settings(p)[k] for k in ("n_train", "n_val")))
    every, run = torch.arange(len(val)), tempfile.mkdtemp()
    fit(*fresh(p), train, None, 3)                                                    # warm up
    with Meter() as plain: fit(*fresh(p), train, None, steps)
    model, optimizer = fresh(p)
    with Meter() as recorded, Recorder(model, optimizer, run) as recorder: fit(model, optimizer, train, None, steps, recorder)
    target = lambda net: nll(net, val[every]).mean()
    with Meter() as swept: explain(run, model, train, nll, target, keep=("step", "component", "sample"), rule="midpoint", nodes=1, progress=False)
    with Meter() as unseen: explain(run, model, None, None, target, keep=("step", "component"), rule="midpoint", nodes=1, progress=False)
    with Meter() as unrolled: explain(run, model, train, nll, target, keep=("step", "component", "sample"), sweep="unrolled", progress=False)
    with Meter() as chords: explain(run, model, train, nll, target, keep=("step", "component", "sample"), rule="secant", progress=False)
    with Meter() as forward: reconstruct(run, model, lambda net: net(val.tokens), keep=(), rule="midpoint", nodes=1, progress=False)
    with Meter() as chords_forward: reconstruct(run, model, lambda net: net(val.tokens), keep=(), rule="secant", progress=False)
    print(f"p = {p}, {steps} steps, {len(train)} samples, {torch.get_num_threads()} thread(s); one midpoint node per step\n")
    print("| | ms per step | x training | peak MiB |\n|---|---|---|---|")
    rows = {"training, plain": plain, "training, recorded": recorded, "explain: step x component x sample": swept,
            "the same, secant rule": chords, "the same, unrolled sweep": unrolled, "explain: step x component": unseen,
            "reconstruct: all outputs": forward, "the same, secant rule, float64": chords_forward}
    for name, m in rows.items(): print(f"| {name} | {1e3 * m.seconds / steps:.1f} | {m.seconds / plain.seconds:.2f} | {m.peak:.0f} |")
    print(f"\nrecorder's hooks: {1e3 * recorder.cost['seconds'] / steps:.2f} ms and {recorder.cost['bytes'] / steps / 2**20:.2f} MiB per step\n")


def against_reference(steps=30, samples=60):
    "The sweep beside one gradient stream per sample carried forward, same run, same numbers."
    train, val = modular_pairs(11, samples, 6)
    model, optimizer = fresh(11, d_model=16, d_mlp=32)
    model.double(); batches, run = [torch.randperm(samples) for _ in range(steps)], tempfile.mkdtemp()
    target = lambda net: net(val.tokens[:2]).flatten()[:4]
    start = {k: v.clone() for k, v in model.state_dict().items()}
    t = time.perf_counter(); ref = reference_kernel(model, make_optimizer(model), train, batches, nll, target, nodes=2); slow = time.perf_counter() - t
    model.load_state_dict(start); model.zero_grad(); optimizer = make_optimizer(model)
    with Recorder(model, optimizer, run) as recorder:
        for ids in batches:
            recorder.batch(ids); nll(model, train[ids]).mean().backward(); optimizer.step(); optimizer.zero_grad()
    t = time.perf_counter()
    fast = explain(run, model, train, nll, target, rule="midpoint", nodes=2, progress=False); quick = time.perf_counter() - t
    a, b = torch.tensor(fast.data.transpose("step", "component", "sample", "target").values), ref.kernel.sum(0)[:, [ref.names.index(n) for n in fast.component.values]]
    print(f"slow reference, {samples} samples x {steps} steps x 4 targets: {slow:.2f} s; the sweep: {quick:.2f} s, {slow / quick:.1f} times faster, "
          f"largest difference {(a - b).abs().max() / b.abs().max():.1e} of the largest entry")


if __name__ == "__main__":
    torch.set_num_threads(1)
    against_training(*(int(a) for a in (sys.argv[1:] + ["113", "100"][len(sys.argv) - 1:])))
    against_reference()
