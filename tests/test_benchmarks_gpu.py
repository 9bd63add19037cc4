"""benchmarks/gpu/ in small on a CPU: its data, its network, that those compared do the same, and that a table comes out."""

import functools
import inspect
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import axontrain as ax
from benchmarks.gpu import airbench, cifar, cifar_data, gpt, mlp, tables
from benchmarks.gpu.batches import Batches
from benchmarks.gpu.contenders import CONTENDERS, axontrain, by_hand, cuda_graph, same_loader
from benchmarks.gpu.processes import FailedError, Process
from benchmarks.gpu.task import Given
from benchmarks.gpu.workloads import WORKLOADS

ROOT = Path(__file__).parent.parent
HERE = Given(torch.device("cpu"), small=True)
HAS_GRAPH = "graph" in inspect.signature(ax.Loop).parameters


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def write(folder, part, count):
    """A file like CIFAR-10's, of pictures that are different in each pixel, without loss."""
    generator = np.random.default_rng(count)
    images = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = generator.integers(0, 10, count, dtype=np.uint8)
    table = pyarrow.table({"image": [encoded(image) for image in images], "label": labels})
    pyarrow.parquet.write_table(table, cifar_data.parquet(folder, part))
    return images, labels


def test_pictures_are_decoded_and_converted(tmp_path):
    wanted = {"train": write(tmp_path, "train", 21), "test": write(tmp_path, "test", 5)}
    cifar_data.convert(tmp_path, tmp_path / cifar_data.CONVERTED)
    found = cifar_data.read(tmp_path / cifar_data.CONVERTED)
    for part, (images, labels) in wanted.items():
        assert found[part].images.dtype is torch.uint8
        assert found[part].images.permute(0, 2, 3, 1).numpy().tolist() == images.tolist()
        assert found[part].labels.tolist() == labels.tolist()


@pytest.mark.parametrize("missing", ["pyarrow.parquet", "PIL"])
def test_who_cannot_decode_is_told_what_to_do(tmp_path, monkeypatch, missing):
    write(tmp_path, "train", 1)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=r"pip install pyarrow pillow\. Or convert it .* --from .* --to cifar10.safetensors"):
        cifar_data.decoded(cifar_data.parquet(tmp_path, "train"))


def test_other_files_are_refused(tmp_path):
    path = cifar_data.parquet(tmp_path, "train")
    pyarrow.parquet.write_table(pyarrow.table({"picture": [b""], "label": [1]}), path)
    with pytest.raises(SystemExit, match="and not image"):
        cifar_data.decoded(path)
    pyarrow.parquet.write_table(pyarrow.table({"image": [encoded(np.zeros((8, 8, 3), np.uint8))], "label": [1]}), path)
    with pytest.raises(SystemExit, match="images of 64 pixels"):
        cifar_data.decoded(path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(SystemExit, match=r"holds \['x'\]"):
        cifar_data.read(tmp_path / "x.safetensors")


def test_the_first_layer_whitens():
    torch.manual_seed(0)
    smooth = nn.functional.avg_pool2d(torch.randn(64, 3, 18, 18), 3, 1)  # neighbours that resemble each other
    images = smooth + 0.5 * smooth.mean(1, keepdim=True)
    network = airbench.Network((8, 8, 8))
    airbench.whiten(network, images)
    white = network.whiten(images).detach()
    first, second = white.chunk(2, dim=1)
    assert second.equal(-first)
    flat = first.permute(1, 0, 2, 3).flatten(1)
    covariance = flat @ flat.T / flat.shape[1]
    before = images.permute(1, 0, 2, 3).flatten(1)
    assert (before @ before.T / before.shape[1])[0, 1] > 0.02  # colours that go together
    # The constant under the root leaves the smallest variances below 1.
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3
    assert 0.9 < covariance.diag().min() <= covariance.diag().max() < 1.001
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == [
        "whiten.weight", *(f"blocks.{i}.norm{j}.weight" for i in range(3) for j in (1, 2))
    ]  # fmt: skip


def test_a_convolution_begins_as_the_identity():
    images = torch.randn(2, 4, 8, 8)
    made = airbench.Convolution(4, 6)(images)
    assert torch.allclose(made[:, :4], images)
    assert not torch.allclose(made[:, 4:], images[:, :2])


def test_slow_weights_pull_ever_less():
    net = nn.Linear(2, 1)
    with torch.no_grad():
        net.weight.zero_()
    slow = airbench.Lookahead(net, steps=100)
    with torch.no_grad():
        net.weight.fill_(1.0)
    slow.pull(50)
    kept = 0.95**5 * 0.5**3
    assert torch.allclose(net.weight, torch.full((1, 2), 1 - kept))
    with torch.no_grad():
        net.weight.fill_(9.0)
    slow.end()
    assert torch.allclose(net.weight, torch.full((1, 2), 1 - kept))


def test_the_schedule_is_a_triangle():
    factors = [cifar.schedule(p) for p in (0.0, 0.115, 0.23, 0.615, 1.0)]
    assert factors == pytest.approx([0.2, 0.6, 1.0, 0.535, 0.07])


def task_of(name, epochs, ended=None, **changed):
    work = WORKLOADS[name]
    data = work.load(HERE)
    task = work.task(data, HERE, epochs, (ended if ended is not None else []).append)
    for key, value in changed.items():
        setattr(task, key, value)
    return task, data


def test_batches_by_hand_are_those_of_the_loader():
    task, _ = task_of("cifar", 1)
    batches, loader, first = Batches(task), axontrain.loader(task), []
    for epoch in range(3):
        iter(batches)  # an iterator that nobody reads is no epoch
        pairs = list(zip(batches, loader.batches(0, epoch), strict=True))
        assert len(pairs) == len(batches) == 8
        for (x, y), (of_loader, labels) in pairs:
            assert x.equal(of_loader)
            assert y.equal(labels)
            assert x.is_contiguous(memory_format=torch.channels_last)
        first.append(pairs[0][0][0])
    assert not first[0].equal(first[1])
    assert not any(x.equal(task.data[0][: len(x)]) for x in first)


@pytest.mark.parametrize("contender", [axontrain, same_loader], ids=lambda module: module.__name__.rpartition(".")[2])
@pytest.mark.parametrize("name", WORKLOADS)
def test_contenders_train_the_same(name, contender):
    if contender is same_loader and name != "cifar":
        pytest.skip("a contender of CIFAR-10's")
    results = []
    for prepare in (by_hand.prepare, contender.prepare):
        ended = []
        task, data = task_of(name, 2, ended)
        before = {key: value.clone() for key, value in task.net.state_dict().items()}
        fixed = {key for key, parameter in task.net.named_parameters() if not parameter.requires_grad}
        prepare(task)()
        assert len(ended) == 2
        results.append((ended, task.net.state_dict(), WORKLOADS[name].judge(task, data)))
    (losses, weights, judged), (other_losses, other_weights, other_judged) = results
    assert other_losses == pytest.approx(losses, rel=1e-5)
    assert other_judged == pytest.approx(judged, rel=1e-4)
    for key, value in weights.items():
        torch.testing.assert_close(other_weights[key], value, rtol=1e-3, atol=1e-4)
    moved = {key for key, value in weights.items() if not value.equal(before[key])}
    assert moved == set(weights) - fixed


@pytest.mark.slow
def test_in_half_precision_they_train_the_same():
    class InHalf(Given):
        half = "bf16"

    given, results = InHalf(HERE.device, small=True), []
    data = cifar.load(given)
    assert data.train[0].dtype is torch.bfloat16
    for prepare in (by_hand.prepare, axontrain.prepare):
        ended = []
        task = cifar.task(data, given, 1, ended.append)
        prepare(task)()
        results.append((ended, task.net.state_dict()))
    (losses, weights), (other_losses, other_weights) = results
    assert other_losses == pytest.approx(losses, rel=1e-5)
    for key, value in weights.items():
        assert value.dtype in (torch.float32, torch.int64)
        torch.testing.assert_close(other_weights[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prepare", [by_hand.prepare, axontrain.prepare])
def test_the_first_layer_is_frozen_in_time(prepare):
    biases = []
    task, _ = task_of("cifar", 2)
    task.epoch_done = lambda loss: biases.append(task.net.whiten.bias.detach().clone())
    task.averaged = None  # which pulls at it too
    prepare(task)()
    assert cifar.SMALL.frozen_from == 1
    assert biases[0].abs().max() > 0
    assert biases[1].equal(biases[0])


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{"averaged": None}, {"freeze": None}, {"padding": 0}], ids=lambda one: next(iter(one)))
def test_what_belongs_to_the_training_changes_it(changed):
    states = []
    for how in ({}, changed):
        task, _ = task_of("cifar", 2, **how)
        by_hand.prepare(task)()
        states.append(task.net.state_dict())
    same = [torch.allclose(value, states[1][key], rtol=1e-3, atol=1e-4) for key, value in states[0].items()]
    assert not all(same)


def test_views_of_an_image_are_moved_and_mirrored():
    task, _ = task_of("cifar", 1)
    task.net = nn.Flatten()
    images = torch.randn(2, 3, 6, 6)
    padded = torch.from_numpy(np.pad(images.numpy(), [(0, 0), (0, 0), (1, 1), (1, 1)], mode="reflect"))
    one_way = images / 2 + padded[:, :, 0:6, 0:6] / 4 + padded[:, :, 2:8, 2:8] / 4
    wanted = (one_way + one_way.flip(3)) / 2
    assert torch.allclose(cifar.logits_of_views(task, images), wanted.flatten(1), atol=1e-6)


def test_flops_of_a_token_are_those_that_torch_counts():
    net, size = gpt.GPT(gpt.SMALL), gpt.SMALL
    tokens = torch.randint(size.vocabulary, (3, size.length))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        gpt.loss(net(tokens), tokens).backward()
    assert counter.get_total_flops() == 3 * size.length * gpt.flops_per_token(size)
    assert gpt.flops_per_token(gpt.FULL) == pytest.approx(6 * 124e6 + 12 * 12 * 768 * 1024, rel=0.01)
    with torch.device("meta"):
        assert sum(p.numel() for p in gpt.GPT(gpt.FULL).parameters()) == pytest.approx(124e6, rel=0.01)


def test_characters_are_tokens(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("to be, or not to be? " * 100)
    found = gpt.load(Given(HERE.device, small=True, text=path))
    x, y = found.pair
    assert int(x.max()) == len(set(path.read_text())) - 1
    assert x[:, 1:].equal(y[:, :-1])
    path.write_text("to be")
    with pytest.raises(SystemExit, match="has 5 characters; 513 are needed"):
        gpt.load(Given(HERE.device, small=True, text=path))


@pytest.mark.parametrize("name", CONTENDERS)
def test_a_contender_is_there(name):
    contender = CONTENDERS[name]
    assert (ROOT / "benchmarks" / "gpu" / "contenders" / f"{contender.module}.py").exists()
    assert set(contender.of) <= set(contender.workloads) <= set(WORKLOADS)


def found_of(name, **seconds):
    """What was measured, of contenders with so many seconds in each round."""
    work = WORKLOADS[name]
    found = tables.Found(name, work.title, work.tolerance)
    found.extra, found.peak = {"tokens": 100, "flops": 50.0}, 100.0
    for contender, times in seconds.items():
        turn = {"whole": 3.0, "accuracy": 0.95, "peak": 0.0}
        found.turns[contender] = {number: turn | {"seconds": time} for number, time in enumerate(times)}
        found.ends[contender] = {"loss": 0.5, "settings": {"cudnn.benchmark": True}}
    return found


def test_ratios_are_taken_within_a_round_to_the_fastest_by_hand():
    found = found_of("cifar", by_hand=[2.0, 4.0, 9.0], same_loader=[1.0, 2.0, 10.0], axontrain=[1.5, 2.0, 20.0])
    header, body = tables.rows([found], {"by_hand": "by hand", "axontrain": "axontrain", "ignite": "Ignite"})
    assert header == ["contender", "CIFAR-10"]
    assert body == [["by hand", "2.00 (0.90–2.00)"], ["axontrain", "1.50 (1.00–2.00)"]]


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (found_of("cifar", by_hand=[1.0], axontrain=[1.02]), ["≤ 1.02 ×: met, 1.02 ×", "≤ 1.02 ×: met, 1.00 ×"]),
        (found_of("cifar", by_hand=[1.0], axontrain=[1.03]), ["≤ 1.02 ×: missed, 1.03 ×", "≤ 1.02 ×: met, 1.00 ×"]),
        (found_of("gpt", by_hand=[1.0], axontrain=[1.0]), ["≥ 1.00 ×: met, 1.00 ×", "≥ 40 % on an H100: met, 50.0 %"]),
        (found_of("gpt", by_hand=[1.0], axontrain=[1.25]), ["≥ 1.00 ×: missed, 0.80 ×", "≥ 40 % on an H100: met, 40.0 %"]),
        (found_of("gpt", by_hand=[1.0], axontrain=[2.0]), ["≥ 1.00 ×: missed, 0.50 ×", "≥ 40 % on an H100: missed, 25.0 %"]),
        (found_of("mlp", by_hand=[3.0], cuda_graph=[1.0], axontrain_graph=[1.0]), ["≤ 1.05 ×: met", "≥ 3 ×: met, 3.00 ×"]),
        (found_of("mlp", by_hand=[3.0], cuda_graph=[1.0], axontrain_graph=[1.1]), ["≤ 1.05 ×: missed", "≥ 3 ×: missed"]),
        (found_of("mlp", by_hand=[3.0], axontrain_graph=[1.0]), ["≤ 1.05 ×: not measured", "≥ 3 ×: met"]),
        (found_of("cifar", axontrain=[3.0]), ["≤ 1.02 ×: not measured"]),
    ],
)  # fmt: skip
def test_targets(found, told):
    lines = tables.verdicts([found], judged=True)
    assert len(lines) == len(told)
    assert all(part in line for part, line in zip(told, lines, strict=True)), lines
    assert not any(word in line for line in tables.verdicts([found], judged=False) for word in (": met", ": missed"))


def test_the_time_to_an_accuracy_is_in_brackets_where_it_is_not_reached():
    found = found_of("cifar", by_hand=[1.0], axontrain=[1.0])
    found.goal = cifar.GOAL
    found.turns["axontrain"][0]["accuracy"] = 0.93
    header, body = tables.figures([found], {"by_hand": "by hand", "axontrain": "axontrain"})
    place = header.index("CIFAR-10: s to 94 %")
    assert [row[place] for row in body] == ["3.00", "(3.00)"]
    assert "94 % is not reached" in tables.verdicts([found], judged=True)[-1]


@pytest.mark.parametrize(
    ("end", "told"),
    [
        ({"loss": 0.51}, ""),
        ({"loss": 0.6}, "final loss 0.6000, and not 0.5000"),
        ({"loss": float("nan")}, "final loss nan"),
        ({"settings": {"cudnn.benchmark": False}}, "cudnn.benchmark=False"),
    ],
    ids=["same", "another loss", "no loss", "another setting"],
)
def test_who_does_another_training_is_named(end, told):
    found = found_of("mlp", by_hand=[1.0], axontrain=[1.0])
    found.ends["axontrain"] |= end
    assert told in found.differs("axontrain")
    assert bool(found.differs("axontrain")) == bool(told)
    ((_, ratio),) = tables.rows([found], {"axontrain": "axontrain"})[1]
    assert ratio.endswith("differs") == bool(told)


def test_who_fails_is_named():
    found = found_of("mlp", by_hand=[1.0])
    found.failures["axontrain"] = "it broke"
    assert tables.rows([found], {"axontrain": "axontrain"})[1] == [["axontrain", "failed"]]


ECHO = "import sys, json\nfor line in sys.stdin: print(json.dumps({'got': line.strip()}), flush=True)"


def test_a_process_answers_until_it_is_closed():
    process = Process([sys.executable, "-c", ECHO], cpu=True)
    try:
        for word in ("one", "two"):
            process.order(word)
            assert process.answer(20) == {"got": word}
        with pytest.raises(FailedError, match="took more than 0 s"):
            process.answer(0.01)
    finally:
        process.close()
    assert process.process.poll() is not None


def test_a_process_that_fails_says_why():
    process = Process([sys.executable, "-c", "raise ValueError('it broke')"], cpu=True)
    try:
        process.order("turn")
        with pytest.raises(FailedError, match="ValueError: it broke"):
            process.answer(20)
    finally:
        process.close()


def command(*arguments, cuda=False):
    environment = os.environ | ({} if cuda else {"CUDA_VISIBLE_DEVICES": ""})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--small", "--rounds", "2", "--markdown", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if line[:1] == "|"]
    return done, rows


def there(*, cuda):
    """Contenders that a Loop of today takes, without peers."""
    graphs = ("axontrain_graph", "axontrain_auto")
    taken = [name for name, one in CONTENDERS.items() if not one.peer and (cuda or not one.cuda)]
    return [name for name in taken if HAS_GRAPH or name not in graphs]


def check_table(rows, names):
    titles = [CONTENDERS[name].title for name in names]
    of_ratios, of_figures = rows[: len(titles) + 2], rows[len(titles) + 2 :]
    assert of_ratios[0] == ["contender", *(work.title for work in WORKLOADS.values())]
    assert [row[0] for row in of_ratios[2:]] == [row[0] for row in of_figures[2:]] == titles
    for name, row in zip(names, of_ratios[2:], strict=True):
        measured = [cell != "–" for cell in row[1:]]
        assert measured == [work in CONTENDERS[name].workloads for work in WORKLOADS]
        assert all(re.fullmatch(r"\d+\.\d\d \(.*\)|–", cell) for cell in row[1:])  # and none differs


@pytest.mark.slow
def test_the_command_on_a_cpu(tmp_path):
    write(tmp_path, "train", 512)
    write(tmp_path, "test", 64)
    (tmp_path / "tinyshakespeare.txt").write_text("to be, or not to be? " * 100)
    names = there(cuda=False)
    done, rows = command("--device", "cpu", "--data", str(tmp_path), "--contenders", "cuda_graph", *names)
    assert done.returncode == 0, done.stderr
    check_table(rows, names)
    assert "- Left out: by hand, CUDA graph, which needs a GPU." in done.stdout
    assert "- GPT: characters of tinyshakespeare.txt." in done.stdout
    assert "made up" not in done.stdout
    assert "- GPT, axontrain: steps are computed as one graph" in done.stdout
    assert done.stdout.count("not judged, ") >= 3


@pytest.mark.slow
def test_the_command_says_who_has_failed(tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_text("to be")
    done, rows = command("--device", "cpu", "--data", str(tmp_path), "--only", "gpt", "--contenders", "by_hand", "axontrain")
    assert done.returncode == 1
    assert [row for row in rows if row[-1] == "failed"] == [["by hand", "failed"], ["axontrain", "failed"]]
    assert "GPT, by hand failed:" in done.stderr
    assert "has 5 characters; 513 are needed" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--device", "cuda"], "there is no CUDA device"),
        (["--device", "cpu", "--data", "nowhere"], "no such file"),
        (["--device", "cpu", "--data", "."], "there is no cifar10.safetensors"),
        (["--device", "cpu", "--rounds", "0"], "1 or more"),
    ],
)
def test_what_cannot_be_is_refused(arguments, told):
    done, _ = command(*arguments)
    assert done.returncode != 0
    assert told in done.stderr


def gpu(test):
    hidden = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device (they are hidden but from pytest -m gpu)")
    return pytest.mark.gpu(hidden(test))


@gpu
@pytest.mark.parametrize("options", [None, {"graph": True}, {"graph": "auto"}], ids=str)
def test_graphs_train_as_eager_does(options):
    """By hand, for None, and axontrain's."""
    if options is not None and not HAS_GRAPH:
        pytest.skip("Loop has no graph=")
    on_gpu = Given(torch.device("cuda"), small=True)
    data, results = mlp.load(on_gpu), []
    graph = cuda_graph.prepare if options is None else functools.partial(axontrain.prepare, **options)
    for prepare in (by_hand.prepare, graph):
        ended = []
        task = mlp.task(data, on_gpu, 3, ended.append)
        prepare(task)()
        results.append((ended, task.net.state_dict()))
    (losses, weights), (other_losses, other_weights) = results
    assert other_losses == pytest.approx(losses, rel=1e-4)
    for key, value in weights.items():
        torch.testing.assert_close(other_weights[key], value, rtol=1e-3, atol=1e-4)


@gpu
def test_the_command_on_a_gpu(tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_text("to be, or not to be? " * 100)
    names = there(cuda=True)
    done, rows = command("--device", "cuda", "--data", str(tmp_path), "--contenders", *names, cuda=True)
    assert done.returncode == 0, done.stderr
    check_table(rows, names)
    assert "Left out: by hand" not in done.stdout
