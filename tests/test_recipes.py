"""PAPER.md's recipe for TRL, run as it stands there, trains as align.py does."""
import importlib.util
import json
import re

import pytest
import torch
from conftest import ROOT, call, ends, read_jsonl, save_rewards

import toy
from templates import make_tokenizer

# it ends in the end token: behind others TRL trains on a newline too
TEMPLATE = ("{% for m in messages %}<|head|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|head|>assistant\n{% endif %}")


@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="TRL is not installed")
def test_three_steps_in_trl_have_the_losses_of_align(tmp_path):
    tokenizer = make_tokenizer(TEMPLATE)
    tokenizer.save_pretrained(tmp_path / "out/sft")
    toy.make_model(tokenizer, hidden_size=16, layers=1).save_pretrained(tmp_path / "out/sft")
    data = tmp_path / "data/all/train.jsonl"
    data.parent.mkdir(parents=True)
    rows = [{"prompt": [{"role": "user", "content": f"{i} + {i}?"}], "chosen": f"It is {2 * i}.",
             "rejected": "Four." * (1 + i % 3)} for i in range(66)]
    toy.write_jsonl(data, rows)
    rewards = torch.randn(2, 66, 2, generator=torch.Generator().manual_seed(0))
    rewards[:, :, 0] += 2  # chosen is the better one
    rewards[0, 3], rewards[1, 5, 0] = torch.nan, torch.nan  # 64 pairs are left: a step
    save_rewards(tmp_path / "rewards.pt", data, rewards)

    blocks = re.findall("```python\n(.*?)```", (ROOT / "tests/PAPER.md").read_text(), re.DOTALL)
    [recipe] = [block for block in blocks if "DPOTrainer" in block]
    (tmp_path / "recipe.py").write_text(recipe)
    status, _, errors = ends([(tmp_path, [tmp_path / "recipe.py"])])
    assert status == 0, errors
    call("align.py", "--model", tmp_path / "out/sft", "--data", data, "--eval_data", "", "--out",
         tmp_path / "out/drdo", "--oracle_rewards", tmp_path / "rewards.pt", "--student_rewards", "log_ratio",
         "--p_w", "mean", "--beta", 0.03, "--standardise_oracle", "--warmup_steps", 0, "--log_steps", 1)

    state = json.loads((tmp_path / "out/trl_drdo/checkpoint-3/trainer_state.json").read_text())
    steps = [*zip(state["log_history"][:3], read_jsonl(tmp_path / "out/drdo/log.jsonl"), strict=True)]
    for theirs, ours in steps:
        for name in "loss", "loss/distillation", "loss/contrastive", "rewards/margins", "learning_rate":
            assert theirs[name] == pytest.approx(ours[name], rel=1e-5, abs=1e-6), (name, theirs, ours)
    assert ours["rewards/margins"] > 1e-5  # the log ratio has moved
