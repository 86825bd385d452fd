"""What the exhibits of notebook 52 and their tests share: how far one example moves a sum, what that costs, what a search costs."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from dp_accounting import rdp
from opacus.accountants.analysis.rdp import compute_rdp
from torch import Tensor

from memarc_utils.accounting import PrivacyPlan

ORDERS = tuple([1 + k / 10 for k in range(1, 100)] + list(range(11, 129)))


def largest_contribution(sum_of: Callable[[list[int]], Tensor], num_examples: int, bound: int | float = 1.0) -> float:
    """max over i of ‖S(all) − S(all without i)‖ / C, by leaving each example out once.

    Unlike `verify_sensitivity` it knows nothing of the engine: ``sum_of`` may be any system's clipped sum without noise.

    Args:
        sum_of: the sum over the examples of a list of indices, flattened.
        num_examples: how many there are.
        bound: C.

    >>> import torch
    >>> x = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    >>> largest_contribution(lambda rows: x[rows].sum(0), 2)
    3.0
    """
    everyone = list(range(num_examples))
    whole = sum_of(everyone)
    return max(float((whole - sum_of([j for j in everyone if j != i])).double().norm()) for i in everyone) / bound


def honest_epsilon(plan: PrivacyPlan, contribution: int | float, num_steps: int | None = None) -> float:
    """ε (PLD) of a run whose noise was meant for C, when one example moves the sum by up to ``contribution`` · C.

    A Gaussian mechanism of sensitivity k and noise σ is one of sensitivity 1 and noise σ/k.

    >>> plan = PrivacyPlan(dataset_size=1000, expected_batch_size=1000, num_steps=1, noise_multiplier=2.0, max_grad_norm=1.0,
    ...                    delta=1e-5)
    >>> honest_epsilon(plan, 2.0) == replace(plan, noise_multiplier=1.0).epsilon()
    True
    """
    if not contribution > 0:
        raise ValueError(f"contribution must be above 0 (in units of C), got {contribution!r}")
    if math.isinf(contribution):
        return math.inf
    return replace(plan, noise_multiplier=plan.noise_multiplier / contribution).epsilon(num_steps=num_steps)


def refused(action: Callable[[], object]) -> str:
    """The message of the ValueError by which ``action`` is refused.

    Raises:
        AssertionError: it was not refused.

    >>> refused(lambda: int("x"))
    "invalid literal for int() with base 10: 'x'"
    """
    try:
        action()
    except ValueError as error:
        return str(error)
    raise AssertionError("was not refused")


def search_divergence(base: np.ndarray, gamma: float, eta: int | float = 1.0, orders: tuple[float, ...] = ORDERS) -> np.ndarray:
    """Rényi divergence of publishing the best of a random number K of private runs (Papernot & Steinke 2022, arXiv 2110.03620,
    Theorem 2), K truncated negative binomial; η = 1 is the geometric law with mean 1/γ::

        ε'(α) = ε(α) + (1 + η)(1 − 1/β) ε(β) + (1 + η) log(1/γ) / β + log E[K] / (α − 1),   the best β

    Args:
        base: ε(α) of one run at each order.
        gamma: γ, in (0, 1).
        eta: η > 0. E[K] = η (1 − γ) / (γ (1 − γ^η)).
        orders: α, all above 1.

    >>> float(search_divergence(np.array([0.0]), gamma=0.5, orders=(2.0,))[0]) == 2 * math.log(2)
    True
    """
    if not 0 < gamma < 1 or not eta > 0:
        raise ValueError(f"gamma must lie in (0, 1) and eta above 0, got {gamma!r} and {eta!r}")
    alpha, base = np.asarray(orders, dtype=float), np.asarray(base, dtype=float)
    mean = eta * (1 - gamma) / (gamma * (1 - gamma**eta))
    selection = (1 + eta) * ((1 - 1 / alpha) * base - math.log(gamma) / alpha)
    return base + selection.min() + math.log(mean) / (alpha - 1)


def search_epsilon(plan: PrivacyPlan, mean_trials: int | float) -> float:
    """ε at the plan's δ of the best of a geometric number of runs of this plan, by `search_divergence` of the sampled Gaussian's RDP.

    Args:
        mean_trials: E[K] = 1/γ, above 1. The number of runs has to be drawn, and not looked at before it is.
    """
    if not mean_trials > 1:
        raise ValueError(f"mean_trials must be above 1, got {mean_trials!r}: one run costs plan.epsilon()")
    one_run = compute_rdp(q=plan.sample_rate, noise_multiplier=plan.noise_multiplier, steps=plan.num_steps, orders=ORDERS)
    return float(rdp.compute_epsilon(ORDERS, search_divergence(one_run, 1 / mean_trials), plan.delta)[0])
