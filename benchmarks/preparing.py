"""Preparing a dataset, and embedding one in bulk: the sections prepare and embed of `python -m benchmarks.loader`."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.table import Row
from pipeline.data import own_images
from pipeline.data.entries import Entry
from pipeline.data.image_files import normalise
from pipeline.data.write_store import write_store
from pipeline.distributed.jobs import run_on_ray
from pipeline.distributed.ray_session import ray_session
from pipeline.storage import Folder


def decode_rate(entries: list[Entry], cores: int, seconds: float = 5.0) -> tuple[float, float]:
    """Images a second that `cores` processes together read, check and encode; CPU microseconds an image."""
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        found = pool.starmap(_decode, [(entries[i::cores], seconds) for i in range(cores)], chunksize=1)
    return sum(rate for rate, _ in found), statistics.mean(cpu for _, cpu in found)


def _decode(entries: list[Entry], seconds: float) -> tuple[float, float]:
    torch.set_num_threads(1)
    for entry in entries[:20]:
        normalise(Path(entry.source).read_bytes())
    started, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < seconds:
        normalise(Path(entries[count % len(entries)].source).read_bytes())
        count += 1
    return count / (time.perf_counter() - started), (time.process_time() - cpu) / count * 1e6


def cpu_seconds() -> float:
    """CPU time so far of this process and of those below it, Ray's included."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            total += sum(process.cpu_times()[:4])  # its own, and of those it started that have ended
    return total


def resident_mib(title: bytes = b"ray::") -> float:
    """Memory of this process and of Ray's workers with `title` in theirs, without shared pages of the object store."""
    total = 0.0
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            if entry.name == str(os.getpid()) or title in command:
                status = dict(line.split(":", 1) for line in (entry / "status").read_text().splitlines())
                total += int(status["RssAnon"].split()[0]) / 1024
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


def measure_prepare(rounds: int) -> list[Row]:
    import pipeline.distributed.ray_session

    pipeline.distributed.ray_session.OBJECT_STORE_BYTES = 300 * 10**6
    entries = own_images.emoji(skin_tones=True)
    cores, first = 2, 0.0
    figures, peaks = list[tuple[float, float, float, float]](), dict[int, float]()
    with ray_session(cores):
        for count in (1000, *[len(entries)] * rounds, 12_000, 24_000):
            selected = [entries[i] for i in np.linspace(0, len(entries) - 1, count).astype(int)]
            selected = list(dict.fromkeys(selected))
            peak = 0.0

            def watched(function: Any, shards: Any) -> Iterator[Any]:
                nonlocal peak
                for record in run_on_ray(function, shards):
                    peak = max(peak, resident_mib())
                    yield record

            bound = decode_rate(entries[:: max(1, len(entries) // 6000)], cores) if count == len(entries) else None
            with tempfile.TemporaryDirectory(prefix="raydml-bench-") as root:
                started, cpu = time.perf_counter(), cpu_seconds()
                write_store("emoji", selected, Folder(root), run_on_ray if bound else watched)
                seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
                first = first or seconds
                if bound:
                    figures.append((len(selected) / seconds, bound[0], cpu / len(selected) * 1e6, bound[1]))
            peaks[count] = peak
    speed, bound_speed, cpu, bound_cpu = (statistics.median(column) for column in zip(*figures, strict=True))
    ratio, cpu_ratio = (statistics.median(f[i] / f[i + 1] for f in figures) for i in (0, 2))
    small, large = peaks[12_000], peaks[24_000]
    return [
        Row(f"prepare {len(entries):,} drawings, images/s / two processes that only read, check and encode",
            speed, bound_speed, ratio, ">= 0.85", ratio >= 0.85),
        Row("    CPU µs an image", cpu, bound_cpu, cpu_ratio),
        Row("prepare 1,000 drawings in a Ray that has just started, seconds", first),
        Row("prepare, resident MiB, 24,000 drawings / 12,000", large, small, large / small, "<= 1.1", large <= 1.1 * small),
    ]  # fmt: skip


def measure_embed() -> list[Row]:
    """Resident memory of bulk embedding, with a small network and small images, by two processes on Ray."""
    import pipeline.distributed.ray_session
    import pipeline.inference.embed
    from pipeline import train
    from pipeline.inference.trained_model import load_run

    pipeline.distributed.ray_session.OBJECT_STORE_BYTES = 300 * 10**6
    pipeline.inference.embed.ROWS_PER_FILE = 512  # a process's memory settles after some of them
    entries = sorted(own_images.emoji(skin_tones=True), key=lambda e: e.class_name)
    peaks, speeds = dict[int, float](), dict[int, float]()
    with tempfile.TemporaryDirectory(prefix="raydml-bench-") as root, ray_session(2):
        for count in (6_000, 12_000, 24_000):
            store = write_store(f"emoji-{count}", entries[:count], Folder(f"{root}/data/{count}"), run_on_ray)
            settings = [
                "length=1 steps", f"name=embed-{count}", f"storage={root}", f"data.source={store.folder.uri}",
                "data.transforms.size=32", "model.backbone=test_efficientnet", "model.weights=none",
                "evaluation.test=false", "runtime.workers=0", "runtime.loader=in_process", "runtime.cpus_per_worker=1",
            ]  # fmt: skip
            arguments = ["baseline/emoji"]
            for setting in settings:
                arguments += ["--set", setting]
            if train.main(arguments):
                raise SystemExit("the run to embed with failed")
        for count in (6_000, 12_000, 24_000):
            peak = 0.0

            def watched(*args: Any) -> Iterator[Any]:
                nonlocal peak
                for record in run_on_ray(*args):
                    peak = max(peak, resident_mib(b"ray::MapWorker"))  # others are left from preparing
                    yield record

            pipeline.inference.embed.run_on_ray = watched
            started = time.perf_counter()
            manifest = pipeline.inference.embed.embed(
                load_run(f"{root}/runs/embed-{count}"), own_images.SPLITS, Folder(f"{root}/out/{count}"), 2
            )
            peaks[count] = peak
            speeds[count] = manifest["rows"] / (time.perf_counter() - started)
    small, large = peaks[12_000], peaks[24_000]
    return [
        Row("embed 24,000 drawings of 32 pixels, two processes, images/s", speeds[24_000]),
        Row("embed, resident MiB, 24,000 drawings / 12,000", large, small, large / small, "<= 1.1", large <= 1.1 * small),
    ]  # fmt: skip
