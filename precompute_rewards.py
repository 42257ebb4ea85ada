"""Scores responses with one Oracle or K of them, once: the only program that scores anything.

In:   reward models (out/oracle), and a JSONL of prompt + chosen + rejected, or of prompt + response (generations)
Out:  rewards.pt: a dict that torch.load(weights_only=True) reads, with float32 tensors of shape (K, N), K oracles by
      N rows in file order, NaN where a row is longer than --max_length: `chosen` and `rejected`, or `response` (and
      `reference`, where rows carry one); `oracles`, the K folders; `data_sha256`, the scored file's.

    deepspeed precompute_rewards.py                                                     # for align.py --loss drdo
    deepspeed precompute_rewards.py --oracle out/reward_model_{1,2,3} --out ensemble.pt   # for align.py --loss edpo
    deepspeed precompute_rewards.py --data out/drdo/generations.jsonl --out out/drdo/rewards.pt     # for evaluate.py
    deepspeed --num_gpus 2 precompute_rewards.py --oracle Skywork/Skywork-Reward-V2-Llama-3.2-1B

Any AutoModelForSequenceClassification with one label and a linear head `score` serves as an oracle. Its reward is read
at the response's EOS. A text that stands in several rows is scored once. Rows are sorted by length and shared out among
the processes; neither their number nor the batch size changes a reward beyond float rounding (bf16's, on a GPU).
"""
import argparse
import functools
import hashlib
import json
import logging
import math
import os
import sys

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
    parser.add_argument("--oracle", nargs="+", default=["out/oracle"], help="reward models: folders or hub names")
    parser.add_argument("--data", default="data/all/train.jsonl", help="JSONL to score")
    parser.add_argument("--out", default="rewards.pt", help="file to write")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens of prompt + response past which a row gets NaN")
    parser.add_argument("--micro_batch_size", type=int, default=32, help="responses a forward pass, on one process")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    args = parser.parse_args()
    if os.path.isdir(args.out):
        fail(f"--out {args.out} is a folder; name a file, such as {os.path.join(args.out, 'rewards.pt')}")
    check_flags(args, os.path.dirname(args.out), "local_rank")
    return args


# ---- scoring ----------------------------------------------------------------------------------------------------------


def load_oracle(folder, device):
    """The folder's reward model: a decoder with a linear head `score`, one label."""
    dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=dtype, attn_implementation="sdpa", output_loading_info=True)
    except Exception as error:
        fail(f"--oracle {folder}: no reward model there ({error!r:.150}); train one with oracle.py")
    if info["missing_keys"] or not hasattr(model, "score"):
        fail(f"--oracle {folder}: its weights lack {' '.join(sorted(info['missing_keys'])) or 'score.weight'}, the reward head of "
             "one label or more; train one with oracle.py")
    return model.to(device).eval()


@torch.no_grad()
def score(model, texts, pad_token_id, micro_batch_size, device, description):
    """Rewards of token id lists, (len(texts),) on the CPU: sorted by length, shared out among the processes."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rewards = torch.zeros(len(texts), device=device)
    order = np.argsort([-len(ids) for ids in texts], kind="stable")
    micro_batches = [order[i:i + micro_batch_size] for i in range(0, len(order), micro_batch_size)]
    for micro in tqdm(micro_batches[rank::world_size], description, disable=rank > 0):
        last = torch.tensor([[len(texts[i]) - 1] for i in micro], device=device)  # (B, 1)
        input_ids = np.full((len(micro), len(texts[micro[0]])), pad_token_id)  # (B, T), padded right: causal, it needs no mask
        for row, i in enumerate(micro):
            input_ids[row, :len(texts[i])] = texts[i]
        hidden = model.base_model(input_ids=torch.as_tensor(input_ids, device=device), use_cache=False).last_hidden_state
        rewards[micro] = last_token_rewards(hidden, model.score.weight, last)[:, 0].float()
    dist.all_reduce(rewards)
    return rewards.cpu()


def main():
    args = parse_args()
    device, rank, _ = init_process()
    first = read_jsonl(args.data, "prompt")[0]
    keys = ["response"] if "response" in first and "chosen" not in first else ["chosen", "rejected"]
    rows = read_jsonl(args.data, "prompt", *keys)
    if keys == ["response"] and any(isinstance(row.get("reference"), str) for row in rows):
        keys.append("reference")
    with open(args.data, "rb") as file:
        data_sha256 = hashlib.file_digest(file, "sha256").hexdigest()

    prompts = [sys.intern(json.dumps(row.pop("prompt"))) for row in rows]  # each once in memory
    unique = {}  # (prompt, response) -> its number: references, and repeated generations, are scored once
    texts = {key: [(i, unique.setdefault((prompts[i], row[key]), len(unique)))
                   for i, row in enumerate(rows) if isinstance(row.get(key), str)] for key in keys}  # (row, number)
    rewards = {key: torch.full((len(args.oracle), len(rows)), math.nan) for key in keys}
    for k, folder in enumerate(args.oracle):
        tokenizer = load_tokenizer(folder)
        model = load_oracle(folder, device)
        encode = functools.cache(lambda prompt: np.array(encode_prompt(tokenizer, json.loads(prompt)), dtype=np.int32))
        ids = [np.append(encode(prompt), np.array(encode_response(tokenizer, response), dtype=np.int32))
               for prompt, response in tqdm(unique, "tokenising", disable=rank > 0)]
        max_length = min(args.max_length, getattr(model.config, "max_position_embeddings", args.max_length))
        fits = [i for i, text in enumerate(ids) if len(text) <= max_length]
        if not fits:
            fail(f"{args.data}: every row has more than --max_length {max_length} tokens (or the model's positions); raise it")
        scores = torch.full((len(ids),), math.nan)
        scores[fits] = score(model, [ids[i] for i in fits], tokenizer.pad_token_id, args.micro_batch_size, device, folder)
        if scores[fits].isnan().any():
            fail(f"--oracle {folder}: its rewards are NaN; train it again with a lower --learning_rate")
        for key in keys:
            held, numbers = torch.tensor(texts[key]).T
            rewards[key][k, held] = scores[numbers]
        del model

    if rank == 0:
        torch.save({**rewards, "oracles": args.oracle, "data_sha256": data_sha256}, args.out + ".partial")
        os.replace(args.out + ".partial", args.out)
        scored = torch.stack([rewards[key] for key in keys if key != "reference"]).isfinite().all(0).all(0)  # (N,)
        print(f"{args.out}: rewards of {len(rows)} rows by {len(args.oracle)} oracles, {int((~scored).sum())} rows over "
              f"--max_length {args.max_length} tokens, or the model's positions (NaN)")
        for k, folder in enumerate(args.oracle):
            if keys[0] == "chosen":
                margins = (rewards["chosen"] - rewards["rejected"])[k, scored]
                print(f"  {folder}: chosen above rejected in {(margins > 0).float().mean():.3f} of pairs, margin "
                      f"{margins.mean():.3f} (std {margins.std():.3f})")
            else:
                print(f"  {folder}: mean reward " + ", ".join(f"{rewards[key][k].nanmean():.3f} ({key})" for key in keys))
    dist.destroy_process_group()


# ---- what the stages do alike, copied to the letter -------------------------------------------------------------------


def fail(message):
    """Ends the program on bad input: one line on stderr (of one process a machine), exit status 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def check_flags(args, folder, *may_be_zero):
    """Fails where a flag's number is not above 0 and finite (those named in `may_be_zero` may be 0), or where the folder that
    the run writes to cannot be made and written: before the run is paid for."""
    for name, values in vars(args).items():
        for value in values if isinstance(values, list) else [values]:
            if type(value) in (int, float) and not (0 < value < math.inf or value == 0 and name in may_be_zero):
                fail(f"--{name} {value}: give a number {'of 0 or more' if name in may_be_zero else 'above 0'}")
    try:
        os.makedirs(folder or ".", exist_ok=True)
        if not os.access(folder or ".", os.W_OK):
            raise PermissionError("it cannot be written")
    except OSError as error:
        fail(f"--out: cannot make or write the folder {folder} ({error}); name another")


def init_process():
    """Joins the processes that `deepspeed` started, or is the only one under `python`; returns (device, rank, world size)."""
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()  # it would report score.weight as unexpected; missing weights end the run below
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        # DeepSpeed would compile a C++ all-reduce for CPUs here, and crash where there is no compiler; gloo does it too
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:  # processes that share the cores must not each take all of them
            here = int(os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"]))
            torch.set_num_threads(max(1, torch.get_num_threads() // here))
    deepspeed.init_distributed(verbose=False)
    return device, dist.get_rank(), dist.get_world_size()


def read_jsonl(path, *keys):
    """The rows (dicts) of a JSONL file in file order; each must carry `keys`: text, or for `prompt` also messages."""
    def is_prompt(value):
        return bool(value) and (isinstance(value, str) or isinstance(value, list) and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in value))

    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    fail(f"{path}, line {number}: not JSON ({error}); write one JSON object a line")
                for key in keys:
                    value = row.get(key) if isinstance(row, dict) else None
                    if not (is_prompt(value) if key == "prompt" else isinstance(value, str)):
                        fail(f"{path}, line {number}: no `{key}` text; every row needs {', '.join(keys)}, and a `prompt` of "
                             "messages a `role` and a `content` in each")
                rows.append(row)
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path}: cannot read it ({error}); name an existing UTF-8 JSONL file")
    return rows or fail(f"{path}: it holds no rows")


def load_tokenizer(folder):
    """The folder's tokenizer, with a pad token that is not EOS: readers of the last non-pad token then find EOS."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        fail(f"{folder}: no tokenizer there ({error!r:.150}); give a model folder or a hub name")
    if tokenizer.eos_token_id is None:
        fail(f"{folder}: its tokenizer has no EOS token; set `eos_token` in its tokenizer_config.json")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        # else the byte 0xFF, which no UTF-8 text holds, as byte-level BPE and sentencepiece spell it
        others = [tokenizer.unk_token, tokenizer.bos_token, *tokenizer.all_special_tokens, "ÿ", "<0xFF>"]
        others = [token for token in others if token in tokenizer.get_vocab() and token != tokenizer.eos_token]
        tokenizer.pad_token = others[0] if others else fail(
            f"{folder}: its tokenizer has no pad token apart from EOS; set `pad_token` in its tokenizer_config.json")
    return tokenizer


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt, text or messages: by the chat template where there is one, else its text after one BOS."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # jinja's, or the template's own
            fail(f"the tokenizer's chat template refuses the prompt {str(prompt):.80} ({error!r:.100}); mend or drop that row")
    if not isinstance(prompt, str):
        names = {"user": "Human", "assistant": "Assistant"}
        turns = [f"{names.get(turn['role'], turn['role'].title())}: {turn['content']}" for turn in prompt]
        prompt = "\n\n".join(turns + ["Assistant:\n"])
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + tokenizer(prompt, add_special_tokens=False).input_ids


def encode_response(tokenizer, response):
    """Token ids of a response and its EOS. Prompt and response are tokenised apart, so that no token spans both; the space
    that parts a response from a plain-text prompt has no place behind a chat template's."""
    response = response.removeprefix(" ") if tokenizer.chat_template else response
    return tokenizer(response, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]


if __name__ == "__main__":
    main()
