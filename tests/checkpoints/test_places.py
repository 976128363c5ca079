"""Places of checkpoints: `{step}` in a path or an address, the cache of a hub, several places of one
series. Whatever the place, the numbers are those of the directory.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fsspec.registry import _registry
from fsspec.spec import AbstractFileSystem
from safetensors.torch import save_file

import lca_posthoc
from lca_posthoc import Recorder, open_trajectory
from lca_posthoc.checkpoints.optimizer_steps import moments_path
from lca_posthoc.checkpoints.places import STEP, common_root, places_of
from lca_posthoc.checkpoints.trajectory import read_checkpoint
from lca_posthoc.errors import InputError
from tests.helpers.cli import lca, record, refused, run_lca, write_task

POWERS = (0, 1, 2, 4)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def save(path: Path, number: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.full((3,), number)}, path)
    return path


def as_directories(root: Path) -> str:
    for step in POWERS:
        save(root / f"step{step}" / "model.safetensors", step)
    save(root / "main" / "model.safetensors", 9)
    return str(root / f"step{STEP}")


def as_files_in_directories(root: Path) -> str:
    return f"{as_directories(root)}/model.safetensors"


def as_files(root: Path) -> str:
    for step in POWERS:
        save(root / f"of_{step:05d}.safetensors", step)
    save(root / "of_all.safetensors", 9)
    return str(root / f"of_{STEP}.safetensors")


def twice(root: Path) -> str:
    """The step stands in the path twice, and must be the same."""
    for step in POWERS:
        save(root / f"run[1]-{step}" / f"at-{step}.safetensors", step)
        save(root / f"run[1]-{step}" / "at-77.safetensors", 9)
    return str(root / f"run[1]-{STEP}" / f"at-{STEP}.safetensors")


def as_indices(root: Path) -> str:
    for step in POWERS:
        save(root / f"step{step}" / "a-00001-of-00001.safetensors", step)
        text = '{"weight_map": {"w": "a-00001-of-00001.safetensors"}}'
        (root / f"step{step}" / "model.safetensors.index.json").write_text(text)
    return str(root / f"step{STEP}" / "model.safetensors.index.json")


def as_branches(root: Path) -> str:
    """The cache that huggingface_hub makes on a disk: revisions name commits."""
    place = root / "models--org--name"
    for step in POWERS:
        commit = f"{step:040x}"
        blob = save(place / "blobs" / f"{step}.safetensors", step)
        (place / "snapshots" / commit).mkdir(parents=True)
        (place / "snapshots" / commit / "model.safetensors").symlink_to(blob)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / f"step{step}").write_text(commit)
    (place / "refs" / "main").write_text(f"{4:040x}")
    (place / "refs" / "pr").mkdir()
    (place / "refs" / "pr" / "1").write_text("no commit")
    return str(place)


LAYOUTS = (as_directories, as_files_in_directories, as_files, twice, as_indices, as_branches)


def numbers(*places: str | Path, **options: str) -> dict[int, float]:
    """The number that each checkpoint holds, by step, as a worker reads it."""
    trajectory = open_trajectory(places, **options)  # type: ignore[arg-type]
    return {
        checkpoint.step: float(read_checkpoint(checkpoint, {"w": "w"})["w"][0])
        for checkpoint in trajectory.checkpoints
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_found_at_their_places(tmp_path: Path, layout: Callable[[Path], str]) -> None:
    place = layout(tmp_path / "ck")
    assert numbers(place) == {step: step for step in POWERS}
    assert numbers(place, steps="1:") == {1: 1, 2: 2, 4: 4}
    assert numbers(place, steps="0,1,4") == {0: 0, 1: 1, 4: 4}
    with pytest.raises(InputError, match=r"names step 3 without a checkpoint"):
        open_trajectory(place, steps="0,3")


def test_what_a_cache_does_not_call_a_step_is_said(tmp_path: Path) -> None:
    notes = open_trajectory(as_branches(tmp_path)).notes
    assert notes[0] == f"left out {4:040x}: it states no step"


def test_a_cache_takes_patterns_of_its_revisions(tmp_path: Path) -> None:
    place = Path(as_branches(tmp_path))
    for step in POWERS:
        (place / "refs" / f"step{step}").rename(place / "refs" / f"b-{step}-of-4")
    assert open_trajectory(place, pattern=r"b-(?P<step>\d+)").steps == [*POWERS]


class Hub(AbstractFileSystem):
    """A hub in a directory: `ORG/NAME@REVISION/file`; like the real one it lists no repositories."""

    protocol = "hf"
    root = Path()
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix("hf://").strip("/")

    def info(self, path: str, **options: object) -> dict[str, object]:
        name = self._strip_protocol(path)
        if name.count("/") < 1:
            raise NotImplementedError("Access to repositories lists is not implemented.")
        place = self.root / name
        kind = "directory" if place.is_dir() else "file"
        return {"name": name, "size": place.stat().st_size, "type": kind}

    def ls(self, path: str, detail: bool = False, **options: object) -> list[object]:
        name = self._strip_protocol(path)
        names = [f"{name}/{entry.name}" for entry in (self.root / name).iterdir()]
        return [self.info(inside) if detail else inside for inside in names]

    def _open(self, path: str, mode: str = "rb", *others: object, **options: object) -> object:
        return (self.root / self._strip_protocol(path)).open(mode)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Path]:
    """The directory of a hub behind `hf://`."""
    before = _registry.get("hf")
    fsspec.register_implementation("hf", type("Hub", (Hub,), {"root": tmp_path / "hub"}), True)
    yield tmp_path / "hub"
    _registry.pop("hf") if before is None else _registry.__setitem__("hf", before)


def test_revisions_of_a_hub_are_steps(tmp_path: Path, hub: Path) -> None:
    for step in POWERS:
        save(hub / "ORG" / f"NAME@step{step}" / "model.safetensors", step)
    for place in ("hf://ORG/NAME@step{step}", "hf://ORG/NAME@step{step}/model.safetensors"):
        assert numbers(place, steps="0,1,2,4") == {step: step for step in POWERS}
        with pytest.raises(InputError, match=r"cannot be listed. Name them, as in --steps 0,1,2"):
            open_trajectory(place)
        with pytest.raises(InputError, match=r"cannot be listed. Name them, as in --steps 0,1,2"):
            open_trajectory(place, steps="0:4")
    with pytest.raises(InputError, match="names step 3 without a checkpoint"):
        open_trajectory("hf://ORG/NAME@step{step}", steps="0,1,3")


def test_folders_of_a_hub_are_listed(hub: Path) -> None:
    for step in POWERS:
        save(hub / "ORG" / "NAME" / "all" / f"step{step}" / "model.safetensors", step)
    assert numbers("hf://ORG/NAME/all/step{step}") == {step: step for step in POWERS}
    assert numbers("hf://ORG/NAME/all/step{step}", steps="1:2") == {1: 1, 2: 2}


def allocations(run: Path) -> dict[str, np.ndarray]:
    opened = lca_posthoc.open_run(run)["train"]
    return {name: opened.allocation[name].values for name in opened.allocation.data_vars}


def test_a_run_of_places_is_that_of_the_directory(tmp_path: Path, hub: Path) -> None:
    """At places, in two directories with a step in common, and behind an address; resumed, repaired
    and looked at again.
    """
    whole, task = record(tmp_path / "ck"), write_task(tmp_path / "task.py")
    files = sorted(whole.glob("*.safetensors"))
    for number, file in enumerate(files):
        save_at = hub / "ORG" / f"NAME@step{number}"
        save_at.mkdir(parents=True)
        shutil.copy(file, save_at / "model.safetensors")
        for part in {*(("a",) if number <= 2 else ()), *(("b",) if number >= 2 else ())}:
            (tmp_path / part).mkdir(exist_ok=True)
            shutil.copy(file, tmp_path / part / f"n{number}.safetensors")
    assert run_lca(whole, task, tmp_path / "plain.lca").exit_code == 0
    expected = allocations(tmp_path / "plain.lca")
    steps = ",".join(map(str, range(len(files))))
    places = {
        "places": [f"{tmp_path}/a/n{STEP}.safetensors", f"{tmp_path}/b/n{STEP}.safetensors"],
        "hub": ["hf://ORG/NAME@step{step}", "--steps", steps],
    }
    for name, arguments in places.items():
        run = tmp_path / f"{name}.lca"
        options = ("--task", task, "--out", run, "--cluster", "inline")
        done = lca("run", *arguments, *options)
        assert done.exit_code == 0, done.stderr
        assert "again" in done.stderr or name != "places"
        for tensor, values in allocations(run).items():
            np.testing.assert_array_equal(values, expected[tensor])
        assert lca("run", *arguments, *options, "--loss", "validation").exit_code == 0
        chunk = next(path for path in sorted((run / "data.zarr").rglob("c/*")) if path.is_file())
        chunk.write_bytes(b"damaged")
        assert lca("verify", run).exit_code == 4
        assert lca("repair", run, "--task", task, "--cluster", "inline").exit_code == 0
        assert lca("verify", run).exit_code == 0


def test_several_places_are_one_series(tmp_path: Path) -> None:
    for step in (0, 1, 2):
        save(tmp_path / "a" / f"step_{step}.safetensors", step)
    for step in (2, 3):
        save(tmp_path / "later" / "b" / f"step{step}" / "model.safetensors", step)
    places = [tmp_path / "a", f"{tmp_path}/later/b/step{STEP}"]
    trajectory = open_trajectory(places)
    assert (trajectory.root, trajectory.steps) == (tmp_path, [0, 1, 2, 3])
    assert trajectory.notes[0] == (
        f"left out {tmp_path}/later/b/step2/model.safetensors: it is "
        f"{tmp_path}/a/step_2.safetensors (step 2) again"
    )
    save(tmp_path / "later" / "b" / "step2" / "model.safetensors", 7)
    with pytest.raises(InputError, match="both claim step 2"):
        open_trajectory(places)


def test_moments_lie_beside_the_files_of_each_place(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    for part, steps in (("a", (0, 1)), ("b", (2, 3))):
        with Recorder(tmp_path / part, model) as recorder:
            for step in steps:
                recorder.save(step)
        path = moments_path(tmp_path / part, steps[0])
        path.parent.mkdir()
        save_file({"exp_avg/weight": torch.zeros(2, 2)}, path)
    trajectory = open_trajectory([tmp_path / "a", tmp_path / "b"], moments=True)
    held = [checkpoint.moments is not None for checkpoint in trajectory.checkpoints]
    assert held == [True, False, True, False]


REFUSALS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "a pattern beside it": (
        ("{root}/step{step}", "--pattern", r"(?P<step>\d+)"),
        ("names the step with {step}, and --pattern names it too",),
    ),
    "the step in a bucket": (
        ("memory://ck{step}/model.safetensors",),
        ("has {step} in the name of the place itself",),
    ),
    "nothing there": (("{root}/nothing/step{step}",), ("is not a directory of checkpoints",)),
    "no file of that name": (
        ("{root}/step{step}/other.safetensors",),
        ("step{step}/other.safetensors holds no checkpoint; at least two are needed",),
    ),
    "another format": (
        ("{root}/step{step}/weights.pt",),
        ("names nothing that holds a safetensors checkpoint", "lca import"),
    ),
    "near and far": (
        ("{root}/step{step}", "memory://ck/step{step}"),
        ("some of the places are remote and others are not",),
    ),
    "two buckets": (("memory://a", "memory://b"), ("have no directory in common",)),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_place_that_makes_no_sense_is_refused(tmp_path: Path, case: str) -> None:
    as_directories(tmp_path)
    (tmp_path / "step1" / "weights.pt").write_bytes(b"PK")
    arguments, words = REFUSALS[case]
    given = [argument.replace("{root}", str(tmp_path)) for argument in arguments]
    options = ("--task", write_task(tmp_path / "task.py"), "--out", tmp_path / "run.lca")
    refused(lca("run", *given, *options), *words)


def test_several_places_need_a_place_for_results(tmp_path: Path) -> None:
    for part, step in (("a", 0), ("b", 1)):
        save(tmp_path / part / f"step_{step}.safetensors", step)
    task = write_task(tmp_path / "task.py")
    refused(
        lca("run", tmp_path / "a", tmp_path / "b", "--task", task),
        "the checkpoints lie in 2 places: name a directory for the results with --out",
    )


def test_folders_of_steps_that_are_not_looked_into_give_the_place_to_name(tmp_path: Path) -> None:
    for step in (*POWERS, 1000):
        save(tmp_path / "saved" / f"step{step}" / "last" / "model.safetensors", step)
    task = write_task(tmp_path / "task.py")
    said = refused(lca("run", tmp_path / "saved", "--task", task), "Where every step has a folder")
    (place,) = shlex.split(said.partition("lca run ")[2])[:1]
    assert open_trajectory(place).steps == [*POWERS, 1000]


def test_what_places_have_in_common_is_their_root(tmp_path: Path) -> None:
    far = places_of(["memory://ck/a", f"memory://ck/b/step{STEP}/m.safetensors"])
    assert str(common_root(far)) == "memory://ck"
    near = places_of([tmp_path / "a" / "x", tmp_path / "a"])
    assert common_root(near) == tmp_path / "a"
    assert common_root(places_of(f"step{STEP}")) == Path()
