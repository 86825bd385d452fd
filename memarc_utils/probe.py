"""A look for examples that meet: in a layer whose rows are no examples, or in a loss that is made of several."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memarc_utils.book_keeping import holds_data
from memarc_utils.randomness import seed_from_operating_system

# What lies below a zero has no gradient in the first step or two: the probe is repeated for it, but not for ever.
_MOST_FOR_UNSEEN = 8


class Probe:
    """Sends a random half of a batch's losses back, each with a random weight, then the other half, and demands that no other
    example's row is reached in any layer. A batch mean, a first axis that is not the batch, or an in-batch negative reaches them.

    It costs two backward passes in the steps 1, 2, 4, 8, ..., and again while a layer has not been seen. What meets behind a
    ``detach`` no gradient can show: `verify_sensitivity` does, since it compares batches.

    Args:
        layers: names of the layers that must be seen; empty turns the probe off.
    """

    def __init__(self, layers: set[str]) -> None:
        self._unseen, self._on = set(layers), bool(layers)
        self._step, self._probed, self._due = 1, 0, True
        self._sent: Bool[Tensor, " batch"] | None = None
        self._reached: list[tuple[str, Tensor, Tensor]] = []
        self._generator = seed_from_operating_system(torch.Generator())

    @property
    def running(self) -> bool:
        return self._sent is not None

    def next_step(self) -> None:
        if not self._due:  # empty batches and too small ones are no step of the schedule
            self._step += 1
        power_of_two = self._step & (self._step - 1) == 0
        self._due = self._on and (power_of_two or bool(self._unseen) and self._probed < _MOST_FOR_UNSEEN)

    def look(self, layer: str, grad_output: Float[Tensor, "batch ..."]) -> None:
        """What reached a layer, example by example. Of an example that is not finite nothing can be said: 0 · inf is nan."""
        grad_output = grad_output.detach() if grad_output.dim() > 1 else grad_output.detach()[:, None]
        largest = torch.linalg.vector_norm(grad_output, ord=float("inf"), dim=tuple(range(1, grad_output.dim())))  # makes no copy
        reached, sent = largest > 0, self._sent.to(largest.device)
        self._reached.append((layer, (reached & ~sent).any(), (reached & sent).any()))

    def run(self, losses: Float[Tensor, " batch"]) -> None:
        """Raises:
            ValueError: one example's loss reaches another's rows.
        """
        if not (self._due and len(losses) > 1 and holds_data(losses)):
            return
        weights = torch.rand(len(losses), generator=self._generator) + 0.5
        order = torch.randperm(len(losses), generator=self._generator)
        half = torch.zeros(len(losses), dtype=torch.bool)
        half[order[:len(losses) // 2]] = True
        self._reached = []
        before = [(leaf, None if leaf.grad is None else leaf.grad.clone()) for leaf in _leaves(losses)]
        try:
            for self._sent in (half, ~half):
                torch.autograd.backward(losses, (weights * self._sent).to(losses), retain_graph=True)
        finally:
            self._sent = None
            for leaf, grad in before:  # an input that requires a gradient gets it once, from the pass that counts
                leaf.grad = grad
        self._unseen -= {name for name, _, own in self._reached if own}
        if met := [name for name, others, _ in self._reached if others]:
            raise ValueError(f"one example's loss reaches other examples' rows in the layer {met[0] or 'of the model'}: examples "
                             "meet there or in the loss (in-batch negatives, a mean over the batch, a first axis that is not the "
                             "batch), so no clipping bounds one example's share. Keep every example's loss to itself")
        self._probed, self._due = self._probed + 1, False


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
