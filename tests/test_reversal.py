"""`reversal`: the recomputing backward pass against plain autograd of the same function, dropout replayed, what is saved."""

import contextlib

import pytest
import torch

from memarc_utils import reversal
from memarc_utils.adapters import add_bottleneck_adapters, add_lora, select_bias_terms, train_everything
from memarc_utils.backbones import block_view
from memarc_utils.couplings import COUPLINGS, FIXED_POINT, ReversibleConfig
from memarc_utils.memory import held_bytes, saved_bytes
from memarc_utils.planning import plan_memory
from memarc_utils.reversible import gradient_error, make_reversible, reversible_blocks
from tests.models import CASE_IDS, CASES, padded_batch, plain_losses, private_sgd, seeded, shake, tiny


def last_block_only(model):
    model.requires_grad_(False)
    list(block_view(model).blocks.children())[-1].requires_grad_(True)
    return model


def middle_mlp_only(model):
    """Nothing trains below it, beside it or above it: the lowest layer that is gone through has only one half to train."""
    model.requires_grad_(False)
    for part in block_view(model).mlps[1]:
        part.requires_grad_(True)
    return model


TRAINED = {"all": train_everything, "lora": lambda model: add_lora(model, rank=2), "last": last_block_only, "mlp": middle_mlp_only,
           "adapters": lambda model: add_bottleneck_adapters(model, width=3),
           "biases": lambda model: select_bias_terms(model, add_missing=True)}


def prepared(case=("bert",), kind="lossless", method="lora", layers=4, dropout=0.2, scale=0.05, **settings):
    coefficients = {"meft1": (0.5, 1.0), "meft2": (1.0, 0.5), "meft3": (0.5, 0.5)}.get(kind)  # the exact side of float64
    settings = {"coefficients": coefficients, "adapter_width": 3 if kind in ("meft1", "meft2") else 0, **settings}
    model = make_reversible(TRAINED[method](tiny(*case, layers=layers, dropout=dropout)), ReversibleConfig(kind, **settings))
    return shake(model, scale=scale).train()


def gradients(model, batch, seed=0):
    torch.manual_seed(seed)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(plain_losses(model, batch).sum(), list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, found) if g is not None}


@contextlib.contextmanager
def plain_autograd(model):
    blocks = reversible_blocks(model)
    blocks.recompute = False
    try:
        yield
    finally:
        blocks.recompute = True


def differ(first, second):
    assert first.keys() == second.keys()
    return max(float((first[n] - second[n]).abs().max()) for n in first)


# ---------------------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("kind", COUPLINGS)
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_gradient_is_that_of_plain_autograd(case, kind):
    """With dropout and padding."""
    model = prepared(case, kind)
    batch = padded_batch(model, case[1])
    assert gradient_error(model, batch, plain_losses) <= 1e-6
    assert gradients(model, batch).keys() >= {n for n, p in model.named_parameters() if p.requires_grad and "lora" in n}


@pytest.mark.parametrize("kind", ["lossless", "meft1", "meft3"])
@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_whatever_trains(family, method, kind):
    model = prepared((family,), kind, method)
    batch = padded_batch(model)
    with plain_autograd(model):
        want = gradients(model, batch)
    got = gradients(model, batch)
    assert got.keys() == want.keys() and len(got) > 1
    for name, gradient in want.items():  # each by itself: a small one hides in the norm of all; a key's bias has none but rounding
        assert float((got[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()) + 1e-7, name


def test_a_weight_that_blocks_share_gets_both_gradients():
    model = tiny("bert", layers=3)
    layers = model.bert.encoder.layer
    layers[2].output.dense.weight = layers[0].output.dense.weight
    make_reversible(train_everything(model), ReversibleConfig())
    assert gradient_error(model, padded_batch(model), plain_losses) <= 1e-6


@pytest.mark.parametrize("segment", [1, 2, 3])
def test_segments_give_the_same_gradient(segment):
    model = prepared(("gpt2", "causal_lm", True), "meft1", "all", layers=5, coefficients=(0.1, 1.0), segment=segment)
    assert gradient_error(model, padded_batch(model, "causal_lm"), plain_losses) <= 1e-6


@pytest.mark.parametrize("kind", COUPLINGS)
def test_gradient_by_differences(kind):
    """Central differences in float64, of torch's own step. Rounding to the grid counts as the identity: with blocks in float64 the grid
    is fine beside the step."""
    model = prepared(("gpt2",), kind, dropout=0.0, layers=3, scale=0.3).double()
    blocks = reversible_blocks(model)
    parameters = [p for p in blocks.parameters() if p.requires_grad]
    hidden = torch.randn(2, 3, 32, generator=seeded(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, *_: blocks(h), (hidden, *parameters), fast_mode=True)
    few = [hidden, *(p for p in parameters if p.dim() == 1)][:3]
    assert torch.autograd.gradcheck(lambda h, *_: blocks(h), few)


def test_24_layers_with_default_settings():
    model = prepared(("llama", "causal_lm", False), "lossless", "lora", layers=24)
    assert gradient_error(model, padded_batch(model, "causal_lm"), plain_losses) <= 1e-5


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("kind", ["lossless", "meft3"])
def test_under_autocast(kind, inside):
    """The blocks are computed again under the autocast of the forward pass, wherever the backward pass is called."""
    model = prepared(("bert",), kind, "all", dropout=0.1)
    batch, found = padded_batch(model), []
    for way in (contextlib.nullcontext(), plain_autograd(model)):
        torch.manual_seed(0)
        model.zero_grad()
        with way:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = plain_losses(model, batch).sum()
                loss.backward() if inside else None
            None if inside else loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == {n for n, _ in model.named_parameters()}
    size = sum(float(g.square().sum()) for g in found[1].values())**0.5
    assert sum(float((found[0][n] - g).square().sum()) for n, g in found[1].items())**0.5 <= 1e-2 * size


def test_hidden_input_and_frozen_input():
    """With frozen embeddings nothing is computed for the input; with an input that needs it, its gradient is right."""
    model = prepared(("bert",), "meft3", "biases", dropout=0.0)
    blocks, hidden = reversible_blocks(model), torch.randn(2, 3, 32, generator=seeded())
    assert blocks(hidden).requires_grad
    needing = hidden.clone().requires_grad_()
    blocks(needing).sum().backward()
    with plain_autograd(model):
        other = hidden.clone().requires_grad_()
        blocks(other).sum().backward()
    torch.testing.assert_close(needing.grad, other.grad, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ dropout
@pytest.mark.parametrize("kind", COUPLINGS)
def test_generator_is_left_where_the_forward_pass_left_it(kind):
    model = prepared(("opt", "causal_lm", True), kind)
    batch, states = padded_batch(model, "causal_lm"), []
    for way in (contextlib.nullcontext(), plain_autograd(model)):
        with way:
            torch.manual_seed(3)
            losses = plain_losses(model, batch)
            after_forward = torch.get_rng_state()
            losses.sum().backward()
            assert torch.equal(torch.get_rng_state(), after_forward)
            states.append((after_forward, losses.detach()))
    assert torch.equal(states[0][0], states[1][0]) and torch.equal(states[0][1], states[1][1])
    torch.manual_seed(4)
    assert not torch.equal(plain_losses(model, batch), states[0][1])


def test_two_forward_passes_then_two_backward_passes():
    model = prepared(("bert",), "bdia")
    first, second = padded_batch(model), padded_batch(model, seed=1)
    parameters, found = [p for p in model.parameters() if p.requires_grad], []
    for way in (contextlib.nullcontext(), plain_autograd(model)):
        with way:
            torch.manual_seed(0)
            losses = [plain_losses(model, batch).sum() for batch in (first, second)]
            torch.randn(3)  # whatever draws in between
            found.append([torch.autograd.grad(loss, parameters) for loss in losses])
    for got, want in zip(*found):
        for one, other in zip(got, want):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_evaluated_between_forward_and_backward():
    """What was computed in training mode is computed again in training mode, and the model stays in evaluation mode."""
    model = prepared(("bert",), "lossless")
    batch, parameters = padded_batch(model), [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(0)
    losses = plain_losses(model, batch).sum()
    want = torch.autograd.grad(losses, parameters, retain_graph=True)
    model.eval()
    for one, other in zip(torch.autograd.grad(losses, parameters), want):
        assert torch.equal(one, other)
    assert not any(module.training for module in model.modules())


# -------------------------------------------------------------------------------------------------- what autograd does
def test_backward_twice_over_a_kept_graph():
    model = prepared(("gpt2",), "lossless")
    loss, parameters = plain_losses(model, padded_batch(model)).sum(), [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(loss, parameters)):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("segment", [None, 1, 2])
@pytest.mark.parametrize("kind", FIXED_POINT)
def test_stored_streams_are_used_up_where_no_second_backward_pass_comes(kind, segment):
    """The way back runs in their memory, and gives the very gradients that it gives beside them; a kept graph keeps them. One layer of
    blocks, or as many as a segment has, and one that is a segment of its own."""
    for layers in (1, 5):
        model = shake(make_reversible(add_lora(tiny(layers=layers), rank=2), ReversibleConfig(kind, segment=segment)))
        batch, parameters, found = padded_batch(model), [p for p in model.parameters() if p.requires_grad], []
        for used_up in (True, False):
            saved, loss = [], None
            with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
                loss = plain_losses(model, batch).sum()
            streams = {t.data_ptr(): t for t in saved if t.dtype == torch.float64 and t.shape == (4, 7, 32)}
            before = {key: t.clone() for key, t in streams.items()}
            found.append(torch.autograd.grad(loss, parameters, retain_graph=not used_up))
            assert len(streams) >= 2 and any(not torch.equal(t, before[key]) for key, t in streams.items()) == used_up
        for one, other in zip(*found):
            assert torch.equal(one, other)


def test_a_reversible_step_holds_two_streams_and_no_copy_of_them(monkeypatch):
    """Planned, at B = 16, T = 64, d = 64 in float32 blocks: two float64 streams less where the stored ones are used up."""
    plans = []
    for keeps in (reversal._graph_is_kept, lambda: True):
        monkeypatch.setattr(reversal, "_graph_is_kept", keeps)
        plans.append(plan_memory("tiny", "rev-lora", 16, 64).peak_bytes)
    assert plans[1] - plans[0] == pytest.approx(2 * 8 * 16 * 64 * 64, rel=0.1)


@pytest.mark.parametrize("kind", FIXED_POINT)
def test_blocks_that_give_other_numbers_the_second_time_are_found(kind):
    """As a kernel without a fixed order of addition would: the error grows by 1/λ a layer, and nobody would see it."""
    model = make_reversible(add_lora(tiny(layers=6), rank=2), ReversibleConfig(kind))
    batch, block = padded_batch(model), reversible_blocks(model).get_submodule("3")
    plain_losses(model, batch).sum().backward()  # the same numbers twice: no complaint
    calls = []

    def jitter(module, args, output):
        calls.append(None)
        return output * (1 + 1e-6 * len(calls))

    block.register_forward_hook(jitter)
    with pytest.raises(ValueError, match="the blocks gave other numbers when they were computed again.*use_deterministic_algorithms"):
        plain_losses(model, batch).sum().backward()


def test_an_example_that_is_not_finite_is_no_other_number():
    model = make_reversible(add_lora(tiny(layers=6), rank=2))
    batch = padded_batch(model)
    block = reversible_blocks(model).get_submodule("2")
    block.register_forward_hook(lambda module, args, output: torch.cat([output[:1] * float("nan"), output[1:]]))
    private = private_sgd(model)
    private.backward(plain_losses(model, batch))
    sums = private.clipped_sum()
    assert all(t.isfinite().all() for t in sums.values()) and any(t.any() for t in sums.values())


def test_second_derivatives_are_refused():
    model = prepared(("bert",), "lossless")
    blocks, hidden = reversible_blocks(model), torch.randn(2, 3, 32, generator=seeded(), requires_grad=True)
    gradient, = torch.autograd.grad(blocks(hidden).square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("trains", [True, False])
def test_a_parameter_changed_in_between_raises(trains):
    model = prepared(("bert",), "lossless")
    loss = plain_losses(model, padded_batch(model)).sum()
    with torch.no_grad():
        next(p for p in reversible_blocks(model).parameters() if p.requires_grad == trains).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_parameter_put_in_for_one_call_is_refused():
    model = prepared(("bert",), "lossless")
    batch = {name: t for name, t in padded_batch(model).items() if name != "labels"}
    values = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    logits = torch.func.functional_call(model, values, (), batch).logits
    with pytest.raises(ValueError, match="a parameter of the blocks was replaced"):
        torch.autograd.grad(logits.sum(), list(values.values()), allow_unused=True)


def test_a_mask_that_trains_is_refused():
    blocks = reversible_blocks(prepared(("bert",)))
    with pytest.raises(ValueError, match="freeze it"):
        blocks(torch.randn(2, 3, 32), attention_mask=torch.zeros(2, 1, 3, 3, requires_grad=True))


def test_saved_tensors_hooks_see_everything_and_may_move_it():
    model = prepared(("llama",), "lossless")
    batch = padded_batch(model)
    want = gradients(model, batch)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t.clone(), lambda t: t):
        got = gradients(model, batch)
    assert differ(got, want) <= 1e-6
    assert sum(shape == (4 * 7 * 32 // 2,) for shape in packed) == 4  # k = 4: half a byte a number, 4 layers


# ------------------------------------------------------------------------------------------------------- what is saved
B, T, WIDTH = 3, 5, 32


def streams_alone(model, hidden):
    return saved_bytes(lambda: reversible_blocks(model)(hidden), model).total


@pytest.mark.parametrize("kind, settings, bits", [
    ("lossless", {}, 4), ("lossless", dict(coefficients=(1 / 256, 1.0)), 8), ("bdia", {}, 1), ("meft1", {}, 0), ("meft3", {}, 0),
    ("midpoint", {}, 0)])
def test_bytes_by_formula(kind, settings, bits):
    """Two float64 streams and k bits a number and layer; in training mode also two states of the generator a layer."""
    numbers, state = B * T * WIDTH, torch.get_rng_state().numel()
    hidden = torch.randn(B, T, WIDTH, generator=seeded())
    for layers in (2, 6):
        model = prepared(("bert",), kind, "all", layers=layers, **settings)
        streams = 2 * 8 * numbers
        assert streams_alone(model, hidden) == streams + layers * (-(-numbers * bits // 8) + 2 * state)
        assert streams_alone(model.eval(), hidden) == streams + layers * -(-numbers * bits // 8)
        with plain_autograd(model):
            assert streams_alone(model, hidden) > 10 * layers * 4 * numbers


def test_bytes_of_segments_and_of_float32_streams():
    hidden = torch.randn(B, T, WIDTH, generator=seeded())
    model = prepared(("bert",), "meft1", layers=6, stream_dtype="float32", segment=2).eval()
    assert streams_alone(model, hidden) == 3 * 2 * 4 * B * T * WIDTH


def test_nothing_is_held_beside_what_autograd_saves():
    """By the allocator: attributes of the graph's node would escape the count of saved tensors."""
    hidden = torch.randn(16, 32, WIDTH, generator=seeded())
    numbers, held = hidden.numel(), {}
    for layers in (2, 8):
        model = prepared(("bert",), "lossless", "all", layers=layers, dropout=0.0).eval()
        held[layers] = held_bytes(lambda: reversible_blocks(model)(hidden))  # noqa: B023
    assert held[8] - held[2] == 6 * numbers // 2
    assert held[2] <= 2 * 8 * numbers + 2 * numbers // 2 + 4 * numbers + 4096  # and the output
