"""`python -m pipeline.evaluate RUN | EMBEDDINGS.npy LABELS.npy [...]`: exact retrieval metrics.

    python -m pipeline.evaluate emoji                          the run of that name (or its folder), on the test classes
    python -m pipeline.evaluate x.npy y.npy                    leave-one-out over [N, D] embeddings and [N] labels
    python -m pipeline.evaluate x.npy y.npy --gallery g.npy h.npy   queries against another set

Rows are compared by cosine; neighbours are exact (float64, ties by row).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console

from methods import METHODS
from pipeline.checkpoint import Checkpoints
from pipeline.collectives import Ranks
from pipeline.config import Config, build_config
from pipeline.data.loader import PixelSource
from pipeline.data.store import Store
from pipeline.errors import RunError, UserError, first_line
from pipeline.evaluation import Embedder, evaluate, test_task, validation_task
from pipeline.metrics import clustering, retrieve
from pipeline.model import build_trunk
from pipeline.show import metrics_table
from pipeline.storage import Folder, home


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", metavar="RUN | EMBEDDINGS.npy LABELS.npy")
    parser.add_argument(
        "--gallery", nargs=2, metavar=("EMBEDDINGS", "LABELS"), help="search here instead of leave-one-out"
    )
    parser.add_argument("--recall-at", nargs="+", type=int, help="every K of Recall@K (default: the run's, or 1 2 4 8)")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="of a run: which classes")
    parser.add_argument("--checkpoint", help="of a run: best, last, or a step (default: as the run's protocol says)")
    parser.add_argument("--clustering", action="store_true", help="NMI and AMI too")
    parser.add_argument("--save", metavar="PREFIX", help="of a run: write PREFIX.embeddings.npy and PREFIX.labels.npy")
    parser.add_argument("--json", metavar="PATH", help="write the metrics there too")
    options = parser.parse_args(arguments)
    try:
        if options.recall_at and min(options.recall_at) < 1:
            raise UserError(f"--recall-at {options.recall_at}: every K has to be at least 1")
        metrics = _run(options) if len(options.inputs) == 1 else _arrays(options)
        if options.json:
            _write(options.json, json.dumps(metrics, indent=1).encode())
    except (UserError, RunError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    out = Console()
    out.print(" ".join(options.inputs), highlight=False, soft_wrap=True)
    out.print(metrics_table(metrics))
    return 0


def _write(path: str, data: bytes) -> None:
    try:
        with open(path, "wb") as file:
            file.write(data)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def _arrays(options: argparse.Namespace) -> dict[str, Any]:
    """Metrics of arrays in files."""
    if len(options.inputs) != 2:
        raise UserError(f"got {len(options.inputs)} inputs, expected one run, or embeddings and labels")
    if options.checkpoint or options.save or options.split != "test":
        raise UserError("--checkpoint, --save and --split go with a run, not with arrays")
    embeddings, labels = _pair(*options.inputs)
    gallery, gallery_labels = _pair(*options.gallery) if options.gallery else (None, None)
    if gallery is not None and gallery.shape[1] != embeddings.shape[1]:
        raise UserError(f"queries have {embeddings.shape[1]} dimensions, the gallery has {gallery.shape[1]}")
    try:
        result = retrieve(embeddings, labels, gallery=gallery, gallery_labels=gallery_labels)
        metrics = result.summary(options.recall_at or (1, 2, 4, 8))
        return metrics | clustering(embeddings, labels) if options.clustering else metrics
    except ValueError as error:
        raise UserError(str(error)) from error


def _pair(embeddings: str, labels: str) -> tuple[torch.Tensor, torch.Tensor]:
    arrays = []
    for path, dims, kinds in ((embeddings, 2, "f"), (labels, 1, "iu")):
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as a .npy array ({error})") from error
        if array.ndim != dims or array.dtype.kind not in kinds:
            wanted = "floats [N, D]" if dims == 2 else "integers [N]"
            raise UserError(f"{path} holds {array.dtype} {list(array.shape)}, expected {wanted}")
        arrays.append(array)
    if len(arrays[0]) != len(arrays[1]):
        raise UserError(f"{embeddings} has {len(arrays[0])} rows, {labels} has {len(arrays[1])}")
    x = arrays[0] if arrays[0].dtype == np.float64 else arrays[0].astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(arrays[1].astype(np.int64))


def find_run(name: str) -> Folder:
    """The folder of a run, by path, URI, or name below the default storage."""
    for folder in (Folder(name), Folder(home()) / "runs" / name):
        if folder.exists("config.yaml"):
            return folder
    raise UserError(f"{name!r} is neither a run folder nor a run in {home()}/runs (no config.yaml)")


def _run(options: argparse.Namespace) -> dict[str, Any]:
    """Metrics of a run's checkpoint on one of its splits."""
    if options.gallery:
        raise UserError("--gallery goes with arrays; a dataset brings its own query and gallery splits")
    folder = find_run(options.inputs[0])
    config = build_config(yaml.safe_load(folder.read("config.yaml")))
    record = folder.read_json("run.json")
    store = Store(Folder(record["dataset"]))
    if store.fingerprint != record["fingerprint"]:
        raise UserError(f"{store.folder} has changed since the run ({record['fingerprint']} -> {store.fingerprint})")
    if store.partial:
        Console(stderr=True).print(f"partial dataset: {'; '.join(store.partial)}", highlight=False, soft_wrap=True)
    task = validation_task(config, store) if options.split == "validation" else test_task(config, store)
    if task is None:
        raise UserError(f"the run has no {options.split} images to evaluate")
    ranks, device = (
        Ranks(),
        torch.device("cuda" if torch.cuda.is_available() and config.runtime.gpus_per_worker else "cpu"),
    )
    torch.set_num_threads(os.cpu_count() or 1)
    trunk = build_trunk(config.model.model_copy(update={"weights": "none"}), config.data.transforms.size)
    samples = store.select(["train"], without_fold=config.data.validation_fold)
    method = METHODS[config.method.name](config.method, trunk.features, int(samples.labels.max()) + 1)
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    trunk.to(device, dtype)
    method.to(device, dtype)
    kind, step = _checkpoint(options.checkpoint, config, Checkpoints(folder))
    Checkpoints(folder).load(kind, step, trunk, method)
    source = PixelSource(store.folder.uri, store.fingerprint, None, config.data.transforms)
    embedder = Embedder(source, "in_process", 1, config.evaluation.batch_size, config.precision, device, ranks)
    if options.save:
        embeddings = embedder(task.queries.ids, trunk, method).cpu().numpy()
        for name, array in (("embeddings", embeddings), ("labels", task.queries.labels)):
            buffer = io.BytesIO()
            np.save(buffer, array)
            _write(f"{options.save}.{name}.npy", buffer.getvalue())
    recall_at = options.recall_at or config.evaluation.recall_at
    return evaluate(task, embedder, trunk, method, recall_at, options.clustering).metrics


def _checkpoint(wanted: str | None, config: Config, checkpoints: Checkpoints) -> tuple[str, int]:
    """Folder and step of the checkpoint that was asked for."""
    wanted = wanted or config.evaluation.checkpoint
    steps, best = checkpoints.steps(), checkpoints.steps("best")
    latest = checkpoints.latest()
    if latest is None:
        raise UserError(f"{checkpoints.run} has no checkpoint yet")
    if wanted == "best":
        if latest.best_step not in best:
            raise UserError(f"{checkpoints.run} has no best checkpoint: nothing was validated yet")
        return "best", latest.best_step
    if wanted == "last":
        return "checkpoints", steps[-1]
    if not wanted.isdigit() or int(wanted) not in {*steps, *best}:
        raise UserError(f"--checkpoint {wanted}: expected best, last or one of the steps {sorted({*steps, *best})}")
    return ("checkpoints" if int(wanted) in steps else "best"), int(wanted)


if __name__ == "__main__":
    sys.exit(main())
