"""evaluate.py --judge: prompts, verdicts, the cache, and servers that fail."""
import numpy as np
import pytest
from conftest import Judge
from test_evaluate import counts, drawn, evaluate, row, run, write  # noqa: F401

KEY = "sk-secret-0123456789"


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """judged(judge, rows, *flags) -> what run returns."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0)

    def call(judge, rows, *flags, read="--generations"):
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{judge.server.server_port}/v1")
        return run(tmp_path, read, write(tmp_path, rows), "--judge", "toy-judge", *flags)
    return call


def longer(a, b):
    return f"One is longer.\n**Preferred:** {'A' if len(a) > len(b) else 'B' if len(b) > len(a) else 'tie'}"


LENGTHS = [(5, 2), (1, 3), (4, 2), (3, 3), (2, 1)]  # words, ours and theirs; the fourth pair is equal
PAIRS = [row(name, f"p{k}", " " + "w " * pair[side]) for side, name in enumerate(("us", "them"))
         for k, pair in enumerate(LENGTHS)]
MANY = [row(name, f"q{k}", name * k) for name in ("us", "them") for k in range(1, 13)]  # 24 requests
THEM = "--against", "them"
KEPT = "us", "them", "all", 0.5


# ---- verdicts

@pytest.mark.parametrize("answer, expected", [
    ("Preferred: A", 1), ("_Preferred: B_", 0), ("preferred - tie.", 0.5), ("**Preferred: response_A**", 1),
    ("Preferred: Summary B", 0), ("Hm.\n**Preferred:**\nA", 1), ("Preferred: A\nSo:\nPreferred: A", 1),
    ("Preferred: A\nPreferred: B", None), ("Preferred: A or B", None), ("B", None), ("", None), (None, None)])
def test_a_verdict_is_read_in_any_dress_unless_it_says_two_things(answer, expected):
    assert np.isnan(evaluate.verdict(answer)) if expected is None else evaluate.verdict(answer) == expected


@pytest.mark.parametrize("ours_first, theirs_first, outcome, flip, first", [
    ("A", "B", 1, 0, 0.5), ("B", "A", 0, 0, 0.5), ("A", "A", 0.5, 1, 1), ("B", "B", 0.5, 1, 0),
    ("A", "tie", 0.5, 1, 0.75), ("tie", "A", 0.5, 1, 0.75), ("tie", "tie", 0.5, 0, 0.5)])
def test_a_win_is_preferred_in_both_orders(judged, ours_first, theirs_first, outcome, flip, first):
    with Judge(lambda a, b: f"Preferred: {ours_first if a == 'ours' else theirs_first}") as judge:
        figures, _ = judged(judge, [row("us", "p", "ours"), row("them", "p", "theirs")], *THEM)
    figures = figures[KEPT]
    assert (figures["win_rate"], figures["flip"], figures["first"]) == (outcome, flip, first)


def test_equal_responses_tie_unasked_and_have_no_flip(judged, tmp_path, drawn):  # noqa: F811
    with Judge(lambda a, b: "Preferred: A" if len(a + b) > 9 else longer(a, b)) as judge:
        figures, held = judged(judge, PAIRS)
    us = figures[KEPT]
    assert us["n"] == 5 and counts(us) == (1, 3, 1)  # of 5 : 2 and 4 : 2 words it likes the first
    assert counts(figures["them", "us", "all", 0.5]) == (1, 3, 1) and "reward_difference" not in us
    assert us["flip"] == 2 / 4 and us["first"] == (2 * 1 + 2 * 0.5) / 4
    assert len(judge.prompts) == len(set(judge.prompts)) == 8  # two orders of four pairs, for both directions
    assert held["notes"] == [] and list(drawn) == ["win_rates.png"]
    assert "- judge: toy-judge, instruction prompt; 5 prompts" in (tmp_path / "out/evaluation.md").read_text()


def test_the_win_rate_without_ties_stands_beside_it_where_there_are_ties(judged, tmp_path):
    decided = PAIRS[:3] + PAIRS[5:8]
    for rows, expected in (PAIRS, ((3, 1, 1), 3.5 / 5, 3 / 4)), (decided, ((2, 0, 1), 2 / 3, None)):
        with Judge(longer) as judge:
            us = judged(judge, rows, *THEM)[0][KEPT]
        assert (counts(us), us["win_rate"], us["decided_win_rate"]) == expected
        table = (tmp_path / "out/evaluation.md").read_text()
        assert ("             win rate | W/(W+L) |" in table and "] |   0.750 |" in table) == (rows is PAIRS)
        assert "| flips | first |" in table


# ---- what is asked

def test_a_summary_is_judged_beside_the_reference_and_an_instruction_is_not(judged):
    prompt = [{"role": "user", "content": "Why {so}?"}]
    rows = [row(name, prompt, f" {name}\n", reference=" human words") for name in ("us", "them")]
    with Judge(longer) as judge:
        judged(judge, rows, "--against", "them", "reference", "--judge_prompt", "summary")
    assert len(judge.prompts) == 6  # us : them, us : reference, them : reference
    for text in judge.prompts:
        against_reference = "<response_A>\nhuman words" in text or "<response_B>\nhuman words" in text
        assert "<prompt>\nWhy {so}?\n</prompt>" in text and "conciseness" in text
        assert ("<reference>\nhuman words\n</reference>" in text) == (not against_reference)
    with Judge(longer) as judge:
        judged(judge, rows, *THEM)  # AlpacaEval's references are another model's
    shown = {text.split("<response_A>")[1] for text in judge.prompts}
    assert len(judge.prompts) == 2 and all(text.startswith(("\nus\n</r", "\nthem\n</r")) for text in shown)
    for text in judge.prompts:
        assert "helpfulness" in text and "concise" not in text and "human words" not in text


def test_a_judge_is_checked_against_labels(judged):
    """It prefers the longer response, but the first where the lengths are near."""
    pairs = [("w " * 9, "v"), ("w " * 9, "v"), ("w", "v " * 9), ("w w", "v")]
    rows = [{"prompt": f"p{k}", "chosen": chosen, "rejected": rejected}
            for k, (chosen, rejected) in enumerate(pairs)]
    with Judge(lambda a, b: "Preferred: A" if abs(len(a) - len(b)) < 5 else longer(a, b)) as judge:
        figures, _ = judged(judge, rows, read="--judge_check")
    accuracies = {key[2]: (record["n"], record["win_rate"]) for key, record in figures.items()}
    assert accuracies == {"all": (4, 2.5 / 4), "chosen longer": (3, 2.5 / 3), "chosen shorter": (1, 0)}
    everything = figures["chosen", "rejected", "all", "-"]
    assert (everything["flip"], everything["first"]) == (0.25, (3 * 0.5 + 1) / 4)


# ---- answers are kept

def test_answers_are_kept_for_each_model_and_temperature(judged):
    with Judge(longer) as judge:
        first, _ = judged(judge, PAIRS, *THEM)
        assert judged(judge, PAIRS, *THEM)[0] == first and len(judge.prompts) == 8
        judge.decide = lambda a, b: "Preferred: A"
        other, _ = judged(judge, PAIRS, *THEM, "--judge", "other")
        judged(judge, PAIRS, *THEM, "--judge_temperature", "0")
        assert counts(first[KEPT]) == (3, 1, 1) and counts(other[KEPT]) == (0, 5, 0)
        assert judged(judge, PAIRS, *THEM)[0] == first and len(judge.prompts) == 24
    assert all(asked.keys() == {"model", "messages"} for asked in judge.asked[:16])  # no sampling parameter
    assert [asked["model"] for asked in judge.asked] == ["toy-judge"] * 8 + ["other"] * 8 + ["toy-judge"] * 8
    assert [asked.get("temperature") for asked in judge.asked] == [None] * 16 + [0] * 8


def test_answers_are_on_disk_as_they_come_and_one_that_was_cut_off_is_asked_again(judged, tmp_path):
    cache = tmp_path / "out/verdicts.jsonl"
    kept = []

    def decide(a, b):
        kept.append(cache.read_text().count("\n"))
        return longer(a, b)
    with Judge(decide, statuses=[500]) as judge:
        first, _ = judged(judge, PAIRS)
        assert len(judge.prompts) == 2 * 4 + 1  # and one 500
        assert 0 < max(kept) < 8
        cache.write_bytes(cache.read_bytes()[:-20])
        for _ in range(2):
            assert judged(judge, PAIRS)[0] == first and len(judge.prompts) == 10


# ---- answers that are missing

@pytest.mark.parametrize("rows, decide, statuses, failed, lost, reason", [
    (PAIRS, lambda a, b: "A or B" if a == "w w w w w" else longer(a, b), [], 1, 1, "it said 'A or B'"),
    (MANY, longer, [400], 1, 1, "Error code: 400"),  # the client repeats neither 400 nor 404
    (MANY, longer, [404, 404, 404, 200, 200, 200] * 4, 12, None, "Error code: 404")])
def test_failures_among_answers_are_left_out_counted_and_asked_again(
        judged, rows, decide, statuses, failed, lost, reason):
    with Judge(decide, statuses) as judge:
        figures, held = judged(judge, rows, *THEM)
        asked = len(judge.prompts)
        n = len(rows) // 2
        assert figures[KEPT]["n"] == n - lost if lost else figures[KEPT]["n"] < n
        assert held["notes"][0].startswith(
            f"{failed} of {asked} requests gave no verdict (the last: {reason}")
        assert "are left out: no verdict" in held["notes"][1]
        judge.decide = longer
        figures, held = judged(judge, rows, *THEM)
        assert figures[KEPT]["n"] == n and held["notes"] == [] and len(judge.prompts) == asked + failed


def test_refused_requests_do_not_stop_a_judge_that_answers(judged):
    with Judge(longer) as judge:
        judged(judge, PAIRS, *THEM)
    with Judge(longer, statuses=[400] * 24) as judge:  # a content filter's, say; all that is left to ask
        figures, held = judged(judge, PAIRS + MANY, *THEM)
    assert figures[KEPT]["n"] == 5
    assert held["notes"][0] == ("24 of 32 requests gave no verdict (the last: Error code: 400 - no such "
                                "luck, Bearer [key]); the next run asks them again")


@pytest.mark.parametrize("decide, statuses, body, failed", [
    (lambda a, b: "Hm.", [], None, "24 requests gave no verdict, the last 0 no answer"),
    *[(longer, statuses, body, "10 requests gave no verdict, the last 10 no answer") for statuses, body in (
        ([429] * 999, None), ([400] * 999, None), ([], b"<html>It works!</html>"), ([], b"[1, 2]"),
        ([], b'{"error": {"message": "Bearer sk-secret-0123456789 is wrong"}}'), ([], b'{"id": "1", "choi'),
        ([], b'{"id": "1", "choices": [{"index": 0, "message": null}]}'),
        ([], b'{"id": "1", "choices": [{"index": 0, "message": {"role": "assistant", "content": ""}}]}'))]])
def test_a_failing_server_ends_the_run_without_the_key(
        judged, capsys, tmp_path, decide, statuses, body, failed):
    with Judge(decide, statuses, body) as judge, pytest.raises(SystemExit) as exit_:
        judged(judge, MANY)
    output = capsys.readouterr()
    assert exit_.value.code == 2 and failed in output.err.splitlines()[-1]
    assert KEY not in output.out + output.err and "Traceback" not in output.err
    assert f"toy-judge at http://127.0.0.1:{judge.server.server_port}/v1/: 24 requests" in output.out
    assert not (tmp_path / "out/evaluation.json").exists()
    assert (tmp_path / "out/verdicts.jsonl").read_text() == ""  # so the next run asks all of it again
    assert 10 <= len(judge.prompts) < 4 * 20  # it gives up; a request has up to 4 attempts
