"""`python -m pipeline.serve INDEX`: an HTTP service that finds the neighbours of an image, and a page to drop one on.

    python -m pipeline.serve INDEX                                    http://127.0.0.1:8000, for this machine alone
    curl --data-binary @photo.jpg 'http://127.0.0.1:8000/search?k=5'
    RAYDML_SERVE_TOKEN=... python -m pipeline.serve INDEX --host 0.0.0.0
                                                                      for others: clients send Authorization: Bearer TOKEN

Runs with Ray Serve, on a Ray of its own on this machine, until Ctrl-C or SIGTERM. Images that `search add` appends are found at
once. The traffic is not encrypted: put a reverse proxy with TLS before it.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from typing import Any

from pipeline.errors import RunError, UserError, fail, joined_lines

PROG = "python -m pipeline.serve"
LEAST_TOKEN = 16  # characters
APPLICATION = "search"
GRACE_S = 10.0  # for requests under way when the service ends


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("index", metavar="INDEX", help="a folder that `search build` has written")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)"
    )
    parser.add_argument("--port", type=int, default=8000, help="(default: 8000)")
    parser.add_argument("--model", help="the model (default: where the index says that it is)")
    parser.add_argument("--replicas", type=int, default=1, help="processes that answer (default: 1)")
    parser.add_argument("--threads", type=int, help="of each of them (default: cores / replicas)")
    parser.add_argument("--max-upload-mb", type=float, default=20.0, help="largest upload (default: 20)")
    parser.add_argument(
        "--max-megapixels", type=float, default=50.0, help="largest image, width × height (default: 50)"
    )
    parser.add_argument("--upload-seconds", type=float, default=20.0, help="how long an upload may take (default: 20)")
    return parser


def main(arguments: list[str] | None = None, prog: str = PROG) -> int:
    """Exit status: 0 ended by Ctrl-C or SIGTERM, 1 the service failed, 2 bad input."""
    options = build_parser(prog).parse_args(arguments)
    try:
        _check(options)
        _serve(options)
    except UserError as error:
        return fail(error, 2)
    except RunError as error:
        return fail(error, 1)
    return 0


def _check(options: argparse.Namespace) -> None:
    """All that can be told before Ray is started.

    Raises:
        UserError: A bad option, index or token; the address cannot be listened on.
    """
    for name in ("replicas", "threads", "max_upload_mb", "max_megapixels", "upload_seconds"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected more than 0")
    if not 0 < options.port < 65536:
        raise UserError(f"--port is {options.port}, expected 1 to 65535")
    from pipeline.searching.gate import TOKEN
    from pipeline.searching.index_files import check_files, index_folder, read_manifest

    token = os.environ.get(TOKEN, "")
    if token and (len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable() or " " in token):
        raise UserError(f"{TOKEN} has to be {LEAST_TOKEN} or more characters of ASCII without blanks")
    if not token and not _is_loopback(options.host):
        raise UserError(
            f"--host {options.host} lets other machines in: set {TOKEN} to a secret that they have to send, or listen on 127.0.0.1"
        )
    if os.environ.get("RAY_ADDRESS"):
        raise UserError("the service starts a Ray of its own on this machine, where its index is: unset RAY_ADDRESS")
    folder = index_folder(options.index)
    check_files(folder, read_manifest(folder))
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((options.host, options.port))
    except OSError as error:
        raise UserError(f"{options.host}:{options.port} cannot be listened on: {error.strerror}") from error


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or (host.startswith("127.") and host.count(".") == 3)


def _serve(options: argparse.Namespace) -> None:
    """Runs the service until a signal."""
    ended = threading.Event()
    _end_by_signal(ended)
    from pipeline.searching.gate import LOCAL_HOSTS, TOKEN, Limits, announce, digest

    token = digest(os.environ.pop(TOKEN, ""))  # popped: no process of Ray's inherits it
    limits = Limits(
        upload_bytes=round(options.max_upload_mb * 1e6),
        upload_s=options.upload_seconds,
        token_sha256=token,
        hosts=LOCAL_HOSTS if _is_loopback(options.host) and not token else (),
    )
    announce(limits)
    print(f"starting the service of {options.index} ...", file=sys.stderr, flush=True)
    from pipeline.distributed.ray_session import ray_session
    from pipeline.storage import Folder

    cores = os.cpu_count() or 1
    threads = options.threads or max(1, cores // options.replicas)
    folder = Folder(options.index)
    with ray_session(options.replicas + 1):
        _end_by_signal(ended)  # Ray has put its own handler of SIGTERM in place
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        try:
            _deploy(serve, options, folder.uri, limits, threads)
            shown = f"[{options.host}]" if ":" in options.host else options.host
            print(
                f"http://{shown}:{options.port} is ready{' (with a token)' if token else ''}; Ctrl-C ends it",
                flush=True,
            )
            ended.wait()
            print("ending ...", file=sys.stderr, flush=True)
        finally:
            serve.delete(APPLICATION)  # lets requests under way end; Ray ends what else there is


def _end_by_signal(ended: threading.Event) -> None:
    """Ctrl-C and SIGTERM set the event, and do nothing else."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())


def _deploy(serve: Any, options: argparse.Namespace, index: str, limits: Any, threads: int) -> None:
    """Starts Ray Serve and waits until it answers.

    Raises:
        RunError: A replica cannot start; its error is told.
    """
    from pipeline.searching.replica import Replica

    quiet = {"log_level": "ERROR", "enable_access_log": False}
    serve.start(
        proxy_location="HeadOnly", http_options={"host": options.host, "port": options.port}, logging_config=quiet
    )
    deployment = serve.deployment(
        Replica,
        name="search",
        num_replicas=options.replicas,
        max_ongoing_requests=32,
        max_queued_requests=2 * limits.uploads,
        graceful_shutdown_timeout_s=GRACE_S,
        ray_actor_options={"num_cpus": 1},
        logging_config=quiet,
    )
    try:
        pixels = round(options.max_megapixels * 1e6)
        serve.run(deployment.bind(index, options.model, limits, pixels, threads), name=APPLICATION)
    except RuntimeError as error:
        found = serve.status().applications.get(APPLICATION)
        message = found.message if found is not None else joined_lines(error)
        raise RunError(f"the service cannot start: {message}") from error


if __name__ == "__main__":
    sys.exit(main())
