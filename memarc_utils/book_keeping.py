"""What must be held of one parameter's per-example gradients until the clipping factors are known.

One parameter collects contributions from every place where it was used. Each comes in one of three forms, for B examples:

* dense: the per-example gradients themselves, ``(B, *shape)``;
* pair: ``left (B, T, rows)`` and ``right (B, T, columns)`` whose gradient is ``left_iᵀ right_i`` (a matrix product's weight);
* lookup: ``indices (B, T)`` and ``values (B, T, columns)`` that the gradient adds up row by row (an embedding's weight).

The squared norm of the *sum* of all contributions is exact: it has the cross terms between them, so a weight that is used
twice (tied embedding and head, a layer called in a loop) is clipped by the norm of its whole gradient. Sources: ghost norm
arXiv 2110.05679 and 2205.10683; book-keeping 2210.00038; the cross term of tied weights is a gather of the head's
gradient at the looked-up rows.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Temporary tensors of the norm rules are cut into slices of at most this many elements (128 MiB in float32).
_SLICE_ELEMENTS = 2**25


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Norms and sums are accumulated in float32, in float64 if the gradients are float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(tensor: Tensor, at_least: torch.dtype = torch.float32) -> Tensor:
    return tensor.to(torch.promote_types(accumulation_dtype(tensor.dtype), at_least))


def _slices(batch: int, elements_per_example: int):
    step = max(1, _SLICE_ELEMENTS // max(1, elements_per_example))
    for start in range(0, batch, step):
        yield slice(start, min(batch, start + step))


def pair_is_smaller(rows: int, columns: int, tokens: int) -> bool:
    """Whether the pair (T·(rows + columns) numbers an example) is smaller than the gradient (rows·columns).

    >>> pair_is_smaller(8, 1024, 128), pair_is_smaller(1024, 1024, 128)
    (False, True)
    """
    return tokens * (rows + columns) <= rows * columns


def pair_gradient(left: Float[Tensor, "batch tokens rows"], right: Float[Tensor, "batch tokens columns"]
                  ) -> Float[Tensor, "batch rows columns"]:
    """Per-example gradients ``left_iᵀ right_i``, accumulated in float32 or wider."""
    return torch.bmm(_wide(left).transpose(1, 2), _wide(right))


def pair_norms_squared(left: Float[Tensor, "batch tokens rows"], right: Float[Tensor, "batch tokens columns"],
                       precision: torch.dtype = torch.float32) -> Float[Tensor, " batch"]:
    """``‖left_iᵀ right_i‖²``, by Gram matrices (``Σ_st (l_s·l_t)(r_s·r_t)``, T²(rows+columns) operations) or by the
    gradient itself (T·rows·columns), whichever costs less; neither keeps more than a slice of examples at a time."""
    batch, tokens, rows = left.shape
    columns = right.shape[2]
    ghost = tokens * (rows + columns) <= rows * columns
    parts = []
    for part in _slices(batch, 2 * tokens * tokens if ghost else rows * columns):
        left_part, right_part = _wide(left[part], precision), _wide(right[part], precision)
        if ghost:
            gram_left = torch.bmm(left_part, left_part.transpose(1, 2))
            gram_right = torch.bmm(right_part, right_part.transpose(1, 2))
            parts.append(gram_left.mul_(gram_right).sum((1, 2)))
        else:
            parts.append(pair_gradient(left_part, right_part).square_().sum((1, 2)))
    return torch.cat(parts).clamp_min_(0)


def lookup_norms_squared(indices: Int[Tensor, "batch tokens"], values: Float[Tensor, "batch tokens columns"],
                         precision: torch.dtype = torch.float32) -> Float[Tensor, " batch"]:
    """``Σ_st 1[x_s = x_t] ⟨v_s, v_t⟩`` per example."""
    parts = []
    for part in _slices(len(indices), 2 * indices.shape[1] ** 2):
        wide = _wide(values[part], precision)
        gram = torch.bmm(wide, wide.transpose(1, 2))
        same = indices[part, :, None] == indices[part, None, :]
        parts.append((gram * same).sum((1, 2)))
    return torch.cat(parts).clamp_min_(0)


class HeldGradient:
    """All contributions to one parameter's per-example gradients during one backward pass.

    Args:
        shape: the parameter's shape.
        dense_only: keep per-example gradients whatever they cost (the reference mode).
    """

    def __init__(self, shape: torch.Size, dense_only: bool = False) -> None:
        self.shape = shape
        self.dense_only = dense_only
        self.dense: Tensor | None = None
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.lookups: list[tuple[Tensor, Tensor]] = []

    def add_dense(self, gradients: Float[Tensor, "batch ..."]) -> None:
        gradients = _wide(gradients)
        self.dense = gradients if self.dense is None else self.dense + gradients

    def add_pair(self, left: Float[Tensor, "batch tokens rows"], right: Float[Tensor, "batch tokens columns"]) -> None:
        """Holds the pair or its gradient, whichever has fewer numbers: T·(rows + columns) against rows·columns."""
        if self.dense_only or not pair_is_smaller(left.shape[2], right.shape[2], left.shape[1]):
            self.add_dense(pair_gradient(left, right))
        else:
            self.pairs.append((left, right))

    def add_lookup(self, indices: Int[Tensor, "batch tokens"], values: Float[Tensor, "batch tokens columns"]) -> None:
        if self.dense_only:
            dense = torch.zeros(len(indices), *self.shape, dtype=accumulation_dtype(values.dtype), device=values.device)
            self.add_dense(dense.scatter_add_(1, indices[..., None].expand_as(values), _wide(values)))
        else:
            self.lookups.append((indices, values))

    def _merge(self) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
        """Several pairs are one pair with more tokens, Σ_k l_kᵀ r_k = [l_1; l_2]ᵀ[r_1; r_2]; lookups likewise."""
        for kind in (self.pairs, self.lookups):
            if len(kind) > 1:
                kind[:] = [(torch.cat([first for first, _ in kind], 1), torch.cat([second for _, second in kind], 1))]
        return (self.pairs or [None])[0], (self.lookups or [None])[0]

    def numbers_held(self) -> int:
        """How many numbers are held (index tensors counted too)."""
        tensors = [t for couple in self.pairs + self.lookups for t in couple]
        return sum(t.numel() for t in tensors) + (0 if self.dense is None else self.dense.numel())

    def norms_squared(self, precision: torch.dtype = torch.float32) -> Float[Tensor, " batch"]:
        """Squared norm of each example's whole gradient of this parameter, with all cross terms."""
        pair, lookup = self._merge()
        dense = None if self.dense is None else self.dense.to(torch.promote_types(self.dense.dtype, precision))
        total = 0
        if dense is not None:
            total = total + dense.flatten(1).square().sum(1)
        if pair is not None:
            total = total + pair_norms_squared(*pair, precision)
        if lookup is not None:
            total = total + lookup_norms_squared(*lookup, precision)
        if pair is not None and lookup is not None:
            total = total + 2 * self._cross_pair_lookup(pair, lookup, precision)
        if dense is not None and pair is not None:
            left, right = (_wide(t, precision) for t in pair)
            total = total + 2 * (torch.bmm(left, dense) * right).sum((1, 2))
        if dense is not None and lookup is not None:
            indices, values = lookup
            rows = dense.gather(1, indices[..., None].expand(-1, -1, self.shape[1]))
            total = total + 2 * (rows * _wide(values, precision)).sum((1, 2))
        return total.clamp_min(0)

    def squares_without_cancellation(self) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """What the squared norm would be if the tokens' contributions were orthogonal, ``Σ_t w_t²``, and if they all
        pointed one way, ``(Σ_t w_t)²``, with ``w_t = ‖l_t‖ ‖r_t‖``. A norm far below the first came out of cancellation,
        where float32 has lost digits; below 1e-5 of the second, float32 cannot tell it from rounding."""
        sizes = [] if self.dense is None else [self.dense.flatten(1).square().sum(1, keepdim=True).sqrt()]
        sizes += [(_wide(left).square().sum(2) * _wide(right).square().sum(2)).sqrt() for left, right in self.pairs]
        sizes += [_wide(values).square().sum(2).sqrt() for _, values in self.lookups]
        w = torch.cat(sizes, 1)
        return w.square().sum(1), w.sum(1).square()

    @staticmethod
    def _cross_pair_lookup(pair: tuple[Tensor, Tensor], lookup: tuple[Tensor, Tensor], precision: torch.dtype
                           ) -> Float[Tensor, " batch"]:
        """``⟨leftᵀ right, Σ_s e_{x_s} v_sᵀ⟩ = Σ_{t,s} left[t, x_s] ⟨right_t, v_s⟩``: a gather, no (rows × columns) matrix."""
        (left, right), (indices, values) = pair, lookup
        parts = []
        for part in _slices(len(indices), 2 * left.shape[1] * indices.shape[1]):
            products = torch.bmm(_wide(right[part], precision), _wide(values[part], precision).transpose(1, 2))
            picked = left[part].gather(2, indices[part, None, :].expand(-1, left.shape[1], -1))
            parts.append((products * picked).sum((1, 2)))
        return torch.cat(parts)

    def add_weighted_sum(self, total: Float[Tensor, "..."], factors: Float[Tensor, " batch"], keep: Bool[Tensor, " batch"]
                         ) -> None:
        """Adds ``Σ_i factors_i · gradient_i`` to ``total`` in place; examples outside ``keep`` add exactly nothing,
        even where their numbers are not finite (0·inf would be nan, so they are overwritten and not multiplied)."""
        factors = factors.to(total.dtype)
        if self.dense is not None:
            dense = self.dense.flatten(1).masked_fill(~keep[:, None], 0).to(total.dtype)
            total += (factors @ dense).view_as(total)
        weight, mask = factors[:, None, None], ~keep[:, None, None]
        for left, right in self.pairs:
            left = (left.to(total.dtype) * weight).masked_fill_(mask, 0)
            right = right.to(total.dtype).masked_fill(mask, 0)
            total.addmm_(left.flatten(0, 1).t(), right.flatten(0, 1))
        for indices, values in self.lookups:
            values = (values.to(total.dtype) * weight).masked_fill_(mask, 0)
            total.index_add_(0, indices.flatten(), values.flatten(0, 1))
