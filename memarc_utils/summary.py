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
EPSILONS = (1.0, 1.6, 3.0, 8.0, math.inf)
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
    "zeroth order, linear probe": ("zeroth-order", None, {}),
    "zeroth order, all parameters": (None, "full", {"engine": "zeroth order"}),
}
COST_OF = {in_grid: in_costs for in_grid, in_costs, _ in HEADLINE.values() if in_grid and in_costs}  # the same network's step


def marked(dataset: str) -> str:
    """The name, with a dagger where the default encoder has seen the data in its public training.

    >>> marked("qnli"), marked("sst2")
    ('qnli †', 'sst2')
    """
    return dataset + (" †" if CONTAMINATED.get(dataset) == DEFAULT_MODEL else "")


def canonical_code(method: str, code: str) -> str:
    """The newest code known to give a method the same numbers as this one: ``data/results/same_results.json`` lists recorded cells that
    were run again with other code and came out equal; under autocast, but for rounding (`experiments.recheck`). It vouches for the
    method, by one of its cells for each older code, not for every setting."""
    path = RESULTS / "same_results.json"
    rechecked = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    pairs = [(row["old"], row["new"]) for row in rechecked if row["method"] == method]
    alike, size = {code}, 0
    while len(alike) > size:
        size = len(alike)
        alike.update(each for pair in pairs if alike & set(pair) for each in pair)
    return next((new for _, new in reversed(pairs) if new in alike), code)


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

    Where a method was run with several settings, those with the most seeds count, and among them the best mean *validation* accuracy.
    Runs whose noise was taken out are left out: they are not private.

    Returns:
        Columns dataset, method, epsilon, mean, sd (NaN for one seed), n, share (of the parameters that train).
    """
    table = results_of(experiment)
    table = table[(table["model"] == model) & ~table["settings"].map(lambda s: bool(s.get("without_noise")))].copy()
    table["target"] = [s.get("target_epsilon") or math.inf for s in table["settings"]]
    table["setting"] = [f"{json.dumps(s, sort_keys=True)} C={bound}" for s, bound in zip(table["settings"], table["max_grad_norm"])]
    keys = ["dataset", "method", "target", "setting"]
    table = table.drop_duplicates([*keys, "seed", "metric"], keep="last")  # a cell that stopped between its rows ran again
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
            found = costs[(costs["method"] == in_costs) & (costs["clipping"] == "flat")
                          & (costs["engine"] == settings.get("engine", "book-keeping"))
                          & (costs["optimizer"] == "sgd")]
            found = found[found["checkpointing"] == settings.get("checkpointing", False)]
            if len(found):
                row = {"peak memory": f"{found['memory_ratio'].iloc[0]:.3f}", "time of a step": f"{found['time_ratio'].iloc[0]:.2f}"}
        for epsilon in EPSILONS:
            found = accuracy[(accuracy["method"] == in_grid) & (accuracy["epsilon"] == epsilon)]
            row[_title(epsilon)] = _cell(next(found.itertuples())) if len(found) else ""
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def _plan_goals() -> list[tuple[str, str, float, float]]:
    """Whole planned steps at B = 32, T = 128."""
    plans = results_of("30_memory")
    totals = {(row.model, row.settings["case"], row.settings["fused_attention"]): row.value for row in plans.itertuples()}
    rows = []
    for model in ("roberta-large", "gpt2-large"):
        for over, than_lora, than_full in (("side", 3.3, 6.0), ("side every second block", 3.3, 6.0), ("rev-lora", 3.0, 5.0),
                                           ("rev-lora, per layer", 3.0, 5.0)):
            for fused in (False, True):
                rows += [(f"{model}, whole step: {name} over {over}" + (", fused attention" if fused else ""), "least", least,
                          totals[model, case, fused] / totals[model, over, fused])
                         for name, case, least in (("DP-LoRA", "lora", than_lora), ("full DP", "full", than_full),
                                                   ("checkpointed DP-LoRA", "lora, checkpointed", 1.0))]
    return rows


def goals() -> pd.DataFrame:
    """What this project set out to reach beside what its recorded rows say: columns goal, reached, met; a row each."""
    costs, large = (step_costs(*shape).query("clipping == 'flat'").set_index(["method", "engine", "checkpointing"])
                    for shape in (("roberta-base",), ("roberta-large", 8)))
    rows = []
    for name, method, engine, peak, seconds in (("side network", "side", "book-keeping", 0.15, 0.60),
                                                ("DP-BiTFiT", "bitfit", "book-keeping", 0.97, 1.0),
                                                ("side network, cached", "side-cached learned", "book-keeping", 0.08, 0.10),
                                                ("side network, cached, pooled", "side-cached", "book-keeping", 0.08, 0.10),
                                                ("zeroth order, one direction", "full", "zeroth order", 0.10, None)):
        found = costs.loc[(method, engine, False)]
        rows.append((f"{name}: peak of a step over DP-LoRA's", "most", peak, found["memory_ratio"]))
        rows += [(f"{name}: time of a step over DP-LoRA's", "most", seconds, found["time_ratio"])] if seconds else []
    whole = {method: large.loc[(method, "book-keeping", False), ["peak_mb", "model_mb"]].sum()
             for method in ("full", "lora", "side", "side every second block")}
    rows += [(f"roberta-large, batch 8, whole step measured: {name} over {side}", "least", least, whole[method] / whole[side])
             for side in ("side", "side every second block") for name, method, least in (("full DP", "full", 4.0), ("DP-LoRA", "lora", 1.7))]
    rows += _plan_goals()
    table = accuracies()
    table = table[(table["n"] >= 3) & ~table["method"].str.startswith("side-cached ")]
    for dataset in ("film_reviews", "sst2"):
        at = table[table["dataset"] == dataset].pivot(index="method", columns="epsilon", values="mean") * 100
        rows += [(f"{dataset}, ε = {epsilon:g}: cached side network over the best other method (points)", "least", -0.5,
                  at.loc["side-cached", epsilon] - at.drop("side-cached")[epsilon].max()) for epsilon in (1.0, 3.0, 8.0)]
        price = at.loc["side-cached", math.inf] - at.loc["side-cached", 8.0]
        rows.append((f"{dataset}: what ε = 8 costs the cached side network (points)", "most", 2.0, price))
    found = pd.DataFrame(rows, columns=["what", "kind", "bound", "value"]).set_index("what")
    met = [value <= bound if kind == "most" else value >= bound for kind, bound, value in found.itertuples(index=False)]
    return pd.DataFrame({"goal": [f"at {kind} {bound:g}" for kind, bound in zip(found["kind"], found["bound"])],
                         "reached": [f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}" for value in found["value"]],
                         "met": ["yes" if each else "no" for each in met]}, index=found.index)


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
