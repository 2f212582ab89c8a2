"""The tables of a comparison, made of its kept records alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from benchmarks.compare_results import BASES, METRICS, ROWS, Figures, Results
from benchmarks.compare_seeds import CLOSE
from benchmarks.compare_time import REFERENCE, seconds_per_step, time_figures, timed_runs
from pipeline.tuning.answer import answer
from pipeline.tuning.leaderboard import leaderboard_csv, short_estimate
from pipeline.tuning.statistics import Estimate, estimate
from pipeline.tuning.sweep_folder import LEADERBOARD, TrialRecord, best_trial


def write_leaderboard(results: Results) -> None:
    """The sweep's own leaderboard, beside its records."""
    text = leaderboard_csv(answer(results.sweep(), results.records(), {}))
    (results.folder / LEADERBOARD).write_text(text)


def tables(results: Results) -> str:
    """The tables of a set, in Markdown: at equal images seen, at equal wall time, and what chose the settings and what they cost."""
    records, sweep, timed = results.records(), results.sweep(), timed_runs(results)
    seeds = sweep.final.seeds if sweep.final is not None else []
    length = "" if sweep.final is None else f", {sweep.final.length}"
    lines = [f"### {results.name}, equal images seen{length}", "", *_both(results.figures(), results.frozen())]
    if timed:
        lines += [
            f"### {results.name}, equal wall time: that of {REFERENCE}",
            "",
            *_both(time_figures(timed), results.frozen()),
        ]
        steps = {run.row: run.steps for run in timed}
        lines += [f"Steps: {', '.join(f'`{row}` {number}' for row, number in steps.items())}.", ""]
    lines += [
        f"### {results.name}, choices and cost",
        "",
        *_table(
            ("row", "search trials", "chosen by validation MAP@R", "setting", "seeds", "s"),
            (_cost(results, records, r) for r in ROWS),
        ),
        "",
        f"(Mean over seeds {', '.join(map(str, seeds))} with Student's 95 % interval, and over two more where a row is within {CLOSE:g} "
        "points of its base or the interval of the difference holds 0, but for rows trained again at equal wall time; paired: difference by seed, bold where its interval lies above "
        "0, each row by itself, not corrected for their number. s: time in steps and mining, on one core. Any row again: "
        f"`python -m benchmarks.compare --sets {results.name} --repeat ROW`.)",
    ]
    return "\n".join(lines)


def _both(figures: Figures, frozen: Mapping[str, float]) -> list[str]:
    """Rows beside their bases, and baselines with what the trunk had before training."""
    methods = _table(
        ("row", "R@1", "MAP@R", "its base", "R@1", "MAP@R", "R@1, paired", "MAP@R, paired"),
        (_beside_base(figures, row, base) for row, base in BASES.items() if base is not None),
    )
    untrained = ["not trained: the pretrained trunk's features", *(f"{value:.1f}" for value in frozen.values())]
    baselines = _table(
        ("baseline", "R@1", "MAP@R"),
        [
            *([f"`{row}`", mean(figures, row)] for row, base in BASES.items() if base is None),
            *([untrained] if frozen else []),
        ],
    )
    note = (
        "MMSI and its bases start from a base that has been trained, on as many images again: one checkpoint for all seeds, whose own "
        "spread these intervals do not hold."
    )
    return [*methods, "", *baselines, "", note, ""]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(row)} |" for row in cells]


def _estimate(values: Sequence[float]) -> Estimate | None:
    return estimate(values) if values else None


def mean(figures: Figures, row: str) -> str:
    """Cells of a row's means and intervals, a metric each."""
    return " | ".join(short_estimate(_estimate([*figures[metric].get(row, {}).values()])) for metric in METRICS)


def difference(figures: Figures, row: str, base: str, metric: str) -> str:
    """A row's gain on its base over the seeds that both have; bold where the interval is above 0."""
    own, other = figures[metric].get(row, {}), figures[metric].get(base, {})
    found = _estimate([own[seed] - other[seed] for seed in sorted(own) if seed in other])
    text = short_estimate(found, signed=True)
    return f"**{text}**" if found is not None and found.low is not None and found.low > 0 else text


def _beside_base(figures: Figures, row: str, base: str) -> list[str]:
    differences = [difference(figures, row, base, metric) for metric in METRICS]
    return [f"`{row}`", mean(figures, row), f"`{base}`", mean(figures, base), *differences]


def _cost(results: Results, records: Sequence[TrialRecord], row: str) -> list[str]:
    searched = [r for r in records if r.stage == "search" and r.method == row and r.state == "finished"]
    best = best_trial(records, row)
    setting = (
        ", ".join(f"{key.removeprefix('method.')} {value:.3g}" for key, value in best.values.items()) if best else ""
    )
    finals = results.final_runs(row) if results.has(row) else []
    seconds = f"{seconds_per_step(results, row) * finals[0].steps:.0f}" if finals else ""
    score = "" if best is None or best.score is None else f"{best.score:.1f}"
    return [f"`{row}`", str(len(searched)), score, setting, str(len(finals)), seconds]
