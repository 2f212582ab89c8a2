"""The mining servers as Ray actors, and the transport to them."""

from __future__ import annotations

import uuid
from concurrent.futures import Future
from typing import Any

import torch

from pipeline.mining.server import MiningServer
from pipeline.mining.transport import ServerGone

# What may take long has threads of its own: a rebuild or a snapshot never stands in the way of a search.
_GROUPS = {"search": 2, "update": 1}
_GROUP_OF = {name: "search" for name in ("search", "search_lists", "fetch", "all_ids", "all_neighbours", "delta")} | {
    name: "update" for name in ("put", "rebuild", "save")
}


class MiningActor(MiningServer):
    """A server in a process of its own.

    Args:
        threads: of torch, for searches.
    """

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        super().__init__()


def start_servers(
    ray: Any, run: str, shards: int = 1, threads: int = 1, gpus: float = 0, label: str | None = None
) -> list[Any]:
    """Starts a run's servers; they end with the process that holds these handles.

    Args:
        ray: the module, connected.
        run: name of the run; the actors' names carry it and a token, so that two runs never meet.
        shards: how many; spread over the nodes.
        threads, gpus: of each.
        label: custom resource of the nodes that they must stand on (not spot nodes), if any.
    """
    token = uuid.uuid4().hex[:8]
    actor = ray.remote(concurrency_groups=_GROUPS)(MiningActor)
    options: dict[str, Any] = {
        "num_cpus": threads, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": 0,
        "scheduling_strategy": "SPREAD", "namespace": f"raydml-{run}-{token}",
    }  # fmt: skip
    if label is not None:
        options["resources"] = {label: 0.001}
    return [actor.options(**options, name=f"mining-{run}-{token}-{shard}").remote(threads) for shard in range(shards)]


class Remote:
    """A server in a Ray actor.

    Args:
        actor: its handle.
    """

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        import ray

        out: Future[Any] = Future()
        bound = getattr(self.actor, method)
        if method in _GROUP_OF:
            bound = bound.options(concurrency_group=_GROUP_OF[method])
        try:
            reference = bound.remote(*arguments)
        except ray.exceptions.RayActorError as error:
            out.set_exception(ServerGone(str(error)))
            return out

        def finish(done: Future[Any]) -> None:
            error = done.exception()
            if isinstance(error, ray.exceptions.RayTaskError):
                out.set_exception(error.cause)
            elif isinstance(error, (ray.exceptions.RayActorError, ray.exceptions.RaySystemError)):
                out.set_exception(ServerGone(_line(error)))
            elif error is not None:
                out.set_exception(error)
            else:
                out.set_result(done.result())

        reference.future().add_done_callback(finish)
        return out


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
