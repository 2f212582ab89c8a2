"""Imports go one way: each room imports only rooms below it, and methods nothing of the pipeline."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLOORS = [  # from the top; rooms of one floor do not import each other
    {"testing"},
    {"cli"},
    {
        "train",
        "evaluate",
        "report",
        "explore",
        "prepare",
        "show_list",
        "show_config",
        "compare",
        "tune",
        "watch",
        "stop",
        "export",
        "search",
        "serve",
    },
    {"doctor"},
    {"tuning", "diagnosis", "searching", "exporting"},
    {"training", "inference"},
    {"evaluation"},
    {"mining", "model", "trackers"},
    {"runs", "distributed"},
    {"exploration"},
    {"recipes", "config_text"},
    {"config"},
    {"config_model", "config_problems", "config_runtime"},
    {"data"},
    {"storage", "neighbours"},
    {"errors", "console", "metric_names", "vision_libraries"},
]
PACKAGE = {"ROOT", "own_packages"}  # defined in pipeline/__init__.py itself
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "pipeline":
            names |= {f"pipeline.{alias.name}" for alias in node.names if alias.name not in PACKAGE}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_rooms_import_only_what_is_below_them() -> None:
    upward = []
    for path in (ROOT / "pipeline").rglob("*.py"):
        parts = path.relative_to(ROOT / "pipeline").with_suffix("").parts
        if parts == ("__init__",):
            continue
        room = parts[0]
        for name in imported(path):
            if name.startswith("pipeline."):
                other = name.split(".")[1]
                if other != room and FLOOR_OF[other] <= FLOOR_OF[room]:
                    upward.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not upward


def test_neighbours_import_no_other_room() -> None:
    for path in (ROOT / "pipeline" / "neighbours").glob("*.py"):
        others = [n for n in imported(path) if n.startswith("pipeline.") and not n.startswith("pipeline.neighbours")]
        assert not others, path


def test_methods_do_not_know_the_pipeline() -> None:
    for path in (ROOT / "methods").glob("*.py"):
        assert not [name for name in imported(path) if name.split(".")[0] == "pipeline"], path
