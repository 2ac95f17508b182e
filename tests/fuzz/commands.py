"""Command lines: a sound one, flags over it, and what a slip of the hand does to it."""

from __future__ import annotations

import inspect
import os
import shlex
import shutil
from pathlib import Path
from random import Random

from pytorch_lightning import Trainer

from .cases import Case
from .runner import MODES
from .sandbox import FIT, WORK, checkpoint

# What no flag has a right to fail on: of the kinds that most flags take, and of any.
NUMBERS = ["0", "1", "-1", "2", "100", "0.5", "1.5", "nan", "inf", "-inf", "1e300", "1e-320", "true", "false", "null"]
NUMBERS += [str(number) for number in (2**31, 2**63, 2**64, 10**30)]
ODD = ["", "x", "[]", "{}", "[1,2]", '{"a": 1}', "x" * 300, "é", "\n", "a\nb", "\udcff", "../x", "[" * 50, "'", "--"]
ODD += ["/dev/null", "/proc/self/mem", "os.system", "torch.nn.Linear", "lit_mnist.module.LitMNIST"]

# flag | values that are right | values that are surely wrong | values of which either may be said
TABLE = """
model.layers        | 4 '4x5/2 4+' 4d 2x7v/2  | '' x 0 -1 16x2 '4 pool pool pool pool pool' 8+ 99999 16/3 '4,4' | '4\n4'
model.network       | digitnet                | x '' MLP null 1                  | mlp
model.dropout       | 0 0.5                   | -0.1 1 1.5 nan inf x [] null     | 1e-320
model.activation    | silu relu               | x '' gelu RELU 1 null            |
model.optimizer     | adamw sgd               | x '' adam 1 null                 |
model.lr            | 0.01 1e-3               | 0 -1 nan inf -inf x [] null ''   | 1e300 1e-320 1e38
model.momentum      | 0.5 0.99                | 1 -1 nan x                       | 0 1e-320
model.nesterov      | false true              | x 2 null                         |
model.weight_decay  | 0 0.1                   | -1 nan inf x                     | 1e300
model.schedule      | linear cosine           | x '' null                        |
model.warmup        | 0 0.5 1                 | -1 1.1 nan x                     |
model.label_smoothing | 0 0.3                 | 1 -1 nan x                       |
model.ema_decay     | 0 0.5                   | 1 -1 nan x                       |
data.rotation       | 0 180 10                | -1 181 nan inf x                 | 1e-320
data.shift          | 0 28                    | -1 29 nan inf x                  |
data.scale          | 0 0.9                   | -0.1 1 nan x                     |
data.augmented      | 0 0.5                   | -0.1 1.1 nan x                   |
data.name           | mnist                   | x '' MNIST null 1                | idx fashion_mnist
data.root           | data ./data data/       | '' pipe a.yaml nowhere loop folder ../elsewhere/empty | é ../x
data.batch_size     | 7 40 60000              | 0 -1 60001 x 1.5 nan null 1000000000000000000000 | 1
data.val_size       | 0 10                    | -1 60 60000 x 1.5                | 59 1
data.split_seed     | 0 7                     | -1 x 1.5                         | 18446744073709551616
data.download       | false true              | x 2 null                         |
seed_everything     | 0 4294967295            | -1 4294967296 x 1.5 nan null     | true
checkpoint.every_seconds | 0 0.5              | -1 x                             | nan inf
checkpoint.every_n_steps | 1 3                | -1 x 1.5                         | 18446744073709551616
best.monitor        | val/loss val/accuracy   |                                  | x '' null train/loss 1
best.mode           | max min                 | x '' null                        |
best.loss           | val/loss                |                                  | x '' null
board.every_n_epochs | 1 2                    | -1 x 1.5                         | 18446744073709551616
board.histograms    | true false              | x 2                              |
processes.timeout   | 5 86400                 | 0 -1 nan inf 86401 x             | 1e-320
trainer.max_epochs  | 1 3                     | 0 null -1 -2 x 1.5 nan inf [] '' |
trainer.max_steps   | 3 1                     | -2 x 1.5 nan                     | 0
trainer.strategy    |                         | x ddp_notebook                   | ddp ddp_spawn ddp_fork fsdp deepspeed single_device single_xla ddp_find_unused_parameters_true FSDPStrategy
trainer.accelerator |                         | x                                | tpu gpu cuda mps hpu auto cpu
trainer.devices     | 1                       | x 0                              | auto -1 2 [0] 0,1 [] '"1"' 1.5
trainer.num_nodes   | 1                       | x 0 -1                           | 1.5 null
trainer.precision   | 32 64 32-true 64-true auto | x 8                              | 16 bf16 16-mixed bf16-mixed 16-true bf16-true transformer-engine null
trainer.logger      |                         | x                                | true false null CSVLogger TensorBoardLogger WandbLogger MLFlowLogger [] '{"class_path": "CSVLogger", "init_args": {"save_dir": "logs"}}' '{"class_path": "CSVLogger", "init_args": {"nothing": 1}}'
trainer.callbacks   |                         | x                                | EarlyStopping Timer ModelCheckpoint StochasticWeightAveraging LearningRateFinder BatchSizeFinder DeviceStatsMonitor RichProgressBar TQDMProgressBar '[{"class_path": "EarlyStopping", "init_args": {"monitor": "x"}}]' [null] LearningRateMonitor ModelPruning GradientAccumulationScheduler
trainer.profiler    | simple                  | x                                | advanced pytorch xla SimpleProfiler
trainer.plugins     |                         | x                                | SLURMEnvironment TorchElasticEnvironment LightningEnvironment MPIEnvironment 16 MixedPrecision AsyncCheckpointIO []
trainer.fast_dev_run | true 1                 | x                                | 2 -1 0
trainer.max_time    | 00:01:00:00             | x                                | 00:00:00:00 '{"seconds": 1}' '{"x": 1}' '{}' -1 1e300 99999999:00:00:00
trainer.val_check_interval | 1.0 1 0.5        | x -1                             | 0 100 1.5 nan '00:00:00:01' '{"seconds": 0}'
trainer.check_val_every_n_epoch | 1 2         | x                                | 0 -1 null
trainer.accumulate_grad_batches | 2 1         | x 0 -1                           | 18446744073709551616 null
trainer.limit_train_batches | 1 0.5           | x -1                             | 0 1.5 nan 100
trainer.limit_val_batches   | 1 0.5           | x -1                             | 0 1.5 nan 100
trainer.limit_test_batches  | 1 0.5           | x -1                             | 0 1.5 nan
trainer.limit_predict_batches | 1 0.5         | x -1                             | 0 1.5 nan
trainer.gradient_clip_algorithm | norm value  |                                  | x 1 null
trainer.default_root_dir | out ./out .        | a.yaml pipe /dev/null loop       | '' ../elsewhere /proc/self ~/x é
config              | a.yaml                  | broken.yaml latin1.yaml unknown.yaml list.yaml missing.yaml folder pipe loop '' | empty.yaml deep.yaml class.yaml /dev/null
"""  # noqa: E501  # a line for a flag
FLAGS = {
    cells[0].strip(): [shlex.split(cell) for cell in cells[1:]]
    for cells in (line.split("|") for line in TABLE.strip().replace("'4\n4'", "'4\\n4'").splitlines())
}
TRAINER = [f"trainer.{name}" for name in inspect.signature(Trainer.__init__).parameters if name != "self"]
# Any value may be tried, but for these: it could train for ever, or wait for machines that nobody starts.
ONLY_TABLE = ("trainer.max_epochs", "trainer.num_nodes", "model.layers", "config", "data.root")

BAD_CHECKPOINTS = ["", "nowhere.ckpt", "folder", "pipe", "loop", "a.yaml", "/dev/zero", "/dev/null", "/dev/stdin", "é"]
BAD_CHECKPOINTS += ["http://x/y.ckpt", "lightning_logs/version_0", "x" * 300, "\n", "\udcff", "BEST", "[]", "empty.png"]
BAD_OUTPUTS = [
    "",
    "x",
    "folder",
    "old.pt2",
    "dangling.pt2",
    "nowhere/x.pt2",
    "loop/x.pt2",
    "x" * 300,
    "\udcff",
    "x.PT2",
]
BAD_OUTPUTS += ["pipe/x.pt2", "x" * 252 + ".pt2"]
BAD_IMAGES = [
    "",
    "nowhere.png",
    "pipe",
    "loop",
    "folder",
    "text.png",
    "empty.png",
    "blank.png",
    "x" * 300,
    "\udcff",
    "\n",
]
# a whole command line | the status that is right, or ? where it is not known
EARLY = """
--version        | 0
--help           | 0
x                | 2
''               | 2
FIT              | 2
--fit            | 2
--version x      | ?
fit --help       | 0
test --help      | 0
export --help    | 0
runs --help      | 0
fit --print_config | 0
fit --print_config=x | ?
predict --print_config | ?
fit --trainer.logger.help CSVLogger | 0
fit --trainer.logger.help x | ?
test             | 2
export           | 2
"""
RESULTS = ["[" * 100_000, "null", "[]", "\udcff", "{", '{"fit": 1}', '{"fit": {"recipe": 5, "state": null}}']
RESULTS += ['{"fit": {"parameters": NaN, "train_seconds": 1e999}}', '{"fit": {"epochs": -1, "metrics": [[]]}}']
RESULTS += ['{"fit": {"state": "\\ud800", "recipe": {"a": [1]}, "epochs": "9"}}']
CONFIGS = ["", "null", "[]", "trainer", "trainer: [", "trainer: null", "trainer: 1", "\udcff", "a: &a [*a]", "[" * 5000]
CONFIGS += [f"trainer:\n  {key}: {value}\n" for key in ("callbacks", "logger") for value in ODD if "\n" not in value]
CONFIGS += [
    f"trainer:\n  {key}:\n  - class_path: {path}\n    init_args: {given}\n"
    for key in ("callbacks", "logger")
    for path in ("os.system", "pytorch_lightning.callbacks.Timer", "nowhere.Nothing", "lit_mnist.board.Board", "[1]")
    for given in ("{}", "{nothing: 1}", "null", "{duration: x}")
]
CURVES = ["", "\n", "\udcff", "epoch", "epoch\n1,2,3\n", "epoch,epoch\n1,2\n", '"', "a,b\n" * 9, "x" * 200_000, "\0"]


def draw(rng: Random, template: Path) -> Case:
    if rng.random() < 0.05:
        line, status = rng.choice(EARLY.strip("\n").splitlines()).split("|")
        return Case(shlex.split(line), None if "?" in status else int(status))
    files = (checkpoint(template, run, name) for run in (0, 1) for name in ("best", "last"))
    paths = [str(file.relative_to(template / WORK)) for file in files]
    command = rng.choices(["fit", "resume", "validate", "test", "predict", "export", "runs"], [9, 3, 2, 2, 2, 1, 1])[0]
    good = rng.choice(["best", "last", *paths, "../elsewhere/x.ckpt"])
    case = {"runs": _runs, "export": _export}.get(command, _of_lightning)(rng, command, good)
    _slip(rng, case)
    if rng.random() < 0.08:
        case.mode = rng.choice(MODES)
        if not (case.expected == 0 and case.args[0] == "fit" and case.mode.startswith("stdout")):
            case.expected = None
    _odd_folder(rng, case)
    return case


def _pick(rng: Random, good: list[str], bad: list[str], share: float = 0.25) -> tuple[str, bool]:
    return (rng.choice(bad), True) if rng.random() < share else (rng.choice(good), False)


def _of_lightning(rng: Random, command: str, good: str) -> Case:
    fresh, bad, unsure = command == "fit", False, False
    args = [*FIT, "--trainer.max_epochs", "2"] if fresh else ["fit" if command == "resume" else command]
    if not fresh:
        path, bad = _pick(rng, [good], BAD_CHECKPOINTS, 0.15)
        args += ["--trainer.accelerator", "cpu", "--ckpt_path", path]
    if command == "resume":
        args += ["--trainer.max_epochs", "3"]
    if command == "predict" and rng.random() < 0.4:
        image, wrong = _pick(rng, ["digit.png", "pictures"], BAD_IMAGES, 0.6)
        more = ["digit.png"] if rng.random() < 0.3 else []
        args += ["--data.images", image, *more]
        # beside a good picture, one that shows nothing is told in its row
        bad, unsure = bad or (wrong and not (more and image in ("text.png", "empty.png", "blank.png"))), True
    belongs = {"checkpoint": ("fit", "resume"), "best": ("fit", "resume"), "board": ("fit", "resume", "test")}
    flags = sorted({*FLAGS, *TRAINER} - {f for f in FLAGS if command not in belongs.get(f.split(".")[0], (command,))})
    for flag in rng.sample(flags, rng.choice([0, 1, 1, 1, 2, 2, 3]) if fresh else rng.choice([0, 0, 1, 1, 2])):
        right, wrong_values, either = FLAGS.get(flag, [[], [], NUMBERS])
        others = [] if flag in ONLY_TABLE else NUMBERS + ODD
        kinds = [(right, 0, 3), (wrong_values, 1, 3), (either, 2, 3), (others, 2, 1)]
        values, kind, _ = rng.choices(kinds, [weight if values else 0 for values, _, weight in kinds])[0]
        args += [f"--{flag}", rng.choice(values)]
        # what a trainer, or data that is not read, is given may not matter to the other commands
        bad = bad or (kind == 1 and (fresh or not flag.startswith(("trainer", "data.root"))))
        unsure = unsure or kind == 2 or (kind == 1 and not bad) or (kind == 0 and not fresh)
    if {"--config", "--trainer.max_epochs"} <= set(args[len(FIT) + 2 :]):
        unsure, bad = True, False  # whichever comes last counts
    return Case(args, 2 if bad else None if unsure else 0)


def _export(rng: Random, command: str, good: str) -> Case:
    path, no_path = _pick(rng, [good], BAD_CHECKPOINTS)
    output, no_output = _pick(rng, ["out.pt2"] * 5 + ["out.onnx", "folder/out.pt2"], BAD_OUTPUTS, 0.5)
    args = ["export", "--ckpt_path", path, "--output", output]
    expected: int | None = 2 if no_path or no_output else 0
    if rng.random() < 0.2:
        args, expected = [*args, "--overwrite"], expected if no_path else None if no_output else 0
    if rng.random() < 0.2:
        root, wrong = _pick(rng, FLAGS["data.root"][0], FLAGS["data.root"][1], 0.7)
        args, expected = [*args, "--data.root", root], 2 if wrong else expected
    return Case(args, expected)


def _runs(rng: Random, command: str, good: str) -> Case:
    args, bad = ["runs"], False
    for flag, right, wrong_values in (
        ("--root_dir", [".", "./"], ["nowhere", "a.yaml", "pipe", "loop", "x" * 300, "\udcff", "folder", "/dev/null"]),
        ("--sort", ["run", "recipe", "parameters", "epochs", "val_accuracy", "seconds", "state"], ["x", "", "\n"]),
        ("--format", ["table", "csv", "json"], ["x", "", "JSON"]),
    ):
        if rng.random() < 0.5:
            value, wrong = _pick(rng, right, wrong_values)
            args, bad = [*args, flag, value], bad or wrong
    return Case(args, 2 if bad else 0)


def _slip(rng: Random, case: Case) -> None:
    """Now and then, a mistake of the form."""
    args = case.args
    slip = rng.choices(
        ["", "=", "junk", "unknown", "missing", "empty", "--", "short", "twice", "lost"], [80] + [2] * 9
    )[0]
    if slip == "=":
        place = rng.randrange(1, len(args) // 2 * 2, 2) if len(args) > 2 else 0
        if place and args[place].startswith("--") and args[place] != "--overwrite":
            args[place : place + 2] = [f"{args[place]}={args[place + 1]}"]
    elif slip == "junk":
        args.insert(1, "junk")
        case.expected = 2
    elif slip == "unknown":
        args += [rng.choice(["--nothing", "--trainer.nothing", "--model.nothing.x", "--é", "---"]), "1"]
        case.expected = 2
    elif slip == "missing" and args[0] == "fit":
        args.append(rng.choice(["--model.lr", "--trainer.max_epochs", "--ckpt_path", "--data.root"]))
        case.expected = 2
    elif slip == "twice":
        args += args[1:3]  # of the sound beginning
        # which may put right what was wrong before
        case.expected = case.expected if args[0] == "fit" and args.count(args[1]) == 2 else None
    elif slip:
        case.expected = None
        if slip == "short":
            args[:] = [arg[:-2] if arg.startswith("--") and rng.random() < 0.3 else arg for arg in args]
        elif slip == "lost":
            del args[rng.randrange(len(args))]
        else:
            args.insert(rng.randrange(len(args) + 1), "" if slip == "empty" else "--")


def _odd_folder(rng: Random, case: Case) -> None:
    """Now and then, something odd under lightning_logs/."""
    resumes = case.args[:1] == ["fit"] and "--ckpt_path" in case.args
    if rng.random() > (0.5 if case.args[:1] == ["runs"] else 0.3 if resumes else 0.05):
        return
    kind = rng.choice(["results", "results", "results fifo", "checkpoint fifo", "huge", "file"])
    if resumes:
        kind = rng.choice([kind, "config", "config", "config fifo", "curve", "curve fifo"])
    content = os.fsencode(rng.choice(CONFIGS if kind == "config" else CURVES if kind == "curve" else RESULTS))
    number = "9" * rng.choice([4, 30, 200])

    def prepare(folder: Path) -> None:
        logs = folder / WORK / "lightning_logs"
        if kind == "results":
            (logs / "version_2" / "results.json").write_bytes(content)
        elif kind == "results fifo":
            (logs / "version_2" / "results.json").unlink()
            os.mkfifo(logs / "version_2" / "results.json")
        elif kind == "checkpoint fifo":
            (logs / "version_3" / "checkpoints").mkdir(parents=True)
            for name in ("best-epoch=00-accuracy=0.5000", "last-epoch=00-step=000001"):
                os.mkfifo(logs / "version_3" / "checkpoints" / f"{name}.ckpt")
        elif kind.startswith(("config", "curve")):
            path = logs / "version_1" / ("config.yaml" if kind.startswith("config") else "metrics.csv")
            path.unlink()
            if kind.endswith("fifo"):
                os.mkfifo(path)
            else:
                path.write_bytes(content)
        elif kind == "huge":
            (logs / f"version_{number}").mkdir()
        else:
            shutil.rmtree(logs)
            logs.write_text("no folder\n")

    case.prepare.append(prepare)
    told = kind in ("results", "config", "curve")
    case.note = f"{kind} {content[:80]!r}" if told else f"{kind} {number[:5]}" if kind == "huge" else kind
    if not kind.startswith("results") and case.expected != 2:
        case.expected = None
