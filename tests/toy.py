"""
The laboratory: a toy TL;DR task written by code, whose true reward is known, and a tiny LM that can do it.

On real data only an Oracle or a judge says who won. Here a program knows who did.

What is true: the author of a post tells five facts (job, city, thing lost, cause, feeling; 24 values each),
mixed with sentences about other people (distractors) and fillers. A summary is worth
    + 1     for each of the author's facts that it tells
    - 1     for each value in it that is not the author's
    - 0.5   for each value told again
    - 0.1   for each word over 18
    - 0.25  for each pair of neighbouring words (by class) that no well-formed summary holds
    - 1     if it does not end by itself (no EOS)
so a perfect one gets 5. Labels are drawn from Bradley-Terry at 1.5 times the difference in true reward. Half
the pairs are minimal edits, half are summaries of two independent writers. The out-of-domain prompts are news
articles: other sentences, more distractors, twice as long.

    python tests/toy.py --out out/toy --seed 0                               # about 80 s on one core
    python evaluate.py ... --reward_fn tests/toy.py:true_reward              # judged by the true reward

OUT/raw/comparisons.jsonl  pairs, in the schema of openai/summarize_from_feedback
OUT/raw/sft.jsonl          writers' summaries of mixed quality, schema of CarperAI/openai_summarize_tldr
OUT/raw/test.jsonl         held-out posts with perfect summaries, the same schema
OUT/raw/articles.jsonl     articles with perfect highlights, schema of abisee/cnn_dailymail
OUT/base/                  a 97k-parameter Llama pretrained on clean short documents, its word-level tokenizer
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import sys
from functools import lru_cache

VALUES = {slot: words.split() for slot, words in {
    "job": "nurse teacher baker driver lawyer plumber farmer painter waiter doctor singer writer barber "
           "tailor pilot sailor dancer chef clerk guard miner mechanic librarian carpenter",
    "city": "paris london berlin madrid rome oslo vienna dublin prague lisbon athens warsaw boston chicago "
            "denver dallas seattle miami tokyo delhi cairo lima sydney toronto",
    "thing": "wallet phone key ring watch laptop camera passport bike guitar jacket bag umbrella ticket "
             "diary helmet scarf hat necklace violin tent suitcase bracelet drone",
    "cause": "storm fire flood thief crash blackout strike party wedding hangover argument prank leak delay "
             "earthquake parade riot snowfall bug typo rumor bet scam heatwave",
    "feeling": "sad angry lonely guilty anxious tired ashamed bitter confused hopeful calm happy jealous "
               "numb proud scared shocked upset nervous relieved bored furious grateful worried"}.items()}
SLOTS = list(VALUES)
SLOT_OF = {value: slot for slot, values in VALUES.items() for value in values}

# {} is the value. A sentence that names one of PEOPLE is about somebody else, any other is the author's own.
PEOPLE = "friend sister brother boss neighbor roommate cousin witness".split()
POST = {"job": ["i work as a {} .", "i am a {} ."], "city": ["i live in {} .", "i moved to {} ."],
        "thing": ["i lost my {} .", "my {} is gone ."], "feeling": ["now i feel {} .", "i am so {} ."],
        "cause": ["it was because of a {} .", "a {} is to blame ."]}
POST_OTHER = {"job": ["my {who} works with the {} ."], "city": ["my {who} comes from {} ."],
              "thing": ["my {who} bought the {} ."], "cause": ["my {who} talks of the {} ."],
              "feeling": ["my {who} looks {} ."]}
POST_FILLER = ["any advice is welcome .", "sorry for the long post .", "thanks for reading ."]
ARTICLE = {"job": ["the victim , a {} , spoke to the news on monday ."],
           "city": ["police said the victim comes from {} ."],
           "thing": ["the victim reported a missing {} to the police ."],
           "cause": ["police said that a {} was the reason for it ."],
           "feeling": ["the victim told the news of being {} ."]}
ARTICLE_OTHER = {"job": ["a {who} of the victim knows the {} as well ."],
                 "city": ["a {who} in {} spoke to the news as well ."],
                 "thing": ["one {who} bought the {} last week ."],
                 "cause": ["one {who} spoke of the {} last week ."],
                 "feeling": ["police said that the {who} looks {} ."]}
ARTICLE_FILLER = ["police said there was no more to report .", "the news will follow the story this week .",
                  "it was the first report of this sort on monday ."]
TITLES = ["need some advice", "please help me",
          "lost my {thing} and feel {feeling}", "my {thing} is gone and i am {feeling}"]
SUBREDDITS = ["r/advice", "r/relationships", "r/offmychest", "r/legaladvice"]
TAILS = ["", "and would like some advice", "and would like some help and some advice from the people here"]


def parse_args():
    formatters = argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", formatters, {}))
    flag = parser.add_argument
    flag("--out", default="out/toy", help="folder that everything goes into")
    flag("--seed", type=int, default=0, help="of the data and of the LM")
    flag("--pairs", type=int, default=2000, help="rows of comparisons.jsonl")
    flag("--sft", type=int, default=1500, help="rows of sft.jsonl")
    flag("--prompts", type=int, default=250, help="rows of test.jsonl and of articles.jsonl")
    flag("--flip", type=float, default=0.0, help="share of labels to flip, 0 to 1")
    flag("--steps", type=int, default=800, help="pretraining steps; 0: random weights")
    flag("--hidden_size", type=int, default=64, help="of the LM, a multiple of 8")
    flag("--layers", type=int, default=2, help="of the LM")
    flag("--family", choices=["llama", "gpt_neox"], default="llama",
         help="of the LM; gpt_neox reads pieces of words, by a tokenizer of its own")
    args = parser.parse_args()
    if min(args.pairs, args.sft, args.prompts, args.layers) < 1 or args.steps < 0 or not 0 <= args.flip <= 1:
        fail("--pairs, --sft, --prompts, --layers must be 1 or more, --steps 0 or more, --flip from 0 to 1")
    if args.hidden_size < 8 or args.hidden_size % 8:
        fail(f"--hidden_size {args.hidden_size}: give a multiple of 8")
    return args


def main():
    args = parse_args()
    try:
        os.makedirs(f"{args.out}/raw", exist_ok=True)
    except OSError as error:
        fail(f"--out {args.out}: cannot make the folder ({error}); name one that can be written")
    files = {"comparisons": make_comparisons(args.pairs, args.seed, args.flip),
             "sft": make_sft(args.sft, args.seed), "test": make_posts(args.prompts, args.seed),
             "articles": make_articles(args.prompts, args.seed)}
    for name, rows in files.items():
        write_jsonl(f"{args.out}/raw/{name}.jsonl", rows)
        print(f"wrote {args.out}/raw/{name}.jsonl, {len(rows)} rows")

    import torch
    torch.set_num_threads(1)  # the LM is too small to gain from more
    tokenizer = make_tokenizer(pieces=args.family == "gpt_neox")
    model = make_model(tokenizer, args.seed, args.steps, args.hidden_size, args.layers, args.family)
    base = f"{args.out}/base"
    shutil.rmtree(f"{base}.partial", ignore_errors=True)
    model.save_pretrained(f"{base}.partial")
    tokenizer.save_pretrained(f"{base}.partial")
    shutil.rmtree(base, ignore_errors=True)
    os.replace(f"{base}.partial", base)
    print(f"wrote {base}, {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


# ---- what is true ------------------------------------------------------------------------------------------

def phrases(facts):
    """The parts of a summary of `facts` ({slot: value}, any subset), each a list of equally good phrases."""
    who = "a {job}" if "job" in facts else "someone"
    parts = [
        [who + " from {city}", who + " in {city}"] if "city" in facts else [who],
        ["lost a {thing}", "lost the {thing}"] if "thing" in facts else ["lost something"],
        ["because of a {cause}", "due to a {cause}", "after a {cause}"] if "cause" in facts else [""],
        ["and now feels {feeling} about it", "and feels {feeling} about it", "and is now very {feeling}"]
        if "feeling" in facts else [""]]
    return [[phrase.format(**facts) for phrase in part] for part in parts]


def bigrams(words):
    """The pairs of neighbouring word classes (a value's is its slot, another word's itself), with ends."""
    classes = ["<start>", *(f"<{SLOT_OF[word]}>" if word in SLOT_OF else word for word in words), "<end>"]
    return list(zip(classes, classes[1:]))


# The bigrams of all well-formed summaries.
LEGAL = {pair for slots in itertools.product(*((slot, None) for slot in SLOTS))
         for parts in itertools.product(*phrases({slot: VALUES[slot][0] for slot in slots if slot}), TAILS)
         for pair in bigrams(" ".join([*parts, "."]).split())}


@lru_cache(maxsize=100_000)
def author_facts(prompt):
    """{slot: value} of a prompt's author (post or article): the values in sentences that name nobody else."""
    own = [sentence for sentence in prompt.split(" .") if not set(PEOPLE) & set(sentence.split())]
    words = " ".join(own).split()
    return {SLOT_OF[word]: word for word in reversed(words) if word in SLOT_OF}  # the first of a slot stays


def true_reward(row):
    """The true reward, at most 5, of a row's `response` to its `prompt`; `eos` False (default True): cut."""
    facts = author_facts(str(row["prompt"]))
    words = str(row["response"]).split()
    told = [word for word in words if word in SLOT_OF]
    right = sum(facts.get(SLOT_OF[value]) == value for value in set(told))
    wrong, repeats = len(set(told)) - right, len(told) - len(set(told))
    illegal = sum(pair not in LEGAL for pair in bigrams(words))
    cut = not row.get("eos", True)
    return float(right - wrong - 0.5 * repeats - 0.1 * max(0, len(words) - 18) - 0.25 * illegal - cut)


# ---- the documents and their summaries ---------------------------------------------------------------------

def make_document(rng, article=False, facts=5, others=None, fillers=None):
    """A post or article of `facts` facts: {prompt, text, facts, others}, of a post title, subreddit too."""
    own, other, filler = ((POST, POST_OTHER, POST_FILLER), (ARTICLE, ARTICLE_OTHER, ARTICLE_FILLER))[article]
    others = rng.randint(*((3, 5) if article else (1, 3))) if others is None else others
    fillers = rng.randint(*((1, 2) if article else (0, 1))) if fillers is None else fillers
    doc = {"facts": {slot: rng.choice(VALUES[slot]) for slot in rng.sample(SLOTS, facts)}, "others": []}
    sentences = [rng.choice(own[slot]).format(value) for slot, value in doc["facts"].items()]
    for slot in rng.choices(SLOTS, k=others):
        value = rng.choice([value for value in VALUES[slot] if value != doc["facts"].get(slot)])
        doc["others"].append((slot, value))
        sentences.append(rng.choice(other[slot]).format(value, who=rng.choice(PEOPLE)))
    sentences += rng.sample(filler, fillers)
    rng.shuffle(sentences)
    doc["text"] = " ".join(sentences)
    if article:
        return {**doc, "prompt": f"Article: {doc['text']}\n\nTL;DR:"}
    titles = TITLES if {"thing", "feeling"} <= doc["facts"].keys() else TITLES[:2]
    title, subreddit = rng.choice(titles).format(**doc["facts"]), rng.choice(SUBREDDITS)
    prompt = f"SUBREDDIT: {subreddit}\n\nTITLE: {title}\n\nPOST: {doc['text']}\n\nTL;DR:"
    return {**doc, "prompt": prompt, "title": title, "subreddit": subreddit}


def write(plan):
    """The text of a plan: its facts, style (of phrases), tail; slips: a part told again, a word left out."""
    parts = [part[style % len(part)] for part, style in zip(phrases(plan["facts"]), plan["style"])]
    if plan["repeat"] is not None:
        parts.insert(plan["repeat"], parts[plan["repeat"]])
    words = " ".join([*parts, TAILS[plan["tail"]], "."]).split()
    if plan["omit"] is not None:
        del words[plan["omit"] % len(words)]
    return " ".join(words)


def gold_plan(doc, rng):
    """The plan of a perfect summary."""
    style = [rng.randrange(6) for _ in range(4)]
    return {"facts": dict(doc["facts"]), "style": style, "tail": 0, "repeat": None, "omit": None}


def wrong_value(doc, slot, rng):
    """A value of `slot` that is not the author's: a distractor's where there is one."""
    others = [value for other, value in doc["others"] if other == slot]
    return rng.choice(others or [value for value in VALUES[slot] if value != doc["facts"][slot]])


def writer_plan(doc, rng):
    """The plan of a simulated writer: the more careless, the more is wrong or missing, the longer it runs."""
    plan, careless = gold_plan(doc, rng), rng.random()
    for slot in doc["facts"]:
        luck = rng.random()
        if luck < 0.2 * careless:
            plan["facts"][slot] = wrong_value(doc, slot, rng)
        elif luck < 0.9 * careless:
            del plan["facts"][slot]
    plan["tail"] = rng.choice([1, 2]) if rng.random() < 0.6 * careless else 0
    plan["repeat"] = rng.randrange(4) if rng.random() < 0.3 * careless else None
    plan["omit"] = rng.randrange(1000) if rng.random() < 0.3 * careless else None
    return plan


def edit_plan(doc, plan, rng):
    """The plan with one change: a paraphrase (equal but for length), or a fact mended, spoilt or left out."""
    plan = {**plan, "facts": dict(plan["facts"]), "style": list(plan["style"])}
    slot, kind = rng.choice(SLOTS), rng.random()
    if kind < 0.3:
        plan["style"][rng.randrange(4)] += 1
    elif plan["facts"].get(slot) != doc["facts"][slot]:
        plan["facts"][slot] = doc["facts"][slot]
    elif kind < 0.75:
        plan["facts"][slot] = wrong_value(doc, slot, rng)
    else:
        del plan["facts"][slot]
    return plan


# ---- the data sets -----------------------------------------------------------------------------------------

def draw_pairs(n, seed, flip):
    """n of (post, two texts, their true rewards, index of the preferred, confidence); some share a post."""
    rng, doc = random.Random(f"pairs {seed}"), None
    for _ in range(n):
        doc = make_document(rng) if doc is None or rng.random() < 0.8 else doc
        first = writer_plan(doc, rng)
        second = edit_plan(doc, first, rng) if rng.random() < 0.5 else writer_plan(doc, rng)
        texts = [write(plan) for plan in rng.sample([first, second], 2)]
        rewards = [true_reward({"prompt": doc["prompt"], "response": text}) for text in texts]
        difference = rewards[1] - rewards[0]
        choice = int(rng.random() < 1 / (1 + math.exp(-1.5 * difference)))
        confidence = min(9, max(1, round(1.5 + 1.5 * abs(difference) + rng.gauss(0, 1))))
        yield doc, texts, rewards, 1 - choice if rng.random() < flip else choice, confidence


def make_pairs(n, seed, flip=0.0):
    """Preference rows: prompt, chosen, rejected, confidence (1-9), true chosen_reward and rejected_reward."""
    return [{"prompt": doc["prompt"], "chosen": " " + texts[best], "rejected": " " + texts[1 - best],
             "confidence": confidence, "chosen_reward": rewards[best], "rejected_reward": rewards[1 - best]}
            for doc, texts, rewards, best, confidence in draw_pairs(n, seed, flip)]


def make_comparisons(n, seed, flip=0.0):
    """make_pairs' pairs as raw rows of openai/summarize_from_feedback; one in fifty lacks a confidence."""
    rng, rows = random.Random(f"comparisons {seed}"), []
    for doc, texts, _, choice, confidence in draw_pairs(n, seed, flip):
        info = {"id": "t3_" + hashlib.sha1(doc["prompt"].encode()).hexdigest()[:6], "post": doc["text"],
                "title": doc["title"], "subreddit": doc["subreddit"][2:], "site": None, "article": None}
        rows.append({"info": info, "choice": choice, "worker": f"worker{rng.randrange(20)}",
                     "summaries": [{"text": " " + text, "policy": rng.choice(["sup1", "ref"]), "note": None}
                                   for text in texts],
                     "batch": f"batch{rng.randrange(3, 9)}", "split": "train",
                     "extra": {"confidence": None if rng.random() < 0.02 else confidence}})
    return rows


def documents(kind, plan, n, seed, article=False):
    """n of (document, summary written by `plan`); each kind and seed is a random stream of its own."""
    rng = random.Random(f"{kind} {seed}")
    docs = [make_document(rng, article) for _ in range(n)]
    return [(doc, write(plan(doc, rng))) for doc in docs]


def make_sft(n, seed):
    """Rows prompt, label of CarperAI/openai_summarize_tldr: posts and writers' summaries of mixed quality."""
    return [{"prompt": doc["prompt"], "label": text} for doc, text in documents("sft", writer_plan, n, seed)]


def make_posts(n, seed):
    """Rows prompt, label of the same schema: held-out posts and perfect summaries."""
    return [{"prompt": doc["prompt"], "label": text} for doc, text in documents("posts", gold_plan, n, seed)]


def make_articles(n, seed):
    """Rows article, highlights, id of abisee/cnn_dailymail: articles and perfect highlights; and a prompt."""
    return [{"article": doc["text"], "highlights": text, "prompt": doc["prompt"],
             "id": hashlib.sha1(doc["text"].encode()).hexdigest()}
            for doc, text in documents("articles", gold_plan, n, seed, article=True)]


def write_jsonl(path, rows):
    """Writes rows, one JSON object a line; the file appears whole or not at all."""
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(f"{path}.partial", path)


# ---- the base LM -------------------------------------------------------------------------------------------

def make_tokenizer(pieces=False):
    """A tokenizer of all words above, or of `pieces` of them (BPE). It has a pad of its own, no template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    texts = ["SUBREDDIT: TITLE: POST: Article: TL;DR:", *SLOT_OF, *PEOPLE, *SUBREDDITS, *TITLES]
    texts += [*POST_FILLER, *ARTICLE_FILLER, *itertools.chain(*LEGAL)]
    texts += itertools.chain(*POST.values(), *POST_OTHER.values(), *ARTICLE.values(), *ARTICLE_OTHER.values())
    words = sorted(word for word in set(" ".join(texts).split()) if word[0] not in "{<")
    words = ["<pad>", "<s>", "</s>", "<unk>", *words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if pieces:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        tokenizer.train_from_iterator([*words[4:], "\n"], trainers.BpeTrainer(
            vocab_size=256, special_tokens=[*words[:4], "TL;DR:"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>",
                                   eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False)


def make_model(tokenizer, seed=0, steps=0, hidden_size=64, layers=2, family="llama"):
    """The tiny LM, fp32, after `steps` steps (0: random weights) on clean documents that grow longer."""
    import torch
    from tqdm import tqdm
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        family, vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=2 * hidden_size,
        num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=512,
        tie_word_embeddings=True, initializer_range=0.1,  # from 0.02 it does not learn to copy in time
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    rng, tldr = random.Random(f"pretraining {seed}"), tokenizer.convert_tokens_to_ids("TL;DR:")
    for step in tqdm(range(steps), desc="pretraining", disable=not steps):
        progress = step / steps
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 50) * (1 - 0.9 * progress)  # warm-up
        texts, article, most = [], rng.random() < 0.3, min(5, 1 + int(20 * progress))
        for _ in range(48):
            doc = make_document(rng, article, facts=rng.randint(max(1, most - 2), most),
                                others=rng.randint(0, 1 + int(2.5 * progress)), fillers=rng.randint(0, 1))
            texts.append(f"<s> {doc['prompt']} {write(gold_plan(doc, rng))} </s>")
        batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        ids = batch.input_ids                                                        # (B, T)
        logits = model(input_ids=ids, attention_mask=batch.attention_mask).logits    # (B, T, V)
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
        # A prompt's words are mostly chance: at full weight they drown the copying, which has to be learned.
        weights = (0.1 + 0.9 * (ids == tldr).cumsum(1))[:, :-1] * batch.attention_mask[:, 1:]  # (B, T-1)
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def fail(message):
    """Ends the program on bad input: one line on stderr, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
