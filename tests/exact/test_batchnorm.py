import pytest
import torch
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from torch import nn

from lit_mnist import LitMNIST
from lit_mnist.exact.batchnorm import SyncBatchNorm2d, SynchronizedBatchNorm


@pytest.mark.usefixtures("no_group")
def test_it_is_batch_norm() -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{find_free_network_port()}", rank=0, world_size=1)
    torch.manual_seed(0)
    ours, theirs = SyncBatchNorm2d(3).double(), nn.BatchNorm2d(3).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    for _ in range(3):
        inputs = [images.clone().requires_grad_() for _ in range(2)]
        outputs = [layer(given) for layer, given in zip((ours, theirs), inputs, strict=True)]
        for output in outputs:
            (output * torch.arange(6)).square().sum().backward()
        (one, another) = (
            [output, given.grad, *(part.grad for part in layer.parameters()), *layer.buffers()]
            for output, given, layer in zip(outputs, inputs, (ours, theirs), strict=True)
        )
        torch.testing.assert_close(one, another, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


def test_the_plugin_changes_layers_and_restores_them() -> None:
    model, plugin = LitMNIST(), SynchronizedBatchNorm()
    parameters = dict(model.named_parameters())
    for change, kind in ((plugin.apply, SyncBatchNorm2d), (plugin.revert, nn.BatchNorm2d)):
        change(model)
        assert [type(part) for part in model.modules() if isinstance(part, nn.BatchNorm2d)] == [kind] * 5
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
