"""The HTTP service: answers, limits, damaged and hostile requests; it stays up after each."""

from __future__ import annotations

import dataclasses
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from pipeline.inference.embedding_model import EmbeddingModel
from pipeline.searching.changes import add_to_index
from pipeline.searching.gate import LOCAL_HOSTS, Gate, Limits, announce, digest, proxy_middlewares
from pipeline.searching.index import SearchIndex
from tests.pipeline.conftest import Base
from tests.pipeline.searching.batches import batches, vectors
from tests.pipeline.searching.conftest import SMALL, InProcess, encoded, png

HOST = b"Host: 127.0.0.1\r\n"


@pytest.fixture(autouse=True)
def still_up(request: pytest.FixtureRequest) -> object:
    """Whatever a test sent, the next query is answered."""
    yield
    if "served" in request.fixturenames:
        served = request.getfixturevalue("served")
        assert served.ask("GET", "/health").json["status"] == "ok"
        assert served.ask("POST", "/search?k=1", png()).status == 200


def form(data: bytes, name: str = "file") -> tuple[bytes, dict[str, str]]:
    head = (
        f'--edge\r\nContent-Disposition: form-data; name="{name}"; filename="x.png"\r\nContent-Type: image/png\r\n\r\n'
    )
    return head.encode() + data + b"\r\n--edge--\r\n", {"Content-Type": "multipart/form-data; boundary=edge"}


def test_a_query_gets_what_the_index_finds(served: InProcess, base: Base) -> None:
    path = next((base.root / "images" / "test02").iterdir())
    answer = served.ask("POST", "/search?k=3", path.read_bytes())
    assert answer.status == 200 and answer.headers["content-type"] == "application/json"
    hits = served.service.index.search(str(path), 3)[0]
    expected = [{**dataclasses.asdict(hit), "shown_name": hit.class_name} for hit in hits]
    assert answer.json["neighbours"] == expected and len(expected) == 3
    assert expected[0]["path"] == str(path) and expected[0]["class_name"] == "test02"
    assert served.ask("POST", "/search?k=3", *form(path.read_bytes())).json["neighbours"] == expected
    thumbnail = served.ask("GET", f"/thumbnail/{expected[0]['id']}")
    assert thumbnail.headers["content-type"] == "image/jpeg" and thumbnail.body[:3] == b"\xff\xd8\xff"
    assert len(served.ask("POST", "/search", path.read_bytes()).json["neighbours"]) == 10


def test_every_answer_forbids_what_is_not_its_own(served: InProcess) -> None:
    for path in ("/", "/page.js", "/info", "/thumbnail/0", "/no-such"):
        headers = served.ask("GET", path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/search", b"", 400, "the query is empty"),
        ("/search?k=0", png(), 400, "k has to be a number from 1 to 100"),
        ("/search?k=101", png(), 400, "k has to be"),
        ("/search?k=%D9%A3", png(), 400, "k has to be"),
        ("/search?k=" + "9" * 5000, png(), 400, "k has to be"),
        ("/search", b"<script>alert(1)</script>", 415, "not an image of a known format"),
        ("/search", b"\x89PNG\r\n\x1a\n" + bytes(50), 415, "not an image"),
        ("/search", png()[:-300], 422, "the image is truncated"),
        ("/search", png()[:60] + b"XXXX" + png()[64:], 422, "the image is damaged"),
        ("/search", encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900], 422, "cannot be read"),
        ("/search", encoded(Image.new("1", (1001, 1000))), 413, "1,001 × 1,000 pixels, at most 1,000,000"),
        ("/search", encoded(Image.new("1", (40_000, 25_000))), 413, "more than 1,000,000 pixels"),  # a billion
        ("/search", bytes(200_001), 413, "the upload is larger than 200,000 bytes"),
    ],
)  # fmt: skip
def test_bad_queries_get_a_status_and_a_reason(
    served: InProcess, path: str, body: bytes, status: int, says: str
) -> None:
    answer = served.ask("POST", path, body)
    assert answer.status == status and says in answer.json["error"], answer


def test_bad_forms_and_paths_get_a_status(served: InProcess) -> None:
    assert served.ask("POST", "/search", *form(b"")).status == 400
    assert served.ask("POST", "/search", b"--edge\r\nnonsense", form(b"")[1]).status == 400
    assert served.ask("POST", "/search", png(), {"Content-Type": "multipart/form-data"}).status == 400
    two = form(png())[0].replace(b"--edge--", b"--edge") + form(png(), "other")[0][6:]
    assert served.ask("POST", "/search", two, form(b"")[1]).status == 400, "one file is taken, not two"
    for path in ("/thumbnail/999999", f"/thumbnail/{10**30}", "/thumbnail/-1", "/thumbnail/x", "/../../etc/passwd"):
        assert served.ask("GET", path).status == 404, path
    assert served.ask("DELETE", "/search").status == 405


def test_a_body_that_does_not_say_its_length_is_bounded_as_well(served: InProcess) -> None:
    chunk = b"4000\r\n" + bytes(0x4000) + b"\r\n"
    for start in (b"POST /search", b"GET /info"):
        line = served.raw(start + b" HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 40)
        assert b" 413 " in line, line


def test_a_body_that_is_announced_too_large_is_not_waited_for(served: InProcess) -> None:
    line = served.raw(b"POST /search HTTP/1.1\r\n" + HOST + b"Content-Length: 99999999999\r\n\r\n")
    assert b" 413 " in line, line


def test_a_slow_upload_ends_with_408(served: InProcess) -> None:
    started = time.monotonic()
    line = served.raw(b"POST /search HTTP/1.1\r\n" + HOST + b"Content-Length: 100\r\n\r\n", b"abc")
    assert b" 408 " in line and SMALL.upload_s <= time.monotonic() - started < 20


def test_too_many_requests_at_once_get_503_and_ask_to_come_again(served: InProcess) -> None:
    waiting = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(SMALL.uploads)]
    for connection in waiting:
        connection.sendall(b"POST /search HTTP/1.1\r\n" + HOST + b"Content-Length: 100\r\n\r\nabc")
    end = time.monotonic() + 20
    while (answer := served.ask("GET", "/info")).status != 503 and time.monotonic() < end:
        pass
    assert answer.status == 503 and answer.headers["retry-after"] == "1"
    for connection in waiting:
        connection.close()
    while served.ask("GET", "/info").status == 503:
        time.sleep(0.05)


def test_queries_at_the_same_time_get_their_own_answers(served: InProcess, base: Base) -> None:
    paths = sorted((base.root / "images").glob("test0*/*.png"))[:2]
    wrong = []

    def query(path: Path) -> None:
        for _ in range(5):
            found = served.ask("POST", "/search?k=1", path.read_bytes()).json["neighbours"][0]["path"]
            if found != str(path):
                wrong.append(found)

    threads = [threading.Thread(target=query, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_metrics_are_what_prometheus_reads(served: InProcess) -> None:
    served.ask("POST", "/search", b"")
    text = served.ask("GET", "/metrics").body.decode()
    samples = {
        (s.name, *sorted(s.labels.values())): s.value for f in text_string_to_metric_families(text) for s in f.samples
    }
    assert samples["raydml_requests_total", "/search", "400"] >= 1
    assert samples["raydml_index_images",] == len(served.service.index)
    assert not any("no-such" in str(key) for key in samples), "unknown paths are counted together"


def test_what_is_added_is_found_and_an_index_that_is_gone_is_told(
    tmp_path: Path, built: Path, model: EmbeddingModel
) -> None:
    shutil.copytree(built, tmp_path / "index")
    served = InProcess(SearchIndex(tmp_path / "index", model), SMALL)
    try:
        before = len(served.service.index)
        add_to_index(tmp_path / "index", batches(vectors(3, model.dim)))
        assert served.ask("POST", "/search?k=1", png()).status == 200
        assert served.ask("GET", "/info").json["images"] == before + 3
        (tmp_path / "index" / "index.json").unlink()
        for answer in (served.ask("POST", "/search", png()), served.ask("GET", "/health")):
            assert answer.status == 503 and "holds no index" in answer.json["error"]
    finally:
        served.end()


def test_a_token_is_asked_for_where_there_is_one(built: Path, model: EmbeddingModel) -> None:
    limits = dataclasses.replace(SMALL, token_sha256=digest("secret-of-16-bytes"))
    served = InProcess(SearchIndex(built, model), limits)
    try:
        for path in ("/info", "/metrics", "/thumbnail/0", "/search", "/no-such"):
            answer = served.ask("GET", path)
            assert answer.status == 401 and answer.headers["www-authenticate"].startswith("Bearer"), path
        for header in ("Bearer wrong", "Bearer", "secret-of-16-bytes", "Basic secret-of-16-bytes", "Bearer s\xe9cret"):
            assert served.ask("GET", "/info", headers={"Authorization": header}).status == 401, header
        assert served.ask("GET", "/info", headers={"Authorization": "Bearer secret-of-16-bytes"}).status == 200
        for path in ("/", "/page.css", "/results.css", "/page.js", "/health"):
            assert served.ask("GET", path).status == 200, path
    finally:
        served.end()


def test_other_names_of_this_machine_are_refused(built: Path, model: EmbeddingModel) -> None:
    """A page of another site, whose name its owner points to 127.0.0.1, could read the index otherwise."""
    served = InProcess(SearchIndex(built, model), dataclasses.replace(SMALL, hosts=LOCAL_HOSTS))
    try:
        for host, status in (
            ("127.0.0.1", 200), ("localhost:8000", 200), ("LOCALHOST", 200), ("[::1]:8000", 200), ("[::1]", 200),
            ("evil.example", 421), ("127.0.0.1.evil.example", 421), ("", 421),
        ):  # fmt: skip
            assert served.ask("GET", "/info", headers={"Host": host}).status == status, host
    finally:
        served.end()


def test_the_gate_reaches_the_proxy_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAYDML_SERVE_LIMITS", "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"):
        monkeypatch.setenv(name, "")
    limits = Limits(upload_bytes=7, token_sha256="ab", hosts=LOCAL_HOSTS)
    announce(limits)
    (middleware,) = proxy_middlewares()
    assert middleware.cls is Gate and middleware.kwargs == {"limits": limits}
