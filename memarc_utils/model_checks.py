"""What the clipping engine refuses to train, said before anything is changed, with the parameter's name and the mend."""

import functools
import random
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from memarc_utils.accounting import PrivacyPlan
from memarc_utils.book_keeping import holds_data
from memarc_utils.function_rules import FunctionRule, loop_rule
from memarc_utils.layer_rules import EmbeddingRule, rule_for

_SAMPLE = 2048  # numbers of a tensor that are compared
_MOST_READ = 32  # frozen parameters whose numbers one check reads: versions and identities of all cost next to nothing
_MOST_ENTRIES = 1000  # of a list, tuple or dict that a module keeps: more is a vocabulary
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # parameters, buffers, children and hooks
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # as which the bits of a type are read; those of 8 and 16 bytes as int32


def check_owner(name: str, module: nn.Module) -> object:
    """The rule of a layer that owns trainable parameters: its exact one, or the loop over examples, with a warning.

    Raises:
        ValueError: neither is right; the message names the parameter and the ways out. Nothing is changed then.
    """
    trainable = [key for key, p in module.named_parameters(recurse=False) if p.requires_grad]
    full = [f"{name}.{key}" if name else key for key in trainable]
    kind = type(module).__name__
    ways_out = (f"Freeze it (requires_grad_(False)), or teach the engine the layer: "
                f"memarc_utils.layer_rules.register_rule({kind}, per_example_loop)")
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(f"{full[0]} is owned by a layer of TorchScript, whose passes cannot be recorded: prepare the plain module")
    if not _has_plain_forward(module):
        raise ValueError(f"the forward of {name or kind}, which owns {full[0]}, was replaced on the instance (is the model "
                         "private already, or wrapped by another library?). Undo that first, e.g. with private.detach()")
    if odd := [f for key, f in zip(trainable, full) if getattr(module, key).is_complex()]:
        raise ValueError(f"{odd[0]} is complex, and the engine would make half of its gradient: train its real and imaginary parts as two "
                         "real parameters, or freeze it")
    rule = rule_for(module)
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        raise ValueError(f"{full[0]} belongs to a parametrization, computed anew at every use of the weight. Fold it in first "
                         "(torch.nn.utils.parametrize.remove_parametrizations), or freeze it")
    if rule is None:
        rule = loop_rule(module)
        if rule is None:
            raise ValueError(f"no rule for {full[0]}, owned by a {kind} in which other layers train too: freeze it (requires_grad_(False)), "
                             "or move it into a small module of its own, whose forward takes what it is used on and returns one tensor")
        warnings.warn(f"no rule of its own for {kind} ({full[0]}): its per-example gradients are computed by a loop over the "
                      f"examples (torch.func), exact where no examples meet. {ways_out} to say that this is meant", stacklevel=6)
    if not isinstance(rule, FunctionRule) and (odd := [f for key, f in zip(trainable, full) if key not in ("weight", "bias")]):
        raise ValueError(f"the rule for {kind} does not know {odd[0]}. {ways_out}")
    if isinstance(rule, type) and issubclass(rule, EmbeddingRule) and (reason := rule.refuse(module)):
        raise ValueError(f"{full[0]} cannot be clipped: {reason}")
    return rule


def _has_plain_forward(module: nn.Module) -> bool:
    """Its class's, also where a copy of a private model carries it on the instance (see `grad_sample`)."""
    forward = vars(module).get("forward")
    return forward is None or (isinstance(forward, functools.partial) and forward.func is type(module).forward
                               and len(forward.args) == 1 and forward.args[0] is module and not forward.keywords)


def check_no_batch_statistics(model: nn.Module) -> None:
    """Raises:
        ValueError: a layer mixes the examples of a batch, keeps statistics of them, or rescales its table by what they look up.
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            weight = f"{name}.weight" if name else "weight"
            raise ValueError(f"{weight} is rescaled in the forward pass, row by row as a batch looks them up (max_norm), whether it trains "
                             f"or not: the table would show the batch's tokens. Set max_norm=None, after rescaling it once: "
                             f"{weight}.data.renorm_({module.norm_type}, 0, {module.max_norm})")
        if ".quantized.dynamic" in type(module).__module__:
            raise ValueError(f"{name or 'the model'} is a dynamically quantized {type(module).__name__}: it scales its input by the largest "
                             "number of the whole batch, so that each example changes the others. Quantize weights alone, or with a fixed scale")
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        mixes = batch_norm or (isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats)
        # Without running statistics it takes the batch's own in evaluation mode too.
        always = batch_norm and module.running_mean is None
        if mixes and (always or "train" not in vars(module)):  # memarc_utils.backbones.freeze keeps a module in evaluation mode
            what = "without running statistics, in evaluation mode too" if always else "and keeps their statistics"
            mend = "" if always else ", or keep it as it is with backbones.freeze(module)"
            raise ValueError(f"{name or 'the model'} is a {type(module).__name__}: it mixes the examples of a batch {what}. Replace it by "
                             f"GroupNorm or LayerNorm{mend}")


def check_losses(losses: object) -> None:
    """Raises:
        ValueError: not one loss per example with a gradient.
    """
    if not isinstance(losses, Tensor) or losses.dim() != 1:
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"backward needs one loss per example, a 1-D tensor; got {shape}. A mean over the batch hides the "
                         "examples: use reduction='none', for instance cross_entropy(logits, labels, reduction='none')")
    if len(losses) and not losses.requires_grad:
        raise ValueError("the losses carry no gradient: compute them outside torch.no_grad() and do not detach them")


def check_not_begun(steps_taken: int) -> None:
    """For an optimizer that a state shall be loaded into.

    Raises:
        ValueError: it has taken steps, which going back would leave out of ε while their noise would be drawn again.
    """
    if steps_taken:
        raise ValueError(f"{steps_taken} steps were taken, and going back to a state does not give their ε back: load it into a new "
                         "optimizer (make_private, make_zeroth_order) to resume a run that ended; to try again, make a plan of its own "
                         "and count both")


def check_sampler(sampler, plan: PrivacyPlan) -> None:
    """Raises:
        ValueError: the batches are not those that the plan pays for, or those of a shuffled plan are not known.
    """
    if sampler is not None and not hasattr(sampler, "steps_drawn"):
        raise ValueError(f"sampler must be what poisson_batches or shuffled_batches returned, got a {type(sampler).__name__}")
    if sampler is not None and sampler.plan != plan:
        raise ValueError("the batches were made with another plan than this optimizer: its ε would be that of other batches. Make both "
                         "with one plan, poisson_batches(dataset, private.plan)")
    if sampler is None and plan.sampling == "shuffled":
        raise ValueError("a shuffled plan pays for every example once an epoch: pass the sampler, or a resumed run begins another order "
                         "and some examples come twice")


def check_state(state: dict, needed: set[str]) -> None:
    """Raises:
        ValueError: not what an optimizer's ``state_dict`` returns.
    """
    if not isinstance(state, dict) or (lacking := needed - set(state)):
        lacks = f"lacks {', '.join(sorted(lacking))}" if isinstance(state, dict) else f"is a {type(state).__name__}"
        raise ValueError(f"the state {lacks}: give what private.state_dict() returned")


class WatchedBuffers:
    """Remembers a model's buffers and frozen parameters; what a forward pass keeps of a batch in one is private data without noise.

    Up to `_SAMPLE` numbers are compared whole, bit by bit: a write of the value that was there already is none. A larger tensor must
    be the same object, not written in place (torch counts that, but for writes through ``.data``), and equal in as many numbers
    spread over it. Of more than `_MOST_READ` frozen parameters a check reads the numbers of so many, drawn anew each time, and looks
    at the others' versions alone. Of meta and fake tensors, and of tensors of a type of their own (sharded, quantized), no number is
    read.

    Args:
        since: what the message says of the time that is watched.
    """

    def __init__(self, model: nn.Module, since: str = "since make_private") -> None:
        self._model, self._since = model, since
        self._known = set(model.parameters())
        watched = list(self._watched())
        contents = _fingerprints([tensor for _, _, tensor in watched])
        self._kept = {name: (tensor, _version(tensor), content) for (_, name, tensor), content in zip(watched, contents)}

    def _watched(self) -> Iterator[tuple[str, str, Tensor]]:
        yield from (("buffer", name, buffer) for name, buffer in self._model.named_buffers())
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad:
                yield "frozen parameter", name, parameter

    def check(self) -> None:
        """Raises:
            ValueError: one was written, or replaced, since.
        """
        watched = list(self._watched())
        read = [k for k, (kind, _, _) in enumerate(watched) if kind != "frozen parameter"]
        frozen = [k for k, (kind, _, _) in enumerate(watched) if kind == "frozen parameter"]
        read += frozen if len(frozen) <= _MOST_READ else random.SystemRandom().sample(frozen, _MOST_READ)
        contents = dict(zip(read, _fingerprints([watched[k][2] for k in read])))
        for k, (kind, name, tensor) in enumerate(watched):
            before, version, kept = self._kept.get(name, (None, 0, None))
            content = contents.get(k, kept)
            if tensor is not before and kind != "buffer" and (tensor in self._known or not _is_plain(tensor)):
                continue  # frozen, renamed or sharded since: the caller's own checks of the parameters speak of that
            whole = k in contents and content is not None and tensor.numel() <= _SAMPLE
            if content == kept and (whole or tensor is before and _version(tensor) == version):
                continue
            raise ValueError(f"the {kind} {name} was written {self._since}: what a forward pass keeps of a batch is private data without "
                             "noise. Remove the write, or make it before the training (weights that you load yourself between two steps "
                             "of DP-SGD: call private.sampler.note_buffers() after)")


class WatchedPasses:
    """Remembers, from the first forward pass of a step to the step, what trains and the tensors that modules keep in plain attributes
    (one level into lists, tuples and dicts). In between only a forward pass can write them: what it puts into a parameter is
    released beside the noise, what it keeps of a batch in an attribute steers the next step past the clipper. That a tensor has a graph
    is no excuse: no later step goes back through it, but one can read its numbers.

    Of more than `_MOST_READ` parameters the numbers of so many are compared, drawn anew each step, and the versions of all; of the
    attributes as many. An attribute that appears or goes, or that has another shape or type and the same numbers where both have any, is a cache
    (rotary tables, masks) and no alarm; an entry more in a list that was there is one. Numbers of Python's own, single whole numbers
    (counts of steps), and tensors that an object of another class or a closure holds, are out of reach.

    Args:
        model: whose modules' attributes are watched.
        names: the parameters and what to call them.
        since: what the message says of the time that is watched.
    """

    def __init__(self, model: nn.Module, names: dict[nn.Parameter, str], since: str = "in a forward pass since the last step") -> None:
        self._model, self._names, self._since = model, names, since
        self.forget()

    def note(self) -> None:
        """At each forward pass; the first one since `forget` counts."""
        if self._versions is None:
            plain = [p for p in self._names if _is_plain(p)]
            self._versions = {p: _version(p) for p in plain}
            self._read, (attributes, self._lists) = _some(plain), _tensor_attributes(self._model)
            some = _some(list(attributes))
            contents = _fingerprints(self._read + [attributes[name] for name in some])
            self._contents, self._attributes = contents[:len(self._read)], dict(zip(some, contents[len(self._read):]))
            self._before = {name: tensor.detach() for name, tensor in attributes.items()}

    def forget(self) -> None:
        self._versions: dict[nn.Parameter, int] | None = None
        self._read: list[nn.Parameter] = []
        self._contents: list[tuple | None] = []
        self._attributes: dict[str, tuple | None] = {}
        self._before: dict[str, Tensor] = {}  # all of them, by reference: one that is replaced by another shape is compared itself
        self._lists: set[str] = set()

    def check(self, release: bool = True) -> None:
        """
        Args:
            release: False leaves numbers on a GPU, since reading them waits for it, and writes that torch counts to the check before
                the release.

        Raises:
            ValueError: one was written since `note`.
        """
        if self._versions is None:
            return
        attributes = _tensor_attributes(self._model)[0] if self._attributes or self._lists else {}
        before = [*zip(self._read, self._contents), *((attributes[n], kept) for n, kept in self._attributes.items() if n in attributes)]
        before = [(t, kept) for t, kept in before if kept is not None and (release or t.device.type == "cpu")]
        same = {id(t): kept == now or kept[:2] != now[:2] if now else True
                for (t, kept), now in zip(before, _fingerprints([t for t, _ in before]))}
        for parameter, version in self._versions.items():
            moved = _version(parameter) != version
            if moved and not release:  # the graph may hold it as it was: of that torch speaks first
                continue
            whole = same.get(id(parameter)) and parameter.numel() <= _SAMPLE  # no number is another, whatever was written
            if not same.get(id(parameter), True) or moved and not whole:
                raise ValueError(f"the parameter {self._names[parameter]} was written {self._since}: what a forward pass puts there of a "
                                 "batch is private data without noise. Remove the write (first-call initialisations too); weights of your own "
                                 "load between a step and the next forward pass, or before private.zero_grad()")
        written = [name for name in self._attributes if name in attributes and not same.get(id(attributes[name]), True)]
        written += [name for name, old in self._before.items() if name in attributes and (release or old.device.type == "cpu")
                    and not _same_corner(old, attributes[name])]
        written += [name for name in attributes if name not in self._before and name.rpartition("[")[0] in self._lists]
        if written:
            raise ValueError(f"the attribute {written[0]} was written {self._since}: what it keeps of one batch would steer the next step "
                             "past the clipper. Remove it; what is only looked at, give back beside the output, or delete it after each step")


def _some(those: list) -> list:
    return those if len(those) <= _MOST_READ else random.SystemRandom().sample(those, _MOST_READ)


def _same_corner(old: Tensor, new: Tensor) -> bool:
    """Of two shapes or types: are the numbers equal at the places that both have, as the one type or the other has them? (What has kept
    both is compared by fingerprints.)"""
    if (old.shape, old.dtype) == (new.shape, new.dtype):
        return True
    if old.dim() != new.dim() or old.device != new.device:
        return False
    corner = tuple(slice(min(sizes)) for sizes in zip(old.shape, new.shape))
    old, new = old[corner], new.detach()[corner]
    return torch.equal(old.to(new.dtype), new) or torch.equal(old, new.to(old.dtype))


def _tensor_attributes(model: nn.Module) -> tuple[dict[str, Tensor], set[str]]:
    """Name to tensor with numbers of its own, no parameter or buffer; and the names of the lists."""
    found: dict[str, Tensor] = {}
    lists: set[str] = set()

    def add(name: str, value: object) -> None:
        if isinstance(value, Tensor) and _is_plain(value) and (value.is_floating_point() or value.dim()) and holds_data(value):
            found[name] = value

    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if key in _OF_EVERY_MODULE or not isinstance(value, (Tensor, list, tuple, dict)):
                continue
            name = f"{path}.{key}" if path else key
            if isinstance(value, Tensor):
                add(name, value)
            elif len(value) <= _MOST_ENTRIES:
                lists |= {name} if isinstance(value, list) else set()
                for at, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
                    add(f"{name}[{at!r}]", part)
    if found:
        registered = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        found = {name: tensor for name, tensor in found.items() if id(tensor) not in registered}
    return found, lists


def check_same_parameters(model: nn.Module, names: dict[nn.Parameter, str]) -> None:
    """Raises:
        ValueError: other parameters train than at the start, or one has a hook that steps.
    """
    if hooked := [name for p, name in names.items() if p._post_accumulate_grad_hooks]:
        raise ValueError(f"{hooked[0]} has a post-accumulate-grad hook, which could step past the clipper: remove the hook")
    if hooked := [name for p, name in names.items() if p._backward_hooks]:
        raise ValueError(f"{hooked[0]} has a gradient hook (register_hook), which would be handed no gradient, since autograd makes none of a "
                         "private parameter: remove the hook, and read private.clipped_sum() or private.gradient_norms instead")
    now = {p: name for name, p in model.named_parameters() if p.requires_grad}
    if added := [name for p, name in now.items() if p not in names]:
        raise ValueError(f"trainable parameters appeared after make_private: {', '.join(added[:5])}. Add adapters and move "
                         "the model to its device first, then call make_private")
    if gone := [name for p, name in names.items() if p not in now]:
        raise ValueError(f"no longer trainable or replaced since make_private: {', '.join(gone[:5])}. Call "
                         "private.detach(), change the model, then call make_private again, with a plan for the rest: what is spent then is "
                         "the composition of both, which neither epsilon() knows")


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # tensors made under inference_mode keep no count


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_quantized


@torch.no_grad()
def _fingerprints(tensors: list[Tensor]) -> list[tuple | None]:
    """Shape, type and a sum over the bits of `_SAMPLE` numbers at even distances, by weights without a pattern; the sums of one
    device come to the host together."""
    found: list[tuple | None] = [None] * len(tensors)
    places: dict[torch.device, list[int]] = {}
    for k, tensor in enumerate(tensors):
        if holds_data(tensor) and _is_plain(tensor):
            places.setdefault(tensor.device, []).append(k)
    for device, numbers in places.items():
        weights = _weights(device)
        for k, total in zip(numbers, torch.stack([_sum_of_bits(tensors[k], weights) for k in numbers]).tolist()):
            found[k] = (tensors[k].shape, tensors[k].dtype, total)
    return found


def _sum_of_bits(tensor: Tensor, weights: Tensor) -> Tensor:
    tensor = tensor[tuple(slice(0, None if step else 1) for step in tensor.stride())]  # expanded: the same numbers again, not to be copied
    size = tensor.numel()
    distance = max(1, -(-size // _SAMPLE)) | 1  # odd: it walks through the columns of a matrix too
    sample = tensor.as_strided((-(-size // distance),), (distance,)) if tensor.is_contiguous() else tensor.reshape(-1)[::distance]
    bits = _BITS.get(sample.element_size())
    bits = (sample.view(bits) if bits else sample.contiguous().view(torch.int32)).to(weights)
    return bits @ weights[:len(bits)]


@functools.cache
def _weights(device: torch.device) -> Tensor:
    """Below 2^9: with 32 bits of at most 4 * 2^11 numbers every sum is a whole number below 2^53, so no order of adding rounds it."""
    return torch.randint(1, 2**9, (4 * _SAMPLE,), generator=torch.Generator().manual_seed(0)).to(device, torch.float64)


def groups_of(modules: list[nn.Module]) -> dict[nn.Module | nn.Parameter, int]:
    """Numbers the layers; those that share a trainable parameter, directly or through others, have one number, which
    their parameters have too. Clipped apart, a tied weight would let its example in once a layer."""
    groups: dict[nn.Module | nn.Parameter, int] = {}
    for number, module in enumerate(modules):
        members = [module, *(p for p in module.parameters(recurse=False) if p.requires_grad)]
        joined = {groups[member] for member in members if member in groups}
        groups.update({member: number for member in members})
        groups.update({member: number for member, old in groups.items() if old in joined})
    return groups
