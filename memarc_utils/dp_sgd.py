"""DP-SGD (Abadi et al. 2016, arXiv 1607.00133) around an ordinary torch optimizer.

One step: ``(Σ_i clip(g_i) + σ C · N(0, I)) / B`` is handed to the optimizer as the gradient, B the plan's expected batch
size: a public number, never the size of the batch at hand. What the model may do to break this raises (see `grad_sample`).
Under ``torch.distributed`` every rank calls the same functions on its own examples (see `data_parallel`).
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memarc_utils.accounting import PrivacyPlan
from memarc_utils.batch_guard import BatchGuard
from memarc_utils.book_keeping import accumulation_dtype, holds_data
from memarc_utils.clipping import check_clipping, clipping_factors, contribution_bound
from memarc_utils.data_parallel import from_first, gather, rank_and_size, start_equal, sum_at_first
from memarc_utils.grad_sample import GradSampler
from memarc_utils.model_checks import check_not_begun, check_sampler, check_state
from memarc_utils.randomness import check_generator, cryptographic_normals, hide_dropout, spawn
from memarc_utils.sensitivity import SensitivityReport, verify_sensitivity

__all__ = ["PrivateOptimizer", "SensitivityReport", "make_private", "verify_sensitivity"]

NOISES = ("gaussian", "secure")
_SECURE_DRAWS = 4
NOISE_SLICE = 2**20  # numbers that are drawn at a time


def make_private(model: nn.Module, optimizer: torch.optim.Optimizer, plan: PrivacyPlan, clipping: str = "flat",
                 mode: str = "book_keeping", noise_generator: torch.Generator | None = None, *,
                 bookkeeping: str = "memory", noise: str = "gaussian") -> "PrivateOptimizer":
    """Prepares a model for private training.

    Args:
        model: on its device, with everything that shall train already added and ``requires_grad``.
        optimizer: a torch optimizer over exactly the trainable parameters (frozen ones may be there too).
        plan: owns σ, C, the divisor and the number of steps.
        clipping: ``flat``, ``automatic`` or ``per_layer`` (see `clipping`).
        mode: ``book_keeping`` or ``per_example`` (the plain reference).
        noise_generator: for reproducible checks only, on the device of the parameters: who knows its seed, or sees enough of its
            noise, can subtract the rest. None draws every number from a cryptographic generator (`randomness`). With noise it also
            seeds torch's global generators anew, since masks of dropout from a known seed would show who is in a batch.
        bookkeeping: what is held until the norms are known: ``memory`` the smaller form of each layer's record, ``mixopt``
            as BK-MixOpt has it (see `book_keeping.keep_pair`).
        noise: ``gaussian``, one draw of torch's normal; ``secure``, half the sum of four, which hides the pattern that one
            draw's floating-point rounding leaves (arXiv 2107.10138, section 4; attack in 2112.05307).

    Raises:
        ValueError: names what is wrong and the mend; the model is unchanged then.
    """
    return PrivateOptimizer(model, optimizer, plan, clipping, mode, noise_generator, bookkeeping, noise)


class PrivateOptimizer:
    """Returned by `make_private`: ``backward`` for each micro-batch, ``step`` once a logical batch.

    Attributes:
        steps_taken: steps so far; an empty batch counts.
        examples_dropped: examples whose loss or gradient was not finite; they contributed zero.
        gradient_norms: per-example norms of the last `backward`. Private data, for checks: never release them.
        contribution_bound: the most that one example moves the clipped sum; the noise's deviation is σ times it.
    """

    def __init__(self, model, optimizer, plan, clipping, mode, noise_generator, bookkeeping, noise) -> None:
        if not isinstance(model, nn.Module) or not isinstance(plan, PrivacyPlan):
            raise ValueError(f"make_private takes a model, an optimizer and a PrivacyPlan, got {type(model).__name__}, "
                             f"{type(optimizer).__name__} and {type(plan).__name__}")
        check_clipping(clipping, plan.max_grad_norm)
        if noise not in NOISES:
            raise ValueError(f"noise must be one of {', '.join(NOISES)}, got {noise!r}")
        _check_optimizer(model, optimizer)
        check_generator("noise_generator", noise_generator)
        self._device = next((p.device for p in model.parameters() if p.requires_grad), torch.device("cpu"))
        self.model, self.optimizer, self.noise_generator = model, optimizer, noise_generator
        self._plan, self._clipping, self._noise = plan, clipping, noise
        start_equal(model, (plan.to_dict(), clipping, noise))
        self.sampler = GradSampler(model, mode, bookkeeping, per_layer=clipping == "per_layer")
        self.contribution_bound = contribution_bound(plan.max_grad_norm, clipping, self.sampler.num_groups)
        self.steps_taken = self.examples_dropped = self._finite_examples = self._num_losses = 0
        self.batch_guard, self._training_checked = BatchGuard(plan), False
        self.gradient_norms: Tensor | None = None
        self.detached = False
        if noise_generator is None and plan.noise_multiplier > 0:
            hide_dropout(self._device)

    @property
    def plan(self) -> PrivacyPlan:
        """Cannot be exchanged: noise and ε are those of this one."""
        return self._plan

    @property
    def clipping(self) -> str:
        """Cannot be exchanged: the noise is for this one."""
        return self._clipping

    @property
    def noise(self) -> str:
        return self._noise

    def backward(self, losses: Float[Tensor, " batch"]) -> None:
        """One backward pass over a micro-batch's losses; adds to the clipped sum.

        Args:
            losses: one loss per example of the model call just made. An example may be in one call of a step only: two
                losses of it are added up before, not sent back one after the other. Leaves outside the model (an input
                that requires a gradient) get theirs unclipped, as from any backward pass: do not step on them.

        Raises:
            ValueError: not one loss per example, or a gradient went past the clipper.
        """
        self._check_attached()
        if isinstance(losses, Tensor):  # what is none is refused below
            self.batch_guard.check(self._num_losses + losses.numel(), self.steps_taken)
        norms, finite = self.sampler.backward(
            losses, lambda n: clipping_factors(n, self.plan.max_grad_norm, self.clipping, self.sampler.num_groups))
        self.gradient_norms = norms
        self._num_losses += losses.numel()
        kept = int(finite.sum()) if holds_data(finite) else len(losses)
        self._finite_examples += kept
        self.examples_dropped += len(losses) - kept

    def step(self) -> None:
        """Noise, divide, optimizer step, account. Without a `backward` before it (an empty batch) it is all noise. A batch that
        is given up half way needs `zero_grad`, or its examples are released with the next one's.

        Raises:
            ValueError: the plan's steps are spent, a gradient went past the clipper, or a trainable parameter was in no
                backward pass.
        """
        self._check_before_step()
        try:
            totals = []
            for parameter, name in self.sampler.names.items():
                total = self.sampler.sums.pop(name, None)
                if total is None:
                    total = torch.zeros(parameter.shape, dtype=accumulation_dtype(parameter.dtype), device=parameter.device)
                totals.append(sum_at_first(total))
            if rank_and_size()[0] == 0:
                self._add_noise(totals)
            for parameter, total in zip(self.sampler.names, totals):
                parameter.grad = from_first(total).div_(self.plan.expected_batch_size).to(parameter.dtype)
            del totals, total
            self.steps_taken += 1  # before the weights move: an interrupted step is paid for
            self.batch_guard.note_step()
            self.optimizer.step()
        finally:
            self.zero_grad()

    def _check_before_step(self) -> None:
        """Every rank raises where one has a reason to: none waits for a sum that never comes."""
        try:
            self._check_this_rank()
            problem = None
        except ValueError as error:
            problem = str(error)
        unchecked = self.sampler.recorded if not self._training_checked else set()
        states = gather((problem, self.steps_taken, self._finite_examples, unchecked))
        if problems := [each for each, *_ in states if each]:
            raise ValueError(problem or f"another rank cannot step: {problems[0]}")
        if len(set(steps := [taken for _, taken, *_ in states])) > 1:
            raise ValueError(f"the ranks have taken {steps} steps: call private.step() on every rank once a batch, also where the local "
                             "batch is empty, and resume all ranks from one step")
        if not self._training_checked and any(finite for _, _, finite, _ in states):
            recorded = set().union(*(each for *_, each in states))
            if missing := [n for n in self.sampler.names.values() if n not in recorded]:
                raise ValueError(f"no backward pass reached {', '.join(missing[:5])}: it would be moved by noise alone. Freeze it "
                                 "(requires_grad_(False)) before make_private, or use it in the loss")
            self._training_checked = True

    def _check_this_rank(self) -> None:
        self._check_attached()
        if self.steps_taken >= self.plan.num_steps:
            raise ValueError(f"the plan pays for {self.plan.num_steps} steps and all are taken: make a plan with more steps "
                             "from the beginning, its noise will be larger")
        if self.sampler.foreign_backward:
            raise ValueError("a backward pass other than private.backward went through the model since the last step; it was "
                             "discarded. Call private.backward(losses) only, then private.zero_grad() and repeat the batch")
        self.sampler.check_whole()
        self.sampler.check_parameters()
        self.batch_guard.check(self._num_losses, self.steps_taken)
        _check_optimizer(self.model, self.optimizer)

    def _add_noise(self, totals: list[Tensor]) -> None:
        """Adds N(0, (σ · bound)²) to every entry, in place. Large tensors are cut into pieces, which threads share on a CPU; from a given
        generator each gets a stream of its own, always the same one. A draw takes a few buffers of at most 4 MiB."""
        deviation = self.plan.noise_multiplier * self.contribution_bound
        if deviation == 0:
            return
        draws, given = _SECURE_DRAWS if self.noise == "secure" else 1, self.noise_generator

        def add(part: Tensor, generator: torch.Generator | None) -> None:
            for _ in range(draws):  # the sum of n draws of deviation s/√n has deviation s
                if generator is None:
                    part += cryptographic_normals(len(part), part.dtype).mul_(deviation / draws ** 0.5).to(part.device)
                else:
                    buffer = torch.empty(part.shape, dtype=part.dtype, device=generator.device)
                    part += buffer.normal_(0, deviation / draws ** 0.5, generator=generator).to(part.device)

        parts = [part for total in totals for part in total.view(-1).split(NOISE_SLICE)]
        alone = NOISE_SLICE // 4 if given is None or given.device.type == "cpu" else NOISE_SLICE
        for part in parts:
            if len(part) <= alone:
                add(part, given)
        if large := [part for part in parts if len(part) > alone]:
            with ThreadPoolExecutor(max(1, torch.get_num_threads())) as threads:
                list(threads.map(add, large, [None] * len(large) if given is None else spawn(given, len(large))))

    def zero_grad(self) -> None:
        """Forgets the clipped sum and any gradient: start the batch anew."""
        self.sampler.clear()
        self._num_losses = 0
        self.batch_guard.forget()
        for parameter in self.sampler.names:
            parameter.grad = None
        self.optimizer.zero_grad(set_to_none=True)

    def epsilon(self, accountant: str = "pld") -> float:
        """ε spent by the steps taken so far at the plan's δ; 0.0 before the first."""
        return self.plan.epsilon(accountant=accountant, num_steps=self.steps_taken)

    def clipped_sum(self) -> dict[str, Tensor]:
        """The sum before noise since the last step. For checks, never for release."""
        return {name: total.clone() for name, total in self.sampler.sums.items()}

    def detach(self) -> nn.Module:
        """Gives the plain model back."""
        self.zero_grad()
        self.sampler.detach()
        self.detached = True
        return self.model

    def _check_attached(self) -> None:
        if self.detached:
            raise ValueError("private.detach() gave the plain model back: call make_private again for more steps, with a plan for the rest: "
                             "what is spent then is the composition of both, which neither epsilon() knows")

    def state_dict(self, sampler=None) -> dict:
        """Everything a resume needs; loads with ``torch.load(..., weights_only=True)``. Take it between two steps.

        It is as private as the data: it tells who will be in which batch. With a ``noise_generator`` of your own it holds the noise to
        come as well: resume it once, since two runs from one state draw the same noise, and the difference of what they release has none.

        Args:
            sampler: the batches being iterated, so that the resumed run draws on where this one stopped.
        """
        if self.sampler.sums:
            raise ValueError("a batch is half done: take the state after private.step()")
        check_sampler(sampler, self.plan)
        if sampler is not None and sampler.steps_drawn != self.steps_taken:
            raise ValueError(f"{sampler.steps_drawn} batches were drawn but {self.steps_taken} steps taken: every batch, the "
                             "empty ones too, needs its private.step() before the state is taken (one that was given up: noise alone)")
        return {"plan": self.plan.to_dict(), "clipping": self.clipping, "noise": self.noise, "ranks": rank_and_size()[1],
                "model": _cloned(self.model.state_dict()), "optimizer": _cloned(self.optimizer.state_dict()),
                "noise_generator": None if self.noise_generator is None else self.noise_generator.get_state(),
                "dropout": _global_states(self._device),
                "steps_taken": self.steps_taken, "examples_dropped": self.examples_dropped,
                "sampler": None if sampler is None else sampler.state_dict()}

    def load_state_dict(self, state: dict, sampler=None) -> None:
        """Goes on where `state_dict` was taken: no noise is repeated, ε counts on. Noise from the cryptographic generator has no state and
        is fresh in any case; that of a given ``noise_generator`` goes on with its stream.

        Raises:
            ValueError: the state belongs to another plan, clipping function, or was saved without a sampler; or this optimizer has taken
                steps, which going back would leave out of ε while their noise would be drawn again.
        """
        check_state(state, {"plan", "model", "optimizer", "noise_generator", "steps_taken", "examples_dropped", "sampler"})
        check_not_begun(self.steps_taken)
        check_sampler(sampler, self.plan)
        kept = ("clipping", "noise", "ranks")
        mine = {**self.plan.to_dict(), "clipping": self.clipping, "noise": self.noise, "ranks": rank_and_size()[1]}
        theirs = {**state["plan"], **{name: state.get(name) for name in kept}}
        if different := [k for k in mine if mine[k] != theirs.get(k)]:
            raise ValueError("the checkpoint belongs to another run: " + ", ".join(
                f"{k} is {theirs.get(k)!r} there and {mine[k]!r} here" for k in different) + ". Resume with its own plan")
        if (sampler is None) != (state["sampler"] is None):
            raise ValueError("pass the sampler to both state_dict and load_state_dict, or to neither")
        if (self.noise_generator is None) != (state["noise_generator"] is None):
            raise ValueError("give a noise_generator to both runs (a check), or to neither")
        self.zero_grad()
        # Before the weights: whatever fails below, what they have cost is counted.
        self.steps_taken, self.examples_dropped = state["steps_taken"], state["examples_dropped"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.note_buffers()
        if self.noise_generator is not None:
            self.noise_generator.set_state(state["noise_generator"])
        if state.get("dropout"):
            _set_global_states(state["dropout"], self._device)  # masks go on, too, as in a run that was not cut
        if sampler is not None:
            sampler.load_state_dict(state["sampler"])


def _global_states(device: torch.device) -> list[Tensor]:
    """States of the generators that dropout draws from: torch's own, and that of the parameters' CUDA device."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_global_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def _cloned(state):
    """A state that later steps do not write into."""
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: _cloned(value) for key, value in state.items()}
    return [_cloned(value) for value in state] if isinstance(state, list) else state


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS looks at the loss several times a step, each of which would have to be paid for: take AdamW or SGD")
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    names = {p: name for name, p in model.named_parameters()}
    if missing := [n for p, n in names.items() if p.requires_grad and p not in trained]:
        raise ValueError(f"the optimizer does not hold {', '.join(missing[:5])}: build it over the trainable parameters of the "
                         "model as it is now, or freeze those")
    if any(p.requires_grad and p not in names for p in trained):
        raise ValueError("the optimizer holds trainable parameters that are not in the model: build it over model.parameters(), "
                         "and make whatever else shall train (a temperature of the loss) part of the model")
    if held := [names.get(p, "a parameter outside the model") for p in {*trained, *names} if p.grad is not None]:
        raise ValueError(f"{held[0]} still holds a gradient from before, which the optimizer would apply unclipped: call "
                         "optimizer.zero_grad() or set parameter.grad = None")
