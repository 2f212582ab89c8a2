"""What the methods reach on the emoji, each beside its base, measured on held-out training classes.

    python -m benchmarks.emoji [--seeds 3] [--only osm_caa mmsi] [--parallel 2] [--root FOLDER] [--json PATH]

Every run trains the preset `METHOD/emoji` (EfficientNet-Lite0, 64 pixels, 4 epochs of about 28,800 images in all) with the
first validation fold held out, and measures Recall@1 and MAP@R on that fold after the last epoch. A base is the same recipe
without what the method adds: OSM+CAA without soft mining and attention (contrastive), Intra-Batch Connections without the
graph (its cross-entropy), GCA-HNG without generated negatives (N-pair), MMSI without weights, Smart Mining with random
triplets; Smart Mining is also shown beside itself with a fixed kappa, and beside a triplet loss with semi-hard mining within
the batches of the baseline. Test classes are not looked at.
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
Run = tuple[str, list[str]]  # preset and what is set
CONTRASTIVE = ["method.loss=contrastive", "method.margin=0.5", "method.norm_scope=all", "method.w_init=0"]
SEMI_HARD = [
    "method.loss=TripletMarginLoss",
    "method.loss_args={margin: 0.2}",
    "method.miner=TripletMarginMiner",
    "method.miner_args={margin: 0.2, type_of_triplets: semihard}",
]
# method: what is shown, and its base
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
    """One run in a process of its own; its last validation."""
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
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
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
        started: dict[str, list[Future[dict[str, float]]]] = {}

        def runs(run: Run) -> list[Future[dict[str, float]]]:
            """One for each seed; what several rows show is trained once."""
            if repr(run) not in started:
                started[repr(run)] = [pool.submit(train, *run, seed, root) for seed in range(options.seeds)]
            return started[repr(run)]

        found = [
            (method, what, runs(ours), base[0] if base else "", runs(base[1]) if base else None)
            for method in options.only
            for what, ours, base in ROWS[method]
        ]
        for method, what, mine, base_name, theirs in found:
            for metric in ("recall@1", "map@r"):
                values = [[run.result()[metric] for run in side] for side in (mine, theirs) if side]
                means = [statistics.mean(side) for side in values]
                seeds = " | ".join(" ".join(f"{v:.1f}" for v in side) for side in values)
                title = f"{method}{f' ({what})' if what else ''}, {metric}"
                beside = f" / {base_name}" if base_name else ""
                rows.append(Row(f"{title} (seeds {seeds}){beside}", means[0], means[1] if theirs else None))
                print(rows[-1], file=sys.stderr, flush=True)
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
