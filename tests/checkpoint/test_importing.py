import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from axontrain import ConfigurationError, cli
from axontrain.checkpoint import importing
from axontrain.checkpoint.weights import load_weights


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def same(module, other):
    return all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), other.state_dict().values(), strict=True))


class Evil:
    """What a pickle may do when it is read."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.fixture
def run(tmp_path, capsys):
    """Save a value and import it: the status, what was printed, and the errors without the warning."""

    def command(value, *arguments, name="old.pt", **options):
        if value is not None:
            torch.save(value, tmp_path / name, **options)
        status = cli.main(["import-weights", str(tmp_path / name), *map(str, arguments)])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return command


def error_of(ran, tmp_path):
    """The one line of an error; nothing was written."""
    status, out, err = ran
    assert (status, out) == (1, "")
    *warned, line = err.splitlines()
    assert len(warned) <= 1
    assert line.startswith("axontrain: ")
    assert not list(tmp_path.glob("*.safetensors*"))
    return line


# --- what is written -------------------------------------------------------------------------------------------------


def test_a_state_dict_becomes_a_file_that_load_weights_takes(run, tmp_path):
    status, out, err = run(net(1).state_dict())
    assert status == 0
    size = sum(value.nbytes for value in net(1).state_dict().values())
    target = tmp_path / "old.safetensors"
    assert out == f"wrote {target}: 9 tensors, {size} bytes\nload it with ax.load_weights(module, {str(target)!r})\n"
    (line,) = err.splitlines()
    for part in (
        "warning",
        str(tmp_path / "old.pt"),
        "no boundary",
        "CVE-2025-32434",
        "CVE-2026-24747",
        "2.10",
        "that you trust",
    ):
        assert part in line
    load_weights(module := net(2), target)
    assert same(module, net(1))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["old.pt", "old.safetensors"]


def test_the_command_in_a_process_of_its_own_whatever_torch_is_told(tmp_path):
    torch.save({"a": Evil(tmp_path / "evil")}, tmp_path / "old.pt")
    done = subprocess.run(
        [sys.executable, "-m", "axontrain.cli", "import-weights", tmp_path / "old.pt"],
        capture_output=True, text=True, timeout=60, check=False, env=os.environ | {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    warned, line = done.stderr.splitlines()
    assert warned.startswith("axontrain: warning: ")
    assert line.startswith(f"axontrain: {tmp_path / 'old.pt'} is refused: it asks for posix.mkdir")
    assert [file.name for file in tmp_path.iterdir()] == ["old.pt"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.pth", "a"), ("a.bin", "a"), ("a.CKPT", "a"), ("a.v1.pt", "a.v1"), ("a.v1", "a.v1"), ("a", "a")],
)
def test_the_name_that_it_gets(run, tmp_path, name, expected):
    assert run({"w": torch.ones(1)}, name=name)[0] == 0
    assert (tmp_path / f"{expected}.safetensors").is_file()


def test_another_name_and_a_link_to_the_file(run, tmp_path):
    torch.save({"w": torch.ones(1)}, tmp_path / "blob")
    (tmp_path / "old.pt").symlink_to(tmp_path / "blob")  # as the caches of hubs have them
    assert run(None, tmp_path / "new.safetensors")[0] == 0
    assert load_file(tmp_path / "new.safetensors")["w"].item() == 1


@pytest.mark.parametrize("legacy", [False, True])
def test_tied_sliced_and_transposed_tensors_are_written_each_whole(run, tmp_path, legacy):
    base = torch.arange(6.0).reshape(2, 3)
    values = {
        "a": base, "tied": base, "row": base[1], "turned": base.T, "expanded": torch.ones(1).expand(4),
        "empty": torch.zeros(0, 3), "scalar": torch.tensor(2), "half": base.bfloat16(), "mask": base > 2,
        "conj": torch.complex(base, base).conj(), "parameter": nn.Parameter(base.clone()),
    }  # fmt: skip
    assert run(values, _use_new_zipfile_serialization=not legacy)[0] == 0
    found = load_file(tmp_path / "old.safetensors")
    assert set(found) == set(values)
    for name, value in values.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value.detach()), name


# --- where the tensors are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", importing.WELL_KNOWN)
def test_a_well_known_key_is_taken_and_said(run, tmp_path, key):
    optimizer = {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": []}
    status, out, _ = run({key: net(1).state_dict(), "epoch": 3, "step": torch.tensor(7), "optimizer": optimizer})
    assert status == 0
    assert f"took what is under {key!r}; the other keys are left out: 'epoch', 'step', 'optimizer'\n" in out
    load_weights(module := net(2), tmp_path / "old.safetensors")
    assert same(module, net(1))


def test_a_well_known_key_below_another(run, tmp_path):
    status, out, _ = run({"model": {"state_dict": {"w": torch.ones(1)}}})
    assert status == 0
    assert "took what is under 'model'\ntook what is under 'state_dict'\n" in out


@pytest.mark.parametrize("key", ["ema.model", "a.b.c", "module.weights"])
def test_a_key_of_ones_own(run, tmp_path, key):
    value = {"ema": {"model": {"w": torch.ones(1)}}, "a.b": {"c": {"w": torch.ones(1)}}, "module.weights": {"w": torch.ones(1)}}
    assert run(value, "--key", key)[0] == 0
    assert list(load_file(tmp_path / "old.safetensors")) == ["w"]


def test_segments_of_wrappers_are_left_out(run, tmp_path):
    wrapped = nn.DataParallel(torch.compile(net(1), backend="eager"))
    status, out, _ = run(wrapped.state_dict())
    assert status == 0
    assert "left the segments of wrappers out of the names: 'module._orig_mod.0.weight' is '0.weight'\n" in out
    assert set(load_file(tmp_path / "old.safetensors")) == set(net(1).state_dict())


def test_what_is_no_tensor_is_named_and_left_out(run, tmp_path):
    value = {"w": torch.ones(1), "epoch": 3, 7: torch.ones(1), "_extra_state": {"scale": torch.ones(1)}, "a\x1b[2J": "\n"}
    status, out, _ = run(value)
    assert status == 0
    first, *_ = out.splitlines()
    assert first.startswith("left out what is no tensor with a name: 'epoch' (int), a key that is int (Tensor(1,) float32), ")
    assert first.endswith(r"'_extra_state' (dict), 'a\x1b[2J' (str)")
    assert list(load_file(tmp_path / "old.safetensors")) == ["w"]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"generator": {"w": torch.ones(1)}, "epoch": 1}, "say where it is with --key. Its keys: 'generator', 'epoch'"),
        (
            {"generator": {"w": torch.ones(1)}, "step": torch.ones(1)},
            "say where it is with --key. Its keys: 'generator', 'step'",
        ),
        ({"model": {"w": torch.ones(1)}, "net": {"w": torch.ones(1)}}, "several mappings of tensors, under 'model', 'net'"),
        ({"epoch": 1}, "Its keys: 'epoch'"),
        ({}, "Its keys: none"),
        ({5: torch.ones(1)}, "no tensor there has a name that is text. Its keys: a key that is int"),
        ([torch.ones(1)], "It is list"),
        (torch.ones(2), "It is Tensor(2,) float32"),
        (3, "It is int"),
        ({str(number): 1 for number in range(30)}, "'19' and 10 more"),
    ],
    ids=str,
)
def test_what_holds_no_flat_mapping_is_an_error_that_lists_its_keys(run, tmp_path, value, told):
    assert told in error_of(run(value), tmp_path)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("emma", "--key emma: there is no such key. Its keys: 'ema', 'model'"),
        ("ema.w", "--key ema.w: it is Tensor, no mapping with tensors"),
        ("ema.x", "no such key"),
        ("", "no such key"),
        (".", "no such key"),
    ],
)
def test_a_key_that_is_not_there_is_an_error(run, tmp_path, key, told):
    value = {"ema": {"w": torch.ones(1)}, "model": {"w": torch.ones(1)}}
    assert told.replace("Tensor,", "Tensor(1,) float32,") in error_of(run(value, "--key", key), tmp_path)


@pytest.mark.parametrize("tensors", [True, False])
def test_a_mapping_that_holds_itself_ends(run, tmp_path, tensors):
    value = {"w": torch.ones(1)} if tensors else {}
    value["model"] = value
    assert "--key" in error_of(run(value), tmp_path)


# --- what cannot be written ------------------------------------------------------------------------------------------


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is to do without them
        return torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.quint8)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: torch.eye(2).to_sparse(), "is a tensor that is not dense (torch.sparse_coo)"),
        (quantized, "safetensors holds no such tensor"),
        (lambda: torch.ones(2, dtype=torch.complex128), "safetensors holds no such tensor"),
        (lambda: torch.ones(2, device="meta"), "on meta"),
    ],
)
def test_tensors_that_safetensors_has_not_are_named(run, tmp_path, make, told):
    line = error_of(run(OrderedDict(good=torch.ones(1), bad=make())), tmp_path)
    assert "'bad'" in line
    assert told in line


@pytest.mark.parametrize("name", ["__metadata__", "$w"])
def test_names_that_are_reserved_are_an_error(run, tmp_path, name):
    assert name in error_of(run({name: torch.ones(1)}), tmp_path)


@pytest.mark.parametrize("kind", ["a file", "a directory", "a dangling link"])
def test_what_is_there_is_never_overwritten(run, tmp_path, kind):
    target = tmp_path / "old.safetensors"
    if kind == "a file":
        target.write_text("precious")
    elif kind == "a directory":
        target.mkdir()
    else:
        target.symlink_to(tmp_path / "nowhere")
    before = target.lstat()
    status, out, err = run({"w": torch.ones(1)})
    assert (status, out) == (1, "")
    assert err == f"axontrain: {target} is there already, and is left alone: remove it, or name another OUT\n"
    assert target.lstat().st_mtime_ns == before.st_mtime_ns
    assert sorted(file.name for file in tmp_path.iterdir()) == ["old.pt", "old.safetensors"]


def test_what_came_to_be_there_meanwhile_is_not_overwritten(run, tmp_path, monkeypatch):
    target = tmp_path / "old.safetensors"

    def late(*arguments, **options):
        save_file(*arguments, **options)
        target.write_text("precious")

    monkeypatch.setattr(importing, "save_file", late)
    assert run({"w": torch.ones(1)})[0] == 1
    assert target.read_text() == "precious"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["old.pt", "old.safetensors"]


def test_a_disk_that_is_full_leaves_nothing(run, tmp_path, monkeypatch):
    def full(tensors, path, **options):
        path.write_bytes(b"half")
        raise importing.SafetensorError("No space left on device")

    monkeypatch.setattr(importing, "save_file", full)
    assert "could not be written: No space left" in error_of(run({"w": torch.ones(1)}), tmp_path)


@pytest.mark.parametrize(
    ("out", "told"), [("new.pt", "its name ends in .safetensors"), ("none/new.safetensors", "No such file or directory")]
)
def test_where_it_cannot_be_written(run, tmp_path, out, told):
    assert told in error_of(run({"w": torch.ones(1)}, tmp_path / out), tmp_path)


# --- what cannot be read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torch", "legacy", "pickle", "nested"])
def test_a_pickle_that_would_run_something_is_refused(run, tmp_path, kind):
    evil = {"a": Evil(tmp_path / "evil")}
    if kind == "pickle":
        (tmp_path / "old.pt").write_bytes(pickle.dumps(evil, protocol=2))
        ran = run(None)
    elif kind == "nested":
        ran = run({"w": torch.ones(1), "model": [evil]})
    else:
        ran = run(evil, _use_new_zipfile_serialization=kind == "torch")
    line = error_of(ran, tmp_path)
    assert "is refused: it asks for posix.mkdir, and tensors need no such thing" in line
    assert "weights_only=False" not in line
    assert "`False`" not in line
    assert list(tmp_path.iterdir()) == [tmp_path / "old.pt"]


def test_a_whole_module_is_refused_and_never_read_in_another_way(run, tmp_path, monkeypatch):
    calls = []
    read = torch.load
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: calls.append(options) or read(*arguments, **options))
    line = error_of(run(net(1)), tmp_path)
    assert "it asks for torch.nn.modules.container.Sequential" in line
    assert "have it saved again as torch.save(model.state_dict(), ...)" in line
    assert calls == [{"map_location": "cpu", "weights_only": True}]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("train.py", b"import torch\nprint(1)\n", r"and begins with 'import torch\npri'"),
        ("data.jsonl", b'{"a": 1}\n', r"""and begins with '{"a": 1}\n'"""),
        ("old.pt", b"\x1b[2Jgone", r"and begins with '\x1b[2Jgone'"),
        ("old.pt", b"\xff\xfe", r"and begins with '\\xff\\xfe'"),
        ("old.pt", b"P", "and begins with 'P'"),
        ("old.pt", bytes(100), "and begins with "),
        ("old.pt", b"", "and is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_pickle_is_not_called_one(run, tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    status, out, err = run(None, name=name)
    assert (status, out) == (1, "")
    assert err.startswith(f"axontrain: {tmp_path / name} is refused: it is no file of torch.save, {told}")
    assert "warning" not in err
    assert err.count("\n") == 1
    assert err[:-1].isprintable()


def test_an_archive_of_something_else_and_safetensors_are_no_pickles(run, tmp_path):
    with zipfile.ZipFile(tmp_path / "old.pt", "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    status, _, err = run(None)
    assert (status, "warning" in err) == (1, False)
    assert "it is an archive without a pickle in it" in err
    save_file({"w": torch.ones(1)}, tmp_path / "new.bin")
    status, _, err = run(None, name="new.bin")
    assert (status, "warning" in err) == (1, False)
    assert "it looks like safetensors, which ax.load_weights reads as they are" in err
    load_weights(module := nn.ParameterDict({"w": torch.zeros(1)}), tmp_path / "new.bin")
    assert module["w"].item() == 1


@pytest.mark.parametrize("content", [b"PK\x03\x04" + bytes(50), b"\x80\x02}", b"\x80\x04\x95"])
def test_what_is_no_such_file_is_refused_in_one_line(run, tmp_path, content):
    (tmp_path / "old.pt").write_bytes(content)
    line = error_of(run(None), tmp_path)
    assert "old.pt is refused: torch.load(weights_only=True) cannot read it" in line


def test_a_truncated_file_is_refused(run, tmp_path):
    torch.save(net(1).state_dict(), tmp_path / "old.pt")
    content = (tmp_path / "old.pt").read_bytes()
    for length in range(1, len(content), len(content) // 20):
        (tmp_path / "old.pt").write_bytes(content[:length])
        assert "is refused" in error_of(run(None), tmp_path)


def test_a_torchscript_archive_is_refused(run, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is to do without it
        torch.jit.save(torch.jit.script(nn.Linear(2, 1)), tmp_path / "old.pt")
    assert "it is a TorchScript archive, a program" in error_of(run(None), tmp_path)


def test_lists_in_lists_without_end_are_not_looked_into(run, tmp_path):
    value = []
    for _ in range(100):
        value = [value, value, value, value]
    assert "is list" in error_of(run(value), tmp_path)
    assert run({"w": torch.ones(1), "lists": value})[0] == 0


@pytest.mark.parametrize(
    ("kind", "told"), [("nothing", "is not there"), ("a directory", "is a directory"), ("a pipe", "is no regular file")]
)
def test_what_is_no_file_is_said(run, tmp_path, kind, told):
    if kind == "a directory":
        (tmp_path / "old.pt").mkdir()
    elif kind == "a pipe":
        os.mkfifo(tmp_path / "old.pt")
    assert told in error_of(run(None), tmp_path)


def test_safetensors_need_no_import(run, tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    status, _, err = run(None, name="a.safetensors")
    assert status == 1
    assert "need not be imported: ax.load_weights reads it" in err


def test_an_old_torch_is_refused(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(1)}, tmp_path / "old.pt")
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.9.1"))
    with pytest.raises(ConfigurationError, match=r"this is torch 2\.9\.1, in which weights_only=True is broken"):
        importing.import_weights(tmp_path / "old.pt")
