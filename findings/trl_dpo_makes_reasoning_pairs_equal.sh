#!/usr/bin/env bash
# One would have sworn that a pair whose answers differ in their reasoning trains the model on that
# difference. With the chat template of the DeepSeek-R1 distillates, DPOTrainer in trl 1.16.0 renders the
# answers as turns of the past, and that template throws away all before </think> there: chosen and rejected
# become the same tokens, the loss stays at log 2 and every gradient is zero up to rounding. A warning
# speaks of a prompt that is not a prefix, not of lost reasoning. The wheel has a "training" variant of the
# template that keeps the reasoning, but DPOTrainer does not take it by itself; set tokenizer.chat_template
# to it. DeepSeek-V3's template loses the reasoning in both variants; Qwen3's and Nemotron's keep it.
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
import pathlib

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # bytes as tokens
raw = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet + ["<eos>"])}, []))
raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=raw, bos_token="<eos>", eos_token="<eos>", pad_token="<eos>")
folder = pathlib.Path(trl.__file__).parent / "chat_templates"
row = {"prompt": [{"role": "user", "content": "2+2?"}],
       "chosen": [{"role": "assistant", "content": "<think>\nTwo and two make four.\n</think>\n\n4"}],
       "rejected": [{"role": "assistant", "content": "<think>\nI guess.\n</think>\n\n4"}]}

def lm():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=257, hidden_size=16, intermediate_size=32,
                                        num_hidden_layers=1, num_attention_heads=2, eos_token_id=256))

equal = {}
for name in ("deepseek_r1_distill", "deepseek_r1_distill_training", "deepseekv3", "deepseekv3_training",
             "qwen3", "nemotron_3_nano"):
    tokenizer.chat_template = (folder / f"{name}.jinja").read_text()
    trainer = trl.DPOTrainer(
        model=lm(), ref_model=lm(), train_dataset=Dataset.from_list([row]), processing_class=tokenizer,
        args=trl.DPOConfig(output_dir="out", use_cpu=True, bf16=False, report_to=[]))
    tokens = trainer.train_dataset[0]
    equal[name] = tokens["chosen_ids"] == tokens["rejected_ids"]
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    gradient = max(p.grad.abs().max().item() for p in trainer.model.parameters())
    print(f"{name}: chosen {tokenizer.decode(tokens['chosen_ids'])!r}, equal to rejected: {equal[name]}, "
          f"loss {loss.item():.4f}, largest gradient {gradient:.1e}")
    assert abs(loss.item() - math.log(2)) < 1e-5 and (gradient < 1e-6) == equal[name]
assert [name for name in equal if equal[name]] == ["deepseek_r1_distill", "deepseekv3", "deepseekv3_training"]
PY
