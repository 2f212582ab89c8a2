"""A run or a sweep, found by its name, folder or URI; no PyTorch is imported."""

from __future__ import annotations

from typing import Literal

from pipeline.errors import UserError, did_you_mean
from pipeline.runs.records import run_names
from pipeline.runs.run_folder import CONFIG
from pipeline.storage import Folder, home
from pipeline.tuning.sweep_folder import SWEEP, sweep_names

Kind = Literal["run", "sweep"]


def find_run_or_sweep(name: str, storage: str = "") -> tuple[Kind, Folder]:
    """The folder of a run or of a sweep, and which of the two it is.

    Args:
        name: Its folder, URI, or name.
        storage: Where names are looked up; "": the default storage.

    Raises:
        UserError: There is neither, or a name is that of both.
    """
    if found := _kind_of(Folder(name)):
        return found, Folder(name)
    root = Folder(storage or home())
    places = [folder for folder in (root / "runs" / name, root / "sweeps" / name) if _kind_of(folder)]
    if len(places) > 1:
        raise UserError(f"{name!r} is a run and a sweep: give the folder of one of them, {places[0]} or {places[1]}")
    if not places:
        names = [*run_names(root), *sweep_names(root)]
        hint = f": {did_you_mean(name, names)}" if names else ""
        raise UserError(
            f"{name!r} is neither a folder of a run or a sweep, nor the name of one in {root}/runs or {root}/sweeps{hint}"
        )
    kind = _kind_of(places[0])
    assert kind is not None
    return kind, places[0]


def _kind_of(folder: Folder) -> Kind | None:
    if folder.exists(CONFIG):
        return "run"
    return "sweep" if folder.exists(SWEEP) else None
