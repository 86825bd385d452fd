"""The planner against what really is allocated, and its bookkeeping of parts."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, LlamaConfig, OPTConfig

from memarc_utils import planning
from memarc_utils.accounting import PrivacyPlan
from memarc_utils.dp_sgd import make_private
from memarc_utils.feature_cache import side_of
from memarc_utils.memory import largest_batch, measure_step, plan_memory, saved_bytes
from memarc_utils.probe import Probe
from memarc_utils.methods import METHODS, SHAPES
from memarc_utils.randomness import cryptographic_normals
from memarc_utils.training import causal_lm_losses, classification_losses

BATCH, TOKENS = 8, 48
SMALL = {
    "encoder": lambda: SHAPES["tiny"](),
    "gpt2": lambda: GPT2Config(vocab_size=101, n_embd=64, n_layer=2, n_head=2, n_positions=64, pad_token_id=0),
    "opt": lambda: OPTConfig(vocab_size=101, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, ffn_dim=128,
                             max_position_embeddings=64, word_embed_proj_dim=64, pad_token_id=0),
    "llama": lambda: LlamaConfig(vocab_size=101, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                                 intermediate_size=128, max_position_embeddings=64, pad_token_id=0),
}


def no_noise(batch_size=BATCH):
    return PrivacyPlan(dataset_size=1000, expected_batch_size=batch_size, num_steps=100, noise_multiplier=0.0, max_grad_norm=1.0,
                       delta=1e-5)


def real_step(family, method, task, clipping="flat", engine="book-keeping", checkpointing=False, device="cpu"):
    """The same step on tensors that hold numbers: another route to the peak, by the allocator's events."""
    torch.manual_seed(0)
    make = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    with torch.device(device):
        model = make.from_config(SMALL[family]())
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model = METHODS[method](model).train()
        batch = {"labels": torch.zeros((BATCH, TOKENS) if task == "causal-lm" else (BATCH,), dtype=torch.long)}
        if method.startswith("side-cached"):
            side = side_of(model)
            batch["inputs_embeds"] = torch.randn(BATCH, TOKENS, side.cached_width, dtype=torch.bfloat16)
        else:
            batch["input_ids"] = torch.randint(3, 100, (BATCH, TOKENS))
    losses = causal_lm_losses if task == "causal-lm" else classification_losses
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    if engine == "non-private":
        def step():
            losses(model, {name: t.clone() for name, t in batch.items()}).mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return step
    private = make_private(model, optimizer, no_noise(), clipping=clipping,
                           mode="per_example" if engine == "per-example" else "book_keeping",
                           noise_generator=torch.Generator().manual_seed(0))
    private.sampler._probe = Probe(set())  # it runs in some steps only, and not on fake tensors

    def step():
        private.backward(losses(model, {name: t.clone() for name, t in batch.items()}))
        private.step()

    return step


CASES = [*(("encoder", method, "classification", {}) for method in METHODS if method != "bitfit with added biases"),
         ("encoder", "full", "classification", {"engine": "per-example"}), ("encoder", "full", "classification", {"engine": "non-private"}),
         ("encoder", "lora", "classification", {"checkpointing": True}),
         ("encoder", "rev-lora", "classification", {"clipping": "per_layer"}),
         ("encoder", "full", "classification", {"clipping": "per_layer"}),
         *((family, method, "causal-lm", {}) for family in ("gpt2", "llama") for method in ("lora", "side", "rev-lora")),
         ("llama", "bitfit with added biases", "causal-lm", {}), ("opt", "full", "classification", {})]


@pytest.mark.parametrize("family, method, task, options", CASES, ids=lambda value: value if isinstance(value, str) else str(sorted(value)))
def test_planned_peak_is_what_the_allocator_gives_out(family, method, task, options):
    plan = plan_memory(SMALL[family](), method, BATCH, TOKENS, task=task, **options)
    measured = measure_step(real_step(family, method, task, **options), repeats=1).peak_bytes
    assert plan.peak_bytes - plan.optimizer_state == pytest.approx(measured, rel=0.02)  # most agree to 64 bytes


def test_the_draw_of_noise_is_the_peak_of_a_step_with_few_activations():
    """A head of 64 · 64 values above a frozen body, one example of two tokens: while noise is drawn its sums stand, and 12 bytes a value."""
    cryptographic_normals(2)
    tracemalloc.start()
    cryptographic_normals(100_000)
    drawn = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert drawn == pytest.approx(planning._DRAW * 100_000, rel=0.01)
    config = SMALL["encoder"]()
    plan = plan_memory(config, "probe", 1, 2)
    assert plan.gradients == 4 * plan.trainable and plan.working == 12 * config.hidden_size**2 and plan.activations == plan.engine == 0
    assert plan.peak_bytes - plan.optimizer_state == plan.gradients + plan.working
    assert plan.total_bytes == plan_memory(config, "probe", 1, 2, parts=False).total_bytes
    assert plan_memory(config, "probe", 16, 64).activations > 0  # here it is the forward pass


def test_parts_add_up_to_the_total():
    plan = plan_memory(SMALL["encoder"](), "full", BATCH, TOKENS)
    model = AutoModelForSequenceClassification.from_config(SMALL["encoder"]())
    numbers = sum(p.numel() for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    assert plan.trainable == numbers and plan.parameters == 4 * numbers + buffers
    # Two moments a parameter, and one count of steps for each of them.
    assert plan.optimizer_state == 2 * 4 * numbers + 4 * len(list(model.parameters()))
    assert plan.working >= 0


@pytest.mark.parametrize("method", ["lora", "adapters"])
def test_activations_are_what_autograd_saves(method):
    """Another route to one part: the saved tensors of a real forward pass, where the peak stands at the start of the backward pass."""
    plan = plan_memory(SMALL["encoder"](), method, BATCH, TOKENS)
    torch.manual_seed(0)
    model = METHODS[method](AutoModelForSequenceClassification.from_config(SMALL["encoder"]())).train()
    private = make_private(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), no_noise())
    batch = {"input_ids": torch.randint(3, 100, (BATCH, TOKENS)), "labels": torch.zeros(BATCH, dtype=torch.long)}
    saved = saved_bytes(lambda: classification_losses(model, batch), model).total
    private.detach()
    assert plan.activations + plan.engine == pytest.approx(saved, rel=0.1)


def test_per_example_gradients_are_the_engines():
    """All of them stand at the end of the backward pass: B times what trains, but for what is summed already."""
    plan = plan_memory(SMALL["encoder"](), "full", BATCH, TOKENS, engine="per-example")
    assert plan.engine == pytest.approx(BATCH * 4 * plan.trainable, rel=0.05)


def test_frozen_weights_take_the_type_and_trained_ones_do_not():
    wide, narrow = (plan_memory("tiny", "lora", 2, 16, dtype) for dtype in ("float32", torch.bfloat16))
    model = METHODS["lora"](AutoModelForSequenceClassification.from_config(SMALL["encoder"]()))
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert narrow.trainable == wide.trainable and wide.parameters - narrow.parameters == 2 * frozen
    assert plan_memory("tiny", "full", 2, 16, torch.bfloat16).parameters == plan_memory("tiny", "full", 2, 16).parameters


def test_half_precision_runs_in_both_kinds():
    """A step in float16 holds what one in bfloat16 does, and less than one in float32."""
    half = {dtype: plan_memory("tiny", "lora", BATCH, TOKENS, dtype).peak_bytes for dtype in ("float16", "bfloat16", "float32")}
    assert half["float16"] == half["bfloat16"] < half["float32"]


def test_the_total_alone_is_the_same_total():
    whole, total = (plan_memory("tiny", "side", 4, 16, parts=parts) for parts in (True, False))
    assert total.total_bytes == whole.total_bytes and total.activations == 0


def test_a_longer_or_larger_batch_takes_more():
    base = plan_memory("tiny", "lora", 4, 32).peak_bytes
    assert plan_memory("tiny", "lora", 8, 32).peak_bytes > base and plan_memory("tiny", "lora", 4, 64).peak_bytes > base
    long = {fused: plan_memory("tiny", "lora", 4, 256, fused_attention=fused).peak_bytes for fused in (False, True)}
    assert long[True] < 0.8 * long[False]  # dropout on attention weights keeps them: (B, heads, T, T)


def test_a_piece_of_a_direction_and_the_kernels_scratch_are_counted():
    whole = plan_memory("tiny", "full", 1, 1, engine="zeroth order")
    assert whole.peak_bytes == 4 * 1026 * 64  # its largest parameter, the position table, in one piece
    assert whole.resident_bytes - whole.peak_bytes == 3_000_000


def test_two_passes_keep_the_graph_and_the_gradients():
    plain, ghost = (plan_memory("tiny", "full", BATCH, TOKENS, engine=engine, optimizer="sgd")
                    for engine in ("non-private", "two-pass ghost"))
    assert ghost.peak_bytes > plain.peak_bytes and ghost.gradients > plain.gradients


@pytest.mark.parametrize("method, budget", [("side", 0.01), ("lora", 0.02), ("full", 0.012)])
def test_largest_batch_is_the_last_that_fits(method, budget):
    largest = largest_batch("tiny", method, 32, budget)
    totals = [plan_memory("tiny", method, batch, 32).total_gib for batch in (largest, largest + 1)]
    assert largest >= 1 and totals[0] <= budget < totals[1]


@pytest.mark.parametrize("bytes_of", [lambda b: 10**9 + 10**6 * b, lambda b: 10**9 + max(0, b - 700) * 10**7, lambda b: 10**7 * b**2,
                                      lambda b: 3 * 10**9 * (b > 10) + 10**3 * b, lambda b: 10**9 + 10**8 * (b // 64)])
def test_largest_batch_takes_few_plans_where_memory_bends(bytes_of, monkeypatch):
    asked = []

    def plan(config, method, batch_size, num_tokens, **settings):
        asked.append(batch_size)
        return SimpleNamespace(total_bytes=bytes_of(batch_size))

    monkeypatch.setattr(planning, "_plan", plan)
    largest = largest_batch("tiny", "lora", 32, 3)
    assert bytes_of(largest) <= 3 * 2**30 < bytes_of(largest + 1)
    assert len(asked) == len(set(asked)) <= 30


def test_a_batch_may_be_larger_than_the_planned_data_set():
    assert plan_memory("tiny", "probe", 60_000, 4).total_bytes > 0


def test_largest_batch_is_zero_where_one_example_does_not_fit():
    assert largest_batch("tiny", "lora", 32, 1e-5) == 0
    with pytest.raises(ValueError, match="budget_gib must be a number above 0"):
        largest_batch("tiny", "lora", 32, 0)
    with pytest.raises(ValueError, match="no setting 'batch_size': give some of checkpointing"):
        largest_batch("tiny", "lora", 32, 1.0, batch_size=4)


@pytest.mark.parametrize("change, message", [
    ({"model": "bert-huge"}, "model must be one of tiny"), ({"model": nn.Linear(2, 2)}, "got Linear"),
    ({"method": "LoRA"}, "method must be one of full"),
    ({"batch_size": 0}, "batch_size must be a whole number >= 1"), ({"num_tokens": 2000}, "more than the 1024 positions"),
    ({"dtype": torch.int8}, "dtype must be one of"), ({"engine": "opacus"}, "engine must be one of"),
    ({"task": "ner"}, "task must be one of"),
    ({"method": "rev-lora", "checkpointing": True}, "recomputes its activations itself"), ({"clipping": "norm"}, "clipping must be"),
    ({"method": "side-cached", "engine": "zeroth order"}, "runs no backbone"),
    ({"engine": "zeroth order", "dtype": "bfloat16"}, "which 16 bits cannot hold"),
    ({"optimizer": "lion"}, "optimizer must be one of"), ({"clipping": "per_layer", "engine": "non-private"}, "is our engine's"),
])
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        plan_memory(**{"model": "tiny", "method": "lora", "batch_size": 2, "num_tokens": 8, **change})


def test_a_method_that_cannot_run_says_why():
    with pytest.raises(ValueError, match="no bias to train"):
        plan_memory(SMALL["llama"](), "bitfit", 2, 8)


def test_a_model_is_planned_by_its_configuration_and_left_alone():
    model = AutoModelForSequenceClassification.from_config(SMALL["encoder"]())
    before = {name: id(p) for name, p in model.named_parameters()}
    assert plan_memory(model, "lora", 2, 8) == plan_memory(SMALL["encoder"](), "lora", 2, 8)
    assert {name: id(p) for name, p in model.named_parameters()} == before and not any("lora" in name for name in before)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "bitfit with added biases"])
def test_a_step_on_the_meta_device(method):
    """Nothing branches on data and nothing makes a tensor on another device: either would raise."""
    real_step("encoder", method, "classification", device="meta")()


def test_eight_billion_parameters_in_little_memory():
    code = ("import json, resource; from memarc_utils.memory import plan_memory; import torch; "
            "plan = plan_memory('llama-3-8b', 'side', 4, 256, torch.bfloat16); "
            "print(json.dumps([plan.parameters, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6]))")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True,
                          cwd=Path(__file__).resolve().parents[1])
    parameters, gigabytes = json.loads(done.stdout.strip().splitlines()[-1])
    assert parameters > 16e9 and gigabytes <= 4
