"""Read the declaration `FINDING = Finding(…)` of each finding from `findings/NAME.py`.

The declarations determine the options of `lca plot`, the sections of the report and their order,
what `lca export` writes for each run, and the table in `docs/findings.md`. They are read without
importing the findings, because `lca plot --help` must not wait for xarray and zarr. A declaration
may therefore use only the names of this module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Literal

_DECLARATION = re.compile(r"^FINDING = (Finding\(\n.*?^\))$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Option:
    """Declare an option that `lca plot` takes for a finding.

    Attributes:
        name: the parameter of the finding or of its figure that the option sets.
        flag: the option on the command line, such as `--group`.
        help: the help text.
        kind: the type of its values: `str`, `int`, `bool` for a switch, "count" for a positive
            integer, "path" for a directory, or a tuple of the words to choose from.
        metavar: the placeholder for the value in the help text.
        repeatable: whether the option may be given several times.
    """

    name: str
    flag: str
    help: str
    kind: type | Literal["count", "path"] | tuple[str, ...] = str
    metavar: str | None = None
    repeatable: bool = False


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Declare a finding: its order among the others, and which runs and options it takes.

    Attributes:
        question: the question that the finding answers, for `docs/findings.md`.
        needs: the runs that the finding works for, for `docs/findings.md`.
        place: the sort key by which findings are listed and reported.
        level: the lowest level of `--keep` that the finding works with.
        losses: how many losses of a run the finding uses.
        examples: whether these losses must keep their examples apart, `Loss(…, per="example")`.
        part: the optional part of the results that the finding reads; "" if every run has what it
            needs.
        runs: "one", several drawn "beside" each other, or several "compared" in one result.
        options: the options of `lca plot`.
        sampled: whether the finding works with a random sample of the segments, `--segments`.
        single_steps: which segments must cover a single training step: "some" or "every" one; "" if
            longer segments do equally well.
        on_request: whether `lca export` writes the finding only when it is named, because it is
            large.
    """

    question: str
    needs: str
    place: int
    level: str = "tensors"
    losses: int = 1
    examples: bool = False
    part: Literal["", "causes", "along"] = ""
    runs: Literal["one", "beside", "compared"] = "one"
    options: tuple[Option, ...] = ()
    sampled: bool = False
    single_steps: Literal["", "some", "every"] = ""
    on_request: bool = False


GROUPS = Option(
    name="groups",
    flag="--group",
    metavar="LABEL",
    repeatable=True,
    help="Show this group of a loss with groups (curve, layers: repeatable).",
)
BY = Option(
    name="by",
    flag="--by",
    metavar="WHAT",
    help="Define layers by module, by tensor, or by a number of parts of the module's name.  "
    "[default: module]",
)
TOP = Option(
    name="top",
    flag="--top",
    kind="count",
    metavar="N",
    help="Highlight or draw only the N largest layers or tensors; grey out or count the others.  "
    "[default: 10 lines, 40 rows]",
)
_NAMES = {
    "Finding": Finding,
    "Option": Option,
    "GROUPS": GROUPS,
    "BY": BY,
    "TOP": TOP,
}


@cache
def declared_findings() -> Mapping[str, Finding]:
    """Return the declaration of every finding by name, in ascending order of `place`."""
    declared: dict[str, Finding] = {}
    for file in resources.files("lca_posthoc").joinpath("findings").iterdir():
        if file.name.endswith(".py"):
            text = _DECLARATION.search(file.read_text("utf-8"))
            if text is not None:
                declared[file.name.removesuffix(".py")] = eval(text[1], dict(_NAMES))
    return MappingProxyType(dict(sorted(declared.items(), key=lambda of_name: of_name[1].place)))
