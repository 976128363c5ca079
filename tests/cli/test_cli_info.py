"""`lca info`: what a report of a bug needs, and nothing that is nobody's business."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from ..helpers.cli import lca, record, refused, run_lca, steering, write_task

ROOT = Path(__file__).parents[2]
WORD = "correct-horse"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints `ck`, a task and a finished run `ck.lca`."""
    root = tmp_path_factory.mktemp("info")
    record(root / "ck", range(3))
    write_task(root / "task.py")
    assert run_lca(root / "ck", root / "task.py", root / "ck.lca").exit_code == 0
    return root


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "ck.lca", tmp_path / "ck.lca"))


def rows(text: str) -> dict[str, str]:
    """The names that lines begin with, and the rest of each."""
    pairs = (line.strip().partition(" ") for line in text.splitlines())
    return {name: value.strip() for name, _, value in pairs}


def append(run: Path, **event: object) -> None:
    with (run / "log" / "run.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")


def test_it_has_the_release_of_every_dependency() -> None:
    shown = rows(lca("info").stdout)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[\[>]", requirement)[0] for requirement in project["dependencies"]]
    assert {name: shown.get(name) for name in names} == {name: version(name) for name in names}
    assert shown["lca_posthoc"] == version("lca_posthoc")
    assert shown["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert f"pytest {version('pytest')}" in shown["also"]
    assert {"platform", "processors", "memory", "cuda", "devices"} <= {*shown}


def test_it_has_the_settings_of_threads_and_no_other_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", WORD)
    text = lca("info").stdout
    assert "OMP_NUM_THREADS=3" in rows(text)["threads"]
    assert WORD not in text


def test_a_torch_that_cannot_be_imported_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    result = lca("info")
    assert result.exit_code == 0
    assert "torch cannot be imported: ModuleNotFoundError" in rows(result.stdout)["devices"]


def test_a_package_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lca_posthoc.base.environment.requires",
        lambda _: ["no-such-package>=1", 'no-such-addition>=1; extra == "test"'],
    )
    text = lca("info").stdout
    assert rows(text)["no-such-package"] == "missing"
    assert "no-such-addition" not in text


def test_of_a_run_it_has_format_settings_task_and_the_end_of_the_log(made: Path, run: Path) -> None:
    text = lca("info", run).stdout
    recorded = json.loads((run / "run.json").read_text())
    shown = rows(text)
    assert shown["run"] == f"format {recorded['format']}, id {recorded['id']}"
    assert shown["task"] == f"sha256 {recorded['provenance']['task_sha256']}"
    settings = {name: value for name, value in recorded["settings"].items() if value}
    assert {name: shown[name] for name in settings} == {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in settings.items()
    }
    assert "kernel locks" in shown["file"]
    *_, last = text.splitlines()
    assert json.loads(last) == json.loads((run / "log" / "run.jsonl").read_text().splitlines()[-1])


def test_the_log_is_shown_from_its_end(run: Path) -> None:
    for number in range(30):
        append(run, event="Note", text=f"note {number}")
    *_, heading, first = lca("info", run).stdout.splitlines()[:-19]
    assert heading == "the last 20 lines of the log:"
    assert json.loads(first)["text"] == "note 10"


def test_no_directory_and_no_address_is_shown_unless_it_is_asked_for(run: Path) -> None:
    append(
        run,
        event="Ended",
        error=f"LCAError: no {run.parent}/mine/x.pt\n{run.parent}/y.pt, https://me:{WORD}@host/z?k=1",
        doing=[f'File "{run.parent}/task.py", line 3'],
    )
    hidden, shown = lca("info", run).stdout, lca("info", "--paths", run).stdout
    for secret in (str(run.parent), WORD, "mine"):
        assert secret not in hidden
        assert secret in shown
    assert "…/x.pt" in hidden
    assert '"doing": ["File \\"…/task.py\\", line 3"]' in hidden


def test_half_a_line_that_a_crash_left_is_shown_as_it_is(run: Path) -> None:
    with (run / "log" / "run.jsonl").open("a") as file:
        file.write('{"event": "Note\x1b[31m", "text": "/home/ada/x')
    last = lca("info", run).stdout.splitlines()[-1]
    assert last == '{"event": "Note?[31m", "text": "…/x'
    assert not steering(last)


def test_of_a_damaged_run_it_says_why_it_cannot_be_read(run: Path) -> None:
    (run / "run.json").write_text("{")
    result = lca("info", run)
    assert result.exit_code == 0
    assert "it is not JSON" in rows(result.stdout)["run"]
    assert str(run.parent) not in result.stdout
    assert '"event": "Ended"' in result.stdout


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    refused(lca("info", tmp_path), "is not a run directory")
