"""Side by side with what a user would take instead, at equal settings: one table, the rows that lose included.

    python -m benchmarks.peers [--only NAME ...] [--rounds 7] [--json PATH]

Both sides run in one process tree and alternate; what they compute is compared before it is timed; ratios are medians over the
rounds, beside them their middle half; threads are set explicitly, the same number on both sides. Where the other side has a
faster setting than its default, there is a row for either. The measurements are those of the single benchmarks, which say
their conditions. open-metric-learning needs an environment of its own, once:

    python -m benchmarks.open_metric_learning --install

An hour and a half on 2 cores, and 14 GB of memory; `--only` names parts of it:

evaluation     P@1, MAP@R, R-precision against pytorch-metric-learning (and `default`, `memory`), `oml`, `faiss`
losses         losses and miners of pytorch-metric-learning through `baseline`, and called directly
methods        GCA-HNG, Intra-Batch and OSM+CAA against their formulas written literally; `mmsi` against a plain step
training       a training run against a plain loop with the same work; `cached`: a batch in parts against the whole
loading        against torch's DataLoader; `prepare`: against processes that only read, check and encode
launchers      Ray Train against torchrun; `workers`: two workers against one on the same cores
gradients      of two ranks against one, beside DDP with pytorch-metric-learning; `resume`: what a killed run costs
index          the engine that `auto` takes for mining against the best of all
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping

from benchmarks.table import Row, finish

PEERS = ("torch", "pytorch-metric-learning", "ray", "timm", "numpy")
Section = Callable[[int], list[Row]]


def evaluation(rounds: int) -> list[Row]:
    from benchmarks.evaluation import comparison_rows

    return comparison_rows(rounds)


def default(rounds: int) -> list[Row]:
    from benchmarks.metric_learning import default_rows

    return default_rows(rounds)


def memory(_: int) -> list[Row]:
    from benchmarks.metric_learning import memory_rows

    return memory_rows()


def oml(rounds: int) -> list[Row]:
    from benchmarks.open_metric_learning import rows

    return rows(rounds)


def faiss(rounds: int) -> list[Row]:
    from benchmarks.evaluation import faiss_rows

    return faiss_rows(rounds)


def losses(rounds: int) -> list[Row]:
    from benchmarks.metric_learning import loss_rows

    return loss_rows(2 * rounds + 1)


def methods(rounds: int) -> list[Row]:
    from benchmarks.methods import measure_in_batch

    return measure_in_batch(rounds)


def mmsi(rounds: int) -> list[Row]:
    from benchmarks.methods import cpu_s, peak_mib
    from benchmarks.whole_set import measure_mmsi

    return measure_mmsi(rounds, cpu_s, lambda side: peak_mib("mmsi", side))


def training(rounds: int) -> list[Row]:
    from benchmarks.training import measure

    return measure(min(rounds, 5), 2)


def cached(_: int) -> list[Row]:
    from benchmarks.cached_gradients import rows

    return rows(1024, 32)


def loading(rounds: int) -> list[Row]:
    from benchmarks.loader import measure_loading

    return measure_loading(min(rounds, 5))


def prepare(rounds: int) -> list[Row]:
    from benchmarks.loader import measure_prepare

    return measure_prepare(min(rounds, 5))


def launchers(rounds: int) -> list[Row]:
    from benchmarks.distributed import launcher_rows

    return launcher_rows(rounds)


def workers(rounds: int) -> list[Row]:
    from benchmarks.distributed import worker_rows

    return worker_rows(rounds)


def gradients(_: int) -> list[Row]:
    from benchmarks.distributed import gradient_rows

    return gradient_rows()


def resume(rounds: int) -> list[Row]:
    from benchmarks.distributed import resume_rows

    return resume_rows(min(rounds, 5))


def index(_: int) -> list[Row]:
    from benchmarks.mining import measure_auto

    return measure_auto()


# Threads of either side in this process; the sections of whole runs say those of their processes themselves.
SECTIONS: Mapping[str, tuple[Section, int]] = {
    section.__name__: (section, threads)
    for section, threads in (
        (evaluation, 1), (default, 1), (memory, 1), (oml, 1), (faiss, 1), (losses, 1), (methods, 2), (mmsi, 1), (training, 1),
        (cached, 1), (loading, 1), (prepare, 1), (launchers, 1), (workers, 1), (gradients, 1), (resume, 1), (index, 1),
    )
}  # fmt: skip


def measured(name: str, rounds: int) -> list[Row]:
    """The rows of a section."""
    import faiss as faiss_library
    import torch

    section, threads = SECTIONS[name]
    torch.set_num_threads(threads)
    faiss_library.omp_set_num_threads(threads)
    return section(rounds)


def conditions() -> str:
    """One line: versions of all that is compared, and of the machine."""
    import faiss as faiss_library

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PEERS)
    versions += f", faiss {faiss_library.__version__}"
    return f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}; {versions}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="parts to measure")
    parser.add_argument("--rounds", type=int, default=7, help="of every comparison, after one that is not counted")
    parser.add_argument("--json", metavar="PATH", help="write the figures into this file as well")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started; they set their threads themselves
    print(conditions(), file=sys.stderr)
    rows = list[Row]()
    for name in options.only:
        started = time.perf_counter()
        rows += measured(name, options.rounds)
        print(f"{name}: {time.perf_counter() - started:.0f} s, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    status = finish(rows, options.json)
    if losing := [row for row in rows if row.loses]:
        print(f"\nthe other is ahead in {len(losing)} of {sum(row.ratio is not None for row in rows)}:")
        print("\n".join(f"  {row.ratio:.3g}x  {row.what}" for row in losing))
    return status


if __name__ == "__main__":
    sys.exit(main())
