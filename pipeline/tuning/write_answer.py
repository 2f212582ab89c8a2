"""Writes the answer of a sweep into its folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.tuning.answer import Answer, answer
from pipeline.tuning.leaderboard import leaderboard_csv
from pipeline.tuning.sweep_folder import ENSEMBLES, LEADERBOARD, SweepFolder, TrialRecord

if TYPE_CHECKING:
    from pipeline.tuning.sweep_config import SweepConfig


def write_answer(folder: SweepFolder, sweep: SweepConfig, records: Sequence[TrialRecord]) -> Answer:
    """Writes leaderboard.csv, also of a sweep that runs.

    Returns:
        The answer, for `terminal_tables`.
    """
    ensembles = folder.folder.read_json(ENSEMBLES) if folder.folder.exists(ENSEMBLES) else {}
    result = answer(sweep, records, ensembles)
    folder.folder.write(LEADERBOARD, leaderboard_csv(result).encode())
    return result
