"""Checks of the Dockerfile, of compose files and of Slurm scripts."""

from __future__ import annotations

import json
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema

from tools.cluster_checks import text

PROGRAMS = Path(sysconfig.get_path("scripts"))


def lint(*command: str, given: str) -> Iterator[str]:
    """Lines that a linter of this environment prints about a text."""
    done = subprocess.run(
        [PROGRAMS / command[0], *command[1:]], input=given, capture_output=True, text=True, check=False
    )
    yield from (f"{command[0]}: {line}" for line in (done.stdout + done.stderr).splitlines() if line.strip())


# ---- Dockerfile --------------------------------------------------------------------------------------------------


def dockerfile(given: str, context: Path = text.ROOT) -> Iterator[str]:
    """Problems of a Dockerfile.

    Args:
        given: Its text.
        context: Folder that it is built in.
    """
    yield from lint("hadolint", "--no-color", "-", given=given)
    final = re.split(r"(?m)^FROM ", given)[-1]
    users = re.findall(r"(?m)^USER (\S+)", final)
    if not users or not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]):
        yield f"USER {users[-1] if users else 'root'}: expected an ordinary user by number, such as 1000:1000"
    if not re.search(r"\bRAY_AUTH_MODE=token\b", final):
        yield "ENV RAY_AUTH_MODE=token is missing: Ray would start without authentication where there is no token"
    for program in ("rsync", "wget", "openssh-client"):
        if not re.search(rf"apt-get install[^&]*\b{program}\b", final):
            yield f"{program} is not installed: `ray up` or KubeRay need it"
    stages = re.findall(r"(?m)^FROM \S+ AS (\S+)", given)
    for variant in text.VARIANTS:
        if f"torch-{variant}" not in stages:
            yield f"no stage torch-{variant}: VARIANT={variant} could not be built"
    for version in re.findall(r"(?m)^ARG RAY_VERSION=(\S+)", given):
        yield from text.ray_version(version)
    ignored = [line for line in (context / ".dockerignore").read_text().splitlines() if line]
    for sources in re.findall(r"(?m)^COPY (?!--from)(.+) \S+$", given):
        for source in sources.split():
            if not (context / source).exists() or (
                f"!{source}" not in ignored and any(fnmatch(source, p) for p in ignored)
            ):
                yield f"COPY {source}: not in the build context (missing, or left out by .dockerignore)"


# ---- compose -----------------------------------------------------------------------------------------------------


def compose(config: dict[str, Any]) -> Iterator[str]:
    """Problems of a parsed compose file."""
    schemas = resources.files("check_jsonschema.builtin_schemas.vendor")
    schema = json.loads((schemas / "compose-spec.json").read_text(encoding="utf-8"))
    for error in jsonschema.validators.validator_for(schema)(schema).iter_errors(config):
        yield f"{'.'.join(map(str, error.absolute_path)) or 'the file'}: {_deepest(error)[:200]}"
    for name, service in (config.get("services") or {}).items():
        for port in service.get("ports") or []:
            if not re.match(r"(127\.0\.0\.1|localhost):", str(port)):
                yield f"{name}: port {port} is open to other machines: expected 127.0.0.1:{str(port).split(':')[-1]}"
        if service.get("network_mode") == "host" or service.get("privileged"):
            yield f"{name}: network_mode host and privileged are not expected"
        image, tag = str(service.get("image", "")), str(service.get("image", "")).rpartition(":")[2]
        if not re.match(r"v?\d", tag) or "/" in tag:
            yield f"{name}: image {image}: expected a tag with a version"
        command = service.get("command") or ""
        words = command if isinstance(command, list) else command.split()
        if words[:2] == ["ray", "start"]:
            yield from _ray_service(name, service, words)


def _deepest(error: jsonschema.ValidationError) -> str:
    """The message of the alternative that fits best, where a schema gives several."""
    return error.message if not error.context else _deepest(max(error.context, key=lambda e: len(e.absolute_path)))


def _ray_service(name: str, service: dict[str, Any], words: list[str]) -> Iterator[str]:
    yield from text.image(service.get("image"))
    environment = service.get("environment") or {}
    if environment.get("RAY_AUTH_MODE") != "token":
        yield f"{name}: RAY_AUTH_MODE is not token: whoever reaches the head runs code on the cluster"
    if not str(environment.get("RAY_AUTH_TOKEN_PATH", "")).startswith("/run/secrets/") or not service.get("secrets"):
        yield f"{name}: RAY_AUTH_TOKEN_PATH: expected a file below /run/secrets, and `secrets` that brings it"
    if "--head" in words:
        yield from text.stop_wait(environment.get("RAY_JOB_STOP_WAIT_TIME_S"))
    if re.match(r"(root|0)\b", str(service.get("user", ""))):
        yield f"{name}: user {service['user']}: expected an ordinary user"


# ---- Slurm -------------------------------------------------------------------------------------------------------


def slurm(given: str) -> Iterator[str]:
    """Problems of a script for sbatch that runs `ray symmetric-run`."""
    done = subprocess.run(["bash", "-n"], input=given, capture_output=True, text=True, check=False)
    yield from done.stderr.splitlines()
    if done.returncode == 0:
        yield from lint("shellcheck", "--format=gcc", "-", given=given)
    code = text.without_comments(given)
    expected = {
        r"(?m)^#SBATCH --exclusive$": "#SBATCH --exclusive is missing: `ray symmetric-run` ends every Ray process of the user on its nodes",
        r"\bRAY_AUTH_MODE=token\b": "RAY_AUTH_MODE=token is missing: whoever reaches the head runs code on the cluster",
        r"\bRAY_AUTH_TOKEN_PATH=": "RAY_AUTH_TOKEN_PATH is missing: all nodes need the same token",
        r"\bRAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=[1-9]\d{2}": "RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT: expected 100 or more seconds; Ray waits 30 s for the nodes otherwise",
        r'! -s "\$RAYDML_RESULT"': "the status of the run is not checked: `ray symmetric-run` ends with 0 where Ray did not start",
        r"\bumask 077\b": "umask 077 is missing: others could read the token",
    }
    for pattern, problem in expected.items():
        if not re.search(pattern, code):
            yield problem
    for host in re.findall(r"--dashboard-host[= ](\S+)", code):
        yield from text.dashboard(host)
