"""The handwritten digits that the package ships, for a first run, tests and benchmarks on real data."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from axontrain.data.arrays import ArrayDataset
from axontrain.errors import ConfigurationError
from axontrain.randomness import derive

CLASSES = 10


def digits(*, test: float = 0.2, seed: int = 0) -> tuple[ArrayDataset, ArrayDataset]:
    """Load 1,797 handwritten digits of 43 people as ``(train, test)``.

    Each sample is ``(image, label)``: 64 floats in 0 to 1, the rows of an 8×8 image, and an int64 in 0 to 9. The split is
    random and stratified: each digit has the same share in both parts; the writers are not kept apart (the source does
    not name them).

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998,
    https://doi.org/10.24432/C50P49 (its test part, as scikit-learn ships it). Licence: CC BY 4.0.

    Args:
        test: the share of samples in the test part: 0 or more, and below 1.
        seed: of the split.

    >>> train, test = digits()
    >>> len(train), len(test), train[0][0].shape
    (1438, 359, torch.Size([64]))

    Raises:
        ConfigurationError: for a share that leaves nothing to train on, or is none.
    """
    if not 0 <= test < 1:
        raise ConfigurationError(f"digits(test={test!r}): the share of samples to test on, 0 or more and below 1")
    stored = load_file(Path(__file__).with_name("digits.safetensors"))
    images, labels = stored["images"].float() / 16, stored["labels"].long()
    generator = torch.Generator().manual_seed(derive(seed, "digits"))
    shuffled = torch.randperm(len(labels), generator=generator)
    parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for digit in range(CLASSES):
        of_digit = shuffled[labels[shuffled] == digit]
        held_out = round(len(of_digit) * test)
        parts[1].append(of_digit[:held_out])
        parts[0].append(of_digit[held_out:])
    train_rows, test_rows = (torch.cat(part).sort().values for part in parts)
    data = ArrayDataset(images, labels)
    return data.subset(train_rows), data.subset(test_rows)
