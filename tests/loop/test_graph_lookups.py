"""graph=: which names a step looks up, however they are written, and which it only seems to."""

import functools
import subprocess
import sys
import textwrap
import warnings
from contextvars import ContextVar
from pathlib import Path

import pytest
import torch
from recorded import recorder  # noqa: F401  # a fixture
from test_graph_contents import DATA, Net, both, changing

import axontrain as ax

pytestmark = pytest.mark.usefixtures("recorder")

SCALES = {"content": 1.0}
LOSSES = []


class Content(Net):
    def content(self, logits):
        return SCALES["content"] * logits.square().mean()


class ByATuple(Content):
    def loss(self, logits, labels):
        return super().loss(logits, labels) + sum(getattr(self, name)(logits) for name in ("content", "content"))


class ByADefault(Content):
    def loss(self, logits, labels, kind="content"):
        return super().loss(logits, labels) + getattr(self, kind)(logits)


class ByAConfig(Content):
    def __init__(self):
        super().__init__()
        self.config = {"loss": "content"}

    def loss(self, logits, labels):
        return super().loss(logits, labels) + getattr(self, self.config["loss"])(logits)


def half():
    SCALES["content"] = 1.0


@pytest.mark.parametrize("kind", [ByATuple, ByADefault, ByAConfig])
def test_methods_whose_names_are_texts(kind):
    report = both(kind, drive=changing(lambda objective: SCALES.update(content=0.5)), begin=half)
    assert len(report.rerecorded) == 1
    assert "content of SCALES of the global variables that Content.content names was 1.0, and is 0.5" in report.rerecorded[0]


class Hyper:
    """A descriptor, of which each object is a constant with a name."""

    def __init__(self, value):
        self.value = value

    def __get__(self, owner, kind=None):
        return self.value


def test_descriptors_of_the_users():
    class Described(Net):
        scale = Hyper(1.0)

        def loss(self, logits, labels):
            return super().loss(logits, labels) * self.scale

    def change(objective):
        vars(Described)["scale"].value = 0.5

    def begin():
        vars(Described)["scale"].value = 1.0

    assert len(both(Described, drive=changing(change), begin=begin).rerecorded) == 1


def test_what_torch_calls_by_the_same_name_is_not_the_users():
    class Logs(Net):
        def log(self, value):
            LOSSES.append(value)

        def loss(self, logits, labels):
            return super().loss(logits, labels) + 0.01 * torch.log(1 + logits.square()).sum(1).mean()

    def drive(loop):
        @loop.on("after_batch")
        def _(state):
            state.objective.log(state.step)

        loop.fit(DATA, epochs=8, batch_size=16)

    assert both(Logs, drive=drive, begin=LOSSES.clear).rerecorded == []


def test_what_a_wrapper_of_torchs_stands_around():
    class Mapped(Net):
        def __init__(self):
            super().__init__()
            self.each = torch.func.vmap(self.one)
            self.others = torch.func.vmap(functools.partial(Mapped.other, 2.0))

        def one(self, row):
            return row * SCALES["content"]

        @staticmethod
        def other(factor, row):
            return row * factor * SCALES["content"]

        def predict(self, x):
            return self.others(self.each(super().predict(x)))

    report = both(Mapped, drive=changing(lambda objective: SCALES.update(content=0.5)), begin=half)
    assert len(report.rerecorded) == 1


PACKAGE = {
    "__init__.py": "",
    "config.py": "scale = 1.0",
    "of_the_package.py": """
        from relative.base import Net
        class Kind(Net):
            def loss(self, logits, labels):
                from . import config
                return super().loss(logits, labels) * config.scale
        """,
    "of_a_module.py": """
        from relative.base import Net
        class Kind(Net):
            def loss(self, logits, labels):
                from .config import scale
                return super().loss(logits, labels) * scale
        """,
    "deeper/__init__.py": "",
    "deeper/of_one_above.py": """
        from relative.base import Net
        class Kind(Net):
            def loss(self, logits, labels):
                from ..config import scale
                return super().loss(logits, labels) * scale
        """,
}


@pytest.mark.parametrize("module", ["of_the_package", "of_a_module", "deeper.of_one_above"])
def test_relative_imports_within_functions(module, tmp_path, monkeypatch):
    for name, text in PACKAGE.items():
        path = tmp_path / "relative" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
    (tmp_path / "relative" / "base.py").write_text("from test_graph_contents import Net\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        kind = __import__(f"relative.{module}", fromlist=["Kind"]).Kind
        config = __import__("relative.config", fromlist=["scale"])
        report = both(
            kind,
            drive=changing(lambda objective: setattr(config, "scale", 0.5)),
            begin=lambda: setattr(config, "scale", 1.0),
        )
        assert report.rerecorded == ["scale of the module relative.config was 1.0, and is 0.5"]
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "relative"]:
            del sys.modules[name]


def test_a_module_that_is_said_not_to_be_there(monkeypatch):
    class Tries(Net):
        def loss(self, logits, labels):
            try:
                import absent_library
            except ImportError:
                absent_library = None
            return super().loss(logits, labels) * (1.0 if absent_library is None else 0.5)

    monkeypatch.setitem(sys.modules, "absent_library", None)
    assert both(Tries).rerecorded == []


class Unspeakable:
    def __repr__(self):
        raise RuntimeError("no text of it")


def test_what_has_changed_may_have_no_text():
    class Holds(Net):
        def __init__(self):
            super().__init__()
            self.held = Unspeakable()

    assert len(both(Holds, drive=changing(lambda objective: setattr(objective, "held", Unspeakable()))).rerecorded) == 1


def test_a_group_that_is_taken_away():
    loops = []
    for graph in (False, True):
        torch.manual_seed(0)
        optimizer = ax.Optimizer("sgd", lr=0.1, groups={"net.4.*": {"lr": 0.2}})
        loop = ax.Loop(Net(), optimizer, graph=graph, device="cpu", progress=False)

        @loop.on("before_batch")
        def _(state):
            if state.step == 20:
                state.optimizers["main"].optimizers[0].param_groups.pop()

        loop.fit(DATA, epochs=5, batch_size=16)
        loops.append(loop)
    assert all(torch.equal(p, q) for p, q in zip(*(loop.objective.parameters() for loop in loops), strict=True))
    assert loops[1].report().rerecorded == ["the optimizer has more groups than it had, or fewer"]


@pytest.mark.slow
def test_a_notebooks_cells_are_the_users(tmp_path):
    """What is typed in has no file: its names are looked up all the same."""
    script = f"""
        import sys
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]}
        import code, linecache
        import torch, axontrain as ax
        from recorded import Recorder
        from axontrain.execution import recording
        from test_graph_contents import DATA, Net
        recording.Recorder, recording.available = Recorder, lambda device: True
        cell = '''
        SCALE = 1.0
        class Cell(Net):
            def loss(self, logits, labels):
                return super().loss(logits, labels) * SCALE
        '''
        exec(compile(__import__("textwrap").dedent(cell), "<ipython-input-1-abc>", "exec"))
        loop = ax.Loop(Cell(), ax.Optimizer("sgd", lr=0.1), graph=True, device="cpu", progress=False)
        loop.fit(DATA, epochs=3, batch_size=16)
        SCALE = 0.5
        batch = torch.randn(16, 8), torch.zeros(16, dtype=torch.long)
        for _ in range(10):
            loop.train_on_batch(batch)
        SCALE = 0.25
        loop.train_on_batch(batch)
        print(loop.report().rerecorded)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "SCALE of the global variables that Cell.loss names was 0.5, and is 0.25" in done.stdout


def test_what_cannot_be_put_back_keeps_nothing_else_from_it(monkeypatch):
    from axontrain.execution.assumptions import Assumptions

    class Counts(Net):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def loss(self, logits, labels):
            self.calls += 1
            return super().loss(logits, labels)

    genuine = Assumptions.put_back

    def failing(self):
        genuine(self)
        raise AttributeError("can't set this")

    monkeypatch.setattr(Assumptions, "put_back", failing)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        both(Counts, "what a step changes in Python cannot be put back: AttributeError: can't set this")


STEPS = ContextVar("STEPS", default=0)


def test_variables_of_contexts_are_looked_at():
    class Counted(Net):
        def loss(self, logits, labels):
            STEPS.set(STEPS.get() + 1)
            return super().loss(logits, labels) / (1 + 0.1 * STEPS.get())

    both(Counted, "STEPS of the global variables was", begin=lambda: STEPS.set(0))
