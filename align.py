"""Aligns an SFT policy to preferences, offline: DRDO (arXiv 2410.08458), DPO, e-DPO or IPO.

In:   out/sft, data/all/train.jsonl (prompt, chosen, rejected) and, for drdo and edpo, the Oracle's rewards.pt
Out:  out/<loss>/: model and tokenizer (DRDO's reward head inside, as score.weight), args.json, log.jsonl, checkpoint/

    deepspeed align.py --loss drdo --oracle_rewards rewards.pt
    deepspeed align.py --loss dpo --beta 0.1
    deepspeed align.py --loss edpo --oracle_rewards ensemble.pt          # rewards of K reward models
    deepspeed --num_gpus 2 align.py --loss drdo --oracle_rewards rewards.pt --micro_batch_size 4 --gradient_checkpointing
    deepspeed align.py --loss drdo --oracle_rewards rewards.pt --resume  # from the last checkpoint

One model is in memory. The Oracle's rewards were computed before (precompute_rewards.py); DRDO has no reference model;
that of DPO, e-DPO and IPO is the policy before its first step: its log-probs are taken once, kept in <out>/reference.pt.

One row holds a pair, [prompt | chosen | rejected]: the prompt is computed once, and a mask lets each response see the
prompt and itself. At start-up one pair is scored by the model's own forward too, and must agree.

Where this departs from the paper: AdamW is torch's (theirs is partly paged), an optimizer step is 64 pairs (their
text; their Table 6 would make 96), biases and norms are not decayed, dropout is off. README.md, "Where the paper
leaves a choice", has the rest.
"""
import argparse
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import resource
import shutil
import sys
import time
from importlib.metadata import version

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from losses import (contrastive_loss, distillation_loss, dpo_loss, drdo_loss, edpo_loss, ipo_loss, last_token_rewards,
                    response_logps)


def parse_args():
    formatters = argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", formatters, {}))
    group = parser.add_argument_group("method")
    group.add_argument("--loss", required=True, choices=["drdo", "dpo", "edpo", "ipo"],
                       help="Eq. 6, Eq. 3, Eq. 4, or IPO (Azar et al. 2023, arXiv 2310.12036)")
    group.add_argument("--oracle_rewards", help="rewards.pt of --data by precompute_rewards.py, for drdo (of K Oracles "
                       "their mean) and edpo")
    group.add_argument("--eval_oracle_rewards", help="the same of --eval_data; without it drdo and edpo evaluate no loss")
    group.add_argument("--alpha", type=float, default=0.1, help="drdo: weight of the contrastive log-unlikelihood")
    group.add_argument("--gamma", type=float, default=2.0, help="drdo: focal exponent of (1 - p_w)")
    group.add_argument("--beta", type=float, default=0.1, help="scale of the log-prob rewards (all but drdo with a head)")
    group.add_argument("--ensemble", choices=["mean", "min"], default="mean",
                       help="edpo: distil the mean of the reward models, or for each pair the nearest one")
    group = parser.add_argument_group("readings of Eq. 6, the paper's the default, and controls")
    group.add_argument("--student_rewards", choices=["head", "logps", "log_ratio"], default="head",
                       help="drdo: r^ is a linear head at the last response token, or beta * log pi(y|x), or that less the "
                            "policy's own at the start, which is no longer reference-free")
    group.add_argument("--p_w", choices=["sum", "mean"], default="sum", help="drdo: p_w of summed or of mean log-probs")
    group.add_argument("--detach_focal", action="store_true", help="drdo: no gradient through (1 - p_w)^gamma, as Appendix A.5")
    group.add_argument("--oracle_scale", type=float, default=1.0,
                       help="drdo, edpo: multiplies the Oracle's rewards; 1 / the std that precompute_rewards.py prints gives "
                            "distillation the same weight whatever the Oracle")
    group.add_argument("--nll_coef", type=float, default=0.0, help="adds so much of -log pi(y_w|x), summed, to any loss")
    group = parser.add_argument_group("data and model")
    group.add_argument("--model", default="out/sft", help="the SFT policy: a folder or a hub name")
    group.add_argument("--data", default="data/all/train.jsonl", help="preference JSONL to train on")
    group.add_argument("--eval_data", default="data/all/validation.jsonl", help="held-out preference JSONL; '' for none")
    group.add_argument("--out", help="folder to write (default: out/<loss>)")
    group.add_argument("--max_length", type=int, default=1024, help="drop pairs whose prompt + response has more tokens")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--batch_size", type=int, default=64, help="pairs an optimizer step, over all processes")
    group.add_argument("--micro_batch_size", type=int, default=8, help="pairs a forward pass, on one process")
    group.add_argument("--learning_rate", type=float, default=5e-6, help="peak, after warm-up; then cosine to 0")
    group.add_argument("--weight_decay", type=float, default=0.05, help="AdamW's, on matrices only")
    group.add_argument("--warmup_steps", type=int, default=100, help="linear warm-up")
    group.add_argument("--max_steps", type=int, help="optimizer steps (default: 1000, or what --epochs takes)")
    group.add_argument("--epochs", type=float, help="passes over the data, in place of --max_steps")
    group.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations: slower, smaller")
    group.add_argument("--deepspeed_config", default="ds_config.json", help="ZeRO stage, bf16 (off on a CPU), clipping")
    group = parser.add_argument_group("logging and checkpoints")
    group.add_argument("--log_steps", type=int, default=5, help="steps between lines in log.jsonl")
    group.add_argument("--eval_rows", type=int, default=1000, help="evaluate on so many rows, --eval_data's first; 0: on all")
    group.add_argument("--eval_steps", type=int, default=100, help="steps between evaluations; the last step has one")
    group.add_argument("--save_steps", type=int, default=500, help="steps between checkpoints for --resume; 0: none")
    group.add_argument("--resume", action="store_true", help="go on from <out>/checkpoint; repeat its run's flags")
    group.add_argument("--seed", type=int, default=0, help="order of the data and initialisation of the head")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    args = parser.parse_args()
    args.out = args.out or f"out/{args.loss}"
    check_flags(args, args.out, "alpha", "gamma", "nll_coef", "weight_decay", "warmup_steps", "save_steps", "eval_rows", "seed",
                "local_rank")
    if args.max_steps and args.epochs:
        fail("--max_steps and --epochs both say how long to train; give one of them")
    if args.loss in ("drdo", "edpo") and not args.oracle_rewards:
        fail(f"--loss {args.loss} distils rewards: give --oracle_rewards, a file that precompute_rewards.py wrote")
    return args


# ---- the loss ---------------------------------------------------------------------------------------------------------


def loss_and_metrics(args, logps, rewards, reference, oracle, lengths):
    """The loss of each pair, (B,), and what is logged of each pair, a dict of (B,).

    logps, rewards: the policy's log pi(y|x) and head rewards of (chosen, rejected), (B, 2); reference: the reference's
    log pi(y|x), (B, 2); oracle: the Oracles' rewards, (K, B, 2); lengths: tokens of (chosen, rejected), (B, 2).
    """
    oracle = args.oracle_scale * oracle
    if args.loss == "drdo" and args.student_rewards == "head":
        student = rewards
    elif args.loss == "drdo" and args.student_rewards == "logps":
        student = args.beta * logps
    else:
        student = args.beta * (logps - reference)  # DPO's implicit reward

    if args.loss == "drdo":
        z = logps if args.p_w == "sum" else logps / lengths
        preference_logits = z[:, 0] - z[:, 1]
        if args.detach_focal:
            preference_logits = preference_logits.detach()
        loss = drdo_loss(*logps.unbind(1), *student.unbind(1), *oracle.mean(0).unbind(1), args.alpha, args.gamma,
                         preference_logits)
    elif args.loss == "dpo":
        loss = dpo_loss(*logps.unbind(1), *reference.unbind(1), args.beta)
    elif args.loss == "edpo":
        loss = edpo_loss(*logps.unbind(1), *reference.unbind(1), *oracle.unbind(2), args.beta, args.ensemble)
    else:
        loss = ipo_loss(*logps.unbind(1), *reference.unbind(1), args.beta)
    loss = loss - args.nll_coef * logps[:, 0]

    margins = student[:, 0] - student[:, 1]
    metrics = {"loss": loss, "rewards/chosen": student[:, 0], "rewards/rejected": student[:, 1],
               "rewards/accuracies": (margins > 0).float(), "rewards/margins": margins,
               "logps/chosen": logps[:, 0], "logps/rejected": logps[:, 1], "response_length": lengths.float().mean(1)}
    if args.loss in ("drdo", "edpo"):
        metrics["oracle/margins"] = (oracle[..., 0] - oracle[..., 1]).mean(0)
    if args.loss == "drdo":  # Eq. 6's two terms apart, alpha included, and how much of the preference is left to learn
        metrics["loss/distillation"] = distillation_loss(*student.unbind(1), *oracle.mean(0).unbind(1))
        metrics["loss/contrastive"] = args.alpha * contrastive_loss(*logps.unbind(1), args.gamma, preference_logits)
        metrics["p_w"] = torch.sigmoid(preference_logits)
    return loss, {name: value.detach() for name, value in metrics.items()}


# ---- a pair in one row ------------------------------------------------------------------------------------------------


def collate(pairs, pad_token_id, device):
    """A batch of rows [prompt | chosen | rejected], padded right: what PairModel takes, integer tensors.

    Returns input_ids, position_ids, segments, previous: (B, T), and last: (B, 2). Positions of both responses go on
    from the prompt's. `segments` is 0 in the prompt, 1 in chosen, 2 in rejected, -1 in padding; `previous` the position
    whose hidden state predicts a token; `last` the positions of the two EOS.
    """
    width = max(sum(map(len, pair)) for pair in pairs)
    shape = (len(pairs), width)
    input_ids, segments = np.full(shape, pad_token_id), np.full(shape, -1)
    position_ids, previous, last = np.zeros(shape, int), np.zeros(shape, int), np.zeros((len(pairs), 2), int)
    for i, (prompt, chosen, rejected) in enumerate(pairs):
        p, c, r = len(prompt), len(chosen), len(rejected)
        input_ids[i, :p + c + r] = np.concatenate([prompt, chosen, rejected])
        segments[i, :p + c + r] = np.repeat([0, 1, 2], [p, c, r])
        position_ids[i, :p + c + r] = np.concatenate([np.arange(p + c), np.arange(p, p + r)])
        previous[i, 1:] = np.arange(width - 1)
        previous[i, p + c] = p - 1  # the first rejected token follows the prompt, not chosen's EOS
        last[i] = p + c - 1, p + c + r - 1
    batch = dict(input_ids=input_ids, position_ids=position_ids, segments=segments, previous=previous, last=last)
    return {name: torch.as_tensor(array, device=device) for name, array in batch.items()}


def pair_mask(segments):
    """Attention mask (B, 1, T, T), True where the query (row) sees the key (column): causal, and of the two responses
    each sees the prompt and itself. Padding sees padding, for a query with no key at all is NaN."""
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    query, key = segments[:, :, None], segments[:, None, :]
    return (causal & ((key == 0) | (key == query)))[:, None]


class PairModel(torch.nn.Module):
    """A causal LM (with a reward head `score`, or without) that scores both responses of a pair in one row."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, input_ids, position_ids, segments, previous, last, scored=2):
        """(logps, rewards) of (chosen, rejected), (B, 2) each: log-probs of the first `scored` responses only, 0 for the
        others; rewards is None without a head."""
        hidden = self.lm.base_model(input_ids=input_ids, position_ids=position_ids, attention_mask=pair_mask(segments),
                                    use_cache=False).last_hidden_state  # (B, T, H)
        logps = response_logps(hidden, self.lm.get_output_embeddings(), input_ids,
                               segments.where(segments <= scored, 0), previous)
        rewards = last_token_rewards(hidden, self.lm.score.weight, last) if hasattr(self.lm, "score") else None
        return logps, rewards


@torch.no_grad()
def check_layout(model, batch, folder):
    """Fails where the model's own forward, on prompt + response alone, gives a pair other log-probs than one row does:
    a model that ignores 4D masks, scales its logits, or slides a window shorter than prompt + response. `batch` has one pair."""
    logps, _ = model(**batch)
    tolerance = 1e-3 if next(model.parameters()).dtype.itemsize >= 4 else 0.05  # a token; bf16 keeps 8 bits
    for number, logp in enumerate(logps[0], 1):
        prompt, response = batch["input_ids"][batch["segments"] == 0], batch["input_ids"][batch["segments"] == number]
        logits = model.lm(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1:-1]  # (R, V)
        own = logits.float().log_softmax(-1).gather(-1, response[:, None]).sum()
        if not abs(own - logp) <= tolerance * len(response):  # NaN too
            fail(f"{folder}: log pi(y|x) of a response is {own:.2f} by the model's own forward and {logp:.2f} in a row of "
                 "pairs; this model type cannot be trained here, or not with this --max_length")


# ---- data -------------------------------------------------------------------------------------------------------------


def load_split(path, rewards_path, flag, args, tokenizer, limit=0):
    """Pairs of a preference file (of its first `limit` rows) and their Oracle rewards, (K, N, 2), NaN where none are given."""
    rows = read_jsonl(path, "prompt", "chosen", "rejected")
    rewards = load_rewards(rewards_path, path, len(rows), flag) if rewards_path and args.loss in ("drdo", "edpo") else None
    pairs, kept = encode_pairs(tokenizer, rows[:limit or None], args.max_length, path)
    if rewards is None:
        return pairs, torch.full((1, len(pairs), 2), math.nan)
    rewards = rewards[:, kept]
    scored = rewards.isfinite().all(2).all(0)  # (N,)
    if dist.get_rank() == 0 and not scored.all():
        print(f"{path}: {int((~scored).sum())} pairs without rewards dropped; precompute_rewards.py has a --max_length too")
    return [pair for pair, keep in zip(pairs, scored) if keep], rewards[:, scored]


def load_rewards(path, data, num_rows, flag):
    """The Oracles' rewards of a preference file: (K, N, 2), chosen and rejected; NaN where precompute_rewards.py had none."""
    try:
        file = torch.load(path, weights_only=True)
        rewards, data_sha256 = torch.stack([file["chosen"], file["rejected"]], dim=-1).float(), file["data_sha256"]
        assert rewards.ndim == 3 and len(rewards) > 0, f"its rewards have shape {tuple(rewards.shape)}, not (K, N, 2)"
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        fail(f"{flag} {path}: no rewards of preference pairs ({error!r:.100}); write it by precompute_rewards.py --data {data}")
    with open(data, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if data_sha256 != sha256 or rewards.shape[1] != num_rows:
        fail(f"{flag} {path} holds the rewards of {rewards.shape[1]} rows with sha256 {data_sha256}, but {data} has {num_rows} "
             f"rows with sha256 {sha256}; run precompute_rewards.py --data {data} again")
    return rewards


def encode_pairs(tokenizer, rows, max_length, path):
    """(pairs, kept): token ids (prompt, chosen, rejected) of the rows that fit in max_length, and their row numbers."""
    pairs, kept = [], []
    for number, row in enumerate(tqdm(rows, "tokenising", disable=dist.get_rank() > 0)):
        prompt = encode_prompt(tokenizer, row["prompt"])
        chosen, rejected = encode_response(tokenizer, row["chosen"]), encode_response(tokenizer, row["rejected"])
        if len(prompt) + max(len(chosen), len(rejected)) <= max_length:
            pairs.append([np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected)])
            kept.append(number)
    if not pairs:
        fail(f"{path}: all {len(rows)} pairs have more than --max_length {max_length} tokens (or the model's positions); raise "
             "it")
    if dist.get_rank() == 0:
        print(f"{path}: {len(pairs)} pairs, {len(rows) - len(pairs)} over --max_length {max_length} tokens dropped")
    return pairs, np.array(kept)


def batches(lengths, batch_size, seed):
    """Endless optimizer batches, arrays of row numbers: each a random sample of its epoch, longest row first, so that
    micro-batches cut from it hold rows of similar length."""
    for epoch in itertools.count():
        order = np.random.default_rng((seed, epoch)).permutation(len(lengths))
        for batch in order[:len(order) // batch_size * batch_size].reshape(-1, batch_size):
            yield batch[np.argsort(-lengths[batch], kind="stable")]


# ---- training ---------------------------------------------------------------------------------------------------------


def main():
    args = parse_args()
    device, rank, world_size = init_process()
    args.micro_batch_size = min(args.micro_batch_size, max(1, args.batch_size // world_size))
    if args.batch_size % (args.micro_batch_size * world_size):
        fail(f"--batch_size {args.batch_size} is no multiple of --micro_batch_size {args.micro_batch_size} x {world_size} "
             "processes")

    # ---- model and data
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model)
    lm = load_model(args.model, tokenizer.pad_token_id)
    args.max_length = min(args.max_length, getattr(lm.config, "max_position_embeddings", args.max_length))
    pairs, oracle = load_split(args.data, args.oracle_rewards, "--oracle_rewards", args, tokenizer)
    eval_pairs, eval_oracle = [], None
    if args.eval_data:
        eval_pairs, eval_oracle = load_split(args.eval_data, args.eval_oracle_rewards, "--eval_oracle_rewards", args, tokenizer,
                                              args.eval_rows)
    if len(pairs) < args.batch_size:
        fail(f"{args.data}: {len(pairs)} pairs are fewer than --batch_size {args.batch_size}; lower it")
    lengths = np.array([sum(map(len, pair)) for pair in pairs])
    response_lengths, eval_response_lengths = (torch.tensor([[len(chosen), len(rejected)] for _, chosen, rejected in split])
                                               for split in (pairs, eval_pairs))  # tokens, EOS included
    max_steps = args.max_steps or (max(1, int(args.epochs * len(pairs) / args.batch_size)) if args.epochs else 1000)
    if rank == 0:
        print(f"{max_steps} steps of {args.batch_size}: {max_steps * args.batch_size / len(pairs):.2f} epochs, "
              f"{args.warmup_steps} steps of warm-up")

    # ---- head and engine
    if args.loss == "drdo" and args.student_rewards == "head":
        add_head(lm)
    if args.gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine = make_engine(PairModel(lm), args, device, max_steps)
    to_batch = functools.partial(collate, pad_token_id=tokenizer.pad_token_id, device=device)
    check_layout(engine.module, to_batch([pairs[lengths.argmax()]]), args.model)
    step, run = start_run(engine, args)
    used = np.unique([*itertools.islice(batches(lengths, args.batch_size, args.seed), max_steps)])  # rows that this run takes
    used_logps, eval_reference = reference_logps(engine.module, [[pairs[i] for i in used], eval_pairs], args, to_batch)
    reference = torch.full((len(pairs), 2), math.nan).index_copy(0, torch.as_tensor(used), used_logps)

    # ---- training
    window, tokens, start = [], 0, time.time()
    steps = itertools.islice(batches(lengths, args.batch_size, args.seed), step, max_steps)
    for batch in tqdm(steps, f"align {args.loss}", initial=step, total=max_steps, disable=rank > 0):
        for micro in batch.reshape(-1, world_size, args.micro_batch_size)[:, rank]:
            logps, rewards = engine(**to_batch([pairs[i] for i in micro]))
            loss, metrics = loss_and_metrics(args, logps, rewards, reference[micro].to(device), oracle[:, micro].to(device),
                                             response_lengths[micro].to(device))
            engine.backward(loss.mean())
            engine.step()
            window.append(metrics)
        step += 1
        tokens += lengths[batch].sum()

        if step == 1 or step % args.log_steps == 0 or step == max_steps:
            metrics = gather(window)
            ratio = spread_ratio(metrics, args) if step == 1 else {}
            log(args, step, metrics, epoch=step * args.batch_size / len(pairs), **speed(tokens, start, device), **ratio,
                grad_norm=float(engine.get_global_grad_norm()),
                learning_rate=args.learning_rate * schedule_factor(step - 1, args.warmup_steps, max_steps),
                skipped_steps=engine.skipped_steps)
            window, tokens, start = [], 0, time.time()
        if eval_pairs and (step % args.eval_steps == 0 or step == max_steps):
            logps, rewards = score_all(engine.module, eval_pairs, args.micro_batch_size, to_batch, "evaluating")
            _, metrics = loss_and_metrics(args, logps, rewards, eval_reference, eval_oracle, eval_response_lengths)
            log(args, step, metrics, "eval_")
            tokens, start = 0, time.time()
        if args.save_steps and step % args.save_steps == 0:
            save_checkpoint(engine, args, step, run)
            tokens, start = 0, time.time()
    save_model(lm, tokenizer, args)
    dist.destroy_process_group()


def add_head(lm):
    """Gives the LM a linear reward head `score`, as AutoModelForSequenceClassification has it: one folder loads as both."""
    width = lm.get_output_embeddings().weight.shape[1]  # OPT's hidden states leave it projected to this width
    lm.score = torch.nn.Linear(width, 1, bias=False)
    torch.nn.init.normal_(lm.score.weight, std=(width + 1) ** -0.5)  # Stiennon et al. 2020, arXiv 2009.01325
    lm.config.num_labels = 1


@torch.no_grad()
def score_all(model, pairs, micro_batch_size, to_batch, description):
    """(logps, rewards) of all pairs, (N, 2) each, on the CPU: sorted by length, shared out among the processes."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    scores = torch.zeros(2, len(pairs), 2, device=next(model.parameters()).device)
    order = np.argsort([-sum(map(len, pair)) for pair in pairs], kind="stable")
    micro_batches = [order[i:i + micro_batch_size] for i in range(0, len(order), micro_batch_size)]
    for micro in tqdm(micro_batches[rank::world_size], description, disable=rank > 0, leave=False):
        logps, rewards = model(**to_batch([pairs[i] for i in micro]))
        scores[0, micro] = logps
        scores[1, micro] = 0.0 if rewards is None else rewards
    dist.all_reduce(scores)
    return scores.cpu()


def reference_logps(model, splits, args, to_batch):
    """The reference's log pi(y|x) of each split's pairs, (N, 2) each: the policy's own before its first step, taken once
    and kept in <out>/reference.pt. DRDO has none (but as --student_rewards log_ratio): zeros that nothing reads."""
    path = f"{args.out}/reference.pt"
    if args.loss == "drdo" and args.student_rewards != "log_ratio":
        return [torch.zeros(len(pairs), 2) for pairs in splits]
    if args.resume:  # the policy has moved since
        try:
            return torch.load(path, weights_only=True)
        except Exception as error:
            fail(f"--resume: {path} is not there or damaged ({error!r:.100}); start without --resume")
    logps = [score_all(model, pairs, args.micro_batch_size, to_batch, "reference")[0] for pairs in splits]
    if dist.get_rank() == 0:
        torch.save(logps, path + ".partial")
        os.replace(path + ".partial", path)
    return logps


def spread_ratio(metrics, args):
    """{"oracle_student_std_ratio": std of the Oracle's reward differences over std of the student's, on the first batch}, for
    drdo with a head or logps (the log ratio is still 0 there); warns where it is low."""
    if args.loss != "drdo" or args.student_rewards == "log_ratio":
        return {}
    ratio = (metrics["oracle/margins"].std() / metrics["rewards/margins"].std()).item()
    if args.student_rewards == "logps" and ratio < 5 and dist.get_rank() == 0:
        tqdm.write(f"warning: the Oracle's differences spread {ratio:.2f} times as wide as the student's; where that is below "
                   f"about 5 the policy learns to flatten its log-probs. Lower --beta {args.beta}", file=sys.stderr)
    return {"oracle_student_std_ratio": ratio}


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


def load_model(folder, pad_token_id):
    """The folder's causal LM in fp32 (DeepSpeed casts it), with SDPA attention and without dropout."""
    try:
        config = AutoConfig.from_pretrained(folder)
        for name, value in config.to_dict().items():
            if "drop" in name and isinstance(value, float):  # OPT's dropout is functional: only the config turns it off
                setattr(config, name, 0.0)
        config.pad_token_id = pad_token_id
        model, info = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32,
                                                           attn_implementation="sdpa", output_loading_info=True)
    except Exception as error:
        fail(f"--model {folder}: no causal LM there ({error!r:.150}); give a model folder or a hub name")
    if info["missing_keys"]:
        fail(f"--model {folder}: its weights lack {sorted(info['missing_keys'])[0]}; give the folder of a whole causal LM")
    model.get_input_embeddings().padding_idx = None  # a pad token that is a word too, as BOS, learns like any other
    return model.train()


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


def make_engine(model, args, device, max_steps):
    """DeepSpeed's engine around the model: AdamW, linear warm-up and cosine to 0, and what --deepspeed_config says."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]  # biases and norms
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": args.weight_decay},
                                   {"params": others, "weight_decay": 0.0}], lr=args.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule_factor(step, args.warmup_steps, max_steps))
    try:
        with open(args.deepspeed_config) as file:
            config = json.load(file)
        config.update(train_batch_size=args.batch_size, train_micro_batch_size_per_gpu=args.micro_batch_size,
                      steps_per_print=2**31, gradient_clipping=float(config.get("gradient_clipping", 0)))
        if device.type == "cpu":
            config["bf16"] = {"enabled": False}  # 3 times slower than fp32 there
        if config["zero_optimization"]["stage"] not in (1, 2):  # 3 leaves no whole model to read a head from, or to save
            raise ValueError("zero_optimization.stage must be 1 or 2")
        alone = device.type == "cpu" and dist.get_world_size() == 1
        if alone:  # nothing to share out, and the weights are fp32 as they are: ZeRO would only copy weights and gradients
            config |= {"zero_optimization": {"stage": 0}, "gradient_clipping": config["gradient_clipping"] or math.inf}
        engine = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)[0]
        if alone:  # DeepSpeed's own clipping, which forgets the norm, and no all-reduce
            engine.clip_fp32_gradients = lambda: setattr(optimizer, "_global_grad_norm", torch.nn.utils.clip_grad_norm_(
                model.parameters(), engine.gradient_clipping()))
            engine.enable_backward_allreduce = False
        return engine
    except RuntimeError:  # out of memory, or NCCL's: not the file's fault
        raise
    except Exception as error:
        fail(f"--deepspeed_config {args.deepspeed_config}: cannot use it ({error!r:.200}); start from the ds_config.json that "
             "stands beside this script")


def schedule_factor(step, warmup_steps, max_steps):
    """The learning rate of step 0, 1, ... as a share of its peak: linear warm-up, then a cosine that ends at 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, max_steps - warmup_steps)))


def gather(window):
    """What every process logged of its pairs, a list of dicts of (B,) on each -> one dict of (pairs,) on the CPU."""
    here = {name: torch.cat([metrics[name] for metrics in window]).cpu() for name in window[0]}
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    return {name: torch.cat([part[name] for part in everywhere]) for name in here}


def start_run(engine, args):
    """(step to start from, what the run is). Without --resume step 0; with it the last checkpoint's, whose weights and
    optimizer are loaded and behind which log.jsonl is cut off. Writes <out>/args.json."""
    with open(args.data, "rb") as file:
        run = {**vars(args), "processes": dist.get_world_size(), "data_sha256": hashlib.file_digest(file, "sha256").hexdigest(),
               "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    step, lines = 0, []
    if args.resume:
        if not os.path.exists(f"{args.out}/checkpoint/latest"):
            fail(f"--resume: {args.out}/checkpoint holds no checkpoint; start without --resume")
        try:
            with open(f"{args.out}/args.json") as file:
                before = dict(json.load(file))
        except Exception as error:
            fail(f"--resume: {args.out}/args.json is damaged ({error!r:.200}); put back a copy, or start without --resume")
        may_change = "resume local_rank log_steps eval_steps save_steps micro_batch_size gradient_checkpointing started".split()
        for name, value in run.items():
            if name not in may_change and value != before.get(name):
                fail(f"--resume: {name} was {before.get(name)} and is now {value}; go on with what the run began with")
        try:
            state = engine.load_checkpoint(f"{args.out}/checkpoint")[1]
            step, run["started"] = state["step"], state["run"]["started"]
            with open(f"{args.out}/log.jsonl") as file:
                lines = [line for line in file if line.endswith("}\n") and json.loads(line)["step"] <= step]
        except Exception as error:
            fail(f"--resume: {args.out}/checkpoint or log.jsonl is damaged ({error!r:.200}); put back a copy, or start without "
                 "--resume, which writes over them")
        if before.get("started") != run["started"]:
            fail(f"--resume: {args.out}/checkpoint is of the run of {run['started']}, and that of {before.get('started')} has "
                 "saved none; start without --resume")
    if dist.get_rank() == 0:
        versions = {name: version(name) for name in ("torch", "transformers", "deepspeed", "numpy")}
        for name, text in ("args.json", json.dumps({**run, "versions": versions}, indent=2)), ("log.jsonl", "".join(lines)):
            with open(f"{args.out}/{name}.partial", "w") as file:
                file.write(text)
            os.replace(f"{args.out}/{name}.partial", f"{args.out}/{name}")
    return step, run


def log(args, step, metrics, prefix="", **figures):
    """Appends a line to <out>/log.jsonl and prints its main figures, on rank 0: each metric's mean over pairs (of the held-out
    ones without those that are NaN for want of Oracle rewards), and the figures. Fails where the loss is not finite."""
    line = {"step": step, **{prefix + name: value.mean().item() for name, value in metrics.items()
                             if not (prefix and value.isnan().all())}, **figures}
    if not math.isfinite(line.get("loss", 0.0)):
        print(file=sys.stderr)  # ends the bar's line
        fail(f"step {step}: the loss is {line['loss']}; lower --learning_rate. {args.out}/checkpoint, if any, is as it was")
    if dist.get_rank() == 0:
        with open(f"{args.out}/log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        shown = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
        tqdm.write(f"step {step}: " + ", ".join(f"{name} {line[name]:.4g}" for name in line if name.endswith(shown)))


def speed(tokens, start, device):
    """Tokens a second since `start`, and the most memory this process has held: the GPU's, or else what is resident."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    used = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident
    return {"tokens_per_second": tokens / (time.time() - start), "peak_memory_gb": used / 2**30}


def check_weights(model, args):
    """Fails where the last step has made a weight NaN or infinite, before it is saved."""
    if not all(weight.isfinite().all() for weight in model.parameters()):
        print(file=sys.stderr)  # ends the bar's line
        fail(f"the weights are no longer finite; lower --learning_rate. No model was written to {args.out}")


def save_checkpoint(engine, args, step, run):
    """Writes <out>/checkpoint/step<step>; the checkpoint before it goes once this one is whole."""
    check_weights(engine.module, args)
    folder = f"{args.out}/checkpoint"
    engine.save_checkpoint(folder, tag=f"step{step}", client_state={"step": step, "run": run})
    if dist.get_rank() == 0:
        for name in os.listdir(folder):
            if name.startswith("step") and name != f"step{step}":
                shutil.rmtree(f"{folder}/{name}")


def save_model(lm, tokenizer, args):
    """Writes model and tokenizer beside their place in <out>, then moves each file there; on rank 0."""
    check_weights(lm, args)
    if dist.get_rank() == 0:
        partial = f"{args.out}/partial"
        lm.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for name in os.listdir(partial):
            os.replace(f"{partial}/{name}", f"{args.out}/{name}")
        os.rmdir(partial)
        print(f"{args.out}: model, tokenizer, args.json and log.jsonl written")


if __name__ == "__main__":
    main()
