"""A pipeline for deep metric learning on Ray; one module a command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)


def own_packages(root: str) -> Callable[[], None]:
    """A function that makes a process find `methods` and `pipeline` below `root`, whatever lies in its working folder.

    It refers to nothing of this package, so that Ray can send it to a process in which a user's pipeline.py comes first.
    """

    def find_own_packages() -> None:
        import sys
        from importlib.machinery import ModuleSpec, PathFinder
        from typing import Any

        class OwnPackages:
            @staticmethod
            def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
                return PathFinder.find_spec(name, [root]) if name in ("methods", "pipeline") else None

        finders: list[Any] = sys.meta_path
        finders.insert(finders.index(PathFinder) if PathFinder in finders else 0, OwnPackages)

    return find_own_packages


own_packages(ROOT)()
