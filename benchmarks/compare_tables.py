"""The records of a comparison, kept beside the program, and the tables that are made of them alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.storage import Folder
from pipeline.tuning.answer import answer
from pipeline.tuning.leaderboard import leaderboard_csv, short_estimate
from pipeline.tuning.run_configs import run_configs
from pipeline.tuning.statistics import Estimate, estimate
from pipeline.tuning.sweep_config import SweepConfig
from pipeline.tuning.sweep_file import read_sweep
from pipeline.tuning.sweep_folder import (
    LEADERBOARD,
    SWEEP,
    TRIALS,
    SweepFolder,
    TrialRecord,
    best_trial,
    final_trials,
    sweep_folder,
)

# Rows, each with its base; None: a baseline.
BASES: dict[str, str | None] = {
    "contrastive": None,
    "triplet_semihard": None,
    "multi_similarity": None,
    "multi_similarity_xbm": None,
    "proxy_anchor": None,
    "normalized_softmax": None,
    "osm_caa": "osm_caa_base",
    "intra_batch": "intra_batch_base",
    "gca_hng_npair": "gca_hng_npair_base",
    "gca_hng_proxy_anchor": "gca_hng_proxy_anchor_base",
    "smart_mining": "smart_mining_base",
    "mmsi_contrastive": "mmsi_contrastive_base",
    "mmsi_multi_similarity": "mmsi_multi_similarity_base",
}
ROWS = [name for row, base in BASES.items() for name in (row, base) if name is not None]
METRICS = {"recall@1": "R@1", "map@r": "MAP@R"}


class Results:
    """The kept records of one set, and the sweep's folder that they come from.

    Args:
        name: The set.
        root: The storage in which the sweep runs.
        folder: Where its records are kept.
    """

    def __init__(self, name: str, root: str, folder: Path) -> None:
        self.name = name
        self.root = root
        self.folder = folder
        self.sweep_folder = sweep_folder(root, f"compare-{name}")

    def exists(self) -> bool:
        return (self.folder / SWEEP).exists()

    def collect(self) -> None:
        """Copies the records that are new or have changed."""
        if not self.sweep_folder.exists(SWEEP):
            return
        (self.folder / TRIALS).mkdir(parents=True, exist_ok=True)
        names = [SWEEP, *(f"{TRIALS}/{name}" for name in self.sweep_folder.names(TRIALS) if name.endswith(".json"))]
        for name in names:
            content, kept = self.sweep_folder.read(name), self.folder / name
            if not kept.exists() or kept.read_bytes() != content:
                kept.write_bytes(content)

    def restore(self) -> None:
        """Gives kept records to a storage that has none of them, so that the sweep goes on from them.

        Raises:
            UserError: A trial that is finished in both is another one.
        """
        if not self.exists():
            return
        for file in [self.folder / SWEEP, *sorted((self.folder / TRIALS).glob("*.json"))]:
            name, content = str(file.relative_to(self.folder)), file.read_bytes()
            if not self.sweep_folder.exists(name):
                self.sweep_folder.write(name, content)
            elif name != SWEEP and self.sweep_folder.read(name) != content:
                kept, there = json.loads(content), self.sweep_folder.read_json(name)
                if kept["state"] == "finished" != there["state"]:
                    self.sweep_folder.write(name, content)
                elif kept["state"] == there["state"] == "finished":
                    raise UserError(
                        f"{file} and {self.sweep_folder}/{name} are different trials: remove the sweep or the results"
                    )

    def sweep(self) -> SweepConfig:
        return read_sweep(Folder(self.folder))

    def records(self) -> list[TrialRecord]:
        return SweepFolder(Folder(self.folder)).read()

    def finals(self, row: str) -> list[TrialRecord]:
        """The finished final trials of a row, by seed.

        Raises:
            UserError: There is none.
        """
        found = [record for record in final_trials(self.records(), row) if record.state == "finished"]
        if not found:
            raise UserError(f"{self.folder} has no final run of {row}")
        return found

    def config(self, record: TrialRecord, root: str) -> Config:
        """The configuration of a final run, in another storage."""
        sweep = self.sweep().model_copy(update={"storage": root})
        configs = run_configs(
            sweep, record.method, record.values, record.number, "final", length=record.length, seed=record.seed
        )
        return configs[0]

    def write_leaderboard(self) -> None:
        (self.folder / LEADERBOARD).write_text(leaderboard_csv(answer(self.sweep(), self.records(), {})))


def tables(results: Results) -> str:
    """The tables of a set, in Markdown: rows beside their bases; baselines; what chose them and what they cost."""
    results.write_leaderboard()
    records, sweep = results.records(), results.sweep()
    seeds = sweep.final.seeds if sweep.final is not None else []
    lines = [f"### {results.name}", ""]
    lines += _table(
        ("row", "R@1", "MAP@R", "its base", "R@1", "MAP@R", "R@1, paired", "MAP@R, paired"),
        (_beside_base(records, row, base) for row, base in BASES.items() if base is not None),
    )
    lines += [
        "",
        *_table(("baseline", "R@1", "MAP@R"), (_alone(records, row) for row, base in BASES.items() if base is None)),
    ]
    lines += [
        "",
        *_table(
            ("row", "search trials", "chosen by validation MAP@R", "setting", "seeds", "s"),
            (_cost(records, r) for r in ROWS),
        ),
    ]
    lines += [
        "",
        f"(Mean over seeds {', '.join(map(str, seeds))} with Student's 95 % interval; paired: difference by seed. Any row again: "
        f"`python -m benchmarks.compare --sets {results.name} --repeat ROW`.)",
    ]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Iterator[Sequence[str]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(row)} |" for row in cells]


def _values(records: Sequence[TrialRecord], row: str, metric: str) -> dict[int, float]:
    """A metric of a row's final runs on the test classes, by seed."""
    finals = [record for record in final_trials(records, row) if record.state == "finished"]
    return {record.seed or 0: record.runs[0].test[metric] for record in finals if record.runs[0].test}


def _estimate(values: Sequence[float]) -> Estimate | None:
    return estimate(values) if values else None


def _alone(records: Sequence[TrialRecord], row: str) -> list[str]:
    return [f"`{row}`", *(short_estimate(_estimate([*_values(records, row, metric).values()])) for metric in METRICS)]


def _beside_base(records: Sequence[TrialRecord], row: str, base: str) -> list[str]:
    """A row, its base, and their differences over the seeds that both have."""
    differences = []
    for metric in METRICS:
        own, other = _values(records, row, metric), _values(records, base, metric)
        found = _estimate([own[seed] - other[seed] for seed in sorted(own) if seed in other])
        text = short_estimate(found, signed=True)
        above = found is not None and found.low is not None and found.low > 0
        differences.append(f"**{text}**" if above else text)
    return [*_alone(records, row), *_alone(records, base), *differences]


def _cost(records: Sequence[TrialRecord], row: str) -> list[str]:
    searched = [r for r in records if r.stage == "search" and r.method == row and r.state == "finished"]
    finals = [r for r in final_trials(records, row) if r.state == "finished"]
    best = best_trial(records, row)
    setting = (
        ", ".join(f"{key.removeprefix('method.')} {value:.3g}" for key, value in best.values.items()) if best else ""
    )
    seconds = sum(run.seconds for r in finals for run in r.runs) / max(len(finals), 1)
    score = "" if best is None or best.score is None else f"{best.score:.1f}"
    return [f"`{row}`", str(len(searched)), score, setting, str(len(finals)), f"{seconds:.0f}" if finals else ""]
