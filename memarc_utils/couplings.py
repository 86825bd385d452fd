"""Couplings: how one layer of a pre-trained transformer becomes a step that can be undone.

Every coupling takes two streams of the full width d through the same two additions, and undoes them in reverse order::

    y1 = λ x1 + F(x2)          x2 = (y2 − G(y1)) / β
    y2 = β x2 + G(y1)          x1 = (y1 − F(x2)) / λ

With `swap` the next layer reads (y2, y1). F and G are a block of the backbone, a half of one, or a small adapter:

| coupling | λ | β | F | G | output | source |
|---|---|---|---|---|---|---|
| ``meft1`` | 0.1 | 1 | block | adapter | mean of both | MEFT, arXiv 2306.00477, section 3.3 |
| ``meft2`` | 1 | 0.1 | adapter | block | mean | likewise |
| ``meft3`` | 0.1 | 0.1 | attention half | MLP half | mean, no swap | likewise |
| ``midpoint`` | 1 | 1 | 2 (block(x) − x) | none | last | leapfrog, arXiv 2512.02056 |
| ``bdia`` | γ | 1 | (1 + γ) block(x) − 2γ x | none | last | BDIA, arXiv 2407.09093, γ kept positive |
| ``lossless`` | γ | 1 | block(x) − γ x | none | last | ours |

The last three are one recurrence, ``h_{n+1} = λ h_{n−1} + F(h_n)``. Dividing by λ multiplies the error that a stream carries by
1/λ a layer. ``bdia`` and ``lossless`` take λ = 2⁻ᵏ and hold their streams as whole multiples of 2⁻³⁰ (2⁻⁴⁰ where the blocks compute
in float64, so that finite differences see a smooth function): then what λ h_{n−1} loses
is exactly its k lowest bits. They are kept (k bits a number a layer, 32 / k times less than the number itself) and the inverse
is exact at any depth, as long as a block that is computed twice gives the same numbers. A backward pass that reaches the first
layer checks that it did.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

_PUBLISHED = {"meft1": (0.1, 1.0), "meft2": (1.0, 0.1), "meft3": (0.1, 0.1), "midpoint": (1.0, 1.0), "bdia": (0.5, 1.0),
              "lossless": (1 / 16, 1.0)}
COUPLINGS = tuple(_PUBLISHED)
FIXED_POINT = ("bdia", "lossless")
_BITS = (1, 2, 4, 8)  # they fill a byte without a rest
_GRID = 2.0**-30  # float64 holds multiples of it exactly up to 2²² = 4 million
_FINE_GRID = 2.0**-40  # likewise, up to 2¹² = 4096
_FLOAT32 = 6e-8  # its rounding
_STEEP = 1.25  # what a block multiplies an error of its input by, as random blocks of BERT, GPT-2 and Llama were measured to
# The largest expected reconstruction error that is let through. A kernel may round an example's numbers differently in a batch of another
# size; an inverse that magnifies this would make one example's presence move the others' gradients, and the sum by more than C. That was
# seen where the error had passed 1e-2 (notebook 23, section 7); the forecast can be 33 times too hopeful (42, section 7): room for both.
_WORST_ERROR = 1e-5


@dataclass(frozen=True)
class ReversibleConfig:
    """Settings of a reversible network.

    Attributes:
        coupling: see the table in `couplings`; ``lossless`` starts next to the pre-trained model and is undone exactly.
        coefficients: (λ, β); None takes the table's. ``bdia`` and ``lossless``: λ one of 1/2, 1/4, 1/16, 1/256.
        segment: layers between stored streams; None stores the last ones alone. The error starts anew in each segment.
        stream_dtype: ``float32`` or ``float64``, of the two streams; blocks compute in their own dtype. None takes float64,
            which costs two streams of one layer.
        adapter_width: bottleneck width of MEFT's adapters (N(0, 0.02²) at the start); 0 leaves them out.

    Raises:
        ValueError: a setting that is not known, or that cannot work at any depth.
    """

    coupling: str = "lossless"
    coefficients: Sequence[float] | None = None
    segment: int | None = None
    stream_dtype: str | None = None
    adapter_width: int = 0

    def __post_init__(self) -> None:
        if self.coupling not in COUPLINGS:
            raise ValueError(f"coupling must be one of {', '.join(COUPLINGS)}, got {self.coupling!r}")
        if self.stream_dtype not in (None, "float32", "float64"):
            raise ValueError(f"stream_dtype must be 'float32' or 'float64', got {self.stream_dtype!r}: the inverse of a half-precision "
                             "stream loses everything within a few layers. Blocks may compute in bfloat16 all the same")
        if self.coefficients is not None:
            self._check_coefficients()
        if self.coupling in FIXED_POINT and self.stream_dtype == "float32":
            raise ValueError(f"{self.coupling} holds its streams as multiples of 2^-30, for which float32 has too few digits: take "
                             "stream_dtype='float64'")
        if self.segment is not None and (isinstance(self.segment, bool) or not isinstance(self.segment, int) or self.segment < 1):
            raise ValueError(f"segment must be a whole number of layers >= 1, or None for the whole depth, got {self.segment!r}")
        if isinstance(self.adapter_width, bool) or not isinstance(self.adapter_width, int) or self.adapter_width < 0:
            raise ValueError(f"adapter_width must be a whole number >= 0, got {self.adapter_width!r}")
        if self.adapter_width and self.coupling not in ("meft1", "meft2"):
            raise ValueError(f"{self.coupling} has no adapter of its own: leave adapter_width at 0 and add adapters to the model "
                             "(add_bottleneck_adapters, add_lora)")

    def _check_coefficients(self) -> None:
        values = self.coefficients
        if not isinstance(values, Sequence) or len(values) != 2 or not all(isinstance(c, (int, float)) and 0 < c <= 1 for c in values):
            raise ValueError(f"coefficients must be (λ, β), both above 0 and at most 1, got {values!r}")
        if self.coupling == "midpoint" and tuple(values) != (1.0, 1.0):
            raise ValueError(f"midpoint has the coefficients (1, 1) by its definition, got {values!r}: leave them out")
        allowed = [2.0**-k for k in _BITS]
        if self.coupling in FIXED_POINT and (values[1] != 1 or values[0] not in allowed):
            raise ValueError(f"{self.coupling} needs the coefficients (λ, 1) with λ one of {allowed}, got {values!r}")
        object.__setattr__(self, "coefficients", (float(values[0]), float(values[1])))

    @property
    def lambda_and_beta(self) -> tuple[float, float]:
        return self.coefficients or _PUBLISHED[self.coupling]

    @property
    def swap(self) -> bool:
        """Whether the streams change places after each layer."""
        return self.coupling != "meft3"

    @property
    def bits(self) -> int:
        """Kept of each number of a stream, a layer; 0 where nothing is."""
        return round(-math.log2(self.lambda_and_beta[0])) if self.coupling in FIXED_POINT else 0

    @property
    def dtype(self) -> torch.dtype:
        """Of the streams."""
        return torch.float32 if self.stream_dtype == "float32" else torch.float64

    def expected_error(self, num_layers: int) -> float:
        """Relative reconstruction error at the far end of a segment, by the growth of rounding alone.

        The inverse's two lines with errors in place of streams, all of one sign: ``e2 = (e2 + J_G e1)/β``, ``e1 = (e1 + J_F e2)/λ``.
        They start at the streams' rounding; J is what a block multiplies an error of its input by. Unless λ and β are powers of
        two, a few numbers near the embeddings lie halfway between two of float32, and a block is computed at another point:
        in the lowest 4 layers 6e-8 is added. Fixed-point streams: 0.

        >>> f"{ReversibleConfig('meft1', stream_dtype='float32').expected_error(6):.0e}"
        '5e-01'
        >>> ReversibleConfig().expected_error(1000)
        0.0
        """
        if self.bits:
            return 0.0
        (lam, beta), depth = self.lambda_and_beta, min(self.segment or num_layers, num_layers)
        of_f, of_g = {"meft1": (_STEEP, 0), "meft2": (0, _STEEP), "meft3": (_STEEP, _STEEP), "midpoint": (2, 0)}[self.coupling]
        halfway = not all(math.log2(c).is_integer() for c in (lam, beta))
        e1 = e2 = _FLOAT32 if self.dtype == torch.float32 else 1.1e-16
        for n in range(depth):
            moved = _FLOAT32 if halfway and 0 < n and depth - n <= 4 else 0
            e2 = (e2 + (of_g * e1 + moved if of_g else 0)) / beta
            e1 = (e1 + (of_f * e2 + moved if of_f else 0)) / lam
            if self.swap:
                e1, e2 = e2, e1
        return max(e1, e2)

    def check_depth(self, num_layers: int) -> None:
        """Raises:
            ValueError: the inverse of this many layers could not be told from noise; names settings that work.
        """
        if self.expected_error(num_layers) <= _WORST_ERROR:
            return
        changed = [f"{name}={default}" for name, default in (("coefficients", None), ("stream_dtype", None), ("adapter_width", 0))
                   if getattr(self, name) not in (default, "float64")]
        ways = ["coupling='lossless'" + (f" with {', '.join(changed)}" if changed else "")]
        for dtype in dict.fromkeys((self.stream_dtype, "float64")):
            works = [n for n in range(1, num_layers + 1)
                     if replace(self, segment=n, stream_dtype=dtype).expected_error(n) <= _WORST_ERROR]
            if works:
                ways.append(f"segment={max(works)}" + (f" with stream_dtype={dtype!r}" if dtype != self.stream_dtype else ""))
                break
        raise ValueError(f"{self.coupling} with coefficients {self.lambda_and_beta} and {str(self.dtype).split('.')[-1]} streams loses its "
                         f"inverse over {min(self.segment or num_layers, num_layers)} layers (relative error about "
                         f"{self.expected_error(num_layers):.0e}): take {', or '.join(ways)}, or larger coefficients")


# ------------------------------------------------------------------------------------------------- streams of fixed point
def grid_of(dtype: torch.dtype) -> float:
    """What the streams of blocks that compute in this dtype are multiples of."""
    return _FINE_GRID if dtype == torch.float64 else _GRID


def to_grid(x: Float[Tensor, "..."], grid: float = _GRID) -> Float[Tensor, "..."]:
    """The nearest multiple of the grid, in float64."""
    return x.double().div_(grid).round_().mul_(grid) if x.dtype != torch.float64 else x.div(grid).round_().mul_(grid)


def split_bits(x: Float[Tensor, "..."], bits: int, grid: float = _GRID) -> tuple[Float[Tensor, "..."], UInt8[Tensor, " bytes"]]:
    """``2⁻ᵏ x``, rounded down to the grid, and the k bits that this loses, packed.

    >>> x = to_grid(torch.tensor([1.0, -0.3, 7.123]))
    >>> scaled, lost = split_bits(x, 2)
    >>> bool((join_bits(scaled, lost, 2) == x).all()), lost.numel()
    (True, 1)
    """
    units = x / grid
    high = torch.floor(units * 2.0**-bits)
    low = units.sub_(high * 2.0**bits)
    return high.mul_(grid), _pack(low.to(torch.uint8), bits)


def join_bits(scaled: Float[Tensor, "..."], lost: UInt8[Tensor, " bytes"], bits: int, grid: float = _GRID) -> Float[Tensor, "..."]:
    """What `split_bits` was given, in the memory of ``scaled``."""
    return scaled.mul_(2.0**bits).add_(_unpack(lost, bits, scaled.shape).to(scaled.dtype), alpha=grid)


def _pack(values: Tensor, bits: int) -> Tensor:
    each = 8 // bits
    flat = values.flatten()
    if rest := -len(flat) % each:
        flat = torch.cat([flat, flat.new_zeros(rest)])
    packed = flat.new_zeros(len(flat) // each)
    for place, part in enumerate(flat.view(-1, each).unbind(1)):
        packed |= part << (place * bits)
    return packed


def _unpack(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    values = (packed[:, None] >> places) & (2**bits - 1)
    return values.flatten()[:math.prod(shape)].view(shape)
