#!/usr/bin/env bash
# One would have sworn that DPOTrainer without a ref_model takes a copy of the model it is given as the
# reference, so that the loss starts at log 2. trl 1.16.0 loads the reference again from the folder (or hub
# name) that the model once came from. A model that was changed in memory since (SFT in the same script, a
# merged adapter, weights that were edited) is trained against what lies on the disk, and no warning says
# so. With precompute_ref_log_probs=True the reference is the model in memory after all: the flag that
# should only save time changes the loss. Pass ref_model, or save before.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 trl==1.16.0 datasets==5.2.0
cd "$dir"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1
"$dir/venv/bin/python" - <<'PY'
import itertools
import math
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

words = {word: i for i, word in enumerate("<unk> <eos> the sky is blue green loud".split())}
raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>", pad_token="<unk>")
rows = Dataset.from_list([{"prompt": "the sky is", "chosen": " blue", "rejected": " loud"}] * 2)
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(
    vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    bos_token_id=1, eos_token_id=1)).save_pretrained("base")

def first_loss(change, precompute):
    model = LlamaForCausalLM.from_pretrained("base")
    if change:  # stands for a stage of training in the same script
        with torch.no_grad():
            model.lm_head.weight[words["blue"]] += 1
    args = DPOConfig(output_dir=tempfile.mkdtemp(dir="."), use_cpu=True, bf16=False, report_to=[], beta=0.5,
                     precompute_ref_log_probs=precompute)
    trainer = DPOTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    return trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))).item()

loss = {}
for change, precompute in itertools.product((False, True), repeat=2):
    loss[change, precompute] = first_loss(change, precompute)
    print(f"model changed in memory: {change}, precompute_ref_log_probs: {precompute}: "
          f"first loss {loss[change, precompute]:.4f}")
same = {key for key, value in loss.items() if abs(value - math.log(2)) < 1e-5}
assert same == {(False, False), (False, True), (True, True)}, loss
PY
