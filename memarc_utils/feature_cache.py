"""The frozen backbone's features, computed once and kept on disk: every later epoch costs the side network alone.

The backbone of a side network runs in evaluation mode, so an example's features are the same in every epoch. They are written
once, a token after the other, to memory-mapped files: the tapped features in bfloat16 (at side width r after a frozen
downsample, else at width d), the final hidden state that the head reads in float32, so that training still starts exactly
at the pre-trained model. ``tokens · (2 · taps · width + 4 · d)`` bytes in all.

Privacy is unchanged: an example's features depend on that example alone, and only the side network's clipped gradients leave
the machine. The cache itself is private data and belongs where the data set is.
"""

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn

from memarc_utils.backbones import REPOSITORY
from memarc_utils.batch_selection import pad_rows
from memarc_utils.side_network import FROZEN_DOWNSAMPLES, SideNetwork

_FORMAT = 2
_ROWS_PER_SHARD = 4096
_OF_THE_FILE = ("_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "id2label", "label2id",
                "problem_type", "use_cache")  # of a configuration: change no feature
_CODE = ("backbones", "feature_cache", "side_blocks", "side_network")  # makes the features: another text of it, another cache
_TOKEN_COLUMNS = ("input_ids", "token_type_ids", "position_ids")  # what a row's features depend on


def side_of(model: nn.Module) -> SideNetwork:
    """The side network of a prepared model.

    Raises:
        ValueError: the model has none.
    """
    for module in model.modules():
        if isinstance(module, SideNetwork):
            return module
    raise ValueError(f"this {type(model).__name__} has no side network: call attach_side_network first")


def cache_bytes(model: nn.Module, num_tokens: int) -> int:
    """Bytes on disk of the features of ``num_tokens`` tokens (all tokens of the data set, without padding)."""
    side = side_of(model)
    return num_tokens * (2 * len(side.taps) * side.tapped_width + 4 * side.width)


class CachedFeatures:
    """A data set whose rows bring their features along, as ``inputs_embeds``: what a side network takes in place of running its
    backbone. Has ``len`` and ``[i]``; the rows are read from memory-mapped files in any order. ``inputs_embeds`` is bfloat16 of shape
    (tokens, `SideNetwork.cached_width`), as the files are: the bytes of the final state's float32 numbers, then the taps.

    Attributes:
        folder: where the files lie.
    """

    def __init__(self, dataset, folder: Path) -> None:
        self.dataset, self.folder = dataset, folder
        described = json.loads((folder / "complete.json").read_text(encoding="utf-8"))
        self._starts, self._sums = np.load(folder / "starts.npy"), np.load(folder / "sums.npy")
        self._shards: list[tuple[np.ndarray, np.ndarray]] = []
        for number in range(described["shards"]):
            taps = _mapped(folder / f"taps_{number:04}.bin", np.int16, described["taps"] * described["width"])
            final = _mapped(folder / f"final_{number:04}.bin", np.float32, described["final"])
            first = number * _ROWS_PER_SHARD
            tokens = self._starts[min(first + _ROWS_PER_SHARD, len(dataset))] - self._starts[first]
            if not len(taps) == len(final) == tokens:
                raise ValueError(f"shard {number} in {folder} should hold the features of {tokens} tokens and holds {len(taps)} and "
                                 f"{len(final)}: delete that folder and call cache_features again")
            self._shards.append((taps, final))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict:
        number = i // _ROWS_PER_SHARD
        first = number * _ROWS_PER_SHARD
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        row = self.dataset[i]
        if _checksum(row) != self._sums[i]:
            raise ValueError(f"row {i} has other tokens than when its features were computed: call cache_features again, or what was taken "
                             "out of the data set would still be trained on")
        start, end = self._starts[i] - self._starts[first], self._starts[i + 1] - self._starts[first]
        taps, final = (torch.from_numpy(np.array(part[start:end])) for part in self._shards[number])
        return {**row, "inputs_embeds": torch.cat([final.view(torch.bfloat16), taps.view(torch.bfloat16)], 1)}


def _mapped(path: Path, dtype: type, columns: int) -> np.ndarray:
    """(rows, columns) of a file; rows that are whole."""
    count = path.stat().st_size // (np.dtype(dtype).itemsize * columns) if path.is_file() else 0
    return np.memmap(path, dtype, "r", shape=(count, columns)) if count else np.empty((0, columns), dtype)


def cache_features(model: nn.Module, dataset, batch_size: int = 64, folder: str | Path | None = None,
                   progress: Callable | None = None) -> CachedFeatures:
    """Computes what is missing of the cache, and opens it.

    Files are named by what they depend on: the rows' tokens, the backbone's weights and configuration, autocast, the taps and the
    downsample, this code and the version of ``transformers``. A cache of anything else is never read. A shard is written to another name
    first, so an interrupted run goes on where it stopped.

    Args:
        model: prepared by `attach_side_network`.
        dataset: rows with ``input_ids``, in a fixed order.
        batch_size: rows of one pass through the backbone.
        folder: parent of the cache's folder; ``build/features`` by default.
        progress: wraps the iteration over shards, for instance ``training.progress``.

    Raises:
        ValueError: no side network, no rows, no batch size, not enough room on the disk, or a file of another size than when it was
            written.
    """
    side = side_of(model)
    if len(dataset) == 0:
        raise ValueError("the data set is empty: there are no features to keep")
    if odd := [i for i in range(len(dataset)) if not len(dataset[i].get("input_ids", ()))]:
        raise ValueError(f"row {odd[0]} has no token in input_ids: tokenize the texts first (data.tokenize_dataset)")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number >= 1, got {batch_size!r}")
    lengths = [len(dataset[i]["input_ids"]) for i in range(len(dataset))]
    if padded := [i for i in range(len(dataset)) if not all(dataset[i].get("attention_mask", ()))]:
        raise ValueError(f"row {padded[0]} is padded (its attention_mask has zeros): give rows without padding, it is added for each batch")
    parent = Path(folder) if folder is not None else REPOSITORY / "build" / "features"
    place = parent / _key(side, dataset)
    if not (place / "complete.json").is_file():
        place.mkdir(parents=True, exist_ok=True)
        files = [[place / f"{part}_{number:04}.bin" for part in ("taps", "final")] for number in range(-(-len(dataset) // _ROWS_PER_SHARD))]
        missing = [number for number, pair in enumerate(files) if not all(file.is_file() for file in pair)]
        there = sum(file.stat().st_size for number, pair in enumerate(files) if number not in missing for file in pair)
        needed, free = cache_bytes(model, sum(lengths)) - there, shutil.disk_usage(place).free
        if needed > free:
            raise ValueError(f"the features take {needed / 1e9:.1f} GB more and {free / 1e9:.1f} GB are free: a frozen downsample (pooled, "
                             "orthogonal) is kept at side width, and layers=2 keeps half; or give another folder")
        for number in progress(missing, "features", len(missing)) if progress else missing:
            if not all(file.is_file() for file in files[number]):  # another process may have written it in the meantime
                start = number * _ROWS_PER_SHARD
                _write_shard(model, side, dataset, range(start, min(start + _ROWS_PER_SHARD, len(dataset))), batch_size, place, number)
        np.save(place / "starts.npy", np.concatenate([[0], np.cumsum(lengths)]))
        np.save(place / "sums.npy", np.array([_checksum(dataset[i]) for i in range(len(dataset))], dtype=np.uint32))
        _put(place / "complete.json", json.dumps({"shards": len(files), "taps": len(side.taps), "width": side.tapped_width,
                                                  "final": side.width}).encode())
    return CachedFeatures(dataset, place)


@torch.no_grad()
@torch.no_grad()
def inputs_of_classifier(model: nn.Module, rows: CachedFeatures, batch_size: int = 64
                         ) -> tuple[Float[Tensor, "examples width"], Int[Tensor, " examples"]]:
    """What the classifier of a model sees of each row in evaluation mode, and the rows' labels: all that its training needs where nothing
    below it trains.

    Raises:
        ValueError: the model's head is no linear layer called ``classifier`` (BERT and DistilBERT have one).
    """
    if not isinstance(getattr(model, "classifier", None), nn.Linear):
        raise ValueError(f"the head of {type(model).__name__} is no linear classifier over one vector an example: take a BERT or DistilBERT type")
    device, seen = next(model.parameters()).device, []
    model.eval()
    hook = model.classifier.register_forward_pre_hook(lambda classifier, inputs: seen.append(inputs[0]))
    try:
        for start in range(0, len(rows), batch_size):
            batch = pad_rows([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
            model(**{name: t.to(device) for name, t in batch.items() if name != "labels"})
    finally:
        hook.remove()
    return torch.cat(seen), torch.tensor([rows[i]["labels"] for i in range(len(rows))], device=device)


def _write_shard(model, side: SideNetwork, dataset, rows: range, batch_size: int, place: Path, number: int) -> None:
    device, pad = next(model.parameters()).device, getattr(side.config, "pad_token_id", None) or 0
    taps: dict[int, Tensor] = {}
    final: dict[int, Tensor] = {}
    order = sorted(rows, key=lambda i: len(dataset[i]["input_ids"]))  # rows of like length together: less padding
    for start in range(0, len(order), batch_size):
        some = order[start:start + batch_size]
        batch = pad_rows([{name: list(dataset[i][name]) for name in _TOKEN_COLUMNS if name in dataset[i]} for i in some], pad)
        tapped, last = side.cacheable_features(**{name: t.to(device) for name, t in batch.items()})
        for row, i in enumerate(some):
            length = len(dataset[i]["input_ids"])
            taps[i], final[i] = tapped[row, :length].flatten(1).bfloat16().cpu(), last[row, :length].float().cpu()
    _put(place / f"taps_{number:04}.bin", torch.cat([taps[i] for i in rows]).view(torch.int16).numpy().tobytes())
    _put(place / f"final_{number:04}.bin", torch.cat([final[i] for i in rows]).numpy().tobytes())  # last: it says the shard is whole


def _put(path: Path, content: bytes) -> None:
    """The file is whole or it is not there, also when two processes write it at once."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # else a machine that stops may leave the name without the content
    Path(file.name).replace(path)


def _key(side: SideNetwork, dataset) -> str:
    """sha256 over everything that the features depend on."""
    kept = side.side_config.downsample if side.side_config.downsample in FROZEN_DOWNSAMPLES else "whole"
    device = next(side.backbone.parameters()).device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    digest = hashlib.sha256(f"{_FORMAT} {_ROWS_PER_SHARD} {side.taps} {kept} {side.tapped_width} {side.width} {autocast}".encode())
    for module in _CODE:
        digest.update((Path(__file__).parent / f"{module}.py").read_bytes())
    digest.update(transformers.__version__.encode())
    settings = {name: value for name, value in side.config.to_dict().items() if name not in _OF_THE_FILE}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())  # heads or activation show in no weight
    for name, tensor in sorted(side.backbone.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim()
                      else str(tensor.item()).encode())
    for i in range(len(dataset)):
        digest.update(_tokens_of(dataset[i]))
    return digest.hexdigest()[:24]


def _tokens_of(row: dict) -> bytes:
    """A row's tokens, and what else the backbone reads of it."""
    return b";".join(name.encode() + np.asarray(row[name], dtype=np.int64).tobytes() for name in _TOKEN_COLUMNS if name in row) + b"\n"


def _checksum(row: dict) -> int:
    return zlib.crc32(_tokens_of(row))
