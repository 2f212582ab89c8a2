"""Prepared datasets by name: the folder that a name, path or URI stands for."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pipeline.data.layouts import LAYOUTS
from pipeline.errors import UserError, did_you_mean
from pipeline.storage import Folder

MANIFEST = "manifest.json"


def dataset_names(root: Folder) -> list[str]:
    """Names of the prepared datasets below a storage root."""
    return [name for name in (root / "data").names() if (root / "data" / name).exists(MANIFEST)]


def find_store(source: str, roots: Sequence[str]) -> Folder:
    """The folder of a prepared dataset.

    Args:
        source: A name below ROOT/data, or the folder or URI of a store.
        roots: Storage roots in which a name is looked for, in this order.

    Raises:
        UserError: There is none; the message says how to prepare it.
    """
    is_name = "/" not in source and not source.startswith(("~", "."))
    places = [Folder(root) / "data" / source for root in roots] if is_name else [Folder(source)]
    for folder in places:
        if folder.exists(MANIFEST):
            return folder
    if not is_name and places[0].is_local and os.path.isdir(places[0].uri):
        raise UserError(
            f"data.source {source!r} is no prepared dataset: prepare the images in it with "
            f"`python -m pipeline.prepare folder {places[0]}`, and set data.source to {os.path.basename(places[0].uri)}"
        )
    where = " or ".join(str(Folder(root) / "data") for root in roots)
    missing = (
        f"there is no dataset {source!r} in {where}" if is_name else f"there is no prepared dataset in {places[0]}"
    )
    names = [name for root in roots for name in dataset_names(Folder(root))] if is_name else []
    similar = f" ({did_you_mean(source, names, otherwise='prepared are')})" if names else ""
    command = f"{source} --from PATH" if source in LAYOUTS else "folder PATH"
    raise UserError(
        f"{missing}{similar}: prepare it with `python -m pipeline.prepare {command}`, or give the folder or s3:// URI of a store"
    )
