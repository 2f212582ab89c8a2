"""Importance of each hyper-parameter, by fANOVA over the finished search trials of one method.

fANOVA (Hutter et al., ICML 2014, Optuna's implementation) fits a random forest to the scores and gives
each key the share of the forest's variance that the key explains by itself. Methods are never mixed, and
other evaluators answer other questions, so there is this one only. About 5 s for 120 trials.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.tuning.space import Space
from pipeline.tuning.sweep_folder import TrialRecord

if TYPE_CHECKING:
    from optuna import Study

    from pipeline.tuning.sweep_config import SweepConfig

MIN_TRIALS = 30
SEED = 0  # of the random forest
EVALUATOR = "fANOVA"


@dataclass(frozen=True)
class Importance:
    """Shares of the variance of one method's scores.

    Attributes:
        method: Its label.
        trials: Number of finished search trials, which it is computed from.
        shares: Share of each key, largest first, together 1; empty where there is none.
        left_out: Keys that not all of these trials have, such as those of one branch of a choice.
        reason: Why there is none.
    """

    method: str
    trials: int
    shares: dict[str, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    reason: str = ""


def importance(sweep: SweepConfig, records: Sequence[TrialRecord], method: str) -> Importance:
    """Importance of the keys of a method's space; only trials of full length count, as stopped ones have lower scores."""
    trials = [
        record
        for record in records
        if (record.stage, record.method, record.state) == ("search", method, "finished")
        and record.score is not None
        and math.isfinite(record.score)
    ]
    if sweep.scheduler.name == "pbt":
        return Importance(method, len(trials), reason="population-based training changes settings during a trial")
    if len(trials) < MIN_TRIALS:
        return Importance(method, len(trials), reason=f"needs {MIN_TRIALS} finished trials")
    if len({record.score for record in trials}) == 1:
        return Importance(method, len(trials), reason="all trials have the same score")
    space = Space(sweep.space_of(method))
    active = [space.distributions(record.values) for record in trials]
    key_of = {name: key for record in trials for name, key in space.names(record.values).items()}
    common = [name for name in key_of if all(name in names for names in active) and not active[0][name].single()]
    left_out = [key for name, key in key_of.items() if not all(name in names for names in active)]
    if len(common) < 2:
        return Importance(method, len(trials), left_out=left_out, reason="fewer than two keys that all trials have")
    shares = _fanova(space, trials, active, common)
    shares = {key_of[name]: shares[name] for name in sorted(common, key=lambda name: -shares[name])}
    return Importance(method, len(trials), shares, left_out)


def _fanova(
    space: Space, trials: Sequence[TrialRecord], active: Sequence[dict[str, Any]], common: list[str]
) -> dict[str, float]:
    """Share by name in the study."""
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # not a line for each study
    try:
        study: Study = optuna.create_study(direction="maximize")
    finally:
        optuna.logging.set_verbosity(level)
    study.add_trials(
        optuna.trial.create_trial(params=space.params(record.values), distributions=distributions, value=record.score)
        for record, distributions in zip(trials, active, strict=True)
    )
    return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=SEED), params=common)
