"""Saving at its edges: whose state is odd, who else writes there, what is damaged, what failed before."""

import os
import stat

import numpy as np
import pytest
import torch

import axontrain as ax


class Losses(ax.Callback):
    """One whose state is a list."""

    def __init__(self, state=None):
        super().__init__()
        self.seen = [] if state is None else state

    def after_batch(self, state):
        self.seen.append(state.step)

    def state_dict(self):
        return self.seen

    def load_state_dict(self, state):
        self.seen = state


def line(directory=None, *callbacks, **options):
    torch.manual_seed(0)
    objective = ax.Supervised(torch.nn.Linear(3, 1), "mse")
    options = {"directory": directory, "callbacks": callbacks, "progress": False, **options}
    return ax.Loop(objective, ax.Optimizer("sgd", lr=0.01), **options)


LINE = ax.ArrayDataset(torch.linspace(-1, 1, 96).reshape(32, 3), torch.linspace(-1, 1, 32)[:, None])


def test_a_state_may_be_a_list(tmp_path):
    line(tmp_path, Losses()).fit(LINE, epochs=1, batch_size=8)
    again = line(tmp_path, Losses())
    again.fit(LINE, epochs=2, batch_size=8, resume=True)
    assert again.callbacks[0].seen == [1, 2, 3, 4, 5, 6, 7, 8]
    without = line(tmp_path)
    with pytest.warns(ax.AxonWarning, match="Losses is no longer there"):
        without.fit(LINE, epochs=3, batch_size=8, resume=True)
    kept = again.save()
    again.restore(kept)
    assert again.callbacks[0].seen == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_loop_that_another_has_overtaken_does_not_write_over_it(tmp_path):
    first, second = line(tmp_path), line(tmp_path)
    first.fit(LINE, epochs=1, batch_size=8)
    second.fit(LINE, epochs=3, batch_size=8, resume=True)
    for resume in (True, False):
        with pytest.raises(ax.ConfigurationError, match=r"another Loop has gone on .* loop.restore"):
            first.fit(LINE, epochs=4, batch_size=8, resume=resume)
    assert checkpoint_steps(tmp_path) == [8, 12]
    first.restore(tmp_path)
    first.fit(LINE, epochs=4, batch_size=8, resume=True)
    assert first.state.step == 16
    first.restore(sorted(tmp_path.glob("step-*"))[0])  # who goes back knows what there is
    first.fit(LINE, epochs=1, batch_size=8)


def checkpoint_steps(directory):
    return sorted(int(path.name[5:]) for path in directory.glob("step-*"))


def test_what_is_written_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        path = line().save(tmp_path / "state")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}


@pytest.mark.parametrize("path", [3, ""])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(ax.ConfigurationError, match="the path of a directory"):
        line().save(path)
    if path == "":
        with pytest.raises(ax.ConfigurationError, match="directory=''"):
            line(path)


def test_the_directory_one_is_in_can_be_a_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    line().save(".")
    line().restore(tmp_path / "empty")


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ax.CheckpointError, match="could not be written: File exists"):
        line().save(tmp_path / "file" / "state")


@pytest.mark.parametrize("name", [3, "", "$x"])
def test_names_of_parts_are_looked_at_when_they_are_attached(name):
    with pytest.raises(ax.ConfigurationError, match="a name"):
        line().state.attach(name, Losses())


def test_whose_state_dict_failed_is_told(tmp_path):
    class Failing(Losses):
        def state_dict(self):
            raise KeyError("foo")

    with pytest.raises(KeyError) as caught:
        line(tmp_path, Failing()).fit(LINE, epochs=1)
    assert any("Failing" in note for note in caught.value.__notes__)


def test_numbers_of_numpys_are_saved_in_the_middle_of_an_epoch(tmp_path):
    class Numbers(ax.Supervised):
        def weight(self, batch):
            return np.int64(len(batch[0]))

        def train_step(self, batch):
            step = super().train_step(batch)
            step.values = {"half": np.float32(0.5)}
            return step

    torch.manual_seed(0)
    loop = ax.Loop(Numbers(torch.nn.Linear(3, 1), "mse"), ax.Optimizer("sgd", lr=0.01), progress=False)
    loop.fit(LINE, steps=2, batch_size=8)
    loop.save(tmp_path / "state")
    assert loop.state.values["train/half"] == 0.5


def test_what_cannot_be_saved_of_an_objective_is_told_before_the_first_step(tmp_path):
    loop = line(tmp_path)
    loop.objective.register_buffer("odd", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ax.CheckpointError, match="odd"):
        loop.fit(LINE, epochs=1)
    assert loop.state.step == 0


def test_a_state_that_came_to_hold_what_none_can_ends_no_run_that_is_to_go_on(tmp_path):
    class Odd(Losses):
        def after_batch(self, state):
            self.seen = {1, 2}

    loop = line(tmp_path, Odd(), ax.Checkpoint(on_failure="warn"))
    with pytest.warns(ax.AxonWarning, match="Odd"):
        assert loop.fit(LINE, epochs=2, batch_size=8).status == "completed"


def test_a_state_restored_into_a_loop_that_read_other_batches(tmp_path):
    def left(size):
        loop = line()
        steps = loop.steps(LINE, epochs=1, batch_size=size)
        next(steps)
        steps.close()
        return loop

    kept, used = left(16).save(), left(8)
    used.restore(kept)
    used.fit(LINE, epochs=1, batch_size=8)
    assert used.state.samples == 16 + 32, "the epoch of other batches begins anew"


def test_gradients_of_a_step_that_failed_are_not_a_part_of_the_next():
    torch.manual_seed(0)
    objective = ax.Supervised(torch.nn.Linear(3, 1), "mse")
    loop = ax.Loop(objective, ax.Optimizer("sgd", lr=0.01, on_nonfinite="raise"), progress=False)
    good = (torch.ones(4, 3), torch.ones(4, 1))
    with pytest.raises(ax.NonFiniteError):
        loop.train_on_batch((torch.full((4, 3), float("nan")), torch.ones(4, 1)))
    loop.train_on_batch(good)
    expected = line()
    expected.train_on_batch(good)
    for one, other in zip(objective.parameters(), expected.objective.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_was_recorded_after_a_fit_that_was_left_stays():
    loop = line()
    loop.fit(LINE, steps=2, batch_size=8)
    loop.state.record({"mine": 1.0})
    loop.fit(LINE, epochs=1, batch_size=8, resume=True)
    assert [row["step"] for row in loop.state.history.rows] == [2, 4]
    assert loop.state.history.rows[0] == {"step": 2, "epoch": 0, "mine": 1.0}


def test_a_checkpoint_that_stepped_aside_is_found(tmp_path):
    loop = line(tmp_path / "run")
    loop.fit(LINE, epochs=1, batch_size=8)
    [path] = (tmp_path / "run").glob("step-*")
    path.rename(path.with_name(f"{path.name}.old-000000-{'0' * 32}"))
    again = line()
    again.restore(tmp_path / "run")
    assert again.state.step == 4
    model = ax.Supervised(torch.nn.Linear(3, 1), "mse")
    ax.load_weights(model, tmp_path / "run")
    assert torch.equal(model.model.weight, loop.objective.model.weight)


def test_a_damaged_best_does_not_stay_the_best(tmp_path):
    def saving():
        return ax.Checkpoint(every="1 epoch", best="train/loss", keep_last=2)

    first = saving()
    line(tmp_path, first).fit(LINE, epochs=2, batch_size=8)
    best = first.best_path
    with (best / "tensors.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    second = saving()
    loop = line(tmp_path, second)
    with pytest.warns(ax.AxonWarning, match="Went on from the next older good one"):
        loop.fit(LINE, epochs=2, batch_size=8, resume=True)
    ax.load_weights(ax.Supervised(torch.nn.Linear(3, 1), "mse"), second.best_path)
    assert second.best_path.name == best.name, "the same reading, of a whole checkpoint"


def test_a_state_of_before_there_were_averages_is_restored():
    loop = line()
    saved = loop.save()
    del saved["optimizers"]["main"]["average"]
    loop.restore(saved)
    assert loop.save()["optimizers"]["main"]["average"] is None


def test_what_was_counted_while_losses_were_scaled_is_kept_where_they_are_not():
    loop = line()
    saved = loop.save()
    saved["optimizers"]["main"]["bad_losses"] = 2
    loop.restore(saved)
    assert loop.save()["optimizers"]["main"]["bad_losses"] == 2
