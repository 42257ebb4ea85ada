"""Kills the stages at random moments, starts them again, and compares with runs that were not killed.

    python tests/chaos.py                                     # 30 kills a run: an hour on two cores
    python tests/chaos.py --runs dpo drdo --kills 7 --seed 1

A training stage gets SIGKILL at a random time after one of four events: its start, its first log line, a new
checkpoint, the first file of the final model. A run that left a checkpoint goes on by `--resume --out FOLDER`
alone. One that left none is started anew. In the end weights and log must equal, bit for bit, those of the
run that was not killed, but for the log's wall-clock figures. --resume without a checkpoint must be refused,
and so must a fresh start in a folder that holds a checkpoint or a finished model.

generate.py and precompute_rewards.py are killed at any time and while they write. Their output must be whole
or absent. Exit status 1 on any difference.
"""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from shutil import rmtree

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import torch
import toy
from conftest import ROOT, free_port

TRAINING = ("--model base --data train.jsonl --eval_data validation.jsonl --batch_size 8 "
            "--micro_batch_size 2 --max_steps 15 --learning_rate 1e-3 --dtype fp32 --log_steps 1 "
            "--eval_steps 7 --save_steps 4")
COMMANDS = {
    "sft": f"python sft.py {TRAINING}",
    "oracle": f"python oracle.py {TRAINING}",
    "dpo": f"python align.py --loss dpo {TRAINING}",
    "drdo": f"deepspeed --num_gpus 2 align.py --loss drdo --oracle_rewards rewards.pt {TRAINING}",
    "generate": "python generate.py --model base --prompts prompts.jsonl --max_new_tokens 8 --dtype fp32",
    "score": "python precompute_rewards.py --oracle oracle --data train.jsonl",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=COMMANDS, choices=COMMANDS, help="(default: all)")
    parser.add_argument("--kills", type=int, default=30, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    failed = False
    print("| run | kills, by the event before | differences |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_inputs()
        for name in args.runs:
            kills, differences = torment(COMMANDS[name], args.kills, random.Random(f"{args.seed} {name}"))
            events = ", ".join(f"{event} {kills.count(event)}" for event in sorted({*kills}))
            print(f"| {name} | {events} | {len(differences)} |", *differences, sep="\n", flush=True)
            failed |= bool(differences)
    sys.exit(failed)


def write_inputs():
    """What the stages read: a tiny LM, an Oracle, pairs, rewards."""
    tokenizer = toy.make_tokenizer()
    lm = toy.make_model(tokenizer)
    for folder in ("base", "oracle"):
        lm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        lm.score = torch.nn.Linear(lm.config.hidden_size, 1, bias=False)
        lm.config.num_labels = 1
    pairs = toy.make_pairs(30, seed=1)
    toy.write_jsonl("train.jsonl", pairs)
    toy.write_jsonl("validation.jsonl", toy.make_pairs(12, seed=2))
    # generate.py copies other keys: the large file that it writes takes long enough to be hit
    toy.write_jsonl("prompts.jsonl", [{"prompt": pair["prompt"], "long": "x" * 300_000} for pair in pairs])
    Path("ds_config.json").write_text((ROOT / "ds_config.json").read_text())
    assert start(COMMANDS["score"], "rewards.pt").wait() == 0, screen()


def torment(command, number, rng):
    """Kills a command so many times: (the events before the kills, the differences found)."""
    trains = "--max_steps" in command
    resume = command.split(".py")[0] + ".py --resume"
    out, kills, differences, event = Path("out"), [], [], None
    untried = ["no checkpoint", "checkpoint", "finished"] if trains else []  # where the wrong way is refused

    def differs(what):
        differences.append(f"after {len(kills)} kills, the last after `{event}`: {what}\n{screen()[-1500:]}")

    process = start(command, out)
    assert process.wait() == 0, screen()
    life = time.time() - process.started
    seconds = {"start": life, "step": life / 4, "checkpoint": 0.1, "model": 0.05, "file": 0.0005}  # at most
    wanted = result(out)
    while True:
        if (out / "checkpoint/latest").exists():
            state = "checkpoint"
        else:
            state = "finished" if out.is_file() or (out / "config.json").exists() else "no checkpoint"
        if state in untried:
            untried.remove(state)
            wrong = start(resume if state == "no checkpoint" else command, out)
            if wrong.wait() != 2 or "error: " not in screen():
                differs(f"{state}, and the wrong way on is not refused")
        if state == "finished":
            got = result(out)
            if got != wanted:
                differs(f"other {[name for name in wanted | got if wanted.get(name) != got.get(name)]}")
            rmtree(out) if trains else out.unlink()
            if len(kills) == number:
                return kills, differences

        process = start(resume if state == "checkpoint" else command, out)
        event = rng.choice(["start", "step", "checkpoint", "model"] if trains else ["start", "file"])
        if len(kills) < number and kill(process, out, event, rng.random() * seconds[event]):
            kills.append(event)
        elif process.wait() or (out / "checkpoint").exists():
            differs(f"the run ends with status {process.returncode} or leaves a checkpoint")
            rmtree(out, ignore_errors=True)


def start(command, out):
    """Starts a stage as a program, in a process group of its own. It prints to screen.txt."""
    launcher, *words = command.split()
    port = ["--master_port", free_port()] if launcher == "deepspeed" else []
    words = [ROOT / word if word.endswith(".py") else word for word in words]
    line = [Path(sys.executable).parent / launcher, *port, *words, "--out", out]
    with open("screen.txt", "w") as file:
        process = subprocess.Popen(list(map(str, line)), stdout=file, stderr=file, start_new_session=True)
    process.started = time.time()
    return process


def kill(process, out, event, seconds):
    """Kills a stage so long after an event. False if it ends before."""
    files = {"start": "base", "step": f"{out}/log.jsonl", "checkpoint": f"{out}/checkpoint/*/*",
             "model": f"{out}/config.json", "file": f"{out}*"}[event]
    begun = event == "start"
    while not begun and process.poll() is None:
        with suppress(FileNotFoundError):  # deleted meanwhile
            begun = any(path.stat().st_mtime > process.started for path in Path().glob(files))
        time.sleep(0.0001)
    if begun:
        time.sleep(seconds)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks too
    return process.wait() == -signal.SIGKILL


def result(out):
    """{file: its bytes} of what a command has written, {"log.jsonl": its lines without the wall clock's}."""
    paths = [path for path in [out, *out.glob("*")] if path.is_file() and path.name != "args.json"]
    files = {path.name: path.read_bytes() for path in paths}
    if "log.jsonl" in files:
        files["log.jsonl"] = [json.loads(line) for line in files["log.jsonl"].splitlines()]
        for line in files["log.jsonl"]:
            line.pop("tokens_per_second", None)
    return files


def screen():
    return Path("screen.txt").read_text()


if __name__ == "__main__":
    main()
