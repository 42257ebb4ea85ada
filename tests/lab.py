"""The study on the laboratory (tests/toy.py): where DRDO wins, where it does not, judged by the truth.

A cell is a set of preferences (label flips, split, number, lengths), an Oracle, a number of steps, and the methods that
are trained in it. Each seed has its own posts, labels, prompts and base LM. The stages run as they are, each in a forked
process, so that imports are paid for once; two seeds at a time, a thread each. What is there already is not run again.

    python tests/lab.py --choose                # learning rate and beta of every method, on seeds that are not reported
    python tests/lab.py                         # the whole study: hours; its bar estimates how many
    python tests/lab.py --seeds 20 21 --cells clean_all noisy_lc_le --methods dpo drdo
    python tests/lab.py --terms                 # the gradients of Eq. 6's terms on policies that the study has left

In:   nothing.  Out: out/lab/seed<k>/..., out/lab/results.json, grid.png, degeneration.png, and the tables on stdout.

Win rates count a tie half. Intervals are 95%, Student's t over the seeds' means.
"""
import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
import textwrap
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
from tqdm import tqdm

import align
import generate
import oracle
import precompute_rewards
import sft
import splits
import toy

# ---- the study --------------------------------------------------------------------------------------------------------

# Every method has six settings to choose from, of its learning rate and, where it has one, of beta.
WITH_BETA = [f"--learning_rate {rate} --beta {beta}" for rate in (1e-4, 5e-4) for beta in (0.03, 0.1, 0.3)]
WITHOUT_BETA = [f"--learning_rate {rate}" for rate in (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3)]

# name: flags, whose rewards it learns (unit: the Oracle's, by --oracle_scale divided by the std of their differences), the
# setting that --choose chose (best mean win rate against SFT by the truth over CHOOSING_CELLS and both domains), and what
# there was to choose from
DRDO = "--loss drdo --student_rewards"
METHODS = {
    "sft_winners": ("", None, "--learning_rate 2e-4", WITHOUT_BETA),
    "dpo": ("--loss dpo", None, "--learning_rate 1e-4 --beta 0.1", WITH_BETA),
    "dpo_nll": ("--loss dpo --nll_coef 0.025", None, "--learning_rate 1e-4 --beta 0.3", WITH_BETA),
    "ipo": ("--loss ipo", None, "--learning_rate 1e-4 --beta 0.03", WITH_BETA),
    "edpo": ("--loss edpo", "ensemble", "--learning_rate 1e-4 --beta 0.03", WITH_BETA),
    "edpo_oracle": ("--loss edpo", "oracle", "--learning_rate 1e-4 --beta 0.1", WITH_BETA),
    "edpo_oracle_nll": ("--loss edpo --nll_coef 0.025", "oracle", "--learning_rate 1e-4 --beta 0.1", WITH_BETA),
    "drdo": (f"{DRDO} head", "oracle", "--learning_rate 1e-4", WITHOUT_BETA),
    "drdo_p_mean": (f"{DRDO} head --p_w mean", "oracle", "--learning_rate 2e-4", WITHOUT_BETA),
    "drdo_logps": (f"{DRDO} logps", "oracle", "--learning_rate 1e-4 --beta 0.03", WITH_BETA),
    "drdo_log_ratio": (f"{DRDO} log_ratio", "oracle", "--learning_rate 1e-4 --beta 0.1", WITH_BETA),
    "drdo_log_ratio_p_mean": (f"{DRDO} log_ratio --p_w mean", "oracle", "--learning_rate 1e-4 --beta 0.1", WITH_BETA),
    "edpo_oracle_unit": ("--loss edpo", "unit", "--learning_rate 1e-4 --beta 0.3", WITH_BETA),
    "drdo_logps_unit": (f"{DRDO} logps", "unit", "--learning_rate 1e-4 --beta 0.03", WITH_BETA),
    "drdo_log_ratio_unit": (f"{DRDO} log_ratio", "unit", "--learning_rate 1e-4 --beta 0.3", WITH_BETA),
    "drdo_log_ratio_p_mean_unit": (f"{DRDO} log_ratio --p_w mean", "unit", "--learning_rate 1e-4 --beta 0.03", WITH_BETA),
}
SEEDS, CHOOSING_SEEDS, CHOOSING_CELLS = [20, 21, 22, 23, 24], [90, 91], ["clean_all", "noisy_lc_le"]
HEADLINE, GRID = list(METHODS), ["dpo", "edpo", "edpo_oracle", "drdo", "drdo_logps", "drdo_log_ratio",
                                "drdo_log_ratio_p_mean_unit"]
DIALS = ["dpo", *GRID[2:]]


def variants(method, *flags):
    """{name: method} of a method with other flags; they are run as the method itself was set."""
    loss, learns, setting, _ = METHODS[method]
    return {f"{method} {flag}": (f"{loss} {flag}", learns, setting, []) for flag in flags}


BETAS = ["--beta 0.5", "--beta 1", "--beta 10"]
ABLATION = {  # AdamW is blind to the loss's scale: at alpha 10000 the contrastive term is alone
    **variants("drdo", "--alpha 0", "--alpha 1", "--alpha 10000", "--gamma 0", "--gamma 1", "--gamma 5", "--detach_focal"),
    **variants("drdo_logps", "--alpha 0", "--alpha 1", "--beta 0.1", *BETAS),
    **variants("drdo_log_ratio", "--alpha 1", "--gamma 0", "--gamma 5", *BETAS),
    **variants("dpo", *BETAS), **variants("edpo_oracle", *BETAS),
}
METHODS |= ABLATION


def cell(flip=0.0, split="all", oracle="learned", pairs=6000, winners="any", steps=100, methods=HEADLINE, temperatures=False):
    """winners: keep the pairs whose winner is shorter, equal or longer; temperatures: sample at 0.2, 0.5 and 0.9 too, and
    ask the Oracle as well as the truth."""
    return dict(flip=flip, split=split, oracle=oracle, pairs=pairs, winners=winners, steps=steps, methods=methods,
                temperatures=temperatures)


FLIPS, TEACHERS = (0.0, 0.2, 0.4), ("learned", "larger", "true")
LENGTHS = {100: "noisy_lc_le", 300: "steps_300", 1000: "steps_1000"}  # the cells of a training's length, in steps
CELLS = {
    "clean_all": cell(temperatures=True),
    "noisy_lc_le": cell(flip=0.4, split="lc_le", temperatures=True),
    **{f"steps_{n}": cell(flip=0.4, split="lc_le", steps=n, methods=["sft_winners", "dpo", "dpo_nll", *GRID[2:]])
       for n in (300, 1000)},
    **{f"grid_{flip}_{who}": cell(flip=flip, oracle=who, methods=GRID) for who in TEACHERS for flip in FLIPS},
    "ablation": cell(methods=["dpo", "drdo", "drdo_logps", "drdo_log_ratio", "edpo_oracle", *ABLATION]),
    "clean_hc_he": cell(split="hc_he", methods=GRID), "clean_lc_le": cell(split="lc_le", methods=GRID),
    **{f"winners_{which}": cell(winners=which, methods=DIALS) for which in ("shorter", "equal", "longer")},
    **{f"pairs_{n}": cell(flip=0.2, pairs=n, methods=DIALS) for n in (500, 1500)},
}


# ---- running the stages -----------------------------------------------------------------------------------------------


def stage(main, flags, out, log):
    """Runs a stage's `main` with these flags in a forked process, unless `out` is there; raises where it fails."""
    if os.path.exists(out):
        return
    os.makedirs(os.path.dirname(log), exist_ok=True)

    def child():
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv, code = [main.__module__ + ".py", *map(str, flags)], 1
        os.chdir(ROOT)
        try:
            main()
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)  # without the parent's own ways of ending

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{main.__module__} {' '.join(map(str, flags))} failed; see {log}")


def import_models():
    """Imports what the stages would import, once, so that their forked processes need not."""
    tokenizer = toy.make_tokenizer()
    ids = tokenizer("SUBREDDIT:", return_tensors="pt").input_ids
    with torch.no_grad():
        toy.make_model(tokenizer).generate(ids, max_new_tokens=2, do_sample=True, top_p=0.8, pad_token_id=0)


def true_rewards(data, out):
    """A rewards.pt as precompute_rewards.py writes it, of the true reward."""
    rows = [json.loads(line) for line in open(data)]
    columns = {key: torch.tensor([[toy.true_reward({**row, "response": row[key]}) for row in rows]], dtype=torch.float32)
               for key in ("chosen", "rejected")}
    torch.save({**columns, "oracles": ["truth"], "data_sha256": hashlib.sha256(Path(data).read_bytes()).hexdigest()}, out)


def unit_scale(path):
    """The --oracle_scale that gives the differences of a rewards.pt the standard deviation 1; precompute_rewards.py prints what
    they have."""
    saved = torch.load(path, weights_only=True)
    return 1 / (saved["chosen"] - saved["rejected"]).std().item()


def keep_winners(data, which, out):
    """Writes the rows whose chosen response is shorter than, as long as or longer than the rejected, in words."""
    rows = [json.loads(line) for line in open(data)]
    longer = [len(row["chosen"].split()) - len(row["rejected"].split()) for row in rows]
    toy.write_jsonl(out, [row for row, n in zip(rows, longer) if np.sign(n) == {"shorter": -1, "equal": 0, "longer": 1}[which]])


def more_comparisons(world, pairs, seed, flip):
    """A file of that many pairs, with the world's share of flips."""
    path = f"{world}/more.jsonl"
    if not os.path.exists(path):
        toy.write_jsonl(path, toy.make_pairs(pairs, seed + 500, flip))
    return path


def larger_sft(home, seed):
    """The folder of an SFT policy three times the student's size, pretrained and tuned as it was."""
    folder = f"{home}/larger_base"

    def pretrain():
        torch.set_num_threads(1)
        tokenizer = toy.make_tokenizer()
        toy.make_model(tokenizer, seed, 800, hidden_size=96, num_hidden_layers=3).save_pretrained(f"{folder}.partial")
        tokenizer.save_pretrained(f"{folder}.partial")
        os.rename(f"{folder}.partial", folder)

    stage(pretrain, [], folder, f"{home}/logs/larger_base.log")
    return tune(home, folder, f"{home}/larger_sft", seed)


def tune(home, base, out, seed):
    """SFT on the world's own summaries; returns `out`, the policy's folder."""
    stage(sft.main, ["--model", base, "--data", f"{home}/data/sft/train.jsonl", "--eval_data", "", "--out", out,
                     "--batch_size", 32, "--max_steps", 150, "--learning_rate", 1e-3, "--warmup_steps", 10, "--save_steps", 0,
                     "--seed", seed],
          f"{out}/model.safetensors", f"{home}/logs/{Path(out).name}.log")
    return out


def prepare(home, seed):
    """A seed's base LM, SFT policy and prompts."""
    stage(toy.main, ["--out", home, "--seed", seed, "--prompts", 250], f"{home}/base/config.json", f"{home}/logs/toy.log")
    stage(splits.main, ["--out", f"{home}/data", "--dataset", f"{home}/raw/sft.jsonl", "--seed", seed, "--prompts",
                        f"{home}/raw/test.jsonl", f"{home}/raw/articles.jsonl"],
          f"{home}/data/prompts/articles.jsonl", f"{home}/logs/splits.log")
    with open(f"{home}/prompts.jsonl", "w") as file:
        file.writelines(Path(f"{home}/data/prompts/{name}.jsonl").read_text() for name in ("test", "articles"))
    tune(home, f"{home}/base", f"{home}/sft", seed)
    sample(home, f"{home}/sft", seed)


def sample(home, folder, seed, temperatures=(0.7,), name="generations"):
    """A policy's generations, at <folder>/<name>.jsonl."""
    stage(generate.main, ["--model", folder, "--prompts", f"{home}/prompts.jsonl", "--temperature", *temperatures, "--seed", seed,
                          "--max_new_tokens", 48, "--micro_batch_size", 125, "--out", f"{folder}/{name}.jsonl"],
          f"{folder}/{name}.jsonl", f"{folder}.logs/{name}.log")


def places(home, cell):
    """(the folder of a cell's labels, the name of its pairs there, their file, the Oracle's rewards)."""
    world, name = f"{home}/flip{cell['flip']}_pairs{cell['pairs']}", cell["split"]
    data = f"{world}/data/{name}/train.jsonl"
    if cell["winners"] != "any":
        name, data = f"{name}_{cell['winners']}", f"{world}/data/winners_{cell['winners']}.jsonl"
    return world, name, data, f"{world}/{name}.{cell['oracle']}.pt"


def run_cell(home, seed, cell, settings):
    """Trains and samples a cell's methods; yields each policy's folder. settings: {method: [flags to run it with]}."""
    world, name, data, oracle_rewards = places(home, cell)
    if not os.path.exists(f"{world}/comparisons.jsonl"):
        os.makedirs(world, exist_ok=True)
        toy.write_jsonl(f"{world}/comparisons.jsonl", toy.make_comparisons(cell["pairs"], seed, cell["flip"]))
    whole = f"{world}/data/{cell['split']}/train.jsonl"
    stage(splits.main, ["--out", f"{world}/data", "--dataset", f"{world}/comparisons.jsonl", "--seed", seed], whole,
          f"{world}/logs/splits.log")
    if cell["winners"] != "any":
        keep_winners(whole, cell["winners"], data)
    rewards = {"oracle": oracle_rewards, "unit": oracle_rewards, "ensemble": f"{world}/{name}.ensemble.pt"}
    shared = ["--eval_data", "", "--save_steps", 0, "--warmup_steps", 10, "--seed", seed]

    def score(oracles, data, out):
        stage(precompute_rewards.main, ["--oracle", *oracles, "--data", data, "--out", out], out, f"{out}.log")

    def reward_model(folder, *flags, model=f"{home}/sft", data=f"{world}/data/all/train.jsonl"):
        stage(oracle.main, ["--model", model, "--data", data, "--out", folder, "--batch_size", 16, "--learning_rate", 2e-3, *shared,
                            *flags], f"{folder}/model.safetensors", f"{folder}.log")
        return folder

    learned = reward_model(f"{world}/oracle", "--max_steps", 400)
    if cell["oracle"] == "learned":
        score([learned], data, oracle_rewards)
    elif cell["oracle"] == "larger":
        comparisons = more_comparisons(world, 3 * cell["pairs"], seed, cell["flip"])
        score([reward_model(f"{world}/larger_oracle", "--max_steps", 1000, "--learning_rate", 1e-3, model=larger_sft(home, seed),
                            data=comparisons)], data, oracle_rewards)
    elif not os.path.exists(oracle_rewards):
        true_rewards(data, oracle_rewards)
    if any(METHODS[method][1] == "ensemble" for method in cell["methods"]):
        members = [reward_model(f"{world}/reward_model_{k}", "--alpha", 0, "--max_steps", 250, "--seed", seed + 1000 * k)
                   for k in (1, 2, 3)]
        score(members, data, rewards["ensemble"])
    if cell["temperatures"]:
        sample(home, f"{home}/sft", seed, (0.2, 0.5, 0.9), "temperatures")
        score([learned], f"{home}/sft/generations.jsonl", f"{world}/sft.pt")
    for method in cell["methods"]:
        flags, learns, *_ = METHODS[method]
        # one run serves every cell that asks for it: methods without an Oracle do not depend on whose it is
        whose = cell["oracle"] if learns in ("oracle", "unit") else "any"
        for setting in settings[method]:
            folder = f"{world}/{name}_{whose}_{cell['steps']}/" + f"{method}{setting}".replace(" ", "").replace("--", "_")
            learns_flags = ["--oracle_rewards", rewards[learns]] if learns else []
            learns_flags += ["--oracle_scale", unit_scale(rewards[learns])] if learns == "unit" else []
            stage(align.main if flags else sft.main, ["--model", f"{home}/sft", "--data", data, *shared, "--out", folder,
                  "--batch_size", 24, "--micro_batch_size", 24, "--max_steps", cell["steps"], *setting.split(), *flags.split(),
                  *learns_flags],
                  f"{folder}/model.safetensors", f"{folder}.logs/train.log")
            sample(home, folder, seed)
            if cell["temperatures"]:
                sample(home, folder, seed, (0.2, 0.5, 0.9), "temperatures")
                score([learned], f"{folder}/generations.jsonl", f"{folder}/rewards.pt")
            yield folder


def run(out, seeds, cells, settings, workers):
    """{cell: {(method, setting): [(home, policy folder) of each seed]}}; cell by cell, with a bar."""
    runs = {name: {(method, setting): [] for method in cell["methods"] for setting in settings[method]}
            for name, cell in cells.items()}
    locks = {seed: Lock() for seed in seeds}
    import_models()

    def one(job):
        name, seed = job
        home = f"{out}/seed{seed}"
        with locks[seed]:  # a seed's cells share its data and models
            prepare(home, seed)
            for key, folder in zip(runs[name], run_cell(home, seed, cells[name], settings)):
                runs[name][key].append((home, folder))
                bar.update()

    total = len(seeds) * sum(map(len, runs.values()))
    with tqdm(total=total, desc="policies", smoothing=0) as bar, ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, itertools.product(cells, seeds)))
    return {name: {key: sorted(many) for key, many in policies.items()} for name, policies in runs.items()}


# ---- verdicts ---------------------------------------------------------------------------------------------------------


DOMAINS = {"test": "posts", "articles": "articles"}
OPPONENTS = ["sft", "dpo", "edpo", "edpo_oracle"]


def read(folder, temperature=0.7, rewards=None):
    """{domain: {prompt: row}} of a policy's generations at a temperature, with the `true` reward and the Oracle's."""
    rows = {domain: {} for domain in DOMAINS}
    name = "generations" if temperature == 0.7 else "temperatures"
    scores = torch.load(rewards, weights_only=True)["response"][0].tolist() if rewards else itertools.repeat(None)
    for row, score in zip(map(json.loads, open(f"{folder}/{name}.jsonl")), scores):
        if row["temperature"] == temperature:
            rows[row["dataset"]][row["prompt"]] = {**row, "true": toy.true_reward(row), "oracle": score}
    return rows


def wins(ours, theirs, judge="true"):
    """Of each prompt 1, 0.5 or 0: our response's reward is above, equal or below theirs; two {prompt: row}."""
    return np.array([(np.sign(ours[prompt][judge] - theirs[prompt][judge]) + 1) / 2 for prompt in ours])


STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # 97.5%, by the number of seeds


def interval(by_seed):
    """Mean and 95% interval of values by seed, a list of arrays over prompts: Student's t of the seeds' means, which carry the
    prompts' noise too. (A bootstrap of five seeds would be too narrow by a third.) One seed has no interval."""
    means = np.array([values.mean() for values in by_seed])
    half = STUDENT_T.get(len(means), 2.0) * means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else np.nan
    return [float(means.mean()), float(means.mean() - half), float(means.mean() + half)]


def teacher(cell, home):
    """(share of a cell's pairs whose truly better response the Oracle prefers, std of its differences); ties in truth left out."""
    _, _, data, path = places(home, cell)
    saved = torch.load(path, weights_only=True)
    margins = (saved["chosen"] - saved["rejected"])[0]
    truth = torch.tensor([toy.true_reward({**row, "response": row["chosen"]}) - toy.true_reward({**row, "response": row["rejected"]})
                          for row in map(json.loads, open(data))])
    return ((margins > 0) == (truth > 0))[truth != 0].float().mean().item(), margins.std().item()


def judge(cell, policies):
    """{method: its figures in a cell}: win rates with intervals, "opponent/domain" by the truth, "oracle/domain" against SFT by
    the Oracle, "T=0.2/domain" against SFT at other temperatures; means of true reward, tokens, EOS, last log-probs. SFT's also
    have the cell's Oracle: how often it is right, and the std of its differences by seed."""
    folders = {"sft": [(home, f"{home}/sft") for home, _ in next(iter(policies.values()))], **policies}
    teachers = np.array([teacher(cell, home) for home, _ in folders["sft"]])
    texts = {method: [read(folder) for _, folder in many] for method, many in folders.items()}
    figures = {}
    for method, many in folders.items():
        row = figures[method] = {"seeds": len(many)}
        if method == "sft":
            row |= {"oracle_right": float(teachers[:, 0].mean()), "oracle_stds": teachers[:, 1].tolist()}
        for domain in DOMAINS:
            for opponent in folders:
                if opponent != method:
                    row[f"{opponent}/{domain}"] = interval([wins(a[domain], b[domain])
                                                            for a, b in zip(texts[method], texts[opponent])])
            for name in ("true", "tokens", "eos"):
                row[f"{name}/{domain}"] = interval([np.array([text[name] for text in run[domain].values()], float)
                                                    for run in texts[method]])
            if cell["temperatures"] and method != "sft":
                worlds = [f"{Path(folder).parent.parent}/sft.pt" for _, folder in many]
                pairs = [(read(folder, 0.7, f"{folder}/rewards.pt"), read(f"{home}/sft", 0.7, world))
                         for (home, folder), world in zip(many, worlds)]
                row[f"oracle/{domain}"] = interval([wins(ours[domain], theirs[domain], "oracle") for ours, theirs in pairs])
                for temperature in (0.2, 0.5, 0.9):
                    pairs = [(read(folder, temperature), read(f"{home}/sft", temperature)) for home, folder in many]
                    row[f"T={temperature}/{domain}"] = interval([wins(ours[domain], theirs[domain]) for ours, theirs in pairs])
        if method not in ("sft", "sft_winners"):
            last = [json.loads(open(f"{folder}/log.jsonl").readlines()[-1]) for _, folder in many]
            row |= {name: float(np.mean([line[name] for line in last])) for name in ("logps/chosen", "logps/rejected")}
    return figures


def report(out, results):
    """Prints a table a cell and writes results.json; results: {cell: judge()'s figures}."""
    def show(row, name, digits=True):
        return " / ".join(("{:.2f} [{:.2f}, {:.2f}]" if digits else "{:.2f}").format(*row[f"{name}/{domain}"])
                          for domain in DOMAINS)

    for name, figures in results.items():
        cell, last = CELLS[name], next(reversed(figures.values()))
        print(f"\n## {name}: {cell['split']}, flips {cell['flip']}, Oracle {cell['oracle']}, winners {cell['winners']}, "
              f"{cell['pairs']} pairs, {cell['steps']} steps, {figures['sft']['seeds']} seeds; posts / articles\n\n"
              f"The Oracle is right on {figures['sft']['oracle_right']:.2f} of the pairs, by the truth; its differences' std, by seed: "
              f"{', '.join(f'{std:.2f}' for std in figures['sft']['oracle_stds'])}.\n")
        columns = [opponent for opponent in OPPONENTS if opponent in figures] + ["oracle"] * ("oracle/test" in last)
        titles = ["against SFT by the Oracle" if column == "oracle" else f"against {column}" for column in columns]
        print(f"| method | {' | '.join(titles)} | true reward | tokens | EOS | log pi(y_w), log pi(y_l) |")
        print("|" + "---|" * (len(columns) + 5))
        for method, row in figures.items():
            wins = [show(row, column) if f"{column}/test" in row else "" for column in columns]
            logps = "{logps/chosen:.1f}, {logps/rejected:.1f}".format(**row) if "logps/chosen" in row else ""
            print(f"| {method} | {' | '.join(wins)} | {show(row, 'true', False)} | {row['tokens/test'][0]:.1f} | "
                  f"{row['eos/test'][0]:.2f} | {logps} |")
        if "T=0.2/test" in last:
            print("\nAgainst SFT at the same temperature:\n\n| method | T = 0.2 | 0.5 | 0.7 | 0.9 |\n|" + "---|" * 5)
            for method, row in list(figures.items())[1:]:
                print(f"| {method} | " + " | ".join(show(row, t, False) for t in ("T=0.2", "T=0.5", "sft", "T=0.9")) + " |")
    Path(f"{out}/results.json.partial").write_text(json.dumps(results, indent=1))
    os.replace(f"{out}/results.json.partial", f"{out}/results.json")
    print(f"\nwrote {out}/results.json")


def best_elsewhere(rates):
    """For each seed the index of the length that wins most on the others; rates: (lengths, seeds)."""
    return (rates.sum(1, keepdims=True) - rates).argmax(0)


def best_checkpoints(runs):
    """Prints each method at its best length of training: for a seed the one of LENGTHS that wins most against SFT on the other
    seeds, so that no length is chosen on the prompts it is judged on. runs: run()'s."""
    lengths, picked = list(LENGTHS), {}
    methods = [key for key in runs[LENGTHS[1000]] if key in runs[LENGTHS[100]]]
    sft = [read(f"{home}/sft") for home, _ in runs[LENGTHS[1000]][methods[0]]]
    for method in methods:
        texts = [[read(folder) for _, folder in runs[cell][method]] for cell in LENGTHS.values()]
        rates = np.array([[np.mean([wins(text[domain], start[domain]).mean() for domain in DOMAINS])
                           for text, start in zip(row, sft)] for row in texts])  # (lengths, seeds)
        best = best_elsewhere(rates)
        picked[method[0]] = [[lengths[k] for k in best], [texts[k][seed] for seed, k in enumerate(best)]]
    print("\n## best of " + ", ".join(map(str, lengths)) + " steps, chosen on the other seeds; posts / articles\n")
    print("| method | steps, by seed | against SFT | against DPO | against e-DPO, DRDO's Oracle |\n|" + "---|" * 5)
    opponents = [sft, *(picked[name][1] for name in ("dpo", "edpo_oracle") if name in picked)]
    for method, (steps, texts) in picked.items():
        shown = [" / ".join("{:.2f} [{:.2f}, {:.2f}]".format(*interval([wins(a[domain], b[domain]) for a, b in zip(texts, other)]))
                            for domain in DOMAINS) if other is not texts else "" for other in opponents]
        print(f"| {method} | {', '.join(map(str, steps))} | {' | '.join(shown)} |")


def terms(out, seeds, cell, pairs=480):
    """Prints what each term of Eq. 6 does on a cell's pairs: the norm of its gradient on the LM's weights, and its push on
    z_w and z_l, minus its derivative there, a pair (mean over pairs); at the SFT policy and at DRDO's after 100 steps."""
    import transformers
    from losses import contrastive_loss, distillation_loss, dpo_loss, log1mexp
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print("| policy | z_w, z_l | term | gradient norm | push on z_w | push on z_l |\n|" + "---|" * 6)
    for name in ("sft", "drdo", "drdo_logps"):
        figures, sizes = {}, []
        for seed in seeds:
            home = f"{out}/seed{seed}"
            world, split, data, oracle_rewards = places(home, cell)
            setting = METHODS.get(name, ("", "", ""))[2].replace(" ", "").replace("--", "_")
            folder = f"{home}/sft" if name == "sft" else f"{world}/{split}_{cell['oracle']}_{cell['steps']}/{name}{setting}"
            if not os.path.isdir(folder):
                print(f"error: {folder}: no policy there; train it first, by python tests/lab.py --cells ... without --terms",
                      file=sys.stderr)
                sys.exit(2)
            tokenizer = align.load_tokenizer(folder)
            lm = align.load_model(folder, tokenizer.pad_token_id)
            torch.manual_seed(seed)
            align.add_head(lm)
            if name == "drdo":  # the head that it learned
                from safetensors.torch import load_file
                lm.score.weight.data = load_file(f"{folder}/model.safetensors")["score.weight"]
            rows = [json.loads(line) for line, _ in zip(open(data), range(pairs))]
            encoded = [[np.array(ids) for ids in (align.encode_prompt(tokenizer, row["prompt"]), *(
                align.encode_response(tokenizer, row[key]) for key in ("chosen", "rejected")))] for row in rows]
            logps, rewards = align.PairModel(lm)(**align.collate(encoded, tokenizer.pad_token_id, "cpu"))
            z_w, z_l = logps.unbind(1)
            lengths_w, lengths_l = torch.tensor([[len(pair[1]), len(pair[2])] for pair in encoded]).T
            saved = torch.load(oracle_rewards, weights_only=True)
            teaches = saved["chosen"][0, :pairs], saved["rejected"][0, :pairs]
            scaled = [unit_scale(oracle_rewards) * rewards for rewards in teaches]
            log_ratio_w, log_ratio_l = z_w - z_w.detach(), z_l - z_l.detach()
            focal = torch.sigmoid(z_l - z_w) ** 2
            parts = {"distillation, r^ the head": distillation_loss(*rewards.unbind(1), *teaches),
                     "distillation, r^ = 0.03 log pi": distillation_loss(0.03 * z_w, 0.03 * z_l, *teaches),
                     "distillation, r^ = 0.1 log ratio, at its start":
                         distillation_loss(0.1 * log_ratio_w, 0.1 * log_ratio_l, *teaches),
                     "distillation, r^ = 0.03 log ratio, at its start, unit scale":
                         distillation_loss(0.03 * log_ratio_w, 0.03 * log_ratio_l, *scaled),
                     "0.1 x contrastive, whole": 0.1 * contrastive_loss(z_w, z_l),
                     "... likelihood of y_w": -0.1 * focal.detach() * z_w,
                     "... log(1 - pi(y_l))": 0.1 * focal.detach() * log1mexp(z_l),
                     "... the focal factor's own gradient": -0.1 * focal * (z_w - log1mexp(z_l)).detach(),
                     "0.1 x contrastive, p_w of means": 0.1 * contrastive_loss(z_w, z_l, 2.0, z_w / lengths_w - z_l / lengths_l),
                     "DPO, beta 0.1, at its start": dpo_loss(z_w, z_l, z_w.detach(), z_l.detach())}
            sizes.append(logps.mean(0).tolist())
            for term, loss in parts.items():
                gradient = torch.autograd.grad(loss.mean(), list(lm.base_model.parameters()), retain_graph=True)
                pushes = torch.autograd.grad(loss.sum(), logps, retain_graph=True, allow_unused=True)[0]
                pushes = [0.0, 0.0] if pushes is None else (-pushes.mean(0)).tolist()
                figures.setdefault(term, []).append([sum((g ** 2).sum() for g in gradient).sqrt().item(), *pushes])
        for term, many in figures.items():
            norm, push_w, push_l = np.mean(many, 0)
            print(f"| {name} | {', '.join(f'{z:.1f}' for z in np.mean(sizes, 0))} | {term} | {norm:.3g} | {push_w:+.2g} | {push_l:+.2g} |")


def draw(out, results):
    """grid.png: win rates against DPO by label noise and Oracle; degeneration.png: curves over 100, 300, 1000 steps."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    teachers = [who for who in TEACHERS if all(f"grid_{flip}_{who}" in results for flip in FLIPS)]
    if teachers:
        figure, panels = plt.subplots(2, len(GRID) - 1, figsize=(13, 1.5 + 1.3 * len(teachers)), sharex=True, sharey=True,
                                      layout="constrained")
        for panel, (domain, method) in zip(panels.flat, itertools.product(DOMAINS, GRID[1:])):
            values = [[results[f"grid_{flip}_{who}"][method][f"dpo/{domain}"][0] for flip in FLIPS] for who in teachers]
            image = panel.imshow(values, cmap="RdBu", vmin=0, vmax=1)
            for (y, x), value in np.ndenumerate(values):
                panel.text(x, y, f"{value:.2f}", ha="center", va="center")
            title = textwrap.fill(method.replace("_", " "), 18) + f"\n{DOMAINS[domain]}"
            panel.set(title=title, xlabel="labels flipped", ylabel="Oracle")
            panel.set_xticks(range(len(FLIPS)), FLIPS), panel.set_yticks(range(len(teachers)), teachers)
            panel.label_outer()
        figure.colorbar(image, ax=panels, label="win rate against DPO by the true reward")
        save(figure, f"{out}/grid.png")

    if all(name in results for name in LENGTHS.values()):
        quantities = {"true/test": "true reward, posts", "tokens/test": "tokens", "eos/test": "EOS rate",
                      "logps/chosen": "log-prob of chosen", "logps/rejected": "log-prob of rejected"}
        figure, panels = plt.subplots(1, len(quantities), figsize=(16, 3.6), layout="constrained")
        for panel, (quantity, title) in zip(panels, quantities.items()):
            for method in results["steps_1000"]:
                curve = [np.atleast_1d(results[name][method].get(quantity, np.nan))[0] for name in LENGTHS.values()]
                panel.plot(list(LENGTHS), curve, ":k" if method == "sft" else ".-", label=method)
            panel.set(title=title, xscale="log", xlabel="steps")
            panel.set_xticks(list(LENGTHS), list(LENGTHS)), panel.minorticks_off()
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
        save(figure, f"{out}/degeneration.png")


def save(figure, path):
    figure.savefig(f"{path}.partial", format="png", dpi=90)
    os.replace(f"{path}.partial", path)
    print(f"wrote {path}")


def choose(out, seeds, workers, methods):
    """Runs every setting of every method in CHOOSING_CELLS, and prints the one that wins most against SFT by the truth."""
    cells = {name: CELLS[name] | {"methods": methods, "temperatures": False} for name in CHOOSING_CELLS}
    runs = run(out, seeds, cells, {method: METHODS[method][3] for method in methods}, workers)
    columns = [f"{name}, {domain}" for name in cells for domain in DOMAINS.values()]
    print(f"\n| method | setting | mean | {' | '.join(columns)} |\n|" + "---|" * 7)
    for method in methods:
        lines = []
        for setting in METHODS[method][3]:
            rates = [np.mean([wins(read(folder)[domain], read(f"{home}/sft")[domain]).mean()
                              for home, folder in runs[name][method, setting]]) for name in cells for domain in DOMAINS]
            lines.append((np.mean(rates), setting, rates))
        for mean, setting, rates in lines:
            best = "**" if mean == max(lines)[0] else ""
            print(f"| {method} | {best}`{setting}`{best} | {mean:.3f} | {' | '.join(f'{rate:.3f}' for rate in rates)} |")


def main():
    formatters = argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", formatters, {}))
    parser.add_argument("--out", default="out/lab", help="folder to write")
    parser.add_argument("--choose", action="store_true", help=f"try every method's settings, on seeds {CHOOSING_SEEDS} (or --seeds)")
    parser.add_argument("--terms", action="store_true", help="print the sizes of Eq. 6's terms on policies that are there")
    parser.add_argument("--seeds", type=int, nargs="+", help=f"each its own data and base LM (default: {SEEDS})")
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), metavar="CELL",
                        help=f"of {', '.join(CELLS)} (default: all; with --terms clean_all)")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="METHOD", help=f"only these, of {', '.join(METHODS)}")
    parser.add_argument("--workers", type=int, default=2, help="seeds at a time, a thread each")
    args = parser.parse_args()
    args.out = os.path.abspath(args.out)
    if args.choose:
        tried = [method for method in METHODS if METHODS[method][3] and method in (args.methods or METHODS)]
        return choose(args.out, args.seeds or CHOOSING_SEEDS, args.workers, tried)
    if args.terms:
        for name in args.cells or ["clean_all"]:
            print(f"\n## {name}\n")
            terms(args.out, args.seeds or SEEDS, CELLS[name])
        return
    cells = {name: CELLS[name] | {"methods": [m for m in CELLS[name]["methods"] if m in (args.methods or METHODS)]}
             for name in args.cells or CELLS}
    runs = run(args.out, args.seeds or SEEDS, cells, {method: [METHODS[method][2]] for method in METHODS}, args.workers)
    results = {name: judge(cells[name], {method: many for (method, _), many in runs[name].items()})
               for name in tqdm(runs, "judging")}
    report(args.out, results)
    if all(name in runs for name in LENGTHS.values()) and len(args.seeds or SEEDS) > 1:
        best_checkpoints(runs)
    if not args.methods:
        draw(args.out, results)


if __name__ == "__main__":
    main()
