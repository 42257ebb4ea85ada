#!/usr/bin/env bash
# The whole pipeline on the toy task of tests/toy.py: raw comparisons, splits, SFT, the Oracle, an ensemble,
# four policies, their answers in and out of domain, and win rates against SFT by the Oracle and by the true
# reward. It takes about 6 minutes on two cores, with the installation into .venv (see environment.sh). It
# deletes what an older run left in out/toy.
#
#     bash tests/toy.sh                  # writes out/toy; SEED=1 bash tests/toy.sh for another world
#
# Two stages run side by side, on one thread each. What a stage printed is in out/toy/logs.
set -euo pipefail
cd "$(dirname "$0")/.."
out=out/toy seed=${SEED:-0}

. tests/environment.sh requirements.txt
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
rm -rf "$out"
mkdir -p "$out/logs"

port=29700
stage() {  # stage NAME COMMAND...: runs it in the background
  local name=$1; shift
  ( start=$SECONDS
    if ! "$@" > "$out/logs/$name.log" 2>&1; then
      tail -n 15 "$out/logs/$name.log" >&2; echo "$name failed" >&2; exit 1
    fi
    echo "$name: $((SECONDS - start)) s" ) &
}
launch() {  # launch NAME STAGE...: in fp32, whatever the processor has
  port=$((port + 1))
  stage "$1" deepspeed --num_gpus 1 --master_port "$port" "${@:2}" --seed "$seed" --dtype fp32
}
settle() { local job; for job in $(jobs -p); do wait "$job"; done; }  # waits for both; fails where one did

# ---- data: raw sets in the schemas of the real ones, a base LM
stage toy python tests/toy.py --out "$out" --seed "$seed"; settle
stage splits python splits.py --out "$out/data" --seed "$seed" \
  --dataset "$out/raw/comparisons.jsonl" "$out/raw/sft.jsonl" \
  --prompts "$out/raw/test.jsonl" "$out/raw/articles.jsonl"; settle
cat "$out/data/prompts/test.jsonl" "$out/data/prompts/articles.jsonl" > "$out/data/prompts/both.jsonl"

# ---- the SFT policy, the Oracle, an ensemble
short="--save_steps 0 --warmup_steps 10"
pairs="--model $out/sft --data $out/data/all/train.jsonl --eval_data $out/data/all/validation.jsonl $short"
launch sft sft.py --model "$out/base" --data "$out/data/sft/train.jsonl" --out "$out/sft" $short \
  --eval_data "$out/data/sft/validation.jsonl" --batch_size 32 --max_steps 150 --learning_rate 1e-3; settle
reward_model() { launch "$1" oracle.py $pairs --out "$out/$1" --batch_size 16 --learning_rate 2e-3 "${@:2}"; }
reward_model oracle --max_steps 400
seed=$((seed + 1)) reward_model reward_model_1 --alpha 0 --max_steps 250; settle
seed=$((seed + 2)) reward_model reward_model_2 --alpha 0 --max_steps 250
seed=$((seed + 3)) reward_model reward_model_3 --alpha 0 --max_steps 250; settle
score() { stage "$1" python precompute_rewards.py --out "$out/$1.pt" --data "$out/$2" --oracle "${@:3}"; }
score rewards data/all/train.jsonl "$out/oracle"
score ensemble data/all/train.jsonl "$out"/reward_model_{1,2,3}; settle

# ---- four policies: the same steps, batch and learning rate
align() { launch "$1" align.py $pairs --out "$out/$1" --batch_size 24 --micro_batch_size 24 --max_steps 100 \
  --learning_rate 5e-4 "${@:2}"; }
align drdo_head --loss drdo --oracle_rewards "$out/rewards.pt"
align drdo_logps --loss drdo --student_rewards logps --oracle_rewards "$out/rewards.pt"; settle
align dpo --loss dpo
align edpo --loss edpo --oracle_rewards "$out/ensemble.pt"; settle

# ---- their answers, scored by the Oracle
answer() { launch "generate_$1" generate.py --model "$out/$1" --generator "$2" --max_new_tokens 48 \
  --prompts "$out/data/prompts/both.jsonl" --micro_batch_size 100; }
answer sft "SFT"
answer drdo_head "DRDO (head)"; settle
answer drdo_logps "DRDO (logps)"
answer dpo "DPO"; settle
answer edpo "e-DPO"; settle
cat "$out"/{sft,drdo_head,drdo_logps,dpo,edpo}_generations.jsonl > "$out/generations.jsonl"
score generations generations.jsonl "$out/oracle"; settle
stage curves python evaluate.py --curves "$out"/{drdo_head,drdo_logps,dpo,edpo} --out "$out/curves"
against="--generations $out/generations.jsonl --against SFT reference --group_by dataset"
stage by_oracle python evaluate.py $against --rewards "$out/generations.pt" --out "$out/by_oracle"; settle
stage by_true_reward python evaluate.py $against --reward_fn tests/toy.py:true_reward \
  --out "$out/by_true_reward"; settle

# ---- the verdicts side by side
python - "$out" <<'PYTHON'
import json, sys
oracle, true = (json.load(open(f"{sys.argv[1]}/{by}/evaluation.json")) for by in ("by_oracle", "by_true_reward"))

def find(rows, **keys):
    return next(row for row in rows if all(row[key] == value for key, value in keys.items()))

print("\nWin rate against SFT, 95% interval over prompts, four temperatures pooled (a tie counts half); mean")
print("true reward and length. test: posts, in domain; articles: out of domain.\n")
titles = "policy", "prompts", "by the Oracle", "by the true reward", "true reward", "tokens", "EOS"
print("| {:12} | {:8} | {:20} | {:20} | {:11} | {:>6} | {:>4} |".format(*titles))
print("|" + "|".join("-" * (n + 2) for n in (12, 8, 20, 20, 11, 6, 4)) + "|")
line = "| {:12} | {:8} | {:20} | {:20} | {:11.2f} | {:>6} | {:>4} |"
for prompts in ("test", "articles"):
    where = {"group": f"dataset {prompts}", "temperature": "all"}
    gold = find(true["policies"], policy="SFT", **where)["reward"]
    gold -= find(true["comparisons"], policy="SFT", opponent="reference", **where)["reward_difference"]
    print(line.format("reference", prompts, "", "", gold, "", ""))
    for policy in dict.fromkeys(row["policy"] for row in true["policies"]):
        own, wins = find(true["policies"], policy=policy, **where), ["", ""]
        if policy != "SFT":
            rows = [find(by["comparisons"], policy=policy, opponent="SFT", **where) for by in (oracle, true)]
            wins = ["{:.3f} [{:.3f}, {:.3f}]".format(r["win_rate"], *r["win_rate_interval"]) for r in rows]
        print(line.format(policy, prompts, *wins, own["reward"], f"{own['tokens']:.1f}", f"{own['eos']:.2f}"))
PYTHON
echo; echo "$SECONDS s in all. Tables and pictures by temperature: $out/by_oracle, $out/by_true_reward, $out/curves"
