"""Checks of Kubernetes files: fields and types of KubeRay's objects and of pods, and what keeps a cluster closed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

from tools.cluster_checks import text

SCHEMA = json.loads((Path(__file__).parent / "kuberay.json").read_text(encoding="utf-8"))
KUBERNETES = "1.33"  # whose fields pods may use
API_VERSIONS = {"RayCluster": "ray.io/v1", "RayJob": "ray.io/v1"}
OPERATOR_GRACE_S = 10  # between the end of a preStop hook and the end of the pod


def problems(documents: list[dict[str, Any]]) -> Iterator[str]:
    """Problems of a file's objects."""
    kinds = [document.get("kind") for document in documents]
    for document in documents:
        kind, name = document.get("kind"), (document.get("metadata") or {}).get("name")
        if kind not in API_VERSIONS:
            yield from _core(document, f"{kind} {name}")
            continue
        if document.get("apiVersion") != API_VERSIONS[kind]:
            yield f"{kind} {name}: apiVersion {document.get('apiVersion')}: expected {API_VERSIONS[kind]}"
        spec = document.get("spec") or {}
        schema = {**SCHEMA[kind], "definitions": SCHEMA["definitions"]}
        for error in jsonschema.Draft202012Validator(schema).iter_errors(spec):
            yield f"{kind} {name}: {'.'.join(['spec', *map(str, error.absolute_path)])}: {error.message[:200]}"
        cluster = spec if kind == "RayCluster" else spec.get("rayClusterSpec") or {}
        yield from _cluster(cluster, "NetworkPolicy" in kinds, kind == "RayJob")
        if kind == "RayJob":
            yield from _job(spec)


def _core(document: dict[str, Any], where: str) -> Iterator[str]:
    """Problems of an object of Kubernetes itself, unknown fields included."""
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        path = ".".join(str(part) for part in getattr(error, "path", []) or [])
        yield f"{where}: {path + ': ' if path else ''}{str(error.message)[:200]}"
    except (kubernetes_validate.SchemaNotFoundError, kubernetes_validate.InvalidSchemaError, KeyError) as error:
        yield f"{where}: unknown kind: {error}"


def _job(spec: dict[str, Any]) -> Iterator[str]:
    if not spec.get("shutdownAfterJobFinishes"):
        yield "shutdownAfterJobFinishes is not true: the cluster, and its GPUs, would stay after the run"
    elif "ttlSecondsAfterFinished" not in spec:
        yield "ttlSecondsAfterFinished is missing: expected the seconds in which logs of a finished run can still be read"


def _cluster(spec: dict[str, Any], has_policy: bool, is_job: bool) -> Iterator[str]:
    """Problems of a cluster: authentication, who reaches it, and each group."""
    if (spec.get("authOptions") or {}).get("mode") != "token":
        yield "authOptions.mode is not token: without it (RAY_AUTH_MODE=token) whoever reaches the head runs code on the cluster"
    yield from text.ray_version(spec.get("rayVersion"))
    if not has_policy:
        yield "no NetworkPolicy: every pod of Kubernetes reaches Ray's ports"
    if not spec.get("enableInTreeAutoscaling") or (spec.get("autoscalerOptions") or {}).get("version") != "v2":
        yield "enableInTreeAutoscaling and autoscalerOptions.version v2 are expected: idle GPU pods would stay"
    head = spec.get("headGroupSpec") or {}
    if head.get("serviceType", "ClusterIP") != "ClusterIP" or head.get("enableIngress"):
        yield "the head is offered outside Kubernetes: expected serviceType ClusterIP and no ingress; use kubectl port-forward"
    host = (head.get("rayStartParams") or {}).get("dashboard-host", "0.0.0.0")  # the operator's own value
    if not (is_job and has_policy):  # of a RayJob the operator asks the dashboard
        yield from text.dashboard(host)
    yield from text.stop_wait(_environment(_container(head)).get("RAY_JOB_STOP_WAIT_TIME_S"))
    yield from _group(head, "head", "on-demand")
    for group in spec.get("workerGroupSpecs") or []:
        spot = (group.get("labels") or {}).get("ray.io/market-type") == "spot"
        yield from _group(group, str(group.get("groupName")), "spot" if spot else "on-demand")
        low, high = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
        if not low <= group.get("replicas", low) <= high:
            yield f"{group.get('groupName')}: replicas {group.get('replicas')} is not between minReplicas {low} and maxReplicas {high}"


def _container(group: dict[str, Any]) -> dict[str, Any]:
    """The container that runs Ray: the first one."""
    return ((group.get("template") or {}).get("spec") or {}).get("containers", [{}])[0]


def _environment(container: dict[str, Any]) -> dict[str, Any]:
    return {entry.get("name"): entry.get("value") for entry in container.get("env") or []}


def _group(group: dict[str, Any], name: str, market: str) -> Iterator[str]:
    """Problems of a group's pods."""
    template = group.get("template") or {}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, **(template.get("metadata") or {})},
        "spec": template.get("spec"),
    }
    yield from _core(pod, f"{name}'s pod")
    spec, container = template.get("spec") or {}, _container(group)
    gpus = ((container.get("resources") or {}).get("limits") or {}).get("nvidia.com/gpu")
    for problem in text.image(container.get("image"), gpu=bool(gpus)):
        yield f"{name}: {problem}"
    if (group.get("labels") or {}).get("ray.io/market-type") != market:
        yield f"{name}: expected the label ray.io/market-type: {market}"
    if not (spec.get("securityContext") or {}).get("runAsNonRoot"):
        yield f"{name}: securityContext.runAsNonRoot is not true"
    if (container.get("securityContext") or {}).get("allowPrivilegeEscalation") is not False:
        yield f"{name}: securityContext.allowPrivilegeEscalation is not false"
    if spec.get("restartPolicy", "Never") != "Never":
        yield f"{name}: restartPolicy {spec['restartPolicy']}: expected Never, as the autoscaler v2 asks"
    for key, value in _environment(container).items():
        if value is not None and re.fullmatch(text.SECRET_NAME, str(key)):
            yield f"{name}: the variable {key} holds a secret's value: expected valueFrom.secretKeyRef"
    if market == "spot":
        yield from _spot(spec, container, name)


def _spot(spec: dict[str, Any], container: dict[str, Any], name: str) -> Iterator[str]:
    hook = (((container.get("lifecycle") or {}).get("preStop") or {}).get("exec") or {}).get("command") or []
    command = " ".join(map(str, hook))
    if "spot_notice --cloud kubernetes" not in command:
        yield f"{name}: spot pods without a preStop hook: expected python -m pipeline.distributed.spot_notice --cloud kubernetes"
        return
    grace = re.search(r"--grace-s (\d+)", command)
    waits, ends = int(grace[1]) if grace else 100, spec.get("terminationGracePeriodSeconds", 30)
    if ends < waits + OPERATOR_GRACE_S:
        yield f"{name}: terminationGracePeriodSeconds {ends}: expected {waits + OPERATOR_GRACE_S} or more, as the preStop hook waits {waits} s"
