#!/usr/bin/env bash
# One would have sworn that the length-controlled win rate finds an instruction's difficulty by the
# instruction. In alpaca_eval 0.6.6 get_length_controlled_winrate takes it by row number, unless the
# annotations carry a column "index": the same judgements in another order, or a part of them, get
# difficulties of other instructions and another win rate, without a warning: here 54.7 in the place of
# 57.0, with a standard error of 0. The plain win rate does not move, and with a column "index" the order
# does not matter. The table of difficulties is fetched from a hub; a made-up one of the same columns stands
# in for it here, and the judgements are made up too.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
    alpaca_eval==0.6.6 scikit-learn==1.9.1 pandas==3.1.1 numpy==2.4.6
cd "$dir"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
"$dir/venv/bin/python" - <<'PY'
import numpy as np
import pandas as pd
from alpaca_eval.metrics import glm_winrate

rng = np.random.default_rng(0)
n = 805
difficulty = rng.normal(size=n)
gamed = pd.DataFrame({
    "model": "gamed", "index": np.tile(np.arange(n), 2), "instruction_difficulty": np.tile(difficulty, 2),
    "preference": rng.uniform(size=2 * n), "std_delta_len": rng.normal(size=2 * n),
    "not_gamed_baseline": False})
gamed.to_csv("df_gamed.csv", index=False)
glm_winrate.hf_hub_download = lambda **_: "df_gamed.csv"  # stands in for the table on the hub

win = rng.uniform(size=n) < 1 / (1 + np.exp(-2 * difficulty - 0.5))
judged = pd.DataFrame({
    "instruction": [f"Instruction {i}" for i in range(n)], "generator_1": "base", "generator_2": "policy",
    "output_1": ["x" * k for k in rng.integers(100, 900, n)],
    "output_2": ["x" * k for k in rng.integers(100, 900, n)],
    "preference": np.where(win, 2.0, 1.0), "annotator": "judge"})

def rates(rows):
    result = glm_winrate.get_length_controlled_winrate(
        rows, save_weights_dir=None, is_add_glm_preference_inplace=False)
    keys = ("win_rate", "length_controlled_winrate", "lc_standard_error")
    return {key: round(float(result[key]), 2) for key in keys}

order = rng.permutation(n)
results = {
    "in the table's order": rates(judged),
    "the same rows shuffled": rates(judged.iloc[order].reset_index(drop=True)),
    "shuffled, with a column index": rates(judged.assign(index=range(n)).iloc[order].reset_index(drop=True))}
for name, result in results.items():
    print(name, result)
first, shuffled, indexed = (list(result.values()) for result in results.values())
assert first[0] == shuffled[0] == indexed[0]
assert abs(first[1] - indexed[1]) < 0.05 and abs(first[1] - shuffled[1]) > 1 and shuffled[2] < first[2] / 4
PY
