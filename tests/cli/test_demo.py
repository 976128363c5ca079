"""The first minute, as a new user passes it."""

from __future__ import annotations

import json
from pathlib import Path

from lca_posthoc.report import MOST_BYTES
from tests.helpers.browser import browser
from tests.helpers.cli import lca, refused


def test_the_demo_adds_up_and_names_what_it_wrote(tmp_path: Path) -> None:
    result = lca("demo", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-2:] == [
        f"results in {tmp_path / 'demo' / 'checkpoints.lca'}",
        f"wrote {tmp_path / 'demo' / 'report.html'}: open it in a browser",
    ]
    assert "fc1" in result.stdout
    found = json.loads(lca("summary", tmp_path / "demo" / "checkpoints.lca", "--json").stdout)[
        "losses"
    ]
    assert list(found) == ["train", "validation"]
    for each in found.values():
        assert abs(each["residual"]) <= 1e-3 * abs(each["loss_change"])
        assert each["loss_change"] < -1
        assert each["segments"] == 300
        assert each["unconverged"] == 0
    assert 0 < (tmp_path / "demo" / "report.html").stat().st_size <= MOST_BYTES
    with browser() as chromium, chromium.opened(tmp_path / "demo" / "report.html") as page:
        assert page.faults == []
        assert page.text("#headline .measured").startswith(
            "Loss train over split train (1,500 examples)"
        )


def test_the_demo_does_not_write_over_anything(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused(lca("demo", tmp_path / "mine"), "mine exists and is not empty")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
