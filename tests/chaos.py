"""Kills the stages at random moments, goes on as they say, and compares with a run left in peace.

    python tests/chaos.py                                     # 30 kills a stage; minutes on two cores
    python tests/chaos.py --stages sft align --kills 100 --seed 1

sft.py, oracle.py and align.py (each loss and reading) run on one process or two, with accumulation, in fp32
and, where the processor has it, bf16. A kill is aimed at a phase, drawn evenly: import, set-up, reference,
steps, checkpoint or saving. It strikes a random time after that phase has begun. On two processes it hits one
rank or all processes. A dead rank must end the launcher within a minute. Each run then goes on with --resume
if there is a checkpoint, and starts again if there is none; the other way must be refused. In the end weights
and log lines must be equal to the last bit, but for the wall-clock figures.

generate.py, precompute_rewards.py, splits.py and evaluate.py --judge are killed at any time. What they have
written by then is whole or absent, and a further run ends with the same files.

Prints the kills by phase and the most steps that one lost. Status 1 on any difference.
"""
import argparse
import glob
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from shutil import rmtree

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "OPENAI_API_KEY": "-"}

import psutil
import torch
from tqdm import tqdm

import toy
from conftest import ROOT, Judge, free_port

TRAINING = ("--data train.jsonl --eval_data validation.jsonl --batch_size 8 --micro_batch_size 2 "
            "--max_steps 24 --warmup_steps 2 --learning_rate 1e-3 --log_steps 1 --eval_steps 9 "
            "--save_steps 5")
SFT, TEACH = f"sft.py --model base {TRAINING}", f"oracle.py --model base {TRAINING}"
ALIGN = f"align.py --model base {TRAINING} --oracle_rewards rewards.pt --loss"
BF16 = "--dtype bf16"
RUNS = {  # stage: (its flags, its processes) in turn
    "sft": [(SFT, 1), (SFT, 2), (f"{SFT} --gradient_checkpointing {BF16}", 1)],
    "oracle": [(TEACH, 1), (f"{TEACH} {BF16}", 2), (f"{TEACH} --alpha 0", 1)],
    "align": [(f"{ALIGN} dpo", 1), (f"{ALIGN} drdo {BF16}", 2), (f"{ALIGN} ipo {BF16}", 1),
              (f"{ALIGN} edpo", 2), (f"{ALIGN} drdo --gradient_checkpointing", 1),
              (f"{ALIGN} drdo --student_rewards logps --p_w mean", 1),
              (f"{ALIGN} drdo --student_rewards log_ratio --unit_oracle", 1)],
    "generate": [("generate.py --model base --prompts validation.jsonl --max_new_tokens 40 --dtype fp32", 1)],
    "precompute_rewards": [("precompute_rewards.py --oracle oracle oracle --data train.jsonl", 1)],
    "splits": [("splits.py --dataset raw.jsonl --prompts validation.jsonl", 1)],
    "judge": [("evaluate.py --generations generations.jsonl --judge toy --against them", 1)],
}
TRAINERS = ["sft", "oracle", "align"]
PHASES = ["import", "set-up", "reference", "steps", "checkpoint", "saving"]
WALL_CLOCK = {"tokens_per_second", "peak_memory_gb"}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=RUNS, default=list(RUNS), help="(default: all)")
    parser.add_argument("--kills", type=int, default=30, help="of each training stage; a third of any other")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    bf16 = torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16")
    jobs = []
    for stage in args.stages:
        runs = [(flags if bf16 else flags.replace(BF16, ""), n) for flags, n in RUNS[stage]]
        kills = args.kills if stage in TRAINERS else -(-args.kills // 3)
        for k, (flags, processes) in enumerate(runs):
            share = kills // len(runs) + (k < kills % len(runs))
            flags += " --dtype fp32" * (stage in TRAINERS and BF16 not in flags)
            jobs.append((stage, flags, processes, share, random.Random(f"{args.seed} {stage} {k}")))
    with tempfile.TemporaryDirectory() as lab, Judge(decide) as judge:
        judge.server.handle_error = lambda *_: None  # who asked was killed
        os.environ["OPENAI_BASE_URL"] = f"http://127.0.0.1:{judge.server.server_port}/v1"
        prepare(lab)
        total = sum(job[3] for job in jobs)
        with tqdm(total=total, desc="kills", smoothing=0) as bar, ThreadPoolExecutor(2) as pool:
            jobs.sort(key=lambda job: -job[3] * job[2])
            reports = list(pool.map(lambda job: torment(lab, bar, *job), jobs))
    print("| stage | kills | by phase | most steps lost | slowest end after a rank's death | differences |\n"
          "|---|---|---|---|---|---|")
    for stage in args.stages:
        mine = [report for report in reports if report["stage"] == stage]
        phases = sum((report["phases"] for report in mine), Counter())
        faults = [fault for report in mine for fault in report["faults"]]
        lost, slowest = (max(report[name] for report in mine) for name in ("lost", "slowest"))
        by_phase = ", ".join(f"{name} {n}" for name, n in phases.most_common())
        print(f"| {stage} | {phases.total()} | {by_phase} | {lost} | {slowest:.0f} s | {len(faults)} |")
    faults = [fault for report in reports for fault in report["faults"]]
    print(*faults, sep="\n")
    sys.exit(1 if faults else 0)


def prepare(lab):
    """Everything that the stages read."""
    tokenizer = toy.make_tokenizer()
    lm = toy.make_model(tokenizer)
    for folder in ("base", "oracle"):
        lm.save_pretrained(f"{lab}/{folder}"), tokenizer.save_pretrained(f"{lab}/{folder}")
        lm.score, lm.config.num_labels = torch.nn.Linear(64, 1, bias=False), 1
    toy.write_jsonl(f"{lab}/train.jsonl", toy.make_pairs(30, 1))
    toy.write_jsonl(f"{lab}/validation.jsonl", toy.make_pairs(12, 2))
    toy.write_jsonl(f"{lab}/raw.jsonl", toy.make_pairs(4000, 3))
    toy.write_jsonl(f"{lab}/generations.jsonl", [
        {"prompt": f"p{k}", "response": f"{name} {k * k}", "temperature": 0.5, "generator": name}
        for name in ("us", "them") for k in range(60)])
    (Path(lab) / "ds_config.json").write_text((ROOT / "ds_config.json").read_text())
    score = [sys.executable, ROOT / "precompute_rewards.py", "--oracle", "oracle", "--data", "train.jsonl"]
    subprocess.run(score, cwd=lab, check=True, capture_output=True)


def decide(a, b):
    """A judge's answer, by the texts, which takes its time."""
    time.sleep(0.1)
    return "Preferred: " + ("A", "B", "tie")[(len(a) + 2 * len(b)) % 3]


class Run:
    """A stage as a program, its output in a file."""
    def __init__(self, lab, flags, processes, out, resume=False):
        script, *flags = flags.split()
        launcher = [Path(sys.executable).parent / "deepspeed", "--num_gpus", processes,
                    "--master_port", free_port()]
        command = [*(launcher if processes > 1 else [sys.executable]), ROOT / script, *flags, "--out", out,
                   *["--resume"] * resume]
        self.out, self.screen = Path(lab) / out, f"{lab}/{out}.txt"
        self.processes, self.start = processes, time.time()
        with open(self.screen, "w") as file:
            self.process = subprocess.Popen(list(map(str, command)), cwd=lab, stdout=file, stderr=file,
                                            start_new_session=True)

    def text(self):
        return Path(self.screen).read_text(errors="replace")

    def fresh(self, name):
        """Whether this run, and not one before it, has written there."""
        try:
            return os.stat(self.out / name).st_mtime >= self.start
        except OSError:
            return False

    def phase(self):
        text = self.text()
        if self.fresh("partial") or re.search("model.* tokenizer.* written", text):
            return "saving"
        if any(self.fresh(path) and not whole(path) for path in glob.glob(f"{self.out}/checkpoint/step*")):
            return "checkpoint"
        if re.search(r"(sft|oracle|align \w+): +\d+%", text):
            return "steps"
        if "reference:" in text:
            return "reference"
        return "set-up" if " processes" in text else "import"

    def watch(self, until=None):
        """Waits for the end or for a phase, whichever comes first: {phase: seconds from the start}."""
        seen = {"import": 0.0}
        while self.process.poll() is None:
            seen.setdefault(self.phase(), time.time() - self.start)
            if until in seen:
                break
            time.sleep(0.002)
        return seen

    def kill(self, rng):
        """SIGKILL to one rank, after which the launcher must end by itself, or to all. Returns the seconds
        that it took."""
        start, workers = time.time(), []
        if self.processes > 1 and rng.random() < 0.5:
            with suppress(psutil.Error):  # a process may just have ended
                workers = [child for child in psutil.Process(self.process.pid).children(recursive=True)
                           if any("--local_rank=" in part for part in child.cmdline())]
        if len(workers) == self.processes:
            rng.choice(workers).kill()
            try:
                assert self.process.wait(60), "the launcher ended with status 0 though a rank was killed"
                assert "-9" in self.text(), "the screen does not say why the launcher ended"
            except subprocess.TimeoutExpired:
                raise AssertionError("the launcher lives on a minute after a rank's death")
            finally:
                self.end()
            return time.time() - start
        self.end()
        return 0.0

    def end(self):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def torment(lab, bar, stage, flags, processes, kills, rng):
    """Kills one command so many times: {"stage", "phases": a Counter, "lost": steps, "slowest", "faults"}."""
    report = {"stage": stage, "phases": Counter(), "lost": 0, "slowest": 0.0, "faults": []}
    out = f"{stage}{abs(hash((flags, processes)))}"

    def fault(what):
        report["faults"].append(f"{flags} on {processes}: {what}\n{run.text()[-1500:]}")

    run = Run(lab, flags, processes, out)
    seen = run.watch()
    life, wanted = time.time() - run.start, result(run.out, stage)
    if run.process.returncode:
        fault("fails when left in peace")
        return report
    remove(run.out)
    phases = [phase for phase in PHASES if phase in seen] if stage in TRAINERS else ["import"]  # all its life
    begins = [seen[phase] for phase in phases if phase != "checkpoint"] + [life]
    ends = {phase: min(begin for begin in begins if begin > seen[phase]) for phase in phases}
    killed = True
    while report["phases"].total() < kills or killed:  # the last one ends by itself
        resume = stage in TRAINERS and os.path.exists(f"{run.out}/checkpoint/state.pt")
        if stage in TRAINERS and report["phases"].total() == 1 and "refused" not in report:
            report["refused"] = True
            run = Run(lab, flags, processes, out, not resume)
            run.process.wait()
            if run.process.returncode != 2 or not re.search("unfinished run|holds no checkpoint", run.text()):
                fault("is not refused")
        run = Run(lab, flags, processes, out, resume)
        begun = os.path.exists(run.out) or glob.glob(f"{run.out}*partial")
        killed = report["phases"].total() < kills and (not begun or rng.random() < 0.7)
        if killed:
            aim = rng.choice(phases)
            run.watch(until=aim)
            if aim in ("checkpoint", "saving"):  # they last some milliseconds
                time.sleep(0.1 * rng.random() ** 3)
            else:
                time.sleep(rng.random() * (ends[aim] - seen[aim]))
            killed = run.process.poll() is None
        if killed:
            phase = run.phase() if stage in TRAINERS else "any"
            try:
                report["slowest"] = max(report["slowest"], run.kill(rng))
            except AssertionError as error:
                fault(error)
            report["phases"][phase] += 1
            report["lost"] = max(report["lost"], lost(run.out))
            bar.update()
            difference = stage not in TRAINERS and differences(wanted, result(run.out, stage), whole=False)
        else:
            run.watch()
            difference = differences(wanted, result(run.out, stage)) or run.process.returncode
        if difference:
            fault(f"after {sum(report['phases'].values())} kills: {difference}")
        if difference or not killed:
            remove(run.out)
    return report


def whole(step):
    """Whether state.pt, which is written last, is newer than this folder of a checkpoint."""
    try:
        return os.stat(Path(step).parent / "state.pt").st_mtime >= os.stat(step).st_mtime
    except OSError:
        return False


def remove(out):
    for path in glob.glob(f"{out}*"):
        if not path.endswith(".txt"):
            rmtree(path) if os.path.isdir(path) else os.remove(path)


def lost(out):
    """The steps in the log that a run which goes on has to do again."""
    steps = [path for path in glob.glob(f"{out}/checkpoint/step*") if whole(path)]
    saved = [int(path.rsplit("step", 1)[1]) for path in steps]
    try:
        reached = [json.loads(line)["step"] for line in open(out / "log.jsonl")]
    except (OSError, ValueError):
        reached = []
    return 0 if (out / "model.safetensors").exists() else max(reached, default=0) - max(saved, default=0)


def result(out, stage):
    """{file: its bytes} of what a stage has written; of a log its lines, without the wall clock's figures."""
    files = [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.is_file())
    held = {}
    for path in files:
        if path.name == "log.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()] if stage in TRAINERS else []
            held[path.name] = [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in lines]
        elif path.name == "verdicts.jsonl":  # in the order of the answers; a kill may have cut a line off
            held[path.name] = sorted(re.findall(r'^{"key": "(\w+)".*}$', path.read_text(), re.MULTILINE))
        elif path.name != "args.json" and not path.name.endswith(".partial"):
            held[str(path.relative_to(out))] = path.read_bytes()
    return held


def differences(wanted, got, whole=True):
    """The files that differ, or are missing where all should be there. A judge's answers come one by one."""
    return [name for name in wanted | got if wanted.get(name) != got.get(name)
            and (whole or name in got and name != "verdicts.jsonl")]


if __name__ == "__main__":
    main()
