"""`python -m pipeline.distributed.spot_notice --cloud aws`: tells Ray that the cloud is about to take this node away.

Clouds announce the end of a spot instance to the instance itself, and Ray does not ask them. This program does, on each
node: it waits for the announcement, then drains the node in Ray, with the time that is left. Ray then starts nothing more
there, and a run that trains there saves a checkpoint before the node is gone.

    python -m pipeline.distributed.spot_notice --cloud aws          polls every 5 s; 2 minutes' notice
    python -m pipeline.distributed.spot_notice --cloud gcp          waits for a change; 30 s' notice
    python -m pipeline.distributed.spot_notice --cloud kubernetes   preStop hook of a pod: drains at once, waits until Ray has left

On nodes that are not spot instances it waits without end. A second one on the same node ends at once.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from pipeline.errors import RunError, UserError, fail, one_line

PROG = "python -m pipeline.distributed.spot_notice"
METADATA = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
GRACE_S = {"aws": 120.0, "gcp": 30.0, "kubernetes": 100.0}
POLL_S = 5.0
RETRY_S = 1.0
START_S = 60.0  # without an answer for so long from the start on, this is no node of that cloud
REQUEST_S = 5.0
LONG_POLL_S = 60  # after which Google's metadata server answers without a change
DRAIN_REQUEST_S = 5.0
UNREACHABLE = (urllib.error.URLError, http.client.HTTPException, TimeoutError, OSError)


@dataclass(frozen=True)
class Notice:
    """An announced end of this node.

    Attributes:
        message: What the cloud said.
        deadline: Unix time in seconds at which the node is taken.
    """

    message: str
    deadline: float


class AwsMetadata:
    """Amazon's metadata server, version 2, which gives a session token before any answer.

    Args:
        url: Of the server, without path.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.token = ""

    def ask(self) -> Notice | None:
        """The announcement, if there is one; waits POLL_S if there is none."""
        if not self.token:
            self.token = _request(
                f"{self.url}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}, "PUT"
            )
        try:
            text = _request(
                f"{self.url}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": self.token}
            )
        except urllib.error.HTTPError as error:
            if error.code == 401:  # the token is too old
                self.token = ""
                return None
            if error.code == 404:
                time.sleep(POLL_S)
                return None
            raise
        try:
            said = json.loads(text)
            deadline = datetime.strptime(said["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
            return Notice(f"spot instance: {said['action']} at {said['time']}", deadline)
        except (ValueError, KeyError, TypeError):  # announced all the same
            return Notice(f"spot instance: {text[:200]}", time.time() + GRACE_S["aws"])


class GcpMetadata:
    """Google's metadata server, which answers when the value changes.

    Args:
        url: Of the server, without path.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.query = ""  # the first answer comes at once

    def ask(self) -> Notice | None:
        """The announcement, if there is one; waits up to LONG_POLL_S for it."""
        said = _request(
            f"{self.url}/computeMetadata/v1/instance/preempted{self.query}",
            {"Metadata-Flavor": "Google"},
            timeout_s=LONG_POLL_S + REQUEST_S,
        )
        self.query = f"?wait_for_change=true&timeout_sec={LONG_POLL_S}"
        if said.strip().upper() == "TRUE":
            return Notice("spot instance: preempted", time.time() + GRACE_S["gcp"])
        return None


CLOUDS: dict[str, type[AwsMetadata] | type[GcpMetadata]] = {"aws": AwsMetadata, "gcp": GcpMetadata}


def _request(url: str, headers: dict[str, str], method: str = "GET", timeout_s: float = REQUEST_S) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on this machine: no proxy
    request = urllib.request.Request(url, headers=headers, method=method)
    with opener.open(request, timeout=timeout_s) as answer:
        return str(answer.read().decode())


def wait_for_notice(server: AwsMetadata | GcpMetadata, start_s: float = START_S) -> Notice:
    """Waits, for days if need be, until the cloud announces the end of this node.

    A server that has answered once may fail for as long as it likes: it is asked again every second.

    Raises:
        RunError: No answer within `start_s` seconds from the start on.
    """
    answered, failing = False, False
    started = time.monotonic()
    while True:
        try:
            notice = server.ask()
        except UNREACHABLE as error:
            if not answered and time.monotonic() - started > start_s:
                raise RunError(
                    f"the metadata server at {server.url} does not answer ({one_line(error)}): expected a node of the cloud that "
                    "--cloud names"
                ) from error
            if not failing:
                _say(f"the metadata server at {server.url} does not answer: {one_line(error)}; asking again")
            failing = True
            time.sleep(RETRY_S)
            continue
        if not answered or failing:
            _say(f"waiting for a notice from {server.url}")
        answered, failing = True, False
        if notice is not None:
            return notice


def drain(notice: Notice, node: str, gcs: str) -> None:
    """Tells the cluster that a node ends, until it has accepted that or the node's time is over.

    Args:
        notice: What the cloud announced.
        node: Ray's hexadecimal id of the node.
        gcs: host:port of the cluster's head.

    Raises:
        RunError: The cluster was not reached, or refused, until the deadline.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # type: ignore[attr-defined]
    problem = "no time was left"
    while time.time() < notice.deadline:
        try:
            accepted, problem = GcsClient(address=gcs).drain_node(
                node, reason, notice.message, int(notice.deadline * 1000), timeout=DRAIN_REQUEST_S
            )
        except Exception as error:  # Ray's own classes, which depend on what failed
            accepted, problem = False, one_line(error)
        if accepted:
            _say(f"draining node {node}, {notice.deadline - time.time():.0f} s left: {notice.message}")
            return
        _say(f"node {node} is not drained yet: {problem}")
        time.sleep(RETRY_S)
    raise RunError(f"node {node} could not be drained at {gcs}: {problem}")


def local_nodes() -> set[str]:
    """Ids of the Ray nodes that run on this machine."""
    from ray._private.services import find_node_ids

    return set(find_node_ids())


def this_node(given: str | None) -> str:
    """The id of the one Ray node of this machine, or `given`.

    Raises:
        UserError: Ray does not run here, or several nodes do.
    """
    nodes = local_nodes()
    if given is None and len(nodes) == 1:
        return nodes.pop()
    if given in nodes:
        return str(given)
    if given is not None:
        raise UserError(
            f"--node-id {given}: no such Ray node on this machine, which has {', '.join(sorted(nodes)) or 'none'}"
        )
    if not nodes:
        raise UserError("no Ray node runs on this machine: run `ray start` first")
    raise UserError(
        f"{len(nodes)} Ray nodes run on this machine: expected --node-id, one of {', '.join(sorted(nodes))}"
    )


def gcs_address(given: str | None) -> str:
    """host:port of the head: `given`, RAY_ADDRESS, or that of the Ray node of this machine.

    Raises:
        UserError: There is none.
    """
    from ray._private.services import canonicalize_bootstrap_address_or_die

    try:
        return str(canonicalize_bootstrap_address_or_die(given))  # type: ignore[arg-type]
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"the cluster's address was not found: {one_line(error)}; expected --address HOST:PORT"
        ) from error


def wait_until_left(node: str, deadline: float) -> bool:
    """Whether a node's Ray ended before the deadline, which it does when nothing runs there any more."""
    while node in local_nodes():
        if time.time() > deadline:
            return False
        time.sleep(RETRY_S)
    return True


def _say(line: str) -> None:
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} spot_notice: {line}", flush=True)


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cloud", choices=[*CLOUDS, "kubernetes"], required=True, help="who announces the end")
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="of the head (default: RAY_ADDRESS, or that of the Ray here)"
    )
    parser.add_argument(
        "--node-id", metavar="HEX", help="Ray's id of this node (default: the only one of this machine)"
    )
    parser.add_argument(
        "--metadata-url", metavar="URL", help="of the cloud's metadata server (default: the cloud's own)"
    )
    parser.add_argument(
        "--grace-s",
        type=float,
        default=GRACE_S["kubernetes"],
        metavar="SECONDS",
        help="kubernetes: less than the pod's terminationGracePeriodSeconds (default: 100)",
    )
    return parser


def main(
    arguments: list[str] | None = None, prog: str = PROG, drain: Callable[[Notice, str, str], None] = drain
) -> int:
    """Exit status: 0 the node was drained, or a watcher runs here already; 1 it could not be; 2 bad input."""
    options = build_parser(prog).parse_args(arguments)
    try:
        if options.grace_s <= 0:
            raise UserError(f"--grace-s {options.grace_s:g}: expected more than 0 seconds")
        if options.cloud == "kubernetes":
            notice = Notice("the pod is being ended", time.time() + options.grace_s)
            node = this_node(options.node_id)
            drain(notice, node, gcs_address(options.address))
            if not wait_until_left(node, notice.deadline):
                _say(f"node {node} is still busy")
            return 0
        with _only_one(options.node_id) as alone:
            if not alone:
                _say("a watcher runs here already")
                return 0
            import ray  # noqa: F401  # now: at the notice every second counts

            server = CLOUDS[options.cloud](options.metadata_url or METADATA[options.cloud])
            notice = wait_for_notice(server)
            drain(
                notice, this_node(options.node_id), gcs_address(options.address)
            )  # found now: Ray may have been restarted
    except UserError as error:
        return fail(error, 2)
    except RunError as error:
        return fail(error, 1)
    except KeyboardInterrupt:
        return 130
    return 0


@contextlib.contextmanager
def _only_one(node: str | None) -> Iterator[bool]:
    """True for one process of this user and node at a time."""
    import filelock

    lock = filelock.FileLock(
        os.path.join(tempfile.gettempdir(), f"raydml-spot-notice-{os.getuid()}-{node or 'here'}.lock")
    )
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


if __name__ == "__main__":
    sys.exit(main())
