"""Freed memory is kept by the process: read off the page faults of tensors that are made again and again."""

from __future__ import annotations

import os
import subprocess
import sys

CHILD = """
import resource, subprocess, sys, threading
import torch
from pipeline.distributed.cpus import use_cpus

if sys.argv[1] == "kept":
    use_cpus(1)
if sys.argv[2] == "again":  # a process that this one starts, as Ray's are
    sys.exit(subprocess.call([sys.executable, "-c", open(0).read(), "inherited", "once"], stdin=subprocess.DEVNULL))

def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(20_000_000)  # 80 MB: 20,000 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = []
work = lambda: (faults(), found.append(faults()))
if sys.argv[1] == "inherited":  # Ray's workers train in a thread
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
else:
    work()
print(torch.get_num_threads(), found[0])
"""


def page_faults(how: str, where: str = "once", **environment: str) -> int:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "LD_PRELOAD"}
    command = [sys.executable, "-c", CHILD, how, where]
    done = subprocess.run(command, input=CHILD, env=clean | environment, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[1])


def test_memory_of_tensors_is_kept_and_also_in_threads_of_processes_that_are_started() -> None:
    assert page_faults("freed") > 100_000, "without it, every page is cleared again"
    assert page_faults("kept") < 50_000
    assert page_faults("kept", "again") < 50_000
    assert page_faults("kept", MALLOC_TRIM_THRESHOLD_="131072") > 100_000, "what the user has set holds"
