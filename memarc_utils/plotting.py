"""One look for every figure: a theme, one colour and marker a method, and the few charts that several notebooks need.

Each chart takes a plain table (a DataFrame with one row a method) and returns its Axes, so that a notebook can add to
it. Figures come out as PNG at moderate size. The sentence below a figure becomes its alt text when it is refreshed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter


@dataclass(frozen=True)
class Style:
    """How one method is drawn, and what it is called in a legend."""

    color: str
    marker: str
    label: str


# Colours apart for colour-blind readers (Okabe and Ito's eight, and three of their shades); markers differ as well.
METHOD_STYLE = {
    "non-private": Style("#000000", "*", "non-private"),
    "full": Style("#999999", "o", "full fine-tuning"),
    "lora": Style("#0072B2", "s", "LoRA"),
    "ffa-lora": Style("#56B4E9", "D", "FFA-LoRA"),
    "adapters": Style("#CC79A7", "p", "adapters"),
    "bitfit": Style("#E69F00", "^", "BiTFiT"),
    "linear-probe": Style("#8C6D1F", "x", "linear probe"),
    "side": Style("#D55E00", "P", "side network"),
    "side-cached": Style("#8A3B00", "X", "side network, cached"),
    "reversible": Style("#009E73", "v", "reversible"),
    "zeroth-order": Style("#6A4C93", "h", "zeroth order"),
}
_SAME = {"rev-lora": "reversible", "probe": "linear-probe"}  # other names in the tables of results


def set_theme() -> None:
    """Set the look of all figures: seaborn's white grid, and a size at which a notebook stays small."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")
    plt.rcParams.update({"figure.figsize": (7.0, 4.0), "figure.dpi": 90, "axes.spines.top": False})
    plt.rcParams.update({"axes.spines.right": False, "legend.frameon": False, "lines.linewidth": 2.0})


def style(method: str) -> Style:
    """Colour, marker and label of a method.

    Raises:
        ValueError: a method that has no style.
    """
    method = _SAME.get(method, method)
    if method not in METHOD_STYLE:
        raise ValueError(f"there is no style for method {method!r}; the methods are {', '.join(METHOD_STYLE)}")
    return METHOD_STYLE[method]


def label(method: str) -> str:
    """A method's name for readers; a variant stands in brackets, and what has no style keeps its key.

    >>> label("rev-lora"), label("side-cached mlp"), label("something else")
    ('reversible', 'side network, cached (mlp)', 'something else')
    """
    base, _, variant = method.partition(" ")
    if _SAME.get(base, base) not in METHOD_STYLE:
        return method
    return style(base).label + (f" ({variant})" if variant else "")


def method_palette() -> dict[str, str]:
    """`{method: colour}`, as seaborn takes it: `sns.lineplot(..., hue="method", palette=method_palette())`."""
    return {method: METHOD_STYLE[method].color for method in METHOD_STYLE}


def _checked(table: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in table.columns]
    if missing or not len(table):
        what = f"has no column {', '.join(missing)}" if missing else "has no row"
        raise ValueError(f"the table {what}; it needs one row a method and the columns {', '.join(columns)}")


def plot_memory_against_accuracy(
    table: pd.DataFrame,
    *,
    memory: str = "peak_memory_mb",
    accuracy: str = "accuracy",
    accuracy_std: str | None = None,
    num_runs: str | None = None,
    names: bool = True,
    axes: Axes | None = None,
) -> Axes:
    """Accuracy of each method over the memory it needs: up and to the left is better.

    Args:
        table: one row a method, with the columns `method` and the ones named here.
        memory: column of the peak memory above the loaded model, in MB (drawn on a logarithmic axis).
        accuracy: column of the test accuracy, between 0 and 1 (mean over seeds).
        accuracy_std: column of its standard deviation over seeds, drawn as a bar.
        num_runs: column of the number of seeds; fewer than 3 are drawn hollow.
        names: write each method's beside its mark; where marks lie close together leave them to a legend.
        axes: where to draw; a new figure when left out.

    Raises:
        ValueError: a missing column, an empty table, an unknown method.
    """
    _checked(table, ["method", memory, accuracy, *filter(None, (accuracy_std, num_runs))])
    axes = plt.subplots()[1] if axes is None else axes
    placed: list[tuple[float, float]] = []
    near = 0.12 * max(1.0, 100 * (table[accuracy].max() - table[accuracy].min()))
    for _, row in table.sort_values(accuracy, ascending=False).iterrows():
        look, at = style(row["method"]), (row[memory], 100 * row[accuracy])
        axes.errorbar(
            *at,
            yerr=100 * row[accuracy_std] if accuracy_std else None,
            fmt=look.marker,
            color=look.color,
            markersize=11,
            capsize=4,
            fillstyle="none" if num_runs and row[num_runs] < 3 else "full",
            label=look.label,
        )
        if not names:
            continue
        crowded = any(abs(math.log(at[0] / x)) < 0.5 and abs(at[1] - y) < near for x, y in placed)
        offset, side = ((-10, -16), "right") if crowded else ((10, 6), "left")
        axes.annotate(look.label, at, xytext=offset, textcoords="offset points", ha=side)
        placed.append(at)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.1, high * (1.6 if names else 1.1))  # room for the last name
    axes.margins(y=0.2)
    axes.set_xlabel("peak memory above the model (MB, logarithmic)")
    axes.set_ylabel("test accuracy (%)")
    return axes


def plot_bars(
    table: pd.DataFrame, value: str, *, label: str, std: str | None = None, decimals: int = 1, axes: Axes | None = None
) -> Axes:
    """One horizontal bar a method, in the order of the table (baseline first), each with its number.

    Args:
        table: one row a method, with the columns `method` and the ones named here.
        value: column of the numbers.
        label: the axis label, with the unit: `"seconds a step"`.
        std: column of the standard deviation over seeds, drawn as a line.
        decimals: digits after the point of the numbers at the bars.
        axes: where to draw; a new figure when left out.

    Raises:
        ValueError: a missing column, an empty table, an unknown method.
    """
    _checked(table, ["method", value] + ([std] if std else []))
    looks = [style(method) for method in table["method"]]
    axes = plt.subplots(figsize=(7.0, 0.5 * len(table) + 1.0))[1] if axes is None else axes
    deviations = table[std].to_list() if std else None
    bars = axes.barh(
        range(len(table)), table[value].to_list(), xerr=deviations, color=[look.color for look in looks], capsize=4
    )
    axes.bar_label(bars, fmt=f"%.{decimals}f", padding=4)
    axes.set_yticks(range(len(table)), [look.label for look in looks])
    axes.invert_yaxis()  # the first row on top
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    axes.set_xlabel(label)
    return axes


def plot_lines(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
    log_y: bool = False,
    axes: Axes | None = None,
) -> Axes:
    """Curves over one axis, such as ε over steps by accountant. A key that is a method gets the method's look.

    Args:
        lines: `{label or method: (x, y)}`, drawn in this order.
        xlabel: label of the horizontal axis, with its unit.
        ylabel: label of the vertical axis, with its unit.
        log_x: horizontal axis logarithmic.
        log_y: vertical axis logarithmic.
        axes: where to draw; a new figure when left out.

    Raises:
        ValueError: nothing to draw, or x and y of different length.
    """
    if not lines:
        raise ValueError("there is no line to draw; give {label: (x, y)}")
    axes = plt.subplots()[1] if axes is None else axes
    for name, (x, y) in lines.items():
        if len(x) != len(y):
            raise ValueError(f"line {name!r} has {len(x)} x values and {len(y)} y values; give as many of each")
        look = METHOD_STYLE.get(name)
        if look is None:
            axes.plot(x, y, label=name)
        else:
            axes.plot(x, y, label=look.label, color=look.color, marker=look.marker)
    axes.set_xscale("log" if log_x else "linear")
    axes.set_yscale("log" if log_y else "linear")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if len(lines) > 1:
        axes.legend()
    return axes


def plot_stacked_bars(
    table: pd.DataFrame,
    columns: Sequence[str],
    *,
    label: str,
    names: str | None = None,
    mark: str | None = None,
    decimals: int = 0,
    axes: Axes | None = None,
) -> Axes:
    """One horizontal bar a method, made of parts, in the order of the table (baseline first), each with its sum,
    or with the number that is marked on it.

    Parts have colours of their own; a method's colour is that of its name.

    Args:
        table: one row a method, with the columns `method` and the ones named here.
        columns: the parts, from left to right, as the legend calls them.
        label: the axis label, with the unit: `"memory (MB)"`.
        names: column of the names at the bars, for variants of one method; the methods' labels when left out.
        mark: column drawn as a diamond on its bar, such as a measured peak beside the parts that were added up.
        decimals: digits after the point of the sums.
        axes: where to draw; a new figure when left out.

    Raises:
        ValueError: no part, a missing column, an empty table, an unknown method, a part below zero.
    """
    if not columns:
        raise ValueError("there is no part to draw; name the columns that add up")
    _checked(table, ["method", *columns] + [column for column in (names, mark) if column])
    if (table[list(columns)] < 0).any(axis=None):
        raise ValueError("a part is below zero; parts that add up cannot be negative")
    looks = [style(method) for method in table["method"]]
    axes = plt.subplots(figsize=(8.0, 0.5 * len(table) + 1.6))[1] if axes is None else axes
    rows, ends, shown = range(len(table)), pd.Series(0.0, index=table.index), []
    for column, color in zip(columns, sns.color_palette("mako_r", len(columns))):
        shown.append(axes.barh(rows, table[column].to_list(), left=ends.to_list(), color=color, label=column))
        ends = ends + table[column]
    if mark:
        shown += axes.plot(table[mark].to_list(), rows, "D", color="black", markeredgecolor="white", label=mark)
    for row, number, right in zip(rows, table[mark] if mark else ends, ends.combine(table[mark], max) if mark else ends):
        axes.annotate(f"{number:.{decimals}f}", (right, row), xytext=(8, 0), textcoords="offset points", va="center")
    axes.set_yticks(rows, table[names].to_list() if names else [look.label for look in looks])
    for tick, look in zip(axes.get_yticklabels(), looks):
        tick.set(color=look.color, fontweight="bold")
    axes.invert_yaxis()  # the first row on top
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    axes.set_xlabel(label)
    axes.legend(handles=shown, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, columnspacing=1.2)
    return axes


# Engines are no methods, so their colours are others (of Tol's muted set); a step without an engine is the black star.
ENGINE_STYLE = {
    "non-private": METHOD_STYLE["non-private"],
    "book-keeping": Style("#117733", "d", "book-keeping"),
    "opacus hooks": Style("#AA4499", ">", "opacus, hooks"),
    "opacus ghost": Style("#332288", "<", "opacus, ghost"),
}


def plot_engines(table: pd.DataFrame, titles: Mapping[str, str] | None = None) -> list[Axes]:
    """Time against memory of a step, relative to the same step without privacy: down and to the left is better.

    Args:
        table: one row a step, with the columns `method`, `engine`, `time_ratio`, `memory_ratio` and `checkpointing`; a
            panel for each method, filled marks without activation checkpointing and hollow ones with it.
        titles: `{method: title of its panel}`; the methods' labels when left out.

    Raises:
        ValueError: a missing column, an empty table, an unknown engine or method, a ratio that is not above zero.
    """
    _checked(table, ["method", "engine", "time_ratio", "memory_ratio", "checkpointing"])
    if unknown := sorted(set(table["engine"]) - set(ENGINE_STYLE)):
        raise ValueError(f"there is no style for engine {unknown[0]!r}; the engines are {', '.join(ENGINE_STYLE)}")
    if not (table[["time_ratio", "memory_ratio"]] > 0).all(axis=None):
        raise ValueError("a ratio is not above zero; give time and memory over those of the non-private step")
    methods = list(dict.fromkeys(table["method"]))
    names = {method: style(method).label for method in methods} | dict(titles or {})
    size = (1.0 + 3.4 * len(methods), 3.9)
    figure, panels = plt.subplots(1, len(methods), figsize=size, squeeze=False, layout="constrained")
    shown = {}
    for axes, method in zip(panels[0], methods):
        for _, row in table[table["method"] == method].iterrows():
            look = ENGINE_STYLE[row["engine"]]
            label = look.label + (", checkpointed" if row["checkpointing"] else "")
            filling = "none" if row["checkpointing"] else "full"
            shown[label] = axes.plot(
                row["memory_ratio"], row["time_ratio"], look.marker, color=look.color, markersize=12, fillstyle=filling
            )[0]
        axes.axhline(1, color="0.45", linewidth=1, zorder=1)
        axes.axvline(1, color="0.45", linewidth=1, zorder=1)
        axes.set(title=names[method], xlabel="memory over non-private")
        axes.margins(0.15)
        axes.set_xlim(min(axes.get_xlim()[0], 0.9), max(axes.get_xlim()[1], 1.5))
        axes.set_ylim(min(axes.get_ylim()[0], 0.9), max(axes.get_ylim()[1], 1.5))
    panels[0][0].set_ylabel("time over non-private")
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=min(3, len(shown)), numpoints=1)
    return list(panels[0])
