"""Batch norm over the batch of all processes, on CPUs too."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from pytorch_lightning import LightningModule
from pytorch_lightning.plugins.layer_sync import TorchSyncBatchNorm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

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
                raise UserError(
                    f"on CPUs only BatchNorm2d with its defaults can be synchronized, got {module}; without"
                    " trainer.sync_batchnorm each process normalises its own samples, which is another training"
                )
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
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        normalised: Tensor = _Normalise.apply(
            input, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps
        )
        return normalised


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, *running: Any) -> Tensor:
        running_mean, running_var, momentum, eps = running
        channels = input.shape[1]
        values = input.numel() // channels
        own = torch.zeros(2 * channels + 1, dtype=torch.float64)
        if values:
            statistics = torch.batch_norm_update_stats(input.to(weight.dtype), None, None, momentum)
            own = torch.cat([*statistics, statistics[0].new_tensor([values])]).double()
        # gathered and not summed: each variance is about its own mean, and all processes add in the same order
        parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, own)
        means, variances, counts = torch.stack(parts).split([channels, channels, 1], dim=1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        var = (counts * (variances + (means - mean).square())).sum(0) / total
        running_mean.lerp_(mean.to(running_mean), momentum)
        running_var.lerp_((var * (total / (total - 1).clamp(min=1))).to(running_var), momentum)
        mean, invstd = mean.to(weight), (var + eps).rsqrt().to(weight)
        ctx.save_for_backward(input, weight, mean, invstd)
        ctx.total = float(total)
        return F.batch_norm(input, mean, var.to(weight), weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, invstd = ctx.saved_tensors
        weight_gradient = bias_gradient = torch.zeros_like(weight)
        if input.numel():
            # of this process alone: DDP averages them as it does all parameters' gradients
            _, weight_gradient, bias_gradient = torch.ops.aten.native_batch_norm_backward(
                gradient.to(weight.dtype), input.to(weight.dtype), weight, None, None, mean, invstd, True, 0.0,
                [False, True, True],
            )  # fmt: skip
        sums = torch.stack([weight_gradient, bias_gradient]).double()
        torch.distributed.all_reduce(sums)
        # d/dx of the normalised value reaches all images through mean and variance
        scale = weight * invstd
        along_input, along_one = (sums / ctx.total).to(weight)
        slope = -scale * invstd * along_input
        offset = -scale * along_one - slope * mean
        scale, slope, offset = (part.view(1, -1, 1, 1) for part in (scale, slope, offset))
        input_gradient = (gradient * scale).addcmul_(input.to(weight.dtype), slope).add_(offset)
        return input_gradient.to(input.dtype), weight_gradient, bias_gradient, None, None, None, None
