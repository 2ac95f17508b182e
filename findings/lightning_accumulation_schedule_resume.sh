#!/usr/bin/env bash
# pytorch-lightning 2.6.6, torch 2.15.0, CPU: GradientAccumulationScheduler accumulates nothing after a resume by steps.
#
# Likely guess: a resumed run accumulates as before, as one with Trainer(accumulate_grad_batches=4) does.
# Behaviour:    the callback sets its number in `on_train_epoch_start`, which is skipped in an epoch that a resume
#               completes, and no checkpoint holds the number: the rest of that epoch steps after each batch, silently.
#               After a checkpoint of the epoch's last step the whole next epoch does. Only the checkpoints saved at the
#               end of an epoch resume right. `Trainer` with a fixed number is not affected (last line).
# Seen (8 batches an epoch, 4 for each step, 3 epochs):
#   not resumed: steps in each epoch {0: 2, 1: 2, 2: 2}, 6 in all
#   resumed after step 1: steps in each epoch {0: 4, 1: 2, 2: 2}, 9 in all
#   resumed after step 2: steps in each epoch {1: 8, 2: 2}, 12 in all
#   resumed after step 1, Trainer's own number: steps in each epoch {0: 1, 1: 2, 2: 2}, 6 in all
set -euo pipefail
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'pytorch-lightning==2.6.6' 'torch==2.15.0' 'numpy<3'
cd "$folder"
venv/bin/python - <<'P' | tee seen
from collections import Counter

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.line, self.steps = torch.nn.Linear(1, 1), Counter()

    def training_step(self, batch):
        return self.line(batch[0]).mean()

    def on_before_optimizer_step(self, optimizer):
        self.steps[self.current_epoch] += 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(title, checkpoint=None, scheduled=True):
    extra = [GradientAccumulationScheduler({0: 4})] if scheduled else []
    folder = "again" if checkpoint else "saved"
    callbacks = [ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1), *extra]
    number = {} if scheduled else {"accumulate_grad_batches": 4}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=3, accelerator="cpu", callbacks=callbacks, **number, **quiet)
    model = Line()
    trainer.fit(model, DataLoader(TensorDataset(torch.ones(8, 1))), ckpt_path=checkpoint)
    print(f"{title}: steps in each epoch {dict(model.steps)}, {trainer.global_step} in all")


fit("not resumed")
fit("resumed after step 1", "saved/step=1.ckpt")
fit("resumed after step 2", "saved/step=2.ckpt")
fit("resumed after step 1, Trainer's own number", "saved/step=1.ckpt", scheduled=False)
P
diff seen <(sed -n '/^# Seen/,/^set /s/^#   //p' "$script")
