"""The trainable part of a prepared model on disk, with how the model was prepared; loaded onto a fresh backbone it gives
the same outputs.

A folder holds ``trainable.safetensors`` (what trains, and frozen parameters that the preparation created, such as the A of
FFA-LoRA) and ``preparation.json``. The backbone itself is not stored: its class and a hash of its frozen weights are.
"""

import copy
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memarc_utils import adapters, reversible, side_network
from memarc_utils.couplings import ReversibleConfig

TENSORS, PREPARATION = "trainable.safetensors", "preparation.json"
_FORMAT = 1
_SAMPLED = 64  # numbers of each frozen weight that enter the hash: enough to tell two pre-trained models apart

# Method to function, and what its ``config`` argument is made with. Only these are ever called.
_METHODS = {
    "add_lora": (adapters.add_lora, None),
    "add_bottleneck_adapters": (adapters.add_bottleneck_adapters, None),
    "select_bias_terms": (adapters.select_bias_terms, None),
    "select_linear_probe": (adapters.select_linear_probe, None),
    "train_everything": (adapters.train_everything, None),
    "make_reversible": (reversible.make_reversible, ReversibleConfig),
    "attach_side_network": (side_network.attach_side_network, side_network.SideNetworkConfig),
}


def save_trainable(model: nn.Module, folder: str | Path) -> Path:
    """Saves what trains, and how the model was prepared.

    Args:
        model: prepared by `add_lora`, `add_bottleneck_adapters`, `select_bias_terms`, `select_linear_probe`,
            `train_everything` or `attach_side_network`, or by several of them.
        folder: is made when it is not there; an earlier save in it is replaced.

    Returns:
        The folder.

    Raises:
        ValueError: the model was not prepared by one of these, or nothing of it trains; nothing is written then.
    """
    preparation = getattr(model, "memarc_preparation", None)
    if preparation is None or (unknown := [s["method"] for s in preparation["steps"] if s["method"] not in _METHODS]):
        what = "was not prepared" if preparation is None else f"was prepared by {unknown[0]}, which cannot be saved"
        raise ValueError(f"this {type(model).__name__} {what}: prepare it by one of {', '.join(_METHODS)}")
    parameters = dict(model.named_parameters())
    trainable = [name for name, p in parameters.items() if p.requires_grad]
    if not trainable:
        raise ValueError(f"nothing of this {type(model).__name__} trains, so there is nothing to save: prepare it first")
    stored = {name: p for name, p in parameters.items() if p.requires_grad or name in preparation["created"]}
    frozen = {name: p for name, p in parameters.items() if name not in stored}
    described = {"format": _FORMAT, "model": type(model).__name__, "steps": preparation["steps"], "trainable": trainable,
                 "frozen_sha256": _hash(frozen)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    half_done = folder / f".{TENSORS}.{os.getpid()}"  # a crash while writing leaves the earlier save whole
    try:
        save_file({name: p.detach().cpu().contiguous() for name, p in stored.items()}, half_done)
        half_done.rename(folder / TENSORS)
    finally:
        half_done.unlink(missing_ok=True)
    (folder / PREPARATION).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return folder


def load_trainable(model: nn.Module, folder: str | Path) -> nn.Module:
    """Prepares a fresh backbone as the saved model was prepared and gives it the saved values, in place.

    Everything is tried first on a copy without numbers (torch's meta device), so a refusal leaves the model as it was.

    Args:
        model: the backbone as it was before the preparation; or a model prepared in the same way already, which only
            takes the values.
        folder: written by `save_trainable`.

    Raises:
        FileNotFoundError: the folder holds no saved model.
        ValueError: another backbone (class, names, shapes or frozen weights), or another preparation than the saved one.
    """
    described, tensors = _read(Path(folder))
    if type(model).__name__ != described["model"]:
        raise ValueError(f"saved was the trainable part of a {described['model']}, this is a {type(model).__name__}: load the "
                         "backbone that it was made with")
    steps = getattr(model, "memarc_preparation", {"steps": []})["steps"]
    if steps and steps != described["steps"]:
        raise ValueError(f"this model was prepared by {_said(steps)}, the saved one by {_said(described['steps'])}: load the "
                         "backbone anew and leave the preparation to load_trainable")
    rehearsed, originals = _copy_without_numbers(model)
    if not steps:
        _prepare(rehearsed, described["steps"])
    parameters = dict(rehearsed.named_parameters())
    _check_fits(parameters, rehearsed.memarc_preparation["created"], described, tensors)
    frozen = {name: originals.get(id(p)) for name, p in parameters.items() if name not in tensors}
    if _hash(frozen) != described["frozen_sha256"]:
        raise ValueError("the frozen weights of this backbone are not those of the saved model: load the same pre-trained "
                         "weights in the same dtype")
    if not steps:
        _prepare(model, described["steps"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in described["trainable"])
        if name in tensors:
            with torch.no_grad():
                parameter.copy_(tensors[name])
    return model


def _read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    if not (folder / PREPARATION).is_file() or not (folder / TENSORS).is_file():
        raise FileNotFoundError(f"{folder} holds no saved model ({PREPARATION} and {TENSORS}): give a folder that "
                                "save_trainable wrote")
    try:
        described, tensors = json.loads((folder / PREPARATION).read_text(encoding="utf-8")), load_file(folder / TENSORS)
    except (ValueError, SafetensorError) as error:  # cut off while it was copied, or edited
        raise ValueError(f"what {folder} holds cannot be read ({error}): save the model anew") from error
    if (found := described.get("format") if isinstance(described, dict) else None) != _FORMAT:
        raise ValueError(f"{PREPARATION} has format {found!r}, this version reads {_FORMAT}: save it anew")
    if unknown := [step["method"] for step in described["steps"] if step["method"] not in _METHODS]:
        raise ValueError(f"{PREPARATION} names the method {unknown[0]!r}; known are {', '.join(_METHODS)}")
    return described, tensors


def _said(steps: list[dict]) -> str:
    def call(step):
        return f"{step['method']}({', '.join(f'{name}={value}' for name, value in step['arguments'].items())})"

    return ", then ".join(call(step) for step in steps)


def _prepare(model: nn.Module, steps: list[dict]) -> None:
    for step in steps:
        function, config = _METHODS[step["method"]]
        arguments = {name: tuple(v) if isinstance(v, list) else v for name, v in step["arguments"].items()}
        if config is not None:
            arguments["config"] = config(**arguments["config"])
        function(model, **arguments)


def _copy_without_numbers(model: nn.Module) -> tuple[nn.Module, dict[int, Tensor]]:
    """A copy of the model on the meta device, and from the id of each of its parameters to the original."""
    memo, originals = {}, {}
    for parameter in model.parameters():
        empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        memo[id(parameter)], originals[id(empty)] = empty, parameter
    return copy.deepcopy(model, memo), originals


def _check_fits(parameters: dict[str, Tensor], created: list[str], described: dict, tensors: dict[str, Tensor]) -> None:
    mend = "load the backbone that it was made with"
    if strange := [name for name in tensors if name not in parameters]:
        count = f"{len(strange)} of the {len(tensors)} saved names are not in it"
        raise ValueError(f"this model has no {strange[0]} ({count}): {mend}")
    shapes = {name: (tuple(parameters[name].shape), tuple(t.shape)) for name, t in tensors.items()}
    if other := [name for name, (here, saved) in shapes.items() if here != saved]:
        here, saved = shapes[other[0]]
        raise ValueError(f"{other[0]} has shape {here} in this model and {saved} in the saved one: {mend}")
    needed = {*created, *described["trainable"]}
    if missing := [name for name in parameters if name in needed and name not in tensors]:
        raise ValueError(f"{missing[0]} of this model is not among the saved tensors: {mend}")


def _hash(frozen: dict[str, Tensor]) -> str:
    """Of each frozen parameter its name, dtype, shape and some numbers spread over it."""
    digest = hashlib.sha256()
    for name, parameter in sorted(frozen.items()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLED)].float().cpu().contiguous()
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
