"""Code of a user's own by import string, `module:name` or `package.module:name`: methods, losses, backbones, transforms.

A module is looked for where Python looks, then in the folders that were added: the recipe's and the working directory. The
processes of a run learn these folders from the environment variable FOLDERS.
"""

from __future__ import annotations

import difflib
import importlib
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDERS = "RAYDML_PLUGIN_FOLDERS"
METHOD_GROUP = "raydml.methods"  # entry points of installed packages, by method name
loaded = False  # whether this process has been asked for anything
_IMPORT_STRING = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def add_folder(folder: str | os.PathLike[str]) -> None:
    """Looks for modules in this folder too, here and in the processes that this one starts; what is installed comes first."""
    path = os.path.abspath(folder)
    if path not in sys.path:
        sys.path.append(path)
    known = folders()
    if path not in known:
        os.environ[FOLDERS] = os.pathsep.join([*known, path])


def folders() -> list[str]:
    """The folders that were added."""
    return [folder for folder in os.environ.get(FOLDERS, "").split(os.pathsep) if folder]


def is_import_string(name: str) -> bool:
    return _IMPORT_STRING.fullmatch(name) is not None


def load(name: str, what: str, base: type | None = None) -> Any:
    """The object of an import string.

    Args:
        name: The import string.
        what: What it is, for messages ("loss").
        base: A class that it has to be derived from; None: any callable.

    Raises:
        ValueError: One line: there is no such module or name in it, importing it fails, or it is something else.
    """
    global loaded
    loaded = True
    module_name, _, attribute = name.partition(":")
    module = _import(module_name, f"{what} {name!r}")
    if not hasattr(module, attribute):
        public = [n for n in vars(module) if not n.startswith("_")]
        place = getattr(module, "__file__", None) or "a folder without __init__.py"
        raise ValueError(f"{what} {name!r}: {module_name} ({place}) has no {attribute!r}{_similar(attribute, public)}")
    found = getattr(module, attribute)
    if base is not None and not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{what} {name!r} is {_described(found)}, expected a class derived from {_dotted(base)}")
    if not callable(found):
        raise ValueError(f"{what} {name!r} is {_described(found)}, expected a function or a class")
    return found


def method_entry_points() -> dict[str, Any]:
    """Entry points of the methods of installed packages, by name.

    They are of `importlib.metadata`, or of its backport where another package has imported that.
    """
    return {point.name: point for point in entry_points(group=METHOD_GROUP)}


def _import(module_name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(f"{what}: importing {module_name} failed: {failure(error)}") from error
        places = [path for path in dict.fromkeys([os.getcwd(), *folders()])]
        neighbours = [found.name for found in pkgutil.iter_modules(places)]
        raise ValueError(
            f"{what}: there is no module {error.name!r} in {', '.join(places)} nor among the installed packages"
            f"{_similar(error.name, neighbours)}"
        ) from error
    except Exception as error:  # whatever a module raises while it is imported
        raise ValueError(f"{what}: importing {module_name} failed: {failure(error)}") from error


def failure(error: BaseException) -> str:
    """An error in one line, with the place in the code that raised it."""
    text = (str(error).strip().splitlines() or [""])[0]
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename and f.filename != __file__
    ]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{place}"


def is_own(cls: type) -> bool:
    """True for a class of a module in one of the added folders; packages installed in an environment below one are not."""
    file = Path(os.path.abspath(getattr(sys.modules.get(cls.__module__), "__file__", None) or ""))
    for folder in map(os.path.abspath, folders()):
        if file.is_relative_to(folder) and "site-packages" not in file.relative_to(folder).parts:
            return True
    return False


def _similar(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.7)
    return f": did you mean {close[0]!r}?" if close else ""


def _described(found: Any) -> str:
    if isinstance(found, type):
        return f"the class {found.__name__}"
    return f"a {type(found).__name__}"


def _dotted(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


for _folder in folders():  # of a process that another one started
    if os.path.abspath(_folder) not in sys.path:
        sys.path.append(os.path.abspath(_folder))
