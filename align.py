"""Aligns an SFT policy to preferences, offline: DRDO (arXiv 2410.08458), DPO, e-DPO or IPO.

In:   out/sft, data/all/train.jsonl (prompt, chosen, rejected); for drdo and edpo the Oracle's rewards.pt
Out:  out/<loss>/: model, tokenizer, score.safetensors (DRDO's reward head), args.json, log.jsonl; checkpoint/
      while it runs; with --keep_steps the policies on the way, step<k>/

    deepspeed align.py --loss drdo --oracle_rewards rewards.pt           # --resume: from the last checkpoint
    deepspeed --num_gpus 2 align.py --loss dpo --beta 0.1 --gradient_checkpointing
    deepspeed align.py --loss edpo --oracle_rewards ensemble.pt          # rewards of K reward models

The way of one pair: Rows (encode_prompt, encode_response) -> PairModel (collate, pair_mask; of losses.py
response_logps, last_token_rewards) -> loss_and_metrics (calls losses.py) -> engine.backward and step.

Only the policy is in memory: precompute_rewards.py has computed the Oracle's rewards. The reference of DPO,
e-DPO and IPO is the policy before its first step: its log-probs are taken once. DRDO needs one for
--student_rewards log_ratio alone.

Where this departs from the paper: AdamW is torch's (theirs is partly paged). A step takes 64 pairs, as their
text says (their Table 6 makes 96). Prompts are not cut at 512 tokens; pairs over --max_length are dropped.
Biases and norms are not decayed. Dropout is off. tests/PAPER.md lists every choice that the paper leaves.
"""
import argparse
import copyreg
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from glob import glob
from itertools import islice

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.config import ZeroStageEnum
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging

from losses import (contrastive_loss, distillation_loss, dpo_loss, edpo_loss, ipo_loss, last_token_rewards,
                    response_logps)


def parse_args():
    formatters = argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", formatters, {}))
    flag = parser.add_argument_group("method").add_argument
    flag("--loss", required=True, choices=["drdo", "dpo", "edpo", "ipo"],
         help="drdo: Eq. 6 of the paper; dpo: Eq. 3; edpo: Eq. 4; ipo is not in it")
    flag("--oracle_rewards", help="drdo, edpo: rewards.pt of --data. drdo takes the mean of its Oracles")
    flag("--eval_oracle_rewards", help="rewards.pt of --eval_data; without it drdo and edpo log no eval_loss")
    flag("--alpha", type=float, default=0.1, help="drdo: weight of the contrastive log-unlikelihood")
    flag("--gamma", type=float, default=2.0, help="drdo: focal exponent of (1 - p_w)")
    flag("--beta", type=float, default=0.1, help="dpo, edpo, ipo; drdo with logps or log_ratio")
    flag("--ensemble", choices=["mean", "min"], default="mean",
         help="edpo: distil the mean of the reward models, or for each pair the nearest one")
    flag = parser.add_argument_group("readings of Eq. 6, controls").add_argument
    flag("--student_rewards", choices=["head", "logps", "log_ratio"], default="head",
         help="drdo: r^ by a linear head at EOS, beta * log pi(y|x), or beta * (log pi - log pi at start)")
    flag("--p_w", choices=["sum", "mean"], default="sum", help="drdo: p_w of summed or of mean log-probs")
    flag("--detach_focal", action="store_true", help="drdo: no gradient through (1 - p_w)^gamma (A.5)")
    flag("--unit_oracle", action="store_true", help="drdo, edpo: scale Oracle differences to std 1")
    flag("--nll_coef", type=float, default=0.0, help="any loss: weight of an added -log pi(y_w|x), summed")
    flag = parser.add_argument_group("data and model").add_argument
    flag("--model", default="out/sft", help="the SFT policy: a folder or a hub name")
    flag("--data", default="data/all/train.jsonl", help="preference JSONL to train on")
    flag("--eval_data", default="data/all/validation.jsonl", help="held-out preference JSONL; '' for none")
    flag("--out", help="folder to write; None: out/<loss>")
    flag("--max_length", type=int, default=1024, help="drop pairs whose prompt + longer response is longer")
    flag = parser.add_argument_group("optimisation").add_argument
    flag("--batch_size", type=int, default=64, help="pairs per optimizer step, over all processes")
    flag("--micro_batch_size", type=int, help="pairs per forward pass, on one process; None: at most 8")
    flag("--learning_rate", type=float, default=5e-6, help="peak, after warm-up; then cosine to 0")
    flag("--weight_decay", type=float, default=0.05, help="AdamW's, on matrices only")
    flag("--warmup_steps", type=int, help="linear warm-up; None: a tenth of the run, at most 100")
    flag("--max_steps", type=int, help="optimizer steps; None: 1000, or what --epochs takes")
    flag("--epochs", type=float, help="passes over the data, in place of --max_steps")
    flag("--gradient_checkpointing", action="store_true", help="recompute activations: slower, smaller")
    flag("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 where it is fast")
    flag("--deepspeed_config", default="ds_config.json", help="ZeRO stage, offloading, gradient clipping")
    flag = parser.add_argument_group("logging and checkpoints").add_argument
    flag("--log_steps", type=int, default=5, help="steps between lines in log.jsonl")
    flag("--eval_rows", type=int, default=1000, help="evaluate on the first rows of --eval_data; 0: on all")
    flag("--eval_steps", type=int, default=100, help="steps between evaluations; the last step has one")
    flag("--save_steps", type=int, default=500, help="steps between checkpoints for --resume; 0: none")
    flag("--keep_steps", type=int, default=0, help="steps between policies kept in <out>/step<k>; 0: none")
    flag("--resume", action="store_true", help="go on from <out>/checkpoint; repeat its run's flags")
    flag("--seed", type=int, default=0, help="order of the data and initialisation of the head")
    flag("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    args = parser.parse_args()
    check_flags(args, "alpha gamma nll_coef weight_decay warmup_steps eval_rows save_steps keep_steps")
    if args.loss in ("drdo", "edpo") and not args.oracle_rewards:
        fail(f"--loss {args.loss} distils rewards: give --oracle_rewards, a file by precompute_rewards.py")
    args.out = args.out or f"out/{args.loss}"
    args.max_steps = args.max_steps or (None if args.epochs else 1000)
    return args


def main():
    args = parse_args()
    device, rank, world_size = init_process(args)

    # ---- model and data
    tokenizer, lm = load_model(args.model)
    args.max_length = min(args.max_length, getattr(lm.config, "max_position_embeddings", None) or math.inf)
    pairs, oracle = load_split(args.data, args.oracle_rewards, tokenizer, args)
    eval_pairs, eval_oracle = load_split(args.eval_data, args.eval_oracle_rewards, tokenizer, args,
                                         args.eval_rows)
    if args.unit_oracle and args.loss in ("drdo", "edpo"):
        std = (oracle[..., 0] - oracle[..., 1]).mean(0).std()
        if not std > 0:  # or NaN
            fail(f"--unit_oracle: the differences in {args.oracle_rewards} have no spread; omit it")
        oracle, eval_oracle = oracle / std, eval_oracle / std
    row_tokens, response_tokens = pairs.lengths.sum(1), torch.tensor(pairs.lengths[:, 1:])  # (N,), (N, 2)
    steps = plan_steps(row_tokens, args)  # (max_steps, batch_size): the rows of each step, over all processes

    # ---- reward head, optimizer, engine
    width, score = lm.get_output_embeddings().weight.shape[1], None  # H; OPT projects hidden states to it
    if args.loss == "drdo" and args.student_rewards == "head":
        torch.manual_seed(args.seed + 2**31)  # not the seed of oracle.py's head: the two start apart
        score = torch.nn.Linear(width, 1, bias=False)
        torch.nn.init.normal_(score.weight, std=(width + 1) ** -0.5)  # Stiennon et al. 2020, arXiv 2009.01325
    if args.gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = PairModel(lm, score, bf16=args.dtype == "bf16")
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]  # biases and norms
    groups = {"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)
    warmup, decay = args.warmup_steps, max(1, args.max_steps - args.warmup_steps)  # then a cosine to 0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (
        (step + 1) / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / decay)))
    engine = make_engine(model, optimizer, schedule, args)
    with or_fail(f"--model {args.model}", "unless memory ran out, take another model type"):
        check_layout(lm, pairs, args)
    state = start_run(engine, args)  # --resume: loads the last checkpoint into the engine

    # ---- the reference: log pi(y|x) of the policy before its first step, (N, 2); NaN for losses without one
    if not args.resume:
        reference, eval_reference = (torch.full((len(split), 2), math.nan) for split in (pairs, eval_pairs))
        if args.loss != "drdo" or args.student_rewards == "log_ratio":
            reference, _ = score_all(model, pairs, args, "reference", np.unique(steps))  # the run's pairs
            eval_reference, _ = score_all(model, eval_pairs, args, "reference")
        state |= {"reference": reference, "eval_reference": eval_reference}
    reference, eval_reference = state["reference"], state["eval_reference"]

    # ---- training
    window, tokens, start, done = [], 0, time.time(), state["step"]
    bar = tqdm(steps[done:], f"align {args.loss}", initial=done, total=args.max_steps, disable=rank > 0)
    for step, rows in enumerate(bar, done + 1):
        learning_rate = optimizer.param_groups[0]["lr"]
        for micro in rows.reshape(-1, world_size, args.micro_batch_size)[:, rank]:  # this process's share
            logps, rewards = engine([pairs[i] for i in micro])
            inputs = reference[micro], oracle[:, micro], response_tokens[micro]
            loss, metrics = loss_and_metrics(args, logps, rewards, *(x.to(device) for x in inputs))
            engine.backward(loss.mean())
            engine.step()  # the weights move after the step's last micro-batch
            window.append(metrics)
        tokens += row_tokens[rows].sum()
        grad_norm = float(engine.get_global_grad_norm())  # before clipping
        if engine.skipped_steps or not 0 <= grad_norm < math.inf:  # DeepSpeed's -1 stands for NaN
            fail(f"step {step}: the loss or its gradient is not finite; lower --learning_rate, or look at "
                 f"{args.data}, lines {sorted(pairs.lines[rows].tolist())}")

        evaluates = eval_pairs and (step % args.eval_steps == 0 or step == args.max_steps)
        saves = args.save_steps and step % args.save_steps == 0
        if evaluates or saves or step in (1, args.max_steps) or step % args.log_steps == 0:
            log(args, step, window, epoch=step * args.batch_size / len(pairs), learning_rate=learning_rate,
                grad_norm=grad_norm, tokens_per_second=tokens / (time.time() - start))
            if evaluates:
                logps, rewards = score_all(model, eval_pairs, args, "evaluating")
                _, metrics = loss_and_metrics(args, logps, rewards, eval_reference, eval_oracle,
                                              torch.tensor(eval_pairs.lengths[:, 1:]))
                log(args, step, [metrics], prefix="eval_")
            if saves:
                save_checkpoint(engine, args, state | {"step": step})
            window, tokens, start = [], 0, time.time()
        if args.keep_steps and step % args.keep_steps == 0:
            save_model(model, tokenizer, f"{args.out}/step{step}")
    dist.barrier()  # with no steps left after --resume another process may still read the checkpoint
    save_model(model, tokenizer, args.out)
    dist.destroy_process_group()


# ---- the loss ----------------------------------------------------------------------------------------------

def loss_and_metrics(args, logps, rewards, reference, oracle, response_tokens):
    """The loss of each pair, (B,), and what is logged of each pair, a dict of (B,). w is chosen, l rejected.

    To add a loss: write it in losses.py, import it, name it in --loss and give it a branch here. One that
    reads the Oracle joins ("drdo", "edpo") in parse_args, main and load_split. One without a reference, or
    with a reward head, joins DRDO's conditions in main, and sets student_w and student_l here.

    logps: log pi(y|x) of (w, l), (B, 2), summed over tokens. rewards: of the student's head, (B, 2), or NaN.
    reference: the reference's log pi(y|x), (B, 2). oracle: the Oracles' rewards, (K, B, 2).
    response_tokens: (B, 2), EOS included.
    """
    logps_w, logps_l = logps.unbind(1)  # (B,)
    ref_w, ref_l = reference.unbind(1)
    oracle_w, oracle_l = oracle.unbind(2)  # (K, B)
    # implicit rewards: of dpo, edpo, ipo, and of drdo with log_ratio; its other readings replace them
    student_w, student_l = args.beta * (logps_w - ref_w), args.beta * (logps_l - ref_l)
    metrics = {}
    if args.loss == "dpo":
        loss = dpo_loss(logps_w, logps_l, ref_w, ref_l, args.beta)
    elif args.loss == "ipo":
        loss = ipo_loss(logps_w, logps_l, ref_w, ref_l, args.beta)
    elif args.loss == "edpo":
        loss = edpo_loss(logps_w, logps_l, ref_w, ref_l, oracle_w, oracle_l, args.beta, args.ensemble)
        metrics["oracle/margins"] = (oracle_w - oracle_l).mean(0)
    elif args.loss == "drdo":  # as losses.drdo_loss; in two terms, which are both logged
        oracle_w, oracle_l = oracle_w.mean(0), oracle_l.mean(0)
        if args.student_rewards == "head":
            student_w, student_l = rewards.unbind(1)
        elif args.student_rewards == "logps":
            student_w, student_l = args.beta * logps_w, args.beta * logps_l
        z_w, z_l = (logps if args.p_w == "sum" else logps / response_tokens).unbind(1)
        # p_w = sigma(logits). Of summed log-probs it is near 0 or 1 in most pairs: see contrastive_loss
        logits = (z_w - z_l).detach() if args.detach_focal else z_w - z_l
        distillation = distillation_loss(student_w, student_l, oracle_w, oracle_l)
        contrastive = args.alpha * contrastive_loss(logps_w, logps_l, args.gamma, logits)
        loss = distillation + contrastive
        metrics = {"loss/distillation": distillation, "loss/contrastive": contrastive,
                   "p_w": logits.sigmoid(), "oracle/margins": oracle_w - oracle_l}
    loss = loss - args.nll_coef * logps_w

    metrics |= {"loss": loss, "rewards/chosen": student_w, "rewards/rejected": student_l,
                "rewards/accuracies": (student_w > student_l).float(),
                "rewards/margins": student_w - student_l, "logps/chosen": logps_w, "logps/rejected": logps_l,
                "response_length": response_tokens.float().mean(1)}
    return loss, {name: value.detach() for name, value in metrics.items()}


# ---- the model: a pair in one row --------------------------------------------------------------------------

class PairModel(torch.nn.Module):
    """A causal LM, with a reward head or without, that scores both responses of a pair in one row. In bf16 on
    a CPU autocast is entered anew in each forward pass: it caches the bf16 weights until it is left."""

    def __init__(self, lm, score=None, bf16=False):
        super().__init__()
        self.lm, self.score, self.bf16 = lm, score, bf16

    def forward(self, pairs):
        """(logps, rewards) of B pairs, lists of token ids [prompt, chosen, rejected]: (B, 2) each, chosen
        first. Without a head rewards are NaN."""
        input_ids, position_ids, segments, eos = collate(pairs, self.lm.device)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16 and self.lm.device.type == "cpu"):
            hidden = self.lm.base_model(
                input_ids=input_ids, position_ids=position_ids, attention_mask=pair_mask(segments),
                use_cache=False).last_hidden_state  # (B, T, H)
            logps = response_logps(hidden, self.lm.get_output_embeddings(), input_ids, segments)
        rewards = last_token_rewards(hidden, self.score.weight, eos) if self.score else logps * math.nan
        return logps, rewards


def collate(pairs, device):
    """A batch of rows [prompt less its last token | last + chosen | last + rejected], padded right by zeros.

    `last` is a copy of the prompt's last token before each response, at its position in the prompt. It
    predicts the response's first token. Each later token is predicted by its left neighbour. The rejected
    response sees the prompt, but not the chosen one.
    Returns integer tensors: input_ids, position_ids, segments (0 prompt, 1 chosen, 2 rejected, -1 padding),
    (B, T) each; and the positions of both EOS, where rewards are read, (B, 2).
    """
    width = 1 + max(sum(map(len, pair)) for pair in pairs)
    shape = len(pairs), width + -width % (8 if device.type == "cuda" else 1)  # GPUs like multiples of 8
    input_ids, segments = np.zeros(shape, int), np.full(shape, -1)
    position_ids, eos = np.zeros(shape, int), np.zeros((len(pairs), 2), int)
    for i, (prompt, chosen, rejected) in enumerate(pairs):
        p, c, r = len(prompt) - 1, len(chosen) + 1, len(rejected) + 1  # + 1: the copy of `last`
        input_ids[i, :p + c + r] = np.concatenate([prompt, chosen, prompt[-1:], rejected])
        position_ids[i, :p + c + r] = np.concatenate([np.arange(p + c), np.arange(p, p + r)])
        segments[i, :p + c + r] = np.repeat([0, 1, 2], [p, c, r])
        eos[i] = p + c - 1, p + c + r - 1
    return [torch.as_tensor(x, device=device) for x in (input_ids, position_ids, segments, eos)]


def pair_mask(segments):
    """Attention mask (B, 1, T, T), True where the query (row) sees the key (column). Causal. A response sees
    the prompt and itself, padding sees padding: a row that sees nothing gives NaN."""
    query, key = segments[:, :, None], segments[:, None, :]
    return ((key == 0) | (key == query)).tril()[:, None]


@torch.no_grad()
def check_layout(lm, pairs, args):
    """Fails where a response's log-prob in a pair's row is not that of the model's own forward. Such a model
    ignores 4D masks, scales its logits, or slides a window shorter than prompt + response."""
    prompt, *responses = pair = pairs[(pairs.lengths[:, 0] + pairs.lengths[:, 1:].max(1)).argmax()]  # longest
    for response, logp in zip(responses, PairModel(lm)([pair])[0][0]):
        ids = torch.as_tensor(np.concatenate([prompt, response]), dtype=torch.long, device=logp.device)
        logits = lm(ids[None]).logits[0, len(prompt) - 1:-1]  # (R, V)
        own = logits.double().log_softmax(-1).gather(-1, ids[len(prompt):, None]).sum()
        # bf16 keeps 8 bits. Its errors are random, so their sum grows as the root of the number of tokens
        tolerance = 0.001 * len(response) if lm.dtype.itemsize >= 4 else 0.5 + 0.5 * len(response) ** 0.5
        if not abs(own - logp) <= tolerance:  # NaN too
            fail(f"--model {args.model}: log pi(y|x) of a response is {own:.2f} by the model's own forward "
                 f"and {logp:.2f} in the row of a pair; take another model type, or a smaller --max_length")


@torch.no_grad()
def score_all(model, pairs, args, description, rows=None):
    """(logps, rewards) of the pairs, (N, 2) each, on the CPU. If `rows` is given, only those are scored, and
    the others stay 0. The pairs are sorted by length and shared out among the processes."""
    scores = torch.zeros(2, len(pairs), 2, device=model.lm.device)
    order = sorted(range(len(pairs)) if rows is None else rows, key=lambda i: -pairs.lengths[i].sum())
    micro_batches = [order[i:i + args.micro_batch_size] for i in range(0, len(order), args.micro_batch_size)]
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for micro in tqdm(micro_batches[rank::world_size], description, disable=rank > 0, leave=False):
        scores[:, micro] = torch.stack(model([pairs[i] for i in micro]))
    dist.all_reduce(scores)
    return scores.cpu()


# ---- data and files: from Rows on the stages share all but save_model (tests/test_copies.py) ---------------

def load_split(path, rewards_path, tokenizer, args, limit=0):
    """The pairs of a preference file (of its first `limit` rows; 0: of all), and their Oracle rewards,
    (K, N, 2), or NaN where the loss reads none. Drops pairs over --max_length; for drdo and edpo also pairs
    that were too long for an Oracle: NaN in rewards.pt. Without a path there are none."""
    if not path:
        return [], torch.empty(1, 0, 2)
    pairs = Rows(path, ["chosen", "rejected"], tokenizer, args.max_length, limit)
    if not rewards_path or args.loss not in ("drdo", "edpo"):
        return pairs, torch.full((1, len(pairs), 2), math.nan)
    with or_fail(rewards_path, f"run precompute_rewards.py --data {path} --out {rewards_path}"):
        saved = torch.load(rewards_path, weights_only=True)
        sha256 = hashlib.file_digest(open(path, "rb"), "sha256")
        assert saved["data_sha256"] == sha256.hexdigest(), f"by its sha256 it does not score {path}"
        oracle = torch.stack([saved["chosen"], saved["rejected"]], dim=-1).float()[:, pairs.lines - 1]
        scored = oracle.isfinite().all(2).all(0).numpy()  # (N,)
        assert len(oracle) and scored.any(), "no pair has finite rewards of both responses"
        teachers = vars(args).setdefault("oracles", saved.get("oracles"))  # for args.json
        assert saved.get("oracles") == teachers, f"not scored by {teachers}, which scored --data"
    if dist.get_rank() == 0 and not scored.all():
        print(f"{path}: {np.sum(~scored)} pairs dropped: without finite rewards, as too long for an Oracle")
    pairs.lines, pairs.lengths, pairs.ends = pairs.lines[scored], pairs.lengths[scored], pairs.ends[scored]
    return pairs, oracle[:, scored]


class Rows:
    """Token ids of a JSONL file's rows that fit in max_length. They lie in a temporary file, so that memory
    does not grow. rows[i] is a list of int32 arrays: the prompt, and the responses under `keys`.
    lines: (N,), line numbers in the file. lengths: (N, 1 + responses), tokens of each, EOS included."""

    def __init__(self, path, keys, tokenizer, max_length, limit=0):
        number, lines, lengths, ids = 0, [], [], tempfile.TemporaryFile()
        with or_fail(path, "name a UTF-8 JSONL file"), open(path, encoding="utf-8-sig") as file:
            bar = tqdm(islice(file, limit or None), "tokenising", unit=" rows", disable=dist.get_rank() > 0)
            for number, line in enumerate(bar, 1):
                with or_fail(f"{path}, line {number}", f"write an object with prompt, {', '.join(keys)}"):
                    row = json.loads(line)
                    texts = [encode_prompt(tokenizer, row["prompt"])]
                    assert texts[0], "the prompt has no token"
                    texts += [encode_response(tokenizer, row[key]) for key in keys]
                if len(texts[0]) + max(map(len, texts[1:])) <= max_length:
                    ids.write(np.array(sum(texts, []), np.int32))
                    lines.append(number)
                    lengths.append([len(text) for text in texts])
        if not lines:
            fail(f"{path}: none of {number} rows fits in --max_length {max_length} or the model's positions")
        if dist.get_rank() == 0:
            print(f"{path}: {len(lines)} rows, {number - len(lines)} over --max_length {max_length} dropped")
        ids.flush()
        self.ids, self.lines, self.lengths = np.memmap(ids, np.int32, "r"), np.array(lines), np.array(lengths)
        self.ends = self.lengths.sum(1).cumsum()

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, i):
        row = np.array(self.ids[self.ends[i] - self.lengths[i].sum():self.ends[i]])
        return np.split(row, self.lengths[i].cumsum()[:-1])


def plan_steps(row_tokens, args):
    """The rows of each optimizer step, (max_steps, batch_size), by the seed alone: neither processes nor
    --resume change them. Within a step the longest come first, so that a micro-batch holds little padding.
    Sets the defaults of --micro_batch_size, --max_steps and --warmup_steps."""
    num_rows, world_size, size = len(row_tokens), dist.get_world_size(), args.batch_size
    fitting = [n for n in range(1, 9) if size % (n * world_size) == 0]
    args.micro_batch_size = args.micro_batch_size or max(fitting, default=1)
    if args.max_steps and args.epochs:
        fail("--max_steps and --epochs both say how long to train; give one of them")
    if size % (args.micro_batch_size * world_size):
        fail(f"--batch_size {size} is no multiple of --micro_batch_size {args.micro_batch_size} x "
             f"{world_size} processes; change one of them")
    if num_rows < size:
        fail(f"{args.data}: {num_rows} rows are fewer than --batch_size {size}; lower it")
    per_epoch = num_rows // size  # steps
    args.max_steps = args.max_steps or max(1, int(args.epochs * num_rows / size))
    args.warmup_steps = min(100, args.max_steps // 10) if args.warmup_steps is None else args.warmup_steps
    if dist.get_rank() == 0:
        epochs = args.max_steps * size / num_rows
        print(f"{args.max_steps} steps of {size}: {epochs:.2f} epochs, {args.warmup_steps} of warm-up"
              + "\nwarning: a run of over 10 epochs memorises its data; lower --max_steps" * (epochs > 10))
    orders = [np.random.default_rng((args.seed, epoch)).permutation(num_rows)[:per_epoch * size]
              for epoch in range(math.ceil(args.max_steps / per_epoch))]
    steps = np.concatenate(orders).reshape(-1, size)[:args.max_steps]
    return np.stack([rows[np.argsort(-row_tokens[rows], kind="stable")] for rows in steps])


def make_engine(model, optimizer, schedule, args):
    """DeepSpeed's engine by --deepspeed_config, with this run's batch sizes and dtype. One CPU process runs
    without ZeRO: it has nothing to share out, and ZeRO would copy weights and gradients."""
    mend = "unless memory ran out, take the ds_config.json here"
    with or_fail("--deepspeed_config", mend), open(args.deepspeed_config) as file:
        config = json.load(file)
        stage, clipping = config["zero_optimization"]["stage"], float(config.get("gradient_clipping", 0))
        assert stage in (0, 1, 2) and clipping >= 0, "take ZeRO stage 0, 1 or 2, and clipping of 0 or more"
        on_gpu = torch.cuda.is_available()
        bf16 = on_gpu and args.dtype == "bf16"
        config |= {"train_batch_size": args.batch_size, "steps_per_print": 2**31, "bf16": {"enabled": bf16},
                   "train_micro_batch_size_per_gpu": args.micro_batch_size}
        if (stage == 0 and not bf16) or (not on_gpu and dist.get_world_size() == 1):
            config |= {"zero_optimization": {"stage": 0}, "gradient_clipping": 0.0}
            weights = [p for group in optimizer.param_groups for p in group["params"]]

            def clip(*_):  # without ZeRO DeepSpeed clips too, but forgets the norm
                optimizer._global_grad_norm = torch.nn.utils.clip_grad_norm_(weights, clipping or math.inf)
            optimizer.register_step_pre_hook(clip)
        return deepspeed.initialize(None, model, optimizer, lr_scheduler=schedule, config=config)[0]


def start_run(engine, args):
    """The state to start from: flags and files of the run, its step, its log's length. --resume loads the
    last checkpoint, and fails if a file, the number of processes or a flag not in `may_change` differs.
    Without it a folder that holds a checkpoint is an error, and a finished run is replaced."""
    may_change = ("resume", "local_rank", "out", "micro_batch_size", "gradient_checkpointing", "log_steps",
                  "eval_steps", "save_steps", "keep_steps")
    run = vars(args) | {"processes": dist.get_world_size()}
    for path in filter(os.path.isfile, map(str, vars(args).values())):
        run[f"sha256 of {path}"] = hashlib.file_digest(open(path, "rb"), "sha256").hexdigest()
    state, folder = {"run": run, "step": 0, "log_size": 0}, f"{args.out}/checkpoint"
    if os.path.exists(f"{folder}/state.pt") != args.resume:
        fail(f"--resume: {folder} holds no checkpoint; start without --resume" if args.resume else
             f"--out: {folder} is of an unfinished run; go on with --resume, or delete it")
    if args.resume:
        with or_fail(f"--resume: {folder}", "unless memory ran out, delete it and start anew"):
            state = torch.load(f"{folder}/state.pt", weights_only=True)
            for name, value in run.items():
                before = state["run"].get(name)
                if name not in may_change and value != before:
                    fail(f"--resume: {name} was {before} and is now {value}; go on as the run began")
            step = f"step{state['step']}"
            for path in glob(f"{step}/*.pt", root_dir=folder):  # DeepSpeed would run any code in them
                names = torch.serialization.get_unsafe_globals_in_checkpoint(f"{folder}/{path}")
                own = "ZeroStageEnum", "LossScaler", "DynamicLossScaler", "fragment_address"
                assert all(name.split(".")[-1] in own for name in names), f"{path} holds {names}"
            engine.load_checkpoint(folder, step)
    if dist.get_rank() == 0:
        os.makedirs(args.out, exist_ok=True)
        with open(f"{args.out}/partial.json", "w") as file:
            json.dump(run, file, indent=2)
        os.replace(f"{args.out}/partial.json", f"{args.out}/args.json")
        with open(f"{args.out}/log.jsonl", "a") as file:
            file.truncate(min(state["log_size"], file.tell()))
        print(f"{args.out}: from step {state['step']}")
    return state


def log(args, step, window, prefix="", **figures):
    """Appends a line to <out>/log.jsonl: each metric's mean over the pairs of all processes, and the figures.
    window: metrics of this process's pairs, dicts of (B,). One that is NaN for every pair is left out."""
    here = {prefix + name: torch.cat([metrics[name] for metrics in window]).cpu() for name in window[0]}
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    means = {name: torch.cat([part[name] for part in everywhere]).mean().item() for name in here
             if not here[name].isnan().all()}
    if dist.get_rank() == 0:
        if torch.cuda.is_available() and not prefix:
            figures["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        with open(f"{args.out}/log.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **means, **figures}) + "\n")
        shown = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
        tqdm.write(f"step {step}: " + ", ".join(f"{n} {means[n]:.4g}" for n in means if n.endswith(shown)))


def save_checkpoint(engine, args, state):
    """Writes <out>/checkpoint/step<k>, then state.pt, which names that step, and deletes the steps before."""
    folder, step = f"{args.out}/checkpoint", f"step{state['step']}"
    # Python 3.11.2 would pickle DeepSpeed's enum by getattr, and --resume refuses that as code
    copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))
    with or_fail(f"{folder}/{step}", "make room, then go on with --resume, or start again"):
        engine.save_checkpoint(folder, step, save_latest=False)
        if dist.get_rank() == 0:
            state["log_size"] = os.path.getsize(f"{args.out}/log.jsonl")
            torch.save(state, f"{folder}/partial")
            os.replace(f"{folder}/partial", f"{folder}/state.pt")
            for before in set(glob("step*", root_dir=folder)) - {step}:
                shutil.rmtree(f"{folder}/{before}")


def save_model(model, tokenizer, folder):
    """Writes model and tokenizer, each file whole or not at all, and deletes the checkpoint. The head is put
    beside the model: programs that serve causal LMs refuse a model with a tensor too many."""
    if not all(weight.isfinite().all() for weight in model.parameters()):
        fail(f"{folder}: the weights are not finite and are not saved; lower --learning_rate")
    if dist.get_rank() == 0:
        partial = f"{folder}/partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        with or_fail(partial, "make room, then go on with --resume, or start again"):
            model.lm.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            if model.score:
                save_file({"score.weight": model.score.weight.data}, f"{partial}/score.safetensors")
        stale = glob("*.safetensors*", root_dir=folder) + glob("*.jinja", root_dir=folder)  # an older run's
        for name in set(stale) - set(os.listdir(partial)):
            os.remove(f"{folder}/{name}")
        shutil.rmtree(f"{folder}/additional_chat_templates", ignore_errors=True)
        for name in os.listdir(partial):
            os.replace(f"{partial}/{name}", f"{folder}/{name}")
        os.rmdir(partial)
        if os.path.exists(f"{folder}/checkpoint/state.pt"):  # first: without it the rest is no checkpoint
            os.remove(f"{folder}/checkpoint/state.pt")
        shutil.rmtree(f"{folder}/checkpoint", ignore_errors=True)
        print(f"{folder}: model and tokenizer written")


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


def load_model(folder):
    """The folder's tokenizer and causal LM: fp32 (DeepSpeed casts it), SDPA attention, no dropout."""
    with or_fail(f"--model {folder}", "give the folder or the hub name of a whole causal LM"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.eos_token_id is not None, "its tokenizer has no EOS token"
        config = AutoConfig.from_pretrained(folder)
        dropouts = [name for name, p in config.to_dict().items() if "drop" in name and isinstance(p, float)]
        config.update(dict.fromkeys(dropouts, 0.0))  # OPT's is functional: only the config ends it
        lm, info = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32,
                                                        attn_implementation="sdpa", output_loading_info=True)
        assert not info["missing_keys"], f"its weights lack {min(info['missing_keys'])}"
        assert len(tokenizer) <= lm.get_input_embeddings().num_embeddings, "its tokenizer has more tokens"
    lm.get_input_embeddings().padding_idx = None  # it stops a token's gradient; some models pad with EOS
    return tokenizer, lm.train()


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
