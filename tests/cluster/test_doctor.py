"""The doctor on a cluster: every way in which a node differs is told with the node; one that does not answer is not waited for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.data.store import Store
from pipeline.testing.tiny import tiny_values

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


def test_a_node_that_differs_and_one_that_does_not_answer(store: Store, tmp_path: Path) -> None:
    storage, recipe, output = tmp_path / "storage", tmp_path / "recipe.yaml", tmp_path / "found.json"
    storage.mkdir()
    changes = {"cache.folder": "~/cache", "runtime.workers": 2, "runtime.loader": "ray"}
    recipe.write_text(yaml.safe_dump(tiny_values(str(storage), store.folder.uri, changes)))
    command = [sys.executable, "-m", "tests.cluster.different_nodes", str(recipe), str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert output.exists(), done.stderr
    answer = json.loads(output.read_text())
    assert answer["status"] == 1 and os.listdir(storage) == []
    assert answer["errors"] == ["", "no answer within 10 s"]
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in answer["checks"]:
        rows.setdefault(row["check"], []).append(row)

    def found(check: str, of: str) -> str:
        return " | ".join(row["found"] for row in rows[check] if row["status"] == of)

    assert "timm 0.1" in found("versions", "warning") and found("versions", "ok")
    assert "torch 0, faiss 0, Ray 1" in found("GPUs", "fails") and "Ray 0" in found("GPUs", "ok")
    assert "/proc/nobody" in found("disk: cache", "fails") and found("disk: cache", "ok")
    assert "+100." in found("clock", "warning") and found("clock", "ok")
    assert found("storage", "ok").endswith("(all 2 nodes)")
    assert "4 CPUs requested" in rows["resources"][0]["change"], "the cluster has 3"
    assert "no token is asked for" in found("authentication", "fails"), "it listens on every address"
    assert rows["training step"][0]["status"] == "ok" and rows["memory"] and rows["/dev/shm"]
