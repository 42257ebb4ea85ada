#!/usr/bin/env bash
# One would have sworn that reference log-probs cached by DPOTrainer(precompute_ref_log_probs=True) belong to
# the run: that they are computed again when what they depend on has changed, and not when it has not. trl
# 1.16.0 names the cache file by the tokenised data and the weights. With max_length=None, or truncation_mode
# "keep_end", a run in bfloat16 reads the float32 log-probs of an earlier one, and one with ld_alpha, or
# another max_length, those of other tokens; nothing is said. With the default max_length it is the
# reverse: a step that filters the data closes over all arguments, so that another learning rate computes
# everything again. Only data with a cache on the disk are concerned (load_dataset, not Dataset.from_list).
# Where you change such a flag, give load_dataset another cache_dir.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 trl==1.16.0 datasets==5.2.0
cd "$dir"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1
"$dir/venv/bin/python" - <<'PY'
import json

import torch
from datasets import load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

words = {word: i for i, word in enumerate("<unk> <eos> the sky is blue green loud".split())}
raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>", pad_token="<unk>")
with open("pairs.jsonl", "w") as file:
    row = {"prompt": "the sky is", "chosen": " blue blue blue <eos>", "rejected": " loud <eos>"}
    file.write(json.dumps(row))
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(
    vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    bos_token_id=1, eos_token_id=1)).save_pretrained("base")

passes = []
compute = DPOTrainer.compute_ref_log_probs
DPOTrainer.compute_ref_log_probs = lambda self, *inputs: passes.append(1) or compute(self, *inputs)

def reference(cache, **flags):
    """(was it computed, log pi_ref(chosen)) of a run with these flags."""
    passes.clear()
    rows = load_dataset("json", data_files="pairs.jsonl", split="train", cache_dir=cache)
    args = DPOConfig(output_dir="out", use_cpu=True, report_to=[], precompute_ref_log_probs=True,
                     **{"bf16": False, "learning_rate": 1e-6} | flags)
    trainer = DPOTrainer(model="base", args=args, train_dataset=rows, processing_class=tokenizer)
    return bool(passes), trainer.train_dataset[0]["ref_chosen_logps"]

first, default = reference("shared")
assert first and not reference("shared")[0]  # the same run again reads the cache
again, same = reference("shared", learning_rate=1e-5)
print(f"max_length 1024, another learning rate: computed again: {again}; {default:.5f}, {same:.5f}")
assert again and same == default
_, before = reference("shared", max_length=None)
for number, flags in enumerate([dict(max_length=None, bf16=True), dict(max_length=None, ld_alpha=0.0),
                                dict(max_length=5, truncation_mode="keep_end")]):
    computed, read = reference("shared", **flags)
    _, right = reference(f"alone{number}", **flags)
    print(f"{flags}: computed: {computed}; it reads {read:.5f}, its own is {right:.5f}")
    assert not computed and read == before != right
PY
