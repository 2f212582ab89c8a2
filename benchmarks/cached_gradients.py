"""A batch that passes through the trunk in parts (`runtime.images_per_pass`) against the whole: memory, computing, gradients.

    python -m benchmarks.cached_gradients [--batch 1024] [--part 32] [--json PATH]

A step of multi-similarity with EfficientNet-Lite0 at 64 x 64 pixels, each side in a process of its own, one thread, alternating;
memory is the largest resident memory of the step beyond that before it, when weights and gradients are there already. Then the first
gradients of every method on the tiny test dataset, in float64. 6 minutes, 14 GB.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.alternate import as_it_comes
from benchmarks.table import Row, finish
from pipeline.config import build_config
from pipeline.config_model import LITE0, ModelConfig
from pipeline.distributed.collectives import Ranks
from pipeline.model.network import trunk_features
from pipeline.model.trunk import build_trunk
from pipeline.testing.tiny import tiny_values, write_tiny_store
from pipeline.testing.watched_run import watched
from tests.laws.test_laws import METHOD_CASES, case
from tests.stubs import registered

SIDE, DIM, CLASSES, ROUNDS = 64, 128, 64, 3
MEMORY, CPU, GRADIENTS = 0.1, 1.4, 1e-10


def status_bytes(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


def step(batch: int, images_per_pass: int | None) -> None:
    """One step in this process; prints its largest memory beyond that before it, and its CPU seconds."""
    from pytorch_metric_learning.losses import MultiSimilarityLoss

    torch.set_num_threads(1)
    torch.manual_seed(0)
    trunk = build_trunk(ModelConfig(backbone="tf_efficientnet_lite0", weights=LITE0, batch_norm="frozen"), SIDE)
    trunk.set_mode(True, Ranks())
    head = torch.nn.Linear(trunk.features, DIM)
    loss = MultiSimilarityLoss()
    pixels = torch.randint(0, 256, (batch, 3, SIDE, SIDE), dtype=torch.uint8)
    labels = torch.arange(batch) % CLASSES

    def train(images: int) -> None:
        features = trunk_features(
            lambda x: trunk(x, images_per_pass=images_per_pass), pixels[:images], precision="float32"
        )
        loss(torch.nn.functional.normalize(head(features)), labels[:images]).backward()

    train(2 * 32)  # gradients, and buffers of the libraries
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    started = time.process_time()
    train(batch)
    print(status_bytes("VmHWM") - before, time.process_time() - started)


def measured(batch: int, part: int) -> tuple[float, float]:
    command = [sys.executable, "-m", "benchmarks.cached_gradients", "--step", str(batch), str(part)]
    memory, seconds = subprocess.run(
        command, check=True, capture_output=True, text=True, env=as_it_comes()
    ).stdout.split()
    return float(memory), float(seconds)


def largest_difference(name: str, root: str, store: str) -> float:
    """Of the first gradients of a method, in parts of 5 of 12 images, relative to the largest element of each tensor.

    MMSI's first step only fills its memory.
    """
    found = []
    for parts in (None, 5):
        changes: dict[str, Any] = {
            "name": f"{name}-{parts}",
            "runtime.images_per_pass": parts,
            **case(name, "sgd", "frozen"),
        }
        with registered():
            found.append(watched(build_config(tiny_values(root, store, changes | {"length": "4 steps"})), 0, (12,)))
    whole, cached = (run.gradients[0] for run in found)
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    return max(float((cached[n] - g).abs().max()) / max(float(g.abs().max()), 1e-6 * largest) for n, g in whole.items())


def rows(batch: int, part: int) -> list[Row]:
    sides: dict[str, list[tuple[float, float]]] = {"parts": [], "whole": []}
    for _ in range(ROUNDS):
        sides["parts"].append(measured(batch, part))
        sides["whole"].append(measured(batch, batch))
    memory = {name: statistics.median(m for m, _ in values) / 1e6 for name, values in sides.items()}
    cpu = {name: statistics.median(s for _, s in values) for name, values in sides.items()}
    ratios = statistics.median(a[1] / b[1] for a, b in zip(sides["parts"], sides["whole"], strict=True))
    share = memory["parts"] / memory["whole"]
    what = f"batch {batch:,} by parts of {part}"
    table = [
        Row(f"{what}: memory above weights, MB", memory["parts"], memory["whole"], share, f"<= {MEMORY:g}x", share <= MEMORY),
        Row("  CPU seconds of a step", cpu["parts"], cpu["whole"], ratios, f"<= {CPU:g}x", ratios <= CPU),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as root:
        store = write_tiny_store(Path(root)).folder.uri
        for name in METHOD_CASES:
            difference = largest_difference(name, root, store)
            table.append(
                Row(
                    f"  {name}: gradients, float64",
                    difference,
                    None,
                    None,
                    f"<= {GRADIENTS:g}",
                    difference <= GRADIENTS,
                )
            )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1024, help="images of the batch")
    parser.add_argument("--part", type=int, default=32, help="images of a pass")
    parser.add_argument("--json", metavar="PATH", help="write the figures into this file as well")
    parser.add_argument("--step", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.step:
        step(*options.step)
        return 0
    return finish(rows(options.batch, options.part), options.json)


if __name__ == "__main__":
    sys.exit(main())
