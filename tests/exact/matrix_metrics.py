"""The metrics of the matrix: made of ALWAYS and REQUIRED, or by OWN, and updated with the first form that they take."""

import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import cache, partial
from importlib import import_module
from inspect import Parameter, isclass, signature
from pkgutil import walk_packages
from typing import Any
from unittest.mock import patch

import matrix
import torch
import torchmetrics
from helpers import fail
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection, classification, image
from torchmetrics.wrappers import MetricTracker


class Features(nn.Module):
    """Stands for the pretrained network of a metric: features (B, 8) of images (B, 3, H, W)."""

    num_features = 8

    def forward(self, images: Tensor) -> Tensor:
        return images.float().flatten(1)[:, :8] + images.float().mean((1, 2, 3))[:, None]


accuracy = partial(classification.MulticlassAccuracy, 3, average="micro")
ALWAYS: dict[str, Any] = {"num_classes": 3, "num_labels": 3, "feature": Features(), "subset_size": 4, "load_diag": 1e-3}
REQUIRED: dict[str, Any] = {
    **{"task": "multiclass", "num_outputs": 2, "num_groups": 2, "beta": 0.5, "p": 3, "data_range": 1.0, "fs": 8000},
    **{"personalized": False, "mode": "nb"},
    **dict.fromkeys(("min_recall", "min_precision", "min_specificity", "min_sensitivity", "threshold"), 0.5),
    **{"things": {0, 1}, "stuffs": {2}, "mouth_map": [0, 1], "metric_func": torchmetrics.functional.signal_noise_ratio},
    **{name: accuracy() for name in ("base_metric", "metric", "wrapped_metric")},
}
OWN: dict[str, Any] = {
    "MultitaskWrapper": lambda kind: kind({"a": accuracy(), "b": torchmetrics.MeanSquaredError()}),
    "MetricCollection": lambda kind: kind({"a": accuracy(), "b": classification.MulticlassPrecision(3)}),
    "ClasswiseWrapper": lambda kind: kind(classification.MulticlassAccuracy(3, average=None)),
    "MultioutputWrapper": lambda kind: kind(torchmetrics.MeanSquaredError(), 3),
    "FeatureShare": lambda kind: kind([image.MemorizationInformedFrechetInceptionDistance(Features())]),
    "CompositionalMetric": lambda kind: accuracy() + classification.MulticlassPrecision(3),
    "MeanIoU": lambda kind: kind(),  # which adds states when it sees how many classes there are
}


def forms(seed: int) -> Iterator[tuple[Any, ...]]:
    """Give a batch of 8 in each form that metrics take; what few take comes first."""
    generator = torch.Generator().manual_seed(seed)
    logits, images = torch.randn(8, 3, generator=generator), torch.rand(8, 3, 16, 16, generator=generator)
    targets = (logits + 2 * torch.randn(8, 3, generator=generator)).argmax(1)
    other, one_hot = 0.9 * images + 0.05 * logits.sigmoid()[:, :, None, None], nn.functional.one_hot(targets, 3)
    scores, truth, labels = logits.softmax(1), targets.float(), logits.argmax(1)
    words = ["the", "cat", "sat", "on", "a", "mat"]
    said, meant = ([" ".join(words[n:]) for n in each.tolist()] for each in (labels, targets))
    named = [{"prediction_text": text, "id": str(number)} for number, text in enumerate(said)]
    yield named, [{"answers": {"answer_start": [1], "text": [t]}, "id": str(n)} for n, t in enumerate(meant)]
    yield said, meant
    yield {"a": scores, "b": logits[:, 0]}, {"a": targets, "b": truth}
    places = torch.tensor([[1.0, 1, 5, 5]]) + logits[:, :1, None].sigmoid()
    kept = [{"boxes": place, "labels": label[None]} for place, label in zip(places.round(), targets, strict=True)]
    found = zip(places, scores.amax(1), targets, strict=True)
    yield [{"boxes": place, "scores": score[None], "labels": label[None]} for place, score, label in found], kept
    yield logits[:, 0].sigmoid(), (targets > 1).long()
    yield logits[:, 0].sigmoid(), (targets > 1).long(), torch.arange(8) // 4
    yield scores, targets
    yield scores, (one_hot + one_hot.roll(1)).clamp(max=1)
    yield labels, targets
    yield scores[:, :, None].repeat(1, 1, 3), targets[:, None].repeat(1, 3)
    yield logits[:, 0], truth
    yield (logits[:, 0],)
    yield other, images
    yield other, {"ms": images[..., ::2, ::2], "pan": images}
    yield images[:2, :1].repeat(1, 1, 12, 12), other[:2, :1].repeat(1, 1, 12, 12)
    yield images, True
    yield (images,)
    yield images.flatten(2)[..., :64], other.flatten(2)[..., :64]
    yield images[:, :2].reshape(8, 2, 128, 2), other[:, :2].reshape(8, 2, 128, 2)
    yield ((scores * 9).long() + 1,)
    yield torch.stack([labels, labels], 1)[None], torch.stack([targets, labels], 1)[None]


@cache
def found() -> dict[str, Any]:
    """Return the public classes of torchmetrics by name, also those that it hides where a package is missing."""
    for room in walk_packages(torchmetrics.__path__, "torchmetrics."):
        with suppress(ImportError):
            import_module(room.name)
    rooms = [vars(room) for name, room in sorted(sys.modules.items()) if name.partition(".")[0] == "torchmetrics"]
    return {
        name: kind
        for room in rooms
        for name, kind in sorted(room.items())
        if name[0] != "_" and isclass(kind) and issubclass(kind, Metric | MetricCollection | MetricTracker)
        if kind is not Metric and (name in room.get("__all__", ()) or not kind.__subclasses__())
    }


def make(kind: Any) -> Any:
    if kind.__name__ in OWN:
        return OWN[kind.__name__](kind)
    taken = signature(kind.__new__ if "__new__" in vars(kind) else kind).parameters
    required = {name: REQUIRED[name] for name in REQUIRED if name in taken and taken[name].default is Parameter.empty}
    return kind(**{name: value for name, value in ALWAYS.items() if name in taken}, **deepcopy(required))


def update(metric: Any, form: tuple[Any, ...]) -> None:
    if isinstance(metric, MetricTracker):
        metric.increment()
    metric.update(*form)
    if form[-1] is True:  # real images and generated ones
        metric.update(form[0].flip(0) * 0.9, False)


@cache
def form_of(kind: Any) -> Any:
    """Return the number of the form that a class takes, or what is missing here to make it; ValueError for none."""
    for number, form in enumerate(forms(0)):
        try:
            with patch.object(socket, "getaddrinfo", partial(fail, OSError())):
                metric = make(kind)
                update(metric, form)
                metric.compute()
                return number
        except OSError:
            return "needs a download"
        except Exception as error:
            if isinstance(error, ImportError) or "nstall" in str(error):
                return "needs a package"
    raise ValueError(f"{kind.__name__} takes no form")


class Measured(matrix.Trained):
    """Updates metrics in each step, and notes their values at each epoch's end."""

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        super().__init__()
        self.metrics: Any = nn.ModuleDict(metrics)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batches = list(forms(self.global_step))
        for metric in self.metrics.values():
            update(metric, batches[form_of(metric.__class__)])
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        for name, metric in self.metrics.items():
            value = metric.compute_all() if isinstance(metric, MetricTracker) else metric.compute()
            self.notes[f"{name}/{self.current_epoch}"] = value
            if self.current_epoch == 0:  # one epoch begins anew, and one continues
                metric.reset()


def verdicts(names: Sequence[str]) -> Iterator[matrix.Row]:
    """Give the verdicts of classes that are tried together, and of each half where any of them is not exact."""
    forms = {name: form_of(found()[name]) for name in names}
    known = [name for name, form in forms.items() if isinstance(form, int)]
    yield from (("metric", name, "not tried", forms[name]) for name in names if name not in known)
    if known:
        what, why = matrix.verdict(lambda: [Measured({name: make(found()[name]) for name in known})])
        if what == "exact" or len(known) == 1:
            yield from (("metric", name, what, why) for name in known)
        else:
            yield from verdicts(known[::2])
            yield from verdicts(known[1::2])
