"""Shared by the tests: they run stages in this process or as programs, have a process group of one process,
and a server that judges."""
import hashlib
import importlib
import json
import multiprocessing.connection
import os
import re
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
torch.set_num_threads(1)

# programs are forked from a process that has imported the libraries: that takes longer than what they do here
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([
    "conftest", "deepspeed", "torch._dynamo", "transformers.models.llama.modeling_llama",
    "transformers.generation.utils", "transformers.models.auto.modeling_auto", "safetensors.torch",
    "matplotlib.figure", "datasets", "pyarrow.csv", "pyarrow.parquet"])


def run(script, *flags, processes=0, expect=0, launcher=False):
    """Runs a stage on one process, or on several that work together; with `launcher` by DeepSpeed's, as users
    do. Returns its standard error. It computes in fp32 unless told otherwise, so that no figure depends on
    the processor."""
    command = command_line(script, flags)
    if launcher:
        deepspeed = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(processes)]
        done = subprocess.run([*deepspeed, "--master_port", str(free_port()), *command], capture_output=True,
                              text=True, cwd=ROOT, env={name: value for name, value in os.environ.items()
                                                        if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")})
        status, output, errors = done.returncode, done.stdout, done.stderr
    else:
        status, output, errors = ends([(ROOT, command)] * max(1, processes))
    assert status == expect, f"{command} ended with {status}:\n{output[-3000:]}\n{errors[-3000:]}"
    assert output.count(f" {processes} processes\n") <= 1, "every process prints"
    return errors


def call(script, *flags):
    """Runs a stage in this process, in a fifth of a second. As `run` does, in fp32."""
    with mock.patch.object(sys, "argv", command_line(script, flags)):
        importlib.import_module(script.removesuffix(".py")).main()


def command_line(script, flags):
    if script in ("sft.py", "oracle.py", "align.py", "generate.py") and "--dtype" not in flags:
        flags = *flags, "--dtype", "fp32"
    return [script, *map(str, flags)]


def read_jsonl(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def save_rewards(path, data, rewards, oracles=("a", "b")):
    """Writes the rewards.pt of the pairs in `data`: rewards (K, N, 2)."""
    chosen, rejected = rewards.unbind(2)
    torch.save({"chosen": chosen, "rejected": rejected, "oracles": list(oracles),
                "data_sha256": hashlib.sha256(Path(data).read_bytes()).hexdigest()}, path)


def free_port():
    """A port of its own, since two tests may run side by side."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ends(commands):
    """Runs commands, (folder, [script, flag, ...]) each, as processes that work together. Like the launcher,
    it ends all of them soon after one has failed. Returns (status, stdout, stderr) of them together."""
    with tempfile.TemporaryDirectory() as logs:
        shared = {"WORLD_SIZE": len(commands), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        processes = []
        for rank, command in enumerate(commands):
            environ = shared | {"RANK": rank, "LOCAL_RANK": rank} if len(commands) > 1 else {}
            args = f"{logs}/{rank}", *command, environ
            processes.append(CONTEXT.Process(target=child, args=args, daemon=True))
            processes[-1].start()
        running, status = list(processes), 0
        while running and not status:
            ended = multiprocessing.connection.wait([process.sentinel for process in running], timeout=120)
            assert ended, f"{commands} take over two minutes"
            status = max(abs(process.exitcode) for process in running if process.sentinel in ended)
            running = [process for process in running if process.sentinel not in ended]
        for process in running:
            process.join(1)
            process.kill()
            process.join()
        return status, *("".join(Path(f"{logs}/{rank}.{name}").read_text() for rank in range(len(commands)))
                         for name in ("out", "err"))


def child(log, folder, command, environ):
    """A stage, as `python stage.py` runs it."""
    for number, name in enumerate(("out", "err"), 1):
        with open(f"{log}.{name}", "w") as file:
            os.dup2(file.fileno(), number)
    os.chdir(folder)
    torch.set_num_threads(1)
    os.environ |= {name: str(value) for name, value in environ.items()}
    sys.argv, status = [str(ROOT / command[0]), *command[1:]], 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ending:
        status = ending.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


@pytest.fixture(scope="session")
def process_group():
    """What a stage's functions need to run in this process."""
    from align import init_process
    init_process(Namespace(dtype="fp32"))


def together(*calls):
    """Makes these calls, (function, *arguments) each, two at a time. Returns what they return."""
    with ThreadPoolExecutor(2) as pool:
        return [done.result() for done in [pool.submit(*call) for call in calls]]


class Judge:
    """A server of OpenAI's chat completions: decide(a, b) gives an answer; `statuses` are sent first. `body`
    stands in for the whole reply."""

    def __init__(self, decide, statuses=(), body=None):
        self.decide, self.statuses, self.prompts, self.asked = decide, list(statuses), [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = asked["messages"][-1]["content"]
                assert self.path == "/v1/chat/completions"
                status = outer.statuses.pop(0) if outer.statuses else 200
                outer.prompts.append(prompt)
                outer.asked.append(asked)
                pattern = "<response_{0}>\n(.*)\n</response_{0}>"
                shown = [re.search(pattern.format(name), prompt, re.DOTALL)[1] for name in "AB"]
                message = {"role": "assistant", "content": outer.decide(*shown)}
                reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "toy-judge",
                         "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
                if status != 200:
                    reply = {"error": {"message": f"no such luck, {self.headers['Authorization']}"}}
                reply = json.dumps(reply).encode() if body is None else body
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
