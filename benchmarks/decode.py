"""`tailor bench decode`: tokens per second of one request, ours beside whole-network peers."""

from . import engines
import argparse, torch, tailor_engine

CONTEXT = 128


def run(quick=False, threads=None, names=()):
    if threads:
        torch.set_num_threads(threads)
    tokens, rounds = (16, 1) if quick else (64, 3)
    model = tailor_engine.load(engines.SOURCE)
    ids = engines.prompt(model, CONTEXT)
    with engines.temporary() as folder:
        made, missing = engines.engines(model, folder, names)
        samples = {name: [] for name in made}
        for _ in range(rounds):
            for name, engine in made.items():
                engine.prefill(ids)
                engine.step()
                samples[name] += [engines.milliseconds(engine.step) for _ in range(tokens)]
        yield from engines.rows_of(samples, "decode", f"{CONTEXT} + {tokens}", 1)
    for name, why in missing.items():
        print(name, why)

if __name__ == "__main__":
    p = argparse.ArgumentParser(); p.add_argument("--quick", action="store_true"); p.add_argument("--threads", type=int); p.add_argument("names", nargs="*")
    a = p.parse_args()
    for row in run(a.quick, a.threads, a.names): print(engines.line(row))
