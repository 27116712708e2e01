"""The mathematics of both papers as pure tensor functions: advantages, KL, clipped losses, GAE, weights.

A step samples G completions of each of P prompts, N = P*G rows of at most T tokens, and makes one weighted sum of them.
GRPO (DeepSeekMath, arXiv 2402.03300, section 4) compares a row with its own group; PPO (arXiv 1707.06347; Med-RLVR,
arXiv 2502.19655, section 3) compares it with a learned value; Dr. GRPO, DAPO, RLOO and GSPO change one word each.
Nothing here knows a model, a tokenizer or a file: read it with those sections open and check the doctests by hand.
"""
import torch
from torch import Tensor

from metrics import Stats


# ------------------------------------------------------------------------------------------------- advantages
def group_advantages(rewards: Tensor, groups: Tensor, scale: str = "std", eps: float = 1e-4,
                     leave_one_out: bool = False) -> Tensor:
    """A_i = (r_i - mean(r_group)) / (std(r_group) + eps): how much better a sample is than its siblings. [N], [N] -> [N]

    `groups` holds each row's prompt index: the only key, so the order of rows is free and equal prompts stay apart.
    scale="std" is GRPO (std with Bessel's correction, as TRL has it); scale="none" is Dr. GRPO (arXiv 2503.20783, section 3),
    which found that dividing by std overweights questions that are nearly always or nearly never solved.
    `leave_one_out` is RLOO (arXiv 2402.14740): the baseline is the mean of the *other* rows, r_i - mean(r_-i) = (r_i - mean) G/(G-1).
    A group of one, or one whose rewards are all equal, teaches nothing and gets exactly 0.

    >>> r, g = torch.tensor([1., 0., 0., 0., 1., 1.]), torch.tensor([0, 0, 0, 0, 1, 1])
    >>> group_advantages(r, g, scale="none").tolist()                         # mean of group 0 is 1/4
    [0.75, -0.25, -0.25, -0.25, 0.0, 0.0]
    >>> [round(a, 3) for a in group_advantages(r, g).tolist()]                # its std is sqrt((.75^2 + 3 * .25^2) / 3) = 1/2
    [1.5, -0.5, -0.5, -0.5, 0.0, 0.0]
    >>> [round(a, 3) for a in group_advantages(r, g, "none", leave_one_out=True).tolist()]   # 1 - 0, 0 - 1/3
    [1.0, -0.333, -0.333, -0.333, 0.0, 0.0]
    """
    if scale not in ("std", "none"):
        raise ValueError(f"scale is 'std' or 'none', not {scale!r}")
    _, index = torch.unique(groups, return_inverse=True)                      # [N] -> 0..P-1
    n_groups = int(index.max()) + 1 if len(index) else 0
    per_group = lambda x: rewards.new_zeros(n_groups).index_add(0, index, x)  # sums rows into their group: [N] -> [P]
    size = per_group(torch.ones_like(rewards))
    centred = rewards - (per_group(rewards) / size)[index]
    advantages = centred
    if leave_one_out:
        advantages = centred * (size / (size - 1).clamp(min=1))[index]
    if scale == "std":
        std = (per_group(centred.square()) / (size - 1).clamp(min=1)).sqrt()
        advantages = advantages / (std[index] + eps)
    # The mean of equal floats can be one ulp off them; divided by eps that would be noise with a direction.
    highest = rewards.new_zeros(n_groups).scatter_reduce(0, index, rewards, "amax", include_self=False)
    lowest = rewards.new_zeros(n_groups).scatter_reduce(0, index, rewards, "amin", include_self=False)
    return torch.where((highest == lowest)[index], torch.zeros_like(advantages), advantages)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16). [N, T] x 3 -> advantages [N, T], returns [N, T]

    delta_t = r_t + gamma V_{t+1} - V_t;   A_t = delta_t + gamma lam A_{t+1};   return_t = A_t + V_t.
    The last counted token is terminal: nothing after it, whatever the critic says there, enters any sum. That holds for a row
    cut at the token limit too (our choice: the grader has already judged what stands there, so nothing is left to bootstrap).

    >>> one = torch.ones(1, 3)
    >>> gae(torch.tensor([[0., 0., 1.]]), .5 * one, one.bool(), gamma=1., lam=1.)[0].tolist()       # R - V_t
    [[0.5, 0.5, 0.5]]
    """
    mask = mask.to(values.dtype)
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(values)
    next_advantage = next_value = torch.zeros_like(values[:, 0])              # [N]
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * mask


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / std over the counted tokens of all rows; 0 elsewhere. [N, T], [N, T] -> [N, T]

    Population variance with a floor of 1e-8, as OpenRLHF has it, so that a batch of one token gives 0 and not NaN.
    """
    mask = mask.to(x.dtype)
    count = mask.sum().clamp(min=1)
    centred = (x - (x * mask).sum() / count) * mask
    return centred * (centred.square().sum() / count).clamp(min=1e-8).rsqrt()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over counted tokens: 1 a perfect critic, 0 a constant one. [N, T] x 3 -> []

    0 where the returns do not vary: there is nothing to explain.
    """
    values, returns = values[mask], returns[mask]
    if returns.numel() < 2 or returns.var() == 0:
        return returns.new_zeros(())
    return 1 - (returns - values).var() / returns.var()


# ---------------------------------------------------------------------------------------------------- weights
def token_weights(lengths: Tensor, mode: str = "sequence", max_new: int | None = None,
                  dtype: torch.dtype = torch.float32) -> Tensor:
    """w_i, the weight of each token of row i in the one sum that is the loss. [N] -> [N]

    "sequence": 1/(N len_i), every completion counts the same (GRPO);   "token": 1/sum(len), every token (DAPO);
    "constant": 1/(N max_new), neither length enters (Dr. GRPO).
    Compute it once per optimiser step over all its rows. Then micro-batches are just parts of a sum and cannot change the gradient.

    >>> token_weights(torch.tensor([1, 3]), "sequence").tolist()
    [0.5, 0.1666666716337204]
    >>> token_weights(torch.tensor([1, 3]), "token").tolist()
    [0.25, 0.25]
    """
    lengths = lengths.to(dtype)
    if mode == "sequence":
        return 1 / (len(lengths) * lengths.clamp(min=1))
    if mode == "token":
        return torch.ones_like(lengths) / lengths.sum().clamp(min=1)
    if mode == "constant":
        if not max_new:
            raise ValueError("mode 'constant' divides by max_new: give it")
        return torch.full_like(lengths, 1 / (len(lengths) * max_new))
    raise ValueError(f"mode is 'sequence', 'token' or 'constant', not {mode!r}")


# ----------------------------------------------------------------------------------------------------- losses
def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor,
                *, clip_low: float = .2, clip_high: float = .2, ratio: str = "token",
                dual_clip: float | None = None) -> tuple[Tensor, Stats]:
    """- sum_i w_i sum_t min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A),   rho = pi(o_t) / pi_old(o_t).

    logps, old_logps, mask [N, T]; advantages [N] or [N, T]; weights [N] -> (loss [], stats).
    PPO's clipped surrogate (arXiv 1707.06347, eq. 7). A gradient flows until the ratio has moved past the clip *in the direction the advantage
    asks for*. clip_high > clip_low is DAPO's clip-higher (arXiv 2503.14476, section 3.1). ratio="sequence" is GSPO (arXiv 2507.18071,
    eq. 7): rho is the geometric mean over the row's tokens. dual_clip=c bounds the loss of a negative advantage at c |A| (arXiv 1912.09729).
    On the first update rho = 1, so the *value* is about -mean(A) = 0, while the gradient is REINFORCE's: a loss of 0 is no sign of a fault.
    stats: clipped_low and clipped_high, the share of tokens whose gradient the clip stopped on
    either side, weighted like the loss; max_ratio, the largest rho of a counted token.

    >>> lp = torch.log(torch.tensor([[.6], [.6]])); old = torch.log(torch.tensor([[.4], [.4]]))      # rho = 1.5
    >>> A, m, w = torch.tensor([1., -1.]), torch.ones(2, 1).bool(), torch.tensor([.5, .5])
    >>> loss, stats = policy_loss(lp, old, A, m, w)
    >>> round(loss.item(), 4)                           # -(min(1.5, 1.2) + min(-1.5, -1.2)) / 2
    0.15
    >>> [round(stats[name], 4) for name in ("clipped_high", "clipped_low", "max_ratio")]
    [0.5, 0.0, 1.5]
    """
    if advantages.dim() == 1:
        advantages = advantages[:, None]                                      # [N, 1]: one advantage for the whole completion
    counted = mask.to(logps.dtype)
    log_ratio = torch.where(mask.bool(), logps - old_logps, 0)                # what stands in padding never meets exp()
    if ratio == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)      # [N, 1]
    elif ratio != "token":
        raise ValueError(f"ratio is 'token' or 'sequence', not {ratio!r}")
    rho = log_ratio.exp()
    surrogate = torch.minimum(rho * advantages, rho.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is not None:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)
    per_token = weights[:, None] * counted                                    # [N, T], sums to 1 in the first two modes
    loss = -(per_token * surrogate).sum()
    stats = Stats()
    stats.mean("clipped_low", (rho < 1 - clip_low) & (advantages < 0), per_token)
    stats.mean("clipped_high", (rho > 1 + clip_high) & (advantages > 0), per_token)
    stats.max("max_ratio", rho.detach().expand_as(logps)[mask.bool()])
    return loss, stats


def kl_term(logps: Tensor, ref_logps: Tensor, kind: str) -> Tensor:
    """A per-token estimate of KL(pi || ref) from the sampled token alone. [N, T], [N, T] -> [N, T]

    With d = log ref - log pi:   k1 = -d,   k2 = d^2 / 2,   k3 = exp(d) - d - 1   (joschu.net/blog/kl-approx.html).
    As *values*, k1 is unbiased but may be negative; k3 is unbiased and never negative; k2 is biased and small.
    As a *loss* what counts is the gradient, on samples of pi:
      k1  E[grad log pi] = 0: nothing but noise. Use it in the reward only, where PPO has it (a score, not differentiated).
      k2  grad = (log pi - log ref) grad log pi: exactly the gradient of the true KL, in expectation.
      k3  GRPO's. grad = (1 - ref/pi) grad log pi: close to k2 near the reference, weaker where pi > ref, stronger where pi < ref.

    >>> lp, ref = torch.log(torch.tensor([[.5]])), torch.log(torch.tensor([[.25]]))                  # d = log(1/2)
    >>> [round(kl_term(lp, ref, k).item(), 4) for k in ("k1", "k2", "k3")]                           # .6931, .6931^2/2, .5 + .6931 - 1
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


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, weights: Tensor, clip: float | None = .2) -> Tensor:
    """1/2 sum_i w_i sum_t max((V - R)^2, (clip(V, V_old +- clip) - R)^2). values, old_values, returns, mask [N, T]; weights [N] -> []

    The clip keeps the critic near the one that made the advantages (Stable-Baselines, OpenRLHF); the larger error of the two is the cautious one.

    >>> v = torch.tensor([[1.]]); m = torch.tensor([[True]]); w = torch.tensor([1.])
    >>> round(value_loss(v, torch.tensor([[0.]]), torch.tensor([[1.]]), m, w).item(), 4)     # V is right, but clipped to .2: (.2 - 1)^2 / 2
    0.32
    """
    error = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    return .5 * (weights[:, None] * torch.where(mask.bool(), error, 0)).sum()


def example(rewards=(1, 0, 0, 1), scale: str = "std", mode: str = "sequence") -> str:
    """One group of four answers to one question, from rewards to the gradient of each token's log-prob, as a table."""
    rewards, lengths = torch.tensor(rewards, dtype=torch.float32), torch.tensor([2, 4, 1, 1])
    advantages = group_advantages(rewards, torch.zeros(4), scale)
    weights = token_weights(lengths, mode, max_new=4)
    mask = torch.arange(4) < lengths[:, None]                                 # [N, T]
    logps = torch.full((4, 4), .5).log().requires_grad_()                     # each token had probability 1/2, now as when it was sampled: rho = 1
    loss, _ = policy_loss(logps, logps.detach(), advantages, mask, weights)
    loss.backward()
    rows = [f"{'reward':>6} {'A_i':>7} {'tokens':>6} {'w_i':>7}   d loss / d log pi(o_t) = - w_i A_i: what pushes a token up (-) or down (+)"]
    for i in range(4):
        rows.append(f"{rewards[i]:6.0f} {advantages[i]:+7.3f} {lengths[i]:6d} {weights[i]:7.4f}   {'  '.join(f'{g:+.4f}' for g in logps.grad[i, :lengths[i]])}")
    return "\n".join([*rows, f"loss {loss.item():+.4f}: no measure of anything; the gradient is what counts"])


if __name__ == "__main__":
    import doctest
    failed, tried = doctest.testmod()
    print(f"grpo.py: {tried - failed} of {tried} doctest lines hold\n\nOne group (scale='std', weights='sequence'):\n{example()}")
    raise SystemExit(bool(failed))
