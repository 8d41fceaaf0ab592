"""Run a recipe in child processes, kill each at a random moment, go on, and compare the end.

Started as a process of its own by test_runs.py: it imports everything once and forks its children,
so that a killed run costs no start-up.  Prints one line of JSON.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from tailor_engine import cli, stages
from tailor_engine.cli import _commands  # noqa: F401
from tailor_engine.io import report, runs


def start(recipe, out):
    """Fork a child that runs the recipe quietly; return its process id."""
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os._exit(cli.main(["run", recipe, "--out", str(out)]))
    return child


def finish(recipe, out):
    code = os.waitstatus_to_exitcode(os.waitpid(start(recipe, out), 0)[1])
    assert code == 0, f"the run in {out} ended with {code}"


def weights(out):
    """Return the hash of every weight file of a run, by its place in it."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*.safetensors"))
    }


def wait(child, out, chance):
    """Wait for a random number of writes in the run folder, and a random while more.

    Counted in writes, the moments lie all over the run on a fast machine and on a busy one.
    """
    left, before = chance.randint(1, 30), None
    while left and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        now = [(folder, sorted(folders), sorted(names)) for folder, folders, names in os.walk(out)]
        left -= now != before
        before = now
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.05))


def main(recipe, folder, kills, seed):
    stages.load()
    report.write = lambda out: out  # the page is drawn anew each time: nothing to resume, and slow
    import accelerate  # noqa: F401
    import peft  # noqa: F401

    chance = random.Random(seed)
    folder = Path(folder)
    finish(recipe, folder / "whole")
    moments, number = [], 0
    while len(moments) < kills:
        out = folder / f"killed-{number}"
        child = start(recipe, out)
        wait(child, out, chance)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            inside = [entry.name for entry in out.iterdir()] if out.exists() else []
            working = [name for name in inside if name.startswith(runs.WORKING_PREFIX)]
            finished = sum(name[0].isdigit() for name in inside)
            moments.append([finished, *working])
        else:
            number += 1  # it was done before the kill: the next ones hit a new run
    for last in range(number + 1):
        finish(recipe, folder / f"killed-{last}")
    expected = weights(folder / "whole")
    same = [weights(folder / f"killed-{last}") == expected for last in range(number + 1)]
    print(json.dumps({"same": same, "moments": moments, "files": len(expected)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
