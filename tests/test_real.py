"""The study on a pretrained LM (tests/real.py): labels, measures and verdicts. It needs no large model."""
import argparse
import json
import os

import numpy as np
import pytest
import torch

pytest.importorskip("vaderSentiment", reason="the true reward: pip install vaderSentiment==3.3.2")

import align
import real
import sft
import toy

WORDS = "good great bad awful fine nice sad table chair lamp window love hate happy boring walk".split()


def samples(prompts=200):
    """Four lists of responses to the same prompts, of random words."""
    rng = np.random.default_rng(0)
    return [[{"prompt": f"prompt {i}", "response": " ".join(rng.choice(WORDS, 4))} for i in range(prompts)]
            for _ in range(4)]


def test_labels_are_wrong_as_often_as_asked_and_rewards_go_with_their_responses():
    rows = {labels: real.label(samples(), labels, 900, seed=0) for labels in (0.0, 0.4, "bt")}
    for labelled in rows.values():
        assert len(labelled) == 900
        for row, clean in zip(labelled, rows[0.0]):
            assert {row["chosen"], row["rejected"]} == {clean["chosen"], clean["rejected"]}
            rewards = [real.true_reward(row[key]) for key in ("chosen", "rejected")]
            assert rewards == [row["chosen_reward"], row["rejected_reward"]]
            assert row["confidence"] == pytest.approx(abs(rewards[0] - rewards[1]), abs=1e-4)
    wrong = {labels: np.array([row["chosen_reward"] < row["rejected_reward"] for row in labelled])
             for labels, labelled in rows.items()}
    assert not wrong[0.0].any() and abs(wrong[0.4].mean() - 0.4) < 3 * (0.24 / 900) ** 0.5
    gaps = np.array([row["confidence"] for row in rows["bt"]])
    expected = 1 / (1 + np.exp(real.BT_SCALE * gaps))
    assert abs(wrong["bt"].mean() - expected.mean()) < 3 * (expected * (1 - expected)).mean() ** 0.5 / 30
    assert gaps[wrong["bt"]].mean() < gaps[~wrong["bt"]].mean()  # near pairs are mistaken more often


def test_prompts_that_are_tested_are_never_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(real, "answer", lambda *_: None)  # the start answers in other tests
    real.prepare(3, str(tmp_path), "no model")
    sets = {name: [json.dumps(row["prompt"]) for row in real.read_rows(f"{tmp_path}/{name}.jsonl")]
            for name in ("prompts", "more_prompts", "test")}
    assert [len(rows) for rows in sets.values()] == [real.PROMPTS, 3 * real.PROMPTS, 2 * real.TEST]
    assert len(set().union(*sets.values())) == sum(map(len, sets.values()))
    new = [topic.strip() for topic in " ".join(real.NEW_TOPICS.split()).split(",")]
    assert not any(f"{topic}." in row or f"{topic}?" in row for topic in new for row in sets["prompts"])


def test_a_reward_that_repetition_won_goes_with_the_repetition():
    assert real.once("Great, great day! A great DAY.") == "Great, day! A"
    again, alone = "wonderful " * 9 + "day", "wonderful day"
    assert real.true_reward(again) > 0.95 and real.true_reward(real.once(again)) == real.true_reward(alone)
    assert real.distinct_2(["a b a b a", "b a b"]) == 2 / 6


def test_log_probs_are_the_models_own_and_a_cut_off_answer_has_no_eos(process_group):
    torch.manual_seed(0)
    tokenizer = toy.make_tokenizer()
    lm = toy.make_model(tokenizer).double().eval()
    for parameter in lm.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    words = [word for word in tokenizer.get_vocab() if word.isalpha()][:9]
    rows = [{"prompt": " ".join(words[:5]), "response": " " + " ".join(words[i:]), "eos": eos}
            for i, eos in ((2, True), (2, False), (6, True))]
    logps, tokens = real.log_probs(sft.ResponseModel(lm), tokenizer, rows)
    for row, logp, number in zip(rows, logps, tokens):
        prompt = align.encode_prompt(tokenizer, row["prompt"])
        ids = prompt + tokenizer(row["response"], add_special_tokens=False).input_ids
        ids += [tokenizer.eos_token_id] * row["eos"]
        own = lm(torch.tensor([ids])).logits[0].log_softmax(-1)
        own = sum(own[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))
        assert number == len(ids) - len(prompt) and logp == pytest.approx(own, rel=1e-9)


def write_policy(folder, responses, gain, rewards):
    """What train_policy leaves of a policy whose log-probs of its samples are `gain` above the start's."""
    os.makedirs(os.path.dirname(rewards), exist_ok=True), os.makedirs(folder, exist_ok=True)
    rows = [{"prompt": f"{i}", "response": response, "tokens": 2, "eos": True,
             "domain": "new" if i % 2 else "known"} for i, response in enumerate(responses)]
    for name in ("generations", "samples"):
        toy.write_jsonl(f"{folder}/{name}.jsonl", rows)
    number = len(responses)
    toy.write_jsonl(f"{folder}/logps.json", [{"answers": [-3 * np.log(5)] * number, "tokens": [3] * number,
                                              "start": [-9.0] * number, "policy": [-9.0 + gain] * number}])
    torch.save({"response": torch.arange(number, dtype=torch.float32)[None]}, rewards)


def test_the_table_has_who_wins_where_and_how_far_it_went(tmp_path, capsys):
    cell, home = real.CELLS["clean_all"] | {"methods": ["DPO", "IPO"]}, f"{tmp_path}/seed4"
    world, data, oracle_rewards = real.places(home, cell)
    write_policy(f"{home}/start", ["a table", "a table", "bad", "awful"], 0.0, f"{world}/start.pt")
    folder = real.policy_folder(home, cell, "DPO")
    write_policy(folder, ["good", "a table", "great", "great"], 2.5, f"{folder}/rewards.pt")
    held_out = f"{world}/data/all/validation.jsonl", f"{world}/validation.pt"
    for path, scores in (data, oracle_rewards), held_out:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        toy.write_jsonl(path, [{"chosen_reward": i, "rejected_reward": 2} for i in (0, 1, 3, 4)])
        # it repeats the labels, and two of four are wrong
        torch.save({"chosen": torch.ones(1, 4), "rejected": torch.zeros(1, 4)}, scores)
    figures = real.judge(cell, [home, f"{tmp_path}/seed5"])
    assert list(figures) == ["start", "DPO"] and figures["DPO"]["seeds"] == ["4"]  # no IPO, no seed 5
    assert figures["DPO"]["start"][0] == 0.875 and figures["start"]["DPO"][0] == 0.125  # a tie counts half
    assert figures["DPO"]["start/new"][0] == 0.75 and figures["DPO"]["start/oracle"][0] == 0.5
    assert figures["DPO"]["kl"][0] == 2.5 and figures["DPO"]["perplexity"][0] == pytest.approx(5)
    assert figures["start"]["oracle"] == [[0.5, 0.5, 0.0]]
    real.report(tmp_path, {"clean_all": figures})
    assert "| DPO | 4 | 0.88 [0.48, 1.00] |" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["clean_all"]["DPO"]["kl"][0] == 2.5


def test_one_seeds_interval_is_over_its_prompts():
    won = np.arange(100) < 64
    mean, low, high = real.interval([won.astype(float)])
    assert mean == 0.64 and high - mean == pytest.approx(1.96 * (0.64 * 0.36 / 100) ** 0.5, rel=0.01)
    assert real.interval([won, ~won])[1] < 0  # two seeds that disagree say nothing


def test_true_rewards_are_read_by_align(tmp_path, process_group):
    rows = [row | {"prompt": "x"} for row in real.label(samples(20), 0.4, 50, seed=0)]
    toy.write_jsonl(tmp_path / "pairs.jsonl", rows)
    real.save_truth(tmp_path / "pairs.jsonl", tmp_path / "true.pt", lambda row, key: row[f"{key}_reward"])
    args = argparse.Namespace(loss="edpo", max_length=512)
    paths = str(tmp_path / "pairs.jsonl"), str(tmp_path / "true.pt")
    _, oracle = align.load_split(*paths, toy.make_tokenizer(), args)
    assert torch.equal(oracle[0, :, 0] - oracle[0, :, 1], torch.tensor(
        [row["chosen_reward"] for row in rows]) - torch.tensor([row["rejected_reward"] for row in rows]))


def test_every_policy_has_a_folder_of_its_own():
    cells = real.CELLS.values()
    folders = {real.policy_folder("home", cell, method) for cell in cells for method in cell["methods"]}
    learned, true = real.CELLS["noisy_all"], real.CELLS["noisy_all_truth"]
    assert real.policy_folder("home", learned, "DPO") == real.policy_folder("home", true, "DPO")
    shared = 3  # DPO in the three cells with another Oracle
    assert len(folders) == sum(len(cell["methods"]) for cell in cells) - shared
