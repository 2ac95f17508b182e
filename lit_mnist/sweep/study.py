"""A study: which settings are tried, with which seeds, and what decides between them."""

from __future__ import annotations

import itertools
import json
import math
import re
from argparse import SUPPRESS
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from decimal import Decimal
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

from lit_mnist.cli.cli import MNISTCLI
from lit_mnist.cli.settings import Parser, configs_of, parse
from lit_mnist.exact.console import shortened
from lit_mnist.exact.errors import UserError
from lit_mnist.exact.runs import read_results, replaced, section

CONFIG = "config"  # the setting whose values are recipe files
PARTS = ("model", "data", "trainer", "best", "checkpoint", "board")
# what each trial is given, or what no trial's result may depend on
NOT_SWEPT = {
    "seed_everything": "seeds are given by `seeds`",
    "data.seed": "seeds are given by `seeds`",
    "data.root": "it is given by the flag --data.root",
    "data.images": "it is for predict alone",
    "data.split": "it is for predict alone",
    "trainer.default_root_dir": "it is given by the flag --root_dir",
    "trainer.devices": "a trial is trained on one device",
    "trainer.num_nodes": "a trial is trained on one device",
    "trainer.fast_dev_run": "a trial is a whole run",
    "trainer.enable_checkpointing": "a trial that is stopped is resumed from its checkpoint",
    "best.monitor": "it is what `compare` says",
    "best.mode": "it is what `mode` says",
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
        pruner: gives a setting up in an epoch of its first seed, where it is worse than the median of at least five
            others in that epoch (median). What passes is trained whole.
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
    pruner: Literal["none", "median"] = "none"
    max_seconds: float = 0.0
    max_parameters: int = 0
    keep: Literal["all", "best"] = "all"
    heartbeat: float = 20.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) is None and name != "mode":
                raise ValueError(f"{name} must not be null")
        if not all(isinstance(name, str) for name in self.settings):
            raise ValueError(f"settings must be named, such as model.lr, got {shortened(str(self.settings))}")
        given = self.settings.get(CONFIG, [])
        if not all(isinstance(recipe, str) for recipe in (given if isinstance(given, list) else [given])):
            raise ValueError(f"settings.config must be a list of recipe files, got {given}")
        if len({Path(recipe).name for recipe in self.recipes}) < len(self.recipes):
            raise ValueError(f"base and settings.config must be recipe files of different names, got {self.recipes}")
        number = isinstance(self.seeds, int)
        if (number and not 1 <= self.seeds <= MOST) or (  # type: ignore[operator]
            not number and (not self.seeds or len(set(self.seeds)) < len(self.seeds))  # type: ignore[arg-type]
        ):
            raise ValueError(f"seeds must be a number in 1..{MOST} or a list of different seeds, got {self.seeds}")
        if not all(0 <= seed < 2**32 for seed in self.all_seeds):
            raise ValueError(f"seeds must be in 0..4294967295, got {self.seeds}")
        if self.sampler == "grid" and self.samples:
            raise ValueError(f"samples is for random and tpe, a grid takes every combination; got {self.samples}")
        if self.sampler != "grid" and not 0 < self.samples <= MOST:
            raise ValueError(f"samples must be how many settings {self.sampler} draws, from 1, got {self.samples}")
        if not re.fullmatch(r"(val|train)/.+", self.compare):
            raise ValueError(
                f"compare must be a metric such as val/accuracy, val/loss or train/loss, got {self.compare}; the test"
                " set decides nothing (--test scores the chosen setting with it)"
            )
        if self.pruner != "none" and not self.compare.startswith("val/"):
            raise ValueError(f"pruner needs a metric of held-out images to compare, got {self.compare}")
        if not (self.mode or self.compare.endswith(("loss", "accuracy"))):
            raise ValueError(f"mode must be min or max for {self.compare}")
        for name in ("max_seconds", "max_parameters"):
            if not 0 <= getattr(self, name) < math.inf:
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

    def flags(self, setting: Mapping[str, Any], folder: Path | None = None) -> list[str]:
        """The flags of `fit` for a setting.

        Args:
            folder: where `write_recipes` has put the recipes; None takes them from where they are.
        """
        values = self.fixed | dict(setting)
        configs = [*self.bases, *([values.pop(CONFIG)] if CONFIG in values else [])]
        if folder:
            configs = [str(folder / "recipes" / Path(config).name) for config in configs]
        flags = [f"--{name}={as_flag(value)}" for name, value in values.items()]
        if self.compare.startswith("val/") and self.of == "best":
            flags += [f"--best.monitor={self.compare}", f"--best.mode={'max' if self.sign > 0 else 'min'}"]
        return [*(word for config in configs for word in ("--config", config)), *flags]

    @property
    def recipes(self) -> list[str]:
        given = self.settings.get(CONFIG, [])
        return list(dict.fromkeys([*self.bases, *(given if isinstance(given, list) else [given])]))

    def write_recipes(self, folder: Path) -> None:
        """Keep the recipes in the study's folder: somebody may work on theirs while it goes on."""
        (folder / "recipes").mkdir(exist_ok=True)
        for recipe in self.recipes:
            with replaced(folder / "recipes" / Path(recipe).name) as partial:
                partial.write_bytes(Path(recipe).read_bytes())

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
        return asdict(self) | {"base": self.bases, "recipes": {name: content(name) for name in self.recipes}}


def content(recipe: str) -> str:
    try:
        return json.dumps(yaml.safe_load(Path(recipe).read_text()), default=str)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"base {shortened(recipe)}: that recipe cannot be read ({shortened(reason)})") from error


def as_flag(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def check_unchanged(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Check that a study in progress is still the one that was begun; seeds and samples may grow.

    Raises:
        UserError: it is not.
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
        raise UserError(
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
        UserError: it cannot be used.
    """
    parser = Parser(
        prog="python -m lit_mnist sweep",
        description="Compare settings over seeds. A study file has the arguments of a study, flags go over it.",
    )
    add = parser.add_argument
    add("-c", "--config", action="config", metavar="STUDY.yaml", help="the study file")
    add("--name", type=str, help="of the study (that of the study file, and of a --base)")
    add("--workers", type=int, default=1, help="processes that train; 0 shows what there is (1)")
    add("--test", action="store_true", help="in the end score the chosen setting, and it alone, on the test set")
    add("--storage", type=str, help="of the trials, for several machines: a database's URL, or a file that all see")
    add("--output", type=str, help="folder of the tables and plots (the study's, under lightning_logs/sweeps)")
    add("--retry", action="store_true", help="try again the settings that were given up")
    add("--root_dir", type=str, help="the folder of lightning_logs (the recipe's, or this one)")
    add("--data.root", type=str, help="the folder of the data (the recipe's)")
    add("--worker", type=int, help=SUPPRESS)  # the process that has started this worker
    parser.add_class_arguments(Study)
    files = configs_of(args)
    where = f"--config {' or '.join(files)}" if files else "sweep"
    try:
        config = parser.parse_args(args)
    except (UserError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error
    config.pop("config")
    try:
        study = Study(**{name: config.pop(name) for name in Study.__dataclass_fields__})
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if config.name is None:
        given = any(arg.partition("=")[0] == "--base" for arg in args)
        config.name = "-".join(Path(file).stem for file in [*files, *(study.bases if given else [])]) or "study"
    if not re.fullmatch(r"[\w+-][\w.+-]{0,99}", config.name):
        raise UserError(f"--name must be letters, digits, '-', '_', '+' and '.', got {shortened(config.name)!r}")
    return study, config, where


class Check(MNISTCLI):
    """Parses flags of `fit` and makes the model and the data of it, but no trainer and no run."""

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        self.config_init, self.model, self.datamodule = {"fit": {}}, None, None
        self.trainer = self.trainer_class  # type: ignore[assignment]  # LightningCLI 2.6 looks for its method `fit`

    def after_instantiate_classes(self) -> None:
        pass

    def fit(self, *args: Any, **kwargs: Any) -> None:
        pass

    def parsed(self, flags: list[str]) -> Any:
        """The settings of a `fit` with these flags, by dotted key."""
        return parse(self.parser, self.own_parser, ["fit", *flags]).own

    def made(self, flags: list[str]) -> Any:
        """Its model and data.

        Raises:
            UserError: the data is not there.
            ValueError: a setting cannot be used.
        """
        config = parse(self.parser, self.own_parser, ["fit", *flags]).config
        try:
            return self.parser.instantiate_classes(config)["fit"]
        except Exception as error:  # in jsonargparse's words where it comes from a link
            raise error.__cause__ if isinstance(error.__cause__, UserError) else error from None


def checked_base(check: Check, study: Study, where: str) -> Any:
    """The settings of the base recipe with what is the same in all trials, by dotted key.

    Raises:
        UserError: they cannot be used, or no study can be made of them.
    """
    for name in study.settings:
        known = name == CONFIG or (name.partition(".")[0] in PARTS and name in check.own_parser.get_defaults())
        if not known or name in NOT_SWEPT:
            reason = NOT_SWEPT.get(name, "there is no such setting; `fit --help` lists all, such as model.lr")
            raise UserError(f"{where}: settings.{shortened(name)}: {reason}")
    try:
        base = check.parsed(study.flags({}))
    except ValueError as error:
        raise UserError(f"{where}: {shortened(' '.join(str(error).split()), 300)}") from error
    for name, refused in (("trainer.fast_dev_run", True), ("trainer.enable_checkpointing", False)):
        if bool(base[name]) is refused and base[name] is not None:
            raise UserError(f"{where}: the recipe has {name}: {as_flag(base[name])}, but {NOT_SWEPT[name]}")
    if study.compare.startswith("val/") and not base["data.val_size"] and "data.val_size" not in study.varied:
        raise UserError(
            f"{where}: compare is {study.compare}, which needs held-out images, and data.val_size is 0; or compare"
            " train/loss"
        )
    return base


def distributions(check: Check, study: Study, base: Any, where: str, places: list[str]) -> dict[str, BaseDistribution]:
    """The values that each setting may take, every one of them tried on the parser of `fit`.

    Args:
        base: the settings of the base recipe.
        places: flags that say where the data lies.

    Raises:
        UserError: a setting does not take such a value.
    """

    def tried(setting: Mapping[str, Any], what: str) -> None:
        try:
            check.made([*study.flags(setting), *places])
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{where}: {what}{shortened(' '.join(str(error).split()), 300)}") from error

    tried({}, "")
    found = {}
    for name in study.varied:
        given, what = study.settings[name], f"settings.{name}: "
        try:
            found[name] = distribution(given, base.get(name), study.sampler == "grid")
        except (ValueError, OverflowError) as error:
            raise UserError(f"{where}: {what}{' '.join(str(error).split())}") from error
        for value in given if isinstance(given, list) else (given["low"], given["high"]):
            tried({name: value}, what)
    if study.sampler == "grid" and math.prod(map(count, found.values())) > MOST:
        raise UserError(f"{where}: the grid has more than {MOST} combinations")
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
    if given.get("step") is not None and not given["step"] > 0:
        raise ValueError(f"step must be above 0, got {given}")
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


def count(one: BaseDistribution) -> int:
    """How many values a list or a range with a step has."""
    if isinstance(one, CategoricalDistribution):
        return len(one.choices)
    assert isinstance(one, (IntDistribution, FloatDistribution))
    assert one.step
    return int((Decimal(str(one.high)) - Decimal(str(one.low))) / Decimal(str(one.step))) + 1


def values(one: BaseDistribution) -> list[Any]:
    if isinstance(one, CategoricalDistribution):
        return list(one.choices)
    assert isinstance(one, (IntDistribution, FloatDistribution))
    # decimal: 0.1 + 2 * 0.1 is to be 0.3
    low, step = Decimal(str(one.low)), Decimal(str(one.step))
    return [type(one.low)(low + number * step) for number in range(count(one))]


def grid(found: Mapping[str, BaseDistribution]) -> list[dict[str, Any]]:
    """Every combination."""
    return [dict(zip(found, chosen, strict=True)) for chosen in itertools.product(*map(values, found.values()))]
