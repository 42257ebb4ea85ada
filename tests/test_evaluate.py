"""evaluate.py: win rates, intervals, pairs and verdicts against known answers."""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import matplotlib.image
import numpy as np
import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import evaluate  # noqa: E402

NAN = float("nan")


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
    evaluate.main([*map(str, arguments), "--out", str(tmp_path / "out"), "--bootstrap", "200"])
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
    assert cold["tokens"] == cold["words"] == [2.0, 2.0] and cold["eos"] == pytest.approx([2 / 3, 1.0])
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
    assert held["generations"][ours] == [hashlib.sha256(open(ours, "rb").read()).hexdigest(), 5]
    table = (tmp_path / "out/evaluation.md").read_text()
    assert re.search(r"us \| +0\.2 \| +3 \| +2/1/0 \| 0\.833 \[", table) and "0.67 / 1.00" in table


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
    note = "us against them: 1 and 2 rows are left out: no partner of the same prompt, temperature and group"
    assert held["left_out"] == [note] and note in capsys.readouterr().out


def test_oracles_are_averaged_and_nan_is_left_out(tmp_path):
    ours, our_rewards = write(tmp_path / "a.jsonl", [row("us", f"p{k}") for k in range(4)],
                              [[1.0, 1.0, 1.0, NAN], [8.0, 0.0, 3.0, 9.0]], oracles=("one", "two"))
    theirs, their_rewards = write(tmp_path / "b.jsonl", [row("them", f"p{k}") for k in range(4)],
                                  [[2.0, 2.0, NAN, 0.0], [2.0, 1.0, 0.0, 0.0]], oracles=("one", "two"))
    figures, held = run(tmp_path, "--generations", ours, theirs, "--rewards", our_rewards, their_rewards,
                        "--against", "them")
    figures = figures["us", "them", "all", 0.5]  # means 4.5 : 2, 0.5 : 1.5; the first oracle: both lost
    assert (figures["n"], figures["wins"], figures["losses"], figures["reward_difference"]) == (2, 1, 1, 0.75)
    assert held["left_out"] == ["us against them: 2 pairs are left out: no reward"]
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
    assert figures["words"] == [2.0, 2.0] and figures["tokens"] == [2.0, None]
    assert figures["eos"] == [1.0, None]
    assert held["left_out"][0].startswith("us against reference: 1 and 0 rows")


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


def test_num_prompts_are_drawn_where_there_is_a_partner(tmp_path):
    rows = [row("us", f"p{k}") for k in range(40)] + [row("them", f"p{k}") for k in range(35, 40)]
    data, rewards = write(tmp_path / "g.jsonl", rows, [list(range(45))])
    figures, _ = run(tmp_path, "--generations", data, "--rewards", rewards, "--num_prompts", 5)
    assert figures["us", "them", "all", 0.5]["n"] == 5
    rows += [row("base", f"p{k}") for k in range(34)]  # many meet it, but nobody is set against it
    data, rewards = write(tmp_path / "h.jsonl", rows, [list(range(79))])
    figures, _ = run(tmp_path, "--generations", data, "--rewards", rewards, "--num_prompts", 3,
                     "--against", "them")
    assert figures["us", "them", "all", 0.5]["n"] == 3


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


def test_num_prompts_takes_whole_prompts(tmp_path):
    rows = [row(name, f"p{k}", temperature=temperature)
            for name in ("us", "them") for k in range(20) for temperature in (0.2, 0.9)]
    data, rewards = write(tmp_path / "g.jsonl", rows, [[1.0] * 40 + [0.0] * 40])
    figures, held = run(tmp_path, "--generations", data, "--rewards", rewards, "--num_prompts", 7)
    assert [r["n"] for r in figures.values()] == [7, 7, 14] * 2 and held["left_out"] == []


# intervals

def test_interval_agrees_with_the_binomial():
    outcomes = (np.random.default_rng(1).random(4000) < 0.6).astype(float)
    mean = outcomes.mean()
    half = 1.959964 * np.sqrt(mean * (1 - mean) / 4000)
    interval = evaluate.bootstrap(outcomes[:, None], np.arange(4000), 4000, 0)[0]
    assert interval == pytest.approx([mean - half, mean + half], abs=0.06 * half)
    # four equal samples of 1000 prompts tell no more than one of each: not half as wide
    repeated, prompts = outcomes[:1000].repeat(4), np.arange(1000).repeat(4)
    low, high = evaluate.bootstrap(repeated[:, None], prompts, 4000, 0)[0]
    mean = outcomes[:1000].mean()
    assert (high - low) / 2 == pytest.approx(1.959964 * np.sqrt(mean * (1 - mean) / 1000), rel=0.06)


def test_interval_agrees_with_every_possible_draw():
    prompts = np.array([7, 7, 7, 3, 5, 5, 9])  # ids, with 3, 1, 2 and 1 pairs
    values = np.array([1, 0.5, 1, 0, 0.5, 1, 0.5])
    exact = []
    for draw in itertools.product(sorted(set(prompts.tolist())), repeat=4):
        drawn = np.concatenate([values[prompts == prompt] for prompt in draw])
        exact.append(drawn.mean())
    expected = np.percentile(exact, [2.5, 97.5])
    for wrong in (-0.3, 0.3):  # the resampling's own error does not move them
        assert np.percentile(exact, [2.5 + wrong, 97.5 + wrong]) == pytest.approx(expected)
    assert evaluate.bootstrap(values[:, None], prompts, 20000, 0)[0] == pytest.approx(expected, abs=1e-9)


def test_interval_covers_the_truth():
    rng, covered = np.random.default_rng(2), 0
    for trial in range(300):  # 60 prompts, 4 samples each; a prompt's rate is 0.1 or 0.9, the true mean 0.5
        rate = rng.choice([0.1, 0.9], size=60).repeat(4)
        outcomes = (rng.random(240) < rate).astype(float)
        low, high = evaluate.bootstrap(outcomes[:, None], np.arange(60).repeat(4), 300, trial)[0]
        covered += low <= 0.5 <= high
    assert 0.91 < covered / 300 < 0.98  # about 0.94; 0.76 if samples were drawn one by one


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
    for name in ("win_rate", "win_rate_interval", "reward_difference_interval"):
        assert pooled[name] == pytest.approx(one[name])


# the chat model

class Judge:
    """A server of OpenAI's chat completions: decide(a, b) gives an answer; `statuses` are sent first."""

    def __init__(self, decide, statuses=()):
        self.decide, self.statuses, self.prompts = decide, list(statuses), []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = asked["messages"][-1]["content"]
                assert self.path == "/v1/chat/completions" and asked["model"] == "toy-judge"
                status = outer.statuses.pop(0) if outer.statuses else 200
                outer.prompts.append(prompt)
                pattern = "<response_{0}>\n(.*)\n</response_{0}>"
                shown = [re.search(pattern.format(name), prompt, re.DOTALL)[1] for name in "AB"]
                message = {"role": "assistant", "content": outer.decide(*shown)}
                body = {"id": "1", "object": "chat.completion", "created": 0, "model": "toy-judge",
                        "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
                body = json.dumps(body if status == 200 else {"error": {"message": "no such luck"}}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """judged(judge, rows, *flags) -> what run returns."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")

    def call(judge, rows, *flags):
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{judge.server.server_port}/v1")
        data, _ = write(tmp_path / "g.jsonl", rows)
        return run(tmp_path, "--generations", data, "--judge", "toy-judge", *flags)
    return call


def longer(a, b):
    return f"One is longer.\n**Preferred:** {'A' if len(a) > len(b) else 'B' if len(b) > len(a) else 'tie'}"


LENGTHS = [(5, 2), (1, 3), (4, 2), (3, 3), (2, 1)]  # words, ours and theirs; the fourth pair is equal
PAIRS = [row(name, f"p{k}", " " + "w " * pair[side]) for side, name in enumerate(("us", "them"))
         for k, pair in enumerate(LENGTHS)]


def test_a_judge_that_likes_the_first_gives_ties(judged):
    with Judge(lambda a, b: "Both are fine.\nPreferred: A") as judge:
        figures, _ = judged(judge, PAIRS)
    for pair in (("us", "them"), ("them", "us")):
        assert [figures[*pair, "all", 0.5][k] for k in ("n", "wins", "ties", "losses")] == [5, 0, 5, 0]


def test_judge_is_asked_once_and_a_run_is_resumed(judged, tmp_path):
    with Judge(longer, statuses=[500]) as judge:
        first, held = judged(judge, PAIRS)
        us, them = first["us", "them", "all", 0.5], first["them", "us", "all", 0.5]
        assert (us["wins"], us["ties"], us["losses"], us["win_rate"]) == (3, 1, 1, 0.7)
        assert (them["wins"], them["ties"], them["losses"]) == (1, 1, 3) and "reward_difference" not in us
        assert held["left_out"] == []
        assert len(judge.prompts) == 2 * 4 + 1  # two orders of four pairs, shared by both directions; one 500
        assert len(set(judge.prompts)) == 8
        assert judged(judge, PAIRS)[0] == first and len(judge.prompts) == 9
        cache = tmp_path / "out/verdicts.jsonl"
        cache.write_bytes(cache.read_bytes()[:-20])  # cut off in the midst of an answer
        assert judged(judge, PAIRS)[0] == first and len(judge.prompts) == 10
        assert judged(judge, PAIRS)[0] == first and len(judge.prompts) == 10


def test_a_killed_run_keeps_its_answers(judged, tmp_path):
    answered, held_up = itertools.count(1), threading.Event()

    def decide(a, b):
        if next(answered) > 3:
            held_up.wait(30)
        return longer(a, b)
    with Judge(decide) as judge:
        data, _ = write(tmp_path / "g.jsonl", PAIRS)
        command = [sys.executable, os.path.join(ROOT, "evaluate.py"), "--generations", data,
                   "--judge", "toy-judge", "--out", str(tmp_path / "out")]
        environment = {**os.environ, "OPENAI_BASE_URL": f"http://127.0.0.1:{judge.server.server_port}/v1"}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        cache, end = tmp_path / "out/verdicts.jsonl", time.time() + 30
        while time.time() < end and not (cache.exists() and cache.read_text().count("\n") == 3):
            time.sleep(0.05)
        process.kill()
        process.wait()
        held_up.set()
        before = len(judge.prompts)
        figures, _ = judged(judge, PAIRS)
        assert figures["us", "them", "all", 0.5]["win_rate"] == 0.7 and len(judge.prompts) == before + 5


def test_answers_without_a_verdict_are_left_out(judged):
    def decide(a, b):
        return "I cannot say; Preferred: A or B" if a == "w w w w w" else longer(a, b)
    with Judge(decide) as judge:  # one order of the first pair
        figures, held = judged(judge, PAIRS, "--against", "them")
        assert [figures["us", "them", "all", 0.5][k] for k in ("n", "wins", "ties", "losses")] == [4, 2, 1, 1]
        assert held["left_out"] == ["us against them: 1 pairs are left out: no verdict"]
        assert len(judge.prompts) == 8
        judged(judge, PAIRS, "--against", "them")
        assert len(judge.prompts) == 8  # it's paid for, too


def test_a_request_that_fails_for_good_is_left_out_and_asked_again(judged):
    with Judge(longer, statuses=[400]) as judge:  # one the client doesn't repeat
        figures, held = judged(judge, PAIRS, "--against", "them")
        assert figures["us", "them", "all", 0.5]["n"] == 4 and len(judge.prompts) == 8
        figures, _ = judged(judge, PAIRS, "--against", "them")
        assert figures["us", "them", "all", 0.5]["n"] == 5 and len(judge.prompts) == 9


def test_refused_requests_do_not_stop_a_judge_that_answers(judged):
    many = [row(name, f"p{k}", name * k) for name in ("us", "them") for k in range(1, 13)]
    with Judge(longer) as judge:
        judged(judge, PAIRS, "--against", "them")
    with Judge(longer, statuses=[400] * 24) as judge:  # a content filter's, say; all that is left to ask
        figures, held = judged(judge, PAIRS + many, "--against", "them")
    assert figures["us", "them", "all", 0.5]["n"] == 5
    assert held["left_out"] == ["us against them: 12 pairs are left out: no verdict"]


def test_empty_answers_are_asked_again(judged):
    with Judge(lambda a, b: "") as judge, pytest.raises(SystemExit):
        judged(judge, PAIRS, "--against", "them")
    with Judge(longer) as judge:
        assert judged(judge, PAIRS, "--against", "them")[0]["us", "them", "all", 0.5]["n"] == 5


@pytest.mark.parametrize("first, second, outcome", [
    ("_Preferred: A_", "Preferred: B", "wins"), ("**Preferred: response_A**", "Preferred: B", "wins"),
    ("preferred - A.", "Preferred: B", "wins"), ("Hm.\nPreferred: A", "Hm.\nPreferred: tie", "ties")])
def test_verdicts_in_other_dress_and_of_both_orders(judged, first, second, outcome):
    with Judge(lambda a, b: first if a == "good" else second) as judge:
        figures, _ = judged(judge, [row("us", "p", "good"), row("them", "p", "bad")])
    assert figures["us", "them", "all", 0.5][outcome] == 1


def test_judge_sees_the_reference_unless_it_is_the_opponent(judged):
    prompt = [{"role": "user", "content": "Why {so}?"}]
    rows = [row(name, prompt, name, reference=" human words") for name in ("us", "them")]
    with Judge(longer) as judge:
        judged(judge, rows, "--against", "them", "reference")
    for prompt in judge.prompts:
        assert "<prompt>\nuser: Why {so}?\n</prompt>" in prompt
        against_reference = "<response_A>\nhuman words" in prompt or "<response_B>\nhuman words" in prompt
        assert ("<reference>\nhuman words\n</reference>" in prompt) == (not against_reference)
    assert len(judge.prompts) == 6  # us : them, us : reference, them : reference


def test_a_judge_out_of_reach(judged, capsys, tmp_path, monkeypatch):
    many = [row(name, f"p{k}", name) for name in ("us", "them") for k in range(30)]
    with Judge(longer, statuses=[401] * 100) as judge:
        with pytest.raises(SystemExit) as exit_:
            judged(judge, many)
        message = capsys.readouterr().err.splitlines()[-1]
        assert exit_.value.code == 2 and "no such luck" in message
        assert message.startswith("error: --judge toy-judge:")
        assert 10 <= len(judge.prompts) < 20  # it gives up, not asking all 60
    monkeypatch.delenv("OPENAI_API_KEY")
    flags = ["--generations", tmp_path / "g.jsonl", "--judge", "other"]
    assert "OPENAI_API_KEY" in refused(capsys, tmp_path, *flags)


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
    figure = evaluate.plot_by_temperature(held["comparisons"], "advantage", "label", 0)
    assert [axis.get_title() for axis in figure.axes] == [
        f"against {opponent}\nset {k}" for k in (0, 1) for opponent in ("base", "them")]
    axis = figure.axes[2]  # against base, set 1
    drawn = {container.lines[0].get_ydata()[1] for container in axis.containers}
    assert drawn == {figures[policy, "base", "set 1", 0.9]["advantage"] for policy in ("us", "them")}


def test_curves(tmp_path, capsys):
    (tmp_path / "drdo").mkdir()
    log = [{"step": 5, "loss": 1.0, "rewards/accuracies": 0.5, "logps/chosen": -9.0},
           {"step": 10, "rewards/accuracies": 0.75, "logps/chosen": -8.0},
           {"step": 10, "eval_loss": 1.0, "eval_rewards/accuracies": 0.625}]
    (tmp_path / "drdo/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    evaluate.main(["--curves", str(tmp_path / "drdo"), "--out", str(tmp_path / "out")])
    assert matplotlib.image.imread(tmp_path / "out/curves.png").ndim == 3
    accuracy, margins, chosen, rejected = evaluate.plot_curves([str(tmp_path / "drdo")]).axes
    assert [line.get_xydata().tolist() for line in accuracy.lines] == [[[5, 0.5], [10, 0.75]], [[10, 0.625]]]
    assert [line.get_xydata().tolist() for line in chosen.lines] == [[[5, -9.0], [10, -8.0]]]
    assert not margins.lines and not rejected.lines
    (tmp_path / "drdo/log.jsonl").write_text('{"step": 5, "loss": 1.0}\n')
    with pytest.raises(SystemExit):
        evaluate.main(["--curves", str(tmp_path / "drdo"), "--out", str(tmp_path / "none")])
    assert "drdo/log.jsonl: no line has `step`" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


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
    assert "NaN" in message(response=torch.full((1, 4), NAN))
    assert "--against nobody: no such `generator`; there are us, them" in message(["--against", "nobody"])
    assert "no two responses" in message(["--against", "reference"])
    other, other_rewards = write(tmp_path / "h.jsonl", [row("base", "p1")], [[1.0]], oracles=("other",))
    torch.save(good, rewards)
    flags = ["--generations", data, other, "--rewards", rewards]
    for few in (flags, flags[:3]):  # one file named, or one rewards.pt for both files of a folder
        assert "2 --generations need a file each" in refused(capsys, tmp_path, *few)
    assert "['other']" in refused(capsys, tmp_path, *flags, other_rewards)
    swapped = refused(capsys, tmp_path, "--generations", other, data, "--rewards", rewards, other_rewards)
    assert "same order" in swapped and "precompute_rewards.py" not in swapped  # its --out would overwrite the other's
    (tmp_path / "nan.py").write_text("def nan(row):\n    return float('nan')\n")
    silent = refused(capsys, tmp_path, "--generations", data, "--reward_fn", f"{tmp_path}/nan.py:nan")
    assert "--reward_fn" in silent and "--max_length" not in silent
    assert "named twice" in refused(capsys, tmp_path, "--generations", data, data)
    with_reference, _ = write(tmp_path / "r.jsonl", [row("us", "p", reference="x")], [[1.0]])
    assert "no `reference` rewards" in refused(capsys, tmp_path, "--generations", with_reference, "--rewards",
                                               tmp_path / "r.pt", "--against", "reference")


@pytest.mark.parametrize("flags, line, expected", [
    ([], None, "give --generations"),
    (["--generations", "absent.jsonl"], None, "absent.jsonl: cannot read it"),
    (["--generations", "g.jsonl"], row("us", "p", temperature="hot"), "g.jsonl, line 1: no `temperature`"),
    (["--generations", "g.jsonl", "--group_by", "set"], row("us", "p"), "--group_by set: g.jsonl, line 1"),
    (["--generations", "g.jsonl"], row("us", ["p"]), "g.jsonl, line 1: TypeError"),
    (["--generations", "g.jsonl", "--judge", "m", "--reward_fn", "f"], row("us", "p"), "not allowed with"),
])
def test_bad_input_is_one_line(tmp_path, flags, line, expected):
    if line:
        write(tmp_path / "g.jsonl", [line])
    command = [sys.executable, os.path.join(ROOT, "evaluate.py"), *flags]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1 and expected in done.stderr.splitlines()[-1]
