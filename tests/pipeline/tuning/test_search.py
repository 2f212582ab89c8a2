"""Which trial comes next, from the records alone."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.tuning.search import Search, Task, best_length
from pipeline.tuning.sweep_config import SweepConfig
from pipeline.tuning.sweep_folder import RunProgress, TrialRecord, best_trial, final_trials

LR = "method.optimizer.lr"


def sweep(**changes: Any) -> SweepConfig:
    values: dict[str, Any] = {
        "methods": {"a": {"points": [{LR: 0.01}]}, "b": {}},
        "space": {LR: {"log_uniform": [1e-4, 1e-1]}},
        "searcher": {"name": "random"},
        "budget": {"trials": 3},
        "final": {"seeds": [5, 6]},
    }
    return SweepConfig.model_validate(values | changes)


def finish(
    task: Task | None, score: float = 1.0, state: Any = "finished", epochs: tuple[float, ...] = (1.0, 2.0)
) -> None:
    assert task is not None
    record = task.record
    curve = [
        {
            "step": 10 * (i + 1),
            "epoch": e,
            "images": 100 * (i + 1),
            "done": (i + 1) / len(epochs),
            "map@r": score - (i != 0) / 10,
        }
        for i, e in enumerate(epochs)
    ]
    record.runs = [RunProgress(f"run-{record.number}", 0, 0, state, curve=curve)]
    record.state, record.score = state, score


def drain(search: Search, score: Any = lambda record: 1.0) -> list[TrialRecord]:
    """Runs trials one after another until the sweep is finished."""
    seen = []
    while not search.finished():
        task = search.next()
        assert task is not None
        seen.append(task.record)
        finish(task, score(task.record))
    assert search.next() is None
    return seen


def test_methods_take_turns_points_come_first_and_the_best_settings_are_trained_again() -> None:
    config = sweep()
    records = drain(Search(config, []), score=lambda record: 10.0 + record.number)
    assert [r.number for r in records] == list(range(10))
    searched = [r for r in records if r.stage == "search"]
    assert [r.method for r in searched] == ["a", "b", "a", "b", "a", "b"]
    assert searched[0].values == {LR: 0.01} and searched[0].given
    assert not any(r.given for r in searched[1:]) and len({r.values[LR] for r in searched}) == 6
    finals = [r for r in records if r.stage == "final"]
    assert [(r.method, r.seed) for r in finals] == [("a", 5), ("a", 6), ("b", 5), ("b", 6)]
    assert finals[0].values == searched[4].values and finals[2].values == searched[5].values, (
        "each method's last was best"
    )
    assert all(r.length == "1 epochs" for r in finals), "the epoch of the best validation"


def test_settings_do_not_depend_on_when_or_in_which_start_they_are_drawn() -> None:
    whole = drain(Search(sweep(), []))
    first = Search(sweep(), [])
    for _ in range(3):
        finish(first.next())
    records = first.records
    interrupted = first.next()
    assert interrupted is not None and interrupted.record.state == "running"
    second = Search(sweep(), records)
    again = second.next()
    assert again is not None and again.record.number == interrupted.record.number, "the interrupted trial comes first"
    finish(again)
    drain(second)
    assert [(r.method, r.values) for r in second.records] == [(r.method, r.values) for r in whole]
    other = drain(Search(sweep(searcher={"name": "random", "seed": 1}), []))
    assert other[1].values != whole[1].values


def test_tpe_is_a_function_of_the_results() -> None:
    config = sweep(searcher={"name": "tpe", "startup_trials": 4}, budget={"trials": 14}, methods={"a": {}}, final=None)

    def score(record: TrialRecord) -> float:
        return 50 - 1000 * abs(record.values[LR] - 0.02)

    whole = drain(Search(config, []), score)
    part = Search(config, [])
    for _ in range(9):
        task = part.next()
        assert task is not None
        finish(task, score(task.record))
    resumed = Search(config, part.records)
    drain(resumed, score)
    assert [r.values for r in resumed.records] == [r.values for r in whole]
    opposite = drain(Search(config, []), lambda record: -score(record))
    assert [r.values for r in opposite[:4]] == [r.values for r in whole[:4]], "before, it draws at random"
    assert [r.values for r in opposite[4:]] != [r.values for r in whole[4:]]
    distance = [abs(r.values[LR] - 0.02) for r in whole]
    assert sum(distance[8:]) / 6 < sum(distance[:4]) / 4, "it looks where results were good"


def test_a_grid_visits_every_combination_once() -> None:
    space = {LR: [0.1, 0.2], "method.embedding_dim": [64, 128, 256]}
    config = sweep(searcher={"name": "grid"}, budget={}, space=space, methods={"a": {}}, final=None)
    settings = [tuple(sorted(r.values.items())) for r in drain(Search(config, []))]
    assert len(settings) == len(set(settings)) == 6


def test_nothing_comes_while_the_last_trials_run_and_finals_wait_for_their_own_method_only() -> None:
    search = Search(sweep(budget={"trials": 1}), [])
    a, b = search.next(), search.next()
    assert search.next() is None and not search.finished()
    finish(b, 3.0)
    final = search.next()
    assert final is not None and (final.record.stage, final.record.method) == ("final", "b") and not final.scheduled
    assert a is not None and a.scheduled
    finish(a, 3.0)
    finish(final)
    assert {(r.method, r.seed) for r in drain(search)} == {("a", 5), ("a", 6), ("b", 6)}


def test_a_sweep_grows_and_what_is_finished_is_not_trained_again() -> None:
    records = drain(Search(sweep(), []))
    grown = Search(sweep(budget={"trials": 4}), records)
    new = drain(grown, lambda record: 9.0)
    assert [r.stage for r in new].count("search") == 2
    assert [(r.method, r.seed) for r in new if r.stage == "final"] == [("a", 5), ("a", 6), ("b", 5), ("b", 6)]
    assert {r.number for r in final_trials(records, "a")} == {
        r.number for r in new if r.stage == "final" and r.method == "a"
    }


def test_points_added_later_are_tried() -> None:
    records = drain(Search(sweep(final=None), []))
    config = sweep(final=None, budget={"trials": 5}, methods={"a": {"points": [{LR: 0.01}, {LR: 0.02}]}, "b": {}})
    new = drain(Search(config, records))
    assert [r.values[LR] for r in new if r.given] == [0.02]


def test_lost_trials_are_tried_again_diverged_ones_not() -> None:
    search = Search(sweep(final=None), [])
    lost, diverged = search.next(), search.next()
    assert lost is not None and diverged is not None
    lost.record.state, lost.record.error = "failed", "its node was lost"
    diverged.record.state, diverged.record.diverged = "failed", True
    again = Search(sweep(final=None), search.records)
    task = again.next()
    assert task is not None and task.record.number == lost.record.number
    assert task.record.state == "running" and task.record.error is None
    assert diverged.record.state == "failed"
    assert (again.next() or task).record.number == 2


def test_stopped_trials_stay_stopped_unless_they_are_named() -> None:
    search = Search(sweep(final=None, budget={"trials": 1}), [])
    finish(search.next(), 5.0, "stopped")
    finish(search.next())
    assert Search(sweep(final=None, budget={"trials": 1}), search.records).finished()
    named = Search(sweep(final=None, budget={"trials": 1}), search.records, again=[0])
    task = named.next()
    assert task is not None and task.record.number == 0 and not task.scheduled


def test_the_time_budget_ends_the_search_but_not_the_final_runs() -> None:
    search = Search(sweep(budget={"gpu_hours": 1.0}), [])
    task = search.next()
    finish(task)
    assert task is not None
    task.record.gpus, task.record.busy_s = 2.0, 1800.0
    rest = drain(search)
    assert {r.stage for r in rest} == {"final"} and len(rest) == 2, "b has no trial to choose from"


def test_a_trial_trained_to_its_end_is_chosen_before_a_stopped_one() -> None:
    stopped = TrialRecord(0, "search", "a", {}, state="stopped", score=9.0)
    finished = TrialRecord(1, "search", "a", {}, state="finished", score=5.0)
    equal = TrialRecord(2, "search", "a", {}, state="finished", score=5.0)
    failed = TrialRecord(3, "search", "a", {}, state="failed", score=99.0)
    assert best_trial([stopped], "a") is stopped
    assert best_trial([stopped, finished, equal, failed], "a") is finished
    assert best_trial([stopped, finished], "b") is None


def test_length_of_final_runs() -> None:
    def run(*values: float) -> RunProgress:
        points = [{"step": i, "epoch": 0.5 * (i + 1), "map@r": v} for i, v in enumerate(values)]
        return RunProgress("x", 0, 0, curve=points)

    assert best_length(TrialRecord(0, "search", "a", {}, runs=[run(1, 3, 2), run(1, 2, 2)]), "map@r") == "1 epochs"
    assert best_length(TrialRecord(0, "search", "a", {}, runs=[run(1, 3, 2), run(1, 2, 3)]), "map@r") == "1.25 epochs"
    for given, expected in (("same", None), ("3 epochs", "3 epochs")):
        records = drain(Search(sweep(final={"seeds": [0], "length": given}, budget={"trials": 1}), []))
        assert [r.length for r in records if r.stage == "final"] == [expected] * 2


@pytest.mark.parametrize("name", ["tpe", "gp"])
def test_diverged_settings_count_as_zero_and_lost_ones_not_at_all(name: str) -> None:
    config = sweep(searcher={"name": name, "startup_trials": 2}, methods={"a": {}}, final=None, budget={"trials": 9})

    def rest(diverged: bool) -> list[float]:
        search = Search(config, [])
        for i in range(4):
            task = search.next()
            finish(task, 5.0 + i)
            assert task is not None
            if i == 3:
                task.record.state, task.record.diverged, task.record.score = "failed", diverged, None
        return [(search.next() or task).record.values[LR]]

    assert rest(True) != rest(False)
