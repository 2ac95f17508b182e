"""sweep: train settings with several seeds, on one or many workers, and say which is the best and whether it is."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from functools import cached_property
from pathlib import Path
from time import monotonic, sleep
from types import FrameType
from typing import Any, NoReturn

import optuna
import torch
from filelock import FileLock
from jsonargparse import Namespace
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
from pytorch_lightning import Callback, LightningModule, Trainer

from lit_mnist.commands import comparison
from lit_mnist.commands.cli import MNISTCLI
from lit_mnist.commands.comparison import Display, Setting
from lit_mnist.commands.settings import CommandError
from lit_mnist.commands.storage import LOOK_SECONDS, Pulse, held, opened
from lit_mnist.commands.study import Check, Study, check_unchanged, distributions, grid, read
from lit_mnist.training.checkpoints import Interrupted, callback_of
from lit_mnist.training.console import complain, number, shortened, shown
from lit_mnist.training.processes import launched
from lit_mnist.training.progress import Diverged, Progress, TrainingError
from lit_mnist.training.runs import newest, own_checkpoints, read_results, replaced, section, text

STUDY_ATTRIBUTE = "study"
SAMPLERS: dict[str, Callable[[int, int], optuna.samplers.BaseSampler]] = {
    "grid": lambda seed, seeds: optuna.samplers.RandomSampler(seed),  # never asked
    "random": lambda seed, seeds: optuna.samplers.RandomSampler(seed),
    # ten settings at random first, as TPE has it with one trial each; settings in training count as bad ones
    "tpe": lambda seed, seeds: optuna.samplers.TPESampler(n_startup_trials=10 * seeds, constant_liar=True, seed=seed),
}
PRUNERS: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    "median": optuna.pruners.MedianPruner,
    "halving": optuna.pruners.SuccessiveHalvingPruner,
}


class GivenUp(Interrupted):
    """A trial was stopped because its setting is not worth going on with; its run could be resumed like any other."""

    def __init__(self, reason: str) -> None:
        super().__init__(0, None)
        self.reason = reason


class Watch(Callback):
    """Reports each epoch's value to the pruner, and ends what is pruned or takes too long."""

    def __init__(self, plan: Study, trial: optuna.Trial, clock: Progress | None) -> None:
        self.plan = plan
        self.trial = trial
        self.clock = clock
        self.reports = plan.pruner != "none" and trial.user_attrs["seed"] == plan.all_seeds[0]

    def on_train_batch_end(self, *args: Any) -> None:
        limit = self.plan.max_seconds
        if limit and self.clock and self.clock.state_dict()["train_seconds"] > limit:
            raise GivenUp(f"took more than {limit:g} s")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = trainer.callback_metrics.get(self.plan.compare)
        if not self.reports or trainer.sanity_checking or not trainer.is_last_batch or value is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a resumed trial reports an epoch again, with the same value
            self.trial.report(float(value), trainer.current_epoch)
        if self.trial.should_prune():
            raise GivenUp(
                f"pruned in epoch {trainer.current_epoch} at {comparison.shown_value(self.plan, float(value))}"
            )


class TrialCLI(MNISTCLI):
    """A fit or a test of one trial.

    Args:
        prepare: called with the command as soon as its run has a folder.
    """

    def __init__(self, args: list[str], prepare: Callable[[TrialCLI], None] | None = None) -> None:
        self.prepare = prepare
        super().__init__(args)

    def after_instantiate_classes(self) -> None:
        super().after_instantiate_classes()
        if self.prepare:
            self.prepare(self)


class Sweep:
    """A study in progress, as one process sees it.

    Args:
        plan: what is tried.
        options: the command's flags.
        where: the study file, for messages.
    """

    def __init__(self, plan: Study, options: Namespace, where: str) -> None:
        self.plan, self.options, self.where = plan, options, where
        self.root = Path(options.root_dir)
        self.runs = self.root / "lightning_logs"
        self.folder = self.runs / "sweeps" / options.name
        self.host, self.worker = platform.node(), uuid.uuid4().hex[:12]
        described = plan.described()
        self.space = distributions(plan, where, self.places)
        self.combinations = grid(self.space) if plan.sampler == "grid" else []
        try:
            (self.folder / "workers").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(f"--root_dir {shortened(str(self.root))}: {error.strerror}") from error
        self.study = optuna.create_study(
            study_name=options.name,
            storage=opened(options.storage, self.folder),
            direction="maximize" if plan.sign > 0 else "minimize",
            pruner=PRUNERS[plan.pruner](),
            load_if_exists=True,
        )
        before = self.study.user_attrs.get(STUDY_ATTRIBUTE)
        if before:
            check_unchanged(before, described, where)
        if before != described:
            self.study.set_user_attr(STUDY_ATTRIBUTE, described)
        self.beats: dict[int, tuple[Any, float]] = {}  # a trial's latest sign of life, and when it was new here
        self.pulse: Pulse | None = None

    @property
    def settings(self) -> int:
        return len(self.combinations) or self.plan.samples

    def trials(self) -> list[FrozenTrial]:
        """All that count, by number: of each setting and seed the first that was not cut short."""
        found: dict[tuple[int, int], FrozenTrial] = {}
        for trial in self.study.get_trials(deepcopy=False):
            counts = trial.state != TrialState.FAIL or "reason" in trial.user_attrs
            if counts and "sample" in trial.user_attrs:
                found.setdefault((trial.user_attrs["sample"], trial.user_attrs["seed"]), trial)
        return list(found.values())

    def next_trial(self) -> optuna.Trial | None:
        """A trial for this worker; None where all is done. Waits where others may leave some undone."""
        while True:
            self._fail_dead()
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
            trial = self._taken()
            if trial:
                return trial

    def _next_cell(self, trials: list[FrozenTrial]) -> tuple[int, int, dict[str, Any] | None] | None:
        """The setting and seed to try next, and the setting's values; None for those still to be drawn."""
        seeds, first = self.plan.all_seeds, self.plan.all_seeds[0]
        done = {(trial.user_attrs["sample"], trial.user_attrs["seed"]): trial for trial in trials}
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
            if self.combinations:
                return sample, seed, self.combinations[sample]
            if seed == first:
                return sample, seed, None
            if head and head.params.keys() == self.space.keys():
                return sample, seed, head.params
        return None

    def _add(self, sample: int, seed: int, setting: dict[str, Any] | None) -> None:
        """Put a trial into the queue, with what is there of an earlier one that was cut short."""
        cut = [
            trial
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
            if (trial.user_attrs.get("sample"), trial.user_attrs.get("seed")) == (sample, seed)
            and "run" in trial.user_attrs
        ]
        attributes = {"sample": sample, "seed": seed, "worker": self.worker, "host": self.host}
        if cut:
            attributes |= {name: cut[-1].user_attrs[name] for name in ("run", "id")}
            setting = setting or cut[-1].params
        self.study.add_trial(
            optuna.create_trial(
                state=TrialState.WAITING,
                params=setting or {},
                distributions=self.space if setting else {},
                user_attrs=attributes,
                intermediate_values=cut[-1].intermediate_values if cut else None,
            )
        )
        # what is drawn is a function of what was tried before and of the setting's number
        self.study.sampler = SAMPLERS[self.plan.sampler](sample, len(self.plan.all_seeds))

    def _taken(self) -> optuna.Trial | None:
        """The first trial in the queue, now this worker's, unless another has the same."""
        trial = self.study.ask(fixed_distributions=self.space)
        mine = {name: trial.user_attrs.get(name) for name in ("sample", "seed")}
        rivals = [other for other in self.trials() if {name: other.user_attrs[name] for name in mine} == mine]
        if None in mine.values() or any(other.number < trial.number for other in rivals):
            self.study.tell(trial, state=TrialState.FAIL)
            return None
        for name, value in (("worker", self.worker), ("host", self.host)):
            if trial.user_attrs[name] != value:
                trial.set_user_attr(name, value)
        twin = [other for other in self.trials() if other.user_attrs["sample"] < mine["sample"]]
        if not self.combinations and any(other.params == trial.params for other in twin):
            trial.set_user_attr("reason", "drawn before")
            self.study.tell(trial, state=TrialState.FAIL)  # nothing that the sampler should learn from
            return None
        return trial

    def _fail_dead(self) -> None:
        """End the trials of workers that are gone, for another one to go on with."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self._is_dead(trial):
                with suppress(ValueError, UpdateFinishedTrialError):  # another worker was quicker
                    self.study.tell(trial.number, state=TrialState.FAIL)

    def _is_dead(self, trial: FrozenTrial) -> bool:
        worker, host = trial.user_attrs.get("worker"), trial.user_attrs.get("host")
        lock = self.folder / "workers" / f"{worker}.lock"
        if host == self.host and worker != self.worker and lock.exists():
            return not held(lock)  # the system lets go of it when a process ends
        beat = trial.user_attrs.get("beat")
        before, since = self.beats.get(trial.number, (None, 0.0))
        if not since or before != beat:
            self.beats[trial.number] = beat, monotonic()
            return False
        return monotonic() - since > 3 * self.plan.heartbeat + LOOK_SECONDS

    def work(self, display: Display | None = None) -> None:
        """Train trials until there are none left."""
        self._fail_dead()
        for left in (self.folder / "workers").glob("*.lock"):
            if not held(left):
                left.unlink(missing_ok=True)
        path = self.folder / "workers" / f"{self.worker}.lock"
        with FileLock(path):
            self._work(display)
        path.unlink(missing_ok=True)

    def _work(self, display: Display | None) -> None:
        self.pulse = Pulse(self.plan.heartbeat, os.getppid() if self.options.worker is not None else None)
        self.pulse.start()
        if display:
            display.update(self.trials())
        while (trial := self.next_trial()) is not None:
            self.pulse.trial = trial
            try:
                if display:
                    with redirect_stdout(display.log):
                        self.train(trial)
                    display.update(self.trials())
                else:
                    self.train(trial)
            finally:
                self.pulse.trial = None
            if self.plan.keep == "best":
                self.drop_losers()

    def train(self, trial: optuna.Trial) -> None:
        """Train a trial to its end, from where an earlier worker left it if that is here."""
        setting, seed = trial.params, trial.user_attrs["seed"]
        flags = self.plan.flags(setting)
        print(f"\nTrial {trial.number}: {comparison.named(setting)}, seed {seed}", flush=True)
        if reason := self._refused(flags):
            self._end(trial, reason=reason)
            return
        run = self.run_of(trial.user_attrs)
        if run is None or text(section(read_results(run), "fit"), "state") != "finished":
            last = newest(run) if run else None
            flags = ["--ckpt_path", str(last)] if last else [*flags, "--seed_everything", str(seed)]
            for name in ("enable_model_summary", "enable_progress_bar"):
                flags += [f"--trainer.{name}", "false"]
            try:
                TrialCLI(["fit", *flags, *self.places], lambda cli: self._begin(cli, trial))
            except GivenUp as stop:
                self._end(trial, reason=stop.reason)
                return
            except Diverged as error:
                self._end(trial, reason=shortened(str(error).partition(";")[0], 100))
                return
            except torch.OutOfMemoryError:
                self._end(trial, reason="the device has too little memory for it")
                return
            except BaseException:
                with suppress(Exception):
                    self.study.tell(trial, state=TrialState.FAIL)  # so that others need not wait for its death
                raise
            run = self.runs / trial.user_attrs["run"]
        value = self.plan.value_of(run)
        if value is None:
            raise CommandError(f"{self.where}: compare is {self.plan.compare}, which {shown(run)} did not log")
        self._end(trial, value, run)

    @property
    def places(self) -> list[str]:
        return ["--data.root", self.options["data.root"], "--trainer.default_root_dir", str(self.root)]

    @cached_property
    def check(self) -> Check:
        return Check(["fit"])

    def _refused(self, flags: list[str]) -> str:
        """Why a setting cannot be trained, which may lie in a combination of values."""
        try:
            network = self.check.made([*flags, *self.places])["model"]
        except CommandError as error:
            return shortened(str(error), 100)
        parameters, most = sum(p.numel() for p in network.parameters()), self.plan.max_parameters
        return f"{parameters:,} parameters are more than {most:,}" if 0 < most < parameters else ""

    def _begin(self, cli: TrialCLI, trial: optuna.Trial) -> None:
        folder, callbacks = cli.run.folder, cli.trainer.callbacks  # type: ignore[attr-defined]
        assert folder
        if cli.trainer.world_size > 1:
            raise CommandError(f"{self.where}: a trial is trained on one device, and the recipe asks for more")
        callbacks.insert(0, Watch(self.plan, trial, callback_of(cli.trainer, Progress)))  # before checkpoints are saved
        if cli.run.continues and folder.name == trial.user_attrs.get("run"):
            return
        mark = {"study": self.options.name, "seed": trial.user_attrs["seed"], "id": uuid.uuid4().hex}
        with replaced(folder / "trial.json") as partial:
            partial.write_text(json.dumps(mark | {"settings": trial.params}, indent=2) + "\n")
        trial.set_user_attr("id", mark["id"])
        trial.set_user_attr("run", folder.name)

    def _end(self, trial: optuna.Trial, value: float | None = None, run: Path | None = None, reason: str = "") -> None:
        if run:
            fit = section(read_results(run), "fit")
            trial.set_user_attr("seconds", fit["train_seconds"])
            trial.set_user_attr("parameters", fit["parameters"])
            trial.set_user_attr("epochs", fit["epochs"])
        if reason:
            trial.set_user_attr("reason", reason)
        # one without a value is among the worst to a sampler, which learns nothing from FAIL
        with suppress(ValueError, UpdateFinishedTrialError):  # it was taken for dead: another worker does it again
            self.study.tell(trial, value, state=None if value is not None else TrialState.PRUNED)

    def run_of(self, attributes: Mapping[str, Any]) -> Path | None:
        """The folder of a trial's run, where it lies on this machine."""
        run = self.runs / str(attributes.get("run"))
        with suppress(OSError, ValueError):
            mark = json.loads((run / "trial.json").read_text())
            return run if mark["id"] == attributes.get("id") else None
        return None

    def table(self) -> list[Setting]:
        tested = {key: value for key, value in self.study.user_attrs.items() if key.startswith("test ")}
        return comparison.table(self.plan, self.trials(), tested)

    def settled(self) -> bool:
        trials = self.trials()
        going = any(trial.state in (TrialState.WAITING, TrialState.RUNNING) for trial in trials)
        return not going and self._next_cell(trials) is None

    def drop_losers(self) -> None:
        """Delete the checkpoints of settings that were tried with every seed and are not the best, or were given up."""
        table = self.table()
        whole = [setting for setting in table if setting.n == len(self.plan.all_seeds)]
        for setting in table:
            if setting.reason or (setting in whole and setting is not whole[0]):
                for run in filter(None, map(self.run_of, setting.runs)):
                    for path in (*own_checkpoints(run, "best"), *own_checkpoints(run, "last")):
                        path.unlink(missing_ok=True)

    def test(self) -> list[str]:
        """Score the best setting's runs on the test set, and return what could not be."""
        best, missing = next(iter(self.table()), None), []
        if best is None or best.reason:
            return ["no setting came to an end"]
        for seed, attributes in zip(best.values, best.runs, strict=True):
            key = f"test {best.sample} {seed}"
            if key in self.study.user_attrs:
                continue
            run = self.run_of(attributes)
            checkpoint = self.plan.checkpoint_of(run) if run else None
            if not (run and checkpoint):
                where = "has no checkpoint any more" if run else f"lies on {attributes['host']}: test it there"
                missing.append(f"{attributes['run']} (seed {seed}) {where}")
                continue
            TrialCLI(["test", "--ckpt_path", str(checkpoint), "--trainer.enable_progress_bar", "false", *self.places])
            test = section(read_results(run), "test")
            self.study.set_user_attr(key, {name: value for name, value in test.items() if name.startswith("test/")})
        return missing


@contextmanager
def signals() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end this process by an exception, also between two trainings."""

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        for other in before:
            signal.signal(other, signal.SIG_IGN)  # it is on its way
        raise Interrupted(signum, None)

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    for signum in before:
        signal.signal(signum, stop)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def share(worker: int, workers: int) -> dict[str, str]:
    """The environment of one of several workers on this machine: its share of the processor cores and of the GPUs."""
    environment = dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))
    devices = environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    if devices != [""]:
        environment["CUDA_VISIBLE_DEVICES"] = devices[worker % len(devices)]
    return environment


def run_workers(sweep: Sweep, args: list[str], display: Display) -> None:
    """Start the workers, show what they come to, and wait for them.

    Raises:
        TrainingError: all have ended before the study has.
    """
    count, processes, logs = sweep.options.workers, [], []
    for worker in range(count):
        logs.append(sweep.folder / f"worker-{worker}.log")
        with logs[-1].open("w") as log:
            command = [sys.executable, "-m", "lit_mnist", "sweep", *args, f"--worker={worker}"]
            environment = share(worker, count)
            # in a session of its own: Ctrl-C comes to this process alone, which tells them once
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            processes.append(process)
    lost: set[int] = set()
    going = True
    try:
        while going:
            sleep(0.3)
            going = any(process.poll() is None for process in processes)
            display.update(sweep.trials())
            for worker, process in enumerate(processes):
                if process.returncode and worker not in lost:
                    lost.add(worker)
                    display.say(f"worker {worker} {ended(process.returncode, logs[worker])}")
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            process.wait()
        display.update(sweep.trials())


def ended(status: int, log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    return f"{how}{f': {shortened(lines[-1], 300)}' if status > 0 and lines else ''}; its trial is open again"


def sweep(args: list[str]) -> None:
    """Run the command with the flags that follow its name.

    Raises:
        CommandError: the input cannot be used.
        TrainingError: the study cannot go on.
        SystemExit: from `--help`, and where a signal stopped it.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", module="optuna")
        try:
            with signals():
                run(args)
        except Interrupted as stop:
            name = signal.Signals(stop.signum).name
            raise SystemExit(complain(f"stopped by {name}; the same line goes on with it", 128 + stop.signum)) from stop
        except StorageInternalError as error:
            reason = shortened(" ".join(str(error.__cause__ or error).split()), 200)
            raise TrainingError(
                f"the trials' storage failed: {reason}; what is trained is kept, start it again"
            ) from error


def run(args: list[str]) -> None:
    plan, options, where = read(args)
    if not 0 <= options.workers <= 1000:
        raise CommandError(f"--workers must be a number in 0..1000, got {options.workers}")
    if launched() != (1, 1) or number("WORLD_SIZE", "SLURM_NTASKS") > 1:
        raise CommandError("sweep starts its own workers (--workers); start it without torchrun and srun")
    going = Sweep(plan, options, where)
    if options.worker is not None:
        going.work()
        return
    with Display(plan, going.settings * len(plan.all_seeds), going.folder / "worker-0.log") as display:
        if options.workers == 1:
            going.work(display)
        elif options.workers:
            run_workers(going, args, display)
        settled = going.settled()
        if options.workers and not settled:
            raise TrainingError("the study has not come to its end, and no worker is left; start it again to go on")
        missing: list[str] = []
        if options.test and settled:
            with redirect_stdout(display.log):
                missing = going.test()
    comparison.report(plan, going.table(), options.name, Path(options.output or going.folder), settled)
    if missing:
        raise TrainingError(f"--test could not score all: {'; '.join(missing)}")
