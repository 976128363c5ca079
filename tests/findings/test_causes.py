"""Causes of the bowl, whose parts of the motion are made up and whose allocations are known in closed
form; and of a small training recorded with its optimiser.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from matplotlib.text import Text

from lca_posthoc import Loss, Recorder, Run, Task, findings, open_run, plots, run
from lca_posthoc.base import colours
from lca_posthoc.demo import Net, digits
from lca_posthoc.errors import InputError
from lca_posthoc.export import export, read_netcdf
from lca_posthoc.findings.causes import culprits, percent, size_of_rest
from lca_posthoc.findings.common import layer_of
from lca_posthoc.numerics.schema import CAUSES
from lca_posthoc.report import write_report

from ..helpers import made_up_parts as parts
from ..helpers import quadratic_bowl as bowl
from ..helpers import sample_findings
from ..helpers.cli import UNSAFE, lca, refused
from ..helpers.made_up_parts import OtherParts, OtherRun

mpl.use("agg")
pytestmark = pytest.mark.filterwarnings("ignore::lca_posthoc.errors.LCAWarning")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return bowl.replay(tmp_path_factory.mktemp("bowl"), "tensors").run


def task() -> Task:
    """The digits, with a loss for training that has groups too."""
    train, validation = digits()
    return Task(
        model=Net,
        data={"train": train, "validation": validation},
        losses={
            "train": Loss(F.cross_entropy, on="train"),
            "a $tag$/<b>": Loss(F.cross_entropy, on="validation"),
            "odd": Loss(F.cross_entropy, on="train", group_by=lambda inputs, targets: targets % 2),
        },
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps of SGD with momentum and decay, and its causes."""
    place = tmp_path_factory.mktemp("recorded")
    (inputs, targets), _ = digits()
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    with Recorder(place / "ck", model) as recorder:
        recorder.attach(optimizer)
        for _ in range(10):
            batch = torch.randint(len(inputs), (50,))
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
    out = place / "r.lca"
    run(
        place / "ck", task(), losses=["all"], causes=True, cluster="inline", keep="tensors", out=out
    )
    return out


def close(one: object, other: object, size: float = 1e-6) -> None:
    np.testing.assert_allclose(np.asarray(one, float), np.asarray(other, float), atol=size)


# --- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["module", "tensor", 1, 0])
@pytest.mark.parametrize("loss", ["train", "groups"])
def test_each_cause_of_a_layer_is_the_sum_over_its_elements(plain: Run, loss: str, by: Any) -> None:
    found = findings.causes(OtherParts(plain[loss]), by=by)
    moved = parts.parts_of_motion(1e-3)
    for layer in found["layer"].values:
        buffer = layer.endswith(" buffer") or layer in (bowl.BUFFER, "buffer")
        members = [
            at
            for at in range(bowl.SIZE)
            for name in [_tensor(at)]
            if (name == bowl.BUFFER) == buffer
            and layer_of(name, by)
            == (layer if by == "tensor" else layer.removesuffix("buffer").strip())
        ]
        assert members, layer
        for group in (0, 1) if loss == "groups" else (None,):
            one = found.sel(layer=layer) if group is None else found.sel(layer=layer, group=group)
            expected = (moved * parts.gradient(group))[:, :, members].sum(-1).T
            close(one["allocated"].transpose("step", "cause"), expected)
            close(one["cumulative"].transpose("step", "cause"), np.cumsum(expected, axis=0))
            close(one["total"], expected.sum(0))


def _tensor(element: int) -> str:
    return [name for name in bowl.SHAPES if bowl.offset(name) <= element][-1]


@pytest.mark.parametrize("by", ["module", "tensor", 0])
@pytest.mark.parametrize("loss", ["train", "groups"])
def test_causes_add_up_to_what_layers_were_allocated(plain: Run, loss: str, by: Any) -> None:
    found, layers = (
        findings.causes(OtherParts(plain[loss]), by=by),
        findings.layers(plain[loss], by=by),
    )
    assert found["layer"].values.tolist() == layers["layer"].values.tolist()
    assert found["elements"].values.tolist() == layers["elements"].values.tolist()
    for name in ("allocated", "cumulative"):
        close(found[name].sum("cause"), layers[name])
    close(found["layer_total"], layers["total"])
    close(found["total"].sum("cause"), layers["total"])
    close(found["cumulative"].isel(step=-1).transpose(*found["total"].dims), found["total"])


def test_a_layer_hurts_by_the_cause_that_raised_the_loss_most(plain: Run) -> None:
    for loss in ("train", "groups"):
        found = findings.causes(OtherParts(plain[loss]), by="tensor")
        stacked = found.stack(row=list(found["hurts"].dims))
        hurting = 0
        for row in range(stacked.sizes["row"]):
            one = stacked.isel(row=row)
            sums = dict(zip(CAUSES, one["total"].transpose("cause").values, strict=True))
            if sum(sums.values()) > 0:
                hurting += 1
                assert one["hurts"].item() == max(sums, key=lambda cause: sums[cause])
            else:
                assert one["hurts"].item() == ""
        assert 0 < hurting < stacked.sizes["row"]


@pytest.mark.parametrize("rest", [0.0, 1e-3, 3.0])
def test_rest_is_measured_over_parameters_and_buffers_stand_apart(plain: Run, rest: float) -> None:
    moved = parts.parts_of_motion(rest)
    for group, name in ((None, "train"), (0, "groups"), (1, "groups")):
        found = findings.causes(OtherParts(plain[name], rest=rest))
        found = found if group is None else found.sel(group=group)
        allocated = parts.by_tensor(moved * parts.gradient(group))
        names = list(bowl.SHAPES)
        own = [names.index(tensor) for tensor in names if tensor != bowl.BUFFER]
        sizes = abs(allocated.sum(0))[:, own]
        rests = abs(allocated[-1])[:, own]
        close(found["size"], sizes.sum(1))
        close(found["rest_size"], rests.sum(1))
        close(found["rest_overall"], rests.sum() / sizes.sum())
        first = [names.index("first.weight"), names.index("first.bias")]
        of_first = found["rest_share"].sel(layer="first")
        close(of_first, abs(allocated[-1])[:, first].sum() / abs(allocated.sum(0))[:, first].sum())
        buffer = found.sel(layer="first buffer")
        assert buffer["kind"].item() == "buffer"
        close(buffer["rest_share"], 1.0)
        close(buffer["total"].isel(cause=slice(-1)), np.zeros(len(CAUSES) - 1))
        said = size_of_rest(found)
        assert said.startswith(f"Rest is {percent(float(found['rest_overall']))} of Σ|A|")
        assert ("much of the motion has no known cause" in said) == (rest == 3.0)
        assert "Buffers, which no optimiser moves, are separate" in said


def test_layers_with_much_rest_are_named_where_others_have_little(plain: Run) -> None:
    found = findings.causes(OtherParts(plain["train"]))
    share = found["rest_share"].copy()
    share[list(found["layer"].values).index("norm")] = 0.4
    said = size_of_rest(found.assign(rest_share=share))
    assert "It is large in norm (40 %)." in said
    assert "It is large" not in size_of_rest(found)


def test_nothing_moved_has_no_rest() -> None:
    found = findings.causes.__globals__["share_of"](np.zeros(2), np.array([0.0, 3.0]))
    assert found.tolist() == [0.0, 0.0]


def test_layers_that_hurt_are_said_with_their_cause_the_worst_first(plain: Run) -> None:
    found = findings.causes(OtherParts(plain["train"]), by="tensor")
    worst = int(found["layer_total"].values.argmax())
    said = culprits(found)
    assert said.startswith(f"Layers that hurt: {found['layer'].values[worst]} (+")
    assert f"by {found['hurts'].values[worst]} (+" in said
    calm = found.assign(layer_total=-abs(found["layer_total"]))
    calm["layer_verdict"] = calm["layer_verdict"].where(False, "helps, clearly")
    assert culprits(calm) == "No layer hurt."
    found["layer_verdict"] = found["layer_verdict"].where(False, "cannot be told from zero")
    assert culprits(found) == "No layer hurt by more than its error."


def test_a_run_without_causes_says_the_way_out_and_shows_none(plain: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"made without --causes.* --causes --out OTHER\.lca"):
        findings.causes(plain["train"])
    refused(lca("plot", plain.path, "causes", "-o", tmp_path / "x.png"), "made without --causes")
    refused(
        lca("export", plain.path, "-o", tmp_path / "x", "--format", "csv", "--finding", "causes"),
        "made without --causes",
    )
    page = write_report([plain], tmp_path / "x.html").read_text()
    assert '<section id="causes"' not in page
    assert "Rest of the causes" not in page
    assert "causes of" not in lca("summary", plain.path).stdout


# --- a recorded training --------------------------------------------------------------------------


def test_causes_of_a_recorded_training_add_up_and_leave_no_rest(recorded: Path) -> None:
    opened = open_run(recorded)
    for loss in opened:
        found = findings.causes(opened[loss])
        assert found.attrs["signal"] == "train"
        of_layers = findings.layers(opened[loss])["allocated"]
        close(found["allocated"].sum("cause"), of_layers, 1e-12)
        assert (found["rest_overall"] < 1e-3).all()
    total = findings.causes(opened["train"])["total"].sum("layer")
    assert float(total.sel(cause="signal")) < 0  # the gradient of this very loss
    assert float(total.sel(cause="momentum")) < 0


def test_its_commands_draw_say_and_export_causes(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--by", "tensor", "--top", "2"], ["--loss", "odd", "--group", "1"]):
        result = lca("plot", recorded, "causes", *more)
        assert (result.exit_code, result.stdout) == (0, "wrote causes.png\n"), result.stderr
    refused(lca("plot", recorded, "causes", "--loss", "odd"), "2 groups")
    said = " ".join(lca("summary", recorded).stdout.split())
    total = findings.causes(open_run(recorded)["train"])["total"].sum("layer")
    signal = f"{float(total.sel(cause='signal')):+.3g}".replace("-", "−")
    assert f"of Σ|A|; signal {signal}, noise" in said
    assert said.count("causes of ") == 3
    assert "causes of 'odd': rest is" in said
    (file,) = export(open_run(recorded), tmp_path / "x.nc", losses=["odd"], findings=["causes"])
    xr.testing.assert_identical(read_netcdf(file), findings.causes(open_run(recorded)["odd"]))
    result = lca("export", recorded, "-o", tmp_path / "tables", "--format", "csv")
    assert result.exit_code == 0, result.stderr
    assert list((tmp_path / "tables").rglob("*causes*.csv"))
    assert not list((tmp_path / "tables").rglob("*directions*"))


def test_its_report_has_the_numbers_and_says_rest_first(recorded: Path, tmp_path: Path) -> None:
    opened = open_run(recorded)
    text = write_report([opened], tmp_path / "r.html").read_text()
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    found = findings.causes(opened["odd"])
    panel = next(str(at) for at, one in enumerate(data["panels"]) if one["label"].startswith("odd"))
    views = data["views"]["causes"][panel]
    assert set(views) == {f"{group}|{layer}" for group in ("", "0", "1") for layer in range(3)}
    assert views["1|0"]["causes"]["name"] == [*CAUSES, "all causes"]
    cells = data["views"]["@causes"][panel]["1|"]
    close(cells["2"], found["layer_error"].sel(group=1))
    assert cells["3"] == found["layer_verdict"].sel(group=1).values.tolist()
    close(cells["4"], found["total"].sel(group=1, cause="signal"))
    close(cells["9"], found["rest_share"].sel(group=1))
    assert "Rest of the causes" in text
    assert "of Σ|A| over parameters" in text
    assert "<b>" not in text.partition("Provenance")[0].partition("<main")[2]


@pytest.mark.parametrize("rest", [1e-3, 3.0])
def test_a_report_warns_where_rest_is_large(plain: Run, tmp_path: Path, rest: float) -> None:
    text = write_report([OtherRun(plain, rest)], tmp_path / "r.html").read_text()
    card = text.partition("<dt>Rest of the causes</dt>")[0].rpartition("<div class=")[2]
    assert ("warning" in card) == (rest == 3.0)
    assert ("much of the motion has no known cause" in text) == (rest == 3.0)


# --- the figure -----------------------------------------------------------------------------------


def test_the_figure_draws_each_cause_in_its_colour_and_the_sum_in_ink(plain: Run) -> None:
    found = findings.causes(OtherParts(plain["train"]))
    figure = plots.causes(found, top=2)
    figure.canvas.draw()
    bars, *panels = figure.axes
    assert len(panels) == 2
    drawn = [text.get_text() for text in bars.get_yticklabels()]
    assert drawn == found["layer"].values.tolist()
    widths = np.zeros((len(CAUSES), found.sizes["layer"]))
    for patch in bars.patches:
        cause = colours.CAUSES.index(mpl.colors.to_hex(patch.get_facecolor()))
        widths[cause, round(patch.get_y() + patch.get_height() / 2)] += patch.get_width()
    close(widths, found["total"].transpose("cause", "layer"))
    (marks,) = (line for line in bars.lines if line.get_marker() == "D")
    close(marks.get_xdata(), found["layer_total"])
    strong = np.sort(np.argsort(-abs(found["total"]).sum("cause").values)[:2])
    for ax, position in zip(panels, strong, strict=True):
        ends = {
            line.get_label(): float(line.get_ydata()[-1])
            for line in ax.lines
            if not line.get_label().startswith("_")
        }
        one = found.isel(layer=position)
        wanted = {cause: float(one["total"].sel(cause=cause)) for cause in CAUSES}
        assert ends == pytest.approx({**wanted, "all causes": float(one["layer_total"])})
        share = percent(float(one["rest_share"]))
        assert ax.get_title(loc="left") == f"{one['layer'].item()}, rest {share}"
    said = "\n".join(text.get_text() for text in figure.findobj(Text))
    assert size_of_rest(found)[:20] in said
    with pytest.raises(InputError, match="1 or more, got 0"):
        plots.causes(found, top=0)


@pytest.mark.parametrize("name", ["causes", "directions"])
def test_no_line_is_drawn_over_missing_segments(name: str) -> None:
    figure = getattr(plots, name)(getattr(sample_findings, name)(gap=True))
    drawn = [line for ax in figure.axes for line in ax.lines if len(line.get_ydata()) > 4]
    drawn = [line for line in drawn if line.get_marker() != "D"]
    assert len(drawn) > 4
    assert all(np.isnan(np.asarray(line.get_ydata(), float)).sum() == 1 for line in drawn)


@pytest.mark.parametrize("name", ["causes", "directions"])
def test_names_add_no_tag_to_the_report(
    plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    find, dim = getattr(findings, name), {"causes": "layer", "directions": "direction"}[name]

    def hostile(results: OtherParts) -> xr.Dataset:
        found = find(results)
        if name == "causes":
            raised, noise = abs(found["layer_total"]), xr.full_like(found["hurts"], "noise")
            found = found.assign(layer_total=raised, hurts=noise)
        names = [
            f"</script><img src=x onerror=a()>{UNSAFE[0]}{at}" for at in range(found.sizes[dim])
        ]
        return found.assign_coords({dim: np.array(names, dtype=object)})

    monkeypatch.setattr(findings, name, hostile)
    text = write_report([OtherRun(plain)], tmp_path / "r.html").read_text()
    assert f'<section id="{name}"' in text
    assert "<img" not in text
    assert "onerror=a()" in text
    assert UNSAFE[0] not in text


def test_the_page_has_the_colours_of_the_figures() -> None:
    style = (Path(plots.__file__).parents[1] / "report" / "style.css").read_text()
    light, dark = style.split(':root[data-theme="dark"]')
    for text, palette in ((light, colours.CAUSES), (dark, colours.CAUSES_DARK)):
        for cause, hue in zip(CAUSES, palette, strict=True):
            assert f"--{cause}: {hue};" in text
