"""The watcher of spot notices, against fake metadata servers on loopback and a stand-in for the drain."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pipeline.distributed import spot_notice
from pipeline.distributed.spot_notice import AwsMetadata, GcpMetadata, Notice, main, wait_for_notice
from pipeline.errors import RunError, UserError

Answer = tuple[int, str]


class Metadata:
    """A metadata server.

    Attributes:
        url: Its address.
        answer: Called with (method, path, headers) of each request; gives status and text.
        requests: (method, path) of all that arrived.
    """

    def __init__(self, answer: Callable[[str, str, Any], Answer]) -> None:
        self.answer = answer
        self.requests: list[tuple[str, str]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                owner.requests.append((self.command, self.path))
                status, text = owner.answer(self.command, self.path, self.headers)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            do_PUT = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spot_notice, "POLL_S", 0.01)
    monkeypatch.setattr(spot_notice, "RETRY_S", 0.01)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[str, str, Any], Answer]], Metadata]]:
    started: list[Metadata] = []

    def start(answer: Callable[[str, str, Any], Answer]) -> Metadata:
        started.append(Metadata(answer))
        return started[-1]

    yield start
    for server in started:
        server.close()


class Aws:
    """Amazon's answers: a token by PUT, asked for with it; a notice at the request of that number."""

    def __init__(self, text: str, at: int = 3, expires_at: int | None = None) -> None:
        self.text, self.at, self.expires_at, self.asked, self.tokens = text, at, expires_at, 0, 0

    def __call__(self, method: str, path: str, headers: Any) -> Answer:
        if path == "/latest/api/token":
            assert method == "PUT" and headers["X-aws-ec2-metadata-token-ttl-seconds"] == "21600"
            self.tokens += 1
            return 200, f"token{self.tokens}"
        assert path == "/latest/meta-data/spot/instance-action"
        self.asked += 1
        if self.asked == self.expires_at or headers["X-aws-ec2-metadata-token"] != f"token{self.tokens}":
            return 401, "Unauthorized"
        return (200, self.text) if self.asked >= self.at else (404, "Not Found")


def in_two_minutes() -> datetime:
    return datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=120)


def test_aws_announces_action_and_time(serve: Any) -> None:
    end = in_two_minutes()
    server = serve(Aws(f'{{"action": "terminate", "time": "{end:%Y-%m-%dT%H:%M:%SZ}"}}'))
    notice = wait_for_notice(AwsMetadata(server.url))
    assert notice == Notice(f"spot instance: terminate at {end:%Y-%m-%dT%H:%M:%SZ}", end.timestamp())
    assert [method for method, _ in server.requests] == ["PUT", "GET", "GET", "GET"]


def test_a_token_of_aws_that_is_too_old_is_renewed(serve: Any) -> None:
    aws = Aws(f'{{"action": "stop", "time": "{in_two_minutes():%Y-%m-%dT%H:%M:%SZ}"}}', at=4, expires_at=2)
    assert "stop" in wait_for_notice(AwsMetadata(serve(aws).url)).message and aws.tokens == 2


def test_an_announcement_of_aws_in_another_form_still_counts(serve: Any) -> None:
    notice = wait_for_notice(AwsMetadata(serve(Aws("going away", at=1)).url))
    assert "going away" in notice.message and 100 < notice.deadline - time.time() <= 120


def test_google_answers_when_the_value_changes(serve: Any) -> None:
    preempted = threading.Event()

    def answer(method: str, path: str, headers: Any) -> Answer:
        assert headers["Metadata-Flavor"] == "Google"
        if "wait_for_change" in path:
            preempted.wait(10)
        return 200, "TRUE\n" if preempted.is_set() else "FALSE\n"

    server = serve(answer)
    threading.Timer(0.2, preempted.set).start()
    notice = wait_for_notice(GcpMetadata(server.url))
    assert notice.message == "spot instance: preempted" and 25 < notice.deadline - time.time() <= 30
    assert [path for _, path in server.requests] == [
        "/computeMetadata/v1/instance/preempted",
        "/computeMetadata/v1/instance/preempted?wait_for_change=true&timeout_sec=60",
    ]


def test_a_server_that_has_answered_may_fail_for_a_while(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    answers = iter([(200, "FALSE"), (503, "busy"), (503, "busy"), (200, "FALSE"), (200, "TRUE")])
    wait_for_notice(GcpMetadata(serve(lambda *_: next(answers)).url), start_s=0.0)
    lines = capsys.readouterr().out.splitlines()
    assert [("503" in line, "waiting for a notice" in line) for line in lines] == [
        (False, True),
        (True, False),
        (False, True),
    ]


def test_without_any_answer_the_node_is_no_node_of_that_cloud(serve: Any) -> None:
    with pytest.raises(RunError, match=r"does not answer .*404.* expected a node of the cloud"):
        wait_for_notice(GcpMetadata(serve(lambda *_: (404, "")).url), start_s=0.05)
    with pytest.raises(RunError, match="does not answer"):
        wait_for_notice(AwsMetadata("http://127.0.0.1:9"), start_s=0.05)


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def drained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Notice, str, str]]:
    """What the stand-in for the drain was called with, on a machine with the Ray node "aa"."""
    monkeypatch.setattr(spot_notice, "local_nodes", lambda: {"aa"})
    return []


def test_a_notice_drains_this_node(serve: Any, drained: Any) -> None:
    url = serve(Aws(f'{{"action": "terminate", "time": "{in_two_minutes():%Y-%m-%dT%H:%M:%SZ}"}}')).url
    arguments = ["--cloud", "aws", "--metadata-url", url, "--address", "10.0.0.1:6379"]
    assert main(arguments, drain=lambda *call: drained.append(call)) == 0
    ((notice, node, gcs),) = drained
    assert (node, gcs) == ("aa", "10.0.0.1:6379") and 110 < notice.deadline - time.time() <= 120


def test_a_second_watcher_of_a_node_ends_at_once(serve: Any, drained: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ended = threading.Event()
    server = serve(lambda *_: (200, "TRUE" if ended.is_set() else "FALSE"))
    arguments = ["--cloud", "gcp", "--metadata-url", server.url, "--address", "10.0.0.1:6379", "--node-id", "aa"]
    first = threading.Thread(target=main, args=(arguments,), kwargs={"drain": lambda *call: drained.append(call)})
    first.start()
    while not server.requests:
        time.sleep(0.01)
    assert main(arguments, drain=lambda *call: drained.append(call)) == 0
    assert "a watcher runs here already" in capsys.readouterr().out and not drained
    ended.set()
    first.join(10)
    assert len(drained) == 1


def test_the_hook_of_a_pod_waits_until_ray_has_left(drained: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    arguments = ["--cloud", "kubernetes", "--address", "10.0.0.1:6379", "--grace-s", "0.1"]
    assert main(arguments, drain=lambda *call: drained.append(call)) == 0
    assert drained[0][0].message == "the pod is being ended" and "node aa is still busy" in capsys.readouterr().out
    nodes = iter([{"aa"}, {"aa"}, set()])
    monkeypatch.setattr(spot_notice, "local_nodes", lambda: next(nodes))
    assert main([*arguments[:-1], "60"], drain=lambda *call: drained.append(call)) == 0
    assert "busy" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("nodes", "given", "says"),
    [
        (set(), None, "run `ray start` first"),
        ({"aa", "bb"}, None, "2 Ray nodes run on this machine: expected --node-id, one of aa, bb"),
        ({"aa"}, "cc", "--node-id cc: no such Ray node on this machine, which has aa"),
    ],
)
def test_which_node_is_meant_has_to_be_clear(nodes: set[str], given: str | None, says: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(spot_notice, "local_nodes", lambda: set(nodes))
    with pytest.raises(UserError, match=says):
        spot_notice.this_node(given)


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cloud", "kubernetes", "--grace-s", "0"]) == 2
    assert "--grace-s 0: expected more than 0 seconds" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--cloud", "azure"])


def test_a_cluster_that_refuses_is_asked_until_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray._raylet

    asked = []

    class Refuses:
        def __init__(self, address: str) -> None:
            pass

        def drain_node(self, *call: object, timeout: float) -> tuple[bool, str]:
            asked.append(call)
            return (len(asked) > 2 and call[0] == "bb"), "not now"

    monkeypatch.setattr(ray._raylet, "GcsClient", Refuses)
    with pytest.raises(RunError, match=r"node aa could not be drained at 10\.0\.0\.1:6379: not now"):
        spot_notice.drain(Notice("ends", time.time() + 0.1), "aa", "10.0.0.1:6379")
    assert len(asked) > 2
    spot_notice.drain(Notice("ends", time.time() + 5), "bb", "10.0.0.1:6379")
    assert asked[-1][2] == "ends"
