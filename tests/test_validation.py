"""The scripts of the validation: on a loss of which everything is known in closed form, and at a
tiny size on the networks themselves.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import lca_posthoc as lca
from tests.test_examples import EXAMPLES, command, needs

SCRIPTS = EXAMPLES / "validation"
MODULES = tuple(path.stem for path in SCRIPTS.glob("*.py"))
RATE, MOMENTUM = 0.1, 0.5
STEPS, EXAMPLES_OF_BOWL, BATCH, MEASURED = 8, 12, 4, 9
AGAIN = "done with other batches"


class Bowl(nn.Module):
    """Two layers that nothing connects."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4, bias=False), nn.Linear(2, 3, bias=False)


def bowl_values(model: Bowl, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A loss that is a sum over parameters: what one of them does depends on no other."""
    values = (model.left.weight - batch["images"][:, None, :3]).square().sum((1, 2)) / 2
    values = values + (model.right.weight - batch["images"][:, None, 3:]).square().sum((1, 2))
    return values, torch.ones_like(values)


def bowl_examples() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    kinds = torch.arange(EXAMPLES_OF_BOWL) % 2
    return {
        "images": torch.randn(EXAMPLES_OF_BOWL, 5, generator=draw) + kinds[:, None],
        "kind": kinds,
    }


def rise_of_bowl(changed: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> float:
    """How much higher the loss over the measured examples is at changed weights, in closed form."""
    images = bowl_examples()["images"][:MEASURED].double().numpy()
    targets = {"left.weight": images[:, None, :3], "right.weight": images[:, None, 3:]}
    scale = {"left.weight": 0.5, "right.weight": 1.0}
    return sum(
        scale[name]
        * float(np.mean(((changed[name] - aim) ** 2 - (weights[name] - aim) ** 2).sum((1, 2))))
        for name, aim in targets.items()
    )


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script of the validation; they import each other."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def bowl(scripts: Callable[[str], ModuleType]) -> Any:
    networks = scripts("networks")
    return networks.Network(
        build=Bowl,
        examples=bowl_examples,
        values=bowl_values,
        optimizer=partial(torch.optim.SGD, lr=RATE, momentum=MOMENTUM),
        size=networks.Size(STEPS, EXAMPLES_OF_BOWL, BATCH, MEASURED),
    )


def points(place: Path) -> list[dict[str, np.ndarray]]:
    """The iterates of the bowl with seed 0, as the recorder wrote them."""
    from safetensors.numpy import load_file

    files = sorted((place / "trainings" / "bowl" / "seed0").glob("*.safetensors"))
    assert len(files) == STEPS + 1
    return [
        {name: value.astype("float64") for name, value in load_file(file).items()} for file in files
    ]


def orders(seed: int) -> list[Tensor]:
    """The batches of the bowl with a seed: it decides the initial weights, and then the order."""
    torch.manual_seed(seed)
    Bowl()
    epochs = -(-STEPS * BATCH // EXAMPLES_OF_BOWL)
    return [rows for _ in range(epochs) for rows in torch.randperm(EXAMPLES_OF_BOWL).split(BATCH)][
        :STEPS
    ]


def trained(
    rates: dict[str, Callable[[int], float]],
    without: frozenset[int] = frozenset(),
    batches: list[Tensor] | None = None,
) -> dict[str, np.ndarray]:
    """The bowl's weights after a training written anew: SGD with momentum by hand."""
    torch.manual_seed(0)
    weights = {name: value.detach().double() for name, value in Bowl().named_parameters()}
    images = bowl_examples()["images"].double()
    buffers = {name: torch.zeros_like(value) for name, value in weights.items()}
    for step, rows in enumerate(batches or orders(0)):
        if step not in without:
            means = images[rows].mean(0)
            gradients = {
                "left.weight": weights["left.weight"] - means[:3],
                "right.weight": 2 * (weights["right.weight"] - means[3:]),
            }
            for name, gradient in gradients.items():
                buffers[name] = MOMENTUM * buffers[name] + gradient
                weights[name] = weights[name] - rates[name](step) * buffers[name]
    return {name: value.numpy() for name, value in weights.items()}


def steadily(step: int) -> float:
    return RATE


EVERYWHERE = {"left.weight": steadily, "right.weight": steadily}


def result(scripts: Any, place: Path, experiment: str, network: Any, measure: Any) -> Any:
    file = scripts("seeds").done(place, experiment, "bowl", network, 0, measure)
    assert file == place / experiment / "bowl" / "seed0.json"
    return json.loads(file.read_text())


# --- on the bowl ----------------------------------------------------------------------------------


def test_where_no_parameter_meets_another_undoing_is_exactly_what_was_allocated(
    scripts: Any, bowl: Any, tmp_path: Path
) -> None:
    told = result(scripts, tmp_path, "undo", bowl, scripts("undo").undo)
    assert len(told["comparisons"]) == 6 * 4  # stretches × (layers, units) × (undone, and alone)
    path = points(tmp_path)
    for row in told["comparisons"]:
        start, end = map(int, row["condition"].removeprefix("steps ").split(" to "))
        if row["items"] == ["left", "right"]:
            for layer, came in zip(row["items"], row["actual"], strict=True):
                back = {**path[end], f"{layer}.weight": path[start][f"{layer}.weight"]}
                assert came == pytest.approx(rise_of_bowl(back, path[end]), rel=1e-4, abs=1e-6)
        assert row["predicted"]["LCA"] == pytest.approx(row["actual"], rel=1e-4, abs=2e-6)
        assert row["predicted"]["integrated gradients"] == pytest.approx(
            row["actual"], rel=1e-4, abs=2e-6
        )
        for wrong in ("first-order LCA", "gradient at the end", "Fisher"):
            assert row["predicted"][wrong] != pytest.approx(row["actual"], rel=1e-2, abs=1e-5)


def test_predictors_are_what_they_say(scripts: Any, bowl: Any, tmp_path: Path) -> None:
    measures = scripts("measures")
    training = measures.recorded_training(tmp_path, "bowl", bowl, 0)
    predicted = measures.rise_if_undone(training, 2, 5)
    path, images = points(tmp_path), bowl_examples()["images"][:MEASURED].double().numpy()
    motion = path[5]["left.weight"] - path[2]["left.weight"]
    single = path[5]["left.weight"] - images[:, None, :3]  # the gradient of each example's loss
    expected = {
        "motion": np.abs(motion),
        "Fisher": (single**2).mean(0) * motion**2 / 2,
        "gradient at the end": -single.mean(0) * motion,
        "first-order LCA": -sum(
            (path[step]["left.weight"] - images.mean(0)[:3])
            * (path[step + 1]["left.weight"] - path[step]["left.weight"])
            for step in range(2, 5)
        ),
    }
    for name, values in expected.items():
        assert predicted[name]["left.weight"].numpy() == pytest.approx(values, rel=1e-3, abs=1e-6)


def test_a_frozen_layer_does_not_move_and_a_doubled_rate_is_one_of_the_optimizer(
    scripts: Any, bowl: Any, tmp_path: Path
) -> None:
    told = result(scripts, tmp_path, "freeze", bowl, scripts("freeze").freeze)
    middle = STEPS // 2
    others = orders(0)[:middle] + orders(scripts("networks").OTHER)[middle:]
    rows = {row["question"]: row for row in told["comparisons"]}

    def rise(layer: str, factor: int, batches: list[Tensor] | None) -> float:
        late = {f"{layer}.weight": lambda step: RATE * (factor if step >= middle else 1)}
        changed = trained({**EVERYWHERE, **late}, batches=batches)
        return rise_of_bowl(changed, trained(EVERYWHERE, batches=batches))

    for action, factor in (("freeze a layer", 0), ("double a layer's rate", 2)):
        row = rows[f"{action}, hindsight"]
        for batches, came in ((None, row["actual"]), (others, row["predicted"][AGAIN])):
            expected = [rise(layer, factor, batches) for layer in ("left", "right")]
            assert came == pytest.approx(expected, rel=1e-3, abs=2e-6)
        assert rows[f"{action}, foresight"]["actual"] == row["actual"]
    # what a layer did after the middle is what is missing where it was frozen there
    frozen = rows["freeze a layer, hindsight"]
    assert frozen["predicted"]["LCA"] == pytest.approx(frozen["actual"], rel=1e-3, abs=2e-6)


def test_frozen_units_stay_and_others_move_as_they_did(
    scripts: Any, bowl: Any, tmp_path: Path
) -> None:
    networks, measures = scripts("networks"), scripts("measures")
    training = measures.recorded_training(tmp_path, "bowl", bowl, 0)
    initial, last = training.points[0], training.points[-1]
    parts = {part.name: part for part in measures.units(training.replay, last)}
    chosen = [parts["left[1]"], parts["left[3]"], parts["right[0]"]]
    factors = measures.joined(chosen, last)
    weights = networks.Training(bowl, 0).run(STEPS, factors).weights()
    for name, still in (("left.weight", [1, 3]), ("right.weight", [0])):
        moving = [row for row in range(len(last[name])) if row not in still]
        assert torch.equal(weights[name][still], initial[name][still])
        assert torch.equal(weights[name][moving], last[name][moving])


def test_choices_of_layers_are_those_of_candidates(scripts: Any, bowl: Any, tmp_path: Path) -> None:
    told = result(scripts, tmp_path, "freeze", bowl, scripts("freeze").freeze)
    came = {(row["question"], row["chosen_by"]): row["rise"] for row in told["choices"]}
    late = lca.open_run(tmp_path / "trainings" / "bowl" / "seed0-late.lca")["train"]
    assert late.steps["step"].values.tolist() == list(range(STEPS // 2, STEPS))
    ordered = lca.findings.candidates(late)["layer"].values.tolist()
    for action, named in (("freeze a layer", ordered[0]), ("double a layer's rate", ordered[-1])):
        row = next(row for row in told["comparisons"] if row["question"] == f"{action}, hindsight")
        assert came[action, "candidates"] == row["actual"][row["items"].index(named)]
        assert came[action, "random"] == pytest.approx(np.mean(row["actual"]))
        assert came[action, "the best there is"] == min(row["actual"])


def test_a_step_that_is_left_out_is_a_training_without_it(
    scripts: Any, bowl: Any, tmp_path: Path
) -> None:
    told = result(scripts, tmp_path, "batches", bowl, scripts("batches").drop)
    (row,) = told["comparisons"]
    kind = int(row["condition"].removeprefix("kind "))
    images = bowl_examples()["images"][:MEASURED][
        bowl_examples()["kind"][:MEASURED] == kind
    ].double()

    def loss(weights: dict[str, np.ndarray]) -> float:
        model = Bowl().double()
        model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
        return float(bowl_values(model, {"images": images})[0].mean())

    assert told["loss_end"] == pytest.approx(loss(trained(EVERYWHERE)), rel=1e-5)
    unchanged = loss(trained(EVERYWHERE))
    assert row["items"] == [f"step {step}" for step in range(STEPS)]
    for step, came in enumerate(row["actual"]):
        without = loss(trained(EVERYWHERE, frozenset({step})))
        assert came == pytest.approx(without - unchanged, rel=1e-3, abs=2e-6)
    path = points(tmp_path)
    falls = [loss(path[step]) - loss(path[step + 1]) for step in range(STEPS)]
    assert row["predicted"]["LCA"] == pytest.approx(falls, rel=1e-3, abs=2e-6)
    came_of = {row["chosen_by"]: row["rise"] for row in told["choices"]}
    assert came_of["LCA"] == row["actual"][int(np.argmin(row["predicted"]["LCA"]))]


def test_a_pruned_network_has_the_loss_it_has(
    scripts: Any, bowl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune = scripts("prune")
    monkeypatch.setattr(prune, "SHARES", (0.25,))
    told = result(scripts, tmp_path, "prune", bowl, prune.prune)
    path = points(tmp_path)
    weights, names = path[-1], ("left.weight", "right.weight")
    came = {(row["question"], row["chosen_by"]): row["rise"] for row in told["choices"]}
    for where, others in (
        ("zero", {name: 0 * weights[name] for name in names}),
        ("initial values", path[0]),
    ):
        scores = {
            "magnitude": {name: np.abs(weights[name]) for name in names},
            "motion": {name: np.abs(weights[name] - path[0][name]) for name in names},
        }
        for way, values in scores.items():
            least = np.sort(np.concatenate([values[name].ravel() for name in names]))[: 18 // 4]
            changed = {
                name: np.where(values[name] <= least[-1], others[name], weights[name])
                for name in names
            }
            rise = rise_of_bowl(changed, weights)
            assert came[f"25 % to {where}", way] == pytest.approx(rise, rel=1e-3, abs=2e-6)
    units = next(row for row in told["comparisons"] if row["question"] == "a unit to zero")
    assert sorted(units["items"]) == [f"left[{i}]" for i in range(4)] + [
        f"right[{i}]" for i in range(3)
    ]
    for item, rise in zip(units["items"], units["actual"], strict=True):
        layer, number = item[:-1].split("[")
        changed = {name: value.copy() for name, value in weights.items()}
        changed[f"{layer}.weight"][int(number)] = 0
        assert rise == pytest.approx(rise_of_bowl(changed, weights), rel=1e-3, abs=2e-6)


def test_a_finished_seed_is_kept_and_results_of_another_size_are_refused(
    scripts: Any, bowl: Any, tmp_path: Path
) -> None:
    seeds = scripts("seeds")
    asked: list[int] = []

    def measure(place: Path, name: str, network: Any, seed: int) -> Any:
        asked.append(seed)
        return seeds.Outcome(2.0, 1.0)

    for seed in (0, 1, 0, 1, 2):
        seeds.done(tmp_path, "undo", "bowl", bowl, seed, measure)
    assert asked == [0, 1, 2]
    longer = replace(bowl, size=replace(bowl.size, steps=STEPS + 1))
    with pytest.raises(RuntimeError, match="Name another PLACE"):
        seeds.done(tmp_path, "undo", "bowl", longer, 0, measure)
    assert asked == [0, 1, 2]


# --- tables ---------------------------------------------------------------------------------------


def stored(seed: int, way: float) -> dict[str, Any]:
    """A result of eight items: what came of them, and two predictors."""
    draw = np.random.default_rng(seed)
    came = draw.normal(size=8)
    said = {"LCA": came + draw.normal(size=8), "Fisher": draw.normal(size=8)}
    return {
        "size": {"steps": 4, "examples": 1200, "batch": 10, "measured": 100},
        "seconds": 9.0,
        "processor_seconds": 4.0,
        "loss_start": 2.0,
        "loss_end": 1.0 + seed,
        "comparisons": [
            {
                "question": "a layer over a third, undone",
                "condition": "",
                "items": list("abcdefgh"),
                "actual": came.tolist(),
                "predicted": {name: values.tolist() for name, values in said.items()},
            }
        ],
        "choices": [
            {"question": "1 % to zero", "chosen_by": name, "rise": rise}
            for name, rise in {"magnitude": way, "random": way + 1, "motion": 1.5}.items()
        ],
    }


def test_tables_say_what_result_files_hold(scripts: Any, tmp_path: Path) -> None:
    results = [stored(0, 0.25), stored(1, 0.75)]
    for experiment in ("undo", "prune"):
        folder = tmp_path / experiment / "lenet"
        folder.mkdir(parents=True)
        for seed, values in enumerate(results):
            (folder / f"seed{seed}.json").write_text(json.dumps(values))
    scripts("report").report(tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / "measurements" / "validation-tables.md").read_text()
    (rows,) = {
        part.partition("\n\n")[2].strip()
        for part in text.split("### ")
        if part.startswith("A layer over a third, undone")
    }
    correlation: dict[str, list[float]] = {}
    for values in results:
        (row,) = values["comparisons"]
        for name, said in row["predicted"].items():
            rank = stats.pearsonr(stats.rankdata(said), stats.rankdata(row["actual"])).statistic
            correlation.setdefault(name, []).append(float(rank))
    for name, (one, other) in correlation.items():
        low, high = sorted((one, other))  # of two seeds, a quarter of the draws is one twice
        cell = f"{(one + other) / 2:.2f} ({low:.2f} to {high:.2f})".replace("-", "−")
        assert f"| {name} | {cell}" in rows
    gains = [
        own - other for own, other in zip(correlation["Fisher"], correlation["LCA"], strict=True)
    ]
    assert max(gains) < 0  # so the mark is due
    assert rows.count(" ▼ |") == 1
    came, said = (
        np.concatenate([np.array(pick(values["comparisons"][0])) for values in results])
        for pick in (lambda row: row["actual"], lambda row: row["predicted"]["LCA"])
    )
    assert f"| LCA | {said @ came / (said @ said):.2f} (" in rows.partition("| slope")[2]
    half = stats.t.ppf(0.975, 1) * 0.25
    assert (
        f"| magnitude | +0.5 ± {half:.1g} ▼ (2/2) |" in text
    )  # below random by 1 with either seed
    assert f"| random | +1.5 ± {half:.1g} |" in text
    assert "| motion | +1.5 ± 0 (1/2) |" in text  # below with one seed, above with the other
    assert "| undo | LeNet | 2 | 4, 10 of 1,200; 100 | 2.00 → 1.50 | 4 s | 9 s |" in text
    pictures = {
        path.name: path.stat().st_size for path in (tmp_path / "out" / "images").glob("*.png")
    }
    assert set(pictures) == {
        "validation_correlations.png",
        "validation_undo.png",
        "validation_prune.png",
    }
    assert min(pictures.values()) > 5_000


def test_intervals_are_those_of_drawing_seeds(scripts: Any) -> None:
    agreement = scripts("agreement")
    every = [
        (tops[a] + tops[b] + tops[c]) / (bottoms[a] + bottoms[b] + bottoms[c])
        for tops, bottoms in [((1.0, 5.0, 3.0), (2.0, 2.0, 1.0))]
        for a in range(3)
        for b in range(3)
        for c in range(3)
    ]
    estimate = agreement.ratio_over_seeds([1.0, 5.0, 3.0], [2.0, 2.0, 1.0])
    assert estimate.value == 9 / 5
    assert (estimate.low, estimate.high) == (min(every), max(every))  # each 1 draw in 27


def test_a_rank_correlation_of_ties_and_of_nothing(scripts: Any) -> None:
    rank_correlation = scripts("agreement").rank_correlation
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0
    assert np.isnan(rank_correlation([1, 2, 3], [0, 0, 0]))
    assert rank_correlation([3, 2, 1], [1, 2, 3]) == pytest.approx(-1)


# --- on the networks ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experiment", "network"),
    [
        pytest.param("undo", "resnet8", marks=needs("cifar10.safetensors")),
        pytest.param("freeze", "transformer", marks=needs("tinyshakespeare.txt")),
        pytest.param("prune", "lenet", marks=needs("mnist.safetensors")),
        pytest.param("batches", "mnist_fc", marks=needs("mnist.safetensors")),
    ],
)
def test_a_command_does_an_experiment_once_and_its_loss_is_that_of_the_replay(
    tmp_path: Path, experiment: str, network: str
) -> None:
    small = ("--steps", 3, "--examples", 16)
    run = (SCRIPTS / f"{experiment}.py", tmp_path, "--network", network, "--seeds", "0:1", *small)
    file = Path(command(*run).strip())
    assert file == tmp_path / experiment / network / "seed0.json"
    told = file.read_bytes()
    values = json.loads(told)
    (kind_or_all,) = [
        path
        for path in (tmp_path / "trainings" / network).glob("seed0-*.lca")
        if path.stem.startswith("seed0-kind" if experiment == "batches" else "seed0-simpson")
    ]
    losses = lca.open_run(kind_or_all)["train"].steps
    assert values["loss_start"] == pytest.approx(float(losses["loss_start"][0]), rel=1e-5)
    assert values["loss_end"] == pytest.approx(float(losses["loss_end"][-1]), rel=1e-5)
    for row in values["comparisons"]:
        assert all(len(said) == len(row["items"]) for said in row["predicted"].values())
        assert np.isfinite([row["actual"], *row["predicted"].values()]).all()
    command(*run)
    assert file.read_bytes() == told  # not done again: its times are as they were
    command(SCRIPTS / "report.py", tmp_path, tmp_path / "out")
    assert (
        f"| {experiment} | "
        in (tmp_path / "out" / "measurements" / "validation-tables.md").read_text()
    )
