#!/usr/bin/env bash
# One would have sworn that deepspeed.initialize() takes no optimizer step. In deepspeed 0.19.8 with bf16
# and ZeRO stage 0 it takes one, on gradients of zero: the fp32 masters are decayed once and Adam's counter
# starts at 1, so its bias corrections are a step ahead and the first real update is about three quarters of
# the learning rate. Stages 1 and 2 do not. Two runs that differ in the ZeRO stage alone therefore part at
# the first step.
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
LR, DECAY = 0.01, 0.5
for stage in (0, 1, 2):
    model = torch.nn.Linear(4, 4, bias=False)
    torch.nn.init.ones_(model.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True})
    master = optimizer.param_groups[0]["params"][0]
    start = master.detach().flatten()[0].item()
    steps = sum(int(state["step"]) for state in optimizer.state.values())
    engine.backward(engine(torch.ones(1, 4, dtype=torch.bfloat16)).sum())
    engine.step()
    update = (start * (1 - LR * DECAY) - master.detach().flatten()[0].item()) / LR
    print(f"ZeRO {stage}: after initialize() a weight of 1 is {start:.4f}, Adam has counted {steps} steps; "
          f"the first update is {update:.3f} of the learning rate")
    if stage == 0:
        assert steps == 1 and abs(start - (1 - LR * DECAY)) < 1e-6 and abs(update - 0.744) < 0.01
    else:
        assert steps == 0 and start == 1 and abs(update - 1) < 0.01
PY
