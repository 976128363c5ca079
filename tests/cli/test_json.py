"""What `--json` prints: every document is of the schema that ships with the package and that
`docs/reference/json.md` shows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
import torch
import torch.nn.functional as F
from jsonschema import Draft202012Validator

from lca_posthoc import Recorder
from lca_posthoc.cli import COMMANDS, cli
from lca_posthoc.results import announced
from tests.helpers.cli import (
    document,
    iterates,
    lca,
    marker,
    record,
    run_lca,
    task_namespace,
    write_step,
    write_task,
)
from tests.helpers.json_schemas import FILES, SCHEMA_OF, Json, faults, schema_of

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "json.md"
PRINTING = [
    name
    for name in COMMANDS
    if any(
        "--json" in parameter.opts
        for parameter in cli.get_command(click.Context(cli), name).params  # type: ignore[union-attr]
    )
]

# --- documents ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints `ck` of every step, `far` with gaps between them, a task with groups, and the run
    `r.lca` of every loss.
    """
    root = tmp_path_factory.mktemp("json")
    record(root / "ck", range(7))
    record(root / "far")
    write_task(
        root / "task.py",
        '"validation": Loss(F',
        '"per_class": Loss(F.cross_entropy, on="train", group_by=lambda inputs, targets: targets), '
        '"validation": Loss(F',
    )
    assert run_lca(root / "ck", root / "task.py", root / "r.lca", "--loss", "all").exit_code == 0
    return root


def of_run(place: Path, out: Path, *options: object) -> Json:
    """What a run with some options prints, and then its summary, which is the same."""
    options = ("--loss", "all", *options)
    printed = document(run_lca(place / "ck", place / "task.py", out, *options, "--json"))
    assert document(lca("summary", out, "--json")) == printed
    return printed


def of_far_run(place: Path, out: Path) -> Json:
    return document(run_lca(place / "far", place / "task.py", out, "--path-band", "on", "--json"))


def of_caused(place: Path, out: Path) -> Json:
    """What a run with causes prints, of a few steps of gradient descent."""
    torch.manual_seed(0)
    model, (inputs, targets) = task_namespace()["Net"](), task_namespace()["train"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with Recorder(out.with_suffix(""), model) as recorder:
        recorder.attach(optimizer)
        for step in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[step::2]), targets[step::2]).backward()
            optimizer.step()
    options = ("--causes", "--loss", "all", "--json")
    return document(run_lca(out.with_suffix(""), place / "task.py", out, *options))


def along(place: Path, out: Path) -> Json:
    lca("basis", place / "ck", "-o", out.with_suffix(".safetensors"), "--directions", 2)
    return of_run(place, out, "--along", out.with_suffix(".safetensors"))


def basis(place: Path, out: Path, *options: object) -> Json:
    return document(lca("basis", place / "ck", "-o", out, *options, "--json"))


def plan(place: Path, *options: object) -> Json:
    return document(lca("plan", place / "ck", "--task", place / "task.py", *options, "--json"))


def compared(place: Path, *repeats: str) -> Json:
    run, labels = place / "r.lca", repeats or ("a",)
    return document(lca("compare", *(f"{label}={run}" for label in labels), "--json"))


def status(run: Path) -> Json:
    return document(lca("status", run, "--json"))


def of_stopped(place: Path, out: Path) -> Json:
    run_lca(place / "ck", place / "task.py", out)
    marker(out, "train", 1).unlink()
    return status(out)


def of_begun(place: Path, out: Path) -> Json:
    with announced(out) as announcement:
        announcement.stage("reading")
        return status(out)


def of_damaged(place: Path, out: Path) -> Json:
    run_lca(place / "ck", place / "task.py", out)
    next(out.rglob("commits/**/*.json")).write_text("{}")
    (out / "commits" / "left.tmp").write_text("")
    return json.loads(lca("verify", out, "--json").stdout)


def of_doubted(place: Path, out: Path) -> Json:
    record(out, range(7))
    write_step(out, 6, iterates()[0])
    return document(lca("inspect", out, "--json"))


DOCUMENTS: dict[str, tuple[str, Callable[[Path, Path], Json]]] = {
    "run": ("run", of_run),
    "run of tensors": ("run", lambda place, out: of_run(place, out, "--keep", "tensors")),
    "run of some segments": ("run", lambda place, out: of_run(place, out, "--segments", "0.5@1")),
    "run of some examples": ("run", lambda place, out: of_run(place, out, "--subset", "0.5@1")),
    "run with causes": ("run", of_caused),
    "run along directions": ("run", along),
    "run of long segments": ("run", of_far_run),
    "summary": ("summary", lambda place, out: document(lca("summary", place / "r.lca", "--json"))),
    "basis": ("basis", basis),
    "basis of matrices": ("basis", lambda place, out: basis(place, out, "--per-matrix")),
    "random basis": ("basis", lambda place, out: basis(place, out, "--random", 2)),
    "compare": ("compare", lambda place, out: compared(place)),
    "compare labels": ("compare", lambda place, out: compared(place, "a", "b")),
    "inspect": ("inspect", lambda place, out: document(lca("inspect", place / "ck", "--json"))),
    "inspect doubtful": ("inspect", of_doubted),
    "plan": ("plan", lambda place, out: plan(place, "--loss", "all")),
    "plan a recording": ("plan", lambda place, out: plan(place, "--recording", 10)),
    "status": ("status", lambda place, out: status(place / "r.lca")),
    "status of a stopped run": ("status", of_stopped),
    "status of a run to be": ("status", of_begun),
    "verify": ("verify", lambda place, out: document(lca("verify", place / "r.lca", "--json"))),
    "verify damage": ("verify", of_damaged),
}


@pytest.mark.parametrize("what", DOCUMENTS)
def test_a_document_is_of_its_schema_and_of_none_without_any_of_its_fields(
    what: str, place: Path, tmp_path: Path
) -> None:
    command, print_document = DOCUMENTS[what]
    printed = print_document(place, tmp_path / "out.lca")
    assert faults(command, printed) == []
    schema = schema_of(command)
    objects = list(described(schema, schema, printed))
    assert ["schema"] in [sorted(of.keys() & {"schema"}) for of, _ in objects]
    for of, fields in objects:
        for field in fields:
            value = of.pop(field)
            assert faults(command, printed) != [], field
            of[field] = value
        if fields:
            of["new"] = 1
            assert faults(command, printed) != []
            del of["new"]
    assert faults(command, printed) == []


def described(
    schema: dict[str, Json], whole: dict[str, Json], value: Json
) -> Iterator[tuple[dict[str, Json], list[str]]]:
    """Each object of a document, and of a list of objects the first one, with the fields that it
    must have.
    """
    schema = resolved(schema, whole, value)
    if isinstance(value, dict):
        yield value, schema.get("required", [])
        for name, item in value.items():
            inner = schema.get("properties", {}).get(name, schema["additionalProperties"])
            yield from described(inner, whole, item)
    elif isinstance(value, list) and value and "items" in schema:
        yield from described(schema["items"], whole, value[0])


def resolved(schema: dict[str, Json], whole: dict[str, Json], value: Json) -> dict[str, Json]:
    """A schema, or the one that it refers to for some value."""
    for kind in schema.get("oneOf", []):
        if Draft202012Validator({"$defs": whole["$defs"], **kind}).is_valid(value):
            return resolved(kind, whole, value)
    if "$ref" in schema:
        referred = whole["$defs"][schema["$ref"].removeprefix("#/$defs/")]
        return {**referred, **{key: schema[key] for key in schema if key != "$ref"}}
    return schema


def test_every_command_that_prints_json_has_documents_above_and_a_schema() -> None:
    assert {command for command, _ in DOCUMENTS.values()} == set(PRINTING)
    shipped = {path.name.removesuffix(".json") for path in FILES.iterdir()}
    assert shipped == {SCHEMA_OF.get(command, command) for command in PRINTING}
    for command in PRINTING:
        Draft202012Validator.check_schema(schema_of(command))


# --- the page -------------------------------------------------------------------------------------


def rows(
    schema: dict[str, Json], whole: dict[str, Json], path: str = "", optional: bool = False
) -> Iterator[str]:
    """The rows of a table with every field of a document."""
    schema = resolved(schema, whole, None)
    if path:
        yield row(schema, path, optional)
    for name, inner in schema.get("properties", {}).items():
        start = f"{path}." if path else ""
        yield from rows(inner, whole, f"{start}{name}", name not in schema["required"])
    inner = schema.get("additionalProperties")
    if isinstance(inner, dict) and "properties" in resolved(inner, whole, None):
        yield from list(rows(inner, whole, f"{path}.NAME"))[1:]
    if "properties" in resolved(schema.get("items", {}), whole, None):
        yield from list(rows(schema["items"], whole, f"{path}[]"))[1:]


def row(schema: dict[str, Json], path: str, optional: bool) -> str:
    kinds = schema.get("type", [])
    words = [kinds] if isinstance(kinds, str) else list(kinds)
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        words = ["null" if value is None else f"`{json.dumps(value)}`" for value in values]
    words += ["optional"] * optional
    text = schema.get("description", "").replace("|", "\\|")
    return f"| `{path}` | {', '.join(words)} | {text} |"


def tables() -> dict[str, list[str]]:
    """The rows of each section of the page, by its heading."""
    of_page: dict[str, list[str]] = {}
    for name in sorted({SCHEMA_OF.get(command, command) for command in PRINTING}):
        schema = schema_of(name)
        for kind in schema.get("oneOf", [schema]):
            fields = list(rows(kind, schema))
            of_page.setdefault(schema["title"], []).extend(fields)
    return of_page


def test_the_page_has_every_field_of_every_document() -> None:
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    shown = {
        section.splitlines()[0].replace("`", ""): [
            line for line in section.splitlines() if line.startswith("| `")
        ]
        for section in sections
    }
    assert shown == tables()
