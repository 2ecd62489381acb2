#!/usr/bin/env python3
"""Train Trine's demo model from scratch and export it as a packed BitNet checkpoint.

The model has the architecture of BitNet-b1.58-2B-4T, made small: ternary projections, int8
activations, squared-ReLU gate, a norm before each output projection, grouped-query attention, a tied
head. It learns the first nine tenths of tinyshakespeare; the last tenth is only ever scored.

    python tools/train_demo.py --out models/demo               # train, export, score the export
    python tools/train_demo.py --eval-only models/demo         # score an exported folder
    python tools/train_demo.py --eval-only models/demo --transformers   # the same through transformers

docs/demo-model.md has the recipe in words, the figures, and the definition of the score.
"""

import argparse
import copy
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

BOS, EOS, EOT = SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
# How Llama 3, and so BitNet 2B4T, cuts text before the byte-pair merges.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] | trim + '\\n\\n' }}"
    "{% else %}{{ 'JULIET' if message['role'] == 'assistant' else 'ROMEO' }}"
    "{{ ':\\n' + message['content'] | trim + '\\n\\n<|eot_id|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'JULIET:\\n' }}{% endif %}"
)
SHAPE = dict(hidden_size=256, intermediate_size=640, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=2)
SHAPE |= dict(max_position_embeddings=512, rope_theta=10000.0, rms_norm_eps=1e-5)

HYPERPARAMETERS = {
    "seed": (1, "of everything random"),
    "steps": (1150, "optimizer steps"),
    "batch": (8, "windows per step"),
    "lr": (0.01, "peak rate of Muon, for the ternary weights"),
    "adam-lr": (0.003, "peak rate of Adam, for embedding and norms"),
    "weight-decay": (0.1, "of the ternary weights"),
    "dropout": (0.05, "on the embedding, each block's output and the last norm"),
    "average": (0.99, "decay of the weight average that is exported"),
    "vocab": (1024, "tokens, special ones included"),
    "respell": (0.5, "share of words drawn with merges left out"),
    "drop-merges": (0.1, "chance that such a draw leaves out a merge"),
    "variants": (12, "spellings kept per word"),
    "chat-share": (0.05, "share of windows in chat form"),
    "report": (100, "export, and score the validation text, every so many steps"),
    "threads": (2, "CPU threads"),
}

# ---------------------------------------------------------------------------- text


def split_text(path, validation):
    """(training, validation, held-out) text. Held out is the last tenth; validation the end of the rest."""
    text = Path(path).read_text(encoding="utf-8")
    held_out = int(len(text) * 0.9)
    train = int(held_out * (1 - validation))
    return text[:train], text[train:held_out], text[held_out:]


def train_tokenizer(text, vocab_size):
    """Byte-level BPE learned from `text`; any UTF-8 encodes, because all 256 bytes are tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def encode(tokenizer, text):
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


class DroppedMerges:
    """BPE-dropout as augmentation: every word keeps a few segmentations, drawn with merges left out.

    One megabyte is little text. Spelling the same words in different ways makes it last longer, and
    teaches the model what its tokens are made of. Drawing here, not in the `tokenizers` library, is
    what makes the draw follow the seed.
    """

    def __init__(self, tokenizer, text, drop, variants, rng):
        state = json.loads(tokenizer.to_str())["model"]
        vocab = state["vocab"]
        ranks = {tuple(pair): rank for rank, pair in enumerate(state["merges"])}
        words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        index = {word: i for i, word in enumerate(dict.fromkeys(words))}
        pieces = [
            [vocab[p] for p in self.segment(word, ranks, drop if v else 0.0, rng)]
            for word in index
            for v in range(variants)
        ]
        self.variants = variants
        self.words = np.array([index[w] for w in words])
        self.ends_speech = np.array([word.endswith("\u010a\u010a") for word in index])  # "\n\n" in byte-level BPE
        self.lengths = np.array([len(p) for p in pieces])
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        self.flat = np.concatenate([np.array(p, dtype=np.int64) for p in pieces])

    @staticmethod
    def segment(word, ranks, drop, rng):
        parts = list(word)
        while len(parts) > 1:
            found = [
                (ranks[pair], i)
                for i, pair in enumerate(zip(parts, parts[1:]))
                if pair in ranks and not (drop and rng.random() < drop)
            ]
            if not found:
                break
            at = min(found)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return parts

    def draw(self, rng, share):
        """The text once, a `share` of its words respelt: tokens, and which of them end a speech."""
        variant = rng.integers(1, self.variants, len(self.words)) * (rng.random(len(self.words)) < share)
        piece = self.words * self.variants + variant
        length = self.lengths[piece]
        end = np.cumsum(length)
        tokens = self.flat[np.repeat(self.starts[piece] - (end - length), length) + np.arange(end[-1])]
        speech_end = np.zeros(len(tokens), dtype=bool)
        speech_end[end - 1] = self.ends_speech[self.words]
        return tokens, speech_end


def windows(corpus, context, special, args, rng, anneal):
    """Endless shuffled training windows: BOS, then text from any point.

    Respelling fades with the learning rate (`anneal()`), for the score is of the canonical spelling.
    A few windows are in chat form, with <|eot_id|> after each speech, so that a chat reply ends.
    """
    while True:
        tokens, speech_end = corpus.draw(rng, args.respell * anneal())
        offset = int(rng.integers(0, context))
        for start in rng.permutation(np.arange(offset, len(tokens) - context, context)):
            window = tokens[start : start + context]
            if rng.random() < args.chat_share:
                window = np.insert(window, np.flatnonzero(speech_end[start : start + context]) + 1, special[EOT])
            yield np.concatenate([[special[BOS]], window[:context]])


# ---------------------------------------------------------------------------- model


def ternarize(weight):
    """Absmean quantisation of one tensor: codes in {-1, 0, 1} and the scale as the file stores it (bf16)."""
    scale = weight.abs().mean().clamp(min=1e-5)
    codes = (weight / scale).round().clamp(-1, 1)  # torch rounds halves to even
    return codes, scale.bfloat16().float()


class TernaryLinear(torch.autograd.Function):
    """y = (codes . q) * scale / s, forward as inference does it; gradients pass straight through the rounding.

    q and codes are small integers held in f32, so the sum is exact: |sum| <= 127 * K < 2**24.
    """

    @staticmethod
    def forward(ctx, x, weight, codes, scale):
        s = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        q = (x * s).round().clamp(-128, 127)
        ctx.save_for_backward(q, s, codes, scale)
        return F.linear(q, codes) * (scale / s)

    @staticmethod
    def backward(ctx, grad):
        q, s, codes, scale = ctx.saved_tensors
        grad_x = (grad * scale) @ codes
        grad_weight = (grad / s).flatten(0, -2).T @ q.flatten(0, -2)
        return grad_x, grad_weight, None, None


class BitLinear(nn.Module):
    """Projections that share their input, fused; each is ternary with a scale of its own."""

    def __init__(self, inputs, **sizes):
        super().__init__()
        self.sizes = sizes
        self.weight = nn.Parameter(torch.randn(sum(sizes.values()), inputs) * 0.5 * inputs**-0.5)
        self.fixed = None  # (codes, scale) of an exported checkpoint

    def parts(self, fused, dim=0):
        return fused.split(list(self.sizes.values()), dim=dim)

    @torch.no_grad()
    def quantized(self):
        codes, scales = zip(*(ternarize(w) for w in self.parts(self.weight)))
        return torch.cat(codes), torch.cat([s.expand(len(c)) for c, s in zip(codes, scales)])

    def forward(self, x):
        return self.parts(TernaryLinear.apply(x, self.weight, *(self.fixed or self.quantized())), dim=-1)


class RmsNorm(nn.Module):
    def __init__(self, size, eps, gain=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), gain))
        self.eps = eps

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def rope_table(length, head_dim, theta):
    inverse = theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.outer(torch.arange(length).float(), inverse).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Half-split rotary embedding: dimension i turns with dimension i + head_dim / 2."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Layer(nn.Module):
    def __init__(self, c, dropout):
        super().__init__()
        d, f, eps = c["hidden_size"], c["intermediate_size"], c["rms_norm_eps"]
        self.heads, self.kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        kv = d // self.heads * self.kv_heads
        self.input_layernorm = RmsNorm(d, eps)
        self.qkv = BitLinear(d, q_proj=d, k_proj=kv, v_proj=kv)
        self.attn_sub_norm = RmsNorm(d, eps, 0.25)
        self.o = BitLinear(d, o_proj=d)
        self.post_attention_layernorm = RmsNorm(d, eps)
        self.gate_up = BitLinear(d, gate_proj=f, up_proj=f)
        self.ffn_sub_norm = RmsNorm(f, eps, 0.25)
        self.down = BitLinear(f, down_proj=d)
        self.dropout = dropout

    def drop(self, x):
        return F.dropout(x, self.dropout, self.training)

    def attend(self, q, k, v, cos, sin):
        q = rotate(q.unflatten(-1, (self.heads, -1)).transpose(1, 2), cos, sin)
        k = rotate(k.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2), cos, sin)
        v = v.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def forward(self, h, cos, sin):
        o = self.attend(*self.qkv(self.input_layernorm(h)), cos, sin)
        (o,) = self.o(self.attn_sub_norm(o))
        h = h + self.drop(o)
        gate, up = self.gate_up(self.post_attention_layernorm(h))
        (m,) = self.down(self.ffn_sub_norm(F.relu(gate).square() * up))
        return h + self.drop(m)


class Model(nn.Module):
    def __init__(self, config, dropout=0.0):
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        nn.init.normal_(self.embed_tokens.weight, std=0.05)
        self.layers = nn.ModuleList(Layer(c, dropout) for _ in range(c["num_hidden_layers"]))
        self.norm = RmsNorm(c["hidden_size"], c["rms_norm_eps"])
        self.dropout = dropout
        table = rope_table(c["max_position_embeddings"], c["hidden_size"] // c["num_attention_heads"], c["rope_theta"])
        self.register_buffer("cos", table[0], persistent=False)
        self.register_buffer("sin", table[1], persistent=False)

    def forward(self, tokens):
        h = F.dropout(self.embed_tokens(tokens), self.dropout, self.training)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for layer in self.layers:
            h = layer(h, cos, sin)
        h = F.dropout(self.norm(h), self.dropout, self.training)
        return h @ self.embed_tokens.weight.T


# ---------------------------------------------------------------------------- training


def orthogonalize(g):
    """The nearest (semi-)orthogonal matrix, nearly: four Newton-Schulz steps with Muon's coefficients."""
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(4):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Muon:
    """Momentum, orthogonalised, for the ternary matrices (fused projections are stepped one by one)."""

    def __init__(self, linears, momentum=0.95):
        self.linears = list(linears)
        self.momentum = momentum
        self.state = [torch.zeros_like(linear.weight) for linear in self.linears]

    @torch.no_grad()
    def step(self, lr, weight_decay):
        for linear, m in zip(self.linears, self.state):
            g = linear.weight.grad
            m.lerp_(g, 1 - self.momentum)
            update = g.lerp(m, self.momentum)
            linear.weight.mul_(1 - lr * weight_decay)
            for w, u in zip(linear.parts(linear.weight), linear.parts(update)):
                w.add_(orthogonalize(u), alpha=-lr * 0.2 * max(u.shape) ** 0.5)


def schedule(step, steps, warmup=60, decay=0.5):
    """(rate, anneal): linear warm-up, full rate, then straight to zero over the last `decay` of the run."""
    anneal = min(1.0, (steps - step) / (decay * steps))
    return min(1.0, (step + 1) / warmup) * anneal, anneal


@torch.no_grad()
def follow(average, model, keep):
    """Exponential moving average of the master weights."""
    for a, p in zip(average.parameters(), model.parameters()):
        a.lerp_(p, 1 - keep)


def train(args, config, tokenizer, text, validation):
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    special = {s: tokenizer.token_to_id(s) for s in SPECIALS}
    corpus = DroppedMerges(tokenizer, text, args.drop_merges, args.variants, random.Random(args.seed))
    model = Model(config, args.dropout).train()
    average = copy.deepcopy(model)
    muon = Muon(m for m in model.modules() if isinstance(m, BitLinear))
    ternary = {id(linear.weight) for linear in muon.linears}
    rest = [p for p in model.parameters() if id(p) not in ternary]
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0)

    started, step, steps, anneal, losses = time.time(), 0, args.steps, 1.0, []
    context = config["max_position_embeddings"]
    stream = windows(corpus, context, special, args, rng, lambda: anneal)
    run = torch.compile(model, dynamic=False) if args.compile else model
    while step < steps:
        rate, anneal = schedule(step, steps)
        batch = torch.from_numpy(np.stack([next(stream) for _ in range(args.batch)]))
        loss = F.cross_entropy(run(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        muon.step(args.lr * rate, args.weight_decay)
        nn.utils.clip_grad_norm_(rest, 1.0)
        for group in adam.param_groups:
            group["lr"] = args.adam_lr * rate
        adam.step()
        model.zero_grad(set_to_none=True)
        step += 1
        follow(average, model, min(args.average, 1 - 1 / step))
        losses.append(loss.item())
        elapsed = time.time() - started
        if args.minutes:
            steps = max(step, round(step * 60 * args.minutes / elapsed))
        if step % args.report == 0 or step >= steps:
            line = f"step {step}/{steps} {elapsed:.0f} s, {step * args.batch * context / elapsed:.0f} tokens/s"
            line += f", training loss {np.mean(losses[-args.report:]):.4f} nats per token"
            if validation:
                exported = from_tensors(config, exported_tensors(average))
                line += f", validation {score(exported, tokenizer, validation)['bits_per_byte']:.4f} bits per byte"
            print(line, flush=True)
            export(average, tokenizer, args.out)


# ---------------------------------------------------------------------------- export


def pack(codes):
    """Four rows to a byte, R = rows / 4 apart: bits 0-1 hold row r, bits 2-3 row r + R, and so on; code + 1."""
    quarters = (codes + 1).to(torch.uint8).chunk(4)
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def unpack(packed):
    return torch.cat([(packed >> shift & 3).float() - 1 for shift in (0, 2, 4, 6)])


def float_tensors(model):
    """(name in the file, parameter) of everything that stays in bf16."""
    yield "model.embed_tokens.weight", model.embed_tokens.weight
    yield "model.norm.weight", model.norm.weight
    for i, layer in enumerate(model.layers):
        yield f"model.layers.{i}.input_layernorm.weight", layer.input_layernorm.weight
        yield f"model.layers.{i}.post_attention_layernorm.weight", layer.post_attention_layernorm.weight
        yield f"model.layers.{i}.self_attn.attn_sub_norm.weight", layer.attn_sub_norm.weight
        yield f"model.layers.{i}.mlp.ffn_sub_norm.weight", layer.ffn_sub_norm.weight


def ternary_linears(model):
    """(names in the file, linear) of the fused projections."""
    for i, layer in enumerate(model.layers):
        for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
            place = "self_attn" if linear in (layer.qkv, layer.o) else "mlp"
            yield [f"model.layers.{i}.{place}.{name}" for name in linear.sizes], linear


@torch.no_grad()
def exported_tensors(model):
    tensors = {name: parameter.bfloat16().clone() for name, parameter in float_tensors(model)}
    for names, linear in ternary_linears(model):
        for name, weight in zip(names, linear.parts(linear.weight)):
            codes, scale = ternarize(weight)
            tensors[f"{name}.weight"] = pack(codes)
            tensors[f"{name}.weight_scale"] = scale.bfloat16().reshape(1)
    return tensors


def export(model, tokenizer, folder):
    """Write the packed Hugging Face folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    context = model.config["max_position_embeddings"]
    bos, eos, eot = (tokenizer.token_to_id(s) for s in SPECIALS)
    quantization = dict(quant_method="bitnet", linear_class="autobitlinear", quantization_mode="offline")
    config = dict(architectures=["BitNetForCausalLM"], model_type="bitnet", **model.config, hidden_act="relu2")
    config |= dict(attention_bias=False, tie_word_embeddings=True, bos_token_id=bos, eos_token_id=eos)
    config |= dict(torch_dtype="bfloat16", quantization_config=quantization | {"modules_to_not_convert": ["lm_head"]})
    tokenizer_config = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=BOS, eos_token=EOS, add_bos_token=True)
    tokenizer_config |= dict(clean_up_tokenization_spaces=False, model_max_length=context, chat_template=CHAT_TEMPLATE)
    generation_config = dict(bos_token_id=bos, eos_token_id=[eos, eot], do_sample=True)
    generation_config |= dict(temperature=0.8, top_k=50, top_p=0.95)
    jsons = dict(config=config, tokenizer_config=tokenizer_config, generation_config=generation_config)
    for name, content in jsons.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "model.safetensors").write_bytes(save(exported_tensors(model), metadata={"format": "pt"}))


# ---------------------------------------------------------------------------- scoring


def from_tensors(config, tensors):
    """The model of an exported folder: the file's codes, scales and bf16 values, and no master weights."""
    model = Model(config).eval().requires_grad_(False)
    for name, parameter in float_tensors(model):
        parameter.copy_(tensors[name])
    for names, linear in ternary_linears(model):
        codes = [unpack(tensors[f"{name}.weight"]) for name in names]
        scales = [tensors[f"{name}.weight_scale"].float().expand(len(c)) for name, c in zip(names, codes)]
        linear.fixed = torch.cat(codes), torch.cat(scales)
        linear.weight = None
    return model


def load_exported(folder):
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    return from_tensors(config, tensors), Tokenizer.from_file(str(folder / "tokenizer.json"))


def load_transformers(folder):
    """The same folder through BitNetForCausalLM in f32 (needs `accelerate`)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    nn.Module.float(model)  # `dtype` leaves the bf16 embedding and norms of a quantised checkpoint as they are
    model.forward_logits = lambda tokens: model(tokens).logits
    return model, Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))


@torch.no_grad()
def score(model, tokenizer, text, context=None):
    """Bits per byte of `text`, by strided windows; this is what `trine perplexity` computes.

    The text is tokenised whole, without special tokens. A window is BOS and up to context - 1 text
    tokens; windows advance by context / 2 tokens. A token is scored once, in the first window that
    holds it: the first window scores all its tokens, each later one its new tail.
    """
    config = model.config if isinstance(model.config, dict) else model.config.to_dict()
    context = context or config["max_position_embeddings"]
    forward = getattr(model, "forward_logits", model)
    ids = torch.from_numpy(encode(tokenizer, text))
    bos = torch.tensor([tokenizer.token_to_id(BOS)])
    total, scored = 0.0, 0
    for start in range(0, len(ids), context // 2):
        window = ids[start : start + context - 1]
        logits = forward(torch.cat([bos, window])[None])[0, :-1].double()
        nll = F.cross_entropy(logits, window, reduction="none")
        total += nll[scored - start :].sum().item()
        scored = start + len(window)
        if scored == len(ids):
            break
    size = len(text.encode())
    return dict(
        bits_per_byte=total / math.log(2) / size,
        nll_per_token=total / len(ids),
        perplexity=math.exp(total / len(ids)),
        tokens=len(ids),
        bytes=size,
        context=context,
    )


# ---------------------------------------------------------------------------- command line


def arguments():
    here = Path(__file__).resolve().parent
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", default=here / "data/tinyshakespeare.txt")
    p.add_argument("--out", default=here.parent / "models/demo")
    p.add_argument("--eval-only", metavar="DIR", help="score an exported folder on the held-out tenth")
    p.add_argument("--transformers", action="store_true", help="with --eval-only: through transformers")
    p.add_argument("--context", type=int, help="with --eval-only: window length (default: the model's)")
    p.add_argument("--compile", action="store_true", help="use torch.compile (faster; needs a C++ compiler)")
    p.add_argument("--minutes", type=float, help="train for this long instead of --steps (not reproducible)")
    p.add_argument("--validation", type=float, default=0.0, help="share of the training text to hold back for tuning")
    p.add_argument("--shape", type=json.loads, default={}, help="JSON that overrides the model's shape")
    for name, (default, meaning) in HYPERPARAMETERS.items():
        p.add_argument(f"--{name}", type=type(default), default=default, help=f"{meaning} ({default})")
    return p.parse_args()


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    train_text, validation, held_out = split_text(args.text, args.validation)
    if not args.eval_only:
        tokenizer = train_tokenizer(train_text, args.vocab)
        config = dict(vocab_size=tokenizer.get_vocab_size(), **(SHAPE | args.shape))
        train(args, config, tokenizer, train_text, validation)
    folder = args.eval_only or args.out
    model, tokenizer = (load_transformers if args.transformers else load_exported)(folder)
    print(json.dumps(score(model, tokenizer, held_out, args.context), indent=2))


if __name__ == "__main__":
    main()
