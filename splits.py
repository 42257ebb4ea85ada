"""Turns raw preference sets into data/{all,hc_he,lc_le,judge}/{train,validation}.jsonl, and prints Table 5.
Turns SFT sets into data/sft/{train,validation}.jsonl, and prompt sets into data/prompts/NAME.jsonl.

    python splits.py --dataset openai/summarize_from_feedback CarperAI/openai_summarize_tldr
    python splits.py --dataset my_pairs.jsonl.gz my_sft.csv trl-lib/tldr-preference:validation --seed 0
    python splits.py --prompts abisee/cnn_dailymail data/all/validation.jsonl --num_prompts 500

In:  .jsonl, .json, .csv (all also as .gz) and .parquet files, hub ids, and folders that load_dataset reads,
     with the columns of SCHEMAS. `id:split` reads one split; otherwise hub_rows picks. A split called val...,
     dev... or test... is a validation split.
Out: a JSON row a line. `prompt` is text or a list of {"role", "content"} messages, and `chosen` is text. A
     pair also has `rejected`, `edit_distance` (0-1) and, where its set has one, `confidence`: its own, or the
     gap of its two ratings. `system` and `history` become messages of the prompt. Other keys travel along,
     but for those of comparisons, articles and instructions. prompt + response is the text: a response to
     plain text gets a space before it, unless white space stands there, and loses white space at its end.

- hc_he has the pairs above both medians of all/train, of confidence and edit distance; lc_le those below.
- A prompt is held out if a hash of --seed and its text falls below --validation_fraction; a conversation goes
  by its user's first message. So it is on the same side in every set, and in every call with these two flags.
  (If no prompt of a tiny set falls below, one is held out, in this call alone.)
- Other bits of the hash choose --judge_fraction of the prompts, which leave all other sets, SFT sets too.
  data/judge has their pairs, for a reward model that teaches no policy.
- A validation split that a set brings is all/validation. Its prompts leave every train set. hc_he and lc_le
  still hold out prompts of the train rows. These leave all/train and sft/train too.
- A set with confidences loses its train rows without one. A set without confidences becomes `all` alone.
- Ties are dropped, since their order is arbitrary: pairs with a true `tie` or two equal ratings.
- The edit distance counts words. Where both responses have at least as many characters of scripts without
  spaces (Chinese, Japanese, Thai, Lao, Tibetan, Burmese, Khmer) as words, each such character is a word.
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
from collections import Counter, defaultdict, namedtuple
from difflib import get_close_matches

from rapidfuzz.distance import Levenshtein
from tqdm import tqdm

Row = namedtuple("Row", "prompt confidence edit_distance line")  # prompt: its hash, 64 bits; line: as JSON


def main():
    args = parse_args()
    os.makedirs(args.out, exist_ok=True)

    # read: the sets of a kind are put together
    pairs = defaultdict(list)  # train and validation: rows
    sft = defaultdict(list)
    schemas = set()
    for name in args.dataset:
        schema, rows = read_set(name, args)
        kind = pairs if schema else sft
        for side in rows:
            kind[side] += rows[side]
        schemas.add(schema)
    if len(schemas - {None}) > 1:
        names = ", ".join(sorted(schemas - {None}))
        fail(f"--dataset: several schemas of pairs ({names}); give each its own --out")
    for kind in pairs, sft:  # a validation split that comes alone is split like any other set
        kind["train"] = kind["train"] or kind.pop("validation", [])
    rated = [row for row in pairs["train"] if row.confidence is not None]
    if 0 < len(rated) < len(pairs["train"]):
        print(f"without a confidence, left out: {len(pairs['train']) - len(rated):,} train rows")
        pairs["train"] = rated

    # choose the judge's prompts, and those to hold out. `own` are those of validation splits that sets bring
    own = {row.prompt for kind in (pairs, sft) for row in kind["validation"]}
    of_pairs = {row.prompt for row in pairs["train"]} - own
    of_sft = {row.prompt for row in sft["train"]} - own
    judge = {prompt for prompt in of_pairs | of_sft if prompt % 2**32 / 2**32 < args.judge_fraction}
    held = {prompt for prompt in of_pairs | of_sft if prompt / 2**64 < args.validation_fraction}
    for prompts in of_pairs - judge, of_sft - of_pairs - judge, of_pairs & judge:  # one at least
        if args.validation_fraction > 0 and len(prompts) > 1 and not prompts & held:
            held.add(min(prompts))

    # split by prompt
    files = {}  # such as all/train: its rows
    for name, kind in ("preference sets", pairs), ("SFT sets", sft):
        if not any(kind.values()):
            continue
        for rows in kind.values():
            random.Random(args.seed).shuffle(rows)
        dropped = "dropped as a validation split has their prompt"
        parts = {part: [] for part in ("train", "validation", "judge/train", "judge/validation", dropped)}
        for row in kind["train"]:
            part = "validation" if row.prompt in held else "train"
            part = f"judge/{part}" if row.prompt in judge else part
            parts[dropped if row.prompt in own else part].append(row)
        if own or judge:
            sizes = {part: len(rows) for part, rows in parts.items()}
            print(f"{name}: train rows by prompt: {listed(sizes)}")
        if not parts["train"] or kind is pairs and args.judge_fraction and not parts["judge/train"]:
            fail(f"--dataset: no training rows are left of the {name}, or for the judge; change "
                 "--validation_fraction or --judge_fraction")
        validation = kind["validation"] or parts["validation"]
        if kind is sft:
            files |= {"sft/train": parts["train"], "sft/validation": validation}
        else:
            files |= three_parts(parts["train"], parts["validation"], validation)
            files |= {part: parts[part] for part in ("judge/train", "judge/validation")}

    for label, name in args.prompts.items():
        _, kind = read_set(name, args, label)
        rows = kind["train"] + kind["validation"]  # no two of one prompt
        count = min(args.num_prompts or len(rows), len(rows))
        files[f"prompts/{label}"] = random.Random(args.seed).sample(rows, count)
    write_files(files, args)


def listed(counts):
    """Counts in words, without those that are 0."""
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


def three_parts(train, held, validation):
    """{file: rows} of D_all, D_hc,he and D_lc,le, by the medians of `train`. Prints Table 5."""
    parts = {"all": (train, validation), "hc_he": ([], []), "lc_le": ([], [])}
    if train[0].confidence is not None:
        confidence = statistics.median(row.confidence for row in train)
        distance = statistics.median(row.edit_distance for row in train)
        print(f"medians of all/train: confidence {confidence:g}, edit distance {distance:.4f}")
        for side, rows in enumerate((train, held)):
            for row in rows:
                if row.confidence > confidence and row.edit_distance > distance:
                    parts["hc_he"][side].append(row)
                if row.confidence < confidence and row.edit_distance < distance:
                    parts["lc_le"][side].append(row)
    for part in "hc_he", "lc_le":
        if not parts[part][0]:
            print(f"{part} stays empty: no training pair has a confidence and a distance beyond both medians")
    files = {}
    print("\n| set | confidence | edit distance | train | validation |\n|---|---|---|---|---|")
    for part, (rows, held_out) in parts.items():
        means = []
        for column in "confidence", "edit_distance":
            values = [getattr(row, column) for row in rows]
            means.append(f"{statistics.fmean(values):.2f}" if values and None not in values else "-")
        print(f"| {part} | {' | '.join(means)} | {len(rows):,} | {len(held_out):,} |")
        files |= {f"{part}/train": rows, f"{part}/validation": held_out}
    print()
    return files


def read_set(name, args, label=None):
    """(the schema of pairs and their ratings, or None; {"train": rows, "validation": rows}) of a set. Prints
    what was read and dropped. With a label its rows are those of a prompt set."""
    schema = None
    rows = {"train": [], "validation": []}
    dropped = Counter()
    notes = Counter()
    seen = set()
    source = hub_rows(name, label)
    if os.path.isfile(name):
        source = (("train", number, raw) for number, raw in file_rows(name))
    for side, number, raw in tqdm(source, desc=name, unit=" rows", delay=1, disable=None):
        place = f"{name}, row {number}"
        if not isinstance(raw, dict):
            fail(f"{place}: not a JSON object; write one object a row")
        if "summaries" in raw and str(raw.get("split")).startswith("valid"):  # of OpenAI's raw files
            side = "validation"
        kinds = [kind for kind, (columns, _) in SCHEMAS.items() if raw.keys() >= set(columns.split())]
        if not kinds or kinds == ["prompts"] and not label:
            known = "; ".join(f"{kind}: {columns}" for kind, (columns, _) in SCHEMAS.items())
            fail(f"{place}: no known schema has its columns ({' '.join(raw)}); rename them to those of "
                 f"{known} (for --prompts)")
        kind = "prompts" if label and kinds[0] == "unlabelled pairs" else kinds[0]
        schema = schema or kind
        if kind != schema:
            fail(f"{place}: {kind}, after rows of {schema}; give each kind a file of its own")
        columns, convert = SCHEMAS[schema]
        try:
            context = {key: raw.pop(key) for key in CONTEXT if key in raw}
            row = clean(convert(raw), context, args.keep_ties or label)
            prompt, chosen, rejected = str(row["prompt"]), row.get("chosen"), row.get("rejected")
            if label and hash(prompt) in seen:
                raise Dropped("with an earlier row's prompt")
        except Dropped as why:
            dropped[str(why)] += 1
            continue
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}; give it {columns.replace(' ', ', ')}"
            fail(f"{place}: not a row of the set's {schema} ({reason})")
        if label:
            row = {"prompt": row["prompt"], "reference": row.get("reference", row.get("chosen")),
                   "dataset": raw.get("dataset") or label, "id": row.get("id")}
            row = {key: value for key, value in row.items() if value is not None}
            seen.add(hash(prompt))
        else:
            notes["exact duplicates"] += hash((prompt, chosen, rejected)) in seen
            notes["contradict an earlier pair"] += hash((prompt, rejected, chosen)) in seen
            seen.add(hash((prompt, chosen, rejected)))
            notes["with `system` or `history`, now messages"] += any(context.values())
            notes["without labels: precompute_rewards.py --relabel orders them"] += kind == "unlabelled pairs"
            if rejected:
                row["edit_distance"] = token_edit_distance(row, args.edit_distance, notes)
        rows[side].append(make_row(row, args.seed))
    if not any(rows.values()):
        fail(f"{name}: no row of it can be used: {listed(dropped) or 'it holds no rows'}")
    sizes = listed({side: len(rows[side]) for side in rows})
    ratings = next((f" with {better}" for better, _ in RATINGS if better in raw), "")
    print(f"{name} ({schema}{ratings}): {sizes} rows; dropped: {listed(dropped) or 'none'}")
    if any(notes.values()):
        print(f"{name}: of these {listed(notes)}")
    return schema + ratings if schema in PAIRS else None, rows


class Dropped(Exception):
    """A row that teaches nothing. The message says why."""


def clean(row, context, keep_ties):
    """The row as the models read it."""
    if any(context.values()) or any(isinstance(row.get(key), list) for key in ("prompt", *ANSWERS)):
        row["prompt"] = find_conversation(row, context)
    prompt = row["prompt"]
    chat = isinstance(prompt, list)
    last = prompt[-1]["content"] if chat and prompt else prompt
    if not last or not last.strip():
        raise Dropped("with an empty prompt")
    for key in ANSWERS:
        text = row.get(key) or ""
        if not text.strip():
            if key != "reference" and key in row:
                raise Dropped(f"with an empty `{key}`")
            row.pop(key, None)
        elif not chat:
            space = "" if prompt[-1].isspace() or text[0].isspace() else " "
            row[key] = space + text.rstrip()
    if "rejected" in row:
        if row["chosen"].rstrip() == row["rejected"].rstrip():
            raise Dropped("with identical responses")
        tied = row.get("tie") in (True, "true")
        for better, worse in RATINGS:
            if row.get(better) is not None and row.get(worse) is not None:
                row.setdefault("confidence", row[better] - row[worse])
                tied = tied or row[better] == row[worse]
        if tied and not keep_ties:
            raise Dropped("tied (--keep_ties keeps them)")
    confidence = row.pop("confidence", None)
    if confidence is not None and confidence == confidence:  # nan is how some tables write None
        if not isinstance(confidence, (int, float)) or not abs(confidence) < 2**53:
            raise TypeError("`confidence` is not a finite number")
        row["confidence"] = confidence
    return row


def find_conversation(row, context):
    """The messages before the answer. Of an answer that is a list of messages the last one stays."""
    prompt = row["prompt"] or []
    prompt = as_messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
    talks = []
    for key in ANSWERS:
        turns = []
        if isinstance(row.get(key), list):
            *turns, last = as_messages(row[key]) or [{"role": None}]
            if last["role"] != "assistant":
                raise Dropped("without an assistant's last turn")
            row[key] = last["content"]
        talks.append(join(prompt, turns, f"with turns in `{key}` that the prompt lacks"))
    talk = talks[0]
    if "rejected" in row and talks[1] != talk:
        raise Dropped("with turns in `chosen` that the prompt lacks")
    system = context.get("system") or context.get("system_prompt")
    start = [{"role": "system", "content": system}] if system else []
    for turn in context.get("history") or []:
        if isinstance(turn, dict):
            start.append(turn)
        else:
            question, answer = turn
            start += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return talk and join(as_messages(start), talk, "with a `system` or `history` that the prompt contradicts")


def join(prompt, turns, misfit):
    """The conversation of a prompt and the turns that follow it, or that hold it."""
    asked = [turn["content"].strip() for turn in prompt]
    given = [turn["content"].strip() for turn in turns]
    if not turns:
        return prompt
    if asked in (given[:len(asked)], given[-len(asked):]):  # the turns are the whole conversation
        return turns
    if turns[0]["role"] in ("system", "developer", prompt[-1]["role"]):
        raise Dropped(misfit)
    return prompt + turns


def as_messages(turns):
    """The messages with role and content alone."""
    for turn in turns:
        if turn["role"] not in ROLES or not isinstance(turn["content"], str) or turn.get("tool_calls"):
            raise TypeError(f"a message's content is no text, or its role is none of {', '.join(ROLES)}")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def token_edit_distance(row, of, notes):
    """Levenshtein's distance of the responses' words, over the longer length. `of`: responses or texts."""
    texts = [row["chosen"], row["rejected"]]
    words = r"\S+"
    if not texts[0].isascii() and all(
            len(re.findall(f"[{UNSPACED}]", text)) >= len(text.split()) for text in texts):
        words = rf"[{UNSPACED}]|[^\s{UNSPACED}]+"
        notes["without spaces: edit distance by characters"] += 1
    if of == "texts":  # of TL;DR's prompts the post alone counts: that gives the paper's means
        prompt = row["prompt"]
        turns = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        post = " ".join(turns).split("\n\nPOST: ")[-1].removesuffix("TL;DR:")
        texts = [f"{post} {text}" for text in texts]
    chosen, rejected = (re.findall(words, text)[:50_000] for text in texts)  # more takes minutes
    return round(Levenshtein.normalized_distance(chosen, rejected), 4)


def make_row(row, seed):
    """A conversation goes by its first user's message, so that all its rows are on one side."""
    line = json.dumps(row, ensure_ascii=False, default=str)
    if "NaN" in line or "Infinity" in line:  # strict JSON has neither
        line = json.dumps(json.loads(line, parse_constant=lambda name: None), ensure_ascii=False)
    prompt = row["prompt"]
    if isinstance(prompt, list):
        prompt = next((turn["content"] for turn in prompt if turn["role"] == "user"), prompt[0]["content"])
    # a lone surrogate has no UTF-8, it becomes "?"
    digest = hashlib.sha256(f"{seed} {prompt}".encode("utf-8", "replace")).digest()
    return Row(int.from_bytes(digest[:8], "big"), row.get("confidence"), row.get("edit_distance"),
               f"{line}\n".encode("utf-8", "replace"))


# ---- the schemas. Each function turns a raw row into a row in our form

ARTICLE = "Summarize this news article clearly and concisely. Use TL;DR in your response:"  # Table 4
TLDR = "SUBREDDIT: r/{}\n\nTITLE: {}\n\nPOST: {}\n\nTL;DR:"  # OpenAI's query format
ROLES = "system", "developer", "user", "assistant", "tool"
ANSWERS = "chosen", "rejected", "reference"
CONTEXT = "system", "system_prompt", "history"  # columns that belong to the prompt
# The better and the worse response's rating, as published sets (trl-lib, H4, argilla) name them
RATINGS = [("score_chosen", "score_rejected"), ("chosen_rating", "rejected_rating"),
           ("chosen-rating", "rejected-rating"), ("chosen_score", "rejected_score")]
# Scripts without spaces between words: Thai to Burmese, Khmer, Chinese and Japanese with their punctuation
UNSPACED = (r"\u0e00-\u109f\u1780-\u17ff\u3001-\u312f\u3190-\u9fff\uf900-\ufaff\uff01-\uff9f"
            r"\U00020000-\U0003ffff")


def openai_row(raw):
    info = raw["info"]
    if info.get("post"):
        parts = info["subreddit"], info.get("title") or "", info["post"]
        prompt = TLDR.format(*map(str.strip, parts))
    elif info.get("article"):  # the validation split's CNN/DM batches
        prompt = article_prompt(info["article"], info.get("title"))
    else:
        raise Dropped("without post and article")
    texts = [summary["text"].strip() for summary in raw["summaries"]]
    return {"prompt": prompt, "chosen": texts[raw["choice"]], "rejected": texts[1 - raw["choice"]],
            "confidence": (raw.get("extra") or {}).get("confidence"),
            "id": info.get("id"), "batch": raw.get("batch")}


def conversation_row(raw):
    """Two conversations that part at their last turn: message lists (trl-lib) or transcripts (HH)."""
    for key in "chosen", "rejected":
        if isinstance(raw[key], str):  # splits into ["", "Human", " ...", "Assistant", " ..."]
            start, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + raw[key].lstrip())
            if start.strip() or not parts:
                raise Dropped("without a prompt (name its column `prompt`, or write transcripts like HH's)")
            raw[key] = [{"role": "user" if who == "Human" else "assistant", "content": text.strip()}
                        for who, text in zip(parts[::2], parts[1::2])]
    return {"prompt": raw["chosen"][:-1]} | raw


def unlabelled_row(raw):
    """Two responses in the order of the file. The Oracle says later which of them is the chosen one."""
    responses = raw.pop("responses")
    if not isinstance(responses, list) or len(responses) != 2:
        raise TypeError("`responses` is not a list of two texts")
    return raw | {"chosen": responses[0], "rejected": responses[1]}


def answer_row(raw, column, **prompt):
    return {"prompt": raw.get("prompt"), "chosen": raw.pop(column)} | raw | prompt


def tldr_prompt(text):
    """A prompt of TL;DR's SFT set, with the blank lines of OpenAI's format."""
    post = re.fullmatch(r"SUBREDDIT: r/(.*?)\n+TITLE:(.*?)\n+POST:(.*)\n+TL;DR:\s*", text, re.DOTALL)
    return TLDR.format(*map(str.strip, post.groups())) if post else text


def article_row(raw):
    prompt = raw.get("prompt") or article_prompt(raw["article"], raw.get("title"))
    return {"prompt": prompt, "chosen": raw["highlights"].replace("\n", " "), "id": raw.get("id")}


def article_prompt(article, title):
    """The paper's prompt. CNN/DailyMail has no titles."""
    parts = [ARTICLE, title and f"TITLE: {title.strip()}", article.strip()]
    return "\n\n".join(filter(None, parts))


def instruction_row(raw):
    text = raw["instruction"] + (f"\n\n{raw['input']}" if raw.get("input") else "")
    return {"prompt": [{"role": "user", "content": text}], "chosen": raw["output"]}


# Kind of set: its columns, and its function, which owns the raw row and may change it.
SCHEMAS = {
    "OpenAI's comparisons": ("info summaries choice", openai_row),
    "pairs": ("prompt chosen rejected", dict),
    "conversations": ("chosen rejected", conversation_row),
    "SFT rows": ("prompt chosen", dict),
    "SFT labels": ("prompt label", lambda raw: answer_row(raw, "label", prompt=tldr_prompt(raw["prompt"]))),
    "SFT responses": ("prompt response", lambda raw: answer_row(raw, "response")),
    "SFT completions": ("prompt completion", lambda raw: answer_row(raw, "completion")),
    "SFT messages": ("messages", lambda raw: answer_row(raw, "messages", prompt=list(raw["messages"])[:-1])),
    "articles": ("article highlights", article_row),
    "instructions": ("instruction output", instruction_row),
    "unlabelled pairs": ("prompt responses", unlabelled_row),
    "prompts": ("prompt", dict),
}
PAIRS = {"OpenAI's comparisons", "pairs", "conversations", "unlabelled pairs"}

# ---- from here on nothing is about the method --------------------------------------------------------------

# load_dataset runs no scripts: it reads two sets from the hub's own parquet files and the script's JSON.
OPENAI = "hf://datasets/openai/summarize_from_feedback@refs/convert/parquet/comparisons/{}/*.parquet"
ALPACA = "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json"
HUB = {
    "abisee/cnn_dailymail": {"name": "3.0.0"},
    "tatsu-lab/alpaca_eval": {"path": "json", "data_files": {"eval": ALPACA}},
    "openai/summarize_from_feedback": {"path": "parquet", "data_files": {
        split: OPENAI.format(split) for split in ("train", "validation")}},
}


def hub_rows(name, prompts):
    """Yields (train or validation, row number, row) of a hub id or folder."""
    path, _, wanted = name.partition(":")
    try:
        from datasets import load_dataset  # here, as the import takes seconds
        splits = load_dataset(**({"path": path} | HUB.get(path, {})), split=wanted or None)
    except Exception as error:  # the hub client's failures have no class in common
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        fail(f"{name}: no file, and the hub does not give it ({reason}); fix the name or the connection")
    if wanted:
        splits = {wanted: splits}
    if len(splits) > 1:
        held_out = [split for split in ("validation", "valid", "val", "dev", "test") if split in splits]
        picked = ["train", *held_out[:1]]
        if prompts:
            picked = ["test"] if "test" in splits else [*held_out, "train"][:1]
        if picked[0] not in splits:
            fail(f"{name}: it has no split `train`; name one as {name}:SPLIT, of {', '.join(splits)}")
        splits = {split: splits[split] for split in picked}
    for split, rows in splits.items():
        side = "validation" if split.startswith(("val", "dev", "test")) else "train"
        for number, raw in enumerate(rows, 1):
            yield side, number, raw


def file_rows(path):
    """Yields (row number, row) of a parquet or CSV file or a JSON array, (line number, row) of JSON lines."""
    try:
        if path.endswith((".parquet", ".csv", ".csv.gz")):
            rows = (row for batch in read_table(path).to_batches(1000) for row in batch.to_pylist())
            yield from enumerate(rows, 1)
            return
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if number == 1 and line.startswith("["):
                    yield from enumerate(json.loads(line + file.read()), 1)
                elif line.strip():
                    yield number, json.loads(line)
    except json.JSONDecodeError as error:
        fail(f"{path}, line {number}: not JSON ({error}); write one JSON object a line, or one array of them")
    except Exception as error:  # those of gzip, zlib, pyarrow and the codecs have no class in common
        reason = str(error).split("\n")[0]
        fail(f"{path}: cannot read it ({reason}); name a UTF-8 JSON or CSV file, or a parquet file")


def read_table(path):
    from pyarrow import csv, parquet  # here, as JSON needs none of it
    if path.endswith(".parquet"):
        return parquet.read_table(path)
    # in these columns 12 is a text; in the others it is a number, and nothing is None
    columns = " ".join(columns for columns, _ in SCHEMAS.values()).split()
    types = csv.ConvertOptions(column_types=dict.fromkeys([*columns, *CONTEXT, "reference"], "string"))
    block = csv.ReadOptions(block_size=2**26)  # it holds the longest row, and decides what is a number
    return csv.read_csv(path, block, csv.ParseOptions(newlines_in_values=True), types)


def write_files(files, args):
    """All files are whole before the first takes its place. A file of an earlier call that has no rows now
    goes, as sets would mix."""
    files = {os.path.join(args.out, f"{file}.jsonl"): rows for file, rows in files.items()}
    for name in (*args.dataset, *args.prompts.values()):
        if os.path.realpath(name) in map(os.path.realpath, files):
            fail(f"{name}: --out {args.out} would overwrite it; give another --out")
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        for number, rows in enumerate(files.values()):
            with open(f"{folder}/{number}", "wb") as file:
                file.writelines(row.line for row in rows)
        for number, (path, rows) in enumerate(files.items()):
            if rows:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                os.replace(f"{folder}/{number}", path)
                print(f"{path}: {len(rows):,} rows")
            elif os.path.exists(path):
                os.remove(path)
                print(f"{path}: no rows; removed the file of an earlier call")


class Parser(argparse.ArgumentParser):
    """A wrong flag ends the program in one line, which names the nearest right one."""

    def error(self, message):
        _, unknown, flags = message.partition("unrecognized arguments: ")
        if unknown:
            ours = [word.strip("[]") for word in self.format_usage().split() if "--" in word]
            message += f"; the nearest flag is {get_close_matches(flags.split()[0], ours, 1, 0)[0]}"
        fail(f"{message}; {self.prog} --help lists all flags")


def fail(message):
    """Ends the program on bad input: one line on stderr, exit status 2."""
    line = " ".join(str(message).split())
    tqdm.write(f"error: {line}", file=sys.stderr)  # on a line of its own, whatever bar is there
    sys.exit(2)


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument_group("input: at least one of").add_argument
    flag("--dataset", nargs="+", default=[], metavar="FILE_OR_ID",
         help="preference and SFT sets. Preference sets must share a schema")
    flag("--prompts", nargs="+", default=[], metavar="FILE_OR_ID",
         help="sets with prompts to answer; of a hub set its test split, where it has one. Their `reference` "
              "is the set's, or the chosen response")
    flag = parser.add_argument_group("output (default)").add_argument
    flag("--out", default="data", help="folder to write to (%(default)s)")
    flag("--validation_fraction", type=float, default=0.1, help="share of the prompts held out (%(default)s)")
    flag("--judge_fraction", type=float, default=0.0, help="share of the prompts for a judge (%(default)s)")
    flag("--num_prompts", type=int, default=1000, help="random prompts of a prompt set, 0: all (%(default)s)")
    flag("--seed", type=int, default=0, help="picks held-out and random prompts, and the order (%(default)s)")
    flag("--keep_ties", action="store_true", help="keep pairs with a true `tie` or two equal ratings")
    flag("--edit_distance", default="responses", choices=["responses", "texts"],
         help="of the responses, or of post + response, which gives Table 5's means (%(default)s)")
    args = parser.parse_args()
    if not args.dataset and not args.prompts:
        fail("nothing to do; name sets after --dataset or --prompts")
    if len(set(map(os.path.realpath, args.dataset))) < len(args.dataset):
        fail("--dataset: a set is named twice; name it once")
    for name in "validation_fraction", "judge_fraction":
        if not 0 <= getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)}: give a share of at least 0 and below 1")
    if args.num_prompts < 0:
        fail(f"--num_prompts {args.num_prompts}: give a number of prompts, or 0 for all")
    labels = [os.path.basename(os.path.normpath(name)).replace(":", "-") for name in args.prompts]
    labels = [re.sub(r"(\.(jsonl|json|csv|parquet|gz))+$", "", label) for label in labels]
    if len(set(labels)) < len(labels):
        fail(f"--prompts: two sets would share a file ({', '.join(labels)}); rename one, or use two --out")
    args.prompts = dict(zip(labels, args.prompts))
    return args


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a file that is missing, a full disk, no permission
        fail(error)
