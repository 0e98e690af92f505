"""The small zoo of models, losses and data that the engines and the kernel are tested on, in float64, and the slow reference.

`ZOO[name]` is a `Case`: `make()` gives the model, always with the same numbers; `data[ids]` a batch; `loss(model, batch)`
one loss per sample; `target(model)` a few numbers [T] to explain.
"""
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

M, VOCAB, CLASSES = 12, 9, 4  # samples, tokens of a vocabulary, classes


class Case(NamedTuple):
    name: str
    make: Callable    # () -> model
    data: object      # data[ids] -> batch
    loss: Callable    # (model, batch) -> Tensor [B]
    target: Callable  # model -> Tensor [T]


class Samples:
    "Tensors with the sample axis in front, as a tuple batch, or a dict batch when they are named"
    def __init__(self, *tensors, **named): self.tensors, self.named = tensors, named
    def __len__(self): return len((*self.tensors, *self.named.values())[0])
    def __getitem__(self, ids):
        return {k: x[ids] for k, x in self.named.items()} if self.named else tuple(x[ids] for x in self.tensors)
    def to(self, device): return Samples(*(x.to(device) for x in self.tensors), **{k: x.to(device) for k, x in self.named.items()})


def noise(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
def integers(seed, high, *shape): return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def cross_entropy(model, batch):
    "The mean over the positions of a sample, if there are any"
    x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
    out = F.cross_entropy(model(x).reshape(-1, CLASSES), y.reshape(-1), reduction="none")
    return out.reshape(len(y), -1).mean(1)


def squared_error(model, batch):
    x, y = batch
    return (model(x) - y).flatten(1).square().sum(1)


def first_logits(x):
    "A target: the mean outputs of three inputs of their own"
    return lambda model: model(x.to(next(model.parameters()).device)).reshape(len(x), -1)[:, :2].mean(1)


class Mlp(nn.Module):
    def __init__(self, act, bias=True):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 7, bias=bias), act, nn.Linear(7, 6), nn.ReLU(inplace=True),
                                  nn.Linear(6, CLASSES))
    def forward(self, x): return self.body(x)


class Cnn(nn.Module):
    def __init__(self, norm=lambda: nn.GroupNorm(2, 6)):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(2, 6, 3, padding=1), norm()
        self.conv2 = nn.Conv2d(6, 4, 3, stride=2, groups=2, padding_mode="circular", padding=1)
        self.head = nn.Linear(4, CLASSES)
    def forward(self, x):
        x = F.relu(self.norm(self.conv1(x)), inplace=True)
        return self.head(F.relu_(self.conv2(x)).mean((2, 3)))


class Pooled(nn.Module):
    "SiLU, max pooling with overlap, average pooling, adaptive max pooling"
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 4, 2), nn.Linear(4, CLASSES)
    def forward(self, x):
        x = F.max_pool2d(F.silu(self.conv1(x)), 3, stride=1)
        return self.head(F.adaptive_max_pool2d(F.avg_pool2d(self.conv2(x), 2, stride=1).tanh(), 1).flatten(1))


class Signal(nn.Module):
    "Conv1d, ConvTranspose1d and RMSNorm, the norm over two axes"
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, dilation=2)
        self.up = nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1, output_padding=1, groups=2)
        self.norm, self.head = nn.RMSNorm((6, 9)), nn.Linear(54, CLASSES)
    def forward(self, x): return self.head(self.norm(self.up(torch.tanh(self.conv(x)))).flatten(1))


class Volume(nn.Module):
    "Conv3d, ConvTranspose2d and 3d"
    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv3d(1, 2, 2), nn.ConvTranspose3d(2, 3, 2, bias=False)
        self.flat, self.head = nn.ConvTranspose2d(3, 2, (2, 1), stride=(1, 2), dilation=2), nn.Linear(2, CLASSES)
    def forward(self, x): return self.head(self.flat(self.up(torch.tanh(self.conv(x))).mean(2)).tanh().mean((2, 3)))


class Block(nn.Module):
    "Pre-norm attention and MLP, two heads, queries, keys and values as separate layers"
    def __init__(self, d=6):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(d, 10), nn.GELU(), nn.Linear(10, d))
    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (w(h).unflatten(-1, (2, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    "Tokens [B, S] to class scores at every position, or to scores of the next token with the embedding as unembedding"
    def __init__(self, tied=None, block=Block, positions="batch"):
        super().__init__()
        self.tied, self.positions = tied, positions
        self.embed, self.place = nn.Embedding(VOCAB, 6, padding_idx=0), nn.Embedding(5, 6)
        self.block, self.norm = block(), nn.LayerNorm(6)
        self.head = nn.Linear(6, CLASSES if tied is None else VOCAB, bias=False) if tied != "functional" else None
        if tied == "layer": self.head.weight = self.embed.weight
    def forward(self, x):
        at = torch.arange(x.shape[1], device=x.device)
        if self.positions == "batch": at = at.expand(len(x), -1)
        h = self.norm(self.block(self.embed(x) + self.place(at)))
        return self.head(h) if self.head else F.linear(h, self.embed.weight)


class Attention(nn.Module):
    "A block around `nn.MultiheadAttention`, whose output projection is a module that nobody calls"
    def __init__(self, batch_first=True):
        super().__init__()
        self.attention, self.mlp = nn.MultiheadAttention(6, 2, batch_first=batch_first), nn.Linear(6, 6)
        self.batch_first = batch_first
    def forward(self, x):
        if not self.batch_first: x = x.transpose(0, 1)
        x = x + self.mlp(x + self.attention(x, x, x)[0])
        return x if self.batch_first else x.transpose(0, 1)


class Cross(nn.Module):
    "Attention of queries to other keys and values, with widths of their own, so that `nn.MultiheadAttention` keeps three matrices"
    def __init__(self):
        super().__init__()
        self.key, self.value, self.head = nn.Linear(5, 3), nn.Linear(5, 4), nn.Linear(6, CLASSES)
        self.query = nn.Parameter(torch.randn(2, 5, 6))
        self.attention = nn.MultiheadAttention(6, 2, kdim=3, vdim=4, batch_first=True, add_bias_kv=True)
        self.lift = nn.Linear(5, 6)
    def forward(self, x):
        q = self.lift(x[:, :2]) + self.query[:, :1].transpose(0, 1)
        return self.head(self.attention(q, self.key(x), self.value(x))[0].tanh().mean(1))


class CrossPacked(nn.Module):
    "Attention with one packed matrix for three different inputs, or two: its blocks of rows; sequence first"
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(5, 1), nn.Linear(5, CLASSES)
    def forward(self, x):
        x = x.transpose(0, 1)                                             # [S, B, d]
        h = self.attention(x[:2], x.cumsum(0), x)[0]
        return self.head(self.attention(h, x.tanh(), x.tanh())[0].sum(0).tanh())


class Adapted(nn.Module):
    "A frozen layer with low-rank adapters, as raw parameters used by `@` and by `F.linear`, one of them zero at the start"
    def __init__(self):
        super().__init__()
        self.base, self.head = nn.Linear(5, 6).requires_grad_(False), nn.Linear(6, CLASSES).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(6, 2))
        self.c, self.d = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.zeros(CLASSES, 2))
    def forward(self, x):
        h = torch.tanh(self.base(x) + x @ self.a.T @ self.b.T)            # [B, S, 6]
        return (self.head(h) + F.linear(h @ self.c, self.d)).mean(1)


class Parametrized(nn.Module):
    "Weights that are computed from other parameters"
    def __init__(self):
        super().__init__()
        p = nn.utils.parametrizations
        self.normed, self.conv = p.weight_norm(nn.Linear(5, 6)), p.weight_norm(nn.Conv1d(6, 5, 2))
        self.spectral = p.spectral_norm(nn.Linear(5, 6)).eval()           # in train mode it iterates
        self.rotation, self.head = p.orthogonal(nn.Linear(6, 6)), nn.Linear(6, CLASSES)
    def forward(self, x):
        x = self.conv(torch.tanh(self.normed(x)).transpose(1, 2)).tanh().mean(2)
        return self.head(self.rotation(self.spectral(x).tanh()).tanh())


class Twice(nn.Module):
    "One layer used three times, once on rows flattened to [B * S, d]; in-place changes of its output, a view"
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, CLASSES)
    def forward(self, x):
        x = self.layer(F.relu(self.layer(x), inplace=True))
        x += 1
        x = torch.tanh(x)
        return self.head(self.layer(x.flatten(0, 1)).view_as(x).mean(1))


class Raw(nn.Module):
    "Parameters of its own, a scalar gain among them, and one that nothing uses"
    def __init__(self):
        super().__init__()
        self.w, self.gain = nn.Parameter(torch.randn(7, 5) / 2), nn.Parameter(torch.tensor(0.7))
        self.unused = nn.Parameter(torch.randn(3))
        self.head = nn.Linear(7, CLASSES)
    def forward(self, x): return self.head(self.gain * torch.tanh(F.linear(x, self.w)))


class SequenceFirst(nn.Module):
    "Hidden states [S, B, d]: the batch axis is not in front"
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, CLASSES)
    def forward(self, x): return self.head(torch.tanh(self.inner(x.transpose(0, 1))).cumsum(0)[-1])


class Recurrent(nn.Module):
    def __init__(self, layer=nn.LSTM, width=4, **kw):
        super().__init__()
        self.rnn, self.head = layer(5, 4, batch_first=True, **kw), nn.Linear(width, CLASSES)
    def forward(self, x): return self.head(self.rnn(x)[0][:, -1])


def frozen_batch_norm():
    m = nn.BatchNorm2d(6).eval()
    m.running_mean.normal_(); m.running_var.uniform_(0.5, 2)
    return m


norms = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm2d)


def _make(build, seed):
    def make():
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = build().double()
            for p in (p for m in model.modules() if isinstance(m, norms) for p in m.parameters()):
                nn.init.normal_(p, 0.8, 0.4)  # gains and biases away from 1 and 0, where mistakes hide
            return model
    return make


def next_token(model, batch):
    "Mean negative log-likelihood of the following token over the tokens that are not padding"
    x = batch["x"]
    out = F.cross_entropy(model(x[:, :-1]).transpose(1, 2), x[:, 1:], reduction="none")
    keep = (x[:, 1:] != 0).double()
    return (out * keep).sum(1) / keep.sum(1).clamp(min=1)


def _cases():
    vectors, images, sequences = noise(1, M, 5), noise(2, M, 2, 6, 6), noise(3, M, 5, 5)
    signals, volumes, tokens = noise(4, M, 2, 8), noise(5, M, 1, 3, 3, 3), integers(6, VOCAB, M, 5)
    y, y_each = integers(7, CLASSES, M), integers(8, CLASSES, M, 5)
    vec, img, seq, sig, vol = (Samples(x, y) for x in (vectors, images, sequences, signals, volumes))
    tok, text = Samples(x=tokens, y=y_each), Samples(x=tokens)
    def case(name, build, data, loss=cross_entropy, probe=None):
        return Case(name, _make(build, len(name)), data, loss, first_logits(probe))
    v, i, s, t = noise(11, 3, 5), noise(12, 3, 2, 6, 6), noise(13, 3, 5, 5), integers(16, VOCAB, 3, 5)
    return [
        case("mlp tanh", lambda: Mlp(nn.Tanh()), Samples(x=vectors, y=y), probe=v),
        case("mlp in-place relu", lambda: Mlp(nn.ReLU(inplace=True), bias=False), vec, probe=v),
        case("mlp regression", lambda: Mlp(nn.Tanh()), Samples(vectors, noise(9, M, CLASSES)), squared_error, v),
        case("cnn groupnorm", Cnn, img, probe=i),
        case("cnn frozen batchnorm", lambda: Cnn(frozen_batch_norm).eval(), img, probe=i),
        case("cnn pooling silu", Pooled, img, probe=i),
        case("conv1d rmsnorm", Signal, sig, probe=noise(14, 3, 2, 8)),
        case("conv3d", Volume, vol, probe=noise(15, 3, 1, 3, 3, 3)),
        case("transformer", Transformer, tok, probe=t),
        case("transformer positions without batch", lambda: Transformer(positions="shared"), tok, probe=t),
        case("tied layer", lambda: Transformer("layer"), text, next_token, t),
        case("tied functional", lambda: Transformer("functional"), text, next_token, t),
        case("multihead attention", lambda: Transformer(block=Attention), tok, probe=t),
        case("attention sequence first", lambda: Transformer(block=lambda: Attention(False)), tok, probe=t),
        case("cross attention", Cross, seq, probe=s),
        case("cross attention packed", CrossPacked, seq, probe=s),
        case("parametrized", Parametrized, seq, probe=s),
        case("low-rank adapters", Adapted, seq, probe=s),
        case("used twice", Twice, seq, probe=s),
        case("raw parameters", Raw, vec, probe=v),
        case("sequence first", SequenceFirst, seq, probe=s),
        case("lstm", Recurrent, seq, probe=s),
        case("gru both ways", lambda: Recurrent(nn.GRU, 8, bidirectional=True), seq, probe=s),
        case("rnn two layers", lambda: Recurrent(nn.RNN, num_layers=2), seq, probe=s),
    ]


ZOO = {case.name: case for case in _cases()}


def sample_gradients(model, loss, data, ids):
    "The obviously right way: one backward pass per sample; {name: [B, *shape]} of what is not frozen"
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    out = {n: [] for n in params}
    for k in ids[:, None]:
        grads = torch.autograd.grad(loss(model, data[k]).sum(), list(params.values()), allow_unused=True)
        for (n, p), g in zip(params.items(), grads): out[n].append(torch.zeros_like(p) if g is None else g)
    return {n: torch.stack(g) for n, g in out.items()}


def slow_scores(model, loss, data, comps, ids, weights, psi):
    "Scores [T, C, B] from single-sample gradients, entry by entry"
    grads = sample_gradients(model, loss, data, ids)
    out = torch.zeros(len(next(iter(psi.values()))), len(comps), len(ids), dtype=torch.float64)
    for n, p in psi.items():
        label = comps.index[n]
        for t in range(len(p)):
            for k in range(len(ids)):
                x = weights[k] * grads[n][k] * p[t]
                if isinstance(label, int): out[t, label, k] += x.sum()
                else:
                    for row, c in enumerate(label.tolist()): out[t, c, k] += x[row].sum()
    return out
