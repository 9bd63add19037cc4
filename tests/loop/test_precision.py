"""Each precision computes in what it says, is never changed silently, and goes on bit for bit."""

import json
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from resume_runs import leaves
from torch import nn

import axontrain as ax
from axontrain.execution.precision import PERIOD, Precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def table(n=64, seed=0):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return ax.ArrayDataset(x, (x.sum(1) > 0).long())


class Seen(ax.Objective):
    """Remembers the dtypes that it saw."""

    metrics = ("accuracy",)

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))
        self.dtypes = set()

    def predict(self, x):
        logits = self.net(x)
        self.dtypes.add((self.training, x.dtype, logits.dtype))
        return logits

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


def made(precision, directory=None, *, start=0, stop=None, optimizer="adamw"):
    torch.manual_seed(start)
    optimizer = ax.Optimizer(optimizer, lr=0.01, clip_norm=1.0)
    loop = ax.Loop(Seen(), optimizer, precision=precision, progress=False, directory=directory)
    if stop is not None:
        loop.on("after_batch")(lambda state: ax.Stop("enough") if state.step == stop else None)
    return loop


@pytest.mark.parametrize(
    ("precision", "parameters", "inputs", "logits", "predictions"),
    [
        ("fp32", torch.float32, torch.float32, torch.float32, torch.float32),
        ("bf16", torch.float32, torch.float32, torch.bfloat16, torch.float32),
        ("fp16", torch.float32, torch.float32, torch.float16, torch.float32),
        ("bf16-true", torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("fp64", torch.float64, torch.float64, torch.float64, torch.float64),
    ],
)
def test_it_computes_in_what_it_says(precision, parameters, inputs, logits, predictions):
    loop = made(precision)
    result = loop.fit(table(), table(16, 1), epochs=8, batch_size=16)
    assert loop.objective.dtypes == {(True, inputs, logits), (False, inputs, logits)}
    assert {p.dtype for p in loop.objective.parameters()} == {parameters}
    states = loop.state.optimizers["main"].optimizers[0].state.values()
    momenta = {value.dtype for state in states for value in state.values() if value.dim()}
    assert momenta == {parameters}
    assert result.values["val/accuracy"] > 0.7
    assert loop.predict(table(16, 1)).dtype is predictions
    assert {batch.dtype for batch in loop.predict(table(16, 1), stream=True)} == {predictions}
    assert set(loop.evaluate(table(16, 1))) == {"loss", "accuracy"}
    loop.train_on_batch(table().gather(torch.arange(8)))
    assert loop.objective.dtypes == {(True, inputs, logits), (False, inputs, logits)}
    assert loop.check(table()).problems == []


def test_bf16_is_what_autocast_by_hand_gives():
    batches = list(ax.Loader(table(), 16))
    torch.manual_seed(0)
    net = Seen().net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, fused=True)
    seen = []
    loop = made("bf16", optimizer="sgd")
    loop.objective.net[3].p = net[3].p = 0.0
    loop.on("after_batch")(lambda state: seen.append(float(state.last.loss)))
    loop.fit(batches, epochs=2)
    by_hand = []
    for _ in range(2):
        for x, y in batches:
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(net(x), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            by_hand.append(loss.item())
    assert seen == by_hand


class Small(ax.Objective):
    """Gradients of 2^-30 through a product in half precision, which is below what float16 has."""

    def __init__(self, size=2.0**-30):
        super().__init__()
        self.net = nn.Linear(4, 4, bias=False)
        nn.init.ones_(self.net.weight)
        self.size = size

    def predict(self, x):
        return self.net(x)

    def loss(self, outputs, _):
        return (outputs.float() * self.size).sum() / len(outputs)


def unscaled(objective, precision, **fit):
    seen = []
    loop = ax.Loop(objective, ax.Optimizer("sgd", lr=1.0), precision=precision, progress=False)
    loop.on("after_backward")(lambda state: seen.append(state.objective.net.weight.grad.clone()))
    loop.fit([torch.ones(2, 4)], epochs=1, **fit)
    return seen[0], loop


@pytest.mark.parametrize("fit", [{}, {"microbatch": 1}])
def test_small_gradients_survive_in_fp16_and_hooks_see_them_unscaled(fit):
    with torch.autocast("cpu", torch.float16):
        objective = Small()
        objective.loss(objective.predict(torch.ones(2, 4)), None).backward()
    assert not objective.net.weight.grad.any()  # without a scale they vanish
    gradient, loop = unscaled(Small(), "fp16", **fit)
    torch.testing.assert_close(gradient, torch.full((4, 4), 2.0**-30), rtol=1e-3, atol=0)
    assert float(loop.state.last.loss) == pytest.approx(16 * 2.0**-30)


def test_an_overflow_halves_the_scale_changes_nothing_and_is_no_matter_of_warning():
    loop = ax.Loop(Small(2.0), ax.Optimizer("sgd", lr=1e-3), precision="fp16", progress=False)
    scaler, before = loop.state.attached["scaler"], loop.objective.net.weight.detach().clone()
    scales = []

    @loop.on("after_batch")
    def look(state):
        scales.append(float(scaler.scale))
        if len(scales) == 1:
            assert torch.equal(before, state.objective.net.weight)
            assert float(state.last.skipped) == 1

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop.fit([torch.ones(2, 4)] * 4, epochs=1)
    assert scales == [2.0**15, 2.0**14, 2.0**14, 2.0**14]
    assert loop.state.optimizers["main"].skipped == 2
    assert not torch.equal(before, loop.objective.net.weight)


def test_the_scale_doubles_at_its_period():
    loop = ax.Loop(Small(), ax.Optimizer("sgd", lr=1e-3), precision="fp16", progress=False)
    scaler = loop.state.attached["scaler"]
    scaler.good.fill_(PERIOD - 2)
    scales = []
    loop.on("after_batch")(lambda state: scales.append(float(scaler.scale)))
    loop.fit([torch.ones(2, 4)] * 3, epochs=1)
    assert scales == [2.0**16, 2.0**17, 2.0**17]


def test_a_loss_that_is_not_finite_is_told_all_the_same():
    loop = ax.Loop(Small(), ax.Optimizer("sgd", lr=1e-3), precision="fp16", progress=False)
    with pytest.warns(ax.NonFiniteWarning, match=r"1 update .* \(step 2"):
        loop.fit([torch.ones(2, 4), torch.full((2, 4), float("nan"))], epochs=1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_skipped_where_all_is_bfloat16(bad):
    loop = ax.Loop(Small(), ax.Optimizer("adamw", lr=0.1), precision="bf16-true", progress=False)
    loop.fit([torch.ones(2, 4)], epochs=1)
    before = {name: value.clone() for name, value in loop.objective.state_dict().items()}
    with pytest.warns(ax.NonFiniteWarning, match="1 update"):
        loop.fit([torch.full((2, 4), bad)], epochs=1)
    assert all(torch.equal(before[name], value) for name, value in loop.objective.state_dict().items())
    loop.fit([torch.ones(2, 4)], epochs=1)
    assert not all(torch.equal(before[name], value) for name, value in loop.objective.state_dict().items())


def test_gradients_that_never_fit_are_an_error_in_the_end():
    class Root(Small):
        def loss(self, outputs, _):
            return outputs.float().sub(outputs.detach().float()).abs().sqrt().sum()  # its gradient at 0 is infinite

    loop = ax.Loop(Root(), ax.Optimizer("sgd", lr=1e-3), precision="fp16", progress=False)
    with pytest.raises(ax.NonFiniteError, match="in a row"):
        loop.fit([torch.ones(2, 4)] * 60, epochs=1)


def test_several_optimizers_in_fp16():
    class Two(ax.Objective):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 1)

        def train_step(self, batch):
            hidden = self.a(batch)
            yield "b", self.b(hidden.detach()).square().mean()
            yield "a", self.b(hidden).square().mean()

    weights = {}
    for precision in ("fp32", "fp16"):
        torch.manual_seed(0)
        loop = ax.Loop(Two(), {n: ax.Optimizer("sgd", lr=0.1) for n in "ab"}, precision=precision, progress=False)
        if precision == "fp16":
            loop.state.attached["scaler"].scale.fill_(256)  # with which nothing overflows, so that no step is skipped
        loop.fit([torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) for i in range(5)], epochs=1)
        weights[precision] = loop.objective.a.weight.detach()
    torch.testing.assert_close(weights["fp16"], weights["fp32"], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16-true", "fp64"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, precision, stop):
    fit = {"epochs": 2, "batch_size": 16, "resume": True, "microbatch": 8 if stop == 3 else None}
    whole, again = made(precision, tmp_path / "whole"), made(precision, tmp_path / "run", start=1)
    result = whole.fit(table(), table(16, 1), **fit)
    made(precision, tmp_path / "run", stop=stop).fit(table(), table(16, 1), **fit)
    assert again.fit(table(), table(16, 1), **fit).values == result.values
    one, other = leaves(whole.save()), leaves(again.save())
    assert one.keys() == other.keys()
    assert ("/attached/scaler/scale" in one) == (precision == "fp16")
    for name, leaf in one.items():
        assert torch.equal(leaf, other[name]) if isinstance(leaf, torch.Tensor) else leaf == other[name], name


def test_another_precision_is_named_when_a_run_goes_on(tmp_path):
    made("fp32", tmp_path / "run", stop=3).fit(table(), epochs=2, batch_size=16, resume=True)
    with pytest.warns(ax.AxonWarning, match="the precision: it was 'fp32', and is 'bf16'"):
        made("bf16", tmp_path / "run").fit(table(), epochs=2, batch_size=16, resume=True)


def test_names_that_are_none_are_refused():
    with pytest.raises(ax.UnknownNameError, match="unknown precision 'bf16-mixed': did you mean 'bf16-true' or 'bf16'"):
        made("bf16-mixed")
    with pytest.raises(ax.UnknownNameError):
        made(16)


def test_float16_parameters_are_refused():
    objective = Small().half()
    with pytest.raises(ax.ConfigurationError, match=r"net\.weight are float16"):
        ax.Loop(objective, ax.Optimizer("sgd", lr=0.1), precision="fp16")


def test_tf32_is_said_to_have_no_effect_where_it_has_none():
    with pytest.warns(ax.AxonWarning, match="computed in full"):
        made("tf32")


def test_torchs_settings_are_as_they_were_even_after_an_error():
    places = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]
    before = [place.fp32_precision for place in places]
    during = []

    def fail():
        with Precision("tf32", CUDA).settings():
            during.extend(place.fp32_precision for place in places)
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        fail()
    assert during == ["tf32"] * 3
    assert [place.fp32_precision for place in places] == before


def test_predictions_can_be_taken_to_numpy():
    loop = made("bf16")
    assert np.asarray(loop.predict(table(8))).shape == (8, 2)


@pytest.mark.parametrize("patience", [3, 10])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_loss_that_is_not_finite_is_no_matter_of_its_scale(precision, patience):
    class Lost(Small):
        def loss(self, predictions, targets):
            return super().loss(predictions, targets) * float("nan")

    spec = ax.Optimizer("sgd", lr=1e-3, patience=patience)
    loop = ax.Loop(Lost(), spec, precision=precision, progress=False)
    batch = torch.ones(2, 4)
    with pytest.raises(ax.NonFiniteError, match=f"{patience} in a row, patience={patience}. The weights"):
        loop.fit([batch] * patience, epochs=1)
    other = ax.Loop(Lost(), spec, precision=precision, progress=False)  # counted across readings, and across a restart
    with pytest.warns(ax.NonFiniteWarning):
        other.fit([batch] * (patience - 1), epochs=1)
    again = ax.Loop(Lost(), spec, precision=precision, progress=False)
    again.restore(other.save())
    with pytest.raises(ax.NonFiniteError, match=f"{patience} in a row"):
        again.fit([batch], epochs=1)


def test_the_history_says_in_which_precision_it_was_read(tmp_path):
    directory = tmp_path / "run"
    for precision, epochs in (("fp32", 1), ("bf16", 2), ("fp32", 3)):
        loop = made(precision, directory=directory)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = loop.fit(table(), table(16, 1), epochs=epochs, batch_size=16, resume=True)
        assert [str(one.message) for one in caught if "the precision: it was" in str(one.message)] or epochs == 1
    assert [row.get("precision") for row in result.history.rows] == [None, "bf16", None]
    assert "precision" not in result.history.columns
    lines = [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]
    assert [line.get("precision") for line in lines] == [None, "bf16", None]
    assert "precision" not in str(result.history)


def in_float8(directory=None, *, start=0, stop=None, sizes=(16, 32, 16), **options):
    torch.manual_seed(start)
    first, second, third = sizes
    net = nn.Sequential(
        nn.Linear(first, second), nn.LayerNorm(second), nn.ReLU(), nn.Linear(second, third), nn.Linear(third, 2)
    )
    with pytest.warns(UserWarning, match="precision='fp8': this device has no float8, which is emulated"):
        loop = ax.Loop(
            ax.Supervised(net, "cross_entropy", metrics=["accuracy"]),
            ax.Optimizer("adamw", lr=0.01, **options),
            precision="fp8",
            device="cpu",
            progress=False,
            directory=directory,
        )
    if stop is not None:
        loop.on("after_batch")(lambda state: ax.Stop("enough") if state.step == stop else None)
    return loop


def wide(n=64, seed=0):
    x = torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))
    return ax.ArrayDataset(x, (x.sum(1) > 0).long())


def test_in_float8_it_learns_and_its_weights_are_those_of_any_precision(tmp_path):
    pytest.importorskip("torchao")
    loop = in_float8()
    before = dict(loop.objective.named_parameters())
    result = loop.fit(wide(), wide(32, 1), epochs=8, batch_size=24)
    assert result.values["val/accuracy"] > 0.7
    assert [type(part).__name__ for part in loop.objective.model] == [
        "Float8Linear",
        "LayerNorm",
        "ReLU",
        "Float8Linear",
        "Linear",
    ]
    assert dict(loop.objective.named_parameters()) == before
    assert {p.dtype for p in before.values()} == {torch.float32}
    assert loop.check(wide()).problems == []
    other = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 2))
    ax.load_weights(other, loop.save(tmp_path / "state"), prefix="model.")
    assert torch.equal(other[0].weight, loop.objective.model[0].weight)
    torch.testing.assert_close(loop.predict(wide(8)), other(wide(8).tensors[0]), rtol=0.1, atol=0.2)
    assert not torch.allclose(loop.predict(wide(8)), other(wide(8).tensors[0]), rtol=1e-4, atol=1e-4), "it rounds"


@pytest.mark.parametrize("step", [3, 6, 10])
@pytest.mark.parametrize("options", [{}, {"average": "ema", "clip_norm": 1.0}], ids=["plain", "average"])
def test_in_float8_a_run_goes_on_bitwise(tmp_path, step, options):
    pytest.importorskip("torchao")
    whole, broken = in_float8(**options), in_float8(tmp_path, stop=step, **options)
    again = in_float8(tmp_path, start=1, **options)
    whole.fit(wide(), epochs=3, batch_size=16)
    broken.fit(wide(), epochs=3, batch_size=16)
    again.fit(wide(), epochs=3, batch_size=16, resume=True)
    for (name, one), other in zip(whole.objective.state_dict().items(), again.objective.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_in_float8_what_is_not_finite_is_skipped_and_found():
    pytest.importorskip("torchao")
    loop = in_float8(patience=2)
    bad = (torch.full((8, 16), float("nan")), torch.zeros(8, dtype=torch.long))
    before = {name: p.clone() for name, p in loop.objective.named_parameters()}
    with pytest.raises(ax.NonFiniteError, match="2 in a row") as caught:
        loop.fit([bad, bad], epochs=1)
    assert all(torch.equal(before[name], p) for name, p in loop.objective.named_parameters())
    assert any("computed again: first not finite" in note for note in caught.value.__notes__)
    found = ax.locate_nonfinite(loop, bad)
    assert found is not None
    good = (torch.zeros(8, 16), torch.zeros(8, dtype=torch.long))
    assert ax.locate_nonfinite(loop, good) is None


def test_in_float8_without_a_layer_that_fits_is_refused(monkeypatch):
    with pytest.raises(ax.ConfigurationError, match=r"multiples of 16, and there is none: .*net\.0 \(6 to 16\)"):
        ax.Loop(Seen(), ax.Optimizer("sgd", lr=0.1), precision="fp8", progress=False)
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ax.MissingExtraError, match=r"precision='fp8' needs torchao.*axontrain\[fp8\]"):
        ax.Loop(ax.Supervised(nn.Linear(16, 16), "mse"), ax.Optimizer("sgd", lr=0.1), precision="fp8", progress=False)


def test_in_float8_a_layer_in_several_places_is_one_and_keeps_its_hooks():
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    shared = nn.Linear(16, 16)
    net = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(16, 2))
    calls = []
    shared.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="emulated"):
        loop = ax.Loop(ax.Supervised(net, "cross_entropy"), ax.Optimizer("sgd", lr=0.1), precision="fp8", progress=False)
    first, last = loop.objective.model[0], loop.objective.model[2]
    assert first is last
    assert type(first).__name__ == "Float8Linear"
    loop.fit(wide(16), epochs=1, batch_size=16)
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_in_float8_a_layer_whose_weight_is_computed_is_let_be():
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    net = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(16, 16)), nn.Linear(16, 16), nn.Linear(16, 2))
    with pytest.warns(UserWarning, match="emulated"):
        loop = ax.Loop(ax.Supervised(net, "cross_entropy"), ax.Optimizer("sgd", lr=0.1), precision="fp8", progress=False)
    assert [type(part).__name__ for part in loop.objective.model] == ["Linear", "Float8Linear", "Linear"]
    loop.fit(wide(16), epochs=1, batch_size=16)


CHANGES = [("fp32", "bf16-true"), ("bf16-true", "fp32"), ("fp32", "fp64"), ("fp64", "fp32")]


@pytest.mark.parametrize(("before", "after"), CHANGES, ids=lambda value: value)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "nadam", "radam", "rmsprop", "adafactor", "muon", "lbfgs"])
def test_a_run_that_goes_on_in_another_precision_has_its_state_in_that(tmp_path, optimizer, before, after):
    def loop_in(precision):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 2, bias=False))
        options = {"momentum": 0.9} if optimizer == "sgd" else {}
        spec = ax.Optimizer(optimizer, lr=0.01, **options)
        return ax.Loop(ax.Supervised(net, "cross_entropy"), spec, precision=precision, progress=False, directory=tmp_path)

    loop_in(before).fit(table(), epochs=1, batch_size=16)
    again = loop_in(after)
    with pytest.warns(UserWarning, match="the precision: it was"):
        again.fit(table(), epochs=2, batch_size=16, resume=True)
    assert again.state.step == 8
    assert all(torch.isfinite(p).all() for p in again.objective.parameters())


class Images(ax.Objective):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2)
        )
        self.seen = []

    def predict(self, images):
        self.seen.append(images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous())
        return self.net(images)

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


def test_channels_last_is_the_same_training(tmp_path):
    generator = torch.Generator().manual_seed(0)
    data = ax.ArrayDataset(torch.randn(48, 3, 8, 8, generator=generator), torch.randint(2, (48,), generator=generator))
    loops = []
    for channels_last in (False, True):
        torch.manual_seed(0)
        loop = ax.Loop(
            Images(),
            ax.Optimizer("adamw", lr=1e-3),
            channels_last=channels_last,
            progress=False,
            directory=tmp_path / str(channels_last),
        )
        loop.fit(data, data, epochs=2, batch_size=16)
        loop.train_on_batch((data[:16][0], data[:16][1]))
        loop.evaluate(data)
        loop.predict(data)
        assert set(loop.objective.seen) == {channels_last}
        assert loop.objective.net[0].weight.is_contiguous(memory_format=torch.channels_last) == channels_last
        loops.append(loop)
    for a, b in zip(*(loop.objective.state_dict().values() for loop in loops), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)  # Adam makes much of a rounding error
    again = ax.Loop(Images(), ax.Optimizer("adamw", lr=1e-3), channels_last=True, progress=False, directory=tmp_path / "False")
    with pytest.warns(ax.AxonWarning, match="channels_last: it was False, and is True"):
        again.fit(data, data, epochs=3, batch_size=16, resume=True)
    assert again.objective.net[0].weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ax.ConfigurationError, match="channels_last='yes': True or False"):
        ax.Loop(Images(), channels_last="yes")
