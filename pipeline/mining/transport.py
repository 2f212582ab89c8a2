"""Transports of calls to a mining server: in this process, or in a Ray actor (`actor.py`)."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, Protocol, runtime_checkable

from pipeline.mining.server import MiningServer


class ServerGone(Exception):
    """The server's process has ended, or cannot be reached."""


@runtime_checkable
class Transport(Protocol):
    """A connection to one server."""

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Starts a call; the future raises ServerGone if the server cannot be reached, or the error that the method raised."""
        ...

    def restart(self) -> None:
        """Ends the server's process, which does not answer, and has another one started, empty."""
        ...


class LocalTransport:
    """A server in this process; the future is done when `call` returns."""

    def __init__(self, server: MiningServer) -> None:
        self.server = server

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(getattr(self.server, method)(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def restart(self) -> None:
        raise RuntimeError("a server in this process answers at once")
