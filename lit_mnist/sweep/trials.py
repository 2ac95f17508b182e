"""Which trial of a study is next, and whose it is: on any number of workers each is run once.

A trial in Optuna's storage has as user attributes the number of its setting (`sample`), its `seed`, the `worker` and
`host` that have it, the `run` and its `id` once there is one, and in the end `seconds`, `parameters`, `epochs` and
`checkpoint`, or the `reason` why its setting was given up. Of the trials with the same setting and seed the first
counts that was not cut short, so two workers that queue the same one at the same moment do no harm: the later one is
dropped. A trial that was cut short has the state FAIL.
"""

from __future__ import annotations

import platform
import uuid
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from lit_mnist.exact.errors import UserError
from lit_mnist.exact.runs import held
from lit_mnist.sweep.storage import LOOK_SECONDS, opened
from lit_mnist.sweep.study import Study, check_unchanged, grid

DRAWN_BEFORE = "drawn before"
OPEN = (TrialState.WAITING, TrialState.RUNNING)
GONE = (ValueError, UpdateFinishedTrialError)  # what Optuna raises where another worker has ended a trial


class Drawn(BaseSampler):
    """Optuna's sampler, but what it draws is a function of the setting's number and of the trials that ended before.

    Its own generator would depend on how often this process was asked, and begin again in the next one.
    """

    def __init__(self, plan: Study) -> None:
        self.plan = plan

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        # `ask` makes a trial without a number where another worker has just emptied the queue; `_taken` drops it
        seed = zlib.crc32(f"{trial.user_attrs.get('sample')} {param_name}".encode())
        sampler: BaseSampler = RandomSampler(seed)
        if self.plan.sampler == "tpe":
            # ten settings at random first, as TPE has it with one trial each; those in training count as bad ones
            sampler = TPESampler(n_startup_trials=10 * len(self.plan.all_seeds), constant_liar=True, seed=seed)
        return sampler.sample_independent(study, trial, param_name, param_distribution)


class Trials:
    """Those of a study, as one process sees them.

    Args:
        described: all that decides its result, as in `Study.described`.
        name: of the study.
        space: what each setting may be.
        folder: the study's own, of this machine or of several.
        storage: where trials are kept, as in `opened`.
        where: the study file, for messages.

    Raises:
        UserError: the storage cannot be used, or the study in it is another one.
    """

    def __init__(
        self,
        plan: Study,
        described: dict[str, Any],
        name: str,
        space: dict[str, BaseDistribution],
        folder: Path,
        storage: str | None,
        where: str,
    ) -> None:
        self.plan, self.space, self.folder = plan, space, folder
        self.host, self.worker = platform.node(), uuid.uuid4().hex[:12]
        self.combinations = grid(space) if plan.sampler == "grid" else []
        self.study = optuna.create_study(
            study_name=name,
            storage=opened(storage, folder),
            sampler=Drawn(plan),
            # of at least five curves; those of the first seeds alone are reported
            pruner=optuna.pruners.MedianPruner(n_startup_trials=0, n_min_trials=5),
            direction="maximize" if plan.sign > 0 else "minimize",
            load_if_exists=True,
        )
        self.beats: dict[int, tuple[Any, float]] = {}  # a trial's latest sign of life, and when it was new here
        before = self.study.user_attrs.get("study")
        if before and before != described:
            try:
                check_unchanged(before, described, where)
            except UserError:
                self.fail_dead()
                if any(trial.state in (TrialState.COMPLETE, TrialState.RUNNING) for trial in self.trials()):
                    raise
                # no trial has come to its end: it is begun anew
                self.study.set_user_attr("begin", len(self.study.get_trials(deepcopy=False)))
        if before != described:
            self.study.set_user_attr("study", described)

    @property
    def settings(self) -> int:
        return len(self.combinations) or self.plan.samples

    def all(self) -> list[FrozenTrial]:
        """Every trial of this study that has a setting's number, also those that do not count."""
        begin, seeds = self.study.user_attrs.get("begin", 0), set(self.plan.all_seeds)
        every = self.study.get_trials(deepcopy=False)[begin:]
        return [trial for trial in every if "sample" in trial.user_attrs and trial.user_attrs["seed"] in seeds]

    def trials(self) -> list[FrozenTrial]:
        """All that count, by number."""
        found: dict[tuple[int, int], FrozenTrial] = {}
        ignored = set(self.study.user_attrs.get("ignored", ()))
        for trial in self.all():
            if not was_cut(trial) and trial.number not in ignored:
                found.setdefault(cell_of(trial), trial)
        return list(found.values())

    def retry(self) -> None:
        """Count no longer those that were given up."""
        given_up = {
            trial.number for trial in self.trials() if trial.user_attrs.get("reason", "") not in ("", DRAWN_BEFORE)
        }
        self.study.set_user_attr("ignored", sorted(given_up | set(self.study.user_attrs.get("ignored", ()))))

    def settled(self) -> bool:
        trials = self.trials()
        return not any(trial.state in OPEN for trial in trials) and self._next_cell(trials) is None

    def next(self) -> optuna.Trial | None:
        """A trial for this worker; None where all is done. Waits where others may leave some undone."""
        while True:
            self.fail_dead()
            trials = self.trials()
            if not any(trial.state == TrialState.WAITING for trial in trials):
                cell = self._next_cell(trials)
                if cell:
                    self._add(*cell)
                elif any(trial.state == TrialState.RUNNING for trial in trials):
                    sleep(LOOK_SECONDS)
                    continue
                else:
                    return None
            with suppress(*GONE):
                trial = self._taken()
                if trial:
                    return trial

    def _next_cell(self, trials: list[FrozenTrial]) -> tuple[int, int] | None:
        """The setting's number and the seed to try next."""
        seeds, first = self.plan.all_seeds, self.plan.all_seeds[0]
        done = {cell_of(trial): trial for trial in trials}
        out = {sample for (sample, _), trial in done.items() if "reason" in trial.user_attrs}
        order = [(sample, seed) for sample in range(self.settings) for seed in seeds]
        if self.combinations:  # the first seed of all of them comes first
            order = [(sample, seed) for seed in seeds for sample in range(self.settings)]
        for sample, seed in order:
            if (sample, seed) in done or sample in out:
                continue
            head = done.get((sample, first))
            if self.plan.pruner != "none" and seed != first and not (head and head.state == TrialState.COMPLETE):
                continue
            if self.combinations or seed == first or self._drawn(sample):
                return sample, seed
        return None

    def _drawn(self, sample: int) -> dict[str, Any] | None:
        """A setting's values; None for one that is still to be drawn."""
        if self.combinations:
            return self.combinations[sample]
        same = (trial.params for trial in self.all() if trial.user_attrs["sample"] == sample)
        return next((params for params in same if params.keys() == self.space.keys()), None)

    def _add(self, sample: int, seed: int) -> None:
        """Put a trial into the queue, with what is there of an earlier one that was cut short."""
        attributes = {"sample": sample, "seed": seed, "worker": self.worker, "host": self.host}
        setting, reported = self._drawn(sample), None
        for trial in self.all():
            if was_cut(trial) and cell_of(trial) == (sample, seed) and "run" in trial.user_attrs:
                attributes |= {name: trial.user_attrs[name] for name in ("run", "id")}
                reported = trial.intermediate_values
        self.study.add_trial(
            optuna.create_trial(
                state=TrialState.WAITING,
                params=setting or {},
                distributions=self.space if setting else {},
                user_attrs=attributes,
                intermediate_values=reported,
            )
        )

    def _taken(self) -> optuna.Trial | None:
        """The first trial in the queue, now this worker's, unless it does not count."""
        waiting = [trial for trial in self.trials() if trial.state == TrialState.WAITING]
        if not waiting:
            return None
        trial = self.study.ask(fixed_distributions=self.space)  # where the queue is empty by now, one without a number
        counting = next((one for one in self.trials() if one.number == trial.number), None)
        if not counting:
            self.study.tell(trial, state=TrialState.FAIL)
            return None
        for name, value in (("worker", self.worker), ("host", self.host)):
            if trial.user_attrs[name] != value:
                trial.set_user_attr(name, value)
        before = [one for one in self.trials() if one.user_attrs["sample"] < trial.user_attrs["sample"]]
        if not self.combinations and any(one.params == trial.params for one in before):
            trial.set_user_attr("reason", DRAWN_BEFORE)
            self.study.tell(trial, state=TrialState.FAIL)  # nothing that the sampler should learn from
            return None
        return trial

    def give_back(self, trial: optuna.Trial) -> None:
        """Let others go on with a trial at once, rather than after this worker's death."""
        with suppress(Exception):
            self.study.tell(trial, state=TrialState.FAIL)

    def end(self, trial: optuna.Trial, value: float | None = None, **attributes: Any) -> None:
        """End a trial with its value, or with the `reason` why it has none."""
        with suppress(*GONE):  # it was taken for dead: another worker does it again
            for name, given in attributes.items():
                trial.set_user_attr(name, given)
            # one that is pruned is among the worst to a sampler, which learns nothing from FAIL
            self.study.tell(trial, value, state=None if value is not None else TrialState.PRUNED)

    def fail_dead(self) -> None:
        """End the trials of workers that are gone, for another one to go on with."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self._is_dead(trial):
                given_up = trial.user_attrs.get("reason", DRAWN_BEFORE) != DRAWN_BEFORE
                with suppress(*GONE):  # another worker was quicker
                    self.study.tell(trial.number, state=TrialState.PRUNED if given_up else TrialState.FAIL)

    def _is_dead(self, trial: FrozenTrial) -> bool:
        worker, host = trial.user_attrs.get("worker"), trial.user_attrs.get("host")
        lock = self._lock(str(worker))
        if host == self.host and worker != self.worker and lock.exists():
            return not held(lock)  # the system lets go of it when a process ends
        beat = trial.user_attrs.get("beat")
        before, since = self.beats.get(trial.number, (None, 0.0))
        if not since or before != beat:
            self.beats[trial.number] = beat, monotonic()
            return False
        return monotonic() - since > 3 * self.plan.heartbeat + LOOK_SECONDS

    def _lock(self, worker: str) -> Path:
        return self.folder / "workers" / f"{worker}.lock"

    def alive(self) -> FileLock:
        """The lock that shows others on this machine that this worker lives; those of dead ones are removed."""
        self.fail_dead()
        for left in (self.folder / "workers").glob("*.lock"):
            if not held(left):
                left.unlink(missing_ok=True)
        return FileLock(self._lock(self.worker))


def cell_of(trial: FrozenTrial) -> tuple[int, int]:
    attributes: Mapping[str, Any] = trial.user_attrs
    return attributes["sample"], attributes["seed"]


def was_cut(trial: FrozenTrial) -> bool:
    """Whether a trial was cut short, so that it is to be done again."""
    return trial.state == TrialState.FAIL and "reason" not in trial.user_attrs
