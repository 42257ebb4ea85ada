"""Responses that have a prompt in common lie in one row. Their rewards are those that each has alone."""
import copy
import math

import numpy as np
import pytest
import torch
from conftest import call, read_jsonl, run
from test_chat import byte_level, small_model
from test_layout import CONFIGS, models, own_reward  # noqa: F401 (a fixture)
from transformers import (AutoModelForSequenceClassification, BloomConfig, Gemma2Config, GPTJConfig,
                          GptOssConfig, MptConfig)

import precompute_rewards
import toy


def texts():
    """Texts of four prompts: with 5 responses, 1, 3 and 2; in an order in which they stand apart."""
    generator = np.random.default_rng(0)
    ids = lambda length: generator.integers(0, 61, length, dtype=np.int32)
    lengths = [(9, (5, 12, 1, 7, 7)), (1, (3,)), (30, (2, 9, 4)), (12, (12, 1))]
    rows = [(prompt, ids(n)) for size, sizes in lengths for prompt in [ids(size)] for n in sizes]
    return [rows[i] for i in generator.permutation(len(rows))]


@pytest.fixture
def forwards(monkeypatch):
    """Of each forward pass: (rows, responses in each, tokens in each)."""
    seen = []
    collate = precompute_rewards.collate

    def watched(rows, device):
        outputs = collate(rows, device)
        seen.append((len(rows), len(rows[0]) - 1, outputs[0].shape[1]))
        return outputs

    monkeypatch.setattr(precompute_rewards, "collate", watched)
    return seen


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_responses_in_a_row_have_the_rewards_that_each_has_alone(models, process_group, forwards, batch_size):
    _, classifier = models
    expected = [own_reward(classifier, *text) for text in texts()]
    scores = precompute_rewards.score(classifier, texts(), batch_size, "")
    assert scores.tolist() == pytest.approx(expected, rel=1e-5)
    assert all(rows * responses <= batch_size for rows, responses, _ in forwards)
    if batch_size == 8:
        assert (1, 5, 8 + 32 + 5) in forwards and (1, 3, 29 + 15 + 3) in forwards


def test_a_row_ends_at_twice_the_longest_text():
    long, short = np.arange(40, dtype=np.int32), np.arange(5, dtype=np.int32)
    rows = precompute_rewards.rows_of([(long, short)] * 9, 32)  # 39 + 6 tokens a response; 90 at most
    assert rows == [[0, 1, 2, 3, 4, 5, 6, 7], [8]]
    assert precompute_rewards.rows_of([(long, short)] * 5, 2) == [[0, 1], [2, 3], [4]]


def test_a_model_that_ignores_the_mask_is_scored_a_text_a_row(models, process_group, forwards, capsys):
    _, classifier = models
    expected = [own_reward(classifier, *text) for text in texts()]
    plain = classifier.base_model.forward
    classifier.base_model.forward = lambda *ids, **inputs: plain(*ids, **{**inputs, "attention_mask": None})
    try:
        scores = precompute_rewards.score(classifier, texts(), 4, "folder")
    finally:
        del classifier.base_model.forward
    assert scores.tolist() == pytest.approx(expected, rel=1e-5)
    assert "folder does not take the mask" in capsys.readouterr().out
    assert len([row for row in forwards if row[1] > 1]) == 1  # the check


def test_a_window_that_hardly_shows_in_the_rewards_is_noticed_too():
    config = copy.deepcopy(CONFIGS["phi3"])
    config.num_labels = 1
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_config(config).bfloat16().eval()
    prompt = np.arange(40, dtype=np.int32)
    for tokens, takes in (7, True), (8, False):  # the window has 47
        text = prompt, np.arange(tokens, dtype=np.int32)
        assert precompute_rewards.takes_mask(classifier, [text] * 2, [[0, 1]]) == takes


def test_too_long_texts_get_nan_and_equal_texts_one_reward(tmp_path):
    """Beside short ones to the same prompt. The others have the classifier's own rewards."""
    tokenizer = byte_level()
    classifier = small_model(tmp_path / "rm", tokenizer, classifier=True)
    prompts = ["What?", "Who was it, then?"]
    responses = ["Paris.", "x" * 60, "No.", "Paris.", "I do not know."]
    rows = [{"prompt": prompt, "response": response} for response in responses for prompt in prompts]
    rows[4]["reference"] = "Paris."
    rows[5]["reference"] = "A long time ago."
    toy.write_jsonl(tmp_path / "rows.jsonl", rows)
    run("precompute_rewards.py", "--oracle", tmp_path / "rm", "--data", tmp_path / "rows.jsonl", "--out",
        tmp_path / "rewards.pt", "--max_length", 60)
    saved = torch.load(tmp_path / "rewards.pt", weights_only=True)

    def own(prompt, response):
        text = f"{tokenizer.bos_token}{prompt}{response}{tokenizer.eos_token}"
        return classifier(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits.item()

    expected = [math.nan if row["response"] == "x" * 60 else own(row["prompt"], row["response"])
                for row in rows]
    assert saved["response"][0].tolist() == pytest.approx(expected, abs=1e-5, nan_ok=True)
    assert saved["response"][0, 0] == saved["response"][0, 6] == saved["reference"][0, 4]
    assert saved["reference"][0, 5] == pytest.approx(own(prompts[1], "A long time ago."), abs=1e-5)


@pytest.mark.parametrize("config, shape", [
    (Gemma2Config, {"head_dim": 8}), (BloomConfig, {}), (MptConfig, {"d_model": 32, "n_heads": 4}),
    (GPTJConfig, {"rotary_dim": 4}), (GptOssConfig, {"head_dim": 8, "num_local_experts": 4})])
def test_models_without_sdpa_are_scored_too(tmp_path, config, shape, capsys):
    """A text a row, as they ignore the mask or read it otherwise."""
    tokenizer = byte_level()
    classifier = small_model(tmp_path / "rm", tokenizer, config, classifier=True, **shape)
    rows = [{"prompt": "What is it?", "chosen": "A rat.", "rejected": "It is a cat."},
            {"prompt": "Why?", "chosen": "No idea.", "rejected": "So."}]
    toy.write_jsonl(tmp_path / "rows.jsonl", rows)
    call("precompute_rewards.py", "--oracle", tmp_path / "rm", "--data", tmp_path / "rows.jsonl", "--out",
         tmp_path / "rewards.pt")
    assert "does not take the mask" in capsys.readouterr().out
    saved = torch.load(tmp_path / "rewards.pt", weights_only=True)
    for key in ("chosen", "rejected"):
        for row, reward in zip(rows, saved[key][0]):
            text = f"{tokenizer.bos_token}{row['prompt']}{row[key]}{tokenizer.eos_token}"
            own = classifier(tokenizer(text, return_tensors="pt").input_ids).logits.item()
            assert reward.item() == pytest.approx(own, abs=1e-5)


def test_relabel_writes_the_pairs_that_it_can_order(tmp_path, capsys):
    """The mean of two Oracles orders a pair. What belongs to the order that it had is swapped, or leaves."""
    def pair(chosen, rejected, first, second, **more):
        return {"prompt": "a", "chosen": chosen, "rejected": rejected, "chosen_rating": first,
                "rejected_rating": second, "score_chosen": first, "edit_distance": 0.5, **more}

    rows = [pair("b", "c", 1, 2, confidence=3), pair("d", "e", 3, 4, confidence=5),
            pair("f", "g", 5, 6, confidence=7), pair("h", "i", 7, 8), pair("j", "k", 9, 10)]
    toy.write_jsonl(tmp_path / "pairs.jsonl", rows)
    nan = math.nan
    rewards = {"chosen": torch.tensor([[1.0, 4.0, nan, 2.0, 0.0], [1.0, 1.0, 0.0, 2.0, 5.0]]),
               "rejected": torch.tensor([[0.0, 3.0, 5.0, 3.0, 1.0], [3.0, 1.5, 5.0, 1.0, 0.0]])}
    kept = precompute_rewards.relabel(tmp_path / "pairs.jsonl", rewards, str(tmp_path / "labelled.jsonl"))
    swapped = pair("c", "b", 2, 1) | {"score_chosen": 1}  # (1 + 1) / 2 is below (0 + 3) / 2
    assert read_jsonl(tmp_path / "labelled.jsonl") == [swapped, rows[1], rows[4]]
    assert kept["chosen"].tolist() == [[0, 4, 0], [3, 1, 5]]
    assert kept["rejected"].tolist() == [[1, 3, 1], [1, 1.5, 0]]
    assert "3 pairs, the two responses of 1 swapped; 2 left out" in capsys.readouterr().out
