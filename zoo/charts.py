"""Figures, and tables in rows of cells, of what was measured: loss curves, quality against state, speed against length.

Rows are those of CSV files, `zoo.plots` says of which; every value is text.
"""

from collections.abc import Iterator, Sequence
from itertools import cycle

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

Row = dict[str, str]

_MARKERS = "osD^vP*X"


def draw_losses(rows: Sequence[Row]) -> Figure:
    """The training loss of each run over its tokens, its held-out losses as points."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    held_out = [split for split in _values(rows, "split") if split != "training"]
    for color, run in _colored(_values(rows, "run")):
        own = [row for row in rows if row["run"] == run]
        axes.plot(*_points(own, "tokens", "loss", split="training"), color=color, linewidth=1, label=run)
        for marker, split in zip(cycle(_MARKERS), held_out, strict=False):
            points = _points(own, "tokens", "loss", split=split)
            axes.plot(*points, color=color, linestyle="none", marker=marker, markersize=4)
    for marker, split in zip(cycle(_MARKERS), held_out, strict=False):
        axes.plot([], [], color="gray", linestyle="none", marker=marker, markersize=4, label=f"held-out {split}")
    axes.set(xlabel="tokens", ylabel="loss, nats a token")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def tabulate_losses(rows: Sequence[Row]) -> list[list[str]]:
    """The last losses of each run."""
    splits = _values(rows, "split")
    header = ["training", *(f"held-out {split}" for split in splits if split != "training")]
    cells = [["run", "parameters", "tokens", *(f"{name}, nats a token" for name in header)]]
    for run in _values(rows, "run"):
        own = [row for row in rows if row["run"] == run]
        last = {row["split"]: f"{float(row['loss']):.3f}" for row in own}
        tokens = max(int(row["tokens"]) for row in own)
        cells.append([run, f"{int(own[0]['parameters']):,}", f"{tokens:,}", *(last.get(split, "") for split in splits)])
    return cells


def draw_quality(rows: Sequence[Row]) -> Figure:
    """A panel for each setting of a task: the first metric over the state; a line where the state grows."""
    rows = _of_first_metric(rows)
    settings = _values(rows, "setting")
    columns = min(3, len(settings))
    lines = -(-len(settings) // columns)
    figure = Figure(figsize=(2.5 * columns + 2, 2.2 * lines + 0.5), layout="constrained")
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    handles = []
    for color, model in _colored(_values(rows, "model")):
        own = [row for row in rows if row["model"] == model]
        grows = not own[0]["state_bytes"]
        for axes, setting in zip(panels, settings, strict=False):
            for row in (row for row in own if row["setting"] == setting):
                if grows:
                    axes.axhline(float(row["value"]), color=color, linestyle="--", linewidth=1)
                else:
                    _point(axes, row, color)
        label = f"{model} (grows)" if grows else model
        style = {"linestyle": "--"} if grows else {"linestyle": "none", "marker": "o"}
        handles.append(Line2D([], [], color=color, label=label, **style))
    for axes, setting in zip(panels, settings, strict=False):
        axes.set_title(setting, fontsize="small")
        axes.tick_params(labelbottom=True, labelsize="small")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(EngFormatter(unit="B", sep=" "))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if states := [float(row["state_bytes"]) for row in rows if row["state_bytes"]]:
        low, high = min(states) / 1.8, max(states) * 1.8
        panels[0].set_xlim(low, high)  # of all panels
        panels[0].xaxis.set_major_locator(_few_ticks(low, high))
    for axes in panels[len(settings) :]:
        axes.set_axis_off()
    if rows[0]["metric"].startswith("acc"):
        panels[0].set_ylim(-0.05, 1.05)
    figure.supxlabel("state of a sequence", fontsize="medium")
    figure.supylabel(f"{rows[0]['task']}, {rows[0]['metric']}", fontsize="medium")
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def _few_ticks(low: float, high: float) -> LogLocator:
    """Ticks of a logarithmic axis, as many as a small panel has room for."""
    for digits in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        locator = LogLocator(subs=digits)
        if sum(low <= tick <= high for tick in locator.tick_values(low, high)) <= 4:
            break
    return locator


def _point(axes: Axes, row: Row, color: object) -> None:
    error = float(row["stderr"]) if row["stderr"] else None
    axes.errorbar(float(row["state_bytes"]), float(row["value"]), yerr=error, color=color, marker="o", markersize=5)


def tabulate_quality(rows: Sequence[Row]) -> list[list[str]]:
    """The first metric of each model in each setting; of several seeds, one behind the other."""
    rows = _of_first_metric(rows)
    settings, metric = _values(rows, "setting"), rows[0]["metric"]
    cells = [["model", "parameters", "state, bytes", *(setting or metric for setting in settings)]]
    for model in _values(rows, "model"):
        own = [row for row in rows if row["model"] == model]
        state = f"{int(own[0]['state_bytes']):,}" if own[0]["state_bytes"] else "grows"
        found = (", ".join(_with_error(row) for row in own if row["setting"] == setting) for setting in settings)
        cells.append([model, f"{int(own[0]['parameters']):,}", state, *found])
    return cells


def _with_error(row: Row) -> str:
    return f"{float(row['value']):.3f}" + (f" ± {float(row['stderr']):.3f}" if row["stderr"] else "")


def _of_first_metric(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["metric"] == rows[0]["metric"]]


def draw_speed(rows: Sequence[Row]) -> Figure:
    """A panel for each pass: tokens a second of each model over the length."""
    passes = _values(rows, "pass")
    figure = Figure(figsize=(3.2 * len(passes) + 1.5, 3.4), layout="constrained")
    panels = figure.subplots(1, len(passes), squeeze=False)[0]
    for color, model in _colored(_values(rows, "model")):
        for axes, which in zip(panels, passes, strict=True):
            points = _points(rows, "length", "tokens_per_second", model=model, **{"pass": which})
            axes.plot(*points, color=color, marker="o", markersize=4, label=model)
    for axes, which in zip(panels, passes, strict=True):
        axes.set(xscale="log", yscale="log", title=which, xlabel="tokens of the sequence")
        lengths = sorted({int(row["length"]) for row in rows})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], minor=False)
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.yaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("tokens a second")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def tabulate_speed(rows: Sequence[Row]) -> list[list[str]]:
    """Tokens a second of each model, in each pass, at each length."""
    lengths = sorted(_values(rows, "length"), key=int)
    cases = [(which, length) for which in _values(rows, "pass") for length in lengths]
    cells = [["model", "parameters", *(f"{which}, {int(length):,}" for which, length in cases)]]
    for model in _values(rows, "model"):
        own = {(row["pass"], row["length"]): row for row in rows if row["model"] == model}
        parameters = f"{int(next(iter(own.values()))['parameters']):,}"
        speeds = (f"{float(own[case]['tokens_per_second']):,.0f}" if case in own else "" for case in cases)
        cells.append([model, parameters, *speeds])
    return cells


def _values(rows: Sequence[Row], column: str) -> list[str]:
    """The different values of a column, in their order."""
    return list(dict.fromkeys(row[column] for row in rows))


def _colored(names: Sequence[str]) -> Iterator[tuple[object, str]]:
    """Names with a color each."""
    palette = colormaps["tab10" if len(names) <= 10 else "tab20"].colors
    return ((palette[i % len(palette)], name) for i, name in enumerate(names))


def _points(rows: Sequence[Row], x: str, y: str, **where: str) -> tuple[list[float], list[float]]:
    """The two columns of the rows with these values, by the first of them."""
    found = sorted(
        (float(row[x]), float(row[y])) for row in rows if all(row[column] == value for column, value in where.items())
    )
    return [point[0] for point in found], [point[1] for point in found]
