"""A device without a GPU: its tensors lie in the processor's memory, but refuse to meet the processor's, and once
`set_sync_debug_mode` says so, everything that would wait for a GPU raises: a value that is read, a copy back, a copy
there that is not `non_blocking`, and an operation whose values decide the size of its result.

It is torch's device `lazy`, which nothing else uses: `privateuse1`, meant for backends in Python, cannot train where
torch is built for CUDA and has no driver (2.15). A GPU's arithmetic, memory and order of execution are not imitated.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning.accelerators import AcceleratorRegistry, CPUAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy, StrategyRegistry
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("lazy", 0)
READS = "_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "bincount"
# by which a command runs on it; a wrapped tensor made outside of inference mode cannot be detached in it (torch 2.15)
FLAGS = ["--trainer.accelerator=fake", "--trainer.strategy=fake", "--trainer.inference_mode=false"]
waiting_forbidden = False


class DeviceError(RuntimeError):
    """What a GPU would refuse, or wait for."""


class FakeTensor(Tensor):
    """A tensor on the fake device; `raw` holds its values."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, *_: Any, **__: Any) -> Any:
        raise DeviceError("outside of fake_device()")

    @staticmethod
    def __new__(cls, raw: Tensor) -> "FakeTensor":
        made: FakeTensor = Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE
        )
        made.raw = raw
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = FakeTensor(self.raw.detach().clone())
        is_parameter = isinstance(self, torch.nn.Parameter)
        return memo.setdefault(id(self), torch.nn.Parameter(copied, self.requires_grad) if is_parameter else copied)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the processor's, as a checkpoint of a GPU's run is read where there is none."""
        raw = self.raw.detach()
        return (torch.nn.Parameter(raw, self.requires_grad) if self.requires_grad else raw).__reduce_ex__(protocol)


def set_sync_debug_mode(mode: str) -> None:
    """Do for this device what `torch.cuda.set_sync_debug_mode` does for a GPU."""
    global waiting_forbidden
    waiting_forbidden = mode == "error"


def is_on(kind: str, device: Any) -> bool:
    return device is not None and torch.device(device).type == kind


class FakeDevice(TorchDispatchMode):
    """Makes what is created on the device, or copied to it, one of its tensors, and checks what is done with those."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        others = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)]
        arrives, leaves = (is_on(kind, kwargs.get("device")) for kind in ("lazy", "cpu"))
        if len(others) == len(tensors) and not arrives:
            return func(*args, **kwargs)
        waits = name == "_to_copy" and arrives and not kwargs.get("non_blocking")
        if name == "copy_":
            leaves, waits = not isinstance(args[0], FakeTensor), not any(args[2:])
        elif any(tensor.dim() for tensor in others) and not arrives:
            raise DeviceError(f"{name}: tensors of two devices, shapes {[list(t.shape) for t in tensors]}")
        masked = name.startswith("index") and any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
        if waiting_forbidden and (name in READS or masked or leaves or (waits and others and others[0].dim())):
            raise DeviceError(f"{name}: waits for the device")
        raw_args, raw_kwargs = tree_map_only(FakeTensor, lambda each: each.raw, (args, kwargs))
        made = func(*raw_args, **raw_kwargs | ({"device": torch.device("cpu")} if arrives else {}))
        if leaves:
            return args[0] if name == "copy_" else made
        return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, FakeTensor, made))


class FakeValues(TorchFunctionMode):
    """Does `torch.tensor(values, device=...)`, which no dispatch mode sees, in two steps."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and is_on("lazy", kwargs.get("device")):
            return func(*args, **{**kwargs, "device": torch.device("cpu")}).to(DEVICE, non_blocking=True)
        return func(*args, **kwargs)


class FakeAccelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        pass

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [DEVICE]

    @staticmethod
    def name() -> str:
        return "fake"


@contextmanager
def fake_device() -> Iterator[None]:
    AcceleratorRegistry.register("fake", FakeAccelerator, override=True)
    StrategyRegistry.register("fake", SingleDeviceStrategy, override=True, device=DEVICE, accelerator=FakeAccelerator())
    with FakeValues(), FakeDevice():  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            set_sync_debug_mode("default")
