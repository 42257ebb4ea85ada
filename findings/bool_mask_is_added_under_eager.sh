#!/usr/bin/env bash
# One would have sworn that a 4D boolean attention mask (True: may look) means the same to every attention
# implementation, or is refused where it does not. In transformers 5.23.0 sdpa masks with it, but eager adds
# it to the scores as the numbers 1 and 0: nothing is hidden, not even the future, and nothing is raised.
# Whoever packs a prompt with its chosen and rejected answer in one row by such a mask gets a model that
# reads ahead as soon as attention is eager (asked for, or because attention weights are wanted). The same
# mask as floats (0 and the smallest number) is right in both.
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

ids = torch.randint(0, 50, (1, 9), generator=torch.Generator().manual_seed(0))
positions = torch.tensor([[0, 1, 2, 3, 4, 5, 3, 4, 5]])  # prompt of 3 tokens, chosen 3, rejected 3
see = torch.ones(9, 9, dtype=torch.bool).tril()
see[6:, 3:6] = False  # the rejected answer does not see the chosen one
see = see[None, None]
floats = torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)
other = ids.clone()
other[0, -1] = (ids[0, -1] + 1) % 50  # another last token: no earlier logit may move

for attention, mask, name in (("sdpa", see, "bool"), ("sdpa", floats, "float"),
                              ("eager", see, "bool"), ("eager", floats, "float")):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        attn_implementation=attention)).eval()
    with torch.no_grad():
        logits = model(ids, position_ids=positions, attention_mask=mask).logits
        changed = model(other, position_ids=positions, attention_mask=mask).logits
        ahead = (logits - changed)[:, :-1].abs().max()
        alone = model(torch.cat([ids[:, :3], ids[:, 6:]], 1)).logits[:, 3:]
        error = (logits[:, 6:] - alone).abs().max()
    print(f"{attention}, {name} mask: rejected logits off by {error:.1e}, "
          f"earlier logits follow the last token by {ahead:.1e}")
    wrong = attention == "eager" and name == "bool"
    assert (error > 1e-2 and ahead > 1e-3) if wrong else (error < 1e-5 and ahead == 0)
PY
