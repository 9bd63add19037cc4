import json
import os
import pickle
import re
import sys
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import axontrain as ax
from axontrain import CheckpointError, ConfigurationError
from axontrain.checkpoint import name_of, weights, write
from axontrain.checkpoint.weights import load_weights


def net(seed, width=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 1))


def compiled(module):
    return torch.compile(module, backend="eager")


class Objective(ax.Objective):
    def __init__(self, seed, wrap=lambda module: module):
        super().__init__()
        self.net = wrap(net(seed))
        self.scale = nn.Parameter(torch.ones(1))

    def predict(self, inputs):
        return self.net(inputs) * self.scale

    def loss(self, predictions, targets):
        return (predictions - targets).pow(2).mean()


def same(module, other):
    return all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), other.state_dict().values(), strict=True))


def saved(path, module, prefix=""):
    save_file({f"{prefix}{name}": value.clone() for name, value in module.state_dict().items()}, path)
    return path


@pytest.fixture
def unchanged():
    """A module, checked to be as it was when the test is over."""
    module, twin = net(9), net(9)
    yield module
    assert same(module, twin)


# --- where from ------------------------------------------------------------------------------------------------------


def test_from_a_checkpoint_directory(tmp_path):
    write(tmp_path / "state", {"objective": dict(Objective(1).state_dict()), "counters": {}})
    objective = Objective(2)
    assert load_weights(objective, tmp_path / "state") == ([], [])
    assert same(objective, Objective(1))


def test_from_a_checkpoint_by_its_file_of_tensors(tmp_path):
    loop = ax.Loop(Objective(0), ax.Optimizer("sgd", lr=0.1, momentum=0.9), progress=False)
    loop.fit([(torch.ones(4, 2), torch.ones(4, 1))], epochs=1)
    path = loop.save(tmp_path / "state")
    other = Objective(1)
    load_weights(other, path / "tensors.safetensors")
    assert same(loop.objective, other)


def test_from_the_newest_good_checkpoint_of_a_run_directory(tmp_path):
    for step in (5, 10, 20):
        write(tmp_path / name_of(step), {"objective": dict(Objective(step).state_dict())})
    objective = Objective(2)
    load_weights(objective, str(tmp_path))
    assert same(objective, Objective(20))
    (tmp_path / name_of(20) / "tensors.safetensors").write_bytes(b"")
    with pytest.warns(ax.AxonWarning, match="damaged"):
        load_weights(objective, tmp_path)
    assert same(objective, Objective(10))


def test_from_what_a_loop_saved(tmp_path):
    data = ax.ArrayDataset(torch.randn(8, 2), torch.randn(8, 1))
    loop = ax.Loop(Objective(1), ax.Optimizer("sgd", lr=0.1), progress=False, device="cpu")
    loop.fit(data, epochs=1, batch_size=4)
    loop.save(tmp_path / "saved")
    inner = net(3)
    load_weights(inner, tmp_path / "saved", prefix="net.")
    assert same(inner, loop.objective.net)


def test_from_a_file(tmp_path):
    module = net(2)
    result = load_weights(module, saved(tmp_path / "a.safetensors", net(1)))
    assert result.missing_keys == result.unexpected_keys == []
    assert same(module, net(1))


# --- names -----------------------------------------------------------------------------------------------------------

WRAPS = {"compiled": compiled, "parallel": nn.DataParallel, "both": lambda module: compiled(nn.DataParallel(module))}


@pytest.mark.parametrize("there", ["plain", *WRAPS])
@pytest.mark.parametrize("here", ["plain", *WRAPS])
def test_what_is_wrapped_here_or_there_does_not_matter(tmp_path, there, here):
    wrap = {"plain": lambda module: module, **WRAPS}
    module = net(2)
    assert load_weights(wrap[here](module), saved(tmp_path / "a.safetensors", wrap[there](net(1)))) == ([], [])
    assert same(module, net(1))


@pytest.mark.parametrize("there", ["plain", *WRAPS])
def test_wrapped_below_a_prefix(tmp_path, there):
    wrap = {"plain": lambda module: module, **WRAPS}[there]
    write(tmp_path / "state", {"objective": dict(Objective(1, wrap).state_dict())})
    for prefix in ("net.", "net"):
        module = compiled(net(2))
        assert load_weights(module, tmp_path / "state", prefix=prefix) == ([], [])
        assert same(module, net(1))
    outside = compiled(nn.DataParallel(Objective(1, wrap)))
    load_weights(module := net(2), saved(tmp_path / "a.safetensors", outside), prefix="net.")
    assert same(module, net(1))


def test_an_attribute_that_is_called_module_is_not_taken_for_a_wrapper(tmp_path):
    class Own(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.module = net(seed)

    for wrap in (lambda module: module, *WRAPS.values()):
        file = saved(tmp_path / "a.safetensors", wrap(Own(1)))
        load_weights(own := Own(2), file)
        assert same(own, Own(1))
        file.unlink()


def test_a_prefix_is_whole_segments(tmp_path):
    save_file({"net.w": torch.ones(1), "network.w": torch.zeros(1), "w": torch.zeros(1)}, tmp_path / "a.safetensors")
    module = nn.ParameterDict({"w": torch.zeros(1)})
    assert load_weights(module, tmp_path / "a.safetensors", prefix="net") == ([], [])
    assert module["w"].item() == 1


def test_a_tied_tensor_may_be_there_once(tmp_path):
    def tied(seed):
        torch.manual_seed(seed)
        one = nn.Linear(2, 2)
        return nn.Sequential(one, one)

    save_file({name: value for name, value in tied(1).state_dict().items() if name.startswith("0")}, tmp_path / "a.safetensors")
    module = tied(2)
    assert load_weights(module, tmp_path / "a.safetensors") == ([], [])
    assert same(module, tied(1))


def test_values_take_the_dtype_of_the_module(tmp_path):
    module = net(2).half()
    load_weights(module, saved(tmp_path / "a.safetensors", net(1)))
    assert same(module, net(1).half())
    save_file({"w": torch.tensor([3])}, tmp_path / "b.safetensors")
    module = nn.ParameterDict({"w": torch.zeros(1)})
    load_weights(module, tmp_path / "b.safetensors")
    assert module["w"].item() == 3


def test_lazy_modules_take_the_shape_that_they_get(tmp_path):
    module = nn.LazyLinear(3)
    load_weights(module, saved(tmp_path / "a.safetensors", nn.Linear(2, 3)))
    assert module(torch.ones(1, 2)).shape == (1, 3)


class Counting(nn.Linear):
    state: object = None

    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        self.state = state["calls"]


def test_extra_state_is_the_modules_own_affair(tmp_path):
    write(tmp_path / "state", {"objective": dict(Counting(2, 1).state_dict())})
    module = Counting(2, 1)
    load_weights(compiled(module), tmp_path / "state")
    assert module.state == 3
    write(tmp_path / "state", {"objective": {**Counting(2, 1).state_dict(), "_extra_state": 5}})
    with pytest.raises(CheckpointError, match="which may hold a part of it now"):
        load_weights(module, tmp_path / "state")


# --- what does not fit -----------------------------------------------------------------------------------------------


def refusal(module, path, **options):
    with pytest.raises(CheckpointError) as raised:
        load_weights(module, path, **options)
    return str(raised.value)


def test_names_that_differ_are_listed(tmp_path, unchanged):
    values = {name: value.clone() for name, value in net(1).state_dict().items() if not name.startswith("2")}
    save_file({**values, "head.w": torch.ones(1)}, tmp_path / "a.safetensors")
    told = refusal(unchanged, tmp_path / "a.safetensors")
    assert f"{tmp_path / 'a.safetensors'} does not fit this Sequential, nothing was loaded: " in told
    assert "it lacks '2.weight', '2.bias'; the module lacks 'head.w'" in told
    assert "prefix" not in told


def test_not_strict_loads_what_fits_and_says_what_did_not(tmp_path):
    values = {name: value.clone() for name, value in net(1).state_dict().items() if not name.startswith("2")}
    save_file({**values, "head.w": torch.ones(1)}, tmp_path / "a.safetensors")
    module = net(2)
    result = load_weights(compiled(module), tmp_path / "a.safetensors", strict=False)
    assert result == (["2.weight", "2.bias"], ["head.w"])
    assert (result.missing_keys, result.unexpected_keys) == result
    assert same(module[:2], net(1)[:2])
    assert same(module[2], net(2)[2])


@pytest.mark.parametrize("strict", [True, False])
def test_where_nothing_fits_it_is_an_error(tmp_path, unchanged, strict):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    assert "the module lacks 'a'" in refusal(unchanged, tmp_path / "a.safetensors", strict=strict)
    save_file({}, tmp_path / "b.safetensors")
    assert "it lacks '0.weight'" in refusal(unchanged, tmp_path / "b.safetensors", strict=strict)
    assert "there is nothing in it" in refusal(nn.ReLU(), tmp_path / "b.safetensors", strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_shapes_that_differ_are_an_error(tmp_path, unchanged, strict):
    told = refusal(unchanged, saved(tmp_path / "a.safetensors", net(1, width=4)), strict=strict)
    assert "7 of its tensors are of another kind: '0.weight' is (4, 2) there, (3, 2) here" in told


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("here", "there"),
    [
        (torch.float32, torch.complex64),
        (torch.int64, torch.float32),
        (torch.bool, torch.float16),
        (torch.int64, torch.complex64),
    ],
    ids=str,
)
def test_what_conversion_would_spoil_is_an_error(tmp_path, here, there, strict):
    module = nn.Module()
    module.register_buffer("b", torch.zeros(2, dtype=here))
    save_file({"b": torch.ones(2, dtype=there)}, tmp_path / "a.safetensors")
    told = refusal(module, tmp_path / "a.safetensors", strict=strict)
    assert f"'b' is Tensor(2,) {str(there)[6:]} there, Tensor(2,) {str(here)[6:]} here" in told
    assert not module.b.any()


def test_a_module_that_holds_nothing_yet_is_an_error(tmp_path):
    with torch.device("meta"):
        module = nn.Linear(2, 1)
    told = refusal(module, saved(tmp_path / "a.safetensors", nn.Linear(2, 1)))
    assert "'weight' is on the meta device here" in told
    assert "to_empty" in told


def test_the_prefix_that_would_fit_is_said(tmp_path, unchanged):
    write(tmp_path / "state", {"objective": dict(Objective(1, compiled).state_dict())})
    for strict in (True, False):
        told = refusal(unchanged, tmp_path / "state", strict=strict)
        prefix = re.search(r"It would fit with prefix='(.*)'$", told)[1]
    assert load_weights(net(2), tmp_path / "state", prefix=prefix) == ([], [])
    write(tmp_path / "plain", {"objective": dict(Objective(1).state_dict())})
    assert refusal(unchanged, tmp_path / "plain").endswith("It would fit with prefix='net.'")


def test_all_prefixes_that_would_fit_are_said(tmp_path, unchanged):
    save_file({f"{side}.{k}": v.clone() for side in "ab" for k, v in net(1).state_dict().items()}, tmp_path / "a.safetensors")
    assert refusal(unchanged, tmp_path / "a.safetensors").endswith("It would fit with prefix='a.' or prefix='b.'")


def test_an_averaged_model_fits_with_the_prefix_that_is_said(tmp_path, unchanged):
    file = saved(tmp_path / "a.safetensors", AveragedModel(net(1)))
    assert refusal(unchanged, file).endswith("It would fit with prefix='module.'")
    load_weights(module := net(2), file, prefix="module.")
    assert same(module, net(1))


def test_the_part_of_the_module_that_would_fit_is_said(tmp_path):
    file = saved(tmp_path / "a.safetensors", nn.DataParallel(net(1)))
    assert refusal(Objective(2), file).endswith("It fits a part of the module, 'net': give that in its place")


def test_a_prefix_with_nothing_below_it_offers_those_that_are_there(tmp_path, unchanged):
    file = saved(tmp_path / "a.safetensors", Objective(1))
    assert "below 'nut.' there is nothing; its names begin with 'net.'" in refusal(unchanged, file, prefix="nut.")


def test_names_of_strangers_are_shown_as_what_they_are(tmp_path, unchanged):
    save_file({"\x1b[2J\nnet": torch.ones(1), "x" * 9999: torch.ones(1)}, tmp_path / "a.safetensors")
    told = refusal(unchanged, tmp_path / "a.safetensors")
    assert r"'\x1b[2J\nnet'" in told
    assert len(told) < 1000


def test_many_names_take_no_time(tmp_path, unchanged):
    value = torch.zeros(0)
    write(tmp_path / "state", {"objective": {f"{number}.0.weight": value for number in range(5_000)}})
    assert "and 4,994 more" in refusal(unchanged, tmp_path / "state")


# --- what cannot be read ---------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.safetensors", "a"])
@pytest.mark.parametrize("kind", ["torch", "legacy", "pickle"])
def test_a_pickle_is_not_read_and_the_way_out_is_said(tmp_path, unchanged, name, kind):
    file = tmp_path / name
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Evil(tmp_path / "evil")))
    else:
        torch.save({"a": Evil(tmp_path / "evil")}, file, _use_new_zipfile_serialization=kind == "torch")
    told = refusal(unchanged, file)
    assert f"`axontrain import-weights {file}` makes a .safetensors of it" in told
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name", ["train.py", "a.pt", "a.bin"])
def test_a_text_is_not_called_a_pickle(tmp_path, unchanged, name):
    (tmp_path / name).write_text("import torch\n")
    told = refusal(unchanged, tmp_path / name)
    assert "cannot be read as safetensors" in told
    assert "pickle" not in told


def header_of(path, names):
    header = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    return path


def test_more_tensors_than_anybody_has_are_not_read(tmp_path, unchanged, monkeypatch):
    monkeypatch.setattr(weights.directory, "load_file", lambda path: pytest.fail("it was read"))
    file = header_of(tmp_path / "a.safetensors", map(str, range(weights.MOST_TENSORS + 2)))
    assert f"{file} has more than 100,000 tensors, which are not read" in refusal(unchanged, file)
    long = header_of(tmp_path / "b.safetensors", ["x" * weights.MOST_HEADER])
    assert "has a header of 67,10" in refusal(unchanged, long)


def test_what_is_said_about_the_tensors_may_have_braces(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"tags": json.dumps([{}] * 50_000)})
    load_weights(module := nn.ParameterDict({"w": torch.zeros(1)}), tmp_path / "a.safetensors")
    assert module["w"].item() == 1


@pytest.mark.parametrize("segment", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_names_of_forged_files_take_no_time(tmp_path, unchanged, segment, prefix):
    deep = header_of(tmp_path / "a.safetensors", [f"{segment * 40_000}w"])
    # All of them with many ways to be read, and prefixes to be tried.
    tails = [f"p{number % 60}.{'q.' * (number // 60)}weight" for number in range(9_000)]
    many = header_of(tmp_path / "b.safetensors", [f"{segment * 12}{tail}" for tail in tails])
    started = time.process_time()
    for file in (deep, many):
        assert len(refusal(unchanged, file, prefix=prefix)) < 3000
    assert time.process_time() - started < 5


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"{}", b"\x02" + b"\0" * 7 + b"{]", b"\xff" * 20, bytes(100), b"\x80"])
def test_what_is_no_safetensors_is_an_error(tmp_path, unchanged, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    assert str(tmp_path / "a.safetensors") in refusal(unchanged, tmp_path / "a.safetensors")


def test_a_header_may_have_a_length_that_looks_like_a_pickle(tmp_path):
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(0x0280)
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    module = nn.ParameterDict({"w": torch.ones(1)})
    load_weights(module, tmp_path / "a.safetensors")
    assert module["w"].item() == 0


@pytest.mark.parametrize("kind", ["a link", "a dangling link", "a pipe", "nothing", "an empty directory"])
def test_what_is_no_file_is_an_error(tmp_path, unchanged, kind):
    path = tmp_path / "a.safetensors"
    told = "is not there"
    if kind == "a link":
        path.symlink_to(saved(tmp_path / "real.safetensors", net(1)))
        told = f"is a link, and what it leads to may change: give {str(tmp_path / 'real.safetensors')!r} itself"
    elif kind == "a dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "a pipe":
        os.mkfifo(path)
        told = "is no regular file"
    elif kind == "an empty directory":
        path.mkdir()
        told = "is no checkpoint and holds none"
    assert told in refusal(unchanged, path)


def test_a_damaged_checkpoint_is_an_error(tmp_path, unchanged):
    write(tmp_path / "state", {"objective": dict(net(1).state_dict())})
    (tmp_path / "state" / "tensors.safetensors").write_bytes(b"")
    assert "damaged" in refusal(unchanged, tmp_path / "state")
    (tmp_path / "state" / "manifest.json").unlink()
    assert "no manifest.json" in refusal(unchanged, tmp_path / "state")


@pytest.mark.parametrize("tree", [{}, [], None, {"objective": 3}, {"objective": [1]}], ids=str)
def test_a_checkpoint_of_something_else_is_an_error(tmp_path, unchanged, tree):
    write(tmp_path / "state", tree)
    assert "holds no weights of an objective" in refusal(unchanged, tmp_path / "state")


def test_values_that_are_no_tensors_are_an_error(tmp_path, unchanged):
    write(tmp_path / "state", {"objective": {**net(1).state_dict(), "0.weight": [1.0, 2.0]}})
    assert "'0.weight' is list there, a tensor here" in refusal(unchanged, tmp_path / "state")


def test_what_is_no_module_is_an_error(tmp_path):
    loop = ax.Loop(Objective(1), progress=False, device="cpu")
    with pytest.raises(ConfigurationError, match=r"not Loop: give loop\.objective"):
        load_weights(loop, tmp_path)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (None, "reads a path, not NoneType: give a checkpoint, a run directory"),
        (torch.ones(2), r"reads a path, not Tensor\(2,\) float32: .* or what loop\.save\(\) gave"),
        (b"a.safetensors", "reads a path, not bytes"),
        (3, "reads a path, not int"),
        ({"0.weight": torch.ones(2)}, r"this one has no 'objective': a state_dict goes into module\.load_state_dict"),
    ],
    ids=["None", "a tensor", "bytes", "a number", "a state_dict"],
)
def test_what_is_no_path_is_an_error_that_says_what_to_give(unchanged, path, told):
    with pytest.raises(ConfigurationError, match=told):
        load_weights(unchanged, path)


@pytest.mark.parametrize(
    "options", [{"strict": "no"}, {"strict": None}, {"strict": 1}, {"prefix": 3}, {"prefix": b"net."}], ids=str
)
def test_options_of_another_kind_are_an_error(tmp_path, unchanged, options):
    file = saved(tmp_path / "a.safetensors", net(1))
    ((name, _),) = options.items()
    with pytest.raises(ConfigurationError, match=f"^{name}="):
        load_weights(unchanged, file, **options)


def test_no_prefix_may_be_none(tmp_path):
    assert load_weights(module := net(2), saved(tmp_path / "a.safetensors", net(1)), prefix=None) == ([], [])
    assert same(module, net(1))


def test_from_a_snapshot_in_memory():
    loop = ax.Loop(Objective(1), progress=False, device="cpu")
    snapshot = loop.save()
    load_weights(objective := Objective(2), snapshot)
    assert same(objective, loop.objective)
    load_weights(module := net(2), snapshot, prefix="net.")
    assert same(module, loop.objective.net)
    with torch.no_grad():
        module[0].weight.zero_()
    assert same(objective, loop.objective)
    with pytest.raises(CheckpointError, match="the snapshot holds no weights of an objective"):
        load_weights(module, {"objective": 3})
    with pytest.raises(CheckpointError, match=r"the snapshot does not fit this Sequential, .* with prefix='net\.'"):
        load_weights(module, snapshot)


def test_a_network_that_was_kept_twice_is_said_to_be_the_same(tmp_path):
    class Twice(Objective):
        def __init__(self, seed):
            super().__init__(seed)
            self.fast = compiled(self.net)

    write(tmp_path / "twice", {"objective": dict(Twice(1).state_dict())})
    told = refusal(Objective(2), tmp_path / "twice")
    assert "the module lacks 'fast._orig_mod.0.weight'" in told
    assert "which hold what 'net.0.weight', 'net.0.bias', 'net.1.weight'" in told
    assert told.endswith("and 3 more hold: strict=False leaves them out")
    load_weights(objective := Objective(2), tmp_path / "twice", strict=False)
    assert same(objective, Objective(1))
    write(tmp_path / "once", {"objective": dict(Objective(1).state_dict())})
    assert load_weights(twice := Twice(2), tmp_path / "once") == ([], [])  # one name of a tied tensor is enough
    assert same(twice, Twice(1))
    state = dict(Twice(1).state_dict())
    state["fast._orig_mod.0.weight"] = torch.zeros_like(state["net.0.weight"])
    write(tmp_path / "other", {"objective": state})
    assert "leaves them out" not in refusal(Objective(2), tmp_path / "other")


def test_nothing_is_imported_or_written(tmp_path):
    files = [saved(tmp_path / "a.safetensors", net(1)), write(tmp_path / "state", {"objective": dict(net(1).state_dict())})]
    load_weights(net(2), files[0])  # whatever is imported when first needed
    modules, listed = set(sys.modules), {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    for file in files:
        load_weights(net(2), file)
    assert set(sys.modules) == modules
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == listed


@pytest.mark.parametrize("strict", [True, False])
def test_one_parameter_here_and_two_that_differ_there_is_an_error(tmp_path, strict):
    def model(tied):
        torch.manual_seed(int(tied))
        net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
        if tied:
            net[1].weight = net[0].weight
        return net

    apart, one = model(False), model(True)
    path = saved(tmp_path / "apart.safetensors", apart)
    with pytest.raises(CheckpointError, match=r"0\.weight and 1\.weight are one parameter here, and two that differ there"):
        load_weights(one, path, strict=strict)
    with torch.no_grad():
        apart[1].weight.copy_(apart[0].weight)
    load_weights(one, saved(path, apart), strict=strict)
    assert torch.equal(one[0].weight, apart[0].weight)


def test_a_state_of_two_that_differ_is_refused_by_a_loop_of_one():
    class Words(ax.Objective):
        def __init__(self, tied):
            super().__init__()
            self.words, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            if tied:
                self.out.weight = self.words.weight

        def predict(self, x):
            return self.out(self.words(x))

        def loss(self, predictions, targets):
            return nn.functional.cross_entropy(predictions, targets)

    apart, one = (ax.Loop(Words(tied), ax.Optimizer("sgd", lr=0.1), progress=False) for tied in (False, True))
    with pytest.raises(CheckpointError, match="are one parameter here, and two that differ there"):
        one.restore(apart.save(), only="objective")
