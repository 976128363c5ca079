"""The code reads as it does at its best: bounds on what `python -m tests.style` measures, over the
whole package.
"""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

import pytest

from .style import Style, large_dataclasses, loose_aliases, measure, style_of


@pytest.fixture(scope="module")
def whole() -> Style:
    return style_of()[""]


def test_docstrings_open_with_a_verb_or_a_noun(whole: Style) -> None:
    assert whole.docstrings > 1000
    assert whole.clauses == 0


def test_functions_describe_their_arguments(whole: Style) -> None:
    assert whole.undescribed == []


def test_variables_are_named_after_what_they_hold(whole: Style) -> None:
    assert whole.nameless.total() <= 0.005 * whole.variables


def test_dataclasses_of_many_fields_are_built_by_name(whole: Style) -> None:
    assert whole.positional == []


def test_annotations_say_something(whole: Style) -> None:
    assert whole.loose <= 0.02 * whole.annotations


def test_functions_stay_short(whole: Style) -> None:
    # lines of 100 characters: at 120, the median is 5
    assert statistics.median(whole.bodies) <= 6
    assert statistics.quantiles(whole.bodies, n=10, method="inclusive")[-1] <= 21
    assert max(whole.bodies) <= 63


def test_lines_fit_beside_each_other(whole: Style) -> None:
    assert whole.long_lines <= 0.01 * whole.lines


def test_what_is_measured_is_what_is_written(tmp_path: Path) -> None:
    """The tests above can fail."""
    code = (
        '"""Whether it works."""\nLoose = dict[str, Any]\n@dataclass\nclass Many:\n    """What it '
        'holds."""\n'
        "    a: int\n    b: int\n    c: int\n    d: int\n    e: int\n    f: Loose\n"
        "def build(found: Any, names: list[str]) -> dict[str, Any] | None:\n    held = names\n    "
        "for each in held:\n        print(each)\n"
        f"    return Many(1, 2, 3, 4, 5, 6)  # {'long' * 30}\n"
    )
    path = tmp_path / "code.py"
    path.write_text(code)
    modules = {path: ast.parse(code)}
    style = measure(path, modules[path], loose_aliases(modules), large_dataclasses(modules))
    assert (style.docstrings, style.clauses) == (2, 2)
    assert dict(style.nameless) == {"found": 1, "held": 1, "each": 1}
    assert (style.annotations, style.loose) == (9, 3)
    assert (style.long_lines, style.bodies, style.arguments) == (1, [4], [2])
    assert style.undescribed == [f"{path}:12: build"]
    assert style.positional == [f"{path}:16: Many"]
