"""Single steps of the paper's network under every rule: `explaind_nb --p 113 --out DIR`, then `python benchmarks/steps.py DIR/run`.

The summed negative log-likelihood of 100 validation points, float64: largest error of a parameter tensor's share against 600 midpoints and, in brackets, what the parts leave of the change.
"""
import sys

import torch

from explaind_nb import History
from explaind_nb.cli import settings
from explaind_nb.graph import trace
from explaind_nb.modular import ModularTransformer, modular_pairs, nll
from explaind_nb.quadrature import line_integral
from explaind_nb.secant import secant

RULES = {"secant 1": dict(nodes=1), "secant 2": dict(nodes=2), "Richardson 1, 2": dict(richardson=True), "midpoint 4": ("midpoint", 4), "midpoint 8": ("midpoint", 8), "Gauss 4": ("gauss", 4)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    history, p = History(sys.argv[1]), 113
    _, val = modular_pairs(p, *(settings(p)[k] for k in ("n_train", "n_val")))
    graph = trace(lambda m: nll(m, val[torch.arange(100)]).sum().reshape(1), ModularTransformer(p))
    print("| step | largest share | " + " | ".join(RULES) + " |\n|" + "---|" * (len(RULES) + 2))
    for s in (0, 20, 300, 713, 1200):
        a, b = ({k: v.double() for k, v in history.theta(i).items()} for i in (s, s + 1))
        change = (graph.values(b) - graph.values(a)).item()
        def shares(phi): return torch.stack([(phi[k] * (b[k] - a[k])).sum() for k in graph.shapes])
        def nodes(rule, n): return line_integral(lambda t: shares(graph.gradients({k: torch.lerp(a[k], b[k], float(t)) for k in a})), rule, n)[0]
        true, row = nodes("midpoint", 600), []
        for how in RULES.values():
            found = nodes(*how) if isinstance(how, tuple) else shares(secant(graph, a, b, **how))
            row.append(f"{(found - true).abs().max():.1e} ({abs(found.sum().item() - change):.0e})")
        print(f"| {s} | {true.abs().max():.2g} | " + " | ".join(row) + " |", flush=True)
