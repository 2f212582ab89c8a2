"""What a search costs: one image among 60,000 × 128, memory-mapped, and building such an index.

    python -m benchmarks.search [--only query build engines] [--rounds 40] [--images 60000] [--json PATH]

query    from an encoded JPEG of 256 px to paths and classes: reading and preprocessing, embedding, search, told apart; each in a
         process that has answered before (warm); and the search alone beside faiss's IndexFlatIP on the same rows in memory
build    an index of 60,000 images with thumbnails: seconds and growth of peak memory, beside that of a tenth of the images; without
         the network, whose rate is that of `benchmarks.inference`, and without encoding thumbnails, which is told apart
engines  the search alone with each engine, with its recall

One thread on either side. The network of `query` is EfficientNet-Lite0 at 224 px with a head of 128, of random weights.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and faiss

import faiss
import numpy as np
import torch
from PIL import Image

from benchmarks.mining import make_rows
from benchmarks.table import Row, finish
from pipeline.config import build_config
from pipeline.data.image_files import read_image
from pipeline.data.transforms import evaluation_pixels
from pipeline.distributed.collectives import Ranks
from pipeline.model.network import build_network, trunk_features
from pipeline.searching.changes import IndexBatch, build_index
from pipeline.searching.images import thumbnail
from pipeline.searching.index import SearchIndex
from pipeline.searching.index_files import ModelRecord
from pipeline.testing.tiny import tiny_values

SECTIONS = ("query", "build", "engines")
DIM, SIZE, BATCH = 128, 224, 64
MODEL = ModelRecord(source="benchmark", checkpoint=None, fingerprint="0" * 64)


def stream(values: np.ndarray) -> Iterator[IndexBatch]:
    """Made-up images with these embeddings; a batch's thumbnails, of noise, stand for those of all."""
    made = [thumbnail(pixels) for pixels in torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)]
    for start in range(0, len(values), BATCH):
        part = range(start, min(start + BATCH, len(values)))
        paths = [f"/photos/class{i // 5:05d}/{i:07d}.jpg" for i in part]
        classes = [f"class{i // 5:05d}" for i in part]
        yield IndexBatch(values[part.start : part.stop], paths, None, classes, made[: len(part)])


def plain(values: np.ndarray) -> Iterator[IndexBatch]:
    """The same without thumbnails."""
    for start in range(0, len(values), 4096):
        part = range(start, min(start + 4096, len(values)))
        yield IndexBatch(
            values[part.start : part.stop], [f"/photos/{i}.jpg" for i in part], None, [f"class{i // 5}" for i in part],
            [b""] * len(part),
        )  # fmt: skip


def median_ms(work: Callable[[], Any], rounds: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Milliseconds of a call, the median, after three that are not counted."""
    times = []
    for _ in range(rounds + 3):
        started = clock()
        work()
        times.append(clock() - started)
    return 1e3 * statistics.median(times[3:])


def measure_query(root: Path, images: int, rounds: int) -> list[Row]:
    rows = make_rows(images, DIM)
    build_index(root / "query", MODEL, DIM, "cosine", plain(rows.values), threads=1)
    index = SearchIndex(root / "query")
    changes = {"precision": "float32", "data.transforms": {"size": SIZE, "resize": 256}, "method.embedding_dim": DIM,
               "model": {"backbone": "tf_efficientnet_lite0", "weights": "none"}}  # fmt: skip
    config = build_config(tiny_values(str(root), "none", changes))
    trunk, method = build_network(config, 10, torch.device("cpu"))
    trunk.set_mode(False, Ranks())
    method.eval()
    transforms = config.data.transforms
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((256, 256)).save(buffer, "JPEG")
    data = buffer.getvalue()

    def read() -> torch.Tensor:
        return evaluation_pixels(read_image(data, 10**8), transforms)

    @torch.no_grad()
    def embed(pixels: torch.Tensor) -> np.ndarray:
        return method.embed(trunk_features(trunk, pixels[None], config.precision)).numpy()

    pixels = read()
    embedding = embed(pixels)
    flat = faiss.IndexFlatIP(DIM)
    flat.add(np.ascontiguousarray(rows.values))
    query = (embedding / np.linalg.norm(embedding)).astype(np.float32)
    whole = median_ms(lambda: index.search(embed(read()), 10), rounds)
    busy = median_ms(lambda: index.search(embed(read()), 10), rounds, time.process_time)
    what = f"1 image among {images:,} x {DIM}"
    ours, other = (
        median_ms(lambda: index.search_embeddings(embedding, 10), rounds),
        median_ms(lambda: flat.search(query, 10), rounds),
    )
    return [
        Row(f"{what}, warm, ms: JPEG to paths and classes", whole, promised="<= 50", ok=whole <= 50),
        Row("  the same, CPU-ms (what it takes on a machine that does nothing else)", busy),
        Row("  reading and preprocessing, ms", median_ms(read, rounds)),
        Row("  embedding (EfficientNet-Lite0, 224 px), ms", median_ms(lambda: embed(pixels), rounds)),
        Row("  search with paths and classes, ms", median_ms(lambda: index.search(embedding, 10), rounds)),
        Row("  search alone, exact, ms / faiss IndexFlatIP", ours, other, ours / other, "<= 3", ours <= 3 * other),
    ]


def memory(name: str) -> int:
    """Bytes of this process: VmRSS, or VmHWM, the peak since the last `reset_peak`; pages of mapped files are counted."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def built(count: int, folder: str) -> None:
    """Builds in a process of its own; prints seconds, growth of its peak memory, and bytes of the index."""
    values = np.load(f"{folder}/values.npy", mmap_mode="r")
    for _ in stream(np.asarray(values[:BATCH])):
        pass
    build_index(f"{folder}/warm{count}", MODEL, DIM, "cosine", plain(np.asarray(values[:BATCH])), threads=1)
    reset_peak()
    before, started = memory("VmRSS"), time.perf_counter()
    build_index(f"{folder}/index{count}", MODEL, DIM, "cosine", stream(values[:count]), thumbnail_side=128, threads=1)
    seconds = time.perf_counter() - started
    size = sum(path.stat().st_size for path in Path(f"{folder}/index{count}").rglob("*") if path.is_file())
    print(seconds, memory("VmHWM") - before, size)


def measure_build(root: Path, images: int) -> list[Row]:
    np.save(root / "values.npy", make_rows(images, DIM).values)
    found = []
    for count in (images // 10, images):
        code = f"from benchmarks.search import built; built({count}, {str(root)!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found.append([float(word) for word in done.stdout.split()])
    (_, small, _), (seconds, large, size) = found
    limit = 2e8
    pixels = torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8)
    return [
        Row(f"build of {images:,} x {DIM} with thumbnails, without network and encoding, s", seconds, promised="<= 300", ok=seconds <= 300),
        Row(f"  growth of peak memory, MB / of {images // 10:,}", large / 1e6, small / 1e6, large / max(small, 1), "<= 200 MB", large <= limit),
        Row("  bytes of an image in the index (thumbnails of noise)", size / images),
        Row("  a thumbnail of 224 px, CPU-ms", median_ms(lambda: thumbnail(pixels), 20, time.process_time)),
    ]  # fmt: skip


def measure_engines(root: Path, images: int, rounds: int) -> list[Row]:
    rows = make_rows(images, DIM)
    queries = rows.values[:: images // 50][:50]
    out, exact = [], np.zeros(0)
    for engine in ("exact", "ivf_fp16", "ivf", "hnsw"):
        started = time.perf_counter()
        change = build_index(root / engine, MODEL, DIM, "cosine", plain(rows.values), engine=engine, threads=1)  # type: ignore[arg-type]
        seconds = time.perf_counter() - started
        index = SearchIndex(root / engine)
        ids, _ = index.search_embeddings(queries, 10)
        exact = ids if engine == "exact" else exact
        recall = float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids, exact, strict=True)]))
        one = iter(range(10**9))
        spent = median_ms(
            lambda index=index, one=one: index.search_embeddings(queries[next(one) % 50][None], 10), rounds
        )
        record = change.manifest.engine
        what = f"{images:,} x {DIM}, {engine}: a query, ms (built in {seconds:.0f} s, recall stored {record.recall:.3f}, found {recall:.3f})"
        out.append(Row(what, spent, promised="recall >= 0.9", ok=recall >= 0.9 and record.name == engine))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--json", metavar="PATH")
    options = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if "query" in options.only:
            rows += measure_query(root, options.images, options.rounds)
        if "build" in options.only:
            rows += measure_build(root, options.images)
        if "engines" in options.only:
            rows += measure_engines(root, options.images, options.rounds)
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
