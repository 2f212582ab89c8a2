"""The client: any number of shards, servers that die at any moment, bounded queues, clear ends."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import RunError, UserError
from pipeline.mining import faiss_index
from pipeline.mining.client import MiningClient
from pipeline.mining.embedding_table import shard_of
from pipeline.mining.messages import SearchRequest, SearchResponse, ServerSpec
from pipeline.mining.server import MiningServer
from pipeline.mining.transport import LocalTransport, ServerGone
from pipeline.storage import Folder
from tests.pipeline.mining.oracle import clustered

IDS, VALUES, LABELS = clustered(1200, 8, 60)
SPEC = ServerSpec(run="runs/a", dim=8, per_class=3, k=5, wait_s=30.0)
MakeClient = Callable[..., MiningClient]


class Mortal:
    """A server that dies at the calls it is told (before or after doing them), and comes back empty a little later."""

    def __init__(self, deaths: set[int] = frozenset(), after: bool = False, away: int = 2) -> None:  # type: ignore[assignment]
        self.server, self.calls, self.deaths, self.after, self.away = MiningServer(), 0, deaths, after, away
        self.down = 0
        self.begun = 0

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        self.calls += 1
        self.begun += method == "begin"
        gone: Future[Any] = Future()
        gone.set_exception(ServerGone("killed"))
        if self.down:
            self.down -= 1
            return gone
        if self.calls in self.deaths:
            if self.after:
                LocalTransport(self.server).call(method, *arguments)
            self.server, self.down = MiningServer(), self.away
            return gone
        return LocalTransport(self.server).call(method, *arguments)

    def restart(self) -> None:
        raise AssertionError("it always answers")


@pytest.fixture
def make_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("pipeline.mining.request_log._POLL_S", 0.01)
    made: list[MiningClient] = []

    def make(transports: Any, spec: ServerSpec = SPEC, snapshot: str | None = None, **options: Any) -> MiningClient:
        client = MiningClient(transports, spec, 1 + len(made), Folder(tmp_path / "run"), **options)
        made.append(client)
        client.begin(snapshot)
        return client

    yield make
    for client in made:
        client.close()


def put(client: MiningClient, rows: Any, step: int, memory: bool = True) -> None:
    client.put(IDS[rows], VALUES[rows], LABELS[rows], step, True, memory)


def outcome(client: MiningClient, tmp_path: Path, name: str) -> list[Any]:
    """What a small run hears from its servers: searches between puts, an index, a snapshot, all pairs, the memory."""
    heard: list[Any] = []
    for step, rows in enumerate(np.array_split(np.arange(1200), 12)):
        put(client, rows, step)
        ask = SearchRequest(
            4, step, ids=IDS[rows[:6]], class_filter=("all", "other", "same")[step % 3], with_embeddings=step % 2 == 0
        )  # type: ignore[arg-type]
        heard.append(client.search(ask))
        if step == 4:
            client.save(str(tmp_path / name))
        if step == 7:
            client.rebuild(1, step, step + 2, str(tmp_path / f"{name}-base"))
    heard = [client.wait(answer) for answer in heard]
    ids, (lists,), _ = client.all_neighbours(5, "other")
    delta = client.changes_since(0)
    return [*heard, ids, lists.ids, lists.distances, delta.features, delta.ids]


def assert_same(got: list[Any], expected: list[Any]) -> None:
    for a, b in zip(got, expected, strict=True):
        if isinstance(a, SearchResponse):
            for name in ("ids", "distances", "labels", "steps", "embeddings"):
                x, y = getattr(a, name), getattr(b, name)
                assert (x is None) == (y is None) and (x is None or np.array_equal(x, y)), name
        else:
            assert np.array_equal(a, b)


@pytest.mark.parametrize("shards", [2, 4])
def test_answers_do_not_depend_on_the_number_of_shards(make_client: MakeClient, tmp_path: Path, shards: int) -> None:
    expected = outcome(make_client([LocalTransport(MiningServer())]), tmp_path, "one")
    client = make_client([LocalTransport(MiningServer()) for _ in range(shards)])
    assert_same(outcome(client, tmp_path, "more"), expected)
    sizes = [status["rows"] for status in client.status()]
    assert sum(sizes) == 1200 and min(sizes) > 0.7 * 1200 / shards
    unknown = SearchRequest(3, 0, ids=np.array([IDS[0], -5]), missing="empty", with_embeddings=True)
    found = client.wait(client.search(unknown))
    assert (found.ids[0] >= 0).all() and (found.ids[1] == -1).all() and not found.embeddings[1].any()
    with pytest.raises(UserError, match="have no embedding in the table"):
        client.wait(client.search(SearchRequest(3, 0, ids=np.array([-5]))))
    assert client.wait(client.search(SearchRequest(3, 0, ids=IDS[:2]))).ids.shape == (2, 3), "and the client goes on"


@pytest.mark.parametrize("shards", [(1, 3), (3, 1), (2, 4)])
def test_a_snapshot_may_be_read_by_another_number_of_shards(
    make_client: MakeClient, tmp_path: Path, shards: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Table, memory and index; and what they save then is complete again."""
    monkeypatch.setattr(faiss_index, "_MIN_ROWS", 100)
    spec = replace(SPEC, engine="ivf", target=0.5)
    first = make_client([LocalTransport(MiningServer()) for _ in range(shards[0])], spec)
    for step, rows in enumerate(np.array_split(np.arange(1200), 12)):
        put(first, np.concatenate([rows, rows[:3]]), step)
    asks = [
        SearchRequest(6, 12, ids=IDS[:40], class_filter=which, with_embeddings=True)
        for which in ("all", "other", "same")
    ]  # type: ignore[arg-type]
    expected = [first.wait(first.search(ask)) for ask in asks]
    pairs, memory = first.all_neighbours(5), first.changes_since(0)
    first.rebuild(1, 12, 30, str(tmp_path / "mining" / "base-1"))
    first.save(str(tmp_path / "a"))
    folder = "a"
    for number, name in ((shards[1], "b"), (shards[1], "c"), (shards[0], "d")):
        client = make_client([LocalTransport(MiningServer()) for _ in range(number)], spec, str(tmp_path / folder))
        assert_same([client.wait(client.search(ask)) for ask in asks], expected)
        again = client.all_neighbours(5)
        assert_same([again[0], again[1][0].ids], [pairs[0], pairs[1][0].ids])
        assert np.array_equal(client.changes_since(0).features, memory.features)
        later = client.wait(client.search(SearchRequest(3, 30, ids=IDS[:40])))
        assert later.generation == 1 and later.recall >= 0.5
        client.save(str(tmp_path / name))
        folder = name


def test_the_shard_of_an_id_is_fixed() -> None:
    assert shard_of(np.array([0, 1, 2, 10**12, -4]), 4).tolist() == [3, 1, 2, 0, 2]
    assert np.bincount(shard_of(np.arange(10_000), 5)).min() > 1800


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("after", [False, True])
def test_a_server_may_die_at_any_call(make_client: MakeClient, tmp_path: Path, shards: int, after: bool) -> None:
    """Every acknowledged batch is there after it, every search is answered as if nothing had happened."""
    expected = outcome(make_client([LocalTransport(MiningServer()) for _ in range(shards)]), tmp_path, "whole")
    for death in range(2, 30, 3):
        servers = [Mortal({death} if shard == shards - 1 else set(), after) for shard in range(shards)]
        client = make_client(servers)
        assert_same(outcome(client, tmp_path, f"{death}"), expected)
        assert client.recoveries >= 1 and servers[-1].begun >= 2, death


def test_many_deaths(make_client: MakeClient, tmp_path: Path) -> None:
    expected = outcome(make_client([LocalTransport(MiningServer()) for _ in range(2)]), tmp_path, "whole")
    draw = random.Random(0)
    servers = [Mortal(set(draw.sample(range(2, 90), 6)), after=bool(s)) for s in range(2)]
    client = make_client(servers)
    assert_same(outcome(client, tmp_path, "many"), expected)
    assert client.recoveries > 4


def test_a_snapshot_shortens_what_is_sent_again(make_client: MakeClient, tmp_path: Path) -> None:
    server = Mortal()
    client = make_client([server])
    for step in range(10):
        put(client, slice(step * 50, step * 50 + 50), step)
    client.save(str(tmp_path / "snapshot"))
    put(client, slice(500, 550), 10)
    client.status()
    server.deaths, before = {server.calls + 1}, server.calls
    found = client.wait(client.search(SearchRequest(5, 11, embeddings=VALUES[:3])))
    assert server.calls - before <= 1 + server.away + 1 + 2, "begin, one batch, the search"
    assert found.applied >= 12 and client.status()[0]["rows"] == 550


def test_a_long_log_is_saved_by_the_client_itself(make_client: MakeClient, tmp_path: Path) -> None:
    server = Mortal()
    client = make_client([server], log_bytes=20_000)
    for step in range(40):
        put(client, slice(step * 20, step * 20 + 20), step)
        client.status()
    kept = Folder(tmp_path / "run" / "mining").names()
    assert len(kept) == 1 and kept[0].startswith("log-1-"), "the newest alone"
    assert sum(o.size for o in client._log) < 40_000
    server.deaths = {server.calls + 1}
    client.wait(client.search(SearchRequest(1, 0, embeddings=VALUES[:1])))
    assert client.status()[0]["rows"] == 800


def test_its_own_snapshots_and_the_run_s_batches_do_not_mix_up(make_client: MakeClient) -> None:
    """Both threads send; every batch counts, in its order."""
    for shards in (1, 2):
        client = make_client([LocalTransport(MiningServer()) for _ in range(shards)], log_bytes=2000, in_flight=50)
        for step in range(400):
            put(client, slice(step % 100, step % 100 + 20), step)
        client.put(IDS[:0], VALUES[:0], LABELS[:0], 400)
        found = client.wait(client.search(SearchRequest(119, 400, embeddings=VALUES[:1])))
        steps = dict(zip(found.ids[0].tolist(), found.steps[0].tolist(), strict=True))
        assert [steps[int(i)] for i in IDS[:119]] == [min(300 + row, 399) for row in range(119)]
        assert client.changes_since(0).version == 400 * 20


def test_puts_wait_when_too_many_are_on_their_way(make_client: MakeClient) -> None:
    class Slow(LocalTransport):
        gate = threading.Event()

        def call(self, method: str, *arguments: Any) -> Future[Any]:
            if method != "put":
                return super().call(method, *arguments)
            out: Future[Any] = Future()

            def later() -> None:
                self.gate.wait()
                LocalTransport.call(self, method, *arguments)
                out.set_result(None)

            threading.Thread(target=later).start()
            return out

    client = make_client([Slow(MiningServer())], in_flight=3)
    sent: list[int] = []

    def train() -> None:
        for step in range(6):
            put(client, slice(step, step + 1), step)
            sent.append(step)

    thread = threading.Thread(target=train)
    thread.start()
    time.sleep(0.3)
    assert sent == [0, 1, 2]
    Slow.gate.set()
    thread.join(10)
    client.wait(client.search(SearchRequest(1, 0, embeddings=VALUES[:1])))  # after all puts
    assert sent == list(range(6)) and client.status()[0]["rows"] == 6


class Frozen:
    """A server whose process stops at a call: nothing is answered any more, until it is started again."""

    def __init__(self, stops_at: int) -> None:
        self.server, self.calls, self.stops_at, self.restarts = MiningServer(), 0, stops_at, 0

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        self.calls += method not in ("status", "begin")
        if self.calls >= self.stops_at and not self.restarts:
            return Future()
        return LocalTransport(self.server).call(method, *arguments)

    def restart(self) -> None:
        self.server, self.restarts = MiningServer(), self.restarts + 1


@pytest.mark.parametrize("shards", [1, 2])
def test_a_server_that_freezes_is_started_again_and_named(
    make_client: MakeClient, shards: int, caplog: pytest.LogCaptureFixture
) -> None:
    servers = [Frozen(stops_at=10**9) for _ in range(shards)]
    servers[-1].stops_at = 3
    client = make_client(servers, deadline_s=0.6)
    for step in range(6):
        put(client, slice(10 * step, 10 * step + 10), step)
    found = client.wait(client.search(SearchRequest(60, 6, embeddings=VALUES[:1])))
    assert sorted(found.ids[0].tolist()) == sorted(IDS[:60].tolist()), "every row is there"
    assert [server.restarts for server in servers] == [0] * (shards - 1) + [1] and client.recoveries == 1
    (line,) = (record.getMessage() for record in caplog.records)
    assert (
        line.startswith(f"mining server {shards - 1}")
        and "gives no sign of life for 0 s (half of mining.deadline_s)" in line
    )


def test_a_long_call_of_a_server_that_lives_is_waited_for(make_client: MakeClient) -> None:
    class Busy(LocalTransport):
        def call(self, method: str, *arguments: Any) -> Future[Any]:
            if method != "search":
                return super().call(method, *arguments)
            out: Future[Any] = Future()
            threading.Timer(1.0, lambda: out.set_result(LocalTransport.call(self, method, *arguments).result())).start()
            return out

    client = make_client([Busy(MiningServer())], deadline_s=0.3)
    put(client, slice(0, 9), 0)
    assert client.wait(client.search(SearchRequest(1, 0, embeddings=VALUES[:1]))).ids[0, 0] == IDS[0]
    assert client.recoveries == 0


def test_a_server_that_stays_away_ends_the_run_in_time(make_client: MakeClient) -> None:
    server = Mortal(away=10**9)
    client = make_client([server], deadline_s=0.4)
    put(client, slice(0, 5), 0)
    client.status()
    server.deaths = {server.calls + 1}
    started = time.monotonic()
    with pytest.raises(RunError, match=r"mining server 0 could not be reached within 0.4 s \(killed\): check"):
        client.wait(client.search(SearchRequest(1, 0, embeddings=VALUES[:1])))
    assert time.monotonic() - started < 5
    with pytest.raises(RunError, match="could not be reached within"):
        for step in range(20):
            put(client, slice(0, 5), step)


def test_servers_that_die_of_the_same_call_again_and_again_end_the_run(make_client: MakeClient) -> None:
    server = Mortal(away=0)
    client = make_client([server])
    begun = server.calls
    server.deaths = {c for c in range(begun + 1, begun + 100) if (c - begun) % 2}  # each begin works, each search kills
    with pytest.raises(RunError, match="restarted 5 times without completing a request"):
        client.wait(client.search(SearchRequest(1, 0, embeddings=VALUES[:1])))


def test_a_bad_batch_is_refused_before_it_is_sent(make_client: MakeClient) -> None:
    client = make_client([LocalTransport(MiningServer())])
    bad = VALUES[:2].copy()
    bad[0] = np.nan
    with pytest.raises(UserError, match=f"1 of 2 embeddings are not finite \\(sample ids {IDS[0]}\\)"):
        client.put(IDS[:2], bad, LABELS[:2], 0)
    put(client, slice(0, 2), 0)
    assert client.status()[0]["rows"] == 2


def test_a_start_that_was_overtaken_is_told(make_client: MakeClient) -> None:
    server = MiningServer()
    old, new = make_client([LocalTransport(server)]), make_client([LocalTransport(server)])
    put(new, slice(0, 4), 0)
    put(old, slice(4, 8), 0)
    with pytest.raises(RunError, match=r"another process \(attempt 2\) now owns the mining server"):
        for _ in range(20):
            old.wait(old.search(SearchRequest(1, 0, embeddings=VALUES[:1])))
    assert new.status()[0]["rows"] == 4


def test_async_answers_do_not_wait_and_tell_their_lag(make_client: MakeClient) -> None:
    class Late(LocalTransport):
        """Puts take a while; searches overtake them, as in an actor."""

        def call(self, method: str, *arguments: Any) -> Future[Any]:
            out: Future[Any] = Future()
            if method != "put":
                return super().call(method, *arguments)
            threading.Timer(0.3, lambda: out.set_result(LocalTransport.call(self, method, *arguments).result())).start()
            return out

    for ordered in (True, False):
        client = make_client([Late(MiningServer())], ordered=ordered)
        put(client, slice(0, 9), 0)
        if ordered:  # the server would wait for the batch, which this transport delivers behind its back
            found = client.wait(client.search(SearchRequest(1, 0, embeddings=VALUES[:1])))
            assert found.ids[0, 0] == IDS[0] and client.lag == 0
        else:
            found = client.wait(client.search(SearchRequest(1, 0, embeddings=VALUES[:1])))
            assert found.ids[0, 0] == -1 and client.lag == 1
