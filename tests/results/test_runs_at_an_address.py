"""`lca run --cluster ADDRESS` on standing workers: the same bytes, sources that travel, workers
that are turned away.
"""

from __future__ import annotations

import json
import math
import pickle
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lca_posthoc
from lca_posthoc.cluster import Done, assignments
from lca_posthoc.cluster.dask_client import DaskClient
from lca_posthoc.cluster.dask_workers import Workers
from lca_posthoc.replay.events import SpanDone
from tests.helpers.cli import TASK, document, lca, refused, says
from tests.helpers.dask_cluster import Standing, standing
from tests.helpers.faults import clean_runs

ROOT = str(Path(lca_posthoc.__file__).parents[1])
SEGMENTS, SPAN, SPANS = 12, 2, 6
HIDE = 'mount -t tmpfs none "$0" && exec "$@"'


def without_sight_of(place: Path, where: Path) -> list[str]:
    """What starts a process that sees an empty directory at `place`, with `where` as its working
    directory.
    """
    where.mkdir(parents=True, exist_ok=True)
    place.mkdir(parents=True, exist_ok=True)
    hide = ["unshare", "-m", "sh", "-c", HIDE, str(place)]
    tried = subprocess.run([*hide, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"cannot hide a directory from a process: {tried.stderr.strip()}")
    return ["env", "-C", str(where), *hide]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, and the undisturbed run of the plain task."""
    made = clean_runs.lay_out(tmp_path_factory.mktemp("place"), SEGMENTS)
    replay(made, made / "small_task.py", made / "clean.lca", "inline")
    return made


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for task files, which the workers do not see."""
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def pair(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    prefix = without_sight_of(tasks, elsewhere)
    with standing(tmp_path_factory.mktemp("pair"), PYTHONPATH=ROOT) as made:
        for name in ("one", "other"):
            made.hire("--name", name, prefix=prefix, PYTHONPATH=ROOT)
        yield made


def replay(place: Path, task: Any, out: Path, cluster: str, **options: Any) -> lca_posthoc.Run:
    options = {"losses": ["all"], "span": SPAN, "tolerance": math.inf, **options}
    if cluster != "inline":
        options.setdefault("workers", 2)
    return lca_posthoc.run(place / "checkpoints", task, out=out, cluster=cluster, **options)


def start_of(place: Path, out: Path, made: Standing, *options: object, workers: int = 2) -> Any:
    return lca(
        "run",
        place / "checkpoints",
        "--task",
        place / "small_task.py",
        "--out",
        out,
        *made.options,
        "--workers",
        workers,
        *options,
    )


# --- the run itself -------------------------------------------------------------------------------


def test_the_bytes_are_those_of_this_process_and_a_second_run_finishes_at_once(
    pair: Standing, place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.lca"
    for _ in range(2):
        result = start_of(place, out, pair, "--loss", "all", "--tolerance", "inf")
        assert result.exit_code == 0, result.output
        clean_runs.same_bytes(out, rerun_span(place, out))
    assert "nothing to do: every span is committed" in result.stderr


def rerun_span(place: Path, out: Path) -> Path:
    """The undisturbed run with the spans `out` was cut into."""
    span = lca_posthoc.open_run(out).manifest.span
    clean = place / f"clean-{span}.lca"
    if not clean.exists():
        replay(place, place / "small_task.py", clean, "inline", span=span)
    return clean


@pytest.mark.moment
def test_the_log_has_a_line_for_each_event_and_status_tells_while_it_runs_and_after(
    pair: Standing, place: Path, tmp_path: Path
) -> None:
    out, heard, seen = tmp_path / "out.lca", list[Any](), list[Any]()

    def listen(event: Any) -> None:
        heard.append(event)
        if sum(isinstance(each, SpanDone) for each in heard) == 2:
            seen.append(document(lca("status", out, "--json"))["losses"]["train"])

    replay(place, place / "small_task.py", out, pair.address, progress=listen)
    clean_runs.same_bytes(out, place / "clean.lca")
    log = [json.loads(line) for line in (out / "log" / "run.jsonl").read_text().splitlines()]
    assert [each["event"] for each in log] == [
        "Started",
        *(type(event).__name__ for event in heard),
        "Ended",
    ]
    assert sum(each["event"] == "SpanDone" for each in log) == SPANS
    assert all({"time", "event"} <= each.keys() for each in log)
    assert seen[0]["running"]
    assert not seen[0]["complete"]
    assert 2 <= seen[0]["spans_done"] <= SPANS
    after = document(lca("status", out, "--json"))["losses"]["train"]
    assert (after["spans_done"], after["complete"], after["running"]) == (SPANS, True, False)


def test_nothing_larger_than_a_table_of_steps_crosses_the_network_once_it_is_delivered(
    pair: Standing, place: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, returned = list[tuple[str, int]](), list[int]()
    submit, map_specs = DaskClient.submit, Workers.map

    def weighed(self: Any, function: str, spec: Any, address: str, *, on_gpu: bool) -> Any:
        sent.append((function, len(pickle.dumps(spec))))
        return submit(self, function, spec, address, on_gpu=on_gpu)

    def listened(self: Any, *arguments: Any) -> Iterator[Any]:
        for outcome in map_specs(self, *arguments):
            if isinstance(outcome, Done):
                returned.append(len(pickle.dumps(outcome.result)))
            yield outcome

    monkeypatch.setattr(DaskClient, "submit", weighed)
    monkeypatch.setattr(Workers, "map", listened)
    task = tasks / "large_task.py"  # its source alone is larger than what may cross
    task.write_text(f"{TASK}\n\nPADDING = {'x' * 100_000!r}\n")
    replay(place, task, tmp_path / "out.lca", pair.address)
    assert sum(function.endswith(":replay_span") for function, _ in sent) == SPANS
    assert max(size for _, size in sent) < 64_000, sent
    assert max(returned) < 64_000


# --- sources that travel --------------------------------------------------------------------------


def write(folder: Path, factor: float) -> Path:
    """A task whose loss is scaled by what several modules of its folder say."""
    sources = {
        "helpers.py": "from bare.inner import ONE\n\nFACTOR = {factor} * ONE\n",
        "bare/inner.py": "ONE = 1.0\n",
        "whole/__init__.py": "from .near import scale\n",
        "whole/near.py": "from .deeper.far import scaled\n\n\ndef scale(values, factor):\n    "
        "return scaled(values, factor)\n",
        "whole/deeper/__init__.py": "",
        "whole/deeper/far.py": "from ..sign import SIGN\n\n\ndef scaled(values, factor):\n    "
        "return SIGN * values * factor\n",
        "whole/sign.py": "SIGN = 1.0\n",
        "a_task.py": TASK.replace(
            "import torch\n", "import torch\n\nimport helpers\nimport whole\n", 1
        )
        .replace(
            'return F.cross_entropy(model(batch[0]), batch[1], reduction="none")',
            'return whole.scale(F.cross_entropy(model(batch[0]), batch[1], reduction="none"), '
            "helpers.FACTOR)",
        )
        .replace(
            '"train": Loss(F.cross_entropy, on="train")',
            '"train": Loss(call=cross_entropy, on="train")',
        ),
    }
    for name, text in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.replace("{factor}", str(factor)))
    return folder / "a_task.py"


def change(run: lca_posthoc.Run) -> float:
    steps = run["train"].steps
    return float(steps.loss_end[-1] - steps.loss_start[0])


def test_local_imports_travel_and_an_edit_takes_effect_on_the_same_workers(
    pair: Standing, place: Path, tasks: Path, tmp_path: Path
) -> None:
    plain = change(lca_posthoc.open_run(place / "clean.lca"))
    for factor in (2.0, 3.0):
        task = write(tasks / "edited", factor)
        out, clean = tmp_path / f"{factor}.lca", tmp_path / f"{factor}-clean.lca"
        replay(place, task, out, pair.address)
        replay(place, task, clean, "inline")
        clean_runs.same_bytes(out, clean)
        assert change(lca_posthoc.open_run(out)) == pytest.approx(factor * plain, rel=1e-5)


def test_modules_of_one_name_in_the_folders_of_two_tasks_do_not_mix(
    pair: Standing, place: Path, tasks: Path, tmp_path: Path
) -> None:
    plain = change(lca_posthoc.open_run(place / "clean.lca"))
    written = {factor: write(tasks / f"times-{factor}", factor) for factor in (5.0, 7.0)}
    for at, factor in enumerate((5.0, 7.0, 5.0)):
        run = replay(place, written[factor], tmp_path / f"{at}.lca", pair.address)
        assert change(run) == pytest.approx(factor * plain, rel=1e-5)


SCRIPT = f"""
import sys

import lca_posthoc
{TASK}

class Wider(Net):
    def forward(self, inputs):
        return super().forward(inputs) * 2.0


if __name__ == "__main__":
    made = task()
    made = Task(model=Wider, data=made.data, losses=made.losses)
    checkpoints, out, cluster = sys.argv[1:]
    options = dict(losses=["all"], span={SPAN}, tolerance=float("inf"))
    lca_posthoc.run(checkpoints, made, out=f"{{out}}-clean", cluster="inline", **options)
    lca_posthoc.run(checkpoints, made, out=out, cluster=cluster, workers=2, **options)
"""


def test_a_task_made_in_a_script_travels(
    pair: Standing, place: Path, tasks: Path, tmp_path: Path
) -> None:
    script, out = tasks / "script.py", tmp_path / "out.lca"
    script.write_text(SCRIPT)
    process = clean_runs.start(
        [
            *clean_runs.command(place, out)[:1],
            str(script),
            str(place / "checkpoints"),
            str(out),
            pair.address,
        ]
    )
    _, said = process.communicate()
    assert process.returncode == 0, said
    clean_runs.same_bytes(out, tmp_path / "out.lca-clean")
    assert change(lca_posthoc.open_run(out)) != pytest.approx(
        change(lca_posthoc.open_run(place / "clean.lca")), rel=1e-3
    )


# --- workers that are turned away -----------------------------------------------------------------

OLDER = """
import importlib.metadata as metadata

known = metadata.version
metadata.version = lambda name: "2.0.0" if name == "torch" else known(name)
"""
ABSENT = """
import sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lca_posthoc":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
"""


def with_start(place: Path, text: str) -> dict[str, str]:
    """An environment whose interpreters run `text` first."""
    place.mkdir()
    (place / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": f"{place}:{ROOT}"}


def test_workers_that_cannot_take_part_are_named_with_what_to_do(
    place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs" / "out.lca"
    blind = without_sight_of(place / "checkpoints", tmp_path / "cwd")
    apart = without_sight_of(out.parent, tmp_path / "cwd")
    older = with_start(tmp_path / "older", OLDER)
    with standing(tmp_path / "cluster", PYTHONPATH=ROOT) as made:
        made.hire("--name", "old", PYTHONPATH=older["PYTHONPATH"])
        made.hire("--name", "blind", prefix=blind, PYTHONPATH=ROOT)
        made.hire("--name", "apart", prefix=apart, PYTHONPATH=ROOT)
        line = refused(start_of(place, out, made, workers=3), code=5)
    torch = lca_posthoc.open_run(place / "clean.lca").manifest.provenance["torch"].partition("+")[0]
    for name, words in {
        "old": ("has torch 2.0.0", f"`pip install torch=={torch}`"),
        "blind": (
            f"cannot read checkpoint {place / 'checkpoints'}/",
            "mount the file system of the checkpoints there",
        ),
        "apart": (f"cannot read {out.parent}", "mount the file system of the run there"),
    }.items():
        (of_it,) = [part for part in line.split("worker ") if part.startswith(f"{name} (tcp://")]
        says(of_it, *words)
    assert not out.exists()
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("who", ["worker", "scheduler"])
def test_an_environment_without_the_package_is_named(
    place: Path, tmp_path: Path, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assignments, "ANSWER_SECONDS", 15.0)
    environment = {each: {"PYTHONPATH": ROOT} for each in ("worker", "scheduler")}
    environment[who] = with_start(tmp_path / "absent", ABSENT)
    with standing(tmp_path / "cluster", **environment["scheduler"]) as made:
        made.hire("--name", "bare", **environment["worker"])
        result = start_of(place, tmp_path / "out.lca", made, workers=1)
    line = refused(result, "lca_posthoc", code=5)
    says(line, "bare (tcp://" if who == "worker" else "scheduler")


def test_gpus_are_not_expected_of_workers_that_offer_none(
    pair: Standing, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assignments, "ANSWER_SECONDS", 15.0)
    line = refused(start_of(place, tmp_path / "out.lca", pair, "--device", "cuda"), code=5)
    says(line, "worker one (tcp://", "--device cpu")
