"""Computes a Llama's logits exactly from a GGUF file, compares others' with them and prints one line of JSON.
`accuracy.py` runs it in a venv with numpy and gguf.

Exactly means: weights as the file defines them, and all arithmetic in float64. The forward pass is written for reading
and shares no code with any engine.
"""

import argparse
import json
import pathlib

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

# Rows of the output head in memory at a time.
HEAD_ROWS = 8192


class Model:
    """A GGUF file of architecture llama. Tensors are dequantised when they are used: one at a time is in memory."""

    def __init__(self, path):
        reader = GGUFReader(path)
        self.fields = reader.fields
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        if self.fields["general.architecture"].contents() != "llama":
            raise SystemExit("only Llamas are computed exactly")

    def number(self, key):
        return self.fields[f"llama.{key}"].contents()

    def tensor(self, name, rows=slice(None)):
        tensor = self.tensors[f"{name}.weight"]
        return dequantize(tensor.data[rows], tensor.tensor_type).astype(np.float64)

    def logits(self, tokens):
        """The logits after every token: `[tokens, vocab]`."""
        x = self.tensor("token_embd", tokens)
        cos, sin = self.angles(len(tokens))
        for layer in range(self.number("block_count")):
            x += self.attention(f"blk.{layer}", self.norm(x, f"blk.{layer}.attn_norm"), cos, sin)
            x += self.feed_forward(f"blk.{layer}", self.norm(x, f"blk.{layer}.ffn_norm"))
        x = self.norm(x, "output_norm")
        head = "output" if "output.weight" in self.tensors else "token_embd"
        vocab = self.tensors[f"{head}.weight"].data.shape[0]
        starts = range(0, vocab, HEAD_ROWS)
        return np.concatenate([x @ self.tensor(head, slice(at, at + HEAD_ROWS)).T for at in starts], axis=1)

    def norm(self, x, name):
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + self.number("attention.layer_norm_rms_epsilon")) * self.tensor(name)

    def angles(self, length):
        """Cosines and sines of every position and rotated pair."""
        dim = self.number("rope.dimension_count")
        frequencies = self.number("rope.freq_base") ** (-np.arange(0, dim, 2) / dim)
        if "rope_freqs.weight" in self.tensors:
            frequencies /= self.tensor("rope_freqs")
        angles = np.outer(np.arange(length), frequencies)
        return np.cos(angles), np.sin(angles)

    def attention(self, block, h, cos, sin):
        heads, kv_heads = self.number("attention.head_count"), self.number("attention.head_count_kv")

        def split(name, count):
            return (h @ self.tensor(f"{block}.{name}").T).reshape(len(h), count, -1).swapaxes(0, 1)

        q = rotate(split("attn_q", heads), cos, sin)
        k = rotate(split("attn_k", kv_heads), cos, sin).repeat(heads // kv_heads, axis=0)
        v = split("attn_v", kv_heads).repeat(heads // kv_heads, axis=0)
        scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
        scores[:, np.triu(np.ones((len(h), len(h)), dtype=bool), k=1)] = -np.inf
        attended = np.exp(log_softmax(scores)) @ v
        return attended.swapaxes(0, 1).reshape(len(h), -1) @ self.tensor(f"{block}.attn_output").T

    def feed_forward(self, block, h):
        gate = h @ self.tensor(f"{block}.ffn_gate").T
        up = h @ self.tensor(f"{block}.ffn_up").T
        return (gate / (1 + np.exp(-gate)) * up) @ self.tensor(f"{block}.ffn_down").T


def rotate(x, cos, sin):
    """Rotates neighbouring elements: the file's rows of q and k are in the order that makes this right."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def compare(exact, logits, tokens):
    """How far logits are from exact log-probabilities, in nats."""
    top, following, divergence, same = [], [], [], []
    # Any token would do after the last one.
    for want, row, token in zip(exact, logits, tokens[1:] + tokens[:1]):
        error = log_softmax(row.astype(np.float64)) - want
        best = want.argmax()
        top.append(abs(error[best]))
        following.append(abs(error[token]))
        divergence.append(-np.sum(np.exp(want) * error))
        same.append(row.argmax() == best)
    return {
        "top_token": {"mean": np.mean(top), "max": np.max(top)},
        "next_token": {"mean": np.mean(following), "max": np.max(following)},
        "kl_divergence": {"mean": np.mean(divergence), "standard_error": np.std(divergence) / np.sqrt(len(tokens))},
        "same_top_token": np.mean(same),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument("--tokens", type=pathlib.Path, required=True, help="a file of token ids between blanks")
    parser.add_argument("logits", nargs="+", type=pathlib.Path, help="files of [tokens, vocab] in f32")
    args = parser.parse_args()

    tokens = [int(token) for token in args.tokens.read_text().split()]
    exact = log_softmax(Model(args.model).logits(tokens))
    others = [np.memmap(path, np.float32, "r", shape=exact.shape) for path in args.logits]
    print(json.dumps({
        "exact": {
            "logits_standard_deviation": np.mean(exact.std(axis=1)),
            "entropy": np.mean([-np.sum(np.exp(row) * row) for row in exact]),
            "entropy_of_a_guess": np.log(exact.shape[1]),
        },
        "errors": [compare(exact, logits, tokens) for logits in others],
    }))


if __name__ == "__main__":
    main()
