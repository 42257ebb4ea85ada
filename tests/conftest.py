"""Shared by the tests: the scripts are importable, and one process group of one process is there."""
import os
import socket
import subprocess
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)


def run(script, *flags, processes=0, expect=0):
    """Runs a stage as a user does: by `python`, or by the launcher on so many processes. Returns its standard error.
    It computes in fp32 unless told otherwise, so that no figure depends on the processor."""
    if script in ("sft.py", "oracle.py", "align.py", "generate.py") and "--dtype" not in flags:
        flags = *flags, "--dtype", "fp32"
    command = [sys.executable, str(ROOT / script)]
    if processes:
        with socket.socket() as free:  # of its own, since two tests may run side by side
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(processes), "--master_port", str(port),
                   str(ROOT / script)]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(command + [str(flag) for flag in flags], capture_output=True, text=True, cwd=ROOT,
                          env={**alone, "OMP_NUM_THREADS": "1"})
    assert done.returncode == expect, f"{script} {flags} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stderr


@pytest.fixture(scope="session")
def process_group():
    """What a stage's functions need to run in this process."""
    from align import init_process
    init_process(Namespace(dtype="fp32"))


def together(*calls):
    """Makes these calls, (function, *arguments) each, two at a time. Returns what they return."""
    with ThreadPoolExecutor(2) as pool:
        return [done.result() for done in [pool.submit(*call) for call in calls]]
