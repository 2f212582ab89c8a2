"""The map of the emoji's 6,253 test images and the report that holds it: seconds, and bytes.

    python -m benchmarks.exploration [--run RUN] [--json PATH]

Without --run a network is trained for 20 steps on the prepared emoji (`python -m pipeline.prepare emoji`), in a storage that is
removed afterwards; the report of a given run is written into a copy. Two threads; 3 minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.table import Row, finish
from pipeline.data.store import Store
from pipeline.exploration.duplicates import find_duplicates, pixel_rows
from pipeline.exploration.embedding_sample import EmbeddingSample
from pipeline.exploration.projection import nearest, project
from pipeline.runs.records import find_run
from pipeline.runs.report_page import write_report
from pipeline.runs.run_folder import CONFIG, DATASET, EMBEDDINGS, METRICS, NEIGHBOURS, REPORT, SUMMARY
from pipeline.storage import Folder, home

PROMISED_S = 60.0  # wall time of the map
PROMISED_MB = 4.0  # of the report


def seconds(part: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    part()
    return time.perf_counter() - wall, time.process_time() - cpu


def train(storage: str) -> Folder:
    """A short run on the emoji below `storage`."""
    settings = [f"storage={storage}", f"data.source={home()}/data/emoji", "name=short", "length=20 steps"]
    settings += ["runtime.workers=0", "runtime.loader=in_process", "data.transforms={size: 64, evaluation_scale: 1}"]
    command = [sys.executable, "-m", "pipeline.train", "baseline/emoji"]
    subprocess.run(
        [*command, *(word for s in settings for word in ("--set", s))], check=True, stdout=subprocess.DEVNULL
    )
    return Folder(storage) / "runs" / "short"


def copied(run: Folder, target: Folder) -> Folder:
    """What a report is made of, in another folder."""
    for name in (CONFIG, DATASET, METRICS, SUMMARY, NEIGHBOURS, EMBEDDINGS):
        target.write(name, run.read(name))
    return target


def measure(run: Folder) -> list[Row]:
    store = Store(Folder(run.read_json(DATASET)["dataset"]))
    sample = EmbeddingSample.from_bytes(run.read(EMBEDDINGS), str(run))
    num = f"{len(sample.ids):,}"
    wall, cpu = seconds(lambda: project(sample.embeddings))
    found, _ = seconds(lambda: nearest(sample.embeddings, 8))
    compared, _ = seconds(lambda: find_duplicates(store, sample.ids, pixel_rows(store, sample.ids), store))
    whole, whole_cpu = seconds(lambda: write_report(run, store))
    megabytes = run.size(REPORT) / 1e6
    return [
        Row(f"map of {num} images: wall s", wall, promised=f"<= {PROMISED_S:g}", ok=wall <= PROMISED_S),
        Row(f"map of {num} images: cpu s", cpu),
        Row(f"8 neighbours of {num} images: wall s", found),
        Row("near-duplicates across training and test images: wall s", compared),
        Row("whole report: wall s", whole),
        Row("whole report: cpu s", whole_cpu),
        Row("whole report: MB", megabytes, promised=f"<= {PROMISED_MB:g}", ok=megabytes <= PROMISED_MB),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a finished run on the emoji (default: one is trained)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as scratch:
        run = find_run(options.run) if options.run else train(scratch)
        rows = measure(copied(run, Folder(f"{scratch}/copy")))
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
