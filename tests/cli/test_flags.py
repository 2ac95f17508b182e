"""Values of fit's flags: right ones train, wrong ones are refused in one line, and cost nothing."""

import os
import shlex
from pathlib import Path

import pytest
from helpers import RUN, TINY, Capsys, Command, fails

# flags | values that are right | values that are wrong
TABLE = r"""
model.layers        | 4 '4x5/2 4+' 4d 2x7v/2 '4\n4' | '' x 0 -1 16x2 '4 pool pool pool pool pool' 8+ 99999 16/3 '4,4'
model.network model.activation model.optimizer model.schedule best.mode | | x '' MLP null 1
model.dropout model.label_smoothing model.ema_decay data.scale | 0 0.5 | -0.1 1 1.5 nan inf x [] null
model.warmup data.augmented | 0 0.5 1         | -1 1.1 nan inf x
model.nesterov data.download | false true     | x 2 null
model.views         | 9                       | 0 4 x
model.lr            | 0.01 1e-3               | 0 -1 nan inf -inf x [] null ''
model.momentum      | 0.5 0.99                | 1 -1 nan x
data.rotation data.shift | 0 28 10            | -1 181 nan inf x
data.root           | data ./data data/       | pipe a.yaml nowhere loop empty
data.batch_size     | 7 40                    | 0 -1 60001 x 1.5 nan null 1000000000000000000000
data.val_size       | 0 10                    | -1 400 60000 x 1.5
data.split_seed checkpoint.every_n_steps board.every_n_epochs | 1 3 | -1 x 1.5
seed_everything     | 0 4294967295            | -1 4294967296 x 1.5 nan null true
checkpoint.every_seconds model.weight_decay | 0 0.5 | -1 x
processes.timeout   | 5 86400                 | 0 -1 nan inf 86401 x
trainer.max_epochs  | 1 3                     | 0 -1 -2 x 1.5 nan inf [] ''
trainer.precision   | 32 32-true 64-true auto | x 8
trainer.callbacks   | Timer                   | x LearningRateFinder
trainer.val_check_interval | 1.0 1 0.5        | x -1
trainer.default_root_dir | out ./out .        | a.yaml pipe /dev/null loop
config              | a.yaml                  | broken.yaml latin1.yaml unknown.yaml missing.yaml empty loop ''
"""
FLAGS = {
    flag: [shlex.split(cell.replace(r"\n", "\n")) for cell in cells[1:]]
    for cells in (line.split("|") for line in TABLE.strip().splitlines())
    for flag in cells[0].split()
}
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def files(command: Command, tiny_root: Path) -> None:
    contents = {"a.yaml": b"trainer:\n  max_epochs: 1\n", "broken.yaml": b"trainer: [\n", "latin1.yaml": b"a: \xe9\n"}
    for name, content in (contents | {"unknown.yaml": b"model:\n  nothing: 1\n"}).items():
        Path(name).write_bytes(content)
    Path("empty").mkdir()
    Path("loop").symlink_to("loop")
    Path("data").symlink_to(tiny_root)
    os.mkfifo("pipe")


@pytest.mark.parametrize("flag", FLAGS)
def test_values(flag: str, command: Command, capsys: Capsys) -> None:
    fit = ["fit", *TINY, "--board.every_n_epochs", "0", "--data.download", "false", f"--{flag}"]
    right, wrong = FLAGS[flag]
    for value in wrong:
        fails(capsys, *fit, value, run=command)
        assert not RUN.parent.exists()
    for value in right:
        assert command(*fit, value) == 0


WRONG = ["best", "last", "empty", "a.yaml", "pipe", "loop", "/dev/zero", "x" * 300, "http://localhost/a.ckpt"]
OTHERS = {f"{name} --ckpt_path": WRONG for name in ("fit", "validate", "test", "predict", "export --output a.pt2")}
OTHERS["predict --ckpt_path best"] = ["pipe", "loop", "/dev/zero", "empty", "x" * 300]
OTHERS["export --ckpt_path best --output"] = ["pipe", "loop", "empty", "a.yaml", "no/a.pt2", "/dev/zero", "x" * 300]


@pytest.mark.parametrize("line", OTHERS)
def test_other_commands(line: str, command: Command, capsys: Capsys) -> None:
    for value in OTHERS[line]:
        fails(capsys, *line.split(), value, run=command)
