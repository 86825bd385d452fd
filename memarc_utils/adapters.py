"""What to train of a pre-trained model: everything, LoRA, bottleneck adapters, the biases, or the head alone.

Each function prepares the model in place and returns it, with the task head trainable. A head that is tied to the
embeddings belongs to the backbone and stays frozen (full fine-tuning trains it).
"""

import math
from numbers import Real

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from memarc_utils.backbones import block_view, freeze, head_parameters
from memarc_utils.block_halves import LLAMA_TYPES
from memarc_utils.preparation import recorded

# Query and value projections, the pair that LoRA's paper chose (arXiv 2106.09685, section 4.2); GPT-2 has them in one layer.
_QUERY_VALUE = {"bert": ("query", "value"), "roberta": ("query", "value"), "distilbert": ("q_lin", "v_lin"),
                "gpt2": ("c_attn",), **dict.fromkeys(("opt", *LLAMA_TYPES), ("q_proj", "v_proj"))}

# The last layer of each half of a block: what follows it (dropout, residual sum, norm) sees the adapted output.
_LAST_LAYERS = {"bert": {"attention": "attention.output.dense", "mlp": "output.dense"},
                "roberta": {"attention": "attention.output.dense", "mlp": "output.dense"},
                "distilbert": {"attention": "attention.out_lin", "mlp": "ffn.lin2"},
                "gpt2": {"attention": "attn.c_proj", "mlp": "mlp.c_proj"},
                "opt": {"attention": "self_attn.out_proj", "mlp": "fc2"},
                **dict.fromkeys(LLAMA_TYPES, {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"})}


def _checked_heads(model: nn.Module) -> dict[str, nn.Parameter]:
    """The head's parameters, of a model that nothing keeps from being prepared.

    Raises:
        ValueError: a side network is there already, or something beside the backbone is no head that is known here.
    """
    if any(name.split(".")[-1] == "side_blocks" for name, _ in model.named_modules()):
        raise ValueError("this model has a side network already: load the backbone anew, no gradient passes a frozen one")
    heads, base = head_parameters(model), set(block_view(model).base.parameters())
    known = {*heads.values(), *base}
    if unknown := [name for name, parameter in model.named_parameters() if parameter not in known]:
        raise ValueError(f"{unknown[0]} lies beside the backbone and belongs to no head that is known here (a classifier or language-model "
                         f"head of a supported type): {type(model).__name__} cannot be prepared")
    return heads


def _let_train(model: nn.Module) -> None:
    """A probe before this held the backbone in evaluation mode: dropout works again."""
    for part in model.modules():
        part.__dict__.pop("train", None)


def _train_head(model: nn.Module, heads: dict[str, nn.Parameter]) -> None:
    """The head trains beside every method, and so do the adapters that a reversible coupling brought along."""
    coupling = [p for name, p in model.named_parameters() if ".reversible_adapter." in name]
    for parameter in (*heads.values(), *coupling):
        parameter.requires_grad_(True)


@recorded
def select_linear_probe(model: nn.Module) -> nn.Module:
    """Only the task head trains, on the frozen backbone's features.

    Raises:
        ValueError: no such head, or one that is tied to the embeddings, which would leave nothing to train.
    """
    heads = _checked_heads(model)
    if not heads:
        raise ValueError("the head is tied to the embeddings, so a linear probe has nothing to train: load the model with "
                         "tie_word_embeddings=False, or take add_lora")
    freeze(block_view(model).base)
    model.requires_grad_(False)
    _train_head(model, heads)
    return model


@recorded
def select_bias_terms(model: nn.Module, add_missing: bool = False) -> nn.Module:
    """Biases and the head train, all else is frozen (DP-BiTFiT, arXiv 2210.00036).

    The per-example gradient of a bias is ``Σ_t g_t``, the output gradient summed over tokens: no activation is needed for
    it (section 3). Biases of `nn.LayerNorm` train too; RMSNorm has none and is left as it is.

    Args:
        model: a model with a head.
        add_missing: give every `nn.Linear` of the backbone that lacks a bias one that starts at zero, for Llama types. The
            head, which trains as a whole, and norms get none.

    Raises:
        ValueError: the backbone has no bias at all and ``add_missing`` is off; the model is unchanged then.
    """
    heads, base = _checked_heads(model), block_view(model).base
    in_head = {id(p) for p in heads.values()}
    has_bias = any(_is_bias(name) and id(p) not in in_head for name, p in base.named_parameters())
    if not has_bias and not add_missing:
        raise ValueError(f"the backbone of {type(model).__name__} has no bias to train: pass add_missing=True to give its "
                         "linear layers biases that start at zero")
    _let_train(model)
    for layer in base.modules() if add_missing else ():
        uses_bias = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
        if uses_bias and layer.bias is None and id(layer.weight) not in in_head:
            layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_features))
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_bias(name))
    _train_head(model, heads)
    return model


def _is_bias(name: str) -> bool:
    return name.split(".")[-1] == "bias"


class AdaptedLayer(nn.Module):
    """A layer, and a bottleneck that adds to its output: ``h + U gelu(D h + b) + c``, h the layer's output.

    U, b and c start at zero, so the layer starts as it was (Houlsby et al., arXiv 1902.00751, section 2.1, start near the
    identity; here exactly at it).

    Attributes:
        layer: the original layer, frozen by `add_bottleneck_adapters`.
        down: D, width to bottleneck width.
        up: U, back to the width.
    """

    def __init__(self, layer: nn.Module, width: int, bottleneck: int) -> None:
        super().__init__()
        self.layer = layer
        like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.down, self.up = nn.Linear(width, bottleneck, **like), nn.Linear(bottleneck, width, **like)
        for start_at_zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(start_at_zero)

    def forward(self, x: Float[Tensor, "... inner"]) -> Float[Tensor, "... width"]:
        h = self.layer(x)
        return h + self.up(F.gelu(self.down(h)))


@recorded
def add_bottleneck_adapters(model: nn.Module, reduction: int | None = None, width: int | None = None,
                            after: tuple[str, ...] = ("attention", "mlp")) -> nn.Module:
    """Bottleneck adapters in every block; they and the head train.

    Each sits on the last linear layer of its half of the block, before dropout, residual sum and norm.

    Args:
        model: a BERT, RoBERTa, DistilBERT, GPT-2, OPT or Llama (Mistral, Qwen2) type with a head.
        reduction: bottleneck width = the model's width / reduction; 16 when neither this nor ``width`` is given.
        width: the bottleneck width itself, instead of ``reduction``.
        after: behind which halves of a block: both, the default, is Houlsby's form (arXiv 1902.00751); ``("mlp",)`` alone
            is Pfeiffer's (2005.00247).

    Raises:
        ValueError: an argument that does not fit, or a model that has adapters, LoRA layers or a side network already; the
            model is unchanged then.
    """
    _refuse_adapted(model)
    heads, view = _checked_heads(model), block_view(model)
    bottleneck = _bottleneck(view.width, reduction, width)
    if not after or not isinstance(after, (tuple, list)) or set(after) - {"attention", "mlp"} or len(set(after)) < len(after):
        raise ValueError(f'after must be ("attention", "mlp"), ("attention",) or ("mlp",), got {after!r}')
    _let_train(model)
    model.requires_grad_(False)
    for block in view.blocks.children():  # a reversible model's list iterates otherwise
        for half in after:
            path = _LAST_LAYERS[model.config.model_type][half]
            adapted = AdaptedLayer(block.get_submodule(path), view.width, bottleneck)
            block.set_submodule(path, adapted)
            adapted.down.requires_grad_(True)
            adapted.up.requires_grad_(True)
    _train_head(model, heads)
    return model


def _refuse_adapted(model: nn.Module) -> None:
    inside = {part for name, _ in model.named_parameters() for part in name.split(".")}
    for found, words in ((any(isinstance(m, AdaptedLayer) for m in model.modules()), "bottleneck adapters"),
                         ("lora_A" in inside, "LoRA layers")):
        if found:
            raise ValueError(f"this model has {words} already: load the backbone anew")


def _bottleneck(model_width: int, reduction: int | None, width: int | None) -> int:
    if reduction is not None and width is not None:
        raise ValueError(f"give reduction or width, not both (got {reduction} and {width})")
    if width is not None:
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f"width must be a whole number >= 1, got {width!r}")
        return width
    reduction = 16 if reduction is None else reduction
    if isinstance(reduction, bool) or not isinstance(reduction, int) or reduction < 1 or model_width % reduction:
        raise ValueError(f"reduction must be a divisor of the model's width {model_width}, got {reduction!r}: change it, or "
                         "give the bottleneck's width itself as width=")
    return model_width // reduction


@recorded
def add_lora(backbone: nn.Module, rank: int = 8, alpha: float | None = None, target_modules: tuple[str, ...] | None = None,
             freeze_a: bool = False) -> nn.Module:
    """LoRA through peft, injected in place: ``W x + (α/r) B A x`` with B = 0 at the start; the head trains too.

    Args:
        backbone: a model with a head.
        rank: r.
        alpha: the scale's numerator, above 0; 2 r by default.
        target_modules: names of linear layers; query and value projections by default.
        freeze_a: train B only (FFA-LoRA, arXiv 2403.12313): under noise no product of two noisy factors appears.

    Raises:
        ValueError: a rank below 1, an alpha that is not above 0, targets that are no linear layers, or a model that cannot be prepared.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a whole number >= 1, got {rank!r}")
    if any("lora_" in name for name, _ in backbone.named_parameters()):
        raise ValueError("this model has LoRA layers already: load the backbone anew")
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, Real) or not 0 < alpha < math.inf):
        raise ValueError(f"alpha must be a number above 0, or None for 2 × rank, got {alpha!r}")
    heads = _checked_heads(backbone)
    family = backbone.config.model_type
    targets = list(_QUERY_VALUE[family]) if target_modules is None else target_modules
    if not isinstance(targets, (tuple, list)) or not targets or not all(isinstance(target, str) for target in targets):
        raise ValueError(f'target_modules must be a tuple of names such as ("query", "value"), got {target_modules!r}')
    for name, layer in backbone.named_modules():
        if any(name == target or name.endswith(f".{target}") for target in targets) and not isinstance(layer, (nn.Linear, Conv1D)):
            raise ValueError(f"{name} is a {type(layer).__name__}, and LoRA is for linear layers here: leave it out of target_modules")
    config = LoraConfig(r=rank, lora_alpha=2 * rank if alpha is None else alpha, target_modules=list(targets), lora_dropout=0.0,
                        fan_in_fan_out=family == "gpt2")
    inject_adapter_in_model(config, backbone)  # raises for unknown targets, before anything else is changed
    _let_train(backbone)
    backbone.requires_grad_(False)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("lora_B" in name or ("lora_A" in name and not freeze_a))
    _train_head(backbone, heads)
    return backbone


@recorded
def train_everything(model: nn.Module) -> nn.Module:
    """Full fine-tuning: every parameter trains."""
    _checked_heads(model)
    _let_train(model)
    return model.requires_grad_(True)


def trainable_share(model: nn.Module) -> tuple[int, int, float]:
    """Trainable parameters, all parameters, and their ratio.

    >>> trainable_share(nn.Linear(3, 1))
    (4, 4, 1.0)
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return trainable, total, trainable / total
