"""Files of weights as other programs write them: timm, Lightning, DDP, torch.compile, an average of weights (EMA).

What is looked for are tensors whose names end as those of the backbone do: whatever stands before them (`module.`,
`_orig_mod.`, `model.`, `backbone.`, ...) is taken off. Tensors alone are read; objects of any other class in the file are
replaced by inert stand-ins, so that no code of the file is run.
"""

from __future__ import annotations

import collections
import os
import pickle
import sys
import types
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.config_model import LITE0
from pipeline.errors import UserError, one_line

AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher")  # taken first, as timm does
MAX_DEPTH = 3  # of dictionaries inside dictionaries


def load_weights(net: nn.Module, weights: str) -> str:
    """Loads a network's tensors from a file; returns what was taken and what was left out, in one line.

    Raises:
        UserError: There is no such file, it holds no tensors by name, or some of the network's are missing or of
            another shape.
    """
    path = os.path.expanduser(weights)
    if not os.path.isfile(path):
        raise UserError(f"weights {weights!r}: no such file or run (other choices: pretrained, none, {LITE0})")
    return fit_weights(net, _read(path, weights), weights)


def fit_weights(net: nn.Module, content: Any, weights: str) -> str:
    """Loads a network's tensors from the content of a file; returns what was taken and what was left out, in one line.

    Raises:
        UserError: It holds no tensors by name, or some of the network's are missing or of another shape.
    """
    target = {n: v for n, v in net.state_dict().items() if not n.endswith("num_batches_tracked")}
    candidates = list(_state_dicts(content))
    if not candidates:
        raise UserError(
            f"weights {weights!r} hold no state dict (tensors by name): write one with torch.save(model.state_dict(), ...)"
        )
    fits = [_Fit(key, state, target) for key, state in candidates]
    best = max(fits, key=lambda fit: (fit.matched, fit.key in AVERAGED))  # the first of equals
    fitted = _resized(net, best.tensors) if best.matched < len(target) else best.tensors
    missing = [name for name in target if name not in fitted]
    mismatched = [n for n in target if n in fitted and fitted[n].shape != target[n].shape]
    if missing or mismatched:
        raise UserError(
            f"weights {weights!r} do not fit the backbone: of {len(target)} tensors {len(missing)} are missing "
            f"(first: {missing[:1]}), {len(mismatched)} of another shape (first: {mismatched[:1]}); the file has "
            f"{len(best.state)} (first: {list(best.state)[:1]})"
        )
    names = net.state_dict()
    net.load_state_dict({n: v for n, v in fitted.items() if n in names}, strict=False)
    return best.summary(weights)


class _Fit:
    """A state dict with the prefix taken off under which most of its names are names of the network."""

    def __init__(self, key: str, state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        self.key = key
        self.state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
        found: Counter[str] = Counter()
        for name, value in self.state.items():
            parts = name.split(".")
            for start in range(len(parts)):
                known = target.get(".".join(parts[start:]))
                if known is not None:
                    found["".join(f"{part}." for part in parts[:start])] += 1 + (known.shape == value.shape)
        self.prefix = min(found, key=lambda prefix: (-found[prefix], len(prefix))) if found else ""
        self.tensors = {
            name.removeprefix(self.prefix): v for name, v in self.state.items() if name.startswith(self.prefix)
        }
        fitting = [n for n, v in self.tensors.items() if n in target and v.shape == target[n].shape]
        self.matched = len(fitting)
        self.left_out = sorted(
            name
            for name in self.state
            if name.removeprefix(self.prefix) not in target and not name.endswith("num_batches_tracked")
        )
        self.rivals = [
            prefix for prefix, count in found.items() if count == found[self.prefix] and prefix != self.prefix
        ]

    def summary(self, weights: str) -> str:
        where = "".join([f" under {self.key!r}" if self.key else "", f", named {self.prefix}*" if self.prefix else ""])
        also = f", not {self.rivals[0]}*" if self.rivals else ""
        shown = ", ".join(self.left_out[:3]) + (" ..." if len(self.left_out) > 3 else "")
        rest = f"; left out: {len(self.left_out)} ({shown})" if self.left_out else ""
        return f"weights of {weights}: {self.matched} tensors taken{where}{also}{rest}"


def _state_dicts(value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary of a checkpoint that holds tensors by name, with the key that it stands under."""
    if not isinstance(value, Mapping) or depth > MAX_DEPTH:
        return
    tensors = {name: v for name, v in value.items() if isinstance(name, str) and isinstance(v, Tensor)}
    if tensors:
        yield key, tensors
    for name, inner in value.items():
        yield from _state_dicts(inner, str(name), depth + 1)


def _resized(net: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as timm fits them to a network: position embeddings of another size, older names."""
    adapt = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if adapt is None:
        return tensors
    try:
        return dict(adapt(dict(tensors), net))
    except (AttributeError, AssertionError, IndexError, KeyError, RuntimeError, ValueError):
        return tensors  # of another network: the caller says what is missing


# ---- reading ---------------------------------------------------------------------------------------------------------


def _read(path: str, weights: str) -> Any:
    """The content of a file, tensors and dictionaries alone."""
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # objects of other classes
            return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_TENSORS_ONLY)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, *_DAMAGE) as error:
        with open(path, "rb") as file:
            start = file.read(40)
        kind = "safetensors" if path.endswith(".safetensors") else "torch.save"
        hint = ": a pointer of Git LFS, fetch the file itself" if start.startswith(b"version https://git-lfs") else ""
        raise UserError(
            f"weights {weights!r} cannot be read as tensors ({one_line(error)[:120]}): expected a file written by {kind}, got "
            f"{os.path.getsize(path):,} bytes that start with {start[:16]!r}{hint}"
        ) from error


_DAMAGE = (
    AttributeError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
    UnicodeDecodeError,
)  # of a stream that is no pickle


class _Inert(dict):
    """Stands for an object of any class: keeps the items of a dictionary, takes whatever else a pickle gives, does nothing."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __call__(self, *_: Any, **__: Any) -> _Inert:
        return _Inert()

    def __setstate__(self, state: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...

    def add(self, value: Any) -> None: ...


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}


class _TensorUnpickler(pickle.Unpickler):
    """An unpickler that knows tensors and ordered dictionaries, and makes everything else inert."""

    def find_class(self, module: str, name: str) -> Any:
        return _ALLOWED.get((module, name), _Inert)


def _load(file: Any, **options: Any) -> Any:
    return _TensorUnpickler(file, **options).load()


_TENSORS_ONLY = types.ModuleType("tensors_only")  # what torch.load takes instead of the module `pickle`
_TENSORS_ONLY.__dict__.update(
    Unpickler=_TensorUnpickler, load=_load, UnpicklingError=pickle.UnpicklingError, PickleError=pickle.PickleError
)
