"""The study's arithmetic (tests/lab.py): intervals, verdicts, and the sets it cuts."""
import argparse
import json
import os

import numpy as np
import torch

import align
import lab
import toy


def test_the_interval_covers_the_truth_in_19_of_20_studies():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(2000):  # five seeds whose true rates differ, forty prompts each
        rates = rng.normal(0.6, 0.05, 5)
        mean, low, high = lab.interval([rng.random(40) < rate for rate in rates])
        covered += low <= 0.6 <= high
    assert 0.935 < covered / 2000 < 0.965


def test_wins_go_to_the_higher_true_reward_and_a_tie_counts_half():
    ours = {"a": {"true": 1.0}, "b": {"true": 2.0}, "c": {"true": -1.0}}
    theirs = {"c": {"true": 0.0}, "a": {"true": 0.5}, "b": {"true": 2.0}}
    assert lab.wins(ours, theirs).tolist() == [1.0, 0.5, 0.0]


def test_the_length_dial_cuts_a_set_in_three(tmp_path):
    rows, kept = toy.make_pairs(200, 0), {}
    toy.write_jsonl(tmp_path / "train.jsonl", rows)
    for which in ("shorter", "equal", "longer"):
        lab.keep_winners(tmp_path / "train.jsonl", which, tmp_path / f"{which}.jsonl")
        kept[which] = [json.loads(line) for line in open(tmp_path / f"{which}.jsonl")]
    assert sum(map(len, kept.values())) == len(rows) and all(len(some) > 20 for some in kept.values())
    assert all(len(row["chosen"].split()) < len(row["rejected"].split()) for row in kept["shorter"])


def test_the_best_length_of_a_seed_is_chosen_on_the_others():
    rates = np.array([[0.9, 0.4, 0.5],   # 100 steps win by far on the first seed alone,
                      [0.1, 0.6, 0.6]])  # where 300 lose by far
    assert lab.best_elsewhere(rates).tolist() == [1, 0, 0]


def test_the_oracle_is_right_where_it_prefers_the_truly_better_response(tmp_path):
    cell = lab.cell(flip=0.4, pairs=9)
    _, _, data, path = lab.places(tmp_path, cell)
    rows = toy.make_pairs(200, 3, 0.4)
    os.makedirs(os.path.dirname(data))
    toy.write_jsonl(data, rows)
    lab.save_truth(data, path)
    assert lab.teacher(cell, tmp_path)[0] == 1
    saved = torch.load(path, weights_only=True)
    # flips and ties are among them
    labels = [np.sign(row["chosen_reward"] - row["rejected_reward"]) for row in rows]
    # an Oracle that repeats the labels
    repeats = {"chosen": torch.ones(1, 200), "rejected": torch.zeros(1, 200)}
    torch.save({**saved, **repeats}, path)
    right, std = lab.teacher(cell, tmp_path)
    assert np.isclose(right, labels.count(1) / (labels.count(1) + labels.count(-1))) and std == 0


def test_true_rewards_are_read_by_align(tmp_path, process_group):
    rows, data, rewards = toy.make_pairs(9, 3), str(tmp_path / "pairs.jsonl"), str(tmp_path / "true.pt")
    toy.write_jsonl(data, rows)
    lab.save_truth(data, rewards)
    args = argparse.Namespace(loss="drdo", max_length=512)
    pairs, oracle = align.load_split(data, rewards, toy.make_tokenizer(), args)
    own = torch.tensor([[[row["chosen_reward"], row["rejected_reward"]] for row in rows]])
    assert len(pairs) == 9 and torch.equal(oracle, own)


def test_every_method_has_a_folder_of_its_own():
    """Names hold spaces and parentheses, folders do not. One DPO serves every kind of Oracle."""
    learned, true = lab.CELLS["grid_0.4_learned"], lab.CELLS["grid_0.4_true"]
    folders = {lab.policy_folder("home", learned, method) for method in lab.METHODS}
    assert len(folders) == len(lab.METHODS) and not any(set(folder) & set(" ()") for folder in folders)
    assert lab.policy_folder("home", learned, "DPO") == lab.policy_folder("home", true, "DPO")
    assert lab.policy_folder("home", learned, "DRDO (head)") != lab.policy_folder("home", true, "DRDO (head)")
