"""DP-SGD (Abadi et al. 2016, arXiv 1607.00133) around an ordinary torch optimizer.

One step: ``(Σ_i clip(g_i) + σ C · N(0, I)) / B`` is handed to the optimizer as the gradient, B the plan's expected batch
size: a public number, never the size of the batch at hand. What the model may do to break this raises (see `grad_sample`).
"""

import math
import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memarc_utils.accounting import PrivacyPlan
from memarc_utils.clipping import check_clipping, clipping_factors
from memarc_utils.grad_sample import GradSampler


def make_private(model: nn.Module, optimizer: torch.optim.Optimizer, plan: PrivacyPlan, clipping: str = "flat",
                 mode: str = "book_keeping", noise_generator: torch.Generator | None = None) -> "PrivateOptimizer":
    """Prepares a model for private training.

    Args:
        model: on its device, with everything that shall train already added and ``requires_grad``.
        optimizer: a torch optimizer over exactly the trainable parameters (frozen ones may be there too).
        plan: owns σ, C, the divisor and the number of steps.
        clipping: ``flat`` or ``automatic`` (see `clipping`).
        mode: ``book_keeping`` or ``per_example`` (the plain reference).
        noise_generator: on the device of the parameters. None: a fresh one seeded by the operating system. Give one for
            reproducible checks only: who knows its seed can subtract the noise.

    Raises:
        ValueError: names what is wrong and the mend; the model is unchanged then.
    """
    return PrivateOptimizer(model, optimizer, plan, clipping, mode, noise_generator)


class PrivateOptimizer:
    """Returned by `make_private`: ``backward`` for each micro-batch, ``step`` once a logical batch.

    Attributes:
        steps_taken: steps so far; an empty batch counts.
        examples_dropped: examples whose loss or gradient was not finite; they contributed zero.
        gradient_norms: per-example norms of the last `backward`. Private data, for checks: never release them.
    """

    def __init__(self, model, optimizer, plan, clipping, mode, noise_generator) -> None:
        check_clipping(clipping, plan.max_grad_norm)
        _check_optimizer(model, optimizer)
        device = next((p.device for p in model.parameters() if p.requires_grad), None)
        self._generator_given = noise_generator is not None
        if noise_generator is None:
            noise_generator = torch.Generator(device=device or "cpu")
            noise_generator.seed()
        _check_generator(noise_generator)
        self.model, self.optimizer, self.plan = model, optimizer, plan
        self.clipping, self.noise_generator = clipping, noise_generator
        self.sampler = GradSampler(model, mode)
        self.steps_taken = self.examples_dropped = self._finite_examples = 0
        self._training_checked = False
        self.gradient_norms: Tensor | None = None

    def backward(self, losses: Float[Tensor, " batch"]) -> None:
        """One backward pass over a micro-batch's losses; adds to the clipped sum.

        Args:
            losses: one loss per example of the model call just made. An example may be in one call of a step only: two
                losses of it are added up before, not sent back one after the other. Leaves outside the model (an input
                that requires a gradient) get theirs unclipped, as from any backward pass: do not step on them.

        Raises:
            ValueError: not one loss per example, or a gradient went past the clipper.
        """
        norms, finite = self.sampler.backward(
            losses, lambda n: clipping_factors(n, self.plan.max_grad_norm, self.clipping))
        self.gradient_norms = norms
        kept = int(finite.sum()) if len(losses) else 0
        self._finite_examples += kept
        self.examples_dropped += len(losses) - kept

    def step(self) -> None:
        """Noise, divide, optimizer step, account. Without a `backward` before it (an empty batch) it is all noise.

        Raises:
            ValueError: the plan's steps are spent, a gradient went past the clipper, or a trainable parameter was in no
                backward pass.
        """
        if self.steps_taken >= self.plan.num_steps:
            raise ValueError(f"the plan pays for {self.plan.num_steps} steps and all are taken: make a plan with more steps "
                             "from the beginning, its noise will be larger")
        self._check_before_step()
        try:
            for parameter, name in self.sampler.names.items():
                total = self.sampler.sums.pop(name, None)
                if total is None:
                    total = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
                self._add_noise(total)
                parameter.grad = total.div_(self.plan.expected_batch_size).to(parameter.dtype)
            self.steps_taken += 1  # before the weights move: an interrupted step is paid for
            self.optimizer.step()
        finally:
            self.zero_grad()

    def _check_before_step(self) -> None:
        if self.sampler.foreign_backward:
            raise ValueError("a backward pass other than private.backward went through the model since the last step; it was "
                             "discarded. Call private.backward(losses) only, then private.zero_grad() and repeat the batch")
        self.sampler.check_parameters()
        _check_optimizer(self.model, self.optimizer)
        if self._finite_examples and not self._training_checked:
            if missing := [n for n in self.sampler.names.values() if n not in self.sampler.recorded]:
                raise ValueError(f"no backward pass reached {', '.join(missing[:5])}: it would be moved by noise alone. Freeze it "
                                 "(requires_grad_(False)) before make_private, or use it in the loss")
            self._training_checked = True

    def _add_noise(self, total: Tensor) -> None:
        deviation = self.plan.noise_multiplier * self.plan.max_grad_norm
        if deviation > 0:
            noise = torch.empty(total.shape, dtype=total.dtype, device=self.noise_generator.device)
            total += noise.normal_(0, deviation, generator=self.noise_generator).to(total.device)

    def zero_grad(self) -> None:
        """Forgets the clipped sum and any gradient: start the batch anew."""
        self.sampler.clear()
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
        return self.model

    def state_dict(self, sampler=None) -> dict:
        """Everything a resume needs; loads with ``torch.load(..., weights_only=True)``. Take it between two steps.

        Args:
            sampler: the batches being iterated, so that the resumed run draws on where this one stopped.
        """
        if self.sampler.sums:
            raise ValueError("a batch is half done: take the state after private.step()")
        if sampler is not None and sampler.steps_drawn != self.steps_taken:
            raise ValueError(f"{sampler.steps_drawn} batches were drawn but {self.steps_taken} steps taken: every batch, the "
                             "empty ones too, needs its private.step() before the state is taken")
        return {"plan": self.plan.to_dict(), "clipping": self.clipping, "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(), "noise_generator": self.noise_generator.get_state(),
                "steps_taken": self.steps_taken, "examples_dropped": self.examples_dropped,
                "sampler": None if sampler is None else sampler.state_dict()}

    def load_state_dict(self, state: dict, sampler=None) -> None:
        """Goes on where `state_dict` was taken: no noise is repeated or skipped, ε counts on.

        Without a sampler the batches to come are others than the first run's, so earlier noise must not meet them: the
        generator is then seeded anew by the operating system (unless you gave it, for checks).

        Raises:
            ValueError: the state belongs to another plan, clipping function, or was saved without a sampler.
        """
        mine = {**self.plan.to_dict(), "clipping": self.clipping}
        theirs = {**state["plan"], "clipping": state["clipping"]}
        if different := [k for k in mine if mine[k] != theirs.get(k)]:
            raise ValueError("the checkpoint belongs to another run: " + ", ".join(
                f"{k} is {theirs.get(k)!r} there and {mine[k]!r} here" for k in different) + ". Resume with its own plan")
        if (sampler is None) != (state["sampler"] is None):
            raise ValueError("pass the sampler to both state_dict and load_state_dict, or to neither")
        self.zero_grad()
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.note_buffers()
        if sampler is not None or self._generator_given:
            self.noise_generator.set_state(state["noise_generator"])
        else:
            self.noise_generator.seed()
        self.steps_taken, self.examples_dropped = state["steps_taken"], state["examples_dropped"]
        if sampler is not None:
            sampler.load_state_dict(state["sampler"])


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


def _check_generator(generator: torch.Generator) -> None:
    if generator is torch.default_generator or (torch.cuda.is_initialized() and generator in torch.cuda.default_generators):
        raise ValueError("the noise needs a generator of its own: torch's global one also draws dropout and can be re-seeded "
                         "by anybody. Pass None for one seeded by the operating system")
    if generator.initial_seed() == torch.Generator().initial_seed():
        warnings.warn("noise_generator was never seeded: torch gives every new generator the same public seed, so the noise can "
                      "be subtracted. Pass None for one seeded by the operating system", stacklevel=4)


@dataclass(frozen=True)
class SensitivityReport:
    """What `verify_sensitivity` measured.

    Attributes:
        max_contribution: max over i of ‖S(batch) − S(batch without i)‖; must be at most the clipping bound.
        max_relative_error: max over i of ‖ĝ_i − g_i‖ / max(‖g_i‖, 1e-6), the engine's gradient against a loop's.
        max_norm_error: the same for the norms the engine clips by.
        untrained_parameters: names that no backward pass recorded.
        max_grad_norm: the bound C that was asked for.
    """

    max_contribution: float
    max_relative_error: float
    max_norm_error: float
    untrained_parameters: list[str]
    max_grad_norm: float

    @property
    def holds(self) -> bool:
        return (self.max_contribution <= self.max_grad_norm * (1 + 1e-4) and self.max_relative_error <= 1e-4
                and not self.untrained_parameters)

    def __str__(self) -> str:
        verdict = "one example moves the sum by at most C" if self.holds else "NOT SAFE"
        untrained = f"; untrained: {', '.join(self.untrained_parameters)}" if self.untrained_parameters else ""
        return (f"{verdict}: largest contribution {self.max_contribution:.6g} (C = {self.max_grad_norm:g}), largest relative "
                f"error of a gradient {self.max_relative_error:.2g}, of a norm {self.max_norm_error:.2g}{untrained}")


def verify_sensitivity(model: nn.Module, loss_per_example, micro_batch: dict[str, Tensor], max_grad_norm: float = 1.0,
                       mode: str = "book_keeping", clipping: str = "flat") -> SensitivityReport:
    """Measures the two promises of the engine on a model, a loss and a batch of your own.

    Every example is left out once (is the clipped sum moved by at most C, neighbours included?), and every example's
    gradient as the engine sees it inside the batch is compared with that of a plain loop, one example at a time, without
    the engine. Dropout is off meanwhile (evaluation mode); the model comes back as it was. Costs about 3 B passes.

    Args:
        model: with its trainable parameters chosen; not private yet.
        loss_per_example: ``(model, micro_batch) -> losses (B,)``.
        micro_batch: tensors with the batch axis first.

    Raises:
        ValueError: as `make_private`.
    """
    check_clipping(clipping, max_grad_norm)
    batch = _batch_size(micro_batch)
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        loop = [_gradient_alone(model, loss_per_example, _rows(micro_batch, [i])) for i in range(batch)]
        sampler = GradSampler(model, mode, probe=False)  # what a probe would refuse is measured here
        try:
            def clipped(rows, clip):
                sampler.clear()
                norms, _ = sampler.backward(loss_per_example(model, _rows(micro_batch, rows)), clip)
                return dict(sampler.sums), norms

            everyone = list(range(batch))
            def bounded(norms):
                return clipping_factors(norms, max_grad_norm, clipping)
            whole, norms = clipped(everyone, bounded)
            contribution = relative = norm_error = 0.0
            for i in everyone:
                rest = clipped([j for j in everyone if j != i], bounded)[0] if batch > 1 else {}
                contribution = max(contribution, _distance(whole, rest))
                alone = clipped(everyone, lambda n: torch.nn.functional.one_hot(torch.tensor(i, device=n.device), batch).to(n.dtype))[0]
                size = max(_distance(loop[i], {}), 1e-6)
                relative = max(relative, _distance(alone, loop[i]) / size)
                norm_error = max(norm_error, abs(float(norms[i].nan_to_num(math.inf)) - _distance(loop[i], {})) / size)
            untrained = [n for n in sampler.names.values() if n not in sampler.recorded]
        finally:
            sampler.detach()
    finally:
        for module, training in modes.items():
            module.training = training
    return SensitivityReport(contribution, relative, norm_error, untrained, max_grad_norm)


def _batch_size(micro_batch: dict[str, Tensor]) -> int:
    return next(len(t) for t in micro_batch.values() if isinstance(t, Tensor))


def _rows(micro_batch: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    return {k: t[rows] if isinstance(t, Tensor) else t for k, t in micro_batch.items()}


def _gradient_alone(model, loss_per_example, one: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = loss_per_example(model, one)
    grads = torch.autograd.grad(loss.sum(), list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, grads) if g is not None}


def _distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Euclidean distance of two gradients over all parameters, in float64; a missing entry is zero."""
    total = 0.0
    for name in first.keys() | second.keys():
        a, b = first.get(name), second.get(name)
        difference = a.double() - b.double() if a is not None and b is not None else (a if a is not None else b).double()
        total += float(difference.detach().square().sum())
    return math.inf if math.isnan(total) else total ** 0.5
