"""`lca plot`: every finding of a real run, as every kind of file; what is refused and how."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import matplotlib.animation
import matplotlib.pyplot as plt
import pytest

from lca_posthoc import findings
from lca_posthoc.base.declarations import declared_findings
from lca_posthoc.cli.plot import findings_drawn
from tests.helpers import sample_findings as made_by_hand
from tests.helpers.cli import lca, record, refused, run_lca, write_task

MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", ".gif": b"GIF8"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run `a.lca` of losses `train`, `validation` and, with groups, `classes`, and a
    copy `b.lca`.
    """
    root = tmp_path_factory.mktemp("plot")
    record(root / "ck", range(7))
    old = 'Loss(F.cross_entropy, on="validation")}'
    classes = (
        '"classes": Loss(F.cross_entropy, on="train", group_by=lambda inputs, targets: targets)'
    )
    write_task(root / "task.py", old, f"{old[:-1]}, {classes}}}")
    assert run_lca(root / "ck", root / "task.py", root / "a.lca", "--loss", "all").exit_code == 0
    shutil.copytree(root / "a.lca", root / "b.lca")
    return root


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to draw in, with the runs beside it; no figure of an earlier test is open."""
    plt.close("all")
    monkeypatch.chdir(tmp_path)
    return made


def wrote(result: Any, name: str) -> None:
    assert (result.exit_code, result.stdout) == (0, f"wrote {name}\n"), result.stderr
    path = Path(name)
    if path.suffix in MAGIC:
        assert path.read_bytes().startswith(MAGIC[path.suffix])
    assert path.stat().st_size > 1000
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    "finding",
    [
        name
        for name in findings_drawn()
        if not (declared_findings()[name].examples or declared_findings()[name].part)
    ],
)
def test_a_finding_is_drawn_into_a_file_of_its_name(here: Path, finding: str) -> None:
    wrote(lca("plot", here / "a.lca", finding), f"{finding}.png")


@pytest.mark.parametrize("kind", [".png", ".svg", ".pdf"])
def test_the_end_of_the_name_says_the_format(here: Path, kind: str) -> None:
    wrote(lca("plot", here / "a.lca", "layers", "-o", f"x{kind}"), f"x{kind}")


def test_the_microscope_is_also_a_film(here: Path) -> None:
    wrote(lca("plot", here / "a.lca", "microscope", "-o", "x.gif", "--fps", "20"), "x.gif")
    wrote(lca("plot", here / "a.lca", "microscope", "-o", "x.png", "--step", "2"), "x.png")


def test_without_ffmpeg_it_says_so_and_how_else(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        matplotlib.animation.FFMpegWriter, "isAvailable", classmethod(lambda cls: False)
    )
    result = lca("plot", here / "a.lca", "microscope", "-o", "x.mp4")
    refused(result, "x.mp4: an mp4 needs ffmpeg", "x.gif", code=5)


@pytest.mark.parametrize(
    "arguments",
    [
        ("layers", "--by", "tensor"),
        ("layers", "--by", "1", "--quantity", "total"),
        ("layers", "--by-role", "--quantity", "mean"),
        ("units", "--layer", "hidden"),
        ("peaks", "--signal", "motion"),
        ("oscillation", "--parameter", "hidden.weight[0, 1]"),
        ("microscope", "--tensor", "hidden.weight"),
        ("compare", "--by", "tensor"),
        ("curve", "--loss", "classes", "--group", "1", "--group", "3"),
        ("helping", "--loss", "classes", "--group", "2"),
        ("layers", "--loss", "classes"),
        ("peaks", "--loss", "classes"),
        ("candidates", "--loss", "classes"),
        ("microscope", "--loss", "classes", "--group", "0"),
        ("generalisation", "--loss", "validation", "--loss", "train"),
    ],
    ids=" ".join,
)
def test_options_reach_the_finding(here: Path, arguments: tuple[str, ...]) -> None:
    wrote(lca("plot", here / "a.lca", *arguments), f"{arguments[0]}.png")


@pytest.mark.parametrize("finding", ["curve", "layers", "units", "generalisation", "compare"])
def test_several_runs_are_drawn_beside_each_other(here: Path, finding: str) -> None:
    wrote(lca("plot", here / "a.lca", f"_the $other$={here / 'b.lca'}", finding), f"{finding}.png")


@pytest.mark.parametrize("finding", ["curve", "layers", "generalisation", "units"])
def test_runs_beside_each_other_have_one_scale(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finding: str
) -> None:
    assert (
        run_lca(
            here / "ck", here / "task.py", "short.lca", "--loss", "all", "--steps", "3:6"
        ).exit_code
        == 0
    )
    drawn = list[Any]()
    monkeypatch.setattr(plt, "close", drawn.append)
    wrote_ = lca("plot", here / "a.lca", "short.lca", finding)
    assert wrote_.exit_code == 0, wrote_.output
    monkeypatch.undo()
    (figure,) = drawn
    plt.close(figure)
    first, second, *_ = (ax for ax in figure.axes if ax.get_title(loc="left"))
    assert first.get_xlim() == second.get_xlim()
    assert first.get_ylim() == second.get_ylim()
    scales = {
        (shown.norm.vmin, shown.norm.vmax)
        for ax in (first, second)
        for shown in ax.collections
        if finding == "units"
    }
    assert len(scales) <= 1


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("a.lca", "nosuch"), r"no finding 'nosuch'; there are blocks, candidates, .* units"),
        (("curve", "a.lca"), r"no finding '.*a\.lca'"),
        (("a.lca", "curve", "-o", "x.jpg"), r"curve is drawn as \.png, \.svg, \.pdf, got 'x\.jpg'"),
        (("a.lca", "curve", "-o", "x.mp4"), r"curve is drawn as \.png, \.svg, \.pdf, got"),
        (("a.lca", "microscope", "-o", "x"), r"\.pdf, \.mp4, \.gif, got 'x'"),
        (("a.lca", "curve", "-o", "no/x.png"), r"no directory no for x\.png"),
        (("a.lca", "curve", "--loss", "nosuch"), r"no loss 'nosuch'; it has '"),
        (("a.lca", "curve", "--loss", "train", "--loss", "train"), r"curve takes one loss"),
        (("a.lca", "helping", "--loss", "classes"), r"4 groups.* or --group, of 0, 1, 2, 3"),
        (
            ("a.lca", "helping", "--loss", "classes", "--group", "9"),
            r"no group '9'; it has 0, 1, "
            r"2, 3",
        ),
        (("a.lca", "compare", "--loss", "classes"), r"groups"),
        (("a.lca", "generalisation", "--loss", "train"), r"generalisation takes two losses"),
        (("a.lca", "curve", "--layer", "fc1"), r"--layer does not go with curve; it is for units"),
        (("a.lca", "units", "--layer", "nosuch"), r"no layer 'nosuch'"),
        (("a.lca", "curve", "--group", "7"), r"loss 'train' has no group '7'; it has no groups"),
        (
            ("a.lca", "curve", "--by", "tensor"),
            r"--by does not go with curve; it is for "
            r"candidates, causes, clusters, compare, examples",
        ),
        (("a.lca", "layers", "--by", "words"), r"by is .*got 'words'"),
        (
            ("a.lca", "b.lca", "helping"),
            r"helping is drawn of one run, got 2\. Several go with "
            r"curve",
        ),
        (
            ("a.lca", "microscope", "--fps", "3"),
            r"--step is for a picture of one moment, --fps for "
            r"a film",
        ),
        (
            ("a.lca", "microscope", "--step", "999"),
            r"no segment is there at step 999; there are "
            r"steps 0 to",
        ),
        (("curve",), r"which run\? Write lca plot RUN curve"),
        (
            ("a.lca",),
            r"which finding of .*a\.lca\? There are blocks, candidates, .* units\. Write lca plot "
            r".*a\.lca FINDING",
        ),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, tuple) else "",
)
def test_what_cannot_be_drawn_is_refused_with_what_there_is(
    here: Path, arguments: tuple[str, ...], what: str
) -> None:
    given = [here / each if each.endswith(".lca") else each for each in arguments]
    result = lca("plot", *given)
    assert re.search(what, refused(result)), result.stderr
    assert list(Path().iterdir()) == []


def test_what_is_no_run_is_refused(here: Path) -> None:
    assert "run.json" in lca("plot", here / "ck", "curve").stderr


def test_why_nothing_is_drawn_yet_is_said_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = (
        made_by_hand.oscillation(traces=0)
        .drop_dims("tensor")
        .assign_attrs(left_out="Turns need every segment.")
    )
    monkeypatch.setattr(
        findings,
        "oscillation",
        lambda *_, **__: nothing.drop_vars(["overall_turns", "overall_interval"]),
    )
    assert (
        refused(lca("plot", here / "a.lca", "oscillation")).count("Turns need every segment.") == 1
    )
