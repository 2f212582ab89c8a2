"""What is wrong with a configuration, one line a problem: the key, what was got, and the key or value that was probably meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel

from methods import METHODS, method_class
from methods.config import Length
from pipeline.errors import close_names, did_you_mean


class Meant(NamedTuple):
    """The keys that a name of other tools stands for, and how to use them."""

    keys: tuple[str, ...]
    how: str = ""


_LENGTH = Meant(("length",), "with its unit, such as '20 epochs' or '1000 steps'")
_RATE = Meant(("method.optimizer.lr",))
_BATCH = Meant(
    ("method.classes_per_batch", "method.samples_per_class"), "a batch has classes_per_batch × samples_per_class images"
)
_PROCESSES = Meant(("runtime.workers", "runtime.loader_cpus"), "processes that train; CPUs that load images")
_GPUS = Meant(("runtime.workers", "runtime.gpus_per_worker"), "one worker a GPU: runtime.gpus_per_worker=1")
_SOURCE = Meant(("data.source",))
_BACKBONE = Meant(("model.backbone",))
_WEIGHTS = Meant(("model.weights",))
_SIZE = Meant(("data.transforms.size", "data.transforms.resize"))
_TEST_SIZE = Meant(("data.transforms.evaluation_scale",), "the size of evaluation relative to that of training")
_DIM = Meant(("method.embedding_dim",))
_MEMORY = Meant(("method.memory",), "number of past embeddings, for the method baseline")
_PRECISION = Meant(("precision",), "float32 or bf16")
_STORAGE = Meant(("storage",))
_SCHEDULE = Meant(("method.optimizer.schedule.kind",))
_CLIP = Meant(("method.optimizer.clip_norm",))
_EVERY = Meant(("evaluation.every",))
_RECALL = Meant(("evaluation.recall_at",))
_ANNOUNCE = Meant(("runtime.log_every",))

# Names of the same things in other tools, in the form of `_plain`.
ALIASES: dict[str, Meant] = {
    **dict.fromkeys(["epoch", "epochs", "numepochs", "nepochs", "maxepochs", "step", "steps", "maxsteps"], _LENGTH),
    **dict.fromkeys(["iterations", "iters", "maxiters", "niter", "trainsteps", "duration"], _LENGTH),
    **dict.fromkeys(["learningrate", "baselr", "initlr", "alpha0"], _RATE),
    **dict.fromkeys(["batchsize", "batch", "bs", "trainbatchsize"], _BATCH),
    **dict.fromkeys(["numworkers", "nworkers", "worldsize", "nprocs", "nprocpernode"], _PROCESSES),
    **dict.fromkeys(["gpus", "gpu", "ngpus", "numgpus", "device", "devices", "cuda", "accelerator"], _GPUS),
    **dict.fromkeys(["dataset", "datasets", "dataroot", "datadir", "datapath", "root", "dataname"], _SOURCE),
    **dict.fromkeys(
        ["arch", "architecture", "network", "net", "encoder", "extractor", "modelname", "trunk"], _BACKBONE
    ),
    **dict.fromkeys(["pretrained", "checkpointpath", "initweights"], _WEIGHTS),
    **dict.fromkeys(["imagesize", "imgsize", "inputsize", "cropsize", "resolution", "imsize"], _SIZE),
    **dict.fromkeys(
        ["evaluationsize", "evalsize", "testsize", "testimagesize", "testinputsize", "valsize"], _TEST_SIZE
    ),
    **dict.fromkeys(
        ["embeddingsize", "embedsize", "embdim", "embeddim", "featdim", "featuredim", "outdim", "dim"], _DIM
    ),
    **dict.fromkeys(["crossbatchmemory", "xbm", "memorysize", "queue", "queuesize", "memorybank"], _MEMORY),
    **dict.fromkeys(["amp", "fp16", "bf16", "halfprecision", "mixedprecision", "dtype"], _PRECISION),
    **dict.fromkeys(["output", "outputdir", "outdir", "savedir", "logdir", "workdir", "runsdir"], _STORAGE),
    **dict.fromkeys(["scheduler", "lrscheduler", "lrschedule"], _SCHEDULE),
    **dict.fromkeys(["clip", "clipgrad", "gradclip", "maxgradnorm", "gradientclipval"], _CLIP),
    **dict.fromkeys(
        ["evalevery", "evalinterval", "validevery", "valinterval", "evalfreq", "checkvaleverynepoch"], _EVERY
    ),
    **dict.fromkeys(["topk", "kvalues", "recallk", "recallks", "ks"], _RECALL),
    **dict.fromkeys(["loginterval", "printfreq", "logfreq", "logeverynsteps"], _ANNOUNCE),
    **dict.fromkeys(["criterion", "lossname", "lossfn", "lossfunc"], Meant(("method.loss",))),
    **dict.fromkeys(["minername", "mining", "sampling"], Meant(("method.miner",))),
    **dict.fromkeys(["mperclass", "imagesperclass", "ninstances", "numinstances", "nsamples"], Meant(_BATCH.keys[1:])),
    **dict.fromkeys(["nlabels", "classesperepoch", "identitiesperbatch"], Meant(_BATCH.keys[:1])),
    **dict.fromkeys(["optim", "opt", "optimizername"], Meant(("method.optimizer.name",))),
    **dict.fromkeys(["wd", "l2"], Meant(("method.optimizer.weight_decay",))),
    **dict.fromkeys(["fold", "valfold", "kfold", "valsplit", "validation"], Meant(("data.validation_fold",))),
    **dict.fromkeys(["randomseed", "manualseed", "rngseed"], Meant(("seed",))),
    **dict.fromkeys(["exp", "expname", "experiment", "experimentname", "runname", "project", "tag"], Meant(("name",))),
}

# The key that is meant where a section is given a single value: `model: resnet50`.
_MAIN_KEYS = ("name", "kind", "source", "backbone", "size", "every", "folder", "workers", "engine", "metric", "k1")


def explain(problem: Mapping[str, Any], values: Mapping[str, Any], root: type[BaseModel]) -> str:
    """One line for one pydantic problem.

    Args:
        problem: An item of `ValidationError.errors()`.
        values: The values that were validated.
        root: The model that they were validated by.
    """
    parts = [str(part) for part in problem["loc"] if not str(part).startswith("<")]  # tags of alternatives
    location, kind, got = ".".join(parts), problem["type"], problem["input"]
    message = str(problem["msg"]).removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"unknown key {location!r}: {_suggestion(parts[:-1], parts[-1], values, root)}"
    if kind == "value_error":
        return f"{location}: {message}" if location else message
    if kind == "missing":
        return f"{location} is missing, and has no default"
    if kind in ("model_type", "model_attributes_type", "dict_type", "mapping_type"):
        return f"{location}: got {got!r}, expected keys and values{_section_hint(parts, got, values, root)}"
    if kind in ("tuple_type", "list_type"):
        return f"{location}: got {got!r}, expected a list"
    return f"{location}: got {got!r}; {message[0].lower()}{message[1:]}"


def _section_hint(parts: Sequence[str], got: Any, values: Mapping[str, Any], root: type[BaseModel]) -> str:
    """The key of a section that a single value was probably meant for."""
    if isinstance(got, (Mapping, list, tuple)) or got is None:
        return ""
    section = _model(parts, values, root)
    key = next((key for key in _MAIN_KEYS if section is not None and key in section.model_fields), None)
    return f"; did you mean {'.'.join(parts)}.{key}={got}?" if key else ""


def _suggestion(parents: Sequence[str], name: str, values: Mapping[str, Any], root: type[BaseModel]) -> str:
    """A hint for an unknown key: a similar one of its section, what other tools call so, or the key of that name elsewhere."""
    prefix = "".join(f"{parent}." for parent in parents)
    section = _model(parents, values, root)
    siblings = {} if section is None else {_plain(key): prefix + key for key in section.model_fields}
    plain = _plain(name)
    keys = [key for key, _ in _keys(root, values)]
    elsewhere: dict[str, list[str]] = {}
    for key in keys:
        elsewhere.setdefault(_plain(key.rpartition(".")[2]), []).append(key)
    if plain in siblings:
        return _did_you_mean([siblings[plain]])
    if plain in ALIASES:
        known = [key for key in ALIASES[plain].keys if key in keys]
        if known:
            return _did_you_mean(known, ALIASES[plain].how)
    similar = close_names(plain, siblings)
    if similar:
        return _did_you_mean([siblings[similar[0]]])
    if plain in elsewhere:
        return _did_you_mean(elsewhere[plain])
    owners = [method for method, cls in METHODS.items() if name in cls.Config.model_fields]
    if owners and (not parents or parents == ["method"]):
        return f"it is an option of the method{'s' if len(owners) > 1 else ''} {', '.join(owners)} (method.name)"
    similar = close_names(plain, elsewhere)
    if similar:
        return _did_you_mean(elsewhere[similar[0]])
    names = [] if section is None else list(section.model_fields)
    return did_you_mean(name, names, prefix=prefix)


def _did_you_mean(keys: Sequence[str], how: str = "") -> str:
    return f"did you mean {' or '.join(repr(key) for key in keys[:3])}?{f' ({how})' if how else ''}"


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")


def _keys(model: type[BaseModel], values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of all sections and keys, and their annotations; those of the chosen method below `method`."""
    for name, field in model.model_fields.items():
        yield prefix + name, field.annotation
        inner = _model([name], values, model)
        if inner is not None and inner is not Length:
            yield from _keys(inner, values, f"{prefix}{name}.")


def _model(parts: Sequence[str], values: Mapping[str, Any], root: type[BaseModel]) -> type[BaseModel] | None:
    """The model of a section; None if it is not one."""
    model: type[BaseModel] | None = root
    for part in parts:
        if model is None or part.isdigit():  # an item of a list
            continue
        if part == "method" and "method" in root.model_fields:
            model = _method_config(values)
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        models = [t for t in (annotation, *_arguments(annotation)) if isinstance(t, type) and issubclass(t, BaseModel)]
        model = models[0] if models else None
    return model


def _method_config(values: Mapping[str, Any]) -> type[BaseModel]:
    section = values.get("method", {})
    name = section.get("name", "baseline") if isinstance(section, Mapping) else section
    try:
        return method_class(str(name)).Config
    except ValueError:  # told as a problem of its own
        return METHODS["baseline"].Config


def _arguments(annotation: Any) -> Iterator[Any]:
    """Types inside an annotation such as `Length | None`."""
    for inner in get_args(annotation):
        yield inner
        yield from _arguments(inner)
