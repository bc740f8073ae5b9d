#!/usr/bin/env python3
"""What PyTorch takes on this device for the work that `cluster gpu-check` times, in the same run.

    attention  scaled_dot_product_attention on contiguous keys and values, by every backend that PyTorch has
    block      a Llama block compiled by torch.compile
    decode     Hugging Face transformers' Llama with a static cache and torch.compile; without transformers, a plain Llama of the
               same shape written here, which is said in the name

One JSON object a line on standard output: {"name": ..., "seconds": ...}, or {"skipped": ..., "why": ...}. Times are medians between
device events. `cluster gpu-check` has this file inside and runs it; it ends by itself when --budget-s is used up.

    python3 torch_check.py --budget-s 150
    python3 torch_check.py --device cpu --small        (no device: shows that it works; its times mean nothing)
"""

import argparse
import json
import statistics
import sys
import time

STARTED = time.monotonic()


def say(**fields):
    print(json.dumps(fields), flush=True)


try:
    import torch
    import torch.nn.functional as F
except ImportError as error:
    say(skipped="torch", why=f"PyTorch is not here: {error}")
    sys.exit(0)


# Llama-3.1-8B.
FULL = dict(hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, layers=32, vocab=128256)
SMALL = dict(hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, layers=2, vocab=256)


class Run:
    def __init__(self, args):
        self.device = args.device
        self.small = args.small
        self.budget = args.budget_s
        self.shape = dict(SMALL if args.small else FULL)
        self.dtype = torch.float32 if self.device == "cpu" else torch.bfloat16

    def left(self):
        return self.budget - (time.monotonic() - STARTED)

    def synchronize(self):
        if self.device != "cpu":
            torch.cuda.synchronize()

    def seconds(self, call, count=20, warm=3):
        """The median of `count` calls after `warm` more."""
        for _ in range(warm):
            call()
        self.synchronize()
        if self.device == "cpu":
            times = []
            for _ in range(3):
                begin = time.perf_counter()
                call()
                times.append(time.perf_counter() - begin)
            return statistics.median(times)
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for begin, end in pairs:
            begin.record()
            call()
            end.record()
        self.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3

    def part(self, name, needs_s, work):
        """Runs `work` if there is time, and says so if not, or if PyTorch cannot."""
        if self.left() < needs_s:
            return say(skipped=name, why=f"{self.left():.0f} s of the budget are left, it may take {needs_s}")
        try:
            work()
        except Exception as error:  # whatever PyTorch says, the other parts go on
            say(skipped=name, why=f"{type(error).__name__}: {error}".splitlines()[0][:300])
        if self.device != "cpu":
            torch.cuda.empty_cache()
        torch._dynamo.reset()


def copy(run):
    count = 1 << (28 if not run.small else 12)
    source = torch.randn(count, device=run.device)
    target = torch.empty_like(source)
    seconds = run.seconds(lambda: target.copy_(source))
    say(name="torch copy", seconds=seconds, bytes=8 * count)


def gemm(run):
    n = k = run.shape["hidden"]
    for rows in [64] if run.small else [512, 1024, 2048, 4096, 8192]:
        x = torch.randn(rows, k, device=run.device, dtype=run.dtype)
        w = torch.randn(n, k, device=run.device, dtype=run.dtype)
        say(name=f"torch gemm out m={rows}", seconds=run.seconds(lambda: F.linear(x, w)), operations=2 * rows * n * k)


def attention(run):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads, kv_heads, dim = run.shape["heads"], run.shape["kv_heads"], run.shape["head_dim"]
    length = 48 if run.small else 8192
    q = torch.randn(1, heads, length, dim, device=run.device, dtype=run.dtype)
    k, v = (torch.randn(1, kv_heads, length, dim, device=run.device, dtype=run.dtype) for _ in range(2))
    # Some backends want as many heads of keys as of queries: both ways are tried, the copy is not timed.
    wide = [t.repeat_interleave(heads // kv_heads, dim=1).contiguous() for t in (k, v)]
    # MATH makes the whole matrix of scores, 8 GB here: it is never the fastest.
    names = ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"] + (["MATH"] if run.small else [])
    for name in names:
        backend = getattr(SDPBackend, name, None)
        if backend is None:
            say(skipped=f"sdpa {name}", why="this PyTorch has no such backend")
            continue
        for what, keys, values, gqa in [("gqa", k, v, True), ("wide", *wide, False)]:
            def call():
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=gqa)
            try:
                say(name=f"sdpa {length} {name} {what}", seconds=run.seconds(call))
            except Exception as error:
                say(skipped=f"sdpa {name} {what}", why=str(error).splitlines()[0][:200])


class Block(torch.nn.Module):
    """A Llama block, prefill without a cache."""

    def __init__(self, shape, device, dtype):
        super().__init__()
        self.shape = shape
        wide, narrow = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
        options = dict(bias=False, device=device, dtype=dtype)
        hidden, ffn = shape["hidden"], shape["ffn"]
        self.qkv = torch.nn.Linear(hidden, wide + 2 * narrow, **options)
        self.out = torch.nn.Linear(wide, hidden, **options)
        self.gate_up = torch.nn.Linear(hidden, 2 * ffn, **options)
        self.down = torch.nn.Linear(ffn, hidden, **options)
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(hidden, 1e-5, device=device, dtype=dtype) for _ in range(2))

    def forward(self, x, cos, sin):
        heads, kv_heads, dim = self.shape["heads"], self.shape["kv_heads"], self.shape["head_dim"]
        rows = x.shape[0]
        q, k, v = self.qkv(self.norms[0](x)).split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
        q, k, v = (t.view(1, rows, -1, dim).transpose(1, 2) for t in (q, k, v))

        def turned(t):
            half = dim // 2
            return t * cos + torch.cat((-t[..., half:], t[..., :half]), dim=-1) * sin

        attended = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).reshape(rows, heads * dim))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def block(run):
    module = Block(run.shape, run.device, run.dtype)
    compiled = torch.compile(module, dynamic=False)
    dim = run.shape["head_dim"]
    for rows in [48] if run.small else [512, 2048, 4096, 8192]:
        if run.left() < 25 and not run.small:
            say(skipped=f"block m={rows}", why="the budget is used up")
            continue
        x = torch.randn(rows, run.shape["hidden"], device=run.device, dtype=run.dtype)
        cos, sin = (torch.randn(rows, dim, device=run.device, dtype=run.dtype) for _ in range(2))
        with torch.no_grad():
            say(name=f"block m={rows}", seconds=run.seconds(lambda: compiled(x, cos, sin)))


def decode(run, batch):
    """A decode step of the whole model, context 1024 as ours."""
    context = 40 if run.small else 1024
    try:
        import transformers
        from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
    except ImportError:
        return say(skipped=f"decode b={batch}", why="Hugging Face transformers is not here")
    s = run.shape
    config = LlamaConfig(
        hidden_size=s["hidden"], intermediate_size=s["ffn"], num_hidden_layers=s["layers"], vocab_size=s["vocab"],
        num_attention_heads=s["heads"], num_key_value_heads=s["kv_heads"], head_dim=s["head_dim"],
        max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=False, attn_implementation="sdpa",
    )
    # Random weights of about the size of real ones; making them one by one on the host would take minutes.
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(run.dtype).to_empty(device=run.device).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        inverse = 1.0 / (10000.0 ** (torch.arange(0, s["head_dim"], 2, device=run.device).float() / s["head_dim"]))
        for name, buffer in model.named_buffers():
            buffer.copy_(inverse) if "inv_freq" in name else buffer.zero_()
    length = context + 64
    try:
        cache = StaticCache(config=config, max_cache_len=length)
    except TypeError:  # older versions
        cache = StaticCache(config, max_batch_size=batch, max_cache_len=length, device=run.device, dtype=run.dtype)
    forward = torch.compile(model.forward, mode="reduce-overhead" if run.device != "cpu" else "default", dynamic=False)
    token = torch.randint(0, s["vocab"], (batch, 1), device=run.device)
    position = torch.tensor([context], device=run.device)

    def step():
        return forward(
            input_ids=token, past_key_values=cache, position_ids=position.expand(batch, 1), cache_position=position,
            use_cache=True,
        )

    with torch.no_grad():
        # The cache's contents do not matter to the time; its length does.
        model(
            input_ids=token.expand(batch, 1), past_key_values=cache, position_ids=position.expand(batch, 1) * 0,
            cache_position=position * 0, use_cache=True,
        )
        seconds = run.seconds(step, count=20, warm=4)
    say(name=f"decode b={batch}", seconds=seconds, context=context, transformers=transformers.__version__)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu")
    parser.add_argument("--small", action="store_true", help="small shapes")
    parser.add_argument("--budget-s", type=float, default=180.0)
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        say(skipped="torch", why=f"PyTorch {torch.__version__} sees no CUDA device")
        return
    if args.device != "cpu":
        torch.cuda.set_device(args.device)
    run = Run(args)
    named = "cpu" if args.device == "cpu" else torch.cuda.get_device_name()
    say(torch=torch.__version__, cuda=torch.version.cuda, device=named)
    torch.manual_seed(1)
    few = 1 if args.small else 32
    run.part("copy", 2, lambda: copy(run))
    run.part("gemm", 2, lambda: gemm(run))
    run.part("attention", 5, lambda: attention(run))
    # What marks are measured by comes first: compiling takes most of the time.
    run.part("decode b=1", 30, lambda: decode(run, 1))
    if few > 1:
        run.part(f"decode b={few}", 30, lambda: decode(run, few))
    run.part("block", 20, lambda: block(run))


if __name__ == "__main__":
    main()
