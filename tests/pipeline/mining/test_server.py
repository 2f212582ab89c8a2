"""The server class, in this process: order, repetition, takeover, snapshots, an index that is swapped, many threads."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import RunError, UserError
from pipeline.mining import index_builds as module
from pipeline.mining import snapshot
from pipeline.mining.messages import SearchRequest, SearchResponse, SequenceNumber, ServerSpec
from pipeline.mining.server import MiningServer
from pipeline.neighbours.exact_search import Queries, search
from pipeline.storage import Folder
from tests.pipeline.mining.oracle import clustered

SPEC = ServerSpec(run="runs/a", dim=8, capacity=100, per_class=2, k=5, wait_s=5.0)
IDS, VALUES, LABELS = clustered(2000, 8, 40)


class Sent:
    """Numbers the operations of one start of a run."""

    def __init__(
        self, server: MiningServer, incarnation: int = 1, spec: ServerSpec = SPEC, snapshot: str | None = None
    ) -> None:
        self.server, self.incarnation, self.number = server, incarnation, 0
        server.begin(spec, incarnation, snapshot)

    def order(self) -> SequenceNumber:
        self.number += 1
        return SequenceNumber(self.incarnation, self.number, self.number - 1)

    def put(self, rows: Any, step: int = 0, table: bool = True, memory: bool = False) -> SequenceNumber:
        order, batch = self.order(), (IDS[rows], VALUES[rows], LABELS[rows])
        self.server.put(order, step, batch if table else None, batch if memory else None)
        return order

    def ask(self, **ask: Any) -> SearchResponse:
        queries = {} if "embeddings" in ask else {"ids": IDS[:5]}
        return self.server.search(self.order(), SearchRequest(**({"k": 3, "step": 0} | queries | ask)))


@pytest.fixture
def sent() -> Sent:
    return Sent(MiningServer())


def same(a: SearchResponse, b: SearchResponse) -> bool:
    return bool(np.array_equal(a.ids, b.ids) and np.array_equal(a.distances, b.distances))


def test_an_answer_tells_all_about_the_found_rows(sent: Sent) -> None:
    sent.put(slice(0, 50), step=4)
    sent.put(slice(50, 100), step=6)
    found = sent.ask(with_embeddings=True, class_filter="other")
    truth = search(Queries(VALUES[:5], IDS[:5], LABELS[:5]), sent.server.table.view(), 3, "other")
    np.testing.assert_array_equal(found.ids, truth.ids)
    where = {int(i): row for row, i in enumerate(IDS[:100])}
    rows = np.vectorize(where.__getitem__)(found.ids)
    np.testing.assert_array_equal(found.labels, LABELS[rows])
    np.testing.assert_array_equal(found.steps, np.where(rows < 50, 4, 6))
    np.testing.assert_array_equal(found.embeddings, VALUES[rows])
    assert (found.generation, found.applied) == (0, 2)
    some = sent.ask(ids=np.array([IDS[0], -7]), k=200, missing="empty", with_embeddings=True)
    assert (some.ids[0] >= 0).sum() == 99 and not np.isfinite(some.distances[0, 99:]).any()
    assert (some.ids[1] == -1).all() and (some.embeddings is not None and not some.embeddings[1].any())
    assert sent.server.changes_since(None, 0).version == 0, "put in the table alone"


def test_an_empty_server_answers(sent: Sent) -> None:
    found = sent.ask(embeddings=VALUES[:2])
    assert (
        (found.ids == -1).all()
        and found.ids.shape == (2, 3)
        and sent.server.all_neighbours(sent.order(), 3) == ([], 1.0)
    )


def test_operations_wait_for_their_turn_and_count_once(sent: Sent) -> None:
    first, second, third = (sent.order() for _ in range(3))
    batch = (IDS[:4], VALUES[:4], LABELS[:4])
    answers: list[SearchResponse] = []
    late = threading.Thread(target=lambda: answers.append(sent.server.search(third, SearchRequest(1, 0, VALUES[:1]))))
    late.start()
    sent.server.put(first, 1, batch, batch)
    late.join(0.1)
    assert late.is_alive(), "the second has not come yet"
    sent.server.put(second, 2, (IDS[4:5], VALUES[:1] + 1e-3, LABELS[:1]), None)
    late.join()
    assert answers[0].applied >= 2
    sent.server.put(first, 9, batch, batch)  # sent again
    assert len(sent.server.memory) == len({*LABELS[:4]}) + sum(np.bincount(LABELS[:4]) > 1)
    assert sent.server.memory.version == 4 and sent.ask(ids=IDS[4:5], k=1).steps[0, 0] == 1


def test_what_never_comes_is_told(sent: Sent) -> None:
    sent.server.begin(replace(SPEC, wait_s=0.05), 1, None)
    with pytest.raises(RunError, match=r"request 9 waited 0.05 s for request 8, the newest applied is 0"):
        sent.server.search(SequenceNumber(1, 9, 8), SearchRequest(1, 0, VALUES[:1]))


def test_a_refused_batch_does_not_hold_up_what_follows(sent: Sent) -> None:
    bad = VALUES[:2].copy()
    bad[1] = np.inf
    with pytest.raises(UserError, match=f"sample ids {IDS[1]}"):
        sent.server.put(sent.order(), 0, (IDS[:2], bad, LABELS[:2]), None)
    sent.put(slice(0, 3))
    assert sent.ask(ids=IDS[:1], k=1).ids[0, 0] in IDS[1:3]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({"k": 0}, "k is 0: expected at least 1"),
        ({"ids": np.array([-3])}, r"1 of 1 sample ids have no embedding in the table \(first: -3\)"),
        ({"embeddings": np.ones((2, 9), np.float32)}, r"got queries \(2, 9\): expected rows of 8 numbers"),
        ({"embeddings": np.full((2, 8), np.nan, np.float32)}, "queries are not finite"),
        ({"ids": None}, "needs embeddings or ids"),
    ],
)
def test_bad_searches(sent: Sent, ask: dict[str, Any], message: str) -> None:
    sent.put(slice(0, 10))
    with pytest.raises(UserError, match=message):
        sent.ask(**ask)
    assert sent.ask().applied == 2, "and the next is answered"


def test_all_pairs_are_the_searches_of_every_row(sent: Sent) -> None:
    sent.put(slice(0, 500))
    for which in ("all", "other"):
        ((ids, lists),), _ = sent.server.all_neighbours(sent.order(), 6, which)  # type: ignore[arg-type]
        found = sent.ask(ids=ids, k=6, class_filter=which)
        np.testing.assert_array_equal(lists.ids, found.ids)
        np.testing.assert_array_equal(lists.distances, found.distances)
    reduced, _ = sent.server.all_neighbours(sent.order(), 6, "all", lambda q, n: int((n.ids >= 0).sum()))
    assert [r for _, r in reduced] == [3000] and np.array_equal(reduced[0][0], IDS[:500])
    with pytest.raises(UserError, match="k is 0"):
        sent.server.all_neighbours(sent.order(), 0)


def test_an_older_start_of_the_run_is_refused(sent: Sent) -> None:
    sent.put(slice(0, 3))
    waiting: list[Exception] = []

    def stuck() -> None:
        try:
            sent.server.search(SequenceNumber(1, 9, 8), SearchRequest(1, 0, VALUES[:1]))
        except RunError as error:
            waiting.append(error)

    thread = threading.Thread(target=stuck)
    thread.start()
    new = Sent(sent.server, incarnation=2)
    thread.join()
    assert "(attempt 1) stops" in str(waiting[0]), "one that waited is let go"
    for call in (lambda: sent.put(slice(0, 3)), lambda: Sent(sent.server, incarnation=1)):
        with pytest.raises(RunError, match=r"attempt 2\) now owns the mining server"):
            call()
    letting_go: list[Exception] = []

    def stuck_again() -> None:
        try:
            sent.server.put(SequenceNumber(2, 9, 8), 0, None, None)
        except RunError as error:
            letting_go.append(error)

    thread = threading.Thread(target=stuck_again)
    thread.start()
    sent.server.begin(SPEC, 2, None, 0, server_epoch=1)  # the same start, after the death of another server
    thread.join(2)
    assert letting_go, "what was sent before is let go, and does not hold up what is sent again"
    with pytest.raises(RunError):
        new.put(slice(0, 3))
    sent.server.begin(SPEC, 2, None)
    assert len(sent.server.table) == 0 and Sent(sent.server, 3).ask(embeddings=VALUES[:1]).applied == 0
    with pytest.raises(UserError, match="belongs to run runs/a, not to runs/b"):
        Sent(sent.server, 3, replace(SPEC, run="runs/b"))
    with pytest.raises(RunError, match="has not begun"):
        MiningServer().search(SequenceNumber(1, 1, 0), SearchRequest(1, 0, VALUES[:1]))


# ---- the index -------------------------------------------------------------------------------------------------------


def test_an_index_is_used_from_its_declared_step_and_never_before(sent: Sent) -> None:
    sent = Sent(sent.server, 1, replace(SPEC, engine="ivf", target=0.6))
    server = sent.server
    sent.put(slice(0, 1500))
    server.rebuild(sent.order(), 1, 10, 20, None)
    assert sent.ask(step=19).generation == 0
    assert sent.ask(step=20).generation == 1
    server.rebuild(sent.order(), 2, 30, 40, None)
    assert (sent.ask(step=39).generation, sent.ask(step=40).generation) == (1, 2)
    server.rebuild(sent.order(), 3, 50, 60, None)
    assert [g.number for g in server.generations.all] == [2, 3], "what no step can use any more is gone"


def test_few_rows_are_not_copied_for_an_index(sent: Sent, tmp_path: Path) -> None:
    sent.put(slice(0, 1500))
    sent.server.rebuild(sent.order(), 1, 0, 0, str(tmp_path / "base"))  # engine: auto
    assert sent.ask().generation == 0 and sent.server.generations.all == [] and not (tmp_path / "base").exists()


@pytest.mark.parametrize("which", ["all", "other", "same"])
def test_the_index_knows_rows_that_came_after_it(sent: Sent, which: str) -> None:
    """New rows are searched exactly, moved ones ranked by where they are now, and no wanted class is missed."""
    sent = Sent(sent.server, 1, replace(SPEC, engine="ivf", target=0.9))
    server = sent.server
    sent.put(slice(0, 1500))
    server.rebuild(sent.order(), 1, 0, 0, None)
    sent.put(slice(1500, 2000))
    moved = (IDS[:1], VALUES[1900:1901], LABELS[1900:1901])
    server.put(sent.order(), 3, moved, None)
    queries = Queries(VALUES[1900:2000], IDS[1900:2000], LABELS[1900:2000])
    found = sent.ask(embeddings=queries.values, ids=queries.ids, labels=queries.labels, class_filter=which, k=8, step=5)
    truth = search(queries, server.table.view(), 8, which)  # type: ignore[arg-type]
    recall = np.mean([len({*a} & {*b}) / 8 for a, b in zip(found.ids, truth.ids, strict=True)])
    assert found.generation == 1 and recall > 0.85
    distance = {(q, i): d for q, row in enumerate(truth.ids) for i, d in zip(row, truth.distances[q], strict=True)}
    for q, row in enumerate(found.ids):
        assert all(distance.get((q, i), d) == d for i, d in zip(row, found.distances[q], strict=True))
    assert server.generations.all[0].report is not None and server.generations.all[0].report.recall >= 0.9
    everything = sent.ask(embeddings=VALUES[:3], labels=LABELS[:3], class_filter=which, k=1999, step=5)
    exact = search(Queries(VALUES[:3], np.full(3, -1), LABELS[:3]), server.table.view(), 1999, which)  # type: ignore[arg-type]
    np.testing.assert_array_equal(everything.ids, exact.ids)


def test_a_build_that_fails_is_told_to_who_needs_it(sent: Sent, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(module, "build", fail)
    sent = Sent(sent.server, 1, replace(SPEC, engine="ivf"))
    sent.put(slice(0, 10))
    sent.server.rebuild(sent.order(), 1, 0, 5, None)
    assert sent.ask(step=4).generation == 0
    with pytest.raises(RunError, match="index 1 could not be built: MemoryError: no room"):
        sent.ask(step=5)


def test_a_search_does_not_wait_for_a_build(sent: Sent, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, build = threading.Event(), module.build
    monkeypatch.setattr(module, "build", lambda *a: gate.wait(10) and build(*a))
    sent = Sent(sent.server, 1, replace(SPEC, engine="ivf", target=0.5))
    server = sent.server
    sent.put(slice(0, 1500))
    server.rebuild(sent.order(), 1, 0, 5, None)
    sent.put(slice(1500, 1600))
    assert sent.ask(step=4).generation == 0
    assert server.search(None, SearchRequest(3, 9, VALUES[:2])).generation == 0, "async takes what there is"
    gate.set()
    assert sent.ask(step=5).generation == 1 and server.generations.all[0].index is not None
    assert server.generations.all[0].index.rows == 1500, "built from the rows of its time"


# ---- snapshots -------------------------------------------------------------------------------------------------------


def test_a_snapshot_brings_everything_back(sent: Sent, folder: Folder) -> None:
    """Table, memory, and the same index: built again from the rows it was built from."""
    spec = replace(SPEC, engine="ivf", target=0.6)
    sent = Sent(sent.server, 1, spec)
    server = sent.server
    sent.put(slice(0, 1500), memory=True)
    server.rebuild(sent.order(), 4, 0, 3, (folder / "base-4").uri)
    sent.put(slice(1200, 1700), step=2)
    server.save(sent.order(), folder.uri)
    expected = [sent.ask(step=step, embeddings=VALUES[:50], class_filter="all", k=7) for step in (2, 3)]
    sent.put(slice(1700, 2000), memory=True)  # after the snapshot
    for other in (MiningServer(), server):  # after its death; and the same process, workers started again
        again = Sent(other, incarnation=2, spec=spec, snapshot=folder.uri)
        got = [again.ask(step=step, embeddings=VALUES[:50], class_filter="all", k=7) for step in (2, 3)]
        assert all(same(a, b) for a, b in zip(got, expected, strict=True))
        assert [a.generation for a in got] == [0, 4] and other.memory.version == 1500
        assert np.array_equal(got[0].steps, expected[0].steps)
        again.incarnation = 2
    for name in ("table.values.00000.npy", "memory.features.00000.npy"):
        data = folder.read(f"0/{name}")
        folder.write(f"0/{name}", data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{name} is damaged: resume from an older checkpoint"):
            Sent(MiningServer(), 3, spec, folder.uri)
        folder.write(f"0/{name}", data)
    folder.remove("0/table.ids.00000.npy")
    with pytest.raises(UserError, match="is missing"):
        Sent(MiningServer(), 3, spec, folder.uri)


def test_a_snapshot_of_something_else_is_refused(sent: Sent, tmp_path: Path) -> None:
    sent.put(slice(0, 9))
    sent.server.save(sent.order(), str(tmp_path / "a"))
    for spec in (replace(SPEC, run="runs/b"), replace(SPEC, dim=9)):
        with pytest.raises(UserError, match="snapshot of run runs/a with dimension 8, expected"):
            Sent(MiningServer(), 1, spec, str(tmp_path / "a"))
    with pytest.raises(UserError, match="holds no mining snapshot"):
        Sent(MiningServer(), 1, SPEC, str(tmp_path / "nothing"))


def test_files_of_a_snapshot_have_bounded_size(sent: Sent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_PART_BYTES", 1000)
    sent.put(slice(0, 300))
    files = sent.server.save(sent.order(), str(tmp_path))
    assert len([f for f in files if f.startswith("table.values")]) == 10
    assert np.array_equal(Sent(MiningServer(), 1, SPEC, str(tmp_path)).server.table.get(IDS[:300])[0], VALUES[:300])


# ---- many threads ----------------------------------------------------------------------------------------------------


def test_searches_and_puts_at_once_see_whole_rows(sent: Sent) -> None:
    """Every row is always the same number eight times; a search that saw a half-written one would find another distance."""
    server, stop, wrong, searched = sent.server, threading.Event(), [], [0]
    constant = np.repeat(np.arange(200, dtype=np.float32)[:, None], 8, 1)
    server.put(sent.order(), 0, (IDS[:200], constant, LABELS[:200]), None)

    def look() -> None:
        while not stop.is_set():
            found = server.search(None, SearchRequest(200, 0, np.zeros((1, 8), np.float32), with_embeddings=True))
            assert found.embeddings is not None
            rows = found.embeddings[0]
            if not ((rows == rows[:, :1]).all() and np.allclose((rows**2).sum(1), found.distances[0])):
                wrong.append(rows)
            searched[0] += 1

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    deadline, step = time.monotonic() + 1.5, 0
    while time.monotonic() < deadline or searched[0] < 20:
        step += 1
        server.put(sent.order(), step, (IDS[:200], np.roll(constant, step, 0), LABELS[:200]), None)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong and step > 20
