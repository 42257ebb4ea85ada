#!/usr/bin/env bash
# The whole road on the laboratory of tests/toy.py: raw comparisons -> splits -> SFT -> the Oracle, and an ensemble of
# three -> DRDO as printed, DRDO with r^ = beta log pi, DPO, e-DPO -> generations in and out of domain -> win rates
# against SFT, by the Oracle and by the true reward. About 5 minutes on two cores, the installation included. It deletes
# what an older run left in out/toy; the packages go into the active environment, or else into .venv.
#
#     bash tests/toy.sh                  # writes out/toy; SEED=1 bash tests/toy.sh for another world
#
# Two stages run side by side, on one thread each. What a stage printed is in out/toy/logs.
set -euo pipefail
cd "$(dirname "$0")/.."
out=out/toy seed=${SEED:-0}

if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
  python3 -m venv .venv
  . .venv/bin/activate
fi
python -m pip install -q -r requirements.txt
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
rm -rf "$out"
mkdir -p "$out/logs"

port=29700
stage() {  # stage NAME COMMAND...: runs it in the background
  local name=$1; shift
  ( start=$SECONDS
    "$@" > "$out/logs/$name.log" 2>&1 || { tail -n 15 "$out/logs/$name.log" >&2; echo "$name failed" >&2; exit 1; }
    echo "$name: $((SECONDS - start)) s" ) &
}
launch() { port=$((port + 1)); stage "$1" deepspeed --num_gpus 1 --master_port "$port" "${@:2}"; }
settle() { local job; for job in $(jobs -p); do wait "$job"; done; }  # until both stages are done; fails where one did

# ---- data: raw sets in the schemas of the real ones, a base LM
stage toy python tests/toy.py --out "$out" --seed "$seed"; settle
stage splits python splits.py --out "$out/data" --seed "$seed" --dataset "$out/raw/comparisons.jsonl" "$out/raw/sft.jsonl" \
  --prompts "$out/raw/test.jsonl" "$out/raw/articles.jsonl"; settle
cat "$out/data/prompts/test.jsonl" "$out/data/prompts/articles.jsonl" > "$out/data/prompts/both.jsonl"
pairs="--model $out/sft --data $out/data/all/train.jsonl --eval_data $out/data/all/validation.jsonl --save_steps 0 --warmup_steps 10"

# ---- the SFT policy, the Oracle, an ensemble
launch sft sft.py --model "$out/base" --data "$out/data/sft/train.jsonl" --eval_data "$out/data/sft/validation.jsonl" \
  --out "$out/sft" --batch_size 32 --max_steps 150 --learning_rate 1e-3 --warmup_steps 10 --save_steps 0 --seed "$seed"; settle
launch oracle oracle.py $pairs --out "$out/oracle" --batch_size 16 --max_steps 400 --learning_rate 2e-3 --seed "$seed"
for k in 1 2 3; do
  launch "reward_model_$k" oracle.py $pairs --out "$out/reward_model_$k" --alpha 0 --batch_size 16 --max_steps 250 \
    --learning_rate 2e-3 --seed "$((seed + k))"
  [ "$k" = 2 ] || settle
done
launch rewards precompute_rewards.py --oracle "$out/oracle" --data "$out/data/all/train.jsonl" --out "$out/rewards.pt"
launch ensemble precompute_rewards.py --oracle "$out"/reward_model_{1,2,3} --data "$out/data/all/train.jsonl" --out "$out/ensemble.pt"; settle

# ---- four policies: the same steps, batch and learning rate
pairs="$pairs --batch_size 24 --micro_batch_size 24 --max_steps 100 --learning_rate 5e-4 --seed $seed"
launch drdo align.py --loss drdo --oracle_rewards "$out/rewards.pt" $pairs --out "$out/drdo"
launch drdo_logps align.py --loss drdo --student_rewards logps --oracle_rewards "$out/rewards.pt" $pairs --out "$out/drdo_logps"; settle
launch dpo align.py --loss dpo $pairs --out "$out/dpo"
launch edpo align.py --loss edpo --oracle_rewards "$out/ensemble.pt" $pairs --out "$out/edpo"; settle

# ---- generations, scored by the Oracle
policies="sft drdo drdo_logps dpo edpo"
for policy in $policies; do
  launch "generate_$policy" generate.py --model "$out/$policy" --generator "$policy" --prompts "$out/data/prompts/both.jsonl" \
    --max_new_tokens 48 --micro_batch_size 100 --seed "$seed"
  case $policy in drdo | dpo | edpo) settle ;; esac
done
for policy in $policies; do cat "$out/$policy/generations.jsonl"; done > "$out/generations.jsonl"
launch judge precompute_rewards.py --oracle "$out/oracle" --data "$out/generations.jsonl" --out "$out/generations.pt" --micro_batch_size 100; settle
stage curves python evaluate.py --curves "$out"/{drdo,drdo_logps,dpo,edpo} --out "$out/curves"
against="--generations $out/generations.jsonl --against sft reference --group_by dataset"
stage by_oracle python evaluate.py $against --rewards "$out/generations.pt" --out "$out/by_oracle"; settle
stage by_truth python evaluate.py $against --reward_fn tests/toy.py:true_reward --out "$out/by_truth"; settle

# ---- the verdicts side by side
python - "$out" <<'PYTHON'
import json, sys
out = sys.argv[1]
oracle, truth = (json.load(open(f"{out}/{judge}/evaluation.json")) for judge in ("by_oracle", "by_truth"))
find = lambda rows, **keys: next(row for row in rows if all(row[key] == value for key, value in keys.items()))
print("\nWin rate against SFT with its 95% interval over prompts, four temperatures pooled (a tie counts half); mean true")
print("reward and length. test: posts, in domain; articles: out of domain.\n")
print("| policy     | prompts  | by the Oracle        | by the true reward   | true reward | tokens |  EOS |")
print("|------------|----------|----------------------|----------------------|-------------|--------|------|")
for group in ("dataset test", "dataset articles"):
    gold = find(truth["comparisons"], policy="sft", opponent="reference", group=group, temperature="all")
    gold = find(truth["policies"], policy="sft", group=group, temperature="all")["reward"] - gold["reward_difference"]
    print(f"| reference  | {group[8:]:8} | {'':20} | {'':20} | {gold:11.2f} | {'':6} | {'':4} |")
    for policy in dict.fromkeys(row["policy"] for row in truth["policies"]):
        own = find(truth["policies"], policy=policy, group=group, temperature="all")
        cells = [f"{'':20}"] * 2
        if policy != "sft":
            both = [find(judge["comparisons"], policy=policy, opponent="sft", group=group, temperature="all") for judge in (oracle, truth)]
            cells = ["{:.3f} [{:.3f}, {:.3f}]".format(row["win_rate"], *row["win_rate_interval"]) for row in both]
        print(f"| {policy:10} | {group[8:]:8} | {cells[0]} | {cells[1]} | {own['reward']:11.2f} | {own['tokens']:6.1f} | {own['eos']:.2f} |")
PYTHON
echo; echo "$SECONDS s in all. Tables and pictures by temperature: $out/by_oracle, $out/by_truth, $out/curves"
