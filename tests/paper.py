"""Runs the lines of PAPER.md as they stand, at small size, from the data to each table and figure.

The hub's sets and models are files and tiny models of the same names. A stage trains for two steps on a few
rows. The chat model is a server here that prefers the longer answer. The figures of the tables are computed
again, from the generations and rewards alone.

    python tests/paper.py       # some minutes

Not run: the package alpaca_eval (tests/test_evaluate.py has it; its verdicts are made up here), the lines for
several machines, those of Table 5, which fetch data, UltraFeedback's with Phi-3-mini, and the Python.
"""
import json
import os
import re
import subprocess
import tempfile
from itertools import product
from pathlib import Path
from shutil import copy

import matplotlib.image
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import ROOT, Judge, ends
import toy

TEXT = (ROOT / "tests/PAPER.md").read_text()
TRAIN = "--max_steps 2 --batch_size 4 --dtype fp32"
SMALL = {"sft.py": TRAIN, "oracle.py": TRAIN, "align.py": f"{TRAIN} --keep_steps 1 --learning_rate 0.1",
         "generate.py": "--num_prompts 4 --max_new_tokens 8 --dtype fp32"}
SHELL = """
deepspeed() { printf '%s\\0' "$@" > request; read status < reply; return $status; }
python() { deepspeed "$@"; }
alpaca_eval() {  # the package's verdicts on three answers
    mkdir -p out/alpaca/judge
    row='{"generator_1": "dpo", "output_1": "a", "generator_2": "drdo", "output_2": "b", "preference"'
    echo "[$row: 2}, $row: 2}, $row: 1}]" > out/alpaca/judge/annotations.json
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
            shell(block("python splits.py --prompts data/all/validation.jsonl"), bar)  # sampled rewards
            for path in "data", "out/oracle", "rewards.pt":  # of UltraFeedback: TL;DR has its own
                os.rename(path, f"{path}.ultrafeedback")
            shell(block("python splits.py --dataset openai/summarize_from_feedback"), bar)  # TL;DR
            prompts, answer = re.search(r"`(python splits.py --prompts tatsu[^`]*)`.*?`(generate.py[^`]*)`",
                                        " ".join(TEXT.split())).groups()
            shell(prompts, bar)
            for policy in ("drdo", "dpo", "edpo"):  # those of TL;DR answer, in place of UltraFeedback's
                os.symlink(f"all/{policy}", f"out/{policy}")
                answer_too = answer.replace("out/drdo", f"out/{policy}")
                shell(f"deepspeed {answer_too} --model out/{policy}", bar)
            shell(block("python evaluate.py --judge_check"), bar)
            for line in re.findall(r"`(evaluate.py --[^`]*)`", TEXT):
                shell(f"python {line}", bar)
            shell(block("python evaluate.py --generations out/{drdo,dpo,edpo}/alpaca.jsonl --alpaca"), bar)
        check()


def make_hub():
    """Files and tiny models under the names of the hub's."""
    def message(role, text):
        return {"role": role, "content": text}

    sets = {
        "argilla/ultrafeedback-binarized-preferences-cleaned": [
            {"prompt": row["prompt"], "chosen-rating": row["confidence"] + 1.0, "rejected-rating": 1.0,
             **{key: [message("user", row["prompt"]), message("assistant", row[key])]
                for key in ("chosen", "rejected")}} for row in toy.make_pairs(60, 1)],
        "openai/summarize_from_feedback": [row | {"split": "valid1" if i % 8 == 0 else "train"}
                                           for i, row in enumerate(toy.make_comparisons(80, 2))],
        "CarperAI/openai_summarize_tldr": toy.make_sft(40, 3),
        "abisee/cnn_dailymail": toy.make_articles(6, 4),
        "tatsu-lab/alpaca_eval": [{"instruction": row["prompt"], "output": row["label"], "dataset": "toy",
                                   "generator": "text_davinci_003"} for row in toy.make_posts(5, 5)]}
    for name, rows in sets.items():
        os.makedirs(os.path.dirname(name), exist_ok=True)
        toy.write_jsonl(name, rows)
    tokenizer = toy.make_tokenizer()
    common = dict(vocab_size=len(tokenizer), num_hidden_layers=1, num_attention_heads=2, pad_token_id=0,
                  max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id,
                  eos_token_id=tokenizer.eos_token_id)
    models = {f"facebook/opt-{size}": ("opt", dict(hidden_size=width, word_embed_proj_dim=width,
                                                   ffn_dim=width))
              for size, width in (("125m", 8), ("350m", 16), ("1.3b", 24), ("2.7b", 32))}
    models["microsoft/Phi-3-mini-4k-instruct"] = "phi3", dict(hidden_size=16, intermediate_size=16,
                                                              num_key_value_heads=2)
    for name, (family, sizes) in models.items():
        if family == "phi3":
            tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **common, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(name)
        tokenizer.save_pretrained(name)
    copy(ROOT / "ds_config.json", ".")
    os.mkfifo("request"), os.mkfifo("reply")


def block(start):
    """The block of code that begins with this."""
    return next(code for code in re.findall(r"```\n(.*?)```", TEXT, re.DOTALL) if code.startswith(start))


def shell(code, bar):
    """Runs lines of bash. Each `deepspeed x.py` or `python x.py` in them is a forked process, small."""
    with subprocess.Popen(["bash", "-c", SHELL + code]) as bash:
        while (request := Path("request").read_bytes()) != b"end":
            script, *flags = request.decode().split("\0")[:-1]
            bar.set_postfix_str(" ".join([script, *flags])[:60])
            flags += SMALL.get(script, "").split()
            status, output, errors = ends([(os.getcwd(), [script, *flags])])
            bar.update()
            if status:
                tqdm.write(f"{script} {' '.join(flags)} ended with {status}:\n{output}\n{errors}")
            Path("reply").write_text(f"{status}\n")
    assert not bash.returncode, code


# ---- each table and figure, computed again -----------------------------------------------------------------


def rows_of(path):
    return [json.loads(line) for line in open(path)]


def answers(policy, name="generations.jsonl", score=None):
    """{(prompt, temperature): score of its row}; without `score` the Oracle's reward."""
    rows = rows_of(f"out/{policy}/{name}")
    scores = list(map(score, rows)) if score else torch.load(
        f"out/{policy}/rewards.pt", weights_only=True)["response"][0].tolist()
    return {(json.dumps(row["prompt"]), row["temperature"]): value for row, value in zip(rows, scores)}


def rate(ours, theirs):
    """The win rate; a tie counts half."""
    return sum((ours[key] > theirs[key]) + 0.5 * (ours[key] == theirs[key]) for key in ours) / len(ours)


def check():
    """Fails where a table or a figure is not what the generations and rewards say."""
    def length(row):
        return len(row["response"].strip())

    def reference(row):
        return len(row["reference"].strip())

    expected, methods = {}, ("drdo", "dpo", "edpo")
    for size, (policy, other) in product(("125m", "350m", "1.3b", "2.7b"), product(methods, ("sft", "dpo"))):
        if policy != other:
            expected["table2", policy, other, f"folder out/opt-{size}"] = "win_rate", rate(
                answers(f"opt-{size}/{policy}"), answers(f"opt-{size}/{other}"))
    for split, policy in product(("all", "hc_he", "lc_le"), methods):
        ours, name = answers(f"{split}/{policy}"), "t0.7.jsonl"
        start = answers("sft")
        expected["figure3", policy, "out/sft", f"folder out/{split}"] = "reward_difference", sum(
            ours[key] - start[key] for key in ours) / len(ours)
        texts = answers(f"{split}/{policy}", name, length)
        expected["table1", policy, "reference", f"folder out/{split}"] = "win_rate", rate(
            texts, answers(f"{split}/{policy}", name, reference))
        if policy != "dpo":
            expected["table1", policy, "dpo", f"folder out/{split}"] = "win_rate", rate(
                texts, answers(f"{split}/dpo", name, length))
    expected["alpaca", "drdo", "dpo", "all"] = "win_rate", 2 / 3
    expected["table3", "out/drdo", "out/dpo", "all"] = "win_rate", rate(
        *(answers(policy, "alpaca.jsonl", length) for policy in ("drdo", "dpo")))
    pairs = rows_of("data/all/validation.jsonl")
    chosen, rejected = ({i: len(row[key].strip()) for i, row in enumerate(pairs)}
                        for key in ("chosen", "rejected"))
    expected["judge_check", "chosen", "rejected", "all"] = "win_rate", rate(chosen, rejected)
    saved = torch.load("validation.pt", weights_only=True)
    expected["oracle_check", "chosen", "rejected", "all"] = "win_rate", rate(
        *(dict(enumerate(saved[key][0].tolist())) for key in ("chosen", "rejected")))

    for (table, policy, opponent, group), (name, value) in expected.items():
        found = [record[name] for record in json.load(open(f"out/{table}/evaluation.json"))["comparisons"]
                 if (record["policy"], record["opponent"], record["group"]) == (policy, opponent, group)]
        assert found and abs(found[-1] - value) < 1e-5, (table, policy, opponent, group, name, value, found)
    outputs = [row["output"] for row in json.load(open("out/alpaca/out_drdo_outputs.json"))]
    assert outputs == [row["response"].strip() for row in rows_of("out/drdo/alpaca.jsonl")]
    assert sum(value in (0, 0.5) for _, value in expected.values()) < 16, "the policies do not differ"
    pictures = ["out/table2/win_rates.png", "out/figure3/advantages.png", "out/figure4/curves.png"]
    for picture in pictures:
        image = matplotlib.image.imread(picture)[..., :3]
        assert (image.max(2) - image.min(2)).max() > 0.3, f"{picture} has no line"  # the axes are grey
    print(f"{len(expected)} figures of tables are right, {len(pictures)} pictures are drawn")


if __name__ == "__main__":
    main()
