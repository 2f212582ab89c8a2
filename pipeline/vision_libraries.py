"""timm and torchvision, imported without torch's compiler: `from pipeline.vision_libraries import timm`.

Both load `torch._dynamo` when they are imported, for a decorator each that acts only within `torch.compile`. It takes
1.4 CPU-s, more than half of what a process needs before its first image. While they are imported, a module of the same
name stands in for it, and loads the real one as soon as anything else is asked of it. timm also imports wandb where that is
installed, 0.5 CPU-s for a logger of its own training script: it is told that wandb is not there, unless it is loaded already.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import timm
    import torchvision

_COMPILER, _COMPILER_UTILS = "torch._dynamo", "torch._dynamo.utils"
_OPTIONAL = {"wandb"}
_lock = threading.RLock()


class _StandIn(ModuleType):
    """A module whose attributes, but those it is given, are those of the real module, imported when they are needed."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by the import system
            raise AttributeError(name)
        _remove_stand_ins()
        return getattr(importlib.import_module(self.__name__), name)


def _disable(fn: Any = None, recursive: bool = True, *, reason: str | None = None, **_: Any) -> Any:
    """`torch.compiler.disable`, which decorates a function when it is first called while the compiler is loaded."""
    if not inspect.isfunction(fn) or not recursive:
        _remove_stand_ins()
        return importlib.import_module(_COMPILER).disable(fn, recursive=recursive, reason=reason)
    disabled: list[Any] = []

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not disabled and _COMPILER in sys.modules:
            disabled.append(importlib.import_module(_COMPILER).disable(fn, reason=reason))
        return disabled[0](*args, **kwargs) if disabled else fn(*args, **kwargs)

    return call


def _is_compile_supported(device_type: Any) -> Any:
    """The real function of that name, imported when it is called."""
    function: Callable[[Any], Any] = importlib.import_module(_COMPILER_UTILS).is_compile_supported
    return function(device_type)


def _remove_stand_ins() -> None:
    import torch

    for name in (_COMPILER_UTILS, _COMPILER):
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]
    if isinstance(vars(torch).get("_dynamo"), _StandIn):
        del torch._dynamo


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """A block whose imports do not load `torch._dynamo`, unless it is loaded already."""
    import torch

    with _lock:
        if _COMPILER in sys.modules:
            yield
            return
        compiler, utils = _StandIn(_COMPILER), _StandIn(_COMPILER_UTILS)
        compiler.__path__ = []
        vars(compiler).update(disable=_disable, utils=utils)
        vars(utils).update(is_compile_supported=_is_compile_supported)
        sys.modules[_COMPILER], sys.modules[_COMPILER_UTILS] = compiler, utils
        torch._dynamo = compiler  # as an import of a submodule sets it
        hidden = _OPTIONAL - set(sys.modules)
        sys.modules.update(dict.fromkeys(hidden, None))  # type: ignore[arg-type]  # None: an import of it fails
        try:
            yield
        finally:
            _remove_stand_ins()
            for name in hidden:
                sys.modules.pop(name, None)


def __getattr__(name: str) -> ModuleType:
    if name not in ("timm", "torchvision"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _without_compiler():
        library = importlib.import_module(name)
        if name == "torchvision":
            importlib.import_module("torchvision.transforms.v2")
        return library


__all__ = ["timm", "torchvision"]
