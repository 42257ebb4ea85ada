"""Runs splits.py on small raw files of each schema, and checks its output by other computations."""
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
SETS = [f"{name}/{split}" for name in ("all", "hc_he", "lc_le") for split in ("train", "validation")]
WORDS = "ash bay cob dew elm fen gum hay ivy jet kit log moss nut oak pea".split()


def run(folder, *flags, status=0):
    """Runs splits.py in `folder`, in this process. Bad input must give one line and touch no file."""
    before, out, err, code = tree(folder), io.StringIO(), io.StringIO(), 0
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
    if path.name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.name.endswith(".json"):
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.name.endswith(".csv"):
        with open(path, "w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    else:
        with (gzip.open if path.name.endswith(".gz") else open)(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def read(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_sets(data):
    return {name: read(data / f"{name}.jsonl") for name in SETS}


def distance(left, right):
    """Levenshtein's distance of two token lists by the textbook table, over the longer length."""
    above = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        row = [i]
        for j, b in enumerate(right, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
        above = row
    return above[-1] / max(len(left), len(right))


def comparison(number, confidence, split="train", **info):
    """A raw row of OpenAI's comparisons about post `number`, with random summaries."""
    rng = random.Random(f"{number} {confidence} {split}")
    first = rng.choices(WORDS, k=rng.randint(6, 12))
    changes = 0.1 * rng.randint(1, 9)
    second = [rng.choice(WORDS) if rng.random() < changes else word for word in first] + ["end"]
    post = {"id": f"t3_{split}{number}", "post": f"Post {number} of {split}.\nMore.", "subreddit": "gardens",
            "title": f"Title {number}", "site": None, "article": None}
    summaries = [{"text": " " + " ".join(words), "policy": "ref", "note": None} for words in (first, second)]
    return {"info": post | info, "summaries": summaries, "choice": rng.randint(0, 1), "worker": "w",
            "batch": "batch3", "split": split, "extra": {"confidence": confidence}}


def pairs(count, prompts):
    """Canonical pairs about `prompts` prompts, with a key of the user's own."""
    rng = random.Random(count)
    return [{"prompt": f"Ask {rng.randrange(prompts)}?", "chosen": f"{' '.join(rng.choices(WORDS, k=6))} {i}",
             "rejected": " ".join(rng.choices(WORDS, k=6)), "confidence": rng.randint(1, 9),
             "mine": {"row": i}} for i in range(count)]


def test_openai_comparisons(tmp_path):
    rng = random.Random(0)
    raw = [comparison(rng.randrange(120), rng.choice([None, 1, 2, 3, 4, 5, 6, 7, 8, 9])) for _ in range(500)]
    raw += [comparison(number, 5, f"valid{1 + number % 2}") for number in range(10)]
    raw += [comparison(900, 7, "valid1", post=None, title=None, subreddit=None, article="Some news.\n"),
            comparison(901, 7, title=None), comparison(902, 6, post=None),
            comparison(3, 4, post="Post 3 of valid2.\nMore.")]  # its prompt is one of validation's
    empty, twins = comparison(903, 6), comparison(904, 6)
    empty["summaries"][0]["text"] = " \n"
    twins["summaries"][0]["text"] = twins["summaries"][1]["text"].strip()
    raw += [empty, twins]
    stdout = run(tmp_path, "--dataset", write(tmp_path / "raw.jsonl.gz", raw))
    data = read_sets(tmp_path / "data")

    # every row that stays, found again by its own parse of the raw file
    expected = {}
    for row in raw:
        info, confidence = row["info"], row["extra"]["confidence"]
        if confidence is None or row in (empty, twins) or info["id"] == "t3_train902":
            continue
        prompt = "Article: Some news.\n\nTL;DR:"
        if info["post"]:
            prompt = f"SUBREDDIT: r/gardens\n\nTITLE: {info['title'] or ''}\n\nPOST: {info['post']}\n\nTL;DR:"
        good, bad = row["summaries"][row["choice"]]["text"], row["summaries"][1 - row["choice"]]["text"]
        expected[prompt, good, bad, confidence] = row["split"]
    found = {name: {(row["prompt"], row["chosen"], row["rejected"], row["confidence"]) for row in data[name]}
             for name in SETS}
    assert found["all/validation"] == {pair for pair, split in expected.items() if split != "train"}
    assert found["all/train"] < {pair for pair, split in expected.items() if split == "train"}
    missing = sum(row["extra"]["confidence"] is None for row in raw)
    assert f"without a confidence, left out of every split: {missing} train and 0 validation rows" in stdout
    for why in "without post and article", "with an empty `", "with identical responses", "dropped as":
        assert f"1 {why}" in stdout

    # distances, medians and the strict sides of them
    for name in SETS:
        for row in data[name]:
            edits = distance(row["chosen"].split(), row["rejected"].split())
            assert row["edit_distance"] == pytest.approx(edits, abs=5.1e-5)
            assert row["chosen"][0] == " " and row["chosen"][1] != " " and row["rejected"][0] == " "
    train = data["all/train"]
    confidence = statistics.median(row["confidence"] for row in train)
    edits = statistics.median(row["edit_distance"] for row in train)
    above = [row for row in train if row["confidence"] > confidence and row["edit_distance"] > edits]
    below = [row for row in train if row["confidence"] < confidence and row["edit_distance"] < edits]
    assert len(above) > 20 and data["hc_he/train"] == above
    assert len(below) > 20 and data["lc_le/train"] == below
    for row in data["hc_he/validation"]:
        assert row["confidence"] > confidence and row["edit_distance"] > edits
    for row in data["lc_le/validation"]:
        assert row["confidence"] < confidence and row["edit_distance"] < edits

    # no prompt is on both sides, in any two of the sets
    prompts = {name: {row["prompt"] for row in data[name]} for name in SETS}
    seen = prompts["all/train"] | prompts["hc_he/train"] | prompts["lc_le/train"]
    for name in ("all/validation", "hc_he/validation", "lc_le/validation"):
        assert prompts[name] and not prompts[name] & seen, name
    assert prompts["hc_he/train"] <= prompts["all/train"]

    # Table 5, from the files
    for name in ("all", "hc_he", "lc_le"):
        rows = data[f"{name}/train"]
        confidence = statistics.fmean(row["confidence"] for row in rows)
        edits = statistics.fmean(row["edit_distance"] for row in rows)
        held = len(data[f"{name}/validation"])
        assert f"| {name} | {confidence:.2f} | {edits:.2f} | {len(rows)} | {held} |" in stdout


def test_pairs_keep_their_keys_and_are_split_by_prompt(tmp_path):
    raw = pairs(2000, prompts=400)
    run(tmp_path, "--dataset", write(tmp_path / "raw.jsonl", raw), "--seed", 7)
    data = read_sets(tmp_path / "data")
    rows = data["all/train"] + data["all/validation"]
    for row in rows:
        source = raw[row["mine"]["row"]]
        assert row == source | {"chosen": " " + source["chosen"], "rejected": " " + source["rejected"],
                                "edit_distance": row["edit_distance"]}
    order = [row["mine"]["row"] for row in rows]
    assert sorted(order) == list(range(2000)) and order[:50] != sorted(order[:50])

    def place(prompt):  # where the docstring says a prompt stands in [0, 1)
        return int(hashlib.sha256(f"7 {prompt}".encode()).hexdigest()[:16], 16) / 16**16
    held = {f"Ask {i}?" for i in range(400) if place(f"Ask {i}?") < 0.1}
    assert {row["prompt"] for row in data["all/validation"]} == held & {row["prompt"] for row in raw}
    assert 0.06 < len(data["all/validation"]) / 2000 < 0.14
    for name in ("hc_he", "lc_le"):
        for split in ("train", "validation"):
            whole = data[f"all/{split}"]
            assert data[f"{name}/{split}"] and all(row in whole for row in data[f"{name}/{split}"])


def test_formats_and_runs_agree_and_seeds_differ(tmp_path):
    raw = pairs(300, prompts=60)
    texts = {}
    for number, ending in enumerate(["jsonl", "jsonl.gz", "json", "parquet", "jsonl"]):
        out = tmp_path / str(number)
        run(tmp_path, "--dataset", write(tmp_path / f"raw.{ending}", raw), "--out", out)
        texts[number] = [(out / f"{name}.jsonl").read_bytes() for name in SETS]
    assert all(text == texts[0] for text in texts.values())
    write(tmp_path / "half1.jsonl", raw[:99]), write(tmp_path / "half2.parquet", raw[99:])
    run(tmp_path, "--dataset", "half1.jsonl", "half2.parquet", "--out", "halves")
    assert [(tmp_path / f"halves/{name}.jsonl").read_bytes() for name in SETS] == texts[0]
    run(tmp_path, "--dataset", "raw.jsonl", "--out", "seed1", "--seed", 1)
    zero, one = [{row["prompt"] for row in read(tmp_path / seed / "all/validation.jsonl")}
                 for seed in ("0", "seed1")]
    assert zero != one


def test_ultrafeedback_of_argilla_and_of_trl(tmp_path):
    def talk(question, answer):
        return [{"content": question, "role": "user"}, {"content": answer, "role": "assistant"}]

    argilla = [{"source": "made", "prompt": f"Ask {i}?",
                "chosen": talk(f"Ask {i}?", f" Good {i}.\n"), "chosen-rating": 4.5, "chosen-model": "m",
                "rejected": talk(f"Ask {i}?", f"Bad {i} x."), "rejected-rating": 4.5 - i / 8,
                "rejected-model": "n"} for i in range(24)]
    trl = [{"chosen": row["chosen"], "rejected": row["rejected"], "score_chosen": row["chosen-rating"],
            "score_rejected": row["rejected-rating"]} for row in argilla]
    unlike = dict(trl[0], rejected=talk("Something else?", "Bad."))
    write(tmp_path / "argilla.parquet", argilla), write(tmp_path / "trl.jsonl", trl + [unlike])
    run(tmp_path, "--dataset", "argilla.parquet", "--out", "a")
    stdout = run(tmp_path, "--dataset", "trl.jsonl", "--out", "b")
    assert "24 train rows; dropped: 1 with two different prompts" in stdout
    rows = read(tmp_path / "a/all/train.jsonl") + read(tmp_path / "a/all/validation.jsonl")
    assert rows == read(tmp_path / "b/all/train.jsonl") + read(tmp_path / "b/all/validation.jsonl")
    expected = [{"prompt": [{"role": "user", "content": f"Ask {i}?"}], "chosen": f"Good {i}.",
                 "rejected": f"Bad {i} x.", "confidence": i / 8, "edit_distance": 1.0} for i in range(24)]
    assert sorted(rows, key=lambda row: row["confidence"]) == expected


def test_hh_transcripts(tmp_path):
    head = "\n\nHuman: Hello\n\nthere?\n\nAssistant: Hi.\n\nHuman: Tea {}?\n\nAssistant:"
    raw = [{"chosen": head.format(i) + " Yes,\n\nplease.", "rejected": head.format(i) + f" No {i}."}
           for i in range(20)]
    raw += [{"chosen": head.format(1) + " Yes.", "rejected": head.format(2) + " No."},
            {"chosen": head.format(3) + " ", "rejected": head.format(3) + " No."},
            {"chosen": head.format(4), "rejected": head.format(4).rstrip("Assistant:")},
            {"chosen": "no transcript", "rejected": "at all"}]
    stdout = run(tmp_path, "--dataset", write(tmp_path / "hh.jsonl", raw))
    for why in ("with two different prompts", "with an empty `chosen`", "without an assistant's last turn",
                "without a prompt"):
        assert f"1 {why}" in stdout
    rows = read(tmp_path / "data/all/train.jsonl") + read(tmp_path / "data/all/validation.jsonl")
    assert len(rows) == 20
    for row in rows:
        number = row["rejected"].removeprefix("No ").removesuffix(".")
        assert [(turn["role"], turn["content"]) for turn in row["prompt"]] == [
            ("user", "Hello\n\nthere?"), ("assistant", "Hi."), ("user", f"Tea {number}?")]
        assert row["chosen"] == "Yes,\n\nplease." and "confidence" not in row
    assert not (tmp_path / "data/hc_he").exists() and "no confidences" in stdout


def test_sft_sets_share_prompts_and_held_out_prompts_with_the_pairs(tmp_path):
    write(tmp_path / "pairs.jsonl", [comparison(i, 1 + i % 9) for i in range(200)])
    prompt = "SUBREDDIT: r/gardens\nTITLE: Title {0}\nPOST: Post {0} of train.\nMore.\nTL;DR:"
    write(tmp_path / "sft.parquet", [{"prompt": prompt.format(i), "label": f"label {i}"} for i in range(200)])
    run(tmp_path, "--dataset", "pairs.jsonl")
    run(tmp_path, "--dataset", "sft.parquet")  # a call of its own
    for split in ("train", "validation"):
        pair_prompts = {row["prompt"] for row in read(tmp_path / f"data/all/{split}.jsonl")}
        sft = read(tmp_path / f"data/sft/{split}.jsonl")
        assert {row["prompt"] for row in sft} == pair_prompts
        for row in sft:
            number = row["prompt"].split("TITLE: Title ")[1].split("\n")[0]
            assert row == {"prompt": row["prompt"], "chosen": f" label {number}"}
    write(tmp_path / "answers.jsonl", [{"prompt": f"Q{i}", "response": "R", "who": i} for i in range(9)])
    run(tmp_path, "--dataset", "answers.jsonl", "--validation_fraction", 0, "--out", "none")
    rows = read(tmp_path / "none/sft/train.jsonl")
    rows.sort(key=lambda row: row["who"])
    assert rows == [{"prompt": f"Q{i}", "chosen": " R", "who": i} for i in range(9)]
    assert not (tmp_path / "none/sft/validation.jsonl").exists()


def test_a_validation_split_of_one_kind_is_no_training_data_of_the_other(tmp_path):
    """Prompts of a pair set's own validation split leave sft/train. A user's message counts as its text."""
    raw = [comparison(i, 5) for i in range(60)] + [comparison(i, 5, "valid1") for i in range(20)]
    run(tmp_path, "--dataset", write(tmp_path / "raw.jsonl", raw))
    held, kept = ([row["prompt"] for row in read(tmp_path / f"data/all/{split}.jsonl")]
                  for split in ("validation", "train"))
    posts = [f"SUBREDDIT: r/gardens\n\nTITLE: Title {i}\n\nPOST: Post {i} of train.\nMore.\n\nTL;DR:"
             for i in range(60)]
    own = [{"prompt": [{"role": "user", "content": prompt}], "chosen": f"Answer {i}."}
           for i, prompt in enumerate(held + posts)]
    run(tmp_path, "--dataset", tmp_path / "raw.jsonl", write(tmp_path / "sft.jsonl", own))
    train = {row["prompt"][0]["content"] for row in read(tmp_path / "data/sft/train.jsonl")}
    assert len(held) == 20 and not train & set(held)
    assert train == set(kept) < set(posts)


@pytest.mark.parametrize("seed", range(4))
def test_tiny_sets_share_no_prompt_either(tmp_path, seed):
    """No hash falls below the fraction: one prompt of each set is held out. It leaves the other set too."""
    tiny = [{"prompt": f"Ask {i}?", "chosen": "yes", "rejected": "no"} for i in range(3)]
    write(tmp_path / "pairs.jsonl", tiny)
    write(tmp_path / "sft.jsonl", [{"prompt": f"Ask {i}?", "chosen": "yes"} for i in range(1, 9)])
    run(tmp_path, "--dataset", "pairs.jsonl", "sft.jsonl", "--validation_fraction", 1e-9, "--seed", seed)
    train, held = [[{row["prompt"] for row in read(tmp_path / f"data/{name}/{split}.jsonl")}
                    for name in ("all", "sft")] for split in ("train", "validation")]
    assert all(train) and all(held)
    assert not set.union(*train) & set.union(*held)


def test_rows_of_trl(tmp_path):
    """`prompt` and `completion`, as text or messages, and `messages`; the last turn is the response."""
    user, answer = {"role": "user", "content": "Ask?"}, {"role": "assistant", "content": " Answer."}
    write(tmp_path / "a.jsonl", [{"prompt": "Ask?", "completion": " Answer.", "mine": 1}])
    write(tmp_path / "b.jsonl", [{"prompt": [user], "completion": [answer]}])
    talks = [user, answer], [user, answer, user, answer], [user], [answer]
    write(tmp_path / "c.parquet", [{"prompt": "Ask?", "messages": talk} for talk in talks])
    stdout = run(tmp_path, "--dataset", "a.jsonl", "b.jsonl", "c.parquet", "--validation_fraction", 0)
    rows = read(tmp_path / "data/sft/train.jsonl")
    assert {"prompt": "Ask?", "chosen": " Answer.", "mine": 1} in rows
    assert rows.count({"prompt": [user], "chosen": "Answer."}) == 2
    assert {"prompt": [user, {"role": "assistant", "content": " Answer."}, user], "chosen": "Answer."} in rows
    assert len(rows) == 4 and "1 without an assistant's last turn, 1 with an empty prompt" in stdout


def test_csv(tmp_path):
    raw = [{key: row[key] for key in row if key != "mine"} for row in pairs(300, 60)]
    raw[0] |= {"chosen": 'a, "b"\nc', "rejected": "12"}
    raw = [row | {"reference": str(k)} for k, row in enumerate(raw)]
    run(tmp_path, "--dataset", write(tmp_path / "a.jsonl", raw), "--out", "a")
    run(tmp_path, "--dataset", write(tmp_path / "b.csv", raw), "--out", "b")
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress((tmp_path / "b.csv").read_bytes()))
    run(tmp_path, "--dataset", "c.csv.gz", "--out", "c")
    a, b, c = [[(tmp_path / out / f"{name}.jsonl").read_bytes() for name in SETS] for out in "abc"]
    assert a == b == c
    raw[1]["confidence"] = ""
    assert "left out of every split: 1 train" in run(tmp_path, "--dataset", write(tmp_path / "d.csv", raw))
    run(tmp_path, "--prompts", write(tmp_path / "e.csv", [{"prompt": "7"}, {"prompt": "Why, so?"}]))
    assert {row["prompt"] for row in read(tmp_path / "data/prompts/e.jsonl")} == {"7", "Why, so?"}


def test_what_load_dataset_reads(tmp_path):
    """A folder stands for a hub id: both go through load_dataset."""
    for split in "train", "validation", "test":
        (tmp_path / "set").mkdir(exist_ok=True)
        write(tmp_path / f"set/{split}.jsonl",
              [{"prompt": f"{split} {i}?", "chosen": "yes", "rejected": f"no {i}"} for i in range(20)])

    def kinds(path):
        return {row["prompt"].split()[0] for row in read(tmp_path / path)}
    run(tmp_path, "--dataset", "set", "--prompts", "set", "set:validation", "--out", "a")
    for path, split in (("all/train", "train"), ("all/validation", "validation"), ("prompts/set", "test"),
                        ("prompts/set-validation", "validation")):
        assert kinds(f"a/{path}.jsonl") == {split}
    run(tmp_path, "--dataset", "set:validation", "--out", "b")  # a validation split alone: it is split
    assert kinds("b/all/train.jsonl") == kinds("b/all/validation.jsonl") == {"validation"}
    assert "nope" in run(tmp_path, "--dataset", "set:nope", status=2)

    (tmp_path / "set/README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train_prefs, path: train.jsonl}\n"
        "  - {split: test_prefs, path: test.jsonl}\n---\n")
    assert "set:SPLIT, of train_prefs, test_prefs" in run(tmp_path, "--dataset", "set", status=2)
    run(tmp_path, "--dataset", "set:train_prefs", "set:test_prefs", "--out", "c")
    assert kinds("c/all/train.jsonl") == {"train"} and kinds("c/all/validation.jsonl") == {"test"}


def test_the_space_before_a_response(tmp_path):
    turns = [{"role": "user", "content": "Talk"}]
    raw = [{"prompt": prompt, "chosen": "\n yes\n", "rejected": "no ", "reference": "  r"}
           for prompt in ("Text:", "Text: ", "Text\n", turns)]
    run(tmp_path, "--dataset", write(tmp_path / "raw.jsonl", raw), "--validation_fraction", 0)
    rows = {json.dumps(row["prompt"]): row for row in read(tmp_path / "data/all/train.jsonl")}
    for prompt, space in ("Text:", " "), ("Text: ", ""), ("Text\n", ""), (turns, ""):
        row = rows[json.dumps(prompt)]
        texts = [row["chosen"], row["rejected"], row["reference"]]
        assert texts == [space + "yes", space + "no", space + "r"]


def test_prompt_sets(tmp_path):
    write(tmp_path / "news.jsonl.gz",
          [{"article": f"News {i}.", "highlights": f"One {i} .\nTwo .", "id": f"a{i}"} for i in range(50)])
    write(tmp_path / "alpaca.json", 2 * [
        {"instruction": f"Do {i}", "output": f"Done {i}", "dataset": f"set {i % 2}"} for i in range(30)])
    write(tmp_path / "plain.parquet", [{"prompt": f"Plain {i}"} for i in range(5)])
    write(tmp_path / "pairs.jsonl", [dict(row, id=i) for i, row in enumerate(pairs(20, prompts=6))])
    flags = ["--prompts", "news.jsonl.gz", "alpaca.json", "plain.parquet", "pairs.jsonl"]
    run(tmp_path, *flags, "--num_prompts", 20)
    news, alpaca, plain, paired = [read(tmp_path / f"data/prompts/{name}.jsonl")
                                   for name in ("news", "alpaca", "plain", "pairs")]
    assert len(news) == len({row["prompt"] for row in news}) == 20
    for row in news:
        number = row["id"][1:]
        assert row == {"prompt": f"Article: News {number}.\n\nTL;DR:", "reference": f" One {number} . Two .",
                       "dataset": "news", "id": f"a{number}"}
    order = [int(row["id"][1:]) for row in news]
    assert order != sorted(order)
    assert len({row["reference"] for row in alpaca}) == 20
    for row in alpaca:
        number = row["reference"].removeprefix("Done ")
        assert row == {"prompt": [{"role": "user", "content": f"Do {number}"}], "reference": f"Done {number}",
                       "dataset": f"set {int(number) % 2}"}  # AlpacaEval's own, e.g. "koala"
    assert sorted(row["prompt"] for row in plain) == [f"Plain {i}" for i in range(5)]
    assert all(set(row) == {"prompt", "dataset"} for row in plain)
    assert len(paired) == len({row["prompt"] for row in paired}) == 6
    source = pairs(20, prompts=6)
    for row in paired:
        pair = source[row["id"]]
        assert row["prompt"] == pair["prompt"] and row["reference"] == " " + pair["chosen"] and len(row) == 4
    run(tmp_path, "--prompts", "news.jsonl.gz", "--num_prompts", 20, "--out", "again")  # alone: the same
    assert read(tmp_path / "again/prompts/news.jsonl") == news
    run(tmp_path, "--prompts", "news.jsonl.gz", "--num_prompts", 0, "--out", "whole")
    assert len(read(tmp_path / "whole/prompts/news.jsonl")) == 50


def test_unlabelled_pairs(tmp_path):
    raw = [{"prompt": f"Ask {i}?", "responses": [f"First {i}.", f"Last {i}."], "mine": i} for i in range(20)]
    stdout = run(tmp_path, "--dataset", write(tmp_path / "raw.jsonl", raw), "--prompts", "raw.jsonl")
    assert "no labels; let precompute_rewards.py --relabel" in stdout
    rows = read(tmp_path / "data/all/train.jsonl") + read(tmp_path / "data/all/validation.jsonl")
    assert sorted(rows, key=lambda row: row["mine"]) == [
        {"prompt": f"Ask {i}?", "mine": i, "chosen": f" First {i}.", "rejected": f" Last {i}.",
         "edit_distance": 0.5} for i in range(20)]
    assert all("reference" not in row for row in read(tmp_path / "data/prompts/raw.jsonl"))


def test_edit_distance_between_post_and_response(tmp_path):
    write(tmp_path / "raw.jsonl", [comparison(i, 1 + i % 9) for i in range(40)])
    run(tmp_path, "--dataset", "raw.jsonl", "--edit_distance", "texts", "--validation_fraction", 0)
    for row in read(tmp_path / "data/all/train.jsonl"):
        number = row["prompt"].split("TITLE: Title ")[1].split("\n")[0]
        texts = [f"Post {number} of train. More.{row[key]}".split() for key in ("chosen", "rejected")]
        assert row["edit_distance"] == pytest.approx(distance(*texts), abs=5.1e-5)


def test_a_set_without_sides_writes_no_sides(tmp_path):
    run(tmp_path, "--dataset", write(tmp_path / "raw.jsonl", pairs(60, prompts=20)))
    assert (tmp_path / "data/hc_he/train.jsonl").exists()
    flat = [dict(row, confidence=5) for row in pairs(60, prompts=20)]
    stdout = run(tmp_path, "--dataset", write(tmp_path / "flat.jsonl", flat))
    assert "hc_he stays empty" in stdout and "| hc_he | - | - | 0 | 0 |" in stdout
    assert (tmp_path / "data/all/train.jsonl").exists() and not (tmp_path / "data/hc_he/train.jsonl").exists()


def test_odd_files_that_are_fine(tmp_path):
    """Blank lines, a BOM, lone surrogates, 10 MB in a row; they come out as JSON that is UTF-8."""
    prompts = ["a", "b\ud800", "\ud7ff\u2028é", "long " * 2_000_000]
    lines = [json.dumps({"prompt": prompt, "chosen": "b", "rejected": "c"}) for prompt in prompts]
    (tmp_path / "x.jsonl").write_text("\n\n".join(lines) + "\n \n", encoding="utf-8-sig")
    run(tmp_path, "--dataset", "x.jsonl", "--validation_fraction", 0)
    rows = read(tmp_path / "data/all/train.jsonl")
    assert {row["prompt"] for row in rows} == {"a", "b?", *prompts[2:]}
    write(tmp_path / "x.csv", [{"prompt": "a", "chosen": "b"}, {"prompt": prompts[3], "chosen": "b"}])
    run(tmp_path, "--dataset", "x.csv", "--validation_fraction", 0)
    assert {row["prompt"] for row in read(tmp_path / "data/sft/train.jsonl")} == {"a", prompts[3]}
    chosen, rejected = ("one " * 50_000 + word * 10 for word in ("a ", "b "))  # more words would take minutes
    run(tmp_path, "--dataset", write(tmp_path / "y.jsonl", [
        {"prompt": "a", "chosen": chosen, "rejected": rejected}]), "--validation_fraction", 0)
    assert read(tmp_path / "data/all/train.jsonl")[0]["edit_distance"] == 0


def test_a_full_disk_touches_nothing(tmp_path):
    """A limit on the size of a file stands for the full disk: of the store, then of an output."""
    write(tmp_path / "raw.jsonl", pairs(300, prompts=60))
    run(tmp_path, "--dataset", "raw.jsonl")
    sizes = [os.path.getsize(tmp_path / f"data/{name}.jsonl") for name in ("all/train", "all/validation")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in sizes[1], sizes[0] - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            message = run(tmp_path, "--dataset", "raw.jsonl", "--seed", 1, status=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "File too large" in message


PAIR = '{"prompt": "a", "chosen": "b", "rejected": "c"}'
COMPARISON = ('{"info": {"post": "a", "subreddit": "b"}, "summaries": [{"text": "a"}, {"text": "b"}], '
              '"choice": 0}')
ROW = "x.jsonl, row 1"


@pytest.mark.parametrize("content, flags, words", [
    (None, "--dataset absent.jsonl", "absent.jsonl|no file|hub"),
    (None, "--dataset someone/unknown:train", "someone/unknown:train|no file|hub"),
    (None, "--prompts tatsu-lab/alpaca_eval", "tatsu-lab/alpaca_eval|hub"),
    (None, "--dataset .", ".: no file|data files"),
    (None, "", "--dataset|--prompts"),
    # files
    ("", "--dataset x.jsonl", "x.jsonl|no rows"),
    ("\n \n", "--dataset x.jsonl", "x.jsonl|no rows"),
    (PAIR.encode("utf-16"), "--dataset x.jsonl", "x.jsonl: cannot read it|UTF-8"),
    (PAIR.replace("a", "\xe9").encode("latin-1"), "--dataset x.jsonl", "x.jsonl: cannot read it|UTF-8"),
    (gzip.compress(PAIR.encode()), "--dataset x.jsonl", "x.jsonl: cannot read it|UTF-8"),
    (PAIR, "--dataset x.jsonl.gz", "x.jsonl.gz: cannot read it|gzip"),
    (gzip.compress(PAIR.encode())[:-9], "--dataset x.jsonl.gz", "x.jsonl.gz: cannot read it"),
    (gzip.compress(PAIR.encode())[:20] + 40 * b"x", "--dataset x.jsonl.gz", "x.jsonl.gz: cannot read it"),
    ("PAR1 no parquet", "--dataset x.parquet", "x.parquet: cannot read it"),
    ("", "--dataset x.csv", "x.csv|mpty"),
    ("prompt,chosen\na,b,c\n", "--dataset x.csv", "x.csv|columns"),
    ("prompt,chosen\n", "--dataset x.csv", "x.csv|no rows"),
    # JSON
    (PAIR + "\n{oops\n", "--dataset x.jsonl", "x.jsonl, line 2|not JSON"),
    ('[{"prompt": ', "--prompts x.jsonl", "x.jsonl|not JSON"),
    (10**5 * "[", "--dataset x.jsonl", "x.jsonl: cannot read it|recursion"),
    (PAIR + "\n7\n", "--dataset x.jsonl", "x.jsonl, line 2|object"),
    ("null", "--dataset x.jsonl", "x.jsonl, line 1|object"),
    ("[1]", "--dataset x.jsonl", "x.jsonl, line 1|object"),
    # columns
    ('{"question": "a", "answer": "b"}', "--dataset x.jsonl", "question answer|info summaries|highlights"),
    ('{"prompt": "a"}', "--dataset x.jsonl", "x.jsonl|--prompts"),
    ('{"prompt": "a", "answer": "b"}', "--dataset x.jsonl", "prompt answer|`chosen`|--prompts"),
    ('{"question": "a", "chosen": "b", "rejected": "c"}', "--dataset x.jsonl", "name its column `prompt`"),
    (PAIR + '\n\n{"prompt": "a", "chosen": "b"}\n', "--dataset x.jsonl", "x.jsonl, row 3|'rejected'"),
    # types
    (PAIR.replace('"a"', "null"), "--dataset x.jsonl", "x.jsonl|no row|empty prompt"),
    (PAIR.replace('"a"', "7"), "--dataset x.jsonl", f"{ROW}|pairs|prompt"),
    (PAIR.replace('"a"', "[7]"), "--dataset x.jsonl", f"{ROW}|pairs|prompt"),
    (PAIR.replace('"a"', '[{"role": "wizard", "content": "x"}]'), "--dataset x.jsonl", f"{ROW}|role|system"),
    (PAIR.replace('"a"', '[{"role": "user", "content": 3}]'), "--dataset x.jsonl", f"{ROW}|content"),
    (PAIR.replace('"c"', "3"), "--dataset x.jsonl", f"{ROW}|pairs|rejected"),
    (PAIR.replace('"c"', '[{"role": "assistant"}]'), "--dataset x.jsonl", f"{ROW}|'content'"),
    (PAIR.replace('"c"', '" "'), "--dataset x.jsonl", "x.jsonl|no row|empty `rejected`"),
    (PAIR.replace('"c"', '" b"'), "--dataset x.jsonl", "x.jsonl|no row|identical"),
    (PAIR[:-1] + ', "confidence": "high"}', "--dataset x.jsonl", f"{ROW}|confidence"),
    (PAIR[:-1] + ', "confidence": Infinity}', "--dataset x.jsonl", f"{ROW}|confidence"),
    ("prompt,chosen,rejected,confidence\na,b,c,high\n", "--dataset x.csv", "x.csv, row 1|confidence"),
    (COMPARISON.replace("0}", "2}"), "--dataset x.jsonl", f"{ROW}|choice"),
    (COMPARISON.replace('{"post": "a", "subreddit": "b"}', "null"), "--dataset x.jsonl", f"{ROW}|info"),
    ('{"chosen": 1, "rejected": 2}', "--dataset x.jsonl", f"{ROW}|chosen, rejected"),
    ('{"messages": "text"}', "--dataset x.jsonl", f"{ROW}|messages"),
    (PAIR.replace('"b"', '[{"content": "a"}, {"content": "b"}, {"content": "c"}]'), "--dataset x.jsonl",
     "x.jsonl|with turns in `chosen` that the prompt lacks"),
    ('{"prompt": "a", "responses": ["b", "c", "d"]}', "--dataset x.jsonl", f"{ROW}|two texts"),
    ('{"prompt": "a", "responses": "bc"}', "--dataset x.jsonl", f"{ROW}|two texts"),
    # flags
    ('{"prompt": "a"}', "--prompts x.jsonl ./x.jsonl", "--prompts|x, x"),
    ('{"prompt": "a"}', "--prompts x.jsonl --num_prompts -1", "--num_prompts -1"),
    (PAIR, "--dataset x.jsonl ./x.jsonl", "--dataset|twice"),
    (PAIR, "--dataset x.jsonl --validation_fraction 1", "--validation_fraction 1"),
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


def test_preference_sets_of_two_schemas_do_not_mix(tmp_path):
    write(tmp_path / "a.jsonl", pairs(9, prompts=9))
    write(tmp_path / "b.jsonl", [comparison(i, 5) for i in range(9)])
    assert "several schemas" in run(tmp_path, "--dataset", "a.jsonl", "b.jsonl", status=2)
