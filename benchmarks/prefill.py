"""`tailor bench prefill`: a prompt of 512 tokens, ours beside whole-network peers."""

from . import engines
import argparse, torch, tailor_engine

TOKENS = 512


def run(quick=False, threads=None, names=()):
    if threads:
        torch.set_num_threads(threads)
    rounds = 3 if quick else 7
    model = tailor_engine.load(engines.SOURCE)
    ids = engines.prompt(model, TOKENS)
    with engines.temporary() as folder:
        made, missing = engines.engines(model, folder, names)
        for engine in made.values(): engine.prefill(ids)
        samples = {name: [] for name in made}
        for _ in range(rounds):
            for name, engine in made.items():
                samples[name].append(engines.milliseconds(engine.prefill, ids))
        yield from engines.rows_of(samples, "prefill", f"{TOKENS}", TOKENS)
    for name, why in missing.items():
        print(name, why)

if __name__ == "__main__":
    p = argparse.ArgumentParser(); p.add_argument("--quick", action="store_true"); p.add_argument("--threads", type=int); p.add_argument("names", nargs="*")
    a = p.parse_args()
    for row in run(a.quick, a.threads, a.names): print(engines.line(row))
