"""What a person sees of a run on a GPU, and what of the limit each time reached."""

# Of a 16-bit logit, through memory: two products write student's and teacher's, the row pass reads
# both and writes the gradient, which two products read.
LOGIT_BYTES = 14
HEAD = ("op, backend", "shape", "us", "+-", "TFLOP/s", "GB/s", "% of limit", "x rival")


def limit(row, rates):
    """Return {"limit", "limit_us", "percent_of_limit"}: the floor of one timed row.

    The larger of its bytes over the card's copy and its operations over the card's products; a
    loss's logits must pass through memory between products, so there both are waited for. Without
    rates (their own measurement failed) the time stands alone.
    """
    if rates is None:
        return {"limit": "unknown", "limit_us": 0.0, "percent_of_limit": 0.0}
    copied = row["moved"] / rates["copy"] / 1e3
    rate = rates[row["arithmetic"]]
    products = row["operations"] / rate / 1e6 if rate else 0.0
    if row["logits"]:
        name, us = "products", products + LOGIT_BYTES * row["logits"] / rates["copy"] / 1e3
    else:
        name, us = max(("memory", copied), (row["arithmetic"], products), key=lambda pair: pair[1])
    return {"limit": name, "limit_us": us, "percent_of_limit": 100 * us / row["us"]}


def line(row):
    """Return one line on a row as it comes; an empty one where it needs none."""
    if row["kind"] == "unit":
        state = f"FAILED\n{row['failure']}" if row["failure"] else "ok"
        return f"[{row['seconds']:5.1f} s] {row['unit']}: {state}"
    if row["kind"] == "check" and row["failure"]:
        where = f"{row['op']} on {row['backend']}, case {row.get('case')} {row.get('arguments')}"
        return f"WRONG {where}: {row['failure']}"
    return ""


def show(rows, card):
    """Print ceilings, kernels, times, the pipeline and what was missing."""
    print(f"\n{card['name']}, torch {card['torch']}, triton {card.get('triton')}")
    kinds = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    for row in kinds.get("ceilings", [])[-1:]:
        units = {"copy": "GB/s, read and written"}
        for name, rate in row["rates"].items():
            print(f"ceiling {name}: {rate:,.0f} {units.get(name, 'TFLOP/s')}")
    checks = kinds.get("check", [])
    wrong = sum(bool(row["failure"]) for row in checks)
    print(f"checks: {len(checks) - wrong} hold, {wrong} do not")
    _table(("kernel", "registers", "spilled", "shared", "warps", "stages"), _kernels(kinds))
    _table(HEAD, [_timed(row) for row in kinds.get("time", [])])
    _table(
        ("pipeline", "engine", "ms", "tokens/s", "peak MB"),
        [(r["what"], r["engine"], f"{r['ms']:.2f}", f"{r['tokens_per_second']:,.0f}",
          f"{r['peak_bytes'] / 1e6:,.0f}") for r in kinds.get("pipeline", [])],
    )  # fmt: skip
    for row in kinds.get("pipeline", [])[:1]:
        print(f"pipeline on {row['model']}")
    for row in kinds.get("missing", []):
        print(f"missing: {row['what']}: {row['why']}")


def _kernels(kinds):
    """Return each kernel's most demanding compilation, those that spill first."""
    found = {}
    for row in kinds.get("kernel", []):
        key = row["spilled"] or 0, row["registers"] or 0, row["shared_bytes"]
        found[row["kernel"]] = max(found.get(row["kernel"], (key, row)), (key, row), key=_first)
    return [
        (row["kernel"], *(row[name] for name in ("registers", "spilled", "shared_bytes", "warps",
                                                 "stages")))
        for _, row in sorted(found.values(), key=_first, reverse=True)
    ]  # fmt: skip


def _first(pair):
    return pair[0]


def _timed(row):
    rivals = ", ".join(f"{us / row['us']:.2f} {name}" for name, us in row["rivals"].items())
    return (
        f"{row['op']}, {row['backend']}", row["shape"] + (" (no graph)" if row["eager"] else ""),
        f"{row['us']:.1f}", f"{100 * row['spread']:.0f} %",
        f"{row['operations'] / row['us'] / 1e6:.1f}", f"{row['moved'] / row['us'] / 1e3:.0f}",
        f"{row['percent_of_limit']:.0f} {row['limit']}", rivals,
    )  # fmt: skip


def _table(head, rows):
    """Print rows under a head, in columns as wide as what stands in them."""
    if not rows:
        return
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print()
    for row in cells:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
