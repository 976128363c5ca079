"""Define the settings that determine a run's results in one table: allowed values, default and help
text; recorded settings never change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, NotRequired, TypedDict, cast, get_args, get_type_hints

from ..errors import InputError
from .precisions import PRECISIONS
from .quadrature import RULES
from .sampling import SegmentSample
from .schema import (
    KEEP,
    KEEP_OF_A_SAMPLE,
    PATH_BAND,
    DirectionsRecord,
    RecalibrationRecord,
)

Value = str | int | float | list[str] | None


def option_of(name: str) -> str:
    """Return the command line option of a setting.

    >>> option_of("batch_size")
    '--batch-size'
    """
    return "--" + name.replace("_", "-")


def _as_tolerance(name: str, value: object) -> Value:
    """Return a tolerance in its recorded form: a number, "inf", or a share such as "0.1%".

    Raises:
        InputError: if it is none of these.
    """
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
            f"{option_of(name)} must be a positive number in units of loss, a share of the loss at "
            f"the first checkpoint between 0% and 100% such as 0.1%, or inf, got {value}."
        )
    return number if number < float("inf") else "inf"


def _as_batch_size(name: str, value: object) -> Value:
    """Return a valid batch size.

    Raises:
        InputError: if it is less than 1.
    """
    size = cast("int", value)
    if size < 1:
        raise InputError(f"{option_of(name)} must be 1 or more, got {size}.")
    return size


def _as_segments(name: str, value: object) -> Value:
    """Return the recorded form of a random sample of the segments."""
    return str(SegmentSample.parse(str(value)))


def _as_shards(name: str, value: object) -> Value:
    """Return a number of shards, given as a number or as text.

    Raises:
        InputError: if it is neither.
    """
    text = str(value).strip()
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{option_of(name)} must be auto, or a number from 1 on, got {value}.")
    return int(text)


def _as_list(name: str, value: object) -> Value:
    """Return the values of a repeatable setting."""
    return list(cast("list[str]", value))


def _as_it_is(name: str, value: object) -> Value:
    return cast("Value", value)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Describe a setting: its values and its help text.

    Attributes:
        help: the help text, one sentence.
        default: value recorded if nothing is requested; None if it is chosen later or there is
            nothing to record.
        shown_default: the default in the help text; empty for none.
        choices: all allowed values; empty if they cannot be listed.
        automatic: whether the command line accepts "auto" for the default.
        metavar: placeholder of the value in the help text; None if choices or type suffice.
        type: type that the command line converts the value to.
        normalise: checks a value and returns its recorded form.
    """

    help: str
    default: Value = None
    shown_default: str = ""
    choices: tuple[str, ...] = ()
    automatic: bool = False
    metavar: str | None = None
    type: type[int] | type[str] = str
    normalise: Callable[[str, object], Value] = _as_it_is

    @property
    def repeatable(self) -> bool:
        """Return whether it takes any number of values."""
        return isinstance(self.default, list)


class Settings(TypedDict):
    """Define the settings that a run records, in order; `SETTINGS` is derived from this class.

    `statistics` holds what recalibration determined when the run was created; other modes have
    none. `directions` is the file of `--along`, if given. `places` are the places of the
    checkpoints below their root; a run of one directory has none.
    """

    rule: Annotated[
        str,
        Setting(
            help="Quadrature; simpson and trapezoid are refined.",
            default="simpson",
            shown_default="simpson",
            choices=tuple(RULES),
        ),
    ]
    tolerance: Annotated[
        float | str,
        Setting(
            help="Bound on |residual| per segment and loss, in units of loss, or as a share of the "
            "loss at the first checkpoint, such as 0.1%; inf never refines.",
            default=1e-3,
            shown_default="1e-3; inf for bfloat16",
            metavar="NUMBER|SHARE%",
            normalise=_as_tolerance,
        ),
    ]
    allocation_tolerance: Annotated[
        float | str,
        Setting(
            help="Bound on the allocation's own error, Σ|A − A*|, in the same form.",
            default="inf",
            shown_default="inf",
            metavar="NUMBER|SHARE%",
            normalise=_as_tolerance,
        ),
    ]
    keep: Annotated[
        str | None,
        Setting(
            help="What to store; each level holds those before it.",
            shown_default="auto: the highest level that fits",
            choices=KEEP,
            automatic=True,
        ),
    ]
    shards: Annotated[
        int | None,
        Setting(
            help="With --keep tensors or units: cut the data of every segment into N shards, so that "
            "few segments keep many workers busy; 1 cuts nothing.",
            shown_default="auto: one for each worker if segments are few",
            metavar="auto|N",
            normalise=_as_shards,
        ),
    ]
    batch_size: Annotated[
        int | None,
        Setting(
            help="Examples per batch.",
            shown_default="chosen from shapes",
            type=int,
            normalise=_as_batch_size,
        ),
    ]
    device: Annotated[
        str | None,
        Setting(
            help="Where to compute.",
            shown_default="auto: cuda, else cpu",
            choices=("cuda", "cpu"),
            automatic=True,
        ),
    ]
    precision: Annotated[
        str,
        Setting(
            help="Precision of forward and backward passes; its error is measured.",
            default="float32",
            shown_default="float32",
            choices=tuple(PRECISIONS),
        ),
    ]
    precision_check: Annotated[
        str,
        Setting(
            help="Examples for measuring the error of the precision on a few segments: a sample, or "
            "all of them.",
            default="sample",
            shown_default="sample",
            choices=("sample", "full"),
        ),
    ]
    norm_stats: Annotated[
        str,
        Setting(
            help="Statistics of normalisation layers: stored, of each batch, or recomputed at each "
            "checkpoint.",
            default="running",
            shown_default="running",
            choices=("running", "batch", "recalibrated"),
        ),
    ]
    tensors: Annotated[
        list[str],
        Setting(
            help="Keep only tensors that match, such as 'fc1.*' (repeatable); the others become "
            "one remainder.",
            default=[],
            metavar="PATTERN",
            normalise=_as_list,
        ),
    ]
    subset: Annotated[
        list[str],
        Setting(
            help="Use only some examples: A:B, I,J,K, or FRACTION@SEED drawn at random "
            "(repeatable).",
            default=[],
            metavar="[SPLIT=]WHICH",
            normalise=_as_list,
        ),
    ]
    signal: Annotated[
        str | None,
        Setting(
            help="With --causes: the training loss, whose full gradient is the signal.",
            shown_default="the first of the losses",
            metavar="LOSS",
        ),
    ]
    path_band: Annotated[
        str | None,
        Setting(
            help="Estimate how much another path through the same checkpoints would change, on "
            "segments longer than one step; takes one or two more evaluations for each.",
            shown_default="auto: on if there are such segments",
            choices=PATH_BAND,
            automatic=True,
        ),
    ]
    steps: Annotated[
        str | None,
        Setting(
            help="Training steps: comma-separated ranges, which include both ends and take every K-th "
            "checkpoint, and single steps. Nothing is replayed between two ranges.",
            metavar="A:B[:K],S,…",
        ),
    ]
    segments: Annotated[
        str | None,
        Setting(
            help="Replay a random sample of the segments, such as 0.1@7 for a tenth; totals get "
            "standard errors. A larger fraction with the same seed extends the sample.",
            shown_default="all",
            metavar="FRACTION@SEED",
            normalise=_as_segments,
        ),
    ]
    pattern: Annotated[
        str | None,
        Setting(help=r"Find (?P<step>\d+) in names of checkpoints.", metavar="REGEX"),
    ]
    rename: Annotated[
        list[str],
        Setting(
            help="Rename tensors; OLD is a regular expression; an empty new name leaves a tensor out "
            "(repeatable).",
            default=[],
            metavar="OLD=NEW",
            normalise=_as_list,
        ),
    ]
    statistics: NotRequired[RecalibrationRecord]
    directions: NotRequired[DirectionsRecord]
    places: NotRequired[list[str]]


SETTINGS: dict[str, Setting] = {
    name: entry
    for name, hint in get_type_hints(Settings, include_extras=True).items()
    for entry in get_args(hint)
    if isinstance(entry, Setting)
}
DEFAULTS: dict[str, Value] = {name: setting.default for name, setting in SETTINGS.items()}


def resolve(requested: Mapping[str, object], recorded: Settings | None) -> Settings:
    """Merge requested settings with the recorded ones or the defaults; a recorded setting never
    changes.

    Args:
        requested: settings by name; None, "auto" or an empty list request nothing.
        recorded: settings of an existing run, or None.

    Raises:
        InputError: if a setting is not one of its choices, or differs from the recorded one.
    """
    chosen = {name: _checked(name, value) for name, value in requested.items() if _is_asked(value)}
    if recorded is not None:
        segments = _grown(chosen.pop("segments", None), recorded["segments"])
        _refuse_another(chosen, recorded)
        return {**recorded, "segments": segments}
    settings = cast("Settings", {**DEFAULTS, **chosen})
    _refuse_levels_of_a_sample(settings)
    if "tolerance" not in chosen and not PRECISIONS[settings["precision"]].refined:
        settings["tolerance"] = "inf"
    return settings


def _grown(asked: Value, recorded: str | None) -> str | None:
    """Return the sample of the segments that a run shall have: the recorded one, or a larger one
    with the same seed.

    Raises:
        InputError: if another sample is requested.
    """
    if asked is None or asked == recorded:
        return recorded
    if recorded is None:
        raise InputError(
            f"this run was made with all segments, not with --segments {asked}. Leave --segments out "
            "to resume it, or write another run with --out."
        )
    before, now = SegmentSample.parse(recorded), SegmentSample.parse(str(asked))
    if before.seed != now.seed:
        raise InputError(
            f"this run was made with --segments {recorded}, and another seed than {before.seed} "
            "draws other segments. Leave --segments out to resume it, give a larger fraction with "
            "its seed to extend it, or write another run with --out."
        )
    if now.fraction < before.fraction:
        raise InputError(
            f"this run was made with --segments {recorded}, which includes {asked}: there is "
            "nothing to do. Leave --segments out to resume it, give a larger fraction to extend "
            "it, or write another run with --out."
        )
    return str(now)


def _refuse_levels_of_a_sample(settings: Settings) -> None:
    """Reject a level of `--keep` that needs all segments if only a random sample is replayed.

    Raises:
        InputError: if the settings combine the two.
    """
    if settings["segments"] is not None and settings["keep"] not in (None, *KEEP_OF_A_SAMPLE):
        raise InputError(
            f"--keep {settings['keep']} needs every segment: a random sample, --segments "
            f"{settings['segments']}, does not show how often parameters help and turn over time. "
            f"Give --keep {' or '.join(KEEP_OF_A_SAMPLE)}, or leave --segments out."
        )


def on_device(settings: Settings, device: str | None) -> Settings:
    """Return settings with the device they are for, once it is known.

    Args:
        settings: the settings.
        device: "cuda" or "cpu"; None if not known yet.

    Raises:
        InputError: if the precision needs another device.
    """
    precision = settings["precision"]
    if PRECISIONS[precision].needs_gpu and device != "cuda":
        raise InputError(f"--precision {precision} needs a GPU. Use float32, or bfloat16.")
    return {**settings, "device": device}


def _is_asked(value: object) -> bool:
    """Return whether a value requests something other than the default."""
    return not (value is None or value == "auto" or (isinstance(value, list | tuple) and not value))


def _checked(name: str, value: object) -> Value:
    """Return the recorded form of a requested setting.

    Raises:
        InputError: if the setting does not exist or its value is invalid.
    """
    if name not in SETTINGS:
        raise InputError(f"{name} is not a setting of a run. Those are {', '.join(SETTINGS)}.")
    setting = SETTINGS[name]
    if setting.choices and value not in setting.choices:
        raise InputError(f"{option_of(name)} {value!r} is not one of {', '.join(setting.choices)}.")
    return setting.normalise(name, value)


def _refuse_another(chosen: Mapping[str, Value], recorded: Mapping[str, object]) -> None:
    """Reject settings that differ from those a run was made with.

    Raises:
        InputError: if any do.
    """
    other = [name for name, value in chosen.items() if recorded[name] != value]
    if other:
        before = " ".join(_shown(name, recorded[name]) for name in other)
        asked_for = " ".join(_shown(name, chosen[name]) for name in other)
        raise InputError(
            f"this run was made with {before}, not {asked_for}. Leave "
            f"{' and '.join(map(option_of, other))} out to resume it, or write another run "
            "with --out."
        )


def _shown(name: str, value: object) -> str:
    option = option_of(name)
    if isinstance(value, list):
        return " ".join(f"{option} {item}" for item in value) or f"no {option}"
    if name == "shards" and value == 1:  # explain the number
        return f"{option} 1 (its data not cut)"
    return f"no {option}" if value is None else f"{option} {value}"
