"""`randomness`: the noise of a run cannot be found by trying seeds."""

import torch
from scipy import stats

from memarc_utils.batch_selection import poisson_batches
from memarc_utils.dp_sgd import make_private
from memarc_utils.randomness import seed_from_operating_system
from tests.models import plan_for_tests, private_sgd


def stream(generator, count=8):
    return torch.empty(count).normal_(generator=generator)


def test_torchs_own_seed_has_32_bits_on_a_cpu():
    """The leak: seeds that agree in their low 32 bits give the same noise, so 2^32 trials find it."""
    assert torch.equal(stream(torch.Generator().manual_seed(7)), stream(torch.Generator().manual_seed(7 + 2**32)))


def test_the_stream_does_not_follow_from_the_seed():
    for _ in range(5):
        generator = seed_from_operating_system(torch.Generator())
        seed = generator.initial_seed()
        assert not torch.equal(stream(generator), stream(torch.Generator().manual_seed(seed)))
    states = [seed_from_operating_system(torch.Generator()).get_state() for _ in range(4)]
    words = torch.stack([s.view(torch.int64)[3:627] for s in states])
    assert bool((words >= 0).all()) and bool((words < 2**32).all())
    assert len(words.flatten().unique()) > 0.99 * words.numel()  # every word was drawn


def test_the_stream_is_uniform_and_its_state_can_be_kept():
    generator = seed_from_operating_system(torch.Generator())
    state = generator.get_state()
    sample = torch.rand(20_000, generator=generator, dtype=torch.float64)
    assert stats.kstest(sample.numpy(), "uniform").pvalue > 1e-4
    generator.set_state(state)
    assert torch.equal(torch.rand(20_000, generator=generator, dtype=torch.float64), sample)


def test_noise_and_batches_of_a_run_are_drawn_that_way():
    model = torch.nn.Linear(3, 2)
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=1.0), plan_for_tests(noise_multiplier=1.0))
    batches = poisson_batches([{"x": 0}] * 1000, plan_for_tests())
    for generator in (private.noise_generator, batches.generator):
        seed = generator.initial_seed()
        assert not torch.equal(stream(generator), stream(torch.Generator().manual_seed(seed)))
    assert torch.equal(stream(private_sgd(torch.nn.Linear(3, 2), seed=4).noise_generator), stream(torch.Generator().manual_seed(4)))
