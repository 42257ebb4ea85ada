"""The stages as programs, on a tiny random model and toy pairs: they learn, resume, split over processes, and each
reads what the one before it wrote."""
import hashlib
import json
import shutil
from functools import partial

import pytest
import torch
from conftest import run, together
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import toy

TRAINING = ["--batch_size", 16, "--micro_batch_size", 4, "--warmup_steps", 2, "--log_steps", 1]


def read_log(folder, key="loss"):
    lines = [json.loads(line) for line in open(folder / "log.jsonl")]
    return [line[key] for line in lines if key in line]


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """A folder with a base LM, pairs, and what sft.py, oracle.py (one, and a reward model) and precompute_rewards.py made of them."""
    lab = tmp_path_factory.mktemp("lab")
    tokenizer = toy.make_tokenizer()
    tokenizer.save_pretrained(lab / "base")
    toy.make_model(tokenizer, seed=0, steps=0).save_pretrained(lab / "base")
    toy.write_jsonl(str(lab / "train.jsonl"), toy.make_pairs(48, 1))
    toy.write_jsonl(str(lab / "validation.jsonl"), toy.make_pairs(20, 2))
    data = ["--data", lab / "train.jsonl", "--eval_data", lab / "validation.jsonl", *TRAINING]
    run("sft.py", "--model", lab / "base", *data, "--out", lab / "sft", "--max_steps", 20, "--learning_rate", 3e-3)
    oracle = ["oracle.py", "--model", lab / "sft", *data, "--max_steps", 10, "--learning_rate", 2e-3]
    together((run, *oracle, "--out", lab / "oracle"),
             (run, *oracle, "--out", lab / "reward_model", "--alpha", 0, "--seed", 1))
    score = run, "precompute_rewards.py", "--data", lab / "train.jsonl"
    together((*score, "--out", lab / "ensemble.pt", "--max_length", 85, "--oracle", lab / "oracle", lab / "reward_model"),
             (*score, "--out", lab / "rewards.pt", "--oracle", lab / "oracle"))
    return lab


def run_on_one_and_two(flags, one, two, *more):
    """Runs a stage on one process, writing `one`, and beside it on two, writing `two`."""
    together((run, *flags, "--out", one), (partial(run, processes=2), *flags, *more, "--out", two))


def align_flags(lab, loss, rewards="rewards.pt"):
    return ["align.py", "--loss", loss, "--model", lab / "sft", "--data", lab / "train.jsonl", "--eval_data",
            lab / "validation.jsonl", "--oracle_rewards", lab / rewards, *TRAINING, "--learning_rate", 1e-3]


def test_sft_lowers_the_nll_of_responses_and_agrees_with_the_model_it_wrote(lab):
    losses = read_log(lab / "sft")
    assert losses[-1] < losses[0] - 1.0
    tokenizer, model = AutoTokenizer.from_pretrained(lab / "sft"), AutoModelForCausalLM.from_pretrained(lab / "sft")
    total = tokens = 0
    for row in map(json.loads, open(lab / "validation.jsonl")):
        prompt = [tokenizer.bos_token_id] + tokenizer(row["prompt"], add_special_tokens=False).input_ids
        response = tokenizer(row["chosen"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + response])
        total += model(torch.tensor([prompt + response]), labels=labels).loss.item() * len(response)  # HF's own mean NLL
        tokens += len(response)
    assert read_log(lab / "sft", "eval_loss")[-1] == pytest.approx(total / tokens, rel=1e-5)


def test_an_oracle_loads_in_both_classes_with_equal_rewards(lab):
    """HF's own classifier, on right-padded text, gives the rewards that precompute_rewards.py wrote; so does the LM's
    last hidden state times score.weight."""
    folder, tokenizer = lab / "oracle", AutoTokenizer.from_pretrained(lab / "oracle")
    classifier, lm = AutoModelForSequenceClassification.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    score = load_file(folder / "model.safetensors")["score.weight"]
    config = json.load(open(folder / "config.json"))
    assert score.shape == (1, config["hidden_size"]) and classifier.config.num_labels == 1
    assert config["pad_token_id"] not in (None, tokenizer.eos_token_id)
    rewards = torch.load(lab / "rewards.pt", weights_only=True)
    rows = [json.loads(line) for line in open(lab / "train.jsonl")][:8]
    for key in ("chosen", "rejected"):
        texts = [tokenizer.bos_token + row["prompt"] + row[key] + tokenizer.eos_token for row in rows]
        batch = tokenizer(texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")
        batch.pop("token_type_ids", None)
        logits = classifier(**batch).logits[:, 0].detach()
        torch.testing.assert_close(logits, rewards[key][0, :8], rtol=1e-5, atol=1e-5)
        hidden = lm(**batch, output_hidden_states=True).hidden_states[-1]
        last = hidden[torch.arange(8), batch["attention_mask"].sum(1) - 1]
        torch.testing.assert_close((last @ score.T)[:, 0].detach(), logits, rtol=1e-5, atol=1e-5)


def test_the_rewards_file_is_what_the_design_says(lab):
    rewards = torch.load(lab / "ensemble.pt", weights_only=True)
    assert rewards["chosen"].shape == rewards["rejected"].shape == (2, 48) and rewards["chosen"].dtype == torch.float32
    assert rewards["data_sha256"] == hashlib.sha256((lab / "train.jsonl").read_bytes()).hexdigest()
    assert rewards["oracles"] == [str(lab / "oracle"), str(lab / "reward_model")]
    tokenizer = AutoTokenizer.from_pretrained(lab / "oracle")
    for key in ("chosen", "rejected"):
        long = [len(tokenizer(row["prompt"] + row[key]).input_ids) + 2 > 85 for row in map(json.loads, open(lab / "train.jsonl"))]
        assert any(long) and rewards[key].isnan().all(0).tolist() == long  # BOS and EOS counted
    whole = torch.load(lab / "rewards.pt", weights_only=True)["chosen"][0]
    kept = ~rewards["chosen"][0].isnan()
    torch.testing.assert_close(rewards["chosen"][0, kept], whole[kept], rtol=1e-5, atol=1e-6)


def test_an_oracle_orders_pairs_without_labels(lab, tmp_path):
    """The response with the higher reward becomes `chosen`, whichever stood there; align.py takes both files."""
    rewards = torch.load(lab / "rewards.pt", weights_only=True)
    rows = [json.loads(line) for line in open(lab / "train.jsonl")]
    better = [row["chosen"] if w > l else row["rejected"]
              for row, w, l in zip(rows, rewards["chosen"][0], rewards["rejected"][0])]
    toy.write_jsonl(str(tmp_path / "pairs.jsonl"), [
        row | {"chosen": row["rejected"], "rejected": row["chosen"]} if i % 2 else row for i, row in enumerate(rows)])
    run("precompute_rewards.py", "--oracle", lab / "oracle", "--data", tmp_path / "pairs.jsonl",
        "--relabel", tmp_path / "labelled.jsonl", "--out", tmp_path / "rewards.pt")
    labelled = [json.loads(line) for line in open(tmp_path / "labelled.jsonl")]
    assert [row["chosen"] for row in labelled] == better
    assert [{row["chosen"], row["rejected"]} for row in labelled] == [{row["chosen"], row["rejected"]} for row in rows]
    saved = torch.load(tmp_path / "rewards.pt", weights_only=True)
    expected = [max(pair) for pair in zip(rewards["chosen"][0].tolist(), rewards["rejected"][0].tolist())]
    assert saved["chosen"][0].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    run("align.py", "--loss", "drdo", "--model", lab / "sft", "--data", tmp_path / "labelled.jsonl", "--eval_data", "",
        "--oracle_rewards", tmp_path / "rewards.pt", *TRAINING, "--max_steps", 1, "--out", tmp_path / "out")
    assert json.load(open(tmp_path / "out" / "args.json"))["oracles"] == [str(lab / "oracle")]


def test_an_oracle_of_another_family_tokenizer_and_width_teaches(lab, tmp_path):
    """GPT-NeoX on pieces of words teaches the Llama that reads words: the student's differences become its own."""
    tokenizer = toy.make_tokenizer(pieces=True)
    tokenizer.save_pretrained(tmp_path / "base")
    toy.make_model(tokenizer, 1, hidden_size=32, family="gpt_neox").save_pretrained(tmp_path / "base")
    data = ["--data", lab / "train.jsonl", "--eval_data", "", *TRAINING]
    run("oracle.py", "--model", tmp_path / "base", *data, "--max_steps", 6, "--learning_rate", 2e-3, "--out", tmp_path / "oracle")
    run("precompute_rewards.py", "--oracle", tmp_path / "oracle", "--data", lab / "train.jsonl", "--out", tmp_path / "rewards.pt")
    rewards = torch.load(tmp_path / "rewards.pt", weights_only=True)
    run("align.py", "--loss", "drdo", "--model", lab / "sft", *data, "--oracle_rewards", tmp_path / "rewards.pt",
        "--student_rewards", "logps", "--unit_oracle", "--alpha", 0, "--learning_rate", 1e-3, "--max_steps", 45,
        "--out", tmp_path / "out")
    distillation, margins = read_log(tmp_path / "out", "loss/distillation"), (rewards["chosen"] - rewards["rejected"])[0]
    assert sum(distillation[-3:]) < 0.2 * sum(distillation[:3])
    assert sum(read_log(tmp_path / "out", "oracle/margins")[-3:]) / 3 == pytest.approx((margins / margins.std()).mean().item(), rel=1e-3)


def test_reward_models_of_other_seeds_differ_in_their_heads(lab):
    """After the same ten steps from one SFT policy the bodies are close, the heads unrelated."""
    a, b = (load_file(lab / name / "model.safetensors")["score.weight"][0] for name in ("oracle", "reward_model"))
    assert abs(torch.nn.functional.cosine_similarity(a, b, dim=0)) < 0.6
    assert "logps/chosen" not in json.loads((lab / "reward_model" / "log.jsonl").read_text().splitlines()[0])


def test_drdo_distils_the_oracle(lab, tmp_path):
    """alpha 0 leaves the first term: the head's reward differences become the Oracle's, on the pairs trained on."""
    run(*align_flags(lab, "drdo"), "--alpha", 0, "--max_steps", 60, "--keep_steps", 30, "--out", tmp_path)
    distillation = read_log(tmp_path, "loss/distillation")
    assert sum(distillation[-6:]) < 0.2 * sum(distillation[:6])
    # the policy with its head inside is a reward model
    policy, head = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "score.safetensors")
    assert list(head) == ["score.weight"] and not head.keys() & policy.keys()
    kept = [AutoModelForCausalLM.from_pretrained(tmp_path / step).state_dict() for step in ("step30", "step60")]
    same = [all(torch.equal(policy[name], weights[name]) for name in policy) for weights in kept]
    assert same == [False, True] and AutoTokenizer.from_pretrained(tmp_path / "step30")
    shutil.copytree(tmp_path, tmp_path / "oracle", ignore=shutil.ignore_patterns("oracle"))
    save_file(policy | head, tmp_path / "oracle" / "model.safetensors", {"format": "pt"})
    run("precompute_rewards.py", "--oracle", tmp_path / "oracle", "--data", lab / "train.jsonl", "--out", tmp_path / "student.pt")
    student, oracle = (torch.load(path, weights_only=True) for path in (tmp_path / "student.pt", lab / "rewards.pt"))
    margins = [(r["chosen"] - r["rejected"])[0] for r in (student, oracle)]
    assert torch.corrcoef(torch.stack(margins))[0, 1] > 0.9


@pytest.mark.parametrize("loss, flags", [("dpo", []), ("drdo", ["--student_rewards", "logps", "--alpha", 1])])
def test_the_policy_learns_its_pairs(lab, tmp_path, loss, flags):
    run(*align_flags(lab, loss), *flags, "--max_steps", 40, "--out", tmp_path)
    assert read_log(tmp_path)[-1] < read_log(tmp_path)[0]
    if loss == "dpo":
        assert read_log(tmp_path)[0] == pytest.approx(0.6931472, rel=1e-5)  # the reference is the policy before its first step
        assert read_log(tmp_path, "rewards/accuracies")[-1] > 0.9
        # linear to the peak in 2 steps, then half a cosine that ends at 0 after 38 more
        rates = [read_log(tmp_path, "learning_rate")[step - 1] for step in (1, 2, 3, 22, 40)]
        assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4, 1.708e-6], rel=1e-3)
    assert not (tmp_path / "checkpoint").exists() and not (tmp_path / "score.safetensors").exists()


def test_unit_oracle_distils_differences_of_std_1(lab, tmp_path):
    rewards = torch.load(lab / "ensemble.pt", weights_only=True)
    margins = (rewards["chosen"] - rewards["rejected"])
    margins = margins[:, margins.isfinite().all(0)].mean(0)
    flags = ["--batch_size", len(margins), "--micro_batch_size", len(margins), "--max_steps", 1, "--eval_data", ""]
    together(*((run, *align_flags(lab, "drdo", "ensemble.pt"), *flags, *more, "--out", tmp_path / name)
               for name, more in (("plain", []), ("unit", ["--unit_oracle"]))))
    plain, unit = (read_log(tmp_path / name, "oracle/margins")[0] for name in ("plain", "unit"))
    assert plain == pytest.approx(margins.mean().item(), rel=1e-4)
    assert unit == pytest.approx((margins.mean() / margins.std()).item(), rel=1e-4)


@pytest.mark.parametrize("script", ["sft.py", "oracle.py", "edpo"])
def test_one_process_and_two_give_the_same_losses(lab, tmp_path, script):
    if script.endswith(".py"):
        flags = [script, "--model", lab / "sft", "--data", lab / "train.jsonl", "--eval_data", lab / "validation.jsonl",
                 *TRAINING, "--learning_rate", 1e-3]
    else:
        flags = align_flags(lab, script, "ensemble.pt" if script == "edpo" else "rewards.pt")
    # two processes at another ZeRO stage, with gradient checkpointing
    stage = {"sft.py": 0, "oracle.py": 1, "edpo": 2}[script]
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}, "gradient_clipping": 1.0}))
    run_on_one_and_two([*flags, "--max_steps", 10], tmp_path / "one", tmp_path / "two",
                       "--deepspeed_config", tmp_path / "zero.json", "--gradient_checkpointing")
    for key in ("loss", "grad_norm"):
        one, two = read_log(tmp_path / "one", key), read_log(tmp_path / "two", key)
        assert len(one) == 10 and two == pytest.approx(one, rel=1e-4)


def stop_while_saving(flags, out, processes=0):
    """Runs until the model cannot be saved, as on a full disk: the last checkpoint stays."""
    (out / "config.json" / "in_the_way").mkdir(parents=True)
    error = run(*flags, "--out", out, expect=2, processes=processes)
    assert error.count("error: ") == 1 and "config.json" in error and "Traceback" not in error
    shutil.rmtree(out / "config.json")


def test_resuming_is_bitwise_the_run_that_was_not_interrupted(lab, tmp_path):
    flags = [*align_flags(lab, "dpo"), "--max_steps", 7, "--save_steps", 4, "--log_steps", 3]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    together((run, *flags, "--out", whole), (stop_while_saving, flags, stopped))
    (stopped / "checkpoint" / "step7").mkdir()  # as a crash in the next checkpoint leaves it
    with open(stopped / "log.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    forgot, beta, processes = together(
        (partial(run, expect=2), *flags, "--out", stopped),
        (partial(run, expect=2), *flags, "--out", stopped, "--resume", "--beta", 0.5),
        (partial(run, expect=2, processes=2), *flags, "--out", stopped, "--resume"))
    assert "unfinished run" in forgot and "beta was 0.1 and is now 0.5" in beta
    assert "processes was 1 and is now 2" in processes
    rows = (lab / "validation.jsonl").read_text()
    (lab / "validation.jsonl").write_text("\n".join(reversed(rows.splitlines())) + "\n")
    assert "sha256" in run(*flags, "--out", stopped, "--resume", expect=2)
    (lab / "validation.jsonl").write_text(rows)
    shutil.copytree(stopped, tmp_path / "smaller")

    # a smaller micro-batch and checkpointing, as out of memory asks for
    together((run, *flags, "--out", stopped, "--resume"), (run, *flags, "--out", tmp_path / "smaller", "--resume",
             "--micro_batch_size", 2, "--gradient_checkpointing"))
    figures = [[{name: line[name] for name in line if name not in ("tokens_per_second", "peak_memory_gb")}
                for line in map(json.loads, open(out / "log.jsonl"))] for out in (whole, stopped)]
    assert figures[0] == figures[1]
    weights, resumed = (load_file(out / "model.safetensors") for out in (whole, stopped))
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert read_log(tmp_path / "smaller") == pytest.approx(read_log(whole), rel=1e-5)


@pytest.mark.parametrize("flags, processes, words", [
    (["--learning_rate", 1e39], 0, ["weights are not finite"]),
    (["--learning_rate", 1e-3, "--beta", 3e38], 2, ["step 1:", "not finite", "train.jsonl, lines ["])])
def test_numbers_that_are_not_finite_end_the_run(lab, tmp_path, flags, processes, words):
    """Weights that overflow at the last step are not saved. A step whose gradient overflows ends the run and is named."""
    error = run(*align_flags(lab, "dpo"), "--max_steps", 1, *flags, "--out", tmp_path, processes=processes, expect=2)
    assert error.count("error: ") == 1 and all(word in error for word in words)
    assert not (tmp_path / "model.safetensors").exists()
    for line in open(tmp_path / "log.jsonl"):
        json.loads(line, parse_constant=pytest.fail)


def test_the_students_head_is_not_the_oracles(lab, tmp_path):
    """Drawn from one --seed they are unrelated, else the student would start with some of the Oracle's rewards."""
    still = ["--max_steps", 1, "--learning_rate", 1e-9, "--eval_data", "", "--seed", 3]
    together((run, *align_flags(lab, "drdo"), *still, "--out", tmp_path / "drdo"),
             (run, "oracle.py", "--model", lab / "sft", "--data", lab / "train.jsonl", *TRAINING, *still,
              "--out", tmp_path / "oracle"))
    student = load_file(tmp_path / "drdo" / "score.safetensors")["score.weight"][0]
    oracle = load_file(tmp_path / "oracle" / "model.safetensors")["score.weight"][0]
    assert abs(torch.nn.functional.cosine_similarity(student, oracle, dim=0)) < 0.5


def test_bf16_and_zero_2_on_two_processes(lab, tmp_path):
    """Training, resuming, scoring and generating agree with fp32 as far as 8 bits do, and keep fp32 weights."""
    flags = [*align_flags(lab, "drdo"), "--max_steps", 8, "--save_steps", 4]
    bf16 = [*flags, "--dtype", "bf16"]
    together((run, *flags, "--out", tmp_path / "fp32"), (partial(stop_while_saving, processes=2), bf16, tmp_path / "bf16"))
    run(*bf16, "--out", tmp_path / "bf16", "--resume", processes=2, launcher=True)
    assert json.load(open(tmp_path / "bf16" / "args.json"))["dtype"] == "bf16"
    fp32, bf16 = read_log(tmp_path / "fp32"), read_log(tmp_path / "bf16")
    assert bf16 != fp32 and bf16 == pytest.approx(fp32, rel=0.03)
    weights = load_file(tmp_path / "bf16" / "model.safetensors")
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    start = load_file(lab / "sft" / "model.safetensors")  # the steps are not those of the first weights
    expected = load_file(tmp_path / "fp32" / "model.safetensors")
    moved, should = (sum((w[name] - start[name]).abs().sum().item() for name in start) for w in (weights, expected))
    assert moved == pytest.approx(should, rel=0.05)

    generate = ["generate.py", "--model", tmp_path / "bf16", "--prompts", lab / "validation.jsonl", "--temperature", 0,
                "--max_new_tokens", 8, "--dtype", "bf16"]
    score = ["precompute_rewards.py", "--oracle", lab / "oracle", "--data", lab / "train.jsonl", "--dtype", "bf16"]
    together((partial(run, processes=2), *generate, "--out", tmp_path / "two.jsonl"),
             (partial(run, processes=2), *score, "--out", tmp_path / "bf16.pt"))
    assert len((tmp_path / "two.jsonl").read_text().splitlines()) > 10
    rewards = torch.load(tmp_path / "bf16.pt", weights_only=True)["chosen"]
    expected = torch.load(lab / "rewards.pt", weights_only=True)["chosen"]
    assert rewards.dtype == torch.float32 and not torch.equal(rewards, expected)
    torch.testing.assert_close(rewards, expected, rtol=0.1, atol=0.1)


def test_scores_and_generations_do_not_depend_on_the_number_of_processes(lab, tmp_path):
    generate = ["generate.py", "--model", lab / "sft", "--prompts", lab / "validation.jsonl", "--temperature", 0, 0.9,
                "--max_new_tokens", 12, "--micro_batch_size", 5]
    run_on_one_and_two(generate, tmp_path / "one.jsonl", tmp_path / "two.jsonl")
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    score = ["precompute_rewards.py", "--oracle", lab / "oracle", "--data", tmp_path / "one.jsonl"]
    run_on_one_and_two(score, tmp_path / "one.pt", tmp_path / "two.pt", "--micro_batch_size", 3)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    torch.testing.assert_close(one["response"], two["response"], rtol=1e-5, atol=1e-6)

    prompts = list(dict.fromkeys(json.loads(line)["prompt"] for line in open(lab / "validation.jsonl")))
    rows = [json.loads(line) for line in open(tmp_path / "one.jsonl")]
    assert [(row["prompt"], row["temperature"]) for row in rows] == [(prompt, t) for prompt in prompts for t in (0, 0.9)]
    assert all(row["tokens"] <= 12 and (row["eos"] or row["tokens"] == 12) and "chosen" not in row for row in rows)
    tokenizer, model = AutoTokenizer.from_pretrained(lab / "sft"), AutoModelForCausalLM.from_pretrained(lab / "sft")
    for row in rows[:6:2]:  # temperature 0 is the argmax at each step, one prompt at a time
        ids = [tokenizer.bos_token_id] + tokenizer(row["prompt"], add_special_tokens=False).input_ids
        for _ in range(row["tokens"] + row["eos"]):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        response = ids[len(ids) - row["tokens"] - row["eos"]:]
        assert tokenizer.decode(response, skip_special_tokens=True) == row["response"]
        assert (response[-1] == tokenizer.eos_token_id) == row["eos"]


def test_a_chat_templates_answers_to_text_begin_with_a_space(lab, tmp_path):
    """As in a preference file, where prompt + response is the text; answers to messages do not. HF's own greedy decoding."""
    tokenizer, model = AutoTokenizer.from_pretrained(lab / "sft"), AutoModelForCausalLM.from_pretrained(lab / "sft")
    tokenizer.chat_template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path), model.save_pretrained(tmp_path)
    text = json.loads(open(lab / "validation.jsonl").readline())["prompt"]
    toy.write_jsonl(str(tmp_path / "prompts.jsonl"), [{"prompt": text}, {"prompt": [{"role": "user", "content": text}]}])
    run("generate.py", "--model", tmp_path, "--prompts", tmp_path / "prompts.jsonl", "--temperature", 0, "--max_new_tokens", 9)
    ids = torch.tensor([[tokenizer.bos_token_id] + tokenizer(text, add_special_tokens=False).input_ids])
    output = model.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1]:]
    answer = tokenizer.decode(output, skip_special_tokens=True)
    responses = [json.loads(line)["response"] for line in open(tmp_path / "generations.jsonl")]
    assert answer and responses == [" " + answer, answer]
