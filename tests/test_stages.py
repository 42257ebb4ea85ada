"""The stages' functions one by one: the pairs of each step, their rewards, the log."""
import json
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import save_rewards
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (AutoModelForCausalLM, AutoTokenizer, Gemma3Config, LlamaConfig, OPTConfig,
                          OPTForCausalLM, PreTrainedTokenizerFast)

import align
import oracle
import sft
import toy

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
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    lm = Namespace(config=LlamaConfig())
    oracle.set_pad_token(tokenizer, lm)
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert lm.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    text = "wow! great!!! ünïcode, 漢字"
    assert tokenizer.pad_token_id not in tokenizer(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_what_a_killed_run_left_of_a_file_goes(tmp_path, process_group):
    tokenizer = toy.make_tokenizer()
    lm = toy.make_model(tokenizer, seed=0, steps=0)
    for stage, model in (sft, lm), (oracle, lm), (align, align.PairModel(lm)):
        (tmp_path / ".tmp9eMLBd").write_bytes(b"half a model")
        stage.save_model(model, tokenizer, str(tmp_path))
        assert (tmp_path / "model.safetensors").exists() and not list(tmp_path.glob(".tmp*"))


def test_training_drops_nothing_out_and_moves_every_embedding(tmp_path):
    """OPT's dropout is 0.5 here, and its pad token, whose embedding would stand still, is EOS too."""
    tokenizer = toy.make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    eos = tokenizer.eos_token_id
    OPTForCausalLM(OPTConfig(
        vocab_size=len(tokenizer), hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=2, ffn_dim=32,
        num_attention_heads=2, max_position_embeddings=64, dropout=0.5, pad_token_id=eos, eos_token_id=eos,
        tie_word_embeddings=False)).save_pretrained(tmp_path)
    _, lm = align.load_model(tmp_path, torch.device("cpu"))
    ids = torch.tensor([[1, eos, 9, eos]])
    first = lm(ids, labels=ids)
    again = lm(ids, labels=ids)
    first.loss.backward()
    assert lm.training and torch.equal(first.logits, again.logits)
    assert lm.get_input_embeddings().weight.grad[eos].any()


def test_noise_and_positions_of_a_text_model_inside_another_are_found(tmp_path, process_group, capsys):
    """Gemma-3 keeps those of its text model in config.text_config."""
    tokenizer = toy.make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    small = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1)
    text = small | dict(vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=8, attention_dropout=0.5,
                        max_position_embeddings=20)
    config = Gemma3Config(text_config=text, vision_config=small | dict(image_size=28, patch_size=14))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    _, lm = align.load_model(tmp_path, torch.device("cpu"))
    assert lm.config.get_text_config().attention_dropout == 0
    toy.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "chosen": " b" * n} for n in (3, 30)])
    align.Rows(str(tmp_path / "rows.jsonl"), ["chosen"], tokenizer, lm, 1024)
    assert "1 rows, 1 over --max_length 20 dropped" in capsys.readouterr().out


@pytest.mark.parametrize("save_model", [align.save_model, oracle.save_model, sft.save_model])
def test_one_weight_that_is_not_finite_is_not_saved(save_model, tmp_path, process_group, capsys):
    tokenizer = toy.make_tokenizer()
    lm = toy.make_model(tokenizer, seed=0, steps=0)
    lm.model.norm.weight.data[3] = math.nan
    with pytest.raises(SystemExit, match="2"):
        save_model(align.PairModel(lm) if save_model is align.save_model else lm, tokenizer, tmp_path)
    assert "weights are not finite" in capsys.readouterr().err and not any(tmp_path.iterdir())


def plan(row_tokens, **changes):
    flags = dict(batch_size=8, micro_batch_size=None, warmup_steps=None, max_steps=12, epochs=None,
                 data="x.jsonl", seed=3, processes=1)
    args = Namespace(**flags | changes)
    return align.plan_steps(row_tokens, args), args


def test_steps_are_a_permutation_an_epoch_and_differ_by_seed(process_group):
    row_tokens = np.arange(50)[::-1].copy()
    steps, args = plan(row_tokens)
    assert steps.shape == (12, 8) and args.micro_batch_size == 8 and args.warmup_steps == 1
    for epoch in (steps[:6], steps[6:]):
        assert len(set(epoch.ravel())) == 48
        assert (np.diff(row_tokens[epoch]) <= 0).all()  # the longest first
    assert set(steps[0]) != set(steps[6])
    assert set(steps[0]) != set(plan(row_tokens, seed=4)[0][0])
    assert (plan(row_tokens, max_steps=5)[0] == steps[:5]).all()


def test_batches_and_warm_up_suit_the_run(process_group):
    """The micro-batch divides any --batch_size. A short run warms up for a tenth. Without --max_steps and
    --epochs a run takes 3 epochs, at most 1000 steps."""
    for batch_size, micro in ((64, 8), (10, 5), (7, 7), (11, 1), (6, 6)):
        assert plan(np.arange(99), batch_size=batch_size)[1].micro_batch_size == micro
    assert plan(np.arange(99), batch_size=12, processes=4)[1].micro_batch_size == 3
    steps, args = plan(np.arange(234), batch_size=64, max_steps=None, epochs=1)
    assert len(steps) == 3 and args.warmup_steps == 0
    for epochs, num_steps in ((0.1, 1), (0.7, 2), (2.5, 10), (None, 12), (300, 1200)):
        assert len(plan(np.arange(128), batch_size=32, max_steps=None, epochs=epochs)[0]) == num_steps
    assert len(plan(np.arange(3000), batch_size=8, max_steps=None)[0]) == 1000
    assert plan(np.arange(99), max_steps=5000, epochs=1)[1].warmup_steps == 100


def test_equal_rewards_are_no_win():
    equal = torch.tensor([[-4.0, -4.0]])
    _, metrics = oracle.loss_and_metrics(Namespace(alpha=0), equal, equal, torch.tensor([2]))
    assert metrics["rewards/accuracies"].item() == 0
    args = Namespace(loss="dpo", beta=0.1, label_smoothing=0.0, nll_coef=0.0)
    _, metrics = align.loss_and_metrics(args, equal, equal, equal, equal[None], torch.tensor([[2, 2]]))
    assert metrics["rewards/accuracies"].item() == 0


@pytest.fixture
def split(tmp_path, process_group):
    """load_split of 30 pairs and the rewards of two Oracles: row i has i and -i; the second lacks row 7."""
    rows = toy.make_pairs(30, 5)
    data, scores = tmp_path / "pairs.jsonl", tmp_path / "rewards.pt"
    toy.write_jsonl(data, rows)
    rewards = torch.arange(30.0)[:, None] * torch.tensor([1.0, -1.0])  # (N, 2)
    rewards = rewards.repeat(2, 1, 1)
    rewards[1, 7, 0] = math.nan
    save_rewards(scores, data, rewards)
    tokenizer = toy.make_tokenizer()
    end = Namespace(eos_token_id=[tokenizer.eos_token_id])
    lm = Namespace(config=LlamaConfig(), generation_config=end)
    return rows, lambda args, limit=0: align.load_split(str(data), scores, tokenizer, lm, args, limit)


def test_rewards_stay_with_their_pairs_when_rows_are_dropped(split):
    """Rows too long for the policy or for an Oracle (NaN) leave. Each of the others keeps its own reward."""
    rows, load = split
    lengths = [2 + max(len((row["prompt"] + row[key]).split()) for key in ("chosen", "rejected"))
               for row in rows]
    args = Namespace(loss="drdo", max_length=sorted(lengths)[20])
    pairs, rewards = load(args)
    kept = [i for i, length in enumerate(lengths) if length <= args.max_length and i != 7]
    assert 15 < len(kept) < 30 and len(pairs) == len(kept) and rewards.shape == (2, len(kept), 2)
    assert rewards[1, :, 0].tolist() == kept and rewards[0, :, 1].tolist() == [-i for i in kept]
    assert (pairs.lines - 1).tolist() == kept
    tokenizer = toy.make_tokenizer()
    texts = [tuple(tokenizer.decode(part, skip_special_tokens=True) for part in pair) for pair in pairs]
    keys = "prompt", "chosen", "rejected"
    assert texts == [tuple(" ".join(rows[i][key].split()) for key in keys) for i in kept]
    assert pairs.lengths.tolist() == [[len(part) for part in pair] for pair in pairs]
    first = load(args, limit=10)[1]
    assert first[1, :, 0].tolist() == [i for i in kept if i < 10]


def test_held_out_rewards_are_of_the_same_oracles(split, capsys):
    _, load = split
    load(Namespace(loss="edpo", max_length=99, oracles=["a", "b"]))
    with pytest.raises(SystemExit):
        load(Namespace(loss="edpo", max_length=99, oracles=["a", "c"]))
    assert "['a', 'c'] scored --data, and ['a', 'b'] this" in capsys.readouterr().err


def test_the_log_leaves_out_what_no_pair_has(tmp_path, process_group):
    window = [{"loss": torch.tensor([loss]), "oracle": torch.tensor([math.nan])} for loss in (1.0, 3.0)]
    align.log(Namespace(out=str(tmp_path)), 1, window, prefix="eval_", epoch=0.5)
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 1, "eval_loss": 2.0, "epoch": 0.5}
