"""The checkpoints of a run directory: their names and order, which are kept, which is taken, what is swept."""

import errno
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from axontrain import AxonWarning, CheckpointError
from axontrain.checkpoint import directory as files
from axontrain.checkpoint import read, runs, write
from axontrain.checkpoint.runs import LEFT, NAME, Entry, Keep, entries, name_of, newest, sweep

ID = "ab" * 16


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


def put(directory, step, number=None, *, suffix="", value=math.nan, **about):
    """A small real checkpoint."""
    told = {"step": step, "readings": {} if math.isnan(value) else {"val/loss": value}, **about}
    told |= {} if number is None else {"number": number}
    path = directory / f"{name_of(step)}{suffix}"
    made = write(directory / "made", {"step": step, "w": torch.full((4,), float(step))}, told)
    return made.rename(path)  # as a save would sweep beside it


def damage(path, name="tensors.safetensors"):
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)


def steps(directory):
    return [entry.step for entry in entries(directory)]


def names(directory):
    return sorted(path.name for path in directory.iterdir())


# --- names -------------------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 10**18 - 1),
    st.none() | st.text(max_size=300) | st.sampled_from(["../x", "/etc/passwd", "..", "", "a\0b", "val/loss", "é" * 300]),
    st.floats(),
)
def test_a_name_never_leaves_its_directory_and_is_read_back(step, reading, value):
    name = name_of(step, reading, value)
    assert Path(name).name == name
    assert (Path("/run") / name).resolve().parent == Path("/run")
    assert name.isascii()
    assert name.isprintable()
    assert len(name) < 150  # room for what is put behind it while it is written
    assert int(NAME.fullmatch(name)["step"]) == step
    for kind in ("tmp", "old"):
        left = f"{name}.{kind}-000000-{ID}"
        assert LEFT.fullmatch(left)["name"] == name
        assert NAME.fullmatch(left) is None


@pytest.mark.parametrize(
    "name",
    ["step-1", "step-00000000x", "xstep-000000001", "step-000000001.bak", "step-000000001/..", "step-000000001-../x",
     "step-000000001-", "step-000000001\n", "step-" + "1" * 19, "step-\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661x",
     "history.jsonl", ".lock"],
)  # fmt: skip
def test_other_names_are_no_checkpoints(tmp_path, name):
    assert NAME.fullmatch(name) is None
    assert LEFT.fullmatch(name) is None


# --- the order ---------------------------------------------------------------------------------------------------------------


def test_entries_come_in_the_order_in_which_they_were_written(tmp_path):
    for number, step in enumerate((10, 20, 30, 15), 1):  # back to 10, and on from there
        put(tmp_path, step, number)
    (tmp_path / "history.jsonl").touch()
    (tmp_path / f"step-000000040-val_loss-0.5.tmp-000000-{ID}").mkdir()
    (tmp_path / f"step-000000040.old-000000-{ID}").mkdir()
    assert steps(tmp_path) == [10, 20, 30, 15]
    assert newest(tmp_path)[0].name == name_of(15)


def test_those_whose_number_cannot_be_read_come_behind_the_step_before_them(tmp_path):
    for number, step in enumerate((10, 20, 30), 1):
        put(tmp_path, step, number)
    (tmp_path / name_of(20) / "about.json").write_text("{")
    (tmp_path / name_of(25)).mkdir()
    (tmp_path / name_of(5)).write_text("a file")
    (tmp_path / name_of(35)).symlink_to(tmp_path / name_of(30))
    found = entries(tmp_path)
    assert [entry.step for entry in found] == [5, 10, 20, 25, 30, 35]
    assert [bool(entry.problem) for entry in found] == [True, False, True, True, False, True]
    assert found[-1].problem.endswith("is no directory of its own")
    for number in (True, -1, 0, 2.5, "3", None, 10**400):
        assert Entry(tmp_path, 1, {"number": number}).number == 0


def test_a_directory_that_is_not_there_has_none(tmp_path):
    assert entries(tmp_path / "none") == []
    assert newest(tmp_path / "none") is None
    assert sweep(tmp_path / "none") == []


# --- what is kept ------------------------------------------------------------------------------------------------------------

READINGS = st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.0, math.inf, -math.inf, math.nan]) | st.none()
MADE = st.lists(st.tuples(READINGS, st.booleans(), st.booleans()), min_size=1, max_size=12)
KEEPS = st.builds(
    Keep, st.integers(1, 4) | st.none(), st.integers(1, 3), st.sampled_from([None, "val/loss"]), st.sampled_from(["min", "max"])
)


def made(rows):
    return [
        Entry(
            Path(f"/run/step-{step:09d}"),
            step,
            {"number": step + 1, "permanent": permanent, "readings": {} if value is None else {"val/loss": value}},
            "damaged" if bad and step < len(rows) - 1 else "",  # the last was just verified
        )
        for step, (value, permanent, bad) in enumerate(rows)
    ]


def best_of(keep, found):
    """The best, by what the documentation says: as good as any but so many, the earlier of equal ones."""
    sign = -1 if keep.mode == "max" else 1
    values = [(sign * entry.reading("val/loss"), index) for index, entry in enumerate(found)]
    values = [one for one in values if not math.isnan(one[0])] if keep.monitor else []
    return [found[index] for value, index in values if sum(other < (value, index) for other in values) < keep.best]


@given(KEEPS, MADE)
def test_what_is_kept_is_the_last_the_best_and_the_permanent_and_nothing_else(keep, rows):
    found = made(rows)
    gone = keep.superfluous(found)
    good = [entry for entry in found if not entry.problem]
    if keep.last is None:
        assert gone == []
        return
    kept = [*good[-keep.last :], *best_of(keep, good), *[entry for entry in found if entry.permanent]]
    assert [entry.step for entry in gone] == [entry.step for entry in good if entry not in kept]
    assert found[-1] not in gone


@given(KEEPS, MADE, READINGS.filter(lambda value: value is not None))
def test_a_reading_is_among_the_best_if_it_would_be_kept_for_it(keep, rows, value):
    found = [entry for entry in made(rows) if not entry.problem]
    new = Entry(Path("/run/step-000000099"), 99, {"number": 99, "readings": {"val/loss": value}})
    assert keep.is_among_best(value, found) == (new in best_of(keep, [*found, new]))


@pytest.mark.parametrize("readings", [None, [], "x", {"val/loss": None}, {"val/loss": "1"}, {"val/loss": True}, {"other": 1}])
def test_a_reading_that_is_no_number_is_none(readings):
    assert math.isnan(Entry(Path("x"), 1, {"readings": readings}).reading("val/loss"))


def commit(directory, step, number, keep, value=math.nan, permanent=False):
    told = {"number": number, "permanent": permanent, "readings": {} if math.isnan(value) else {"val/loss": value}}
    runs.commit(directory, name_of(step, "val/loss", value), files.encoded({"step": step}, told), keep)


def test_a_commit_prunes_what_is_superfluous(tmp_path):
    keep = Keep(2, 1, "val/loss")
    for number, value in enumerate((0.5, 0.1, 0.1, math.nan, 0.7, 0.9), 1):
        commit(tmp_path, number * 10, number, keep, value, permanent=number == 4)
        assert all(map(files.is_whole, tmp_path.iterdir()))
    assert names(tmp_path) == [
        name_of(20, "val/loss", 0.1),
        name_of(40),
        *(name_of(s, "val/loss", v) for s, v in ((50, 0.7), (60, 0.9))),
    ]


def test_nothing_is_pruned_before_the_new_one_verifies(tmp_path, monkeypatch):
    for step in (10, 20):
        commit(tmp_path, step, step // 10, Keep(1, 0))
    put(tmp_path, 15, 1)

    def bad(path):
        raise CheckpointError(f"{path} is damaged")

    with monkeypatch.context() as patch:
        patch.setattr(files, "verify", bad)
        with pytest.raises(CheckpointError, match="damaged"):
            commit(tmp_path, 30, 3, Keep(1))
    assert names(tmp_path) == [name_of(15), name_of(20)]
    commit(tmp_path, 40, 4, Keep(1))
    assert steps(tmp_path) == [40]


def test_one_of_the_same_step_replaces_what_was_there_whatever_its_name(tmp_path):
    commit(tmp_path, 10, 1, Keep(3))
    commit(tmp_path, 20, 2, Keep(3), 0.5)
    damage(next(path for path in tmp_path.iterdir() if "000020" in path.name))
    commit(tmp_path, 20, 3, Keep(3), 0.25)
    commit(tmp_path, 10, 4, Keep(3))
    assert names(tmp_path) == [name_of(10), name_of(20, "val/loss", 0.25)]
    assert steps(tmp_path) == [20, 10]


def test_a_damaged_one_is_not_counted_among_those_that_are_kept_and_stays(tmp_path):
    for number in (1, 2, 3):
        put(tmp_path, number, number)
    (tmp_path / name_of(3) / "state.json").unlink()
    commit(tmp_path, 4, 4, Keep(2))
    assert steps(tmp_path) == [2, 3, 4]
    commit(tmp_path, 3, 5, Keep(2))  # its step again
    assert steps(tmp_path) == [4, 3]
    assert all(files.is_whole(path) for path in tmp_path.iterdir())


ERRORS = [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES]


def failing(monkeypatch, holder, name, step, number):
    """A disk that fails in one call, where it is of the checkpoint of one step."""
    call = getattr(holder, name)

    def fails(path, *arguments, **named):
        if name_of(step) in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return call(path, *arguments, **named)

    monkeypatch.setattr(holder, name, fails)


@pytest.mark.parametrize("number", ERRORS)
@pytest.mark.parametrize(("holder", "name"), [(Path, "lstat"), (os, "open"), (files, "_described")])
@pytest.mark.parametrize("step", [1, 2, 4])
def test_what_could_not_be_looked_at_is_not_pruned_and_is_what_it_was_afterwards(
    tmp_path, monkeypatch, number, holder, name, step
):
    """1 is permanent, 2 the best, 4 the last."""
    keep = Keep(1, 1, "val/loss")
    for made, value in ((1, 0.9), (2, 0.1), (3, 0.5), (4, 0.6)):
        commit(tmp_path, made, made, keep, value, permanent=made == 1)
    assert steps(tmp_path) == [1, 2, 4]
    with monkeypatch.context() as patch:
        failing(patch, holder, name, step, number)
        (found,) = [entry for entry in entries(tmp_path) if entry.step == step]
        assert found.unseen
        assert "could not be looked at" in found.problem
        assert os.strerror(number) in found.problem
        commit(tmp_path, 5, 5, keep, 0.7)
    assert set(steps(tmp_path)) >= {1, 2, 5, step}
    commit(tmp_path, 6, 6, keep, 0.8)
    assert steps(tmp_path) == [1, 2, 6]


def test_what_cannot_be_read_whole_is_not_pruned_either(tmp_path, monkeypatch):
    for number in (1, 2, 3):
        put(tmp_path, number, number)
    verify = files.verify

    def fails(path):
        if path == tmp_path / name_of(3):
            raise OSError(errno.EIO, "Input/output error")
        verify(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "verify", fails)
        commit(tmp_path, 4, 4, Keep(2))
    assert steps(tmp_path) == [2, 3, 4]  # 2 counts, as 3 may be damaged


@pytest.mark.parametrize("damaged", ["about.json", "manifest.json"])
def test_a_damaged_about_says_nothing_of_permanence_so_that_it_stays(tmp_path, damaged):
    commit(tmp_path, 1, 1, Keep(1), permanent=True)
    (tmp_path / name_of(1) / damaged).write_text("{")
    for step in (2, 3):
        commit(tmp_path, step, step, Keep(1))
    assert steps(tmp_path) == [1, 3]
    assert not entries(tmp_path)[0].unseen


@pytest.mark.parametrize("number", [10**400, 2**70, 2**63, -1, True, 1.5])
def test_a_number_that_no_run_has_given_does_no_harm(tmp_path, number):
    put(tmp_path, 1, number)
    put(tmp_path, 2, 1)
    assert steps(tmp_path) == [1, 2]
    commit(tmp_path, 3, 2, Keep(1))
    assert steps(tmp_path) == [3]


def test_a_commit_tells_what_it_has_seen_to_be_good_so_that_it_is_read_once(tmp_path, monkeypatch):
    for number in range(1, 7):
        put(tmp_path, number, number)
    damage(tmp_path / name_of(4))
    seen, read_whole, verify = set(), [], files.verify
    monkeypatch.setattr(files, "verify", lambda path: (read_whole.append(Path(path).name.split(".")[0]), verify(path)))
    for step in (7, 8):
        what = files.encoded({"step": step}, {"number": step})
        seen.update(runs.commit(tmp_path, name_of(step), what, Keep(4), frozenset(seen)))
    assert sorted(read_whole) == [name_of(step) for step in (3, 4, 5, 6, 7, 8)]
    assert seen == {name_of(step) for step in (3, 5, 6, 7, 8)}


def test_a_commit_makes_no_directory(tmp_path):
    with pytest.raises(FileNotFoundError):
        commit(tmp_path / "gone", 1, 1, Keep(1))
    assert names(tmp_path) == []


# --- the newest --------------------------------------------------------------------------------------------------------------


def test_the_newest_that_verifies_is_taken_and_what_was_passed_over_is_told_in_one_warning(tmp_path):
    for number in (1, 2, 3, 4):
        put(tmp_path, number * 10, number)
    damage(tmp_path / name_of(40))  # which a glance does not see
    (tmp_path / name_of(30) / "about.json").unlink()  # which one does
    with pytest.warns(AxonWarning) as told:
        path, tree = newest(tmp_path)
    assert (path, tree["step"]) == (tmp_path / name_of(20), 20)
    (text,) = [str(one.message) for one in told]
    for part in (
        f"{name_of(40)} is damaged: tensors",
        f"{name_of(30)} is incomplete: it has no about",
        f"older good one, {path}",
    ):
        assert part in text


def test_none_that_is_good_is_an_error_that_lists_them(tmp_path):
    for number in (1, 2):
        damage(put(tmp_path, number * 10, number))
    (tmp_path / name_of(30)).mkdir()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is good: .*000030 .*000020 .*000010 .*from a copy"):
        newest(tmp_path)


def test_a_disk_that_cannot_read_one_is_passed_over(tmp_path, monkeypatch):
    for number in (1, 2):
        put(tmp_path, number * 10, number)
    there = files._described

    def described(file):
        if name_of(20) in str(file) and file.name != "about.json":
            raise OSError(5, "Input/output error", str(file))
        return there(file)

    monkeypatch.setattr(files, "_described", described)
    with pytest.warns(AxonWarning, match=r"Input/output error.*000020.*000010"):
        assert newest(tmp_path)[1]["step"] == 10


# --- leftovers ---------------------------------------------------------------------------------------------------------------


def left(path, kind, number=0):
    return path.with_name(f"{path.name}.{kind}-{number:06d}-{ID}")


@pytest.mark.parametrize("suffix", ["", "-val_loss-0.5"])
@pytest.mark.parametrize("target", ["missing", "damaged", "empty", "a file", "whole"])
@pytest.mark.parametrize("aside", ["whole", "damaged"])
def test_what_stepped_aside_is_put_back_if_it_is_all_that_there_is(tmp_path, suffix, target, aside):
    path = put(tmp_path, 10, 1, suffix=suffix, by="the aside")
    path.rename(left(path, "old"))
    if aside == "damaged":
        damage(left(path, "old"))
    if target in ("whole", "damaged"):
        put(tmp_path, 10, 2, suffix=suffix, by="the target")
    if target == "damaged":
        damage(path)
    if target == "empty":
        path.mkdir()
    if target == "a file":
        path.touch()
    put(tmp_path, 5, 1)
    shutil.copytree(tmp_path / name_of(5), left(path, "tmp"))
    assert sorted(sweep(tmp_path)) == sorted([left(path, "old").name, left(path, "tmp").name])
    back = target != "whole" and aside == "whole"
    assert names(tmp_path) == [name_of(5), *([path.name] if back or target != "missing" else [])]
    if back or target == "whole":
        assert files.about(path)["by"] == ("the aside" if back else "the target")
        assert read(path)["step"] == 10
    assert sweep(tmp_path) == []


def test_of_several_that_stepped_aside_the_last_that_is_whole_is_put_back(tmp_path):
    for number in range(3):
        path = put(tmp_path, 10, 1, by=number)
        path.rename(left(path, "old", number))
    damage(left(path, "old", 2))
    assert len(sweep(tmp_path)) == 3
    assert (names(tmp_path), files.about(path)["by"]) == ([path.name], 1)


@pytest.mark.parametrize("which", ["target", "aside"])
def test_what_stepped_aside_stays_where_the_disk_does_not_tell_whether_it_is_needed(tmp_path, monkeypatch, which):
    path = put(tmp_path, 10, 1, by="the aside")
    path.rename(left(path, "old"))
    if which == "target":
        put(tmp_path, 10, 2, by="the target")
    before = names(tmp_path)
    with monkeypatch.context() as patch:
        failing(patch, files, "_described", 10, errno.EIO)
        assert sweep(tmp_path) == []
    assert names(tmp_path) == before
    sweep(tmp_path)
    assert names(tmp_path) == [path.name]
    assert files.about(path)["by"] == f"the {which}"


@pytest.mark.parametrize("suffix", ["", "-val_loss-0.5"])
@pytest.mark.parametrize("kind", ["tmp", "old"])
def test_a_sweep_that_was_killed_leaves_what_the_next_one_sweeps(tmp_path, monkeypatch, suffix, kind):
    path = put(tmp_path, 10, 1, suffix=suffix)
    shutil.copytree(path, left(path, kind))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        sweep(tmp_path)
    sweep(tmp_path)
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", ["", "-val_loss-0.5"])
def test_a_removal_that_was_killed_is_no_checkpoint_and_swept(tmp_path, monkeypatch, suffix):
    put(tmp_path, 10, 1, suffix=suffix)
    put(tmp_path, 20, 2)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        commit(tmp_path, 30, 3, Keep(1))
    assert steps(tmp_path) == [30]
    assert len(sweep(tmp_path)) == 2
    assert names(tmp_path) == [name_of(30)]


def test_what_a_person_put_there_is_not_swept(tmp_path):
    path = put(tmp_path, 10, 1)
    kept = [f"{path.name}.old", f"{path.name}.tmp-1", f"mine.tmp-000000-{ID}", f"{path.name}.old-000000-{ID}x", "notes.txt"]
    for name in kept:
        (tmp_path / name).mkdir()
    assert sweep(tmp_path) == []
    assert names(tmp_path) == sorted([path.name, *kept])


@pytest.mark.parametrize("kind", ["tmp", "old"])
def test_a_link_in_the_place_of_a_leftover_is_removed_and_not_followed(tmp_path, kind):
    other = put(tmp_path / "elsewhere", 1, 1)
    run = tmp_path / "run"
    path = put(run, 10, 1)
    left(path, kind).symlink_to(other, target_is_directory=True)
    sweep(run)
    assert names(run) == [path.name]
    assert files.is_whole(other)
    shutil.rmtree(path)
    left(path, kind).symlink_to(other, target_is_directory=True)
    sweep(run)
    assert names(run) == []  # not even put back: it is no checkpoint of this run
    assert files.is_whole(other)


def test_a_damaged_one_that_a_glance_passes_pushes_out_no_good_one(tmp_path):
    keep = runs.Keep(2)

    def save(number, *verified):
        what = files.encoded({"weights": torch.full((64,), float(number))}, {"number": number})
        runs.commit(tmp_path, runs.name_of(number), what, keep, [runs.name_of(one) for one in verified])

    save(1)
    save(2, 1)
    tensors = tmp_path / runs.name_of(2) / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    save(3)
    assert [entry.step for entry in runs.entries(tmp_path)] == [1, 2, 3]
    save(4, 3)
    assert [entry.step for entry in runs.entries(tmp_path)] == [3, 4]


@pytest.mark.parametrize("times", [1, 3])
def test_who_reads_while_a_run_saves_and_prunes_finds_the_newest(tmp_path, monkeypatch, times):
    """Between the list and the reading the checkpoints of the list are pruned, and a new one is there."""
    put(tmp_path, 1, 1)
    put(tmp_path, 2, 2)
    reading, left, last = files.read, [times], [2]

    def late(path):
        if left[0]:
            left[0] -= 1
            last[0] += 1
            put(tmp_path, last[0], last[0])
            for entry in entries(tmp_path)[:-1]:
                shutil.rmtree(entry.path)
        return reading(path)

    monkeypatch.setattr(files, "read", late)
    path, tree = newest(tmp_path)
    assert path == tmp_path / name_of(2 + times)
    assert tree["step"] == 2 + times


def test_where_nothing_changes_meanwhile_the_bad_ones_are_told_once(tmp_path):
    for number in (1, 2, 3):
        put(tmp_path, number, number)
    damage(tmp_path / name_of(3))
    with pytest.warns(AxonWarning, match=r"step-000000003 is damaged.*Went on from the next older good one, .*step-000000002"):
        assert newest(tmp_path)[0] == tmp_path / name_of(2)
    for number in (1, 2):
        damage(tmp_path / name_of(number))
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is good"):
        newest(tmp_path)
