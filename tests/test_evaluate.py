"""evaluate.py: win rates, intervals, pairs, tables and pictures against known answers. test_judge.py has the
chat models."""

import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import sys
import types

import matplotlib.image
import numpy as np
import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import evaluate  # noqa: E402

NAN = float("nan")


@pytest.fixture(autouse=True)
def quick_pictures(request, monkeypatch):
    """Drawing takes a second a run; test_pictures and test_curves read files that were drawn."""
    drawn = "test_pictures", "test_curves", "test_the_loss_picture_of_the_paper"
    if request.function.__name__ not in drawn:
        monkeypatch.setattr(evaluate.Figure, "savefig", lambda figure, path, **_: open(path, "w").close())


def row(generator, prompt, response="x y", temperature=0.5, **more):
    return {"prompt": prompt, "response": response, "temperature": temperature, "generator": generator,
            "tokens": len(response.split()), "eos": True, **more}


def write(path, rows, rewards=None, reference=None, oracles=("one",)):
    """A generations file and, beside it, the rewards file NAME.pt of nested lists (K, N)."""
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    if rewards is not None:
        held = {"response": torch.tensor(rewards), "oracles": list(oracles),
                "data_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        if reference is not None:
            held["reference"] = torch.tensor(reference)
        torch.save(held, path.with_suffix(".pt"))
    return str(path), str(path.with_suffix(".pt"))


def run(tmp_path, *arguments):
    """A run's comparisons by (policy, opponent, group, temperature), and all of its evaluation.json."""
    evaluate.main([*map(str, arguments), "--out", str(tmp_path / "out")])
    held = json.loads((tmp_path / "out/evaluation.json").read_text(), parse_constant=pytest.fail)
    return {(r["policy"], r["opponent"], r["group"], r["temperature"]): r for r in held["comparisons"]}, held


def refused(capsys, tmp_path, *arguments):
    """The one line of a run that must end with status 2 and write no results."""
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path, *arguments)
    assert exit_.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and not (tmp_path / "out/evaluation.json").exists()
    return lines[0]


# win rates and pairs

def test_figures_by_hand(tmp_path):
    ours = [row("us", "p1", "a b c", 0.2, eos=False), row("us", "p2", "a", 0.2), row("us", "p3", "a b", 0.2),
            row("us", "p1", "c", 0.9), row("us", "p2", "d", 0.9)]
    theirs = [row("them", "p2", "e f", 0.9), row("them", "p3", "g h", 0.2), row("them", "p1", "i j", 0.2),
              row("them", "p2", "k l", 0.2), row("them", "p1", "m n", 0.9)]  # another order
    ours, our_rewards = write(tmp_path / "ours.jsonl", ours, [[3.0, 1.0, 5.0, 0.0, 2.0]])
    theirs, their_rewards = write(tmp_path / "theirs.jsonl", theirs, [[1.0, 4.0, 1.0, 1.0, 2.0]])
    figures, held = run(tmp_path, "--generations", ours, theirs, "--rewards", our_rewards, their_rewards)

    cold = figures["us", "them", "all", 0.2]  # 3 : 1, 1 : 1, 5 : 4
    assert [cold[k] for k in ("n", "wins", "ties", "losses")] == [3, 2, 1, 0]
    assert cold["win_rate"] == pytest.approx(2.5 / 3)
    assert cold["reward_difference"] == pytest.approx(1.0)
    assert cold["opponent_std"] == pytest.approx(2 ** 0.5)  # of 1, 1, 4: mean 2, variance (1 + 1 + 4) / 3
    assert cold["advantage"] == pytest.approx(2 ** -0.5)
    expected = [bound / 2 ** 0.5 for bound in cold["reward_difference_interval"]]
    assert cold["advantage_interval"] == pytest.approx(expected)
    assert cold["words"] == [2.0, 2.0] and cold["eos"] == pytest.approx([2 / 3, 1.0])
    hot = figures["us", "them", "all", 0.9]  # 0 : 2, 2 : 1
    assert [hot[k] for k in ("n", "wins", "ties", "losses", "win_rate")] == [2, 1, 0, 1, 0.5]
    pooled = figures["us", "them", "all", "all"]
    assert [pooled[k] for k in ("n", "wins", "ties", "losses", "win_rate")] == [5, 3, 1, 1, 0.7]
    back = figures["them", "us", "all", "all"]  # the mirror image
    assert (back["wins"], back["win_rate"]) == (1, pytest.approx(0.3))
    assert back["reward_difference"] == pytest.approx(-pooled["reward_difference"]) == pytest.approx(-0.4)
    summary = {(r["policy"], r["temperature"]): r for r in held["policies"]}
    assert summary["us", 0.2]["reward"] == 3.0 and summary["us", "all"]["reward"] == pytest.approx(2.2)
    assert summary["us", 0.2]["eos"] == pytest.approx(2 / 3) and summary["us", 0.2]["n"] == 3
    assert held["generations"][ours] == hashlib.sha256(open(ours, "rb").read()).hexdigest()
    table = (tmp_path / "out/evaluation.md").read_text()
    assert re.search(r"us \| 0\.2 \|  3 \| 2/1/0 \| 0\.833 \[", table) and "0.67 / 1.00" in table


def test_partners_are_of_the_same_prompt_temperature_and_group(tmp_path, capsys):
    rows = [row("us", "p1", temperature=0.2, set="in"), row("us", "p1", temperature=0.9, set="in"),
            row("us", "p1", temperature=0.2, set="in"), row("us", "p2", temperature=0.2, set="out"),
            row("them", [{"role": "user", "content": "p1"}], temperature=0.2, set="in"),  # another prompt
            row("them", "p2", temperature=0.2, set="out"), row("them", "p1", temperature=0.2, set="in"),
            row("them", "p1", temperature=0.2, set="in"), row("them", "p1", temperature=0.2, set="out")]
    data, rewards = write(tmp_path / "g.jsonl", rows, [[1.0, 9.0, 2.0, 7.0, 9.0, 3.0, 1.0, 5.0, 9.0]])
    figures, held = run(tmp_path, "--generations", data, "--rewards", rewards, "--against", "them",
                        "--group_by", "set")
    assert set(figures) == {("us", "them", "set in", 0.2), ("us", "them", "set out", 0.2)}
    inside = figures["us", "them", "set in", 0.2]  # in file order 1 : 1 and 2 : 5
    assert (inside["wins"], inside["ties"], inside["losses"], inside["reward_difference"]) == (0, 1, 1, -1.5)
    assert figures["us", "them", "set out", 0.2]["reward_difference"] == 4.0
    note = ("us against them: 1 of 4 responses are left out: no partner of the same prompt, temperature and "
            "group")
    assert held["notes"] == [note] and note in capsys.readouterr().out


def test_oracles_are_averaged_and_nan_is_left_out(tmp_path):
    ours, our_rewards = write(tmp_path / "a.jsonl", [row("us", f"p{k}") for k in range(4)],
                              [[1.0, 1.0, 1.0, NAN], [8.0, 0.0, 3.0, 9.0]], oracles=("one", "two"))
    theirs, their_rewards = write(tmp_path / "b.jsonl", [row("them", f"p{k}") for k in range(4)],
                                  [[2.0, 2.0, NAN, 0.0], [2.0, 1.0, 0.0, 0.0]], oracles=("one", "two"))
    figures, held = run(tmp_path, "--generations", ours, theirs, "--rewards", our_rewards, their_rewards,
                        "--against", "them")
    figures = figures["us", "them", "all", 0.5]  # means 4.5 : 2, 0.5 : 1.5; the first oracle: both lost
    assert (figures["n"], figures["wins"], figures["losses"], figures["reward_difference"]) == (2, 1, 1, 0.75)
    note = "us against them: 2 pairs are left out: too long for the --max_length of precompute_rewards.py"
    assert held["notes"] == [note]
    assert held["oracles"] == ["one", "two"]
    means = {r["policy"]: r["reward"] for r in held["policies"]}
    assert means == pytest.approx({"us": 7 / 3, "them": 3.5 / 3})


def test_reference_is_an_opponent(tmp_path):
    (tmp_path / "run").mkdir()
    rows = [row("us", "p0"), row("us", "p1", "a b", reference=" 1 2 3"), row("us", "p2", reference=" 1")]
    data, _ = write(tmp_path / "run/rewards.jsonl", rows, [[9.0, 1.0, 2.0]], reference=[[NAN, 4.0, 1.0]])
    figures, held = run(tmp_path, "--generations", data, "--against", "reference")  # finds run/rewards.pt
    figures = figures["us", "reference", "all", 0.5]
    assert (figures["wins"], figures["losses"], figures["reward_difference"]) == (1, 1, -1.0)
    assert figures["words"] == [2.0, 2.0]
    assert figures["eos"] == [1.0, None]
    assert held["notes"][0].startswith("us against reference: 1 of 3 responses")


def test_a_reference_meets_the_response_of_its_own_row(tmp_path):
    rows = [row("us", "p", domain=domain, reference="r") for domain in ("posts", "articles")]
    data, rewards = write(tmp_path / "g.jsonl", rows, [[1.0, 2.0]], reference=[[0.0, 3.0]])
    figures, held = run(tmp_path, "--generations", data, "--rewards", rewards, "--against", "reference",
                        "--group_by", "domain")
    for domain, difference in ("posts", 1.0), ("articles", -1.0):
        assert figures["us", "reference", f"domain {domain}", 0.5]["reward_difference"] == difference
    assert not [note for note in held["notes"] if "left out" in note]


def test_reward_function(tmp_path, capsys):
    code = tmp_path / "mine.py"
    code.write_text("def reward(row):\n    return len(row['response'].split()) - (not row['eos'])\n"
                    "def broken(row):\n    return 1 / (row['prompt'] != 'p2')\n"
                    "def text(row):\n    return '3'\n")
    rows = [row("us", "p1", "a b c", eos=False, reference="a b"), row("us", "p2", "a", reference="a b")]
    data, _ = write(tmp_path / "g.jsonl", rows)
    flags = ["--generations", data, "--against", "reference", "--reward_fn"]
    for name, expected in (("broken", f"{data}, line 2 (ZeroDivisionError"),
                           ("text", f"{data}, line 1 (TypeError")):
        message = refused(capsys, tmp_path, *flags, f"{code}:{name}")
        assert f"{code}:{name}" in message and expected in message
    assert "absent" in refused(capsys, tmp_path, *flags, f"{code}:absent")
    figures, _ = run(tmp_path, *flags, f"{code}:reward")
    figures = figures["us", "reference", "all", 0.5]  # 3 - 1 : 2, 1 : 2
    assert (figures["ties"], figures["losses"], figures["win_rate"]) == (1, 1, 0.25)


def test_a_file_without_references_stands_beside_one_with(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    rows = [row("us", prompt, reference="r") for prompt in "pq"]
    ours, our_rewards = write(tmp_path / "a/generations.jsonl", rows, [[1.0, 3.0]], [[2.0, 2.0]])
    rows = [row("them", "p"), row("them", "q")]
    theirs, their_rewards = write(tmp_path / "b/generations.jsonl", rows, [[0.0, 0.0]])
    files = ["--generations", theirs, ours, "--rewards", their_rewards, our_rewards]
    figures, _ = run(tmp_path, *files, "--against", "reference", "them")
    assert figures["us", "reference", "all", 0.5]["wins"] == 1
    assert figures["us", "them", "all", 0.5]["wins"] == 2


# intervals

def test_interval_agrees_with_every_possible_draw():
    prompts = np.array([2, 2, 2, 0, 1, 1, 3])  # with 3, 1, 2 and 1 pairs
    values = np.array([1, 0.5, 1, 0, 0.5, 1, 0.5])
    exact = []
    for draw in itertools.product(sorted(set(prompts.tolist())), repeat=4):
        drawn = np.concatenate([values[prompts == prompt] for prompt in draw])
        exact.append(drawn.mean())
    expected = np.percentile(exact, [2.5, 97.5])
    for wrong in (-0.3, 0.3):  # the resampling's own error does not move them
        assert np.percentile(exact, [2.5 + wrong, 97.5 + wrong]) == pytest.approx(expected)
    assert evaluate.bootstrap(values[:, None], prompts, 20000, 0)[0] == pytest.approx(expected, abs=1e-9)


def test_intervals_are_paired_and_seeded(tmp_path):
    noise = np.random.default_rng(3).normal(size=50).tolist()
    rows = [row(name, f"p{k}") for name in ("us", "them") for k in range(50)]
    data, rewards = write(tmp_path / "g.jsonl", rows, [[x + 1 for x in noise] + noise])
    figures, _ = run(tmp_path, "--generations", data, "--rewards", rewards, "--against", "them")
    figures = figures["us", "them", "all", 0.5]
    assert figures["reward_difference_interval"] == pytest.approx([1, 1], abs=1e-6)  # float32 rewards
    assert figures["win_rate_interval"] == [1, 1]
    assert figures["opponent_std"] == pytest.approx(np.std(noise), rel=1e-6)
    values = np.column_stack([noise, noise])
    first, again, other = (evaluate.bootstrap(values, np.arange(50), 100, seed) for seed in (0, 0, 1))
    assert (first == again).all() and (first[0] == first[1]).all() and (first != other).any()


def test_pooling_equal_temperatures_narrows_nothing(tmp_path):
    rewards = np.random.default_rng(5).normal(size=40).repeat(4).tolist()
    rows = [row(name, f"p{k}", temperature=temperature)
            for name in ("us", "them") for k in range(40) for temperature in (0.2, 0.5, 0.7, 0.9)]
    data, rewards = write(tmp_path / "g.jsonl", rows, [rewards + [0.0] * 160])
    figures, _ = run(tmp_path, "--generations", data, "--rewards", rewards, "--against", "them")
    pooled, one = figures["us", "them", "all", "all"], figures["us", "them", "all", 0.2]
    assert (pooled["n"], one["n"]) == (160, 40)
    for name in ("win_rate", "standard_error", "win_rate_interval", "reward_difference_interval",
                 "length_controlled_interval"):
        assert pooled[name] == pytest.approx(one[name])


# pictures

def test_pictures(tmp_path):
    rows = [row(name, f"p{k}", temperature=temperature, set=k % 2)
            for name in ("us", "them", "base") for k in range(6) for temperature in (0.2, 0.9)]
    rewards = np.random.default_rng(4).normal(size=len(rows)).tolist()
    data, rewards = write(tmp_path / "g.jsonl", rows, [rewards])
    figures, held = run(tmp_path, "--generations", data, "--rewards", rewards, "--against", "base", "them",
                        "--group_by", "set")
    for name in ("win_rates", "advantages"):
        assert matplotlib.image.imread(tmp_path / f"out/{name}.png").shape[0] > 500
    assert not list((tmp_path / "out").glob("*.partial"))
    judge = "judge: me; 6 prompts"
    figure = evaluate.plot_by_temperature(held["comparisons"], "advantage", "label", 0, judge)
    assert figure.get_supxlabel().endswith("judge: me; 6 prompts")
    assert [axis.get_title() for axis in figure.axes] == [
        f"against {opponent}\nset {k}" for k in (0, 1) for opponent in ("base", "them")]
    axis = figure.axes[2]  # against base, set 1
    drawn = {container.lines[0].get_ydata()[1] for container in axis.containers}
    assert drawn == {figures[policy, "base", "set 1", 0.9]["advantage"] for policy in ("us", "them")}


def log_lines(folder, *rows):
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_curves(tmp_path, capsys):
    run = log_lines(tmp_path / "drdo",
                    {"step": 5, "loss": 1.0, "loss/contrastive": 0.5, "logps/chosen": -9.0},
                    {"step": 10, "loss": 0.75, "logps/chosen": -8.0, "grad_norm": None},
                    {"step": 10, "eval_loss": 1.25, "eval_rewards/accuracies": 0.625})
    evaluate.main(["--curves", run, "--out", str(tmp_path / "out")])
    assert matplotlib.image.imread(tmp_path / "out/curves.png").ndim == 3
    drawn = {axis.get_title(): [line.get_xydata().tolist() for line in axis.lines]
             for axis in evaluate.plot_curves([run]).axes}
    assert drawn == {"loss": [[[5, 1.0], [10, 0.75]], [[10, 1.25]]], "loss/contrastive": [[[5, 0.5]]],
                     "rewards/accuracies": [[[10, 0.625]]], "logps/chosen": [[[5, -9.0], [10, -8.0]]]}
    log_lines(tmp_path / "drdo", {"step": 5, "grad_norm": 1.0})
    with pytest.raises(SystemExit):
        evaluate.main(["--curves", run, "--out", str(tmp_path / "none")])
    assert "drdo/log.jsonl: no line has `step`" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_many_runs_can_be_told_apart(tmp_path):
    runs = [log_lines(tmp_path / f"run{k}", {"step": 1, "loss": k}, {"step": 2, "eval_loss": k})
            for k in range(12)]
    axis, = (figure := evaluate.plot_curves(runs)).axes
    held_out = [line for line in axis.lines if line.get_marker() not in ("", "None")]
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in held_out}
    assert len(held_out) == len(looks) == 12
    assert len({line.get_color() for line in held_out}) == 10
    assert [text.get_text() for text in figure.legends[0].get_texts()] == runs


def test_sampled_rewards_are_a_panel(tmp_path, capsys):
    run = log_lines(tmp_path / "drdo", {"step": 5, "loss": 1.0})
    for step, response in (100, [[1.0, 2.0, NAN]]), (20, [[0.0, 1.0, 5.0], [2.0, 3.0, 5.0]]):
        (tmp_path / f"drdo/step{step}").mkdir()
        torch.save({"response": torch.tensor(response), "reference": torch.full((len(response), 3), 2.0)},
                   tmp_path / f"drdo/step{step}/rewards.pt")
    shutil.copytree(tmp_path / "drdo/step20", tmp_path / "drdo/step20_old")  # a user's: it is no step
    _, panel = evaluate.plot_curves([run]).axes
    assert panel.get_title() == "rewards/sampled"
    assert [line.get_xydata().tolist() for line in panel.lines] == [[[20, pytest.approx(4 / 6)], [100, -0.5]]]
    torch.save({"response": torch.zeros(1, 3)}, tmp_path / "drdo/step20/rewards.pt")
    with pytest.raises(SystemExit):
        evaluate.plot_curves([run])
    assert "step20/rewards.pt: no rewards of references" in capsys.readouterr().err


# the length-controlled win rate

def test_length_controlled_is_the_maximum_of_its_likelihood():
    rng = np.random.default_rng(0)
    differences = rng.normal(5, 20, size=300)
    chance = 1 / (1 + np.exp(-(-0.4 + 1.5 * np.tanh(differences / 20))))
    outcomes = np.where(rng.random(300) < 0.1, 0.5, rng.random(300) < chance)
    x = torch.tanh(torch.tensor(differences / differences.std()))
    y, parameters = torch.tensor(outcomes), torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15)

    def loss():  # another optimiser on the objective as METRICS.md prints it
        optimizer.zero_grad()
        logits = parameters[0] + parameters[1] * x
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum")
        (value := value + parameters[1] ** 2 / 2).backward()
        return value
    optimizer.step(loss)
    expected = torch.sigmoid(parameters[0]).item()
    rate, (low, high) = evaluate.length_controlled(outcomes, differences, np.arange(300))
    assert rate == pytest.approx(expected, abs=1e-6) and low < rate < high
    assert abs(expected - outcomes.mean()) > 0.03  # the length matters here
    mirror, (theirs_low, _) = evaluate.length_controlled(1 - outcomes, -differences, np.arange(300))
    assert [mirror, theirs_low] == pytest.approx([1 - expected, 1 - high], abs=1e-6)


def test_length_controlled_stays_finite():
    def rate(outcomes, differences):
        found, interval = evaluate.length_controlled(outcomes, differences, np.arange(len(outcomes)))
        assert interval[0] <= found <= interval[1]
        return found
    longer = np.arange(1, 9.0)
    assert rate(np.ones(8), longer) > 0.7  # all won by longer responses
    assert rate(np.ones(8), np.zeros(8)) == pytest.approx(1)
    assert rate(np.array([1, 0, 0.5, 0.5]), np.zeros(4)) == pytest.approx(0.5)
    decided_by_length = np.array([1.0, 0.0] * 50), np.array([9.0, -9.0] * 50)
    assert rate(*decided_by_length) == pytest.approx(0.5)


def test_the_interval_at_equal_length_covers_the_truth():
    """Of 60 prompts with 4 samples each. A prompt's rate at equal length is 0.1 or 0.9."""
    rng, prompts = np.random.default_rng(5), np.arange(60).repeat(4)

    def draw(a):  # b = 1.2, which the penalty hardly moves
        differences = rng.normal(10, 20, size=len(a))
        chance = 1 / (1 + np.exp(-a - 1.2 * np.tanh(differences / 20)))
        return (rng.random(len(a)) < chance).astype(float), differences
    logit = np.log(0.9 / 0.1)
    many = draw(rng.choice([-logit, logit], size=100_000))
    truth, _ = evaluate.length_controlled(*many, np.arange(100_000))
    data = [draw(rng.choice([-logit, logit], size=60).repeat(4)) for _ in range(200)]
    clustered, each = [np.mean([low <= truth <= high for _, (low, high) in (
        evaluate.length_controlled(*pair, ids) for pair in data)]) for ids in (prompts, np.arange(240))]
    assert 0.91 < clustered < 0.98 and each < 0.85  # a prompt's samples tell less than 4 prompts


def test_length_controlled_stands_in_the_table(tmp_path):
    rows = [row("us", f"p{k}", "w " * (10 if k < 30 else 2)) for k in range(40)]
    rows += [row("them", f"p{k}", "w " * 5) for k in range(40)]
    wins = [1.0] * 27 + [0.0] * 3 + [1.0] * 1 + [0.0] * 9  # 27 of 30 longer ones win, 1 of 10 shorter ones
    data, rewards = write(tmp_path / "g.jsonl", rows, [wins + [0.5] * 40])
    figures, _ = run(tmp_path, "--generations", data, "--rewards", rewards, "--against", "them")
    figures = figures["us", "them", "all", 0.5]
    assert figures["win_rate"] == 0.7 and 0.35 < figures["length_controlled"] < 0.6
    low, high = figures["length_controlled_interval"]
    assert low < figures["length_controlled"] < high
    cell = f"{figures['length_controlled']:.3f} [{low:.3f}, {high:.3f}]"
    assert cell in (tmp_path / "out/evaluation.md").read_text()


# students, splits and Oracles

def test_students_stand_in_one_table_and_one_picture(tmp_path):
    """Table 2 and Figure 3: groups are folders, and out/sft meets all of them."""
    files, rewards = [], []
    for group, gain in ("out/opt-125m", 1.0), ("out/opt-350m", -1.0):
        for policy in ("drdo", "sft"):
            (folder := tmp_path / group / policy).mkdir(parents=True)
            rows = [row(f"{group}/{policy}", f"p{k}", temperature=t, reference="r")
                    for k in range(3) for t in (0.2, 0.9)]
            won = gain if policy == "drdo" else 0.0
            held = write(folder / "g.jsonl", rows, [[won] * 6], reference=[[0.5] * 6])
            files, rewards = [*files, held[0]], [*rewards, held[1]]
    (tmp_path / "out/sft").mkdir()
    held = write(tmp_path / "out/sft/g.jsonl", [row("out/sft", f"p{k}", temperature=0.9) for k in range(3)],
                 [[2.0] * 3])
    figures, held = run(tmp_path, "--generations", *files, held[0], "--rewards", *rewards, held[1],
                        "--against", "sft", "out/sft", "reference", "--group_by", "folder")
    assert figures["drdo", "sft", "folder out/opt-125m", 0.2]["wins"] == 3
    assert figures["drdo", "sft", "folder out/opt-350m", 0.2]["losses"] == 3
    assert figures["drdo", "reference", "folder out/opt-125m", 0.9]["reward_difference"] == 0.5
    assert figures["drdo", "out/sft", "folder out/opt-350m", 0.9]["reward_difference"] == -3.0
    assert ("sft", "out/sft", "folder out", 0.9) not in figures
    table = (tmp_path / "out/evaluation.md").read_text().split("## Against ")
    lines = re.findall(r"^\| *drdo \| (.*?) \| *(.*?) \|", table[1], re.MULTILINE)
    assert table[1].startswith("sft") and lines == [
        (f"folder out/opt-{size}", t) for size in ("125m", "350m") for t in ("0.2", "0.9", "all")]
    figure = evaluate.plot_by_temperature(
        [r for r in held["comparisons"] if r["opponent"] == "sft"], "win_rate", "label", 0.5, "judge")
    assert [axis.get_title() for axis in figure.axes] == [
        f"against sft\nfolder out/opt-{size}" for size in ("125m", "350m")]
    drawn = [axis.containers[0].lines[0].get_ydata().tolist() for axis in figure.axes]
    assert drawn == [[1.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize("taught", [
    ["out/oracle"], ["./out/../out/oracle/"], ["out/other", "ABSOLUTE"], ["out/else"], [], None])
def test_a_judge_that_taught_a_policy_is_named(tmp_path, monkeypatch, taught):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/drdo").mkdir(parents=True)
    rows = [row(name, "p") for name in ("us", "them")]
    write(tmp_path / "out/drdo/rewards.jsonl", rows, [[1.0, 0.0]], oracles=["out/oracle"])
    oracles = [str(tmp_path / "out/oracle") if name == "ABSOLUTE" else name for name in taught or []]
    (tmp_path / "out/drdo/args.json").write_text(json.dumps({"loss": "drdo", "oracles": taught and oracles}))
    _, held = run(tmp_path, "--generations", "out/drdo/rewards.jsonl")
    notes = [note for note in held["notes"] if "may favour its pupil" in note]
    assert len(notes) == 2 * (taught not in ([], None, ["out/else"]))
    (tmp_path / "out/drdo/step100").mkdir()  # --keep_steps: the args.json is one folder up
    write(tmp_path / "out/drdo/step100/rewards.jsonl", rows, [[1.0, 0.0]], oracles=["out/oracle"])
    _, kept = run(tmp_path, "--generations", "out/drdo/step100/rewards.jsonl")
    assert [note for note in kept["notes"] if "may favour its pupil" in note] == notes
    assert all(note in (tmp_path / "out/evaluation.md").read_text() for note in notes)


# labelled pairs

def test_an_oracle_is_checked_against_labels(tmp_path):
    pairs = [("a b c", "a")] * 2 + [("a", "a b c")] * 3 + [("a b", "c d"), ("x", "y")]
    rows = [{"prompt": f"p{k}", "chosen": chosen, "rejected": rejected, "tie": k == 6}
            for k, (chosen, rejected) in enumerate(pairs)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    digest = hashlib.sha256((tmp_path / "pairs.jsonl").read_bytes()).hexdigest()
    torch.save({"chosen": torch.tensor([[5.0, 5, 5, 0, 1, 3, 0]]), "rejected": torch.ones(1, 7),
                "oracles": ["one"], "data_sha256": digest}, tmp_path / "r.pt")
    figures, held = run(tmp_path, "--judge_check", tmp_path / "pairs.jsonl", "--rewards", tmp_path / "r.pt")
    figures = {group: figures["chosen", "rejected", group, "-"] for _, _, group, _ in figures}
    assert {group: (r["n"], r["win_rate"]) for group, r in figures.items()} == {
        "all": (6, 4.5 / 6), "chosen longer": (2, 1.0), "chosen shorter": (3, 0.5), "as long": (1, 1.0)}
    low, high = figures["all"]["win_rate_interval"]
    assert 0.3 <= low < 0.75 < high <= 1
    assert held["notes"] == ["1 of 7 pairs are ties by their labels: left out"]
    assert not list((tmp_path / "out").glob("*.png"))


# AlpacaEval

def alpaca_eval_package():
    """The package. Its last release asks setuptools' pkg_resources, which is no more, for versions."""
    gone = types.ModuleType("pkg_resources")
    gone.get_distribution = lambda name: types.SimpleNamespace(version=importlib.metadata.version(name))
    sys.modules.setdefault("pkg_resources", gone)
    return pytest.importorskip("alpaca_eval")


def test_alpaca_eval_reads_our_outputs_and_we_its_annotations(tmp_path):
    package = alpaca_eval_package()
    instructions = [f"Question {k}?\n\nOf \"two\" – lines." for k in range(6)]
    data, _ = write(tmp_path / "g.jsonl", [
        row("out/drdo", [{"role": "user", "content": text}], " w" * (k + 1), dataset="koala")
        for k, text in enumerate(instructions)])
    evaluate.main(["--generations", data, "--alpaca_eval", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "out_drdo_outputs.json").read_text(encoding="utf-8"))
    assert rows[1] == {"instruction": instructions[1], "output": "w w", "generator": "out/drdo",
                       "dataset": "koala"}
    theirs = [{"instruction": text, "output": "v " * 3, "generator": "davinci", "dataset": "koala"}
              for text in reversed(instructions)]
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    (tmp_path / "prompt.txt").write_text("{instruction}\n(a) {output_1}\n(b) {output_2}\n")
    (tmp_path / "configs.yaml").write_text(  # it prefers (a), and the package shuffles which one is (a)
        f"likes_first: {{prompt_template: {tmp_path}/prompt.txt, fn_completions: test_completions, "
        "completions_kwargs: {value: (a)}, completion_parser_kwargs: {outputs_to_match: {1: a, 2: b}}}")
    board, _ = package.evaluate(
        model_outputs=str(tmp_path / "out_drdo_outputs.json"), precomputed_leaderboard=None,
        annotators_config=str(tmp_path / "configs.yaml"), fn_metric="get_winrate",
        reference_outputs=str(tmp_path / "theirs.json"), sort_by="win_rate",
        output_path=str(tmp_path), is_return_instead_of_print=True, caching_path=None)
    figures, held = run(tmp_path, "--annotations", next(tmp_path.rglob("annotations.json")))
    ours, expected = figures["out/drdo", "davinci", "all", "-"], board.loc["out/drdo"]
    assert ours["n"] == 6 and 0 < ours["win_rate"] < 1
    assert 100 * ours["win_rate"] == pytest.approx(expected["win_rate"])
    assert 100 * ours["standard_error"] == pytest.approx(expected["standard_error"])


def annotations(*preferences):
    return [{"instruction": "the same", "output_1": "a b", "generator_1": "davinci",
             "output_2": "c " * (k + 1), "generator_2": "out/drdo", "preference": preference}
            for k, preference in enumerate(preferences)]


def test_annotations_as_the_package_counts_them(tmp_path, capsys):
    preferences = [1, 2, 1.98, 1.02, 1.5, 0, None, 1.4, 2]  # 0 is a draw, None none
    (tmp_path / "a.json").write_text(json.dumps(annotations(*preferences), indent=2))
    figures, held = run(tmp_path, "--annotations", tmp_path / "a.json")
    ours, known = figures["out/drdo", "davinci", "all", "-"], np.array([0, 1, 0.98, 0.02, 0.5, 0.5, 0.4, 1])
    assert (ours["n"], ours["wins"], ours["ties"], ours["losses"]) == (8, 3, 2, 3)
    assert ours["win_rate"] == pytest.approx(known.mean())
    assert ours["standard_error"] == pytest.approx(known.std(ddof=1) / 8 ** 0.5)
    assert "out/drdo against davinci: 1 pairs are left out: no verdict" in held["notes"]
    package = alpaca_eval_package()
    expected = package.metrics.get_winrate(annotations(*(p for p in preferences if p is not None)))
    assert 100 * ours["win_rate"] == pytest.approx(expected["win_rate"])
    assert 100 * ours["standard_error"] == pytest.approx(expected["standard_error"])
    assert (ours["wins"], ours["losses"]) == (expected["n_wins"], expected["n_wins_base"])


def test_bad_annotations_and_outputs(tmp_path, capsys):
    null = [json.dumps([annotations(1)[0] | {key: None}]) for key in ("output_2", "generator_2")]
    for text in ("[{", "[]", '[{"preference": 1}]', '{"a": 1}', json.dumps(annotations("much")), *null):
        (tmp_path / "a.json").write_text(text)
        assert "a.json: cannot use it" in refused(capsys, tmp_path, "--annotations", tmp_path / "a.json")
    data, _ = write(tmp_path / "g.jsonl", [row("us", "p", temperature=t) for t in (0.2, 0.9)])
    assert "one --temperature" in refused(capsys, tmp_path, "--generations", data, "--alpaca_eval")
    data, _ = write(tmp_path / "r.jsonl", [row("us", "p", reference="r")])
    evaluate.main(["--generations", data, "--alpaca_eval", "--against", "reference", "--out", str(tmp_path)])
    assert len(json.loads((tmp_path / "us_outputs.json").read_text())) == 1


# tests/PAPER.md

def test_the_loss_picture_of_the_paper(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
    text = open(os.path.join(ROOT, "tests/PAPER.md"), encoding="utf-8").read()
    exec(re.search(r"### The preference loss by gamma.*?```python\n(.*?)```", text, re.DOTALL)[1], {})
    lines = pyplot.gca().lines
    assert [line.get_label() for line in lines] == ["gamma 0", "gamma 1", "gamma 2", "gamma 5"]
    for line, gamma in zip(lines, (0, 1, 2, 5)):
        ratio, loss = line.get_xydata().astype(float).T
        assert ratio[-1] == pytest.approx(np.log(2)) and len(ratio) == 200
        assert loss == pytest.approx(-(1 / (1 + np.exp(ratio))) ** gamma * ratio, abs=1e-5)
    pyplot.close()
    assert (tmp_path / "preference_loss.png").exists()


# bad input

def test_bad_rewards(tmp_path, capsys):
    rows = [row(name, f"p{k}") for name in ("us", "them") for k in range(2)]
    data, rewards = write(tmp_path / "g.jsonl", rows, [[1.0, 2.0, 3.0, 4.0]])
    good = torch.load(rewards)

    def message(flags=(), **change):
        torch.save({k: v for k, v in {**good, **change}.items() if v is not None}, rewards)
        return refused(capsys, tmp_path, "--generations", data, "--rewards", rewards, *flags)

    wrong = message(data_sha256="0" * 64)
    assert all(word in wrong for word in (rewards, good["data_sha256"], "precompute_rewards.py"))
    for response in (torch.zeros(1, 3), torch.zeros(4), [1.0] * 4, None):
        assert "no `response` rewards of 4 rows" in message(response=response)
    assert "--max_length" in message(response=torch.full((1, 4), NAN))
    expected = "--against nobody: no such `generator`; there are us, them, `reference`"
    assert expected in message(["--against", "nobody"])
    assert "no two responses" in message(["--against", "reference"])
    other, other_rewards = write(tmp_path / "h.jsonl", [row("base", "p1")], [[1.0]], oracles=("other",))
    torch.save(good, rewards)
    flags = ["--generations", data, other, "--rewards", rewards]
    for few in (flags, flags[:3]):  # one file named, or one rewards.pt for both files of a folder
        assert "2 files need one each" in refused(capsys, tmp_path, *few)
    assert "['other']" in refused(capsys, tmp_path, *flags, other_rewards)
    swapped = refused(capsys, tmp_path, "--generations", other, data, "--rewards", rewards, other_rewards)
    assert "keep the files in order, or run" in swapped and "an --out of its own" in swapped
    (tmp_path / "nan.py").write_text("def nan(row):\n    return float('nan')\n")
    silent = refused(capsys, tmp_path, "--generations", data, "--reward_fn", f"{tmp_path}/nan.py:nan")
    assert "nan.py:nan gave NaN" in silent and "--max_length" not in silent
    with_reference, _ = write(tmp_path / "r.jsonl", [row("us", "p", reference="x")], [[1.0]])
    assert "no `reference` rewards" in refused(capsys, tmp_path, "--generations", with_reference, "--rewards",
                                               tmp_path / "r.pt", "--against", "reference")
