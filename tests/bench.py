"""Measures time and memory against TRL 1.16 or another build, and growth with the rows. Prints tables.

    python -m venv bench_env && bench_env/bin/pip install -r requirements.txt trl==1.16.0
    bench_env/bin/python tests/bench.py                   # a small random OPT; ten minutes on two cores
    bench_env/bin/python tests/bench.py --model SmolLM2-135M-Instruct --modes align oracle --steps 5  # 16 GB
    python tests/bench.py --modes scoring generation --against_build ../before         # a git worktree
    python tests/bench.py --modes growth

Ratios are ours / theirs: below 1 is better. Each side runs its real loop (align.main(), DPOTrainer.train())
in a process of its own. The two take their steps in turn, so other programs disturb both alike. Both have
the same model, token ids, batches, AdamW, clipping and dtype, no dropout and no gradient checkpointing. TRL
runs without DeepSpeed. With --against_build the other side is the same script of that folder.

`time` is by the clock, `CPU` in CPU seconds, which other programs disturb less. Both are medians, of the
steps or of three runs of scoring or generation, without loading and the check that the model takes the mask.
`memory` is the peak, imports included.
"""
import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from shutil import rmtree
from statistics import median

os.environ |= {"OMP_WAIT_POLICY": "passive",  # whoever waits must not spin
               "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"1:1": (128, 128, 128), "3:1": (192, 64, 64), "11:1": (352, 32, 32), "TL;DR": (354, 33, 33),
          "CNN": (702, 65, 65), "natural": None}  # tokens of prompt and responses, EOS included
TEMPERATURES = 0.2, 0.5, 0.7, 0.9
NATURAL = (3.19, 0.81), (4.99, 0.51), (4.82, 0.53)  # lognormals of mean 34, 167, 143: AlpacaEval's tokens


def main():
    args = parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # a worker gets this list, and puts its build before it
    home = Path(args.out).resolve()
    home.mkdir(parents=True, exist_ok=True)
    model = os.path.abspath(args.model or make_model(home / "model"))
    if "growth" in args.modes:
        growth(home, model)
    else:
        ratios(args, home, model)


def ratios(args, home, model):
    """Prints the table of ratios, each row as soon as it is measured."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    max_steps = args.steps + 1  # one of warm-up

    def compare(what, ours, name, theirs):
        """Prints a row. ours: a stage and its flags; theirs: the same, or a function and its arguments."""
        if args.against_build:
            name, theirs = args.against_build, ours
        if theirs[0] == ours[0]:
            build = args.against_build or ROOT
            theirs = run_stage, build, *theirs, "--out", home / f"{ours[0]}_theirs"
        ours = run_stage, ROOT, *ours, "--out", home / f"{ours[0]}_ours"
        steps = args.steps if "--max_steps" in ours else 0
        samples = []
        for _ in range(1 if steps else 3):
            samples += alternate({"ours": ours, "theirs": theirs}, home, steps, args.profile)
        columns = [what, name]
        for key, unit in ("seconds", "s"), ("cpu", "s"), ("memory", "GiB"):
            ratio = median(a[key] / b[key] for a, b in samples)
            a, b = (median(report[key] for report in side) for side in zip(*samples))
            columns.append(f"{ratio:.2f} ({a:.2f} / {b:.2f} {unit})")
        print(f"| {' | '.join(columns)} |", flush=True)

    def train(stage, *flags):
        return [stage, "--model", model, "--data", home / "pairs.jsonl", "--eval_data", "",
                "--batch_size", args.batch_size, "--micro_batch_size", args.batch_size, "--warmup_steps", 0,
                "--max_steps", max_steps, "--save_steps", 0, "--dtype", args.dtype, *flags]

    def trl(kind, ids, **options):
        ids = [ids[i] for i in np.random.default_rng((0, 0)).permutation(len(ids))]  # our order of seed 0
        return run_trl, kind, model, ids, args.batch_size, max_steps, args.dtype, options

    def data(shape, number=args.batch_size * max_steps):
        return write_data(home, tokenizer, shape, args.data, number)

    print(f"{args.dtype}, {args.threads} threads, {args.batch_size} pairs a step, {args.steps} steps\n\n"
          "| ours | theirs | time | CPU | memory |\n|---|---|---|---|---|", flush=True)
    for shape in args.shapes if "align" in args.modes else []:
        theirs = trl("DPO", data(shape), precompute_ref_log_probs=True)
        compare(f"align.py, dpo, {shape}", train("align", "--loss", "dpo"), "DPOTrainer", theirs)
    for loss in ("drdo", "edpo") if "losses" in args.modes else []:
        theirs = trl("DPO", data("3:1"), precompute_ref_log_probs=True)
        ours = train("align", "--loss", loss, "--oracle_rewards", home / "rewards.pt")
        # two at a time: of three, the one behind TRL's finds its caches cold, and the next one does not
        compare(f"align.py, {loss}, 3:1", ours, "our dpo", train("align", "--loss", "dpo"))
        compare(f"align.py, {loss}, 3:1", ours, "DPOTrainer", theirs)
    for shape in args.shapes if "oracle" in args.modes else []:
        theirs = trl("Reward", data(shape))
        compare(f"oracle.py, alpha 0, {shape}", train("oracle", "--alpha", 0), "RewardTrainer", theirs)
    if "sft" in args.modes:
        compare("sft.py, natural", train("sft"), "SFTTrainer", trl("SFT", data("natural")))

    if "scoring" in args.modes:
        oracle = home / "oracle"
        scorer = load("SequenceClassification", model)
        scorer.config.pad_token_id = tokenizer.pad_token_id
        scorer.save_pretrained(oracle)
        tokenizer.save_pretrained(oracle)
        score = ["precompute_rewards", "--oracle", oracle, "--micro_batch_size", 8, "--dtype", args.dtype]
    for shape in args.shapes if "scoring" in args.modes else []:
        theirs = run_plain, "SequenceClassification", oracle, data(shape, args.rows), args.dtype
        ours = [*score, "--data", home / "pairs.jsonl"]
        compare(f"precompute_rewards.py, {shape}", ours, "batches of 8 in file order", theirs)
    if "scoring" in args.modes:
        ids = write_answers(home, data("TL;DR", args.rows // 2))
        theirs = run_plain, "SequenceClassification", oracle, ids, args.dtype
        ours = [*score, "--data", home / "answers.jsonl"]
        compare("precompute_rewards.py, four answers, TL;DR", ours, "batches of 8 in file order", theirs)
    for shape in ("TL;DR", "CNN", "natural") if "generation" in args.modes else []:
        theirs = run_plain, "CausalLM", model, data(shape, args.rows), args.dtype, args.max_new_tokens
        ours = ["generate", "--model", model, "--prompts", home / "pairs.jsonl", "--temperature",
                *TEMPERATURES, "--max_new_tokens", args.max_new_tokens, "--micro_batch_size", 8, "--dtype",
                args.dtype]
        compare(f"generate.py, four temperatures, {shape}", ours, "generate a temperature, 8 a batch", theirs)


# ---- two processes, which take their steps in turn ---------------------------------------------------------

def alternate(sides, home, steps, profile):
    """Lets two sides {name: (function, *arguments)} take their steps, or without `steps` whole runs, in turn.
    Returns pairs of reports, of ours and theirs."""
    context = multiprocessing.get_context("spawn")
    workers = {}
    for name, side in sides.items():
        pipe, theirs = context.Pipe()
        inputs = theirs, home / f"{name}.log", steps, profile and name == "ours", *side
        process = context.Process(target=work, args=inputs, daemon=True)
        process.start()
        theirs.close()  # so that a worker's end is noticed
        workers[name] = pipe, process
    reports = {name: [] for name in sides}
    while workers:
        for name, (pipe, process) in list(workers.items()):
            try:
                if reports[name]:
                    pipe.send("go")
                reports[name].append(pipe.recv())
            except (EOFError, ConnectionError):
                process.join()
                if process.exitcode or not reports[name]:
                    sys.exit(f"error: the worker `{name}` ended; see {home}/{name}.log")
                del workers[name]
    return list(zip(*reports.values()))[1:]  # the first is of loading, in training of the first step too


def work(pipe, log, steps, profile, run, *inputs):
    """Runs a side's loop. Its output goes to the file `log`, its reports through `pipe` to the parent."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    profiler = torch.profiler.profile()
    number = 0
    start = time.perf_counter(), time.process_time()

    def gate():
        """Stands between two steps: reports the step before and waits for this side's turn."""
        nonlocal number, start
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        report = {"seconds": time.perf_counter() - start[0], "cpu": time.process_time() - start[1]}
        # VmHWM is this program's; ru_maxrss would hand down what the parent held when it started us
        peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
        report["memory"] = (torch.cuda.max_memory_allocated() or int(peak) * 2**10) / 2**30
        if profile and number == 1:
            profiler.__exit__(None, None, None)
            print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12))
        pipe.send(report)
        pipe.recv()
        number += 1
        if steps and number == steps + 1:
            sys.exit()
        if profile and number == 1:
            profiler.__enter__()
        start = time.perf_counter(), time.process_time()

    run(*inputs, gate=gate)


def run_stage(build, stage, *flags, gate):
    """A stage's main() of the build in this folder, with the gate behind each step of DeepSpeed's engine. In
    scoring and generation it is before the first batch and at the end."""
    import deepspeed
    os.chdir(build)
    sys.path.insert(0, os.getcwd())
    module = importlib.import_module(stage)
    if "--max_steps" in flags:
        step = deepspeed.DeepSpeedEngine.step
        deepspeed.DeepSpeedEngine.step = lambda engine: (step(engine), gate())
    else:
        class Bar(module.tqdm):
            def __init__(self, items, desc, **options):
                if desc != "tokenising":
                    gate()  # the model is loaded, the batches come next
                super().__init__(items, desc, **options)
        module.tqdm = Bar
    sys.argv = [f"{stage}.py", *map(str, flags)]
    module.main()
    gate()


def run_trl(kind, folder, ids, batch_size, max_steps, dtype, options, gate):
    """A trainer of TRL on pairs of token ids, in their order, with the gate behind each step."""
    import trl
    from datasets import Dataset

    class Gate(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            gate()

    rows = []
    for prompt, chosen, rejected in ids:
        mask = [0] * len(prompt) + [1] * len(chosen)
        rows.append({"DPO": {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected},
                     "Reward": {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected},
                     "SFT": {"input_ids": prompt + chosen, "completion_mask": mask}}[kind])
    trl.DPOTrainer._prepare_dataset = lambda self, dataset, *_: dataset  # it would make token ids of text
    config = getattr(trl, kind + "Config")(
        output_dir=f"{folder}.trl", max_length=None, max_steps=max_steps, learning_rate=1e-6,
        weight_decay=0.05, per_device_train_batch_size=batch_size, train_sampling_strategy="sequential",
        max_grad_norm=1.0, lr_scheduler_type="cosine", gradient_checkpointing=False, bf16=dtype == "bf16",
        logging_steps=5, save_strategy="no", report_to="none", use_cpu=not torch.cuda.is_available(),
        **options)
    getattr(trl, kind + "Trainer")(
        model=load("SequenceClassification" if kind == "Reward" else "CausalLM", folder), args=config,
        callbacks=[Gate()], train_dataset=Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder)).train()


def run_plain(kind, folder, ids, dtype, max_new_tokens=0, gate=None):
    """Rewards of each row's responses, or responses to its prompt at each of TEMPERATURES, in batches of 8 in
    file order."""
    model = load(kind, folder, dtype).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left" if max_new_tokens else "right"
    texts = []
    for prompt, *responses in ids:
        texts += [prompt] if max_new_tokens else [prompt + response for response in responses]
    texts = [list(ids) for ids in dict.fromkeys(map(tuple, texts))]  # each once, as our stages do
    gate()
    for i in range(0, len(texts), 8):
        batch = tokenizer.pad({"input_ids": texts[i:i + 8]}, return_tensors="pt").to(model.device)
        with torch.no_grad():
            for temperature in TEMPERATURES if max_new_tokens else []:
                output = model.generate(**batch, do_sample=True, temperature=temperature, top_p=0.8, top_k=0,
                                        max_new_tokens=max_new_tokens)
                tokenizer.batch_decode(output[:, batch.input_ids.shape[1]:], skip_special_tokens=True)
            if not max_new_tokens:
                model(**batch).logits[:, 0].tolist()
    gate()


def load(kind, folder, dtype="fp32"):
    """The folder's AutoModelFor<kind>: SDPA, no dropout, one label. Training keeps its weights in fp32."""
    config = transformers.AutoConfig.from_pretrained(folder, num_labels=1)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    model = getattr(transformers, "AutoModelFor" + kind).from_pretrained(
        folder, config=config, dtype=dtype, attn_implementation="sdpa")
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


# ---- model and data ----------------------------------------------------------------------------------------

def make_model(folder):
    """A random OPT of 16M parameters with the toy task's tokenizer. Returns the folder."""
    import toy
    torch.manual_seed(0)
    tokenizer = toy.make_tokenizer()
    config = transformers.OPTConfig(
        vocab_size=16384, hidden_size=320, word_embed_proj_dim=320, ffn_dim=1280, num_hidden_layers=8,
        num_attention_heads=5, max_position_embeddings=2048, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    transformers.OPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_data(home, tokenizer, shape, path, number):
    """Writes pairs.jsonl and rewards.pt (random). Returns the pairs' token ids."""
    from align import encode
    if shape == "natural" and path:
        rows = [json.loads(line) for line in open(path)]
        random.Random(0).shuffle(rows)
    else:
        rows = random_rows(tokenizer, shape, number, extra=len(encode(tokenizer, "a", [])[0][0]) - 1)
    lines, pairs = [], []
    for row in rows:
        (prompt, *responses), _ = encode(tokenizer, row["prompt"], [row["chosen"], row["rejected"]])
        if len(pairs) < number and len(prompt) + max(map(len, responses)) <= 1024:
            lines.append(json.dumps(row) + "\n")
            pairs.append([prompt, *responses])
    assert len(pairs) == number, f"only {len(pairs)} pairs of {path} fit; lower --steps or --rows"
    (home / "pairs.jsonl").write_text("".join(lines))
    torch.save({"chosen": torch.randn(3, number), "rejected": torch.randn(3, number),
                "data_sha256": hashlib.sha256("".join(lines).encode()).hexdigest()}, home / "rewards.pt")
    return pairs


def write_answers(home, pairs):
    """Writes answers.jsonl, four responses to each second prompt of pairs.jsonl: its own and the next one's.
    Returns their token ids."""
    rows = [json.loads(line) for line in open(home / "pairs.jsonl")]
    with open(home / "answers.jsonl", "w") as file:
        for row, other in zip(rows[::2], rows[1::2]):
            for response in (row["chosen"], row["rejected"], other["chosen"], other["rejected"]):
                file.write(json.dumps({"prompt": row["prompt"], "response": response}) + "\n")
    return [[*pair, *other[1:]] for pair, other in zip(pairs[::2], pairs[1::2])]


def random_rows(tokenizer, shape, number, extra):
    """Pairs of random words with a shape's numbers of tokens. extra: what a template adds to a prompt."""
    rng = random.Random(shape)
    words = [tokenizer.decode([i]).strip() for i in range(min(len(tokenizer), 4000))]
    words = [word for word in words if word.isalpha() and len(word) > 1 and all(
        len(tokenizer(text, add_special_tokens=False).input_ids) == 1 for text in (word, " " + word))]
    rows = []
    for _ in range(number):
        lengths = SHAPES[shape] or [min(500, max(3, rng.lognormvariate(*moments))) for moments in NATURAL]
        texts = []
        for length, more in zip(lengths, (extra, 1, 1)):  # a response's EOS
            texts.append(" ".join(rng.choices(words, k=max(1, round(length) - more))))
        rows.append({"prompt": texts[0], "chosen": " " + texts[1], "rejected": " " + texts[2]})
    return rows


# ---- growth with the rows: whole programs on one thread ----------------------------------------------------

PROGRAM = """
import atexit, runpy, sys, time
kilobytes = lambda: open("/proc/self/status").read().split("VmHWM:")[1].split()[0]  # the peak
atexit.register(lambda: print(f"\\n{time.process_time():.1f} s, {int(kilobytes()) // 1024} MB"))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def growth(home, model):
    """Prints CPU seconds and peak memory by rows of splits.py and of align.py's run of one step."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    print("\n| rows | splits.py | align.py --max_steps 1 |\n|---|---|---|")
    for number in (10_000, 100_000):
        rows = random_rows(tokenizer, "TL;DR", number, extra=1)
        (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rmtree(home / "growth", ignore_errors=True)
        figures = []
        for command in (["splits.py", "--dataset", home / "pairs.jsonl", "--out", home / "data"],
                        ["align.py", "--loss", "dpo", "--model", model, "--data", home / "pairs.jsonl",
                         "--eval_data", "", "--batch_size", 8, "--max_steps", 1, "--out", home / "growth"]):
            output = subprocess.check_output([sys.executable, "-c", PROGRAM, *map(str, command)], cwd=ROOT,
                                             env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True)
            figures.append(output.splitlines()[-1])
        print(f"| {number:,} | {' | '.join(figures)} |", flush=True)


# ---- flags -------------------------------------------------------------------------------------------------

def parse_args():
    formatters = argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", formatters, {}))
    flag = parser.add_argument
    modes = ["align", "losses", "oracle", "sft", "scoring", "generation"]
    flag("--modes", nargs="+", default=modes, choices=[*modes, "growth"], help="what to measure")
    flag("--shapes", nargs="+", default=["1:1", "3:1", "11:1", "natural"], choices=SHAPES, help="of the rows")
    flag("--against_build", help="folder of other scripts to compare with, in place of TRL")
    flag("--model", help="a model folder; None: a small random OPT")
    flag("--data", help="preference JSONL for natural lengths; None: random words")
    flag("--batch_size", type=int, default=4, help="pairs a step, in one micro-batch")
    flag("--steps", type=int, default=7, help="measured steps a side, behind one of warm-up")
    flag("--rows", type=int, default=64, help="pairs to score, and prompts to answer")
    flag("--max_new_tokens", type=int, default=32, help="of a response")
    flag("--dtype", choices=["bf16", "fp32"], default="fp32", help="of the arithmetic, on both sides")
    flag("--threads", type=int, default=os.cpu_count(), help="OpenMP threads of a worker")
    flag("--profile", action="store_true", help="tell in ours.log where our first step spends its time")
    flag("--out", default="out/bench", help="folder for data, models and the workers' logs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
