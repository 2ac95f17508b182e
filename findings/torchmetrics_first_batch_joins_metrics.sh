#!/usr/bin/env bash
# torchmetrics 1.9.0, torch 2.15.0, CPU: a MetricCollection gives a metric the values of another for good, if both have
# counted the same in the first batch.
#
# Likely guess: `MetricCollection([a, b])` gives what `a` and `b` give alone; compute groups, on by default, only save
#               time for metrics with the same states, such as precision and recall.
# Behaviour:    states are compared by value after the first update. Two metrics of one class with other arguments agree
#               on an easy first batch; from then on only the first is updated, and `reset` does not part them. So
#               an accuracy at a threshold of 0.9 is that at 0.5. How they are grouped is in no state_dict: a resumed training
#               groups anew, and gives yet other values. `compute_groups=False` avoids both.
# Seen (a batch of 0.99, and then one of 0.7, which at 0.9 is wrong):
#   alone:                at5 1.00, at9 0.50
#   collection:           at5 1.00, at9 1.00, groups {0: ['at5', 'at9']}
#   after reset:          at5 1.00, at9 1.00
#   compute_groups=False: at5 1.00, at9 0.50
set -euo pipefail
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torchmetrics==1.9.0' 'torch==2.15.0' 'numpy<3'
cd "$folder"
venv/bin/python - <<'P' | tee seen
import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy

easy, hard, targets = torch.full((4,), 0.99), torch.full((4,), 0.7), torch.ones(4, dtype=torch.long)


def made():
    return {f"at{tenths}": BinaryAccuracy(tenths / 10) for tenths in (5, 9)}


def show(title, values, more=""):
    print(f"{title + ':':<21} {', '.join(f'{name} {value:.2f}' for name, value in values.items())}{more}")


alone = made()
for scores in (easy, hard):
    for metric in alone.values():
        metric.update(scores, targets)
show("alone", {name: metric.compute() for name, metric in alone.items()})
collection, separate = MetricCollection(made()), MetricCollection(made(), compute_groups=False)
for scores in (easy, hard):
    collection.update(scores, targets)
    separate.update(scores, targets)
show("collection", collection.compute(), f", groups {collection.compute_groups}")
collection.reset()
collection.update(hard, targets)
show("after reset", collection.compute())
show("compute_groups=False", separate.compute())
P
diff seen <(sed -n '/^# Seen/,/^set /s/^#   //p' "$script")
