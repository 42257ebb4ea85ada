"""The study on the laboratory (tests/toy.py): where DRDO wins, where it does not, judged by the truth.

A cell is a set of preferences (label flips, split, number of pairs), an Oracle, a number of steps, and the methods that
are trained in it. Each seed has its own posts, labels and base LM. The stages run as they are, each in a forked process,
so that imports are paid for once; two seeds at a time, a thread each. What is there already is not run again.

    python tests/lab.py                                       # everything: hours; prints an estimate as it goes
    python tests/lab.py --seeds 0 1 --cells clean_all noisy_lc_le

In:   nothing.  Out: out/lab/seed<k>/..., out/lab/results.json, and the tables on stdout.

Win rates count a tie half. Intervals are 95%, from a bootstrap that draws seeds and, within each, prompts.
"""
import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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

# What a method adds to the flags that all of a cell's methods share. `learns`: whose rewards it distils.
METHODS = {
    "sft_winners": {"stage": sft, "flags": ""},
    "dpo": {"flags": "--loss dpo"},
    "dpo_nll": {"flags": "--loss dpo --nll_coef 0.025"},
    "ipo": {"flags": "--loss ipo"},
    "edpo": {"flags": "--loss edpo", "learns": "ensemble"},
    "edpo_oracle": {"flags": "--loss edpo", "learns": "oracle"},
    "edpo_nll": {"flags": "--loss edpo --nll_coef 0.025", "learns": "ensemble"},
    "drdo": {"flags": "--loss drdo", "learns": "oracle"},
    "drdo_p_mean": {"flags": "--loss drdo --p_w mean", "learns": "oracle"},
    "drdo_logps": {"flags": "--loss drdo --student_rewards logps", "learns": "oracle"},
    "drdo_logps_p_mean": {"flags": "--loss drdo --student_rewards logps --p_w mean", "learns": "oracle"},
    "drdo_log_ratio": {"flags": "--loss drdo --student_rewards log_ratio", "learns": "oracle"},
    "drdo_log_ratio_p_mean": {"flags": "--loss drdo --student_rewards log_ratio --p_w mean", "learns": "oracle"},
    "drdo_detached": {"flags": "--loss drdo --detach_focal", "learns": "oracle"},
    "drdo_gamma_0": {"flags": "--loss drdo --gamma 0", "learns": "oracle"},
    "drdo_gamma_5": {"flags": "--loss drdo --gamma 5", "learns": "oracle"},
    "drdo_alpha_1": {"flags": "--loss drdo --alpha 1", "learns": "oracle"},
    "drdo_distillation_only": {"flags": "--loss drdo --alpha 0", "learns": "oracle"},
}
MAIN = ["sft_winners", "dpo", "dpo_nll", "ipo", "edpo", "edpo_oracle", "edpo_nll", "drdo", "drdo_p_mean", "drdo_logps",
        "drdo_log_ratio", "drdo_log_ratio_p_mean"]


def cell(flip=0.0, split="all", oracle="learned", pairs=6000, steps=100, methods=MAIN):
    return dict(flip=flip, split=split, oracle=oracle, pairs=pairs, steps=steps, methods=methods)


GRID = ["dpo", "edpo", "edpo_oracle", "drdo", "drdo_logps", "drdo_log_ratio"]
CELLS = {
    "clean_all": cell(), "noisy_lc_le": cell(flip=0.4, split="lc_le"),
    "clean_hc_he": cell(split="hc_he"), "clean_lc_le": cell(split="lc_le"), "noisy_all": cell(flip=0.4),
    **{f"grid_{flip}_{who}": cell(flip=flip, oracle=who, methods=GRID) for flip in (0.0, 0.2, 0.4) for who in ("learned", "true")},
    **{f"steps_{n}": cell(flip=0.4, split="lc_le", steps=n, methods=GRID + ["sft_winners", "dpo_nll"]) for n in (300, 1000)},
    **{f"pairs_{n}": cell(flip=0.2, pairs=n, methods=GRID) for n in (500, 1500)},
    "ablation": cell(methods=[name for name in METHODS if name.startswith("drdo")]),
}


def stage(module, flags, out, log):
    """Runs a stage's main() with these flags in a forked process, unless `out` is there; raises where it fails."""
    if os.path.exists(out):
        return
    os.makedirs(os.path.dirname(log), exist_ok=True)

    def child():
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv, code = [module.__name__ + ".py", *map(str, flags)], 1
        os.chdir(ROOT)
        try:
            module.main()
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)  # without the parent's own ways of ending

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{module.__name__} {' '.join(map(str, flags))} failed; see {log}")


def true_rewards(data, out):
    """A rewards.pt as precompute_rewards.py writes it, of the true reward."""
    import hashlib
    rows = [json.loads(line) for line in open(data)]
    columns = {key: torch.tensor([[toy.true_reward({**row, "response": row[key]}) for row in rows]], dtype=torch.float32)
               for key in ("chosen", "rejected")}
    torch.save({**columns, "oracles": ["truth"], "data_sha256": hashlib.sha256(Path(data).read_bytes()).hexdigest()}, out)


def prepare(home, seed):
    """A seed's base LM, SFT policy and prompts."""
    stage(toy, ["--out", home, "--seed", seed, "--prompts", 250], f"{home}/base/config.json", f"{home}/logs/toy.log")
    stage(splits, ["--out", f"{home}/data", "--dataset", f"{home}/raw/sft.jsonl", "--seed", seed, "--prompts",
                   f"{home}/raw/test.jsonl", f"{home}/raw/articles.jsonl"], f"{home}/data/prompts/articles.jsonl", f"{home}/logs/splits.log")
    with open(f"{home}/prompts.jsonl", "w") as file:
        file.writelines(Path(f"{home}/data/prompts/{name}.jsonl").read_text() for name in ("test", "articles"))
    stage(sft, ["--model", f"{home}/base", "--data", f"{home}/data/sft/train.jsonl", "--eval_data", "", "--out", f"{home}/sft",
                "--batch_size", 32, "--max_steps", 150, "--learning_rate", 1e-3, "--warmup_steps", 10, "--save_steps", 0,
                "--seed", seed], f"{home}/sft/model.safetensors", f"{home}/logs/sft.log")
    sample(home, "sft", seed)


def sample(home, name, seed, temperatures=(0.7,)):
    """A policy's generations, at <home>/<name>/generations.jsonl."""
    stage(generate, ["--model", f"{home}/{name}", "--generator", name, "--prompts", f"{home}/prompts.jsonl", "--temperature", *temperatures,
                     "--max_new_tokens", 48, "--micro_batch_size", 125, "--seed", seed],
          f"{home}/{name}/generations.jsonl", f"{home}/logs/{name}.generate.log")


def run_cell(home, seed, name, cell):
    """Trains and samples a cell's methods; yields after each."""
    world = f"{home}/flip{cell['flip']}_pairs{cell['pairs']}"
    data = f"{world}/data/{cell['split']}/train.jsonl"
    if not os.path.exists(data):
        os.makedirs(world, exist_ok=True)
        toy.write_jsonl(f"{world}/comparisons.jsonl", toy.make_comparisons(cell["pairs"], seed, cell["flip"]))
    stage(splits, ["--out", f"{world}/data", "--dataset", f"{world}/comparisons.jsonl", "--seed", seed], data, f"{world}/logs/splits.log")
    shared = ["--eval_data", "", "--save_steps", 0, "--warmup_steps", 10]
    reward_model = ["--model", f"{home}/sft", "--data", f"{world}/data/all/train.jsonl", "--batch_size", 16, "--learning_rate", 2e-3, *shared]
    stage(oracle, [*reward_model, "--out", f"{world}/oracle", "--max_steps", 400, "--seed", seed],
          f"{world}/oracle/model.safetensors", f"{world}/logs/oracle.log")
    members = [f"{world}/reward_model_{k}" for k in (1, 2, 3)]
    rewards = {"oracle": f"{world}/{cell['split']}.{cell['oracle']}.pt", "ensemble": f"{world}/{cell['split']}.ensemble.pt"}
    if cell["oracle"] == "true":
        true_rewards(data, rewards["oracle"])
    else:
        stage(precompute_rewards, ["--oracle", f"{world}/oracle", "--data", data, "--out", rewards["oracle"]], rewards["oracle"],
              f"{world}/logs/rewards.log")
    if any(METHODS[method].get("learns") == "ensemble" for method in cell["methods"]):
        for k, member in enumerate(members, 1):
            stage(oracle, [*reward_model, "--alpha", 0, "--out", member, "--max_steps", 250, "--seed", seed + 1000 * k],
                  f"{member}/model.safetensors", f"{world}/logs/reward_model_{k}.log")
        stage(precompute_rewards, ["--oracle", *members, "--data", data, "--out", rewards["ensemble"]], rewards["ensemble"],
              f"{world}/logs/ensemble.log")
    for method in cell["methods"]:
        recipe = METHODS[method]
        # one run serves every cell that asks for it: methods without an Oracle do not depend on whose it is
        whose = cell["oracle"] if recipe.get("learns") == "oracle" else "any"
        policy = f"{cell['split']}_{whose}_{cell['steps']}/{method}"
        learns = ["--oracle_rewards", rewards[recipe["learns"]]] if "learns" in recipe else []
        stage(recipe.get("stage", align), [*recipe["flags"].split(), *learns, "--model", f"{home}/sft", "--data", data, *shared,
              "--out", f"{world}/{policy}", "--batch_size", 24, "--micro_batch_size", 24, "--max_steps", cell["steps"],
              "--learning_rate", 5e-4, "--seed", seed], f"{world}/{policy}/model.safetensors", f"{world}/logs/{policy}.log")
        os.makedirs(f"{world}/{policy}", exist_ok=True)
        if not os.path.exists(f"{world}/prompts.jsonl"):
            os.symlink(os.path.abspath(f"{home}/prompts.jsonl"), f"{world}/prompts.jsonl")
        sample(world, policy, seed)
        yield world, policy


def outcomes(path, against):
    """{domain: (wins of path's policy over against's by the truth (a tie 0.5), true rewards, tokens, eos)}, arrays over prompts."""
    read = lambda path: {(row["dataset"], row["prompt"]): row for row in map(json.loads, open(path))}
    ours, theirs, figures = read(path), read(against), {}
    for domain in ("test", "articles"):
        keys = [key for key in ours if key[0] == domain and key in theirs]
        mine, other = (np.array([toy.true_reward(rows[key]) for key in keys]) for rows in (ours, theirs))
        figures[domain] = ((np.sign(mine - other) + 1) / 2, mine, np.array([ours[key]["tokens"] for key in keys]),
                           np.array([ours[key]["eos"] for key in keys]))
    return figures


def interval(by_seed, resamples=2000):
    """Mean and 95% interval of values by seed, a list of arrays over prompts: seeds are drawn, and prompts within each."""
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(resamples):
        seeds = [by_seed[i] for i in rng.integers(len(by_seed), size=len(by_seed))]
        draws.append(np.mean([values[rng.integers(len(values), size=len(values))].mean() for values in seeds]))
    return float(np.mean([values.mean() for values in by_seed])), *map(float, np.percentile(draws, [2.5, 97.5]))


def report(out, results):
    """Prints a table a cell from {cell: {method: [(home, world, policy) of each seed]}}, and writes results.json."""
    held = {}
    for name, methods in results.items():
        print(f"\n## {name}: {CELLS[name]['split']}, flips {CELLS[name]['flip']}, Oracle {CELLS[name]['oracle']}, "
              f"{CELLS[name]['pairs']} pairs, {CELLS[name]['steps']} steps, {max(map(len, methods.values()))} seeds\n")
        print("| method | against SFT, posts | articles | against DPO, posts | articles | true reward | tokens | EOS |\n|" + "---|" * 8)
        for method, runs in methods.items():
            sft_runs = [outcomes(f"{world}/{policy}/generations.jsonl", f"{home}/sft/generations.jsonl") for home, world, policy in runs]
            dpo_runs = [outcomes(f"{world}/{policy}/generations.jsonl", f"{dpo[1]}/{dpo[2]}/generations.jsonl")
                        for (home, world, policy), dpo in zip(runs, methods.get("dpo", []))]
            row = {(opponent, domain): interval([run[domain][0] for run in many])
                   for opponent, many in (("sft", sft_runs), ("dpo", dpo_runs)) if many for domain in ("test", "articles")}
            reward, tokens, eos = (np.mean([run["test"][i].mean() for run in sft_runs]) for i in (1, 2, 3))
            cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*row[key]) if key in row else "" for key in
                     (("sft", "test"), ("sft", "articles"), ("dpo", "test"), ("dpo", "articles"))]
            print(f"| {method} | {' | '.join(cells)} | {reward:.2f} | {tokens:.1f} | {eos:.2f} |")
            held.setdefault(name, {})[method] = {f"{a}/{b}": value for (a, b), value in row.items()} | {
                "true_reward": float(reward), "tokens": float(tokens), "eos": float(eos), "seeds": len(runs)}
    with open(f"{out}/results.json.partial", "w") as file:
        json.dump(held, file, indent=1)
    os.replace(f"{out}/results.json.partial", f"{out}/results.json")
    print(f"\n{out}/results.json written")


def main():
    formatters = argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", formatters, {}))
    parser.add_argument("--out", default="out/lab", help="folder to write")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="each its own data and base LM")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS), metavar="CELL", help=f"of {', '.join(CELLS)}")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="METHOD", help=f"only these, of {', '.join(METHODS)}")
    parser.add_argument("--workers", type=int, default=2, help="seeds at a time, a thread each")
    args = parser.parse_args()
    args.out = os.path.abspath(args.out)
    cells = {name: {**CELLS[name], "methods": [m for m in CELLS[name]["methods"] if m in (args.methods or METHODS)]} for name in args.cells}
    results = {name: {method: [] for method in cells[name]["methods"]} for name in cells}
    total = len(args.seeds) * sum(len(cell["methods"]) for cell in cells.values())
    start = time.time()
    with tqdm(total=total, desc="policies") as bar, ThreadPoolExecutor(args.workers) as pool:
        def one(seed):
            home = f"{args.out}/seed{seed}"
            prepare(home, seed)
            for name, cell in cells.items():
                for method, (world, policy) in zip(cell["methods"], run_cell(home, seed, name, cell)):
                    results[name][method].append((seed, home, world, policy))
                    bar.update()
        list(pool.map(one, args.seeds))
    for methods in results.values():  # seeds in order, whichever ended first
        for method, runs in methods.items():
            methods[method] = [run[1:] for run in sorted(runs)]
    report(args.out, results)
    print(f"{total} policies in {(time.time() - start) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
