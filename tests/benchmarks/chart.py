"""The bar chart of sessions per second."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure


def draw(sessions: Mapping[str, float], file: Path) -> None:
    """Draw a bar per contender, the fastest on top, the broker's in another colour."""
    ranked = sorted(sessions.items(), key=lambda each: each[1])
    names = [name for name, _ in ranked]
    values = [value for _, value in ranked]
    with mpl.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 0.6 + 0.5 * len(ranked)), layout="constrained")
        axes = figure.subplots()
        colors = ["#2563eb" if name.startswith("the broker") else "#9ca3af" for name in names]
        bars = axes.barh(names, values, color=colors)
        axes.bar_label(bars, labels=[f"{value:,.0f}" for value in values], padding=4)
        axes.set_xlabel("sessions per second, one core, 32 connections")
        axes.margins(x=0.12)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        figure.savefig(file, dpi=120)
