"""Our scripts against TRL 1.16's trainers: ratios of time and memory, as one Markdown table.

Each side runs its real loop (align.main(), trl.DPOTrainer.train(), ...) in a process of its own. The two take
their steps in turn, so other programs disturb both alike. Both have the same model, token ids, batches,
AdamW, clipping and dtype, no dropout and no gradient checkpointing. TRL runs without DeepSpeed, with its own
collator. This is no test: it prints, and says which goals are met.

It needs TRL, which nothing else here does. Give it an environment of its own:

    python -m venv bench_env && bench_env/bin/pip install -r requirements.txt trl==1.16.0
    bench_env/bin/python tests/bench.py                   # a small random OPT; ten minutes on two cores
    bench_env/bin/python tests/bench.py --modes align --shapes natural --data data/all/train.jsonl
    bench_env/bin/python tests/bench.py --modes align --shapes 3:1 --steps 9 --profile
    bench_env/bin/python tests/bench.py --model SmolLM2-135M-Instruct --modes align oracle --steps 5   # 16 GB

Columns, ours / theirs. `time`: of a step, by the clock. `CPU`: in CPU seconds, which other programs disturb
less. `FLOPs`: of a step, forward and backward, as torch counts them. `memory`: the resident peak, imports and
all (on a GPU what was allocated there). `MFU`: a step's FLOPs a second over those of a matrix product of the
model's shapes, measured beside it. On a CPU TRL computes the logits of every position, on a GPU of the
responses' only: there the ratios are higher. The GPU's path is untested.
"""
import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

os.environ |= {"OMP_WAIT_POLICY": "passive",  # whoever waits must not spin
               "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
if __name__ == "__main__":  # not in a worker: its memory is measured, and TRL's side needs no DeepSpeed
    import align
    import toy

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KEYS = ["chosen", "rejected"]
MODES = ["align", "in_the_loop", "losses", "oracle", "sft", "scoring", "generation"]
RATIOS = {"1:1": (128, 128), "3:1": (192, 64), "11:1": (352, 32)}  # tokens of prompt and response, EOS too
GOALS = {"1:1": (0.55, 0.80), "3:1": (0.45, 0.70), "11:1": (0.35, 0.60), "natural": (0.85,)}  # time, memory
NATURAL = (3.19, 0.81), (4.99, 0.51), (4.82, 0.53)  # lognormals of mean 34, 167, 143: AlpacaEval's tokens


def parse_args():
    formatters = argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", formatters, {}))
    flag = parser.add_argument
    flag("--modes", nargs="+", default=MODES, choices=MODES, help="what to compare")
    flag("--shapes", nargs="+", default=[*GOALS], choices=[*GOALS], help="prompt:response (align, oracle)")
    flag("--model", help="a model folder (default: a small random OPT)")
    flag("--data", help="preference JSONL for natural lengths (default: random words, lognormal lengths)")
    flag("--batch_size", type=int, default=4, help="pairs a step, in one micro-batch")
    flag("--steps", type=int, default=7, help="measured steps a side, behind two of warm-up")
    flag("--rows", type=int, default=64, help="pairs to score, and prompts to answer")
    flag("--max_new_tokens", type=int, default=32, help="of a generated response")
    flag("--dtype", choices=["bf16", "fp32"], default="fp32", help="of the arithmetic, on both sides")
    flag("--threads", type=int, default=os.cpu_count(), help="OpenMP threads of a worker")
    flag("--deepspeed_config", default="ds_config.json", help="ours")
    flag("--out", default="out/bench", help="folder for data, models and the workers' logs")
    flag("--profile", action="store_true",
         help="show where our first measured step or batch spends its time (the profiler slows it)")
    return parser.parse_args()


def main():
    args, start = parse_args(), time.time()
    align.check_flags(args, "")
    home = os.path.abspath(args.out)
    os.makedirs(home, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # the workers'
    torch.set_num_threads(args.threads)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    model = os.path.abspath(args.model or f"{home}/model")
    if not args.model:
        make_small_model(model)
    with align.or_fail(f"--model {model}", "name the folder of a causal LM"):
        tokenizer, config = (auto.from_pretrained(model) for auto in (align.AutoTokenizer, align.AutoConfig))
    batch, max_steps, table = args.batch_size, args.steps + 2, []

    def data(shape, number=batch * max_steps, batch_size=batch):
        folder = f"{home}/{shape.replace(':', '_')}_{number}"
        with redirect_stdout(sys.stderr):  # the table alone goes to standard output
            return write_data(folder, tokenizer, shape, args.data, number, batch_size)

    def ours(stage, folder, *flags):
        return run_ours, stage, [
            "--model", model, "--data", f"{folder}/pairs.jsonl", "--eval_data", "",
            "--out", f"{folder}/{stage}", "--batch_size", batch, "--micro_batch_size", batch,
            "--max_steps", max_steps, "--save_steps", 0, "--learning_rate", 1e-6, "--warmup_steps", 0,
            "--dtype", args.dtype, "--deepspeed_config", args.deepspeed_config, *flags]

    def theirs(kind, folder, **options):
        return run_trl, kind, model, f"{folder}/ids.jsonl", batch, max_steps, args.dtype, options

    def compare(what, shape, our_side, name, their_side, time_goal=None, memory_goal=None, steps=args.steps):
        """Adds a row to the table: ours against the side called `name`. steps=0: over all their batches."""
        product = None
        if shape in RATIOS:
            tokens, width = batch * (RATIOS[shape][0] + 2 * RATIOS[shape][1]), config.hidden_size
            product = tokens, width, getattr(config, "intermediate_size", 4 * width), args.dtype
        a, b = alternate({"ours": our_side, name: their_side}, home, steps, args.profile, product)
        table.append(make_row(f"{what}, {shape}", name, a, b, steps, batch if steps else args.rows,
                              time_goal, memory_goal))
        print(table[-1], file=sys.stderr, flush=True)

    # ---- training
    cached = {"precompute_ref_log_probs": True}
    for shape in args.shapes if "align" in args.modes else []:
        folder = data(shape)
        compare("align.py, dpo", shape, ours("align", folder, "--loss", "dpo"),
                "DPOTrainer", theirs("DPO", folder, **cached), *GOALS[shape])
    if "in_the_loop" in args.modes:
        folder = data("3:1")
        compare("align.py, dpo", "3:1", ours("align", folder, "--loss", "dpo"),
                "DPOTrainer, reference in the loop", theirs("DPO", folder), *GOALS["3:1"])
    for loss in ("drdo", "edpo") if "losses" in args.modes else []:
        folder = data("3:1")
        distils = ours("align", folder, "--loss", loss, "--oracle_rewards", f"{folder}/rewards.pt")
        # Two at a time: of three, the one behind TRL's finds its caches cold, and the next one does not
        compare(f"align.py, {loss}", "3:1", distils,
                "our dpo", ours("align", folder, "--loss", "dpo", "--out", f"{folder}/dpo"), 1.03)
        compare(f"align.py, {loss}", "3:1", distils,
                "DPOTrainer", theirs("DPO", folder, **cached), *GOALS["3:1"])
    for shape in args.shapes if "oracle" in args.modes else []:
        folder = data(shape)
        compare("oracle.py, alpha 0", shape, ours("oracle", folder, "--alpha", 0),
                "RewardTrainer", theirs("Reward", folder), *GOALS[shape])
    if "sft" in args.modes:
        folder = data("natural")
        compare("sft.py", "natural", ours("sft", folder), "SFTTrainer", theirs("SFT", folder))

    # ---- scoring and generation
    plain = "batches of 8 in file order"
    if {"scoring", "generation"} & {*args.modes}:
        folder = data("natural", args.rows, None)
        pairs, ids = f"{folder}/pairs.jsonl", f"{folder}/ids.jsonl"
    if "scoring" in args.modes:
        oracle = f"{home}/oracle_{os.path.basename(model)}"
        scorer = load("SequenceClassification", model)
        scorer.config.pad_token_id = tokenizer.pad_token_id
        scorer.save_pretrained(oracle)
        tokenizer.save_pretrained(oracle)
        flags = ["--oracle", oracle, "--data", pairs, "--out", f"{folder}/scores.pt",
                 "--micro_batch_size", 8, "--dtype", args.dtype]
        compare("precompute_rewards.py", "natural", (run_ours, "precompute_rewards", flags),
                plain, (run_plain, "SequenceClassification", oracle, ids, args.dtype), 0.6, steps=0)
    for size in (8, 32) if "generation" in args.modes else []:  # 32 is generate.py's default
        flags = ["--model", model, "--prompts", pairs, "--out", f"{folder}/generations.jsonl",
                 "--temperature", 0.7, "--max_new_tokens", args.max_new_tokens,
                 "--micro_batch_size", size, "--dtype", args.dtype]
        compare(f"generate.py, {size} a batch", "natural", (run_ours, "generate", flags),
                plain, (run_plain, "CausalLM", model, ids, args.dtype, args.max_new_tokens), 0.6, steps=0)

    print(f"\n{os.path.basename(model)}, {args.dtype}, {args.threads} threads, {batch} pairs a step, "
          f"{args.steps} steps a side, {(time.time() - start) / 60:.0f} minutes\n\n"
          f"| ours | theirs | time | goal | CPU | FLOPs | memory | goal | rows/s | MFU |\n|{'---|' * 10}")
    print("\n".join(table))


# ---- model and data ----------------------------------------------------------------------------------------


def make_small_model(folder):
    """A random OPT of 16M parameters with the laboratory's tokenizer, for a run on any machine."""
    torch.manual_seed(0)
    tokenizer = toy.make_tokenizer()
    config = transformers.OPTConfig(
        vocab_size=16384, hidden_size=320, word_embed_proj_dim=320, ffn_dim=1280, num_hidden_layers=8,
        num_attention_heads=5, max_position_embeddings=2048, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    transformers.OPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_data(folder, tokenizer, shape, path, number, batch_size=None):
    """Writes <folder>/pairs.jsonl, rewards.pt (random), and ids.jsonl: the pairs' token ids, in the order of
    our training at this batch size, or without one in file order. Returns the folder."""
    os.makedirs(folder, exist_ok=True)
    if shape == "natural" and path:
        fits, rows = align.Rows(path, KEYS, tokenizer, 1024).lines, [json.loads(line) for line in open(path)]
        if len(fits) < number:
            align.fail(f"--data {path}: {len(fits)} pairs of at most 1024 tokens, {number} are needed; "
                       "lower --steps or --rows")
        rows = [rows[line - 1] for line in random.Random(0).sample(fits.tolist(), number)]
    else:
        rows = random_rows(tokenizer, shape, number)
    data = "".join(json.dumps(row) + "\n" for row in rows)
    Path(f"{folder}/pairs.jsonl").write_text(data)
    pairs = align.Rows(f"{folder}/pairs.jsonl", KEYS, tokenizer, 1024)
    order = range(len(pairs))
    if batch_size:
        flags = argparse.Namespace(batch_size=batch_size, micro_batch_size=batch_size, seed=0, warmup_steps=0,
                                   max_steps=number // batch_size, epochs=None)
        order = align.plan_steps(pairs.lengths.sum(1), flags).flatten()
    lines = [json.dumps([ids.tolist() for ids in pairs[i]]) + "\n" for i in order]
    Path(f"{folder}/ids.jsonl").write_text("".join(lines))
    torch.save({"chosen": torch.randn(3, number), "rejected": torch.randn(3, number),
                "data_sha256": hashlib.sha256(data.encode()).hexdigest()}, f"{folder}/rewards.pt")
    print("tokens of prompt, chosen and rejected on average:",
          *pairs.lengths.mean(0).round().astype(int))
    return folder


def random_rows(tokenizer, shape, number):
    """Preference rows of random words, with a shape's numbers of tokens (a chat template adds some)."""
    rng = random.Random(shape)
    ids = rng.sample(range(len(tokenizer)), min(len(tokenizer), 4000))
    words = {tokenizer.decode([i]).strip() for i in ids}
    words = sorted(word for word in words if word.isalpha() and all(
        len(ids) == 1 for ids in tokenizer([word, " " + word], add_special_tokens=False).input_ids))
    extra = len(align.encode_prompt(tokenizer, words[0])) - 1, 1, 1  # BOS or the chat template; EOS
    rows = []
    for _ in range(number):
        if shape == "natural":
            lengths = [min(500, max(3, round(rng.lognormvariate(*moments)))) for moments in NATURAL]
        else:
            lengths = [RATIOS[shape][i] for i in (0, 1, 1)]
        texts = [" ".join(rng.choices(words, k=max(1, n - x))) for n, x in zip(lengths, extra)]
        rows.append({"prompt": texts[0], "chosen": " " + texts[1], "rejected": " " + texts[2]})
    return rows


# ---- the parent: two sides take their steps in turn --------------------------------------------------------


def alternate(sides, home, steps, profile, product):
    """Lets the sides {name: (function, *args)} take their steps in turn. Returns each side's reports. With
    `steps`: of loading and the first step, of a step whose FLOPs are counted, of each measured step. Without:
    of loading, of each batch. product: the shapes of a matrix product that is timed beside each."""
    context, workers, reports = multiprocessing.get_context("spawn"), {}, {name: [] for name in sides}
    for name, side in sides.items():
        pipe, theirs = context.Pipe()
        inputs = theirs, f"{home}/{name}.log", steps, profile and name == "ours", *side
        workers[name] = pipe, context.Process(target=work, args=inputs, daemon=True)
        workers[name][1].start()
        theirs.close()  # so that a worker's end is noticed
    while workers:
        for name, (pipe, process) in list(workers.items()):
            try:
                if reports[name]:
                    pipe.send("go")
                report = pipe.recv()
            except (EOFError, ConnectionError):
                process.join()
                if process.exitcode or not reports[name]:
                    sys.exit(f"error: the worker `{name}` ended; see {home}/{name}.log")
                del workers[name]
                continue
            if "profile" in report:
                print(f"\n{name}, one step or batch:\n{report['profile']}\n", file=sys.stderr)
            reports[name].append(report | {"product": product and matmul_speed(*product)})
    return reports.values()


def matmul_speed(tokens, hidden, intermediate, dtype):
    """FLOPs a second of a product (tokens, hidden) x (hidden, intermediate)."""
    options = {"device": "cuda" if torch.cuda.is_available() else "cpu", "dtype": DTYPES[dtype]}
    a, b, seconds = torch.randn(tokens, hidden, **options), torch.randn(hidden, intermediate, **options), []
    for _ in range(9):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return 2 * tokens * hidden * intermediate / statistics.median(seconds)


def make_row(what, name, a, b, steps, rows, time_goal, memory_goal):
    """A line of the table: reports `a` of ours against `b` of `name`. rows: of a step, or of all."""
    def times(key):  # ours / theirs, ours, theirs
        x, y = ([report[key] for report in side[2 if steps else 1:]] for side in (a, b))
        if steps:  # both took the same rows in each step
            return statistics.median(i / j for i, j in zip(x, y)), statistics.median(x), statistics.median(y)
        return sum(x) / sum(y), sum(x), sum(y)

    def goal(value, most):
        return f"{most:.2f} {'met' if value <= most else '**not met**'}" if most else ""

    def speed(side):  # a share of the matrix product's
        return statistics.median(side[1]["flops"] / step["seconds"] / step["product"] for step in side[2:])

    seconds, memory = times("seconds"), (a[-1]["memory"] / b[-1]["memory"], a[-1]["memory"], b[-1]["memory"])
    cells = ["**{:.2f}** ({:.1f} / {:.1f} s)".format(*seconds), goal(seconds[0], time_goal),
             "{:.2f} ({:.1f} / {:.1f} s)".format(*times("cpu")),
             f"{a[1]['flops'] / b[1]['flops']:.2f}" if steps else "",
             "**{:.2f}** ({:.1f} / {:.1f} GiB)".format(*memory), goal(memory[0], memory_goal),
             f"{rows / seconds[1]:.2f}", f"{speed(a):.2f} / {speed(b):.2f}" if a[0]["product"] else ""]
    return f"| {what} | {name} | {' | '.join(cells)} |"


# ---- a worker: one side in its own process -----------------------------------------------------------------


def work(pipe, log, steps, profile, run, *args):
    """Runs a side's loop, its output in the file `log`; `pipe` leads to the parent."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    run(*args, gate=make_gate(pipe, steps, profile))


def make_gate(pipe, steps, profile):
    """A function to call between steps. It reports the step to the parent and waits for the parent's word."""
    aten, cuda = torch.ops.aten, torch.cuda.is_available()
    counter = FlopCounterMode(display=False, custom_mapping={  # torch has no formulas for these three
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
        aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]})
    watches = {1: counter} if steps else {}  # by the number of the report that they belong to
    if profile:
        watches[len(watches) + 1] = torch.profiler.profile()
    number, start = 0, (time.perf_counter(), time.process_time())

    def gate():
        nonlocal number, start
        if cuda:
            torch.cuda.synchronize()
        report = {"seconds": time.perf_counter() - start[0], "cpu": time.process_time() - start[1]}
        if cuda:
            report["memory"] = torch.cuda.max_memory_allocated() / 2**30
        else:  # of this program; ru_maxrss would hand down what the parent held when it started us
            status = Path("/proc/self/status").read_text()
            report["memory"] = int(status.split("VmHWM:")[1].split()[0]) / 2**20
        watch = watches.get(number)
        if watch:
            watch.__exit__(None, None, None)
        if watch is counter:
            report["flops"] = counter.get_total_flops()
        elif watch:
            key = f"self_{'cuda' if cuda else 'cpu'}_time_total"
            report["profile"] = watch.key_averages().table(sort_by=key, row_limit=12)
        pipe.send(report)
        pipe.recv()
        number += 1
        if steps and number == steps + 2:
            sys.exit()
        if number in watches:
            watches[number].__enter__()
        start = time.perf_counter(), time.process_time()

    return gate


def run_ours(stage, flags, gate):
    """A stage's main(), with the gate behind each step of DeepSpeed's engine, or before each batch of scoring
    or generation."""
    import deepspeed
    module = importlib.import_module(stage)
    if stage == "precompute_rewards":
        score = module.score
        module.score = lambda model, *inputs: (
            model.base_model.register_forward_pre_hook(lambda *_: gate()), score(model, *inputs))[1]
    elif stage == "generate":
        generate = module.generate
        module.generate = lambda *inputs: (gate(), generate(*inputs))[1]
    else:
        step = deepspeed.DeepSpeedEngine.step
        deepspeed.DeepSpeedEngine.step = lambda engine: (step(engine), gate())
    sys.argv = [f"{stage}.py", *map(str, flags)]
    module.main()
    gate()  # behind the last batch


def run_trl(kind, folder, data, batch_size, max_steps, dtype, options, gate):
    """A trainer of TRL on the token ids in the file `data`, in its order, with the gate behind each step."""
    import trl
    from datasets import Dataset

    class Gate(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            gate()

    columns = {"DPO": lambda p, c, r: {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r},
               "Reward": lambda p, c, r: {"chosen_ids": p + c, "rejected_ids": p + r},
               "SFT": lambda p, c, r: {"input_ids": p + c,
                                       "completion_mask": [0] * len(p) + [1] * len(c)}}[kind]
    rows = [columns(*json.loads(line)) for line in open(data)]
    trl.DPOTrainer._prepare_dataset = lambda self, dataset, *_: dataset  # it would make token ids of text
    config = getattr(trl, kind + "Config")(
        output_dir=data + ".trl", max_length=None, max_steps=max_steps, learning_rate=1e-6, weight_decay=0.05,
        per_device_train_batch_size=batch_size, train_sampling_strategy="sequential", max_grad_norm=1.0,
        lr_scheduler_type="cosine", gradient_checkpointing=False, bf16=dtype == "bf16", logging_steps=5,
        use_cpu=not torch.cuda.is_available(), save_strategy="no", report_to="none", **options)
    getattr(trl, kind + "Trainer")(
        model=load("SequenceClassification" if kind == "Reward" else "CausalLM", folder), args=config,
        callbacks=[Gate()], train_dataset=Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder)).train()


def run_plain(kind, folder, data, dtype, max_new_tokens=0, gate=None):
    """Rewards of each row's two responses, or responses to its prompt, in batches of 8 in file order."""
    model, tokenizer = load(kind, folder, dtype).eval(), transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left" if max_new_tokens else "right"
    texts = []
    for prompt, chosen, rejected in map(json.loads, open(data)):
        texts += [prompt] if max_new_tokens else [prompt + chosen, prompt + rejected]
    texts = [list(ids) for ids in dict.fromkeys(map(tuple, texts))]  # each once, as our stages do
    for i in range(0, len(texts), 8):
        gate()
        batch = tokenizer.pad({"input_ids": texts[i:i + 8]}, return_tensors="pt").to(model.device)
        with torch.no_grad():
            if max_new_tokens:
                output = model.generate(**batch, do_sample=True, temperature=0.7, top_p=0.8, top_k=0,
                                        max_new_tokens=max_new_tokens)
                tokenizer.batch_decode(output[:, batch.input_ids.shape[1]:], skip_special_tokens=True)
            else:
                model(**batch).logits[:, 0].tolist()
    gate()


def load(kind, folder, dtype="fp32"):
    """The folder's AutoModelFor<kind>: SDPA, no dropout, one label. Training keeps its weights in fp32."""
    config = transformers.AutoConfig.from_pretrained(folder)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    config.num_labels = 1
    model = getattr(transformers, "AutoModelFor" + kind).from_pretrained(
        folder, config=config, dtype=DTYPES[dtype], attn_implementation="sdpa")
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
