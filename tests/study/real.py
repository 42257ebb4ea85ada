"""The study on a pretrained LM, judged by a true reward: does what lab.py finds hold there?

The task is controlled sentiment, as in the DPO paper (arXiv 2305.18290, section 6.1). The responses are the
LM's own samples. The true reward of an answer is a program: the sentiment that vaderSentiment reads in it, -1
to 1. So labels and Oracles can be as good or as bad as we like. common.py says how a study runs.

    pip install vaderSentiment==3.3.2
    python tests/study/real.py --model SmolLM2-135M-Instruct    # a folder or a hub name; 14 core hours
    python tests/study/real.py --model FOLDER --settings clean_all --methods "DPO" "DRDO (head)" --seeds 0
    python tests/study/real.py --model FOLDER --choose    # learning rates and betas, on a seed not reported
    python tests/study/real.py --report                   # the tables of what is there; trains nothing
    python tests/study/real.py --model FOLDER --settings clean_all --terms 16    # gradients of Eq. 6's terms

Out: out/real/seed<k>/ and out/real/results.json (of the last call); the tables on stdout.
"""
import itertools
import json
import math
import os
import random
import re
import sys
from functools import cache, partial
from pathlib import Path

import common
import generate
import numpy as np
import splits
import torch
from common import RECOMMENDED, align, places, read_rows, stage
from toy import fail, write_jsonl

# ---- the study ---------------------------------------------------------------------------------------------

METHODS = {  # what --choose has chosen. But DPO + NLL takes DPO's, e-DPO takes e-DPO (Oracle)'s
    "SFT on winners": "--learning_rate 5e-5",
    "DPO": "--learning_rate 1e-4 --beta 0.03",
    "DPO + NLL": "--learning_rate 1e-4 --beta 0.03",
    "IPO": "--learning_rate 5e-5 --beta 0.03",
    "e-DPO": "--learning_rate 1e-4 --beta 0.03",
    "e-DPO (Oracle)": "--learning_rate 1e-4 --beta 0.03",
    "DRDO (head)": "--learning_rate 1e-4",
    RECOMMENDED: "--learning_rate 1e-4 --beta 0.03"}
THREE = ["DPO", "e-DPO (Oracle)", RECOMMENDED]

# Labels "bt" are drawn from Bradley-Terry, by BT_SCALE. A further Oracle learns from "four_times" the pairs.
setting = partial(common.setting, pairs=800, steps=16, methods=THREE)
SETTINGS = {
    "clean_all": setting(methods=[*METHODS]),
    "bradley_terry": setting("bt"),
    "noisy_all": setting(0.4),
    "noisy_all_true": setting(0.4, oracle="true"),
    "noisy_all_four_times": setting(0.4, oracle="four_times"),
    "noisy_lc_le": setting(0.4, "lc_le", methods=[*METHODS]),
    "noisy_lc_le_true": setting(0.4, "lc_le", "true"),
    "noisy_4_epochs": setting(0.4, "lc_le", steps=48, methods=["DPO", RECOMMENDED])}
SEEDS = [0, 1, 2]
CHOOSING_SEEDS = [90]
CHOOSING_SETTINGS = ["clean_all"]
GRID = {"--beta": [f"--learning_rate {rate} --beta {beta}" for rate in (5e-5, 1e-4) for beta in (0.03, 0.1)],
        "": [f"--learning_rate {rate}" for rate in (2e-5, 5e-5, 1e-4, 2e-4)]}

START = "start"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
OUT = "out/real"
DOMAINS = {"all": ["known", "new"], "new": ["new"]}  # topics
COLUMNS = ["true", "once", "tokens", "eos", "distinct-2", "KL", "true at T = 1"]
KEEP_MODELS = False  # half a gigabyte each
SHARED = {"eval_data": "", "save_steps": 0, "batch_size": 16, "micro_batch_size": 16,
          "dtype": "auto"}  # bf16 where the processor has it; samples and their log-probs are fp32
ORACLE = {"learning_rate": 2e-4, "max_steps": 40}
MEMBER = {}
POLICY = {}
PROMPTS = 160  # training prompts of a seed
SAMPLES = 4  # responses to each
TEST = 64  # test prompts on known topics, and on new ones
TOKENS = 40  # of an answer at most
BT_SCALE = 4  # Bradley-Terry: P(the better one wins) = sigma(4 x gap of the true rewards)

with open(Path(__file__).with_name("prompts.json")) as prompts:
    WORDS = json.load(prompts)  # its system message is shorter than the one in SmolLM2's chat template


# ---- the true reward, and measures of answers --------------------------------------------------------------

@cache
def sentiment():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # for this study alone
    except ImportError:
        fail("vaderSentiment, the true reward, is missing: pip install vaderSentiment==3.3.2")
    return SentimentIntensityAnalyzer()


def true_reward(row):
    """The compound score of vaderSentiment for a row's response, -1 (negative) to 1 (positive)."""
    return sentiment().polarity_scores(row["response"])["compound"]


def once(text):
    """The text with each word at its first place alone. A reward that this takes away came by repetition."""
    first = {}
    for word in text.split():
        first.setdefault(re.sub(r"\W", "", word).lower(), word)
    return " ".join(first.values())


def distinct_2(texts):
    """Of all pairs of neighbouring words in the texts the share that differ."""
    pairs = [pair for text in texts for pair in itertools.pairwise(text.lower().split())]
    return len(set(pairs)) / max(1, len(pairs))


def measure(folder, rows):
    """KL: log pi - log pi_start of each sample at T = 1, nats."""
    samples = read_rows(f"{folder}/samples.jsonl")
    [logps] = read_rows(f"{folder}/logps.json")
    texts = [row["response"] for row in rows]
    return {"once": np.array([true_reward({"response": once(text)}) for text in texts]),
            "distinct-2": np.array([distinct_2(texts)]),
            "KL": np.array(logps["policy"]) - np.array(logps["start"]),
            "true at T = 1": np.array([true_reward(row) for row in samples])}


# ---- data, Oracles and answers -----------------------------------------------------------------------------

def prepare(seed, home, args):
    """Writes a seed's prompts and the start's answers to the test prompts."""
    true_reward({"response": ""})  # says now if it is missing
    if not os.path.exists(f"{home}/test.jsonl"):
        os.makedirs(home, exist_ok=True)
        known = make_prompts(WORDS["topics"], "known", seed)
        new = make_prompts(WORDS["new_topics"], "new", seed)
        write_jsonl(f"{home}/prompts.jsonl", known[:PROMPTS])
        write_jsonl(f"{home}/more_prompts.jsonl", known[PROMPTS:4 * PROMPTS])
        write_jsonl(f"{home}/test.jsonl", known[-TEST:] + new[:TEST])
    answer(seed, home, f"{home}/start", args.model, args)


def make_prompts(topics, dataset, seed):
    """Every template with every topic, rows in the seed's order."""
    texts = []
    for topic in topics:
        texts += [template.format(topic) for template in WORDS["templates"]]
    random.Random(seed).shuffle(texts)
    system = {"role": "system", "content": WORDS["system"]}
    return [{"prompt": [system, {"role": "user", "content": text}], "dataset": dataset} for text in texts]


def make_pairs(seed, home, setting, args):
    """Samples responses to the prompts, pairs and labels them, and cuts D_all and D_lc,le."""
    world, data, _ = places(home, setting)
    if os.path.exists(data):
        return
    names = ["prompts"]
    if setting["pairs"] > PROMPTS * math.comb(SAMPLES, 2):
        names.append("more_prompts")
    samples = [[] for _ in range(SAMPLES)]
    for name in names:
        for k, rows in enumerate(samples):
            path = f"{home}/samples/{name}_{k}.jsonl"
            stage(generate, path, model=args.model, prompts=f"{home}/{name}.jsonl", seed=1000 * seed + k,
                  temperature=1.0, top_p=1.0, max_new_tokens=TOKENS, micro_batch_size=120, dtype="fp32")
            rows += read_rows(path)
    os.makedirs(world, exist_ok=True)
    write_jsonl(f"{world}/pairs.jsonl", label(samples, setting["labels"], setting["pairs"], seed))
    stage(splits, f"{world}/data", "/lc_le/train.jsonl", dataset=f"{world}/pairs.jsonl", seed=seed)


def label(samples, labels, pairs, seed):
    """Up to so many labelled pairs of responses whose true rewards differ. samples: k lists of rows, prompts
    in one order. `confidence` is the gap of the true rewards, whatever the label says."""
    rows = []
    for answers in zip(*samples):
        scored = [(true_reward(row), row["response"]) for row in answers]
        for (high, chosen), (low, rejected) in itertools.permutations(scored, 2):
            if high > low:
                rows.append({"prompt": answers[0]["prompt"], "chosen": chosen, "rejected": rejected,
                             "confidence": round(high - low, 4)})
    random.Random(seed).shuffle(rows)  # the same pairs under all labels
    generator = random.Random(seed + 1)
    for row in rows[:pairs]:
        wrong = labels
        if labels == "bt":
            wrong = 1 / (1 + math.exp(BT_SCALE * row["confidence"]))
        if generator.random() < wrong:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return rows[:pairs]


def other_oracle(seed, home, setting, reward_model, args):
    """The folder of the Oracle of four times the pairs."""
    larger = setting | {"pairs": 4 * setting["pairs"]}
    world, *_ = places(home, larger)
    make_pairs(seed, home, larger, args)
    return reward_model(f"{world}/oracle", data=f"{world}/data/all/train.jsonl",
                        max_steps=4 * ORACLE["max_steps"])


def answer(seed, home, out, policy, args):
    """Answers the test prompts at T = 0.7 (generations.jsonl: the wins), the first half, known topics, at
    T = 1 (samples.jsonl: the KL), without top-p: it sorts the vocabulary, slowly. Then their log-probs."""
    for name, temperature, prompts in ("generations", 0.7, 0), ("samples", 1.0, TEST):
        stage(generate, f"{out}/{name}.jsonl", model=policy, prompts=f"{home}/test.jsonl", seed=seed,
              temperature=temperature, top_p=1.0, num_prompts=prompts, max_new_tokens=TOKENS,
              micro_batch_size=64, dtype="fp32")
    if not os.path.exists(f"{out}/logps.json"):
        common.in_child(lambda: write_logps(out, policy, args.model), f"{out}/logps.json")


def write_logps(out, policy, start):
    """Writes logps.json, {"start", "policy"}: log pi(y|x) of each sample under both."""
    samples = read_rows(f"{out}/samples.jsonl")
    saved = {}
    for name, folder in ("start", start), ("policy", policy):
        tokenizer, lm = align.load_model(folder, "cpu")
        saved[name] = log_probs(lm, tokenizer, samples)
    write_jsonl(f"{out}/logps.json", [saved])


@torch.no_grad()
def log_probs(lm, tokenizer, rows):
    """log pi(y|x) of each generated row, a list. An answer that was cut off has no EOS."""
    logps = []
    for row in rows:
        end = tokenizer.eos_token_id
        (prompt, answer), _ = align.encode(tokenizer, row["prompt"], [row["response"]], end)
        ids = torch.tensor(prompt + (answer if row["eos"] else answer[:-1]))
        logits = lm(ids[None]).logits[0, len(prompt) - 1:-1]  # (tokens of the answer, V)
        chosen = logits.log_softmax(-1).gather(1, ids[len(prompt):, None])
        logps.append(chosen.sum().item())
    return logps


if __name__ == "__main__":
    common.run(sys.modules[__name__])
