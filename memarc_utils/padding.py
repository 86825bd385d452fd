"""Rows of several lengths as one tensor, so that no neighbour in a micro-batch changes what an example's loss is.

Padding is to the right, with a mask. What it is filled with matters: a label of 0 is a target, a token that is not the model's
own pad token moves the last real token of a decoder's classification head. Either would let one example's length move the
gradients of others, past any clipping.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from memarc_utils.block_halves import LLAMA_TYPES
from memarc_utils.book_keeping import holds_data

# What the padding of a column is filled with, beside input_ids. A column that is not named here must have rows of one length.
_PADDING = {"labels": -100, "special_tokens_mask": 1,
            **dict.fromkeys(("attention_mask", "token_type_ids", "position_ids", "inputs_embeds"), 0)}

# Model types that read a padded position where no mask is given: they do not make one of the pad token, nor look back only.
_ENCODERS = ("albert", "bart", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "longt5", "mbart", "modernbert", "mpnet",
             "mt5", "roberta", "roformer", "t5", "umt5", "xlm-roberta")

# Columns that lie under `attention_mask`, one entry a token; others may have its width by chance.
_OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "special_tokens_mask", "inputs_embeds", "labels")


def _is_sequence(value: Any) -> bool:
    """A list, or an array or tensor with an axis."""
    return isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) > 0


def num_tokens(row: Mapping[str, Any]) -> int | None:
    """T of a row: the length of its ``input_ids``, else of its ``inputs_embeds``; None where it has neither."""
    for name in ("input_ids", "inputs_embeds"):
        if _is_sequence(row.get(name)):
            return len(row[name])
    return None


def pad_rows(rows: Sequence[Mapping[str, Any]], pad_token_id: int = 0,
             padding: Mapping[str, int | float] | None = None) -> dict[str, Tensor]:
    """Stacks rows to tensors; lists, arrays and tensors are padded on the right to the longest row of this micro-batch.

    ``input_ids`` are padded with ``pad_token_id``, ``labels`` with -100, masks, types and positions with 0; columns that hold text are
    left out. Rows without an ``attention_mask`` are given one: without it a neighbour's length would be seen.

    Args:
        rows: all with the same columns.
        pad_token_id: ``model.config.pad_token_id``.
        padding: what other columns are filled with, for instance ``{"target_ids": -100}``: a number that the loss leaves out.

    Raises:
        ValueError: rows with different columns, a column that some rows lack, or one of several lengths without a known padding.

    >>> pad_rows([{"input_ids": [5, 6], "labels": 1}, {"input_ids": [8], "labels": 0}])
    {'input_ids': tensor([[5, 6],
            [8, 0]]), 'labels': tensor([1, 0]), 'attention_mask': tensor([[1, 1],
            [1, 0]])}
    """
    fills = {**_PADDING, "input_ids": pad_token_id, **(padding or {})}
    if odd := [sorted(row.keys() ^ rows[0].keys()) for row in rows if row.keys() != rows[0].keys()]:
        raise ValueError(f"some rows have the column {odd[0][0]} and some do not: give it to all or to none, or what an example is read "
                         "with depends on its neighbours")
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    if "attention_mask" not in columns and num_tokens(rows[0]) is not None:
        columns["attention_mask"] = [[1] * num_tokens(row) for row in rows]
    batch = {}
    for name, values in columns.items():
        missing = sum(value is None for value in values)
        if 0 < missing < len(values):
            raise ValueError(f"the column {name} is None in {missing} of {len(values)} rows: fill it in everywhere or leave it out, or "
                             "what an example is read with depends on its neighbours")
        if not missing and not _is_text(values[0]):
            batch[name] = _stacked(name, values, fills)
    return batch


def _is_text(value: Any) -> bool:
    return isinstance(value, (str, bytes, dict)) or isinstance(value, (list, tuple)) and len(value) > 0 and _is_text(value[0])


def _stacked(name: str, values: list, fills: Mapping[str, int | float]) -> Tensor:
    if not _is_sequence(values[0]):
        return torch.stack(values) if isinstance(values[0], Tensor) else torch.tensor(values)
    longest = max(map(len, values))
    if all(len(value) == longest for value in values):
        return torch.tensor(values) if isinstance(values[0], (list, tuple)) else torch.stack([torch.as_tensor(v) for v in values])
    if name not in fills:
        raise ValueError(f"the column {name} has rows of several lengths, and what its padding shall be is not known: pass "
                         f"collate=lambda rows: pad_rows(rows, padding={{{name!r}: -100}}), with a number that the loss leaves out")
    if all(isinstance(value, (list, tuple)) for value in values):
        return torch.tensor([list(value) + [fills[name]] * (longest - len(value)) for value in values])
    tensors = [torch.as_tensor(value) for value in values]
    return torch.stack([torch.cat([t, t.new_full((longest - len(t), *t.shape[1:]), fills[name])]) for t in tensors])


def without_spare_padding(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same rows without the columns, on either side, that the ``attention_mask`` of every one of them leaves out."""
    if (spans := _spans_of(batch)) is None or not int((spans[1] - spans[0]).max()):
        return batch
    width, first, last = batch["attention_mask"].shape[1], int(spans[0].min()), int(spans[1].max())

    def of_tokens(name: str, t: Any) -> bool:  # labels of several classes are numbers with a point, and no tokens
        return (name in _OF_TOKENS and isinstance(t, Tensor) and t.dim() > 1 and t.shape[1] == width
                and not (name == "labels" and t.is_floating_point()))

    return type(batch)({name: t[:, first:last] if of_tokens(name, t) else t for name, t in batch.items()})


def lengths_of(batch: Any) -> Int[Tensor, " batch"] | None:
    """How many columns each row needs, from the first to the last that its ``attention_mask`` lets be read; None without one of tokens."""
    spans = _spans_of(batch)
    return None if spans is None else (spans[1] - spans[0]).clamp_min(0)


def _spans_of(batch: Any) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]] | None:
    """First column of each row that is read, and the one after the last; (T, 0) where none is."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not len(mask) or not mask.shape[1] or not holds_data(mask):
        return None
    width, columns = mask.shape[1], torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (width - ((mask != 0) * columns.flip(0)).amax(1)).cpu(), ((mask != 0) * columns).amax(1).cpu()


@contextlib.contextmanager
def padding_checked(model: nn.Module) -> Iterator[None]:
    """`check_padding` in every forward pass within, whoever calls it.

    Raises:
        ValueError: see `check_padding`.
    """
    def check(module, args, kwargs):
        check_padding(module, args, kwargs)

    # each model of transformers within: the one whose head reads a token, and its base, which a loss may call by itself
    hooks = [module.register_forward_pre_hook(check, with_kwargs=True) for module in model.modules() if hasattr(module, "config")
             and (hasattr(module, "base_model_prefix") or isinstance(getattr(module, "score", None), nn.Module))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@functools.lru_cache(64)
def _signature(kind: type) -> inspect.Signature:
    return inspect.signature(kind.forward)


def _arguments(module: nn.Module, args: Sequence, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """By name, also those that come by position. A wrapper that only hands on what it gets names none: then the first are token ids."""
    try:
        bound = _signature(type(module)).bind_partial(module, *args, **kwargs).arguments
    except TypeError:  # a call that will fail by itself, with a better message
        return dict(kwargs)
    named = {name: value for name, value in bound.items() if not (isinstance(value, (tuple, dict)) and name in ("args", "kwargs"))}
    return {**({"input_ids": args[0]} if args and "input_ids" not in named else {}), **named, **kwargs}


def check_padding(module: nn.Module, args: Sequence, kwargs: Mapping[str, Any], needs_mask: bool = True) -> None:
    """Padding on the left moves tokens to other positions as far as the longest neighbour is longer: of learned positions those of a row
    would be others, and an encoder's first token another one.

    Padded without a mask, an encoder reads the padding, which is as long as the longest neighbour has it.

    For a classifier of decoder type (GPT-2, OPT, Llama: a head called ``score``), which reads the last token that is not
    ``config.pad_token_id``: padded with another one it would read a position that depends on the longest neighbour.

    Args:
        args, kwargs: of the module's call.
        needs_mask: False where the effect of padding without a mask is measured instead.

    Raises:
        ValueError: a masked position holds another token, or tokens are not given and some positions are masked; or rows are padded on
            the left, unless the positions are relative (Llama types), made from the mask (OPT) or given (GPT-2); or rows of an encoder
            end (or begin) in runs of pad tokens of several lengths, and no mask is given.
    """
    family, given = getattr(getattr(module, "config", None), "model_type", ""), _arguments(module, args, kwargs)
    attention_mask, position_ids = given.get("attention_mask"), given.get("position_ids")
    input_ids = ids if isinstance(ids := given.get("input_ids"), Tensor) and not ids.is_floating_point() else None
    if (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 and attention_mask.shape[1] and holds_data(attention_mask)
            and family not in ("opt", *LLAMA_TYPES) and not (family == "gpt2" and position_ids is not None)
            and bool(((attention_mask[:, 0] == 0) & (attention_mask != 0).any(1)).any())):
        raise ValueError("rows are padded on the left: an example's positions, or its first token, would depend on its longest neighbour. "
                         "Pad on the right (memarc_utils.batch_selection.pad_rows), or give GPT-2 position_ids that begin at 0 with the "
                         "first token: (attention_mask.cumsum(1) - 1).clamp_min(0)")
    pad = getattr(getattr(module, "config", None), "pad_token_id", None)
    encoder = family in _ENCODERS and not getattr(module.config, "is_decoder", False) and "Decoder" not in type(module).__name__
    if needs_mask and encoder and attention_mask is None and pad is not None and input_ids is not None and input_ids.dim() == 2 \
            and holds_data(input_ids) and any(_look_padded(ids, pad) for ids in (input_ids, input_ids.flip(1))):
        raise ValueError(f"rows begin or end in runs of the pad token {pad} of several lengths, and no attention_mask is given: a row's padding, "
                         "which is read then, depends on its longest neighbour. Pass the mask (memarc_utils.batch_selection.pad_rows makes "
                         f"it); where all rows have one length and {pad} is a token like others, one of ones")
    if pad is None or not isinstance(getattr(module, "score", None), nn.Module):
        return
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or not holds_data(attention_mask):
        return
    masked = attention_mask == 0
    wrong = masked if input_ids is None else masked & (input_ids != pad) if input_ids.shape == masked.shape else None
    if wrong is not None and bool(wrong.any()):
        raise ValueError(f"{type(module).__name__} reads the last token that is not the pad token {pad}, and a masked position holds "
                         f"{'no token (inputs_embeds alone)' if input_ids is None else int(input_ids[wrong][0])}: what an example is "
                         f"classified by would depend on its longest neighbour. Pad with pad_token_id={pad} (model.config.pad_token_id)")


def _look_padded(ids: Int[Tensor, "batch tokens"], pad: int) -> bool:
    """Rows end in runs of pad tokens of several lengths, one of two or more: a single one may be a token like others."""
    runs = (ids == pad).flip(1).long().cumprod(1).sum(1).tolist()
    return max(runs, default=0) > 1 and len(set(runs)) > 1
