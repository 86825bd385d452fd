"""The recorded experiments: grids of cells, one training run and one row of results a cell, that stop and go on.

Rows go to ``data/results``; a cell whose row is there is skipped, so an interrupted run continues where it stopped. A row notes
the code that made it (a hash of the modules' syntax trees without docstrings), and a grid refuses to add to rows that other code
made for the same setting. `grids` lists the cells and has the command.
"""

import ast
import csv
import datetime
import functools
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from memarc_utils import adapters, feature_cache, training
from memarc_utils.accounting import PrivacyPlan
from memarc_utils.backbones import block_view, load_backbone, load_tokenizer
from memarc_utils.clipping import check_clipping
from memarc_utils.data import load_text_dataset, tokenize_dataset
from memarc_utils.methods import METHODS as PREPARATIONS
from memarc_utils.recording import append_result
from memarc_utils.side_network import SideNetworkConfig, attach_side_network
from memarc_utils.summary import DEFAULT_MODEL, RESULTS, canonical_code

# What a number rests on. Modules that only refuse (model_checks, sensitivity, preparation, probe) or only describe are not among them.
_SHARED_CODE = ("accounting", "adapters", "backbones", "batch_selection", "block_halves", "book_keeping", "clipping", "data", "dp_sgd",
                "function_rules", "grad_sample", "layer_rules", "methods", "padding", "randomness", "training")
_RUNS_A_CELL = ("run_cell", "_data", "_some", "_probe_on_features")  # and these, of this module
_MODEL = "default-encoder"
_LAST_METRIC = "test_accuracy"  # of a cell's rows
# What another order of sums may move an accuracy by, where sums round to bfloat16's 8 bits: one or two examples of some thousand were
# seen, and this is a few more. Seeds differ by 0.2 to 1.5 points: a change that moves less than half a point is not told from rounding.
_ROUNDING = 0.005


def _side(**settings) -> Callable[[nn.Module], nn.Module]:
    return functools.partial(attach_side_network, config=SideNetworkConfig(**{"reduction": 8, "layers": 2, **settings}))


def _probe_on_features(model: nn.Module) -> nn.Module:
    """The linear probe as a side network that never moves, so that it reads from the same kind of cache: of the last block alone."""
    depth = len(block_view(model).blocks)
    model = attach_side_network(model, SideNetworkConfig(reduction=8, layers=depth, downsample="pooled", gate="none"))
    feature_cache.side_of(model).requires_grad_(False)
    return model


@dataclass(frozen=True)
class Method:
    """How a method prepares a model, and its rates.

    Chosen by validation accuracy on film reviews at ε = 8, one seed, among the cells of ``data/results/31_rates.csv`` (LoRA and its
    reversible twin share the pair's best mean). Without privacy only the probe's and the side network's were, the others are customary.

    Attributes:
        prepare: the model in place.
        private_rates: of AdamW for private training: of most parameters, of those that start at zero, of the head.
        rates: the same without privacy; None: no such training.
        cached: trains on features that were computed once.
        num_directions: K of a method of zeroth order, whose step is SGD's and whose clipping is flat; 0 for gradients.
        code: modules of its own, beside the engine's.
    """

    prepare: Callable[[nn.Module], nn.Module]
    private_rates: tuple[float, float, float]
    rates: tuple[float, float, float] | None
    cached: bool = False
    code: tuple[str, ...] = ()
    num_directions: int = 0


_SIDE_CODE = ("side_network", "side_blocks", "feature_cache")
_REVERSIBLE_CODE = ("couplings", "reversal", "reversible")
_SIDE_RATES = {"private_rates": (2e-3, 4e-2, 4e-2), "rates": (1e-3, 1e-2, 1e-2), "cached": True, "code": _SIDE_CODE}
METHODS: dict[str, Method] = {
    "linear-probe": Method(_probe_on_features, (1e-1, 1e-1, 1e-1), (1e-2, 1e-2, 1e-2), True, _SIDE_CODE),
    "zeroth-order": Method(_probe_on_features, (2.0, 2.0, 2.0), None, True, (*_SIDE_CODE, "zeroth_order"), num_directions=16),
    "side-cached": Method(_side(), **_SIDE_RATES),
    "side-cached mlp": Method(_side(block="mlp"), **_SIDE_RATES),
    "side-cached adapter": Method(_side(block="adapter"), **_SIDE_RATES),
    "side-cached low_rank": Method(_side(downsample="low_rank"), **_SIDE_RATES),
    "side-cached pooled": Method(_side(downsample="pooled"), **_SIDE_RATES),
    "side-cached orthogonal": Method(_side(downsample="orthogonal"), **_SIDE_RATES),
    "lora": Method(PREPARATIONS["lora"], (1e-3, 5e-3, 1e-1), (5e-4, 5e-4, 1e-3)),
    "ffa-lora": Method(PREPARATIONS["ffa-lora"], (1e-3, 5e-3, 1e-1), (5e-4, 5e-4, 1e-3)),
    "adapters": Method(PREPARATIONS["adapters"], (1e-3, 5e-3, 1e-1), (5e-4, 5e-4, 1e-3)),
    "bitfit": Method(PREPARATIONS["bitfit"], (1e-2, 1e-2, 1e-1), (1e-3, 1e-3, 1e-3)),
    "full": Method(PREPARATIONS["full"], (1e-3, 1e-3, 5e-2), (5e-5, 5e-5, 1e-3)),
    "rev-lora": Method(PREPARATIONS["rev-lora"], (1e-3, 5e-3, 1e-1), (5e-4, 5e-4, 1e-3), code=_REVERSIBLE_CODE),
    "rev-lora quarter": Method(PREPARATIONS["rev-lora quarter"], (1e-3, 5e-3, 1e-1), (5e-4, 5e-4, 1e-3), code=_REVERSIBLE_CODE),
}


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        experiment: name of the table, ``data/results/<experiment>.csv``.
        dataset: as in `data.load_text_dataset`.
        method: a key of `METHODS`.
        epsilon: target ε at δ = 1/(10 N); ``inf`` trains without privacy.
        seed: of the new head, of the order or the sampling, and of the noise (a release draws that from the system).
        num_steps: T of private training.
        batch_size: expected batch size of private training.
        epochs: of training without privacy, at batches of 32.
        max_tokens: longer texts are cut.
        rates: instead of the method's own.
        clipping: of private training: ``flat``, ``automatic`` or ``per_layer``; None is automatic, and flat for zeroth order.
        max_grad_norm: C.
        side: settings of `SideNetworkConfig`, instead of the method's own; for ``side-cached`` alone.
        num_train: trains on so many examples, drawn at random (seed 0, the same ones for every cell); None takes all.
        num_test: validates and tests on so many each, likewise.
        without_noise: the steps and the clipping of a private run with σ = 0: no privacy (ε = ∞), to see what noise alone costs.
        autocast: computes in bfloat16 where autocast does, about 1.5 times faster on CPUs that have it; where the backbone runs.
        model: what is fine-tuned, as `backbones.load_backbone` takes it. Rates were searched on the default.
    """

    experiment: str
    dataset: str
    method: str
    epsilon: float
    seed: int
    num_steps: int = 50
    batch_size: int = 1024
    epochs: int = 3
    max_tokens: int = 48
    rates: tuple[float, float, float] | None = None
    clipping: str | None = None
    max_grad_norm: float = 1.0
    side: dict | None = None
    num_train: int | None = None
    num_test: int | None = None
    without_noise: bool = False
    autocast: bool = False
    model: str = _MODEL

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if not (isinstance(self.epsilon, (int, float)) and self.epsilon > 0):
            raise ValueError(f"epsilon must be above 0, or math.inf for training without privacy, got {self.epsilon!r}")
        for name, least in (("seed", 0), ("num_steps", 1), ("batch_size", 1), ("epochs", 1), ("max_tokens", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"{name} must be a whole number >= {least}, got {getattr(self, name)!r}")
        if self.rates is not None and (len(self.rates) != 3 or not all(isinstance(rate, (int, float)) and rate > 0 for rate in self.rates)):
            raise ValueError(f"rates must be three numbers above 0 (of most parameters, of what starts at zero, of the head), got {self.rates!r}")
        if self.clipping is None:
            object.__setattr__(self, "clipping", "flat" if METHODS[self.method].num_directions else "automatic")  # of a frozen instance
        check_clipping(self.clipping, self.max_grad_norm)
        fits = math.isfinite(self.epsilon) and len(set(self.rates or [1])) == 1 and (self.clipping, self.model) == ("flat", _MODEL)
        if METHODS[self.method].num_directions and not fits:
            raise ValueError("zeroth order trains the default model's linear classifier, privately, at one rate, and clips its K slopes as one "
                             f'vector: write model="{_MODEL}", a finite epsilon, three equal rates and clipping="flat"')
        if self.without_noise and not math.isfinite(self.epsilon):
            raise ValueError("without_noise takes the noise out of a private run's steps: give the epsilon whose steps they are")
        for name, count in (("num_train", self.num_train), ("num_test", self.num_test)):
            if count is not None and not (isinstance(count, int) and count >= 1):
                raise ValueError(f"{name} must be a whole number >= 1, or None for all, got {count!r}")
        if self.side is not None:
            if self.method != "side-cached":
                raise ValueError(f"side is for the method side-cached, got it with {self.method}")
            if unknown := sorted(set(self.side) - set(SideNetworkConfig.__dataclass_fields__)):
                raise ValueError(f"side has no setting {unknown[0]!r}: take some of {', '.join(SideNetworkConfig.__dataclass_fields__)}")
            SideNetworkConfig(**self.side)  # refuses what a side network would refuse
        if self.autocast and METHODS[self.method].cached:
            raise ValueError(f"autocast is for methods that run the backbone; {self.method} reads features from a cache")

    def preparation(self) -> Callable[[nn.Module], nn.Module]:
        if self.side is None:
            return METHODS[self.method].prepare
        return functools.partial(attach_side_network, config=SideNetworkConfig(**self.side))

    def settings(self) -> dict:
        """What tells this cell from others of its table, as it stands in the row."""
        private = math.isfinite(self.epsilon)
        method = METHODS[self.method]
        budget = {"batch_size": self.batch_size, "num_steps": self.num_steps} if private else {"batch_size": 32, "epochs": self.epochs}
        rates = self.rates or (method.private_rates if private else method.rates)
        chosen = {"without_noise": self.without_noise or None, "side": self.side, "num_train": self.num_train, "num_test": self.num_test,
                  "autocast": self.autocast or None, "model": self.model if self.model != _MODEL else None,
                  "num_directions": method.num_directions or None}
        return {**budget, "target_epsilon": self.epsilon if private else None, "max_tokens": self.max_tokens, "rates": list(rates),
                "clipping": self.clipping if private else None, "optimizer": "sgd" if method.num_directions else "adamw",
                "schedule": "linear", "code": code_of(self.method),
                **{name: value for name, value in chosen.items() if value is not None}}


@functools.lru_cache(None)
def syntax_of(module: str, only: tuple[str, ...] = ()) -> str:
    """Of a module, or of some functions and constants of it; without docstrings, comments and layout."""
    tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body[0].value.value = ""
    named = {}
    for node in tree.body:
        target = getattr(node, "targets", [getattr(node, "target", None)])[0]
        named[getattr(node, "name", None) or getattr(target, "id", None) or len(named)] = ast.dump(node)
    if unknown := set(only) - set(named):
        raise ValueError(f"{module}.py defines no {sorted(unknown, key=str)[0]}: its hash would be of something else")
    return "".join(text for name, text in named.items() if not only or name in only)


def hash_of_code(modules: tuple[str, ...], more: str = "", trained: bool = True) -> str:
    """Of what some modules and a text say, and if something was ``trained`` those that every training rests on."""
    digest = hashlib.sha256(more.encode())
    for module in (*(_SHARED_CODE if trained else ()), *modules):
        digest.update(syntax_of(module).encode())
    return digest.hexdigest()[:12]


def code_of(method: str) -> str:
    """Hash of the code that a method's result rests on, and of the side network that it attaches."""
    attached = getattr(METHODS[method].prepare, "keywords", None)
    return hash_of_code(METHODS[method].code, syntax_of("experiments", _RUNS_A_CELL) + repr(attached))


@functools.lru_cache(2)
def _data(name: str, max_tokens: int, model: str = _MODEL) -> tuple[dict[str, list], int]:
    """Rows by split, and the number of classes: of the public list, since a rare class that one example alone has would give it away."""
    tokenizer, texts = load_tokenizer(model), {split: load_text_dataset(name, split) for split in ("train", "validation", "test")}
    return ({split: tokenize_dataset(text, tokenizer, max_tokens).to_list() for split, text in texts.items()},
            texts["train"].features["label"].num_classes)


def run_cell(cell: Cell) -> dict[str, float | int]:
    """Trains and measures one cell: ``test_accuracy``, ``validation_accuracy``, ``share`` (of the parameters that train),
    ``num_train``, and of a private run ``epsilon``, ``sigma``, ``delta`` and ``sample_rate``."""
    method, (rows, labels) = METHODS[cell.method], _data(cell.dataset, cell.max_tokens, cell.model)
    rows = {split: _some(some, cell.num_train if split == "train" else cell.num_test) for split, some in rows.items()}
    torch.manual_seed(cell.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = cell.preparation()(load_backbone(cell.model, num_labels=labels)).to(device)
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=cell.autocast)

    def losses(model: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, " batch"]:
        with autocast():
            return training.classification_losses(model, batch)

    if method.cached:
        rows = {split: feature_cache.cache_features(model, some, progress=training.progress) for split, some in rows.items()}
    settings, size = cell.settings(), len(rows["train"])
    share = adapters.trainable_share(model)[2]
    found = {"num_train": size, "share": share}
    adamw = functools.partial(torch.optim.AdamW, training.parameter_groups(model, *settings["rates"]), weight_decay=0.0)
    if math.isfinite(cell.epsilon):
        plan = PrivacyPlan.from_epsilon(target_epsilon=cell.epsilon, delta=1 / (10 * size), dataset_size=size, num_steps=cell.num_steps,
                                        expected_batch_size=cell.batch_size, max_grad_norm=cell.max_grad_norm)
        plan = replace(plan, noise_multiplier=0.0) if cell.without_noise else plan
        sampling, noise = (torch.Generator(place).manual_seed(1000 + cell.seed) for place in ("cpu", device))
        shared = {"sampling_generator": sampling, "description": cell.method}
        if method.num_directions:
            inputs, labels = feature_cache.inputs_of_classifier(model, rows["train"])
            training.train_by_forward_passes(
                model.classifier, range(size), plan, settings["rates"][0],
                lambda head, batch: F.cross_entropy(head(batch["inputs"]), batch["labels"], reduction="none"),
                collate=lambda rows: {"inputs": inputs[rows], "labels": labels[rows]}, num_directions=method.num_directions,
                noise_generator=torch.Generator().manual_seed(1000 + cell.seed), physical_batch_size=4096,
                direction_seed_generator=torch.Generator().manual_seed(2000 + cell.seed), **shared)
        else:
            training.train_privately(model, rows["train"], plan, adamw(), losses, clipping=cell.clipping, physical_batch_size=64,
                                     noise_generator=noise, **shared)
        found.update(epsilon=plan.epsilon(), sigma=plan.noise_multiplier, delta=plan.delta, sample_rate=plan.sample_rate)
    else:
        training.train_without_privacy(model, rows["train"], adamw(), losses, num_epochs=cell.epochs, description=cell.method,
                                       generator=torch.Generator().manual_seed(cell.seed))
    with autocast():
        return {**found, **{f"{split}_accuracy": training.accuracy(model, rows[split]) for split in ("validation", "test")}}


def majority_share(cell: Cell) -> float:
    """Share of the largest class among the cell's test examples: what a model reaches that has learned nothing."""
    labels = [row["labels"] for row in _some(_data(cell.dataset, cell.max_tokens, cell.model)[0]["test"], cell.num_test)]
    return max(map(labels.count, set(labels))) / len(labels)


def _some(rows: list[dict], count: int | None) -> list[dict]:
    if count is not None and count > len(rows):
        raise ValueError(f"{count} examples were asked for, the split has {len(rows)}: take at most so many, or None for all")
    return rows if count is None else random.Random(0).sample(rows, count)


def name_of(model: str) -> str:
    """Of a backbone in the tables: the default's own."""
    return DEFAULT_MODEL if model == _MODEL else model


def table_of(experiment: str) -> Path:
    return RESULTS / f"{experiment}.csv"


def rows_of(cell: Cell) -> Iterator[tuple[dict, bool]]:
    """The rows of the cell's table that have all of its settings, of any seed; and whether today's code made them. C is a column of its
    own, which a row without privacy leaves empty."""
    path, wanted = table_of(cell.experiment), cell.settings()
    if not path.exists():
        return
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if (row["method"], row["dataset"]) == (cell.method, cell.dataset):
                have = json.loads(row["settings"])
                alike = {**have, "code": ""} == {**wanted, "code": ""}
                if alike and (not math.isfinite(cell.epsilon) or float(row["max_grad_norm"]) == cell.max_grad_norm):
                    yield row, canonical_code(cell.method, have["code"]) == canonical_code(cell.method, wanted["code"])


def finished(cell: Cell) -> bool:
    """Whether the cell's row is in its table.

    Raises:
        ValueError: the table has rows of the same setting that other code made.
    """
    found = False
    for row, same_code in rows_of(cell):
        if not same_code:
            theirs, ours = json.loads(row["settings"])["code"], cell.settings()["code"]
            raise ValueError(f"{table_of(cell.experiment).name} has rows of {cell.method} on {cell.dataset} that other code made "
                             f"({theirs}, now {ours}). If today's code changes no number, show it: python -m memarc_utils.grids recheck "
                             f"{cell.dataset} '{cell.method}'; else move them away, or check out the code that made them (commit {row['commit']})")
        found = found or (row["seed"] == str(cell.seed) and row["metric"] == _LAST_METRIC)
    return found


def recheck(cell: Cell) -> bool:
    """Runs a recorded cell again. If both accuracies come out equal, to the last digit in float32 and within half a point under
    autocast, ``data/results/same_results.json`` says so, and rows of the older code count as rows of today's for this method
    (`summary.canonical_code`).

    Returns:
        False if the cell's row is of today's code, or of code known to be the same: nothing was run.

    Raises:
        ValueError: the cell has no row, or the numbers differ.
    """
    wanted, recorded = cell.settings()["code"], {}
    for row, same_code in rows_of(cell):
        if row["seed"] == str(cell.seed):
            recorded.setdefault(json.loads(row["settings"])["code"], {"same": same_code})[row["metric"]] = float(row["value"])
    if not recorded:
        raise ValueError(f"{cell.method} on {cell.dataset} with seed {cell.seed} has no row to compare with: run the grid")
    others = {code: values for code, values in recorded.items() if not values.pop("same")}
    if not others:
        return False
    found = run_cell(cell)
    for code, values in others.items():
        again = {metric: found[metric] for metric in values}
        if any(abs(again[metric] - value) > (_ROUNDING if cell.autocast else 0) for metric, value in values.items()):
            raise ValueError(f"{cell.method} on {cell.dataset}: {values} by code {code}, {again} today. The rows are of another method "
                             f"now: move them out of {table_of(cell.experiment).name} and run the grid anew")
        path = RESULTS / "same_results.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        known.append({"method": cell.method, "dataset": cell.dataset, "seed": cell.seed,
                      "target_epsilon": cell.settings()["target_epsilon"], "old": canonical_code(cell.method, code), "new": wanted,
                      **again, **{f"before_{metric}": value for metric, value in values.items() if again[metric] != value},
                      "date": datetime.date.today().isoformat()})
        path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return True


def without_row(items: list, finished: Callable, shard: tuple[int, int], name: str) -> Iterator:
    """Of every n-th item from the i-th those that are not finished, under a progress bar. All are asked before the first is given out,
    and each again in its turn: another process may have run it in the meantime."""
    index, count = shard
    missing = [item for item in items[index::count] if not finished(item)]
    for item in training.progress(missing, name, len(missing)):
        if not finished(item):
            yield item


def run_grid(cells: list[Cell], shard: tuple[int, int] = (0, 1)) -> int:
    """Runs the cells that have no row yet, of every n-th from the i-th for ``shard`` (i, n), and appends two rows for each: validation
    and test accuracy. Returns how many ran.

    Raises:
        ValueError: see `finished`; found before anything runs.
    """
    ran = 0
    for cell in without_row(cells, finished, shard, "cells"):
        found, ran = run_cell(cell), ran + 1
        private = math.isfinite(cell.epsilon)
        for split in ("validation", "test"):  # in this order: `finished` looks for the last one
            append_result(table_of(cell.experiment), experiment=cell.experiment, method=cell.method, model=name_of(cell.model),
                          dataset=cell.dataset, num_train=found["num_train"], epsilon=found.get("epsilon", math.inf),
                          delta=found.get("delta"), accountant="pld" if private else None, noise_multiplier=found.get("sigma"),
                          sample_rate=found.get("sample_rate"), num_steps=cell.num_steps if private else None,
                          max_grad_norm=cell.max_grad_norm if private else None, seed=cell.seed, metric=f"{split}_accuracy",
                          value=found[f"{split}_accuracy"], unit="share", trainable_share=found["share"], settings=cell.settings())
    return ran
