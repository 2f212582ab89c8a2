"""Writes docs/guides/errors.md from what the commands really say: `python -m tools.error_page`.

Each command is run in this process, in a temporary folder; nothing starts Ray. A test holds the page to what is said today.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from methods.plugins import FOLDERS
from pipeline import cli, prepare
from pipeline.distributed.jobs import run_serially

PAGE = Path(__file__).parent.parent / "docs" / "guides" / "errors.md"
HEADER = """\
# Messages and what to do

A command that cannot go on says why in its last line, which begins with `error:`: what it got, what it expected, what to
change. Input is checked before any cluster time is spent, and what was there before stays. The exit status is 2 for bad input, 1
for a run that failed, 130 after Ctrl-C, 128 + N after signal N. Every message below is printed by the command above it
(`python -m tools.error_page` runs them all and writes this page); `~/raydml` stands for your storage.
"""
DURING = """
## While a run trains

These end a run with exit status 1; the newest checkpoint is kept, and the same command continues from it.

| message | what to do |
|---|---|
| `the loss is not finite ...`, `the gradient of ... is not finite ...` | the step was not taken; the message names the batch and the parameter: look at these images, lower `method.optimizer.lr`, or set `method.optimizer.clip_norm` |
| `No space left on device` | make room in the folder that is named, and run the command again; the checkpoint before is whole |
| `shard ... is damaged` | the file differs from its checksum: restore it, or prepare the dataset again |
| `no mining server could be reached for ...` | the node of the mining servers is gone for longer than `mining.deadline_s`: see [mining](mining.md) |
"""


class Place:
    """A folder with a prepared dataset, a finished run and the files that the commands below read."""

    def __init__(self, root: Path) -> None:
        self.root, self.home = root, root / "raydml"
        os.environ["RAYDML_HOME"] = str(self.home)
        os.chdir(root)
        for c in range(12):
            self.images(f"photos/bird{c:02d}", 4, c)
        for c in range(2):
            self.images(f"two/class{c}", 4, c)
        (root / "empty").mkdir()
        (root / "open.csv").write_text('path,label\nphotos/bird00/0.jpg,heron\nphotos/bird01/0.jpg,"grey heron\n')
        (root / "nothing.yaml").write_text("# nothing yet\n")
        x = np.random.default_rng(0).normal(size=(8, 4))
        x[3] = np.nan
        np.save("embeddings.npy", x)
        np.save("labels.npy", np.arange(8) // 2)

    def images(self, folder: str, number: int, seed: int) -> None:
        Path(folder).mkdir(parents=True)
        for i in range(number):
            pixels = np.random.default_rng([seed, i]).integers(0, 255, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((32, 32)).save(f"{folder}/{i}.jpg")


SMALL = (
    "name=birds data.source=photos data.transforms.size=32 data.transforms.resize=32 model.backbone=test_resnet model.weights=none "
    "method.classes_per_batch=3 method.samples_per_class=2 method.embedding_dim=8 length='1 epochs' evaluation.clustering=false "
    "runtime.workers=0 runtime.loader=in_process"
)
SECTIONS: dict[str, list[str]] = {
    "Keys and values": [
        "raydml train --set method.optimizer.lrr=1e-4",
        "raydml train --set batch_size=64",
        "raydml train --set epochs=20",
        "raydml train --set model=resnet50",
        "raydml train --set length=20",
        "raydml train --set precision=fp16",
        "raydml train --set method.loss=TripletMarginLos",
        "raydml train --set method.loss=my_losses:MyLoss",
        "raydml train --set protocol=paper --set data.validation_fold=0",
    ],
    "Recipes and runs": [
        "raydml train bird.yaml",
        "raydml train nothing.yaml",
        "raydml train photos",
        "raydml train baseline/emojo",
        "raydml train birds.yaml --set seed=1",
    ],
    "Datasets": [
        "raydml train birds.yaml --set data.source=phtos",
        "raydml train birds.yaml --set data.source=./photos",
        "raydml train birds.yaml --set method.classes_per_batch=40",
        "raydml train birds.yaml --set data.validation_fold=7",
        "raydml prepare folder empty",
        "raydml prepare folder two",
        "raydml prepare csv open.csv",
    ],
    "Networks": [
        "raydml train birds.yaml --set model.backbone=resnet5O",
        "raydml train birds.yaml --set model.weights=weights.pth",
    ],
    "Machines and storage": [
        "raydml train birds.yaml --set storage=/proc/raydml",
        "RAY_ADDRESS=http://10.0.0.5:8265 raydml prepare folder photos --to again",
    ],
    "Evaluation": [
        "raydml evaluate bird",
        "raydml evaluate birds --checkpoint 500",
        "raydml evaluate embeddings.npy labels.npy",
    ],
}


def said(command: str) -> str:
    """The last line that a command writes to stderr.

    Raises:
        RuntimeError: It succeeded.
    """
    words = shlex.split(command)
    variables = [word.partition("=") for word in words if re.match(r"[A-Z_]+=", word)]
    before = dict(os.environ)
    os.environ.update({name: value for name, _, value in variables})
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            status = cli.main(words[len(variables) + 1 :])
    finally:
        os.environ.clear()
        os.environ.update(before)
    if status == 0:
        raise RuntimeError(f"{command!r} succeeded")
    return err.getvalue().strip().splitlines()[-1]


def page() -> str:
    """The page's text."""
    here = os.getcwd()
    before = dict(os.environ)
    for name in ("RAY_ADDRESS", FOLDERS):  # folders of modules that commands before have named in this process
        os.environ.pop(name, None)
    try:
        with tempfile.TemporaryDirectory() as folder:
            place = Place(Path(folder).resolve())
            return HEADER + "\n".join(_lines(place)) + "\n" + DURING
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _without_ray() -> Iterator[None]:
    """Prepares in this process."""
    session, run = prepare.ray_session, prepare.run_on_ray
    prepare.ray_session = lambda cpus: contextlib.nullcontext()  # type: ignore[assignment]
    prepare.run_on_ray = run_serially
    try:
        yield
    finally:
        prepare.ray_session, prepare.run_on_ray = session, run


def _lines(place: Place) -> Iterator[str]:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        with _without_ray():
            assert cli.main(["prepare", "folder", "photos"]) == 0
        settings = [word for setting in shlex.split(SMALL) for word in ("--set", setting)]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert cli.main(["config", *settings]) == 0
        Path("birds.yaml").write_text(printed.getvalue())
        assert cli.main(["train", "birds.yaml"]) == 0
    for title, commands in SECTIONS.items():
        yield f"\n## {title}\n"
        for command in commands:
            text = said(command).replace(str(place.home), "~/raydml").replace(str(place.root), "/home/you")
            yield f"```console\n$ {command}\n{text}\n```\n"


def main() -> int:
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
