"""Our scripts against TRL 1.16's trainers, in time and memory: ratios, as one Markdown table.

Each side runs its real loop (align.main(), trl.DPOTrainer.train(), ...) in a process of its own. They take their
optimizer steps in turn, one waiting while the other works, and the table has the median of the ratios step by step,
so that other programs on the machine disturb both alike. Both have the same model, token ids, batches, dtype, AdamW
and clipping; no dropout, no gradient checkpointing. TRL runs without DeepSpeed, with its own collator and its default,
fused AdamW. This is no test: it prints, and says which goals are met.

It needs TRL, which nothing else here does, so give it an environment of its own:

    python -m venv bench_env && bench_env/bin/pip install -r requirements.txt trl==1.16.0
    bench_env/bin/python tests/bench.py                                 # a small random OPT; ten minutes on two cores
    bench_env/bin/python tests/bench.py --model SmolLM2-135M-Instruct --modes align in_the_loop oracle --steps 5   # 33 minutes, 16 GB
    bench_env/bin/python tests/bench.py --modes align --shapes natural --data data/all/train.jsonl
    bench_env/bin/python tests/bench.py --modes align --shapes 3:1 --steps 9 --profile

Columns, ours / theirs. `time`: of a step by the clock; `CPU`: by the processor's, which other programs disturb less.
`FLOPs`: of a step, forward and backward, as torch counts them. `memory`: the resident peak, imports and all (on a GPU
what was allocated there). `MFU`: a step's FLOPs a second over those of a product (tokens, hidden) x (hidden,
intermediate) measured beside it. On a CPU TRL 1.16 computes the logits of every position, on a GPU of the responses'
only: there the ratios are higher. The GPU's path, bf16 on both sides, is untested.
"""
import argparse
import functools
import hashlib
import importlib
import itertools
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

RATIOS = {"1:1": (128, 128), "3:1": (192, 64), "11:1": (352, 32)}  # tokens of prompt and response, all included
NATURAL = (34, 33), (167, 90), (143, 81)  # mean and std of prompt, chosen, rejected: AlpacaEval's pairs, SmolLM2's tokens
GOALS = {"1:1": (0.55, 0.80), "3:1": (0.45, 0.70), "11:1": (0.35, 0.60), "natural": (0.85, None)}  # time, memory


# ---- a side, in its own process, which imports what it uses and no more ---------------------------------------------


def work(run, args, pipe, log):
    """Runs a side's loop, its output in the file `log`; `pipe` leads to the parent."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    run(*args, make_gate(pipe))
    pipe.send(None)  # the loop has come to its end


def make_gate(pipe):
    """A function to be called between steps: it reports the step to the parent and waits for its word."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
    aten = torch.ops.aten  # torch has no formulas for these three
    formulas = {aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
                aten._scaled_dot_product_flash_attention_for_cpu_backward:
                    lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
                aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    cuda, watch, start = torch.cuda.is_available(), None, (time.perf_counter(), time.process_time())

    def gate():
        nonlocal watch, start
        if cuda:
            torch.cuda.synchronize()
        report = {"seconds": time.perf_counter() - start[0], "cpu": time.process_time() - start[1]}
        if cuda:
            report["memory"] = torch.cuda.max_memory_allocated() / 2**30
        else:  # of this program; ru_maxrss would hand down what the parent held when it started us
            status = dict(line.split(":") for line in open("/proc/self/status"))
            report["memory"] = int(status["VmHWM"].split()[0]) / 2**20
        if watch:
            watch.__exit__(None, None, None)
            report["watch"] = watch.get_total_flops() if isinstance(watch, FlopCounterMode) else watch.key_averages().table(
                sort_by=f"self_{'cuda' if cuda else 'cpu'}_time_total", row_limit=12)
        pipe.send(report)
        command = pipe.recv()
        if command == "stop":
            sys.exit()
        watch = {"go": None, "flops": FlopCounterMode(display=False, custom_mapping=formulas),
                 "profile": torch.profiler.profile() if command == "profile" else None}[command]
        if watch:
            watch.__enter__()
        start = time.perf_counter(), time.process_time()

    return gate


def run_ours(stage, flags, gate):
    """A stage's main(), with the gate behind each step of DeepSpeed's engine, or before each batch scored or generated."""
    import deepspeed
    module = importlib.import_module(stage)
    if stage == "precompute_rewards":
        load_oracle = module.load_oracle
        module.load_oracle = lambda *args: gate_forward(load_oracle(*args), gate)
    elif stage == "generate":
        generate = module.generate
        module.generate = lambda *args: (gate(), generate(*args))[1]
    else:
        initialize = deepspeed.initialize

        def initialize_with_gate(**options):
            engine, *rest = initialize(**options)
            step = engine.step
            engine.step = lambda: (step(), gate())
            return engine, *rest

        deepspeed.initialize = initialize_with_gate
    sys.argv = [f"{stage}.py", *map(str, flags)]
    module.main()
    gate()


def run_trl(kind, folder, data, batch_size, max_steps, options, gate):
    """A trainer of TRL on the rows of token ids in the file `data`, in its order, with the gate behind each step."""
    import torch
    import transformers
    import trl
    from datasets import Dataset

    class Gate(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            gate()

    columns = {"DPO": lambda p, c, r: {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r},
               "Reward": lambda p, c, r: {"chosen_ids": p + c, "rejected_ids": p + r},
               "SFT": lambda p, c, r: {"input_ids": p + c, "completion_mask": [0] * len(p) + [1] * len(c)}}[kind]
    rows = [columns(*json.loads(line)) for line in open(data)]
    trl.DPOTrainer._prepare_dataset = lambda self, dataset, *_: dataset  # it would make token ids of text
    cuda = torch.cuda.is_available()
    config = getattr(trl, kind + "Config")(
        output_dir=data + ".trl", max_length=None, max_steps=max_steps, per_device_train_batch_size=batch_size,
        train_sampling_strategy="sequential", learning_rate=1e-6, weight_decay=0.05, lr_scheduler_type="cosine",
        max_grad_norm=1.0, gradient_checkpointing=False, bf16=cuda, use_cpu=not cuda, logging_steps=5, save_strategy="no",
        report_to="none", **options)
    getattr(trl, kind + "Trainer")(
        model=load("SequenceClassification" if kind == "Reward" else "CausalLM", folder), args=config, callbacks=[Gate()],
        train_dataset=Dataset.from_list(rows), processing_class=transformers.AutoTokenizer.from_pretrained(folder)).train()


def run_plain_scoring(folder, data, batch_size, gate):
    """Rewards of every row's two responses, in batches cut from the file as it stands."""
    import torch
    import transformers
    model = gate_forward(load("SequenceClassification", folder).eval(), gate)
    tokenizer, rewards = transformers.AutoTokenizer.from_pretrained(folder), []
    texts = [prompt + response for prompt, *responses in map(json.loads, open(data)) for response in responses]
    tokenizer.padding_side = "right"
    for i in range(0, len(texts), batch_size):
        batch = tokenizer.pad({"input_ids": texts[i:i + batch_size]}, return_tensors="pt").to(model.device)
        with torch.no_grad():
            rewards += model(**batch).logits[:, 0].tolist()
    gate()


def run_plain_generation(folder, data, batch_size, max_new_tokens, gate):
    """Responses to every row's prompt, in batches cut from the file as it stands."""
    import transformers
    model, tokenizer = load("CausalLM", folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)
    prompts = [prompt for prompt, *_ in map(json.loads, open(data))]
    tokenizer.padding_side = "left"
    for i in range(0, len(prompts), batch_size):
        gate()
        batch = tokenizer.pad({"input_ids": prompts[i:i + batch_size]}, return_tensors="pt").to(model.device)
        output = model.generate(**batch, do_sample=True, temperature=0.7, top_p=0.8, top_k=0, max_new_tokens=max_new_tokens)
        tokenizer.batch_decode(output[:, batch.input_ids.shape[1]:], skip_special_tokens=True)
    gate()


def load(kind, folder):
    """The folder's AutoModelFor<kind> as our stages load it: fp32, SDPA, no dropout, one label."""
    import torch
    import transformers
    config = transformers.AutoConfig.from_pretrained(folder)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    config.num_labels = 1
    model = getattr(transformers, "AutoModelFor" + kind).from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="sdpa")
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def gate_forward(model, gate):
    """The model, warmed up, with the gate before each of its forward passes."""
    import torch
    with torch.no_grad():
        model.base_model(input_ids=torch.ones(8, 256, dtype=torch.long, device=model.device), use_cache=False)
    model.base_model.register_forward_pre_hook(lambda *_: gate())
    return model


# ---- the parent -----------------------------------------------------------------------------------------------------


def alternate(sides, home, steps=None, profile=False, yardstick=None):
    """Lets the sides {name: (function, *args)} take steps in turn: `steps` each behind two of warm-up, the second with its
    FLOPs counted, or all they have. Returns {name: {"seconds", "cpu", "yardstick": a list of each, "memory", "flops"}}."""
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for name, (run, *args) in sides.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(run, args, theirs, f"{home}/{name}.log"), daemon=True))
        processes[-1].start()
        theirs.close()  # so that a worker's end is noticed

    def take(name, command=None):
        try:
            if command:
                pipes[name].send(command)
            return pipes[name].recv()
        except (EOFError, ConnectionError):
            sys.exit(f"error: the worker `{name}` ended; see {home}/{name}.log")

    results = {name: {"seconds": [], "cpu": [], "yardstick": []} for name in sides}
    for name in sides:
        take(name)  # loading, the reference and, where there are optimizer steps, the first
    for name in sides if steps else []:
        results[name]["flops"] = take(name, "flops")["watch"]
    alive = list(sides)
    for step in range(steps) if steps else itertools.count():
        for name in list(alive):
            watched = profile and not steps and step == 0 and name == next(iter(sides))  # its first batch, measured with the rest
            report = take(name, "profile" if watched else "go")
            if report is None:
                alive.remove(name)
                continue
            if watched:
                print(f"\n{name}, one batch:\n{report['watch']}\n", file=sys.stderr)
            results[name]["memory"] = report["memory"]
            results[name]["seconds"].append(report["seconds"])
            results[name]["cpu"].append(report["cpu"])
            results[name]["yardstick"].append(yardstick() if yardstick else 0)
        if not alive:
            break
    for name in alive[:1] if profile else []:
        print(f"\n{name}, one step:\n{take(name, 'profile')['watch']}\n", file=sys.stderr)
    for name in alive:
        pipes[name].send("stop")
    for process in processes:
        process.join()
    return results


def matmul_speed(tokens, hidden, intermediate):
    """FLOPs a second of a product (tokens, hidden) x (hidden, intermediate), in the dtype that training has here."""
    import torch
    options = {"device": "cuda", "dtype": torch.bfloat16} if torch.cuda.is_available() else {}
    a, b, seconds = torch.randn(tokens, hidden, **options), torch.randn(hidden, intermediate, **options), []
    for _ in range(9):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return 2 * tokens * hidden * intermediate / statistics.median(seconds)


def make_row(what, theirs, a, b, rows, time_goal=None, memory_goal=None):
    """A line of the table: `what` with results `a` against `theirs` with `b`; `rows`: how many a step takes, or all do."""
    def goal(value, most):
        return f"{most:.2f} {'met' if value <= most else '**not met**'}" if most else ""

    by_step = "flops" in a  # both took the same rows in each step; else the same in all
    middle = statistics.median if by_step else sum
    time_, cpu = ([middle(side[key]) for side in (a, b)] for key in ("seconds", "cpu"))
    ratio, cpu_ratio = (statistics.median(x / y for x, y in zip(a[key], b[key])) if by_step else sum(a[key]) / sum(b[key])
                        for key in ("seconds", "cpu"))
    mfu = " / ".join(f"{statistics.median(side['flops'] / s / y for s, y in zip(side['seconds'], side['yardstick'])):.2f}"
                     for side in (a, b)) if by_step and a["yardstick"][0] else ""
    flops, memory = f"{a['flops'] / b['flops']:.2f}" if by_step else "", a["memory"] / b["memory"]
    line = (f"| {what} | {theirs} | **{ratio:.2f}** ({time_[0]:.1f} / {time_[1]:.1f} s) | {goal(ratio, time_goal)} | "
            f"{cpu_ratio:.2f} ({cpu[0]:.1f} / {cpu[1]:.1f} s) | {flops} | **{memory:.2f}** ({a['memory']:.1f} / "
            f"{b['memory']:.1f} GiB) | {goal(memory, memory_goal)} | {rows / time_[0]:.2f} | {mfu} |")
    print(line, file=sys.stderr, flush=True)
    return line


# ---- data and model -------------------------------------------------------------------------------------------------


def random_rows(tokenizer, shape, number):
    """Preference rows of random words whose prompts and responses have a shape's numbers of tokens (`natural`: drawn from
    lognormals; a chat template may make prompts longer)."""
    import align
    rng = random.Random(shape)

    def length(mean, std):
        variance = math.log(1 + (std / mean) ** 2)
        return min(700, max(3, round(rng.lognormvariate(math.log(mean) - variance / 2, variance ** 0.5))))

    def is_token(text):
        return len(tokenizer(text, add_special_tokens=False).input_ids) == 1

    words = {tokenizer.decode([i]).strip() for i in rng.sample(range(len(tokenizer)), min(len(tokenizer), 4000))}
    words = sorted(word for word in words if word.isalpha() and is_token(word) and is_token(" " + word))
    extra = len(align.encode_prompt(tokenizer, words[0])) - 1, 1, 1  # BOS or the chat template; EOS
    rows = []
    for _ in range(number):
        lengths = [length(*moments) for moments in NATURAL] if shape == "natural" else [RATIOS[shape][i] for i in (0, 1, 1)]
        texts = [" ".join(rng.choices(words, k=max(1, n - x))) for n, x in zip(lengths, extra)]
        rows.append({"prompt": texts[0], "chosen": " " + texts[1], "rejected": " " + texts[2]})
    return rows


def write_data(folder, tokenizer, rows, batch_size=None):
    """Writes <folder>/pairs.jsonl, rewards.pt (random), and ids.jsonl: the pairs' token ids, in the order in which our loops
    take them at this batch size, or in file order. Returns the folder."""
    import numpy as np
    import torch
    import align
    os.makedirs(folder, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows)
    Path(f"{folder}/pairs.jsonl").write_text(data)
    pairs = [(align.encode_prompt(tokenizer, row["prompt"]), align.encode_response(tokenizer, row["chosen"]),
              align.encode_response(tokenizer, row["rejected"])) for row in rows]
    order = range(len(pairs))
    if batch_size:
        lengths = np.array([sum(map(len, pair)) for pair in pairs])
        order = np.concatenate([*itertools.islice(align.batches(lengths, batch_size, 0), len(pairs) // batch_size)])
    Path(f"{folder}/ids.jsonl").write_text("".join(json.dumps(pairs[i]) + "\n" for i in order))
    torch.save({"chosen": torch.randn(3, len(rows)), "rejected": torch.randn(3, len(rows)), "oracles": ["a", "b", "c"],
                "data_sha256": hashlib.sha256(data.encode()).hexdigest()}, f"{folder}/rewards.pt")
    print(f"{folder}: {len(rows)} pairs; tokens of prompt, chosen and rejected on average:",
          *(round(statistics.mean(len(pair[i]) for pair in pairs)) for i in range(3)), file=sys.stderr)
    return folder


def make_small_model(folder):
    """A random OPT of 16M parameters with the laboratory's tokenizer, for a run on any machine."""
    import torch
    import transformers
    import toy
    torch.manual_seed(0)
    tokenizer = toy.make_tokenizer()
    config = transformers.OPTConfig(
        vocab_size=16384, hidden_size=320, word_embed_proj_dim=320, ffn_dim=1280, num_hidden_layers=8, num_attention_heads=5,
        max_position_embeddings=2048, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    transformers.OPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main():
    formatters = argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", formatters, {}))
    modes = ["align", "in_the_loop", "losses", "oracle", "sft", "scoring", "generation"]
    parser.add_argument("--modes", nargs="+", default=modes, choices=modes, help="what to compare")
    parser.add_argument("--shapes", nargs="+", default=[*GOALS], choices=[*GOALS], help="prompt:response (align, oracle)")
    parser.add_argument("--model", help="a model folder (default: a small random OPT)")
    parser.add_argument("--data", help="preference JSONL for natural lengths (default: random words, lognormal lengths)")
    parser.add_argument("--batch_size", type=int, default=4, help="pairs a step, in one micro-batch")
    parser.add_argument("--steps", type=int, default=7, help="measured steps a side")
    parser.add_argument("--rows", type=int, default=64, help="pairs to score, and prompts to answer")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="of a generated response")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="OpenMP threads of a worker")
    parser.add_argument("--deepspeed_config", default="ds_config.json", help="ours")
    parser.add_argument("--out", default="out/bench", help="folder for data, models and the workers' logs")
    parser.add_argument("--profile", action="store_true", help="show where the time of one of our steps, or batches, goes")
    args = parser.parse_args()
    home, start = os.path.abspath(args.out), time.time()
    os.makedirs(home, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "passive",  # a waiting worker must not spin
                   "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    import align  # after the variables that torch reads
    model = os.path.abspath(args.model or f"{home}/model")
    if not args.model:
        make_small_model(model)
    tokenizer, config = align.load_tokenizer(model), align.AutoConfig.from_pretrained(model)
    batch, total, table = args.batch_size, args.steps + 3, []

    def fits(row):  # so that neither side drops a pair
        return len(align.encode_prompt(tokenizer, row["prompt"])) + max(
            len(align.encode_response(tokenizer, row[key])) for key in ("chosen", "rejected")) <= 1024

    def data(shape, number=total * batch, batch_size=batch):
        if shape == "natural" and args.data:
            rows = align.read_jsonl(args.data, "prompt", "chosen", "rejected")
            random.Random(0).shuffle(rows)
            rows = list(itertools.islice(filter(fits, rows), number))
            if len(rows) < number:
                align.fail(f"--data {args.data}: {len(rows)} pairs of at most 1024 tokens, {number} are needed; lower --steps or --rows")
        else:
            rows = random_rows(tokenizer, shape, number)
        return write_data(f"{home}/{shape.replace(':', '_')}_{number}", tokenizer, rows, batch_size)

    def ours(stage, folder, *flags):
        return (run_ours, stage, ["--model", model, "--data", f"{folder}/pairs.jsonl", "--eval_data", "",
                "--out", f"{folder}/{stage}", "--batch_size", batch, "--micro_batch_size", batch, "--max_steps", total,
                "--learning_rate", 1e-6, "--warmup_steps", 0, "--save_steps", 0, "--deepspeed_config", args.deepspeed_config, *flags])

    def theirs(kind, folder, **options):
        return run_trl, kind, model, f"{folder}/ids.jsonl", batch, total, options

    def compare(what, shape, sides, goals):
        """Adds a row for the first of the sides against each other one, with its goals of time and memory."""
        yardstick = None
        if shape in RATIOS:
            tokens, width = batch * (RATIOS[shape][0] + 2 * RATIOS[shape][1]), config.hidden_size
            yardstick = functools.partial(matmul_speed, tokens, width, getattr(config, "intermediate_size", 4 * width))
        results = alternate(sides, home, args.steps, args.profile, yardstick)
        for name in list(sides)[1:]:
            table.append(make_row(f"{what}, {shape}", name, results[next(iter(sides))], results[name], batch, *goals[name]))

    for shape in args.shapes if "align" in args.modes else []:
        folder = data(shape)
        compare("align.py, dpo", shape, {
            "ours": ours("align", folder, "--loss", "dpo"),
            "DPOTrainer": theirs("DPO", folder, precompute_ref_log_probs=True)}, {"DPOTrainer": GOALS[shape]})
    if "in_the_loop" in args.modes:
        folder, name = data("3:1"), "DPOTrainer, reference in the loop"
        compare("align.py, dpo", "3:1", {
            "ours": ours("align", folder, "--loss", "dpo"), name: theirs("DPO", folder)}, {name: GOALS["3:1"]})
    for loss in ("drdo", "edpo") if "losses" in args.modes else []:
        folder = data("3:1")
        flags = ["--loss", loss, "--oracle_rewards", f"{folder}/rewards.pt", "--out", f"{folder}/{loss}"]
        # by twos: of three, the one that steps behind TRL's would find its caches cold, the next one not
        compare(f"align.py, {loss}", "3:1", {
            loss: ours("align", folder, *flags), "our dpo": ours("align", folder, "--loss", "dpo")}, {"our dpo": (1.03,)})
        compare(f"align.py, {loss}", "3:1", {
            loss: ours("align", folder, *flags), "DPOTrainer": theirs("DPO", folder, precompute_ref_log_probs=True)},
            {"DPOTrainer": GOALS["3:1"]})
    for shape in args.shapes if "oracle" in args.modes else []:
        folder = data(shape)
        compare("oracle.py, alpha 0", shape, {
            "ours": ours("oracle", folder, "--alpha", 0), "RewardTrainer": theirs("Reward", folder)},
            {"RewardTrainer": GOALS[shape]})
    if "sft" in args.modes:
        folder = data("natural")
        compare("sft.py", "natural", {"ours": ours("sft", folder), "SFTTrainer": theirs("SFT", folder)}, {"SFTTrainer": ()})

    other = "batches of 8 in file order"
    if "scoring" in args.modes:
        scorer, folder = load("SequenceClassification", model), data("natural", args.rows, None)
        scorer.config.pad_token_id = tokenizer.pad_token_id
        scorer.save_pretrained(f"{home}/scorer")
        tokenizer.save_pretrained(f"{home}/scorer")
        flags = ["--oracle", f"{home}/scorer", "--data", f"{folder}/pairs.jsonl", "--out", f"{folder}/rewards.pt"]
        results = alternate({"ours": (run_ours, "precompute_rewards", [*flags, "--micro_batch_size", 8]),
                             other: (run_plain_scoring, f"{home}/scorer", f"{folder}/ids.jsonl", 8)}, home, profile=args.profile)
        table.append(make_row("precompute_rewards.py, natural", other, results["ours"], results[other], args.rows, 0.6))
    if "generation" in args.modes:
        folder = data("natural", args.rows, None)
        for size in 8, 32:  # 32 is its default
            flags = ["--model", model, "--prompts", f"{folder}/pairs.jsonl", "--out", f"{folder}/generations.jsonl",
                     "--temperature", 0.7, "--max_new_tokens", args.max_new_tokens, "--micro_batch_size", size]
            results = alternate({"ours": (run_ours, "generate", flags), other: (
                run_plain_generation, model, f"{folder}/ids.jsonl", 8, args.max_new_tokens)}, home, profile=args.profile)
            table.append(make_row(f"generate.py, {size} a batch, natural", other, results["ours"], results[other], args.rows, 0.6))

    print(f"\n{os.path.basename(model)}, {args.threads} threads, {batch} pairs a step, {args.steps} steps a side, "
          f"{(time.time() - start) / 60:.0f} minutes\n\n"
          f"| ours | theirs | time | goal | CPU | FLOPs | memory | goal | rows/s | MFU |\n|{'---|' * 10}\n" + "\n".join(table))


if __name__ == "__main__":
    main()
