"""The answers of a prompt grow in one row. Their text is that of Transformers' own generate, their
distribution that of its warpers, and neither depends on what else is asked for."""
import hashlib
import math

import pytest
import torch
from conftest import call, read_jsonl
from test_chat import byte_level, small_model
from test_layout import random_lm
from transformers import (AutoModelForCausalLM, BloomConfig, Gemma2Config, Gemma3TextConfig, GPTJConfig,
                          GPTNeoXConfig, GptOssConfig, LlamaConfig, LogitsProcessorList, MambaConfig,
                          MptConfig, OPTConfig, Phi3Config, Qwen2Config, RwkvConfig, TemperatureLogitsWarper,
                          TopPLogitsWarper)

import generate
import toy

SHAPE = dict(vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, pad_token_id=1,
             max_position_embeddings=128, bos_token_id=None, eos_token_id=None)
LLAMA = dict(SHAPE, intermediate_size=32, num_key_value_heads=2)
CONFIGS = {
    "llama": LlamaConfig(**LLAMA),
    "opt": OPTConfig(**SHAPE, ffn_dim=32, word_embed_proj_dim=8, dropout=0.0),
    "qwen2": Qwen2Config(**LLAMA),
    "phi3": Phi3Config(**LLAMA, sliding_window=50),
    "gpt_neox": GPTNeoXConfig(**SHAPE, intermediate_size=32),
    "gemma3": Gemma3TextConfig(**LLAMA, head_dim=8, sliding_window=50,
                               layer_types=["sliding_attention", "full_attention"]),
}
ENDS = {5, 7}
LENGTHS = 9, 1, 20, 4, 12  # of the prompts


def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 61, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(params=CONFIGS, scope="module")
def model(request):
    return random_lm(CONFIGS[request.param])


def run(model, prompts=prompts(), temperatures=(0.0, 0.7, 1.5), top_p=0.9, max_new_tokens=24, ends=ENDS,
        seed=0, by=generate.generate):
    """Of each prompt's answers: (ids up to its end, whether it came to one)."""
    draws = torch.stack([torch.stack([generate.draw(ids, temperature, max_new_tokens, seed)
                                      for temperature in temperatures]) for ids in prompts])
    tokens = by(model, prompts, torch.tensor(temperatures), top_p, draws, ends)
    return [[cut(ids, ends) for ids in row] for row in tokens.tolist()]


def cut(ids, ends=ENDS):
    stop = next((i for i, token in enumerate(ids) if token in ends), None)
    return ids[:stop], stop is not None


def test_greedy_text_is_that_of_transformers(model):
    """Here beside other answers and unlike prompts, some of which end early; there a prompt at a time."""
    expected = []
    for ids in prompts():
        output = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)),
                                max_new_tokens=24, do_sample=False)[0, len(ids):].tolist()
        expected.append(cut(output))
    for temperatures in [0.0], [0.7, 0.0, 1.5]:
        answers = run(model, temperatures=temperatures)
        assert [row[temperatures.index(0.0)] for row in answers] == expected


def test_a_text_depends_on_prompt_temperature_and_seed_alone(model):
    whole = run(model)
    for temperatures in [0.7], [1.5, 0.7], [0.7, 0.0, 1.5, 0.2]:
        some = run(model, temperatures=temperatures)
        assert [row[temperatures.index(0.7)] for row in some] == [row[1] for row in whole]
    for i, ids in enumerate(prompts()):
        assert run(model, [ids]) == [whole[i]]
    other = run(model, seed=1)
    assert [row[0] for row in other] == [row[0] for row in whole]
    assert all(one[2] != another[2] for one, another in zip(whole, other))
    assert run(model, by=generate.generate_apart) == whole
    shorter = run(model, max_new_tokens=10)
    for row, longer in zip(shorter, whole):
        assert row == [(ids[:10], ended and len(ids) < 10) for ids, ended in longer]


def test_rows_leave_and_only_then(monkeypatch):
    """The numbers of rows that each step computes: a row stays until its last answer has ended."""
    model, sizes = random_lm(CONFIGS["llama"]), []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, tokens, **inputs: (
        sizes.append(len(tokens)), forward(self, tokens, **inputs))[1])
    answers = run(model, ends=set(range(0, 61, 4)), max_new_tokens=40)
    steps = [max(len(ids) + ended for ids, ended in row) for row in answers]
    assert sizes == [sum(step < length for length in steps) for step in range(max(steps))]
    assert len(set(steps)) > 2


@pytest.mark.parametrize("top_p", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("size", [4, 256])
def test_the_distribution_is_that_of_transformers_warpers(top_p, size):
    """A chi-square test of 20,000 draws, also where the likeliest `size` tokens do not hold top_p."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(3, 200)
    temperatures, number = torch.tensor([0.3, 0.7, 1.3]), 20_000
    draws = torch.rand(number, dtype=torch.float64)
    for row, temperature in zip(logits, temperatures):
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature.item()), TopPLogitsWarper(top_p)])
        expected = warpers(None, row[None].clone())[0].softmax(-1) * number
        tokens = generate.sample(row.expand(number, -1), temperature.expand(number), top_p, draws, size)
        counts = tokens.bincount(minlength=200)
        assert not counts[expected == 0].any()
        often = expected >= 5
        observed, expected = (torch.cat([x[often], x[~often].sum()[None]]) for x in (counts, expected))
        observed, expected = observed[expected > 0], expected[expected > 0]
        degrees = len(expected) - 1
        chi_square = ((observed - expected) ** 2 / expected).sum().item()
        assert chi_square < degrees + 4 * math.sqrt(2 * degrees) + 1e-9


def test_first_tokens_follow_the_models_own_distribution():
    """As the draws of an answer come from its own generator: 500 seeds, one token each."""
    model, ids = random_lm(CONFIGS["llama"]), prompts()[0]
    logits = model(torch.tensor([ids])).logits[:, -1].detach()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopPLogitsWarper(0.8)])
    expected = warpers(None, logits)[0].softmax(-1)
    counts = torch.zeros(61)
    for seed in range(500):
        (((token,), _),), = run(model, [ids], [0.7], 0.8, 1, set(), seed)
        counts[token] += 1
    assert ((counts / 500 - expected).abs() <= 4 * (expected * (1 - expected) / 500).sqrt() + 1e-9).all()


def test_draws_are_fixed_for_ever():
    """By the SHA-256 of prompt, temperature and seed, and by torch's Mersenne twister."""
    digest = hashlib.sha256(b"([1, 2], 0.7, 3)").digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    expected = torch.rand(5, generator=generator, dtype=torch.float64)
    assert torch.equal(generate.draw([1, 2], 0.7, 5, 3), expected)
    for prompt, temperature, seed in ([1, 3], 0.7, 3), ([1, 2], 0.8, 3), ([1, 2], 0.7, 4):
        assert (generate.draw(prompt, temperature, 5, seed) != expected).all()


def test_at_least_one_token_and_a_draw_near_1():
    logits, nearly = torch.tensor([[0.0, 3.0, 1.0]]), torch.tensor([1 - 2**-53], dtype=torch.float64)
    temperature = torch.tensor([1.0])
    assert generate.sample(logits, temperature, 1e-6, nearly, 2).tolist() == [1]
    assert generate.sample(logits, temperature, 1.0, nearly, 2).tolist() == [2]
    assert generate.sample(logits, temperature, 1.0, 0 * nearly, 2).tolist() == [0]
    assert generate.sample(logits, 0 * temperature, 1.0, nearly, 2).tolist() == [1]


def test_a_window_shorter_than_the_row_does_not_take_the_mask(model, monkeypatch):
    assert generate.takes_mask(model, prompts()[2], 24)
    if getattr(model.config, "sliding_window", None):  # 50 tokens
        assert not generate.takes_mask(model, prompts()[2], 32)
        monkeypatch.setattr(type(model.config), "get_text_config", lambda self: None)
        assert not generate.takes_mask(model, prompts()[2], 60)  # by the logits alone


@pytest.mark.parametrize("family", ["phi3", "gemma3"])
def test_a_window_that_hardly_shows_in_the_logits_is_noticed_too(family):
    lm = AutoModelForCausalLM.from_config(CONFIGS[family]).bfloat16().eval()  # all tokens are about as likely
    assert generate.takes_mask(lm, prompts()[2], 30)
    assert not generate.takes_mask(lm, prompts()[2], 31)  # 51 tokens, and the window has 50


@pytest.mark.parametrize("dropped", ["attention_mask", "position_ids"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_ignores_its_mask_or_positions_is_noticed(monkeypatch, dropped, dtype):
    model = random_lm(CONFIGS["llama"]).to(dtype)
    for name, weight in model.named_parameters():  # as sure of itself as trained models are
        weight.data *= 3 if "proj" in name or "lm_head" in name else 1
    assert generate.takes_mask(model, prompts()[2], 24)
    plain = model.base_model.forward
    monkeypatch.setattr(model.base_model, "forward",
                        lambda *ids, **inputs: plain(*ids, **inputs | {dropped: None}))
    assert not generate.takes_mask(model, prompts()[2], 24)


def test_a_model_without_attention_does_not_take_it():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2, state_size=4, eos_token_id=None)
    assert not generate.takes_mask(AutoModelForCausalLM.from_config(config).eval(), prompts()[2], 24)


@pytest.mark.parametrize("config, shape", [
    (Phi3Config, {"sliding_window": 16}), (Gemma2Config, {"head_dim": 8}), (BloomConfig, {}),
    (MptConfig, {"d_model": 32, "n_heads": 4, "n_layers": 2}), (GPTJConfig, {"rotary_dim": 4}),
    (GptOssConfig, {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}), (MambaConfig, {}),
    (RwkvConfig, {"attention_hidden_size": 32})])
def test_answers_of_such_a_model_are_written_all_the_same(tmp_path, capsys, config, shape):
    """By Transformers' own generate. Phi-3 slides a window, others have no SDPA, the last two are recurrent:
    padding would change their state. The text at temperature 0 is that of the model's own argmax."""
    tokenizer = byte_level()
    model = small_model(tmp_path, tokenizer, config, **shape)
    model.generation_config.update(repetition_penalty=5.0)  # which is not the policy's own distribution
    model.generation_config.save_pretrained(tmp_path)
    prompts = ["Who wrote Hamlet?", "Why?", "And then?"]
    toy.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    call("generate.py", "--model", tmp_path, "--prompts", tmp_path / "prompts.jsonl", "--temperature", 0, 1,
         "--max_new_tokens", 12)
    assert "does not take the mask" in capsys.readouterr().out
    rows = read_jsonl(f"{tmp_path}_generations.jsonl")
    assert [(row["prompt"], row["temperature"]) for row in rows] == [
        (prompt, temperature) for prompt in prompts for temperature in (0, 1)]
    for row in rows[::2]:
        ids = tokenizer(tokenizer.bos_token + row["prompt"]).input_ids
        for _ in range(row["tokens"] + row["eos"]):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert text == row["prompt"] + row["response"]
