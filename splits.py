"""Turns raw preference sets into data/{all,hc_he,lc_le,judge}/{train,validation}.jsonl, and prints Table 5.
Turns SFT sets into data/sft/{train,validation}.jsonl, and prompt sets into data/prompts/NAME.jsonl.

    python splits.py --dataset openai/summarize_from_feedback CarperAI/openai_summarize_tldr
    python splits.py --dataset my_pairs.jsonl.gz my_sft.csv trl-lib/tldr-preference:validation --seed 0
    python splits.py --prompts abisee/cnn_dailymail data/all/validation.jsonl --num_prompts 500

In:  .jsonl, .json, .csv (all also as .gz) and .parquet files, hub ids, and folders that load_dataset reads.
     SCHEMAS lists the columns they may have. `id:split` reads one split of a hub id or folder; otherwise
     hub_rows picks. A split called val..., dev... or test... is a validation split.
Out: a JSON row a line. `prompt` is text or a list of {"role", "content"} messages, and `chosen` is text. A
     pair also has `rejected`, `edit_distance` (0-1) and, where its set has one, `confidence`: its own, or the
     gap of its two ratings. `system` and `history` become messages of the prompt. Other keys travel along,
     but for those of comparisons, articles and instructions. prompt + response is the text: a response to
     plain text gets a space before it, unless white space stands there, and loses white space at its end.
     With messages nothing is added or taken.

hc_he has the pairs above both medians of all/train, of confidence and edit distance; lc_le those below both.
- Train and validation share no prompt, and no user's first message of a conversation. A prompt is held out
  if a hash of --seed and its text (of a conversation that message) falls below --validation_fraction. So it
  is on the same side in every set, and in every call with these two flags. (If no prompt of a tiny set falls
  below, one is held out, in this call alone.)
- --judge_fraction sets pairs apart for a judge, a reward model that teaches no policy. Another hash chooses
  their prompts; they leave every other file but those of --prompts. judge/validation has a share of them.
- A validation split that a set brings is all/validation. Its prompts leave every train set. hc_he and lc_le
  still hold out prompts of the train rows. These leave all/train and sft/train too.
- A set with confidences loses its train rows without one. A set without confidences becomes `all` alone.
- Ties are dropped, since their order is arbitrary: pairs with a true `tie` or two equal ratings.
- The edit distance counts words. In scripts without spaces (Chinese, Japanese, Thai, Lao, Tibetan, Burmese,
  Khmer) each character is a word, if such characters are at least as many as the words, in both responses.
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

# All that memory keeps of a row, 0.3 KB. prompt: a hash; start: where its line of JSON stands in the store
Row = namedtuple("Row", "prompt confidence edit_distance start")


def main():
    args = parse_args()
    os.makedirs(args.out, exist_ok=True)
    store = tempfile.TemporaryFile(dir=args.out)  # of all rows; it has no name, and goes with the program

    # read: the sets of a kind are put together
    pairs = {"train": [], "validation": []}
    sft = {"train": [], "validation": []}
    schemas = set()
    for name in args.dataset:
        schema, ratings, rows = read_set(name, args, store)
        if schema in PAIRS:
            schemas.add(schema + ratings)
        for side in rows:
            (pairs if schema in PAIRS else sft)[side] += rows[side]
    if len(schemas) > 1:
        fail(f"--dataset: several schemas of pairs ({', '.join(sorted(schemas))}); give each its own --out")
    for kind in pairs, sft:
        if not kind["train"]:  # a validation split that comes alone is split like any other set
            kind["train"], kind["validation"] = kind["validation"], []

    # choose the prompts to hold out. `own` are those of validation splits that sets bring
    own = {row.prompt for kind in (pairs, sft) for row in kind["validation"]}
    rated = [row for row in pairs["train"] if row.confidence is not None]
    if rated and rated != pairs["train"]:
        print(f"without a confidence, left out: {len(pairs['train']) - len(rated):,} train rows")
        pairs["train"] = rated
    of_pairs = {row.prompt for row in pairs["train"]} - own
    judge = {prompt for prompt in of_pairs if prompt % 2**32 / 2**32 < args.judge_fraction}
    if args.judge_fraction and not judge:
        fail(f"--judge_fraction {args.judge_fraction}: no prompt of a pair falls to the judge; raise it")
    of_pairs -= judge
    of_sft = {row.prompt for row in sft["train"]} - own - judge
    held = {prompt for prompt in of_pairs | of_sft | judge if prompt / 2**64 < args.validation_fraction}
    for prompts, spared in (of_pairs, set()), (of_sft, of_pairs), (judge, set()):  # one at least
        if args.validation_fraction > 0 and len(prompts) > 1 and not prompts & held:
            held.add(min(prompts - spared or prompts))

    # split by prompt
    files = {}  # path: rows
    for name, kind in ("preference sets", pairs), ("SFT sets", sft):
        if not any(kind.values()):
            continue
        for rows in kind.values():
            random.Random(args.seed).shuffle(rows)
        fresh, dropped = divide(kind["train"], own)
        rest, judged = divide(fresh, judge)
        train, held_rows = divide(rest, held)
        if args.judge_fraction:
            print(f"{name}: {len(judged):,} of {len(fresh):,} train rows are left to the judge, by prompt")
        if own:
            print(f"{name}: of {len(kind['train']):,} train rows, {len(held_rows):,} held out by prompt, "
                  f"{len(dropped):,} dropped as a validation split has their prompt")
        if not train:
            fail(f"--dataset: no training rows are left of the {name}; lower --validation_fraction"
                 " or --judge_fraction")
        validation = kind["validation"] or held_rows
        if kind is pairs:
            files["judge/train.jsonl"], files["judge/validation.jsonl"] = divide(judged, held)
            files |= three_parts(train, held_rows, validation)
            print_table_5(files)
        else:
            files |= {"sft/train.jsonl": train, "sft/validation.jsonl": validation}

    # prompt sets: a random choice, no two rows of one prompt
    for label, name in args.prompts.items():
        rows = read_set(name, args, store, label)[-1]
        unique = {}
        for row in rows["train"] + rows["validation"]:
            unique.setdefault(row.prompt, row)
        count = min(args.num_prompts or len(unique), len(unique))
        files[f"prompts/{label}.jsonl"] = random.Random(args.seed).sample(list(unique.values()), count)
    write_files(files, args, store)


def divide(rows, prompts):
    """(the rows with none of these prompts, the rows with one of them)"""
    return ([row for row in rows if row.prompt not in prompts],
            [row for row in rows if row.prompt in prompts])


def read_set(name, args, store, label=None):
    """(schema, the ratings it has, {"train": rows, "validation": rows}) of a set; prints what was read and
    dropped. With a label its rows are those of a prompt set."""
    schema = None
    rows = {"train": [], "validation": []}
    dropped = Counter()
    notes = Counter()
    seen = set()
    for side, number, raw in tqdm(raw_rows(name, label), desc=name, unit=" rows", delay=1, disable=None):
        kind = find_schema(f"{name}, row {number}", raw, label)
        if schema is None:
            schema = kind
            ratings = next((f" with {better}" for better, _ in RATINGS if better in raw), "")
        if kind != schema:
            fail(f"{name}, row {number}: {kind}, after rows of {schema}; give each kind a file of its own")
        columns, convert = SCHEMAS[schema]
        try:
            context = {key: raw.pop(key) for key in CONTEXT if key in raw}
            row = convert(dict(raw))
            if isinstance(row, dict):
                row = clean(row, context, args.edit_distance, args.keep_ties or label)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}; give it {columns.replace(' ', ', ')}"
            fail(f"{name}, row {number}: not a row of the set's {schema} ({reason})")
        if isinstance(row, str):
            dropped[row] += 1
            continue
        if label:
            row = {"prompt": row["prompt"], "reference": row.get("reference", row.get("chosen")),
                   "dataset": raw.get("dataset") or label, "id": row.get("id")}
            row = {key: value for key, value in row.items() if value is not None}
        else:
            prompt, chosen, rejected = str(row["prompt"]), row["chosen"], row.get("rejected")
            notes["exact duplicates"] += hash((prompt, chosen, rejected)) in seen
            notes["contradict an earlier pair"] += hash((prompt, rejected, chosen)) in seen
            seen.add(hash((prompt, chosen, rejected)))
            notes["with `system` or `history`, now messages"] += any(context.values())
            notes["without spaces: edit distance by characters"] += "rejected" in row and is_unspaced(row)
        rows[side].append(add(store, row, args.seed, whole=label is not None))
    reasons = ", ".join(f"{count:,} {why}" for why, count in dropped.items()) or "none"
    counts = " and ".join(f"{len(rows[side]):,} {side}" for side in rows if rows[side])
    if not counts:
        fail(f"{name}: " + (f"no row of it can be used: {reasons}" if dropped else "it holds no rows"))
    print(f"{name} ({schema}{ratings}): {counts} rows; dropped: {reasons}")
    found = ", ".join(f"{count:,} {note}" for note, count in notes.items() if count)
    if found:
        print(f"{name}: of these {found}")
    if schema == "unlabelled pairs":
        print(f"{name}: these pairs carry no labels; let precompute_rewards.py --relabel order them")
    return schema, ratings, rows


def find_schema(place, raw, label):
    """The first kind of set whose columns a row has."""
    for schema, (columns, _) in SCHEMAS.items():
        if all(column in raw for column in columns.split()):
            break
    else:
        known = "; ".join(f"{kind}: {columns}" for kind, (columns, _) in SCHEMAS.items())
        fail(f"{place}: no known schema has its columns ({' '.join(raw)}); rename them to one of: {known}")
    if schema == "prompts" and not label:
        fail(f"{place}: no column `chosen` ({' '.join(raw)}); rename one, or give prompts to --prompts")
    return "prompts" if schema == "unlabelled pairs" and label else schema


def clean(row, context, edit_distance, keep_ties):
    """The row as the models read it, with a pair's `edit_distance`; or (a str) why it is dropped."""
    row = dict(row)
    prompt = row["prompt"]
    chat = any(context.values()) or any(isinstance(row.get(key), list) for key in ("prompt", *ANSWERS))
    if chat:
        prompt = find_conversation(row, context)
        if isinstance(prompt, str):
            return prompt
    last = prompt[-1]["content"] if chat and prompt else prompt
    if not last or not last.strip():
        return "with an empty prompt"
    row["prompt"] = prompt
    for key in ANSWERS:
        text = row.get(key) or ""
        if not text.strip():
            if key != "reference" and key in row:
                return f"with an empty `{key}`"
            row.pop(key, None)
        elif not chat:
            space = "" if prompt[-1].isspace() or text[0].isspace() else " "
            row[key] = space + text.rstrip()
    if "rejected" in row:
        if row["chosen"].rstrip() == row["rejected"].rstrip():
            return "with identical responses"
        tied = row.get("tie") in (True, "true")
        for better, worse in RATINGS:
            if row.get(better) is not None and row.get(worse) is not None:
                row.setdefault("confidence", row[better] - row[worse])
                tied = tied or row[better] == row[worse]
        if tied and not keep_ties:
            return "tied (--keep_ties keeps them)"
    confidence = row.pop("confidence", None)
    if confidence is not None and confidence == confidence:  # nan is how some tables write None
        if not isinstance(confidence, (int, float)) or not abs(confidence) < 2**53:
            raise TypeError("`confidence` is not a finite number")
        row["confidence"] = confidence
    if "rejected" in row:
        row["edit_distance"] = token_edit_distance(row, edit_distance)
    return row


def find_conversation(row, context):
    """The messages before the answer, or (a str) why the row is dropped. Of an answer that is a message list
    the last message stays in the row."""
    prompt = row["prompt"] or []
    prompt = as_messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
    talks = []
    for key in ANSWERS:
        turns = []
        if isinstance(row.get(key), list):
            *turns, last = as_messages(row[key]) or [{"role": None}]
            if last["role"] != "assistant":
                return "without an assistant's last turn"
            row[key] = last["content"]
        talk = join(prompt, turns)
        if talk is None or (key == "rejected" and key in row and talk != talks[0]):
            return f"with turns in `{key if talk is None else 'chosen'}` that the prompt lacks"
        talks.append(talk)
    talk = talks[0]
    system = context.get("system") or context.get("system_prompt")
    start = [{"role": "system", "content": system}] if system else []
    for turn in context.get("history") or []:
        if isinstance(turn, dict):
            start.append(turn)
        else:
            question, answer = turn
            start += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    start = as_messages(start)
    if not talk or talk[:len(start)] == start:
        return talk
    if talk[0]["role"] == "system":
        raise TypeError("`system` or `history` beside a system message of the prompt")
    return start + talk


def join(prompt, turns):
    """The conversation of a prompt and the turns before an answer; None where they do not fit."""
    asked = [turn["content"].strip() for turn in prompt]
    given = [turn["content"].strip() for turn in turns]
    if not turns:
        return prompt
    if asked in (given[:len(asked)], given[-len(asked):]):  # the turns are the whole conversation
        return turns
    goes_on = turns[0]["role"] not in ("system", "developer", prompt[-1]["role"])
    return prompt + turns if goes_on else None


def as_messages(turns):
    """The messages with role and content alone."""
    for turn in turns:
        if turn["role"] not in ROLES or not isinstance(turn["content"], str) or turn.get("tool_calls"):
            raise TypeError(f"a message's content is no text, or its role is none of {', '.join(ROLES)}")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def token_edit_distance(row, of):
    """Levenshtein's distance of the responses' words, over the longer length. `of`: responses or texts."""
    words = r"\S+"
    if is_unspaced(row):
        words = rf"[{UNSPACED}]|[^\s{UNSPACED}]+"
    post = []
    if of == "texts":  # of TL;DR's prompts the post alone counts: that gives the paper's means
        prompt = row["prompt"]
        turns = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        post = re.findall(words, " ".join(turns).split("\n\nPOST: ")[-1].removesuffix("TL;DR:"))
    chosen = post + re.findall(words, row["chosen"])
    rejected = post + re.findall(words, row["rejected"])
    return round(Levenshtein.normalized_distance(chosen[:50_000], rejected[:50_000]), 4)  # more takes minutes


def is_unspaced(row):
    """Whether both responses have at least as many characters of scripts without spaces as words."""
    texts = row["chosen"], row["rejected"]
    return all(len(re.findall(f"[{UNSPACED}]", text)) >= len(text.split()) for text in texts)


def add(store, row, seed, whole):
    """Writes a row to the store, as a line of JSON. Returns its Row. A conversation goes by its first user's
    message, so that all its rows are on one side; with `whole` by all of it."""
    start = store.seek(0, os.SEEK_END)
    line = json.dumps(row, ensure_ascii=False, default=str)
    if "NaN" in line or "Infinity" in line:  # strict JSON has neither
        line = json.dumps(json.loads(line, parse_constant=lambda name: None), ensure_ascii=False)
    store.write((line + "\n").encode("utf-8", "replace"))  # a lone surrogate has no UTF-8, it becomes "?"
    prompt = row["prompt"]
    if isinstance(prompt, list):
        first = next((turn["content"] for turn in prompt if turn["role"] == "user"), prompt[0]["content"])
        prompt = json.dumps(prompt) if whole else first
    digest = hashlib.sha256(f"{seed} {prompt}".encode("utf-8", "replace")).digest()
    return Row(int.from_bytes(digest[:8], "big"), row.get("confidence"), row.get("edit_distance"), start)


def three_parts(train, held, validation):
    """{path: rows} of D_all, D_hc,he and D_lc,le, by the medians of `train`."""
    files = {"all/train.jsonl": train, "all/validation.jsonl": validation}
    files |= {f"{part}/{side}.jsonl": [] for part in ("hc_he", "lc_le") for side in ("train", "validation")}
    if train[0].confidence is None:
        print("no confidences, so hc_he and lc_le stay empty")
        return files
    confidence = statistics.median(row.confidence for row in train)
    distance = statistics.median(row.edit_distance for row in train)
    print(f"medians of all/train: confidence {confidence:g}, edit distance {distance:.4f}")
    for side, rows in ("train", train), ("validation", held):
        for row in rows:
            if row.confidence > confidence and row.edit_distance > distance:
                files[f"hc_he/{side}.jsonl"].append(row)
            if row.confidence < confidence and row.edit_distance < distance:
                files[f"lc_le/{side}.jsonl"].append(row)
    for part, place in ("hc_he", "above"), ("lc_le", "below"):
        if not files[f"{part}/train.jsonl"]:
            print(f"{part} stays empty: no training pair is {place} both medians")
    return files


def print_table_5(files):
    """The means of the three train sets, and their sizes."""
    print("\n| set | confidence | edit distance | train | validation |\n|---|---|---|---|---|")
    for part in "all", "hc_he", "lc_le":
        rows = files[f"{part}/train.jsonl"]
        means = []
        for column in "confidence", "edit_distance":
            values = [getattr(row, column) for row in rows]
            means.append(f"{statistics.fmean(values):.2f}" if values and None not in values else "-")
        held = len(files[f"{part}/validation.jsonl"])
        print(f"| {part} | {' | '.join(means)} | {len(rows):,} | {held:,} |")
    print()


# ---- the schemas. Each function turns a raw row into a row in our form, or (a str) says why it is dropped

ARTICLE = "Summarize this news article clearly and concisely. Use TL;DR in your response:"  # Table 4
TLDR = "SUBREDDIT: r/{}\n\nTITLE: {}\n\nPOST: {}\n\nTL;DR:"  # OpenAI's query format
ROLES = "system", "developer", "user", "assistant", "tool"
ANSWERS = "chosen", "rejected", "reference"
# Scripts without spaces between words: Thai to Burmese, Khmer, Chinese and Japanese with their punctuation
UNSPACED = (r"\u0e00-\u109f\u1780-\u17ff\u3001-\u312f\u3190-\u9fff\uf900-\ufaff\uff01-\uff9f"
            r"\U00020000-\U0003ffff")
CONTEXT = "system", "system_prompt", "history"  # columns that belong to the prompt
# The better and the worse response's rating, as published sets (trl-lib, H4, argilla) name them
RATINGS = [("score_chosen", "score_rejected"), ("chosen_rating", "rejected_rating"),
           ("chosen-rating", "rejected-rating"), ("chosen_score", "rejected_score")]


def openai_row(raw):
    info = raw["info"]
    if info.get("post"):
        parts = info["subreddit"], info.get("title") or "", info["post"]
        prompt = TLDR.format(*map(str.strip, parts))
    elif info.get("article"):  # the validation split's CNN/DM batches
        prompt = article_prompt(info["article"], info.get("title"))
    else:
        return "without post and article"
    texts = [summary["text"].strip() for summary in raw["summaries"]]
    row = {"prompt": prompt, "chosen": texts[raw["choice"]], "rejected": texts[1 - raw["choice"]],
           "confidence": (raw.get("extra") or {}).get("confidence"),
           "id": info.get("id"), "batch": raw.get("batch")}
    return {key: value for key, value in row.items() if value is not None}


def conversation_row(raw):
    """Two conversations that part at their last turn: message lists (trl-lib) or transcripts (HH)."""
    talks = {}
    for key in "chosen", "rejected":
        talk = raw[key]
        if isinstance(talk, str):  # splits into ["", "Human", " ...", "Assistant", " ..."]
            start, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + talk.lstrip())
            if start.strip() or not parts:
                return "without a prompt (name its column `prompt`, or make the texts HH's transcripts)"
            talk = [{"role": "user" if who == "Human" else "assistant", "content": text.strip()}
                    for who, text in zip(parts[::2], parts[1::2])]
        talks[key] = talk
    if talks["chosen"][:-1] != talks["rejected"][:-1]:
        return "with two different prompts"
    return {"prompt": talks["chosen"][:-1]} | raw | talks


def unlabelled_row(raw):
    """Two responses in the order of the file. The Oracle says later which of them is the chosen one."""
    responses = raw.pop("responses")
    if not isinstance(responses, list) or len(responses) != 2:
        raise TypeError("`responses` is not a list of two texts")
    return raw | {"chosen": responses[0], "rejected": responses[1]}


def answer_row(raw, column):
    """An SFT row whose response stands in `column`."""
    return {"prompt": raw["prompt"], "chosen": raw.pop(column)} | raw


def label_row(raw):
    """A row of TL;DR's SFT set. Its prompt gets the blank lines of OpenAI's format."""
    post = re.fullmatch(r"SUBREDDIT: r/(.*?)\n+TITLE:(.*?)\n+POST:(.*)\n+TL;DR:\s*", raw["prompt"], re.DOTALL)
    if post:
        raw["prompt"] = TLDR.format(*map(str.strip, post.groups()))
    return answer_row(raw | {"label": raw["label"].strip()}, "label")


def messages_row(raw):
    return answer_row(raw | {"prompt": list(raw["messages"][:-1])}, "messages")


def article_row(raw):
    row = {"prompt": raw.get("prompt") or article_prompt(raw["article"], raw.get("title")),
           "chosen": raw["highlights"].replace("\n", " ")}
    return row | ({"id": raw["id"]} if raw.get("id") else {})


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
    "SFT labels": ("prompt label", label_row),
    "SFT responses": ("prompt response", lambda raw: answer_row(raw, "response")),
    "SFT completions": ("prompt completion", lambda raw: answer_row(raw, "completion")),
    "SFT messages": ("messages", messages_row),
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


def raw_rows(name, prompts):
    """Yields (train or validation, row number, raw row) of a file or of what load_dataset gives."""
    if not os.path.isfile(name):
        yield from hub_rows(name, prompts)
        return
    for number, raw in file_rows(name):
        if not isinstance(raw, dict):
            fail(f"{name}, line {number}: not a JSON object; write one object a row")
        # the raw files of OpenAI's comparisons name each row's split: train, valid1, valid2
        held_out = "summaries" in raw and str(raw.get("split")).startswith("valid")
        yield "validation" if held_out else "train", number, raw


def hub_rows(name, prompts):
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
        side = "validation" if split.startswith(("val", "dev", "test")) and not prompts else "train"
        for number, raw in enumerate(rows, 1):
            yield side, number, raw


def file_rows(path):
    """Yields (row number, row) of a parquet or CSV file or a JSON array, (line number, row) of JSON lines."""
    try:
        if path.endswith((".parquet", ".csv", ".csv.gz")):
            yield from enumerate((row for batch in table_batches(path) for row in batch.to_pylist()), 1)
            return
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if number == 1 and line.startswith("["):
                    yield from enumerate(json.loads(line + file.read()), 1)
                elif line.strip():
                    yield number, json.loads(line)
    except json.JSONDecodeError as error:
        fail(f"{path}, line {number}: not JSON ({error}); write one JSON object a line, or one array of them")
    except (OSError, EOFError, zlib.error, ValueError, NotImplementedError, RecursionError) as error:
        reason = str(error).split("\n")[0]
        fail(f"{path}: cannot read it ({reason}); name a UTF-8 JSON or CSV file, or a parquet file")


def table_batches(path):
    """Yields tables of a thousand rows."""
    if path.endswith(".parquet"):
        import pyarrow.parquet  # here, as JSON needs none of it
        return pyarrow.parquet.ParquetFile(path).iter_batches(1000)
    from pyarrow import csv
    # in these columns 12 is a text; in the others it is a number, and nothing is None
    columns = " ".join(columns for columns, _ in SCHEMAS.values())
    texts = {column: "string" for column in (*columns.split(), *CONTEXT, "reference")}
    return csv.read_csv(  # a block holds the longest row, and decides what is a number
        path, csv.ReadOptions(block_size=2**26), csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(column_types=texts)).to_batches(1000)


def write_files(files, args, store):
    """All files are whole before the first takes its place. A file of an earlier call that has no rows now
    goes, as sets would mix."""
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
        for path in files:
            if os.path.exists(path + ".partial"):
                os.remove(path + ".partial")
        raise
    for path, rows in files.items():
        if rows:
            os.replace(path + ".partial", path)
            print(f"{path}: {len(rows):,} rows")
        elif os.path.exists(path):
            os.remove(path)
            print(f"{path}: no rows; removed the file of an earlier call")


def fail(message):
    """Ends the program on bad input: one line on stderr, exit status 2."""
    line = " ".join(str(message).split())
    tqdm.write(f"error: {line}", file=sys.stderr)  # on a line of its own, whatever bar is there
    sys.exit(2)


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
    add("--judge_fraction", type=float, default=0.0,
        help="share of the pairs' training prompts for data/judge, pairs of which no other file has the prompt: "
             "they train a judge that taught no policy (%(default)s)")
    add("--num_prompts", type=int, default=1000, help="random prompts of a prompt set, 0: all (%(default)s)")
    add("--seed", type=int, default=0, help="picks held-out and random prompts, and the order (%(default)s)")
    add("--keep_ties", action="store_true",
        help="keep pairs with a true `tie` or two equal ratings, whose order is arbitrary")
    add("--edit_distance", default="responses", choices=["responses", "texts"],
        help="of the responses, or of post + response, which gives Table 5's means (%(default)s)")
    args = parser.parse_args()
    if not args.dataset and not args.prompts:
        fail("nothing to do; name sets after --dataset or --prompts")
    if len(set(map(os.path.realpath, args.dataset))) < len(args.dataset):
        fail("--dataset: a set is named twice; name it once")
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        fail(f"--out {args.out}: that is a file; name a folder")
    for flag in "validation_fraction", "judge_fraction":
        if not 0 <= getattr(args, flag) < 1:
            fail(f"--{flag} {getattr(args, flag)}: give a share of at least 0 and below 1")
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
