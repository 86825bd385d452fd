"""`make_reversible` beside the rest: the private engine, adapters in either order, saving, copies, generation, refusals."""

import copy

import pytest
import torch

from memarc_utils.adapters import add_bottleneck_adapters, add_lora, select_bias_terms, select_linear_probe, train_everything
from memarc_utils.couplings import COUPLINGS, ReversibleConfig
from memarc_utils.dp_sgd import verify_sensitivity
from memarc_utils.reversible import (ForwardStreams, forward_streams, gradient_error, invert, make_reversible, reconstruction_error,
                                     reversible_blocks)
from memarc_utils.saving import load_trainable, save_trainable
from memarc_utils.side_network import attach_side_network
from memarc_utils.zeroth_order import make_zeroth_order
from tests.models import (CASE_IDS, CASES, distance, loop_clipped_sum, loop_norms, padded_batch, plain_losses, plan_for_tests, private_sgd,
                          seeded, shake, size, tiny, without_shape_check)
from tests.test_per_layer import held_at_most

METHODS = {"lora": lambda model: add_lora(model, rank=2), "biases": lambda model: select_bias_terms(model, add_missing=True),
           "all": train_everything, "adapters": lambda model: add_bottleneck_adapters(model, width=3)}
COEFFICIENTS = {"meft1": (0.5, 1.0), "meft2": (1.0, 0.5), "meft3": (0.5, 0.5)}


def config(kind="lossless", **settings):
    width = 3 if kind in ("meft1", "meft2") else 0
    return ReversibleConfig(kind, **{"coefficients": COEFFICIENTS.get(kind), "adapter_width": width, **settings})


def prepared(case=("bert",), kind="lossless", method="lora", **sizes):
    return shake(make_reversible(METHODS[method](tiny(*case, **sizes)), config(kind)))


def without_labels(batch):
    return {name: t for name, t in batch.items() if name != "labels"}


def logits(model, batch):
    with torch.no_grad():
        return model(**without_labels(batch)).logits


def trainable(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


# ------------------------------------------------------------------------------------------------------ private engine
@pytest.mark.parametrize("kind", COUPLINGS)
@pytest.mark.parametrize("method", ["lora", "biases", "all"])
def test_one_example_moves_the_sum_by_at_most_c(method, kind):
    """Every coupling with every method; families and clippings in turn, so that each coupling meets all of them."""
    turn = COUPLINGS.index(kind) + ["lora", "biases", "all"].index(method)
    case = (("roberta", "classification", None), ("gpt2", "causal_lm", True))[turn % 2]
    clipping = ("flat", "automatic", "per_layer")[turn % 3]
    model = prepared(case, kind, method)
    report = verify_sensitivity(model, plain_losses, padded_batch(model, case[1], batch=2, tokens=5), 1e-3, clipping=clipping)
    assert report.holds and report.max_norm_error <= 1e-4, f"{clipping}: {report}"
    assert report.max_contribution >= 0.5e-3


@pytest.mark.parametrize("kind", ["lossless", "meft1", "meft3"])
@pytest.mark.parametrize("method", ["lora", "all"])
@pytest.mark.parametrize("case", [("bert", "classification", None), ("opt", "causal_lm", True)], ids=["bert", "opt"])
def test_clipped_sum_under_dropout_is_that_of_plain_autograd(case, method, kind):
    """One forward pass with the same masks, then each example's gradient by itself, without engine and recomputation."""
    model = prepared(case, kind, method, dropout=0.2).train()
    batch, blocks = padded_batch(model, case[1]), reversible_blocks(model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    blocks.recompute = False
    torch.manual_seed(5)
    losses = plain_losses(model, batch)
    each = [torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True) for loss in losses]
    blocks.recompute = True
    gradients = {name: torch.stack([torch.zeros_like(p) if g[k] is None else g[k] for g in each])
                 for k, (name, p) in enumerate(named.items())}
    bound = float(loop_norms(gradients).median())  # some are clipped, some are not
    private = private_sgd(model, plan_for_tests(max_grad_norm=bound))
    torch.manual_seed(5)
    private.backward(plain_losses(model, batch))
    want = loop_clipped_sum(gradients, bound)
    assert distance(private.clipped_sum(), want) <= 1e-5 * size(want)
    assert all(p.grad is None for p in model.parameters())


def test_per_layer_clipping_holds_nothing_over_depth():
    for layers in (1, 5):
        model = prepared(("gpt2", "causal_lm", True), "lossless", "all", layers=layers)
        batch = padded_batch(model, "causal_lm")
        assert held_at_most(model, batch, per_layer=True) <= 3  # weight and bias of a layer, the tied weight
        assert held_at_most(model, batch) == len(list(model.parameters()))


def test_micro_batches_add_up():
    model = prepared(("bert",), "bdia")
    batch, private = padded_batch(model), private_sgd(model)
    private.backward(plain_losses(model, batch))
    want = private.clipped_sum()
    private.zero_grad()
    for part in (slice(0, 1), slice(1, 4)):
        private.backward(plain_losses(model, {name: t[part] for name, t in batch.items()}))
    assert distance(private.clipped_sum(), want) <= 1e-5 * size(want)


def test_private_steps_go_on_from_a_saved_state():
    def run(model, private, batches):
        for seed in batches:
            private.backward(plain_losses(model, padded_batch(model, seed=seed)))
            private.step()
            private.zero_grad()

    model = prepared()
    start, private = copy.deepcopy(model), private_sgd(model)
    run(model, private, (0, 1))
    state = copy.deepcopy(private.state_dict())  # its tensors are the model's
    run(model, private, (2,))
    other = private_sgd(start)
    other.load_state_dict(state)
    run(start, other, (2,))
    assert all(torch.equal(t, start.state_dict()[name]) for name, t in model.state_dict().items())
    assert other.steps_taken == private.steps_taken == 3


def test_examples_that_meet_are_found():
    model = prepared(("bert",), "lossless")
    private = private_sgd(model)
    losses = plain_losses(model, padded_batch(model))
    with pytest.raises(ValueError, match="reaches other examples' rows"):
        private.backward(losses - losses.mean())
    private.zero_grad()
    private.backward(plain_losses(model, padded_batch(model)))


def test_zeroth_order_steps():
    model = prepared(("llama", "causal_lm", False))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_zeroth_order(model, plan_for_tests(max_grad_norm=1.0), 1e-3, noise_generator=seeded())
    optimizer.step([padded_batch(model, "causal_lm")], plain_losses)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert moved == trainable(model)


# ------------------------------------------------------------------------------------------------------ same function
@pytest.mark.parametrize("kind", COUPLINGS)
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_value_depends_on_no_mode(case, kind):
    """Recomputing or not, with or without gradients, dropout on or off: the same bits."""
    model = prepared(case, kind, dropout=0.3)
    batch, blocks = padded_batch(model, case[1]), reversible_blocks(model)
    values = {}
    for training in (True, False):
        model.train(training)
        found = []
        for blocks.recompute in (True, False):
            for gradients in (True, False):
                torch.manual_seed(0)
                with torch.set_grad_enabled(gradients):
                    found.append(model(**without_labels(batch)).logits.detach())
        assert all(torch.equal(one, found[0]) for one in found)
        values[training] = found[0]
    assert not torch.equal(values[True], values[False])


@pytest.mark.parametrize("kind", COUPLINGS)
@pytest.mark.parametrize("method", METHODS)
def test_before_and_after_the_choice_of_what_trains(method, kind):
    case = ("opt", "classification", None)
    models = []
    for first in (True, False):
        model = tiny(*case)
        torch.manual_seed(1)
        if first:
            make_reversible(model, config(kind))
        torch.manual_seed(2)
        METHODS[method](model)
        torch.manual_seed(1)
        models.append(model if first else make_reversible(model, config(kind)))
    batch = padded_batch(models[0])
    assert trainable(models[0]) == trainable(models[1]) and list(models[0].state_dict()) == list(models[1].state_dict())
    assert torch.equal(logits(models[0], batch), logits(models[1], batch))
    if kind in ("meft1", "meft2"):
        assert sum("reversible_adapter" in name for name in trainable(models[0])) == 2 * 4


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_names_are_those_of_the_pretrained_model(case):
    plain, model = tiny(*case), make_reversible(tiny(*case), ReversibleConfig())
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(tiny(*case, seed=3).state_dict())
    plain.load_state_dict(tiny(*case, seed=3).state_dict())
    batch = padded_batch(plain, case[1])
    assert torch.equal(logits(model, batch), logits(make_reversible(plain, ReversibleConfig()), batch))
    assert "ReversibleBlocks" in repr(model) and len(reversible_blocks(model)) == 2


@pytest.mark.parametrize("settings", [dict(kind="lossless"), dict(kind="bdia", coefficients=(0.25, 1.0)), dict(kind="meft1", segment=1),
                                      dict(kind="midpoint", stream_dtype="float32")], ids=lambda settings: settings["kind"])
@pytest.mark.parametrize("method", ["lora", "adapters"])
def test_saved_and_loaded(method, settings, tmp_path):
    model = shake(make_reversible(METHODS[method](tiny()), config(**settings)), scale=0.2)
    save_trainable(model, tmp_path)
    torch.manual_seed(99)
    loaded = load_trainable(tiny(), tmp_path)
    load_trainable(loaded, tmp_path)  # onto a model that is prepared already: only the values come
    assert trainable(loaded) == trainable(model) and reversible_blocks(loaded).coupling == reversible_blocks(model).coupling
    assert torch.equal(logits(loaded, padded_batch(model)), logits(model, padded_batch(model)))


def test_a_copy_is_a_model_of_its_own():
    model = prepared(("gpt2",), "lossless", "lora", dropout=0.1).train()
    copied, batch = copy.deepcopy(model), padded_batch(model)
    before = logits(model.eval(), batch)
    shake(copied, scale=0.5)
    assert torch.equal(logits(model, batch), before) and not torch.equal(logits(copied.eval(), batch), before)
    assert gradient_error(copied, batch, plain_losses) <= 1e-6
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in reversible_blocks(model).parameters()}


@pytest.mark.parametrize("kind", COUPLINGS)
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_generation_with_and_without_cache(family, kind):
    model = prepared((family, "causal_lm", None), kind, "all")
    prompt = padded_batch(model, "causal_lm", batch=2, tokens=4)["input_ids"][:1]
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    with_cache, without = (model.generate(prompt, use_cache=use, **options) for use in (True, False))
    assert torch.equal(with_cache, without) and with_cache.shape == (1, 12)
    full = model(prompt, use_cache=True)
    assert full.past_key_values is None or full.past_key_values.get_seq_length() == 0  # none is kept while gradients are on
    with torch.no_grad():
        past = model(prompt[:, :3], use_cache=True).past_key_values
        assert past.get_seq_length() == 3
        torch.testing.assert_close(model(prompt[:, 3:], past_key_values=past).logits, full.logits[:, 3:], rtol=1e-4, atol=1e-5)
        past = model(prompt[:, :3], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot train on top of cached keys"):
        model(prompt[:, 3:], past_key_values=past)


@pytest.mark.parametrize("kind", COUPLINGS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_step_without_numbers(family, kind):
    """On torch's meta device: nothing branches on data."""
    with torch.device("meta"):
        model = tiny(family, dropout=0.1)
    make_reversible(train_everything(model), config(kind)).train()
    hidden = torch.empty(2, 5, 32, device="meta", requires_grad=True)
    model(inputs_embeds=hidden, position_ids=torch.zeros(1, 5, dtype=torch.long, device="meta")).logits.sum().backward()
    assert hidden.grad.shape == hidden.shape and all(p.grad.is_meta for p in reversible_blocks(model).parameters())


def test_streams_and_their_inverse():
    model = prepared(("bert",), "lossless", layers=5)
    batch = without_labels(padded_batch(model))
    outputs = forward_streams(model, batch)
    assert len(outputs.before) == 5 and all(not t.requires_grad for pair in outputs.before for t in pair)
    assert torch.equal(outputs.before[1][0], outputs.before[0][1])  # h_0 and h_1
    with torch.no_grad():
        assert torch.equal(outputs.last[1].float(), model.bert(**batch).last_hidden_state)
    found = invert(model, outputs)
    assert all(torch.equal(a, b) for got, want in zip(found, outputs.before) for a, b in zip(got, want))
    with torch.no_grad():
        next(p for p in reversible_blocks(model).parameters() if p.dim() == 2).add_(0.1)
    assert not torch.equal(invert(model, outputs)[0][0], outputs.before[0][0])  # the inverse is computed, not looked up
    with pytest.raises(ValueError, match="must come from forward_streams"):
        without_shape_check(without_shape_check(invert))(model, model(**batch))
    assert reversible_blocks(model).watched is None
    assert isinstance(outputs, ForwardStreams) and reconstruction_error(model, batch).worst == 0


# ------------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_what_lies_between_the_blocks_is_refused(case):
    model = make_reversible(tiny(*case), ReversibleConfig())
    batch = without_labels(padded_batch(model, case[1]))
    for name in ("output_hidden_states", "output_attentions"):
        with torch.no_grad(), pytest.raises(ValueError, match=f"does not keep what {name} asks for"):
            model(**batch, **{name: True})
    model.config.output_hidden_states = True
    with pytest.raises(ValueError, match="does not keep what output_hidden_states asks for"):
        model(**batch)


def test_what_does_not_go_together_is_refused():
    model = prepared()
    with pytest.raises(ValueError, match="reversible already"):
        make_reversible(model, ReversibleConfig())
    with pytest.raises(ValueError, match="this model is reversible"):
        attach_side_network(make_reversible(tiny(), ReversibleConfig()))
    with pytest.raises(ValueError, match="has a side network"):
        make_reversible(attach_side_network(tiny()), ReversibleConfig())
    with pytest.raises(ValueError, match="is not reversible: call make_reversible first"):
        reversible_blocks(tiny())
    checkpointed = tiny()
    checkpointed.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="activation_checkpointing_disable"):
        make_reversible(checkpointed, ReversibleConfig())
    model.train().activation_checkpointing_enable()
    with pytest.raises(ValueError, match="activation_checkpointing_disable") as refused:
        plain_losses(model, padded_batch(model))
    assert "call model." in str(refused.value)
    model.activation_checkpointing_disable()
    assert gradient_error(model, padded_batch(model), plain_losses) <= 1e-6


def test_blocks_skipped_at_random_are_refused():
    model = tiny("opt", "causal_lm", True)
    model.model.decoder.layerdrop = 0.1
    with pytest.raises(ValueError, match="layerdrop skips blocks at random.*layerdrop=0"):
        make_reversible(model)


def test_a_probe_on_frozen_blocks_keeps_nothing_of_them():
    model = select_linear_probe(make_reversible(tiny(dropout=0.5), ReversibleConfig())).train()
    batch = padded_batch(model)
    assert not reversible_blocks(model)(torch.randn(2, 3, 32)).requires_grad
    assert torch.equal(plain_losses(model, batch), plain_losses(model, batch)) or model.dropout.training
    plain_losses(model, batch).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(trainable(model))
