"""benchmarks/README.md names what there is: commands, options, pictures, sections."""

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
TEXT = (FOLDER / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"python -m benchmarks\.([\w.]+)([^`]*)`", TEXT)))


@pytest.mark.parametrize(("name", "given"), COMMANDS)
def test_a_command_has_the_options_it_is_shown_with(name, given):
    path = FOLDER / name.replace(".", "/")
    source = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    assert all(f'"{option}"' in source for option in re.findall(r"--[a-z-]+", given))


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
