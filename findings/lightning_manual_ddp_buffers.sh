#!/usr/bin/env bash
# pytorch-lightning 2.6.6, torch 2.15.0, CPU: in manual optimization DDP never broadcasts buffers after the first step.
#
# Likely guess: DDPStrategy(broadcast_buffers=True), its default, gives all processes the buffers (running statistics)
#               of the first one before each forward pass, whichever way the module is optimized.
# Behaviour:    in manual optimization Lightning sets `require_backward_grad_sync` to False before DDP's forward pass
#               ends, and DDP then sets `require_forward_param_sync` to False, on which the broadcast depends: from the
#               second step on each process continues with its own buffers, silently.
# Seen (each step adds 1 to a buffer on the first process and 10 on the second):
#   automatic optimization: steps begin with [[0, 1, 2, 3], [0, 1, 2, 3]]
#   manual optimization: steps begin with [[0, 1, 2, 3], [0, 10, 20, 30]]
set -euo pipefail
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'pytorch-lightning==2.6.6' 'torch==2.15.0' 'numpy<3'
cd "$folder"
cat > steps.py <<'P'
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset


class Line(LightningModule):
    def __init__(self, manual):
        super().__init__()
        self.automatic_optimization = not manual
        self.line = torch.nn.Linear(1, 1)
        self.register_buffer("own", torch.zeros(()))  # stands for running statistics
        self.seen = []

    def training_step(self, batch):
        self.seen.append(int(self.own))
        self.own += 1 + 9 * self.global_rank
        loss = self.line(batch[0]).mean()
        if not self.automatic_optimization:
            self.manual_backward(loss)
            self.optimizers().step()
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


for manual in (False, True):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    strategy = DDPStrategy(broadcast_buffers=True)
    trainer = Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy=strategy, **quiet)
    model = Line(manual)
    trainer.fit(model, DataLoader(TensorDataset(torch.ones(8, 1))))
    seen = [None] * 2
    torch.distributed.all_gather_object(seen, model.seen)
    if trainer.is_global_zero:
        print(f"{'manual' if manual else 'automatic'} optimization: steps begin with {seen}", flush=True)
P
venv/bin/python steps.py 2> errors | tee seen || cat errors
diff seen <(sed -n '/^# Seen/,/^set /s/^#   //p' "$script")
