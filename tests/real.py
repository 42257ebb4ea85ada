"""The study on a pretrained LM, judged by a true reward: does what tests/lab.py finds hold there?

The task is controlled sentiment, as in the DPO paper (arXiv 2305.18290, section 6.1). The responses are the
LM's own samples. The true reward of an answer is a program: the sentiment that vaderSentiment reads in it, -1
to 1. So labels and Oracles can be as good or as bad as we like. What is already there does not run again.
A tie counts half a win. Intervals are 95%: Student's t over the seeds' means, or over the prompts of a single
seed. Those of win rates end at 0 and 1.

    pip install vaderSentiment==3.3.2
    python tests/real.py --model SmolLM2-135M-Instruct    # a folder or a hub name; hours; its bar estimates
    python tests/real.py --model FOLDER --cells clean_all --methods "DPO" "DRDO (head)" --seeds 0
    python tests/real.py --model FOLDER --choose          # learning rates and betas, on a seed not reported
    python tests/real.py --report --picture frontier.png  # what is there; trains nothing
    python tests/real.py --model FOLDER --terms --cells clean_all noisy_lc_le    # gradients of Eq. 6's terms

Out: out/real/seed<k>/ and out/real/results.json (of the last call); the tables on stdout.
"""
import argparse
import itertools
import math
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import numpy as np
import torch
import transformers  # before lab, which takes the hub away
from tqdm import tqdm

import lab  # it says where the stages are
from lab import align, generate, oracle, precompute_rewards, sft, splits
from lab import interval, print_row, print_settings, print_title, read_rows, save_truth, stage
from toy import fail, write_jsonl

# ---- the study ---------------------------------------------------------------------------------------------

# Here are the settings. Names, flags and whose rewards a method learns are lab.py's. --choose tries four
# settings a method. Use the one that wins most against the start by the true reward, over CHOOSING_CELLS.
# DPO + NLL takes DPO's, e-DPO takes e-DPO (Oracle)'s. The others were chosen so.
WITH_BETA = [f"--learning_rate {rate} --beta {beta}" for rate in (5e-5, 1e-4) for beta in (0.03, 0.1)]
WITHOUT_BETA = [f"--learning_rate {rate}" for rate in (2e-5, 5e-5, 1e-4, 2e-4)]
METHODS = {
    "SFT on winners": "--learning_rate 5e-5", "DPO": "--learning_rate 1e-4 --beta 0.03",
    "DPO + NLL": "--learning_rate 1e-4 --beta 0.03", "IPO": "--learning_rate 5e-5 --beta 0.03",
    "e-DPO": "--learning_rate 1e-4 --beta 0.03", "e-DPO (Oracle)": "--learning_rate 1e-4 --beta 0.03",
    "DRDO (head)": "--learning_rate 1e-4", lab.RECOMMENDED: "--learning_rate 1e-4 --beta 0.03"}
DIAL = ["DPO", "e-DPO (Oracle)", lab.RECOMMENDED]  # the Oracle's quality and the number of pairs change


def cell(labels=0.0, split="all", oracle="learned", pairs=800, steps=16, methods=[*METHODS]):
    """labels: the share that is flipped, or "bt": drawn from Bradley-Terry. oracle: learned from the same
    labels, from "four_times" the pairs, or the "truth". pairs: before splits.py holds a tenth out."""
    return locals()


CELLS = {
    "clean_all": cell(),
    "bradley_terry": cell("bt", methods=DIAL),
    "noisy_all": cell(0.4, methods=DIAL),
    **{f"noisy_all_{who}": cell(0.4, "all", who, methods=DIAL) for who in ("truth", "four_times")},
    "noisy_lc_le": cell(0.4, "lc_le"),
    "noisy_lc_le_truth": cell(0.4, "lc_le", "truth", methods=DIAL),
    "noisy_4_epochs": cell(0.4, "lc_le", steps=48, methods=["DPO", lab.RECOMMENDED])}
SEEDS, CHOOSING_SEEDS, CHOOSING_CELLS = [0, 1, 2], [90], ["clean_all"]
PROMPTS, SAMPLES, TEST = 160, 4, 64  # training prompts of a seed, responses to each; test prompts a domain
TOKENS = 40  # of an answer at most
ORACLE_STEPS = 40  # four times as many for four times the pairs
BT_SCALE = 4  # Bradley-Terry: P(the better one wins) = sigma(4 x gap of the true rewards)
SHARED = {"eval_data": "", "save_steps": 0, "batch_size": 16, "micro_batch_size": 16,
          "dtype": "auto"}  # bf16 where the processor has it; stage() samples in fp32
OPPONENTS = ["start", "DPO", "e-DPO (Oracle)"]
PICTURE = {"clean_all": "clean labels, D_all", "noisy_lc_le": "40% of the labels flipped"}

SYSTEM = "Answer briefly."  # the system message: shorter than the one in SmolLM2's chat template
TEMPLATES = """Write a short review of {}.|How did it go with {}? Answer briefly.|What do you think about {}?
Tell a friend about {} in two sentences.|Describe {} in one sentence.|Write a diary entry about {}.
Write a short message about {}.|Give your honest opinion of {}.|What happened with {}?|Say something about {}.
Write a comment on {} for a forum.|How do you feel about {}?|Write the first lines of a story about {}."""
TOPICS = """the new coffee machine, a rainy weekend, my first day at work, the bus ride home, our hotel
room, the school play, a visit to the dentist, the new neighbours, the office party, a walk in the park, the
old car, the train to the coast, a job interview, the football match, the local library, my sister's
wedding, the new phone, a long flight, the corner bakery, a broken window, the math exam, the summer camp,
the cooking class, a power cut, the museum tour, the morning commute, a lost suitcase, the birthday cake,
the swimming lesson, the garden fence, the tax form, a visit to my parents, the science fair, the new boss,
a trip to the market, the street musicians, the camping trip, a noisy upstairs flat, the hospital stay, the
evening news, the old bridge, the dance class, a parking ticket, the vegetable soup, the online order, the
winter coat, the chess club, the customer service, a night at the opera, the house move, the broken heater,
the school bus, a day at the beach, the bicycle repair, the team meeting, the town festival, a weekend in
the mountains, the film about pirates, the guitar lesson, the new carpet, the book club, a visit to the zoo,
the class reunion, the airport queue, the garden party, the second-hand sofa, the fishing trip, a blind
date, the history lecture, the ice rink, the charity run, a thunderstorm at night, the pizza delivery, the
language course, a day without internet, the hotel breakfast, the new haircut, the lawn mower, the jazz
concert, the ferry crossing"""
NEW_TOPICS = """the flower shop, a flat tyre, the pottery class, the moving company, the village fair, my
new glasses, the night shift, the rented cabin, a traffic jam, the piano recital, the puppy, the washing
machine, the election, the tennis court, a snowy morning, the noodle restaurant, the driving test, the city
tour, the leaking roof, the computer game, the farmers' market, a cold shower, the job offer, the yoga
retreat, the wooden table, the exhibition, the school lunch, a camping stove, the radio show, the broken
elevator, the boat trip, the apple pie, a late train, the gym membership"""


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag, either = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    flag("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct",
         help="the start: a folder or a hub name (default: %(default)s)")
    flag("--out", type=os.path.abspath, default="out/real",
         help="folder to write; give each --model its own (default: %(default)s)")
    either("--choose", action="store_true", help=f"try all settings (default seeds: {CHOOSING_SEEDS})")
    either("--report", action="store_true", help="train nothing: the tables of what is there")
    either("--terms", action="store_true", help="train nothing: the sizes of Eq. 6's terms at the start")
    flag("--picture", metavar="PNG", help="draw reward over KL of clean_all and noisy_lc_le")
    flag("--seeds", type=int, nargs="+", help=f"each its own prompts, samples and labels (default: {SEEDS})")
    flag("--cells", nargs="+", choices=CELLS, metavar="CELL", help=f"of {', '.join(CELLS)} (default: all)")
    flag("--methods", nargs="+", choices=METHODS, metavar="METHOD", default=list(METHODS),
         help=f"only these (default: all), each in quotes: {'; '.join(METHODS)}")
    flag("--workers", type=int, default=1,
         help="seeds at a time, a thread and about 4 GB each (default: %(default)s)")
    args = parser.parse_args()
    if os.path.isdir(args.model):
        args.model = os.path.abspath(args.model)  # the stages run in another folder
    args.seeds = args.seeds or (CHOOSING_SEEDS if args.choose else SEEDS)
    args.cells = args.cells or (CHOOSING_CELLS if args.choose else CELLS)
    if args.picture and not set(PICTURE) <= set(args.cells):
        fail(f"--picture: it draws {' and '.join(PICTURE)}; name both in --cells")
    args.homes = [f"{args.out}/seed{seed}" for seed in args.seeds]
    return args


def main():
    args = parse_args()
    true_reward("")  # says now if it is missing
    cells = {name: CELLS[name] | {"methods": methods} for name in args.cells if (methods := [
        m for m in (METHODS if args.choose else CELLS[name]["methods"]) if m in args.methods])}
    if not cells:
        fail("--methods: --cells trains none of them; name another cell")
    if args.choose:
        return choose(args, cells)
    if args.terms:
        for name, cell in cells.items():  # on one step's pairs
            starts = [(args.model, *places(home, cell)[1:], seed)
                      for seed, home in zip(args.seeds, args.homes)]
            lab.terms(name, {"start": starts}, SHARED["batch_size"])
        return
    if not args.report:
        train(args, cells, {name: [setting] for name, setting in METHODS.items()})
    results = {name: judge(cell, args.homes) for name, cell in tqdm(cells.items(), "judging")}
    results = {name: figures for name, figures in results.items() if len(figures) > 1}
    if not results:
        fail(f"{args.out}: it has none of these policies; train them, without --report")
    report(args.out, results)
    if args.picture:
        draw_frontier(args.picture, results)


# ---- data, Oracles and policies ----------------------------------------------------------------------------

def train(args, cells, settings):
    """Trains and samples each cell's methods for every seed, with each of settings, {method: [flags]}."""
    def one(seed, home):
        prepare(seed, home, args.model)
        for cell in cells.values():
            rewards = teach(seed, home, cell, args.model)
            for method, setting in [(m, s) for m in cell["methods"] for s in settings[m]]:
                if train_policy(seed, home, cell, method, setting, rewards, args):
                    bar.update()
                else:  # it was there: the bar estimates the others
                    bar.total -= 1

    total = len(args.seeds) * sum(len(settings[m]) for cell in cells.values() for m in cell["methods"])
    with tqdm(total=total, desc="policies", smoothing=0) as bar, ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(one, args.seeds, args.homes))


def prepare(seed, home, model):
    """Writes a seed's prompts and the start's answers to the test prompts."""
    if not os.path.exists(f"{home}/test.jsonl"):
        os.makedirs(home, exist_ok=True)
        known, new = make_prompts(TOPICS, "known", seed), make_prompts(NEW_TOPICS, "new", seed)
        write_jsonl(f"{home}/prompts.jsonl", known[:PROMPTS])
        write_jsonl(f"{home}/more_prompts.jsonl", known[PROMPTS:4 * PROMPTS])
        write_jsonl(f"{home}/test.jsonl", known[-TEST:] + new[:TEST])
    answer(seed, home, f"{home}/start", model, model)


def make_prompts(topics, domain, seed):
    """Every template with every topic, rows in the seed's order."""
    texts = [template.format(topic) for topic in " ".join(topics.split()).split(", ")
             for template in re.split(r"[|\n]", TEMPLATES)]
    random.Random(seed).shuffle(texts)
    return [{"prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}],
             "domain": domain} for text in texts]


def teach(seed, home, cell, model):
    """Makes a cell's pairs and the rewards that its methods learn: {"oracle": file, "ensemble": file}."""
    world, data, rewards = places(home, cell)
    ensemble = rewards.replace(".pt", "_ensemble.pt")

    def reward_model(world, name="oracle", **flags):
        stage(oracle, f"{world}/{name}", "/model.safetensors", **SHARED, **{
            "model": model, "data": f"{world}/data/all/train.jsonl", "seed": seed, "learning_rate": 2e-4,
            "max_steps": ORACLE_STEPS, **flags})
        return f"{world}/{name}"

    def score(oracles, data, out):
        stage(precompute_rewards, out, oracle=oracles, data=data, dtype="auto")

    make_pairs(seed, home, cell, model)
    judge = teacher = reward_model(world)
    score(judge, f"{home}/start/generations.jsonl", f"{world}/start.pt")
    score(judge, f"{world}/data/all/validation.jsonl", f"{world}/validation.pt")
    if cell["oracle"] == "four_times":
        larger = cell | {"pairs": 4 * cell["pairs"]}
        make_pairs(seed, home, larger, model)
        more, *_ = places(home, larger)
        teacher = reward_model(more, max_steps=4 * ORACLE_STEPS)
        score(teacher, f"{more}/data/all/validation.jsonl", f"{more}/validation.pt")
    if cell["oracle"] != "truth":
        score(teacher, data, rewards)
    elif not os.path.exists(rewards):
        save_truth(data, rewards, lambda row, key: row[f"{key}_reward"])
    if "e-DPO" in cell["methods"] and not os.path.exists(ensemble):
        members = [reward_model(world, f"reward_model_{k}", alpha=0, seed=seed + 1000 * k) for k in (1, 2, 3)]
        score(members, data, ensemble)
    return {"oracle": rewards, "ensemble": ensemble}


def places(home, cell):
    """(the folder of a cell's labels, the file of its pairs, of its Oracle's rewards)."""
    world = f"{home}/labels_{cell['labels']}_pairs_{cell['pairs']}"
    return world, f"{world}/data/{cell['split']}/train.jsonl", f"{world}/{cell['split']}_{cell['oracle']}.pt"


def make_pairs(seed, home, cell, model):
    """Samples responses to the prompts, pairs and labels them, and cuts D_all and D_lc,le."""
    world, *_ = places(home, cell)
    names = ["prompts", "more_prompts"] if cell["pairs"] > PROMPTS * math.comb(SAMPLES, 2) else ["prompts"]
    for name, k in itertools.product(names, range(SAMPLES)):
        stage(generate, f"{home}/samples/{name}_{k}.jsonl", model=model, prompts=f"{home}/{name}.jsonl",
              seed=1000 * seed + k, temperature=1.0, top_p=1.0, max_new_tokens=TOKENS, micro_batch_size=120)
    if not os.path.exists(f"{world}/pairs.jsonl"):
        os.makedirs(world, exist_ok=True)
        samples = [sum((read_rows(f"{home}/samples/{name}_{k}.jsonl") for name in names), [])
                   for k in range(SAMPLES)]
        write_jsonl(f"{world}/pairs.jsonl", label(samples, cell["labels"], cell["pairs"], seed))
    stage(splits, f"{world}/data", "/lc_le/train.jsonl", dataset=f"{world}/pairs.jsonl", seed=seed)


def label(samples, labels, pairs, seed):
    """Up to so many labelled pairs of responses whose true rewards differ. samples: k lists of rows, prompts
    in one order. `confidence` is the gap of the true rewards, whatever the label says."""
    rows, generator = [], random.Random(seed + 1)
    for answers in zip(*samples):
        scored = [(true_reward(row["response"]), row) for row in answers]
        rows += [{"prompt": w["prompt"], "chosen": w["response"], "rejected": l["response"],
                  "chosen_reward": high, "rejected_reward": low, "confidence": round(high - low, 4)}
                 for (high, w), (low, l) in itertools.permutations(scored, 2) if high > low]
    random.Random(seed).shuffle(rows)  # the same pairs under all labels
    for row in rows[:pairs]:
        wrong = 1 / (1 + math.exp(BT_SCALE * row["confidence"])) if labels == "bt" else labels
        if generator.random() < wrong:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
            row["chosen_reward"], row["rejected_reward"] = row["rejected_reward"], row["chosen_reward"]
    return rows[:pairs]


def train_policy(seed, home, cell, method, setting, rewards, args):
    """Trains, samples and scores one method of a cell. Returns whether it did: what is there stays. To choose
    settings the answers at T = 0.7 are enough."""
    flags, learns, _ = lab.METHODS[method]
    world, data, _ = places(home, cell)
    folder = policy_folder(home, cell, method, setting)
    if os.path.exists(f"{folder}/{'generations.jsonl' if args.choose else 'rewards.pt'}"):  # the last
        return False
    oracle_flags = {"oracle_rewards": rewards[learns]} if learns else {}
    stage(align if flags else sft, folder, "/model.safetensors", *setting.split(), *flags.split(), **SHARED,
          **oracle_flags, model=args.model, data=data, seed=seed, max_steps=cell["steps"])
    answer(seed, home, folder, folder, args.model, args.choose)
    if not args.choose:
        stage(precompute_rewards, f"{folder}/rewards.pt", oracle=f"{world}/oracle",
              data=f"{folder}/generations.jsonl", dtype="auto")
    os.remove(f"{folder}/model.safetensors")  # half a gigabyte; the answers and their scores stay
    return True


def policy_folder(home, cell, method, setting=None):
    """One policy serves every cell that asks for it. Without the Oracle a method does not depend on it."""
    if method == "start":
        return f"{home}/start"
    who = cell["oracle"] if lab.METHODS[method][1] == "oracle" else "any"
    name = re.sub(r"[^\w.+-]+", "_", f"{method} {setting or METHODS[method]}")
    return f"{places(home, cell)[0]}/{cell['split']}_{who}_{cell['steps']}/{name}"


def answer(seed, home, out, policy, model, wins_alone=False):
    """Answers the test prompts at T = 0.7 (generations.jsonl: the wins), the first half, known topics, at
    T = 1 (samples.jsonl: the KL), without top-p: it sorts the vocabulary, slowly. Then their log-probs."""
    for name, temperature, prompts in ("generations", 0.7, 0), ("samples", 1.0, TEST):
        stage(generate, f"{out}/{name}.jsonl", model=policy, prompts=f"{home}/test.jsonl", seed=seed,
              temperature=temperature, top_p=1.0, num_prompts=prompts, max_new_tokens=TOKENS,
              micro_batch_size=64, generator=os.path.basename(out))
        if wins_alone:
            return
    scores = argparse.Namespace(main=lambda: write_logps(out, policy, model), __name__="real", __file__="")
    stage(scores, f"{out}/logps.json")


def write_logps(out, policy, model):
    """Writes logps.json: log pi(y|x), lists in the rows' order. `answers`: of generations.jsonl under the
    start, `tokens`: their lengths. `start` and `policy`: of samples.jsonl under each of the two."""
    transformers.logging.disable_progress_bar()
    args, saved = argparse.Namespace(dtype="auto"), {}
    device, *_ = align.init_process(args)
    for who, folder in ("start", model), ("policy", policy):
        tokenizer, lm = align.load_model(folder)
        scorer = sft.ResponseModel(lm.to(device), bf16=args.dtype == "bf16")
        for name, rows in {"answers": "generations", who: "samples"}.items():
            if name not in saved:
                saved[name], lengths = log_probs(scorer, tokenizer, read_rows(f"{out}/{rows}.jsonl"))
                saved.setdefault("tokens", lengths)  # the answers', which come first
    write_jsonl(f"{out}/logps.json", [saved])
    torch.distributed.destroy_process_group()


@torch.no_grad()
def log_probs(scorer, tokenizer, rows):
    """(log pi(y|x), number of tokens) of each generated row, two lists. What was cut off has no EOS."""
    prompts = [align.encode_prompt(tokenizer, row["prompt"]) for row in rows]
    answers = [align.encode_response(tokenizer, row["response"])[:None if row["eos"] else -1] for row in rows]
    examples = list(zip(prompts, answers))
    logps = [scorer(examples[i:i + 32]) for i in range(0, len(examples), 32)]
    return torch.cat(logps).tolist(), list(map(len, answers))


# ---- verdicts ----------------------------------------------------------------------------------------------

@cache
def sentiment():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # for this study alone
    except ImportError:
        fail("vaderSentiment, the true reward, is missing: pip install vaderSentiment==3.3.2")
    return SentimentIntensityAnalyzer()


def true_reward(text):
    """The compound score of vaderSentiment, -1 (negative) to 1 (positive)."""
    return sentiment().polarity_scores(text)["compound"]


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


def true_rewards(folder):
    """The true rewards of a policy's answers to the test prompts."""
    return np.array([true_reward(row["response"]) for row in read_rows(f"{folder}/generations.jsonl")])


def read(home, cell, method, setting=None):
    """What is known of a policy's answers, {name: array over prompts}; None where the policy is not there."""
    folder = policy_folder(home, cell, method, setting)
    rewards = f"{places(home, cell)[0]}/start.pt" if method == "start" else f"{folder}/rewards.pt"
    if not os.path.exists(rewards):
        return None
    rows, samples = read_rows(f"{folder}/generations.jsonl"), read_rows(f"{folder}/samples.jsonl")
    logps = {name: np.array(values) for name, values in read_rows(f"{folder}/logps.json")[0].items()}
    texts = [row["response"] for row in rows]
    return {"true": true_rewards(folder),
            "once": np.array([true_reward(once(text)) for text in texts]),
            "oracle": torch.load(rewards, weights_only=True)["response"][0].numpy(),
            "new": np.array([row["domain"] == "new" for row in rows]),
            **{name: np.array([row[name] for row in rows], float) for name in ("tokens", "eos")},
            "distinct": np.array([distinct_2(texts)]),
            "perplexity": np.exp(-logps["answers"].sum(keepdims=True) / logps["tokens"].sum()),
            "kl": logps["policy"] - logps["start"],
            "sampled": np.array([true_reward(row["response"]) for row in samples])}


def judge(cell, homes):
    """{method: its figures in a cell}, of the policies that are there. [mean, low, high] of what read()
    gives, and of win rates: "<opponent>" by the truth, "<opponent>/new" on new topics, "<opponent>/oracle" by
    the Oracle of the cell's labels. "by_seed": KL and reward of the samples."""
    figures, policies = {}, {method: {home: policy for home in homes if (policy := read(home, cell, method))}
                             for method in ["start", *cell["methods"]]}
    policies = {method: by_home for method, by_home in policies.items() if by_home}
    for method, ours in policies.items():
        row = figures[method] = {"seeds": [home.rpartition("seed")[2] for home in ours], "by_seed": [
            [policy["kl"].mean(), policy["sampled"].mean()] for policy in ours.values()]}
        for other, theirs in policies.items():
            both = [(ours[home], theirs[home]) for home in ours if home in theirs]
            if other != method and both:
                rates = {other: [wins(a, b) for a, b in both],
                         f"{other}/new": [wins(a, b)[a["new"]] for a, b in both],
                         f"{other}/oracle": [wins(a, b, "oracle") for a, b in both]}
                row |= {name: np.clip(interval(rate), 0, 1).tolist() for name, rate in rates.items()}
        for name in ("true", "once", "tokens", "eos", "distinct", "perplexity", "kl", "sampled"):
            row[name] = interval([policy[name] for policy in ours.values()])
    if "start" in figures:
        taught = [home for home in policies["start"] if os.path.exists(places(home, cell)[2])]
        figures["start"]["oracle"] = [oracle_right(home, cell) for home in taught]
    return figures


def wins(ours, theirs, by="true"):
    """Of each prompt 1, 0.5 or 0: our answer's reward is above, equal to or below theirs."""
    return (np.sign(ours[by] - theirs[by]) + 1) / 2


def oracle_right(home, cell):
    """How often a cell's Oracle prefers the truly better response: of held-out pairs, of the policies' pairs;
    and the std of its differences on these."""
    _, data, rewards = places(home, cell)
    world, *_ = places(home, cell | {"pairs": 4 * cell["pairs"]} if cell["oracle"] == "four_times" else cell)
    right = []
    for path, scores in (f"{world}/data/all/validation.jsonl", f"{world}/validation.pt"), (data, rewards):
        saved = torch.load(scores, weights_only=True)
        margins = (saved["chosen"] - saved["rejected"])[0].numpy()
        truth = np.array([row["chosen_reward"] - row["rejected_reward"] for row in read_rows(path)])
        right.append(float(((margins > 0) == (truth > 0)).mean()))
    return [1.0 if cell["oracle"] == "truth" else right[0], right[1], float(margins.std())]


def report(out, results):
    """Prints the tables and writes results.json. results: {cell: judge()'s figures}."""
    means = {"true reward, each word once": ("true once", "{:.2f}, {:.2f}"),
             "tokens, EOS": ("tokens eos", "{:.1f}, {:.2f}"), "distinct-2": ("distinct", "{:.2f}"),
             "perplexity": ("perplexity", "{:.1f}"), "KL, reward at T = 1": ("kl sampled", "{:.1f}, {:.2f}")}
    for name, figures in results.items():
        print("\n## {}: labels {labels}, {split}, Oracle {oracle}, {pairs} pairs, {steps} steps\n".format(
            name, **CELLS[name]))
        print("By seed: the Oracle is right on held-out pairs, on the policies' pairs; std of differences:",
              "; ".join("{:.2f}, {:.2f}, {:.2f}".format(*row) for row in figures["start"]["oracle"]), "\n")
        rates = {f"against {other}": other for other in OPPONENTS if other in figures} | {
            "new topics": "start/new", "by the Oracle": "start/oracle"}
        print_title("method", "seeds", *rates, *means)
        for method, row in figures.items():
            print_row(method, ", ".join(row["seeds"]),
                      *("{:.2f} [{:.2f}, {:.2f}]".format(*row[rate]) if rate in row else ""
                        for rate in rates.values()),
                      *(form.format(*(row[key][0] for key in keys.split())) for keys, form in means.values()))
    write_jsonl(f"{out}/results.json", [results])
    print(f"\nwrote {out}/results.json")


def draw_frontier(path, results):
    """True reward of a policy's own samples over their KL to the start: a dot a seed, a ring their mean."""
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained", sharey=True)
    for panel, (name, title) in zip(panels, PICTURE.items()):
        for method, row in results.get(name, {}).items():
            color, (kl, reward) = f"C{['start', *METHODS].index(method)}", np.array(row["by_seed"]).T
            panel.plot(kl, reward, f"{color}.")
            panel.plot(kl.mean(), reward.mean(), f"{color}o", fillstyle="none", markersize=12, label=method)
        panel.set(title=title, xlabel="KL to the start, nats an answer (T = 1)")
    panels[0].set_ylabel("true reward of an answer (T = 1)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    lab.save(figure, path)


def choose(args, cells):
    """Runs every setting of every method. Marks the one that wins most against the start."""
    settings = {name: WITH_BETA if "--beta" in setting else WITHOUT_BETA for name, setting in METHODS.items()}
    train(args, cells, settings)
    print_title("method", "setting", "mean", *(f"{name}, {seed}" for name in cells for seed in args.seeds))
    for method in args.methods:
        rates = {setting: [] for setting in settings[method]}
        for setting, cell, home in itertools.product(rates, cells.values(), args.homes):
            folders = policy_folder(home, cell, method, setting), f"{home}/start"
            rates[setting].append(wins(*({"true": true_rewards(folder)} for folder in folders)).mean())
        print_settings(method, rates)


if __name__ == "__main__":
    main()
