"""`python -m pipeline.train [recipe.yaml | preset] [--set a.b=c ...]`: one run, from a dataset to a report.

Without arguments: the built-in demo. Run again, the same command continues an interrupted run, or prints the summary of a
finished one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from methods import METHODS, Context
from methods.optim import Clock
from pipeline import prepare as preparing
from pipeline.config import Config, build_config, differences, load_config, to_yaml
from pipeline.data import own_images
from pipeline.data.cache import split_bytes
from pipeline.data.store import Samples, Store
from pipeline.distributed.ray_session import check_cluster, check_machine, needed_cpus, on_cluster, ray_session, resolve
from pipeline.errors import RunError, UserError, first_line
from pipeline.evaluation.evaluate_task import test_task, validation_task
from pipeline.model.trunk import build_trunk
from pipeline.report import write_report
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.summary import read_changes, run_folder
from pipeline.runs.terminal import Display, summary_table
from pipeline.storage import Folder
from pipeline.training.launch import run_in_process, run_on_ray, under_torchrun

console = Console(stderr=True)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 finished, 1 the run failed, 2 bad input, 128 + signal when stopped."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.train", description=__doc__)
    parser.add_argument("recipe", nargs="?", help="YAML file or preset name (default: the built-in demo)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="e.g. seed=1")
    parser.add_argument("--fresh", action="store_true", help="remove an earlier run of this name and start over")
    options = parser.parse_args(arguments)
    try:
        signal = run(load_config(options.recipe, options.overrides), options.fresh)
    except UserError as error:
        return _fail(error, 2)
    except RunError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail(RunError("interrupted; the newest checkpoint is kept"), 130)
    return 0 if signal is None else 128 + signal


def _fail(error: Exception, status: int) -> int:
    sys.stdout.flush()
    print(f"error: {first_line(error)}", file=sys.stderr, flush=True)
    return status


def run(config: Config, fresh: bool = False) -> int | None:
    """One run; returns the signal that stopped it, or None when it has finished.

    Raises:
        UserError: bad input, found before anything starts.
        RunError: the run failed.
    """
    if not (os.path.isabs(config.root) or "://" in config.root):
        raise UserError(f"storage {config.root!r} is a relative path: give an absolute one, or s3://...")
    config = config.model_copy(update={"storage": Folder(config.root).uri, "runtime": resolve(config.runtime)})
    leader = os.environ.get("RANK", "0") == "0" if under_torchrun() else True
    folder = run_folder(config)
    folder.check_writable()
    for warning in check_machine(config):
        console.print(warning)
    changes = [] if fresh else _changes(config, folder)
    if not fresh and _finished(config, folder) and not changes and folder.exists("report.html"):
        _show_summary(folder)
        return None
    build_trunk(config.model, config.data.transforms.size)  # unknown backbone, missing weights: now, not on the cluster
    with ExitStack() as stack:
        ray: Any = None
        if not under_torchrun() and (config.runtime.workers or config.runtime.loader == "ray" or _must_prepare(config)):
            console.print(f"starting Ray {'on the cluster' if on_cluster() else 'on this machine'} ...")
            ray = stack.enter_context(ray_session(needed_cpus(config)))
            check_cluster(config, ray)
        store = _dataset(config)
        _check_run(config, store)
        if not fresh:
            _check_dataset(folder, store)
        if leader:
            if fresh:  # now that everything has been checked
                folder.remove()
            _record(config, folder, store, changes)
        with Display(console) as display:
            uri = store.folder.uri
            if config.runtime.workers and not under_torchrun():
                signal = run_on_ray(config, uri, display, ray)
            else:
                signal = run_in_process(config, uri, display)
    if leader and _finished(config, folder):
        write_report(folder, store)
        _show_summary(folder)
    return signal


def _must_prepare(config: Config) -> bool:
    return config.data.source == "emoji" and not preparing.emoji_store(config.root).exists("manifest.json")


def _dataset(config: Config) -> Store:
    """Opens the dataset; the built-in demo is prepared first, once."""
    source = config.data.source
    if source != "emoji":
        is_name = "/" not in source and not source.startswith(("~", "."))
        folder = Folder(config.root) / "data" / source if is_name else Folder(source)
        if is_name and not folder.exists("manifest.json"):
            raise UserError(
                f"there is no dataset {source!r} in {Folder(config.root) / 'data'}: prepare it with `python -m pipeline.prepare`, "
                "or set data.source to the folder or s3:// URI of a store"
            )
        store = Store(folder)
    else:
        target = preparing.emoji_store(config.root)
        if _must_prepare(config):
            if under_torchrun():
                raise UserError(
                    "the emoji are not prepared yet: run `python -m pipeline.prepare emoji` before torchrun"
                )
            preparing.prepare("emoji", own_images.emoji(), target, source="emoji")
        store = Store(target)
    store.check_shards()
    return store


class _PlanContext(Context):
    """As much of a context as a plan may look at that is a pure function of the labels, the seed and the epoch."""

    def __init__(self, samples: Samples, seed: int) -> None:
        self.labels, self.tracks, self.seed, self.clock = samples.labels, samples.tracks, seed, Clock()


def _check_run(config: Config, store: Store) -> None:
    """The dataset fits the config: folds, classes, images."""
    folds = len(store.manifest["folds"])
    fold = config.data.validation_fold
    if fold is not None and fold >= folds:
        raise UserError(f"data.validation_fold is {fold}, the dataset has the folds 0 to {folds - 1}")
    samples = store.select(["train"], without_fold=fold)
    if len(samples) == 0:
        raise UserError(f"{store.folder} has no training images")
    if config.protocol == "paper" and not (store.split != "train").any():
        raise UserError("the paper protocol chooses on test classes, but the dataset has none")
    method = METHODS[config.method.name](config.method, 8, int(samples.labels.max()) + 1)
    if not method.plan_is_stored:
        try:
            method.plan(0, _PlanContext(samples, config.seed))  # type: ignore[abstract]
        except ValueError as error:
            raise UserError(f"method: {error}") from error
    single = np.flatnonzero(np.bincount(samples.labels) == 1)
    if len(single):
        first = samples.class_names[single[0]]
        console.print(f"{len(single):,} training classes have one image each (first: {first}): used as negatives only")
    size = split_bytes(store, "train")
    if size > config.cache.max_bytes:
        console.print(
            f"the training split has {size / 1e9:.1f} GB, cache.max_bytes allows {config.cache.max_bytes / 1e9:.1f}: images are "
            "read from the store in every epoch"
        )
    e = config.evaluation
    if store.protocol != "reid" and (e.reranking is not None or e.distractors != "wrong"):
        raise UserError(
            f"evaluation.reranking and evaluation.distractors are for datasets of re-identification, {store.title} is measured "
            f"by {store.protocol}: leave them out"
        )
    tasks = {"validation": validation_task(config, store), "test": test_task(config, store)}
    for name, task in tasks.items():
        try:
            if task is not None:
                task.check(cluster=config.evaluation.clustering and name == "test")
                known = task.metrics(config.evaluation.recall_at)
                if config.evaluation.metric not in known:
                    raise ValueError(
                        f"evaluation.metric is {config.evaluation.metric!r}, they are measured by {', '.join(known)}"
                    )
        except ValueError as error:
            raise UserError(f"{name} classes of {store.folder}: {error}") from error


def _check_dataset(folder: Folder, store: Store) -> None:
    """The dataset is the one that the run was started with."""
    recorded = folder.read_json("run.json")["fingerprint"] if folder.exists("run.json") else store.fingerprint
    if recorded != store.fingerprint:
        raise UserError(
            f"run {folder} was trained on a dataset of fingerprint {recorded}, {store.folder} has {store.fingerprint}: "
            "point data.source to the former, or start over with another name or --fresh"
        )


def _changes(config: Config, folder: Folder) -> list[str]:
    """Compares with the config that an existing run was started with; returns the runtime keys that have changed.

    Raises:
        UserError: a key that is not marked runtime differs, or the run would become shorter.
    """
    if not folder.exists("config.yaml"):
        if Checkpoints(folder).steps():  # of whichever config: --fresh was killed while it removed them
            raise UserError(f"run {folder} has checkpoints but no config.yaml: start over with --fresh")
        return []
    old = yaml.safe_load(folder.read("config.yaml"))
    new = yaml.safe_load(to_yaml(config))
    other = differences(old, new, runtime=False)
    if other:
        raise UserError(
            f"run {folder} exists with another config ({'; '.join(other[:4])}{' ...' if len(other) > 4 else ''}): "
            "choose another --set name=..., or start over with --fresh"
        )
    before = build_config(old)
    if before.length.unit != config.length.unit or config.length.value < before.length.value:
        raise UserError(
            f"run {folder} has length {before.length}, now {config.length}: it may only grow, in the same unit"
        )
    return differences(old, new, runtime=True)


def _record(config: Config, folder: Folder, store: Store, changes: list[str]) -> None:
    """Writes what the run is; changes of runtime keys are printed and kept."""
    if changes:
        for change in changes:
            console.print(f"changed: {change}", highlight=False)
        latest = Checkpoints(folder).latest()
        lines = [*read_changes(folder), {"step": latest.step if latest else 0, "changes": changes}]
        folder.write("changes.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    folder.write("config.yaml", to_yaml(config).encode())
    folder.write_json("run.json", {"fingerprint": store.fingerprint, "dataset": store.folder.uri})


def _finished(config: Config, folder: Folder) -> bool:
    """Whether the run has reached the configured length; it may have reached a shorter one before."""
    if not folder.exists("summary.json"):
        return False
    latest = Checkpoints(folder).latest()
    reached = folder.read_json("summary.json")["protocol"]["length"]
    return latest is not None and latest.finished and reached == str(config.length)


def _show_summary(folder: Folder) -> None:
    summary = folder.read_json("summary.json")
    out = Console()
    out.print(f"{summary['name']}: retrieval on classes never seen in training", highlight=False, soft_wrap=True)
    out.print(summary_table(summary))
    out.print(
        f"{summary['images']:,} images in {summary['seconds']:.0f} s, {summary['images_per_second']:.1f} images/s; "
        f"protocol: {summary['protocol']['profile']}, {summary['protocol']['checkpoint']} checkpoint",
        highlight=False,
    )
    if "partial" in summary["protocol"]:
        out.print(f"partial dataset: {summary['protocol']['partial']}", highlight=False, soft_wrap=True)
    out.print(f"report: {folder}/report.html", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
