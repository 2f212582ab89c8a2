"""Writes the answer of a sweep into its folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.tuning.answer import Answer, answer
from pipeline.tuning.leaderboard import leaderboard_csv
from pipeline.tuning.sweep_folder import ENSEMBLES, LEADERBOARD, PAGE, SWEEP, SweepFolder, TrialRecord

if TYPE_CHECKING:
    from pipeline.tuning.sweep_config import SweepConfig


def write_answer(folder: SweepFolder, sweep: SweepConfig, records: Sequence[TrialRecord], live: bool = False) -> Answer:
    """Writes leaderboard.csv and sweep.html, some 5 MB, also of a sweep that runs.

    Args:
        folder: The sweep's folder; its sweep.yaml is shown in the page.
        sweep: The sweep.
        records: All records of its trials.
        live: Leaves out the importance of the keys, which takes seconds a method.

    Returns:
        The answer, for `terminal_tables`.
    """
    from pipeline.tuning.importance import importance  # here: who only reads the answer needs no page
    from pipeline.tuning.sweep_page import sweep_page

    ensembles = folder.folder.read_json(ENSEMBLES) if folder.folder.exists(ENSEMBLES) else {}
    result = answer(sweep, records, ensembles)
    importances = {} if live else {method: importance(sweep, records, method) for method in sweep.methods}
    config = folder.folder.read(SWEEP).decode() if folder.folder.exists(SWEEP) else ""
    page = sweep_page(sweep, records, result, importances, config)
    folder.folder.write(LEADERBOARD, leaderboard_csv(result).encode())
    folder.folder.write(PAGE, page.encode())
    return result
