"""The doctor on a cluster of two nodes of this machine, one of which differs: `python -m tests.cluster.different_nodes RECIPE OUTPUT`.

The other node has another timm, a clock that is ahead, no home to write to, and says that it has a GPU. A process of its own, because
the cluster is none of the tests' shared one, and asks for no token. Writes the rows and the exit status as JSON, and what is told
of a node that does not answer.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}

from ray.cluster_utils import Cluster

from pipeline import doctor
from pipeline.diagnosis.cluster_facts import ask
from pipeline.diagnosis.node_facts import clock
from pipeline.distributed.ray_session import ray_session

LIMIT_S = 240.0
AHEAD = """\
import time
true_time = time.time
time.time = lambda: true_time() + 100
"""


def main(recipe: str, output: str) -> None:
    threading.Timer(LIMIT_S, os._exit, [3]).start()
    modules = Path(tempfile.mkdtemp(prefix="raydml-modules-"))
    (modules / "timm.py").write_text("__version__ = '0.1'\n")
    (modules / "sitecustomize.py").write_text(AHEAD)
    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 10**8}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    different = {"PYTHONPATH": str(modules), "HOME": "/proc/nobody"}
    node = cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=10**8, env_vars=different)
    os.environ["RAY_ADDRESS"] = cluster.address
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = doctor.main([recipe, "--json"])
    raylet = node.all_processes["raylet"][0].process.pid
    with ray_session(1) as ray:
        os.kill(raylet, signal.SIGSTOP)
        answers = ask(ray, [n["NodeID"] for n in ray.nodes()], clock, (), timeout_s=10.0)
        os.kill(raylet, signal.SIGCONT)
    errors = sorted(answer if isinstance(answer, str) else "" for answer, _, _ in answers.values())
    found = {"status": status, "errors": errors, "checks": json.loads(out.getvalue())["checks"]}
    Path(output).write_text(json.dumps(found))
    os._exit(0)  # its nodes end with it: a shutdown in order takes half a minute


if __name__ == "__main__":
    main(*sys.argv[1:])
