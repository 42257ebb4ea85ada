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
length and shared out among the processes. Neither their number nor the batch size changes a reward beyond
float rounding.
"""
import argparse
import hashlib
import json
import logging
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
import transformers
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

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
    flag("--max_length", type=int, default=1024, help="a row with more tokens of prompt + response gets NaN")
    flag("--micro_batch_size", type=int, default=32, help="responses a forward pass, on one process")
    flag("--dtype", choices=["auto", "bf16", "fp32"], default="fp32",
         help="auto: bf16 where the hardware has it. It blurs a pair's reward difference, so distil fp32")
    flag("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    args = parser.parse_args()
    check_flags(args, "")
    if os.path.isdir(args.out):
        fail(f"--out {args.out} is a folder; name a file in it")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    return args


def main():
    args = parse_args()
    device, rank, _ = init_process(args)
    first = next(read_jsonl(args.data, "prompt"))
    keys = ["response"] if "response" in first and "chosen" not in first else ["chosen", "rejected"]
    if args.relabel and keys == ["response"]:
        fail(f"--relabel: {args.data} holds no pairs; give rows with chosen and rejected, in any order")

    # ---- score the texts by one Oracle after the other
    rewards = {}  # {column: K of (N,)}
    for folder in args.oracle:
        tokenizer, model = load_oracle(folder, device, args.dtype)
        texts, columns = read_texts(args.data, keys, tokenizer)
        max_length = min(args.max_length, getattr(model.config, "max_position_embeddings", args.max_length))
        fits = [i for i, ids in enumerate(texts) if len(ids) <= max_length]
        if not fits:
            fail(f"{args.data}: no row fits in --max_length {max_length}, or the model's positions; raise it")
        scores = torch.full((len(texts) + 1,), math.nan)  # the last is the reward of no text, number -1
        scores[fits] = score(model, [texts[i] for i in fits], args.micro_batch_size, folder)
        if scores[fits].isnan().any():
            fail(f"--oracle {folder}: its rewards are NaN; train it again with a lower --learning_rate")
        for key, numbers in columns.items():
            rewards.setdefault(key, []).append(scores[numbers])
        del model
    rewards = {key: torch.stack(columns) for key, columns in rewards.items()}  # (K, N)

    # ---- save and report
    if rank == 0:
        if args.relabel:
            relabel(args.data, rewards, args.relabel)
        extra = {"oracles": args.oracle, "data_sha256": sha256(args.relabel or args.data)}
        with reading(f"--out {args.out}.partial", "make room and run again"):
            torch.save(rewards | extra, args.out + ".partial")
        os.replace(args.out + ".partial", args.out)
        scored = torch.stack([rewards[key] for key in keys]).isfinite().all(0).all(0)  # (N,)
        print(f"{args.out}: rewards of {len(scored)} rows by {len(args.oracle)} oracles; NaN for "
              f"{int((~scored).sum())} rows over --max_length {args.max_length}, or the model's positions")
        for k, folder in enumerate(args.oracle):
            figures = [f"mean {key} reward {column[k].nanmean():.3f}" for key, column in rewards.items()]
            if keys[0] == "chosen":
                margins = (rewards["chosen"] - rewards["rejected"])[k, scored]
                figures = [f"chosen above rejected in {(margins > 0).float().mean():.3f} of pairs",
                           f"margin {margins.mean():.3f} (std {margins.std():.3f})"]
            print(f"  {folder}: {', '.join(figures)}")
    dist.destroy_process_group()


def load_oracle(folder, device, dtype):
    """The folder's tokenizer and reward model, in "bf16" or "fp32": a decoder with a linear head `score`."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    with reading(f"--oracle {folder}", "give a reward model with one label; oracle.py trains one"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.eos_token_id is not None, "its tokenizer has no EOS token"
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=dtype, attn_implementation="sdpa", output_loading_info=True)
        missing = [*info["missing_keys"], *["score.weight"] * (not hasattr(model, "score"))]
        assert not missing, f"its weights lack {' '.join(missing)}"
        assert len(tokenizer) <= model.get_input_embeddings().num_embeddings, "its tokenizer has more tokens"
    return tokenizer, model.to(device).eval()


def read_texts(path, keys, tokenizer):
    """(texts, columns): token ids of prompt + response, a text once, in a temporary file, so that memory does
    not grow with them; and {key: the number of each row's text, or -1}, `reference` too for generations."""
    texts, ends, columns = {}, [], {key: [] for key in (*keys, "reference")}
    ids = tempfile.TemporaryFile()
    for line, row in enumerate(tqdm(read_jsonl(path, "prompt", *keys), "tokenising",
                                    disable=dist.get_rank() > 0), 1):
        prompt = None
        for key, numbers in columns.items():
            if not isinstance(row.get(key), str) or key == "reference" and keys != ["response"]:
                numbers.append(-1)
                continue
            digest = hashlib.sha256(json.dumps([row["prompt"], row[key]]).encode()).digest()
            numbers.append(texts.setdefault(digest, len(texts)))
            if len(texts) > len(ends):
                with reading(f"{path}, line {line}", "mend or drop that row"):
                    prompt = prompt or encode_prompt(tokenizer, row["prompt"])
                    text = np.array(prompt + encode_response(tokenizer, row[key]), np.int32)
                ids.write(text)
                ends.append(len(text) + (ends[-1] if ends else 0))
    ids.flush()
    return (np.split(np.asarray(np.memmap(ids, np.int32, "r")), ends[:-1]),
            {key: numbers for key, numbers in columns.items() if max(numbers) >= 0})


@torch.no_grad()
def score(model, texts, micro_batch_size, description):
    """Rewards of texts, arrays of token ids, (len(texts),) on the CPU: sorted by length, shared out among
    processes."""
    rank, world_size, device = dist.get_rank(), dist.get_world_size(), model.device
    rewards = torch.zeros(len(texts), device=device)
    order = np.argsort([-len(ids) for ids in texts], kind="stable")
    micro_batches = [order[i:i + micro_batch_size] for i in range(0, len(order), micro_batch_size)]
    for micro in tqdm(micro_batches[rank::world_size], description, disable=rank > 0):
        input_ids = np.zeros((len(micro), len(texts[micro[0]])), int)  # (B, T), padded right by zeros
        for row, i in enumerate(micro):
            input_ids[row, :len(texts[i])] = texts[i]
        last = torch.tensor([[len(texts[i]) - 1] for i in micro], device=device)  # (B, 1)
        input_ids = torch.as_tensor(input_ids, device=device)
        hidden = model.base_model(input_ids, use_cache=False).last_hidden_state  # causal: needs no mask
        rewards[micro] = last_token_rewards(hidden, model.score.weight, last)[:, 0].float()
    dist.all_reduce(rewards)
    return rewards.cpu()


def relabel(data, rewards, path):
    """Writes the pairs to `path`, the response with the higher mean reward as `chosen`. Swaps rewards too."""
    chosen, rejected = rewards["chosen"], rewards["rejected"]
    swapped = rejected.mean(0) > chosen.mean(0)  # (N,); NaN: not swapped
    with open(path + ".partial", "w", encoding="utf-8") as file:
        for row, swap in zip(read_jsonl(data), swapped.tolist()):
            if swap:
                row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(path + ".partial", path)
    rewards["chosen"], rewards["rejected"] = (torch.where(swapped, a, b) for a, b in (
        (rejected, chosen), (chosen, rejected)))
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
def reading(what, mend):
    """Turns any error inside into one line for the user: libraries raise anything where a file is damaged."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
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
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        device, cpu = torch.device("cpu"), torch.cpu.get_capabilities()
        has_bf16 = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
        # DeepSpeed would compile a C++ all-reduce for CPUs, and crash without a compiler; gloo does it too
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:  # processes share the cores: none may take all of them
            here = int(os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"]))
            torch.set_num_threads(max(1, torch.get_num_threads() // here))
    deepspeed.init_distributed(verbose=False)
    if args.dtype == "auto":
        args.dtype = "bf16" if has_bf16 else "fp32"
    if dist.get_rank() == 0:
        print(f"{device.type}, {args.dtype}, {dist.get_world_size()} processes")
    return device, dist.get_rank(), dist.get_world_size()


def sha256(path):
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_jsonl(path, *keys):
    """Yields a JSONL file's rows (dicts). Each must hold text under `keys`; `prompt` may be chat messages."""
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                for key in keys:
                    texts = [row[key]]
                    if key == "prompt" and isinstance(row[key], list):
                        texts = [turn[name] for turn in row[key] for name in ("role", "content")]
                    if not all(isinstance(text, str) for text in texts) or key == "prompt" and not row[key]:
                        raise TypeError(f"`{key}` holds no text")
                    "".join(texts).encode()  # a lone surrogate is no text
                yield row
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path}: cannot read it ({error}); name a UTF-8 JSONL file")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        fail(f"{path}, line {number}: {error!r:.100}; write an object with {', '.join(keys) or 'its keys'}")
    if not number:
        fail(f"{path}: it holds no rows")


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt, text or messages: by the chat template, or without one its text after a BOS."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not "".join(message["content"] for message in messages):
        raise ValueError("the prompt is empty")
    if tokenizer.chat_template:  # code that came with a model: an endless loop ends after 30 seconds
        signal.signal(signal.SIGALRM, lambda *_: fail("the chat template takes over 30 s; mend it"))
        signal.alarm(30)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        signal.alarm(0)
        return ids
    if not isinstance(prompt, str):
        names = {"user": "Human", "assistant": "Assistant"}
        turns = [f"{names.get(turn['role'], turn['role'].title())}: {turn['content']}" for turn in prompt]
        prompt = "\n\n".join(turns + ["Assistant:\n"])
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + tokenizer(prompt, add_special_tokens=False).input_ids


def encode_response(tokenizer, response):
    """Token ids of a response and its EOS. Prompt and response are tokenised apart: no token spans both. With
    a chat template a response loses its leading space, which parts it from a plain-text prompt."""
    if not isinstance(response, str):
        raise TypeError("a response is no text")
    response = response.removeprefix(" ") if tokenizer.chat_template else response
    return tokenizer(response, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a full disk, no permission, a folder that has vanished
        fail(f"{error}; mend that and run again")
    except Exception:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            time.sleep(10)  # if another process has failed, the launcher ends this one before it complains
        raise
