"""What a user may do wrong ends with status 2 and one line on stderr. The line names the file, row or flag
and the mend. No file that was there is touched, and none is added.

A case is a row of a table. It runs a whole script, as `python script.py` does, in a copy of a small
laboratory. Its process is forked from one that has imported the libraries."""
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, ends, run
from safetensors.torch import load, save

import toy

TRAIN, HELD_OUT, POLICY = "data/all/train.jsonl", "data/all/validation.jsonl", "out/sft"  # the defaults
ANSWERS = "out/drdo/generations.jsonl"
RUN = "--eval_data= --batch_size 4 --max_steps 1"
DPO, DRDO = f"align.py --loss dpo {RUN}", f"align.py --loss drdo --oracle_rewards rewards.pt {RUN}"
SFT, TEACH = f"sft.py --model out/sft {RUN}", f"oracle.py {RUN}"
SCORE, ANSWER = "precompute_rewards.py", "generate.py --max_new_tokens 4"
JUDGE = f"evaluate.py --generations {ANSWERS}"
SPLIT = f"splits.py --dataset {TRAIN}"


# ---- what is done to the files: a function of a file's bytes gives those put in their place, None removes it


def line(text, number=3):
    """Puts this in the place of a line."""
    def edit(old):
        lines = old.split(b"\n")
        lines[number - 1] = text if isinstance(text, bytes) else text.encode()
        return b"\n".join(lines)
    return edit


def row(**changes):
    """Changes the third row; a key is taken away where its value is None."""
    def edit(old):
        changed = json.loads(old.split(b"\n")[2]) | changes
        return line(json.dumps({key: value for key, value in changed.items() if value is not None}))(old)
    return edit


def tensors(**changes):
    """Changes entries of a file of torch.save."""
    def edit(old):
        new = io.BytesIO()
        torch.save(torch.load(io.BytesIO(old)) | changes, new)
        return new.getvalue()
    return edit


def settings(**changes):
    """Changes entries of a JSON object; an entry is taken away where its value is None."""
    return lambda old: json.dumps({key: value for key, value in (json.loads(old) | changes).items()
                                   if value is not None}).encode()


class Code:
    """Makes a folder when it is unpickled."""
    def __reduce__(self):
        return os.mkdir, ("the_code_has_run",)


def one_less(old):
    """The weights without one tensor."""
    held = load(old)
    held.pop("model.layers.0.mlp.up_proj.weight")
    return save(held, {"format": "pt"})


def not_a_number(old):
    """The weights with one that is NaN."""
    held = load(old)
    held["model.norm.weight"][0] = NAN
    return save(held, {"format": "pt"})


def one_more(old):
    """The tokenizer with a word that has no row in the embeddings."""
    tokenizer = json.loads(old)
    tokenizer["model"]["vocab"]["zebra"] = 999
    return json.dumps(tokenizer).encode()


def behind_deepspeed(old):
    """A file of torch that finds os.mkdir behind DeepSpeed's name."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(old)) as before, zipfile.ZipFile(changed, "w") as after:
        for name in before.namelist():
            found = b"\x80\x04cdeepspeed.runtime.engine\nos.mkdir\n(X\x10\0\0\0the_code_has_runtR."
            after.writestr(name, found if name.endswith("/data.pkl") else before.read(name))
    return changed.getvalue()


CODE = pickle.dumps(Code(), protocol=2)  # as torch.save writes
NAN, INF, ZEROS = math.nan, math.inf, torch.zeros
CONFIG, WEIGHTS, TOKENIZER = (f"{POLICY}/{name}" for name in (
    "config.json", "model.safetensors", "tokenizer_config.json"))
PARTS = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
SHARDS = {"metadata": {}, "weight_map": {"lm_head.weight": PARTS[0], "model.norm.weight": PARTS[1]}}
REMOTE = settings(model_type="theirs", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
ZERO_3, PAIR = b'{"zero_optimization": {"stage": 3}}', b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
CHECKPOINT = "stopped/checkpoint"
RESUME = f"{DPO} --max_steps 2 --out stopped --resume"
STATE = f"{CHECKPOINT}/step2/mp_rank_00_model_states.pt"


def rewards(**changes):
    return DRDO, {"rewards.pt": tensors(**changes)}


def pairs(**changes):
    return DPO, {TRAIN: row(**changes)}


# what is wrong -> (the command, {file: bytes, JSON, or the edit of it}, words of the one line)
CASES = {
    # ---- JSONL, by the stages
    "an empty file": (DPO, {TRAIN: b""}, [TRAIN, "0 rows"]),
    "a blank line": (DPO, {TRAIN: line("")}, [f"{TRAIN}, line 3", "write an object"]),
    "blank lines alone": (SFT, {TRAIN: b"\n\n"}, [TRAIN]),
    "UTF-16": (DPO, {TRAIN: lambda old: old.decode().encode("utf-16")}, [TRAIN, "UTF-8"]),
    "Latin-1": (DPO, {TRAIN: line('{"prompt": "é"}'.encode("latin-1"))}, [TRAIN, "UTF-8"]),
    "gzip under a plain name": (DPO, {TRAIN: gzip.compress}, [TRAIN, "UTF-8 JSONL"]),
    "a line cut off": (DPO, {TRAIN: line('{"prompt": "a"')}, [f"{TRAIN}, line 3", "JSONDecodeError"]),
    "a JSON array": (DPO, {TRAIN: b'[{"prompt": "a"}]'}, [f"{TRAIN}, line 1", "write an object"]),
    "a number for a row": (SFT, {TRAIN: line("7")}, [f"{TRAIN}, line 3"]),
    "null for a row": (TEACH, {TRAIN: line("null")}, [f"{TRAIN}, line 3"]),
    "a nesting without end": (DPO, {TRAIN: line("[" * 99999)}, [f"{TRAIN}, line 3"]),
    "a number for a text": (*pairs(chosen=7), [f"{TRAIN}, line 3", "chosen"]),
    "null for a text": (DPO, {TRAIN: line('{"prompt": "a", "chosen": null, "rejected": "b"}')},
                        [f"{TRAIN}, line 3", "chosen"]),
    "a list for a response": (*pairs(rejected=["no"]), [f"{TRAIN}, line 3", "rejected"]),
    "a lone surrogate": (*pairs(prompt="\ud800"), [f"{TRAIN}, line 3"]),
    "no prompt": (*pairs(prompt=None), [f"{TRAIN}, line 3", "'prompt'"]),
    "an empty prompt": (*pairs(prompt=""), [f"{TRAIN}, line 3", "empty"]),
    "no rejected": (TEACH, {TRAIN: row(rejected=None)}, [f"{TRAIN}, line 3", "'rejected'"]),
    "no response to learn": (SFT, {TRAIN: row(chosen=None)}, [f"{TRAIN}, line 3", "'chosen'"]),
    "no messages": (*pairs(prompt=[]), [f"{TRAIN}, line 3", "empty"]),
    "a message without a role": (*pairs(prompt=[{"content": "a"}]), [f"{TRAIN}, line 3", "'role'"]),
    "a message without text": (f"{ANSWER} --prompts {TRAIN}", {
        TRAIN: row(prompt=[{"role": "user", "content": None}])}, [f"{TRAIN}, line 3", "with prompt"]),
    "messages that are no objects": (SCORE, {TRAIN: row(prompt=["a"])}, [f"{TRAIN}, line 3"]),
    "held-out data": (f"{DPO} --eval_data {HELD_OUT}", {HELD_OUT: line("{")}, [f"{HELD_OUT}, line 3"]),
    "generations without a response": (JUDGE, {ANSWERS: row(response=None)},
                                       [f"{ANSWERS}, line 3", "'response'"]),
    "a temperature in words": (JUDGE, {ANSWERS: row(temperature="hot")},
                               [f"{ANSWERS}, line 3", "`temperature`"]),
    "a temperature of NaN": (JUDGE, {ANSWERS: row(temperature=NAN)}, [f"{ANSWERS}, line 3", "`temperature`"]),
    "generations named twice": (f"{JUDGE} ./{ANSWERS}", {}, [f"{ANSWERS}: it is named twice"]),
    "a log line that is no object": ("evaluate.py --curves out/drdo", {"out/drdo/log.jsonl": b"7\n"},
                                     ["out/drdo/log.jsonl, line 1"]),
    "a prompt that is a list of texts": (JUDGE, {ANSWERS: row(prompt=["p"])},
                                         [f"{ANSWERS}, line 3", "TypeError"]),
    "no such key": (f"{JUDGE} --group_by set", {}, ["--group_by set", f"{ANSWERS}, line 1"]),
    "every row too long": (f"{DPO} --max_length 3", {}, [TRAIN, "--max_length 3"]),
    "a prompt without a token": (ANSWER, {HELD_OUT: row(prompt=" "), "out/drdo/tokenizer_config.json":
                                          settings(bos_token=None)}, [f"{HELD_OUT}, line 3", "no token"]),
    "every prompt too long": (f"{ANSWER} --max_length 5", {}, [HELD_OUT, "--max_length 5"]),
    "fewer rows than a batch": (f"{DPO} --batch_size 64", {}, [TRAIN, "8 rows", "--batch_size 64"]),
    "no such file": (f"{DPO} --data none.jsonl", {}, ["none.jsonl", "No such file"]),
    "no such generations": ("evaluate.py --generations none.jsonl", {}, ["none.jsonl: cannot read it"]),
    "a folder for a file": (f"{DPO} --data data", {}, ["data", "directory"]),
    "a template that refuses": (DPO, {f"{POLICY}/chat_template.jinja": b"{{ raise_exception('no such') }}"},
                                [f"{TRAIN}, line 1", "no such"]),
    # ---- tensors
    "rewards that are all NaN": (*rewards(chosen=ZEROS(1, 8) + NAN), ["rewards.pt", "finite"]),
    "rewards that are all infinite": (*rewards(rejected=ZEROS(1, 8) - INF), ["rewards.pt", "finite"]),
    "rewards of too few rows": (*rewards(chosen=ZEROS(1, 7), rejected=ZEROS(1, 7)),
                                ["rewards.pt", f"--data {TRAIN}"]),
    "rewards without K": (*rewards(chosen=ZEROS(8), rejected=ZEROS(8)),
                          ["rewards.pt", "run precompute_rewards.py"]),
    "K that differs": (*rewards(chosen=ZEROS(2, 8)), ["rewards.pt", "run precompute_rewards.py"]),
    "rewards of no Oracle": (*rewards(chosen=ZEROS(0, 8), rejected=ZEROS(0, 8)), ["rewards.pt"]),
    "rewards that are lists": (*rewards(chosen=[[0.0] * 8]), ["rewards.pt", "TypeError"]),
    "rewards of generations": (f"{DRDO} --oracle_rewards out/drdo/rewards.pt", {},
                               ["out/drdo/rewards.pt", "sha256"]),
    "rewards of other data": (DRDO, {TRAIN: lambda old: old + old},
                              ["rewards.pt", "sha256", f"--data {TRAIN}"]),
    "rewards without spread": (f"{DRDO} --standardise_oracle", rewards(rejected=torch.arange(8.0)[None])[1],
                               ["--standardise_oracle", "rewards.pt"]),
    "rewards with code in them": (DRDO, {"rewards.pt": CODE}, ["rewards.pt", "run precompute_rewards.py"]),
    "rewards that are no file of torch": (DRDO, {"rewards.pt": b"PK no zip"},
                                          ["rewards.pt", "run precompute_rewards.py"]),
    "rewards cut off": (DRDO, {"rewards.pt": lambda old: old[:-99]},
                        ["rewards.pt", "run precompute_rewards.py"]),
    "a judge with code in it": (JUDGE, {"out/drdo/rewards.pt": CODE}, ["out/drdo/rewards.pt"]),
    # ---- model folders
    "no model": (f"{DPO} --model nowhere", {}, ["nowhere", "folder"]),
    "a file for a model": (f"{DPO} --model rewards.pt", {}, ["rewards.pt", "folder"]),
    "no tokenizer": (DPO, {f"{POLICY}/tokenizer.json": None, TOKENIZER: None}, [POLICY, "tokenizer"]),
    "no EOS": (DPO, {TOKENIZER: settings(eos_token=None)}, [POLICY, "EOS"]),
    "no EOS to end an answer": (f"{ANSWER} --model {POLICY}", {TOKENIZER: settings(eos_token=None)},
                                [POLICY, "EOS"]),
    "no config": (DPO, {CONFIG: None}, [POLICY]),
    "a config that is no JSON": (DPO, {CONFIG: b"{"}, [CONFIG]),
    "an encoder-decoder": (DPO, {CONFIG: {"model_type": "t5", "architectures": ["T5Model"]}},
                           [POLICY, "causal LM"]),
    "no language model": (SFT, {CONFIG: {"model_type": "vit"}}, [POLICY, "causal LM"]),
    "a PEFT adapter": (DPO, {CONFIG: None, f"{POLICY}/adapter_config.json": {"peft_type": "LORA", "r": 8}},
                       [POLICY, "whole causal LM"]),
    "a missing shard": (DPO, {WEIGHTS: None, f"{WEIGHTS}.index.json": SHARDS}, [POLICY, PARTS[0]]),
    "weights cut off": (DPO, {WEIGHTS: lambda old: old[:999]}, [POLICY, "whole causal LM"]),
    "weights that lack one": (DPO, {WEIGHTS: one_less}, [POLICY, "up_proj"]),
    "weights that are NaN": (DPO, {WEIGHTS: not_a_number}, [POLICY, "nan"]),
    "weights of another shape": (DPO, {CONFIG: settings(hidden_size=32)}, [POLICY, "whole causal LM"]),
    "weights with code in them": (DPO, {WEIGHTS: None, f"{POLICY}/pytorch_model.bin": CODE},
                                  [POLICY, "whole causal LM"]),
    "a model that scales its logits": (SFT, {CONFIG: settings(model_type="granite", logits_scaling=8.0)},
                                       ["--model out/sft", "own forward"]),
    "a model that no Oracle can be": (TEACH, {CONFIG: settings(model_type="granite")},
                                      ["--model out/sft", "sequence classifier"]),
    "a model with its own code": (DPO, {CONFIG: REMOTE, f"{POLICY}/code.py": b"import os; os.mkdir('ran')"},
                                  [POLICY]),
    "more words than embeddings": (DPO, {f"{POLICY}/tokenizer.json": one_more, TRAIN: row(chosen=" zebra")},
                                   [POLICY]),
    "a policy for an Oracle": (f"{SCORE} --oracle {POLICY}", {}, [POLICY, "score.weight"]),
    "no second Oracle": (f"{SCORE} --oracle out/oracle nowhere", {}, ["nowhere"]),
    "no folder to answer from": (f"{ANSWER} --model none/such", {}, ["--model none/such", "--out"]),
    # ---- flags
    "a negative rate": (f"{DPO} --learning_rate -1", {}, ["--learning_rate -1", "above 0"]),
    "an infinite rate": (f"{SFT} --learning_rate inf", {}, ["--learning_rate inf", "finite"]),
    "a beta that is no number": (f"{DPO} --beta nan", {}, ["--beta nan", "finite"]),
    "a beta of 0": (f"{DPO} --beta 0", {}, ["--beta 0", "above 0"]),
    "a batch of 0": (f"{DPO} --batch_size 0", {}, ["--batch_size 0", "above 0"]),
    "no steps": (f"{DPO} --max_steps 0", {}, ["--max_steps 0", "above 0"]),
    "negative epochs": (f"{SFT} --epochs -1", {}, ["--epochs -1", "above 0"]),
    "a negative seed": (f"{TEACH} --seed -1", {}, ["--seed -1", "0 or more"]),
    "an alpha of 2": (f"{TEACH} --alpha 2", {}, ["--alpha 2", "0 to 1"]),
    "a top-p of 2": (f"{ANSWER} --top_p 2", {}, ["--top_p 2", "at most 1"]),
    "a negative temperature": (f"{ANSWER} --temperature 0.5 -1", {}, ["--temperature -1", "0 or more"]),
    "more tokens than positions": (f"{ANSWER} --max_new_tokens 600", {},
                                   ["--max_new_tokens 600", "positions"]),
    "a word for a number": (f"{DPO} --batch_size many", {}, ["--batch_size", "many"]),
    "no such flag": (f"{DPO} --bete 1", {}, ["--bete"]),
    "no such loss": ("align.py --loss ppo", {}, ["--loss", "ppo", "drdo"]),
    "a batch of another multiple": (f"{DPO} --batch_size 5 --micro_batch_size 2", {},
                                    ["--batch_size 5", "2 x 1"]),
    "steps and epochs": (f"{DPO} --epochs 2", {}, ["--max_steps", "--epochs", "one of them"]),
    "no rewards to distil": (f"align.py --loss edpo {RUN}", {}, ["--loss edpo", "--oracle_rewards"]),
    "two judges": (f"{JUDGE} --judge m --reward_fn f", {}, ["--reward_fn", "not allowed with"]),
    "nothing to judge": ("evaluate.py", {}, ["--generations", "--curves"]),
    "a file for a folder": (f"{DPO} --out rewards.pt", {}, ["rewards.pt"]),
    "a folder below a file": (f"{SPLIT} --out rewards.pt/data", {}, ["rewards.pt/data"]),
    "a folder for a file of rewards": (f"{SCORE} --out out", {}, ["--out out", "folder"]),
    "the data for a file of rewards": (f"{SCORE} --data {TRAIN} --out {TRAIN}", {}, ["--out", "overwrite"]),
    "the data for relabelled data": (f"{SCORE} --data {TRAIN} --relabel ./{TRAIN}", {},
                                     ["--relabel", "overwrite"]),
    "one file for rewards and pairs": (f"{SCORE} --relabel r.pt --out r.pt", {}, ["--relabel", "overwrite"]),
    "the prompts for answers": (f"{ANSWER} --prompts {TRAIN} --out {TRAIN}", {}, ["--out", "overwrite"]),
    "a folder for generations": (f"{ANSWER} --out out", {}, ["--out out", "folder"]),
    # ---- DeepSpeed's configuration
    "ZeRO-3": (DPO, {"ds_config.json": ZERO_3}, ["ds_config.json", "stage"]),
    "no configuration": (f"{SFT} --deepspeed_config none.json", {}, ["none.json", "ds_config.json"]),
    "a configuration that is no JSON": (TEACH, {"ds_config.json": b"stage: 2"}, ["ds_config.json"]),
    "a configuration without ZeRO": (DPO, {"ds_config.json": b"{}"}, ["ds_config.json"]),
    "a configuration that is a list": (DPO, {"ds_config.json": b"[1]"}, ["ds_config.json"]),
    "negative clipping": (DPO, {"ds_config.json": settings(gradient_clipping=-1)},
                          ["ds_config.json", "clipping"]),
    # ---- checkpoints
    "nothing to resume": (f"{DPO} --resume", {}, ["--resume", "out/dpo/checkpoint", "start without"]),
    "an unfinished run": (f"{DPO} --out stopped", {}, ["--out", "stopped/checkpoint", "--resume"]),
    "another flag": (f"{RESUME} --beta 0.5", {}, ["--resume", "beta was 0.1 and is now 0.5"]),
    "another run's checkpoint": (f"{TEACH} --out stopped --resume --max_steps 2", {}, ["--resume", "was"]),
    "other data": (RESUME, {TRAIN: lambda old: old + old}, ["--resume", "sha256", TRAIN]),
    "a damaged state": (RESUME, {f"{CHECKPOINT}/state.pt": b"{"}, [CHECKPOINT, "start anew"]),
    "a checkpoint without its weights": (RESUME, {STATE: None}, [CHECKPOINT, "start anew"]),
    "a checkpoint cut off": (RESUME, {STATE: lambda old: old[:999]}, [CHECKPOINT, "start anew"]),
    "a checkpoint with code in it": (RESUME, {STATE: CODE}, [CHECKPOINT]),
    "a checkpoint with code behind DeepSpeed's name": (RESUME, {STATE: behind_deepspeed},
                                                       [CHECKPOINT, "engine.os.mkdir"]),
}

# what is odd, and no fault -> (the command, the edits, what is printed)
ACCEPTED = {
    "a BOM": (DPO, {TRAIN: lambda old: b"\xef\xbb\xbf" + old}, "8 rows, 0 over"),
    "no newline at the end": (DPO, {TRAIN: lambda old: old.rstrip()}, "8 rows, 0 over"),
    "CR LF": (SFT, {TRAIN: lambda old: old.replace(b"\n", b"\r\n")}, "8 rows, 0 over"),
    "equal responses": (*pairs(chosen=" same", rejected=" same"), "8 rows, 0 over"),  # splits.py drops them
    "an empty response": (*pairs(rejected=""), "8 rows, 0 over"),  # it is EOS alone
    "an unknown role": (*pairs(prompt=[{"role": "narrator", "content": "a"}]), "8 rows, 0 over"),
    "a line of 10 MB": (*pairs(chosen=" i" * 999, note="x" * 10_000_000), "7 rows, 1 over --max_length"),
    "a time stamp for a seed": (f"{ANSWER} --seed 20261126052423", {}, "responses to"),
    "another program's args.json": (JUDGE, {"out/drdo/args.json": b"[1]"}, "wrote"),
    "rewards that are NaN in one row": (*rewards(chosen=torch.tensor([[NAN] + [0.0] * 7])),
                                        "1 pairs dropped"),
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder in which each stage would run on its defaults: data, models, rewards, generations, earlier
    results, and `stopped`, a run that has a checkpoint and no model yet."""
    lab, tokenizer = tmp_path_factory.mktemp("lab"), toy.make_tokenizer()
    lm = toy.make_model(tokenizer, seed=0, steps=0)
    for folder in ("sft", "oracle", "drdo", "dpo"):
        if folder == "oracle":
            lm.score, lm.config.num_labels = torch.nn.Linear(64, 1, bias=False), 1
        lm.save_pretrained(lab / "out" / folder), tokenizer.save_pretrained(lab / "out" / folder)
        (lab / "out" / folder / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
        if folder == "oracle":
            del lm.score
    (lab / "data" / "all").mkdir(parents=True)
    for name, seed in (("train", 1), ("validation", 2)):
        toy.write_jsonl(str(lab / f"data/all/{name}.jsonl"), toy.make_pairs(8, seed))
    toy.write_jsonl(str(lab / ANSWERS), [
        {"prompt": f"p{k}", "response": f"{name} {k}", "temperature": 0.5, "generator": name, "tokens": 2,
        "eos": True}
        for name in ("us", "them") for k in range(2)])
    rewards = torch.arange(8.0)[None]
    for path, data, held in (("rewards.pt", TRAIN, {"chosen": rewards, "rejected": -rewards}),
                             ("out/drdo/rewards.pt", ANSWERS, {"response": rewards[:, :4]})):
        sha = hashlib.sha256((lab / data).read_bytes()).hexdigest()
        torch.save({**held, "oracles": ["o"], "data_sha256": sha}, lab / path)
    shutil.copy(ROOT / "ds_config.json", lab)
    (lab / "stopped" / "config.json" / "in_the_way").mkdir(parents=True)
    status, output, errors = ends([(lab, f"{DPO} --max_steps 2 --save_steps 1 --out stopped".split())])
    assert status == 2 and (lab / "stopped/checkpoint/step2").exists(), errors
    shutil.rmtree(lab / "stopped/config.json")
    return lab


def contents(folder):
    """{path: sha256} of all that is in a folder, the empty folders too."""
    return {str(path.relative_to(folder)): path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*")}


def prepare(lab, folder, edits):
    """A copy of the laboratory with these edits."""
    shutil.copytree(lab, folder)
    here = os.getcwd()
    os.chdir(folder)
    for path, edit in edits.items():
        path = Path(path)
        if callable(edit):
            edit = edit(path.read_bytes())
        if edit is None:
            path.unlink()
        else:
            path.write_bytes(edit if isinstance(edit, bytes) else json.dumps(edit).encode())
    os.chdir(here)
    return contents(folder)


def messages(errors):
    """The lines of a stderr, without progress bars and argparse's usage."""
    errors = re.sub(r"^usage: .*?(?=^\S+: error: )", "", errors, flags=re.MULTILINE | re.DOTALL)
    bar = re.compile(r"\d+ rows? \[|it/s|s/it")
    return [text for text in re.split(r"[\r\n]+", errors) if text.strip() and not bar.search(text)]


@pytest.mark.parametrize("case", CASES)
def test_bad_input(lab, tmp_path, case):
    command, edits, words = CASES[case]
    before = prepare(lab, tmp_path / "here", edits)
    status, _, errors = ends([(tmp_path / "here", command.split())])
    lines = messages(errors)
    assert status == 2 and len(lines) == 1 and "error: " in lines[0], (status, errors[-2000:])
    assert all(word in lines[0] for word in words), lines[0]
    assert contents(tmp_path / "here") == before


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_odd_and_no_fault(lab, tmp_path, case):
    command, edits, words = ACCEPTED[case]
    prepare(lab, tmp_path / "here", edits)
    status, output, errors = ends([(tmp_path / "here", command.split())])
    assert status == 0 and words in output and not messages(errors), (output, errors[-2000:])


# what is wrong -> (the command, the edits, words of the line, which of two processes sees the edits)
TOGETHER = {
    "a batch that two processes do not divide": (f"{DPO} --batch_size 3", {},
                                                 ["--batch_size 3", "2 processes"], "both"),
    "another number of processes": (RESUME, {}, ["processes was 1 and is now 2"], "both"),
    "rewards of other data, twice": (DRDO, {TRAIN: lambda old: old + old}, ["rewards.pt", "sha256"], "both"),
    "no EOS, twice": (ANSWER, {"out/drdo/tokenizer_config.json": settings(eos_token=None)},
                      ["out/drdo", "EOS"], "both"),
    "ZeRO-3, twice": (SFT, {"ds_config.json": ZERO_3}, ["ds_config.json", "stage"], "both"),
    "a flag, twice": (f"{SCORE} --micro_batch_size 0", {}, ["--micro_batch_size 0"], "both"),
    "the first alone": (DPO, {TRAIN: line("{")}, [f"{TRAIN}, line 3"], 0),
    "the second alone": (DPO, {TRAIN: line("{")}, [f"{TRAIN}, line 3"], 1),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_two_processes_say_it_once(lab, tmp_path, case):
    command, edits, words, who = TOGETHER[case]
    places = [tmp_path / f"here{rank}" for rank in (0, 1)]
    before = [prepare(lab, place, edits if who in ("both", k) else {}) for k, place in enumerate(places)]
    status, _, errors = ends([(place, command.split()) for place in places])
    lines = [text for text in messages(errors) if "error: " in text]
    assert status == 2 and len(lines) == 1 and "Traceback" not in errors, (status, errors[-2000:])
    assert all(word in lines[0] for word in words), lines[0]
    assert [contents(place) for place in places] == before


def test_the_launcher_passes_the_line_and_the_status_on(lab):
    error = run("align.py", "--loss", "dpo", "--model", lab / POLICY, "--data", lab / TRAIN, "--eval_data",
                "", "--out", lab / "out/dpo", "--batch_size", 3, processes=2, launcher=True, expect=2)
    assert error.count("error: ") == 1 and "--batch_size 3" in error and "Traceback" not in error
