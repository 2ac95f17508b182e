"""What a command runs with: the settings of a checkpoint's run, and over them the user's files and flags."""

import argparse
import re
import shlex
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from lit_mnist.cli.console import OneLineParser, one_line
from lit_mnist.exact import runs
from lit_mnist.exact.checkpoints import Run
from lit_mnist.exact.conditions import conditions
from lit_mnist.exact.console import UserError, shortened, shown
from lit_mnist.exact.optimizers import plain_values

DEFAULT_SEED = 1
MOST_USED = ("config", "ckpt_path", "name", "trainer.max_epochs", "model.layers", "model.lr", "data.root", "data.name")
# What decides where a command runs and what it prints is no part of a run.
MACHINE = {f"trainer.{name}" for name in ("devices", "num_nodes", "default_root_dir", "profiler")}
MACHINE |= {"ckpt_path", "trainer.enable_progress_bar", "trainer.enable_model_summary", "processes.timeout"}
KEPT = ("trainer.", "checkpoint.", "best.", "board.")  # in results.json, beside those of the module and the data
# Settings that must be the checkpoint's: the weights, the images held out, the optimizer's state, the order of batches
FIXED = {"test": {"model.network", "model.layers", "model.activation", "model.views"}}
FIXED["validate"] = FIXED["test"] | {"data.name", "data.val_size", "data.split_seed"}
FIXED["fit"] = FIXED["validate"] | {"model.optimizer", "seed_everything"}
PLACES = ("data.root", "data.download")  # a run may be resumed with its data somewhere else
CONDITIONS = {"versions.torch", "versions.pytorch-lightning", "hardware.processor", "hardware.threads"}
# of a checkpoint, what scoring reads
SCORED = {"state_dict", "hyper_parameters", "datamodule_hyper_parameters"}
SCORED |= {"epoch", "global_step", "pytorch-lightning_version"}
ON_OFF = ("model.dropout", "model.ema_decay")  # a fit can change them, but turn them neither on nor off
# a default of a callback, such as Timer's `interval`, may be a member of an enumeration, which YAML does not have
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


class Parser(LightningArgumentParser):
    def parse_line(self, args: Sequence[str], run: Mapping[str, Any] | None = None) -> Any:
        """Parse the settings of a run, over them the files of `--config`, and over these all other flags."""
        first = OneLineParser(add_help=False, allow_abbrev=False)
        first.add_argument("-c", "--config", action="append", default=[])
        found, flags = first.parse_known_args(args)
        before = [yaml.safe_dump(run)] if run else []
        self.exit_on_error = False  # with all flags printed
        try:
            return self.parse_args([*(f"--config={config}" for config in before + found.config), *flags])
        except (ValueError, argparse.ArgumentError) as error:  # jsonargparse does not say which file
            files = ["the checkpoint's run"] * len(before) + found.config
            raise UserError(one_line(error) + f" (in {' or '.join(files)} or a flag)" * bool(files)) from error

    def format_help(self, *args: Any) -> str:
        # jsonargparse 4.53 names some forty classes for trainer.callbacks alone
        first = self.add_argument_group("most used")
        first._group_actions = [action for action in self._actions if action.dest in MOST_USED]
        self._action_groups = sorted(self._action_groups, key=lambda group: group is not first)
        return re.sub(r",\s+known\s+subclasses:[^)]*", "", super().format_help(*args))


class SettingsCLI(LightningCLI):
    """LightningCLI that parses a command line over the settings of a checkpoint's run."""

    command: str
    run = Run()  # that has these settings, or whose checkpoint is scored
    name: str | None  # of a new run's folder
    lines: list[str]  # what is printed: how the settings differ from the checkpoint's run

    @property
    def runs(self) -> Path:
        return Path(self.config["trainer.default_root_dir"] or ".").expanduser() / "lightning_logs"

    def parse_arguments(self, parser: Any, args: Any) -> None:
        flags, before, self.run, self.lines = args[1:], dict[str, Any](), Run(), []
        self.config = parser.parse_line(flags)
        if wanted := self.config["ckpt_path"]:
            (before, base), known = self.run_settings(str(wanted)), parser.get_defaults()
            base = {key: value for key, value in base.items() if key in known}  # an old one may be gone
            self.config = parser.parse_line(flags, base)
        elif self.command != "fit":
            raise UserError(f"{self.command} needs --ckpt_path best, last or the path of a checkpoint")
        config, run = self.config, self.run
        if config["trainer.precision"] == "auto":
            config["trainer.precision"] = quickest_precision(config["trainer.accelerator"])
            self.lines.append(f"Precision: {config['trainer.precision']}")
        config["ckpt_path"] = None  # config.yaml repeats the run
        self.name = name = config.pop("name", None)
        if name is not None and (run.continues or not name or name.startswith(".") or name != Path(name).name):
            raise UserError(f"--name {shortened(name)}: must be a plain folder name, and of a new run")
        run.recipe = "+".join(Path(str(file)).stem for file in config["config"] or [] if file) or "default"
        run.command, run.config = shlex.join(args), parser.dump(config, skip_unset=False)
        now = flat(yaml.safe_load(run.config))
        run.settings = {key: value for key, value in now.items() if key.startswith(KEPT) and key not in MACHINE}
        self.check_fixed(before, now)
        if self.command == "fit":
            run.unchanged = all(now[key] == old for key, old in before.items() if key in now)
            here, there = flat(conditions(torch.device("cpu"))), flat(runs.section(run.loaded, "conditions"))
            changes = [(key, old, now.get(key, "no longer a setting"), "") for key, old in before.items()]
            for key in sorted(CONDITIONS & there.keys()):
                changes.append((key.partition(".")[2], there[key], here[key], " (the last bits may differ)"))
            different = [(name, shortened(str(a)), shortened(str(b)), note) for name, a, b, note in changes if a != b]
            self.lines += [f"{name}: {old} -> {new}{note}" for name, old, new, note in different]

    def run_settings(self, wanted: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the checkpoint of `--ckpt_path`; return the settings that its run had, and those to begin from."""
        try:
            path = runs.find_checkpoint(wanted, self.runs, "last" if self.command == "fit" else "best")
            loaded = runs.read_checkpoint(path)
        except UserError as error:
            raise UserError(f"--ckpt_path {error}") from error
        folder = runs.run_folder(path)
        self.lines += runs.checkpoint_lines(wanted, path, self.runs)
        found = flat({"model": loaded["hyper_parameters"], "data": loaded["datamodule_hyper_parameters"]})
        # plain values alone: no classes, and no tensors, though one may equal a number
        hparams = {k: v for k, v in found.items() if "._" not in k and repr(plain_values(v)) == repr(v)}
        hparams = {k: v for k, v in hparams.items() if k not in (*PLACES, "model.classes", "model.image_shape")}
        hparams["seed_everything"] = hparams.pop("data.seed", DEFAULT_SEED)
        if self.command != "fit":
            self.run = Run(folder, path, {key: loaded[key] for key in SCORED}, folder)
            return hparams, hparams
        self.run = Run.resumed(path, loaded)
        if not (folder and (last := runs.newest(folder)) and last.samefile(path)):
            self.run.folder = None
            self.lines.append("A new run: that checkpoint is not the newest state of its run, which stays as it is")
        if not (folder and (file := folder / "config.yaml").is_file()):
            self.lines.append("Settings: only hyperparameters, as there is no config.yaml of the checkpoint's run")
            return hparams, hparams
        self.lines.append(f"Settings: {shown(file)}")
        try:
            config = {key: old for key, old in flat(yaml.safe_load(file.read_text())).items() if key not in MACHINE}
        except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError) as error:
            raise UserError(f"{file}: the run's settings cannot be read ({one_line(error)})") from error
        before = config | hparams
        # a resumed run's file may have been edited; for an earlier checkpoint it may have what was set later
        base = hparams | config if self.run.continues else before
        return {key: value for key, value in before.items() if key not in PLACES}, base

    def check_fixed(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Refuse settings that would turn the checkpoint's run into another one."""
        fixed = FIXED[self.command]
        before = before and {"model.views": 1, "data.shares": None, **before}  # which older runs do not have
        if self.command == "fit":
            fixed = fixed | {key for key in ON_OFF if bool(before.get(key)) != bool(now.get(key))}
            loop = runs.section(runs.section(self.run.loaded, "loops"), "fit_loop")
            if not runs.section(loop, "epoch_loop.batch_progress").get("is_last_batch"):
                fixed |= {"data.batch_size", "data.shares"}  # the batches of the epoch are counted
        for key in sorted(fixed & before.keys()):
            if before[key] != now[key]:
                raise UserError(f"{key} was {before[key]} in this run and cannot become {now[key]}")


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration's settings by dotted key, `section.name`."""
    parts = {name: value for name, value in config.items() if isinstance(value, dict)}
    settings = {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
    return {name: config[name] for name in config if name not in parts} | settings


def as_list(value: Any) -> list[Any]:
    """Return the values of a setting that takes none, one or several."""
    return value if isinstance(value, list) else [] if value is None else [value]


def quickest_precision(accelerator: Any) -> str:
    """Return the precision that this machine trains fastest in: without units for it bfloat16 is slow."""
    # avx512_bf16 alone was no faster than 32 bits; torch 2.10 does not have get_capabilities
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = accelerator in ("auto", "cpu") and found.get("amx_bf16")
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if fast else "32-true"
