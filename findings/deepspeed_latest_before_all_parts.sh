#!/usr/bin/env bash
# One would have sworn that `latest`, the file that tells a resumed run which checkpoint to load, is written
# once the checkpoint is complete on every process. deepspeed 0.19.8 has no barrier in front of it: rank 0
# writes its own parts and then `latest`, while another rank may still be at its part of the optimizer. Here
# rank 1's save waits (as a slow disk would make it) until it sees `latest`; it names a step whose rank 1
# part does not exist yet. A job that ends in that moment can not be resumed from what `latest` says. Keep
# the checkpoint before, or write the name yourself after a barrier (save_latest=False).
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check deepspeed==0.19.8
cd "$dir"
cat > save.py <<'PY'
import os
import time

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops import __compatible_ops__

__compatible_ops__["deepspeed_shm_comm"] = False  # so that no compiler is needed
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/rendezvous", rank=rank, world_size=2)
torch.manual_seed(0)
model = torch.nn.Linear(8, 8)
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config={
    "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True})
engine.backward(engine(torch.ones(1, 8)).sum())
engine.step()
save = engine.checkpoint_engine.save
seen = []

def slow_save(state_dict, path):
    deadline = time.time() + 20
    while time.time() < deadline and not os.path.exists("checkpoint/latest"):
        time.sleep(0.1)
    seen.append((os.path.exists("checkpoint/latest"), os.path.exists(path)))
    print("rank 1 is about to write", os.path.basename(path))
    print(f"latest exists: {seen[-1][0]}; rank 1's file exists: {seen[-1][1]}")
    save(state_dict=state_dict, path=path)

if rank == 1:
    engine.checkpoint_engine.save = slow_save
engine.save_checkpoint("checkpoint", tag="step1")
if rank == 1:
    assert seen == [(True, False)], seen
    print("after save_checkpoint:", sorted(os.listdir("checkpoint/step1")))
PY
export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu WORLD_SIZE=2 LOCAL_SIZE=2
RANK=0 LOCAL_RANK=0 "$dir/venv/bin/python" save.py & other=$!
RANK=1 LOCAL_RANK=1 "$dir/venv/bin/python" save.py
wait "$other"
