"""Unpickle what torch.save wrote as tensors and plain data, with stand-ins for objects of other
classes.

A stand-in is a class of this module: it takes the arguments a file has for another class, and does
nothing with them. No class that a file names is imported, no function it names is called. Numbers
of numpy are read past too, since numpy follows pointers in the values a file gives it.
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
_OLD_NAMES = frozenset(IMPORT_MAPPING)  # what Python 2 called its modules, as pickles still do
_MARK = "_read_past"


class LeftOut:
    """The stand-in of an object that is read past: it takes arguments and a state, and keeps them
    only to look for tensors in them.
    """

    _inside: list[object]

    def __new__(cls, *arguments: object, **named: object) -> LeftOut:
        """Take the arguments of the class it stands for."""
        self = super().__new__(cls)
        self._inside = [arguments, named]
        return self

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self._inside.append(state)


class LeftOutMapping:
    """The stand-in of a class of mappings, which pickle fills item by item: calling it gives an
    `OrderedDict`, marked.
    """

    def __new__(cls, *arguments: object, **named: object) -> Any:
        """Return the mapping for pickle to fill."""
        mapping: Any = OrderedDict()
        mapping.__dict__[_MARK] = cls
        mapping.__dict__["_inside"] = [arguments, named]
        return mapping


def is_left_out(value: object) -> bool:
    """Tell whether a value stands for an object that was read past."""
    return isinstance(value, LeftOut) or (type(value) is OrderedDict and _MARK in vars(value))


def class_of(value: object) -> str:
    """Return the name of the class a file asked for where this value stands."""
    kind = vars(value)[_MARK] if type(value) is OrderedDict else type(value)
    return str(getattr(kind, "__name__", kind))


def holds_tensors_inside(value: object) -> bool:
    """Tell whether an object that was read past was given a tensor, however deep."""
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
    """Refuse an archive whose contents do not match their checksums, which torch itself does not
    compare.

    Args:
        file: that names it in messages.
        data: its bytes, where they are a part of the file.

    Raises:
        InputError: where it is damaged.
    """
    source = file if data is None else data
    if not zipfile.is_zipfile(source):
        return
    record = None
    try:
        with zipfile.ZipFile(source) as archive:
            for record in archive.infolist():
                with archive.open(record) as opened:
                    while record.CRC and opened.read(2**20):  # 0 where torch was told to write none
                        pass
    except Exception as error:
        name = record.filename if record else "its list of contents"
        raise InputError(
            f"{file} is damaged: {name} is not what its checksum says ({type(error).__name__}). "
            "Copy it again, or move it away."
        ) from None


def unpickled(file: Path, data: BinaryIO | None = None) -> tuple[Any, list[str]]:
    """Return the tensors and plain data that `torch.save` wrote, and a note on the objects of other
    classes among them.

    Args:
        file: that it wrote.
        data: what it wrote, where that is a part of the file.

    Raises:
        InputError: where the file names a function or a class that can hold the weights themselves;
            or is damaged.
    """
    source = file if data is None else data
    is_archive = zipfile.is_zipfile(source)
    globals_ = _globals(source, is_archive)
    read_past = [name for name in globals_ if _is_read_past(name)]
    foreign = [name for name in read_past if not _HARMLESS.fullmatch(name)]
    refused: Exception | None = None
    # of a class nobody knows, whether it is a mapping shows when it is filled
    for mappings in ([], foreign) if foreign else ([],):
        stand_ins: list[Any] = [
            _stand_in(name, mapping=name in mappings or bool(_MAPPINGS.fullmatch(name)))
            for name in read_past
        ]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the age of a file
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
    raise _refusal(file, refused, [name for name in globals_ if name not in read_past], foreign)


def _notes(foreign: list[str]) -> list[str]:
    return (
        [
            f"read past objects of {few(foreign, 6)} beside the weights: none of these classes is "
            "imported, none is made"
        ]
        if foreign
        else []
    )


def _refusal(
    file: Path, error: Exception | None, others: list[str], foreign: list[str]
) -> InputError:
    if isinstance(error, pickle.UnpicklingError) or foreign:
        names = few(others or foreign)
        what = (
            f"holds more than tensors and plain data ({names})"
            if names
            else "is damaged, or holds more than tensors and plain data"
        )
        return InputError(
            f"{file} {what}, and is not loaded: that could run any code. Where you trust it, load "
            "it with weights_only=False where its modules can be imported, and save its state dict "
            "alone with torch.save."
        )
    what = (str(error).splitlines() or [""])[0][:200]
    return InputError(
        f"{file} cannot be read as a checkpoint ({type(error).__name__}: {what}). Save it again, "
        "or move it away."
    )


def _stand_in(name: str, *, mapping: bool) -> tuple[Any, str]:
    """Return a new stand-in class for a class that a file names: one for each, so that its name
    tells what it stands for.
    """
    base = LeftOutMapping if mapping else LeftOut
    return type(name, (base,), {}), name


def _is_read_past(name: str) -> bool:
    """Tell whether a stand-in may take the place of a name that a file asks for.

    It may for settings of the standard library, numpy and torch, listed by name, and for classes of
    other packages and scripts, as far as names tell them from functions; never for a class of
    tensors.
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
    """Return the functions and classes a pickle asks for beside those torch allows, without running
    it.
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
    except Exception:  # damaged, or no pickle: loading it says so
        return []
