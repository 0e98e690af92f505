"""The secant rule over the whole run of the paper's network: `explaind_nb --p 113 --out DIR`, then `python benchmarks/whole.py DIR/run`.

All log-probabilities of the 2000 validation pairs without a quadrature residual (what is left is the rounding of the float32 steps); by component on some of the steps, beside four midpoint nodes.
"""
import sys
import time

import torch

from explaind_nb import History, reconstruct
from explaind_nb.cli import Meter, quality, settings
from explaind_nb.modular import ModularTransformer, modular_pairs

if __name__ == "__main__":
    torch.set_num_threads(1)
    run, p = sys.argv[1], 113
    _, val = modular_pairs(p, *(settings(p)[k] for k in ("n_train", "n_val")))
    steps, model = len(History(run)), ModularTransformer(p)
    for rule, nodes, window, keep in (("midpoint", 4, (100, 120), ("component",)), ("secant", 1, (100, 120), ("component",)), ("secant", 1, (0, steps), ())):
        t = time.perf_counter()
        with Meter() as m: full = reconstruct(run, model, lambda net: net(val.tokens), keep=keep, rule=rule, nodes=nodes, steps=window, progress=False)
        seconds = (time.perf_counter() - t) / (window[1] - window[0])
        print(f"{rule} {nodes}, steps {window}, {full.sizes.get('component', 1)} component(s): {seconds:.2f} s per step, peak {m.peak:.0f} MiB, largest residual {float(abs(full.residual).max()):.1e}, "
              f"closing error {full.closing_error:.1e}" + (f"; parts without it: {quality(full)}" if window[0] == 0 else ""), flush=True)
