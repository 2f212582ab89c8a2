"""Snapshots of the mining servers: .npy files of bounded size with their checksums, one folder for each shard.

    FOLDER/SHARD/{table,memory}.NAME.PART.npy, mining.json

The number of shards that read a snapshot may differ from the number that wrote it.
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

_PART_BYTES = 2**28  # largest size of one file

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Header:
    """The run, the dimension and the shard that a part of a snapshot belongs to."""

    run: str
    dim: int
    shard: int
    shards: int


@dataclass(frozen=True)
class Tag:
    """Origin (epoch and weights) and step of the last put into the table; "": a training batch."""

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
    """The state of one shard: its table, the memory, and its indexes with their rows.

    A `SavedIndex` without checksums has to be saved again: its rows were collected from another number of shards.
    """

    table: Arrays
    memory: Arrays | None
    built: list[tuple[SavedIndex, Arrays]]
    tag: Tag


def write(
    folder: Folder, header: Header, table: Arrays, memory: Arrays | None, built: Sequence[SavedIndex], tag: Tag = Tag()
) -> dict[str, str]:
    """Writes one shard's part; returns the checksum of every file."""
    shard_folder = folder / str(header.shard)
    checksums = write_arrays(shard_folder, "table", table)
    if memory is not None:
        checksums |= write_arrays(shard_folder, "memory", memory)
    meta = asdict(header) | {"built": [asdict(b) for b in built], "tag": asdict(tag), "sha256": checksums}
    shard_folder.write_json("mining.json", meta)
    return checksums


def read(folder: Folder, header: Header) -> RestoredState:
    """Reads the state of one shard.

    Raises:
        UserError: A file is missing or damaged, or the snapshot belongs to another run or has another dimension.
    """
    names = sorted((n for n in folder.names() if n.isdigit()), key=int)
    if not names or not all(folder.exists(f"{name}/mining.json") for name in names):
        raise UserError(f"{folder} holds no mining snapshot (mining.json): resume from an older checkpoint")
    headers = [folder.read_json(f"{name}/mining.json") for name in names]
    for shard_header in headers:
        if (shard_header["run"], shard_header["dim"]) != (header.run, header.dim):
            raise UserError(
                f"{folder} is a snapshot of run {shard_header['run']} with dimension {shard_header['dim']}, "
                f"expected {header.run} with {header.dim}"
            )
    if len(names) != headers[0]["shards"]:
        raise UserError(
            f"{folder} holds {len(names)} of {headers[0]['shards']} shards: resume from an older checkpoint"
        )
    same_shards = len(names) == header.shards
    shards_read = [header.shard] if same_shards else range(len(names))

    def rows_of_shard(saved_parts: Sequence[Arrays]) -> Arrays:
        if same_shards:
            return saved_parts[0]
        all_rows = {name: np.concatenate([saved[name] for saved in saved_parts]) for name in saved_parts[0]}
        is_member = shard_of(all_rows["ids"], header.shards) == header.shard
        return {name: array[is_member] for name, array in all_rows.items()}

    table = rows_of_shard([read_arrays(folder / names[i], "table", headers[i]["sha256"]) for i in shards_read])
    memory = read_arrays(folder / names[0], "memory", headers[0]["sha256"]) if header.shard == 0 else {}
    built = []
    for index in range(len(headers[0]["built"])):
        saved_parts = [SavedIndex(**headers[i]["built"][index]) for i in shards_read]
        rows = rows_of_shard([read_arrays(Folder(saved.base), "base", saved.sums) for saved in saved_parts])
        first = saved_parts[0]
        if not same_shards:
            first = SavedIndex(first.number, first.from_step, f"{first.base}-{header.shard}-of-{header.shards}", {})
        built.append((first, rows))
    return RestoredState(table, memory or None, built, _newest(headers))


def _newest(headers: Sequence[Mapping[str, Any]]) -> Tag:
    """The newest tag of all shards: a put reaches only the shards that own its rows."""
    return max((Tag(**header.get("tag", {})) for header in headers), key=lambda tag: (tag.step, tag.name))


def write_arrays(folder: Folder, name: str, arrays: Arrays) -> dict[str, str]:
    """Writes arrays as .npy files of bounded size; returns the checksum of each."""
    checksums = {}
    for key, array in arrays.items():
        rows = max(1, _PART_BYTES // max(1, array[:1].nbytes)) if array.ndim else 1
        parts = [array[s : s + rows] for s in range(0, max(1, len(array)), rows)] if array.ndim else [array]
        for number, part in enumerate(parts):
            buffer = io.BytesIO()
            np.save(buffer, part, allow_pickle=False)
            file = f"{name}.{key}.{number:05d}.npy"
            folder.write(file, buffer.getvalue())
            checksums[file] = hashlib.sha256(buffer.getbuffer()).hexdigest()
    return checksums


def read_arrays(folder: Folder, name: str, sums: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Reads arrays that `write_arrays` wrote.

    Raises:
        UserError: A file is missing or damaged.
    """
    files = sorted(file for file in sums if file.startswith(f"{name}."))
    parts: dict[str, list[np.ndarray]] = {}
    for file in files:
        data = folder.read(file) if folder.exists(file) else None
        if data is None or hashlib.sha256(data).hexdigest() != sums[file]:
            problem = "missing" if data is None else "damaged"
            raise UserError(f"{folder}/{file} is {problem}: resume from an older checkpoint")
        parts.setdefault(file.split(".")[1], []).append(np.load(io.BytesIO(data), allow_pickle=False))
    return {
        key: array_parts[0] if array_parts[0].ndim == 0 else np.concatenate(array_parts)
        for key, array_parts in parts.items()
    }
