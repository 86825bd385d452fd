"""The charts show what the table says, in the same look everywhere, and refuse a table they cannot draw."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from memarc_utils import plotting


@pytest.fixture(autouse=True)
def closed_figures():
    plotting.set_theme()
    yield
    plt.close("all")


TABLE = pd.DataFrame(
    {"method": ["non-private", "side"], "peak_memory_mb": [900.0, 300.0], "accuracy": [0.86, 0.79], "std": [0.01, 0.02]}
)


def test_no_two_methods_look_alike():
    styles = plotting.METHOD_STYLE.values()
    assert len({style.color for style in styles}) == len({style.marker for style in styles}) == len(styles)
    assert plotting.method_palette()["side"] == plotting.style("side").color


def test_memory_against_accuracy_draws_each_method_where_the_table_says():
    axes = plotting.plot_memory_against_accuracy(TABLE, accuracy_std="std")
    points = {line.get_marker(): line.get_xydata()[0].tolist() for line in axes.lines if line.get_marker() in "*P"}
    assert points == {"*": [900.0, 86.0], "P": [300.0, 79.0]}
    assert [text.get_text() for text in axes.texts] == ["non-private", "side network"]
    assert axes.get_xscale() == "log"


def test_names_can_be_left_to_a_legend():
    axes = plotting.plot_memory_against_accuracy(TABLE, names=False)
    assert [text.get_text() for text in axes.texts] == []
    assert axes.get_legend_handles_labels()[1] == ["non-private", "side network"]


def test_few_runs_are_drawn_hollow_and_labels_keep_apart():
    table = pd.DataFrame({"method": ["lora", "bitfit"], "peak_memory_mb": [100.0, 101.0], "accuracy": [0.73, 0.729], "n": [3, 2]})
    axes = plotting.plot_memory_against_accuracy(table, num_runs="n")
    assert {line.get_marker(): line.get_fillstyle() for line in axes.lines if line.get_marker() in "s^"} == {"s": "full", "^": "none"}
    assert [text.get_ha() for text in axes.texts] == ["left", "right"]


def test_bars_keep_the_order_of_the_table():
    axes = plotting.plot_bars(TABLE, "peak_memory_mb", label="MB", std="std")
    assert [bar.get_width() for bar in axes.patches] == [900.0, 300.0]
    assert [to_hex(bar.get_facecolor()).upper() for bar in axes.patches] == ["#000000", "#D55E00"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["non-private", "side network"]
    assert axes.yaxis_inverted()


def test_lines_know_methods():
    axes = plotting.plot_lines({"side": ([1, 2], [3, 4]), "PLD": ([1, 2], [5, 6])}, xlabel="T", ylabel="ε", log_y=True)
    assert [line.get_label() for line in axes.lines] == ["side network", "PLD"]
    assert axes.lines[0].get_color() == plotting.style("side").color
    assert axes.get_yscale() == "log" and axes.get_xscale() == "linear"


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda: plotting.plot_bars(TABLE, "seconds", label="s"), "no column seconds"),
        (lambda: plotting.plot_bars(TABLE[:0], "accuracy", label="s"), "has no row"),
        (lambda: plotting.plot_bars(TABLE.replace("side", "sde"), "accuracy", label="s"), "no style for method 'sde'"),
        (lambda: plotting.plot_memory_against_accuracy(TABLE, memory="mb"), "no column mb"),
        (lambda: plotting.plot_lines({"a": ([1, 2], [1])}, xlabel="", ylabel=""), "2 x values and 1 y values"),
        (lambda: plotting.plot_lines({}, xlabel="", ylabel=""), "no line"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, said):
    with pytest.raises(ValueError, match=said):
        draw()


def test_stacked_bars_add_up():
    table = TABLE.assign(weights=[500.0, 100.0], activations=[400.0, 200.0], name=["plain", "beside"])
    axes = plotting.plot_stacked_bars(table, ["weights", "activations"], label="MB", names="name")
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, 500), (0, 100), (500, 400), (100, 200)]
    assert [text.get_text() for text in axes.texts] == ["900", "300"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["plain", "beside"]
    assert [to_hex(label.get_color()).upper() for label in axes.get_yticklabels()] == ["#000000", "#D55E00"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["weights", "activations"]
    axes = plotting.plot_stacked_bars(table, ["weights"], label="MB", mark="peak_memory_mb")
    assert axes.lines[0].get_xydata().tolist() == [[900.0, 0.0], [300.0, 1.0]]
    assert [text.xy[0] for text in axes.texts] == [900, 300] and [text.get_text() for text in axes.texts] == ["900", "300"]  # the marked numbers
    with pytest.raises(ValueError, match="no part to draw"):
        plotting.plot_stacked_bars(table, [], label="MB")
    with pytest.raises(ValueError, match="below zero"):
        plotting.plot_stacked_bars(table.assign(weights=-1.0), ["weights"], label="MB")
    with pytest.raises(ValueError, match="no column gradients"):
        plotting.plot_stacked_bars(table, ["gradients"], label="MB")


STEPS = pd.DataFrame(
    {"method": ["full", "full", "lora", "lora"], "engine": ["non-private", "opacus hooks", "non-private", "book-keeping"],
     "time_ratio": [1.0, 1.4, 1.0, 1.2], "memory_ratio": [1.0, 6.0, 1.0, 1.1], "checkpointing": [False, False, False, True]}
)


def test_engines_have_a_panel_for_each_method_and_a_look_of_their_own():
    full, lora = plotting.plot_engines(STEPS, {"lora": "LoRA, T = 8"})
    assert (full.get_title(), lora.get_title()) == ("full fine-tuning", "LoRA, T = 8")
    points = {line.get_marker(): line.get_xydata()[0].tolist() for line in full.lines if line.get_marker() in ("*", ">")}
    assert points == {"*": [1.0, 1.0], ">": [6.0, 1.4]}
    assert [line.get_fillstyle() for line in lora.lines if line.get_marker() in ("*", "d")] == ["full", "none"]
    legend = [text.get_text() for text in full.figure.legends[0].get_texts()]
    assert legend == ["non-private", "opacus, hooks", "book-keeping, checkpointed"]
    looks = [look for name, look in {**plotting.METHOD_STYLE, **plotting.ENGINE_STYLE}.items()]
    assert len({look.color for look in looks}) == len({look.marker for look in looks}) == len(looks)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (STEPS.drop(columns="checkpointing"), "no column checkpointing"),
        (STEPS.replace("opacus hooks", "hooks"), "no style for engine 'hooks'"),
        (STEPS.replace("lora", "lra"), "no style for method 'lra'"),
        (STEPS.assign(time_ratio=0.0), "not above zero"),
    ],
)
def test_engines_that_cannot_be_drawn_are_refused(table, said):
    with pytest.raises(ValueError, match=said):
        plotting.plot_engines(table)
