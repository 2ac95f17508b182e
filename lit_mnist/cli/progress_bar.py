"""What a terminal shows while a fit runs: the network's layers and the progress bar."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.utilities.model_summary.model_summary import ModelSummary
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from torchmetrics import Metric, MetricCollection

from lit_mnist.exact.console import print_table


class NetworkSummary(Callback):
    """Prints the layers of the network, those of Lightning's model table without the metrics."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        summary = ModelSummary(pl_module, max_depth=-1)
        inner = {name for name, part in pl_module.named_modules() if len(list(part.children()))}
        metrics = {n for n, part in pl_module.named_modules() if isinstance(part, (Metric, MetricCollection))}
        table = Table("layer", "type", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("parameters", justify="right")
        for name, kind, parameters in zip(summary.layer_names, summary.layer_types, summary.param_nums, strict=True):
            if name not in inner and name.partition(".")[0] not in metrics:
                table.add_row(name, kind, f"{parameters:,}" if parameters else "")
        table.add_row("all", "", f"{summary.total_parameters:,}")
        print_table(table)


class OneLineBar(RichProgressBar):
    """RichProgressBar that fits into 80 columns, with an accuracy in percent and without the version's number."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=10)

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        bar = BarColumn(bar_width=10)
        return [TextColumn("{task.description}"), bar, MofNCompleteColumn(), TimeRemainingColumn(compact=True)]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return {
            name: f"{100 * value:.2f} %" if name.endswith("accuracy") and isinstance(value, float) else value
            for name, value in items.items()
        }
