"""What a command runs with: the settings of a checkpoint's run, and over them the user's files and flags."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser

from lit_mnist.exact import runs
from lit_mnist.exact.checkpoint_io import find_and_read
from lit_mnist.exact.conditions import conditions
from lit_mnist.exact.console import shortened
from lit_mnist.exact.errors import UserError
from lit_mnist.exact.run import is_newest
from lit_mnist.exact.state import TRAINING_ENTRIES, StateError, check_entries, mapping, not_restorable

DEFAULT_SEED = 1
# What a resumed run takes over of the trainer's settings from its checkpoint. Nothing that jsonargparse would look up
# as a class, for then a checkpoint could make it import any module; and nothing that is the machine's.
TRAINER_SETTINGS = frozenset(
    (
        *("max_epochs", "min_epochs", "max_steps", "min_steps", "overfit_batches", "accumulate_grad_batches"),
        *("limit_train_batches", "limit_val_batches", "limit_test_batches", "log_every_n_steps"),
        *("val_check_interval", "check_val_every_n_epoch", "gradient_clip_val", "gradient_clip_algorithm"),
        *("precision", "deterministic", "sync_batchnorm", "max_time", "reload_dataloaders_every_n_epochs"),
        *("detect_anomaly", "use_distributed_sampler"),
    )
)
# Changing these would make another run of it, not a continuation.
FIXED = {
    "model.network": "the weights are of that network",
    "model.layers": "the weights are of that network",
    "model.activation": "the weights are of that network",
    "model.optimizer": "the optimizer's state is of that kind",
    "data.name": "the run was trained on that data",
    "data.val_size": "held-out images would have been trained on",
    "data.split_seed": "held-out images would have been trained on",
    "seed_everything": "the order of the batches is a function of it",
}
ON_OFF = {
    "model.dropout": "the network has dropout layers or has not",
    "model.ema_decay": "the checkpoint has averaged weights or has not",
}


class Parser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # jsonargparse 4.53 prints the usage of some hundred flags and a list of Python's types; here it is one line
        raise UserError(shortened(one_line(message), 300)) from ex


@dataclass
class Settings:
    """What was asked for, and what it means.

    Args:
        command: fit, validate, test or predict.
        args: as typed, the command first.
        parser: the command's part of it.
        config: all settings, of the command under its name, by dotted key.
        defaults: those of the program.
        recipe: a name for them.
        checkpoint: the file that `--ckpt_path` means, and what it holds.
        precision: a line on the precision that `auto` came to.
        changes: what differs from the checkpoint's run, a line each.
        unchanged: whether none of its settings does.
    """

    command: str
    args: list[str]
    parser: LightningArgumentParser
    config: Any = None
    defaults: Any = None
    recipe: str = "default"
    precision: str = ""
    checkpoint: Path | None = None
    loaded: dict[str, Any] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    unchanged: bool = True

    @property
    def own(self) -> Any:
        return self.config[self.command]

    @property
    def runs(self) -> Path:
        """The folder of all runs."""
        root = self.own.get("trainer.default_root_dir") or "."
        return runs.expanded(root, "trainer.default_root_dir") / "lightning_logs"

    @property
    def continues(self) -> bool:
        """Whether the checkpoint's run goes on in its own folder."""
        return self.checkpoint is not None and is_newest(self.checkpoint)


def parse(parser: LightningArgumentParser, own: LightningArgumentParser, typed: list[str]) -> Settings:
    """Parse a command line; the settings of a checkpoint's run are the defaults that files and flags go over.

    Args:
        own: the command's part of the parser.

    Raises:
        UserError: it cannot be used.
        UserError: the checkpoint cannot.
    """
    args = typed
    configs = configs_of(args)
    for config in configs:  # a shell's <(...) is one too, which somebody writes to
        if len(config) < 256 and Path(config).is_fifo() and not config.startswith(("/dev/fd/", "/proc/")):
            raise UserError(f"--config {shortened(config)}: that file is a named pipe")
    recipe = "+".join(Path(config).stem for config in configs) or "default"
    settings = Settings(typed[0], typed, own, defaults=own.get_defaults(), recipe=recipe)
    try:
        settings.config = without_enums(parser.parse_args(args))
    except (UserError, UnicodeDecodeError, RecursionError) as error:  # jsonargparse does not say which file
        raise UserError(f"{error} (in {' or '.join([*configs, 'a flag'])})" if configs else str(error)) from error
    wanted = settings.own.get("ckpt_path")
    if wanted is None and settings.command != "fit":
        raise UserError(f"{settings.command} needs --ckpt_path best, last or the path of a checkpoint")
    if wanted is not None:
        settings.checkpoint, settings.loaded = find_and_read(str(wanted), settings.runs)
        apply_run_settings(settings, parser, args)
    else:
        choose_precision(settings, {})
    # The methods that run the trainer pass it on. LightningCLI 2.6 would lay the checkpoint's settings over the flags.
    settings.own["ckpt_path"] = None
    check_trainer(settings.own, settings.command == "fit")
    return settings


def configs_of(args: list[str]) -> list[str]:
    """The values of `--config` on a command line."""
    configs = [value for flag, value in pairwise(args) if flag in ("-c", "--config")]
    return configs + [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]


def apply_run_settings(settings: Settings, parser: LightningArgumentParser, args: list[str]) -> None:
    """Parse again, with the settings of the checkpoint's run as defaults, and say what differs from them."""
    checkpoint, loaded = settings.checkpoint, settings.loaded
    if settings.command == "fit":
        check_training_state(settings)
    before = settings_of(loaded, settings.command)
    gone = [key for key in before if key not in settings.defaults]
    if settings.command == "fit":
        settings.changes += [f"{shortened(f'{key}: {before[key]!r}')} -> no longer a setting" for key in gone]
    before = {key: value for key, value in before.items() if key not in gone}
    settings.parser.set_defaults(before)
    found = classes_of(runs.run_folder(checkpoint)) if settings.command == "fit" and checkpoint else {}
    text = yaml.safe_dump({"trainer": found}) if found else ""
    if settings.command == "fit" and settings.continues and checkpoint and not config_of(checkpoint).is_file():
        settings.changes.append(f"There is no {config_of(checkpoint)}: callbacks and loggers are those given now")
    try:
        settings.config = without_enums(parser.parse_args([args[0], *(["--config", text] if text else []), *args[1:]]))
    except UserError as error:
        raise UserError(f"{error} (in the run's config.yaml or a flag)" if text else str(error)) from error
    choose_precision(settings, before)
    try:  # jsonargparse 4.53 takes defaults as they are
        settings.parser.validate(settings.own, skip_unset=False)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"--ckpt_path {checkpoint}: {shortened(one_line(str(error)), 300)}") from error
    if settings.command == "validate":
        for key in ("data.name", "data.val_size", "data.split_seed"):
            if before.get(key) != settings.own[key]:
                raise UserError(
                    f"{key} was {before.get(key)} in this run; with {settings.own[key]} images that were not held out"
                    " would be scored"
                )
    if settings.command == "fit":
        now = yaml.safe_load(settings.parser.dump(settings.own, skip_none=False))["trainer"]
        kept = [name for key in found if now[key] == found[key] for name in names_of(found[key])]
        if kept:  # a flag may have put others in their place
            settings.changes.append(f"From the run's config.yaml: {', '.join(kept)}")
        progress = loaded["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        changed = differences(before, settings.own, not progress["is_last_batch"])
        settings.unchanged = not changed and now["callbacks"] == found.get("callbacks")
        settings.changes += changed
        settings.changes += other_conditions(loaded)


def choose_precision(settings: Settings, before: Mapping[str, Any]) -> None:
    """Put in place of the precision `auto` that of the checkpoint's run, or else what this machine has units for."""
    if settings.own["trainer.precision"] != "auto":
        return
    if "trainer.precision" in before:
        chosen, reason = before["trainer.precision"], "the run has it"
    else:
        chosen, reason = quickest_precision(settings.own["trainer.accelerator"])
    settings.own["trainer.precision"], settings.precision = chosen, f"Precision: {chosen}, as {reason}"


def quickest_precision(accelerator: Any) -> tuple[str, str]:
    """The precision that a machine trains fastest in, and why: without units for it bfloat16 is slow."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        name, units = torch.cuda.get_device_name(), torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16-mixed", f"{name} has bfloat16") if units else ("32-true", f"{name} has no bfloat16")
    if accelerator not in ("auto", "cpu"):
        return "32-true", f"nothing is known of {shortened(str(accelerator))}"
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 does not have it
    if capabilities.get("amx_bf16"):
        return "bf16-mixed", "the processor has AMX"
    # avx512_bf16 alone made fast.yaml no quicker that could be told from noise, and cost it 0.03 points
    return "32-true", "the processor has no AMX"


def check_training_state(settings: Settings) -> None:
    path, loaded = settings.checkpoint, settings.loaded
    if not {"loops", "optimizer_states", "callbacks"} <= loaded.keys():
        raise UserError(f"--ckpt_path {path}: it holds weights alone, no state to resume")
    try:
        check_entries(loaded, TRAINING_ENTRIES)
        progress = loaded["loops"]
        for name in ("fit_loop", "epoch_loop.batch_progress"):
            progress = mapping(progress.get(name), f"loops/{name}")
        check_entries(progress, {"is_last_batch": bool})
    except StateError as error:
        raise not_restorable(path, error) from error
    if path and not settings.continues:
        settings.changes.append(
            "A new run: that checkpoint is not the newest state of its run, which stays as it is"
            if runs.run_folder(path)
            else "A new run: that checkpoint lies in no run's folder; callbacks and loggers are those given now"
        )


def settings_of(checkpoint: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Those of a checkpoint's run that a command takes over, by dotted key."""
    settings: dict[str, Any] = plain_settings("model", checkpoint["hyper_parameters"])
    settings |= plain_settings("data", checkpoint["datamodule_hyper_parameters"])
    settings["seed_everything"] = settings.pop("data.seed", DEFAULT_SEED)
    # where data lies and whether it may be fetched is the machine's matter, and how many classes it has, the data's
    for key in ("data.root", "data.download", "model.classes"):
        settings.pop(key, None)
    if command == "fit" and isinstance(checkpoint.get("settings"), dict):
        settings |= run_settings(checkpoint["settings"])
    return settings


def classes_of(run: Path | None) -> dict[str, Any]:
    """The callbacks and loggers that a run was configured with, where it was.

    They name classes, so they come from the run's config.yaml alone, as from any that a user gives: never from a
    checkpoint, which may be somebody else's.

    Raises:
        UserError: config.yaml cannot be read.
    """
    path = run / "config.yaml" if run else None
    if not (path and path.is_file()):
        return {}
    try:
        config = yaml.safe_load(path.read_text())
        trainer = mapping(mapping(config, "config.yaml").get("trainer", {}), "trainer")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = shortened(" ".join(str(error).split()), 120)
        raise UserError(f"{path}: the run's settings cannot be read ({reason})") from error
    return {key: trainer[key] for key in ("callbacks", "logger", "plugins") if trainer.get(key) not in (None, True, [])}


def config_of(checkpoint: Path) -> Path:
    return (runs.run_folder(checkpoint) or Path()) / "config.yaml"


def without_enums(value: Any) -> Any:
    """Settings whose defaults are members of enumerations, such as Timer's, as plain values: YAML has only these."""
    if isinstance(value, Namespace):
        for key, inner in vars(value).items():
            setattr(value, key, without_enums(inner))
    elif isinstance(value, list):
        value[:] = map(without_enums, value)
    return value.value if isinstance(value, Enum) else value


def names_of(configured: Any) -> list[str]:
    """The names of configured classes."""
    parts = configured if isinstance(configured, list) else [configured]
    paths = [str(part.get("class_path")) if isinstance(part, dict) else f"logger {part}".lower() for part in parts]
    return [shortened(path.rpartition(".")[2], 60) for path in paths]


def run_settings(settings: Mapping[str, Any]) -> dict[str, int | float | str | bool | None]:
    """Those of some dotted settings that a checkpoint keeps of its run's trainer, for a resumed run to take over."""
    return {
        key: value
        for key, value in settings.items()
        if type(key) is str
        and type(value) in (int, float, str, bool, type(None))
        and (key.startswith(("checkpoint.", "best.", "board.")) or key.removeprefix("trainer.") in TRAINER_SETTINGS)
    }


def plain_settings(prefix: str, settings: Any) -> dict[str, Any]:
    """Those of a mapping's entries that are plain numbers, strings and booleans, None or lists of them, as dotted
    command-line keys.

    Whatever else a checkpoint may name, classes above all, stays out.
    """

    def is_plain(value: Any) -> bool:
        if isinstance(value, list):
            return all(map(is_plain, value))
        return type(value) in (int, float, str, bool, type(None))

    if not isinstance(settings, dict):
        return {}
    named = {key: value for key, value in settings.items() if type(key) is str and not key.startswith("_")}
    return {f"{prefix}.{key}": value for key, value in named.items() if is_plain(value)}


def differences(before: Mapping[str, Any], now: Mapping[str, Any], epoch_unfinished: bool) -> list[str]:
    """What a continuation changes, a line each.

    Args:
        before: the run's settings by dotted key.
        now: those asked for.
        epoch_unfinished: whether the checkpoint lies within an epoch.

    Raises:
        UserError: one that cannot be changed.
    """
    changed = {key: (value, now[key]) for key, value in before.items() if key in now and now[key] != value}
    for key, (old, new) in changed.items():
        reason = FIXED.get(key)
        if key in ON_OFF and bool(old) != bool(new):
            reason = ON_OFF[key]
        if key == "data.batch_size" and epoch_unfinished:
            reason = "the checkpoint lies within an epoch, whose batches are counted"
        if reason:
            raise UserError(f"{key} was {old} in this run and cannot become {new}: {reason}; start a new run for that")
    return [f"{key}: {old} -> {new}" for key, (old, new) in changed.items()]


def other_conditions(loaded: Mapping[str, Any]) -> list[str]:
    """What the bits of a run depend on besides its settings, where it is not as it was; a line each."""
    now, lines = conditions(torch.device("cpu")), []
    for part, keys in (("versions", ("torch", "pytorch-lightning")), ("hardware", ("processor", "threads"))):
        before = runs.section(runs.section(loaded, "conditions"), part)
        for key in keys:
            if key in before and before[key] != now[part].get(key):
                old = shortened(str(before[key]), 60)
                lines.append(f"{key}: {old} -> {now[part].get(key)} (the last bits may differ)")
    return lines


def has_end(config: Any) -> bool:
    return (config["trainer.max_epochs"] or -1) > 0 or config["trainer.max_steps"] > 0  # checked by check_trainer


def check_trainer(config: Any, fit: bool) -> None:
    """Check the trainer's settings that Lightning 2.6 takes and then trips over, or trains for ever with.

    Raises:
        UserError: one is out of its range.
    """
    least_values = {"max_epochs": 1, "max_steps": 1, "check_val_every_n_epoch": 1, "accumulate_grad_batches": 1}
    for name, least in {**least_values, "log_every_n_steps": 0}.items():
        value = config[f"trainer.{name}"]
        endless = name.startswith("max_")
        if isinstance(value, str) or (value is not None and value < least and not (endless and value == -1)):
            raise UserError(f"trainer.{name} must be a number from {least}{' or -1' * endless}, got {value}")
    interval = config["trainer.val_check_interval"]
    if not isinstance(interval, (int, float, type(None))) or (type(interval) is int and interval < 1):
        raise UserError(  # a time would be another step on a resumed run
            f"trainer.val_check_interval must be a share of an epoch or at least 1 batch, got {interval}"
        )
    if config["trainer.max_epochs"] is None and not has_end(config) and config["trainer.max_time"] is None:
        raise UserError("trainer.max_epochs must be a positive number, or trainer.max_steps or trainer.max_time")
    scheduled = config.get("model.schedule", "constant") != "constant" or (config.get("model.warmup") or 0) > 0
    if fit and scheduled and not has_end(config):
        raise UserError(
            "trainer.max_epochs must be a positive number, or trainer.max_steps, for this model.schedule and"
            " model.warmup; without an end only constant and 0 make sense"
        )
    if config["trainer.profiler"] == "xla":
        raise UserError("trainer.profiler must be simple, advanced, pytorch or a class, got xla, which is for TPUs")
    for key, value in config.items():
        if key.startswith("trainer.") and type(value) in (int, float) and not abs(value) < 2**31:
            raise UserError(f"{key} must be less than {2**31}, got {value}")


def one_line(message: str) -> str:
    """jsonargparse's account of a value that does not fit, as `KEY: expected A or B, got VALUE`."""
    message = " ".join(message.split())
    key = re.search(r'Parser key "([^"]+)":', message)
    expected = re.findall(r"Expected an? (.+?)(?=\. Got value:| - Expected| Given value|$)", message)
    value = re.search(r"(?:Got|Given) value: (.+)$", message)
    if not (key and expected and value):
        return message
    names = [re.sub(r"typing\.Literal\[(.+)\]|<class '(.+)'>", r"\1\2", name) for name in expected]
    allowed = " or ".join("null" if name == "NoneType" else name for name in names)
    return f"{key[1]}: expected {allowed}, got {value[1]}"
