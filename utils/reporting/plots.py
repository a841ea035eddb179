"""Plots, drawn by one function: as SVG in a report, which follows its light or dark colours, and as PNG files."""

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.files import write_whole

# Okabe and Ito's colours, which people with any kind of colour vision tell apart: those with most contrast first. In a
# report they are variables of the style sheet, lighter ones where the page is dark.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, FAINT, PAPER = "#1c1d21", "#dddad3", "#fdfcfb"
MOST_POINTS = 600  # of a curve; neighbours of a longer one are averaged


@dataclass
class Line:
    """A curve: its points, and how it is drawn: "line", "dots" (with a dot at each point) or "dashed"."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "line"


@dataclass
class Plot:
    """Curves over one axis. `marks` are vertical lines: (x, label); `best` is a point with a label: (x, y, label)."""

    name: str  # of the file
    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    marks: list[tuple[float, str]] = field(default_factory=list)
    best: tuple[float, float, str] | None = None
    log_x: bool = False
    from_zero: bool = False
    width: float = 6.4  # inches

    @property
    def description(self) -> str:
        """The plot in words, for whoever cannot see it."""
        parts = [f"{self.title}: {self.y_label} by {self.x_label}."]
        for line in self.lines:
            points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
            if points:
                (first, start), (last, end) = points[0], points[-1]
                low, high = min(y for _, y in points), max(y for _, y in points)
                between = f", between {low:.4g} and {high:.4g}" if len(points) > 2 else ""
                course = f"from {start:.4g} at {first:g} to {end:.4g} at {last:g}{between}"
                parts.append(f"{line.label}: {f'{start:.4g} at {first:g}' if len(points) == 1 else course}.")
        if self.best:
            parts.append(f"Best: {self.best[2]} at {self.best[0]:g}.")
        parts += [f"{label} at {x:g}." for x, label in self.marks[:20]]
        return " ".join(parts)


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The finite points of a curve; of a long one the means of neighbours, MOST_POINTS of them."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(x) <= MOST_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), MOST_POINTS)
    return tuple(np.array([values[part].mean() for part in parts]) for values in (x, y))


def draw(plot: Plot):
    """A figure of matplotlib, without its global state."""
    from matplotlib.figure import Figure  # takes half a second
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    figure = Figure(figsize=(plot.width, 3.2 if plot.width > 5 else 2.9), layout="constrained", facecolor=PAPER)
    axes = figure.add_subplot(facecolor="none")
    for number, line in enumerate(plot.lines):
        x, y = thinned(line.x, line.y)
        few = len(x) <= 40
        axes.plot(x, y, label=line.label, color=COLOURS[number % len(COLOURS)], linewidth=1.6,
                  linestyle="--" if line.style == "dashed" else "-", solid_capstyle="round",
                  marker="o" if len(x) == 1 or (line.style == "dots" and few) else None, markersize=4)  # fmt: skip
    for x, _ in plot.marks:
        axes.axvline(x, color=INK, linewidth=0.8, linestyle=":", zorder=1)
    for label in dict.fromkeys(label for _, label in plot.marks):
        axes.plot([], [], color=INK, linewidth=0.8, linestyle=":", label=label)
    if plot.best:
        x, y, label = plot.best
        axes.plot([x], [y], marker="*", markersize=12, color=COLOURS[0], markeredgecolor=PAPER, linestyle="none",
                  label=f"best: {label}", zorder=5)  # fmt: skip
    if plot.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if plot.from_zero:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(INK)
    axes.tick_params(colors=INK, length=0)
    if len(axes.get_lines()) > 1 or plot.marks:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, borderaxespad=0.2, fontsize=9,
                    handlelength=1.6, columnspacing=1.2)  # fmt: skip
    return figure


def _settings(plot: Plot) -> dict:
    return {
        "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "text.parse_math": False,
        "svg.fonttype": "none", "svg.hashsalt": plot.name, "font.family": "DejaVu Sans",
    }  # fmt: skip


def svg(plot: Plot) -> str:
    """The plot as an SVG element, whose colours and font are those of the page that it stands in."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context(_settings(plot)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks: the page has its own fonts
        draw(plot).savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    code = text.getvalue()
    code = code[code.index("<svg ") :]
    code = re.sub(r"<metadata>.*?</metadata>", "", code, flags=re.DOTALL)
    code = re.sub(r'<g id="[^"]*"', "<g", code)  # several plots stand on one page
    code = re.sub(r"font-family: [^;\"]*;?", "", code)  # the page's own
    for number, colour in enumerate(COLOURS, 1):
        code = re.sub(colour, f"var(--plot{number})", code, flags=re.IGNORECASE)
    for name, colour in (("ink", INK), ("line", FAINT), ("paper", PAPER)):
        code = re.sub(colour, f"var(--{name})", code, flags=re.IGNORECASE)
    # the size comes from the page; words for those who do not see it stand beside it
    code = re.sub(r'(<svg [^>]*?)\swidth="[^"]*"', r"\1", code, count=1)
    return re.sub(r'(<svg [^>]*?)\sheight="[^"]*"', r'\1 aria-hidden="true" focusable="false"', code, count=1).strip()


def write_png(plot: Plot, folder: Path) -> Path:
    """Writes `<name>.png` with its title into a folder, which is made; returns its path."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{plot.name}.png"

    def write(temporary: Path) -> None:
        with matplotlib.rc_context(_settings(plot)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            figure = draw(plot)
            figure.suptitle(plot.title, x=0.01, ha="left", fontsize=12)
            figure.savefig(temporary, format="png", dpi=200)

    write_whole(path, write)
    return path
