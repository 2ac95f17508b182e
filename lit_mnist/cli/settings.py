"""What a command runs with: the settings of a checkpoint's run, and over them the user's files and flags."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from pytorch_lightning.cli import LightningArgumentParser

from lit_mnist.cli.console import one_line
from lit_mnist.exact import runs
from lit_mnist.exact.conditions import conditions
from lit_mnist.exact.console import UserError, shortened, shown
from lit_mnist.exact.reader import find_checkpoint, read_checkpoint
from lit_mnist.exact.resume import is_plain

DEFAULT_SEED = 1
MOST_USED = ("config", "ckpt_path", "name", "trainer.max_epochs", "model.layers", "model.lr", "data.root", "data.name")
# What decides where a command runs and what it prints is no part of a run.
MACHINE = {f"trainer.{name}" for name in ("devices", "num_nodes", "default_root_dir", "profiler")}
MACHINE |= {"ckpt_path", "trainer.enable_progress_bar", "trainer.enable_model_summary", "processes.timeout"}
# Settings that must be the checkpoint's: in which commands, and why.
FIXED = {
    ("model.network", "model.layers", "model.activation"): ("fit validate test", "its weights fit no other"),
    ("data.name", "data.val_size", "data.split_seed"): ("fit validate", "others would be held out"),
    ("model.optimizer",): ("fit", "its state fits no other"),
    ("seed_everything",): ("fit", "it decides the order of the batches"),
}
PLACES = ("data.root", "data.download")  # a run may be resumed with its data somewhere else
CONDITIONS = {"versions.torch", "versions.pytorch-lightning", "hardware.processor", "hardware.threads"}
ON_OFF = ("model.dropout", "model.ema_decay")  # a fit can change them, but turn them neither on nor off
# a default of a callback, such as Timer's `interval`, may be a member of an enumeration, which YAML does not have
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


class Parser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # jsonargparse 4.53 prints the usage of some hundred flags as well
        raise UserError(one_line(re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.", r"\1", message))) from ex

    def format_help(self, *args: Any) -> str:
        # jsonargparse 4.53 names some forty classes for trainer.callbacks alone
        first = self.add_argument_group("most used")
        first._group_actions = [action for action in self._actions if action.dest in MOST_USED]
        self._action_groups = sorted(self._action_groups, key=lambda group: group is not first)
        return re.sub(r",\s+known\s+subclasses:[^)]*", "", super().format_help(*args))


@dataclass
class Settings:
    """The settings of a command, and the checkpoint it begins with."""

    command: str
    line: str  # as typed
    recipe: str  # a name for the settings
    parser: LightningArgumentParser  # the part that is the command's
    config: Any  # as parsed, the command's under its name
    text: str = ""  # the command's as YAML, for config.yaml
    plain: dict[str, Any] = field(default_factory=dict)  # these by dotted key
    name: str | None = None  # of a new run's folder
    checkpoint: Path | None = None
    loaded: dict[str, Any] = field(default_factory=dict)  # its content
    lines: list[str] = field(default_factory=list)  # what is printed: how they differ from the checkpoint's run
    unchanged: bool = True  # whether they are those of the checkpoint's run
    continues: bool = False  # whether the checkpoint's run is resumed in its own folder

    @property
    def own(self) -> Any:
        """The command's part of `config`."""
        return self.config[self.command]

    @property
    def runs(self) -> Path:
        root = self.own["trainer.default_root_dir"] or "."
        return runs.expanded(root, "trainer.default_root_dir") / "lightning_logs"


def parse(parser: LightningArgumentParser, subparser: LightningArgumentParser, args: list[str]) -> Settings:
    """Parse a command line, by a parser and its part for the command, over the settings of a checkpoint's run."""
    defaults = subparser.get_defaults()
    (command, *flags), before = args, dict[str, Any]()
    files, flags = configs_first(flags)
    recipe = "+".join(Path(file).stem for file in files) or "default"
    settings = Settings(command, shlex.join(args), recipe, subparser, parse_args(parser, [command, *flags], files))
    if wanted := settings.own["ckpt_path"]:
        before, base = run_settings(settings, str(wanted))
        # a setting of an older version may be gone
        text = yaml.safe_dump({key: value for key, value in base.items() if key in defaults})
        files = ["the checkpoint's run", *files]
        settings.config = parse_args(parser, [command, "--config", text, *flags], files)
    elif command != "fit":
        raise UserError(f"{command} needs --ckpt_path best, last or the path of a checkpoint")
    if settings.own["trainer.precision"] == "auto":
        settings.own["trainer.precision"], reason = quickest_precision(settings.own["trainer.accelerator"])
        settings.lines.append(f"Precision: {settings.own['trainer.precision']}, as {reason}")
    # The methods that run the trainer pass it on. LightningCLI 2.6 would lay the checkpoint's settings over the flags.
    settings.own["ckpt_path"] = None
    settings.name = name = settings.own.pop("name", None)
    if name is not None and (settings.continues or not name or name.startswith(".") or name != Path(name).name):
        raise UserError(f"--name {shortened(name)}: must be a plain folder name, and of a new run")
    settings.text = subparser.dump(settings.own, skip_unset=False)
    settings.plain = now = flat(yaml.safe_load(settings.text))
    check_fixed(settings, before)
    if command == "fit":
        for key, old in before.items():
            if old != (new := now.get(key, "no longer a setting")):
                settings.lines.append(f"{key}: {shortened(str(old))} -> {shortened(str(new))}")
                settings.unchanged = False
        here, there = flat(conditions(torch.device("cpu"))), flat(runs.section(settings.loaded, "conditions"))
        for key in CONDITIONS & there.keys():
            if there[key] != here[key]:
                other = f"{key.partition('.')[2]}: {shortened(str(there[key]))} -> {here[key]}"
                settings.lines.append(f"{other} (the last bits may differ)")
    return settings


def parse_args(parser: LightningArgumentParser, args: list[str], files: list[str]) -> Any:
    try:
        return parser.parse_args(args)
    except (ValueError, RecursionError) as error:  # jsonargparse does not say which file
        raise UserError(one_line(error) + (f" (in {' or '.join(files)} or a flag)" if files else "")) from error


def configs_first(args: list[str]) -> tuple[list[str], list[str]]:
    """Return the files of `--config`, and the flags with these before all others: in jsonargparse the last wins."""
    files, flags, rest = list[str](), list[str](), iter(args)
    for arg in rest:
        found = re.fullmatch(r"(?:-c|--config(?==|$))=?(.*)", arg, re.DOTALL)
        file = found and (found[1] or next(rest, None))
        (flags if file is None else files).append(arg if file is None else file)
    return files, [*(f"--config={file}" for file in files), *flags]


def run_settings(settings: Settings, wanted: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the checkpoint that `--ckpt_path` means; return the settings that its run had, and those to begin from.

    A fit takes the run's config.yaml, which may name classes; else they are the checkpoint's hyperparameters.
    """
    kind = "last" if settings.command == "fit" else "best"
    try:
        settings.checkpoint = path = find_checkpoint(wanted, settings.runs, kind)
        settings.loaded = loaded = read_checkpoint(path)
    except UserError as error:
        raise UserError(f"--ckpt_path {error}") from error
    folder = runs.run_folder(path)
    settings.continues = bool(folder and (last := runs.newest(folder)) and last.samefile(path))
    settings.lines += runs.checkpoint_lines(wanted, path, settings.runs)
    hparams = plain_settings("model", loaded["hyper_parameters"])
    hparams |= plain_settings("data", loaded["datamodule_hyper_parameters"])
    hparams["seed_everything"] = hparams.pop("data.seed", DEFAULT_SEED)
    hparams = {key: value for key, value in hparams.items() if key not in (*PLACES, "model.classes")}  # the data's
    if settings.command != "fit":
        return hparams, hparams
    if not settings.continues:
        settings.lines.append("A new run: that checkpoint is not the newest state of its run, which stays as it is")
    if not (folder and (file := folder / "config.yaml").is_file()):
        settings.lines.append("Settings: only hyperparameters, as there is no config.yaml of the checkpoint's run")
        return hparams, hparams
    settings.lines.append(f"Settings: {shown(file)}")
    try:
        config = {key: old for key, old in flat(yaml.safe_load(file.read_text())).items() if key not in MACHINE}
    except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{file}: the run's settings cannot be read ({one_line(error)})") from error
    before = config | hparams
    # a resumed run's file may have been edited; for an earlier checkpoint it may have what was set later
    base = hparams | config if settings.continues else before
    return {key: value for key, value in before.items() if key not in PLACES}, base


def plain_settings(prefix: str, settings: Any) -> dict[str, Any]:
    """Return a mapping's plain entries by dotted key: nothing else that a checkpoint may name, classes above all."""
    named = settings.items() if isinstance(settings, dict) else ()
    return {f"{prefix}.{key}": value for key, value in named if type(key) is str and key[:1] != "_" and is_plain(value)}


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration's settings by dotted key, `section.name`."""
    parts = {name: value for name, value in config.items() if isinstance(value, dict)}
    settings = {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
    return {name: config[name] for name in config if name not in parts} | settings


def quickest_precision(accelerator: Any) -> tuple[str, str]:
    """Return the precision that this machine trains fastest in, and why: without units for it bfloat16 is slow."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        device, fast = torch.cuda.get_device_name(), torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # avx512_bf16 alone was no faster than 32 bits; torch 2.10 does not have get_capabilities
        capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()
        device, fast = "the processor", accelerator in ("auto", "cpu") and capabilities.get("amx_bf16")
    return ("bf16-mixed", f"{device} has bfloat16") if fast else ("32-true", f"{device} has no fast bfloat16")


def check_fixed(settings: Settings, before: Mapping[str, Any]) -> None:
    """Refuse settings that would turn the checkpoint's run into another one."""
    now, command = settings.plain, settings.command
    reasons = {key: reason for keys, (commands, reason) in FIXED.items() if command in commands for key in keys}
    if command == "fit":
        reasons |= {key: "a run has it or not" for key in ON_OFF if bool(before.get(key)) != bool(now.get(key))}
        loop = runs.section(runs.section(settings.loaded, "loops"), "fit_loop")
        if not runs.section(loop, "epoch_loop.batch_progress").get("is_last_batch"):
            reasons["data.batch_size"] = "the checkpoint lies within an epoch, whose batches are counted"
    for key, reason in reasons.items():
        if key in before and before[key] != now[key]:
            raise UserError(f"{key} was {before[key]} in this run and cannot become {now[key]}: {reason}")
