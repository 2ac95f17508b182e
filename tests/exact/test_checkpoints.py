import os
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Hostile
from pytorch_lightning import Trainer
from pytorch_lightning.demos.boring_classes import BoringModel

from lit_mnist.exact.checkpoint_io import DurableCheckpointIO
from lit_mnist.exact.checkpoints import BestSettings, CheckpointKeeper, Run, SaveSettings
from lit_mnist.exact.console import TrainingFailed, UserError
from lit_mnist.exact.runs import find_checkpoint, read_checkpoint


def checkpoint(**entries: Any) -> dict[str, Any]:
    required = {"state_dict": {}, "epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.6.6"}
    return {**required, "lit_mnist_format": 3, **entries}


def test_a_file_that_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint(weight=torch.zeros(1000)), "whole.ckpt")
    assert read_checkpoint(Path("whole.ckpt"))["hyper_parameters"] == {}
    contents = {"empty": b"", "pickle": pickle.dumps(Hostile()), "list": [1], "other": {"state_dict": {}}}
    contents |= {"newer": checkpoint(lit_mnist_format=4), "hostile": checkpoint(callbacks=Hostile())}
    contents["truncated"] = Path("whole.ckpt").read_bytes()[:-200]
    for name, content in contents.items():
        path = Path(f"{name}.ckpt")
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(UserError, match=rf"^{name}\.ckpt: [^\n]{{1,200}}$"):
            read_checkpoint(Path(f"{name}.ckpt"))
    with pytest.raises(pickle.UnpicklingError):
        DurableCheckpointIO().load_checkpoint("hostile.ckpt", weights_only=False)  # never, whatever is asked for
    assert not Path("run by the pickle").exists()


def test_finding_checkpoints(tmp_path: Path) -> None:
    first, second = (tmp_path / f"version_{number}/checkpoints" for number in (2, 10))
    for folder in (first, second):
        folder.mkdir(parents=True)
    torch.save(checkpoint(), old := first / "best-epoch=00-accuracy=0.5000.ckpt")
    os.mkfifo(pipe := second / "best-epoch=00-accuracy=0.6000.ckpt")  # a pipe would be waited for
    for name in ("last-mine.ckpt", "last-epoch=01-step=000014.ckpt"):
        (second / name).write_bytes(b"")
    assert find_checkpoint("last", tmp_path).parent == second
    assert find_checkpoint("best", tmp_path) == old
    with pytest.raises(UserError, match="not an intact checkpoint"):
        read_checkpoint(find_checkpoint("last", tmp_path))
    for wanted in ("/dev/zero", str(pipe), "http://x", ".", "best"):
        with pytest.raises(UserError, match=r"file|no run under"):
            find_checkpoint(wanted, tmp_path / "nowhere")


Scores = list[tuple[float, ...]]  # of each epoch the accuracy and the loss; a third value is a weight


class Scored(BoringModel):
    scores: Scores

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        accuracy, loss, *weight = self.scores[self.current_epoch]
        self.log_dict({"val/accuracy": accuracy, "val/loss": loss})
        if weight:
            self.layer.weight.data.fill_(weight[0])


def names_kept(run: Path, scores: Scores, best: BestSettings) -> list[str]:
    keeper = CheckpointKeeper(Run(run), SaveSettings(), best)
    settings: dict[str, Any] = {"accelerator": "cpu", "logger": False, "num_sanity_val_steps": 0}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "max_epochs": len(scores)}
    (module := Scored()).scores = scores
    with pytest.raises(TrainingFailed, match="a weight is not finite") if len(scores[-1]) > 2 else nullcontext():
        Trainer(callbacks=[keeper], limit_train_batches=2, **settings).fit(module)
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("scores", "mode", "expected", "last_epoch"),
    [
        ([(0.5, 3.0), (0.5, 1.0), (0.5, 2.0), (0.4, 0.1)], "max", "1-accuracy=0.5000", 3),  # the lower loss
        ([(0.5, 3.0), (0.6, 5.0), (0.4, 4.0)], "min", "2-accuracy=0.4000", 2),
        ([(float("nan"), 0.0), (0.1, 3.0), (float("nan"), 0.0)], "max", "1-accuracy=0.1000", 2),
        ([(0.5, 3.0), (0.9, 0.1, float("inf"))], "max", "0-accuracy=0.5000", 0),  # a state that diverged is not kept
    ],
)
def test_the_best_of_scores(tmp_path: Path, scores: Scores, mode: Any, expected: str, last_epoch: int) -> None:
    last = f"last-epoch=0{last_epoch}-step={2 * last_epoch + 2:06d}.ckpt"
    assert names_kept(tmp_path, scores, BestSettings(mode=mode)) == [f"best-epoch=0{expected}.ckpt", last]


def test_a_score_that_is_not_logged(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="val/f1"):
        names_kept(tmp_path, [(0.5, 3.0)], BestSettings("val/f1"))
