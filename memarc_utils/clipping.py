"""Clipping functions: from the norms of per-example gradients to the factors that bound each example's contribution.

With factor c_i the contribution of example i to the sum has norm c_i ‖g_i‖, and that is at most C for every gradient:

* ``flat`` (Abadi et al. 2016, arXiv 1607.00133): c = min(1, C/‖g‖);
* ``automatic`` (AUTO-S, arXiv 2206.07136, with the threshold kept as a scale): c = C/(‖g‖ + 0.01), always below C.
"""

import math

from jaxtyping import Float
from torch import Tensor

CLIPPINGS = ("flat", "automatic")
STABILITY = 0.01  # γ of AUTO-S


def check_clipping(clipping: str, max_grad_norm: float) -> None:
    """Raises:
        ValueError: unknown clipping function, or a bound that is not a positive number.
    """
    if clipping not in CLIPPINGS:
        raise ValueError(f"clipping must be one of {', '.join(CLIPPINGS)}, got {clipping!r}")
    if not (math.isfinite(max_grad_norm) and max_grad_norm > 0):
        raise ValueError(f"max_grad_norm must be a positive number, got {max_grad_norm!r}")


def clipping_factors(norms: Float[Tensor, " batch"], max_grad_norm: float, clipping: str = "flat") -> Float[Tensor, " batch"]:
    """Factors c with c·norm ≤ max_grad_norm.

    >>> import torch
    >>> clipping_factors(torch.tensor([0.5, 4.0]), 1.0)
    tensor([1.0000, 0.2500])
    >>> clipping_factors(torch.tensor([0.5, 4.0]), 1.0, "automatic") * torch.tensor([0.5, 4.0])
    tensor([0.9804, 0.9975])
    """
    check_clipping(clipping, max_grad_norm)
    if clipping == "flat":
        return max_grad_norm / norms.clamp_min(max_grad_norm)
    return max_grad_norm / (norms + STABILITY)
