"""losses.py against independent computations: 400-digit decimals, the paper's gradient, plain loops."""
import itertools
from decimal import Decimal, getcontext

import pytest
import torch

import losses

getcontext().prec = 400  # e^-700 is 10^-304
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (chosen_logps, rejected_logps): ordinary pairs, a nearly certain response, long and short ones, equal ones
LOGPS = [(-40, -38.5), (-1e-3, -20), (-3.5, -0.0625), (-700, -250), (-250, -700), (-12, -12), (-0.5, -0.75)]


def log_sigma(x):
    return -(1 + (-x).exp()).ln()


def exact(function):
    """Applies a function of Decimals to the float values as they are."""
    return lambda *values: float(function(*(Decimal(float(value)) for value in values)))


@exact
def exact_drdo(zw, zl, sw, sl, rw, rl, alpha, gamma):
    p_w = 1 / (1 + (zl - zw).exp())
    log_ratio = zw - (1 - zl.exp()).ln()
    return (rw - rl - (sw - sl)) ** 2 - alpha * (1 - p_w) ** gamma * log_ratio


@exact
def exact_oracle(rw, rl, zw, alpha):
    return -((1 - alpha) * log_sigma(rw - rl) + alpha * zw)


@exact
def exact_dpo(zw, zl, ref_w, ref_l, beta):
    return -log_sigma(beta * ((zw - zl) - (ref_w - ref_l)))


@exact
def exact_conservative_dpo(zw, zl, ref_w, ref_l, beta, epsilon):
    h = beta * ((zw - zl) - (ref_w - ref_l))
    return -(1 - epsilon) * log_sigma(h) - epsilon * log_sigma(-h)


@exact
def exact_ipo(zw, zl, ref_w, ref_l, beta):
    return ((zw - zl) - (ref_w - ref_l) - 1 / (2 * beta)) ** 2


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_losses_agree_with_400_digit_arithmetic(dtype, tolerance):
    zw, zl = torch.tensor(LOGPS, dtype=dtype).T
    generator = torch.Generator().manual_seed(0)
    sw, sl, rw, rl, ref_w, ref_l = torch.randn(6, len(LOGPS), generator=generator).to(dtype)
    ref_w, ref_l = zw + ref_w, zl + ref_l

    def check(loss, function, *columns):
        expected = torch.tensor([function(*row) for row in zip(*columns)], dtype=torch.float64)
        torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)

    check(losses.dpo_loss(zw, zl, ref_w, ref_l, beta=0.3), exact_dpo, zw, zl, ref_w, ref_l, [0.3] * len(zw))
    smoothed = losses.dpo_loss(zw, zl, ref_w, ref_l, beta=0.3, label_smoothing=0.2)
    check(smoothed, exact_conservative_dpo, zw, zl, ref_w, ref_l, [0.3] * len(zw), [0.2] * len(zw))
    check(losses.ipo_loss(zw, zl, ref_w, ref_l, beta=0.3), exact_ipo, zw, zl, ref_w, ref_l, [0.3] * len(zw))
    for alpha in (0.0, 0.01, 1.0):
        check(losses.oracle_loss(rw, rl, zw, alpha), exact_oracle, rw, rl, zw, [alpha] * len(zw))
    for gamma in (0.0, 0.5, 2.0, 5.0):
        loss, distillation, contrastive = losses.drdo_loss(zw, zl, sw, sl, rw, rl, alpha=0.1, gamma=gamma)
        torch.testing.assert_close(distillation, (rw - rl - (sw - sl)) ** 2)
        torch.testing.assert_close(distillation + contrastive, loss)
        check(loss, exact_drdo, zw, zl, sw, sl, rw, rl, [0.1] * len(zw), [gamma] * len(zw))


@pytest.mark.parametrize("dtype, smallest, rtol", [(torch.float64, -15, 1e-14), (torch.float32, -6, 3e-7)])
def test_log1mexp(dtype, smallest, rtol):
    x = -torch.logspace(smallest, 1.9, 400, dtype=dtype)
    expected = torch.tensor([float((1 - Decimal(float(v)).exp()).ln()) for v in x], dtype=torch.float64)
    torch.testing.assert_close(losses.log1mexp(x).double(), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_values_and_gradients_are_finite_everywhere(dtype, gamma):
    """Log-probs from 0 to -1e15 (half precision's: -5000) in all combinations, pi(y_l) = 1 among them."""
    edges = [0.0, -1e-30, -1e-9, -1e-7, -1e-4, -0.5, -0.6931, -0.7, -1.0, -20.0, -100.0, -2000.0, -5000.0]
    edges += [-1e8, -1e15] if dtype.itemsize > 2 else []
    zw, zl = torch.tensor(list(itertools.product(edges, edges)), dtype=dtype).T
    leaves = [x.clone().requires_grad_() for x in (zw, zl, zl / 4, zw / 4)]
    zw, zl, a, b = leaves
    for loss in (losses.drdo_loss(zw, zl, a, b, b, a, alpha=1.0, gamma=gamma)[0],
                 losses.dpo_loss(zw, zl, b, a), losses.ipo_loss(zw, zl, b, a),
                 losses.dpo_loss(zw, zl, b, a, label_smoothing=0.3), losses.robust_dpo_loss(zw, zl, b, a),
                 losses.edpo_loss(zw, zl, b, a, a[None], b[None]),
                 losses.oracle_loss(a, b, zw, alpha=0.5)):
        assert loss.shape == zw.shape and loss.dtype == torch.promote_types(dtype, torch.float32)
        assert loss.isfinite().all()
        grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        # fp16 ends at 65504: a gradient may pass it, but is never NaN
        good = (lambda g: ~g.isnan()) if dtype == torch.float16 else torch.isfinite
        assert all(good(g).all() for g in grads if g is not None)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_gradient_is_equation_30_focal_factor_included(gamma):
    """Appendix A.5, on a softmax of five responses: grad z_i = onehot(i) - pi, grad pi_i = pi_i grad z_i."""
    theta = torch.tensor([0.3, -1.2, 2.0, 0.1, -0.4], dtype=torch.float64, requires_grad=True)
    w, l, alpha = 1, 2, 0.1
    z = theta.log_softmax(0)
    (autograd,) = torch.autograd.grad(alpha * losses.contrastive_loss(z[w], z[l], gamma), theta)
    with torch.no_grad():
        pi = theta.softmax(0)
        grad_zw, grad_zl = torch.eye(5).double()[w] - pi, torch.eye(5).double()[l] - pi
        p = pi[w] / (pi[w] + pi[l])
        focal = alpha * (1 - p) ** gamma
        printed = (gamma * focal * p * (grad_zw - grad_zl) * torch.log(pi[w] / (1 - pi[l]))
                   - focal * (grad_zw + pi[l] * grad_zl / (1 - pi[l])))
    torch.testing.assert_close(autograd, printed, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_robust_dpo_is_unbiased(share):
    """Its mean over labels of which a share is flipped is DPO's loss on the right labels."""
    generator = torch.Generator().manual_seed(4)
    zw, zl, ref_w, ref_l = -20 * torch.rand(4, 8, generator=generator, dtype=torch.float64)
    right = losses.robust_dpo_loss(zw, zl, ref_w, ref_l, 0.3, share)
    flipped = losses.robust_dpo_loss(zl, zw, ref_l, ref_w, 0.3, share)
    dpo = losses.dpo_loss(zw, zl, ref_w, ref_l, 0.3)
    torch.testing.assert_close((1 - share) * right + share * flipped, dpo, rtol=1e-12, atol=1e-12)


def test_edpo_with_one_oracle_is_rebel():
    """arXiv 2404.16767, Eq. 9, on given pairs: (log ratio / eta - reward difference)^2, eta = 1 / beta."""
    generator = torch.Generator().manual_seed(5)
    zw, zl, ref_w, ref_l, rw, rl = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    zw.requires_grad_()
    eta = 1 / 0.3
    rebel = ((torch.log(zw.exp() / ref_w.exp()) - torch.log(zl.exp() / ref_l.exp())) / eta - (rw - rl)) ** 2
    edpo = losses.edpo_loss(zw, zl, ref_w, ref_l, rw[None], rl[None], beta=0.3)
    torch.testing.assert_close(edpo, rebel)
    gradients = [torch.autograd.grad(loss.sum(), zw) for loss in (edpo, rebel)]
    torch.testing.assert_close(*gradients)


def test_edpo_ensembles():
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64)
    zw, zl, ref_w, ref_l = -50 * torch.rand(4, 8, generator=generator, dtype=torch.float64)
    zw.requires_grad_()
    edpo = lambda *rewards, **how: losses.edpo_loss(zw, zl, ref_w, ref_l, *rewards, **how)
    errors = (chosen - rejected - 0.1 * ((zw - zl) - (ref_w - ref_l))) ** 2  # (3, 8)
    torch.testing.assert_close(edpo(chosen, rejected, ensemble="mean"), errors.sum(0) / 3)
    torch.testing.assert_close(edpo(chosen, rejected, ensemble="min"), errors.min(0).values)
    mean = edpo(chosen.mean(0, keepdim=True), rejected.mean(0, keepdim=True))
    gradients = [torch.autograd.grad(loss.sum(), zw) for loss in (edpo(chosen, rejected), mean)]
    torch.testing.assert_close(*gradients)  # as when it distils the mean reward
    with pytest.raises(ValueError, match="median"):
        edpo(chosen, rejected, ensemble="median")


def test_oracle_without_alpha_reads_no_logps():
    rewards, nan = torch.tensor([[1.0, 2.0], [0.0, 2.0]]), torch.full((2,), float("nan"))
    assert losses.oracle_loss(*rewards, nan, alpha=0).isfinite().all()


def readout_batch():
    """Two rows [prompt less its last | last + first response | last + second]. The first prompt has 3 tokens,
    its responses 2 and 3. The second has 2, its responses 1 and 2, and padding."""
    segments = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2], [0, 1, 1, 2, 2, 2, -1, -1, -1]])
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 9, 6, generator=generator, dtype=torch.float64)
    input_ids = torch.randint(11, (2, 9), generator=generator)
    lm_head = torch.nn.Linear(6, 11, bias=False).double()
    return hidden, lm_head, input_ids, segments


@pytest.mark.parametrize("max_logits", [2**26, 33, 1])
def test_response_logps_against_a_loop_and_in_chunks(max_logits):
    hidden, lm_head, input_ids, segments = readout_batch()
    hidden.requires_grad_()
    logps = losses.response_logps(hidden, lm_head, input_ids, segments, max_logits=max_logits)
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for b, response, tokens in ((0, 0, (3, 4)), (0, 1, (6, 7, 8)), (1, 0, (2,)), (1, 1, (4, 5))):
        for t in tokens:
            expected[b, response] += lm_head(hidden[b, t - 1]).softmax(-1)[input_ids[b, t]].log()
    torch.testing.assert_close(logps, expected, rtol=1e-12, atol=0)
    first = losses.response_logps(hidden, lm_head, input_ids, segments, 1, max_logits)
    torch.testing.assert_close(first, expected[:, :1], rtol=1e-12, atol=0)
    weights = torch.tensor([[1.0, -2.0], [0.5, 3.0]]).double()
    gradient = lambda logps: torch.autograd.grad((logps * weights).sum(), [hidden, lm_head.weight])
    torch.testing.assert_close(gradient(logps), gradient(expected), rtol=1e-10, atol=1e-12)


def test_last_token_rewards():
    hidden, *_ = readout_batch()
    weight = torch.arange(6.0).double()[None]
    last = [[4, 8], [2, 4]]
    rewards = losses.last_token_rewards(hidden, weight, torch.tensor(last))
    expected = [[sum(i * hidden[b, t, i].item() for i in range(6)) for t in last[b]] for b in range(2)]
    torch.testing.assert_close(rewards, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_fp32(dtype):
    """500 tokens of log-prob about -4: summed in bf16 the result would be off by tens."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(1, 501, 8, generator=generator).to(dtype)
    lm_head = torch.nn.Linear(8, 50, bias=False).to(dtype)
    input_ids = torch.randint(50, (1, 501), generator=generator)
    segments = torch.ones(1, 501, dtype=torch.long)
    logps = losses.response_logps(hidden, lm_head, input_ids, segments, num_responses=1)
    logits = lm_head(hidden[0, :-1]).double()
    expected = logits.log_softmax(-1).gather(-1, input_ids[0, 1:, None]).sum()
    assert logps.dtype == torch.float32 and logps.item() == pytest.approx(expected.item(), rel=1e-5)
    rewards = losses.last_token_rewards(hidden, lm_head.weight[:1], torch.tensor([[500, 3]]))
    expected = hidden[0, [500, 3]].double() @ lm_head.weight[0].double()
    torch.testing.assert_close(rewards[0].double(), expected, rtol=1e-5, atol=1e-6)
    assert rewards.dtype == torch.float32
