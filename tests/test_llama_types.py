"""Mistral and Qwen2, whose blocks are laid out as Llama's: every method prepares them, starts where it should and keeps its promises."""

import pytest
import torch
from torch import nn
from transformers import (
    GPTNeoXConfig,
    MistralConfig,
    MistralForCausalLM,
    MistralForSequenceClassification,
    PhiConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    T5Config,
)

from memarc_utils.block_halves import attention_half, mlp_half
from memarc_utils.couplings import ReversibleConfig
from memarc_utils.dp_sgd import verify_sensitivity
from memarc_utils.memory import plan_memory
from memarc_utils.methods import METHODS
from memarc_utils.reversible import gradient_error, make_reversible, reconstruction_error
from memarc_utils.side_network import SideNetworkConfig, attach_side_network
from tests.models import padded_batch, plain_losses, shake

MODELS = {"mistral": (MistralConfig, {"causal_lm": MistralForCausalLM, "classification": MistralForSequenceClassification}),
          "qwen2": (Qwen2Config, {"causal_lm": Qwen2ForCausalLM, "classification": Qwen2ForSequenceClassification})}
WAYS = {**METHODS, "side": lambda model: attach_side_network(model, SideNetworkConfig(reduction=4, block="attention")),
        "bitfit": lambda model: METHODS["bitfit with added biases"](model)}
CASES = [(family, task) for family in MODELS for task in ("causal_lm", "classification")]
METHODS_HERE = ("full", "lora", "ffa-lora", "adapters", "bitfit", "probe", "rev-lora", "side")


def config_of(family, **settings):
    return MODELS[family][0](vocab_size=40, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                             intermediate_size=48, max_position_embeddings=64, pad_token_id=0, tie_word_embeddings=False, **settings)


def model_of(family, task, **settings):
    torch.manual_seed(0)
    return MODELS[family][1][task](config_of(family, **settings)).eval()


@pytest.mark.parametrize("method", METHODS_HERE)
@pytest.mark.parametrize("family, task", CASES)
def test_one_example_moves_the_sum_by_at_most_c(family, task, method):
    model = shake(WAYS[method](model_of(family, task)))
    report = verify_sensitivity(model, plain_losses, padded_batch(model, task))
    assert report.holds, str(report)


@pytest.mark.parametrize("method", ["lora", "adapters", "bitfit", "side"])
@pytest.mark.parametrize("family, task", CASES)
def test_the_start_is_the_pretrained_model(family, task, method):
    model = model_of(family, task)
    batch = padded_batch(model, task)
    with torch.no_grad():
        want = model(**batch).logits
        assert torch.equal(WAYS[method](model).eval()(**batch).logits, want)


@pytest.mark.parametrize("family, task", CASES)
def test_reversible_blocks_are_undone_exactly(family, task):
    model = shake(WAYS["rev-lora"](model_of(family, task))).train()
    batch = padded_batch(model, task)
    assert reconstruction_error(model, batch).worst == 0
    assert gradient_error(model, batch, plain_losses) <= 1e-5


@pytest.mark.parametrize("family", MODELS)
def test_halves_are_the_block(family):
    model, seen = model_of(family, "causal_lm"), []
    block = model.model.layers[1]
    block.register_forward_hook(lambda module, args, kwargs, output: seen.append((args[0], kwargs, output)), with_kwargs=True)
    with torch.no_grad():
        model(**padded_batch(model, "causal_lm"), use_cache=False)
        hidden, context, output = seen[0]
        torch.testing.assert_close(mlp_half(family, block, attention_half(family, block, hidden, context)),
                                   output[0] if isinstance(output, tuple) else output)


def test_a_sliding_window_is_handed_on():
    """Mistral's mask by layer: the reversible network and the side network give it to their blocks as it is."""
    model = model_of("mistral", "causal_lm", sliding_window=3)
    batch = padded_batch(model, "causal_lm", tokens=9)
    with torch.no_grad():
        narrow, wide = model(**batch).logits, model_of("mistral", "causal_lm")(**batch).logits
        assert not torch.allclose(narrow, wide, atol=1e-4)
        torch.testing.assert_close(attach_side_network(model).eval()(**batch).logits, narrow, rtol=0, atol=0)
    model = make_reversible(WAYS["lora"](model_of("mistral", "causal_lm", sliding_window=3)), ReversibleConfig())
    assert gradient_error(model, batch, plain_losses) <= 1e-5


@pytest.mark.parametrize("config", [MistralConfig, Qwen2Config])
def test_plans_take_the_decoders_own_task(config):
    small = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
    decoder, classifier = (plan_memory(config(**small), "lora", 2, 16, **task) for task in ({}, {"task": "classification"}))
    assert decoder == plan_memory(config(**small), "lora", 2, 16, task="causal-lm") != classifier


@pytest.mark.parametrize("config", [PhiConfig, GPTNeoXConfig, T5Config])
def test_plans_of_other_models_say_what_is_supported(config):
    with pytest.raises(ValueError, match="no block view of .*; supported are BERT.* Mistral and Qwen2"):
        plan_memory(config(), "full", 2, 16)


def test_every_parameter_of_a_qwen_bias_counts():
    """Qwen2's query, key and value have biases: BiTFiT trains them without adding any."""
    model = METHODS["bitfit"](model_of("qwen2", "classification"))
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {f"model.layers.0.self_attn.{name}_proj.bias" for name in "qkv"} <= trains
    assert all(isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear) for name in trains)
