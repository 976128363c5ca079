"""R10: names of tensors and losses as hostile as text gets."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import lca_posthoc
from lca_posthoc import Loss, Recorder, Task, open_run
from tests.helpers.cli import UNSAFE_NAMES, lca, steering

from . import fault

FIXED = (
    *(
        "a/b",
        "a\\b",
        "..",
        ".",
        "../../etc/x",
        "/etc/passwd",
        "zarr.json",
        "c",
        "steps",
        "%2F",
        "~",
        "-rf",
        "nul",
        " ",
    ),
    *(
        "<script>alert(1)</script>",
        "</script><img onerror=x>",
        "&amp;",
        "$\\frac{$",
        "_hidden",
        "[red]x[/red]",
        "{0}",
    ),
    *UNSAFE_NAMES,
    *("\r\n", "​", "é", "é", "ß", "SS"),
    *("A", "a", "İ", "i̇", "x" * 10_000, "y" * 300 + "A", "y" * 300 + "a", "😀" * 80),
)
ALPHABET = "abAB01./\\%~-_ <>&$#{}[]'\"\x00\x01\x1b\n\u202eéß😀"


def hostile(count: int) -> list[str]:
    """Distinct names, the worst first."""
    chance, names = random.Random(10), dict.fromkeys(FIXED)
    while len(names) < count:
        names["".join(chance.choices(ALPHABET, k=chance.randint(1, 40)))] = None
    return list(names)[:count]


@fault(
    "R10",
    "names of tensors and of a loss: traversal, control characters, mark-up, length, case",
    ci=80,
    full=1000,
)
def name_tensors(count: int, place: Path) -> str:
    names = hostile(count)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in names:
                self._parameters[name] = torch.nn.Parameter(torch.full((2,), 0.1))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs @ torch.stack([*self._parameters.values()]).sum(0)

    generator = torch.Generator().manual_seed(0)
    data = torch.randn(7, 2, generator=generator), torch.randn(7, generator=generator)
    model = Model()
    (place / "inside").mkdir()
    with Recorder(place / "inside" / "ck", model) as recorder:
        for step in range(3):
            recorder.save(step)
            with torch.no_grad():
                for at, parameter in enumerate(model.parameters()):
                    parameter.add_(1e-3 * (at + 1) / count)
    losses: Any = {name: Loss(F.mse_loss) for name in ("../../loss\x1b[31m", "<b>$loss")}
    out = place / "inside" / "run.lca"
    lca_posthoc.run(
        place / "inside" / "ck",
        Task(Model, {"train": data}, losses),
        losses=["all"],
        out=out,
        cluster="inline",
    )
    run = open_run(out)
    assert list(run) == list(losses)
    for results in run.values():
        allocation = results.allocation.load()
        assert list(allocation) == names
        moved = {name: float(allocation[name].sum()) for name in names}
        assert all(moved.values())
        assert abs(sum(moved.values()) - float(results.tensors.allocated.sum())) < 1e-6
    assert [path.name for path in place.iterdir()] == ["inside"]
    assert sorted(path.name for path in (place / "inside").iterdir()) == ["ck", "run.lca"]
    for command in (("summary", out), ("status", out), ("verify", out)):
        result = lca(*command)
        assert result.exit_code == 0, result.output
        assert steering(result.output) <= {"\n"}
    return (
        f"{count} names of tensors: all came back, nothing outside the run, nothing steers a "
        "terminal"
    )
