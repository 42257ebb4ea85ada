"""
Turns raw preference sets into data/{all,hc_he,lc_le}/{train,validation}.jsonl and prints the paper's Table 5;
SFT sets into data/sft/{train,validation}.jsonl; prompt sets, for generate.py, into data/prompts/NAME.jsonl.

    python splits.py --dataset openai/summarize_from_feedback CarperAI/openai_summarize_tldr
    python splits.py --dataset my_pairs.jsonl.gz my_sft.parquet --out data --seed 0
    python splits.py --prompts abisee/cnn_dailymail tatsu-lab/alpaca_eval CarperAI/openai_summarize_tldr
    python splits.py --prompts data/all/validation.jsonl --num_prompts 500

In: the hub's sets named in HUB, and local .json, .jsonl, .jsonl.gz and .parquet files, told apart by their
columns (SCHEMAS).
Out: a row a line: `prompt` (plain text, or a list of {"role", "content"} messages) and the response `chosen`;
in pairs also `rejected`, `edit_distance` (0-1) and, where the set has one, `confidence`. Other keys of rows
that are in this form already are kept. A response to a plain-text prompt starts with one space
(none if the prompt ends in white space), so prompt + response is the text; one to messages starts with none.

hc_he has the pairs above both medians, of confidence and of edit distance; lc_le those below both (a pair on
a median is in neither). The medians are those of all/train.

Where the paper leaves a choice, or we differ from it:
- Validation is split off by prompt, not by row: a prompt is held out where a hash of the seed and its text
  falls below --validation_fraction. So it lands on the same side in every set and every call with that seed
  and fraction. What a validation split of any set holds is no training prompt of another.
- A validation split that a set brings along is all/validation; hc_he and lc_le come from its train rows. The
  prompts held out for them leave all/train and sft/train too; else an Oracle trained on D_all would have seen
  hc_he's validation pairs, and the SFT model their human summaries: a tenth of the train rows goes.
  For trl-lib's UltraFeedback and HH, which have no validation split, it is `test`.
- Edit distance is Levenshtein's over whitespace tokens, divided by the longer response's length. The paper's
  means (0.09 to 0.15) must have another divisor, which it does not name: its sets are not quite these.
- In a set with confidences, rows without one are left out of every split.
- UltraFeedback's `confidence` is the gap of the two ratings, on its own scale: it serves the medians only. HH
  has nothing of the kind: it becomes `all` alone.
- The prompts of TL;DR's SFT set get the blank lines of OpenAI's format, so SFT and preferences share prompts.
- Pairs of over 1024 tokens are dropped by the stages that have a tokenizer.
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
import zlib
from collections import Counter

from rapidfuzz.distance import Levenshtein
from tqdm import tqdm

# Hub id: load_dataset's arguments, and its splits for train, validation and prompts. `datasets` runs no
# scripts, so two sets are read as files: the hub's own conversion to parquet, and the JSON beside the script.
OPENAI = "hf://datasets/openai/summarize_from_feedback@refs/convert/parquet/comparisons"
ALPACA = "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json"
HUB = {
    "openai/summarize_from_feedback": (
        {"path": "parquet", "data_files": {"train": OPENAI + "/train/*.parquet",
                                           "validation": OPENAI + "/validation/*.parquet"}},
        "train", "validation", "validation"),
    "CarperAI/openai_summarize_tldr": ({"path": "CarperAI/openai_summarize_tldr"}, "train", "valid", "test"),
    "argilla/ultrafeedback-binarized-preferences-cleaned": (
        {"path": "argilla/ultrafeedback-binarized-preferences-cleaned"}, "train", None, "train"),
    "trl-lib/ultrafeedback_binarized": ({"path": "trl-lib/ultrafeedback_binarized"}, "train", "test", "test"),
    "Anthropic/hh-rlhf": ({"path": "Anthropic/hh-rlhf"}, "train", "test", "test"),
    "abisee/cnn_dailymail": ({"path": "abisee/cnn_dailymail", "name": "3.0.0"},
                             "train", "validation", "test"),
    "tatsu-lab/alpaca_eval": ({"path": "json", "data_files": {"eval": ALPACA}}, "eval", None, "eval"),
}


def fail(message):
    """Ends the program on bad input: one line on stderr (of one process a machine), exit status 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# ---- raw row -> row in our form, or (a str) why it is dropped

def tldr_prompt(subreddit, title, post):
    """OpenAI's query format; a missing title stays empty."""
    subreddit, title, post = subreddit.strip(), (title or "").strip(), post.strip()
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def article_prompt(article):
    return f"Article: {article.strip()}\n\nTL;DR:"


def gap(better, worse):
    """The stand-in for a confidence; None where a rating is missing."""
    return None if better is None or worse is None else better - worse


def openai_row(raw):
    info, choice = raw["info"], raw["choice"]
    if info.get("post"):
        prompt = tldr_prompt(info["subreddit"], info.get("title"), info["post"])
    elif info.get("article"):  # the validation split's CNN/DM batches
        prompt = article_prompt(info["article"])
    else:
        return "without post and article"
    row = {"prompt": prompt, "chosen": raw["summaries"][choice]["text"],
           "rejected": raw["summaries"][1 - choice]["text"],
           "confidence": (raw.get("extra") or {}).get("confidence"),
           "id": info.get("id"), "batch": raw.get("batch")}
    return {key: value for key, value in row.items() if value is not None}


def argilla_row(raw):
    return {"prompt": raw["prompt"], "chosen": raw["chosen"], "rejected": raw["rejected"],
            "confidence": gap(raw["chosen-rating"], raw["rejected-rating"])}


def conversation_row(raw):
    """Two conversations that part at their last turn: message lists (trl-lib) or transcripts (HH)."""
    talks = []
    for talk in (raw["chosen"], raw["rejected"]):
        if isinstance(talk, str):  # splits into ["", "Human", " ...", "Assistant", " ..."]
            start, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + talk.lstrip())
            talk = [] if start.strip() else [
                {"role": "user" if role == "Human" else "assistant", "content": text.strip()}
                for role, text in zip(parts[::2], parts[1::2])]
        talks.append(talk)
    if not all(talk and talk[-1]["role"] == "assistant" for talk in talks):
        return "without an assistant's last turn"
    if talks[0][:-1] != talks[1][:-1]:
        return "with two different prompts"
    return {"prompt": talks[0][:-1], "chosen": talks[0], "rejected": talks[1],
            "confidence": gap(raw.get("score_chosen"), raw.get("score_rejected"))}


def article_row(raw):
    row = {"prompt": article_prompt(raw["article"]), "chosen": raw["highlights"].replace("\n", " ")}
    return dict(row, id=raw["id"]) if raw.get("id") else row


def instruction_row(raw):
    text = raw["instruction"] + (f"\n\n{raw['input']}" if raw.get("input") else "")
    return {"prompt": [{"role": "user", "content": text}], "chosen": raw["output"]}


def label_row(raw):
    row = {"prompt": raw["prompt"], "chosen": raw["label"]}
    row |= {key: value for key, value in raw.items() if key not in ("prompt", "label")}
    post = re.fullmatch(r"SUBREDDIT: r/(.*?)\n+TITLE:(.*?)\n+POST:(.*)\n+TL;DR:\s*", raw["prompt"], re.DOTALL)
    return dict(row, prompt=tldr_prompt(*post.groups())) if post else row


def response_row(raw):
    row = {"prompt": raw["prompt"], "chosen": raw["response"]}
    return row | {key: value for key, value in raw.items() if key not in ("prompt", "response")}


# Kind of set: its columns, raw row -> our row. A set is of the first kind whose columns its first row has.
SCHEMAS = {
    "OpenAI's comparisons": ("info summaries choice", openai_row),
    "argilla's UltraFeedback": ("prompt chosen rejected chosen-rating rejected-rating", argilla_row),
    "pairs": ("prompt chosen rejected", dict),
    "conversations": ("chosen rejected", conversation_row),
    "SFT rows": ("prompt chosen", dict),
    "SFT labels": ("prompt label", label_row),
    "SFT responses": ("prompt response", response_row),
    "articles": ("article highlights", article_row),
    "instructions": ("instruction output", instruction_row),
    "prompts": ("prompt", dict),
}


def clean(row):
    """
    A row with its texts as the models read them, and a pair's `edit_distance`; or (a str) why it is dropped.
    Bad fields raise KeyError, TypeError, AttributeError or IndexError.
    """
    row, prompt = dict(row), row["prompt"]
    if isinstance(prompt, str) and isinstance(row.get("chosen"), list):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
        prompt = [{"role": message["role"], "content": message["content"]} for message in prompt]
        if not all(isinstance(text, str) for message in prompt for text in message.values()):
            raise TypeError("a message's role or content is not text")
    last = prompt[-1]["content"] if isinstance(prompt, list) and prompt else prompt
    if not last or not last.strip():
        return "with an empty prompt"
    row["prompt"] = sys.intern(prompt) if isinstance(prompt, str) else prompt  # one copy for its many pairs
    space = " " if isinstance(prompt, str) and not prompt[-1].isspace() else ""
    for key in ("chosen", "rejected", "reference"):
        text = row.get(key) or ""
        text = (text[-1]["content"] if isinstance(text, list) else text).strip()
        if text:
            row[key] = space + text
        elif key == "reference":
            row.pop(key, None)
        elif key in row:
            return f"with an empty `{key}`"
    confidence = row.pop("confidence", None)
    if confidence is not None and confidence == confidence:  # nan is how some tables write None
        if not isinstance(confidence, (int, float)):
            raise TypeError("`confidence` is not a number")
        row["confidence"] = confidence
    if "rejected" in row:
        if row["chosen"] == row["rejected"]:
            return "with identical responses"
        distance = Levenshtein.normalized_distance(row["chosen"].split(), row["rejected"].split())
        row["edit_distance"] = round(distance, 4)
    return row


# ---- reading

def json_rows(path):
    """Yields (line number, row) of JSON lines, or (row number, row) of one JSON array; .gz is unzipped."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if number == 1 and line.startswith("["):
                    yield from enumerate(json.loads(line + file.read()), 1)
                elif line.strip():
                    yield number, json.loads(line)
    except json.JSONDecodeError as error:
        fail(f"{path}, line {number}: not JSON ({error}); write one JSON object a line, or one array of them")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        fail(f"{path}: cannot read it ({error}); name a UTF-8 JSON or a parquet file")


def parquet_rows(path):
    """Yields (row number, row) of a parquet file."""
    import pyarrow.parquet  # here, as JSON needs none of it
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(1000)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except (OSError, pyarrow.ArrowException) as error:
        fail(f"{path}: cannot read it ({str(error).splitlines()[0]}); name a JSON or a parquet file")


def hub_rows(name, split):
    """Yields (row number, row) of a split of a known set."""
    try:
        from datasets import load_dataset  # here, as the import takes seconds
        rows = load_dataset(**HUB[name][0], split=split)
    except Exception as error:  # the hub client's failures have no class in common
        error = error.__cause__ or error
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        fail(f"{name}: the hub did not give it ({reason}); mend the connection or name a local copy")
    yield from enumerate(rows, 1)


def raw_rows(name, prompts):
    """Yields (split, row number, raw row) of a file or a hub set; `prompts`: of the latter one split."""
    if name in HUB:
        _, train, validation, test = HUB[name]
        wanted = {"train": test} if prompts else {"train": train, "validation": validation}
        for split, its_name in wanted.items():
            if its_name:
                yield from ((split, number, raw) for number, raw in hub_rows(name, its_name))
    elif os.path.isfile(name):
        for number, raw in parquet_rows(name) if name.endswith(".parquet") else json_rows(name):
            if not isinstance(raw, dict):
                fail(f"{name}, line {number}: not a JSON object; write one object a row")
            # the raw files of OpenAI's comparisons name each row's split: train, valid1, valid2
            held_out = "summaries" in raw and str(raw.get("split")).startswith("valid")
            yield "validation" if held_out else "train", number, raw
    else:
        fail(f"{name}: neither a file nor a known set; known are {', '.join(HUB)}")


def read_set(name, prompts=False):
    """(schema, {"train": rows, "validation": rows}) of a set; prints what was read and dropped."""
    schema, rows, dropped = None, {"train": [], "validation": []}, Counter()
    for split, number, raw in tqdm(raw_rows(name, prompts), desc=name, unit=" rows", delay=1, disable=None):
        if schema is None:
            schema = next((kind for kind in SCHEMAS if set(SCHEMAS[kind][0].split()) <= set(raw)), None)
        if schema is None:
            known = "; ".join(f"{kind}: {columns}" for kind, (columns, _) in SCHEMAS.items())
            fail(f"{name}: no known schema has its columns ({' '.join(raw)}); rename them to one of: {known}")
        columns, convert = SCHEMAS[schema]
        try:
            row = convert({column: raw[column] for column in columns.split()} | raw)  # KeyError if one lacks
            row = row if isinstance(row, str) else clean(row)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            fail(f"{name}, row {number}: not a row of the set's {schema} ({type(error).__name__}: {error}); "
                 f"give it {columns.replace(' ', ', ')}")
        if isinstance(row, str):
            dropped[row] += 1
        else:
            rows[split].append(row)
    reasons = ", ".join(f"{count:,} {why}" for why, count in dropped.items()) or "none"
    if schema is None:
        fail(f"{name}: it holds no rows")
    counts = " and ".join(f"{len(rows[split]):,} {split}" for split in rows if rows[split])
    print(f"{name} ({schema}): {counts or 'no'} rows; dropped: {reasons}")
    if not counts:
        fail(f"{name}: no row of it can be used; see the line above")
    return schema, rows


# ---- splitting and writing

def hashable(prompt):
    """The prompt as text; a lone user's message is the same prompt as its text."""
    if isinstance(prompt, list) and len(prompt) == 1 and prompt[0]["role"] == "user":
        prompt = prompt[0]["content"]
    return prompt if isinstance(prompt, str) else json.dumps(prompt)


def hold_out(rows, fraction, seed):
    """(train, validation) rows; held out: prompts with hash(seed, prompt) / 2^64 < fraction, one at least."""
    place = {}  # prompt -> its place in [0, 1)
    for row in rows:
        prompt = hashable(row["prompt"])
        if prompt not in place:
            digest = hashlib.sha256(f"{seed} {prompt}".encode("utf-8", "replace")).digest()
            place[prompt] = int.from_bytes(digest[:8], "big") / 2**64
    held = {prompt for prompt in place if place[prompt] < fraction}
    if not held and fraction > 0 and len(place) > 1:
        held = {min(place, key=place.get)}
    return ([row for row in rows if hashable(row["prompt"]) not in held],
            [row for row in rows if hashable(row["prompt"]) in held])


def with_confidence(rows):
    """{split: rows} less the rows without a confidence, if there are rows with one; says how many."""
    kept = {split: [row for row in rows[split] if "confidence" in row] for split in rows}
    if not any(kept.values()):
        return rows
    missing = [f"{len(rows[split]) - len(kept[split]):,} {split}" for split in rows]
    if kept != rows:
        print(f"without a confidence, left out of every split: {' and '.join(missing)} rows")
    return kept


def make_splits(kind, rows, own, fraction, seed):
    """{"train", "validation"} rows -> (train, held out of train, validation), each in the seed's order; `own` are the prompts of
    the validation splits that the sets of either kind bring along."""
    for split in rows.values():
        random.Random(seed).shuffle(split)
    fresh = [row for row in rows["train"] if hashable(row["prompt"]) not in own]
    train, held = hold_out(fresh, fraction, seed)
    if own:
        print(f"{kind}: of {len(rows['train']):,} train rows, {len(held):,} held out by prompt, "
              f"{len(rows['train']) - len(fresh):,} dropped as a validation split has their prompt")
    if not train:
        fail(f"--dataset: the {kind} leave no training rows; give more, or a smaller --validation_fraction")
    return train, held, rows["validation"] or held


def preference_splits(train, held, validation):
    """{set: {split: rows}} of all, hc_he and lc_le, by the medians of `train`; prints Table 5."""
    sets = {name: {"train": [], "validation": []} for name in ("all", "hc_he", "lc_le")}
    sets["all"] = {"train": train, "validation": validation}
    if "confidence" in train[0]:
        confidence = statistics.median(row["confidence"] for row in train)
        distance = statistics.median(row["edit_distance"] for row in train)
        print(f"medians of all/train: confidence {confidence:g}, edit distance {distance:.4f}")
        for split, rows in (("train", train), ("validation", held)):
            for row in rows:
                if row["confidence"] > confidence and row["edit_distance"] > distance:
                    sets["hc_he"][split].append(row)
                if row["confidence"] < confidence and row["edit_distance"] < distance:
                    sets["lc_le"][split].append(row)
    else:
        print("no confidences, so hc_he and lc_le stay empty")
    for name, side in ("hc_he", "above"), ("lc_le", "below"):
        if "confidence" in train[0] and not sets[name]["train"]:
            print(f"{name} stays empty: no training pair is {side} both medians")
    print("\n| set | confidence | edit distance | train | validation |\n|---|---|---|---|---|")
    for name, splits in sets.items():
        columns = [[row[key] for row in splits["train"] if key in row]
                   for key in ("confidence", "edit_distance")]
        means = [f"{statistics.fmean(column):.2f}" if column else "-" for column in columns]
        print(f"| {name} | {' | '.join(means)} | {len(splits['train']):,} | {len(splits['validation']):,} |")
    print()
    return sets


def prompt_set(name, label, count, seed):
    """`count` (0: all) random rows of unique prompts: prompt, dataset; reference and id where there are."""
    unique = {}
    for row in (row for split in read_set(name, prompts=True)[1].values() for row in split):
        new = {"prompt": row["prompt"], "reference": row.get("reference", row.get("chosen")),
               "dataset": label, "id": row.get("id")}
        new = {key: value for key, value in new.items() if value is not None}
        unique.setdefault(hashable(row["prompt"]), new)
    return random.Random(seed).sample(list(unique.values()), min(count or len(unique), len(unique)))


def write_jsonl(path, rows):
    """Writes the rows, whole or not at all. No rows, no file: an earlier call's goes, as sets would mix."""
    if rows:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".partial", "w", encoding="utf-8", errors="replace") as file:  # lone surrogates: "?"
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        os.replace(path + ".partial", path)
        print(f"{path}: {len(rows):,} rows")
    elif os.path.exists(path):
        os.remove(path)
        print(f"{path}: no rows; removed the file of an earlier call")
    else:
        print(f"{path}: no rows, not written")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("input: at least one of")
    group.add_argument("--dataset", nargs="+", default=[], metavar="NAME_OR_FILE",
                       help="preference and SFT sets: hub ids or files. Those of a kind are put together; "
                            "preference sets must share a schema, as confidences differ in scale")
    group.add_argument("--prompts", nargs="+", default=[], metavar="NAME_OR_FILE",
                       help="sets with prompts to answer; of a hub set its test split, where it has one (else "
                            "what --dataset trains on: name data/all/validation.jsonl instead). "
                            "`reference` is the set's answer, of a pair the chosen one")
    group = parser.add_argument_group("output")
    group.add_argument("--out", default="data", help="folder to write to (default: %(default)s)")
    group.add_argument("--validation_fraction", type=float, default=0.1,
                       help="share of the prompts held out of train (default: %(default)s)")
    group.add_argument("--num_prompts", type=int, default=1000,
                       help="random prompts of each prompt set; 0 means all (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0,
                       help="picks held-out and random prompts and the order of rows (default: %(default)s)")
    args = parser.parse_args()
    if not args.dataset and not args.prompts:
        fail("nothing to do; name sets after --dataset or --prompts")
    if not 0 <= args.validation_fraction < 1:
        fail(f"--validation_fraction {args.validation_fraction}: give a share of at least 0 and below 1")
    if args.num_prompts < 0:
        fail(f"--num_prompts {args.num_prompts}: give a number of prompts, or 0 for all")
    labels = [re.sub(r"(\.(jsonl|json|parquet|gz))+$", "", os.path.basename(name)) for name in args.prompts]
    if len(set(labels)) < len(labels):
        fail(f"--prompts: two sets would share a file ({', '.join(labels)}); rename one, or use two --out")

    pairs, sft = {"train": [], "validation": []}, {"train": [], "validation": []}
    schemas = set()  # of the preference sets
    for name in args.dataset:
        schema, rows = read_set(name)
        first = (rows["train"] or rows["validation"])[0]
        if "chosen" not in first:
            fail(f"{name}: prompts without responses; give it to --prompts")
        if "rejected" in first:
            schemas.add(schema)
        for split in rows:
            (pairs if "rejected" in first else sft)[split] += rows[split]
    if len(schemas) > 1:
        fail(f"--dataset: preference sets of several schemas ({', '.join(sorted(schemas))}); "
             "split each in a call and an --out of its own")

    own = {hashable(row["prompt"]) for kind in (pairs, sft) for row in kind["validation"]}
    files = {}  # all of them are made before the first is written
    if schemas:
        splits = make_splits("preference sets", with_confidence(pairs), own, args.validation_fraction, args.seed)
        for name, halves in preference_splits(*splits).items():
            files |= {f"{name}/{split}.jsonl": rows for split, rows in halves.items()}
    if any(sft.values()):
        train, _, validation = make_splits("SFT sets", sft, own, args.validation_fraction, args.seed)
        files |= {"sft/train.jsonl": train, "sft/validation.jsonl": validation}
    for name, label in zip(args.prompts, labels):
        files[f"prompts/{label}.jsonl"] = prompt_set(name, label, args.num_prompts, args.seed)
    try:
        for path, rows in files.items():
            write_jsonl(os.path.join(args.out, path), rows)
    except OSError as error:
        fail(f"--out {args.out}: cannot write there ({error})")


if __name__ == "__main__":
    main()
