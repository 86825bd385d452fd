"""What the clipping engine refuses to train, said before anything is changed, with the parameter's name and the mend."""

import warnings

import torch
from torch import Tensor, nn

from memarc_utils.book_keeping import holds_data
from memarc_utils.function_rules import FunctionRule, loop_rule
from memarc_utils.layer_rules import EmbeddingRule, rule_for


def check_owner(name: str, module: nn.Module) -> object:
    """The rule of a layer that owns trainable parameters: its exact one, or the loop over examples, with a warning.

    Raises:
        ValueError: neither is right; the message names the parameter and the ways out. Nothing is changed then.
    """
    trainable = [key for key, p in module.named_parameters(recurse=False) if p.requires_grad]
    full = [f"{name}.{key}" if name else key for key in trainable]
    kind = type(module).__name__
    ways_out = (f"Freeze it (requires_grad_(False)), or teach the engine the layer: "
                f"memarc_utils.layer_rules.register_rule({kind}, per_example_loop)")
    if "forward" in vars(module):
        raise ValueError(f"the forward of {name or kind}, which owns {full[0]}, was replaced on the instance (is the model "
                         "private already, or wrapped by another library?). Undo that first, e.g. with private.detach()")
    rule = rule_for(module)
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        raise ValueError(f"{full[0]} belongs to a parametrization, computed anew at every use of the weight. Fold it in first "
                         "(torch.nn.utils.parametrize.remove_parametrizations), or freeze it")
    if rule is None:
        rule = loop_rule(module)
        if rule is None:
            raise ValueError(f"no rule for {full[0]}, owned by a {kind} in which other layers train too. {ways_out}")
        warnings.warn(f"no rule of its own for {kind} ({full[0]}): its per-example gradients are computed by a loop over the "
                      f"examples (torch.func), exact where no examples meet. {ways_out} to say that this is meant", stacklevel=6)
    if not isinstance(rule, FunctionRule) and (odd := [f for key, f in zip(trainable, full) if key not in ("weight", "bias")]):
        raise ValueError(f"the rule for {kind} does not know {odd[0]}. {ways_out}")
    if isinstance(rule, type) and issubclass(rule, EmbeddingRule) and (reason := rule.refuse(module)):
        raise ValueError(f"{full[0]} cannot be clipped: {reason}")
    return rule


def check_no_batch_statistics(model: nn.Module) -> None:
    """Raises:
        ValueError: a layer mixes the examples of a batch, or keeps statistics of them.
    """
    for name, module in model.named_modules():
        mixes = isinstance(module, nn.modules.batchnorm._BatchNorm) or (
            isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats)
        if mixes and "train" not in vars(module):  # memarc_utils.backbones.freeze keeps a module in evaluation mode
            raise ValueError(f"{name or 'the model'} is a {type(module).__name__}: it mixes the examples of a batch and keeps their "
                             "statistics. Replace it by GroupNorm or LayerNorm, or keep it as it is with backbones.freeze(module)")


def check_losses(losses: object) -> None:
    """Raises:
        ValueError: not one loss per example with a gradient.
    """
    if not isinstance(losses, Tensor) or losses.dim() != 1:
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"backward needs one loss per example, a 1-D tensor; got {shape}. A mean over the batch hides the "
                         "examples: use reduction='none', for instance cross_entropy(logits, labels, reduction='none')")
    if len(losses) and not losses.requires_grad:
        raise ValueError("the losses carry no gradient: compute them outside torch.no_grad() and do not detach them")


class WatchedBuffers:
    """Remembers a model's buffers; what a forward pass keeps of a batch in one is private data without noise."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept = {name: (buffer, buffer._version, _fingerprint(buffer)) for name, buffer in model.named_buffers()}

    def check(self) -> None:
        """Raises:
            ValueError: a buffer was written, or replaced, since.
        """
        for name, buffer in self._model.named_buffers():
            before, version, fingerprint = self._kept.get(name, (None, None, None))
            if buffer is not before or buffer._version != version or _fingerprint(buffer) != fingerprint:
                raise ValueError(f"the buffer {name} was written since make_private: what a forward pass keeps of a batch is private data "
                                 "without noise. Remove it, or compute it before make_private")


def _fingerprint(buffer: Tensor) -> float:
    """Of small floating buffers, which ``.data`` can change unseen; running statistics are small."""
    if not buffer.is_floating_point() or buffer.numel() > 2**16 or buffer.device.type != "cpu" or not holds_data(buffer):
        return 0.0
    weights = torch.arange(1, buffer.numel() + 1, dtype=torch.float64)
    return float(buffer.detach().flatten().double().nan_to_num() @ weights)
