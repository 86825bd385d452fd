"""Per-example losses, and the loops that train with and without privacy and evaluate, with a progress bar."""

import os
import random
import sys
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from memarc_utils.accounting import PrivacyPlan
from memarc_utils.batch_selection import pad_rows, poisson_batches
from memarc_utils.dp_sgd import PrivateOptimizer, make_private
from memarc_utils.probe import LossProbe
from memarc_utils.zeroth_order import ZerothOrderOptimizer, make_zeroth_order

_LOGITS_AT_ONCE = 2**24  # numbers
_OF_LOGITS = ("logit_scale", "logits_scaling", "final_logit_softcapping")  # what some configurations do to logits after the head


def setup(seed: int) -> torch.device:
    """Seeds torch, numpy and random, sets the figures' theme, prints one line of versions and device.

    Returns:
        CUDA where there is one, else the CPU.
    """
    import opacus
    import transformers

    from memarc_utils.plotting import set_theme

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    set_theme()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"Python {sys.version.split()[0]} · torch {torch.__version__.split('+')[0]} · transformers "
          f"{transformers.__version__} · opacus {opacus.__version__} · seed {seed} · {device}")
    return device


def progress(steps: Iterable, description: str, total: int | None = None) -> Iterable:
    """A progress bar with the time left; silent where nobody looks (papermill, CI)."""
    return tqdm(steps, desc=description, total=total, disable=bool(os.environ.get("MEMARC_HEADLESS")), leave=False)


def classification_losses(model: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, " batch"]:
    """Cross-entropy of each example."""
    inputs = _without_labels(batch)
    return F.cross_entropy(_wide(model(**inputs).logits), batch["labels"], reduction="none")


def _without_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    if "labels" not in batch:
        raise ValueError(f"the batch has {', '.join(batch)} and no labels: name the column of the targets labels")
    return {name: t for name, t in batch.items() if name != "labels"}


def _wide(logits: Tensor) -> Tensor:
    """float32, or float64 as it is."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def causal_lm_losses(model: nn.Module, batch: dict[str, Tensor], tokens_at_once: int | None = None) -> Float[Tensor, " batch"]:
    """Mean over each example's *own* target tokens of the next-token cross-entropy (labels of -100 are no targets).

    A mean over the batch's tokens would let one example's length scale another's gradient. The head is applied to
    ``tokens_at_once`` positions at a time and recomputed in the backward pass, so that logits (B, T, vocabulary) never
    stand whole; None: as many as make 64 MiB of float32 logits.
    """
    if tokens_at_once is not None and (isinstance(tokens_at_once, bool) or not isinstance(tokens_at_once, int) or tokens_at_once < 1):
        raise ValueError(f"tokens_at_once must be a whole number >= 1, or None, got {tokens_at_once!r}")
    if scaled := [name for name in _OF_LOGITS if getattr(model.config, name, None) not in (None, 1, 1.0)]:
        raise ValueError(f"this {model.config.model_type} changes its logits after the head ({scaled[0]}), which a loss by pieces does not "
                         "know: compute the losses from model(**batch).logits")
    inputs = _without_labels(batch)
    labels, mask = batch["labels"][:, 1:], batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == batch["labels"].shape:  # padded on the left, a first token has none to be predicted from
        labels = labels.masked_fill(mask[:, :-1] == 0, -100)
    base = getattr(model, model.base_model_prefix)
    base = getattr(base, "decoder", base)  # OPT's language model calls the decoder inside its base module
    hidden = base(**inputs).last_hidden_state[:, :-1]
    if (head := model.get_output_embeddings()) is None:
        raise ValueError(f"{type(model).__name__} has no language-model head: for classes take classification_losses")
    tokens_at_once = tokens_at_once or max(1, _LOGITS_AT_ONCE // (max(1, len(labels)) * model.config.vocab_size))

    def summed(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = _wide(head(hidden))
        return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none").sum(1)

    pieces = zip(hidden.split(tokens_at_once, 1), labels.split(tokens_at_once, 1))
    total = sum(checkpoint(summed, h, y, use_reentrant=False) for h, y in pieces)
    return total / (labels != -100).sum(1).clamp_min(1)


def parameter_groups(model: nn.Module, learning_rate: float, start_at_zero_rate: float | None = None,
                     head_rate: float | None = None) -> list[dict]:
    """Optimizer groups: the head, what starts at zero (an upsample, LoRA's B), and the rest, each at its own rate.

    Until the first two have moved nothing below them has a gradient, only noise; higher rates for them and a lower one
    for the rest are what makes private training of a side network work.
    """
    heads = ("classifier.", "pre_classifier.", "score.", "lm_head.")
    groups = {"head": [], "zero": [], "rest": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            gate = name.endswith(".alpha")  # starts at zero too, which is a half of the sigmoid and blocks nothing
            kind = "head" if name.startswith(heads) else "rest" if gate or bool(p.detach().any()) or p.numel() == 1 else "zero"
            groups[kind].append(p)
    zero_rate = learning_rate if start_at_zero_rate is None else start_at_zero_rate
    rates = {"head": zero_rate if head_rate is None else head_rate, "zero": zero_rate, "rest": learning_rate}
    return [{"params": group, "lr": rates[kind]} for kind, group in groups.items() if group]


def _pad_token(model: nn.Module) -> int:
    return getattr(getattr(model, "config", None), "pad_token_id", None) or 0


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: t.to(device) for name, t in batch.items()}


def _look_at_losses(probe: LossProbe, model: nn.Module, loss_per_example: Callable, micro_batch: dict[str, Tensor]) -> None:
    """Half of the rows alone against all of them, in evaluation mode: sees what meets in a loss behind a ``detach``, or below the lowest
    layer that trains, where no gradient shows it."""
    def compute(some: dict[str, Tensor]) -> Tensor:
        return loss_per_example(model, some).double().cpu()

    model.eval()
    try:
        with torch.no_grad():
            probe.run(micro_batch, compute(micro_batch), compute, next(model.parameters()).device)
    finally:
        model.train()


def train_privately(model: nn.Module, dataset, plan: PrivacyPlan, optimizer: torch.optim.Optimizer,
                    loss_per_example: Callable = classification_losses, *, clipping: str = "automatic",
                    physical_batch_size: int = 32, sampling_generator: torch.Generator | None = None,
                    noise_generator: torch.Generator | None = None, description: str = "private training") -> PrivateOptimizer:
    """All the plan's steps, on Poisson batches. The learning rate falls linearly to zero.

    Generators are for checks and lessons; a run that is released leaves them out.

    Returns:
        The `PrivateOptimizer`, detached from the model, which is trained in place.

    Raises:
        ValueError: what `make_private` and the engine refuse; or, now and then, half of a micro-batch's rows have other losses alone than
            among all (`LossProbe`).
    """
    device = next(model.parameters()).device
    private = make_private(model, optimizer, plan, clipping=clipping, noise_generator=noise_generator)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / plan.num_steps)
    batches = poisson_batches(dataset, plan, physical_batch_size, pad_token_id=_pad_token(model),
                              generator=sampling_generator)
    model.train()
    probe = LossProbe()
    try:
        for batch in progress(batches, description, plan.num_steps):
            for micro_batch in batch:
                micro_batch = to_device(micro_batch, device)
                if probe.schedule.due:
                    _look_at_losses(probe, model, loss_per_example, micro_batch)
                private.backward(loss_per_example(model, micro_batch))
            private.step()
            schedule.step()
            probe.schedule.next_step()
    finally:
        private.detach()
        model.eval()
    return private


def train_by_forward_passes(model: nn.Module, dataset, plan: PrivacyPlan, learning_rate: float,
                            loss_per_example: Callable = classification_losses, *, num_directions: int = 1,
                            physical_batch_size: int = 32, sampling_generator: torch.Generator | None = None,
                            noise_generator: torch.Generator | None = None, direction_seed_generator: torch.Generator | None = None,
                            collate: Callable | None = None, description: str = "zeroth-order training") -> ZerothOrderOptimizer:
    """All the plan's steps of zeroth order (`make_zeroth_order`), on Poisson batches. The learning rate falls linearly to zero.

    Generators are for checks and lessons, on the CPU; a run that is released leaves them out. ``collate`` as in `poisson_batches`.

    Returns:
        The `ZerothOrderOptimizer`; the model is trained in place.

    Raises:
        ValueError: what `make_zeroth_order` and its steps refuse.
    """
    optimizer = make_zeroth_order(model, plan, learning_rate, num_directions=num_directions, noise_generator=noise_generator,
                                  direction_seed_generator=direction_seed_generator)
    batches = poisson_batches(dataset, plan, physical_batch_size, collate=collate, pad_token_id=_pad_token(model),
                              generator=sampling_generator)
    for step, batch in enumerate(progress(batches, description, plan.num_steps)):
        optimizer.learning_rate = learning_rate * (1 - step / plan.num_steps)
        optimizer.step(batch, loss_per_example)
    model.eval()
    return optimizer


def train_without_privacy(model: nn.Module, dataset, optimizer: torch.optim.Optimizer,
                          loss_per_example: Callable = classification_losses, *, batch_size: int = 32, num_epochs: int = 2,
                          generator: torch.Generator | None = None, description: str = "training") -> nn.Module:
    """Plain training for comparison: shuffled batches, mean loss, learning rate falling linearly to zero."""
    device = next(model.parameters()).device
    size = len(dataset)
    order = torch.cat([torch.randperm(size, generator=generator) for _ in range(num_epochs)]).tolist()
    starts = range(0, len(order), batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(starts))
    model.train()
    for start in progress(starts, description):
        rows = [dataset[i] for i in order[start:start + batch_size]]
        loss_per_example(model, to_device(pad_rows(rows, _pad_token(model)), device)).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, dataset, batch_size: int = 64) -> float:
    """Share of examples whose label is predicted, in evaluation mode."""
    if not len(dataset) or not {"input_ids", "labels"} <= dataset[0].keys():
        raise ValueError(f"accuracy needs rows with input_ids and labels, got {', '.join(dataset[0]) if len(dataset) else 'none'}")
    device, training = next(model.parameters()).device, model.training
    model.eval()
    order = sorted(range(len(dataset)), key=lambda i: len(dataset[i]["input_ids"]))
    right = 0
    for start in range(0, len(order), batch_size):
        batch = to_device(pad_rows([dataset[i] for i in order[start:start + batch_size]], _pad_token(model)), device)
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    model.train(training)
    return right / len(dataset)
