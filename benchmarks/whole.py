"""The secant rule over the whole run of the paper's network: `explaind_nb --p 113 --out DIR`, then `python benchmarks/whole.py DIR/run`.

All log-probabilities of the 2000 validation pairs by the network's tensors, without a quadrature residual (what is left is the rounding of the float32 steps): the whole run by the secant rule, one piece a step, saved to DIR/whole.nc.
Before it, on twenty steps: the same beside four midpoint nodes, by tensor and by the paper's six layers.
"""
import sys
import time
from pathlib import Path

import torch

from explaind_nb import History, reconstruct, save
from explaind_nb.cli import Meter, quality
from explaind_nb.modular import ModularTransformer, modular_pairs

LAYERS = {"embed": "embedding", "head_in": "attention in", "head_out": "attention out", "mlp_in": "linear 1", "mlp_out": "linear 2", "unembed": "decoder", "position": "embedding"}


def layer(name, shape):
    "The paper's layers."
    return LAYERS[name.split(".")[0]]


if __name__ == "__main__":
    torch.set_num_threads(1)
    run, p = Path(sys.argv[1]), 113
    _, val = modular_pairs(p, 4000, 2000)
    steps, model = len(History(run)), ModularTransformer(p)
    some = (100, 120)
    for rule, nodes, window, by in (("midpoint", 4, some, "tensor"), ("secant", 1, some, "tensor"), ("midpoint", 4, some, layer), ("secant", 1, some, layer), ("secant", 1, (0, steps), "tensor")):
        t = time.perf_counter()
        with Meter() as m: full = reconstruct(run, model, lambda net: net(val.tokens), keep=("component",), component=by, rule=rule, nodes=nodes, steps=window, progress=False)
        seconds = (time.perf_counter() - t) / (window[1] - window[0])
        whole = window[0] == 0
        print(f"{rule} {nodes}, steps {window}, {full.sizes['component']} components: {seconds:.2f} s per step, peak {m.peak:.0f} MiB, largest quadrature {float(abs(full.quadrature).max()):.1e}, "
              f"rounding {float(abs(full.rounding).max()):.1e}, largest change {float(abs(full.prediction - full.baseline).max()):.1f}, closing error {full.closing_error:.1e}"
              + (f"; parts without the residual: {quality(full)}" if whole else ""), flush=True)
        if whole: save(full.astype("float32"), run.parent/"whole.nc")
