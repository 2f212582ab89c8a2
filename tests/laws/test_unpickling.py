"""Nothing is unpickled or executed that comes from data, checkpoints, snapshots or sweeps: every place that could is listed here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
LOADERS = {"load", "loads", "Unpickler", "open"}
# Calls that give bytes of another place to an unpickler, or run them: place, number of calls, and why it may.
PERMITTED = {
    "pipeline/distributed/jobs.py": (
        3,
        "functions, tasks and records of the driver's own, between it and its Ray tasks",
    ),
    "pipeline/distributed/collectives.py": (2, "values of the other ranks of the same run"),
    "pipeline/model/weight_files.py": (
        2,
        "torch.load with an unpickler of its own, which makes every class but tensors inert",
    ),
    "pipeline/testing/check_method.py": (
        2,
        "files that the check's own processes have just written to a folder of its own",
    ),
}


def risky(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every call that unpickles or executes what it is given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any("Unpickler" in ast.unparse(base) for base in node.bases):
            yield node.lineno, f"class {node.name}"
        if not isinstance(node, ast.Call):
            continue
        text = ast.unparse(node.func)
        owner, _, name = text.rpartition(".")
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        given = [ast.unparse(argument) for argument in node.args]
        if (owner in MODULES and name in LOADERS) or text in ("eval", "exec", "compile"):
            yield node.lineno, text
        elif text == "torch.load" and keywords.get("weights_only") != "True":
            yield node.lineno, f"{text} without weights_only"
        elif text in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False":
            yield node.lineno, f"{text} without allow_pickle=False"
        elif (
            owner == "yaml"
            and name in ("load", "load_all")
            and not {"_Loader", "yaml.SafeLoader"} & {*given, *keywords.values()}
        ):
            yield node.lineno, f"{text} without the safe loader"
        elif (owner == "yaml" and name.startswith(("unsafe", "full"))) or name in (
            "broadcast_object_list",
            "all_gather_object",
            "gather_object",
            "scatter_object_list",
            "recv_object_list",
        ):
            yield node.lineno, text


def test_places_that_unpickle_are_known() -> None:
    found: dict[str, list[tuple[int, str]]] = {}
    for folder in ("methods", "pipeline", "tune_configs"):
        for path in (ROOT / folder).rglob("*.py"):
            calls = list(risky(ast.parse(path.read_text(encoding="utf-8"))))
            if calls:
                found[path.relative_to(ROOT).as_posix()] = calls
    counts = {place: len(calls) for place, calls in found.items()}
    assert counts == {place: number for place, (number, _) in PERMITTED.items()}, found


def test_the_loader_of_recipes_is_a_safe_one() -> None:
    import yaml

    from pipeline.recipes import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
        yaml.load("!!python/object/apply:os.system ['true']", _Loader)


@pytest.mark.parametrize(
    "code",
    [
        "pickle.load(f)", "cloudpickle.loads(b)", "joblib.load(p)", "torch.load(p)", "torch.load(p, weights_only=False)",
        "np.load(p)", "np.load(p, allow_pickle=True)", "yaml.load(t)", "yaml.load(t, yaml.Loader)", "yaml.unsafe_load(t)",
        "eval(t)", "exec(t)", "shelve.open(p)", "class U(pickle.Unpickler): pass", "dist.all_gather_object(a, b)",
    ],
)  # fmt: skip
def test_each_way_is_seen(code: str) -> None:
    assert list(risky(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(p, weights_only=True)",
        "np.load(p, allow_pickle=False)",
        "yaml.load(t, _Loader)",
        "json.load(f)",
        "x.eval()",
    ],
)
def test_safe_ways_are_not(code: str) -> None:
    assert not list(risky(ast.parse(code)))
