"""Free memory is that of the host, or what a container or a job of a batch system leaves, if less."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from lca_posthoc import host

GB = 10**9
UNLIMITED = 2**63 - 4096  # what version 1 says where there is no limit
V1, V2 = (
    {"limit": "memory.limit_in_bytes", "used": "memory.usage_in_bytes", "cached": "total_inactive_file"},
    {"limit": "memory.max", "used": "memory.current", "cached": "inactive_file"},
)

# what /proc/self/cgroup says; group → (limit, used, cached); what is left of 100 GB
CASES = {
    "no control groups": (None, V2, {}, 100 * GB),
    "version 2, no limit": ("0::/user.slice", V2, {"user.slice": ("max", 50 * GB, 0)}, 100 * GB),
    "version 2, a container sees itself at the top": ("0::/", V2, {"": (8 * GB, 3 * GB, GB)}, 6 * GB),
    "version 2, named from outside": ("0::/kubepods/pod7", V2, {"": (8 * GB, 3 * GB, 0)}, 5 * GB),
    "version 2, a step of a batch job": (
        "0::/slurm/job_7/step_0",
        V2,
        {"slurm/job_7/step_0": ("max", GB, 0), "slurm/job_7": (16 * GB, 4 * GB, 2 * GB), "slurm": (64 * GB, 5 * GB, 0)},
        14 * GB,
    ),
    "version 2, more used than allowed": ("0::/a", V2, {"a": (GB, 2 * GB, 0)}, 0),
    "version 1": ("4:cpu:/b\n3:memory:/a", V1, {"memory/a": (4 * GB, GB, 0), "memory/b": (GB, 0, 0)}, 3 * GB),
    "version 1, no limit": ("3:cpuset,memory:/a", V1, {"memory/a": (UNLIMITED, GB, 0)}, 100 * GB),
    "version 1, named from outside": ("3:memory:/docker/7", V1, {"memory": (4 * GB, GB, GB)}, 4 * GB),
}


@pytest.mark.parametrize("case", CASES)
def test_free_memory_is_what_the_narrowest_limit_leaves(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, names, groups, left = CASES[case]
    if said is not None:
        (tmp_path / "self").write_text(said)
    for group, (limit, used, cached) in groups.items():
        place = tmp_path / "groups" / group
        place.mkdir(parents=True, exist_ok=True)
        (place / names["limit"]).write_text(f"{limit}\n")
        (place / names["used"]).write_text(f"{used}\n")
        (place / "memory.stat").write_text(f"file 12345\n{names['cached']} {cached}\n")
    monkeypatch.setattr(host, "OF_PROCESS", tmp_path / "self")
    monkeypatch.setattr(host, "GROUPS", tmp_path / "groups")
    memory = psutil.virtual_memory()._replace(available=100 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert host.free_memory() == left


def test_this_process_has_free_memory() -> None:
    assert 0 < host.free_memory() <= psutil.virtual_memory().total
