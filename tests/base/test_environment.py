"""The environment of this process, beside what the system's own programs say of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lca_posthoc.base.environment import file_system


def kind_by_df(path: Path) -> str:
    done = subprocess.run(
        ["df", "--output=fstype", path], capture_output=True, text=True, check=True
    )
    return done.stdout.split()[-1]


@pytest.mark.parametrize("path", ["/", "/proc", "/dev/shm", "."])
def test_the_file_system_is_the_one_that_df_names(path: str) -> None:
    assert file_system(Path(path)) == kind_by_df(Path(path))


def test_a_link_counts_as_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc")
    assert file_system(tmp_path / "link") == "proc"
    assert file_system(tmp_path / "not there") == kind_by_df(tmp_path)
