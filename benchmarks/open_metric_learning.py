"""Evaluation against open-metric-learning, for `python -m benchmarks.peers`: CMC@1, 10, 100 and MAP@4 of 8,000 x 512 rows.

    python -m benchmarks.open_metric_learning --install

makes the virtual environment build/open-metric-learning, since that library takes numpy below 2: torch and what else it can use
are those of this environment. The other side is a process there that holds the same arrays and is told when to work.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.alternate import rows_of, seconds_of
from benchmarks.evaluation import clustered
from benchmarks.table import Row, finish
from pipeline.evaluation.retrieval import retrieve

PACKAGES = ("open-metric-learning==4.0.0", "omegaconf>=2.3,<3", "pandas<3")
ENVIRONMENT = Path("build") / "open-metric-learning"
INSTALL = "python -m benchmarks.open_metric_learning --install"
CMC_AT, MAP_AT, MOST = ((1, 10, 100), (1,)), 4, 0.35
SERVER = Path(__file__).with_name("open_metric_learning_server.py")


def python() -> Path:
    return ENVIRONMENT / "bin" / "python"


def install() -> None:
    subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    place = ENVIRONMENT / "lib" / version / "site-packages" / "ours.pth"
    place.write_text(sysconfig.get_path("purelib") + "\n")  # after its own packages
    subprocess.run([str(python()), "-m", "pip", "install", *PACKAGES], check=True)


def rows(rounds: int = 5) -> list[Row]:
    """Both sides in turn; the nearest 100 that CMC@100 needs, and the 4 that are enough without it."""
    if not python().exists():
        raise SystemExit(
            f"open-metric-learning needs an environment of its own: run `{INSTALL}` first, from this folder"
        )
    embeddings, labels = clustered(np.full(2000, 4), dim=512, noise=2.4)
    table = []
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/x.npy", embeddings.numpy())
        np.save(f"{folder}/y.npy", labels.numpy())
        command = [str(python()), str(SERVER), folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            print(f"open-metric-learning: {answer(other)}", file=sys.stderr)
            for cmc_at in CMC_AT:

                def ours(cmc_at: Sequence[int] = cmc_at) -> dict[str, float]:
                    found = retrieve(embeddings, labels)
                    cmc = {f"cmc@{k}": found.summary([k])[f"recall@{k}"] / 100 for k in cmc_at}
                    return cmc | {"map": map_at(found.neighbours[:, :MAP_AT], labels.numpy())}

                theirs = answer(other, cmc_at)
                for name, value in ours().items():
                    if abs(value - theirs[name]) > 2 / len(labels):  # neighbours that are equally near but for rounding
                        raise SystemExit(f"{name}: {value} here, {theirs[name]} there")
                seconds = [(seconds_of(ours), answer(other, cmc_at)["seconds"]) for _ in range(rounds)]
                names = ", ".join(map(str, cmc_at))
                what = f"evaluation, 8,000 x 512, CMC@{names} and MAP@{MAP_AT} / open-metric-learning"
                table += rows_of(what, seconds, MOST if 100 in cmc_at else None)
            assert other.stdin is not None
            other.stdin.close()
    return table


def answer(other: subprocess.Popen[str], question: Sequence[int] | None = None) -> Any:
    """What the other side prints after it is told something, or first of all."""
    assert other.stdin is not None and other.stdout is not None
    if question is not None:
        other.stdin.write(json.dumps(question) + "\n")
        other.stdin.flush()
    line = other.stdout.readline()
    if not line:
        raise SystemExit(f"the process of open-metric-learning ended with status {other.wait()}")
    return json.loads(line)


def map_at(neighbours: np.ndarray, labels: np.ndarray) -> float:
    """Mean average precision of the nearest few as that library defines it: over the relevant ones among them."""
    relevant = labels[neighbours] == labels[:, None]
    precision = relevant.cumsum(1) / np.arange(1, neighbours.shape[1] + 1)
    return float(((precision * relevant).sum(1) / relevant.sum(1).clip(min=1)).mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="make the virtual environment, 400 MB")
    parser.add_argument("--json", metavar="PATH", help="write the figures into this file as well")
    options = parser.parse_args()
    if options.install:
        install()
        return 0
    torch.set_num_threads(1)
    return finish(rows(), options.json)


if __name__ == "__main__":
    sys.exit(main())
