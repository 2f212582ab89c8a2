"""What a command imports: nothing heavy for its help and for bad arguments, else what it needs; in fresh interpreters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HEAVY = {
    "torch", "torchvision", "torch._dynamo", "ray", "timm", "faiss", "scipy", "sklearn", "numba", "matplotlib", "pandas",
    "pytorch_metric_learning", "tensorboardX", "optuna", "plotly",
}  # fmt: skip
COMMANDS = ["train", "doctor", "prepare", "evaluate", "explore", "report", "export", "watch", "stop", "search", "serve"]


def imported(code: str, *arguments: object) -> tuple[set[str], str]:
    """Heavy packages that are loaded after `code` ran, however it ended, and what it wrote to stderr."""
    shown = f"import sys\ntry:\n    {code}\nfinally:\n    print('loaded', *({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", shown, *map(str, arguments)], capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:]), done.stderr


def main_of(command: str) -> str:
    return f"from pipeline.{command} import main; main(sys.argv[1:])"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command: str) -> None:
    assert imported(main_of(command), "--help")[0] == set()


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        ("train", ["--sed", "x"], "unrecognized arguments"),
        ("train", ["baseline/emojy"], "did you mean the preset 'baseline/emoji'"),
        ("train", ["--set", "seed"], "expected KEY=VALUE"),
        ("doctor", ["baseline/emojy"], "did you mean the preset 'baseline/emoji'"),
        ("train", ["--dry-run", "--set", "seed"], "expected KEY=VALUE"),
        ("prepare", ["emojy"], "invalid choice: 'emojy'"),
        ("prepare", ["emoji", "--folds", "1"], "--folds has to be at least 2"),
        ("evaluate", ["--split", "x", "run"], "invalid choice: 'x'"),
        ("evaluate", ["a.npy", "b", "c"], "got 3 inputs"),
        ("evaluate", ["a", "b", "c"], "'a' is neither a run folder nor a run"),
        ("evaluate", ["a", "b", "--save", "x"], "--save goes with one run, got 2"),
        ("explore", ["--split", "x", "run"], "invalid choice: 'x'"),
        ("explore", ["no_such"], "'no_such' is neither a run folder nor a run"),
        ("report", [], "the following arguments are required"),
        ("export", ["run"], "the following arguments are required: --to"),
        ("export", ["run", "--to", "x", "--format", "caffe"], "invalid choice: 'caffe'"),
        ("export", ["run", "--to", ".", "--private"], "--private goes with --push-to-hub"),
        ("export", ["run", "--to", "."], "is not empty: choose another folder"),
        ("watch", ["--every", "0", "x"], "expected more than 0 seconds"),
        ("watch", ["no_such"], "'no_such' is neither a folder of a run or a sweep, nor"),
        ("search", ["query", "no_such", "a.png"], "holds no index"),
        ("search", ["query", "s3://x/y", "a.png"], "has to lie in a local folder"),
        ("search", ["info", "no_such"], "holds no index"),
        ("search", ["build", "run", "--to", "s3://x/y"], "has to lie in a local folder"),
        ("serve", ["no_such"], "holds no index"),
        ("serve", ["--port", "0", "no_such"], "expected 1 to 65535"),
        ("stop", ["--timeout", "-1", "x"], "expected 0 or more seconds"),
        ("stop", ["no_such"], "'no_such' is neither a folder of a run or a sweep, nor"),
    ],
)
def test_bad_arguments_are_told_without_heavy_imports(command: str, arguments: list[str], says: str) -> None:
    loaded, err = imported(main_of(command), *arguments)
    assert says in err and loaded == set()


def test_a_run_says_its_name_before_it_imports_pytorch() -> None:
    code = """
import sys
class Stop:
    def find_spec(self, name, *_):
        if name == "torch":
            sys.exit(77)
sys.meta_path.insert(0, Stop())
from pipeline.train import main
main(["osm_caa/emoji", "--set", "name=first"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (77, "first: loading PyTorch ...\n")


def test_evaluation_of_arrays_imports_what_it_needs(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(12, 4)))
    np.save(tmp_path / "y.npy", np.arange(12) // 3)
    loaded, _ = imported(main_of("evaluate"), tmp_path / "x.npy", tmp_path / "y.npy")
    assert loaded == {"torch", "numba", "scipy"}  # scipy: the bare package, by numba


@pytest.mark.parametrize(
    ("module", "unneeded"),
    [
        ("pipeline.config", HEAVY - {"torch"}),  # of every command and worker
        ("pipeline.training.loop", {"matplotlib", "sklearn", "pandas", "pytorch_metric_learning"}),  # of a worker
        ("pipeline.training.start", {"matplotlib", "sklearn", "pandas", "pytorch_metric_learning"}),  # of the driver
        ("pipeline.tuning.write_answer", HEAVY),  # of commands that show a sweep, and of its driver
        ("pipeline.tuning.watch_text", HEAVY),  # of a shell that watches a sweep
        ("pipeline.runs.watch_run", HEAVY),  # of a shell that watches a run
        ("pipeline.distributed.spot_notice", HEAVY),  # beside Ray on every node; Ray itself is loaded when it waits
        ("pipeline.searching.index_files", HEAVY),  # of a command that says what is wrong with an index
        ("pipeline.diagnosis.node_facts", HEAVY),  # of a node that is asked what it is
        ("pipeline.data.write_store", HEAVY),  # of a task that prepares images
        ("pipeline.inference.embed", {"matplotlib", "sklearn", "pytorch_metric_learning"}),  # of a task that embeds
    ],
)
def test_processes_do_not_import_what_they_do_not_use(module: str, unneeded: set[str]) -> None:
    assert imported(f"import {module}")[0] & unneeded == set()
