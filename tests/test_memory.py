"""`memory`: the measured peak is the one that can be counted by hand, and comes out the same every time."""

import pytest
import torch
from torch import nn

from memarc_utils.memory import StepCost, measure_step
from tests.models import plan_for_tests, private_sgd

KILO = 1000  # float32 numbers: 4,000 bytes


def two_then_one():
    first = torch.ones(KILO)
    second = torch.ones(2 * KILO)
    del first
    third = torch.ones(KILO // 2)
    return second, third


def kept(store=[]):
    store.clear()
    store.append(torch.ones(5 * KILO))


@pytest.mark.parametrize("step, want", [
    (lambda: None, 0),
    (lambda: torch.ones(KILO), 4_000),
    (lambda: torch.ones(KILO, dtype=torch.float64), 8_000),
    (lambda: torch.ones(KILO) + torch.ones(KILO), 12_000),
    (lambda: torch.ones(KILO).add_(torch.ones(KILO)), 8_000),
    (two_then_one, 12_000),
    (lambda: [torch.ones(KILO) for _ in range(7)], 28_000),
    (lambda: [torch.ones(KILO).sum() for _ in range(7)], 4_000 + 7 * 4),
], ids=["nothing", "one", "float64", "sum", "in place", "released in between", "seven kept", "seven released"])
def test_peaks_that_can_be_counted(step, want):
    assert measure_step(step, repeats=1).peak_bytes == pytest.approx(want, abs=30)


def test_what_stood_before_is_not_counted():
    """An edit in place takes nothing; what replaces 5,000 older numbers takes 5,000."""
    standing = torch.ones(10 * KILO)
    assert measure_step(lambda: standing.mul_(2), repeats=1).peak_bytes <= 30
    assert measure_step(kept, repeats=1).peak_bytes == pytest.approx(20_000, abs=30)


def test_saved_activations_are_counted():
    """y = tanh(tanh(x)): two outputs are kept for the backward pass, and one gradient runs beside the last of them."""
    x = torch.ones(KILO, requires_grad=True)

    def step():
        torch.tanh(torch.tanh(x)).sum().backward()
        x.grad = None

    peak = measure_step(step, repeats=1).peak_bytes
    assert 2 * 4_000 <= peak <= 4 * 4_000 + 100


def private_step(mode, micro_batches=1, width=128):
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(width, width), nn.Tanh())))
    private, x = private_sgd(model, plan_for_tests(num_steps=100), mode=mode), torch.randn(16, 4, width)

    def step():
        for _ in range(micro_batches):
            private.backward(model(x).square().mean((1, 2)))
        private.step()

    return step


def test_measurements_repeat_exactly():
    step = private_step("book_keeping")
    first, second = measure_step(step, repeats=3), measure_step(step, repeats=3)
    assert first.peak_bytes == second.peak_bytes > 0
    assert first.seconds > 0 and first.peak_megabytes == first.peak_bytes / 1e6


def test_book_keeping_needs_less_than_per_example_gradients():
    """16 examples of a 128 × 128 weight in three layers: 3.1 MB of gradients against pairs of 4 · 256 numbers."""
    plain, book_keeping = (measure_step(private_step(mode), repeats=1).peak_bytes
                           for mode in ("per_example", "book_keeping"))
    assert plain > 3 * 16 * 128 * 128 * 4 and book_keeping < 0.5 * plain


def test_micro_batches_do_not_pile_up():
    """Between micro-batches one clipped sum is held and no activation: four cost what one costs, plus that sum."""
    one, four = (measure_step(private_step("book_keeping", n), repeats=1).peak_bytes for n in (1, 4))
    clipped_sum = 3 * (128 * 128 + 128) * 4
    assert four <= one + 1.1 * clipped_sum


def test_repeats_must_be_positive():
    with pytest.raises(ValueError, match="repeats must be >= 1, got 0"):
        measure_step(lambda: None, repeats=0)
    assert StepCost(2_000_000, 0.5).peak_megabytes == 2.0
