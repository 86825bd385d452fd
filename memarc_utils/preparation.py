"""What was done to a pre-trained model before its training is noted on the model, so that it can be done again on loading."""

import dataclasses
import functools
import inspect
from collections.abc import Callable

from torch import nn


def recorded(prepare: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Decorator of functions that prepare a model in place: notes on the model what was done.

    ``model.memarc_preparation`` then holds ``steps``, the method and its arguments in the order of the calls, and
    ``created``, the names of the parameters that the pre-trained model does not have. Both are plain JSON values.

    Args:
        prepare: takes the model first and returns it; its other arguments are JSON values, tuples or dataclasses.

    >>> @recorded
    ... def add_bias(layer, value=0.5):
    ...     layer.bias = nn.Parameter(layer.weight.new_full((layer.out_features,), value))
    ...     return layer
    >>> add_bias(nn.Linear(2, 1, bias=False)).memarc_preparation
    {'steps': [{'method': 'add_bias', 'arguments': {'value': 0.5}}], 'created': ['bias']}
    """
    signature = inspect.signature(prepare)

    @functools.wraps(prepare)
    def prepare_and_record(*args, **kwargs) -> nn.Module:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        model, *values = bound.arguments.values()
        if not isinstance(model, nn.Module):
            raise ValueError(f"a model is needed, got {type(model).__name__}: write {prepare.__name__}(load_backbone(...))")
        earlier = getattr(model, "memarc_preparation", {"steps": [], "created": []})
        pretrained = {p for name, p in model.named_parameters() if name not in earlier["created"]}
        result = prepare(*args, **kwargs)
        step = {"method": prepare.__name__,
                "arguments": {name: _plain(value) for name, value in zip(list(bound.arguments)[1:], values)}}
        # Names anew each time: a side network moves the backbone, and with it what an earlier step created.
        created = [name for name, p in result.named_parameters() if p not in pretrained]
        result.memarc_preparation = {"steps": [*earlier["steps"], step], "created": created}
        return result

    return prepare_and_record


def _plain(value):
    if dataclasses.is_dataclass(value):
        return {name: _plain(inner) for name, inner in dataclasses.asdict(value).items()}
    return list(value) if isinstance(value, tuple) else value
