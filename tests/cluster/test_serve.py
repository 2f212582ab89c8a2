"""`python -m pipeline.serve` with Ray Serve: one start, from the command line to SIGTERM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline import search, serve, train
from tests.cluster.nodes import free_port, wait_for
from tests.pipeline.conftest import Base
from tests.pipeline.searching.conftest import Served, png

pytestmark = pytest.mark.cluster
TOKEN = "marked-secret-of-the-service"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Base(tmp_path_factory.mktemp("serve"))
    assert train.main([made.recipe()]) == 0
    assert search.main(["build", made.run.uri, "--to", str(made.root / "index"), "--threads", "1"]) == 0
    return made.root / "index"


class Service(Served):
    def __init__(self, index: Path) -> None:
        super().__init__(free_port())
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment |= {"RAYDML_SERVE_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
        limits = ["--max-upload-mb", "0.2", "--upload-seconds", "2", "--max-megapixels", "1"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.serve", str(index), "--port", str(self.port), *limits],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.output = ""
        for line in self.process.stdout:
            self.output += line
            if "is ready" in line:
                return
        pytest.fail(self.output)

    def search(self, body: bytes, token: str = TOKEN) -> int:
        return self.ask("POST", "/search?k=3", body, {"Authorization": f"Bearer {token}"}).status


@pytest.fixture(scope="module")
def service(index: Path) -> Iterator[Service]:
    started = Service(index)
    yield started
    if started.process.poll() is None:
        started.process.terminate()
        started.process.wait(60)


def test_the_service_answers_batches_keeps_its_limits_and_ends(service: Service) -> None:
    assert f"http://127.0.0.1:{service.port} is ready (with a token)" in service.output
    assert service.search(png()) == 200
    threads = [threading.Thread(target=service.search, args=(png(i),)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    metrics = service.ask("GET", "/metrics", headers={"Authorization": f"Bearer {TOKEN}"}).body.decode()
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert values['raydml_requests_total{path="/search",status="200"}'] == "13.0"
    assert float(values["raydml_batch_images_count"]) < 13, "images that arrive together are embedded together"

    assert service.search(png(), "wrong") == 401
    assert [service.search(body) for body in (b"", b"text", png()[:-300], bytes(200_001))] == [400, 415, 422, 413]
    head = f"POST /search HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n".encode()
    chunk = b"4000\r\n" + bytes(0x4000) + b"\r\n"
    assert b" 413 " in service.raw(head + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 40)
    assert b" 408 " in service.raw(head + b"Content-Length: 100\r\n\r\nabc")
    assert service.search(png()) == 200

    for process in [psutil.Process(service.process.pid), *psutil.Process(service.process.pid).children(recursive=True)]:
        assert TOKEN not in " ".join(process.cmdline())
        if process.pid != service.process.pid:
            assert TOKEN not in str(process.environ()), "the token is inherited by no process"

    replica = [
        p for p in psutil.Process(service.process.pid).children(recursive=True) if "ServeReplica" in str(p.cmdline())
    ]
    replica[0].kill()
    wait_for(lambda: service.search(png()) == 200, 60, "a replica in place of the one that was killed")

    service.process.send_signal(signal.SIGTERM)
    out, _ = service.process.communicate(timeout=60)
    assert service.process.returncode == 0 and "ending ..." in out and "Traceback" not in service.output + out, out


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["--host", "0.0.0.0"], {}, "--host 0.0.0.0 lets other machines in: set RAYDML_SERVE_TOKEN"),
        ([], {"RAYDML_SERVE_TOKEN": "short"}, "RAYDML_SERVE_TOKEN has to be 16 or more characters"),
        (["--port", "0"], {}, "--port is 0, expected 1 to 65535"),
        (["--max-upload-mb", "0"], {}, "--max-upload-mb is 0.0, expected more than 0"),
        ([], {"RAY_ADDRESS": "10.0.0.5:6379"}, "unset RAY_ADDRESS"),
        (["--host", "203.0.113.7"], {"RAYDML_SERVE_TOKEN": TOKEN}, "203.0.113.7:8000 cannot be listened on"),
    ],
)
def test_bad_options_are_told_before_ray_starts(
    arguments: list[str], environment: dict[str, str], says: str, index: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    for name in ("RAY_ADDRESS", "RAYDML_SERVE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert serve.main([str(index), *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err
    assert TOKEN not in err and "short" not in err.replace("has to be", "")


def test_a_folder_without_an_index_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert serve.main([str(tmp_path)]) == 2
    assert "holds no index" in capsys.readouterr().err
