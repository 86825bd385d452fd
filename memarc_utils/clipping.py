"""Clipping functions: from the norms of per-example gradients to the factors that bound each example's contribution.

With factor c_i the contribution of example i to the sum has norm c_i ‖g_i‖, and that is at most C for every gradient:

* ``flat`` (Abadi et al. 2016, arXiv 1607.00133): c = min(1, C/‖g‖);
* ``automatic`` (AUTO-S, arXiv 2206.07136, with the threshold kept as a scale): c = C/(‖g‖ + 0.01), always below C;
* ``per_layer`` (McMahan et al. 2018, arXiv 1710.06963, section 3.2): each of G groups by itself, c = min(1, (C/√G)/‖g‖);
  the G pieces stand at right angles, so the whole has norm at most √(G · C²/G) = C.
"""

import math
from numbers import Real

from jaxtyping import Float
from torch import Tensor

CLIPPINGS = ("flat", "automatic", "per_layer")
STABILITY = 0.01  # γ of AUTO-S


def check_clipping(clipping: str, max_grad_norm: float) -> None:
    """Raises:
        ValueError: unknown clipping function, or a bound that is not a positive number of at least 1e-12: gradients as small as a smaller
            one have squares below float32's range.
    """
    if clipping not in CLIPPINGS:
        raise ValueError(f"clipping must be one of {', '.join(CLIPPINGS)}, got {clipping!r}")
    if isinstance(max_grad_norm, bool) or not isinstance(max_grad_norm, Real) or not (math.isfinite(max_grad_norm) and max_grad_norm > 0):
        raise ValueError(f"max_grad_norm must be a positive number, got {max_grad_norm!r}")
    if max_grad_norm < 1e-12:
        raise ValueError(f"max_grad_norm must be 1e-12 or more, got {max_grad_norm!r}: float32 cannot hold the squares of gradients that "
                         "small. Scale the loss up, and C with it")


def group_bound(max_grad_norm: float, clipping: str, num_groups: int = 1) -> float:
    """The most that one example contributes to one group: C, or C/√G for each of G groups.

    >>> group_bound(1.0, "flat"), group_bound(1.0, "per_layer", 4)
    (1.0, 0.5)
    """
    return max_grad_norm / math.sqrt(num_groups) if clipping == "per_layer" else max_grad_norm


def contribution_bound(max_grad_norm: float, clipping: str, num_groups: int = 1) -> float:
    """The most that one example contributes to the whole sum, the sensitivity that the noise is scaled by.

    >>> contribution_bound(1.0, "automatic"), contribution_bound(1.0, "per_layer", 4)
    (1.0, 1.0)
    """
    groups = num_groups if clipping == "per_layer" else 1
    return group_bound(max_grad_norm, clipping, num_groups) * math.sqrt(groups)


def clipping_factors(norms: Float[Tensor, " batch"], max_grad_norm: float, clipping: str = "flat", num_groups: int = 1
                     ) -> Float[Tensor, " batch"]:
    """Factors c with c·norm ≤ `group_bound`.

    Args:
        norms: of the examples' gradients; with ``per_layer`` those of one group.
        num_groups: G, how many groups are clipped apart.

    >>> import torch
    >>> clipping_factors(torch.tensor([0.5, 4.0]), 1.0)
    tensor([1.0000, 0.2500])
    >>> clipping_factors(torch.tensor([0.5, 4.0]), 1.0, "automatic") * torch.tensor([0.5, 4.0])
    tensor([0.9804, 0.9975])
    >>> clipping_factors(torch.tensor([0.5, 4.0]), 1.0, "per_layer", num_groups=16)
    tensor([0.5000, 0.0625])
    """
    check_clipping(clipping, max_grad_norm)
    bound = group_bound(max_grad_norm, clipping, num_groups)
    if clipping == "automatic":
        return bound / (norms + STABILITY)
    return bound / norms.clamp_min(bound)
