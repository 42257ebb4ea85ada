"""The study on a pretrained LM, judged by a true reward: does what tests/lab.py finds hold there?

The task is the DPO paper's controlled sentiment (arXiv 2305.18290, section 6.1). The responses are the LM's own
samples. The true reward of an answer is a program: the sentiment that vaderSentiment reads in it, -1 to 1. So
labels, noise and Oracles can be made as good or as bad as we like. Stages run one after the other, in forked
processes, on one thread. What is already there does not run again.

    pip install vaderSentiment==3.3.2
    python tests/real.py --model SmolLM2-135M-Instruct    # a folder or a hub name; hours; its bar estimates
    python tests/real.py --model FOLDER --cells clean_all --methods "DPO" "DRDO (head)" --seeds 0
    python tests/real.py --model FOLDER --choose          # learning rates and betas, on a seed not reported
    python tests/real.py --report                         # the tables of what is there; trains nothing

Out: out/real/seed<k>/, out/real/results.json and frontier.png; the tables on stdout.

A tie counts half a win. Intervals are 95%, by Student's t over the seeds' means; of one seed, over prompts.
"""
import argparse
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers  # before lab, which takes the hub away
from tqdm import tqdm

import lab  # before the stages, since it says where they are
import align
import generate
import oracle
import precompute_rewards
import sft
import splits
from lab import fail, print_row, print_title, read_rows, stage
from toy import write_jsonl

# ---- the study ---------------------------------------------------------------------------------------------

# Names, flags and whose rewards a method learns are lab.py's. Here are the settings. Every method trains for
# the cell's steps. --choose tries six settings a method: of learning rate and beta, or of the rate alone. The
# one that wins most against the start, by the true reward, on average over CHOOSING_CELLS, is used everywhere.
WITH_BETA = [f"--learning_rate {rate} --beta {beta}" for rate in (1e-4, 2e-4) for beta in (0.03, 0.1, 0.3)]
WITHOUT_BETA = [f"--learning_rate {rate}" for rate in (2e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4)]
METHODS = {
    "SFT on winners": "--learning_rate 2e-4",
    "DPO": "--learning_rate 2e-4 --beta 0.1",
    "e-DPO (Oracle)": "--learning_rate 2e-4 --beta 0.1",
    "DRDO (head)": "--learning_rate 2e-4",
    lab.RECOMMENDED: "--learning_rate 2e-4 --beta 0.03",
    "DPO + NLL": "--learning_rate 2e-4 --beta 0.1",
    "IPO": "--learning_rate 2e-4 --beta 0.1",
    "e-DPO": "--learning_rate 2e-4 --beta 0.1",
}
DIAL = ["DPO", "e-DPO (Oracle)", lab.RECOMMENDED]  # what the Oracle's quality is tried on


def cell(labels=0.0, split="all", oracle="learned", pairs=800, steps=16, oracle_steps=40, methods=[*METHODS]):
    """labels: the share that is flipped, or "bt": drawn from Bradley-Terry. oracle: learned from the same
    labels, from "four_times" the pairs and steps, or the "truth". pairs: before splits.py holds out a tenth."""
    return locals()


CELLS = {
    "clean_all": cell(),
    "noisy_lc_le": cell(0.4, "lc_le"),
    **{f"noisy_{who}": cell(0.4, "lc_le", who, methods=DIAL) for who in ("four_times", "truth")},
    "pairs_200": cell(pairs=200, methods=DIAL),  # for as many steps: the Oracle reads each pair four times
    "bradley_terry": cell("bt"),
    "noisy_4_epochs": cell(0.4, "lc_le", steps=48),
}
SEEDS, CHOOSING_SEEDS, CHOOSING_CELLS = [0, 1, 2], [90], ["clean_all", "noisy_lc_le"]
BT_SCALE = 4  # Bradley-Terry: P(the better one wins) = sigma(4 x gap of true rewards)
PROMPTS, SAMPLES, TEST = 160, 4, 64  # training prompts of a seed, responses to each; test prompts a domain
TOKENS = 40  # of an answer at most
SYSTEM = "Answer briefly."  # the system message: shorter than the one of SmolLM2's chat template
SHARED = {"eval_data": "", "save_steps": 0, "batch_size": 16, "micro_batch_size": 16, "dtype": "auto"}
OPPONENTS = ["start", "DPO", "e-DPO (Oracle)"]

TEMPLATES = """Write a short review of {}.|How did it go with {}? Answer briefly.|What do you think about {}?
Tell a friend about {} in two sentences.|Describe {} in one sentence.|Write a diary entry about {}.
Write a short message about {}.|Give your honest opinion of {}.|What happened with {}?|Say something about {}.
Write a comment on {} for a forum.|How do you feel about {}?|Write the first lines of a story about {}."""
TOPICS = """the new coffee machine, a rainy weekend, my first day at work, the bus ride home, our hotel room,
the school play, a visit to the dentist, the new neighbours, the office party, a walk in the park, the old car,
the train to the coast, a job interview, the football match, the local library, my sister's wedding,
the new phone, a long flight, the corner bakery, a broken window, the math exam, the summer camp, the cooking class,
a power cut, the museum tour, the morning commute, a lost suitcase, the birthday cake, the swimming lesson,
the garden fence, the tax form, a visit to my parents, the science fair, the new boss, a trip to the market,
the street musicians, the camping trip, a noisy upstairs flat, the hospital stay, the evening news, the old bridge,
the dance class, a parking ticket, the vegetable soup, the online order, the winter coat, the chess club,
the customer service, a night at the opera, the house move, the broken heater, the school bus, a day at the beach,
the bicycle repair, the team meeting, the town festival, a weekend in the mountains, the film about pirates,
the guitar lesson, the new carpet, the book club, a visit to the zoo, the class reunion, the airport queue,
the garden party, the second-hand sofa, the fishing trip, a blind date, the history lecture, the ice rink,
the charity run, a thunderstorm at night, the pizza delivery, the language course, a day without internet,
the hotel breakfast, the new haircut, the lawn mower, the jazz concert, the ferry crossing"""
NEW_TOPICS = """the flower shop, a flat tyre, the pottery class, the moving company, the village fair, my new glasses,
the night shift, the rented cabin, a traffic jam, the piano recital, the puppy, the washing machine, the election,
the tennis court, a snowy morning, the noodle restaurant, the driving test, the city tour, the leaking roof,
the computer game, the farmers' market, a cold shower, the job offer, the yoga retreat, the wooden table, the exhibition,
the school lunch, a camping stove, the radio show, the broken elevator, the boat trip, the apple pie, a late train,
the gym membership"""


def parse_args():
    formatters = argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", formatters, {}))
    flag = parser.add_argument
    flag("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="the start: a folder or a hub name")
    flag("--out", type=os.path.abspath, default="out/real", help="folder to write")
    flag("--choose", action="store_true", help=f"try all settings (default seeds: {CHOOSING_SEEDS})")
    flag("--report", action="store_true", help="train nothing: the tables of what is there")
    flag("--seeds", type=int, nargs="+", help=f"each its own prompts, samples and labels (default: {SEEDS})")
    flag("--cells", nargs="+", choices=CELLS, metavar="CELL", help=f"of {', '.join(CELLS)} (default: all)")
    flag("--methods", nargs="+", choices=METHODS, metavar="METHOD",
         help=f"only these (default: all), each in quotes: {'; '.join(METHODS)}")
    flag("--workers", type=int, default=1, help="seeds at a time, a thread and about 4 GB each")
    args = parser.parse_args()
    if os.path.isdir(args.model):
        args.model = os.path.abspath(args.model)  # the stages run in another folder
    args.seeds = args.seeds or (CHOOSING_SEEDS if args.choose else SEEDS)
    return args


def main():
    args = parse_args()
    true_reward("good")  # says now what is missing
    wanted = args.methods or METHODS
    cells = {name: CELLS[name] | {"methods": [m for m in CELLS[name]["methods"] if m in wanted]}
             for name in args.cells or (CHOOSING_CELLS if args.choose else CELLS)}
    if not any(cell["methods"] for cell in cells.values()):
        fail("--methods: --cells trains none of them; name another cell")
    if args.choose:
        return choose(args, cells)
    if not args.report:
        train(args, cells, {name: [setting] for name, setting in METHODS.items()})
    results = {name: judge(cell, args) for name, cell in cells.items()}
    report(args.out, {name: figures for name, figures in results.items() if len(figures) > 1})
    draw_frontier(f"{args.out}/frontier.png", results)


# ---- data, Oracles and policies ----------------------------------------------------------------------------


def train(args, cells, settings):
    """Trains and samples each cell's methods for every seed, with each of settings, {method: [flags]}."""
    done = 0

    def one(seed):
        nonlocal done
        home = f"{args.out}/seed{seed}"
        prepare(seed, home, args.model)
        for cell in cells.values():
            rewards = teach(seed, home, cell, args.model)
            for method, setting in ((m, s) for m in cell["methods"] for s in settings[m]):
                done += train_policy(seed, home, cell, method, setting, rewards, args.model)
                bar.update()
                used = resource.getrusage(resource.RUSAGE_CHILDREN)
                bar.set_postfix_str(f"{(used.ru_utime + used.ru_stime) / max(1, done):.0f} CPU seconds each")

    total = len(args.seeds) * sum(len(settings[m]) for cell in cells.values() for m in cell["methods"])
    with tqdm(total=total, desc="policies", smoothing=0) as bar, ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(one, args.seeds))


def prepare(seed, home, model):
    """Writes a seed's prompts and the start's answers to the test prompts."""
    if not os.path.exists(f"{home}/test.jsonl"):
        os.makedirs(home, exist_ok=True)
        known, new = make_prompts(seed)
        write_jsonl(f"{home}/prompts.jsonl", known[:PROMPTS])
        write_jsonl(f"{home}/more_prompts.jsonl", known[PROMPTS:-TEST][:3 * PROMPTS])
        write_jsonl(f"{home}/test.jsonl", known[-TEST:] + new[:TEST])
    answer(seed, home, f"{home}/start", model, model)


def make_prompts(seed):
    """(prompts about the training topics, about new ones), rows in the seed's order."""
    templates = re.split(r"[|\n]", TEMPLATES)
    sets = [[{"prompt": [{"role": "system", "content": SYSTEM},
                         {"role": "user", "content": template.format(topic)}], "domain": domain} for topic in re.split(r",\s+", topics)
             for template in templates] for domain, topics in (("known", TOPICS), ("new", NEW_TOPICS))]
    for rows in sets:
        random.Random(seed).shuffle(rows)
    return sets


def teach(seed, home, cell, model):
    """Makes a cell's pairs and the rewards that its methods learn: {"oracle": file, "ensemble": file}."""
    world, data, oracle_rewards = places(home, cell)
    make_pairs(seed, home, cell["labels"], cell["pairs"], world, model)

    def reward_model(name, world=world, **flags):
        stage(oracle, f"{world}/{name}", "/model.safetensors", **SHARED, **{
            "model": model, "data": f"{world}/data/all/train.jsonl", "seed": seed, "learning_rate": 2e-4,
            "max_steps": cell["oracle_steps"], **flags})
        return f"{world}/{name}"

    def score(oracles, data, out):
        stage(precompute_rewards, out, oracle=oracles, data=data, dtype="auto")

    learned = reward_model("oracle")
    score(learned, f"{world}/data/all/validation.jsonl", f"{world}/validation.pt")
    score(learned, f"{home}/start/generations.jsonl", f"{world}/start.pt")
    if cell["oracle"] == "learned":
        score(learned, data, oracle_rewards)
    elif cell["oracle"] == "four_times":
        more = f"{home}/more_{cell['labels']}"
        make_pairs(seed, home, cell["labels"], 4 * cell["pairs"], more, model, more=True)
        better = reward_model("oracle", more, max_steps=4 * cell["oracle_steps"])
        score(better, f"{more}/data/all/validation.jsonl", f"{more}/validation.pt")
        score(better, data, oracle_rewards)
    elif not os.path.exists(oracle_rewards):
        rows = read_rows(data)
        truth = {key: torch.tensor([[row[f"{key}_reward"] for row in rows]]) for key in ("chosen", "rejected")}
        sha256 = hashlib.sha256(Path(data).read_bytes()).hexdigest()
        torch.save({**truth, "oracles": ["truth"], "data_sha256": sha256}, oracle_rewards)
    ensemble = oracle_rewards.replace(".pt", "_ensemble.pt")
    if "e-DPO" in cell["methods"] and not os.path.exists(ensemble):
        score([reward_model(f"reward_model_{k}", alpha=0, seed=seed + 1000 * k) for k in (1, 2, 3)], data,
              ensemble)
    return {"oracle": oracle_rewards, "ensemble": ensemble}


def places(home, cell):
    """(the folder of a cell's labels, the file of its pairs, of the Oracle's rewards)."""
    world = f"{home}/labels_{cell['labels']}_pairs_{cell['pairs']}"
    return world, f"{world}/data/{cell['split']}/train.jsonl", f"{world}/{cell['split']}_{cell['oracle']}.pt"


def make_pairs(seed, home, labels, pairs, world, model, more=False):
    """Samples responses, pairs and labels them, and cuts D_all and D_lc,le."""
    names = ["prompts", "more_prompts"] if more else ["prompts"]
    for name, k in itertools.product(names, range(SAMPLES)):
        stage(generate, f"{home}/samples/{name}_{k}.jsonl", model=model, prompts=f"{home}/{name}.jsonl",
              seed=1000 * seed + k, temperature=1.0, top_p=1.0, max_new_tokens=TOKENS, micro_batch_size=120)
    if not os.path.exists(f"{world}/pairs.jsonl"):
        os.makedirs(world, exist_ok=True)
        samples = [sum((read_rows(f"{home}/samples/{name}_{k}.jsonl") for name in names), [])
                   for k in range(SAMPLES)]
        write_jsonl(f"{world}/pairs.jsonl", label(samples, labels, pairs, seed))
    stage(splits, f"{world}/data", "/all/train.jsonl", dataset=f"{world}/pairs.jsonl", seed=seed)


def label(samples, labels, pairs, seed):
    """Up to so many labelled pairs of responses with unequal true rewards. samples: k lists of rows, in one
    order of prompts. `confidence` is the gap of the true rewards, whatever the label says."""
    rows = []
    for answers in zip(*samples):
        rewards = [true_reward(row["response"]) for row in answers]
        rows += [{"prompt": answers[w]["prompt"], "chosen": answers[w]["response"],
                  "rejected": answers[l]["response"], "chosen_reward": rewards[w], "rejected_reward": rewards[l],
                  "confidence": round(rewards[w] - rewards[l], 4)}
                 for w, l in itertools.permutations(range(len(answers)), 2) if rewards[w] > rewards[l]]
    random.Random(seed).shuffle(rows)  # the same pairs under all labels
    rows, generator = rows[:pairs], random.Random(seed + 1)
    for row in rows:
        flips = 1 / (1 + math.exp(BT_SCALE * row["confidence"])) if labels == "bt" else labels
        if generator.random() < flips:
            for key in ("{}", "{}_reward"):
                w, l = key.format("chosen"), key.format("rejected")
                row[w], row[l] = row[l], row[w]
    return rows


def train_policy(seed, home, cell, method, setting, rewards, model):
    """Trains one method of a cell, samples and scores it. Returns whether it did; what is there stays."""
    flags, learns, _ = lab.METHODS[method]
    world, data, _ = places(home, cell)
    folder = policy_folder(home, cell, method, setting)
    if os.path.exists(f"{folder}/rewards.pt"):  # the last that is written
        return False
    oracle_flags = {"oracle_rewards": rewards[learns]} if learns else {}
    stage(align if flags else sft, folder, "/model.safetensors", *setting.split(), *flags.split(), **SHARED,
          **oracle_flags, model=model, data=data, seed=seed, max_steps=cell["steps"])
    answer(seed, home, folder, folder, model)
    stage(precompute_rewards, f"{folder}/rewards.pt", oracle=f"{world}/oracle",
          data=f"{folder}/generations.jsonl", dtype="auto")
    os.remove(f"{folder}/model.safetensors")  # half a gigabyte a policy; its answers and scores stay
    return True


def policy_folder(home, cell, method, setting=None):
    """One policy serves every cell that asks for it. Without the Oracle a method does not depend on it."""
    if method == "start":
        return f"{home}/start"
    world, *_ = places(home, cell)
    who = cell["oracle"] if lab.METHODS[method][1] == "oracle" else "any"
    return (f"{world}/{cell['split']}_{who}_{cell['steps']}/"
            + re.sub(r"[^\w.+-]+", "_", f"{method} {setting or METHODS[method]}"))


def answer(seed, home, out, policy, model):
    """Answers the test prompts at T = 0.7 (generations.jsonl, which wins are counted on), and without any
    change to the distribution (samples.jsonl, for the KL). Writes their log-probs, logps.json."""
    for name, flags in {"generations": {"temperature": 0.7}, "samples": {"temperature": 1.0, "num_prompts": TEST}}.items():
        stage(generate, f"{out}/{name}.jsonl", model=policy, prompts=f"{home}/test.jsonl", seed=seed, top_p=1.0,
              max_new_tokens=TOKENS, micro_batch_size=64, generator=os.path.basename(out), **flags)
    if not os.path.exists(f"{out}/logps.json"):
        process = multiprocessing.get_context("fork").Process(target=write_logps, args=(out, policy, model))
        process.start()
        process.join()
        if not os.path.exists(f"{out}/logps.json"):
            raise RuntimeError(f"no log-probs of {out}")


def write_logps(out, policy, model):
    """Writes logps.json, lists in the rows' order. `answers`: log pi(y|x) of generations.jsonl under the start.
    `start` and `policy`: of samples.jsonl under both. `tokens`: of the answers. What was cut off has no EOS."""
    transformers.logging.disable_progress_bar()
    args = argparse.Namespace(dtype="auto")
    device, *_ = align.init_process(args)
    saved = {}
    for who, folder in {"start": model, "policy": policy}.items():
        tokenizer, lm = align.load_model(folder)
        scorer = sft.ResponseModel(lm.to(device), bf16=args.dtype == "bf16")
        for name, rows in {"answers": "generations", who: "samples"}.items():
            if name in saved:
                continue
            examples = [(align.encode_prompt(tokenizer, row["prompt"]),
                         align.encode_response(tokenizer, row["response"])[:None if row["eos"] else -1])
                        for row in read_rows(f"{out}/{rows}.jsonl")]
            saved[name] = log_probs(scorer, examples, tokenizer.pad_token_id, device)
            if name == "answers":
                saved["tokens"] = [len(response) for _, response in examples]
    write_json(f"{out}/logps.json", saved)
    torch.distributed.destroy_process_group()


@torch.no_grad()
def log_probs(scorer, examples, pad_token_id, device, batch_size=32):
    """log pi(y|x) of (prompt, response) ids, a list in their order."""
    scores, order = [0.0] * len(examples), sorted(range(len(examples)), key=lambda i: -sum(map(len, examples[i])))
    for batch in (order[i:i + batch_size] for i in range(0, len(order), batch_size)):
        logps = scorer(**sft.collate([examples[i] for i in batch], pad_token_id, device))
        for i, logp in zip(batch, logps.tolist()):
            scores[i] = logp
    return scores


def write_json(path, what):
    Path(f"{path}.partial").write_text(json.dumps(what))
    os.replace(f"{path}.partial", path)


# ---- verdicts ----------------------------------------------------------------------------------------------


@cache
def sentiment():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # for this file alone
    except ImportError:
        fail("vaderSentiment, the true reward, is missing: pip install vaderSentiment==3.3.2")
    return SentimentIntensityAnalyzer()


def true_reward(text):
    """The compound score of vaderSentiment, -1 (negative) to 1 (positive)."""
    return sentiment().polarity_scores(text)["compound"]


def once(text):
    """The text with each word at its first place alone: a reward that falls by this was won by repetition."""
    seen = set()
    return " ".join(word for word in text.split()
                    if not (word.strip(".,!?;:'\"()").lower() in seen or seen.add(word.strip(".,!?;:'\"()").lower())))


def distinct_2(texts):
    """Of all pairs of neighbouring words in the texts the share that differ."""
    pairs = [pair for text in texts for pair in itertools.pairwise(text.lower().split())]
    return len(set(pairs)) / max(1, len(pairs))


def read(folder, rewards):
    """What is known of each answer of a policy, {name: (N,) array}, and of all, {name: number}; None if the
    policy is not there. rewards: the Oracle's file."""
    if not os.path.exists(rewards):
        return None
    rows, samples = read_rows(f"{folder}/generations.jsonl"), read_rows(f"{folder}/samples.jsonl")
    logps = {name: np.array(values) for name, values in json.loads(Path(f"{folder}/logps.json").read_text()).items()}
    texts = [row["response"] for row in rows]
    return {"true": np.array([true_reward(text) for text in texts]),
            "once": np.array([true_reward(once(text)) for text in texts]),
            "oracle": torch.load(rewards, weights_only=True)["response"][0].numpy(),
            "new": np.array([row["domain"] == "new" for row in rows]),
            "tokens": np.array([row["tokens"] for row in rows], float),
            "eos": np.array([row["eos"] for row in rows], float),
            "distinct-2": np.array([distinct_2(texts)]),
            "perplexity": np.exp(-logps["answers"].sum(keepdims=True) / logps["tokens"].sum()),
            "kl": logps["policy"] - logps["start"],
            "sampled": np.array([true_reward(row["response"]) for row in samples])}


def judge(cell, args):
    """{method: its figures in a cell}, of the seeds that are there. Win rates, [mean, low, high]: "<opponent>"
    by the truth, "<opponent>/new" on new topics, "<opponent>/once" with each word once, "<opponent>/oracle" by
    the Oracle. Means of what read() gives, as intervals too; "by_seed": KL and reward of the samples."""
    homes, figures, policies = [f"{args.out}/seed{seed}" for seed in args.seeds], {}, {}
    for method in ["start", *cell["methods"]]:
        folders = {home: policy_folder(home, cell, method) for home in homes}
        there = {home: read(folder, f"{places(home, cell)[0]}/start.pt" if method == "start" else
                            f"{folder}/rewards.pt") for home, folder in folders.items()}
        there = {home: policy for home, policy in there.items() if policy}
        if there:
            policies[method] = there
    for method, ours in policies.items():
        row = figures[method] = {"seeds": [home.rpartition("seed")[2] for home in ours]}
        for other, theirs in policies.items():
            both = [(ours[home], theirs[home]) for home in ours if home in theirs]
            if other != method and both:
                row[other] = interval([wins(a, b, "true") for a, b in both])
                row[f"{other}/new"] = interval([wins(a, b, "true")[a["new"]] for a, b in both])
                for by in ("once", "oracle"):
                    row[f"{other}/{by}"] = interval([wins(a, b, by) for a, b in both])
        for name in next(iter(ours.values())):
            if name not in ("new", "oracle"):
                row[name] = interval([policy[name] for policy in ours.values()])
        row["by_seed"] = [[policy["kl"].mean(), policy["sampled"].mean()] for policy in ours.values()]
    if "start" in figures:
        figures["start"]["oracle_right"] = [oracle_right(home, cell) for home in policies["start"]]
    return figures


def wins(ours, theirs, by):
    """Of each prompt 1, 0.5 or 0: our answer's reward is above, equal to or below theirs."""
    return (np.sign(ours[by] - theirs[by]) + 1) / 2


def interval(by_seed):
    """[mean, low, high] of arrays over prompts, one a seed: lab.interval. Of one seed, over its prompts."""
    if len(by_seed) > 1 or len(by_seed[0]) < 2:
        return lab.interval(by_seed)
    mean, half = by_seed[0].mean(), 1.96 * by_seed[0].std(ddof=1) / len(by_seed[0]) ** 0.5
    return [float(mean), float(mean - half), float(mean + half)]


def oracle_right(home, cell):
    """How often the Oracle prefers the truly better response: (of held-out pairs, of the training pairs), and
    the std of its differences on these."""
    world, data, rewards = places(home, cell)
    held_out = f"{home}/more_{cell['labels']}" if cell["oracle"] == "four_times" else world
    figures = []
    for path, scores in ((f"{held_out}/data/all/validation.jsonl", f"{held_out}/validation.pt"), (data, rewards)):
        if not os.path.exists(scores):
            figures.append(math.nan)
            continue
        saved, rows = torch.load(scores, weights_only=True), read_rows(path)
        margins = (saved["chosen"] - saved["rejected"])[0].numpy()
        truth = np.array([row["chosen_reward"] - row["rejected_reward"] for row in rows])
        figures.append(float(((margins > 0) == (truth > 0)).mean()))
    return [*figures, float(margins.std())]


def report(out, results):
    """Prints the tables of each cell and writes results.json. results: {cell: judge()'s figures}."""
    for name, figures in results.items():
        cell = CELLS[name]
        print(f"\n## {name}: labels {cell['labels']}, {cell['split']}, Oracle {cell['oracle']}, {cell['pairs']} "
              f"pairs, {cell['steps']} steps\n")
        right = "; ".join("{:.2f}, {:.2f}, {:.2f}".format(*row) for row in figures["start"]["oracle_right"])
        print(f"Oracle right on held-out pairs, on the policies' pairs, std of its differences there, by seed: "
              f"{right}\n")
        others = [other for other in OPPONENTS if other in figures]
        print_title("method", "seeds", *(f"against {other}" for other in others), "new topics", "each word once",
                    "by the Oracle", "true reward, each word once", "tokens, EOS", "distinct-2", "perplexity",
                    "KL, reward at T = 1")
        for method, row in figures.items():
            rates = [row.get(key) for key in (*others, "start/new", "start/once", "start/oracle")]
            print_row(method, " ".join(row["seeds"]),
                      *("{:.2f} [{:.2f}, {:.2f}]".format(*rate) if rate else "" for rate in rates),
                      *("{:.2f}, {:.2f}|{:.1f}, {:.2f}|{:.2f}|{:.1f}|{:.1f}, {:.2f}".format(*(
                          row[key][0] for key in ("true", "once", "tokens", "eos", "distinct-2", "perplexity",
                                                  "kl", "sampled"))).split("|")))
    if results:
        write_json(f"{out}/results.json", results)
        print(f"\nwrote {out}/results.json")


def draw_frontier(path, results, cells=("clean_all", "noisy_lc_le")):
    """True reward of the policies' own samples over their KL to the start: a dot a seed, a ring their mean."""
    if not all(len(results.get(name, {})) > 2 for name in cells):
        return
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained", sharey=True)
    for panel, name, title in zip(panels, cells, ("Clean labels, D_all", "40% of the labels flipped, D_lc,le")):
        for i, method in enumerate(["start", *METHODS]):
            if method in results[name]:
                kl, reward = np.array(results[name][method]["by_seed"]).T
                panel.plot(kl, reward, f"C{i}.")
                panel.plot(kl.mean(), reward.mean(), f"C{i}o", fillstyle="none", markersize=12, label=method)
        panel.set(title=title, xlabel="KL to the start, nats an answer (T = 1)")
    panels[0].set_ylabel("true reward of an answer (T = 1)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    lab.save(figure, path)


def choose(args, cells):
    """Runs every setting of every method. Marks the one that wins most against the start."""
    settings = {name: WITH_BETA if "--beta" in setting else WITHOUT_BETA for name, setting in METHODS.items()}
    train(args, cells, settings)
    homes = [f"{args.out}/seed{seed}" for seed in args.seeds]
    print_title("method", "setting", "mean", *cells)
    for method in dict.fromkeys(itertools.chain(*(cell["methods"] for cell in cells.values()))):
        rates = {setting: [interval([wins(read(folder, f"{folder}/rewards.pt"),
                                          read(f"{home}/start", f"{places(home, cell)[0]}/start.pt"), "true")
                                     for home in homes for folder in [policy_folder(home, cell, method, setting)]])[0]
                           for cell in cells.values()] for setting in settings[method]}
        most = max(map(np.mean, rates.values()))
        for setting, row in rates.items():
            best = "**" if np.mean(row) == most else ""
            print_row(method, f"{best}`{setting}`{best}", *(f"{rate:.3f}" for rate in (np.mean(row), *row)))


if __name__ == "__main__":
    main()
