"""What a person sees of a run: the ceilings, and one line a shape."""

from rich.console import Console

from .ceilings import MEANING, UNITS

NAMES = {"memory": "memory", "float32": "fp32", "bfloat16": "bf16", "int8": "int8", "int4": "int4"}
SHORT_US = 20  # a call this short is marked: its overhead is a good part of it


class Table:
    """Prints results as they come: colours on a terminal, plain text in a pipe."""

    def __init__(self, console=None):
        self.console = console or Console(highlight=False)
        self.group = None
        self.skipped = {}
        self.marked = False

    def line(self, text="", style=None):
        self.console.print(text, style=style, soft_wrap=True, markup=False)

    def ceilings(self, ceilings, machine, overhead):
        """Print the machine and its limits, one column a thread count."""
        held = f", peers held to {ceilings.level}" if machine["held_to"] else ""
        self.line(f"{machine['processor']}, {ceilings.level}, torch {machine['torch']}{held}\n")
        counts = list(ceilings.rates)
        heads = [f"{n} thread{'s' if n > 1 else ''}" for n in counts]
        self.line("ceiling".ljust(26) + "".join(head.rjust(12) for head in heads), "bold")
        for name, meaning in MEANING.items():
            known = ceilings.rates[counts[0]]
            if name == "bfloat16" and known[name] == known["float32"]:
                continue  # no instructions for it here: such inputs are widened
            if name in known:
                unit = UNITS.get(name, "GFLOP/s")
                values = [in_units(name, ceilings.rates[n][name]) for n in counts]
                told = "".join(f"{value:12,.1f}" for value in values)
                style = "dim" if name.startswith("torch") else None
                self.line(f"{meaning:26}{told} {unit}", style)
        self.line(
            f"in every time: the timer {overhead['timer_us']:.1f} us, "
            f"an op's own call about {overhead['call_us']:.0f} us",
            "dim",
        )

    def note(self, text):
        self.line(f"- {text}", "dim")

    def row(self, row):
        """Print one line, under a heading where a new op begins."""
        if self.group != (row.op, row.backend):
            self.finish()
            self.group = row.op, row.backend
            self._heading(row)
        self.skipped |= row.skipped
        _, rate = row.rate
        short = "*" if row.us < SHORT_US else " "
        self.marked = self.marked or row.us < SHORT_US
        plain = f"{label(row.shape, row.dtype):24}{row.us:11,.1f}{short}{100 * row.spread:4.0f} %"
        plain += f"{rate:10,.1f}{row.gbps:8.1f}" if rate else f"{'':10}{row.gbps:8.1f}"
        self.console.print(plain, end="", soft_wrap=True, markup=False)
        self.console.print(f"{row.percent_of_limit:6.0f} %", style="bold", end="")
        self.console.print(f" {NAMES[row.limit]:8}", end="")
        for name, us in row.peers.items():
            style = "green" if us > 1.02 * row.us else "red" if us < 0.98 * row.us else None
            self.console.print(f"{us / row.us:{width(name)}.2f}x", style=style, end="")
        self.line()

    def finish(self):
        """End a group: say which peers were left out, and why."""
        for name, reason in self.skipped.items():
            self.note(f"{name} is not timed: {reason}")
        self.skipped = {}

    def close(self):
        self.finish()
        if self.marked:
            self.note(f"* under {SHORT_US} us: the overhead above is a good part of it")

    def _heading(self, row):
        unit, _ = row.rate
        unit = "GMAC/s" if unit == "gmacs" else "GFLOP/s"
        threads = f"{row.threads} thread{'s' if row.threads > 1 else ''}"
        self.line(f"\n{row.op}  {row.backend}, {threads}", "bold cyan")
        head = f"{'shape':24}{'us':>11} {'+-':>6}{unit:>10}{'GB/s':>8}{'% of limit':>15}  "
        head += "".join(f"{'x ' + brief(name):>{width(name) + 1}}" for name in row.peers)
        self.line(head, "dim")


def label(shape, dtype):
    """Return a shape, with its dtype where that is not float32."""
    return shape + {"float32": "", "bfloat16": " bf16"}.get(dtype, f" {dtype}")


def brief(peer):
    """Return a peer's name as a column heading."""
    return peer if peer == "torch" else peer.removeprefix("torch").lstrip(" .,")


def width(peer):
    return max(7, len(brief(peer)) + 3)


def in_units(name, rate):
    """Return a ceiling in the unit that it is printed in: integer products count once."""
    return rate / 2 if UNITS.get(name) == "GMAC/s" else rate
