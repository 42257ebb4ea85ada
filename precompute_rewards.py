"""Scores responses with one Oracle or K of them, once: the only program that scores anything.

In:   reward models (out/oracle), and a JSONL: prompt, chosen, rejected; or prompt, response (generations)
Out:  rewards.pt: a dict that torch.load(weights_only=True) reads. Tensors, float32, (K, N), K Oracles by N
      rows in file order, NaN where a row has over --max_length tokens: `chosen` and `rejected`; or
      `response`, and `reference` if rows carry one. `oracles`: the K folders. `data_sha256`: the file's.

    deepspeed precompute_rewards.py                                                 # for align.py --loss drdo
    deepspeed precompute_rewards.py --oracle out/reward_model_{1,2,3} --out ensemble.pt      # for --loss edpo
    deepspeed precompute_rewards.py --data out/drdo_generations.jsonl --out out/drdo_generations.pt
    deepspeed precompute_rewards.py --data pairs.jsonl --relabel labelled.jsonl         # pairs without labels
    deepspeed --num_gpus 2 precompute_rewards.py --oracle Skywork/Skywork-Reward-V2-Llama-3.2-1B

Any AutoModelForSequenceClassification with one label and a linear head `score` serves as an Oracle. A text
is prompt + response + EOS, and its reward is read at EOS. A text that stands in several rows is scored once.
Texts are sorted by length and shared out among the processes. Their number and the batch size change a
reward by rounding alone.
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

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from losses import last_token_rewards


def main():
    args = parse_args()
    device = init_process(args)
    sha256 = hash_of(args.data)  # now: the file may change while the scoring runs
    scored = [score_file(folder, device, args) for folder in args.oracle]
    rewards = {key: torch.stack([columns[key] for columns, _ in scored]) for key in scored[0][0]}  # (K, N)

    # ---- save and report
    if dist.get_rank() > 0:
        return
    if args.relabel:
        rewards = relabel(args.data, rewards, args.relabel)
        sha256 = hash_of(args.relabel)
    oracles = [folder.rstrip("/") for folder in args.oracle]
    templates = [template for _, template in scored]
    torch.save(rewards | {"oracles": oracles, "data_sha256": sha256, "templates": templates},
               args.out + ".partial")
    os.replace(args.out + ".partial", args.out)
    pairs = "chosen" in rewards
    margins = rewards["chosen"] - rewards["rejected"] if pairs else rewards["response"]  # (K, N)
    finite = margins.isfinite().all(0)  # (N,)
    print(f"{args.out}: rewards of {len(finite)} rows by {len(oracles)} oracles; NaN for "
          f"{int((~finite).sum())} rows over --max_length {args.max_length}, or the model's positions")
    for k, folder in enumerate(oracles):
        figures = [f"mean {key} reward {column[k].nanmean():.3f}" for key, column in rewards.items()]
        if pairs:
            margin = margins[k, finite]
            figures = [f"chosen above rejected in {(margin > 0).float().mean():.3f} of pairs",
                       f"margin {margin.mean():.3f} (std {margin.std():.3f})"]
        print(f"  {folder}: {', '.join(figures)}")


def score_file(folder, device, args):
    """The rewards by one Oracle, {key: (N,)}, NaN where a text is too long or missing; and its template."""
    tokenizer, model = load_oracle(folder, device, args.dtype)
    texts, columns = read_texts(args.data, tokenizer)
    if args.relabel and "chosen" not in columns:
        fail(f"--relabel: {args.data} holds no pairs; give rows with chosen and rejected, in any order")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    max_length = min(args.max_length, positions or math.inf)
    fits = [i for i, text in enumerate(texts) if sum(map(len, text)) <= max_length]
    if not fits:
        fail(f"{args.data}: no row fits in --max_length {max_length}, or the model's positions; raise it")
    rewards = torch.full((len(texts) + 1,), math.nan)  # the last, number -1: rows without this text
    rewards[fits] = score(model, [texts[i] for i in fits], args.micro_batch_size, folder)
    if not rewards[fits].isfinite().all():
        fail(f"--oracle {folder}: its rewards are not finite; train it with a lower --learning_rate")
    return {key: rewards[numbers] for key, numbers in columns.items()}, template_of(tokenizer)


@torch.no_grad()
def score(model, texts, micro_batch_size, description):
    """Rewards of texts, (prompt, response) of token ids each: (len(texts),) on the CPU. Batches of rows with
    as many responses, sorted by length, are shared out among the processes."""
    rewards = torch.zeros(len(texts), device=model.device)
    rows = rows_of(texts, micro_batch_size)
    if not takes_mask(model, texts, rows):
        print(f"{description} does not take the mask of several responses in a row: texts are scored alone")
        rows = [[i] for i in range(len(texts))]
    micro_batches = []
    for row in sorted(rows, key=lambda row: (len(row), tokens_of(texts, row)), reverse=True):
        if not micro_batches or len(row) != len(batch[0]) or len(row) * (len(batch) + 1) > micro_batch_size:
            micro_batches.append(batch := [])
        batch.append(row)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for micro in tqdm(micro_batches[rank::world_size], description, disable=rank > 0):
        rewards[torch.tensor(micro)] = rewards_of(model, texts, micro).float()
    dist.all_reduce(rewards)
    return rewards.cpu()


def rows_of(texts, max_responses):
    """Rows of texts that have a prompt in common: lists of their numbers. A row has at most `max_responses`
    responses, and at most twice the tokens of the longest text."""
    limit = 2 * max(len(prompt) + len(response) for prompt, response in texts)
    rows, open_rows = [], {}
    for i, (prompt, _) in enumerate(texts):
        row = open_rows.get(digest := hashlib.sha256(prompt).digest())
        if row is None or len(row) == max_responses or tokens_of(texts, [*row, i]) > limit:
            rows.append(row := [])
            open_rows[digest] = row
        row.append(i)
    return rows


def tokens_of(texts, row):
    return len(texts[row[0]][0]) - 1 + sum(len(texts[i][1]) + 1 for i in row)


def rewards_of(model, texts, rows):
    """Rewards of a batch of B rows of R responses each, (B, R)."""
    batch = [[texts[row[0]][0], *[texts[i][1] for i in row]] for row in rows]
    input_ids, position_ids, segments, ends = collate(batch, model.device)
    # as AutoModelForSequenceClassification, which reads the last token that is no pad: some pad with EOS
    ends = ends - (input_ids.gather(1, ends) == model.config.get_text_config().pad_token_id).long()
    layout = {}  # one response: causal, padded right, it needs no mask
    if len(rows[0]) > 1:
        layout = {"position_ids": position_ids, "attention_mask": pair_mask(segments)}
    hidden = model.base_model(input_ids=input_ids, use_cache=False, **layout).last_hidden_state  # (B, T, H)
    return last_token_rewards(hidden, model.score.weight, ends)


def takes_mask(model, texts, rows):
    """Whether each response in a row gets the reward that it gets alone: in the row with the longest text."""
    longest = lambda row: max(sum(map(len, texts[i])) for i in row)
    row = max(rows, key=lambda row: (len(row) > 1, longest(row)))
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) or math.inf for name in ("sliding_window", "attention_chunk_size")]
    if min(windows) < longest(row):  # the mask would bypass it
        return False
    alone = torch.cat([rewards_of(model, texts, [[i]])[0] for i in row])  # (R,)
    try:
        rewards = rewards_of(model, texts, [row])[0]
    except Exception:  # models break in many ways on a mask or a position they do not know
        return False
    bound = 0.05 if model.dtype == torch.bfloat16 else 0.001
    return bool((rewards - alone).norm() <= bound * alone.norm())


def read_texts(path, tokenizer):
    """(texts, columns): (prompt, response) of each text, arrays of token ids, a text once; and {key: the
    number of each row's text, or -1 where it has none}. Keys: chosen, rejected; or response, reference."""
    texts, columns = {}, {}  # texts: {hash: (number, text)}
    fix = "write one JSON object a line, in UTF-8, with prompt, chosen and rejected, or prompt and response"
    with open(path, "rb") as file:
        bar = tqdm(file, "tokenising", unit=" rows", disable=dist.get_rank() > 0)
        for line_number, line in enumerate(bar, 1):
            with or_fail(f"{path}, line {line_number}", fix):  # no JSON, no text, what a template refuses
                row = json.loads(line)
                if not columns:
                    generations = "response" in row and "chosen" not in row
                    keys = ["response", "reference"] if generations else ["chosen", "rejected"]
                    columns = {key: [] for key in keys}
                for key, column in columns.items():
                    if key == "reference" and not isinstance(row.get(key), str):
                        column.append(-1)
                        continue
                    ids, _ = encode(tokenizer, row["prompt"], [row[key]])
                    text = [np.array(part, np.int32) for part in ids]
                    digest = hashlib.sha256(np.concatenate(text)).digest()
                    number, _ = texts.setdefault(digest, (len(texts), text))
                    column.append(number)
    if not columns:
        fail(f"{path}: it has 0 rows; give pairs or generations")
    return [text for _, text in texts.values()], {key: c for key, c in columns.items() if max(c) >= 0}


def relabel(data, rewards, path):
    """Writes the pairs to `path`, the response with the higher mean reward as `chosen`. Returns the rewards
    of the pairs that it wrote. It leaves out those without two rewards, and those with equal ones."""
    margins = (rewards["chosen"] - rewards["rejected"]).mean(0)  # (N,); NaN: too long for an Oracle
    with open(data, "rb") as lines, open(path + ".partial", "w", encoding="utf-8", errors="replace") as file:
        for line, margin in zip(lines, margins.tolist()):
            row = json.loads(line)
            if margin < 0:
                row.pop("confidence", None)  # in the order that the file had
                for key in [key for key in row if "chosen" in key]:
                    other = key.replace("chosen", "rejected")
                    if other in row:  # chosen_rating, score_chosen, ...
                        row[key], row[other] = row[other], row[key]
            if abs(margin) > 0:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(path + ".partial", path)
    kept = margins.abs() > 0
    swapped = margins[kept] < 0
    print(f"{path}: {len(swapped)} pairs, the two responses of {int(swapped.sum())} swapped; "
          f"{int((~kept).sum())} left out: without two rewards, or with equal ones")
    chosen, rejected = rewards["chosen"][:, kept], rewards["rejected"][:, kept]
    return {"chosen": torch.where(swapped, rejected, chosen),
            "rejected": torch.where(swapped, chosen, rejected)}


def collate(rows, device):
    """A batch of rows [prompt less its last token | last + y1 | last + y2 | ...], padded right by zeros.

    rows: lists of arrays of token ids, [prompt, y1, y2, ...]. `last` is a copy of the prompt's last token, at
    its position in the prompt.
    Returns integer tensors: input_ids, position_ids, segments (0: prompt, k: the k-th response, -1: padding),
    (B, T) each; ends, the column of each response's last token, EOS, where rewards are read, (B, R).
    """
    width = max(sum(map(len, row)) + len(row) - 2 for row in rows)  # R copies of `last` replace one
    width += -width % (8 if device.type == "cuda" else 1)  # GPUs like multiples of 8
    input_ids = np.zeros((len(rows), width), int)
    position_ids = np.zeros((len(rows), width), int)
    segments = np.full((len(rows), width), -1)
    ends = np.zeros((len(rows), len(rows[0]) - 1), int)
    for i, (prompt, *responses) in enumerate(rows):
        border = end = len(prompt) - 1
        input_ids[i, :border] = prompt[:-1]
        position_ids[i, :border] = np.arange(border)
        segments[i, :border] = 0
        for k, response in enumerate(responses, 1):
            start, end = end, end + 1 + len(response)
            input_ids[i, start:end] = np.append(prompt[-1], response)
            position_ids[i, start:end] = np.arange(border, border + end - start)
            segments[i, start:end] = k
            ends[i, k - 1] = end - 1
    return [torch.as_tensor(x, device=device) for x in (input_ids, position_ids, segments, ends)]


def pair_mask(segments):
    """Attention mask (B, 1, T, T), True where the query (dim 2) sees the key (dim 3). Causal. A response sees
    the prompt and itself. Padding sees the prompt and padding, so that each query sees a key."""
    query = segments[:, :, None]
    key = segments[:, None, :]
    return ((key == 0) | (key == query)).tril()[:, None]


def load_oracle(folder, device, dtype):
    """The folder's tokenizer and reward model, in "bf16" or "fp32": a decoder with a linear head `score`."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    with or_fail(f"--oracle {folder}", "give a reward model with one label; oracle.py trains one"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.eos_token_id is not None, "its tokenizer has no EOS token"
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=dtype, output_loading_info=True)
        assert not info["missing_keys"], f"its weights lack {min(info['missing_keys'])}"
        assert hasattr(model, "score"), "it has no linear head score.weight"
        assert len(tokenizer) <= model.get_input_embeddings().num_embeddings, "its tokenizer is too large"
        end_token(tokenizer, [])
    return tokenizer, model.to(device).eval()


# ---- plumbing: from here to the flags the stages share it to the letter (tests/test_copies.py) -------------

def hash_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    flag = parser.add_argument
    flag("--oracle", nargs="+", default=["out/oracle"], help="reward models: folders or hub names")
    flag("--data", default="data/all/train.jsonl", help="JSONL to score")
    flag("--out", default="rewards.pt", help="file to write")
    flag("--relabel", metavar="FILE", help="write the pairs here again, the response with the higher mean "
         "reward as `chosen`, less those it cannot order; --out then belongs to this file, for align.py")
    flag("--max_length", type=int, default=1024, help="a prompt + response with more tokens gets NaN")
    flag("--micro_batch_size", type=int, default=32, help="responses per forward pass, on one process")
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


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a file that is missing, a full disk, no permission
        fail(error)
    except torch.OutOfMemoryError as error:
        fail(f"{str(error).split('. ')[0]}; lower --micro_batch_size")
    dist.destroy_process_group()
