"""sweep.html as a parser, plotly and a browser read it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from pipeline.storage import Folder
from pipeline.tuning.answer import TEST, Answer
from pipeline.tuning.sweep_config import SweepConfig
from pipeline.tuning.sweep_folder import SweepFolder, TrialRecord
from pipeline.tuning.write_answer import write_answer
from tests.browser import Browser
from tests.pipeline.tuning.synthetic import final, large_sweep, make_sweep, search

HOSTILE = '</script><script>hacked=1</script><img src=x onerror="hacked=1">&amp;<b>'
OWN_KEYS = {"lines", "trials"}
VOID = {"meta", "br", "input", "img"}


class Page(HTMLParser):
    """Tags with their attributes, rows of tables as texts, and contents of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.scripts: list[tuple[dict[str, str], str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append((tag, values))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.rows[values["id"]] = []
        elif tag == "tr":
            list(self.rows.values())[-1].append([])
        elif tag in ("td", "th"):
            list(self.rows.values())[-1][-1].append("")
        elif tag == "script":
            self.scripts.append((values, ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data
        elif "style" not in self._open:
            self.text += data
            if {"td", "th"} & set(self._open):
                list(self.rows.values())[-1][-1][-1] += data

    @property
    def charts(self) -> dict[str, Any]:
        return json.loads(next(text for values, text in self.scripts if values.get("id") == "charts"))


def write(
    folder: Path, sweep: SweepConfig, records: Sequence[TrialRecord], ensembles: Any = None
) -> tuple[Page, Answer]:
    sweep_folder = SweepFolder(Folder(folder))
    sweep_folder.folder.write("sweep.yaml", b"name: resolved & <ours>\n")
    if ensembles:
        sweep_folder.folder.write_json("ensembles.json", ensembles)
    result = write_answer(sweep_folder, sweep, records)
    return Page((folder / "sweep.html").read_text(encoding="utf-8")), result


def hostile_sweep() -> tuple[SweepConfig, list[TrialRecord]]:
    """Text that would run or break out wherever it were not escaped: label, setting, error, name of a run."""
    sweep = make_sweep((HOSTILE, "b"), space={"method.text": {"choice": [HOSTILE, "other"]}})
    records = [search(0, HOSTILE, 40.0), search(1, HOSTILE, 41.0, lr=2e-3), search(2, "b", 42.0), search(3, "b", 20.0)]
    for record, text in zip(records, [HOSTILE, "other"] * 2, strict=True):
        record.values["method.text"] = text
        record.runs[0].name += HOSTILE
        record.runs[0].curve = [{"images": 1000 * i, "map@r": 20.0 + i} for i in (1, 2)]
    records[3].error, records[3].retried = HOSTILE, [HOSTILE]
    records += [final(4 + s, HOSTILE, s, [30.0 + s], lr=2e-3) for s in range(3)]
    for record in records[4:]:
        record.values["method.text"] = "other"
    return sweep, records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    sweep, records = large_sweep(150)
    return write(folder, sweep, records)[0]


def test_only_scripts_whose_hash_the_policy_names_can_run(page: Page) -> None:
    policies = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    (policy,) = policies
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy and "connect-src" not in policy
    script_src = next(part for part in policy.split(";") if part.strip().startswith("script-src"))
    allowed = script_src.split()[1:]
    run = [text for attributes, text in page.scripts if attributes.get("type") != "application/json"]
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in run]
    assert hashes == allowed and len(hashes) == 2


def test_nothing_outside_the_file_is_referred_to(page: Page) -> None:
    targets = {"src", "href", "xlink:href", "srcset", "poster", "action", "background", "formaction"}
    assert not [value for _, attrs in page.tags for name, value in attrs.items() if name in targets]
    assert not {"link", "iframe", "object", "embed", "base", "img"} & {tag for tag, _ in page.tags}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]


def test_text_of_names_and_values_is_no_html(tmp_path: Path) -> None:
    page, _ = write(tmp_path, *hostile_sweep())
    assert (
        len(page.scripts) == 3
        and "img" not in {tag for tag, _ in page.tags}
        and "b" not in {tag for tag, _ in page.tags}
    )
    assert page.rows["leaderboard"][1][0] == HOSTILE
    trials = page.rows["trials"]
    assert HOSTILE in trials[1][1] and HOSTILE in trials[1][8] and HOSTILE in trials[1][9]
    assert f"error: {HOSTILE}" in trials[4][10] and f"started again: {HOSTILE}" in trials[4][10]
    assert "name: resolved & <ours>" in page.text
    assert not [text for attributes, text in page.scripts if attributes.get("id") == "charts" and "<" in text]
    for text in (
        label.replace("<b>", "").replace("</b>", "").replace("<br>", "") for label in page.charts["labels"].values()
    ):
        assert "<" not in text  # of tags that plotly reads, only our own


def test_figures_are_plotlys(page: Page) -> None:
    charts = page.charts
    assert {"intervals", "differences", "learning-curves", "parallel-0", "parallel-1", "slice-0-0"} <= set(
        charts["figures"]
    )
    places = {attrs["id"] for tag, attrs in page.tags if attrs.get("class") == "chart-area"}
    assert places == set(charts["figures"])
    for figure in charts["figures"].values():
        traces = [{key: value for key, value in trace.items() if key not in OWN_KEYS} for trace in figure["data"]]
        go.Figure(data=traces, layout=json.loads(json.dumps(figure["layout"]).replace('"INK"', '"black"')))
        for trace in figure["data"]:
            numbers = [line[0] for line in trace.get("lines", [])] + trace.get("trials", [])
            assert all(str(number) in charts["labels"] for number in numbers)


def test_charts_hold_every_trial_at_its_place() -> None:
    from pipeline.tuning.space import Space
    from pipeline.tuning.sweep_charts import NOT_USED, axes_of

    sweep, records = large_sweep(150)
    trials = [r for r in records if r.method == "triplet" and r.stage == "search" and r.score is not None]
    axes = {axis.key: axis for axis in axes_of(Space(sweep.space), trials)}
    assert list(axes) == list(Space(sweep.space).keys)
    lr, dim, margin = (axes[f"method.{key}"] for key in ("optimizer.lr", "embedding_dim", "loss_args.margin"))
    assert (lr.place(1e-4), lr.place(1e-3), lr.place(1e-2)) == pytest.approx((0, 0.5, 1))
    assert [dim.place(value) for value in (64, 128, 512)] == [0, 0.5, 1] and dim.choices == ("64", "128", "512")
    assert margin.place(0.125) == pytest.approx(0.25) and NOT_USED < 0


def test_options_that_no_trial_had_keep_their_place() -> None:
    from pipeline.tuning.space import Space
    from pipeline.tuning.sweep_charts import axes_of

    trials = [search(0, "a", 1.0), search(1, "a", 2.0)]
    trials[0].values, trials[1].values = {"dim": 64, "sizes": {"a": 1}}, {"dim": 512, "sizes": {"a": 2}}
    dim, sizes = axes_of(Space({"dim": [512, 128, 64], "sizes": {"choice": [{"a": 1}, {"a": 2}, {"a": 3}]}}), trials)
    assert dim.choices == ("64", "128", "512") and [dim.place(value) for value in (64, 512)] == [0, 1]
    assert sizes.choices == ("{'a': 1}", "{'a': 2}")  # known as JSON text only: those that were drawn


def test_parallel_coordinates_and_slices_agree_with_the_records(page: Page) -> None:
    _, records = large_sweep(150)
    first = page.rows["leaderboard"][1][0]
    trials = {r.number: r for r in records if r.method == first and r.stage == "search" and r.score is not None}
    figures = page.charts["figures"]
    lines = {line[0]: line[2] for trace in figures["parallel-0"]["data"] for line in trace["lines"]}
    assert set(lines) == set(trials)
    scores = [r.score or 0 for r in trials.values()]
    for number, heights in lines.items():
        height = ((trials[number].score or 0) - min(scores)) / (max(scores) - min(scores))
        assert heights[-1] == pytest.approx(height, abs=1e-3)
        assert (heights[4] < 0) is (trials[number].values["method.optimizer.schedule.kind"] == "constant")
    shades = [[trials[line[0]].score or 0 for line in trace["lines"]] for trace in figures["parallel-0"]["data"]]
    assert all(max(worse) <= min(better) for worse, better in pairwise(shades))  # the better, the stronger
    (trace,) = figures["slice-0-0"]["data"]
    assert trace["x"] == [trials[number].values["method.optimizer.lr"] for number in trace["trials"]]
    assert trace["y"] == pytest.approx([trials[number].score for number in trace["trials"]], abs=1e-3)
    curve = next(line for trace in figures["learning-curves"]["data"] for line in trace["lines"] if line[0] == 0)
    assert curve[1] == [point["images"] for point in records[0].runs[0].curve]


def test_tables_say_what_was_measured(folder: Path, page: Page) -> None:
    sweep, records = large_sweep(150)
    _, result = write(folder, sweep, records)
    best = result.rows[0].estimate(TEST, "map@r")
    assert best is not None and best.low is not None and best.high is not None
    head, first, second = page.rows["leaderboard"]
    assert head[1] == "MAP@Rtest classes" and first[0] == result.rows[0].method
    assert first[1] == f"{best.mean:.2f}{best.low:.2f} to {best.high:.2f}"
    against = result.rows[1].comparison
    assert against is not None and second[2].startswith(f"{against.difference.mean:+.2f}")
    assert second[3] == f"{against.p:.3g}" and second[5] == result.verdict(result.rows[1])
    assert len(page.rows["trials"]) == 1 + len(records)
    assert page.rows["trials"][4][3] == "failed" and "out of memory on rank 0" in page.rows["trials"][4][10]
    assert "proxy_anchor: 1 trial failed" in page.text
    assert "fANOVA, " in page.text and "method.optimizer.schedule.warmup" in page.text
    shares = [row for name, rows in page.rows.items() if name.startswith("importance-") for row in rows[1:]]
    assert len(shares) == 8 and shares[0][0] == "method.optimizer.lr"


def test_a_difference_within_noise_is_said_first(tmp_path: Path) -> None:
    records = [search(0, "a", 40.0), search(1, "b", 42.0, lr=2e-3)]
    records += [final(2 + s, "a", s, [value]) for s, value in enumerate((30.0, 31.0, 33.0))]
    records += [final(5 + s, "b", s, [value], lr=2e-3) for s, value in enumerate((29.0, 30.5, 31.0))]
    page, _ = write(tmp_path, make_sweep(), records)
    assert "Best on classes never seen in training: a, MAP@R 31.3 % (27.5 to 35.1). Within noise of it: b." in page.text
    for record in records[5:]:
        record.runs[0].test["map@r"] -= 20
    page, _ = write(tmp_path, make_sweep(), records)
    assert "Within noise of it" not in page.text and page.rows["leaderboard"][2][5] == "worse"


def test_tables_can_be_read_aloud(page: Page) -> None:
    assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")
    counts = {tag: sum(t == tag for t, _ in page.tags) for tag in ("table", "caption")}
    assert counts["table"] == counts["caption"] == 6
    assert all(attrs.get("aria-label") for _, attrs in page.tags if attrs.get("class") == "chart-area")


def test_few_trials_have_no_importance(tmp_path: Path) -> None:
    page, _ = write(tmp_path, make_sweep(), [search(0, "a", 40.0), search(1, "b", 42.0)])
    assert "No importance of the keys: needs 30 finished trials (there is 1 finished trial;" in " ".join(
        page.text.split()
    )


def test_figures_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    """A run that diverges can leave them; JSON has no word for them."""
    records = [search(0, "a", 40.0), search(1, "a", float("nan"), lr=2e-3), search(2, "a", 41.0, lr=5e-3)]
    records[1].runs[0].curve = [{"images": 10, "map@r": 3.0}, {"images": 20, "map@r": float("nan")}]
    page, _ = write(tmp_path, make_sweep(("a",)), records)
    figures = page.charts["figures"]
    assert figures["slice-0-0"]["data"][0]["trials"] == [0, 2]
    assert figures["learning-curves"]["data"][0]["lines"] == [[1, [10], [3.0]]]


def test_changes_of_a_setting_during_a_trial_are_told(tmp_path: Path) -> None:
    record = search(0, "a", 40.0)
    record.history = [{"images": 1200, "values": record.values, "copied_from": 7}]
    page, _ = write(tmp_path, make_sweep(("a",), scheduler={"name": "pbt"}, final=None), [record])
    assert page.rows["trials"][1][10] == "setting changed after 1,200 images, copied from trial 7"


def test_paper_protocol(tmp_path: Path) -> None:
    records = [search(0, "a", 40.0), search(1, "b", 42.0)]
    page, _ = write(tmp_path, make_sweep(protocol="paper", final=None), records)
    head = page.rows["leaderboard"][0]
    assert "MAP@Rbest checkpoint, chosen on TEST classes" in head and "MAP@Rlast checkpoint" in head
    assert not [title for title in head if "validation" in title]
    assert "Paper protocol: settings and checkpoints were chosen on the TEST classes" in page.text
    assert page.rows["settings"][0][2] == "MAP@R, %TEST classes"


@pytest.mark.browser
@pytest.mark.parametrize("state", ["nothing", "first trial runs", "hostile"])
def test_a_browser_finds_no_fault(tmp_path: Path, state: str) -> None:
    sweep, records = make_sweep(), [search(0, "a", None, state="running")]
    if state == "nothing":
        records = []
    elif state == "hostile":
        sweep, records = hostile_sweep()
    write(tmp_path, sweep, records)
    with Browser(tmp_path / "sweep.html", tmp_path / "profile") as browser:
        for name in browser.value("[...document.querySelectorAll('.chart-area')].map((e) => '#' + e.id)"):
            browser.show(name)
        assert browser.value("typeof hacked") == "undefined" and browser.value("document.images.length") == 0
        assert browser.problems == []
        if state == "hostile":
            assert f"{HOSTILE[:39]}…" in browser.value("document.querySelector('#intervals').textContent")


@pytest.mark.browser
def test_a_reader_sorts_filters_and_points_at_curves(folder: Path, page: Page, tmp_path: Path) -> None:
    with Browser(folder / "sweep.html", tmp_path / "profile") as browser:
        column = "[...document.querySelectorAll('#trials tbody tr')].map((row) => row.children[4].dataset.value)"
        browser.click("#trials th:nth-child(5) button")
        falling = browser.value(column)
        assert falling[-1] == "" and falling[:-1] != sorted(falling[:-1])  # without a score: last
        assert [float(x) for x in falling if x] == sorted((float(x) for x in falling if x), reverse=True)
        browser.click("#trials th:nth-child(5) button")
        assert [x for x in browser.value(column) if x] == [x for x in falling if x][::-1]
        assert browser.value(column)[-1] == ""
        assert browser.value("document.querySelectorAll('#trials th[aria-sort]').length") == 1

        browser.click("input[data-table]")
        browser.call("Input.insertText", text="proxy failed")
        shown = browser.value(
            "[...document.querySelectorAll('#trials tbody tr')].filter((row) => row.offsetParent).length"
        )
        failed = [row for row in page.rows["trials"] if row[3] == "failed"]
        assert shown == len([row for row in failed if row[1] == "proxy_anchor"]) == 1

        browser.show("#learning-curves")
        x, y, width, height = browser.box("#learning-curves .nsewdrag")
        label = "document.querySelector('#learning-curves .hoverlayer').textContent"
        for i in range(60):
            browser.move(x + width * (0.4 + i / 200), y + height * 0.25)
            time.sleep(0.05)
            if "trial" in browser.value(label):
                break
        assert re.search(
            r"trial \d+, (triplet|proxy_anchor).*MAP@R .*method.optimizer.lr = .*after .*images", browser.value(label)
        )

        number = int(re.findall(r"trial (\d+)", browser.value(label))[0])
        marked = browser.value("document.querySelector('#learning-curves .over polyline').points.length")
        assert marked == len(large_sweep(150)[1][number].runs[0].curve)  # its whole line is drawn over the others

        assert browser.problems == []
        assert [url for url in browser.requests if not url.startswith("data:")] == [(folder / "sweep.html").as_uri()]


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
def test_it_can_be_read_in_a_narrow_window_and_in_the_dark(
    folder: Path, page: Page, tmp_path: Path, dark: bool
) -> None:
    with Browser(folder / "sweep.html", tmp_path / "profile", width=400, dark=dark) as browser:
        assert browser.value("document.documentElement.scrollWidth") == 400  # wide tables scroll by themselves
        browser.show("#intervals")
        colours = browser.value("['body', '#intervals .xtick text'].map((s) => getComputedStyle(document.querySelector(s)))"
                                ".map((style, i) => [style.backgroundColor, style.fill][i])")  # fmt: skip
        paper, ink = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
        assert (paper < 150 and ink > 600) if dark else (paper > 600 and ink < 150)


def test_500_trials_stay_small_and_quick(tmp_path: Path) -> None:
    sweep, records = large_sweep(500)
    start = time.perf_counter()
    write_answer(SweepFolder(Folder(tmp_path)), sweep, records, live=True)
    assert time.perf_counter() - start < 20  # about 1 s on a quiet machine
    assert (tmp_path / "sweep.html").stat().st_size < 6.5e6  # 4.9 MB of it plotly.js
