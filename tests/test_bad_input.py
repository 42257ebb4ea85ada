"""What a user does wrong ends with exit status 2 and one line on stderr. The line names the file, row or
flag, and the fix. No file that was there is touched, and none is added.

Each case runs a stage, as `python stage.py` does, in a copy of a small folder where every stage would run.
"""
import hashlib
import json
import math
import re
import shutil

import pytest
import torch
from conftest import ROOT, ends, run
from safetensors.torch import load, save

import toy

TRAIN = "data/all/train.jsonl"
HELD_OUT = "data/all/validation.jsonl"
CONFIG = "out/sft/config.json"
TOKENIZER = "out/sft/tokenizer_config.json"
WEIGHTS = "out/sft/model.safetensors"
STATE = "stopped/checkpoint/step2/mp_rank_00_model_states.pt"

RUN = "--out new --eval_data= --batch_size 4 --max_steps 1"
DPO = f"align.py --loss dpo {RUN}"
DRDO = f"align.py --oracle_rewards rewards.pt {RUN}"
SFT = f"sft.py --model out/sft {RUN}"
ORACLE = f"oracle.py {RUN}"
RESUME = "align.py --loss dpo --out stopped --resume"
SCORE = "precompute_rewards.py --out new.pt"
GENERATE = "generate.py --model out/sft --out new.jsonl --max_new_tokens 4"


# ---- edits: functions from a file's old bytes to the new ones ----------------------------------------------

def cut(old):
    return old[:len(old) // 2]


def entries(**changes):
    """Changes entries of a JSON object. None takes an entry away."""
    def edit(old):
        new = json.loads(old) | changes
        return json.dumps({key: value for key, value in new.items() if value is not None}).encode()
    return edit


def line(text):
    """Replaces the third line."""
    def edit(old):
        lines = old.split(b"\n")
        lines[2] = text
        return b"\n".join(lines)
    return edit


def row(**changes):
    """Changes entries of the third line."""
    return lambda old: line(entries(**changes)(old.splitlines()[2]))(old)


def weights(change):
    """Changes tensors of model.safetensors, in place."""
    def edit(old):
        tensors = load(old)
        change(tensors)
        return save(tensors, {"format": "pt"})
    return edit


one_less = weights(lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
not_finite = weights(lambda tensors: tensors["model.norm.weight"].fill_(math.nan))


# ---- what is wrong: the command, {file: its edit, bytes or None}, the line on stderr; ... is any text ------

CASES = {
    # rows
    "no file": (f"{DPO} --data none.jsonl", {}, "No such file or directory: 'none.jsonl'"),
    "an empty file": (DPO, {TRAIN: b""}, f"{TRAIN}: none of 0 rows"),
    "an empty file to score": (SCORE, {TRAIN: b""}, f"{TRAIN}: it has 0 rows; give pairs"),
    "a blank line": (SFT, {TRAIN: line(b"")}, f"{TRAIN}, line 3: Expecting value; write one JSON object"),
    "a line cut off": (DPO, {TRAIN: line(b'{"prompt": "a"')}, f"{TRAIN}, line 3: Expecting ',' delimiter;"),
    "Latin-1": (DPO, {TRAIN: line(b'{"prompt": "\xe9"}')}, f"{TRAIN}, line 3: 'utf-8' codec ... in UTF-8"),
    "a JSON array": (ORACLE, {TRAIN: b'[{"prompt": "a"}]'}, f"{TRAIN}, line 1: ...one JSON object a line"),
    "no prompt": (SCORE, {TRAIN: row(prompt=None)}, f"{TRAIN}, line 3: 'prompt' is missing; write one"),
    "no chosen": (SFT, {TRAIN: row(chosen=None)}, f"{TRAIN}, line 3: 'chosen' is missing"),
    "no rejected": (ORACLE, {TRAIN: row(rejected=None)}, f"{TRAIN}, line 3: 'rejected' is missing"),
    "an empty prompt": (DPO, {TRAIN: row(prompt="")}, f"{TRAIN}, line 3: the prompt is empty"),
    "a response of messages, as TRL has it": (
        DPO, {TRAIN: row(chosen=[{"role": "user"}])}, f"{TRAIN}, line 3: a response is not a string; write"),
    "no role": (DPO, {TRAIN: row(prompt=[{"content": "a"}])}, f"{TRAIN}, line 3: 'role' is missing"),
    "held-out data": (f"{DPO} --eval_data {HELD_OUT}", {HELD_OUT: line(b"{")}, f"{HELD_OUT}, line 3"),
    "every row too long": (f"{DPO} --max_length 3", {}, f"{TRAIN}: none of 8 rows fits in --max_length 3"),
    "every prompt too long": (f"{GENERATE} --max_length 5", {}, f"{HELD_OUT}: none of ... --max_length 5"),
    "too few rows": (f"{DPO} --batch_size 64", {}, f"{TRAIN}: 8 rows are fewer than --batch_size 64"),
    "pairs for generations": (f"evaluate.py --generations {TRAIN}", {}, f"{TRAIN}, line 1: ...'response'"),
    # rewards
    "no rewards": (f"align.py --loss edpo {RUN}", {}, "--loss edpo distils rewards: give --oracle_rewards"),
    "rewards of other data": (
        DRDO, {TRAIN: row(a=1)}, f"rewards.pt: ...sha256...; run precompute_rewards.py --data {TRAIN}"),
    "rewards cut off": (DRDO, {"rewards.pt": cut}, "rewards.pt: ...; run precompute_rewards.py"),
    "rewards without spread": (
        f"{DRDO} --oracle_rewards equal.pt --standardise_oracle", {}, "Oracle differences have no spread"),
    # models
    "no model": (f"{DPO} --model nowhere", {}, "--model nowhere: ...; give the folder or the hub name"),
    "no model to answer": ("generate.py --model a/model", {}, "--model a/model: ...; give the folder or the"),
    "a policy for an Oracle": (f"{SCORE} --oracle out/sft", {}, "--oracle out/sft: its weights lack score"),
    "an encoder-decoder": (DPO, {CONFIG: b'{"model_type": "t5"}'}, "--model out/sft: ...; give ...causal LM"),
    "no EOS": (DPO, {TOKENIZER: entries(eos_token=None)}, "--model out/sft: its tokenizer has no EOS token"),
    "no weights": (DPO, {WEIGHTS: None}, "--model out/sft: ...no file named model.safetensors"),
    "weights cut off": (ORACLE, {WEIGHTS: cut}, "--model out/sft: ...; give the folder"),
    "weights that lack one": (DPO, {WEIGHTS: one_less}, "--model out/sft: its weights lack ...up_proj"),
    "weights that are NaN": (GENERATE, {WEIGHTS: not_finite}, "--model out/sft: its weights are not finite"),
    "scaled logits": (DPO, {CONFIG: entries(model_type="granite", logits_scaling=8)}, "out/sft: log pi"),
    # flags
    "no such flag": (f"{DPO} --bete 1", {}, "arguments: --bete 1; the nearest flag is --beta"),
    "a batch of 0": (f"{SFT} --batch_size 0", {}, "--batch_size 0: give a finite number above 0"),
    "a beta of NaN": (f"{DPO} --beta nan", {}, "--beta nan: give a finite number above 0"),
    "a negative seed": (f"{ORACLE} --seed -1", {}, "--seed -1: give a finite number of 0 or more"),
    "a top-p of 2": (f"{GENERATE} --top_p 2", {}, "--top_p 2.0: it is a probability"),
    "a file for a folder": (f"splits.py --dataset {TRAIN} --out rewards.pt/a", {}, "...: 'rewards.pt/a'"),
    "a folder for a file": ("precompute_rewards.py --out out", {}, "--out out is a folder; name a file"),
    "data to relabel in place": (f"{SCORE} --relabel ./{TRAIN}", {}, "one would overwrite another; name"),
    "prompts for --out": (f"generate.py --out {HELD_OUT}", {}, f"--out {HELD_OUT} would overwrite --prompts"),
    "nothing to evaluate": ("evaluate.py", {}, "--generations ... is required"),
    # DeepSpeed's configuration
    "no configuration": (f"{SFT} --deepspeed_config no.json", {}, "no.json: ...take the ds_config.json here"),
    "ZeRO-3": (
        DPO, {"ds_config.json": b'{"zero_optimization": {"stage": 3}}'}, "stage must be 1 or 2; ...take"),
    "no ZeRO": (ORACLE, {"ds_config.json": b"{}"}, "ds_config.json: 'zero_optimization' is missing"),
    "auto, as Transformers has it": (
        DPO, {"ds_config.json": entries(gradient_clipping="auto")}, "ds_config.json: ...; unless"),
    # checkpoints
    "nothing to resume": (
        f"{SFT} --resume", {}, "--resume: new holds no checkpoint: its run ended, or saved none; name"),
    "an unfinished run": (
        f"{DPO} --out stopped", {}, "--out: stopped holds a checkpoint; go on with --resume"),
    "a finished model": (f"{ORACLE} --out out/sft", {}, "--out: out/sft holds a model; name another folder"),
    "another flag": (f"{RESUME} --beta 0.5", {}, "--resume: beta was 0.1 and is now 0.5; go on as the run"),
    "another stage": ("sft.py --out stopped --resume", {}, "--resume: stage was align.py and is now sft.py"),
    "other data": (RESUME, {TRAIN: row(chosen=" no")}, "--resume: ...the data, ... have changed; go on as"),
    "a checkpoint without a file": (RESUME, {STATE: None}, "cannot load stopped/checkpoint: ...; go on as"),
    "a checkpoint cut off": (RESUME, {STATE: cut}, "--resume: cannot load stopped/checkpoint: ...; go on as"),
}

# what looks odd and is no mistake: the command, the edits, what is printed
ACCEPTED = {
    "a BOM": (DPO, {TRAIN: lambda old: b"\xef\xbb\xbf" + old}, "8 rows, 0 over"),
    "CR LF": (SFT, {TRAIN: lambda old: old.strip().replace(b"\n", b"\r\n")}, "8 rows, 0 over"),
    "an empty response, which is EOS alone": (DPO, {TRAIN: row(rejected="")}, "8 rows, 0 over"),
    "a time stamp for a seed": (f"{GENERATE} --seed 20261126052423", {}, "responses to"),
    "steps and epochs": (f"{DPO} --epochs 2", {}, "1 steps of 4"),
    "a row too long for the Oracle": (f"{DRDO} --oracle_rewards gap.pt", {}, "1 pairs dropped"),
}

# several processes: the command, the edits, which processes see them, the line
TOGETHER = {
    "a batch that two do not divide": (f"{DPO} --batch_size 3", {}, (0, 1), "--batch_size 3 ... 2 processes"),
    "another number of processes": (RESUME, {}, (0, 1), "processes was 1 and is now 2"),
    "the second alone": (DPO, {TRAIN: line(b"{")}, (1,), f"{TRAIN}, line 3"),
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder in which each stage would run: data, models, rewards; and `stopped`, a run of align.py that
    has a checkpoint and no model."""
    lab = tmp_path_factory.mktemp("lab")
    tokenizer = toy.make_tokenizer()
    lm = toy.make_model(tokenizer, seed=0, steps=0)
    lm.save_pretrained(lab / "out/sft")
    tokenizer.save_pretrained(lab / "out/sft")
    shutil.copytree(lab / "out/sft", lab / "out/oracle")
    lm.score = torch.nn.Linear(64, 1, bias=False)
    lm.config.num_labels = 1
    lm.save_pretrained(lab / "out/oracle")
    (lab / "data/all").mkdir(parents=True)
    toy.write_jsonl(str(lab / TRAIN), toy.make_pairs(8, seed=1))
    toy.write_jsonl(str(lab / HELD_OUT), toy.make_pairs(8, seed=2))
    sha256 = hashlib.sha256((lab / TRAIN).read_bytes()).hexdigest()
    rewards = torch.arange(8.0)[None]  # (K, N)
    gap = rewards.where(rewards > 0, math.nan)
    for name, chosen, rejected in (("rewards", rewards, -rewards), ("equal", rewards, rewards),
                                   ("gap", gap, -rewards)):
        torch.save({"chosen": chosen, "rejected": rejected, "oracles": ["out/oracle"],
                    "data_sha256": sha256}, lab / f"{name}.pt")
    shutil.copy(ROOT / "ds_config.json", lab)

    (lab / "stopped/generation_config.json").mkdir(parents=True)  # in the way of the model
    status, _, errors = ends([(lab, f"{DPO} --out stopped --max_steps 2 --save_steps 1".split())])
    assert status == 2 and (lab / STATE).exists(), errors
    (lab / "stopped/generation_config.json").rmdir()
    (lab / "stopped/config.json").unlink()
    return lab


def edited_copy(lab, folder, edits):
    shutil.copytree(lab, folder)
    for name, edit in edits.items():
        path = folder / name
        if edit is None:
            path.unlink()
        else:
            path.write_bytes(edit(path.read_bytes()) if callable(edit) else edit)
    return contents(folder)


def contents(folder):
    """{path: bytes} of all files, and of folders {path: False}."""
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def messages(errors):
    """The lines of a stderr, without progress bars and argparse's usage."""
    errors = re.sub(r"^usage: .*?(?=^\S+: error: )", "", errors, flags=re.MULTILINE | re.DOTALL)
    bar = re.compile(r"\d+ rows? \[|it/s|s/it")
    return [text for text in re.split(r"[\r\n]+", errors) if text.strip() and not bar.search(text)]


def shows(text, expected):
    return re.search(".*".join(re.escape(part) for part in expected.split("...")), text)


@pytest.mark.parametrize("case", CASES)
def test_bad_input(lab, tmp_path, case):
    command, edits, expected = CASES[case]
    before = edited_copy(lab, tmp_path / "here", edits)
    status, _, errors = ends([(tmp_path / "here", command.split())])
    lines = messages(errors)
    assert status == 2 and len(lines) == 1 and "error: " in lines[0], (status, errors[-2000:])
    assert shows(lines[0], expected), lines[0]
    assert contents(tmp_path / "here") == before


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_odd_and_no_mistake(lab, tmp_path, case):
    command, edits, expected = ACCEPTED[case]
    edited_copy(lab, tmp_path / "here", edits)
    status, output, errors = ends([(tmp_path / "here", command.split())])
    assert status == 0 and expected in output and not messages(errors), (output, errors[-2000:])


@pytest.mark.parametrize("case", TOGETHER)
def test_two_processes_say_it_once(lab, tmp_path, case):
    command, edits, who, expected = TOGETHER[case]
    places = [tmp_path / "0", tmp_path / "1"]
    before = [edited_copy(lab, place, edits if k in who else {}) for k, place in enumerate(places)]
    status, _, errors = ends([(place, command.split()) for place in places])
    lines = [text for text in messages(errors) if "error: " in text]
    assert status == 2 and len(lines) == 1 and "Traceback" not in errors, (status, errors[-2000:])
    assert shows(lines[0], expected), lines[0]
    assert [contents(place) for place in places] == before


def test_the_launcher_passes_the_line_and_the_status_on(lab):
    error = run("align.py", "--loss", "dpo", "--model", lab / "out/sft", "--data", lab / TRAIN, "--out",
                lab / "new", "--eval_data=", "--batch_size", 3, processes=2, launcher=True, expect=2)
    assert error.count("error: ") == 1 and "--batch_size 3" in error and "Traceback" not in error
