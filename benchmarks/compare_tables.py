"""The tables of a comparison, made of its kept records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.compare_results import BASES, METRICS, ROWS, TITLES, Figures, Results, figures_of
from benchmarks.compare_seeds import CLOSE, SEEDS, more_seeds
from benchmarks.compare_time import REFERENCE, seconds_per_step, timed_runs
from benchmarks.pages import table
from pipeline.tuning.answer import answer
from pipeline.tuning.leaderboard import leaderboard_csv, short_estimate
from pipeline.tuning.statistics import Estimate, estimate
from pipeline.tuning.sweep_folder import LEADERBOARD, TrialRecord, best_trial

STARTS_NOTE = (
    "MMSI and its bases start from a base that has been trained, on as many images again: one checkpoint for all seeds, whose own "
    "spread these intervals do not hold. Its head does not start orthogonal, so compare MMSI with its base alone."
)


def write_leaderboard(results: Results) -> None:
    """The sweep's own leaderboard, beside its records."""
    text = leaderboard_csv(answer(results.sweep(), results.records(), {}))
    (results.folder / LEADERBOARD).write_text(text)


def tables(results: Results) -> str:
    """The tables of a set, in Markdown: at equal images seen, at equal wall time, and what chose the settings and what they cost."""
    records, sweep, timed, figures = results.records(), results.sweep(), timed_runs(results), results.figures()
    seeds = sweep.final.seeds if sweep.final is not None else []
    length = "" if sweep.final is None else f", {sweep.final.length}"
    parts = [f"### {results.name}, equal images seen{length}", *_both(figures, results.frozen()), STARTS_NOTE]
    if timed:
        steps = {run.row: run.steps for run in timed}
        parts += [
            f"### {results.name}, equal wall time: that of {REFERENCE}",
            *_both(figures_of(timed), results.frozen()),
            f"Steps: {', '.join(f'`{row}` {number}' for row, number in steps.items())}. Rows trained again for this table and "
            f"those they are compared with have seeds {', '.join(map(str, seeds))} alone. The training that MMSI and its bases start from is not counted.",
        ]
    missing = sum(not run.is_kept() for run in more_seeds(results))
    cost = ("row", "search trials", "chosen by validation MAP@R", "setting", "seeds", "s")
    notes = [
        "Mean over seeds with Student's 95 % interval; difference: by seed, **bold** where its interval lies above 0, *italic* where below, "
        "each row by itself, not corrected for their number.",
        f"Seeds {', '.join(map(str, seeds))}; also {' and '.join(map(str, SEEDS))} for a row and its base that are within {CLOSE:g} points or "
        "whose difference has an interval that holds 0: a second look, which makes a false gain a little more likely than one look does."
        + (f" Still to come: {missing} of these runs." if missing else ""),
        "s: the second shortest time of a step (mining included, evaluation not) among the final runs and those made again for their time, on "
        "one core, times the steps.",
        f"Any row again: `python -m benchmarks.compare --sets {results.name} --repeat ROW`.",
    ]
    parts += [
        f"### {results.name}, choices and cost",
        table(cost, (_cost(results, records, figures, row) for row in ROWS)),
        "\n".join(f"- {note}" for note in notes),
    ]
    return "\n\n".join(parts)


def _both(figures: Figures, frozen: Mapping[str, float]) -> list[str]:
    """Rows beside their bases, and baselines with what the trunk had before training."""
    methods = table(
        ("row", "R@1", "MAP@R", "its base", "R@1", "MAP@R", "R@1, difference", "MAP@R, difference"),
        (_beside_base(figures, row, base) for row, base in BASES.items() if base is not None),
    )
    untrained = ["not trained: the pretrained trunk's features", *(f"{value:.1f}" for value in frozen.values())]
    baselines = table(
        ("baseline", "R@1", "MAP@R"),
        [
            *([_title(row), mean(figures, row)] for row, base in BASES.items() if base is None),
            *([untrained] if frozen else []),
        ],
    )
    return [methods, baselines]


def _title(row: str) -> str:
    return f"{TITLES[row]}, `{row}`"


def _estimate(values: Sequence[float]) -> Estimate | None:
    return estimate(values) if values else None


def mean(figures: Figures, row: str) -> str:
    """Cells of a row's means and intervals, a metric each."""
    return " | ".join(short_estimate(_estimate([*figures[metric].get(row, {}).values()])) for metric in METRICS)


def difference(figures: Figures, row: str, base: str, metric: str) -> str:
    """A row's gain on its base over the seeds that both have; bold where the interval is above 0, italic where it is below."""
    own, other = figures[metric].get(row, {}), figures[metric].get(base, {})
    found = _estimate([own[seed] - other[seed] for seed in sorted(own) if seed in other])
    text = short_estimate(found, signed=True)
    if found is None or found.low is None or found.high is None:
        return text
    return f"**{text}**" if found.low > 0 else f"*{text}*" if found.high < 0 else text


def _beside_base(figures: Figures, row: str, base: str) -> list[str]:
    differences = [difference(figures, row, base, metric) for metric in METRICS]
    return [_title(row), mean(figures, row), _title(base), mean(figures, base), *differences]


def _cost(results: Results, records: Sequence[TrialRecord], figures: Figures, row: str) -> list[str]:
    searched = [r for r in records if r.stage == "search" and r.method == row and r.state == "finished"]
    best = best_trial(records, row)
    setting = (
        ", ".join(f"{key.removeprefix('method.')} {value:.3g}" for key, value in best.values.items()) if best else ""
    )
    finals = results.final_runs(row) if results.has(row) else []
    seconds = f"{seconds_per_step(results, row) * finals[0].steps:.0f}" if finals else ""
    score = "" if best is None or best.score is None else f"{best.score:.1f}"
    seeds = str(len(figures[next(iter(METRICS))].get(row, {})))
    return [f"`{row}`", str(len(searched)), score, setting, seeds, seconds]
