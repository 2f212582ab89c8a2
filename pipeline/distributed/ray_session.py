"""Ray for the duration of a command: a running cluster (for a submitted job), or a local Ray started here."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import ROOT, own_packages
from pipeline.distributed.cpus import keep_freed_memory
from pipeline.errors import UserError, joined_lines, one_line
from pipeline.storage import Folder

# Ray Train polls its workers this often; `report` waits for a poll.
POLL_S = "0.3"
OBJECT_STORE_BYTES = 1 << 30
CONNECT_TIMEOUT_S = 20


def on_cluster() -> bool:
    """True if RAY_ADDRESS names a Ray cluster, which `ray job submit` sets for the job's driver."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextlib.contextmanager
def ray_session(cpus: int) -> Iterator[Any]:
    """Connects to the cluster of RAY_ADDRESS, or starts Ray here with `cpus` logical CPUs; disconnects or stops at the end.

    Raises:
        UserError: The cluster cannot be reached, or asks for a token.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_S)
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets any other busy program nearly stop a run
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the future default; silences a warning
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import ray.data

    for name in ("ray.data", "ray.train"):  # hides their messages at every start, not their errors
        logging.getLogger(name).setLevel(logging.ERROR)
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if ray.is_initialized():  # the caller's session: used, not shut down
        yield ray
        return
    if on_cluster():
        os.environ.setdefault(
            "RAY_TRAIN_ENABLE_STATE_TRACKING", "1"
        )  # for the Train tab of the dashboard, which a local Ray has not
        check_address(os.environ["RAY_ADDRESS"])
        try:
            ray.init(**common, **_plugin_folders())
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
            raise UserError(
                f"the Ray cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']} cannot be reached: {joined_lines(error)}"
            ) from error
    else:
        check_token()
        keep_freed_memory()  # its processes inherit it
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process that waits for spot nodes to end
        if any(Path(name).exists() for name in ("pipeline.py", "pipeline")) and Path.cwd() != Path(ROOT):
            # Ray's processes look into this folder first, where there is a `pipeline` of the user's.
            common["runtime_env"] = {"worker_process_setup_hook": own_packages(ROOT)}
        ray.init(
            address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **common
        )
    try:
        yield ray
    finally:
        ray.shutdown()


def check_token() -> None:
    """Makes the token of a Ray that is started here, in the home folder and for this user alone, unless there is one.

    Ray would make it by itself, but readable for every user of the machine.

    Raises:
        UserError: There is no home folder, or it cannot be written.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = Path(os.path.expanduser("~"), ".ray", "auth_token")
    part = path.with_name(f".auth_token.{uuid.uuid4().hex}")
    try:
        if not path.is_absolute():
            raise FileNotFoundError("HOME is not set, and the system does not know this user")
        if path.exists():
            if path.stat().st_mode & 0o077 and path.stat().st_uid == os.getuid():
                path.chmod(0o600)
            return
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(uuid.uuid4().hex)
        with contextlib.suppress(FileExistsError):  # another process was first: its token counts
            os.link(part, path)
        part.unlink()
    except OSError as error:
        raise UserError(
            f"Ray keeps the token of its processes in {path}, which cannot be written ({one_line(error)}): set HOME to a folder that "
            "can be, or RAY_AUTH_TOKEN to a secret of your own; or train without Ray (runtime.workers=0, runtime.loader=in_process)"
        ) from error


def check_address(address: str) -> None:
    """Checks RAY_ADDRESS before Ray is started, which would write log lines for 20 s and then not tell the reason.

    Raises:
        UserError: It is an address for `ray job submit`; the cluster asks for a token, or does not
            answer.
    """
    if address.startswith(("http://", "https://")):
        host = address.split("://")[1].split("/")[0].split(":")[0]
        raise UserError(
            f"RAY_ADDRESS={address} is the address that `ray job submit --working-dir . -- python -m pipeline...` takes; to "
            f"start the command itself on the cluster, set RAY_ADDRESS={host}:6379; to start it here, unset RAY_ADDRESS"
        )
    if re.fullmatch(r"[\w.-]+:\d+", address) is None or os.environ.get("RAY_USE_TLS", "0") != "0":
        return
    import grpc

    token = os.environ.get("RAY_AUTH_TOKEN")
    try:
        refused = not answers_to(address, token)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            raise UserError(
                f"the Ray cluster at RAY_ADDRESS={address} cannot be reached: no answer within {CONNECT_TIMEOUT_S} s"
            ) from error
        return
    if refused and not _token_file():
        wrong = "another token than that of RAY_AUTH_TOKEN" if token else "a token"
        raise UserError(
            f"the Ray cluster at RAY_ADDRESS={address} asks for {wrong}: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or "
            "RAY_AUTH_TOKEN_PATH) to the token that the cluster was started with"
        )


def answers_to(address: str, token: str | None = None) -> bool:
    """Whether a cluster's control store answers a request with this token, or without one; False: it is refused.

    Raises:
        grpc.RpcError: It cannot be reached.
    """
    import grpc

    with grpc.insecure_channel(address) as channel:
        get_cluster_id = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        metadata = [("authorization", f"Bearer {token}")] if token else None
        try:
            get_cluster_id(b"", timeout=CONNECT_TIMEOUT_S, wait_for_ready=True, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return False
            raise
    return True


def _token_file() -> bool:
    """Whether Ray reads a token from a file, which it then sends by itself."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
    return os.environ.get("RAY_AUTH_MODE") == "token" and not os.environ.get("RAY_AUTH_TOKEN") and os.path.exists(path)


def _plugin_folders() -> dict[str, Any]:
    """Tells the workers of a cluster the folders of the user's modules; those in the job's working directory relative to it."""
    plugins = sys.modules.get("methods.plugins")  # not imported: the methods, and with them PyTorch, come with it
    if plugins is None or not plugins.loaded:
        return {}
    folders = plugins.folders()
    here = os.getcwd()
    relative = [os.path.relpath(f, here) if f == here or f.startswith(here + os.sep) else f for f in folders]
    return {"runtime_env": {"env_vars": {plugins.FOLDERS: os.pathsep.join(relative)}}}


def check_visible(ray: Any, folder: Folder, what: str) -> None:
    """Raises UserError on a cluster of several nodes, unless all see a local folder that this one can write to."""
    if not folder.is_local or len(ray.nodes()) < 2:
        return
    probe = f".visible-{uuid.uuid4().hex}"
    folder.write(probe, b"")
    try:
        nodes = nodes_without_path(ray, folder.path(probe))
    finally:
        folder.remove(probe)
    if nodes:
        raise UserError(
            f"{what} {folder} is not visible on the nodes {', '.join(nodes)}: "
            f"set {what} to s3://... or to a folder that all nodes mount"
        )


def nodes_without_path(ray: Any, path: str) -> list[str]:
    """Addresses of the nodes on which a path does not exist; empty on a cluster of one node."""
    nodes = [n for n in ray.nodes() if n["Alive"]]
    return [n["NodeManagerAddress"] for n in nodes if len(nodes) > 1 and not _path_exists_on(ray, n["NodeID"], path)]


def cluster_maximum(ray: Any) -> dict[str, float]:
    """Resources of the cluster at its largest, autoscaling counted."""
    from ray._private.state import state

    with contextlib.suppress(AttributeError):
        maximum = state.get_max_resources_from_cluster_config()
        if maximum:
            return {k: float(v) for k, v in maximum.items()}
    return {k: float(v) for k, v in ray.cluster_resources().items()}


def node_groups(ray: Any) -> list[tuple[dict[str, float], int]]:
    """Resources of a node and the largest number of such nodes, for each kind of node that an autoscaler may start.

    A cluster without autoscaling has one such entry for each node that is alive.
    """
    from ray._private.state import state

    config = state.get_cluster_config()
    if config is not None and config.node_group_configs:
        return [
            ({k: float(v) for k, v in group.resources.items()}, max(0, int(group.max_count)))
            for group in config.node_group_configs
        ]
    return [({k: float(v) for k, v in node["Resources"].items()}, 1) for node in ray.nodes() if node["Alive"]]


def free_on_nodes(ray: Any) -> list[dict[str, float]]:
    """Resources that nobody holds now, of each node that is alive."""
    from ray._private.state import available_resources_per_node

    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return [
        {k: float(v) for k, v in free.items()} for node, free in available_resources_per_node().items() if node in alive
    ]


def draining_nodes(ray: Any) -> dict[str, int]:
    """The nodes that are about to be taken away: Ray node id to the time of that, milliseconds since 1970 (0: not known)."""
    from ray._private.state import state

    return {str(node): int(deadline) for node, deadline in state.get_draining_nodes().items()}


def clean_up_after_controllers(ray: Any, wait_s: float = 0.0) -> None:
    """Gives back what Ray Train's dead controllers of this job held: placement groups, and the actors that watch over these.

    Those actors do the same, but only where Ray runs with its dashboard, and else wait for ever. What living controllers hold, those
    of other trials for example, is left alone.

    Args:
        ray: The ray module, connected to a cluster.
        wait_s: How long to wait for an actor that is still being started, since it cannot be ended before.
    """
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup

    deadline = time.monotonic() + wait_s
    context = ray.get_runtime_context()
    job, here = context.get_job_id(), bytes.fromhex(context.get_node_id())
    while True:
        actors = _actors_of_job(job)
        dead = [a for a in actors if a.class_name == "TrainController" and a.state == a.DEAD]
        controllers, processes = {a.actor_id for a in dead}, {a.address.worker_id for a in dead}
        for group in _placement_group_table():
            if group.creator_actor_id in controllers and group.state != group.REMOVED:
                ray.util.remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
        watching = [a for a in actors if a.class_name == "PlacementGroupCleaner" and a.state != a.DEAD]
        watching = [a for a in watching if a.owner_address.worker_id in processes]
        for actor in watching:
            if actor.state == actor.ALIVE and actor.address.node_id == here:  # it has no name to end it by
                with contextlib.suppress(ProcessLookupError):
                    os.kill(actor.pid, signal.SIGKILL)
        if not watching or time.monotonic() >= deadline:
            return
        time.sleep(0.1)


def _actors_of_job(job: str) -> list[Any]:
    """What Ray knows of a job's actors, with who owns them, which `ray.util.state` does not tell without a dashboard."""
    from ray import JobID
    from ray._private.state import state
    from ray.core.generated import gcs_pb2

    generated: Any = gcs_pb2
    table = state._connect_and_get_accessor().get_actor_table(JobID(bytes.fromhex(job)), None)
    return [generated.ActorTableData.FromString(entry) for entry in table]


def _placement_group_table() -> list[Any]:
    """What Ray knows of the placement groups of all jobs, with the actors that made them."""
    from ray._private.state import state
    from ray.core.generated import gcs_pb2

    generated: Any = gcs_pb2
    table = state._connect_and_get_accessor().get_placement_group_table()
    return [generated.PlacementGroupTableData.FromString(entry) for entry in table]


def _path_exists_on(ray: Any, node: str, path: str) -> bool:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    on_node = ray.remote(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
    return bool(ray.get(on_node(os.path.exists).remote(path)))
