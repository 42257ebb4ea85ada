"""The stages' functions one by one: what a flag does, how text becomes tokens, which rewards a pair gets."""
import hashlib
import json
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

import align
import generate
import oracle
import toy

CHAT = ("{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")


def byte_level(**special):
    """A tokenizer of single bytes in GPT-2's spelling, "!" its id 0 and one special token, as GPT-2 has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def test_a_pad_token_never_takes_a_word_away(tmp_path):
    end = "<|endoftext|>"
    byte_level(bos_token=end, eos_token=end, unk_token=end).save_pretrained(tmp_path)
    tokenizer, lm = AutoTokenizer.from_pretrained(tmp_path), Namespace(config=Namespace())
    oracle.set_pad_token(tokenizer, lm)
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert lm.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    text = "wow! great!!! ünïcode, 漢字"
    assert tokenizer.pad_token_id not in tokenizer(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_training_drops_nothing_out_and_moves_every_embedding(tmp_path):
    """OPT's dropout is 0.5 here, and its pad token, whose embedding would stand still, is EOS too."""
    tokenizer = toy.make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    eos = tokenizer.eos_token_id
    OPTForCausalLM(OPTConfig(
        vocab_size=len(tokenizer), hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=2, ffn_dim=32,
        num_attention_heads=2, max_position_embeddings=64, dropout=0.5, pad_token_id=eos, eos_token_id=eos,
        tie_word_embeddings=False)).save_pretrained(tmp_path)
    _, lm = align.load_model(tmp_path)
    ids = torch.tensor([[1, eos, 9, eos]])
    first, again = (lm(ids, labels=ids) for _ in range(2))
    first.loss.backward()
    assert lm.training and torch.equal(first.logits, again.logits)
    assert lm.get_input_embeddings().weight.grad[eos].any()


def test_text_becomes_tokens_as_the_readme_says():
    tokenizer = byte_level(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    prompt = lambda text: tokenizer.decode(align.encode_prompt(tokenizer, text))
    response = lambda text: tokenizer.decode(align.encode_response(tokenizer, text))
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert prompt("POST: a\n\nTL;DR:") == "<s>POST: a\n\nTL;DR:"
    assert prompt(turns) == "<s>System: be brief\n\nHuman: hi\n\nAssistant:\n"
    assert response(" a b") == " a b</s>"
    assert align.encode_response(tokenizer, "")[-1] == tokenizer.eos_token_id
    tokenizer.chat_template = CHAT
    assert prompt("hi") == "<|user|>\nhi</s>\n<|assistant|>\n"
    assert prompt(turns) == "<|system|>\nbe brief</s>\n<|user|>\nhi</s>\n<|assistant|>\n"
    assert response(" a b") == "a b</s>"


def plan(row_tokens, **changes):
    args = Namespace(**dict(batch_size=8, micro_batch_size=None, warmup_steps=None, max_steps=12, epochs=None,
                            data="x.jsonl", seed=3) | changes)
    return align.plan_steps(row_tokens, args), args


def test_steps_are_a_permutation_an_epoch_and_differ_by_seed(process_group):
    row_tokens = np.arange(50)[::-1].copy()
    steps, args = plan(row_tokens)
    assert steps.shape == (12, 8) and args.micro_batch_size == 8 and args.warmup_steps == 1
    for epoch in (steps[:6], steps[6:]):
        assert len(set(epoch.ravel())) == 48
        assert (np.diff(row_tokens[epoch]) <= 0).all()  # the longest first
    assert set(steps[0]) != set(steps[6]) and set(steps[0]) != set(plan(row_tokens, seed=4)[0][0])
    assert (plan(row_tokens, max_steps=5)[0] == steps[:5]).all()


def test_batches_and_warm_up_suit_the_run(process_group, capsys):
    """The micro-batch divides any --batch_size. A short run warms up for a tenth. Over ten epochs warn."""
    for batch_size, micro in ((64, 8), (10, 5), (7, 7), (11, 1), (6, 6)):
        assert plan(np.arange(99), batch_size=batch_size)[1].micro_batch_size == micro
    steps, args = plan(np.arange(234), batch_size=64, max_steps=None, epochs=1)
    assert len(steps) == 3 and args.warmup_steps == 0
    assert plan(np.arange(99), max_steps=5000)[1].warmup_steps == 100
    capsys.readouterr()
    plan(np.arange(99), max_steps=120)
    assert "10 epochs" not in capsys.readouterr().out
    plan(np.arange(99), max_steps=130)
    assert "10 epochs" in capsys.readouterr().out


def test_each_flag_of_align_reaches_its_loss():
    logps, reference = torch.tensor([[-4.0, -6.0]]).double(), torch.tensor([[-5.0, -6.0]]).double()
    rewards, lengths = torch.tensor([[1.0, 0.5]]).double(), torch.tensor([[2, 4]])
    oracles = torch.tensor([[[3.0, 1.0]], [[2.0, 2.0]]]).double()  # two: differences 2 and 0, mean 1

    def loss_and_metrics(logps=logps, **changes):
        flags = dict(loss="drdo", alpha=0.1, gamma=2.0, beta=0.5, student_rewards="head", ensemble="mean",
                     p_w="sum", detach_focal=False, nll_coef=0.0) | changes
        return align.loss_and_metrics(Namespace(**flags), logps, rewards, reference, oracles, lengths)

    value = lambda **changes: loss_and_metrics(**changes)[0].item()
    p_w = 1 / (1 + math.exp(-2))
    nll = 4 + math.log1p(-math.exp(-6))  # -log(pi_w / (1 - pi_l))
    contrastive = (1 - p_w) ** 2 * nll
    assert value() == pytest.approx((1 - 0.5) ** 2 + 0.1 * contrastive)
    assert value(alpha=2.0, gamma=0.0) == pytest.approx(0.25 + 2 * nll)
    assert value(student_rewards="logps") == pytest.approx((1 - 0.5 * 2) ** 2 + 0.1 * contrastive)
    assert value(student_rewards="logps", beta=0.1) == pytest.approx((1 - 0.1 * 2) ** 2 + 0.1 * contrastive)
    assert value(loss="dpo") == pytest.approx(math.log1p(math.exp(-0.5 * 1)))
    assert value(loss="edpo") == pytest.approx(((2 - 0.5) ** 2 + 0.5**2) / 2)
    assert value(loss="edpo", ensemble="min") == pytest.approx(0.5**2)
    # readings and controls
    assert value(student_rewards="log_ratio") == pytest.approx((1 - 0.5 * 1) ** 2 + 0.1 * contrastive)
    of_means = 1 / (1 + math.exp(-(-4 / 2 + 6 / 4)))
    assert value(p_w="mean") == pytest.approx(0.25 + 0.1 * (1 - of_means) ** 2 * nll)
    assert value(loss="ipo") == pytest.approx((1 - 1 / (2 * 0.5)) ** 2)  # (log ratio - 1 / (2 beta))^2
    assert value(loss="ipo", beta=0.1) == pytest.approx((1 - 1 / (2 * 0.1)) ** 2)
    assert value(loss="dpo", nll_coef=0.25) == pytest.approx(math.log1p(math.exp(-0.5 * 1)) + 0.25 * 4)
    z = logps.clone().requires_grad_()
    free, held = (torch.autograd.grad(loss_and_metrics(z, alpha=1.0, detach_focal=hold)[0], z)[0][0, 0].item()
                  for hold in (False, True))
    assert held == pytest.approx(-((1 - p_w) ** 2))
    assert free - held == pytest.approx(-2 * p_w * contrastive, rel=1e-6)

    metrics = loss_and_metrics()[1]
    assert metrics["loss/distillation"] + metrics["loss/contrastive"] == pytest.approx(metrics["loss"])
    assert metrics["oracle/margins"].item() == 1 and metrics["p_w"].item() == pytest.approx(p_w)


def test_the_oracles_lm_term_is_a_sum_or_a_mean():
    inputs = torch.tensor([[-12.0, 0.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([4])
    for lm_term, expected in (("sum", 12.0), ("mean", 3.0)):
        loss, metrics = oracle.loss_and_metrics(Namespace(alpha=0.25, lm_term=lm_term), *inputs)
        assert loss.item() == pytest.approx(0.75 * math.log(2) + 0.25 * expected)
        assert metrics["loss/bradley_terry"].item() == pytest.approx(math.log(2))


def test_rewards_stay_with_their_pairs_when_rows_are_dropped(tmp_path, process_group):
    """Rows too long for the policy or for an Oracle (NaN) leave. Each of the others keeps its own reward."""
    rows, data, scores = toy.make_pairs(30, 5), tmp_path / "pairs.jsonl", tmp_path / "rewards.pt"
    toy.write_jsonl(data, rows)
    sha256 = hashlib.sha256(data.read_bytes()).hexdigest()
    chosen = torch.arange(30.0)[None].repeat(2, 1)
    chosen[1, 7] = math.nan
    torch.save({"chosen": chosen, "rejected": -chosen, "data_sha256": sha256, "oracles": ["a", "b"]}, scores)
    tokenizer = toy.make_tokenizer()
    length = lambda row: 2 + max(len((row["prompt"] + row[key]).split()) for key in ("chosen", "rejected"))
    limit = sorted(map(length, rows))[20]
    args = Namespace(loss="drdo", max_length=limit)
    pairs, rewards = align.load_split(str(data), scores, tokenizer, args)
    kept = [i for i, row in enumerate(rows) if length(row) <= limit and i != 7]
    assert 15 < len(kept) < 30 and rewards.shape == (2, len(kept), 2)
    assert rewards[1, :, 0].tolist() == kept and rewards[0, :, 1].tolist() == [-i for i in kept]
    assert [tokenizer.decode(pair[1][:-1]) for pair in pairs] == [rows[i]["chosen"].strip() for i in kept]
    first = align.load_split(str(data), scores, tokenizer, args, limit=10)[1]
    assert first[1, :, 0].tolist() == [i for i in kept if i < 10]


def test_the_log_leaves_out_what_no_pair_has(tmp_path, process_group):
    window = [{"loss": torch.tensor([loss]), "oracle": torch.tensor([math.nan])} for loss in (1.0, 3.0)]
    align.log(Namespace(out=str(tmp_path)), 1, window, prefix="eval_", epoch=0.5)
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 1, "eval_loss": 2.0, "epoch": 0.5}


def test_the_models_own_decoding_settings_do_not_leak_into_the_sampling(tmp_path):
    tokenizer = toy.make_tokenizer()
    model = toy.make_model(tokenizer, seed=0, steps=0)
    prompts = [align.encode_prompt(tokenizer, row["prompt"]) for row in toy.make_pairs(4, 6)]
    outputs = []
    for penalty in (1.0, 5.0):
        model.generation_config.repetition_penalty = penalty
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        _, loaded, ends = generate.load_model(tmp_path, torch.device("cpu"), "fp32")
        assert ends == {tokenizer.eos_token_id}
        outputs.append(generate.generate(loaded, prompts, 0.0, 0.8, 20, ends))
    assert outputs[0] == outputs[1]
    text, prompt = outputs[0][0][0], prompts[0]
    greedy = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0].tolist()
    assert greedy[len(prompt):len(prompt + text)] != text  # with the penalty the text is another


@pytest.mark.parametrize("top_p", [0.3, 0.8])
def test_sampling_is_top_p_at_a_temperature(tmp_path, top_p):
    """First tokens of 4000 samples against the nucleus worked out from the model's own logits."""
    tokenizer = toy.make_tokenizer()
    model = toy.make_model(tokenizer, seed=1, steps=0).eval()
    model.lm_head.weight.data *= 2  # far from uniform
    prompt = align.encode_prompt(tokenizer, toy.make_pairs(1, 7)[0]["prompt"])
    probabilities = (model(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    ordered, tokens = probabilities.sort(descending=True)
    size = int((ordered.cumsum(0) < top_p).sum()) + 1  # the fewest that hold top_p
    nucleus = {token.item(): (p / ordered[:size].sum()).item() for token, p in zip(tokens[:size], ordered)}
    model.generation_config.eos_token_id = None
    torch.manual_seed(0)
    results = generate.generate(model, [prompt] * 4000, 0.7, top_p, 1, {tokenizer.eos_token_id})
    first = [ids[0] if ids else tokenizer.eos_token_id for ids, _ in results]
    assert set(first) <= set(nucleus) and len(nucleus) > 1
    for token, p in nucleus.items():
        assert abs(first.count(token) / 4000 - p) < 5 * math.sqrt(p * (1 - p) / 4000) + 1e-9
