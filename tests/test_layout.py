"""A pair scores the same in any batch, with padding and in the one-row layout as in the model's own forward
on prompt + response alone. The models compute in fp64."""
from argparse import Namespace

import numpy as np
import pytest
import torch
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, GPTNeoXConfig,
                          LlamaConfig, OPTConfig, Phi3Config)

import align
import losses
import precompute_rewards
import sft

SHAPE = dict(vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=64, pad_token_id=1)
CONFIGS = {
    "opt": OPTConfig(**SHAPE, ffn_dim=32, word_embed_proj_dim=8, dropout=0.0),
    "llama": LlamaConfig(**SHAPE, intermediate_size=32, num_key_value_heads=2),
    "phi3": Phi3Config(**SHAPE, intermediate_size=32, eos_token_id=2, bos_token_id=3, sliding_window=47),
    "gpt_neox": GPTNeoXConfig(**SHAPE, intermediate_size=32),
}


def random_lm(config):
    """Weights larger than the initialisation, so that attention is far from uniform."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for parameter in lm.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return lm


@pytest.fixture(params=CONFIGS, scope="module")
def models(request, tmp_path_factory):
    """A tiny causal LM with a reward head in fp64, and the same folder read as a sequence classifier."""
    lm = random_lm(CONFIGS[request.param])
    width = lm.get_output_embeddings().weight.shape[1]  # 8 on OPT
    lm.score, lm.config.num_labels = torch.nn.Linear(width, 1, bias=False), 1
    folder = tmp_path_factory.mktemp(request.param)
    lm.save_pretrained(folder)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64)
    return align.PairModel(lm.double(), lm.score), classifier.eval()


def pairs():
    """Pairs of many lengths. A response's last token is a word in others, the pad id a word in some."""
    generator = np.random.default_rng(0)
    lengths = [(9, 5, 12), (1, 1, 1), (20, 3, 2), (4, 15, 15), (12, 1, 9)]
    return [[generator.integers(0, 61, n, dtype=np.int32) for n in row] for row in lengths]


class Rows(list):
    """Pairs as align.Rows holds them."""
    lengths = property(lambda self: np.array([list(map(len, pair)) for pair in self]))


def own_logp(lm, prompt, response):
    """log pi(response|prompt) by the model's own forward, a plain loop over its softmax."""
    ids = torch.as_tensor(np.concatenate([prompt, response]), dtype=torch.long)[None]
    probabilities = lm(ids).logits[0].softmax(-1)
    return sum(probabilities[len(prompt) + i - 1, token].log().item() for i, token in enumerate(response))


def own_reward(classifier, prompt, response):
    """The sequence classifier's own logit; without a pad id it reads the last token."""
    ids = torch.as_tensor(np.concatenate([prompt, response]), dtype=torch.long)[None]
    pad, classifier.config.pad_token_id = classifier.config.pad_token_id, None
    reward = classifier(ids).logits[0, 0].item()
    classifier.config.pad_token_id = pad
    return reward


@torch.no_grad()
def test_a_row_of_two_responses_scores_as_two_rows(models):
    model, classifier = models
    logps, rewards = model(pairs())
    for i, (prompt, *responses) in enumerate(pairs()):
        for j, response in enumerate(responses):
            assert logps[i, j].item() == pytest.approx(own_logp(model.lm, prompt, response), rel=1e-10)
            assert rewards[i, j].item() == pytest.approx(own_reward(classifier, prompt, response), rel=1e-9)


def test_loss_and_gradient_are_the_mean_over_pairs_alone(models):
    model, _ = models

    def drdo(batch):
        logps, rewards = model(batch)
        targets = torch.ones(len(batch)), torch.zeros(len(batch))
        return losses.drdo_loss(*logps.unbind(1), *rewards.unbind(1), *targets, gamma=0.0)[0]

    together = drdo(pairs())
    alone = torch.cat([drdo([pair]) for pair in pairs()])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(loss.mean(), list(model.lm.parameters())) for loss in (together, alone)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


@torch.no_grad()
def test_unscored_responses_change_nothing(models):
    model, _ = models
    (both, rewards), (chosen, same), (none, also) = (model(pairs(), n) for n in (2, 1, 0))
    torch.testing.assert_close(both[:, :1], chosen)
    assert none.shape == (len(pairs()), 0)
    torch.testing.assert_close(rewards, same)
    torch.testing.assert_close(rewards, also)


@torch.no_grad()
def test_sft_and_scoring_need_no_mask(models, process_group):
    """sft.py and precompute_rewards.py pad right and pass no mask at all."""
    model, classifier = models
    examples = [pair[:2] for pair in pairs()]
    logps = sft.ResponseModel(model.lm)(examples)
    expected = [own_logp(model.lm, *example) for example in examples]
    assert logps.tolist() == pytest.approx(expected, rel=1e-10)
    expected = [own_reward(classifier, *example) for example in examples]
    for batch_size in (1, 2, 5):
        scores = precompute_rewards.score(classifier, examples, batch_size, "")
        assert scores.tolist() == pytest.approx(expected, rel=1e-5)


def refusal(lm, rows, capsys):
    with pytest.raises(SystemExit) as exit:
        align.check_layout(lm, rows, Namespace(model="folder"))
    return exit.value.code == 2 and "in the row of a pair" in capsys.readouterr().err


def test_a_model_that_ignores_the_mask_is_refused(models, capsys, monkeypatch):
    lm, rows = models[0].lm, Rows(pairs()[3:4])
    align.check_layout(lm, rows, Namespace(model="folder"))  # as it should be
    plain = lm.base_model.forward
    monkeypatch.setattr(lm.base_model, "forward",
                        lambda *ids, **inputs: plain(*ids, **inputs | {"attention_mask": None}))
    assert refusal(lm, rows, capsys)


@pytest.mark.parametrize("chosen, rejected", [(30, 5), (5, 30)])
def test_a_window_shorter_than_a_pair_is_refused(chosen, rejected, capsys):
    config = Phi3Config(**SHAPE, intermediate_size=32, eos_token_id=2, bos_token_id=3, sliding_window=20)
    rows = Rows([[np.arange(n, dtype=np.int32) for n in (10, chosen, rejected)]])
    assert refusal(random_lm(config).double(), rows, capsys)
