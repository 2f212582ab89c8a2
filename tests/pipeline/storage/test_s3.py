"""Object storage with faults: what passes is waited out, what does not is one line, and a part is never taken for a whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pipeline.errors import RunError, UserError
from pipeline.storage import Folder, read_file, s3
from tests.s3 import Proxy

pytestmark = pytest.mark.usefixtures("fresh_readers")


DATA = bytes(range(256)) * 40

CALLS: dict[str, tuple[str, str, Callable[[Folder], Any], Any]] = {
    "read": ("GET", "/x$", lambda folder: folder.read("x"), DATA),
    "read_file": ("GET", "/x$", lambda folder: read_file(f"{folder}/x"), DATA),
    "read_range": ("GET", "/x$", lambda folder: folder.read_range("x", 100, 9000), DATA[100:9000]),
    "write": ("PUT", "/y$", lambda folder: (folder.write("y", DATA[::-1]), folder.read("y"))[1], DATA[::-1]),
    "exists": ("HEAD", "/x$", lambda folder: folder.exists("x"), True),
    "exists, a bucket": ("HEAD", "/faults$", lambda _: Folder("s3://faults").exists(), True),
    "names": ("GET", "prefix=", lambda folder: folder.names(), ["x"]),
    "find": ("GET", "prefix=", lambda folder: folder.find(), ["x"]),
    "sizes": ("GET", "prefix=", lambda folder: folder.sizes(""), {"x": len(DATA)}),
    "remove": ("POST", "delete", lambda folder: (folder.remove("x"), folder.exists("x"))[1], False),
}

FAULTS: dict[str, dict[str, Any]] = {
    "503": {"kind": "answer"},
    "lost answer": {"kind": "lost"},
    "reset": {"kind": "reset"},
    "500": {"kind": "answer", "status": 500, "code": "InternalError"},
    "429": {"kind": "answer", "status": 429, "code": "TooManyRequests"},
    "400": {"kind": "answer", "status": 400, "code": "RequestTimeout"},
    "not XML": {"kind": "answer", "status": 502, "text": "<html>Bad Gateway"},
    "cut": {"kind": "cut"},
    "short": {"kind": "short"},
    "damaged": {"kind": "damaged"},
    "upload cut": {"kind": "upload cut"},
}
ANY = ("503", "lost answer")
TRIED = {call: ANY for call in CALLS} | {
    "read": (*ANY, "reset", "500", "429", "400", "not XML", "cut", "damaged"),
    "read_range": (*ANY, "cut", "short"),
    "write": (*ANY, "reset", "upload cut"),
}


@pytest.mark.parametrize(("call", "fault"), [(call, fault) for call, faults in TRIED.items() for fault in faults])
def test_a_fault_that_passes_is_waited_out(call: str, fault: str, place: Folder, proxy: Proxy) -> None:
    place.write("x", DATA)
    method, key, do, expected = CALLS[call]
    injected = proxy.inject(method=method, key=key, count=2, **FAULTS[fault])
    assert do(place) == expected
    assert injected.seen >= 3


def test_a_silent_server_is_asked_again(place: Folder, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers too late, or does not read what is sent."""
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 1.0)
    monkeypatch.setattr(s3, "MIN_BYTES_PER_S", 1 << 30)
    monkeypatch.setenv(s3.RETRY_TIMEOUT, "31")  # a client of its own
    place = Folder(place.uri)
    data = np.random.default_rng(0).bytes(16 << 20)  # more than fits into the buffers of a connection
    late = proxy.inject("delay", "PUT", "/x$", delay_s=1.5)
    stuck = proxy.inject("stall", "PUT", "/y$")
    place.write("x", b"1")
    place.write("y", data)
    assert late.seen >= 2 and stuck.seen >= 2 and place.read("x") == b"1" and place.read("y") == data


@pytest.mark.parametrize(("delay_s", "waited_for"), [(0.3, True), (1.5, False)])
def test_a_late_answer_to_a_read(
    delay_s: float, waited_for: bool, place: Folder, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for, and asked for again after `READ_TIMEOUT_S`."""
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 1.0)
    monkeypatch.setenv(s3.RETRY_TIMEOUT, "33")  # a client of its own
    place = Folder(place.uri)
    place.write("x", DATA)
    late = proxy.inject("delay", "GET", "/x$", delay_s=delay_s)
    assert place.read("x") == DATA
    assert (late.seen == 1) == waited_for


@pytest.mark.parametrize("call", ["read", "read_range"])
def test_a_body_that_trickles_is_read_again(
    call: str, place: Folder, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is never silent for long."""
    place.write("x", DATA)
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 0.3)
    monkeypatch.setattr(s3, "MIN_BYTES_PER_S", 1 << 30)
    method, key, do, expected = CALLS[call]
    slow = proxy.inject("trickle", method, key, delay_s=0.1)
    assert do(place) == expected
    assert slow.seen >= 2


def test_a_body_may_take_time_in_proportion_to_its_size(
    place: Folder, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.write("x", DATA)
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 0.5)
    monkeypatch.setattr(s3, "MIN_BYTES_PER_S", len(DATA) / 10)
    slow = proxy.inject("trickle", "GET", "/x$", delay_s=0.015)
    assert place.read("x") == DATA
    assert slow.seen == 1


def test_a_body_that_always_trickles_is_one_line(place: Folder, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(s3.RETRY_TIMEOUT, "0.5")
    place = Folder(place.uri)
    place.write("x", DATA)
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 0.3)
    monkeypatch.setattr(s3, "MIN_BYTES_PER_S", 1 << 30)
    slow = proxy.inject("trickle", "GET", "/x$", count=1000, delay_s=0.1)
    with pytest.raises(
        RunError, match=f"^{place}/x: get_object failed, 2 tries .* with TimeoutError: check the"
    ) as caught:
        place.read("x")
    assert slow.seen == 2 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("503", "at last with 503 SlowDown injected: check the storage service"),
        ("cut", "at last with ClientPayloadError: "),
        ("damaged", "at last with FlexibleChecksumError: "),
    ],
)
def test_a_fault_that_lasts_is_one_line(
    fault: str, says: str, place: Folder, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    """And a warning before, for those who wait."""
    place.write("x", DATA)
    monkeypatch.setattr(s3, "WARN_AFTER_S", -1.0)
    monkeypatch.setenv(s3.RETRY_TIMEOUT, "0.4")
    injected = proxy.inject(method="GET", key="/x$", count=1000, **FAULTS[fault])
    with pytest.raises(
        RunError, match=f"^{place}/x: get_object failed, .*{says}.*{s3.RETRY_TIMEOUT}.* 0.4 s"
    ) as caught:
        Folder(place.uri).read("x")
    found = re.search(r"failed, (\d+) tries in \d s", str(caught.value))
    assert found is not None and int(found[1]) == injected.seen >= 2
    assert caplog.text.count(f"{place}/x: get_object failed, ") == injected.seen - 1 and "trying again" in caplog.text
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", CALLS)
def test_nothing_takes_a_lasting_fault_for_an_answer(
    call: str, place: Folder, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above all not for "there is no such file"."""
    place.write("x", DATA)
    monkeypatch.setenv(s3.RETRY_TIMEOUT, "0")
    method, key, do, _ = CALLS[call]
    proxy.inject("answer", method, key, count=1000)
    with pytest.raises(RunError, match="failed, 1 tries"):
        do(Folder(place.uri))


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (400, "ExpiredToken", "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN"),
        (403, "ExpiredToken", "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN"),
        (403, "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
        (403, "AccessDenied", "what this key may do in the bucket"),
        (404, "NoSuchBucket", "check the name of the bucket, AWS_ENDPOINT_URL"),
        (400, "AuthorizationHeaderMalformed", "check AWS_DEFAULT_REGION"),
    ],
)
@pytest.mark.parametrize("call", ["read_range", "write", "names"])
def test_what_does_not_pass_is_said_at_once(
    call: str, status: int, code: str, says: str, place: Folder, proxy: Proxy
) -> None:
    place.write("x", DATA)
    method, key, do, _ = CALLS[call]
    injected = proxy.inject("answer", method, key, count=1000, status=status, code=code)
    with pytest.raises(UserError, match=f"^{place}.*{status} {code} injected.*{says}") as caught:
        do(place)
    assert injected.seen == 1 and "\n" not in str(caught.value)


@pytest.mark.parametrize("status", [400, 403])
def test_a_refusal_without_a_reason(status: int, place: Folder, proxy: Proxy) -> None:
    """The answer to HEAD has no body; 400 is what S3 gives for an expired token (botocore then asks for the region)."""
    injected = proxy.inject("answer", "HEAD", count=1000, status=status)
    with pytest.raises(UserError, match=f"^{place}/x: head_object failed .{status} .*AWS_SESSION_TOKEN"):
        place.exists("x")
    assert injected.seen <= 2


def test_what_could_not_be_removed_is_tried_again(place: Folder, proxy: Proxy) -> None:
    """S3 says so in an answer of status 200, which s3fs does not read."""
    place.write("x", DATA)
    errors = "<DeleteResult><Error><Key>x</Key><Code>{}</Code><Message>injected</Message></Error></DeleteResult>"
    proxy.inject("answer", "POST", "delete", status=200, text=errors.format("InternalError"))
    place.remove("x")
    assert not place.exists("x")
    place.write("x", DATA)
    proxy.inject("answer", "POST", "delete", count=1000, status=200, text=errors.format("AccessDenied"))
    with pytest.raises(UserError, match=f"^{place}/x: delete_objects failed .*AccessDenied"):
        place.remove("x")


def test_large_objects_travel_in_parts(place: Folder, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)  # the least that S3 allows
    data = np.random.default_rng(0).bytes((11 << 20) + 7)
    faults = [
        proxy.inject("answer", "PUT", "partNumber=2"),
        proxy.inject("lost", "POST", "/x.uploadId="),  # carried out, and what some servers say to the second:
        proxy.inject("answer", "POST", "/x.uploadId=", first=1, status=404, code="NoSuchUpload"),
        proxy.inject("cut", "GET", "/x$", first=1),
        proxy.inject("reset", "GET", "/x$", first=3),
    ]
    place.write("x", data)
    assert proxy.count("PUT", "partNumber=") >= 7
    assert place.read("x") == data
    assert proxy.count("GET", "/x$") >= 5 and all(fault.hit.is_set() for fault in faults)


def test_errors_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch, one_proxy: Proxy) -> None:
    with pytest.raises(ValueError, match="got start=1 and end=None, expected both or none"):
        Folder("s3://faults").fs.cat_file("faults/x", start=1)
    monkeypatch.setenv(s3.RETRY_TIMEOUT, "soon")
    with pytest.raises(UserError, match=f"{s3.RETRY_TIMEOUT} is 'soon', expected seconds"):
        Folder("s3://faults").exists("x")
    monkeypatch.setenv(s3.RETRY_TIMEOUT_ALIAS, "7")
    with pytest.raises(UserError, match=f"{s3.RETRY_TIMEOUT} is 'soon'"):
        s3.retry_timeout()
    monkeypatch.delenv(s3.RETRY_TIMEOUT)
    assert s3.retry_timeout() == 7, "the name of earlier versions"
    monkeypatch.setenv(s3.RETRY_TIMEOUT_ALIAS, "late")
    with pytest.raises(UserError, match=f"{s3.RETRY_TIMEOUT_ALIAS} is 'late'"):
        s3.retry_timeout()
    monkeypatch.delenv(s3.RETRY_TIMEOUT_ALIAS)
    assert s3.retry_timeout() == 60
    monkeypatch.setenv(s3.RETRY_TIMEOUT, "32")  # a client of its own
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost")
    with pytest.raises(UserError, match=r"^s3://faults/x: .*Invalid endpoint: localhost.*: check .*AWS_ENDPOINT_URL"):
        Folder("s3://faults").exists("x")
