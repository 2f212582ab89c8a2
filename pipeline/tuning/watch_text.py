"""What `raydml watch` shows: tables of a sweep at one moment, and lines of what changed between two."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.runs.following import Rows, Table, View, span
from pipeline.tuning.sweep_folder import STATES, TrialRecord, best_trial, final_trials
from pipeline.tuning.watch import Snapshot, SweepReader

MOST_RUNNING, MOST_PROBLEMS = 20, 8  # rows that are shown
_ENDS = {
    "finished": "the sweep is finished",
    "stopped": "the sweep was stopped; the same command continues it",
    "failed": "the sweep has ended, some trials failed; the same command tries them again",
}


def sweep_view(reader: SweepReader) -> View[Snapshot]:
    return View("the sweep", reader.read, headlines, tables, changes, as_json)


def headlines(sweep: Snapshot) -> Iterator[str]:
    """State, numbers of trials, what was spent, and whether the sweep is alive."""
    state = "not started yet" if sweep.state is None else sweep.state.state
    last = "" if sweep.newest is None else f"; last record {span(sweep.now - sweep.newest)} ago"
    yield f"{sweep.name}: {state}, {len(sweep.records):,} trials{counts(sweep.records)}{last}"
    yield f"spent: {spent(sweep)}; budget: {budget(sweep.budget)}"
    if sweep.silent_s:
        yield silence(sweep)
    if sweep.ended and sweep.state is not None:
        message = f": {sweep.state.message}" if sweep.state.message else ""
        yield _ENDS[sweep.state.state] + message


def tables(sweep: Snapshot) -> list[Table]:
    """Methods, running trials, and retries and errors; a table that would be empty is left out."""
    found = [Table("methods", methods(sweep)), Table("running trials", running(sweep))]
    lines = [line for record in sweep.records for line in problems(record)]
    left_out = len(lines) - MOST_PROBLEMS
    rows: Rows = [("retries and errors",), *((line,) for line in lines[-MOST_PROBLEMS:])]
    if left_out > 0:
        rows.insert(1, (f"... {left_out:,} earlier ones",))
    return [table for table in [*found, Table("", rows)] if len(table.rows) > 1]


def methods(sweep: Snapshot) -> Rows:
    """A row a method: its search trials by state, its final runs, and its best trial so far."""
    rows: Rows = [("method", *STATES, "final", f"best {sweep.metric}", "trial", "setting")]
    for label in sweep.methods:
        own = [record for record in sweep.records if record.method == label]
        states = [record.state for record in own if record.stage == "search"]
        final = sum(record.state == "finished" for record in final_trials(own, label))
        best = best_trial(own, label)
        shown = ("-", "-", "-")
        if best is not None:
            shown = (f"{best.score:.2f}", str(best.number), setting(best.values))
        rows.append((label, *(str(states.count(s)) for s in STATES), f"{final} of {sweep.final_seeds}", *shown))
    return rows


def best_of_each(sweep: Snapshot) -> str:
    """Score of the best trial of each method: "map@r 31.00 triplet, 20.25 contrastive"."""
    best = ((best_trial(sweep.records, label), label) for label in sweep.methods)
    found = ", ".join(f"{record.score:.2f} {label}" for record, label in best if record is not None)
    return f"{sweep.metric} {found}" if found else ""


def running(sweep: Snapshot) -> Rows:
    """A row a running trial."""
    rows: Rows = [("trial", "method", "done", "images", sweep.metric, "log")]
    found = [record for record in sweep.records if record.state == "running"]
    for record in found[:MOST_RUNNING]:
        log = log_line(sweep.logs.get(record.number, {}))
        rows.append((str(record.number), titled(record), done(record), f"{record.images:,}", score(record), log))
    if len(found) > MOST_RUNNING:
        rows.append((f"... {len(found) - MOST_RUNNING:,} more", *[""] * 5))
    return rows


def problems(record: TrialRecord) -> Iterator[str]:
    """A line for each retry and for the error of a trial."""
    for reason in record.retried:
        yield f"{name(record)} is started again: {reason}"
    if record.error is not None:
        yield f"{name(record)} failed: {record.error}"


def changes(before: Snapshot, after: Snapshot) -> Iterator[str]:
    """What happened between two moments, a line each."""
    old = {record.number: record for record in before.records}
    for record in after.records:
        yield from _trial_changes(old.get(record.number), record, after.metric)
    for label in after.methods:
        best, was = best_trial(after.records, label), best_trial(before.records, label)
        if best is not None and (was is None or (best.number, best.score) != (was.number, was.score)):
            yield f"best of {label}: {after.metric} {best.score:.2f}, trial {best.number}: {setting(best.values)}"
    if bool(after.silent_s) != bool(before.silent_s):
        yield silence(after) if after.silent_s else "the sweep gives signs of life again"
    if after.state is not None and (before.state is None or after.state.state != before.state.state):
        yield "the sweep runs" if after.state.state == "running" else list(headlines(after))[-1]


def _trial_changes(old: TrialRecord | None, new: TrialRecord, metric: str) -> Iterator[str]:
    if old is None:
        yield f"{name(new)} is started: {setting(new.values)}"
    yield from list(problems(new))[0 if old is None else len(list(problems(old))) :]
    was = "running" if old is None else old.state
    if new.state != was:
        result = "" if new.score is None else f", {metric} {new.score:.2f}"
        yield f"{name(new)} {'goes on' if new.state == 'running' else f'is {new.state}'}{result}, {new.images:,} images"
    elif old is not None and new.state == "running" and (new.score, new.images) != (old.score, old.images):
        yield f"{name(new)}: {metric} {score(new)}, {new.images:,} images, {done(new)} done"


def silence(sweep: Snapshot) -> str:
    return f"no sign of life for {sweep.silent_s:.0f} s: if the sweep's command is no longer there, the same command continues it"


def counts(records: Sequence[TrialRecord]) -> str:
    """Numbers of trials by state: ": 2 running, 8 finished"."""
    numbers = ((sum(record.state == state for record in records), state) for state in STATES)
    text = ", ".join(f"{number:,} {state}" for number, state in numbers if number)
    return f": {text}" if text else ""


def spent(sweep: Snapshot) -> str:
    """Time of all trials together, GPU-hours, and wall time."""
    seconds = {record.number: _seconds(record, sweep.now) for record in sweep.records}
    gpu_hours = sum(record.gpus * seconds[record.number] for record in sweep.records) / 3600
    since = min((record.started_at for record in sweep.records if record.started_at), default=None)
    wall = "" if since is None else f", {span(_end(sweep) - since)} since the first"
    return f"{span(math.fsum(seconds.values()))} of trials, {gpu_hours:.2f} GPU-hours{wall}"


def _seconds(record: TrialRecord, now: float) -> float:
    """Wall time of a trial; of a running one that was started again, only that of its earlier starts is known."""
    if record.state == "running" and record.starts == 1 and record.started_at:
        return max(0.0, now - record.started_at)
    return record.busy_s


def _end(sweep: Snapshot) -> float:
    return sweep.now if not sweep.ended or sweep.newest is None else sweep.newest


def budget(section: Mapping[str, Any]) -> str:
    parts = {"trials": "trials a method", "hours": "hours", "gpu_hours": "GPU-hours"}
    return ", ".join(f"{section[key]:g} {what}" for key, what in parts.items() if section.get(key)) or "no limit"


def name(record: TrialRecord) -> str:
    return f"trial {record.number} ({titled(record)})"


def titled(record: TrialRecord) -> str:
    seed = "" if record.seed is None else f", seed {record.seed}"
    return record.method + (f", final{seed}" if record.stage == "final" else "")


def setting(values: Mapping[str, Any]) -> str:
    """A setting in short: "lr=0.00123, margin=0.1"."""
    return ", ".join(f"{key.rpartition('.')[2]}={_value(value)}" for key, value in values.items()) or "no key searched"


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def score(record: TrialRecord) -> str:
    return "-" if record.score is None else f"{record.score:.2f}"


def done(record: TrialRecord) -> str:
    """Share of a trial's length, of all its runs."""
    shares = [run.curve[-1].get("done", 0.0) if run.curve else 0.0 for run in record.runs]
    return f"{sum(shares) / len(shares):.0%}" if shares else "0%"


def log_line(line: Mapping[str, Any]) -> str:
    """A line of a run's log in short."""
    if not line:
        return ""
    skipped = ("step", "kind", "epoch", "queries", "queries_without_positive", "waiting")
    values = [f"{key} {_value(v)}" for key, v in line.items() if key not in skipped and "/" not in key]
    kind = "" if line["kind"] == "train" else f"{line['kind']} "
    return f"{kind}step {line['step']:,}: {', '.join(values[:4])}"


def as_json(sweep: Snapshot) -> dict[str, Any]:
    """Everything but the trials' curves; `silent_s` is of the watcher's clock once it has seen a sign of life."""
    state = None if sweep.state is None else asdict(sweep.state)
    trials = [{k: v for k, v in asdict(record).items() if k != "runs"} for record in sweep.records]
    return {
        "kind": "sweep", "name": sweep.name, "state": state, "silent_s": round(sweep.silent_s, 1), "metric": sweep.metric,
        "budget": dict(sweep.budget), "trials": trials, "logs": {str(n): dict(line) for n, line in sweep.logs.items()},
    }  # fmt: skip
