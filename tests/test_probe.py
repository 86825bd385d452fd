"""When the engine looks for examples that meet, and what a look without gradients sees and does not mistake."""

import warnings
from collections import UserDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memarc_utils import probe
from memarc_utils.adapters import add_lora, train_everything
from memarc_utils.probe import LossProbe, Schedule
from memarc_utils.reversible import make_reversible
from memarc_utils.training import causal_lm_losses
from memarc_utils.zeroth_order import make_zeroth_order
from tests.models import padded_batch, plain_losses, plan_for_tests, private_sgd, seeded, tiny


def x_of(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def looks(steps, monkeypatch=None, chance=None):
    if chance is not None:
        monkeypatch.setattr(probe, "_CHANCE", chance)
    schedule, found = Schedule(), []
    for step in range(1, steps + 1):
        if schedule.due:
            found.append(step)
            schedule.due = False
        schedule.next_step()
    return found


# ------------------------------------------------------------------------------------------------------------- when
def test_steps_that_are_looked_at(monkeypatch):
    powers = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
    found = [looks(3000) for _ in range(3)]
    for each in found:
        assert set(powers) <= set(each)
        assert 5 < len(each) - len(powers) < 90  # 3,000/64 ± 6 deviations
    assert len({tuple(each) for each in found}) == 3  # nobody can know them
    assert looks(3000, monkeypatch, chance=0) == powers


def test_a_step_in_which_nothing_could_be_seen_is_put_off(monkeypatch):
    monkeypatch.setattr(probe, "_CHANCE", 0)
    schedule = Schedule()
    for _ in range(5):  # empty batches
        schedule.next_step()
    assert schedule.due
    schedule.due = False
    schedule.next_step()
    assert schedule.due  # step 2
    off = Schedule(on=False)
    off.next_step()
    assert not off.due


def test_a_loss_that_begins_to_mix_later_is_found_before_the_next_power_of_two(monkeypatch):
    """After step 65 that is 128: with a look in one of 16 steps one comes before, but for one run in 50."""
    monkeypatch.setattr(probe, "_CHANCE", 1 / 16)
    caught = []
    for _ in range(6):
        model = nn.Linear(3, 2)
        private = private_sgd(model, plan_for_tests(noise_multiplier=1.0, num_steps=200), lr=1e-3)
        for step in range(1, 128):
            losses = model(x_of(4, 3, seed=step)).square().sum(1)
            try:
                private.backward(losses + losses.mean() if step > 65 else losses)
                private.step()
            except ValueError as error:
                caught.append("reaches other examples' rows" in str(error))
                break
    assert len(caught) >= 4 and all(caught)


def test_a_release_does_not_depend_on_when_the_probe_looks(monkeypatch):
    """Dropout, noise and batches are the same bits, though one run looks always and one at powers of two only."""
    def run(chance):
        monkeypatch.setattr(probe, "_CHANCE", chance)
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        private = private_sgd(model, plan_for_tests(noise_multiplier=1.0), lr=0.1, seed=4)
        state = torch.get_rng_state()
        for step in range(12):
            private.backward(model(x_of(5, 3, seed=step)).square().sum(1))
            private.step()
        assert not torch.equal(torch.get_rng_state(), state)
        return [*(p.detach() for p in model.parameters()), torch.get_rng_state(), private.noise_generator.get_state()]

    for one, other in zip(run(0), run(1)):
        assert torch.equal(one, other)


def test_a_zeroth_order_release_does_not_depend_on_it_either(monkeypatch):
    def run(chance):
        monkeypatch.setattr(probe, "_CHANCE", chance)
        torch.manual_seed(3)
        model = nn.Linear(3, 2)
        optimizer = make_zeroth_order(model, plan_for_tests(noise_multiplier=1.0), 0.1, num_directions=2, noise_generator=seeded(1),
                                      direction_seed_generator=seeded(2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for step in range(12):
                optimizer.step([{"x": x_of(6, 3, seed=step)}], lambda m, b: F.dropout(m(b["x"]), 0.5, True).square().sum(1))
        return [*(p.detach() for p in model.parameters()), torch.get_rng_state(), optimizer.noise_generator.get_state()]

    for one, other in zip(run(0), run(1)):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------- backward passes that couple
class Divided(torch.autograd.Function):
    """The identity; its backward divides by the norm of the batch."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 8 * grad / grad.norm()


def by_norm(g):
    return 8 * g / g.norm()


HOOKS = {
    "norm": lambda m, h: h.register_hook(by_norm),
    "largest": lambda m, h: h.register_hook(lambda g: g / g.abs().max()),
    "sum": lambda m, h: h.register_hook(lambda g: g * g.sum()),
    "module": lambda m, h: m[1].register_full_backward_hook(lambda module, into, out: (by_norm(into[0]),)),
}


@pytest.mark.parametrize("size", [2, 3, 16])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("hook", [*HOOKS, "custom backward"])
def test_a_backward_pass_that_couples_by_value_is_found(hook, clipping, size):
    """No other row is reached, but one loss's weight moves the others' gradients: 14 C without the check."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)), x_of(size, 3).abs()
    private, weights = private_sgd(model, clipping=clipping), torch.ones(size)
    weights[0] = 1e6
    if hook == "module":
        HOOKS[hook](model, None)
    h = model[0](x)
    if hook == "custom backward":
        h = Divided.apply(h)
    elif hook != "module":
        HOOKS[hook](model, h)
    with pytest.raises(ValueError, match="the layer 0 depends on which others.*a backward hook or a custom backward"):
        private.backward(model[2](model[1](h)).square().sum(1) * weights)
    private.zero_grad()
    assert not private.clipped_sum()


def test_hooks_that_treat_each_row_by_itself_are_let_be(monkeypatch):
    """Linear or not; and rows of any size beside each other, some of them not finite."""
    monkeypatch.setattr(probe, "_CHANCE", 1)
    for hook in (lambda g: g.clamp(-1, 1), lambda g: -g, lambda g: g / (1e-9 + g.norm(dim=1, keepdim=True)), lambda g: None):
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Dropout(0.3), nn.Linear(4, 2))
        private = private_sgd(model, plan_for_tests(noise_multiplier=1.0, num_steps=30), lr=1e-3)
        scale = torch.logspace(-12, 12, 9)
        scale[4] = float("inf")
        for step in range(8):
            h = model[:3](x_of(9, 3, seed=step))
            h.register_hook(hook)
            private.backward(model[3](h).square().sum(1) * scale)
            private.step()


def test_gradients_that_are_nothing_but_rounding_are_let_be(monkeypatch):
    """A sum over normalised entries has no gradient: what is left differs with every order of adding, but not with the batch."""
    monkeypatch.setattr(probe, "_CHANCE", 1)
    model = nn.Sequential(nn.Linear(5, 40), nn.LayerNorm(40, elementwise_affine=False))
    private = private_sgd(model, plan_for_tests(noise_multiplier=1.0, num_steps=30), lr=1e-3)
    for step in range(8):
        private.backward(model(x_of(7, 5, seed=step)).sum(1))
        private.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prepare", [lambda m: m, make_reversible, "checkpoint"], ids=["plain", "reversible", "checkpoint"])
def test_recomputed_blocks_with_dropout_in_any_type_couple_nothing(prepare, dtype, monkeypatch):
    """Padded rows, an autocast that only the forward knows of, a look in every step."""
    monkeypatch.setattr(probe, "_CHANCE", 1)
    model = tiny("bert", layers=3, hidden=64)
    if prepare == "checkpoint":
        model.activation_checkpointing_enable()
    else:
        model = prepare(model)
    private = private_sgd(model.train(), plan_for_tests(noise_multiplier=1.0, num_steps=30), lr=1e-3)
    for seed in range(5):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            losses = plain_losses(model, padded_batch(model, batch=2 + seed, tokens=9, seed=seed)).float()
        private.backward(losses * 10.0 ** torch.arange(-2, seed))
        private.step()
    private.detach()


# ------------------------------------------------------------------------------------------------- losses without a graph
def look(losses, micro_batch, model=None):
    LossProbe().run(micro_batch, losses(micro_batch).double(), lambda some: losses(some).double(), torch.device("cpu"))


MIXING = {
    "batch mean": lambda b: b["x"].square().mean().expand(len(b["x"])),
    "divided by the batch": lambda b: b["x"].square().sum(1) / len(b["x"]),
    "neighbour": lambda b: (b["x"] + b["x"].roll(1, 0)).square().sum(1),
    "batch norm": lambda b: F.batch_norm(b["x"], None, None, training=True).square().sum(1),
    "in-batch negatives": lambda b: F.cross_entropy(b["x"] @ b["x"].T, torch.arange(len(b["x"])), reduction="none"),
    "one that is not finite": lambda b: b["x"].square().sum(1) + b["bad"].sum(),
    "sixteen bits": lambda b: (b["x"].bfloat16() - b["x"].bfloat16().mean(0)).square().sum(1).float(),
}


@pytest.mark.parametrize("name", MIXING)
def test_losses_that_mix_are_found(name):
    batch = {"x": 1 + x_of(8, 5), "bad": torch.tensor([0.0] * 7 + [float("inf")])}
    if name == "one that is not finite":
        found = 0
        for _ in range(40):  # not where the bad row is among the half
            try:
                look(MIXING[name], batch)
            except ValueError:
                found += 1
        assert found > 5
        return
    with pytest.raises(ValueError, match="the losses mix examples"):
        for _ in range(4):  # one look in some dozens sees nothing, by chance
            look(MIXING[name], batch)


NESTED = {
    "dict": lambda x, y: ({"x": x, "y": y}, lambda b: (b["x"], b["y"])),
    "tuple": lambda x, y: ((x, y), lambda b: b),
    "nested": lambda x, y: ([{"x": x}, (y,)], lambda b: (b[0]["x"], b[1][0])),
    "tokenizer's": lambda x, y: (UserDict(x=x, y=y), lambda b: (b["x"], b["y"])),
    "a list of labels": lambda x, y: ({"x": x, "y": y.tolist()}, lambda b: (b["x"], torch.tensor(b["y"]))),
    "an array": lambda x, y: ((x, y.numpy()), lambda b: (b[0], torch.from_numpy(np.asarray(b[1])))),
}


@pytest.mark.parametrize("size", [2, 3, 16])
@pytest.mark.parametrize("form", NESTED)
def test_rows_are_found_in_any_nesting(form, size):
    x, y = x_of(size, 4, seed=1), torch.arange(size) % 3
    batch, unpack = NESTED[form](x, y)
    look(lambda b: F.cross_entropy(unpack(b)[0], unpack(b)[1], reduction="none"), batch)
    with pytest.raises(ValueError, match="mix examples"):
        for _ in range(4):  # half of the rows can have the mean of all, to a thousandth, by chance: about one look in thirty
            look(lambda b: F.cross_entropy(unpack(b)[0], unpack(b)[1]).expand(len(unpack(b)[0])), batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_rounding_is_no_mixing(family, dtype):
    """Padded rows, outliers, an autocast that only the loss knows of: forty batches and no false alarm."""
    task = "classification" if family == "bert" else "causal_lm"
    model = tiny(family, task, layers=4, hidden=64).eval()

    def losses(batch):
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return plain_losses(model, batch).float()

    for seed in range(20):
        look(losses, padded_batch(model, task, batch=2 + seed % 9, tokens=12, seed=seed))
    with pytest.raises(ValueError, match="mix examples"):
        look(lambda b: losses(b) + 0.5 * losses(b).sum(), padded_batch(model, task, batch=6))


@pytest.mark.parametrize("losses", [
    lambda b: b["x"].sum(1) * 1e-30,  # tiny
    lambda b: b["x"].sum(1) - b["x"].sum(1),  # zero
    lambda b: (1e4 * b["x"]).sum(1),  # signed, some nearly zero
    lambda b: torch.where(torch.arange(len(b["x"])) >= 0, b["x"].sum(1) / 0, 0),  # none is finite
    lambda b: (100 * b["x"] @ b["w"]).logsumexp(1),
], ids=["tiny", "zero", "signed", "not finite", "product"])
def test_odd_sizes_are_no_mixing(losses):
    for seed in range(20):
        look(losses, {"x": x_of(9, 40, seed=seed), "w": x_of(40, 7)})


def test_a_trimming_loss_is_no_mixing():
    """The half is padded less than the whole: the model's mask makes it the same."""
    model = tiny("bert").eval()

    def losses(batch):
        longest = int(batch["attention_mask"].sum(1).max())
        with torch.no_grad():
            return plain_losses(model, {name: t[:, :longest] if t.dim() == 2 else t for name, t in batch.items()})

    for seed in range(20):
        look(losses, padded_batch(model, batch=6, tokens=11, seed=seed))


def test_a_mean_over_padded_positions_is_found():
    """The longest row decides by how much every other loss is divided. Without it, and without its padding, they are others."""
    model = tiny("llama", "causal_lm").eval()

    def losses(batch):
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits.transpose(1, 2), batch["labels"], ignore_index=-100, reduction="none").mean(1)

    for seed in range(10):
        for form in (dict, UserDict):
            with pytest.raises(ValueError, match="the losses mix examples.* none over positions that are padding"):
                look(losses, form(padded_batch(model, "causal_lm", batch=6, tokens=11, seed=seed)))
    alike = padded_batch(model, "causal_lm", batch=6, tokens=2)  # all of one length: nothing to see
    look(losses, alike)


def test_a_random_loss_is_warned_of_not_refused():
    with pytest.warns(UserWarning, match="the losses are random"):
        look(lambda b: F.dropout(b["x"], 0.5, True).square().sum(1), {"x": x_of(8, 6)})


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("prepare", [lambda model: add_lora(model, rank=2), train_everything], ids=["lora", "full"])
@pytest.mark.parametrize("sliced", [False, True], ids=["the losses of training", "a head of a sliced text"])
def test_rows_of_one_token_that_give_the_head_nothing(clipping, prepare, sliced):
    """Rows of one token have no next token: the head gets an empty tensor, the loss is zero and moves nothing."""
    model = prepare(tiny("llama", "causal_lm", tie=False))
    model.requires_grad_(True) if prepare is train_everything else model.lm_head.requires_grad_(True)
    private = private_sgd(model, clipping=clipping)

    def losses(model, batch):
        if not sliced:
            return causal_lm_losses(model, batch)
        hidden = model.model(batch["input_ids"]).last_hidden_state[:, :-1]
        return F.cross_entropy(model.lm_head(hidden).transpose(1, 2), batch["labels"][:, 1:], reduction="none").sum(1)

    before = [p.detach().clone() for p in model.parameters()]
    ids = torch.tensor([[5], [6], [7]])
    private.backward(losses(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}))
    private.step()
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before))
