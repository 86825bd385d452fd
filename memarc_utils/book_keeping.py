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

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

BOOKKEEPINGS = ("memory", "mixopt")
# Temporary tensors of the norm rules are cut into slices of at most this many elements (16 MiB in float32).
_SLICE_ELEMENTS = 2**22


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Norms and sums are accumulated in float32, in float64 if the gradients are float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def holds_data(tensor: Tensor) -> bool:
    """False for meta and fake tensors, of which only shapes are known: nothing may depend on their values."""
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)


def _wide(tensor: Tensor, at_least: torch.dtype = torch.float32) -> Tensor:
    return tensor.to(torch.promote_types(accumulation_dtype(tensor.dtype), at_least))


def _slices(batch: int, elements_per_example: int):
    step = max(1, _SLICE_ELEMENTS // max(1, elements_per_example))
    for start in range(0, batch, step):
        yield slice(start, min(batch, start + step))


def keep_pair(rows: int, columns: int, tokens: int, bookkeeping: str = "memory", number_bytes: tuple[int, int] = (4, 4)) -> bool:
    """Whether a matrix product's record is held as the pair (left, right), or as the per-example gradient.

    ``memory``: whichever has fewer bytes an example. In float32 that is T·(rows + columns) against rows·columns numbers; a pair in
    bfloat16 has half the bytes, and gradients are float32 at least. The operations of the norm compare as the numbers do,
    T²·(rows + columns) by Gram matrices against T·rows·columns.
    ``mixopt``: the rule of BK-MixOpt (2210.00038, section 3.2), the pair where 2T² <= rows·columns.

    Args:
        number_bytes: of one number of left and of right.

    >>> keep_pair(8, 1024, 128), keep_pair(1024, 1024, 128)
    (False, True)
    >>> keep_pair(64, 1024, 128), keep_pair(64, 1024, 128, "mixopt")  # T·(rows + columns) is twice rows·columns
    (False, True)
    >>> keep_pair(128, 1024, 128), keep_pair(128, 1024, 128, number_bytes=(4, 2))  # 147,456 numbers against 131,072
    (False, True)
    """
    if bookkeeping == "mixopt":
        return 2 * tokens * tokens <= rows * columns
    return tokens * (rows * number_bytes[0] + columns * number_bytes[1]) <= max(4, *number_bytes) * rows * columns


def pair_gradient(left: Float[Tensor, "batch tokens rows"], right: Float[Tensor, "batch tokens columns"]
                  ) -> Float[Tensor, "batch rows columns"]:
    """Per-example gradients ``left_iᵀ right_i``, accumulated in float32 or wider."""
    left, right = _wide(left), _wide(right)
    dtype = torch.promote_types(left.dtype, right.dtype)
    return torch.bmm(left.transpose(1, 2).to(dtype), right.to(dtype))


class Squares(NamedTuple):
    """Squared norms and what they would be without cancellation, each (B,).

    With ``w_t = ‖l_t‖ ‖r_t‖`` the size of one token's contribution: ``orthogonal = Σ_t w_t²`` is the squared norm if the
    contributions stood at right angles, ``aligned = Σ_t w_t`` the norm if all pointed one way. A norm far below the first
    came out of cancellation, where float32 has lost digits; one below 1e-5 of the second cannot be told from rounding.
    """

    squared: Tensor
    orthogonal: Tensor
    aligned: Tensor


def _squares(gram: Float[Tensor, "batch tokens tokens"]) -> Squares:
    """From the Gram matrix of the tokens' contributions, whose diagonal holds the w_t²."""
    diagonal = gram.diagonal(dim1=1, dim2=2).clamp_min(0)
    return Squares(gram.sum((1, 2)), diagonal.sum(1), diagonal.sqrt().sum(1))


def _joined(parts: list[Squares]) -> Squares:
    return parts[0] if len(parts) == 1 else Squares(*(torch.cat(column) for column in zip(*parts)))


class Grams:
    """Gram matrices ``(B, T, T)`` of tokens; the last pair's are kept, since query, key and value read one input."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, slice, Tensor]] = []

    def of_pair(self, left: Tensor, right: Tensor, part: slice, precision: torch.dtype) -> tuple[Tensor, Tensor]:
        grams = tuple(self._find(tensor, part, precision) for tensor in (left, right))
        self._kept = [(tensor, part, gram) for tensor, gram in zip((left, right), grams)]
        return grams

    def _find(self, tensor: Tensor, part: slice, precision: torch.dtype) -> Tensor:
        for other, slice_, gram in self._kept:
            same = holds_data(tensor) and other.data_ptr() == tensor.data_ptr() and other.stride() == tensor.stride()
            if same and other.shape == tensor.shape and slice_ == part and gram.dtype == _wide(tensor[:0], precision).dtype:
                return gram
        wide = _wide(tensor[part], precision)
        return torch.bmm(wide, wide.transpose(1, 2))


def pair_squares(left: Float[Tensor, "batch tokens rows"], right: Float[Tensor, "batch tokens columns"],
                 precision: torch.dtype = torch.float32, grams: Grams | None = None) -> Squares:
    """Of ``‖left_iᵀ right_i‖²``, by Gram matrices (``Σ_st (l_s·l_t)(r_s·r_t)``, T²(rows+columns) operations) or by the
    gradient itself (T·rows·columns), whichever costs less; neither keeps more than a slice of examples at a time."""
    (batch, tokens, rows), columns = left.shape, right.shape[2]
    ghost, grams, parts = keep_pair(rows, columns, tokens), grams or Grams(), []
    for part in _slices(batch, 2 * tokens * tokens if ghost else rows * columns):
        if ghost:
            gram_left, gram_right = grams.of_pair(left, right, part, precision)
            parts.append(_squares(gram_left * gram_right))
        else:
            left_part, right_part = _wide(left[part], precision), _wide(right[part], precision)
            w = torch.linalg.vector_norm(left_part, dim=2) * torch.linalg.vector_norm(right_part, dim=2)
            squared = pair_gradient(left_part, right_part).square_().sum((1, 2))
            parts.append(Squares(squared, w.square().sum(1), w.sum(1)))
    return _joined(parts)


def lookup_squares(indices: Int[Tensor, "batch tokens"], values: Float[Tensor, "batch tokens columns"],
                   precision: torch.dtype = torch.float32) -> Squares:
    """Of ``Σ_st 1[x_s = x_t] ⟨v_s, v_t⟩`` per example."""
    parts = []
    for part in _slices(len(indices), 2 * indices.shape[1] ** 2):
        wide = _wide(values[part], precision)
        gram = torch.bmm(wide, wide.transpose(1, 2))
        parts.append(_squares(gram.mul_(indices[part, :, None] == indices[part, None, :])))
    return _joined(parts)


def pair_norms_squared(left: Float[Tensor, "batch tokens rows"], right: Float[Tensor, "batch tokens columns"],
                       precision: torch.dtype = torch.float32) -> Float[Tensor, " batch"]:
    """``‖left_iᵀ right_i‖²`` per example: the ghost norm of a matrix product's weight."""
    return pair_squares(left, right, precision).squared.clamp_min(0)


def lookup_norms_squared(indices: Int[Tensor, "batch tokens"], values: Float[Tensor, "batch tokens columns"],
                         precision: torch.dtype = torch.float32) -> Float[Tensor, " batch"]:
    """``Σ_st 1[x_s = x_t] ⟨v_s, v_t⟩`` per example: the ghost norm of an embedding's weight."""
    return lookup_squares(indices, values, precision).squared.clamp_min(0)


class HeldGradient:
    """All contributions to one parameter's per-example gradients during one backward pass.

    Args:
        shape: the parameter's shape.
        dtype: the parameter's type.
        bookkeeping: what is held of a matrix product, see `keep_pair`.
        dense_only: keep per-example gradients whatever they cost (the reference mode).
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, bookkeeping: str = "memory", dense_only: bool = False) -> None:
        self.shape, self.dtype, self.bookkeeping, self.dense_only = shape, dtype, bookkeeping, dense_only
        self._versions: list[tuple[Tensor, int]] = []
        self.dense: Tensor | None = None
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.lookups: list[tuple[Tensor, Tensor]] = []

    def add_dense(self, gradients: Float[Tensor, "batch ..."]) -> None:
        gradients = _wide(gradients)
        self.dense = gradients if self.dense is None else self.dense + gradients

    def add_pair(self, left: Float[Tensor, "batch tokens rows"], right: Float[Tensor, "batch tokens columns"]) -> None:
        """Holds the pair or its gradient, as `keep_pair` says."""
        number_bytes = (left.element_size(), right.element_size())
        if self.dense_only or not keep_pair(left.shape[2], right.shape[2], left.shape[1], self.bookkeeping, number_bytes):
            self.add_dense(pair_gradient(left, right))
        else:
            self.pairs.append((left, right))
            self._versions += [(t, t._version) for t in (left, right)]

    def add_lookup(self, indices: Int[Tensor, "batch tokens"], values: Float[Tensor, "batch tokens columns"]) -> None:
        """Holds the looked-up rows' gradients, or the whole table's where that is smaller (token types, relative positions)."""
        if self.dense_only or self.shape.numel() <= indices.shape[1] * (self.shape[1] + 1):
            dense = torch.zeros(len(indices), *self.shape, dtype=accumulation_dtype(values.dtype), device=values.device)
            self.add_dense(dense.scatter_add_(1, indices[..., None].expand_as(values), _wide(values)))
        else:
            self.lookups.append((indices, values))
            self._versions += [(t, t._version) for t in (indices, values)]

    def was_written(self) -> bool:
        """Whether a held tensor was changed in place since: an operation below wrote into the gradient that it was given."""
        return any(tensor._version != version for tensor, version in self._versions)

    def _merge(self) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
        """Several pairs are one pair with more tokens, Σ_k l_kᵀ r_k = [l_1; l_2]ᵀ[r_1; r_2]; lookups likewise."""
        for kind in (self.pairs, self.lookups):
            if len(kind) > 1:
                kind[:] = [(torch.cat([first for first, _ in kind], 1), torch.cat([second for _, second in kind], 1))]
        return (self.pairs or [None])[0], (self.lookups or [None])[0]

    def tensors(self) -> list[Tensor]:
        """What is held. A layer's input may stand in several records (query, key and value read the same one)."""
        return [t for couple in self.pairs + self.lookups for t in couple] + ([] if self.dense is None else [self.dense])

    def squares(self, precision: torch.dtype = torch.float32, grams: Grams | None = None) -> Squares:
        """Squared norm of each example's whole gradient of this parameter, with all cross terms; ``grams`` carries what the
        next parameter may need again."""
        pair, lookup = self._merge()
        dense = None if self.dense is None else self.dense.to(torch.promote_types(self.dense.dtype, precision))
        parts = []
        if dense is not None:
            norms = torch.linalg.vector_norm(dense.reshape(len(dense), -1), dim=1)
            parts.append(Squares(norms.square(), norms.square(), norms))
        if pair is not None:
            parts.append(pair_squares(*pair, precision, grams))
        if lookup is not None:
            parts.append(lookup_squares(*lookup, precision))
        squared, orthogonal, aligned = (sum(column) for column in zip(*parts))
        if pair is not None and lookup is not None:
            squared = squared + 2 * self._cross_pair_lookup(pair, lookup, precision)
        if dense is not None and pair is not None:
            left, right = (_wide(t, precision) for t in pair)
            squared = squared + 2 * (torch.bmm(left, dense) * right).sum((1, 2))
        if dense is not None and lookup is not None:
            indices, values = lookup
            rows = dense.gather(1, indices[..., None].expand(-1, -1, self.shape[1]))
            squared = squared + 2 * (rows * _wide(values, precision)).sum((1, 2))
        return Squares(squared, orthogonal, aligned)

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

    def add_weighted_sum(self, total: Float[Tensor, "..."] | None, factors: Float[Tensor, " batch"],
                         keep: Bool[Tensor, " batch"] | None = None, dtype: torch.dtype | None = None) -> Float[Tensor, "..."]:
        """``total + Σ_i factors_i · gradient_i``, in place where there is a total; examples outside ``keep`` (None: all are
        in) add exactly nothing, even where their numbers are not finite (0·inf would be nan, so they are overwritten).
        ``dtype`` is that of a new total, the accumulation type by default."""
        dtype = (dtype or accumulation_dtype(self.dtype)) if total is None else total.dtype
        factors = factors.to(dtype)

        def kept(tensor: Tensor) -> Tensor:
            tensor = tensor.to(dtype)
            return tensor if keep is None else tensor.masked_fill(~keep.view(-1, *[1] * (tensor.dim() - 1)), 0)

        for left, right in self.pairs:
            left, right = kept(left), kept(right)
            if left.shape[2] <= right.shape[2]:  # the smaller one is copied
                left = left * factors[:, None, None]
            else:
                right = right * factors[:, None, None]
            left, right = left.flatten(0, 1).t(), right.flatten(0, 1)
            total = left @ right if total is None else total.addmm_(left, right)
        if self.dense is not None:
            weighted = (factors @ kept(self.dense.reshape(len(factors), -1))).view(self.shape)
            total = weighted if total is None else total.add_(weighted)
        for indices, values in self.lookups:
            if total is None:
                total = torch.zeros(self.shape, dtype=dtype, device=values.device)
            total.index_add_(0, indices.flatten(), (kept(values) * factors[:, None, None]).flatten(0, 1))
        return total
