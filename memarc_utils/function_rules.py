"""Rules for layers of one's own: a function gives the per-example gradients, or a loop over the examples does."""

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from memarc_utils.book_keeping import holds_data


class FunctionRule:
    """A function gives the per-example gradients, autograd the input gradient, by computing the layer again.

    So the layer must compute the same again: its output is kept and compared, and one that is random, counts its calls or
    depends on an attribute that has changed raises.
    """

    def __init__(self, function: Callable, forward: Callable) -> None:
        self.function, self.forward = function, forward

    @staticmethod
    def inputs(module, *args, **kwargs):
        signature = inspect.signature(type(module).forward)
        given = signature.bind(module, *args, **kwargs)
        given.apply_defaults()
        if given.kwargs:
            raise ValueError(f"a per-example rule takes tensors by position, the forward of {type(module).__name__} has keyword-only "
                             f"arguments: {', '.join(given.kwargs)}")
        tensors, defaults = list(given.args[1:]), [p.default for p in signature.parameters.values()][1:]
        while tensors and not isinstance(tensors[-1], Tensor) and tensors[-1] is defaults[len(tensors) - 1]:
            tensors.pop()  # an optional argument that was left out
        if not all(isinstance(t, Tensor) for t in tensors):
            raise ValueError(f"a per-example rule takes tensors only, {type(module).__name__} was called with "
                             f"{[type(t).__name__ for t in tensors]}: give a non-tensor argument to the constructor")
        return tuple(tensors)

    @staticmethod
    def needs_inputs(module):
        return True

    @staticmethod
    def grad_inputs(module, inputs, grad_output, needed):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(n) for t, n in zip(inputs, needed)]
            output = type(module).forward(module, *leaves)
            wanted = [t for t in leaves if t.requires_grad]
            if not output.requires_grad:
                return (None,) * len(needed)
            grads = iter(torch.autograd.grad(output, wanted, grad_output, allow_unused=True))
        return tuple(next(grads) if n else None for n in needed)

    def check_same(self, module, inputs, output: Tensor) -> None:
        """Raises:
            ValueError: computed again, the layer gives another output.
        """
        again = type(module).forward(module, *inputs)
        if holds_data(output) and not _close(again, output):
            raise ValueError(f"{type(module).__name__} gave another output when it was computed again: it is random, counts its calls, or "
                             "was changed since, so no rule can know its gradient. Freeze its parameters or replace the layer")

    def record(self, module, inputs, grad_output):
        trainable = {name for name, p in module.named_parameters(recurse=False) if p.requires_grad}
        gradients = self.function(module, *inputs, grad_output)
        if missing := trainable - set(gradients):
            raise ValueError(f"the rule registered for {type(module).__name__} gave no gradient of {sorted(missing)}")
        for name in sorted(trainable):
            yield name, "dense", gradients[name]


def _close(first: Tensor, second: Tensor) -> bool:
    """Equal up to rounding, relative to the largest value (an absolute tolerance would let small activations differ) of usual size: a
    masked score's −3·10³⁸ says nothing of what others round to."""
    if first.shape != second.shape:
        return False
    if torch.equal(first, second):
        return True
    finite, sizes = torch.isfinite(first) & torch.isfinite(second), second.abs()
    some = sizes.flatten()[::max(1, sizes.numel() // 4096)]  # enough for the usual size
    some = some[torch.isfinite(some) & (some > 0)]
    usual = some.median() if some.numel() else sizes.new_tensor(math.inf)
    largest = torch.where(finite & (sizes <= 1e4 * usual), sizes, 0).max()
    tolerance = 1e-2 if first.dtype in (torch.bfloat16, torch.float16) else 1e-4
    same = torch.isclose(first, second, rtol=tolerance, atol=0, equal_nan=True)
    return bool((same | ((first - second).abs() <= tolerance * 0.1 * largest)).all())


class OwnTensorsOnly(TorchFunctionMode):
    """While a layer without an exact rule computes: refuses every parameter and every tensor with a gradient that is neither its own
    nor its input, since their gradients would be lost.

    Args:
        own: the layer's parameters and inputs.
        trained: all parameters that train.
        name: of the layer, for the message.
    """

    def __init__(self, own: list[Tensor], trained, name: str) -> None:
        super().__init__()
        self._own, self._trained, self._name = {id(t) for t in own}, trained, name
        self._views: list[Tensor] = []  # kept alive, so that no other tensor gets the number of one

    def __torch_function__(self, function, types, args=(), kwargs=None):
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs or {})):
            if isinstance(tensor, Tensor) and id(tensor) not in self._own and (tensor in self._trained or tensor.requires_grad):
                raise ValueError(f"{self._name} uses a tensor that trains and is neither its own nor an input: its gradient would be "
                                 "lost. Pass it to forward as an argument, or move the layer that owns it inside")
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.requires_grad and tensor not in self._trained:  # a view of its own parameter
                self._views.append(tensor)
                self._own.add(id(tensor))
        return result


def per_example_loop(module: nn.Module, *inputs_and_grad: Tensor) -> dict[str, Tensor]:
    """Per-example gradients of any module whose examples do not meet, through `torch.func` (vmap over examples of a vjp).

    Right only where ``module(x)[i]`` depends on ``x[i]`` alone; that is compared with the batch's own output, so a module
    that mixes examples (batch normalisation) raises. Give it to `register_rule`.

    Raises:
        ValueError: the module mixes its examples, or is random.
    """
    *inputs, grad_output = inputs_and_grad
    parameters = {name: p.detach() for name, p in module.named_parameters(recurse=False)}
    kind = type(module).__name__

    def one_example(parameters, grad, *example):
        def run(parameters):
            return torch.func.functional_call(module, parameters, tuple(t[None] for t in example))[0]
        output, pull_back = torch.func.vjp(run, parameters)
        return pull_back(grad)[0], output

    original = module.__dict__.pop("forward", None)  # the plain forward: nothing is recorded while recomputing
    try:
        gradients, alone = torch.vmap(one_example, in_dims=(None, 0, *[0] * len(inputs)))(parameters, grad_output, *inputs)
        with torch.no_grad():
            together = module(*inputs)
    except RuntimeError as error:
        raise ValueError(f"{kind} cannot be computed one example at a time ({str(error).splitlines()[0]}): it is random, writes to its "
                         "own state or branches on its input. Freeze its parameters, or register a rule of your own") from error
    finally:
        if original is not None:
            module.forward = original
    if holds_data(together) and not _close(alone, together):
        raise ValueError(f"{kind} gives an example another output alone than in a batch: its examples "
                         "meet, so no per-example gradient exists. Freeze its parameters or replace the layer")
    return gradients


def loop_rule(module: nn.Module) -> FunctionRule | None:
    """The fallback for a layer without a rule: `per_example_loop` of its own forward, where that is right.

    It is where the layer's own parameters are all that trains below it: what it calls then has nothing to record.
    """
    own = {p for p in module.parameters(recurse=False) if p.requires_grad}
    if any(p.requires_grad and p not in own for p in module.parameters()) or type(module).forward is nn.Module.forward:
        return None
    return FunctionRule(per_example_loop, type(module).forward)
