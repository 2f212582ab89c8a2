"""`raydml`: one program for all commands, and the commands that show what there is."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from methods import METHODS
from pipeline import cli, train
from pipeline.config import to_yaml
from pipeline.recipes import load_config, preset_names, read_recipe
from pipeline.storage import Folder
from pipeline.testing.tiny import write_images
from pipeline.tuning.shipped import sweep_file_names, sweep_file_title
from pipeline.tuning.sweep_folder import SweepFolder, TrialRecord, sweep_folder, write_state
from tests.pipeline.conftest import Base
from tests.pipeline.test_startup import imported
from tests.pipeline.tuning.synthetic import make_sweep, search

ROOT = Path(__file__).parents[2]
Said = tuple[int, str, str]
Raydml = Callable[..., Said]


@pytest.fixture
def raydml(capsys: pytest.CaptureFixture) -> Raydml:
    """`raydml("list", "presets")`: status, stdout and stderr."""

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        try:
            status = cli.main([str(a) for a in arguments])
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        return status, *capsys.readouterr()

    return run


# ---- the program -----------------------------------------------------------------------------------------------------


def test_the_console_script_is_the_program() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"raydml": "pipeline.cli:main"}


def test_version(raydml: Raydml) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert raydml("--version") == (0, f"raydml {version}\n", "")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_a_help_under_both_names(command: str, raydml: Raydml) -> None:
    status, out, _ = raydml(command, "--help")
    assert status == 0 and out.startswith(f"usage: raydml {command} ")
    module = cli.COMMANDS[command][0]
    assert importlib.import_module(module).build_parser().format_usage().startswith(f"usage: python -m {module} ")
    assert f"\n  {command} " in raydml("--help")[1]


def test_arguments_reach_the_command(raydml: Raydml, capsys: pytest.CaptureFixture) -> None:
    same = raydml("train", "baseline/emojy")
    assert same[0] == 2 and "did you mean the preset 'baseline/emoji'" in same[2]
    assert (train.main(["baseline/emojy"]), *capsys.readouterr()) == same


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "unknown command 'trian': did you mean 'train'?"),
        ([], "expected a command: train, prepare"),
        (["--verson"], "unrecognized arguments: --verson"),
    ],
)
def test_unknown_commands(arguments: list[str], says: str, raydml: Raydml) -> None:
    status, out, err = raydml(*arguments)
    assert status == 2 and says in err and not out


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in cli.COMMANDS)], ids=" ".join
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert imported("from pipeline.cli import main; main(sys.argv[1:])", *arguments)[0] == set()


@pytest.mark.parametrize("kind", ["presets", "runs", "sweeps", "tune_configs", "datasets"])
def test_lists_of_files_import_nothing_heavy(kind: str, base: Base) -> None:
    code = "from pipeline.cli import main; main(sys.argv[1:])"
    assert imported(code, "list", kind, "--storage", base.root)[0] == set()


# ---- list ------------------------------------------------------------------------------------------------------------


def names(said: Said) -> list[str]:
    status, out, err = said
    assert status == 0 and not err
    return [line.split()[0] for line in out.splitlines()]


def test_list_presets(raydml: Raydml) -> None:
    assert names(raydml("list", "presets")) == preset_names()
    assert names(raydml("list", "presets", "CUB_DINO")) == ["baseline/cub_dinov2", "gca_hng/cub_dino"]
    assert names(raydml("list", "presets", "gca*_dino")) == [
        f"gca_hng/{d}_dino" for d in ("cars", "cub", "inshop", "sop")
    ]
    assert (
        "gca_hng/cub_dino  GCA-HNG on CUB-200-2011, DINO ViT-S/16\n" in raydml("list", "presets", "gca_hng/cub_dino")[1]
    )


def test_list_runs_and_datasets(raydml: Raydml, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, _ = raydml("list", "runs", "--storage", base.root)
    figures = base.run.read_json("summary.json")["final"]
    assert status == 0 and out.split()[:3] == ["done", "finished", "baseline"]
    assert out.rstrip().endswith(f"recall@1 {figures['recall@1']:.2f}, map@r {figures['map@r']:.2f}")
    other = Folder(tmp_path) / "runs" / "open"
    other.write("config.yaml", to_yaml(load_config(None, ["name=open"])).encode())
    other.write("checkpoints/step-00001234/checkpoint.json", b"{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "birds").symlink_to(base.store.folder.path())
    monkeypatch.setenv("RAYDML_HOME", str(tmp_path))
    assert raydml("list", "runs")[1].split()[:4] == ["open", "at", "step", "1,234"]
    splits = base.store.manifest["splits"]
    shown = "; ".join(f"{s}: {splits[s]['images']:,} images of {splits[s]['classes']:,} classes" for s in splits)
    assert raydml("list", "datasets") == (0, f"birds  {shown}\n", "")


def test_list_sweeps(raydml: Raydml, tmp_path: Path) -> None:
    def made(name: str, *records: TrialRecord) -> Folder:
        folder = sweep_folder(str(tmp_path), name)
        folder.write("sweep.yaml", yaml.safe_dump(make_sweep(name=name).model_dump(mode="json")).encode())
        writer = SweepFolder(folder)
        writer.acquire()
        for record in records:
            writer.write(record)
        return folder

    trials = [search(0, "a", 31.0), search(1, "b", 20.25), search(2, "b", None, state="failed")]
    write_state(made("done", *trials), "finished")
    made("new")
    made("silent").write_json("state.json", {"state": "running", "heartbeat": 1.0, "message": ""})
    made("torn").write("trials/00000.json", b"{}")
    (tmp_path / "sweeps" / "no_sweep").mkdir()
    lines = raydml("list", "sweeps", "--storage", tmp_path)[1].splitlines()
    assert [re.split(r"\s{2,}", line) for line in lines[:3]] == [
        ["done", "finished", "3 trials: 2 finished, 1 failed", "map@r 31.00 a, 20.25 b"],
        ["new", "not started", "0 trials"],
        ["silent", "silent", "0 trials"],
    ]
    assert lines[3].startswith("torn  ") and "sweeps/torn/trials/00000.json is not the record of a trial" in lines[3]
    assert raydml("list", "sweeps", "xyz", "--storage", tmp_path)[0] == 2


def test_list_sweep_files(raydml: Raydml) -> None:
    assert names(raydml("list", "tune_configs")) == sweep_file_names()
    assert names(raydml("list", "tune_configs", "emoji")) == ["emoji_quick"]
    assert f"emoji_quick  {sweep_file_title('emoji_quick')}\n" == raydml("list", "tune_configs", "emoji")[1]


def test_a_damaged_run_does_not_hide_the_others(raydml: Raydml, base: Base, tmp_path: Path) -> None:
    good, damaged = variant(base, tmp_path), Folder(tmp_path) / "runs" / "damaged"
    damaged.write("config.yaml", b"half: [")
    out = raydml("list", "runs", "--storage", tmp_path)[1].splitlines()
    assert out[0].startswith(f"damaged  {damaged}/config.yaml is not the config of a run") and out[1].startswith(
        "other"
    )
    assert good.exists("config.yaml")


def test_list_of_nothing(raydml: Raydml, tmp_path: Path) -> None:
    assert raydml("list", "runs", "--storage", tmp_path) == (0, "", f"no runs below {tmp_path} yet\n")
    status, out, err = raydml("list", "losses", "MultiSimilartyLoss")
    assert (
        status == 2
        and not out
        and err.startswith("error: none of the ")
        and "did you mean 'MultiSimilarityLoss'?" in err
    )


def test_list_what_a_recipe_may_name(raydml: Raydml) -> None:
    assert names(raydml("list", "methods")) == list(METHODS)
    assert names(raydml("list", "losses", "*ProxyA*")) == ["ProxyAnchorLoss"]
    assert "MultiSimilarityMiner" in names(raydml("list", "miners"))
    found = names(raydml("list", "backbones", "resnet18"))
    assert {"resnet18", "torchvision/resnet18"} <= set(found) and all("resnet18" in name for name in found)
    assert names(raydml("list", "backbones", "bn_inc*")) == ["bn_inception"]


def test_a_reader_that_has_enough_ends_a_list_quietly() -> None:
    command = [sys.executable, "-m", "pipeline.cli", "list", "presets"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0


# ---- config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", preset_names())
def test_a_printed_config_reads_back_equal(name: str, raydml: Raydml, tmp_path: Path) -> None:
    status, out, err = raydml("config", name, "--set", "seed=7", "--set", "method.optimizer.lr=1e-5")
    assert status == 0 and not err
    (tmp_path / "again.yaml").write_text(out)
    config = load_config(str(tmp_path / "again.yaml"))
    assert config == load_config(name, ["seed=7", "method.optimizer.lr=1e-5"]) and config.seed == 7
    assert max(map(len, (line for line in out.splitlines() if line.lstrip().startswith("#")))) <= 110


def test_meanings_stand_above_their_keys(raydml: Raydml) -> None:
    lines = raydml("config")[1].splitlines()
    assert lines[lines.index("  backbone: tf_efficientnet_lite0") - 1].startswith("  # a timm model, hf-hub:OWNER/NAME")
    workers = lines.index("  workers: 1")
    assert lines[workers - 2].startswith("  # * Ray Train workers; 0: this process, without Ray Train")
    assert lines[lines.index("seed: 0") - 1].startswith("# seed of all")


def test_refused_configs(raydml: Raydml) -> None:
    for arguments, says in (
        (["--set", "sed=1"], "unknown key 'sed': did you mean 'seed'"),
        (["no/such"], "neither a file nor a preset"),
        (["--schema", "baseline/emoji"], "--schema is that of all recipes"),
    ):
        status, out, err = raydml("config", *arguments)
        assert status == 2 and says in err and not out and err.count("\n") == 1


@pytest.fixture(scope="module")
def schema() -> Any:
    from pipeline.config_text import json_schema

    return jsonschema.Draft202012Validator(json.loads(json.dumps(json_schema())))


def test_the_schema_accepts_presets(schema: Any) -> None:
    jsonschema.Draft202012Validator.check_schema(schema.schema)
    for name in preset_names():
        assert list(schema.iter_errors(read_recipe(name))) == [], name
    assert schema.is_valid({"preset": "baseline/emoji", "seed": 1, "method": "osm_caa"})


@pytest.mark.parametrize(
    "values",
    [
        {"sed": 1},
        {"seed": -1},
        {"length": 3},
        {"length": "3 hours"},
        {"method": "osm"},
        {"method": {"name": "osm_caa", "loss": "MultiSimilarityLoss"}},
        {"method": {"optimizer": {"lrr": 1}}},
        {"model": {"pooling": "mean"}},
    ],
    ids=str,
)
def test_the_schema_refuses(values: dict[str, Any], schema: Any) -> None:
    assert not schema.is_valid(values)


# ---- compare ---------------------------------------------------------------------------------------------------------


def variant(base: Base, root: Path, **changes: Any) -> Folder:
    """A copy of the finished run's records, with other settings, figures and dataset."""
    run = Folder(root) / "runs" / "other"
    config = yaml.safe_load(base.run.read("config.yaml")) | {"name": "other", "seed": 99}
    config["method"]["optimizer"]["lr"] = 0.125
    run.write("config.yaml", yaml.safe_dump(config).encode())
    run.write_json("run.json", base.run.read_json("run.json") | changes)
    summary = base.run.read_json("summary.json")
    summary["final"] = {"recall@1": 12.5, "queries": 3, "new_metric": 1.0}
    run.write_json("summary.json", summary)
    return run


def table(out: str, title: str) -> dict[str, list[str]]:
    """Cells of one table by the first."""
    lines = out.split(f"{title}\n")[1].split("\n\n")[0].splitlines()
    return {line.split()[0]: line.split()[1:] for line in lines[1:]}


def test_compare(raydml: Raydml, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant(base, tmp_path)
    monkeypatch.setenv("RAYDML_HOME", str(tmp_path))
    status, out, err = raydml("compare", base.run, "other")
    assert status == 0 and not err
    before = yaml.safe_load(base.run.read("config.yaml"))
    assert table(out, "settings that differ") == {
        "seed": [str(before["seed"]), "99"],
        "method.optimizer.lr": [str(before["method"]["optimizer"]["lr"]), "0.125"],
    }
    figures = table(out, "figures on the test classes, %")
    final = base.run.read_json("summary.json")["final"]
    assert figures["recall@1"] == [f"{final['recall@1']:.2f}", "12.50"] and figures["new_metric"] == ["-", "1.00"]
    assert figures["map@r"][1] == "-" and figures["state"] == ["finished", "finished"] and "queries" not in figures
    assert table(out, "protocol")["profile"] == ["fair", "fair"] and "cannot be compared" not in out


def test_figures_of_other_data_cannot_be_compared(raydml: Raydml, base: Base, tmp_path: Path) -> None:
    other = variant(base, tmp_path, fingerprint="another")
    out = raydml("compare", base.run, other)[1]
    assert "The dataset differs: these figures cannot be compared." in out


def test_figures_of_another_kind_cannot_be_compared(raydml: Raydml, base: Base, tmp_path: Path) -> None:
    other = variant(base, tmp_path)
    config = yaml.safe_load(other.read("config.yaml"))
    config["evaluation"]["distractors"] = "junk"
    other.write("config.yaml", yaml.safe_dump(config).encode())
    out = raydml("compare", base.run, other)[1]
    assert "The evaluation.distractors differs: these figures cannot be compared." in out


def test_refused_comparisons(raydml: Raydml, base: Base) -> None:
    for arguments, says in (
        ([base.run], "got one run"),
        ([base.run, "no-such-run"], "is neither a run folder nor a run in"),
    ):
        status, out, err = raydml("compare", *arguments)
        assert status == 2 and says in err and not out


# ---- completion, and folders that hide the product -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("raydml pre", {"prepare "}),
        ("raydml list ba", {"backbones "}),
        ("raydml evaluate --rec", {"--recall-at "}),
        ("raydml --vers", {"--version "}),
    ],
)
def test_completion(line: str, expected: set[str], tmp_path: Path) -> None:
    """As the shell's function of argcomplete asks: an answer on file descriptor 8 (here: a file)."""
    answer = tmp_path / "answer"
    environment = os.environ | {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line, "COMP_POINT": str(len(line)),
                                "_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_COMP_WORDBREAKS": " \n"}  # fmt: skip
    subprocess.run([sys.executable, "-c", "from pipeline.cli import main; main()"], env=environment, check=True)
    assert set(answer.read_text().split("\n")) == expected


@pytest.mark.parametrize("name", ["methods.py", "pipeline.py"])
def test_a_module_of_the_users_folder_does_not_hide_the_product(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("raise RuntimeError('the module of the user')\n")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pipeline.cli import main; sys.exit(main())"
    program = tmp_path / "bin" / "raydml"  # as pip writes a console script: its own folder comes first on the path
    program.parent.mkdir()
    program.write_text(code)
    command = [sys.executable, str(program), "list", "methods"]
    assert "osm_caa" in subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    if name == "methods.py":  # `python -m` puts the working folder before everything else
        command = [sys.executable, "-m", "pipeline.show_list", "methods"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert "osm_caa" in done.stdout


def prepared_on_ray(folder: Path, home: Path) -> str:
    code = f"import sys; sys.path[0] = {str(ROOT)!r}; from pipeline.cli import main; sys.exit(main())"
    program = home / "raydml.py"
    program.write_text(code)
    environment = os.environ | {"RAYDML_HOME": str(home)}
    command = [sys.executable, str(program), "prepare", "folder", "images", "--cpus", "1"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.cluster
def test_a_module_of_the_users_folder_does_not_hide_the_product_from_ray(tmp_path: Path) -> None:
    project, home = tmp_path / "project", tmp_path / "home"
    write_images(project / "images", {f"c{i}": 3 for i in range(12)}, 0)
    home.mkdir()
    for name in ("methods.py", "pipeline.py"):
        (project / name).write_text("raise SystemExit('the module of the user')\n")
    assert "images (" in prepared_on_ray(project, home)
