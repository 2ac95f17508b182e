"""The folder that a case runs in: two runs, tiny data, and what else a user may have lying about."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from pathlib import Path

from conftest import write_tiny_mnist
from PIL import Image, ImageDraw, ImageFont

FIT = ["fit", "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1", "--board.every_n_epochs", "0"]
FIT += ["--model.layers", "4x5/2 8/2", "--data.batch_size", "20", "--data.val_size", "20"]
FINISHED = [*FIT, "--trainer.max_epochs", "2", "--model.dropout", "0.1"]
STOPPED = [*FIT, "--trainer.max_epochs", "2", "--model.optimizer", "adamw", "--model.lr", "0.01"]
STOPPED += ["--model.label_smoothing", "0.1", "--model.ema_decay", "0", "--data.batch_size", "10"]
STOPPED += ["--checkpoint.every_n_steps", "1"]
# callbacks and loggers that a resumed run takes over from its config.yaml
LOGGERS = [
    {"class_path": name, "init_args": {"save_dir": ".", "name": "lightning_logs"}}
    for name in ("TensorBoardLogger", "CSVLogger")
]
STOPPED += ["--trainer.logger", json.dumps(LOGGERS), "--trainer.callbacks", "LearningRateMonitor"]
STOPPED += ["--trainer.callbacks+", '{"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss"}}']
STOPPED_AT = 7  # of four steps an epoch: in the middle of the second

WORK = "work"  # the current folder of a case; others lie beside it
LOCKS = (".lock", ".lit-mnist-lock")

CONFIGS = {
    "a.yaml": b"trainer:\n  max_epochs: 1\n",
    "broken.yaml": b"trainer: [\n",
    "latin1.yaml": "model:\n  layers: é\n".encode("latin-1"),
    "empty.yaml": b"",
    "list.yaml": b"- 1\n- 2\n",
    "unknown.yaml": b"model:\n  nothing: 1\n",
    "deep.yaml": b"model: " + b"[" * 3000 + b"]" * 3000 + b"\n",
    "class.yaml": b"trainer:\n  callbacks: os.system\n",
}


def lay_out(folder: Path) -> None:
    """All of the template but its two runs."""
    work = folder / WORK
    write_tiny_mnist(work / "data" / "MNIST" / "raw", train=60, test=20)
    for name in ("home", "tmp", "elsewhere/empty", f"{WORK}/folder", f"{WORK}/pictures"):
        (folder / name).mkdir(parents=True)
    for name, content in CONFIGS.items():
        (work / name).write_bytes(content)
    picture = Image.new("L", (60, 60), 230)
    ImageDraw.Draw(picture).text((20, 12), "7", fill=20, font=ImageFont.load_default(32))
    picture.save(work / "digit.png")
    shutil.copy(work / "digit.png", work / "pictures" / "7.png")
    Image.new("L", (60, 60), 230).save(work / "blank.png")
    (work / "text.png").write_text("no picture\n")
    (work / "empty.png").write_bytes(b"")
    (work / "old.pt2").write_text("something dear\n")
    (work / "loop").symlink_to("loop")
    (work / "dangling.pt2").symlink_to("nowhere/x")


def complete(folder: Path) -> None:
    """What of the template depends on its runs."""
    shutil.copy(checkpoint(folder, 0, "best"), folder / "elsewhere" / "x.ckpt")
    odd = folder / WORK / "lightning_logs" / "version_2"
    odd.mkdir()
    (odd / "results.json").write_text(json.dumps({"fit": {"state": {"a": 1}, "recipe": [[]], "parameters": "many"}}))


def copy(template: Path, folder: Path) -> None:
    shutil.copytree(template, folder, symlinks=True)
    os.mkfifo(folder / WORK / "pipe")  # which cannot be copied


def checkpoint(folder: Path, run: int, name: str) -> Path:
    (path,) = (folder / WORK / "lightning_logs" / f"version_{run}" / "checkpoints").glob(f"{name}-*.ckpt")
    return path


def snapshot(folder: Path) -> dict[str, tuple[str, int, str]]:
    """Kind, size and digest of everything below, by relative path; locks are left out."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(parent, name)
            mode = path.lstat().st_mode
            if name in LOCKS:
                continue
            content = b""
            if stat.S_ISREG(mode):
                content = path.read_bytes()
            elif stat.S_ISLNK(mode):
                content = os.fsencode(path.readlink())
            kind = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}.get(
                stat.S_IFMT(mode), "special"
            )
            found[str(path.relative_to(folder))] = (kind, len(content), hashlib.sha256(content).hexdigest())
    return found
