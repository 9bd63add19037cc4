"""Checkpoints damaged and forged at random: restored exactly, or refused with nothing changed. Longer:
`python -m benchmarks.fuzz_checkpoints`."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import fuzz_checkpoints
from benchmarks.fuzz_checkpoints import MUTATORS, Fuzz, fitting, same

SETTINGS = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    return Fuzz(tmp_path_factory.mktemp("fuzz"))


@SETTINGS
@given(st.lists(st.sampled_from(MUTATORS), min_size=1, max_size=3), st.integers(0, 2**32), st.booleans())
def test_what_is_mutated_is_restored_exactly_or_refused(fuzz, mutators, seed, fit):
    fuzz.mutate(random.Random(seed), mutators, fit)
    try:
        outcome = fuzz.outcome()
    except BaseException:
        fuzz.begin()  # for the next example
        raise
    if not fit:  # what the sums guard against
        assert outcome in ("refused: damaged", "refused: forged", "restored: the original")


def test_the_mutations_reach_both_sides_of_the_sums(fuzz):
    """A fuzz test whose every example is refused for its sums tests nothing else."""
    outcomes = set()
    for seed in range(40):
        fuzz.mutate(chance := random.Random(seed), chance.choices(MUTATORS, k=2), fit=True)
        try:
            outcomes.add(fuzz.outcome())
        except AssertionError:
            fuzz.begin()
    assert {"refused: forged", "restored: the original", "restored: another state, exactly"} <= outcomes


def test_what_is_not_mutated_is_restored(fuzz):
    fuzz.mutate(random.Random(0), [], fit=False)
    assert fuzz.outcome() == "restored: the original"
    fuzz.mutate(random.Random(0), [], fit=True)
    assert fuzz.outcome() == "restored: the original"
    assert same(fuzz.loop.save(), fuzz.before)


def test_the_script_runs(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fuzz_checkpoints", "--count", "3"])
    assert fuzz_checkpoints.main() == 0
    assert capsys.readouterr().out.startswith("3 mutated checkpoints\n")


def test_a_manifest_can_be_made_to_fit(fuzz):
    fuzz.mutate(random.Random(0), [], fit=False)
    with (fuzz.bad / "state.json").open("a") as file:
        file.write(" ")
    assert fuzz.outcome() == "refused: damaged"
    fitting(fuzz.bad)
    assert fuzz.outcome() == "restored: the original"
