"""`training`: losses one per example, loops that train and account, evaluation, seeds."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memarc_utils import training
from memarc_utils.accounting import PrivacyPlan
from memarc_utils.adapters import add_lora, select_linear_probe
from memarc_utils.batch_selection import pad_rows, poisson_batches
from memarc_utils.dp_sgd import make_private, verify_sensitivity
from memarc_utils.side_network import SideNetworkConfig, attach_side_network
from memarc_utils.training import (accuracy, causal_lm_losses, classification_losses, parameter_groups, progress, setup,
                                   train_by_forward_passes, train_privately, train_without_privacy)
from tests.models import CASE_IDS, CASES, padded_batch, plain_losses, seeded, shake, tiny

DECODERS = [case for case in CASES if case[1] == "causal_lm"]
DECODER_IDS = [name for name, case in zip(CASE_IDS, CASES) if case in DECODERS]


def separable(count=40):
    """Class 1 has token 60 somewhere, class 0 token 50: learnt in a few steps."""
    generator = seeded(1)
    rows = []
    for i in range(count):
        ids = torch.randint(3, 40, (4 + i % 4,), generator=generator).tolist()
        ids[i % 4] = 60 if i % 2 else 50
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": i % 2})
    return rows


def plan_of(**changes):
    return PrivacyPlan(**{**dict(dataset_size=40, expected_batch_size=20, num_steps=15, noise_multiplier=0.0,
                                 max_grad_norm=1.0,
                                 delta=1e-3), **changes})


# ------------------------------------------------------------------------------------------------------------- losses
def test_classification_losses_are_cross_entropy():
    model = tiny("bert", num_labels=3)
    batch = padded_batch(model)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    by_hand = [-float(row.log_softmax(-1)[label]) for row, label in zip(logits, batch["labels"])]
    losses = classification_losses(model, batch)
    assert losses.tolist() == pytest.approx(by_hand, rel=1e-5) and losses.requires_grad


@pytest.mark.parametrize("tokens_at_once", [1, 2, 64])
@pytest.mark.parametrize("case", DECODERS, ids=DECODER_IDS)
def test_chunked_causal_losses_equal_whole_logits(case, tokens_at_once):
    """In value and in the gradient of every parameter; with the model's own padded labels."""
    model = shake(tiny(*case))
    batch = padded_batch(model, "causal_lm")
    want, got = plain_losses(model, batch), causal_lm_losses(model, batch, tokens_at_once)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    parameters = list(model.parameters())
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5])
    for one, other in zip(*(torch.autograd.grad(losses @ weights, parameters) for losses in (want, got))):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_chunks_never_hold_all_logits():
    model = tiny("llama", "causal_lm", False)
    sizes = []
    model.lm_head.register_forward_hook(lambda m, a, out: sizes.append(out.shape[1]))
    losses = causal_lm_losses(model, padded_batch(model, "causal_lm", tokens=9), tokens_at_once=3)
    assert sizes == [3, 3, 2]  # eight positions predict a next token
    losses.sum().backward()
    assert max(sizes) == 3 and len(sizes) == 6  # and again in the backward pass


def test_chunks_hold_64_mebibytes_of_logits_by_default(monkeypatch):
    """4 examples, 101 words: as many positions as fit, at least one."""
    assert 4 * training._LOGITS_AT_ONCE == 2**26
    model, sizes = tiny("llama", "causal_lm", False), []
    model.lm_head.register_forward_hook(lambda m, a, out: sizes.append(out.shape[1]))
    batch = padded_batch(model, "causal_lm", tokens=9)
    for numbers, want in ((3 * 4 * 101, [3, 3, 2]), (5 * 4 * 101 - 1, [4, 4]), (1, [1] * 8), (training._LOGITS_AT_ONCE, [8])):
        monkeypatch.setattr(training, "_LOGITS_AT_ONCE", numbers)
        sizes.clear()
        causal_lm_losses(model, batch)
        assert sizes == want


def test_causal_losses_are_means_over_ones_own_tokens():
    """Trap 5: a mean over the batch's tokens would scale one example's loss by its neighbours' lengths."""
    model = tiny("gpt2", "causal_lm", False)
    long, short = list(range(5, 17)), list(range(20, 23))
    def losses(*texts):
        return causal_lm_losses(model, pad_rows([{"input_ids": t, "labels": t} for t in texts]))
    torch.testing.assert_close(losses(short, long)[0], losses(short, short)[0], rtol=1e-5, atol=1e-6)


def test_causal_losses_without_targets_are_zero():
    model = tiny("gpt2", "causal_lm", False)
    batch = padded_batch(model, "causal_lm")
    batch["labels"][1] = -100
    losses = causal_lm_losses(model, batch)
    assert float(losses[1]) == 0.0 and torch.isfinite(losses).all()
    one_token = {name: t[:, :1] for name, t in batch.items()}
    assert causal_lm_losses(model, one_token).tolist() == [0.0] * 4


@pytest.mark.parametrize("how", ["all", "lora", "side"])
@pytest.mark.parametrize("case", DECODERS, ids=DECODER_IDS)
def test_chunked_losses_keep_the_promise(case, how):
    """The engine sees the head several times, recomputed during the backward pass."""
    model = tiny(*case, layers=1)
    model = {"all": lambda m: m, "lora": add_lora,
             "side": lambda m: attach_side_network(m, SideNetworkConfig(4, heads=2))}[how](model)
    report = verify_sensitivity(shake(model), lambda m, b: causal_lm_losses(m, b, tokens_at_once=3),
                                padded_batch(model, "causal_lm", batch=3), max_grad_norm=0.1)
    assert report.holds, report


# --------------------------------------------------------------------------------------------------------------- loops
def test_private_training_is_the_loop_of_the_readme():
    """`train_privately` and the loop written out end at the same weights and the same ε."""
    results = []
    for route in ("package", "by hand"):
        model = tiny("bert", hidden=16, layers=1)
        plan, optimizer = plan_of(num_steps=4, noise_multiplier=1.0), torch.optim.SGD(model.parameters(), lr=0.5)
        if route == "package":
            private = train_privately(model, separable(), plan, optimizer, clipping="flat", physical_batch_size=8,
                                      sampling_generator=seeded(2), noise_generator=seeded(3))
        else:
            private = make_private(model, optimizer, plan, noise_generator=seeded(3))
            for step, batch in enumerate(poisson_batches(separable(), plan, physical_batch_size=8,
                                                         generator=seeded(2))):
                optimizer.param_groups[0]["lr"] = 0.5 * (1 - step / 4)  # the learning rate falls linearly to zero
                for micro_batch in batch:
                    private.backward(classification_losses(model, micro_batch))
                private.step()
            private.detach()
        results.append((torch.cat([p.detach().flatten() for p in model.parameters()]), private.epsilon(),
                        private.steps_taken))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert results[0][1:] == results[1][1:] == (plan_of(num_steps=4, noise_multiplier=1.0).epsilon(), 4)


@pytest.mark.parametrize("clipping, noise_multiplier", [("flat", 0.0), ("automatic", 0.0), ("flat", 200.0)])
def test_private_training_learns_without_noise_and_not_with_much(clipping, noise_multiplier):
    model, plan = tiny("bert", hidden=16, layers=1), plan_of(noise_multiplier=noise_multiplier)
    private = train_privately(model, separable(), plan, torch.optim.AdamW(model.parameters(), lr=0.03),
                              clipping=clipping,
                              sampling_generator=seeded(4), noise_generator=seeded(5))
    assert private.steps_taken == 15 and not model.training
    assert all("forward" not in vars(m) and not m._forward_pre_hooks for m in model.modules())
    rate = accuracy(model, separable())
    assert rate >= 0.95 if noise_multiplier == 0 else rate < 0.8


@pytest.mark.parametrize("noise_multiplier", [0.0, 1000.0])
def test_training_by_forward_passes_learns_without_noise_and_not_with_much(noise_multiplier):
    model, rows = select_linear_probe(tiny()), separable()
    plan = plan_of(num_steps=60, noise_multiplier=noise_multiplier)
    made = train_by_forward_passes(model, rows, plan, 3.0, num_directions=8, sampling_generator=seeded(2), noise_generator=seeded(3),
                                   direction_seed_generator=seeded(4), physical_batch_size=7)
    assert made.steps_taken == 60 and made.epsilon() == plan.epsilon() and made.learning_rate == pytest.approx(3 / 60)
    assert not model.training
    assert (accuracy(model, rows) > 0.9) == (noise_multiplier == 0)


def test_a_failing_loss_gives_the_plain_model_back():
    model = tiny("bert", hidden=16, layers=1)

    def failing(model, batch):
        raise RuntimeError("no such loss")

    with pytest.raises(RuntimeError, match="no such loss"):
        train_privately(model, separable(), plan_of(), torch.optim.SGD(model.parameters(), lr=0.1), failing)
    assert all("forward" not in vars(m) and not m._forward_pre_hooks for m in model.modules())


def test_training_pads_with_the_models_own_token():
    """GPT-2 finds the last real token by its pad token: the loops must not pad with another one."""
    model = tiny("gpt2", hidden=16, layers=1)
    model.config.pad_token_id = 99
    seen = set()

    def spy(model, batch):
        seen.update(batch["input_ids"][batch["attention_mask"] == 0].tolist())
        return classification_losses(model, batch)

    train_privately(model, separable(), plan_of(num_steps=2), torch.optim.SGD(model.parameters(), lr=0.1), spy,
                    sampling_generator=seeded(6))
    train_without_privacy(model, separable(), torch.optim.SGD(model.parameters(), lr=0.1), spy, num_epochs=1)
    assert seen == {99}


def test_plain_training_learns():
    model = tiny("bert", hidden=16, layers=1)
    returned = train_without_privacy(model, separable(), torch.optim.AdamW(model.parameters(), lr=0.03), batch_size=10,
                                     num_epochs=5,
                                     generator=seeded(7))
    assert returned is model and not model.training and accuracy(model, separable()) >= 0.95
    assert all(p.grad is None for p in model.parameters())


def test_accuracy_counts():
    class Constant(nn.Module):
        config = type("Config", (), {"pad_token_id": 0})()

        def __init__(self):
            super().__init__()
            self.seen, self.weight = [], nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, attention_mask):
            assert not self.training and not torch.is_grad_enabled()
            self.seen += attention_mask.sum(1).tolist()
            return type("Output", (), {"logits": F.one_hot(torch.ones(len(input_ids), dtype=torch.long), 2).float()})()

    model = Constant().train()
    rows = [{"input_ids": [3] * (1 + i % 5), "labels": int(i % 4 == 0)} for i in range(21)]
    assert accuracy(model, rows, batch_size=4) == 6 / 21
    assert sorted(model.seen) == sorted(1 + i % 5 for i in range(21)) and model.training


def test_parameter_groups_hold_everything_once():
    model = add_lora(tiny("bert"))
    names = {p: name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 1e-3, 5e-3)
    assert {group["lr"] for group in groups} == {1e-3, 5e-3}
    for group in groups:
        assert all(("lora_A" in names[p]) <= (group["lr"] == 1e-3) for p in group["params"])
        assert all(("lora_B" in names[p] or "classifier" in names[p]) <= (group["lr"] == 5e-3) for p in group["params"])
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len(set(held)) and set(held) == {p for p in model.parameters() if p.requires_grad}
    assert {group["lr"] for group in parameter_groups(model, 1e-3)} == {1e-3}
    torch.optim.AdamW(parameter_groups(nn.Linear(2, 2), 1e-3))
    side = attach_side_network(tiny("bert"), SideNetworkConfig(reduction=4, gate="vector"))
    names = {p: name for name, p in side.named_parameters()}
    slow = {names[p] for group in parameter_groups(side, 1e-3, 5e-3) if group["lr"] == 1e-3 for p in group["params"]}
    assert {name for name in names.values() if name.endswith("alpha")} <= slow  # gates start at zero, and nothing waits for them


def test_setup_seeds_everything_and_says_so(capsys):
    draws = []
    for _ in range(2):
        device = setup(seed=5)
        draws.append((random.random(), np.random.rand(), float(torch.rand(()))))
    assert draws[0] == draws[1] and isinstance(device, torch.device)
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert all(part in line for part in ("Python", "torch", "transformers", "opacus", "seed 5", str(device)))


def test_progress_is_silent_where_nobody_looks(monkeypatch, capsys):
    monkeypatch.setenv("MEMARC_HEADLESS", "1")
    assert list(progress(range(3), "steps")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("MEMARC_HEADLESS")
    assert list(progress(range(3), "steps")) == [0, 1, 2]
    assert "steps" in capsys.readouterr().err


def test_losses_that_meet_behind_a_detach_are_refused():
    """Weights by the share of all losses: no gradient shows that it is the batch's. Half of the rows have other losses alone."""
    def by_hardness(model, batch):
        each = classification_losses(model, batch)
        return each * (each.detach() / each.detach().sum())

    model = shake(tiny())
    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="the losses mix examples"):
        train_privately(model, separable(), plan_of(), torch.optim.SGD(model.parameters(), lr=0.1), by_hardness)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), weights))
