"""The study on a pretrained LM: labels, measures and verdicts. It needs no large model."""
import json
import os

import numpy as np
import pytest
import torch

pytest.importorskip("vaderSentiment", reason="the true reward: pip install vaderSentiment==3.3.2")

import align
import common
import real
import toy

WORDS = "good great bad awful fine nice sad table chair lamp window love hate happy boring walk".split()


def samples(prompts=200):
    """Four lists of responses to the same prompts, of random words."""
    rng = np.random.default_rng(0)
    return [[{"prompt": f"prompt {i}", "response": " ".join(rng.choice(WORDS, 4))} for i in range(prompts)]
            for _ in range(4)]


def gap(row):
    """True reward of the chosen response less that of the rejected."""
    return real.true_reward({"response": row["chosen"]}) - real.true_reward({"response": row["rejected"]})


def test_labels_are_wrong_as_often_as_asked():
    rows = {labels: real.label(samples(), labels, 900, seed=0) for labels in (0.0, 0.4, "bt")}
    wrong = {}
    for labels, labelled in rows.items():
        assert len(labelled) == 900
        for row, clean in zip(labelled, rows[0.0]):
            assert {row["chosen"], row["rejected"]} == {clean["chosen"], clean["rejected"]}
            assert row["confidence"] == pytest.approx(abs(gap(row)), abs=1e-4) and row["confidence"] > 0
        wrong[labels] = np.array([gap(row) < 0 for row in labelled])
    assert not wrong[0.0].any() and abs(wrong[0.4].mean() - 0.4) < 3 * (0.24 / 900) ** 0.5
    gaps = np.array([row["confidence"] for row in rows["bt"]])
    expected = 1 / (1 + np.exp(4 * gaps))
    assert abs(wrong["bt"].mean() - expected.mean()) < 3 * (expected * (1 - expected)).mean() ** 0.5 / 30
    assert gaps[wrong["bt"]].mean() < gaps[~wrong["bt"]].mean()  # near pairs are mistaken more often


def test_prompts_that_are_tested_are_never_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(real, "answer", lambda *_: None)  # the start answers in other tests
    real.prepare(3, str(tmp_path), common.argparse.Namespace(model="none"))
    sets = {name: [json.dumps(row["prompt"]) for row in common.read_rows(f"{tmp_path}/{name}.jsonl")]
            for name in ("prompts", "more_prompts", "test")}
    assert [len(rows) for rows in sets.values()] == [real.PROMPTS, 3 * real.PROMPTS, 2 * real.TEST]
    assert len(set().union(*sets.values())) == sum(map(len, sets.values()))
    trained = " ".join(sets["prompts"] + sets["more_prompts"])
    assert not any(f"{topic}." in trained or f"{topic}?" in trained for topic in real.WORDS["new_topics"])


def test_a_reward_that_repetition_won_goes_with_the_repetition():
    assert real.once("Great, great day! A great DAY.") == "Great, day! A"
    again = {"response": "wonderful " * 9 + "day"}
    alone = {"response": "wonderful day"}
    assert real.true_reward(again) > 0.95
    assert real.true_reward({"response": real.once(again["response"])}) == real.true_reward(alone)
    assert real.distinct_2(["a b a b a", "b a b"]) == 2 / 6


def test_log_probs_are_the_models_own_and_a_cut_off_answer_has_no_eos():
    torch.manual_seed(0)
    tokenizer = toy.make_tokenizer()
    lm = toy.make_model(tokenizer).double().eval()
    for parameter in lm.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    words = [word for word in tokenizer.get_vocab() if word.isalpha()][:9]
    rows = [{"prompt": " ".join(words[:5]), "response": " " + " ".join(words[i:]), "eos": eos}
            for i, eos in ((2, True), (2, False), (6, True))]
    for row, logp in zip(rows, real.log_probs(lm, tokenizer, rows)):
        (prompt,), _ = align.encode(tokenizer, row["prompt"], [])
        ids = prompt + tokenizer(row["response"], add_special_tokens=False).input_ids
        ids += [tokenizer.eos_token_id] * row["eos"]
        own = 0.0
        for i in range(len(prompt), len(ids)):  # a token at a time, each after its own prefix
            own += lm(torch.tensor([ids[:i]])).logits[0, -1].log_softmax(-1)[ids[i]].item()
        assert logp == pytest.approx(own, rel=1e-9)


def write_policy(folder, responses, gain, rewards):
    """What train_policy leaves of a policy whose log-probs of its samples are `gain` above the start's."""
    os.makedirs(os.path.dirname(rewards), exist_ok=True)
    os.makedirs(folder, exist_ok=True)
    rows = [{"prompt": f"{i}", "response": response, "tokens": 2, "eos": True,
             "dataset": "new" if i % 2 else "known"} for i, response in enumerate(responses)]
    for name in ("generations", "samples"):
        toy.write_jsonl(f"{folder}/{name}.jsonl", rows)
    number = len(responses)
    toy.write_jsonl(f"{folder}/logps.json", [{"start": [-9.0] * number, "policy": [-9.0 + gain] * number}])
    toy.write_jsonl(f"{folder}/log.jsonl", [{"logps/chosen": -1.0, "logps/rejected": -2.0}])
    torch.save({"response": torch.arange(number, dtype=torch.float32)[None]}, rewards)


def test_the_table_has_who_wins_where_and_how_far_it_went(tmp_path, capsys):
    setting = real.SETTINGS["clean_all"] | {"methods": ["DPO", "IPO"]}
    home = f"{tmp_path}/seed4"
    world, data, oracle_rewards = common.places(home, setting)
    write_policy(f"{home}/start", ["a table", "a table", "bad", "awful"], 0.0, f"{world}/start.pt")
    folder, scores = common.answers_of(real, home, setting, "DPO")
    write_policy(folder, ["good", "a table", "great", "great"], 2.5, scores)
    os.makedirs(os.path.dirname(data))
    words = "bad", "awful", "good", "fine"
    toy.write_jsonl(data, [{"chosen": word, "rejected": "a table"} for word in words])
    torch.save({"chosen": torch.ones(1, 4), "rejected": torch.zeros(1, 4)}, oracle_rewards)  # two are wrong
    figures = common.judge(real, setting, [home, f"{tmp_path}/seed5"])
    assert list(figures) == ["start", "DPO"] and figures["DPO"]["seeds"] == [4]  # no IPO, no seed 5
    dpo = figures["DPO"]
    assert dpo["against start/all"][0] == 0.875  # a tie counts half
    assert figures["start"]["against DPO/all"][0] == 0.125
    assert dpo["against start/new"][0] == 0.75 and dpo["by the Oracle/all"][0] == 0.5
    assert dpo["true/new"][0] == pytest.approx(real.true_reward({"response": "great"}) / 2)
    assert dpo["KL"][0] == 2.5 and dpo["by_seed"]["KL"] == [2.5]
    assert figures["start"]["by_seed"]["Oracle right"] == [0.5]
    common.report(real, common.argparse.Namespace(out=tmp_path), {"clean_all": figures})
    assert "| DPO | 4 | 0.88 [0.48, 1.00] / 0.75 [0.00, 1.00] |" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["clean_all"]["DPO"]["KL"][0] == 2.5


def test_every_policy_has_a_folder_of_its_own():
    settings = real.SETTINGS.values()
    folders = {common.answers_of(real, "home", setting, method)[0]
               for setting in settings for method in setting["methods"]}
    shared = 3  # DPO in the three settings with another Oracle
    assert len(folders) == sum(len(setting["methods"]) for setting in settings) - shared
