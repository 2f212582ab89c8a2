"""What a worker logs: each line begins with its rank and node, and our own warnings and errors are told to the user as well.

Lines are those of Python's logging, of `print` (which Ray Train passes to it), of warnings, and of tracebacks, also of threads.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sysconfig
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import methods
import pipeline

OWN = tuple(os.path.dirname(os.path.abspath(str(module.__file__))) + os.sep for module in (methods, pipeline))
OTHERS = tuple(sysconfig.get_paths()[name] + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib"))
LOGGERS = ("methods", "pipeline")

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def worker_log(label: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Labels what this process logs while the block runs.

    Args:
        label: Rank and node.
        tell: Tells the user a line: warnings and errors of this program and of the user's own modules, each text once.
    """
    root = logging.getLogger()
    added: list[logging.Handler] = [_Teller(label, tell)]
    if not root.handlers:
        added.append(logging.StreamHandler())
    for handler in added:
        root.addHandler(handler)
    handlers = [h for h in root.handlers if h is not added[0]]
    handlers += [
        h.plain_handler for h in handlers if hasattr(h, "plain_handler")
    ]  # of Ray's handler, which delegates to it
    plain = [
        h for h in handlers if "json" not in type(h.formatter).__name__.lower()
    ]  # those lines have the rank in fields
    before = [(handler, handler.formatter) for handler in plain]
    for handler in plain:
        handler.setFormatter(LabelFormatter(label, handler.formatter))
    show, hook = warnings.showwarning, threading.excepthook
    warnings.showwarning, threading.excepthook = _show_warning, _thread_failed
    try:
        yield
    finally:
        warnings.showwarning, threading.excepthook = show, hook
        for handler, formatter in before:
            handler.setFormatter(formatter)
        for handler in added:
            root.removeHandler(handler)


class LabelFormatter(logging.Formatter):
    """Another formatter's lines, each with a label before it."""

    def __init__(self, label: str, inner: logging.Formatter | None) -> None:
        super().__init__()
        self.label = label
        self.inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(f"{self.label} {line}" for line in self.inner.format(record).split("\n"))


class _Teller(logging.Handler):
    """Tells warnings and errors of our loggers, and warnings that our files raise."""

    def __init__(self, label: str, tell: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self.label = label
        self.tell = tell
        self.told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        own = record.name.split(".")[0] in LOGGERS or getattr(record, "own", False)
        if not own or record.exc_info:  # what ends a worker is told by the driver
            return
        text = " ".join(record.getMessage().split())
        if text not in self.told:
            self.told.add(text)
            self.tell(f"{self.label} {text}")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    own = filename.startswith(OWN) or (os.path.isabs(filename) and not filename.startswith(OTHERS))
    short = f"{category.__name__}: {message} ({os.path.basename(filename)}:{lineno})"
    logging.getLogger("py.warnings").warning("%s", short, extra={"own": own})


def _thread_failed(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_value is not None and not issubclass(arguments.exc_type, SystemExit):
        name = arguments.thread.name if arguments.thread is not None else "?"
        log_failure(f"thread {name} failed", arguments.exc_value)


def log_failure(what: str, error: BaseException) -> None:
    """Logs an error with its traceback."""
    trace: types.TracebackType | None = error.__traceback__
    logger.error("%s: %s: %s", what, type(error).__name__, error, exc_info=(type(error), error, trace))
