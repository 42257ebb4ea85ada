#!/usr/bin/env bash
# One would have sworn that a DPO prompt whose last message is the assistant's (the beginning of an answer
# that chosen and rejected go on with) is continued in that turn, as
# apply_chat_template(continue_final_message=True) does. DPOTrainer in trl 1.16.0 closes that turn and opens
# a second one for the same assistant: both answers are trained to follow an end of turn, and nothing warns.
# Its tokens are shown here beside those of the continued turn. Put the beginning into both answers, or hand
# in plain text.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 trl==1.16.0 datasets==5.2.0
cd "$dir"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1
"$dir/venv/bin/python" - <<'PY'
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # bytes as tokens
raw = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet + ["<|im_end|>"])}, []))
raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|im_end|>")
tokenizer.chat_template = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
prompt = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "The answer"}]
row = {"prompt": prompt, "chosen": [{"role": "assistant", "content": " is 4"}],
       "rejected": [{"role": "assistant", "content": " is 5"}]}
torch.manual_seed(0)
policy, reference = [LlamaForCausalLM(LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, eos_token_id=256)) for _ in range(2)]
trainer = DPOTrainer(
    model=policy, ref_model=reference, train_dataset=Dataset.from_list([row]), processing_class=tokenizer,
    args=DPOConfig(output_dir="out", use_cpu=True, bf16=False, report_to=[]))
tokens = trainer.train_dataset[0]
seen = tokenizer.decode(tokens["prompt_ids"])
continued = tokenizer.apply_chat_template(prompt, tokenize=False, continue_final_message=True)
print("DPOTrainer's prompt:", repr(seen))
print("the continued turn: ", repr(continued))
print("chosen:", repr(tokenizer.decode(tokens["chosen_ids"])))
assert continued.endswith("assistant\nThe answer")
assert seen == continued + "<|im_end|>\n<|im_start|>assistant\n"
PY
