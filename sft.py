"""Fine-tunes a causal LM on responses: the SFT policy that DRDO, DPO and e-DPO start from (arXiv 2410.08458).

In:   a base LM; data/all/train.jsonl (prompt, chosen)
Out:  out/sft/: model, tokenizer, args.json, log.jsonl, README.md; checkpoint/ while it runs

    deepspeed sft.py --model facebook/opt-125m
    deepspeed sft.py --resume                                    # goes on from the last checkpoint
    deepspeed sft.py --model out/base --data data/sft/train.jsonl --eval_data data/sft/validation.jsonl
    deepspeed sft.py --model out/sft --out out/sft_winners       # SFT on winners, a baseline

The loss is the mean negative log-likelihood of the step's response tokens, EOS included. Prompts carry none.
A row is a prompt and its response. With prompt a b c and response d E (E: EOS):

    token       a   b   c   d   E       each token predicts its right neighbour
    segment     0   0   1   1   1       log pi(y|x) sums over d E, which are predicted inside segment 1

Rows are padded right: under a causal mask no token sees padding, and no mask is needed.
"""
import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from losses import response_logps


# ---- the row and the model ---------------------------------------------------------------------------------

class ResponseModel(torch.nn.Module):
    """A causal LM that scores responses."""

    def __init__(self, lm, bf16=False):
        super().__init__()
        self.lm = lm
        self.bf16 = bf16

    def forward(self, rows):
        """log pi(y|x), (B,), fp32, of B rows, lists of token ids [prompt, response]."""
        input_ids, segments = collate(rows, self.lm.device)
        # entered anew in each forward pass: autocast keeps its bf16 copies of the weights until it exits, and
        # after a step they would be old
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16 and self.lm.device.type == "cpu"):
            hidden = self.lm.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, H)
            logps = response_logps(hidden, self.lm.get_output_embeddings(), input_ids, segments, 1)  # (B, 1)
        return logps[:, 0]


def collate(rows, device):
    """A batch of rows [prompt | response], padded right by zeros: input_ids and segments, (B, T) each. The
    prompt's last token belongs to segment 1: it predicts the response's first token. See losses.py."""
    width = max(sum(map(len, row)) for row in rows)
    input_ids = np.zeros((len(rows), width), int)
    segments = np.full((len(rows), width), -1)
    for i, (prompt, response) in enumerate(rows):
        last, end = len(prompt) - 1, len(prompt) + len(response)
        input_ids[i, :end] = np.concatenate([prompt, response])
        segments[i, :last] = 0
        segments[i, last:end] = 1
    return torch.as_tensor(input_ids, device=device), torch.as_tensor(segments, device=device)


# ---- training ----------------------------------------------------------------------------------------------

def main():
    args = parse_args()
    device = init_process(args)
    rank, world_size = dist.get_rank(), dist.get_world_size()

    # ---- the LM, its rows, the engine
    tokenizer, lm = load_model(args.model, device)
    rows = Rows(args.data, ["chosen"], tokenizer, lm, args.max_length)
    eval_rows = args.eval_data and Rows(args.eval_data, ["chosen"], tokenizer, lm, args.max_length,
                                        args.eval_rows)
    row_tokens = rows.lengths.sum(1)  # (N,)
    response_tokens = rows.lengths[:, 1]  # (N,); EOS included
    steps = plan_steps(row_tokens, args)  # (max_steps, batch_size): the rows of each step, by the seed alone
    check_logits(lm, rows, args)
    model = ResponseModel(lm, bf16=args.dtype == "bf16")
    engine = make_engine(model, args)  # AdamW, under ZeRO by --deepspeed_config
    state = start_run(engine, args, rows, eval_rows)  # step 0; with --resume that of the last checkpoint

    if eval_rows and not args.resume:
        log(args, 0, [{"loss": mean_nll(model, eval_rows, args)}], prefix="eval_")
    nll = torch.zeros(1, device=device)  # sums since the last line of the log
    targets = tokens = 0
    start = time.time()
    bar = tqdm(steps[state["step"]:], args.out, args.max_steps, initial=state["step"], disable=rank > 0)
    for step, batch in enumerate(bar, state["step"] + 1):
        learning_rate = set_learning_rate(engine, step, args)
        micro_batches = batch.reshape(-1, world_size, args.micro_batch_size)[:, rank]  # this process's share
        for micro in micro_batches:
            logps = engine([rows[i] for i in micro])  # (B,)
            # the loss is the mean over the step's tokens; DeepSpeed divides by micro-batches and processes
            loss = -logps.sum() / response_tokens[batch].sum()
            engine.backward(loss * len(micro_batches) * world_size)
            engine.step()  # after the last micro-batch the weights move by the mean of the gradients
            nll -= logps.detach().sum()
        targets += int(response_tokens[batch].sum())
        tokens += row_tokens[batch].sum()
        grad_norm = check_gradient(engine, step, rows.lines[batch], args)

        evaluates = step % args.eval_steps == 0 or step == args.max_steps
        saves = args.save_steps and step % args.save_steps == 0
        if evaluates or saves or step == 1 or step % args.log_steps == 0:
            dist.all_reduce(nll)
            log(args, step, [{"loss": nll / targets}], epoch=step * args.batch_size / len(rows),
                learning_rate=learning_rate, grad_norm=grad_norm,
                tokens_per_second=tokens / (time.time() - start))
            if evaluates and eval_rows:
                log(args, step, [{"loss": mean_nll(model, eval_rows, args)}], prefix="eval_")
            if saves:
                save_checkpoint(engine, args, state | {"step": step})
            nll = torch.zeros(1, device=device)
            targets = tokens = 0
            start = time.time()
    write_card(args)
    save_model(lm, tokenizer, args.out)


@torch.no_grad()
def mean_nll(model, rows, args):
    """Mean negative log-likelihood of the rows' response tokens, (1,), shared out among the processes."""
    total = torch.zeros(1, dtype=torch.float64, device=model.lm.device)
    order = sorted(range(len(rows)), key=lambda i: -rows.lengths[i].sum())
    micro_batches = [order[i:i + args.micro_batch_size] for i in range(0, len(order), args.micro_batch_size)]
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for micro in tqdm(micro_batches[rank::world_size], "evaluating", disable=rank > 0, leave=False):
        total -= model([rows[i] for i in micro]).sum()
    dist.all_reduce(total)
    return total / rows.lengths[:, 1].sum()


@torch.no_grad()
def check_logits(lm, rows, args):
    """Fails where a response's log-prob is not the model's own: some models scale or cap their logits."""
    longest = rows.lengths[:, 1].argmax()
    prompt, response = rows[longest]
    logp = ResponseModel(lm)([rows[longest]])[0]
    ids = torch.as_tensor(np.concatenate([prompt, response]), dtype=torch.long, device=lm.device)
    logits = lm(ids[None]).logits[0, len(prompt) - 1:-1]  # (R, V)
    own = logits.double().log_softmax(-1).gather(-1, ids[len(prompt):, None]).sum()
    if not abs(own - logp) <= 0.001 * len(response):  # NaN too
        fail(f"--model {args.model}: log pi(y|x) of a response is {own:.2f} by the model's own forward and "
             f"{logp:.2f} by its last hidden state; take another model type")


# ---- plumbing: from here to the flags the stages share it to the letter (tests/test_copies.py) -------------

class Rows(list):
    """The lines of a JSONL file that fit in max_length and the model. Each is a list of int32 arrays of token
    ids: the prompt, and the responses under `keys`. lines: (N,), their numbers. lengths: (N, 1 + responses),
    tokens of each. sha256: the hash of all ids. A response ends in the LM's end token, or for a reward model,
    with whole_turn, where the chat template ends."""

    def __init__(self, path, keys, tokenizer, lm, max_length, limit=0, whole_turn=False):
        positions = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
        max_length = min(max_length, positions or math.inf)
        end = None if whole_turn else lm.generation_config.eos_token_id[0]  # load_model put it there
        fix = f"write one JSON object a line, in UTF-8, with prompt, {', '.join(keys)}"
        self.sha256 = hashlib.sha256()
        number = num_apart = 0
        lines = []
        with open(path, "rb") as file:
            bar = tqdm(islice(file, limit or None), "tokenising", unit=" rows", disable=dist.get_rank() > 0)
            for number, line in enumerate(bar, 1):
                with or_fail(f"{path}, line {number}", fix):  # no JSON, no text, what a chat template refuses
                    fields = json.loads(line)
                    responses = [fields[key] for key in keys]
                    ids, apart = encode(tokenizer, fields["prompt"], responses, end)
                if len(ids[0]) + max(map(len, ids[1:])) <= max_length:
                    num_apart += apart
                    lines.append(number)
                    self.append([np.array(part, np.int32) for part in ids])
                    self.sha256.update(repr(ids).encode())
        if not lines:
            fail(f"{path}: none of {number} rows fits in --max_length {max_length} or the model's positions")
        print(f"{path}: {len(lines)} rows, {number - len(lines)} over --max_length {max_length} dropped; "
              f"{num_apart} tokenised apart from their prompt, as one token would hold text of both")
        self.lines = np.array(lines)
        self.lengths = np.array([[len(part) for part in row] for row in self])


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


def plan_steps(row_tokens, args):
    """The rows of each optimizer step, (max_steps, batch_size). They follow from --seed, --batch_size and the
    number of rows: neither processes nor --resume change them. Each epoch is a new shuffle, and rows left
    over at its end are skipped. Within a step the longest come first, so that a micro-batch holds little
    padding.
    Sets the defaults of --micro_batch_size, --max_steps and --warmup_steps."""
    num_rows, size = len(row_tokens), args.batch_size
    fitting = [n for n in range(1, 9) if size % (n * args.processes) == 0]
    args.micro_batch_size = args.micro_batch_size or max(fitting, default=1)
    if size % (args.micro_batch_size * args.processes):
        fail(f"--batch_size {size} is no multiple of --micro_batch_size {args.micro_batch_size} x "
             f"{args.processes} processes; change one of them")
    if num_rows < size:
        fail(f"{args.data}: {num_rows} rows are fewer than --batch_size {size}; lower it")
    if not args.max_steps:
        epochs_end = int((args.epochs or 3) * num_rows / size)
        args.max_steps = max(1, epochs_end if args.epochs else min(1000, epochs_end))
    if args.warmup_steps is None:
        args.warmup_steps = min(100, args.max_steps // 10)
    print(f"{args.max_steps} steps of {size}: {args.max_steps * size / num_rows:.2f} epochs, "
          f"{args.warmup_steps} steps of warm-up")
    per_epoch = num_rows // size  # steps
    steps = []
    for step in range(args.max_steps):
        if step % per_epoch == 0:
            order = np.random.default_rng((args.seed, step // per_epoch)).permutation(num_rows)
        of_step = order[step % per_epoch * size:][:size]
        steps.append(of_step[np.argsort(-row_tokens[of_step], kind="stable")])
    return np.stack(steps)


def set_learning_rate(engine, step, args):
    """Linear warm-up to --learning_rate, then a cosine to 0. step: from 1 on."""
    factor = step / max(1, args.warmup_steps)
    if step > args.warmup_steps:
        done = (step - 1 - args.warmup_steps) / (args.max_steps - args.warmup_steps)
        factor = 0.5 + 0.5 * math.cos(math.pi * done)
    for group in engine.optimizer.param_groups:
        group["lr"] = args.learning_rate * factor
    return args.learning_rate * factor


def check_gradient(engine, step, lines, args):
    """The norm of the step's gradient, before clipping. Ends the run where it is not finite."""
    grad_norm = float(engine.get_global_grad_norm())
    if not 0 <= grad_norm < math.inf:  # NaN too
        fail(f"step {step}: the loss or its gradient is not finite; lower --learning_rate, or look at "
             f"{args.data}, lines {sorted(lines.tolist())}")
    return grad_norm


def load_model(folder, device, attention=None):
    """The folder's tokenizer and causal LM: fp32 (DeepSpeed casts it), no dropout. attention: "sdpa" for the
    row of a pair, whose mask is 4D; None: what transformers takes."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    kind = f"whole causal LM{' with SDPA attention' if attention else ''}"
    with or_fail(f"--model {folder}", f"give the folder or the hub name of a {kind}"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.eos_token_id is not None, "its tokenizer has no EOS token"
        config = AutoConfig.from_pretrained(folder)
        for part in (config, config.get_text_config()):
            for name, value in part.to_dict().items():
                if ("drop" in name or "jitter" in name) and isinstance(value, float):
                    setattr(part, name, 0.0)  # OPT's dropout is functional: only the config ends it
        lm, info = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype="float32", attn_implementation=attention, output_loading_info=True)
        assert not info["missing_keys"], f"its weights lack {min(info['missing_keys'])}"
        assert len(tokenizer) <= lm.get_input_embeddings().num_embeddings, "its tokenizer is too large"
        stops = lm.generation_config.eos_token_id
        stops = {*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id} - {None}
        end = end_token(tokenizer, stops)  # first in generation_config.json: servers stop there too
        lm.generation_config.eos_token_id = [end, *sorted(stops - {end})]
    lm.get_input_embeddings().padding_idx = None  # it stops a token's gradient; some models pad with EOS
    return tokenizer, lm.to(device).train()


def make_engine(model, args):
    """DeepSpeed's engine by --deepspeed_config, with AdamW and this run's batch sizes and dtype."""
    import deepspeed
    if args.gradient_checkpointing:
        model.lm.activation_checkpointing_enable({"use_reentrant": False})
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]  # biases and norms: no weight decay
    groups = {"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)
    with or_fail(f"--deepspeed_config {args.deepspeed_config}",
                 "unless memory ran out, take the ds_config.json here"):
        config = json.loads(Path(args.deepspeed_config).read_text())
        assert config["zero_optimization"]["stage"] in (1, 2), "ZeRO's stage must be 1 or 2"
        assert config.get("gradient_clipping", 0) >= 0, "gradient_clipping must be 0 or more"
        config |= {"train_batch_size": args.batch_size, "steps_per_print": 2**31,
                   "train_micro_batch_size_per_gpu": args.micro_batch_size,
                   "bf16": {"enabled": torch.cuda.is_available() and args.dtype == "bf16"}}
        if args.processes == 1 and not torch.cuda.is_available():  # nothing to shard: ZeRO would only copy
            limit = config.get("gradient_clipping") or math.inf
            config |= {"zero_optimization": {"stage": 0}, "gradient_clipping": 0.0}
            def clip(*_):  # DeepSpeed reports this attribute, which it does not set at stage 0
                optimizer._global_grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
            optimizer.register_step_pre_hook(clip)
        return deepspeed.initialize(None, model, optimizer, config=config)[0]


def start_run(engine, args, *splits):
    """The state to start from: step 0, or with --resume that of the last checkpoint, which it loads into the
    engine. Fails if the token ids or rewards of the splits are no longer those that the run began with."""
    sha256 = [split.sha256.hexdigest() for split in splits if split]
    state = {"step": 0, "log_size": 0, "data_sha256": sha256}  # align.py adds its references
    if args.resume:
        with or_fail(f"--resume: cannot load {args.out}/checkpoint",
                     "go on as the run began, or delete the folder"):
            state = engine.load_checkpoint(f"{args.out}/checkpoint")[1]["state"]
            assert state["data_sha256"] == sha256, "the data, their token ids or their rewards have changed"
    if dist.get_rank() == 0:
        os.makedirs(args.out, exist_ok=True)
        if not args.resume:
            with open(f"{args.out}/args.json", "w") as file:
                json.dump(vars(args) | {"data_sha256": sha256}, file, indent=2)
        with open(f"{args.out}/log.jsonl", "a") as file:
            file.truncate(min(state["log_size"], file.tell()))  # later steps are logged again
    return state


def log(args, step, window, prefix="", **figures):
    """Appends a line to <out>/log.jsonl: each metric's mean over the pairs of all processes, and the figures.
    window: metrics of this process's pairs, dicts of (B,). One that is NaN for all of them is left out."""
    means = {}
    for name in window[0]:
        here = torch.cat([metrics[name] for metrics in window]).cpu()
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, here)
        if not here.isnan().all():
            means[prefix + name] = torch.cat(everywhere).mean().item()
    if dist.get_rank() == 0:
        if torch.cuda.is_available() and not prefix:
            figures["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        with open(f"{args.out}/log.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **means, **figures}) + "\n")
        shown = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
        tqdm.write(f"step {step}: " + ", ".join(f"{n} {means[n]:.4g}" for n in means if n.endswith(shown)))


def save_checkpoint(engine, args, state):
    """Writes <out>/checkpoint/step<k>, then `latest`, which names that step, and deletes the steps before."""
    folder, step = f"{args.out}/checkpoint", f"step{state['step']}"
    state["log_size"] = os.path.getsize(f"{args.out}/log.jsonl")
    # DeepSpeed would write `latest` while other processes still write their part of the step
    engine.save_checkpoint(folder, step, client_state={"state": state}, save_latest=False)
    if dist.get_rank() == 0:
        Path(folder, "partial").write_text(step)
        os.replace(f"{folder}/partial", f"{folder}/latest")
        for other in {*Path(folder).glob("step*")} - {Path(folder, step)}:
            shutil.rmtree(other)


def save_model(lm, tokenizer, folder):
    """Writes model and tokenizer, then deletes the checkpoint."""
    if not all(weight.isfinite().all() for weight in lm.parameters()):
        fail(f"{folder}: the weights are not finite and are not saved; lower --learning_rate")
    dist.barrier()  # another process may still read the checkpoint
    if dist.get_rank() == 0:
        for rest in Path(folder).glob(".tmp*"):  # safetensors leaves it where a run is killed
            rest.unlink()
        lm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        Path(folder, "checkpoint/latest").unlink(missing_ok=True)  # first: the rest is then no checkpoint
        shutil.rmtree(f"{folder}/checkpoint", ignore_errors=True)
    print(f"{folder}: model and tokenizer written")


def write_card(args):
    """Writes <out>/README.md, which a model hub shows: the flags, the data's hash, the last metrics."""
    if dist.get_rank() == 0:
        flags = Path(args.out, "args.json").read_text()
        metrics = Path(args.out, "log.jsonl").read_text().splitlines()[-1]
        Path(args.out, "README.md").write_text(
            "---\nlibrary_name: transformers\n---\n\n"
            f"{args.stage} of nanoDRDO trained this model from {args.model} on {args.data}.\n\n"
            f"```json\n{flags}\n```\n\nAt the end of training:\n\n```json\n{metrics}\n```\n")


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


def resume_or_start(parser, args):
    """The flags of the run. With --resume they come from <out>/args.json: those in may_change may be given
    anew, any other, and the number of processes, must be the same. Without --resume the folder of --out must
    hold no checkpoint and no model."""
    may_change = ("out", "resume", "local_rank", "micro_batch_size", "gradient_checkpointing", "log_steps",
                  "eval_steps", "save_steps", "keep_steps")
    unfinished = os.path.exists(f"{args.out}/checkpoint/latest")
    if args.resume and not unfinished:
        fail(f"--resume: {args.out} holds no checkpoint: its run ended, or saved none; name another --out")
    if not args.resume and (unfinished or os.path.exists(f"{args.out}/config.json")):
        what = "a checkpoint; go on with --resume, or name" if unfinished else "a model; name"
        fail(f"--out: {args.out} holds {what} another folder")
    before = json.loads(Path(args.out, "args.json").read_text()) if args.resume else {}
    parser.set_defaults(**before)
    now = vars(parser.parse_args()) | {"out": args.out, "stage": parser.prog}
    now["processes"] = int(os.environ.get("WORLD_SIZE", 1))
    for name in before.keys() - may_change:
        if now[name] != before[name]:
            fail(f"--resume: {name} was {before[name]} and is now {now[name]}; go on as the run began")
    return argparse.Namespace(**now)


# ---- flags -------------------------------------------------------------------------------------------------

def parse_args():
    formatters = argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=type("Help", formatters, {}))
    flag = parser.add_argument_group("data and model").add_argument
    flag("--model", help="the base LM: a folder or a hub name")
    flag("--data", default="data/all/train.jsonl", help="JSONL to train on: prompt, chosen")
    flag("--eval_data", default="data/all/validation.jsonl", help="the same, held out; '' for none")
    flag("--out", default="out/sft", help="folder to write")
    flag("--max_length", type=int, default=1024, help="drop rows whose prompt + response has more tokens")
    flag = parser.add_argument_group("optimisation").add_argument
    flag("--batch_size", type=int, default=64, help="rows per optimizer step, over all processes")
    flag("--micro_batch_size", type=int, help="rows per forward pass, on one process; None: at most 8")
    flag("--learning_rate", type=float, default=1e-5, help="peak, after warm-up; then cosine to 0")
    flag("--weight_decay", type=float, default=0.05, help="AdamW's, on matrices only")
    flag("--warmup_steps", type=int, help="linear warm-up; None: a tenth of the run, at most 100")
    flag("--max_steps", type=int, help="optimizer steps; None: what --epochs takes")
    flag("--epochs", type=float, default=1.0, help="passes over the data, without --max_steps")
    flag("--gradient_checkpointing", action="store_true", help="recompute activations: slower, smaller")
    flag("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 where it is fast")
    flag("--deepspeed_config", default="ds_config.json", help="ZeRO (not on one CPU process), clipping")
    flag = parser.add_argument_group("logging and checkpoints").add_argument
    flag("--log_steps", type=int, default=5, help="steps between lines in log.jsonl")
    flag("--eval_rows", type=int, default=1000, help="evaluate on the first rows of --eval_data; 0: on all")
    flag("--eval_steps", type=int, default=100, help="steps between evaluations, besides those at both ends")
    flag("--save_steps", type=int, default=500, help="steps between checkpoints for --resume; 0: none")
    flag("--resume", action="store_true", help="go on from <out>/checkpoint, with its run's flags and as "
         "many processes")
    flag("--seed", type=int, default=0, help="order of the data")
    flag("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    args = resume_or_start(parser, parser.parse_args())
    check_flags(args, "weight_decay warmup_steps eval_rows save_steps")
    if not args.model:
        fail("--model: name the base LM, a folder or a hub name")
    return args


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a file that is missing, a full disk, no permission
        fail(error)
    except torch.OutOfMemoryError as error:
        fail(f"{str(error).split('. ')[0]}; lower --micro_batch_size")
    dist.destroy_process_group()
