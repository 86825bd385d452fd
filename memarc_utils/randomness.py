"""Generators whose stream nobody can guess: for noise and for who is in which batch."""

import os
import struct
from collections.abc import Sequence

import torch

# torch's CPU generator is a Mersenne twister: its state is the seed, two counters, the position, 624 words, a kept normal.
_HEADER, _WORDS = "<QiiQ", 624
_STATE_BYTES = 5056


def seed_from_operating_system(generator: torch.Generator) -> torch.Generator:
    """Gives the generator a stream that the operating system chose.

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
