"""How each layer's per-example parameter gradients follow from its input and its output gradient.

A rule is written for one exact ``forward`` function. A subclass that overrides ``forward`` may compute something else, so
it is not covered by its parent's rule. A rule has three parts:

* ``inputs(module, *args, **kwargs)``: the tensors that the layer's gradient depends on, batch axis first;
* ``grad_inputs(module, inputs, grad_output, needed)``: the gradient that goes on down, as autograd would compute it;
* ``record(module, inputs, grad_output)``: yields ``(parameter name, kind, tensors)`` with kind ``pair``, ``lookup`` or
  ``dense`` (see `book_keeping`).
"""

import copy
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memarc_utils.book_keeping import accumulation_dtype
from memarc_utils.function_rules import FunctionRule, per_example_loop

__all__ = ["RULES", "per_example_loop", "register_rule", "rule_for"]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor.dtype))


def _tokens_in_one_axis(tensor: Tensor, trailing: int) -> Tensor:
    """(B, middle axes..., trailing axes) to (B, T, trailing), T = 1 where there is no middle axis."""
    return tensor.reshape(tensor.shape[0], -1, *tensor.shape[tensor.dim() - trailing:])


class LinearRule:
    """``y = x Wᵀ + b``: pair (output gradient, input) for W, sum over tokens for b. `Conv1D` keeps Wᵀ, so its pair is swapped."""

    transposed = False

    @classmethod
    def inputs(cls, module: nn.Module, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
        return (*args, *kwargs.values())

    @classmethod
    def needs_inputs(cls, module: nn.Module) -> bool:
        """A frozen weight's layer (only its bias trains) has no use for its input: nothing is saved."""
        return module.weight.requires_grad

    @classmethod
    def grad_inputs(cls, module, inputs, grad_output, needed):
        weight = module.weight.to(grad_output.dtype)
        return (grad_output @ (weight.t() if cls.transposed else weight),)

    @classmethod
    def record(cls, module, inputs, grad_output):
        g = _tokens_in_one_axis(grad_output, 1)
        if module.weight.requires_grad:
            a = _tokens_in_one_axis(inputs[0], 1)
            yield "weight", "pair", ((a, g) if cls.transposed else (g, a))
        if module.bias is not None and module.bias.requires_grad:
            yield "bias", "dense", g.sum(1, dtype=accumulation_dtype(g.dtype))


class Conv1DRule(LinearRule):
    transposed = True


class EmbeddingRule:
    """``y_t = W[x_t]``: the output gradients are added up row by row; the row of ``padding_idx`` gets none."""

    @staticmethod
    def inputs(module: nn.Module, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
        return (*args, *kwargs.values())

    @staticmethod
    def needs_inputs(module):
        return True

    @staticmethod
    def refuse(module) -> str | None:
        """Settings under which an embedding's gradient is no sum of per-example gradients."""
        if module.max_norm is not None:
            return "max_norm rescales rows in the forward pass by what the batch looked up: set max_norm=None"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq divides by counts over the whole batch: set scale_grad_by_freq=False"
        return None

    @staticmethod
    def grad_inputs(module, inputs, grad_output, needed):
        return (None,)

    @staticmethod
    def record(module, inputs, grad_output):
        indices = inputs[0].reshape(len(inputs[0]), -1)
        values = grad_output.reshape(*indices.shape, -1)
        if module.padding_idx is not None:
            values = values.masked_fill((indices == module.padding_idx)[..., None], 0)
        yield "weight", "lookup", (indices, values)


class OPTPositionRule(EmbeddingRule):
    """OPT looks positions up with an offset, and derives them from the attention mask when none are given."""

    @staticmethod
    def inputs(module, attention_mask=None, past_key_values_length=0, position_ids=None):
        if position_ids is None:
            position_ids = (torch.cumsum(attention_mask, dim=1) * attention_mask - 1).long()[:, past_key_values_length:]
        return (position_ids + module.offset,)


class LayerNormRule:
    """``y = x̂ ⊙ w + b``: ``Σ_t g_t ⊙ x̂_t`` for w and ``Σ_t g_t`` for b, both as small as one vector an example."""

    @classmethod
    def inputs(cls, module, *args, **kwargs):
        return (*args, *kwargs.values())

    @classmethod
    def needs_inputs(cls, module):
        return True

    @classmethod
    def grad_inputs(cls, module, inputs, grad_output, needed):
        x = _wide(inputs[0])
        shape, weight = module.normalized_shape, _wide(module.weight.detach())
        _, mean, inverse = torch.native_layer_norm(x, shape, None, None, module.eps)
        mask = [True, False, False]
        grad, _, _ = torch.ops.aten.native_layer_norm_backward(_wide(grad_output).contiguous(), x, shape, mean, inverse, weight, None, mask)
        return (grad.to(inputs[0].dtype),)

    @classmethod
    def normal(cls, module, x: Tensor) -> Tensor:
        """x̂ in float32 or wider, recomputed from the layer's input."""
        return torch.native_layer_norm(_wide(x), module.normalized_shape, None, None, module.eps)[0]

    @classmethod
    def record(cls, module, inputs, grad_output):
        trailing, wide = module.weight.dim(), _wide(grad_output)
        if module.weight.requires_grad:
            yield "weight", "dense", _tokens_in_one_axis(wide * cls.normal(module, inputs[0]), trailing).sum(1)
        if getattr(module, "bias", None) is not None and module.bias.requires_grad:
            yield "bias", "dense", _tokens_in_one_axis(wide, trailing).sum(1)


class RMSNormRule(LayerNormRule):
    """``y = x / √(mean(x²) + ε) ⊙ w``; torch's ε of None means the machine epsilon of the type it computes in, float32 or wider."""

    @staticmethod
    def _scale(module, x: Tensor) -> tuple[Tensor, tuple[int, ...], Tensor]:
        if hasattr(module, "variance_epsilon"):  # transformers
            epsilon = module.variance_epsilon
        else:
            epsilon = torch.finfo(_wide(x).dtype).eps if module.eps is None else module.eps
        trailing = tuple(range(x.dim() - module.weight.dim(), x.dim()))
        x = _wide(x)
        return x, trailing, torch.rsqrt(x.square().mean(trailing, keepdim=True) + epsilon)

    @classmethod
    def normal(cls, module, x):
        x, _, inverse = cls._scale(module, x)
        return x * inverse

    @classmethod
    def grad_inputs(cls, module, inputs, grad_output, needed):
        x, trailing, inverse = cls._scale(module, inputs[0])
        g = _wide(grad_output) * module.weight
        # ∂L/∂x = (g − x̂ mean(g ⊙ x̂)) / rms, with x̂ = x / rms: no x̂ is made
        inner = (g * x).mean(trailing, keepdim=True) * inverse.square()
        return ((g.sub_(x * inner)).mul_(inverse).to(inputs[0].dtype),)


_TRANSFORMERS = "transformers.models."
RULES: dict[tuple[str, str], object] = {
    ("torch.nn.modules.linear", "Linear.forward"): LinearRule,
    ("transformers.pytorch_utils", "Conv1D.forward"): Conv1DRule,
    ("torch.nn.modules.sparse", "Embedding.forward"): EmbeddingRule,
    (_TRANSFORMERS + "opt.modeling_opt", "OPTLearnedPositionalEmbedding.forward"): OPTPositionRule,
    ("torch.nn.modules.normalization", "LayerNorm.forward"): LayerNormRule,
    ("torch.nn.modules.normalization", "RMSNorm.forward"): RMSNormRule,
    **{(f"{_TRANSFORMERS}{family}.modeling_{family}", f"{name}.forward"): RMSNormRule for family, name in (
        ("llama", "LlamaRMSNorm"), ("mistral", "MistralRMSNorm"), ("qwen2", "Qwen2RMSNorm"), ("t5", "T5LayerNorm"))},
}


_RELATIVE_BIASES = {(f"{_TRANSFORMERS}{family}.modeling_{family}", f"{name}.compute_bias")
                    for family, name in (("t5", "T5Attention"), ("mt5", "MT5Attention"))}


def _key(module_class: type) -> tuple[str, str]:
    return module_class.forward.__module__, module_class.forward.__qualname__


class CastLinear(nn.Linear):
    """``y = x Wᵀ + b`` in W's type, of an x that is kept as it came: an input in bfloat16 stays half as large until the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


RULES[_key(CastLinear)] = LinearRule
_OURS = {CastLinear.forward}  # the very functions, which a test may have wrapped to check their types


def rule_for(module: nn.Module):
    """The rule of this module's exact ``forward``, or None; a forward that was wrapped in another function has none."""
    forward, rule = type(module).forward, RULES.get(_key(type(module)))
    if isinstance(rule, FunctionRule):
        return rule if rule.forward is forward else None
    return None if hasattr(forward, "__wrapped__") and forward not in _OURS else rule


class RelativeBias:
    """Stands in for ``compute_bias`` of a T5-type attention: the lookup of (T, T) buckets is made once for each example.

    The layer looks its table up without a batch axis and broadcasts the result over the examples, so that their gradients
    would arrive added up. Looked up as (B, T, T) the value is the same and every example has its own gradient.
    """

    def __init__(self, module: nn.Module, batch_size: Callable[[], int | None]) -> None:
        self.module, self.batch_size = module, batch_size

    def __call__(self, query_length, key_length, device=None, past_seen_tokens=0):
        module, batch = self.module, self.batch_size()
        if batch is None:
            return type(module).compute_bias(module, query_length, key_length, device, past_seen_tokens)
        table = module.relative_attention_bias
        positions = torch.arange(max(query_length + past_seen_tokens, key_length), device=device or table.weight.device)
        queries = positions[past_seen_tokens:past_seen_tokens + query_length]
        buckets = module._relative_position_bucket(
            positions[None, :key_length] - queries[:, None], bidirectional=not module.is_decoder,
            num_buckets=module.relative_attention_num_buckets, max_distance=module.relative_attention_max_distance)
        return table(buckets.expand(batch, -1, -1)).permute(0, 3, 1, 2)

    def __deepcopy__(self, memo):
        return functools.partial(type(self.module).compute_bias, copy.deepcopy(self.module, memo))

    def __reduce__(self):
        return functools.partial, (type(self.module).compute_bias, self.module)


def has_relative_bias(module: nn.Module) -> bool:
    """Whether this is an attention whose trainable table of relative positions `RelativeBias` serves."""
    compute = getattr(type(module), "compute_bias", None)
    key = (getattr(compute, "__module__", None), getattr(compute, "__qualname__", None))
    table = getattr(module, "relative_attention_bias", None)
    return key in _RELATIVE_BIASES and isinstance(table, nn.Embedding) and table.weight.requires_grad


def register_rule(module_class: type, function: Callable) -> None:
    """Teaches the engine a layer of your own.

    Args:
        module_class: the class whose ``forward(*tensors) -> Tensor`` the rule is for, batch axis first everywhere.
        function: ``function(module, *inputs, grad_output) -> {parameter name: (B, *shape)}``, for instance `per_example_loop`.

    Raises:
        ValueError: not a module class with a forward of its own, or the class has a built-in rule.
    """
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise ValueError(f"register_rule takes a class derived from torch.nn.Module, not {module_class!r}")
    if "forward" not in vars(module_class):
        raise ValueError(f"{module_class.__name__} has no forward of its own: register the class that defines it")
    if not isinstance(RULES.get(_key(module_class)), FunctionRule | None):
        raise ValueError(f"{module_class.__name__} has a built-in rule already: nothing to register")
    RULES[_key(module_class)] = FunctionRule(function, module_class.forward)
