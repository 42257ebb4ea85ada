"""Turns raw preference sets into data/{all,hc_he,lc_le}/{train,validation}.jsonl, and prints Table 5.
Turns SFT sets into data/sft/{train,validation}.jsonl, and prompt sets into data/prompts/NAME.jsonl.

    python splits.py --dataset openai/summarize_from_feedback CarperAI/openai_summarize_tldr
    python splits.py --dataset my_pairs.jsonl.gz my_sft.csv trl-lib/tldr-preference:validation --seed 0
    python splits.py --prompts abisee/cnn_dailymail data/all/validation.jsonl --num_prompts 500

In:  .jsonl, .json, .csv (all also as .gz) and .parquet files, hub ids, and folders that load_dataset reads.
     SCHEMAS lists the columns they may have. `id:split` reads one split of a hub id or folder;
     otherwise raw_rows picks. A split called val..., dev... or test... is a validation split.
Out: a JSON row a line. `prompt` is text or a list of {"role", "content"} messages, and `chosen` is text. A
     pair also has `rejected`, `edit_distance` (0-1) and, where its set has one, `confidence`. Other keys stay
     if the row came in this form. A response to plain text starts with one space (none if the prompt ends in
     white space), so prompt + response is the text. A response to messages starts with none.

hc_he has the pairs above both medians of all/train, of confidence and edit distance; lc_le those below both.
- Train and validation share no prompt. A prompt is held out if a hash of --seed and its text falls below
  --validation_fraction. So it is on the same side in every set, and in every call with these two flags. (If
  no prompt of a tiny set falls below, one is held out, in this call alone.)
- A validation split that a set brings is all/validation. Its prompts leave every train set. hc_he and lc_le
  still hold out prompts of the train rows. These leave all/train and sft/train too.
- A set with confidences loses its rows without one. A set without confidences becomes `all` alone.
tests/PAPER.md has the reasons, and the other places where the paper leaves a choice.
"""
import argparse
import gzip
import hashlib
import json
import os
import random
import re
import statistics
import sys
import tempfile
import zlib
from collections import Counter, namedtuple

from rapidfuzz.distance import Levenshtein
from tqdm import tqdm


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("input: at least one of").add_argument
    add("--dataset", nargs="+", default=[], metavar="FILE_OR_ID",
        help="preference and SFT sets: files, hub ids, id:split. Those of a kind are put together; "
             "preference sets must share a schema, as confidences differ in scale")
    add("--prompts", nargs="+", default=[], metavar="FILE_OR_ID",
        help="sets with prompts to answer; of a hub set its test split, where it has one. `reference` is the "
             "set's answer, of a pair its `reference`, or the chosen one")
    add = parser.add_argument_group("output (default)").add_argument
    add("--out", default="data", help="folder to write to, with room for all rows twice (%(default)s)")
    add("--validation_fraction", type=float, default=0.1, help="share of the prompts held out (%(default)s)")
    add("--num_prompts", type=int, default=1000, help="random prompts of a prompt set, 0: all (%(default)s)")
    add("--seed", type=int, default=0, help="picks held-out and random prompts, and the order (%(default)s)")
    add("--edit_distance", default="responses", choices=["responses", "texts"],
        help="of the responses, or of post + response, which gives Table 5's means (%(default)s)")
    args = parser.parse_args()
    if not args.dataset and not args.prompts:
        fail("nothing to do; name sets after --dataset or --prompts")
    if len(set(map(os.path.realpath, args.dataset))) < len(args.dataset):
        fail("--dataset: a set is named twice; name it once")
    if not 0 <= args.validation_fraction < 1:
        fail(f"--validation_fraction {args.validation_fraction}: give a share of at least 0 and below 1")
    if args.num_prompts < 0:
        fail(f"--num_prompts {args.num_prompts}: give a number of prompts, or 0 for all")
    labels = [os.path.basename(os.path.normpath(name)).replace(":", "-") for name in args.prompts]
    labels = [re.sub(r"(\.(jsonl|json|csv|parquet|gz))+$", "", label) for label in labels]
    if len(set(labels)) < len(labels):
        fail(f"--prompts: two sets would share a file ({', '.join(labels)}); rename one, or use two --out")
    args.prompts = dict(zip(labels, args.prompts))
    return args


def main():
    args = parse_args()
    os.makedirs(args.out, exist_ok=True)
    store = tempfile.TemporaryFile(dir=args.out)  # of all rows; it has no name, and goes with the program

    # read: the sets of a kind are put together
    pairs, sft, schemas = {"train": [], "validation": []}, {"train": [], "validation": []}, set()
    for name in args.dataset:
        schema, rows = read_set(name, args, store)
        schemas |= {schema} & PAIRS
        for split in rows:
            (pairs if schema in PAIRS else sft)[split] += rows[split]
    if len(schemas) > 1:
        fail(f"--dataset: several schemas of pairs ({', '.join(sorted(schemas))}); give each its own --out")

    # split: train and validation share no prompt, and `own` prompts stay out of training
    for kind in (pairs, sft):
        if not kind["train"]:  # a validation split that comes alone is split like any other set
            kind["train"], kind["validation"] = kind["validation"], []
    own = {row.prompt for kind in (pairs, sft) for row in kind["validation"]}
    rated = {split: [row for row in rows if row.confidence is not None] for split, rows in pairs.items()}
    if any(rated.values()) and rated != pairs:
        missing = " and ".join(f"{len(pairs[split]) - len(rated[split]):,} {split}" for split in pairs)
        print(f"without a confidence, left out of every split: {missing} rows")
        pairs = rated
    fresh = [{row.prompt for row in kind["train"]} - own for kind in (pairs, sft)]
    held = {prompt for prompts in fresh for prompt in prompts if prompt / 2**64 < args.validation_fraction}
    for number, prompts in enumerate(fresh):  # one at least; if it can, it spares the set before
        if args.validation_fraction > 0 and len(prompts) > 1 and not prompts & held:
            held.add(min(prompts.difference(*fresh[:number]) or prompts))
    files = {}  # path -> rows
    for kind, rows in ("preference sets", pairs), ("SFT sets", sft):
        if not any(rows.values()):
            continue
        for split in rows.values():
            random.Random(args.seed).shuffle(split)
        fresh = [row for row in rows["train"] if row.prompt not in own]
        train = [row for row in fresh if row.prompt not in held]
        out = [row for row in fresh if row.prompt in held]
        if own:
            print(f"{kind}: of {len(rows['train']):,} train rows, {len(out):,} held out by prompt, "
                  f"{len(rows['train']) - len(fresh):,} dropped as a validation split has their prompt")
        if not train:
            fail(f"--dataset: no training rows are left of the {kind}; lower --validation_fraction, or "
                 "give confidences to the train rows too")
        validation = rows["validation"] or out
        files |= preference_splits(train, out, validation) if rows is pairs else {
            "sft/train.jsonl": train, "sft/validation.jsonl": validation}
    for label, name in args.prompts.items():
        unique = {}
        for row in sum(read_set(name, args, store, label)[1].values(), []):
            unique.setdefault(row.prompt, row)
        count = min(args.num_prompts or len(unique), len(unique))
        files[f"prompts/{label}.jsonl"] = random.Random(args.seed).sample(list(unique.values()), count)

    # write: all files are whole before the first takes its place. A file of an earlier call that has no rows
    # now goes, as sets would mix
    files = {os.path.join(args.out, path): rows for path, rows in files.items()}
    for name in (*args.dataset, *args.prompts.values()):
        if os.path.realpath(name) in map(os.path.realpath, files):
            fail(f"{name}: --out {args.out} would overwrite it; give another --out")
    try:
        for path, rows in files.items():
            if rows:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path + ".partial", "wb") as file:
                    for row in rows:
                        store.seek(row.start)
                        file.write(store.readline())
    except OSError:
        for path in filter(os.path.exists, [path + ".partial" for path in files]):
            os.remove(path)
        raise
    for path, rows in files.items():
        if rows:
            os.replace(path + ".partial", path)
            print(f"{path}: {len(rows):,} rows")
        elif os.path.exists(path):
            os.remove(path)
            print(f"{path}: no rows; removed the file of an earlier call")


def read_set(name, args, store, label=None):
    """(schema, {"train": rows, "validation": rows}) of a set; prints what was read and dropped. With a label
    its rows are those of a prompt set."""
    schema, rows, dropped = None, {"train": [], "validation": []}, Counter()
    for split, number, raw in tqdm(raw_rows(name, label), desc=name, unit=" rows", delay=1, disable=None):
        if schema is None:
            schema = next((kind for kind in SCHEMAS if set(SCHEMAS[kind][0].split()) <= set(raw)), None)
            schema = "prompts" if schema == "unlabelled pairs" and label else schema
        if schema is None:
            known = "; ".join(f"{kind}: {columns}" for kind, (columns, _) in SCHEMAS.items())
            fail(f"{name}: no known schema has its columns ({' '.join(raw)}); rename them to one of: {known}")
        if schema == "prompts" and not label:
            fail(f"{name}: no column `chosen` ({' '.join(raw)}); rename one, or give prompts to --prompts")
        columns, convert = SCHEMAS[schema]
        try:
            row = convert({column: raw[column] for column in columns.split()} | raw)  # KeyError if one lacks
            row = row if isinstance(row, str) else clean(row, args.edit_distance)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}; give it {columns.replace(' ', ', ')}"
            fail(f"{name}, row {number}: not a row of the set's {schema} ({reason})")
        if isinstance(row, str):
            dropped[row] += 1
            continue
        if label:
            answer = row.get("reference", row.get("chosen"))
            row = {"prompt": row["prompt"], "reference": answer, "dataset": raw.get("dataset") or label,
                   "id": row.get("id")}
            row = {key: value for key, value in row.items() if value is not None}
        rows[split].append(add(store, row, args.seed))
    reasons = ", ".join(f"{count:,} {why}" for why, count in dropped.items()) or "none"
    counts = " and ".join(f"{len(rows[split]):,} {split}" for split in rows if rows[split])
    if not counts:
        fail(f"{name}: " + (f"no row of it can be used: {reasons}" if dropped else "it holds no rows"))
    print(f"{name} ({schema}): {counts} rows; dropped: {reasons}")
    if schema == "unlabelled pairs":
        print(f"{name}: these pairs carry no labels; let precompute_rewards.py --relabel order them")
    return schema, rows


# load_dataset runs no scripts: it reads two sets from the hub's own parquet files and the script's JSON.
OPENAI = "hf://datasets/openai/summarize_from_feedback@refs/convert/parquet/comparisons/{}/*.parquet"
ALPACA = "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json"
HUB = {
    "abisee/cnn_dailymail": {"name": "3.0.0"},
    "tatsu-lab/alpaca_eval": {"path": "json", "data_files": {"eval": ALPACA}},
    "openai/summarize_from_feedback": {"path": "parquet", "data_files": {
        split: OPENAI.format(split) for split in ("train", "validation")}},
}


def raw_rows(name, prompts):
    """Yields (train or validation, row number, raw row) of a file or of what load_dataset gives."""
    if os.path.isfile(name):
        for number, raw in file_rows(name):
            if not isinstance(raw, dict):
                fail(f"{name}, line {number}: not a JSON object; write one object a row")
            # the raw files of OpenAI's comparisons name each row's split: train, valid1, valid2
            held_out = "summaries" in raw and str(raw.get("split")).startswith("valid")
            yield "validation" if held_out else "train", number, raw
        return
    path, _, wanted = name.partition(":")
    try:
        from datasets import load_dataset  # here, as the import takes seconds
        splits = load_dataset(**({"path": path} | HUB.get(path, {})), split=wanted or None)
    except Exception as error:  # the hub client's failures have no class in common
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        fail(f"{name}: no file, and the hub does not give it ({reason}); mend the name or the connection")
    splits = {wanted: splits} if wanted else splits
    if len(splits) > 1:
        held_out = [split for split in ("validation", "valid", "val", "dev", "test") if split in splits]
        tests = ["test"] * ("test" in splits) + [*held_out, "train"]
        picked = tests[:1] if prompts else ["train", *held_out[:1]]
        if picked[0] not in splits:
            fail(f"{name}: it has no split `train`; name one as {name}:SPLIT, of {', '.join(splits)}")
        splits = {split: splits[split] for split in picked}
    for split, rows in splits.items():
        side = "validation" if split.startswith(("val", "dev", "test")) and not prompts else "train"
        yield from ((side, number, raw) for number, raw in enumerate(rows, 1))


def file_rows(path):
    """Yields (row number, row) of a parquet or CSV file or a JSON array, (line number, row) of JSON lines."""
    try:
        if path.endswith(".parquet"):
            import pyarrow.parquet  # here, as JSON needs none of it
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(1000)
        elif path.endswith((".csv", ".csv.gz")):
            from pyarrow import csv
            # in these columns 12 is a text; in the others it is a number, and nothing is None
            texts = {column: "string" for columns, _ in SCHEMAS.values()
                     for column in [*columns.split(), "reference"] if "rating" not in column}
            batches = csv.read_csv(  # a block holds the longest row, and decides what is a number
                path, csv.ReadOptions(block_size=2**26), csv.ParseOptions(newlines_in_values=True),
                convert_options=csv.ConvertOptions(column_types=texts)).to_batches(1000)
        else:
            with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
                for number, line in enumerate(file, 1):
                    if number == 1 and line.startswith("["):
                        yield from enumerate(json.loads(line + file.read()), 1)
                    elif line.strip():
                        yield number, json.loads(line)
            return
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except json.JSONDecodeError as error:
        fail(f"{path}, line {number}: not JSON ({error}); write one JSON object a line, or one array of them")
    except (OSError, EOFError, zlib.error, ValueError, NotImplementedError, RecursionError) as error:
        reason = str(error).split("\n")[0]
        fail(f"{path}: cannot read it ({reason}); name a UTF-8 JSON or CSV file, or a parquet file")


# Raw row -> row in our form, or (a str) why it is dropped
ARTICLE = "Article: {}\n\nTL;DR:"
TLDR = "SUBREDDIT: r/{}\n\nTITLE: {}\n\nPOST: {}\n\nTL;DR:"  # OpenAI's query format


def openai_row(raw):
    info, choice, text = raw["info"], raw["choice"], [summary["text"] for summary in raw["summaries"]]
    if info.get("post"):
        parts = info["subreddit"], info.get("title") or "", info["post"]
        prompt = TLDR.format(*map(str.strip, parts))
    elif info.get("article"):  # the validation split's CNN/DM batches
        prompt = ARTICLE.format(info["article"].strip())
    else:
        return "without post and article"
    row = {"prompt": prompt, "chosen": text[choice], "rejected": text[1 - choice],
           "confidence": (raw.get("extra") or {}).get("confidence"),
           "id": info.get("id"), "batch": raw.get("batch")}
    return {key: value for key, value in row.items() if value is not None}


def unlabelled_row(raw):
    """Two responses in the order of the file. The Oracle says later which of them is the chosen one."""
    responses = raw.pop("responses")
    if not isinstance(responses, list) or len(responses) != 2:
        raise TypeError("`responses` is not a list of two texts")
    return raw | {"chosen": responses[0], "rejected": responses[1]}


def conversation_row(raw):
    """Two conversations that part at their last turn: message lists (trl-lib) or transcripts (HH)."""
    talks = []
    for talk in (raw["chosen"], raw["rejected"]):
        if isinstance(talk, str):  # splits into ["", "Human", " ...", "Assistant", " ..."]
            start, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + talk.lstrip())
            if start.strip() or not parts:
                return "without a prompt (name its column `prompt`, or make the texts HH's transcripts)"
            talk = [{"role": "user" if who == "Human" else "assistant", "content": text.strip()}
                    for who, text in zip(parts[::2], parts[1::2])]
        talks.append(talk)
    if not all(talk and talk[-1]["role"] == "assistant" for talk in talks):
        return "without an assistant's last turn"
    if talks[0][:-1] != talks[1][:-1]:
        return "with two different prompts"
    row = {"prompt": talks[0][:-1], "chosen": talks[0], "rejected": talks[1]}
    return rated_row(row, raw.get("score_chosen"), raw.get("score_rejected"))


def rated_row(row, better, worse):
    """A pair with the gap of its two ratings as the confidence; None where a rating is missing."""
    gap = None if better is None or worse is None else better - worse
    return {key: row[key] for key in ("prompt", "chosen", "rejected")} | {"confidence": gap}


def answer_row(raw, column):
    """An SFT row whose response stands in `column`; the prompt of TL;DR's (`label`) gets OpenAI's format."""
    post = column == "label" and re.fullmatch(
        r"SUBREDDIT: r/(.*?)\n+TITLE:(.*?)\n+POST:(.*)\n+TL;DR:\s*", raw["prompt"], re.DOTALL)
    if post:
        raw["prompt"] = TLDR.format(*map(str.strip, post.groups()))
    return {"prompt": raw["prompt"], "chosen": raw.pop(column)} | raw


def messages_row(raw):
    *raw["prompt"], last = raw["messages"] or [{"role": None}]
    return answer_row(raw, "messages") if last["role"] == "assistant" else "without an assistant's last turn"


def article_row(raw):
    row = {"prompt": ARTICLE.format(raw["article"].strip()), "chosen": raw["highlights"].replace("\n", " ")}
    return row | ({"id": raw["id"]} if raw.get("id") else {})


def instruction_row(raw):
    text = raw["instruction"] + (f"\n\n{raw['input']}" if raw.get("input") else "")
    return {"prompt": [{"role": "user", "content": text}], "chosen": raw["output"]}


# Kind of set: its columns, raw row -> our row. A set is of the first kind whose columns its first row has.
# A row function owns `raw`: it may change it.
SCHEMAS = {
    "OpenAI's comparisons": ("info summaries choice", openai_row),
    "argilla's UltraFeedback": ("prompt chosen rejected chosen-rating rejected-rating",
                                lambda raw: rated_row(raw, raw["chosen-rating"], raw["rejected-rating"])),
    "pairs": ("prompt chosen rejected", dict),
    "conversations": ("chosen rejected", conversation_row),
    "SFT rows": ("prompt chosen", dict),
    "SFT labels": ("prompt label", lambda raw: answer_row(raw, "label")),
    "SFT responses": ("prompt response", lambda raw: answer_row(raw, "response")),
    "SFT completions": ("prompt completion", lambda raw: answer_row(raw, "completion")),
    "SFT messages": ("messages", messages_row),
    "articles": ("article highlights", article_row),
    "instructions": ("instruction output", instruction_row),
    "unlabelled pairs": ("prompt responses", unlabelled_row),
    "prompts": ("prompt", dict),
}
PAIRS = {"OpenAI's comparisons", "argilla's UltraFeedback", "pairs", "conversations", "unlabelled pairs"}
ROLES = "system", "developer", "user", "assistant", "tool"


def clean(row, edit_distance):
    """The row as the models read it, with a pair's `edit_distance`; or (a str) why it is dropped."""
    row, prompt = dict(row), row["prompt"]
    if isinstance(prompt, str) and isinstance(row.get("chosen"), list):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
        prompt = [{"role": message["role"], "content": message["content"]} for message in prompt]
        if not all(message["role"] in ROLES and isinstance(message["content"], str) for message in prompt):
            raise TypeError(f"a message's content is no text, or its role is none of {', '.join(ROLES)}")
    last = prompt[-1]["content"] if isinstance(prompt, list) and prompt else prompt
    if not last or not last.strip():
        return "with an empty prompt"
    row["prompt"] = prompt
    space = " " if isinstance(prompt, str) and not prompt[-1].isspace() else ""
    for key in ("chosen", "rejected", "reference"):
        text = row.get(key) or ""
        if isinstance(text, list) and len(text) > len(prompt) + 1:
            return f"with turns in `{key}` that the prompt lacks"
        text = (text[-1]["content"] if isinstance(text, list) else text).strip()
        if text:
            row[key] = space + text
        elif key == "reference":
            row.pop(key, None)
        elif key in row:
            return f"with an empty `{key}`"
    confidence = row.pop("confidence", None)
    if confidence is not None and confidence == confidence:  # nan is how some tables write None
        if not isinstance(confidence, (int, float)) or not abs(confidence) < 2**53:
            raise TypeError("`confidence` is not a finite number")
        row["confidence"] = confidence
    if "rejected" in row:
        if row["chosen"] == row["rejected"]:
            return "with identical responses"
        post = []
        if edit_distance == "texts":  # of TL;DR's prompts the post alone counts: that gives the paper's means
            turns = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
            post = " ".join(turns).split("\n\nPOST: ")[-1].removesuffix("TL;DR:").split()
        texts = [(post + row[key].split())[:50_000] for key in ("chosen", "rejected")]  # more takes minutes
        row["edit_distance"] = round(Levenshtein.normalized_distance(*texts), 4)
    return row


Row = namedtuple("Row", "prompt confidence edit_distance start")  # prompt: a hash; start: where its line is


def add(store, row, seed):
    """Writes a row to the store, as a line of JSON. Its Row, 0.3 KB, is all that memory keeps of it."""
    prompt, start = row["prompt"], store.seek(0, os.SEEK_END)
    line = json.dumps(row, ensure_ascii=False, default=str) + "\n"
    store.write(line.encode("utf-8", "replace"))  # a lone surrogate has no UTF-8, it becomes "?"
    if isinstance(prompt, list) and len(prompt) == 1 and prompt[0]["role"] == "user":
        prompt = prompt[0]["content"]  # a lone user's message is the same prompt as its text
    text = f"{seed} {prompt if isinstance(prompt, str) else json.dumps(prompt)}"
    hashed = int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big")
    return Row(hashed, row.get("confidence"), row.get("edit_distance"), start)


def preference_splits(train, held, validation):
    """{file: rows} of all, hc_he and lc_le, by the medians of `train`; prints Table 5."""
    files = {"all/train.jsonl": train, "all/validation.jsonl": validation}
    rated = train[0].confidence is not None
    if rated:
        confidence = statistics.median(row.confidence for row in train)
        distance = statistics.median(row.edit_distance for row in train)
        print(f"medians of all/train: confidence {confidence:g}, edit distance {distance:.4f}")
    else:
        print("no confidences, so hc_he and lc_le stay empty")
    for name, side, sign in ("hc_he", "above", 1), ("lc_le", "below", -1):
        for split, rows in ("train", train), ("validation", held):
            files[f"{name}/{split}.jsonl"] = [row for row in rows if rated and min(
                sign * (row.confidence - confidence), sign * (row.edit_distance - distance)) > 0]
        if rated and not files[f"{name}/train.jsonl"]:
            print(f"{name} stays empty: no training pair is {side} both medians")
    print("\n| set | confidence | edit distance | train | validation |\n|---|---|---|---|---|")
    for name in ("all", "hc_he", "lc_le"):
        rows, others = files[f"{name}/train.jsonl"], files[f"{name}/validation.jsonl"]
        columns = [row.confidence for row in rows if rated], [row.edit_distance for row in rows]
        means = [f"{statistics.fmean(column):.2f}" if column else "-" for column in columns]
        print(f"| {name} | {' | '.join(means)} | {len(rows):,} | {len(others):,} |")
    print()
    return files


def fail(message):
    """Ends the program on bad input: one line on stderr, exit status 2."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, whatever bar is there
    sys.exit(2)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a full disk, no permission, a folder that has vanished
        fail(f"cannot write to --out ({error}); name a folder with room that you may write to")
