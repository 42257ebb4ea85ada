#!/usr/bin/env bash
# One would have sworn that use_cache says only whether keys and values are kept, and that one forward pass
# gives the same logits with it and without. In transformers 5.23.0 it decides who sees whom. Position ids
# that restart, with no attention mask, are taken as several texts packed in one row, and each text is
# masked from the others; but only with use_cache=False. With the default (True), or with a mask of ones,
# the second text sees the first, under sdpa and eager alike. A packed pair (or padding-free batch) that is
# trained with use_cache=False and scored by a plain call gets other log-probs, without a warning.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$dir"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
"$dir/venv/bin/python" - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.randint(0, 50, (1, 12), generator=torch.Generator().manual_seed(0))
positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]])  # two texts of six tokens in one row
for attention in ("sdpa", "eager"):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        attn_implementation=attention)).eval()
    with torch.no_grad():
        alone = model(ids[:, 6:]).logits
        error = {}
        for name, options in {
            "default": {},
            "use_cache=True": {"use_cache": True},
            "use_cache=False": {"use_cache": False},
            "use_cache=False and a mask of ones": {
                "use_cache": False, "attention_mask": torch.ones_like(ids)},
        }.items():
            packed = model(ids, position_ids=positions, **options).logits[:, 6:]
            error[name] = (packed - alone).abs().max().item()
            print(f"{attention}, {name}: the packed text's logits differ from its own by {error[name]:.1e}")
    assert error.pop("use_cache=False") < 1e-5, error
    assert min(error.values()) > 1e-2, error
PY
