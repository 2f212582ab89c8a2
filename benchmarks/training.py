"""Throughput of a training run against a plain loop that does the same work by hand.

    python -m benchmarks.training [--rounds 3] [--json PATH]

Both sides train EfficientNet-Lite0 on the emoji at 64 pixels with multi-similarity loss, batches of 24 x 4, AdamW, the same
number of threads, and decode every image in every step. The plain loop is one process without Ray, checkpoints, logs or
exactness on several ranks; it is measured as usually written, with the channels-last layout that raydml uses, and with glibc told to
keep freed memory as well, as raydml tells it. Ours is the real command with Ray Train and the Ray Data loader. The sides alternate;
figures are medians over the rounds of the steps after warm-up, CPU seconds those of the whole process tree (Ray's own processes
included). Start-up is a row of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.alternate import as_it_comes, ratio_of
from benchmarks.table import Row, finish
from pipeline.distributed.cpus import KEPT

WARM, STEPS, BATCH = 15, 75, 96
# A ratio of ours to each plain loop, at most; None: shown without a promise.
PROMISED = {"plain": 1.1, "plain, channels last": 1.02, "plain, channels last, freed memory kept": None}
CLOCK = os.sysconf("SC_CLK_TCK")


def tree_cpu_s(root: int) -> float:
    """CPU seconds of a process and all its descendants, ended ones included once their parent has waited for them."""
    parents: dict[int, int] = {}
    cpu: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry.name)] = int(fields[1])
            cpu[int(entry.name)] = sum(int(f) for f in fields[11:15]) / CLOCK
    total = 0.0
    for pid in cpu:
        node = pid
        while node not in (root, 0, 1):
            node = parents.get(node, 0)
        total += cpu[pid] if node == root else 0.0
    return total


def watch(process: subprocess.Popen[bytes], steps_done: Path) -> dict[str, float]:
    """Wall and CPU seconds an image between two steps, from a file whose last JSON line contains the step."""
    started = time.perf_counter()
    marks: dict[str, tuple[int, float, float]] = {}
    while process.poll() is None:
        step = last_step(steps_done)
        now = (step, time.perf_counter(), tree_cpu_s(process.pid))
        if step >= WARM and "low" not in marks:
            marks["low"] = now
        if step > WARM:
            marks["high"] = now
        if step >= STEPS:
            break
        time.sleep(0.2)
    if last_step(steps_done) < STEPS:
        raise SystemExit(f"a measured process failed with status {process.wait()}: {process.args}")
    process.kill()  # all steps are measured; Ray's processes end with their driver
    process.wait()
    low, high = marks["low"], marks["high"]
    images = (high[0] - low[0]) * BATCH
    return {"wall": (high[1] - low[1]) / images, "cpu": (high[2] - low[2]) / images, "start_s": low[1] - started}


def last_step(path: Path) -> int:
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    except (FileNotFoundError, json.JSONDecodeError):
        return 0
    return max((line["step"] for line in lines if line.get("kind") == "train"), default=0)


def ours(threads: int, folder: Path) -> dict[str, float]:
    name = f"bench-{time.time_ns()}"
    settings = [f"name={name}", f"length={STEPS + 50} steps", f"runtime.cpus_per_worker={threads}", "runtime.log_every=1",
                "runtime.loader=ray", "runtime.workers=1", "evaluation.clustering=false", f"storage={folder}",
                "checkpoint.every=1000 steps", "data.transforms.size=64", "data.transforms.evaluation_scale=1"]  # fmt: skip
    command = [sys.executable, "-m", "pipeline.train", "baseline/emoji"]
    for setting in settings:
        command += ["--set", setting]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    figures = watch(process, folder / "runs" / name / "metrics.jsonl")
    lines = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    final = [line for line in lines if line["kind"] == "train"][-1]
    return figures | {"waiting": final["waiting"]}


def plain(threads: int, channels_last: bool, folder: Path, keep: bool = False) -> dict[str, float]:
    steps = folder / f"plain-{time.time_ns()}.jsonl"
    command = [
        sys.executable,
        "-m",
        "benchmarks.training",
        "--plain",
        str(folder),
        str(steps),
        str(threads),
        str(int(channels_last)),
    ]
    allocator = {name: str(value) for name, (_, value) in KEPT.items()} if keep else {}
    return watch(subprocess.Popen(command, env=as_it_comes() | allocator), steps)


def plain_loop(folder: str, log: str, threads: int, channels_last: bool) -> None:
    """The loop as usually written: read, decode, batch, forward, loss, backward, step."""
    import numpy as np
    import pyarrow.parquet as pq
    import timm
    import torch
    from PIL import Image
    from pytorch_metric_learning.losses import MultiSimilarityLoss

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    table = pq.read_table(
        f"{folder}/data/emoji/shards", columns=["label", "split", "image"], filters=[("split", "=", "train")]
    )
    labels, images = np.asarray(table["label"]), table["image"].to_pylist()
    rows = {c: np.flatnonzero(labels == c) for c in np.unique(labels)}
    classes, random = list(rows), np.random.default_rng(0)
    layout = {"memory_format": torch.channels_last} if channels_last else {}
    network = timm.create_model("tf_efficientnet_lite0", num_classes=0).to(**layout)
    head = torch.nn.Linear(network.num_features, 128)
    loss_function = MultiSimilarityLoss(alpha=2, beta=50, base=0.5)
    optimizer = torch.optim.AdamW(
        [{"params": network.parameters(), "lr": 5e-4}, {"params": head.parameters(), "lr": 5e-3}]
    )
    network.train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    with open(log, "a", buffering=1) as file:
        for step in range(1, STEPS + 51):
            batch_classes = random.choice(len(classes), 24, replace=False)
            ids = np.concatenate(
                [random.choice(rows[classes[c]], 4, replace=len(rows[classes[c]]) < 4) for c in batch_classes]
            )
            pictures = [
                Image.open(io.BytesIO(images[i])).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC) for i in ids
            ]
            pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2)
            x = ((pixels.float() / 255 - 0.5) / 0.5).contiguous(**layout)
            embeddings = torch.nn.functional.normalize(head(network(x)))
            loss = loss_function(embeddings, torch.from_numpy(labels[ids]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            file.write(json.dumps({"step": step, "kind": "train", "loss": float(loss.detach())}) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--plain", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        folder, log, threads, layout = options.plain
        plain_loop(folder, log, int(threads), layout == "1")
        return 0
    return finish(measure(options.rounds, options.threads), options.json)


def measure(rounds: int, threads: int) -> list[Row]:
    """The rows of all sides, which alternate."""
    with tempfile.TemporaryDirectory(prefix="raydml-bench-") as temporary:
        folder = Path(temporary)
        subprocess.run([sys.executable, "-m", "pipeline.prepare", "emoji", "--to", str(folder / "data" / "emoji")],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        sides = {
            "ours": lambda: ours(threads, folder),
            "plain": lambda: plain(threads, False, folder),
            "plain, channels last": lambda: plain(threads, True, folder),
            "plain, channels last, freed memory kept": lambda: plain(threads, True, folder, keep=True),
        }
        figures: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, measure in sides.items():
                figures[side].append(measure())
    return rows(figures)


def rows(figures: dict[str, list[dict[str, float]]]) -> list[Row]:
    def median(side: str, key: str) -> float:
        return statistics.median(of_round[key] for of_round in figures[side])

    out = []
    for other, most in PROMISED.items():
        for key, what in (("cpu", "CPU-ms/image"), ("wall", "wall ms/image")):
            ratio, spread = ratio_of(*([figure[key] for figure in figures[side]] for side in ("ours", other)))
            name = f"{what}: ours / {other}"
            promised = f"<= {most}" if most is not None else ""
            ok = most is None or ratio <= most
            out.append(Row(name, 1e3 * median("ours", key), 1e3 * median(other, key), ratio, promised, ok, spread))
    waiting = median("ours", "waiting")
    out.append(Row("share of time waiting for data, %", 100 * waiting, promised="< 5", ok=waiting < 0.05))
    start = f"start to step {WARM}, s (ours: Ray, loader, frozen evaluation of 6,253 images)"
    out.append(Row(start, median("ours", "start_s"), median("plain", "start_s")))
    return out


if __name__ == "__main__":
    sys.exit(main())
