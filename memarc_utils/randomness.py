"""Random numbers that nobody can guess: noise by a cryptographic generator, and generators of who is in which batch.

A statistical generator is no source of noise, however it was seeded: what it gave tells what it will give. torch's Mersenne twister
is linear over the field of two elements, so weights that one noisy step has moved, with a few hundred coordinates whose gradient is
known to be zero (rows of an embedding that no text of the batch uses), give its whole state and with it the rest of the noise. Draws
of batches stay hidden, since nobody sees them.
"""

import math
import os
import ssl
import struct
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

# torch's CPU generator is a Mersenne twister: its state is the seed, two counters, the position, 624 words, a kept normal.
_HEADER, _WORDS = "<QiiQ", 624
_STATE_BYTES = 5056


def cryptographic_normals(count: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, " count"]:
    """Standard normals on the CPU, by Box and Muller from OpenSSL's generator (AES-256 in counter mode, keyed by the operating system).

    ``√(−2 ln u) (cos 2πv, sin 2πv)`` with u of 64 bits, which end at 9.49 deviations: of 32 they would end at 6.76, and what lies beyond
    that is more than a run's δ where many parameters train. v has 32 bits, 64 for float64. Nothing is kept: there is no state to save,
    and no number can be drawn twice. Takes 12 bytes a value for a moment, 16 for float64.

    Args:
        dtype: float32 or float64, the types that sums are kept in.

    >>> cryptographic_normals(3).shape
    torch.Size([3])
    """
    pairs, wide = -(-count // 2), dtype == torch.float64
    real, words, bits = (np.float64, np.uint64, 64) if wide else (np.float32, np.uint32, 32)
    drawn = ssl.RAND_bytes(pairs * (8 + bits // 8))
    radius = np.frombuffer(drawn, np.uint64, pairs).astype(np.float64)
    angle = np.frombuffer(drawn, words, pairs, 8 * pairs).astype(real)
    del drawn
    radius += 0.5  # never 0
    radius *= 2.0**-64
    np.log(radius, out=radius)
    radius *= -2
    radius = np.sqrt(radius, out=radius).astype(real, copy=False)
    angle *= real(2 * math.pi * 2.0**-bits)
    normals = np.empty(2 * pairs, real)
    for part, function in ((normals[:pairs], np.cos), (normals[pairs:], np.sin)):
        function(angle, out=part)
        part *= radius
    return torch.from_numpy(normals[:count])


def hide_dropout(device: torch.device) -> None:
    """Seeds torch's global generators by the operating system. The bound of C holds for given masks of dropout; they are drawn row by
    row, so one example less gives all those after it others, and who knows the seed knows the masks. Unknown ones are as good as the
    same ones: the others' masks have the same law with the example and without it."""
    seed_from_operating_system(torch.default_generator)
    if device.type == "cuda":
        torch.cuda.seed_all()


def check_generator(name: str, generator: object, secret: bool = True) -> None:
    """Raises:
        ValueError: no generator, or one of torch's global ones. Of a secret one that was never seeded a warning is given.
    """
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise ValueError(f"{name} must be a torch.Generator or None, got {type(generator).__name__}")
    if any(generator is one for one in (torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ()))):
        raise ValueError(f"{name} is torch's global generator, which others draw from and re-seed: pass None, or one of its own")
    if secret and generator.initial_seed() == torch.Generator().initial_seed():
        warnings.warn(f"{name} was never seeded: torch gives every new generator the same public seed, so what it draws can be computed and "
                      "subtracted. Pass None", stacklevel=5)


def seed_from_operating_system(generator: torch.Generator) -> torch.Generator:
    """Gives the generator a stream that the operating system chose; for draws that nobody sees.

    ``generator.seed()`` alone is not enough on a CPU: the Mersenne twister is filled from 32 bits of the seed, and who sees
    a few values of noise can try all 4·10⁹ of them. So its 624 words are drawn themselves. On CUDA the key has 64 bits.

    Returns:
        The same generator.

    >>> first, second = (seed_from_operating_system(torch.Generator()) for _ in range(2))
    >>> bool((torch.rand(4, generator=first) == torch.rand(4, generator=second)).any())
    False
    """
    generator.seed()
    if generator.device.type != "cpu":
        return generator
    return _with_words(generator, struct.unpack(f"<{_WORDS}I", os.urandom(4 * _WORDS)))


def _with_words(generator: torch.Generator, words: Sequence[int]) -> torch.Generator:
    state = bytearray(generator.get_state().numpy().tobytes())
    assert len(state) == _STATE_BYTES and struct.unpack_from(_HEADER, state)[1:] == (1, 1, 0), "torch changed its state's form"
    struct.pack_into(f"<{_WORDS}Q", state, struct.calcsize(_HEADER), *words)
    generator.set_state(torch.frombuffer(state, dtype=torch.uint8).clone())
    return generator


def spawn(generator: torch.Generator, count: int) -> list[torch.Generator]:
    """Independent streams that several threads can draw from at once: their whole states are drawn from ``generator``.

    >>> [g.device.type for g in spawn(torch.Generator().manual_seed(0), 2)]
    ['cpu', 'cpu']
    """
    words = torch.randint(2**32, (count, _WORDS), generator=generator, dtype=torch.int64)
    return [_with_words(torch.Generator().manual_seed(0), row) for row in words.tolist()]
