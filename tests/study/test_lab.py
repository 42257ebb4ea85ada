"""The arithmetic that the claims rest on: intervals, wins, the choosing rule, how good an Oracle is."""
import argparse
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import align
import common
import lab
import toy


def test_the_interval_is_students_t_over_the_seeds():
    by_seed = [np.full(3, mean) for mean in (0.55, 0.60, 0.65, 0.70, 0.75)]
    # by hand: std 0.0790569, over sqrt(5) 0.0353553; t of 4 degrees of freedom is 2.776
    assert common.interval(by_seed) == pytest.approx([0.65, 0.65 - 0.09815, 0.65 + 0.09815], abs=2e-4)


def test_one_seeds_interval_is_over_its_prompts():
    won = np.arange(100) < 64
    mean, low, high = common.interval([won.astype(float)])
    assert mean == 0.64 and high - mean == pytest.approx(1.96 * (0.64 * 0.36 / 99) ** 0.5, rel=1e-3)


def test_the_interval_covers_the_true_mean_in_19_of_20_studies():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):  # five seeds whose true rates differ, forty prompts each
        rates = rng.normal(0.6, 0.05, 5)
        mean, low, high = common.interval([rng.random(40) < rate for rate in rates])
        covered += low <= 0.6 <= high
    assert 0.935 < covered / 2000 < 0.965


def test_wins_go_to_the_higher_reward_and_a_tie_counts_half():
    ours = {"prompt": np.arange(3), "true": np.array([1.0, 2.0, -1.0]), "oracle": np.array([0.0, 0.0, 5.0])}
    theirs = {"prompt": np.arange(3), "true": np.array([0.5, 2.0, 0.0]), "oracle": np.array([1.0, 0.0, 1.0])}
    assert common.wins(ours, theirs).tolist() == [1.0, 0.5, 0.0]
    assert common.wins(ours, theirs, "oracle").tolist() == [0.0, 0.5, 1.0]
    with pytest.raises(AssertionError):
        common.wins(ours, theirs | {"prompt": np.array([1, 0, 2])})


def test_the_hyperparameters_with_the_highest_mean_are_chosen():
    assert common.best({"a": [0.9, 0.1, 0.6], "b": [0.6, 0.6, 0.5], "c": [0.55, 0.55, 0.55]}) == "b"


def test_the_length_of_the_winner_cuts_a_set_in_three(tmp_path):
    rows = toy.make_pairs(200, 0)
    toy.write_jsonl(tmp_path / "train.jsonl", rows)
    kept = {}
    for which in ("shorter", "equal", "longer"):
        lab.keep_winners(tmp_path / "train.jsonl", which, tmp_path / f"{which}.jsonl")
        kept[which] = common.read_rows(tmp_path / f"{which}.jsonl")
    assert sum(map(len, kept.values())) == len(rows) and all(len(some) > 20 for some in kept.values())
    assert all(len(row["chosen"].split()) < len(row["rejected"].split()) for row in kept["shorter"])


def test_the_oracle_is_right_where_it_prefers_the_truly_better_response(tmp_path):
    setting = lab.setting(0.4, pairs=9)
    _, data, path = common.places(tmp_path, setting)
    rows = toy.make_pairs(200, 3, 0.4)  # with flips and ties
    os.makedirs(os.path.dirname(data))
    toy.write_jsonl(data, rows)
    common.save_true_rewards(lab, data, path)
    assert common.oracle_quality(lab, tmp_path, setting)["Oracle right"] == 1
    labels = [np.sign(row["chosen_reward"] - row["rejected_reward"]) for row in rows]
    repeats = {"chosen": torch.ones(1, 200), "rejected": torch.zeros(1, 200)}  # it repeats the labels
    torch.save(torch.load(path, weights_only=True) | repeats, path)
    quality = common.oracle_quality(lab, tmp_path, setting)
    assert quality["Oracle right"] == labels.count(1) / (labels.count(1) + labels.count(-1))
    assert quality["Oracle's spread"] == 0


def test_true_rewards_are_read_by_align(tmp_path, process_group):
    rows = toy.make_pairs(9, 3)
    data = str(tmp_path / "pairs.jsonl")
    rewards = str(tmp_path / "true.pt")
    toy.write_jsonl(data, rows)
    common.save_true_rewards(lab, data, rewards)
    args = argparse.Namespace(loss="drdo", max_length=512)
    tokenizer = toy.make_tokenizer()
    lm = toy.make_model(tokenizer, seed=0, steps=0)
    lm.generation_config.eos_token_id = [tokenizer.eos_token_id]
    pairs, oracle = align.load_split(data, rewards, tokenizer, lm, args)
    own = torch.tensor([[[row["chosen_reward"], row["rejected_reward"]] for row in rows]])
    assert len(pairs) == 9 and torch.equal(oracle, own)


def test_every_method_has_a_folder_of_its_own():
    """Names hold spaces and parentheses, folders do not. One DPO serves every kind of Oracle."""
    learned = lab.SETTINGS["grid_0.4_learned"]
    true = lab.SETTINGS["grid_0.4_true"]

    def folder(setting, method):
        return common.answers_of(lab, "home", setting, method)[0]

    methods = {*lab.METHODS, *lab.VARIANTS}
    folders = {folder(learned, method) for method in methods}
    assert len(folders) == len(methods) and not any(set(name) & set(" ()") for name in folders)
    assert folder(learned, "DPO") == folder(true, "DPO")
    assert folder(learned, "DRDO (head)") != folder(true, "DRDO (head)")


def test_the_study_document_says_what_results_json_has():
    """Every win rate with an interval in STUDY.md is a figure of results.json."""
    here = Path(__file__).parent
    known = {json.dumps(figure) for figure in figures(json.loads((here / "results.json").read_text()))}
    text = (here / "STUDY.md").read_text().replace("\n", " ")
    stated = common.re.findall(r"(\d\.\d+)\s+\[(\d\.\d+),\s+(\d\.\d+)\]", text)
    missing = [figure for figure in stated if json.dumps(list(map(float, figure))) not in known]
    assert len(stated) > 50 and not missing


def figures(value):
    """The lists in nested dicts."""
    if isinstance(value, dict):
        return list(itertools.chain(*map(figures, value.values())))
    return [value] if isinstance(value, list) else []
