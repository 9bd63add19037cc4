"""Real processes, killed by SIGKILL at random instants and started again: `python -m benchmarks.kills` does more of it.

Quicker, in forks and at chosen instants: tests/checkpoint/test_directory.py, tests/checkpoint/test_faults.py,
tests/loop/test_resume.py.
"""

import sys

import pytest

from benchmarks import kills

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts orphans as Linux lets it")


@pytest.mark.slow
@pytest.mark.parametrize("number", [6, 200])
def test_killed_at_any_instant_a_run_ends_as_if_it_had_not_been(number):
    counts = kills.run(number, seed=number)
    assert counts.bad == 0, counts
    assert counts.kills == number
    assert counts.resumed > number / 4
    assert counts.finished > 0
    if number > 50:
        assert counts.while_saving > number / 10, counts
        assert 0 < counts.at_start < number / 2, counts
        assert counts.while_writer_wrote > 0, counts
