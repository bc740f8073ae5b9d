#!/usr/bin/env python3
"""How much do decoding users feel somebody else's long prompt?

Four clients decode 128 tokens from 32-token prompts, over and over, while a long prompt arrives every few seconds.
Measured: the time between two tokens of the four, and the long prompts' time to first token. Each server is measured
without long prompts and with them. Needs nothing but Python 3 and a release build:

    cargo build --release
    target/release/cluster synth MODEL --preset llama-3.2-1b --dtype bf16
    python3 bench/interference.py --model MODEL --out bench/results/interference.json
"""

import argparse
import datetime
import http.client
import json
import os
import platform
import queue
import random
import signal
import subprocess
import sys
import threading
import time

DECODERS = 4
SERVERS = {
    "disaggregated (1 prefill, 1 decode, a core each)": ["--prefill", "1", "--decode", "1", "--threads", "1"],
    "co-located (1 decode node on both cores)": ["--prefill", "0", "--decode", "1", "--threads", "2"],
}


def tokens(rng, count):
    return [rng.randrange(1000, 100000) for _ in range(count)]


def stream(port, prompt, max_tokens, on_token):
    """Sends a completion and calls on_token for each token that arrives."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
            "logprobs": 0}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        sys.exit(f"HTTP {response.status}: {response.read().decode()}")
    for line in response:
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        event = json.loads(line[6:])
        if event.get("error"):
            sys.exit(f"stream failed: {event}")
        for _ in event["choices"][0]["logprobs"]["tokens"] if event["choices"][0].get("logprobs") else []:
            on_token()
    connection.close()


def percentile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def scenario(port, seconds, long_tokens, every):
    """Runs the decoders for some seconds, with a long prompt each `every` seconds if `long_tokens` is set."""
    until = time.monotonic() + seconds
    gaps, ttfts = queue.SimpleQueue(), queue.SimpleQueue()

    def decode(seed):
        rng = random.Random(seed)
        while time.monotonic() < until:
            last = None

            def on_token():
                nonlocal last
                now = time.monotonic()
                if last is not None:
                    gaps.put(now - last)
                last = now

            stream(port, tokens(rng, 32), 128, on_token)

    def prefill():
        rng = random.Random(99)
        started = time.monotonic()
        arrivals = 0
        while time.monotonic() < until - every:
            arrivals += 1
            time.sleep(max(0.0, started + arrivals * every - time.monotonic()))
            begin = time.monotonic()
            first = []
            stream(port, tokens(rng, long_tokens), 1, lambda: first.append(time.monotonic() - begin))
            ttfts.put(first[0])

    threads = [threading.Thread(target=decode, args=(seed,)) for seed in range(DECODERS)]
    if long_tokens:
        threads.append(threading.Thread(target=prefill))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    def drain(source):
        values = []
        while not source.empty():
            values.append(source.get() * 1000)
        return values

    itl, ttft = drain(gaps), drain(ttfts)
    return {
        "long_tokens": long_tokens, "every_s": every if long_tokens else None, "tokens": len(itl),
        "itl_ms": {"p50": percentile(itl, 0.5), "p99": percentile(itl, 0.99), "max": max(itl, default=float("nan"))},
        "long_ttft_ms_p50": percentile(ttft, 0.5) if ttft else None, "long_prompts": len(ttft),
    }


def start(binary, model, port, flags):
    command = [binary, "up", "--local", "--model", model, "--port", str(port), *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for _ in range(600):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return server
        except OSError:
            pass
        if server.poll() is not None:
            sys.exit(f"{' '.join(command)} ended with {server.returncode}")
        time.sleep(0.2)
    sys.exit("the server did not become ready within two minutes")


def machine():
    model = platform.processor()
    try:
        with open("/proc/cpuinfo") as info:
            model = next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.system()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/release/cluster")
    parser.add_argument("--model", required=True)
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--long-tokens", type=int, default=512)
    parser.add_argument("--every", type=float, default=8)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--out")
    args = parser.parse_args()
    results = []
    for name, flags in SERVERS.items():
        server = start(args.binary, args.model, args.port, flags)
        try:
            for long_tokens in (0, args.long_tokens):
                row = {"server": name, **scenario(args.port, args.seconds, long_tokens, args.every)}
                results.append(row)
                itl = row["itl_ms"]
                ttft = row["long_ttft_ms_p50"]
                print(f"{name}; long prompts of {long_tokens}: ITL p50 {itl['p50']:.0f} ms, p99 {itl['p99']:.0f}, "
                      f"max {itl['max']:.0f}; long TTFT p50 {'-' if ttft is None else round(ttft)} ms", flush=True)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=60)
    if args.out:
        report = {
            "benchmark": "interference", "date": datetime.date.today().isoformat(), "machine": machine(),
            "command": f"python3 bench/interference.py --model MODEL --seconds {args.seconds:g} "
                       f"--long-tokens {args.long_tokens} --every {args.every:g}",
            "model": os.path.basename(os.path.normpath(args.model)), "results": results,
        }
        with open(args.out, "w") as out:
            json.dump(report, out, indent=1)
            out.write("\n")


if __name__ == "__main__":
    main()
