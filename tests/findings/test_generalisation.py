"""Two losses side by side: which two, what they are called, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from lca_posthoc import findings, open_run, plots
from lca_posthoc.errors import InputError
from lca_posthoc.findings.generalisation import two_splits
from lca_posthoc.report import write_report
from tests.helpers.cli import lca, record, refused, run_lca, says, write_task

ONE = 'losses={"train": Loss(F.cross_entropy, on="train"), "validation": Loss(F.cross_entropy, on="validation")}'
MANY = """losses={
            "edge": Loss(F.cross_entropy, on="train"),
            "seg": Loss(call=cross_entropy, on="train"),
            "decay": Loss(l2=0.1),
            "classes": Loss(F.cross_entropy, on="validation", group_by=lambda inputs, targets: targets),
            "seg_test": Loss(call=cross_entropy, on="test"),
            "layer": Loss(F.cross_entropy, on="validation"),
            "seg_val": Loss(call=cross_entropy, on="validation"),
        }"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seven losses: two over the training split, three over the validation split (one by
    class), one over a third, a term.
    """
    place = tmp_path_factory.mktemp("losses")
    task = write_task(place / "task.py", ONE, MANY)
    task.write_text(
        task.read_text().replace(
            '"validation": validation},', '"validation": validation, "test": validation},'
        )
    )
    result = run_lca(
        *(
            record(place / "ck", range(7)),
            task,
            place / "r.lca",
            "--loss",
            "all",
            "--subset",
            "validation=0:7",
            "--durability",
            "none",
        )
    )
    assert result.exit_code == 0, result.output
    return place / "r.lca"


@pytest.mark.parametrize(
    ("losses", "wanted"),
    {
        "of one kind, whatever the order": (
            ("edge", "seg", "layer", "seg_test", "seg_val"),
            ("seg", "seg_val"),
        ),
        "the split for validation before the one for tests": (
            ("seg", "seg_test", "seg_val"),
            ("seg", "seg_val"),
        ),
        "over whatever other split there is": (("edge", "seg_test"), ("edge", "seg_test")),
        "the training split first": (("layer", "edge"), ("edge", "layer")),
        "without a training split": (("seg_test", "layer"), ("seg_test", "layer")),
        "past groups and terms": (("classes", "decay", "edge", "layer"), ("edge", "layer")),
        "two over one split": (("edge", "seg"), None),
        "a loss and a term": (("edge", "decay"), None),
        "a loss and one by class": (("edge", "classes"), None),
        "one loss": (("seg",), None),
    }.values(),
    ids=str,
)
def test_the_default_is_two_losses_over_two_splits(
    run: Path, losses: tuple[str, ...], wanted: tuple[str, str] | None
) -> None:
    of_run = open_run(run)
    assert two_splits({name: of_run[name] for name in losses}) == wanted


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (
            "seg",
            "edge",
            "losses 'seg' and 'edge' are both over split 'train'; another split; `layers`",
        ),
        ("seg_val", "layer", "both over split 'validation'; lca run"),
        ("seg", "seg", "both over split 'train'"),
        ("seg", "decay", "'decay' is a term of the parameters, over no split"),
        ("classes", "seg", "loss 'classes' has groups"),
    ],
)
def test_two_losses_that_are_not_over_two_splits_are_refused(
    run: Path, first: str, second: str, words: str
) -> None:
    of_run = open_run(run)
    with pytest.raises(InputError) as caught:
        findings.generalisation(of_run[first], of_run[second])
    says(str(caught.value), *words.split("; "))
    refused(
        lca("plot", run, "generalisation", "--loss", first, "--loss", second), *words.split("; ")
    )


def test_a_run_without_two_splits_says_what_it_has(run: Path, tmp_path: Path) -> None:
    words = (
        "two losses without groups over two splits",
        "over 'train' are 'edge', 'seg'",
        "on=another split",
    )
    target = ("-o", tmp_path / "out", "--loss", "edge", "--loss", "seg", "--loss", "decay")
    refused(lca("export", run, *target, "--finding", "generalisation"), *words)
    result = lca("export", run, *target)
    assert result.exit_code == 0, result.output
    says(result.stderr, "generalisation of loss 'edge' is skipped", *words)
    small = tmp_path / "ck"
    made = run_lca(
        record(small), write_task(tmp_path / "task.py"), tmp_path / "r.lca", "--durability", "none"
    )
    assert made.exit_code == 0, made.output
    refused(lca("plot", tmp_path / "r.lca", "generalisation"), "over 'train' is 'train'", "lca run")


def test_everything_is_called_as_the_losses_are(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = findings.generalisation(*(open_run(run)[name] for name in ("seg", "seg_val")))
    names = {"seg", "seg_val"}
    assert names | {
        f"{what}_{name}" for what in ("cumulative", "allocated", "worst") for name in names
    } <= set(found)
    assert list(found["quadrant"].values[1:3]) == [
        "helped seg, hurt seg_val",
        "hurt seg, helped seg_val",
    ]
    assert (found.attrs["loss"], found.attrs["split"]) == ("seg, seg_val", "train, validation")
    says(found.attrs["left_out"], "seg_val is measured on 7 of 10 examples")
    texts = [
        str(found),
        json.dumps(found.to_dict(data=False), default=str),
        *map(str, found["quadrant"].values),
    ]
    ax = plots.generalisation(found, ax=Figure().subplots())
    texts += [ax.get_xlabel(), *(text.get_text() for text in ax.get_legend().get_texts())]
    assert {"seg", "seg_val"} <= set(texts)
    foreign = re.compile(r"\b(train|validation)(?!, validation)\b(?! split)")
    monkeypatch.chdir(tmp_path)
    assert lca("plot", run, "generalisation").exit_code == 0
    assert (
        lca("export", run, "-o", "t", "--format", "csv", "--finding", "generalisation").exit_code
        == 0
    )
    heads = [line for path in Path("t/seg").glob("*.csv") for line in path.read_text().splitlines()]
    assert any("helped seg, hurt seg_val" in line for line in heads)
    assert [word for text in (*texts[2:], *heads) for word in foreign.findall(text)] == []


@pytest.mark.parametrize(
    ("first", "second", "called"),
    [("seg", "layer", "loss layer"), ("layer", "seg_test", "seg_test")],
)
def test_a_loss_called_as_something_else_of_the_result_keeps_its_numbers(
    run: Path, first: str, second: str, called: str
) -> None:
    of_run = open_run(run)
    found = findings.generalisation(of_run[first], of_run[second])
    assert found.attrs["second"] == called
    for which, name in (("first", first), ("second", second)):
        total = findings.layers(of_run[name])["total"]
        assert found[found.attrs[which]].values.tolist() == total.values.tolist()
    assert plots.generalisation(found, ax=Figure().subplots()).get_legend() is not None


def test_the_report_names_the_losses_and_leaves_out_two_of_one_split(
    run: Path, tmp_path: Path
) -> None:
    path = write_report([open_run(run)], tmp_path / "it.html", losses=["seg", "edge"])
    text = path.read_text()
    data: Any = json.loads(
        text.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    )
    view = data["views"]["generalisation"]["0"]["|0"]
    assert [name for _, name in view["@legend"]] == ["seg", "seg_val (dashed)"]
    assert [view[which]["name"]["v"] for which in ("first", "second")] == ["seg", "seg_val"]
    section = text.split('<section id="generalisation"')[1].split("</section>")[0]
    assert re.findall(r"\b(?:training|validation) loss\b", section) == []
    says(
        section,
        "Layers that lowered seg and raised seg_val",
        "helped seg, hurt seg_val",
        "Σ on seg_val",
    )
