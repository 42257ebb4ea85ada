#!/usr/bin/env bash
# The methods on a pretrained LM and real preferences: SFT, then SFT on winners, DPO, e-DPO (Oracle) and two
# readings of DRDO. Each trains on three sets: PAIRS, PAIRS with 40% of the labels flipped, and AMBIGUOUS. A
# reward model trained on JUDGE's rows judges the answers to held-out prompts of PAIRS. DRDO and e-DPO learn
# from one Oracle. The sets are files that splits.py reads. JUDGE must share no prompt with the others.
#
#     bash tests/real.sh MODEL PAIRS.jsonl.gz AMBIGUOUS.jsonl.gz JUDGE.jsonl.gz   # writes out/real
#
# What is already there does not run again. MODEL is a folder: nothing is asked of a hub. Two stages run side
# by side, on one thread each. A 135M model takes about two hours of two cores. The sizes are here:
set -euo pipefail
usage="bash tests/real.sh MODEL PAIRS.jsonl.gz AMBIGUOUS.jsonl.gz JUDGE.jsonl.gz"
[ $# -eq 4 ] || { echo "error: four arguments are needed: $usage" >&2; exit 2; }
[ -d "$1" ] || { echo "error: MODEL $1: there is no such folder; $usage" >&2; exit 2; }
for path in "${@:2}"; do
  [ -f "$path" ] || { echo "error: $path: there is no such file; $usage" >&2; exit 2; }
done
model=$(realpath "$1") pairs=$(realpath "$2") ambiguous=$(realpath "$3") judge=$(realpath "$4")
cd "$(dirname "$0")/.."
out=${OUT:-out/real} seed=${SEED:-0} length=112 batch=8 rate=5e-5
sft_steps=24 judge_steps=30 oracle_steps=48 steps=16
sets="pairs flipped ambiguous"
declare -A flags=(  # of align.py; REWARDS stands for the set's rewards.pt
  ["DPO"]="--loss dpo --beta 0.1"
  ["DRDO (log ratio, mean p_w, unit Oracle)"]="--loss drdo --oracle_rewards REWARDS
    --student_rewards log_ratio --p_w mean --unit_oracle --beta 0.03"
  ["DRDO (head)"]="--loss drdo --oracle_rewards REWARDS"
  ["e-DPO (Oracle)"]="--loss edpo --oracle_rewards REWARDS --beta 0.1"
)
order=("DPO" "DRDO (log ratio, mean p_w, unit Oracle)" "DRDO (head)" "e-DPO (Oracle)" "SFT on winners")
safe() { echo "${1//[^a-zA-Z0-9]/_}"; }  # a method's name, for files
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
mkdir -p "$out/logs"

job() {  # job NAME FILE COMMAND...: runs it in the background beside one other, unless FILE is there
  [ -e "$2" ] && return
  while [ "$(jobs -rp | wc -l)" -ge 2 ]; do wait -n; done
  ( start=$SECONDS
    if ! "${@:3}" > "$out/logs/$1.log" 2>&1; then
      tail -n 15 "$out/logs/$1.log" >&2; echo "$1 failed" >&2; exit 1
    fi
    echo "$1: $((SECONDS - start)) s" ) &
}
settle() { local job; for job in $(jobs -p); do wait "$job"; done; }
train() { python "$1" --max_length "$length" --eval_data "" --save_steps 0 --warmup_steps 2 --seed "$seed" \
  --micro_batch_size 8 --batch_size "$batch" --learning_rate "$rate" "${@:2}"; }
answer() {  # answer NAME FOLDER: a policy's greedy generations and the judge's rewards
  python generate.py --model "$2" --generator "$1" --prompts "$out/prompts.jsonl" --temperature 0 \
    --num_prompts 96 --max_new_tokens 64 --max_length 160 --micro_batch_size 96 --seed "$seed" &&
  python precompute_rewards.py --oracle "$out/judge/model" --data "$2/generations.jsonl" --out "$2/rewards.pt"
}
teach() {  # teach SET: its Oracle and its rewards
  local data="$out/$1/all/train.jsonl"
  train oracle.py --model "$out/sft" --data "$data" --out "$out/$1/oracle" --max_steps "$oracle_steps" &&
  python precompute_rewards.py --oracle "$out/$1/oracle" --data "$data" --max_length "$length" \
    --out "$out/$1/rewards.pt"
}
learn() {  # learn SET METHOD: a policy and its answers
  local folder="$out/$1/$(safe "$2")" own="${flags[$2]:-}" script=align.py
  [ -n "$own" ] || script=sft.py
  [ -e "$folder/model.safetensors" ] ||
    train "$script" --model "$out/sft" --data "$out/$1/all/train.jsonl" --out "$folder" --max_steps "$steps" \
      ${own/REWARDS/$out/$1/rewards.pt} &&
  answer "$1/$2" "$folder"
}

# ---- data: a third of PAIRS' prompts is held out; the flipped copy; the judge's own set; prompts without
# references, which would be scored with every policy's answers
cut() {  # cut SET FILE HELD_OUT
  job "$1" "$out/$1/all/train.jsonl" python splits.py --dataset "$2" --out "$out/$1" --seed "$seed" \
    --validation_fraction "$3"
}
cut pairs "$pairs" 0.35; cut ambiguous "$ambiguous" 0.1; cut judge "$judge" 0.1; settle
job prompts "$out/pairs/prompts/validation.jsonl" \
  python splits.py --prompts "$out/pairs/all/validation.jsonl" --out "$out/pairs" --seed "$seed"; settle
mkdir -p "$out/flipped/all"
python - "$out" "$seed" <<'PYTHON'
import json, random, sys
out, generator = sys.argv[1], random.Random(int(sys.argv[2]))
with open(f"{out}/flipped/all/train.jsonl", "w") as file:
    for row in map(json.loads, open(f"{out}/pairs/all/train.jsonl")):
        if generator.random() < 0.4:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        file.write(json.dumps(row) + "\n")
with open(f"{out}/prompts.jsonl", "w") as file:
    for row in map(json.loads, open(f"{out}/pairs/prompts/validation.jsonl")):
        file.write(json.dumps({"prompt": row["prompt"]}) + "\n")
PYTHON

# ---- the SFT policy; the judge, from the pretrained LM; an Oracle for each set
job sft "$out/sft/model.safetensors" train sft.py --model "$model" --data "$out/pairs/all/train.jsonl" \
  --out "$out/sft" --max_steps "$sft_steps"; settle
job judge "$out/judge/model/model.safetensors" train oracle.py --model "$model" --alpha 0 --max_length 256 \
  --data "$out/judge/all/train.jsonl" --batch_size 16 --max_steps "$judge_steps" --out "$out/judge/model"
for set in $sets; do job "oracle_$set" "$out/$set/rewards.pt" teach "$set"; done; settle

# ---- the policies and what they say
job answer_sft "$out/sft/rewards.pt" answer SFT "$out/sft"
for set in $sets; do
  for method in "${order[@]}"; do
    name=$(safe "$method")
    job "${set}_$name" "$out/$set/$name/rewards.pt" learn "$set" "$method"
  done
done; settle

# ---- verdicts; how often the judge agrees with held-out labels
job accuracy "$out/accuracy.pt" python precompute_rewards.py --oracle "$out/judge/model" \
  --data "$out/pairs/all/validation.jsonl" --max_length "$length" --out "$out/accuracy.pt"; settle
python evaluate.py --generations "$out"/{sft,pairs/*,flipped/*,ambiguous/*}/generations.jsonl \
  --against SFT {pairs,flipped,ambiguous}/DPO --out "$out/evaluation" > "$out/logs/evaluation.log"
python - "$out" <<'PYTHON'
import json, sys, torch
out = sys.argv[1]
verdict = json.load(open(f"{out}/evaluation/evaluation.json"))
held_out = [json.loads(line) for line in open(f"{out}/pairs/all/validation.jsonl")]
saved = torch.load(f"{out}/accuracy.pt", weights_only=True)
kept = (saved["chosen"] - saved["rejected"])[0].isfinite()
longer = [(len(row["chosen"]) > len(row["rejected"])) for row, keep in zip(held_out, kept) if keep]
right = (saved["chosen"] > saved["rejected"])[0, kept].float().mean()
print(f"\nOf {len(longer)} held-out pairs of PAIRS the longer response is the chosen one in "
      f"{sum(longer) / len(longer):.2f}; the judge is right in {right:.2f}.")
print("\n| pairs | method | against SFT | against DPO | judge's reward | tokens, EOS |\n|" + "---|" * 6)
for policy in verdict["policies"]:
    name, cells = policy["policy"], []
    for opponent in ("SFT", name.split("/")[0] + "/DPO"):
        rows = [row for row in verdict["comparisons"] if (row["policy"], row["opponent"]) == (name, opponent)
                and row["temperature"] == policy["temperature"]]
        cells.append("".join("{:.2f} [{:.2f}, {:.2f}]".format(row["win_rate"], *row["win_rate_interval"])
                             for row in rows))
    pairs, _, method = name.rpartition("/")
    print(f"| {pairs} | {method} | {' | '.join(cells)} | {policy['reward']:.2f} | {policy['tokens']:.0f}, "
          f"{policy['eos']:.2f} |")
PYTHON
echo; echo "$SECONDS s in all"
