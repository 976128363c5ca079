"""A task's source on its way: what is packed, what workers import from it, and what of another task
is not mixed in.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest

from lca_posthoc.tasks import task_bundle
from lca_posthoc.tasks.task_bundle import Parcel


def lay_out(folder: Path, files: Mapping[str, str]) -> Path:
    """The files below a folder, and the task file among them."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / "the_task.py"


def imported(file: Path, data: bytes | None = None) -> ModuleType:
    return Parcel(task_bundle.pack_files(file) if data is None else data, file).main()


PROJECT = {
    "the_task.py": "import helpers\nfrom models.net import WIDTH\nfrom bare import deep\nvalue = "
    "(helpers.VALUE, WIDTH, deep.VALUE)\n",
    "helpers.py": "import json, further\nVALUE = further.VALUE\n",
    "further.py": "VALUE = 1\n",
    "models/__init__.py": "from . import sizes\n",
    "models/net.py": "from .sizes import WIDTH\n",
    "models/sizes.py": "from .inner.most import WIDTH\n",
    "models/inner/__init__.py": "",
    "models/inner/most.py": "WIDTH = 2\n",
    "bare/deep.py": "from bare.other import VALUE\n",
    "bare/other.py": "VALUE = 3\n",
    "unrelated.py": "raise RuntimeError\n",
}


@pytest.fixture(autouse=True)
def _as_before() -> object:
    """Every test finds the import system as it was."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    for other in task_bundle._IN_USE:
        other.put_away()
    task_bundle._IN_USE.clear()
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def test_what_imports_lead_to_is_packed_and_nothing_else(tmp_path: Path) -> None:
    packed = json.loads(task_bundle.pack_files(lay_out(tmp_path, PROJECT)))
    assert {place for place, _ in packed.values()} == {
        *(name for name in PROJECT if name != "unrelated.py"),
        "bare",
    }


def test_modules_come_from_the_parcel_where_the_folder_is_gone(tmp_path: Path) -> None:
    file = lay_out(tmp_path / "project", PROJECT)
    data = task_bundle.pack_files(file)
    shutil.rmtree(tmp_path / "project")
    module = imported(file, data)
    assert module.value == (1, 2, 3)
    assert module.__file__ == str(file)


def test_modules_come_from_the_parcel_where_the_folder_has_changed(tmp_path: Path) -> None:
    file = lay_out(tmp_path, PROJECT)
    data = task_bundle.pack_files(file)
    (tmp_path / "further.py").write_text("VALUE = 10\n")
    assert imported(file, data).value == (1, 2, 3)
    assert imported(file).value == (10, 2, 3)


def test_tasks_with_modules_of_the_same_names_do_not_mix(tmp_path: Path) -> None:
    """Also where one imports while it runs, after the other came."""
    late = "def value():\n    import helpers\n    return helpers.VALUE\n"
    opened = {}
    for name in ("one", "two"):
        file = lay_out(tmp_path / name, {"the_task.py": late, "helpers.py": f"VALUE = {name!r}\n"})
        opened[name] = Parcel(task_bundle.pack_files(file), file)
        opened[name].main()
    for name in ("one", "two", "one"):
        assert opened[name].main().value() == name
    assert opened["one"].main() is opened["one"].main()


def test_a_hash_is_that_of_the_text_and_not_of_the_place(tmp_path: Path) -> None:
    one, two = (
        task_bundle.pack_files(lay_out(tmp_path / name, PROJECT)) for name in ("one", "two")
    )
    assert one == two
    (tmp_path / "two" / "models" / "inner" / "most.py").write_text("WIDTH = 3\n")
    assert task_bundle.pack_files(tmp_path / "two" / "the_task.py") != one


def test_a_module_imported_by_a_name_made_up_at_run_time_is_found_beside_the_file(
    tmp_path: Path,
) -> None:
    text = "import importlib\nvalue = importlib.import_module('help' + 'ers').VALUE\n"
    assert (
        imported(lay_out(tmp_path, {"the_task.py": text, "helpers.py": "VALUE = 5\n"})).value == 5
    )


def test_a_syntax_error_is_raised_where_it_is_imported_with_its_file_and_line(
    tmp_path: Path,
) -> None:
    file = lay_out(tmp_path, {"the_task.py": "import helpers\n", "helpers.py": "x = = 1\n"})
    with pytest.raises(SyntaxError) as caught:
        imported(file)
    assert (caught.value.filename, caught.value.lineno) == (str(tmp_path / "helpers.py"), 1)


def test_a_module_that_raised_is_imported_anew(tmp_path: Path) -> None:
    file = lay_out(
        tmp_path,
        {
            "the_task.py": "from pathlib import Path\nassert "
            "Path(__file__).with_name('there').exists()\n"
        },
    )
    opened = Parcel(task_bundle.pack_files(file), file)
    with pytest.raises(AssertionError):
        opened.main()
    (tmp_path / "there").touch()
    assert opened.main().__file__ == str(file)


def test_a_directory_never_goes_before_an_installed_package_of_its_name(tmp_path: Path) -> None:
    files = {
        "the_task.py": "import hypothesis\nvalue = hypothesis.given\n",
        "hypothesis/scripts.py": "",
        "other/x.py": "",
    }
    file = lay_out(tmp_path, files)
    assert {place for place, _ in json.loads(task_bundle.pack_files(file)).values()} == {
        "the_task.py"
    }
    assert imported(file).value.__module__ == "hypothesis.core"


def test_source_in_another_encoding_means_what_it_says(tmp_path: Path) -> None:
    file = tmp_path / "the_task.py"
    file.write_bytes("# -*- coding: latin-1 -*-\nvalue = 'é'\n".encode("latin-1"))
    assert imported(file).value == "é"
    file.write_bytes("value = 'é'\n".encode())
    assert imported(file).value == "é"


def test_files_beside_the_source_are_read_from_disk(tmp_path: Path) -> None:
    text = "import pkgutil\nvalue = pkgutil.get_data('package', 'sizes.txt')\n"
    file = lay_out(
        tmp_path,
        {
            "the_task.py": "import package\n" + text,
            "package/__init__.py": "",
            "package/sizes.txt": "8",
        },
    )
    assert imported(file).value == b"8"
