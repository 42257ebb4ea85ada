#!/usr/bin/env bash
# One would have sworn that a forward pass under autocast uses the weights as they are now. In torch 2.13.0
# autocast("cpu", bfloat16) keeps the bfloat16 copies of float32 weights until the outermost autocast block
# ends, and an optimizer's step inside the block does not renew them. With one block around the training
# loop every forward pass computes with the weights of the first step; gradients and norms look alive, the
# float32 weights move, the loss does not. Nothing fails. An outer block with enabled=False (a flag that is
# off) does the same. Enter autocast in each forward pass, or pass cache_enabled=False.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0
cd "$dir"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
"$dir/venv/bin/python" - <<'PY'
from contextlib import nullcontext

import torch

def losses(outer, cache_enabled=True):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    x, y = torch.randn(64, 8), torch.randn(64, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = model.weight.detach().clone()
    seen = []
    with outer:
        for _ in range(20):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache_enabled):
                loss = torch.nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
    moved = (model.weight - start).abs().max().item()
    return seen[0], seen[-1], moved

results = {
    "autocast in each forward pass": losses(nullcontext()),
    "one block around the loop": losses(torch.autocast("cpu", torch.bfloat16)),
    "an outer block that is switched off": losses(torch.autocast("cpu", torch.bfloat16, enabled=False)),
    "one block, cache_enabled=False": losses(torch.autocast("cpu", torch.bfloat16), cache_enabled=False)}
for name, (first, last, moved) in results.items():
    print(f"{name}: loss {first:.4f} -> {last:.4f}, weights moved by {moved:.3f}")
each, one, off, uncached = results.values()
assert each[0] - each[1] > 0.1 and uncached == each
assert one[0] == one[1] and one[2] > 0.1 and off == one
PY
