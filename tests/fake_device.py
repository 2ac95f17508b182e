"""A device without a GPU: its tensors lie in the processor's memory, but refuse to meet the processor's, and in the
steps of a training everything that would wait for a GPU raises: a value that is read, a copy back, a copy there that is
not `non_blocking`, and an operation whose values decide the size of its result.

It is torch's device `lazy`, which nothing else uses: `privateuse1`, meant for backends in Python, cannot train where
torch is built for CUDA and has no driver (2.15). A GPU's arithmetic, memory and order of execution are not imitated.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from pytorch_lightning.accelerators import AcceleratorRegistry, CPUAccelerator
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from pytorch_lightning.strategies import SingleDeviceStrategy, StrategyRegistry
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("lazy", 0)
READS = "_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "bincount"
waiting_forbidden = False


class DeviceError(RuntimeError):
    """What a GPU would refuse, or wait for."""


class FakeTensor(Tensor):
    """A tensor on the fake device; `raw` holds its values."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

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

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        leaves = is_on("cpu", kwargs.get("device"))
        if name == "copy_":
            target, source, *non_blocking = args
            leaves = not isinstance(target, FakeTensor)
            if not leaves and source.dim() and not isinstance(source, FakeTensor) and not any(non_blocking):
                check_waiting(name)
        elif any(tensor.dim() and not isinstance(tensor, FakeTensor) for tensor in tensors):
            raise DeviceError(f"{name}: tensors of two devices, shapes {[list(t.shape) for t in tensors]}")
        masked = name.startswith("index") and any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
        if name in READS or masked or leaves:
            check_waiting(name)
        raw_args, raw_kwargs = tree_map_only(FakeTensor, lambda each: each.raw, (args, kwargs))
        made = func(*raw_args, **raw_kwargs)
        if leaves:
            return args[0] if name == "copy_" else made
        return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, FakeTensor, made))


def check_waiting(name: str) -> None:
    if waiting_forbidden:
        raise DeviceError(f"{name}: waits for the device within a step")


def is_on(kind: str, device: Any) -> bool:
    return device is not None and torch.device(device).type == kind


class FakeDevice(TorchDispatchMode):
    """Makes what is created on the device, or copied to it, one of its tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_on("lazy", kwargs.get("device")):
            return func(*args, **kwargs)
        own = any(isinstance(each, FakeTensor) for each in tree_flatten(args)[0])
        if func is torch.ops.aten._to_copy.default and not own and args[0].dim() and not kwargs.get("non_blocking"):
            check_waiting("_to_copy")
        raw_args = tree_map_only(FakeTensor, lambda each: each.raw, args)
        made = func(*raw_args, **{**kwargs, "device": torch.device("cpu")})
        return tree_map_only(Tensor, FakeTensor, made)


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
def fake_device() -> Iterator[list[str]]:
    """Give the flags by which a command runs on the device. From an epoch's second step on none may wait for
    it, from taking its batch to the last callback.
    """
    AcceleratorRegistry.register("fake", FakeAccelerator, override=True)
    StrategyRegistry.register("fake", SingleDeviceStrategy, override=True, device=DEVICE, accelerator=FakeAccelerator())
    original = _TrainingEpochLoop.advance

    def advance(self: _TrainingEpochLoop, data_fetcher: Any) -> None:
        global waiting_forbidden
        waiting_forbidden = self.batch_progress.current.ready > 0
        try:
            original(self, data_fetcher)
        finally:
            waiting_forbidden = False

    with patch.object(_TrainingEpochLoop, "advance", advance), FakeValues(), FakeDevice():  # type: ignore[no-untyped-call]
        # a wrapped tensor made outside of inference mode cannot be detached in it (torch 2.15)
        yield ["--trainer.accelerator=fake", "--trainer.strategy=fake", "--trainer.inference_mode=false"]
