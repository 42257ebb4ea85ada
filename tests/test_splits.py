"""What splits.py makes of raw files, compared with rows written by hand and with other computations."""
import contextlib
import csv
import gzip
import hashlib
import io
import json
import os
import random
import resource
import runpy
import statistics
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest

datasets.disable_progress_bars()
SPLITS = os.path.join(os.path.dirname(__file__), os.pardir, "splits.py")
WHOLE = "--validation_fraction", 0  # no row is held out


def run(folder, *flags, status=0):
    """Runs splits.py in `folder`, in this process. Bad input must give one line and touch no file."""
    before = tree(folder)
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
          pytest.MonkeyPatch.context() as patch):
        patch.setattr(sys, "argv", ["splits.py", *map(str, flags)])
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        try:
            runpy.run_path(SPLITS, run_name="__main__")
        except SystemExit as end:
            code = end.code
    assert code == status, err.getvalue()
    if status:
        assert err.getvalue().startswith("error: ") and err.getvalue().count("\n") == 1, err.getvalue()
        assert tree(folder) == before
    return (err if status else out).getvalue()


def tree(folder):
    """{path: bytes} of a folder, without the cache of load_dataset."""
    return {path: path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and folder / "cache" not in path.parents}


def write(path, rows):
    """Writes raw rows in the format that the path's ending names."""
    opened = gzip.open if path.name.endswith(".gz") else open
    if path.name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if ".csv" in path.name:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
        elif path.name.endswith(".json"):
            json.dump(rows, file, indent=1)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def read(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def prompts(folder, *parts):
    """The set of prompts of each of these files."""
    return [{row["prompt"] for row in read(folder / f"data/{part}.jsonl")} for part in parts]


def made(folder, raw, *flags, status=0):
    """(the rows of all/train or sft/train that raw rows become, what is printed)."""
    stdout = run(folder, "--dataset", write(folder / "raw.jsonl", raw), *WHOLE, *flags, status=status)
    paths = [path for path in folder.glob("data/*/train.jsonl") if path.parent.name in ("all", "sft")]
    return (read(*paths) if paths else None), stdout


def rated_pairs(count, prompts):
    """Pairs on `prompts` prompts. Pair i has a confidence and an edit distance that no other pair has."""
    rng = random.Random(count)
    rows = []
    for i, place in enumerate(rng.sample(range(1, count + 1), count)):
        words = [f"w{j}" for j in range(count)]  # without `place` of its words: distance place / (count + 1)
        rows.append({"prompt": f"Ask {rng.randrange(prompts)}?", "chosen": " ".join([*words, "end"]),
                     "rejected": " ".join([*words[place:], "end"]), "confidence": (place + i % 40) / 8,
                     "mine": {"row": i}})
    return rows


def edits(row):
    """The edit distance of one of these, by its lengths."""
    return 1 - len(row["rejected"].split()) / len(row["chosen"].split())


def comparison(number, confidence=5, side="train", texts=(" Good.", "  Bad {}."), **info):
    """A raw row of OpenAI's comparisons about post `number`."""
    post = {"id": f"t3_{side}{number}", "post": f"Post {number} of {side}.\nMore.", "subreddit": "gardens",
            "title": f"Title {number} ", "site": None, "article": None}
    summaries = [{"text": text.format(number), "policy": "ref", "note": None} for text in texts]
    return {"info": post | info, "summaries": summaries[::-1], "choice": 1, "worker": "w", "batch": "batch3",
            "split": side, "extra": {"confidence": confidence}}


def post(number, side="train"):
    """The prompt of comparison `number`."""
    return (f"SUBREDDIT: r/gardens\n\nTITLE: Title {number}\n\nPOST: Post {number} of {side}.\nMore."
            "\n\nTL;DR:")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


GOOD = {"prompt": "Ask?", "chosen": "Yes.", "rejected": "No."}
CALL, RESULT = assistant("CALL search"), {"role": "tool", "content": "20 C"}
BRIEF = {"role": "system", "content": "Be brief."}

# ---- the method


def test_hc_he_is_above_both_medians_of_train_and_lc_le_below_both(tmp_path):
    raw = rated_pairs(400, prompts=90)
    stdout = run(tmp_path, "--dataset", write(tmp_path / "raw.jsonl", raw))
    train = read(tmp_path / "data/all/train.jsonl")
    confidence = statistics.median(row["confidence"] for row in train)
    middle = statistics.median(map(edits, train))
    assert middle != statistics.median(map(edits, raw))
    assert confidence != statistics.median(row["confidence"] for row in raw)
    assert f"medians of all/train: confidence {confidence:g}, edit distance {middle:.4f}\n" in stdout
    for side in "train", "validation":
        rows, *parts = (read(tmp_path / f"data/{part}/{side}.jsonl") for part in ("all", "hc_he", "lc_le"))
        above = [row for row in rows if row["confidence"] > confidence and edits(row) > middle]
        below = [row for row in rows if row["confidence"] < confidence and edits(row) < middle]
        assert parts == [above, below]
        assert min(len(above), len(below), len(rows) - len(above) - len(below)) > 1
    for part in "all", "hc_he", "lc_le":
        rows, held = (read(tmp_path / f"data/{part}/{side}.jsonl") for side in ("train", "validation"))
        means = statistics.fmean(row["confidence"] for row in rows), statistics.fmean(map(edits, rows))
        assert "| {} | {:.2f} | {:.2f} | {} | {} |\n".format(part, *means, len(rows), len(held)) in stdout


@pytest.mark.parametrize("edits, hc_he, lc_le", [
    ([1, 2, 5, 3, 4], {"5"}, {"1", "2"}),  # the median is 3, and the fourth pair is on it
    ([2, 3, 1, 4, 5], {"4", "5"}, {"1"}),
    ([1, 2, 3, 4], {"3", "4"}, {"1", "2"}),
])
def test_a_pair_on_one_of_the_medians_is_in_neither_part(tmp_path, edits, hc_he, lc_le):
    made(tmp_path, [{"prompt": f"{number}", "chosen": "a b c d e f", "rejected": "a b c d e f"[2 * words:],
                     "confidence": number} for number, words in enumerate(edits, 1)])
    assert prompts(tmp_path, "hc_he/train", "lc_le/train") == [hc_he, lc_le]


@pytest.mark.parametrize("chosen, rejected, characters, responses, texts", [
    ("a b c d", "a x c", False, 2 / 4, 2 / 6),  # one substitution, one deletion; the post has two words
    ("a b", "b a", False, 2 / 2, 2 / 4),
    ("one", "two three four", False, 3 / 3, 3 / 5),
    # in scripts without spaces each character is a word
    ("我今天去公园散步看见很多花开了心里非常高兴然后就回家吃了晚饭",
     "我今天去公园散步看见很多树开了心里非常高兴然后就回家吃了晚饭", True, 1 / 30, 1 / 32),
    ("猫が好きです。", "犬が好きです。", True, 1 / 7, 1 / 9),
    ("ฉันชอบแมว", "ฉันชอบหมา", True, 2 / 9, 2 / 11),
    ("好", "好的", True, 1 / 2, 1 / 4),
    ("使用 PyTorch 训练", "使用 JAX 训练", True, 1 / 5, 1 / 7),  # five words, four of them characters
    ("He said 你好 to me", "He said 您好 to me", False, 1 / 5, 1 / 7),  # more words than characters
    ("你好吗", "Hello to you", False, 3 / 3, 3 / 5),
    ("나는 고양이를 좋아해요", "나는 강아지를 좋아해요", False, 1 / 3, 1 / 5),  # Korean has spaces
])
def test_the_edit_distance_is_levenshteins_over_words_by_the_longer_length(tmp_path, chosen, rejected,
                                                                           characters, responses, texts):
    prompt = "SUBREDDIT: r/x\n\nTITLE: Not\n\nPOST: Two words\n\nTL;DR:"
    for flags, expected in ((), responses), (("--edit_distance", "texts"), texts):
        (row,), stdout = made(tmp_path, [{"prompt": prompt, "chosen": chosen, "rejected": rejected}], *flags)
        assert row["edit_distance"] == round(expected, 4)
        assert ("of these 1 without spaces: edit distance by characters" in stdout) == characters


@pytest.mark.parametrize("seed, fraction, judges", [(0, 0.1, 0), (7, 0.1, 0.3), (7, 0.3, 0)])
def test_a_hash_of_the_seed_and_its_text_holds_a_prompt_out_and_another_gives_it_to_the_judge(
        tmp_path, seed, fraction, judges):
    raw = write(tmp_path / "raw.jsonl", rated_pairs(400, prompts=200))
    write(tmp_path / "sft.jsonl", [{"prompt": f"Ask {i}?", "chosen": "yes"} for i in range(200)])
    flags = "--seed", seed, "--validation_fraction", fraction, "--dataset", "raw.jsonl", "sft.jsonl"
    run(tmp_path, *flags, "--judge_fraction", 0.2)  # a call without a judge takes its files away
    stdout = run(tmp_path, *flags, "--judge_fraction", judges)
    every = {row["prompt"] for row in read(raw)}
    digests = {f"Ask {i}?": hashlib.sha256(f"{seed} Ask {i}?".encode()).hexdigest() for i in range(200)}
    held = {prompt for prompt, digest in digests.items() if int(digest[:16], 16) / 16**16 < fraction}
    judge = {prompt for prompt, digest in digests.items() if int(digest[8:16], 16) / 16**8 < judges}
    assert prompts(tmp_path, "all/train", "all/validation", "sft/train", "sft/validation") == [
        every - judge - held, (every & held) - judge, digests.keys() - judge - held, held - judge]
    assert (tmp_path / "data/judge").exists() and bool(list(tmp_path.glob("data/judge/*"))) == bool(judge)
    if judge:
        parts = prompts(tmp_path, "judge/train", "judge/validation")
        assert parts == [every & judge - held, every & judge & held]
        assert f"{len(judge - held)} judge/train, {len(judge & held)} judge/validation\n" in stdout  # of sft


def test_the_seed_gives_the_order_and_the_choice_of_prompts(tmp_path):
    write(tmp_path / "raw.jsonl", rated_pairs(60, prompts=60))
    out = []
    for seed in 0, 0, 1:
        flags = "--num_prompts", 9, "--seed", seed, *WHOLE
        run(tmp_path, "--dataset", "raw.jsonl", "--prompts", "raw.jsonl", *flags)
        out.append([read(tmp_path / f"data/{file}.jsonl") for file in ("all/train", "prompts/raw")])
    (rows, some), again, (others, other) = out
    assert again == [rows, some]
    assert rows != others and sorted(map(str, rows)) == sorted(map(str, others))
    assert [row["mine"]["row"] for row in rows] != sorted(row["mine"]["row"] for row in rows)
    assert len(some) == len(other) == 9 and {row["prompt"] for row in some} - {row["prompt"] for row in other}


def test_a_validation_split_is_all_validation_and_its_prompts_leave_every_train_set(tmp_path):
    raw = [comparison(i, i % 9, texts=(10 * "a ", (9 - i % 9) * "a ")) for i in range(200)]
    raw += [comparison(i, 9, f"valid{1 + i % 2}") for i in range(100)]
    raw.append(comparison(200, post="Post 3 of valid2.\nMore.", title="Title 3"))
    write(tmp_path / "raw.jsonl.gz", raw)
    both = [*map(post, range(200)), *(post(i, f"valid{1 + i % 2}") for i in range(100))]
    # a lone user's message is the same prompt as its text
    write(tmp_path / "sft.jsonl", [{"prompt": [user(prompt)], "chosen": "Yes."} for prompt in both])
    stdout = run(tmp_path, "--dataset", "raw.jsonl.gz", "sft.jsonl")
    train, validation, hc_he, held = prompts(tmp_path, "all/train", "all/validation", "hc_he/train",
                                             "hc_he/validation")
    assert validation == set(both[200:]) and hc_he <= train < set(both[:200])
    assert 160 < len(train) < 195 and set() < held <= set(both[:200]) - train
    assert f"train rows by prompt: {len(train)} train, {200 - len(train)} validation, 1 dropped as" in stdout
    assert {row["prompt"][0]["content"] for row in read(tmp_path / "data/sft/train.jsonl")} == train


def test_all_rows_of_a_conversation_are_on_one_side(tmp_path):
    """A row for each of its three answers, as HH has them; its first turn alone is a text prompt too."""
    raw = []
    for i in range(60):
        turns = [BRIEF, user(f"Talk {i}"), assistant("A"), user(f"More {i}"), assistant("B"), user("End?")]
        raw += [GOOD | {"prompt": turns[i % 2:size]} for size in (2, 4, 6)]
    write(tmp_path / "raw.jsonl", raw)
    write(tmp_path / "sft.jsonl", [{"prompt": f"Talk {i}", "chosen": "Yes."} for i in range(60)])
    run(tmp_path, "--dataset", "raw.jsonl", "sft.jsonl", "--prompts", "raw.jsonl",
        "--validation_fraction", 0.3)
    for side, found in zip(("train", "validation"), prompts(tmp_path, "sft/train", "sft/validation")):
        rows = read(tmp_path / f"data/all/{side}.jsonl")
        assert {turn["content"] for row in rows for turn in row["prompt"][:2]} - {"Be brief.", "A"} == found
        assert len(rows) == 3 * len(found) and len(found) > 9
    assert len(read(tmp_path / "data/prompts/raw.jsonl")) == 180  # a prompt set has all of them


@pytest.mark.parametrize("seed", [0, 1, 7])  # 7: of the SFT prompts the least is one of the pairs
def test_of_a_tiny_set_one_prompt_is_held_out_and_leaves_every_train_set(tmp_path, seed):
    write(tmp_path / "pairs.jsonl", [GOOD | {"prompt": f"{i}"} for i in range(9)])
    write(tmp_path / "sft.jsonl", [{"prompt": f"{i}", "chosen": "yes"} for i in range(5, 20)])
    run(tmp_path, "--dataset", "pairs.jsonl", "sft.jsonl", "--validation_fraction", 1e-9, "--seed", seed,
        "--judge_fraction", 0.5)
    parts = [f"{part}/{side}" for part in ("all", "judge", "sft") for side in ("train", "validation")]
    train, held, to_judge, judge_held, sft, sft_held = prompts(tmp_path, *parts)
    assert len(held) == len(judge_held) == 1 and len(sft_held) in (1, 2) and train and to_judge and sft
    judge = to_judge | judge_held
    assert judge | train | held == {f"{i}" for i in range(9)} and not judge & (train | held | sft | sft_held)
    assert not (train | sft) & (held | sft_held) and not to_judge & judge_held


def test_the_prompt_held_out_of_a_tiny_set_is_none_of_its_validation_split(tmp_path):
    write(tmp_path / "raw.jsonl", [*map(comparison, range(3)), comparison(0) | {"split": "valid1"}])
    for seed in 6, 10, 11:  # of which the hash of its prompt is the least
        stdout = run(tmp_path, "--dataset", "raw.jsonl", "--validation_fraction", 1e-9, "--seed", seed)
        assert "train rows by prompt: 1 train, 1 validation, 1 dropped" in stdout


def test_train_pairs_without_a_confidence_leave_a_set_that_has_some(tmp_path):
    raw = [comparison(i, i % 9 or (None if i % 2 else float("nan"))) for i in range(90)]
    raw += [comparison(i, i or None, "valid1") for i in range(5)]
    stdout = run(tmp_path, "--dataset", write(tmp_path / "raw.jsonl", raw))
    assert "without a confidence, left out: 10 train rows" in stdout
    train = read(tmp_path / "data/all/train.jsonl")
    assert 60 < len(train) < 80 and all(row["confidence"] for row in train)
    assert prompts(tmp_path, "all/validation") == [{post(i, "valid1") for i in range(5)}]


def test_a_set_without_a_part_writes_no_file_and_removes_that_of_an_earlier_call(tmp_path):
    raw = rated_pairs(60, prompts=20)
    for change in {"confidence": 5}, {"confidence": None}:
        run(tmp_path, "--dataset", write(tmp_path / "raw.jsonl", raw))
        assert (tmp_path / "data/hc_he/train.jsonl").exists()
        stdout = run(tmp_path, "--dataset", write(tmp_path / "flat.jsonl", [row | change for row in raw]))
        assert "hc_he stays empty" in stdout and "| hc_he | - | - | 0 | 0 |" in stdout
        assert "data/hc_he/train.jsonl: no rows; removed the file of an earlier call" in stdout
        assert sorted(path.parent.name for path in tree(tmp_path / "data")) == ["all", "all"]


# ---- raw rows

ARTICLE = "Summarize this news article clearly and concisely. Use TL;DR in your response:"
LABEL = "SUBREDDIT: r/gardens\nTITLE: Title 1\nPOST: Post 1 of train.\nMore.\nTL;DR: "
HUMAN = "\n\nHuman: Hello\n\nthere?\n\nAssistant: Hi.\n\nHuman: Tea?\n\nAssistant:"
TALK = [user("Hello\n\nthere?"), assistant("Hi."), user("Tea?")]
SUMMARIES = {"prompt": post(1), "chosen": " Good.", "rejected": " Bad 1.", "confidence": 5,
             "edit_distance": 1.0, "id": "t3_train1", "batch": "batch3"}
RATED = {"confidence": 1.5, "edit_distance": 0.5}
YES, NO = [user("Ask?"), assistant("Yes, b.")], [user("Ask?"), assistant("No b.")]
PAIR = {"prompt": "Ask?", "chosen": "Yes, b.", "rejected": "No b."}
SPACED = {"prompt": "Ask?", "chosen": " Yes, b.", "rejected": " No b."}
CHAT = PAIR | {"prompt": YES[:1]}
SCHEMAS = [
    (comparison(1), SUMMARIES),
    (comparison(1, title=None), SUMMARIES | {"prompt": post(1).replace("Title 1", "")}),
    (comparison(1, post=None, article="News.\n"),
     SUMMARIES | {"prompt": f"{ARTICLE}\n\nTITLE: Title 1\n\nNews."}),
    ({"chosen": YES, "rejected": NO, "who": 1}, CHAT | {"who": 1, "edit_distance": 0.5}),
    ({"chosen": HUMAN + " Yes,\n\nplease. ", "rejected": HUMAN + " No."},
     {"prompt": TALK, "chosen": "Yes,\n\nplease.", "rejected": "No.", "edit_distance": 1.0}),
    (PAIR | {"confidence": 1.5, "mine": {"a": [1]}}, SPACED | RATED | {"mine": {"a": [1]}}),
    ({"prompt": "Ask?", "responses": ["Yes, b.", "No b."], "mine": 1},
     SPACED | {"mine": 1, "edit_distance": 0.5}),
    ({"prompt": LABEL, "label": "Good."}, {"prompt": post(1), "chosen": " Good."}),
    *[({"prompt": "Ask?", answer: "Yes.", "who": 1}, {"prompt": "Ask?", "chosen": " Yes.", "who": 1})
      for answer in ("chosen", "response", "completion", "label")],
    ({"messages": [*TALK, assistant("Yes.")], "prompt": "Hello"}, {"prompt": TALK, "chosen": "Yes."}),
    ({"article": "News. ", "highlights": "One .\nTwo .", "id": "a1"},
     {"prompt": f"{ARTICLE}\n\nNews.", "chosen": " One . Two .", "id": "a1"}),
    ({"article": "News.", "highlights": "One .", "prompt": "News.\n\nTL;DR:"},
     {"prompt": "News.\n\nTL;DR:", "chosen": " One .", "id": None}),
    ({"instruction": "Do", "input": "", "output": "Done."}, {"prompt": [user("Do")], "chosen": "Done."}),
    ({"instruction": "Do", "input": "it", "output": "Yes."},
     {"prompt": [user("Do\n\nit")], "chosen": "Yes."}),
    (CHAT | {"score_chosen": 4.5, "score_rejected": None},
     CHAT | {"score_chosen": 4.5, "score_rejected": None, "edit_distance": 0.5}),
    (PAIR | {"prompt": YES[:1], "score_chosen": 4.5, "score_rejected": 3.0, "confidence": 7},
     CHAT | {"score_chosen": 4.5, "score_rejected": 3.0, "confidence": 7, "edit_distance": 0.5}),
    # blanks of an answer stay: another indentation is another answer
    ({"prompt": "a:\n", "chosen": "  b", "rejected": "b"},
     {"prompt": "a:\n", "chosen": "  b", "rejected": "b", "edit_distance": 0.0}),
]
RATINGS = [  # the confidence is the gap of two ratings, by every published name
    ({"chosen": YES, "rejected": NO, better: 4.5, worse: 3.0}, CHAT | {better: 4.5, worse: 3.0} | RATED)
    for better, worse in [("score_chosen", "score_rejected"), ("chosen_rating", "rejected_rating"),
                          ("chosen-rating", "rejected-rating"), ("chosen_score", "rejected_score")]]
TURNS = [  # turns before an answer move into the prompt
    ({"prompt": prompt, "completion": [*before, assistant("Yes.")]}, {"prompt": expected, "chosen": "Yes."})
    for prompt, before, expected in [
        ("Tea?", [], [user("Tea?")]),
        ("Tea?", [user("Tea? ")], [user("Tea? ")]),  # the whole conversation
        ("Hello\n\nthere?", TALK, TALK),  # the prompt is its first turn
        ("Tea?", TALK, TALK),  # ... or its last
        ([BRIEF, user("Tea?")], [CALL, RESULT], [BRIEF, user("Tea?"), CALL, RESULT]),  # they go on
        ([BRIEF], [user("Tea?")], [BRIEF, user("Tea?")])]]
CONTEXT = [  # so do `system` and `history`
    ({"prompt": "Ask?", "chosen": "Yes."} | columns, {"prompt": [*start, user("Ask?")], "chosen": "Yes."})
    for columns, start in [
        ({"system": "Be brief."}, [BRIEF]),
        ({"system_prompt": "Be brief.", "history": []}, [BRIEF]),
        ({"system": "Be brief.", "history": [["Hi", "Hello"], ["A", "B"]]},
         [BRIEF, user("Hi"), assistant("Hello"), user("A"), assistant("B")]),
        ({"system": "", "history": [user("Hi"), assistant("Hello")]}, [user("Hi"), assistant("Hello")]),
        ({"prompt": [BRIEF, user("Ask?")], "system": "Be brief."}, [BRIEF])]]  # it is there
SYSTEM = [
    (raw | {"system": "Be brief."}, {"prompt": [BRIEF, user("Ask?")], "chosen": "Yes."})
    for raw in ({"instruction": "Ask?", "output": "Yes."}, {"messages": [user("Ask?"), assistant("Yes.")]},
                {"prompt": "Ask?", "completion": [assistant("Yes.")]})]
SPACES = [  # a response to text gets a space
    ({"prompt": prompt, "chosen": response, "reference": response},
     {"prompt": prompt, "chosen": written, "reference": written})
    for prompt, response, written in [
        ("Text:", "yes \n", " yes"), ("Text:", " yes", " yes"), ("Text:\n", "yes", "yes"),
        ("def f(a):\n", "    return a\n", "    return a"), ("def f(a):", "\n    return a", "\n    return a"),
        ([user("Write it.")], "    return a\n", "    return a\n"), ([user("Write it.")], "yes", "yes")]]
STRICT = [(GOOD | {"score_chosen": number, "meta": {"a": [1.5, number], "b": "é"}, "tags": None},
           GOOD | {"chosen": " Yes.", "rejected": " No.", "score_chosen": None,
                   "meta": {"a": [1.5, None], "b": "é"}, "tags": None, "edit_distance": 1.0})
          for number in (float("nan"), float("-inf"))]


@pytest.mark.parametrize("raw, expected", [*SCHEMAS, *RATINGS, *TURNS, *CONTEXT, *SYSTEM, *SPACES, *STRICT])
def test_a_row_becomes(tmp_path, raw, expected):
    assert made(tmp_path, [raw])[0] == [expected]


@pytest.mark.parametrize("good, change, why", [
    (GOOD, {"prompt": " \n"}, "with an empty prompt"),
    (GOOD, {"prompt": None}, "with an empty prompt"),
    (GOOD, {"chosen": " \n"}, "with an empty `chosen`"),
    (GOOD, {"rejected": None}, "with an empty `rejected`"),
    (GOOD, {"rejected": " Yes."}, "with identical responses"),
    (GOOD, {"chosen": [*YES, *YES]}, "with turns in `chosen` that the prompt lacks"),  # `rejected` is a text
    (GOOD, {"chosen": [BRIEF, YES[1]], "rejected": [BRIEF, NO[1]]}, "with turns in `chosen` that the prompt"),
    (GOOD, {"rejected": [user("Else?"), *NO[1:]]}, "with turns in `rejected` that the prompt lacks"),
    (GOOD, {"rejected": YES[:1]}, "without an assistant's last turn"),
    (GOOD, {"system": "Be brief.", "prompt": [BRIEF | {"content": "Be long."}, user("Ask?")]},
     "with a `system` or `history` that the prompt contradicts"),
    (comparison(1), {"info": {"post": None}}, "without post and article"),
    ({"chosen": YES, "rejected": NO}, {"rejected": [user("Other?"), NO[1]]}, "with turns in `rejected` that"),
    ({"chosen": YES, "rejected": NO}, {"rejected": "no transcript"}, "without a prompt"),
    ({"messages": YES}, {"messages": []}, "without an assistant's last turn"),
    ({"messages": YES}, {"messages": YES[1:]}, "with an empty prompt"),
    ({"messages": YES}, {"messages": YES[1:], "system": "Be brief."}, "with an empty prompt"),
    (GOOD, {"tie": True}, "tied (--keep_ties keeps them)\n"),
    (GOOD | {"tie": False}, {"tie": 1}, "tied"),
    (GOOD | {"score_chosen": 4, "score_rejected": 3, "confidence": 0}, {"score_rejected": 4.0}, "tied"),
])
def test_a_row_that_teaches_nothing_is_dropped_and_counted(tmp_path, good, change, why):
    rows, stdout = made(tmp_path, [good, good | change, good | change, good])
    assert f": 2 train rows; dropped: 2 {why}" in stdout and len(rows) == 2


def test_ties_may_be_kept_and_stay_in_prompt_sets(tmp_path):
    raw = [GOOD | {"prompt": f"{i}", "tie": i > 2} for i in range(9)]
    assert len(made(tmp_path, raw, "--keep_ties")[0]) == 9
    run(tmp_path, "--prompts", "raw.jsonl")
    assert len(read(tmp_path / "data/prompts/raw.jsonl")) == 9


def test_notes_on_rows_that_stay(tmp_path):
    swapped = {"prompt": "Ask?", "chosen": " No.", "rejected": "Yes.", "system": ""}
    raw = [GOOD, GOOD | {"mine": 1}, GOOD, swapped, GOOD | {"system": "Be brief."}]
    rows, stdout = made(tmp_path, raw)
    assert len(rows) == 5
    assert ("raw.jsonl: of these 2 exact duplicates, 1 contradict an earlier pair, "
            "1 with `system` or `history`, now messages\n") in stdout
    assert "of these" not in made(tmp_path, raw[3:4])[1]


@pytest.mark.parametrize("raw, expected", [
    ([{"article": "News.", "highlights": "One .", "id": "a1"}],
     [{"prompt": f"{ARTICLE}\n\nNews.", "reference": " One .", "id": "a1", "dataset": "raw"}]),
    (2 * [{"instruction": "Do", "output": "Done", "dataset": "koala"}],
     [{"prompt": [user("Do")], "reference": "Done", "dataset": "koala"}]),
    ([GOOD | {"prompt": f"{i % 2}", "id": i, "reference": None if i else "R"} for i in range(5)],
     [{"prompt": "0", "reference": " R", "dataset": "raw", "id": 0},
      {"prompt": "1", "reference": " Yes.", "dataset": "raw", "id": 1}]),
    ([{"prompt": "Ask?", "responses": ["a", "b"]}], [{"prompt": "Ask?", "dataset": "raw"}]),
    ([comparison(1), comparison(2, side="valid1")],
     [{"prompt": post(i, side), "reference": " Good.", "dataset": "raw", "id": f"t3_{side}{i}"}
      for i, side in ((1, "train"), (2, "valid1"))]),
])
def test_prompt_sets_hold_no_prompt_twice_and_the_sets_answer_as_reference(tmp_path, raw, expected):
    stdout = run(tmp_path, "--prompts", write(tmp_path / "raw.jsonl", raw), "--num_prompts", 0)
    assert sorted(read(tmp_path / "data/prompts/raw.jsonl"), key=str) == sorted(expected, key=str)
    assert len(raw) == len(expected) or f"{len(raw) - len(expected)} with an earlier row's prompt" in stdout


# ---- files


def test_every_format_gives_the_same_files_and_so_does_a_set_in_two_files(tmp_path):
    raw = [row | {"reference": str(i)} for i, row in enumerate(rated_pairs(120, prompts=40))]
    for row in raw:
        del row["mine"]  # a CSV holds no dict
    raw[0] |= {"chosen": 'a, "b"\nc', "rejected": "12", "confidence": None}  # "12" is a text, "" no number
    written = []
    for endings in "jsonl", "jsonl.gz", "json", "parquet", "csv", "csv.gz", "jsonl parquet":
        size = 120 // len(endings.split())
        files = [write(tmp_path / f"{size}_{i}.{ending}", raw[i * size:(i + 1) * size])
                 for i, ending in enumerate(endings.split())]
        assert "left out: 1 train rows" in run(tmp_path, "--dataset", *files)
        written.append(tree(tmp_path / "data"))
    assert len(written[0]) == 6 and all(files == written[0] for files in written)


def test_what_load_dataset_reads(tmp_path):
    """A folder stands for a hub id: both go through load_dataset."""
    (tmp_path / "set").mkdir()
    for side in "train", "validation", "test":
        rows = [dict(GOOD, prompt=f"{side} {i}?", rejected=f"No {i}") for i in range(20)]
        write(tmp_path / f"set/{side}.jsonl", rows)

    def kinds(*parts):
        return [{prompt.split()[0] for prompt in found} for found in prompts(tmp_path, *parts)]
    run(tmp_path, "--dataset", "set", "--prompts", "set", "set:validation")
    parts = "all/train", "all/validation", "prompts/set", "prompts/set-validation"
    assert kinds(*parts) == [{"train"}, {"validation"}, {"test"}, {"validation"}]
    run(tmp_path, "--dataset", "set:validation")  # a validation split alone: it is split
    assert kinds("all/train", "all/validation") == [{"validation"}, {"validation"}]
    assert "nope" in run(tmp_path, "--dataset", "set:nope", status=2)

    (tmp_path / "set/README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train_prefs, path: train.jsonl}\n"
        "  - {split: test_prefs, path: test.jsonl}\n---\n")
    assert "set:SPLIT, of train_prefs, test_prefs" in run(tmp_path, "--dataset", "set", status=2)
    run(tmp_path, "--dataset", "set:train_prefs", "set:test_prefs")
    assert kinds("all/train", "all/validation") == [{"train"}, {"test"}]


def test_odd_files_that_are_fine(tmp_path):
    """Blank lines, a BOM, lone surrogates, 10 MB in a row; they come out as JSON that is UTF-8."""
    odd = ["a", "b\ud800", "\ud7ff\u2028é", "long " * 2_000_000]
    lines = [json.dumps(dict(GOOD, prompt=prompt)) for prompt in odd]
    (tmp_path / "x.jsonl").write_text("\n\n".join(lines) + "\n \n", encoding="utf-8-sig")
    write(tmp_path / "x.csv", [{"prompt": "a", "chosen": "b"}, {"prompt": odd[3], "chosen": "b"}])
    run(tmp_path, "--dataset", "x.jsonl", "x.csv", *WHOLE)
    assert prompts(tmp_path, "all/train", "sft/train") == [{"a", "b?", *odd[2:]}, {"a", odd[3]}]
    chosen, rejected = ("one " * 50_000 + word * 10 for word in ("a ", "b "))  # more words would take minutes
    write(tmp_path / "x.jsonl", [GOOD | {"chosen": chosen, "rejected": rejected}])
    run(tmp_path, "--dataset", "x.jsonl", *WHOLE)
    assert read(tmp_path / "data/all/train.jsonl")[0]["edit_distance"] == 0


def test_a_full_disk_touches_nothing(tmp_path):
    """A limit on the size of a file stands for the full disk."""
    write(tmp_path / "raw.jsonl", rated_pairs(120, prompts=60))
    run(tmp_path, "--dataset", "raw.jsonl")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(tmp_path / "data/all/train.jsonl"), limits[1]))
    try:
        assert "File too large" in run(tmp_path, "--dataset", "raw.jsonl", *WHOLE, status=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# ---- bad input

ROW = "x.jsonl, row 1"


def pair(**changes):
    return json.dumps(GOOD | changes)


@pytest.mark.parametrize("content, flags, words", [
    (None, "--dataset absent.jsonl", "absent.jsonl|no file|hub"),
    (None, "", "--dataset|--prompts"),
    # files
    ("\n \n", "--dataset x.jsonl", "x.jsonl|no rows"),
    (pair().encode("utf-16"), "--dataset x.jsonl", "x.jsonl: cannot read it|UTF-8"),
    (gzip.compress(pair().encode())[:20] + 40 * b"x", "--dataset x.jsonl.gz", "x.jsonl.gz: cannot read it"),
    ("PAR1 no parquet", "--dataset x.parquet", "x.parquet: cannot read it"),
    ("prompt,chosen\na,b,c\n", "--dataset x.csv", "x.csv|columns"),
    # JSON
    (pair() + "\n{oops\n", "--dataset x.jsonl", "x.jsonl, line 2|not JSON"),
    ('[{"prompt": ', "--prompts x.jsonl", "x.jsonl|not JSON"),
    (10**5 * "[", "--dataset x.jsonl", "x.jsonl: cannot read it|recursion"),
    (pair() + "\n7\n", "--dataset x.jsonl", "x.jsonl, row 2|object"),
    # columns
    ('{"question": "a", "answer": "b"}', "--dataset x.jsonl", "question answer|info summaries|highlights"),
    ('{"prompt": "a", "answer": "b"}', "--dataset x.jsonl", "prompt answer|prompt chosen;|for --prompts"),
    ('{"question": "a", "chosen": "b", "rejected": "c"}', "--dataset x.jsonl", "name its column `prompt`"),
    (pair() + '\n\n{"prompt": "a", "chosen": "b"}', "--dataset x.jsonl", "x.jsonl, row 3: SFT rows|of pairs"),
    # types
    (pair(prompt=[7]), "--dataset x.jsonl", f"{ROW}|pairs|prompt"),
    (pair(prompt=[{"role": "wizard", "content": "x"}]), "--dataset x.jsonl", f"{ROW}|role|system"),
    (pair(prompt=[user(3)]), "--dataset x.jsonl", f"{ROW}|content"),
    (pair(rejected=3), "--dataset x.jsonl", f"{ROW}|pairs|rejected"),
    (pair(rejected=[{"role": "assistant"}]), "--dataset x.jsonl", f"{ROW}|'content'"),
    (pair(rejected=[assistant("") | {"tool_calls": ["f"]}]), "--dataset x.jsonl", ROW),
    (pair(system=7), "--dataset x.jsonl", f"{ROW}|content"),
    (pair(history=[["Hi"]]), "--dataset x.jsonl", ROW),
    (pair(score_chosen="high", score_rejected="low"), "--dataset x.jsonl", ROW),
    (pair(confidence="high"), "--dataset x.jsonl", f"{ROW}|confidence"),
    (pair(confidence=float("inf")), "--dataset x.jsonl", f"{ROW}|confidence"),
    (json.dumps(comparison(1) | {"choice": 2}), "--dataset x.jsonl", f"{ROW}|choice"),
    ('{"chosen": 1, "rejected": 2}', "--dataset x.jsonl", f"{ROW}|chosen, rejected"),
    ('{"messages": "text"}', "--dataset x.jsonl", f"{ROW}|messages"),
    ('{"prompt": "a", "responses": ["b", "c", "d"]}', "--dataset x.jsonl", f"{ROW}|two texts"),
    # flags
    ('{"prompt": "a"}', "--prompts x.jsonl ./x.jsonl", "--prompts|x, x"),
    ('{"prompt": "a"}', "--prompts x.jsonl --num_prompts -1", "--num_prompts -1"),
    (pair(), "--dataset x.jsonl ./x.jsonl", "--dataset|twice"),
    (pair(), "--dataset x.jsonl --validation_fraction 1", "--validation_fraction 1"),
    (pair(), "--dataset x.jsonl --judge_fraction -1", "--judge_fraction -1"),
    (pair(), "--dataset x.jsonl --judge_fraction 1e-9", "or for the judge; change"),
    (f"{json.dumps(comparison(1))}\n{json.dumps(comparison(1) | {'split': 'valid1'})}", "--dataset x.jsonl",
     "no training rows are left of the preference sets"),
    (pair(), "--dataset x.jsonl --out x.jsonl", "x.jsonl"),
    (pair(), "--dataset data/all/train.jsonl", "data/all/train.jsonl: --out data would overwrite it"),
])
def test_bad_input_is_one_line(tmp_path, content, flags, words):
    if content is not None:
        path = tmp_path / flags.split()[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = run(tmp_path, *flags.split(), status=2)
    assert all(word in message for word in words.split("|")), message


def test_preference_sets_of_two_schemas_or_scales_do_not_mix(tmp_path):
    write(tmp_path / "a.jsonl", [GOOD])
    for other in comparison(1), GOOD | {"score_chosen": 2, "score_rejected": 1}:
        write(tmp_path / "b.jsonl", [other])
        assert "several schemas" in run(tmp_path, "--dataset", "a.jsonl", "b.jsonl", status=2)
