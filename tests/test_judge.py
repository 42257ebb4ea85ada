"""evaluate.py --judge: prompts, verdicts, the cache, and servers that fail."""
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time

import pytest
from conftest import Judge
from test_evaluate import ROOT, evaluate, row, run, write


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(evaluate.Figure, "savefig", lambda figure, path, **_: open(path, "w").close())


KEY = "sk-secret-0123456789"


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """judged(judge, rows, *flags) -> what run returns."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

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
        assert held["notes"] == [] and (us["flip"], us["first"]) == (0, 0.5)
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


def test_answers_without_a_verdict_are_counted_and_asked_again(judged, tmp_path):
    def decide(a, b):
        return "I cannot say; Preferred: A or B" if a == "w w w w w" else longer(a, b)
    with Judge(decide) as judge:  # one order of the first pair
        figures, held = judged(judge, PAIRS, "--against", "them")
        assert [figures["us", "them", "all", 0.5][k] for k in ("n", "wins", "ties", "losses")] == [4, 2, 1, 1]
        assert held["notes"] == [
            "0 of 8 requests got no answer (), 1 an answer without a verdict "
            "('I cannot say; Preferred: A or B'); the next run asks them again",
            "us against them: 1 pairs are left out: no verdict"]
        assert len(judge.prompts) == 8 and "cannot" not in (tmp_path / "out/verdicts.jsonl").read_text()
        judge.decide = longer
        figures, held = judged(judge, PAIRS, "--against", "them")
        assert figures["us", "them", "all", 0.5]["n"] == 5 and held["notes"] == [] and len(judge.prompts) == 9


def test_an_answer_that_says_two_things_is_no_verdict():
    assert evaluate.verdict("Preferred: A\nOn reflection:\nPreferred: A") == 1
    for answer in ("Preferred: A\nPreferred: B\nPreferred: tie", "Preferred: A or B", "B", "", None):
        assert evaluate.verdict(answer) != evaluate.verdict(answer)  # NaN


def test_a_judge_without_any_verdict(judged, capsys):
    different = [line for line in PAIRS if line["prompt"] != "p3"]
    with Judge(lambda a, b: "Hm.") as judge, pytest.raises(SystemExit) as exit_:
        judged(judge, different, "--against", "them")
    line = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 2 and "no pair is judged" in line
    assert "8 an answer without a verdict ('Hm.')" in line


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
    assert held["notes"] == [
        "24 of 32 requests got no answer (Error code: 400 - no such luck, Bearer [key]), 0 an answer without "
        "a verdict (''); the next run asks them again", "us against them: 12 pairs are left out: no verdict"]


def test_empty_answers_are_asked_again(judged):
    with Judge(lambda a, b: "") as judge, pytest.raises(SystemExit):
        judged(judge, PAIRS, "--against", "them")
    with Judge(longer) as judge:
        assert judged(judge, PAIRS, "--against", "them")[0]["us", "them", "all", 0.5]["n"] == 5


@pytest.mark.parametrize("first, second, outcome", [
    ("_Preferred: A_", "Preferred: B", "wins"), ("**Preferred: response_A**", "Preferred: B", "wins"),
    ("preferred - A.", "Preferred: B", "wins"), ("Hm.\nPreferred: A", "Hm.\nPreferred: tie", "ties"),
    ("Preferred: Summary A", "**Preferred:**\nB", "wins")])
def test_verdicts_in_other_dress_and_of_both_orders(judged, first, second, outcome):
    with Judge(lambda a, b: first if a == "good" else second) as judge:
        figures, _ = judged(judge, [row("us", "p", "good"), row("them", "p", "bad")])
    assert figures["us", "them", "all", 0.5][outcome] == 1


def test_a_summary_is_judged_beside_the_reference_and_an_instruction_is_not(judged):
    prompt = [{"role": "user", "content": "Why {so}?"}]
    rows = [row(name, prompt, name, reference=" human words") for name in ("us", "them")]
    with Judge(longer) as judge:
        judged(judge, rows, "--against", "them", "reference", "--judge_prompt", "summary")
    for prompt in judge.prompts:
        assert "<prompt>\nWhy {so}?\n</prompt>" in prompt and "conciseness" in prompt
        against_reference = "<response_A>\nhuman words" in prompt or "<response_B>\nhuman words" in prompt
        assert ("<reference>\nhuman words\n</reference>" in prompt) == (not against_reference)
    assert len(judge.prompts) == 6  # us : them, us : reference, them : reference
    with Judge(longer) as judge:
        judged(judge, rows, "--against", "them")  # AlpacaEval's references are another model's
    assert len(judge.prompts) == 2
    for prompt in judge.prompts:
        assert "helpfulness" in prompt and "concise" not in prompt and "human words" not in prompt


def test_flips_with_the_order_are_counted(judged, tmp_path):
    """The judge prefers the first of two long responses, and else the longer one."""
    rows = [row(name, f"p{k}", "w " * 9 + name[-2:]) for name in ("us", "them") for k in range(3)]
    rows += [row("us", "p3", "a b c"), row("us", "p4", "d"), row("them", "p3", "a"), row("them", "p4", "d")]
    with Judge(lambda a, b: "Preferred: A" if len(a) > 9 else longer(a, b)) as judge:
        figures, _ = judged(judge, rows, "--against", "them")
    figures = figures["us", "them", "all", 0.5]
    assert (figures["wins"], figures["ties"], figures["n"]) == (1, 4, 5)
    assert figures["flip"] == 3 / 4  # the equal pair was not asked
    assert figures["first"] == pytest.approx((3 * 1 + 0.5) / 4)
    table = (tmp_path / "out/evaluation.md").read_text()
    assert re.search(r"flips \| first .*\n.*\n.* 0\.75 \| +0\.88 ", table)


def test_no_sampling_parameter_is_sent_unasked(judged):
    with Judge(longer) as judge:
        judged(judge, PAIRS, "--against", "them")
        assert all(asked.keys() == {"model", "messages"} for asked in judge.asked)
        assert {asked["model"] for asked in judge.asked} == {"toy-judge"}
        judged(judge, PAIRS, "--against", "them", "--judge_temperature", "0")  # other verdicts: asked anew
    assert [asked.get("temperature") for asked in judge.asked] == [None] * 8 + [0] * 8


def test_a_judge_is_checked_against_labels(judged, tmp_path):
    """It prefers the longer response, but the first where the lengths are near."""
    pairs = [("w " * 9, "v"), ("w " * 9, "v"), ("w", "v " * 9), ("w w", "v")]
    (tmp_path / "pairs.jsonl").write_text("".join(
        json.dumps({"prompt": f"p{k}", "chosen": chosen, "rejected": rejected}) + "\n"
        for k, (chosen, rejected) in enumerate(pairs)))

    def decide(a, b):
        return "Preferred: A" if abs(len(a) - len(b)) < 5 else longer(a, b)
    with Judge(decide) as judge:
        judged(judge, PAIRS)  # sets the server's address
        figures, _ = run(tmp_path, "--judge_check", tmp_path / "pairs.jsonl", "--judge", "toy-judge")
    figures = {group: r for (_, _, group, _), r in figures.items()}
    assert (figures["all"]["n"], figures["all"]["win_rate"]) == (4, 2.5 / 4)
    assert (figures["chosen longer"]["n"], figures["chosen longer"]["win_rate"]) == (3, 2.5 / 3)
    assert (figures["chosen shorter"]["n"], figures["chosen shorter"]["win_rate"]) == (1, 0)
    assert (figures["all"]["flip"], figures["all"]["first"]) == (0.25, (3 * 0.5 + 1) / 4)


# servers that fail

FAILURES = {"429": dict(statuses=[429] * 999), "500": dict(statuses=[500] * 999),
            "401": dict(statuses=[401] * 999),
            "no JSON": dict(body=b"<html>It works!</html>"), "a list": dict(body=b"[1, 2]"),
            "a number": dict(body=b"7"), "no choice": dict(body=b'{"id": "1", "choices": []}'),
            "no choices": dict(body=b'{"error": {"message": "Bearer sk-secret-0123456789 is wrong"}}'),
            "an empty choice": dict(body=b'{"id": "1", "choices": [{"index": 0, "message": null}]}'),
            "half a reply": dict(body=b'{"id": "1", "choi')}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failing_server_ends_the_run_without_the_key(judged, capsys, tmp_path, monkeypatch, failure):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0)
    many = [row(name, f"p{k}", name) for name in ("us", "them") for k in range(30)]
    with Judge(longer, **FAILURES[failure]) as judge, pytest.raises(SystemExit) as exit_:
        judged(judge, many)
    output = capsys.readouterr()
    assert exit_.value.code == 2 and "10 in a row (" in output.err.splitlines()[-1]
    assert output.err.count("error: --judge toy-judge") == 1 and "Traceback" not in output.err
    assert KEY not in output.out + output.err
    assert not (tmp_path / "out/evaluation.json").exists()
    assert (tmp_path / "out/verdicts.jsonl").read_text() == ""  # so the next run asks all of it again
    assert 10 <= len(judge.prompts) < 4 * 20  # it gives up, not asking all 60; a request has up to 4 attempts


def test_a_server_that_hangs_is_reported_and_waited_for(judged, capsys, monkeypatch):
    assert evaluate.PATIENCE < 60
    monkeypatch.setattr(evaluate, "PATIENCE", 0.3)
    begin = time.time()

    def decide(a, b):
        time.sleep(max(0, begin + 1 - time.time()))
        return longer(a, b)
    with Judge(decide) as judge:
        figures, _ = judged(judge, PAIRS, "--against", "them")
    assert figures["us", "them", "all", 0.5]["n"] == 5
    message = f"http://127.0.0.1:{judge.server.server_port}/v1/ has not answered for 0.3 s"
    assert message in capsys.readouterr().err


def test_a_judge_out_of_reach(judged, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0)
    with Judge(longer) as judge:
        pass  # the server is gone
    with pytest.raises(SystemExit):
        judged(judge, PAIRS)
    assert "Connection error" in capsys.readouterr().err.splitlines()[-1]
