"""Our scripts against TRL 1.16's trainers, in time and memory: ratios, printed as one Markdown table.

Each side runs its real loop (align.main(), trl.DPOTrainer.train(), ...) in a process of its own. The two take their
optimizer steps in turn, one waiting while the other works, and a row shows the median ratio of neighbouring steps, so
that other programs on the machine disturb both alike. Same model, same token ids in the same batches, same dtype,
AdamW, clipping at 1.0, no dropout, no gradient checkpointing; one process a side; TRL without DeepSpeed, with its own
collator and its default (fused) AdamW. Nothing here is a test: it prints, and says which goals are met.

It needs TRL, which nothing else here does, so give it an environment of its own:

    python -m venv bench_env && bench_env/bin/pip install -r requirements.txt trl==1.16.0
    bench_env/bin/python tests/bench.py                                 # a small random Llama: minutes
    bench_env/bin/python tests/bench.py --model SmolLM2-135M-Instruct   # a folder; 25 minutes on two cores
    bench_env/bin/python tests/bench.py --modes align --steps 9 --profile

Columns: `time` is the median of ours / theirs, step by step; `FLOPs` of one step, forward and backward, as counted by
torch; `memory` the peak of resident memory, imports included (on a GPU what was allocated there). MFU is our step's
FLOPs a second as a share of what one product of (tokens x hidden) and (hidden x intermediate) reaches in the same run.
"""
import argparse
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

# prompt, response: tokens of each, the chat template and EOS included
RATIOS = {"1:1": (128, 128), "3:1": (192, 64), "11:1": (352, 32)}
# without --data: lognormal numbers of words with the mean and std of AlpacaEval's pairs (GPT-4-turbo's preferences), in
# SmolLM2's tokens: prompt, chosen, rejected
NATURAL = (34, 33), (167, 90), (143, 81)
GOALS = {"1:1": (0.55, 0.80), "3:1": (0.45, 0.70), "11:1": (0.35, 0.60), "natural": (0.85, None)}  # time, memory


# ---- a side, in its own process -------------------------------------------------------------------------------------


def work(run, args, gate, log):
    """Runs a side's loop, its output in the file `log`; `gate` is the worker's end of a pipe."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    run(*args, make_gate(gate))
    gate.send(None)  # no step is left


def make_gate(gate):
    """A function that a loop calls at the end of each step: it reports the step to the parent and waits for its word."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
    flash = "_scaled_dot_product_flash_attention_for_cpu"  # torch has formulas for the GPU's kernels only
    formulas = {getattr(torch.ops.aten, flash): lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
                getattr(torch.ops.aten, flash + "_backward"): lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)}
    watches = {"go": lambda: None, "flops": lambda: FlopCounterMode(display=False, custom_mapping=formulas),
               "profile": torch.profiler.profile}
    watch, start = None, time.perf_counter()

    def at_step_end():
        nonlocal watch, start
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        report = {"seconds": time.perf_counter() - start, "memory": peak_memory()}
        if watch:
            watch.__exit__(None, None, None)
            report["watch"] = watch.get_total_flops() if isinstance(watch, FlopCounterMode) else watch.key_averages().table(
                sort_by=f"self_{'cuda' if torch.cuda.is_available() else 'cpu'}_time_total", row_limit=12)
        gate.send(report)
        command = gate.recv()
        if command == "stop":
            sys.exit()
        watch = watches[command]()
        if watch:
            watch.__enter__()
        start = time.perf_counter()

    return at_step_end


def peak_memory():
    """GiB: the GPU's peak, or this program's own resident peak; ru_maxrss would hand down that of the process before."""
    import torch
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def run_ours(stage, flags, gate):
    """A stage's main(), which stops at the gate behind each step of DeepSpeed's engine, or before each batch it scores or
    generates."""
    import deepspeed
    module = importlib.import_module(stage)
    if stage == "precompute_rewards":
        load = module.load_oracle
        module.load_oracle = lambda *args: stop_before_forward(load(*args), gate)
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


def run_trl(kind, model, data, batch_size, max_steps, options, gate):
    """A trainer of TRL on rows of token ids, in the order of the file, which is the order that our loop takes."""
    import torch
    import transformers
    import trl
    from datasets import Dataset

    class Gate(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            gate()

    Trainer, Config = {"dpo": (trl.DPOTrainer, trl.DPOConfig), "reward": (trl.RewardTrainer, trl.RewardConfig),
                       "sft": (trl.SFTTrainer, trl.SFTConfig)}[kind]
    trl.DPOTrainer._prepare_dataset = lambda self, dataset, *_: dataset  # it would make token ids of text
    cuda = torch.cuda.is_available()
    config = Config(output_dir=str(Path(data).parent / "trl"), max_length=None, max_steps=max_steps,
                    per_device_train_batch_size=batch_size, train_sampling_strategy="sequential", learning_rate=1e-6,
                    weight_decay=0.05, lr_scheduler_type="cosine", max_grad_norm=1.0, gradient_checkpointing=False, bf16=cuda,
                    use_cpu=not cuda, logging_steps=5, save_strategy="no", report_to="none", **options)
    rows = [json.loads(line) for line in open(data)]
    if kind == "dpo":
        rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in rows]
    elif kind == "reward":
        rows = [{"chosen_ids": p + c, "rejected_ids": p + r} for p, c, r in rows]
    else:
        rows = [{"input_ids": p + c, "completion_mask": [0] * len(p) + [1] * len(c)} for p, c, r in rows]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    lm = load(transformers.AutoModelForSequenceClassification if kind == "reward" else transformers.AutoModelForCausalLM, model)
    Trainer(model=lm, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Gate()]).train()


def run_plain_scoring(folder, data, batch_size, gate):
    """Rewards of every row's two responses, in batches cut from the file as it stands."""
    import torch
    import transformers
    model = stop_before_forward(load(transformers.AutoModelForSequenceClassification, folder).eval(), gate)
    texts = [prompt + response for prompt, *responses in map(json.loads, open(data)) for response in responses]
    rewards = []
    with torch.no_grad():
        for i in range(0, len(texts), batch_size):
            input_ids, mask = pad(texts[i:i + batch_size], model.config.pad_token_id, model.device)
            rewards += model(input_ids=input_ids, attention_mask=mask).logits[:, 0].tolist()
    gate()


def run_plain_generation(folder, data, batch_size, max_new_tokens, gate):
    """Responses to every row's prompt, in batches cut from the file as it stands."""
    import torch
    import transformers
    model, tokenizer = load(transformers.AutoModelForCausalLM, folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)
    prompts = [row[0] for row in map(json.loads, open(data))]
    for i in range(0, len(prompts), batch_size):
        gate()
        input_ids, mask = pad(prompts[i:i + batch_size], tokenizer.pad_token_id, model.device, left=True)
        output = model.generate(input_ids, attention_mask=mask, do_sample=True, temperature=0.7, top_p=0.8, top_k=0,
                                max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id)
        tokenizer.batch_decode(output[:, input_ids.shape[1]:], skip_special_tokens=True)
    gate()


def load(auto_class, folder):
    """The folder's model as our stages load it: fp32 (bf16 where a GPU only runs it), SDPA, no dropout."""
    import torch
    import transformers
    config = transformers.AutoConfig.from_pretrained(folder)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    if "SequenceClassification" in auto_class.__name__:
        config.num_labels = 1
    return auto_class.from_pretrained(folder, config=config, dtype=torch.float32, attn_implementation="sdpa").to(
        "cuda" if torch.cuda.is_available() else "cpu")


def pad(texts, pad_token_id, device, left=False):
    """Token id lists -> input_ids and attention mask, (B, T)."""
    import torch
    width = max(map(len, texts))
    fill = lambda ids, value: [value] * (width - len(ids)) + ids if left else ids + [value] * (width - len(ids))
    return (torch.tensor([fill(ids, pad_token_id) for ids in texts], device=device),
            torch.tensor([fill([1] * len(ids), 0) for ids in texts], device=device))


def stop_before_forward(model, gate):
    """The model, warmed up, with the gate before each of its forward passes."""
    import torch
    with torch.no_grad():
        model.base_model(input_ids=torch.ones(8, 256, dtype=torch.long, device=model.device), use_cache=False)
    model.base_model.register_forward_pre_hook(lambda *_: gate())
    return model


# ---- the parent -----------------------------------------------------------------------------------------------------


def alternate(sides, home, steps=None, profile=False, reference_matmul=None):
    """Lets the sides {name: (function, args)} take steps in turn: `steps` each after one of warm-up, or all they have.

    Returns {name: {"seconds": [...], "memory": GiB, "flops": of a step, "matmul": FLOPs/s beside each step}}.
    """
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for name, (run, *args) in sides.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(run, args, theirs, f"{home}/{name}.log"), daemon=True))
        processes[-1].start()
        theirs.close()  # so that a worker that ends is seen here

    def take(name, command=None):
        try:
            if command:
                pipes[name].send(command)
            return pipes[name].recv()
        except (EOFError, ConnectionError):
            sys.exit(f"error: the worker `{name}` ended; see {home}/{name}.log")

    results = {name: {"seconds": [], "matmul": []} for name in sides}
    for name in sides:
        take(name)  # loading, the reference and, where there are optimizer steps, the first
    alive = list(sides)
    for step in itertools.count() if steps is None else range(steps + 1):
        for name in list(alive):
            report = take(name, "go")
            if report is None:  # the loop has come to its end
                alive.remove(name)
            elif step or steps is None:
                results[name]["seconds"].append(report["seconds"])
                results[name]["memory"] = report["memory"]
                if reference_matmul:
                    results[name]["matmul"].append(reference_matmul())
        if not alive:
            break
    for name in alive:
        results[name]["flops"] = take(name, "flops")["watch"]
    for name in alive[:1] if profile else []:
        print(f"\n{name}, one step:\n{take(name, 'profile')['watch']}\n", file=sys.stderr)
    for name in alive:
        pipes[name].send("stop")
    for process in processes:
        process.join()
    return results


def matmul_speed(tokens, hidden, intermediate, device):
    """FLOPs a second of a product of (tokens, hidden) and (hidden, intermediate), in the dtype that training has there."""
    import torch
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = torch.randn(tokens, hidden, device=device, dtype=dtype), torch.randn(hidden, intermediate, device=device, dtype=dtype)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / 4)
    return 2 * tokens * hidden * intermediate / statistics.median(seconds)


def row(what, ours, theirs, result, batch_size, time_goal=None, memory_goal=None):
    """A line of the table."""
    a, b = result[ours], result[theirs]
    if "flops" in a:
        ratio = statistics.median(x / y for x, y in zip(a["seconds"], b["seconds"]))
        seconds = [statistics.median(side["seconds"]) for side in (a, b)]
        flops = f"{a['flops'] / b['flops']:.2f} ({a['flops'] / 1e12:.3g} / {b['flops'] / 1e12:.3g} T)"
        mfu = "/".join(f"{statistics.median(side['flops'] / s / m for s, m in zip(side['seconds'], side['matmul'])):.2f}"
                       for side in (a, b)) if a["matmul"] else ""
        speed = f"{batch_size / seconds[0]:.2f}"
    else:  # all batches of both
        seconds = [sum(side["seconds"]) for side in (a, b)]
        ratio, flops, mfu, speed = seconds[0] / seconds[1], "", "", f"{batch_size / seconds[0]:.2f}"
    met = lambda value, goal: f"{goal:.2f} {'met' if value <= goal else 'NOT met'}" if goal else ""
    memory = a["memory"] / b["memory"]
    print(f"| {what} | {theirs} | **{ratio:.2f}** ({seconds[0]:.2f} / {seconds[1]:.2f} s) | {met(ratio, time_goal)} | {flops} | "
          f"**{memory:.2f}** ({a['memory']:.2f} / {b['memory']:.2f} GiB) | {met(memory, memory_goal)} | {speed} | {mfu} |", flush=True)


def make_pairs(tokenizer, shapes, seed):
    """Preference rows of random words whose prompt, chosen and rejected have these numbers of tokens, all included."""
    import align
    rng = random.Random(seed)
    ids = range(len(tokenizer))
    words = (tokenizer.decode([i]).strip() for i in rng.sample(ids, min(len(ids), 4000)))
    one = lambda text: len(tokenizer(text, add_special_tokens=False).input_ids) == 1
    words = sorted({word for word in words if word.isalpha() and one(word) and one(" " + word)})
    extra = len(align.encode_prompt(tokenizer, words[0])) - 1  # BOS, or the chat template
    text = lambda n: " ".join(rng.choices(words, k=max(1, n)))
    return [{"prompt": text(p - extra), "chosen": " " + text(c - 1), "rejected": " " + text(r - 1)} for p, c, r in shapes]


def natural_shapes(number, seed):
    rng = random.Random(seed)
    def draw(mean, std):
        variance = math.log(1 + (std / mean) ** 2)
        return min(700, max(3, round(rng.lognormvariate(math.log(mean) - variance / 2, variance ** 0.5))))
    return [[draw(*moments) for moments in NATURAL] for _ in range(number)]


def write_data(folder, tokenizer, rows, batch_size, steps):
    """Writes <folder>/pairs.jsonl, the Oracle rewards, and ids.jsonl, the pairs' token ids in the order our loops take them."""
    import numpy as np
    import torch
    import align
    os.makedirs(folder, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    Path(f"{folder}/pairs.jsonl").write_text("".join(lines))
    pairs = [(align.encode_prompt(tokenizer, row["prompt"]), align.encode_response(tokenizer, row["chosen"]),
              align.encode_response(tokenizer, row["rejected"])) for row in rows]
    order = range(len(pairs))
    if batch_size:
        lengths = np.array([sum(map(len, pair)) for pair in pairs])
        order = np.concatenate(list(itertools.islice(align.batches(lengths, batch_size, 0), steps)))
    Path(f"{folder}/ids.jsonl").write_text("".join(json.dumps(pairs[i]) + "\n" for i in order))
    sha256 = align.hashlib.sha256(Path(f"{folder}/pairs.jsonl").read_bytes()).hexdigest()
    rewards = {name: torch.randn(3, len(rows)) for name in ("chosen", "rejected")}
    torch.save({**rewards, "oracles": ["a", "b", "c"], "data_sha256": sha256}, f"{folder}/rewards.pt")
    return pairs


def make_small_model(folder):
    """A random Llama of 16M parameters with the laboratory's tokenizer, for a run on any machine."""
    import torch
    import transformers
    import toy
    torch.manual_seed(0)
    tokenizer = toy.make_tokenizer()
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=16384, hidden_size=320, intermediate_size=864, num_hidden_layers=8, num_attention_heads=5,
        max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main():
    formatters = argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", formatters, {}))
    modes = ["align", "losses", "oracle", "sft", "scoring", "generation"]
    parser.add_argument("--modes", nargs="+", default=modes, choices=modes, help="what to compare")
    parser.add_argument("--shapes", nargs="+", default=[*GOALS], choices=[*GOALS], help="prompt:response lengths (align, oracle)")
    parser.add_argument("--model", help="a model folder (default: a small random Llama)")
    parser.add_argument("--data", help="preference JSONL for natural lengths (default: lognormal lengths, random words)")
    parser.add_argument("--batch_size", type=int, default=4, help="pairs a step, in one micro-batch")
    parser.add_argument("--steps", type=int, default=5, help="measured steps a side")
    parser.add_argument("--rows", type=int, default=48, help="pairs to score, and prompts to answer")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="of a generated response")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="OpenMP threads of a worker")
    parser.add_argument("--deepspeed_config", default="ds_config.json", help="ours")
    parser.add_argument("--out", default="out/bench", help="folder for data, models and the workers' logs")
    parser.add_argument("--profile", action="store_true", help="print a torch.profiler table of one of our steps")
    args = parser.parse_args()
    home = os.path.abspath(args.out)
    os.makedirs(home, exist_ok=True)
    # an idle worker must not spin in OpenMP's barrier
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false",
                   "HF_HUB_OFFLINE": "1"}
    import torch
    import transformers
    import align
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = os.path.abspath(args.model or f"{home}/model")
    if not args.model:
        make_small_model(model)
    tokenizer, config = align.load_tokenizer(model), transformers.AutoConfig.from_pretrained(model)
    total, batch = args.steps + 4, args.batch_size  # start-up, warm-up, FLOPs, profile

    def data(shape, number, batch_size):
        """The folder with `number` pairs of that shape."""
        if shape != "natural":
            rows = make_pairs(tokenizer, [(RATIOS[shape][0],) + 2 * RATIOS[shape][1:]] * number, shape)
        elif args.data:
            rows = [row for row in align.read_jsonl(args.data, "prompt", "chosen", "rejected")]
            rows = random.Random(0).sample(rows, number)
        else:
            rows = make_pairs(tokenizer, natural_shapes(number, 0), 0)
        folder = f"{home}/{shape.replace(':', '_')}_{number}"
        pairs = write_data(folder, tokenizer, rows, batch_size, number // batch_size if batch_size else 0)
        if shape != "natural":
            assert all([len(ids) for ids in pair] == [RATIOS[shape][0]] + 2 * [RATIOS[shape][1]] for pair in pairs)
        mean = [sum(len(pair[i]) for pair in pairs) / len(pairs) for i in range(3)]
        print(f"<!-- {shape}: {number} pairs, prompt {mean[0]:.0f}, chosen {mean[1]:.0f}, rejected {mean[2]:.0f} tokens on average -->")
        return folder

    def ours(stage, folder, *flags):
        return (run_ours, stage, ["--model", model, "--data", f"{folder}/pairs.jsonl", "--eval_data", "", "--out", f"{folder}/{stage}",
                "--batch_size", batch, "--micro_batch_size", batch, "--max_steps", total, "--learning_rate", 1e-6,
                "--warmup_steps", 0, "--save_steps", 0, "--deepspeed_config", args.deepspeed_config, *flags])

    def theirs(kind, folder, **options):
        return run_trl, kind, model, f"{folder}/ids.jsonl", batch, total, options

    def run(sides, shape=None):
        speed = None
        if shape in RATIOS:
            tokens = batch * (RATIOS[shape][0] + 2 * RATIOS[shape][1])
            speed = lambda: matmul_speed(tokens, config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size), device)
        return alternate(sides, home, args.steps, args.profile, speed)

    print(f"\n{os.path.basename(model)}, {device}, {'bf16' if device == 'cuda' else 'fp32'}, {args.threads} threads, "
          f"{batch} pairs a step, {args.steps} steps a side\n")
    print("| ours | theirs | time (ours / theirs) | goal | FLOPs | peak memory | goal | rows/s | MFU |\n|" + "---|" * 9)
    start = time.time()
    if "align" in args.modes:
        for shape in args.shapes:
            folder = data(shape, total * batch, batch)
            result = run({"ours": ours("align", folder, "--loss", "dpo"),
                          "DPOTrainer, cached": theirs("dpo", folder, precompute_ref_log_probs=True),
                          "DPOTrainer, in the loop": theirs("dpo", folder)}, shape)
            for other in list(result)[1:]:
                row(f"align.py, dpo, {shape}", "ours", other, result, batch, *GOALS[shape])
    if "losses" in args.modes:
        folder = data("3:1", total * batch, batch)
        flags = ["--oracle_rewards", f"{folder}/rewards.pt", "--out"]
        result = run({"drdo": ours("align", folder, "--loss", "drdo", *flags, f"{folder}/drdo"),
                      "our dpo": ours("align", folder, "--loss", "dpo"),
                      "edpo": ours("align", folder, "--loss", "edpo", *flags, f"{folder}/edpo"),
                      "DPOTrainer, cached": theirs("dpo", folder, precompute_ref_log_probs=True)}, "3:1")
        for loss in ("drdo", "edpo"):
            row(f"align.py, {loss}, 3:1", loss, "our dpo", result, batch, 1.03)
            row(f"align.py, {loss}, 3:1", loss, "DPOTrainer, cached", result, batch, *GOALS["3:1"])
    if "oracle" in args.modes:
        for shape in args.shapes:
            folder = data(shape, total * batch, batch)
            result = run({"ours": ours("oracle", folder, "--alpha", 0), "RewardTrainer": theirs("reward", folder)}, shape)
            row(f"oracle.py, alpha 0, {shape}", "ours", "RewardTrainer", result, batch, *GOALS[shape])
    if "sft" in args.modes:
        folder = data("natural", total * batch, batch)
        result = run({"ours": ours("sft", folder), "SFTTrainer": theirs("sft", folder)})
        row("sft.py, natural", "ours", "SFTTrainer", result, batch)
    folder = data("natural", args.rows, None)
    if "scoring" in args.modes:
        scorer = load(transformers.AutoModelForSequenceClassification, model)
        scorer.config.pad_token_id = tokenizer.pad_token_id
        scorer.save_pretrained(f"{home}/scorer")
        tokenizer.save_pretrained(f"{home}/scorer")
        result = alternate({"ours": (run_ours, "precompute_rewards", ["--oracle", f"{home}/scorer", "--data", f"{folder}/pairs.jsonl",
                                     "--out", f"{folder}/scored.pt", "--micro_batch_size", 8]),
                            "batches in file order": (run_plain_scoring, f"{home}/scorer", f"{folder}/ids.jsonl", 8)}, home)
        row("precompute_rewards.py, natural", "ours", "batches in file order", result, args.rows, 0.6)
    if "generation" in args.modes:
        result = alternate({"ours": (run_ours, "generate", ["--model", model, "--prompts", f"{folder}/pairs.jsonl", "--temperature", 0.7,
                                     "--out", f"{folder}/generations.jsonl", "--micro_batch_size", 8,
                                     "--max_new_tokens", args.max_new_tokens]),
                            "batches in file order": (run_plain_generation, model, f"{folder}/ids.jsonl", 8, args.max_new_tokens)}, home)
        row("generate.py, natural", "ours", "batches in file order", result, args.rows, 0.6)
    print(f"\n{(time.time() - start) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
