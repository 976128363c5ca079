"""Declarations of findings, each in its own file: `FINDING = Finding(…)` in `findings/NAME.py`.

From these declarations follow the options of `lca plot`, the sections of the report and their
order, what `lca export` writes of which run, and the table in `docs/findings.md`. They are read
without importing the findings, whose xarray and zarr `lca plot --help` must not wait for; so the
declaration of a file may use the names of this module alone.
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
    """An option that `lca plot` takes for a finding.

    `name` is the parameter of the finding or of its figure that it sets, `kind` the type of its
    values: `str`, `int`, `bool` for a switch, "count" for a positive integer, "path" for a directory,
    or the words to choose from.
    """

    name: str
    flag: str
    help: str
    kind: type | Literal["count", "path"] | tuple[str, ...] = str
    metavar: str | None = None
    repeatable: bool = False


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The place of a finding among the others, and what it takes.

    Attributes:
        question: it answers, and `needs`: of which runs, as `docs/findings.md` says them.
        place: findings are listed and reported by rising places.
        level: the least level of `--keep` that allows it.
        losses: how many losses of a run it is of.
        examples: whether these must tell their examples apart, `Loss(…, per="example")`.
        part: of the results, that it is of and that a run has only where it was asked for.
        runs: "one", several drawn "beside" each other, or several "compared" in one result.
        options: of `lca plot`.
        sampled: whether a random part of the segments, of `--segments`, allows it.
        single_steps: which segments must be of one training step: "some" or "every" one; "" where
            longer ones are no less to it.
        on_request: whether `lca export` writes it only where it is named, because it is large.
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
    help="Of a loss with groups (curve, layers: repeatable).",
)
BY = Option(
    name="by",
    flag="--by",
    metavar="WHAT",
    help="Layers: module, tensor, or how many parts of a module's name.  [default: module]",
)
TOP = Option(
    name="top",
    flag="--top",
    kind="count",
    metavar="N",
    help="Of many layers or tensors the N largest stand out or are drawn; the others are grey or "
    "counted.  [default: 10 lines, 40 rows]",
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
    """Return the declaration of every finding by its name, by rising places."""
    declared: dict[str, Finding] = {}
    for file in resources.files("lca_posthoc").joinpath("findings").iterdir():
        if file.name.endswith(".py"):
            text = _DECLARATION.search(file.read_text("utf-8"))
            if text is not None:
                declared[file.name.removesuffix(".py")] = eval(text[1], dict(_NAMES))
    return MappingProxyType(dict(sorted(declared.items(), key=lambda of_name: of_name[1].place)))
