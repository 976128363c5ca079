"""The schemas of what `--json` prints, and what is wrong with a document by them."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from jsonschema import Draft202012Validator

FILES = resources.files("lca_posthoc.cli") / "schemas"
SCHEMA_OF = {"run": "summary"}  # of commands that print the document of another
Json = Any  # what `json` reads


def schema_of(command: str) -> dict[str, Json]:
    """The schema of what a command prints."""
    text = (FILES / f"{SCHEMA_OF.get(command, command)}.json").read_text()
    return dict(json.loads(text))


def faults(command: str, printed: Json) -> list[str]:
    """What is wrong with a document that a command printed, and where."""
    return [
        f"{error.json_path}: {error.message[:300]}"
        for error in Draft202012Validator(schema_of(command)).iter_errors(printed)
    ]
