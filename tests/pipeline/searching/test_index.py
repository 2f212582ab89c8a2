"""An index against a comparison of all pairs, through every kind of change, damage and kill."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.searching import changes
from pipeline.searching.changes import IndexBatch, add_to_index, build_index, remove_from_index
from pipeline.searching.index import SearchIndex, open_index
from pipeline.searching.index_files import MANIFEST, check_files, read_manifest
from pipeline.storage import Folder
from tests.pipeline.searching.batches import MODEL, batches, make_index, vectors


def by_all_pairs(queries: np.ndarray, rows: np.ndarray, ids: np.ndarray, k: int) -> np.ndarray:
    """Ids of the k nearest rows in float64, ties by the smaller id."""
    answer = []
    for query in queries.astype(np.float64):
        distances = [float(np.square(row - query).sum()) for row in rows.astype(np.float64)]
        order = sorted(range(len(rows)), key=lambda i: (distances[i], ids[i]))
        answer.append([int(ids[i]) for i in order[:k]])
    return np.array(answer)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_search_finds_what_a_comparison_of_all_pairs_finds(tmp_path: Path, distance: str) -> None:
    values = vectors(300) * (1 if distance == "cosine" else np.float32(3))
    make_index(tmp_path / "index", values, distance=distance)
    index = open_index(tmp_path / "index")
    queries = np.concatenate([vectors(20, seed=1), values[:20]]) * (5 if distance == "cosine" else 1)
    ids, similarity = index.search_embeddings(queries, 9)
    unit = queries / np.linalg.norm(queries, axis=1, keepdims=True) if distance == "cosine" else queries
    assert np.array_equal(ids, by_all_pairs(unit.astype(np.float32), values, np.arange(300), 9))
    pairs = values[ids].astype(np.float64)
    expected = (
        np.einsum("qkd,qd->qk", pairs, unit)
        if distance == "cosine"
        else -np.linalg.norm(pairs - queries[:, None], axis=2)
    )
    assert np.abs(similarity - expected).max() < 1e-6
    assert (np.diff(similarity, axis=1) <= 0).all()


def test_hits_have_path_class_label_and_thumbnail(tmp_path: Path) -> None:
    values = vectors(10)
    make_index(tmp_path / "index", values)
    index = open_index(tmp_path / "index")
    assert len(index) == 10
    for queries in (values[4:6], torch.from_numpy(values[4:6])):
        first, second = index.search(queries, k=3)
        assert (first[0].id, first[0].path, first[0].class_name, first[0].label) == (4, "/photos/a/4.jpg", "x", 0)
        assert (second[0].id, second[0].class_name, second[0].label) == (5, "y", 1)
        assert first[0].similarity == pytest.approx(1) and len(first) == 3
    assert index.thumbnail(4) == b"jpeg /photos/a 4"
    assert index.thumbnail(5) is None and index.thumbnail(10) is None and index.thumbnail(-1) is None
    assert [hit.id for hit in index.search(values[7], k=1)[0]] == [7]
    assert len(index.search(values[:1], k=50)[0]) == 10


def test_copies_are_found_in_the_order_of_their_ids(tmp_path: Path) -> None:
    """More equal rows than float32 can tell apart, or the first proposals can hold."""
    values = np.concatenate([vectors(500), np.repeat(vectors(1, seed=5), 700, 0), vectors(1800, seed=6)])
    make_index(tmp_path / "index", values)
    ids, similarity = open_index(tmp_path / "index").search_embeddings(vectors(1, seed=5), 20)
    assert ids.tolist() == [list(range(500, 520))] and np.allclose(similarity, 1)


@pytest.mark.parametrize("engine", ["ivf", "ivf_fp16", "ivf_pq", "hnsw"])
def test_faiss_engines_keep_their_recall_and_pass_over_removed_images(tmp_path: Path, engine: str) -> None:
    centres = vectors(300, 16, seed=2)
    values = centres[np.arange(3000) // 10] + 0.3 * vectors(3000, 16)
    values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    manifest = make_index(tmp_path / "index", values, engine=engine).manifest
    assert manifest.engine.name == engine and manifest.engine.recall >= 0.95, manifest.engine
    remove_from_index(tmp_path / "index", [f"/photos/a/{i}.jpg" for i in range(500)])
    index = open_index(tmp_path / "index")
    assert index.manifest.engine.file == manifest.engine.file, "nothing was merged"
    queries = values[500:1500:10]
    ids, _ = index.search_embeddings(queries, 10)
    alive = np.arange(500, 3000)
    exact = by_all_pairs(queries, values[alive], alive, 10)
    assert ids.min() >= 500
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids, exact, strict=True)]) >= 0.9
    ids, _ = index.search_embeddings(queries[:2], 2600)
    assert [sorted(row[row >= 0]) for row in ids] == [alive.tolist()] * 2, (
        "lists that were not visited are searched as well"
    )


def test_an_engine_below_its_target_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.searching.engines.RECALL_TARGET", 1.1)
    manifest = make_index(tmp_path / "index", vectors(1200), engine="ivf").manifest
    assert manifest.engine.name == "exact" and "recall@10" in manifest.engine.note and manifest.engine.file is None


def test_auto_is_exact_up_to_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = vectors(1500)
    assert make_index(tmp_path / "small", values).manifest.engine.name == "exact"
    monkeypatch.setattr("pipeline.searching.engines.EXACT_BYTES", values.nbytes - 1)
    manifest = make_index(tmp_path / "large", values).manifest
    assert (manifest.engine.requested, manifest.engine.name) == ("auto", "ivf_fp16")


# ---- changes ---------------------------------------------------------------------------------------------------------


def expect(index: SearchIndex, values: dict[int, np.ndarray]) -> None:
    """The index holds these rows by id, and finds them as a comparison of all pairs does."""
    assert len(index) == len(values)
    ids, rows = np.array(list(values)), np.stack(list(values.values()))
    queries = vectors(5, seed=9)
    found, _ = index.search_embeddings(queries, 8)
    assert np.array_equal(found[:, : len(ids)], by_all_pairs(queries, rows, ids, 8))
    for image in ids[:: max(1, len(ids) // 20)]:
        assert index.search(values[int(image)], 1)[0][0].similarity > 0.999


def test_images_are_added_replaced_removed_and_merged(tmp_path: Path) -> None:
    path, values = tmp_path / "index", vectors(60)
    make_index(path, values)
    index = open_index(path)
    held = dict(enumerate(values))

    more = vectors(5, seed=1)
    change = add_to_index(path, batches(more, "/photos/b", ["z", "x", None]))
    assert (change.added, change.replaced) == (5, 0)
    assert len(index) == 60 and index.refresh() and not index.refresh()
    held |= {60 + i: row for i, row in enumerate(more)}
    expect(index, held)
    labels = [(hit.class_name, hit.label) for hit in (index.search(row, 1)[0][0] for row in more[:3])]
    assert labels == [("z", 2), ("x", 0), (None, None)], "new classes get new numbers, known ones keep theirs"

    again = vectors(3, seed=2)
    change = add_to_index(path, batches(again, "/photos/a"))  # 0.jpg, 1.jpg, 2.jpg
    assert (change.added, change.replaced) == (3, 3)
    held = {i: row for i, row in held.items() if i > 2} | {65 + i: row for i, row in enumerate(again)}
    index.refresh()
    expect(index, held)
    assert index.thumbnail(0) is None and index.thumbnail(65) == b"jpeg /photos/a 0"

    change = remove_from_index(path, ["/photos/b", "/photos/a/7.jpg"])
    assert change.removed == 6
    held = {i: row for i, row in held.items() if i not in {7, *range(60, 65)}}
    index.refresh()
    expect(index, held)

    for number in range(12):
        add_to_index(path, batches(vectors(1, seed=20 + number), f"/photos/c{number}"))
        held[68 + number] = vectors(1, seed=20 + number)[0]
    index.refresh()
    assert len(index.manifest.segments) <= 1 + changes.MAX_SEGMENTS + 1
    expect(index, held)

    many = vectors(400, seed=50)
    add_to_index(path, batches(many, "/photos/d"))
    held |= {80 + i: row for i, row in enumerate(many)}
    index.refresh()
    assert len(index.manifest.segments) == 1 and index.manifest.removed is None, "merged"
    expect(index, held)
    assert index.thumbnail(81) == b"jpeg /photos/d 1" and index.thumbnail(82) is None
    assert index.search(held[3], 1)[0][0].path == "/photos/a/3.jpg"
    segments = [name for name in Folder(path).names() if name.startswith("segment-")]
    assert len(segments) == 1, "files of former generations are removed"
    check_files(Folder(path), index.manifest, checksums=True)


def test_merging_builds_the_engine_anew(tmp_path: Path) -> None:
    path = tmp_path / "index"
    first = make_index(path, vectors(1200, 4), engine="ivf").manifest
    second = add_to_index(path, batches(vectors(400, 4, seed=1), "/photos/b"), threads=1).manifest
    assert len(second.segments) == 1 and second.engine.file != first.engine.file and second.engine.name == "ivf"
    query = vectors(400, 4, seed=1)[7]
    assert open_index(path).search(query, 1)[0][0].path == "/photos/b/7.jpg"


def test_an_index_may_become_empty_and_be_filled_again(tmp_path: Path) -> None:
    path, values = tmp_path / "index", vectors(300)
    make_index(path, values)
    change = remove_from_index(path, ["/photos"])
    assert change.removed == 300 and change.manifest.segments == ()
    index = open_index(path)
    assert index.search(values[:2], 3) == [[], []] and len(index) == 0
    add_to_index(path, batches(values[:4]))
    index.refresh()
    assert [hit.id for hit in index.search(values[1], 1)[0]] == [301]


def test_of_a_path_that_is_given_twice_the_last_counts(tmp_path: Path) -> None:
    path, values = tmp_path / "index", vectors(5)
    make_index(path, values)
    twice = IndexBatch(vectors(2, seed=1), ["/x.jpg", "/x.jpg"], None, [None, None], [b"", b""])
    change = add_to_index(path, [twice])
    assert (change.added, change.replaced) == (1, 0)
    index = open_index(path)
    assert len(index) == 6 and index.search(vectors(2, seed=1)[1:], 1)[0][0].id == 6


def test_a_removal_that_names_an_unknown_path_removes_nothing(tmp_path: Path) -> None:
    make_index(tmp_path / "index", vectors(5))
    with pytest.raises(UserError, match=r"/photos/a/9\.jpg is not in the index"):
        remove_from_index(tmp_path / "index", ["/photos/a/1.jpg", "/photos/a/9.jpg"])
    assert len(open_index(tmp_path / "index")) == 5


def test_a_reader_goes_on_with_the_generation_that_it_opened(tmp_path: Path) -> None:
    path, values = tmp_path / "index", vectors(40)
    make_index(path, values)
    index = open_index(path)
    index.search(values[0], 1)
    add_to_index(path, batches(vectors(400, seed=1), "/photos/b"))  # merges: the files of the reader are unlinked
    assert [hit.path for hit in index.search(values[30], 1)[0]] == ["/photos/a/30.jpg"]
    assert index.thumbnail(31) == b"jpeg /photos/a 31"


# ---- half-written, killed, damaged -----------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.searching import changes, engines  # once for all: a fork each is then killed
from tests.pipeline.searching.batches import batches, vectors

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def stream(at):
    for number, batch in enumerate(batches(vectors(400, seed=1), "/photos/b")):
        if at == "stream" and number == 9:
            die()
        yield batch

for at in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        if at != "stream":
            setattr(changes, at, die)
        changes.add_to_index(Path(sys.argv[1]) / at, stream(at), threads=1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, at
"""
KILLED_AT = ("stream", "_merge", "_with_engine", "write_removed", "write_manifest")


def test_a_kill_while_adding_leaves_the_former_index(tmp_path: Path) -> None:
    values = vectors(50)
    before = make_index(tmp_path / "made", values).manifest
    remove_from_index(tmp_path / "made", ["/photos/a/49.jpg"])
    for at in KILLED_AT:
        shutil.copytree(tmp_path / "made", tmp_path / at)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), *KILLED_AT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / at for at in KILLED_AT):
        index = open_index(path)
        assert index.manifest.segments == before.segments
        expect(index, dict(enumerate(values[:49])))
        check_files(Folder(path), index.manifest, checksums=True)
        left = [name for name in Folder(path).names() if name.startswith("segment-")]
        assert len(left) > 1, "the killed process had begun"
        add_to_index(path, batches(vectors(400, seed=1), "/photos/b"), threads=1)
        index.refresh()
        assert len(index) == 449
        assert len([name for name in Folder(path).names() if name.startswith("segment-")]) == 1, "its files are removed"


def test_a_failing_stream_of_images_leaves_no_file(tmp_path: Path) -> None:
    def failing() -> object:
        yield from list(batches(vectors(20)))[:2]
        raise UserError("the third image cannot be read")

    with pytest.raises(UserError, match="third image"):
        build_index(tmp_path / "new", MODEL, 8, "cosine", failing())  # type: ignore[arg-type]
    assert not [name for name in Folder(tmp_path / "new").names() if name != ".lock"]
    make_index(tmp_path / "new", vectors(5))
    with pytest.raises(UserError, match="third image"):
        add_to_index(tmp_path / "new", failing())  # type: ignore[arg-type]
    assert len(open_index(tmp_path / "new")) == 5


def test_one_process_changes_an_index_at_a_time(tmp_path: Path) -> None:
    make_index(tmp_path / "index", vectors(5))

    def reentrant() -> object:
        with pytest.raises(UserError, match="another process is changing the index"):
            remove_from_index(tmp_path / "index", ["/photos/a/1.jpg"])
        yield from batches(vectors(2, seed=1), "/photos/b")

    add_to_index(tmp_path / "index", reentrant())  # type: ignore[arg-type]
    assert len(open_index(tmp_path / "index")) == 7


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: (p / MANIFEST).unlink(), "holds no index"),
        (lambda p: (p / MANIFEST).write_text("{"), "is not valid JSON"),
        (lambda p: (p / MANIFEST).write_text("{}"), "has index format None"),
        (lambda p: (p / MANIFEST).write_text(json.dumps(json.loads((p / MANIFEST).read_text()) | {"format": 9})), "format 9"),
        (lambda p: (p / MANIFEST).write_text(json.dumps(json.loads((p / MANIFEST).read_text()) | {"dim": "x"})), "is damaged"),
        (lambda p: shutil.rmtree(next(p.glob("segment-*"))), "is missing"),
        (lambda p: next(p.glob("segment-*/embeddings.npy")).unlink(), r"embeddings\.npy is missing"),
        (lambda p: cut(next(p.glob("segment-*/thumbnails.bin"))), r"thumbnails\.bin has"),
        (lambda p: cut(next(p.glob("segment-*/rows.parquet"))), r"rows\.parquet has"),
        (lambda p: cut(next(p.glob("removed-*.npy"))), "has"),
    ],
)  # fmt: skip
def test_a_damaged_index_is_told_in_one_line(tmp_path: Path, damage: Callable[[Path], object], says: str) -> None:
    make_index(tmp_path / "index", vectors(9))
    remove_from_index(tmp_path / "index", ["/photos/a/1.jpg"])
    damage(tmp_path / "index")
    with pytest.raises(UserError, match=says) as caught:
        open_index(tmp_path / "index")
    assert "\n" not in str(caught.value)


def test_changed_bytes_are_found_by_their_checksum(tmp_path: Path) -> None:
    make_index(tmp_path / "index", vectors(9))
    path = next((tmp_path / "index").glob("segment-*/embeddings.npy"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    folder = Folder(tmp_path / "index")
    check_files(folder, read_manifest(folder))
    with pytest.raises(UserError, match=r"embeddings\.npy is damaged \(its checksum differs\)"):
        check_files(folder, read_manifest(folder), checksums=True)


def test_bad_input_is_told_in_one_line(tmp_path: Path) -> None:
    make_index(tmp_path / "index", vectors(9))
    index = open_index(tmp_path / "index")
    for queries, k, says in (
        (vectors(1, 7), 1, r"shape \[1, 7\], expected \[N, 8\]: the index has 8 dimensions"),
        (vectors(0), 1, "got no queries"),
        (vectors(1), 0, "k is 0"),
        (np.zeros((1, 8)), 1, "1 of 1 embeddings are not finite, or zero"),
        (np.full((1, 8), np.nan), 1, "not finite"),
    ):
        with pytest.raises(UserError, match=says):
            index.search(queries, k)
    for path, says in (("s3://bucket/index", "has to lie in a local folder"), (tmp_path / "none", "holds no index")):
        with pytest.raises(UserError, match=says):
            open_index(path)
    with pytest.raises(UserError, match="holds an index already"):
        make_index(tmp_path / "index", vectors(9))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"is not empty, and holds no index \(photo.jpg\)"):
        make_index(tmp_path / "other", vectors(9))
    with pytest.raises(UserError, match="no images to build an index of"):
        make_index(tmp_path / "empty", vectors(0))
    with pytest.raises(UserError, match="no images to add"):
        add_to_index(tmp_path / "index", [])


def test_the_files_can_be_read_without_this_program(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    values = vectors(9)
    make_index(tmp_path / "index", values)
    (segment,) = (tmp_path / "index").glob("segment-*")
    assert np.array_equal(np.load(segment / "embeddings.npy", mmap_mode="r"), values)
    table = pq.read_table(segment / "rows.parquet")
    assert table["path"].to_pylist()[3] == "/photos/a/3.jpg" and table.num_rows == 9
