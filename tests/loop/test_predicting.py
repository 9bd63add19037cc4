"""Prediction: for all of the data, in their order, whatever the shape of what comes out."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

import axontrain as ax


def rows(n=22):
    return torch.arange(n * 3.0).reshape(n, 3)


class Doubling(ax.Objective):
    def predict(self, x):
        return 2 * x


def loop_of(objective=None, **options):
    return ax.Loop(objective or Doubling(), progress=False, **options)


class Outputs(NamedTuple):
    logits: torch.Tensor
    norm: torch.Tensor


@pytest.mark.parametrize(
    "data",
    [
        lambda: rows(),
        lambda: rows().numpy(),
        lambda: ax.ArrayDataset(rows()),
        lambda: ax.ArrayDataset(rows(), torch.zeros(22)),
        lambda: ax.Loader(ax.ArrayDataset(rows(), torch.zeros(22)), 8),
        lambda: list(rows().split(8)),
        lambda: [(x, torch.zeros(len(x))) for x in rows().split(8)],
        lambda: iter(rows().split(8)),
        lambda: torch.utils.data.TensorDataset(rows(), torch.zeros(22)),
        lambda: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows(), torch.zeros(22)), batch_size=8),
    ],
    ids=["tensor", "numpy", "unlabelled", "labelled", "Loader", "list", "pairs", "iterator", "torch dataset", "DataLoader"],
)
def test_predictions_come_in_the_order_of_the_data_and_of_a_pair_the_first_is_inputs(data):
    assert torch.equal(loop_of().predict(data()), 2 * rows())


def test_a_batch_size_holds_for_a_bare_tensor():
    sizes = []

    class Looking(Doubling):
        def predict(self, x):
            sizes.append(len(x))
            return x

    loop_of(Looking()).predict(rows(), batch_size=8)
    assert sizes == [8, 8, 6]


def test_batches_go_through_the_objectives_split():
    class Named(Doubling):
        def split(self, batch):
            return batch["x"], None

    assert torch.equal(loop_of(Named()).predict(ax.ArrayDataset({"y": rows() - 1, "x": rows()})), 2 * rows())


@pytest.mark.parametrize("batch_size", [8, 22])
@pytest.mark.parametrize(
    ("shape", "get"),
    [
        (lambda x: {"twice": 2 * x, "inner": {"sum": x.sum(1)}}, lambda p: (p["twice"], p["inner"]["sum"])),
        (lambda x: (2 * x, x.sum(1)), lambda p: p),
        (lambda x: Outputs(2 * x, x.sum(1)), lambda p: (p.logits, p.norm)),
    ],
    ids=["mapping", "tuple", "named tuple"],
)
def test_structures_keep_their_shape(shape, get, batch_size):
    class Structured(Doubling):
        def predict(self, x):
            return shape(x)

    twice, total = get(loop_of(Structured()).predict(rows(), batch_size=batch_size))
    assert torch.equal(twice, 2 * rows())
    assert torch.equal(total, rows().sum(1))


def test_a_list_with_an_item_for_each_sample_is_put_together_in_order():
    # As text or boxes are: their number is that of the samples, and a last batch has fewer.
    class Texts(Doubling):
        def predict(self, x):
            return [f"{value:g}" for value in x[:, 0].tolist()]

    assert loop_of(Texts()).predict(rows(), batch_size=8) == [f"{value:g}" for value in rows()[:, 0].tolist()]


def test_numbers_of_a_batch_are_stacked():
    class Summing(Doubling):
        def predict(self, x):
            return x.sum()

    assert torch.equal(loop_of(Summing()).predict(rows(), batch_size=11), torch.stack([p.sum() for p in rows().split(11)]))


def test_ragged_predictions_are_an_error_that_offers_the_stream():
    class Ragged(Doubling):
        def predict(self, x):
            return x[:, : int(x[0, 0]) % 2 + 1]

    batches = [rows(4), rows(4) + 1]
    with pytest.raises(ax.DataError, match="stream=True"):
        loop_of(Ragged()).predict(batches)
    assert [part.shape for part in loop_of(Ragged()).predict(batches, stream=True)] == [(4, 1), (4, 2)]


def test_a_stream_computes_a_batch_when_it_is_asked_for():
    calls = []

    class Looking(Doubling):
        def predict(self, x):
            calls.append(len(x))
            return super().predict(x)

    stream = loop_of(Looking()).predict(rows(), batch_size=8, stream=True)
    assert calls == []
    assert torch.equal(next(stream), 2 * rows()[:8])
    assert calls == [8]
    assert torch.equal(torch.cat(list(stream)), 2 * rows()[8:])


def test_a_stream_of_faulty_data_fails_at_once():
    with pytest.raises(ax.ConfigurationError, match="batch_size"):
        loop_of().predict([rows()], batch_size=8, stream=True)


def test_predicting_makes_no_graph_and_is_in_eval_mode():
    class Dropping(ax.Objective):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.9))

        def predict(self, x):
            return self.net(x)

    loop = loop_of(Dropping())
    predictions = loop.predict(rows())
    assert not predictions.requires_grad
    assert torch.equal(predictions, loop.objective.net[0](rows()))
    assert all(not part.requires_grad for part in loop.predict(rows(), stream=True))


def test_an_objective_is_called_like_any_module():
    assert torch.equal(Doubling()(rows()), 2 * rows())


def test_what_is_random_in_evaluation_and_prediction_follows_from_the_seed():
    class Random(ax.Objective):
        def predict(self, x):
            return x + torch.rand_like(x)

        def loss(self, predictions, targets):
            return (predictions - targets).square().mean()

    loop, other = loop_of(Random()), loop_of(Random(), seed=1)
    first, values = loop.predict(rows()), loop.evaluate(rows())
    torch.rand(5)
    assert torch.equal(loop.predict(rows()), first)
    assert loop.evaluate(rows()) == values != other.evaluate(rows())
