#!/usr/bin/env python3
"""Writes the first corpora: small valid inputs of every kind, from which libFuzzer finds the rest.

    fuzz/seed.py [FOLDER]       FOLDER/<target>/seed-*, by default in fuzz/corpus
"""

import json
import struct
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "fuzz/corpus"

HIDDEN, FFN, HEADS, KV, DIM, VOCABULARY = 4, 8, 2, 1, 2, 3
PROJECTIONS = [
    ("self_attn.q_proj", HEADS * DIM, HIDDEN),
    ("self_attn.k_proj", 4, HIDDEN),
    ("self_attn.v_proj", 4, HIDDEN),
    ("self_attn.o_proj", HIDDEN, HEADS * DIM),
    ("mlp.gate_proj", FFN, HIDDEN),
    ("mlp.up_proj", FFN, HIDDEN),
    ("mlp.down_proj", HIDDEN, FFN),
]


def save(target, name, data):
    folder = OUT / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"seed-{name}").write_bytes(data)


def bf16(value):
    return struct.pack("<f", value)[2:]


def tensors(family, packed):
    """The tensors of a model of one layer: name, type, shape, bytes."""
    yield "model.embed_tokens.weight", "BF16", [VOCABULARY, HIDDEN], bf16(0.5) * (VOCABULARY * HIDDEN)
    yield "model.norm.weight", "BF16", [HIDDEN], bf16(1) * HIDDEN
    norms = [("input_layernorm", HIDDEN), ("post_attention_layernorm", HIDDEN)]
    if family == "bitnet":
        norms += [("self_attn.attn_sub_norm", HEADS * DIM), ("mlp.ffn_sub_norm", FFN)]
    for name, width in norms:
        yield f"model.layers.0.{name}.weight", "BF16", [width], bf16(1) * width
    for name, rows, cols in PROJECTIONS:
        name = f"model.layers.0.{name}.weight"
        if packed:
            yield name, "U8", [rows // 4, cols], b"\x18" * (rows // 4 * cols)
            yield f"{name}_scale", "BF16", [1], bf16(2)
        else:
            yield name, "F16", [rows, cols], struct.pack("<e", -1) * (rows * cols)


def container(name, listed):
    header, data = {}, b""
    for tensor, dtype, shape, content in listed:
        offsets = [len(data), len(data) + len(content)]
        header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    text = json.dumps(header, separators=(",", ":"))
    return f"%%TENSORS {name}\n{text}\n".encode() + data + b"\n"


def file(name, content):
    return f"%%FILE {name}\n{content}\n".encode()


def folder(family, packed, shards):
    config = {
        "architectures": ["BitNetForCausalLM" if family == "bitnet" else "LlamaForCausalLM"],
        "model_type": family,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "relu2" if family == "bitnet" else "silu",
        "tie_word_embeddings": True,
        "quantization_config": {"quant_method": "bitnet"},
    }
    if not packed:
        config["quantization_config"] |= {
            "linear_class": "autobitlinear",
            "quantization_mode": "online",
        }
    text = {"bos_token": "<s>", "add_bos_token": True, "chat_template": "{{ messages }}"}
    out = file("config.json", json.dumps(config))
    out += file("generation_config.json", json.dumps({"temperature": 0.6, "eos_token_id": [1]}))
    out += file("tokenizer_config.json", json.dumps(text))
    listed = list(tensors(family, packed))
    if shards == 1:
        return out + container("model.safetensors", listed)
    index = {}
    for shard in range(shards):
        part, name = listed[shard::shards], f"{shard}.safetensors"
        out += container(name, part)
        index |= {tensor[0]: name for tensor in part}
    return out + file("model.safetensors.index.json", json.dumps({"weight_map": index}))


def pooling():
    """What sentence-transformers puts beside a model that embeds."""
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds)
    ]
    modes = {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
    out = file("modules.json", json.dumps(modules))
    return out + file("1_Pooling/config.json", json.dumps(modes))


def tokenizers():
    text = " Hello, wörld 世界 \n\n  12345 <s>x</s> 🌍<|eot_id|>".encode()
    for path in sorted((ROOT / "tests/text").glob("*.json")):
        if not path.stem.endswith("golden"):
            save("tokenizer", path.stem, path.read_bytes() + b"\xff" + text)
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "▁", "a", "b", "ab", "▁ab"])}
    steps = {
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            {"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Strip", "strip_left": True,
                                                       "strip_right": False}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\s+(?!\\S)|\\p{N}{1,3}"},
             "behavior": "Isolated", "invert": False},
            {"type": "Digits", "individual_digits": True},
            {"type": "Punctuation", "behavior": "Contiguous"}]},
        "post_processor": {"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
    }
    models = {
        "bpe": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], ["▁", "ab"]],
                "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": False},
        "unigram": {"type": "Unigram", "unk_id": 0, "byte_fallback": False,
                    "vocab": [[token, -float(i)] for token, i in vocab.items()]},
        "words": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }
    added = [{"id": 1, "content": "<s>", "special": True, "single_word": False, "lstrip": False,
              "rstrip": False, "normalized": False}]
    for name, model in models.items():
        value = {"version": "1.0", "added_tokens": added, **steps, "model": model}
        save("tokenizer", name, json.dumps(value, ensure_ascii=False).encode() + b"\xff" + text)


def templates():
    golden = json.loads((ROOT / "tests/text/chat_golden.json").read_text())
    for name, template in golden["templates"].items():
        save("chat_template", name, template["source"].encode() + b"\xff" + "Hällo <s>".encode())


def gguf(kind, hidden, ffn, weights, text):
    """A file of version 3 with one layer; `weights` makes the data of a matrix."""
    string = lambda value: struct.pack("<Q", len(value.encode())) + value.encode()
    u32 = lambda value: struct.pack("<II", 4, value)
    f32 = lambda value: struct.pack("<If", 6, value)
    strings = lambda values: struct.pack("<IIQ", 9, 8, len(values)) + b"".join(map(string, values))
    arch = "bitnet-b1.58"
    keys = {"general.architecture": struct.pack("<I", 8) + string(arch)}
    sizes = {"vocab_size": VOCABULARY, "context_length": 16, "embedding_length": hidden,
             "block_count": 1, "feed_forward_length": ffn, "attention.head_count": 1,
             "attention.head_count_kv": 1, "attention.key_length": 2, "attention.value_length": 2,
             "rope.dimension_count": 2}
    keys |= {f"{arch}.{key}": u32(value) for key, value in sizes.items()}
    keys[f"{arch}.attention.layer_norm_rms_epsilon"] = f32(1e-5)
    keys[f"{arch}.rope.freq_base"] = f32(10000)
    if text:
        keys["tokenizer.ggml.model"] = struct.pack("<I", 8) + string(text)
        keys["tokenizer.ggml.pre"] = struct.pack("<I", 8) + string("llama-bpe")
        keys["tokenizer.ggml.tokens"] = strings(["<s>", "a", "▁a" if text == "llama" else "Ġa"])
        keys["tokenizer.ggml.scores"] = struct.pack("<IIQ3f", 9, 6, 3, 0, -1, -2)
        keys["tokenizer.ggml.token_type"] = struct.pack("<IIQ3i", 9, 5, 3, 3, 1, 1)
        keys["tokenizer.ggml.merges"] = strings(["Ġ a"])
        keys["tokenizer.ggml.bos_token_id"] = u32(0)
        keys["tokenizer.chat_template"] = struct.pack("<I", 8) + string("{{ messages }}")
    floats = lambda count: struct.pack("<f", 1) * count
    listed = [("token_embd.weight", [hidden, VOCABULARY], 0, floats(hidden * VOCABULARY))]
    for name, rows, cols in [("attn_q", 2, hidden), ("attn_k", 2, hidden), ("attn_v", 2, hidden),
                             ("attn_output", hidden, 2), ("ffn_gate", ffn, hidden),
                             ("ffn_up", ffn, hidden), ("ffn_down", hidden, ffn)]:
        # Rows that are not of whole blocks stay floats.
        of = (kind, weights) if kind not in (TQ1_0, TQ2_0) or cols % 256 == 0 else (F16, master)
        listed.append((f"blk.0.{name}.weight", [cols, rows], of[0], of[1](rows * cols)))
    for name, width in [("blk.0.attn_norm", hidden), ("blk.0.attn_sub_norm", 2),
                        ("blk.0.ffn_norm", hidden), ("blk.0.ffn_sub_norm", ffn),
                        ("output_norm", hidden)]:
        listed.append((f"{name}.weight", [width], 0, floats(width)))
    out = b"GGUF" + struct.pack("<IQQ", 3, len(listed), len(keys))
    out += b"".join(string(key) + value for key, value in keys.items())
    data = b""
    for name, ne, kind, content in listed:
        out += string(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, len(data))
        data += content + bytes(-len(content) % 32)
    return out + bytes(-len(out) % 32) + data


F16, TQ1_0, TQ2_0, I2_S = 1, 34, 35, 36
master = lambda count: struct.pack("<e", -1) * count
i2s = lambda count: b"\x55" * (count // 4) + struct.pack("<f28x", 0.5)
block = lambda size: lambda count: (b"\x55" * (size - 2) + struct.pack("<e", 0.5)) * (count // 256)
save("gguf", "f16", gguf(F16, 4, 8, master, ""))
save("gguf", "gpt2", gguf(F16, 4, 8, master, "gpt2"))
save("gguf", "llama", gguf(F16, 4, 8, master, "llama"))
save("gguf", "i2_s", gguf(I2_S, 64, 4, i2s, ""))
save("gguf", "tq2_0", gguf(TQ2_0, 256, 4, block(66), ""))
save("gguf", "tq1_0", gguf(TQ1_0, 256, 4, block(54), ""))
for family in ("bitnet", "llama"):
    save("safetensors_folder", f"{family}-packed", folder(family, True, 1))
    save("safetensors_folder", f"{family}-master", folder(family, False, 1))
save("safetensors_folder", "pooling", folder("llama", False, 1) + pooling())
save("safetensors_folder", "shards", folder("bitnet", True, 3))
tokenizers()
templates()
