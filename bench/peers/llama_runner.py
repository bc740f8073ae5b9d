"""Measures llama.cpp through llama-cpp-python's C API and prints one line of JSON. `run.py` runs it in the peer's venv.

Nothing is sampled and the tokens are random, as in llama.cpp's own llama-batched-bench: the time is llama_decode's
alone. Each sequence has a KV buffer of its own. Each cell is measured with flash attention or without, whichever was
faster in its warm-up.
"""

import argparse
import ctypes
import importlib.metadata
import json
import math
import random
import statistics
import time

import llama_cpp

UBATCH = 512
WARM_UP_STEPS = 8


class Session:
    """A context for `sequences` sequences of at most `length` tokens each."""

    def __init__(self, model, threads, sequences, length, flash_attn):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = sequences * length
        params.n_batch = params.n_ubatch = UBATCH
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attn else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED)
        self.flash_attn = flash_attn
        self.sequences = range(sequences)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.rng = random.Random(0)
        self.context = llama_cpp.llama_init_from_model(model, params)
        if not self.context:
            raise RuntimeError("llama.cpp made no context")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(UBATCH, 0, 1)

    def close(self):
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)

    def compute(self, places):
        """Computes a random token at each (sequence, position, logits wanted); returns the seconds that took."""
        self.batch.n_tokens = len(places)
        for i, (sequence, position, logits) in enumerate(places):
            self.batch.token[i] = self.rng.randrange(self.vocab)
            self.batch.pos[i] = position
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = sequence
            self.batch.logits[i] = logits
        start = time.perf_counter()
        status = llama_cpp.llama_decode(self.context, self.batch)
        llama_cpp.llama_synchronize(self.context)
        seconds = time.perf_counter() - start
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        return seconds

    def prefill(self, tokens):
        """Computes a prompt of the first sequence from an empty cache; returns the seconds that took."""
        llama_cpp.llama_memory_clear(self.memory, False)
        return sum(
            self.compute([(0, p, p == tokens - 1) for p in range(first, min(first + UBATCH, tokens))])
            for first in range(0, tokens, UBATCH))

    def share_prompt(self):
        """Copies the first sequence's cache to all others', each of which has a buffer of its own."""
        for sequence in self.sequences[1:]:
            llama_cpp.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)

    def generate(self, context, steps):
        """Computes `steps` tokens of each sequence after `context` others; returns the seconds that took."""
        for sequence in self.sequences:
            llama_cpp.llama_memory_seq_rm(self.memory, sequence, context, -1)
        return sum(self.compute([(s, context + step, True) for s in self.sequences]) for step in range(steps))

    def check_logits(self):
        """Fails if the last computation's last logits are not numbers or all the same."""
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)[:self.vocab]
        if not all(map(math.isfinite, logits)) or min(logits) == max(logits):
            raise RuntimeError("llama.cpp computed bad logits")


def faster(open_session, warm_up):
    """The session with the shorter warm-up of one with flash attention and one without."""
    sessions = [open_session(flash_attn) for flash_attn in (True, False)]
    seconds = [warm_up(session) for session in sessions]
    winner = seconds.index(min(seconds))
    sessions[1 - winner].close()
    return sessions[winner]


def measure_prefill(model, threads, tokens, repeat):
    session = faster(
        lambda flash_attn: Session(model, threads, 1, tokens, flash_attn),
        lambda session: session.prefill(tokens))
    seconds = statistics.median(session.prefill(tokens) for _ in range(repeat))
    session.check_logits()
    session.close()
    return {"tokens_per_s": tokens / seconds, "flash_attn": session.flash_attn}


def measure_decode(model, threads, batch, context, steps, repeat):
    def warm_up(session):
        session.prefill(context)
        session.share_prompt()
        session.generate(context, 1)
        return session.generate(context, WARM_UP_STEPS)

    session = faster(
        lambda flash_attn: Session(model, threads, batch, context + max(steps, WARM_UP_STEPS), flash_attn), warm_up)
    seconds = statistics.median(session.generate(context, steps) for _ in range(repeat))
    session.check_logits()
    session.close()
    return {"batch": batch, "tokens_per_s": batch * steps / seconds, "flash_attn": session.flash_attn}


@llama_cpp.llama_log_callback
def quiet(_level, _text, _data):
    """Swallows llama.cpp's log."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--gen-tokens", type=int, default=64)
    parser.add_argument("--batch", default="1,4,8,16", help="batch sizes of the decode cells")
    parser.add_argument("--context", type=int, default=128, help="tokens before the first decoded one")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each cell; the median counts")
    args = parser.parse_args()

    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(args.model.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {args.model}")
    print(json.dumps({
        "versions": {
            "llama-cpp-python": importlib.metadata.version("llama-cpp-python"),
            "llama.cpp": llama_cpp.llama_version().decode(),
            "cpu features": llama_cpp.llama_print_system_info().decode().strip(),
        },
        "prefill": measure_prefill(model, args.threads, args.prompt_tokens, args.repeat),
        "decode": [
            measure_decode(model, args.threads, int(batch), args.context, args.gen_tokens, args.repeat)
            for batch in args.batch.split(",")
        ],
    }))


if __name__ == "__main__":
    main()
