"""A study: which configurations are compared, with which seeds, and by which value; and its queue of trials.

A trial has as user attributes the number of its configuration (`sample`), a `reason` where it failed, and for each
seed, as `seed N`, its run and, once that has ended, what came of it. A retried trial inherits them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import optuna
from filelock import FileLock
from jsonargparse.typing import PositiveInt
from optuna.storages import RDBStorage
from optuna.storages import RetryFailedTrialCallback as Retry  # Optuna 4.6's name for it
from optuna.trial import FrozenTrial

from lit_mnist.cli.console import one_line
from lit_mnist.cli.settings import as_list
from lit_mnist.exact.console import UserError
from lit_mnist.exact.runs import replaced

# what the sweep sets for each run
ALIKE = {"trainer.devices": 1, "trainer.num_nodes": 1, "trainer.fast_dev_run": False}
ALIKE |= {"trainer.enable_checkpointing": True, "trainer.enable_progress_bar": False}
OWN = {"seed_everything", "data.seed", "data.root", "trainer.default_root_dir", "best.monitor", "best.mode", *ALIKE}


@dataclass(frozen=True)
class Study:
    """What is compared with what. A trial is one configuration, trained once with each seed.

    Args:
        base: recipe, a file or a list of them, as after `fit --config`; without one the default.
        settings: by dotted name a list of values, or for random and tpe a range `{low: 0.1, high: 0.8}` with
            `log: true` or a `step`; a plain value is the same in all trials. Values of `config` are recipe files.
        seeds: how many, from 1 on, or a list of them.
        sampler: every combination (grid), or what random or TPE, a Parzen estimator that prefers what was good, draw.
        samples: how many configurations random and tpe draw.
        compare: metric of held-out images, or of the training, that decides.
        mode: whether its least or greatest value is the best; by default a loss's least and an accuracy's greatest.
        of: whether the value of a run's best checkpoint counts, or of its last epoch.
        heartbeat: seconds between a worker's heartbeats; after three without, another worker resumes its trial.
    """

    base: str | list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: int | list[int] = 5
    sampler: Literal["grid", "random", "tpe"] = "grid"
    samples: int = 0
    compare: str = "val/accuracy"
    mode: Literal["min", "max"] | None = None
    of: Literal["best", "last"] = "best"
    heartbeat: PositiveInt = 20

    def __post_init__(self) -> None:
        if refused := OWN & self.settings.keys():
            raise UserError(f"settings.{min(refused)} is set by the sweep itself")
        if not self.all_seeds or len(set(self.all_seeds)) < len(self.all_seeds):
            raise UserError(f"seeds must be a number from 1 or a list of different seeds, got {self.seeds}")
        if self.samples < 0 or (self.sampler == "grid") != (self.samples == 0):
            raise UserError(f"samples must be from 1 for random and tpe, and 0 for grid, got {self.samples}")
        if self.sampler == "grid" and (ranges := [name for name in self.varied if isinstance(self.varied[name], dict)]):
            raise UserError(f"settings.{ranges[0]} must be a list; ranges are for the samplers random and tpe")
        if not self.compare.startswith(("val/", "train/")):  # the test set decides nothing
            raise UserError(f"compare must be a metric such as val/accuracy or train/loss, got {self.compare}")
        if not (self.mode or self.compare.endswith(("loss", "accuracy"))):
            raise UserError(f"mode must be min or max for {self.compare}")

    @property
    def all_seeds(self) -> list[int]:
        return list(range(1, self.seeds + 1)) if isinstance(self.seeds, int) else self.seeds

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        return "minimize" if (self.mode or ("min" if self.compare.endswith("loss") else "")) == "min" else "maximize"

    @property
    def varied(self) -> dict[str, Any]:
        def scalars(given: Any) -> Any:  # Optuna 4.6 to 5 cannot plot lists
            return [plain(one) if isinstance(one, list) else one for one in given] if isinstance(given, list) else given

        return {name: scalars(given) for name, given in self.settings.items() if isinstance(given, (list, dict))}

    def flags(self, params: Mapping[str, Any], folder: Path | None = None) -> list[str]:
        """Return the flags of `fit` for a configuration, with the folder's copies of the recipes if one is given."""
        given = self.settings | dict(params) | ALIKE
        values = {name: value for name, value in given.items() if name in params or name not in self.varied}
        recipes = [*as_list(self.base), *as_list(values.pop("config", None))]
        if self.compare.startswith("val/") and self.of == "best":
            values |= {"best.monitor": self.compare, "best.mode": self.direction[:3]}
        configs = [f"--config={copy_of(recipe, folder) if folder else recipe}" for recipe in recipes]
        return configs + [f"--{name}={plain(values[name])}" for name in values]

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """Return the parameters of a trial: those that it was queued with, or else drawn ones."""
        params: dict[str, Any] = {}
        for name, given in self.varied.items():
            try:
                if isinstance(given, list):
                    params[name] = trial.suggest_categorical(name, given)
                else:
                    whole = isinstance(given["low"], int) and isinstance(given["high"], int)
                    params[name] = (trial.suggest_int if whole else trial.suggest_float)(name, **given)
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"settings.{name} must be a list, or low and high, got {given} ({error})") from error
        return params

    def open(self, name: str, url: str | None, folder: Path) -> optuna.Study:
        """Open Optuna's study of this name in a database, or create it; copy the recipes into the study's folder.

        UserError if the database cannot be used, or its study is another one; seeds and samples may grow.
        """
        url = url or f"sqlite:///{folder / 'trials.db'}?timeout=30"  # seconds, while another worker writes
        beats = {"heartbeat_interval": self.heartbeat, "grace_period": 3 * self.heartbeat}
        try:
            with FileLock(folder / ".lock"):  # Optuna 4.9 and 5 fail where two processes create the tables at once
                storage = RDBStorage(url, {"pool_pre_ping": True}, **beats, failed_trial_callback=Retry())
        except Exception as error:  # SQLAlchemy's, a driver's, or an import's
            raise UserError(f"--storage: {one_line(error.__cause__ or error)}") from error
        study = optuna.create_study(storage=storage, study_name=name, direction=self.direction, load_if_exists=True)
        recipes = [*as_list(self.base), *as_list(self.settings.get("config", []))]
        now = asdict(self) | {"seeds": self.all_seeds, "recipes": {name: Path(name).read_text() for name in recipes}}
        before = study.user_attrs.get("study", now)
        grown = now["seeds"][: len(before["seeds"])] == before["seeds"] and now["samples"] >= before["samples"]
        changed = [name for name in now if now[name] != before[name]]
        if not grown or {*changed} - {"seeds", "samples", "heartbeat"}:
            raise UserError(f"{', '.join(changed)} changed since this study began: change it back or give a --name")
        study.set_user_attr("study", now)
        for recipe, text in now["recipes"].items():
            (copy := copy_of(recipe, folder)).parent.mkdir(parents=True, exist_ok=True)
            with replaced(copy) as partial:
                partial.write_text(text)
        return study

    def fill_queue(self, study: optuna.Study, again: bool = False) -> None:
        """Queue configurations that are new, were interrupted or have new seeds, and `again` those that failed."""
        trials = latest_trials(study)
        queue: list[dict[str, Any]] = [{}] * self.samples  # without parameters: drawn later
        if self.sampler == "grid":
            queue = [dict(zip(self.varied, one, strict=True)) for one in product(*self.varied.values())]
        for sample, params in enumerate(queue):
            if not (trial := trials.get(sample)):
                study.enqueue_trial(params, {"sample": sample}, skip_if_exists=self.sampler == "grid")
            elif trial.state.is_finished() and (not self.is_done(trial) or (again and trial.user_attrs["reason"])):
                Retry()(study, trial)

    def ended_runs(self, trial: FrozenTrial) -> dict[int, dict[str, Any]]:
        runs = {seed: trial.user_attrs.get(f"seed {seed}", {}) for seed in self.all_seeds}
        return {seed: run for seed, run in runs.items() if "value" in run}

    def is_done(self, trial: FrozenTrial) -> bool:
        trained = len(self.ended_runs(trial)) == len(self.all_seeds)
        return trial.state.is_finished() and bool(trained or trial.user_attrs.get("reason"))


def latest_trials(study: optuna.Study) -> dict[int, FrozenTrial]:
    """Return each configuration's newest trial by its number."""
    return {trial.user_attrs["sample"]: trial for trial in study.get_trials() if "sample" in trial.user_attrs}


def copy_of(recipe: str, folder: Path) -> Path:
    """Return the study's own copy of a recipe: somebody may edit theirs while it runs."""
    return Path(folder, "recipes", *Path(recipe).absolute().parts[1:])


def plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
