"""Scores responses with one Oracle or K of them, once: the only program that scores anything.

In:   reward models (out/oracle), and a JSONL: prompt, chosen, rejected; or prompt, response (generations)
Out:  rewards.pt: a dict that torch.load(weights_only=True) reads. Tensors, float32, (K, N), K Oracles by N
      rows in file order, NaN where a row has over --max_length tokens: `chosen` and `rejected`; or
      `response`, and `reference` if rows carry one. `oracles`: the K folders. `data_sha256`: the file's.

    deepspeed precompute_rewards.py                                                 # for align.py --loss drdo
    deepspeed precompute_rewards.py --oracle out/reward_model_{1,2,3} --out ensemble.pt      # for --loss edpo
    deepspeed precompute_rewards.py --data out/drdo/generations.jsonl --out out/drdo/rewards.pt   # evaluate
    deepspeed precompute_rewards.py --data pairs.jsonl --relabel labelled.jsonl         # pairs without labels
    deepspeed --num_gpus 2 precompute_rewards.py --oracle Skywork/Skywork-Reward-V2-Llama-3.2-1B

Any AutoModelForSequenceClassification with one label and a linear head `score` serves as an Oracle. Its
reward is read at the response's EOS. A text that stands in several rows is scored once. Texts are sorted by
length and shared out among the processes. Their number and the batch size change a reward by rounding alone.
"""
import argparse
import hashlib
import json
import math
import os
import signal
import sys
import tempfile
import time
from contextlib import contextmanager

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

from losses import last_token_rewards


def parse_args():
    formatters = argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", formatters, {}))
    flag = parser.add_argument
    flag("--oracle", nargs="+", default=["out/oracle"], help="reward models: folders or hub names")
    flag("--data", default="data/all/train.jsonl", help="JSONL to score")
    flag("--out", default="rewards.pt", help="file to write")
    flag("--relabel", metavar="FILE", help="write the pairs here again, the response with the higher mean "
         "reward as `chosen`; --out then belongs to this file, and align.py takes both")
    flag("--max_length", type=int, default=1024, help="a prompt + response with more tokens gets NaN")
    flag("--micro_batch_size", type=int, default=32, help="responses a forward pass, on one process")
    flag("--dtype", choices=["auto", "bf16", "fp32"], default="fp32",
         help="auto: bf16 where the hardware has it. It blurs a pair's reward difference, so distil fp32")
    flag("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    args = parser.parse_args()
    check_flags(args, "")
    files = [path for path in (args.data, args.out, args.relabel) if path]
    if len({*map(os.path.realpath, files)}) < len(files):
        fail("--data, --out and --relabel: one would overwrite another; name different files")
    for name, path in ("out", args.out), ("relabel", args.relabel or ""):
        if os.path.isdir(path):
            fail(f"--{name} {path} is a folder; name a file in it")
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    return args


def main():
    args = parse_args()
    device, rank, _ = init_process(args)

    # ---- score the texts by one Oracle after the other
    scores = []  # of each Oracle, (texts + 1,); the last, number -1, is NaN: rows without this text
    for folder in args.oracle:
        tokenizer, model = load_oracle(folder, device, args.dtype)
        texts, columns = read_texts(args.data, tokenizer)
        sha256 = hashlib.file_digest(open(args.data, "rb"), "sha256").hexdigest()  # of what was read
        if args.relabel and "chosen" not in columns:
            fail(f"--relabel: {args.data} holds no pairs; give rows with chosen and rejected, in any order")
        max_length = min(args.max_length, getattr(model.config, "max_position_embeddings", None) or math.inf)
        fits = [i for i, ids in enumerate(texts) if len(ids) <= max_length]
        if not fits:
            fail(f"{args.data}: no row fits in --max_length {max_length}, or the model's positions; raise it")
        scores.append(torch.full((len(texts) + 1,), math.nan))
        scores[-1][fits] = score(model, [texts[i] for i in fits], args.micro_batch_size, folder)
        if not scores[-1][fits].isfinite().all():
            fail(f"--oracle {folder}: its rewards are not finite; train it with a lower --learning_rate")
        del model
    rewards = {key: torch.stack(scores)[:, numbers] for key, numbers in columns.items()}  # (K, N)

    # ---- save and report
    if rank == 0:
        if args.relabel:
            relabel(args.data, rewards, args.relabel)
            sha256 = hashlib.file_digest(open(args.relabel, "rb"), "sha256").hexdigest()
        with or_fail(f"--out {args.out}.partial", "make room and run again"):
            oracles = [folder.rstrip("/") for folder in args.oracle]
            torch.save(rewards | {"oracles": oracles, "data_sha256": sha256}, args.out + ".partial")
        os.replace(args.out + ".partial", args.out)
        pairs = "chosen" in rewards
        margins = rewards["chosen"] - rewards["rejected"] if pairs else rewards["response"]  # (K, N)
        scored = margins.isfinite().all(0)  # (N,)
        print(f"{args.out}: rewards of {len(scored)} rows by {len(args.oracle)} oracles; NaN for "
              f"{int((~scored).sum())} rows over --max_length {args.max_length}, or the model's positions")
        for k, folder in enumerate(args.oracle):
            figures = [f"mean {key} reward {column[k].nanmean():.3f}" for key, column in rewards.items()]
            if pairs:
                margin = margins[k, scored]
                figures = [f"chosen above rejected in {(margin > 0).float().mean():.3f} of pairs",
                           f"margin {margin.mean():.3f} (std {margin.std():.3f})"]
            print(f"  {folder}: {', '.join(figures)}")
    dist.destroy_process_group()


def load_oracle(folder, device, dtype):
    """The folder's tokenizer and reward model, in "bf16" or "fp32": a decoder with a linear head `score`."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    with or_fail(f"--oracle {folder}", "give a reward model with one label; oracle.py trains one"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.eos_token_id is not None, "its tokenizer has no EOS token"
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=dtype, attn_implementation="sdpa", output_loading_info=True)
        missing = [*info["missing_keys"], *["score.weight"] * (not hasattr(model, "score"))]
        assert not missing, f"its weights lack {' '.join(missing)}"
        assert len(tokenizer) <= model.get_input_embeddings().num_embeddings, "its tokenizer has more tokens"
    return tokenizer, model.to(device).eval()


def read_texts(path, tokenizer):
    """(texts, columns): token ids of prompt + response, a text once, in a temporary file, so that memory does
    not grow with them; and {key: the number of each row's text, or -1}, `reference` too for generations."""
    texts, ends, ids = {}, [0], tempfile.TemporaryFile()
    with or_fail(path, "name a UTF-8 JSONL file"), open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(tqdm(file, "tokenising", unit=" rows", disable=dist.get_rank() > 0), 1):
            with or_fail(f"{path}, line {number}", "write an object with prompt, chosen, rejected"):
                row = json.loads(line)
                if number == 1:
                    generations = "response" in row and "chosen" not in row
                    keys = ("response", "reference") if generations else ("chosen", "rejected")
                    columns = {key: [] for key in keys}
                prompt = encode_prompt(tokenizer, row["prompt"])
                for key, numbers in columns.items():
                    if key == "reference" and not isinstance(row.get(key), str):
                        numbers.append(-1)
                        continue
                    digest = hashlib.sha256(json.dumps([row["prompt"], row[key]]).encode()).digest()
                    numbers.append(texts.setdefault(digest, len(texts)))
                    if len(texts) == len(ends):  # it is new
                        text = prompt + encode_response(tokenizer, row[key])
                        ids.write(np.array(text, np.int32))
                        ends.append(ends[-1] + len(text))
        ids.flush()
        texts = np.split(np.asarray(np.memmap(ids, np.int32, "r")), ends[1:-1])
    return texts, {key: numbers for key, numbers in columns.items() if max(numbers) >= 0}


@torch.no_grad()
def score(model, texts, micro_batch_size, description):
    """Rewards of texts, arrays of token ids, (len(texts),) on the CPU; sorted by length and shared out."""
    rank, world_size, device = dist.get_rank(), dist.get_world_size(), model.device
    rewards = torch.zeros(len(texts), device=device)
    order = np.argsort([-len(ids) for ids in texts], kind="stable")
    micro_batches = [order[i:i + micro_batch_size] for i in range(0, len(order), micro_batch_size)]
    for micro in tqdm(micro_batches[rank::world_size], description, disable=rank > 0):
        ids = [torch.tensor(texts[i], dtype=torch.long) for i in micro]
        input_ids = pad_sequence(ids, batch_first=True).to(device)  # (B, T), padded right by zeros
        last = torch.tensor([[len(text) - 1] for text in ids], device=device)  # (B, 1)
        hidden = model.base_model(input_ids, use_cache=False).last_hidden_state  # causal: needs no mask
        rewards[micro] = last_token_rewards(hidden, model.score.weight, last)[:, 0].float()
    dist.all_reduce(rewards)
    return rewards.cpu()


def relabel(data, rewards, path):
    """Writes the pairs to `path`, the response with the higher mean reward as `chosen`. Swaps rewards too."""
    chosen, rejected = rewards["chosen"], rewards["rejected"]
    swapped = rejected.mean(0) > chosen.mean(0)  # (N,); NaN: not swapped
    lines = open(data, encoding="utf-8-sig")
    with open(path + ".partial", "w", encoding="utf-8", errors="replace") as file:
        for line, swap in zip(lines, swapped.tolist()):
            row = json.loads(line)
            if swap:
                row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(path + ".partial", path)
    rewards["chosen"] = torch.where(swapped, rejected, chosen)
    rewards["rejected"] = torch.where(swapped, chosen, rejected)
    print(f"{path}: {len(swapped)} pairs, the two responses of {int(swapped.sum())} swapped")


# ---- copies: the stages share what follows to the letter (tests/test_copies.py) ----------------------------

def fail(message):
    """Ends the program on bad input: one line on stderr, exit status 2. Process 0 prints at once. The others
    wait: if process 0 has the same error, the launcher ends them first, and the line appears once."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(10)
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, whatever bar is there
    sys.exit(2)


@contextmanager
def or_fail(what, mend, errors=Exception):
    """Turns an error inside into one line for the user: libraries raise anything where a file is damaged."""
    try:
        yield
    except errors as error:
        fail(f"{what}: cannot use it ({' '.join(f'{type(error).__name__}: {error}'.split()):.300}); {mend}")


def check_flags(args, may_be_zero):
    """Fails where a number is not above 0 and finite. Flags named in `may_be_zero`, and a seed, may be 0."""
    for name, values in vars(args).items():
        zero_too = name in [*may_be_zero.split(), "seed", "local_rank"]
        for value in values if isinstance(values, list) else [values]:
            if type(value) in (int, float) and not (0 < value < math.inf or value == 0 and zero_too):
                fail(f"--{name} {value}: give a finite number {'of 0 or more' if zero_too else 'above 0'}")


def init_process(args):
    """Joins the processes that `deepspeed` started; under `python` it is alone. (device, rank, world size)
    Sets --dtype auto to bf16 where the hardware has it; other processors emulate it, many times slower."""
    if "RANK" not in os.environ:
        os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    deepspeed.utils.logger.setLevel("WARNING")
    logging.set_verbosity_error()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        device, cpu = torch.device("cpu"), torch.cpu.get_capabilities()
        has_bf16 = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
        # DeepSpeed would compile a C++ all-reduce for CPUs, and crash without a compiler; gloo does it too
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:  # the launcher's processes share the cores
            torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_SIZE", 1))))
    deepspeed.init_distributed(verbose=False)
    if dist.get_world_size() > 1:  # if another process has failed, the launcher ends this one meanwhile
        sys.excepthook = lambda *error: (time.sleep(10), sys.__excepthook__(*error))
    if args.dtype == "auto":
        args.dtype = "bf16" if has_bf16 else "fp32"
    if dist.get_rank() == 0:
        print(f"{device.type}, {args.dtype}, {dist.get_world_size()} processes")
    return device, dist.get_rank(), dist.get_world_size()


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt, text or messages: by the chat template, or without one its text after a BOS."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    assert "".join(message["content"] for message in messages), "the prompt is empty"
    if tokenizer.chat_template:  # code that came with a model: an endless loop ends after 30 seconds
        signal.signal(signal.SIGALRM, lambda *_: fail("the chat template takes over 30 s; mend it"))
        signal.alarm(30)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        signal.alarm(0)
        return ids
    if not isinstance(prompt, str):
        turns = [f"{turn['role'].title().replace('User', 'Human')}: {turn['content']}" for turn in prompt]
        prompt = "\n\n".join(turns + ["Assistant:\n"])
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + tokenizer(prompt, add_special_tokens=False).input_ids


def encode_response(tokenizer, response):
    """Token ids of a response and its EOS. Prompt and response are tokenised apart: no token spans both. With
    a chat template a response loses the leading space that separates it from a plain-text prompt."""
    assert isinstance(response, str), "a response is no text"
    response = response.removeprefix(" ") if tokenizer.chat_template else response
    return tokenizer(response, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]


if __name__ == "__main__":
    with or_fail("a file or folder", "mend that and run again", OSError):  # a full disk, no permission
        main()
