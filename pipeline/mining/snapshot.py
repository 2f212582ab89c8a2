"""Snapshots of the mining servers: .npy files of bounded size with their checksums, one folder for each shard.

    FOLDER/SHARD/{table,memory}.NAME.PART.npy, mining.json

They can be read by another number of shards than wrote them.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.mining.embedding_table import shard_of
from pipeline.storage import Folder

_PART_BYTES = 2**28  # of one file

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Header:
    """Whose part of a snapshot it is."""

    run: str
    dim: int
    shard: int
    shards: int


@dataclass(frozen=True)
class Tag:
    """What the last put into the table was of, and at which step; "": a batch in training."""

    name: str = ""
    step: int = -1


@dataclass(frozen=True)
class SavedIndex:
    """An index that was in use: its number, first step, and the folder and checksums of the rows it was built from."""

    number: int
    from_step: int
    base: str
    sums: dict[str, str]


@dataclass(frozen=True)
class RestoredState:
    """What one shard reads: its table, the memory, and its indexes with their rows.

    A `SavedIndex` without checksums is to be saved anew: its rows were put together from those of another number of shards.
    """

    table: Arrays
    memory: Arrays | None
    built: list[tuple[SavedIndex, Arrays]]
    tag: Tag


def write(
    folder: Folder, header: Header, table: Arrays, memory: Arrays | None, built: Sequence[SavedIndex], tag: Tag = Tag()
) -> dict[str, str]:
    """Writes one shard's part; returns the checksum of every file."""
    target = folder / str(header.shard)
    sums = write_arrays(target, "table", table)
    if memory is not None:
        sums |= write_arrays(target, "memory", memory)
    meta = asdict(header) | {"built": [asdict(b) for b in built], "tag": asdict(tag), "sha256": sums}
    target.write_json("mining.json", meta)
    return sums


def read(folder: Folder, header: Header) -> RestoredState:
    """Reads what belongs to one shard.

    Raises:
        UserError: a file is missing or damaged, or the snapshot is of another run or dimension.
    """
    names = sorted((n for n in folder.names() if n.isdigit()), key=int)
    if not names or not all(folder.exists(f"{name}/mining.json") for name in names):
        raise UserError(f"{folder} holds no mining snapshot (mining.json): resume from an older checkpoint")
    metas = [folder.read_json(f"{name}/mining.json") for name in names]
    for meta in metas:
        if (meta["run"], meta["dim"]) != (header.run, header.dim):
            raise UserError(
                f"{folder} is a snapshot of run {meta['run']} with dimension {meta['dim']}, expected {header.run} with {header.dim}"
            )
    if len(names) != metas[0]["shards"]:
        raise UserError(f"{folder} holds {len(names)} of {metas[0]['shards']} shards: resume from an older checkpoint")
    same = len(names) == header.shards
    chosen = [header.shard] if same else range(len(names))

    def mine(parts: Sequence[Arrays]) -> Arrays:
        if same:
            return parts[0]
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        kept = shard_of(whole["ids"], header.shards) == header.shard
        return {name: array[kept] for name, array in whole.items()}

    table = mine([read_arrays(folder / names[i], "table", metas[i]["sha256"]) for i in chosen])
    memory = read_arrays(folder / names[0], "memory", metas[0]["sha256"]) if header.shard == 0 else {}
    built = []
    for index in range(len(metas[0]["built"])):
        parts = [SavedIndex(**metas[i]["built"][index]) for i in chosen]
        rows = mine([read_arrays(Folder(part.base), "base", part.sums) for part in parts])
        first = parts[0]
        if not same:
            first = SavedIndex(first.number, first.from_step, f"{first.base}-{header.shard}-of-{header.shards}", {})
        built.append((first, rows))
    return RestoredState(table, memory or None, built, _newest(metas))


def _newest(metas: Sequence[Mapping[str, Any]]) -> Tag:
    """Of the shards: a put reaches those that own its rows."""
    return max((Tag(**meta.get("tag", {})) for meta in metas), key=lambda tag: (tag.step, tag.name))


def write_arrays(folder: Folder, name: str, arrays: Arrays) -> dict[str, str]:
    """Writes arrays as .npy files of bounded size; returns the checksum of each."""
    sums = {}
    for key, array in arrays.items():
        rows = max(1, _PART_BYTES // max(1, array[:1].nbytes)) if array.ndim else 1
        parts = [array[s : s + rows] for s in range(0, max(1, len(array)), rows)] if array.ndim else [array]
        for number, part in enumerate(parts):
            buffer = io.BytesIO()
            np.save(buffer, part, allow_pickle=False)
            file = f"{name}.{key}.{number:05d}.npy"
            folder.write(file, buffer.getvalue())
            sums[file] = hashlib.sha256(buffer.getbuffer()).hexdigest()
    return sums


def read_arrays(folder: Folder, name: str, sums: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Reads what `write_arrays` wrote.

    Raises:
        UserError: a file is missing or damaged.
    """
    files = sorted(file for file in sums if file.startswith(f"{name}."))
    parts: dict[str, list[np.ndarray]] = {}
    for file in files:
        data = folder.read(file) if folder.exists(file) else None
        if data is None or hashlib.sha256(data).hexdigest() != sums[file]:
            what = "missing" if data is None else "damaged"
            raise UserError(f"{folder}/{file} is {what}: resume from an older checkpoint")
        parts.setdefault(file.split(".")[1], []).append(np.load(io.BytesIO(data), allow_pickle=False))
    return {key: found[0] if found[0].ndim == 0 else np.concatenate(found) for key, found in parts.items()}
