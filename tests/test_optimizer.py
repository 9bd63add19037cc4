import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

import axontrain as ax
from axontrain.optimizer import names
from axontrain.update import Update


class Net(ax.Objective):
    """A small network with matrices, vectors and a normalisation."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def predict(self, x):
        return self.head(self.body(x))

    def loss(self, predictions, targets):
        return F.cross_entropy(predictions, targets)


def batches(count=6, seed=1):
    made = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 5, generator=made), torch.randint(3, (4,), generator=made)) for _ in range(count)]


def loop_of(optimizer, objective=None):
    return ax.Loop(objective or Net(), optimizer, device="cpu", progress=False)


def fitted(optimizer, objective=None):
    loop = loop_of(optimizer, objective)
    loop.fit(batches(), epochs=1)
    return loop.objective


def by_hand(make, *, between=None, schedule=None):
    """The loop one would write oneself."""
    net = Net()
    optimizers = make(net)
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    schedulers = [schedule(optimizer) for optimizer in optimizers] if schedule else []
    for x, y in batches():
        F.cross_entropy(net.predict(x), y).backward()
        if between is not None:
            between(net.parameters())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
    return net


def assert_same(one, other):
    for (name, value), (_, expected) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(value, expected), name


def matrices(name, parameter):
    return parameter.ndim == 2


# --- what an optimizer is made of ------------------------------------------------------------------------------------


def test_names_are_torchs_own_in_lower_case():
    assert names()["adamw"] is torch.optim.AdamW
    assert {"sgd", "adam", "adamw", "rmsprop", "adagrad", "muon"} <= names().keys()
    assert "optimizer" not in names()


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        ("adamw", {"weight_decay": 0.1}),
        ("AdamW", {"weight_decay": 0.1}),
        (torch.optim.AdamW, {"weight_decay": 0.1}),
        (lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=0.1, fused=True), {}),
        (functools.partial(torch.optim.AdamW, weight_decay=0.1, fused=True), {}),
        (lambda params, **options: torch.optim.AdamW(params, **options, fused=True), {"weight_decay": 0.1}),
    ],
    ids=["name", "name in capitals", "class", "function", "partial", "function of options"],
)
def test_a_name_a_class_and_a_callable_are_the_same_algorithm(factory, options):
    expected = by_hand(lambda net: torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1, fused=True))
    assert_same(fitted(ax.Optimizer(factory, lr=0.01, **options)), expected)


def test_a_callable_without_a_rate_keeps_its_own():
    expected = by_hand(lambda net: torch.optim.SGD(net.parameters(), lr=0.3))
    assert_same(fitted(ax.Optimizer(lambda params: torch.optim.SGD(params, lr=0.3), lr=0.0)), expected)


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda: ax.Optimizer("adammw", lr=0.1), ax.UnknownNameError, "unknown optimizer 'adammw': did you mean 'adamw'"),
        (
            lambda: ax.Optimizer("adamw", lr=0.1, wieght_decay=0.1),
            ax.UnknownNameError,
            "'wieght_decay': did you mean 'weight_decay'",
        ),
        (lambda: ax.Optimizer("adamw", lr=0.1, clipnorm=1.0), ax.UnknownNameError, "'clipnorm': did you mean 'clip_norm'"),
        (lambda: ax.Optimizer("adamw", lr=0.1, shedule=1.0), ax.UnknownNameError, "'shedule': did you mean 'schedule'"),
        (
            lambda: ax.Optimizer("adamw", lr=0.1, groups={"*.bias": {"wieght_decay": 0}}),
            ax.UnknownNameError,
            r"in groups\['\*\.bias'\]: 'wieght_decay': did you mean 'weight_decay'",
        ),
        (
            lambda: ax.Optimizer("adamw", lr=0.1, groups={matrices: {"optimizer": "moun"}}),
            ax.UnknownNameError,
            "unknown optimizer 'moun': did you mean 'muon'",
        ),
        (
            lambda: ax.Optimizer("adamw", lr=0.1, groups={matrices: {"optimizer": "muon", "nestrov": True}}),
            ax.UnknownNameError,
            r"option of Muon in groups\[matrices\]: 'nestrov': did you mean 'nesterov'",
        ),
        (lambda: ax.Optimizer("adamw", lr=0.1, on_nonfinite="rise"), ax.UnknownNameError, "did you mean 'raise'"),
        (
            lambda: ax.Optimizer(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1), lr=0.1),
            ax.ConfigurationError,
            r"SGD\(\.\.\.\) is bound to parameters already: pass the class",
        ),
        (lambda: ax.Optimizer(3, lr=0.1), ax.ConfigurationError, "not int"),
        (lambda: ax.Optimizer("sgd", lr=-0.1), ax.ConfigurationError, "lr=-0.1: 0 or more"),
        (lambda: ax.Optimizer("sgd", lr=math.nan), ax.ConfigurationError, "lr=nan"),
        (lambda: ax.Optimizer("sgd", lr="0.1"), ax.ConfigurationError, "lr='0.1': a number"),
        (lambda: ax.Optimizer("sgd", lr=0.1, clip_norm=0), ax.ConfigurationError, "clip_norm=0: above 0"),
        (lambda: ax.Optimizer("sgd", lr=0.1, clip_value=-1.0), ax.ConfigurationError, "clip_value=-1.0: above 0"),
        (lambda: ax.Optimizer("sgd", lr=0.1, patience=0), ax.ConfigurationError, "patience=0"),
        (lambda: ax.Optimizer("sgd", lr=0.1, patience=True), ax.ConfigurationError, "patience=True"),
        (lambda: ax.Optimizer("sgd", lr=0.1, schedule="cosine"), ax.ConfigurationError, "schedule='cosine': a function"),
        (lambda: ax.Optimizer("sgd", lr=0.1, groups={3: {}}), ax.ConfigurationError, "3 is neither a pattern, nor a predicate"),
        (lambda: ax.Optimizer("sgd", lr=0.1, groups={"*": 0.1}), ax.ConfigurationError, "it is a mapping of options"),
    ],
)
def test_what_cannot_work_is_said_at_once(make, error, told):
    with pytest.raises(error, match=told):
        make()


def test_a_loop_takes_no_torch_optimizer():
    net = Net()
    with pytest.raises(ax.ConfigurationError, match=r"the optimizer 'main' is AdamW; it is an ax\.Optimizer"):
        ax.Loop(net, torch.optim.AdamW(net.parameters()), progress=False)


def test_a_factory_that_makes_something_else_is_an_error():
    with pytest.raises(ax.ConfigurationError, match=r"no torch\.optim\.Optimizer"):
        loop_of(ax.Optimizer(lambda params: list(params), lr=0.1))


def test_an_option_with_a_bad_value_names_the_parameters():
    with pytest.raises(ax.OptimizerError, match=r"AdamW cannot be made for 6 parameters \(body\.0\.weight"):
        loop_of(ax.Optimizer("adamw", lr=0.1, betas=(2.0, 0.9)))


def test_the_repr_is_short():
    assert repr(ax.Optimizer(torch.optim.SGD, lr=0.1)) == "Optimizer('SGD', lr=0.1)"


# --- groups ----------------------------------------------------------------------------------------------------------


def test_biases_without_decay_equal_a_hand_made_optimizer_bitwise():
    def make(net):
        named = dict(net.named_parameters())
        decayed = [p for name, p in named.items() if not name.endswith("bias")]
        biases = [p for name, p in named.items() if name.endswith("bias")]
        groups = [{"params": decayed}, {"params": biases, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.3, fused=True)

    expected = by_hand(make)
    for selection in ("*.bias", lambda name, parameter: name.endswith("bias")):
        spec = ax.Optimizer("adamw", lr=0.01, weight_decay=0.3, groups={selection: {"weight_decay": 0.0}})
        assert_same(fitted(spec), expected)
    with pytest.raises(AssertionError):  # the decay matters here
        assert_same(fitted(ax.Optimizer("adamw", lr=0.01, weight_decay=0.3)), expected)


def test_muon_takes_the_matrices_and_adamw_the_rest():
    def make(net):
        two = [p for p in net.parameters() if p.ndim == 2]
        rest = [p for p in net.parameters() if p.ndim != 2]
        return [torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1, fused=True), torch.optim.Muon(two, lr=0.02)]

    expected = by_hand(make)
    groups = {matrices: {"optimizer": "muon", "lr": 0.02}}
    assert_same(fitted(ax.Optimizer("adamw", lr=0.01, weight_decay=0.1, groups=groups)), expected)
    turned = {lambda name, p: p.ndim != 2: {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1}}
    assert_same(fitted(ax.Optimizer("muon", lr=0.02, groups=turned)), expected)


def test_an_algorithm_that_does_not_take_a_parameter_says_how_to_give_it_another():
    with pytest.raises(ax.OptimizerError, match=r"Muon cannot be made .* Give the others a group: groups="):
        loop_of(ax.Optimizer("muon", lr=0.02))


def test_groups_that_take_everything_leave_no_empty_rest():
    spec = ax.Optimizer("sgd", lr=0.1, groups={matrices: {"lr": 0.2}, lambda name, p: p.ndim != 2: {"lr": 0.3}})
    (optimizer,) = loop_of(spec).state.optimizers["main"].optimizers
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.3]


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ({"*.bais": {}}, r"groups of the optimizer: '\*\.bais' matches no parameter of body\.0\.weight, body\.0\.bias"),
        ({lambda name, p: False: {}}, "<lambda> matches no parameter of"),
        (
            {"*.bias": {}, "head.*": {}},
            r"matched by two groups \('\*\.bias' and 'head\.\*'\): head\.bias; narrow one",
        ),
    ],
)
def test_groups_that_match_nothing_or_overlap_are_errors_that_name_parameters(groups, told):
    with pytest.raises(ax.OptimizerError, match=told):
        loop_of(ax.Optimizer("sgd", lr=0.1, groups=groups))


# --- which parameters ------------------------------------------------------------------------------------------------


def test_optimizers_in_a_dict_take_the_submodules_of_their_names():
    def make(net):
        return [
            torch.optim.AdamW(net.body.parameters(), lr=0.01, fused=True),
            torch.optim.SGD(net.head.parameters(), lr=0.1, fused=True),
        ]

    spec = {"body": ax.Optimizer("adamw", lr=0.01), "head": ax.Optimizer("sgd", lr=0.1)}
    assert_same(fitted(spec), by_hand(make))
    assert list(loop_of(spec).state.optimizers["head"].parameters) == ["head.weight", "head.bias"]


@pytest.mark.parametrize("params", ["body.*", ["body.0.*", "body.1.*"], lambda name, p: name.startswith("body")])
def test_params_say_which_parameters_an_optimizer_takes(params):
    spec = {"slow": ax.Optimizer("sgd", lr=0.01, params=params), "head": ax.Optimizer("sgd", lr=0.1)}
    taken = loop_of(spec).state.optimizers["slow"].parameters
    assert list(taken) == ["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias"]


def test_a_prefix_is_no_submodule():
    class Alike(Net):
        def __init__(self):
            super().__init__()
            self.header = nn.Linear(2, 2)

    loop = loop_of({"head": ax.Optimizer("sgd", lr=0.1)}, Alike())
    assert list(loop.state.optimizers["head"].parameters) == ["head.weight", "head.bias"]


def test_an_optimizer_named_like_no_submodule_is_an_error_with_the_nearest():
    with pytest.raises(ax.UnknownNameError, match=r"'haed': did you mean 'head'.*Without params="):
        loop_of({"body": ax.Optimizer("sgd", lr=0.1), "haed": ax.Optimizer("sgd", lr=0.1)})


def test_a_parameter_covered_twice_is_an_error_that_names_it():
    spec = {"body": ax.Optimizer("sgd", lr=0.1), "rest": ax.Optimizer("sgd", lr=0.1, params=["head.*", "*.1.weight"])}
    with pytest.raises(ax.OptimizerError, match=r"body\.1\.weight \(by 'body' and 'rest'\); narrow"):
        loop_of(spec)


def test_a_tied_parameter_is_covered_once():
    class Tied(ax.Objective):
        def __init__(self):
            super().__init__()
            self.read, self.write = nn.Linear(3, 3), nn.Linear(3, 3)
            self.write.weight = self.read.weight

        def predict(self, x):
            return self.write(self.read(x))

        def loss(self, predictions, targets):
            return F.mse_loss(predictions, targets)

    loop = ax.Loop(Tied(), ax.Optimizer("sgd", lr=0.1), progress=False)
    assert list(loop.state.optimizers["main"].parameters) == ["read.weight", "read.bias", "write.bias"]
    loop.fit([(torch.ones(2, 3), torch.ones(2, 3))], epochs=1)


@pytest.mark.parametrize("entry", ["fit", "train_on_batch"])
def test_a_parameter_that_nothing_covers_is_an_error_that_names_it(entry):
    loop = loop_of({"body": ax.Optimizer("sgd", lr=0.1)})
    with pytest.raises(ax.OptimizerError, match=r"no optimizer covers head\.weight, head\.bias: .*requires_grad_\(False\)"):
        loop.fit(batches(), epochs=1) if entry == "fit" else loop.train_on_batch(batches()[0])


def test_frozen_parameters_need_no_optimizer_and_stay():
    net = Net()
    net.head.requires_grad_(False)
    before = copy.deepcopy(net.head.state_dict())
    fitted({"body": ax.Optimizer("adamw", lr=0.1)}, net)
    assert all(torch.equal(net.head.state_dict()[name], value) for name, value in before.items())
    also = Net()
    also.head.requires_grad_(False)
    assert_same(fitted(ax.Optimizer("adamw", lr=0.1), also), net)


def test_params_that_match_nothing_are_an_error():
    with pytest.raises(ax.OptimizerError, match=r"params= of the optimizer 'main': 'tail\.\*' matches no parameter of body"):
        loop_of(ax.Optimizer("sgd", lr=0.1, params="tail.*"))
    with pytest.raises(ax.OptimizerError, match=r"'tail\.\*' matches no parameter"):
        loop_of(ax.Optimizer("sgd", lr=0.1, params=["body.*", "tail.*"]))


def test_an_optimizer_serves_two_loops_that_share_nothing():
    spec = ax.Optimizer("adamw", lr=0.01, groups={"*.bias": {"weight_decay": 0.0}}, schedule=ax.schedules.linear())
    expected = fitted(spec)
    one, other = loop_of(spec), loop_of(spec)
    one.fit(batches(), epochs=1)
    assert other.state.optimizers["main"].state_dict() == loop_of(spec).state.optimizers["main"].state_dict()
    other.fit(batches(), epochs=1)
    assert_same(one.objective, expected)
    assert_same(other.objective, expected)
    ours, theirs = (loop.state.optimizers["main"].optimizers[0] for loop in (one, other))
    assert not {id(p) for group in ours.param_groups for p in group["params"]} & {
        id(p) for group in theirs.param_groups for p in group["params"]
    }
    assert spec.groups == {"*.bias": {"weight_decay": 0.0}}
    assert spec.kwargs == {}


# --- schedules -------------------------------------------------------------------------------------------------------

FACTORIES = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 2, 0.5),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 3], 0.5),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 6),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.5, total_iters=3), lr_scheduler.CosineAnnealingLR(optimizer, 4)],
        [3],
    ),
    "partial": functools.partial(lr_scheduler.ExponentialLR, gamma=0.8),
}


@pytest.mark.parametrize("schedule", FACTORIES)
def test_torch_schedulers_step_as_in_a_hand_written_loop(schedule):
    factory = FACTORIES[schedule]
    expected = by_hand(lambda net: torch.optim.AdamW(net.parameters(), lr=0.01, fused=True), schedule=factory)
    assert_same(fitted(ax.Optimizer("adamw", lr=0.01, schedule=factory)), expected)


@pytest.mark.parametrize("name", ["linear", "cosine", "one_cycle", "own", "tensor"])
def test_functions_of_progress_equal_a_hand_written_loop(name):
    schedule = {
        "linear": ax.schedules.linear(),
        "cosine": ax.schedules.cosine(warmup="20%"),
        "one_cycle": ax.schedules.one_cycle(),
        "own": lambda progress: 1 - progress**2,
        "tensor": lambda progress: torch.tensor(1.0) / 2,
    }[name]

    def factory(optimizer):
        # torch multiplies the base rate by the factor of the step; ours is of k / N before the k-th of N updates.
        return lr_scheduler.LambdaLR(optimizer, lambda step: float(schedule(step / 6)))

    expected = by_hand(lambda net: torch.optim.SGD(net.parameters(), lr=0.5, fused=True), schedule=factory)
    assert_same(fitted(ax.Optimizer("sgd", lr=0.5, schedule=schedule)), expected)


def test_a_schedule_keeps_the_proportion_of_groups_and_algorithms():
    groups = {"*.bias": {"lr": 0.2}, matrices: {"optimizer": "muon", "lr": 0.04}}
    loop = loop_of(ax.Optimizer("sgd", lr=0.1, groups=groups, schedule=lambda progress: 0.5))
    loop.fit(batches(1), epochs=1)
    rates = [group["lr"] for one in loop.state.optimizers["main"].optimizers for group in one.param_groups]
    assert rates == pytest.approx([0.05, 0.1, 0.02])


def test_a_torch_scheduler_is_made_for_each_algorithm():
    groups = {matrices: {"optimizer": "muon", "lr": 0.04}}
    loop = loop_of(ax.Optimizer("sgd", lr=0.1, groups=groups, schedule=FACTORIES["StepLR"]))
    loop.fit(batches(2), epochs=1)
    rates = [group["lr"] for one in loop.state.optimizers["main"].optimizers for group in one.param_groups]
    assert rates == pytest.approx([0.05, 0.02])


def test_a_schedule_that_is_neither_is_an_error_that_says_both():
    def words(of):
        return f"lr of {of.lower()}"

    with pytest.raises(ax.ConfigurationError) as caught:
        loop_of(ax.Optimizer("sgd", lr=0.1, schedule=words))
    told = str(caught.value)
    assert (
        "neither a function of progress (called with 0.0: AttributeError(\"'float' object has no attribute 'lower'\"))" in told
    )
    assert "nor a torch scheduler factory (called with the optimizer: AttributeError(\"'SGD' object" in told


def test_a_schedule_that_gives_something_else_is_an_error():
    with pytest.raises(ax.ConfigurationError, match="gave 'fast', which is no torch scheduler"):
        loop_of(ax.Optimizer("sgd", lr=0.1, schedule=lambda _: "fast"))


def test_torchs_plateau_scheduler_is_refused_for_the_callback():
    with pytest.raises(ax.ConfigurationError, match=r"use the callback ax\.ReduceLROnPlateau"):
        loop_of(ax.Optimizer("sgd", lr=0.1, schedule=lr_scheduler.ReduceLROnPlateau))


def test_the_present_rate_can_be_seen():
    loop = loop_of(ax.Optimizer("adamw", lr=0.4, schedule=ax.schedules.linear()))
    seen = []
    loop.on("after_batch")(lambda state: seen.append(state.optimizers["main"].lr))
    loop.fit(batches(4), epochs=1)
    assert seen == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_rescaling_lowers_every_rate_and_what_the_schedule_gives_from_then_on():
    spec = ax.Optimizer("sgd", lr=0.4, groups={"*.bias": {"lr": 0.8}}, schedule=ax.schedules.linear())
    loop = loop_of(spec)
    update = loop.state.optimizers["main"]
    update.rescale(0.5)
    assert [group["lr"] for group in update.optimizers[0].param_groups] == pytest.approx([0.2, 0.4])
    seen = []
    loop.on("after_batch")(lambda state: seen.append(update.lr))
    loop.fit(batches(4), epochs=1)
    assert seen == pytest.approx([0.2, 0.15, 0.1, 0.05])
    update.rescale(0.01, minimum=0.1)
    assert update.scale == pytest.approx(0.25)
    update.rescale(0.5, minimum=0.1)  # it is there already
    assert update.scale == pytest.approx(0.25)


@pytest.mark.parametrize("schedule", FACTORIES)
def test_rescaling_holds_under_a_torch_scheduler(schedule):
    def rates(reduced):
        loop = loop_of(ax.Optimizer("sgd", lr=0.4, schedule=FACTORIES[schedule]))
        update = loop.state.optimizers["main"]
        seen = []

        @loop.on("after_batch")
        def look(state):
            if reduced and state.step == 2:
                update.rescale(0.5)
            seen.append(update.lr)

        loop.fit(batches(6), epochs=1)
        return seen

    plain, reduced = rates(False), rates(True)
    assert reduced == pytest.approx([plain[0], *(rate / 2 for rate in plain[1:])])


# --- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "rmsprop"])
@pytest.mark.parametrize("limit", [0.01, 0.3, 1e6])
def test_clip_norm_is_torchs(name, limit):
    def clip(parameters):
        nn.utils.clip_grad_norm_(parameters, limit)

    expected = by_hand(lambda net: names()[name](net.parameters(), lr=0.05), between=clip)
    for (key, value), (_, other) in zip(
        fitted(ax.Optimizer(name, lr=0.05, clip_norm=limit)).named_parameters(), expected.named_parameters(), strict=True
    ):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, msg=key)


def test_clip_value_is_torchs():
    def clip(parameters):
        nn.utils.clip_grad_value_(parameters, 0.02)

    expected = by_hand(lambda net: torch.optim.SGD(net.parameters(), lr=0.5, fused=True), between=clip)
    assert_same(fitted(ax.Optimizer("sgd", lr=0.5, clip_value=0.02)), expected)


def test_values_are_clipped_before_the_norm():
    def clip(parameters):
        parameters = list(parameters)
        nn.utils.clip_grad_value_(parameters, 0.02)
        nn.utils.clip_grad_norm_(parameters, 0.05)

    expected = by_hand(lambda net: torch.optim.SGD(net.parameters(), lr=0.5, fused=True), between=clip)
    for value, other in zip(
        fitted(ax.Optimizer("sgd", lr=0.5, clip_value=0.02, clip_norm=0.05)).parameters(), expected.parameters(), strict=True
    ):
        torch.testing.assert_close(value, other)


def test_the_norm_is_over_all_parameters_of_the_optimizer_whatever_its_algorithms():
    def clip(parameters):
        nn.utils.clip_grad_norm_(parameters, 0.05)

    def make(net):
        biases = [p for name, p in net.named_parameters() if name.endswith("bias")]
        rest = [p for name, p in net.named_parameters() if not name.endswith("bias")]
        return [torch.optim.SGD(rest, lr=0.5, fused=True), torch.optim.SGD(biases, lr=0.1, fused=True)]

    spec = ax.Optimizer("sgd", lr=0.5, clip_norm=0.05, groups={"*.bias": {"optimizer": "sgd", "lr": 0.1}})
    for value, other in zip(fitted(spec).parameters(), by_hand(make, between=clip).parameters(), strict=True):
        torch.testing.assert_close(value, other)


def test_gradients_are_dropped_after_the_update():
    net = fitted(ax.Optimizer("sgd", lr=0.1))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_an_update_stands_by_itself():
    net = Net()
    update = Update("main", ax.Optimizer("sgd", lr=0.1), dict(net.named_parameters()))
    assert repr(update) == "Update('main', Optimizer('sgd', lr=0.1), 6 parameters)"
    x, y = batches(1)[0]
    loss = F.cross_entropy(net.predict(x), y)
    loss.backward()
    before = net.head.weight.detach().clone()
    expected = before - 0.1 * net.head.weight.grad
    assert update.update(loss.detach(), {}).item() == 0
    torch.testing.assert_close(net.head.weight.detach(), expected)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.norm = nn.LayerNorm((3, 4))
        self.scale = nn.Parameter(torch.ones(()))


def groups_of(optimizer, module=None):
    """The options that each parameter gets."""
    module = Blocks() if module is None else module
    update = Update("main", optimizer, dict(module.named_parameters()), module)
    names = {id(p): name for name, p in module.named_parameters()}
    return {names[id(p)]: group for one in update.optimizers for group in one.param_groups for p in group["params"]}


def test_groups_by_module_type_are_its_own_parameters():
    found = groups_of(ax.Optimizer("adamw", lr=0.1, groups={nn.Embedding: {"lr": 0.01}, nn.LayerNorm: {"lr": 0.02}}))
    assert {name: group["lr"] for name, group in found.items()} == {
        "embedding.weight": 0.01, "norm.weight": 0.02, "norm.bias": 0.02, "scale": 0.1,
        **{f"blocks.{i}.{kind}": 0.1 for i in range(2) for kind in ("weight", "bias")},
    }  # fmt: skip
    with pytest.raises(ax.OptimizerError, match=r"Conv2d.* matches no parameter"):
        groups_of(ax.Optimizer("adamw", lr=0.1, groups={nn.Conv2d: {"lr": 0.01}}))


def test_by_one_word_biases_and_norms_have_no_decay():
    spec = ax.Optimizer(
        "adamw", lr=0.1, weight_decay=0.3, no_decay=True,
        groups={"embedding.*": {"lr": 0.01}, "blocks.0.bias": {"weight_decay": 0.2}, "blocks.1.*": {"optimizer": "sgd"}},
    )  # fmt: skip
    found = groups_of(spec)
    assert {name: group["weight_decay"] for name, group in found.items()} == {
        "embedding.weight": 0.3, "blocks.0.weight": 0.3, "blocks.0.bias": 0.2, "blocks.1.weight": 0, "blocks.1.bias": 0.0,
        "norm.weight": 0.0, "norm.bias": 0.0, "scale": 0.0,
    }  # fmt: skip
    assert found["embedding.weight"]["lr"] == 0.01
    assert found["blocks.0.weight"]["lr"] == 0.1


def test_layers_near_the_input_learn_more_slowly():
    groups = ax.layerwise(["embedding.*", *(f"blocks.{i}.*" for i in range(2))], lr=0.8, decay=0.5)
    found = groups_of(ax.Optimizer("sgd", lr=0.1, groups=groups))
    assert {name: round(group["lr"], 6) for name, group in found.items() if name.endswith("weight")} == {
        "embedding.weight": 0.2, "blocks.0.weight": 0.4, "blocks.1.weight": 0.8, "norm.weight": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ax.layerwise(["a.*"], lr=1, decay=0), "decay=0: above 0"),
        (lambda: ax.layerwise(["a.*"], lr=1, decay=1.5), "at most 1"),
        (lambda: ax.layerwise("a.*", lr=1, decay=0.5), "a list of patterns"),
        (lambda: ax.layerwise(["a.*", "a.*"], lr=1, decay=0.5), "each once"),
        (lambda: ax.Optimizer("sgd", lr=1, no_decay="biases"), "True or False"),
        (lambda: ax.Optimizer("rprop", lr=1, no_decay=True), "rprop has no weight_decay"),
        (lambda: ax.Optimizer("sgd", lr=1, groups={3: {}}), "nor a module type"),
    ],
)
def test_groups_that_cannot_be_are_told(make, told):
    with pytest.raises(ax.ConfigurationError, match=told):
        make()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adagrad"])
def test_every_element_of_a_parameter_is_trained_in_every_dtype(name, dtype):
    # torch 2.13's fused SGD updated only what was left over of its vectors.
    for size in (1, 16, 33, 64):
        module = nn.ParameterDict({"p": nn.Parameter(torch.zeros(size, dtype=dtype))})
        update = Update(
            "main",
            ax.Optimizer(name, lr=0.1, eps=1e-3) if name != "sgd" else ax.Optimizer(name, lr=0.1),
            dict(module.named_parameters()),
        )
        module["p"].grad = torch.ones(size, dtype=dtype)
        update.update(torch.zeros((), dtype=dtype), {})
        torch.testing.assert_close(module["p"].detach(), torch.full((size,), -0.1, dtype=dtype), rtol=0.02, atol=0)
