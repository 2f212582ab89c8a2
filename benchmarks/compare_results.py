"""The records of a comparison, kept beside the program."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.compare_runs import KeptRun, Wanted, kept_runs
from methods.config import Length
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.runs.run_folder import SUMMARY
from pipeline.storage import Folder
from pipeline.tuning.run_configs import run_configs
from pipeline.tuning.sweep_config import SweepConfig
from pipeline.tuning.sweep_file import read_sweep
from pipeline.tuning.sweep_folder import (
    SWEEP,
    TRIALS,
    SweepFolder,
    TrialRecord,
    final_trials,
    sweep_folder,
)

# Rows, each with its base; None: a baseline.
BASES: dict[str, str | None] = {
    "contrastive": None,
    "triplet_semihard": None,
    "multi_similarity": None,
    "multi_similarity_xbm": None,
    "normalized_softmax": None,
    "proxy_anchor": None,
    "osm_caa": "osm_caa_base",
    "intra_batch": "cross_entropy",
    "gca_hng_npair": "npair",
    "gca_hng_proxy_anchor": "proxy_anchor_neck",
    "smart_mining": "random_triplets",
    "mmsi_contrastive": "mmsi_contrastive_base",
    "mmsi_multi_similarity": "mmsi_multi_similarity_base",
}
ROWS = [name for row, base in BASES.items() for name in (row, base) if name is not None]
TITLES = {  # of rows, for readers
    "contrastive": "contrastive",
    "triplet_semihard": "semi-hard triplets",
    "multi_similarity": "multi-similarity",
    "multi_similarity_xbm": "multi-similarity with XBM",
    "normalized_softmax": "normalised softmax",
    "proxy_anchor": "Proxy-Anchor",
    "osm_caa": "OSM+CAA",
    "osm_caa_base": "contrastive over all pairs",
    "intra_batch": "Intra-Batch Connections",
    "cross_entropy": "cross-entropy",
    "gca_hng_npair": "GCA-HNG, N-pair",
    "npair": "N-pair",
    "gca_hng_proxy_anchor": "GCA-HNG, Proxy-Anchor",
    "proxy_anchor_neck": "Proxy-Anchor, same head",
    "smart_mining": "Smart Mining",
    "random_triplets": "random triplets",
    "mmsi_contrastive": "MMSI, contrastive",
    "mmsi_contrastive_base": "contrastive, same start",
    "mmsi_multi_similarity": "MMSI, multi-similarity",
    "mmsi_multi_similarity_base": "multi-similarity, same start",
}
MORE_SEEDS = "more_seeds"  # folder of runs beside the sweep's
FROZEN = "frozen.json"
METRICS = {"recall@1": "R@1", "map@r": "MAP@R"}
Figures = Mapping[str, Mapping[str, Mapping[int, float]]]  # percent on the test classes by metric, row and seed


def without_place(name: str, content: bytes) -> bytes:
    """A sweep's file without the machine that it was written on."""
    if name == SWEEP:
        return re.sub(rb"(?m)^storage: .*$", b"storage: ~/raydml", content)
    record = json.loads(content)
    return json.dumps({**record, "host": "", "pid": 0}, indent=1).encode()


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
        self._state: list[tuple[str, int, int]] = []  # of the files when they were read
        self._sweep: SweepConfig
        self._records: list[TrialRecord]

    def exists(self) -> bool:
        return (self.folder / SWEEP).exists()

    def collect(self) -> None:
        """Copies the records that are new or have changed."""
        if not self.sweep_folder.exists(SWEEP):
            return
        kept = Folder(self.folder)
        names = [SWEEP, *(f"{TRIALS}/{name}" for name in self.sweep_folder.names(TRIALS) if name.endswith(".json"))]
        for name in names:
            content = without_place(name, self.sweep_folder.read(name))
            if not kept.exists(name) or kept.read(name) != content:
                kept.write(name, content)
        self._collect_frozen()

    def _collect_frozen(self) -> None:
        """Keeps the figures of the pretrained trunk, which every final run measures first."""
        if (self.folder / FROZEN).exists():
            return
        finished = [r.runs[0].name for r in self.records() if r.stage == "final" and r.state == "finished"]
        for folder in (Folder(f"{self.root}/runs/{name}") for name in finished):
            if folder.exists(SUMMARY):
                figures = {metric: folder.read_json(SUMMARY)["frozen"][metric] for metric in METRICS}
                Folder(self.folder).write(FROZEN, (json.dumps(figures, indent=1) + "\n").encode())
                return

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
            elif name != SWEEP and without_place(name, self.sweep_folder.read(name)) != content:
                kept, there = json.loads(content), self.sweep_folder.read_json(name)
                if kept["state"] == "finished" != there["state"]:
                    self.sweep_folder.write(name, content)
                elif kept["state"] == there["state"] == "finished":
                    raise UserError(
                        f"{file} and {self.sweep_folder}/{name} are different trials: remove the sweep or the results"
                    )

    def sweep(self) -> SweepConfig:
        self._read()
        return self._sweep

    def records(self) -> list[TrialRecord]:
        self._read()
        return self._records

    def _read(self) -> None:
        """Reads the sweep's file and records again if one has changed: the tables ask for them hundreds of times.

        Raises:
            UserError: There are none.
        """
        if not self.exists():
            raise UserError(f"{self.folder} has no records of {self.name}: compare it first, or choose --sets")
        stats = [
            (file.name, file.stat()) for file in (self.folder / SWEEP, *sorted((self.folder / TRIALS).glob("*.json")))
        ]
        state = [(name, stat.st_mtime_ns, stat.st_size) for name, stat in stats]
        if state != self._state:
            folder = Folder(self.folder)
            self._sweep, self._records, self._state = read_sweep(folder), SweepFolder(folder).read(), state

    def frozen(self) -> dict[str, float]:
        """The pretrained trunk's pooled features on the test classes, in percent by metric; empty before a final run is finished."""
        file = self.folder / FROZEN
        return json.loads(file.read_text()) if file.exists() else {}

    def finals(self, row: str) -> list[TrialRecord]:
        """The finished final trials of a row, by seed.

        Raises:
            UserError: There is none.
        """
        found = [record for record in final_trials(self.records(), row) if record.state == "finished"]
        if not found:
            raise UserError(f"{self.folder} has no final run of {row}")
        return found

    def has(self, row: str) -> bool:
        """Whether there are finished final trials of a row."""
        return any(record.state == "finished" for record in final_trials(self.records(), row))

    def is_complete(self) -> bool:
        """Whether every row has its final trials, with every seed of the sweep."""
        if not self.exists():
            return False
        final, records = self.sweep().final, self.records()
        finished = {(r.method, r.seed) for r in records if r.stage == "final" and r.state == "finished"}
        return final is not None and all((row, seed) in finished for row in ROWS for seed in final.seeds)

    def config(self, record: TrialRecord, root: str) -> Config:
        """The configuration of a final run, in another storage."""
        sweep = self.sweep().model_copy(update={"storage": root})
        configs = run_configs(
            sweep, record.method, record.values, record.number, "final", length=record.length, seed=record.seed
        )
        return configs[0]

    def wanted(
        self, record: TrialRecord, kind: str, number: int, *, seed: int | None = None, steps: int | None = None
    ) -> Wanted:
        """A run beside the sweep's.

        Args:
            record: The final trial that it repeats.
            kind: Folder of its record.
            number: Number of its record among those of the row.
            seed: Its seed (none: the trial's).
            steps: Its length (none: the trial's).
        """
        config = self.config(record, self.root)
        length = config.length if steps is None else Length(value=steps, unit="steps")
        digest = hashlib.sha256(json.dumps([record.values, str(length)], sort_keys=True).encode()).hexdigest()[:6]
        name = f"compare-{self.name}-{kind.replace('_', '-')}-{record.method}-{number}-{digest}"
        changes = {"name": name, "length": length, "seed": config.seed if seed is None else seed}
        file = self.folder / kind / f"{record.method}-{number}.json"
        return Wanted(record.method, record.values, config.model_copy(update=changes), file)

    def sweep_runs(self, row: str) -> list[KeptRun]:
        """The sweep's own final runs of a row, by seed.

        Raises:
            UserError: There is none.
        """
        return [
            KeptRun(row, record.values, record.seed or 0, steps_of(record), record.runs[0].seconds, record.runs[0].test)
            for record in self.finals(row)
        ]

    def final_runs(self, row: str) -> list[KeptRun]:
        """The sweep's final runs of a row, and those with more seeds."""
        return self.sweep_runs(row) + self.kept_runs(MORE_SEEDS, row)

    def kept_runs(self, folder: str, row: str) -> list[KeptRun]:
        """The runs of a row in a folder beside the sweep's records, of the setting that the sweep chose."""
        return kept_runs(self.folder / folder, row, self.finals(row)[0].values)

    def figures(self) -> Figures:
        """Of the finished final runs; rows without one are left out."""
        return figures_of(run for row in ROWS if self.has(row) for run in self.final_runs(row))


def figures_of(runs: Iterable[KeptRun]) -> Figures:
    """Percent by metric, row and seed; without the seeds that a row has and its base has not, or the other way."""
    tests: dict[str, dict[int, dict[str, float]]] = {}
    for run in runs:
        tests.setdefault(run.row, {})[run.seed] = run.test
    for row, base in BASES.items():
        if row in tests and base in tests:
            both = tests[row].keys() & tests[base].keys()
            tests |= {name: {seed: tests[name][seed] for seed in sorted(both)} for name in (row, base)}
    return {
        metric: {row: {seed: test[metric] for seed, test in found.items()} for row, found in tests.items()}
        for metric in METRICS
    }


def steps_of(record: TrialRecord) -> int:
    """The length of a final trial."""
    return int(str(record.length).split()[0])
