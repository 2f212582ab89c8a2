"""Mining servers as real Ray actors: killed with SIGKILL at any moment, several of them, and two runs at once."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import Config
from pipeline.data.store import Store
from pipeline.mining.actor import RayTransport, start_servers
from pipeline.mining.client import MiningClient
from pipeline.mining.messages import SearchRequest, SearchResponse
from pipeline.mining.server import MiningServer
from pipeline.mining.transport import LocalTransport, ServerGone
from pipeline.runs.run_folder import run_folder
from pipeline.runs.tracking import read_metrics
from pipeline.storage import Folder
from pipeline.training.launch import run_in_process
from pipeline.training.ray_train import run_on_ray
from tests.cluster.test_ray import on_ray, silent, tensors
from tests.laws.runs import METHODS_TRIED
from tests.pipeline.mining.test_client import IDS, LABELS, SPEC, VALUES, assert_same

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def ray_here() -> Iterator[Any]:
    from pipeline.distributed.ray_session import ray_session

    with ray_session(10) as ray:
        yield ray


def pid_of(remote: RayTransport) -> int:
    while True:
        try:
            return int(remote.call("status").result(60)["pid"])
        except ServerGone:  # on its way back from the last kill
            time.sleep(0.1)


class Work:
    """Batches, searches, builds and snapshots in a fixed order; `kill` may strike between any two."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def __call__(self, client: MiningClient, strike: Callable[[str], None]) -> list[Any]:
        heard: list[Any] = []
        for step, rows in enumerate(np.array_split(np.arange(1200), 30)):
            client.put(IDS[rows], VALUES[rows], LABELS[rows], step, True, True)
            strike("put")
            ask = SearchRequest(4, step, ids=IDS[rows[:6]], class_filter="other", with_embeddings=True)
            heard.append(client.search(ask))
            strike("search")
            if step % 10 == 6:
                client.rebuild(step, step, step + 2, str(self.folder / f"{self.name}-base-{step}"))
                strike("rebuild")
            if step % 12 == 9:
                client.save(str(self.folder / f"{self.name}-{step}"))
                strike("save")
        heard = [client.wait(answer) for answer in heard]
        delta = client.changes_since(0)
        assert sum(status["rows"] for status in client.status()) == 1200, "every acknowledged row is there"
        return [*heard, delta.features, delta.ids]


def expected(tmp_path: Path) -> list[Any]:
    client = MiningClient([LocalTransport(MiningServer())], SPEC, 1, Folder(tmp_path / "run"))
    client.begin(None)
    heard = Work(tmp_path, "here")(client, lambda _: None)
    client.close()
    return heard


def kill_while(
    ray: Any, tmp_path: Path, moments: dict[str, float], shards: int, name: str
) -> tuple[list[Any], int, int]:
    """Does the work with servers that are killed a moment after some operations; how often, and recoveries."""
    servers = [RayTransport(actor) for actor in start_servers(ray, name, shards)]
    client = MiningClient(servers, SPEC, 1, Folder(tmp_path / name))
    client.begin(None)
    pids = [pid_of(server) for server in servers]
    killed: list[int] = []
    lock = threading.Lock()

    def kill(shard: int) -> None:
        with lock:
            os.kill(pids[shard], signal.SIGKILL)
            killed.append(pids[shard])

    calls = {"put": 0, "search": 0, "rebuild": 0, "save": 0}

    def strike(what: str) -> None:
        calls[what] += 1
        delay = moments.pop(f"{what}{calls[what]}", None)
        if delay is not None:
            victim = len(killed) % shards
            pids[victim] = pid_of(servers[victim])  # may have been started again since
            threading.Timer(delay, kill, (victim,)).start()

    heard = Work(tmp_path, name)(client, strike)
    recoveries = client.recoveries
    client.close()
    for server in servers:
        ray.kill(server.actor)
    return heard, len(killed), recoveries


def test_an_actor_killed_during_put_search_rebuild_and_snapshot(ray_here: Any, tmp_path: Path) -> None:
    truth = expected(tmp_path)
    moments = {"put3": 0.0, "search12": 0.001, "rebuild2": 0.002, "save1": 0.0}
    heard, killed, recoveries = kill_while(ray_here, tmp_path, moments, 1, "one")
    assert_same(heard, truth)
    assert killed == 4 and recoveries >= 2  # two kills may fall into one absence


@pytest.mark.slow
def test_a_stopped_server_is_found_named_and_started_again(
    ray_here: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SIGSTOP: nobody waits for ever, and every answer is that of the undisturbed work."""
    servers = [RayTransport(actor) for actor in start_servers(ray_here, "stopped", 2)]
    client = MiningClient(servers, SPEC, 1, Folder(tmp_path / "stopped"))
    client.silent_s = 8.0
    client.begin(None)
    victim, searches = pid_of(servers[1]), iter(range(1000))

    def strike(what: str) -> None:
        if what == "search" and next(searches) == 8:
            os.kill(victim, signal.SIGSTOP)

    started = time.monotonic()
    heard = Work(tmp_path, "stopped")(client, strike)
    assert time.monotonic() - started < 8 + 120 and client.recoveries == 1
    assert_same(heard, expected(tmp_path))
    (line,) = (record.getMessage() for record in caplog.records if record.name == "pipeline.mining.request_log")
    assert (
        line.startswith("mining server 1") and f"(process {victim} on " in line and "gives no sign of life for " in line
    )
    client.close()
    for server in servers:
        ray_here.kill(server.actor)


@pytest.mark.slow
def test_three_shards_one_of_them_killed(ray_here: Any, tmp_path: Path) -> None:
    heard, killed, recoveries = kill_while(ray_here, tmp_path, {"search8": 0.0}, 3, "three")
    assert_same(heard, expected(tmp_path))
    assert killed == 1 and recoveries >= 1


@pytest.mark.slow
def test_twenty_random_kills(ray_here: Any, tmp_path: Path) -> None:
    truth, draw = expected(tmp_path), random.Random(5)
    total = 0
    for trial in range(10):
        names = [
            f"{w}{n}" for w, most in (("put", 30), ("search", 30), ("rebuild", 3), ("save", 2)) for n in range(1, most)
        ]
        moments = {name: draw.uniform(0, 0.02) for name in draw.sample(names, 2)}
        heard, killed, _ = kill_while(ray_here, tmp_path, moments, 1 + trial % 3, f"trial{trial}")
        assert_same(heard, truth)
        total += killed
    assert total == 20


MINED_RUN = {"mining.shards": 2, "length": "4 epochs", "checkpoint.every": "3 steps"}
MINED = MINED_RUN | {"method.hard_negatives": 3, "method.memory": 30}


def mining_actors(ray: Any, run: str) -> list[Any]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return [ray.get_actor(**n) for n in named if n["name"].startswith(f"mining-{run}-")]


class Killer:
    """Kills all mining servers of a name at once, in the middle of an epoch."""

    def __init__(self, ray: Any, run: str, step: int) -> None:
        self.ray, self.run, self.step, self.victims = ray, run, step, list[int]()

    def __call__(self, state: dict[str, Any]) -> None:
        if not self.victims and state["progress"].get("step", 0) >= self.step:
            actors = mining_actors(self.ray, self.run)
            self.victims += [s["pid"] for s in self.ray.get([actor.status.remote() for actor in actors])]
            for victim in self.victims:
                os.kill(victim, signal.SIGKILL)


TWINS: list[tuple[dict[str, Any], int]] = [
    (METHODS_TRIED["mmsi"] | {"length": "12 epochs"}, 5),
    (METHODS_TRIED["smart_mining"] | {"length": "5 epochs"}, 12),
]


@pytest.mark.slow
def test_two_runs_of_one_name_never_meet_and_survive_their_mining_servers(
    ray_here: Any, make_config: Callable[..., Config], store: Store, tmp_path: Path
) -> None:
    """At once on one cluster, servers killed twice; each ends with the weights it has alone in one process, bit for bit."""
    runs = []
    for seed, (changes, _) in enumerate(TWINS):
        config = on_ray(make_config(MINED_RUN | changes | {"seed": seed}, name="twin"), loader="in_process", workers=1)
        runs.append(config.model_copy(update={"storage": str(tmp_path / f"storage{seed}")}))
    killers = [Killer(ray_here, "twin", step) for _, step in TWINS]
    threads = [
        threading.Thread(target=run_on_ray, args=(config, store.folder.uri, show, ray_here))
        for config, show in zip(runs, killers, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(killer.victims for killer in killers), "a kill never happened"
    for config in runs:
        alone = config.model_copy(update={"storage": str(tmp_path / f"alone{config.seed}")})
        run_in_process(alone, store.folder.uri, silent)
        first, second = tensors(config), tensors(alone)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    lines = [[x for x in read_metrics(run_folder(c)) if x["kind"] == "train"][-1] for c in runs]
    assert all(line["mining/recoveries"] >= 1 for line in lines)
    assert lines[0]["weight/positive_max"] == 1 and lines[1]["share/random"] < 1
    deadline = time.monotonic() + 20
    while mining_actors(ray_here, "twin") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert mining_actors(ray_here, "twin") == [], "servers end with their run"


@pytest.mark.slow
def test_two_workers_whose_mining_server_dies_end_with_the_same_weights(
    ray_here: Any, make_config: Callable[..., Config], store: Store
) -> None:
    runs = {name: on_ray(make_config(MINED, name=name), loader="in_process") for name in ("calm", "hit")}
    run_on_ray(runs["calm"], store.folder.uri, silent, ray_here)
    killer = Killer(ray_here, "hit", 5)
    run_on_ray(runs["hit"], store.folder.uri, killer, ray_here)
    calm, hit = tensors(runs["calm"]), tensors(runs["hit"])
    assert killer.victims and calm.keys() == hit.keys() and all(torch.equal(calm[n], hit[n]) for n in calm)


def test_searches_go_on_while_an_index_is_built(ray_here: Any, tmp_path: Path) -> None:
    """In the actor, a long build takes a thread of its own; puts and searches pass it."""
    (server,) = [RayTransport(actor) for actor in start_servers(ray_here, "busy")]
    client = MiningClient(
        [server], SPEC.__class__(run="busy", dim=64, engine="hnsw", k=10, target=0.1), 1, Folder(tmp_path)
    )
    client.begin(None)
    draw = np.random.default_rng(0)
    values = draw.normal(size=(8_000, 64)).astype(np.float32)
    client.put(np.arange(8_000), values, np.arange(8_000) % 500, 0)
    client.rebuild(1, 0, 5, None)
    started, answered = time.perf_counter(), 0
    while True:
        answer: SearchResponse = client.wait(client.search(SearchRequest(5, 4, embeddings=values[:8])))
        assert answer.generation == 0
        client.put(np.arange(8), values[:8], np.arange(8), 1)
        if client.status()[0]["index"] is not None:
            break
        answered += 1
    assert time.perf_counter() - started > 0.3 and answered > 5, "the build took its time, nobody waited for it"
    assert client.wait(client.search(SearchRequest(5, 5, embeddings=values[:8]))).generation == 1
    client.close()
    ray_here.kill(server.actor)
