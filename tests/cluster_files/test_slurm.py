"""cluster/slurm.sh with stand-ins for Slurm's programs; once with real Ray, in a process namespace of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.data.store import Store
from tests.cluster.nodes import free_port
from tools.cluster_checks.text import ROOT

SCRIPT = ROOT / "cluster" / "slurm.sh"
SCONTROL = '#!/bin/sh\n[ "$1 $2 $3" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n'
# The tasks of a step run one after the other; the first one is the head's.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> "$RECORD/srun"; shift; done
exec "$@"
"""
HOSTNAME = '#!/bin/sh\necho "${HEAD_IP:-10.1.2.3} 10.9.9.9"\n'
RAY = """#!/bin/bash
echo "$@" > "$RECORD/ray"
env | grep ^RAY > "$RECORD/environment"
stat -c "%a" "$RAY_AUTH_TOKEN_PATH" "$(dirname "$RAY_AUTH_TOKEN_PATH")" > "$RECORD/modes"
wc -c < "$RAY_AUTH_TOKEN_PATH" >> "$RECORD/modes"
[ -n "$RAY_FAILS" ] && { echo "Failed to start Ray" >&2; exit 0; }
while [ "$1" != -- ]; do shift; done
shift
"$@"
"""
PYTHON = f"""#!/bin/bash
if [ "$1" = -m ]; then
  echo "$RAY_ADDRESS" "$@" > "$RECORD/python"
  exit "${{STATUS:-0}}"
fi
exec {sys.executable} "$@"
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the stand-ins in `bin` and an empty `record` and `submitted`."""
    for name, text in {"scontrol": SCONTROL, "srun": SRUN, "hostname": HOSTNAME, "ray": RAY, "python": PYTHON}.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    for name in ("record", "submitted"):
        (tmp_path / name).mkdir()
    return tmp_path


def environment(place: Path, **variables: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY", "SLURM"))}
    return kept | {
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "RECORD": str(place / "record"), "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_SUBMIT_DIR": str(place / "submitted"), **variables,
    }  # fmt: skip


def submit(place: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", SCRIPT, *arguments], env=environment(place, **variables), capture_output=True, text=True, check=False
    )


def test_ray_is_started_on_all_nodes_and_trains_on_the_head(place: Path) -> None:
    done = submit(place, "photos.yaml", "--set", "name=a b")
    assert done.returncode == 0, done.stderr
    record = {path.name: path.read_text() for path in (place / "record").iterdir()}
    assert record["ray"].startswith(
        "symmetric-run --address 10.1.2.3:24242 --min-nodes 2 --dashboard-host=127.0.0.1 -- "
    )
    assert record["python"] == "10.1.2.3:24242 -m pipeline.train photos.yaml --set name=a b\n"
    assert record["srun"].split() == ["--nodes=1", "--ntasks=1", "--nodelist=n1", "--nodes=2", "--ntasks=2"]
    assert "RAY_AUTH_MODE=token" in record["environment"].split()
    assert "RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300" in record["environment"].split()
    assert "RAY_ADDRESS" not in record["environment"]  # `ray start` would join that cluster
    assert record["modes"].split() == ["600", "700", "65"]


def test_another_address_of_the_head_can_be_given(place: Path) -> None:
    assert submit(place, "photos.yaml", RAYDML_HEAD_ADDRESS="172.16.0.9").returncode == 0
    assert (place / "record" / "python").read_text().startswith("172.16.0.9:24242 ")


def test_the_token_is_removed_at_the_end(place: Path) -> None:
    submit(place, "photos.yaml", STATUS="1")
    assert list((place / "submitted").iterdir()) == []


def test_the_status_is_that_of_the_run(place: Path) -> None:
    assert submit(place, "photos.yaml", STATUS="3").returncode == 3


def test_a_ray_that_did_not_start_is_an_error(place: Path) -> None:
    done = submit(place, "photos.yaml", RAY_FAILS="1")
    assert done.returncode == 1 and "error: the run was not started" in done.stderr


def test_without_a_recipe_nothing_is_started(place: Path) -> None:
    done = submit(place)
    assert done.returncode == 2 and "no recipe" in done.stderr and not list((place / "record").iterdir())


@pytest.mark.slow
@pytest.mark.cluster
def test_a_run_with_real_ray(place: Path, store: Store) -> None:
    """On one node. `ray stop`, with which it ends, sees only the processes of this namespace."""
    for name in ("ray", "python"):
        (place / "bin" / name).unlink()
    assert shutil.which("unshare") is not None, "unshare (util-linux) is needed"
    recipe = {
        "name": "slurm", "storage": str(place / "storage"), "data": {"source": store.folder.uri, "transforms": {"size": 24}},
        "model": {"backbone": "test_efficientnet", "weights": "none"}, "length": "2 steps",
        "method": {"classes_per_batch": 4, "samples_per_class": 3}, "evaluation": {"clustering": False},
        "runtime": {"workers": 2, "cpus_per_worker": 1, "loader": "in_process"},
    }  # fmt: skip
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    programs = str(Path(sys.executable).parent)
    variables = environment(
        place, HEAD_IP="127.0.0.1", SLURM_JOB_NUM_NODES="1", SLURM_JOB_ID=str(10000 + free_port() % 10000), HOME=str(place),
        RAY_TMPDIR=f"/tmp/s{os.getpid()}", OMP_NUM_THREADS="1",
    )  # fmt: skip
    variables["PATH"] = f"{place / 'bin'}:{programs}:{os.environ['PATH']}"
    command = [
        "unshare",
        "--user",
        "--map-root-user",
        "--pid",
        "--fork",
        "--mount-proc",
        "bash",
        str(SCRIPT),
        "recipe.yaml",
    ]
    done = subprocess.run(command, env=variables, cwd=place, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads((place / "storage" / "runs" / "slurm" / "summary.json").read_text())["step"] == 2
