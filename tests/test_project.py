"""What contributors meet: workflows, hooks, templates and the citation are well formed, and say the
same as pyproject.toml, README.md and CONTRIBUTING.md.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

import lca_posthoc
from lca_posthoc.cli import COMMANDS

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(
    set((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) - {GITHUB / "ISSUE_TEMPLATE/config.yml"}
)
# offline, and without findings on how a workflow is written
QUIETLY = ("--offline", "--no-progress", "--min-severity", "medium")
SCHEMAS = {
    **dict.fromkeys(WORKFLOWS, "github-workflows"),
    **dict.fromkeys(FORMS, "github-issue-forms"),
    GITHUB / "ISSUE_TEMPLATE" / "config.yml": "github-issue-config",
    GITHUB / "dependabot.yml": "dependabot",
    ROOT / "CITATION.cff": "citation-file-format",
}


def program(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program of this environment."""
    command = [f"{sysconfig.get_path('scripts')}/{name}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def check(path: Path, schema: str) -> subprocess.CompletedProcess[str]:
    return program("check-jsonschema", "--builtin-schema", f"vendor.{schema}", path)


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def steps() -> list[dict[str, Any]]:
    """The steps of every job of every workflow."""
    jobs = [job for path in WORKFLOWS for job in read(path)["jobs"].values()]
    return [step for job in jobs for step in job.get("steps", ())]


def commands() -> list[str]:
    """Every line that a workflow runs."""
    return [line for step in steps() for line in step.get("run", "").splitlines()]


def contributing(opening: str) -> list[str]:
    """The commands of the line of CONTRIBUTING.md that begins so."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (line,) = re.findall(rf"^{re.escape(opening)}.*$", text, re.MULTILINE)
    return line.partition("#")[0].strip().split(" && ")


def torch_of_the_readme() -> str:
    """The release that the README's commands install."""
    (release,) = set(re.findall(r"torch==([\d.]+\d)", (ROOT / "README.md").read_text()))
    return release


def lowest(package: str) -> str:
    """The lowest release of a dependency that pyproject.toml names."""
    (requirement,) = (one for one in PROJECT["dependencies"] if one.startswith(f"{package}>="))
    return requirement.removeprefix(f"{package}>=")


# --- well formed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_for_others_keeps_to_their_schema(path: Path) -> None:
    done = check(path, SCHEMAS[path])
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        (WORKFLOWS[0], "runs-on:", "run-on:"),
        (FORMS[0], "type: textarea", "type: text"),
        (ROOT / "CITATION.cff", "authors:", "author:"),
    ],
)
def test_a_slip_is_noticed(tmp_path: Path, path: Path, old: str, new: str) -> None:
    """The test above can fail."""
    text = path.read_text()
    assert old in text
    slipped = tmp_path / path.name
    slipped.write_text(text.replace(old, new))
    assert check(slipped, SCHEMAS[path]).returncode == 1


def test_workflows_are_safe() -> None:
    done = program("zizmor", *QUIETLY, GITHUB)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_unsafe_workflow_is_noticed(tmp_path: Path) -> None:
    """The test above can fail."""
    shutil.copytree(GITHUB, tmp_path / ".github")
    path = tmp_path / ".github" / "workflows" / "ci.yml"
    path.write_text(path.read_text().replace("persist-credentials: false", "fetch-depth: 1"))
    done = program("zizmor", *QUIETLY, tmp_path / ".github")
    assert done.returncode != 0
    assert "artipacked" in done.stdout


# --- one source -----------------------------------------------------------------------------------


def test_the_matrix_begins_with_the_lowest_python_and_torch_and_ends_with_those_tested() -> None:
    matrix = read(GITHUB / "workflows" / "ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    pythons = [tuple(map(int, release.split("."))) for release in matrix["python"]]
    assert f">={matrix['python'][0]}" == PROJECT["requires-python"]
    assert pythons == [(3, minor) for minor in range(pythons[0][1], pythons[-1][1] + 1)]
    assert matrix["torch"] == [f"{lowest('torch')}.0", torch_of_the_readme()]


def test_other_jobs_take_the_lowest_python_and_the_torch_of_the_readme() -> None:
    pythons = {step["with"].get("python-version") for step in steps() if "with" in step} - {None}
    assert pythons == {"${{ matrix.python }}", PROJECT["requires-python"].removeprefix(">=")}
    releases = set(re.findall(r"torch==([\d.]+)", "\n".join(commands())))
    assert releases == {torch_of_the_readme()}


def test_the_readme_names_the_lowest_torch() -> None:
    assert f"{lowest('torch')} or newer is accepted" in (ROOT / "README.md").read_text()


def test_hooks_and_workflows_run_the_commands_of_contributing() -> None:
    *checks, tests = contributing("ruff check")
    hooks = [
        hook
        for repository in read(ROOT / ".pre-commit-config.yaml")["repos"]
        for hook in repository["hooks"]
    ]
    assert [hook["entry"] for hook in hooks if "entry" in hook] == checks
    (install, site) = contributing('pip install -e ".[docs]"')
    assert '".[docs]"' in install
    assert {"pre-commit run --all-files --show-diff-on-failure", tests, site} <= {*commands()}


def test_a_job_may_do_no_more_than_it_must() -> None:
    for path in WORKFLOWS:
        workflow = read(path)
        assert workflow["permissions"] in ({}, {"contents": "read"})
        for name, job in workflow["jobs"].items():
            wanted = {"id-token": "write"} if name == "publish" else {"contents": "read"}
            assert job.get("permissions", {"contents": "read"}) == wanted


def test_the_version_stands_in_one_place() -> None:
    assert lca_posthoc.__version__ == version("lca_posthoc") == PROJECT["version"]
    package = Path(lca_posthoc.__file__).parent
    sources = [
        *package.rglob("*.py"),
        *(ROOT / "docs").glob("*.py"),
        ROOT / "CITATION.cff",
        *WORKFLOWS,
    ]
    said = rf"""(version|release)["']?\s*[:=]\s*["']?{re.escape(PROJECT["version"])}"""
    assert [path for path in sources if re.search(said, path.read_text())] == []


def test_the_citation_names_the_software_and_the_paper() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation["title"] == PROJECT["name"]
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [
        author["name"] for author in PROJECT["authors"]
    ]
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == [
        "Lan",
        "Liu",
        "Zhou",
        "Yosinski",
    ]
    assert paper["url"] in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", [*FORMS, GITHUB / "SECURITY.md"], ids=lambda path: path.name)
def test_a_template_names_commands_that_exist(path: Path) -> None:
    named = set(re.findall(r"\blca (?!COMMAND)(?:--\w+ )?([a-z]+)\b", path.read_text()))
    assert named <= {*COMMANDS}


@pytest.mark.parametrize("name", ["bug", "wrong_number"])
def test_a_report_asks_for_what_lca_info_prints(name: str) -> None:
    fields = {
        field.get("id"): field for field in read(GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml")["body"]
    }
    assert "lca info" in fields["info"]["attributes"]["label"]
    assert fields["info"]["validations"]["required"]


def test_links_between_files_for_contributors_lead_somewhere() -> None:
    for path in (*GITHUB.rglob("*.md"), *FORMS):
        for link in re.findall(r"\]\((\.\.[^)#\s]+)", path.read_text()):
            place = ROOT / link.removeprefix("../blob/main/") if "/blob/" in link else GITHUB / link
            assert place.exists(), (path, link)


# --- the lowest releases --------------------------------------------------------------------------


def test_every_requirement_has_one_lower_bound_and_nothing_else() -> None:
    """The form that `.ci/lowest` reads, and that every release of a package can satisfy later."""
    named = [*PROJECT["dependencies"]]
    for extra in PROJECT["optional-dependencies"].values():
        named += extra
    form = re.compile(r"[A-Za-z][\w-]*(\[\w+\])?>=\d[\d.]*")
    assert [requirement for requirement in named if not form.fullmatch(requirement)] == []
    bounds = {tuple(requirement.split(">=")) for requirement in named}
    assert len(bounds) == len(dict(bounds)), "two bounds of one package"
