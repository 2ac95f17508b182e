#!/usr/bin/env bash
# torch 2.15.0, CPU, Linux: a DataLoader whose dataset holds a torch.Generator ends its workers, unless they are forked.
#
# Likely guess: a torch.Generator can be pickled, so a dataset that has one in an attribute works with any start method.
# Behaviour:    it is pickled with its state, a tensor, and a spawned worker cannot rebuild that tensor's shared memory:
#               "unable to resize file <filename not specified> to the right size", and the loader raises that a worker
#               exited unexpectedly. `spawn` is the default elsewhere, and `forkserver` on Linux from Python 3.14.
#               numpy's generator and Python's are sent.
# Seen:
#   fork       torch   [0, 1]
#   spawn      numpy   [0, 1]
#   spawn      torch   RuntimeError
#   forkserver torch   RuntimeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.15.0' 'numpy<3'
cat > "$folder/try.py" <<'P'
import numpy
import torch
from torch.utils.data import DataLoader

MADE = {"torch": torch.Generator, "numpy": numpy.random.default_rng}


class Data(torch.utils.data.Dataset):
    def __init__(self, kind):
        self.generator = MADE[kind]()

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return index


if __name__ == "__main__":
    for method, kind in (("fork", "torch"), ("spawn", "numpy"), ("spawn", "torch"), ("forkserver", "torch")):
        try:
            seen = next(iter(DataLoader(Data(kind), 2, num_workers=1, multiprocessing_context=method))).tolist()
        except RuntimeError as error:
            seen = type(error).__name__
        print(f"{method:<10} {kind:<7} {seen}")
P
"$folder/venv/bin/python" "$folder/try.py" 2> /dev/null | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Seen:/,/^set /s/^#   //p' "$0")
