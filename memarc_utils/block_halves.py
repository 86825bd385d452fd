"""The two halves of a transformer block, each with its own residual sum and norm: what MEFT3 couples instead of whole blocks.

``block(h) = mlp_half(attention_half(h))``; tested for each family. Dropout is where the block has it.
"""

from torch import Tensor, nn

LLAMA_TYPES = ("llama", "mistral", "qwen2")  # blocks of one layout
_OF_ENCODER_DECODERS = ("encoder_hidden_states", "encoder_attention_mask")


def attention_half(family: str, block: nn.Module, h: Tensor, context: dict) -> Tensor:
    """h to the input of the block's MLP half.

    Args:
        family: the config's ``model_type``.
        block: of the backbone.
        h: (batch, tokens, width).
        context: the block's other arguments by name (mask, positions).
    """
    context = {name: value for name, value in context.items() if name not in _OF_ENCODER_DECODERS}
    if family in ("bert", "roberta"):
        return block.attention(h, **context)[0]
    if family == "distilbert":
        return block.sa_layer_norm(block.attention(h, **context)[0] + h)
    if family == "gpt2":
        return block.attn(block.ln_1(h), **context)[0] + h
    if family in LLAMA_TYPES:
        return h + block.self_attn(hidden_states=block.input_layernorm(h), **context)[0]
    before = block.do_layer_norm_before  # OPT
    context = {name: value for name, value in context.items() if name != "use_cache"}
    changed = block.self_attn(hidden_states=block.self_attn_layer_norm(h) if before else h, **context)[0]
    h = h + nn.functional.dropout(changed, p=block.dropout, training=block.training)
    return h if before else block.self_attn_layer_norm(h)


def mlp_half(family: str, block: nn.Module, h: Tensor) -> Tensor:
    """The input of the MLP half to the block's output."""
    if family in ("bert", "roberta"):
        return block.feed_forward_chunk(h)
    if family == "distilbert":
        return block.output_layer_norm(block.ffn(h) + h)
    if family == "gpt2":
        return h + block.mlp(block.ln_2(h))
    if family in LLAMA_TYPES:
        return h + block.mlp(block.post_attention_layernorm(h))
    before = block.do_layer_norm_before  # OPT
    rows = block.final_layer_norm(h) if before else h
    changed = block.fc2(block.activation_fn(block.fc1(rows)))
    h = h + nn.functional.dropout(changed, p=block.dropout, training=block.training)
    return h if before else block.final_layer_norm(h)
