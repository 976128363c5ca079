"""The level of `--keep` a run takes where none is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lca_posthoc
from lca_posthoc import results
from lca_posthoc.base import available_memory
from lca_posthoc.errors import InputError, ResourceError, amount
from lca_posthoc.numerics.schema import KEEP
from lca_posthoc.replay import prepare
from lca_posthoc.replay.events import Note
from lca_posthoc.replay.levels import MemoryOfLevels, highest_that_fits
from lca_posthoc.replay.plan import plan
from lca_posthoc.replay.requests import LevelMemory
from lca_posthoc.replay.worker.memory_estimate import free_memory_each
from lca_posthoc.results import open_run, read_manifest, required_bytes, verify
from tests.helpers.cli import document, lca, record, refused, run_lca, write_task
from tests.helpers.late_device import CUDA, install

# bytes of memory and of disk a replay takes in the tests of the rule
NEEDS = {"tensors": 16e9, "units": 17e9, "statistics": 80e9, "parameters": 90e9}
STORED = {"tensors": 10_000, "units": 200_000, "statistics": 40_000_000, "parameters": 10**9}
PLENTY = 10**12


def memory(free: float, *, workers: int = 1, losses: int = 1) -> MemoryOfLevels:
    levels = {keep: LevelMemory(needs=needs, block={}, along={}) for keep, needs in NEEDS.items()}
    return MemoryOfLevels(levels=levels, free=free, workers=workers, losses=losses)


# --- the rule -------------------------------------------------------------------------------------

RULE = [
    (PLENTY, PLENTY, "parameters", ()),
    (90e9, 2 * 10**9, "parameters", ()),
    (90e9 - 1, PLENTY, "statistics", ("parameters", "90 GB of memory", "are free for each worker")),
    (24e9, PLENTY, "units", ("statistics", "80 GB of memory", "24 GB are free for each worker")),
    (16.5e9, PLENTY, "tensors", ("units", "17 GB of memory", "16.5 GB")),
    (PLENTY, 2 * 10**9 - 1, "statistics", ("parameters", "1 GB on disk", "has 2 GB free")),
    (PLENTY, 400_000, "units", ("statistics", "40 MB on disk", "has 400 kB free")),
    (PLENTY, 399_999, "tensors", ("units", "200 kB on disk", "of which half counts")),
    # the lowest reason counts: memory keeps parameters out, space statistics as well
    (85e9, 400_000, "units", ("statistics", "40 MB on disk")),
    # where nothing fits, the refusal speaks
    (1000.0, PLENTY, "tensors", ("units", "17 GB of memory", "1 kB are free")),
    (PLENTY, 0, "tensors", ("units", "200 kB on disk", "has 0 B free")),
]


@pytest.mark.parametrize(("free", "space", "kept", "words"), RULE)
def test_the_highest_level_that_fits_memory_and_half_of_the_space_is_taken(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    free: float,
    space: int,
    kept: str,
    words: tuple[str, ...],
) -> None:
    monkeypatch.setattr(results, "free_space", lambda path: (path.parent, space))
    keep, notes = highest_that_fits(memory(free), STORED.__getitem__, tmp_path / "run.lca")
    assert keep == kept
    assert len(notes) == bool(words)
    for note in notes:
        assert note.startswith(f"--keep auto takes {kept}: {words[0]} would take up to ")
        assert [word for word in words if word not in note] == []


def test_what_is_stored_is_asked_of_no_level_below_the_one_that_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a long trajectory that takes seconds."""
    monkeypatch.setattr(results, "free_space", lambda path: (path, PLENTY))
    asked: list[str] = []

    def stored(keep: str) -> int:
        asked.append(keep)
        return STORED[keep]

    assert highest_that_fits(memory(85e9), stored, tmp_path)[0] == "statistics"
    assert asked == ["statistics"]


@pytest.mark.parametrize(
    ("free", "keep", "options", "lower", "ways"),
    [
        (20e9, "parameters", {}, KEEP[:3], "--keep units, a machine"),
        (85e9, "parameters", {}, KEEP[:3], "--keep statistics, a machine"),
        (1e9, "parameters", {}, KEEP[:3], "--keep tensors, a machine"),
        (1e9, "tensors", {}, (), "a machine"),
        (20e9, "statistics", {}, (), "a machine"),  # of a run that is there already
        (
            20e9,
            "parameters",
            {"workers": 2, "losses": 3},
            KEEP[:3],
            "fewer --workers, fewer losses at a time (--loss), --keep units, a machine",
        ),
    ],
)
def test_a_lack_of_memory_names_what_helps(
    free: float, keep: str, options: dict[str, int], lower: tuple[str, ...], ways: str
) -> None:
    said = memory(free, **options).short_of(keep, lower=lower)
    assert said is not None
    assert f"with --keep {keep} takes about" in said
    assert said.endswith(f"Try {ways} with more memory.")


@pytest.mark.parametrize("keep", KEEP)
def test_nothing_is_lacking_where_it_fits_to_the_byte(keep: str) -> None:
    assert memory(NEEDS[keep]).short_of(keep, lower=()) is None


def test_on_a_gpu_its_own_memory_counts_with_what_torch_keeps_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch)
    assert free_memory_each(4, CUDA) == 2**30 + 2 * 2**20


# --- a run ----------------------------------------------------------------------------------------


class Host:
    """A host whose free memory and space are set, and what was reckoned on it last."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.memory, self.space = float(PLENTY), PLENTY
        self.reckoned: list[MemoryOfLevels] = []
        patch.setattr(available_memory, "free_memory", lambda: self.memory)
        patch.setattr(results, "free_space", lambda path: (path.parent, self.space))
        choose = prepare.highest_that_fits

        def chosen(memory: MemoryOfLevels, *others: Any) -> tuple[str, list[str]]:
            self.reckoned.append(memory)
            return choose(memory, *others)

        patch.setattr(prepare, "highest_that_fits", chosen)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    record(tmp_path / "ck", range(7))
    write_task(tmp_path / "task.py")
    return tmp_path


def replay(place: Path, out: str, **options: Any) -> tuple[lca_posthoc.Run, list[str]]:
    """The run, and the notes on its level."""
    notes: list[str] = []

    def listen(event: object) -> None:
        if isinstance(event, Note) and event.text.startswith("--keep"):
            notes.append(event.text)

    run = lca_posthoc.run(
        place / "ck",
        place / "task.py",
        out=place / out,
        cluster="inline",
        progress=listen,
        **options,
    )
    return run, notes


def test_memory_decides_what_a_run_keeps_and_it_says_so(place: Path, host: Host) -> None:
    run, notes = replay(place, "all.lca")
    assert (run.manifest.keep, notes) == ("parameters", [])
    levels = host.reckoned[0].levels
    assert list(levels) == list(KEEP)
    needs = [levels[keep].needs for keep in KEEP]
    assert needs == sorted(set(needs))
    for above, keep in zip(KEEP[1:], KEEP, strict=False):
        host.memory = levels[keep].needs
        run, notes = replay(place, f"{keep}.lca")
        assert run.manifest.settings["keep"] == run.manifest.keep == keep
        (note,) = notes
        assert note.startswith(f"--keep auto takes {keep}: {above} would take up to ")
        assert plan(place / "ck", place / "task.py", workers=1).keep == keep
        assert list(verify(run.path)) == []


def test_half_of_the_space_decides_what_a_run_keeps(place: Path, host: Host) -> None:
    manifest = replay(place, "all.lca")[0].manifest
    for keep in KEEP[1:]:
        host.space = 2 * required_bytes(manifest, keep, manifest.losses) + 10_000
        run, notes = replay(place, f"{keep}.lca")
        assert run.manifest.keep == keep
        assert len(notes) == (keep != "parameters")
        assert all(f"and {place} has " in note for note in notes)


def test_sums_take_a_few_numbers_for_every_parameter_and_more_of_them_in_float64(
    place: Path, host: Host
) -> None:
    for precision, itemsize in (("float32", 4), ("float64", 8)):
        replay(place, f"{precision}.lca", precision=precision, batch_size=10)
        levels, manifest = host.reckoned[-1].levels, read_manifest(place / f"{precision}.lca")
        largest = max(tensor.spec.elements for tensor in manifest.tensors)
        sums = {
            "tensors": len(manifest.allocated),
            "units": sum(tensor.spec.units for tensor in manifest.allocated),
        }
        for keep, count in sums.items():
            points = itemsize * (4 * manifest.parameters + largest)
            assert levels[keep].needs == points + 64 * count
        # to the points come two gradients, a float64 sum and totals, and a tenth of everything
        of_each, of_largest = 6 * itemsize + 8 + 19, itemsize + 32
        assert levels["statistics"].needs == int(
            1.1 * (of_each * manifest.parameters + of_largest * largest)
        )


def test_a_run_that_goes_on_keeps_its_level_whatever_is_free(place: Path, host: Host) -> None:
    replay(place, "all.lca")
    host.memory = host.reckoned[0].levels["units"].needs
    replay(place, "run.lca", steps="0:2")
    host.memory = float(PLENTY)
    for asked in (None, "auto", "units"):
        run, notes = replay(place, "run.lca", steps="0:2", losses=["all"], keep=asked)
        assert (run.manifest.keep, notes) == ("units", [])
    assert len(host.reckoned) == 2
    for other in ("parameters", "statistics", "tensors"):
        with pytest.raises(InputError, match=f"made with --keep units, not --keep {other}"):
            replay(place, "run.lca", steps="0:2", keep=other)


def test_what_is_asked_for_is_taken_whatever_is_free(place: Path, host: Host) -> None:
    host.space = 1
    run, notes = replay(place, "run.lca", keep="parameters", ignore_space=True)
    assert run.manifest.keep == "parameters"
    assert notes == host.reckoned == []


def test_a_lack_of_space_names_the_levels_that_can_still_be_taken(place: Path, host: Host) -> None:
    less = "Keep less with --keep units or --keep tensors, write elsewhere with --out, or start"
    host.space = 1
    with pytest.raises(ResourceError, match=rf"{amount(1)} free\. {less}"):
        replay(place, "run.lca", keep="statistics")
    host.space = PLENTY
    replay(place, "run.lca", keep="statistics")
    host.space = 1  # a run that is there keeps its level
    with pytest.raises(ResourceError, match=rf"{amount(1)} free\. Write elsewhere with --out, or"):
        replay(place, "run.lca", losses=["all"])


# --- the plan -------------------------------------------------------------------------------------


def rows(printed: str) -> dict[str, list[str]]:
    """The words of each row of the table of levels."""
    lines = printed.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("--keep"))
    return {line.split()[0]: line.split() for line in lines[start + 1 : start + 1 + len(KEEP)]}


@pytest.mark.parametrize(
    ("options", "kept", "said"),
    [((), "parameters", "auto takes this"), (("--keep", "units"), "units", "asked for")],
)
def test_a_plan_prices_every_level_and_marks_the_one_a_run_takes(
    place: Path, options: tuple[str, ...], kept: str, said: str
) -> None:
    asked = ("plan", place / "ck", "--task", place / "task.py", "--workers", 1, *options)
    table = rows(lca(*asked).stdout)
    assert list(table) == list(KEEP)
    assert [keep for keep in KEEP if " ".join(table[keep]).endswith(said)] == [kept]
    found = document(lca(*asked, "--json"))
    assert found["keep"] == kept
    for figures in ("memory", "bytes", "seconds"):
        assert list(found[figures]) == list(KEEP)
        assert min(found[figures].values()) > 0
    assert found["free_memory"] > 0


def test_the_command_line_takes_auto_and_says_what_it_took(place: Path, host: Host) -> None:
    replay(place, "all.lca")
    host.memory = host.reckoned[0].levels["statistics"].needs
    out = place / "run.lca"
    done = run_lca(place / "ck", place / "task.py", out, "--keep", "auto")
    assert done.exit_code == 0, done.stderr
    assert "--keep auto takes statistics: parameters would take up to" in done.stderr
    assert open_run(out).manifest.keep == "statistics"
    other = run_lca(place / "ck", place / "task.py", out, "--keep", "units")
    refused(other, "--keep statistics, not --keep units", "--out")
