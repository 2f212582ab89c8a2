"""Labels of nodes: workers, loaders, mining servers and trials run where they ask to, and a label that no node has is told at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.data.store import Store
from pipeline.testing.tiny import tiny_values
from tests.cluster.labelled_nodes import KEYS
from tests.cluster.test_ray import ROOT
from tests.laws.runs import METHODS_TRIED

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_parts_run_on_the_nodes_of_their_labels(store: Store, tmp_path: Path) -> None:
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "found.json"
    changes = METHODS_TRIED["mined"] | {
        "length": "4 steps",
        "runtime.workers": 1,
        "runtime.loader": "ray",
        "data.transforms.training": "tests.cluster.labelled_nodes:noting",
    }
    recipe.write_text(yaml.safe_dump(tiny_values(str(tmp_path), store.folder.uri, changes)))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.labelled_nodes", str(recipe), str(output)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(output.read_text())
    for here, there in (("left", "right"), ("right", "left")):
        assert found[here] == {"worker": [here], "server": [there], "loader": [there], "trial": []}
    for key in KEYS:
        status, told = found[key]
        error = told[told.index("error: ") :]
        assert status == 2 and len(error.splitlines()) == 1
        wanted = (
            f"error: {key} asks for a node of the labels side: middle, which no node has (labels of the nodes: side):"
        )
        assert error.startswith(wanted)
    assert found["nowhere"] == {"worker": [], "server": [], "loader": [], "trial": []}
    assert not (tmp_path / "runs" / "nowhere" / "config.yaml").exists()
    assert found["trials"] == ["finished"] * 2 and found["sweep"]["trial"] == ["right"]
