"""Runs the commands of PAPER.md at small size, from the data to each table and figure.

Files and tiny models stand under the names of the hub's datasets and models. A stage trains for two steps on
a few rows. The judge is a local server that prefers the longer answer. The values in the tables are computed
again from the generations and rewards alone.

    python tests/paper.py       # a minute or two

Not run: the package alpaca_eval (tests/test_evaluate.py runs it; its verdicts are made up here), the recipe
for TRL (tests/test_recipes.py), the commands for several machines, and those of Table 5, which fetch data.
"""
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from contextlib import redirect_stderr, redirect_stdout
from glob import glob
from itertools import product
from pathlib import Path
from shutil import copy
from unittest.mock import patch

import matplotlib.image
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from conftest import ROOT, Judge
from templates import make_tokenizer
import toy

TEXT = (ROOT / "tests/PAPER.md").read_text()
PHI = "Phi-3-mini-4k-instruct"
TEMPLATE = (  # as it is published
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content']"
    " + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}"
    "{% endif %}")
TRAIN = "--max_steps 2 --batch_size 4 --dtype fp32"
SMALL = {"sft.py": TRAIN, "oracle.py": TRAIN, "align.py": f"{TRAIN} --keep_steps 1 --learning_rate 0.1",
         "generate.py": "--num_prompts 4 --max_new_tokens 8 --dtype fp32"}
SHELL = """
deepspeed() { printf '%s\\0' "$@" > request; read status < reply; return $status; }
python() { deepspeed "$@"; }
alpaca_eval() {  # the package's verdicts on three answers
    mkdir -p out/alpaca/judge
    [ -e $2 ] && [ -e $4 ]
    row='"instruction": "a", "generator_1": "dpo", "output_1": "a", "generator_2": "drdo", "output_2": "b"'
    printf '[{"preference": 2, %s}, {"preference": 2, %s}, {"preference": 1, %s}]' "$row" "$row" "$row" \
        > out/alpaca/judge/annotations.json
}
trap 'printf end > request' EXIT
set -eu
"""


def main():
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_hub()
        judge = Judge(lambda a, b: "Preferred: " + ("tie" if len(a) == len(b) else "AB"[len(a) < len(b)]))
        os.environ["OPENAI_BASE_URL"] = f"http://127.0.0.1:{judge.server.server_port}/v1"
        os.environ["OPENAI_API_KEY"] = "none"
        with tqdm(unit=" programs") as bar:
            shell(block("gc=--gradient_checkpointing"), bar)  # UltraFeedback
            shell(block("python splits.py --prompts tatsu-lab"), bar)
            shell(block("for alpha"), bar)  # the sweeps
            shell(block("python splits.py --prompts data/all/validation.jsonl"), bar)  # sampled rewards
            for path in "data", "out/oracle", "rewards.pt", *glob("out/reward_model_*"):  # TL;DR has its own
                os.rename(path, f"{path}.ultrafeedback")
            shell(block("python splits.py --dataset openai/summarize_from_feedback"), bar)  # TL;DR
            shell(block("python evaluate.py --judge_check"), bar)
            for line in re.findall(r"`(evaluate.py --[^`]*)`", TEXT):
                shell(f"python {line}", bar)
            shell(block(f"python evaluate.py --generations out/{PHI}/{{drdo,dpo,edpo}}_alpaca.jsonl"), bar)
        run_python()
        check()


def make_hub():
    """Files and tiny models under the names of the hub's datasets and models."""
    ultrafeedback = []
    for row in toy.make_pairs(60, 1):
        question = {"role": "user", "content": row["prompt"]}
        ultrafeedback.append({
            "prompt": row["prompt"], "chosen-rating": row["confidence"] + 1.0, "rejected-rating": 1.0,
            "chosen": [question, {"role": "assistant", "content": row["chosen"]}],
            "rejected": [question, {"role": "assistant", "content": row["rejected"]}]})
    comparisons = toy.make_comparisons(80, 2)
    for i, row in enumerate(comparisons):
        row["split"] = "valid1" if i % 8 == 0 else "train"
    alpaca = [{"instruction": row["prompt"], "output": row["label"], "dataset": "toy",
               "generator": "text_davinci_003"} for row in toy.make_posts(5, 5)]
    datasets = {"argilla/ultrafeedback-binarized-preferences-cleaned": ultrafeedback,
                "openai/summarize_from_feedback": comparisons,
                "CarperAI/openai_summarize_tldr": toy.make_sft(40, 3),
                "abisee/cnn_dailymail": toy.make_articles(6, 4),
                "tatsu-lab/alpaca_eval": alpaca}
    for name, rows in datasets.items():
        os.makedirs(os.path.dirname(name), exist_ok=True)
        toy.write_jsonl(name, rows)

    tokenizer = toy.make_tokenizer()
    for size, width in (("125m", 8), ("350m", 16), ("1.3b", 24), ("2.7b", 32)):
        make_model(f"facebook/opt-{size}", tokenizer, "opt", hidden_size=width, word_embed_proj_dim=width,
                   ffn_dim=width)
    tokenizer = make_tokenizer(TEMPLATE)
    make_model(f"microsoft/{PHI}", tokenizer, "phi3", hidden_size=16, intermediate_size=16,
               num_key_value_heads=2)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    GenerationConfig(eos_token_id=ends).save_pretrained(f"microsoft/{PHI}")
    copy(ROOT / "ds_config.json", ".")
    os.mkfifo("request")
    os.mkfifo("reply")


def make_model(folder, tokenizer, family, **sizes):
    """A random model of one layer, with its tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=2048, pad_token_id=0, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def block(start):
    """The block of code in PAPER.md that begins with this."""
    return next(code for code in re.findall(r"^```(?:python)?\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
                if code.startswith(start))


def shell(code, bar):
    """Runs bash commands. Each `deepspeed x.py` or `python x.py` in them runs in this process, small."""
    with subprocess.Popen(["bash", "-c", SHELL + code]) as bash:
        while (request := Path("request").read_bytes()) != b"end":
            script, *flags = request.decode().split("\0")[:-1]
            flags += SMALL.get(script, "").split()
            bar.set_postfix_str(" ".join([script, *flags])[:60])
            status, output = run(script, flags)
            bar.update()
            if status:
                tqdm.write(f"{script} {' '.join(flags)} ended with {status}:\n{output}")
            Path("reply").write_text(f"{status}\n")
    assert not bash.returncode, code


def run(script, flags):
    """(exit status, what it prints) of a program."""
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output), patch.object(sys, "argv", [script, *flags]):
        try:
            importlib.import_module(script.removesuffix(".py")).main()
        except SystemExit as ending:
            return ending.code or 0, output.getvalue()
        except Exception:
            traceback.print_exc()
            return 1, output.getvalue()
    return 0, output.getvalue()


def run_python():
    """The block that draws the preference loss by gamma."""
    exec(block("import torch\nfrom matplotlib"), {})


# ---- each value of the tables and figures, computed again --------------------------------------------------

def rows_of(path):
    return [json.loads(line) for line in open(path)]


def answers(policy, name="generations", score=None):
    """{(prompt, temperature): score of its row}; without `score` the Oracle's reward."""
    rows = rows_of(f"out/{policy}_{name}.jsonl")
    if score:
        scores = [score(row) for row in rows]
    else:
        scores = torch.load(f"out/{policy}_{name}.pt", weights_only=True)["response"][0].tolist()
    return {(json.dumps(row["prompt"]), row["temperature"]): value for row, value in zip(rows, scores)}


def win_rate(ours, theirs, table=None):
    """The share of wins of ours; a tie, to the rounding of the table's rewards, counts half."""
    bound = json.load(open(f"out/{table}/evaluation.json"))["rounding"] if table else 0
    assert bound < 1e-4
    differences = [ours[key] - theirs[key] for key in ours]
    return sum((value > bound) + 0.5 * (abs(value) <= bound) for value in differences) / len(differences)


def length(row):
    return len(row["response"].strip())


def reference_length(row):
    return len(row["reference"].strip())


def expected_values():
    """{(table, policy, opponent, group): (name of the value, the value)} from generations and rewards."""
    expected = {}
    methods = ["drdo", "dpo", "edpo"]
    students = ["opt-125m", "opt-350m", "opt-1.3b", "opt-2.7b", PHI]
    for student, policy, opponent in product(students, methods, ["sft", "dpo"]):
        if policy != opponent:
            rate = win_rate(answers(f"{student}/{policy}"), answers(f"{student}/{opponent}"), "table2")
            expected["table2", policy, opponent, f"folder out/{student}"] = "win_rate", rate
    start = answers("sft")
    for split, policy in product(["all", "hc_he", "lc_le"], methods):
        group = f"folder out/{split}"
        rewards = answers(f"{split}/{policy}")
        difference = sum(rewards[key] - start[key] for key in rewards) / len(rewards)
        expected["figure3", policy, "out/sft", group] = "reward_difference", difference
        ours = answers(f"{split}/{policy}", "t0.7", length)
        references = answers(f"{split}/{policy}", "t0.7", reference_length)
        expected["table1", policy, "reference", group] = "win_rate", win_rate(ours, references)
        if policy != "dpo":
            theirs = answers(f"{split}/dpo", "t0.7", length)
            expected["table1", policy, "dpo", group] = "win_rate", win_rate(ours, theirs)
    expected["alpaca", "drdo", "dpo", "all"] = "win_rate", 2 / 3
    ours, theirs = (answers(f"{PHI}/{policy}", "alpaca", length) for policy in ("drdo", "dpo"))
    expected["table3", f"out/{PHI}/drdo", f"out/{PHI}/dpo", "all"] = "win_rate", win_rate(ours, theirs)
    pairs = rows_of("data/all/validation.jsonl")
    saved = torch.load("validation.pt", weights_only=True)
    lengths, rewards = {}, {}
    for key in ("chosen", "rejected"):
        lengths[key] = dict(enumerate(len(row[key].strip()) for row in pairs))
        rewards[key] = dict(enumerate(saved[key][0].tolist()))
    rate = win_rate(lengths["chosen"], lengths["rejected"])
    expected["judge_check", "chosen", "rejected", "all"] = "win_rate", rate
    rate = win_rate(rewards["chosen"], rewards["rejected"], "oracle_check")
    expected["oracle_check", "chosen", "rejected", "all"] = "win_rate", rate
    return expected


def check():
    """Fails where a table or a figure is not what the generations and rewards say."""
    expected = expected_values()
    for key, (name, value) in expected.items():
        table, *comparison = key
        found = [record[name] for record in json.load(open(f"out/{table}/evaluation.json"))["comparisons"]
                 if [record["policy"], record["opponent"], record["group"]] == comparison]
        assert found and abs(found[-1] - value) < 1e-5, (key, name, value, found)
    outputs = [row["output"] for row in json.load(open(f"out/alpaca/out_{PHI}_drdo_outputs.json"))]
    assert outputs == [row["response"].strip() for row in rows_of(f"out/{PHI}/drdo_alpaca.jsonl")]
    ends = json.load(open(f"out/{PHI}/drdo/generation_config.json"))["eos_token_id"]
    control = {token["content"]: token["id"] for token in json.load(
        open(f"out/{PHI}/drdo/tokenizer.json"))["added_tokens"]}
    assert ends == [control["<|end|>"], control["EOS"]]  # servers stop at the end of a turn
    assert len(glob("out/sweep/*/model.safetensors")) == 2 * 4 + 4
    assert sum(value in (0, 0.5) for _, value in expected.values()) < 16, "the policies do not differ"
    pictures = ["out/table2/win_rates.png", "out/figure3/advantages.png", "out/figure4/curves.png",
                "preference_loss.png"]
    for picture in pictures:
        image = matplotlib.image.imread(picture)[..., :3]
        assert (image.max(2) - image.min(2)).max() > 0.3, f"{picture} has no line"  # the axes are grey
    print(f"{len(expected)} values of tables are right, {len(pictures)} pictures are drawn")


if __name__ == "__main__":
    main()
