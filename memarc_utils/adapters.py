"""What to train of a pre-trained model: everything, LoRA, or the head alone. Each prepares the model in place.
"""

from torch import nn

from memarc_utils.backbones import block_view, freeze, head_parameters

# Query and value projections, the pair that LoRA's paper chose (arXiv 2106.09685, section 4.2); GPT-2 has them in one layer.
_QUERY_VALUE = {"bert": ("query", "value"), "roberta": ("query", "value"), "distilbert": ("q_lin", "v_lin"),
                "gpt2": ("c_attn",), "opt": ("q_proj", "v_proj"), "llama": ("q_proj", "v_proj")}


def _train_head(model: nn.Module, heads: dict[str, nn.Parameter]) -> None:
    for parameter in heads.values():
        parameter.requires_grad_(True)


def select_linear_probe(model: nn.Module) -> nn.Module:
    """Only the task head trains, on the frozen backbone's features."""
    heads = head_parameters(model)
    freeze(block_view(model).base)
    model.requires_grad_(False)
    _train_head(model, heads)
    return model


def add_lora(backbone: nn.Module, rank: int = 8, alpha: float | None = None, target_modules: tuple[str, ...] | None = None,
             freeze_a: bool = False) -> nn.Module:
    """LoRA through peft, injected in place: ``W x + (α/r) B A x`` with B = 0 at the start; the head trains too.

    Args:
        backbone: a model with a head.
        rank: r.
        alpha: the scale's numerator, 2 r by default.
        target_modules: names of layers; query and value projections by default.
        freeze_a: train B only (FFA-LoRA, arXiv 2403.12313): under noise no product of two noisy factors appears.

    Raises:
        ValueError: a rank below 1, or a model whose layers are not known and no target_modules.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a whole number >= 1, got {rank!r}")
    if any("lora_" in name for name, _ in backbone.named_parameters()):
        raise ValueError("this model has LoRA layers already: load the backbone anew")
    heads = head_parameters(backbone)
    family = backbone.config.model_type
    targets = list(target_modules or _QUERY_VALUE[family])
    config = LoraConfig(r=rank, lora_alpha=2 * rank if alpha is None else alpha, target_modules=targets, lora_dropout=0.0,
                        fan_in_fan_out=family == "gpt2")
    inject_adapter_in_model(config, backbone)  # raises for unknown targets, before anything else is changed
    backbone.requires_grad_(False)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("lora_B" in name or ("lora_A" in name and not freeze_a))
    _train_head(backbone, heads)
    return backbone


def train_everything(model: nn.Module) -> nn.Module:
    """Full fine-tuning: every parameter trains."""
    return model.requires_grad_(True)


def trainable_share(model: nn.Module) -> tuple[int, int, float]:
    """Trainable parameters, all parameters, and their ratio.

    >>> trainable_share(nn.Linear(3, 1))
    (4, 4, 1.0)
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return trainable, total, trainable / total
