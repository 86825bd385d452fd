"""Canaries: examples put into a training run so that their trace can be measured afterwards.

*Gradient canaries* are made for an audit that sees every noisy update (white-box): each has a gradient of one coordinate.
*Input canaries* are texts of random tokens, for whoever sees the trained model alone; `exposure` says how well a language
model remembers one (Carlini et al. 2019, arXiv 1802.08232, section 4.2).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.data import ConcatDataset
from transformers.pytorch_utils import Conv1D

CANARIES_AT_ONCE = 512


class GradientCanaries:
    """Examples whose gradient is one coordinate of a layer: they go through the layer's own forward, so through the engine.

    A linear layer called with x = s e_b and the loss e_a · layer(x) has the gradient s at weight (a, b) and 1 at bias a. Where
    only the bias trains, x = 0 and the loss s e_a · layer(x).

    Args:
        model: not yet private or already; its trainable linear layers are used, the smallest that has room for all.
        num_canaries: at most so many; fewer if the model has fewer such coordinates.
        scale: s, the gradient's norm before clipping.
    """

    def __init__(self, model: nn.Module, num_canaries: int, scale: float) -> None:
        layers = [(name, layer, layer.weight if layer.weight.requires_grad else layer.bias) for name, layer in model.named_modules()
                  if type(layer) in (nn.Linear, Conv1D) and any(p.requires_grad for p in layer.parameters(recurse=False))]
        seen: set[Tensor] = set()
        layers = [each for each in layers if not (each[2] in seen or seen.add(each[2]))]  # a shared weight once
        layers.sort(key=lambda each: each[2].numel())
        roomy = [each for each in layers if each[2].numel() >= num_canaries]
        self._parts, self.scale, count = [], scale, 0
        for name, layer, parameter in roomy[:1] or layers[::-1]:
            room = min(num_canaries - count, parameter.numel())
            if room:
                places = torch.arange(room) * parameter.numel() // room  # spread over the layer, each another
                self._parts.append((name, layer, parameter, places, range(count, count + room)))
                count += room
        if not count:
            raise ValueError("gradient canaries need a trainable nn.Linear or Conv1D layer (weight or bias); the model has none")
        self.layers = [name for name, *_ in self._parts]
        self._count = count

    def __len__(self) -> int:
        return self._count

    def backward(self, private, indices: list[int]) -> None:
        """Sends these canaries through ``private.backward``, as one or more micro-batches."""
        for _, layer, parameter, places, owned in self._parts:
            mine = [i - owned.start for i in indices if i in owned]
            for start in range(0, len(mine), CANARIES_AT_ONCE):
                private.backward(self._losses(layer, parameter, places[mine[start:start + CANARIES_AT_ONCE]]))

    def _losses(self, layer: nn.Module, parameter: nn.Parameter, places: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        weight, rows = layer.weight, torch.arange(len(places), device=parameter.device)
        places = places.to(parameter.device)
        is_linear = isinstance(layer, nn.Linear)  # (out, in); Conv1D has (in, out)
        inputs = torch.zeros(len(places), weight.shape[1 if is_linear else 0], dtype=weight.dtype, device=weight.device)
        if parameter is layer.bias:
            return layer(inputs)[rows, places] * self.scale
        first, second = places // weight.shape[1], places % weight.shape[1]
        outputs, entries = (first, second) if is_linear else (second, first)
        inputs[rows, entries] = self.scale
        return layer(inputs)[rows, outputs]

    def read(self) -> Float[Tensor, " canaries"]:
        """The parameters' ``.grad`` at each canary's coordinate, on the CPU in float64."""
        return torch.cat([p.grad.flatten()[places.to(p.device)].double().cpu() for _, _, p, places, _ in self._parts])


@dataclass(frozen=True)
class InsertedCanaries:
    """A data set with canaries in it.

    Attributes:
        dataset: the rows given, then the canaries whose coin said "in". Its length depends on the coins, so a plan takes the
            public number ``public_size``.
        canaries: all of them, in or out, as rows.
        included: the coins.
        public_size: rows given, and half of the canaries.
    """

    dataset: ConcatDataset
    canaries: list[dict]
    included: Bool[Tensor, " canaries"]
    public_size: int


def insert_canaries(dataset, num_canaries: int, generator: torch.Generator, *, num_tokens: int, vocab_size: int, first_token: int = 0,
                    num_labels: int | None = None, repeats: int = 1) -> InsertedCanaries:
    """Puts canaries of random tokens into a tokenised data set, each in or out by a fair coin of its own.

    Args:
        dataset: anything with ``len`` and ``[i]`` that gives a dict with ``input_ids``, ``attention_mask`` and ``labels``.
        generator: of tokens, labels and coins, shared with nothing else.
        num_tokens: tokens of a canary, drawn evenly from ``first_token`` (above the special ones) to ``vocab_size - 1``.
        num_labels: for classification: a random class each. None for a causal language model, whose labels are the tokens.
        repeats: how often a canary that is in is inserted. More than 1 breaks the guarantee for one example (ε grows with the
            group's size): to measure memorisation, never to audit.

    Raises:
        ValueError: a number that makes no canary, or a row that is no tokenised example.

    >>> rows = [{"input_ids": [5, 6], "attention_mask": [1, 1], "labels": 1}] * 10
    >>> put = insert_canaries(rows, 4, torch.Generator().manual_seed(0), num_tokens=3, vocab_size=100, num_labels=2)
    >>> len(put.dataset) == 10 + int(put.included.sum()), put.public_size, len(put.canaries[0]["input_ids"])
    (True, 12, 3)
    """
    if min(num_canaries, num_tokens, repeats) < 1 or not 0 <= first_token < vocab_size:
        raise ValueError(f"num_canaries={num_canaries}, num_tokens={num_tokens} and repeats={repeats} must be at least 1, and "
                         f"first_token={first_token} below vocab_size={vocab_size}")
    if num_labels is not None and num_labels < 2:
        raise ValueError(f"num_labels={num_labels}: a class needs another one beside it; leave num_labels out for a language model")
    known = {"input_ids", "attention_mask", "token_type_ids", "labels"}
    columns = set(dataset[0]) if len(dataset) else {"input_ids", "attention_mask", "labels"}
    if "input_ids" not in columns or columns - known:
        raise ValueError(f"rows have the columns {sorted(columns)}; canaries can be made of {sorted(known)}. Tokenise the data set first")
    tokens = torch.randint(first_token, vocab_size, (num_canaries, num_tokens), generator=generator).tolist()
    labels = tokens if num_labels is None else torch.randint(num_labels, (num_canaries,), generator=generator).tolist()
    rows = [{"input_ids": ids, "attention_mask": [1] * num_tokens, "token_type_ids": [0] * num_tokens, "labels": label}
            for ids, label in zip(tokens, labels)]
    rows = [{name: row[name] for name in row if name in columns | {"attention_mask", "labels"}} for row in rows]
    included = torch.rand(num_canaries, generator=generator) < 0.5
    chosen = [row for row, is_in in zip(rows, included.tolist()) if is_in for _ in range(repeats)]
    whole = ConcatDataset([part for part in (dataset, chosen) if len(part)]) if len(dataset) or chosen else ConcatDataset([[]])
    return InsertedCanaries(whole, rows, included, len(dataset) + num_canaries * repeats // 2)


def exposure(losses: Float[Tensor, " canaries"], reference_losses: Float[Tensor, " references"]) -> Float[Tensor, " canaries"]:
    """log2 of the size of the space minus log2 of a canary's rank in it (arXiv 1802.08232, definition 5), over a sample of the space.

    Args:
        losses: of the canaries, in nats or any rising function of them.
        reference_losses: of other members of the same space, drawn like the canaries and never trained on. With all of them it
            is the exposure itself; with a sample of n it is an estimate of at most log2(n + 1) bits.

    Returns:
        Bits: 1/ln 2 = 1.44 on average for a model that knows nothing of it (its rank is uniform), log2(n + 1) for the likeliest.
        Ties are ranked behind.

    >>> exposure(torch.tensor([0.1, 5.0]), torch.tensor([1.0, 2.0, 3.0]))
    tensor([2., 0.], dtype=torch.float64)
    """
    if not len(reference_losses):
        raise ValueError("exposure needs reference losses: score canaries that were drawn alike and left out of the training")
    if bool(torch.isnan(losses).any()) or bool(torch.isnan(reference_losses).any()):
        raise ValueError("some losses are nan: a rank cannot be found for them")
    ranks = 1 + torch.searchsorted(reference_losses.double().sort().values, losses.double(), right=True)
    return torch.log2(torch.tensor(len(reference_losses) + 1.0, dtype=torch.float64)) - torch.log2(ranks.double())
