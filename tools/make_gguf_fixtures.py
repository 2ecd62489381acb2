#!/usr/bin/env python3
"""Make tests/fixtures/gguf: models of tests/fixtures again, as GGUF files of the published kinds.

    python tools/make_gguf_fixtures.py [--out tests/fixtures/gguf]

Weights come from the Hugging Face folders, unpacked by transformers; containers are written by the gguf
package (GGUFWriter), TQ1_0, TQ2_0, Q8_0, Q5_0, Q5_1, Q4_0 and BF16 by its `quants`. It has no packer for
I2_S: `pack_i2_s` here follows `quantize_i2_s` of microsoft/BitNet, src/ggml-bitnet-mad.cpp (128 weights in
32 bytes, the scale behind all of them). It has none for Q4_K and Q6_K either: their blocks are random bytes,
which `quants.dequantize` gives a meaning. Every matrix is read back by the package where it can, and must
have the folder's values exactly. Rows of q and k in the architecture `llama` are permuted as `permute` of
llama.cpp's convert_hf_to_gguf.py does it.

`tables/TYPE.gguf` are models of a few rows whose embedding table has that type; `TYPE.f32` beside them is the
table as `quants.dequantize` reads it, in f32. Needs the packages of tools/requirements.txt and gguf 0.19.
Seeds are fixed: the same versions write the same bytes.
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, PoolingType, RopeScalingType, quants
from safetensors import safe_open
from transformers.integrations.bitnet import unpack_weights

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
I2_S = 36  # of bitnet.cpp; gguf has no name for it
LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "self_attn.inner_attn_ln": "attn_sub_norm",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
    "mlp.ffn_layernorm": "ffn_sub_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    # bitnet.cpp's names, of its embedding models (utils/convert-bitnet-embedding-to-gguf.py).
    **{f"{part}.norm": f"{name}_norm_in" for part, name in LINEARS.items()},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FIXTURES / "gguf", help="where the files go")
    out = parser.parse_args().out
    (out / "tables").mkdir(parents=True, exist_ok=True)
    for file in FILES:
        write_model(file, out / f"{file.folder}.{file.name}.gguf")
    rng = np.random.default_rng(20261121)
    for kind in (Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q5_0, Type.Q5_1, Type.Q4_0, Type.Q4_K, Type.Q6_K):
        write_table(kind, rng, out / "tables" / kind.name.lower())


@dataclass
class Linear:
    """A ternary matrix, or master weights."""

    name: str  # within a file, without `.weight`
    t: np.ndarray | None  # [out, in] of -1, 0, 1, f32
    m: np.float32 | None  # what multiplies t
    master: np.ndarray | None  # [out, in]


# How the matrices of a file are stored. Each function adds the tensors of one.


def as_i2_s(writer: GGUFWriter, linear: Linear) -> None:
    data = pack_i2_s(linear.t, linear.m)
    writer.add_tensor_info(f"{linear.name}.weight", linear.t.shape, data.dtype, data.nbytes, I2_S)
    writer.tensors[-1][f"{linear.name}.weight"].tensor = data


def pack_i2_s(t: np.ndarray, m: np.float32) -> np.ndarray:
    """Blocks of 128 in row-major order: weights p, 32+p, 64+p and 96+p in byte p, the first in the top bits."""
    codes = (t + 1).astype(np.uint8).reshape(-1, 4, 32)
    packed = codes[:, 0] << 6 | codes[:, 1] << 4 | codes[:, 2] << 2 | codes[:, 3]
    scale = np.array([m], "<f4").view(np.uint8)
    # Of a type that GGUFWriter does not take for the bytes of a quantised type that it knows.
    return np.concatenate([packed.reshape(-1), scale, np.zeros(28, np.uint8)]).view(np.int8)


def as_tq1_0(writer: GGUFWriter, linear: Linear) -> None:
    add_quantized(writer, linear, Type.TQ1_0)


def as_tq2_0(writer: GGUFWriter, linear: Linear) -> None:
    add_quantized(writer, linear, Type.TQ2_0)


def add_quantized(writer: GGUFWriter, linear: Linear, kind: Type) -> None:
    data = quants.quantize(linear.t * linear.m, kind)
    assert (quants.dequantize(data, kind) == linear.t * linear.m).all(), f"{linear.name} is exact"
    writer.add_tensor(f"{linear.name}.weight", data, raw_dtype=kind)


def as_i2_s_or_f32(writer: GGUFWriter, linear: Linear) -> None:
    if linear.t.size % 128 == 0:
        as_i2_s(writer, linear)
    else:
        writer.add_tensor(f"{linear.name}.weight", linear.t * linear.m)


def as_q8_0_or_f16(writer: GGUFWriter, linear: Linear) -> None:
    """Values that are exact: blocks of d = m and codes t. `quants.quantize` would round m/127 to f16."""
    values = linear.t * linear.m
    if linear.t.shape[1] % 32 == 0:
        data = np.empty((linear.t.size // 32, 34), np.uint8)
        data[:, :2] = np.array([linear.m], "<f2").view(np.uint8)
        data[:, 2:] = linear.t.astype(np.int8).view(np.uint8).reshape(-1, 32)
        data = data.reshape(len(linear.t), -1)
        assert (quants.dequantize(data, Type.Q8_0) == values).all(), f"{linear.name} is exact"
        writer.add_tensor(f"{linear.name}.weight", data, raw_dtype=Type.Q8_0)
    else:
        assert (values.astype(np.float16) == values).all(), f"{linear.name} is exact"
        writer.add_tensor(f"{linear.name}.weight", values.astype(np.float16))


def with_separate_scale(writer: GGUFWriter, linear: Linear) -> None:
    writer.add_tensor(f"{linear.name}.weight", linear.t.astype(np.float16))
    writer.add_tensor(f"{linear.name}.scale", np.array([linear.m], np.float32))


def as_master(writer: GGUFWriter, linear: Linear) -> None:
    writer.add_tensor(f"{linear.name}.weight", linear.master)


def as_bf16_master(writer: GGUFWriter, linear: Linear) -> None:
    data = quants.quantize(linear.master, Type.BF16)
    assert (quants.dequantize(data, Type.BF16) == linear.master).all(), f"{linear.name} is exact"
    writer.add_tensor(f"{linear.name}.weight", data, raw_dtype=Type.BF16)


def as_f16_master(writer: GGUFWriter, linear: Linear) -> None:
    data = linear.master.astype(np.float16)
    assert (data == linear.master).all(), f"{linear.name} is exact"
    writer.add_tensor(f"{linear.name}.weight", data)


def as_q8_0_master(writer: GGUFWriter, linear: Linear) -> None:
    """Blocks whose d is the power of two that all weights are multiples of. `quants.quantize` takes the largest / 127."""
    step = 2.0 ** np.ceil(np.log2(np.abs(linear.master).max() / 127))
    codes = (linear.master / step).reshape(-1, 32)
    data = np.empty((len(codes), 34), np.uint8)
    data[:, :2] = np.array([step], "<f2").view(np.uint8)
    data[:, 2:] = codes.astype(np.int8).view(np.uint8)
    data = data.reshape(len(linear.master), -1)
    assert (quants.dequantize(data, Type.Q8_0) == linear.master).all(), f"{linear.name} is exact"
    writer.add_tensor(f"{linear.name}.weight", data, raw_dtype=Type.Q8_0)


@dataclass
class File:
    """One GGUF file: a folder of tests/fixtures, and how its tensors are stored."""

    folder: str
    name: str
    arch: str
    linear: callable
    table: Type = Type.BF16
    head_twice: bool = False
    scaled_rope: bool = False  # a scaling of RoPE by 1, as llama.cpp's `conversion/bitnet.py` says of every model
    keys: dict[str, str] = field(default_factory=dict)  # besides the usual ones
    pooling: PoolingType | None = None


FILES = [
    # The two published forms of 2B4T: no activation key; the first had its table twice.
    File("bitnet_blocks", "i2_s", "bitnet-b1.58", as_i2_s),
    File("bitnet_blocks", "tq2_0", "bitnet-25", as_tq2_0, head_twice=True),
    File("bitnet_blocks", "tq1_0", "bitnet", as_tq1_0, Type.F32, keys={"hidden_activation": "relu2"}),
    # Falcon's form: permuted; blocks of I2_S that go over the ends of rows.
    File("llama_absent", "i2_s", "llama", as_i2_s),
    # Several types in one file, a head of its own, heads not as wide as hidden / heads.
    File("llama_master_f16", "mixed", "llama", as_i2_s_or_f32, Type.F16),
    # What llama.cpp's converter made of 1bitLLM's masters; SiLU by the architecture.
    File("bitnet_1bitllm", "f16", "bitnet", as_master, Type.F16, scaled_rope=True),
    # The same masters in three types.
    File("bitnet_master_exact", "bf16", "bitnet", as_bf16_master),
    File("bitnet_master_exact", "f16", "bitnet", as_f16_master),
    File("bitnet_master_exact", "q8_0", "bitnet", as_q8_0_master),
    # -1, 0 and 1 with the scale in a tensor of its own.
    File("bitnet_silu", "scales", "bitnet", with_separate_scale),
    File("bitnet_ties", "q8_0", "bitnet-b1.58", as_q8_0_or_f16, Type.F32),
    # BitNet-embedding 0.6B: a norm before each projection.
    File("qwen3_embedding", "scales", "qwen3", with_separate_scale, pooling=PoolingType.MEAN),
    # BitNet-embedding 270M: windows, and gains with the one in them.
    File("gemma3_windows", "i2_s", "gemma3", as_i2_s_or_f32, Type.F16),
]


class Folder:
    """A Hugging Face folder."""

    def __init__(self, path: Path):
        # Of the key that is there twice the last counts.
        self.config = json.loads((path / "config.json").read_text())
        self.tensors = {}
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                # The embedding models' names begin further in.
                self.tensors |= {name.removeprefix("model."): tensors.get_tensor(name) for name in tensors.keys()}

    def floats(self, name: str) -> np.ndarray:
        return self.tensors[name].float().numpy()

    def linear(self, name: str, stored: str) -> Linear:
        weight = self.tensors[f"{name}.weight"]
        if weight.dtype == torch.uint8:
            t = unpack_weights(weight, torch.float32).numpy()
            scale = self.floats(f"{name}.weight_scale")[0]
            quantization = self.config["quantization_config"]
            multiplies = quantization.get("linear_class", "bitlinear") == "autobitlinear"
            return Linear(stored, t, scale if multiplies else np.float32(1) / scale, None)
        wide = weight.double()
        m = wide.abs().mean().clamp(min=1e-5).float()
        t = (weight.float() * (1.0 / m)).round().clamp(-1, 1).numpy()
        master = weight.float() if weight.dtype == torch.bfloat16 else weight
        return Linear(stored, t, np.float32(m.item()), master.numpy())


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from half-split to interleaved order."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def write_model(file: File, path: Path) -> None:
    folder = Folder(FIXTURES / file.folder)
    config = folder.config
    writer = GGUFWriter(path, file.arch)
    add_config(writer, config)
    if file.arch == "gemma3":
        add_windows(writer, config)
    for key, value in file.keys.items():
        writer.add_string(f"{file.arch}.{key}", value)
    if file.pooling is not None:
        writer.add_pooling_type(file.pooling)
    if file.scaled_rope:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(1.0)

    add_table(writer, "token_embd.weight", folder.tensors["embed_tokens.weight"], file.table)
    for layer in range(config["num_hidden_layers"]):
        for part, name in NORMS.items():
            norm = f"layers.{layer}.{part}.weight"
            if norm in folder.tensors:
                if file.arch == "gemma3" and part == "post_attention_layernorm":
                    name = "post_attention_norm"
                writer.add_tensor(f"blk.{layer}.{name}.weight", gain(file, folder, norm))
        for part, name in LINEARS.items():
            linear = folder.linear(f"layers.{layer}.{part}", f"blk.{layer}.{name}")
            if file.arch == "llama" and name in ("attn_q", "attn_k"):
                heads = config["num_attention_heads" if name == "attn_q" else "num_key_value_heads"]
                linear.t = permute(linear.t, heads)
            file.linear(writer, linear)
    writer.add_tensor("output_norm.weight", gain(file, folder, "norm.weight"))
    if not config["tie_word_embeddings"]:
        add_table(writer, "output.weight", folder.tensors["lm_head.weight"], file.table)
    elif file.head_twice:
        add_table(writer, "output.weight", folder.tensors["embed_tokens.weight"], file.table)
    finish(writer, path)


def gain(file: File, folder: Folder, name: str) -> np.ndarray:
    """A norm's gain. Gemma 3's are stored less one, but those before projections; llama.cpp's conversion/gemma.py
    adds it. The file has no key for `query_pre_attn_scalar`, and its engines take the length of a key: what is left of
    the scale of the scores goes into the gain of the query heads."""
    gain = folder.floats(name)
    if file.arch != "gemma3" or "_proj.norm" in name:
        return gain
    gain = gain + np.float32(1)
    if name.endswith("q_norm.weight"):
        gain = gain * np.float32(np.sqrt(folder.config["head_dim"] / folder.config["query_pre_attn_scalar"]))
    return gain


def add_windows(writer: GGUFWriter, config: dict) -> None:
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern(config["sliding_window_pattern"])
    writer.add_rope_freq_base_swa(config["rope_local_base_freq"])


def add_config(writer: GGUFWriter, config: dict) -> None:
    writer.add_name("a fixture")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    dim = config.get("head_dim")
    if dim is not None:
        writer.add_key_length(dim)
        writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim or config["hidden_size"] // config["num_attention_heads"])
    writer.add_file_type(40)  # I2_S in bitnet.cpp, something else elsewhere: nothing may depend on it
    writer.add_quantization_version(2)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def add_table(writer: GGUFWriter, name: str, table: torch.Tensor, kind: Type) -> None:
    wide = table.float().numpy()
    if kind == Type.BF16:
        data = quants.quantize(wide, kind)
        assert (quants.dequantize(data, kind) == wide).all(), f"{name} is exact"
        writer.add_tensor(name, data, raw_dtype=kind)
    else:
        data = wide.astype({Type.F32: np.float32, Type.F16: np.float16}[kind])
        assert (data == wide).all(), f"{name} is exact"
        writer.add_tensor(name, data)


def write_table(kind: Type, rng: np.random.Generator, path: Path) -> None:
    """A model of one layer with heads of two dimensions, its embedding table random blocks of one type."""
    vocab, hidden = 6, 512
    writer = GGUFWriter(path.with_suffix(".gguf"), "bitnet-b1.58")
    add_config(
        writer,
        dict(
            vocab_size=vocab, max_position_embeddings=32, hidden_size=hidden, num_hidden_layers=1, intermediate_size=2,
            num_attention_heads=1, num_key_value_heads=1, head_dim=2, rms_norm_eps=1e-5, rope_theta=10000.0,
            bos_token_id=0, eos_token_id=1,
        ),
    )
    if kind in (Type.F32, Type.F16, Type.BF16):
        table = torch.from_numpy(rng.standard_normal((vocab, hidden), np.float32))
        table = table.to({Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}[kind])
        add_table(writer, "token_embd.weight", table, kind)
        expected = table.float().numpy()
    else:
        data = random_blocks(kind, rng, vocab, hidden)
        writer.add_tensor("token_embd.weight", data, raw_dtype=kind)
        expected = quants.dequantize(data, kind)
    expected.astype("<f4").tofile(path.with_suffix(".f32"))
    for name, rows, cols in [
        ("attn_q", 2, hidden), ("attn_k", 2, hidden), ("attn_v", 2, hidden), ("attn_output", hidden, 2),
        ("ffn_gate", 2, hidden), ("ffn_up", 2, hidden), ("ffn_down", hidden, 2),
    ]:
        t = rng.integers(-1, 2, (rows, cols)).astype(np.float32)
        as_i2_s(writer, Linear(f"blk.0.{name}", t, np.float32(0.5), None))
    for name, width in [("attn_norm", hidden), ("attn_sub_norm", 2), ("ffn_norm", hidden), ("ffn_sub_norm", 2)]:
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(width, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    finish(writer, path.with_suffix(".gguf"))


def random_blocks(kind: Type, rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    """Rows of blocks with random codes, their f16 factors of usual sizes, of both signs where the type has them."""
    values, size = {
        Type.Q8_0: (32, 34), Type.Q5_0: (32, 22), Type.Q5_1: (32, 24), Type.Q4_0: (32, 18), Type.Q4_K: (256, 144),
        Type.Q6_K: (256, 210),
    }[kind]
    blocks = rng.integers(0, 256, (rows * cols // values, size), np.uint8)
    factors = {Type.Q5_1: [0, 2], Type.Q4_K: [0, 2], Type.Q6_K: [208]}.get(kind, [0])
    for at in factors:
        blocks[:, at : at + 2] = rng.normal(0, 0.01, (len(blocks), 1)).astype("<f2").view(np.uint8)
    return blocks.reshape(rows, -1)


def finish(writer: GGUFWriter, path: Path) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{path.relative_to(FIXTURES.parent)}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
