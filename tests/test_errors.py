import inspect
import re

import pytest
import torch

import axontrain as ax
from axontrain import errors
from axontrain.errors import kind_of, loses, reject, require, unknown
from axontrain.shown import plain, quoted

LINE = re.compile(r"^    (?P<indent>(?:│   |    )*)(?:├── |└── )?(?P<name>[A-Z]\w+)(?: \((?P<builtin>\w+)\))?(?:  |$)")


def drawn():
    """Each class of the tree in the docstring, with its parent and the built-in beside it."""
    stack, found = [], {}
    for line in errors.__doc__.splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        depth = (line.index(match["name"]) - 4) // 4
        del stack[depth:]
        found[match["name"]] = (stack[-1] if stack else None, match["builtin"])
        stack.append(match["name"])
    return found


def actual():
    classes = {name: value for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    found = {}
    for name, value in classes.items():
        own = [base.__name__ for base in value.__bases__ if base.__name__ in classes]
        builtin = [base.__name__ for base in value.__bases__ if base.__name__ not in classes and base is not Exception]
        found[name] = (own[0] if own else None, builtin[0] if builtin else None)
    return found


def test_the_drawn_tree_is_the_real_one():
    assert drawn()["LossError"] == ("ObjectiveError", None)
    assert drawn() == actual()


def test_every_class_is_exported_and_documented():
    for name in actual():
        assert name in ax.__all__
        assert getattr(ax, name) is getattr(errors, name)
        assert getattr(ax, name).__doc__


def test_one_except_takes_all_errors_and_another_all_warnings():
    for name in actual():
        assert issubclass(getattr(ax, name), ax.AxonWarning if name.endswith("Warning") else ax.AxonError)


def test_an_unknown_name_offers_the_nearest_and_lists_all():
    error = unknown("metric", "acuracy", ["f1", "auroc", "accuracy"])
    assert isinstance(error, ax.UnknownNameError)
    told = "unknown metric 'acuracy': did you mean 'accuracy' or 'auroc'? Known: accuracy, auroc, f1."
    assert str(error) == told
    assert str(unknown("metric", "acuracy", ["f1", "auroc", "accuracy"], "Or a function.")) == f"{told} Or a function."


def test_an_unknown_name_like_no_other_offers_nothing():
    assert str(unknown("unit", "zzz", ["epochs", "steps"])) == "unknown unit 'zzz': Known: epochs, steps."
    assert str(unknown("unit", 3, ["epochs"])) == "unknown unit 3: Known: epochs."


def takes(first, second=2, *, third=3, **others):
    """Has options."""


def test_an_unknown_option_is_a_type_error_that_offers_the_nearest():
    with pytest.raises(ax.UnknownOptionError, match="unknown option of takes: 'thrid': did you mean 'third'") as caught:
        reject({"thrid": 1}, takes)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, ValueError)
    assert "others" not in str(caught.value)


def test_no_unknown_option_is_no_error():
    reject({}, takes)


def test_the_loop_rejects_by_nearest_names_and_never_offers_self():
    with pytest.raises(
        ax.UnknownOptionError, match=r"option of Loop\.__init__: 'optimiser': did you mean 'optimizer'"
    ) as caught:
        ax.Loop(ax.Objective(), optimiser=None)
    assert "self" not in str(caught.value)


def test_a_missing_module_names_its_extra():
    with pytest.raises(ax.MissingExtraError, match=r"drawing needs nosuchmodule, .* pip install 'axontrain\[plot\]'") as caught:
        require("nosuchmodule.figure", "plot", "drawing")
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value.__cause__, ImportError)


def test_a_module_that_is_there_is_given():
    assert require("json", "plot", "drawing").dumps([]) == "[]"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (3, "int"),
        (None, "NoneType"),
        ((1, "a", 2.0, None, 5), "tuple of 5: (int, str, float, NoneType)"),
        ([], "list of 0: ()"),
        ({"a": [1]}, "dict of {'a': list of 1: (int)}"),
    ],
)
def test_kinds_are_told_shortly(value, told):
    assert kind_of(value) == told


def test_what_goes_on_without_end_is_told_shortly():
    """A file may hold lists in lists, a pickle one list many times."""
    value, deep = [], {}
    for _ in range(100):
        value, deep = [value] * 4, {"x" * 10_000: deep}
    assert kind_of(value).startswith("list of 4: (list of 4: (")
    assert len(kind_of(value)) < 10_000
    assert len(kind_of(deep)) < 1000
    value.append(value)
    assert kind_of(value)


def test_a_key_is_told_so_that_a_terminal_does_not_obey():
    assert kind_of({"\x1b[2J" * 100: 1}).isprintable()
    assert len(kind_of({"\x1b[2J" * 100: 1})) < 600


def test_what_a_tensor_loses_by_conversion():
    order = [torch.int64, torch.float16, torch.complex64]
    for a, one in enumerate(order):
        for b, other in enumerate(order):
            assert loses(torch.ones(1, dtype=one), torch.ones(1, dtype=other)) == (a > b)
    assert not loses(torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float16))
    assert not loses(torch.ones(1, dtype=torch.bool), torch.ones(1, dtype=torch.int64))


@pytest.mark.parametrize("value", ["\x1b[31m", "a\r\nb", "\u202etxt", "\x9b2J", "\ud800", "\0\x07", "é 漢 😀"])
def test_text_that_is_shown_is_one_printable_line(value):
    for shown in (
        plain(value),
        quoted(value),
        plain(ValueError(value)),
        quoted([value]),
        plain(value * 1000),
        quoted(value * 1000),
    ):
        assert shown.isprintable()
        assert len(shown) < 2500
    assert plain("é 漢 😀") == "é 漢 😀"
    assert plain("x" * 1000, None) == "x" * 1000
    assert plain(ValueError()) == "ValueError"
