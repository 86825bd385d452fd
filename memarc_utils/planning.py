"""What a training step would hold in memory, for any model, without running or allocating it.

The step runs on fake tensors: torch computes every shape and type and no number, so the engine, the side network and the reversible
network do in it what they do in a real step. A dispatch mode counts the bytes of each storage from the operation that makes it to
the moment it is released. Two runs are made: the first finds the peak, the second stops there and looks what it consists of.
"""

import contextlib
import copy
import functools
import gc
import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from memarc_utils.accounting import PrivacyPlan
from memarc_utils.book_keeping import HeldGradient
from memarc_utils.clipping import check_clipping
from memarc_utils.dp_sgd import NOISE_SLICE, PrivateOptimizer, make_private
from memarc_utils.feature_cache import side_of
from memarc_utils.methods import METHODS, SHAPES
from memarc_utils.training import causal_lm_losses, classification_losses
from memarc_utils.zeroth_order import DIRECTION_PIECE

PLANNED_ENGINES = ("book-keeping", "per-example", "two-pass ghost", "non-private", "zeroth order")
_OPTIMIZERS, _GIB = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}, 2**30
_SCRATCH = 3_000_000  # bytes, measured: what forward passes of RoBERTa-base's shape take more than planned, whatever their size
_DRAW = 12  # bytes a value of noise while it is drawn, by one thread (`randomness.cryptographic_normals`)


@dataclass(frozen=True)
class MemoryPlan:
    """What stands in memory at the moment of a step when it holds the most, in bytes.

    Attributes:
        parameters: the model's, trainable or not, and its buffers.
        optimizer_state: what the optimizer keeps between steps.
        gradients: the clipped sums, or the gradients made of them.
        engine: what the clipping engine holds of examples until their norms are known.
        activations: what the forward pass has left for the backward pass, and the batch's own tensors.
        working: everything else: what the operation at the peak reads and writes.
        trainable: number of parameters that train.
    """

    parameters: int
    optimizer_state: int
    gradients: int
    engine: int
    activations: int
    working: int
    trainable: int

    @property
    def peak_bytes(self) -> int:
        """Above the loaded model, by the allocator."""
        return self.total_bytes - self.parameters

    @property
    def resident_bytes(self) -> int:
        """Above the loaded model, as the operating system counts a process on a CPU: the kernels have scratch space of their own."""
        return self.peak_bytes + _SCRATCH

    @property
    def total_bytes(self) -> int:
        return sum((self.parameters, self.optimizer_state, self.gradients, self.engine, self.activations, self.working))

    @property
    def total_gib(self) -> float:
        return self.total_bytes / _GIB


def plan_memory(model: PreTrainedConfig | nn.Module | str, method: str, batch_size: int, num_tokens: int,
                dtype: torch.dtype | str = torch.float32, clipping: str = "flat", *, engine: str = "book-keeping", task: str | None = None,
                checkpointing: bool = False, optimizer: str = "adamw", fused_attention: bool = False,
                parts: bool = True) -> MemoryPlan:
    """Predicts what one step holds at its peak. Nothing of the model's size is allocated.

    Counted is what torch's allocator would give out on a CPU, and the draw of noise, 12 bytes a value of the largest parameter but at
    most 12 MiB. On a GPU the fused attention kernels serve dropout too, on a CPU they do not and attention weights (B, heads, T, T)
    stand: ``fused_attention`` plans for the first. AdamW on a GPU works on all parameters at once by default and needs about two more
    copies of what trains. In the steps 1, 2, 4, 8, ... the engine also looks for examples that meet: such a pass holds no clipping
    records, but a reversible network keeps its stored streams in it, 16 B·T·d bytes.

    Args:
        model: a `transformers` configuration, a model (whose configuration is taken), or a key of `methods.SHAPES`.
        method: a key of `methods.METHODS`.
        batch_size: B, of the micro-batch.
        num_tokens: T of each example, no padding.
        dtype: of the frozen weights and, by autocast, of the computation (a name will do: ``"bfloat16"``). What trains is held in float32.
        clipping: of our engine: ``flat``, ``automatic``, ``per_layer``; the other engines have none to choose.
        engine: ``book-keeping`` (ours); ``per-example`` (all per-example gradients at once, as opacus's hooks, which measure up to a third
            more); ``two-pass ghost`` (a pass that keeps the graph for the norms, whose own scratch is not counted, and a second one for
            the sum); ``non-private``; ``zeroth order`` (in float32 alone).
        task: ``classification`` (two classes) or ``causal-lm``; by default what the model's type is for.
        checkpointing: activation checkpointing of each block.
        optimizer: ``sgd`` or ``adamw``; zeroth-order training keeps no state, whichever it is.
        fused_attention: see above.
        parts: False for the total alone, in half the time: gradients, engine and activations then count as working.

    Raises:
        ValueError: an argument that does not fit, or a method that the model cannot take: the message says why.

    >>> plan = plan_memory("tiny", "lora", batch_size=4, num_tokens=16)
    >>> plan.peak_bytes > plan.activations > 0
    True
    """
    return _plan(_config(model), method, batch_size, num_tokens, dtype, clipping, engine, task, checkpointing, optimizer, fused_attention,
                 parts)


def _plan(config, method, batch_size, num_tokens, dtype=torch.float32, clipping="flat", engine="book-keeping", task=None,
          checkpointing=False, optimizer="adamw", fused_attention=False, parts=True) -> MemoryPlan:
    task = task or _usual_task(config)
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    _check(config, method, batch_size, num_tokens, dtype, clipping, engine, task, checkpointing, optimizer)
    config = _without_attention_dropout(config) if fused_attention else config
    mode = FakeTensorMode()
    fake = _fake_model(config, method, task, dtype, checkpointing, mode)
    step = _Step(fake, method, engine, clipping, optimizer, task, dtype, batch_size, num_tokens, mode)
    standing = _storages((*fake.parameters(), *fake.buffers()))
    found = dict.fromkeys(("gradients", "engine", "activations"), 0)
    with mode:
        step.make_optimizer_state()
        state = _storages(tree_leaves([dict(s) for s in step.optimizer.state.values()]))
        first = _Tracker(known={*standing, *state})
        step.run(first)
        if parts:
            forward = step.after_forward
            second = _Tracker(known={*standing, *state}, stop_at=first.peak_at, look=lambda live: step.parts(live, forward))
            step.run(second)
            found = second.found
    peak, sizes = first.peak, [p.numel() for p in step.trainable]
    noise = _DRAW * min(max(sizes), NOISE_SLICE) if step.private else 0
    if noise and 4 * sum(sizes) + noise > peak:  # a step of few activations holds most when noise is added to its sums
        peak, found = 4 * sum(sizes) + noise, {"gradients": 4 * sum(sizes) * parts, "engine": 0, "activations": 0}
    if engine == "zeroth order":  # or when a piece of a direction is drawn
        peak = max(peak, 4 * min(max(sizes), DIRECTION_PIECE))
    return MemoryPlan(sum(standing.values()), sum(state.values()), **found, working=peak - sum(found.values()), trainable=sum(sizes))


def largest_batch(model: PreTrainedConfig | nn.Module | str, method: str, num_tokens: int, budget_gib: int | float,
                  **settings) -> int:
    """The largest micro-batch whose step stays within ``budget_gib`` · 2³⁰ bytes, model included; 0 where one example does not.

    Memory grows almost linearly with B: a line through the two plans nearest to the budget gives the next guess, plans around it decide.

    Args:
        settings: further ones of `plan_memory`.
    """
    known_settings = set(inspect.signature(plan_memory).parameters) - {"batch_size", "parts"}
    if unknown := sorted(set(settings) - known_settings):
        raise ValueError(f"largest_batch has no setting {unknown[0]!r}: give some of {', '.join(sorted(known_settings))}")
    if isinstance(budget_gib, bool) or not isinstance(budget_gib, (int, float)) or not 0 < budget_gib < math.inf:
        raise ValueError(f"budget_gib must be a number above 0, got {budget_gib!r}")
    budget, known, config = budget_gib * _GIB, {}, _config(model)

    def total(batch_size: int) -> int:
        if batch_size not in known:
            known[batch_size] = _plan(config, method, batch_size, num_tokens, parts=False, **settings).total_bytes
        return known[batch_size]

    fits, fails, guess = 1, None, 8
    if total(fits) > budget:
        return 0
    while fails is None or fails - fits > 1:
        if total(guess) <= budget:
            fits = max(fits, guess)
        else:
            fails = guess if fails is None else min(fails, guess)
        (b0, m0), (b1, m1) = sorted(known.items(), key=lambda item: abs(item[1] - budget))[:2]
        slope = (m1 - m0) / (b1 - b0) or 1
        # Memory bends, where logits are cut into pieces for instance: at least an eighth of what is open lies on either side of a guess.
        guess, least = int(b0 + (budget - m0) // slope), max(1, ((fails or 0) - fits) // 8)
        guess = min(max(guess, 2 * fits), 8 * fits) if fails is None else min(max(guess, fits + least), fails - least)
    return fits


# ---------------------------------------------------------------------------------------------------- the counting
class _PeakReached(Exception):
    pass


class _Tracker(TorchDispatchMode):
    """Bytes of every storage that operations make, while it lives. A storage is known by when it came: its address is used again."""

    def __init__(self, known: set[int], stop_at: int | None = None, look: Callable | None = None) -> None:
        super().__init__()
        self.live: dict[int, tuple[weakref.ref, int, int]] = {}  # by address: itself, its bytes, its number
        self.now = self.peak = self.operations = self.storages = 0
        self.peak_at, self._known, self._stop_at, self._look = 0, known, stop_at, look
        self.found: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations += 1
        self.see(tree_leaves(result))
        if self.operations == self._stop_at:
            self.found = self._look(self.live)
            raise _PeakReached
        return result

    def see(self, values: Iterable) -> None:
        for storage in (value.untyped_storage() for value in values if isinstance(value, Tensor)):
            key, size = storage._cdata, storage.nbytes()
            if key not in self.live and key not in self._known:
                self.live[key] = (weakref.ref(storage, functools.partial(self._gone, key, size)), size, self.storages)
                self.storages += 1
                self.now += size
                if self.now > self.peak:
                    self.peak, self.peak_at = self.now, self.operations

    def _gone(self, key: int, size: int, _) -> None:
        del self.live[key]
        self.now -= size


@contextlib.contextmanager
def _all_finite() -> Iterator[None]:
    """As though the engine had seen that no example is to be left out: fake numbers do not say so, and it would copy what it sums."""
    add = HeldGradient.add_weighted_sum
    with mock.patch.object(HeldGradient, "add_weighted_sum", lambda held, total, factors, keep=None, dtype=None:
                           add(held, total, factors, None, dtype)):
        yield


def _storages(tensors: Iterable) -> dict[int, int]:
    storages = [t.untyped_storage() for t in tensors if isinstance(t, Tensor)]
    return {storage._cdata: storage.nbytes() for storage in storages}


# ---------------------------------------------------------------------------------------------------- the step
class _Step:
    """A prepared step on fake tensors, and what at any moment of it belongs to whom."""

    def __init__(self, model, method, engine, clipping, optimizer, task, dtype, batch_size, num_tokens, mode) -> None:
        self.model, self.engine, self.dtype, self.task = model, engine, dtype, task
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        with mode:
            self.optimizer = _OPTIMIZERS[optimizer](self.trainable, lr=1e-4)
            self.batch = _batch(model, method, task, batch_size, num_tokens)
        self.private: PrivateOptimizer | None = None
        if engine in ("book-keeping", "per-example"):  # without noise, whose draw torch's allocator does not see
            size = max(50_000, batch_size)
            plan = PrivacyPlan(dataset_size=size, expected_batch_size=batch_size, num_steps=1_000, noise_multiplier=0.0,
                               max_grad_norm=1.0, delta=0.5 / size)
            self.private = make_private(model, self.optimizer, plan, clipping=clipping,
                                        mode="per_example" if engine == "per-example" else "book_keeping",
                                        noise_generator=torch.Generator().manual_seed(0))
        self.after_forward: set[int] = set()

    def make_optimizer_state(self) -> None:
        if self.engine == "zeroth order":
            return
        for parameter in self.trainable:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def run(self, tracker: _Tracker) -> None:
        self.after_forward = set()
        tracker.see(self.batch.values())
        with contextlib.suppress(_PeakReached), _all_finite(), tracker:
            if self.engine == "zeroth order":
                self.model.eval()
                with torch.no_grad():
                    self._losses(tracker)
                return
            losses = self._losses(tracker)
            if self.private is not None:
                self.private.backward(losses)
                del losses
                self.private.step()
                return self._clear()
            if self.engine == "two-pass ghost":
                losses.mean().backward(retain_graph=True)
                self.optimizer.zero_grad(set_to_none=True)
            losses.mean().backward()
            del losses
            self.optimizer.step()
        self._clear()

    def _clear(self) -> None:
        if self.private is not None:
            self.private.zero_grad()
        self.optimizer.zero_grad(set_to_none=True)

    def _losses(self, tracker: _Tracker) -> Tensor:
        with torch.autocast("cpu", self.dtype) if self.dtype != torch.float32 else contextlib.nullcontext():
            losses = (causal_lm_losses if self.task == "causal-lm" else classification_losses)(self.model, self.batch)
        self.after_forward = {number for *_, number in tracker.live.values()}
        return losses

    def parts(self, live: dict[int, tuple[weakref.ref, int, int]], forward: set[int]) -> dict[str, int]:
        """Bytes at this moment that are gradients, the engine's and, of the rest, what stood at the end of the forward pass (by number)."""
        sums = [] if self.private is None else self.private.sampler.sums.values()
        # Through the collector, since while it clips the engine has what it holds in local variables.
        held = [each for each in gc.get_objects() if type(each) is HeldGradient]
        gradients = {*_storages(sums), *_storages(p.grad for p in self.trainable if p.grad is not None)}
        engine = set(_storages(t for each in held for t in each.tensors()))
        found = dict.fromkeys(("gradients", "engine", "activations"), 0)
        for key, (_, size, number) in live.items():
            part = "gradients" if key in gradients else "engine" if key in engine else "activations" if number in forward else None
            if part:
                found[part] += size
        return found


def _batch(model: nn.Module, method: str, task: str, batch_size: int, num_tokens: int) -> dict[str, Tensor]:
    labels = (batch_size, num_tokens) if task == "causal-lm" else (batch_size,)
    batch = {"labels": torch.zeros(labels, dtype=torch.long)}
    if method.startswith("side-cached"):
        side = side_of(model)
        return {"inputs_embeds": torch.zeros(batch_size, num_tokens, side.cached_width, dtype=torch.bfloat16), **batch}
    return {"input_ids": torch.zeros(batch_size, num_tokens, dtype=torch.long), **batch}


def _fake_model(config, method: str, task: str, dtype: torch.dtype, checkpointing: bool, mode: FakeTensorMode) -> nn.Module:
    """Prepared on the meta device, where nothing is allocated, then given fake tensors that stand for tensors on the CPU."""
    make = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    with torch.device("meta"):
        model = make.from_config(config).to(dtype)
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model = METHODS[method](model).train()
    fakes: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            trains = tensor.requires_grad
            with mode:
                new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.float32 if trains else tensor.dtype)
            fakes[id(tensor)] = nn.Parameter(new, trains) if isinstance(tensor, nn.Parameter) else new
        return fakes[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)
    return model


# ---------------------------------------------------------------------------------------------------- what is refused
def _config(model: PreTrainedConfig | nn.Module | str) -> PreTrainedConfig:
    config = SHAPES[model]() if isinstance(model, str) and model in SHAPES else getattr(model, "config", model)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"model must be one of {', '.join(SHAPES)}, a transformers configuration or a model, got "
                         f"{repr(model) if isinstance(model, str) else type(model).__name__}")
    config = copy.deepcopy(config)
    if getattr(config, "pad_token_id", None) is None:  # a decoder's classifier asks for one where it meets a batch
        config.pad_token_id = 0
    return config


def _usual_task(config: PreTrainedConfig) -> str:
    """Models that `transformers` has as causal and not as masked language models are decoders."""
    decoder = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "causal-lm" if decoder else "classification"


def _without_attention_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    for name in ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


def _check(config, method, batch_size, num_tokens, dtype, clipping, engine, task, checkpointing, optimizer) -> None:
    for name, value, known in (("method", method, METHODS), ("engine", engine, PLANNED_ENGINES), ("optimizer", optimizer, _OPTIMIZERS),
                               ("task", task, ("classification", "causal-lm")),
                               ("dtype", dtype, (torch.float32, torch.bfloat16, torch.float16))):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")
    for name, value in (("batch_size", batch_size), ("num_tokens", num_tokens)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    check_clipping(clipping, 1.0)
    if clipping != "flat" and engine not in ("book-keeping", "per-example"):
        raise ValueError(f"clipping={clipping!r} is our engine's: plan it with engine='book-keeping' or 'per-example', not {engine!r}")
    first = config.pad_token_id + 1 if config.model_type == "roberta" else 0  # position, of RoBERTa's
    if num_tokens > (positions := (getattr(config, "max_position_embeddings", None) or math.inf) - first):
        raise ValueError(f"num_tokens={num_tokens} is more than the {positions} positions of this {config.model_type} model")
    if method.startswith("side-cached") and (checkpointing or engine == "zeroth order"):
        raise ValueError(f"{method} runs no backbone: plan it without checkpointing and not with zeroth order")
    if engine == "zeroth order" and dtype != torch.float32:
        raise ValueError("zeroth order divides a difference of losses by 2λ, which 16 bits cannot hold: plan it with dtype=torch.float32")
    if method.startswith("rev") and (checkpointing or engine == "two-pass ghost"):
        raise ValueError(f"{method} recomputes its activations itself and frees them on the way: plan it without checkpointing, and not "
                         "with two-pass ghost, whose first pass would have to keep the graph")
