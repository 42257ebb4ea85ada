#!/usr/bin/env bash
# One would have sworn that SFTConfig(assistant_only_loss=True) changes which tokens are trained and not the
# text. In trl 1.16.0 it swaps the template of a model that it knows for a "training" one. For Qwen3 that
# one writes an empty thought into every earlier assistant turn, where Qwen3's own template writes none; the
# tokenizer that is saved keeps the original. So the model is trained on conversations that it never meets
# in use, and two runs that differ in this flag alone differ in their input ids. Of the "training" templates
# in the wheel five render plain conversations otherwise than their originals; the rest add only marks.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 trl==1.16.0 datasets==5.2.0
cd "$dir"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1
"$dir/venv/bin/python" - <<'PY'
import pathlib

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # bytes as tokens
raw = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet + ["<|im_end|>"])}, []))
raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
end = "<|im_end|>"
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=end, eos_token=end, pad_token=end)
folder = pathlib.Path(trl.__file__).parent / "chat_templates"
qwen3 = (folder / "qwen3.jinja").read_text()
messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4."},
            {"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "6."}]
texts = {}
for flag in (False, True):
    torch.manual_seed(0)
    tokenizer.chat_template = qwen3
    trainer = trl.SFTTrainer(
        model=LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32,
                                           num_hidden_layers=1, num_attention_heads=2, eos_token_id=256)),
        args=trl.SFTConfig(output_dir="out", use_cpu=True, bf16=False, report_to=[],
                           assistant_only_loss=flag),
        train_dataset=Dataset.from_list([{"messages": messages}]), processing_class=tokenizer)
    texts[flag] = tokenizer.decode(trainer.train_dataset[0]["input_ids"])
    print(f"assistant_only_loss={flag}: {texts[flag]!r}")
    assert trainer.processing_class.chat_template == qwen3  # what is saved with the model
thought = "<think>\n\n</think>\n\n"
assert texts[False].count(thought) == 1 and texts[True].count(thought) == 2

def render(template):
    content = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    tokenizer.chat_template = template.read_text()
    return tokenizer.apply_chat_template(content if "llava" in template.name else messages, tokenize=False)

training = sorted(folder.glob("*_training.jinja"))
other = [t.name for t in training if render(t) != render(folder / t.name.replace("_training", ""))]
print(f"{len(other)} of {len(training)} training templates render another text:", ", ".join(other))
assert other == ["glm4moe_training.jinja", "qwen3_5_nothink_training.jinja", "qwen3_5_think_training.jinja",
                 "qwen3_6_training.jinja", "qwen3_training.jinja"]
PY
