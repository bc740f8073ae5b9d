#!/usr/bin/env python3
"""Measures how far Ridge's and llama.cpp's log-probabilities are from exact ones, for each way of storing the weights.

Each engine computes the logits after every token of the same random list, as a prompt in one pass and one token at a
time. `exact.py` computes them from the same file in float64. A Markdown table goes to stdout, all cells to a JSON file.
Needs release builds of Ridge and of its example `logits`, and what `install.py` installs for llama.cpp:

    python3 bench/peers/accuracy.py --threads 2 --out accuracy.json
"""

import argparse
import datetime
import json
import os
import pathlib
import random
import sys
import tempfile

from install import DEFAULT_SCRATCH, python_of
from run import HERE, REPOSITORY, machine, model_path, numbers, output_of, say, without_places

DTYPES = "bf16,f16,q8_0,q4_0,q4_k_m,q6_k"
# llama.cpp's flash attention casts a cache in f32 to f16, so that the most exact setting is without.
SETTINGS = {
    "ridge": {"default": {"kv": "auto"}, "f16 cache": {"kv": "f16"}, "f32 cache": {"kv": "f32"}},
    "llama.cpp": {
        "default": {"kv": "f16", "flash_attn": "auto"},
        "no flash attention": {"kv": "f16", "flash_attn": "off"},
        "f32 cache": {"kv": "f32", "flash_attn": "off"},
    },
}
PASSES = ["prefill", "decode"]
# Tokens are drawn from the first of the vocabulary; every preset has as many.
DRAWN_FROM = 1024


def on_cores(args, command):
    return ["taskset", "-c", ",".join(map(str, args.cores)), *command]


def write_logits(args, cell, model, tokens, out):
    """Has an engine write its logits to a file; returns what it says."""
    step = args.tokens if cell["pass"] == "prefill" else 1
    setting = SETTINGS[cell["engine"]][cell["setting"]]
    if cell["engine"] == "ridge":
        command = [args.cluster.parent / "examples" / "logits", model, tokens, out, step, setting["kv"], args.threads]
    else:
        command = [python_of(args.scratch / "llama"), HERE / "llama_logits.py", "--model", model, "--tokens", tokens,
                   "--out", out, "--step", step, "--threads", args.threads,
                   "--kv", setting["kv"], "--flash-attn", setting["flash_attn"]]
    return json.loads(output_of(on_cores(args, command)))


def measure(args, dtype, folder, tokens):
    """Runs every engine, setting and pass on a model. Returns facts of the exact logits, and cells with errors."""
    model = model_path(args, dtype, gguf=True)
    cells = [
        {"dtype": dtype, "engine": engine, "setting": setting, "pass": name}
        for engine, settings in SETTINGS.items() for setting in settings for name in PASSES]
    files = [folder / f"{number}.f32" for number in range(len(cells))]
    for cell, file in zip(cells, files):
        say(" ".join(cell.values()))
        cell["said"] = write_logits(args, cell, model, tokens, file)
        cell["kv"] = cell["said"]["kv"]
    say(f"{dtype} exact")
    command = [python_of(args.scratch / "llama"), HERE / "exact.py", "--model", model, "--tokens", tokens, *files]
    found = json.loads(output_of(on_cores(args, command), {"OPENBLAS_NUM_THREADS": str(args.threads)}))
    for cell, errors in zip(cells, found["errors"]):
        cell["errors"] = errors
    return found["exact"], cells


def table(cells):
    """The settings that both engines have, in Markdown."""
    errors = {tuple(cell[key] for key in ("dtype", "setting", "pass", "engine")): cell["errors"] for cell in cells}
    settings = [setting for setting in SETTINGS["ridge"] if setting in SETTINGS["llama.cpp"]]
    rows = ["| weights | | | error, mean (max): Ridge | llama.cpp | KL divergence: Ridge | llama.cpp "
            "| same top token: Ridge | llama.cpp |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for dtype in dict.fromkeys(cell["dtype"] for cell in cells):
        for setting in settings:
            for name in PASSES:
                both = [errors[dtype, setting, name, engine] for engine in SETTINGS]
                shown = ["{mean:.1e} ({max:.1e})".format(**each["top_token"]) for each in both]
                shown += ["{mean:.2e} ± {standard_error:.0e}".format(**each["kl_divergence"]) for each in both]
                shown += [f"{each['same_top_token']:.1%}" for each in both]
                rows.append(f"| {dtype} | {setting} | {name} | " + " | ".join(shown) + " |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=pathlib.Path, default=DEFAULT_SCRATCH,
                        help="install.py's folder; models are made there as well (%(default)s)")
    parser.add_argument("--cluster", type=pathlib.Path, default=REPOSITORY / "target" / "release" / "cluster",
                        help="Ridge's binary; examples/logits is beside it (%(default)s)")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the JSON file to write")
    parser.add_argument("--preset", default="llama-3.2-1b", help="a Llama's shape, of `cluster synth` (%(default)s)")
    parser.add_argument("--dtype", default=DTYPES, help="how weights are stored (%(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="positions to compare (%(default)s)")
    parser.add_argument("--threads", type=int, help="of each engine (one per core)")
    parser.add_argument("--cores", type=numbers, default=sorted(os.sched_getaffinity(0)), help="such as 0,1 (all)")
    args = parser.parse_args()
    args.scratch = args.scratch.absolute()
    args.threads = args.threads or len(args.cores)

    exact, cells = {}, []
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        tokens = pathlib.Path(folder) / "tokens"
        rng = random.Random(0)
        tokens.write_text(" ".join(str(rng.randrange(DRAWN_FROM)) for _ in range(args.tokens)))
        for dtype in args.dtype.split(","):
            exact[dtype], found = measure(args, dtype, tokens.parent, tokens)
            cells += found

    said = {cell["engine"]: cell.pop("said") for cell in cells}
    args.out.write_text(json.dumps({
        "date": datetime.date.today().isoformat(),
        "machine": machine() | {"isa": said["ridge"]["isa"]},
        "versions": {
            "ridge": output_of([args.cluster, "--version"]).split()[-1], "llama.cpp": said["llama.cpp"]["versions"]},
        "command": without_places(args, ["python3", "bench/peers/accuracy.py", *sys.argv[1:]], {}),
        "settings": {"preset": args.preset, "tokens": args.tokens, "threads": args.threads, "of_engines": SETTINGS},
        "exact": exact,
        "cells": cells,
    }, indent=1) + "\n")
    print(table(cells))


if __name__ == "__main__":
    main()
