"""Workers: the same batches however many there are, and what is said when one is in trouble."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_datasets import Many, Noisy, Seldom, Still, Troubled, double, noise
from process_table import alive, children, gone

import axontrain as ax


def read(dataset, *, workers=0, epochs=(0, 1), start=0, share=(0, 1), transform=noise, close=True, **options):
    """The values of each batch of each epoch, and the processes that made them."""
    loader = ax.Loader(dataset, 8, shuffle=True, workers=workers, transform=transform, **options)
    values, pids = [], set()
    for epoch in epochs:
        for made, by in loader.batches(seed=3, epoch=epoch, start=start, share=share):
            values.append(made)
            pids |= set(by.tolist())
    if close:
        loader.close()
    return values, pids


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("dataset", [Noisy(), Still(), Seldom(), Many()], ids=lambda data: type(data).__name__)
@pytest.mark.parametrize(("workers", "transform"), [(1, noise), (2, noise), (2, double), (2, None), (4, noise)])
def test_the_batches_are_the_same_with_any_number_of_workers(dataset, transform, workers):
    expected, here = read(dataset, transform=transform)
    made, there = read(dataset, workers=workers, transform=transform)
    assert here == {os.getpid()}
    assert os.getpid() not in there
    assert len(there) == workers
    assert same(made, expected)


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_and_however_they_are_started(start_method):
    expected, _ = read(Noisy())
    for workers in (1, 2, 4):
        assert same(read(Noisy(), workers=workers, start_method=start_method)[0], expected)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [Noisy(), Seldom(), Many()], ids=lambda data: type(data).__name__)
def test_going_to_a_batch_gives_what_it_would_have_been(dataset, workers):
    whole, _ = read(dataset, epochs=[1])
    for start in (1, 3, 7, 8):
        assert same(read(dataset, workers=workers, epochs=[1], start=start)[0], whole[start:])


class Recorded(Noisy):
    """Writes each index that is read to a file, which workers share."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def __getitem__(self, index):
        with self.path.open("a") as file:
            file.write(f"{index}\n")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_going_to_a_batch_reads_nothing_before_it(tmp_path, workers):
    path = tmp_path / "read"
    read(Recorded(path), workers=workers, epochs=[0], start=5)
    indices = [int(line) for line in path.read_text().split()]
    wanted = ax.order(3, 0, 60)[5 * 8 :].tolist()
    assert sorted(indices) == sorted(wanted), "each once, and nothing else"


@pytest.mark.parametrize(
    ("workers", "ranks"),
    [(0, 1), pytest.param(0, 2, marks=pytest.mark.slow), (0, 3), pytest.param(0, 4, marks=pytest.mark.slow), (1, 3)],
)
@pytest.mark.parametrize("transform", [noise, double, None])
@pytest.mark.parametrize("dataset", [Noisy(), Still(), Seldom(), Many()], ids=lambda data: type(data).__name__)
def test_the_shares_of_ranks_put_together_are_the_batch(dataset, transform, workers, ranks):
    whole, _ = read(dataset, transform=transform)
    shares = [read(dataset, transform=transform, workers=workers, share=(rank, ranks))[0] for rank in range(ranks)]
    assert same([torch.cat(parts) for parts in zip(*shares, strict=True)], whole)
    sizes = [[len(part) for part in parts] for parts in zip(*shares, strict=True)]
    assert all(max(of) - min(of) <= 1 for of in sizes)


def test_a_rank_reads_no_more_than_its_share(tmp_path):
    # Samples that are made one by one have random states of their own, so that nobody has to make the others.
    path = tmp_path / "read"
    read(Recorded(path), transform=None, epochs=[0], share=(1, 4))
    assert len(path.read_text().split()) == 7 * 2 + 1  # seven batches of 8, and one of 4


@given(size=st.integers(1, 50), batch_size=st.integers(1, 20), ranks=st.integers(1, 6), seed=st.integers(0, 2**62))
@settings(max_examples=30, deadline=None)
def test_shares_are_the_batch_for_any_sizes(size, batch_size, ranks, seed):
    loader = ax.Loader(ax.ArrayDataset(torch.arange(size), torch.arange(size) * 2), batch_size, shuffle=True)
    whole = list(loader.batches(seed, 2))
    shares = [list(loader.batches(seed, 2, share=(rank, ranks))) for rank in range(ranks)]
    for parts, batch in zip(zip(*shares, strict=True), whole, strict=True):
        assert all(torch.equal(torch.cat(of), own) for of, own in zip(zip(*parts, strict=True), batch, strict=True))


def test_the_callers_generators_are_left_alone():
    before = torch.get_rng_state()
    read(Noisy(), workers=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_live_over_passes_and_end_when_closed():
    loader = ax.Loader(Noisy(), 8, workers=2)
    pids = [{pid for batch in loader for pid in batch[1].tolist()} for _ in range(3)]
    assert pids[0] == pids[1] == pids[2]
    assert all(map(alive, pids[0]))
    loader.close()
    assert gone(pids[0])
    assert {pid for batch in loader for pid in batch[1].tolist()}.isdisjoint(pids[0])
    loader.close()


def test_two_passes_of_one_loader_may_be_read_at_once():
    loader = ax.Loader(Noisy(), 8, workers=1, shuffle=True)
    together = list(zip(loader.batches(0, 0), loader.batches(0, 1), strict=True))
    assert same([one[0] for one, _ in together], [batch[0] for batch in loader.batches(0, 0)])
    assert same([two[0] for _, two in together], [batch[0] for batch in loader.batches(0, 1)])
    loader.close()


def test_a_pass_that_is_left_in_the_middle_leaves_no_process():
    before = set(children())
    loader = ax.Loader(Noisy(6000), 8, workers=2)
    batches = iter(loader)
    next(batches)
    started = set(children()) - before
    assert len(started) == 2
    batches.close()
    assert gone(started)
    assert len(list(ax.Loader(Noisy(), 8, workers=2))) == 8  # a temporary one ends with its last batch
    assert gone(set(children()) - before)


# --- trouble ---------------------------------------------------------------------------------------------------------

# torch looks for lost file descriptors with temporary files; where the signal of a killed worker comes in between, one of them
# cannot be removed a second time, which Python tells of on stderr.
killing = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@killing
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_is_named_with_the_batch_that_it_had(workers):
    before = set(children())
    began = time.monotonic()
    told = (
        r"worker \d \(pid \d+\) was killed by SIGKILL while it had batch 5 of epoch 0, made of the samples "
        r"\[40, 41, 42, 43, 44, 45, 46, 47\] in hand\. .*too much memory"
    )
    with pytest.raises(ax.WorkerError, match=told):
        list(ax.Loader(Troubled("kill"), 8, workers=workers))
    assert time.monotonic() - began < 10
    assert gone(set(children()) - before)


@killing
def test_a_worker_that_ends_by_itself_is_too():
    with pytest.raises(ax.WorkerError, match=r"ended with exit status 3 while it had batch 5 of epoch 0"):
        list(ax.Loader(Troubled("exit"), 8, workers=2))


@killing
def test_a_worker_that_is_killed_by_somebody_while_it_idles_is_replaced():
    loader = ax.Loader(Noisy(), 8, workers=2)
    pids = {pid for batch in loader for pid in batch[1].tolist()}
    os.kill(min(pids), signal.SIGKILL)
    assert gone({min(pids)})
    assert len(list(loader)) == 8
    loader.close()


@killing
def test_a_worker_that_dies_does_not_disturb_the_step_in_hand():
    # torch's own handler would raise wherever the program is, be it between the halves of an update.
    batches = iter(ax.Loader(Noisy(6000), 8, workers=2))
    next(batches)
    victim = children()[-1]
    os.kill(victim, signal.SIGKILL)
    ends = time.monotonic() + 1
    while time.monotonic() < ends:  # "training": bytecodes in which a signal's handler would run
        sum(range(100))
    with pytest.raises(ax.WorkerError, match=f"pid {victim}"):
        list(batches)


@pytest.mark.parametrize("workers", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_worker_that_never_answers_is_an_error_within_the_limit(workers):
    before = set(children())
    began = time.monotonic()
    told = r"worker \d \(pid \d+\) has not made its batch in 2 s: batch 5 of epoch 0, made of the samples \[40, .*timeout="
    with pytest.raises(ax.WorkerError, match=told):
        list(ax.Loader(Troubled("sleep"), 8, workers=workers, timeout=2))
    assert time.monotonic() - began < 5
    assert gone(set(children()) - before)


@pytest.mark.slow
def test_the_limit_is_below_ten_seconds_unless_it_is_set():
    began = time.monotonic()
    with pytest.raises(ax.WorkerError, match="has not made its batch"):
        list(ax.Loader(Troubled("sleep"), 8, workers=2))
    assert time.monotonic() - began < 10


def test_an_error_in_a_worker_keeps_its_kind_its_traceback_and_its_place():
    before = set(children())
    with pytest.raises(ValueError, match="a bad sample") as caught:
        list(ax.Loader(Troubled("raise"), 8, workers=2))
    text = str(caught.value)
    assert 'raise ValueError("a bad sample")' in text, "the line that raised it"
    assert "in the sample at index 40" in text
    assert "in batch 5 of epoch 0, made of the samples [40, 41, 42, 43, 44, 45, 46, 47]" in caught.value.__notes__
    assert gone(set(children()) - before)


@killing
def test_in_a_fit_the_steps_before_the_trouble_are_not_lost():
    objective = ax.Supervised(torch.nn.Linear(4, 1).double(), lambda predictions, _: predictions.square().mean())
    loop = ax.Loop(objective, ax.Optimizer("sgd", lr=0.01), progress=False)
    trained = []
    loop.on("after_batch")(lambda state: trained.append(state.step))
    with pytest.raises(ax.WorkerError, match="batch 5 of epoch 0"):
        loop.fit(ax.Loader(Troubled("kill"), 8, workers=1, prefetch=1), epochs=1)
    assert trained == list(range(1, loop.state.step + 1))
    assert 3 <= loop.state.step <= 5  # batch 4 may have been on its way
    assert loop.state.status == "failed"
    step = loop.state.step
    loop.fit(ax.Loader(Noisy(), 8, workers=2), steps=2)
    assert loop.state.step == step + 2


def test_a_fit_leaves_no_worker_behind():
    before = set(children())
    objective = ax.Supervised(torch.nn.Linear(4, 1).double(), lambda predictions, _: predictions.square().mean())
    loop = ax.Loop(objective, ax.Optimizer("sgd", lr=0.01), progress=False)
    train, validation = ax.Loader(Noisy(), 8, workers=2), ax.Loader(Noisy(20), 8, workers=1)
    seen = []
    loop.on("after_epoch")(lambda state: seen.append(len(set(children()) - before)))
    assert loop.fit(train, validation, epochs=2).ok
    assert seen == [3, 3]
    assert gone(set(children()) - before)
    loop.evaluate(validation)
    loop.fit(train, epochs=1, limit=2)
    assert gone(set(children()) - before)


def test_what_cannot_be_sent_to_a_worker_says_so():
    loader = ax.Loader(Noisy(), 8, workers=1, start_method="spawn", transform=lambda batch: batch)
    with pytest.raises(ax.DataError, match=r"cannot be sent to a worker process: .*start_method='fork'"):
        list(loader)


SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {folder!r})
import torch
import axontrain as ax
from made_datasets import Noisy, Troubled

if __name__ == "__main__":
    torch.set_num_threads(1)
    objective = ax.Supervised(torch.nn.Linear(4, 1).double(), lambda predictions, _: predictions.square().mean())
    loop = ax.Loop(objective, ax.Optimizer("sgd", lr=0.01), progress=False)
    told = []

    @loop.on("after_batch")
    def tell(state):
        if not told:
            told.append(True)
            print("training", flush=True)
        time.sleep(0.02)

    result = loop.fit(ax.Loader({dataset}, 8, workers=2), epochs={epochs})
    print(result.status, flush=True)
"""


def started(tmp_path, dataset="Noisy(100000)", epochs=1):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(Path(__file__).parent), dataset=dataset, epochs=epochs))
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "training\n", process.communicate()[1]
    return process, children(process.pid)


def test_ctrl_c_ends_the_run_and_its_workers(tmp_path):
    process, workers = started(tmp_path)
    assert len(workers) == 2
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    out, err = process.communicate(timeout=30)
    assert out == "interrupted\n"
    assert err == ""
    assert gone(workers)


def test_a_killed_run_takes_its_workers_with_it_though_they_hang(tmp_path):
    process, workers = started(tmp_path, dataset="Troubled('sleep')")
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert gone(workers)


def test_a_normal_end_leaves_nothing(tmp_path):
    process, workers = started(tmp_path, dataset="Noisy()", epochs=2)
    out, err = process.communicate(timeout=60)
    assert (out, err) == ("completed\n", "")
    assert gone(workers)


def test_workers_serve_a_loop_in_another_thread():
    found = []

    def train():
        found.append(read(Noisy(), workers=2)[0])

    thread = threading.Thread(target=train)
    thread.start()
    thread.join(60)
    assert same(found[0], read(Noisy())[0])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"workers": -1}, "workers=-1: a whole number, 0 or more"),
        ({"prefetch": 0}, "prefetch=0: a whole number, 1 or more"),
        ({"timeout": 0}, "timeout=0: seconds, above 0"),
        ({"start_method": "thread"}, "start_method='thread': this platform has 'fork'"),
        ({"num_workers": 2}, "did you mean 'workers'"),
    ],
)
def test_options_that_cannot_work_are_errors(options, told):
    with pytest.raises(ax.ConfigurationError, match=told):
        ax.Loader(Noisy(), 8, **options)


class Ends(Noisy):
    """Raises what Python takes for the end of an iteration."""

    def __getitem__(self, index):
        return super().__getitem__(next(one for one in [index] if one != 40))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_stop_iteration_in_a_sample_is_an_error_and_no_end(workers):
    with pytest.raises(ax.DataError if not workers else (ax.DataError, RuntimeError), match="StopIteration") as caught:
        list(ax.Loader(Ends(), 8, workers=workers))
    assert any("in batch 5 of epoch 0" in note for note in caught.value.__notes__)
    with pytest.raises(ax.DataError, match="StopIteration"):
        list(ax.Loader(iter(range(8)), 4, transform=lambda batch: next(iter([]))))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("failing", [RuntimeError, ValueError])
def test_an_error_of_the_sampler_has_its_turn(workers, failing):
    class Breaks:
        def __iter__(self):
            yield from range(20)
            raise failing("the sampler broke")

    loader = ax.Loader(Noisy(), 4, sampler=Breaks(), workers=workers)
    for _ in range(2):
        with pytest.raises(failing, match="the sampler broke"):
            list(loader)
    loader.close()


class Odd(torch.utils.data.Dataset):
    """Reads the seed and draws from nothing that is global, as NumPy's own advice goes."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.tensor(np.random.default_rng(torch.initial_seed()).random(2))


def test_samples_that_read_their_seed_are_the_same_everywhere():
    whole = list(ax.Loader(Odd(), 4).batches(0, 0))
    for workers in (1, 2):
        loader = ax.Loader(Odd(), 4, workers=workers)
        assert same(list(loader.batches(0, 0)), whole)
        assert same(list(loader.batches(0, 0, 2)), whole[2:])
        loader.close()
    assert len(torch.cat(whole).unique()) == 48, "and no two alike"


class Collecting(Noisy):
    def __getitem__(self, index):
        assert gc.isenabled()
        gc.collect()
        return super().__getitem__(index)


class Garbage:
    """A part of a cycle, as an exception's traceback is; freeing it tells who did."""

    def __init__(self, told):
        self.told, self.itself = told, self

    def __del__(self):
        os.write(self.told, b"%d " % os.getpid())


def test_a_worker_does_not_collect_the_garbage_of_the_loops_process():
    """Freeing there what lay on a GPU here ends it."""
    read_end, write_end = os.pipe()
    Garbage(write_end)
    _, pids = read(Collecting(), workers=2)
    assert len(pids) == 2
    assert gc.isenabled(), "and here it is collected as before"
    gc.collect()
    assert os.read(read_end, 1000) == b"%d " % os.getpid()
    os.close(read_end)
    os.close(write_end)


def test_predict_leaves_no_worker_though_its_error_is_kept():
    before = set(children())
    loop = ax.Loop(ax.Supervised(torch.nn.Linear(3, 1), "mse"), progress=False)  # 4 features come
    with pytest.raises(RuntimeError) as caught:
        loop.predict(ax.Loader(Noisy(), 8, workers=2))
    assert caught.value.__traceback__ is not None
    assert gone(set(children()) - before)


def test_a_worker_that_dies_while_another_thread_reads_is_told_of_there():
    found = []

    def read_all():
        try:
            list(ax.Loader(Troubled("kill"), 8, workers=2))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=read_all)
    thread.start()
    thread.join(30)
    assert [type(error) for error in found] == [ax.WorkerError]


def test_no_limit_is_none():
    assert len(list(ax.Loader(Noisy(16), 8, workers=1, timeout=None))) == 2


def test_a_loader_that_is_collected_ends_its_workers_at_once():
    loader = ax.Loader(Noisy(), 8, workers=2)
    loader.itself = loader  # a cycle, which only the garbage collector ends
    pids = {pid for batch in loader for pid in batch[1].tolist()}
    began = time.monotonic()
    del loader
    gc.collect()
    assert gone(pids)
    assert time.monotonic() - began < 4


def test_a_mixture_is_sent_to_workers_without_what_chooses():
    data = ax.Mixture({"a": Noisy(8), "b": Noisy(8)}, which=lambda step: "ab"[step % 2])  # no lambda can be pickled
    loader = ax.Loader(data, 4, shuffle=True, workers=1, start_method="spawn")
    assert [batch.task for batch in loader] == ["a", "b", "a", "b"]
    loader.close()
