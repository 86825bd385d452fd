"""`verify_sensitivity`: how far one example moves the clipped sum, measured on a model, a loss and a batch of one's own."""

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memarc_utils.book_keeping import holds_data
from memarc_utils.clipping import check_clipping, clipping_factors
from memarc_utils.grad_sample import GradSampler
from memarc_utils.model_checks import check_no_batch_statistics
from memarc_utils.padding import without_spare_padding
from memarc_utils.probe import SixteenBits


@dataclass(frozen=True)
class SensitivityReport:
    """What `verify_sensitivity` measured.

    Attributes:
        max_contribution: max over i of ‖S(batch) − S(batch without i)‖; must be at most the clipping bound.
        max_relative_error: max over i of ‖ĝ_i − g_i‖ / max(‖g_i‖, 1e-6), the engine's gradient against a loop's.
        max_norm_error: the same for the norms the engine clips by.
        untrained_parameters: names that no backward pass recorded.
        max_grad_norm: the bound C that was asked for.
        examples_dropped: examples whose gradient is not finite: they contribute zero, and no gradient of theirs can be compared.
        tolerance: of the gradients' relative error: 1e-4, or 0.02 where a parameter that trains has 16 bits or a pass computes in them
            (autocast), in which the loop's own sums are rounded so far. The bound on the contribution is the same for all.
    """

    max_contribution: float
    max_relative_error: float
    max_norm_error: float
    untrained_parameters: list[str]
    max_grad_norm: float
    examples_dropped: int = 0
    tolerance: float = 1e-4

    @property
    def holds(self) -> bool:
        return (self.max_contribution <= self.max_grad_norm * (1 + 1e-4) and self.max_relative_error <= self.tolerance
                and not self.untrained_parameters)

    def __str__(self) -> str:
        verdict = "one example moves the sum by at most C" if self.holds else "NOT SAFE"
        untrained = f"; untrained: {', '.join(self.untrained_parameters)}" if self.untrained_parameters else ""
        dropped = f"; {self.examples_dropped} examples were not finite and contributed nothing" if self.examples_dropped else ""
        return (f"{verdict}: largest contribution {self.max_contribution:.6g} (C = {self.max_grad_norm:g}), largest relative "
                f"error of a gradient {self.max_relative_error:.2g}, of a norm {self.max_norm_error:.2g}{untrained}{dropped}")


def verify_sensitivity(model: nn.Module, loss_per_example, micro_batch: dict[str, Tensor], max_grad_norm: float = 1.0,
                       mode: str = "book_keeping", clipping: str = "flat", bookkeeping: str = "memory") -> SensitivityReport:
    """Measures the two promises of the engine on a model, a loss and a batch of your own.

    Every example is left out once (is the clipped sum moved by at most C, neighbours and their padding included?), and every example's
    gradient as the engine sees it inside the batch is compared with that of a plain loop, one example at a time, without
    the engine. Dropout rests meanwhile; otherwise the model is measured in the mode that it is in, so give it as it trains: what is done
    in training mode only shows in no other. A model that draws other random numbers there is measured in evaluation mode, with a
    warning. Activation checkpointing stays on where it is enabled; the model comes back as it was. Costs about 3 B passes.

    Args:
        model: with its trainable parameters chosen; not private yet.
        loss_per_example: ``(model, micro_batch) -> losses (B,)``.
        micro_batch: tensors with the batch axis first.

    Raises:
        ValueError: as `make_private`; nothing trains, or the batch is no dict of tensors with the batch axis first; or no example
            of the batch has a finite gradient, so that nothing can be measured.
    """
    check_clipping(clipping, max_grad_norm)
    check_micro_batch(micro_batch)
    if not isinstance(model, nn.Module) or not callable(loss_per_example):
        raise ValueError("verify_sensitivity takes a model, a function (model, micro_batch) -> losses and a batch, got "
                         f"{type(model).__name__} and {type(loss_per_example).__name__}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("no parameter of the model has requires_grad=True: choose what to train first, for instance with add_lora")
    check_no_batch_statistics(model)  # before a pass in training mode moves them
    coarse = any(p.requires_grad and p.element_size() < 4 for p in model.parameters())
    batch = _batch_size(micro_batch)
    with _without_dropout(model, lambda: loss_per_example(model, micro_batch)) as checkpoint_again:
        with SixteenBits() as sixteen:
            loop = [_gradient_alone(model, loss_per_example, _rows(micro_batch, [i])) for i in range(batch)]
        coarse = coarse or sixteen.seen
        comparable = [i for i in range(batch) if math.isfinite(_distance(loop[i], {}))]
        if not comparable:
            raise ValueError("no example of the batch has a finite gradient, so nothing was measured: look at the losses and the inputs")
        checkpoint_again()
        # Without the probe: what it would refuse is measured here.
        sampler = GradSampler(model, mode, bookkeeping, per_layer=clipping == "per_layer", probe=False)
        try:
            def clipped(rows, clip):
                sampler.clear()
                norms, _ = sampler.backward(loss_per_example(model, _rows(micro_batch, rows)), clip)
                return dict(sampler.sums), norms

            everyone = list(range(batch))
            def bounded(norms):
                return clipping_factors(norms, max_grad_norm, clipping, sampler.num_groups)
            whole, norms = clipped(everyone, bounded)
            contribution = relative = norm_error = 0.0
            for i in everyone:
                rest = clipped([j for j in everyone if j != i], bounded)[0] if batch > 1 else {}
                contribution = max(contribution, _distance(whole, rest))
                if i not in comparable:
                    continue
                alone = clipped(everyone, lambda n: torch.nn.functional.one_hot(torch.tensor(i, device=n.device), batch).to(n.dtype))[0]
                size = max(_distance(loop[i], {}), 1e-6)
                relative = max(relative, _distance(alone, loop[i]) / size)
                norm_error = max(norm_error, abs(float(norms[i].nan_to_num(math.inf)) - _distance(loop[i], {})) / size)
            untrained = [n for n in sampler.names.values() if n not in sampler.recorded]
        finally:
            sampler.detach()
    return SensitivityReport(contribution, relative, norm_error, untrained, max_grad_norm, batch - len(comparable),
                             0.02 if coarse else 1e-4)


@contextlib.contextmanager
def _without_dropout(model: nn.Module, losses: Callable[[], Tensor]):
    """The model's own mode with every dropout at rest; evaluation mode where its losses are random all the same. Yields a function that
    turns activation checkpointing back on, which transformers ties to training mode: a module that checkpoints is in evaluation
    mode until then, since a plain loop shall not depend on it."""
    modes = {m: m.training for m in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    rates: list[tuple[object, str, float]] = []

    def checkpoint_again() -> None:
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True

    try:
        for module in model.modules():
            is_dropout = isinstance(module, nn.modules.dropout._DropoutNd) or "drop" in type(module).__name__.lower()
            if is_dropout or getattr(module, "gradient_checkpointing", False):
                module.training = False
            for owner in (module, getattr(module, "config", None)):  # rates that a function is called with
                for name, value in list(vars(owner).items()) if hasattr(owner, "__dict__") else []:
                    if ("drop" in name or is_dropout and name == "p") and isinstance(value, float) and value:
                        rates.append((owner, name, value))
                        vars(owner)[name] = 0.0  # a configuration may be frozen
        if any(m.training for m in model.modules()) and _are_random(losses):
            warnings.warn("in training mode the losses are random, also without dropout, so one pass cannot be compared with the next: "
                          "measured in evaluation mode. What the model does in training mode only is not seen", stacklevel=4)
            model.eval()
        yield checkpoint_again
    finally:
        for owner, name, value in rates:
            vars(owner)[name] = value
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                if holds_data(buffer) and not torch.equal(buffer, before):  # statistics that a forward pass keeps
                    buffer.copy_(before)


def _are_random(losses: Callable[[], Tensor]) -> bool:
    """Whether they follow the seed, by more than the order of a sum on a GPU can do: what differs under one seed too is no chance but
    follows the passes before it, and that the engine shall see."""
    def under(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return losses()

    def same(one: Tensor, other: Tensor) -> bool:
        return not holds_data(one) or torch.allclose(one, other, rtol=1e-5, atol=1e-7, equal_nan=True)

    with torch.no_grad(), torch.random.fork_rng():
        first = under(0)
        return not same(first, under(1)) and same(first, under(0))


def check_micro_batch(micro_batch) -> None:
    """Raises:
        ValueError: not a dict of tensors whose first axis is the batch.
    """
    tensors = [t for t in micro_batch.values() if isinstance(t, Tensor)] if isinstance(micro_batch, Mapping) else []
    if not tensors or not all(t.dim() for t in tensors) or len({len(t) for t in tensors}) > 1:
        raise ValueError("micro_batch must be a dict of tensors with the batch axis first, for example "
                         "pad_rows([dataset[i] for i in range(4)])")


def _batch_size(micro_batch: dict[str, Tensor]) -> int:
    return next(len(t) for t in micro_batch.values() if isinstance(t, Tensor))


def _rows(micro_batch: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    """The rows, no wider than the longest of them: where a longer neighbour's padding changed a loss, leaving it out shows it."""
    return dict(without_spare_padding({k: t[rows] if isinstance(t, Tensor) else t for k, t in micro_batch.items()}))


def _gradient_alone(model, loss_per_example, one: dict[str, Tensor]) -> dict[str, Tensor]:
    """By an ordinary backward pass, which every kind of checkpoint knows; what stood in ``.grad`` is put back."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.grad for n, p in named.items()}
    try:
        for p in named.values():
            p.grad = None
        loss_per_example(model, one).sum().backward()
        return {n: p.grad for n, p in named.items() if p.grad is not None}
    finally:
        for n, p in named.items():
            p.grad = before[n]


def _distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Euclidean distance of two gradients over all parameters, in float64; a missing entry is zero."""
    total = 0.0
    for name in first.keys() | second.keys():
        a, b = first.get(name), second.get(name)
        difference = a.double() - b.double() if a is not None and b is not None else (a if a is not None else b).double()
        total += float(difference.detach().square().sum())
    return math.inf if math.isnan(total) else total ** 0.5
