import errno
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from axontrain import CheckpointError
from axontrain.checkpoint import directory, name_of, read, write

TENSORS, STATE, ABOUT, MANIFEST = FILES = ("tensors.safetensors", "state.json", "about.json", "manifest.json")


def tree(number=0):
    return {"number": number, "weights": [torch.full((8,), float(number)), torch.arange(3)], "none": None}


def assert_whole(found, number):
    assert found["number"] == number
    assert found["weights"][0].tolist() == [number] * 8


@pytest.fixture
def saved(tmp_path):
    return write(tmp_path / "saved", tree(), {"number": 0})


def forge(path, **files):
    """Put other bytes into a checkpoint, and a manifest that fits them: what a hash cannot guard against."""
    for name, content in files.items():
        (path / {"tensors": TENSORS, "state": STATE}[name]).write_bytes(content)
    listed = {
        name: {"size": (path / name).stat().st_size, "sha256": hashlib.sha256((path / name).read_bytes()).hexdigest()}
        for name in (TENSORS, STATE)
    }
    (path / MANIFEST).write_text(json.dumps({"format": 1, "files": listed}))
    return path


def beside(path):
    return sorted(file.name for file in path.parent.iterdir())


def in_own_process(script, *arguments):
    """Run a script and give what it printed, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_four_files_that_the_manifest_describes(saved):
    assert sorted(file.name for file in saved.iterdir()) == sorted(FILES)
    manifest = json.loads((saved / MANIFEST).read_text())
    assert manifest["format"] == 1
    for name in (TENSORS, STATE, ABOUT):
        content = (saved / name).read_bytes()
        assert manifest["files"][name] == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_name_sorts_by_step():
    assert name_of(123) == "step-000000123"
    assert sorted(map(name_of, (1000, 9, 123456789, 10))) == [name_of(step) for step in (9, 10, 1000, 123456789)]


def test_write_makes_the_directories_above_and_takes_text(tmp_path):
    path = write(str(tmp_path / "a" / "b" / "state"), tree(3))
    assert path == tmp_path / "a" / "b" / "state"
    assert_whole(read(str(path)), 3)


def test_write_replaces_a_checkpoint_and_leaves_nothing_beside_it(saved):
    write(saved, tree(1))
    assert_whole(read(saved), 1)
    assert beside(saved) == ["saved"]


@pytest.mark.parametrize("there", ["a checkpoint", "nothing", "a file"])
def test_what_the_disk_has_not_kept_takes_nobodys_place(tmp_path, monkeypatch, there):
    path = tmp_path / "saved"
    if there == "a checkpoint":
        write(path, tree(1))
    elif there == "a file":
        path.write_text("x")
    fill, renamed = directory._fill, []

    def lossy(where, what):
        fill(where, what)
        content = bytearray((where / TENSORS).read_bytes())
        content[-1] ^= 1
        (where / TENSORS).write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(directory, "_fill", lossy)
        patch.setattr(Path, "rename", lambda *names: renamed.append(names))
        with pytest.raises(CheckpointError, match=r"does not read back as it was: .*/saved is damaged: tensors.safetensors"):
            directory.commit(path, directory.encoded(tree(2)))
    assert renamed == []  # at no moment was there less than before
    assert beside(path) == ([] if there == "nothing" else ["saved"])
    if there == "a checkpoint":
        assert_whole(read(path), 1)


def test_a_file_in_the_place_of_a_checkpoint_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "saved"
    path.write_text("a file")
    directory.commit(path, directory.encoded(tree(1)))
    assert beside(path) == ["saved"]
    assert_whole(read(path), 1)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("look", [directory.about, directory.verify, read])
def test_a_disk_that_does_not_tell_is_no_damage(saved, monkeypatch, number, look):
    def fails(self):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "lstat", fails)
    with pytest.raises(OSError, match=os.strerror(number)):
        look(saved)


def test_write_takes_an_empty_directory(tmp_path):
    (tmp_path / "state").mkdir()
    assert_whole(read(write(tmp_path / "state", tree(2))), 2)


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
def test_write_does_not_replace_what_is_no_checkpoint(tmp_path, kind):
    target = tmp_path / "mine"
    if kind == "file":
        target.write_text("precious")
    elif kind == "directory":
        target.mkdir()
        (target / "thesis.txt").write_text("precious")
    else:
        target.symlink_to(tmp_path / "elsewhere" / "state")
    with pytest.raises((CheckpointError, OSError)):
        write(target, tree())
    assert beside(target) == ["mine"]
    if kind != "dangling link":
        assert (target if kind == "file" else target / "thesis.txt").read_text() == "precious"


def test_a_value_that_cannot_be_saved_leaves_the_old_checkpoint(saved):
    with pytest.raises(CheckpointError, match="'optimizer' is object"):
        write(saved, {"optimizer": object()})
    assert_whole(read(saved), 0)
    assert beside(saved) == ["saved"]


FULL_DISK = """
import json, os, resource, signal, sys
from pathlib import Path
import torch
from axontrain.checkpoint import read, write

path, told = Path(sys.argv[1]), {}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write beyond the limit fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, resource.RLIM_INFINITY))
for name, tree in (("tensors", {"number": 1, "w": torch.zeros(100_000)}), ("state", {"number": 1, "w": "x" * 400_000})):
    try:
        write(path, tree)
    except Exception as error:
        told[name] = [base.__name__ for base in type(error).__mro__]
told["read"], told["beside"] = read(path)["number"], os.listdir(path.parent)
print(json.dumps(told))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits are POSIX's")
def test_a_full_disk_leaves_the_old_checkpoint(saved):
    told = in_own_process(FULL_DISK, saved)
    assert told["read"] == 0
    assert told["beside"] == ["saved"]
    assert "OSError" in told["state"]
    assert "OSError" in told["tensors"]


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from axontrain.checkpoint import read, write

torch.set_num_threads(1)
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
path, wrong = Path(sys.argv[1]) / "state", []


def tree(number):
    return {"number": number, "weights": [torch.full((64,), float(number)), torch.full((3,), number)]}


def child(work):
    process = os.fork()
    if process:
        return process
    try:
        work()
    finally:  # of an error: what works ends itself
        os._exit(3)


def number(where):
    # What is at the path has to be one whole state.
    try:
        found = read(path)
    except Exception as error:
        wrong.append(f"{where}: {error!r}")
        return None
    values = {found["number"], *found["weights"][0].tolist(), *found["weights"][1].tolist()}
    if len(values) > 1:
        wrong.append(f"{where}: parts of several states, {values}")
    return found["number"]


def save_and_die(count, value):
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event in CHANGES:
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    write(path, tree(value))
    os._exit(0)


# At each change to the file system in turn, one death after another at the same path.
write(path, tree(1))
last, deaths, value = 1, 0, 1
for round in range(4):
    for count in range(1, 1000):
        value += 1
        _, status = os.waitpid(child(lambda: save_and_die(count, value)), 0)
        if not os.WIFSIGNALED(status):
            break
        deaths += 1
        now = number(f"killed before change {count}")
        if now is not None and now not in (last, value):
            wrong.append(f"killed before change {count}: {now} is neither {last} nor {value}")
        last = now or last
    last = number("not killed")
    if last != value:
        wrong.append(f"saved {value}, read {last}")


# And at any moment.
def save_over_and_over(value):
    while True:
        value += 1
        write(path, tree(value))


chance = random.Random(0)
for kill in range(15):
    process = child(lambda: save_over_and_over(last))
    time.sleep(chance.uniform(0.005, 0.06))
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    now = number(f"kill {kill}")
    if now is not None and now < last:
        wrong.append(f"kill {kill}: {now} is older than {last}")
    last = now or last
print(json.dumps({"wrong": wrong, "deaths": deaths, "last": last, "value": value}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_instant_of_saving_the_path_reads_as_one_whole_state(tmp_path):
    told = in_own_process(KILLED, tmp_path)
    assert told["deaths"] > 20
    assert told["last"] > told["value"]  # something was saved between the kills
    assert told["wrong"] == []


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_found(saved, name):
    file = saved / name
    whole = file.read_bytes()
    for place in range(len(whole)):
        for bit in range(8) if name == MANIFEST else (place % 8,):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            with pytest.raises(CheckpointError):
                read(saved)
    file.write_bytes(whole)
    assert_whole(read(saved), 0)


@pytest.mark.parametrize("name", FILES)
def test_any_truncation_or_addition_is_found(saved, name):
    file = saved / name
    whole = file.read_bytes()
    for content in (*(whole[:length] for length in range(len(whole))), whole + b"x", whole + whole):
        file.write_bytes(content)
        with pytest.raises(CheckpointError):
            read(saved)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("instead", ["nothing", "a directory", "a link", "a link to itself", "a pipe"])
def test_a_missing_file_is_named(saved, tmp_path, name, instead):
    (saved / name).rename(tmp_path / "moved")
    if instead == "a directory":
        (saved / name).mkdir()
    elif instead == "a link":
        (saved / name).symlink_to(tmp_path / "moved")
    elif instead == "a link to itself":
        (saved / name).symlink_to(saved / name)
    elif instead == "a pipe":
        os.mkfifo(saved / name)  # to open it would be to wait for ever
    with pytest.raises(CheckpointError, match=name):
        read(saved)


@pytest.mark.parametrize("name", FILES)
def test_files_of_two_checkpoints_do_not_mix(saved, tmp_path, name):
    other = write(tmp_path / "other", tree(1), {"number": 1})
    assert (saved / TENSORS).stat().st_size == (other / TENSORS).stat().st_size
    shutil.copy(other / name, saved / name)
    with pytest.raises(CheckpointError, match=r"damaged: .* is not of the content that its manifest says"):
        read(saved)


def test_a_path_that_is_not_there_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="is not there"):
        read(tmp_path / "none")
    with pytest.raises(CheckpointError, match="is not there"):
        read(tmp_path / "none" / "deeper")


def test_a_path_that_is_no_checkpoint_is_said(tmp_path):
    with pytest.raises(CheckpointError, match=r"is no checkpoint: it has no manifest\.json"):
        read(tmp_path)
    (tmp_path / "file").write_text("{}")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        read(tmp_path / "file")


def test_a_file_of_somebody_else_does_no_harm(saved):
    (saved / ".DS_Store").write_bytes(b"\0")
    assert_whole(read(saved), 0)


def test_a_replacement_that_was_interrupted_reads_as_the_newest_whole_one(saved):
    # Names as crashes between the two renames leave them, the newest of them within its removal. Neither the random part
    # of the name nor the time tells which is the newest.
    for number, random in ((3, "8"), (2, "0"), (1, "f")):
        write(saved.parent / "made", tree(number)).rename(saved.parent / f"saved.old-{number:06}-{random * 32}")
    shutil.rmtree(saved)
    (saved.parent / f"saved.old-000003-{'8' * 32}" / TENSORS).unlink()
    assert_whole(read(saved), 2)


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "null",
        "[]",
        "3",
        '"text"',
        "{}",
        '{"format": 1}',
        '{"format": 1, "files": []}',
        '{"format": 1, "files": {}}',
        '{"format": 1, "files": null}',
        '{"format": 2, "files": {}}',
        '{"format": "1", "files": {}}',
        '{"format": [], "files": {}}',
        '{"format": 1, "format": 1, "files": {}}',
        '{"format": NaN, "files": {}}',
        '{"format": {"$tensor": []}, "files": {}}',
        '{"format": 1, "files": {"tensors.safetensors": 3, "state.json": null}}',
        '{"format": 1, "files": {"tensors.safetensors": {}, "state.json": {}}}',
        "[" * 200_000,
        '{"files":' * 200_000,
        "\udcff".encode("utf-8", "surrogateescape"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_manifest_of_another_kind_is_a_checkpoint_error(saved, manifest):
    (saved / MANIFEST).write_bytes(manifest if isinstance(manifest, bytes) else manifest.encode())
    with pytest.raises(CheckpointError):
        read(saved)


class Evil:
    """What a pickle may do when it is read."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def header(text, length=None):
    content = text.encode() if isinstance(text, str) else text
    return (len(content) if length is None else length).to_bytes(8, "little") + content


def forgeries(target):
    """Contents that no axontrain wrote, by name."""
    state = b'{"number":0}'
    torch.save({"a": Evil(target)}, archive := target.with_suffix(".pt"))
    return {
        "a pickle": {"tensors": pickle.dumps(Evil(target))},
        "a torch archive": {"tensors": archive.read_bytes()},
        "a pickle as state": {"state": pickle.dumps(Evil(target))},
        "no header": {"tensors": b""},
        "half a length": {"tensors": b"\0\0\0"},
        "a header of 2^62 bytes": {"tensors": header("{}", 2**62)},
        "a header of 2^63 bytes": {"tensors": header("{}", 2**63)},
        "a header beyond the file": {"tensors": header("{}", 90_000_000)},
        "a header that is no JSON": {"tensors": header("{]")},
        "a header of deep JSON": {"tensors": header("[" * 100_000)},
        "a header that is no text": {"tensors": header(b"\xff\xfe")},
        "offsets beyond the file": {"tensors": header('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}')},
        "offsets that do not fit": {"tensors": header('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,8]}}') + bytes(8)},
        "offsets backwards": {"tensors": header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}') + bytes(4)},
        "a shape of 2^80": {
            "tensors": header('{"a":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,4]}}') + bytes(4)
        },
        "a negative shape": {"tensors": header('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}') + bytes(4)},
        "an unknown dtype": {"tensors": header('{"a":{"dtype":"EVIL","shape":[1],"data_offsets":[0,4]}}') + bytes(4)},
        "a hole": {"tensors": header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}') + bytes(8)},
        "a tensor of a way up": {"state": b'{"a":{"$tensor":"../../etc/passwd"}}'},
        "a tensor of a root": {"state": b'{"a":{"$tensor":"/etc/passwd"}}'},
        "a tensor that is a list": {"state": b'{"a":{"$tensor":["a"]}}'},
        "a key of ours": {"state": b'{"a":{"$class":"os.system"}}'},
        "a key twice": {"state": b'{"a":1,"a":2}'},
        "NaN": {"state": b'{"a":NaN}'},
        "deep JSON": {"state": b"[" * 200_000},
        "deep objects": {"state": b'{"a":' * 200_000},
        "state that is no text": {"state": b"\xff\xfe"},
        "state in UTF-16": {"state": state.decode().encode("utf-16")},
        "state that goes on": {"state": state + state},
    }


with tempfile.TemporaryDirectory() as somewhere:
    NAMES = list(forgeries(Path(somewhere) / "evil"))


@pytest.mark.parametrize("name", NAMES)
def test_contents_that_axontrain_did_not_write_are_checkpoint_errors(saved, tmp_path, name):
    before = set(sys.modules)
    forge(saved, **forgeries(tmp_path / "evil")[name])
    listed = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError):
        read(saved)
    assert set(sys.modules) == before
    assert sorted(tmp_path.rglob("*")) == listed


def test_names_of_tensors_are_looked_up_and_nothing_else(saved):
    forge(saved, tensors=save({"../../up": torch.ones(2)}), state=b'{"a":{"$tensor":"../../up"}}')
    assert read(saved)["a"].tolist() == [1, 1]


WATCHED = """
import json, os, sys
from pathlib import Path
from axontrain.checkpoint import read
from axontrain.errors import CheckpointError

good, *paths = sys.argv[1:]
read(good)  # whatever is imported when first needed
modules, seen, outcomes = set(sys.modules), [], []
QUIET = ("os.listdir", "os.scandir", "glob.glob", "pathlib.Path.glob", "object.__getattr__", "sys._getframe")


def hook(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        written = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC)
        if not written and not (mode and set(mode) & set("wax+")):
            return
    if event not in QUIET:
        seen.append(f"{event} {arguments!r}"[:200])


sys.addaudithook(hook)
for path in paths:
    try:
        read(path)
        outcomes.append("read")
    except CheckpointError:
        outcomes.append("refused")
    except Exception as error:
        outcomes.append(repr(error))
told = {"events": list(seen), "modules": sorted(set(sys.modules) - modules), "outcomes": outcomes}
seen.clear()
open(os.devnull, "w").close()
eval("1")
told["sees"] = len(seen)
print(json.dumps(told))
"""


def test_reading_writes_imports_and_executes_nothing(saved, tmp_path):
    made = forgeries(tmp_path / "evil")
    paths = [forge(write(tmp_path / f"forged-{index}", tree()), **files) for index, files in enumerate(made.values())]
    paths += [write(tmp_path / "good", tree()), tmp_path, tmp_path / "none"]
    listed = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    told = in_own_process(WATCHED, saved, *paths)
    assert told["sees"] >= 2  # a test of nothing, if the hook were blind
    assert told["events"] == []
    assert told["modules"] == []
    assert dict(zip([*made, "good", "no checkpoint", "nothing"], told["outcomes"], strict=True)) == {
        **dict.fromkeys(made, "refused"), "good": "read", "no checkpoint": "refused", "nothing": "refused"
    }  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == listed


def test_directories_that_are_made_are_on_the_disk(tmp_path, monkeypatch):
    """Their names are in their parents, which have to be there after a power cut."""
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (synced.append(str(Path(f"/proc/self/fd/{file}").readlink())), fsync(file))[1]
    )
    directory.make(tmp_path / "runs" / "first")
    assert synced == [str(tmp_path), str(tmp_path / "runs")]
    directory.make(tmp_path / "runs" / "first")
    assert len(synced) == 2


SWAPPED = """
import json, os, resource, signal, sys
from pathlib import Path
from axontrain import CheckpointError
from axontrain.checkpoint import directory

path, kind, told = Path(sys.argv[1]), "", {}
signal.alarm(60)  # ends the process, if it waits
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
looked, name = directory._file, ""

def swapping(source, wanted):
    file = looked(source, wanted)
    if wanted == name and not (path / "aside").exists():
        file.rename(path / "aside")
        if kind == "fifo":
            os.mkfifo(file)
        else:
            file.symlink_to(path / "aside" if kind == "link" else "/dev/zero")
    return file

directory._file = swapping
for kind in ("fifo", "link", "zero"):
    found = {}
    for name in ("tensors.safetensors", "state.json", "manifest.json", "about.json"):
        try:
            directory.read(path)
        except CheckpointError as error:
            found[name] = str(error)
        (path / name).unlink()
        (path / "aside").rename(path / name)
    name = ""
    directory.read(path)
    told[kind] = [found, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024]
print(json.dumps(told))
"""


def test_what_takes_the_place_of_a_file_while_it_is_read_is_neither_followed_nor_waited_for(saved):
    told = in_own_process(SWAPPED, saved)
    assert set(told) == {"fifo", "link", "zero"}
    for found, mebibytes in told.values():
        assert set(found) == {"tensors.safetensors", "state.json", "manifest.json", "about.json"}
        assert all(name in error for name, error in found.items())
        assert mebibytes < 200
