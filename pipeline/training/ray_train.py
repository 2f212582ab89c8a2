"""Trains a run with Ray Train: starts the workers, starts them again where it has to, and tells what they say.

driver            run_on_ray: Ray Train's controller in a thread; stop requests, nodes that leave or come
every worker      train_worker: the training loop, with signs of life
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist

from pipeline.config import Config, WorkerRange, build_config
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.cpus import use_cpus
from pipeline.distributed.gauges import RunGauges
from pipeline.distributed.hang_watch import HangWatch, collective_timeout
from pipeline.distributed.ray_session import clean_up_after_controllers
from pipeline.distributed.run_status import RunStatusProxy, start_status, worker_label
from pipeline.distributed.worker_log import log_failure, worker_log
from pipeline.errors import DivergedError, RunError, UserError, one_line
from pipeline.mining.actor import RayTransport, start_servers
from pipeline.storage import Folder
from pipeline.training.elastic import NEVER_S, WorkerNumber, worker_resources
from pipeline.training.launch import Show, StopSignals, no_space_error, state_writer, status_display
from pipeline.training.loop import Worker

HEALTH_CHECK_TIMEOUT = (
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"  # Ray Train's: a worker that does not answer is replaced
)
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
LOST_CONNECTION = "lost the connection to another worker"
_LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
CLEAN_UP_S = 30.0  # after the death of Ray Train's controller
STOP_TIMEOUT_S = 120  # after a stop request; the driver then ends, and with it the workers


def run_on_ray(
    config: Config, store_uri: str, show: Show, ray: Any, stop_requested: threading.Event | None = None
) -> int | None:
    """Trains with Ray Train; returns the signal that stopped the run, if any.

    Args:
        config: The resolved configuration.
        store_uri: The dataset.
        show: Called with the status a few times a second.
        ray: The ray module, connected to a cluster.
        stop_requested: Set by another thread to stop the run as a signal does.

    Raises:
        RunError: A worker failed more often than `runtime.max_failures`, or the run cannot go on.
    """
    actor = start_status(ray, config.runtime.hang_timeout_s)
    os.environ[HEALTH_CHECK_TIMEOUT] = str(config.runtime.hang_timeout_s)
    if isinstance(
        config.runtime.workers, WorkerRange
    ):  # where a node is lost, Ray first asks for as many workers as before
        os.environ.setdefault(START_TIMEOUT, "20")
    number = WorkerNumber(config, ray, actor.add_message.remote)
    servers = mining_servers(config, ray)
    loop_config = {"config": config.model_dump(mode="json"), "store": store_uri, "status": actor, "servers": servers}
    stop_times: list[float] = []
    controller_failures = 0

    def stop() -> None:
        stop_times.append(time.monotonic())
        actor.stop.remote()

    def stopping() -> bool:
        if stop_requested is not None and stop_requested.is_set() and not stop_times:
            stop()
        return bool(stop_times)

    with (
        _killed_at_the_end(ray, [actor, *servers]),
        state_writer(config, lambda: ray.get(actor.summary.remote()), stop) as state,
        StopSignals(stop) as signals,
        status_display(lambda *seen: ray.get(actor.read.remote(*seen)), show),
    ):
        try:
            while (workers := number.choose(stopping)) is not None:
                fit = _Fit(ray_trainer(config, workers, loop_config))
                while not fit.ended(0.2):
                    if stopping() and time.monotonic() - stop_times[0] > STOP_TIMEOUT_S:
                        raise RunError(
                            f"the workers did not stop within {STOP_TIMEOUT_S} s; the newest checkpoint is kept"
                        )
                    if (reason := number.check(lambda: ray.get(actor.workers.remote()))) is not None:
                        actor.restart.remote(reason)
                if (failure := ray.get(actor.failure.remote())) is not None:
                    raise failure
                if (
                    isinstance(fit.error, ray.exceptions.RayActorError)
                    and controller_failures < config.runtime.max_failures
                ):
                    controller_failures += 1
                    actor.add_message.remote("Ray Train's controller died: starting again")
                    actor.workers_failed.remote({})
                    clean_up_after_controllers(ray, CLEAN_UP_S)
                    continue
                if fit.error is not None:
                    cause = root_cause(fit.error, lambda rank: ray.get(actor.label.remote(rank)))
                    raise RunError(f"training failed: {cause}")
                if not ray.get(actor.restarts.remote()):
                    break
        finally:
            number.close()
    return signals.received or state.signal


@contextlib.contextmanager
def _killed_at_the_end(ray: Any, actors: Sequence[Any]) -> Iterator[None]:
    """Ends actors with the block: other handles of them may live on in objects that wait for the garbage collector."""
    try:
        yield
    finally:
        for actor in actors:
            ray.kill(actor)


class _Fit(threading.Thread):
    """`TorchTrainer.fit` in a thread, so that signals and the cluster are seen meanwhile."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(daemon=True, name="fit")
        self.trainer = trainer
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.trainer.fit()
        except BaseException as error:
            self.error = error

    def ended(self, timeout_s: float) -> bool:
        self.join(timeout_s)
        return not self.is_alive()


def ray_trainer(config: Config, workers: int | tuple[int, int], loop_config: dict[str, Any]) -> Any:
    """Ray Train's trainer of a run.

    Args:
        config: The resolved configuration.
        workers: Number of workers, or the smallest and largest number.
        loop_config: The argument of `train_worker`.
    """
    import ray.train.torch
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    from pipeline.training.tell_failures import TellFailures

    train: Any = ray.train  # its annotations are those of an earlier interface

    runtime = config.runtime
    ray_folder = Folder(config.root) / "ray"
    elastic = isinstance(workers, tuple)
    return train.torch.TorchTrainer(
        train_worker,
        train_loop_config=loop_config,
        torch_config=train.torch.TorchConfig(
            backend="nccl" if runtime.gpus_per_worker else "gloo",
            timeout_s=round(collective_timeout(runtime.hang_timeout_s).total_seconds()),
        ),
        scaling_config=train.ScalingConfig(
            num_workers=workers,
            use_gpu=bool(runtime.gpus_per_worker),
            resources_per_worker=worker_resources(config),
            label_selector=runtime.worker_labels or None,
            # Ray would end the workers of a smaller group without a checkpoint: `WorkerNumber.check` asks them to save first.
            **({"elastic_resize_monitor_interval_s": NEVER_S} if elastic else {}),
        ),
        # Only for Ray Train's own files: checkpoints are written to the run folder.
        run_config=train.RunConfig(
            name=config.name,
            storage_path=ray_folder.path(),
            storage_filesystem=None if ray_folder.is_local else PyFileSystem(FSSpecHandler(ray_folder.fs)),
            failure_config=train.FailureConfig(max_failures=runtime.max_failures),
            callbacks=[TellFailures(loop_config["status"])],
        ),
    )


def mining_servers(config: Config, ray: Any) -> list[Any]:
    """Starts the mining servers that the run's method needs."""
    mining = config.mining
    if config.method.mining is None:
        return []
    return start_servers(
        ray, config.name, mining.shards, mining.cpus, mining.gpus, mining.resource, mining.labels, mining.memory
    )


def train_worker(loop_config: dict[str, Any]) -> None:
    """The function that each Ray Train worker runs."""
    import ray
    import ray.train.torch

    context = ray.train.get_context()
    ranks = Ranks(context.get_world_rank(), context.get_world_size())
    host = ray.util.get_node_ip_address()
    label = worker_label(ranks.rank, host)
    status = RunStatusProxy(loop_config["status"])
    with worker_log(label, status.add_message):
        config = build_config(loop_config["config"])
        if ranks.rank == 0:
            status.gauges = RunGauges(config.name)
        use_cpus(config.runtime.cpus_per_worker or 1)
        if status.error_message() is not None:
            return
        place = {"node": ray.get_runtime_context().get_node_id(), "host": host, "pid": os.getpid()}
        status.add_worker({"rank": ranks.rank, "world": ranks.world, **place})
        watch = HangWatch(
            label,
            config.runtime.hang_timeout_s,
            status.add_message,
            lambda step: status.beat(ranks.rank, host, os.getpid(), step),
            lambda: ranks.world > 1 and status.error_message() is not None,
        )
        with watch:
            _work(config, loop_config, ranks, status, watch)
    status.leave(ranks.rank, os.getpid())


def _work(config: Config, loop_config: dict[str, Any], ranks: Ranks, status: RunStatusProxy, watch: HangWatch) -> None:
    """Trains as one rank; an error that a restart may heal is raised, others are told to the driver."""
    import ray.train
    import ray.train.torch

    try:
        servers = [RayTransport(actor) for actor in loop_config["servers"]]
        device = ray.train.torch.get_device()
        Worker(config, loop_config["store"], ranks, device, status, ray.train.report, servers, watch)()
    except (RunError, UserError) as error:
        # a restart would fail again: end instead, and let the other ranks see it
        status.fail(one_line(error), isinstance(error, DivergedError))
        if dist.is_initialized():
            dist.destroy_process_group()
    except Exception as error:
        failure = no_space_error(error) if isinstance(error, OSError) else error
        if isinstance(failure, RunError):  # a restart would find the disk as full
            status.fail(one_line(failure))
        elif status.error_message() is None:
            log_failure("this worker failed", error)
            raise


def root_cause(error: BaseException, where: Callable[[int], str] = lambda rank: f"[rank {rank}]") -> str:
    """One line about the first error, without the exceptions that Ray wraps around it; a worker's with its rank and node.

    Of several workers, that of one that did not just lose the connection to another.
    """
    failures = dict(getattr(error, "worker_failures", None) or {})
    texts = {rank: _last_line(failure) for rank, failure in failures.items()}
    for rank, text in sorted(texts.items(), key=lambda item: (item[1] == LOST_CONNECTION, item[0])):
        return f"{where(rank)} {text}"
    return _last_line(error)


def _last_line(error: BaseException) -> str:
    import ray

    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, ray.exceptions.RayActorError):
        return "the process died: it was killed, or had no memory left"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    return LOST_CONNECTION if any(words in text for words in _LOST_CONNECTION) else text
