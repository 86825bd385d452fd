"""The suite can fail: each fault below is planted in the engine, and the test that is meant for it no longer passes."""

import math

import pytest
import torch

from memarc_utils import accounting, batch_selection, dp_sgd, grad_sample, layer_rules
from memarc_utils.book_keeping import HeldGradient
from memarc_utils.dp_sgd import PrivateOptimizer
from tests import test_batch_selection, test_book_keeping, test_dp_sgd, test_grad_sample, test_per_layer
from tests.models import CASES


def no_clipping(patch):
    patch.setattr(dp_sgd, "clipping_factors", lambda norms, *_: torch.ones_like(norms))


def clipping_of_the_mean_norm(patch):
    patch.setattr(dp_sgd, "clipping_factors", lambda norms, bound, *_: (bound / norms.mean().clamp_min(bound)).expand(len(norms)))


def noise_without_c(patch):
    patch.setattr(dp_sgd, "contribution_bound", lambda *_: 1.0)


def noise_by_two_thirds(patch):
    patch.setattr(dp_sgd, "contribution_bound", lambda bound, *_: 2 / 3 * bound)


def noise_per_group(patch):
    """C/√G, the bound of one group, instead of C."""
    patch.setattr(dp_sgd, "contribution_bound", lambda bound, _, groups: bound / math.sqrt(groups))


def same_noise_for_every_parameter(patch):
    add = PrivateOptimizer._add_noise

    def rewound(self, total):
        state = self.noise_generator.get_state()
        add(self, total)
        self.noise_generator.set_state(state)

    patch.setattr(PrivateOptimizer, "_add_noise", rewound)


def only_the_last_micro_batch(patch):
    backward = PrivateOptimizer.backward

    def forgetting(self, losses):
        self.sampler.sums = {}
        backward(self, losses)

    patch.setattr(PrivateOptimizer, "backward", forgetting)


def divisor_of_the_batch_at_hand(patch):
    step = PrivateOptimizer.step

    def divided(self):
        size, plan = max(1, self._finite_examples), self.plan
        self._plan = accounting.PrivacyPlan.from_dict({**plan.to_dict(), "expected_batch_size": size})
        step(self)
        self._plan = plan

    patch.setattr(PrivateOptimizer, "step", divided)


def shuffled_instead_of_poisson(patch):
    def draw(self):
        order = torch.randperm(len(self.dataset), generator=self.generator).tolist()
        return order[:self.plan.expected_batch_size]

    patch.setattr(batch_selection.PoissonBatches, "_draw", draw)


def shuffle_accounted_as_poisson(patch):
    patch.setattr(batch_selection, "_check", lambda *_: None)


def no_cross_term(patch):
    patch.setattr(HeldGradient, "_cross_pair_lookup", staticmethod(lambda pair, *_: torch.zeros(len(pair[0]))))


def a_token_left_out_of_the_record(patch):
    record = layer_rules.LinearRule.record.__func__
    patch.setattr(layer_rules.LinearRule, "record", classmethod(
        lambda cls, module, inputs, grad: record(cls, module, [inputs[0][:, 1:]], grad[:, 1:]) if grad.dim() == 3
        else record(cls, module, inputs, grad)))


def no_ghost_of_the_padding_row(patch):
    patch.setattr(layer_rules.EmbeddingRule, "record", staticmethod(
        lambda module, inputs, grad: iter([("weight", "lookup", (inputs[0], grad))])))


def every_layer_its_own_group(patch):
    patch.setattr(grad_sample, "groups_of", lambda modules: {
        member: k for k, m in enumerate(modules) for member in (m, *m.parameters(recurse=False))})


def bypass_not_looked_for(patch):
    patch.setattr(grad_sample.GradSampler, "check_no_grad", lambda self: None)


def a_resume_that_forgets_the_noise(patch):
    load = PrivateOptimizer.load_state_dict

    def loaded(self, state, sampler=None):
        before = self.noise_generator.get_state()
        load(self, state, sampler)
        self.noise_generator.set_state(before)

    patch.setattr(PrivateOptimizer, "load_state_dict", loaded)


def against_a_loop(clipping="flat", case=CASES[0]):
    return lambda: test_dp_sgd.test_clipped_sum_against_a_loop_written_here(case, "book_keeping", clipping)


MUTATIONS = [
    (no_clipping, against_a_loop()),
    (clipping_of_the_mean_norm, against_a_loop()),
    (noise_without_c, lambda: test_dp_sgd.test_noise_is_gaussian_of_deviation_sigma_c_over_b([])),
    (noise_by_two_thirds, lambda: test_dp_sgd.test_noise_is_gaussian_of_deviation_sigma_c_over_b([])),
    (noise_per_group, test_per_layer.test_noise_is_scaled_by_the_whole_bound),
    (same_noise_for_every_parameter, test_dp_sgd.test_noise_is_independent_across_steps_and_parameters),
    (only_the_last_micro_batch, test_dp_sgd.test_micro_batches_never_change_the_step),
    (divisor_of_the_batch_at_hand, lambda: test_dp_sgd.test_divisor_is_the_public_batch_size(9)),
    (shuffled_instead_of_poisson, test_batch_selection.test_poisson_batches_are_poisson),
    (shuffle_accounted_as_poisson, test_batch_selection.test_plans_and_samplers_must_agree),
    (no_cross_term, lambda: test_book_keeping.test_cross_terms_count((0, 1, 1))),
    (no_cross_term, against_a_loop(case=CASES[4])),
    (a_token_left_out_of_the_record, against_a_loop()),
    (no_ghost_of_the_padding_row, lambda: test_grad_sample.test_embedding_against_opacus(0, (4, 6))),
    (every_layer_its_own_group, lambda: test_per_layer.test_clipped_sum_against_groups_written_out(CASES[4], "book_keeping")),
    (bypass_not_looked_for, test_dp_sgd.test_weight_used_through_functional_is_refused),
    (a_resume_that_forgets_the_noise, test_dp_sgd.test_a_run_cut_in_two_is_the_same_run),
]


@pytest.mark.parametrize("fault, test", MUTATIONS, ids=[f"{fault.__name__}-{k}" for k, (fault, _) in enumerate(MUTATIONS)])
def test_a_planted_fault_is_noticed(fault, test, monkeypatch):
    test()
    with monkeypatch.context() as patch:
        fault(patch)
        with pytest.raises((AssertionError, pytest.fail.Exception, ValueError)):
            test()
    test()
