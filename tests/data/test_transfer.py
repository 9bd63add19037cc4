"""On a GPU: batches are copied while it computes on the one before, and their memory is not handed out too early."""

import gc

import pytest
import torch
from made_datasets import Noisy, noise
from process_table import children, gone

import axontrain as ax
from axontrain.data.transfer import ahead

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device (they are hidden but from pytest -m gpu)"),
]


class Collecting(Noisy):
    def __getitem__(self, index):
        gc.collect()
        return super().__getitem__(index)


class Failing(Noisy):
    def __getitem__(self, index):
        if index == 20:
            raise ValueError("twenty")
        return super().__getitem__(index)


CYCLES = 20_000_000  # of the device's clock: some 10 ms


def batches(count, size=4_000_000):
    for number in range(count):
        yield torch.full((size,), float(number)), {"number": number}


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_copies_overlap_with_computation():
    device = torch.device("cuda", torch.cuda.current_device())
    list(ahead(batches(3), device))  # contexts, pinned memory
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for x, _ in ahead(batches(6), device):
            torch.cuda._sleep(5 * CYCLES)  # the host lays the next into pinned memory meanwhile, which takes it some time
            x.sum()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    copies = [event.time_range for event in on_device if "HtoD" in event.name]
    kernels = [event.time_range for event in on_device if "spin" in event.name or "sleep" in event.name.lower()]
    assert len(copies) >= 6
    assert len(kernels) == 6
    within = [
        copy
        for copy in copies
        if any(min(copy.end, k.end) - max(copy.start, k.start) > 0.5 * (copy.end - copy.start) for k in kernels)
    ]
    assert len(within) >= 4, "but for the first, copies run while a kernel does"


def test_no_batch_is_overwritten_while_it_is_used():
    device = torch.device("cuda", torch.cuda.current_device())
    sums = []
    for x, tag in ahead(batches(40, size=1_000_000), device):
        torch.cuda._sleep(CYCLES // 10)  # the host runs ahead of the device: memory that is free too early is written again
        sums.append((x.double().mean(), tag["number"]))
        del x
    assert [float(mean) for mean, _ in sums] == [float(number) for _, number in sums]


def test_an_error_comes_in_its_turn():
    def failing():
        yield from batches(2, size=10)
        raise ValueError("no more")

    copied = ahead(failing(), torch.device("cuda"))
    assert [next(copied)[1]["number"] for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="no more"):
        next(copied)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_batches_are_those_of_the_cpu(workers):
    expected = [values for values, _ in ax.Loader(Noisy(), 8, shuffle=True, transform=noise).batches(0, 0)]
    seen = []

    class Look(ax.Objective):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def predict(self, values):
            assert values.is_cuda
            seen.append(values.cpu())
            return values * self.scale

        def loss(self, predictions, _):
            return predictions.mean()

    loop = ax.Loop(Look(), ax.Optimizer("sgd", lr=0.1), device="cuda", progress=False)
    loop.fit(
        ax.Loader(Noisy(), 8, shuffle=True, transform=noise, workers=workers, start_method="spawn" if workers else None),
        epochs=1,
    )
    assert all(map(torch.equal, seen, expected))
    assert len(seen) == len(expected)


def test_arrays_on_the_device_are_shuffled_and_transformed_there():
    x = torch.arange(64.0)
    data = ax.ArrayDataset(x[:, None], x.long()).to("cuda")

    def flip(batch):
        images, labels = batch
        assert images.is_cuda
        return torch.where(torch.rand(len(images), 1, device="cuda") < 0.5, -images, images), labels

    here = [batch for epoch in range(2) for batch in ax.Loader(data, 8, shuffle=True, transform=flip).batches(0, epoch)]
    again = [batch for epoch in range(2) for batch in ax.Loader(data, 8, shuffle=True, transform=flip).batches(0, epoch)]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(here, again, strict=True))
    assert torch.cat([labels for _, labels in here[:8]]).tolist() == ax.order(0, 0, 64).tolist()
    assert any(bool((images < 0).any()) for images, _ in here)


def test_a_worker_begins_though_there_is_garbage_on_the_device():
    """What was used by several streams is freed with calls of CUDA, which a forked process cannot make."""
    kept = []
    kept.append(kept)
    for _ in range(64):
        kept.append(torch.zeros(1_000_000, device="cuda"))
        kept[-1].record_stream(torch.cuda.Stream())
    del kept
    loader = ax.Loader(Collecting(), 8, workers=2)
    assert len(list(loader.batches(0, 0))) == len(loader)
    loader.close()


def test_an_error_in_reading_leaves_no_worker():
    def read_some():
        loader = ax.Loader(Failing(), 8, workers=2)
        with pytest.raises(ValueError, match="twenty"):
            list(ahead(loader.batches(0, 0), torch.device("cuda", 0)))

    before = set(children())
    gc.disable()
    try:
        read_some()
        assert gone(set(children()) - before)
    finally:
        gc.enable()


def test_an_error_in_prediction_leaves_no_worker():
    def predict_some():
        loop = ax.Loop(ax.Supervised(torch.nn.Linear(3, 1), "mse"), device="cuda", progress=False)  # 4 features come
        with pytest.raises(RuntimeError) as caught:
            loop.predict(ax.Loader(Noisy(), 8, workers=2))
        assert caught.value.__traceback__ is not None
        assert gone(set(children()) - before)

    before = set(children())
    predict_some()
