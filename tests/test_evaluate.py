"""evaluate.py as a specification: who meets whom, win rates, intervals, tables, pictures. test_judge.py has
the chat models."""
import hashlib
import importlib.metadata
import itertools
import json
import re
import sys
import types
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.text import Text

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402

NAN = float("nan")
SAVEFIG = evaluate.Figure.savefig
NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """{name: figure} of the pictures that a run saves. Their files stay empty: drawing takes a second."""
    figures = {}

    def keep(figure, path, **_):
        figures[Path(path).name.removesuffix(".partial")] = figure
        Path(path).touch()
    monkeypatch.setattr(evaluate.Figure, "savefig", keep)
    return figures


def row(generator, prompt, response=None, temperature=0.5, **more):
    """A line of generations. Texts that are not given are all different, of seven characters."""
    response = f"x {next(NUMBERS):05}" if response is None else response
    return {"prompt": prompt, "response": response, "temperature": temperature, "generator": generator,
            "tokens": len(response.split()) ** 2, "eos": True, **more}


def write(folder, rows, oracles=("one",), name="generations.jsonl", **rewards):
    """A JSONL file, and the rewards beside it, its name with .pt, of `response`, `reference`, ...: (K, N)."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if rewards:
        held = {kind: torch.tensor(values) for kind, values in rewards.items()}
        held["oracles"] = list(oracles)
        held["data_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        torch.save(held, path.with_suffix(".pt"))
    return path


def run(tmp_path, *flags):
    """A run's comparisons by (policy, opponent, group, temperature), and all of its evaluation.json, but for
    the note on ties that every reward model brings along."""
    evaluate.main([*map(str, flags), "--out", str(tmp_path / "out")])
    held = json.loads((tmp_path / "out/evaluation.json").read_text(), parse_constant=pytest.fail)
    held["notes"] = [note for note in held["notes"] if "or less tie: " not in note]
    keys = "policy", "opponent", "group", "temperature"
    return {tuple(record[key] for key in keys): record for record in held["comparisons"]}, held


def refused(capsys, tmp_path, *flags):
    """The one line of a run that must end with status 2 and write no results."""
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path, *flags)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert exit_.value.code == 2 and len(lines) == 1
    assert not (tmp_path / "out/evaluation.json").exists()
    return lines[0]


def counts(record):
    return record["wins"], record["ties"], record["losses"]


# ---- who meets whom, and who wins

def test_figures_by_hand(tmp_path):
    ours = [row("us", "p1", "a b c", 0.2, eos=False), row("us", "p2", "a", 0.2), row("us", "p3", "a b", 0.2),
            row("us", "p1", "c", 0.9), row("us", "p2", "d", 0.9)]
    theirs = [row("them", "p2", "e f", 0.9), row("them", "p3", "g h", 0.2), row("them", "p1", "i j", 0.2),
              row("them", "p2", "k l", 0.2), row("them", "p1", "m n", 0.9)]  # another order
    ours = write(tmp_path / "us", ours, response=[[3.0, 1.0, 5.0, 0.0, 2.0]])
    theirs = write(tmp_path / "them", theirs, response=[[1.0, 4.0, 1.0, 1.0, 2.0]])
    figures, held = run(tmp_path, "--generations", ours, theirs)

    cold = figures["us", "them", "all", 0.2]  # 3 : 1, 1 : 1, 5 : 4; by reward 2, 0, 1
    expected = {"n": 3, "win_rate": 2.5 / 3, "decided_win_rate": 1, "reward_difference": 1,
                "opponent_std": 2 ** 0.5, "advantage": 2 ** -0.5, "chars": [3, 3], "eos": [2 / 3, 1],
                "advantage_interval": [bound / 2 ** 0.5 for bound in cold["reward_difference_interval"]]}
    for name, value in expected.items():  # the variance of 1, 1, 4 is (1 + 1 + 4) / 3
        assert cold[name] == pytest.approx(value), name
    pooled = figures["us", "them", "all", "all"]
    back = figures["them", "us", "all", "all"]  # the mirror image
    assert [counts(record) for record in (cold, figures["us", "them", "all", 0.9], pooled, back)] == [
        (2, 1, 0), (1, 0, 1), (3, 1, 1), (1, 1, 3)]
    assert pooled["win_rate"] == 0.7 and back["win_rate"] == pytest.approx(0.3)
    assert pooled["reward_difference"] == -back["reward_difference"] == pytest.approx(0.4)
    longer = np.array([2, -2, 0, -2, -2])  # in characters, by prompts 0, 1, 2, 0, 1
    expected, _ = evaluate.length_controlled(np.array([1, 0.5, 1, 0, 1]), longer, np.array([0, 1, 2, 0, 1]))
    assert pooled["length_controlled"] == pytest.approx(expected)
    own = {(record["policy"], record["temperature"]): record for record in held["policies"]}
    expected = {"n": 3, "reward": 3.0, "chars": 3.0, "tokens": (9 + 1 + 4) / 3, "eos": 2 / 3}
    assert {name: own["us", 0.2][name] for name in expected} == pytest.approx(expected)
    assert own["us", "all"]["reward"] == pytest.approx(2.2)
    assert held["generations"][str(ours)] == hashlib.sha256(ours.read_bytes()).hexdigest()


def test_partners_are_of_the_same_prompt_temperature_and_group_in_file_order(tmp_path):
    messages = [{"role": "user", "content": "p1"}]  # another prompt than the text
    rows = [row("us", "p1", temperature=0.2, set="in"), row("us", "p1", temperature=0.9, set="in"),
            row("us", "p1", temperature=0.2, set="in"), row("us", "p2", temperature=0.2, set="out"),
            row("them", messages, temperature=0.2, set="in"), row("them", "p2", temperature=0.2, set="out"),
            row("them", "p1", temperature=0.2, set="out"), row("them", "p1", temperature=0.2, set="in"),
            row("them", "p1", temperature=0.2, set="in")]
    data = write(tmp_path, rows, response=[[1.0, 9.0, 2.0, 7.0, 9.0, 3.0, 9.0, 1.0, 5.0]])
    figures, held = run(tmp_path, "--generations", data, "--against", "them", "--group_by", "set")
    assert set(figures) == {("us", "them", "set in", 0.2), ("us", "them", "set out", 0.2)}
    inside = figures["us", "them", "set in", 0.2]  # 1 : 1 and 2 : 5
    assert counts(inside) == (0, 1, 1) and inside["reward_difference"] == -1.5
    assert figures["us", "them", "set out", 0.2]["reward_difference"] == 4.0
    assert held["notes"] == ["us against them: 1 of 4 are left out: no partner of the same prompt, "
                             "temperature and group"]


def test_a_reference_meets_the_response_of_its_own_row_alone(tmp_path):
    rows = [row("us", "p", set=1, reference="r"), row("us", "p", set=2, reference="r s t"),
            row("them", "p", set=1, reference="another"), row("us", "q", set=1)]
    data = write(tmp_path / "a", rows, response=[[1.0, 2.0, 5.0, 9.0]], reference=[[0.0, 3.0, 1.0, NAN]])
    without = write(tmp_path / "b", [row("base", "p", set=1)], response=[[3.0]])
    figures, held = run(tmp_path, "--generations", without, data, "--group_by", "set",
                        "--against", "reference", "base", "base")
    differences = {key[:3]: record["reward_difference"] for key, record in figures.items()}
    assert differences == {
        ("us", "reference", "set 1"): 1.0, ("us", "reference", "set 2"): -1.0,
        ("them", "reference", "set 1"): 4.0, ("us", "base", "set 1"): -2.0, ("them", "base", "set 1"): 2.0}
    assert figures["us", "reference", "set 2", 0.5]["chars"] == [7.0, 5.0]
    assert figures["us", "reference", "set 2", 0.5]["eos"] == [1.0, None]  # nobody knows a reference's
    assert [note.split(" are")[0] for note in held["notes"]] == [
        "base against reference: 1 of 1", "us against reference: 1 of 3", "us against base: 2 of 3"]
    assert sum(record["n"] for record in held["policies"]) == 5  # a reference is no policy's response


def test_with_group_by_folder_students_meet_in_their_folder(tmp_path):
    """Table 2 and Figure 3. out/sft, outside of all groups, meets all of them."""
    files = []
    for group, gain in ("out/opt-125m", 1.0), ("out/opt-350m", -1.0):
        for policy, won in ("drdo", gain), ("sft", 0.0):
            rows = [row(f"{group}/{policy}/", f"p{k}", temperature=temperature, reference="r")
                    for k in range(3) for temperature in (0.2, 0.9)]
            files.append(write(tmp_path / group / policy, rows, response=[[won] * 6], reference=[[0.5] * 6]))
    rows = [row("out/sft", f"p{k}", temperature=0.9) for k in range(3)]
    files.append(write(tmp_path / "out/sft", rows, response=[[2.0] * 3]))
    figures, _ = run(tmp_path, "--generations", *files, "--group_by", "folder",
                     "--against", "sft", "out/sft", "reference")
    assert counts(figures["drdo", "sft", "folder out/opt-125m", 0.2]) == (3, 0, 0)
    assert counts(figures["drdo", "sft", "folder out/opt-350m", 0.2]) == (0, 0, 3)
    assert figures["drdo", "reference", "folder out/opt-125m", 0.9]["reward_difference"] == 0.5
    assert figures["drdo", "out/sft", "folder out/opt-350m", 0.9]["reward_difference"] == -3.0
    assert ("sft", "out/sft", "folder out", 0.9) not in figures


def test_oracles_are_averaged_and_pairs_with_nan_are_left_out_and_counted(tmp_path):
    names = ["one", "two"]
    ours = write(tmp_path / "a", [row("us", f"p{k}") for k in range(4)], names,
                 response=[[1.0, 1.0, 1.0, NAN], [8.0, 0.0, 3.0, 9.0]])
    theirs = write(tmp_path / "b", [row("them", f"p{k}") for k in range(4)], names,
                   response=[[2.0, 2.0, NAN, 0.0], [2.0, 1.0, 0.0, 0.0]])
    figures, held = run(tmp_path, "--generations", ours, theirs, "--against", "them")
    figures = figures["us", "them", "all", 0.5]  # means 4.5 : 2, 0.5 : 1.5; by the first both are lost
    assert figures["n"] == 2 and counts(figures) == (1, 0, 1) and figures["reward_difference"] == 0.75
    assert held["judge"] == "judge: one, two; 2 prompts"
    reason = "no verdict, or a reward of NaN (in FILE.pt: over --max_length)"
    assert held["notes"] == [f"us against them: 2 of 4 are left out: {reason}"]
    means = {record["policy"]: record["reward"] for record in held["policies"]}
    assert means == pytest.approx({"us": 7 / 3, "them": 3.5 / 3})


@pytest.mark.parametrize("spread, near, used", [
    (1e-6, 5e-5, "1e-05 of the mean"), (0.03, 0.01, "so much do those of equal texts")])
def test_equal_texts_tie_and_all_within_the_scorers_rounding(tmp_path, spread, near, used):
    prompts = [f"p{k}" for k in range(63)]
    noise = np.random.default_rng(0).uniform(-spread, spread, 60)
    rewards = {"us": [10.0] * 63, "them": [*(10 + noise), 10 + 10 * near, 10 - 10 * near, 10 - near]}
    rewards["us"][0], rewards["them"][0] = 10 + spread, 10  # the widest
    files = []
    for name, values in rewards.items():  # the last three texts differ
        rows = [row(name, prompt, prompt) for prompt in prompts[:60]] + [row(name, p) for p in prompts[60:]]
        files.append(write(tmp_path / name, rows, response=[values]))
    figures, held = run(tmp_path, "--generations", *files, "--against", "them")
    assert counts(figures["us", "them", "all", 0.5]) == (1, 61, 1)
    assert held["rounding"] == pytest.approx(max(spread, 1e-4), rel=0.1)
    assert used in (tmp_path / "out/evaluation.md").read_text().split("or less tie: ")[1].splitlines()[0]


def test_a_reward_function_reads_the_row_and_its_failures_name_the_line(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "def reward(row):\n"
        "    return len(row['response'].split()) - (not row['eos']) + (row['tokens'] is None)\n"
        "def broken(row):\n    return 1 / (row['prompt'] != 'p2')\n"
        "def text(row):\n    return '3'\n"
        "def nan(row):\n    return float('nan')\n")
    rows = [row("us", "p1", "a b c", eos=False, reference="a"), row("us", "p2", "a", reference="a")]
    data = write(tmp_path, rows)
    flags = ["--generations", data, "--against", "reference", "--reward_fn", f"{tmp_path}/mine.py:"]
    for name, expected in (("broken", f"{data}, line 2 (ZeroDivisionError"), ("absent", "absent"),
                           ("text", f"{data}, line 1 (TypeError"), ("nan", "a reward of NaN")):
        assert expected in refused(capsys, tmp_path, *flags[:-1], flags[-1] + name)
    figures, held = run(tmp_path, *flags[:-1], flags[-1] + "reward")
    # 3 - 1 : 1 + 1, 1 : 1 + 1, though these texts are equal
    assert counts(figures["us", "reference", "all", 0.5]) == (0, 1, 1) and held["rounding"] == 0


def test_an_oracle_is_checked_against_labels(tmp_path, drawn):
    pairs = [("a b c", "a")] * 2 + [("a", "a b c")] * 3 + [("a b", "c d"), ("x", "y")]
    rows = [{"prompt": f"p{k}", "chosen": chosen, "rejected": rejected, "tie": k == 6}
            for k, (chosen, rejected) in enumerate(pairs)]
    data = write(tmp_path, rows, chosen=[[5.0, 5, 5, 0, 1, 3, 0]], rejected=[[1.0] * 7])
    figures, held = run(tmp_path, "--judge_check", data)
    accuracies = {key[2]: (record["n"], record["win_rate"]) for key, record in figures.items()}
    assert accuracies == {"all": (6, 4.5 / 6), "chosen longer": (2, 1.0), "chosen shorter": (3, 0.5),
                          "as long": (1, 1.0)}
    low, high = figures["chosen", "rejected", "all", "-"]["win_rate_interval"]
    assert 0.3 <= low < 0.75 < high <= 1
    assert held["notes"] == [f"{data}: 1 of 7 pairs are ties by their labels: left out"] and not drawn


@pytest.mark.parametrize("taught, named", [
    (["out/oracle"], True), (["./out/../out/oracle/"], True), (["out/other", "ABSOLUTE"], True),
    (["out/else"], False), ([], False), (None, False)])
def test_a_judge_that_taught_a_policy_is_named(tmp_path, monkeypatch, taught, named):
    monkeypatch.chdir(tmp_path)
    policies = ["out/drdo", "out/drdo/step100", "them"]  # a kept step's args.json is one folder up
    data = write(tmp_path, [row(name, "p") for name in policies], ["out/oracle"], response=[[1.0, 0.0, 2.0]])
    taught = taught and [name.replace("ABSOLUTE", str(tmp_path / "out/oracle")) for name in taught]
    Path("out/drdo").mkdir(parents=True)
    Path("out/drdo/args.json").write_text(json.dumps({"loss": "drdo", "oracles": taught}))
    notes = run(tmp_path, "--generations", data)[1]["notes"]
    assert notes == [f"the judge out/oracle taught {name}: it may favour its pupil"
                     for name in policies[:2] if named]


# ---- intervals

def test_the_bootstrap_agrees_with_every_possible_draw_of_whole_prompts():
    prompts = np.array([2, 2, 2, 0, 1, 1, 3])  # with 3, 1, 2 and 1 pairs
    values = np.array([1, 0.5, 1, 0, 0.5, 1, 0.5])
    exact = []
    for draw in itertools.product(range(4), repeat=4):
        exact.append(np.concatenate([values[prompts == prompt] for prompt in draw]).mean())
    expected = np.percentile(exact, [2.5, 97.5])
    assert evaluate.bootstrap(values[:, None], prompts, 20000, 0)[0] == pytest.approx(expected, abs=1e-9)
    noise = np.random.default_rng(3).normal(size=50)
    first, other = evaluate.bootstrap(np.column_stack([noise, noise + 1]), np.arange(50), 100)
    assert other == pytest.approx(first + 1)  # the same draws for all columns


def test_pooling_equal_temperatures_narrows_nothing(tmp_path):
    rewards = np.random.default_rng(5).normal(size=40)
    rows = [row(name, f"p{k}", temperature=temperature)
            for name in ("us", "them") for k in range(40) for temperature in (0.2, 0.5, 0.7, 0.9)]
    data = write(tmp_path, rows, response=[[*rewards.repeat(4), *np.zeros(160)]])
    figures, _ = run(tmp_path, "--generations", data, "--against", "them")
    pooled = figures["us", "them", "all", "all"]
    one = figures["us", "them", "all", 0.2]
    assert (pooled["n"], one["n"]) == (160, 40)
    assert one["standard_error"] == pytest.approx(np.std(rewards > 0, ddof=1) / 40 ** 0.5)
    for name in ("win_rate", "standard_error", "win_rate_interval", "reward_difference_interval",
                 "length_controlled_interval"):
        assert pooled[name] == pytest.approx(one[name])


# ---- the win rate at equal length

def test_length_controlled_is_the_maximum_of_its_likelihood_with_clustered_errors():
    rng = np.random.default_rng(0)
    differences = rng.normal(5, 20, size=300)
    chance = 1 / (1 + np.exp(-(-0.4 + 1.5 * np.tanh(differences / 20))))
    outcomes = np.where(rng.random(300) < 0.1, 0.5, rng.random(300) < chance)
    x = torch.tanh(torch.tensor(differences / differences.std()))
    x = torch.stack([torch.ones_like(x), x])
    y = torch.tensor(outcomes)

    def losses(weights):  # the objective as METRICS.md prints it
        return torch.nn.functional.binary_cross_entropy_with_logits(weights @ x, y, reduction="none")

    def objective(weights):
        return losses(weights).sum() + weights[1] ** 2 / 2
    best = torch.zeros(2, dtype=torch.float64)
    for _ in range(30):  # Newton's method
        inverse = torch.autograd.functional.hessian(objective, best).inverse()
        best -= inverse @ torch.autograd.functional.jacobian(objective, best)
    rate, interval = evaluate.length_controlled(outcomes, differences, np.arange(300) // 3)
    assert rate == pytest.approx(torch.sigmoid(best[0]).item(), abs=1e-6)
    assert abs(rate - outcomes.mean()) > 0.03  # the length matters here
    scores = torch.autograd.functional.jacobian(losses, best).reshape(100, 3, 2).sum(1)  # one per prompt
    error = (inverse @ scores.T @ scores @ inverse)[0, 0].sqrt()
    bounds = best[0] + 1.96 * error * torch.tensor([-1, 1])
    assert interval == pytest.approx(torch.sigmoid(bounds).tolist(), abs=1e-6)


@pytest.mark.parametrize("outcomes, differences, expected", [
    (np.ones(8), np.zeros(8), 1), ([1, 0, 0.5, 0.5], np.zeros(4), 0.5), ([1, 0] * 50, [9, -9] * 50, 0.5),
    (np.ones(8), np.arange(1, 9), pytest.approx(0.85, abs=0.15))])  # all won by longer responses
def test_length_controlled_stays_finite(outcomes, differences, expected):
    prompts = np.arange(len(outcomes))
    rate, (low, high) = evaluate.length_controlled(np.array(outcomes), np.array(differences), prompts)
    assert rate == pytest.approx(expected) and low <= rate <= high


def test_length_is_counted_in_characters_for_scripts_without_spaces_too(tmp_path):
    lengths = np.array([9, 8, 7, 6, 8, 7, 3, 1])
    rows = [row("us", f"p{k}", " " + "好" * length + "\n") for k, length in enumerate(lengths)]
    rows += [row("them", f"p{k}", "的" * 4) for k in range(8)]
    outcomes = np.array([1, 1, 1, 1, 1, 1, 0, 0])  # as by length
    data = write(tmp_path, rows, response=[[*outcomes - 0.5, *np.zeros(8)]])
    record = run(tmp_path, "--generations", data, "--against", "them")[0]["us", "them", "all", 0.5]
    expected, _ = evaluate.length_controlled(outcomes, lengths - 4, np.arange(8))
    assert record["length_controlled"] == pytest.approx(expected) and record["chars"] == [lengths.mean(), 4]
    assert record["win_rate"] - expected > 0.1


# ---- tables and pictures

def test_the_tables_to_the_letter(tmp_path, capsys):
    rows = [row("us", "p", "a b c", eos=False, reference="r"), row("base", "p", "a b")]
    data = write(tmp_path, rows, response=[[2.0, 0.5]], reference=[[2.0, NAN]])
    run(tmp_path, "--generations", data, "--against", "base", "reference")
    text = (tmp_path / "out/evaluation.md").read_text()
    assert text in capsys.readouterr().out
    notes = ("judge: one; 1 prompts",
             "rewards that differ by 1.5e-05 or less tie: 1e-05 of the mean |reward|",
             "base against reference: 1 of 1 are left out: no partner of the same prompt, temperature and "
             "group")
    assert text.endswith("\n\n" + "".join(f"- {note}\n" for note in notes))
    lines = [line for line in text.splitlines() if line.startswith(("|", "#"))]
    assert len({len(line) for line in lines[1:5]}) == 1  # padded for a terminal
    assert [re.sub("  +", " ", line) for line in lines if "---" not in line] == [
        "## Policies", "| policy | T | n | reward | tokens | chars | EOS |",
        "| us | 0.5 | 1 | 2.000 | 9.0 | 5.0 | 0.00 |", "| base | 0.5 | 1 | 0.500 | 4.0 | 3.0 | 1.00 |",
        "## Against base", "| policy | T | n | W/T/L | win rate | LC | reward diff. | chars | EOS |",
        "| us | 0.5 | 1 | 1/0/0 | 1.000 [1.000, 1.000] | 1.000 [1.000, 1.000] | +1.500 [+1.500, +1.500] | "
        "5.0 / 3.0 | 0.00 / 1.00 |",
        "## Against reference", "| policy | T | n | W/T/L | win rate | LC | reward diff. | chars | EOS |",
        "| us | 0.5 | 1 | 0/1/0 | 0.500 [0.500, 0.500] | 0.500 [0.500, 0.500] | +0.000 [+0.000, +0.000] | "
        "5.0 / 1.0 | 0.00 / - |"]


def assert_readable(figure, monkeypatch):
    """All text lies on the canvas, none on another. Lines have WCAG's contrast for graphics, 3:1 on white."""
    texts = []
    draw = Text.draw
    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", lambda text, renderer: (texts.append(text), draw(text, renderer)))
        figure.draw_without_rendering()
    boxes = {text: text.get_window_extent() for text in texts if text.get_visible() and text.get_text()}
    for text, box in boxes.items():
        assert min(*box.min, *figure.bbox.max - box.max) >= 0, text
    for (one, box), (other, its) in itertools.combinations(boxes.items(), 2):
        assert not box.overlaps(its), (one, other)
    for line in [line for axis in figure.axes for line in axis.lines if line.get_color() != "gray"]:
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
                  for value in to_rgb(line.get_color())]
        assert line.get_alpha() is None and 1.05 / (np.dot(linear, [0.2126, 0.7152, 0.0722]) + 0.05) > 3


LONG = "out/SmolLM2-135M-Instruct/a_policy_of_a_long_name_and_of_a_longer_one"


@pytest.mark.parametrize("names, temperatures, flags", [
    (["sft", "dpo", "drdo"], [0.7], ["--against", "sft"]),  # the pipeline's last line
    (["us", "them", "base"], [0.2, 0.9], ["--against", "base", "them", "reference", "--group_by", "set"]),
    ([f"{LONG}_{k}" for k in range(12)], [0.2, 0.9], ["--against", f"{LONG}_0"])])
def test_pictures_draw_their_figure_with_its_interval_and_are_readable(
        tmp_path, drawn, monkeypatch, names, temperatures, flags):
    rows = [row(name, f"p{k}", temperature=temperature, set=f"number {k % 2}",
                **{"reference": "r"} if k % 2 else {})  # so the first set has no references
            for name in names for k in range(6) for temperature in temperatures]
    rewards = np.random.default_rng(4).normal(size=len(rows)).tolist()
    data = write(tmp_path, rows, [f"{LONG}_oracle"] * 3, response=[rewards], reference=[[1.0] * len(rows)])
    figures, held = run(tmp_path, "--generations", data, *flags)
    groups, opponents, policies = (list(dict.fromkeys(record[name] for record in held["comparisons"]))
                                   for name in ("group", "opponent", "policy"))
    for name, field, level in ("win_rates.png", "win_rate", 0.5), ("advantages.png", "advantage", 0):
        panels = iter(drawn[name].axes)
        for group, opponent in itertools.product(sorted(groups), opponents):
            axis = next(panels)
            assert axis.get_title().replace("\n", "") == f"against {opponent}" + group * (group != "all")
            expected = []
            for policy in policies:
                records = [figures.get((policy, opponent, group, hot)) for hot in temperatures]
                if records[0] and records[0][field] is not None:
                    expected.append((evaluate.LOOKS[policies.index(policy)]["color"], records))
            if not expected:  # an empty panel says why
                reason = "no pairs" if group == "set number 0" else "the opponent's rewards\nare all equal"
                assert [text.get_text() for text in axis.texts] == [reason]
            for (color, records), (points, _, (bars,)) in zip(expected, axis.containers, strict=True):
                assert points.get_color() == color
                assert points.get_ydata().tolist() == [record[field] for record in records]
                ends = [bar[:, 1].tolist() for bar in bars.get_segments()]
                assert np.allclose(ends, [record[f"{field}_interval"] for record in records])
                off = points.get_xdata() - np.arange(len(temperatures))
                assert np.ptp(off) < 1e-9 and abs(off[0]) < 0.45  # beside their tick
            assert axis.lines[-1].get_ydata() == [level, level]
            assert axis.get_xticks().tolist() == list(range(len(temperatures)))
            assert np.ptp(axis.get_xlim()) == len(temperatures)
        assert [text.get_text().replace("\n", "") for text in drawn[name].legends[0].get_texts()] == policies
        assert drawn[name].get_supxlabel().replace("\n", " ").endswith("_oracle; 6 prompts")
        assert_readable(drawn[name], monkeypatch)
    assert "win rate" in drawn["win_rates.png"].get_supylabel()
    assert "standard deviations" in drawn["advantages.png"].get_supylabel()


def test_a_picture_is_a_whole_png(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.Figure, "savefig", SAVEFIG)
    evaluate.main(["--curves", log(tmp_path / "run", {"step": 1, "loss": 2}), "--out", str(tmp_path / "out")])
    assert matplotlib.image.imread(tmp_path / "out/curves.png").shape[0] > 500
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["curves.png"]


def log(folder, *rows):
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_curves_have_a_panel_per_figure_and_the_held_out_line_beside(tmp_path, capsys):
    run = log(tmp_path / "drdo", {"step": 10, "eval_loss": 1.25, "eval_rewards/accuracies": 0.625},
              {"step": 10, "loss": 0.75, "logps/chosen": -8.0, "grad_norm": None},
              {"step": 5, "loss": 1.0, "loss/contrastive": 0.5, "logps/chosen": -9.0})
    for step, response in ("100", [[1.0, 2.0, NAN]]), ("20", [[0.0, 1.0, 5.0], [2.0, 3.0, 5.0]]), (
            "20_old", [[9.0]]):  # a user's copy: it is no step
        write(tmp_path / "drdo", [], name=f"step{step}_generations.jsonl", response=response,
              reference=[[2.0] * 3])
    drawn = {axis.get_title(): [line.get_xydata().tolist() for line in axis.lines]
             for axis in evaluate.plot_curves([run]).axes}
    assert drawn == {"loss": [[[5, 1.0], [10, 0.75]], [[10, 1.25]]], "loss/contrastive": [[[5, 0.5]]],
                     "rewards/accuracies": [[[10, 0.625]]], "logps/chosen": [[[5, -9.0], [10, -8.0]]],
                     "rewards/sampled": [[[20, pytest.approx(4 / 6)], [100, -0.5]]]}
    write(tmp_path / "drdo", [], name="step20_generations.jsonl", response=[[0.0]])
    assert "step20_generations.pt: no rewards of response and" in refused(capsys, tmp_path, "--curves", run)
    for broken, expected in ('{"step": 5, "grad_norm": 1}', "no line has `step` and"), ("{", "log.jsonl: "):
        (tmp_path / "log.jsonl").write_text(broken)
        assert expected in refused(capsys, tmp_path, "--curves", tmp_path)


def test_many_runs_can_be_told_apart(tmp_path, monkeypatch):
    runs = [log(tmp_path / f"run_with_a_long_name_{k}", {"step": 1, "loss": -1}, {"step": 2, "eval_loss": k})
            for k in range(12)]
    figure = evaluate.plot_curves([run + "/" for run in runs])
    held_out = [line for line in figure.axes[0].lines if line.get_linewidth() > 1]
    assert [line.get_ydata()[0] for line in held_out] == list(range(12))
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in held_out}
    assert [len(set(values)) for values in (looks, *zip(*looks))] == [12, 5, 4, 8]
    assert [text.get_text().replace("\n", "") for text in figure.legends[0].get_texts()] == runs
    assert_readable(figure, monkeypatch)


# ---- AlpacaEval

def alpaca_eval_package():
    """The package. Its last release asks setuptools' pkg_resources, which is no more, for versions."""
    gone = types.ModuleType("pkg_resources")
    gone.get_distribution = lambda name: types.SimpleNamespace(version=importlib.metadata.version(name))
    sys.modules.setdefault("pkg_resources", gone)
    return pytest.importorskip("alpaca_eval")


def annotations(*preferences):
    return [{"instruction": f"Why {k}?", "output_1": "a b", "generator_1": "davinci",
             "output_2": "c " * (k + 1), "generator_2": "out/drdo", "preference": preference}
            for k, preference in enumerate(preferences)]


def test_outputs_for_alpaca_eval(tmp_path, capsys):
    several = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    rows = [row("out/drdo", several[1:], " w w", reference="r", dataset="koala"),
            row("out/drdo", several, "é"), row("us", "plain")]
    evaluate.main(["--generations", str(write(tmp_path, rows)), "--alpaca_eval", "--out", str(tmp_path),
                   "--against", "reference"])
    outputs = json.loads((tmp_path / "out_drdo_outputs.json").read_text(encoding="utf-8"))
    assert outputs == [
        {"instruction": "Why?", "output": "w w", "generator": "out/drdo", "dataset": "koala"},
        {"instruction": "system: Be kind.\n\nuser: Why?", "output": "é", "generator": "out/drdo",
         "dataset": "alpaca_eval"}]
    assert len(json.loads((tmp_path / "us_outputs.json").read_text())) == 1
    data = write(tmp_path, [row("us", "p", temperature=temperature) for temperature in (0.2, 0.9)])
    assert "one --temperature" in refused(capsys, tmp_path, "--generations", data, "--alpaca_eval")


def test_annotations_are_counted_pair_by_pair(tmp_path):
    preferences = [1, 2, 1.98, 1.02, 1.5, 0, None, 1.4, 2]  # 0 is a draw, None none
    (tmp_path / "a.json").write_text(json.dumps(annotations(*preferences), indent=2))
    figures, held = run(tmp_path, "--annotations", tmp_path / "a.json")
    ours = figures["out/drdo", "davinci", "all", "-"]
    known = np.array([0, 1, 0.98, 0.02, 0.5, 0.5, 0.4, 1])
    assert ours["n"] == 8 and counts(ours) == (3, 2, 3)
    assert ours["win_rate"] == pytest.approx(known.mean())
    assert ours["standard_error"] == pytest.approx(known.std(ddof=1) / 8 ** 0.5)
    assert ours["chars"] == [pytest.approx((81 - 13) / 8), 3.0]  # of 1, 3, .. 17 characters without the 7th
    assert counts(figures["davinci", "out/drdo", "all", "-"]) == (3, 2, 3)
    assert "out/drdo against davinci: 1 of 9 are left out: no verdict" in held["notes"][1]
    preferences.remove(None)
    expected = alpaca_eval_package().metrics.get_winrate(annotations(*preferences))
    assert 100 * ours["win_rate"] == pytest.approx(expected["win_rate"])
    assert 100 * ours["standard_error"] == pytest.approx(expected["standard_error"])
    assert (ours["wins"], ours["losses"]) == (expected["n_wins"], expected["n_wins_base"])


def test_alpaca_eval_reads_our_outputs_and_we_its_annotations(tmp_path):
    package = alpaca_eval_package()
    instructions = [f"Question {k}?\n\nOf \"two\" – lines." for k in range(6)]
    rows = [row("out/drdo", text, " w" * (k + 1), dataset="koala") for k, text in enumerate(instructions)]
    evaluate.main(["--generations", str(write(tmp_path, rows)), "--alpaca_eval", "--out", str(tmp_path)])
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
    figures, _ = run(tmp_path, "--annotations", next(tmp_path.rglob("annotations.json")))
    ours = figures["out/drdo", "davinci", "all", "-"]
    assert ours["n"] == 6 and 0 < ours["win_rate"] < 1
    assert 100 * ours["win_rate"] == pytest.approx(board.loc["out/drdo"]["win_rate"])
    assert 100 * ours["standard_error"] == pytest.approx(board.loc["out/drdo"]["standard_error"])


# ---- what is refused

@pytest.mark.parametrize("flags, named", [
    ("--curves x --alpaca_eval", "--alpaca_eval: "), ("--annotations x --judge m", "--judge: give one"),
    ("--annotations x --group_by y", "no --group_by"), ("--generations x --rewards z --judge m", "give one")])
def test_flags_that_would_be_ignored_are_refused(tmp_path, capsys, flags, named):
    assert named in refused(capsys, tmp_path, *flags.split())


@pytest.mark.parametrize("text, line", [
    ("[{", ""), ("[]", ""), ('[{"preference": 1}]', 1), ('{"a": 1}', 1), ("7", ""), ("[7]", 1),
    (json.dumps(annotations("much")), 1), (json.dumps(annotations(1) + [{"preference": 1}]), 2),
    *[(json.dumps([annotations(1)[0] | {key: None}]), 1) for key in ("output_2", "generator_2")]])
def test_broken_annotations_are_refused(tmp_path, capsys, text, line):
    (tmp_path / "a.json").write_text(text)
    place = f"{tmp_path}/a.json" + f", line {line}" * bool(line)
    assert f"{place}: " in refused(capsys, tmp_path, "--annotations", tmp_path / "a.json")


@pytest.mark.parametrize("line, expected", [
    ("{", "JSON"), ("[]", "Type"), ('"text"', "Type"), ("\xff", "utf-8"), ('{"prompt": "p"}', "'response'"),
    ("", "JSON"), (json.dumps(row("us", "p") | {"response": 7}), "Type"),
    (json.dumps(row("us", [{"role": "user"}])), "'content'"), (json.dumps(row("us", "\ud800")), "surrogates"),
    *[(json.dumps(row("us", "p", temperature=hot)), "temperature") for hot in ("hot", NAN, -np.inf, None)]])
def test_a_broken_line_is_refused_by_its_number(tmp_path, capsys, line, expected):
    lines = [json.dumps(row("us", "p")), line, json.dumps(row("us", "q"))]
    (tmp_path / "g.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    message = refused(capsys, tmp_path, "--generations", tmp_path / "g.jsonl")
    assert f"{tmp_path}/g.jsonl, line 2: " in message and expected in message
    assert "each row needs the texts prompt, response and generator, and a number, temperature" in message


def test_a_bom_carriage_returns_and_a_missing_last_newline_are_read(tmp_path):
    lines = [json.dumps(row("us", "p", "é"), ensure_ascii=False), json.dumps(row("them", "p", "x y"))]
    (tmp_path / "g.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    (tmp_path / "f.py").write_text("def f(row):\n    return len(row['response'])\n")
    figures, _ = run(tmp_path, "--generations", tmp_path / "g.jsonl", "--reward_fn", f"{tmp_path}/f.py:f")
    assert figures["us", "them", "all", 0.5]["reward_difference"] == 1 - 3


def test_rewards_are_those_of_each_file_in_order_by_the_same_oracles(tmp_path, capsys):
    made = ("a", "one", 1.0), ("b", "one", 3.0), ("c", "two", 5.0), ("d", "one", NAN)
    files = [write(tmp_path, [row(name, "p", reference="r")], [oracle], f"{name}.jsonl", response=[[value]])
             for name, oracle, value in made]
    a, b, c, d = (str(file.with_suffix(".pt")) for file in files)
    (tmp_path / "broken.pt").write_text("no tensors")
    for given, flags, expected in (
            (files[:2], ["--rewards", b, a], f"{b}: it does not score {files[0]}"),
            (files[:2], ["--rewards", a], "2 files need one each"),
            (files[:2], ["--against", "reference"], f"{a}: no rewards of response and reference"),
            (files[::2], [], f"{c}: scored by ['two'], but {a} by ['one']"),
            (files[:2], ["--rewards", a, tmp_path / "broken.pt"], "broken.pt: cannot read it"),
            (files[:2], ["--rewards", a, tmp_path / "none.pt"], "none.pt: cannot read it"),
            (files[:2], ["--against", "nobody"], "no such `generator`; there are a, b, and `reference`"),
            (files[:1], [], "no pair is left"), (files[::3], [], "over --max_length")):
        message = refused(capsys, tmp_path, "--generations", *given, *flags)
        assert expected in message, message
        if ".pt: " in expected:
            assert f"run precompute_rewards.py --data {tmp_path}/" in message or "score all by" in message
    for again in [], ["--rewards", a, b]:
        figures, _ = run(tmp_path, "--generations", *files[:2], *again)
        assert figures["b", "a", "all", 0.5]["reward_difference"] == 2.0
