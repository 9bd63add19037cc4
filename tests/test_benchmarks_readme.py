"""benchmarks/README.md names what there is: commands, options, pictures, sections."""

import argparse
import importlib
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
TEXT = (FOLDER / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"python -m benchmarks\.([\w.]+)([^`]*)`", TEXT)))


@pytest.mark.parametrize(("name", "given"), COMMANDS)
def test_a_command_understands_what_it_is_shown_with(name, given, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parsed(parser, arguments=None):
        parse(parser, arguments)
        raise SystemExit("understood")

    package = (FOLDER / name.replace(".", "/")).is_dir()
    command = importlib.import_module(f"benchmarks.{name}.__main__" if package else f"benchmarks.{name}")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", [name, *given.split()])
    with pytest.raises(SystemExit, match="understood"):
        command.main()


def test_each_command_has_a_section():
    commands = {path.stem for path in FOLDER.glob("*.py") if "argparse.ArgumentParser(" in path.read_text()}
    commands |= {path.parent.name for path in FOLDER.glob("*/__main__.py")}
    listed = dict(re.findall(r"^\| \[`(\w+)`\]\(#([\w-]+)\)", TEXT, re.MULTILINE))
    assert set(listed) == commands - {"run"}  # which overhead calls
    headings = [
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in re.findall(r"^## (.+)", TEXT, re.MULTILINE)
    ]
    assert sorted(listed.values()) == sorted(headings)
    sections = dict(zip(headings, TEXT.split("\n## ")[1:], strict=True))
    assert all(f"python -m benchmarks.{name}" in sections[anchor] for name, anchor in listed.items())


def test_what_is_linked_is_there():
    linked = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(linked) > 6
    assert all((FOLDER / path).exists() for path in linked)
    assert {path.name for path in (FOLDER / "plots").iterdir()} == {Path(path).name for path in linked if path.endswith(".png")}
