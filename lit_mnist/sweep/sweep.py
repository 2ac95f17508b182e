"""sweep: train configurations with several seeds, on one or many workers, and say which is the best."""

import io
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import warnings
from argparse import SUPPRESS
from contextlib import redirect_stdout
from pathlib import Path
from time import sleep
from typing import Any, NoReturn

import optuna
import torch
from jsonargparse.typing import NonNegativeInt

from lit_mnist.cli.cli import MNISTCLI
from lit_mnist.cli.console import complain, one_line
from lit_mnist.cli.settings import Parser
from lit_mnist.exact.console import PROGRAM, Interrupted, TrainingFailed, shown
from lit_mnist.exact.runs import being_trained, newest, read_results
from lit_mnist.sweep.comparison import named, report, shown_value, table
from lit_mnist.sweep.study import Study, latest_trials


def check(flags: list[str]) -> MNISTCLI:
    """Return a `fit` with these flags that is not started; a UserError says why they cannot be used."""
    with redirect_stdout(io.StringIO()):
        return MNISTCLI(["fit", *flags], start=False)


class Worker:
    def __init__(self, plan: Study, options: Any) -> None:
        places = {"data.root": options["data.root"], "trainer.default_root_dir": options.root_dir}
        usual = check([*plan.flags({}), *(f"--{name}={place}" for name, place in places.items() if place)])
        plan.suggest(optuna.create_study().ask())
        self.plan, self.runs, self.folder = plan, usual.runs, usual.runs / "sweeps" / options.name
        self.parent = os.getppid() if options.worker is not None else None
        self.places = [f"--data.root={usual.config['data.root']}", f"--trainer.default_root_dir={self.runs.parent}"]
        if options.worker is None:
            for name, given in plan.varied.items():
                for value in given if isinstance(given, list) else (given["low"], given["high"]):
                    check([*plan.flags({name: value}), *self.places])
            self.folder.mkdir(parents=True, exist_ok=True)
        self.log = (self.folder / f"worker-{options.worker or 0}.log").open("a", buffering=1)
        self.study = plan.open(options.name, options.storage, self.folder)
        plan.fill_queue(self.study, options.retry and options.worker is None)

    def work(self) -> None:
        """Train what is in the queue, until nothing is and no other worker may leave something undone."""
        while not self.is_settled():
            optuna.storages.fail_stale_trials(self.study)
            states = {trial.state.name for trial in self.study.get_trials(deepcopy=False)}
            try:
                if "WAITING" in states:
                    # Optuna sends heartbeats only within `optimize`, which by itself would draw more and more trials
                    self.study.optimize(self.train, n_trials=1)
                elif "RUNNING" in states:
                    sleep(1)
                else:  # a trial whose worker was stopped
                    self.plan.fill_queue(self.study)
            except (ValueError, optuna.exceptions.UpdateFinishedTrialError) as error:
                if isinstance(error, ValueError) and not str(error).startswith("Cannot tell"):  # by Optuna 4.6 to 5
                    raise
                print("This trial was reassigned: another worker considered this one dead.", flush=True)

    def train(self, trial: optuna.Trial) -> float:
        """Train a configuration with each seed, and return the mean of what is compared: Optuna's objective."""
        sample, values = trial.user_attrs.get("sample"), []
        if sample is None:
            raise optuna.TrialPruned  # another worker has emptied the queue just now, and Optuna has created a trial
        trial.set_user_attr("reason", None)
        # What is drawn depends on the configuration's number and on the trials before, not on how often this process
        # has drawn. Of Optuna's ways only independent sampling asks the sampler after the trial has begun.
        tpe = optuna.samplers.TPESampler(seed=sample, multivariate=False, constant_liar=True)
        trial.study.sampler = tpe if self.plan.sampler == "tpe" else optuna.samplers.RandomSampler(sample)
        params = self.plan.suggest(trial)
        if any(other.params == params for number, other in latest_trials(self.study).items() if number < sample):
            self.end(trial, "drawn before")
        for seed in self.plan.all_seeds:
            if "value" not in trial.user_attrs.get(f"seed {seed}", {}):
                flags = [*self.plan.flags(params, self.folder), f"--seed_everything={seed}", *self.places]
                self.train_run(trial, f"seed {seed}", flags)
            values.append(trial.user_attrs[f"seed {seed}"]["value"])
        return sum(values) / len(values)

    def end(self, trial: optuna.Trial, reason: str) -> NoReturn:
        """Mark a trial as pruned, for then a sampler avoids its parameters; it would ignore a failed one."""
        trial.set_user_attr("reason", reason)
        self.say(trial, reason)
        raise optuna.TrialPruned(reason)

    def train_run(self, trial: optuna.Trial, seed: str, flags: list[str]) -> None:
        """Train a configuration with one seed, from where an earlier trial of it was interrupted if that is here."""
        if self.parent not in (None, os.getppid()):  # it was killed
            raise KeyboardInterrupt(signal.SIGTERM)
        if latest_trials(self.study)[trial.user_attrs["sample"]].number > trial.number:
            raise optuna.TrialPruned  # another worker has queued this configuration once more, at the same time
        run = self.runs / trial.user_attrs.get(seed, {}).get("run", "none")
        while being_trained(run):
            sleep(1)  # by a worker that was considered dead, or by the user

        def keep_place(started: Any) -> None:  # only now it keeps its folder
            trial.set_user_attr(seed, {"run": started.folder.name, "host": platform.node()})

        try:
            if last := newest(run):  # unless its user has trained it on with other settings
                resumed = [*flags, f"--ckpt_path={last}"]
                flags = resumed if check(resumed).run.unchanged else flags
            with redirect_stdout(self.log):
                MNISTCLI(["fit", *flags], keep_place)
        except (TrainingFailed, ValueError, torch.OutOfMemoryError) as error:
            cause = error.__cause__
            if isinstance(cause, OSError) or isinstance(getattr(cause, "__cause__", None), OSError):
                raise  # a full disk, or data that is gone, would end every run
            self.end(trial, one_line(str(error).partition(";")[0]))
        run = self.runs / trial.user_attrs[seed]["run"]
        fit, last = read_results(run)["fit"], newest(run)
        best = fit["best"] if self.plan.of == "best" else None  # whose checkpoint is tested, whatever is compared
        ended = {"checkpoint": last and last.name, **fit["metrics"], **(best or {})}
        if not math.isfinite(ended.get(self.plan.compare, math.nan)):
            self.end(trial, f"{self.plan.compare} was not logged, but {', '.join(fit['metrics'])}")
        kept = {key: fit[key] for key in ("parameters", "epochs", "hardware", "versions", "commit")}
        kept |= {"value": ended[self.plan.compare], "seconds": fit["train_seconds"], "checkpoint": ended["checkpoint"]}
        trial.set_user_attr(seed, trial.user_attrs[seed] | kept)
        score = shown_value(self.plan.compare, kept["value"])
        self.say(trial, f"{seed}: {self.plan.compare} {score} in {kept['seconds']:.1f} s")

    def say(self, trial: optuna.Trial, text: str) -> None:
        done = [one.state.is_finished() for one in latest_trials(self.study).values()]
        # in one piece: workers share a terminal
        print(f"[{sum(done)}/{len(done)}] {named(trial.params)}, {text}\n", end="", flush=True)

    def is_settled(self) -> bool:
        return all(map(self.plan.is_done, latest_trials(self.study).values()))

    def test(self) -> list[str]:
        """Score the best configuration's runs on the test set, and return those that could not be."""
        missing, best = [], table(self.plan, self.study).iloc[0]
        for run in (run for run in best["trials"] if not any(name.startswith("test/") for name in run)):
            folder = self.runs / run["run"]
            if (checkpoint := folder / "checkpoints" / run["checkpoint"]).is_file() and run["host"] == platform.node():
                with redirect_stdout(self.log):
                    MNISTCLI(["test", *self.places, "--trainer.enable_progress_bar=false", f"--ckpt_path={checkpoint}"])
                scores = {name: x for name, x in read_results(folder)["test"][-1].items() if name.startswith("test/")}
                self.study.set_user_attr(f"test {best['sample']} {run['seed']}", scores)
            else:
                missing.append(f"{run['run']} (seed {run['seed']}, trained on {run['host']})")
        return missing


def read(args: list[str]) -> tuple[Study, Any]:
    """Return the study and the other flags of a command line of `sweep`."""
    parser = Parser(prog="python -m lit_mnist sweep", description="Compare settings over seeds, by a study file.")
    add = parser.add_argument
    add("-c", "--config", action="config", metavar="STUDY.yaml", help="the study file")
    add("--name", type=str, help="of the study (that of the study file)")
    add("--workers", type=NonNegativeInt, default=1, help="processes that train; 0 shows the table so far (1)")
    add("--test", action="store_true", help="in the end score the chosen configuration, and only it, on the test set")
    add("--storage", type=str, help="URL of a database for several machines (an SQLite file in the study's folder)")
    add("--retry", action="store_true", help="try failed configurations again")
    add("--root_dir", type=str, help="the folder of lightning_logs (the recipe's, or this one)")
    add("--data.root", type=str, help="the folder of the data (the recipe's)")
    add("--worker", type=int, help=SUPPRESS)  # the number of a worker that another process has started
    parser.add_class_arguments(Study)
    options = parser.parse_line(args)
    plan = Study(**{name: options.pop(name) for name in Study.__dataclass_fields__})
    options.name = options.name or "-".join(Path(str(file)).stem for file in options.config or []) or "study"
    return plan, options


def run_workers(workers: int, folder: Path, args: list[str]) -> None:
    """Start workers, each with its share of this machine's processor cores and GPUs, and wait for them."""
    environment = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // workers)), **os.environ}
    here = ",".join(map(str, range(torch.cuda.device_count())))
    devices, processes = environment.get("CUDA_VISIBLE_DEVICES", here).split(","), []
    try:
        for worker in range(workers):
            environment["CUDA_VISIBLE_DEVICES"] = devices[worker % len(devices)]
            command = [sys.executable, "-m", "lit_mnist", "sweep", *args, f"--worker={worker}"]
            with (folder / f"worker-{worker}.log").open("a") as log:
                # in its own session: only this process gets Ctrl-C, and stops each of them once
                processes.append(subprocess.Popen(command, env=environment, stderr=log, start_new_session=True))
        for worker, process in enumerate(processes):
            if process.wait():
                print(f"worker {worker} ended with status {process.returncode}: see worker-{worker}.log", flush=True)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def sweep(args: list[str]) -> None:
    """Run the command with the flags after its name; TrainingFailed if the sweep is left without a result."""

    def stop(signum: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt(signum)

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        # by Optuna 4.6 to 5 and, of plots with one value, matplotlib
        warnings.filterwarnings("ignore", "(?s).*(experimental|deprecated|identical low)")
        run(*read(args), args)
    except (Interrupted, KeyboardInterrupt) as stopped:
        signum = next(iter(stopped.args), signal.SIGINT)  # of both their first argument
        message = f"Stopped by {signal.Signals(signum).name}. Run the same command to continue the sweep."
        raise SystemExit(complain(message, 128 + signum)) from stopped
    except optuna.exceptions.StorageInternalError as error:
        reason = one_line(error.__cause__ or error)
        raise TrainingFailed(f"the database failed ({reason}); run the same command to continue the sweep") from error
    finally:
        signal.signal(signal.SIGTERM, before)


def run(plan: Study, options: Any, args: list[str]) -> None:
    worker = Worker(plan, options)
    if options.worker is not None or options.workers == 1:
        worker.work()
    elif options.workers:
        run_workers(options.workers, worker.folder, args)
    if options.worker is not None:
        return
    settled = worker.is_settled()
    missing = worker.test() if options.test and settled else []
    found = report(plan, worker.study, worker.folder, settled)
    if options.workers and not settled:
        raise TrainingFailed("the sweep is not complete, and no worker is left; run the same command to continue it")
    if settled and found["reason"].notna().all():
        raise TrainingFailed("all configurations failed; --retry tries them again")
    if settled:
        best = next(run for run in found.iloc[0]["trials"] if run["value"] == found.iloc[0]["best"])
        if (path := worker.runs / best["run"] / "checkpoints" / best["checkpoint"]).is_file():
            command = shlex.join(["test", "--ckpt_path", shown(path), worker.places[0]])
            print(f"Best run:   {shown(path)}\nTest it:    python -m {PROGRAM} {command}")
    if missing:
        raise TrainingFailed(f"--test found no checkpoint here of {', '.join(missing)}")
