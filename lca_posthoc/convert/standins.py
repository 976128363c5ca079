"""Unpickle what torch.save wrote as tensors and plain data, with stand-ins for objects of other classes.

A stand-in is one of ours: it takes what a file would have given to a class, and does nothing with it. No class that a file names is
imported, no function it names is called. Numbers of numpy are read past too, since numpy follows pointers in what it is given.
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
from pathlib import Path
from typing import Any

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
    """Stands for an object that is read past: takes arguments and a state, and remembers only what tensors may hide in."""

    _inside: list[object]

    def __new__(cls, *arguments: object, **named: object) -> LeftOut:
        """Take what a class would have been called with."""
        self = super().__new__(cls)
        self._inside = [arguments, named]
        return self

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self._inside.append(state)


class LeftOutMapping:
    """Stands for a class of mappings, which pickle fills item by item: what is made is a plain one, marked."""

    def __new__(cls, *arguments: object, **named: object) -> Any:
        """Make the mapping that is filled."""
        made: Any = OrderedDict()
        made.__dict__[_MARK] = cls
        made.__dict__["_inside"] = [arguments, named]
        return made


def is_left_out(value: object) -> bool:
    """Return whether a value stands for an object that was read past."""
    return isinstance(value, LeftOut) or (type(value) is OrderedDict and _MARK in vars(value))


def class_of(value: object) -> str:
    """Return the name of the class a file asked for where this value stands."""
    kind = vars(value)[_MARK] if type(value) is OrderedDict else type(value)
    return str(getattr(kind, "__name__", kind))


def holds_tensors_inside(value: object) -> bool:
    """Return whether an object that was read past was given a tensor, however deep."""
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


def unpickled(file: Path) -> tuple[Any, list[str]]:
    """Return what `torch.save` wrote, as far as it is tensors and plain data, and a note on the objects of others' classes in it.

    Raises:
        InputError: where the file asks for a function or for a class that can hold the weights themselves; or is damaged.
    """
    asked = _globals(file)
    ours = [name for name in asked if _is_read_past(name)]
    foreign = [name for name in ours if not _HARMLESS.fullmatch(name)]
    refused: Exception | None = None
    for mappings in (
        ([], foreign) if foreign else ([],)
    ):  # of a class nobody knows, whether it is a mapping shows when it is filled
        stand_ins: list[Any] = [
            _stand_in(name, mapping=name in mappings or bool(_MAPPINGS.fullmatch(name))) for name in ours
        ]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the age of a file
                with torch.serialization.safe_globals(stand_ins):
                    saved = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
            return saved, _notes(foreign)
        except Exception as error:
            refused = refused or error
    raise _refusal(file, refused, [name for name in asked if name not in ours], foreign)


def _notes(foreign: list[str]) -> list[str]:
    return (
        [f"read past objects of {few(foreign, 6)} beside the weights: none of these classes is imported, none is made"]
        if foreign
        else []
    )


def _refusal(file: Path, error: Exception | None, others: list[str], foreign: list[str]) -> InputError:
    if isinstance(error, pickle.UnpicklingError) or foreign:
        asked = few(others or foreign)
        what = (
            f"holds more than tensors and plain data ({asked})"
            if asked
            else "is damaged, or holds more than tensors and plain data"
        )
        return InputError(
            f"{file} {what}, and is not loaded: that could run any code. Where you trust it, load it with "
            "weights_only=False where its modules can be imported, and save its state dict alone with torch.save."
        )
    what = (str(error).splitlines() or [""])[0][:200]
    return InputError(
        f"{file} cannot be read as a checkpoint ({type(error).__name__}: {what}). Save it again, or move it away."
    )


def _stand_in(name: str, *, mapping: bool) -> tuple[Any, str]:
    """Return a class of ours for a class of theirs: each its own, so that it can be told what a stand-in stands for."""
    base = LeftOutMapping if mapping else LeftOut
    return type(name, (base,), {}), name


def _is_read_past(name: str) -> bool:
    """Return whether a stand-in may take the place of what a file asks for.

    Settings of the standard library, numpy and torch by their names; of other packages and scripts, classes, as far as names tell them
    from functions. A tensor's class is none of them.
    """
    if _HARMLESS.fullmatch(name):
        return True
    root, last = name.partition(".")[0], name.rpartition(".")[2]
    if root in sys.stdlib_module_names or root in _OLD_NAMES or root == "numpy":
        return False
    if re.search("Tensor|Parameter|Storage", last) or (root == "torch" and not name.startswith("torch.nn.modules.")):
        return False
    return _CLASS.fullmatch(name) is not None


def _globals(file: Path) -> list[str]:
    """Return the functions and classes a pickle asks for beside those torch allows, without running it."""
    try:
        if zipfile.is_zipfile(file):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
        names = set[str]()
        with file.open("rb") as opened:
            for _ in range(4):  # a number, a version, the system, what was saved
                for opcode, argument, _ in pickletools.genops(opened):
                    if opcode.name == "GLOBAL":
                        module, _, name = str(argument).partition(" ")
                        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
                        names.add(f"{module}.{name}")
        return sorted(name for name in names if _is_read_past(name) or not name.startswith(("torch.", "collections.")))
    except Exception:  # damaged, or no pickle: loading it says so
        return []
