"""What may be trained on: lists, generators, torch's DataLoader; each read as it comes, never ahead."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import axontrain as ax
from axontrain import schedules

TRUE = torch.tensor([[1.0], [-2.0], [0.5]])


def data(n=48, seed=0):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return x, x @ TRUE


def batches(count=4, size=8):
    x, y = data(count * size)
    return list(zip(x.split(size), y.split(size), strict=True))


def line_loop(**options):
    torch.manual_seed(0)
    options = {"progress": False, **options}
    optimizer = options.pop("optimizer", None) or ax.Optimizer("sgd", lr=0.1)
    return ax.Loop(ax.Supervised(nn.Linear(3, 1), "mse"), optimizer, **options)


class Reiterable:
    """Batches without a length, anew at each pass; counts what is read."""

    def __init__(self, of):
        self.of, self.reads, self.passes = of, 0, 0

    def __iter__(self):
        self.passes += 1
        for batch in self.of:
            self.reads += 1
            yield batch


def learned(loop):
    return (loop.objective.model.weight.detach().T - TRUE).abs().max().item() < 0.1


def test_a_list_of_batches_is_one_stream():
    loop = line_loop()
    two = batches(2)  # two batches: neither a pair of inputs and targets nor two loaders
    result = loop.fit(two, two, epochs=60)
    assert (loop.state.step, loop.state.samples) == (120, 60 * 16)
    assert result.values["val/loss"] == pytest.approx(loop.evaluate(two)["loss"])
    assert learned(loop)


def test_a_tuple_of_arrays_is_refused_with_the_way_to_pass_it():
    with pytest.raises(ax.DataError, match="ArrayDataset"):
        line_loop().fit(data(), epochs=1)


def test_an_iterable_of_unknown_length_trains_epoch_after_epoch():
    loop, stream = line_loop(), Reiterable(batches())
    loop.fit(stream, epochs=15)
    assert (loop.state.step, loop.state.epoch, stream.passes, stream.reads) == (60, 15, 15, 60)
    assert learned(loop)


def test_a_schedule_learns_the_length_of_an_iterable_after_its_first_epoch():
    loop = line_loop(optimizer=ax.Optimizer("sgd", lr=1.0, schedule=schedules.linear(), clip_norm=1e-3))
    rates = []
    loop.on("after_batch")(lambda state: rates.append(state.optimizers["main"].lr))
    loop.fit(Reiterable(batches(4)), epochs=3)
    assert rates == pytest.approx([1.0] * 4 + [1 - k / 12 for k in range(4, 12)])


def test_an_iterator_that_is_spent_in_the_second_epoch_says_so():
    loop = line_loop()
    with pytest.raises(ax.EmptyDataError, match="read once"):
        loop.fit(iter(batches()), epochs=2)
    assert (loop.state.epoch, loop.state.step) == (1, 4)


def test_a_generator_serves_one_epoch():
    loop = line_loop()
    assert loop.fit((batch for batch in batches()), epochs=1).status == "completed"
    assert loop.state.step == 4


def test_an_iterable_is_never_read_ahead():
    # A policy's data depend on its newest weights: a batch read early would come from older ones.
    loop, stream = line_loop(), Reiterable(batches(6))
    ahead = []
    loop.on("before_batch")(lambda state: ahead.append(stream.reads - state.step))
    loop.fit(stream, steps=4)
    assert ahead == [1, 1, 1, 1]  # at each step the batch in hand, and no other
    assert stream.reads == 4


def test_a_limited_pass_over_an_endless_iterable_reads_no_more_than_the_limit():
    def endless():
        while True:
            yield from batches()

    class Endless(Reiterable):
        pass

    stream = Endless(endless())
    loop = line_loop()
    loop.fit(stream, epochs=2, limit=3)
    assert (loop.state.step, loop.state.epoch, stream.reads) == (6, 2, 6)


def test_a_stop_before_the_epoch_reads_no_batch():
    loop, stream = line_loop(), Reiterable(batches())
    loop.on("before_epoch")(lambda state: ax.Stop("enough"))
    assert loop.fit(stream, epochs=1).status == "stopped"
    assert (loop.state.step, stream.reads) == (0, 0)


def test_a_batch_made_from_the_newest_weights_is():
    loop = line_loop()

    class Policy:
        def __init__(self):
            self.at = []

        def __iter__(self):
            for batch in batches(5):
                self.at.append(loop.objective.model.weight.detach().clone())
                yield batch

    policy, after = Policy(), [loop.objective.model.weight.detach().clone()]
    loop.on("after_batch")(lambda state: after.append(state.objective.model.weight.detach().clone()))
    loop.fit(policy, epochs=1)
    assert len(policy.at) == 5
    for at, newest in zip(policy.at, after, strict=False):
        assert torch.equal(at, newest)


@pytest.mark.parametrize("shuffle", [False, True])
def test_torchs_dataloader_trains_and_validates(shuffle):
    train = DataLoader(TensorDataset(*data(64)), batch_size=16, shuffle=shuffle)
    validation = DataLoader(TensorDataset(*data(30, seed=1)), batch_size=16)
    loop = line_loop()
    result = loop.fit(train, validation, epochs=15)
    assert loop.state.step == 60
    assert result.values["val/loss"] < 1e-2
    x, y = data(30, seed=1)
    by_hand = (loop.predict(validation) - y).square().mean().item()
    assert result.values["val/loss"] == pytest.approx(by_hand, rel=1e-4)
    assert loop.predict(x).shape == (30, 1)


def test_torchs_dataloader_over_an_iterable_dataset_of_no_length():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from zip(*data(40), strict=True)

    loop = line_loop()
    loop.fit(DataLoader(Stream(), batch_size=8), epochs=12)
    assert (loop.state.step, loop.state.epoch) == (60, 12)
    assert learned(loop)


def test_a_map_style_torch_dataset_is_batched_and_shuffled():
    loop = line_loop()
    seen = []
    loop.on("after_batch")(lambda state: seen.append(state.last.targets))
    x, y = data(40)
    loop.fit(TensorDataset(x, y), epochs=1, batch_size=16)
    assert [len(part) for part in seen] == [16, 16, 8]
    assert torch.equal(torch.cat(seen), y[ax.order(0, 0, 40)])
