"""A study: which settings are tried, with which seeds, and what decides between them."""

from __future__ import annotations

import itertools
import json
import math
import re
from argparse import SUPPRESS
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import Namespace
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from lit_mnist.commands.cli import MNISTCLI, refusals
from lit_mnist.commands.settings import CommandError, Parser, parse
from lit_mnist.training.console import shortened
from lit_mnist.training.runs import read_results, section

CONFIG = "config"  # the setting whose values are recipe files
PARTS = ("model", "data", "trainer", "best", "checkpoint", "board")
# what each trial is given, or what no trial's result may depend on
NOT_SWEPT = {
    "seed_everything": "seeds are given by `seeds`",
    "data.seed": "seeds are given by `seeds`",
    "data.root": "it is given by the flag --data.root",
    "data.images": "it is for predict alone",
    "trainer.default_root_dir": "it is given by the flag --root_dir",
    "trainer.devices": "a trial is trained on one device",
    "trainer.num_nodes": "a trial is trained on one device",
    "trainer.fast_dev_run": "a trial is a whole run",
    "trainer.enable_checkpointing": "a trial that is stopped is resumed from its checkpoint",
}
MOST = 100_000  # trials


@dataclass(frozen=True)
class Study:
    """What is compared with what. A trial is one run: a setting with one seed.

    Args:
        base: recipe, a file or a list of them, as after `fit --config`; without one the default.
        settings: what is tried, by dotted names such as model.lr: a list of values, or a range `{low: 0.1, high: 0.8}`
            with `log: true` or a `step`; a plain value is the same in all trials. Values of `config` are recipe files.
        seeds: how many, from 1 on, or a list of them.
        sampler: how settings are chosen: every combination (grid), at random, or by TPE, a Parzen estimator that
            prefers what was good.
        samples: how many settings random and tpe draw.
        compare: metric of held-out images, or of the training, that decides.
        mode: whether its least or greatest value is the best; by default a loss's least and an accuracy's greatest.
        of: whether the value of a trial's best checkpoint counts, or of its last epoch.
        pruner: gives a setting up in the epochs of its first seed, where it is worse than the median of the others
            (median), or not among the best of as many epochs (halving). What passes is trained whole.
        max_seconds: what a trial's training may take before the setting is given up; 0 is no limit.
        max_parameters: how many a network may have; 0 is no limit.
        keep: whether the checkpoints of settings that lost are kept, or only the best setting's.
        heartbeat: seconds between a worker's signs of life on other machines; after three without, its trial is taken
            up by another.

    Raises:
        ValueError: one of them is out of its range.
    """

    base: str | list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: int | list[int] = 5
    sampler: Literal["grid", "random", "tpe"] = "grid"
    samples: int = 0
    compare: str = "val/accuracy"
    mode: Literal["min", "max"] | None = None
    of: Literal["best", "last"] = "best"
    pruner: Literal["none", "median", "halving"] = "none"
    max_seconds: float = 0.0
    max_parameters: int = 0
    keep: Literal["all", "best"] = "all"
    heartbeat: float = 20.0

    def __post_init__(self) -> None:
        seeds = self.all_seeds
        if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
            raise ValueError(f"seeds must be a number from 1 or a list of different seeds, got {self.seeds}")
        if self.sampler == "grid" and self.samples:
            raise ValueError(f"samples is for random and tpe, a grid takes every combination; got {self.samples}")
        if self.sampler != "grid" and not 0 < self.samples <= MOST:
            raise ValueError(f"samples must be how many settings {self.sampler} draws, from 1, got {self.samples}")
        if self.compare.partition("/")[0] not in ("val", "train"):
            raise ValueError(
                f"compare must be a metric such as val/accuracy, val/loss or train/loss, got {self.compare}; the test"
                " set decides nothing (--test scores the chosen setting with it)"
            )
        if not (self.mode or self.compare.endswith(("loss", "accuracy"))):
            raise ValueError(f"mode must be min or max for {self.compare}")
        for name in ("max_seconds", "max_parameters"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be a number from 0, got {getattr(self, name)}")
        if not 0.1 <= self.heartbeat <= 86_400:
            raise ValueError(f"heartbeat must be seconds in 0.1..86400, got {self.heartbeat}")

    @property
    def all_seeds(self) -> list[int]:
        return list(range(1, self.seeds + 1)) if isinstance(self.seeds, int) else self.seeds

    @property
    def sign(self) -> int:
        """1 where the greatest value is the best, -1 where the least is."""
        return 1 if (self.mode or ("min" if self.compare.endswith("loss") else "max")) == "max" else -1

    @property
    def bases(self) -> list[str]:
        return [self.base] if isinstance(self.base, str) else self.base

    @property
    def fixed(self) -> dict[str, Any]:
        return {name: value for name, value in self.settings.items() if not isinstance(value, (list, dict))}

    @property
    def varied(self) -> list[str]:
        return [name for name in self.settings if name not in self.fixed]

    def flags(self, setting: Mapping[str, Any]) -> list[str]:
        """The flags of `fit` for a setting."""
        values = self.fixed | dict(setting)
        configs = [*self.bases, *([values.pop(CONFIG)] if CONFIG in values else [])]
        flags = [f"--{name}={as_flag(value)}" for name, value in values.items()]
        if self.compare.startswith("val/") and self.of == "best":
            flags += [f"--best.monitor={self.compare}", f"--best.mode={'max' if self.sign > 0 else 'min'}"]
        return [*(word for config in configs for word in ("--config", config)), *flags]

    def value_of(self, run: Path) -> float | None:
        """What a run that ended came to; None where it logged no such metric."""
        fit = section(read_results(run), "fit")
        best = section(fit, "best").get(self.compare) if self.of == "best" else None  # only of held-out images
        value = best if best is not None else section(fit, "metrics").get(self.compare)
        return value if isinstance(value, float) and math.isfinite(value) else None

    def checkpoint_of(self, run: Path) -> Path | None:
        """The checkpoint to test: the best one, or the last where that counts or nothing is held out."""
        kinds = ("best", "last") if self.of == "best" else ("last",)
        found = (next(iter(sorted(run.glob(f"checkpoints/{kind}-*.ckpt"))), None) for kind in kinds)
        return next(filter(None, found), None)

    def described(self) -> dict[str, Any]:
        """All that decides the result, recipes' content included, as it is kept beside the trials."""
        recipes = self.settings.get(CONFIG, [])
        files = [*self.bases, *(recipes if isinstance(recipes, list) else [recipes])]
        return asdict(self) | {"base": self.bases, "recipes": {name: content(name) for name in files}}


def content(recipe: str) -> str:
    try:
        return json.dumps(yaml.safe_load(Path(recipe).read_text()), default=str)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CommandError(f"base {shortened(recipe)}: that recipe cannot be read ({shortened(reason)})") from error


def as_flag(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def check_unchanged(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Check that a study in progress is still the one that was begun; seeds and samples may grow.

    Raises:
        CommandError: it is not.
    """
    for name, old in before.items():
        new = now.get(name)
        if old == new or name in ("keep", "heartbeat"):
            continue
        if name == "samples" and now["samples"] >= old:
            continue
        if name == "seeds" and seeds_of(now["seeds"])[: len(seeds_of(old))] == seeds_of(old):
            continue
        if name == "recipes":
            changed = [recipe for recipe in old if recipe in now["recipes"] and old[recipe] != now["recipes"][recipe]]
            if not changed:
                continue
            name, old, new = changed[0], "another recipe", "changed since"
        raise CommandError(
            f"{where}: {name} was {shortened(str(old), 120)} when this study began and is {shortened(str(new), 120)};"
            " put it back, or give another --name to begin a new study"
        )


def seeds_of(seeds: int | list[int]) -> list[int]:
    return Study(seeds=seeds).all_seeds


def read(args: list[str]) -> tuple[Study, Namespace, str]:
    """Parse a command line of `sweep`.

    Returns:
        The study, the other flags, and where it comes from for messages.

    Raises:
        CommandError: it cannot be used.
    """
    parser = Parser(
        prog="python -m lit_mnist sweep",
        description="Compare settings over seeds. A study file has the arguments of a study, flags go over it.",
    )
    add = parser.add_argument
    add("-c", "--config", action="config", metavar="STUDY.yaml", help="the study file")
    add("--name", help="of the study (that of the study file, and of a --base)")
    add("--workers", type=int, default=1, help="processes that train; 0 shows what there is (1)")
    add("--test", action="store_true", help="in the end score the chosen setting, and it alone, on the test set")
    add("--storage", help="of the trials, for several machines: a database's URL, or a file that all see")
    add("--output", help="folder of the tables and plots (the study's, under lightning_logs/sweeps)")
    add("--root_dir", default=".", help="the folder of lightning_logs (this one)")
    add("--data.root", default="data", help="the folder of the data (data)")
    add("--worker", type=int, help=SUPPRESS)
    parser.add_class_arguments(Study)
    config = parser.parse_args(args)
    files = [str(path) for path in config.pop("config") or []]
    where = f"--config {files[-1]}" if files else "sweep"
    if config.name is None:
        recipe = config.base if isinstance(config.base, str) else "-".join(Path(base).stem for base in config.base)
        given = any(arg.partition("=")[0] == "--base" for arg in args)
        config.name = "-".join([*(Path(file).stem for file in files), *([Path(recipe).stem] if given else [])])
    if not re.fullmatch(r"[\w.+-]{1,100}", config.name) or config.name.startswith("."):
        raise CommandError(f"--name must be letters, digits, '-', '_', '+' and '.', got {shortened(config.name)!r}")
    values = {name: config.pop(name) for name in Study.__dataclass_fields__}
    try:
        study = Study(**values)
    except ValueError as error:
        raise CommandError(f"{where}: {error}") from error
    return study, config, where


class Check(MNISTCLI):
    """Parses flags of `fit` and makes the model and the data of it, but no trainer and no run."""

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        self.trainer = self.trainer_class  # type: ignore[assignment]  # LightningCLI 2.6 looks for its method `fit`

    def after_instantiate_classes(self) -> None:
        pass

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {}

    def fit(self) -> None:  # type: ignore[override]
        pass

    def parsed(self, flags: list[str]) -> Any:
        """The settings of a `fit` with these flags, by dotted key."""
        return parse(self.parser, self.own_parser, ["fit", *flags]).own

    def made(self, flags: list[str]) -> Any:
        """Its model and data."""
        with refusals():
            config = parse(self.parser, self.own_parser, ["fit", *flags]).config
            return self.parser.instantiate_classes(config)["fit"]


def distributions(study: Study, where: str, places: list[str]) -> dict[str, BaseDistribution]:
    """The values that each setting may take, every one of them tried on the parser of `fit`.

    Args:
        places: flags that say where the data lies.

    Raises:
        CommandError: there is no such setting, or it does not take such a value.
    """
    check = Check(["fit"])

    def tried(flags: list[str], what: str) -> Any:
        try:
            check.made([*flags, *places])
            return check.parsed(flags)
        except CommandError as error:
            raise CommandError(f"{where}: {what}{error}") from error

    for name in study.settings:
        known = name == CONFIG or (name.partition(".")[0] in PARTS and name in check.own_parser.get_defaults())
        if not known or name in NOT_SWEPT:
            reason = NOT_SWEPT.get(name, "there is no such setting; `fit --help` lists all, such as model.lr")
            raise CommandError(f"{where}: settings.{shortened(name)}: {reason}")
    base = tried(study.flags({}), "")
    if study.compare.startswith("val/") and not base["data.val_size"] and "data.val_size" not in study.varied:
        raise CommandError(
            f"{where}: {study.compare} needs held-out images, and data.val_size is 0; or compare train/loss"
        )
    found = {}
    for name in study.varied:
        given, what = study.settings[name], f"settings.{name}: "
        try:
            found[name] = distribution(given, base.get(name), study.sampler == "grid")
        except ValueError as error:
            raise CommandError(f"{where}: {what}{' '.join(str(error).split())}") from error
        for value in given if isinstance(given, list) else (given["low"], given["high"]):
            tried(study.flags({name: value}), what)
    if study.sampler == "grid" and math.prod(len(values(one)) for one in found.values()) > MOST:
        raise CommandError(f"{where}: the grid has more than {MOST} combinations")
    return found


def distribution(given: Any, usual: Any, grid: bool) -> BaseDistribution:
    """Optuna's word for a list or a range of values.

    Args:
        usual: the setting's value without it, which tells what kind it takes.

    Raises:
        ValueError: it is neither, or the setting does not take such.
    """
    if isinstance(given, list):
        if not given or not all(type(value) in (int, float, str, bool, type(None)) for value in given):
            raise ValueError(f"a list must hold numbers, words, true, false or null, got {given}")
        if len(set(given)) < len(given):
            raise ValueError(f"a list must not hold a value twice, got {given}")
        return CategoricalDistribution(given)
    if not {"low", "high"} <= given.keys() <= {"low", "high", "step", "log"}:
        raise ValueError(f"a range has low, high, and log: true or a step, got {given}")
    if type(usual) not in (int, float):
        raise ValueError(f"a range is for a number, and this takes such as {usual!r}; give a list of values")
    numbers = [given[name] for name in ("low", "high", "step") if given.get(name) is not None]
    kinds = (int,) if type(usual) is int else (int, float)
    if not all(type(value) in kinds and math.isfinite(value) for value in numbers):
        raise ValueError(f"low, high and step must be {'whole ' * (kinds == (int,))}numbers, got {given}")
    if grid and not given.get("step"):
        raise ValueError("in a grid a range needs a step; or give a list of values, or sampler: random or tpe")
    if not given["low"] <= given["high"]:
        raise ValueError(f"low must not be above high, got {given}")
    if type(given.get("log", False)) is not bool:
        raise ValueError(f"log must be true or false, got {given['log']}")
    settings = {"log": given.get("log", False), "step": given.get("step")}
    if kinds == (int,):
        return IntDistribution(given["low"], given["high"], settings["log"], settings["step"] or 1)
    return FloatDistribution(float(given["low"]), float(given["high"]), settings["log"], settings["step"])


def values(one: BaseDistribution) -> list[Any]:
    """All that it may take, of a list or a range with a step."""
    if isinstance(one, CategoricalDistribution):
        return list(one.choices)
    assert isinstance(one, (IntDistribution, FloatDistribution))
    assert one.step
    count = int((one.high - one.low) / one.step + 1e-9) + 1
    # as many digits as a step is written with: 0.1 + 2 * 0.1 is to be 0.3
    return [type(one.low)(f"{one.low + number * one.step:.12g}") for number in range(count)]


def grid(found: Mapping[str, BaseDistribution]) -> list[dict[str, Any]]:
    """Every combination."""
    return [dict(zip(found, chosen, strict=True)) for chosen in itertools.product(*map(values, found.values()))]
