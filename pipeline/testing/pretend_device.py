"""A GPU that is not there: tensors that claim to lie on another device, hold CPU values, and refuse to be mixed with the CPU's.

    with PretendDevice() as device:
        worker = Worker(config, store, Ranks(), device.device, RunStatus())
        worker()
    device.synchronisations  # Counter({"loop.py:214 _local_scalar_dense": 3, ...})

Values and gradients are real. An operation that a GPU would refuse raises `MixedDevices`: operands of both devices, an index on the
device into a CPU tensor, a generator of the wrong device, `.numpy()`. What makes the host wait for a GPU is counted: a value that is
read, a copy without `non_blocking` in either direction, a result whose shape depends on values.

The device is torch's "meta" under another meaning: factories that ask for it get real values. Not emulated: memory, speed, other
rounding, streams, autocast, several devices; tensors of other threads are watched where they meet a tensor of this device.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import torch
import torch._dynamo  # before torch.Generator is replaced below: imported by the first cast of a dtype
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
_ROOT = str(Path(__file__).parents[2])
# Operations whose result depends on values, so that the host has to know them.
_VALUES_READ = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive",
    "bincount", "histc", "_assert_async",
}  # fmt: skip
_CROSSING = {"copy_", "_to_copy", "copy"}  # copies from a device to another
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


class MixedDevices(RuntimeError):
    """An operation that a GPU would refuse."""


class PretendTensor(Tensor):
    """A tensor of the device; `held` holds what it is on the CPU."""

    held: Tensor
    is_meta = False  # type: ignore[assignment]  # nothing is to be treated as if it had no values

    @staticmethod
    def __new__(cls, values: Tensor) -> PretendTensor:
        made: PretendTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype, device=DEVICE
        )  # fmt: skip
        made.held = values
        return made

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, given: Tensor) -> None:
        if not isinstance(given, PretendTensor) or given.shape != self.shape or given.dtype != self.dtype:
            raise MixedDevices(f"`data` of a tensor {tuple(self.shape)} of the accelerator is replaced by {given!r}")
        self.held = given.held

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PretendTensor({self.held})"

    def tolist(self) -> Any:
        _count("tolist")
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise MixedDevices("numpy() of a tensor on an accelerator: call cpu() first")
        return self.cpu().numpy()

    def new_tensor(self, data: Any, **options: Any) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **options})

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)  # as saved by a GPU, and loaded with map_location="cpu"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        return _run(operation, arguments, options or {})


class PretendDevice(TorchDispatchMode):
    """A block in which the device is there.

    Attributes:
        entered: The block that runs, if any; of all threads.
        device: The device to give to what runs.
        synchronisations: How often the host has waited for the device: by place in this repository and operation.
    """

    entered: ClassVar[list[PretendDevice]] = []

    def __init__(self) -> None:
        super().__init__()
        self.device = DEVICE
        self.synchronisations: Counter[str] = Counter()

    @property
    def num_synchronisations(self) -> int:
        """How often the host has waited since the block began, or since the counter was cleared."""
        return sum(self.synchronisations.values())

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return _run(operation, arguments, options or {})

    def __enter__(self) -> PretendDevice:  # type: ignore[override]
        if self.entered:
            raise RuntimeError("a PretendDevice within another")
        self._replaced = contextlib.ExitStack()
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # parameters are replaced, not their `data`
        self._replaced.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        for name, replacement in (
            ("Generator", _generator_type(torch.Generator)),
            ("autocast", _autocast_type(torch.autocast)),
            ("tensor", _tensor_maker(torch.tensor)),
            ("as_tensor", _tensor_maker(torch.as_tensor)),
            ("from_dlpack", _from_dlpack(torch.from_dlpack)),
        ):
            self._replaced.callback(setattr, torch, name, getattr(torch, name))
            setattr(torch, name, replacement)
        self._replaced.callback(setattr, torch.random, "fork_rng", torch.random.fork_rng)
        torch.random.fork_rng = _fork_rng(torch.random.fork_rng)
        self.entered.append(self)
        self._replaced.callback(self.entered.remove, self)
        super().__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        self._replaced.close()


_generators: dict[int, torch.Generator] = {}  # the device's, by the address that all Python objects of one share


def _run(operation: Any, arguments: Any, options: dict[str, Any]) -> Any:
    """An operation on CPU values, with what it gives on the device that it would lie on."""
    name = operation._schema.name.split("::")[1]
    tensors = [x for x in tree_leaves((arguments, options)) if isinstance(x, Tensor)]
    pretended = any(isinstance(x, PretendTensor) for x in tensors)
    wanted = options.get("device")
    on_device = pretended if wanted is None else torch.device(wanted).type == DEVICE.type
    if pretended:
        _refuse_mixed(operation, name, arguments, options, tensors)
    _refuse_generator(name, options.get("generator"), on_device)
    if pretended or on_device:
        _count_waits(name, arguments, options, on_device)
    wrappers = {id(x.held): x for x in tensors if isinstance(x, PretendTensor)}
    bare_arguments, bare_options = tree_map(
        lambda x: x.held if isinstance(x, PretendTensor) else x, (arguments, dict(options))
    )
    if wanted is not None and on_device:
        bare_options["device"] = "cpu"
    if name == "_efficientzerotensor":  # without memory, which the kernels below would read
        operation = torch.ops.aten.zeros.default
    out = operation(*bare_arguments, **bare_options)
    if pretended and torch.Tag.inplace_view in operation.tags:
        with no_dispatch():  # the wrapper's shape changes as that of its values
            operation(*arguments, **options)

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, PretendTensor):
            return x
        return wrappers[id(x)] if id(x) in wrappers else PretendTensor(x)

    return tree_map(wrap, out) if on_device else out


def _refuse_mixed(operation: Any, name: str, arguments: Any, options: Any, tensors: Sequence[Tensor]) -> None:
    if any(x.device.type == DEVICE.type and not isinstance(x, PretendTensor) for x in tensors):
        raise MixedDevices(f"{operation} gets a tensor that another thread made on {DEVICE}")
    if name in _CROSSING:
        return
    if name in _INDEXING:
        indices = {id(x) for x in arguments[1] if x is not None}
        others = [x for x in tensors if id(x) not in indices]
        if not isinstance(arguments[0], PretendTensor):
            raise MixedDevices(f"{operation}: an index of the accelerator into a tensor of the CPU")
    else:
        others = list(tensors)
    on_cpu = [x for x in others if not isinstance(x, PretendTensor)]
    if operation._schema.is_mutable and on_cpu and on_cpu[0] is (arguments[0] if arguments else None):
        raise MixedDevices(f"{operation} changes a tensor of the CPU by one of the accelerator")
    on_cpu = [x for x in on_cpu if x.dim()]  # numbers may be mixed
    if on_cpu:
        raise MixedDevices(
            f"{operation} mixes devices: a CPU tensor of {tuple(on_cpu[0].shape)} beside the accelerator's"
        )


def _refuse_generator(name: str, generator: Any, on_device: bool) -> None:
    if generator is not None and (generator._cdata in _generators) != on_device:
        raise MixedDevices(f"{name}: a generator of the {'CPU' if on_device else 'accelerator'} for the other device")


def _count_waits(name: str, arguments: Any, options: dict[str, Any], on_device: bool) -> None:
    if name in _VALUES_READ or (name == "repeat_interleave" and options.get("output_size") is None):
        _count(name)
    elif name in _CROSSING:
        source = arguments[1] if name == "copy_" else arguments[0]
        target = isinstance(arguments[0], PretendTensor) if name == "copy_" else on_device
        blocking = not (options.get("non_blocking") or (name == "copy_" and len(arguments) > 2 and arguments[2]))
        if (
            blocking
            and isinstance(source, PretendTensor) != target
            and (source.dim() or isinstance(source, PretendTensor))
        ):
            _count(f"{name} to the {'device' if target else 'host'}")
    elif name in _INDEXING:
        indices = [x for x in arguments[1] if x is not None]
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            _count(f"{name} by a mask")
        elif not all(isinstance(x, PretendTensor) for x in indices):
            _count(f"{name} by an index of the CPU")


def _count(name: str) -> None:
    for block in PretendDevice.entered:
        block.synchronisations[f"{_place()} {name}"] += 1


def _place() -> str:
    """The innermost line of this repository that is not of this file."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and file.startswith(_ROOT) and "site-packages" not in file:
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


# ---- what is not dispatched ------------------------------------------------------------------------------------------


def _generator_type(original: Any) -> type:
    """`torch.Generator`, whose generators of the device are the CPU's, remembered as the device's."""

    class Kind(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, original)

    class Generator(metaclass=Kind):
        def __new__(cls, device: Any = "cpu") -> Any:
            made = original("cpu" if torch.device(device).type == DEVICE.type else device)
            if torch.device(device).type == DEVICE.type:
                _generators[made._cdata] = made
            return made

    return Generator


def _autocast_type(original: Any) -> type:
    class Autocast(original):
        def __init__(self, device_type: str, *rest: Any, **options: Any) -> None:
            super().__init__("cpu" if device_type == DEVICE.type else device_type, *rest, **options)

    return Autocast


def _tensor_maker(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.tensor` and `torch.as_tensor`, which make an empty tensor on "meta"; a GPU's are copied from the host."""

    def make(data: Any, *rest: Any, device: Any = None, **options: Any) -> Tensor:
        if device is None or torch.device(device).type != DEVICE.type:
            return original(data, *rest, **options, **({} if device is None else {"device": device}))
        if isinstance(data, PretendTensor):
            return data.to(*rest, **options)
        requires_grad = options.pop("requires_grad", False)
        return original(data, *rest, **options).to(DEVICE).requires_grad_(requires_grad)

    return make


def _fork_rng(original: Any) -> Any:
    """`torch.random.fork_rng`, which keeps no state for "meta"; the device draws from the CPU's generators here."""

    def fork(devices: Any = None, enabled: bool = True, *rest: Any, device_type: str = "cuda", **options: Any) -> Any:
        if device_type == DEVICE.type:
            devices, device_type = [], "cuda"
        return original(devices, enabled, *rest, device_type=device_type, **options)

    return fork


def _from_dlpack(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def share(data: Any, **options: Any) -> Tensor:
        return PretendTensor(original(data.held)) if isinstance(data, PretendTensor) else original(data, **options)

    return share
