from copy import deepcopy
from typing import Any

import pytest
import torch
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from torch import nn

from lit_mnist.exact.batchnorm import SyncBatchNormOnCPU


@pytest.mark.parametrize("settings", [{}, {"momentum": None, "affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (4, 3)), (nn.BatchNorm2d, (4, 3, 5, 6))])
def test_it_is_batch_norm(kind: Any, shape: tuple[int, ...], settings: dict[str, Any]) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{find_free_network_port()}", rank=0, world_size=1)
    torch.manual_seed(0)
    theirs = kind(3, **settings).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = deepcopy(theirs)
    ours.__class__ = SyncBatchNormOnCPU
    values, found = torch.randn(shape, dtype=torch.float64), []
    for layer in (theirs, ours):
        for _ in range(3):
            output = layer(given := values.clone().requires_grad_())
            (output * torch.arange(shape[-1])).square().sum().backward()
        gradients = [part.grad for part in (given, *layer.parameters())]
        found.append([output, *gradients, *layer.buffers(), layer.eval()(values)])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
