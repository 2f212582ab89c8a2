"""One change at a time in each of the five methods and its base: where a method gains on its base, and where it does not.

    python -m benchmarks.experiments [--only osm_caa mmsi] [--seeds 2] [--budget MINUTES] [--parallel 2] [--root FOLDER]
    python -m benchmarks.experiments --show                  the tables of the results that are there; trains nothing
    python -m benchmarks.experiments --write                 writes them into docs/methods

The experiments are in benchmarks/experiments.yaml: every run trains the preset `METHOD/emoji` on a core of its own with the first
validation fold held out and measures that fold at the end; test classes are not used. Runs are kept as JSON in
benchmarks/results/experiments/METHOD, and those that are there are not trained again, so a stopped command goes on. Those of MMSI start
from runs of `benchmarks.compare`, which are trained first. The time of one run is about two minutes; all with one seed take three hours
on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.compare import SEARCH_START, train_starts
from benchmarks.pages import ROOT, table, with_sections
from pipeline.recipes import merged, recipe_values
from pipeline.storage import Folder, home

EXPERIMENTS = Path(__file__).with_name("experiments.yaml")
RESULTS = Path(__file__).with_name("results") / "experiments"
METRICS = {"recall@1": "R@1", "map@r": "MAP@R"}
AS_IT_IS = "the preset"


@dataclass(frozen=True)
class Experiment:
    """One row of a method's table.

    Attributes:
        method: The method.
        title: What is changed.
        sides: What is set for the method and for its base.
    """

    method: str
    title: str
    sides: tuple[Mapping[str, Any], Mapping[str, Any]]


def experiments() -> Iterator[Experiment]:
    """All experiments of the file, each method's preset first."""
    file = yaml.safe_load(EXPERIMENTS.read_text())
    for method, entry in file["methods"].items():
        common = merged(file["settings"], entry.get("settings", {}))
        base = merged(common, entry["base"])
        yield _experiment(method, AS_IT_IS, common, base)
        for title, change in entry["both"].items():
            change = dict(change)
            of_base = change.pop("of base", {})
            yield _experiment(method, title, merged(common, change), merged(merged(base, change), of_base))
        for title, change in entry["own"].items():
            yield _experiment(method, title, _changed(method, common, change), base)


def _changed(method: str, settings: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with a change; a method of another name, which a recipe would start from nothing, keeps those of the preset."""
    if "name" in change.get("method", {}):
        kept = merged(recipe_values(preset(method)), settings)["method"]
        change = {**change, "method": {**kept, **change["method"]}}
    return merged(dict(settings), change)


def _experiment(method: str, title: str, *sides: Mapping[str, Any]) -> Experiment:
    """Validation and checkpoint are at the end alone."""
    ours, base = (merged(s, {k: {"every": s["length"]} for k in ("evaluation", "checkpoint")}) for s in sides)
    return Experiment(method, title, (ours, base))


def preset(method: str) -> str:
    return f"{method}/emoji"


def record_of(method: str, settings: Mapping[str, Any], seed: int, results: Path) -> Path:
    """The file of a run; runs of the same preset and settings share it."""
    values = [recipe_values(preset(method)), settings]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]
    return results / method / f"{digest}-{seed}.json"


def train(method: str, settings: Mapping[str, Any], seed: int, root: str) -> dict[str, float]:
    """Trains a run in a process of its own; returns its figures."""
    with tempfile.TemporaryDirectory(prefix="raydml-experiment-") as folder:
        name = f"experiment-{method}-{record_of(method, settings, seed, Path()).stem}"
        recipe = Path(folder) / "recipe.yaml"
        values = merged({"preset": preset(method), "name": name, "storage": root, "seed": seed}, settings)
        recipe.write_text(yaml.safe_dump(values))
        command = [sys.executable, "-m", "pipeline.train", str(recipe)]
        process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        said = process.stderr.strip().splitlines()[-1:] or [f"ended with status {process.returncode}"]
        raise RuntimeError(f"{name}: {said[0]}")
    return figures_of_run(Path(root) / "runs" / name)


def figures_of_run(run: Path) -> dict[str, float]:
    """Of a run's folder: the metrics of its last validation, seconds in training steps, and the mean norm of the gradient."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "validation"][-1]
    seconds = json.loads((run / "summary.json").read_text())["seconds"]
    norms = [line["gradient/main"] for line in lines if "gradient/main" in line]  # steps that train nothing have none
    return {**{metric: last[metric] for metric in METRICS}, "seconds": seconds, "gradient": statistics.mean(norms)}


def train_missing(
    rows: Sequence[Experiment],
    seeds: int,
    results: Path,
    parallel: int,
    until: float | None,
    run: Callable[[str, Mapping[str, Any], int], dict[str, float]],
) -> list[str]:
    """Trains what has no record, all rows with the first seed, then with the next; returns what failed."""
    work = {}
    for seed in range(seeds):
        for row in rows:
            for settings in row.sides:
                file = record_of(row.method, settings, seed, results)
                if not file.exists():
                    work.setdefault(file, (row, settings, seed))  # rows of the same base share its run

    def one(file: Path) -> str:
        row, settings, seed = work[file]
        if until is not None and time.monotonic() > until:
            return ""
        try:
            figures = run(row.method, settings, seed)
        except RuntimeError as error:
            return f"{row.method}, {row.title}: {error}"
        record = json.dumps({"settings": settings, "seed": seed, **figures}, indent=1) + "\n"
        Folder(file.parent).write(file.name, record.encode())
        side = "" if settings == row.sides[0] else ", its base"
        print(f"{row.method}{side}, {row.title}, seed {seed}: {figures['recall@1']:.1f}", file=sys.stderr, flush=True)
        return ""

    with ThreadPoolExecutor(parallel) as pool:
        return [failed for failed in pool.map(one, work) if failed]


def experiments_table(method: str, rows: Sequence[Experiment], seeds: int, results: Path) -> str:
    """A method's experiments in Markdown; those without a record are left out."""
    metrics = [*METRICS.values()]
    header = [
        method,
        *metrics,
        *(f"its base: {metric}" for metric in metrics),
        *(f"difference: {metric}" for metric in metrics),
    ]
    lines = []
    for row in rows:
        files = [[record_of(method, settings, seed, results) for settings in row.sides] for seed in range(seeds)]
        pairs = [[json.loads(f.read_text()) for f in pair] for pair in files if all(f.exists() for f in pair)]
        if not pairs:
            continue
        cells = [f"{statistics.mean(p[side][m] for p in pairs):.1f}" for side in (0, 1) for m in METRICS]
        cells += [f"{statistics.mean(p[0][m] - p[1][m] for p in pairs):+.1f}" for m in METRICS]
        for what in ("gradient", "seconds"):
            cells.append(f"{statistics.mean(p[0][what] / p[1][what] for p in pairs):.2f}")
        lines.append([row.title, *cells, str(len(pairs))])
    return table([*header, "gradient / base's", "s / base's", "seeds"], lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rows = list(experiments())
    methods = list(dict.fromkeys(row.method for row in rows))
    parser.add_argument("--only", nargs="+", choices=methods, default=methods)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="start no run after this time")
    parser.add_argument("--parallel", type=int, default=2, help="runs at once, of one thread each")
    parser.add_argument("--show", action="store_true", help="print the tables of the results that are there")
    parser.add_argument("--write", action="store_true", help="as --show, and the tables into docs/methods")
    parser.add_argument("--root", default=home(), help="storage of the dataset and the runs (default: $RAYDML_HOME)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records (default: %(default)s)")
    options = parser.parse_args()
    failed: list[str] = []
    if not (options.show or options.write):
        until = time.monotonic() + 60 * options.budget if options.budget else None
        if "mmsi" in options.only and (status := train_starts("emoji", options.root, until, [SEARCH_START])):
            return status
        chosen = [row for row in rows if row.method in options.only]
        failed = train_missing(
            chosen, options.seeds, options.results, options.parallel, until,
            lambda method, settings, seed: train(method, settings, seed, options.root),
        )  # fmt: skip
    for method in options.only:
        text = experiments_table(method, [row for row in rows if row.method == method], options.seeds, options.results)
        print(text + "\n")
        if options.write and options.results.joinpath(method).exists():
            page = ROOT / "docs" / "methods" / f"{method}.md"
            page.write_text(with_sections(page.read_text(), "experiments", lambda _, text=text: text))
    print("\n".join(failed), file=sys.stderr, end="\n" if failed else "")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
