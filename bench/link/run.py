#!/usr/bin/env python3
"""Measures how much of the time to first token a prompt's KV costs on a link of a given rate.

A prefill node lives in one network namespace, a decode node and the router in another; the cable between them carries no more
than --gbit each way (the kernel's token bucket, tbf). Each prompt is new to the cluster, so all of its KV crosses the cable; what
of that came after prefill's last layer is `times.exposed_us` of the request's receipt. Takes root, `ip`, `tc` and iperf3:

    python3 bench/link/run.py --model ~/.cache/ridge-peers/models/llama-3.2-1b-q8_0.gguf --out exposed.json
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

HERE = pathlib.Path(__file__).resolve()
NEAR, FAR = ("near", "10.78.0.1"), ("far", "10.78.0.2")
NODES = [("router", "router", NEAR), ("decode-0", "decode", NEAR), ("prefill-0", "prefill", FAR)]
CONTROL, HTTP = 7000, 8000
# A token bucket holds back what comes faster than its rate once this much has come at once.
BURST = "256kb"


def run(line):
    done = subprocess.run(shlex.split(line), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        sys.exit(f"{line} failed:\n{done.stdout[-4000:]}")
    return done.stdout


class Hosts:
    """Two namespaces and a cable."""

    def __init__(self, gbit, mtu):
        self.prefix = f"ridge-link-{os.getpid()}-"
        for name, _ in (NEAR, FAR):
            run(f"ip netns add {self.prefix}{name}")
        near, far = (self.prefix + name for name, _ in (NEAR, FAR))
        run(f"ip -n {near} link add cable mtu {mtu} type veth peer name cable mtu {mtu} netns {far}")
        for name, addr in (NEAR, FAR):
            host = self.prefix + name
            run(f"ip -n {host} addr add {addr}/24 dev cable")
            run(f"ip -n {host} link set lo up")
            run(f"ip -n {host} link set cable up")
            run(f"tc -n {host} qdisc add dev cable root tbf rate {gbit}gbit burst {BURST} latency 20ms")

    def on(self, host, command):
        return ["ip", "netns", "exec", self.prefix + host[0], *map(str, command)]

    def iperf3(self):
        """What one TCP connection carries from the prefill node's host to the other, in bits per second."""
        server = subprocess.Popen(self.on(NEAR, ["iperf3", "-s", "-1"]), stdout=subprocess.DEVNULL)
        time.sleep(0.5)
        client = self.on(FAR, ["iperf3", "-c", NEAR[1], "-t", 2, "-J"])
        report = json.loads(subprocess.run(client, stdout=subprocess.PIPE, check=True).stdout)
        server.wait(10)
        return report["end"]["sum_received"]["bits_per_second"]

    def remove(self):
        for name, _ in (NEAR, FAR):
            subprocess.run(["ip", "netns", "del", self.prefix + name])


def start(args, hosts, folder):
    """A router and two nodes, each with a certificate of the cluster's."""
    nodes = []
    for name, role, host in NODES:
        tls = f"{folder}/{name}"
        run(f"{args.cluster} ca issue {name} --role {role} --ca-dir {folder}/ca --out {tls}")
        command = [args.cluster, role, "--name", name, "--stop-on-stdin-eof", "--tls-dir", tls, "--model", args.model]
        if role == "router":
            command += ["--listen", f"{host[1]}:{CONTROL}", "--port", HTTP, "--host", host[1]]
        else:
            command += ["--router", f"{NEAR[1]}:{CONTROL}", "--listen", f"{host[1]}:0", "--threads", args.threads]
            command += ["--max-model-len", max(args.tokens) + 64]
        log = open(f"{folder}/{name}.log", "w")
        nodes.append(subprocess.Popen(hosts.on(host, command), stdin=subprocess.PIPE, stdout=log, stderr=log))
    return nodes


def ask(url, tokens, draw):
    """Seconds to the first token, and the receipt, of a prompt that nobody has seen."""
    body = {"prompt": [draw.randrange(1000, 100000) for _ in range(tokens)], "max_tokens": 4, "temperature": 0,
            "ignore_eos": True, "stream": True}
    headers = {"Content-Type": "application/json", "X-Ridge-Receipt": "1"}
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), headers)
    begun, first, receipt = time.monotonic(), None, None
    with urllib.request.urlopen(request, timeout=300) as response:
        for line in response:
            if line.startswith(b"data: {"):
                first = first or time.monotonic() - begun
                receipt = json.loads(line[6:]).get("ridge", {}).get("receipt", receipt)
    return first, receipt


def client(url, tokens, repeat):
    """Runs on the router's host: waits for the cluster, and prints one line of JSON for each prompt."""
    for _ in range(600):
        try:
            if urllib.request.urlopen(url + "/health", timeout=5).status == 200:
                break
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    else:
        sys.exit("the cluster is not healthy after two minutes")
    draw = random.Random(5)
    ask(url, 64, draw)
    for length in tokens:
        for _ in range(repeat):
            ttft, receipt = ask(url, length, draw)
            print(json.dumps({"tokens": length, "ttft_s": ttft, "receipt": receipt}), flush=True)


def measure(args, mtu):
    hosts = Hosts(args.gbit, mtu)
    nodes = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            carried = hosts.iperf3()
            nodes = start(args, hosts, folder)
            url = f"http://{NEAR[1]}:{HTTP}"
            asking = [sys.executable, HERE, "--client", url, "--tokens", ",".join(map(str, args.tokens)),
                      "--repeat", args.repeat]
            done = subprocess.run(hosts.on(NEAR, asking), stdout=subprocess.PIPE, text=True)
            if done.returncode != 0:
                logs = "".join(pathlib.Path(f"{folder}/{name}.log").read_text()[-2000:] for name, _, _ in NODES)
                sys.exit(f"the client failed; the nodes said:\n{logs}")
            rows = [json.loads(line) for line in done.stdout.splitlines()]
            for node in nodes:
                node.stdin.close()
                node.wait(20)
    finally:
        for node in nodes:
            node.kill()
        hosts.remove()
    return [cell(mtu, carried, length, [row for row in rows if row["tokens"] == length]) for length in args.tokens]


def cell(mtu, carried, tokens, rows):
    lacking = [row for row in rows if row["receipt"]["transferred"] < tokens - 1]
    if lacking:
        sys.exit(f"not all of a prompt crossed the link: {lacking[0]}")
    exposed = [row["receipt"]["times"]["exposed_us"] / 1e6 for row in rows]
    shares = [seconds / row["ttft_s"] for seconds, row in zip(exposed, rows)]
    return {
        "mtu": mtu, "iperf3_gbit_s": round(carried / 1e9, 2), "prompt_tokens": tokens,
        "transfer_bytes": rows[0]["receipt"]["transfer_bytes"],
        "ttft_s": [round(row["ttft_s"], 4) for row in rows],
        "hidden_ms": [row["receipt"]["times"]["hidden_us"] / 1e3 for row in rows],
        "exposed_ms": [round(1e3 * seconds, 3) for seconds in exposed],
        "exposed_share_median": round(statistics.median(shares), 6), "exposed_share_max": round(max(shares), 6),
    }


def numbers(text):
    return [int(number) for number in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", default=HERE.parent.parent.parent / "target/release/cluster", help="the program")
    parser.add_argument("--model", help="a folder or a GGUF file")
    parser.add_argument("--gbit", type=float, default=10)
    parser.add_argument("--mtu", type=numbers, default=[9000, 1500])
    parser.add_argument("--tokens", type=numbers, default=[512, 2048])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of each node")
    parser.add_argument("--out", help="where the JSON goes, beside stdout")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        return client(args.client, args.tokens, args.repeat)
    if not args.model:
        parser.error("--model is needed")
    cells = [cell for mtu in args.mtu for cell in measure(args, mtu)]
    name = pathlib.Path(args.model).name
    cpu = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), "")
    report = {
        "benchmark": "exposed transfer on a link", "date": datetime.date.today().isoformat(),
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "system": platform.system().lower()},
        "settings": {"model": name, "gbit": args.gbit, "burst": BURST, "threads": args.threads, "repeat": args.repeat},
        "cells": cells,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.out:
        pathlib.Path(args.out).write_text(text + "\n")


main()
