#!/usr/bin/env bash
# One would have sworn that autocast computes softmax, log_softmax, logsumexp, log, exp and sum in float32,
# as it does on a GPU. In torch 2.13.0 autocast("cpu", bfloat16) leaves all of them in bfloat16, and makes
# only cross_entropy and a few other losses float32. So the same log-prob of the same answer is good by
# cross_entropy and coarse by log_softmax + gather, which is how preference losses are mostly written;
# logsigmoid of the margin is coarse too. The log-prob of 200 tokens is then off by more than one, as much
# as the margins that a pair is trained on. Calling .float() on the logits inside autocast cures it.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0
cd "$dir"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
"$dir/venv/bin/python" - <<'PY'
import torch
import torch.nn.functional as F

torch.manual_seed(0)
# two answers of 200 tokens, as a model under autocast returns them
logits = (2 * torch.randn(2, 200, 1000)).bfloat16()
tokens = torch.randint(0, 1000, (2, 200))
with torch.autocast("cpu", torch.bfloat16):
    results = {
        "softmax": logits.softmax(-1), "log_softmax": logits.log_softmax(-1),
        "logsumexp": logits.logsumexp(-1), "exp": logits.exp(), "log": logits.abs().log(),
        "sum": logits.sum(-1), "logsigmoid": F.logsigmoid(logits[0, 0]),
        "cross_entropy": F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none"),
    }
    gathered = results["log_softmax"].gather(-1, tokens[..., None])[..., 0].sum(-1)
    by_cross_entropy = -results["cross_entropy"].view(2, 200).sum(-1)
exact = logits.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0].sum(-1)
print({name: str(result.dtype) for name, result in results.items()})
coarse = (gathered.double() - exact).abs().max().item()
fine = (by_cross_entropy.double() - exact).abs().max().item()
print(f"exact log-probs {exact.tolist()}")
print(f"log_softmax + gather is off by {coarse:.3f}, cross_entropy by {fine:.6f}")
assert results.pop("cross_entropy").dtype == torch.float32
assert all(result.dtype == torch.bfloat16 for result in results.values())
assert coarse > 0.5 and fine < 0.01
PY
