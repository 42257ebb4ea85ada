"""The paper's proposition and lemmas on tabular policies: gradient descent shows where each loss leads.

A policy is a softmax over five whole responses. y_w and y_l were compared, the others never were ("unseen").
"""
import math

import pytest
import torch

from losses import contrastive_loss, dpo_loss, edpo_loss, oracle_loss

W, L = 0, 1  # the compared responses; 2, 3, ... are unseen
REFERENCE = torch.tensor([0.15, 0.25, 0.35, 0.20, 0.05], dtype=torch.float64).log()


def descend(loss_of, steps, learning_rate=0.1, start=REFERENCE):
    """log-probs of the policy after plain gradient descent on its logits; loss_of takes log-probs (5,)."""
    logits = start.clone().requires_grad_()
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss_of(logits.log_softmax(0)), logits)
        logits.data -= learning_rate * gradient
    return logits.detach().log_softmax(0)


def dpo(z, w=W, l=L, beta=0.1):
    return dpo_loss(z[w], z[l], REFERENCE[w], REFERENCE[l], beta)


def log_ratio(z):
    """log of pi(y_w) pi_ref(y_l) / (pi(y_l) pi_ref(y_w))."""
    return ((z[W] - z[L]) - (REFERENCE[W] - REFERENCE[L])).item()


def test_proposition_1_a_pair_labelled_both_ways_has_no_reward_difference():
    rewards = torch.tensor([3.0, -1.0], dtype=torch.float64, requires_grad=True)
    for _ in range(2000):
        loss = oracle_loss(*rewards, None, alpha=0) + oracle_loss(*rewards.flip(0), None, alpha=0)
        rewards.data -= 0.1 * torch.autograd.grad(loss, rewards)[0]
    assert abs(rewards[0] - rewards[1]).item() < 1e-9
    assert loss.item() / 2 == pytest.approx(math.log(2))  # P(y_w > y_l) = 1/2 is what Bradley-Terry then says


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_lemma_1a_dpo_learns_nothing_from_a_pair_labelled_both_ways(beta):
    """From a policy far from its reference the implicit reward difference goes to 0; beta does not help."""
    start = REFERENCE + torch.tensor([2.0, -1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    z = descend(lambda z: dpo(z, W, L, beta) + dpo(z, L, W, beta), 500, 0.5 / beta**2, start)
    assert abs(log_ratio(z)) < 1e-3


def test_lemma_1b_on_a_certain_label_dpos_ratio_has_no_bound():
    """Where the label is always the same, beta times the log-ratio x follows dx/dt = 2 beta^2 sigma(-x), with
    learning rate 0.1 a step: e^x + x - 1 = 2 beta^2 t, which grows like log t and never settles."""
    beta = 1.0
    for steps in (100, 1000, 4000):
        x = beta * log_ratio(descend(lambda z: dpo(z, beta=beta), steps))
        assert math.exp(x) + x - 1 == pytest.approx(2 * beta**2 * 0.1 * steps, rel=0.02)


def test_lemma_1c_dpo_is_content_with_a_policy_that_never_says_what_was_preferred():
    """pi(y_w) = eps, pi(y_l) = eps^2, the unseen take the rest: DPO's loss goes to its infimum 0 with eps."""
    losses = []
    for eps in (1e-2, 1e-20, 1e-200):
        z = torch.tensor([math.log(eps), 2 * math.log(eps)], dtype=torch.float64)
        losses.append(dpo(z, beta=1.0).item())
    assert losses[0] > 1e-3 > losses[1] > 1e-30 and losses[2] < 1e-150


def test_lemma_1c_what_dpo_takes_from_y_l_goes_to_unseen_responses_too():
    """pi(y_l) -> 0. DPO's gradient names only y_w and y_l: the unseen keep their logits, so they gain too."""
    z = descend(lambda z: dpo(z, beta=1.0), 3000, learning_rate=1.0)
    assert z[L].exp() < 1e-3
    torch.testing.assert_close(z[2:] - z[2], REFERENCE[2:] - REFERENCE[2])
    assert z[2:].logsumexp(0).exp() > 0.01


def test_lemma_2_edpo_goes_where_overestimated_rewards_send_it():
    """The minimiser's log-ratio is the reward difference / beta: finite for a finite difference, unbounded as
    the estimates grow on finite data. pi(y_l) -> 0, while pi(y_w) stays below 1."""
    ratios, probabilities = [], []
    for difference in (0.1, 1.0, 3.0):
        rewards = torch.tensor([[difference]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        loss = lambda z: edpo_loss(z[W], z[L], REFERENCE[W], REFERENCE[L], *rewards, beta=0.1).sum()
        z = descend(loss, 500, learning_rate=20.0)
        ratios.append(log_ratio(z))
        probabilities.append((z[L].exp().item(), z[W].exp().item()))
    assert ratios == pytest.approx([1.0, 10.0, 30.0], rel=1e-3)
    assert probabilities[2][0] < 1e-10 and 0 < probabilities[2][1] < 1


@pytest.mark.parametrize("gamma, holds", [(0.0, True), (2.0, False)])
def test_drdos_second_term_keeps_y_w_only_without_the_focal_factor(gamma, holds):
    """On Lemma 1c's policy (pi(y_w) = eps, pi(y_l) = eps^2) 1 - p_w is about eps. With gamma 0 the term grows
    like -log eps: the policy is no minimiser. With gamma > 0 it is eps^gamma log eps and vanishes."""
    eps = torch.tensor([1e-2, 1e-5, 1e-20], dtype=torch.float64)
    loss = contrastive_loss(eps.log(), 2 * eps.log(), gamma)
    assert (loss[0] < loss[1] < loss[2]).item() == holds
    assert (loss[2] < 1e-30).item() != holds


def test_the_focal_factor_leaves_mass_on_unseen_responses():
    """After the same steps on one certain pair, a larger gamma leaves more probability on unseen responses.
    The paper's gamma 2 leaves more than DPO does. Without the focal factor next to none stays."""
    left = lambda loss: descend(loss, 1000, 1.0)[2:].exp().sum().item()
    unseen = [left(lambda z: contrastive_loss(z[W], z[L], gamma)) for gamma in (0, 1, 2, 5)]
    assert unseen == sorted(unseen) and unseen[0] < 0.002 and unseen[3] > 0.4
    assert unseen[0] < left(lambda z: dpo(z, beta=1.0)) < unseen[2]


def test_on_a_pair_labelled_both_ways_drdo_still_learns_both_responses():
    """The paper claims that (1 - p_w)^gamma keeps the update alive at p_w = 1/2. DPO stands still there. DRDO
    moves the mass of the unseen responses to the two that were written, and splits it evenly."""
    both_ways = lambda z: 0.1 * (contrastive_loss(z[W], z[L], 2.0) + contrastive_loss(z[L], z[W], 2.0))
    z = descend(both_ways, 2000, learning_rate=5.0)
    assert z[2:].logsumexp(0).exp() < 0.01
    assert z[:2].exp().tolist() == pytest.approx([0.5, 0.5], abs=0.01)
    still = descend(lambda z: dpo(z, W, L) + dpo(z, L, W), 1000, learning_rate=1.0)
    torch.testing.assert_close(still, REFERENCE, atol=1e-6, rtol=0)


@pytest.mark.parametrize("z_w, ratio", [(-10.0, 10.0), (-100.0, 100.0)])
def test_the_term_that_appendix_a5_drops_is_the_larger_one(z_w, ratio):
    """At p_w = 1/2 and gamma 2 the dropped term (the focal factor's gradient) is |z_w| times the kept one."""
    z = torch.tensor([z_w, z_w], dtype=torch.float64, requires_grad=True)
    whole = torch.autograd.grad(contrastive_loss(z[0], z[1], 2.0), z)[0]
    focal = torch.sigmoid(z[1] - z[0]).detach() ** 2
    kept = torch.autograd.grad(-focal * (z[0] - torch.log1p(-z[1].exp())), z)[0]
    assert ((whole[0] - kept[0]) / kept[0]).item() == pytest.approx(ratio, rel=1e-3)
    # and only the dropped term pushes y_l down: the kept one, as printed, pushes it up by a hair
    assert whole[1] > 0 > kept[1] > -1e-4
