"""The small parts of a side network: downsamples, gates and blocks at side width r beside a backbone of width d.

Sources: ladder side-tuning (LST, arXiv 2206.06522, section 3), QST (2401.07159, section 3.2). LST's choice of initial weights by
Fisher information reads the training data, so it has no place here: initial weights are random, or taken from the backbone.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from memarc_utils.book_keeping import accumulation_dtype
from memarc_utils.layer_rules import CastLinear, register_rule

_TEMPERATURE = 0.1  # of LST's gates
_LOW_RANK = 16  # inner width of QST's downsample


def normalise(h: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
    """Layer normalisation without parameters: brings every backbone's features to one scale."""
    return F.layer_norm(h, h.shape[-1:])


class Gate(nn.Module):
    """``μ s + (1 − μ) z`` with μ = sigmoid(α / 0.1), one α for all (``width`` 1) or one a channel; ½ at the start."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, s: Float[Tensor, "batch tokens side"], z: Float[Tensor, "batch tokens side"]
                ) -> Float[Tensor, "batch tokens side"]:
        mu = torch.sigmoid(self.alpha / _TEMPERATURE)
        return mu * s + (1 - mu) * z


def _gate_gradient(gate: Gate, s: Tensor, z: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """``∂/∂α = μ(1 − μ)/0.1 · Σ_t g ⊙ (s − z)`` per example, summed over channels too where α is one number."""
    mu = torch.sigmoid(gate.alpha / _TEMPERATURE)
    inner = (grad_output * (s - z)).sum(1, dtype=accumulation_dtype(grad_output.dtype))
    if len(gate.alpha) == 1:
        inner = inner.sum(1, keepdim=True)
    return {"alpha": inner * (mu * (1 - mu) / _TEMPERATURE)}


class Sum(nn.Module):
    """The gate that is none: ``s + z``."""

    def forward(self, s: Tensor, z: Tensor) -> Tensor:
        return s + z


class Mix(nn.Module):
    """QST's final mix ``a ⊙ h + (1 − a) ⊙ u``, one a in each channel, a = 1 at the start: exactly the backbone's output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.ones(width))

    def forward(self, h: Float[Tensor, "batch tokens width"], u: Float[Tensor, "batch tokens width"]
                ) -> Float[Tensor, "batch tokens width"]:
        return self.share * h + (1 - self.share) * u


def _mix_gradient(mix: Mix, h: Tensor, u: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """``∂/∂a = Σ_t g ⊙ (h − u)`` per example."""
    return {"share": (grad_output * (h - u)).sum(1, dtype=accumulation_dtype(grad_output.dtype))}


register_rule(Gate, _gate_gradient)
register_rule(Mix, _mix_gradient)


class Pooled(nn.Module):
    """Frozen: the mean of each group of d/r neighbouring channels, times √(d/r), which keeps the variance."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.group = width // side

    def forward(self, h: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens side"]:
        return h.unflatten(-1, (-1, self.group)).mean(-1) * math.sqrt(self.group)


class Orthogonal(nn.Module):
    """Frozen: a random matrix with orthonormal rows, which keeps the variance. Drawn from the public seed ``index``, not stored."""

    def __init__(self, width: int, side: int, index: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(index)
        rows = torch.linalg.qr(torch.randn(width, side, generator=generator, dtype=torch.float64))[0].T
        self.register_buffer("rows", rows.float(), persistent=False)

    def forward(self, h: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens side"]:
        return F.linear(h, self.rows.to(h.dtype))


def downsample(kind: str, width: int, side: int, index: int) -> nn.Module:
    """From width d to side width r: ``learned`` (a linear layer), ``low_rank`` (d to 16 to r), ``pooled``, ``orthogonal``."""
    if kind == "learned":
        return CastLinear(width, side, bias=False)
    if kind == "low_rank":
        return nn.Sequential(CastLinear(width, _LOW_RANK, bias=False), nn.Linear(_LOW_RANK, side, bias=False))
    return Pooled(width, side) if kind == "pooled" else Orthogonal(width, side, index)


class SideBlock(nn.Module):
    """Pre-norm residual block at side width r: an MLP r to 2r to r; ``attention`` puts self-attention before it;
    ``adapter`` narrows to r/4 instead of widening.

    The norms carry no parameters (under noise a scale earns little).
    """

    def __init__(self, side: int, kind: str, heads: int, causal: bool) -> None:
        super().__init__()
        self.causal, self.heads = causal, heads
        inner = max(1, side // 4) if kind == "adapter" else 2 * side
        self.up, self.down = nn.Linear(side, inner), nn.Linear(inner, side)
        if kind == "attention":
            self.qkv, self.mix = nn.Linear(side, 3 * side), nn.Linear(side, side)

    def forward(self, s: Float[Tensor, "batch tokens side"], mask: Tensor | None) -> Float[Tensor, "batch tokens side"]:
        if hasattr(self, "qkv"):
            s = s + self.mix(self._attend(self.qkv(normalise(s)), mask))
        return s + self.down(F.gelu(self.up(normalise(s))))

    def _attend(self, qkv: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal and mask is None)
        return mixed.transpose(1, 2).flatten(2)


def _mlp_weights(modules: tuple[nn.Module, ...], width: int) -> tuple[Tensor, Tensor]:
    """(inner, d) and (d, inner): the backbone MLP's matrices into and out of its inner width."""
    weights = []
    for part in (p for module in modules for p in module.modules()):
        weight = getattr(part, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            weights.append(weight.detach().t() if type(part).__name__ == "Conv1D" else weight.detach())
    into = [w for w in weights if w.shape[1] == width]
    return into[-1 if into[-1].shape[0] != width else -2], next(w for w in reversed(weights) if w.shape[0] == width)


@torch.no_grad()
def start_from_backbone(downs: nn.ModuleList, blocks: nn.ModuleList, mlps: list[tuple[nn.Module, ...]], width: int) -> None:
    """``initial_weights="magnitude"``: a pruned copy of the backbone's MLPs, chosen by its weights alone (LST's structural
    pruning, section 3.3, with the weights' size in the place of Fisher information).

    The r channels are those with the largest sum of squared MLP weights over all tapped blocks; a learned downsample starts
    as the choice of these channels, each side MLP as the rows and columns of its backbone MLP's largest neurons.
    """
    pairs = [_mlp_weights(modules, width) for modules in mlps]
    importance = sum(into.float().square().sum(0) + out.float().square().sum(1) for into, out in pairs)
    side = blocks[0].up.in_features
    channels = importance.topk(side).indices.sort().values
    for down in downs:
        if isinstance(down, nn.Linear):
            down.weight.zero_()[torch.arange(side), channels] = 1
    for block, (into, out) in zip(blocks, pairs):
        neurons = into[:, channels].float().square().sum(1).topk(block.up.out_features).indices
        block.up.weight.copy_(into[neurons][:, channels])
        block.down.weight.copy_(out[channels][:, neurons])
