"""Malformed checkpoints: a sound one, and something in its tree, or in the bytes of its file, made otherwise."""

from __future__ import annotations

import gzip
import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .sandbox import WORK, checkpoint

Key = Any
HUGE = (2**31, 2**63 - 1, 2**64, 10**30, 1e300, -(2**31), -(10**30))
STRINGS = (
    "",
    "x",
    "x" * 5000,
    "a\nb",
    "\x00",
    "é\u2028",
    "../../x",
    "/etc/passwd",
    "../elsewhere/empty",
    "1",
    "nan",
    "--x",
)
NEEDED = ("state_dict", "hyper_parameters", "datamodule_hyper_parameters", "epoch", "global_step")
NEEDED_TO_FIT = ("loops", "callbacks", "optimizer_states", "lr_schedulers", "settings", "processes")
MISSING = object()


class Evil:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch run-by-a-pickle",)


def nested(depth: int, inner: Any = 1) -> Any:
    for level in range(depth):
        inner = {"a": inner} if level % 2 else [inner]
    return inner


def draw(rng: Random, template: Path) -> Case:
    run, name = rng.choice([(0, "best"), (0, "last"), (1, "best"), (1, "last"), (1, "last"), (1, "last")])
    original = checkpoint(template, run, name)
    path = str(original.relative_to(template / WORK))
    wanted = name if run == 1 and rng.random() < 0.7 else path
    args = rng.choices(
        [["fit"], ["fit", "--trainer.max_epochs", "3"], ["test"], ["validate"], ["predict"], ["export"]],
        [8, 8, 3, 3, 3, 1],
    )[0]
    args = [args[0], "--ckpt_path", wanted, *args[1:]]
    args += ["--output", "out.pt2"] if args[0] == "export" else ["--trainer.accelerator", "cpu"]
    if rng.random() < 0.12:
        content, note, expected = _of_file(rng, original.read_bytes())
    else:
        tree = torch.load(original, map_location="cpu", weights_only=True)
        changes = [_mutate(rng, tree) for _ in range(rng.choice([1, 1, 1, 1, 2, 3]))]
        note = "; ".join(f"{'/'.join(map(str, keys))} := {how}" for keys, how in changes)
        content = _saved(tree, legacy=rng.random() < 0.03)
        needed = NEEDED + (NEEDED_TO_FIT if args[0] == "fit" else ())
        lacking = [keys for keys, how in changes if len(keys) == 1 and keys[0] in needed and how in ("missing", "None")]
        expected = 2 if lacking else None
        endless = any("max_" in str(keys[-1]) or len(keys) < 3 for keys, _ in changes)
        if endless and args[0] == "fit" and "3" not in args:
            args += ["--trainer.max_epochs", "3"]  # a training without an end, where that is asked for, is no fault
    return Case(args, expected, note, prepare=[lambda folder: _write(folder / WORK / path, content)])


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _saved(tree: Any, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(tree, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


# Of the tree


def _mutate(rng: Random, tree: Any) -> tuple[list[Key], str]:
    """Change one thing, and say what. Each branch is as likely as its neighbours, however many leaves it has."""
    keys: list[Key] = []
    parents: list[Any] = []
    node = tree
    while (inside := _keys(node)) and (not keys or rng.random() < 0.8):
        keys.append(rng.choice(inside))
        parents.append(node)
        node = node[keys[-1]]
    value, how = _changed(rng, node, parents[-1], keys[-1])
    for parent, key in zip(reversed(parents), reversed(keys), strict=True):
        if isinstance(parent, tuple):  # a new one, which goes into its parent
            value = tuple(v for i, v in enumerate((*parent[:key], value, *parent[key + 1 :])) if v is not MISSING)
            continue
        if value is MISSING:
            del parent[key]
        else:
            parent[key] = value
        break
    return keys, how


def _keys(node: Any) -> list[Key]:
    if isinstance(node, dict):
        return list(node)
    return list(range(len(node))) if isinstance(node, (list, tuple)) else []


def _changed(rng: Random, node: Any, parent: Any, key: Key) -> tuple[Any, str]:
    others: list[Any] = [None, 0, 1, -1, 0.5, "x", True, [], {}, [1, 2], {"a": 1}, 1j, b"x", (), torch.tensor(3)]
    others += [torch.zeros(2, 3), float("nan"), math.inf, torch.tensor(math.nan), nested(10), nested(300)]
    general: list[tuple[Any, str]] = [(MISSING, "missing"), *((other, _short(other)) for other in others)]
    special: list[tuple[Any, str]] = []
    with suppress(Exception):  # what an earlier change has left may not bear all of it
        special = _special(node)
    if isinstance(parent, dict):
        like = [other for other in parent if type(parent[other]) is type(node) and other != key]
        if like:
            other = rng.choice(like)
            special.append((parent[other], f"what {other!s:.60} is"))
    return rng.choice(special if special and rng.random() < 0.6 else general)


def _special(node: Any) -> list[tuple[Any, str]]:
    """What is wrong for this one, and how."""
    if isinstance(node, Tensor):
        return _tensors(node)
    special: list[tuple[Any, str]] = []
    if isinstance(node, (bool, int, float)):
        numbers = (*HUGE, -1, -abs(node) - 1, node + 1, float(node), math.nan, -math.inf)
        special = [(value, _short(value)) for value in numbers]
        special += [(str(node), "as a string"), (torch.tensor(node), "as a tensor"), (complex(node), "as complex")]
    elif isinstance(node, str):
        special = [(value, _short(value)) for value in STRINGS]
        special += [(node + " ", "with a space"), (node.upper(), "upper case")]
    elif isinstance(node, dict):
        special = [({**node, "unknown": 1}, "with an unknown key"), ({**node, 5: 1}, "with a key 5")]
        special += [({**node, None: nested(10)}, "with a key None"), (list(node.items()), "as a list")]
        if node:
            first, *rest = node.items()
            renamed = {f"{first[0]}x": first[1], **dict(rest)}
            special += [(renamed, "first key renamed"), (dict(rest), "first key missing")]
    elif isinstance(node, (list, tuple)):
        same = type(node)
        special = [(same([*node, *node]), "twice as long"), (same(node[:-1]), "shorter")]
        special += [(same([*node, None]), "None added")]
        special += [(list(node) if same is tuple else tuple(node), "list for tuple or the reverse"), (same(), "empty")]
    return special


def _short(value: Any) -> str:
    return f"{value!r:.60}".replace("\n", " ")


def _tensors(tensor: Tensor) -> list[tuple[Any, str]]:
    """A tensor otherwise, and how."""
    flat = tensor.detach().clone()
    special = [(flat.to(dtype), f"as {dtype}") for dtype in (torch.int64, torch.bool, torch.float64, torch.float16)]
    special += [(flat.to(dtype), f"as {dtype}") for dtype in (torch.complex64, torch.uint8, torch.bfloat16)]
    special += [(flat[None], "with a dimension more"), (flat.flatten()[:0], "empty"), (flat.sum(), "of no dimension")]
    special += [(flat.repeat(2, *[1] * max(0, flat.ndim - 1)), "twice as long"), (flat.to_sparse(), "sparse")]
    special += [
        (torch.stack([flat, flat], -1)[..., 0], "not contiguous"),
        (torch.empty_like(flat, device="meta"), "meta"),
    ]
    special += [
        (torch.cat([flat.flatten(), torch.zeros(9)])[: flat.numel()].view(flat.shape), "a view of a larger storage")
    ]
    special += [
        (-flat.float() - 1, "negative"),
        (flat.float() * 1e30, "huge"),
        (torch.full((2,) * 6, 1.0), "of 6 dimensions"),
    ]
    special += [(torch.full_like(flat.float(), fill), f"all {fill}") for fill in (math.nan, math.inf, 0.0)]
    special += [
        (flat.float().requires_grad_(), "that requires grad"),
        (torch.nn.Parameter(flat.float()), "a parameter"),
    ]
    special += [
        (flat.float().flatten()[0].expand(100, 100), "expanded"),
        (flat.T if flat.ndim == 2 else flat.flatten(), "reshaped"),
    ]
    return [*special, (flat.tolist(), "as a list"), (torch.arange(5).numpy().tolist(), "a list of 5")]


# Of the file


def _of_file(rng: Random, content: bytes) -> tuple[bytes, str, int | None]:
    """Its bytes otherwise, how, and the status that is right, where it is known."""
    place = rng.randrange(len(content))
    added = io.BytesIO(content)
    with zipfile.ZipFile(added, "a") as archive:
        archive.writestr("archive/extra" if rng.random() < 0.5 else "../../extra", b"x")
    flipped = content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    return rng.choice(
        [
            (content[:place], f"file truncated at {place}", 2),
            (flipped, f"file with a bit flipped at {place}", None),
            (added.getvalue(), "file with an entry more", None),
            (b"", "file empty", 2),
            (b"no checkpoint\n", "file of text", 2),
            (pickle.dumps({"state_dict": {}}), "file a plain pickle", 2),
            (pickle.dumps(Evil()), "file a pickle that runs a command", 2),
            (_saved({**loaded, "callbacks": Evil()}), "file with a pickle in it that runs a command", 2),
            (_saved({**loaded, "state_dict": Evil()}, legacy=True), "legacy file that runs a command", 2),
            (gzip.compress(content), "file compressed", 2),
            (_saved(loaded, legacy=True), "legacy file", None),
            (_saved([loaded]), "file with a list", 2),
            (_saved(loaded["state_dict"]), "file with weights alone", 2),
            (content + content, "file twice", None),
        ]
    )
