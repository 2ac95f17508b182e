"""The events of a run, as TensorBoard shows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning_fabric.utilities.rank_zero import _get_rank
from pytorch_lightning.loggers import TensorBoardLogger

from lit_mnist.runs import RunError, claim_version

PER_EPOCH = tuple(f"{stage}/{metric}" for stage in ("train", "val") for metric in ("loss", "accuracy"))

TEST_SUFFIX = ".test"  # of the event files that `test` writes beside those of the training


class RunLogger(TensorBoardLogger):
    """TensorBoard's events of one run, written to a folder that no other process has.

    Each metric of an epoch is there twice: against the step, and as `by_epoch/...` against the epoch.
    """

    tested_step = 0  # the step of the checkpoint that `test` scores; Lightning 2.6 would log its metrics at step 0

    @property
    def version(self) -> int | str:
        # TensorBoardLogger 2.6 looks for the highest number and takes the next, so programs that start together
        # share a folder; here the folder is made, which only one of them can.
        if self._version is None and _get_rank() in (None, 0):  # the others are told by Lightning
            try:
                self._version = claim_version(Path(self.root_dir))
            except OSError as error:
                raise RunError(
                    f"trainer.default_root_dir: no run can be written to {self.root_dir} ({error.strerror})"
                ) from error
        return 0 if self._version is None else self._version

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if any(name.startswith("test/") for name in metrics):
            step = self.tested_step
        super().log_metrics(metrics, step)
        if "epoch" in metrics:
            by_epoch = {f"by_epoch/{name}": metrics[name] for name in PER_EPOCH if name in metrics}
            super().log_metrics(by_epoch, int(metrics["epoch"]))
