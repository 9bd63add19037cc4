"""benchmarks/long_run.py with a few steps: what it looks at and when, and that both loops do the same training."""

import json

import pytest

from benchmarks import long_run


def test_it_looks_at_memory_at_ends_of_epochs_and_times_the_first_and_the_last(capfd):
    found = long_run.measure(600, epoch=20, chunk=5, chunks=4)
    assert found["steps"] == 600
    assert [at["steps"] for at in found["memory"]] == [20, 200, 600]
    # Of each epoch, and of the learning rate every 5 steps, which at an epoch's end are one row.
    assert [at["rows"] for at in found["memory"]] == [4, 40, 120]
    assert {name: len(pairs) for name, pairs in found["times"].items()} == {"first": 4, "last": 4}
    assert all(ours > 0 < hand for pairs in found["times"].values() for ours, hand in pairs)
    assert [len(row) for row in long_run.memory_rows(found)] == [5] * 3
    assert [row[0] for row in long_run.time_rows(found)] == ["first", "last"]
    assert long_run.time_rows(found)[0][-1] == "1.000"


def test_the_loop_by_hand_trains_as_the_other():
    train, held_out = long_run.data(200, 1), long_run.data(10, 2)
    by_hand = long_run.ByHand(train, held_out)
    before = long_run.loss_of(by_hand.net, train)
    by_hand.chunk(150)
    by_hand.chunk(1050)  # over the ends of epochs, with a validation in each
    found = long_run.measure(1200, epoch=200, chunk=100, chunks=2)
    end = long_run.loss_of(by_hand.net, train)
    assert end < 0.6 * before
    assert end == pytest.approx(found["losses"][1], rel=long_run.TOLERANCE)


def found_with(grown, hand=0.3, ours=0.3):
    """What a run has found, whose memory has grown by so much."""
    memory = [{"steps": s, "mb": 400.0 + mb, "blocks": 1000, "rows": 1} for s, mb in ((10_000, 0.0), (30_000, grown))]
    times = {"first": [(100.0, 100.0)], "last": [(110.0, 100.0)]}
    return {"steps": 30_000, "seconds": 1.0, "memory": memory, "times": times, "losses": [hand, ours]}


@pytest.mark.parametrize(
    ("found", "failure", "status", "told"),
    [
        (found_with(4.9), "", 0, "Growth: +4.9 MB, the goal is < 5 MB: met."),
        (found_with(5.0), "", 1, "Growth: +5.0 MB, the goal is < 5 MB: missed."),
        (found_with(0.0, ours=0.4), "", 1, "they differ"),
        (found_with(0.0, ours=float("nan")), "", 1, "they differ"),
        ({}, "it broke", 1, ""),
    ],
    ids=["met", "missed", "another loss", "no loss", "failed"],
)
def test_the_status_says_whether_the_goal_is_met(monkeypatch, capsys, found, failure, status, told):
    monkeypatch.setattr(long_run, "in_its_terminal", lambda steps: (found, failure))
    monkeypatch.setattr("sys.argv", ["long_run", "--steps", "30000", "--markdown"])
    assert long_run.main() == status
    out, err = capsys.readouterr()
    assert told in out
    assert failure in err
    last = [line.split() for line in out.splitlines() if line.startswith("| last ")]
    assert last == (
        [] if failure else [["|", "last", "|", "100", "|", "110", "|", "1.100", "(1.100–1.100)", "|", "1.100", "|"]]
    )


@pytest.mark.parametrize("steps", ["25000", "20000", "0"])
def test_steps_are_whole_epochs(monkeypatch, capsys, steps):
    monkeypatch.setattr("sys.argv", ["long_run", "--steps", steps])
    with pytest.raises(SystemExit):
        long_run.main()
    assert "a multiple of 10000, from 30000 on" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_in_its_terminal():
    found, failure = long_run.in_its_terminal(3 * long_run.EPOCH)
    assert failure == ""
    assert json.loads(json.dumps(found)) == found
    assert long_run.same_losses(found)
    assert found["memory"][-1]["rows"] == 30


@pytest.mark.slow
def test_a_run_that_fails_says_so(monkeypatch):
    monkeypatch.setattr(long_run, "sys", type("NoPython", (), {"executable": "false"}))
    found, failure = long_run.in_its_terminal(3 * long_run.EPOCH)
    assert found == {}
    assert failure == "exit status 1, no output"
