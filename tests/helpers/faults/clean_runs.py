"""What faults are injected into: a tiny training, its clean run, and what the definition says of it
in float64.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import lca_posthoc
from lca_posthoc import Recorder, open_run
from lca_posthoc.results import disk
from lca_posthoc.results.commits import Commits
from lca_posthoc.results.packs import Pack, read_chunk
from tests.helpers.cli import contents, task_namespace, write_task
from tests.helpers.oracle import RULES, Oracle

PLAIN = 'Loss(F.cross_entropy, on="validation")'
PER_EXAMPLE = 'Loss(F.cross_entropy, on="validation", per="example")'
SPAN = 2  # segments: many spans of little work
SCRIPT = f"""
from lca_posthoc.replay import prepare
from lca_posthoc.cli import main

if __name__ == "__main__":
    prepare.choose_span = lambda *_: {SPAN}
    main()
"""


def lay_out(place: Path, segments: int = 40) -> Path:
    """A directory `checkpoints` and a file `small_task.py` in `place`."""
    made = task_namespace()
    torch.manual_seed(3)
    model, (inputs, targets) = made["Net"](), made["train"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    with Recorder(place / "checkpoints", model) as recorder:
        for step in range(segments + 1):
            recorder.save(step)
            batch = torch.randint(len(inputs), (8,))
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
    write_small_task(place)
    return place


def write_small_task(place: Path, old: str = "", new: str = "") -> Path:
    """The task file, whose last loss is kept per example too, with `old` replaced by `new`."""
    path = write_task(place / "small_task.py", PLAIN, PER_EXAMPLE)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new) if old else text)
    return path


def clean_run(place: Path, out: Path, **options: Any) -> Path:
    """An undisturbed run of every loss, whose numbers are those of the definition."""
    options = {
        "losses": ["all"],
        "cluster": "inline",
        "span": SPAN,
        "tolerance": math.inf,
        **options,
    }
    lca_posthoc.run(place / "checkpoints", place / "small_task.py", out=out, **options)
    near_the_oracle(place, out)
    return out


def near_the_oracle(place: Path, out: Path) -> None:
    """Σ|A − A*| of every tensor is within 1e-5 of Σ|A*|, with A* from the float64 oracle; where
    allocations are not kept, that of their sums is.
    """
    made, run = task_namespace(), open_run(out)
    points = [
        load_file(place / "checkpoints" / f"step_{checkpoint.step:08d}.safetensors")
        for checkpoint in run.manifest.checkpoints
    ]
    for name in run:
        truth = Oracle(made["Net"], made[name], made["cross_entropy"]).allocate(
            points, *RULES["simpson"]
        )
        for tensor, exact in truth.stacked().items():
            rows = run[name].tensors["allocated"]
            sums = rows.isel(tensor=list(rows["tensor"].values).index(tensor)).values
            parts = [(torch.from_numpy(sums), exact.flatten(1).sum(1))]
            if run[name].holds("parameters"):
                parts.append((torch.from_numpy(run[name].allocation[tensor].values), exact))
            for ours, wanted in parts:
                far = float((ours.double() - wanted).abs().sum())
                assert far <= 1e-5 * float(exact.abs().sum())


def stored_chunks(out: Path) -> dict[str, bytes]:
    """The bytes of every chunk of a run that a marker speaks for, by its path, from packs or from
    files of their own.
    """
    run, found = open_run(out), dict[str, bytes]()
    for loss in run:
        commits = Commits(run.path, run.manifest, loss)
        markers = [commits.marker(span) for span in range(commits.manifest.spans)]
        if commits.manifest.window > 1:
            markers += map(commits.window_marker, range(commits.manifest.windows))
        for marker, size in zip(markers, disk.sizes(markers), strict=True):
            files = json.loads(disk.read(marker))["files"] if size else {}
            pack = Pack(commits.pack(marker), files.values())
            for path, seal in files.items():
                found[path] = read_chunk(run.path / path, seal, pack)
    return found


def same_bytes(out: Path, clean: Path) -> None:
    """Every stored array of a run, its metadata included where it has any, is that of the clean
    run.
    """
    if disk.is_object_store(out):
        assert stored_chunks(out) == stored_chunks(clean)
        return
    ours, theirs = contents(out / "data.zarr"), contents(clean / "data.zarr")
    different = sorted(
        name
        for name in ours.keys() | theirs.keys()
        if ours.get(name, b"-") != theirs.get(name, b"-")
    )
    assert different == [], different[:5]


def command(place: Path, out: Path, *options: object) -> list[str]:
    """`lca run` over every loss, never refined, as another process runs it."""
    script = place / "drive.py"
    script.write_text(SCRIPT)
    arguments = [
        "run",
        place / "checkpoints",
        "--task",
        place / "small_task.py",
        "--loss",
        "all",
        "--out",
        out,
    ]
    return [sys.executable, *map(str, (script, *arguments, "--tolerance", "inf", *options))]


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    """Start it in a session of its own, its output kept."""
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def finish(place: Path, out: Path, *options: object) -> str:
    """Run to the end and expect success; returns what was said."""
    process = start(command(place, out, "--cluster", "inline", *options))
    _, said = process.communicate()
    assert process.returncode == 0, said
    return said
