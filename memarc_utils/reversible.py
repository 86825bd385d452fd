"""DP-MemArc's reversible network: a pre-trained transformer whose activations are recomputed from its outputs.

The paper (arXiv 2406.11087) published no code; this is a reconstruction from MEFT (2306.00477) and BDIA (2407.09093), with a
coupling of our own that is undone exactly (see `couplings`). The forward pass keeps the two last streams and nothing else of
the blocks. The backward pass goes down layer by layer: from a layer's outputs it computes the layer's inputs again, and with the
same evaluation of the block the gradient. One block's activations stand at a time, whatever the depth.

With book-keeping, norms and clipped sums use the same recorded tensors, so an example's own gradient is clipped to C however
inexact the reconstruction is. What an inexact one can do is let rounding through: a kernel may round the other examples' numbers
differently when one is left out, and an inverse that magnifies this moves their gradients. Settings for which that could matter
are refused.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memarc_utils.backbones import block_view
from memarc_utils.block_halves import attention_half, mlp_half
from memarc_utils.couplings import ReversibleConfig, grid_of, split_bits, to_grid
from memarc_utils.preparation import recorded
from memarc_utils.reversal import Reversed, Shared, Streams, WayBack, forward_and_save, note_state


class Adapter(nn.Module):
    """MEFT's adapter ``U gelu(D h)``, all weights N(0, 0.02²) at the start (arXiv 2306.00477, section 4.1)."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        return self.up(nn.functional.gelu(self.down(h)))


class ReversibleBlocks(nn.ModuleList):
    """Takes the place of a model's list of blocks and keeps their names. The model's loop over its blocks finds one element:
    this list, which runs them all.

    Attributes:
        coupling: the `ReversibleConfig`.
        recompute: False keeps all activations, for plain autograd on the same forward function: the check of the gradient.
    """

    def __init__(self, blocks: tuple[nn.Module, ...], config: ReversibleConfig, family: str) -> None:
        super().__init__(blocks)
        self.coupling, self.family, self.recompute = config, family, True
        self.watched: list | None = None
        self._signature = inspect.signature(type(blocks[0]).forward)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter((self,))

    def __getitem__(self, index):
        return [self] if isinstance(index, slice) else super().__getitem__(index)

    __repr__ = nn.Module.__repr__  # a list's own would go round in circles

    def forward(self, hidden_states: Float[Tensor, "batch tokens width"], *args, **kwargs) -> Float[Tensor, "batch tokens width"]:
        context = self._context(hidden_states, args, kwargs)
        parameters = [p for p in self.parameters() if p.requires_grad]
        if not torch.is_grad_enabled() or not (parameters or hidden_states.requires_grad):
            if self.watched is not None:
                self.watched.append((hidden_states, context))
            return self.output(self.run(hidden_states, context), hidden_states.dtype)
        context = without_cache(context)
        if self.recompute:
            return Reversed.apply(self, Shared.of(context), hidden_states, *parameters)
        return self.output(self.run(hidden_states, context), hidden_states.dtype)

    def _context(self, hidden_states: Tensor, args: tuple, kwargs: dict) -> dict:
        """What every block gets beside its input, by name."""
        bound = self._signature.bind(None, hidden_states, *args, **kwargs)
        arguments = list(bound.arguments.items())[2:]
        kinds = self._signature.parameters
        context = {name: value for name, value in arguments if kinds[name].kind is not inspect.Parameter.VAR_KEYWORD}
        for name, value in arguments:
            if kinds[name].kind is inspect.Parameter.VAR_KEYWORD:
                context.update(value)
        if any(getattr(block, "gradient_checkpointing", False) for block in self.children()):
            raise ValueError("a reversible network recomputes its activations already: call model.activation_checkpointing_disable()")
        return context

    # ---- one layer ---------------------------------------------------------------------------------------------------
    def first(self, n: int, context: dict) -> Callable[[Tensor], Tensor] | None:
        """F of layer n, in the block's dtype; None where it is zero."""
        block, kind, gamma = super().__getitem__(n), self.coupling.coupling, self.coupling.lambda_and_beta[0]
        if kind == "meft2":
            return getattr(block, "reversible_adapter", None)
        if kind == "meft3":
            return lambda x: attention_half(self.family, block, x, context)
        combine = {"meft1": lambda new, x: new, "midpoint": lambda new, x: 2 * (new - x),
                   "bdia": lambda new, x: (1 + gamma) * new - 2 * gamma * x, "lossless": lambda new, x: new - gamma * x}[kind]
        return lambda x: combine(_run_block(block, x, context), x)

    def second(self, n: int, context: dict) -> Callable[[Tensor], Tensor] | None:
        """G of layer n."""
        block, kind = super().__getitem__(n), self.coupling.coupling
        if kind == "meft2":
            return lambda x: _run_block(block, x, context)
        if kind == "meft3":
            return lambda x: mlp_half(self.family, block, x)
        return getattr(block, "reversible_adapter", None)

    def advance(self, n: int, streams: Streams, context: dict, dtype: torch.dtype, draws: list[Tensor] | None = None
                ) -> tuple[Streams, Tensor | None]:
        """Layer n forward: new streams, and the bits that they lost. ``draws`` takes the random generator's state before F and G."""
        (x1, x2), (lam, beta), lost = streams, self.coupling.lambda_and_beta, None
        first, second = self.first(n, context), self.second(n, context)
        note_state(draws, x1.device)
        if self.coupling.bits:
            change = first(x2.to(dtype))
            scaled, lost = split_bits(x1.detach(), self.coupling.bits, grid_of(dtype))
            y1 = scaled.add_(to_grid(change.detach(), grid_of(dtype)))
            if torch.is_grad_enabled():  # rounding to the grid counts as the identity
                smooth = lam * x1 + change
                y1 = y1 + (smooth - smooth.detach())
        else:
            y1 = lam * x1 if first is None else (lam * x1).add(first(x2.to(dtype)))
        note_state(draws, x1.device)
        y2 = beta * x2 if beta != 1 else x2
        if second is not None:
            y2 = y2 + second(y1.to(dtype))
        return ((y2, y1) if self.coupling.swap else (y1, y2)), lost

    def start(self, hidden_states: Tensor) -> Streams:
        """Both streams start as the embeddings, at full width."""
        h = hidden_states.to(self.coupling.dtype)
        if self.coupling.bits:
            h = to_grid(h.detach(), grid_of(hidden_states.dtype)) + (h - h.detach())
        return h, h

    def output(self, streams: Streams, dtype: torch.dtype) -> Tensor:
        """The mean of both streams where MEFT has it so, else the one that the last block wrote."""
        return ((streams[0] + streams[1]) / 2 if self.takes_mean else streams[1]).to(dtype)

    @property
    def takes_mean(self) -> bool:
        return self.coupling.coupling.startswith("meft")

    def stores(self, n: int) -> bool:
        """Whether the streams after layer n are kept: at the end of each segment, and at the end of all."""
        return n == len(self) - 1 or self.coupling.segment is not None and (n + 1) % self.coupling.segment == 0

    def run(self, hidden_states: Tensor, context: dict) -> Streams:
        """All layers, nothing kept."""
        streams = self.start(hidden_states)
        for n in range(len(self)):
            streams, _ = self.advance(n, streams, context, hidden_states.dtype)
        return streams


def _run_block(block: nn.Module, x: Tensor, context: dict) -> Tensor:
    output = block(x, **context)
    return output[0] if isinstance(output, tuple) else output


def without_cache(context: dict) -> dict:
    """Training keeps no keys and values: computed again in the backward pass they would be appended twice."""
    past = context.get("past_key_values")
    if past is not None and past.get_seq_length():
        raise ValueError("a reversible network cannot train on top of cached keys and values: call it without past_key_values, or "
                         "under torch.no_grad()")
    return {**context, **{name: None for name in ("past_key_values",) if name in context},
            **{name: False for name in ("use_cache",) if name in context}}


def _refuse_inner_states(stack: nn.Module, args: tuple, kwargs: dict) -> None:
    """The blocks run inside one call, where nobody can pick up what lies between them."""
    for name in ("output_hidden_states", "output_attentions"):
        if kwargs.get(name) or getattr(stack.config, name, False):
            raise ValueError(f"a reversible network does not keep what {name} asks for: drop it, or take forward_streams(model, batch)")


@recorded
def make_reversible(model: nn.Module, config: ReversibleConfig = ReversibleConfig()) -> nn.Module:
    """Couples the model's blocks reversibly, in place: the same model comes back, with the same parameters and names.

    Call signature and outputs stay those of the `transformers` model. What trains is chosen by `adapters`, before or after;
    MEFT's own adapters (``adapter_width``) always train.

    Args:
        model: a BERT, RoBERTa, DistilBERT, GPT-2, OPT or Llama (Mistral, Qwen2) type with a head.
        config: see `ReversibleConfig`.

    Raises:
        ValueError: not such a model, reversible already, with a side network, activation checkpointing or layerdrop; or coefficients
            whose inverse is lost over this many layers. The model is unchanged then.
    """
    if not isinstance(config, ReversibleConfig):
        raise ValueError(f"config must be a ReversibleConfig, got a {type(config).__name__}: write ReversibleConfig(coupling='lossless')")
    view = block_view(model)
    if isinstance(view.blocks, ReversibleBlocks):
        raise ValueError("this model is reversible already: load the backbone anew to couple it in another way")
    if any(".side_blocks." in name for name, _ in model.named_modules()):
        raise ValueError("this model has a side network, beside which the backbone keeps no activations: load the backbone anew")
    if getattr(model, "is_activation_checkpointing", False):
        raise ValueError("a reversible network recomputes its activations already: call model.activation_checkpointing_disable()")
    if any(getattr(module, "layerdrop", 0) for module in model.modules()):
        raise ValueError("layerdrop skips blocks at random, and the reversible blocks run as one: load the model with layerdrop=0 in its "
                         "config")
    if len(set(getattr(model.config, "layer_types", None) or ())) > 1:
        raise ValueError(f"the layers of this {model.config.model_type} attend in different ways ({', '.join(sorted(set(model.config.layer_types)))}), "
                         "and the reversible blocks, which run as one, all get the first one's mask: load it with one layer type")
    config.check_depth(len(view.blocks))
    path = next(name for name, module in model.named_modules() if module is view.blocks)
    reference = next(view.blocks[0].parameters())
    for block in view.blocks if config.adapter_width else ():
        block.reversible_adapter = Adapter(view.width, config.adapter_width).to(reference.device, reference.dtype)
    model.set_submodule(path, ReversibleBlocks(tuple(view.blocks), config, model.config.model_type).train(model.training))
    for stack in {view.base, getattr(view.base, "decoder", view.base)}:  # OPTForCausalLM calls its decoder past its base
        stack.register_forward_pre_hook(_refuse_inner_states, with_kwargs=True)
    return model


def reversible_blocks(model: nn.Module) -> ReversibleBlocks:
    """Raises:
        ValueError: the model is not reversible.
    """
    for module in model.modules():
        if isinstance(module, ReversibleBlocks):
            return module
    raise ValueError(f"this {type(model).__name__} is not reversible: call make_reversible first")


# ------------------------------------------------------------------------------------------------------ how exact it is
@dataclass(frozen=True)
class ForwardStreams:
    """What `forward_streams` returns.

    Attributes:
        before: the two streams before each layer, as the forward pass had them.
        last: after the last layer.
        saved: what the way back needs besides: lost bits, states of the random generator, stored ends of segments.
        context: the blocks' other arguments.
        dtype: that the blocks compute in.
    """

    before: list[Streams]
    last: Streams
    saved: dict
    context: dict
    dtype: torch.dtype


@torch.no_grad()
def forward_streams(model: nn.Module, batch: dict[str, Tensor]) -> ForwardStreams:
    """Runs a reversible model, without gradients, and keeps the streams between its layers."""
    blocks = reversible_blocks(model)
    blocks.watched = []
    try:
        model(**batch)
        hidden, context = blocks.watched[0]
    finally:
        blocks.watched = None
    context, before = without_cache({**context, "past_key_values": None} if "past_key_values" in context else context), []
    last, saved = forward_and_save(blocks, hidden, context, before)
    return ForwardStreams(before, last, saved, context, hidden.dtype)


@torch.no_grad()
def invert(model: nn.Module, outputs: ForwardStreams) -> list[Streams]:
    """The streams before each layer, computed from those after the last one (and the stored ends of segments).

    Args:
        model: reversible.
        outputs: of `forward_streams` on the same model.

    Returns:
        One pair of tensors (batch, tokens, width) a layer, the first layer first.
    """
    if not isinstance(outputs, ForwardStreams):
        raise ValueError(f"outputs must come from forward_streams(model, batch), got a {type(outputs).__name__}: a model's usual outputs "
                         "are one stream, and the inverse needs both")
    return WayBack(reversible_blocks(model), outputs.context, outputs.saved, outputs.dtype, outputs.last[0].device).inputs()


@dataclass(frozen=True)
class ReconstructionError:
    """Attributes:
        by_layer: ``max over both streams of ‖x̂ − x‖ / ‖x‖`` before each layer, the first layer first.
    """

    by_layer: tuple[float, ...]

    @property
    def worst(self) -> float:
        return max(self.by_layer)


def reconstruction_error(model: nn.Module, batch: dict[str, Tensor], bound: float = 1e-3) -> ReconstructionError:
    """How far the recomputed inputs of each layer are from what they were.

    A gradient computed at inputs that are off by a relative e is itself off by about e (notebook 42 measures both), so
    ``bound`` is also the gradient error above which a warning is given.
    """
    outputs = forward_streams(model, batch)

    def relative(got: Tensor, want: Tensor) -> float:
        return float((got - want).norm() / want.norm().clamp_min(1e-30))

    found = invert(model, outputs)
    by_layer = tuple(max(relative(got, want) for got, want in zip(*pair)) for pair in zip(found, outputs.before))
    if not max(by_layer) <= bound:
        warnings.warn(f"the inputs of layer {by_layer.index(max(by_layer))} come back with a relative error of {max(by_layer):.1e}, and "
                      f"the gradient is off by about as much (bound {bound:.0e}): take coupling='lossless', a shorter segment, or "
                      "larger coefficients", stacklevel=2)
    return ReconstructionError(by_layer)


def gradient_error(model: nn.Module, batch: dict[str, Tensor], loss_per_example: Callable) -> float:
    """``‖ĝ − g‖ / ‖g‖`` over all trainable parameters: the recomputing backward against plain autograd of the same forward function,
    with the same dropout. Costs the memory of plain autograd."""
    blocks, gradients = reversible_blocks(model), []
    parameters = [p for p in model.parameters() if p.requires_grad]
    devices = [next(model.parameters()).device] if next(model.parameters()).device.type == "cuda" else []
    try:
        for blocks.recompute in (True, False):
            with torch.random.fork_rng(devices):
                loss = loss_per_example(model, batch).sum()
                grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            gradients.append(torch.cat([g.double().flatten() for g in grads if g is not None]))
    finally:
        blocks.recompute = True
    got, want = gradients
    return float((got - want).norm() / want.norm())
