"""The table of blocks and heads against sums of single parameters, picked by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn

from lca_posthoc import Loss, Recorder, Run, Task, findings, plots, run
from lca_posthoc.errors import InputError, LCAError
from lca_posthoc.findings.blocks import block_of
from lca_posthoc.report import write_report
from tests.helpers.cli import lca, says

WIDTH, HEADS, BLOCKS = 12, 3, 2


class Conv1D(nn.Module):
    """As transformers has it: a weight of (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight + self.bias


class Block(nn.Module):
    """Projections of every kind; what is done with their rows does not matter here."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"c_attn": Conv1D(WIDTH, 3 * WIDTH)})
        self.self_attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.cross = nn.ModuleDict(
            {
                "q_proj": nn.Linear(WIDTH, WIDTH),
                "k_proj": nn.Linear(WIDTH, WIDTH // HEADS),
                "v_proj": nn.Linear(WIDTH, WIDTH, bias=False),
            }
        )
        # rows of three roles for every head, or of more queries than keys and values
        self.shared = nn.ModuleDict({"qkv_proj": nn.Linear(WIDTH, WIDTH + 2 * HEADS)})
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        made = self.attn["c_attn"](hidden).tanh().chunk(3, dim=-1)
        hidden = hidden + made[0] * made[1] + made[2]
        hidden = hidden + self.self_attn(hidden[:, None], hidden[:, None], hidden[:, None])[0][:, 0]
        few = self.cross["k_proj"](hidden).repeat(1, HEADS)
        hidden = hidden + self.cross["q_proj"](hidden) * few + self.cross["v_proj"](hidden)
        output: Tensor = self.norm(hidden + self.shared["qkv_proj"](hidden)[:, :WIDTH])
        return output


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(5, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.h[1].extra = nn.Parameter(torch.zeros(WIDTH))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embed(inputs)
        for block in self.h:
            hidden = block(hidden)
        output: Tensor = self.head(self.ln_f(hidden + self.h[1].extra))
        return output


def label(inputs: Tensor, targets: Tensor) -> Tensor:
    return targets % 2


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(20, 5, generator=generator)
    return inputs, torch.randint(0, 4, (20,), generator=generator)


def task() -> Task:
    losses = {"train": Loss(F.cross_entropy), "groups": Loss(F.cross_entropy, group_by=label)}
    return Task(Model, {"train": data()}, losses)


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("blocks")
    (inputs, targets), model = data(), Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(root / "ck", model) as recorder:
        for step in range(5):
            recorder.save(step)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return run(root / "ck", task(), losses=["all"], cluster="inline", keep="parameters")


def single(results: Run, loss: str, name: str) -> np.ndarray:
    """The allocation of each parameter of a tensor over training, ([group, ]…)."""
    values: np.ndarray = results[loss].allocation[name].sum("step").values.astype(float)
    return values


def close(one: object, other: object) -> None:
    np.testing.assert_allclose(np.asarray(one, float), np.asarray(other, float), atol=2e-6)


@pytest.mark.parametrize("loss", ["train", "groups"])
def test_components_are_sums_of_their_parameters(replayed: Run, loss: str) -> None:
    found = findings.blocks(replayed[loss])
    parameters = dict(Model().named_parameters())
    inside = [name for name in parameters if name.startswith("h.")]
    for depth in range(BLOCKS):
        for component in found["name"].values:
            own = [
                name
                for name in inside
                if name.startswith(f"h.{depth}.")
                and name.split(".", 2)[2].rpartition(".")[0] == component
            ]
            cell = found["total"].sel(component=f"h.*.{component}", depth=depth)
            if component == "norm buffer":
                own = [f"h.{depth}.norm.running_mean", f"h.{depth}.norm.running_var"]
            if component == "extra":
                own = ["h.1.extra"] if depth else []
            if not own:
                assert np.isnan(cell.values).all()
                continue
            sums = [single(replayed, loss, name) for name in own]
            axes = 1 if loss == "groups" else 0
            close(cell, sum(each.reshape(*each.shape[:axes], -1).sum(-1) for each in sums))
            count = found["parameters"].sel(component=f"h.*.{component}", depth=depth)
            assert int(count) == sum(each[(0,) * axes].size for each in sums)
    assert set(found["outside_layer"].values) == {"embed", "ln_f", "head"}
    assert found["stack"].values.tolist() == ["h"] * found.sizes["component"]


@pytest.mark.parametrize("loss", ["train", "groups"])
def test_blocks_and_what_is_outside_add_up_to_all_tensors(replayed: Run, loss: str) -> None:
    found = findings.blocks(replayed[loss])
    whole = replayed[loss].tensors["allocated"].sum(["step", "tensor"])
    close(found["total"].sum(["component", "depth"]) + found["outside"].sum("outside_layer"), whole)


def test_heads_are_equal_shares_of_the_rows_of_each_role(replayed: Run) -> None:
    found = findings.blocks(replayed["train"], heads=HEADS)
    per = WIDTH // HEADS
    for depth in range(BLOCKS):
        for role, which in (("query", 0), ("key", 1), ("value", 2)):
            for head in range(HEADS):
                rows = slice(which * WIDTH + head * per, which * WIDTH + (head + 1) * per)
                kernel = single(replayed, "train", f"h.{depth}.attn.c_attn.weight")[:, rows]
                bias = single(replayed, "train", f"h.{depth}.attn.c_attn.bias")[rows]
                cell = found["head_total"].sel(depth=depth, head=head)
                close(cell.sel(projection=f"h.*.attn.{role}"), kernel.sum() + bias.sum())
                kernel = single(replayed, "train", f"h.{depth}.self_attn.in_proj_weight")[rows]
                bias = single(replayed, "train", f"h.{depth}.self_attn.in_proj_bias")[rows]
                close(cell.sel(projection=f"h.*.self_attn.{role}"), kernel.sum() + bias.sum())
                own = slice(head * per, (head + 1) * per)
                if role == "value":
                    kernel = single(replayed, "train", f"h.{depth}.cross.v_proj.weight")[own]
                    close(cell.sel(projection="h.*.cross.value"), kernel.sum())
    # one tensor of fewer rows, as where heads share keys, and one that is no square
    assert "h.*.cross.key" not in found["projection"].values
    assert not any("shared" in name for name in found["projection"].values)
    says(
        found.attrs["left_out"],
        "8 tensors that project to queries, keys or values, such as h.0.cross.k_proj.weight, do not "
        "have equal rows for 3 heads",
    )


def test_heads_of_groups_add_up_to_heads(replayed: Run) -> None:
    of_groups = findings.blocks(replayed["groups"], heads=HEADS)["head_total"]
    weights = np.array(replayed["groups"].record.counts, float)
    mean = (of_groups * xr.DataArray(weights / weights.sum(), dims="group")).sum("group")
    close(mean, findings.blocks(replayed["train"], heads=HEADS)["head_total"])


@pytest.mark.parametrize(
    ("heads", "words"), [(5, r"no projection has rows for 5 heads"), (0, "at least one head")]
)
def test_numbers_of_heads_that_cannot_be_are_refused(replayed: Run, heads: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        findings.blocks(replayed["train"], heads=heads)


def test_heads_need_units(tmp_path: Path, replayed: Run) -> None:
    sums = run(
        replayed.manifest.root, task(), cluster="inline", keep="tensors", out=tmp_path / "t.lca"
    )
    with pytest.raises(LCAError, match="need --keep units"):
        findings.blocks(sums["train"], heads=HEADS)
    xr.testing.assert_allclose(
        findings.blocks(sums["train"])["total"],
        findings.blocks(replayed["train"])["total"],
        atol=1e-6,
    )


NAMES = {
    "gpt-2": (["wte.w", "h.0.mlp.w", "h.1.mlp.w", "h.1.mlp.b"], {1: "h|0|mlp.w", 3: "h|1|mlp.b"}),
    "experts are components": (
        ["l.0.experts.0.w", "l.0.experts.1.w", "l.1.experts.0.w", "l.1.experts.1.w"],
        {0: "l|0|experts.0.w", 1: "l|0|experts.1.w", 2: "l|1|experts.0.w", 3: "l|1|experts.1.w"},
    ),
    "a part that one block alone has": (
        ["s.0.c.w", "s.0.down.0.w", "s.0.down.1.w", "s.1.c.w"],
        {0: "s|0|c.w", 1: "s|0|down.0.w", 2: "s|0|down.1.w", 3: "s|1|c.w"},
    ),
    "inside a sequence": (
        ["0.w", "1.0.a.w", "1.1.a.w", "2.w"],
        {0: "|0|w", 1: "1|0|a.w", 2: "1|1|a.w", 3: "|2|w"},
    ),
    "encoder and decoder": (
        ["e.l.0.w", "e.l.1.w", "d.l.0.w", "d.l.1.w"],
        {0: "e.l|0|w", 1: "e.l|1|w", 2: "d.l|0|w", 3: "d.l|1|w"},
    ),
    "nothing repeats": (["fc1.w", "fc2.w", "x.0.w", "y.0.w", "5", "a.²"], {}),
    "numbers that are too long": ([f"a.{'9' * 5000}.w", f"a.{'8' * 5000}.w"], {}),
}


@pytest.mark.parametrize("case", NAMES)
def test_blocks_are_told_from_names(case: str) -> None:
    names, expected = NAMES[case]
    places = {
        names.index(name): f"{place.stack}|{place.depth}|{place.rest}"
        for name, place in block_of(names).items()
    }
    if case == "gpt-2":
        expected = expected | {2: "h|1|mlp.w"}
    assert places == expected


def test_the_figure_and_the_page_have_the_table(replayed: Run, tmp_path: Path) -> None:
    found = findings.blocks(replayed["train"], heads=HEADS)
    figure = plots.blocks(found)
    picture = figure.axes[0].collections[0].get_array()
    np.testing.assert_array_equal(picture.filled(np.nan), found["total"].values)
    text = write_report([replayed], tmp_path / "page.html").read_text()
    assert '<section id="blocks"' in text
    path = tmp_path / "x.png"
    asked = ("--heads", HEADS, "--loss", "groups", "--group", 1, "-o", path)
    result = lca("plot", replayed.path, "blocks", *asked)
    assert result.exit_code == 0, result.output
    assert path.stat().st_size > 10_000


def test_a_model_without_blocks_has_none_and_no_section(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(5, 4))
    with Recorder(tmp_path / "ck", model) as recorder:
        for step in range(3):
            recorder.save(step)
            with torch.no_grad():
                model.fc.weight[0] += 0.1
    opened = run(
        tmp_path / "ck",
        Task(lambda: model, {"train": data()}, {"train": Loss(F.cross_entropy)}),
        cluster="inline",
    )
    found = findings.blocks(opened["train"])
    assert (found.sizes["component"], found.sizes["outside_layer"]) == (0, 1)
    assert "no blocks" in found.attrs["left_out"]
    assert 'id="blocks"' not in write_report([opened], tmp_path / "page.html").read_text()
