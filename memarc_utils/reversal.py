"""The way back through a reversible network: from the streams after the last layer to those before the first, with or without
the gradient. One block's activations stand at a time.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from memarc_utils.book_keeping import holds_data
from memarc_utils.couplings import grid_of, join_bits, to_grid

Streams = tuple[Tensor, Tensor]


@dataclass
class Shared:
    """What every block gets beside its input (masks, positions), its tensors apart so that autograd can save them.

    Raises:
        ValueError: one of the tensors needs a gradient.
    """

    spec: object
    rest: list
    tensors: dict[int, Tensor]

    @classmethod
    def of(cls, context: dict) -> "Shared":
        leaves, spec = tree_flatten(context)
        tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        if any(t.requires_grad for t in tensors.values()):
            raise ValueError("a reversible network passes no gradient to what its blocks share (masks, positions), and something of it "
                             "trains: freeze it")
        return cls(spec, [None if i in tensors else leaf for i, leaf in enumerate(leaves)], tensors)

    def context(self, tensors: dict[int, Tensor]) -> dict:
        return tree_unflatten([tensors.get(i, leaf) for i, leaf in enumerate(self.rest)], self.spec)


# --------------------------------------------------------------------------------------------------- dropout replay
def note_state(draws: list[Tensor] | None, device: torch.device) -> None:
    if draws is not None:
        draws.append(_random_state(device))


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Tensor, device: torch.device) -> None:
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)


@contextlib.contextmanager
def _replayed(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """Draws as they were drawn in the forward pass; afterwards the generator stands where it stood, so that nothing that comes
    later (other dropout, a noise generator that someone shares with it) is drawn a second time."""
    if state is None:
        yield
        return
    now = _random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(now, device)


@contextlib.contextmanager
def _modes(modes: dict[nn.Module, bool]) -> Iterator[None]:
    """Training or evaluation as it was in the forward pass: a model that was evaluated in between is computed again as it was."""
    now = {module: module.training for module in modes}
    try:
        _set_modes(modes)
        yield
    finally:
        _set_modes(now)


def _set_modes(modes: dict[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training


# ---------------------------------------------------------------------------------------------------------- backward
class Reversed(torch.autograd.Function):
    """All blocks. Saves the streams at the ends of segments, the lost bits, and the state of the random generator."""

    @staticmethod
    def forward(ctx, blocks, shared: Shared, hidden_states: Tensor, *parameters: Tensor) -> Tensor:
        context, kind = shared.context(shared.tensors), hidden_states.device.type
        streams, saved = forward_and_save(blocks, hidden_states, context)
        saved.update({("context", i): tensor for i, tensor in shared.tensors.items()})
        ctx.blocks, ctx.keys, ctx.dtype, ctx.device = blocks, list(saved), hidden_states.dtype, hidden_states.device
        ctx.shared, ctx.parameters = Shared(shared.spec, shared.rest, {}), parameters
        ctx.modes = {module: module.training for module in blocks.modules()}
        ctx.autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) if kind != "meta" else None
        # All parameters, frozen ones too: autograd then notices one that was changed. What comes out may be copies (saved_tensors_hooks).
        ctx.save_for_backward(*saved.values(), *blocks.parameters())
        return blocks.output(streams, hidden_states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple:
        saved = dict(zip(ctx.keys, ctx.saved_tensors))
        context = ctx.shared.context({key[1]: t for key, t in saved.items() if key[0] == "context"})
        way = WayBack(ctx.blocks, context, saved, ctx.dtype, ctx.device, ctx.parameters, ctx.needs_input_grad[2])
        with _modes(ctx.modes), _autocast(ctx.autocast, ctx.device.type):
            grad_hidden = way.backward(grad_output)
        return (None, None, grad_hidden, *(way.grads.get(id(p)) for p in ctx.parameters))


def _graph_is_kept() -> bool:
    """Whether this backward pass was called with retain_graph=True; true too where torch does not tell."""
    tells = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return tells is None or tells()


def _autocast(state: tuple | None, kind: str):
    return contextlib.nullcontext() if state is None else torch.autocast(kind, enabled=state[0], dtype=state[1])


@torch.no_grad()
def forward_and_save(blocks, hidden_states: Tensor, context: dict, every: list | None = None) -> tuple[Streams, dict]:
    """The streams after the last layer, and what the way back needs: streams at the ends of segments, lost bits, states of the
    random generator. ``every`` takes the streams before each layer, for comparison."""
    saved, dtype = {}, hidden_states.dtype
    draws = any(module.training for block in blocks.children() for module in block.modules())
    streams = blocks.start(hidden_states)
    for n in range(len(blocks)):
        if every is not None:
            every.append(streams)
        states = [] if draws else None
        streams, lost = blocks.advance(n, streams, context, dtype, states)
        if lost is not None:
            saved["lost", n] = lost
        if draws:
            saved["first", n], saved["second", n] = states
        if blocks.stores(n):
            saved["x1", n], saved["x2", n] = streams
    return streams, saved


class WayBack:
    """The streams from the last layer to the first, with or without the gradient."""

    def __init__(self, blocks, context: dict, saved: dict, dtype: torch.dtype, device: torch.device,
                 parameters: tuple[Tensor, ...] = (), needs_input: bool = True) -> None:
        self.blocks, self.context, self.saved, self.dtype, self.device = blocks, context, saved, dtype, device
        self.grads: dict[int, Tensor] = {}
        wanted = {id(p) for p in parameters}
        self.trainable = [[p for p in block.parameters() if id(p) in wanted] for block in blocks.children()]
        if wanted - {id(p) for inside in self.trainable for p in inside}:
            raise ValueError("a parameter of the blocks was replaced between the forward and the backward pass, or for the forward pass "
                             "alone (functional_call): a reversible network computes its blocks again with the parameters they own")
        trains = [n for n, inside in enumerate(self.trainable) if inside]
        self.lowest = -1 if needs_input else trains[0]  # nothing below this layer is asked for, nor its input

    def inputs(self) -> list[Streams]:
        """The streams before each layer, without gradients."""
        found = []
        streams = None
        for n in reversed(range(len(self.blocks))):
            streams, _, _ = self._undo(n, *self._outputs(n, streams))
            found.append(streams)
        return found[::-1]

    def backward(self, grad_output: Tensor) -> Tensor | None:
        """The gradient of the embeddings, if it was asked for; that of the parameters lies in `grads`."""
        d1, d2 = (grad_output / 2, grad_output / 2) if self.blocks.takes_mean else (None, grad_output)
        streams, since_stored, used_up = None, 0, not _graph_is_kept()
        for n in range(len(self.blocks) - 1, max(self.lowest, 0) - 1, -1):
            if self.blocks.coupling.swap:
                d1, d2 = d2, d1
            since_stored = 0 if ("x1", n) in self.saved else since_stored + 1
            # Where no second backward pass will ask for the stored streams, and two layers below them in any case, nobody else needs
            # y1, unless the block read it uncast or it is the output: x1 may take its memory.
            reuse = (used_up or since_stored > 1) and self.dtype != self.blocks.coupling.dtype
            streams, d1, d2 = self._undo(n, *self._outputs(n, streams), d1, d2, reuse)
        if self.blocks.coupling.bits and self.lowest <= 0:
            self._check_exact(*streams)
        return _sum(d1, d2) if self.lowest < 0 else None

    @staticmethod
    def _check_exact(x1: Tensor, x2: Tensor) -> None:
        """Before the first layer both streams were the embeddings. That they are equal again says that every block of the lowest
        segment gave the same numbers twice. An example that is not finite says nothing, and contributes nothing.

        Raises:
            ValueError: they differ: what was computed again was not what the forward pass computed.
        """
        if holds_data(x1) and bool(((x1 != x2) & x1.isfinite() & x2.isfinite()).any()):
            raise ValueError("the blocks gave other numbers when they were computed again, so the inverse is lost and the gradient with "
                             "it: call torch.use_deterministic_algorithms(True), or take a short segment; streams beyond 4 million in size "
                             "(4096 where the blocks compute in float64) have no exact inverse at all")

    def _outputs(self, n: int, streams: Streams | None) -> Streams:
        """y1 and y2 of layer n: stored, or the inputs of the layer above."""
        streams = (self.saved["x1", n], self.saved["x2", n]) if ("x1", n) in self.saved else streams
        return streams[::-1] if self.blocks.coupling.swap else streams

    def _undo(self, n: int, y1: Tensor, y2: Tensor, d1: Tensor | None = None, d2: Tensor | None = None, reuse: bool = False
              ) -> tuple[Streams | None, Tensor | None, Tensor | None]:
        """A layer's inputs and their gradients from its outputs and theirs; F and G are evaluated once for both."""
        coupling, asked = self.blocks.coupling, n > self.lowest
        lam, beta = coupling.lambda_and_beta
        added, d_y1 = self._pull_back(n, "second", self.blocks.second(n, self.context), y1, d2, True)
        x2 = _divided(y2 if added is None else y2 - added, beta)
        d1 = _sum(d1, d_y1)

        def without(change: Tensor) -> Tensor:
            change = to_grid(change, grid_of(self.dtype)) if coupling.bits else change
            return y1.sub_(change) if reuse and coupling.bits else y1 - change

        rest, d_x2 = self._pull_back(n, "first", self.blocks.first(n, self.context), x2, d1, asked, without if asked or n == 0 else None)
        if not asked and n > 0:
            return None, None, None
        d2 = _sum(d2 if d2 is None or beta == 1 else d2 * beta, d_x2)
        d1 = d1 if d1 is None or lam == 1 else d1 * lam
        if coupling.bits:
            x1 = join_bits(rest, self.saved["lost", n], coupling.bits, grid_of(self.dtype))
        else:
            x1 = _divided(y1 if rest is None else rest, lam)
        return (x1, x2), d1, d2

    def _pull_back(self, n: int, half: str, function: Callable | None, x: Tensor, grad: Tensor | None, needs_x: bool,
                   use: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor | None, Tensor | None]:
        """The function's value at x, or what ``use`` makes of it, and the gradient of x; its parameters' gradients are added up on the
        way. The value itself is let go before the backward pass, where the peak lies."""
        if function is None:
            return None, None
        parameters = self.trainable[n] if grad is not None else []
        x = x.to(self.dtype).detach()
        with torch.set_grad_enabled(grad is not None), _replayed(self.saved.get((half, n)), self.device):
            x.requires_grad_(grad is not None and needs_x)
            value = function(x)
        result = value.detach() if use is None else use(value.detach())
        if not value.requires_grad:
            return result, None
        edge, grad = torch.autograd.graph.get_gradient_edge(value), grad.to(value.dtype)
        del value
        inputs = [*([x] if x.requires_grad else []), *parameters]
        got = torch.autograd.grad([edge], inputs, [grad], allow_unused=True)
        for parameter, one in zip(parameters, got[len(inputs) - len(parameters):]):
            if one is not None:
                self.grads[id(parameter)] = _sum(self.grads.get(id(parameter)), one)
        return result, got[0] if x.requires_grad else None


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _divided(x: Tensor, coefficient: float) -> Tensor:
    return x if coefficient == 1 else x / coefficient
