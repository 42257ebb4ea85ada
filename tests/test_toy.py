"""The laboratory: what it calls true, and that its data are what they claim to be."""
import json
import math
import os
import random
import subprocess
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))
import toy

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
    (POST, " someone lost something .", True, 0.0),
    (POST, " a nurse from oslo lost a wallet after a storm and is now very sad .", True, 3.0),  # the sister's
    (POST, " someone lost a bike .", True, -1.0),  # the boss's
    (POST, " a nurse from paris from paris lost a wallet .", True, 3 - 0.5 - 0.25),  # told again; <city> from
    (POST, " a nurse from paris lost a wallet because of a storm and now feels sad about it "
           "and would like some advice .", True, 5 - 0.1 * 5),  # 23 words
    (POST, " nurse", True, 1 - 0.25 * 2),  # <start> <job>, <job> <end>
    (POST, " nurse nurse nurse", True, 1 - 0.5 * 2 - 0.25 * 4),
    (POST, "", True, -0.25),  # <start> <end>
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


def test_eos_is_taken_for_granted_where_a_row_does_not_say():
    assert toy.true_reward({"prompt": POST, "response": " someone lost something ."}) == 0.0


def test_author_facts_are_those_that_the_document_was_made_of():
    rng = random.Random(0)
    for article in (False, True):
        for facts in (1, 3, 5):
            docs = [toy.make_document(rng, article, facts) for _ in range(100)]
            assert all(len(doc["facts"]) == facts for doc in docs)
            for doc in docs:
                assert toy.author_facts(doc["prompt"]) == doc["facts"]


def test_gold_summaries_get_the_maximum_and_the_writers_do_not():
    posts, articles = toy.make_posts(300, 0), toy.make_articles(300, 0)
    rows = [(row["prompt"], row["label"]) for row in posts]
    rows += [(f"Article: {row['article']}\n\nTL;DR:", row["highlights"]) for row in articles]
    assert {toy.true_reward({"prompt": prompt, "response": text}) for prompt, text in rows} == {5.0}
    rows = [(row["prompt"], row["label"]) for row in toy.make_sft(1000, 0)]
    writers = [toy.true_reward({"prompt": prompt, "response": text}) for prompt, text in rows]
    assert max(writers) == 5.0 and 1.5 < sum(writers) / len(writers) < 3.0


def test_labels_follow_bradley_terry():
    """In each bin of |d| the truly better one is chosen sigma(1.5 |d|) of the time, to 4 standard errors."""
    flips = {flip: toy.make_pairs(10_000, 3, flip) for flip in (0.0, 0.4)}
    for flip, pairs in flips.items():
        for low, high in ((0.05, 0.6), (0.6, 1.1), (1.1, 2.1), (2.1, 4.1), (4.1, 20)):
            differences = [row["chosen_reward"] - row["rejected_reward"] for row in pairs]
            differences = [d for d in differences if low < abs(d) <= high]
            chances = [1 / (1 + math.exp(-1.5 * abs(d))) for d in differences]
            chances = [flip + (1 - 2 * flip) * chance for chance in chances]
            wins, deviation = sum(d > 0 for d in differences), math.sqrt(sum(p * (1 - p) for p in chances))
            assert len(differences) > 200
            assert abs(wins - sum(chances)) < 4 * deviation + 0.5


def test_confidence_follows_the_difference():
    pairs = toy.make_pairs(3000, 1)
    x = [abs(row["chosen_reward"] - row["rejected_reward"]) for row in pairs]
    y = [row["confidence"] for row in pairs]
    assert set(y) == set(range(1, 10))
    mx, my = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mx) * (b - my) for a, b in zip(x, y))
    correlation = covariance / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))
    assert 0.7 < correlation < 0.98  # strong, yet with noise


def test_the_pairs_hold_equal_rewards_and_small_edits():
    pairs = toy.make_pairs(2000, 0)
    paraphrases = sum(row["chosen_reward"] == row["rejected_reward"] and row["chosen"] != row["rejected"]
                      for row in pairs)
    assert 0.05 < paraphrases / 2000 < 0.25
    assert sum(row["chosen"] == row["rejected"] for row in pairs) < 0.1 * 2000
    for row in pairs[:200]:
        for key in ("chosen", "rejected"):
            assert toy.true_reward({"prompt": row["prompt"], "response": row[key]}) == row[f"{key}_reward"]


def test_raw_schemas():
    rows = toy.make_comparisons(500, 0)
    keys = {"info", "summaries", "choice", "worker", "batch", "split", "extra"}
    assert all(set(row) == keys for row in rows)
    assert all(set(row["info"]) == {"id", "post", "title", "subreddit", "site", "article"} for row in rows)
    assert all(len(row["summaries"]) == 2 and row["choice"] in (0, 1) for row in rows)
    assert all(set(side) == {"text", "policy", "note"} and side["text"][0] == " " and side["text"][1] != " "
               for row in rows for side in row["summaries"])
    confidences = [row["extra"]["confidence"] for row in rows]
    assert 0 < confidences.count(None) < 30
    assert all(isinstance(value, int) and 1 <= value <= 9 for value in confidences if value is not None)
    assert all(set(row) == {"prompt", "label"} for row in toy.make_sft(20, 0) + toy.make_posts(20, 0))
    assert all(set(row) == {"article", "highlights", "prompt", "id"} for row in toy.make_articles(20, 0))


def test_raw_rows_give_the_pairs():
    """The prompt made of a raw row's fields, and its texts by `choice`, are make_pairs' rows."""
    for raw, pair in zip(toy.make_comparisons(200, 5), toy.make_pairs(200, 5), strict=True):
        info, texts = raw["info"], [side["text"] for side in raw["summaries"]]
        assert pair["prompt"] == (f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\n"
                                  f"POST: {info['post']}\n\nTL;DR:")
        assert (pair["chosen"], pair["rejected"]) == (texts[raw["choice"]], texts[1 - raw["choice"]])


@pytest.mark.parametrize("make", [toy.make_comparisons, toy.make_pairs, toy.make_sft, toy.make_posts,
                                  toy.make_articles])
def test_a_seed_fixes_the_data(make):
    assert make(50, 0) == make(50, 0)
    assert make(50, 0) != make(50, 1)


def test_flips_turn_their_share_of_labels_and_nothing_else():
    clean, flipped = toy.make_pairs(4000, 0), toy.make_pairs(4000, 0, flip=0.4)
    assert all({a["chosen"], a["rejected"]} == {b["chosen"], b["rejected"]} for a, b in zip(clean, flipped))
    pairs = [(a, b) for a, b in zip(clean, flipped) if a["chosen"] != a["rejected"]]
    turned = sum(a["chosen"] == b["rejected"] for a, b in pairs)
    assert abs(turned - 0.4 * len(pairs)) < 4 * math.sqrt(len(pairs) * 0.4 * 0.6)


def test_no_prompt_is_both_trained_on_and_tested_on():
    trained = {row["prompt"] for row in toy.make_sft(1500, 0) + toy.make_pairs(2000, 0)}
    tested = {row["prompt"] for row in toy.make_posts(250, 0)}
    assert len(tested) == 250 and not trained & tested


def test_every_text_survives_the_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    toy.make_tokenizer().save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer.all_special_ids) == 4 and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.bos_token_id not in (None, tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert tokenizer.chat_template is None and 200 < len(tokenizer) < 260
    pairs = toy.make_pairs(300, 0)
    texts = [text for row in pairs for text in (row["chosen"], row["rejected"])]
    texts += [row["highlights"] for row in toy.make_articles(50, 0)]
    prompts = [row["prompt"] for row in pairs] + [f"Article: {row['article']}\n\nTL;DR:"
                                                  for row in toy.make_articles(50, 0)]
    for text in texts + prompts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids and len(ids) == len(text.split())
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert decoded == " ".join(text.split())
        assert tokenizer(decoded, add_special_tokens=False).input_ids == ids
        assert tokenizer(" " + decoded).input_ids == ids  # no leading space, no special token is added


def test_main_writes_what_the_libraries_load(tmp_path, monkeypatch):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    monkeypatch.setattr(sys, "argv", ["toy.py", "--out", str(tmp_path / "toy"), "--pairs", "20",
                                      "--sft", "10", "--prompts", "5", "--steps", "1", "--seed", "7"])
    toy.main()
    assert {path.name for path in (tmp_path / "toy").iterdir()} == {"raw", "base"}
    for name, rows in (("comparisons", toy.make_comparisons(20, 7)), ("sft", toy.make_sft(10, 7)),
                       ("test", toy.make_posts(5, 7)), ("articles", toy.make_articles(5, 7))):
        with open(tmp_path / "toy" / "raw" / f"{name}.jsonl", encoding="utf-8") as file:
            assert [json.loads(line) for line in file] == rows
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "toy" / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "toy" / "base")
    config = model.config
    assert model.dtype == torch.float32 and 90_000 < model.num_parameters() < 110_000
    assert config.max_position_embeddings >= 512 and config.vocab_size == len(tokenizer)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (
        tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_model_weights_follow_the_seed():
    torch = pytest.importorskip("torch")
    tokenizer = toy.make_tokenizer()
    first, again, other = (toy.make_model(tokenizer, seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("flag, value", [("--flip", "1.5"), ("--pairs", "0"), ("--hidden_size", "9"),
                                         ("--out", __file__)])
def test_bad_input_is_one_line(flag, value, tmp_path):
    command = [sys.executable, toy.__file__, "--out", tmp_path / "toy", flag, value]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and flag in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
