#!/usr/bin/env bash
# One would have sworn that DPOConfig(label_smoothing=0.3) with the default loss gives conservative DPO, the
# loss for labels of which 30% are wrong. In trl 1.16.0 sigmoid, hinge and ipo take no notice of it, and
# nothing warns. robust takes it, but divides by 1 - 2 * 0.3 and may be negative; aot is the one that gives
# the conservative form (of sorted log-ratios, the same thing in a batch of one pair). Who sweeps
# label_smoothing over noisy preferences sees equal curves.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 trl==1.16.0 datasets==5.2.0
cd "$dir"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1
"$dir/venv/bin/python" - <<'PY'
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
rows = Dataset.from_list([{"prompt": "the sky is", "chosen": " blue", "rejected": " loud"}])
BETA, SMOOTHING = 1.0, 0.3

def model(change):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=1, eos_token_id=1))
    if change:
        torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    return model

def loss(name, smoothing):
    args = DPOConfig(output_dir=tempfile.mkdtemp(dir="."), use_cpu=True, bf16=False, report_to=[], beta=BETA,
                     loss_type=[name], label_smoothing=smoothing)
    trainer = DPOTrainer(model=model(True), ref_model=model(False), args=args, train_dataset=rows,
                         processing_class=tokenizer)
    return trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))).item()

losses = {}
for name in ("sigmoid", "hinge", "ipo", "robust", "aot"):
    losses[name] = (loss(name, 0.0), loss(name, SMOOTHING))
    without, smoothed = losses[name]
    print(f"{name}: {without:.4f} without smoothing, {smoothed:.4f} with label_smoothing={SMOOTHING}")
margin = -math.log(math.expm1(losses["sigmoid"][0]))  # since the loss is log(1 + exp(-margin))
clean, flipped = losses["sigmoid"][0], losses["sigmoid"][0] + margin
conservative = (1 - SMOOTHING) * clean + SMOOTHING * flipped
print(f"conservative DPO would be {conservative:.4f}")
assert all(losses[name][0] == losses[name][1] for name in ("sigmoid", "hinge", "ipo"))
assert abs(losses["aot"][1] - conservative) < 1e-4 and conservative < clean - 0.1
assert abs(losses["robust"][1] - ((1 - SMOOTHING) * clean - SMOOTHING * flipped) / (1 - 2 * SMOOTHING)) < 1e-4
PY
