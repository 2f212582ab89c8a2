"""What the methods reach on the emoji, each beside its own base loss, measured on held-out training classes.

    python -m benchmarks.emoji [--seeds 3] [--only osm_caa intra_batch] [--parallel 2] [--json PATH]

Every row trains the preset `METHOD/emoji` (EfficientNet-Lite0, 64 pixels, 4 epochs of about 28,800 images in all) with the
first validation fold held out, and measures Recall@1 and MAP@R on that fold after the last epoch. The base of a method is the
same recipe without what the method adds: OSM+CAA without soft mining and attention (contrastive), Intra-Batch Connections
without the graph (its cross-entropy), GCA-HNG without generated negatives (N-pair). Test classes are not looked at.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.table import Row, finish

FOLD = ["data.validation_fold=0", "evaluation.every=4 epochs", "evaluation.test=false"]
BASES = {
    "osm_caa": ["method.osm=false", "method.caa=false"],
    "intra_batch": ["method.graph=false"],
    "gca_hng": ["method.generate=false"],
}


def train(method: str, overrides: list[str], seed: int, root: str) -> dict[str, float]:
    """One run in a process of its own; its last validation."""
    name = f"{method}-{len(overrides)}-{seed}"
    settings = [
        *FOLD,
        f"seed={seed}",
        f"name={name}",
        f"storage={root}",
        "runtime.workers=0",
        "runtime.loader=in_process",
        "runtime.cpus_per_worker=1",
        *overrides,
    ]
    command = [sys.executable, "-m", "pipeline.train", f"{method}/emoji"]
    for setting in settings:
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    lines = [json.loads(line) for line in (Path(root) / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "validation"][-1]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emoji", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=["baseline", *BASES], default=["baseline", *BASES])
    parser.add_argument("--parallel", type=int, default=2, help="runs at once, of one thread each")
    parser.add_argument("--json", metavar="PATH")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="raydml-bench-") as root, ThreadPoolExecutor(options.parallel) as pool:
        sides = {method: [[], BASES[method]] if method in BASES else [[]] for method in options.only}
        train("baseline", ["length=1 steps"], 0, root)  # prepares the dataset
        found = {
            method: [[pool.submit(train, method, side, seed, root) for seed in range(options.seeds)] for side in both]
            for method, both in sides.items()
        }
        for method, both in found.items():
            for metric in ("recall@1", "map@r"):
                values = [[run.result()[metric] for run in side] for side in both]
                means = [statistics.mean(side) for side in values]
                seeds = " | ".join(" ".join(f"{v:.1f}" for v in side) for side in values)
                base = means[1] if len(means) > 1 else None
                rows.append(Row(f"{method}, {metric} (seeds {seeds}) / its base loss", means[0], base))
                print(rows[-1], file=sys.stderr, flush=True)
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
