"""What the README claims, it shows: its Python runs, and its commands are those that CI runs."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_every_python_block_runs_one_after_the_other(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)  # torch's compiler looks up names where they were written
    namespace = vars(module)
    for block in blocks("python"):
        exec(compile(block, str(README), "exec"), namespace)
    assert namespace["result"].values["val/accuracy"] > 0.9
    loop, again, model = (namespace[name] for name in ("loop", "again", "model"))
    assert again.state.epoch == loop.state.epoch == 2
    for name, value in loop.objective.state_dict().items():
        assert torch.equal(value, again.objective.state_dict()[name])
        assert torch.equal(value, model.state_dict()[name])
    assert namespace["saving"].best_path.name.startswith("step-0000000")


def test_the_example_is_no_longer_than_it_says():
    lines = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(lines) <= 20


@pytest.mark.parametrize(("mark", "end"), [("run", "axontrain fit digits"), ("test", "pytest")])
def test_the_two_commands_stand_where_ci_looks_for_them(mark, end):
    found = re.search(rf"^<!-- {mark} -->\n```sh\n(.+)\n```$", README.read_text(), flags=re.MULTILINE)
    assert found is not None
    assert found[1].endswith(f"&& {end}")


def test_the_modules_that_it_lists_are_there():
    table = README.read_text().partition("| module | its one responsibility |")[2].partition("\n\n")[0]
    for name in re.findall(r"`([a-z]+)/?`", "".join(row.split("|")[1] for row in table.splitlines()[2:])):
        package = README.parent / "axontrain"
        assert (package / f"{name}.py").is_file() or (package / name / "__init__.py").is_file(), name
