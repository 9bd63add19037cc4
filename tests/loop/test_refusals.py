"""What cannot work is an error that says what to do: names, data, batches, losses."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import axontrain as ax


def table(n=24, d=3):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    return x, x.sum(1, keepdim=True)


def batches(n=24):
    return list(zip(*(part.split(4) for part in table(n)), strict=True))


def sgd():
    return ax.Optimizer("sgd", lr=0.01)


def line_loop(objective=None, **options):
    torch.manual_seed(0)
    return ax.Loop(objective or ax.Supervised(nn.Linear(3, 1), "mse"), sgd(), **{"progress": False, **options})


def notes(info):
    return "\n".join(getattr(info.value, "__notes__", []))


@pytest.mark.parametrize(
    ("make", "near"),
    [
        (lambda: line_loop(seeds=3), "seed"),
        (lambda: line_loop().fit(batches(), epoch=3), "epochs"),
        (lambda: line_loop().steps(batches(), step=3), "steps"),
        (lambda: line_loop(metrics=["acuracy"]), "accuracy"),
        (lambda: ax.Optimizer("adamm", lr=0.1), "adam"),
        (lambda: ax.Optimizer("sgd", lr=0.1, momentun=0.9), "momentum"),
        (lambda: ax.Optimizer("sgd", lr=0.1, on_nonfinite="skp"), "skip"),
        (lambda: line_loop().on("after_batches"), "after_batch"),
        (lambda: ax.Every("2 epocs"), "epochs"),
        (lambda: line_loop().fit(batches(), epochs=1, validate="3 stps"), "steps"),
        (lambda: ax.EarlyStopping(mode="mni"), "min"),
        (lambda: ax.Supervised(nn.Linear(1, 1), "cross_entrpy"), "cross_entropy"),
        (lambda: ax.ProgressBar("terminl"), "terminal"),
        (lambda: line_loop().state.history.best("val/loss", "mx"), "max"),
        (lambda: line_loop().fit(batches(), epochs=1).history["train/los"], "train/loss"),
        (lambda: line_loop().fit(batches(), epochs=1).history.best("train/los"), "train/loss"),
    ],
)
def test_an_unknown_name_offers_the_nearest(make, near):
    with pytest.raises(ax.UnknownNameError, match=f"did you mean .*'{near}'"):
        make()


def test_a_misspelt_hook_of_a_callback_is_found_where_the_class_is_written():
    with pytest.raises(ax.UnknownNameError, match="did you mean 'before_epoch'"):

        class Typo(ax.Callback):
            def before_epochs(self, state): ...


def test_a_reading_that_nobody_makes_offers_the_nearest_when_it_is_looked_for():
    loop = line_loop(callbacks=[ax.EarlyStopping("val/los", mode="min")])
    with pytest.raises(ax.UnknownNameError, match="'val/loss'"):
        loop.fit(batches(), batches(), epochs=1)


def test_watching_validation_without_validation_data_fails_before_training():
    loop = line_loop(callbacks=[ax.EarlyStopping("val/loss")])
    with pytest.raises(ax.ConfigurationError, match="no validation data"):
        loop.fit(batches(), epochs=1)
    assert loop.state.step == 0


def test_an_optimizer_that_a_generator_does_not_know_is_named():
    class Two(ax.Objective):
        def __init__(self):
            super().__init__()
            self.critic = nn.Linear(3, 1)

        def train_step(self, batch):
            yield "critc", self.critic(batch[0]).mean()

    loop = ax.Loop(Two(), {"critic": sgd()}, progress=False)
    with pytest.raises(ax.UnknownNameError, match="did you mean 'critic'"):
        loop.fit(batches(), epochs=1)


def test_an_optimizer_in_a_dict_that_is_no_submodule_offers_the_nearest():
    with pytest.raises(ax.UnknownNameError, match="did you mean 'model'"):
        ax.Loop(ax.Supervised(nn.Linear(3, 1), "mse"), {"modle": sgd()})


@pytest.mark.parametrize("limits", [{}, {"epochs": None}])
def test_no_limit_is_an_error(limits):
    with pytest.raises(ax.ConfigurationError, match="epochs=, steps= or time="):
        line_loop().fit(batches(), **limits)


@pytest.mark.parametrize(
    "limits",
    [{"epochs": -1}, {"epochs": 1.5}, {"steps": True}, {"time": "3 epochs"}, {"epochs": 1, "limit": 0}, {"time": "ten"}],
)
def test_limits_that_cannot_be_are_errors(limits):
    with pytest.raises(ax.ConfigurationError):
        line_loop().fit(batches(), **limits)


def test_whole_numbers_of_numpy_are_whole_numbers():
    loop = line_loop()
    loop.fit(batches(), epochs=np.int64(2))
    assert loop.state.epoch == 2


def test_an_error_about_an_interval_names_the_argument():
    with pytest.raises(ax.ConfigurationError, match=r"validate=1\.0"):
        line_loop().fit(batches(), batches(), epochs=1, validate=1.0)


def test_without_an_optimizer_there_is_no_training_but_evaluation_and_prediction():
    loop = ax.Loop(ax.Supervised(nn.Linear(3, 1), "mse"), progress=False)
    with pytest.raises(ax.OptimizerError, match="no optimizer"):
        loop.fit(batches(), epochs=1)
    assert loop.evaluate(batches())["loss"] > 0
    assert loop.predict(batches()).shape == (24, 1)


def test_a_model_that_is_no_objective_is_told_how_to_become_one():
    with pytest.raises(ax.ConfigurationError, match="Supervised"):
        ax.Loop(nn.Linear(3, 1), sgd())
    with pytest.raises(ax.ConfigurationError, match="Optimizer"):
        ax.Loop(ax.Supervised(nn.Linear(3, 1), "mse"), "sgd")
    with pytest.raises(ax.ConfigurationError, match=r"class: call it"):
        line_loop(callbacks=[ax.LearningRate])


def test_a_batch_size_for_data_that_bring_their_batches_is_an_error():
    with pytest.raises(ax.ConfigurationError, match="batch_size=8"):
        line_loop().fit(batches(), epochs=1, batch_size=8)


# --- batches ----------------------------------------------------------------------------------------------------------


def other_shape():
    x, y = table(4, d=3)
    return torch.cat([x, x], 1), y


def other_structure():
    return (*table(4), torch.ones(4))


@pytest.mark.parametrize("other", [other_shape, other_structure])
def test_a_batch_unlike_the_first_names_batch_epoch_expected_and_got(other):
    data = batches()
    data[2] = other()
    loop = line_loop()
    with pytest.raises(ax.BatchMismatchError) as info:
        loop.fit(data, epochs=1)
    message = str(info.value)
    assert "batch 2 of epoch 0" in message
    assert "expected [0]: (*, 3)" in message
    assert ("(*, 6)" if other is other_shape else "[2]: (*)") in message
    assert "strict=False" in message


def test_the_first_batch_sets_the_shape_for_all_epochs():
    class Growing:
        epoch = 0

        def __iter__(self):
            self.epoch += 1
            x, y = table(8, d=3)
            yield x.repeat(1, self.epoch), y

    with pytest.raises(ax.BatchMismatchError, match="batch 0 of epoch 1"):
        line_loop().fit(Growing(), epochs=2)


def test_strict_false_allows_batches_unlike_the_first():
    class Mean(ax.Objective):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def predict(self, x):
            return x.mean(1, keepdim=True) * self.scale

        def loss(self, predictions, targets):
            return F.mse_loss(predictions, targets)

    data = [*batches(), other_shape()]
    loop = line_loop(Mean(), strict=False)
    loop.fit(data, epochs=2)
    assert loop.state.step == 14
    with pytest.raises(ax.BatchMismatchError):
        line_loop(Mean()).fit(data, epochs=1)


def test_validation_batches_are_checked_as_well():
    data = [*batches(), other_shape()]
    with pytest.raises(ax.BatchMismatchError, match="validation: batch 6"):
        line_loop().fit(batches(), data, epochs=1)


# --- objectives -------------------------------------------------------------------------------------------------------


class Faulty(ax.Objective):
    """A linear model of which one part is wrong."""

    def __init__(self, loss=F.mse_loss, split=None):
        super().__init__()
        self.model, self.of, self.by = nn.Linear(3, 1), loss, split

    def predict(self, x):
        return self.model(x)

    def loss(self, predictions, targets):
        return self.of(predictions, targets)

    def split(self, batch):
        return super().split(batch) if self.by is None else self.by(batch)


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda p, t: (p - t).square(), r"not a scalar but \(4, 1\).*\.mean\(\)"),
        (lambda p, t: (p - t).square().mean().detach(), "no graph"),
        (lambda p, t: (p - t).square().mean().item(), "returned float"),
        (lambda p, t: None, "returned NoneType"),
        (lambda p, t: {}, "empty mapping"),
        (lambda p, t: {"loss": (p - t).mean()}, "named 'loss'"),
        (lambda p, t: {"a": p - t}, "the term 'a'"),
    ],
)
def test_a_loss_that_cannot_be_minimised_says_why(loss, told):
    loop = line_loop(Faulty(loss))
    with pytest.raises(ax.LossError, match=told):
        loop.fit(batches(), epochs=1)
    assert loop.state.step == 0


def test_a_loss_that_becomes_faulty_later_is_found_as_well():
    calls = []

    def loss(predictions, targets):
        calls.append(1)
        each = (predictions - targets).square()
        return each.mean() if len(calls) < 3 else each

    with pytest.raises(ax.LossError, match="not a scalar") as info:
        line_loop(Faulty(loss)).fit(batches(), epochs=1)
    assert "step 2" in notes(info)


def test_predictions_that_would_broadcast_against_targets_are_an_error():
    x, y = table(8)
    with pytest.raises(ax.LossError, match="squeeze"):
        line_loop().fit(ax.ArrayDataset(x, y[:, 0]), epochs=1)


def test_a_train_step_that_returns_no_step_is_an_error():
    class Bare(Faulty):
        def train_step(self, batch):
            return self.loss(self.predict(batch[0]), batch[1])

    with pytest.raises(ax.ObjectiveError, match=r"train_step returned Tensor.*ax\.Step"):
        line_loop(Bare()).fit(batches(), epochs=1)


def test_an_eval_step_that_returns_no_step_is_an_error():
    class Bare(Faulty):
        def eval_step(self, batch):
            return 1.0

    with pytest.raises(ax.ObjectiveError, match=r"eval_step returned float.*ax\.Step"):
        line_loop(Bare()).evaluate(batches())


@pytest.mark.parametrize("split", [lambda batch: batch[0], lambda batch: (*batch, 1), lambda batch: None])
def test_a_wrong_split_says_what_came(split):
    with pytest.raises(ax.SplitError, match=r"returns \(inputs, targets\).*The batch was tuple of 2: \(Tensor\(4, 3\) float32"):
        line_loop(Faulty(split=split)).fit(batches(), epochs=1)


def test_a_generator_that_yields_something_else_is_an_error():
    class Wrong(Faulty):
        def train_step(self, batch):
            yield self.loss(self.predict(batch[0]), batch[1])

    with pytest.raises(ax.LossError, match=r"yielded Tensor\(\) float32; it yields \(optimizer_name, loss\)"):
        line_loop(Wrong()).fit(batches(), epochs=1)


def test_a_generator_that_yields_nothing_is_an_error():
    class Nothing(Faulty):
        def train_step(self, batch):
            yield from ()

    with pytest.raises(ax.ObjectiveError, match="yielded no"):
        line_loop(Nothing()).fit(batches(), epochs=1)


# --- notes ------------------------------------------------------------------------------------------------------------


def test_an_error_in_training_notes_epoch_step_shapes_and_dtypes():
    class Bad(Faulty):
        def predict(self, x):
            if state.step == 8:
                raise RuntimeError("the model broke")
            return super().predict(x)

    loop = line_loop(Bad())
    state = loop.state
    with pytest.raises(RuntimeError, match="the model broke") as info:
        loop.fit(batches(), epochs=3)
    for part in ("epoch 1", "step 8", "batch 2 of the epoch", "Tensor(4, 3) float32", "Tensor(4, 1) float32"):
        assert part in notes(info)


def test_float64_data_are_hinted_at():
    x, y = table()
    numpy = ax.ArrayDataset(x.double().numpy(), y.double().numpy())
    with pytest.raises(RuntimeError) as info:
        line_loop().fit(numpy, epochs=1)
    assert ".float()" in notes(info)
    assert "float64" in notes(info)


def test_a_model_in_float64_is_not_hinted_at():
    class Broken(Faulty):
        def predict(self, x):
            raise RuntimeError("expected scalar type Double, for reasons of its own")

    x, y = (part.double() for part in table())
    with pytest.raises(RuntimeError) as info:
        line_loop(Broken().double()).fit(ax.ArrayDataset(x, y), epochs=1)
    assert ".float()" not in notes(info)


def test_an_error_in_validation_notes_the_batch_of_validation():
    x, y = table(7, d=3)
    with pytest.raises(RuntimeError) as info:
        line_loop().fit(batches(), ax.ArrayDataset(torch.cat([x, x], 1), y), epochs=1)
    assert "Tensor(7, 6)" in notes(info)
    assert "Tensor(4, 3)" not in notes(info)  # the last one trained on has nothing to do with it


def test_float64_validation_data_are_hinted_at():
    x, y = (part.double() for part in table(7))
    with pytest.raises(RuntimeError) as info:
        line_loop().fit(batches(), ax.ArrayDataset(x, y), epochs=1)
    assert ".float()" in notes(info)


def test_an_error_in_reading_a_batch_does_not_blame_the_batch_before():
    def broken():
        yield batches()[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone") as info:
        line_loop().fit(broken(), epochs=1)
    assert "epoch 0, step 1" in notes(info)
    assert "Tensor(4, 3)" not in notes(info)


def test_a_sample_that_cannot_be_read_is_named():
    class Damaged:
        def __len__(self):
            return 12

        def __getitem__(self, index):
            if index == 7:
                raise OSError("unreadable")
            return torch.zeros(3), torch.zeros(1)

    with pytest.raises(OSError, match="unreadable") as info:
        line_loop().fit(ax.Loader(Damaged(), 4), epochs=1)
    assert "batch 1 of epoch 0" in notes(info)
    assert "[4, 5, 6, 7]" in notes(info)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: ax.Optimizer("sgd", lr=0.1, groups=[{"params": "net.*", "lr": 1e-3}]),
            r"groups=list.*a mapping of selections",
        ),
        (lambda: ax.Optimizer("sgd", lr="1e-3"), "lr='1e-3': a number, and not text"),
        (
            lambda: ax.Optimizer("lbfgs", lr=0.1, closure=False),
            "closure=False: lbfgs steps by evaluating a closure; leave it out",
        ),
        (lambda: ax.Optimizer("lbfgs", lr=0.1, clip_norm=1.0), "leave clip_norm and clip_value out"),
        (lambda: line_loop(Faulty(lambda p, t: (p - t).mean() * 1j)).fit(batches(), epochs=1), "loss is complex.*take .abs"),
        (lambda: ax.locate_nonfinite(line_loop().objective, batches()[0]), r"locate_nonfinite\(Supervised, \.\.\.\): the Loop"),
        (lambda: ax.locate_nonfinite(line_loop(), ax.ArrayDataset(*table())), "a batch of tensors.*next\\(iter\\(ax.Loader"),
    ],
)
def test_what_users_of_torch_try_first_is_told_how_it_goes(make, words):
    with pytest.raises(ax.AxonError, match=f"(?s){words}"):
        make()


@pytest.mark.parametrize(
    ("options", "words", "absent"),
    [
        ({"factory": "muon"}, r"Give the others a group: groups=", None),
        ({"factory": "adamw", "betas": 0.9}, "AdamW cannot be made for 2 parameters", "Give the others"),
        ({"factory": "sgd", "nesterov": True}, "SGD cannot be made for 2 parameters", "Give the others"),
        ({"factory": "lbfgs", "groups": {"*.bias": {"max_iter": 2}}}, r"Leave groups= and no_decay= out", "Give the others"),
    ],
)
def test_an_optimizer_that_cannot_be_made_says_what_helps(options, words, absent):
    with pytest.raises(ax.OptimizerError, match=words) as caught:
        ax.Loop(ax.Supervised(nn.Linear(3, 1), "mse"), ax.Optimizer(lr=0.1, **options), progress=False)
    assert absent is None or absent not in str(caught.value)


@pytest.mark.parametrize("how", [{"directory": True}, {"average": "ema"}], ids=["directory", "average"])
def test_parameters_without_a_shape_can_be_trained_but_neither_saved_nor_averaged(tmp_path, how):
    def made(average=None, directory=False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1))
        return net, ax.Loop(
            ax.Supervised(net, "mse"),
            ax.Optimizer("adamw", lr=0.01, average=average),
            directory=tmp_path / "run" if directory else None,
            progress=False,
        )

    made()[1].fit(batches(), epochs=1)
    with pytest.raises(ax.ConfigurationError, match=r"model\.0\.weight, model\.0\.bias get their shapes from the first batch"):
        made(**how)[1].fit(batches(), epochs=1)
    net, loop = made(**how)
    net(batches()[0][0])
    loop.fit(batches(), epochs=1)


@pytest.mark.parametrize("seed", ["3", 1.5, True, torch.tensor(3.0), None.__class__])
def test_a_seed_that_could_not_be_saved_is_refused(seed):
    with pytest.raises(ax.ConfigurationError, match=r"seed=.*a whole number"):
        line_loop(seed=seed)


def test_a_seed_of_numpy_is_a_seed():
    loop = line_loop(seed=np.int64(3))
    loop.fit(batches(), epochs=1)
    again = line_loop()
    again.restore(loop.save())
    assert type(again.state.seed) is int


def test_what_has_nothing_to_train_says_so():
    class Listed(ax.Objective):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Linear(3, 1)]

        def predict(self, x):
            return self.layers[0](x)

        def loss(self, predictions, targets):
            return F.mse_loss(predictions, targets)

    with pytest.raises(ax.OptimizerError, match=r"Listed has no parameter.*nn.ModuleList.*in a plain list are not found"):
        line_loop(Listed()).fit(batches(), epochs=1)


@pytest.mark.parametrize(
    ("fit", "words"),
    [
        (lambda loop, x, y: loop.fit(ax.ArrayDataset(x, y), val=(x, y)), "'val'.*Perhaps validation= is meant"),
        (lambda loop, x, y: loop.fit(ax.ArrayDataset(x, y), max_epochs=3), "'max_epochs'.*Perhaps epochs= is meant"),
        (
            lambda loop, x, y: loop.fit(ax.ArrayDataset(x, y), epochs=1, validate=ax.ArrayDataset(x, y)),
            "it says when to validate",
        ),
        (
            lambda loop, x, y: loop.fit(x, y, epochs=1),
            r"fit\(Tensor\(24, 3\) float32, Tensor\(24, 1\) float32\): the second is data",
        ),
    ],
)
def test_what_other_frameworks_call_it_leads_to_what_is_meant(fit, words):
    with pytest.raises(ax.AxonError, match=words):
        fit(line_loop(), *table())


@pytest.mark.parametrize("step", [2, 4])
def test_a_schedule_that_is_not_finite_is_named_and_spoils_nothing(step):
    def schedule(progress):
        return 1.0 if progress < (step - 0.5) / 6 else float("nan")

    def torchs(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1.0 if done < step - 1 else float("inf"))

    for one in (schedule, torchs):
        loop = ax.Loop(ax.Supervised(nn.Linear(3, 1), "mse"), ax.Optimizer("sgd", lr=0.1, schedule=one), progress=False)
        with pytest.raises(ax.ConfigurationError, match=r"the schedule of the optimizer 'main'.*would spoil the weights"):
            loop.fit(batches(), epochs=1)
        assert all(torch.isfinite(p).all() for p in loop.objective.parameters())


def test_a_backward_of_ones_own_is_told_that_the_engine_does_it():
    class Own(ax.Objective):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

        def predict(self, x):
            return self.net(x)

        def train_step(self, batch):
            loss = F.mse_loss(self.net(batch[0]), batch[1])
            loss.backward()
            return ax.Step(loss)

    with pytest.raises(RuntimeError, match="a second time") as caught:
        line_loop(Own()).fit(batches(), epochs=1)
    assert "leave .backward() out of it" in notes(caught)


def test_a_model_on_the_meta_device_is_named():
    with torch.device("meta"):
        net = nn.Linear(3, 1)
    with pytest.raises(ax.ConfigurationError, match=r"model\.weight of the objective is on the meta device.*to_empty"):
        line_loop(ax.Supervised(net, "mse"))
