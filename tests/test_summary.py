"""The README's tables are those of the recorded rows, rebuilt here from the CSV files alone."""

import csv
import json
import math
import re
import statistics
from collections import defaultdict
from pathlib import Path

import pandas as pd
import pytest

from memarc_utils import data, experiments, summary
from memarc_utils.backbones import tiny_backbone
from memarc_utils.methods import METHODS
from memarc_utils.side_network import SideNetwork

ROOT = Path(__file__).resolve().parents[1]


def rows_of(name):
    with open(ROOT / "data" / "results" / f"{name}.csv", encoding="utf-8", newline="") as file:
        return [{**row, "settings": json.loads(row["settings"])} for row in csv.DictReader(file)]


def table_in(text, marker):
    """A markdown table between two comments: {row name: {column: cell}}."""
    found = re.search(rf"<!-- {marker} -->\n(.*?)\n<!-- /{marker} -->", text, re.S)
    assert found, f"README.md has no <!-- {marker} --> ... <!-- /{marker} -->"
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in found.group(1).splitlines()]
    header, _, *body = lines
    return {row[0]: dict(zip(header[1:], row[1:])) for row in body}


def rebuilt_accuracy():
    """(dataset, method, target ε) to (mean, sd, n) of the settings that validate best, without pandas. Codes that were found to give the
    same results count as one."""
    values = defaultdict(lambda: defaultdict(dict))
    again = json.loads((ROOT / "data" / "results" / "same_results.json").read_text(encoding="utf-8"))
    for row in rows_of("31_classification"):
        target = row["settings"].get("target_epsilon") or math.inf
        same = {row["settings"]["code"]}  # grows by what was found to be the same, until nothing is new
        while more := {code for one in again if one["method"] == row["method"] and same & {one["old"], one["new"]}
                       for code in (one["old"], one["new"])} - same:
            same |= more
        row["settings"]["code"] = min(same)
        setting = json.dumps(row["settings"], sort_keys=True) + row["max_grad_norm"]
        values[row["dataset"], row["method"], target][setting].setdefault(row["metric"], {})[row["seed"]] = float(row["value"])
    found = {}
    for key, settings in values.items():
        tested = {s: v for s, v in settings.items() if "test_accuracy" in v}
        best = max(tested.values(), key=lambda v: (len(v["test_accuracy"]), statistics.mean(v["validation_accuracy"].values())))
        numbers = list(best["test_accuracy"].values())
        found[key] = statistics.mean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else math.nan, len(numbers)
    return found


def test_accuracies_are_the_rows():
    want = rebuilt_accuracy()
    got = {(row.dataset, row.method, row.epsilon): (row.mean, row.sd, row.n) for row in summary.accuracies().itertuples()}
    assert got.keys() == want.keys()
    for key, values in want.items():
        assert got[key] == pytest.approx(values, rel=1e-9, nan_ok=True), key


def test_the_readmes_table_is_rebuilt_from_the_rows():
    shown = table_in((ROOT / "README.md").read_text(encoding="utf-8"), "headline")
    peaks, seconds, bases = {}, {}, {}
    for row in rows_of("step_costs"):
        s = row["settings"]
        if (s["shape"], s["clipping"], s["optimizer"], s["batch_size"], s["num_tokens"]) == ("roberta-base", "flat", "sgd", 16, 128):
            which = {"peak_memory": peaks, "seconds_per_step": seconds}.get(row["metric"])
            if which is not None:
                key = row["method"], s["checkpointing"], s["engine"]
                bases[row["metric"]] = float(row["value"]) if key == ("lora", False, "book-keeping") else bases[row["metric"]]  # a run begins with it
                which[key] = float(row["value"]) / bases[row["metric"]]
    accuracy = rebuilt_accuracy()
    for name, (in_grid, in_costs, settings) in summary.HEADLINE.items():
        key = in_costs, settings.get("checkpointing", False), settings.get("engine", "book-keeping")
        want = {"peak memory": f"{peaks[key]:.3f}" if key in peaks else "", "time of a step": f"{seconds[key]:.2f}" if key in seconds else ""}
        for title, epsilon in (("ε = 1", 1.0), ("ε = 1.6", 1.6), ("ε = 3", 3.0), ("ε = 8", 8.0), ("no privacy", math.inf)):
            cell = accuracy.get(("film_reviews", in_grid, epsilon))
            spread = f" ± {100 * cell[1]:.1f}" if cell and cell[2] > 1 else ""
            want[title] = f"{100 * cell[0]:.1f}{spread} ({cell[2]})" if cell else ""
        assert shown[name] == want, name
    assert shown.keys() == summary.HEADLINE.keys()


def test_the_readme_shows_what_the_summary_makes():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert summary.as_markdown(summary.headline()) in text, "run: python -m memarc_utils.summary, and put its table into README.md"


def test_contaminated_pairs_are_those_of_the_cards():
    named = {name for name, spec in data._SOURCES.items() if spec.contaminated_for}
    assert set(summary.CONTAMINATED) & set(data._SOURCES) == named


def test_settings_that_validate_best_count(tmp_path, monkeypatch):
    rows = [("a", seed, metric, value, setting) for setting, validation, test in ((1, 0.6, 0.9), (2, 0.7, 0.5)) for seed in range(2)
            for metric, value in (("validation_accuracy", validation), ("test_accuracy", test + seed / 100))]
    table = pd.DataFrame([{"model": summary.DEFAULT_MODEL, "dataset": "d", "method": m, "seed": s, "metric": k, "value": v, "trainable_share": 0.1,
                           "max_grad_norm": 1.0, "settings": json.dumps({"target_epsilon": 3.0, "x": x})} for m, s, k, v, x in rows])
    table.to_csv(tmp_path / "31_classification.csv", index=False)
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    found = summary.accuracies().iloc[0]
    assert found["mean"] == pytest.approx(0.505) and found["n"] == 2 and found["sd"] == pytest.approx(statistics.stdev([0.5, 0.51]))
    assert summary.accuracy_table("d").loc["a", "ε = 3"] == "50.5 ± 0.7 (2)"
    bare = table.assign(settings=json.dumps({"target_epsilon": 3.0, "x": 3, "without_noise": True}), value=0.99)  # no privacy at all
    stopped = (table["metric"] == "validation_accuracy") & (table["seed"] == 0) & (table["settings"] == table["settings"].iloc[-1])
    twice = table[stopped].assign(value=0.1)  # of the better setting, stopped between its rows, run again
    pd.concat([twice, table, bare]).to_csv(tmp_path / "31_classification.csv", index=False)
    assert summary.accuracies().iloc[0].to_dict() == found.to_dict() and len(summary.accuracies()) == 1
    with pytest.raises(ValueError, match="no run on 'e'"):
        summary.accuracy_table("e")
    monkeypatch.setattr(summary, "step_costs", lambda: None)
    with pytest.raises(ValueError, match="no run on 'e' is recorded: take one of d"):
        summary.headline("e")
    with pytest.raises(ValueError, match="nothing is recorded as 'x'"):
        summary.results_of("x")


@pytest.mark.parametrize(("in_grid", "in_costs"), summary.COST_OF.items())
def test_a_row_of_the_headline_speaks_of_one_network(in_grid, in_costs):
    """Accuracy and memory of a row come from two tables with names of their own: what trains must be the same."""
    def backbone():
        model = tiny_backbone("bert", layers=4)
        model.bert.pooler = None  # as in the default encoder, which pools by a mean
        return model

    prepared = [prepare(backbone()) for prepare in (experiments.METHODS[in_grid].prepare, METHODS[in_costs])]
    assert len({sum(p.numel() for p in model.parameters() if p.requires_grad) for model in prepared}) == 1
    sides = [[part.side_config for part in model.modules() if isinstance(part, SideNetwork)] for model in prepared]
    assert in_grid == "linear-probe" or sides[0] == sides[1]


def test_codes_that_give_the_same_numbers_are_one(tmp_path, monkeypatch):
    """Also where older code came back."""
    pairs = [("a", "b"), ("b", "c"), ("c", "a"), ("x", "y")]
    rows = [{"method": "m", "old": old, "new": new} for old, new in pairs] + [{"method": "n", "old": "a", "new": "x"}]
    (tmp_path / "same_results.json").write_text(json.dumps(rows))
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    assert {summary.canonical_code("m", code) for code in "abc"} == {"a"}
    assert summary.canonical_code("m", "x") == "y" and summary.canonical_code("n", "b") == "b"


def test_goals_say_what_the_rows_say():
    """Four of them by hand from the files: a cost, a measured whole step, a plan, an accuracy; and which way they are met."""
    found = summary.goals()

    def last(name, metric, **wanted):
        with open(summary.RESULTS / f"{name}.csv", encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["metric"] == metric]
        return [float(row["value"]) for row in rows if wanted.items() <= {**row, **json.loads(row["settings"])}.items()][-1]

    step = {"model": "roberta-base", "engine": "book-keeping", "clipping": "flat", "checkpointing": False, "batch_size": 16}
    peaks = [last("step_costs", "peak_memory", method=method, **step) for method in ("side", "lora")]
    large = {**step, "model": "roberta-large", "batch_size": 8}
    whole = [sum(last("step_costs", metric, method=method, **large) for metric in ("peak_memory", "model_memory"))
             for method in ("full", "side")]
    plans = [last("30_memory", "planned_whole_step", model="roberta-large", case=case, fused_attention=True) for case in ("lora", "side")]
    price = [100 * summary.accuracies().query("dataset == 'film_reviews' and method == 'side-cached' and epsilon == @e")["mean"].item()
             for e in (math.inf, 8.0)]
    for what, value in (("side network: peak of a step over DP-LoRA's", peaks[0] / peaks[1]),
                        ("roberta-large, batch 8, whole step measured: full DP over side", whole[0] / whole[1]),
                        ("roberta-large, whole step: DP-LoRA over side, fused attention", plans[0] / plans[1]),
                        ("film_reviews: what ε = 8 costs the cached side network (points)", price[0] - price[1])):
        kind, bound = found.loc[what, "goal"].split()[1:]
        assert float(found.loc[what, "reached"]) == pytest.approx(value, abs=6e-3)
        assert (found.loc[what, "met"] == "yes") == (value <= float(bound) if kind == "most" else value >= float(bound))
    for row in found.itertuples():  # far from rounding, the words say it too
        kind, bound = row.goal.split()[1:]
        if abs(float(row.reached) - float(bound)) > 0.01:
            assert row.met == ("yes" if (float(row.reached) < float(bound)) == (kind == "most") else "no"), row


@pytest.mark.parametrize("name", ["31_classification", "90_summary"])
def test_the_committed_notebooks_show_todays_rows(name):
    """Every cell of the tables that they print is in their stored outputs: appended rows make them stale."""
    stored = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    shown = json.dumps([cell.get("outputs", []) for cell in stored["cells"]], ensure_ascii=False)
    tables = [summary.accuracy_table(dataset) for dataset in summary.accuracies()["dataset"].unique()]
    tables += [summary.headline(), summary.goals().drop(columns="met")] if name == "90_summary" else []
    missing = [value for table in tables for value in table.to_numpy().ravel() if value not in shown]
    assert not missing, f"make refresh NOTEBOOK={name[:2]}: {len(missing)} values are not in it, {missing[0]} for one"
