"""What a run does with its mining beside training: prefetched answers, checkpoints, files that are not needed any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from methods.mining import MiningRequirements
from pipeline.distributed.collectives import Ranks
from pipeline.errors import UserError
from pipeline.mining import faiss_index
from pipeline.mining.messages import ServerSpec
from pipeline.mining.method_view import MethodMining
from pipeline.mining.server import MiningServer
from pipeline.mining.transport import LocalTransport
from pipeline.storage import Folder
from tests.pipeline.mining.oracle import clustered
from tests.pipeline.mining.test_client import assert_same

_, VALUES, LABELS = clustered(300, 8, 20)


def start(folder: Folder, incarnation: int = 1, snapshot: Folder | None = None, **needs: Any) -> MethodMining:
    wanted = MiningRequirements(**({"table": True, "total": 50} | needs))
    spec = ServerSpec("run", 8, engine="ivf", k=5, target=0.3, per_class=wanted.per_class, total=wanted.total)
    made = MethodMining(
        wanted, spec, [LocalTransport(MiningServer())], Ranks(), torch.device("cpu"), folder, swap_after=2
    )
    made.begin(incarnation, snapshot)
    return made


def put(mining: MethodMining, step: int, rows: slice) -> None:
    mining.step = step
    ids = torch.arange(300)[rows]
    mining.put(ids, torch.from_numpy(VALUES[rows]), torch.from_numpy(LABELS[rows]))


@pytest.fixture(autouse=True)
def small_indexes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_index, "_MIN_ROWS", 100)


def test_a_checkpoint_holds_what_was_prefetched_the_memory_and_the_index(folder: Folder) -> None:
    first = start(folder)
    put(first, 0, slice(0, 200))
    first.rebuild()
    first.prefetch("hard", 3, ids=np.arange(4), class_filter="other", with_embeddings=True)
    put(first, 1, slice(150, 300))
    first.save(folder / "checkpoint")
    put(first, 2, slice(0, 9))  # after it
    expected = first.take_prefetched("hard")
    second = start(folder, 2, folder / "checkpoint")
    assert second.memory.version == 350 and len(second.memory) == 50
    assert torch.equal(
        second.memory.features, torch.from_numpy(VALUES[250:300])[torch.argsort(second.memory.ids.argsort())]
    )
    found = second.take_prefetched("hard")
    assert expected is not None and found is not None and found.embeddings is not None
    assert_same([found], [expected])
    assert second.take_prefetched("hard") is None, "once"
    second.step = 3
    assert second.neighbours(2, ids=np.arange(3)).generation == 1 and second.logs()["mining/generation"] == 1
    second.rebuild()
    assert second._generation == 2
    data = (folder / "checkpoint").read("pending.npz")
    (folder / "checkpoint").write("pending.npz", data[:-1] + b"x")
    with pytest.raises(UserError, match=r"pending.npz is damaged"):
        start(folder, 3, folder / "checkpoint")
    for mining in (first, second):
        mining.close()


def test_rows_of_indexes_that_no_checkpoint_names_are_removed(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    mining = start(folder)
    checkpoints = []
    for step in range(4):
        put(mining, 10 * step, slice(0, 200))
        mining.rebuild()
        checkpoints.append(folder / f"checkpoint{step}")
        mining.save(checkpoints[-1] / "mining")
    assert (folder / "mining").names() == [f"base-{g:06d}-0" for g in (1, 2, 3, 4)]
    mining.prune(checkpoints[2:])  # the third was saved when the second index was still in use
    assert (folder / "mining").names() == [f"base-{g:06d}-0" for g in (2, 3, 4)]
    mining.close()
    (folder / "mining" / "log-1-7" / "0").write("x", b"")
    again = start(folder, 2, checkpoints[-1] / "mining")
    assert not any(name.startswith("log-") for name in (folder / "mining").names())
    again.prune([])
    assert (folder / "mining").names() == ["base-000004-0"], "the next checkpoint may name the newest"
    again.close()


def test_what_was_not_asked_for_is_not_there(tmp_path: Path) -> None:
    mining = start(Folder(tmp_path), table=False)
    put(mining, 0, slice(0, 9))
    mining.rebuild()
    assert len(mining.memory) == 9 and mining.logs()["mining/recoveries"] == 0
    assert mining.all_neighbours(3)[0].tolist() == [], "the memory alone"
    mining.close()
    without = start(Folder(tmp_path), 2, total=None)
    assert without.memory is None
    with pytest.raises(UserError, match=r"1 of 1 sample ids have no embedding"):
        without.neighbours(1, ids=np.array([3]))
    without.close()
