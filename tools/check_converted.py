#!/usr/bin/env python3
"""Decode what `trine convert` writes, with other people's code, and compare it with what went in.

    pip install -r tools/requirements-convert.txt
    python tools/check_converted.py --trine target/release/trine

Makes random checkpoints (and takes the demo model), converts each to every type that can hold it, and
compares tensor by tensor: ternary codes and scales exactly, tables within half a step of their type, keys
and tokens with `config.json` and `tokenizer.json`. Each GGUF file is read twice: by the reader below, which
knows the container and the layouts from their descriptions and nothing of Trine, and, but for I2_S, which
that does not know, by the `gguf` package, whose quantizers must also give the same bytes where it has them.
Refusals are checked, too. Prints a line for each file; exit code 1 at the first difference.
"""

import argparse
import json
import shutil
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PROJECTIONS = {
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
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    # Gemma 3, whose "post_attention_layernorm" is another norm than that of the rest.
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    # bitnet.cpp's names, of its embedding models (utils/convert-bitnet-embedding-to-gguf.py).
    **{f"{part}.rms_norm": f"{name}_norm_in" for part, name in PROJECTIONS.items()},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trine", type=Path, default=ROOT / "target/release/trine")
    parser.add_argument("--keep", type=Path, help="folder for the files, which are kept there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = args.keep or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        Check(args.trine.resolve(), work).all()


# --- What goes in -----------------------------------------------------------------------------------------


@dataclass
class Model:
    """A checkpoint as plain arrays: int8 codes of -1, 0 and 1, f32 scales that multiply, f32 tables."""

    config: dict
    ternary: dict[str, tuple[np.ndarray, np.float32]]  # "model.layers.0.self_attn.q_proj"
    floats: dict[str, np.ndarray]  # norms and tables by their Hugging Face names
    dtypes: dict[str, str]  # of `floats`

    @property
    def llama(self) -> bool:
        return self.config["model_type"] == "llama"

    @property
    def arch(self) -> str:
        kind = self.config["model_type"]
        return {"bitnet": "bitnet-b1.58", "gemma3_text": "gemma3"}.get(kind, kind)

    def added(self, name: str) -> np.float32:
        """What the class of a norm adds to its stored gains."""
        norm = self.floats[name].ndim == 1 and "_proj." not in name
        return np.float32(self.arch == "gemma3" and norm)

    @property
    def head_dim(self) -> int:
        return self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"]


def read_safetensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__", {}).get("format") == "pt", "transformers refuses files without it"
    kinds = {"U8": np.uint8, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        assert start == end, f"{name}: a hole or an overlap"
        end = stop
        array = np.frombuffer(data, kinds[entry["dtype"]], offset=8 + length + start, count=int(np.prod(entry["shape"])))
        tensors[name] = entry["dtype"], array.reshape(entry["shape"])
    assert end == len(data) - 8 - length, f"{path}: bytes after the last tensor"
    return tensors


def as_f32(dtype: str, array: np.ndarray) -> np.ndarray:
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def read_folder(folder: Path) -> Model:
    config = json.loads((folder / "config.json").read_text())
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
    tensors = {}
    for file in sorted(files):
        tensors |= read_safetensors(folder / file)
    # The published embedding models have no such object, no prefix, and another name for one norm.
    quantization = config.get("quantization_config", {"linear_class": "autobitlinear", "quantization_mode": "online"})
    tensors = {
        (name if name.startswith(("model.", "lm_head.")) else f"model.{name}").replace("_proj.norm.", "_proj.rms_norm."): tensor
        for name, tensor in tensors.items()
    }
    divides = quantization.get("linear_class", "bitlinear") == "bitlinear"
    model = Model(config, {}, {}, {})
    for name, (dtype, array) in tensors.items():
        base = name.removesuffix(".weight")
        if not base.endswith("_proj"):
            if not name.endswith("_scale"):
                model.floats[name], model.dtypes[name] = as_f32(dtype, array), dtype
            continue
        if quantization.get("quantization_mode") == "online":
            weights = as_f32(dtype, array)
            mean = np.float32(np.abs(weights.astype(np.float64)).mean())
            scale = max(mean, np.float32(1e-5))
            codes = np.clip(np.rint(weights * (np.float32(1) / scale)), -1, 1).astype(np.int8)
        else:
            parts = [(array >> shift & 3).astype(np.int8) - 1 for shift in (0, 2, 4, 6)]
            codes = np.concatenate(parts)
            scale = as_f32(*tensors[f"{name}_scale"])[0]
            scale = np.float32(1) / scale if divides else scale
        model.ternary[base] = codes, np.float32(scale)
    return model


def make(
    folder: Path, seed: int, *, form: str, dtype: str, tied: bool, llama: bool = False, embeds: str = "", layers: int = 2
) -> None:
    """A random checkpoint whose matrices fit every type. `form`: bitlinear, autobitlinear or master. A model that
    embeds, "qwen3" or "gemma3", has the form in which those are published, and what sentence-transformers puts beside."""
    rng = np.random.default_rng(seed)
    hidden, ffn, heads, kv, dim, vocab = 512, 768, 4, 2, 128, 1024
    shapes = {
        "self_attn.q_proj": (heads * dim, hidden),
        "self_attn.k_proj": (kv * dim, hidden),
        "self_attn.v_proj": (kv * dim, hidden),
        "self_attn.o_proj": (hidden, heads * dim),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    tensors: dict[str, tuple[str, np.ndarray]] = {}

    def put(name: str, values: np.ndarray, kind: str = dtype) -> None:
        values = values.astype(np.float32)
        if kind == "BF16":
            tensors[name] = kind, (values.view(np.uint32) >> 16).astype(np.uint16)
        else:
            tensors[name] = kind, values.astype({"F16": np.float16, "F32": np.float32}[kind])

    table = rng.standard_normal((vocab, hidden)) * 0.05
    table[3] = 0  # a row of zeros has no scale
    table[5, :32] = 0
    table[7, 100] = 9  # a row with an outlier
    put("model.embed_tokens.weight", table)
    if not tied:
        put("lm_head.weight", rng.standard_normal((vocab, hidden)) * 0.03)
    put("model.norm.weight", rng.standard_normal(hidden) + 1, "F32")
    for layer in range(layers):
        at = f"model.layers.{layer}."
        widths = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        if embeds == "gemma3":
            widths |= {"pre_feedforward_layernorm": hidden, "post_feedforward_layernorm": hidden}
        if embeds:
            widths |= {"self_attn.q_norm": dim, "self_attn.k_norm": dim}
            widths |= {f"{part}.norm": cols for part, (_, cols) in shapes.items()}
        elif not llama:
            widths |= {"self_attn.attn_sub_norm": heads * dim, "mlp.ffn_sub_norm": ffn}
        for norm, width in widths.items():
            put(f"{at}{norm}.weight", rng.standard_normal(width) + 1)
        for part, (rows, cols) in shapes.items():
            if form == "master":
                put(f"{at}{part}.weight", rng.standard_normal((rows, cols)) * 0.02)
                continue
            codes = rng.choice(np.array([0, 1, 2], np.uint8), (rows, cols), p=[0.3, 0.4, 0.3])
            codes[:, :256] = np.where(rng.random((rows, 1)) < 0.05, np.uint8(1), codes[:, :256])  # blocks of zeros
            quarter = rows // 4
            packed = sum(codes[k * quarter : (k + 1) * quarter].astype(np.uint8) << 2 * k for k in range(4))
            tensors[f"{at}{part}.weight"] = "U8", packed.astype(np.uint8)
            put(f"{at}{part}.weight_scale", rng.uniform(1, 2.5, 1) if form != "bitlinear" else rng.uniform(20, 60, 1))
    quantization = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
    if form != "bitlinear":
        mode = "online" if form == "master" else "offline"
        quantization |= {"linear_class": "autobitlinear", "quantization_mode": mode}
    config = {
        "architectures": ["LlamaForCausalLM" if llama else "BitNetForCausalLM"],
        "model_type": "llama" if llama else "bitnet",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 640,
        "rope_theta": 1000042.0 if llama else 500000.0,
        "rms_norm_eps": 1e-6 if llama else 1e-5,
        "hidden_act": "silu" if llama else "relu2",
        "tie_word_embeddings": tied,
        "bos_token_id": 1021,
        "eos_token_id": 1022,
        "quantization_config": quantization,
    }
    folder.mkdir(parents=True)
    if embeds:
        assert form == "master" and tied
        del config["quantization_config"]
        config |= {"architectures": ["Qwen3Model"], "model_type": "qwen3", "head_dim": dim, "hidden_act": "silu"}
        if embeds == "gemma3":
            del config["hidden_act"]
            config |= {"architectures": ["Gemma3TextModel"], "model_type": "gemma3_text", "query_pre_attn_scalar": dim}
            config |= {"hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 20000.0, "sliding_window": 48}
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        classes = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
        modules = [
            {"idx": idx, "name": str(idx), "path": path, "type": f"sentence_transformers.models.{name}"}
            for idx, (path, name) in enumerate(classes.items())
        ]
        (folder / "modules.json").write_text(json.dumps(modules, indent=2))
        (folder / "1_Pooling").mkdir()
        pooling = {"word_embedding_dimension": hidden, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
        (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (kind, array) in tensors.items():
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for _, array in tensors.values():
            out.write(array.tobytes())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(ROOT / "models/demo" / name, folder)


# --- What comes out: GGUF ---------------------------------------------------------------------------------


class Gguf:
    """The container: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""

    SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

    def __init__(self, path: Path) -> None:
        self.data, self.at = path.read_bytes(), 0
        assert self.take("4s") == b"GGUF"
        version, tensors, keys = self.take("I"), self.take("Q"), self.take("Q")
        assert version == 3
        self.keys = {}
        for _ in range(keys):
            key = self.text()
            assert key not in self.keys, f"{key} twice"
            self.keys[key] = self.value(self.take("I"))
        self.tensors = {}
        for _ in range(tensors):
            name = self.text()
            shape = [self.take("Q") for _ in range(self.take("I"))]
            assert name not in self.tensors, f"{name} twice"
            self.tensors[name] = shape[::-1], self.take("I"), self.take("Q")
        self.start = -(-self.at // 32) * 32
        assert len(self.data) % 32 == 0

    def take(self, kind: str):
        value = struct.unpack_from(f"<{kind}", self.data, self.at)[0]
        self.at += struct.calcsize(f"<{kind}")
        return value

    def text(self) -> str:
        length = self.take("Q")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def value(self, kind: int):
        if kind == 8:
            return self.text()
        if kind == 9:
            element, count = self.take("I"), self.take("Q")
            return [self.value(element) for _ in range(count)]
        return self.take(self.SCALARS[kind])

    def raw(self, name: str, size: int) -> np.ndarray:
        offset = self.start + self.tensors[name][2]
        assert offset % 32 == 0 and offset + size <= len(self.data), f"{name} lies outside of the file"
        return np.frombuffer(self.data, np.uint8, size, offset)

    def ternary(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Codes of -1, 0 and 1, and for each weight the scale that stands with it."""
        (rows, cols), kind, _ = self.tensors[name]
        if kind == 36:  # I2_S
            raw = self.raw(name, rows * cols // 4 + 32)
            blocks = raw[:-32].reshape(-1, 1, 32) >> np.array([6, 4, 2, 0], np.uint8).reshape(1, 4, 1) & 3
            assert not raw[-28:].any(), "padding after the scale"
            scales = np.broadcast_to(raw[-32:-28].view(np.float32), (rows, cols))
        elif kind == 35:  # TQ2_0
            raw = self.raw(name, rows * cols // 256 * 66).reshape(-1, 66)
            blocks = raw[:, :64].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1) & 3
            scales = np.repeat(raw[:, 64:].copy().view(np.float16), 256)
        elif kind == 34:  # TQ1_0
            raw = self.raw(name, rows * cols // 256 * 54).reshape(-1, 54)

            def digits(part: np.ndarray, count: int) -> np.ndarray:
                powers = np.array([1, 3, 9, 27, 81][:count], np.uint8).reshape(1, count, 1)
                return (((part[:, None, :] * powers).astype(np.uint16) * 3) >> 8).reshape(len(part), -1)

            blocks = np.concatenate([digits(raw[:, :32], 5), digits(raw[:, 32:48], 5), digits(raw[:, 48:52], 4)], axis=1)
            scales = np.repeat(raw[:, 52:].copy().view(np.float16), 256)
        else:
            raise AssertionError(f"{name}: type {kind}")
        codes = blocks.reshape(rows, cols).astype(np.int8) - 1
        assert codes.max() <= 1, f"{name}: code 3"
        return codes, scales.astype(np.float32).reshape(rows, cols)

    def floats(self, name: str) -> tuple[str, np.ndarray]:
        shape, kind, _ = self.tensors[name]
        count = int(np.prod(shape))
        if kind == 0:
            return "F32", self.raw(name, 4 * count).view(np.float32).reshape(shape)
        if kind == 1:
            return "F16", self.raw(name, 2 * count).view(np.float16).astype(np.float32).reshape(shape)
        if kind == 30:
            return "BF16", as_f32("BF16", self.raw(name, 2 * count).view(np.uint16)).reshape(shape)
        if kind == 8:
            raw = self.raw(name, count // 32 * 34).reshape(-1, 34)
            scale = raw[:, :2].copy().view(np.float16).astype(np.float32)
            return "Q8_0", (scale * raw[:, 2:].view(np.int8)).reshape(shape)
        if kind == 14:
            raw = self.raw(name, count // 256 * 210).reshape(-1, 210)
            values = np.empty((len(raw), 256), np.float32)
            scale = raw[:, 208:].copy().view(np.float16).astype(np.float32)
            for at in range(256):  # one value of every block at a time: slow to read nothing into it
                half, group, lane = at // 128, at % 128 // 32, at % 32
                low = raw[:, 64 * half + 32 * (group % 2) + lane] >> 4 * (group // 2) & 15
                high = raw[:, 128 + 32 * half + lane] >> 2 * group & 3
                factor = raw[:, 192 + at // 16].view(np.int8).astype(np.float32)
                values[:, at] = scale[:, 0] * factor * ((high << 4 | low).astype(np.float32) - 32)
            return "Q6_K", values.reshape(shape)
        raise AssertionError(f"{name}: type {kind}")


def interleaved(codes: np.ndarray, dim: int) -> np.ndarray:
    """Rows of a head from halves to neighbours, as RoPE turns them under `llama`."""
    heads = codes.reshape(-1, 2, dim // 2, codes.shape[1])
    return heads.swapaxes(1, 2).reshape(codes.shape)


def steps(kind: str, table: np.ndarray) -> np.ndarray:
    """How far a value may be from the one that a type holds for it."""
    size = np.abs(table)
    if kind == "F32":
        return np.zeros_like(size)
    if kind == "F16":
        return np.maximum(size * 2.0**-11, 2.0**-25)
    if kind == "BF16":
        return size * 2.0**-8
    if kind == "Q8_0":
        # Half a step, and 127 times what f16 rounds off the step.
        largest = size.reshape(-1, 32).max(axis=1, keepdims=True)
        return np.broadcast_to(largest / 127 * (0.5 + 127 * 2.0**-11), (largest.size, 32)).reshape(table.shape)
    # The scale of 16 values is a 127th of 256's at the least; of the 64 steps all but one side are used.
    groups = size.reshape(-1, 16)
    blocks = np.repeat(size.reshape(-1, 256).max(axis=1), 16)[:, None]
    return np.broadcast_to(groups.max(axis=1, keepdims=True) / 32 + blocks / 127 / 2, groups.shape).reshape(table.shape)


class Check:
    def __init__(self, trine: Path, work: Path) -> None:
        self.trine, self.work = trine, work

    def convert(self, *args: str) -> subprocess.CompletedProcess:
        return subprocess.run([self.trine, "convert", *map(str, args)], capture_output=True, text=True)

    def all(self) -> None:
        models = {
            "bitnet": dict(form="autobitlinear", dtype="BF16", tied=True),
            "bitnet-master": dict(form="master", dtype="F32", tied=False),
            "llama": dict(llama=True, form="bitlinear", dtype="BF16", tied=False),
            "llama-tied": dict(llama=True, form="bitlinear", dtype="F16", tied=True),
            "qwen3": dict(embeds="qwen3", form="master", dtype="BF16", tied=True),
            "gemma3": dict(embeds="gemma3", form="master", dtype="BF16", tied=True, layers=7),
        }
        for seed, (name, shape) in enumerate(models.items()):
            folder = self.work / name
            make(folder, seed, **shape)
            for kind in ("i2_s", "tq2_0", "tq1_0"):
                self.gguf(folder, kind)
            for head in ("f16", "bf16", "f32", "q8_0", "q6_k"):
                self.gguf(folder, "tq2_0", head)
            self.folder(folder)
            self.folder(folder, "f32")
        self.gguf(ROOT / "models/demo", "i2_s")
        self.gguf(ROOT / "models/demo", "i2_s", "q6_k")
        self.folder(ROOT / "models/demo")
        self.refusals()

    def gguf(self, source: Path, kind: str, head: str | None = None) -> None:
        out = self.work / f"{source.name}-{kind}-{head or 'own'}.gguf"
        done = self.convert(source, out, "--type", kind, *(["--head", head] if head else []))
        assert done.returncode == 0, done.stderr
        model, file = read_folder(source), Gguf(out)
        check_keys(model, file, source, kind)
        expected = set()
        for base, (codes, scale) in model.ternary.items():
            layer, part = base.removeprefix("model.layers.").split(".", 1)
            name = f"blk.{layer}.{PROJECTIONS[part]}"
            expected.add(f"{name}.weight")
            if model.llama and part in ("self_attn.q_proj", "self_attn.k_proj"):
                codes = interleaved(codes, model.head_dim)
            found, scales = file.ternary(f"{name}.weight")
            if f"{name}.scale" in file.tensors:
                expected.add(f"{name}.scale")
                assert np.float16(scale) != scale, f"{name}: f16 would have held the scale"
                scales = scales * file.floats(f"{name}.scale")[1]
            assert (found == codes).all(), f"{out.name}: {name}: codes differ"
            # A block of zeros may say anything; ggml says 0.
            assert (scales[codes != 0] == scale).all(), f"{out.name}: {name}: scales differ"
        for hf, values in model.floats.items():
            name = gguf_name(hf, model.arch)
            expected.add(name)
            values = values + model.added(hf)  # in GGUF it stands in the gain
            stored, found = file.floats(name)
            table = values.ndim == 2
            wanted = (head or model.dtypes[hf]).upper() if table else "F32"
            assert stored == wanted, f"{name}: {stored}, not {wanted}"
            if table:
                assert (np.abs(found - values) <= steps(stored, values)).all(), f"{out.name}: {name}: too far"
                if stored == "Q8_0":
                    bytes_of_package = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0).reshape(-1)
                    assert (file.raw(name, bytes_of_package.size) == bytes_of_package).all(), f"{name}: other bytes"
            else:
                assert (found == values).all(), f"{out.name}: {name}: differs"
        assert set(file.tensors) == expected, set(file.tensors) ^ expected
        also = "" if kind == "i2_s" else ", and by gguf"
        if also:
            check_by_package(out, file)
        print(f"{out.name}: {len(expected)} tensors decoded{also}", flush=True)

    def folder(self, source: Path, head: str | None = None) -> None:
        out = self.work / f"{source.name}-hf-{head or 'own'}"
        done = self.convert(source, out, "--type", "hf", *(["--head", head] if head else []))
        assert done.returncode == 0, done.stderr
        before, after = read_folder(source), read_folder(out)
        assert before.ternary.keys() == after.ternary.keys()
        for name, (codes, scale) in before.ternary.items():
            assert (after.ternary[name][0] == codes).all(), f"{out.name}: {name}: codes differ"
            assert after.ternary[name][1] == scale, f"{out.name}: {name}: scales differ"
        assert before.floats.keys() == after.floats.keys()
        for name, values in before.floats.items():
            # What is stored may differ in bits that are lost when one is added to it.
            added = before.added(name)
            assert (after.floats[name] + added == values + added).all(), f"{out.name}: {name}: differs"
        for key, value in before.config.items():
            if key not in ("quantization_config", "torch_dtype"):
                found = after.config[key]
                same = found == value or (key == "eos_token_id" and value in found)
                assert same, f"{out.name}: {key}: {found}, not {value}"
        names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
        if (source / "modules.json").exists():
            names += ["modules.json", "1_Pooling/config.json"]
            assert after.config["quantization_config"]["use_rms_norm"] is True
        for name in names:
            assert (out / name).read_bytes() == (source / name).read_bytes(), name
        print(f"{out.name}: {len(before.ternary) + len(before.floats)} tensors decoded", flush=True)

    def refusals(self) -> None:
        out = self.work / "refused.gguf"
        for args, words in [
            (("models/demo", out, "--type", "tq2_0"), ["ffn_down", "640", "256", "i2_s"]),
            (("tests/fixtures/bitnet_long", out, "--type", "i2_s"), ["attn_q", "192", "128", "hf"]),
            (("tests/fixtures/bitnet_packed", out, "--type", "tq1_0"), ["200", "256", "hf"]),
            (("models/demo", self.work / "refused", "--type", "hf", "--head", "q8_0"), ["Q8_0", "safetensors"]),
        ]:
            done = self.convert(*args)
            assert done.returncode == 2 and all(word in done.stderr for word in words), done
            assert done.stderr.count("\n") == 1, done.stderr
            assert not Path(args[1]).exists()
        left = [path.name for path in self.work.iterdir() if path.name.startswith(".")]
        assert not left, left
        print("refusals: as expected")


def gguf_name(hf: str, arch: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    base = hf.removesuffix(".weight")
    if base in whole:
        return f"{whole[base]}.weight"
    layer, part = base.removeprefix("model.layers.").split(".", 1)
    if arch == "gemma3" and part == "post_attention_layernorm":
        return f"blk.{layer}.post_attention_norm.weight"
    return f"blk.{layer}.{NORMS[part]}.weight"


def check_keys(model: Model, file: Gguf, source: Path, kind: str) -> None:
    config, keys = model.config, file.keys
    arch = model.arch
    expected = {
        "general.architecture": arch,
        "general.file_type": {"i2_s": 40, "tq1_0": 36, "tq2_0": 37}[kind],
        "general.quantization_version": 2,
        f"{arch}.vocab_size": config["vocab_size"],
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.rope.dimension_count": model.head_dim,
        f"{arch}.rope.freq_base": config["rope_theta"],
        f"{arch}.attention.head_count": config["num_attention_heads"],
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.key_length": model.head_dim,
        f"{arch}.attention.value_length": model.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(np.float32(config["rms_norm_eps"])),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smaug-bpe",  # Llama 3's expression, and no ignore_merges
        "tokenizer.ggml.bos_token_id": 1021,
        "tokenizer.ggml.eos_token_id": 1022,
        "tokenizer.ggml.eot_token_id": 1023,
        "tokenizer.ggml.add_bos_token": True,
    }
    if arch == "bitnet-b1.58":
        expected[f"{arch}.hidden_activation"] = config["hidden_act"]
    # A text to be embedded ends with EOS, whose row is taken.
    expected["tokenizer.ggml.add_eos_token"] = arch == "qwen3"
    if arch == "gemma3":
        expected[f"{arch}.attention.sliding_window"] = config["sliding_window"]
        expected[f"{arch}.attention.sliding_window_pattern"] = 6
        expected[f"{arch}.rope.freq_base_swa"] = config["rope_local_base_freq"]
    if arch in ("qwen3", "gemma3"):
        expected[f"{arch}.pooling_type"] = gguf.PoolingType.LAST
    else:
        assert f"{arch}.pooling_type" not in keys
    for key, value in expected.items():
        assert keys[key] == value, f"{key}: {keys[key]}, not {value}"
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    template = json.loads((source / "tokenizer_config.json").read_text())["chat_template"]
    assert keys["tokenizer.chat_template"] == template
    tokens = {id: text for text, id in tokenizer["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, 1)
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = 3 if added["special"] else 4
    assert keys["tokenizer.ggml.tokens"] == [tokens[id] for id in range(config["vocab_size"])]
    assert keys["tokenizer.ggml.token_type"] == [types[id] for id in range(config["vocab_size"])]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    assert keys["tokenizer.ggml.merges"] == merges


def check_by_package(path: Path, file: Gguf) -> None:
    reader = gguf.GGUFReader(path)
    assert len(reader.tensors) == len(file.tensors)
    for key, value in file.keys.items():
        assert reader.fields[key].contents() == value, key
    for tensor in reader.tensors:
        shape, kind, _ = file.tensors[tensor.name]
        assert list(reversed(tensor.shape.tolist())) == shape and tensor.tensor_type == kind, tensor.name
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        if kind in (34, 35):
            codes, scales = file.ternary(tensor.name)
            found = codes * scales
            again = gguf.quants.quantize(found, tensor.tensor_type)
            assert (again.reshape(-1) == tensor.data.reshape(-1)).all(), f"{tensor.name}: gguf writes other bytes"
        else:
            found = file.floats(tensor.name)[1]
        assert (values == found).all(), f"{tensor.name}: gguf decodes something else"


if __name__ == "__main__":
    sys.exit(main())
