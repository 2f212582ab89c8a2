"""The methods beside their bases and the best baselines: a sweep a dataset, whose records stay in the repository.

    python -m benchmarks.compare [--sets emoji icons birds] [--budget MINUTES] [--resume] [--root FOLDER] [--results FOLDER]
    python -m benchmarks.compare --show                       the tables of the results that are there; trains nothing
    python -m benchmarks.compare --write                      writes them into README.md and the documentation, figures and leaderboard
    python -m benchmarks.compare --sets emoji --repeat ROW    trains a row's final runs again and compares the figures
    python -m benchmarks.compare --sets emoji --time ROW ...  times rows once more, if other programs ran beside all of their runs

The sweep is benchmarks/compare.yaml, run by `pipeline.tune` under the fair protocol: settings are chosen on a fold of the training
classes, final runs train on all of them, and the test classes are measured once. Then rows within two points of their base, or whose
difference has an interval that holds 0, get two more seeds, and rows whose steps are slower or faster than those of the multi-similarity
loss are trained again, for as long as that took: the second table. For that nothing else should run beside, and all of a set on one machine.
Records, one JSON file a run, are kept in `--results` (benchmarks/results/compare/SET) as they are written; tables, figures and leaderboard
are made of them alone, and so are the tables in README.md and the documentation, by `--write`. With `--resume` a stopped comparison goes on
from them, also on another machine: only weights of unfinished runs are trained anew. `--budget` stops all after so many minutes.

emoji  class = emoji, image = vendor; 64 pixels, 128 dimensions; `python -m pipeline.prepare emoji`
icons  class = icon, image = style; 64 pixels, 128 dimensions; `python -m pipeline.prepare icons`
birds  CUB-200-2010 or -2011; 112 pixels, 512 dimensions; `python -m pipeline.prepare cub --from ... [--partial]`

On two cores emoji and icons take three hours each, birds longer.
"""

from __future__ import annotations

import argparse
import copy
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.compare_figures import draw, draw_sets
from benchmarks.compare_pages import write_pages
from benchmarks.compare_results import METRICS, ROWS, Results, figures_of
from benchmarks.compare_runs import train_runs
from benchmarks.compare_seeds import more_seeds
from benchmarks.compare_tables import tables, write_leaderboard
from benchmarks.compare_time import REFERENCE, TIMINGS, equal_time, more_timings, timed_runs, timing
from pipeline.config import Config, to_yaml
from pipeline.data.find_store import find_store
from pipeline.errors import UserError, fail
from pipeline.recipes import merged
from pipeline.runs.run_folder import SUMMARY
from pipeline.storage import Folder, home

SWEEP = Path(__file__).with_name("compare.yaml")
RESULTS = Path(__file__).with_name("results") / "compare"


@dataclass(frozen=True)
class DataSet:
    """What is particular to a dataset, as `sets` in compare.yaml explains it."""

    store: str
    settings: Mapping[str, Any]
    start: str = "200 steps"
    rates: float = 1.0
    own_rates: Sequence[str] = ()
    sweep: Mapping[str, Any] = field(default_factory=dict)


SETS = {name: DataSet(**values) for name, values in yaml.safe_load(SWEEP.read_text())["sets"].items()}
# MMSI starts from its base: `meta=false`, by loss.
STARTS = {
    "contrastive": {"loss": "contrastive", "margin": 0.5, "norm_scope": "all", "w_init": 0},
    "multi_similarity": {"loss": "multi_similarity"},
}
SEARCH_START, FINAL_START = "fold0", "all"  # what these are trained on: without the fold, all classes
POLL_S = 5.0
FIGURES = Path(__file__).parents[1] / "docs" / "images" / "compare"


def start_name(dataset: str, loss: str, where: str) -> str:
    return f"compare-{dataset}-start-{loss}-{where}"


def sweep_file(dataset: str, folder: Path, more: Mapping[str, Any]) -> Path:
    """The sweep of a set: with its learning rates, what it changes, and the names of the runs that MMSI starts from.

    Args:
        dataset: The set.
        folder: Where the file is written.
        more: Further keys of the sweep, such as its storage.
    """
    of_set = SETS[dataset]
    values = yaml.safe_load(SWEEP.read_text().replace("START-", f"compare-{dataset}-start-"))
    del values["sets"]
    _multiply_rates(values, of_set)
    values = merged(merged(values, {"settings": of_set.settings}), of_set.sweep)
    file = folder / f"compare-{dataset}.yaml"
    file.write_text(yaml.safe_dump(merged(values, {"name": f"compare-{dataset}", **more}), sort_keys=False))
    return file


def _multiply_rates(sweep: dict[str, Any], of_set: DataSet) -> None:
    """Multiplies the learning rates of ranges and of points by the set's factor."""
    key, factor = "method.optimizer.lr", of_set.rates
    sweep["methods"] = {row: copy.deepcopy(entry) for row, entry in sweep["methods"].items()}  # rows share YAML anchors
    entries = [entry for row, entry in sweep["methods"].items() if row not in of_set.own_rates]
    for entry in [sweep, *entries]:
        for kind, (low, high) in entry["space"].get(key, {}).items():
            entry["space"][key] = {kind: [low * factor, high * factor]}
        for point in entry.get("points", []):
            point[key] *= factor


def allow_interrupts() -> None:
    """Ctrl-C and `kill -INT` stop the program also where a shell has started it in the background; commands inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run(command: Sequence[str], root: str, until: float | None = None, results: Results | None = None) -> int:
    """Runs a command in a storage, copying a sweep's records meanwhile; interrupts it when the time is over. Returns its status."""
    environment = os.environ | {"RAYDML_HOME": root}  # where the names of runs to start from are looked up
    # a session of its own, so that it gets one interrupt, which this process sends
    process = subprocess.Popen([sys.executable, "-m", *command], env=environment, start_new_session=True)
    asked = False
    try:
        while process.poll() is None:
            time.sleep(POLL_S)
            if results is not None:
                results.collect()
            if until is not None and time.monotonic() > until and not asked:
                asked = True
                process.send_signal(signal.SIGINT)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()  # it keeps what it has
        raise
    finally:
        if results is not None:
            results.collect()
    return process.returncode


def train_starts(
    dataset: str, root: str, until: float | None, where: Sequence[str] = (SEARCH_START, FINAL_START)
) -> int:
    """The checkpoints of both bases that MMSI starts from: without fold 0, for the search, and on all training classes."""
    of_set = SETS[dataset]
    for loss, method in STARTS.items():
        for classes in where:
            recipe = {
                "preset": "mmsi/emoji",
                "name": start_name(dataset, loss, classes),  # if it is finished, the command checks that it is this run
                "storage": root,
                "method": {"meta": False, "classes_per_batch": 19, **method},
                "data": {"validation_fold": 0 if classes == SEARCH_START else None},
                "evaluation": {"test": False},
                "runtime": {"workers": 0, "loader": "in_process"},
                "length": of_set.start,
            }
            if status := train(root, merged(recipe, of_set.settings), until):
                return status
    return 0


def compare(dataset: str, root: str, results: Results, until: float | None) -> int:
    """Trains what is missing of a set's comparison, until it is finished or the time is over; returns the status."""
    results.restore()
    status = train_starts(dataset, root, until)
    if status == 0 and (until is None or time.monotonic() < until):
        with tempfile.TemporaryDirectory(prefix="raydml-compare-") as folder:
            at_once = len(os.sched_getaffinity(0))  # of a thread each; mining servers share their core
            file = sweep_file(dataset, Path(folder), {"storage": root, "trials_at_once": at_once})
            status = run(["pipeline.tune", str(file)], root, until, results)
    for wanted in (more_seeds, *[more_timings] * TIMINGS, equal_time):
        if status == 0:
            status = train_runs([*wanted(results)], train_config, until)
    return status


def train(root: str, recipe: Mapping[str, Any], until: float | None = None) -> int:
    """Trains a recipe in a storage; returns the command's status."""
    with tempfile.TemporaryDirectory(prefix="raydml-compare-") as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
        return run(["pipeline.train", str(file)], root, until)


def train_config(root: str, config: Config) -> int:
    """Trains a configuration in a storage; returns the command's status."""
    return train(root, yaml.safe_load(to_yaml(config)))


def write_outputs(results: Results, figures: Path) -> None:
    """The leaderboard beside the records, and a figure a table."""
    write_leaderboard(results)
    if not any(results.has(row) for row in ROWS):
        return
    figures.mkdir(parents=True, exist_ok=True)
    draw(f"{results.name}, equal images seen", results.figures(), results.frozen(), figures / f"{results.name}.svg")
    if timed := timed_runs(results):
        title = f"{results.name}, equal wall time: that of {REFERENCE}"
        draw(title, figures_of(timed), results.frozen(), figures / f"{results.name}-time.svg")


def repeat(row: str, results: Results) -> int:
    """Trains the final runs of a row again, in a storage of its own, and prints both figures; 1 if they differ."""
    different, record, runs = 0, results.finals(row)[0], results.final_runs(row)
    if row.startswith("mmsi") and (status := train_starts(results.name, results.root, None, [FINAL_START])):
        return status
    for kept in runs:
        with tempfile.TemporaryDirectory(prefix="raydml-repeat-") as folder:
            os.symlink(f"{results.root}/data", f"{folder}/data")
            os.mkdir(f"{folder}/runs")
            for loss in STARTS:  # what MMSI starts from
                name = start_name(results.name, loss, FINAL_START)
                if os.path.isdir(f"{results.root}/runs/{name}"):
                    os.symlink(f"{results.root}/runs/{name}", f"{folder}/runs/{name}")
            config = results.config(record, folder).model_copy(update={"seed": kept.seed})
            if train_config(folder, config):
                return 1
            again = Folder(f"{folder}/runs/{config.name}").read_json(SUMMARY)["final"]
        for metric in METRICS:
            then, now = kept.test[metric], again[metric]
            different += then != now
            print(f"{row}, seed {kept.seed}, {metric}: recorded {then:.4f}, now {now:.4f}", flush=True)
    return int(different > 0)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="stop after this time; --resume goes on")
    parser.add_argument("--resume", action="store_true", help="go on from the results that are there")
    parser.add_argument("--show", action="store_true", help="print the tables of the results that are there")
    parser.add_argument(
        "--write", action="store_true", help="as --show, and the tables of finished sets into the pages"
    )
    parser.add_argument("--repeat", choices=ROWS, metavar="ROW", help="train the final runs of this row again")
    parser.add_argument("--time", nargs="+", choices=ROWS, metavar="ROW", help="time these rows once more")
    parser.add_argument("--root", default=home(), help="storage of datasets and runs (default: $RAYDML_HOME)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records (default: %(default)s)")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder of the figures (default: %(default)s)")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.budget if options.budget else None
    root = Folder(options.root).uri
    found = {name: Results(name, root, options.results / name) for name in options.sets}
    allow_interrupts()
    try:
        if options.write:
            every = {name: Results(name, root, options.results / name) for name in SETS}  # sections are of all sets
            write_pages(every)
            sets = {name: results for name, results in every.items() if results.is_complete()}
            if sets:
                draw_sets(sets, options.figures / "sets.svg")
        if options.show or options.write:
            for results in (results for results in found.values() if results.exists()):
                print(tables(results) + "\n")
                if options.write:
                    write_outputs(results, options.figures)
            return 0
        if options.repeat is not None:
            return max(repeat(options.repeat, results) for results in found.values())
        if options.time is not None:
            wanted = [timing(results, row) for results in found.values() for row in options.time]
            return train_runs(wanted, train_config, until)
        for name, results in found.items():
            if results.exists() and not options.resume:
                raise UserError(f"{results.folder} has results: add --resume to go on, or move them away")
            find_store(SETS[name].store, [root])  # before anything is trained
        for name, results in found.items():
            status = compare(name, root, results, until)
            if results.exists():
                print(tables(results), flush=True)
                write_outputs(results, options.figures)
            if until is not None and time.monotonic() > until:
                print("the time is over: the same command with --resume goes on", file=sys.stderr)
                return 0
            if status:
                return status
    except UserError as error:
        return fail(error, 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
