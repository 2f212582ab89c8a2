"""Checks of files for `ray up`: Ray's schema and its own validation, and the cloud's description of its machines.

Ray's schema lets pass any key of a provider and of a machine, and a misspelt one makes a spot node an ordinary one. The
clouds' own descriptions are those of botocore (EC2's RunInstances) and of google-api-python-client (Compute Engine's Instance).
"""

from __future__ import annotations

import copy
import functools
import importlib.resources
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema

from pipeline.errors import did_you_mean
from tools.cluster_checks import text

# Keys that Ray 2.60 reads (ray/autoscaler/_private/aws and gcp); its schema knows only some of them.
PROVIDER_KEYS = {
    "aws": {"type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips", "security_group", "aws_credentials",
            "cloudwatch", "key_pair", "disable_node_updaters"},
    "gcp": {"type", "region", "availability_zone", "project_id", "gcp_credentials", "use_internal_ips", "cache_stopped_nodes",
            "disable_node_updaters"},
}  # fmt: skip
OF_RAY = {"SubnetIds"}  # in a machine of AWS: read by Ray, not by EC2


def problems(config: dict[str, Any]) -> Iterator[str]:
    """Problems of a parsed file."""
    yield from _schema(config)
    provider = config.get("provider") or {}
    kind = provider.get("type")
    if kind not in PROVIDER_KEYS:
        yield f"provider.type {kind!r}: expected one of {', '.join(PROVIDER_KEYS)}"
        return
    for key in provider:
        if key not in PROVIDER_KEYS[kind]:
            yield f"provider.{key}: unknown to Ray; {did_you_mean(key, PROVIDER_KEYS[kind])}"
    for name, node in (config.get("available_node_types") or {}).items():
        machine = node.get("node_config") or {}
        where = f"{name}.node_config"
        yield from (aws_machine if kind == "aws" else gcp_machine)(machine, where)
        spot = _is_spot(machine)
        if spot != ((node.get("labels") or {}).get("ray.io/market-type") == "spot"):
            yield f"{name}: the label ray.io/market-type has to say whether it is a spot node, which it is {'' if spot else 'not '}here"
        image = (node.get("docker") or {}).get("worker_image") or (config.get("docker") or {}).get("image")
        for problem in text.image(image, gpu=bool((node.get("resources") or {}).get("GPU"))) if image else ():
            yield f"{name}: {problem}"
    if _is_spot(
        (config.get("available_node_types") or {}).get(config.get("head_node_type"), {}).get("node_config") or {}
    ):
        yield "the head is a spot node: expected one on demand, since a cluster ends with its head"
    yield from _docker_and_commands(config, kind)


def _is_spot(machine: Mapping[str, Any]) -> bool:
    """Whether a machine may be taken away by the cloud at any moment."""
    market, scheduling = machine.get("InstanceMarketOptions") or {}, machine.get("scheduling") or {}
    return market.get("MarketType") == "spot" or scheduling.get("provisioningModel") == "SPOT"


def _schema(config: dict[str, Any]) -> Iterator[str]:
    import ray
    from ray.autoscaler._private.util import prepare_config, validate_config

    with open(os.path.join(os.path.dirname(ray.__file__), "autoscaler", "ray-schema.json"), encoding="utf-8") as file:
        schema = json.load(file)
    found = list(jsonschema.Draft7Validator(schema).iter_errors(config))
    for error in found:
        yield f"{'.'.join(map(str, error.absolute_path)) or 'the file'}: {error.message[:200]}"
    if not found:
        try:
            validate_config(prepare_config(copy.deepcopy(config)))
        except Exception as error:  # whatever Ray raises, the file is not accepted
            yield f"Ray refuses the file: {str(error)[:200] or type(error).__name__}"


def _docker_and_commands(config: dict[str, Any], kind: str) -> Iterator[str]:
    """Problems of what runs on the nodes: token, images, dashboard, spot watcher."""
    docker = config.get("docker") or {}
    for key in ("head_image", "worker_image"):
        if key in docker:
            yield from text.image(docker[key])
    heads, workers = (config.get(f"{which}_start_ray_commands") or [] for which in ("head", "worker"))
    options = " ".join([*docker.get("run_options", []), *docker.get("head_run_options", [])])
    variables = dict(re.findall(r"(?:--env|-e|export)[ =](\w+)=(\S+)", " ".join([options, *heads])))
    if variables.get("RAY_AUTH_MODE") != "token":
        yield "RAY_AUTH_MODE is not token: without it whoever reaches the head runs code on the cluster"
    path = variables.get("RAY_AUTH_TOKEN_PATH", "")
    if not any(path.startswith(mount.rstrip("/") + "/") for mount in config.get("file_mounts") or {}):
        yield "RAY_AUTH_TOKEN_PATH: expected a file below one of file_mounts, which bring the token to every node"
    yield from text.stop_wait(variables.get("RAY_JOB_STOP_WAIT_TIME_S"))
    for command in [*heads, *workers]:
        yield from text.dashboard(next(iter(re.findall(r"--dashboard-host[= ](\S+)", command)), None))
    spot = any(_is_spot(node.get("node_config") or {}) for node in (config.get("available_node_types") or {}).values())
    if spot and not any(f"spot_notice --cloud {kind}" in command for command in workers):
        yield f"spot nodes without a watcher: expected `python -m pipeline.distributed.spot_notice --cloud {kind}` in worker_start_ray_commands"


# ---- Amazon ------------------------------------------------------------------------------------------------------


def aws_machine(machine: dict[str, Any], where: str) -> Iterator[str]:
    """Problems of a machine, by EC2's own description of RunInstances."""
    yield from _aws({k: v for k, v in machine.items() if k not in OF_RAY}, _run_instances(), where)
    for key in ("InstanceType", "ImageId"):
        if key not in machine:
            yield f"{where}.{key} is missing" + (
                ", and Ray's table of machine images is of another year" * (key == "ImageId")
            )
    if not machine.get("SecurityGroupIds"):
        yield f"{where}.SecurityGroupIds is missing: Ray then makes a group that opens port 22 to the whole internet, also beside rules of provider.security_group"


@functools.cache
def _run_instances() -> Any:
    """The shape of what RunInstances takes; reading EC2's description takes a second."""
    import botocore.session

    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _aws(value: Any, shape: Any, where: str) -> Iterator[str]:
    kind = shape.type_name
    if kind == "structure" and isinstance(value, dict):
        for key, inner in value.items():
            if key not in shape.members:
                yield f"{where}.{key}: unknown to EC2; {did_you_mean(key, shape.members)}"
            else:
                yield from _aws(inner, shape.members[key], f"{where}.{key}")
    elif kind == "list" and isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _aws(inner, shape.member, f"{where}[{i}]")
    elif kind == "string" and isinstance(value, str):
        if getattr(shape, "enum", None) and value not in shape.enum:
            yield f"{where} {value!r}: unknown to EC2; {did_you_mean(value, shape.enum)}"
    elif not isinstance(value, {"integer": int, "long": int, "boolean": bool, "timestamp": str, "blob": str, "double": float}.get(kind, ())):  # fmt: skip
        yield f"{where}: expected {kind}, got {value!r}"


# ---- Google ------------------------------------------------------------------------------------------------------


@functools.cache
def _gcp_schemas() -> dict[str, Any]:
    documents = importlib.resources.files("googleapiclient.discovery_cache.documents")
    return dict(json.loads((documents / "compute.v1.json").read_text(encoding="utf-8"))["schemas"])


def gcp_machine(machine: dict[str, Any], where: str) -> Iterator[str]:
    """Problems of a machine, by Compute Engine's own description of an instance."""
    yield from _gcp(machine, {"$ref": "Instance"}, where)
    if "machineType" not in machine:
        yield f"{where}.machineType is missing"
    if not any((disk.get("initializeParams") or {}).get("sourceImage") for disk in machine.get("disks") or []):
        yield f"{where}.disks: none has an initializeParams.sourceImage"
    networks = [str(interface.get("subnetwork", "")) for interface in machine.get("networkInterfaces") or []]
    if not networks or any(name.rsplit("/", 1)[-1] in ("", "default") for name in networks):
        yield f"{where}.networkInterfaces: expected a subnetwork of your own; Ray takes the first one, as a rule `default`, which opens port 22 to the whole internet"


def _gcp(value: Any, schema: dict[str, Any], where: str) -> Iterator[str]:
    schema = _gcp_schemas()[schema["$ref"]] if "$ref" in schema else schema
    kind = schema.get("type")
    if kind == "object" and isinstance(value, dict):
        known = schema.get("properties", {})
        for key, inner in value.items():
            if key in known:
                yield from _gcp(inner, known[key], f"{where}.{key}")
            elif "additionalProperties" in schema:
                yield from _gcp(inner, schema["additionalProperties"], f"{where}.{key}")
            else:
                yield f"{where}.{key}: unknown to Compute Engine; {did_you_mean(key, known)}"
    elif kind == "array" and isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _gcp(inner, schema["items"], f"{where}[{i}]")
    elif kind == "string" and isinstance(value, str):
        if schema.get("enum") and value not in schema["enum"]:
            yield f"{where} {value!r}: unknown to Compute Engine; {did_you_mean(value, schema['enum'])}"
    elif kind == "string" and schema.get("format") in ("int64", "uint64") and isinstance(value, int):
        return
    elif not isinstance(value, {"integer": int, "boolean": bool, "number": float}.get(str(kind), ())):
        yield f"{where}: expected {kind}, got {value!r}"
