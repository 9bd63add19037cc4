"""A notebook: a cell's fit is interrupted, its state is kept, and the next cell goes on bit for bit."""

import json
import sys
import time

import pytest

manager = pytest.importorskip("jupyter_client")
pytest.importorskip("ipykernel")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),  # of Jupyter's sockets
]

SETUP = """
import sys, time, hashlib
import torch, axontrain as ax
from torch import nn
torch.set_num_threads(1)
x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
train, test = ax.ArrayDataset(x, x.sum(1, keepdim=True)), ax.ArrayDataset(x[:16], x[:16].sum(1, keepdim=True))

def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = ax.Optimizer("adamw", lr=0.01, schedule=ax.schedules.cosine())
    return ax.Loop(ax.Supervised(net, "mse"), optimizer, callbacks=[ax.EarlyStopping(patience=999)], progress=False)

def digest(loop, result):
    saved = loop.save()
    found = hashlib.sha256(repr(result.history.rows).encode())
    for part in (saved["objective"], saved["rng"]):
        for name, value in sorted(part.items()):
            found.update(name.encode() + (value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()))
    for one in saved["optimizers"]["main"]["optimizers"]:
        for tensor in (t for state in one["state"].values() for t in state.values() if isinstance(t, torch.Tensor)):
            found.update(tensor.numpy().tobytes())
    return [result.status, loop.state.epoch, loop.state.step, found.hexdigest()]

loop = make()
"""
SLOW = """
@loop.on("after_batch")
def slow(state):
    if state.step == 21:
        print("training", flush=True)
    if state.step > 20:
        time.sleep(0.02)

result = loop.fit(train, test, epochs=200, batch_size=16)
"""
ON = """
loop.callbacks.remove(loop.callbacks[-1])
result = loop.fit(train, test, epochs=200, batch_size=16, resume=True)
"""
SAY = "import json; print(json.dumps(digest(loop, result)))"


class Kernel:
    """A kernel of Jupyter's, as a notebook has one."""

    def __init__(self):
        self.manager, self.client = manager.manager.start_new_kernel(kernel_name="python3", startup_timeout=60)

    def begin(self, code):
        return self.client.execute(code)

    def until(self, message, word=None, seconds=60):
        """What a cell prints, until it has printed a word, or until it is done."""
        ends, said = time.monotonic() + seconds, ""
        while time.monotonic() < ends:
            got = self.client.get_iopub_msg(timeout=seconds)
            if got["parent_header"].get("msg_id") != message:
                continue
            content = got["content"]
            if got["msg_type"] == "error":
                raise AssertionError("\n".join(content["traceback"]))
            if got["msg_type"] == "stream":
                said += content["text"]
            if word is not None and word in said:
                return said
            if got["msg_type"] == "status" and content["execution_state"] == "idle":
                return said
        raise AssertionError(f"it took too long, and said {said!r}")

    def run(self, code):
        return self.until(self.begin(code))

    def end(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()


@pytest.fixture
def kernel():
    made = Kernel()
    yield made
    made.end()


def test_a_cell_that_is_interrupted_is_gone_on_with(kernel):
    kernel.run(f"import sys; sys.path[:0] = {[path for path in sys.path if path]!r}")
    kernel.run(SETUP)
    cell = kernel.begin(SLOW)
    kernel.until(cell, "training")
    time.sleep(0.1)
    kernel.manager.interrupt_kernel()
    kernel.until(cell)  # it is no error
    assert kernel.manager.is_alive()
    status, epoch, step, _ = json.loads(kernel.run(SAY))
    assert status == "interrupted"
    assert 21 <= step < 800
    assert epoch == step // 4
    kernel.run(ON)
    gone_on = json.loads(kernel.run(SAY))
    assert gone_on[:3] == ["completed", 200, 800]
    unbroken: dict = {}
    exec(SETUP + "\nresult = loop.fit(train, test, epochs=200, batch_size=16)\nsaid = digest(loop, result)", unbroken)
    assert gone_on == unbroken["said"]


def test_a_limit_of_time_is_interrupted_too_and_steps_go_on(kernel):
    kernel.run(f"import sys; sys.path[:0] = {[path for path in sys.path if path]!r}")
    kernel.run(SETUP.replace(", schedule=ax.schedules.cosine()", ""))
    cell = kernel.begin(SLOW.replace("epochs=200", "time='5 min'"))
    kernel.until(cell, "training")
    kernel.manager.interrupt_kernel()
    kernel.until(cell)
    assert kernel.run("print(result.status, 'train/loss' in result.values)") == "interrupted True\n"
    kernel.run(ON.replace("epochs=200", "steps=150"))
    gone_on = json.loads(kernel.run(SAY))
    assert gone_on[:3] == ["completed", 37, 150]
    unbroken: dict = {}
    plain = SETUP.replace(", schedule=ax.schedules.cosine()", "")
    exec(plain + "\nresult = loop.fit(train, test, steps=150, batch_size=16)\nsaid = digest(loop, result)", unbroken)
    assert gone_on == unbroken["said"]
