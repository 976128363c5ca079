"""The settings that decide a run's results: their defaults, what they may be, and that a recorded
one is never changed.
"""

from __future__ import annotations

from typing import Any

from .errors import InputError
from .quadrature import RULES
from .schema import KEEP

Settings = dict[str, Any]

DEFAULTS: dict[str, Any] = {
    "rule": "simpson",
    "tolerance": 1e-3,
    "allocation_tolerance": "inf",
    "keep": "parameters",
    "batch_size": None,
    "device": None,
    "precision": "float32",
    "norm_stats": "running",
    "tensors": [],
    "subset": [],
    "steps": None,
    "pattern": None,
    "rename": [],
}
CHOICES = {
    "rule": tuple(RULES),
    "keep": KEEP,
    "precision": ("float32", "tf32", "bfloat16", "float64"),
    "norm_stats": ("running", "batch", "recalibrated"),
    "device": ("cpu", "cuda"),
}


def resolve(asked: dict[str, Any], recorded: dict[str, Any] | None) -> dict[str, Any]:
    """Return the settings that were asked for, over the recorded ones or the defaults; a recorded
    setting is never changed.

    Raises:
        InputError: where a setting is not one of its choices, or differs from what is recorded.
    """
    chosen = {
        name: value
        for name, value in asked.items()
        if not (value is None or (isinstance(value, list | str) and value in ([], "auto")))
    }
    for name, value in chosen.items():
        if name in CHOICES and value not in CHOICES[name]:
            raise InputError(f"{_option(name)} {value!r} is not one of {', '.join(CHOICES[name])}.")
    for name in ("tolerance", "allocation_tolerance"):
        if name in chosen:
            chosen[name] = _positive(name, chosen[name])
    if chosen.get("batch_size") is not None and chosen["batch_size"] < 1:
        raise InputError(f"--batch-size must be 1 or more, got {chosen['batch_size']}.")
    if recorded is None:
        settings = {**DEFAULTS, **chosen}
        if settings["precision"] == "bfloat16" and "tolerance" not in chosen:
            # the losses at both ends are rounded by more than halving could mend
            settings["tolerance"] = "inf"
        return settings
    other = [name for name, value in chosen.items() if recorded[name] != value]
    if other:
        before = " ".join(_shown(name, recorded[name]) for name in other)
        asked_for = " ".join(_shown(name, chosen[name]) for name in other)
        raise InputError(
            f"this run was made with {before}, not {asked_for}. Leave "
            f"{' and '.join(map(_option, other))} out to go on with it, "
            "or write another run with --out."
        )
    return recorded


def on_device(settings: Settings, device: str | None) -> Settings:
    """Return settings with the device they are for, once it is known."""
    if settings["precision"] == "tf32" and device != "cuda":
        raise InputError("--precision tf32 needs a GPU. Use float32, or bfloat16.")
    return {**settings, "device": device}


def _shown(name: str, value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{_option(name)} {item}" for item in value) or f"no {_option(name)}"
    return f"no {_option(name)}" if value is None else f"{_option(name)} {value}"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _positive(name: str, value: Any) -> float | str:
    """Return a tolerance as it is recorded: a number, "inf", or a share such as "0.1%"."""
    text = str(value).strip()
    share = text.endswith("%")
    try:
        number = float(text[:-1] if share else text)
    except ValueError:
        number = float("nan")
    if share and 0 < number < 100:
        return f"{repr(number).removesuffix('.0')}%"
    if share or not number > 0:
        raise InputError(
            f"{_option(name)} must be a positive number in units of loss, a share of the loss at "
            f"the first checkpoint between 0% and "
            f"100% such as 0.1%, or inf, got {value}."
        )
    return number if number < float("inf") else "inf"
