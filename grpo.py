"""The mathematics of both papers: advantages, losses, KL, GAE. Tensors in, tensors out.

A step samples G completions of each of P prompts: N = P * G rows of at most T tokens. One update is
one weighted sum over their tokens. GRPO (DeepSeekMath, arXiv 2402.03300, section 4) compares a row
with the others of its group; PPO (arXiv 1707.06347; Med-RLVR, arXiv 2502.19655, section 3) compares
it with a learned value; the other algorithms change one word each and are rows of `ALGOS`.
Nothing here knows a model, a tokenizer or a file. Read it with those sections open, and check the
doctests by hand: `python grpo.py` runs them and prints one group worked through.
"""

import doctest

import torch
from torch import Tensor

from support.metrics import Stats

# One row an algorithm: the settings in which it differs from the defaults of support/config.py.
# What a data set needs (`defaults` in data.py) beats a row, and flags beat both: the demo, for one,
# sets kl_coef to 0. docs/algorithms.md says what differs from each paper.
ALGOS = {
    # arXiv 2402.03300; beta 0.04 as in Visual-RFT and its neighbours.
    "grpo": dict(scale="std", weights="sequence", kl="k3", kl_coef=0.04),
    # arXiv 2503.20783: no division by the std, and none by the length.
    "dr_grpo": dict(scale="none", weights="constant"),
    # arXiv 2503.14476. It takes 16 optimiser steps a rollout; 4 are our choice.
    "dapo": dict(
        scale="std", weights="token", clip_high=0.28, dynamic=True, w_overlong=1.0, minibatches=4
    ),
    # arXiv 2402.14740: the baseline is the mean of the others.
    "rloo": dict(advantage="others", scale="none", weights="constant"),
    # arXiv 2507.18071, section 5.1, its 4 minibatches a rollout too.
    "gspo": dict(
        scale="std",
        weights="sequence",
        ratio="sequence",
        clip_low=3e-4,
        clip_high=4e-4,
        minibatches=4,
    ),
    # MiniMax-M1, arXiv 2506.13585: a clipped token keeps its gradient. The clip and the number of
    # minibatches are our choice.
    "cispo": dict(scale="std", weights="token", ratio="cispo", clip_high=4.0, minibatches=4),
    # arXiv 1707.06347; Med-RLVR, section 3.
    "ppo": dict(advantage="gae", weights="sequence", kl="k1", kl_coef=0.01, minibatches=4),
    # Supervised fine-tuning: cross-entropy on the completion only.
    "sft": dict(samples=1, weights="token", temperature=1.0),
}


# ---------------------------------------------------------------------------------- advantages
def group_advantages(
    rewards: Tensor, scale: str = "std", leave_one_out: bool = False, eps: float = 1e-4
) -> Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + eps): better than the others of its group? [P, G] -> [P, G]

    scale="std" is GRPO, with Bessel's correction as TRL has it. scale="none" is Dr. GRPO (arXiv
    2503.20783, section 3): division by the std gives more weight to questions that are nearly
    always or nearly never solved. With leave_one_out the baseline is the mean of the *other* rows
    (RLOO, arXiv 2402.14740): r_i - mean(r_-i) = (r_i - mean(r)) G / (G - 1).
    A group of one, or one whose rewards are all equal, teaches nothing and gets exactly 0.

    >>> r = torch.tensor([[1., 0., 0., 0.], [1., 1., 1., 1.]])
    >>> group_advantages(r, scale="none").tolist()      # the mean of the first group is 1/4
    [[0.75, -0.25, -0.25, -0.25], [0.0, 0.0, 0.0, 0.0]]
    >>> group_advantages(r[:1]).round(decimals=3)       # std: sqrt((.75^2 + 3 * .25^2) / 3) = 1/2
    tensor([[ 1.5000, -0.5000, -0.5000, -0.5000]])
    >>> group_advantages(r[:1], "none", leave_one_out=True).round(decimals=3)      # 1 - 0, 0 - 1/3
    tensor([[ 1.0000, -0.3330, -0.3330, -0.3330]])
    """
    if scale not in ("std", "none"):
        raise ValueError(f"scale is 'std' or 'none', not {scale!r}")
    G = rewards.shape[1]
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale == "std" and G > 1:
        advantages = advantages / (rewards.std(1, keepdim=True) + eps)
    if leave_one_out:
        advantages = advantages * G / max(G - 1, 1)
    # The mean of equal floats can be off by one rounding; divided by eps that would be noise with
    # a direction.
    all_equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return advantages.masked_fill(all_equal, 0.0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16). [N, T] x 3 -> [N, T] x 2

    delta_t = r_t + gamma V_{t+1} - V_t;   A_t = delta_t + gamma lam A_{t+1};   return_t = A_t + V_t

    The last counted token is terminal: nothing after it enters any sum, whatever the critic says
    there. That holds for a row cut at the token limit too (our choice: the grader has judged what
    stands there, so nothing is left to bootstrap).

    >>> one = torch.ones(1, 3)
    >>> r = torch.tensor([[0., 0., 1.]])
    >>> gae(r, .5 * one, one.bool(), gamma=1., lam=1.)[0].tolist()      # R - V_t
    [[0.5, 0.5, 0.5]]
    """
    counted = mask.to(values.dtype)
    rewards, values = rewards * counted, values * counted
    advantages = torch.zeros_like(values)
    next_advantage = next_value = torch.zeros_like(values[:, 0])  # [N]
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * counted[:, t]
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * counted


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / std over the counted tokens of all rows, 0 elsewhere. [N, T], [N, T] -> [N, T]

    Population variance with a floor of 1e-8, as in OpenRLHF: one token alone gives 0, not NaN.
    """
    counted = mask.to(x.dtype)
    n = counted.sum().clamp(min=1)
    centred = (x - (x * counted).sum() / n) * counted
    variance = centred.square().sum() / n
    return centred * variance.clamp(min=1e-8).rsqrt()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over counted tokens. [N, T] x 3 -> []

    1 is a perfect critic, 0 a constant one; 0 too where the returns do not vary.
    """
    values, returns = values[mask], returns[mask]
    if returns.numel() < 2 or returns.var() == 0:
        return returns.new_zeros(())
    return 1 - (returns - values).var() / returns.var()


# ------------------------------------------------------------------------------------- weights
def token_weights(
    lengths: Tensor,
    mode: str = "sequence",
    max_new: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """w_i, the weight of each token of row i in the one sum that is the loss. [N] or [P, G] -> same

    "sequence": 1 / (N len_i), every completion counts the same (GRPO)
    "token":    1 / sum(len), every token counts the same (DAPO)
    "constant": 1 / (N max_new), the length does not enter (Dr. GRPO)

    They are computed once per optimiser step, over all its rows. So micro-batches are parts of one
    sum, and cannot change the gradient.

    >>> token_weights(torch.tensor([1, 3]), "sequence")
    tensor([0.5000, 0.1667])
    >>> token_weights(torch.tensor([1, 3]), "token")
    tensor([0.2500, 0.2500])
    """
    lengths = lengths.to(dtype)
    N = lengths.numel()
    if mode == "sequence":
        return 1 / (N * lengths.clamp(min=1))
    if mode == "token":
        return torch.ones_like(lengths) / lengths.sum().clamp(min=1)
    if mode == "constant":
        if not max_new:
            raise ValueError("mode 'constant' divides by max_new: give it")
        return torch.full_like(lengths, 1 / (N * max_new))
    raise ValueError(f"mode is 'sequence', 'token' or 'constant', not {mode!r}")


# -------------------------------------------------------------------------------------- losses
def policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio: str = "token",
) -> tuple[Tensor, Stats]:
    """- sum_i w_i sum_t min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = pi / pi_old.

    logps, old_logps, mask [N, T]; advantages [N] or [N, T]; weights [N] -> (loss [], stats)

    PPO's clipped surrogate (arXiv 1707.06347, eq. 7): a token has a gradient until its ratio has
    moved past the clip *in the direction that the advantage asks for*. clip_high > clip_low is
    DAPO's clip-higher (arXiv 2503.14476, section 3.1).
    ratio="sequence" is GSPO (arXiv 2507.18071, eq. 7): rho is the geometric mean over the row.
    ratio="cispo" is MiniMax-M1's (arXiv 2506.13585): - w min(rho, 1 + clip_high) A log pi, in which
    the clipped ratio is a constant weight, so that a clipped token keeps a gradient. Only the upper
    side is clipped, as in TRL; verl clips both.

    On the first update rho = 1. Then the *value* of the loss is - sum w A, which is 0 in a group if
    every row weighs the same, while its gradient is REINFORCE's: a loss of 0 is no sign of a fault.
    stats: clipped_low and clipped_high, the share of tokens past the clip on either side, weighted
    like the loss (nothing is clipped below by "cispo"); max_ratio, the largest rho counted.

    >>> logps = torch.tensor([[.6], [.6]]).log()
    >>> old = torch.tensor([[.4], [.4]]).log()          # rho = 1.5
    >>> A, mask, w = torch.tensor([1., -1.]), torch.ones(2, 1).bool(), torch.tensor([.5, .5])
    >>> loss, stats = policy_loss(logps, old, A, mask, w)
    >>> round(loss.item(), 4)           # -(.5 * min(1.5, 1.2) + .5 * min(-1.5, -1.2))
    0.15
    >>> [round(stats[name], 4) for name in ("clipped_high", "clipped_low", "max_ratio")]
    [0.5, 0.0, 1.5]
    """
    if advantages.dim() == 1:
        advantages = advantages[:, None]  # [N, 1]: the same for every token of the row
    counted = mask.to(logps.dtype)
    log_ratio = torch.where(mask.bool(), logps - old_logps, 0)  # exp() never meets padding
    if ratio == "sequence":
        lengths = counted.sum(1, keepdim=True).clamp(min=1)
        log_ratio = log_ratio.sum(1, keepdim=True) / lengths  # [N, 1]
    rho = log_ratio.exp()
    if ratio == "cispo":
        counted_logps = torch.where(mask.bool(), logps, 0)
        surrogate = rho.detach().clamp(max=1 + clip_high) * advantages * counted_logps
    elif ratio in ("token", "sequence"):
        clipped = rho.clamp(1 - clip_low, 1 + clip_high)
        surrogate = torch.minimum(rho * advantages, clipped * advantages)
    else:
        raise ValueError(f"ratio is 'token', 'sequence' or 'cispo', not {ratio!r}")
    token_weight = weights[:, None] * counted  # [N, T]
    loss = -(token_weight * surrogate).sum()

    stats = Stats()
    below = (rho < 1 - clip_low) & (advantages < 0) & (ratio != "cispo")
    stats.mean("clipped_low", below, token_weight)
    stats.mean("clipped_high", (rho > 1 + clip_high) & (advantages > 0), token_weight)
    stats.max("max_ratio", rho.detach() * counted)
    return loss, stats


def kl_term(logps: Tensor, ref_logps: Tensor, kind: str) -> Tensor:
    """A per-token estimate of KL(pi || ref) from the sampled token alone. [N, T], [N, T] -> [N, T]

    With d = log ref - log pi:  k1 = -d,  k2 = d^2 / 2,  k3 = exp(d) - d - 1  (Schulman,
    joschu.net/blog/kl-approx.html). As *values*, k1 is unbiased but may be negative, k3 is unbiased
    and never negative, k2 is biased and small. As a *loss* their gradients count, on samples of pi:

    k1  E[grad log pi] = 0: nothing but noise. It belongs into the reward, where PPO has it.
    k2  (log pi - log ref) grad log pi: in expectation exactly the gradient of the true KL.
    k3  GRPO's: (1 - ref / pi) grad log pi: close to k2 near the reference, weaker where pi > ref.

    >>> logps, ref = torch.tensor([[.5]]).log(), torch.tensor([[.25]]).log()      # d = log(1/2)
    >>> [round(kl_term(logps, ref, k).item(), 4) for k in ("k1", "k2", "k3")]
    [0.6931, 0.2402, 0.1931]
    """
    d = ref_logps - logps
    if kind == "k1":
        return -d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return d.exp() - d - 1
    raise ValueError(f"kind is 'k1', 'k2' or 'k3', not {kind!r}")


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    weights: Tensor,
    clip: float | None = 0.2,
) -> Tensor:
    """1/2 sum_i w_i sum_t max((V - R)^2, (clip(V, V_old +- clip) - R)^2). [N, T] x 4, [N] -> []

    The clip keeps the critic near the one that made the advantages (as in OpenRLHF); the larger of
    the two errors is the cautious one.

    >>> V, V_old, R = torch.tensor([[1.]]), torch.tensor([[0.]]), torch.tensor([[1.]])
    >>> mask, w = torch.tensor([[True]]), torch.tensor([1.])
    >>> round(value_loss(V, V_old, R, mask, w).item(), 4)     # V is right, but: (.2 - 1)^2 / 2
    0.32
    """
    error = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    return 0.5 * (weights[:, None] * torch.where(mask.bool(), error, 0)).sum()


# --------------------------------------------------------------------------- one group, by hand
def example(rewards=(1, 0, 0, 1), scale: str = "std", mode: str = "sequence") -> str:
    """One group of four answers to one question, from rewards to the gradients, as a table."""
    rewards, lengths = torch.tensor(rewards, dtype=torch.float32), torch.tensor([2, 4, 1, 1])
    advantages = group_advantages(rewards[None], scale)[0]  # [4]
    weights = token_weights(lengths, mode, max_new=4)
    mask = torch.arange(4) < lengths[:, None]  # [N, T]
    # Each token had probability 1/2 when it was sampled and has it now: rho = 1.
    logps = torch.full((4, 4), 0.5).log().requires_grad_()
    loss, _ = policy_loss(logps, logps.detach(), advantages, mask, weights)
    loss.backward()
    lines = [
        "d loss / d log pi(o_t) = - w_i A_i: a negative one pushes the token up",
        "reward     A_i  tokens     w_i   gradient of each token",
    ]
    for i, length in enumerate(lengths.tolist()):
        gradients = "  ".join(f"{g:+.4f}" for g in logps.grad[i, :length])
        lines.append(
            f"{rewards[i]:6.0f} {advantages[i]:+7.3f} {length:7d} {weights[i]:7.4f}   {gradients}"
        )
    lines.append(f"loss {loss.item():+.4f}: it measures nothing; the gradient is what counts")
    return "\n".join(lines)


if __name__ == "__main__":
    failed, tried = doctest.testmod()
    print(f"grpo.py: {tried - failed} of {tried} doctest lines hold\n")
    print(f"One group (scale='std', weights='sequence'):\n{example()}")
    raise SystemExit(bool(failed))
