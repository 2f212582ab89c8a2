"""Writers killed at random moments: `python -m tests.laws.half_written KIND FOLDER KILLS SEED`, a process without threads, which forks.

Each attempt goes on with what the attempts before have left. After each kill all that is there is read as a user's next command would:
it is whole, or it is not there. At the end the work is done undisturbed, and has to be what it is in an empty folder.

store       a dataset, over one that is there
cache       a node's copy of a dataset
decoded     a node's copy of its decoded pixels
embeddings  those of a run's images
run         a mined run: checkpoints with snapshots of its mining server
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from pipeline.config import build_config, to_yaml
from pipeline.data import own_images
from pipeline.data.cache import Cache, open_local_copy
from pipeline.data.decoded import DecodedReader, open_decoded_copy
from pipeline.data.store import Store
from pipeline.distributed.jobs import run_serially
from pipeline.errors import UserError
from pipeline.inference.embed import embed
from pipeline.inference.trained_model import load_run
from pipeline.prepare import prepare
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.run_folder import CONFIG, run_folder
from pipeline.storage import Folder
from pipeline.testing.tiny import tiny_values, write_images, write_tiny_store
from pipeline.training.launch import run_in_process
from pipeline.training.start import record

MINED = {
    "method.hard_negatives": 3,
    "method.memory": 30,
    "checkpoint.every": "1 steps",
    "evaluation.every": "1 epochs",
    "length": "4 epochs",
}


def silent(_: Any) -> None: ...


class Writer:
    """Does some work in a folder, and reads what is there.

    Args:
        root: A folder of its own.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True)

    def write(self) -> None: ...

    def read(self) -> Any:
        """What is there, in a form that can be compared; None if there is nothing. Damaged content raises."""

    def start_over(self) -> None:
        """Removes what was finished before a kill came, where a further start would find nothing to do."""


class StoreWriter(Writer):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        write_images(root / "images", {f"class{i}": 4 + i % 3 for i in range(8)}, seed=1)

    def write(self) -> None:
        entries = own_images.folder(str(self.root / "images")).entries
        prepare("x", entries, Folder(self.root / "store"), run_serially, images_per_shard=4)

    def read(self) -> Any:
        folder = Folder(self.root / "store")
        if not folder.exists("manifest.json"):
            return None
        store = Store(folder)
        store.check_shards()
        rows = [store.shard_table(shard).num_rows for shard in store.manifest["shards"]]
        return store.fingerprint, sum(rows)


class CacheWriter(Writer):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.store = write_tiny_store(root)

    def write(self) -> None:
        open_local_copy(self.store, Cache(str(self.root / "cache"), 2**30), "train")

    def read(self) -> Any:
        whole = [
            path
            for path in (self.root / "cache").glob("*")
            if path.suffix not in (".part", ".lock") and path.name != ".lock"
        ]
        if not whole:
            return None
        reader = open_local_copy(self.store, Cache(str(self.root / "cache"), 2**30), "train")
        ids = self.store.select(["train"]).ids
        return [hash(image) for image in reader.read(ids)]

    def start_over(self) -> None:
        shutil.rmtree(self.root / "cache")


class DecodedWriter(CacheWriter):
    def write(self) -> None:
        self._open()

    def read(self) -> Any:
        if not list((self.root / "cache").glob("*.arrow")):
            return None
        ids = self.store.select(["train"]).ids
        return [hash(image.numpy().tobytes()) for image in self._open().images(ids)]

    def _open(self) -> DecodedReader:
        return open_decoded_copy(self.store, Cache(str(self.root / "cache"), 2**30), "train")


class EmbeddingsWriter(Writer):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        store = write_tiny_store(root)
        config = build_config(tiny_values(str(root), store.folder.uri, {"name": "done", "length": "2 steps"}))
        record(config, run_folder(config), store, [])
        assert ended_well(in_child(lambda: run_in_process(config, store.folder.uri, silent)))  # its threads stay there
        self.run = str(root / "runs" / "done")

    def write(self) -> None:
        import pipeline.inference.embed as module

        module.ROWS_PER_FILE = 5
        embed(load_run(self.run), ("train", "test"), Folder(self.root / "embeddings"), 0)

    def read(self) -> Any:
        files = sorted((self.root / "embeddings").glob("*.parquet"))
        tables = [pq.read_table(path) for path in files]  # each is whole, also before all are there
        if not tables:
            return None
        return {path.name: np.stack(t["embedding"].to_numpy()).tobytes() for path, t in zip(files, tables, strict=True)}

    def start_over(self) -> None:
        shutil.rmtree(self.root / "embeddings")


class RunWriter(Writer):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.store = write_tiny_store(root)
        self.config = build_config(tiny_values(str(root), self.store.folder.uri, MINED))
        run_folder(self.config).write(CONFIG, to_yaml(self.config).encode())

    def write(self) -> None:
        run_in_process(self.config, self.store.folder.uri, silent)

    def read(self) -> Any:
        folder = run_folder(self.config)
        checkpoints = Checkpoints(folder)
        latest = checkpoints.latest()
        if latest is None:
            return None
        base = f"checkpoints/step-{latest.step:08d}"
        from safetensors.torch import load

        tensors = {name: load(folder.read(f"{base}/{name}.safetensors")) for name in ("trunk", "method")}
        return {f"{part}/{name}": value for part, found in tensors.items() for name, value in found.items()}


WRITERS: dict[str, Callable[[Path], Writer]] = {
    "store": StoreWriter, "cache": CacheWriter, "decoded": DecodedWriter, "embeddings": EmbeddingsWriter, "run": RunWriter,
}  # fmt: skip


def in_child(work: Callable[[], object]) -> int:
    """Starts work in a forked process; gives its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def ended_well(child: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def main(kind: str, folder: str, kills: int, seed: int) -> dict[str, int]:
    make, draw = WRITERS[kind], random.Random(seed)
    whole, broken = make(Path(folder) / "whole"), make(Path(folder) / "broken")
    began = time.monotonic()
    assert ended_well(in_child(whole.write))
    seconds = time.monotonic() - began
    found = {"killed": 0, "nothing there": 0}
    for _ in range(10 * kills):
        child = in_child(broken.write)
        time.sleep(draw.uniform(0, seconds / (4 if kind == "run" else 1)))
        os.kill(child, signal.SIGKILL)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        found["killed"] += killed

        def read() -> None:
            try:
                there = broken.read()
            except UserError as error:
                raise AssertionError(f"something half-written was read: {error}") from error
            (Path(folder) / "nothing").write_text(str(int(there is None)))

        assert ended_well(in_child(read)), f"after {found}"
        found["nothing there"] += int((Path(folder) / "nothing").read_text())
        if found["killed"] >= kills:
            break
        if not killed:
            broken.start_over()
    assert ended_well(in_child(broken.write))

    def compare() -> None:
        one, other = whole.read(), broken.read()
        assert one is not None and equal(one, other), "another content than undisturbed"

    assert ended_well(in_child(compare))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
