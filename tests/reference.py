"""Readers for the slow reference: the frozen coefficients of every optimizer of torch that steps on dense gradients.

Written from torch's own step functions and independent of `explaind_nb.optimizers`. A reader gets the parameter group, the
optimizer's tensors before and after the step, the parameter before it and the gradient (its sign turned under `maximize`),
all in float64.
"""
import math

import torch
from torch import optim

from explaind_nb.derivation import Frozen


def pull(group, theta): return float(group.get("weight_decay", 0.)) * theta


def decay(group, theta):
    "Where weight decay goes, under the flag that NAdam and RAdam have."
    if group["decoupled_weight_decay"]: return dict(decoupled=-float(group["lr"]) * pull(group, theta))
    return dict(coupled=pull(group, theta))


def ratio(u, m):
    "The diagonal that takes m to u; 0 where m is 0."
    return torch.where(m == 0, 0., u / torch.where(m == 0, 1., m))


def adamax(group, before, after, theta, grad):
    b1, n = group["betas"][0], float(after["step"])
    return Frozen(b1, 1 - b1, float(group["lr"]) / (1 - b1**n) / after["exp_inf"], 0., coupled=pull(group, theta))


def nadam(group, before, after, theta, grad):
    (b1, b2), lr, n = group["betas"], float(group["lr"]), float(after["step"])
    mu, following = (b1 * (1 - .5 * .96**(k * group["momentum_decay"])) for k in (n, n + 1))
    denominator, product = (after["exp_avg_sq"] / (1 - b2**n)).sqrt() + group["eps"], float(after["mu_product"])
    return Frozen(b1, 1 - b1, lr * following / (1 - product * following) / denominator, lr * (1 - mu) / (1 - product) / denominator, **decay(group, theta))


def radam(group, before, after, theta, grad):
    (b1, b2), lr, n = group["betas"], float(group["lr"]), float(after["step"])
    longest = 2 / (1 - b2) - 1
    length = longest - 2 * n * b2**n / (1 - b2**n)
    out = lr / (1 - b1**n)
    if length > 5:
        rectified = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
        out = out * rectified * math.sqrt(1 - b2**n) / (after["exp_avg_sq"].sqrt() + group["eps"])
    return Frozen(b1, 1 - b1, out, 0., **decay(group, theta))


def rmsprop(group, before, after, theta, grad):
    "The preconditioner sits in front of the buffer, if there is one."
    lr, mu, mean = float(group["lr"]), group["momentum"], after["grad_avg"] if group["centered"] else torch.zeros(())
    scale = 1 / ((after["square_avg"] - mean**2).sqrt() + group["eps"])
    return Frozen(mu, scale, lr, 0., coupled=pull(group, theta)) if mu else Frozen(1., 0., 0., lr * scale, coupled=pull(group, theta))


def adagrad(group, before, after, theta, grad):
    rate = float(group["lr"]) / (1 + (float(after["step"]) - 1) * group["lr_decay"])
    return Frozen(1., 0., 0., rate / (after["sum"].sqrt() + group["eps"]), coupled=pull(group, theta))


def adadelta(group, before, after, theta, grad):
    "The accumulator of past displacements is read before the step."
    past = before.get("acc_delta", torch.zeros_like(theta))
    scale = ((past + group["eps"]) / (after["square_avg"] + group["eps"])).sqrt()
    return Frozen(1., 0., 0., float(group["lr"]) * scale, coupled=pull(group, theta))


def asgd(group, before, after, theta, grad):
    "The rate was set at the end of the step before; two decays, one coupled and one not."
    eta = float(before.get("eta", torch.tensor(float(group["lr"]))))     # of torch's default type
    return Frozen(1., 0., 0., eta, coupled=pull(group, theta), decoupled=-group["lambd"] * eta * theta)


def rprop(group, before, after, theta, grad):
    "`prev` holds the gradient that was used: 0 where the sign had turned."
    return Frozen(1., 0., 0., ratio(after["step_size"] * after["prev"].sign(), grad))


def adafactor(group, before, after, theta, grad):
    lr, n, (eps1, eps2) = float(group["lr"]), float(after["step"]), group["eps"]
    eps1 = torch.finfo(group["params"][0].dtype).eps if eps1 is None else eps1
    if grad.dim() > 1:
        row, col = after["row_var"], after["col_var"]
        v = row @ col / row.mean(-2, keepdim=True).clamp(min=eps1)
    else: v = after["variance"]
    scale, root = 1 / v.clamp(min=eps1**2).sqrt(), math.sqrt(theta.numel())
    clip = max(1., ((scale * grad).norm() / (root * group["d"])).item())
    size = max(eps2, theta.norm().item() / root) * min(lr, 1 / math.sqrt(n))
    return Frozen(1., 0., 0., size * scale / clip, decoupled=-lr * pull(group, theta))


def orthogonaliser(x, group):
    "The product of Newton-Schulz polynomials that takes x to its orthogonalised self, acting on the shorter side; norm included."
    a, b, c = group["ns_coefficients"]
    wide = x.shape[0] <= x.shape[1]
    y = x if wide else x.T
    norm = y.norm().clamp(min=group["eps"])
    y, eye = y / norm, torch.eye(len(y), dtype=y.dtype)
    total = eye / norm
    for _ in range(group["ns_steps"]):
        gram = y @ y.T
        polynomial = a * eye + b * gram + c * gram @ gram
        y, total = polynomial @ y, polynomial @ total
    return (lambda rows: total @ rows) if wide else (lambda rows: rows @ total.T)


def muon(group, before, after, theta, grad):
    "torch iterates in bfloat16, and amplifies what that rounds where the matrix has small singular values: nothing to check to."
    mu, lr, (rows, cols) = group["momentum"], float(group["lr"]), theta.shape
    size = dict(original=math.sqrt(max(1, rows / cols)), match_rms_adamw=.2 * math.sqrt(max(rows, cols)))[group["adjust_lr_fn"] or "original"]
    blend = (mu, 1 - mu) if group["nesterov"] else (1., 0.)   # of the buffer and of the gradient
    turn = orthogonaliser(blend[0] * after["momentum_buffer"] + blend[1] * grad, group)
    out, skip = (lambda x, w=w: lr * size * w * turn(x) for w in blend)
    return Frozen(mu, 1 - mu, out, skip, decoupled=-lr * pull(group, theta), slack=100.)


class Lion(optim.Optimizer):
    "Chen et al., arXiv 2302.06675: the sign of one average of the gradients, another one is kept."
    def __init__(self, params, lr, betas=(.9, .99), weight_decay=0.): super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.add_((b1 * m + (1 - b1) * p.grad).sign() + group["weight_decay"] * p, alpha=-group["lr"])
                m.lerp_(p.grad, 1 - b2)


class ScheduleFree(optim.Optimizer):
    "Defazio et al., arXiv 2405.15682, with AdamW's second moment: the gradient is taken at y, between z and its running mean."
    def __init__(self, params, lr, betas=(.9, .99), eps=1e-8, weight_decay=0., warmup_steps=0, r=0., weight_lr_power=2.):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, warmup_steps=warmup_steps, r=r, weight_lr_power=weight_lr_power,
                                      k=0, lr_max=-1., weight_sum=0.))
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (b1, b2), n = group["betas"], group["k"] + 1
            lr = float(group["lr"]) * min(1., n / max(1, group["warmup_steps"]))
            group["lr_max"] = max(lr, group["lr_max"])
            weight = n**group["r"] * group["lr_max"]**group["weight_lr_power"]
            group["k"], group["weight_sum"] = n, group["weight_sum"] + weight
            c = weight / group["weight_sum"] if weight else 0.
            for y in (p for p in group["params"] if p.grad is not None):
                z, v = self.state[y].setdefault("z", y.clone()), self.state[y].setdefault("exp_avg_sq", torch.zeros_like(y))
                v.lerp_(y.grad**2, 1 - b2)
                u = y.grad / ((v / (1 - b2**n)).sqrt() + group["eps"]) + group["weight_decay"] * y
                y.lerp_(z, c).sub_(u, alpha=lr * (1 - b1 * (1 - c)))
                z.sub_(u, alpha=lr)


def lion(group, before, after, theta, grad):
    (b1, b2), lr = group["betas"], float(group["lr"])
    c = b1 * before.get("exp_avg", 0.) + (1 - b1) * grad
    turn = lr * ratio(c.sign(), c)
    return Frozen(b2, 1 - b2, 0., (1 - b1) * turn, early=b1 * turn, decoupled=-lr * pull(group, theta))


def schedule_free(group, before, after, theta, grad):
    "The stream is z - y; read after the step, when the group's sums hold this step's weight. Decay comes behind the preconditioner."
    (b1, b2), n = group["betas"], group["k"]
    lr = float(group["lr"]) * min(1., n / max(1, group["warmup_steps"]))
    weight = n**group["r"] * group["lr_max"]**group["weight_lr_power"]
    c = weight / group["weight_sum"] if weight else 0.
    denominator = (after["exp_avg_sq"] / (1 - b2**n)).sqrt() + group["eps"]
    return Frozen(1 - c, -lr * b1 * (1 - c) / denominator, 0., lr * (1 - b1 * (1 - c)) / denominator, early=-c, coupled=pull(group, theta) * denominator)


READERS = {optim.Adamax: adamax, optim.NAdam: nadam, optim.RAdam: radam, optim.RMSprop: rmsprop, optim.Adagrad: adagrad, optim.Adadelta: adadelta,
           optim.ASGD: asgd, optim.Rprop: rprop, optim.Adafactor: adafactor, optim.Muon: muon, Lion: lion, ScheduleFree: schedule_free}


def clip_norm(limit):
    "The factor of `clip_grad_norm_`, the same for every entry."
    def factors(gradients):
        norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
        return dict.fromkeys(gradients, min(1., limit / (norm + 1e-6)))
    return factors


def clip_value(limit):
    "The factors of `clip_grad_value_`, one for every entry; 1 where the gradient is 0."
    return lambda gradients: {n: torch.where(g == 0, 1., g.clamp(-limit, limit) / torch.where(g == 0, 1., g)) for n, g in gradients.items()}
