#!/usr/bin/env python3
"""Measures Ridge, llama.cpp and vLLM on the same machine, the same cores and the same weights, in turns.

The cells are the prefill of a prompt and decoding at several batch sizes, for each way of storing the weights. In each
round every engine runs once, alone, as a process of its own pinned to the same cores. A Markdown table goes to stdout,
everything to a JSON file. Needs a release build of Ridge and what `install.py` installs:

    python3 bench/peers/run.py --threads 2 --out peers.json
"""

import argparse
import datetime
import json
import math
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import time

from install import DEFAULT_SCRATCH, python_of

HERE = pathlib.Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
ENGINES = {"bf16": ["ridge", "llama.cpp", "vllm"], "q8_0": ["ridge", "llama.cpp"], "q4_k_m": ["ridge", "llama.cpp"]}
VLLM_MODES = {"compiled": [], "eager": ["--eager"]}
BUSY = 0.1


def say(text):
    print(text, file=sys.stderr, flush=True)


def output_of(command, environment=None):
    """What a command writes to stdout. If it fails, so does this."""
    done = subprocess.run(
        [str(word) for word in command], env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{shlex.join(map(str, command))} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def model_path(args, dtype, gguf):
    """A model of the preset's shape in that form. Ridge makes it, from the same seed, if it is not there."""
    path = args.scratch / "models" / f"{args.preset}-{dtype}{'.gguf' if gguf else ''}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name("unfinished-" + path.name)
        say(f"making {path.name}")
        output_of([args.cluster, "synth", unfinished, "--preset", args.preset, "--dtype", dtype])
        unfinished.rename(path)
    return path


def command_of(args, engine, dtype, vllm_mode):
    """The command that has an engine measure all cells of a dtype, and its environment variables."""
    shape = ["--prompt-tokens", args.prompt_tokens, "--gen-tokens", args.gen_tokens,
             "--batch", args.batch, "--context", args.context, "--repeat", args.repeat]
    threads = ["--threads", args.threads]
    cores = ",".join(map(str, args.cores))
    environment = {}
    if engine == "ridge":
        command = [args.cluster, "bench", "engine", "--model", model_path(args, dtype, gguf=dtype != "bf16"), "--json"]
        command += threads
    elif engine == "llama.cpp":
        command = [python_of(args.scratch / "llama"), HERE / "llama_runner.py"]
        command += ["--model", model_path(args, dtype, gguf=True), *threads]
    else:
        command = [python_of(args.scratch / "vllm"), HERE / "vllm_runner.py"]
        command += ["--model", model_path(args, dtype, gguf=False), *VLLM_MODES[vllm_mode]]
        # What vLLM gives its workers when they are processes of their own, and the OpenMP that it advises.
        environment = {
            "LD_PRELOAD": args.scratch / "vllm" / "lib" / "libiomp5.so",
            "OMP_NUM_THREADS": args.threads,
            "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{cores}]",
            "KMP_BLOCKTIME": 5,
            "KMP_TPAUSE": 0,
            "VLLM_CPU_KVCACHE_SPACE": 2,
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_CACHE_ROOT": args.scratch / "vllm-cache",
            "VLLM_NO_USAGE_STATS": 1,
            "HF_HUB_OFFLINE": 1,
        }
    command = ["taskset", "-c", cores, *command, *shape]
    return [str(word) for word in command], {name: str(value) for name, value in environment.items()}


def without_places(args, command, environment):
    """A command line without the folders of this machine."""
    line = shlex.join([f"{name}={value}" for name, value in environment.items()] + command)
    for place, name in ((args.cluster, "cluster"), (args.scratch, "SCRATCH"), (REPOSITORY, ".")):
        line = line.replace(str(place), name)
    return line


def busy_share(cores, seconds=1.0):
    """How busy the cores are, from 0 to 1."""
    def times():
        rows = [line.split() for line in pathlib.Path("/proc/stat").read_text().splitlines()]
        fields = [list(map(int, row[1:9])) for row in rows if row[0] in {f"cpu{core}" for core in cores}]
        return sum(map(sum, fields)), sum(row[3] + row[4] for row in fields)

    total, idle = times()
    time.sleep(seconds)
    total_after, idle_after = times()
    return 1 - (idle_after - idle) / (total_after - total)


def wait_for_idle(cores, patience):
    """Waits up to `patience` seconds for nobody else to use the cores; returns how busy they are then."""
    until = time.monotonic() + patience
    while (busy := busy_share(cores)) > BUSY and time.monotonic() < until:
        pass
    if busy > BUSY:
        say(f"somebody keeps the cores {busy:.0%} busy: expect noise")
    return busy


def measure(args, engine, dtype, vllm_mode):
    """Runs an engine once. Returns what it says, its rate in each cell and how busy the cores were before."""
    command, environment = command_of(args, engine, dtype, vllm_mode)
    busy = wait_for_idle(args.cores, args.patience)
    said = json.loads(output_of(command, environment))
    rates = {f"prefill {args.prompt_tokens}": said["prefill"]["tokens_per_s"]}
    rates |= {f"decode b={cell['batch']}": cell["tokens_per_s"] for cell in said["decode"]}
    if not all(math.isfinite(rate) and rate > 0 for rate in rates.values()):
        sys.exit(f"{engine} measured {rates}")
    say(f"{dtype} {engine}: " + ", ".join(f"{cell} {rate:.1f}" for cell, rate in rates.items()))
    return {"rates": rates, "busy_before": round(busy, 3), "said": said,
            "command": without_places(args, command, environment)}


def better_vllm_mode(args):
    """Compiled, vLLM's default, or eager: whichever is faster over all cells."""
    def rate(mode):
        return statistics.geometric_mean(measure(args, "vllm", "bf16", mode)["rates"].values())

    return max(VLLM_MODES, key=rate)


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": values}


def cells_of(rounds, dtype):
    """Rates and ratios by cell. A ratio is one of a round: of runs shortly after another."""
    cells = []
    for cell in rounds[0][dtype]["ridge"]["rates"]:
        rates = {engine: [r[dtype][engine]["rates"][cell] for r in rounds] for engine in rounds[0][dtype]}
        ratios = {
            f"ridge/{peer}": spread([ours / theirs for ours, theirs in zip(rates["ridge"], rates[peer])])
            for peer in rates if peer != "ridge"}
        cells.append({
            "dtype": dtype, "cell": cell, "tokens_per_s": {engine: spread(values) for engine, values in rates.items()},
            "ratios": ratios})
    return cells


def table(cells):
    """The cells in Markdown: medians, with the lowest and the highest in brackets."""
    def show(value, digits):
        if not value:
            return ""
        return "{median:.{d}f} ({min:.{d}f}–{max:.{d}f})".format(d=digits, **value)

    rows = ["| weights | cell | Ridge | llama.cpp | vLLM | Ridge/llama.cpp | Ridge/vLLM |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for cell in cells:
        shown = [show(cell["tokens_per_s"].get(engine), 1) for engine in ("ridge", "llama.cpp", "vllm")]
        shown += [show(cell["ratios"].get(f"ridge/{peer}"), 2) for peer in ("llama.cpp", "vllm")]
        rows.append(f"| {cell['dtype']} | {cell['cell']} | " + " | ".join(shown) + " |")
    return "\n".join(rows)


def machine():
    cpu = [line.split(":", 1)[1].strip() for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
           if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu[0] if cpu else platform.machine(), "cores": os.cpu_count(),
            "memory_gib": round(memory / 2**30, 1), "kernel": platform.release()}


def numbers(text):
    return [int(number) for number in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=pathlib.Path, default=DEFAULT_SCRATCH,
                        help="install.py's folder; models are made there as well (%(default)s)")
    parser.add_argument("--cluster", type=pathlib.Path, default=REPOSITORY / "target" / "release" / "cluster",
                        help="Ridge's binary (%(default)s)")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the JSON file to write")
    parser.add_argument("--preset", default="llama-3.2-1b", help="whose shape, of `cluster synth` (%(default)s)")
    parser.add_argument("--dtype", default=",".join(ENGINES), help="how weights are stored (%(default)s)")
    parser.add_argument("--threads", type=int, help="of each engine (one per core)")
    parser.add_argument("--cores", type=numbers, default=sorted(os.sched_getaffinity(0)), help="such as 0,1 (all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=3, help="measurements of a cell in a round; the median counts")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--gen-tokens", type=int, default=64)
    parser.add_argument("--batch", default="1,4,8,16", help="batch sizes of the decode cells (%(default)s)")
    parser.add_argument("--context", type=int, default=128, help="tokens before the first decoded one (%(default)s)")
    parser.add_argument("--vllm-mode", choices=VLLM_MODES, help="do not find out which is faster")
    parser.add_argument("--patience", type=float, default=60,
                        help="seconds to wait before each run for others to leave the cores alone (%(default)s)")
    args = parser.parse_args()
    args.scratch = args.scratch.absolute()
    args.threads = args.threads or len(args.cores)
    dtypes = args.dtype.split(",")

    vllm_mode = args.vllm_mode or (better_vllm_mode(args) if "bf16" in dtypes else None)
    rounds = []
    for number in range(args.rounds):
        say(f"round {number + 1} of {args.rounds}")
        rounds.append({
            dtype: {engine: measure(args, engine, dtype, vllm_mode) for engine in ENGINES[dtype]} for dtype in dtypes})

    cells = [cell for dtype in dtypes for cell in cells_of(rounds, dtype)]
    last = [run for runs in rounds[-1].values() for run in runs.items()]
    versions = {"ridge": output_of([args.cluster, "--version"]).split()[-1]}
    versions |= {engine: run["said"]["versions"] for engine, run in last if engine != "ridge"}
    args.out.write_text(json.dumps({
        "date": datetime.date.today().isoformat(),
        "machine": machine() | {"measured_by_ridge": rounds[-1][dtypes[0]]["ridge"]["said"]["machine"]},
        "versions": versions,
        "settings": {
            "preset": args.preset, "threads": args.threads, "cores": args.cores, "rounds": args.rounds,
            "repeat": args.repeat, "prompt_tokens": args.prompt_tokens, "gen_tokens": args.gen_tokens,
            "context": args.context, "vllm_mode": vllm_mode},
        "commands": [run["command"] for _, run in last],
        "cells": cells,
        "rounds": [
            {dtype: {engine: {"busy_before": run["busy_before"], "prefill": run["said"]["prefill"],
                              "decode": run["said"]["decode"]} for engine, run in runs.items()}
             for dtype, runs in each.items()}
            for each in rounds],
    }, indent=1) + "\n")
    print(table(cells))


if __name__ == "__main__":
    main()
