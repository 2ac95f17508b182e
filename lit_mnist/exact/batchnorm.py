"""Batch norm over the batch of all processes, on CPUs too."""

import torch
from pytorch_lightning.plugins.layer_sync import TorchSyncBatchNorm
from torch import Tensor, nn
from torch.distributed import ReduceOp, group
from torch.distributed.nn.functional import _AllReduce
from torch.nn.modules.batchnorm import _BatchNorm


class SynchronizedBatchNorm(TorchSyncBatchNorm):
    """Lightning's plugin behind `sync_batchnorm`, also on CPUs, where torch 2.15 cannot train its layer."""

    def apply(self, model: nn.Module) -> nn.Module:
        if any(parameter.device.type != "cpu" for parameter in model.parameters()):
            return super().apply(model)
        several = torch.distributed.get_world_size() > 1  # one keeps the bits of a run without DDP
        for module in model.modules():
            if several and isinstance(module, _BatchNorm):
                module.__class__ = SyncBatchNormOnCPU  # the same parameters, hooks and names
        return model


class SyncBatchNormOnCPU(_BatchNorm):
    def _check_input_dim(self, input: Tensor) -> None: ...

    def forward(self, input: Tensor) -> Tensor:
        """Normalise float (B, C, ...); a process may have no sample at all."""
        if not (self.training and torch.distributed.is_initialized()):
            return super().forward(input)
        values = input if self.weight is None else input.to(self.weight.dtype)
        dims, count = [0, *range(2, values.ndim)], values.numel() // values.shape[1]
        # of no values, sums that are 0 and still take part in the backward pass
        moments = torch.var_mean(values, dims, correction=0) if count else [values.sum(dims)] * 2
        var, mean = (moment.double() for moment in moments)
        parts = torch.stack([mean, var + mean.square(), torch.ones_like(mean)]) * count
        sums = _AllReduce.apply(ReduceOp.SUM, group.WORLD, parts)  # without the warning of torch 2.15's `all_reduce`
        mean, square, total = sums[0] / sums[2], sums[1] / sums[2], sums[2].detach()
        var = square - mean.square()
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            statistics = mean.detach(), var.detach() * total / (total - 1).clamp(min=1)
            for buffer, statistic in zip(self.buffers(), statistics, strict=False):
                buffer.lerp_(statistic.to(buffer.dtype), share)
        scale = (var + self.eps).rsqrt() * (1 if self.weight is None else self.weight)
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        scale, shift = (part.to(values.dtype).view(-1, *[1] * (values.ndim - 2)) for part in (scale, shift))
        return torch.addcmul(shift, values, scale).to(input.dtype)
