"""Write and seal `run.json`, and read it as possibly hostile input."""

from __future__ import annotations

import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path, PurePosixPath
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from ..checkpoints.optimizer_steps import MomentsRecord
from ..checkpoints.trajectory import RESERVED, Checkpoint, TensorSpec
from ..errors import InputError, LCAError, amount
from ..numerics.schema import KEEP, PATH_BAND, DirectionsRecord, SiteRecord
from ..numerics.settings import Settings
from . import disk
from .files import read_json, sealed_json
from .manifest import Identity, LossRecord, Manifest, StoredTensor, starts_between

_Rest = ParamSpec("_Rest")
_Read = TypeVar("_Read")

FORMAT = 6
FILE = "run.json"
_MOST_TENSORS = 100_000
_MOST_LOSSES = 10_000
_LARGEST_INTEGER = 2**63
_KEY = re.compile(r"[A-Za-z0-9._%-]+")
_KINDS = ("parameter", "buffer", "state")
_FIELDS = (
    "format",
    "id",
    "root",
    "tensors",
    "checkpoints",
    "breaks",
    "drawn",
    "span",
    "window",
    "packed",
    "settings",
    "losses",
    "provenance",
)
# fields of a loss that are omitted if None
_RARE = ("begun", "covers", "sites", "per", "rows", "texts")
# exists before `run.json` while a run is created in place
_FIRST = {"lock", "log", "data.zarr", "commits", "partial"}
_TENSOR = ("name", "kind", "shape", "aliases", "unit_axis", "source", "key")

_CACHED = 4
_SETTLED = 0.5  # seconds after which a changed file gets a new modification time
_cache: OrderedDict[tuple[str, tuple[int | str, ...]], Manifest] = OrderedDict()


def write_manifest(manifest: Manifest, run: Path, durable: bool = True) -> None:
    """Write `run.json`.

    Args:
        manifest: of the run.
        run: its directory.
        durable: whether to flush the file to disk before returning.
    """
    disk.write_whole(run / FILE, manifest_bytes(manifest), durable)


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the bytes of `run.json` for a manifest."""
    document = {
        "format": FORMAT,
        "id": manifest.id,
        "root": manifest.root,
        "tensors": [
            {**asdict(tensor.spec), "source": tensor.source, "key": tensor.key}
            for tensor in manifest.tensors
        ],
        "checkpoints": [_entry_of(checkpoint) for checkpoint in manifest.checkpoints],
        "breaks": manifest.breaks,
        # the other starts follow from the breaks
        "drawn": None if manifest.sampled is None else manifest.starts,
        "span": manifest.span,
        "window": manifest.window,
        "packed": manifest.packed,
        "settings": manifest.settings,
        "losses": {name: _written(record) for name, record in manifest.losses.items()},
        "provenance": manifest.provenance,
    }
    return sealed_json(document)


def _entry_of(checkpoint: Checkpoint) -> list[object]:
    """Return the entry of a checkpoint in `run.json`, without moments if there are none."""
    moments = checkpoint.moments
    return [
        checkpoint.step,
        [str(file) for file in checkpoint.files],
        checkpoint.size,
        checkpoint.fingerprint,
        *([] if moments is None else [moments.size, moments.fingerprint]),
    ]


def _written(record: LossRecord) -> dict[str, object]:
    """Return the entry of a loss in `run.json`, without fields that most losses leave empty."""
    return {
        name: value
        for name, value in asdict(record).items()
        if name not in _RARE or value is not None
    }


def exists(run: Path) -> bool:
    """Tell whether a directory is that of a run, readable or not."""
    return disk.exists(run / FILE)


def refuse_other(run: Path) -> None:
    """Refuse to compute a run in a place that holds something else.

    Raises:
        InputError: if the place holds something that is not a run.
    """
    # in this order, because another driver may just be creating the run
    if disk.exists(run) and not exists(run) and not _is_being_created(run):
        raise InputError(
            f"{run} exists and is not a run directory (it has no {FILE}). Choose another place "
            "with --out."
        )


def _is_being_created(run: Path) -> bool:
    """Tell whether a place holds only the first files of a run's creation, in an object store, or
    is a run by now.
    """
    if not disk.is_object_store(run):
        return False
    names = {*disk.names(run)}
    return names <= _FIRST or FILE in names


def read_manifest(run: Path) -> Manifest:
    """Read `run.json`; cache the result until the file changes.

    Raises:
        InputError: if `run` is not a run directory.
        LCAError: if its format is another one, or `run.json` is damaged.
    """
    try:
        return load(run)
    except (ValueError, OSError) as error:
        raise LCAError(f"{run / FILE} cannot be read: {error}. Restore it from a copy.") from None


def load(run: Path) -> Manifest:
    """Read `run.json` as `read_manifest` does, for callers that distinguish damage from other
    failures.

    Raises:
        InputError: if `run` is not a run directory.
        LCAError: if its format is another one.
        ValueError: describes the damage of the file in a few words.
    """
    try:
        state = disk.state(run / FILE)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{run} is not a run directory: it has no {FILE}. Give the directory `lca run` wrote "
            "(CKPTS.lca)."
        ) from None
    key = (str(run.absolute()), state.version)
    cached = _cache.get(key)
    if cached is not None:
        return cached
    manifest = _parse_file(run)
    if time.time() - state.changed > _SETTLED:
        _cache[key] = manifest
        while len(_cache) > _CACHED:
            _cache.popitem(last=False)
    return manifest


def _parse_file(run: Path) -> Manifest:
    document = read_json(run / FILE)
    number = document.get("format")
    if isinstance(number, int) and number != FORMAT:
        raise LCAError(_other_format(run, number, document.get("provenance")))
    return parse(document)


def _other_format(run: Path, number: int, provenance: object) -> str:
    wrote = str(
        provenance.get("lca_posthoc", "unknown") if isinstance(provenance, dict) else "unknown"
    )[:40]
    if number > FORMAT:
        return (
            f"{run} has format {number} of a newer release (lca_posthoc {wrote}); this one reads "
            f"format {FORMAT}. Install that release or a later one."
        )
    return (
        f"{run} has format {number} of an older release (lca_posthoc {wrote}); this one reads "
        f"format {FORMAT}. Read it with that release, or run again into another directory with "
        "--out."
    )


# --- check every field before using any
# ------------------------------------------------------------


def parse(document: dict[str, object]) -> Manifest:
    """Return the manifest of a document, with every field checked.

    Raises:
        ValueError: naming the field that is missing, unknown, or invalid.
    """
    _exactly(document, _FIELDS, "")
    _check(
        re.fullmatch("[0-9a-f]{32}", _text(document["id"], "id")),
        "id",
        "32 hexadecimal digits",
        document["id"],
    )
    checkpoints, settings = _checkpoints(document["checkpoints"]), _settings(document["settings"])
    breaks = _places(document["breaks"], "breaks", checkpoints)
    drawn = _maybe(_places, document["drawn"], "drawn", checkpoints, 1)
    _check((drawn is None) == (settings["segments"] is None), "drawn", "there with segments", drawn)
    manifest = Manifest(
        root=_text(document["root"], "root"),
        tensors=_tensors(document["tensors"]),
        checkpoints=checkpoints,
        starts=starts_between(len(checkpoints), breaks) if drawn is None else drawn,
        breaks=breaks,
        span=_power(document["span"], "span"),
        window=_whole(document["window"], "window", 1),
        packed=_truth(document["packed"], "packed"),
        settings=settings,
        losses=_losses(document["losses"]),
        provenance=_provenance(document["provenance"]),
        id=_text(document["id"], "id"),
    )
    _fits_together(manifest)
    return manifest


def _fits_together(manifest: Manifest) -> None:
    """Check what a single field does not show."""
    _check(manifest.starts, "breaks", "fewer than the segments between checkpoints", "all of them")
    if manifest.settings["signal"] is None:
        with_moments = [one.step for one in manifest.checkpoints if one.moments is not None]
        _check(
            not with_moments, "checkpoints", "without moments, as no causes are told", with_moments
        )
    both = {*manifest.starts} & {*manifest.breaks}
    _check(not both, "drawn", "none of the breaks", sorted(both))
    for record in manifest.losses.values():
        covers = record.covers
        _check(
            covers is None or covers < manifest.segments,
            "losses.covers",
            "fewer segments than the run has",
            covers,
        )
        _check(
            record.texts is None or len(record.texts) == record.examples,
            "losses.texts",
            "as many as examples",
            f"{len(record.texts or ())} entries",
        )
    widest = max((tensor.spec.elements for tensor in manifest.tensors), default=0)
    groups = max((len(record.groups or ()) for record in manifest.losses.values()), default=0)
    rows = max((record.rows or 0 for record in manifest.losses.values()), default=0)
    of_segment = max(widest * max(1, groups), rows * len(manifest.tensors))
    numbers = of_segment * manifest.segments * 8
    _check(
        numbers < _LARGEST_INTEGER,
        "tensors",
        "fewer than 2**63 bytes an array",
        amount(float(numbers)),
    )


def _check(holds: object, field: str, expected: str, value: object) -> None:
    if not holds:
        raise _wrong(field, expected, value)


def _wrong(field: str, expected: str, value: object) -> ValueError:
    shown = repr(value)
    return ValueError(
        f"field {field!r} must be {expected}, found "
        f"{shown if len(shown) <= 60 else shown[:60] + '…'}"
    )


def _exactly(table: object, names: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise _wrong(where or FILE, "a table", table)
    for name in names:
        if name not in table:
            raise ValueError(f"field {where + name!r} is missing")
    for name in table:
        if name not in names:
            raise ValueError(f"field {(where + name)[:60]!r} is unknown")
    return table


def _text(value: object, field: str) -> str:
    _check(isinstance(value, str), field, "text", value)
    return str(value)


def _whole(value: object, field: str, least: int = 0) -> int:
    if type(value) is not int or not least <= value < _LARGEST_INTEGER:
        raise _wrong(field, f"a whole number from {least} on", value)
    return value


def _truth(value: object, field: str) -> bool:
    _check(type(value) is bool, field, "true or false", value)
    return bool(value)


def _power(value: object, field: str) -> int:
    number = _whole(value, field, 1)
    _check(number.bit_count() == 1, field, "a power of two", value)
    return number


def _list(value: object, field: str, most: int = _LARGEST_INTEGER, least: int = 0) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong(field, "a list", value)
    _check(
        least <= len(value) <= most,
        field,
        f"a list of {least} to {most} entries",
        f"{len(value)} entries",
    )
    return list(value)


def _texts(value: object, field: str) -> list[str]:
    return [_text(entry, field) for entry in _list(value, field)]


def _number(value: object, field: str) -> float:
    if type(value) is not int and type(value) is not float:
        raise _wrong(field, "a number", value)
    return float(value)


def _maybe(
    read: Callable[Concatenate[object, _Rest], _Read],
    value: object,
    *rest: _Rest.args,
    **named: _Rest.kwargs,
) -> _Read | None:
    return None if value is None else read(value, *rest, **named)


def _one_of(value: object, field: str, choices: tuple[str, ...]) -> str:
    _check(
        isinstance(value, str) and value in choices, field, f"one of {', '.join(choices)}", value
    )
    return str(value)


def _keys(keys: list[str], field: str) -> None:
    for key in keys:
        _check(
            _KEY.fullmatch(key) and key not in (".", ".."),
            field,
            "letters, digits and . _ % - alone",
            key,
        )
    twice = len({key.casefold() for key in keys}) < len(keys)
    _check(not twice, field, "another one for each", "one that is there twice")


def _tensors(value: object) -> list[StoredTensor]:
    tensors = [_tensor(entry) for entry in _list(value, "tensors", _MOST_TENSORS)]
    _keys([tensor.key for tensor in tensors], "tensors.key")
    names = {tensor.spec.name for tensor in tensors}
    _check(
        len(names) == len(tensors),
        "tensors.name",
        "another one for each",
        "one that is there twice",
    )
    return tensors


def _tensor(value: object) -> StoredTensor:
    entry = _exactly(value, _TENSOR, "tensors.")
    shape = _shape(entry["shape"])
    axis = _maybe(_whole, entry["unit_axis"], "tensors.unit_axis")
    _check(axis is None or axis < len(shape), "tensors.unit_axis", "an axis of the tensor", axis)
    name = _text(entry["name"], "tensors.name")
    kind = _one_of(entry["kind"], "tensors.kind", _KINDS)
    _check(
        kind == "state" or name not in RESERVED,
        "tensors.name",
        f"none of {', '.join(RESERVED)}",
        name,
    )
    aliases = tuple(_texts(entry["aliases"], "tensors.aliases"))
    return StoredTensor(
        TensorSpec(name, kind, shape, aliases, axis),
        source=_text(entry["source"], "tensors.source"),
        key=_text(entry["key"], "tensors.key"),
    )


def _shape(value: object) -> tuple[int, ...]:
    shape = tuple(_whole(extent, "tensors.shape") for extent in _list(value, "tensors.shape", 32))
    elements = math.prod(max(1, extent) for extent in shape)
    _check(elements < _LARGEST_INTEGER, "tensors.shape", "fewer than 2**63 numbers", shape)
    return shape


def _checkpoints(value: object) -> list[Checkpoint]:
    checkpoints: list[Checkpoint] = []
    for entry in _list(value, "checkpoints", least=2):
        checkpoint = _checkpoint(entry)
        _check(
            not checkpoints or checkpoints[-1].step < checkpoint.step,
            "checkpoints",
            "in ascending order of steps",
            checkpoint.step,
        )
        checkpoints.append(checkpoint)
    return checkpoints


def _places(value: object, field: str, checkpoints: list[Checkpoint], least: int = 0) -> list[int]:
    """Return positions of checkpoints that are followed by another one."""
    places = [_whole(place, field) for place in _list(value, field, least=least)]
    _check(len(set(places)) == len(places), field, "another one for each", "one that is twice")
    beyond = [place for place in places if place >= len(checkpoints) - 1]
    _check(not beyond, field, "places of checkpoints before others", beyond)
    return places


def _checkpoint(value: object) -> Checkpoint:
    if not isinstance(value, list) or len(value) not in (4, 6):
        expected = "step, files, size, fingerprint, with moments their size and fingerprint"
        raise _wrong("checkpoints", expected, value)
    step, size, fingerprint = (_whole(value[position], "checkpoints") for position in (0, 2, 3))
    of_moments = [_whole(number, "checkpoints") for number in value[4:]]
    files = _texts(value[1], "checkpoints")
    _check(files, "checkpoints", "files", files)
    for file in files:
        parts = PurePosixPath(file).parts
        inside = parts and ".." not in parts and not file.startswith("/") and "\0" not in file
        _check(inside, "checkpoints", "files below the directory of checkpoints", file)
    moments = MomentsRecord(*of_moments) if of_moments else None
    return Checkpoint(step, tuple(map(Path, files)), size, fingerprint, moments)


def _settings(value: object) -> Settings:
    if not isinstance(value, dict):
        raise _wrong("settings", "a table", value)
    for name, read in (
        ("keep", _text),
        ("shards", _shards),
        ("precision", _text),
        ("precision_check", _text),
        ("tensors", _texts),
    ):
        _check(name in value, f"settings.{name}", "there", "nothing")
        read(value[name], f"settings.{name}")
    for name in ("signal", "segments"):
        _check(name in value, f"settings.{name}", "there", "nothing")
        _maybe(_text, value[name], f"settings.{name}")
    if "directions" in value:
        _directions(value["directions"])
    if "places" in value:
        _texts(value["places"], "settings.places")
    _one_of(value["keep"], "settings.keep", KEEP)
    _check("path_band" in value, "settings.path_band", "there", "nothing")
    _one_of(value["path_band"], "settings.path_band", PATH_BAND)
    return cast("Settings", dict(value))


def _shards(value: object, field: str) -> int:
    return _whole(value, field, 1)


def _directions(value: object) -> None:
    entry = _exactly(value, tuple(DirectionsRecord.__annotations__), "settings.directions.")
    _text(entry["file"], "settings.directions.file")
    _whole(entry["digest"], "settings.directions.digest")
    count = _whole(entry["directions"], "settings.directions.directions", 1)
    labels = _texts(entry["labels"], "settings.directions.labels")
    _check(
        len(labels) in (0, count), "settings.directions.labels", "one for each direction", labels
    )


def _losses(value: object) -> dict[str, LossRecord]:
    if not isinstance(value, dict):
        raise _wrong("losses", "a table", value)
    _check(len(value) <= _MOST_LOSSES, "losses", f"at most {_MOST_LOSSES}", len(value))
    losses = {name: _loss(entry) for name, entry in value.items()}
    _keys([record.key for record in losses.values()], "losses.key")
    return losses


def _loss(document: object) -> LossRecord:
    if isinstance(document, dict):
        document = {"scale": None, **dict.fromkeys(_RARE), **document}
    entry = _exactly(document, tuple(setting.name for setting in fields(LossRecord)), "losses.")
    groups, counts = entry["groups"], entry["counts"]
    if groups is not None or counts is not None:
        _check_groups(groups, counts)
    identity = _identity(entry["identity"])
    _check(type(entry["measured"]) is bool, "losses.measured", "true or false", entry["measured"])
    per = (None, "example", "element")
    _check(entry["per"] in per, "losses.per", '"example", "element" or nothing', entry["per"])
    _check((entry["per"] is None) == (entry["rows"] is None), "losses.rows", "there with per", "")
    return LossRecord(
        key=_text(entry["key"], "losses.key"),
        on=_maybe(_text, entry["on"], "losses.on"),
        kind=_text(entry["kind"], "losses.kind"),
        examples=_whole(entry["examples"], "losses.examples"),
        total=_whole(entry["total"], "losses.total"),
        groups=groups,
        counts=counts,
        block=_maybe(_whole, entry["block"], "losses.block", 1),
        along=_maybe(_text, entry["along"], "losses.along"),
        replicates=_whole(entry["replicates"], "losses.replicates"),
        batch_size=_whole(entry["batch_size"], "losses.batch_size"),
        calibration=_maybe(_number, entry["calibration"], "losses.calibration"),
        measured=entry["measured"],
        identity=identity,
        unit=_power_of_two(entry["unit"], "losses.unit"),
        scale=_maybe(_number, entry["scale"], "losses.scale"),
        begun=_maybe(_begun, entry["begun"]),
        covers=_maybe(_whole, entry["covers"], "losses.covers", 1),
        sites=_maybe(_sites, entry["sites"]),
        per=entry["per"],
        rows=_maybe(_whole, entry["rows"], "losses.rows", 1),
        texts=_maybe(_texts, entry["texts"], "losses.texts"),
    )


def _sites(value: object) -> list[SiteRecord]:
    return [_site(site) for site in _list(value, "losses.sites")]


def _site(value: object) -> SiteRecord:
    site = _exactly(value, ("operation", "tensors", "axis", "is_inner"), "losses.sites.")
    tensors = _list(site["tensors"], "losses.sites.tensors")
    _check(type(site["is_inner"]) is bool, "losses.sites.is_inner", "true or false", value)
    return {
        "operation": _text(site["operation"], "losses.sites.operation"),
        "tensors": [_text(name, "losses.sites.tensors") for name in tensors],
        "axis": _maybe(_whole, site["axis"], "losses.sites.axis"),
        "is_inner": site["is_inner"],
    }


def _begun(value: object) -> list[int]:
    numbers = [_whole(number, "losses.begun") for number in _list(value, "losses.begun")]
    _check(len(numbers) == 3 and numbers[0] > 0, "losses.begun", "segments, size, CRC-32", value)
    return numbers


def _power_of_two(value: object, field: str) -> float:
    number = _number(value, field)
    _check(number > 0 and math.frexp(number)[0] == 0.5, field, "a power of two", value)
    return number


def _check_groups(groups: Any, counts: object) -> None:
    number = len(_list(groups, "losses.groups", least=1))
    kind = type(groups[0])
    same = kind in (int, str) and all(type(label) is kind for label in groups)
    _check(
        same and len(set(groups)) == number,
        "losses.groups",
        "different whole numbers, or texts",
        groups,
    )
    counted = [_whole(count, "losses.counts") for count in _list(counts, "losses.counts")]
    _check(len(counted) == number, "losses.counts", "as many as groups", f"{len(counted)} entries")
    if kind is int:
        _check(
            all(-_LARGEST_INTEGER <= label < _LARGEST_INTEGER for label in groups),
            "losses.groups",
            "64-bit numbers",
            groups,
        )


def _identity(value: object) -> Identity:
    identity = _list(value, "losses.identity")
    _check(len(identity) == 2, "losses.identity", "two entries", identity)
    for place in identity:
        _check(
            place is None or isinstance(place, dict), "losses.identity", "a table or nothing", place
        )
        for number in (place or {}).values():
            _number(number, "losses.identity")
    return identity


def _provenance(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong("provenance", "a table", value)
    for name, read in (("task_sha256", _text), ("task_losses", _texts)):
        _check(name in value, f"provenance.{name}", "there", "nothing")
        read(value[name], f"provenance.{name}")
    return dict(value)
