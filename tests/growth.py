"""How time and memory grow: with the rows of a data set, before a run's first step, and with the vocabulary.

    python tests/growth.py                        # all three: Markdown tables; six minutes on two quiet cores
    python tests/growth.py --modes vocabulary

The scripts run as they are, but for the scoring itself, each in a process of its own, with one thread. CPU
seconds and peak resident memory are the kernel's figures for that process.
"""
import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the scripts' folder
sys.path[:0] = [str(ROOT / "tests")]
import toy  # without torch, like this program: a child's peak memory is at least its parent's at the fork


def main():
    modes = {"growth": growth, "startup": startup, "vocabulary": vocabulary}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--modes", nargs="+", default=modes, choices=modes, help="(default: all)")
    parser.add_argument("--rows", nargs="+", type=int, default=[1_000, 10_000, 100_000], help="of growth")
    args = parser.parse_args()
    for mode in args.modes:
        print()
        with tempfile.TemporaryDirectory() as folder:
            modes[mode](folder, args)


# Scoring without its forward passes: they are the model's own cost, linear in tokens.
SET_UP_ONLY = """
import torch, precompute_rewards
precompute_rewards.score = lambda model, texts, *others: torch.zeros(len(texts))
precompute_rewards.main()
"""


def growth(folder, args):
    """CPU seconds and peak memory of splits.py, precompute_rewards.py and align.py's set-up by rows."""
    raw, data, rewards = f"{folder}/raw.jsonl", f"{folder}/data/all/train.jsonl", f"{folder}/rewards.pt"
    runs = (["splits.py", "--dataset", raw, "--out", f"{folder}/data", "--validation_fraction", 0.001],
            ["-c", SET_UP_ONLY, "--oracle", f"{folder}/lm", "--data", data, "--out", rewards],
            ["align.py", "--loss", "drdo", "--oracle_rewards", rewards, "--data", data, "--eval_data", "",
             "--model", f"{folder}/lm", "--out", f"{folder}/out", "--batch_size", 8, "--max_steps", 1])
    make_model(folder)
    print("| rows | splits.py s, MB | precompute_rewards.py's set-up s, MB | align.py --max_steps 1 s, MB |\n"
          "|---|---|---|---|")
    peaks = []
    for n in args.rows:
        write_comparisons(raw, n)
        figures = [measure([sys.executable, *run])[1:] for run in runs]
        cells = [f"{seconds:.1f}, {peak:.0f}" for seconds, peak in figures]
        print(f"| {n:,} | {' | '.join(cells)} |", flush=True)
        peaks.append([peak for _, peak in figures])
    if len(peaks) > 1:
        more = args.rows[-1] - args.rows[-2]
        grown = [f"{(last - before) * 1024 / more:.2f}" for before, last in zip(*peaks[-2:])]
        print(f"| KB a row, of the last {more:,} | {' | '.join(grown)} |")


# Times what align.py calls before it scores the reference, then ends. A nested call counts for itself alone.
STARTUP = """
import os, sys, time, importlib
spent = {"interpreter and launcher": time.time() - float(os.environ["LAUNCHED"])}
def timed(name, function):
    def run(*inputs, **named):
        start, inner = time.time(), sum(spent.values())
        result = function(*inputs, **named)
        spent[name] = spent.get(name, 0) + time.time() - start - (sum(spent.values()) - inner)
        return result
    return run
def end(*inputs):
    print(*(f"SPENT|{name}|{value}" for name, value in spent.items()), sep="\\n", flush=True)
    sys.exit()
sys.path.insert(0, os.getcwd())
for name in "torch", "transformers", "deepspeed", "align":
    module = timed(f"import {name}", importlib.import_module)(name)
for name in "parse_args init_process load_model load_split make_engine check_layout start_run".split():
    setattr(module, name, timed(name, getattr(module, name)))
module.score_all = end
module.main()
"""


def startup(folder, _):
    """Seconds by the clock before the first step of align.py, by python and by the launcher, on 1000 rows."""
    make_model(folder)
    write_comparisons(f"{folder}/raw.jsonl", 1000)
    measure([sys.executable, "splits.py", "--dataset", f"{folder}/raw.jsonl", "--out", f"{folder}/data"])
    Path(f"{folder}/start.py").write_text(STARTUP)
    flags = ["--loss", "dpo", "--model", f"{folder}/lm", "--data", f"{folder}/data/all/train.jsonl",
             "--eval_data", "", "--out", f"{folder}/out", "--batch_size", 8]
    launcher = [Path(sys.executable).parent / "deepspeed", "--num_gpus", 1, "--master_port", 29617]
    columns = []
    for command in [sys.executable], launcher:
        output = measure([*command, f"{folder}/start.py", *flags], LAUNCHED=str(time.time()))[0]
        lines = [line.split("|") for line in output.splitlines() if "SPENT|" in line]
        columns.append({name: float(value) for _, name, value in lines})
    print("| before step 1 | python s | deepspeed s |\n|---|---|---|")
    for name in columns[0]:
        print(f"| {name} | {columns[0][name]:.2f} | {columns[1][name]:.2f} |")
    print("| sum | {:.2f} | {:.2f} |".format(*(sum(column.values()) for column in columns)))


VOCABULARY = """
import resource, sys, time, torch, losses
H, R, max_logits, V, B, P = *map(int, sys.argv[1:]), 2**17, 8, 16
segments = torch.tensor([0] * (P - 1) + [1] * (1 + R) + [2] * (1 + R)).expand(B, -1)
lm_head = torch.nn.Linear(H, V, bias=False)
hidden, input_ids = torch.randn(*segments.shape, H, requires_grad=True), torch.randint(V, segments.shape)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
inputs, before, start = hidden.nbytes + lm_head.weight.nbytes, peak(), time.process_time()
losses.response_logps(hidden, lm_head, input_ids, segments, max_logits=max_logits).sum().backward()
print(inputs / 2**20, (peak() - before) / 2**10, time.process_time() - start)
"""


def vocabulary(folder, _):
    """Peak memory and CPU seconds of response_logps, forward and backward, of 2^17 words in fp32."""
    print("| hidden | response tokens | max_logits | inputs MB | peak over them MB, gradients too | CPU s |\n"
          "|---|---|---|---|---|---|")
    for hidden, length, n in ((64, 256, 24), (64, 256, 26), (64, 1024, 26), (64, 256, 28), (64, 256, 31),
                              (576, 256, 26)):
        output = measure([sys.executable, "-c", VOCABULARY, hidden, length, 2**n], PYTHONPATH=str(ROOT))[0]
        inputs, peak, seconds = map(float, output.split())
        print(f"| {hidden} | {16 * length} | 2^{n} | {inputs:.0f} | {peak:.0f} | {seconds:.1f} |", flush=True)


def measure(command, **environment):
    """Runs a program in the scripts' folder: (its standard output, its CPU seconds, its peak resident MB)."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=errors, cwd=ROOT,
                                   env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
        _, process.returncode, usage = os.wait4(process.pid, 0)
        output.seek(0), errors.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(map(str, command))} failed:\n{errors.read()[-2000:]}")
        return output.read(), usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


MODEL = """
import sys, torch, toy
tokenizer = toy.make_tokenizer()
lm = toy.make_model(tokenizer)
lm.score, lm.config.num_labels = torch.nn.Linear(lm.config.hidden_size, 1, bias=False), 1
lm.save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
"""


def make_model(folder):
    """A random tiny LM with a reward head and the laboratory's tokenizer, made by a process of its own."""
    measure([sys.executable, "-c", MODEL, f"{folder}/lm"], PYTHONPATH=f"{ROOT}:{ROOT}/tests")


def write_comparisons(path, n):
    """n raw rows as long as TL;DR's: posts of about 400 words, summaries of about 33. A process of its own
    writes them: a program that is started has at least the peak memory of the one that started it."""
    writer = multiprocessing.Process(target=write_rows, args=(path, n))
    writer.start(), writer.join()
    assert not writer.exitcode, "the rows could not be written"


def write_rows(path, n):
    rng, words = random.Random(0), list(toy.SLOT_OF)
    with open(path, "w") as file:
        for row in toy.make_comparisons(n, seed=0):
            row["info"]["post"] += " " + " ".join(rng.choices(words, k=rng.randint(300, 380)))
            row["summaries"] = [{**summary, "text": 2 * summary["text"]} for summary in row["summaries"]]
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
