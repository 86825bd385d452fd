"""`clipping`: no factor lets a norm past the bound, in float32 and at every size."""

import pytest
import torch

from memarc_utils.clipping import CLIPPINGS, STABILITY, check_clipping, clipping_factors


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("max_grad_norm", [1e-3, 0.1, 1.0, 37.5])
def test_never_past_the_bound(clipping, max_grad_norm):
    norms = torch.cat([torch.zeros(1), torch.logspace(-20, 18, 400), torch.tensor([max_grad_norm])])
    contributions = clipping_factors(norms, max_grad_norm, clipping).double() * norms.double()
    assert (contributions <= max_grad_norm * (1 + 1e-6)).all()
    assert contributions.max() >= 0.98 * max_grad_norm  # a factor of zero would be safe and useless


def test_flat_leaves_small_gradients_as_they_are():
    norms = torch.tensor([0.0, 0.3, 1.0])
    assert torch.equal(clipping_factors(norms, 1.0, "flat"), torch.ones(3))


def test_automatic_is_the_formula_of_the_paper():
    """AUTO-S with R=1 and γ=0.01: 1/(‖g‖ + 0.01); small gradients grow, the order of norms stays."""
    norms = torch.tensor([0.0, 0.01, 1.0, 99.99])
    torch.testing.assert_close(clipping_factors(norms, 1.0, "automatic"), torch.tensor([100.0, 50.0, 1 / 1.01, 0.01]))
    assert STABILITY == 0.01


def test_unknown_function_lists_those_that_exist():
    with pytest.raises(ValueError, match="clipping must be one of flat, automatic"):
        check_clipping("per_layer_but_misspelt", 1.0)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("inf"), float("nan")])
def test_bound_must_be_a_positive_number(bound):
    with pytest.raises(ValueError, match="max_grad_norm must be a positive number"):
        clipping_factors(torch.ones(2), bound)
