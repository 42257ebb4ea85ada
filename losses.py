"""The maths of nanoDRDO: Eq. 2-6 of DRDO (Direct Reward Distillation and policy-Optimization, arXiv 2410.08458) and
the two readouts of a causal LM's last hidden state that they need, a response's log-prob and its reward.

Plain functions of tensors. Copy this file into your project: it needs torch alone.

    logps = response_logps(hidden, lm_head, input_ids, segments)  # (B, 2)
    rewards = last_token_rewards(hidden, score_weight, last)      # (B, 2)
    loss = drdo_loss(*logps.unbind(1), *rewards.unbind(1), oracle_chosen, oracle_rejected).mean()

Notation: x a prompt, y_w / y_l its chosen / rejected response, z = log pi(y|x) the *sum* of the log-probs of the
response's tokens, EOS included (so z <= 0), sigma the logistic function. A loss takes and returns one number per pair,
shape (B,), and e-DPO's rewards as (K, B); reduction is the caller's. Shapes are not checked: (B, 1) beside (B,) would
broadcast. Half precision is computed in fp32; losses and gradients are finite for inputs up to 1e15 in size.
"""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def upcast(*tensors):
    """The tensors in fp32, those in fp64 unchanged: summed log-probs of -1000 mean nothing in bf16."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


# ---- losses -----------------------------------------------------------------------------------------------------


def oracle_loss(chosen_rewards, rejected_rewards, chosen_logps, alpha=0.01):
    """Eq. 5, the Oracle: Bradley-Terry on its rewards and, weighed by alpha, the likelihood of the chosen response.

    -[(1 - alpha) log sigma(r(x, y_w) - r(x, y_l)) + alpha log pi(y_w|x)]

    alpha = 0 is Eq. 2, the plain reward model (Bradley & Terry 1952), a member of e-DPO's ensemble; chosen_logps is
    then not read. The second term is the SFT regulariser of GRM (Yang et al. 2024, arXiv 2406.10216).

    Args: chosen_rewards, rejected_rewards, chosen_logps: (B,).  Returns: (B,).
    """
    chosen_rewards, rejected_rewards = upcast(chosen_rewards, rejected_rewards)
    bradley_terry = -F.logsigmoid(chosen_rewards - rejected_rewards)
    if alpha == 0:
        return bradley_terry
    (chosen_logps,) = upcast(chosen_logps)
    return (1 - alpha) * bradley_terry - alpha * chosen_logps


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
    """Eq. 3, DPO (Rafailov et al. 2023, arXiv 2305.18290): -log sigma(beta [(z_w - z_l) - (z_w - z_l of pi_ref)]).

    Args: log pi(y|x) of the policy and of the reference, each (B,).  Returns: (B,).
    """
    chosen_logps, rejected_logps = upcast(chosen_logps, rejected_logps)
    ref_chosen_logps, ref_rejected_logps = upcast(ref_chosen_logps, ref_rejected_logps)
    log_ratio = (chosen_logps - rejected_logps) - (ref_chosen_logps - ref_rejected_logps)
    return -F.logsigmoid(beta * log_ratio)


def edpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps,
              oracle_chosen_rewards, oracle_rejected_rewards, beta=0.1, ensemble="mean"):
    """Eq. 4, e-DPO (Fisch et al. 2024, arXiv 2405.19316): DPO's implicit reward difference regressed on K reward
    models' differences, (r*(x, y_w) - r*(x, y_l) - beta [(z_w - z_l) - (z_w - z_l of pi_ref)])^2.

    ensemble="mean" averages the K squared errors: the gradient of distilling the mean reward. "min" takes, for each
    pair, the reward model that is nearest to the policy (their pessimistic version). At K = 1 the two agree.

    Args: log-probs (B,); oracle rewards (K, B).  Returns: (B,).  Raises ValueError on another `ensemble`.
    """
    if ensemble not in ("mean", "min"):
        raise ValueError(f"ensemble={ensemble!r}: it is 'mean' or 'min'")
    chosen_logps, rejected_logps = upcast(chosen_logps, rejected_logps)
    ref_chosen_logps, ref_rejected_logps = upcast(ref_chosen_logps, ref_rejected_logps)
    oracle_chosen_rewards, oracle_rejected_rewards = upcast(oracle_chosen_rewards, oracle_rejected_rewards)
    log_ratio = (chosen_logps - rejected_logps) - (ref_chosen_logps - ref_rejected_logps)
    errors = (oracle_chosen_rewards - oracle_rejected_rewards - beta * log_ratio) ** 2  # (K, B)
    return errors.mean(0) if ensemble == "mean" else errors.amin(0)


def ipo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
    """IPO (Azar et al. 2023, arXiv 2310.12036, Eq. 17): ([(z_w - z_l) - (z_w - z_l of pi_ref)] - 1 / (2 beta))^2.

    Of summed log-probs, as the paper has it (TRL takes means over tokens: a beta does not carry over).

    Args: log pi(y|x) of the policy and of the reference, each (B,).  Returns: (B,).
    """
    chosen_logps, rejected_logps = upcast(chosen_logps, rejected_logps)
    ref_chosen_logps, ref_rejected_logps = upcast(ref_chosen_logps, ref_rejected_logps)
    log_ratio = (chosen_logps - rejected_logps) - (ref_chosen_logps - ref_rejected_logps)
    return (log_ratio - 1 / (2 * beta)) ** 2


def drdo_loss(chosen_logps, rejected_logps, student_chosen_rewards, student_rejected_rewards,
              oracle_chosen_rewards, oracle_rejected_rewards, alpha=0.1, gamma=2.0, preference_logits=None):
    """Eq. 6, DRDO: distil the Oracle's reward difference and learn the preference, without a reference model.

    (r*(x, y_w) - r*(x, y_l) - (r^_w - r^_l))^2  -  alpha (1 - p_w)^gamma log(pi(y_w|x) / (1 - pi(y_l|x)))

    with p_w = sigma(z_w - z_l). The first term is the reward difference (`distillation_loss`), the second the focal
    contrastive log-unlikelihood (`contrastive_loss`), its sign as the paper prints it.

    Args: log-probs, the policy's own reward estimates r^ and the Oracle's rewards r*, each (B,); preference_logits as in
    `contrastive_loss`.  Returns: (B,).
    """
    distillation = distillation_loss(student_chosen_rewards, student_rejected_rewards,
                                     oracle_chosen_rewards, oracle_rejected_rewards)
    return distillation + alpha * contrastive_loss(chosen_logps, rejected_logps, gamma, preference_logits)


def distillation_loss(student_chosen_rewards, student_rejected_rewards,
                      oracle_chosen_rewards, oracle_rejected_rewards):
    """Eq. 6, first term: (r*(x, y_w) - r*(x, y_l) - (r^_w - r^_l))^2.  Args: (B,) each.  Returns: (B,)."""
    student_chosen_rewards, student_rejected_rewards = upcast(student_chosen_rewards, student_rejected_rewards)
    oracle_chosen_rewards, oracle_rejected_rewards = upcast(oracle_chosen_rewards, oracle_rejected_rewards)
    student_margins = student_chosen_rewards - student_rejected_rewards
    return (oracle_chosen_rewards - oracle_rejected_rewards - student_margins) ** 2


def contrastive_loss(chosen_logps, rejected_logps, gamma=2.0, preference_logits=None):
    """Eq. 6, second term without alpha: -(1 - p_w)^gamma log(pi(y_w|x) / (1 - pi(y_l|x))), p_w = sigma(z_w - z_l).

    Args: summed log-probs (B,); preference_logits (B,), to be read in place of z_w - z_l inside
    sigma: the difference of mean log-probs, or a detached one.  Returns: (B,).
    """
    chosen_logps, rejected_logps = upcast(chosen_logps, rejected_logps)
    if preference_logits is None:
        preference_logits = chosen_logps - rejected_logps
    # 1 - p_w = sigma(-logits); as exp(gamma log .) its gradient is finite where pow's is 0 * inf
    focal = torch.exp(gamma * F.logsigmoid(-upcast(preference_logits)[0]))
    return -focal * (chosen_logps - log1mexp(rejected_logps))


def log1mexp(x):
    """log(1 - e^x) for a log-probability x <= 0, any shape (Maechler 2012, "Accurately Computing log(1 - exp(-|a|))").

    1 - e^x is taken to be at least the dtype's epsilon (fp32: 1.2e-7), so at x = 0 the value is about -16 and not -inf;
    the gradient is at most 1 / epsilon, and zero where the bound acts.
    """
    (x,) = upcast(x)
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near_zero = x > -0.6931  # log 2. Each branch gets an argument safe for it: where() alone would pass on a NaN gradient
    return torch.where(near_zero, torch.log(-torch.expm1(x.clamp(min=-0.6931))), torch.log1p(-torch.exp(x.clamp(max=-0.6931))))


# ---- readouts of the last hidden state --------------------------------------------------------------------------


def response_logps(hidden, lm_head, input_ids, segments, num_responses=2, max_logits=2**26):
    """log pi(y|x) of the responses in a batch of rows: the sum of the log-probs of each response's tokens.

    A row is a prompt without its last token, then one segment a response. A segment is a copy of the prompt's last
    token, then the response. So the hidden state on the left of a token predicts it, also at a response's first
    token. The copies themselves are not scored.

    Only positions that predict a response token meet the vocabulary. Where that makes more than `max_logits`
    logits (2^26: 256 MiB in fp32), they are made in chunks, and made again in the backward pass. Memory then does
    not grow with tokens x vocabulary.

    Args:
        hidden: (B, T, H), the last hidden states, after the final norm.
        lm_head: the Linear from H to V.
        input_ids: (B, T).
        segments: (B, T), 0 in the prompt, 1 in the first response's segment, 2 in the second's, -1 in padding.
    Returns: (B, num_responses), fp32 at least; 0 where a row has no such response.
    """
    scored = (segments[:, 1:] > 0) & (segments[:, 1:] <= num_responses) & (segments[:, 1:] == segments[:, :-1])
    row, column = scored.nonzero(as_tuple=True)  # (N,) each; column is the left neighbour's position
    states, tokens = hidden[row, column], input_ids[row, column + 1]  # (N, H), (N,)
    chunk = max(1, max_logits // lm_head.weight.shape[0])
    if len(tokens) <= chunk:
        logps = token_logps(states, lm_head, tokens)  # (N,)
    else:
        logps = torch.cat([checkpoint(token_logps, s, lm_head, t, use_reentrant=False)
                           for s, t in zip(states.split(chunk), tokens.split(chunk))])
    sums = logps.new_zeros(len(segments), num_responses)
    return sums.index_put((row, segments[row, column] - 1), logps, accumulate=True)


def token_logps(states, lm_head, tokens):
    """log pi(token): hidden states (N, H) that predict `tokens` (N,) -> (N,), fp32 at least."""
    (logits,) = upcast(lm_head(states))  # (N, V)
    return logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)


def last_token_rewards(hidden, score_weight, last):
    """r(x, y): the linear reward head at the last response token, which is EOS.

    Args: hidden (B, T, H); score_weight (1, H); last (B, R), the position of each response's EOS.
    Returns: (B, R), fp32 at least.
    """
    states = hidden[torch.arange(len(last), device=last.device)[:, None], last]  # (B, R, H)
    states, score_weight = upcast(states, score_weight)
    return (states @ score_weight.T).squeeze(-1)
