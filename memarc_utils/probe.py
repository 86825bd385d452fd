"""A look for examples that meet: in a layer whose rows are no examples, or in a loss that is made of several."""

import contextlib
import warnings
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from memarc_utils.book_keeping import holds_data
from memarc_utils.padding import lengths_of, without_spare_padding
from memarc_utils.randomness import seed_from_operating_system

# What lies below a zero has no gradient in the first step or two: the probe is repeated for it, but not for ever.
_MOST_FOR_UNSEEN = 8
_CHANCE = 1 / 64  # of a look in any other step: what is switched on after the first steps does not wait for a power of two
# What a loss may differ by when other rows are in its batch: float32's rounding is some 1e-5 of it, that of 16 bits some 1e-2.
_TOLERANCE, _TOLERANCE_16_BITS = 1e-3, 5e-2


class Schedule:
    """When to look: in the steps 1, 2, 4, 8, ... and, with probability 1/64, in any other.

    The generator is its own and the operating system seeds it, so nothing in a run can know which steps those are, and noise,
    batches and dropout are the same whichever they are. A step in which nothing could be seen (an empty batch) is put off.
    """

    def __init__(self, on: bool = True) -> None:
        self.on = self.due = on
        self.generator = seed_from_operating_system(torch.Generator())
        self._step = 1

    def next_step(self, again: bool = False) -> None:
        if self.due:  # empty batches and too small ones are no step of the schedule
            return
        self._step += 1
        power_of_two = self._step & (self._step - 1) == 0
        self.due = self.on and (power_of_two or again or float(torch.rand((), generator=self.generator)) < _CHANCE)


class Probe:
    """Sends a random half of a batch's losses back, then the other half, and demands that no other example's row is reached in any
    layer. A batch mean, a first axis that is not the batch, or an in-batch negative reaches them. The losses have random weights,
    so that what they do to one row does not cancel; those of half of the rows are 1, and such a row must get the gradient that it
    gets in the pass that counts, all rows together: a hook that divides by the norm of the batch reaches no other row, but couples
    them. (A hook that does anything to each row by itself, a clamp for example, may.)

    It costs two backward passes in the steps of the `Schedule`, and again while a layer has not been seen. No gradient can show what
    meets behind a ``detach``, nor what meets below the lowest layer that trains, as in a frozen body that calls
    ``F.batch_norm(training=True)``: no gradient goes there. `verify_sensitivity` shows both, since it compares batches.

    Args:
        layers: names of the layers that must be seen; empty turns the probe off.
    """

    def __init__(self, layers: set[str]) -> None:
        self._unseen, self._probed, self._schedule = set(layers), 0, Schedule(on=bool(layers))
        self._sent: Bool[Tensor, " batch"] | None = None  # whose losses this pass of the probe's own sends back
        self._compared: list[Bool[Tensor, " batch"]] = []
        self._reached: list[tuple[str, Tensor, Tensor]] = []
        self._sizes: list[dict[str, list[Tensor]]] = []  # of the rows, pass by pass, layer by layer, use by use; empty: look at nothing
        self._coarse = False

    def next_step(self) -> None:
        self._schedule.next_step(again=bool(self._unseen) and self._probed < _MOST_FOR_UNSEEN)

    def look(self, layer: str, grad_output: Float[Tensor, "batch ..."]) -> bool:
        """What reached a layer, example by example; whether the pass is the probe's own and counts for nothing. Of an example that is
        not finite nothing can be said: 0 · inf is nan."""
        if not self._sizes:
            return False
        grad_output = grad_output.detach() if grad_output.dim() > 1 else grad_output.detach()[:, None]
        dims = tuple(range(1, grad_output.dim()))
        self._coarse |= grad_output.element_size() < 4
        self._sizes[-1].setdefault(layer, []).append(torch.linalg.vector_norm(grad_output, ord=1, dim=dims))  # makes no copy
        if self._sent is None:
            return False
        some = grad_output.numel() > 0  # a head that every row gives no token (rows of one, cut to their targets) is reached by none
        reached = torch.linalg.vector_norm(grad_output, ord=float("inf" if some else 1), dim=dims) > 0
        sent = self._sent.to(reached.device)
        self._reached.append((layer, (reached & ~sent).any(), (reached & sent).any()))
        return True

    def run(self, losses: Float[Tensor, " batch"]) -> None:
        """Before the pass that counts.

        Raises:
            ValueError: one example's loss reaches another's rows.
        """
        self._sizes = []
        if not (self._schedule.due and len(losses) > 1 and holds_data(losses)):
            return
        generator = self._schedule.generator
        weights = torch.rand(len(losses), generator=generator) + 0.5
        order = torch.randperm(len(losses), generator=generator)
        halves = order[:len(losses) // 2], order[len(losses) // 2:]
        self._reached, self._compared, self._coarse = [], [], False
        before = [(leaf, None if leaf.grad is None else leaf.grad.clone()) for leaf in _leaves(losses)]
        try:
            for rows in halves:
                alike = rows[:max(1, len(rows) // 2)]
                weights[alike] = 1
                self._sent, compared = torch.zeros(2, len(losses), dtype=torch.bool)
                self._sent[rows], compared[alike] = True, True
                self._compared.append(compared)
                self._sizes.append({})
                torch.autograd.backward(losses, (weights * self._sent).to(losses), retain_graph=True)
        except BaseException:
            self._sizes = []
            raise
        finally:
            self._sent = None
            for leaf, grad in before:  # an input that requires a gradient gets it once, from the pass that counts
                leaf.grad = grad
        self._unseen -= {name for name, _, own in self._reached if own}
        if met := [name for name, others, _ in self._reached if others]:
            self._sizes = []
            raise ValueError(f"one example's loss reaches other examples' rows in the layer {met[0] or 'of the model'}: examples "
                             "meet there or in the loss (in-batch negatives, a mean over the batch, a first axis that is not the "
                             "batch), so no clipping bounds one example's share. Keep every example's loss to itself")
        self._probed, self._schedule.due = self._probed + 1, False
        self._sizes.append({})

    def compare(self) -> None:
        """After the pass that counts, before its sum does.

        Raises:
            ValueError: a row's gradient depends on which others were sent back with it.
        """
        passes, self._sizes = self._sizes, []
        if not passes or not passes[-1]:
            return
        *alone, together = passes
        tolerance = _TOLERANCE_16_BITS if self._coarse else _TOLERANCE
        # Of a row that is all rounding (a sum over normalised entries) no order of adding on a GPU need be the same: its own largest
        # gradient in any layer says what that can be. Other rows do not, or a large one would hide the others.
        rounding = 1e-3 * torch.stack([size.cpu().float() for uses in together.values() for size in uses]).nan_to_num().amax(0)
        found: list[tuple[str, Tensor]] = []
        for compared, sizes in zip(self._compared, alone):
            for layer, uses in sizes.items():
                for part, whole in zip(uses, together.get(layer, [])):
                    gap = (part - whole).abs() > tolerance * (whole + rounding.to(whole))
                    found.append((layer, (gap & part.isfinite() & whole.isfinite() & compared.to(gap.device)).any()))
        if coupled := [layer for layer, differs in found if differs]:
            raise ValueError(f"an example's gradient in the layer {coupled[0] or 'of the model'} depends on which others are sent back "
                             "with it: a backward hook or a custom backward at or above it couples the examples (it divides by a norm of the "
                             "batch, for instance), so no clipping bounds one example's share. Remove it, or let it treat each row by "
                             "itself; where a part is computed again, let it draw the same random numbers (preserve_rng_state=True)")


def _leaves(losses: Tensor) -> list[Tensor]:
    """The tensors that a backward pass of the losses would give a gradient."""
    seen, ahead, leaves = set(), [losses.grad_fn], []
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        ahead += [following for following, _ in node.next_functions]
    return leaves


class LossProbe:
    """For losses without a backward pass: a random half of the rows is computed alone, and every row of it must have the loss that it
    has in the whole micro-batch, up to rounding: 1e-3 of its size and the median's, 5e-2 where anything is computed in 16 bits.
    The mean of half of the rows can be that of all up to so much by chance, so that one look in some dozens sees nothing of a batch
    mean; the next one does.

    Of rows under an ``attention_mask`` the longest stay out of that half where others are in it, and padding that only they needed is
    cut off: a loss that is a mean over padded positions, say, is another one then.

    It costs half a forward pass in the steps of the `Schedule`; a second look, where losses differ, one and a half more. A random loss
    differs from itself: then nothing can be said, and a warning says so. No generator moves.
    """

    def __init__(self) -> None:
        self.schedule = Schedule()

    def run(self, micro_batch: Any, losses: Float[Tensor, " batch"], compute: Callable[[Any], Tensor], device: torch.device) -> None:
        """
        Args:
            micro_batch: tensors with the batch axis first, in any nesting of dicts, tuples and lists.
            losses: of the whole micro-batch, just computed.
            compute: the losses of a micro-batch, without gradients and without dropout.
            device: whose global generator, besides the CPU's, a random loss would draw from.

        Raises:
            ValueError: an example's loss depends on which others are there.
        """
        if len(losses) < 2:
            return
        self.schedule.due = False
        rows = torch.randperm(len(losses), generator=self.schedule.generator)[:len(losses) // 2].sort().values
        if (lengths := lengths_of(micro_batch)) is not None and bool((lengths[rows] < lengths.max()).any()):
            rows = rows[lengths[rows] < lengths.max()]
        half, size = _rows(micro_batch, rows, len(losses)), losses[losses.isfinite()].abs().median().nan_to_num()
        half = without_spare_padding(half) if lengths is not None else half

        def differ(first: Tensor, second: Tensor, tolerance: float) -> bool:
            finite = first.isfinite()
            gap = (first - second).abs() > tolerance * (second.abs() + size)
            return bool(((finite != second.isfinite()) | finite & gap).any())

        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            alone, together = compute(half), losses[rows]
            if not differ(alone, together, _TOLERANCE):
                return
            with SixteenBits() as coarse:
                again = compute(half)
            if differ(again, alone, _TOLERANCE) or differ(compute(micro_batch), losses, _TOLERANCE):
                return warnings.warn("the losses are random: the same rows gave others a second time, so whether they mix examples cannot "
                                     "be seen. Draw nothing in the loss (nn.Dropout rests in evaluation mode)", stacklevel=5)
        if not coarse.seen or differ(alone, together, _TOLERANCE_16_BITS):
            raise ValueError("the losses mix examples: half of the rows alone have other losses than among all rows, so no clipping bounds "
                             "one example's share. Keep every example's loss to itself: reduction='none', no mean, norm or negatives "
                             "over the batch, none over positions that are padding. (A tensor of the micro-batch as long as the batch "
                             "counts as one row an example: keep constants out of it)")


class SixteenBits(TorchDispatchMode):
    """Notes whether any operation computes in fewer than 32 bits, also under an autocast that only the loss knows of. A view of data that
    is given in 16 bits (a cache of features) computes nothing."""

    seen = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen |= not function.is_view and any(
            isinstance(t, Tensor) and t.is_floating_point() and t.element_size() < 4 for t in tree_leaves(result))
        return result


@contextlib.contextmanager
def refuse_sixteen_bits() -> Iterator[None]:
    """For losses whose differences are divided by a small number.

    Raises:
        ValueError: something within was computed in fewer than 32 bits.
    """
    with SixteenBits() as coarse:
        yield
    if coarse.seen:
        raise ValueError("the losses are computed in 16 bits: who else is in the batch changes how they round, and divided by 2λ that moves "
                         "the other examples' numbers by more than C. Compute them in float32, without autocast")


def num_examples(micro_batch: Any) -> int:
    """The first axis of the first tensor that has one, in any nesting of dicts, tuples and lists.

    Raises:
        ValueError: there is none.
    """
    leaves = tree_leaves(dict(micro_batch) if isinstance(micro_batch, UserDict) else micro_batch)
    size = next((len(t) for t in leaves if isinstance(t, Tensor) and t.dim()), None)
    if size is None:
        raise ValueError(f"a micro-batch is a {type(micro_batch).__name__} that shows no tensor, so it cannot be known how many examples "
                         "it has: give tensors with the batch axis first, in a dict, a tuple or a list")
    return size


def _rows(micro_batch: Any, rows: Int[Tensor, " some"], size: int) -> Any:
    if isinstance(micro_batch, UserDict):  # a tokenizer's batch, which torch takes for one leaf
        return type(micro_batch)(_rows(dict(micro_batch), rows, size))

    def one_a_row(node: Any) -> bool:
        return isinstance(node, list) and len(node) == size and not any(isinstance(t, Tensor) for t in tree_leaves(node))

    def pick(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == size:
            return leaf[rows.to(leaf.device)]
        if isinstance(leaf, np.ndarray) and leaf.ndim and len(leaf) == size:
            return leaf[rows.numpy()]
        return [leaf[k] for k in rows.tolist()] if one_a_row(leaf) else leaf

    return tree_map(pick, micro_batch, is_leaf=one_a_row)
