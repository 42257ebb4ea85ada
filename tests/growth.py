"""How time and memory grow: with the rows of a data set, before a run's first step, and with the vocabulary.

    python tests/growth.py                        # all three: Markdown tables; six minutes on two quiet cores
    python tests/growth.py --modes vocabulary

The scripts run as they are, each in a process of its own, one thread; CPU seconds and peak resident memory are the
kernel's figures for that process.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the scripts' folder
sys.path[:0] = [str(ROOT / "tests")]


def measure(command, **environment):
    """Runs a program in the scripts' folder; returns (its standard output, its CPU seconds, its peak resident MB)."""
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=errors, cwd=ROOT,
                                   env={**alone, "OMP_NUM_THREADS": "1", **environment})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status  # else Popen would wait for it again
        output.seek(0), errors.seek(0)
        if status:
            sys.exit(f"{' '.join(map(str, command))} failed:\n{errors.read()[-2000:]}")
        return output.read(), usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


TOY_MODELS = """
import sys, toy
from transformers import LlamaForSequenceClassification
tokenizer = toy.make_tokenizer()
lm = toy.make_model(tokenizer)
lm.config.num_labels = 1
for name, model in ("lm", lm), ("oracle", LlamaForSequenceClassification(lm.config)):
    model.save_pretrained(f"{sys.argv[1]}/{name}")
    tokenizer.save_pretrained(f"{sys.argv[1]}/{name}")
"""


def toy_models(folder):
    """A random tiny LM and reward model with the laboratory's tokenizer; by a process of its own, as a child's peak resident
    size is at least its parent's at the fork, and this one's must stay small."""
    measure([sys.executable, "-c", TOY_MODELS, folder], PYTHONPATH=str(ROOT / "tests"))


def write_comparisons(path, n):
    """n raw rows as long as TL;DR's: posts of about 400 words, summaries of about 33."""
    import toy
    rng, words = random.Random(0), list(toy.SLOT_OF)
    with open(path, "w") as file:
        for row in toy.make_comparisons(n, seed=0):
            row["info"]["post"] += " " + " ".join(rng.choices(words, k=rng.randint(300, 380)))
            row["summaries"] = [{**summary, "text": 2 * summary["text"]} for summary in row["summaries"]]
            file.write(json.dumps(row) + "\n")


# The forward passes are the model's own cost, linear in tokens: what stands around them is measured.
SET_UP_ONLY = """
import sys, torch, precompute_rewards
precompute_rewards.score = lambda model, texts, *others: torch.zeros(len(texts))
precompute_rewards.main()
"""


def growth():
    """CPU seconds and peak memory of splits.py, precompute_rewards.py and align.py's set-up as the data grows."""
    print("| rows | splits.py s, MB | precompute_rewards.py's set-up s, MB | align.py --max_steps 1 s, MB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        toy_models(folder)
        peaks = []
        for n in 1_000, 10_000, 100_000:
            raw, data, rewards = f"{folder}/raw.jsonl", f"{folder}/data/all/train.jsonl", f"{folder}/rewards.pt"
            write_comparisons(raw, n)
            scoring = ["--oracle", f"{folder}/oracle", "--data", data, "--out", rewards]
            split = ["splits.py", "--dataset", raw, "--out", f"{folder}/data", "--validation_fraction", 0.001]
            align = ["align.py", "--loss", "drdo", "--oracle_rewards", rewards, "--data", data, "--eval_data", "", "--model",
                     f"{folder}/lm", "--out", f"{folder}/out", "--batch_size", 8, "--max_steps", 1, "--save_steps", 0]
            runs = [measure([sys.executable, *run]) for run in (split, ["-c", SET_UP_ONLY, *scoring], align)]
            cells = [f"{seconds:.1f}, {peak:.0f}" for _, seconds, peak in runs]
            print(f"| {n:,} | {' | '.join(cells)} |", flush=True)
            peaks.append([peak for _, _, peak in runs])
    grown = [f"{(last - before) * 1024 / 90_000:.1f}" for before, last in zip(*peaks[1:])]
    print(f"| KB a row, the last 90,000 | {' | '.join(grown)} |")


# Times what align.py calls until its first step, then ends; its imports are timed apart, in the order that it needs them.
STARTUP = """
import os, sys, time
begun, spent = time.time(), {}
def timed(name, function, *inputs, **named):
    start, result = time.time(), function(*inputs, **named)
    spent[name] = spent.get(name, 0) + time.time() - start
    return result
spent["interpreter and launcher"] = begun - float(os.environ["LAUNCHED"])
sys.path.insert(0, os.getcwd())
for name in "torch", "transformers", "deepspeed", "align":
    module = timed(f"import {name}", __import__, name)
for name in "parse_args init_process load_tokenizer load_model load_split make_engine check_layout start_run".split():
    setattr(module, name, lambda *inputs, name=name, f=getattr(module, name): timed(name, f, *inputs))
def end(*inputs):
    print("\\n".join(f"SPENT|{name}|{value}" for name, value in spent.items()), flush=True)
    sys.exit()
module.reference_logps = end
module.main()
"""


def startup():
    """Wall seconds that a launch of align.py spends before its first step, by python and by the launcher, on 1000 rows."""
    with tempfile.TemporaryDirectory() as folder:
        toy_models(folder)
        write_comparisons(f"{folder}/raw.jsonl", 1000)
        measure([sys.executable, "splits.py", "--dataset", f"{folder}/raw.jsonl", "--out", f"{folder}/data"])
        Path(f"{folder}/start.py").write_text(STARTUP)
        flags = ["--loss", "dpo", "--model", f"{folder}/lm", "--data", f"{folder}/data/all/train.jsonl", "--eval_data", "",
                 "--out", f"{folder}/out", "--batch_size", 8]
        columns = []
        for launcher in [sys.executable], [Path(sys.executable).parent / "deepspeed", "--num_gpus", 1, "--master_port", 29617]:
            output = measure([*launcher, f"{folder}/start.py", *flags], LAUNCHED=str(time.time()))[0]
            lines = [line.split("|") for line in output.splitlines() if "SPENT|" in line]
            columns.append({name: float(value) for _, name, value in lines})
    print("| before step 1 | python s | deepspeed s |\n|---|---|---|")
    for name in columns[0]:
        print(f"| {name} | {columns[0][name]:.2f} | {columns[1][name]:.2f} |")
    print("| sum | {:.2f} | {:.2f} |".format(*(sum(column.values()) for column in columns)))


VOCABULARY = """
import sys, time, torch, losses
from resource import RUSAGE_SELF, getrusage
H, R, max_logits, V, B, P = *map(int, sys.argv[1:]), 2**17, 8, 16
lm_head, hidden = torch.nn.Linear(H, V, bias=False), torch.randn(B, P + 2 * R, H, requires_grad=True)
input_ids = torch.randint(V, (B, P + 2 * R))
segments = torch.tensor([0] * P + [1] * R + [2] * R).expand(B, -1)
previous = torch.arange(-1, P + 2 * R - 1).repeat(B, 1)
previous[:, P + R] = P - 1
inputs, before, start = hidden.nbytes + lm_head.weight.nbytes, getrusage(RUSAGE_SELF).ru_maxrss, time.process_time()
losses.response_logps(hidden, lm_head, input_ids, segments, previous, max_logits=max_logits).sum().backward()
print(inputs / 2**20, (getrusage(RUSAGE_SELF).ru_maxrss - before) / 2**10, time.process_time() - start)
"""


def vocabulary():
    """Peak memory and CPU seconds of response_logps, forward and backward, at 2^17 words in fp32, by bound and by tokens."""
    print("| hidden | response tokens | max_logits | inputs MB | peak over them MB (gradients included) | CPU s |\n|---|---|---|---|---|---|")
    for hidden, length, power in ((64, 256, 24), (64, 256, 26), (64, 1024, 26), (64, 256, 28), (64, 256, 31), (576, 256, 26)):
        output = measure([sys.executable, "-c", VOCABULARY, hidden, length, 2**power], PYTHONPATH=str(ROOT))[0]
        inputs, peak, seconds = map(float, output.split())
        print(f"| {hidden} | {16 * length} | 2^{power} | {inputs:.0f} | {peak:.0f} | {seconds:.1f} |", flush=True)


def main():
    formatters = argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", formatters, {}))
    modes = {"growth": growth, "startup": startup, "vocabulary": vocabulary}
    parser.add_argument("--modes", nargs="+", default=list(modes), choices=list(modes), help="what to measure")
    for mode in parser.parse_args().modes:
        print()
        modes[mode]()


if __name__ == "__main__":
    main()
