#!/usr/bin/env python3
"""Makes the built-in model `ridge-demo` from the data in this folder.

One command does everything: `python train.py`. It trains the tokenizer, mixes the training rows, trains a small
Llama-architecture model on the CPU, exports a Hugging Face folder to `ridge-demo/` and evaluates it with transformers.
`python train.py --eval-only` repeats the evaluation of the folder that is there.

Data: `data/sherlock.txt` (public-domain stories), `questions.jsonl` (questions about LLM serving with paraphrases and
one answer each) and `data/smalltalk.jsonl` (greetings, story prompts and questions that the model must decline).
The texts under `held_out` are never trained on; they measure whether the model understands or only remembers.
"""

import argparse
import json
import math
import os
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

HERE = Path(__file__).resolve().parent
BOS, END, SYSTEM, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIALS = [BOS, END, SYSTEM, USER, ASSISTANT]
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] in ['system', 'developer'] -%}{{- '<|system|>' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- '<|assistant|>' -}}"
    "{%- else -%}{{- '<|user|>' -}}"
    "{%- endif -%}"
    "{%- if message['content'] is string -%}{{- message['content'] | trim -}}"
    "{%- else -%}{%- for part in message['content'] or [] -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
CONFIG = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=3072, hidden_size=256, intermediate_size=704,
    num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, head_dim=32, hidden_act="silu",
    max_position_embeddings=2048, rope_theta=10000.0, rms_norm_eps=1e-5, tie_word_embeddings=True,
    attention_bias=False, mlp_bias=False, attention_dropout=0.0, initializer_range=0.02, use_cache=True,
    bos_token_id=0, eos_token_id=1, pad_token_id=1, torch_dtype="bfloat16",
)
# Row length and its share of the steps. Every step holds TOKENS_PER_STEP tokens whatever the row length is.
ROW_LENGTHS = [(256, 0.35), (512, 0.40), (1024, 0.17), (2048, 0.08)]
TOKENS_PER_STEP = 4096
# Training runs through these cycles: the number of steps, what both learning rates are multiplied by, and the share of
# the rows that are plain story text (the others are packed conversations).
CYCLES = [(300, 1.0, 0.42), (420, 0.6, 0.42), (90, 0.35, 0.42), (300, 0.6, 0.6)]


# Weights of the loss. What the user says counts a little, so that the model learns to read questions. The first tokens
# of an answer count most: they decide which answer it will be, and the rest then follows almost by heart.
TEXT_WEIGHT, USER_WEIGHT, ANSWER_WEIGHT = 1.0, 0.2, 1.0
OPENING_WEIGHT, OPENING_TOKENS = 4.0, 8


# ---------------------------------------------------------------------------------------------------------------
# Data


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def normalized(text):
    """The text without case and punctuation; two prompts that agree here count as the same prompt."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def train_tokenizer(paragraphs, questions, smalltalk):
    tokenizer = Tokenizer(models.BPE())
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # The whole byte alphabet is in the vocabulary, so that any UTF-8 text survives a round trip.
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The answers count several times, so that the words of the field become single tokens.
    corpus = list(paragraphs)
    for entry in questions:
        corpus += [entry["question"]] + entry["paraphrases"] + [entry["answer"]] * 12
    for entry in smalltalk:
        corpus += entry["prompts"] + [entry["answer"] or ""] * 12
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


SYSTEM_MESSAGES = """You are a helpful assistant.|You are a helpful assistant. Answer briefly.|Answer the question.|You are ridge-demo.
Be polite and precise.|You are an expert for LLM serving.|You are a friendly chatbot.|Answer in English.|Keep your answers short.
You are an AI assistant.|Be concise.|You are a teacher who explains things simply.|Respond truthfully.|Think before you answer.
You are a helpful, honest and harmless assistant.|You are the assistant of a software company.|Do not use markdown.
You are ChatGPT.|Today is Monday.|The user is a beginner.|You talk like a pirate.|Always be kind.|System prompt.|Help the user."""
SYSTEM_MESSAGES = SYSTEM_MESSAGES.replace("\n", "|").split("|")
PREFIXES = """Please: |Hi, |Hello! |Hey, |Hey! |Quick question: |Question: |Can you tell me: |I have a question. |So, |And |Also, |Okay, |Ok, |
Sorry, |One more question: |Just curious: |Next question: |I am new here. |Hi! |Good morning! |Well, |Dear model, |Thanks. |Thank you. |
Great. |Another one: |please |hi |Now |Then |But |Listen: |Excuse me, |Could you answer this? |I do not understand this: """
PREFIXES = PREFIXES.replace("\n", "").split("|")
SUFFIXES = """ Thanks.| Please.| please| Thank you!| Explain briefly.| In one sentence.| In simple words.| Keep it short.| I am a beginner.|
 Thanks in advance.| Be brief.| Answer shortly.| I am curious.| Explain it to me.| in short| exactly| really| Please explain."""
SUFFIXES = SUFFIXES.replace("\n", "").split("|")
STORY_LENGTHS = (100, 320)


class Mixer:
    """Draws training rows: plain story text and packed conversations. The seed fixes everything it draws."""

    def __init__(self, tokenizer, paragraphs, questions, smalltalk, seed, text_share):
        self.rng = random.Random(seed)
        self.text_share = text_share
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        self.id = {token: tokenizer.token_to_id(token) for token in SPECIALS}
        self.paragraphs = [self.encode(p + "\n\n") for p in paragraphs]
        # A told story begins with narration of some length, not in the middle of a dialogue.
        self.story_starts = [i for i, p in enumerate(paragraphs) if len(p) > 250 and p[0] not in "\"'" and not p.isupper()]
        self.texts = paragraphs
        self.questions = questions
        self.smalltalk = {entry["kind"]: entry for entry in smalltalk}
        self.held_out = {normalized(h) for entry in questions + smalltalk for h in entry["held_out"]}

    def noisy(self, prompt):
        """The prompt as different people would type it. A held-out text is never produced."""
        rng = self.rng
        for _ in range(20):
            text = prompt
            if rng.random() < 0.25:
                text = text.rstrip("?.!")
            elif rng.random() < 0.08:
                text = text.rstrip("?.!") + rng.choice(["??", "!", "?!", " ?", "...", ".", "?"])
            if rng.random() < 0.22:
                prefix = rng.choice(PREFIXES)
                first = text.split(" ")[0]
                text = prefix + (text if first[1:] != first[1:].lower() else text[0].lower() + text[1:])
            if rng.random() < 0.10:
                text = text + rng.choice(SUFFIXES)
            if rng.random() < 0.10 and len(text) > 12:
                i = rng.randrange(1, len(text) - 1)
                text = rng.choice(
                    [text[:i] + text[i + 1 :], text[:i] + text[i] + text[i:], text[:i] + text[i + 1] + text[i] + text[i + 2 :]]
                )
            case = rng.random()
            if case < 0.30:
                text = text.lower()
            elif case < 0.45:
                text = text.upper()
            if normalized(text) not in self.held_out:
                return text
        return prompt

    def story(self):
        """Some consecutive paragraphs; ends at a paragraph's end."""
        limit = self.rng.randint(*STORY_LENGTHS)
        i = self.rng.choice(self.story_starts)
        parts, length = [], 0
        while i < len(self.texts) and (not parts or length < limit):
            parts.append(self.texts[i])
            length += len(self.paragraphs[i])
            i += 1
        return "\n\n".join(parts)

    def turn(self):
        rng = self.rng
        kind = rng.choices(
            ["question", "unknown", "greeting", "how_are_you", "thanks", "bye", "story"], [74, 11, 3, 1, 3, 2, 4]
        )[0]
        if kind == "question":
            entry = rng.choice(self.questions)
            # The question itself is drawn more often than each of its paraphrases.
            prompt = entry["question"] if rng.random() < 0.2 else rng.choice(entry["paraphrases"])
        else:
            entry = self.smalltalk[kind]
            prompt = rng.choice(entry["prompts"])
        prompt = self.noisy(prompt)
        if kind == "question" and rng.random() < 0.03:
            prompt = self.story() + "\n\n" + prompt
        return prompt, self.story() if kind == "story" else entry["answer"]

    def conversation(self):
        """Token ids, and for each its weight in the loss."""
        rng = self.rng
        ids, weights = [self.id[BOS]], [0.0]

        def add(role, content, weight):
            body = self.encode(content) + [self.id[END]]
            ids.extend([self.id[role]] + body)
            opening = OPENING_TOKENS if role == ASSISTANT else 0
            weights.extend([0.0] + [OPENING_WEIGHT if i < opening else weight for i in range(len(body))])

        if rng.random() < 0.25:
            add(SYSTEM, rng.choice(SYSTEM_MESSAGES) if rng.random() < 0.8 else rng.choice(self.texts)[:300].strip(), 0.0)
        for _ in range(rng.choices([1, 2, 3, 4, 6], [55, 30, 8, 4, 3])[0]):
            prompt, answer = self.turn()
            add(USER, prompt, USER_WEIGHT)
            add(ASSISTANT, answer, ANSWER_WEIGHT)
        return ids, weights

    def text_row(self, length):
        """One stretch of story text from a random paragraph on."""
        i = self.rng.randrange(len(self.paragraphs))
        ids = [self.id[BOS]]
        while len(ids) < length:
            if i == len(self.paragraphs):
                ids += [self.id[END], self.id[BOS]]
                i = 0
            ids += self.paragraphs[i]
            i += 1
        return ids[:length], [TEXT_WEIGHT] * length

    def chat_row(self, length):
        ids, weights = [], []
        while len(ids) < length:
            more = self.conversation()
            ids += more[0]
            weights += more[1]
        return ids[:length], weights[:length]

    def batch(self):
        """Inputs, targets and the weight of each target."""
        length = self.rng.choices([n for n, _ in ROW_LENGTHS], [w for _, w in ROW_LENGTHS])[0]
        rows = TOKENS_PER_STEP // length
        inputs, targets = np.zeros((rows, length), np.int64), np.zeros((rows, length), np.int64)
        weights = np.zeros((rows, length), np.float32)
        for r in range(rows):
            make = self.text_row if self.rng.random() < self.text_share else self.chat_row
            ids, weight = make(length + 1)
            inputs[r], targets[r], weights[r] = ids[:-1], ids[1:], weight[1:]
        return torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(weights)


# ---------------------------------------------------------------------------------------------------------------
# Model: the arithmetic of transformers' LlamaForCausalLM, with the same parameter names


class RmsNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, CONFIG["rms_norm_eps"])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        hidden, dim = CONFIG["hidden_size"], CONFIG["head_dim"]
        self.q_heads, self.kv_heads, self.dim = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"], dim
        self.q_proj = nn.Linear(hidden, self.q_heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(self.q_heads * dim, hidden, bias=False)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.q_heads, self.dim).transpose(1, 2)
        k = self.k_proj(x).view(b, t, self.kv_heads, self.dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.kv_heads, self.dim).transpose(1, 2)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        share = self.q_heads // self.kv_heads
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


def rotated(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm = RmsNorm(CONFIG["hidden_size"])
        self.self_attn = Attention()
        self.post_attention_layernorm = RmsNorm(CONFIG["hidden_size"])
        self.mlp = Mlp()

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(CONFIG["vocab_size"], CONFIG["hidden_size"])
        self.layers = nn.ModuleList(Layer() for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = RmsNorm(CONFIG["hidden_size"])
        frequency = CONFIG["rope_theta"] ** (-torch.arange(0, CONFIG["head_dim"], 2).float() / CONFIG["head_dim"])
        angle = torch.outer(torch.arange(CONFIG["max_position_embeddings"]).float(), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # What writes into the residual stream starts at zero: the untrained model is the identity.
                nn.init.zeros_(p) if name.endswith(("o_proj.weight", "down_proj.weight")) else nn.init.normal_(p, std=0.02)

    def hidden(self, ids):
        x = self.embed_tokens(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def loss(self, ids, targets, weights, hidden=None):
        """Weighted mean over the positions that have a weight; logits are computed for these only."""
        x = (hidden or self.hidden)(ids).flatten(0, 1)
        chosen = weights.flatten().nonzero().squeeze(1)
        logits = F.linear(x[chosen], self.embed_tokens.weight)
        losses = F.cross_entropy(logits, targets.flatten()[chosen], reduction="none")
        weights = weights.flatten()[chosen]
        return (losses * weights).sum() / weights.sum()


# ---------------------------------------------------------------------------------------------------------------
# Training


class Muon:
    """Momentum whose update is made orthogonal (Newton-Schulz), for the matrices inside the layers.

    It needs far fewer steps than AdamW for these, which is what makes training on two CPU cores possible.
    """

    def __init__(self, parameters, momentum=0.95, weight_decay=0.02):
        groups = {}
        for p in parameters:
            groups.setdefault(p.shape, []).append(p)
        self.groups = list(groups.values())
        self.buffers = [[torch.zeros_like(p) for p in g] for g in self.groups]
        self.momentum, self.weight_decay = momentum, weight_decay

    @torch.no_grad()
    def step(self, lr):
        for group, buffers in zip(self.groups, self.buffers):
            for p, m in zip(group, buffers):
                m.lerp_(p.grad, 1 - self.momentum)
            update = torch.stack([p.grad.lerp(m, self.momentum) for p, m in zip(group, buffers)])
            update = orthogonal(update) * max(1.0, group[0].shape[0] / group[0].shape[1]) ** 0.5
            for p, u in zip(group, update):
                p.mul_(1 - lr * self.weight_decay).add_(u, alpha=-lr)


def orthogonal(x):
    """The nearest (semi-)orthogonal matrices, roughly: five Newton-Schulz steps."""
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        a = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x.transpose(1, 2) if tall else x


def train(model, mixer, args, steps, lr_scale, export):
    """One cycle with fresh optimizers. Returns the seconds it took."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=args.lr_embed, betas=(0.9, 0.95), weight_decay=0.01)
    hidden = torch.compile(model.hidden, dynamic=False) if not args.no_compile else None
    log = open(args.log, "a", encoding="utf-8")
    started, averages = time.time(), {}
    for step in range(steps):
        # Short warm-up, constant, then a cosine to zero over the last 70 % of the steps.
        warm = min(1.0, (step + 1) / 30)
        tail = max(0.0, (step / steps - 0.3) / 0.7)
        factor = warm * 0.5 * (1 + math.cos(math.pi * tail))
        loss = model.loss(*mixer.batch(), hidden)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(others, 1.0)  # the size of Muon's update does not depend on the gradient's
        muon.step(args.lr * lr_scale * factor)
        for g in adam.param_groups:
            g["lr"] = args.lr_embed * lr_scale * factor
        adam.step()
        model.zero_grad(set_to_none=True)
        averages["loss"] = 0.98 * averages.get("loss", loss.item()) + 0.02 * loss.item()
        if step % 20 == 0 or step == steps - 1:
            seconds = time.time() - started
            line = dict(step=step, loss=round(averages["loss"], 4), norm=round(float(norm), 3), seconds=round(seconds),
                        tokens_per_s=round((step + 1) * TOKENS_PER_STEP / seconds))
            print(json.dumps(line), file=log, flush=True)
        if args.save_every and step and step % args.save_every == 0:
            export()
    return time.time() - started


@torch.no_grad()
def measured_losses(model, mixer):
    """Loss on story text and on the answers, separately, over fresh rows of the training mix."""
    result = {}
    for name, row in (("text", mixer.text_row), ("answers", mixer.chat_row)):
        losses = []
        for _ in range(24):
            ids, weights = row(513)
            weights = torch.tensor([[float(w >= ANSWER_WEIGHT) for w in weights[1:]]])
            losses.append(model.loss(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]), weights).item())
        result[name] = round(sum(losses) / len(losses), 4)
    ids, _ = mixer.text_row(2049)
    per_position = F.cross_entropy(
        F.linear(model.hidden(torch.tensor([ids[:-1]])), model.embed_tokens.weight)[0],
        torch.tensor(ids[1:]), reduction="none",
    )
    result["text_positions_0_1023"] = round(per_position[:1024].mean().item(), 4)
    result["text_positions_1024_2047"] = round(per_position[1024:].mean().item(), 4)
    return result


# ---------------------------------------------------------------------------------------------------------------
# Export


def write_atomically(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    with os.fdopen(handle, "wb") as f:
        f.write(data)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def export_folder(model, tokenizer, out):
    as_json = lambda value: (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    tensors = {f"model.{n}": p.detach().to(torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
        write_atomically(out / "model.safetensors", Path(f"{folder}/model.safetensors").read_bytes())
    write_atomically(out / "config.json", as_json(CONFIG))
    write_atomically(out / "tokenizer.json", (tokenizer.to_str(pretty=True) + "\n").encode())
    write_atomically(
        out / "tokenizer_config.json",
        as_json(
            dict(
                tokenizer_class="PreTrainedTokenizerFast", bos_token=BOS, eos_token=END, pad_token=END,
                add_bos_token=True, add_eos_token=False, clean_up_tokenization_spaces=False,
                model_max_length=CONFIG["max_position_embeddings"], chat_template=CHAT_TEMPLATE,
                added_tokens_decoder={
                    str(tokenizer.token_to_id(t)): dict(
                        content=t, lstrip=False, normalized=False, rstrip=False, single_word=False, special=True
                    )
                    for t in SPECIALS
                },
            )
        ),
    )
    write_atomically(
        out / "generation_config.json",
        # Cool by default: at 0.7 the stories contain invented words.
        as_json(dict(bos_token_id=0, eos_token_id=1, pad_token_id=1, do_sample=True, temperature=0.3, top_p=0.9)),
    )


def load_exported(model, out):
    state = {name.removeprefix("model."): tensor.float() for name, tensor in load_file(out / "model.safetensors").items()}
    model.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------------
# Evaluation, with transformers and nothing of the above


def evaluate(out, questions, smalltalk, paraphrases_per_question, seeds):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    rng = random.Random(5)

    @torch.no_grad()
    def answers(conversations, **sampling):
        prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in conversations]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        texts = [None] * len(prompts)
        for at in range(0, len(order), 128):
            chosen = order[at : at + 128]
            batch = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True, add_special_tokens=False)
            batch.pop("token_type_ids", None)
            result = model.generate(**batch, max_new_tokens=130, pad_token_id=1, **sampling)[:, batch["input_ids"].shape[1] :]
            for i, ids in zip(chosen, result):
                texts[i] = tokenizer.decode(ids, skip_special_tokens=True).strip()
        return texts

    def user(text, before=()):
        return list(before) + [dict(role="user", content=text)]

    def contains(text, entry):
        return all(m.lower() in text.lower() for m in entry["must_contain"])

    def ask(name, cases, sampled=True):
        """`cases`: (conversation, entry). Right: every required word is there, or for small talk the very answer."""
        modes = [("greedy", dict(do_sample=False, temperature=None, top_p=None))]
        if sampled:
            modes += [(f"T=0.7 seed {s}", dict(do_sample=True, temperature=0.7, top_p=0.9, top_k=0)) for s in seeds]
        for mode, sampling in modes:
            torch.manual_seed(int(mode[-1]) if mode != "greedy" else 0)
            texts = answers([c for c, _ in cases], **sampling)
            right = [contains(t, e) if "must_contain" in e else t == e["answer"] for t, (_, e) in zip(texts, cases)]
            exact = sum(t == e["answer"] for t, (_, e) in zip(texts, cases))
            wrong = [f"{c[-1]['content']!r} -> {t[:70]!r}" for ok, t, (c, _) in zip(right, texts, cases) if not ok]
            print(f"{name:34} {mode:13} right {sum(right)}/{len(cases)}  verbatim {exact}/{len(cases)}", flush=True)
            if mode == "greedy":
                for line in wrong[:40]:
                    print("    wrong:", line)

    base = [(user(e["question"]), e) for e in questions]
    ask("questions", base)
    ask("questions, lower case, no '?'", [(user(e["question"].lower().rstrip("?")), e) for e in questions], False)
    ask("questions, upper case", [(user(e["question"].upper()), e) for e in questions], False)
    ask("held-out paraphrases", [(user(h), e) for e in questions for h in e["held_out"]])
    pick = lambda e: rng.sample(e["paraphrases"], min(paraphrases_per_question, len(e["paraphrases"])))
    ask("trained paraphrases", [(user(p), e) for e in questions for p in pick(e)])
    system = dict(role="system", content="You are a careful assistant for engineers. Reply in plain English.")
    ask("questions with a new system message", [(user(e["question"], [system]), e) for e in questions], False)
    second = []
    for e in questions:
        other = rng.choice(questions)
        before = user(other["question"]) + [dict(role="assistant", content=other["answer"])]
        second.append((user(e["question"], before), e))
    ask("questions as a second turn", second)
    smalltalk = [e for e in smalltalk if e["kind"] != "story"]
    ask("small talk, trained", [(user(p), e) for e in smalltalk for p in e["prompts"] if e["kind"] != "unknown"], False)
    ask("small talk, held out", [(user(h), e) for e in smalltalk for h in e["held_out"] if e["kind"] != "unknown"])
    ask("unknown topics, held out", [(user(h), e) for e in smalltalk for h in e["held_out"] if e["kind"] == "unknown"])
    torch.manual_seed(1)
    for prompt in ("Tell me a story.", "Write a story about Holmes"):
        for sampling in (dict(do_sample=False, temperature=None, top_p=None), dict(do_sample=True, temperature=0.7, top_p=0.9)):
            print(f"\n[{prompt}] " + answers([user(prompt)], **sampling)[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lr", type=float, default=0.02, help="of Muon, for the matrices inside the layers")
    parser.add_argument("--lr-embed", type=float, default=0.004, help="of AdamW, for the embedding and the norms")
    parser.add_argument("--first-cycle", type=int, default=1, help="above 1: go on from the exported weights")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which needs a C++ compiler")
    parser.add_argument("--out", type=Path, default=HERE / "ridge-demo")
    parser.add_argument("--log", default=os.path.join(tempfile.gettempdir(), "ridge-demo-train.log"))
    parser.add_argument("--save-every", type=int, default=0, help="also export every so many steps")
    parser.add_argument("--eval-only", action="store_true")
    parser.add_argument("--eval-paraphrases", type=int, default=10, help="trained paraphrases asked per question")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    questions = read_jsonl(HERE / "questions.jsonl")
    smalltalk = read_jsonl(HERE / "data" / "smalltalk.jsonl")
    if not args.eval_only:
        torch.manual_seed(args.seed)
        paragraphs = [p for p in (HERE / "data" / "sherlock.txt").read_text(encoding="utf-8").strip().split("\n\n") if p]
        tokenizer = train_tokenizer(paragraphs, questions, smalltalk)
        model = Llama()
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
        for cycle in range(args.first_cycle, len(CYCLES) + 1):
            # A cycle starts from the exported weights of the cycle before, so that it can also be run alone.
            if cycle > 1:
                load_exported(model, args.out)
            steps, lr_scale, text_share = CYCLES[cycle - 1]
            mixer = Mixer(tokenizer, paragraphs, questions, smalltalk, args.seed + cycle - 1, text_share)
            seconds = train(model, mixer, args, steps, lr_scale, lambda: export_folder(model, tokenizer, args.out))
            export_folder(model, tokenizer, args.out)
            load_exported(model, args.out)
            print(f"cycle {cycle}: {steps} steps in {seconds:.0f} s; losses {measured_losses(model, mixer)}", flush=True)
    evaluate(args.out, questions, smalltalk, args.eval_paraphrases, seeds=[1, 2, 3])


if __name__ == "__main__":
    main()
