"""Batch norm over the batch of all processes, on CPUs too."""

from typing import Any

import torch
import torch.distributed
from pytorch_lightning import LightningModule
from pytorch_lightning.plugins.layer_sync import TorchSyncBatchNorm
from torch import Tensor, nn

from .console import UserError


class SynchronizedBatchNorm(TorchSyncBatchNorm):
    """Lightning's plugin behind `sync_batchnorm`, also on CPUs, for which torch 2.15 has no such layer."""

    def apply(self, model: nn.Module) -> nn.Module:
        assert isinstance(model, LightningModule)
        if model.device.type != "cpu":
            return super().apply(model)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() == 1:
            return model  # keeps the bits of a run without DDP
        for module in model.modules():
            if type(module) is nn.BatchNorm2d and module.affine and module.momentum:
                module.__class__ = SyncBatchNorm2d  # the same parameters, hooks and names
            elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
                what = f"on CPUs trainer.sync_batchnorm is for BatchNorm2d with its defaults, got {module}"
                raise UserError(f"{what}; without it each process normalises its own samples, another training")
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if type(module) is SyncBatchNorm2d:
                module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
        return super().revert(model)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm by the mean and the variance over the images of all processes, on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise float (B, C, H, W); a process may have no image at all."""
        if not (self.training and torch.distributed.is_initialized()):
            return super().forward(input)
        images = input.to(self.weight.dtype)
        count = images.numel() // images.shape[1]
        # of no values, sums that are 0 and still take part in the backward pass
        var, mean = torch.var_mean(images, (0, 2, 3), correction=0) if count else [images.sum((0, 2, 3))] * 2
        mean, var = mean.double(), var.double()
        sums = SumOverProcesses.apply(torch.stack([mean, var + mean.square(), torch.ones_like(mean)]) * count)
        mean, square, total = sums[0] / sums[2], sums[1] / sums[2], sums[2].detach()
        var = square - mean.square()
        with torch.no_grad():
            self.get_buffer("num_batches_tracked").add_(1)
            unbiased = var * total / (total - 1).clamp(min=1)
            for name, statistic in (("running_mean", mean), ("running_var", unbiased)):
                buffer = self.get_buffer(name)
                buffer.lerp_(statistic.to(buffer.dtype), self.momentum or 0)
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        scale, shift = (part.to(images.dtype).view(1, -1, 1, 1) for part in (scale, shift))
        return torch.addcmul(shift, images, scale).to(input.dtype)


class SumOverProcesses(torch.autograd.Function):
    """Adds up a tensor of each process; the gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return SumOverProcesses.forward(ctx, gradient)
