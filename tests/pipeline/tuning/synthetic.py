"""Sweeps with made-up records: what a driver would have written."""

from __future__ import annotations

import random
from typing import Any

from pipeline.tuning.sweep_config import FinalConfig, SweepConfig
from pipeline.tuning.sweep_folder import RunProgress, State, TrialRecord, best_trial

METRICS = ("recall@1", "map@r")


def make_sweep(methods: tuple[str, ...] = ("a", "b"), **values: Any) -> SweepConfig:
    entries = {method: {"space": {"method.optimizer.lr": {"log_uniform": [1e-4, 1e-2]}}} for method in methods}
    return SweepConfig.model_validate({"name": "made_up", "methods": entries, **values})


def search(
    number: int, method: str, score: float | None, lr: float = 1e-3, state: State = "finished", **values: Any
) -> TrialRecord:
    """A search trial of one run, on fold 0."""
    figures = {"map@r": score, "recall@1": score + 30, "queries": 50.0} if score is not None else {}
    run = RunProgress(f"made_up-{number:05d}-fold0-seed0", 0, 0, state, 1000, 10.0, best=figures, last=figures)
    defaults: dict[str, Any] = {"busy_s": 36.0, "starts": 1}
    return TrialRecord(
        number, "search", method, {"method.optimizer.lr": lr}, state=state, runs=[run], score=score, **defaults | values
    )


def final(
    number: int, method: str, seed: int, figures: list[float], lr: float = 1e-3, folds: bool = False
) -> TrialRecord:
    """The final runs of one seed: one, or one a fold, with its MAP@R on the test classes."""
    runs = []
    for fold, value in enumerate(figures):
        name = f"made_up-{number:05d}-{f'fold{fold}' if folds else 'all'}-seed{seed}"
        test = {"map@r": value, "recall@1": value + 30, "queries": 70.0}
        runs.append(RunProgress(name, fold if folds else None, seed, "finished", 2000, 20.0, test=test))
    values: dict[str, Any] = {"starts": 1, "busy_s": 72.0, "gpus": 1.0}
    return TrialRecord(
        number, "final", method, {"method.optimizer.lr": lr}, seed=seed, state="finished", runs=runs, **values
    )


def large_sweep(
    num_trials: int, methods: tuple[str, ...] = ("triplet", "proxy_anchor")
) -> tuple[SweepConfig, list[TrialRecord]]:
    """Many search trials with curves, and five final runs a method; the score falls with the distance of lr from 1e-3."""
    rng = random.Random(0)
    space = {
        "method.optimizer.lr": {"log_uniform": [1e-4, 1e-2]},
        "method.embedding_dim": {"choice": [64, 128, 512]},
        "method.loss_args.margin": {"uniform": [0.0, 0.5]},
        "method.optimizer.schedule.kind": {
            "choice": {
                "cosine": {"method.optimizer.schedule.warmup": {"choice": ["10 steps", "20 steps"]}},
                "constant": {},
            }
        },
    }
    sweep = make_sweep(methods).model_copy(update={"name": "large", "space": space, "final": FinalConfig()})
    records = []
    for number in range(num_trials):
        method = methods[number % len(methods)]
        lr = 10 ** rng.uniform(-4, -2)
        values: dict[str, Any] = {
            "method.optimizer.lr": lr,
            "method.embedding_dim": rng.choice([64, 128, 512]),
            "method.loss_args.margin": rng.uniform(0, 0.5),
            "method.optimizer.schedule.kind": rng.choice(["cosine", "constant"]),
        }
        if values["method.optimizer.schedule.kind"] == "cosine":
            values["method.optimizer.schedule.warmup"] = rng.choice(["10 steps", "20 steps"])
        top = 40 - 20 * abs(rng.gauss(0, 0.1) + (lr / 1e-3 - 1) / 10) + values["method.embedding_dim"] / 100
        stopped = rng.random() < 0.4
        length = 5 if stopped else 20
        curve = []
        for i in range(1, length + 1):
            value = top * (1 - 0.5 ** (i / 3)) + rng.gauss(0, 0.3)
            curve.append({"step": 10 * i, "epoch": i / 2, "images": 1000 * i, "seconds": 5.0 * i, "map@r": value, "recall@1": value + 20})  # fmt: skip
        best = max(curve, key=lambda point: point["map@r"])
        record = search(number, method, best["map@r"], state="stopped" if stopped else "finished")
        record.values = values
        record.runs[0].curve = curve
        record.runs[0].images = 1000 * length
        record.busy_s = 60.0 * length
        record.gpus = 1.0
        records.append(record)
    records[3].state, records[3].error, records[3].score = "failed", "out of memory on rank 0", None
    for method in methods:
        chosen = best_trial(records, method)
        assert chosen is not None
        for seed in range(5):
            record = final(len(records), method, seed, [(chosen.score or 0) - 5 + rng.gauss(0, 0.5)])
            record.values = chosen.values
            records.append(record)
    return sweep, records
