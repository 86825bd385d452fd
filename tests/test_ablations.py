"""`ablations`: a recorded run is read, only when everything agrees; anything else is run; nothing is written."""

import math

import pytest

from memarc_utils import ablations, experiments
from memarc_utils.experiments import Cell, code_of
from memarc_utils.recording import append_result


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """A folder of results of its own, and runs that are only counted."""
    done = []

    def run(cell):
        done.append(cell)
        return {"validation_accuracy": 0.5, "test_accuracy": 0.25, "share": 0.1, "sigma": 2.0, "num_train": 10}

    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    monkeypatch.setattr(ablations, "run_cell", run)
    return done


def cell(seed=0, epsilon=8.0, method="side-cached", **settings):
    return Cell("grid", "film_reviews", method, epsilon, seed, **settings)


def recorded(cell, value, splits=("validation", "test"), **changed):
    private = math.isfinite(cell.epsilon)
    for split in splits:
        append_result(experiments.table_of("grid"), **{**dict(
            experiment="grid", method=cell.method, model="m", dataset=cell.dataset, num_train=10, epsilon=cell.epsilon,
            delta=1e-5 if private else None, accountant="pld" if private else None, noise_multiplier=0.7 if private else None,
            sample_rate=0.1 if private else None, num_steps=cell.num_steps if private else None,
            max_grad_norm=cell.max_grad_norm if private else None, seed=cell.seed, metric=f"{split}_accuracy", value=value,
            unit="share", trainable_share=0.2, settings=cell.settings()), **changed})


def test_a_recorded_cell_is_read_and_the_others_run(runs):
    recorded(cell(), 0.75)
    recorded(cell(epsilon=math.inf), 0.875)
    table = ablations.measured([cell(1), cell(), cell(epsilon=math.inf)])
    assert runs == [cell(1)]
    assert table["test_accuracy"].tolist() == [0.25, 0.75, 0.875] and table["validation_accuracy"].tolist() == [0.5, 0.75, 0.875]
    assert table["recorded"].tolist() == [False, True, True] and table["sigma"].tolist() == [2.0, 0.7, 0.0]
    assert table["seed"].tolist() == [1, 0, 0] and table["same_code"].all()
    before = experiments.table_of("grid").read_text()
    ablations.measured([cell()], fresh=True)
    assert runs == [cell(1), cell()] and experiments.table_of("grid").read_text() == before


@pytest.mark.parametrize("other", [
    cell(1), cell(epsilon=3.0), cell(epsilon=math.inf), cell(method="linear-probe"), cell(num_steps=51), cell(batch_size=1000),
    cell(max_tokens=47), cell(clipping="flat"), cell(max_grad_norm=0.5), cell(rates=(1e-3, 1e-3, 1e-3)), cell(num_train=100),
    cell(num_test=100), cell(side={"reduction": 8, "layers": 2}),
], ids=lambda other: "")
def test_a_row_of_another_setting_does_not_count(other, runs):
    recorded(cell(), 0.75)
    ablations.measured([other])
    assert runs == [other]


def test_a_cell_that_was_cut_off_runs_again(runs):
    recorded(cell(), 0.75, splits=("validation",))
    assert ablations.measured([cell()])["test_accuracy"].tolist() == [0.25]


def test_rows_of_other_code_are_marked(runs):
    recorded(cell(), 0.75, settings={**cell().settings(), "code": "000000000000"})
    assert code_of("side-cached") != "000000000000"
    assert ablations.measured([cell()])[["recorded", "same_code"]].values.tolist() == [[True, False]]


def test_no_cell_and_a_cell_twice_are_refused(runs):
    with pytest.raises(ValueError, match="no cell"):
        ablations.measured([])
    with pytest.raises(ValueError, match="twice"):
        ablations.measured([cell(), cell(1), cell()])
    assert runs == []
