"""One run, from a dataset to a report."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from typing import Any

from methods import plugins
from pipeline.config import Config, to_yaml
from pipeline.console import console
from pipeline.data import own_images
from pipeline.data.find_store import find_store
from pipeline.data.prepare_store import emoji_store, prepare
from pipeline.data.store import Store
from pipeline.distributed import jobs
from pipeline.distributed.ray_session import on_cluster, ray_session
from pipeline.errors import RunError, UserError
from pipeline.model.network import num_classes
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.report_page import write_report
from pipeline.runs.run_folder import CHANGES, CLASS_NAMES, CONFIG, DATASET, REPORT, SUMMARY, read_changes, run_folder
from pipeline.runs.run_state import check_not_running
from pipeline.runs.summary import finished_length
from pipeline.runs.terminal import Display, show_summary
from pipeline.storage import Folder
from pipeline.trackers.choose import check_trackers
from pipeline.trackers.follow import RunTracking, lacking
from pipeline.training.checks import (
    check_cluster,
    check_dataset,
    check_machine,
    check_run,
    checked_trunk,
    needed_cpus,
    runtime_changes,
    with_former_defaults,
    with_machine_defaults,
)
from pipeline.training.launch import run_in_process, under_torchrun
from pipeline.training.ray_train import run_on_ray

SHM_BYTES = 32 << 20  # free space of /dev/shm below which Ray's objects have no room


def run(config: Config, fresh: bool = False) -> int | None:
    """One run; returns the signal that stopped it, or None when it has finished.

    Raises:
        UserError: The input is bad; found before anything starts.
        RunError: The run failed.
    """
    config = located(config)
    is_rank0 = os.environ.get("RANK", "0") == "0" if under_torchrun() else True
    folder = run_folder(config)
    folder.check_writable()
    for warning in check_machine(config):
        console.print(warning)
    try:
        config = config if fresh else with_former_defaults(config, folder)
        changes = [] if fresh else runtime_changes(config, folder)
    except UserError:
        check_input(config)  # what is wrong in itself is told before what differs from the earlier run
        raise
    if not fresh and is_finished(config, folder) and not changes and folder.exists(REPORT):
        if is_rank0 and config.tracking and lacking(folder):
            check_trackers(config)
            with RunTracking(config) as tracking:
                tracking.finished()
        show_summary(folder)
        return None
    store = check_input(config)
    if is_rank0:
        check_not_running(folder)
    with ExitStack() as stack:
        ray: Any = None
        if uses_ray(config):
            console.print(f"starting Ray {'on the cluster' if on_cluster() else 'on this machine'} ...")
            ray = stack.enter_context(ray_session(needed_cpus(config)))
            check_cluster(config, ray)
        if store is None:
            store = prepare_demo(config)
        if not fresh:
            check_dataset(folder, store)
        if is_rank0:
            if fresh:  # only after all checks
                folder.remove()
            record(config, folder, store, changes)
            tracking = stack.enter_context(RunTracking(config))
        with Display(console) as display:
            uri = store.folder.uri
            if config.runtime.max_workers and not under_torchrun():
                try:
                    signal = run_on_ray(config, uri, display, ray)
                except ray.exceptions.RayError as error:
                    raise ray_error(error) from error
            else:
                signal = run_in_process(config, uri, display)
        if is_rank0 and is_finished(config, folder):
            write_report(folder, store)
            tracking.finished()
    if is_rank0 and is_finished(config, folder):
        show_summary(folder)
    return signal


def ray_error(error: Exception) -> RunError:
    """One line about the end of Ray itself below a run, as when /dev/shm is full: its node's process is killed then."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    full = "/dev/shm" if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free < SHM_BYTES else ""
    cause = f"{full} is full: make room there" if full else "a node or its memory was lost: look into the logs of Ray"
    return RunError(
        f"Ray ended below the run ({first}); {cause}; the newest checkpoint is kept, the same command continues"
    )


def located(config: Config) -> Config:
    """The configuration with an absolute storage and the machine's defaults filled in.

    Raises:
        UserError: The storage is a relative path and the run is on a cluster.
    """
    if on_cluster() and not (os.path.isabs(os.path.expanduser(config.root)) or "://" in config.root):
        raise UserError(
            f"storage {config.root!r} is a relative path, which every node of a cluster would look for in another folder: give "
            "an absolute path that all nodes mount, or s3://..."
        )
    return config.model_copy(
        update={"storage": Folder(config.root).uri, "runtime": with_machine_defaults(config.runtime)}
    )


def check_input(config: Config) -> Store | None:
    """Checks backbone, weights and dataset before Ray starts; returns the dataset, or None if the demo is to be prepared.

    Raises:
        UserError: A tracker could not do its work, the backbone is unknown, its weights do not exist or do not fit, there is no such dataset, or the recipe
            does not fit it.
    """
    check_trackers(config)
    trunk = checked_trunk(config)
    if trunk.weights_note:
        console.print(trunk.weights_note, markup=False, highlight=False, soft_wrap=True)
    store = open_dataset(config)
    for line in check_run(config, store).notes if store is not None else ():
        console.print(line)
    return store


def open_dataset(config: Config) -> Store | None:
    """The dataset, with all its shards; None if it is the demo and still to be prepared.

    Raises:
        UserError: There is no such dataset, a shard is missing, or other images lie in the demo's place.
    """
    if must_prepare(config):
        return None
    is_demo = config.data.source == "emoji"
    store = Store(emoji_store(config.root) if is_demo else find_store(config.data.source, [config.root]))
    if is_demo and store.manifest.get("source", "emoji") != "emoji":
        raise UserError(
            f"{store.folder} is not the built-in demo but was prepared from {store.manifest.get('origin', 'other images')}: "
            "move it to a folder of another name and set data.source to that"
        )
    store.check_shards()
    return store


def uses_ray(config: Config) -> bool:
    """True if a run starts Ray or connects to a cluster: for its workers, its loaders, or to prepare the demo."""
    return not under_torchrun() and bool(
        config.runtime.max_workers or config.runtime.loader == "ray" or must_prepare(config)
    )


def must_prepare(config: Config) -> bool:
    return config.data.source == "emoji" and not emoji_store(config.root).exists("manifest.json")


def prepare_demo(config: Config) -> Store:
    """Prepares the built-in demo, once."""
    if under_torchrun():
        raise UserError("the emoji are not prepared yet: run `python -m pipeline.prepare emoji` before torchrun")
    prepare("emoji", own_images.emoji(), emoji_store(config.root), jobs.run_on_ray, source="emoji")
    store = Store(emoji_store(config.root))
    for line in check_run(config, store).notes:
        console.print(line)
    return store


def record(config: Config, folder: Folder, store: Store, changes: list[str]) -> None:
    """Writes config.yaml and run.json; changes of runtime keys are printed and added to changes.jsonl."""
    if changes:
        for change in changes:
            console.print(f"changed: {change}", highlight=False)
        latest = Checkpoints(folder).latest()
        lines = [*read_changes(folder), {"step": latest.step if latest else 0, "changes": changes}]
        folder.write(CHANGES, "".join(json.dumps(line) + "\n" for line in lines).encode())
    folder.write(CONFIG, to_yaml(config).encode())
    samples = store.select(["train"], without_fold=config.data.validation_fold)
    record: dict[str, Any] = {
        "fingerprint": store.fingerprint,
        "dataset": store.folder.uri,
        "classes": num_classes(samples),
    }
    if plugins.loaded:
        record["plugin_folders"] = plugins.folders()  # for commands that read the run from another folder
    folder.write(CLASS_NAMES, json.dumps(samples.class_names).encode())
    folder.write_json(DATASET, record)


def is_finished(config: Config, folder: Folder) -> bool:
    """True if the run has reached the configured length; an earlier start may have finished a shorter one."""
    if not folder.exists(SUMMARY):
        return False
    latest = Checkpoints(folder).latest()
    return latest is not None and latest.finished and finished_length(folder.read_json(SUMMARY)) == config.length
