"""Tables of the recorded runs in ``data/results``: what the README and the summary notebook show, and nothing by hand."""

import json
import math
from pathlib import Path

import pandas as pd

from memarc_utils.plotting import label

# Pairs of data and backbone where the backbone's public training saw the data: no private data for it (its model card).
DEFAULT_MODEL = "all-MiniLM-L6-v2"  # what the default encoder is
CONTAMINATED = {"mnli": DEFAULT_MODEL, "qnli": DEFAULT_MODEL, "qqp": DEFAULT_MODEL}
RESULTS = Path(__file__).resolve().parents[1] / "data" / "results"
EPSILONS = (1.0, 3.0, 8.0, math.inf)
# Rows of the README's table: name there, method in the accuracy grid, method and settings in the step costs.
HEADLINE = {
    "full fine-tuning": ("full", "full", {}),
    "DP-LoRA": ("lora", "lora", {"checkpointing": False}),
    "DP-LoRA, checkpointed": (None, "lora", {"checkpointing": True}),
    "DP-FFA-LoRA": ("ffa-lora", "ffa-lora", {}),
    "adapters": ("adapters", "adapters", {}),
    "DP-BiTFiT": ("bitfit", "bitfit", {}),
    "linear probe": ("linear-probe", "probe", {}),
    "reversible, LoRA": ("rev-lora", "rev-lora", {}),
    "side network": (None, "side", {}),
    "side network, cached": ("side-cached", "side-cached learned", {}),
    "side network, cached, pooled": (None, "side-cached", {}),
}
COST_OF = {in_grid: in_costs for in_grid, in_costs, _ in HEADLINE.values() if in_grid and in_costs}  # the same network's step


def canonical_code(method: str, code: str) -> str:
    """The newest code known to give a method the same numbers as this one: ``data/results/same_results.json`` lists recorded cells that
    were run again with other code and came out equal; under autocast, but for rounding (`experiments.recheck`)."""
    path = RESULTS / "same_results.json"
    rechecked = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    newer = {row["old"]: row["new"] for row in rechecked if row["method"] == method}
    while code in newer:
        code = newer.pop(code)
    return code


def results_of(experiment: str) -> pd.DataFrame:
    """The rows of ``data/results/<experiment>.csv``, with a column ``settings`` of dictionaries.

    Raises:
        ValueError: nothing is recorded under this name.
    """
    path = RESULTS / f"{experiment}.csv"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in RESULTS.glob("*.csv")))
        raise ValueError(f"nothing is recorded as {experiment!r}: take one of {known}, or record it first")
    table = pd.read_csv(path)
    settings = table["settings"].map(json.loads)
    for method, each in zip(table["method"], settings):
        if "code" in each:
            each["code"] = canonical_code(method, each["code"])
    return table.assign(settings=settings)


def accuracies(experiment: str = "31_classification", model: str = DEFAULT_MODEL) -> pd.DataFrame:
    """Test accuracy of a model by each method on each data set at each target ε (``inf``: without privacy) over its seeds.

    Where a method was run with several settings, those with the best mean *validation* accuracy count.

    Returns:
        Columns dataset, method, epsilon, mean, sd (NaN for one seed), n, share (of the parameters that train).
    """
    table = results_of(experiment)
    table = table[table["model"] == model].copy()
    table["target"] = [s.get("target_epsilon") or math.inf for s in table["settings"]]
    table["setting"] = [f"{json.dumps(s, sort_keys=True)} C={bound}" for s, bound in zip(table["settings"], table["max_grad_norm"])]
    keys = ["dataset", "method", "target", "setting"]
    validation = table[table["metric"] == "validation_accuracy"].groupby(keys)["value"].mean()
    tested = table[table["metric"] == "test_accuracy"].groupby(keys).agg(
        mean=("value", "mean"), sd=("value", "std"), n=("seed", "nunique"), share=("trainable_share", "first"))
    tested["validation"] = validation
    best = tested.reset_index().sort_values(["n", "validation"]).groupby(keys[:3], sort=False).tail(1)
    return best.rename(columns={"target": "epsilon"})[["dataset", "method", "epsilon", "mean", "sd", "n", "share"]].sort_values(
        keys[:2] + ["epsilon"]).reset_index(drop=True)


def accuracy_table(dataset: str, experiment: str = "31_classification") -> pd.DataFrame:
    """One row a method, one column an ε; each cell ``mean ± sd (n)`` in percent, empty where nothing is recorded."""
    table = accuracies(experiment)
    table = table[table["dataset"] == dataset]
    if table.empty:
        raise ValueError(f"no run on {dataset!r} is recorded in {experiment}: run its grid first (make experiments)")
    wide = {label(method): {_title(row.epsilon): _cell(row) for row in rows.itertuples()}
            for method, rows in table.groupby("method", sort=False)}
    return pd.DataFrame.from_dict(wide, orient="index", columns=[_title(e) for e in EPSILONS]).fillna("").rename_axis("method")


def step_costs(shape: str = "roberta-base", batch_size: int = 16, num_tokens: int = 128) -> pd.DataFrame:
    """Measured peak above the loaded model and seconds of one step of each method, and both over DP-LoRA's in the same run: the last
    that was recorded before it, since a run begins with DP-LoRA.

    Returns:
        Columns method, engine, checkpointing, clipping, optimizer, peak_mb, model_mb, seconds, memory_ratio, time_ratio.
    """
    table = results_of("step_costs")
    settings = pd.json_normalize(table["settings"].tolist())
    table = pd.concat([table[["method", "metric", "value"]], settings], axis=1)
    table = table[(table["shape"] == shape) & (table["batch_size"] == batch_size) & (table["num_tokens"] == num_tokens)]
    keys = ["method", "engine", "checkpointing", "clipping", "optimizer"]
    base = (table["method"] == "lora") & ~table["checkpointing"].astype(bool) & (table["clipping"] == "flat") & (table["optimizer"] == "sgd")
    over = table.assign(value=table["value"] / table["value"].where(base).groupby(table["metric"]).ffill())
    over["metric"] = over["metric"].map({"peak_memory": "memory_ratio", "seconds_per_step": "time_ratio"})
    wide = pd.concat([table, over.dropna(subset=["metric", "value"])]).pivot_table(index=keys, columns="metric", values="value",
                                                                                   aggfunc="last", sort=False).reset_index()
    wide = wide.rename(columns={"peak_memory": "peak_mb", "model_memory": "model_mb", "seconds_per_step": "seconds"})
    return wide.rename_axis(columns=None)


def headline(dataset: str = "film_reviews") -> pd.DataFrame:
    """Memory and time of a step over DP-LoRA's (RoBERTa-base's shape), and accuracy with MiniLM on a data set, a row a method."""
    costs, accuracy = step_costs(), accuracies()
    if dataset not in set(accuracy["dataset"]):
        raise ValueError(f"no run on {dataset!r} is recorded: take one of {', '.join(accuracy['dataset'].unique())}, or run its grid first")
    accuracy = accuracy[accuracy["dataset"] == dataset]
    rows = {}
    for name, (in_grid, in_costs, settings) in HEADLINE.items():
        row = {"peak memory": "", "time of a step": ""}
        if in_costs:
            found = costs[(costs["method"] == in_costs) & (costs["engine"] == "book-keeping") & (costs["clipping"] == "flat")
                          & (costs["optimizer"] == "sgd")]
            found = found[found["checkpointing"] == settings.get("checkpointing", False)]
            if len(found):
                row = {"peak memory": f"{found['memory_ratio'].iloc[0]:.3f}", "time of a step": f"{found['time_ratio'].iloc[0]:.2f}"}
        for epsilon in EPSILONS:
            found = accuracy[(accuracy["method"] == in_grid) & (accuracy["epsilon"] == epsilon)]
            row[_title(epsilon)] = _cell(next(found.itertuples())) if len(found) else ""
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def as_markdown(table: pd.DataFrame) -> str:
    """A table as GitHub shows it.

    >>> print(as_markdown(pd.DataFrame({"a": ["1"]}, index=pd.Index(["x"], name="method"))))
    | method | a |
    |---|---|
    | x | 1 |
    """
    lines = [[table.index.name or "", *table.columns], *([index, *row] for index, row in zip(table.index, table.astype(str).to_numpy()))]
    text = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(lines[0]), *text[1:]])


def _title(epsilon: float) -> str:
    return f"ε = {epsilon:g}" if math.isfinite(epsilon) else "no privacy"


def _cell(row) -> str:
    spread = f" ± {100 * row.sd:.1f}" if row.n > 1 else ""
    return f"{100 * row.mean:.1f}{spread} ({row.n})"


if __name__ == "__main__":
    print(as_markdown(headline()))
