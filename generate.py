"""Generates responses from a policy at several temperatures, top-p, for evaluate.py.

In:   a policy (out/drdo), a JSONL with `prompt` (a validation file, or a prompt set of splits.py)
Out:  out/drdo_generations.jsonl, a row for each prompt and temperature, in their order: `prompt`, `response`,
      `temperature`, `generator`, `tokens` (without EOS), `eos` (False: cut off at --max_new_tokens), and what
      the prompt's row carried, but for a pair's chosen and rejected

    deepspeed generate.py
    deepspeed generate.py --model out/dpo --prompts data/prompts/cnn_dailymail.jsonl --out out/dpo_cnn.jsonl
    deepspeed --num_gpus 2 generate.py --temperature 0 --max_new_tokens 512      # greedy

The answers of a prompt, one for each temperature, grow side by side in one row, like a pair in align.py. The
prompt a b c is read once. Each step feeds a token of each answer, here of d e f and g h i:

    token       a   b | c   c | d   g | e   h | ...     c predicts d, and it predicts g
    answer      0   0 | 1   2 | 1   2 | 1   2           a token sees the prompt (0) and its own answer
    position    0   1 | 2   2 | 3   3 | 4   4

A prompt that stands in several rows is taken once. Batches hold prompts of similar length. Each answer draws
from its own generator, seeded by prompt, temperature and --seed: the text does not depend on the number of
processes. Batch size and the other temperatures change it by rounding alone, which bf16 makes frequent.
A model that does not take the mask answers by Transformers' own loop, with the same draws.
"""
import argparse
import hashlib
import json
import math
import os
import sys
import time
from contextlib import contextmanager
from difflib import get_close_matches

import torch
import torch.distributed as dist
from tqdm import tqdm


def main():
    args = parse_args()
    device = init_process(args)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tokenizer, model, ends = load_model(args.model, device, args.dtype)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    max_length = min(args.max_length, positions or math.inf)
    rows, prompts = read_prompts(args, tokenizer)
    kept = [i for i, ids in enumerate(prompts) if len(ids) + args.max_new_tokens <= max_length]
    if not kept:
        fail(f"{args.prompts}: none of {len(rows)} prompts fits with --max_new_tokens {args.max_new_tokens} "
             f"in --max_length {max_length}, or the model's positions; lower the one or raise the other")

    # ---- batches by length; each process gets its share
    kept.sort(key=lambda i: -len(prompts[i]))
    answer = generate
    size = args.micro_batch_size
    if not takes_mask(model, prompts[kept[0]], args.max_new_tokens):
        print(f"{args.model} does not take the mask of several answers in a row: each reads its prompt anew")
        answer = generate_apart
        size = 1 if model._is_stateful else size  # padding would change a recurrent model's state
    batches = [kept[i:i + size] for i in range(0, len(kept), size)]
    temperatures = torch.tensor(args.temperature, device=device)
    written = []  # (number of the prompt, row)
    for batch in tqdm(batches[rank::world_size], args.generator, disable=rank > 0):
        draws = torch.stack([draw(prompts[i], temperature, args.max_new_tokens, args.seed)
                             for i in batch for temperature in args.temperature])
        draws = draws.view(len(batch), len(temperatures), -1).to(device)
        tokens = answer(model, [prompts[i] for i in batch], temperatures, args.top_p, draws, ends)
        for i, answers in zip(batch, tokens.tolist()):
            row = {name: value for name, value in rows[i].items() if name not in ("chosen", "rejected")}
            for temperature, ids in zip(args.temperature, answers):
                stop = next((k for k, token in enumerate(ids) if token in ends), None)
                written.append((i, row | {
                    "response": decode(tokenizer, row["prompt"], prompts[i], ids[:stop]),
                    "temperature": temperature, "generator": args.generator, "tokens": len(ids[:stop]),
                    "eos": stop is not None}))

    # ---- save
    parts = [None] * world_size
    dist.all_gather_object(parts, written)
    if rank == 0:
        written = sorted(sum(parts, []), key=lambda item: item[0])
        with open(args.out + ".partial", "w", encoding="utf-8", errors="replace") as file:
            for _, row in written:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(args.out + ".partial", args.out)
        print(f"{args.out}: {len(written)} responses to {len(kept)} prompts; {len(rows) - len(kept)} "
              f"prompts over --max_length {max_length} less --max_new_tokens {args.max_new_tokens} dropped")


@torch.no_grad()
def generate(model, prompts, temperatures, top_p, draws, ends):
    """Samples answers to B prompts, lists of token ids, at temperatures (n,), by `draws` (B, n, T), numbers
    in [0, 1). Returns the tokens, (B, n, T). An answer ends in the first that is in `ends`."""
    B, n, T = draws.shape
    cache, mask = read_prompts_once(model, prompts, n)
    stops = torch.tensor(sorted(ends), device=model.device)
    own = torch.eye(n, dtype=torch.bool, device=model.device)  # of a step's n tokens an answer sees its own
    tokens = torch.tensor([ids[-1:] * n for ids in prompts], device=model.device)  # (B, n)
    answers = tokens.new_full(draws.shape, -1)
    rows = torch.arange(B, device=model.device)  # the prompts that are in the batch
    for step in range(T):
        mask = torch.cat([mask, own.expand(len(rows), 1, n, n)], -1)  # (B, 1, n, keys)
        logits = model(tokens, attention_mask=mask, position_ids=mask.sum(-1)[:, 0] - 1,
                       past_key_values=cache, use_cache=True).logits  # (B, n, V)
        tokens = sample(logits.float(), temperatures, top_p, draws[rows, :, step])
        answers[rows, :, step] = tokens
        going = ~torch.isin(answers[rows], stops).any(-1).all(-1)
        if not going.any():
            break
        if not going.all():  # a row leaves when all its answers have ended
            cache.batch_select_indices(going)
            rows, tokens, mask = rows[going], tokens[going], mask[going]
    return answers


def read_prompts_once(model, prompts, n):
    """Reads B prompts less their last tokens, causal and padded right. Returns the cache, and for n tokens
    behind each prompt the mask by which they see it, (B, 1, n, keys)."""
    from transformers import DynamicCache
    lengths = torch.tensor([[len(ids) - 1] for ids in prompts], device=model.device)  # (B, 1)
    width = int(lengths.max())
    cache = DynamicCache()
    if width:
        input_ids = torch.tensor([ids[:-1] + [0] * (width + 1 - len(ids)) for ids in prompts])
        model.base_model(input_ids=input_ids.to(model.device), past_key_values=cache, use_cache=True)
    mask = torch.arange(width, device=model.device) < lengths  # (B, keys)
    return cache, mask[:, None, None].expand(-1, 1, n, -1)


def sample(logits, temperature, top_p, draws, size=256):
    """Samples tokens by logits (..., V) at temperature (...), each among the fewest likeliest tokens that
    together hold `top_p`. draws: uniform in [0, 1), (...). Returns (...). Sorts the likeliest `size` tokens,
    and more where they do not hold top_p: to sort all takes longer than the model."""
    scaled = logits / temperature.clamp(min=1e-6)[..., None]  # at 0 the likeliest token has probability 1
    top, tokens = scaled.topk(min(size, logits.shape[-1]))  # (..., size), falling
    probabilities = (top - scaled.logsumexp(-1, keepdim=True)).exp()
    held = probabilities.cumsum(-1)
    if size < logits.shape[-1] and held[..., -1].min() < top_p:
        return sample(logits, temperature, top_p, draws, 16 * size)
    kept = probabilities.where(held - probabilities < top_p, 0)
    tokens, order = tokens.sort()  # the order of probabilities changes with the rounding, batch by batch
    below = kept.gather(-1, order).cumsum(-1)
    drawn = (below <= draws[..., None] * below[..., -1:]).sum(-1, keepdim=True)
    return tokens.gather(-1, drawn).squeeze(-1)


def draw(prompt, temperature, number, seed):
    """Random numbers of an answer, uniform in [0, 1): by its prompt, its temperature and --seed."""
    digest = hashlib.sha256(repr((prompt, float(temperature), seed)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return torch.rand(number, generator=generator, dtype=torch.float64)


@torch.no_grad()
def takes_mask(model, prompt, max_new_tokens):
    """Whether two answers in a row get the logits of the model's own forward, behind the longest prompt. The
    prompt, repeated, stands for the answers' first tokens."""
    length = len(prompt) + max_new_tokens
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) or length for name in ("sliding_window", "attention_chunk_size")]
    if min(windows) < length:  # the mask would bypass it
        return False
    R = min(8, max_new_tokens)
    *context, last = (prompt * length)[:length - R]
    answer = (prompt * length)[length - R:length]
    ids = torch.tensor([[*context, last, *answer], [*context, last, *answer[::-1]]], device=model.device)
    try:
        own = model(ids, logits_to_keep=R).logits  # (2, R, V)
        cache, mask = read_prompts_once(model, [[*context, last, answer[0]]], 2 * R)
        segment = torch.ones(R, R, dtype=torch.bool, device=model.device).tril()
        mask = torch.cat([mask, torch.block_diag(segment, segment)[None, None]], -1)
        row = model(ids[:, -R:].reshape(1, -1), attention_mask=mask, position_ids=mask.sum(-1)[:, 0] - 1,
                    past_key_values=cache, use_cache=True).logits.view_as(own)
    except Exception:  # models break in many ways on a mask or a position they do not know
        return False
    distance = (row.float().softmax(-1) - own.float().softmax(-1)).abs().sum(-1).mean() / 2  # in [0, 1]
    return bool(distance < (0.08 if model.dtype == torch.bfloat16 else 0.001))


@torch.no_grad()
def generate_apart(model, prompts, temperatures, top_p, draws, ends):
    """As `generate`, by Transformers' own loop: each answer reads the prompt anew."""
    width = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    answers = input_ids.new_full(draws.shape, -1)
    for k, temperature in enumerate(temperatures):
        def choose(ids, logits):  # a logits processor that leaves one token, a sampled one
            tokens = sample(logits.float(), temperature, top_p, draws[:, k, ids.shape[1] - width])
            return torch.full_like(logits, -math.inf).scatter(1, tokens[:, None], 0.0)

        output = model.generate(input_ids, attention_mask=mask, logits_processor=[choose], do_sample=False,
                                max_new_tokens=draws.shape[2], eos_token_id=sorted(ends),
                                pad_token_id=min(ends))[:, width:]
        answers[:, k, :output.shape[1]] = output
    return answers


def decode(tokenizer, prompt, prompt_ids, ids):
    """The text of a response, such that prompt + response is the text that was sampled. It is decoded behind
    its prompt, since some tokenizers drop a text's first space. What a chat template puts around it goes."""
    skip = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode(prompt_ids, **skip)
    response = tokenizer.decode(prompt_ids + ids, **skip)[len(before):]
    if tokenizer.chat_template:
        lead, trail = template_of(tokenizer).split("It is 4.")
        begun = not isinstance(prompt, str) and prompt[-1]["role"] == "assistant"
        if lead.endswith(" ") and not before.endswith(" ") and not begun:  # the first word's token holds it
            response = response.removeprefix(" ")
        response = response.removesuffix(trail)  # an end that is no token
        if trail[:1].isspace():
            response = response.rstrip()
        if isinstance(prompt, str) and not prompt[-1].isspace():
            response = " " + response
    return response


def read_prompts(args, tokenizer):
    """(rows, token ids) of the first --num_prompts prompts of --prompts, each prompt once."""
    found = {}  # {prompt: (its row, its token ids)}
    with open(args.prompts, "rb") as file:
        for number, line in enumerate(file, 1):
            fix = "write one JSON object a line, in UTF-8, with prompt"
            with or_fail(f"{args.prompts}, line {number}", fix):  # no JSON, no text, what a template refuses
                row = json.loads(line)
                (ids,), _ = encode(tokenizer, row["prompt"], [])
            found.setdefault(json.dumps(row["prompt"]), (row, ids))
            if len(found) == args.num_prompts:
                break
    return [row for row, _ in found.values()], [ids for _, ids in found.values()]


def load_model(folder, device, dtype):
    """The folder's tokenizer, its causal LM in "bf16" or "fp32", and the ids that end a response."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    with or_fail(f"--model {folder}", "give the folder or the hub name of a whole causal LM"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.eos_token_id is not None, "its tokenizer has no EOS token"
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        assert not info["missing_keys"], f"its weights lack {min(info['missing_keys'])}"
        assert all(weight.isfinite().all() for weight in model.parameters()), "its weights are not finite"
        assert len(tokenizer) <= model.get_input_embeddings().num_embeddings, "its tokenizer is too large"
        ends = model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
        ends.add(end_token(tokenizer, ends))
    if device.type == "cpu":  # or it copies the keys for each of the query heads that share them
        os.environ["TRANSFORMERS_SDPA_FORCE_GQA"] = "1"
    model.generation_config = GenerationConfig()  # a repetition penalty there would sample another policy
    return tokenizer, model.to(device).eval(), ends


# ---- plumbing: from here to the flags the stages share it to the letter (tests/test_copies.py) -------------

def encode(tokenizer, prompt, responses, end=None):
    """Token ids [prompt, *responses]; and whether prompt and responses are tokenised apart, because one token
    would hold text of both. With a chat template the whole conversation is tokenised, then split. All before
    the response is the prompt, an empty <think> block too. A response ends in the token `end`; without `end`,
    where the template ends. Without a template a row is BOS, prompt, response, EOS."""
    is_text = isinstance(prompt, str)
    assert is_text or isinstance(prompt, list), "the prompt is neither a string nor a list of messages"
    texts = [prompt] if is_text else [message["content"] for message in prompt]
    assert all(isinstance(text, str) for text in texts), "a message's content is not a string"
    assert all(isinstance(response, str) for response in responses), "a response is not a string"
    assert any(texts), "the prompt is empty"
    control = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    assert not (is_text and prompt.startswith(control)), (
        "the prompt begins with a control token: give its text or its messages alone")
    plain = {"add_special_tokens": False, "split_special_tokens": True}  # control tokens in a text stay text
    if tokenizer.chat_template:
        if is_text and not prompt[-1].isspace():  # it parts a response from a text prompt
            responses = [response.removeprefix(" ") for response in responses]
        # two probes, "4." and "I", share no first and no last character: what their conversations have in
        # common in front is the prompt, and behind the template's tail
        chat, *chats = render(tokenizer, prompt, ["4.", *responses], tokenize=False)
        for text, where in [(text, chat) for text in texts] + [*zip(responses, chats)]:
            assert text.strip() in where, f"the chat template drops or changes {text!r:.60}"
        lead = chat[:chat.rindex("4.")].rstrip()
        assert all(text.startswith(lead) for text in chats), "the chat template writes another <think> block"
        one, other, *wholes = render(tokenizer, prompt, ["4.", "I", *responses])
        head = os.path.commonprefix([one, other])
        tail = os.path.commonprefix([one[::-1], other[::-1]])[::-1]
        if not is_text and prompt[-1]["role"] == "assistant":  # it has begun the response
            begun, = render(tokenizer, prompt, [""])
            head = begun[:len(begun) - len(tail)]
    else:
        if not is_text:
            turns = [f"{turn['role'].title().replace('User', 'Human')}: {turn['content']}" for turn in prompt]
            prompt = "\n\n".join(turns + ["Assistant:\n"] * (prompt[-1]["role"] != "assistant"))
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        tail = [tokenizer.eos_token_id]
        head = bos + tokenizer(prompt, **plain).input_ids
        wholes = [bos + tokenizer(prompt + response, **plain).input_ids + tail for response in responses]
    assert head, "the prompt has no token"
    apart = any(whole[:len(head)] != head for whole in wholes)
    ids = [head]
    for response, whole in zip(responses, wholes):
        own = whole[len(head):]
        if apart:  # behind a newline: at the start of a text some tokenizers put a space
            line = tokenizer("\n", **plain).input_ids
            own = tokenizer("\n" + response, **plain).input_ids
            own = own[len(line):] if own[:len(line)] == line else tokenizer(response, **plain).input_ids
            own = own + tail
        if end in tail:  # drop what the template writes behind it
            own = own[:len(own) - len(tail) + tail.index(end) + 1]
        elif end is not None:  # the template writes no end
            own = own + [end]
        ids.append(own)
    return ids, apart


def render(tokenizer, prompt, responses, tokenize=True):
    """The prompt's conversation with each response, as the chat template writes it: token ids, or text. If
    the prompt ends in an assistant's message, the response goes on in it."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    last = {"role": "assistant", "content": ""}
    if messages[-1]["role"] == "assistant":
        *messages, last = messages
    chats = [[*messages, last | {"content": last["content"] + response}] for response in responses]
    # sanitize: a control token that is spelled in a message stays text
    return tokenizer.apply_chat_template(chats, tokenize=tokenize, sanitize_control_tokens=tokenize,
                                         return_dict=False)


def template_of(tokenizer):
    """A short conversation as the chat template writes it, None without one: shows if prompts read alike."""
    return tokenizer.chat_template and render(tokenizer, "What is 2 + 2?", ["It is 4."], tokenize=False)[0]


def end_token(tokenizer, stops):
    """The token that ends a response: of what the chat template writes after one, the first token in `stops`,
    else the first control token, else EOS. Raises if `encode` differs from the template's own ids."""
    if not tokenizer.chat_template:
        return tokenizer.eos_token_id
    (prompt, response), _ = encode(tokenizer, "What is 2 + 2?", ["It is 4."])
    text, = render(tokenizer, "What is 2 + 2?", ["It is 4."], tokenize=False)
    own = tokenizer(text, add_special_tokens=False).input_ids
    assert prompt + response == own, "the stages read other tokens than its chat template writes"
    year = time.strftime("%Y")
    if year in text and year not in tokenizer.chat_template:
        print("the chat template writes the day's date: on another day the same prompts are other tokens")
    control = [id for id, token in tokenizer.added_tokens_decoder.items() if token.special]
    found = [id for id in response if id in stops] + [id for id in response if id in control]
    return found[0] if found else tokenizer.eos_token_id


def init_process(args):
    """Joins the processes that `deepspeed` started; under `python` it is alone. Returns the device.
    Sets --dtype auto to bf16 where the hardware has it; other processors emulate it, many times slower."""
    import deepspeed  # not at the top, like transformers: --help would take twice as long
    from transformers import logging
    if "RANK" not in os.environ:
        os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    deepspeed.utils.logger.setLevel("WARNING")
    logging.set_verbosity_error()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        device = torch.device("cpu")
        has_bf16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
        # DeepSpeed would compile a C++ all-reduce for CPUs, and crash without a compiler; gloo does it too
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:  # the launcher's processes share the cores
            torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_SIZE", 1))))
    deepspeed.init_distributed(verbose=False)
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # one process prints
    if args.dtype == "auto":
        args.dtype = "bf16" if has_bf16 else "fp32"
    print(f"{device.type}, {args.dtype}, {dist.get_world_size()} processes")
    return device


def fail(message):
    """Ends the program on bad input: one line on stderr, exit status 2. Local rank 0 prints at once. The
    others wait 10 s: if the error is everyone's, the launcher has ended them by then, and the line appears
    once. If it is theirs alone, they print it, and the launcher ends the rest."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(10)
    tqdm.write(f"error: {' '.join(str(message).split()):.600}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def or_fail(what, fix):
    """Ends the program by `fail` on an error inside it: of what, the error's first sentence, the fix."""
    try:
        yield
    except Exception as error:  # libraries raise anything where a file is damaged
        missing = " is missing" if isinstance(error, KeyError) else ""
        text = " ".join(str(getattr(error, "msg", error)).split())
        fail(f"{what}: {text.split('. ')[0].rstrip('.') or type(error).__name__}{missing}; {fix}")


class Parser(argparse.ArgumentParser):
    """A wrong flag ends the program in one line, which names the nearest right one."""

    def error(self, message):
        _, unknown, flags = message.partition("unrecognized arguments: ")
        if unknown:
            ours = [word.strip("[]") for word in self.format_usage().split() if "--" in word]
            message += f"; the nearest flag is {get_close_matches(flags.split()[0], ours, 1, 0)[0]}"
        fail(f"{message}; {self.prog} --help lists all flags")


def check_flags(args, may_be_zero):
    """Fails where a number is not above 0 and finite. Flags named in `may_be_zero`, and a seed, may be 0."""
    for name, values in vars(args).items():
        zero_too = name in [*may_be_zero.split(), "seed", "local_rank"]
        for value in values if isinstance(values, list) else [values]:
            if type(value) in (int, float) and not (0 < value < math.inf or value == 0 and zero_too):
                fail(f"--{name} {value}: give a finite number {'of 0 or more' if zero_too else 'above 0'}")


# ---- flags -------------------------------------------------------------------------------------------------

def parse_args():
    formatters = argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=type("Help", formatters, {}))
    flag = parser.add_argument_group("data and model").add_argument
    flag("--model", default="out/drdo", help="the policy: a folder or a hub name")
    flag("--prompts", default="data/all/validation.jsonl", help="JSONL with `prompt`")
    flag("--num_prompts", type=int, default=0, help="take only the first N prompts; 0: all")
    flag("--out", help="file to write; None: <model>_generations.jsonl, beside the model's folder; for a "
         "model of the hub in out/")
    flag("--generator", help="the policy's name in the output; None: --model")
    flag = parser.add_argument_group("sampling").add_argument
    flag("--temperature", type=float, nargs="+", default=[0.2, 0.5, 0.7, 0.9], help="each; 0 is greedy")
    flag("--top_p", type=float, default=0.8, help="sample among the likeliest tokens of this probability")
    flag("--max_new_tokens", type=int, default=256, help="tokens after which a response is cut off")
    flag("--max_length", type=int, default=1024, help="drop prompts that pass it with --max_new_tokens added")
    flag("--micro_batch_size", type=int, default=16, help="prompts a batch, each with all its answers")
    flag("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 where it is fast")
    flag("--seed", type=int, default=0, help="of the sampling")
    flag("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    args = parser.parse_args()
    check_flags(args, "temperature num_prompts")
    if args.top_p > 1:
        fail(f"--top_p {args.top_p}: it is a probability; give a number above 0, at most 1")
    args.generator = args.generator or args.model.rstrip("/")
    folder = args.model.rstrip("/") if os.path.isdir(args.model) else f"out/{os.path.basename(args.model)}"
    args.out = args.out or f"{folder}_generations.jsonl"
    if os.path.isdir(args.out):
        fail(f"--out {args.out} is a folder; name a file in it")
    if os.path.realpath(args.out) == os.path.realpath(args.prompts):
        fail(f"--out {args.out} would overwrite --prompts; name another file")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    return args


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a file that is missing, a full disk, no permission
        fail(error)
    except torch.OutOfMemoryError as error:
        fail(f"{str(error).split('. ')[0]}; lower --micro_batch_size")
    dist.destroy_process_group()
