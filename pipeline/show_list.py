"""`raydml list KIND [PATTERN]`: what there is by name, one a line.

raydml list presets cub                 presets whose name contains cub
raydml list runs --storage s3://b/x     runs there, with their state and figures
raydml list backbones 'vit_*dino*'      a pattern with *, ? or [...] has to match the whole name
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
from collections.abc import Callable

from pipeline.console import aligned
from pipeline.errors import RunError, UserError, did_you_mean, fail
from pipeline.storage import Folder, home

PROG = "python -m pipeline.show_list"
Rows = list[tuple[str, ...]]  # a name, and what is said of it


def presets(storage: Folder) -> Rows:
    """Presets, with the title that their file begins with."""
    from pipeline.recipes import preset_names, preset_title

    return [(name, preset_title(name)) for name in preset_names()]


def runs(storage: Folder) -> Rows:
    """Runs below the storage: state, method, dataset, figures on the test classes."""
    from pipeline.runs.records import read_run, run_names

    rows: Rows = []
    for name in run_names(storage):
        try:
            run = read_run(storage / "runs" / name)
        except UserError as error:
            rows.append((name, str(error)))
        else:
            rows.append((name, run.state, run.setting("method.name"), run.setting("data.source"), run.headline))
    return rows


def sweeps(storage: Folder) -> Rows:
    """Sweeps below the storage: state, methods, trials, and the best trial of each method."""
    from pipeline.tuning.sweep_folder import sweep_folder, sweep_names
    from pipeline.tuning.watch import SweepReader
    from pipeline.tuning.watch_text import best_of_each, counts

    rows: Rows = []
    for name in sweep_names(storage):
        try:
            sweep = SweepReader(sweep_folder(storage.uri, name)).read()
        except UserError as error:
            rows.append((name, str(error)))
        else:
            state = "not started" if sweep.state is None else "silent" if sweep.silent_s else sweep.state.state
            trials = f"{len(sweep.records):,} trials{counts(sweep.records)}"
            rows.append((name, state, trials, best_of_each(sweep)))
    return rows


def tune_configs(storage: Folder) -> Rows:
    """Sweep files that come with the program, with the title that each begins with."""
    from pipeline.tuning.shipped import sweep_file_names, sweep_file_title

    return [(name, sweep_file_title(name)) for name in sweep_file_names()]


def datasets(storage: Folder) -> Rows:
    """Prepared datasets below the storage: images and classes of their splits."""
    from pipeline.data.find_store import MANIFEST, dataset_names

    rows: Rows = []
    for name in dataset_names(storage):
        splits = (storage / "data" / name).read_json(MANIFEST)["splits"]
        counts = (f"{s}: {c['images']:,} images of {c['classes']:,} classes" for s, c in splits.items())
        rows.append((name, "; ".join(counts)))
    return rows


def methods(storage: Folder) -> Rows:
    """Methods of METHODS, with the first line of their module."""
    from methods import METHODS

    lines = {n: (sys.modules[m.__module__].__doc__ or "").strip().splitlines() for n, m in METHODS.items()}
    return [(name, text[0] if text else "") for name, text in lines.items()]


def losses(storage: Folder) -> Rows:
    """Losses of `method.loss` of the baseline."""
    from methods.baseline import loss_classes

    return [(name,) for name in sorted(loss_classes())]


def miners(storage: Folder) -> Rows:
    """Miners of `method.miner` of the baseline."""
    from methods.baseline import miner_classes

    return [(name,) for name in sorted(miner_classes())]


def backbones(storage: Folder) -> Rows:
    """Networks of `model.backbone`."""
    from pipeline.model.backbones import backbone_names

    return [(name,) for name in backbone_names()]


KINDS: dict[str, Callable[[Folder], Rows]] = {
    f.__name__: f for f in (presets, runs, sweeps, tune_configs, datasets, methods, losses, miners, backbones)
}


def matches(name: str, pattern: str) -> bool:
    """True if a name matches a glob pattern as a whole, or contains a plain text, in any case of letters."""
    name, pattern = name.lower(), pattern.lower()
    return fnmatch.fnmatchcase(name, pattern) if any(c in pattern for c in "*?[") else pattern in name


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=tuple(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("pattern", nargs="?", default="", metavar="PATTERN", help="only names that match")
    parser.add_argument("--storage", help="of runs, sweeps and datasets (default: $RAYDML_HOME, else ~/raydml)")
    return parser


def main(arguments: list[str] | None = None, prog: str = PROG) -> int:
    """Exit status: 0 listed, 2 nothing matches or bad input."""
    options = build_parser(prog).parse_args(arguments)
    storage = Folder(options.storage or home())
    try:
        rows = KINDS[options.kind](storage)
        found = [row for row in rows if matches(row[0], options.pattern)]
        if rows and not found:
            hint = did_you_mean(options.pattern, [row[0] for row in rows])
            raise UserError(f"none of the {len(rows):,} {options.kind} matches {options.pattern!r}: {hint}")
    except (UserError, RunError) as error:
        return fail(error, 2)
    try:
        for line in aligned(found):
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not rows:
        print(f"no {options.kind} below {storage} yet", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
