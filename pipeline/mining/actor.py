"""The mining servers as Ray actors, and the transport to them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import torch

from pipeline.mining.server import MiningServer
from pipeline.mining.transport import ServerGone

# Slow calls have threads of their own: a search never waits for a rebuild or a snapshot.
_CONCURRENCY_GROUPS = {"search": 2, "update": 1, "status": 1}
_GROUP_OF = (
    {name: "search" for name in ("search", "search_lists", "fetch", "all_ids", "all_neighbours", "changes_since")}
    | {name: "update" for name in ("put", "rebuild", "save")}
    | {"status": "status"}
)


class MiningActor(MiningServer):
    """A server in a process of its own.

    Args:
        threads: Number of torch threads, for searches.
    """

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        super().__init__()


def start_servers(
    ray: Any,
    run: str,
    shards: int = 1,
    threads: int = 1,
    gpus: float = 0,
    resource: str | None = None,
    labels: Mapping[str, str] | None = None,
    memory: int = 0,
) -> list[Any]:
    """Starts a run's servers; they end with the process that holds these handles.

    Args:
        ray: The ray module, connected to a cluster.
        run: Name of the run; the actors' names contain it and a random token, so that no two runs share an actor.
        shards: Number of servers; they are spread over the nodes.
        threads, gpus: CPU threads and GPUs of each server.
        resource: Custom resource of the nodes that may hold servers (not spot nodes), if any.
        labels: Labels of these nodes.
        memory: Memory that a node must have free for each server, bytes; 0: not asked for.
    """
    token = uuid.uuid4().hex[:8]
    actor = ray.remote(concurrency_groups=_CONCURRENCY_GROUPS)(MiningActor)
    options: dict[str, Any] = {
        "num_cpus": threads, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": 0,
        "scheduling_strategy": "SPREAD", "namespace": f"raydml-{run}-{token}",
    }  # fmt: skip
    if resource is not None:
        options["resources"] = {resource: 0.001}
    if labels:
        options["label_selector"] = dict(labels)
    if memory:
        options["memory"] = memory
    return [actor.options(**options, name=f"mining-{run}-{token}-{shard}").remote(threads) for shard in range(shards)]


class RayTransport:
    """A server in a Ray actor.

    Args:
        actor: The handle of the Ray actor.
    """

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        import ray

        future: Future[Any] = Future()
        remote_method = getattr(self.actor, method)
        if method in _GROUP_OF:
            remote_method = remote_method.options(concurrency_group=_GROUP_OF[method])
        try:
            reference = remote_method.remote(*arguments)
        except ray.exceptions.RayActorError as error:
            future.set_exception(ServerGone(str(error)))
            return future

        def finish(ray_future: Future[Any]) -> None:
            error = ray_future.exception()
            if isinstance(error, ray.exceptions.RayTaskError):
                future.set_exception(error.cause)
            elif isinstance(error, (ray.exceptions.RayActorError, ray.exceptions.RaySystemError)):
                future.set_exception(ServerGone(_first_line(error)))
            elif error is not None:
                future.set_exception(error)
            else:
                future.set_result(ray_future.result())

        reference.future().add_done_callback(finish)
        return future

    def restart(self) -> None:
        import ray

        ray.kill(self.actor, no_restart=False)  # also a stopped process, within seconds


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
