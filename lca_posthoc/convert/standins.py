"""Unpickle the tensors and plain data that torch.save wrote, with stand-ins for objects of other
classes.

A stand-in is a class of this module: it accepts the arguments that a file gives to another class,
and does nothing with them. No class that a file names is imported, and no function it names is
called. Numpy numbers are skipped too, because numpy follows pointers in the values a file provides.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import sys
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import InputError, few

_HARMLESS = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|pathlib\.(_local\.)?\w*Path|collections\.(defaultdict|deque|ChainMap)"
    r"|datetime\.\w+|zoneinfo\.ZoneInfo(\._unpickle)?|decimal\.Decimal|fractions\.Fraction|uuid\.\w+|enum\.\w+|random\.Random"
    r"|(__builtin__|builtins)\.(int|long|unicode|float|str|bool|list|dict|tuple|frozenset|bytes|slice|range|object|type|NoneType)"
    r"|logging\.(Logger|\w*Handler|Formatter|PlaceHolder|getLogger)|copy_reg\._reconstructor|copyreg\._reconstructor"
    r"|numpy\.(ndarray|dtype|dtypes\.\w+|random\.\w[\w.]*|(bool|int|uint|float|complex|str|bytes|datetime|timedelta|void|object)\w*)"
    r"|numpy\.(core|_core)\.multiarray\.(scalar|_reconstruct)|numpy\.(core|_core)\.numeric\._frombuffer"
    r"|torch\.optim\.lr_scheduler\.\w+|torch\.optim\.swa_utils\.\w+|torch\.(cuda\.)?amp\.grad_scaler\.\w+"
)
_MAPPINGS = re.compile(
    r"collections\.defaultdict|easydict\.EasyDict|addict\.(addict\.)?Dict|yacs\.config\.CfgNode|(\w+\.)*(ConfigDict|AttrDict|CfgNode|Munch)"
)
_CLASS = re.compile(r"([A-Za-z_]\w*\.)+_*[A-Z]\w*")
_OLD_NAMES = frozenset(IMPORT_MAPPING)  # Python 2's names of modules, which pickles still use
_MARK = "_read_past"


class LeftOut:
    """Stand in for a skipped object: accept arguments and a state, and keep them only to look for
    tensors in them.
    """

    _inside: list[object]

    def __new__(cls, *arguments: object, **named: object) -> LeftOut:
        """Accept the arguments of the class it stands for.

        Args:
            arguments: positional arguments from the pickle.
            named: keyword arguments from the pickle.
        """
        self = super().__new__(cls)
        self._inside = [arguments, named]
        return self

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self._inside.append(state)


class LeftOutMapping:
    """Stand in for a mapping class, which pickle fills item by item: calling it returns a marked
    `OrderedDict`.
    """

    def __new__(cls, *arguments: object, **named: object) -> Any:
        """Return the mapping for pickle to fill.

        Args:
            arguments: positional arguments from the pickle.
            named: keyword arguments from the pickle.
        """
        mapping: Any = OrderedDict()
        mapping.__dict__[_MARK] = cls
        mapping.__dict__["_inside"] = [arguments, named]
        return mapping


def is_left_out(value: object) -> bool:
    """Return whether a value stands for a skipped object."""
    return isinstance(value, LeftOut) or (type(value) is OrderedDict and _MARK in vars(value))


def class_of(value: object) -> str:
    """Return the name of the class that a file named in place of this value."""
    kind = vars(value)[_MARK] if type(value) is OrderedDict else type(value)
    return str(getattr(kind, "__name__", kind))


def holds_tensors_inside(value: object) -> bool:
    """Return whether a skipped object received a tensor, at any depth."""
    if not is_left_out(value):
        return False
    seen, waiting = set[int](), [value]
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, torch.Tensor):
            return True
        if isinstance(current, LeftOut):
            waiting += current._inside
        elif isinstance(current, Mapping):
            waiting += current.values()
            waiting += vars(current).values() if hasattr(current, "__dict__") else ()
        elif isinstance(current, list | tuple | set | frozenset):
            waiting += current
    return False


def compare_checksums(file: Path, data: BinaryIO | None = None) -> None:
    """Check that an archive matches its checksums, which torch itself does not compare.

    Args:
        file: path of the file, also for messages.
        data: bytes of the archive, if it is only a part of the file.

    Raises:
        InputError: if it is damaged.
    """
    source = file if data is None else data
    if not zipfile.is_zipfile(source):
        return
    record = None
    try:
        with zipfile.ZipFile(source) as archive:
            for record in archive.infolist():
                with archive.open(record) as opened:
                    while record.CRC and opened.read(2**20):  # 0 if torch was told to write none
                        pass
    except Exception as error:
        name = record.filename if record else "its list of contents"
        raise InputError(
            f"{file} is damaged: {name} does not match its checksum ({type(error).__name__}). "
            "Copy it again, or move it away."
        ) from None


def unpickled(file: Path, data: BinaryIO | None = None) -> tuple[Any, list[str]]:
    """Read the tensors and plain data that `torch.save` wrote, and a note on objects of other
    classes.

    Args:
        file: path of the file, also for messages.
        data: bytes that `torch.save` wrote, if they are only a part of the file.

    Raises:
        InputError: if the file names a function, or a class that can hold the weights themselves,
            or is damaged.
    """
    source = file if data is None else data
    is_archive = zipfile.is_zipfile(source)
    globals_ = _globals(source, is_archive)
    read_past = [name for name in globals_ if _is_read_past(name)]
    foreign = [name for name in read_past if not _HARMLESS.fullmatch(name)]
    refused: Exception | None = None
    # only loading shows whether an unknown class is a mapping, so try both
    for mappings in ([], foreign) if foreign else ([],):
        stand_ins: list[Any] = [
            _stand_in(name, mapping=name in mappings or bool(_MAPPINGS.fullmatch(name)))
            for name in read_past
        ]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns about old files
                with torch.serialization.safe_globals(stand_ins):
                    if data is not None:
                        data.seek(0)
                    saved = torch.load(
                        source,
                        map_location="cpu",
                        weights_only=True,
                        mmap=is_archive and data is None,
                    )
            return saved, _notes(foreign)
        except Exception as error:
            refused = refused or error
    others = [name for name in globals_ if name not in read_past]
    raise InputError(_refusal(file, refused, others, foreign))


def _notes(foreign: list[str]) -> list[str]:
    return (
        [
            f"skipped objects of {few(foreign, 6)} beside the weights: these classes are neither "
            "imported nor called"
        ]
        if foreign
        else []
    )


def _refusal(file: Path, error: Exception | None, others: list[str], foreign: list[str]) -> str:
    if isinstance(error, pickle.UnpicklingError) or foreign:
        names = few(others or foreign)
        what = (
            f"holds more than tensors and plain data ({names})"
            if names
            else "is damaged, or holds more than tensors and plain data"
        )
        return (
            f"{file} {what}, and is not loaded: that could run any code. If you trust it, load "
            "it with weights_only=False where its modules can be imported, and save only its state "
            "dict with torch.save."
        )
    what = (str(error).splitlines() or [""])[0][:200]
    return (
        f"{file} cannot be read as a checkpoint ({type(error).__name__}: {what}). Save it again, "
        "or move it away."
    )


def _stand_in(name: str, *, mapping: bool) -> tuple[Any, str]:
    """Return a new stand-in class for each class that a file names, so that its name shows what it
    stands for.
    """
    base = LeftOutMapping if mapping else LeftOut
    return type(name, (base,), {}), name


def _is_read_past(name: str) -> bool:
    """Return whether a stand-in may replace a name that a file contains.

    It may replace classes of the standard library, numpy and torch that are listed by name, and
    classes of other packages and scripts, as far as names distinguish them from functions; never a
    class of tensors.
    """
    if _HARMLESS.fullmatch(name):
        return True
    root, last = name.partition(".")[0], name.rpartition(".")[2]
    if root in sys.stdlib_module_names or root in _OLD_NAMES or root == "numpy":
        return False
    if re.search("Tensor|Parameter|Storage", last) or (
        root == "torch" and not name.startswith("torch.nn.modules.")
    ):
        return False
    return _CLASS.fullmatch(name) is not None


def _globals(source: Path | BinaryIO, is_archive: bool) -> list[str]:
    """Return the functions and classes that a pickle names besides those torch allows, without
    executing it.
    """
    try:
        if is_archive:
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(source))
        names = set[str]()
        opened_here = source.open("rb") if isinstance(source, Path) else nullcontext(source)
        with opened_here as opened:
            for _ in range(4):  # a number, a version, the system, what was saved
                for opcode, argument, _ in pickletools.genops(opened):
                    if opcode.name == "GLOBAL":
                        module, _, name = str(argument).partition(" ")
                        module, name = NAME_MAPPING.get(
                            (module, name), (IMPORT_MAPPING.get(module, module), name)
                        )
                        names.add(f"{module}.{name}")
        return sorted(
            name
            for name in names
            if _is_read_past(name) or not name.startswith(("torch.", "collections."))
        )
    except Exception:  # damaged, or not a pickle: loading it reports the error
        return []
