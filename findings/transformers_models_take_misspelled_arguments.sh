#!/usr/bin/env bash
# One would have sworn that a keyword argument that a model's forward does not know raises a TypeError. In
# transformers 5.23.0 the forward of Llama, Qwen2, Phi-3, OPT, GPT-NeoX and GPT-2 ends in **kwargs, which is
# handed down to the attention function, and nobody complains. With `attention_masks` and `position_id` a
# model answers as if mask and positions had not been given: a padded row gets other logits. (Of a missing
# mask a line warns once, if a pad token stands at the start or the end; of positions none.) A column that a
# collator leaves in the batch is taken as quietly. Compare a padded row with the row alone once.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$dir"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
"$dir/venv/bin/python" - <<'PY'
import torch
from transformers import AutoConfig, AutoModelForCausalLM

quiet = []
for family in "llama qwen2 phi3 opt gpt_neox gpt2".split():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        family, vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, word_embed_proj_dim=32, initializer_range=0.5,
        pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()
    row = torch.tensor([[5, 6, 7]])
    padded = torch.tensor([[0, 0, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 1, 2]])
    with torch.no_grad():
        right = model(input_ids=row).logits[0, -1]
        spelled = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[0, -1]
        wrong = model(input_ids=padded, attention_masks=mask, position_id=positions).logits[0, -1]
    spelled, wrong = (spelled - right).abs().max().item(), (wrong - right).abs().max().item()
    print(f"{family}: error of a padded row, arguments spelled right {spelled:.0e}, misspelled {wrong:.1e}")
    if spelled < 1e-4 and wrong > 1e-2:
        quiet.append(family)
assert quiet == "llama qwen2 phi3 opt gpt_neox gpt2".split(), quiet
PY
