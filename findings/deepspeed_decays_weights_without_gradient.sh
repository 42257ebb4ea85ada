#!/usr/bin/env bash
# One would have sworn that AdamW leaves a weight alone that got no gradient, as it does in plain torch: its
# .grad is None, so it is skipped. With the same optimizer handed to deepspeed 0.19.8 (ZeRO stages 0, 1 and
# 2, fp32) such a weight is decayed in every step, and Adam counts the steps for it. A part of a model that
# the loss does not touch (a reward head in a policy's folder, a vision tower, an expert that no token
# reaches) shrinks towards zero while its neighbours are trained, and nothing is said. requires_grad=False
# before initialize() keeps it.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check deepspeed==0.19.8
cd "$dir"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
"$dir/venv/bin/python" - <<'PY'
import os

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops import __compatible_ops__

__compatible_ops__["deepspeed_shm_comm"] = False  # so that no compiler is needed
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/rendezvous", rank=0, world_size=1)
STEPS, LR, DECAY = 10, 0.01, 0.5

def shrinkage(stage, trainable=True):
    """Share left of the unused weight after ten steps: 1 untouched, (1 - LR * DECAY)^10 decayed."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(4, 4), "unused": torch.nn.Linear(4, 4)})
    model.forward = lambda x: model["used"](x).pow(2).sum()
    model["unused"].requires_grad_(trainable)
    before = model["unused"].weight.detach().clone()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=DECAY)
    if stage is not None:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={
            "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True})
    for _ in range(STEPS):
        if stage is None:
            optimizer.zero_grad()
            model(torch.ones(1, 4)).backward()
            optimizer.step()
        else:
            engine.backward(engine(torch.ones(1, 4)))
            engine.step()
    return (model["unused"].weight.detach() / before).mean().item()

left = {f"ZeRO {stage}": shrinkage(stage) for stage in (0, 1, 2)}
plain, frozen = shrinkage(None), shrinkage(2, trainable=False)
print(f"left of the unused weight: torch {plain:.4f}, deepspeed {left}, frozen in ZeRO 2 {frozen:.4f}")
decayed = (1 - LR * DECAY) ** STEPS
assert plain == frozen == 1 and all(abs(share - decayed) < 1e-5 for share in left.values()), decayed
PY
