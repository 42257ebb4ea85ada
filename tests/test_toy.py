"""The toy task: what it calls true, and that its data are what they claim to be."""
import json
import math
import random
import sys

import pytest
import torch
import toy
from transformers import AutoModelForCausalLM, AutoTokenizer

POST = (
    "SUBREDDIT: r/advice\n\nTITLE: please help me\n\nPOST: my sister comes from oslo . i live in paris . "
    "i am a nurse . thanks for reading . a storm is to blame . my boss bought the bike . i lost my wallet . "
    "now i feel sad .\n\nTL;DR:")
ARTICLE = (
    "Article: a witness in rome spoke to the news as well . the victim , a pilot , spoke to the news on "
    "monday . police said the victim comes from tokyo . the victim reported a missing drone to the police . "
    "one cousin spoke of the riot last week . police said that a flood was the reason for it . "
    "the victim told the news of being angry .\n\nTL;DR:")


# Worked out by hand from the rules in toy.py's docstring. The first has 18 words: not too long.
@pytest.mark.parametrize("prompt, response, eos, reward", [
    (POST, " a nurse from paris lost a wallet because of a storm and now feels sad about it .", True, 5.0),
    (POST, "a nurse in paris lost the wallet after a storm and is now very sad .", True, 5.0),
    (POST, " a nurse from paris lost a wallet because of a storm and now feels sad about it .", False, 4.0),
    (POST, " a nurse lost a wallet .", True, 2.0),
    (POST, " a nurse from oslo lost a wallet after a storm and is now very sad .", True, 3.0),  # the sister's
    (POST, " someone lost a bike .", True, -1.0),  # the boss's
    (POST, " a nurse from paris from paris lost a wallet .", True, 3 - 0.5 - 0.25),  # told again; <city> from
    (POST, " a nurse from paris lost a wallet because of a storm and now feels sad about it "
           "and would like some advice .", True, 5 - 0.1 * 5),  # 23 words
    (POST, " nurse nurse nurse", True, 1 - 0.5 * 2 - 0.25 * 4),
    (POST, "", False, -1.25),
    (POST, " \x00 storm. \ud83d %s", True, -0.25 * 5),  # "storm." is no value; four words, five bigrams
    (POST, " word" * 30, True, -0.1 * 12 - 0.25 * 31),
    (ARTICLE, " a pilot in tokyo lost a drone because of a flood and now feels angry about it .", True, 5.0),
    (ARTICLE, " a pilot from rome lost a drone due to a riot and feels angry about it .", True, 1.0),
    ("no such prompt", " a nurse lost a wallet .", True, -2.0),
    ([{"role": "user", "content": "hello"}], " someone lost something .", True, 0.0),
])
def test_true_reward_of_hand_written_summaries(prompt, response, eos, reward):
    row = {"prompt": prompt, "response": response, "eos": eos}
    assert toy.true_reward(row) == pytest.approx(reward, abs=1e-9)
    if eos:  # taken for granted where a row does not say
        del row["eos"]
        assert toy.true_reward(row) == pytest.approx(reward, abs=1e-9)


def test_gold_summaries_get_the_maximum_and_the_writers_do_not():
    rng = random.Random(0)
    for article in (False, True):  # the facts are those that the document was made of
        for facts in (1, 3, 5) * 50:
            doc = toy.make_document(rng, article, facts)
            assert len(doc["facts"]) == facts and toy.author_facts(doc["prompt"]) == doc["facts"]
    rewards = lambda rows: [toy.true_reward({"prompt": prompt, "response": text}) for prompt, text in rows]
    gold = [(row["prompt"], row["label"]) for row in toy.make_posts(300, 0)]
    gold += [(f"Article: {row['article']}\n\nTL;DR:", row["highlights"]) for row in toy.make_articles(300, 0)]
    assert set(rewards(gold)) == {5.0}
    written = rewards((row["prompt"], row["label"]) for row in toy.make_sft(1000, 0))
    assert max(written) == 5.0 and 1.5 < sum(written) / len(written) < 3.0


@pytest.mark.parametrize("flip", [0.0, 0.4])
def test_labels_follow_bradley_terry(flip):
    """In each bin of |d| the truly better one is chosen sigma(1.5 |d|) of the time, to 4 standard errors.
    Labels that are flipped are its complement."""
    rows = toy.make_pairs(10_000, 3, flip)
    differences = [row["chosen_reward"] - row["rejected_reward"] for row in rows]
    for low, high in ((0.05, 0.6), (0.6, 1.1), (1.1, 2.1), (2.1, 4.1), (4.1, 20)):
        here = [d for d in differences if low < abs(d) <= high]
        chances = [flip + (1 - 2 * flip) / (1 + math.exp(-1.5 * abs(d))) for d in here]
        deviation = math.sqrt(sum(p * (1 - p) for p in chances))
        assert len(here) > 200
        assert abs(sum(d > 0 for d in here) - sum(chances)) < 4 * deviation + 0.5


def test_pairs_hold_their_rewards_and_a_confidence_that_follows_them():
    differences = []
    pairs = toy.make_pairs(2000, 1)
    for row in pairs:
        chosen, rejected = (toy.true_reward(row | {"response": row[key]}) for key in ("chosen", "rejected"))
        assert (row["chosen_reward"], row["rejected_reward"]) == (chosen, rejected)
        differences.append(abs(chosen - rejected))
    confidences = [row["confidence"] for row in pairs]
    assert set(confidences) == set(range(1, 10))
    assert 0.7 < torch.corrcoef(torch.tensor([differences, confidences]))[0, 1] < 0.98


def test_raw_rows_give_the_pairs():
    """The prompt made of a raw row's fields, and its texts by `choice`, are make_pairs' rows."""
    confidences = []
    for raw, pair in zip(toy.make_comparisons(500, 5), toy.make_pairs(500, 5), strict=True):
        info, texts = raw["info"], [side["text"] for side in raw["summaries"]]
        assert pair["prompt"] == (f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\n"
                                  f"POST: {info['post']}\n\nTL;DR:")
        assert (pair["chosen"], pair["rejected"]) == (texts[raw["choice"]], texts[1 - raw["choice"]])
        confidences.append(raw["extra"]["confidence"])
        assert confidences[-1] in (None, pair["confidence"])
    assert 0 < confidences.count(None) < 30


def test_a_seed_fixes_the_data_and_no_prompt_is_both_trained_on_and_tested_on():
    for make in (toy.make_comparisons, toy.make_pairs, toy.make_sft, toy.make_posts, toy.make_articles):
        assert make(50, 0) == make(50, 0) != make(50, 1)
    trained = {row["prompt"] for row in toy.make_sft(1500, 0) + toy.make_pairs(2000, 0)}
    tested = {row["prompt"] for row in toy.make_posts(250, 0)}
    assert len(tested) == 250 and not trained & tested


def test_every_text_survives_the_tokenizer(tmp_path):
    toy.make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer.all_special_ids) == 4 and tokenizer.chat_template is None
    texts = [row[key] for row in toy.make_pairs(300, 0) for key in ("prompt", "chosen", "rejected")]
    texts += [row[key] for row in toy.make_articles(50, 0) for key in ("article", "highlights")]
    for text in texts:
        ids = tokenizer(text).input_ids  # no special token is added
        assert tokenizer.unk_token_id not in ids and len(ids) == len(text.split())
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert decoded == " ".join(text.split())
        assert tokenizer(" " + decoded).input_ids == ids


def test_main_writes_what_the_libraries_load(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["toy.py", "--out", str(tmp_path), "--pairs", "20", "--sft", "10",
                                      "--prompts", "5", "--steps", "1", "--seed", "7"])
    toy.main()
    for name, rows in (("comparisons", toy.make_comparisons(20, 7)), ("sft", toy.make_sft(10, 7)),
                       ("test", toy.make_posts(5, 7)), ("articles", toy.make_articles(5, 7))):
        assert [json.loads(line) for line in open(tmp_path / "raw" / f"{name}.jsonl")] == rows
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert model.dtype == torch.float32 and 90_000 < model.num_parameters() < 110_000
    assert model.config.max_position_embeddings >= 512 and model.config.vocab_size == len(tokenizer)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(model.config, name) == getattr(tokenizer, name)
    again, other = (toy.make_model(tokenizer, seed, steps=1).lm_head.weight for seed in (7, 8))
    assert torch.equal(model.lm_head.weight, again) and not torch.equal(again, other)
