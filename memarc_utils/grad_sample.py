"""Per-example norms and clipped sums of every trainable parameter, in one backward pass (book-keeping, arXiv 2210.00038).

A layer that owns a trainable parameter computes through `_RecordedLayer`, an autograd function whose value is the layer's
own forward and whose backward records what clipping needs and returns no parameter gradient. So autograd never writes
``.grad``: a gradient found there came by a way that the clipper did not see, and is refused. Nothing is saved for frozen
weights, nothing is captured where gradients are off, a layer used twice records twice, and since the function saves
tensors by ``save_for_backward`` it works under activation checkpointing.
"""

import collections
import copy
import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from memarc_utils.book_keeping import BOOKKEEPINGS, Grams, HeldGradient, accumulation_dtype, holds_data
from memarc_utils.function_rules import FunctionRule, OwnTensorsOnly
from memarc_utils.layer_rules import OPTPositionRule, RelativeBias, has_relative_bias
from memarc_utils.model_checks import (WatchedBuffers, WatchedPasses, check_losses, check_no_batch_statistics, check_owner,
                                       check_same_parameters, groups_of)
from memarc_utils.padding import check_padding
from memarc_utils.probe import Probe

MODES = ("book_keeping", "per_example")
# A squared norm below this share of its orthogonal sum came out of cancellation: it is computed again in float64.
_CANCELLED, _UNDERFLOW = 0.1, 1e-20
# A norm is never called smaller than what float32's rounding of the sum could hide: this share, squared, of Σ ‖l_t‖‖r_t‖.
_ROUNDING = 1e-10


class _RecordedLayer(torch.autograd.Function):
    """A layer's forward; its backward hands the parameter gradients to the `GradSampler` and not to autograd."""

    @staticmethod
    def forward(ctx, sampler, module, rule, batch, folded, num_inputs, *tensors):
        inputs = tensors[:num_inputs]
        ctx.sampler, ctx.module, ctx.rule, ctx.batch, ctx.folded = sampler, module, rule, batch, folded
        ctx.num_inputs, ctx.recomputed = num_inputs, isinstance(rule, FunctionRule)
        forward = (nn.Embedding if rule is OPTPositionRule else type(module)).forward
        with OwnTensorsOnly([*tensors, *module.parameters()], sampler.names, type(module).__name__) if ctx.recomputed else nullcontext():
            output = forward(module, *inputs)
        if not isinstance(output, Tensor):
            raise ValueError(f"a layer that trains must return one tensor; {type(module).__name__} returned a {type(output).__name__}: "
                             "freeze its own parameters, or move them into a layer of their own")
        kept = tensors if rule.needs_inputs(module) else tensors[num_inputs:]
        if ctx.recomputed:
            device = output.device.type
            ctx.autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) if device != "meta" else None
            kept = (*kept, output)
        ctx.save_for_backward(*kept)  # the parameters too: autograd then notices if one was changed in between
        return output

    @staticmethod
    def backward(ctx, grad_output):
        module, rule, saved = ctx.module, ctx.rule, ctx.saved_tensors
        inputs = saved[:ctx.num_inputs] if rule.needs_inputs(module) else (None,) * ctx.num_inputs
        needed = ctx.needs_input_grad[6:6 + ctx.num_inputs]
        grads = (None,) * ctx.num_inputs
        with _autocast_of(ctx, grad_output.device.type):
            if ctx.recomputed:
                rule.check_same(module, inputs, saved[-1])
            if any(needed):
                grads = rule.grad_inputs(module, inputs, grad_output, needed)
            ctx.sampler.receive(module, rule, inputs, grad_output, ctx.batch, ctx.folded)
        return (None,) * 6 + tuple(grads) + (None,) * (len(ctx.needs_input_grad) - 6 - ctx.num_inputs)


def _autocast_of(ctx, device: str):
    """What is computed again is computed as it was: under the autocast of its forward."""
    enabled, dtype = ctx.autocast if ctx.recomputed and ctx.autocast is not None else (None, None)
    return nullcontext() if enabled is None else torch.autocast(device, dtype=dtype, enabled=enabled)


def full_precision(device: str):
    """No autocast: norms, factors, sums and noise are float32 or wider, whatever the model computes in."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


class _RecordingForward:
    """Stands in for a layer's forward. A copy of the model (deepcopy, pickle) gets the plain forward of the copied layer."""

    def __init__(self, sampler: "GradSampler", module: nn.Module, rule) -> None:
        self.sampler, self.module, self.rule = sampler, module, rule

    def __call__(self, *args, **kwargs):
        module, rule = self.module, self.rule
        self.sampler.count_call(module)
        if not torch.is_grad_enabled():
            return type(module).forward(module, *args, **kwargs)
        inputs, batch, folded = self.sampler.with_batch_axis(module, rule.inputs(module, *args, **kwargs))
        parameters = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if folded and isinstance(rule, FunctionRule):
            raise ValueError(f"{type(module).__name__} gets its rows folded to (batch · tokens, ...), which a per-example rule cannot take "
                             "apart: give it inputs whose first axis is the batch")
        if any(p not in self.sampler.names for p in parameters):  # swapped by functional_call, or a new Parameter
            raise ValueError(f"a parameter of {type(module).__name__} was replaced since make_private: call private.detach(), change the "
                             "model, then call make_private again; what is spent is then the composition of both runs")
        return _RecordedLayer.apply(self.sampler, module, rule, batch, folded, len(inputs), *inputs, *parameters)

    def __deepcopy__(self, memo):
        return functools.partial(type(self.module).forward, copy.deepcopy(self.module, memo))

    def __reduce__(self):
        return functools.partial, (type(self.module).forward, self.module)


class GradSampler:
    """Attaches to a model, records one backward pass at a time and adds up clipped sums.

    Args:
        model: trainable parameters are those with ``requires_grad``; each must be owned by a layer that has a rule.
        mode: ``book_keeping``, or ``per_example`` which holds every per-example gradient (the plain reference).
        bookkeeping: what is held of a matrix product: ``memory`` the smaller form, ``mixopt`` by the rule of BK-MixOpt.
        per_layer: clip each layer's gradient by itself, inside the backward pass. A layer is dropped as soon as its last
            use was seen, so nothing piles up over depth. Layers that share a parameter are one group.
        probe: look for layers whose rows are no examples, whatever their number, and for losses that mix examples (see `Probe`).

    Attributes:
        names: trainable parameter to its (first) name in the model.
        num_groups: how many groups are clipped apart (1 unless ``per_layer``).
        sums: name to clipped sum over all backward passes since `clear`, float32 or wider.
        recorded: names that some non-empty backward pass recorded.
        held_bytes: name to the bytes that were held for it in the last backward pass. A layer input that several layers
            read counts for each of them.

    Raises:
        ValueError: no trainable parameter, an unknown option, or a parameter that no rule covers; nothing is changed then.
    """

    def __init__(self, model: nn.Module, mode: str = "book_keeping", bookkeeping: str = "memory", per_layer: bool = False,
                 probe: bool = True) -> None:
        for name, value, known in (("mode", mode, MODES), ("bookkeeping", bookkeeping, BOOKKEEPINGS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        self.model, self.mode, self.bookkeeping, self.per_layer = model, mode, bookkeeping, per_layer
        self.names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        if not self.names:
            raise ValueError("no parameter of the model has requires_grad=True: choose what to train first, for instance "
                             "with add_lora or attach_side_network")
        owners = [(name, module) for name, module in model.named_modules()
                  if any(p.requires_grad for p in module.parameters(recurse=False))]
        rules = [check_owner(name, module) for name, module in owners]
        check_no_batch_statistics(model)
        self.note_buffers()
        self._passes = WatchedPasses(model, self.names)
        self._groups = groups_of([module for _, module in owners])
        if not per_layer:  # clipped together
            self._groups = dict.fromkeys(self._groups, 0)
        self.num_groups = len(set(self._groups.values()))
        self.sums: dict[str, Tensor] = {}
        self.recorded: set[str] = set()
        self.held_bytes: dict[str, int] = {}
        self.foreign_backward = self.half_done = False
        self._probe, self._refuses = Probe({name for name, _ in owners} if probe else set()), probe
        self._owner_names = {module: name for name, module in owners}
        self._batch: int | None = None
        self._tokens: set[int] = set()  # lengths of the model calls since the last backward pass
        self._counting = True
        self._model_calls = self._backwards = self._layer_called = 0  # of this step; the last one since its last backward pass
        self._forget_backward()
        self._owners = [module for _, module in owners]
        for module, rule in zip(self._owners, rules):
            module.forward = _RecordingForward(self, module, rule)
        self._biases = [module for module in model.modules() if has_relative_bias(module)]
        for module in self._biases:
            module.compute_bias = RelativeBias(module, lambda: self._recording_for or (self._batch if self._counting else None))
        # The model and, where a loss calls its base module directly, that one: both see the batch first.
        entries = {model, *(m for m in model.modules() if hasattr(m, "get_input_embeddings"))}
        self._hooks = [entry.register_forward_pre_hook(self._note_batch, with_kwargs=True) for entry in entries]

    def _forget_backward(self) -> None:
        """The state of one forward and backward pass."""
        self._held: dict[nn.Parameter, HeldGradient] = {}
        self._recording_for: int | None = None
        self._calls: dict[int, int] = collections.defaultdict(int)
        self._clipped_groups: set[int] = set()

    def detach(self) -> None:
        """Gives the plain model back: forwards restored, nothing left on the modules."""
        for module in self._owners:
            module.__dict__.pop("forward", None)
        for module in self._biases:
            module.__dict__.pop("compute_bias", None)
        for hook in self._hooks:
            hook.remove()
        self._owners, self._biases, self._hooks = [], [], []
        self.clear()

    def clear(self) -> None:
        """Forgets sums and whatever an aborted backward pass left."""
        self.sums, self.foreign_backward, self.half_done, self._layer_called = {}, False, False, False
        self._model_calls = self._backwards = 0
        self._probe.next_step()
        self._passes.forget()
        self._forget_backward()

    # ---- forward -------------------------------------------------------------------------------------------------
    def _note_batch(self, module, args, kwargs) -> None:
        """B and T come from the model call: the first of input_ids, inputs_embeds, or any tensor, also of a batch that comes as a dict."""
        batches = [t for batch in args if isinstance(batch, Mapping) for t in batch.values() if isinstance(t, Tensor)]
        if not torch.is_grad_enabled():
            self._counting = self._counting and module is not self.model  # an evaluation: no backward will come of it
            return
        self._counting = True
        self._passes.note()
        self._model_calls, self._layer_called = self._model_calls + (module is self.model), True
        check_padding(module, args, kwargs, needs_mask=self._refuses)
        # of a dict the tensors with more axes first: weights of classes or positions have one
        candidates = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args, *sorted(batches, key=lambda t: t.dim() < 2), *kwargs.values()]
        lead = next((t for t in candidates if isinstance(t, Tensor) and t.dim() > 0), None)
        if lead is not None:
            self._batch = lead.shape[0]
            self._tokens |= set(lead.shape[1:2])

    def count_call(self, module: nn.Module) -> None:
        """How often a group is used before the backward pass tells when its last record has come. A reentrant checkpoint
        runs its part without gradients first; what is recomputed during the backward pass is no new use."""
        if self.per_layer and self._counting and self._recording_for is None:
            self._calls[self._groups[module]] += 1

    def with_batch_axis(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], int, bool]:
        """Makes the first axis the batch: positions that come as (1, T) are expanded, rows folded to B·T are noted."""
        batch = self._recording_for or self._batch or inputs[0].shape[0]
        if self._recording_for is None:  # what is recomputed is no new use
            self._layer_called = True
            self._passes.note()
        # the first axis is the batch, or one row of a lookup
        if all(t.dim() > 0 and (t.shape[0] == batch or t.shape[0] == 1 and not t.is_floating_point()) for t in inputs):
            return tuple(t if t.shape[0] == batch else t.expand(batch, *t.shape[1:]) for t in inputs), batch, False
        if any(all(t.dim() == 2 and t.shape[0] == batch * tokens for t in inputs) for tokens in self._tokens):
            return inputs, batch, True
        name = next(self.names[p] for p in module.parameters(recurse=False) if p.requires_grad)
        raise ValueError(
            f"cannot tell which example is which in the input of the layer that owns {name}: its shapes are "
            f"{[tuple(t.shape) for t in inputs]} and the model was called with {batch} examples. Freeze that parameter, or "
            "give the layer inputs whose first axis is the batch")

    # ---- backward ------------------------------------------------------------------------------------------------
    def receive(self, module, rule, inputs, grad_output, batch: int, folded: bool) -> None:
        """Called by a layer's backward. A record of a backward pass that was not ours is discarded and remembered."""
        if self._recording_for is None:
            self.foreign_backward = True
            return
        if batch != self._recording_for:
            raise ValueError(f"the model was called with {batch} examples but backward got {self._recording_for} losses: "
                             "give exactly one loss for each example of the model call")
        if folded:
            inputs = tuple(None if t is None else t.unflatten(0, (batch, -1)) for t in inputs)
            grad_output = grad_output.unflatten(0, (batch, -1))
        if self._probe.look(self._owner_names[module], grad_output):
            return
        parameters, group = dict(module.named_parameters(recurse=False)), self._groups[module]
        if group in self._clipped_groups:
            raise ValueError(f"the layer {self._owner_names[module]} was used again after its gradient was clipped by itself, which "
                             'would let an example in twice. Call the model inside the loss only, or take clipping="flat"')
        records = list(rule.record(module, inputs, grad_output))  # under the autocast of the forward, where one computes again
        with full_precision(grad_output.device.type):
            self._hold(parameters, records, batch)
            if self.per_layer and self._calls[group] > 0:  # a use that was not counted waits for the end of the backward pass
                self._calls[group] -= 1
                if self._calls[group] == 0:
                    self._clip_and_add(group)

    def _hold(self, parameters: dict[str, nn.Parameter], records: list[tuple], batch: int) -> None:
        for name, kind, tensors in records:
            if (parameter := parameters.get(name)) is None:
                raise ValueError(f"a forward pass put a tensor in the place of the parameter {name} of a layer whose "
                                 f"{', '.join(parameters)} trains (a hypernetwork): use that tensor in a function, outside the layer")
            held = self._held.get(parameter)
            if held is None:
                held = self._held[parameter] = HeldGradient(parameter.shape, parameter.dtype, self.bookkeeping, self.mode == "per_example")
            if kind == "pair":
                held.add_pair(*tensors)
            elif kind == "lookup":
                held.add_lookup(*tensors)
            elif tensors.shape == (batch, *parameter.shape):
                held.add_dense(tensors)
            else:
                raise ValueError(f"the rule for {self.names[parameter]} gave {tuple(tensors.shape)}, expected {(batch, *parameter.shape)}")

    def backward(self, losses: Float[Tensor, " batch"],
                 clip: Callable[[Float[Tensor, " batch"]], Float[Tensor, " batch"]]
                 ) -> tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """One backward pass; adds ``Σ_i clip(‖g_i‖) · g_i`` to `sums`.

        Args:
            losses: one per example of the model call.
            clip: norms to factors.

        Returns:
            Per-example gradient norms, and which examples were finite (the others contributed zero).

        Raises:
            ValueError: losses are not one per example, or a gradient reached a parameter past the clipper.
        """
        check_losses(losses)
        if len(losses) == 0:
            return losses.detach(), torch.ones(0, dtype=torch.bool, device=losses.device)
        self.check_parameters(release=False)
        self.check_whole()
        if self._backwards and self._model_calls <= self._backwards and not self._layer_called:
            raise ValueError("private.backward came again without a model call before it: an example that is in two of them counts "
                             "twice. Add an example's losses up, losses_a + losses_b, and call private.backward once a model call")
        self._held, self._recording_for, self._clip, self.held_bytes = {}, len(losses), clip, {}
        self._finite, self._group_squares = torch.isfinite(losses.detach()), []
        self._finite_losses, device = self._finite, losses.device.type
        try:
            with full_precision(device):
                self._probe.run(losses)
                torch.autograd.backward(losses, torch.ones_like(losses))
                self._probe.compare()
                self.check_no_grad()
                for group in sorted({self._groups[p] for p in self._held}):
                    self._clip_and_add(group)
            if not self._group_squares:
                raise ValueError("the losses do not depend on any trainable parameter: was the forward pass run under "
                                 "torch.no_grad(), or before make_private?")
            self.half_done = False
            return torch.stack(self._group_squares).sum(0).sqrt(), self._finite
        finally:
            self._forget_backward()
            self._batch, self._tokens, self._backwards, self._layer_called = None, set(), self._backwards + 1, False

    @torch.no_grad()
    def _clip_and_add(self, group: int) -> None:
        """Norms of a group's whole gradients, factors, weighted sums; the records are dropped one by one as sums grow."""
        held = [(p, self._held.pop(p)) for p in [p for p in self._held if self._groups[p] == group]]
        if not held:
            return
        for parameter, gradient in held:
            self.held_bytes[self.names[parameter]] = sum(t.nbytes for t in gradient.tensors())
            if gradient.was_written():
                raise ValueError(f"an operation below the layer of {self.names[parameter]} wrote into the gradient that it was given: let "
                                 "its backward return a new tensor")
        norms, cancelled = self._norms([gradient for _, gradient in held], self._finite.device)
        keep = torch.isfinite(norms) & self._finite_losses
        factors = torch.where(keep, self._clip(norms.masked_fill(~keep, 0)), 0)
        self._group_squares.append(norms.square())
        self._finite = self._finite & torch.isfinite(norms)
        some_left_out = not (holds_data(keep) and bool(keep.all()))
        self._clipped_groups.add(group)
        self.half_done = True  # until the whole batch is in
        while held:
            parameter, gradient = held.pop()
            name, device = self.names[parameter], parameter.device
            kept, total = keep.to(device) if some_left_out else None, self.sums.get(name)
            if cancelled:  # float32 would lose in the sum what float64 has found in the norm
                exact = gradient.add_weighted_sum(None, factors.to(device), kept, torch.float64)
                self.sums[name] = exact.to(accumulation_dtype(parameter.dtype)) if total is None else total.add_(exact)
            else:
                self.sums[name] = gradient.add_weighted_sum(total, factors.to(device), kept)
            self.recorded.add(name)

    @staticmethod
    def _norms(held: list[HeldGradient], device: torch.device) -> tuple[Float[Tensor, " batch"], bool]:
        """Norms in float32; in float64 where contributions cancel so far that float32 could call a norm too small, or where
        squares may have left its range below; and whether that was so."""
        def total(squares):
            return torch.stack([s.to(device) for s in squares]).sum(0)

        grams = Grams()
        squared, orthogonal, aligned = zip(*(gradient.squares(grams=grams) for gradient in held))
        squared, floor = total(squared), _ROUNDING * total([a.square() for a in aligned])
        cancelled = holds_data(squared) and bool(((squared < _CANCELLED * total(orthogonal)) | (squared < _UNDERFLOW)).any())
        if cancelled:
            squared = total([gradient.squares(torch.float64).squared for gradient in held])
        return torch.maximum(squared.to(floor.dtype), floor).sqrt(), cancelled

    def check_no_grad(self) -> None:
        """No parameter of the model holds a gradient, whether it trains now or was frozen since."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                raise ValueError(f"a gradient reached {name} by a way that the clipper does not see (.grad is set): its weight "
                                 "is used outside its layer's forward, or loss.backward() was called by hand. Call the "
                                 "layer itself, use private.backward(losses), and clear what is left with "
                                 "optimizer.zero_grad() or parameter.grad = None")

    def note_buffers(self) -> None:
        """Remembers the buffers as they are now; `check_parameters` finds those that a forward pass has written since."""
        self._buffers = WatchedBuffers(self.model)

    def check_whole(self) -> None:
        """No batch stopped half way: a second try would let its examples in twice."""
        if self.half_done:
            raise ValueError("the last private.backward stopped half way and part of it is in the sum: call private.zero_grad() and "
                             "repeat the batch")

    def check_parameters(self, release: bool = True) -> None:
        """The trainable parameters are those that were there at the start, none holds a gradient, nothing was written by a forward
        pass; ``release``: before a step, not only before a backward pass."""
        self.check_no_grad()
        self._buffers.check()
        check_same_parameters(self.model, self.names)
        self._passes.check(release)
