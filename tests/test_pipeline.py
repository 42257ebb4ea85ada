"""The stages as programs, on a tiny random model and toy pairs: they learn, resume, split over processes, and
each reads what the one before it wrote."""
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


def read_jsonl(path):
    return [json.loads(line) for line in open(path)]


def read_log(folder, key="loss"):
    return [line[key] for line in read_jsonl(folder / "log.jsonl") if key in line]


def load_lm(folder):
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """A base LM, pairs, an SFT policy, an Oracle, a reward model, and the rewards of one and of both."""
    lab = tmp_path_factory.mktemp("lab")
    tokenizer = toy.make_tokenizer()
    tokenizer.save_pretrained(lab / "base")
    toy.make_model(tokenizer, seed=0, steps=0).save_pretrained(lab / "base")
    toy.write_jsonl(str(lab / "train.jsonl"), toy.make_pairs(48, 1))
    toy.write_jsonl(str(lab / "validation.jsonl"), toy.make_pairs(20, 2))
    data = ["--data", lab / "train.jsonl", "--eval_data", lab / "validation.jsonl", *TRAINING]
    run("sft.py", "--model", lab / "base", *data, "--max_steps", 20, "--learning_rate", 3e-3,
        "--out", lab / "sft")
    oracle = ["oracle.py", "--model", lab / "sft", *data, "--max_steps", 10, "--learning_rate", 2e-3]
    together((run, *oracle, "--out", lab / "oracle"),
             (run, *oracle, "--out", lab / "reward_model", "--alpha", 0, "--seed", 1))
    score = run, "precompute_rewards.py", "--data", lab / "train.jsonl", "--oracle", lab / "oracle"
    together((*score, lab / "reward_model", "--max_length", 85, "--out", lab / "ensemble.pt"),
             (*score, "--out", lab / "rewards.pt"))
    return lab


def mean_nll(tokenizer, model, prompt, response):
    """(the mean NLL of a response's tokens by HF's own loss, their number)."""
    prompt = [tokenizer.bos_token_id] + tokenizer(prompt, add_special_tokens=False).input_ids
    response = tokenizer(response, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    labels = torch.tensor([[-100] * len(prompt) + response])
    return model(torch.tensor([prompt + response]), labels=labels).loss.item(), len(response)


def run_on_one_and_two(flags, one, two, *more):
    """Runs a stage on one process, writing `one`, and beside it on two, writing `two`."""
    together((run, *flags, "--out", one), (partial(run, processes=2), *flags, *more, "--out", two))


def align_flags(lab, loss, rewards="rewards.pt"):
    return ["align.py", "--loss", loss, "--model", lab / "sft", "--data", lab / "train.jsonl", "--eval_data",
            lab / "validation.jsonl", "--oracle_rewards", lab / rewards, *TRAINING, "--learning_rate", 1e-3]


def test_sft_lowers_the_nll_of_responses_and_agrees_with_the_model_it_wrote(lab):
    losses = read_log(lab / "sft")
    assert losses[-1] < losses[0] - 1.0
    tokenizer, model = load_lm(lab / "sft")
    total = tokens = 0
    for row in read_jsonl(lab / "validation.jsonl"):
        mean, length = mean_nll(tokenizer, model, row["prompt"], row["chosen"])
        total += mean * length
        tokens += length
    assert read_log(lab / "sft", "eval_loss")[-1] == pytest.approx(total / tokens, rel=1e-5)


def test_an_oracle_loads_in_both_classes_with_equal_rewards(lab):
    """HF's own classifier, on right-padded text, gives the rewards that precompute_rewards.py wrote. So does
    the LM's last hidden state times score.weight."""
    tokenizer, lm = load_lm(lab / "oracle")
    classifier = AutoModelForSequenceClassification.from_pretrained(lab / "oracle")
    score = load_file(lab / "oracle" / "model.safetensors")["score.weight"]
    config = json.load(open(lab / "oracle" / "config.json"))
    assert score.shape == (1, config["hidden_size"]) and classifier.config.num_labels == 1
    assert config["pad_token_id"] not in (None, tokenizer.eos_token_id)
    rewards = torch.load(lab / "rewards.pt", weights_only=True)
    rows = read_jsonl(lab / "train.jsonl")[:8]
    for key in ("chosen", "rejected"):
        texts = [tokenizer.bos_token + row["prompt"] + row[key] + tokenizer.eos_token for row in rows]
        batch = tokenizer(texts, padding=True, padding_side="right", add_special_tokens=False,
                          return_token_type_ids=False, return_tensors="pt")
        logits = classifier(**batch).logits[:, 0].detach()
        torch.testing.assert_close(logits, rewards[key][0, :8], rtol=1e-5, atol=1e-5)
        hidden = lm(**batch, output_hidden_states=True).hidden_states[-1]
        last = hidden[torch.arange(8), batch["attention_mask"].sum(1) - 1]
        torch.testing.assert_close((last @ score.T)[:, 0].detach(), logits, rtol=1e-5, atol=1e-5)


def test_references_are_scored_and_a_text_under_another_prompt_is_another(lab, tmp_path):
    pairs, scores = read_jsonl(lab / "train.jsonl")[:6], tmp_path / "scores.pt"
    rows = [{"prompt": pair["prompt"], "response": pair["rejected"], "reference": pair["chosen"]}
            for pair in pairs]
    del rows[3]["reference"]
    rows.append({"prompt": pairs[0]["prompt"], "response": pairs[1]["rejected"]})
    toy.write_jsonl(tmp_path / "rows.jsonl", rows)
    run("precompute_rewards.py", "--oracle", lab / "oracle", "--data", tmp_path / "rows.jsonl",
        "--out", scores)
    saved, known = (torch.load(path, weights_only=True) for path in (scores, lab / "rewards.pt"))
    known["chosen"][0, 3] = float("nan")
    for key, own in ("response", "rejected"), ("reference", "chosen"):
        torch.testing.assert_close(saved[key][0, :6], known[own][0, :6], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert saved["response"][0, 6] != saved["response"][0, 1]


def test_the_rewards_file_is_what_the_design_says(lab):
    rewards = torch.load(lab / "ensemble.pt", weights_only=True)
    assert rewards["chosen"].shape == rewards["rejected"].shape == (2, 48)
    assert rewards["chosen"].dtype == torch.float32
    assert rewards["data_sha256"] == hashlib.sha256((lab / "train.jsonl").read_bytes()).hexdigest()
    assert rewards["oracles"] == [str(lab / "oracle"), str(lab / "reward_model")]
    tokenizer, rows = AutoTokenizer.from_pretrained(lab / "oracle"), read_jsonl(lab / "train.jsonl")
    for key in ("chosen", "rejected"):
        long = [len(tokenizer(row["prompt"] + row[key]).input_ids) + 2 > 85 for row in rows]  # 2: BOS and EOS
        assert any(long) and rewards[key].isnan().all(0).tolist() == long
    whole = torch.load(lab / "rewards.pt", weights_only=True)["chosen"][0]
    kept = ~rewards["chosen"][0].isnan()
    torch.testing.assert_close(rewards["chosen"][0, kept], whole[kept], rtol=1e-5, atol=1e-6)


def test_an_oracle_orders_pairs_without_labels(lab, tmp_path):
    """The response with the higher reward becomes `chosen`, wherever it stood. align.py takes both files."""
    rewards = torch.load(lab / "rewards.pt", weights_only=True)
    scores = [rewards[key][0].tolist() for key in ("chosen", "rejected")]
    rows = read_jsonl(lab / "train.jsonl")
    texts = lambda rows: [(row["chosen"], row["rejected"]) for row in rows]
    expected = [pair if w > l else pair[::-1] for pair, w, l in zip(texts(rows), *scores)]
    swap = lambda row: row | {"chosen": row["rejected"], "rejected": row["chosen"]}
    toy.write_jsonl(tmp_path / "pairs.jsonl", [swap(row) if i % 2 else row for i, row in enumerate(rows)])
    run("precompute_rewards.py", "--oracle", lab / "oracle", "--data", tmp_path / "pairs.jsonl",
        "--relabel", tmp_path / "labelled.jsonl", "--out", tmp_path / "rewards.pt")
    assert texts(read_jsonl(tmp_path / "labelled.jsonl")) == expected
    saved = torch.load(tmp_path / "rewards.pt", weights_only=True)
    assert saved["chosen"][0].tolist() == pytest.approx(list(map(max, *scores)), rel=1e-5, abs=1e-6)
    run(*align_flags(lab, "drdo"), "--data", tmp_path / "labelled.jsonl", "--eval_data", "",
        "--oracle_rewards", tmp_path / "rewards.pt", "--max_steps", 1, "--out", tmp_path / "out")
    assert json.load(open(tmp_path / "out" / "args.json"))["oracles"] == [str(lab / "oracle")]


def test_an_oracle_of_another_family_tokenizer_and_width_teaches(lab, tmp_path):
    """The Oracle is a GPT-NeoX that reads pieces of words, the student a Llama that reads words."""
    base, oracle, scores, out = (tmp_path / name for name in ("base", "oracle", "rewards.pt", "out"))
    tokenizer = toy.make_tokenizer(pieces=True)
    tokenizer.save_pretrained(base)
    toy.make_model(tokenizer, 1, hidden_size=32, family="gpt_neox").save_pretrained(base)
    run("oracle.py", "--model", base, "--data", lab / "train.jsonl", "--eval_data", "", *TRAINING,
        "--max_steps", 6, "--learning_rate", 2e-3, "--out", oracle)
    run("precompute_rewards.py", "--oracle", oracle, "--data", lab / "train.jsonl", "--out", scores)
    run(*align_flags(lab, "drdo"), "--eval_data", "", "--oracle_rewards", scores, "--standardise_oracle",
        "--student_rewards", "logps", "--alpha", 0, "--max_steps", 45, "--out", out)
    distillation = read_log(out, "loss/distillation")
    assert sum(distillation[-3:]) < 0.2 * sum(distillation[:3])
    rewards = torch.load(scores, weights_only=True)
    margins = (rewards["chosen"] - rewards["rejected"])[0]
    unit = (margins / margins.std()).mean().item()
    assert sum(read_log(out, "oracle/margins")[-3:]) / 3 == pytest.approx(unit, rel=1e-3)


def test_reward_models_of_other_seeds_differ_in_their_heads(lab):
    """After the same ten steps from one SFT policy the bodies are close, the heads unrelated."""
    a, b = (load_file(lab / name / "model.safetensors")["score.weight"][0]
            for name in ("oracle", "reward_model"))
    assert abs(torch.nn.functional.cosine_similarity(a, b, dim=0)) < 0.6
    assert "logps/chosen" not in read_jsonl(lab / "reward_model" / "log.jsonl")[0]


def test_drdo_distils_the_oracle(lab, tmp_path):
    """alpha 0 leaves the first term: the head's reward differences become the Oracle's on these pairs."""
    run(*align_flags(lab, "drdo"), "--alpha", 0, "--max_steps", 60, "--keep_steps", 30, "--out", tmp_path)
    distillation = read_log(tmp_path, "loss/distillation")
    assert sum(distillation[-6:]) < 0.2 * sum(distillation[:6])
    # the policy with its head inside is a reward model
    policy, head = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "score.safetensors")
    assert list(head) == ["score.weight"] and not head.keys() & policy.keys()
    kept = [load_lm(tmp_path / step)[1].state_dict() for step in ("step30", "step60")]
    same = [all(torch.equal(policy[name], weights[name]) for name in policy) for weights in kept]
    assert same == [False, True]
    student, scores = tmp_path / "oracle", tmp_path / "student.pt"
    shutil.copytree(tmp_path, student, ignore=shutil.ignore_patterns("oracle"))
    save_file(policy | head, student / "model.safetensors", {"format": "pt"})
    run("precompute_rewards.py", "--oracle", student, "--data", lab / "train.jsonl", "--out", scores)
    rewards = [torch.load(path, weights_only=True) for path in (scores, lab / "rewards.pt")]
    margins = [(r["chosen"] - r["rejected"])[0] for r in rewards]
    assert torch.corrcoef(torch.stack(margins))[0, 1] > 0.9


@pytest.mark.parametrize("loss, flags", [("dpo", []), ("drdo", ["--student_rewards", "logps", "--alpha", 1])])
def test_the_policy_learns_its_pairs(lab, tmp_path, loss, flags):
    (tmp_path / "partial").mkdir()  # what a run of DRDO left that was killed while it saved
    (tmp_path / "partial/score.safetensors").touch()
    (tmp_path / "additional_chat_templates").mkdir()  # and what runs of DRDO and of another model left
    left = [tmp_path / name for name in (
        "score.safetensors", "chat_template.jinja", "additional_chat_templates/tools.jinja")]
    for path in left:
        path.touch()
    run(*align_flags(lab, loss), *flags, "--max_steps", 40, "--out", tmp_path)
    assert not any(path.exists() for path in left)
    assert read_log(tmp_path)[-1] < read_log(tmp_path)[0]
    if loss == "dpo":
        assert read_log(tmp_path)[0] == pytest.approx(0.6931472, rel=1e-5)  # log 2: still the reference
        assert read_log(tmp_path, "rewards/accuracies")[-1] > 0.9
        # linear to the peak in 2 steps, then half a cosine that ends at 0 after 38 more
        rates = [read_log(tmp_path, "learning_rate")[step - 1] for step in (1, 2, 3, 22, 40)]
        assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4, 1.708e-6], rel=1e-3)


def test_the_recommended_reading(lab, tmp_path):
    """Its first step: log ratios of 0, Oracle's differences of std 1, p_w of mean log-probs. Held-out figures
    are computed alike."""
    rewards = torch.load(lab / "ensemble.pt", weights_only=True)
    margins = rewards["chosen"] - rewards["rejected"]
    kept = margins.isfinite().all(0)
    margins, pairs = margins[:, kept].mean(0), int(kept.sum())
    flags = [*align_flags(lab, "drdo", "ensemble.pt"), "--eval_data", lab / "train.jsonl",
             "--eval_oracle_rewards", lab / "ensemble.pt", "--max_steps", 1, "--learning_rate", 1e-9,
             "--batch_size", pairs, "--micro_batch_size", pairs]
    reading = ["--student_rewards", "log_ratio", "--p_w", "mean", "--standardise_oracle"]
    together(*((run, *flags, *more, "--out", tmp_path / name)
               for name, more in (("plain", []), ("reading", reading))))
    assert read_log(tmp_path / "plain", "oracle/margins")[0] == pytest.approx(margins.mean().item(), rel=1e-4)
    train, held_out = read_jsonl(tmp_path / "reading" / "log.jsonl")
    unit, model = margins / margins.std(), load_lm(lab / "sft")
    means = torch.tensor([[-mean_nll(*model, row["prompt"], row[key])[0] for key in ("chosen", "rejected")]
                          for row, fits in zip(read_jsonl(lab / "train.jsonl"), kept) if fits])
    expected = {"oracle/margins": unit, "loss/distillation": unit ** 2,
                "p_w": torch.sigmoid(means[:, 0] - means[:, 1])}
    for name, values in expected.items():
        assert train[name] == pytest.approx(values.mean().item(), rel=1e-4)
    for name in ("loss", "p_w", "oracle/margins", "logps/chosen", "logps/rejected"):
        assert held_out[f"eval_{name}"] == pytest.approx(train[name], rel=1e-4)


@pytest.mark.parametrize("script, stage", [("sft.py", 0), ("oracle.py", 1), ("align.py", 2)])
def test_one_process_and_two_give_the_same_losses(lab, tmp_path, script, stage):
    """Two processes at another ZeRO stage, with gradient checkpointing."""
    flags = [script, "--model", lab / "sft", "--data", lab / "train.jsonl", "--eval_data",
             lab / "validation.jsonl", *TRAINING, "--learning_rate", 1e-3]
    if script == "align.py":
        flags += ["--loss", "edpo", "--oracle_rewards", lab / "ensemble.pt"]
    config = {"zero_optimization": {"stage": stage}, "gradient_clipping": 1.0}
    (tmp_path / "zero.json").write_text(json.dumps(config))
    run_on_one_and_two([*flags, "--max_steps", 10], tmp_path / "one", tmp_path / "two",
                       "--deepspeed_config", tmp_path / "zero.json", "--gradient_checkpointing")
    for key, lines in ("loss", 10), ("grad_norm", 10), ("eval_loss", script != "align.py"):
        one, two = read_log(tmp_path / "one", key), read_log(tmp_path / "two", key)
        assert len(one) == lines and two == pytest.approx(one, rel=1e-4)


def stop_while_saving(flags, out, processes=0):
    """Runs until the model cannot be saved, as on a full disk: the last checkpoint stays."""
    (out / "config.json" / "in_the_way").mkdir(parents=True)
    error = run(*flags, "--out", out, expect=2, processes=processes)
    assert error.count("error: ") == 1 and "config.json" in error and "Traceback" not in error
    shutil.rmtree(out / "config.json")


def test_resuming_is_bitwise_the_run_that_was_not_interrupted(lab, tmp_path):
    flags = [*align_flags(lab, "dpo"), "--max_steps", 7, "--save_steps", 4, "--log_steps", 3]
    whole, stopped, smaller = (tmp_path / name for name in ("whole", "stopped", "smaller"))
    together((run, *flags, "--out", whole), (stop_while_saving, flags, stopped))
    (stopped / "checkpoint" / "step7").mkdir()  # as a crash in the next checkpoint leaves it
    with open(stopped / "log.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    shutil.copytree(stopped, smaller)

    # a smaller micro-batch and checkpointing, as out of memory asks for
    together((run, *flags, "--out", stopped, "--resume"),
             (run, *flags, "--out", smaller, "--resume", "--micro_batch_size", 2, "--gradient_checkpointing"))
    figures = [[{name: line[name] for name in line if name not in ("tokens_per_second", "peak_memory_gb")}
                for line in read_jsonl(out / "log.jsonl")] for out in (whole, stopped)]
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


def test_a_first_step_decays_matrices_and_no_head_is_the_oracles(lab, tmp_path):
    """One --seed draws unrelated heads, or the student would start with some of the Oracle's rewards."""
    still = ["--max_steps", 1, "--learning_rate", 1e-9, "--eval_data", "", "--seed", 3, "--weight_decay", 1e8]
    together((run, *align_flags(lab, "drdo"), *still, "--out", tmp_path / "drdo"),
             (run, "oracle.py", "--model", lab / "sft", "--data", lab / "train.jsonl", *TRAINING, *still,
              "--out", tmp_path / "oracle"))
    student = load_file(tmp_path / "drdo" / "score.safetensors")["score.weight"][0]
    oracle = load_file(tmp_path / "oracle" / "model.safetensors")["score.weight"][0]
    assert abs(torch.nn.functional.cosine_similarity(student, oracle, dim=0)) < 0.5
    start, end = (load_file(folder / "model.safetensors") for folder in (lab / "sft", tmp_path / "drdo"))
    for name, weight in start.items():  # warm-up halves the rate: 1 - 1e8 x 1e-9 / 2
        torch.testing.assert_close(end[name], weight * (0.95 if weight.ndim > 1 else 1))


def test_bf16_and_zero_2_on_two_processes(lab, tmp_path):
    """Training, resuming, scoring and generating agree with fp32 as 8 bits allow. The weights stay fp32."""
    flags = [*align_flags(lab, "drdo"), "--max_steps", 8, "--save_steps", 4]
    bf16 = [*flags, "--dtype", "bf16"]
    together((run, *flags, "--out", tmp_path / "fp32"),
             (partial(stop_while_saving, processes=2), bf16, tmp_path / "bf16"))
    run(*bf16, "--out", tmp_path / "bf16", "--resume", processes=2, launcher=True)
    assert json.load(open(tmp_path / "bf16" / "args.json"))["dtype"] == "bf16"
    fp32, bf16 = read_log(tmp_path / "fp32"), read_log(tmp_path / "bf16")
    assert bf16 != fp32 and bf16 == pytest.approx(fp32, rel=0.03)
    weights = load_file(tmp_path / "bf16" / "model.safetensors")
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    start = load_file(lab / "sft" / "model.safetensors")
    expected = load_file(tmp_path / "fp32" / "model.safetensors")
    moved = lambda weights: sum((weights[name] - start[name]).abs().sum().item() for name in start)
    assert moved(weights) == pytest.approx(moved(expected), rel=0.05)

    generate = ["generate.py", "--model", tmp_path / "bf16", "--prompts", lab / "validation.jsonl",
                "--temperature", 0, "--max_new_tokens", 8]
    score = ["precompute_rewards.py", "--oracle", lab / "oracle", "--data", lab / "train.jsonl"]
    together((partial(run, processes=2), *generate, "--dtype", "bf16", "--out", tmp_path / "two.jsonl"),
             (partial(run, processes=2), *score, "--dtype", "bf16", "--out", tmp_path / "bf16.pt"))
    assert len((tmp_path / "two.jsonl").read_text().splitlines()) > 10
    rewards = torch.load(tmp_path / "bf16.pt", weights_only=True)["chosen"]
    expected = torch.load(lab / "rewards.pt", weights_only=True)["chosen"]
    assert rewards.dtype == torch.float32 and not torch.equal(rewards, expected)
    torch.testing.assert_close(rewards, expected, rtol=0.1, atol=0.1)


def test_scores_and_generations_do_not_depend_on_the_number_of_processes(lab, tmp_path):
    generate = ["generate.py", "--model", lab / "sft", "--prompts", lab / "validation.jsonl",
                "--temperature", 0, 0.9, "--max_new_tokens", 12, "--micro_batch_size", 5]
    run_on_one_and_two(generate, tmp_path / "one.jsonl", tmp_path / "two.jsonl")
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    score = ["precompute_rewards.py", "--oracle", lab / "oracle", "--data", tmp_path / "one.jsonl"]
    run_on_one_and_two(score, tmp_path / "one.pt", tmp_path / "two.pt", "--micro_batch_size", 3)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    torch.testing.assert_close(one["response"], two["response"], rtol=1e-5, atol=1e-6)

    prompts = {}
    for row in read_jsonl(lab / "validation.jsonl"):
        prompts.setdefault(row["prompt"], row["confidence"])
    expected = [(*prompt, str(lab / "sft"), T) for prompt in prompts.items() for T in (0, 0.9)]
    rows, keys = read_jsonl(tmp_path / "one.jsonl"), ("prompt", "confidence", "generator", "temperature")
    assert [tuple(row[key] for key in keys) for row in rows] == expected
    assert all(row["tokens"] <= 12 if row["eos"] else row["tokens"] == 12 for row in rows)
    assert not any("chosen" in row for row in rows)
    tokenizer, model = load_lm(lab / "sft")
    for row in rows[:6:2]:  # temperature 0 is the argmax at each step, one prompt at a time
        ids = [tokenizer.bos_token_id] + tokenizer(row["prompt"], add_special_tokens=False).input_ids
        for _ in range(row["tokens"] + row["eos"]):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        response = ids[len(ids) - row["tokens"] - row["eos"]:]
        assert tokenizer.decode(response, skip_special_tokens=True) == row["response"]
        assert (response[-1] == tokenizer.eos_token_id) == row["eos"]


def test_a_chat_templates_answers_to_text_begin_with_a_space(lab, tmp_path):
    """As in a preference file, where prompt + response is the text. Answers to messages do not."""
    tokenizer, model = load_lm(lab / "sft")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path), model.save_pretrained(tmp_path)
    text, prompts = read_jsonl(lab / "validation.jsonl")[0]["prompt"], tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": text}]
    toy.write_jsonl(prompts, [{"prompt": text}, {"prompt": messages}])
    run("generate.py", "--model", tmp_path, "--prompts", prompts, "--temperature", 0, "--max_new_tokens", 9)
    ids = torch.tensor([[tokenizer.bos_token_id] + tokenizer(text, add_special_tokens=False).input_ids])
    output = model.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1]:]  # HF's own
    answer = tokenizer.decode(output, skip_special_tokens=True)
    responses = [row["response"] for row in read_jsonl(tmp_path / "generations.jsonl")]
    assert answer and responses == [" " + answer, answer]
