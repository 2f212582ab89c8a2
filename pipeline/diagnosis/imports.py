"""Versions, imports and devices of this Python: `python -m pipeline.diagnosis.imports` prints them as JSON.

In a process of its own, an import that fails or hangs is a finding about a node, and the node's Ray worker stays small.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline import ROOT
from pipeline.errors import one_line

PACKAGES = ("torch", "torchvision", "ray", "faiss", "pyarrow", "timm")
TIMEOUT_S = 120.0  # the first import from a slow disk takes most of a minute


def import_facts() -> dict[str, Any]:
    """Versions and devices, found by importing every package here.

    Returns:
        versions: Version of Python, raydml and each package; without those that cannot be imported.
        errors: The error of each package that cannot be imported.
        torch_gpus: Name and bytes of memory of each GPU that torch sees.
        faiss_gpus: Number of GPUs that faiss sees.
    """
    facts: dict[str, Any] = {"versions": {}, "errors": {}, "torch_gpus": [], "faiss_gpus": 0}
    facts["versions"] = {"python": platform.python_version(), "raydml": code_version()}
    for name in PACKAGES:
        try:
            module = importlib.import_module(name)
        except Exception as error:  # a damaged package may raise anything
            facts["errors"][name] = one_line(error)
        else:
            facts["versions"][name] = str(module.__version__)
    if "torch" in facts["versions"]:
        import torch

        for number in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(number)
            facts["torch_gpus"].append([device.name, int(device.total_memory)])
    if "faiss" in facts["versions"]:
        import faiss

        facts["faiss_gpus"] = int(faiss.get_num_gpus()) if hasattr(faiss, "get_num_gpus") else 0
    return facts


def code_version() -> str:
    """Version of this program with a digest of its code: two copies of one version may differ."""
    digest = hashlib.sha256()
    for package in ("methods", "pipeline"):
        for path in sorted(Path(ROOT, package).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    try:
        version = importlib.metadata.version("raydml")
    except importlib.metadata.PackageNotFoundError:  # the code came with the job
        version = "not installed"
    return f"{version}, code {digest.hexdigest()[:8]}"


def import_facts_of_a_process(timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """The same, found by another process; a time-out or a crash counts as an error of the import."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([ROOT, *filter(None, sys.path)])}
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__], env=environment, capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        reason = f"not imported within {timeout_s:g} s"
    else:
        if done.returncode == 0:
            return dict(json.loads(done.stdout.splitlines()[-1]))
        reason = f"the process that imports it ended with status {done.returncode}: {done.stderr.strip()[-200:]}"
    versions = {"python": platform.python_version(), "raydml": code_version()}
    return {"versions": versions, "errors": {"torch": reason}, "torch_gpus": [], "faiss_gpus": 0}


if __name__ == "__main__":
    print(json.dumps(import_facts()))
