"""What the two studies share: lab.py (the toy task) and real.py (a pretrained LM) are the programs.

A *setting* is a set of preference pairs, an Oracle and a number of training steps. Several methods train in
it from one start and answer the test prompts. The *true reward*, a program, judges the answers. Each seed has
its own prompts, labels and Oracle. What is finished does not run again.

A study is a module, `task` below:
    SETTINGS, METHODS       {name: setting()}, {method: its hyperparameters, as flags of align.py}
    DOMAINS                 {"posts": names of the sets of test prompts}
    true_reward(row)        of its `response` to its `prompt`
    prepare(seed, home, args)               makes a seed's prompts, start, and the start's answers
    make_pairs(seed, home, setting, args)   makes data/{all,hc_he,lc_le}/train.jsonl in the folder of places()
    other_oracle(seed, home, setting, reward_model, args)   returns an Oracle that learned from other pairs
    answer(seed, home, out, policy, args)   writes a policy's answers, <out>/generations.jsonl
    measure(folder, rows)                   further measures of answers, {name: array}
"""
import argparse
import hashlib
import json
import multiprocessing
import os
import re
import sys
import traceback
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # before torch is imported
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import deepspeed  # the stages import it, and Transformers, when they run; here once for all of them
import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import align
import oracle
import precompute_rewards
import sft
from losses import contrastive_loss, distillation_loss, dpo_loss, log1mexp
from toy import fail, write_jsonl

HEAD = "--loss drdo --student_rewards head"
LOGPS = "--loss drdo --student_rewards logps"
RATIO = "--loss drdo --student_rewards log_ratio"
RECOMMENDED = "DRDO (log ratio, mean p_w, standardised Oracle)"
METHODS = {  # name: (flags of align.py, whose rewards it learns)
    "SFT on winners": ("", None),  # by sft.py
    "DPO": ("--loss dpo", None),
    "DPO + NLL": ("--loss dpo --nll_coef 0.025", None),
    "cDPO": ("--loss dpo", None),  # conservative and robust DPO: their --label_smoothing is a hyperparameter
    "rDPO": ("--loss rdpo", None),
    "IPO": ("--loss ipo", None),
    "e-DPO": ("--loss edpo", "ensemble"),
    "e-DPO (Oracle)": ("--loss edpo", "oracle"),
    "e-DPO (Oracle) + NLL": ("--loss edpo --nll_coef 0.025", "oracle"),
    "e-DPO (standardised Oracle)": ("--loss edpo --standardise_oracle", "oracle"),
    "DRDO (head)": (HEAD, "oracle"),
    "DRDO (head, mean p_w)": (f"{HEAD} --p_w mean", "oracle"),
    "DRDO (head, standardised Oracle)": (f"{HEAD} --standardise_oracle", "oracle"),
    "DRDO (head, mean p_w, standardised Oracle)": (f"{HEAD} --p_w mean --standardise_oracle", "oracle"),
    "DRDO (logps)": (LOGPS, "oracle"),
    "DRDO (logps, mean p_w)": (f"{LOGPS} --p_w mean", "oracle"),
    "DRDO (logps, standardised Oracle)": (f"{LOGPS} --standardise_oracle", "oracle"),
    "DRDO (logps, mean p_w, standardised Oracle)": (f"{LOGPS} --p_w mean --standardise_oracle", "oracle"),
    "DRDO (log ratio)": (RATIO, "oracle"),
    "DRDO (log ratio, mean p_w)": (f"{RATIO} --p_w mean", "oracle"),
    "DRDO (log ratio, standardised Oracle)": (f"{RATIO} --standardise_oracle", "oracle"),
    RECOMMENDED: (f"{RATIO} --p_w mean --standardise_oracle", "oracle")}


def setting(labels=0.0, split="all", oracle="learned", pairs=0, steps=0, methods=()):
    """labels: the share of flipped labels, or "bt": drawn from Bradley-Terry. split: of splits.py, or a set
    that the study cuts. oracle: "learned" from all pairs with these labels, the "true" reward, or another of
    the study. pairs: before splits.py holds some out."""
    return locals()


# ---- training ----------------------------------------------------------------------------------------------

def train(task, args, settings, grid):
    """Trains and samples each setting's methods for every seed. grid: {method: a list of hyperparameters}."""
    jobs = []
    for seed, home in zip(args.seeds, args.homes):
        for setting in settings.values():
            for method in setting["methods"]:
                jobs += [(seed, home, setting, method, tried) for tried in grid[base(method)]]
    for seed, home, setting, method, hyperparameters in tqdm(jobs, "policies", smoothing=0):
        if not os.path.exists(answers_of(task, home, setting, method, hyperparameters)[1]):  # its last file
            task.prepare(seed, home, args)
            rewards = teach(task, seed, home, setting, args)
            train_policy(task, seed, home, setting, method, hyperparameters, rewards, args)


def teach(task, seed, home, setting, args):
    """Makes a setting's pairs and the rewards that methods learn: {"oracle": file, "ensemble": file}."""
    world, data, rewards = places(home, setting)
    everything = f"{world}/data/all/train.jsonl"
    ensemble = f"{world}/{setting['split']}_ensemble.pt"

    def reward_model(folder, **flags):
        flags = {"model": start_model(home, args), "data": everything, "seed": seed, **task.ORACLE, **flags}
        stage(oracle, folder, "/model.safetensors", **task.SHARED, **flags)
        return folder

    def score(oracles, data, out, **flags):
        stage(precompute_rewards, out, oracle=oracles, data=data, dtype=task.SHARED["dtype"], **flags)

    task.make_pairs(seed, home, setting, args)
    teacher = reward_model(f"{world}/oracle")
    score(teacher, f"{home}/start/generations.jsonl", f"{world}/start.pt")
    if setting["oracle"] == "true":
        save_true_rewards(task, data, rewards)
    else:
        if setting["oracle"] != "learned":
            teacher = task.other_oracle(seed, home, setting, reward_model, args)
        if setting["split"] == "relabelled":  # the Oracle orders the pairs: nobody has labelled them
            score(teacher, everything, rewards, relabel=data)
        else:
            score(teacher, data, rewards)
    if "e-DPO" in setting["methods"]:
        members = []
        for k in (1, 2, 3):
            flags = {"alpha": 0, **task.MEMBER, "seed": seed + 1000 * k}
            members.append(reward_model(f"{world}/reward_model_{k}", **flags))
        score(members, data, ensemble)
    return {"oracle": rewards, "ensemble": ensemble}


def train_policy(task, seed, home, setting, method, hyperparameters, rewards, args):
    """Trains, samples and scores one method."""
    folder, scores = answers_of(task, home, setting, method, hyperparameters)
    world, data, _ = places(home, setting)
    flags, learns = METHODS[base(method)]
    flags = f"{hyperparameters} {flags} {method.removeprefix(base(method))}"
    teacher = {"oracle_rewards": rewards[learns]} if learns else {}
    stage(sft if method == "SFT on winners" else align, folder, "/model.safetensors", *flags.split(),
          **task.SHARED, **task.POLICY, **teacher, model=start_model(home, args), data=data, seed=seed,
          max_steps=setting["steps"])
    task.answer(seed, home, folder, folder, args)
    stage(precompute_rewards, scores, oracle=f"{world}/oracle", data=f"{folder}/generations.jsonl",
          dtype=task.SHARED["dtype"])
    if not task.KEEP_MODELS:  # the answers and their scores stay
        os.remove(f"{folder}/model.safetensors")


def base(method):
    """A method's name without the additional flags of "DPO --beta 1"."""
    return method.partition(" --")[0]


def start_model(home, args):
    return args.model or f"{home}/start"


def places(home, setting):
    """(the folder of a setting's labels, the file of its pairs, the Oracle's rewards of these)."""
    world = f"{home}/labels_{setting['labels']}_pairs_{setting['pairs']}"
    split = setting["split"]
    return world, f"{world}/data/{split}/train.jsonl", f"{world}/{split}_{setting['oracle']}.pt"


def answers_of(task, home, setting, method, hyperparameters=None):
    """(a policy's folder, the Oracle's rewards of its answers). One policy serves every setting that asks for
    it: without the Oracle a method does not depend on it."""
    world, *_ = places(home, setting)
    if method == task.START:
        return f"{home}/start", f"{world}/start.pt"
    teacher = setting["oracle"] if METHODS[base(method)][1] == "oracle" else "any"
    name = re.sub(r"[^\w.+-]+", "_", f"{method} {hyperparameters or task.METHODS[base(method)]}")
    folder = f"{world}/{setting['split']}_{teacher}_{setting['steps']}/{name}"
    return folder, f"{folder}/rewards.pt"


def true_rewards(task, data):
    """{"chosen": array, "rejected": array}: the true rewards of a preference file."""
    rows = read_rows(data)
    return {key: np.array([task.true_reward({**row, "response": row[key]}) for row in rows])
            for key in ("chosen", "rejected")}


def save_true_rewards(task, data, out):
    """Writes the true rewards of a preference file, in the format of precompute_rewards.py."""
    if os.path.exists(out):
        return
    saved = {key: torch.tensor(values, dtype=torch.float32)[None]
             for key, values in true_rewards(task, data).items()}
    sha256 = hashlib.sha256(Path(data).read_bytes()).hexdigest()
    torch.save({**saved, "oracles": ["true reward"], "data_sha256": sha256}, f"{out}.partial")
    os.replace(f"{out}.partial", out)


# ---- verdicts ----------------------------------------------------------------------------------------------

def interval(by_seed):
    """[mean, low, high] of arrays over prompts, one a seed. The interval is 95%: Student's t of the seeds'
    means; of one seed, over its prompts. (A bootstrap of five seeds is too narrow by a third.)"""
    values = by_seed[0]
    if len(by_seed) > 1:
        values = np.array([seed.mean() for seed in by_seed])
    n = len(values)
    mean = float(values.mean())
    if n < 2:
        return [mean]
    student_t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # 97.5%
    half = student_t.get(n, 2.23 if n < 30 else 1.96) * float(values.std(ddof=1)) / n ** 0.5
    return [mean, mean - half, mean + half]


def wins(ours, theirs, by="true"):
    """Of each prompt 1, 0.5 or 0: our reward is above, equal to or below theirs. ours, theirs: of read()."""
    assert (ours["prompt"] == theirs["prompt"]).all()
    return (np.sign(ours[by] - theirs[by]) + 1) / 2


def best(rates):
    """The choosing rule: of {hyperparameters: win rates} those with the highest mean."""
    return max(rates, key=lambda hyperparameters: np.mean(rates[hyperparameters]))


def judge(task, setting, homes):
    """{method: {figure: [mean, low, high], "seeds", "by_seed": {figure: list}}} of policies that are there.

    "against <method>/<domain>" is a win rate by the true reward. "by the Oracle/<domain>" is one against the
    start, by the Oracle that learned from the setting's labels: it has taught some of the methods."""
    policies = {}
    for method in [task.START, *setting["methods"]]:
        found = {home: read(task, home, setting, method) for home in homes}
        policies[method] = {home: answers for home, answers in found.items() if answers}
    figures = {}
    for method, ours in policies.items():
        values = {}  # {figure: an array a seed}
        for home, answers in ours.items():
            others = {name: by_home[home] for name, by_home in policies.items() if home in by_home}
            row = measures(task, method, answers, others)
            if method == task.START:
                row |= oracle_quality(task, home, setting)
            for name, value in row.items():
                values.setdefault(name, []).append(value)
        if ours:
            figures[method] = {name: interval(by_seed) for name, by_seed in values.items()} | {
                "seeds": [int(home.rpartition("seed")[2]) for home in ours],
                "by_seed": {name: [float(v.mean()) for v in by_seed] for name, by_seed in values.items()}}
    return figures


def read(task, home, setting, method, hyperparameters=None):
    """What is known of a policy's answers, {name: array}; None where the policy is not there."""
    folder, rewards = answers_of(task, home, setting, method, hyperparameters)
    if not os.path.exists(rewards):
        return None
    rows = read_rows(f"{folder}/generations.jsonl")
    answers = {
        "prompt": np.array([json.dumps(row["prompt"]) for row in rows]),
        "dataset": np.array([row["dataset"] for row in rows]),
        "true": np.array([task.true_reward(row) for row in rows]),
        "oracle": torch.load(rewards, weights_only=True)["response"][0].numpy(),
        "tokens": np.array([row["tokens"] for row in rows], float),
        "eos": np.array([row["eos"] for row in rows], float)}
    if METHODS.get(base(method), ("",))[0]:  # align.py trained it
        last = read_rows(f"{folder}/log.jsonl")[-1]
        for name in ("logps/chosen", "logps/rejected"):
            answers[name] = np.array([last[name]])
    return answers | task.measure(folder, rows)


def measures(task, method, answers, others):
    """{figure: array} of one policy's answers on one seed. others: {method: its answers}."""
    values = {}
    for domain, datasets in task.DOMAINS.items():
        here = np.isin(answers["dataset"], datasets)
        for name in task.COLUMNS:
            if name in ("true", "once", "tokens", "eos"):  # a figure a prompt
                values[f"{name}/{domain}"] = answers[name][here]
            elif name in answers:
                values[name] = answers[name]
        for other, theirs in others.items():
            if other != method:
                values[f"against {other}/{domain}"] = wins(answers, theirs)[here]
        if method != task.START and task.START in others:
            values[f"by the Oracle/{domain}"] = wins(answers, others[task.START], "oracle")[here]
    return values


def oracle_quality(task, home, setting):
    """How often an Oracle prefers the truly better response of the policies' pairs, whose labels it may have
    learned, and the standard deviation of its differences."""
    _, data, rewards = places(home, setting)
    if not os.path.exists(rewards):
        return {}
    saved = torch.load(rewards, weights_only=True)
    margins = (saved["chosen"] - saved["rejected"])[0].numpy()
    scores = true_rewards(task, data)
    gaps = scores["chosen"] - scores["rejected"]
    right = (margins > 0) == (gaps > 0)
    return {"Oracle right": right[gaps != 0].mean(keepdims=True),
            "Oracle's spread": margins.std(ddof=1, keepdims=True)}


# ---- --choose and --terms ----------------------------------------------------------------------------------

def choose(task, args, settings):
    """Runs all hyperparameters of every method. Marks those that win most against the start."""
    grid = {}
    for method, own in task.METHODS.items():
        grid[method] = next(tries for flag, tries in task.GRID.items() if flag in own)
    train(task, args, settings, grid)
    print_title("method", "hyperparameters", "mean", "each setting and seed")
    for method in next(iter(settings.values()))["methods"]:
        rates = {tried: [] for tried in grid[method]}
        for tried, row in rates.items():
            for setting in settings.values():
                for home in args.homes:
                    start = read(task, home, setting, task.START)
                    row.append(wins(read(task, home, setting, method, tried), start).mean())
        for tried, row in rates.items():
            mark = "**" if tried == best(rates) else ""
            each = ", ".join(f"{rate:.3f}" for rate in row)
            print_row(method, f"{mark}`{tried}`{mark}", f"{np.mean(row):.3f}", each)


def terms(task, args, name, setting):
    """Prints what each term of Eq. 6 does on a setting's first pairs before the first step: the norm of its
    gradient on the LM's weights, its push on z_w and z_l (minus its derivative, for one pair)."""
    figures = {}  # {term: [norm, push on z_w, push on z_l] of each seed}
    sizes = []
    for seed, home in zip(args.seeds, args.homes):
        _, data, rewards = places(home, setting)
        if not os.path.exists(rewards):
            fail(f"{rewards}: it is not there; run --settings {name} --seeds {seed} without --terms")
        lm, logps, losses = eq6_terms(start_model(home, args), data, rewards, seed, args.terms)
        sizes.append(logps.mean(0).tolist())
        for term, loss in losses.items():
            inputs = [logps, *lm.base_model.parameters()]
            on_logps, *on_weights = torch.autograd.grad(loss.mean(), inputs, retain_graph=True,
                                                        allow_unused=True)
            pushes = [0.0, 0.0] if on_logps is None else (-on_logps.sum(0)).tolist()
            norm = sum((g ** 2).sum() for g in on_weights).sqrt().item()
            figures.setdefault(term, []).append([norm, *pushes])
    z_w, z_l = np.mean(sizes, 0)
    print(f"\n## {name}, {args.terms} pairs, log pi(y_w) {z_w:.1f}, log pi(y_l) {z_l:.1f}\n")
    print_title("term", "gradient norm", "push on z_w", "push on z_l")
    for term, values in figures.items():
        norm, push_w, push_l = np.mean(values, 0)
        print_row(term, f"{norm:.3g}", f"{push_w:+.2g}", f"{push_l:+.2g}")


def eq6_terms(folder, data, rewards, seed, pairs):
    """(lm, log pi(y|x) (pairs, 2), {term: its loss of each pair}) of a policy on a file's first pairs."""
    tokenizer, lm = align.load_model(folder, "cpu")
    end = lm.generation_config.eos_token_id[0]
    torch.manual_seed(seed)
    head = torch.nn.Linear(lm.config.hidden_size, 1, bias=False)
    torch.nn.init.normal_(head.weight, std=(lm.config.hidden_size + 1) ** -0.5)
    encoded = []
    for row in read_rows(data)[:pairs]:
        ids, _ = align.encode(tokenizer, row["prompt"], [row["chosen"], row["rejected"]], end)
        encoded.append(ids)
    logps, student = align.PairModel(lm, head)(encoded)
    z_w, z_l = logps.unbind(1)
    tokens_w, tokens_l = torch.tensor([[len(chosen), len(rejected)] for _, chosen, rejected in encoded]).T
    saved = torch.load(rewards, weights_only=True)
    std = (saved["chosen"] - saved["rejected"]).std()
    oracle_w = saved["chosen"][0, :pairs]
    oracle_l = saved["rejected"][0, :pairs]
    ratio_w = 0.03 * (z_w - z_w.detach())  # the log ratios are 0 yet
    ratio_l = 0.03 * (z_l - z_l.detach())
    focal = torch.sigmoid(z_l - z_w) ** 2
    return lm, logps, {
        "distillation, r^ the head": distillation_loss(*student.unbind(1), oracle_w, oracle_l),
        "distillation, r^ = 0.03 log pi": distillation_loss(0.03 * z_w, 0.03 * z_l, oracle_w, oracle_l),
        "distillation, r^ = 0.03 log ratio": distillation_loss(ratio_w, ratio_l, oracle_w, oracle_l),
        "the same, standardised Oracle": distillation_loss(ratio_w, ratio_l, oracle_w / std, oracle_l / std),
        "0.1 x contrastive": 0.1 * contrastive_loss(z_w, z_l),
        "of it the likelihood of y_w": -0.1 * focal.detach() * z_w,
        "of it log(1 - pi(y_l))": 0.1 * focal.detach() * log1mexp(z_l),
        "of it the focal factor's own gradient": -0.1 * focal * (z_w - log1mexp(z_l)).detach(),
        "0.1 x contrastive, mean p_w": 0.1 * contrastive_loss(z_w, z_l, 2.0, z_w / tokens_w - z_l / tokens_l),
        "DPO, beta 0.1": dpo_loss(z_w, z_l, z_w.detach(), z_l.detach())}


# ---- plumbing ----------------------------------------------------------------------------------------------

def report(task, args, results):
    """Prints a table a setting and writes results.json. results: {setting: judge()'s figures}."""
    for name, figures in results.items():
        print("\n## {}: labels {labels}, {split}, Oracle {oracle}, {pairs} pairs, {steps} steps; {}\n".format(
            name, " / ".join(task.DOMAINS), **task.SETTINGS[name]))
        for figure in ("Oracle right", "Oracle's spread"):
            values = figures[task.START]["by_seed"].get(figure, [])
            print(f"{figure}, by seed:", ", ".join(f"{value:.2f}" for value in values))
        opponents = [other for other in (task.START, "DPO", "e-DPO", "e-DPO (Oracle)") if other in figures]
        columns = [f"against {other}" for other in opponents] + ["by the Oracle", *task.COLUMNS]
        print_title("method", "seeds", *columns)
        for method, row in figures.items():
            seeds = ", ".join(map(str, row["seeds"]))
            print_row(method, seeds, *(show(task, row, column) for column in columns))
    os.makedirs(args.out, exist_ok=True)
    write_jsonl(f"{args.out}/results.json", [results])
    print(f"\nwrote {args.out}/results.json")


def show(task, row, column):
    """A figure, in each domain if it has domains. Win rates come with their interval."""
    texts = []
    for name in (column, *(f"{column}/{domain}" for domain in task.DOMAINS)):
        if name in row:
            mean, *bounds = row[name]
            text = f"{mean:.2f}"
            if bounds and column.startswith(("against ", "by the Oracle")):
                text += " [{:.2f}, {:.2f}]".format(*np.clip(bounds, 0, 1))
            texts.append(text)
    return " / ".join(texts)


def print_title(*texts):
    print_row(*texts)
    print("|" + "---|" * len(texts))


def print_row(*texts):
    print(f"| {' | '.join(texts)} |")


def stage(script, out, done="", *extra, **flags):
    """Runs a script's main with --out and these flags, unless out + done is there. It prints to <out>.log."""
    if os.path.exists(out + done):
        return
    argv = [script.__file__, "--out", out, *extra]
    for name, value in flags.items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]

    def work():
        sys.argv = argv
        script.main()

    in_child(work, out)


def in_child(work, out):
    """Calls work() in a forked process: imports are paid for once, memory is free again."""
    os.makedirs(os.path.dirname(out), exist_ok=True)

    def child():
        with open(f"{out}.log", "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(ROOT)
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)  # without the parent's own ways of ending

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    if process.exitcode:
        fail(f"a stage failed; see {out}.log")


def read_rows(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def run(task):
    args, settings = parse_args(task)
    if args.choose:
        return choose(task, args, settings)
    if args.terms:
        for name, setting in settings.items():
            terms(task, args, name, setting)
        return
    if not args.report:
        train(task, args, settings, {method: [own] for method, own in task.METHODS.items()})
    judged = {name: judge(task, setting, args.homes) for name, setting in tqdm(settings.items(), "judging")}
    results = {name: figures for name, figures in judged.items() if len(figures) > 1}
    if not results:
        fail(f"{args.out}: it has none of these policies; train them, without --report")
    report(task, args, results)


def parse_args(task):
    """The flags, and the settings that they name with the methods that they name."""
    parser = argparse.ArgumentParser(description=task.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--out", type=os.path.abspath, default=task.OUT, help="folder to write (default: %(default)s)")
    flag("--seeds", type=int, nargs="+", help=f"each its own prompts and labels (default: {task.SEEDS})")
    flag("--settings", nargs="+", choices=task.SETTINGS, metavar="SETTING",
         help=f"of {', '.join(task.SETTINGS)} (default: all)")
    methods = dict.fromkeys(method for setting in task.SETTINGS.values() for method in setting["methods"])
    flag("--methods", nargs="+", choices=methods, metavar="METHOD", default=methods,
         help=f"only these (default: all), each in quotes: {'; '.join(methods)}")
    if task.MODEL:
        flag("--model", default=task.MODEL, help="the start: a folder or a hub name (default: %(default)s)")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--choose", action="store_true", help=f"try all hyperparameters, on seeds {task.CHOOSING_SEEDS}")
    either("--report", action="store_true", help="train nothing: the tables of what is there")
    either("--terms", type=int, metavar="PAIRS", help="train nothing: the sizes of Eq. 6's terms over PAIRS")
    args = parser.parse_args()
    args.model = getattr(args, "model", None)
    if args.model and os.path.isdir(args.model):
        args.model = os.path.abspath(args.model)  # the stages run in another folder
    args.seeds = args.seeds or (task.CHOOSING_SEEDS if args.choose else task.SEEDS)
    args.homes = [f"{args.out}/seed{seed}" for seed in args.seeds]
    settings = {}
    for name in args.settings or (task.CHOOSING_SETTINGS if args.choose else task.SETTINGS):
        chosen = task.SETTINGS[name] | ({"methods": task.METHODS} if args.choose else {})
        chosen["methods"] = [method for method in chosen["methods"] if method in args.methods]
        if chosen["methods"]:
            settings[name] = chosen
    if not settings:
        fail("--methods: --settings trains none of them; name another setting")
    return args, settings
