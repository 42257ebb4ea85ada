"""generate.py by its output: a policy that draws each token from a distribution that is known."""
import sys
from collections import Counter

import pytest
import torch
from conftest import call, read_jsonl
from transformers import LlamaConfig, LlamaForCausalLM

import generate
import toy

# The next token, whatever the policy has read. With top-p 0.8 the first three are left at temperature 1, the
# first two at 0.5, which squares the probabilities.
CHANCES = {"storm": 0.4, "<unk>": 0.3, "fire": 0.15, "flood": 0.1, "</s>": 0.05}
SHARES = {1.0: {"storm": 0.4 / 0.85, "<unk>": 0.3 / 0.85, "fire": 0.15 / 0.85},
          0.5: {"storm": 0.16 / 0.25, "<unk>": 0.09 / 0.25}}
PROMPTS = list({row["prompt"]: None for row in toy.make_pairs(100, 1)})[:40]


def write_policy(folder, **decoding):
    """A Llama whose last hidden state is all ones, so that column 0 of its LM head is its log-probs.
    `decoding` goes to its generation_config.json."""
    tokenizer = toy.make_tokenizer()
    lm = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=160, tie_word_embeddings=False))
    for parameter in lm.parameters():
        parameter.data.zero_()
    lm.model.embed_tokens.weight.data.fill_(1)
    lm.model.norm.weight.data.fill_(1)
    lm.lm_head.weight.data[:, 0] = -50
    for word, chance in CHANCES.items():
        lm.lm_head.weight.data[tokenizer.convert_tokens_to_ids(word), 0] = torch.tensor(chance).log()
    lm.generation_config.update(**decoding)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def generations(folder, *flags):
    call("generate.py", "--model", folder, "--prompts", folder / "prompts.jsonl", *flags)
    return read_jsonl(f"{folder}_generations.jsonl")


def test_sampling_is_top_p_at_each_temperature(tmp_path):
    """The policy's own repetition penalty and top-k do not leak in. Special tokens leave the text."""
    write_policy(tmp_path, do_sample=True, repetition_penalty=5.0, top_k=1)
    toy.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    flags = ["--temperature", 1, 0.5, "--max_new_tokens", 40, "--micro_batch_size", 8]
    rows = generations(tmp_path, *flags)
    expected = [(prompt, temperature) for prompt in PROMPTS for temperature in (1.0, 0.5)]
    assert [(row["prompt"], row["temperature"]) for row in rows] == expected
    for temperature, shares in SHARES.items():
        responses = [row["response"] for row in rows if row["temperature"] == temperature]
        drawn = 40 * len(PROMPTS)
        counts = Counter(" ".join(responses).split())
        counts["<unk>"] += drawn - counts.total()
        assert counts.keys() == shares.keys()
        for word, share in shares.items():
            assert abs(counts[word] - drawn * share) < 5 * (drawn * share * (1 - share)) ** 0.5
    assert all(row["tokens"] == 40 and not row["eos"] for row in rows)
    # every batch has a seed of its own, which --seed changes. At 1.0 two words are left in the text
    texts, again, others = ({row["response"] for row in run if row["temperature"] == 1.0} for run in (
        rows, generations(tmp_path, *flags), generations(tmp_path, *flags, "--seed", 1)))
    assert len(texts) == len(PROMPTS) and again == texts and not others & texts


def test_a_response_ends_at_each_of_the_policys_ends(tmp_path):
    tokenizer = toy.make_tokenizer()
    ends = tokenizer.convert_tokens_to_ids(["flood", "fire"])
    write_policy(tmp_path, eos_token_id=ends)
    toy.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    rows = generations(tmp_path, "--temperature", 1, "--top_p", 1, "--max_new_tokens", 12)
    ended = sum(row["eos"] for row in rows)
    expected = 1 - 0.7 ** 12  # fire, flood and the tokenizer's </s> end it
    assert abs(ended - expected * len(rows)) < 5 and 0 < ended
    for row in rows:
        assert set(row["response"].split()) <= {"storm"}
        assert row["tokens"] < 12 if row["eos"] else row["tokens"] == 12


@pytest.mark.parametrize("num_prompts, taken", [(0, 9), (5, 5), (99, 9)])
def test_the_first_prompts_once_each(tmp_path, num_prompts, taken):
    """What the prompt's row carried travels along, but for a pair's responses."""
    write_policy(tmp_path)
    rows = [{"prompt": PROMPTS[i], "id": i, "chosen": " a", "rejected": " b"}
            for i in (0, 0, 1, 2, 1, 3, 4, 5, 6, 7, 8, 0)]
    toy.write_jsonl(tmp_path / "prompts.jsonl", rows)
    rows = generations(tmp_path, "--num_prompts", num_prompts, "--temperature", 0, "--max_new_tokens", 2)
    assert [(row["prompt"], row["id"]) for row in rows] == [(PROMPTS[i], i) for i in range(taken)]
    own = {"response", "temperature", "generator", "tokens", "eos"}
    assert all(row.keys() == {"prompt", "id"} | own and row["generator"] == str(tmp_path) for row in rows)


def test_answers_lie_beside_the_model(tmp_path, monkeypatch):
    """In out/ if its name is of the hub. A folder that people upload holds the model alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "out/drdo").mkdir(parents=True)
    for model, out in ("base/", "base"), ("out/drdo", "out/drdo"), ("org/Name", "out/Name"):
        monkeypatch.setattr(sys, "argv", ["generate.py", "--model", model])
        args = generate.parse_args()
        assert (args.out, args.generator) == (f"{out}_generations.jsonl", model.rstrip("/"))


def test_prompts_leave_room_for_their_response(tmp_path):
    write_policy(tmp_path)
    toy.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    longest = sorted(len(prompt.split()) for prompt in PROMPTS)[20]
    kept = [prompt for prompt in PROMPTS if len(prompt.split()) <= longest]
    longest += 1  # BOS
    for flags in (["--max_length", longest + 9, "--max_new_tokens", 9], ["--max_new_tokens", 160 - longest]):
        rows = generations(tmp_path, "--temperature", 0, *flags)
        assert [row["prompt"] for row in rows] == kept != PROMPTS
