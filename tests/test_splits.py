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
PARTS = [f"{part}/{side}" for part in ("all", "hc_he", "lc_le") for side in ("train", "validation")]
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
    elif path.name.endswith(".json"):
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif ".csv" in path.name:
        with opened(path, "wt", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    else:
        with opened(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def read(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def prompts_of(path):
    return {row["prompt"] for row in read(path)}


def made(folder, raw, *flags, status=0):
    """(the rows of all/train or sft/train that raw rows become, what is printed)."""
    stdout = run(folder, "--dataset", write(folder / "raw.jsonl", raw), *WHOLE, *flags, status=status)
    paths = [path for path in folder.glob("data/*/train.jsonl") if path.parent.name in ("all", "sft")]
    return (read(*paths) if paths else None), stdout


def rated_pairs(count, prompts):
    """Pairs on `prompts` prompts. Pair i has a confidence and an edit distance that no other pair has."""
    rng = random.Random(count)
    places = rng.sample(range(count), count)
    rows = []
    for i, place in enumerate(places):
        words = [f"w{j}" for j in range(count)]  # without `place` of its words: distance place / count
        rows.append({"prompt": f"Ask {rng.randrange(prompts)}?", "chosen": " ".join([*words, "end"]),
                     "rejected": " ".join([*words[place:], "end"]), "confidence": (place + i % 40) / 8,
                     "mine": {"row": i}})
    return rows


def plain(row):
    """A pair as it was before splits.py read it."""
    return {key: value.strip() if key in ("chosen", "rejected") else value for key, value in row.items()
            if key != "edit_distance"}


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


CALL, RESULT = assistant("CALL search"), {"role": "tool", "content": "20 C"}
BRIEF = {"role": "system", "content": "Be brief."}

# ---- the method


def test_hc_he_is_above_both_medians_of_train_and_lc_le_below_both(tmp_path):
    raw = rated_pairs(400, prompts=90)
    stdout = run(tmp_path, "--dataset", write(tmp_path / "raw.jsonl", raw))
    data = {part: [plain(row) for row in read(tmp_path / f"data/{part}.jsonl")] for part in PARTS}

    def edits(row):
        return 1 - len(row["rejected"].split()) / len(row["chosen"].split())
    confidence = statistics.median(row["confidence"] for row in data["all/train"])
    middle = statistics.median(edits(row) for row in data["all/train"])
    assert middle != statistics.median(edits(row) for row in raw)
    assert confidence != statistics.median(row["confidence"] for row in raw)
    assert f"medians of all/train: confidence {confidence:g}, edit distance {middle:.4f}\n" in stdout
    for side in "train", "validation":
        rows = data[f"all/{side}"]
        above = [row for row in rows if row["confidence"] > confidence and edits(row) > middle]
        below = [row for row in rows if row["confidence"] < confidence and edits(row) < middle]
        assert data[f"hc_he/{side}"] == above and data[f"lc_le/{side}"] == below
        assert min(len(above), len(below), len(rows) - len(above) - len(below)) > 1
    for part in "all", "hc_he", "lc_le":
        rows = data[f"{part}/train"]
        means = statistics.fmean(row["confidence"] for row in rows), statistics.fmean(map(edits, rows))
        sizes = len(rows), len(data[f"{part}/validation"])
        assert "| {} | {:.2f} | {:.2f} | {} | {} |\n".format(part, *means, *sizes) in stdout


@pytest.mark.parametrize("sign", [1, -1])
def test_a_pair_on_one_of_the_medians_is_in_neither_part(tmp_path, sign):
    raw = []
    for number, edits in enumerate([1, 2, 5, 3, 4], 1):  # both medians are 3
        number, edits = 3 + sign * (number - 3), 3 + sign * (edits - 3)
        raw.append({"prompt": f"{number}", "chosen": "a b c d e f", "rejected": "a b c d e f"[2 * edits:],
                    "confidence": number})
    run(tmp_path, "--dataset", write(tmp_path / "raw.jsonl", raw), *WHOLE)
    both = [prompts_of(tmp_path / f"data/{part}/train.jsonl") for part in ("hc_he", "lc_le")]
    assert both == ([{"5"}, {"1", "2"}] if sign == 1 else [{"4", "5"}, {"1"}])


@pytest.mark.parametrize("chosen, rejected, responses, texts", [
    ("a b c d", "a x c", 2 / 4, 2 / 6),  # one substitution, one deletion; the post adds two equal words
    ("a b", "b a", 1.0, 2 / 4),
    ("one", "two three four", 1.0, 3 / 5),
])
def test_the_edit_distance_is_levenshteins_over_words_by_the_longer_length(tmp_path, chosen, rejected,
                                                                           responses, texts):
    prompt = "SUBREDDIT: r/x\n\nTITLE: Not\n\nPOST: Two words\n\nTL;DR:"
    write(tmp_path / "raw.jsonl", [{"prompt": prompt, "chosen": chosen, "rejected": rejected}])
    for flags, expected in ((), responses), (("--edit_distance", "texts"), texts):
        run(tmp_path, "--dataset", "raw.jsonl", *WHOLE, *flags)
        assert read(tmp_path / "data/all/train.jsonl")[0]["edit_distance"] == round(expected, 4)


@pytest.mark.parametrize("chosen, rejected, by_characters, expected", [
    ("我今天去公园散步看见很多花开了心里非常高兴然后就回家吃了晚饭", "我今天去公园散步看见很多树开了心里非常高兴然后就回家吃了晚饭", True, 1 / 30),
    ("猫が好きです。", "犬が好きです。", True, 1 / 7),
    ("ฉันชอบแมว", "ฉันชอบหมา", True, 2 / 9),
    ("好", "好的", True, 1 / 2),
    ("使用 PyTorch 训练", "使用 JAX 训练", True, 1 / 5),  # five words, four of them characters
    ("He said 你好 to me", "He said 您好 to me", False, 1 / 5),  # more words than characters
    ("你好吗", "Hello to you", False, 3 / 3),
    ("나는 고양이를 좋아해요", "나는 강아지를 좋아해요", False, 1 / 3),  # Korean has spaces
])
def test_in_scripts_without_spaces_the_edit_distance_counts_characters(tmp_path, chosen, rejected,
                                                                       by_characters, expected):
    rows, stdout = made(tmp_path, [{"prompt": "a", "chosen": chosen, "rejected": rejected}])
    assert rows[0]["edit_distance"] == round(expected, 4)
    assert ("of these 1 without spaces: edit distance by characters" in stdout) == by_characters


def test_the_judge_gets_prompts_that_no_other_file_has(tmp_path):
    write(tmp_path / "raw.jsonl", rated_pairs(400, prompts=200))
    write(tmp_path / "sft.jsonl", [{"prompt": f"Ask {i}?", "chosen": "yes"} for i in range(220)])
    stdout = run(tmp_path, "--dataset", "raw.jsonl", "sft.jsonl", "--judge_fraction", 0.3, "--seed", 7)
    raw = prompts_of(tmp_path / "raw.jsonl")
    digests = {prompt: hashlib.sha256(f"7 {prompt}".encode()).hexdigest() for prompt in raw}
    judge = {prompt for prompt in raw if int(digests[prompt][8:16], 16) / 16**8 < 0.3}
    held = {prompt for prompt in judge if int(digests[prompt][:16], 16) / 16**16 < 0.1}
    assert prompts_of(tmp_path / "data/judge/train.jsonl") == judge - held
    assert prompts_of(tmp_path / "data/judge/validation.jsonl") == held and len(held) > 2
    others = [prompts_of(tmp_path / f"data/{part}.jsonl") for part in PARTS]
    assert set.union(*others) == raw - judge and others[0] and others[1]
    sft = [prompts_of(tmp_path / f"data/sft/{side}.jsonl") for side in ("train", "validation")]
    assert set.union(*sft) == {f"Ask {i}?" for i in range(220)} - judge
    rows = sum(len(read(tmp_path / f"data/judge/{side}.jsonl")) for side in ("train", "validation"))
    assert f"preference sets: {rows} of 399 train rows are left to the judge, by prompt\n" in stdout
    run(tmp_path, "--dataset", "raw.jsonl", "--seed", 7)  # without a judge its rows are in `all` again
    assert not (tmp_path / "data/judge/train.jsonl").exists()


@pytest.mark.parametrize("seed", range(4))
def test_of_a_tiny_set_a_judge_too_has_a_validation_prompt(tmp_path, seed):
    write(tmp_path / "raw.jsonl", [GOOD | {"prompt": f"{i}"} for i in range(12)])
    run(tmp_path, "--dataset", "raw.jsonl", "--judge_fraction", 0.5, "--validation_fraction", 1e-9,
        "--seed", seed)
    parts = [prompts_of(tmp_path / f"data/{part}/{side}.jsonl")
             for part in ("all", "judge") for side in ("train", "validation")]
    assert len(parts[1]) == len(parts[3]) == 1 and sum(map(len, parts)) == len(set.union(*parts)) == 12


def test_a_prompt_is_held_out_by_a_hash_of_the_seed_and_its_text(tmp_path):
    raw = rated_pairs(400, prompts=200)
    write(tmp_path / "raw.jsonl", raw)
    for seed, fraction in (0, 0.1), (7, 0.1), (7, 0.3):
        run(tmp_path, "--dataset", "raw.jsonl", "--seed", seed, "--validation_fraction", fraction)
        held = {row["prompt"] for row in raw if int(
            hashlib.sha256(f"{seed} {row['prompt']}".encode()).hexdigest()[:16], 16) / 16**16 < fraction}
        assert prompts_of(tmp_path / "data/all/validation.jsonl") == held
        assert prompts_of(tmp_path / "data/all/train.jsonl") == {row["prompt"] for row in raw} - held


def test_the_seed_gives_the_order_and_the_choice_of_prompts(tmp_path):
    write(tmp_path / "raw.jsonl", rated_pairs(60, prompts=60))
    write(tmp_path / "sft.jsonl", [{"prompt": f"Ask {i}?", "chosen": "yes"} for i in range(60)])
    out = {}
    for name, seed in ("first", 0), ("again", 0), ("other", 1):
        run(tmp_path, "--dataset", "raw.jsonl", "sft.jsonl", "--prompts", "sft.jsonl", "--num_prompts", 9,
            "--seed", seed, "--out", name, *WHOLE)
        out[name] = [read(tmp_path / name / path)
                     for path in ("all/train.jsonl", "sft/train.jsonl", "prompts/sft.jsonl")]
    assert out["first"] == out["again"]
    for rows, others in zip(out["first"][:2], out["other"]):  # the same rows in another order
        assert rows != others and sorted(map(str, rows)) == sorted(map(str, others))
    assert [row["mine"]["row"] for row in out["first"][0]] != list(range(60))
    chosen, others = ({row["prompt"] for row in out[name][2]} for name in ("first", "other"))
    assert chosen != others and len(chosen) == len(others) == 9


def test_a_validation_split_is_all_validation_and_its_prompts_leave_every_train_set(tmp_path):
    raw = []
    for i in range(200):
        edits = i % 9 + 1  # of nine words
        raw.append(comparison(i, edits, texts=(9 * "a ", edits * "b " + (9 - edits) * "a ")))
    raw += [comparison(i, 9, f"valid{1 + i % 2}", texts=("One.", "Three.")) for i in range(100)]
    raw.append(comparison(200, post="Post 3 of valid2.\nMore.", title="Title 3"))
    write(tmp_path / "raw.jsonl.gz", raw)
    both = [*map(post, range(200)), *(post(i, f"valid{1 + i % 2}") for i in range(100))]
    write(tmp_path / "sft.jsonl", [{"prompt": [user(prompt)], "chosen": "Yes."} for prompt in both])
    stdout = run(tmp_path, "--dataset", "raw.jsonl.gz", "sft.jsonl")
    prompts = {part: prompts_of(tmp_path / f"data/{part}.jsonl") for part in PARTS if "lc_le" not in part}
    assert prompts["all/validation"] == set(both[200:])
    assert prompts["hc_he/train"] <= prompts["all/train"] < set(both[:200])
    held = 200 - len(prompts["all/train"])
    assert 5 < held < 40 and set() < prompts["hc_he/validation"] <= set(both[:200]) - prompts["all/train"]
    assert f"preference sets: of 201 train rows, {held} held out by prompt, 1 dropped as" in stdout
    # a lone user's message is the same prompt as its text
    sft = {row["prompt"][0]["content"] for row in read(tmp_path / "data/sft/train.jsonl")}
    assert sft == prompts["all/train"]
    # the medians are those of all/train, whatever the validation split holds
    assert "medians of all/train: confidence 5, edit distance 0.5556\n" in stdout


def test_all_rows_of_a_conversation_are_on_one_side(tmp_path):
    """A row for each of its three answers, as HH has them; its first turn alone is a text prompt too."""
    raw = []
    for i in range(60):
        turns = [BRIEF] * (i % 2) + [user(f"Talk {i}"), assistant("A"), user(f"More {i}"), assistant("B"),
                                     user("End?")]
        raw += [{"prompt": turns[:i % 2 + size], "chosen": "Yes.", "rejected": "No."} for size in (1, 3, 5)]
    write(tmp_path / "raw.jsonl", raw)
    write(tmp_path / "sft.jsonl", [{"prompt": f"Talk {i}", "chosen": "Yes."} for i in range(60)])
    run(tmp_path, "--dataset", "raw.jsonl", "sft.jsonl", "--prompts", "raw.jsonl",
        "--validation_fraction", 0.3)
    sides = []
    for side in "train", "validation":
        rows = [str(row["prompt"]) for row in read(tmp_path / f"data/all/{side}.jsonl")]
        talks = [i for i in range(60) if any(f"'Talk {i}'" in row for row in rows)]
        assert len(rows) == 3 * len(talks) and len(talks) > 9
        assert prompts_of(tmp_path / f"data/sft/{side}.jsonl") == {f"Talk {i}" for i in talks}
        sides += talks
    assert sorted(sides) == list(range(60))
    assert len(read(tmp_path / "data/prompts/raw.jsonl")) == 180  # a prompt set has all of them


def test_the_prompt_held_out_of_a_tiny_set_is_none_of_its_validation_split(tmp_path):
    raw = [*map(comparison, range(3)), comparison(0) | {"split": "valid1"}]
    write(tmp_path / "raw.jsonl", raw)
    for seed in 6, 10, 11:  # of which the hash of its prompt is the least
        stdout = run(tmp_path, "--dataset", "raw.jsonl", "--validation_fraction", 1e-9, "--seed", seed)
        assert "of 3 train rows, 1 held out by prompt, 1 dropped" in stdout


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_of_a_tiny_set_one_prompt_is_held_out_and_leaves_every_train_set(tmp_path, seed):
    write(tmp_path / "pairs.jsonl",
          [{"prompt": f"Ask {i}?", "chosen": "yes", "rejected": "no"} for i in range(3)])
    write(tmp_path / "sft.jsonl", [{"prompt": f"Ask {i}?", "chosen": "yes"} for i in range(1, 9)])
    run(tmp_path, "--dataset", "pairs.jsonl", "sft.jsonl", "--validation_fraction", 1e-9, "--seed", seed)
    pairs, sft = ([prompts_of(tmp_path / f"data/{kind}/{side}.jsonl") for side in ("train", "validation")]
                  for kind in ("all", "sft"))
    assert len(pairs[1]) == 1 and len(pairs[0]) == 2 and sft[0] and len(sft[1]) in (1, 2)
    assert not (pairs[0] | sft[0]) & (pairs[1] | sft[1])


def test_train_pairs_without_a_confidence_leave_a_set_that_has_some(tmp_path):
    raw = [comparison(i, i % 9 or (None if i % 2 else float("nan"))) for i in range(90)]
    raw += [comparison(i, i or None, "valid1") for i in range(5)]
    stdout = run(tmp_path, "--dataset", write(tmp_path / "raw.jsonl", raw))
    assert "without a confidence, left out: 10 train rows" in stdout
    train = read(tmp_path / "data/all/train.jsonl")
    assert 60 < len(train) < 80 and all(row["confidence"] for row in train)
    assert prompts_of(tmp_path / "data/all/validation.jsonl") == {post(i, "valid1") for i in range(5)}


def test_a_set_without_a_part_writes_no_file_and_removes_that_of_an_earlier_call(tmp_path):
    raw = rated_pairs(60, prompts=20)
    run(tmp_path, "--dataset", write(tmp_path / "raw.jsonl", raw))
    for change, message in ({"confidence": 5}, "hc_he stays empty"), ({"confidence": None}, "no confidences"):
        assert (tmp_path / "data/hc_he/train.jsonl").exists()
        stdout = run(tmp_path, "--dataset", write(tmp_path / "flat.jsonl", [row | change for row in raw]))
        assert message in stdout and "| hc_he | - | - | 0 | 0 |" in stdout
        assert "data/hc_he/train.jsonl: no rows; removed the file of an earlier call" in stdout
        assert sorted(path.parent.name for path in tree(tmp_path / "data")) == ["all", "all"]
        run(tmp_path, "--dataset", "raw.jsonl")


# ---- raw rows

ARTICLE = "Summarize this news article clearly and concisely. Use TL;DR in your response:"
LABEL = "SUBREDDIT: r/gardens\nTITLE: Title 1\nPOST: Post 1 of train.\nMore.\nTL;DR: "
HUMAN = "\n\nHuman: Hello\n\nthere?\n\nAssistant: Hi.\n\nHuman: Tea?\n\nAssistant:"
TALK = [user("Hello\n\nthere?"), assistant("Hi."), user("Tea?")]
SUMMARIES = {"prompt": post(1), "chosen": " Good.", "rejected": " Bad 1.", "confidence": 5,
             "edit_distance": 1.0, "id": "t3_train1", "batch": "batch3"}
RATED = {"confidence": 1.5, "edit_distance": 0.5}
YES, NO = [user("Ask?"), assistant("Yes, b.")], [user("Ask?"), assistant("No b.")]


@pytest.mark.parametrize("raw, expected", [
    (comparison(1), SUMMARIES),
    (comparison(1, title=None), SUMMARIES | {"prompt": post(1).replace("Title 1", "")}),
    (comparison(1, post=None, article="News.\n"),
     SUMMARIES | {"prompt": f"{ARTICLE}\n\nTITLE: Title 1\n\nNews."}),
    ({"chosen": YES, "rejected": NO, "who": 1},
     {"prompt": YES[:1], "chosen": "Yes, b.", "rejected": "No b.", "who": 1, "edit_distance": 0.5}),
    ({"chosen": HUMAN + " Yes,\n\nplease. ", "rejected": HUMAN + " No."},
     {"prompt": TALK, "chosen": "Yes,\n\nplease.", "rejected": "No.", "edit_distance": 1.0}),
    ({"prompt": "Ask?", "chosen": "Yes, b.", "rejected": "No b.", "confidence": 1.5, "mine": {"a": [1]}},
     {"prompt": "Ask?", "chosen": " Yes, b.", "rejected": " No b.", "mine": {"a": [1]}} | RATED),
    ({"prompt": "Ask?", "responses": ["Yes, b.", "No b."], "mine": 1},
     {"prompt": "Ask?", "chosen": " Yes, b.", "rejected": " No b.", "mine": 1, "edit_distance": 0.5}),
    ({"prompt": LABEL, "label": "  Good."}, {"prompt": post(1), "chosen": " Good."}),
    ({"prompt": "Ask?", "chosen": "Yes.", "who": 1}, {"prompt": "Ask?", "chosen": " Yes.", "who": 1}),
    ({"prompt": "Ask?", "response": "Yes.", "who": 1}, {"prompt": "Ask?", "chosen": " Yes.", "who": 1}),
    ({"prompt": "Ask?", "completion": "Yes.", "who": 1}, {"prompt": "Ask?", "chosen": " Yes.", "who": 1}),
    ({"prompt": TALK, "completion": [assistant("Yes.")]}, {"prompt": TALK, "chosen": "Yes."}),
    ({"messages": [*TALK, assistant("Yes.")], "prompt": "Hello"}, {"prompt": TALK, "chosen": "Yes."}),
    ({"article": "News. ", "highlights": "One .\nTwo .", "id": "a1"},
     {"prompt": f"{ARTICLE}\n\nNews.", "chosen": " One . Two .", "id": "a1"}),
    ({"article": "News.", "highlights": "One .", "prompt": "News.\n\nTL;DR:"},
     {"prompt": "News.\n\nTL;DR:", "chosen": " One ."}),
    ({"instruction": "Do", "input": "", "output": "Done."}, {"prompt": [user("Do")], "chosen": "Done."}),
    ({"instruction": "Do", "input": "it", "output": "Yes."},
     {"prompt": [user("Do\n\nit")], "chosen": "Yes."}),
])
def test_a_row_of_each_schema(tmp_path, raw, expected):
    assert made(tmp_path, [raw])[0] == [expected]


GOOD = {"prompt": "Ask?", "chosen": "Yes.", "rejected": "No."}


@pytest.mark.parametrize("good, change, why", [
    (GOOD, {"prompt": " \n"}, "with an empty prompt"),
    (GOOD, {"prompt": None}, "with an empty prompt"),
    (GOOD, {"chosen": " \n"}, "with an empty `chosen`"),
    (GOOD, {"rejected": None}, "with an empty `rejected`"),
    (GOOD, {"rejected": " Yes."}, "with identical responses"),
    (GOOD, {"chosen": [*YES, *YES]}, "with turns in `chosen` that the prompt lacks"),  # `rejected` is a text
    (GOOD, {"rejected": [user("Else?"), *NO[1:]]}, "with turns in `rejected` that the prompt lacks"),
    (GOOD, {"rejected": YES[:1]}, "without an assistant's last turn"),
    (comparison(1), {"info": {"post": None}}, "without post and article"),
    ({"chosen": YES, "rejected": NO}, {"rejected": [user("Other?"), NO[1]]}, "with two different prompts"),
    ({"chosen": YES, "rejected": NO}, {"rejected": 2 * YES[:1]}, "without an assistant's last turn"),
    ({"chosen": YES, "rejected": NO}, {"rejected": "no transcript"}, "without a prompt"),
    ({"messages": YES}, {"messages": YES[:1]}, "without an assistant's last turn"),
    ({"messages": YES}, {"messages": []}, "without an assistant's last turn"),
    ({"messages": YES}, {"messages": YES[1:]}, "with an empty prompt"),
    ({"messages": YES}, {"messages": YES[1:], "system": "Be brief."}, "with an empty prompt"),
])
def test_a_row_that_teaches_nothing_is_dropped_and_counted(tmp_path, good, change, why):
    _, stdout = made(tmp_path, [good, good | change, good | change, good])
    assert f": 2 train rows; dropped: 2 {why}" in stdout


def test_duplicates_and_pairs_that_contradict_an_earlier_one_are_counted_and_stay(tmp_path):
    swapped = {"prompt": "Ask?", "chosen": " No.", "rejected": "Yes."}
    raw = [GOOD, GOOD | {"mine": 1}, GOOD | {"prompt": "Else?"}, swapped, GOOD | {"chosen": "Yes!"}]
    rows, stdout = made(tmp_path, raw)
    assert len(rows) == 5
    assert "raw.jsonl: of these 1 exact duplicates, 1 contradict an earlier pair\n" in stdout
    assert "of these" not in made(tmp_path, raw[2:])[1]


@pytest.mark.parametrize("shape", [{"prompt": "Ask?", "chosen": YES, "rejected": NO},
                                   {"chosen": YES, "rejected": NO}])
@pytest.mark.parametrize("ratings", ["score_chosen score_rejected", "chosen_rating rejected_rating",
                                     "chosen-rating rejected-rating", "chosen_score rejected_score"])
def test_the_confidence_is_the_gap_of_two_ratings_in_every_published_shape(tmp_path, shape, ratings):
    better, worse = ratings.split()
    raw = [shape | {better: 4.5, worse: 3.0}, shape | {better: None, worse: 3.0},
           shape | {better: 4.5, worse: 3.0, "confidence": 7}]
    rows, _ = made(tmp_path, raw)
    expected = {"prompt": YES[:1], "chosen": "Yes, b.", "rejected": "No b.", better: 4.5, worse: 3.0} | RATED
    assert sorted(rows, key=lambda row: row["confidence"]) == [expected, expected | {"confidence": 7}]


@pytest.mark.parametrize("tie, clear", [({"tie": True}, {"tie": False}), ({"tie": 1}, {"tie": None}),
                                        ({"score_chosen": 3, "score_rejected": 3.0, "confidence": 2},
                                         {"score_chosen": 4, "score_rejected": 3, "confidence": 0})])
def test_ties_are_dropped_unless_they_are_kept_and_stay_in_prompt_sets(tmp_path, tie, clear):
    raw = [GOOD | {"prompt": f"{i}"} | (tie if i % 3 else clear) for i in range(9)]
    rows, stdout = made(tmp_path, raw, "--prompts", "raw.jsonl")
    assert "dropped: 6 tied (--keep_ties keeps them)\n" in stdout
    assert {row["prompt"] for row in rows} == {"0", "3", "6"}
    assert len(read(tmp_path / "data/prompts/raw.jsonl")) == 9
    assert len(made(tmp_path, raw, "--keep_ties")[0]) == 9


@pytest.mark.parametrize("prompt, before, expected", [
    ("Tea?", [], [user("Tea?")]),
    ("Tea?", [user("Tea? ")], [user("Tea? ")]),  # the whole conversation
    ("Hello\n\nthere?", TALK, TALK),  # the prompt is its first turn
    ("Tea?", TALK, TALK),  # ... or its last
    ([BRIEF, user("Tea?")], [CALL, RESULT], [BRIEF, user("Tea?"), CALL, RESULT]),  # they go on
    ([BRIEF], [user("Tea?")], [BRIEF, user("Tea?")]),
    ("Tea?", [BRIEF], None),
    ("Tea?", [user("Tea or coffee?")], None),
])
def test_shared_turns_move_into_the_prompt_and_others_drop_the_row(tmp_path, prompt, before, expected):
    pair = {"prompt": prompt, "chosen": [*before, assistant("Yes.")], "rejected": [*before, assistant("No.")]}
    for raw in pair, {"prompt": prompt, "completion": pair["chosen"]}:
        (tmp_path / "sft").mkdir(exist_ok=True)
        rows, message = made(tmp_path / ("" if raw is pair else "sft"), [raw], status=0 if expected else 2)
        assert expected or "1 with turns in `chosen` that the prompt lacks" in message
        assert not expected or [(row["prompt"], row["chosen"]) for row in rows] == [(expected, "Yes.")]


@pytest.mark.parametrize("columns, start", [
    ({"system": "Be brief."}, [BRIEF]),
    ({"system_prompt": "Be brief.", "history": []}, [BRIEF]),
    ({"system": "Be brief.", "history": [["Hi", "Hello"], ["A", "B"]]},
     [BRIEF, user("Hi"), assistant("Hello"), user("A"), assistant("B")]),
    ({"system": "", "history": [user("Hi"), assistant("Hello")]}, [user("Hi"), assistant("Hello")]),
])
@pytest.mark.parametrize("raw", [
    {"prompt": "Ask?", "chosen": "Yes.", "rejected": "No."}, {"instruction": "Ask?", "output": "Yes."},
    {"prompt": "Ask?", "chosen": YES, "rejected": NO}, {"chosen": YES, "rejected": NO},
    {"prompt": [user("Ask?")], "response": "Yes."}])
def test_system_and_history_become_messages_of_the_prompt(tmp_path, raw, columns, start):
    (row,), stdout = made(tmp_path, [raw | columns])
    assert "of these 1 with `system` or `history`, now messages\n" in stdout
    assert row["prompt"] == [*start, user("Ask?")] and row["chosen"].startswith("Yes")
    assert not set(row) & {"system", "system_prompt", "history"}


@pytest.mark.parametrize("prompt, response, written", [
    ("Text:", "yes \n", " yes"), ("Text:", " yes", " yes"), ("Text:\n", "yes", "yes"),
    ("def f(a):\n", "    return a\n", "    return a"), ("def f(a):", "\n    return a", "\n    return a"),
    ([user("Write it.")], "    return a\n", "    return a\n"), ([user("Write it.")], "yes", "yes"),
])
def test_only_a_response_to_text_gets_a_space_and_blanks_of_the_answer_stay(tmp_path, prompt, response,
                                                                           written):
    raw = {"prompt": prompt, "chosen": response, "rejected": "no", "reference": response}
    row, = made(tmp_path, [raw])[0]
    assert row["chosen"] == row["reference"] == written
    indented = response[0] in " \n" and response != " yes"  # another indentation is another answer
    made(tmp_path, [raw | {"rejected": response.strip()}], status=0 if indented else 2)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_other_keys_travel_along_as_strict_json(tmp_path, ending, number):
    mine = {"score_chosen": number, "meta": {"a": [1.5, number], "b": "é"}, "tags": None}
    run(tmp_path, "--dataset", write(tmp_path / f"raw.{ending}", [GOOD | mine]), *WHOLE)
    row = json.loads((tmp_path / "data/all/train.jsonl").read_text(), parse_constant=pytest.fail)
    strict = {"score_chosen": None, "meta": {"a": [1.5, None], "b": "é"}, "tags": None}
    assert {key: row[key] for key in mine} == strict


def test_prompt_sets_hold_no_prompt_twice_and_the_sets_answer_as_reference(tmp_path):
    write(tmp_path / "news.jsonl.gz",
          [{"article": f"News {i}.", "highlights": f"One {i} .", "id": f"a{i}"} for i in range(50)])
    write(tmp_path / "alpaca.json", 2 * [
        {"instruction": f"Do {i}", "output": f"Done {i}", "dataset": f"set {i % 2}"} for i in range(30)])
    write(tmp_path / "pairs.jsonl", [dict(GOOD, prompt=f"{i % 6}", id=i, reference="R" if i < 3 else None)
                                     for i in range(20)])
    write(tmp_path / "two.jsonl", [{"prompt": "Ask?", "responses": ["a", "b"]}])
    write(tmp_path / "raw.jsonl", [comparison(1), comparison(2, side="valid1")])
    files = ["news.jsonl.gz", "alpaca.json", "pairs.jsonl", "two.jsonl", "raw.jsonl"]
    run(tmp_path, "--prompts", *files, "--num_prompts", 20)
    news, alpaca, pairs, two, raw = (read(tmp_path / f"data/prompts/{name.split('.')[0]}.jsonl")
                                     for name in files)
    for rows in news, alpaca:
        numbers = [int(row["reference"].split()[1]) for row in rows]
        assert len(set(numbers)) == 20 and numbers != sorted(numbers)
        assert rows == [{"prompt": f"{ARTICLE}\n\nNews {i}.", "reference": f" One {i} .", "id": f"a{i}",
                         "dataset": "news"} if rows is news else
                        {"prompt": [user(f"Do {i}")], "reference": f"Done {i}",
                         "dataset": f"set {i % 2}"} for i in numbers]  # alpaca's own, e.g. "koala"
    assert sorted(pairs, key=lambda row: row["id"]) == [  # the first row of each prompt
        {"prompt": f"{i}", "reference": " R" if i < 3 else " Yes.", "dataset": "pairs", "id": i}
        for i in range(6)]
    assert two == [{"prompt": "Ask?", "dataset": "two"}]
    assert {row["prompt"] for row in raw} == {post(1), post(2, "valid1")}
    run(tmp_path, "--prompts", "news.jsonl.gz", "--num_prompts", 20, "--out", "again")  # alone: the same
    assert read(tmp_path / "again/prompts/news.jsonl") == news
    run(tmp_path, "--prompts", "news.jsonl.gz", "--num_prompts", 0, "--out", "again")
    assert len(read(tmp_path / "again/prompts/news.jsonl")) == 50


# ---- files


def test_every_format_gives_the_same_files_and_so_does_a_set_in_two_files(tmp_path):
    raw = [row | {"reference": str(i)} for i, row in enumerate(rated_pairs(120, prompts=40))]
    for row in raw:
        del row["mine"]  # a CSV holds no dict
    raw[0] |= {"chosen": 'a, "b"\nc', "rejected": "12"}
    written = []
    for endings in "jsonl", "jsonl.gz", "json", "parquet", "csv", "csv.gz", "jsonl parquet":
        size = 120 // len(endings.split())
        files = [write(tmp_path / f"{size}_{i}.{ending}", raw[i * size:(i + 1) * size])
                 for i, ending in enumerate(endings.split())]
        run(tmp_path, "--dataset", *files)
        written.append({path: text for path, text in tree(tmp_path / "data").items()})
    assert len(written[0]) == 6 and all(files == written[0] for files in written)


def test_in_a_csv_an_empty_number_is_none_and_a_numeral_in_a_text_column_a_text(tmp_path):
    raw = [GOOD | {"prompt": "7", "confidence": ""}, GOOD | {"prompt": "Why, so?", "confidence": 1}]
    stdout = run(tmp_path, "--dataset", write(tmp_path / "a.csv", raw), "--prompts", "a.csv", *WHOLE)
    assert "left out: 1 train rows" in stdout
    assert prompts_of(tmp_path / "data/prompts/a.jsonl") == {"7", "Why, so?"}


def test_what_load_dataset_reads(tmp_path):
    """A folder stands for a hub id: both go through load_dataset."""
    (tmp_path / "set").mkdir()
    for side in "train", "validation", "test":
        rows = [dict(GOOD, prompt=f"{side} {i}?", rejected=f"No {i}") for i in range(20)]
        write(tmp_path / f"set/{side}.jsonl", rows)

    def kinds(path):
        return {prompt.split()[0] for prompt in prompts_of(tmp_path / path)}
    run(tmp_path, "--dataset", "set", "--prompts", "set", "set:validation", "--out", "a")
    for path, side in (("all/train", "train"), ("all/validation", "validation"), ("prompts/set", "test"),
                       ("prompts/set-validation", "validation")):
        assert kinds(f"a/{path}.jsonl") == {side}
    run(tmp_path, "--dataset", "set:validation", "--out", "b")  # a validation split alone: it is split
    assert kinds("b/all/train.jsonl") == kinds("b/all/validation.jsonl") == {"validation"}
    assert "nope" in run(tmp_path, "--dataset", "set:nope", status=2)

    (tmp_path / "set/README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train_prefs, path: train.jsonl}\n"
        "  - {split: test_prefs, path: test.jsonl}\n---\n")
    assert "set:SPLIT, of train_prefs, test_prefs" in run(tmp_path, "--dataset", "set", status=2)
    run(tmp_path, "--dataset", "set:train_prefs", "set:test_prefs", "--out", "c")
    assert kinds("c/all/train.jsonl") == {"train"} and kinds("c/all/validation.jsonl") == {"test"}


def test_odd_files_that_are_fine(tmp_path):
    """Blank lines, a BOM, lone surrogates, 10 MB in a row; they come out as JSON that is UTF-8."""
    prompts = ["a", "b\ud800", "\ud7ff\u2028é", "long " * 2_000_000]
    lines = [json.dumps(dict(GOOD, prompt=prompt)) for prompt in prompts]
    (tmp_path / "x.jsonl").write_text("\n\n".join(lines) + "\n \n", encoding="utf-8-sig")
    run(tmp_path, "--dataset", "x.jsonl", *WHOLE)
    assert prompts_of(tmp_path / "data/all/train.jsonl") == {"a", "b?", *prompts[2:]}
    write(tmp_path / "x.csv", [{"prompt": "a", "chosen": "b"}, {"prompt": prompts[3], "chosen": "b"}])
    run(tmp_path, "--dataset", "x.csv", *WHOLE)
    assert prompts_of(tmp_path / "data/sft/train.jsonl") == {"a", prompts[3]}
    chosen, rejected = ("one " * 50_000 + word * 10 for word in ("a ", "b "))  # more words would take minutes
    write(tmp_path / "y.jsonl", [{"prompt": "a", "chosen": chosen, "rejected": rejected}])
    run(tmp_path, "--dataset", "y.jsonl", *WHOLE)
    assert read(tmp_path / "data/all/train.jsonl")[0]["edit_distance"] == 0


def test_a_full_disk_touches_nothing(tmp_path):
    """A limit on the size of a file stands for the full disk: of the store, then of an output."""
    write(tmp_path / "raw.jsonl", rated_pairs(120, prompts=60))
    run(tmp_path, "--dataset", "raw.jsonl")
    sizes = [os.path.getsize(tmp_path / f"data/all/{side}.jsonl") for side in ("train", "validation")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in sizes[1], sizes[0] - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            assert "File too large" in run(tmp_path, "--dataset", "raw.jsonl", *WHOLE, status=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# ---- bad input

PAIR = json.dumps(GOOD)
ROW = "x.jsonl, row 1"


def pair(**changes):
    return json.dumps(GOOD | changes)


@pytest.mark.parametrize("content, flags, words", [
    (None, "--dataset absent.jsonl", "absent.jsonl|no file|hub"),
    (None, "--dataset someone/unknown:train", "someone/unknown:train|no file|hub"),
    (None, "--dataset .", ".: no file|data files"),
    (None, "", "--dataset|--prompts"),
    # files
    ("\n \n", "--dataset x.jsonl", "x.jsonl|no rows"),
    (PAIR.encode("utf-16"), "--dataset x.jsonl", "x.jsonl: cannot read it|UTF-8"),
    (PAIR, "--dataset x.jsonl.gz", "x.jsonl.gz: cannot read it|gzip"),
    (gzip.compress(PAIR.encode())[:20] + 40 * b"x", "--dataset x.jsonl.gz", "x.jsonl.gz: cannot read it"),
    ("PAR1 no parquet", "--dataset x.parquet", "x.parquet: cannot read it"),
    ("", "--dataset x.csv", "x.csv|mpty"),
    ("prompt,chosen\na,b,c\n", "--dataset x.csv", "x.csv|columns"),
    # JSON
    (PAIR + "\n{oops\n", "--dataset x.jsonl", "x.jsonl, line 2|not JSON"),
    ('[{"prompt": ', "--prompts x.jsonl", "x.jsonl|not JSON"),
    (10**5 * "[", "--dataset x.jsonl", "x.jsonl: cannot read it|recursion"),
    (PAIR + "\n7\n", "--dataset x.jsonl", "x.jsonl, line 2|object"),
    ("[1]", "--dataset x.jsonl", "x.jsonl, line 1|object"),
    # columns
    ('{"question": "a", "answer": "b"}', "--dataset x.jsonl", "question answer|info summaries|highlights"),
    ('{"prompt": "a", "answer": "b"}', "--dataset x.jsonl", "prompt answer|`chosen`|--prompts"),
    ('{"question": "a", "chosen": "b", "rejected": "c"}', "--dataset x.jsonl", "name its column `prompt`"),
    (PAIR + '\n\n{"prompt": "a", "chosen": "b"}\n', "--dataset x.jsonl", "x.jsonl, row 3: SFT rows|of pairs"),
    ('{"prompt": "a", "chosen": "b"}\n' + PAIR, "--dataset x.jsonl", "x.jsonl, row 2: pairs|of SFT rows"),
    (PAIR + '\n{"mine": 1}', "--dataset x.jsonl", "x.jsonl, row 2: no known schema"),
    # types
    (pair(prompt=7), "--dataset x.jsonl", f"{ROW}|pairs|prompt"),
    (pair(prompt=[7]), "--dataset x.jsonl", f"{ROW}|pairs|prompt"),
    (pair(prompt=[{"role": "wizard", "content": "x"}]), "--dataset x.jsonl", f"{ROW}|role|system"),
    (pair(prompt=[{"role": "user", "content": 3}]), "--dataset x.jsonl", f"{ROW}|content"),
    (pair(rejected=3), "--dataset x.jsonl", f"{ROW}|pairs|rejected"),
    (pair(rejected=[{"role": "assistant"}]), "--dataset x.jsonl", f"{ROW}|'content'"),
    (pair(rejected=[{"role": "assistant", "content": "", "tool_calls": ["f"]}]), "--dataset x.jsonl", ROW),
    (pair(system=7), "--dataset x.jsonl", f"{ROW}|content"),
    (pair(history=[["Hi"]]), "--dataset x.jsonl", ROW),
    (pair(score_chosen="high", score_rejected="low"), "--dataset x.jsonl", ROW),
    (pair(system="Be brief.", prompt=[{"role": "system", "content": "Be long."}]), "--dataset x.jsonl",
     f"{ROW}|beside a system message"),
    (pair(confidence="high"), "--dataset x.jsonl", f"{ROW}|confidence"),
    (pair(confidence=float("inf")), "--dataset x.jsonl", f"{ROW}|confidence"),
    ("prompt,chosen,rejected,confidence\na,b,c,high\n", "--dataset x.csv", "x.csv, row 1|confidence"),
    (json.dumps(comparison(1) | {"choice": 2}), "--dataset x.jsonl", f"{ROW}|choice"),
    ('{"chosen": 1, "rejected": 2}', "--dataset x.jsonl", f"{ROW}|chosen, rejected"),
    ('{"messages": "text"}', "--dataset x.jsonl", f"{ROW}|messages"),
    ('{"prompt": "a", "responses": ["b", "c", "d"]}', "--dataset x.jsonl", f"{ROW}|two texts"),
    # flags
    ('{"prompt": "a"}', "--prompts x.jsonl ./x.jsonl", "--prompts|x, x"),
    ('{"prompt": "a"}', "--prompts x.jsonl --num_prompts -1", "--num_prompts -1"),
    (PAIR, "--dataset x.jsonl ./x.jsonl", "--dataset|twice"),
    (PAIR, "--dataset x.jsonl --validation_fraction 1", "--validation_fraction 1"),
    (PAIR, "--dataset x.jsonl --judge_fraction 1", "--judge_fraction 1"),
    (PAIR, "--dataset x.jsonl --judge_fraction 1e-9", "--judge_fraction 1e-09: |no prompt"),
    ('{"prompt": "a", "chosen": "b"}', "--dataset x.jsonl --judge_fraction 0.5", "--judge_fraction 0.5: |no prompt"),
    (PAIR, "--dataset x.jsonl --out x.jsonl", "--out|x.jsonl"),
    (PAIR, "--dataset data/all/train.jsonl", "data/all/train.jsonl: --out data would overwrite it"),
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


def test_no_training_row_left_is_one_line(tmp_path):
    raw = [comparison(1), comparison(1) | {"split": "valid1"}]
    message = run(tmp_path, "--dataset", write(tmp_path / "raw.jsonl", raw), status=2)
    assert "no training rows are left of the preference sets" in message
