"""Four steps of each training script against a plain loop, which shares no code with the stages. It takes the
model's own forward on prompt + response alone, one response after the other.

In the four steps of 8 pairs, in micro-batches of 2, are two epochs, warm-up, decay and clipping. Every figure
of every step agrees, and the held-out ones before the first and after the last."""
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, read_jsonl, save_rewards
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import toy

POSITIONS = 72  # of the model: it drops the longer ones of 32 pairs
RATES = [0.002, 0.004, 0.004, 0.002]  # two steps of warm-up to the peak, then half a cosine to 0 at step 5
EVAL_ROWS = 8  # of 12; the 5 that fit leave a micro-batch of one row
SEED = 5
TRAINING = ["--batch_size", 8, "--micro_batch_size", 2, "--max_steps", 4, "--warmup_steps", 2,
            "--learning_rate", 0.004, "--weight_decay", 5.0, "--seed", SEED, "--log_steps", 1,
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
        data = home / f"{name}.jsonl"
        toy.write_jsonl(data, pairs[:rows])
        rewards = torch.randn(2, rows, 2, generator=torch.Generator().manual_seed(seed))
        save_rewards(home / f"{name}.pt", data, rewards)
    still = [*flags_of(home), *TRAINING, "--max_steps", 1, "--learning_rate", 1e-30, "--eval_data", ""]
    call("oracle.py", *still, "--out", home / "oracle_head")
    call("oracle.py", *still, "--seed", 6, "--out", home / "other_oracle_head")
    call("align.py", *still, "--oracle_rewards", home / "train.pt", "--out", home / "drdo_head")
    return home


def flags_of(home):
    return ["--model", home / "model", "--data", home / "train.jsonl",
            "--eval_data", home / "validation.jsonl"]


def initial_head(home, name):
    """The reward head before the first step, (1, H)."""
    file = "score.safetensors" if name == "drdo_head" else "model.safetensors"
    return load_file(home / name / file)["score.weight"]


# ---- the plain loop ----------------------------------------------------------------------------------------

def read_pairs(home, name, keys, limit=None):
    """The rows that fit, as lists [prompt, response, ...] of ids, and their reward differences, (K, N)."""
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    ids = lambda text: tokenizer(text).input_ids  # of words alone: it adds no special token
    rewards = torch.load(home / f"{name}.pt")
    pairs, fitting = [], []
    for number, row in enumerate(read_jsonl(home / f"{name}.jsonl")[:limit]):
        prompt = [tokenizer.bos_token_id] + ids(row["prompt"])
        responses = [ids(row[key]) + [tokenizer.eos_token_id] for key in keys]
        if len(prompt) + max(map(len, responses)) <= POSITIONS:
            pairs.append([prompt, *responses])
            fitting.append(number)
    return pairs, (rewards["chosen"] - rewards["rejected"])[:, fitting]


def score(model, head, pairs):
    """(log pi(y|x), rewards, tokens) of the pairs' responses, (B, R) each, one forward pass a response."""
    scores = []
    for prompt, *responses in pairs:
        for response in responses:
            ids = torch.tensor([prompt + response])
            output = model(ids, output_hidden_states=True)
            of_next = output.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])  # (T - 1, 1)
            reward = output.hidden_states[-1][0, -1] @ head[0]
            scores.append(torch.stack([of_next[len(prompt) - 1:].sum(), reward, torch.tensor(len(response))]))
    return torch.stack(scores).view(len(pairs), len(responses), 3).unbind(2)


def plain_loop(home, keys, head, figures_of):
    """The log of four steps, and of the evaluations before and after. figures_of(z, rewards, tokens,
    reference, oracle, spread) gives the figures of B pairs, (B,) each or a mean, `loss` among them."""
    model = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32)
    train, train_oracle = read_pairs(home, "train", keys)
    held_out, held_out_oracle = read_pairs(home, "validation", keys, EVAL_ROWS)
    assert 16 < len(train) < 24 and 3 < len(held_out) < EVAL_ROWS  # two steps an epoch; both files lose rows
    spread = train_oracle.mean(0).std()
    with torch.no_grad():
        reference, held_out_reference = (score(model, head, pairs)[0] for pairs in (train, held_out))

    def figures(pairs, reference, oracle):
        z, rewards, tokens = score(model, head, pairs)
        return figures_of(Namespace(z=z, rewards=rewards, tokens=tokens, reference=reference, oracle=oracle,
                                    spread=spread))

    @torch.no_grad()
    def evaluation():
        values = figures(held_out, held_out_reference, held_out_oracle)
        return {f"eval_{name}": value.mean().item() for name, value in values.items()}

    parameters = [*model.parameters(), head.requires_grad_()]
    optimizer = torch.optim.AdamW([{"params": [p for p in parameters if p.ndim > 1], "weight_decay": 5.0},
                                   {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}])
    log = [evaluation()]
    for step, rate in enumerate(RATES, 1):
        epoch, half = divmod(step - 1, 2)
        batch = np.random.default_rng((SEED, epoch)).permutation(len(train))[8 * half:][:8]
        values = figures([train[i] for i in batch], reference[batch], train_oracle[:, batch])
        optimizer.zero_grad()
        values["loss"].mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        log.append({name: value.mean().item() for name, value in values.items()}
                   | {"grad_norm": norm.item(), "learning_rate": rate, "epoch": step * 8 / len(train)})
    return log + [evaluation()]


def check(folder, expected):
    """Where the policy is its own reference, rounding decides which of two implicit rewards is higher."""
    expected[0].pop("eval_rewards/accuracies", None)
    expected[1].pop("rewards/accuracies", None)
    for line, figures in zip(read_jsonl(folder / "log.jsonl"), expected, strict=True):
        assert {name: line[name] for name in figures} == pytest.approx(figures, rel=1e-4, abs=1e-5)


# ---- what each loss makes of a batch -----------------------------------------------------------------------
# x: z, rewards, tokens, reference, (B, 2) each; oracle, reward differences of two Oracles, (2, B)

def difference(of_two):
    return of_two[..., 0] - of_two[..., 1]


def reward_figures(rewards):
    return {"rewards/chosen": rewards[:, 0], "rewards/rejected": rewards[:, 1],
            "rewards/margins": difference(rewards),
            "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).float()}


def reward_model(x):
    bradley_terry = -F.logsigmoid(difference(x.rewards))
    return {"loss": bradley_terry, "loss/bradley_terry": bradley_terry, **reward_figures(x.rewards)}


def oracle(alpha, lm_term):
    def figures(x):
        loss = (1 - alpha) * reward_model(x)["loss"] - alpha * lm_term(x)
        return reward_model(x) | {"loss": loss, "logps/chosen": x.z[:, 0]}
    return figures


def implicit(x):
    return 0.2 * (x.z - x.reference)


def policy(loss, rewards=implicit):
    return lambda x: {"loss": loss(x), "logps/chosen": x.z[:, 0], "logps/rejected": x.z[:, 1],
                      "response_length": x.tokens.mean(1), **reward_figures(rewards(x))}


def edpo(x):
    return (x.oracle - difference(implicit(x))) ** 2  # (2, B)


def drdo(rewards, logits, spread=lambda x: 1):
    def figures(x):
        p_w, oracle = logits(x).sigmoid(), x.oracle.mean(0) / spread(x)
        distillation = (oracle - difference(rewards(x))) ** 2
        contrastive = -0.3 * (1 - p_w) ** 1.5 * (x.z[:, 0] - torch.log1p(-x.z[:, 1].exp()))
        return policy(lambda x: distillation + contrastive, rewards)(x) | {
            "loss/distillation": distillation, "loss/contrastive": contrastive, "p_w": p_w,
            "oracle/margins": oracle}
    return figures


# ---- the tests ---------------------------------------------------------------------------------------------

def test_the_heads_are_small_and_unrelated(home):
    """Variance 1 / (H + 1). One --seed draws unrelated heads in oracle.py and align.py."""
    heads = [initial_head(home, name)[0] for name in ("oracle_head", "other_oracle_head", "drdo_head")]
    for i, head in enumerate(heads):
        assert 0.4 < head.pow(2).sum() < 2
        assert abs(F.cosine_similarity(head, heads[i - 1], dim=0)) < 0.6


def test_sft(home, tmp_path):
    """The mean over the tokens of the step, not of a micro-batch, nor over its rows."""
    call("sft.py", *flags_of(home), *TRAINING, "--out", tmp_path)
    figures = lambda x: {"loss": -x.z.sum() / x.tokens.sum()}
    check(tmp_path, plain_loop(home, ["chosen"], torch.zeros(1, 16), figures))


ORACLE = {"--lm_term sum": oracle(0.01, lambda x: x.z[:, 0]),
          "--lm_term mean --alpha 0.3": oracle(0.3, lambda x: x.z[:, 0] / x.tokens[:, 0]),
          "--alpha 0": reward_model}


@pytest.mark.parametrize("flags", ORACLE)
def test_oracle(home, tmp_path, flags):
    call("oracle.py", *flags_of(home), *TRAINING, *flags.split(), "--out", tmp_path)
    expected = plain_loop(home, ["chosen", "rejected"], initial_head(home, "oracle_head"), ORACLE[flags])
    check(tmp_path, expected)


ALIGN = {
    "dpo": policy(lambda x: -F.logsigmoid(difference(implicit(x)))),
    "dpo --nll_coef 0.3": policy(lambda x: -F.logsigmoid(difference(implicit(x))) - 0.3 * x.z[:, 0]),
    "dpo --label_smoothing 0.3": policy(lambda x: -0.7 * F.logsigmoid(difference(implicit(x)))
                                        - 0.3 * F.logsigmoid(-difference(implicit(x)))),
    "rdpo --label_smoothing 0.3": policy(lambda x: (0.3 * F.logsigmoid(-difference(implicit(x)))
                                                    - 0.7 * F.logsigmoid(difference(implicit(x)))) / 0.4),
    "ipo": policy(lambda x: (difference(x.z - x.reference) - 1 / (2 * 0.2)) ** 2),
    "edpo": policy(lambda x: edpo(x).mean(0)),
    "edpo --ensemble min": policy(lambda x: edpo(x).min(0).values),
    "drdo": drdo(lambda x: x.rewards, lambda x: difference(x.z)),
    "drdo --student_rewards logps --p_w mean --detach_focal": drdo(
        lambda x: 0.2 * x.z, lambda x: difference(x.z / x.tokens).detach()),
    "drdo --student_rewards log_ratio --p_w mean --standardise_oracle": drdo(
        implicit, lambda x: difference(x.z / x.tokens), lambda x: x.spread)}


@pytest.mark.parametrize("flags", ALIGN)
def test_align(home, tmp_path, flags):
    call("align.py", *flags_of(home), *TRAINING, "--alpha", 0.3, "--gamma", 1.5, "--beta", 0.2,
         "--oracle_rewards", home / "train.pt", "--eval_oracle_rewards", home / "validation.pt",
         "--out", tmp_path, "--loss", *flags.split())
    expected = plain_loop(home, ["chosen", "rejected"], initial_head(home, "drdo_head"), ALIGN[flags])
    check(tmp_path, expected)
