"""Free memory is that of the host, or what a container or a job of a batch system leaves, if
less.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from lca_posthoc.base import available_memory

GB = 10**9
UNLIMITED = 2**63 - 4096  # what version 1 says where there is no limit
V1, V2 = (
    {"limit": "memory.limit_in_bytes", "used": "memory.usage_in_bytes", "prefix": "total_"},
    {"limit": "memory.max", "used": "memory.current", "prefix": ""},
)

# what /proc/self/cgroup says; group → (limit, used, cached, or what memory.stat says); what is left
# of 100 GB
CASES: dict[str, tuple[Any, ...]] = {
    "no control groups": (None, V2, {}, 100 * GB),
    "version 2, no limit": ("0::/user.slice", V2, {"user.slice": ("max", 50 * GB, 0)}, 100 * GB),
    "version 2, a container sees itself at the top": (
        "0::/",
        V2,
        {"": (8 * GB, 3 * GB, GB)},
        6 * GB,
    ),
    "version 2, named from outside": ("0::/kubepods/pod7", V2, {"": (8 * GB, 3 * GB, 0)}, 5 * GB),
    "version 2, a step of a batch job": (
        "0::/slurm/job_7/step_0",
        V2,
        {
            "slurm/job_7/step_0": ("max", GB, 0),
            "slurm/job_7": (16 * GB, 4 * GB, 2 * GB),
            "slurm": (64 * GB, 5 * GB, 0),
        },
        14 * GB,
    ),
    "version 2, more used than allowed": ("0::/a", V2, {"a": (GB, 2 * GB, 0)}, 0),
    "version 1": (
        "4:cpu:/b\n3:memory:/a",
        V1,
        {"memory/a": (4 * GB, GB, 0), "memory/b": (GB, 0, 0)},
        3 * GB,
    ),
    "version 1, no limit": ("3:cpuset,memory:/a", V1, {"memory/a": (UNLIMITED, GB, 0)}, 100 * GB),
    "version 1, named from outside": (
        "3:memory:/docker/7",
        V1,
        {"memory": (4 * GB, GB, GB)},
        4 * GB,
    ),
    "version 1, cached files in use": (
        "3:memory:/a",
        V1,
        {
            "memory/a": (
                8 * GB,
                7 * GB,
                f"active_file {GB}\ntotal_active_file {2 * GB}\ntotal_inactive_file {GB}",
            )
        },
        4 * GB,
    ),
    "version 2, cached files in use": (
        "0::/a",
        V2,
        {"a": (8 * GB, 7 * GB, f"file {9 * GB}\ninactive_file {GB}\nactive_file {5 * GB}\n")},
        7 * GB,
    ),
    "more cached than used": ("0::/a", V2, {"a": (8 * GB, GB, 2 * GB)}, 8 * GB),
    "no memory.stat": ("0::/a", V2, {"a": (8 * GB, GB, None)}, 7 * GB),
    "an empty memory.stat": ("0::/a", V2, {"a": (8 * GB, GB, "")}, 7 * GB),
    "odd lines of memory.stat": (
        "0::/a",
        V2,
        {
            "a": (
                8 * GB,
                3 * GB,
                f"\nanon\nper node 3\n\udcff 1\ninactive_file {GB}\nactive_file many\n",
            )
        },
        6 * GB,
    ),
    "odd lines of /proc/self/cgroup": ("odd\n\nx:y\n0::/a\n", V2, {"a": (8 * GB, GB, 0)}, 7 * GB),
    "a name that is not UTF-8": ("0::/a\udcff", V2, {"a\udcff": (8 * GB, GB, 0)}, 7 * GB),
    "a name no file can have": ("0::/a\0/b", V2, {"": (8 * GB, GB, 0)}, 7 * GB),
    "an empty limit in a limited group": (
        "0::/a/b",
        V2,
        {"a/b": ("", GB, 0), "a": (8 * GB, GB, 0)},
        7 * GB,
    ),
    "an odd limit": ("0::/a", V2, {"a": ("lots", GB, 0)}, 100 * GB),
    "an odd count of what is used": ("0::/a", V2, {"a": (GB, "", 0)}, 100 * GB),
}


@pytest.mark.parametrize("case", CASES)
def test_free_memory_is_what_the_narrowest_limit_leaves(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, names, groups, left = CASES[case]
    if said is not None:
        (tmp_path / "self").write_bytes(os.fsencode(said))
    for group, (limit, used, cached) in groups.items():
        place = tmp_path / "groups" / group
        place.mkdir(parents=True, exist_ok=True)
        (place / names["limit"]).write_text(f"{limit}\n")
        (place / names["used"]).write_text(f"{used}\n")
        if isinstance(cached, int):
            cached = f"file 12345\n{names['prefix']}inactive_file {cached}\n"
        if cached is not None:
            (place / "memory.stat").write_bytes(os.fsencode(cached))
    monkeypatch.setattr(available_memory, "OF_PROCESS", tmp_path / "self")
    monkeypatch.setattr(available_memory, "GROUPS", tmp_path / "groups")
    memory = psutil.virtual_memory()._replace(available=100 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert available_memory.free_memory() == left


def test_this_process_has_free_memory() -> None:
    assert 0 < available_memory.free_memory() <= psutil.virtual_memory().total


def test_the_peak_of_a_process_is_its_own_and_not_that_of_who_started_it() -> None:
    before = available_memory.peak_memory()
    large = bytearray(b"1") * (before + 50_000_000)
    assert available_memory.peak_memory() >= before + 50_000_000
    del large
    child = "from lca_posthoc.base.available_memory import peak_memory; print(peak_memory())"
    said = subprocess.run(
        [sys.executable, "-c", child], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    assert 5_000_000 < int(said) < before + 50_000_000


SCATTERED = """
from contextlib import nullcontext
import psutil
from lca_posthoc.base.available_memory import freed_at_once

bytes(2**25 - 2**16)  # from now on, blocks of less are kept for later ones
with {context}:
    blocks = [b"x" * 2**21 for _ in range(64)]
    held = psutil.Process().memory_info().rss
    del blocks[::2]
    print(held - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc's allocator")
@pytest.mark.parametrize(
    ("context", "given_back"),
    [("freed_at_once(2**30)", True), ("freed_at_once(2**20)", False), ("nullcontext()", False)],
)
def test_what_is_freed_between_other_blocks_goes_back_at_once(
    context: str, given_back: bool
) -> None:
    code = SCATTERED.format(context=context)
    freed = int(subprocess.check_output([sys.executable, "-c", code], text=True))
    assert (freed > 2**25) is given_back
