"""What is compared with what: ways to choose a model's trainable part, by name, and shapes of published models."""

from collections.abc import Callable
from dataclasses import replace

from torch import nn
from transformers import GPT2Config, LlamaConfig, OPTConfig, PreTrainedConfig, RobertaConfig

from memarc_utils.adapters import add_bottleneck_adapters, add_lora, select_bias_terms, select_linear_probe, train_everything
from memarc_utils.reversible import ReversibleConfig, make_reversible
from memarc_utils.side_network import SideNetworkConfig, attach_side_network

_QUARTER = ReversibleConfig(coefficients=(1 / 4, 1.0))
_REDUCTION_8 = SideNetworkConfig(reduction=8)
_EVERY_SECOND = replace(_REDUCTION_8, layers=2)

METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "full": train_everything,
    "lora": add_lora,
    "ffa-lora": lambda model: add_lora(model, freeze_a=True),
    "adapters": add_bottleneck_adapters,
    "bitfit": select_bias_terms,
    "bitfit with added biases": lambda model: select_bias_terms(model, add_missing=True),
    "probe": select_linear_probe,
    "rev-lora": lambda model: make_reversible(add_lora(model)),
    "rev-lora quarter": lambda model: make_reversible(add_lora(model), _QUARTER),  # half the kept bits
    "side": lambda model: attach_side_network(model, _REDUCTION_8),
    "side every second block": lambda model: attach_side_network(model, _EVERY_SECOND),  # what the accuracy grid trains
    "side-cached": lambda model: attach_side_network(model, replace(_REDUCTION_8, downsample="pooled")),
    "side-cached learned": lambda model: attach_side_network(model, _EVERY_SECOND),
}


def _roberta(width: int, layers: int) -> RobertaConfig:
    return RobertaConfig(vocab_size=50265, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
                         intermediate_size=4 * width, max_position_embeddings=1026, type_vocab_size=1, pad_token_id=1)


def _llama(width: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                       num_key_value_heads=kv_heads, intermediate_size=inner, max_position_embeddings=8192, pad_token_id=0)


# Configurations of published models, from their papers; the position table of RoBERTa reaches to 1,024 tokens instead of 512.
SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "tiny": lambda: RobertaConfig(vocab_size=101, hidden_size=64, num_hidden_layers=2, num_attention_heads=1,
                                  intermediate_size=256, max_position_embeddings=1026, type_vocab_size=1, pad_token_id=1),
    "roberta-base": lambda: _roberta(768, 12),
    "roberta-base-24": lambda: _roberta(768, 24),
    "roberta-base-48": lambda: _roberta(768, 48),
    "roberta-large": lambda: _roberta(1024, 24),
    "gpt2": lambda: GPT2Config(pad_token_id=50256),
    "gpt2-large": lambda: GPT2Config(n_embd=1280, n_layer=36, n_head=20, pad_token_id=50256),
    "opt-6.7b": lambda: OPTConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, ffn_dim=16384, word_embed_proj_dim=4096),
    "llama-3-8b": lambda: _llama(4096, 32, 32, 8, 14336, 128256),
    "llama-2-70b": lambda: _llama(8192, 80, 64, 8, 28672, 32000),
}
