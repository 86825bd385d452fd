"""`couplings` and `block_halves`: halves of blocks, the table's formulas by loops of their own, bits that come back, refusals that
name what works, the forecast of the error."""

import inspect
import re
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memarc_utils.backbones import block_view
from memarc_utils.block_halves import attention_half, mlp_half
from memarc_utils.couplings import COUPLINGS, FIXED_POINT, ReversibleConfig, join_bits, split_bits, to_grid
from memarc_utils.reversible import forward_streams, invert, make_reversible, reconstruction_error, reversible_blocks
from tests.models import CASE_IDS, CASES, padded_batch, seeded, tiny

FAMILIES = ("bert", "roberta", "distilbert", "gpt2", "opt", "llama")
UNIT = 2.0**-30


def inputs_of(model, task="classification", **sizes):
    return {name: t for name, t in padded_batch(model, task, **sizes).items() if name != "labels"}


def calls_of_blocks(model, batch):
    """What each block of the pre-trained model is given, what else it gets, and what it returns."""
    seen = []

    def note(block, args, kwargs, output):
        names = list(inspect.signature(type(block).forward).parameters)[1:]
        context = {**dict(zip(names[1:], args[1:])), **kwargs}
        if "past_key_values" in context:
            context["past_key_values"] = None
        seen.append((block, args[0], context, output[0] if isinstance(output, tuple) else output))

    hooks = [block.register_forward_hook(note, with_kwargs=True) for block in block_view(model).blocks.children()]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


# ------------------------------------------------------------------------------------------------------------ halves
@pytest.mark.parametrize("family, before", [*((family, True) for family in FAMILIES), ("opt", False)])
def test_two_halves_are_the_block(family, before):
    model = tiny(family, layers=3)
    for block in block_view(model).blocks if family == "opt" else ():
        block.do_layer_norm_before = before
    seen = calls_of_blocks(model, inputs_of(model))
    assert len(seen) == 3
    for block, hidden, context, output in seen:
        with torch.no_grad():
            middle = attention_half(family, block, hidden, context)
            torch.testing.assert_close(mlp_half(family, block, middle), output, rtol=1e-6, atol=1e-6)
        assert float((middle - hidden).abs().max()) > 1e-3 < float((output - middle).abs().max())  # neither half is idle


# ---------------------------------------------------------------------------------------------------------- formulas
def layers_naive(kind, lam, beta, blocks, h, family, context):
    """The table of `couplings`, read off without the module's code; streams in float64, blocks in the model's dtype."""
    def run(block, x):
        output = block(x.to(h.dtype), **context)
        return (output[0] if isinstance(output, tuple) else output).double()

    grid = (lambda x: torch.round(x * 2**30) / 2**30) if kind in FIXED_POINT else (lambda x: x)
    before = now = grid(h.double())  # h_{n−1} and h_n
    for block in blocks:
        if kind == "meft3":
            y1 = lam * before + attention_half(family, block, now.to(h.dtype), context).double()
            before, now = y1, beta * now + mlp_half(family, block, y1.to(h.dtype)).double()
            continue
        adapter = getattr(block, "reversible_adapter", None)
        added = (lambda x: adapter(x.to(h.dtype)).double()) if adapter is not None else torch.zeros_like  # noqa: B023
        if kind == "meft2":
            y1 = lam * before + added(now)
            before, now = beta * now + run(block, y1), y1
        elif kind == "meft1":
            y1 = lam * before + run(block, now)
            before, now = beta * now + added(y1), y1
        elif kind == "midpoint":
            before, now = now, before + 2 * (run(block, now) - now)
        elif kind == "bdia":
            change = ((1 + lam) * run(block, now).to(h.dtype) - 2 * lam * now.to(h.dtype)).double()
            before, now = now, torch.floor(lam * before * 2**30) / 2**30 + grid(change)
        else:
            change = (run(block, now).to(h.dtype) - lam * now.to(h.dtype)).double()
            before, now = now, torch.floor(lam * before * 2**30) / 2**30 + grid(change)
    return (before + now) / 2 if kind.startswith("meft") else now


@pytest.mark.parametrize("kind", COUPLINGS)
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_value_by_a_loop_over_blocks(case, kind):
    model = tiny(*case, layers=3)
    batch = inputs_of(model, case[1])
    width = 5 if kind in ("meft1", "meft2") else 0
    config = ReversibleConfig(kind, coefficients={"meft3": (0.5, 0.25)}.get(kind), adapter_width=width)
    blocks, (_, first, context, _) = list(block_view(model).blocks), calls_of_blocks(model, batch)[0]
    make_reversible(model, config)
    with torch.no_grad():
        for parameter in model.parameters() if width else ():
            parameter += 0.1 * torch.randn(parameter.shape, generator=seeded())
        want = layers_naive(kind, *config.lambda_and_beta, blocks, first, model.config.model_type, context)
        got = reversible_blocks(model)(first, **context)
    assert float((got.double() - want).norm() / want.norm()) <= 2e-7


def test_small_lambda_is_the_pretrained_model():
    batch, distances = inputs_of(tiny()), []
    for coefficients in ((1 / 2, 1.0), (1 / 16, 1.0), (1 / 256, 1.0)):
        plain, model = tiny(layers=6), make_reversible(tiny(layers=6), ReversibleConfig("lossless", coefficients))
        with torch.no_grad():
            want = plain.bert(**batch).last_hidden_state
            distances.append(float((model.bert(**batch).last_hidden_state - want).norm() / want.norm()))
    assert distances[0] > 5 * distances[1] > 25 * distances[2] and distances[2] < 0.01


# --------------------------------------------------------------------------------------------------------------- bits
numbers = st.lists(st.floats(-2.0**22, 2.0**22) | st.floats(-1e-8, 1e-8), min_size=1, max_size=37)


@given(values=numbers, bits=st.sampled_from([1, 2, 4, 8]))
@example(values=[2.0**22, -(2.0**22), UNIT, -UNIT, 0.0], bits=8)
@settings(max_examples=200, deadline=None)
def test_what_the_bits_lose_comes_back(values, bits):
    x = to_grid(torch.tensor(values, dtype=torch.float64))
    kept = x.clone()
    scaled, lost = split_bits(x, bits)
    assert torch.equal(x, kept)  # the caller's tensor is left alone
    assert lost.dtype == torch.uint8 and lost.numel() == -(-len(values) * bits // 8)
    assert torch.equal(scaled, torch.floor(x / UNIT / 2**bits) * UNIT)
    assert torch.equal(join_bits(scaled, lost, bits), x)


def test_lost_bits_are_needed():
    x = to_grid(torch.randn(99, generator=seeded(), dtype=torch.float64))
    scaled, lost = split_bits(x, 4)
    assert 0.8 < float((join_bits(scaled, torch.zeros_like(lost), 4) != x).double().mean()) < 1


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 3, 5), (0,)])
def test_shapes_of_odd_size(shape):
    x = to_grid(torch.randn(shape, generator=seeded()))
    for bits in (1, 2, 4, 8):
        assert torch.equal(join_bits(*split_bits(x, bits), bits), x)


# ---------------------------------------------------------------------------------------------------------- exactness
@pytest.mark.parametrize("kind, lam", [("lossless", 1 / 2), ("lossless", 1 / 16), ("lossless", 1 / 256), ("bdia", 1 / 2), ("bdia", 1 / 4)])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_fixed_point_is_undone_exactly_at_36_layers(family, kind, lam):
    model = make_reversible(tiny(family, layers=36, hidden=16, dropout=0.1), ReversibleConfig(kind, (lam, 1.0))).train()
    outputs = forward_streams(model, inputs_of(model))
    assert torch.isfinite(outputs.last[1]).all()
    for got, want in zip(invert(model, outputs), outputs.before):
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert reconstruction_error(model, inputs_of(model)).by_layer == (0.0,) * 36


def test_the_error_starts_anew_in_each_segment(monkeypatch):
    monkeypatch.setattr("memarc_utils.couplings._WORST_ERROR", float("inf"))

    def errors(**settings):
        model = make_reversible(tiny(layers=12), ReversibleConfig("meft1", (0.5, 1.0), stream_dtype="float32", **settings))
        return reconstruction_error(model, inputs_of(model), bound=1.0).by_layer

    whole, parts = errors(segment=6), errors(segment=3)
    assert max(parts) < max(whole) / 4
    assert all(parts[n] < 1e-6 for n in (2, 5, 8, 11)) and whole[2] > 5 * parts[2]
    assert [error == max(parts[n - n % 3:n - n % 3 + 3]) for n, error in enumerate(parts)].count(True) >= 4


def test_a_warning_names_the_layer_and_the_error(monkeypatch):
    monkeypatch.setattr("memarc_utils.couplings._WORST_ERROR", float("inf"))
    model = make_reversible(tiny(layers=8), ReversibleConfig("meft1", stream_dtype="float32"))
    with pytest.warns(UserWarning, match=r"the inputs of layer 0 come back with a relative error of .*coupling='lossless'"):
        assert reconstruction_error(model, inputs_of(model)).worst > 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reconstruction_error(make_reversible(tiny(layers=8), ReversibleConfig()), inputs_of(model))


# A forecast that is used up to 1e-2: above, the setting is refused, and whether by 1e3 or by 1e6 makes no difference.
@pytest.mark.parametrize("stream_dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind, coefficients", [("meft1", (0.1, 1.0)), ("meft1", (0.5, 1.0)), ("meft2", (1.0, 0.1)), ("meft3", (0.5, 0.5)),
                                                ("midpoint", None)])
def test_expected_error_is_not_below_what_is_measured(kind, coefficients, stream_dtype, monkeypatch):
    monkeypatch.setattr("memarc_utils.couplings._WORST_ERROR", float("inf"))
    config, used = ReversibleConfig(kind, coefficients, stream_dtype=stream_dtype), 0
    for family in ("bert", "llama"):
        for layers in (4, 8, 12, 24):
            expected = config.expected_error(layers)
            if expected > 1e-2:
                continue
            model = make_reversible(tiny(family, layers=layers), config)
            assert reconstruction_error(model, inputs_of(model), bound=1.0).worst <= 10 * expected, (family, layers)
            used += 1
    assert used >= 2
    assert config.expected_error(24) > config.expected_error(12) > config.expected_error(4)


# ----------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("arguments, words", [
    (dict(coupling="revnet"), "coupling must be one of meft1"),
    (dict(stream_dtype="bfloat16"), "stream_dtype must be 'float32' or 'float64'"),
    (dict(coupling="meft1", coefficients=(0.0, 1.0)), "above 0 and at most 1"),
    (dict(coupling="meft1", coefficients=(0.5, 1.5)), "above 0 and at most 1"),
    (dict(coupling="meft1", coefficients=(float("nan"), 1.0)), "above 0 and at most 1"),
    (dict(coupling="midpoint", coefficients=(0.5, 1.0)), "leave them out"),
    (dict(coefficients=(0.3, 1.0)), "λ one of"), (dict(coupling="bdia", coefficients=(0.5, 0.5)), "λ one of"),
    (dict(stream_dtype="float32"), "take stream_dtype='float64'"),
    (dict(segment=0), "segment must be"), (dict(adapter_width=-1), "adapter_width must be"),
    (dict(adapter_width=4), "leave adapter_width at 0")])
def test_settings_that_cannot_work_are_refused(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        ReversibleConfig(**arguments)


def test_every_lambda_that_the_refusal_names_works():
    with pytest.raises(ValueError) as refused:
        ReversibleConfig(coefficients=(0.3, 1.0))
    for lam in re.search(r"one of \[(.*?)\]", str(refused.value))[1].split(","):
        model = make_reversible(tiny(layers=3), ReversibleConfig(coefficients=(float(lam), 1.0)))
        assert reconstruction_error(model, inputs_of(model)).worst == 0


@pytest.mark.parametrize("config", [
    ReversibleConfig("meft1"), ReversibleConfig("meft1", stream_dtype="float32", adapter_width=4), ReversibleConfig("meft3"),
    ReversibleConfig("meft2", (1.0, 1e-3), stream_dtype="float32"),
    ReversibleConfig("meft1", (0.5, 1.0), segment=20, stream_dtype="float32"),
    ReversibleConfig("meft3", (1e-8, 1e-8))], ids=lambda config: f"{config.coupling}-{config.coefficients}-{config.stream_dtype}")
def test_what_a_refused_depth_is_told_to_take_does_work(config):
    layers = 24
    model = tiny(layers=layers)
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="loses its inverse over") as refused:
        make_reversible(model, config)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    said = str(refused.value).split("take ")[1].split(", or ")
    assert said[0].startswith("coupling='lossless'") and said[-1] == "larger coefficients"
    ways = [{name: eval(value) for name, value in re.findall(r"(\w+)=('\w+'|\w+)", way)} for way in said[:-1]]
    assert len(ways) == (1 if config.coefficients == (1e-8, 1e-8) else 2)  # there no segment at all would do
    for way in ways:
        mended = make_reversible(tiny(layers=layers), replace(config, **way))
        assert reconstruction_error(mended, inputs_of(mended), bound=1e-2).worst <= 1e-2
