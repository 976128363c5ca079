"""What a notebook shows of a run: a small table, nothing a name can break out of, no error where
numbers are missing or damaged.
"""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import lca_posthoc
from lca_posthoc import Loss, Task, open_run
from lca_posthoc.base.text import shorten
from lca_posthoc.findings import summary
from lca_posthoc.results import read_manifest
from lca_posthoc.results.files import read_json, write_json
from tests.helpers.cli import UNSAFE, record, run_lca, steering, task_namespace, write_task

HOSTILE = (
    *(
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "</td></table>",
        '" onmouseover="alert(1)',
        "&lt;b&gt;",
        "a\x1b[31m",
    ),
    *("\u202egnp.exe", "$\\frac{$", "**b**`c`", "x" * 10_000, "javascript:alert(1)", "-->"),
    *(f"a{sign}b" for sign in UNSAFE),
)
TAGS = {"div", "b", "code", "table", "thead", "tbody", "tr", "th", "td"}


class Seen(HTMLParser):
    """Tags, their attributes, and the text of the cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.rows, self.text = (
            list[str](),
            set[str](),
            list[list[str]](),
            "",
        )
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {f"{name}={value}" for name, value in attrs}
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def seen(shown: object) -> Seen:
    """What is shown, which must be harmless whatever it shows."""
    text = shown._repr_html_()  # type: ignore[attr-defined]
    found = Seen(text)
    assert set(found.tags) <= TAGS
    assert {each.partition("=")[0] for each in found.attributes} <= {"style", "colspan"}
    assert steering(text) == set()
    text.encode()
    assert len(text) < 50_000
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    record(root / "ck")
    write_task(root / "task.py")
    assert run_lca(root / "ck", root / "task.py", root / "r.lca", "--loss", "all").exit_code == 0
    return root / "r.lca"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to damage."""
    return Path(shutil.copytree(finished, tmp_path / "r.lca"))


def test_the_figures_are_those_of_the_summary(run: Path) -> None:
    opened = open_run(run)
    table = seen(opened)
    assert table.text.startswith(
        f"Run {run}556 parameters in 4 tensors, 6 segments (steps 0–60), --keep parameters"
    )
    head, *rows = table.rows
    assert head == ["loss", "split", "groups", "segments", "done", "loss start → end", "residual"]
    for row, (name, results) in zip(rows, opened.items(), strict=True):
        figures = summary(results)
        ends = f"{figures['loss_start']:.6g} → {figures['loss_end']:.6g}"
        assert row[:6] == [name, name, "", "6 of 6", "complete", ends]
        assert float(row[6]) == pytest.approx(figures["residual"], rel=0.06)
        assert seen(results).rows == [head, row]


def test_groups_are_shown_as_the_loss_of_the_whole_split(tmp_path: Path) -> None:
    made = task_namespace()
    losses = {
        "train": Loss(torch.nn.functional.cross_entropy, on="train"),
        "per_class": Loss(
            torch.nn.functional.cross_entropy, on="train", group_by=lambda inputs, targets: targets
        ),
    }
    task = Task(made["Net"], {"train": made["train"]}, losses)
    opened = lca_posthoc.run(record(tmp_path / "ck"), task, losses=["all"], cluster="inline")
    head, plain, grouped, *groups = seen(opened).rows
    assert grouped[2] == "4"
    assert grouped[5] == plain[5]
    assert float(grouped[6]) == pytest.approx(float(plain[6]), abs=1e-6)
    figures = summary(opened["per_class"])
    for position, row in enumerate(groups):
        ends = f"{figures['loss_start'][position]:.6g} → {figures['loss_end'][position]:.6g}"
        assert row[:6] == [
            str(position),
            "",
            f"{figures['group_examples'][position]} examples",
            "",
            "",
            ends,
        ]
        assert float(row[6]) == pytest.approx(figures["residual"][position], rel=0.06)
    assert len(groups) == 4
    assert seen(opened["per_class"]).rows == [head, grouped, *groups]


SHOWN = {"\n": "↵"}  # unsafe signs with one of their own in pages


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_becomes_markup(name: str, run: Path) -> None:
    document = read_json(run / "run.json")
    loss = document["losses"].pop("train")
    document["losses"][name] = {**loss, "on": name}
    write_json(run / "run.json", document)
    row = seen(open_run(run)).rows[2]
    (shown,) = shorten(
        ["".join(SHOWN.get(sign, "\ufffd") if steering(sign) else sign for sign in name)], 48
    )
    assert row[:2] == [shown, shown]
    # what the markers speak for is shown, and the name in it is harmless too
    assert "another loss" in row[3]
    seen(open_run(run)[name])


def test_a_run_below_a_hostile_name(run: Path) -> None:
    place = run.rename(run.with_name("<img src=x onerror=alert(1)>.lca"))
    assert str(place) in seen(open_run(place)).text


def test_an_unfinished_run_is_shown_as_far_as_it_is(run: Path) -> None:
    span = read_manifest(run).span
    markers = sorted((run / "commits" / "train").glob("0*.json"))
    markers[-1].unlink()
    _, train, validation = seen(open_run(run)).rows
    done = 6 - (6 % span or span)
    assert train[3:5] == [f"{done} of 6", f"{int(1000 * done / 6) / 10:g} %"]
    assert validation[4] == "complete"
    for marker in markers[:-1]:
        marker.unlink()
    assert seen(open_run(run)["train"]).rows[1] == ["train", "train", "", "0 of 6", "0 %", "", ""]


@pytest.mark.parametrize("what", ["marker", "chunk", "metadata", "missing"])
def test_a_damaged_run_shows_its_damage_instead_of_raising(what: str, run: Path) -> None:
    opened = open_run(run)
    chunk = run / "data.zarr" / "train" / "steps" / "residual" / "c" / "0"
    file = {
        "marker": next((run / "commits" / "train").glob("000000-*.json")),
        "metadata": run / "data.zarr" / "train" / "steps" / "zarr.json",
    }.get(what, chunk)
    if what == "missing":
        file.unlink()
    else:
        file.write_bytes(b"<script>alert(1)</script>")
    _, train, validation = seen(opened).rows
    assert train[0] == "train"
    assert train[-1].startswith("LCAError: loss 'train' in")
    assert "is damaged" in train[-1]
    assert validation[4] == "complete"


def test_many_losses_are_cut(run: Path) -> None:
    document = read_json(run / "run.json")
    loss = document["losses"]["train"]
    document["losses"] = {f"loss {at}": {**loss, "key": f"loss{at}"} for at in range(60)}
    write_json(run / "run.json", document)
    table = seen(open_run(run))
    assert len(table.rows) == 51
    assert table.text.endswith("and 10 more losses")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> lca_posthoc.Run:
    """A plain loss and two of thirty groups, whose long labels differ in the middle."""
    made, root = task_namespace(), tmp_path_factory.mktemp("many")

    labels = [
        f"everything in this corpus that is of kind {at:02d} and was seen in training"
        for at in range(30)
    ]
    cross_entropy = torch.nn.functional.cross_entropy
    losses = {
        "train": Loss(cross_entropy),
        **{name: Loss(cross_entropy, group_by=labels) for name in ("by kind", "again")},
    }
    task = Task(made["Net"], {"train": made["train"]}, losses)
    settings = {
        "losses": ["all"],
        "cluster": "inline",
        "rule": "left",
        "keep": "tensors",
        "durability": "none",
    }
    return lca_posthoc.run(
        record(root / "ck", range(0, 30, 10)), task, out=root / "r.lca", **settings
    )


@pytest.mark.parametrize(("loss", "shown"), [(None, 10), ("by kind", 20)])
def test_many_groups_are_shown_in_part_with_names_told_apart_and_whole_numbers(
    many: lca_posthoc.Run, loss: str | None, shown: int
) -> None:
    opened = many if loss is None else many[loss]
    rows = seen(opened).rows
    at = next(position for position, row in enumerate(rows) if row[0] == "by kind")
    groups = rows[at + 1 : at + 1 + shown]
    assert len({row[0] for row in groups}) == shown
    assert all(len(row[0]) <= 48 and "…" in row[0] for row in groups)
    steps = many["by kind"].steps
    ends = zip(steps["loss_start"][0].values, steps["loss_end"][-1].values, strict=True)
    assert [row[5] for row in groups] == [
        f"{start:.6g} → {end:.6g}" for start, end in list(ends)[:shown]
    ]
    assert rows[at + 1 + shown] == [f"and {30 - shown} more groups", ""]


def test_what_went_wrong_is_shown_to_its_end(run: Path) -> None:
    """An error that is long because a path in it is."""
    place = run.parent / "/".join(["a directory with quite a long name"] * 12)
    place.mkdir(parents=True)
    opened = open_run(run.rename(place / "r.lca"))
    next((opened.path / "commits" / "train").glob("0*.json")).write_text("{")
    cell = seen(opened).rows[1][-1]
    assert len(cell) > 500
    assert str(opened.path) in cell
    assert "…" not in cell
