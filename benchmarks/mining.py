"""What mining over the whole training set costs.

    python -m benchmarks.mining [--only actor step rebuild pairs auto memory] [--rounds 7] [--json PATH]

actor    a query of 256 × k = 16 on 60,000 × 512 rows through the Ray actor, against the same faiss index called directly:
         with as many lists as these rows need (2 of 980: they are easy), and with 16, as embeddings that overlap more do
step     a training step of about 150 ms on one core, with each batch put, and with neighbours prefetched
rebuild  latency of a query of 64 while an index is built in the same actor, against an idle one
pairs    all rows' exact top 50, N = 20,000, against faiss's flat index; the lists are compared after exact re-ranking
auto     the engine that `auto` takes for building and N queries (k = 10), against the best one that reaches recall 0.95
memory   bytes a row of the table, in a fresh process; bytes and seconds of indexes; seconds of an epoch's searches

Rows are unit vectors around class centres, five of a class, as in Stanford Online Products. Sides alternate; ratios are
medians over pairs; CPU-seconds are those of the process, or of the actor's process. One thread on either side.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np
import torch

from benchmarks.table import Row, finish
from pipeline.distributed.ray_session import ray_session
from pipeline.mining.actor import RayTransport, start_servers
from pipeline.mining.client import MiningClient
from pipeline.mining.embedding_table import Table
from pipeline.mining.faiss_index import ENGINES, Engine, auto_engine, build
from pipeline.mining.messages import SearchRequest, ServerSpec
from pipeline.mining.server import MiningServer
from pipeline.neighbours.exact_search import Neighbours, Queries, Rows, rerank, search, search_all
from pipeline.storage import Folder

SECTIONS = ("actor", "step", "rebuild", "pairs", "auto", "memory")
NOISE = 0.7  # of a row around its class centre, as a share of the centre's length


def make_rows(count: int, dim: int, seed: int = 0, noise: float = NOISE) -> Rows:
    random = np.random.default_rng(seed)
    labels = np.arange(count) // 5
    centres = random.standard_normal((count // 5 + 1, dim), dtype=np.float32)
    centres += random.standard_normal((count // 100 + 1, dim), dtype=np.float32)[np.arange(len(centres)) // 20]
    values = centres[labels] + noise * random.standard_normal((count, dim), dtype=np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return Rows(values, np.arange(count), labels, 1.001)


def pairs(
    first: Callable[[], Any],
    second: Callable[[], Any],
    rounds: int,
    clock: Callable[[], float],
    between: Callable[[], Any] = lambda: None,
) -> tuple[float, float, float]:
    """Medians of both and of their ratio; the two alternate, after one uncounted round; `between` sides is not counted."""
    times: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        row = []
        for side in (first, second):
            started = clock()
            side()
            row.append(clock() - started)
            between()
        times.append((row[0], row[1]))
    times = times[1:]
    a, b = (statistics.median(t[i] for t in times) for i in (0, 1))
    return a, b, statistics.median(t[0] / t[1] for t in times)


@contextmanager
def served(ray: Any, rows: Rows, spec: ServerSpec) -> Iterator[MiningClient]:
    """A server in an actor that holds the rows."""
    actors = start_servers(ray, "benchmark")
    with tempfile.TemporaryDirectory() as folder:
        client = MiningClient([RayTransport(a) for a in actors], spec, 1, Folder(folder))
        client.begin(None)
        for start in range(0, len(rows), 4096):
            part = slice(start, start + 4096)
            client.put(rows.ids[part], rows.values[part], rows.labels[part], 0)
        client.wait(client.search(SearchRequest(1, 0, rows.values[:1])))
        yield client
        client.close()
    for actor in actors:
        ray.kill(actor)


# ---- sections --------------------------------------------------------------------------------------------------------


def measure_actor(ray: Any, rounds: int) -> list[Row]:
    rows = make_rows(60_000, 512)
    spec = ServerSpec("benchmark", 512, 60_000, engine="ivf", k=16, target=0.95)
    index, report = build(rows, "ivf", 16, 0.95)
    assert index is not None, report
    queries = np.ascontiguousarray(rows.values[::230][:256])
    lists, out = report.parameters["lists"], []
    with served(ray, rows, spec) as client:
        client.rebuild(1, 0, 0, None)
        client.wait(client.search(SearchRequest(16, 1, queries)))
        for width, promised in ((report.parameters["nprobe"], ""), (16, "<= 1.3")):
            index.set_search_width(width)
            ray.get(client.transports[0].actor.__ray_call__.remote(_widen, width))  # type: ignore[attr-defined]
            ours, other, ratio = pairs(
                lambda: client.wait(client.search(SearchRequest(16, 1, queries))),
                lambda: index._index.search(queries, 16),
                5 * rounds,
                time.perf_counter,
            )
            what = f"256 queries, k = 16, 60,000 x 512, ivf, {width} of {lists} lists, ms: actor, exact distances / faiss directly"
            out.append(Row(what, 1e3 * ours, 1e3 * other, ratio, promised, not promised or ratio <= 1.3))
    return out


def _widen(server: MiningServer, width: int) -> None:
    generation = server.generations.for_step(1, wait=True)
    assert generation is not None and generation.index is not None
    generation.index.set_search_width(width)


def measure_step(ray: Any, rounds: int) -> list[Row]:
    dim, batch = 512, 96
    rows = make_rows(60_000, dim)
    matrix, out = torch.randn(1024, 1024), []
    started = time.perf_counter()
    for _ in range(5):
        matrix @ matrix
    repeats = max(1, round(0.15 / ((time.perf_counter() - started) / 5)))
    order = np.random.default_rng(0).permutation(60_000)

    def step() -> None:
        for _ in range(repeats):
            matrix @ matrix

    with served(ray, rows, ServerSpec("benchmark", dim, 60_000, engine="ivf", k=16)) as client:
        client.rebuild(1, 0, 0, None)
        client.wait(client.search(SearchRequest(16, 1, rows.values[:64])))

        def putting() -> None:
            for s in range(5):
                ids = order[s * batch : (s + 1) * batch]
                client.put(ids, rows.values[ids], rows.labels[ids], s)
                step()

        ready = [client.search(SearchRequest(16, 1, ids=order[:batch]))]

        def asking() -> None:
            for s in range(5):
                client.wait(ready.pop())
                ready.append(client.search(SearchRequest(16, 1, ids=order[s * batch : (s + 1) * batch])))
                step()

        def plain() -> None:
            for _ in range(5):
                step()

        for name, work, most in (("each batch put", putting, 1.03), ("neighbours prefetched", asking, 1.05)):
            ours, other, ratio = pairs(work, plain, 4 * rounds, time.perf_counter, lambda: client.wait(ready[0]))
            what = f"training step, ms: {name} / without"
            out.append(Row(what, 1e3 * ours / 5, 1e3 * other / 5, ratio, f"<= {most}", ratio <= most))
    return out


def measure_rebuild(ray: Any, rounds: int) -> list[Row]:
    rows = make_rows(60_000, 128)
    with served(ray, rows, ServerSpec("benchmark", 128, 60_000, engine="ivf", k=16, target=0.9)) as client:
        client.rebuild(1, 0, 0, None)
        ask = SearchRequest(16, 1, rows.values[:64])
        client.wait(client.search(ask))

        def latencies(until: Callable[[int], bool]) -> list[float]:
            out: list[float] = []
            while not until(len(out)):
                started = time.perf_counter()
                client.wait(client.search(ask))
                out.append(time.perf_counter() - started)
            return out

        idle, busy = list[float](), list[float]()
        for generation in range(2, 2 + rounds):
            idle += latencies(lambda n: n >= 100)
            client.rebuild(generation, 1, 1000, None)
            busy += latencies(lambda _: client.status()[0]["building"] == 0)
    p50, p95, worst = statistics.median(idle), float(np.quantile(busy, 0.95)), max(busy)
    return [
        Row(f"64 queries during a rebuild, p95, ms ({len(busy)} queries) / idle, median", 1e3 * p95, 1e3 * p50, p95 / p50, "< 3", p95 < 3 * p50),
        Row("64 queries during a rebuild, slowest, ms / idle, median", 1e3 * worst, 1e3 * p50, worst / p50, "< 10", worst < 10 * p50),
    ]  # fmt: skip


def measure_pairs(rounds: int) -> list[Row]:
    return [_measure_pairs(dim, rounds) for dim in (128, 512)]


def _measure_pairs(dim: int, rounds: int) -> Row:
    rows = make_rows(20_000, dim)
    flat = faiss.IndexFlatL2(dim)
    flat.add(rows.values)
    found: dict[str, Any] = {}

    def ours() -> None:
        found["ours"] = Neighbours.concatenate([lists for _, lists in search_all(rows, 50)])

    def theirs() -> None:
        found["theirs"] = flat.search(rows.values, 51)[1]

    a, b, ratio = pairs(ours, theirs, rounds, time.process_time)
    ranked = rerank(Queries(rows.values, rows.ids), rows, found["theirs"], 50, "all")
    equal = np.array_equal(ranked.ids, found["ours"].ids) and np.array_equal(ranked.distances, found["ours"].distances)
    what = f"all pairs, top 50, 20,000 x {dim}, CPU-s / faiss flat (lists {'equal' if equal else 'DIFFER'})"
    return Row(what, a, b, ratio, "<= 0.9, equal", ratio <= 0.9 and equal)


def epoch_of(rows: Rows, engine: Engine, k: int, target: float) -> tuple[float, str, float]:
    """CPU-seconds of building and of N queries; the engine that answered; its recall."""
    started = time.process_time()
    index, report = build(rows, engine, k, target)
    for start in range(0, len(rows), 256):
        part = slice(start, start + 256)
        queries = Queries(rows.values[part], rows.ids[part])
        if index is None:
            search(queries, rows, k)
        else:
            rerank(queries, rows, index.candidates(queries.values, k), k, "all")
    return time.process_time() - started, report.engine, report.recall


def measure_auto() -> list[Row]:
    out = []
    for count in (20_000, 60_000):
        for dim in (64, 512):
            rows = make_rows(count, dim)
            seconds: dict[str, float] = {}
            for engine in ENGINES:
                spent, answered, recall = epoch_of(rows, engine, 10, 0.95)
                print(
                    f"  {count} x {dim} {engine}: {spent:.1f} CPU-s, {answered} answered, recall {recall:.3f}",
                    file=sys.stderr,
                    flush=True,
                )
                if answered == engine:
                    seconds[engine] = spent
            best = min(seconds, key=seconds.__getitem__)
            taken = seconds[auto_engine(count)]
            what = f"build and N queries, k = 10, {count:,} x {dim}, CPU-s: auto ({auto_engine(count)}) / best ({best})"
            ratio = taken / seconds[best]
            out.append(Row(what, taken, seconds[best], ratio, "<= 1.5", ratio <= 1.5))
    return out


def fresh(code: str) -> list[float]:
    """Numbers that a program prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def table_bytes(count: int, dim: int, dtype: str) -> float:
    """Resident bytes a row: growth of the process while the table fills, in batches of 1,024 in random order."""
    order, batch = np.random.default_rng(0).permutation(count), np.ones((1024, dim), np.float32)

    def fill(rows: int) -> Table:
        table = Table(dim, dtype, rows)
        for start in range(0, rows, 1024):
            ids = order[start : min(start + 1024, rows)]
            table.put(ids, batch[: len(ids)], ids, 0)
        return table

    fill(2**15)  # what the program itself takes
    before = resident()
    table = fill(count)
    table.by_class()
    return (resident() - before) / len(table)


def resident() -> int:
    """Bytes of this process in memory, after what it has freed was given back to the system."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def measure_memory() -> list[Row]:
    out = []
    for dtype, width in (("float32", 4), ("float16", 2)):
        for count, dim in ((100_000, 128), (1_000_000, 128)):
            (found,) = fresh(f"from benchmarks.mining import table_bytes as t; print(t({count}, {dim}, {dtype!r}))")
            least = width * dim
            what = f"table, {count:,} x {dim} {dtype}, resident bytes a row / of the numbers alone"
            out.append(Row(what, found, least, found / least, f"<= {least + 40}", found <= least + 40))
    for engine in ("ivf", "ivf_fp16", "ivf_pq", "hnsw"):
        rows = make_rows(20_000, 128)
        _, report = build(rows, engine, 10, 0.5)  # type: ignore[arg-type]
        out.append(Row(f"index {engine}, 20,000 x 128, bytes a row", report.bytes / 20_000))
    for count in (10_000, 100_000, 1_000_000):
        rows = make_rows(count, 128)
        started = time.process_time()
        index, report = build(rows, "ivf_fp16", 10, 0.8)
        built = time.process_time() - started
        started = time.process_time()
        queries = Queries(rows.values[:1024], rows.ids[:1024])
        if index is None:
            search(queries, rows, 10)
        else:
            rerank(queries, rows, index.candidates(queries.values, 10), 10, "all")
        each = (time.process_time() - started) / 1024
        out.append(
            Row(
                f"{count:,} x 128, {report.engine} ({report.parameters}, recall {report.recall:.2f}): build, CPU-s",
                built,
            )
        )
        out.append(Row(f"{count:,} x 128, {report.engine}: a query, CPU-ms", 1e3 * each))
        started = time.process_time()
        search(queries[:256], rows, 10)
        out.append(Row(f"{count:,} x 128, exact: a query, CPU-ms", 1e3 * (time.process_time() - started) / 256))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mining", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="PATH")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    rows: list[Row] = []
    if {"actor", "step", "rebuild"} & set(options.only):
        with ray_session(4) as ray:
            for name, measure in (("actor", measure_actor), ("step", measure_step), ("rebuild", measure_rebuild)):
                if name in options.only:
                    rows += measure(ray, options.rounds if name != "rebuild" else 2)
    if "pairs" in options.only:
        rows += measure_pairs(options.rounds)
    if "auto" in options.only:
        rows += measure_auto()
    if "memory" in options.only:
        rows += measure_memory()
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
