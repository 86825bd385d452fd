"""The recorded experiments: grids of cells, one training run and one row of results a cell, that stop and go on.

``python -m memarc_utils.experiments film_reviews`` runs what is missing of a grid. Rows go to ``data/results``; a cell whose
row is there is skipped, so an interrupted run continues where it stopped. ``SHARD=1/4`` takes every fourth cell, the
second of them: several machines can share a grid. A row notes the code that made it (a hash of the modules' syntax trees
without docstrings), and a grid refuses to add to rows that other code made for the same setting.
``python -m memarc_utils.experiments steps`` measures what a step of each method takes, on a machine that does nothing else.
"""

import ast
import csv
import functools
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from memarc_utils import adapters, feature_cache, training
from memarc_utils.accounting import PrivacyPlan
from memarc_utils.backbones import REPOSITORY, load_backbone, load_tokenizer
from memarc_utils.benchmark import StepCase, measure_cases
from memarc_utils.couplings import ReversibleConfig
from memarc_utils.data import load_text_dataset, tokenize_dataset
from memarc_utils.recording import append_result
from memarc_utils.reversible import make_reversible
from memarc_utils.side_network import SideNetworkConfig, attach_side_network

RESULTS = REPOSITORY / "data" / "results"
_SHARED_CODE = ("accounting", "adapters", "backbones", "batch_selection", "book_keeping", "clipping", "data", "dp_sgd", "grad_sample",
                "layer_rules", "randomness", "training")
_MODEL = "default-encoder"
_LAST_METRIC = "test_accuracy"  # of a cell's rows


def _side(**settings) -> Callable[[nn.Module], nn.Module]:
    return lambda model: attach_side_network(model, SideNetworkConfig(reduction=8, layers=2, **settings))


def _probe_on_features(model: nn.Module) -> nn.Module:
    """The linear probe as a side network that never moves, so that it reads from the same kind of cache. ``layers=6`` taps the encoder's
    last block alone."""
    model = attach_side_network(model, SideNetworkConfig(reduction=8, layers=6, downsample="pooled", gate="none"))
    feature_cache.side_of(model).requires_grad_(False)
    return model


@dataclass(frozen=True)
class Method:
    """How a method prepares a model, and its rates.

    Chosen by validation accuracy on film reviews at ε = 8, one seed: the side network's private rates among (5e-4, 1e-2, 2e-2),
    (1e-3, 2e-2, 2e-2) and (2e-3, 4e-2, 4e-2), the probe's among 2e-2 and 5e-2 (the lower one, by stability). The other methods' rates
    are those of notebook 00 or starting points; no search has chosen them: give a cell ``rates`` of its own.

    Attributes:
        prepare: the model in place.
        private_rates: of AdamW for private training: of most parameters, of those that start at zero, of the head.
        rates: the same without privacy.
        cached: trains on features that were computed once.
        code: modules of its own, beside the engine's.
    """

    prepare: Callable[[nn.Module], nn.Module]
    private_rates: tuple[float, float, float]
    rates: tuple[float, float, float]
    cached: bool = False
    code: tuple[str, ...] = ()


_SIDE_CODE = ("side_network", "side_blocks", "feature_cache")
_SIDE_RATES = {"private_rates": (2e-3, 4e-2, 4e-2), "rates": (1e-3, 1e-3, 1e-3), "cached": True, "code": _SIDE_CODE}
METHODS: dict[str, Method] = {
    "linear-probe": Method(_probe_on_features, (2e-2, 2e-2, 2e-2), (2e-3, 2e-3, 2e-3), True, _SIDE_CODE),
    "side-cached": Method(_side(), **_SIDE_RATES),
    "side-cached mlp": Method(_side(block="mlp"), **_SIDE_RATES),
    "side-cached adapter": Method(_side(block="adapter"), **_SIDE_RATES),
    "side-cached low_rank": Method(_side(downsample="low_rank"), **_SIDE_RATES),
    "side-cached pooled": Method(_side(downsample="pooled"), **_SIDE_RATES),
    "side-cached orthogonal": Method(_side(downsample="orthogonal"), **_SIDE_RATES),
    "lora": Method(adapters.add_lora, (1e-3, 5e-3, 1e-1), (5e-4, 5e-4, 1e-3)),
    "ffa-lora": Method(lambda model: adapters.add_lora(model, freeze_a=True), (1e-3, 5e-3, 1e-1), (5e-4, 5e-4, 1e-3)),
    "adapters": Method(adapters.add_bottleneck_adapters, (1e-3, 5e-3, 1e-1), (5e-4, 5e-4, 1e-3)),
    "bitfit": Method(adapters.select_bias_terms, (5e-3, 5e-3, 1e-2), (1e-3, 1e-3, 1e-3)),
    "full": Method(adapters.train_everything, (5e-4, 5e-4, 5e-3), (5e-5, 5e-5, 1e-3)),
    "rev-lora": Method(lambda model: make_reversible(adapters.add_lora(model), ReversibleConfig()), (1e-3, 5e-3, 1e-1),
                       (5e-4, 5e-4, 1e-3), code=("couplings", "reversal", "reversible")),
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

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon must be above 0, or math.inf for training without privacy, got {self.epsilon!r}")
        for name, least in (("seed", 0), ("num_steps", 1), ("batch_size", 1), ("epochs", 1), ("max_tokens", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"{name} must be a whole number >= {least}, got {getattr(self, name)!r}")
        if self.rates is not None and (len(self.rates) != 3 or not all(rate > 0 for rate in self.rates)):
            raise ValueError("rates must be three numbers above 0 (of most parameters, of those that start at zero, of the head), got "
                             f"{self.rates!r}")

    def settings(self) -> dict:
        """What tells this cell from others of its table, as it stands in the row."""
        private = math.isfinite(self.epsilon)
        method = METHODS[self.method]
        budget = {"batch_size": self.batch_size, "num_steps": self.num_steps} if private else {"batch_size": 32, "epochs": self.epochs}
        rates = self.rates or (method.private_rates if private else method.rates)
        return {**budget, "target_epsilon": self.epsilon if private else None, "max_tokens": self.max_tokens, "rates": list(rates),
                "clipping": "automatic" if private else None, "optimizer": "adamw", "schedule": "linear", "code": code_of(method)}


@functools.lru_cache(None)
def _syntax(module: str) -> str:
    tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body[0].value.value = ""
    return ast.dump(tree)


def code_of(method: Method) -> str:
    """Hash of the code that a method's result rests on; docstrings, comments and layout do not count."""
    digest = hashlib.sha256()
    for module in (*_SHARED_CODE, *method.code):
        digest.update(_syntax(module).encode())
    return digest.hexdigest()[:12]


@functools.lru_cache(2)
def _data(name: str, max_tokens: int) -> dict:
    tokenizer = load_tokenizer(_MODEL)
    return {split: tokenize_dataset(load_text_dataset(name, split), tokenizer, max_tokens).to_list()
            for split in ("train", "validation", "test")}


def run_cell(cell: Cell) -> dict[str, float | int]:
    """Trains and measures one cell: ``test_accuracy``, ``validation_accuracy``, ``share`` (of the parameters that train),
    ``num_train``, and of a private run ``epsilon``, ``sigma``, ``delta`` and ``sample_rate``."""
    method, rows = METHODS[cell.method], _data(cell.dataset, cell.max_tokens)
    torch.manual_seed(cell.seed)
    labels = len({row["labels"] for row in rows["train"]})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = method.prepare(load_backbone(_MODEL, num_labels=labels)).to(device)
    if method.cached:
        rows = {split: feature_cache.cache_features(model, some, progress=training.progress) for split, some in rows.items()}
    settings, size = cell.settings(), len(rows["train"])
    share = adapters.trainable_share(model)[2]
    optimizer = torch.optim.AdamW(training.parameter_groups(model, *settings["rates"]), weight_decay=0.0)
    found = {"num_train": size, "share": share}
    if math.isfinite(cell.epsilon):
        plan = PrivacyPlan.from_epsilon(target_epsilon=cell.epsilon, delta=1 / (10 * size), dataset_size=size, num_steps=cell.num_steps,
                                        expected_batch_size=cell.batch_size, max_grad_norm=1.0)
        sampling, noise = (torch.Generator(place).manual_seed(1000 + cell.seed) for place in ("cpu", device))
        training.train_privately(model, rows["train"], plan, optimizer, physical_batch_size=64, sampling_generator=sampling,
                                 noise_generator=noise, description=cell.method)
        found.update(epsilon=plan.epsilon(), sigma=plan.noise_multiplier, delta=plan.delta, sample_rate=plan.sample_rate)
    else:
        training.train_without_privacy(model, rows["train"], optimizer, num_epochs=cell.epochs, description=cell.method,
                                       generator=torch.Generator().manual_seed(cell.seed))
    return {**found, **{f"{split}_accuracy": training.accuracy(model, rows[split]) for split in ("validation", "test")}}


def table_of(experiment: str) -> Path:
    return RESULTS / f"{experiment}.csv"


def finished(cell: Cell) -> bool:
    """Whether the cell's row is in its table.

    Raises:
        ValueError: the table has rows of the same setting that other code made.
    """
    path, wanted = table_of(cell.experiment), cell.settings()
    if not path.exists():
        return False
    with open(path, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == cell.method and row["dataset"] == cell.dataset]
    for row in rows:
        have = json.loads(row["settings"])
        if {**have, "code": ""} == {**wanted, "code": ""} and have["code"] != wanted["code"]:
            raise ValueError(f"{path.name} has rows of {cell.method} on {cell.dataset} that other code made ({have['code']}, now "
                             f"{wanted['code']}): move them away, or check out the code that made them (commit {row['commit']})")
        if have == wanted and row["seed"] == str(cell.seed) and row["metric"] == _LAST_METRIC:
            return True
    return False


def run_grid(cells: list[Cell], shard: tuple[int, int] = (0, 1)) -> int:
    """Runs the cells that have no row yet, and appends two rows for each: validation and test accuracy. Returns how many ran.

    Args:
        cells: all of the grid.
        shard: (i, n) takes the cells i, i + n, i + 2n, ....

    Raises:
        ValueError: see `finished`; found before anything runs.
    """
    index, count = shard
    missing = [cell for cell in cells[index::count] if not finished(cell)]
    for cell in training.progress(missing, "cells", len(missing)):
        found = run_cell(cell)
        private = math.isfinite(cell.epsilon)
        for split in ("validation", "test"):  # in this order: `finished` looks for the last one
            append_result(table_of(cell.experiment), experiment=cell.experiment, method=cell.method, model="all-MiniLM-L6-v2",
                          dataset=cell.dataset, num_train=found["num_train"], epsilon=found.get("epsilon", math.inf),
                          delta=found.get("delta"), accountant="pld" if private else None, noise_multiplier=found.get("sigma"),
                          sample_rate=found.get("sample_rate"), num_steps=cell.num_steps if private else None,
                          max_grad_norm=1.0 if private else None, seed=cell.seed, metric=f"{split}_accuracy",
                          value=found[f"{split}_accuracy"], unit="share", trainable_share=found["share"], settings=cell.settings())
    return len(missing)


def _grid(dataset: str, methods: list[str], **settings) -> list[Cell]:
    return [Cell("31_classification", dataset, method, epsilon, seed, **settings)
            for method in methods for epsilon in (8.0, 3.0, 1.0, math.inf) for seed in range(3)]


# Features that were computed once allow many steps of large batches in the time that a few small ones through the backbone take.
_CACHED = {"num_steps": 60, "batch_size": 1024}
_THROUGH = {"num_steps": 20, "batch_size": 512, "epochs": 1}
def _classification(dataset: str) -> list[Cell]:
    """The comparison that a reader looks for first comes first: an interrupted grid has answered something."""
    return [*_grid(dataset, ["linear-probe", "side-cached"], **_CACHED),
            *_grid(dataset, ["lora", "rev-lora", "bitfit"], **_THROUGH),
            *_grid(dataset, [name for name in METHODS if name.startswith("side-cached ")], **_CACHED),
            *_grid(dataset, ["full", "adapters", "ffa-lora"], **_THROUGH)]


GRIDS: dict[str, Callable[[], list[Cell]]] = {name: functools.partial(_classification, name) for name in ("film_reviews", "sst2")}


def _step_cases() -> list[StepCase]:
    """Every method of this collection beside DP-LoRA, in one run; depth by per-layer clipping; totals at RoBERTa-large's shape."""
    ours = [StepCase(method, "book-keeping") for method in ("lora", "side", "side-cached", "rev-lora", "bitfit")]
    deep = [StepCase("rev-lora", "book-keeping", shape, clipping="per_layer", repeats=1)
            for shape in ("roberta-base", "roberta-base-24", "roberta-base-48")]
    large = {"shape": "roberta-large", "batch_size": 8, "optimizer": "adamw", "repeats": 1}
    return [*ours, StepCase("lora", "book-keeping", checkpointing=True), StepCase("full", "zeroth order", repeats=3), *deep,
            *(StepCase(method, "book-keeping", **large) for method in ("side", "lora", "full"))]


def measure_steps(cases: list[StepCase]) -> None:
    """Measures one case after the other and appends seconds, peak and model size of each to ``data/results/step_costs.csv``. The machine
    must have nothing else to do."""
    nothing = dict.fromkeys(("num_train", "epsilon", "delta", "accountant", "sample_rate", "num_steps", "trainable_share"))
    metrics = {"seconds_per_step": ("seconds", "s"), "peak_memory": ("peak_mb", "MB"), "model_memory": ("model_mb", "MB")}
    for case in training.progress(cases, "steps", len(cases)):
        found = measure_cases([case]).iloc[0]
        settings = {name: value for name, value in asdict(case).items() if name != "method"}
        for metric, (column, unit) in metrics.items():
            append_result(table_of("step_costs"), experiment="step_costs", method=case.method, model=case.shape, seed=0,
                          dataset="random tokens", metric=metric, value=float(found[column]), unit=unit, settings=settings,
                          noise_multiplier=1.0, max_grad_norm=1.0, device="cpu", **nothing)


def main(arguments: list[str]) -> None:
    names = arguments or list(GRIDS)
    if names == ["steps"]:
        measure_steps(_step_cases())
        return
    if unknown := [name for name in names if name not in GRIDS]:
        raise SystemExit(f"unknown grid {unknown[0]}: write one of {', '.join(GRIDS)}; or steps, by itself, to measure time and memory")
    shard = os.environ.get("SHARD", "0/1")
    index, _, count = shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise SystemExit(f"SHARD must be i/n with 0 <= i < n, such as 1/4, got {shard!r}")
    for name in names:
        print(f"{name}: {run_grid(GRIDS[name](), (int(index), int(count)))} cells ran")


if __name__ == "__main__":
    main(sys.argv[1:])
