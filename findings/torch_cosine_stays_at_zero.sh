#!/usr/bin/env bash
# torch 2.15.0: a training of 10 epochs under CosineAnnealingLR that is resumed for 20 runs its last 10 at rate 0.
#
# Likely guess: the rate is a function of the epoch and T_max, so with T_max=20 epochs 11 to 20 follow the second half
#               of the longer cosine, as they do with LambdaLR.
# Behaviour:    two traps in a row. `load_state_dict` brings the old T_max back, over that of the new scheduler, and the
#               rate climbs from 0 to its first value again. With T_max=20 set after it, each step multiplies the rate
#               before it, which is exactly 0 (eta_min): the ten epochs train nothing, silently. PolynomialLR with a
#               raised total_iters does the same. Past T_max the cosine's rate leaves 0, by a branch for that step only.
# Seen (rates of epochs 11, 12, 15, 19, 20):
#   cosine, T_max=20 then load_state_dict: 0.024 0.095 0.500 0.976 1.000
#   cosine, T_max=20 after load_state_dict: 0.000 0.000 0.000 0.000 0.000
#   polynomial, total_iters=20 after load_state_dict: 0.000 0.000 0.000 0.000 0.000
#   lambda with the cosine of 20: 0.422 0.345 0.146 0.006 0.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.15.0' 'numpy<3'
"$folder/venv/bin/python" - <<'P' | tee "$folder/seen"
from math import cos, pi

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, PolynomialLR


def resume(title, make, **changed):
    """Train for 10 epochs, resume as if for 20, and print the rates."""
    rates, states = [], None
    for epochs in (10, 20):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        scheduler = make(optimizer, epochs)
        if states:
            optimizer.load_state_dict(states[0])
            scheduler.load_state_dict(states[1])
            for name, value in changed.items():
                setattr(scheduler, name, value)
        for _ in range(10):
            optimizer.step()
            scheduler.step()
            rates.append(scheduler.get_last_lr()[0])
        states = optimizer.state_dict(), scheduler.state_dict()
    print(f"{title}:", *(f"{rates[epoch - 1]:.3f}" for epoch in (11, 12, 15, 19, 20)))


resume("cosine, T_max=20 then load_state_dict", CosineAnnealingLR)
resume("cosine, T_max=20 after load_state_dict", CosineAnnealingLR, T_max=20)
resume("polynomial, total_iters=20 after load_state_dict", PolynomialLR, total_iters=20)
resume(
    "lambda with the cosine of 20",
    lambda optimizer, epochs: LambdaLR(optimizer, lambda epoch: (1 + cos(pi * epoch / epochs)) / 2),
)
P
diff "$folder/seen" <(sed -n '/^# Seen/,/^set /s/^#   //p' "$0")
