"""Four steps of each training script against a plain loop. The loop has no row of a pair: it takes the model's
own forward on prompt + response alone, one after the other. It shares no code with the stages.

In the four steps of 8 pairs, in micro-batches of 2, are two epochs, warm-up, decay and clipping. Every figure
of every step agrees, and the held-out ones after the last."""
import hashlib
import json
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import toy

POSITIONS = 72  # of the model: it drops the longer ones of 32 pairs
RATES = [0.005, 0.01, 0.01, 0.005]  # two steps of warm-up to the peak, then half a cosine to 0 at step 5
EVAL_ROWS = 9  # of 12
SEED = 5
TRAINING = ["--batch_size", 8, "--micro_batch_size", 2, "--max_steps", 4, "--warmup_steps", 2,
            "--learning_rate", 0.01, "--weight_decay", 2.0, "--seed", SEED, "--log_steps", 1,
            "--eval_rows", EVAL_ROWS, "--max_length", 1000]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A random LM, pairs, rewards of two Oracles, and the heads that oracle.py and align.py draw."""
    home = tmp_path_factory.mktemp("steps")
    tokenizer = toy.make_tokenizer()
    tokenizer.save_pretrained(home / "model")
    model = toy.make_model(tokenizer, seed=0, hidden_size=16)
    model.config.max_position_embeddings = POSITIONS
    model.save_pretrained(home / "model")
    for name, rows, seed in ("train", 32, 1), ("validation", 12, 2):
        pairs = [pair for pair in toy.make_pairs(2 * rows, seed) if pair["chosen"] != pair["rejected"]]
        toy.write_jsonl(home / f"{name}.jsonl", pairs[:rows])
        save_rewards(home, name, torch.randn(2, rows, 2, generator=torch.Generator().manual_seed(seed)))
    still = [*flags_of(home), *TRAINING, "--max_steps", 1, "--learning_rate", 1e-30, "--eval_data", ""]
    call("oracle.py", *still, "--out", home / "oracle_head")
    call("oracle.py", *still, "--seed", 6, "--out", home / "other_oracle_head")
    call("align.py", *still, "--oracle_rewards", home / "train.pt", "--out", home / "drdo_head")
    return home


def save_rewards(home, name, rewards, oracles=("a", "b")):
    sha256 = hashlib.sha256((home / f"{name}.jsonl").read_bytes()).hexdigest()
    columns = dict(zip(("chosen", "rejected"), rewards.unbind(-1)))
    torch.save(columns | {"oracles": [*oracles], "data_sha256": sha256}, home / f"{name}.pt")


def flags_of(home):
    return ["--model", home / "model", "--data", home / "train.jsonl", "--eval_data", home / "validation.jsonl"]


def initial_head(home, name):
    """The reward head before the first step, (1, H)."""
    file = "score.safetensors" if name == "drdo_head" else "model.safetensors"
    return load_file(home / name / file)["score.weight"]


def read_log(folder):
    return [json.loads(line) for line in open(folder / "log.jsonl")]


# ---- the plain loop ----------------------------------------------------------------------------------------

class Data:
    """The rows of a file that fit, as lists [prompt, response, ...] of ids, with their rewards, (K, N, 2)."""

    def __init__(self, home, name, keys, limit=None):
        tokenizer = AutoTokenizer.from_pretrained(home / "model")
        ids = lambda text: tokenizer(text).input_ids  # of words alone: it adds no special token
        rewards = torch.load(home / f"{name}.pt")
        self.rows, fitting = [], []
        for number, line in enumerate(open(home / f"{name}.jsonl")):
            row = json.loads(line)
            prompt = [tokenizer.bos_token_id] + ids(row["prompt"])
            responses = [ids(row[key]) + [tokenizer.eos_token_id] for key in keys]
            if number < (limit or 1000) and len(prompt) + max(map(len, responses)) <= POSITIONS:
                self.rows.append([prompt, *responses])
                fitting.append(number)
        self.oracle = torch.stack([rewards["chosen"], rewards["rejected"]], -1)[:, fitting]
        self.tokens = torch.tensor([[len(part) for part in row[1:]] for row in self.rows])

    def score(self, model, head, rows):
        """(log pi(y|x), rewards) of the rows' responses, (B, R) each, one forward pass a response."""
        logps, rewards = [], []
        for prompt, *responses in (self.rows[i] for i in rows):
            for response in responses:
                ids = torch.tensor([prompt + response])
                output = model(ids, output_hidden_states=True)
                of_next = output.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])  # (T - 1, 1)
                logps.append(of_next[len(prompt) - 1:].sum())
                rewards.append(output.hidden_states[-1][0, -1] @ head[0])
        shape = len(rows), len(responses)
        return torch.stack(logps).view(shape), torch.stack(rewards).view(shape)


def plain_loop(home, keys, head, figures_of):
    """The log of four steps, and of the evaluation that follows. figures_of(z, rewards, tokens, reference,
    oracle, spread) gives the figures of B pairs, (B,) each or a mean, `loss` among them."""
    model = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32)
    train, held_out = Data(home, "train", keys), Data(home, "validation", keys, EVAL_ROWS)
    size = len(train.rows)
    assert 16 < size < 24 and 3 < len(held_out.rows) < EVAL_ROWS  # two steps an epoch; both files lose rows
    spread = difference(train.oracle).mean(0).std()
    with torch.no_grad():
        references = [data.score(model, head, range(len(data.rows)))[0] for data in (train, held_out)]

    def figures(data, reference, rows):
        z, rewards = data.score(model, head, rows)
        named = dict(z=z, rewards=rewards, tokens=data.tokens[rows], reference=reference[rows],
                     oracle=difference(data.oracle[:, rows]), spread=spread)
        return figures_of(Namespace(**named))

    parameters = [*model.parameters(), head.requires_grad_()]
    optimizer = torch.optim.AdamW([{"params": [p for p in parameters if p.ndim > 1], "weight_decay": 2.0},
                                   {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}])
    log = []
    for step, rate in enumerate(RATES, 1):
        epoch, half = divmod(step - 1, 2)
        batch = np.random.default_rng((SEED, epoch)).permutation(size)[8 * half:][:8]
        values = figures(train, references[0], batch)
        optimizer.zero_grad()
        values["loss"].mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        log.append({name: value.mean().item() for name, value in values.items()}
                   | {"grad_norm": norm.item(), "learning_rate": rate, "epoch": step * 8 / size})
    with torch.no_grad():
        values = figures(held_out, references[1], range(len(held_out.rows)))
    return log + [{f"eval_{name}": value.mean().item() for name, value in values.items()}]


def check(log, expected):
    """Where the policy is its own reference, rounding decides which of two implicit rewards is higher."""
    expected[0].pop("rewards/accuracies", None)
    for line, figures in zip(log, expected, strict=True):
        assert {name: line[name] for name in figures} == pytest.approx(figures, rel=1e-4, abs=1e-5)


# ---- what each loss makes of a batch: z, rewards, tokens, reference (B, 2), oracle (K, B) --------------------

def difference(of_two):
    return of_two[..., 0] - of_two[..., 1]


def reward_figures(rewards):
    return {"rewards/chosen": rewards[:, 0], "rewards/rejected": rewards[:, 1],
            "rewards/margins": difference(rewards),
            "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).float()}


def sft(x):
    return {"loss": -x.z.sum() / x.tokens.sum()}


def reward_model(x):
    bradley_terry = -F.logsigmoid(difference(x.rewards))
    return {"loss": bradley_terry, "loss/bradley_terry": bradley_terry, **reward_figures(x.rewards)}


def oracle_sum(x):
    figures = reward_model(x)
    return figures | {"loss": 0.99 * figures["loss"] - 0.01 * x.z[:, 0], "logps/chosen": x.z[:, 0]}


def oracle_mean(x):
    return reward_model(x) | {"loss": 0.7 * reward_model(x)["loss"] - 0.3 * x.z[:, 0] / x.tokens[:, 0]}


def align_figures(x, loss, rewards):
    return {"loss": loss, "logps/chosen": x.z[:, 0], "logps/rejected": x.z[:, 1],
            "response_length": x.tokens.float().mean(1), **reward_figures(rewards)}


def implicit(x):
    return 0.2 * (x.z - x.reference)


def dpo(x):
    return align_figures(x, -F.logsigmoid(difference(implicit(x))), implicit(x))


def dpo_nll(x):
    return dpo(x) | {"loss": dpo(x)["loss"] - 0.3 * x.z[:, 0]}


def ipo(x):
    return align_figures(x, (difference(x.z - x.reference) - 1 / (2 * 0.2)) ** 2, implicit(x))


def edpo(x):
    return align_figures(x, ((x.oracle - difference(implicit(x))) ** 2).mean(0), implicit(x))


def edpo_min(x):
    return align_figures(x, ((x.oracle - difference(implicit(x))) ** 2).min(0).values, implicit(x))


def drdo(x, rewards, logits, oracle):
    p_w = logits.sigmoid()
    distillation = (oracle - difference(rewards)) ** 2
    contrastive = -0.3 * (1 - p_w) ** 1.5 * (x.z[:, 0] - torch.log1p(-x.z[:, 1].exp()))
    return align_figures(x, distillation + contrastive, rewards) | {
        "loss/distillation": distillation, "loss/contrastive": contrastive, "p_w": p_w,
        "oracle/margins": oracle}


def drdo_head(x):
    return drdo(x, x.rewards, difference(x.z), x.oracle.mean(0))


def drdo_logps(x):
    return drdo(x, 0.2 * x.z, difference(x.z / x.tokens).detach(), x.oracle.mean(0))


def drdo_log_ratio(x):
    return drdo(x, implicit(x), difference(x.z / x.tokens), x.oracle.mean(0) / x.spread)


# ---- the tests ---------------------------------------------------------------------------------------------

def test_the_heads_are_small_and_unrelated(home):
    """Variance 1 / (H + 1). One --seed draws unrelated heads in oracle.py and align.py."""
    heads = [initial_head(home, name)[0] for name in ("oracle_head", "other_oracle_head", "drdo_head")]
    for i, head in enumerate(heads):
        assert 0.4 < head.pow(2).sum() < 2
        assert abs(F.cosine_similarity(head, heads[i - 1], dim=0)) < 0.6


def test_sft(home, tmp_path):
    call("sft.py", *flags_of(home), *TRAINING, "--out", tmp_path)
    check(read_log(tmp_path), plain_loop(home, ["chosen"], torch.zeros(1, 16), sft))


@pytest.mark.parametrize("figures, flags", [
    (oracle_sum, []), (oracle_mean, ["--alpha", 0.3, "--lm_term", "mean"]), (reward_model, ["--alpha", 0])])
def test_oracle(home, tmp_path, figures, flags):
    call("oracle.py", *flags_of(home), *TRAINING, *flags, "--out", tmp_path)
    head = initial_head(home, "oracle_head")
    check(read_log(tmp_path), plain_loop(home, ["chosen", "rejected"], head, figures))


DRDO = ["--alpha", 0.3, "--gamma", 1.5, "--beta", 0.2]


@pytest.mark.parametrize("figures, flags", [
    (dpo, ["--loss", "dpo", "--beta", 0.2]),
    (dpo_nll, ["--loss", "dpo", "--beta", 0.2, "--nll_coef", 0.3]),
    (ipo, ["--loss", "ipo", "--beta", 0.2]),
    (edpo, ["--loss", "edpo", "--beta", 0.2]),
    (edpo_min, ["--loss", "edpo", "--beta", 0.2, "--ensemble", "min"]),
    (drdo_head, DRDO),
    (drdo_logps, [*DRDO, "--student_rewards", "logps", "--p_w", "mean", "--detach_focal"]),
    (drdo_log_ratio, [*DRDO, "--student_rewards", "log_ratio", "--p_w", "mean", "--standardise_oracle"])])
def test_align(home, tmp_path, figures, flags):
    call("align.py", *flags_of(home), *TRAINING, *flags, "--oracle_rewards", home / "train.pt",
         "--eval_oracle_rewards", home / "validation.pt", "--out", tmp_path)
    head = initial_head(home, "drdo_head")
    check(read_log(tmp_path), plain_loop(home, ["chosen", "rejected"], head, figures))
