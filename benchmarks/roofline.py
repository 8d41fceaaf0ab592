"""The roofline: each row a point at its intensity and rate, under the measured ceilings."""

import math

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from tailor_engine.errors import UserError

from .ceilings import MEANING
from .table import label

# Okabe and Ito's palette, for every kind of eye; the markers tell the ops apart once more.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#8C6BB1")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
OFFSETS = ((8, -3), (8, 7), (-8, 7), (-8, -11), (8, -13), (-8, -3), (0, 12), (0, -18))


def draw(rows, path):
    """Write the picture of rows as results files hold them, all of one level and thread count.

    Raises: UserError where no row computes anything: a copy has no place under these roofs.
    """
    rows = [row for row in rows if operations(row)]
    if not rows:
        raise UserError("--plot: nothing to draw; copies compute nothing")
    ceilings = rows[0]["ceilings"][str(rows[0]["threads"])]
    figure, axes = pyplot.subplots(figsize=(10, 6), constrained_layout=True)
    left = min(intensity(row) for row in rows) / 1.5
    right = max(intensity(row) for row in rows) * 2.5
    slowest = min(operations(row) / max([row["us"], *row["peers"].values()]) for row in rows) / 1e3
    kinds = {row["limit"] for row in rows} - {"memory"} or {"float32"}
    highest = max(ceilings[kind] for kind in kinds)
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(slowest / 1.6, 1.9 * highest))
    _roofs(axes, ceilings, sorted(kinds, key=ceilings.get), left, right)
    styles = _styles(rows)
    for row in rows:
        _point(axes, row, *styles[row["op"]])
    _name(figure, axes, rows)
    _describe(axes, rows[0], styles)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def operations(row):
    """Return the operations of one call of a row."""
    return 1e3 * row["us"] * (2 * row["gmacs"] if "gmacs" in row else row["gflops"])


def rate(row):
    """Return the operations of a row in a nanosecond: GFLOP/s."""
    return operations(row) / row["us"] / 1e3


def intensity(row):
    """Return the operations of a row for each byte that it must move."""
    return operations(row) / (1e3 * row["gbps"] * row["us"])


def _roofs(axes, ceilings, kinds, left, right):
    highest = ceilings[kinds[-1]]
    edge = highest / ceilings["read"]
    axes.plot((left, edge), (left * ceilings["read"], highest), color="#333333", linewidth=1.6)
    axes.annotate(
        f"memory: {ceilings['read']:.0f} GB/s", (left, left * ceilings["read"]), (10, 6),
        textcoords="offset points", color="#333333", fontsize=9, rotation_mode="anchor",
        rotation=_angle(axes), ha="left", va="bottom",
    )  # fmt: skip
    for kind, above in zip(kinds, [*kinds[1:], None], strict=True):
        roof = ceilings[kind]
        if above and ceilings[above] < 1.1 * roof:  # one line, one name: VNNI has one for both
            continue
        start = roof / ceilings["read"]
        axes.plot((start, right), (roof, roof), color="#333333", linewidth=1.6)
        told = f"{roof / 2:,.0f} GMAC/s" if kind.startswith("int") else f"{roof:,.0f} GFLOP/s"
        axes.annotate(
            f"{MEANING[kind]}: {told}", (right, roof), (-4, 3), textcoords="offset points",
            color="#333333", fontsize=9, ha="right", va="bottom",
        )  # fmt: skip


def _angle(axes):
    """Return the angle of a line of slope one on these logarithmic axes, in degrees."""
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    box = axes.get_window_extent()
    wide, high = box.width / math.log10(x1 / x0), box.height / math.log10(y1 / y0)
    return math.degrees(math.atan2(high, wide))


def _styles(rows):
    names = list(dict.fromkeys(row["op"] for row in rows))
    return {name: (COLOURS[i % 8], MARKERS[i % 8]) for i, name in enumerate(names)}


def _point(axes, row, colour, marker):
    """Our point filled, the fastest peer's hollow, and a thin line from it to ours."""
    x, y = intensity(row), rate(row)
    rivals = [us for name, us in row["peers"].items() if not name.startswith("its ")]  # no floors
    if rivals:
        peer = operations(row) / min(rivals) / 1e3
        axes.plot((x, x), (peer, y), color=colour, linewidth=0.8, alpha=0.45, zorder=2)
        axes.plot(x, peer, marker, color=colour, fillstyle="none", markersize=6, alpha=0.75)
    axes.plot(
        x, y, marker, color=colour, markersize=7.5, markeredgecolor="white", zorder=3,
        markeredgewidth=0.7,
    )  # fmt: skip


def _name(figure, axes, rows):
    """Name the fastest and the least intense shape of each op, where a free place is near."""
    figure.canvas.draw()
    taken = [text.get_window_extent() for text in axes.texts]
    for row in rows:
        x, y = axes.transData.transform((intensity(row), rate(row)))
        taken.append(Bbox.from_extents(x - 7, y - 7, x + 7, y + 7))
    for row in _named(rows):
        for dx, dy in OFFSETS:
            text = axes.annotate(
                label(row["shape"], row["dtype"]), (intensity(row), rate(row)), (dx, dy),
                textcoords="offset points", fontsize=7.5, color="#222222",
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
            )  # fmt: skip
            box = text.get_window_extent()
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def _named(rows):
    found = []
    for name in dict.fromkeys(row["op"] for row in rows):
        own = [row for row in rows if row["op"] == name]
        found += [row for row in (max(own, key=rate), min(own, key=intensity)) if row not in found]
    return found


def _describe(axes, row, styles):
    threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
    axes.set_title(
        f"{row['machine']['processor']}, {row['level']}, {threads}", loc="left", fontweight="bold"
    )
    axes.set_xlabel("intensity: operations for each byte that must move")
    axes.set_ylabel("GFLOP/s (integer products: 2 x GMAC/s)")
    axes.grid(True, which="major", color="#E8E8E8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    marks = [
        Line2D([], [], linestyle="", color=colour, marker=marker, label=name)
        for name, (colour, marker) in styles.items()
    ]
    hollow = Line2D([], [], linestyle="", color="#555555", marker="o", fillstyle="none")
    hollow.set_label("hollow: the fastest peer")
    axes.legend(handles=[*marks, hollow], loc="lower right", fontsize=8.5, frameon=True,
                framealpha=0.95, edgecolor="#DDDDDD")  # fmt: skip
