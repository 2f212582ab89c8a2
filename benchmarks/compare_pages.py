"""The tables of comparisons in README.md and the documentation, written from the kept records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.compare_results import BASES, METRICS, TITLES, Results
from benchmarks.compare_tables import difference, mean, tables
from benchmarks.pages import ROOT, table, with_sections
from pipeline.tuning.sweep_folder import best_trial

# The methods, each with its name for readers and the rows of its base losses; of these the short table has the one that validation
# preferred.
METHODS = {
    "osm_caa": ("OSM+CAA", ["osm_caa"]),
    "intra_batch": ("Intra-Batch Connections", ["intra_batch"]),
    "gca_hng": ("GCA-HNG", ["gca_hng_npair", "gca_hng_proxy_anchor"]),
    "smart_mining": ("Smart Mining", ["smart_mining"]),
    "mmsi": ("MMSI, from a trained base", ["mmsi_contrastive", "mmsi_multi_similarity"]),
}
BASELINES = [row for row, base in BASES.items() if base is None]
PAGES = ("README.md", "docs/results/methods.md", *(f"docs/methods/{name}.md" for name in ("baseline", *METHODS)))


def short_table(results: Results) -> str:
    """Eight lines of a set: the five methods beside their bases, and the best baseline, as validation has chosen them."""
    figures = results.figures()
    frozen = ", ".join(f"{METRICS[metric]} {value:.1f}" for metric, value in results.frozen().items())
    untrained = f" (not trained: {frozen})" if frozen else ""
    header = (
        f"{results.name}: %, unseen classes{untrained}",
        "R@1",
        "MAP@R",
        "its base",
        "R@1",
        "MAP@R",
        "MAP@R, difference",
    )
    best = _best(results, BASELINES)
    lines = [[f"{TITLES[best]}, the best baseline", mean(figures, best), *[""] * 4]]
    for method, rows in METHODS.values():
        row = _best(results, rows)
        base = BASES[row]
        assert base is not None
        lines.append(
            [method, mean(figures, row), TITLES[base], mean(figures, base), difference(figures, row, base, "map@r")]
        )
    return table(header, lines)


def method_table(sets: Sequence[Results], method: str) -> str:
    """The rows of a method on every set beside their bases; for `baseline` those of the baselines."""
    rows = BASELINES if method == "baseline" else METHODS[method][1]
    figures = {results.name: results.figures() for results in sets}
    header = ["set", "row", "R@1", "MAP@R"]
    if method != "baseline":
        header += ["its base", "R@1", "MAP@R", *(f"{name}, difference" for name in METRICS.values())]
    lines = []
    for name, values in figures.items():
        for row in rows:
            cells, base = [name, TITLES[row], mean(values, row)], BASES[row]
            if base is not None:
                cells += [TITLES[base], mean(values, base), *(difference(values, row, base, m) for m in METRICS)]
            lines.append(cells)
    return table(header, lines)


def _best(results: Results, rows: Sequence[str]) -> str:
    """The row whose chosen setting had the highest score on the validation fold."""

    def score(row: str) -> float:
        trial = best_trial(results.records(), row)
        return -1.0 if trial is None or trial.score is None else trial.score

    return max(rows, key=score)


def written(text: str, found: Mapping[str, Results]) -> str:
    """A page with the tables of all sets whose comparison is complete; sections of other sets stay as they are."""

    def section(what: str) -> str | None:
        name, length = what.split(", ")
        if length == "all sets":
            sets = [results for results in found.values() if results.is_complete()]
            return method_table(sets, name) if sets else None
        if name not in found or not found[name].is_complete():
            return None
        return short_table(found[name]) if length == "short" else tables(found[name])

    return with_sections(text, "compare", section)


def write_pages(found: Mapping[str, Results]) -> None:
    """Writes the tables into the pages that have sections for them."""
    for page in (ROOT / name for name in PAGES):
        page.write_text(written(page.read_text(), found))
