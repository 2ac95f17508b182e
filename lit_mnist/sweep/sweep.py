"""sweep: train settings with several seeds, on one or many workers, and say which is the best and whether it is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from time import sleep
from types import FrameType
from typing import Any, NoReturn

import optuna
import torch
from jsonargparse import Namespace
from lightning_fabric.utilities.exceptions import MisconfigurationException
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from pytorch_lightning import Callback, LightningModule, Trainer

from lit_mnist.cli.cli import MNISTCLI
from lit_mnist.cli.console import complain
from lit_mnist.cli.runs import read_settings
from lit_mnist.exact.checkpoints import callback_of
from lit_mnist.exact.console import number, shortened
from lit_mnist.exact.ddp import launched
from lit_mnist.exact.errors import Interrupted, TrainingFailed, UserError
from lit_mnist.exact.progress import Progress
from lit_mnist.exact.runs import being_trained, expanded, newest, own_checkpoints, read_results, replaced, section, text
from lit_mnist.sweep import comparison
from lit_mnist.sweep.comparison import Display, Setting, ranked
from lit_mnist.sweep.storage import LOOK_SECONDS, Pulse
from lit_mnist.sweep.study import Check, Study, checked_base, distributions, read
from lit_mnist.sweep.trials import Trials


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
    """A study, and what this process does for it.

    Args:
        plan: what is tried.
        options: the command's flags.
        where: the study file, for messages.
    """

    def __init__(self, plan: Study, options: Namespace, where: str) -> None:
        self.plan, self.options, self.where = plan, options, where
        self.described, self.check = plan.described(), Check(["fit"])
        base = checked_base(self.check, plan, where)
        self.root = expanded(options.root_dir or base["trainer.default_root_dir"] or ".", "--root_dir")
        data = expanded(options["data.root"] or base["data.root"], "--data.root")
        self.places = ["--data.root", str(data), "--trainer.default_root_dir", str(self.root)]
        space = distributions(self.check, plan, base, where, self.places)
        self.runs = self.root / "lightning_logs"
        self.folder = self.runs / "sweeps" / options.name
        self.output = expanded(options.output, "--output") if options.output else self.folder
        for folder, flag in ((self.folder / "workers", "--root_dir"), (self.output, "--output")):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{flag} {shortened(str(folder))}: {error.strerror}") from error
        self.trials = Trials(plan, self.described, options.name, space, self.folder, options.storage, where)
        plan.write_recipes(self.folder)

    def work(self, display: Display | None = None) -> None:
        """Train trials until there are none left."""
        with self.trials.alive() as lock, Pulse(self.plan.heartbeat, self.options.worker) as pulse:
            if display:
                display.update(self.trials.trials())
            while (trial := self.trials.next()) is not None:
                pulse.trial = trial
                try:
                    with redirect_stdout(display.log) if display else nullcontext():
                        self.train(trial)
                except UpdateFinishedTrialError:
                    print("Another worker has taken this one for dead, and the trial up.", file=sys.stderr)
                except BaseException:
                    self.trials.give_back(trial)
                    raise
                finally:
                    pulse.trial = None
                if display:
                    display.update(self.trials.trials())
                self.drop_losers()
        Path(lock.lock_file).unlink(missing_ok=True)

    def train(self, trial: optuna.Trial) -> None:
        """Train a trial to its end, from where an earlier worker left it if that is here."""
        seed = trial.user_attrs["seed"]
        flags = [*self.plan.flags(trial.params, self.folder), "--seed_everything", str(seed)]
        print(f"\nTrial {trial.number}: {comparison.named(trial.params)}, seed {seed}", flush=True)
        if reason := self._refused(flags):
            self.trials.end(trial, reason=reason)
            return
        run = self.run_of(trial.user_attrs)
        while run and being_trained(run):
            sleep(LOOK_SECONDS)  # by a worker that was taken for dead, or by the user
        if run and not self._as_meant(run, flags):
            run = None
        if run is None or not ended_whole(run):
            last = newest(run) if run else None
            for name in ("enable_model_summary", "enable_progress_bar"):
                flags += [f"--trainer.{name}", "false"]
            resumed = ["--ckpt_path", str(last)] if last else []
            try:
                TrialCLI(["fit", *flags, *self.places, *resumed], lambda cli: self._begin(cli, trial))
            except GivenUp as stop:
                self.trials.end(trial, reason=stop.reason)
                return
            except TrainingFailed as error:
                self.trials.end(trial, reason=shortened(str(error).partition(";")[0], 100))
                return
            except torch.OutOfMemoryError:
                self.trials.end(trial, reason="the device has too little memory for it")
                return
            except (ValueError, MisconfigurationException) as error:  # what only a Trainer refuses
                if any(isinstance(one, (OSError, UserError, UserError)) for one in (error, error.__cause__)):
                    raise
                self.trials.end(trial, reason=shortened(" ".join(str(error).split()), 200))
                return
            run = self.runs / trial.user_attrs["run"]
        fit, value = section(read_results(run), "fit"), self.plan.value_of(run)
        checkpoint = self.plan.checkpoint_of(run)
        if value is None:
            logged = ", ".join(section(fit, "metrics")) or "nothing"
            reason = f"it did not log {self.plan.compare}, but {shortened(logged, 100)}"
            self.trials.end(trial, reason=reason)
            return
        told = {name: fit[name] for name in ("parameters", "epochs")}
        told |= {"seconds": fit["train_seconds"], "checkpoint": checkpoint.name if checkpoint else None}
        told |= {name: fit[name] for name in ("hardware", "commit")}  # a study may be of several machines
        self.trials.end(trial, value, **told)

    def _refused(self, flags: list[str]) -> str:
        """Why a setting cannot be trained, which may lie in a combination of values.

        Raises:
            UserError: that is not the setting's fault.
        """
        try:
            network = self.check.made([*flags, *self.places])["model"]
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            return shortened(" ".join(str(error).split()), 200)
        parameters, most = sum(p.numel() for p in network.parameters()), self.plan.max_parameters
        return f"{parameters:,} parameters are more than {most:,}" if 0 < most < parameters else ""

    def _as_meant(self, run: Path, flags: list[str]) -> bool:
        """Whether a run has the settings of its trial still; its user may have trained it on with others."""
        now, meant = read_settings(section(read_results(run), "fit")), self.check.parsed(flags)
        places = ("data.download", "model.classes")  # the machine's, and the data's
        return all(meant[name] == value for name, value in now.items() if name in meant and name not in places)

    def _begin(self, cli: TrialCLI, trial: optuna.Trial) -> None:
        folder, callbacks = cli.run.folder, cli.trainer.callbacks  # type: ignore[attr-defined]
        assert folder
        if cli.trainer.world_size > 1:
            raise UserError(f"{self.where}: a trial is trained on one device, and the recipe asks for more")
        callbacks.insert(0, Watch(self.plan, trial, callback_of(cli.trainer, Progress)))  # before checkpoints are saved
        if cli.run.continues and folder.name == trial.user_attrs.get("run"):
            return
        mark = {"study": self.options.name, "seed": trial.user_attrs["seed"], "id": uuid.uuid4().hex}
        with replaced(folder / "trial.json") as partial:
            partial.write_text(json.dumps(mark | {"settings": trial.params}, indent=2) + "\n")
        trial.set_user_attr("id", mark["id"])
        trial.set_user_attr("run", folder.name)

    def run_of(self, attributes: Mapping[str, Any]) -> Path | None:
        """The folder of a trial's run, where it lies on this machine."""
        run = self.runs / str(attributes.get("run"))
        with suppress(OSError, ValueError, KeyError, TypeError):
            mark = json.loads((run / "trial.json").read_text())
            return run if mark["id"] == attributes.get("id") else None
        return None

    def table(self) -> list[Setting]:
        tested = {key: value for key, value in self.trials.study.user_attrs.items() if key.startswith("test ")}
        return comparison.table(self.plan, self.trials.trials(), tested)

    def drop_losers(self) -> None:
        """With `keep: best` delete the checkpoints of settings that were given up, or have lost with every seed."""
        if self.plan.keep != "best":
            return
        table = self.table()
        whole = [setting for setting in table if setting.n == len(self.plan.all_seeds) and not setting.reason]
        for setting in table:
            if setting.reason or setting in whole[1:]:
                for run in filter(None, map(self.run_of, setting.runs.values())):
                    for path in (*own_checkpoints(run, "best"), *own_checkpoints(run, "last")):
                        path.unlink(missing_ok=True)

    def test(self) -> list[str]:
        """Score the best setting's runs on the test set, and return what could not be."""
        missing, best = [], self.table()[0]
        for seed in best.values:
            key, attributes = f"test {best.sample} {seed}", best.runs[seed]
            if key in self.trials.study.user_attrs:
                continue
            run, name = self.run_of(attributes), attributes["checkpoint"]
            if not run:
                here = attributes["host"] == self.trials.host
                why = "is not there any more" if here else f"lies on {attributes['host']}: test it there"
            elif not name or not (run / "checkpoints" / name).is_file():
                why = f"has no {name or 'checkpoint'} any more"
            else:
                flags = [*self.places, "--trainer.enable_progress_bar", "false"]
                TrialCLI(["test", *flags, "--ckpt_path", str(run / "checkpoints" / name)])
                test = section(read_results(run), "test")
                scores = {name: value for name, value in test.items() if name.startswith("test/")}
                self.trials.study.set_user_attr(key, scores)
                continue
            missing.append(f"{attributes['run']} (seed {seed}) {why}")
        return missing


def ended_whole(run: Path) -> bool:
    """Whether a run has come to its end, its last checkpoint included, which is written after its results."""
    fit, last = section(read_results(run), "fit"), newest(run)
    return text(fit, "state") == "finished" and last is not None and f"step={fit['steps']:06d}" in last.name


class Signalled(BaseException):  # no Exception: what brings errors to words must let it pass
    def __init__(self, signum: int) -> None:
        self.signum = signum


@contextmanager
def signals() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end this process in good order, also between two trainings; a second one at once."""

    def restore() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        restore()
        raise Signalled(signum)

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    for signum in before:
        signal.signal(signum, stop)
    try:
        yield
    finally:
        restore()


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
        TrainingFailed: all have ended before the study has.
    """
    count, processes, logs = sweep.options.workers, [], []
    for worker in range(count):
        logs.append(sweep.folder / f"worker-{worker}.log")
        with logs[-1].open("w") as log:
            command = [sys.executable, "-m", "lit_mnist", "sweep", *args, f"--worker={os.getpid()}"]
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
            display.update(sweep.trials.trials())
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
        display.update(sweep.trials.trials())


def ended(status: int, log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    return f"{how}{f': {shortened(lines[-1], 300)}' if status > 0 and lines else ''}; its trial is open again"


def sweep(args: list[str]) -> None:
    """Run the command with the flags that follow its name.

    Raises:
        UserError: the input cannot be used.
        TrainingFailed: the study cannot go on.
        SystemExit: from `--help`, and where a signal stopped it.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", module="optuna")
        try:
            with signals():
                run(args)
        except (Interrupted, Signalled) as stop:
            name = signal.Signals(stop.signum).name
            raise SystemExit(complain(f"stopped by {name}; the same line goes on with it", 128 + stop.signum)) from stop
        except StorageInternalError as error:
            reason = shortened(" ".join(str(error.__cause__ or error).split()), 200)
            raise TrainingFailed(
                f"the trials' storage failed: {reason}; what is trained is kept, start it again"
            ) from error


def run(args: list[str]) -> None:
    plan, options, where = read(args)
    if not 0 <= options.workers <= 1000:
        raise UserError(f"--workers must be a number in 0..1000, got {options.workers}")
    if launched() != (1, 1) or number("WORLD_SIZE", "SLURM_NTASKS") > 1:
        raise UserError("sweep starts its own workers (--workers); start it without torchrun and srun")
    going = Sweep(plan, options, where)
    if options.worker is not None:
        going.work()
        return
    if options.retry:
        going.trials.retry()
    missing: list[str] = []
    with Display(plan, going.trials.settings * len(plan.all_seeds), going.folder / "worker-0.log") as display:
        if options.workers == 1:
            going.work(display)
        elif options.workers:
            run_workers(going, args, display)
        settled, ended = going.trials.settled(), bool(ranked(going.table()))
        if options.workers and not settled:
            raise TrainingFailed("the study has not come to its end, and no worker is left; start it again to go on")
        if options.workers:
            going.drop_losers()
        if options.test and settled and ended:
            with redirect_stdout(display.log):
                missing = going.test()
    comparison.report(plan, going.table(), going.described | {"study": options.name}, going.output, settled)
    if settled and not ended:
        raise TrainingFailed("no setting came to an end; --retry tries again what was given up")
    if missing:
        raise TrainingFailed(f"--test could not score all: {'; '.join(missing)}")
