"""Directions of the bowl, whose every allocation along them is known in closed form."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
from matplotlib.text import Text

import lca_posthoc.results
from lca_posthoc import Run, findings, plots
from lca_posthoc.errors import InputError
from lca_posthoc.export import export, read_netcdf
from lca_posthoc.findings.directions import balance
from lca_posthoc.report import write_report

from ..helpers import made_up_parts as parts
from ..helpers import quadratic_bowl as bowl
from ..helpers.cli import lca, refused
from ..helpers.made_up_parts import OtherParts, OtherRun

mpl.use("agg")
pytestmark = pytest.mark.filterwarnings("ignore::lca_posthoc.errors.LCAWarning")
LOSSES = (("train", None), ("groups", 0), ("groups", 1))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return bowl.replay(tmp_path_factory.mktemp("bowl"), "tensors").run


def close(one: object, other: object) -> None:
    np.testing.assert_allclose(np.asarray(one, float), np.asarray(other, float), atol=1e-6)


def of(found: xr.Dataset, group: int | None) -> xr.Dataset:
    return found if group is None else found.sel(group=group)


# --- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "group"), LOSSES)
def test_inside_is_what_the_projected_motion_did_and_outside_the_others(
    plain: Run, loss: str, group: int | None
) -> None:
    found = of(findings.directions(OtherParts(plain[loss])), group)
    rows, moved, slope = parts.basis(), parts.motion(), parts.gradient(group)
    inside = ((moved @ rows.T @ rows) * slope).sum(1)  # with the motion's part in the subspace
    close(found["inside"], inside)
    close(found["outside"], ((moved - moved @ rows.T @ rows) * slope).sum(1))
    close(found["inside_cumulative"], np.cumsum(inside))
    close(found["inside_total"], inside.sum())
    close(found["inside"] + found["outside"], findings_sum(plain, loss, group))
    close(found["total"].sum("direction"), found["inside_total"])
    close(found["cumulative"].isel(step=-1), found["total"])
    close(found["outside_cumulative"].isel(step=-1), found["outside_total"])


def findings_sum(run: Run, loss: str, group: int | None) -> Any:
    return of(run[loss].tensors, group)["allocated"].sum("tensor").values


def test_all_directions_leave_nothing_outside(plain: Run) -> None:
    found = findings.directions(OtherParts(plain["train"], rows=parts.basis(count=bowl.SIZE)))
    close(found["outside"], np.zeros(bowl.SEGMENTS))
    close(found["captured"], np.ones(bowl.SEGMENTS))
    close(found["captured_total"], 1.0)


class _With(OtherParts):
    """The loss `train` with a dataset of its own."""

    def __init__(self, run: Run, along: xr.Dataset) -> None:
        super().__init__(run["train"])
        self._data = along

    @property
    def along(self) -> xr.Dataset:
        return self._data


def test_the_captured_share_is_that_of_squared_lengths(plain: Run) -> None:
    found = findings.directions(OtherParts(plain["train"]))
    rows, moved = parts.basis(), parts.motion()
    inside = np.square(moved @ rows.T)
    close(found["captured"], inside.sum(1) / np.square(moved).sum(1))
    close(found["captured_total"], inside.sum() / np.square(moved).sum())
    close(found["captured_direction"], inside.sum(0) / np.square(moved).sum())
    moving = np.abs(parts.by_tensor(np.abs(moved))).sum(0) > 0
    sizes = np.array([np.prod(shape) for shape in bowl.SHAPES.values()])[moving]
    assert float(found["captured_by_chance"]) == parts.DIRECTIONS / sizes.sum()


def test_random_directions_capture_on_average_what_is_said_to_be_by_chance(plain: Run) -> None:
    shares = []
    for seed in range(200):
        rows = parts.basis(seed)
        shares.append(
            float(np.square(parts.motion() @ rows.T).sum() / np.square(parts.motion()).sum())
        )
    found = findings.directions(OtherParts(plain["train"]))
    error = np.std(shares) / np.sqrt(len(shares))
    # every element of the bowl's tensors that move may lie in the subspace
    assert abs(np.mean(shares) - float(found["captured_by_chance"])) < 4 * error


def test_the_motion_of_a_segment_on_which_nothing_moved_is_captured_by_nothing(plain: Run) -> None:
    along = OtherParts(plain["train"]).along.copy(deep=True)
    for name in ("motion", "distance", "allocated", "remainder"):
        along[name][4] = 0.0
    found = findings.directions(_With(plain, along))
    assert np.isnan(found["captured"].values).nonzero()[0].tolist() == [4]
    assert np.isfinite(found["captured_total"])


# --- the null -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "group"), LOSSES)
def test_the_null_is_another_runs_inside(plain: Run, loss: str, group: int | None) -> None:
    null = OtherParts(plain[loss], rows=parts.basis(99))
    alone = findings.directions(null)
    found = findings.directions(OtherParts(plain[loss]), null=null)
    for name in ("inside", "inside_cumulative", "inside_total", "captured", "captured_total"):
        close(of(found, group)[f"null_{name}"], of(alone, group)[name])
    assert found.attrs["null"] == str(plain.path)
    assert "random ones capture" in balance(found)


def test_a_null_that_cannot_be_compared_is_refused(plain: Run) -> None:
    results = OtherParts(plain["train"])
    with pytest.raises(InputError, match=r"has 2 directions, and this run 3.*--random 3"):
        findings.directions(results, null=OtherParts(plain["train"], rows=parts.basis(1, 2)))
    for other in (
        _With(plain, results.along.isel(step=slice(1, None))),
        _With(plain, results.along.assign(remainder=results.along["remainder"] + 0.1)),
        OtherParts(plain["groups"]),
    ):
        with pytest.raises(InputError, match="has other segments, or changed differently"):
            findings.directions(results, null=other)
    with pytest.raises(InputError, match="made without --along FILE"):
        findings.directions(results, null=plain["train"])


def test_a_run_without_directions_says_the_way_out_and_shows_none(
    plain: Run, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"without --along FILE.* --along FILE --out OTHER\.lca"):
        findings.directions(plain["train"])
    refused(lca("plot", plain.path, "directions", "-o", tmp_path / "x.png"), "without --along FILE")
    assert '<section id="directions"' not in write_report([plain], tmp_path / "x.html").read_text()


# --- command, export, report, figure --------------------------------------------------------------


@pytest.fixture
def with_directions(plain: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the bowl's run, which opens with directions; below it, random ones."""

    def opened(path: str | Path) -> Run:
        null = Path(path).name == "null"
        return OtherRun(plain, rows=parts.basis(99) if null else None)

    monkeypatch.setattr(lca_posthoc.results, "open_run", opened)
    monkeypatch.setattr(sys.modules["lca_posthoc.findings.directions"], "open_run", opened)
    return plain.path


def test_the_command_draws_them_beside_the_null(
    with_directions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--null", with_directions / "null"], ["--loss", "groups", "--group", "1"]):
        result = lca("plot", with_directions, "directions", *more)
        assert (result.exit_code, result.stdout) == (0, "wrote directions.png\n"), result.stderr
    refused(lca("plot", with_directions, "directions", "--loss", "groups"), "2 groups")


def test_they_are_exported_unchanged(plain: Run, tmp_path: Path) -> None:
    given = OtherRun(plain)
    for loss in ("train", "groups"):
        target = tmp_path / f"{loss}.nc"
        (file,) = export(given, target, losses=[loss], findings=["directions"])
        xr.testing.assert_identical(read_netcdf(file), findings.directions(given[loss]))


def test_the_report_has_their_numbers(plain: Run, tmp_path: Path) -> None:
    text = write_report([OtherRun(plain)], tmp_path / "r.html").read_text()
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    found = findings.directions(OtherParts(plain["groups"]))
    panel = next(str(at) for at, one in enumerate(data["panels"]) if one["label"] == "groups")
    assert set(data["views"]["directions"][panel]) == {"|", "0|", "1|"}
    level = data["views"]["captured"][panel]["|"]["@level"]["by chance"]
    assert level == float(found["captured_by_chance"])
    overall = findings.directions(OtherParts(plain["train"]))
    inside = balance(overall).partition("inside ")[2].partition(",")[0]
    assert text.count(f"Σ allocation inside {inside}, outside") >= 2  # of train, and mean of groups
    assert "_fc$1" in text


def test_the_summary_has_them_in_a_line_and_in_its_figures(plain: Run) -> None:
    for loss in ("train", "groups"):
        results = OtherParts(plain[loss])
        finding, split = findings.directions(results), findings.causes(results)
        figures = findings.summary(results)
        inside = figures["directions"]
        assert inside["directions"] == 3
        assert inside["captured"] == float(finding["captured_total"])
        close(inside["inside"], finding["inside_total"])
        close(inside["outside"], finding["outside_total"])
        of_causes = figures["causes"]
        assert of_causes["signal"] == "train"
        close(of_causes["rest_share"], split["rest_overall"])
        close(sum(np.array(part) for part in of_causes["allocated"].values()), figures["allocated"])
    assert "causes" not in findings.summary(plain["train"])
    assert "directions" not in findings.summary(plain["train"])


def test_a_run_is_summed_up_in_the_terminal(with_directions: Path) -> None:
    shown = " ".join(lca("summary", with_directions).stdout.split())
    finding = findings.directions(
        OtherParts(lca_posthoc.results.open_run(with_directions)["train"])
    )
    assert f"directions of 'train': {balance(finding)} `lca plot " in shown


def test_the_figure_draws_both_sides_of_the_subspace_and_the_null(plain: Run) -> None:
    null = OtherParts(plain["train"], rows=parts.basis(99))
    found = findings.directions(OtherParts(plain["train"]), null=null)
    figure = plots.directions(found)
    figure.canvas.draw()
    change, captured, bars = figure.axes
    ends = {
        line.get_label(): float(line.get_ydata()[-1])
        for line in change.lines
        if not line.get_label().startswith("_")
    }
    inside, outside = float(found["inside_total"]), float(found["outside_total"])
    assert ends == pytest.approx(
        {
            "all of the motion": inside + outside,
            "inside the subspace": inside,
            "outside": outside,
            "inside a random one": float(found["null_inside_total"]),
        }
    )
    close(captured.lines[0].get_ydata(), 100 * found["captured"])
    close(captured.lines[1].get_ydata(), 100 * found["null_captured"])
    close([patch.get_width() for patch in bars.patches], found["total"])
    said = "\n".join(text.get_text() for text in figure.findobj(Text))
    assert "The 3 directions capture" in said
    without = plots.directions(findings.directions(OtherParts(plain["train"])))
    assert "random" not in "\n".join(text.get_text() for text in without.findobj(Text))
