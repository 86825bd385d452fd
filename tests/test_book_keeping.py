"""`book_keeping`: norms and weighted sums of every mixture of contributions against sums written out in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memarc_utils import book_keeping
from memarc_utils.book_keeping import (HeldGradient, lookup_norms_squared, keep_pair, pair_gradient,
                                       pair_norms_squared)
from tests.models import seeded

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def random_contributions(batch, rows, columns, tokens, num_dense, num_pairs, num_lookups, seed, dtype=torch.float64):
    generator = seeded(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    dense = [normal(batch, rows, columns) for _ in range(num_dense)]
    pairs = [(normal(batch, tokens + k, rows), normal(batch, tokens + k, columns)) for k in range(num_pairs)]
    lookups = [(torch.randint(0, rows, (batch, tokens + k), generator=generator), normal(batch, tokens + k, columns))
               for k in range(num_lookups)]
    return dense, pairs, lookups


def written_out(dense, pairs, lookups, batch, rows, columns):
    """The per-example gradients, one product at a time."""
    gradients = torch.zeros(batch, rows, columns, dtype=torch.float64)
    for i in range(batch):
        for part in dense:
            gradients[i] += part[i].double()
        for left, right in pairs:
            for t in range(left.shape[1]):
                gradients[i] += torch.outer(left[i, t].double(), right[i, t].double())
        for indices, values in lookups:
            for t in range(indices.shape[1]):
                gradients[i, indices[i, t]] += values[i, t].double()
    return gradients


def held_of(dense, pairs, lookups, shape, dense_only=False, bookkeeping="memory"):
    parts = [*dense, *(left for left, _ in pairs), *(values for _, values in lookups)]
    held = HeldGradient(torch.Size(shape), parts[0].dtype, bookkeeping, dense_only)
    for part in dense:
        held.add_dense(part)
    for pair in pairs:
        held.add_pair(*pair)
    for lookup in lookups:
        held.add_lookup(*lookup)
    return held


def numbers_held(held):
    return sum(t.numel() for t in held.tensors())


shapes = dict(batch=st.integers(1, 4), rows=st.integers(1, 9), columns=st.integers(1, 9), tokens=st.integers(1, 5),
              num_dense=st.integers(0, 2), num_pairs=st.integers(0, 2), num_lookups=st.integers(0, 2),
              seed=st.integers(0, 9))


@few
@given(dense_only=st.booleans(), **shapes)
def test_any_mixture_has_the_norm_and_the_sum_of_its_total(batch, rows, columns, tokens, num_dense, num_pairs,
                                                           num_lookups, seed, dense_only):
    if num_dense + num_pairs + num_lookups == 0:
        num_dense = 1
    parts = random_contributions(batch, rows, columns, tokens, num_dense, num_pairs, num_lookups, seed)
    want = written_out(*parts, batch, rows, columns)
    held = held_of(*parts, (rows, columns), dense_only)

    torch.testing.assert_close(held.squares().squared, want.flatten(1).square().sum(1), rtol=1e-9, atol=1e-9)
    factors = torch.linspace(0.2, 1.0, batch, dtype=torch.float64)
    keep = torch.arange(batch) != 1
    total = torch.ones(rows, columns, dtype=torch.float64)
    held.add_weighted_sum(total, factors, keep)
    torch.testing.assert_close(total, 1 + torch.einsum("b,brc->rc", factors * keep, want), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(held.add_weighted_sum(None, factors, keep), total - 1, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kinds", [(1, 1, 0), (1, 0, 1), (0, 1, 1), (0, 2, 0), (0, 0, 2), (2, 2, 2)])
def test_cross_terms_count(kinds):
    """The squared norm of a sum is not the sum of squared norms: without cross terms a tied weight is clipped too
    little."""
    parts = random_contributions(3, 12, 11, 2, *kinds, seed=5)
    held = held_of(*parts, (12, 11))
    # nothing was made dense on the way
    assert bool(held.pairs) == (kinds[1] > 0) and bool(held.lookups) == (kinds[2] > 0)
    want = written_out(*parts, 3, 12, 11).flatten(1).square().sum(1)
    apart = sum(written_out([d], [], [], 3, 12, 11).flatten(1).square().sum(1) for d in parts[0])
    apart += sum(written_out([], [p], [], 3, 12, 11).flatten(1).square().sum(1) for p in parts[1])
    apart += sum(written_out([], [], [x], 3, 12, 11).flatten(1).square().sum(1) for x in parts[2])
    torch.testing.assert_close(held.squares().squared, want, rtol=1e-10, atol=0)
    assert ((apart - want).abs() > 1e-3 * want).any()


@few
@given(batch=st.integers(1, 3), rows=st.integers(1, 12), columns=st.integers(1, 12), tokens=st.integers(1, 12),
       seed=st.integers(0, 9))
def test_pair_and_lookup_norms_by_either_way(batch, rows, columns, tokens, seed):
    """Gram matrices where T(p + d) ≤ pd, the gradient itself elsewhere: the shapes drawn here meet both."""
    _, [(left, right)], [(indices, values)] = random_contributions(batch, rows, columns, tokens, 0, 1, 1, seed)
    torch.testing.assert_close(pair_norms_squared(left, right), pair_gradient(left, right).square().sum((1, 2)),
                               rtol=1e-9, atol=1e-9)
    want = written_out([], [], [(indices, values)], batch, rows, columns).square().sum((1, 2))
    torch.testing.assert_close(lookup_norms_squared(indices, values), want, rtol=1e-9, atol=1e-9)


def test_slices_change_nothing(monkeypatch):
    parts = random_contributions(5, 20, 30, 4, 0, 1, 1, seed=3)
    whole = held_of(*parts, (20, 30)).squares().squared
    monkeypatch.setattr(book_keeping, "_SLICE_ELEMENTS", 1)
    torch.testing.assert_close(held_of(*parts, (20, 30)).squares().squared, whole, rtol=1e-12, atol=0)


def test_holds_whichever_is_smaller():
    """LoRA with r=8, d=1024, T=128: 8,192 numbers an example instead of 147,456; a full weight keeps the pair."""
    left, right = torch.zeros(2, 128, 8), torch.zeros(2, 128, 1024)
    held = held_of([], [(left, right)], [], (8, 1024))
    assert numbers_held(held) == 2 * 8 * 1024 and not held.pairs
    left = torch.zeros(2, 128, 1024)
    held = held_of([], [(left, right)], [], (1024, 1024))
    assert numbers_held(held) == 2 * 128 * 2048 and held.dense is None
    reference = held_of([], [(left, right)], [], (1024, 1024), dense_only=True)
    assert numbers_held(reference) == 2 * 1024 * 1024 and not reference.pairs
    assert keep_pair(1024, 1024, 512) and not keep_pair(1024, 1024, 513)


def test_holds_whichever_has_fewer_bytes():
    """A learned downsample of 1,024 to 128 at T = 128 with its input in bfloat16: 327,680 bytes as a pair, 524,288 as the gradient, though
    the pair has more numbers. Norm and sum are those of the same numbers in float32."""
    generator = seeded(3)
    left, right = torch.randn(2, 128, 128, generator=generator), torch.randn(2, 128, 1024, generator=generator).bfloat16()
    pair, dense = (held_of([], [(left, r)], [], (128, 1024)) for r in (right, right.float()))
    assert pair.pairs and sum(t.nbytes for t in pair.tensors()) == 2 * 327_680
    assert not dense.pairs and sum(t.nbytes for t in dense.tensors()) == 2 * 524_288
    torch.testing.assert_close(pair.squares().squared, dense.squares().squared, rtol=1e-5, atol=0)
    factors = torch.tensor([0.5, 2.0])
    torch.testing.assert_close(pair.add_weighted_sum(None, factors), dense.add_weighted_sum(None, factors), rtol=1e-5, atol=1e-4)
    assert not keep_pair(1, 1, 2, number_bytes=(8, 8)) and keep_pair(2, 2, 1, number_bytes=(8, 8))  # float64 gradients are float64


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_example_outside_keep_adds_exactly_nothing(bad):
    dense, pairs, lookups = random_contributions(3, 12, 11, 2, 1, 1, 1, seed=2)
    for tensor in (dense[0], *pairs[0], lookups[0][1]):
        tensor[1] = bad
    want = written_out([d[[0, 2]] for d in dense], [(a[[0, 2]], b[[0, 2]]) for a, b in pairs],
                       [(i[[0, 2]], v[[0, 2]]) for i, v in lookups], 2, 12, 11).sum(0)
    total = torch.zeros(12, 11, dtype=torch.float64)
    held_of(dense, pairs, lookups, (12, 11)).add_weighted_sum(total, torch.ones(3), torch.tensor([True, False, True]))
    torch.testing.assert_close(total, want, rtol=1e-10, atol=1e-10)


def test_low_precision_is_accumulated_in_float32():
    """4,096 equal bfloat16 terms: adding up in bfloat16 stops at 256."""
    ones = torch.ones(1, 4096, 1, dtype=torch.bfloat16)
    held = held_of([], [(ones, ones)], [(torch.zeros(1, 4096, dtype=torch.long), ones)], (1, 1))
    assert held.squares().squared.dtype == torch.float32
    assert float(held.squares().squared) == 8192.0**2
    total = torch.zeros(1, 1)
    held.add_weighted_sum(total, torch.ones(1), torch.tensor([True]))
    assert float(total) == 8192.0


@pytest.mark.parametrize("kind",
                         ["pair", "lookup", "pair and dense", "lookup and dense", "pair and lookup", "two pairs"])
def test_cancellation_is_noticed_and_measured_in_float64(kind):
    """Two terms of norm ~1e5 cancel to ~1: Gram matrices in float32 know the difference only to ±30, and a norm that is
    measured as 0 leaves the example unclipped. The parts' sum of squares tells, and float64 still knows the norm."""
    generator = seeded(11)
    for _ in range(10):
        left, right = torch.randn(1, 1, 64, generator=generator), torch.randn(1, 1, 64, generator=generator) * 1e3
        off = right * (1 + 1e-5 * torch.randn(1, 1, 64, generator=generator))
        unit = torch.eye(64)[None, :1]  # the row that a lookup of index 0 adds to
        zero = torch.zeros(1, 1, dtype=torch.long)
        dense, pairs, lookups = {
            "pair": ([], [(torch.cat([left, -left], 1), torch.cat([right, off], 1))], []),
            "two pairs": ([], [(left, right), (-left, off)], []),
            "pair and dense": ([-pair_gradient(left, off)], [(left, right)], []),
            "lookup": ([], [], [(torch.zeros(1, 2, dtype=torch.long), torch.cat([right, -off], 1))]),
            "lookup and dense": ([-pair_gradient(unit, off)], [], [(zero, right)]),
            "pair and lookup": ([], [(-unit, off)], [(zero, right)])}[kind]
        held = held_of(dense, pairs, lookups, (64, 64))
        want = float(written_out(dense, pairs, lookups, 1, 64, 64).square().sum())
        _, orthogonal, aligned = (float(bound) for bound in held.squares())
        assert want < 1e-6 * orthogonal and want < 1e-6 * aligned**2
        assert float(held.squares(torch.float64).squared) == pytest.approx(want, rel=1e-3)


def test_a_gram_matrix_is_used_again_only_for_the_very_same_tokens():
    """Query, key and value read one input; another slice, view, precision or tensor gets a matrix of its own."""
    generator = seeded(4)
    x, wide = torch.randn(3, 2, 40, generator=generator), torch.randn(3, 2, 80, generator=generator)
    grads = [torch.randn(3, 2, 50, generator=generator) for _ in range(6)]
    pairs = [(grads[0], x), (grads[1], x), (grads[2], x.flip(0)), (grads[3], wide[..., :40]), (grads[4], wide[..., 40:]), (x, grads[5])]
    for precision in (torch.float32, torch.float64):
        for limit in (2**22, 1):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(book_keeping, "_SLICE_ELEMENTS", limit)
                grams = book_keeping.Grams()
                for left, right in pairs:
                    got = book_keeping.pair_squares(left, right, precision, grams).squared
                    want = torch.einsum("btr,btc->brc", left.double(), right.double()).square().sum((1, 2))
                    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
