"""Generates responses from a policy at several temperatures, top-p, for evaluate.py.

In:   a policy (out/drdo), a JSONL with `prompt` (a preference set's validation file, or a prompt set of splits.py)
Out:  <model>/generations.jsonl, a row for each prompt and temperature, in prompt order: `prompt`, `response`,
      `temperature`, `generator`, `tokens` (without EOS), `eos` (False where --max_new_tokens cut the response off), and
      what the prompt's row carried, but for a pair's chosen and rejected

    deepspeed generate.py
    deepspeed generate.py --model out/dpo --prompts data/prompts/cnn_dailymail.jsonl --out out/dpo/cnn_dailymail.jsonl
    deepspeed --num_gpus 2 generate.py --temperature 0 --max_new_tokens 512      # greedy

A prompt that stands in several rows is taken once. Batches hold prompts of similar length and draw from a seed of
their own, so the text does not depend on the number of processes (on the batches and the list of temperatures it does).
"""
import argparse
import json
import logging
import math
import os
import sys

import deepspeed
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def parse_args():
    formatters = argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", formatters, {}))
    group = parser.add_argument_group("data and model")
    group.add_argument("--model", default="out/drdo", help="the policy: a folder or a hub name")
    group.add_argument("--prompts", default="data/all/validation.jsonl", help="JSONL with `prompt`")
    group.add_argument("--num_prompts", type=int, default=0, help="take only the first this many prompts; 0: all")
    group.add_argument("--out", help="file to write (default: <model>/generations.jsonl)")
    group.add_argument("--generator", help="the policy's name in the output (default: --model)")
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, nargs="+", default=[0.2, 0.5, 0.7, 0.9], help="each in turn; 0 is greedy")
    group.add_argument("--top_p", type=float, default=0.8, help="nucleus: the likeliest tokens that hold this much probability")
    group.add_argument("--max_new_tokens", type=int, default=256, help="tokens after which a response is cut off")
    group.add_argument("--max_length", type=int, default=1024, help="drop prompts longer than this less --max_new_tokens")
    group.add_argument("--micro_batch_size", type=int, default=32, help="prompts a batch, on one process")
    group.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    args = parser.parse_args()
    if args.top_p > 1:
        fail(f"--top_p {args.top_p}: it is a probability; give a number above 0, at most 1")
    if not args.out and not os.path.isdir(args.model):
        fail(f"--model {args.model} is no folder here; for a model of the hub give --out too")
    args.out = args.out or f"{args.model}/generations.jsonl"
    if os.path.isdir(args.out):
        fail(f"--out {args.out} is a folder; name a file, such as {os.path.join(args.out, 'generations.jsonl')}")
    args.generator = args.generator or args.model.rstrip("/")
    check_flags(args, os.path.dirname(args.out), "temperature", "num_prompts", "seed", "local_rank")
    return args


# ---- sampling ---------------------------------------------------------------------------------------------------------


def load_model(folder, device):
    """The folder's causal LM, in bf16 where the GPU has it, and the ids that end a response."""
    dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa",
                                                           output_loading_info=True)
    except Exception as error:
        fail(f"--model {folder}: no causal LM there ({error!r:.150}); give a model folder or a hub name")
    if info["missing_keys"]:
        fail(f"--model {folder}: its weights lack {sorted(info['missing_keys'])[0]}; give the folder of a whole causal LM")
    ends = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig()  # else a repetition penalty of the model's own would sample another policy
    return model.to(device).eval(), set(ends if isinstance(ends, list) else [ends]) - {None}


@torch.no_grad()
def generate(model, prompts, temperature, top_p, max_new_tokens, pad_token_id, ends, device):
    """Response ids of a batch of prompts (lists of ids), without EOS, and whether each came to its EOS."""
    width = max(map(len, prompts))
    input_ids = torch.tensor([[pad_token_id] * (width - len(ids)) + ids for ids in prompts], device=device)
    lengths = torch.tensor([[len(ids)] for ids in prompts], device=device)
    mask = (torch.arange(width, device=device) >= width - lengths).long()  # padded left
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {"do_sample": False}
    config = GenerationConfig(max_new_tokens=max_new_tokens, pad_token_id=pad_token_id, eos_token_id=sorted(ends), **sampling)
    output = model.generate(input_ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
    stops = [next((i for i, token in enumerate(ids) if token in ends), None) for ids in output]
    return [(ids[:stop], stop is not None) for ids, stop in zip(output, stops)]


def main():
    args = parse_args()
    device, rank, world_size = init_process()
    tokenizer = load_tokenizer(args.model)
    unique = {}
    for row in read_jsonl(args.prompts, "prompt"):
        unique.setdefault(json.dumps(row["prompt"]), row)
    rows = list(unique.values())[:args.num_prompts or None]
    model, ends = load_model(args.model, device)
    ends.add(tokenizer.eos_token_id)
    args.max_length = min(args.max_length, getattr(model.config, "max_position_embeddings", args.max_length))
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in tqdm(rows, "tokenising", disable=rank > 0)]
    kept = [i for i, ids in enumerate(prompts) if len(ids) + args.max_new_tokens <= args.max_length]
    if not kept:
        fail(f"{args.prompts}: every prompt and --max_new_tokens {args.max_new_tokens} have more than --max_length "
             f"{args.max_length} tokens (or the model's positions); raise or lower them")

    kept.sort(key=lambda i: -len(prompts[i]))
    micro_batches = [kept[i:i + args.micro_batch_size] for i in range(0, len(kept), args.micro_batch_size)]
    tasks = list(enumerate((temperature, micro) for micro in micro_batches for temperature in args.temperature))
    tasks.sort(key=lambda task: task[1][0])  # so that every process gets its share of each temperature
    written = []  # ((prompt, temperature), row)
    for number, (temperature, micro) in tqdm(tasks[rank::world_size], f"generating, {args.generator}", disable=rank > 0):
        torch.manual_seed(args.seed * 1_000_003 + number)
        results = generate(model, [prompts[i] for i in micro], temperature, args.top_p, args.max_new_tokens,
                           tokenizer.pad_token_id, ends, device)
        for i, (ids, ended) in zip(micro, results):
            row = {name: value for name, value in rows[i].items() if name not in ("chosen", "rejected")}
            response = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if tokenizer.chat_template and isinstance(row["prompt"], str) and not row["prompt"][-1].isspace():
                response = " " + response  # as in a preference file, where prompt + response is the text
            row.update(response=response,
                       temperature=temperature, generator=args.generator, tokens=len(ids), eos=ended)
            written.append(((i, temperature), row))

    parts = [None] * world_size
    dist.all_gather_object(parts, written)
    if rank == 0:
        with open(args.out + ".partial", "w", encoding="utf-8") as file:
            for _, row in sorted(sum(parts, []), key=lambda item: item[0]):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(args.out + ".partial", args.out)
        print(f"{args.out}: {sum(map(len, parts))} responses to {len(kept)} prompts at temperature {args.temperature}; "
              f"{len(rows) - len(kept)} prompts over --max_length {args.max_length} - {args.max_new_tokens} tokens dropped")
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


if __name__ == "__main__":
    main()
