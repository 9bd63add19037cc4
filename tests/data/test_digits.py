import pytest
import torch

import axontrain as ax


def rows(data):
    return {(*image.tolist(), int(label)) for image, label in (data[index] for index in range(len(data)))}


def test_sizes_dtypes_and_ranges():
    train, test = ax.data.digits()
    assert (len(train), len(test)) == (1438, 359)
    for part in (train, test):
        images, labels = part.tensors
        assert (images.dtype, labels.dtype, images.shape[1:]) == (torch.float32, torch.int64, (64,))
        assert (images.min(), images.max()) == (0, 1)
        assert labels.unique().tolist() == list(range(10))


@pytest.mark.parametrize(("share", "seed"), [(0.2, 0), (0.5, 3), (0.1, 7)])
def test_the_split_is_stratified_disjoint_and_whole(share, seed):
    train, test = ax.data.digits(test=share, seed=seed)
    of_train, of_test = (torch.bincount(part.tensors[1], minlength=10) for part in (train, test))
    whole = of_train + of_test
    assert whole.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert of_test.tolist() == [round(int(count) * share) for count in whole]
    assert not rows(train) & rows(test)
    assert len(rows(train)) + len(rows(test)) == 1797  # no image is there twice


def test_the_split_is_a_pure_function_of_its_seed():
    before = torch.get_rng_state()
    one, again, other = ax.data.digits(), ax.data.digits(), ax.data.digits(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for part in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(one[part].tensors, again[part].tensors, strict=True))
    assert rows(one[1]) != rows(other[1])


def test_there_may_be_nothing_to_test_on():
    train, test = ax.data.digits(test=0)
    assert (len(train), len(test)) == (1797, 0)


@pytest.mark.parametrize("share", [1.0, 1.5, -0.1, float("nan")])
def test_a_share_that_leaves_nothing_to_train_on_or_is_none_is_an_error(share):
    with pytest.raises(ax.ConfigurationError, match="test="):
        ax.data.digits(test=share)
