"""`experiments`: a grid goes on where it stopped, keeps rows of other code apart, and can be shared among machines."""

import csv
import dataclasses
import functools
import json
import math
from pathlib import Path

import pytest

from memarc_utils import experiments, grids, summary
from memarc_utils.benchmark import StepCase
from memarc_utils.data import load_text_dataset, tokenize_dataset
from memarc_utils.experiments import METHODS, Cell, code_of, finished, recheck, run_cell, run_grid
from memarc_utils.grids import GRIDS, main
from memarc_utils.training import train_by_forward_passes


@functools.lru_cache(1)
def sixty_rows(name, max_tokens, model="default-encoder"):
    tokenizer = experiments.load_tokenizer("default-encoder")
    return {split: tokenize_dataset(load_text_dataset(name, split).select(range(60)), tokenizer, max_tokens).to_list()
            for split in ("train", "validation", "test")}, 2


@pytest.fixture
def few_rows(monkeypatch, tmp_path):
    """Sixty reviews, ten tokens each, and a folder of results of its own."""
    monkeypatch.setattr(experiments, "_data", sixty_rows)
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    monkeypatch.setattr(experiments.feature_cache, "REPOSITORY", tmp_path)
    return tmp_path


def cell(method="linear-probe", epsilon=8.0, seed=0, **settings):
    small = {"num_steps": 2, "batch_size": 20, "epochs": 1, "max_tokens": 10}
    return Cell("grid", "film_reviews", method, epsilon, seed, **{**small, **settings})


def rows_of(folder):
    with open(folder / "grid.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_its_share_is_its_own(method, few_rows):
    found = run_cell(cell(method))
    assert 0 <= found["test_accuracy"] <= 1 and 7.99 < found["epsilon"] <= 8
    assert found["share"] == 1.0 if method == "full" else 0 < found["share"] < 0.05
    assert math.isfinite(found["sigma"]) and found["num_train"] == 60


def test_zeroth_order_trains_the_head_alone_as_through_the_whole_model(few_rows, monkeypatch):
    """Its shortcut, the classifier's inputs computed once, against steps that run the model anew for each of 2 K passes."""
    monkeypatch.setattr(experiments, "METHODS", {**METHODS, "zeroth-order": dataclasses.replace(METHODS["zeroth-order"], num_directions=3)})
    wanted, trained = run_cell(cell("zeroth-order")), []

    def whole(head, dataset, plan, rate, losses, *, collate, **options):
        model, rows = trained[-1]
        return train_by_forward_passes(model, rows, plan, rate, **options)

    monkeypatch.setattr(experiments.feature_cache, "inputs_of_classifier", lambda model, rows: (trained.append((model, rows)), 0))
    monkeypatch.setattr(experiments.training, "train_by_forward_passes", whole)
    assert run_cell(cell("zeroth-order")) == wanted and trained
    assert cell("zeroth-order").settings()["optimizer"] == "sgd" and cell("zeroth-order").settings()["num_directions"] == 3


@pytest.mark.parametrize("change", [{"epsilon": math.inf}, {"clipping": "automatic"}, {"rates": (1.0, 2.0, 1.0)}, {"model": "roberta-large"}])
def test_what_zeroth_order_does_not_do_is_refused(change):
    with pytest.raises(ValueError, match='trains the default model.s linear classifier, privately.*model="default-encoder", a finite epsilon'):
        cell("zeroth-order", **change)


def test_a_grid_goes_on_where_it_stopped(few_rows):
    cells = [cell(seed=seed, epsilon=epsilon) for seed in (0, 1) for epsilon in (8.0, math.inf)]
    assert run_grid(cells[:1]) == 1
    first = rows_of(few_rows)
    assert [row["metric"] for row in first] == ["validation_accuracy", "test_accuracy"]
    assert run_grid(cells, shard=(1, 2)) == 2 and run_grid(cells) == 1 and run_grid(cells) == 0
    rows = rows_of(few_rows)
    assert rows[:2] == first and len(rows) == 8
    assert {(row["seed"], row["epsilon"] == "inf") for row in rows} == {(seed, open_) for seed in "01" for open_ in (True, False)}
    assert all(not finished(other) for other in (cell(seed=2), cell(batch_size=21), cell("lora"), cell(rates=(1e-3, 1e-3, 1e-3))))


def test_cells_of_another_bound_are_other_cells(few_rows):
    assert run_grid([cell(clipping="flat", max_grad_norm=bound) for bound in (1.0, 0.1)]) == 2
    assert [row["max_grad_norm"] for row in rows_of(few_rows)] == ["1.0", "1.0", "0.1", "0.1"]
    assert not finished(cell(clipping="flat", max_grad_norm=0.5))


def test_a_cell_that_another_process_has_done_is_left(few_rows, monkeypatch):
    asked = iter([False, True])  # when the grid is looked through, and when the cell's turn has come
    monkeypatch.setattr(experiments, "finished", lambda cell: next(asked))
    assert run_grid([cell()]) == 0 and not (few_rows / "grid.csv").exists()


def test_a_cell_stopped_between_its_rows_runs_again(few_rows):
    run_grid([cell()])
    path = few_rows / "grid.csv"
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    assert not finished(cell()) and run_grid([cell()]) == 1 and finished(cell())


def test_rows_of_other_code_are_not_added_to(few_rows):
    run_grid([cell()])
    path = few_rows / "grid.csv"
    path.write_text(path.read_text(encoding="utf-8").replace(code_of("linear-probe"), "0123456789ab"), encoding="utf-8")
    with pytest.raises(ValueError, match="rows of linear-probe on film_reviews that other code made .0123456789ab, now"):
        run_grid([cell(seed=1)])
    assert len(rows_of(few_rows)) == 2


def test_a_recorded_cell_that_comes_out_equal_makes_its_code_count(few_rows, monkeypatch):
    monkeypatch.setattr(summary, "RESULTS", few_rows)
    run_grid([cell()])
    path, today = few_rows / "grid.csv", code_of("linear-probe")
    assert not recheck(cell())  # today's code: nothing to show
    recorded = path.read_text(encoding="utf-8")
    path.write_text(recorded.replace(today, "0123456789ab"), encoding="utf-8")
    assert recheck(cell()) and not recheck(cell())
    assert summary.canonical_code("linear-probe", "0123456789ab") == today != summary.canonical_code("lora", "0123456789ab")
    run_grid([cell(), cell(seed=1)])
    table = summary.results_of("grid")
    assert len(table) == 4 and {settings["code"] for settings in table["settings"]} == {today}


def test_a_recorded_cell_that_comes_out_otherwise_is_told(few_rows, monkeypatch):
    monkeypatch.setattr(summary, "RESULTS", few_rows)
    run_grid([cell()])
    path = few_rows / "grid.csv"
    with open(path, encoding="utf-8", newline="") as file:
        value = next(row["value"] for row in csv.DictReader(file) if row["metric"] == "test_accuracy")
    text = path.read_text(encoding="utf-8").replace(code_of("linear-probe"), "0123456789ab")
    path.write_text(text.replace(value, "0.123"), encoding="utf-8")
    with pytest.raises(ValueError, match="The rows are of another method now"):
        recheck(cell())
    with pytest.raises(ValueError, match="has no row to compare with"):
        recheck(cell(seed=5))


def test_autocast_may_round_otherwise(few_rows, monkeypatch):
    """Two examples of a thousand decided otherwise are rounding, twenty are another method; in float32 two are, too."""
    monkeypatch.setattr(summary, "RESULTS", few_rows)
    rounded = cell("lora", autocast=True)
    run_grid([rounded, cell()])
    path, ran = few_rows / "grid.csv", {one.method: run_cell(one) for one in (rounded, cell())}
    text = path.read_text(encoding="utf-8")
    for one in (rounded, cell()):
        text = text.replace(code_of(one.method), "0123456789ab")
    path.write_text(text, encoding="utf-8")
    for off, refused in ((0.002, ["linear-probe"]), (0.02, ["linear-probe", "lora"])):
        monkeypatch.setattr(experiments, "run_cell", lambda one: {**ran[one.method], "test_accuracy": ran[one.method]["test_accuracy"] + off})
        for one in (cell(), rounded):
            (few_rows / "same_results.json").unlink(missing_ok=True)
            if one.method in refused:
                with pytest.raises(ValueError, match="The rows are of another method now"):
                    recheck(one)
            else:
                assert recheck(one)
                assert "before_test_accuracy" in (few_rows / "same_results.json").read_text(encoding="utf-8")


def test_a_cell_without_noise_is_the_private_one_with_sigma_zero(few_rows):
    noisy, bare = run_cell(cell()), run_cell(cell(without_noise=True))
    assert bare["sigma"] == 0 and math.isinf(bare["epsilon"]) and noisy["sigma"] > 0
    assert cell().settings().keys() ^ cell(without_noise=True).settings().keys() == {"without_noise"}
    with pytest.raises(ValueError, match="without_noise takes the noise out of a private run's steps"):
        cell(epsilon=math.inf, without_noise=True)


def test_the_share_of_the_largest_class(few_rows):
    labels = [row["labels"] for row in sixty_rows("film_reviews", 10)[0]["test"]]
    ones = sum(labels)
    assert experiments.majority_share(cell()) == max(ones, len(labels) - ones) / len(labels)


def test_a_recheck_of_what_is_not_there_is_told(few_rows):
    for arguments in ([], ["film_reviews"], ["film_reviews", "nothing"], ["nowhere", "lora"], ["film_reviews", "lora", "more"]):
        with pytest.raises(SystemExit, match="write recheck film_reviews lora"):
            main(["recheck", *arguments])


def test_docstrings_and_comments_are_no_other_code(monkeypatch, tmp_path):
    module = tmp_path / "clipping.py"
    monkeypatch.setattr(experiments, "__file__", str(tmp_path / "experiments.py"))
    hashes = []
    for text in ('"""One."""\ndef f(x):\n    """Two."""\n    return x\n',
                 '"""Other."""\n\n# why\ndef f(x):\n    """Words."""\n    return (x)\n',
                 '"""One."""\ndef f(x):\n    """Two."""\n    return -x\n'):
        module.write_text(text, encoding="utf-8")
        experiments.syntax_of.cache_clear()
        hashes.append(experiments.syntax_of("clipping"))
    experiments.syntax_of.cache_clear()
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("part", ["the network", "how a cell runs", "a rule of the engine"])
def test_what_makes_a_number_is_in_the_code_of_a_cell(part, monkeypatch, few_rows):
    """Rows of a side network of another width, of another loop, or by another rule for a layer, are not rows of the same cell."""
    one = cell("side-cached")
    before = one.settings()["code"]
    if part == "the network":
        monkeypatch.setitem(METHODS, "side-cached", dataclasses.replace(METHODS["side-cached"], prepare=experiments._side(layers=3)))
    else:
        changed = ("experiments", "return rows") if part == "how a cell runs" else ("function_rules", "return")
        read = Path.read_text
        monkeypatch.setattr(Path, "read_text", lambda path, **how: read(path, **how).replace(changed[1], f"pass\n    {changed[1]}", 1)
                            if path.name == f"{changed[0]}.py" else read(path, **how))
        experiments.syntax_of.cache_clear()
    assert one.settings()["code"] != before
    experiments.syntax_of.cache_clear()


def test_another_model_has_rows_of_its_own(few_rows, monkeypatch):
    assert "model" not in cell().settings() and cell(model="elsewhere").settings()["model"] == "elsewhere"
    load = experiments.load_backbone
    monkeypatch.setattr(experiments, "load_backbone", lambda name, **options: load("default-encoder", **options))
    assert run_grid([cell()]) == run_grid([cell(model="elsewhere")]) == 1
    assert [row["model"] for row in rows_of(few_rows)] == ["all-MiniLM-L6-v2"] * 2 + ["elsewhere"] * 2
    monkeypatch.setattr(summary, "RESULTS", few_rows)
    assert summary.accuracies("grid")["n"].tolist() == summary.accuracies("grid", "elsewhere")["n"].tolist() == [1]


def test_plans_are_compared_once(monkeypatch, tmp_path):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    case = StepCase("lora", "book-keeping", "tiny", batch_size=32, num_tokens=128, threads=1, repeats=1)
    for _ in range(2):
        grids.compare_plans([case], "grid")
    rows = rows_of(tmp_path)
    assert [row["metric"] for row in rows] == ["planned_peak", "measured_peak"]
    planned, measured = (float(row["value"]) for row in rows)
    assert 0.5 < planned / measured < 1.2  # some MB of libraries' own beside 13 MB


def test_plans_of_whole_steps_are_recorded_once(monkeypatch, tmp_path):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    for _ in range(2):
        grids.record_plans(("tiny",), "grid")
    rows = rows_of(tmp_path)
    cases = {(json.loads(row["settings"])["case"], json.loads(row["settings"])["fused_attention"]): float(row["value"]) for row in rows}
    assert len(rows) == len(cases) == 20 and cases["full", True] <= cases["full", False] < cases["full, per-example gradients", False]


@pytest.mark.parametrize("grid", ["side_width", "batch_size"])
def test_an_ablations_grid_is_what_is_recorded(grid):
    """What notebooks 40 and 43 read is the grid that the command goes on with."""
    cells = GRIDS[grid]()
    rows = summary.results_of(cells[0].experiment)

    def key(method, seed, settings, epsilon):
        return json.dumps([method, seed, {**settings, "code": ""}, math.isfinite(epsilon)], sort_keys=True)

    recorded = {key(row.method, row.seed, row.settings, 8.0 if row.settings.get("without_noise") else row.epsilon)
                for row in rows.itertuples()}
    assert {key(c.method, c.seed, c.settings(), c.epsilon) for c in cells} <= recorded  # older rates are there too


def test_settings_are_json_and_tell_cells_apart():
    cells = [c for grid in GRIDS.values() for c in grid()]
    keys = [(c.experiment, c.dataset, c.method, c.seed, c.max_grad_norm, json.dumps(c.settings(), sort_keys=True, allow_nan=False))
            for c in cells]
    assert len(set(keys)) == len(keys)


def test_what_cannot_run_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="method must be one of linear-probe"):
        cell("prefix")
    with pytest.raises(ValueError, match="epsilon must be above 0"):
        cell(epsilon=0.0)
    for change, message in ((dict(epochs=0), "epochs must be a whole number >= 1"), (dict(seed=-1), "seed must be a whole number >= 0"),
                            (dict(num_steps=0), "num_steps must be a whole number >= 1"),
                            (dict(method="side-cached", side={"foo": 1}), "side has no setting 'foo': take some of reduction"),
                            (dict(rates=(1e-3, 0.1, 0.0)), "rates must be three numbers above 0")):
        with pytest.raises(ValueError, match=message):
            cell(**change)
    with pytest.raises(SystemExit, match="unknown grid mars"):
        main(["mars"])
    for shard in ("2/2", "one", "1/2/3"):
        monkeypatch.setenv("SHARD", shard)
        with pytest.raises(SystemExit, match="SHARD must be i/n"):
            main(["film_reviews"])
