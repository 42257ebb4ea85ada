#!/usr/bin/env bash
# One would have sworn that the rows of a batch do not touch each other, the less so where all are equally
# long and nothing is padded. transformers 5.23.0's RWKV-4 reads a batch rightly in one call. But
# the state that it returns is wrong for a batch above one: the next token's logits are others than without a
# batch, and so is greedy text. Nothing warns. One row alone is right, and so is Mamba's batch. Generate
# answers of an RWKV one prompt at a time. Shown: the largest difference of logits, of size 1.5, between a
# batch of three and each of its rows alone, in the first call and at the next token.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$dir"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
"$dir/venv/bin/python" - <<'PY'
import torch
from transformers import MambaConfig, MambaForCausalLM, RwkvConfig, RwkvForCausalLM

shape = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2)
cases = {"RWKV": (RwkvForCausalLM, RwkvConfig(**shape, context_length=64), "state"),
         "Mamba": (MambaForCausalLM, MambaConfig(**shape), "cache_params")}
seen = {}
for name, (kind, config, memory) in cases.items():
    torch.manual_seed(0)
    model = kind(config).eval()
    ids = torch.randint(50, (3, 9))

    @torch.no_grad()
    def read(rows):
        """The logits of the last token of all but one, and those of the last one, read with the state."""
        first = model(rows[:, :-1], use_cache=True)
        following = model(rows[:, -1:], use_cache=True, **{memory: getattr(first, memory)})
        return torch.stack([first.logits[:, -1], following.logits[:, -1]])  # (2, rows, V)

    alone = torch.cat([read(row[None]) for row in ids], 1)
    seen[name] = (read(ids) - alone).abs().amax((1, 2)).tolist()
    whole = model(ids).logits[:, -1]
    assert (alone[1] - whole).abs().max() < 1e-5, "one row alone is right"
    print(name, "difference in the first call {:.1e}, at the next token {:.1e}".format(*seen[name]))
assert seen["RWKV"][0] < 1e-5 and seen["RWKV"][1] > 0.1, seen
assert max(seen["Mamba"]) < 1e-5, seen
PY
