"""Each line of a worker begins with its rank and node: logging, warnings, tracebacks, also of threads."""

from __future__ import annotations

import io
import logging
import threading
import warnings
from collections.abc import Iterator

import pytest

from pipeline.distributed.worker_log import log_failure, worker_log

LABEL = "[rank 1 @ 10.0.0.7]"


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What the handlers of this process write, as those of a worker do."""
    root, out = logging.getLogger(), io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    level, before = root.level, root.handlers[:]
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    yield out
    root.handlers[:] = before
    root.setLevel(level)


def test_every_line_begins_with_rank_and_node(written: io.StringIO) -> None:
    told: list[str] = []
    with worker_log(LABEL, told.append):
        logging.getLogger("pipeline.storage.s3").warning("%s failed,\n  trying again", "s3://x")
        logging.getLogger("someone.else").warning("of no interest")
        logging.getLogger("mine").info("loss %d", 3)
        for _ in range(2):
            warnings.warn("kappa is at its end", stacklevel=1)
        warnings.warn_explicit("deprecated", RuntimeWarning, logging.__file__, 7)
        try:
            raise ValueError("a bad image")
        except ValueError as error:
            log_failure("this worker failed", error)
        thread = threading.Thread(target=lambda: 1 / 0, name="loader")
        thread.start()
        thread.join()
    lines = written.getvalue().splitlines()
    assert lines and all(line.startswith(f"{LABEL} ") for line in lines)
    text = "\n".join(line.removeprefix(f"{LABEL} ") for line in lines)
    assert (
        "WARNING s3://x failed,\n  trying again" in text
        and "INFO loss 3" in text
        and "RuntimeWarning: deprecated" in text
    )
    assert "ERROR this worker failed: ValueError: a bad image\nTraceback (most recent call last):" in text
    assert "ERROR thread loader failed: ZeroDivisionError" in text
    assert told == [
        f"{LABEL} s3://x failed, trying again",
        f"{LABEL} UserWarning: kappa is at its end (test_worker_log.py:{line_of('kappa is at its end')})",
    ]
    logging.getLogger("mine").info("afterwards")
    assert written.getvalue().splitlines()[-1] == "INFO afterwards"


def line_of(text: str) -> int:
    with open(__file__) as file:
        return next(number for number, line in enumerate(file, 1) if f'warn("{text}"' in line)


def test_a_process_without_handlers_gets_one(capsys: pytest.CaptureFixture) -> None:
    root = logging.getLogger()
    before, root.handlers[:] = root.handlers[:], []
    try:
        with worker_log(LABEL, lambda _: None):
            logging.getLogger("pipeline").warning("slow")
        assert root.handlers == []
    finally:
        root.handlers[:] = before
    assert capsys.readouterr().err == f"{LABEL} slow\n"
