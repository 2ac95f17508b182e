"""Every optimizer, schedule, callback and metric, found by name: trained, killed, resumed and compared bit for bit.

As a script it writes docs/exact.md. A verdict is `exact`, `refused` (before the first step, with no run left behind) or
what went wrong.
"""

import csv
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from doctest import DocTestParser
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from inspect import getmembers, isclass, signature
from itertools import chain, product
from pathlib import Path
from pkgutil import walk_packages
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torchmetrics
from helpers import REPOSITORY, Killed, assert_same, at_call, fail, last_checkpoint
from pytorch_lightning import LightningModule, Trainer, callbacks, seed_everything
from torch import Tensor, nn, optim
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import MetricTracker

from lit_mnist.exact import resume
from lit_mnist.exact.assembly import hold, make_callbacks, make_plugins
from lit_mnist.exact.checkpoints import BestSettings, Run, SaveSettings
from lit_mnist.exact.conditions import conditions
from lit_mnist.exact.console import UserError
from lit_mnist.exact.loggers import RunCSVLogger
from lit_mnist.exact.runs import newest, read_checkpoint

TABLE = REPOSITORY / "docs" / "exact.md"
STEPS, EPOCHS = 4, 3
KILLS = (1, 3, 3, 4)  # in front of these steps, counted from the start before: 0, 2, 4 (an epoch's end), 7 steps done
# times, what depends on the machine, and where the logger's file ends
UNCOMPARED = r".*_seconds|time_elapsed|configured|conditions|curves|Results|.*per_sec.*|.*/time"
Make = Callable[[], Sequence[Any]]  # gives a module and the user's callbacks
Row = tuple[str, str, str, str]  # the kind of what was tried, its name, the verdict, and why


class Case(NamedTuple):
    kind: str = ""
    name: str = ""  # of the class, and what is special
    optimizer: Callable[..., Any] = partial(optim.SGD, lr=0.05, momentum=0.9)
    schedule: Callable[[Any, int], Any] | None = None  # of an optimizer and the run's number of steps
    interval: str = "step"
    longer: bool = False  # trained on for two epochs, not killed
    callback: Callable[[], Any] | None = None
    hook: str = ""  # of the module, which changes the state
    settings: dict[str, Any] = {}  # noqa: RUF012, of the trainer
    network: str = "cnn"
    manual: bool = False
    groups: dict[str, Any] | None = None  # settings of the second of two groups

    def make(self) -> list[Any]:
        module = type("Hooked", (Trained,), {self.hook: changing(self.hook)}) if self.hook else Trained
        return [module(self), *([self.callback()] if self.callback else [])]

    def make_network(self) -> nn.Sequential:
        if self.network == "embedding":
            return nn.Sequential(nn.Embedding(9, 3, sparse=True), nn.Flatten())
        if self.network == "matrices":
            return nn.Sequential(nn.Flatten(), nn.Linear(9, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False))
        first = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.Dropout(0.2), nn.Flatten())
        return nn.Sequential(first, nn.Linear(8, 3))

    def make_batches(self, number: int, seed: int) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(seed)
        targets = torch.randint(3, (number, 8), generator=generator)
        images = torch.randn(number, 8, 1, 3, 3, generator=generator) + targets[:, :, None, None, None]
        inputs = 3 * targets[:, :, None] if self.network == "embedding" else images
        return DataLoader(TensorDataset(inputs, targets), batch_size=None)

    def make_optimizer(self, network: nn.Module) -> Any:
        each = list(network.parameters())
        two = [{"params": each[::2]}, {"params": each[1::2], **(self.groups or {})}]
        return self.optimizer(each if self.groups is None else two)

    def works(self) -> bool:
        """Return whether torch itself makes this optimizer, and takes a step."""
        network, ((inputs, _),) = self.make_network(), self.make_batches(1, 0)
        with suppress(ValueError, RuntimeError, AssertionError):
            (loss := network(inputs).sum()).backward()
            self.make_optimizer(network).step(lambda: loss)
            return True
        return False


class Trained(LightningModule):
    """Trains a case, and notes the rate and the momentum of each group in each step."""

    def __init__(self, case: Case = Case()) -> None:  # noqa: B008
        super().__init__()
        self.case, self.network, self.notes = case, case.make_network(), dict[str, Any]()
        self.backbone = self.network[0]
        self.automatic_optimization = not case.manual
        self.register_buffer("calls", torch.zeros(()))

    def train_dataloader(self) -> DataLoader[Any]:
        return self.case.make_batches(STEPS, seed=1)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.case.make_batches(2, seed=2)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(self.network(batch[0]), batch[1])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        groups = self.trainer.optimizers[0].param_groups
        self.notes[f"groups/{self.global_step}"] = [(float(one["lr"]), one.get("momentum")) for one in groups]
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        if not self.case.manual:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step(lambda: loss)
        return None

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        # a callback that unfreezes the first part adds it
        optimizer = self.case.make_optimizer(self.network[1] if "Finetuning" in self.case.name else self.network)
        if self.case.schedule is None:
            return optimizer
        schedule = self.case.schedule(optimizer, STEPS * (self.trainer.max_epochs or 0))
        return [optimizer], [{"scheduler": schedule, "interval": self.case.interval, "monitor": "val/loss"}]


def fit(folder: Path, make: Make, notes: dict[str, Any], kill_at: int = 0, **settings: Any) -> dict[str, Any]:
    """Train from a folder's newest checkpoint on, or anew, to the end or in front of a step, and return the outcome."""
    seed_everything(5, verbose=False)
    checkpoint = newest(folder / "version_0")
    run = Run.resumed(checkpoint, read_checkpoint(checkpoint)) if checkpoint else Run().claim(folder)
    module, *own = make()
    module.notes = notes
    trainer = Trainer(
        accelerator="cpu",
        callbacks=make_callbacks(run, SaveSettings(every_n_steps=1), BestSettings("val/loss", "min"), own=own),
        plugins=make_plugins(run),
        log_every_n_steps=1,
        enable_progress_bar=any(isinstance(part, callbacks.ProgressBar) for part in own),
        enable_model_summary=False,
        default_root_dir=folder,
        logger=RunCSVLogger(folder, name="", version="version_0"),
        **{"max_epochs": EPOCHS, **settings},
    )
    kill = at_call(kill_at, partial(fail, Killed()), type(module), "training_step")
    with patch.object(resume, "conditions", cache(conditions)), patch("os.fsync"), hold(run, trainer), kill:  # slow
        trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
    return {
        "checkpoint": last_checkpoint(folder / "version_0"),
        "files": sorted(str(path) for path in folder.rglob("*") if path.is_file() and path.name[0] != "."),
        "rows": list(csv.DictReader((folder / "version_0" / "metrics.csv").read_text().splitlines())),
    }


def compare(folder: Path, make: Make, kills: Sequence[int] = KILLS, longer: bool = False, **settings: Any) -> None:
    """Compare a run that is killed in front of some steps, or trained longer, with one that is not."""
    ours, theirs = dict[str, Any](), dict[str, Any]()
    settings |= {"max_epochs": 4} if longer else {}
    whole = fit(folder, make, theirs, **settings)
    rmtree(folder)  # the other has the same paths
    if longer:
        fit(folder, make, {}, max_epochs=2)
    for kill_at in () if longer else kills:
        with suppress(Killed):
            fit(folder, make, ours, kill_at, **settings)
    ended = fit(folder, make, ours, **settings)
    if longer and (schedules := whole["checkpoint"]["lr_schedulers"]):  # before, the rates were those of a shorter one
        ended, whole = ended["checkpoint"]["lr_schedulers"], schedules
    theirs = {key: theirs[key] for key in ours} if longer else theirs
    assert_same({"notes": ours, "ended": ended}, {"notes": theirs, "ended": whole}, ignored=UNCOMPARED)


def verdict(make: Make, **settings: Any) -> tuple[str, str]:
    """Return the verdict of what `compare` finds, and why it is so."""
    with TemporaryDirectory() as place:
        folder = Path(place, "runs")
        try:
            compare(folder, make, **settings)
        except UserError as error:
            return ("refused too late" if folder.exists() else "refused"), str(error)
        except Exception as error:
            return "DIFFERENT", f"{type(error).__name__}: {error}"
    return "exact", ""


class Counting:
    """A callable object with a state: a factor that falls with each call, for a run of so many steps."""

    def __init__(self, steps: int = 0) -> None:
        self.calls, self.steps = 0, steps

    def __call__(self, step: float) -> float:
        self.calls += 1
        return 1 / (1 + 0.1 * self.calls + 0.001 * self.steps)


def changing(hook: str) -> Callable[..., Any]:
    """Return a hook of a module or callback that changes weights and RNG states, and counts its calls."""

    def changed(self: Any, *args: Any) -> Any:
        module = next(part for part in (self, *args) if isinstance(part, Trained))
        module.network[1].bias.data += 1e-3 * (torch.rand(()) + np.random.rand() + self.calls)  # noqa: NPY002
        self.calls += 1
        return getattr(super(type(self), self), hook)(*args)

    return changed


class Saved:
    """The base of a callback or sampler: all data in its attributes are its state."""

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not callable(value)}  # patched hooks

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)


class Freezing(callbacks.Callback):
    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            pl_module.backbone[0].requires_grad_(False)
            pl_module.backbone[1].eval()
            trainer.optimizers[0].param_groups[0]["lr"] /= 2


# what each class is made with, by its name, with a word behind it for more than one; an optimizer as `lr=0.01` makes it
OPTIMIZERS: dict[str, dict[str, Any]] = {"ASGD": {"t0": 2}, "Adadelta": {"lr": 1.0}, "LBFGS": {"max_iter": 3}}
NETWORKS = {"SparseAdam": "embedding", "Muon": "matrices"}
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {name: True} for name in ("amsgrad", "centered", "foreach", "fused", "maximize")},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "decoupled weight decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "line search": {"line_search_fn": "strong_wolfe"},
    "lr a tensor": {"lr": torch.tensor(0.01)},
}
WAYS: dict[str, dict[str, Any]] = {
    **{name: {"settings": {"precision": name}} for name in ("bf16-true", "64-true", "bf16-mixed")},
    "two groups": {"groups": {"weight_decay": 0.1}},
    "amsgrad in one of two": {"groups": {"amsgrad": True}},
    "sparse gradients": {"network": "embedding"},
    "manual optimization": {"manual": True},
    "accumulated": {"settings": {"accumulate_grad_batches": 2}},
    "clipped": {"settings": {"gradient_clip_val": 0.1}},
}
S: Any = schedules
SCHEDULES: dict[str, Callable[[Any, int], Any]] = {
    "LambdaLR": lambda o, n: S.LambdaLR(o, lambda step: 1 - step / n),
    "LambdaLR object": lambda o, n: S.LambdaLR(o, Counting()),
    "LambdaLR object of a length": lambda o, n: S.LambdaLR(o, Counting(n)),
    "MultiplicativeLR": lambda o, n: S.MultiplicativeLR(o, lambda step: 0.93 + 0.01 * (step % 5)),
    "StepLR": lambda o, n: S.StepLR(o, n // 4, 0.7),
    "MultiStepLR": lambda o, n: S.MultiStepLR(o, [1, n // 2, 3 * n // 4], 0.7),
    "ConstantLR": lambda o, n: S.ConstantLR(o, 0.3, 2),
    "LinearLR": lambda o, n: S.LinearLR(o, 1.0, 0.0, n),
    "ExponentialLR": lambda o, n: S.ExponentialLR(o, 0.93),
    "PolynomialLR": lambda o, n: S.PolynomialLR(o, n, 2.0),
    "CosineAnnealingLR": lambda o, n: S.CosineAnnealingLR(o, n, 0.001),
    "CosineAnnealingWarmRestarts": lambda o, n: S.CosineAnnealingWarmRestarts(o, n // 3, 2, 0.001),
    "CyclicLR": lambda o, n: S.CyclicLR(o, 0.001, 0.05, n // 4, 5),
    "CyclicLR object": lambda o, n: S.CyclicLR(o, 0.001, 0.05, 3, scale_fn=Counting(n), scale_mode="iterations"),
    "OneCycleLR": lambda o, n: S.OneCycleLR(o, 0.05, n),
    "OneCycleLR linear": lambda o, n: S.OneCycleLR(o, 0.05, n, anneal_strategy="linear", three_phase=True),
    "SequentialLR": lambda o, n: S.SequentialLR(o, [S.LinearLR(o, 0.1, 1.0, 2), S.CosineAnnealingLR(o, n - 2)], [2]),
    "SequentialLR object": lambda o, n: S.SequentialLR(o, [S.LambdaLR(o, Counting()), S.StepLR(o, 2, 0.5)], [2]),
    "ChainedScheduler": lambda o, n: S.ChainedScheduler([S.ConstantLR(o, 0.1, 4), S.CosineAnnealingLR(o, n)]),
    "ChainedScheduler nested": lambda o, n: S.ChainedScheduler([SCHEDULES["SequentialLR"](o, n), S.StepLR(o, 5)]),
    "ReduceLROnPlateau": lambda o, n: S.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.5, cooldown=1),
    "SWALR": lambda o, n: SWALR(o, 0.01, n),
}
WHEN: dict[str, dict[str, Any]] = {
    "step": {},
    "epoch": {"interval": "epoch"},
    "step, longer": {"longer": True},
    "step, longer, lr a tensor": {"longer": True, "optimizer": lambda o: optim.SGD(o, torch.tensor(0.05), 0.9)},
}
C: Any = callbacks
BASES = ("BaseFinetuning", "BasePredictionWriter", "Checkpoint", "ProgressBar")
CALLBACKS: dict[str, Callable[[], Any]] = {
    **{name: getattr(callbacks, name) for name in callbacks.__all__ if name not in BASES},
    "BackboneFinetuning": lambda: C.BackboneFinetuning(1, lambda epoch: 1.5),
    "BackboneFinetuning without batch norm": lambda: C.BackboneFinetuning(1, train_bn=False),
    "Callback": Freezing,
    "DeviceStatsMonitor": lambda: C.DeviceStatsMonitor(False),
    "EMAWeightAveraging": lambda: C.EMAWeightAveraging(decay=0.5, update_starting_at_epoch=1),
    "EarlyStopping": lambda: C.EarlyStopping("val/loss", patience=0, min_delta=0.05),
    "EarlyStopping epoch": lambda: C.EarlyStopping("loss", patience=1, min_delta=1, check_on_train_epoch_end=True),
    "GradientAccumulationScheduler": lambda: C.GradientAccumulationScheduler({0: 1, 1: 2, 2: 4}),
    "LambdaCallback": lambda: C.LambdaCallback(on_train_epoch_start=lambda t, m: m.network[1].bias.data.mul_(0.5)),
    "LearningRateMonitor": lambda: C.LearningRateMonitor(log_momentum=True, log_weight_decay=True),
    "ModelCheckpoint": lambda: C.ModelCheckpoint(monitor="val/loss", save_top_k=2, save_last=True),
    "ModelCheckpoint steps": lambda: C.ModelCheckpoint(every_n_train_steps=3, save_top_k=-1),
    "ModelCheckpoint exception": lambda: C.ModelCheckpoint(save_on_exception=True),
    "ModelPruning": lambda: C.ModelPruning("l1_unstructured", amount=0.2),
    "OnExceptionCheckpoint": lambda: C.OnExceptionCheckpoint("."),
    "StochasticWeightAveraging": lambda: C.StochasticWeightAveraging(0.01, 0.5, 1),
    "ThroughputMonitor": lambda: C.ThroughputMonitor(lambda batch: 8, window_size=3),
}
REFUSED = (  # with these beginnings
    *("BatchSizeFinder", "LearningRateFinder", "ModelCheckpoint exception", "ModelPruning", "OnExceptionCheckpoint"),
    *("ReduceLROnPlateau / step", "SpikeDetection", "StochasticWeightAveraging", "ThroughputMonitor"),
)


def names() -> dict[str, list[str]]:
    """Return the classes there are, by kind."""

    def subclasses(room: Any, base: type) -> list[str]:
        kinds = dict(getmembers(room, isclass))
        return [name for name, kind in kinds.items() if name[0] != "_" and base in kind.__mro__[1:]]

    beginnings = ("on_train_", "on_validation_", "on_before_", "on_after_", "on_fit_start")
    return {
        "optimizer": subclasses(optim, optim.Optimizer),
        "schedule": [*subclasses(schedules, schedules.LRScheduler), "SWALR"],
        "callback": sorted(name for name in callbacks.__all__ if name not in BASES),
        "hook": [name for name in dir(LightningModule) if name.startswith(beginnings)],
    }


def optimizer_cases(name: str) -> Iterator[Case]:
    kind, settings = getattr(optim, name), {"lr": 0.01, **OPTIMIZERS.get(name, {})}

    def make(more: dict[str, Any], parameters: Any) -> Any:
        return kind(parameters, **settings | deepcopy(more))  # a schedule changes a tensor

    plain = Case("optimizer", name, partial(make, {}), network=NETWORKS.get(name, "cnn"))
    yield plain
    taken = signature(kind).parameters.keys()
    tried: dict[str, dict[str, Any]]
    tried = {way: {"optimizer": partial(make, more)} for way, more in VARIANTS.items() if taken >= more.keys()}
    tried |= {way: change for way, change in WAYS.items() if taken >= change.get("groups", {}).keys()}
    if "momentum" in tried:
        tried["momentum and sparse gradients"] = tried["momentum"] | WAYS["sparse gradients"]
    yield from filter(Case.works, (plain._replace(name=f"{name} {way}", **change) for way, change in tried.items()))


def cases() -> Iterator[Case]:
    """Give all cases but the metrics."""
    found = names()
    for name in found["optimizer"]:
        yield from optimizer_cases(name)
    for (name, make), (when, change) in product(SCHEDULES.items(), WHEN.items()):
        yield Case("schedule", f"{name} / {when}", schedule=make, **change)
    tried = [Case("callback", key, callback=make) for key, make in CALLBACKS.items()]
    for hook in found["hook"]:
        own = type("Own", (Saved, callbacks.Callback), {"calls": 0, hook: changing(hook)})
        tried.append(Case("hook", hook, callback=own if hasattr(callbacks.Callback, hook) else None, hook=hook))
    yield from tried
    for case in (case for case in tried if not case.name.startswith(REFUSED)):
        yield case._replace(name=f"{case.name}, validated within an epoch", settings={"val_check_interval": 2})
        if case.name.endswith("WeightAveraging"):
            yield case._replace(name=f"{case.name}, longer", longer=True)


features: Any = nn.Flatten()  # stands for the pretrained network of a metric
features.num_features = 12  # of images (B, 3, 2, 2)
# in place of what a class's docstring tries: nothing, or a pretrained network
FRECHET = ("FrechetInceptionDistance", "MemorizationInformedFrechetInceptionDistance")
EXAMPLES = {
    "CompositionalMetric": "(BinaryAccuracy() + BinaryRecall()).update(tensor([0, 1, 1]), tensor([1, 1, 0]))",
    "MetricInputTransformer": "kind(BinaryAccuracy()).update(tensor([0, 1, 1]), tensor([1, 1, 0]))",
    "LipVertexError": "kind([0, 1]).update(torch.rand(9, 4, 3), torch.rand(9, 4, 3))",
    **dict.fromkeys(FRECHET, "kind(features).update(images, True)"),
    "KernelInceptionDistance": "kind(features, subset_size=4).update(images, True)",
    "FeatureShare": "kind([FrechetInceptionDistance(features)]).update(images, True)",
    "InceptionScore": "kind(features).update(images)",
}


class Updated(Exception):  # noqa: N818
    """Ends the example of a metric at its first update, with the metric and the arguments."""


@cache
def metric_classes() -> dict[str, Any]:
    """Return the public classes of torchmetrics by name, also those that it hides where a package is missing.

    A class like `Accuracy`, which makes one of several others, is none of them.
    """
    for room in walk_packages(torchmetrics.__path__, "torchmetrics."):
        with suppress(ImportError):
            import_module(room.name)
    rooms = [vars(room) for name, room in sorted(sys.modules.items()) if name.partition(".")[0] == "torchmetrics"]
    return {
        name: kind
        for room in rooms
        for name, kind in sorted(room.items())
        if name[0] != "_" and isclass(kind) and issubclass(kind, Metric | MetricCollection | MetricTracker)
        if kind is not Metric and (name in room.get("__all__", ()) or not kind.__subclasses__())
        if "__new__" not in vars(kind)
    }


@cache
def example(kind: Any) -> tuple[Any, ...]:
    """Return a metric as its class's docstring makes it, and its first update's arguments, the named ones last."""

    def end(*args: Any, **keywords: Any) -> None:
        raise Updated(*args, keywords)

    parts = DocTestParser().get_examples(kind.__doc__)
    names = {"torch": torch, "tensor": torch.tensor, "kind": kind, "features": features}
    names |= {"images": torch.rand(8, 3, 2, 2), **metric_classes()}
    with patch.multiple(kind, update=end, forward=end), pytest.raises(Updated) as ended:
        exec(EXAMPLES.get(kind.__name__) or "".join(part.source for part in parts), names)
    return ended.value.args


def make(kind: Any) -> Any:
    metric = deepcopy(example(kind)[0])
    metric.reset()
    return metric


def update(metric: Any, step: int) -> None:
    """Update a metric with some samples of its example, chosen at random."""

    def resample(value: Any) -> Any:
        size = len(value) if isinstance(value, Tensor) and value.ndim else 0
        return value[torch.randint(size, (size,), generator=torch.Generator().manual_seed(step))] if size else value

    *args, keywords = tree_map(resample, example(metric.__class__)[1:])
    if isinstance(metric, MetricTracker):
        metric.increment()
    metric.update(*args, **keywords)
    if any(value is True for value in args):  # real images, and generated ones
        metric.update(args[0].flip(0) * 0.9, False)


def missing(name: str) -> str:
    """Return what is missing here to try a metric, or nothing."""
    try:
        with patch.object(socket, "getaddrinfo", partial(fail, OSError())):
            update(make(metric_classes()[name]), 0)
    except OSError:
        return "needs a download"
    except Exception as error:
        if not (isinstance(error, ImportError) or "nstall" in str(error)):
            raise
        return "needs a package"
    return ""


class Measured(Trained):
    """Updates metrics in each step, and notes their values at each epoch's end."""

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        super().__init__()
        self.metrics: Any = nn.ModuleDict(metrics)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for metric in self.metrics.values():
            update(metric, self.global_step)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        for name, metric in self.metrics.items():
            value = metric.compute_all() if isinstance(metric, MetricTracker) else metric.compute()
            self.notes[f"{name}/{self.current_epoch}"] = value
            if self.current_epoch == 0:  # one epoch begins anew, and one continues
                metric.reset()


def verdicts(names: Sequence[str]) -> Iterator[Row]:
    """Give the verdicts of classes that are tried together: where it is not `exact`, its reason names the metric."""
    reasons = {name: missing(name) for name in names}
    tried = verdict(lambda: [Measured({name: make(metric_classes()[name]) for name in names if not reasons[name]})])
    yield from (("metric", name, *(("not tried", why) if why else tried)) for name, why in reasons.items())


PAGE = """# What is exact

`PYTHONPATH=tests python tests/exact/matrix.py` wrote this ({versions}): each case is trained for {epochs} epochs,
killed in front of {kills} steps and resumed, and every tensor and logged value compared bit for bit. A schedule is also
lengthened by a resume: its rates are those of a run that had this length from the start. Variants of an optimizer,
where it takes them: {variants}.

| kind | verdict | cases | names |
| --- | --- | --- | --- |
{rows}
"""


def page(found: Sequence[Row]) -> str:
    lines, metrics = list[str](), sum(row[0] == "metric" for row in found)
    for kind, what in dict.fromkeys((row[0], row[2]) for row in found):
        own = [(re.split("[ ,]", row[1])[0], row[3]) for row in found if (row[0], row[2]) == (kind, what)]
        shown = [f"`{name}`{why and f' ({why})'}".replace("|", "/")[:300] for name, why in own]
        if (kind, what) == ("metric", "exact"):
            shown = [f"all of torchmetrics' {metrics} classes that make no other one, but those that are not tried"]
        lines.append(f"| {kind} | {what} | {len(own)} | {', '.join(dict.fromkeys(shown))} |")
    known = {"epochs": EPOCHS, "kills": len(KILLS), "variants": ", ".join([*VARIANTS, *WAYS])}
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "pytorch-lightning", "torchmetrics"))
    return PAGE.format(versions=versions, rows="\n".join(lines), **known)


def main() -> None:
    judged = ((case.kind, case.name, *verdict(case.make, longer=case.longer, **case.settings)) for case in cases())
    rows: list[Row] = [("callback", name, "not tried", "a base class") for name in BASES]
    for row in chain(judged, verdicts(list(metric_classes()))):
        rows.append(row)
        print(*row, sep=" | ", file=sys.stderr)
    TABLE.write_text(page(rows))


if __name__ == "__main__":
    main()
