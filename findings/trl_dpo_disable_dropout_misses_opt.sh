#!/usr/bin/env bash
# One would have sworn that DPOTrainer's disable_dropout=True, its default, ends dropout in any model, so that
# DPO starts at log 2: policy and reference are the same weights. trl 1.16.0 sets p = 0 in nn.Dropout modules
# alone. OPT (transformers 5.23.0) calls the function with a number from its config, 0.1 in the published
# models, and goes on dropping. The log-probs of a step are noise, policy and reference differ before the
# first update, and nothing warns. With learning rate 0 the losses are shown here of Llama, of OPT, and of
# OPT whose config was changed. Set config.dropout and attention_dropout to 0 before the model is made.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 trl==1.16.0 datasets==5.2.0
cd "$dir"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1
"$dir/venv/bin/python" - <<'PY'
import contextlib
import io
import math

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

words = {word: i for i, word in enumerate("<unk> <eos> the sky is blue green loud".split())}
raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>", pad_token="<unk>")
rows = Dataset.from_list([{"prompt": "the sky is", "chosen": " blue", "rejected": " loud green"}] * 3)
shape = dict(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)

def losses(name, config):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(name)
    args = DPOConfig(output_dir=name, use_cpu=True, bf16=False, report_to=[], beta=10.0, learning_rate=0.0,
                     num_train_epochs=1, per_device_train_batch_size=1, logging_steps=1, save_strategy="no")
    assert args.disable_dropout
    trainer = DPOTrainer(model=name, args=args, train_dataset=rows, processing_class=tokenizer)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]

seen = {
    "Llama": losses("llama", LlamaConfig(**shape, intermediate_size=32)),
    "OPT": losses("opt", OPTConfig(**shape, ffn_dim=32, word_embed_proj_dim=16)),
    "OPT, dropout=0": losses("opt_0", OPTConfig(**shape, ffn_dim=32, word_embed_proj_dim=16, dropout=0.0))}
for name, three in seen.items():
    print(f"{name}: losses", *(f"{loss:.4f}" for loss in three))
at_log_2 = {name for name, three in seen.items() if all(abs(loss - math.log(2)) < 1e-5 for loss in three)}
assert at_log_2 == {"Llama", "OPT, dropout=0"} and len(set(seen["OPT"])) == 3, seen
PY
