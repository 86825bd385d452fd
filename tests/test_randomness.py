"""`randomness`: the noise of a run cannot be found by trying seeds."""

import pytest
import torch
from scipy import stats

from memarc_utils.batch_selection import poisson_batches
from memarc_utils.dp_sgd import make_private
from memarc_utils.randomness import cryptographic_normals, seed_from_operating_system
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
    assert private.noise_generator is None  # there is no state that could be found
    seed = batches.generator.initial_seed()
    assert not torch.equal(stream(batches.generator), stream(torch.Generator().manual_seed(seed)))
    assert torch.equal(stream(private_sgd(torch.nn.Linear(3, 2), seed=4).noise_generator), stream(torch.Generator().manual_seed(4)))


def test_cryptographic_normals_are_normal():
    for count, dtype in ((200_001, torch.float32), (20_000, torch.float64), (1, torch.float32)):
        sample = cryptographic_normals(count, dtype)
        assert sample.shape == (count,) and sample.dtype == dtype and bool(sample.isfinite().all())
        if count > 1:
            assert stats.kstest(sample.double().numpy(), "norm").pvalue > 1e-4
            assert count < 100_000 or stats.kstest(sample.double().numpy(), "norm", args=(0, 1.03)).pvalue < 1e-3
    first, second = cryptographic_normals(100_000), cryptographic_normals(100_000)
    assert abs(float((first * second).mean())) < 0.02 and abs(float((first[:50_000] * first[50_000:]).mean())) < 0.03
    assert abs(float((first[:50_000].square() * first[50_000:].square()).mean()) - 1) < 0.06  # the two halves of Box and Muller


def test_the_ends_of_the_uniforms_are_finite(monkeypatch):
    for byte in (b"\x00", b"\xff"):
        monkeypatch.setattr("memarc_utils.randomness.ssl.RAND_bytes", lambda n, byte=byte: byte * n)
        for dtype in (torch.float32, torch.float64):
            assert bool(cryptographic_normals(6, dtype).isfinite().all())


@pytest.mark.parametrize("noise", ["gaussian", "secure"])
@pytest.mark.parametrize("width", [3, 1100])
def test_the_default_noise_has_the_plans_deviation(noise, width):
    """An empty step is noise alone, sigma C / B on each entry; torch's generators are not touched."""
    model, plan = torch.nn.Linear(width, 1000, bias=False), plan_for_tests(noise_multiplier=1.5, max_grad_norm=0.7)
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=1.0), plan, noise=noise)
    before, state = model.weight.detach().clone(), torch.get_rng_state()
    private.step()
    moved = (before - model.weight.detach()).double().flatten().numpy()
    deviation = 1.5 * 0.7 / plan.expected_batch_size
    assert stats.kstest(moved, "norm", args=(0, deviation)).pvalue > 1e-4
    assert torch.equal(torch.get_rng_state(), state)


def test_two_runs_from_one_state_have_other_noise():
    """The cryptographic generator has no state: what a checkpoint is resumed into twice cannot be subtracted."""
    def resumed():
        torch.manual_seed(0)
        model = torch.nn.Linear(30, 20)
        private = make_private(model, torch.optim.SGD(model.parameters(), lr=1.0), plan_for_tests(noise_multiplier=1.0))
        if states:
            private.load_state_dict(states[0])
        private.step()
        states.append(private.state_dict())
        return model.weight.detach().clone()

    states = []
    _, second, third = resumed(), resumed(), resumed()
    assert states[0]["noise_generator"] is None and float((second - third).abs().min()) > 0
