#!/usr/bin/env bash
# The methods on a pretrained LM and real preferences: SFT, then SFT on winners, DPO, e-DPO and two readings of DRDO, each
# on three sets of pairs (PAIRS, a copy of it with 40% of the labels flipped, and AMBIGUOUS pairs); judged on held-out prompts
# of PAIRS by a reward model that was trained on JUDGE's rows, which none of them saw. Both of DRDO and e-DPO learn the
# rewards of the same Oracle. Preference sets are files that splits.py reads; JUDGE must share no prompt with the others.
#
#     bash tests/real.sh MODEL PAIRS.jsonl.gz AMBIGUOUS.jsonl.gz JUDGE.jsonl.gz        # writes out/real; goes on where it was
#
# MODEL is a folder, since nothing is asked of a hub.
# Two stages run side by side, on one thread each. A 135M model takes about two hours of two cores. The sizes are here:
set -euo pipefail
usage="bash tests/real.sh MODEL PAIRS.jsonl.gz AMBIGUOUS.jsonl.gz JUDGE.jsonl.gz"
[ $# -eq 4 ] || { echo "error: four arguments are needed: $usage" >&2; exit 2; }
[ -d "$1" ] || { echo "error: MODEL $1: there is no such folder; $usage" >&2; exit 2; }
for path in "${@:2}"; do [ -f "$path" ] || { echo "error: $path: there is no such file; $usage" >&2; exit 2; }; done
model=$(realpath "$1") pairs=$(realpath "$2") ambiguous=$(realpath "$3") judge=$(realpath "$4")
cd "$(dirname "$0")/.."
out=${OUT:-out/real} seed=${SEED:-0} length=112 batch=8 rate=5e-5 sft_steps=24 oracle_steps=48 steps=16
sets="pairs flipped ambiguous"
declare -A methods=(
  [sft_winners]=""
  [dpo]="--loss dpo --beta 0.1"
  [edpo]="--loss edpo --beta 0.1"
  [drdo]="--loss drdo"
  [drdo_log_ratio_p_mean_unit]="--loss drdo --student_rewards log_ratio --p_w mean --beta 0.03"
)
order="dpo drdo_log_ratio_p_mean_unit drdo edpo sft_winners"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
mkdir -p "$out/logs"

job() {  # job NAME FILE COMMAND...: runs it in the background beside one other, unless FILE is there
  [ -e "$2" ] && return
  while [ "$(jobs -rp | wc -l)" -ge 2 ]; do wait -n; done
  ( start=$SECONDS
    "${@:3}" > "$out/logs/$1.log" 2>&1 || { tail -n 15 "$out/logs/$1.log" >&2; echo "$1 failed" >&2; exit 1; }
    echo "$1: $((SECONDS - start)) s" ) &
}
settle() { local job; for job in $(jobs -p); do wait "$job"; done; }
train() { python "$1" --max_length "$length" --eval_data "" --save_steps 0 --warmup_steps 2 --micro_batch_size 8 \
  --batch_size "$batch" --learning_rate "$rate" --seed "$seed" "${@:2}"; }
answer() {  # answer NAME FOLDER: a policy's greedy generations and the judge's rewards
  python generate.py --model "$2" --generator "$1" --prompts "$out/prompts.jsonl" --temperature 0 \
    --num_prompts 96 --max_new_tokens 64 --max_length 160 --micro_batch_size 96 --seed "$seed" &&
  python precompute_rewards.py --oracle "$out/judge/model" --data "$2/generations.jsonl" --out "$2/rewards.pt"
}
unit_scale() { python -c "import torch; saved = torch.load('$1', weights_only=True); d = saved['chosen'] - saved['rejected']
print(1 / d[d.isfinite()].std().item())"; }  # what gives the Oracle's differences the standard deviation 1
teach() {  # teach SET: its Oracle and its rewards
  train oracle.py --model "$out/sft" --data "$out/$1/all/train.jsonl" --out "$out/$1/oracle" --max_steps "$oracle_steps" &&
  python precompute_rewards.py --oracle "$out/$1/oracle" --data "$out/$1/all/train.jsonl" --max_length "$length" --out "$out/$1/rewards.pt"
}
learn() {  # learn SET METHOD: a policy and its generations
  local script=align.py flags="${methods[$2]}"
  case $2 in
    sft_winners) script=sft.py ;;
    edpo | drdo*) flags="$flags --oracle_rewards $out/$1/rewards.pt" ;;
  esac
  case $2 in *_unit) flags="$flags --oracle_scale $(unit_scale "$out/$1/rewards.pt")" ;; esac
  [ -e "$out/$1/$2/model.safetensors" ] ||
    train "$script" --model "$out/sft" --data "$out/$1/all/train.jsonl" --out "$out/$1/$2" --max_steps "$steps" $flags &&
  answer "$1/$2" "$out/$1/$2"
}

# ---- data: a third of PAIRS' prompts is held out; the flipped copy; the judge's own set; prompts without their references,
# which would be scored with every policy's answers
cut() { job "$1" "$out/$1/all/train.jsonl" python splits.py --dataset "$2" --out "$out/$1" --seed "$seed" --validation_fraction "$3"; }
cut pairs "$pairs" 0.35; cut ambiguous "$ambiguous" 0.1; cut judge "$judge" 0.1; settle
job prompts "$out/pairs/prompts/validation.jsonl" python splits.py --prompts "$out/pairs/all/validation.jsonl" --out "$out/pairs" --seed "$seed"; settle
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
job sft "$out/sft/model.safetensors" train sft.py --model "$model" --data "$out/pairs/all/train.jsonl" --out "$out/sft" --max_steps "$sft_steps"; settle
job judge "$out/judge/model/model.safetensors" train oracle.py --model "$model" --data "$out/judge/all/train.jsonl" --alpha 0 \
  --max_length 256 --batch_size 16 --max_steps 30 --out "$out/judge/model"
for set in $sets; do job "oracle_$set" "$out/$set/rewards.pt" teach "$set"; done; settle

# ---- the policies and what they say
job answer_sft "$out/sft/rewards.pt" answer sft "$out/sft"
for set in $sets; do
  for method in $order; do job "${set}_$method" "$out/$set/$method/rewards.pt" learn "$set" "$method"; done
done; settle

# ---- verdicts; how often the judge agrees with held-out labels
job accuracy "$out/accuracy.pt" python precompute_rewards.py --oracle "$out/judge/model" --data "$out/pairs/all/validation.jsonl" \
  --max_length "$length" --out "$out/accuracy.pt"; settle
python evaluate.py --generations "$out/sft/generations.jsonl" "$out"/{pairs,flipped,ambiguous}/*/generations.jsonl \
  --against sft {pairs,flipped,ambiguous}/dpo --out "$out/evaluation" > "$out/logs/evaluation.log"
python - "$out" <<'PYTHON'
import json, sys, torch
out = sys.argv[1]
verdict = json.load(open(f"{out}/evaluation/evaluation.json"))
held_out = [json.loads(line) for line in open(f"{out}/pairs/all/validation.jsonl")]
saved = torch.load(f"{out}/accuracy.pt", weights_only=True)
kept = (saved["chosen"] - saved["rejected"])[0].isfinite()
longer = [(len(row["chosen"]) > len(row["rejected"])) for row, keep in zip(held_out, kept) if keep]
right = (saved["chosen"] > saved["rejected"])[0, kept].float().mean()
print(f"\nOf {len(longer)} held-out pairs of PAIRS the longer response is the chosen one in {sum(longer) / len(longer):.2f}; the judge "
      f"is right in {right:.2f}.")
find = lambda rows, **keys: next((row for row in rows if all(row[key] == value for key, value in keys.items())), None)
print("\n| pairs | method | against SFT | against DPO | judge's reward | tokens, EOS |\n|---|---|---|---|---|---|")
for policy in verdict["policies"]:
    name, cells = policy["policy"], []
    for opponent in ("sft", name.split("/")[0] + "/dpo"):
        row = find(verdict["comparisons"], policy=name, opponent=opponent, temperature=policy["temperature"])
        cells.append("{:.2f} [{:.2f}, {:.2f}]".format(row["win_rate"], *row["win_rate_interval"]) if row else "")
    print(f"| {' | '.join(name.split('/') if '/' in name else ['', name])} | {' | '.join(cells)} | {policy['reward']:.2f} | "
          f"{policy['tokens']:.0f}, {policy['eos']:.2f} |")
PYTHON
echo; echo "$SECONDS s in all"
