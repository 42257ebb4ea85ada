"""The maths of nanoDRDO: Eq. 2-6 of DRDO (Direct Reward Distillation and policy-Optimization, arXiv
2410.08458), IPO, and the two readouts of a causal LM's last hidden state: log-prob and reward of a response.

Plain functions of tensors. Copy this file into your project: it needs torch alone.

    logps = response_logps(hidden, lm_head, input_ids, segments)  # (B, 2)
    rewards = last_token_rewards(hidden, score_weight, ends)      # (B, 2)
    loss, _, _ = drdo_loss(*logps.unbind(1), *rewards.unbind(1), oracle_chosen, oracle_rejected)  # (B,)

Notation: x is a prompt, y_w / y_l its chosen / rejected response. z = log pi(y|x) is the *sum* of the
log-probs of the response's tokens, EOS included. r* is the Oracle's reward, r^ (r hat) the policy's own.
p_w = sigma(z_w - z_l), sigma the logistic function.

Each loss takes and returns tensors of shape (B,), one number a pair; e-DPO's Oracle rewards alone are (K, B).
Call .mean() on it. Shapes are not checked: (B, 1) beside (B,) would broadcast. Half precision is computed in
fp32. Losses and gradients are finite for inputs up to 1e15 in magnitude.
"""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def upcast(x):
    """x in fp32, or in fp64 as it was: summed log-probs of -1000 mean nothing in bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- losses ------------------------------------------------------------------------------------------------

def oracle_loss(chosen_rewards, rejected_rewards, chosen_logps, alpha=0.01):
    """Eq. 5, the Oracle: Bradley-Terry on its rewards and, weighed by alpha, the likelihood of y_w.

    -[(1 - alpha) log sigma(r(x, y_w) - r(x, y_l)) + alpha log pi(y_w|x)]

    alpha = 0 is Eq. 2, the plain reward model (Bradley & Terry 1952): a member of e-DPO's ensemble. It does
    not read chosen_logps. The second term is the SFT regulariser of GRM (Yang et al. 2024, arXiv 2406.10216).
    All tensors are (B,).
    """
    bradley_terry = -F.logsigmoid(upcast(chosen_rewards) - upcast(rejected_rewards))
    if alpha == 0:
        return bradley_terry
    return (1 - alpha) * bradley_terry - alpha * upcast(chosen_logps)


def log_ratio(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps):
    """z_w - z_l of the policy minus z_w - z_l of the reference. All are (B,)."""
    policy = upcast(chosen_logps) - upcast(rejected_logps)
    return policy - (upcast(ref_chosen_logps) - upcast(ref_rejected_logps))


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1,
             label_smoothing=0.0):
    """Eq. 3, DPO (Rafailov et al. 2023, arXiv 2305.18290): -log sigma(h), h = beta * log ratio. All are (B,).

    With label_smoothing epsilon, in [0, 0.5), conservative DPO (Mitchell 2023), for labels of which a share
    epsilon is wrong: -(1 - epsilon) log sigma(h) - epsilon log sigma(-h). It is least at a finite h.
    """
    h = beta * log_ratio(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def robust_dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1,
                    label_smoothing=0.1):
    """Robust DPO (Chowdhury et al. 2024, arXiv 2403.00409, Eq. 12). All are (B,).

    -[(1 - epsilon) log sigma(h) - epsilon log sigma(-h)] / (1 - 2 epsilon), h as in `dpo_loss`

    label_smoothing is epsilon, the share of wrong labels, in [0, 0.5). The loss's mean over such labels is
    DPO's over right ones. It has no lower bound: its slope in h stays below -epsilon / (1 - 2 epsilon).
    """
    h = beta * log_ratio(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    loss = -(1 - label_smoothing) * F.logsigmoid(h) + label_smoothing * F.logsigmoid(-h)
    return loss / (1 - 2 * label_smoothing)


def edpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps,
              oracle_chosen_rewards, oracle_rejected_rewards, beta=0.1, ensemble="mean"):
    """Eq. 4, e-DPO (Fisch et al. 2024, arXiv 2405.19316): distils the reward differences of K reward models.

    (r*(x, y_w) - r*(x, y_l) - beta * log ratio)^2

    ensemble="mean" averages the K squared errors. Its gradient is that of distilling the mean reward. "min"
    takes, for each pair, the reward model nearest to the policy (their pessimistic version). With K = 1 it is
    REBEL (Gao et al. 2024, arXiv 2404.16767, Eq. 9; their eta is 1 / beta) on pairs that are given.
    Log-probs are (B,), Oracle rewards (K, B), the loss (B,). Raises ValueError on another `ensemble`.
    """
    if ensemble not in ("mean", "min"):
        raise ValueError(f"ensemble={ensemble!r}: it is 'mean' or 'min'")
    ratio = log_ratio(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    errors = (upcast(oracle_chosen_rewards) - upcast(oracle_rejected_rewards) - beta * ratio) ** 2  # (K, B)
    return errors.mean(0) if ensemble == "mean" else errors.amin(0)


def ipo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
    """IPO (Azar et al. 2023, arXiv 2310.12036, Eq. 17): (log ratio - 1 / (2 beta))^2.

    Log-probs are summed, as in the paper. TRL takes means over tokens, so a beta does not carry over.
    All are (B,).
    """
    ratio = log_ratio(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return (ratio - 1 / (2 * beta)) ** 2


def drdo_loss(chosen_logps, rejected_logps, student_chosen_rewards, student_rejected_rewards,
              oracle_chosen_rewards, oracle_rejected_rewards, alpha=0.1, gamma=2.0, preference_logits=None):
    """Eq. 6, DRDO: distil the Oracle's reward difference and learn the preference, without a reference model.

    (r*(x, y_w) - r*(x, y_l) - (r^_w - r^_l))^2  -  alpha (1 - p_w)^gamma log(pi(y_w|x) / (1 - pi(y_l|x)))

    The first term is `distillation_loss`, the reward difference. The second is `contrastive_loss`, the focal
    contrastive log-unlikelihood, with the paper's sign. Were the focal factor (1 - p_w)^gamma a constant, the
    term would slightly raise pi(y_l|x), despite its name: its gradient in z_l is about -pi(y_l|x), nearly 0.
    Only the gradient through the factor lowers pi(y_l|x).

    All are (B,); preference_logits as in `contrastive_loss`.
    Returns: the loss, then its two terms, (B,) each. The loss is the sum of the terms.
    """
    distillation = distillation_loss(student_chosen_rewards, student_rejected_rewards,
                                     oracle_chosen_rewards, oracle_rejected_rewards)
    contrastive = alpha * contrastive_loss(chosen_logps, rejected_logps, gamma, preference_logits)
    return distillation + contrastive, distillation, contrastive


def distillation_loss(student_chosen_rewards, student_rejected_rewards,
                      oracle_chosen_rewards, oracle_rejected_rewards):
    """Eq. 6, first term: (r*(x, y_w) - r*(x, y_l) - (r^_w - r^_l))^2. All are (B,)."""
    oracle = upcast(oracle_chosen_rewards) - upcast(oracle_rejected_rewards)
    student = upcast(student_chosen_rewards) - upcast(student_rejected_rewards)
    return (oracle - student) ** 2


def contrastive_loss(chosen_logps, rejected_logps, gamma=2.0, preference_logits=None):
    """Eq. 6, second term without alpha: -(1 - p_w)^gamma log(pi(y_w|x) / (1 - pi(y_l|x))).

    (1 - p_w)^gamma is near 0 where pi already prefers y_w. p_w = sigma(preference_logits), which by default
    are z_w - z_l. Pass a difference of mean log-probs to use those in p_w, or a detached one to stop the
    gradient through it. Summed log-probs differ by many nats, mostly by length. So p_w is near 0 or 1 for
    most pairs from step 1 on, and its mean is about the share of pairs whose chosen response is the likelier
    one, often the shorter. All are (B,).
    """
    chosen_logps, rejected_logps = upcast(chosen_logps), upcast(rejected_logps)
    if preference_logits is None:
        preference_logits = chosen_logps - rejected_logps
    # 1 - p_w = sigma(-logits). As exp(gamma log .) its gradient is finite where that of pow is 0 * inf
    focal = torch.exp(gamma * F.logsigmoid(-upcast(preference_logits)))
    return -focal * (chosen_logps - log1mexp(rejected_logps))


def log1mexp(x):
    """log(1 - e^x) for a log-prob x <= 0, any shape (Maechler 2012, "Accurately Computing log(1-exp(-|a|))").

    1 - e^x is at least the dtype's epsilon here (fp32: 1.2e-7). So the value at x = 0 is about -16 and not
    -inf. The gradient is at most 1 / epsilon in size, and zero where the bound acts.
    """
    x = upcast(x)
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    # each branch gets an argument that is safe for it: where() would pass on a NaN gradient of the other
    near_zero = torch.log(-torch.expm1(x.clamp(min=-0.6931)))  # -log 2
    far = torch.log1p(-torch.exp(x.clamp(max=-0.6931)))
    return torch.where(x > -0.6931, near_zero, far)


# ---- readouts of the last hidden state ---------------------------------------------------------------------

def response_logps(hidden, lm_head, input_ids, segments, num_responses=2, max_logits=2**26):
    """log pi(y|x) of the responses in a batch of rows: the sum of the log-probs of each response's tokens.

    A row is prompt[:-1], then a segment for each response: prompt[-1] again, and the response. The copy of
    prompt[-1] predicts the response's first token. It is not scored itself. `hidden` must come from a forward
    pass in which a response sees the prompt and itself alone, and a copy has the position of what it copies:
    see collate and pair_mask in align.py. With one response a row is an ordinary one: a causal mask will do.

    lm_head is applied only at columns that predict a response token. More than `max_logits` logits (2^26: 256
    MiB in fp32) are made in chunks, and again in the backward pass: memory does not grow with their number.

    Args:
        hidden: (B, T, H), the last hidden states, after the final norm.
        lm_head: the Linear from H to V.
        input_ids: (B, T).
        segments: (B, T), 0 in the prompt, 1 in the first response's segment, 2 in the second's, -1: padding.
    Returns: (B, num_responses), fp32 at least; 0 where a row has no such response.
    """
    left, right = segments[:, :-1], segments[:, 1:]
    scored = (right > 0) & (right <= num_responses) & (right == left)  # no copy: its left is another segment
    row, column = scored.nonzero(as_tuple=True)  # (N,) each, column the left neighbour's
    states, tokens = hidden[row, column], input_ids[row, column + 1]  # (N, H), (N,)
    chunk = max(1, max_logits // lm_head.weight.shape[0])
    if len(tokens) <= chunk:
        logps = token_logps(states, lm_head, tokens)  # (N,)
    else:
        logps = torch.cat([checkpoint(token_logps, s, lm_head, t, use_reentrant=False)
                           for s, t in zip(states.split(chunk), tokens.split(chunk))])
    sums = logps.new_zeros(len(segments), num_responses)
    return sums.index_put((row, segments[row, column] - 1), logps, accumulate=True)  # segment 1: column 0


def token_logps(states, lm_head, tokens):
    """log pi(token): hidden states (N, H) that predict `tokens` (N,) -> (N,), fp32 at least."""
    logits = upcast(lm_head(states))  # (N, V)
    return logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)


def last_token_rewards(hidden, score_weight, ends):
    """r(x, y): the linear reward head at the last response token, which is EOS.

    Args: hidden (B, T, H); score_weight (1, H); ends (B, R), the column of each response's EOS in the row.
    Returns: (B, R), fp32 at least.
    """
    states = hidden[torch.arange(len(ends), device=ends.device)[:, None], ends]  # (B, R, H)
    return (upcast(states) @ upcast(score_weight).T).squeeze(-1)
