"""Several processes, one private run: every rank clips its own examples, the sums meet, noise is added once.

Rank r of R holds the examples i with i mod R = r, and draws each of them with the plan's rate q by a generator of its own:
the union of the ranks' draws is a Poisson batch of the whole data set, without a message. The clipped sums are reduced to
rank 0, which alone adds noise, and the noisy sum is broadcast: the same traffic as one all-reduce. Works with any backend
of ``torch.distributed`` (gloo, NCCL); with one process every function here does nothing.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank_and_size() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) where ``torch.distributed`` is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_at_first(tensor: Tensor) -> Tensor:
    """Adds the ranks' tensors up at rank 0, in place; elsewhere the value is not defined afterwards."""
    if rank_and_size()[1] > 1:
        dist.reduce(tensor, dst=0)
    return tensor


def from_first(tensor: Tensor) -> Tensor:
    """Overwrites the tensor with rank 0's, in place."""
    if rank_and_size()[1] > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def gather(value: object) -> list:
    """Every rank's value, in the order of the ranks."""
    size = rank_and_size()[1]
    if size == 1:
        return [value]
    values = [None] * size
    dist.all_gather_object(values, value)
    return values


def start_equal(model: nn.Module, promise: tuple) -> None:
    """Gives every rank rank 0's parameters and buffers, and refuses what would reduce gradients a second time.

    Args:
        model: the same on every rank, up to its numbers.
        promise: the plan and whatever else the noise depends on; a rank that clips to another norm would not be covered.

    Raises:
        ValueError: the model is wrapped by DistributedDataParallel, or a rank trains other parameters or has another plan.
    """
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise ValueError("take the plain model, not DistributedDataParallel: its hooks average gradients that were never clipped. "
                         "make_private adds up the clipped sums of all ranks itself")
    if rank_and_size()[1] == 1:
        return
    trained = gather([(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad])
    if any(names != trained[0] for names in trained):
        raise ValueError("the ranks train different parameters: prepare the model in the same way on every rank")
    promises = gather(promise)
    if any(each != promises[0] for each in promises):
        raise ValueError(f"the ranks have different plans: {promises}. Give every rank the same plan, clipping and noise")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            from_first(tensor.data)
