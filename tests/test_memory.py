"""`memory`: measured peaks and saved bytes are those that can be counted by hand, and come out the same every time."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memarc_utils import memory, probe
from memarc_utils.memory import SavedBytes, StepCost, held_bytes, measure_step, saved_bytes
from tests.models import padded_batch, plan_for_tests, private_sgd, tiny

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


def private_step(mode, micro_batches=1, width=128, clipping="flat"):
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(width, width), nn.Tanh())))
    private, x = private_sgd(model, plan_for_tests(num_steps=100), mode=mode, clipping=clipping), torch.randn(16, 4, width)

    def step():
        for _ in range(micro_batches):
            private.backward(model(x).square().mean((1, 2)))
        private.step()

    return step


def test_measurements_repeat_exactly(monkeypatch):
    monkeypatch.setattr(probe, "_CHANCE", 0)  # of looking in any other step than those below
    step = private_step("book_keeping")
    for _ in range(4):  # the steps 1, 2, 4, 8, ... also look whether examples meet: of 6 and 11, which follow, neither does
        step()
    first, second = measure_step(step, repeats=3), measure_step(step, repeats=3)
    assert first.peak_bytes == second.peak_bytes > 0
    assert first.seconds > 0 and first.peak_megabytes == first.peak_bytes / 1e6


def test_what_is_released_and_is_not_of_the_run_does_not_count(monkeypatch):
    """The profiler knows blocks by their address alone: one of an earlier run that was released after it leaves its size behind."""
    events = [(1, 100, 40), (2, 200, -64), (3, 300, 8), (4, 100, -40), (5, 100, 16)]
    monkeypatch.setattr(memory, "_allocations", lambda profile: iter(events))
    assert memory._held_and_peak_on_cpu(lambda: None) == (24, 48)


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


def test_what_a_step_saves_and_holds():
    """Two tanh save their outputs; sums save nothing. The engine holds three layers' pairs (inputs and gradients of 16 x 4 tokens) and
    the biases' per-example gradients, or all per-example gradients; with per-layer clipping one layer's at a time."""
    x = torch.ones(KILO, requires_grad=True)
    cost = measure_step(lambda: torch.tanh(torch.tanh(x)).sum().backward(), repeats=1)
    assert (cost.saved_bytes, cost.engine_bytes) == (8_000, 0)
    pair, weights, bias = 2 * 16 * 4 * 128 * 4, 16 * 128 * 128 * 4, 16 * 128 * 4
    assert measure_step(private_step("book_keeping"), repeats=1).engine_bytes == 3 * (pair + bias)
    assert measure_step(private_step("per_example"), repeats=1).engine_bytes == 3 * (weights + bias)
    one_layer = measure_step(private_step("book_keeping", clipping="per_layer"), repeats=1)
    assert pair <= one_layer.engine_bytes <= pair + bias
    assert one_layer.saved_bytes == 4 * 16 * 4 * 128 * 4  # x and three outputs, which are inputs too


def test_repeats_must_be_positive():
    with pytest.raises(ValueError, match="repeats must be a whole number >= 1, got 0"):
        measure_step(lambda: None, repeats=0)


def test_megabytes():
    assert StepCost(2_000_000, 0.5).peak_megabytes == 2.0


# What autograd keeps: closed forms, in float32 numbers of 4 bytes.

ROWS, WIDE, OUT = 6, 10, 5  # sizes that no sum of the others gives


def activation():
    """A tensor that needs a gradient and is not a leaf, as inside a model; multiplying by a number saves nothing."""
    return torch.ones(ROWS, WIDE, requires_grad=True) * 2


def linear(weight, bias):
    layer = nn.Linear(WIDE, OUT)
    layer.weight.requires_grad, layer.bias.requires_grad = weight, bias
    return layer


@pytest.mark.parametrize("layer, want", [
    (linear(True, True), ROWS * WIDE),
    (linear(False, True), 0),
    (linear(False, False), 0),
    (nn.GELU(), ROWS * WIDE),
    (nn.ReLU(), ROWS * WIDE),
    (nn.Softmax(-1), ROWS * WIDE),
    (nn.LayerNorm(WIDE), ROWS * WIDE + 2 * ROWS),
    (nn.LayerNorm(WIDE).requires_grad_(False), ROWS * WIDE + 2 * ROWS),
    (nn.Sequential(nn.Linear(WIDE, WIDE), nn.ReLU(), nn.Linear(WIDE, OUT)), 2 * ROWS * WIDE),
    (nn.Sequential(nn.Linear(WIDE, WIDE), nn.GELU(), nn.Linear(WIDE, OUT)), 3 * ROWS * WIDE),
], ids=["linear", "bias only", "frozen linear", "gelu", "relu", "softmax", "layer norm", "frozen layer norm",
        "relu's output, shared", "gelu"])
def test_saved_bytes_that_can_be_counted(layer, want):
    x = activation()
    assert saved_bytes(lambda: layer(x)).total == 4 * want


def test_a_checkpoint_keeps_its_input_alone():
    """Four layers in two checkpointed halves: an input each, whatever happens inside."""
    def half():
        return nn.Sequential(nn.Linear(WIDE, WIDE), nn.GELU(), nn.LayerNorm(WIDE), nn.Linear(WIDE, WIDE))

    halves, x = [half(), half()], activation()
    model = nn.Sequential(*halves)

    def checkpointed():
        return checkpoint(halves[1], checkpoint(halves[0], x, use_reentrant=False), use_reentrant=False)

    assert saved_bytes(checkpointed).storages == (4 * ROWS * WIDE, 4 * ROWS * WIDE)
    assert saved_bytes(lambda: model(x)).total == 2 * 4 * (4 * ROWS * WIDE + 2 * ROWS)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        square = x * x
        ctx.save_for_backward(x, square)
        return x * square

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad * ctx.saved_tensors[1]


def test_custom_functions_are_seen_and_still_run():
    x = activation()
    assert saved_bytes(lambda: Cube.apply(x)).storages == (4 * ROWS * WIDE,) * 2
    leaf = torch.full((3,), 2.0, requires_grad=True)
    results = []

    def forward():
        results.append(Cube.apply(leaf).sum())
        return results[0]

    saved_bytes(forward)
    results[0].backward()  # the graph stays usable after it was counted
    assert leaf.grad.tolist() == [12.0] * 3


def test_each_storage_counts_once_and_in_full():
    """x ⊙ x saves x twice, and a saved view keeps the whole storage behind it alive."""
    x = activation()
    assert saved_bytes(lambda: x * x).total == 4 * ROWS * WIDE
    assert saved_bytes(lambda: x[:1].tanh() + x[1:2].square().sum()).storages == (4 * WIDE, 4 * ROWS * WIDE)


def test_what_is_released_or_needs_no_gradient_is_not_counted():
    x, layer = activation(), nn.Linear(WIDE, OUT)

    def first_graph_is_dropped():
        torch.tanh(layer(x)).sum().backward(retain_graph=True)
        return torch.tanh(layer(x))

    assert saved_bytes(first_graph_is_dropped).total == 4 * (ROWS * WIDE + ROWS * OUT)
    with torch.no_grad():
        assert saved_bytes(lambda: torch.tanh(layer(x))) == SavedBytes(0, ())
    assert saved_bytes(lambda: torch.tanh(torch.ones(3))).megabytes == 0


def test_parameters_are_recognised_and_buffers_are_the_models():
    """A frozen weight is saved for the gradient of the input, and stands anyway. So do a normalisation's statistics."""
    x, norm = activation(), nn.BatchNorm1d(WIDE).eval()
    assert saved_bytes(lambda: linear(False, False)(x)).total == 0
    assert saved_bytes(lambda: norm(x)).total == 4 * ROWS * WIDE + 2 * 4 * WIDE
    assert saved_bytes(lambda: norm(x), norm).total == 4 * ROWS * WIDE
    detached = linear(False, False)
    assert saved_bytes(lambda: x @ detached.weight.detach().T).total == 4 * WIDE * OUT
    assert saved_bytes(lambda: x @ detached.weight.detach().T, detached).total == 0


def test_it_counts_without_memory():
    """Tensors on `meta` have shapes and no content: a model of any size can be asked."""
    layer = nn.Sequential(nn.Linear(WIDE, WIDE), nn.GELU(), nn.Linear(WIDE, OUT)).to("meta")
    x = activation().to("meta")
    assert saved_bytes(lambda: layer(x)).total == 3 * 4 * ROWS * WIDE


def test_the_allocator_says_the_same():
    """All that a forward pass leaves allocated is what autograd keeps, and the result."""
    model = tiny("roberta", hidden=64, layers=3)
    batch = {name: t for name, t in padded_batch(model, batch=4, tokens=16).items() if name != "labels"}

    def forward():
        return model(**batch).logits.sum()

    saved, held = saved_bytes(forward, model).total, held_bytes(forward)
    assert saved > 3 * 16 * 4 * 16 * 64 * 4  # 16 BTd a layer
    assert held == pytest.approx(saved, rel=0.01)


def test_the_engine_keeps_no_more_than_plain_training():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(WIDE, WIDE), nn.Tanh(), nn.Linear(WIDE, OUT)), activation()
    plain = saved_bytes(lambda: model(x)).total
    assert plain == 2 * 4 * ROWS * WIDE
    private = private_sgd(model, plan_for_tests())
    try:
        assert saved_bytes(lambda: model(x)).total == plain
    finally:
        private.detach()


def test_a_forward_without_result_is_refused():
    with pytest.raises(ValueError, match="return the loss"):
        saved_bytes(lambda: None)


def test_a_step_on_the_cpu_is_measured_there_beside_a_gpu(monkeypatch):
    def step():
        return torch.ones(5000) + torch.ones(5000)

    want, held = measure_step(step, repeats=1).peak_bytes, held_bytes(step)
    for name, value in (("is_available", True), ("memory_allocated", 0), ("max_memory_allocated", 0), ("synchronize", None),
                        ("reset_peak_memory_stats", None)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert measure_step(step, repeats=1).peak_bytes == want == 60_000 and held_bytes(step) == held == 20_000
