"""Writes llama.cpp's logits after every token of a list and prints one line of JSON.

`accuracy.py` runs it in the peer's venv.
"""

import argparse
import ctypes
import importlib.metadata
import json
import pathlib

import llama_cpp

from llama_runner import quiet

KV_TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "f32": llama_cpp.GGML_TYPE_F32}
FLASH_ATTN = {
    "auto": llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO, "on": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED}


def open_context(model, args, length):
    """A context for one sequence."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = length
    params.n_batch = params.n_ubatch = args.step
    params.n_threads = params.n_threads_batch = args.threads
    params.type_k = params.type_v = KV_TYPES[args.kv]
    params.flash_attn_type = FLASH_ATTN[args.flash_attn]
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise SystemExit("llama.cpp made no context")
    return context


def write_logits(model, context, tokens, step, file):
    """Computes `step` tokens at a time and appends the logits after each to the file, as f32."""
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(step, 0, 1)
    for start in range(0, len(tokens), step):
        part = tokens[start:start + step]
        batch.n_tokens = len(part)
        for i, token in enumerate(part):
            batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, True
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        status = llama_cpp.llama_decode(context, batch)
        if status != 0:
            raise SystemExit(f"llama_decode returned {status}")
        logits = llama_cpp.llama_get_logits(context)
        file.write(ctypes.string_at(logits, len(part) * vocab * ctypes.sizeof(ctypes.c_float)))
    llama_cpp.llama_batch_free(batch)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument("--tokens", type=pathlib.Path, required=True, help="a file of token ids between blanks")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="becomes [tokens, vocab] in f32")
    parser.add_argument("--step", type=int, required=True, help="tokens computed in a pass")
    parser.add_argument("--kv", choices=KV_TYPES, default="f16", help="type of the KV cache (%(default)s)")
    parser.add_argument("--flash-attn", choices=FLASH_ATTN, default="auto", help="(%(default)s)")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()

    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(args.model.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {args.model}")
    tokens = [int(token) for token in args.tokens.read_text().split()]
    context = open_context(model, args, len(tokens))
    with open(args.out, "wb") as file:
        write_logits(model, context, tokens, args.step, file)
    print(json.dumps({
        "versions": {
            "llama-cpp-python": importlib.metadata.version("llama-cpp-python"),
            "llama.cpp": llama_cpp.llama_version().decode(),
            "cpu features": llama_cpp.llama_print_system_info().decode().strip(),
        },
        "kv": args.kv,
        "flash_attn": args.flash_attn,
    }))


if __name__ == "__main__":
    main()
