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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.compare_figures import draw, draw_sets
from benchmarks.compare_pages import write_pages
from benchmarks.compare_results import METRICS, ROWS, Results
from benchmarks.compare_runs import train_runs
from benchmarks.compare_seeds import more_seeds
from benchmarks.compare_tables import tables, write_leaderboard
from benchmarks.compare_time import REFERENCE, TIMINGS, equal_time, more_timings, time_figures, timed_runs, timing
from pipeline.config import Config, to_yaml
from pipeline.data.find_store import find_store
from pipeline.errors import UserError, fail
from pipeline.runs.run_folder import SUMMARY
from pipeline.storage import Folder, home

SWEEP = Path(__file__).with_name("compare.yaml")
RESULTS = Path(__file__).with_name("results") / "compare"


PROXIES = {  # rows whose loss has proxies, each with what is tried first on birds beside the rate: with fewer classes, the usual scale
    "proxy_anchor": "method.loss_args.alpha: 32",
    "proxy_anchor_neck": "method.proxy_scale: 32",
    "gca_hng_proxy_anchor": "method.proxy_scale: 32",
    "normalized_softmax": "method.loss_args.temperature: 0.05",
}
MMSI = ("contrastive", "contrastive_base", "multi_similarity", "multi_similarity_base")


@dataclass(frozen=True)
class DataSet:
    """What is particular to a dataset.

    Attributes:
        store: Name of the prepared dataset.
        settings: What is set for all rows.
        sweep: What is set in the sweep.
        rates: Factor of learning rates, those of losses with proxies aside.
        start: Length of the runs that MMSI starts from.
    """

    store: str
    settings: tuple[str, ...]
    sweep: tuple[str, ...] = ()
    rates: float = 1.0
    start: str = "200 steps"


SMALL = ("data.transforms.size=64", "data.transforms.evaluation_scale=1")
SETS = {
    "emoji": DataSet("emoji", SMALL),
    "icons": DataSet("icons", ("data.source=icons", *SMALL)),
    "birds": DataSet(
        "cub",
        (
            "data.source=cub",
            "data.transforms.size=112",
            "data.transforms.resize=140",
            "data.transforms.evaluation_scale=1",
            "data.transforms.crop_scale=[0.25, 1]",
            "data.transforms.flip=0.5",
            "method.embedding_dim=512",
            "method.optimizer.lr=1e-4",  # of the runs that MMSI starts from; trials have their own
            "method.optimizer.head_lr_multiplier=1",
        ),
        (
            "settings.length=75 steps",
            "settings.evaluation.every=75 steps",
            "final.length=100 steps",
            *(  # whose classifier, from nothing, is of the head's group
                f"methods.{row}.settings.method.optimizer.head_lr_multiplier=40"
                for row in ("cross_entropy", "intra_batch")
            ),
            *(
                setting
                for row, scale in PROXIES.items()
                for setting in (
                    f"methods.{row}.points=[{{method.optimizer.lr: 1.0e-4, {scale}}}]",
                    f"methods.{row}.settings.method.optimizer.loss_lr_multiplier=100",
                )
            ),
            *(f"methods.mmsi_{row}.settings.method.meta_start=10 steps" for row in MMSI),  # its memory fills sooner
        ),
        rates=0.2,
        start="100 steps",
    ),
}
# MMSI starts from its base: `meta=false`, by loss.
STARTS = {
    "contrastive": ["loss=contrastive", "margin=0.5", "norm_scope=all", "w_init=0"],
    "multi_similarity": ["loss=multi_similarity"],
}
POLL_S = 5.0
FIGURES = Path(__file__).parents[1] / "docs" / "images" / "compare"


def start_name(dataset: str, loss: str, where: str) -> str:
    return f"compare-{dataset}-start-{loss}-{where}"


def sweep_file(dataset: str, folder: Path) -> Path:
    """The sweep with the set's learning rates and the names of the runs that MMSI starts from."""
    values = yaml.safe_load(SWEEP.read_text().replace("START-", f"compare-{dataset}-start-"))
    key, factor = "method.optimizer.lr", SETS[dataset].rates
    spaces = [values["space"]]
    values["methods"] = {row: copy.deepcopy(entry) for row, entry in values["methods"].items()}  # rows share anchors
    for row, entry in values["methods"].items():
        if row not in PROXIES:
            spaces.append(entry["space"])
            for point in entry["points"]:
                point[key] *= factor
    for space in spaces:
        for kind, (low, high) in space.get(key, {}).items():
            space[key] = {kind: [low * factor, high * factor]}
    file = folder / f"compare-{dataset}.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def sweep_values(dataset: str) -> list[str]:
    """What is set in a set's sweep."""
    return [*(f"settings.{value}" for value in SETS[dataset].settings), *SETS[dataset].sweep]


def run(command: Sequence[str], root: str, until: float | None = None, results: Results | None = None) -> int:
    """Runs a command in a storage, copying a sweep's records meanwhile; interrupts it when the time is over. Returns its status."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; commands would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = os.environ | {"RAYDML_HOME": root}  # where the names of runs to start from are looked up
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
    except KeyboardInterrupt:  # also where only this process gets it; the command keeps what it has
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    finally:
        if results is not None:
            results.collect()
    return process.returncode


def settings(values: Sequence[str]) -> list[str]:
    return [text for value in values for text in ("--set", value)]


def train_starts(dataset: str, root: str, until: float | None) -> int:
    """The checkpoints of both bases that MMSI starts from: without fold 0, for the search, and on all training classes."""
    for loss, method in STARTS.items():
        for where, fold in (("fold0", "0"), ("all", "null")):
            name = start_name(dataset, loss, where)  # if it is finished, the command checks that it is this run
            values = [
                *SETS[dataset].settings,
                *(f"method.{key}" for key in ("meta=false", "classes_per_batch=19", *method)),
                *(f"name={name}", f"storage={root}", f"data.validation_fold={fold}", "evaluation.test=false"),
                *("runtime.workers=0", "runtime.loader=in_process", f"length={SETS[dataset].start}"),
            ]
            status = run(["pipeline.train", "mmsi/emoji", *settings(values)], root, until)
            if status:
                return status
    return 0


def compare(dataset: str, root: str, results: Results, until: float | None) -> int:
    """Trains what is missing of a set's comparison, until it is finished or the time is over; returns the status."""
    results.restore()
    status = train_starts(dataset, root, until)
    if status == 0 and (until is None or time.monotonic() < until):
        with tempfile.TemporaryDirectory(prefix="raydml-compare-") as folder:
            command = ["pipeline.tune", str(sweep_file(dataset, Path(folder)))]
            at_once = f"trials_at_once={len(os.sched_getaffinity(0))}"  # of a thread; mining servers share their core
            values = [f"name=compare-{dataset}", f"storage={root}", at_once, *sweep_values(dataset)]
            status = run([*command, *settings(values)], root, until, results)
    results.collect()
    for wanted in (more_seeds, *[more_timings] * TIMINGS, equal_time):
        if status == 0:
            status = train_runs([*wanted(results)], train, until)
    return status


def train(root: str, config: Config) -> int:
    """Trains a configuration in a storage; returns the command's status."""
    with tempfile.TemporaryDirectory(prefix="raydml-compare-") as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(to_yaml(config))
        return run(["pipeline.train", str(recipe)], root)


def write_outputs(results: Results, figures: Path) -> None:
    """The leaderboard beside the records, and a figure a table."""
    write_leaderboard(results)
    if not any(results.has(row) for row in ROWS):
        return
    figures.mkdir(parents=True, exist_ok=True)
    draw(f"{results.name}, equal images seen", results.figures(), results.frozen(), figures / f"{results.name}.svg")
    if timed := timed_runs(results):
        title = f"{results.name}, equal wall time: that of {REFERENCE}"
        draw(title, time_figures(timed), results.frozen(), figures / f"{results.name}-time.svg")


def repeat(row: str, results: Results) -> int:
    """Trains the final runs of a row again, in a storage of its own, and prints both figures; 1 if they differ."""
    different, record, runs = 0, results.finals(row)[0], results.final_runs(row)
    if row.startswith("mmsi") and (status := train_starts(results.name, results.root, None)):
        return status
    for kept in runs:
        with tempfile.TemporaryDirectory(prefix="raydml-repeat-") as folder:
            os.symlink(f"{results.root}/data", f"{folder}/data")
            os.mkdir(f"{folder}/runs")
            for loss in STARTS:  # what MMSI starts from
                name = start_name(results.name, loss, "all")
                if os.path.isdir(f"{results.root}/runs/{name}"):
                    os.symlink(f"{results.root}/runs/{name}", f"{folder}/runs/{name}")
            config = results.config(record, folder).model_copy(update={"seed": kept.seed})
            if train(folder, config):
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
    try:
        if options.write:
            write_pages(found)
            sets = {name: results for name, results in found.items() if results.is_complete()}
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
            return train_runs(wanted, train, until)
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
