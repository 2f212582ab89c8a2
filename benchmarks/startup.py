"""How long commands take before they do anything: help, evaluation of tiny arrays, the first line of a run.

    python -m benchmarks.startup [--json PATH]

Each figure is the median over fresh processes, after one that fills the caches of files and machine code. 1 minute.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.table import Row, finish

COMMANDS = ("train", "prepare", "evaluate", "report")
HELP_CPU_S = 1.5
FIRST_LINE_S = 1.0
EVALUATE_RATIO = 2.0  # to a bare `import torch`
ROUNDS = 3


def cpu_seconds(arguments: Sequence[str]) -> float:
    """CPU seconds of a Python process with these arguments, which has to succeed."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{arguments} ended with status {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def median_cpu_seconds(*sides: Sequence[str]) -> list[float]:
    """Of each command; they alternate, so that a busy machine slows all alike."""
    for arguments in sides:
        cpu_seconds(arguments)
    rounds = [[cpu_seconds(arguments) for arguments in sides] for _ in range(ROUNDS)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def first_line_s(storage: str) -> float:
    """Seconds from the start of a run to its first line; the run is ended then."""
    command = [sys.executable, "-m", "pipeline.train", "baseline/emoji", "--set", f"storage={storage}"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
        process.kill()
    if not line.startswith("emoji"):
        raise RuntimeError(f"the run began with {line!r}")
    return seconds


def rows() -> list[Row]:
    table = []
    for command in COMMANDS:
        (cpu,) = median_cpu_seconds(["-m", f"pipeline.{command}", "--help"])
        table.append(Row(f"{command} --help, CPU s", cpu, promised=f"<= {HELP_CPU_S}", ok=cpu <= HELP_CPU_S))
    with tempfile.TemporaryDirectory() as folder:
        embeddings, labels = (str(Path(folder) / name) for name in ("x.npy", "y.npy"))
        np.save(embeddings, np.random.default_rng(0).normal(size=(40, 8)))
        np.save(labels, np.arange(40) % 8)
        ours, bare = median_cpu_seconds(["-m", "pipeline.evaluate", embeddings, labels], ["-c", "import torch"])
        ratio, promised = ours / bare, f"ratio <= {EVALUATE_RATIO:g}"
        table.append(
            Row("evaluate x.npy y.npy; import torch, CPU s", ours, bare, ratio, promised, ratio <= EVALUATE_RATIO)
        )
        first_line_s(folder)
        seconds = statistics.median(first_line_s(folder) for _ in range(ROUNDS))
        table.append(
            Row("first line of a run, wall s", seconds, promised=f"<= {FIRST_LINE_S:g}", ok=seconds <= FIRST_LINE_S)
        )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="PATH", help="write the figures into this file as well")
    options = parser.parse_args()
    return finish(rows(), options.json)


if __name__ == "__main__":
    sys.exit(main())
