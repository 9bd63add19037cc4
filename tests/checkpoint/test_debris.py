"""What interrupted saves leave behind: swept when that is safe, and only what a save has left."""

import shutil
from pathlib import Path

import pytest
import torch

from axontrain import CheckpointError
from axontrain.checkpoint import directory, read, write

ID = "ab" * 16


def names(path):
    return sorted(file.name for file in path.parent.iterdir())


def test_the_next_save_sweeps_what_a_killed_one_left_and_nothing_else(tmp_path):
    path = write(tmp_path / "s[1]*", {"a": 1})  # characters that a glob would take for patterns
    for kind in ("old", "tmp"):
        shutil.copytree(path, tmp_path / f"s[1]*.{kind}-000004-{ID}")
    kept = ["s[1]*.old-1", "s[1]*.old-keep", f"other.old-000001-{ID}", f"s[1]*.old-000001-{ID}x", f"s1.old-000001-{ID}"]
    for name in kept:
        shutil.copytree(path, tmp_path / name)
    write(path, {"a": 2})
    assert read(path) == {"a": 2}
    assert names(path) == sorted(["s[1]*", *kept])


def test_what_was_moved_aside_stays_while_nothing_else_is_whole(tmp_path, monkeypatch):
    path = write(tmp_path / "s", {"a": 1})
    aside = tmp_path / f"s.old-000000-{ID}"
    shutil.copytree(path, aside)
    (path / "state.json").write_text("damaged")

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(directory, "_fill", full)
        with pytest.raises(OSError, match="no space"):
            write(path, {"a": 2})
    assert aside.exists()
    shutil.rmtree(path)
    assert read(path) == {"a": 1}
    write(path, {"a": 3})
    assert names(path) == ["s"]


@pytest.mark.parametrize("which", [1, 2])
def test_ctrl_c_between_the_renames_moves_the_old_one_back(tmp_path, monkeypatch, which):
    path, rename, count = write(tmp_path / "s", {"a": 1}), Path.rename, 0

    def interrupted(self, to):
        nonlocal count
        count += 1
        if count == which:
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path, {"a": 2})
    assert read(path) == {"a": 1}
    assert names(path) == ["s"]


def test_saving_over_a_link_replaces_the_link(tmp_path):
    path, link = write(tmp_path / "s", {"a": 1}), tmp_path / "latest"
    link.symlink_to(path)
    write(link, {"a": 2})
    assert (read(link), read(path), link.is_symlink()) == ({"a": 2}, {"a": 1}, False)


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_a_file_too_large_to_be_ours_is_refused_unread(tmp_path, name):
    path = write(tmp_path / "s", {"a": 1})
    with (path / name).open("r+b") as file:
        file.truncate(2**40)  # a hole: it takes no space, but reading it would take hours
    with pytest.raises(CheckpointError, match=f"{name} is larger"):
        read(path)


def test_a_state_too_large_to_be_read_back_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setitem(directory.MOST_BYTES, "state.json", 100)
    with pytest.raises(CheckpointError, match="hold long lists of numbers as tensors"):
        write(tmp_path / "s", {"a": "x" * 100})
    assert not (tmp_path / "s").exists()


def test_a_folder_of_something_else_with_a_manifest_is_not_replaced(tmp_path):
    page = tmp_path / "page"
    page.mkdir()
    (page / "manifest.json").write_text("{}")
    (page / "index.html").write_text("hello")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        write(page, {"a": 1})
    assert (page / "index.html").read_text() == "hello"


def test_conjugate_views_are_written_as_what_they_show(tmp_path):
    values = torch.tensor([1 + 2j])
    found = read(write(tmp_path / "s", {"c": values.conj(), "n": values.conj().imag}))
    assert found["c"].tolist() == [1 - 2j]
    assert found["n"].tolist() == [-2.0]
