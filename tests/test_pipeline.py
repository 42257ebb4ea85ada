"""The stages as programs, on a tiny random model and toy pairs: each reads what the one before it wrote. They
resume, split over processes, and end in one line where numbers overflow."""
import hashlib
import json
import shutil
from functools import partial

import pytest
import torch
from conftest import call, read_jsonl, run, together
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import toy

TRAINING = ["--batch_size", 16, "--micro_batch_size", 4, "--warmup_steps", 2, "--log_steps", 1]
LIMIT = 190  # tokens; some texts have more for the reward model, which reads pieces of words


def read_log(folder, key="loss"):
    return [line[key] for line in read_jsonl(folder / "log.jsonl") if key in line]


def load_lm(folder):
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)


def load_rewards(path):
    return torch.load(path, weights_only=True)


def write_model(folder, family, pieces=False):
    tokenizer = toy.make_tokenizer(pieces)
    tokenizer.save_pretrained(folder)
    toy.make_model(tokenizer, hidden_size=32, family=family).save_pretrained(folder)


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """A base LM, pairs, an SFT policy, an Oracle, a reward model, and the rewards of one and of both. The
    reward model is a GPT-NeoX with a tokenizer of its own."""
    lab = tmp_path_factory.mktemp("lab")
    write_model(lab / "base", "llama")
    write_model(lab / "pieces", "gpt_neox", pieces=True)
    toy.write_jsonl(lab / "train.jsonl", toy.make_pairs(48, 1))
    toy.write_jsonl(lab / "validation.jsonl", toy.make_pairs(20, 2))
    training = [*data_flags(lab), *TRAINING, "--learning_rate", 3e-3]
    call("sft.py", "--model", lab / "base", *training, "--max_steps", 20, "--out", lab / "sft")
    call("oracle.py", "--model", lab / "sft", *training, "--max_steps", 10, "--out", lab / "oracle")
    call("oracle.py", "--model", lab / "pieces", *training, "--max_steps", 12, "--alpha", 0,
         "--out", lab / "reward_model")
    call("precompute_rewards.py", *score_flags(lab), "--out", lab / "rewards.pt")
    call("precompute_rewards.py", *ensemble_flags(lab), "--out", lab / "ensemble.pt")
    return lab


def data_flags(lab):
    return ["--data", lab / "train.jsonl", "--eval_data", lab / "validation.jsonl"]


def score_flags(lab):
    return ["--oracle", lab / "oracle", "--data", lab / "train.jsonl"]


def ensemble_flags(lab):
    return ["--oracle", lab / "oracle", lab / "reward_model", "--data", lab / "train.jsonl",
            "--max_length", LIMIT]


def align_flags(lab, loss, rewards="rewards.pt"):
    return ["align.py", "--loss", loss, "--model", lab / "sft", *data_flags(lab),
            "--oracle_rewards", lab / rewards, *TRAINING, "--learning_rate", 1e-3]


def run_on_one_and_two(flags, one, two, *more):
    """Runs a stage on one process, writing `one`, and beside it on two, writing `two`."""
    together((run, *flags, "--out", one), (partial(run, processes=2), *flags, *more, "--out", two))


# ---- rewards -----------------------------------------------------------------------------------------------

def own_rewards(folder, texts):
    """HF's own classifier on right-padded ids: (rewards, the ids' mask, the LM's last hidden states)."""
    tokenizer, lm = load_lm(folder)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    ids = [bos + tokenizer(prompt + response, split_special_tokens=True).input_ids + eos
           for prompt, response in texts]
    batch = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
    hidden = lm(**batch, output_hidden_states=True).hidden_states[-1]
    return classifier(**batch).logits[:, 0].detach(), batch["attention_mask"], hidden.detach()


@pytest.mark.parametrize("k, oracle", [(0, "oracle"), (1, "reward_model")])
def test_an_oracle_loads_in_both_classes_with_equal_rewards(lab, k, oracle):
    """Each member of an ensemble reads its own model and tokenizer. Its head is a tensor of the LM."""
    config = json.load(open(lab / oracle / "config.json"))
    score = load_file(lab / oracle / "model.safetensors")["score.weight"]
    eos = AutoTokenizer.from_pretrained(lab / oracle).eos_token_id
    assert score.shape == (1, config["hidden_size"]) and config["pad_token_id"] not in (None, eos)
    rows = read_jsonl(lab / "train.jsonl")
    saved = load_rewards(lab / "ensemble.pt")
    assert saved["data_sha256"] == hashlib.sha256((lab / "train.jsonl").read_bytes()).hexdigest()
    assert saved["oracles"][k] == str(lab / oracle) and saved["chosen"].shape == (2, 48)
    too_long = 0
    for key in ("chosen", "rejected"):
        rewards, mask, hidden = own_rewards(lab / oracle, [(row["prompt"], row[key]) for row in rows])
        of_head = hidden[torch.arange(48), mask.sum(1) - 1] @ score[0]
        torch.testing.assert_close(of_head, rewards, rtol=1e-5, atol=1e-5)
        rewards[mask.sum(1) > LIMIT] = torch.nan
        too_long += rewards.isnan().sum().item()
        torch.testing.assert_close(saved[key][k], rewards, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert 0 < too_long < 48 if oracle == "reward_model" else too_long == 0


def test_references_are_scored_and_a_text_under_another_prompt_is_another(lab, tmp_path):
    pairs = read_jsonl(lab / "train.jsonl")[:6]
    rows = [{"prompt": pair["prompt"], "response": pair["rejected"], "reference": pair["chosen"]}
            for pair in pairs]
    del rows[3]["reference"]
    rows.append({"prompt": pairs[0]["prompt"], "response": pairs[1]["rejected"]})
    toy.write_jsonl(tmp_path / "rows.jsonl", rows)
    call("precompute_rewards.py", *score_flags(lab), "--data", tmp_path / "rows.jsonl",
         "--out", tmp_path / "scores.pt")
    saved, known = load_rewards(tmp_path / "scores.pt"), load_rewards(lab / "rewards.pt")
    known["chosen"][0, 3] = torch.nan
    for key, own in ("response", "rejected"), ("reference", "chosen"):
        torch.testing.assert_close(saved[key][0, :6], known[own][0, :6], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert saved["response"][0, 6] != saved["response"][0, 1]


def test_an_ensemble_orders_pairs_without_labels(lab, tmp_path, capsys):
    """The response with the higher mean reward becomes `chosen`. Pairs too long, and those of one text
    twice, leave. align.py takes both files."""
    known = load_rewards(lab / "ensemble.pt")
    margins = known["chosen"] - known["rejected"]
    swapped = margins.mean(0) < 0
    scored = margins.isfinite().all(0) & (margins.mean(0) != 0)
    assert swapped.sum() >= 2 and (swapped != (margins[0] < 0))[scored].any()
    call("precompute_rewards.py", *ensemble_flags(lab), "--relabel", tmp_path / "labelled.jsonl",
         "--out", tmp_path / "rewards.pt")
    printed = capsys.readouterr().out
    saved = load_rewards(tmp_path / "rewards.pt")
    for key, other in ("chosen", "rejected"), ("rejected", "chosen"):
        expected = torch.where(swapped, known[other], known[key])[:, scored]
        torch.testing.assert_close(saved[key], expected, rtol=1e-5, atol=1e-6)
    expected = []
    for row, swap, fits in zip(read_jsonl(lab / "train.jsonl"), swapped, scored, strict=True):
        if swap:
            row |= {"chosen": row["rejected"], "rejected": row["chosen"],
                    "chosen_reward": row["rejected_reward"], "rejected_reward": row["chosen_reward"]}
            del row["confidence"]
        expected += [row] * fits
    assert read_jsonl(tmp_path / "labelled.jsonl") == expected
    for margin in torch.where(swapped, -margins, margins)[:, scored]:
        assert f"chosen above rejected in {(margin > 0).float().mean():.3f} of pairs, margin " \
               f"{margin.mean():.3f} (std {margin.std():.3f})" in printed
    call(*align_flags(lab, "drdo", tmp_path / "rewards.pt"), "--data", tmp_path / "labelled.jsonl",
         "--eval_data", "", "--max_steps", 1, "--out", tmp_path / "out")


def test_a_policy_with_its_head_inside_is_a_reward_model(lab, tmp_path):
    """--keep_steps keeps the policies on the way; the last is the one that the run ends with."""
    run_folder, student, scores = (tmp_path / name for name in ("run", "student", "scores.pt"))
    call(*align_flags(lab, "drdo"), "--max_steps", 4, "--keep_steps", 2, "--out", run_folder)
    policy, head = (load_file(run_folder / f"{name}.safetensors") for name in ("model", "score"))
    assert list(head) == ["score.weight"] and not head.keys() & policy.keys()
    kept = [load_file(run_folder / step / "model.safetensors") for step in ("step2", "step4")]
    same = [all(torch.equal(policy[name], weights[name]) for name in policy) for weights in kept]
    assert same == [False, True] and not (run_folder / "step3").exists()
    shutil.copytree(run_folder, student)
    save_file(policy | head, student / "model.safetensors", {"format": "pt"})
    call("precompute_rewards.py", "--oracle", student, "--data", lab / "validation.jsonl", "--out", scores)
    for key in ("chosen", "rejected"):
        logged = read_log(run_folder, f"eval_rewards/{key}")[-1]
        assert load_rewards(scores)[key].mean().item() == pytest.approx(logged, rel=1e-4, abs=1e-5)


# ---- processes, --resume -----------------------------------------------------------------------------------

@pytest.mark.parametrize("script, stage", [("sft.py", 1), ("oracle.py", 2), ("align.py", 2)])
def test_one_process_and_two_give_the_same_losses(lab, tmp_path, script, stage):
    """Two processes with gradient checkpointing, one of them at another ZeRO stage."""
    flags = [script, "--model", lab / "sft", *data_flags(lab), *TRAINING, "--learning_rate", 1e-3]
    if script == "align.py":
        flags += ["--loss", "edpo", "--oracle_rewards", lab / "ensemble.pt"]
    config = {"zero_optimization": {"stage": stage}, "gradient_clipping": 1.0}
    (tmp_path / "zero.json").write_text(json.dumps(config))
    run_on_one_and_two([*flags, "--max_steps", 5], tmp_path / "one", tmp_path / "two",
                       "--deepspeed_config", tmp_path / "zero.json", "--gradient_checkpointing")
    for key, lines in ("loss", 5), ("grad_norm", 5), ("eval_loss", 2 * (script != "align.py")):
        one, two = read_log(tmp_path / "one", key), read_log(tmp_path / "two", key)
        assert len(one) == lines and two == pytest.approx(one, rel=1e-4)


def stop_while_saving(flags, out, processes=0):
    """Runs until the model cannot be saved, as on a full disk: the last checkpoint stays."""
    obstacle = out / "generation_config.json"
    obstacle.mkdir(parents=True)
    error = run(*flags, "--out", out, expect=2, processes=processes)
    assert error.count("error: ") == 1 and obstacle.name in error and "Traceback" not in error
    obstacle.rmdir()


def test_resuming_is_bitwise_the_run_that_was_not_interrupted(lab, tmp_path):
    """--resume needs no other flag. Out of memory asks for a smaller micro-batch and checkpointing."""
    flags = [*align_flags(lab, "dpo"), "--max_steps", 7, "--save_steps", 2, "--log_steps", 3, "--seed", 3]
    whole, stopped, smaller = (tmp_path / name for name in ("whole", "stopped", "smaller"))
    together((run, *flags, "--out", whole), (stop_while_saving, flags, stopped))
    assert [path.name for path in stopped.glob("checkpoint/step*")] == ["step6"]
    (stopped / "checkpoint" / "step8").mkdir()  # as a crash in the next checkpoint leaves it
    with open(stopped / "log.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    shutil.copytree(stopped, smaller)

    resume = ["align.py", "--loss", "dpo", "--resume", "--out"]
    call(*resume, stopped)
    call(*resume, smaller, "--micro_batch_size", 2, "--gradient_checkpointing")
    figures = [[line | {"tokens_per_second": 0} for line in read_jsonl(out / "log.jsonl")]
               for out in (whole, stopped)]
    assert figures[0] == figures[1]
    weights, resumed = (load_file(out / "model.safetensors") for out in (whole, stopped))
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert read_log(smaller) == pytest.approx(read_log(whole), rel=1e-5)
    assert not any((out / "checkpoint").exists() for out in (whole, stopped, smaller))


@pytest.mark.parametrize("flags, processes, words", [
    (["--learning_rate", 1e39], 0, ["weights are not finite"]),
    (["--learning_rate", 1e-3, "--beta", 3e38], 2, ["step 1:", "not finite", "train.jsonl, lines ["])])
def test_numbers_that_are_not_finite_end_the_run(lab, tmp_path, flags, processes, words):
    """Weights that overflow at the last step are not saved. After a gradient overflow the step is named."""
    error = run(*align_flags(lab, "dpo"), "--max_steps", 1, *flags, "--out", tmp_path,
                processes=processes, expect=2)
    assert error.count("error: ") == 1 and all(word in error for word in words)
    assert not (tmp_path / "model.safetensors").exists()
    for line in open(tmp_path / "log.jsonl"):
        json.loads(line, parse_constant=pytest.fail)


def test_bf16_and_zero_2_on_two_processes(lab, tmp_path):
    """Training, resuming, scoring and generating agree with fp32 as 8 bits allow. The weights stay fp32."""
    flags = [*align_flags(lab, "drdo"), "--max_steps", 8, "--save_steps", 4]
    bf16 = [*flags, "--dtype", "bf16"]
    call(*flags, "--out", tmp_path / "fp32")
    stop_while_saving(bf16, tmp_path / "bf16", processes=2)
    run("align.py", "--out", tmp_path / "bf16", "--resume", "--dtype", "bf16", processes=2, launcher=True)
    flags = (tmp_path / "bf16" / "args.json").read_text()
    assert json.loads(flags)["dtype"] == "bf16"
    card = (tmp_path / "bf16" / "README.md").read_text()
    assert flags in card and (tmp_path / "bf16" / "log.jsonl").read_text().splitlines()[-1] in card
    fp32, bf16 = read_log(tmp_path / "fp32"), read_log(tmp_path / "bf16")
    assert bf16 != fp32 and bf16 == pytest.approx(fp32, rel=0.03)
    weights = load_file(tmp_path / "bf16" / "model.safetensors")
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    call("precompute_rewards.py", *score_flags(lab), "--dtype", "bf16", "--out", tmp_path / "bf16.pt")
    rewards, expected = (load_rewards(path)["chosen"] for path in (tmp_path / "bf16.pt", lab / "rewards.pt"))
    assert rewards.dtype == torch.float32 and not torch.equal(rewards, expected)
    torch.testing.assert_close(rewards, expected, rtol=0.1, atol=0.1)


def test_scores_and_generations_do_not_depend_on_the_number_of_processes(lab, tmp_path):
    generate = ["generate.py", "--model", lab / "sft", "--prompts", lab / "validation.jsonl",
                "--temperature", 0, 0.9, "--max_new_tokens", 12, "--micro_batch_size", 5]
    run_on_one_and_two(generate, tmp_path / "one.jsonl", tmp_path / "two.jsonl")
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    score = ["precompute_rewards.py", "--oracle", lab / "oracle", "--data", tmp_path / "one.jsonl"]
    run_on_one_and_two(score, tmp_path / "one.pt", tmp_path / "two.pt", "--micro_batch_size", 3)
    one, two = (load_rewards(tmp_path / name)["response"] for name in ("one.pt", "two.pt"))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_temperature_0_is_the_argmax_at_each_step(lab, tmp_path):
    """A batch pads its prompts on the left. Here each is alone."""
    call("generate.py", "--model", lab / "sft", "--prompts", lab / "validation.jsonl", "--num_prompts", 5,
         "--temperature", 0, "--max_new_tokens", 12, "--out", tmp_path / "greedy.jsonl")
    tokenizer, model = load_lm(lab / "sft")
    for row in read_jsonl(tmp_path / "greedy.jsonl"):
        ids = [tokenizer.bos_token_id] + tokenizer(row["prompt"]).input_ids
        written = row["tokens"] + row["eos"]
        for _ in range(written):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        assert " " + tokenizer.decode(ids[-written:], skip_special_tokens=True) == row["response"]
        assert (ids[-1] == tokenizer.eos_token_id) == row["eos"]
