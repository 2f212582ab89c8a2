"""Figures of all methods on the emoji, each beside its baseline, measured on held-out training classes.

    python -m benchmarks.emoji [--seeds 3] [--only osm_caa mmsi] [--parallel 2] [--root FOLDER] [--json PATH]

Every run trains the preset `METHOD/emoji` (EfficientNet-Lite0, 64 pixels, 4 epochs of about 28,800 images in all) with the
first validation fold held out, and measures Recall@1 and MAP@R on that fold after the last epoch. A baseline is the same recipe
without the method's addition: OSM+CAA without soft mining and attention (contrastive), Intra-Batch Connections without the
graph (its cross-entropy), GCA-HNG without generated negatives (N-pair), MMSI without weights, Smart Mining with random
triplets; Smart Mining is also shown beside itself with a fixed kappa, and beside a triplet loss with semi-hard mining within
the batches of the method "baseline". Test classes are not used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from benchmarks.table import Row, finish

FOLD = ["data.validation_fold=0", "evaluation.every=4 epochs", "evaluation.test=false"]
FOLD += ["data.transforms.size=64", "data.transforms.evaluation_scale=1"]
Run = tuple[str, list[str]]  # method and the keys that are set
CONTRASTIVE = ["method.loss=contrastive", "method.margin=0.5", "method.norm_scope=all", "method.w_init=0"]
SEMI_HARD = [
    "method.loss=TripletMarginLoss",
    "method.loss_args={margin: 0.2}",
    "method.miner=TripletMarginMiner",
    "method.miner_args={margin: 0.2, type_of_triplets: semihard}",
]
# method: rows of (variant, run, baseline's name and run)
ROWS: dict[str, list[tuple[str, Run, tuple[str, Run] | None]]] = {
    "baseline": [("multi-similarity", ("baseline", []), None)],
    "osm_caa": [("", ("osm_caa", []), ("contrastive", ("osm_caa", ["method.osm=false", "method.caa=false"])))],
    "intra_batch": [("", ("intra_batch", []), ("cross-entropy", ("intra_batch", ["method.graph=false"])))],
    "gca_hng": [("", ("gca_hng", []), ("N-pair", ("gca_hng", ["method.generate=false"])))],
    "mmsi": [
        ("", ("mmsi", []), ("multi-similarity", ("mmsi", ["method.meta=false"]))),
        ("contrastive", ("mmsi", CONTRASTIVE), ("contrastive", ("mmsi", [*CONTRASTIVE, "method.meta=false"]))),
    ],
    "smart_mining": [
        ("", ("smart_mining", []), ("random triplets", ("smart_mining", ["method.mined_share=0"]))),
        ("", ("smart_mining", []), ("fixed kappa 1", ("smart_mining", ["method.adaptive=false", "method.kappa=1"]))),
        ("", ("smart_mining", []), ("semi-hard in the batch", ("baseline", SEMI_HARD))),
    ],
}


def train(method: str, overrides: list[str], seed: int, root: str) -> dict[str, float]:
    """Trains a run in a process of its own; returns the metrics of its last validation."""
    name = f"{method}-{hashlib.sha256(repr(overrides).encode()).hexdigest()[:6]}-{seed}"
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
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(process.stderr)
    lines = [json.loads(line) for line in (Path(root) / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "validation"][-1]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emoji", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--parallel", type=int, default=2, help="runs at once, of one thread each")
    parser.add_argument("--root", help="keep the runs in this folder; the same command continues them")
    parser.add_argument("--json", metavar="PATH")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="raydml-bench-") as temporary, ThreadPoolExecutor(options.parallel) as pool:
        root = options.root or temporary
        train("baseline", ["length=1 steps"], 0, root)  # prepares the dataset
        futures: dict[str, list[Future[dict[str, float]]]] = {}

        def start(run: Run) -> list[Future[dict[str, float]]]:
            """Starts a run for each seed; a run in several rows is trained once."""
            if repr(run) not in futures:
                futures[repr(run)] = [pool.submit(train, *run, seed, root) for seed in range(options.seeds)]
            return futures[repr(run)]

        comparisons = [
            (method, variant, start(run), baseline[0] if baseline else "", start(baseline[1]) if baseline else None)
            for method in options.only
            for variant, run, baseline in ROWS[method]
        ]
        for method, variant, runs, baseline_name, baseline_runs in comparisons:
            for metric in ("recall@1", "map@r"):
                values = [[run.result()[metric] for run in side] for side in (runs, baseline_runs) if side]
                means = [statistics.mean(side) for side in values]
                seeds = " | ".join(" ".join(f"{v:.1f}" for v in side) for side in values)
                title = f"{method}{f' ({variant})' if variant else ''}, {metric}"
                against = f" / {baseline_name}" if baseline_name else ""
                rows.append(Row(f"{title} (seeds {seeds}){against}", means[0], means[1] if baseline_runs else None))
                print(rows[-1], file=sys.stderr, flush=True)
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
