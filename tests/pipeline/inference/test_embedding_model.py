"""`raydml.load` and `embed`: the embeddings of an evaluation, from images as users have them, without the dataset."""

from __future__ import annotations

import io
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import raydml
from methods import METHODS, Method
from pipeline.config import Config, build_config
from pipeline.data.store import Store
from pipeline.data.transforms import evaluation_pixels
from pipeline.distributed.collectives import Ranks
from pipeline.errors import UserError
from pipeline.exporting.export_model import ExportOptions, export_model
from pipeline.inference.image_inputs import ImageError, image_inputs, read_input
from pipeline.inference.model_folder import write_model
from pipeline.inference.trained_model import load_run
from pipeline.model.network import EmbeddingConfig, build_for_embedding, build_network
from pipeline.runs.run_folder import CLASS_NAMES, SUMMARY, run_folder
from pipeline.storage import Folder
from pipeline.testing.tiny import tiny_values, write_tiny_store
from pipeline.training.launch import run_in_process
from pipeline.training.start import record


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Store]:
    """A finished run of two steps with its store; the images it was made from lie in images/."""
    root = tmp_path_factory.mktemp("model")
    store = write_tiny_store(root)
    config = build_config(tiny_values(str(root), store.folder.uri, {"name": "done", "length": "2 steps"}))
    record(config, run_folder(config), store, [])
    run_in_process(config, store.folder.uri, lambda _: None)
    return root, store


@pytest.fixture(scope="module")
def model(trained: tuple[Path, Store]) -> raydml.EmbeddingModel:
    return raydml.load(str(trained[0] / "runs" / "done"))


def test_embeddings_are_those_of_an_evaluation_and_need_no_dataset(trained: tuple[Path, Store], tmp_path: Path) -> None:
    root, store = trained
    test = store.select(["test"])
    embedder, trunk, method = load_run(str(root / "runs" / "done")).load(store, torch.device("cpu"))
    expected = embedder(test.ids, trunk, method)
    shutil.copytree(root / "runs" / "done", tmp_path / "alone")  # nothing of the dataset is beside it
    values = (tmp_path / "alone" / "run.json").read_text().replace(store.folder.uri, "/no/such/store")
    (tmp_path / "alone" / "run.json").write_text(values)
    model = raydml.load(str(tmp_path / "alone"))
    paths = store.sources(test.ids)
    assert paths is not None
    found = model.embed(paths, batch_size=3)
    assert found.dtype == torch.float64 and found.shape == (len(test), model.dim) == (len(test), 8)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert model.classes == len(model.class_names) > 5


def test_a_run_evaluated_at_a_larger_size_embeds_at_that_size(tmp_path: Path) -> None:
    store = write_tiny_store(tmp_path)
    changes = {"name": "scaled", "length": "1 steps", "data.transforms.evaluation_scale": 1.5}
    config = build_config(tiny_values(str(tmp_path), store.folder.uri, changes))
    record(config, run_folder(config), store, [])
    run_in_process(config, store.folder.uri, lambda _: None)
    protocol = run_folder(config).read_json(SUMMARY)["protocol"]
    assert protocol["test_pixels"] == "resize 36, centre crop 36 (trained at 24)"
    test = store.select(["test"])
    run = load_run(str(tmp_path / "runs" / "scaled"))
    embedder, trunk, method = run.load(store, torch.device("cpu"))
    model = raydml.load(str(tmp_path / "runs" / "scaled"))
    expected = embedder(test.ids, trunk, method)
    torch.testing.assert_close(model.embed(store.sources(test.ids)), expected, rtol=0, atol=1e-12)
    assert model.transforms.size == 36 and "36×36" in repr(model)
    options = ExportOptions("onnx", int8=True, data=store.folder.uri)
    export_model(model, Folder(tmp_path / "out"), options)
    exported = Folder(tmp_path / "out").read_json("export.json")
    assert exported["input"]["shape"] == "[B, 3, 36, 36]" and exported["transforms"]["size"] == 36
    final = run_folder(config).read_json(SUMMARY)["final"]
    assert exported["measured"]["int8"]["float32"]["recall@1"] == pytest.approx(final["recall@1"], abs=1e-3)
    with torch.no_grad():
        small = [evaluation_pixels(read_input("it", path), config.data.transforms) for path in store.sources(test.ids)]
        assert (model.embed_pixels(torch.stack(small)) - expected).abs().max() > 1e-3, "the size makes a difference"


def test_the_class_names_are_those_of_the_labels_that_were_trained(
    trained: tuple[Path, Store], model: raydml.EmbeddingModel
) -> None:
    root, store = trained
    fold = model.config.data.validation_fold
    assert fold is not None and model.class_names == store.select(["train"], without_fold=fold).class_names
    (root / "runs" / "done" / CLASS_NAMES).rename(root / "names")
    try:
        assert raydml.load(str(root / "runs" / "done")).class_names == ()  # a run of an earlier version
    finally:
        (root / "names").rename(root / "runs" / "done" / CLASS_NAMES)


def as_given(path: str) -> dict[str, Any]:
    """One image in every form that `embed` takes."""
    image = Image.open(path)
    array = np.array(image.convert("RGB"))
    return {
        "path": path,
        "Path": Path(path),
        "list": [path],
        "bytes": Path(path).read_bytes(),
        "Pillow": image,
        "array": array,
        "channels first": np.ascontiguousarray(array.transpose(2, 0, 1)),
        "tensor": torch.from_numpy(array).permute(2, 0, 1),
        "batch": array[None],
        "iterator": iter([path]),
    }


@pytest.mark.parametrize(
    "form",
    ["path", "Path", "list", "bytes", "Pillow", "array", "channels first", "tensor", "batch", "iterator"],
)
def test_every_form_of_an_image_gives_the_same(
    form: str, trained: tuple[Path, Store], model: raydml.EmbeddingModel
) -> None:
    path = str(trained[0] / "images" / "test00" / "0.png")
    torch.testing.assert_close(model.embed(as_given(path)[form]), model.embed([path]), rtol=0, atol=0)


def test_a_folder_is_embedded_in_the_order_of_its_paths(
    trained: tuple[Path, Store], model: raydml.EmbeddingModel
) -> None:
    folder = trained[0] / "images"
    paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    expected = model.embed([folder / path for path in paths])
    torch.testing.assert_close(model.embed(folder, threads=3), expected, rtol=0, atol=1e-12)
    names = [name for batch in model.embed_batches(folder, batch_size=16) for name in batch.names]
    assert names == [f"{folder}/{path}" for path in paths]


def test_images_are_taken_as_they_are_needed(trained: tuple[Path, Store], model: raydml.EmbeddingModel) -> None:
    path, taken = str(trained[0] / "images" / "test00" / "0.png"), []

    def endless() -> Iterator[str]:
        while True:
            taken.append(1)
            yield path

    batches = model.embed_batches(endless(), batch_size=4)
    assert len(next(batches).names) == 4
    assert len(taken) <= 16
    batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("images")]


def test_no_image_gives_no_rows(model: raydml.EmbeddingModel) -> None:
    assert model.embed([]).shape == (0, model.dim)


def rotated_jpeg() -> bytes:
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.linear_gradient("L").convert("RGB").save(out, "JPEG", exif=exif)
    return out.getvalue()


def test_a_rotated_photograph_is_turned_as_when_a_dataset_is_prepared() -> None:
    pixels = read_input("x", rotated_jpeg())
    assert pixels[0, 128, 10] > pixels[0, 128, -10] + 100  # dark at the top: at the right once it is turned


def large_png() -> bytes:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def truncated_jpeg() -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3)).astype(np.uint8)
    Image.fromarray(noise).save(out, "JPEG", quality=95)
    return out.getvalue()[: len(out.getvalue()) // 2]


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (b"", "image 1: the file is empty (0 bytes)"),
        (b"hello world, this is text", "image 1: a text file, not an image"),
        (large_png(), "image 1: 40000 × 40000 pixels, more than the limit of 100,000,000"),
        (truncated_jpeg(), "image 1: the image is truncated"),
        ("/no/such/file.jpg", "/no/such/file.jpg: there is no such file"),
        (np.zeros((3, 8, 8), np.float32), "image 1: got float32 [3, 8, 8], expected uint8"),
        (torch.zeros(8, 8, dtype=torch.uint8), "image 1: got uint8 [8, 8], expected uint8"),
        (np.zeros((0, 8, 3), np.uint8), "image 1: got uint8"),
    ],
)
def test_a_bad_image_is_named_in_one_line(image: Any, says: str, model: raydml.EmbeddingModel) -> None:
    good = np.zeros((9, 9, 3), np.uint8)
    with pytest.raises(ImageError) as caught:
        model.embed([good, image, good])
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)
    batch = next(model.embed_batches([good, image, good]))
    assert batch.names == ["image 0", "image 2"] and len(batch.embeddings) == 2 and len(batch.rejected) == 1


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (5, "got images of type int, expected a path"),
        ([None], "got an image of type NoneType, expected a path"),
        ([[b""]], "got an image of type list"),
    ],
)
def test_what_is_no_image_is_told(images: Any, says: str) -> None:
    with pytest.raises(UserError, match=f"^{says}"):
        list(image_inputs(images))


def test_an_empty_folder_is_told(tmp_path: Path, model: raydml.EmbeddingModel) -> None:
    with pytest.raises(UserError, match=f"^folder {tmp_path} has no images$"):
        model.embed(tmp_path)


def test_images_of_object_storage(bucket: str, trained: tuple[Path, Store], model: Any) -> None:
    folder = Folder(f"{bucket}/images")
    for name in ("a/0.png", "a/1.png", "b/0.png"):
        folder.write(name, (trained[0] / "images" / "test00" / name[2:]).read_bytes())
    assert [name for name, _ in image_inputs(folder.uri)] == [
        f"{folder}/{n}" for n in ("a/0.png", "a/1.png", "b/0.png")
    ]
    rows = model.embed(folder.uri)
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])
    torch.testing.assert_close(model.embed(f"{folder}/a/1.png"), rows[1:2], rtol=0, atol=1e-12)


def test_several_threads_get_what_one_gets(trained: tuple[Path, Store], model: raydml.EmbeddingModel) -> None:
    folders = [trained[0] / "images" / f"test0{i}" for i in range(4)]
    expected = [model.embed(folder) for folder in folders]
    found: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: model.embed(folders[i])})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        torch.testing.assert_close(found[i], expected[i], rtol=0, atol=1e-12)


def test_similarity(model: raydml.EmbeddingModel) -> None:
    a = torch.eye(8)[:2] * 3
    torch.testing.assert_close(model.similarity(a, a), torch.eye(2))
    model.distance, before = "euclidean", model.distance
    try:
        torch.testing.assert_close(model.similarity(a, a), -3 * 2**0.5 * (1 - torch.eye(2)))
    finally:
        model.distance = before
    with pytest.raises(UserError, match=r"got embeddings \[2, 7\] and \[2, 8\], expected \[N, 8\] twice"):
        model.similarity(a[:, :7], a)


@pytest.mark.parametrize("name", ["baseline", "gca_hng", "intra_batch", "mmsi", "osm_caa", "smart_mining"])
def test_what_embeds_is_the_whole_method_of_every_method(name: str, make_config: Callable[..., Config]) -> None:
    """A method that only its head embeds for is loaded without the rest; the embeddings are those of the whole."""
    assert name in METHODS
    config = make_config({"method": {"name": name, "embedding_dim": 8}, "model.batch_norm": "frozen"})
    trunk, method = build_network(config, 13, torch.device("cpu"))
    trunk.set_mode(False, Ranks())
    method.eval()
    settings = EmbeddingConfig.read(config.model_dump(mode="json"), "config.yaml")
    light = build_for_embedding(settings, 13, torch.device("cpu"), (trunk.state_dict(), method.state_dict()))
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (5, 3, 24, 24)).astype(np.uint8))
    with torch.no_grad():
        expected = method.embed(trunk(pixels))
        torch.testing.assert_close(light[1].embed(light[0](pixels)), expected, rtol=0, atol=0)
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(5, dtype=expected.dtype))
    assert (type(light[1]) is Method) == (name != "gca_hng")


def test_an_exported_folder_gives_the_same_model(
    trained: tuple[Path, Store], model: raydml.EmbeddingModel, tmp_path: Path
) -> None:
    write_model(model, Folder(tmp_path / "m"))
    again = raydml.load(str(tmp_path / "m"))
    images = trained[0] / "images" / "test00"
    torch.testing.assert_close(again.embed(images), model.embed(images), rtol=0, atol=0)
    assert again.fingerprint == model.fingerprint and again.class_names == model.class_names
    assert str(trained[0]) not in (tmp_path / "m" / "model.json").read_text()  # no path of this machine is published
    with pytest.raises(UserError, match="is an exported model, which has one checkpoint"):
        raydml.load(str(tmp_path / "m"), checkpoint="best")
    with pytest.raises(UserError, match="is not empty: choose another folder"):
        write_model(model, Folder(tmp_path / "m"))


@pytest.mark.parametrize("name", ["trunk.safetensors", "method.safetensors", "class_names.json"])
def test_an_exported_folder_that_is_not_whole_is_refused(
    name: str, model: raydml.EmbeddingModel, tmp_path: Path
) -> None:
    write_model(model, Folder(tmp_path / "m"))
    file = tmp_path / "m" / name
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"{name} is damaged \(its checksum differs\): copy the folder again"):
        raydml.load(str(tmp_path / "m"))
    file.unlink()
    with pytest.raises(UserError, match=f"{name} is missing: copy the folder again"):
        raydml.load(str(tmp_path / "m"))


def test_other_weights_are_another_model(model: raydml.EmbeddingModel) -> None:
    other = raydml.load(model.source)
    assert other.fingerprint == model.fingerprint
    with torch.no_grad():
        next(other.method.parameters()).add_(1e-6)
    del other.__dict__["fingerprint"]
    assert other.fingerprint != model.fingerprint


def test_an_export_for_other_programs_is_told(tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text('{"format": "onnx"}')
    with pytest.raises(
        UserError, match=f"^{tmp_path} is a model exported as onnx, for other programs; raydml.load reads"
    ):
        raydml.load(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("no_such",), "'no_such' is neither a run .* nor an exported model"),
        (("hf://name",), r"'hf://name': expected hf://OWNER/NAME"),
        (("RUN", "7"), r"--checkpoint 7: expected best, last or one of the steps"),
        (("RUN", None, "cuda:99"), "device 'cuda:99' cannot be used"),
        (("RUN", None, "nonsense"), "device 'nonsense' cannot be used"),
    ],
)
def test_what_cannot_be_loaded_is_told(arguments: tuple[Any, ...], says: str, model: raydml.EmbeddingModel) -> None:
    arguments = tuple(model.source if a == "RUN" else a for a in arguments)
    with pytest.raises(UserError, match=f"^{says}") as caught:
        raydml.load(*arguments)
    assert "\n" not in str(caught.value)
