"""The study on the toy task (tests/toy.py): where DRDO wins and where it does not, judged by the true reward.

The start is an SFT policy. Prompts are posts, in domain, and articles, out of it. Answers are sampled at
T = 0.7; a tie counts half a win. Intervals are 95%: Student's t over the seeds' means, or over the prompts
of a single seed. common.py says how a study runs.

    python tests/study/lab.py                # everything: days on one core; it goes on where it stopped
    python tests/study/lab.py --seeds 20 21 --settings clean_all --methods "DPO" "DRDO (head)"
    python tests/study/lab.py --choose       # learning rates and betas, on seeds that are not reported
    python tests/study/lab.py --report       # the tables of what is there; trains nothing
    python tests/study/lab.py --settings clean_all --terms 480    # gradients of Eq. 6's terms, likewise

Out: out/lab/seed<k>/ and out/lab/results.json (of the last call); the tables on stdout.
"""
import os
import sys
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # all models are made here

import common
import generate
import numpy as np
import sft
import splits
import toy
from common import RECOMMENDED, places, read_rows, stage

# ---- the study ---------------------------------------------------------------------------------------------

METHODS = {  # what --choose has chosen; flags and whose rewards a method learns are in common.METHODS
    "SFT on winners": "--learning_rate 2e-4",
    "DPO": "--learning_rate 1e-4 --beta 0.1",
    "DPO + NLL": "--learning_rate 1e-4 --beta 0.3",
    "cDPO": "--learning_rate 1e-4 --beta 0.03 --label_smoothing 0.1",
    "rDPO": "--learning_rate 1e-4 --beta 0.1 --label_smoothing 0.1",
    "IPO": "--learning_rate 1e-4 --beta 0.03",
    "e-DPO": "--learning_rate 1e-4 --beta 0.03",
    "e-DPO (Oracle)": "--learning_rate 1e-4 --beta 0.1",
    "e-DPO (Oracle) + NLL": "--learning_rate 1e-4 --beta 0.1",
    "e-DPO (standardised Oracle)": "--learning_rate 1e-4 --beta 0.3",
    "DRDO (head)": "--learning_rate 1e-4",
    "DRDO (head, mean p_w)": "--learning_rate 2e-4",
    "DRDO (head, standardised Oracle)": "--learning_rate 1e-4",  # not chosen: see NO_REFERENCE
    "DRDO (head, mean p_w, standardised Oracle)": "--learning_rate 1e-4",  # likewise
    "DRDO (logps)": "--learning_rate 1e-4 --beta 0.03",
    "DRDO (logps, mean p_w)": "--learning_rate 1e-4 --beta 0.03",  # likewise
    "DRDO (logps, standardised Oracle)": "--learning_rate 1e-4 --beta 0.03",
    "DRDO (logps, mean p_w, standardised Oracle)": "--learning_rate 1e-4 --beta 0.03",  # likewise
    "DRDO (log ratio)": "--learning_rate 1e-4 --beta 0.1",
    "DRDO (log ratio, mean p_w)": "--learning_rate 1e-4 --beta 0.1",
    "DRDO (log ratio, standardised Oracle)": "--learning_rate 1e-4 --beta 0.3",
    RECOMMENDED: "--learning_rate 1e-4 --beta 0.03"}
MAIN = ["DPO", "e-DPO (Oracle)", "DRDO (head)", "DRDO (logps)", "DRDO (log ratio)", RECOMMENDED]
GRID_METHODS = ["e-DPO", *MAIN]
LONG = ["SFT on winners", "DPO + NLL", *MAIN]

# Shares of wrong labels that conservative and robust DPO are told, rightly and wrongly: the one that --choose
# has chosen, and the others.
SHARES = [0.1, 0.2, 0.4]
RIVALS = ["cDPO", "rDPO"]
for method in ("cDPO", "rDPO"):
    RIVALS += [f"{method} --label_smoothing {share}" for share in SHARES
               if not METHODS[method].endswith(str(share))]

# The candidates for align.py's default: without a reference, all at one learning rate and beta.
NO_REFERENCE = ["DRDO (head)", "DRDO (head, mean p_w) --learning_rate 1e-4",
                "DRDO (head, standardised Oracle)", "DRDO (head, mean p_w, standardised Oracle)",
                "DRDO (logps)", "DRDO (logps, mean p_w)", "DRDO (logps, standardised Oracle)",
                "DRDO (logps, mean p_w, standardised Oracle)"]
HEADLINE = [*METHODS, *RIVALS[2:], NO_REFERENCE[1]]

# AdamW does not see a loss's scale. So the contrastive term is alone at alpha 10000.
BETAS = ["--beta 0.5", "--beta 1", "--beta 10"]
ABLATION = {
    "DPO": BETAS,
    "DRDO (head)": ["--alpha 0", "--alpha 1", "--alpha 10000", "--gamma 0", "--gamma 1", "--gamma 5",
                    "--detach_focal"],
    "DRDO (logps)": ["--alpha 0", "--alpha 1", "--beta 0.1", *BETAS],
    "DRDO (log ratio)": ["--alpha 1", "--gamma 0", "--gamma 5", *BETAS],
    "e-DPO (Oracle)": BETAS}
VARIANTS = [*ABLATION, *(f"{name} {flag}" for name, flags in ABLATION.items() for flag in flags)]
NO_LABELS = ["DRDO (head) --alpha 0", "DRDO (logps) --alpha 0"]  # they read no label

# A further Oracle, "others", has learned from other pairs. Further splits are D_all's pairs with a "shorter",
# "equal" or "longer" winner, by words; and "relabelled", D_all in the order of the Oracle.
setting = partial(common.setting, pairs=6000, steps=100, methods=[*METHODS])
SETTINGS = {
    "clean_all": setting(methods=HEADLINE),
    "noisy_lc_le": setting(0.4, "lc_le", methods=HEADLINE),
    "steps_300": setting(0.4, "lc_le", steps=300, methods=LONG),
    "steps_1000": setting(0.4, "lc_le", steps=1000, methods=[*LONG, *RIVALS, NO_REFERENCE[-1]]),
    **{f"grid_{flip}_{who}": setting(flip, oracle=who, methods=[*GRID_METHODS, *RIVALS])
       for who in ("learned", "true") for flip in (0.0, 0.2, 0.4)},
    "ablation": setting(methods=VARIANTS),
    **{f"clean_{split}": setting(split=split, methods=GRID_METHODS) for split in ("hc_he", "lc_le")},
    **{f"winners_{which}": setting(split=which, methods=MAIN) for which in ("shorter", "equal", "longer")},
    **{f"pairs_{n}": setting(0.2, pairs=n, methods=MAIN) for n in (500, 1500)},
    "labels_own": setting(oracle="others", methods=[*MAIN, *NO_LABELS]),
    "labels_oracle": setting(oracle="others", split="relabelled", methods=[*MAIN, *NO_LABELS])}
SEEDS = [20, 21, 22, 23, 24]
CHOOSING_SEEDS = [90, 91]
CHOOSING_SETTINGS = ["clean_all", "noisy_lc_le"]
BETA = ["--beta 0.03", "--beta 0.1", "--beta 0.3"]
GRID = {  # by the first of these flags that a method has
    "--label_smoothing": [f"--learning_rate 1e-4 {beta} --label_smoothing {share}"
                          for beta in BETA for share in SHARES],
    "--beta": [f"--learning_rate {rate} {beta}" for rate in (1e-4, 5e-4) for beta in BETA],
    "": [f"--learning_rate {rate}" for rate in (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3)]}

START = "SFT"
MODEL = None
OUT = "out/lab"
DOMAINS = {"posts": ["test"], "articles": ["articles"]}
COLUMNS = ["true", "tokens", "eos", "logps/chosen", "logps/rejected"]
KEEP_MODELS = True  # they are small
SHARED = {"eval_data": "", "save_steps": 0, "warmup_steps": 10, "dtype": "fp32"}
ORACLE = {"batch_size": 16, "learning_rate": 2e-3, "max_steps": 400}
MEMBER = {"max_steps": 250}  # of e-DPO's ensemble
POLICY = {"batch_size": 24, "micro_batch_size": 24}

true_reward = toy.true_reward


def measure(folder, rows):
    return {}


# ---- data, Oracles and answers -----------------------------------------------------------------------------

def prepare(seed, home, args):
    """Makes a seed's base LM, SFT policy and prompts."""
    stage(toy, home, "/base/config.json", seed=seed, prompts=250)
    stage(splits, f"{home}/data", "/prompts/articles.jsonl", seed=seed, dataset=f"{home}/raw/sft.jsonl",
          prompts=[f"{home}/raw/test.jsonl", f"{home}/raw/articles.jsonl"])
    stage(sft, f"{home}/start", "/model.safetensors", model=f"{home}/base", **SHARED, seed=seed,
          data=f"{home}/data/sft/train.jsonl", batch_size=32, max_steps=150, learning_rate=1e-3)
    with open(f"{home}/prompts.jsonl", "w") as file:
        for name in ("test", "articles"):
            file.write(Path(f"{home}/data/prompts/{name}.jsonl").read_text())
    answer(seed, home, f"{home}/start", f"{home}/start", args)


def make_pairs(seed, home, setting, args):
    world, data, _ = places(home, setting)
    raw = f"{world}/comparisons.jsonl"
    if not os.path.exists(raw):
        os.makedirs(world, exist_ok=True)
        toy.write_jsonl(raw, toy.make_comparisons(setting["pairs"], seed, setting["labels"]))
    stage(splits, f"{world}/data", "/lc_le/train.jsonl", dataset=raw, seed=seed)
    os.makedirs(os.path.dirname(data), exist_ok=True)
    if setting["split"] in ("shorter", "equal", "longer") and not os.path.exists(data):
        keep_winners(f"{world}/data/all/train.jsonl", setting["split"], data)


def keep_winners(data, which, out):
    """Writes the rows whose chosen response has fewer words than the rejected (shorter), as many, or more."""
    sign = {"shorter": -1, "equal": 0, "longer": 1}[which]
    kept = []
    for row in read_rows(data):
        if np.sign(len(row["chosen"].split()) - len(row["rejected"].split())) == sign:
            kept.append(row)
    toy.write_jsonl(out, kept)


def other_oracle(seed, home, setting, reward_model, args):
    """The folder of an Oracle of as many other pairs, of other posts."""
    world, *_ = places(home, setting)
    data = f"{world}/other_pairs.jsonl"
    if not os.path.exists(data):
        toy.write_jsonl(data, toy.make_pairs(setting["pairs"], seed + 500, setting["labels"]))
    return reward_model(f"{world}/other_oracle", data=data)


def answer(seed, home, out, policy, args):
    stage(generate, f"{out}/generations.jsonl", model=policy, prompts=f"{home}/prompts.jsonl", seed=seed,
          temperature=0.7, max_new_tokens=48, micro_batch_size=125, dtype="fp32")


if __name__ == "__main__":
    common.run(sys.modules[__name__])
