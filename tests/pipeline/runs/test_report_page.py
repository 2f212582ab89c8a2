"""The report against classes read back from the pixels it shows, and in a real browser."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config import to_yaml
from pipeline.data.entries import Entry
from pipeline.data.store import Store
from pipeline.data.write_store import write_store
from pipeline.distributed.jobs import run_serially
from pipeline.errors import UserError
from pipeline.recipes import load_config
from pipeline.report import main
from pipeline.runs.checkpoint import TrainingState
from pipeline.runs.report_page import write_report
from pipeline.runs.summary import summarise
from pipeline.runs.terminal import show_summary
from pipeline.storage import Folder
from tests.browser import screenshot
from tests.pipeline.runs.page import COLOUR_OF, HOSTILE, LONELY, Page

IMAGES_PER_CLASS = 5
FROZEN = {"recall@1": 40.5, "map@r": 20.0, "queries": 30, "queries_without_positive": 1}
FINAL = {"recall@1": 61.25, "map@r": 18.5, "nmi": 80.0, "queries": 30, "queries_without_positive": 1}
LOSS_ONLY = [{"step": 1, "kind": "train", "epoch": 0.5, "loss": 0.7}]
WITHOUT_VALIDATION = ("data.validation_fold=null", "evaluation.checkpoint=last")


def make_store(folder: Path, splits: Sequence[str] = ("train", "test")) -> Store:
    entries = []
    for split in splits:
        for index, (name, colour) in enumerate(COLOUR_OF.items()):
            for copy in range(1 if name == LONELY else IMAGES_PER_CLASS):
                path = folder / f"{split}-{index}-{copy}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (50, 40 + copy), colour).save(path)
                entries.append(Entry(str(path), name if split != "train" else f"train {index}", split))
    return write_store("colours", entries, Folder(folder / "store"), run_serially, num_folds=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("data"))


def make_neighbours(store: Store, num_queries: int | None = None) -> dict[str, np.ndarray]:
    """Neighbours and average precisions at random; the latter 0 where nothing is relevant."""
    random = np.random.default_rng(5)
    ids, labels = store.sample_id[store.split == "test"], store.label[store.split == "test"]
    chosen = random.permutation(len(ids))[:num_queries]
    neighbours = np.array([random.permutation(ids[ids != ids[i]])[:10] for i in chosen])
    neighbours[::3, 6:] = -1
    relevant = np.array([(labels == labels[i]).sum() - 1 for i in chosen])
    precision = np.where(relevant > 0, random.permutation(len(chosen)) + 1, 0) / len(chosen)
    return {"query": ids[chosen], "neighbours": neighbours, "average_precision": precision, "relevant": relevant}


def make_run(
    folder: Path,
    store: Store,
    neighbours: dict[str, np.ndarray] | None,
    lines: Sequence[dict[str, Any]] = (),
    final: dict[str, Any] = FINAL,
    frozen: dict[str, Any] = FROZEN,
    overrides: Sequence[str] = (),
    changes: Sequence[dict[str, Any]] = (),
) -> Folder:
    """A run folder as the training loop leaves it."""
    run = Folder(folder)
    config = load_config(None, ["name=demo", "data.validation_fold=0", "evaluation.checkpoint=best", *overrides])
    progress = TrainingState(step=20, epoch=2, seconds=4.0, waited_s=0.5, images=200, frozen=frozen)
    progress.best_metrics = {"recall@1": 70.0, "map@r": 41.0, "queries": 10} if config.validates else {}
    run.write("config.yaml", to_yaml(config).encode())
    run.write_json("run.json", {"fingerprint": store.fingerprint, "dataset": store.folder.uri})
    run.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    run.write("changes.jsonl", "".join(json.dumps(line) + "\n" for line in changes).encode())
    run.write_json("summary.json", summarise(config, store, progress, final, changes))
    if neighbours is not None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **neighbours)  # type: ignore[arg-type]
        run.write("test_neighbours.npz", buffer.getvalue())
    return run


def train_lines(num: int) -> list[dict[str, Any]]:
    common = {"kind": "train", "lr/main": 1e-4, "images_per_second": 50.0, "waiting": 0.1}
    return [{"step": s, "epoch": s / 10, "loss": 1 / s, **common} for s in range(1, num + 1)]


def report(run: Folder, store: Store) -> Page:
    write_report(run, store)
    return Page(run.read("report.html").decode())


@pytest.fixture(scope="module")
def neighbours(store: Store) -> dict[str, np.ndarray]:
    return make_neighbours(store)


@pytest.fixture(scope="module")
def page(store: Store, neighbours: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Page:
    validation = [
        {"step": s, "kind": "validation", "epoch": s / 10, "map@r": value, "recall@1": 70.0, "queries": 10}
        for s, value in ((5, 30.0), (10, 41.0), (15, 41.0), (20, 35.0))
    ]
    changes = [{"step": 7, "changes": ["runtime.workers: 1 -> 2"]}]
    lines = [*train_lines(60), *validation]
    return report(make_run(tmp_path_factory.mktemp("run"), store, neighbours, lines, changes=changes), store)


def test_nothing_outside_the_file_is_referred_to(page: Page) -> None:
    targets = {"src", "href", "xlink:href", "srcset", "poster", "data", "action", "background", "formaction"}
    references = [value for _, attrs in page.tags for name, value in attrs.items() if name in targets]
    references += re.findall(r"url\((.*?)\)", page.html)
    assert references  # the thumbnails at least
    assert all(reference.strip("\"'").startswith(("data:", "#")) for reference in references)
    assert "@import" not in page.html
    assert "http://" not in page.html and "https://" not in page.html
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert any(attrs.get("http-equiv") == "Content-Security-Policy" for _, attrs in page.tags)


def test_frames_follow_the_classes_of_the_pixels_shown(page: Page, neighbours: dict[str, np.ndarray]) -> None:
    found_of = dict(zip(neighbours["query"].tolist(), neighbours["neighbours"].tolist(), strict=True))
    verdicts = set()
    for rows in page.groups.values():
        for query, found in rows:
            expected = [sample for sample in found_of[int(query["data-sample"])][:8] if sample >= 0]
            assert [int(figure["data-sample"]) for figure in found] == expected
            for figure in found:
                right = page.class_shown(figure) == page.class_shown(query)
                assert (figure["verdict"], figure["mark"]) == (("right", "✓") if right else ("wrong", "✗"))
                verdicts.add(right)
            for figure in (query, *found):
                assert figure["title"].startswith(f"{page.class_shown(figure)} (test-")  # the file
    assert verdicts == {True, False}


def test_class_names_are_escaped(page: Page) -> None:
    titles = {figure["title"] for figure in page.figures()}
    assert f"{HOSTILE} (test-0-0.png)" in titles  # as the parser reads it back
    assert HOSTILE in page.text
    assert "<b>" not in page.html and "b" not in {tag for tag, _ in page.tags}
    assert '"&lt;b&gt;&amp;&quot;x (test-0-0.png)"' in page.html


def test_worst_and_best_are_ordered_and_have_something_to_find(page: Page, neighbours: dict[str, np.ndarray]) -> None:
    ranked = sorted(
        (precision, query)
        for query, precision, relevant in zip(
            *(neighbours[n].tolist() for n in ("query", "average_precision", "relevant")), strict=True
        )
        if relevant > 0
    )
    shown = {name: [int(query["data-sample"]) for query, _ in rows] for name, rows in page.groups.items()}
    assert list(shown) == ["worst", "random", "best"]
    assert shown["worst"] == [query for _, query in ranked[:12]]
    assert shown["best"] == [query for _, query in ranked[::-1][:12]]
    assert len(set(shown["random"])) == 12
    assert set(shown["random"]) <= {query for _, query in ranked}


def test_equal_precisions_show_several_classes(store: Store, tmp_path: Path) -> None:
    perfect = {**make_neighbours(store), "average_precision": np.ones(31)}
    order = np.argsort(perfect["query"])  # the store's own order, class after class
    perfect = {name: column[order] for name, column in perfect.items()}
    page = report(make_run(tmp_path, store, perfect), store)
    assert len({query["title"].split(" (")[0] for query, _ in page.groups["best"]}) > 3


def test_the_same_run_gives_the_same_file(store: Store, tmp_path: Path) -> None:
    run = make_run(tmp_path, store, make_neighbours(store, 4), LOSS_ONLY)
    assert report(run, store).html == report(run, store).html


def test_metrics_protocol_and_changes(page: Page) -> None:
    assert page.metric("recall@1") == ["40.50", "61.25", "+20.75"]
    assert page.metric("map@r") == ["20.00", "18.50", "-1.50"]
    assert page.metric("nmi") == ["–", "80.00", "–"]
    assert not page.metric("queries")
    sentence = re.search('<p class="key">(.*?)</p>', page.html)
    assert sentence and all(part in sentence[1] for part in ("R@1", "40.5 %", "61.2 %", "30 queries", "never seen"))
    for text in (
        "embedding dim",
        "128",
        "no: changed while running: runtime.workers",
        "step 7: runtime.workers: 1 -> 2",
    ):
        assert text in page.text
    assert "validation_fold: 0" in page.text  # the resolved config
    assert {"metrics", "curves", "gallery", "config"} <= {a.get("id") for tag, a in page.tags if tag == "section"}


def test_a_run_that_is_not_reproducible_says_why(store: Store, tmp_path: Path) -> None:
    page = report(make_run(tmp_path, store, None, overrides=["runtime.deterministic=false"]), store)
    assert "no: runtime.deterministic is off" in page.text
    overrides = ["method.memory=10", "mining.consistency=async"]
    page = report(make_run(tmp_path / "async", store, None, overrides=overrides), store)
    assert "no: mining.consistency is async" in page.text and "auto, async" in page.text


def test_a_run_that_trained_little_says_so_above_the_figures(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, store, None)
    says = "12 of 20 steps changed no weight, most of the run trained nothing: 12 times the <memory> was empty"
    show_summary(run)
    assert "changed no weight" not in capsys.readouterr().out + report(run, store).text
    run.write_json("summary.json", run.read_json("summary.json") | {"skipped": {"the <memory> was empty": 12}})
    show_summary(run)
    assert f"warning: {says}\n" in capsys.readouterr().out
    page = report(run, store)
    warnings = [
        i for i, (tag, attributes) in enumerate(page.tags) if tag == "p" and attributes.get("class") == "warning"
    ]
    table = next(i for i, (tag, _) in enumerate(page.tags) if tag == "table")
    assert says in page.text and "<memory>" not in page.html and warnings and min(warnings) < table


def test_a_partial_dataset_is_named_so_wherever_it_is_named(store: Store, tmp_path: Path) -> None:
    assert "PARTIAL" not in report(make_run(tmp_path / "whole", store, None), store).html
    folder = Folder(tmp_path / "store")
    for name in ("catalog.parquet", *(shard["file"] for shard in store.manifest["shards"])):
        folder.write(name, store.folder.read(name))
    folder.write_json("manifest.json", store.manifest | {"partial": ["train: 1 of 2 images", "test: 3 of <4> images"]})
    partial = Store(folder)
    run = make_run(tmp_path / "run", partial, None)
    page = report(run, partial)
    protocol = run.read_json("summary.json")["protocol"]
    assert protocol["dataset"] == f"colours ({store.fingerprint}, PARTIAL)"
    assert protocol["partial"] == "train: 1 of 2 images; test: 3 of <4> images"
    assert page.text.count(protocol["dataset"]) == 2, "in the header and in the protocol"
    assert f"Partial dataset: {protocol['partial']}." in page.text and "<4>" not in page.html


def test_the_paper_protocol_says_what_was_chosen_on(store: Store, tmp_path: Path) -> None:
    overrides = ["protocol=paper", "data.validation_fold=null"]
    page = report(make_run(tmp_path, store, None, overrides=overrides), store)
    assert "choices were made on the test classes" in page.text
    assert "Best validation, on test classes" in page.text


def test_curves_of_all_that_was_logged(page: Page) -> None:
    charts = re.findall(r'<figure class="chart">\n<figcaption>(.*?)</figcaption>', page.html)
    assert [title.split(",")[0] for title in charts] == [
        "Training loss", "Validation on held-out training classes", "Learning rate", "Throughput", "Waiting for data",
    ]  # fmt: skip
    assert "best MAP@R: 41.0 % at step 10" in page.text  # the first of two equals
    assert "mean of 5" in page.text
    assert page.html.count("<svg") == 5


@pytest.mark.parametrize("num_lines", [0, 1, 2])
def test_few_logged_lines(store: Store, tmp_path: Path, num_lines: int) -> None:
    page = report(make_run(tmp_path, store, None, train_lines(num_lines)), store)
    assert page.html.count("<svg") == (4 if num_lines else 0)
    assert ("Nothing was logged" in page.text) == (num_lines == 0)


def test_values_that_are_not_finite_are_left_out(store: Store, tmp_path: Path) -> None:
    lines = [*LOSS_ONLY, {"step": 2, "kind": "train", "loss": float("nan"), "grad_norm": float("inf")}]
    page = report(make_run(tmp_path, store, None, lines), store)
    assert page.html.count("<svg") == 1
    assert "grad_norm" not in page.text


def test_without_test_images_and_without_validation(tmp_path: Path) -> None:
    store = make_store(tmp_path / "data", splits=["train"])
    run = make_run(tmp_path / "run", store, None, LOSS_ONLY, {}, {"queries": 0.0}, WITHOUT_VALIDATION)
    page = report(run, store)
    assert "Nothing was measured on classes never seen in training" in page.text
    assert "nothing was measured" in page.text
    assert page.groups == {}
    assert not [tag for tag, _ in page.tags if tag == "table"]


def test_every_image_is_embedded_once_and_the_file_stays_small(tmp_path: Path) -> None:
    """36 queries with 8 neighbours each, no image twice, detailed as photographs are."""
    random = np.random.default_rng(0)
    entries = []
    for index in range(36 * 9):
        coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3), np.uint8)).resize(
            (120, 90), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse, float) + random.normal(0, 12, (90, 120, 3))
        path = tmp_path / f"{index}.jpg"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        entries.append(Entry(str(path), f"class {index // 9}", "test"))
    store = write_store("photographs", entries, Folder(tmp_path / "store"), run_serially, num_folds=2)
    ids = store.sample_id.reshape(36, 9)
    precision = np.arange(36) / 36
    kept = {"query": ids[:, 0], "neighbours": ids[:, 1:], "average_precision": precision, "relevant": np.full(36, 8)}
    page = report(make_run(tmp_path / "run", store, kept), store)
    shown = set(re.findall(r'class="thumb[^"]* s(\d+)"', page.html))
    assert shown >= {figure["data-sample"] for figure in page.figures()}
    assert page.html.count("data:image/jpeg") == len(shown) > 24 * 9
    assert len(page.html.encode()) * 36 * 9 / len(shown) < 3_000_000


def test_rebuilding_from_the_command_line(
    store: Store, neighbours: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", store, neighbours)
    assert main([run.uri]) == 0
    assert capsys.readouterr().out == f"report: {run}/report.html\n"
    assert Page(run.read("report.html").decode()).groups
    run.write_json("run.json", {"fingerprint": "another", "dataset": store.folder.uri})
    for folder, message in (
        (run, "the run was trained on another"),
        (Folder(tmp_path / "none"), "is not a run folder"),
    ):
        assert main([folder.uri]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_wrong_input_is_refused(store: Store, neighbours: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished run"):
        write_report(Folder(tmp_path / "none"), store)
    run = make_run(tmp_path / "run", store, {**neighbours, "query": neighbours["query"] + 10_000})
    with pytest.raises(UserError, match="images that are not in"):
        write_report(run, store)


@pytest.mark.browser
def test_a_browser_paints_frames_and_images(store: Store, tmp_path: Path) -> None:
    lines = [{"step": s, "kind": "train", "loss": 1 / s} for s in range(1, 50)]
    page = report(make_run(tmp_path / "run", store, make_neighbours(store, 2), lines), store)
    # An outline takes no room: it only tells where the browser has put the gallery.
    outlined = page.html.replace("</head>", "<style>#gallery{outline:4px solid #0000ff}</style></head>")
    pixels = screenshot(outlined, tmp_path)
    assert pixels.shape == (3000, 1200, 3)
    rows, columns = np.nonzero((pixels == (0, 0, 255)).all(axis=2))
    top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
    assert 500 < top < bottom < 2999 and 0 < left < right < 1199  # whole, and not wider than the page
    gallery = pixels[top:bottom, left:right].astype(int)
    red, green, blue = np.moveaxis(gallery, 2, 0)
    verdicts = [figure["verdict"] for figure in page.figures() if "verdict" in figure]
    for verdict, area in (
        ("right", (green - red > 60) & (green - blue > 40)),
        ("wrong", (red - green > 100) & (red - blue > 100)),
    ):
        num = verdicts.count(verdict)
        assert num > 0
        assert 1200 * num < area.sum() < 2200 * num  # a frame of 4 pixels around 88 x 88, and a round mark
    for name in set(COLOUR_OF) - {LONELY}:
        num = [page.class_shown(figure) for figure in page.figures()].count(name)
        area = (np.abs(gallery - COLOUR_OF[name]).max(axis=2) < 12).sum()
        assert area >= num * 88 * 70 * 0.9  # the image fills at least 70 of the 88 rows
    curve = (np.abs(pixels[:top].astype(int) - (0x3B, 0x82, 0xD0)).max(axis=2) < 12).sum()
    assert curve > 500
