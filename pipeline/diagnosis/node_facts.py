"""What a node says about itself: imports, devices, memory, disks, storage, limits. Light to import, so that any node can run it."""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.diagnosis.imports import import_facts_of_a_process
from pipeline.errors import RunError, UserError, one_line
from pipeline.storage import Folder


@dataclass(frozen=True)
class Wanted:
    """What every node is asked.

    Attributes:
        storage: Folder or URI of datasets and runs.
        probe: Name of a file in it that the driver has written; None: there is none.
        cache: Folder of the node's copies of training splits.
        copy: File name of the dataset's copy in it; None: the dataset is not prepared yet.
        gcs_port: Port of the cluster's control store; None: no cluster.
    """

    storage: str
    probe: str | None
    cache: str
    copy: str | None = None
    gcs_port: int | None = None


@dataclass(frozen=True)
class NodeFacts:
    """One node.

    Attributes:
        node: Address.
        error: Why it gave no facts; None: it did.
        versions, errors, torch_gpus, faiss_gpus: See `pipeline.diagnosis.imports.import_facts`.
        resources: What the node offers to Ray; None: no cluster.
        labels: The node's labels in Ray.
        cores: CPU cores that this process may use.
        memory_bytes: Memory of the machine, or the container's limit where that is less.
        memory_from: What sets it: "machine" or "container".
        free_memory_bytes: The part that is available now.
        storage_error: Why no file could be written to the storage and read there; None: it could.
        sees_probe: Whether the driver's file is there.
        storage_free_bytes: Free space; None: object storage.
        cache_error: Why no file could be written to the cache folder; None: it could.
        cache_free_bytes: Free space there.
        cached: Whether the dataset's copy is there.
        shm_bytes, shm_free_bytes: Size of /dev/shm and its free space; None: there is none.
        open_files: Limit of open files: soft and hard.
        gcs_addresses: Addresses on which this node listens for the control store's port.
        clock_s: How far its clock is ahead of the driver's, seconds.
        clock_error_s: Half the time of the question and its answer.
    """

    node: str
    error: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    torch_gpus: tuple[tuple[str, int], ...] = ()
    faiss_gpus: int = 0
    resources: Mapping[str, float] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    cores: int = 1
    memory_bytes: int = 0
    memory_from: str = "machine"
    free_memory_bytes: int = 0
    storage_error: str | None = None
    sees_probe: bool = True
    storage_free_bytes: int | None = None
    cache_error: str | None = None
    cache_free_bytes: int = 0
    cached: bool = False
    shm_bytes: int | None = None
    shm_free_bytes: int = 0
    open_files: tuple[int, int] = (0, 0)
    gcs_addresses: tuple[str, ...] = ()
    clock_s: float = 0.0
    clock_error_s: float = 0.0

    @property
    def ray_gpus(self) -> float | None:
        """GPUs that the node offers to Ray; None: no cluster."""
        return None if self.resources is None else self.resources.get("GPU", 0.0)


def gather(wanted: Wanted, imports: Callable[[], dict[str, Any]] = import_facts_of_a_process) -> dict[str, Any]:
    """Values of `NodeFacts` of the machine that this is called on; takes as long as importing PyTorch."""
    memory_bytes, free_bytes, memory_from = memory()
    storage = Folder(wanted.storage)
    cache = Folder(wanted.cache)
    storage_error, cache_error = write_error(storage), write_error(cache)
    sees_probe = storage_error is None and (wanted.probe is None or storage.exists(wanted.probe))
    shm = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    found = imports()
    return {
        **found,
        "torch_gpus": tuple((str(name), int(num_bytes)) for name, num_bytes in found["torch_gpus"]),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_bytes": memory_bytes,
        "memory_from": memory_from,
        "free_memory_bytes": free_bytes,
        "storage_error": storage_error,
        "sees_probe": sees_probe,
        "storage_free_bytes": free_space(storage) if storage.is_local else None,
        "cache_error": cache_error,
        "cache_free_bytes": free_space(cache),
        "cached": wanted.copy is not None and cache.exists(wanted.copy),
        "shm_bytes": shm.total if shm else None,
        "shm_free_bytes": shm.free if shm else 0,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "gcs_addresses": listening_addresses(wanted.gcs_port) if wanted.gcs_port else (),
    }


def clock() -> float:
    """The node's time, seconds since 1970."""
    return time.time()


def write_error(folder: Folder) -> str | None:
    """Why no file can be written here, read back and removed; None: it can. Folders that are made for it are removed."""
    there = _deepest_existing(folder) if folder.is_local else None
    try:
        folder.check_writable()
    except (UserError, RunError) as error:
        return one_line(error)
    finally:
        place = Path(folder.path()) if folder.is_local else None
        while place is not None and place != there and place.is_dir() and not any(place.iterdir()):
            place.rmdir()
            place = place.parent
    return None


def free_space(folder: Folder) -> int:
    """Bytes that are free for a folder that may not exist yet."""
    return shutil.disk_usage(_deepest_existing(folder)).free


def _deepest_existing(folder: Folder) -> Path:
    path = Path(folder.path())
    while not path.exists():
        path = path.parent
    return path


def memory(root: str = "/") -> tuple[int, int, str]:
    """Bytes of memory, those available, and what sets the limit: "machine" or "container" (its cgroup, v1 or v2).

    Args:
        root: Folder that holds proc and sys.
    """
    lines = dict(line.split(":", 1) for line in Path(root, "proc/meminfo").read_text().splitlines() if ":" in line)
    total, available = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit, used = _container_memory(root)
    if limit is not None and limit < total:
        return limit, min(available, max(0, limit - used)), "container"
    return total, available, "machine"


def _container_memory(root: str) -> tuple[int | None, int]:
    """The smallest memory limit of this process's cgroup and those above it, and the bytes used there; None: no limit."""
    groups = Path(root, "proc/self/cgroup")
    lines = groups.read_text().splitlines() if groups.exists() else []
    paths = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in lines if line.count(":") >= 2}
    places = [("", "sys/fs/cgroup", "memory.max", "memory.current")]
    places += [("memory", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes")]
    smallest: tuple[int, int] | None = None
    for controller, base, limit_file, used_file in places:
        group = Path(paths.get(controller, "/").lstrip("/"))
        for folder in [Path(root, base) / part for part in (group, *group.parents)]:
            if (folder / limit_file).exists():
                text = (folder / limit_file).read_text().strip()
                if text != "max" and (smallest is None or int(text) < smallest[0]):
                    smallest = (int(text), int((folder / used_file).read_text()))
    return smallest if smallest is not None else (None, 0)


def listening_addresses(port: int, root: str = "/") -> tuple[str, ...]:
    """Addresses on which some process of this machine listens for a port: "127.0.0.1", "0.0.0.0" (all), ..."""
    found = set()
    for name, width in (("tcp", 8), ("tcp6", 32)):
        table = Path(root, "proc/net", name)
        for line in table.read_text().splitlines()[1:] if table.exists() else []:
            address, state = line.split()[1], line.split()[3]
            host, _, number = address.partition(":")
            if state == "0A" and int(number, 16) == port:  # 0A: LISTEN
                found.add(_dotted(host) if width == 8 else _dotted6(host))
    return tuple(sorted(found))


def _dotted(host: str) -> str:
    return ".".join(str(b) for b in reversed(bytes.fromhex(host)))


def _dotted6(host: str) -> str:
    words = [bytes(reversed(bytes.fromhex(host[i : i + 8]))) for i in range(0, 32, 8)]
    whole = b"".join(words)
    if whole[:12] == bytes(10) + b"\xff\xff":  # an IPv4 address
        return ".".join(str(b) for b in whole[12:])
    return "::" if whole == bytes(16) else "::1" if whole == bytes(15) + b"\x01" else whole.hex(":", 2)
