"""Which quadrature rule, at equal cost: `python benchmarks/rules.py`. Whole runs of three networks, attribution by step x component; with `DIR/run`, the recorded run of the
paper's network (`explaind_nb --p 113 --seed 3 --out DIR`) instead.

*Passes* are forward / backward passes of the network per step, the one forward that tells the residual included. Cost is in seconds relative to one midpoint node per step. *Residual* is what the rule leaves, the sum over steps
of its magnitude against that of the target's changes. *Share error* is the sum of |share - reference| over steps and components against that of |reference|; the reference is
the midpoint rule with many nodes, in float64. The committed table is in benchmarks/README.md.
"""
import sys
import tempfile
import time
import warnings

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from explaind_nb import History, Recorder, explain
from explaind_nb.modular import ModularTransformer, make_optimizer, modular_pairs, nll

RULES = [("midpoint", 1), ("midpoint", 2), ("midpoint", 4), ("midpoint", 8), ("gauss", 2), ("gauss", 3), ("adaptive", 1), ("secant", 1), ("secant", 2), ("richardson", 1)]


def record(model, optimizer, step, steps):
    path = tempfile.mkdtemp()
    with Recorder(model, optimizer, path) as recorder:
        for s in range(steps):
            ids = step(s)
            recorder.batch(ids); model.loss(ids).backward(); optimizer.step(); optimizer.zero_grad()
    return path


def modular(steps):
    "The paper's network and set-up at p = 23 (ReLU, no norms): the mean validation loss."
    torch.manual_seed(0)
    train, val = modular_pairs(23, 160, 100)
    model = ModularTransformer(23, d_model=64, d_mlp=128)
    model.loss = lambda ids: nll(model, train[ids]).mean()
    path = record(model, make_optimizer(model), lambda s: torch.arange(160), steps)
    return model, path, lambda m: nll(m, val[torch.arange(100)]).mean().reshape(1)


class Cnn(nn.Module):
    "Two convolutions with ReLU and max-pooling on 8 x 8 digits"
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1), nn.Linear(64, 10)
    def forward(self, x): return self.head(F.max_pool2d(self.conv2(F.max_pool2d(self.conv1(x).relu(), 2)).relu(), 2).flatten(1))


def cnn(steps):
    torch.manual_seed(0)
    images, y = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(y)
    model = Cnn(); model.loss = lambda ids: F.cross_entropy(model(x[ids]), y[ids])
    draw = torch.Generator().manual_seed(0)
    path = record(model, torch.optim.AdamW(model.parameters(), lr=3e-3), lambda s: torch.randint(1400, (64,), generator=draw), steps)
    return model, path, lambda m: F.cross_entropy(m(x[1400:1600].to(m.head.weight)), y[1400:1600]).reshape(1)


class Gelu(nn.Module):
    "One pre-norm block, GELU, causal attention; rows of a digit as tokens"
    def __init__(self, d=32):
        super().__init__()
        self.embed, self.place, self.head = nn.Linear(8, d), nn.Parameter(torch.randn(8, d) / 4), nn.Linear(d, 10)
        self.norm1, self.norm2, self.qkv, self.out = nn.LayerNorm(d), nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
    def forward(self, x):
        x = self.embed(x) + self.place
        q, k, v = (o.unflatten(-1, (4, -1)).transpose(1, 2) for o in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.head((x + self.mlp(self.norm2(x))).mean(1))


def gelu(steps):
    torch.manual_seed(0)
    images, y = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 8, 8) / 16, torch.tensor(y)
    model = Gelu(); model.loss = lambda ids: F.cross_entropy(model(x[ids]), y[ids])
    draw = torch.Generator().manual_seed(0)
    path = record(model, torch.optim.AdamW(model.parameters(), lr=3e-3), lambda s: torch.randint(1400, (64,), generator=draw), steps)
    return model, path, lambda m: F.cross_entropy(m(x[1400:1500].to(m.head.weight)), y[1400:1500]).reshape(1)


def paper(run):
    "The paper's network on its recorded run, 200 validation pairs."
    _, val = modular_pairs(113, 4000, 2000)
    return ModularTransformer(113), run, lambda m: nll(m, val[torch.arange(200)]).mean().reshape(1)


def passes(rule, nodes):
    "Forward / backward passes per step."
    return f"{2 * nodes + 1:g} / {nodes:g}" if rule in ("secant", "richardson") else f"{nodes + 1:.3g} / {nodes:.3g}"


def table(name, make, steps, fine):
    model, path, target = make(steps)
    model.__dict__.pop("loss", None)
    def ask(rule, nodes, **kw):
        t = time.perf_counter()
        r = explain(path, model, None, None, target, keep=("step", "component"), step_axis="update", rule=rule, nodes=nodes, progress=False, **kw)
        return r, time.perf_counter() - t
    reference = ask("midpoint", fine, dtype=torch.float64)[0]
    shares = lambda r: r.data + r.decay
    size, change = abs(shares(reference)).sum(), abs(shares(reference).sum("component") + reference.residual).sum()
    ask("midpoint", 1); unit = min(ask("midpoint", 1)[1] for _ in range(2))
    print(f"\n{name}: {steps} steps, reference midpoint {fine}\n\n| rule | nodes | passes | cost | residual | share error |\n|---|---|---|---|---|---|")
    for rule, nodes in RULES:
        r, seconds = ask(rule, nodes)
        print(f"| {rule} | {r.nodes_per_step:.2f} | {passes(rule, r.nodes_per_step)} | {seconds / unit:.1f} | {float(abs(r.quadrature).sum() / change):.1e} | {float(abs(shares(r) - shares(reference)).sum() / size):.1e} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if len(sys.argv) > 1 and sys.argv[1] != "--short":
        table("modular addition, p = 113, ReLU", lambda steps: paper(sys.argv[1]), len(History(sys.argv[1])), 64)
        sys.exit()
    short = "--short" in sys.argv
    table("modular addition, p = 23, ReLU", modular, 20 if short else 400, 8 if short else 64)
    table("CNN, ReLU, max-pooling", cnn, 20 if short else 200, 8 if short else 64)
    table("transformer, GELU, LayerNorm", gelu, 20 if short else 200, 8 if short else 64)
