"The slow reference adds up for every optimizer it knows, and gives the known answer in planted cases."
import copy

import pytest
import torch
from fastcore.test import test_close as close
from fastcore.test import test_eq as equal
from torch import nn
from torch.optim import SGD, Adam, AdamW

from reference import READERS, ScheduleFree, clip_norm, clip_value
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import explaind_nb.derivation as derivation
from explaind_nb.derivation import reference_kernel, reference_run

M = 9
UNEQUAL = [[1, 2, 3, 4], [5, 6], [7, 8, 1, 1], [3], [4, 2, 6]]


class TwoHeads(nn.Module):
    "A body and two heads; a batch goes through head b only if one of its samples asks for it."
    def __init__(self, act=nn.Tanh):
        super().__init__()
        self.body, self.a, self.b = nn.Sequential(nn.Linear(3, 4), act()), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x, both=True):
        h = self.body(x)
        return self.a(h) + self.b(h) if both else self.a(h)


def make(seed=0, act=nn.Tanh):
    torch.manual_seed(seed)
    return TwoHeads(act).double()


def make_data(seed=1):
    torch.manual_seed(seed)
    return torch.utils.data.TensorDataset(torch.randn(M, 3).double(), torch.randint(2, (M,)), torch.ones(M, dtype=bool))


def loss(model, batch):
    x, y, both = batch
    return nn.functional.cross_entropy(model(x, bool(both.any())), y, reduction="none")


def target(model):
    x = torch.linspace(-1, 1, 6).double().reshape(2, 3)
    return torch.cat([model(x)[:, 0], model(x).logsumexp(1).mean()[None]])


def tensors(batches): return [torch.tensor(b) for b in batches]


def explained(optimizer_class=AdamW, batches=UNEQUAL, data=None, model=None, optimizer=None, **kw):
    hyper = {k: kw.pop(k) for k in list(kw) if k not in ("nodes", "weights", "schedule", "readers", "transform", "average")}
    model = model or make()
    optimizer = optimizer or optimizer_class(model.parameters(), **hyper)
    return reference_kernel(model, optimizer, data or make_data(), tensors(batches), loss, target, **kw)


def adds_up(ref, eps=1e-12):
    "The parts make the prediction, both step axes make the same totals, and nothing acts before it was seen."
    close(sum(ref.parts().values()), ref.prediction, eps)
    close(ref.rounding.abs().max().item(), 0., eps)
    close(ref.decay.sum(0), ref.decay_gradient.sum(0), eps)
    S = len(ref.kernel)
    assert ref.kernel[torch.triu(torch.ones(S, S, dtype=torch.bool), 1)].eq(0).all()


ZOO = {
    "sgd": (SGD, dict(lr=.1)),
    "sgd_decay": (SGD, dict(lr=.1, weight_decay=.2)),
    "sgd_tensor_lr": (SGD, dict(lr=torch.tensor(.1, dtype=torch.float64), momentum=.9)),
    "momentum": (SGD, dict(lr=.1, momentum=.9, weight_decay=.2)),
    "dampening": (SGD, dict(lr=.1, momentum=.9, dampening=.5, weight_decay=.2)),
    "nesterov": (SGD, dict(lr=.1, momentum=.9, nesterov=True, weight_decay=.2)),
    "sgd_maximize": (SGD, dict(lr=.1, momentum=.9, dampening=.5, weight_decay=.2, maximize=True)),
    "adam": (Adam, dict(lr=.02)),
    "adam_l2": (Adam, dict(lr=.02, weight_decay=.2)),
    "adam_amsgrad": (Adam, dict(lr=.02, weight_decay=.2, amsgrad=True, betas=(.8, .5))),
    "adam_decoupled": (Adam, dict(lr=.02, weight_decay=.2, decoupled_weight_decay=True)),
    "adam_maximize": (Adam, dict(lr=.02, weight_decay=.2, maximize=True)),
    "adamw": (AdamW, dict(lr=.02, weight_decay=.5)),
    "adamw_no_decay": (AdamW, dict(lr=.02, weight_decay=0.)),
    "adamw_amsgrad": (AdamW, dict(lr=.02, weight_decay=.5, amsgrad=True, betas=(.8, .5))),
    "adamw_maximize": (AdamW, dict(lr=.02, weight_decay=.5, maximize=True)),
}
every_optimizer = pytest.mark.parametrize("optimizer_class, hyper", ZOO.values(), ids=ZOO)


@every_optimizer
def test_parts_add_up(optimizer_class, hyper):
    ref = explained(optimizer_class, **hyper)
    adds_up(ref)
    equal(tuple(ref.kernel.shape), (5, 5, 6, M, 3))
    equal(ref.initial.abs().max().item(), 0.)
    equal(ref.names, [n for n, _ in make().named_parameters()])
    assert ref.kernel.abs().max() > 1e-4


@every_optimizer
def test_training_is_torchs_own(optimizer_class, hyper):
    ref, model = explained(optimizer_class, **hyper), make()
    optimizer, data = optimizer_class(model.parameters(), **hyper), make_data()
    for ids in tensors(UNEQUAL):
        optimizer.zero_grad()
        loss(model, data[ids]).mean().backward()
        optimizer.step()
    for n, p in model.named_parameters(): close(p.detach(), ref.thetas[-1][n], 1e-12)
    close(target(model).detach(), ref.prediction, 1e-12)


@every_optimizer
def test_warm_start(optimizer_class, hyper):
    "Explained in two halves, the second with a warm optimizer, the run is the same run."
    whole, model = explained(optimizer_class, **hyper), make()
    optimizer = optimizer_class(model.parameters(), **hyper)
    first = explained(batches=UNEQUAL[:2], model=model, optimizer=optimizer)
    second = explained(batches=UNEQUAL[2:], model=model, optimizer=optimizer)
    adds_up(first), adds_up(second)
    close(second.prediction, whole.prediction, 1e-13)
    close(second.kernel, whole.kernel[2:, 2:], 1e-13)
    late = whole.kernel[2:, :2].sum((0, 1, 3))   # what the first half still moved in the second
    if whole.decay.equal(whole.decay_gradient): close(second.initial, late, 1e-13)
    else: assert (second.initial - late).abs().max() > 1e-6   # coupled decay sits in the buffer too


@every_optimizer
def test_parameter_without_gradient_is_not_stepped(optimizer_class, hyper):
    "Head b gets no gradient at steps 0 and 2: no movement, no decay, and its buffer opens at step 1."
    data = make_data()
    data.tensors[2][:] = False
    data.tensors[2][[5, 6]] = True
    ref = explained(optimizer_class, [[1, 2, 3], [5, 6], [7, 8], [6, 5], [5]], data, **hyper)
    adds_up(ref)
    b = [i for i, n in enumerate(ref.names) if n.startswith("b.")]
    for s in (0, 2):
        equal(ref.kernel[s][:, b].abs().max().item() + ref.decay[s][b].abs().max().item(), 0.)
        equal(ref.decay_gradient[s][b].abs().max().item(), 0.)
        assert all(ref.thetas[s][ref.names[c]].equal(ref.thetas[s + 1][ref.names[c]]) for c in b)
    assert ref.kernel[1][:, b].abs().max() > 1e-5


@every_optimizer
def test_learning_rate_zero(optimizer_class, hyper):
    model = make()
    optimizer = optimizer_class(model.parameters(), **hyper)
    def schedule(s): optimizer.param_groups[0]["lr"] = 0. if s == 2 else .05
    ref = explained(model=model, optimizer=optimizer, schedule=schedule)
    adds_up(ref)
    equal(ref.kernel[2].abs().max().item() + ref.decay[2].abs().max().item(), 0.)
    remembers = optimizer_class is not SGD or hyper.get("momentum")
    equal(ref.kernel[:, 2].abs().max().item() > 1e-6, bool(remembers))


def test_parameter_groups_and_frozen_parameters():
    model = make()
    model.a.bias.requires_grad_(False)
    groups = [dict(params=model.body.parameters(), lr=.01, weight_decay=0.),
              dict(params=[model.a.weight, model.a.bias], lr=.1, weight_decay=.5)]   # head b: no optimizer owns it
    ref = explained(model=model, optimizer=AdamW(groups))
    adds_up(ref)
    still = [i for i, n in enumerate(ref.names) if n.startswith("b.") or n == "a.bias"]
    equal(ref.kernel[:, :, still].abs().max().item() + ref.decay[:, still].abs().max().item(), 0.)
    decayed = [n for n, d in zip(ref.names, ref.decay.abs().amax((0, 2))) if d > 0]
    equal(decayed, ["a.weight"])


def test_never_seen_sample_gets_nothing(): equal(explained().kernel[:, :, :, 0].abs().max().item(), 0.)


def test_duplicated_sample_splits_evenly():
    "Two ids with the same content, always together, share what one id with twice the weight gets."
    data = make_data()
    for t in data.tensors: t[2] = t[1]
    both = explained(batches=[[1, 2, 3], [1, 2, 4], [5, 6]], data=data, lr=.02)
    close(both.kernel[:, :, :, 1], both.kernel[:, :, :, 2], 1e-15)
    once = explained(batches=[[1, 3], [1, 4], [5, 6]], data=data, lr=.02,
                     weights=[torch.tensor([2., 1.]).double()/3]*2 + [torch.ones(2)/2])
    close(once.kernel[:, :, :, 1], 2*both.kernel[:, :, :, 1], 1e-14)
    repeat = explained(batches=[[1, 1, 3], [1, 1, 4], [5, 6]], data=data, lr=.02)
    close(repeat.kernel, once.kernel, 1e-14)


def test_swapped_ids_swap_columns():
    data, swapped = make_data(), make_data()
    for t, u in zip(data.tensors, swapped.tensors): u[[4, 7]] = t[[7, 4]]
    batches = [[{4: 7, 7: 4}.get(k, k) for k in b] for b in UNEQUAL]
    one, two = explained(data=data, lr=.02), explained(data=swapped, batches=batches, lr=.02)
    order = [0, 1, 2, 3, 7, 5, 6, 4, 8]
    close(one.kernel, two.kernel[:, :, :, order], 1e-14)


def test_order_within_a_batch_does_not_matter():
    one = explained(batches=[range(M)]*3, lr=.02)
    two = explained(batches=[torch.randperm(M).tolist() for _ in range(3)], lr=.02)
    close(one.kernel, two.kernel, 1e-12)


def test_sample_of_weight_zero_gets_nothing():
    ref = explained(batches=[[1, 2, 3]]*3, lr=.02, weights=[torch.tensor([.5, 0., .5])]*3)
    equal(ref.kernel[:, :, :, 2].abs().max().item(), 0.)
    adds_up(ref)


EIGHT = [[1, 2, 3, 4], [5, 6], [7, 8, 1, 1], [3], [4, 2, 6], [1, 5], [8, 8, 2], [3, 6]]
OTHERS = [c for c in READERS if c not in (torch.optim.Muon, ScheduleFree)]   # one rounds to bfloat16, the linear state of the other is no tensor of its own


@pytest.mark.parametrize("optimizer_class", OTHERS, ids=lambda c: c.__name__)
def test_readers_of_other_optimizers(optimizer_class):
    "Cold and warm; a wrong coefficient would be refused at its step."
    hyper = {} if optimizer_class is torch.optim.Rprop else dict(weight_decay=.2)
    model = make()
    optimizer = optimizer_class(model.parameters(), lr=.02, **hyper)
    whole = explained(optimizer_class, EIGHT, lr=.02, readers=READERS, **hyper)
    first, second = (explained(batches=b, model=model, optimizer=optimizer, readers=READERS) for b in (EIGHT[:4], EIGHT[4:]))
    for ref in (whole, first, second): adds_up(ref)
    close(second.kernel, whole.kernel[4:, 4:], 1e-13)
    assert whole.kernel.abs().max() > 1e-5


def train(optimizers, model, data, batches=EIGHT, between=lambda model: None, after=lambda model: None):
    "The user's loop, with something between backward and step and something after the step."
    for ids in tensors(batches):
        loss(model, data[ids]).mean().backward()
        between(model)
        for o in optimizers: o.step(); o.zero_grad()
        after(model)
    return model


@pytest.mark.parametrize("factors, clip", [(clip_norm(.3), lambda m: nn.utils.clip_grad_norm_(m.parameters(), .3)),
                                           (clip_value(.05), lambda m: nn.utils.clip_grad_value_(m.parameters(), .05))], ids=["norm", "value"])
def test_clipping_is_a_frozen_factor(factors, clip):
    ref, model, data = explained(SGD, EIGHT, lr=.1, momentum=.9, weight_decay=.1, transform=factors), make(), make_data()
    adds_up(ref)
    model = train([SGD(model.parameters(), lr=.1, momentum=.9, weight_decay=.1)], model, data, between=clip)
    close(target(model).detach(), ref.prediction, 1e-13)
    free = explained(SGD, EIGHT, lr=.1, momentum=.9, weight_decay=.1)
    assert (free.prediction - ref.prediction).abs().max() > .1


def test_several_optimizers():
    split = lambda m: [SGD(m.body.parameters(), lr=.1, momentum=.9), AdamW(list(m.a.parameters()) + list(m.b.parameters()), lr=.02)]
    model = make()
    ref = explained(model=model, optimizer=split(model), batches=EIGHT)
    adds_up(ref)
    model = make()
    close(target(train(split(model), model, make_data())).detach(), ref.prediction, 1e-13)


@every_optimizer
def test_frozen_and_thawed(optimizer_class, hyper):
    "Head a is frozen for the first two steps, the body for the last two."
    model = make()
    def schedule(s):
        model.a.requires_grad_(s >= 2)
        model.body.requires_grad_(s < 3)
    ref = explained(model=model, optimizer=optimizer_class(model.parameters(), **hyper), schedule=schedule)
    adds_up(ref)
    a, body = ([i for i, n in enumerate(ref.names) if n.startswith(o)] for o in ("a.", "body."))
    equal(ref.kernel[:2][:, :, a].abs().max().item() + ref.decay[:2][:, a].abs().max().item(), 0.)
    equal(ref.kernel[3:][:, :, body].abs().max().item() + ref.decay[3:][:, body].abs().max().item(), 0.)
    assert ref.kernel[2:][:, :, a].abs().max() > 1e-6 and ref.kernel[:3][:, :, body].abs().max() > 1e-6
    assert [p.requires_grad for p in model.parameters()] == [False]*2 + [True]*4


@every_optimizer
def test_averaged_weights(optimizer_class, hyper):
    "An average with all rates 1 is the iterate; torch's moving average is the one that is explained."
    plain, same = (explained(optimizer_class, average=a, **hyper) for a in (None, [1.]*5))
    close(same.kernel, plain.kernel, 1e-13)
    rates = [1., 1., .25, .25, .25]   # torch: the first update copies, and we are slow to begin
    ref, model = explained(optimizer_class, average=rates, **hyper), make()
    adds_up(ref)
    mean, count = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(.75)), iter(range(5))
    train([optimizer_class(model.parameters(), **hyper)], model, make_data(), UNEQUAL, after=lambda m: next(count) and mean.update_parameters(m))
    close(target(mean.module).detach(), ref.prediction, 1e-13)


def test_averaged_weights_by_hand():
    "Without momentum a gradient's share in the last average is the sum of the weights of the later iterates."
    linear = lambda model: torch.cat([p.flatten() for p in model.parameters()])[:3]
    rates, model = [.5, 0., .3, 1., .2], make()
    ref = reference_kernel(model, SGD(model.parameters(), lr=.1), make_data(), tensors(UNEQUAL), loss, linear, average=rates)
    plain = reference_kernel((model := make()), SGD(model.parameters(), lr=.1), make_data(), tensors(UNEQUAL), loss, linear)
    weights = torch.tensor([r*torch.tensor([1 - q for q in rates[s + 1:]]).prod() for s, r in enumerate(rates)])   # of the iterates s + 1
    arrived = weights.flip(0).cumsum(0).flip(0).double()
    close(ref.kernel.sum(0), arrived[:, None, None, None]*plain.kernel.sum(0), 1e-6)


def test_samples_fill_torchs_buffer():
    "The recorded gradients of the samples, filtered by hand, are the buffer that torch holds at the end."
    model = make()
    optimizer = SGD(model.parameters(), lr=.1, momentum=.9, dampening=.3)
    run = reference_run(model, optimizer, make_data(), tensors(UNEQUAL), loss)
    for n, p in model.named_parameters():
        buffer = 0.
        for s, step in enumerate(run.steps): buffer = .9*buffer + (1. if s == 0 else .7)*step.gradients[n].sum(0)
        close(buffer, optimizer.state[p]["momentum_buffer"], 1e-14)


@pytest.mark.parametrize("act, few, many, limit", [(nn.Tanh, 4, 40, 50.), (nn.ReLU, 2, 100, 5.)])
def test_more_nodes_leave_less_residual(act, few, many, limit):
    ref = [explained(model=make(act=act), nodes=n, lr=.1) for n in (few, many)]
    for r in ref: adds_up(r)
    assert ref[0].residual.abs().sum() > limit*ref[1].residual.abs().sum()


@pytest.mark.parametrize("average", [None, [.5]*5])
def test_model_is_left_at_the_end(average):
    model = make()
    ref = explained(model=model, average=average)
    for n, p in model.named_parameters(): assert p.equal(ref.run.thetas[-1][n])
    assert (ref.thetas is ref.run.thetas) is (average is None)


def test_wrong_coefficients_are_refused():
    "Without the rule for the first buffer, dampening misses torch's step."
    late = lambda group, before, after, *rest: derivation._frozen_sgd(group, after, after, *rest)
    with pytest.raises(RuntimeError, match="step 0, parameter body.0.weight"):
        explained(SGD, lr=.1, momentum=.9, dampening=.5, readers={SGD: late})


def test_unknown_optimizer_and_dtype():
    with pytest.raises(ValueError, match="RMSprop.*Use one of SGD, Adam, AdamW"): explained(torch.optim.RMSprop, lr=.1)
    with pytest.raises(TypeError, match=r"float64.*model.double"): explained(model=copy.deepcopy(make()).float())


def test_a_run_that_blows_up_is_refused():
    with pytest.raises(RuntimeError, match="step 0"): explained(SGD, lr=float("inf"))
