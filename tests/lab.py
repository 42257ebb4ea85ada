"""The study on the toy task (tests/toy.py): where DRDO wins and where it does not, judged by the true reward.

A cell is a set of preference pairs, an Oracle and a number of steps. It trains several methods. Each seed has
its own posts, labels, prompts and base LM. Stages run in forked processes: imports are paid for once. What is
there does not run again. A tie counts half a win. Intervals are 95%: Student's t over the seeds' means, or
over the prompts of a single seed.

    python tests/lab.py              # the whole study: hours; its bar estimates how many
    python tests/lab.py --seeds 20 21 --cells clean_all noisy_lc_le --methods "DPO" "DRDO (head)"
    python tests/lab.py --choose     # learning rates and betas, on seeds that are not reported
    python tests/lab.py --terms      # gradients of Eq. 6's terms, at policies that are there

Out: out/lab/seed<k>/, out/lab/results.json (of the last call) and degeneration.png; the tables on stdout.
"""
import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from tqdm import tqdm

import align
import generate
import oracle
import precompute_rewards
import sft
import splits
import toy
from losses import contrastive_loss, distillation_loss, dpo_loss, log1mexp
from toy import fail

# ---- the study ---------------------------------------------------------------------------------------------

# name: (flags of align.py, whose rewards it learns, its setting). --choose tries six settings a method. This
# one wins most against SFT, by the true reward, on average over CHOOSING_CELLS and both domains.
WITH_BETA = [f"--learning_rate {rate} --beta {beta}" for rate in (1e-4, 5e-4) for beta in (0.03, 0.1, 0.3)]
WITHOUT_BETA = [f"--learning_rate {rate}" for rate in (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3)]
HEAD, LOGPS, RATIO = (f"--loss drdo --student_rewards {r}" for r in ("head", "logps", "log_ratio"))
RECOMMENDED = "DRDO (log ratio, mean p_w, unit Oracle)"
METHODS = {
    "SFT on winners": ("", None, "--learning_rate 2e-4"),  # by sft.py
    "DPO": ("--loss dpo", None, "--learning_rate 1e-4 --beta 0.1"),
    "DPO + NLL": ("--loss dpo --nll_coef 0.025", None, "--learning_rate 1e-4 --beta 0.3"),
    "IPO": ("--loss ipo", None, "--learning_rate 1e-4 --beta 0.03"),
    "e-DPO": ("--loss edpo", "ensemble", "--learning_rate 1e-4 --beta 0.03"),
    "e-DPO (Oracle)": ("--loss edpo", "oracle", "--learning_rate 1e-4 --beta 0.1"),
    "e-DPO (Oracle) + NLL": ("--loss edpo --nll_coef 0.025", "oracle", "--learning_rate 1e-4 --beta 0.1"),
    "e-DPO (unit Oracle)": ("--loss edpo --unit_oracle", "oracle", "--learning_rate 1e-4 --beta 0.3"),
    "DRDO (head)": (HEAD, "oracle", "--learning_rate 1e-4"),
    "DRDO (head, mean p_w)": (f"{HEAD} --p_w mean", "oracle", "--learning_rate 2e-4"),
    "DRDO (logps)": (LOGPS, "oracle", "--learning_rate 1e-4 --beta 0.03"),
    "DRDO (logps, unit Oracle)": (f"{LOGPS} --unit_oracle", "oracle", "--learning_rate 1e-4 --beta 0.03"),
    "DRDO (log ratio)": (RATIO, "oracle", "--learning_rate 1e-4 --beta 0.1"),
    "DRDO (log ratio, mean p_w)": (f"{RATIO} --p_w mean", "oracle", "--learning_rate 1e-4 --beta 0.1"),
    "DRDO (log ratio, unit Oracle)": (f"{RATIO} --unit_oracle", "oracle", "--learning_rate 1e-4 --beta 0.3"),
    RECOMMENDED: (f"{RATIO} --p_w mean --unit_oracle", "oracle", "--learning_rate 1e-4 --beta 0.03")}
HEADLINE = list(METHODS)
MAIN = ["e-DPO (Oracle)", "DRDO (head)", "DRDO (logps)", "DRDO (log ratio)", RECOMMENDED]
GRID, LONG = ["DPO", "e-DPO", *MAIN], ["SFT on winners", "DPO", "DPO + NLL", *MAIN]

# "DRDO (head) --alpha 0" is DRDO (head) with one flag changed. AdamW does not see a loss's scale. So the
# contrastive term is alone at alpha 10000.
BETAS = ["--beta 0.5", "--beta 1", "--beta 10"]
ABLATION = {
    "DPO": BETAS,
    "DRDO (head)": ["--alpha 0", "--alpha 1", "--alpha 10000", "--gamma 0", "--gamma 1", "--gamma 5",
                    "--detach_focal"],
    "DRDO (logps)": ["--alpha 0", "--alpha 1", "--beta 0.1", *BETAS],
    "DRDO (log ratio)": ["--alpha 1", "--gamma 0", "--gamma 5", *BETAS],
    "e-DPO (Oracle)": BETAS}
for name, flags in ABLATION.items():
    loss, learns, setting = METHODS[name]
    METHODS |= {f"{name} {flag}": (f"{loss} {flag}", learns, setting) for flag in flags}
VARIANTS = [*ABLATION, *list(METHODS)[len(HEADLINE):]]


def cell(flip=0.0, split="all", oracle="learned", pairs=6000, winners="any", steps=100, methods=HEADLINE,
         temperatures=False, labels="own"):
    """flip: the share of flipped labels. oracle: "learned" from the same labels, from "others", or the "true"
    reward; "larger", "gpt_neox": another model, from three times the pairs. winners: keep pairs whose winner
    is shorter, equal or longer. temperatures: sample at 0.2, 0.5 and 0.9 too, and let the Oracle judge
    beside the true reward. labels: the pairs' own, or the "oracle"'s order."""
    return locals()


UNLABELLED = ["DRDO (head) --alpha 0", "DRDO (logps) --alpha 0"]  # they read no label
LENGTHS = {100: "noisy_lc_le", 300: "steps_300", 1000: "steps_1000"}  # steps: the cell with so many
CELLS = {
    "clean_all": cell(temperatures=True),
    "noisy_lc_le": cell(flip=0.4, split="lc_le", temperatures=True),
    **{f"steps_{n}": cell(flip=0.4, split="lc_le", steps=n, methods=LONG) for n in (300, 1000)},
    **{f"grid_{flip}_{who}": cell(flip=flip, oracle=who, methods=GRID)
       for who in ("learned", "larger", "true") for flip in (0.0, 0.2, 0.4)},
    "ablation": cell(methods=VARIANTS),
    **{f"clean_{split}": cell(split=split, methods=GRID) for split in ("hc_he", "lc_le")},
    **{f"winners_{w}": cell(winners=w, methods=["DPO", *MAIN]) for w in ("shorter", "equal", "longer")},
    **{f"pairs_{n}": cell(flip=0.2, pairs=n, methods=["DPO", *MAIN]) for n in (500, 1500)},
    "cross_model": cell(oracle="gpt_neox", methods=["DPO", *MAIN]),
    **{f"labels_{who}": cell(oracle="others", labels=who, methods=["DPO", *MAIN, *UNLABELLED])
       for who in ("own", "oracle")}}
SEEDS, CHOOSING_SEEDS, CHOOSING_CELLS = [20, 21, 22, 23, 24], [90, 91], ["clean_all", "noisy_lc_le"]
SHARED = {"eval_data": "", "save_steps": 0, "warmup_steps": 10}  # flags of sft.py, oracle.py and align.py
DOMAINS = {"test": "posts", "articles": "articles"}
TEMPERATURES = 0.2, 0.5, 0.9  # beside 0.7
OTHER_MODELS = {"larger": {"layers": 3}, "gpt_neox": {"family": "gpt_neox"}}  # toy.py's flags, beside a width
OPPONENTS = ["SFT", "DPO", "e-DPO", "e-DPO (Oracle)"]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--out", type=os.path.abspath, default="out/lab", help="folder to write (default: %(default)s)")
    flag("--choose", action="store_true", help=f"try all settings (default seeds: {CHOOSING_SEEDS})")
    flag("--terms", type=int, nargs="?", const=480, metavar="PAIRS",
         help="print the sizes of Eq. 6's terms over so many pairs (480), at policies that are there")
    flag("--seeds", type=int, nargs="+", help=f"each its own data and base LM (default: {SEEDS})")
    flag("--cells", nargs="+", choices=CELLS, metavar="CELL",
         help=f"of {', '.join(CELLS)} (default: all; with --terms clean_all)")
    flag("--methods", nargs="+", choices=METHODS, metavar="METHOD",
         help=f"only these (default: all), each in quotes: {'; '.join(METHODS)}")
    flag("--workers", type=int, default=2, help="seeds at a time, a thread each (default: %(default)s)")
    return parser.parse_args()


def main():
    args = parse_args()
    wanted, seeds = args.methods or METHODS, args.seeds or (CHOOSING_SEEDS if args.choose else SEEDS)
    homes = [f"{args.out}/seed{seed}" for seed in seeds]
    if args.choose:
        methods = [name for name in HEADLINE if name in wanted]
        if args.cells or not methods:
            fail("--choose: it has its own cells; omit --cells, and name --methods without an extra flag")
        return choose(seeds, homes, args.workers, methods)
    if args.terms:
        for name in args.cells or ["clean_all"]:
            cell, methods = CELLS[name], ("SFT", "DRDO (head)", "DRDO (logps)")
            terms(name, {method: [(policy_folder(home, cell, method), *places(home, cell)[2:], seed)
                                  for seed, home in zip(seeds, homes)] for method in methods}, args.terms)
        return
    cells = {name: CELLS[name] | {"methods": methods} for name in args.cells or CELLS
             if (methods := [m for m in CELLS[name]["methods"] if m in wanted])}
    if not cells:
        fail("--methods: --cells trains none of them; name another cell")
    train(seeds, homes, cells, args.workers, {name: [setting] for name, (_, _, setting) in METHODS.items()})
    results = {name: judge(cell, homes) for name, cell in tqdm(cells.items(), "judging")}
    report(args.out, results)
    if cells.keys() >= set(LENGTHS.values()) and len(homes) > 1:
        best_lengths(cells, homes)
    if cells.keys() >= set(LENGTHS.values()) and not args.methods:
        draw_degeneration(f"{args.out}/degeneration.png", results)


# ---- training the policies ---------------------------------------------------------------------------------

def train(seeds, homes, cells, workers, settings):
    """Trains and samples each cell's methods for every seed, with each of settings, {method: [flags]}."""
    locks, tokenizer = {seed: Lock() for seed in seeds}, toy.make_tokenizer()
    with torch.no_grad():  # imports what the stages need, so that their forked processes need not
        toy.make_model(tokenizer).generate(tokenizer("TITLE:", return_tensors="pt").input_ids, do_sample=True,
                                           max_new_tokens=2, top_p=0.8, pad_token_id=0)

    def one(job):
        cell, (seed, home) = job
        with locks[seed]:  # a seed's cells share its data and models
            prepare(seed, home)
            rewards = teach(seed, home, cell)
            for method, setting in [(m, s) for m in cell["methods"] for s in settings[m]]:
                train_policy(seed, home, cell, method, setting, rewards)
                bar.update()

    total = len(seeds) * sum(len(settings[m]) for cell in cells.values() for m in cell["methods"])
    with tqdm(total=total, desc="policies", smoothing=0) as bar, ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, itertools.product(cells.values(), zip(seeds, homes))))


def prepare(seed, home):
    """Makes a seed's base LM, SFT policy and prompts."""
    stage(toy, home, "/base/config.json", seed=seed, prompts=250)
    stage(splits, f"{home}/data", "/prompts/articles.jsonl", seed=seed, dataset=f"{home}/raw/sft.jsonl",
          prompts=[f"{home}/raw/{name}.jsonl" for name in DOMAINS])
    with open(f"{home}/prompts.jsonl", "w") as file:
        file.writelines(Path(f"{home}/data/prompts/{name}.jsonl").read_text() for name in DOMAINS)
    sample(seed, home, tune(seed, home, f"{home}/base", f"{home}/sft"))


def tune(seed, home, base, out):
    """SFT on the writers' summaries. Returns `out`, the policy's folder."""
    stage(sft, out, "/model.safetensors", model=base, data=f"{home}/data/sft/train.jsonl", **SHARED,
          seed=seed, batch_size=32, max_steps=150, learning_rate=1e-3)
    return out


def teach(seed, home, cell):
    """Makes a cell's pairs and the rewards that its methods learn: {"oracle": file, "ensemble": file}."""
    world, name, data, rewards = places(home, cell)
    who, whole, ensemble = cell["oracle"], f"{cell['split']}/train.jsonl", f"{world}/{name}.ensemble.pt"

    def pairs(name, make, times=1, more=0):  # another seed gives other posts
        path = f"{world}/{name}.jsonl"
        if not os.path.exists(path):
            os.makedirs(world, exist_ok=True)
            toy.write_jsonl(path, make(times * cell["pairs"], seed + more, cell["flip"]))
        return path

    def fit(name, **flags):  # a reward model; its folder
        stage(oracle, f"{world}/{name}", "/model.safetensors", **{
            "model": f"{home}/sft", "data": f"{world}/data/all/train.jsonl", **SHARED, "seed": seed,
            "batch_size": 16, "learning_rate": 2e-3, "max_steps": 400, **flags})
        return f"{world}/{name}"

    stage(splits, f"{world}/data", f"/{whole}", dataset=pairs("comparisons", toy.make_comparisons), seed=seed)
    if cell["winners"] != "any":
        keep_winners(f"{world}/data/{whole}", cell["winners"], data)
    learned = judge = fit("oracle")
    if who == "others":  # learned from other pairs
        judge = fit("others_oracle", data=pairs("other_pairs_1", toy.make_pairs, 1, 500))
    elif who in OTHER_MODELS:  # on three times the pairs
        stage(toy, f"{home}/{who}", "/base/config.json", seed=seed, hidden_size=96, **OTHER_MODELS[who])
        other = tune(seed, home, f"{home}/{who}/base", f"{home}/{who}_sft")
        judge = fit(f"{who}_oracle", model=other, data=pairs("other_pairs_3", toy.make_pairs, 3, 500),
                    max_steps=1000, learning_rate=1e-3)
    elif who == "true" and not os.path.exists(rewards):
        save_truth(data, rewards)  # the stage below finds them there
    relabel = {"data": f"{world}/data/{whole}", "relabel": data} if cell["labels"] == "oracle" else {}
    stage(precompute_rewards, rewards, **{"oracle": judge, "data": data, **relabel})
    if "e-DPO" in cell["methods"]:
        members = [fit(f"reward_model_{k}", alpha=0, max_steps=250, seed=seed + 1000 * k) for k in (1, 2, 3)]
        stage(precompute_rewards, ensemble, oracle=members, data=data)
    if cell["temperatures"]:
        sample(seed, home, f"{home}/sft", TEMPERATURES, "temperatures")
        stage(precompute_rewards, f"{world}/sft.pt", oracle=learned, data=f"{home}/sft/generations.jsonl")
    return {"oracle": rewards, "ensemble": ensemble}


def places(home, cell):
    """(the folder of a cell's labels, the name of its pairs there, their file, the Oracle's rewards)."""
    world, name = f"{home}/flip{cell['flip']}_pairs{cell['pairs']}", cell["split"]
    data = f"{world}/data/{name}/train.jsonl"
    if cell["winners"] != "any":
        name, data = f"{name}_{cell['winners']}", f"{world}/data/winners_{cell['winners']}.jsonl"
    if cell["labels"] == "oracle":
        name, data = f"{name}_relabelled", f"{world}/data/{name}_relabelled.jsonl"
    return world, name, data, f"{world}/{name}.{cell['oracle']}.pt"


def keep_winners(data, which, out):
    """Writes the rows whose chosen response has fewer words than the rejected (shorter), as many, or more."""
    rows, sign = read_rows(data), {"shorter": -1, "equal": 0, "longer": 1}[which]
    toy.write_jsonl(out, [row for row in rows if sign == np.sign(
        len(row["chosen"].split()) - len(row["rejected"].split()))])


def save_truth(data, out, reward=lambda row, key: toy.true_reward({**row, "response": row[key]})):
    """Writes the true rewards of a preference file, in the format of precompute_rewards.py."""
    rows, sha256 = read_rows(data), hashlib.sha256(Path(data).read_bytes()).hexdigest()
    truth = {key: torch.tensor([[reward(row, key) for row in rows]]) for key in ("chosen", "rejected")}
    torch.save({**truth, "oracles": ["truth"], "data_sha256": sha256}, f"{out}.partial")
    os.replace(f"{out}.partial", out)


def train_policy(seed, home, cell, method, setting, rewards):
    """Trains and samples one method of a cell."""
    flags, learns, _ = METHODS[method]
    world, _, data, _ = places(home, cell)
    folder = policy_folder(home, cell, method, setting)
    oracle_flags = {"oracle_rewards": rewards[learns]} if learns else {}
    stage(align if flags else sft, folder, "/model.safetensors", *setting.split(), *flags.split(), **SHARED,
          **oracle_flags, model=f"{home}/sft", data=data, seed=seed, batch_size=24, micro_batch_size=24,
          max_steps=cell["steps"])
    sample(seed, home, folder)
    if cell["temperatures"]:
        sample(seed, home, folder, TEMPERATURES, "temperatures")
        stage(precompute_rewards, f"{folder}/rewards.pt", oracle=f"{world}/oracle",
              data=f"{folder}/generations.jsonl")


def policy_folder(home, cell, method, setting=None):
    """One policy serves every cell that asks for it. Without the Oracle a method does not depend on it."""
    if method == "SFT":
        return f"{home}/sft"
    world, name, *_ = places(home, cell)
    _, learns, own = METHODS[method]
    cells = f"{name}_{cell['oracle'] if learns == 'oracle' else 'any'}_{cell['steps']}"
    return f"{world}/{cells}/" + re.sub(r"[^\w.+-]+", "_", f"{method} {setting or own}")


def sample(seed, home, folder, temperatures=(0.7,), name="generations"):
    """Writes a policy's answers to <folder>/<name>.jsonl."""
    stage(generate, f"{folder}/{name}.jsonl", model=folder, prompts=f"{home}/prompts.jsonl", seed=seed,
          temperature=temperatures, max_new_tokens=48, micro_batch_size=125)


def stage(script, out, done="", *extra, **flags):
    """Runs a script's main with --out and these flags in a forked process, unless out + done is there.
    What it prints is in <out>.log. Ends the program where it fails."""
    if os.path.exists(out + done):
        return
    os.makedirs(os.path.dirname(out), exist_ok=True)

    def child():
        with open(f"{out}.log", "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(ROOT)
        sys.argv, code = [script.__file__, "--out", out, *extra], 1
        if script in (sft, oracle, align, generate):  # so that no figure depends on the processor
            sys.argv += ["--dtype", "fp32"]
        for name, value in flags.items():
            sys.argv += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
        try:
            script.main()
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)  # without the parent's own ways of ending

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    if process.exitcode:
        fail(f"{script.__name__}.py failed; see {out}.log")


# ---- verdicts ----------------------------------------------------------------------------------------------

def judge(cell, homes):
    """{method: its figures in a cell}. Win rates, [mean, low, high]: "<opponent>/<domain>" by the truth,
    "T=0.2/<domain>" against SFT at another temperature, "oracle/<domain>" against SFT by the Oracle. The
    same of "true", "tokens", "eos"; the mean of the last "logps". SFT's row has how often the Oracle is
    right, its stds."""
    texts, figures = {method: read(homes, cell, method) for method in ["SFT", *cell["methods"]]}, {}
    for method, ours in texts.items():
        row = figures[method] = {"seeds": len(homes)}
        for other, theirs in texts.items():
            row |= win_rates(other, ours, theirs) if other != method else {}
        for name, domain in itertools.product(("true", "tokens", "eos"), DOMAINS):
            row[f"{name}/{domain}"] = interval([
                np.array([answer[name] for answer in seed[domain].values()], float) for seed in ours])
        if cell["temperatures"] and method != "SFT":
            row |= win_rates("oracle", ours, texts["SFT"], "oracle")
            for t in TEMPERATURES:
                at_t = (read(homes, cell, name, temperature=t) for name in (method, "SFT"))
                row |= win_rates(f"T={t}", *at_t)
        if method == "SFT":
            right, stds = zip(*(teacher(cell, home) for home in homes))
            row |= {"oracle_right": float(np.mean(right)), "oracle_stds": list(stds)}
        elif method != "SFT on winners":
            last = [read_rows(f"{policy_folder(home, cell, method)}/log.jsonl")[-1] for home in homes]
            for name in ("logps/chosen", "logps/rejected"):
                row[name] = float(np.mean([line[name] for line in last]))
    return figures


def read(homes, cell, method, setting=None, temperature=0.7):
    """[{domain: {prompt: row}}]: a policy's answers at a temperature, seed by seed. A row has its `true`
    reward and, where the cell has several temperatures, its `oracle` reward (at 0.7)."""
    texts = []
    for home in homes:
        folder, answers = policy_folder(home, cell, method, setting), {domain: {} for domain in DOMAINS}
        rows = read_rows(f"{folder}/{'generations' if temperature == 0.7 else 'temperatures'}.jsonl")
        scores = itertools.repeat(None)
        if cell["temperatures"] and temperature == 0.7:
            path = f"{places(home, cell)[0]}/sft.pt" if method == "SFT" else f"{folder}/rewards.pt"
            scores = torch.load(path, weights_only=True)["response"][0].tolist()
        for row, score in zip(rows, scores):
            if row["temperature"] == temperature:
                row |= {"true": toy.true_reward(row), "oracle": score}
                answers[row["dataset"]][row["prompt"]] = row
        texts.append(answers)
    return texts


def read_rows(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def win_rates(name, ours, theirs, judge="true"):
    """{"<name>/<domain>": [mean, low, high]} of what read() gives of two policies."""
    return {f"{name}/{domain}": interval([wins(a[domain], b[domain], judge) for a, b in zip(ours, theirs)])
            for domain in DOMAINS}


def wins(ours, theirs, judge="true"):
    """Of each prompt 1, 0.5 or 0: our answer's reward is above, equal to or below theirs; {prompt: row}."""
    return np.array([(np.sign(ours[prompt][judge] - theirs[prompt][judge]) + 1) / 2 for prompt in ours])


def interval(by_seed):
    """[mean, low, high] of arrays over prompts, one a seed. The interval is 95%: Student's t of the seeds'
    means; of one seed, over its prompts. (A bootstrap of five seeds is too narrow by a third.)"""
    values = np.array([values.mean() for values in by_seed]) if len(by_seed) > 1 else by_seed[0]
    mean, n = float(values.mean()), len(values)
    student_t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # 97.5%
    half = student_t.get(n, 2.23 if n < 30 else 1.96) * values.std(ddof=1) / n ** 0.5 if n > 1 else np.nan
    return [mean, float(mean - half), float(mean + half)]


def teacher(cell, home):
    """(how often the Oracle prefers the truly better response of a cell's pairs, std of its differences)."""
    _, _, data, path = places(home, cell)
    rows, saved = read_rows(data), torch.load(path, weights_only=True)
    margins = (saved["chosen"] - saved["rejected"])[0]
    chosen, rejected = (torch.tensor([toy.true_reward({**row, "response": row[key]}) for row in rows])
                        for key in ("chosen", "rejected"))
    right = ((margins > 0) == (chosen > rejected))[chosen != rejected]
    return right.float().mean().item(), margins.std().item()


def report(out, results):
    """Prints the tables of each cell and writes results.json. results: {cell: judge()'s figures}."""
    for name, figures in results.items():
        sft_row = figures["SFT"]
        print("\n## {}: {split}, flips {flip}, Oracle {oracle}, winners {winners}, {pairs} pairs, "
              "{steps} steps, {} seeds; posts / articles\n".format(name, sft_row["seeds"], **CELLS[name]))
        print(f"The Oracle is right on {sft_row['oracle_right']:.2f} of the pairs, by the truth; its "
              "differences' std, by seed:", ", ".join(f"{std:.2f}" for std in sft_row["oracle_stds"]) + ".\n")
        titles = {other: f"against {other}" for other in OPPONENTS if other in figures}
        if CELLS[name]["temperatures"]:
            titles["oracle"] = "against SFT by the Oracle"
        print_title("method", *titles.values(), "true reward", "tokens", "EOS", "log pi(y_w), log pi(y_l)")
        for method, row in figures.items():
            logps = [f"{row[key]:.1f}" for key in ("logps/chosen", "logps/rejected") if key in row]
            print_row(method, *(show(row, other) for other in titles), show(row, "true", "{:.2f}"),
                      f"{row['tokens/test'][0]:.1f}", f"{row['eos/test'][0]:.2f}", ", ".join(logps))
        if CELLS[name]["temperatures"]:
            print("\nAgainst SFT at the same temperature:\n")
            print_title("method", "T = 0.2", "0.5", "0.7", "0.9")
            for method, row in list(figures.items())[1:]:
                print_row(method, *(show(row, name, "{:.2f}") for name in ("T=0.2", "T=0.5", "SFT", "T=0.9")))
    toy.write_jsonl(f"{out}/results.json", [results])
    print(f"\nwrote {out}/results.json")


def show(row, name, form="{:.2f} [{:.2f}, {:.2f}]"):
    return " / ".join(form.format(*row[key]) for domain in DOMAINS if (key := f"{name}/{domain}") in row)


def print_title(*cells):
    print_row(*cells)
    print("|" + "---|" * len(cells))


def print_row(*cells):
    print(f"| {' | '.join(cells)} |")


def best_lengths(cells, homes):
    """Prints each method at its best number of steps: for a seed, that wins most on the other seeds."""
    lengths = [cells[name] for name in LENGTHS.values()]
    best, texts = {}, {"SFT": read(homes, lengths[0], "SFT")}
    for method in cells[LENGTHS[1000]]["methods"]:
        tried = [read(homes, cell, method) for cell in lengths]
        rates = np.array([[np.mean([wins(ours[domain], start[domain]).mean() for domain in DOMAINS])
                           for ours, start in zip(row, texts["SFT"])] for row in tried])  # (lengths, seeds)
        best[method] = best_elsewhere(rates)
        texts[method] = [tried[length][seed] for seed, length in enumerate(best[method])]
    print(f"\n## best of {', '.join(map(str, LENGTHS))} steps, chosen on the other seeds; posts / articles\n")
    others = [name for name in ("SFT", "DPO", "e-DPO (Oracle)") if name in texts]
    print_title("method", "steps, by seed", *(f"against {name}" for name in others))
    for method, indices in best.items():
        rows = [win_rates(name, texts[method], texts[name]) if name != method else {} for name in others]
        print_row(method, ", ".join(str(list(LENGTHS)[i]) for i in indices), *map(show, rows, others))


def best_elsewhere(rates):
    """For each seed the index of the length that wins most on the others. rates: (lengths, seeds)."""
    return (rates.sum(1, keepdims=True) - rates).argmax(0)


# ---- picture -----------------------------------------------------------------------------------------------

def draw_degeneration(path, results):
    """True reward and length of the answers after 100, 300 and 1000 steps on noisy pairs."""
    import matplotlib.pyplot as plt
    styles = {RECOMMENDED: "C0P-", "e-DPO (Oracle)": "C1D-.", "DPO + NLL": "C2^--", "DRDO (head)": "C4s:",
              "DPO": "C3o-"}
    labels = {"true/test": "true reward of an answer (best: 5)", "tokens/test": "length of an answer, tokens"}
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for panel, (quantity, label) in zip(panels, labels.items()):
        start = results[LENGTHS[100]]["SFT"][quantity][0]
        panel.axhline(start, color="black", linewidth=1, label="SFT: the policy that all start from")
        for i, (method, style) in enumerate(styles.items()):
            steps = [n * 1.05 ** (i - 2) for n in LENGTHS]  # a little apart: no marker hides another
            curve = [results[name][method][quantity][0] for name in LENGTHS.values()]
            panel.plot(steps, curve, style, label=method)
        panel.set(xscale="log", xlabel="training steps of 24 pairs", ylabel=label)
        panel.set_xticks(list(LENGTHS), list(LENGTHS)), panel.minorticks_off()
    figure.suptitle("Toy task: 40% of the training pairs have the wrong label")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(figure, path)


def save(figure, path):
    figure.savefig(f"{path}.partial", format="png", dpi=100)
    os.replace(f"{path}.partial", path)
    print(f"wrote {path}")


# ---- --choose and --terms ----------------------------------------------------------------------------------

def choose(seeds, homes, workers, methods):
    """Runs every setting of every method in CHOOSING_CELLS. Marks the one that wins most against SFT."""
    cells = {name: CELLS[name] | {"methods": methods, "temperatures": False} for name in CHOOSING_CELLS}
    settings = {name: WITH_BETA if "--beta" in METHODS[name][2] else WITHOUT_BETA for name in methods}
    train(seeds, homes, cells, workers, settings)
    print_title("method", "setting", "mean", *(f"{name}, {DOMAINS[d]}" for name in cells for d in DOMAINS))
    for method in methods:
        print_settings(method, {setting: [
            rate for cell in cells.values() for rate, *_ in win_rates(
                "SFT", read(homes, cell, method, setting), read(homes, cell, "SFT")).values()]
            for setting in settings[method]})


def print_settings(method, rates):
    """Prints a row a setting, {setting: win rates}: their mean and each; the best in bold."""
    most = max(map(np.mean, rates.values()))
    for setting, row in rates.items():
        best = "**" if np.mean(row) == most else ""
        print_row(method, f"{best}`{setting}`{best}", *(f"{rate:.3f}" for rate in (np.mean(row), *row)))


def terms(name, policies, pairs):
    """Prints what each term of Eq. 6 does on a cell's pairs: its gradient's norm on the LM's weights, and its
    push on z_w and z_l (minus its derivative, mean over pairs). policies: {name: a list, over seeds, of
    (folder or hub name, pairs' file, rewards' file, seed)}."""
    transformers.logging.disable_progress_bar()
    print(f"\n## {name}\n")
    print_title("policy", "z_w, z_l", "term", "gradient norm", "push on z_w", "push on z_l")
    for policy, by_seed in policies.items():
        figures, sizes = {}, []
        for folder, data, rewards, seed in by_seed:
            if not os.path.exists(rewards):
                fail(f"{rewards}: it is not there; run --cells {name} --seeds {seed} without --terms")
            lm, logps, losses = eq6_terms(folder, data, rewards, seed, pairs)
            sizes.append(logps.mean(0).tolist())
            for term, loss in losses.items():
                on_logps, *on_weights = torch.autograd.grad(
                    loss.mean(), [logps, *lm.base_model.parameters()], retain_graph=True, allow_unused=True)
                pushes = [0.0, 0.0] if on_logps is None else (-on_logps.sum(0)).tolist()
                norm = sum((g ** 2).sum() for g in on_weights).sqrt().item()
                figures.setdefault(term, []).append([norm, *pushes])
        z = ", ".join(f"{z:.1f}" for z in np.mean(sizes, 0))
        for term, values in figures.items():
            norm, push_w, push_l = np.mean(values, 0)
            print_row(policy, z, term, f"{norm:.3g}", f"{push_w:+.2g}", f"{push_l:+.2g}")


def eq6_terms(folder, data, rewards, seed, pairs):
    """(lm, log pi(y|x) (pairs, 2), {term: its loss of each pair}) of a policy on a file's first pairs."""
    tokenizer, lm = align.load_model(folder)
    torch.manual_seed(seed)
    head = torch.nn.Linear(lm.config.hidden_size, 1, bias=False)
    torch.nn.init.normal_(head.weight, std=(lm.config.hidden_size + 1) ** -0.5)
    if os.path.exists(f"{folder}/score.safetensors"):  # the head that DRDO (head) has learned
        head.weight.data = load_file(f"{folder}/score.safetensors")["score.weight"]
    encoded = [(align.encode_prompt(tokenizer, row["prompt"]),
                *(align.encode_response(tokenizer, row[key]) for key in ("chosen", "rejected")))
               for row in read_rows(data)[:pairs]]
    logps, student = align.PairModel(lm, head)(encoded)
    z_w, z_l = logps.unbind(1)
    tokens_w, tokens_l = torch.tensor([[len(chosen), len(rejected)] for _, chosen, rejected in encoded]).T
    saved = torch.load(rewards, weights_only=True)
    std = (saved["chosen"] - saved["rejected"]).std()
    oracle_w, oracle_l = saved["chosen"][0, :pairs], saved["rejected"][0, :pairs]
    ratio_w, ratio_l = z_w - z_w.detach(), z_l - z_l.detach()  # the log ratios at their start: 0
    focal = torch.sigmoid(z_l - z_w) ** 2
    return lm, logps, {
        "distillation, r^ the head": distillation_loss(*student.unbind(1), oracle_w, oracle_l),
        "distillation, r^ = 0.03 log pi": distillation_loss(0.03 * z_w, 0.03 * z_l, oracle_w, oracle_l),
        "distillation, r^ = 0.1 log ratio, at its start":
            distillation_loss(0.1 * ratio_w, 0.1 * ratio_l, oracle_w, oracle_l),
        "distillation, r^ = 0.03 log ratio, at its start, unit Oracle":
            distillation_loss(0.03 * ratio_w, 0.03 * ratio_l, oracle_w / std, oracle_l / std),
        "0.1 x contrastive, whole": 0.1 * contrastive_loss(z_w, z_l),
        "... likelihood of y_w": -0.1 * focal.detach() * z_w,
        "... log(1 - pi(y_l))": 0.1 * focal.detach() * log1mexp(z_l),
        "... the focal factor's own gradient": -0.1 * focal * (z_w - log1mexp(z_l)).detach(),
        "0.1 x contrastive, mean p_w": 0.1 * contrastive_loss(z_w, z_l, 2.0, z_w / tokens_w - z_l / tokens_l),
        "DPO, beta 0.1, at its start": dpo_loss(z_w, z_l, z_w.detach(), z_l.detach())}


if __name__ == "__main__":
    main()
