"""Updates within backward, which free each gradient as soon as it is used."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import axontrain as ax
from axontrain.optimizer import names

NAN = float("nan")
DENSE = sorted(set(names()) - {"lbfgs", "sparseadam"})
VARIANTS = [
    *((name, {}) for name in DENSE),
    *((name, {"fused": False}) for name in ("sgd", "adam", "adamw", "adagrad")),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.9, "dampening": 0.5}),
    ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "fused": False}),
    ("adam", {"amsgrad": True}),
    ("rmsprop", {"momentum": 0.9, "centered": True}),
    ("adamw", {"clip_value": 0.01, "schedule": ax.schedules.cosine(warmup="20%")}),
    ("adamw", {"schedule": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)}),
    ("nadam", {"average": ax.averages.ema(0.5)}),
]


def net(bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3, bias=bias)).to(dtype)


def batches(count, seed=1, dtype=torch.float64):
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, 5, generator=made, dtype=dtype)
    return [(one, torch.randint(3, (4,), generator=made)) for one in x]


def loop_of(module, spec, **options):
    objective = module if isinstance(module, ax.Objective) else ax.Supervised(module, "cross_entropy")
    return ax.Loop(objective, spec, progress=False, **options)


def learnt(loop):
    updates = {name: update.state_dict() for name, update in loop.state.optimizers.items()}
    return {
        "weights": {**loop.objective.state_dict()},
        "states": {name: [part["state"] for part in update["optimizers"]] for name, update in updates.items()},
        "rates": {name: [[g["lr"] for g in part["groups"]] for part in u["optimizers"]] for name, u in updates.items()},
        "averages": {name: update["average"] for name, update in updates.items()},
    }


def close(one, other, path="", rounding=1e-12):
    """The same structure; numbers are the same to rounding, which differs between kernels over one tensor and over many."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            close(one[key], other[key], f"{path}/{key}", rounding)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            close(a, b, f"{path}/{index}", rounding)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=rounding, atol=rounding / 100, msg=path)
    else:
        assert one == other, path


def ids(value):
    return value if isinstance(value, str) else "-".join(value) or "plain"


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=ids)
def test_it_learns_what_updates_after_backward_learn(name, options):
    loops = [
        loop_of(net(bias=name != "muon"), ax.Optimizer(name, lr=0.01, in_backward=within, **options))
        for within in (True, False)
    ]
    for loop in loops:
        loop.fit(batches(6), epochs=2)
    close(*map(learnt, loops))
    assert not torch.equal(loops[0].objective.model[0].weight, net(bias=name != "muon")[0].weight)


@pytest.mark.parametrize(
    ("name", "options"), [(name, of) for name, of in VARIANTS if not {"schedule", "average"} & {*of}], ids=ids
)
def test_a_loss_that_is_not_finite_changes_nothing(name, options):
    spec = ax.Optimizer(name, lr=0.01, in_backward=True, **options)
    plain, guarded = (loop_of(net(bias=name != "muon"), spec) for _ in range(2))
    good = batches(5)
    bad = (torch.full_like(good[0][0], NAN), good[0][1])
    plain.fit(good, epochs=1)
    with pytest.warns(ax.NonFiniteWarning, match="2 updates of the optimizer 'main' were skipped"):
        guarded.fit([bad, *good[:2], bad, *good[2:]], epochs=1)
    close(learnt(guarded), learnt(plain), rounding=0)
    assert guarded.state.optimizers["main"].skipped == 2


class Root(ax.Objective):
    """A loss that is finite where its slope by the first layer is not."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def predict(self, batch):
        return self.net(batch["x"])

    def loss(self, predictions, batch):
        weight = self.net[0].weight[0, 0]
        loss = F.cross_entropy(predictions, batch["y"])
        return loss + (weight - weight.detach()).sqrt() if batch["steep"][0] else loss


@pytest.mark.parametrize("name", ["adamw", "nadam", "adafactor"])
def test_a_gradient_that_is_not_finite_leaves_its_parameter_alone(name):
    x, y = batches(1)[0]
    loop = loop_of(Root(), ax.Optimizer(name, lr=0.01, in_backward=True))
    loop.train_on_batch({"x": x, "y": y, "steep": torch.zeros(1)})
    before = {key: value.clone() for key, value in loop.objective.state_dict().items()}
    states = loop.state.optimizers["main"].state_dict()["optimizers"][0]["state"]
    kept = {key: value.clone() for key, value in states["net.0.weight"].items()}
    with pytest.warns(ax.NonFiniteWarning, match="step 2"):
        loop.fit([{"x": x, "y": y, "steep": torch.ones(1)}], epochs=1)
    changed = {key for key, value in loop.objective.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"net.0.bias", "net.2.weight", "net.2.bias"}
    now = loop.state.optimizers["main"].state_dict()["optimizers"][0]["state"]["net.0.weight"]
    assert all(torch.equal(now[key], value) for key, value in kept.items())
    assert loop.state.optimizers["main"].skipped == 1


def test_gradients_are_freed_one_by_one():
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(5, 5) for _ in range(8)), nn.Linear(5, 3))
    loop, at_once = loop_of(module, ax.Optimizer("sgd", lr=0.1, in_backward=True)), []
    optimizer = loop.state.optimizers["main"].optimizers[0]
    optimizer.register_step_post_hook(lambda *_: at_once.append(sum(p.grad is not None for p in module.parameters())))
    loop.fit(batches(3, dtype=torch.float32), epochs=1)
    assert at_once == [1] * 18 * 3
    assert all(p.grad is None for p in module.parameters())


def test_a_saved_state_goes_on_within_backward_or_after_it(tmp_path):
    whole = loop_of(net(), ax.Optimizer("adam", lr=0.01, in_backward=True))
    whole.fit(batches(6), epochs=2)
    first = loop_of(net(), ax.Optimizer("adam", lr=0.01, in_backward=True))
    first.fit(batches(6), steps=5)
    first.save(tmp_path / "saved")
    for within in (True, False):
        then = loop_of(net(), ax.Optimizer("adam", lr=0.01, in_backward=within))
        then.restore(tmp_path / "saved")
        then.fit(batches(6), epochs=2, resume=True)
        assert then.state.step == 12
        close(learnt(then), learnt(whole), rounding=0)


def test_groups_with_algorithms_of_their_own_and_several_optimizers():
    def spec(within):
        muon = {lambda name, p: p.ndim == 2: {"optimizer": "muon", "lr": 0.02}}
        return ax.Optimizer("adamw", lr=0.01, groups=muon, in_backward=within)

    loops = [loop_of(net(), spec(within)) for within in (True, False)]
    several = [
        loop_of(
            net(),
            {
                "first": ax.Optimizer("sgd", lr=0.1, params="model.0.*", in_backward=within),
                "last": ax.Optimizer("adam", lr=0.01, params="model.2.*", clip_norm=1.0),
            },
        )
        for within in (True, False)
    ]
    for loop in (*loops, *several):
        loop.fit(batches(6), epochs=2)
    close(*map(learnt, loops))
    close(*map(learnt, several))


class Game(ax.Objective):
    """Two networks against each other; the generator's loss goes through the discriminator, which it leaves alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.g, self.d = nn.Linear(2, 5).double(), nn.Linear(5, 1).double()

    def predict(self, z):
        return self.g(z)

    def train_step(self, batch):
        x, _ = batch
        fake = self.predict(torch.randn(len(x), 2, dtype=torch.float64))
        yield "d", F.softplus(-self.d(x)).mean() + F.softplus(self.d(fake.detach())).mean()
        yield "g", F.softplus(-self.d(fake)).mean()


def test_a_generator_of_losses():
    loops = [
        loop_of(Game(), {name: ax.Optimizer("adam", lr=0.01, in_backward=within) for name in ("g", "d")})
        for within in (True, False)
    ]
    for loop in loops:
        loop.fit(batches(6), epochs=2)
    close(*map(learnt, loops))
    assert all(p.grad is None for p in loops[0].objective.parameters())


class Tied(ax.Objective):
    """One matrix in two places, each computed anew in backward where ``again`` is given."""

    def __init__(self, **again):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head, self.again = nn.Linear(5, 5).double(), nn.Linear(5, 3).double(), again

    def predict(self, x):
        for _ in range(2):
            x = checkpoint(self.layer, x, **self.again) if self.again else self.layer(x)
        return self.head(x.tanh())

    def loss(self, predictions, targets):
        return F.cross_entropy(predictions, targets)


@pytest.mark.parametrize("again", [{}, {"use_reentrant": False}], ids=["kept", "computed anew"])
def test_a_parameter_used_twice_is_updated_once(again):
    loops = [loop_of(Tied(**again), ax.Optimizer("sgd", lr=0.1, in_backward=within)) for within in (True, False)]
    for loop in loops:
        loop.fit(batches(6), epochs=1)
    close(*map(learnt, loops))


def test_a_gradient_that_comes_twice_is_an_error():
    inputs = [(x.requires_grad_(), y) for x, y in batches(1)]
    loop = loop_of(Tied(use_reentrant=True), ax.Optimizer("sgd", lr=0.1, in_backward=True))
    with pytest.raises(ax.ObjectiveError, match=r"layer\.\w+ got a gradient twice.*use_reentrant=False"):
        loop.train_on_batch(inputs[0])


def test_sparse_gradients():
    class Bag(ax.Objective):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.words, self.out = nn.EmbeddingBag(20, 4, sparse=True), nn.Linear(4, 3)

        def predict(self, words):
            return self.out(self.words(words))

        def loss(self, predictions, targets):
            return F.cross_entropy(predictions, targets)

    made = torch.Generator().manual_seed(3)
    data = [(torch.randint(20, (4, 6), generator=made), torch.randint(3, (4,), generator=made)) for _ in range(5)]
    loops = [loop_of(Bag(), ax.Optimizer("sgd", lr=0.1, clip_value=0.05, in_backward=within)) for within in (True, False)]
    for loop in loops:
        loop.fit(data, epochs=2)
    for a, b in zip(loops[0].objective.parameters(), loops[1].objective.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_frozen_stays_and_learns_once_it_is_thawed():
    loops = [
        loop_of(net(), ax.Optimizer("adam", lr=0.01, in_backward=within), callbacks=[ax.Unfreeze("model.0.*", at="4 steps")])
        for within in (True, False)
    ]
    for loop in loops:
        loop.fit(batches(6), steps=4)
        assert torch.equal(loop.objective.model[0].weight, net()[0].weight)
        loop.fit(batches(6), epochs=1)
        assert not torch.equal(loop.objective.model[0].weight, net()[0].weight)
    close(*map(learnt, loops))


def test_gradients_computed_outside_of_a_step_are_the_callers():
    loop = loop_of(net(), ax.Optimizer("sgd", lr=0.1, in_backward=True))
    x, y = batches(1)[0]
    loop.train_on_batch((x, y))
    with pytest.raises(IndexError):
        loop.train_on_batch((x, y + 7))  # there is no such class
    before = loop.objective.model[0].weight.detach().clone()
    F.cross_entropy(loop.objective.predict(x), y).backward()
    assert torch.equal(loop.objective.model[0].weight, before)
    assert loop.objective.model[0].weight.grad is not None


def test_a_loss_without_parameters_says_so():
    class Constant(ax.Objective):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(5, 3).double(), nn.Linear(2, 2).double()

        def predict(self, x):
            return self.used(x)

        def loss(self, predictions, targets):
            return F.cross_entropy(predictions, targets)

    specs = {name: ax.Optimizer("sgd", lr=0.1, in_backward=True) for name in ("used", "unused")}
    with pytest.raises(ax.LossError, match="no parameter of the optimizer 'unused' has a gradient"):
        loop_of(Constant(), specs).fit(batches(1), epochs=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip_norm": 1.0}, "in_backward=True with clip_norm.*clip_value="),
        ({"on_nonfinite": "raise"}, "on_nonfinite='raise', which promises that nothing was updated.*patience=1"),
        ({"closure": True}, "evaluates the loss by itself"),
        ({"in_backward": "yes"}, "in_backward='yes': True or False"),
    ],
)
def test_options_that_need_all_gradients_are_refused(options, words):
    with pytest.raises(ax.ConfigurationError, match=words):
        ax.Optimizer("sgd", lr=0.1, **{"in_backward": True, **options})


def test_lbfgs_and_schedule_free_are_refused():
    with pytest.raises(ax.ConfigurationError, match="lbfgs evaluates the loss by itself"):
        ax.Optimizer("lbfgs", lr=0.1, in_backward=True)
    pytest.importorskip("schedulefree")
    with pytest.raises(ax.ConfigurationError, match="SGDScheduleFree counts its steps once"):
        loop_of(net(), ax.Optimizer("sgdschedulefree", lr=0.1, in_backward=True))


def test_fp16_is_refused_when_the_loop_is_made():
    with pytest.raises(ax.ConfigurationError, match="in_backward=True, and precision='fp16' scales the loss"):
        loop_of(net(dtype=torch.float32), ax.Optimizer("sgd", lr=0.1, in_backward=True), precision="fp16")


@pytest.mark.parametrize("cut", [{"microbatch": 2}, {"microbatch": "auto"}, {"accumulate": 2}], ids=str)
def test_microbatches_are_refused_before_anything_is_changed(cut):
    loop = loop_of(net(), ax.Optimizer("sgd", lr=0.1, in_backward=True))
    with pytest.raises(ax.ConfigurationError, match="in_backward=True, which does not go with microbatch= or accumulate="):
        loop.fit(batches(4), epochs=1, **cut)
    assert loop.state.step == 0
    assert torch.equal(loop.objective.model[0].weight, net()[0].weight)


def test_a_callback_that_looks_at_gradients_is_refused():
    loop = loop_of(net(), ax.Optimizer("sgd", lr=0.1, in_backward=True))
    loop.on("after_backward")(lambda state: None)
    with pytest.raises(ax.ConfigurationError, match="a callback's after_backward, which looks at gradients"):
        loop.fit(batches(1), epochs=1)


class Counting(torch.optim.Optimizer):
    """Counts in its groups, as some do: once a step, for all parameters."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] / math.sqrt(group["k"]))


def test_an_algorithm_that_counts_in_its_groups_is_refused():
    loop = loop_of(net(), ax.Optimizer(Counting, lr=0.1, in_backward=True))
    with pytest.raises(
        ax.ConfigurationError, match="Counting counts its steps, or keeps tensors, for all its parameters together"
    ):
        loop.fit(batches(2), epochs=1)


def test_a_copy_of_a_loop_goes_on_by_itself():
    loop = loop_of(net(), ax.Optimizer("adamw", lr=0.1, in_backward=True))
    for batch in batches(3):
        loop.train_on_batch(batch)
    copied = copy.deepcopy(loop)
    before = copy.deepcopy(learnt(loop))
    for batch in batches(3, seed=2):
        copied.train_on_batch(batch)
    close(learnt(loop), before)
    for batch in batches(3, seed=2):
        loop.train_on_batch(batch)
    close(learnt(copied), learnt(loop))
