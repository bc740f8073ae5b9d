"""Makes small seeded random models and what Hugging Face transformers computes with them.

    python3 model/goldens/make_model_goldens.py           # every model below
    python3 model/goldens/make_model_goldens.py qwen3     # one of them
    python3 model/goldens/make_model_goldens.py demo      # answers of model/demo/ridge-demo

Each model becomes a folder with config.json, model.safetensors and golden.json. The configurations are written in
the two spellings found in the wild: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters`
(transformers 5). golden.json holds, for each prompt, the greedy continuation and the five largest log-probabilities
of each step, computed in float32 with eager attention from the files just written.

Random models have no opinion, so the weights are drawn wide enough for peaked logits, and a prompt is drawn again
until the two likeliest tokens of every step are at least MIN_GAP apart: then equal ids are a fair thing to ask.

tokenizer.json is shared by all of them: a checkpoint cannot be loaded without one, and no golden uses it.

The dynamic-NTK model is fed one token at a time. model/src/rope.rs says why.

Models with a quantization_config are written with fp8 codes and their factors; what is computed is the model whose matrices are
codes times factors, rounded to bfloat16, as transformers dequantises them.
"""

import json
import pathlib
import sys
import tempfile

import torch
import transformers
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
LENGTHS = [1, 7, 33, 70]
STEPS = 24
MIN_GAP = 0.02
VOCAB = 160

LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=VOCAB,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=True,
    rope_theta=10000.0,
)


TOKENIZER = dict(
    version="1.0",
    added_tokens=[],
    pre_tokenizer=dict(type="Whitespace"),
    model=dict(type="WordLevel", vocab={"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"),
)


def with_rope(**rope):
    """A llama configuration in the spelling of transformers 5."""
    config = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    return dict(config, rope_parameters=dict(rope_theta=10000.0, **rope))


MODELS = {
    "llama-mha": dict(LLAMA, num_key_value_heads=4),
    "llama-gqa": dict(LLAMA, tie_word_embeddings=False),
    "llama-mqa": dict(LLAMA, num_key_value_heads=1, num_hidden_layers=3),
    "llama-rope-llama3": dict(
        LLAMA,
        # With this base one wavelength is short, one on the ramp and the others long.
        rope_scaling=dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama-rope-linear": dict(LLAMA, rope_scaling=dict(type="linear", factor=4.0)),
    "llama-rope-dynamic": dict(with_rope(rope_type="dynamic", factor=2.0), max_position_embeddings=40),
    "llama-rope-yarn": with_rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
    "mistral-window": dict(
        {key: value for key, value in LLAMA.items() if key not in ("attention_bias", "mlp_bias")},
        architectures=["MistralForCausalLM"],
        model_type="mistral",
        sliding_window=12,
        tie_word_embeddings=False,
    ),
    "qwen2": dict(
        {key: value for key, value in LLAMA.items() if key not in ("attention_bias", "mlp_bias", "head_dim")},
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        num_attention_heads=3,
        num_key_value_heads=1,
        use_sliding_window=False,
        sliding_window=64,
        max_window_layers=2,
        rope_theta=1000000.0,
        rms_norm_eps=1e-6,
    ),
    "qwen3": dict(
        {key: value for key, value in LLAMA.items() if key != "mlp_bias"},
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        head_dim=24,
        use_sliding_window=False,
        sliding_window=None,
        max_window_layers=2,
        rope_theta=1000000.0,
        rms_norm_eps=1e-6,
    ),
    "llama-bf16": dict(LLAMA, tie_word_embeddings=False, dtype="bfloat16"),
    # A factor for each row, as llm-compressor writes it.
    "llama-fp8-channel": dict(
        LLAMA,
        tie_word_embeddings=False,
        dtype="bfloat16",
        quantization_config=dict(
            quant_method="compressed-tensors",
            format="float-quantized",
            ignore=["lm_head"],
            config_groups=dict(
                group_0=dict(
                    targets=["Linear"],
                    weights=dict(num_bits=8, type="float", strategy="channel", symmetric=True, dynamic=False),
                    input_activations=dict(num_bits=8, type="float", strategy="token", symmetric=True, dynamic=True),
                )
            ),
        ),
    ),
    # A factor for each block, as DeepSeek's models have it.
    "llama-fp8-block": dict(
        LLAMA,
        tie_word_embeddings=False,
        dtype="bfloat16",
        quantization_config=dict(
            quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[16, 16]
        ),
    ),
}


def quantized(config, weights):
    """The weights with fp8 codes and factors for the linear layers, and what those stand for."""
    stored, meant = {}, {}
    rows, cols = config["quantization_config"].get("weight_block_size", (1, None))
    for name, tensor in weights.items():
        stored[name] = meant[name] = tensor
        if "proj" not in name:
            continue
        tall, wide = rows, cols or tensor.shape[1]
        blocks = [[part.float().abs().max() / 448 for part in strip.split(wide, 1)] for strip in tensor.split(tall)]
        factors = torch.tensor(blocks, dtype=torch.float32 if cols else torch.bfloat16)
        spread = factors.float().repeat_interleave(tall, 0)[: tensor.shape[0]]
        spread = spread.repeat_interleave(wide, 1)[:, : tensor.shape[1]]
        codes = (tensor.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored[name] = codes
        stored[name + ("_scale_inv" if cols else "_scale")] = factors
        meant[name] = (codes.float() * spread).to(torch.bfloat16)
    return stored, meant


def random_weights(config, generator):
    """Weights wide enough for the logits to have an opinion."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**plain))
    dtype = torch.bfloat16 if config.get("dtype") == "bfloat16" else torch.float32
    # Gain and spread also amplify rounding errors, which bfloat16 has enough of.
    gain, spread = (1.0, 0.3) if dtype == torch.bfloat16 else (1.5, 0.5)
    weights = {}
    for name, tensor in model.state_dict().items():
        if config["tie_word_embeddings"] and name == "lm_head.weight":
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name:
            weights[name] = 1.0 + 0.2 * noise
        elif name.endswith(".bias"):
            weights[name] = 0.5 * noise
        elif "embed" in name or "lm_head" in name:
            weights[name] = spread * noise
        else:
            weights[name] = noise * (gain / tensor.shape[-1] ** 0.5)
    return {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}


@torch.no_grad()
def greedy(model, prompt, steps, one_by_one):
    """Greedy ids, the five largest log-probabilities of each step, and the smallest gap between the first two."""
    cache = transformers.DynamicCache(config=model.config)
    pieces = [[token] for token in prompt] if one_by_one else [prompt]
    for piece in pieces:
        logits = model(torch.tensor([piece]), past_key_values=cache, use_cache=True).logits[0, -1]
    ids, top, gap = [], [], float("inf")
    for _ in range(steps):
        values, tokens = torch.log_softmax(logits.double(), -1).topk(5)
        ids.append(tokens[0].item())
        top.append([[token.item(), round(value.item(), 6)] for token, value in zip(tokens, values)])
        gap = min(gap, (values[0] - values[1]).item())
        logits = model(torch.tensor([[ids[-1]]]), past_key_values=cache, use_cache=True).logits[0, -1]
    return ids, top, gap


def load(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def load_plain(config, weights):
    """A model of these weights, whatever its files hold."""
    with tempfile.TemporaryDirectory() as folder:
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(plain))
        save_file(weights, pathlib.Path(folder) / "model.safetensors", metadata={"format": "pt"})
        return load(folder)


def write_golden(path, cases):
    head = dict(made_with=f"transformers {transformers.__version__}, torch {torch.__version__}, float32, eager")
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    path.write_text(json.dumps(head)[:-1] + ', "cases": [\n' + lines + "\n]}\n")


def make(name, config, seed):
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = random_weights(config, generator)
    stored, meant = quantized(config, weights) if "quantization_config" in config else (weights, None)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    model = load(folder) if meant is None else load_plain(config, meant)
    cases = []
    for length in LENGTHS:
        for attempt in range(200):
            prompt = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
            ids, top, gap = greedy(model, prompt, STEPS, one_by_one="dynamic" in name)
            if gap > MIN_GAP:
                break
        else:
            raise SystemExit(f"{name}: no prompt of {length} tokens without near ties; take another seed")
        print(f"{name}: {length} tokens, attempt {attempt + 1}, gap {gap:.3f}, {len(set(ids))} distinct ids")
        cases.append(dict(prompt=prompt, ids=ids, top=top))
    write_golden(folder / "golden.json", cases)


DEMO_QUESTIONS = ["Hello! Who are you?", "What is prefill?", "How does continuous batching work?"]
DEMO_BEGINNINGS = ["To Sherlock Holmes she is always", "It was a cold morning"]


def make_demo():
    """Answers and continuations of the demo model, whose weights are in its own folder. Run it after each training."""
    folder = HERE.parent / "demo" / "ridge-demo"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = load(folder)
    prompts = [tokenizer(text)["input_ids"] for text in DEMO_BEGINNINGS]
    for question in DEMO_QUESTIONS:
        messages = [dict(role="user", content=question)]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    cases = []
    for prompt in prompts:
        ids, top, _ = greedy(model, prompt, 48, one_by_one=False)
        # What a model says after its end token is noise.
        if tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(tokenizer.eos_token_id) + 1]
        print(f"demo: {len(prompt)} tokens: {tokenizer.decode(ids)!r}")
        cases.append(dict(prompt=prompt, ids=ids, top=top[: len(ids)]))
    (HERE / "ridge-demo").mkdir(exist_ok=True)
    write_golden(HERE / "ridge-demo" / "golden.json", cases)


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or list(MODELS)
    (HERE / "tokenizer.json").write_text(json.dumps(TOKENIZER) + "\n")
    for seed, name in enumerate(MODELS, start=1):
        if name in wanted:
            make(name, MODELS[name], seed)
    if "demo" in wanted:
        make_demo()
