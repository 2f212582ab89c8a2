"""RAY_ADDRESS that leads nowhere: the remedy in one line, before Ray is started."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

from pipeline import prepare
from pipeline.distributed import ray_session
from pipeline.distributed.ray_session import check_address
from pipeline.errors import UserError
from pipeline.testing.tiny import write_images

TOKEN = "right"


class Head(grpc.GenericRpcHandler):
    """A cluster's head that asks for a token."""

    def service(self, details: Any) -> grpc.RpcMethodHandler:
        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            if dict(context.invocation_metadata()).get("authorization") != f"Bearer {TOKEN}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)
    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[Head()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


def test_a_cluster_that_asks_for_a_token(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"):
        check_address(head)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(UserError, match="asks for another token than that of RAY_AUTH_TOKEN"):
        check_address(head)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    check_address(head)


def test_a_cluster_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_session, "CONNECT_TIMEOUT_S", 1)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1 cannot be reached: no answer within 1 s"):
        check_address("127.0.0.1:1")


def test_the_address_of_ray_job_submit(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_images(tmp_path / "img", dict.fromkeys("abcd", 2), seed=0)
    monkeypatch.setenv("RAYDML_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert prepare.main(["folder", str(tmp_path / "img")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert "ray job submit --working-dir . -- python -m pipeline" in said and "RAY_ADDRESS=head:6379" in said
