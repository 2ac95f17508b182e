#!/usr/bin/env bash
# torch 2.15.0, CPU: `load_state_dict` of an optimizer rounds the states of NAdam and ASGD that are single numbers to the
# type of their parameter.
#
# Likely guess: `optimizer.load_state_dict(optimizer.state_dict())` continues bit for bit. It does for Adam and AdamW,
#               whose one number, `step`, is spared by its name.
# Behaviour:    with bfloat16 weights NAdam's `mu_product` and ASGD's `eta` and `mu`, float32 tensors without dimensions,
#               come back as bfloat16, silently: a resumed training takes other steps.
# Seen:
#   Adam   step       float32 3.0 -> float32 3.0
#   NAdam  mu_product float32 0.09121428430080414 -> bfloat16 0.09130859375
#   ASGD   eta        float32 0.009999977424740791 -> bfloat16 0.010009765625
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.15.0' 'numpy<3'
"$folder/venv/bin/python" - <<'P' | tee "$folder/seen"
import torch


def named(state):
    return f"{str(state.dtype).removeprefix('torch.')} {state.item()}"


for kind, name in ((torch.optim.Adam, "step"), (torch.optim.NAdam, "mu_product"), (torch.optim.ASGD, "eta")):
    weights = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = kind([weights], lr=0.01)
    for _ in range(3):
        weights.grad = torch.ones_like(weights)
        optimizer.step()
    before = named(optimizer.state[weights][name])
    copy = torch.nn.Parameter(weights.detach().clone())
    resumed = kind([copy], lr=0.01)
    resumed.load_state_dict(optimizer.state_dict())
    print(f"{kind.__name__:<6} {name:<10} {before} -> {named(resumed.state[copy][name])}")
P
diff "$folder/seen" <(sed -n '/^# Seen:/,/^set /s/^#   //p' "$0")
