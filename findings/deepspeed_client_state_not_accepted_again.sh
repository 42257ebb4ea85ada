#!/usr/bin/env bash
# One would have sworn that load_checkpoint returns the client_state that save_checkpoint was given, so that
# a resumed run may count on in it and save it again. deepspeed 0.19.8 returns it among a dozen keys of its
# own, and refuses that dictionary at the next save: KeyError, reserved key checkpoint_parallel_dimensions.
# The error comes hours later, at the first checkpoint after the resume. Take your own keys out of what
# load_checkpoint returns.
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
model = torch.nn.Linear(4, 4)
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config={
    "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True})
engine.backward(engine(torch.ones(1, 4)).sum())
engine.step()
engine.save_checkpoint("checkpoint", tag="step1", client_state={"epoch": 3})
_, state = engine.load_checkpoint("checkpoint")
print("saved: epoch; loaded:", ", ".join(state))
state["epoch"] += 1
try:
    engine.save_checkpoint("checkpoint", tag="step2", client_state=state)
    message = "none"
except KeyError as error:
    message = str(error)
print("error at the next save:", message)
assert len(state) > 5 and "reserved" in message and "checkpoint_parallel_dimensions" in message
engine.save_checkpoint("checkpoint", tag="step2", client_state={"epoch": state["epoch"]})
PY
