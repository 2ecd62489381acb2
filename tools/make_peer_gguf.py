#!/usr/bin/env python3
"""Write a random ternary model of the BitNet b1.58 2B4T shape as a GGUF file for llama.cpp.

    python tools/make_peer_gguf.py --out model.gguf [--head f16|q6_k] [--layers 30] [--seed 0]
    llama-bench -m model.gguf -p 512 -n 64 -t 1,2

For speed comparisons only: shapes, types and bytes per token are those of the real model, the text is
noise. The architecture is llama.cpp's `bitnet`, with SiLU where 2B4T squares a ReLU: the same cost, not
the same function. Linear layers are TQ2_0; the token embedding, which is also the output head, is F16 or
Q6_K. There is no tokenizer: llama-bench feeds random token ids. One tensor is in memory at a time.
Needs numpy and gguf (0.19 was used); the same versions, arguments and seed give the same file.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, LlamaFileType

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2560, 6912, 20, 5, 128, 128_256
BLOCK = 256  # weights in a block of either quantised type
WEIGHT_SCALE, EMBEDDING_STD = 0.02, 0.02
# The 81 bytes that hold four codes of {0, 1, 2}, two bits each.
TERNARY_BYTES = np.array([b for b in range(256) if all(b >> s & 3 < 3 for s in (0, 2, 4, 6))], np.uint8)


def main() -> None:
    args = parse_args()
    head_type = Type[args.head.upper()]
    plan = list(tensors(args.layers, head_type))
    rng = np.random.default_rng(args.seed)

    writer = GGUFWriter(args.out, "bitnet")
    add_metadata(writer, args.layers)
    for name, shape, kind in plan:
        dtype, stored = storage(shape, kind)
        writer.add_tensor_info(name, stored, dtype, int(np.prod(stored)) * dtype.itemsize, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape, kind in plan:
        writer.write_tensor_data(make(rng, shape, kind))
    writer.close()
    print(f"{args.out}: {len(plan)} tensors, {args.out.stat().st_size:,} bytes")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--head", choices=["f16", "q6_k"], default="f16")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def add_metadata(writer: GGUFWriter, layers: int) -> None:
    writer.add_name("random ternary, 2B4T shape")
    writer.add_file_type(LlamaFileType.MOSTLY_TQ2_0)
    writer.add_quantization_version(2)
    writer.add_vocab_size(VOCAB)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("no_vocab")


def tensors(layers: int, head_type: Type) -> Iterator[tuple[str, tuple[int, ...], Type]]:
    """Name, shape (outputs first) and type of every tensor, in file order."""
    kv = KV_HEADS * HEAD_DIM
    yield "token_embd.weight", (VOCAB, HIDDEN), head_type
    for layer in range(layers):
        for norm, size in [
            ("attn_norm", HIDDEN),
            ("attn_sub_norm", HIDDEN),
            ("ffn_norm", HIDDEN),
            ("ffn_sub_norm", FFN),
        ]:
            yield f"blk.{layer}.{norm}.weight", (size,), Type.F32
        for linear, shape in [
            ("attn_q", (HIDDEN, HIDDEN)),
            ("attn_k", (kv, HIDDEN)),
            ("attn_v", (kv, HIDDEN)),
            ("attn_output", (HIDDEN, HIDDEN)),
            ("ffn_gate", (FFN, HIDDEN)),
            ("ffn_up", (FFN, HIDDEN)),
            ("ffn_down", (HIDDEN, FFN)),
        ]:
            yield f"blk.{layer}.{linear}.weight", shape, Type.TQ2_0
    yield "output_norm.weight", (HIDDEN,), Type.F32


def storage(shape: tuple[int, ...], kind: Type) -> tuple[np.dtype, tuple[int, ...]]:
    """The numpy type and shape in which `make` returns a tensor: quantised rows are rows of bytes."""
    if kind in (Type.F32, Type.F16):
        return np.dtype(np.float32 if kind == Type.F32 else np.float16), shape
    block_bytes = {Type.TQ2_0: 66, Type.Q6_K: 210}[kind]
    return np.dtype(np.uint8), (shape[0], shape[1] // BLOCK * block_bytes)


def make(rng: np.random.Generator, shape: tuple[int, ...], kind: Type) -> np.ndarray:
    dtype, stored = storage(shape, kind)
    if kind == Type.F32:  # the norms
        return np.ones(shape, dtype)
    if kind == Type.F16:
        out = np.empty(shape, dtype)
        for rows in np.array_split(out, 64):  # views: the f32 noise of one part at a time
            rows[:] = rng.standard_normal(rows.shape, np.float32) * np.float32(EMBEDDING_STD)
        return out
    blocks = np.empty(stored, dtype).reshape(shape[0] * shape[1] // BLOCK, -1)
    if kind == Type.TQ2_0:  # 64 bytes of codes, then the scale
        codes = rng.integers(0, len(TERNARY_BYTES), (len(blocks), 64), np.uint8)
        blocks[:, :64] = TERNARY_BYTES[codes]
        scale = WEIGHT_SCALE
    else:  # Q6_K: 192 bytes of 6-bit values, 16 int8 sub-block scales, then the scale
        blocks[:, :192] = rng.integers(0, 256, (len(blocks), 192), np.uint8)
        blocks[:, 192:208] = 64
        # Uniform values in -32..31 have a standard deviation of 64 / sqrt(12).
        scale = EMBEDDING_STD / (64 * 64 / 12**0.5)
    blocks[:, -2:] = np.array([scale], "<f2").view(np.uint8)
    return blocks.reshape(stored)


if __name__ == "__main__":
    main()
