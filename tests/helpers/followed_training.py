"""A training that can be killed, and that a replay follows: it goes on where it stopped, to the same
bits. Run as a script: `followed_training.py PLACE STEPS AT_MOST [DIRECTORY]`, where AT_MOST may
be `none`.

After every file it writes it looks at what its directory holds, and says in `PLACE/above` where that
is above the bound.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from lca_posthoc import Recorder
from lca_posthoc.checkpoints.recorded import read_release
from lca_posthoc.recording.writer import Writer
from tests.helpers.cli import task_namespace


def waiting(directory: Path) -> list[Path]:
    """The files of iterates that no replay keeps for good, unfinished ones among them."""
    release = read_release(directory)
    kept = []
    for path in [*directory.glob("*step_*"), *directory.glob("moments/*step_*")]:
        step = int(path.name.partition("step_")[2][:8])
        if release is None or not (step < release.before and release.keeps(step)):
            kept.append(path)
    return kept


def size_of(paths: Sequence[Path]) -> int:
    """The bytes of files, of which a replay may remove some meanwhile."""
    size = 0
    for path in paths:
        try:
            size += path.stat().st_size
        except FileNotFoundError:
            continue
    return size


def _say_above(directory: Path, at_most: int | str | None, place: Path) -> None:
    files = waiting(directory)
    iterates = [path for path in files if path.parent == directory]
    above = (
        len(iterates) > at_most
        if isinstance(at_most, int)
        else at_most is not None and size_of(files) > 1000 * int(at_most.removesuffix("kB"))
    )
    if above:
        with (place / "above").open("a") as file:
            file.write(f"{len(iterates)} iterates, {size_of(files)} bytes\n")


def train(
    place: Path,
    steps: int,
    at_most: int | str | None = None,
    directory: str = "checkpoints",
    **options: Any,
) -> None:
    """Train for some steps in all, from where an earlier call got to; record every iterate.

    Args:
        place: where the training keeps its own state, in which every recorded step is flushed.
        steps: in all.
        at_most: of the recorder, as `options`.
        directory: of the iterates, in `place` or anywhere.
    """
    names = task_namespace()
    torch.manual_seed(3)
    model, (inputs, targets) = names["Net"](), names["train"]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    state, first = place / f"{Path(directory).name}.pt", 0
    if state.exists():
        stored = torch.load(state)
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        first = stored["step"]
    put = Writer._put

    def put_and_look(writer: Writer, files: Any) -> None:
        put(writer, files)
        _say_above(place / directory, at_most, place)

    with (
        mock.patch.object(Writer, "_put", put_and_look),
        Recorder(place / directory, model, at_most=at_most, **options) as recorder,
    ):
        recorder.attach(optimizer, step=first, save="moments")
        for step in range(first + 1, steps + 1):
            batch = torch.randint(len(inputs), (8,), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
            if step % 5 == 0:
                recorder.flush()
                unfinished = state.with_suffix(".tmp")
                torch.save(
                    {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "step": step,
                    },
                    unfinished,
                )
                unfinished.replace(state)


if __name__ == "__main__":
    bound: int | str | None = sys.argv[3]
    if sys.argv[3].isdigit():
        bound = int(sys.argv[3])
    elif sys.argv[3] == "none":
        bound = None
    train(Path(sys.argv[1]), int(sys.argv[2]), bound, *sys.argv[4:])
