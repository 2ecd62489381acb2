#!/usr/bin/env python3
"""Have llama.cpp, bitnet.cpp or ik_llama.cpp run what `trine convert` writes, and compare logits and token ids.

    pip install -r tools/requirements.txt sentencepiece
    c++ -std=c++20 -O1 tools/llama_cpp_logits.cpp -I LLAMA/include -I LLAMA/ggml/include -L BUILD/bin -lllama -lggml -o ENGINE
    python tools/check_converted_llama_cpp.py --trine target/release/trine --engine ENGINE [--kind bitnet.cpp]

Makes random checkpoints of the families that an engine knows (tools/fixtures draws them, so that attention is sharp
and layers matter), has transformers run them in f32, converts each with Trine, and has the engine run the file. What
it must be near to is decided by how it quantises activations:

* bitnet.cpp: int8 with one scale per token, as the models were trained. Its logits must be within 6 % of their
  deviation of transformers', as two devices must be of each other (docs/numerics.md): both do the same arithmetic,
  and an activation that rounds the other way is what remains.
* llama.cpp: int8 with one scale per 256 values (Q8_K). The same bound holds against a float64 forward pass that
  does that (`Blocks`, below). From transformers it may be 25 % away: the inputs of all matrices are rounded otherwise.
* ik_llama.cpp: multiplies no I2_S itself; its own quantizer makes IQ2_BN of it, which needs rows of 512 and more. That
  has four scales in a token, which the float64 pass does not imitate: 25 %.

The tables of these passes are those of the file (`--head` rounds them). The best token is the same wherever its lead is
half a deviation (ik_llama.cpp: one), mean NLL within 0.05, token ids those of Hugging Face's tokenizer on lines in many
scripts, and Trine's own logits from the file those from the folder. Files spoilt on purpose (scales of one, rows of q
and k in the other order) must be half a deviation off and more. `--converter` goes the other way: Trine runs what
llama.cpp's own converter and quantizer make of the folders. Prints a line for each file; exit code 1 at the first that fails.
"""

import argparse
import dataclasses
import json
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import fixtures  # noqa: F401 - before torch: it sets how torch runs
import numpy as np
import torch
import transformers
from check_converted import Gguf
from fixtures import config_styles, independent, tokenizer
from fixtures.checkpoint import rename_as_published, write_checkpoint
from fixtures.oracle import load
from fixtures.specs import Spec
from make_gguf_tokenizer_fixtures import SEEDS, hugging_face, sentencepieces
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import LlamaConverter

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, LENGTH = 4, 96
SAME, NEAR, FAR = 0.06, 0.25, 0.5  # rms difference of logits in parts of their standard deviation
CLEAR = {"ik_llama.cpp": 1.0}  # lead of the best token, in the same, from which it must be the best for all; else 0.5
I2_S = 36  # bitnet.cpp's id of the type
NLL = 0.05  # difference of mean negative log-likelihoods

COMMON = dict(seed=201, layers=3, dtype="float16", norm_dtype="float32", context=512)
SPECS = [
    Spec(
        name="1bitllm", about="SiLU, sub-norms, master weights, tied", family="bitnet", hidden=512, ffn=768, heads=4,
        kv_heads=4, head_dim=128, eps=1e-5, theta=10000.0, tied=True, act="silu", form="master",
        config_style="released_1bitllm", embed_std=0.3, peak=2.0, vocab=1408, **COMMON,
    ),
    Spec(
        name="llama3-8b", about="Llama, scale divides, untied", family="llama", hidden=512, ffn=1024, heads=8,
        kv_heads=2, head_dim=64, eps=1e-5, theta=500000.0, tied=False, act="silu", form="divide",
        config_style="released_llama3", tokenizer="llama3", embed_std=0.5, peak=2.0, vocab=512, **COMMON,
    ),
    Spec(
        name="falcon3", about="Llama, heads wider than the model, tied", family="llama", hidden=512, ffn=768, heads=8,
        kv_heads=4, head_dim=128, eps=1e-6, theta=1000042.0, tied=True, act="silu", form="divide",
        config_style="released_falcon", embed_std=0.3, peak=2.0, vocab=1408, **COMMON,
    ),
    Spec(
        name="2b4t", about="ReLU², sub-norms, scale multiplies, tied", family="bitnet", hidden=512, ffn=768, heads=4,
        kv_heads=2, head_dim=128, eps=1e-5, theta=500000.0, tied=True, act="relu2", form="multiply",
        config_style="released_2b4t", tokenizer="bitnet", embed_std=0.6, peak=2.0, vocab=512, **COMMON,
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trine", type=Path, default=ROOT / "target/release/trine")
    parser.add_argument("--engine", type=Path, required=True, help="llama_cpp_logits.cpp, linked with the engine")
    parser.add_argument("--kind", choices=["llama.cpp", "bitnet.cpp", "ik_llama.cpp"], default="llama.cpp")
    parser.add_argument("--converter", type=Path, help="convert_hf_to_gguf.py of llama.cpp: its files, read by Trine")
    parser.add_argument("--keep", type=Path, help="folder for the files, which are kept there")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        work = args.keep or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        Check(args, work).all()


# --- Models and what they should give ---------------------------------------------------------------------


@dataclass
class Model:
    spec: Spec
    folder: Path
    prompts: list[list[int]]
    logits: np.ndarray  # [PROMPTS * LENGTH, vocab], of transformers in f32

    @property
    def sigma(self) -> float:
        return float(self.logits.std())


class Blocks(independent.Forward):
    """Activations in blocks of 256, each with a scale of its own and no floor: ggml's Q8_K."""

    SIZE = 256

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        layer = self.linears[name]
        out = 0
        for start in range(0, x.shape[-1], self.SIZE):
            block = x[:, start : start + self.SIZE]
            largest = np.abs(block).max(axis=-1, keepdims=True)
            scale = 127 / np.where(largest == 0, 1, largest)
            out = out + np.rint(block * scale) / scale @ layer.ternary[:, start : start + self.SIZE].T
        return out * layer.multiplier


def make(spec: Spec, folder: Path) -> Model:
    foreign = spec.config_style in config_styles.FOREIGN
    write_checkpoint(dataclasses.replace(spec, config_style="as_written") if foreign else spec, folder)
    rng = np.random.default_rng(spec.seed)
    prompts = [rng.integers(spec.vocab - 3, size=LENGTH).tolist() for _ in range(PROMPTS)]
    with torch.no_grad():
        logits = load(folder, torch.float32)(torch.tensor(prompts)).logits.double().numpy()
    if spec.tokenizer:
        tokenizer.write_tokenizer(folder, spec.vocab, spec.tokenizer)
    else:
        write_sentencepiece(folder, spec.vocab)
    if foreign:
        rename_as_published(folder, spec.config_style)
        getattr(config_styles, spec.config_style)(folder / "config.json")
    return Model(spec, folder, prompts, logits.reshape(-1, spec.vocab))


def write_sentencepiece(folder: Path, vocab: int) -> None:
    """A tokenizer of the kind that 1bitLLM's checkpoints have, Llama 2's; tokenizer.model is for llama.cpp's converter."""
    pieces = sentencepieces(vocab_size=vocab - 6)
    (folder / "tokenizer.model").write_bytes(pieces)
    made = hugging_face(pieces, LlamaConverter, ["<unk>", "<s>", "</s>"], add_prefix_space=True)
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text()) | {"bos_token_id": 1, "eos_token_id": 2}
        (folder / name).write_text(json.dumps(config))


# --- The check --------------------------------------------------------------------------------------------


class Check:
    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.trine, self.engine, self.kind = args.trine.resolve(), args.engine.resolve(), args.kind
        self.converter, self.work = args.converter, work

    def all(self) -> None:
        for spec in SPECS:
            model = make(spec, self.work / spec.name)
            known = spec.act == "silu" or self.kind != "llama.cpp"
            types = ("tq2_0", "tq1_0") if self.kind == "llama.cpp" else ("i2_s",)
            for kind in types:
                file = self.convert(model, kind, "f32")
                if known:
                    self.compare(model, file)
                    self.tokens(model, file)
                self.trine_agrees(model, file)
            if not known:
                self.silu_for_relu2(model)
                continue
            for head in ("f16", "q8_0", "q6_k"):
                self.compare(model, self.convert(model, types[0], head))
            self.spoilt(model, types[0])
            if self.converter and not spec.tokenizer:  # it refuses byte-level tokenizers that it has no hash of
                self.back(model)

    def run(self, *args: object, text: str = "") -> bytes:
        done = subprocess.run([self.engine, *map(str, args)], input=text.encode(), capture_output=True)
        if done.returncode != 0:
            raise SystemExit(f"{self.engine.name} {args}: {done.stderr.decode(errors='replace')[-2000:]}")
        return done.stdout

    def convert(self, model: Model, kind: str, head: str, *more: str) -> Path:
        out = self.work / f"{model.spec.name}-{kind}-{head}.gguf"
        args = [self.trine, "convert", model.folder, out, "--type", kind, "--head", head, "--force", *more]
        subprocess.run(args, check=True, capture_output=True)
        return out

    def runnable(self, file: Path) -> Path:
        """The file that the engine runs: itself, or what its quantizer makes of it."""
        if self.kind != "ik_llama.cpp":
            return file
        self.run("quantize", file, file.with_suffix(".iq2_bn.gguf"), 137)
        return file.with_suffix(".iq2_bn.gguf")

    def engine_logits(self, model: Model, file: Path) -> np.ndarray:
        text = "".join(" ".join(map(str, ids)) + "\n" for ids in model.prompts)
        return np.frombuffer(self.run("logits", file, text=text), np.float32).reshape(-1, model.spec.vocab)

    def compare(self, model: Model, file: Path) -> None:
        file = self.runnable(file)
        found = self.engine_logits(model, file)
        wanted = self.own_arithmetic(model, file)
        error, own = (rms(found - logits) / model.sigma for logits in (model.logits, wanted))
        margins = np.sort(wanted)
        clear = margins[:, -1] - margins[:, -2] > CLEAR.get(self.kind, 0.5) * model.sigma
        same = found.argmax(1) == wanted.argmax(1)
        loss = nll(model, found) - nll(model, wanted)
        print(
            f"{file.name}: rms {own:.2%} of σ from its own arithmetic, nll {loss:+.3f}; {error:.2%} from transformers; "
            f"best token the same at {same[clear].sum()} of {clear.sum()} clear positions, {same.sum()} of all {len(same)}",
            flush=True,
        )
        assert own <= (NEAR if self.kind == "ik_llama.cpp" else SAME) and error <= NEAR
        assert same[clear].all() and clear.sum() >= 5 and abs(loss) <= NLL

    def own_arithmetic(self, model: Model, file: Path) -> np.ndarray:
        """A float64 pass that quantises activations as the engine does, with the tables as the file has them."""
        forward = (Blocks if self.kind == "llama.cpp" else independent.Forward)(model.folder)
        tables = Gguf(file)
        forward.tensors["model.embed_tokens.weight"] = tables.floats("token_embd.weight")[1]
        if not forward.tied():
            forward.tensors["lm_head.weight"] = tables.floats("output.weight")[1]
        return np.concatenate([forward.run(ids, LENGTH).logits for ids in model.prompts])

    def tokens(self, model: Model, file: Path) -> None:
        """Ids of the engine, and of Hugging Face's tokenizers."""
        theirs = Tokenizer.from_file(str(model.folder / "tokenizer.json"))
        lines = [line for line in SEEDS + tokenizer.PROBES + tokenizer.TEXT.splitlines() if line and "\0" not in line]
        text = "".join(line.encode().hex() + "\n" for line in lines)
        found = [list(map(int, ids.split())) for ids in self.run("tokens", file, text=text).decode().splitlines()]
        wanted = [theirs.encode(line).ids for line in lines]
        different = [line for line, a, b in zip(lines, found, wanted, strict=True) if a != b]
        assert not different, f"{file.name}: ids differ on {len(different)} of {len(lines)} lines: {different[:5]}"
        print(f"{file.name}: the same token ids on {len(lines)} lines", flush=True)

    def trine_agrees(self, model: Model, file: Path) -> None:
        """Trine's own answers are those from the folder, and those are near transformers'."""
        folder, from_file = (self.trine_logits(path, model) for path in (model.folder, file))
        assert (folder == from_file).all(), f"{file.name}: Trine's logits differ from the folder's"
        last = model.logits.reshape(PROMPTS, LENGTH, -1)[:, -1]
        assert rms(folder - last) / model.sigma <= SAME, f"{file.name}: Trine's logits are not transformers'"

    def trine_logits(self, path: Path, model: Model) -> np.ndarray:
        request = json.dumps({"prompts": model.prompts, "logits": True})
        args = [self.trine, "score", "--device", "cpu", "--model", path, "--jsonl"]
        done = subprocess.run(args, input=request, capture_output=True, text=True, check=True)
        return np.array([result["logits"] for result in json.loads(done.stdout)["results"]])

    def spoilt(self, model: Model, kind: str) -> None:
        """A file that says something else is far off: the bounds are no matter of course."""
        file = self.convert(model, kind, "f32")
        good = file.read_bytes()
        for what, spoil in (("scales of one", scales_of_one), ("rows of q and k in the other order", other_order)):
            bad = spoil(model.spec, file)
            assert bad != good
            file.write_bytes(bad)
            error = rms(self.engine_logits(model, self.runnable(file)) - model.logits) / model.sigma
            print(f"{file.name}, {what}: rms {error:.2%}", flush=True)
            assert error > FAR, f"{file.name}, {what}: only {error:.2%} off"
            file.write_bytes(good)

    def silu_for_relu2(self, model: Model) -> None:
        """The documented exception: llama.cpp computes SiLU for every `bitnet` file, unless it reads the key."""
        error = rms(self.engine_logits(model, self.convert(model, "tq2_0", "f32", "--arch", "bitnet")) - model.logits)
        print(f"{model.spec.name} as bitnet: loads, and is {error / model.sigma:.2%} off (SiLU in place of ReLU²)", flush=True)

    def back(self, model: Model) -> None:
        """llama.cpp's own converter and quantizer, read by Trine: as near to transformers as the folder is."""
        first = self.work / f"{model.spec.name}-theirs.gguf"
        args = [sys.executable, self.converter, model.folder, "--outfile", first, "--outtype", "f32", "--no-lazy"]
        done = subprocess.run(list(map(str, args)), capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{model.spec.name}: convert_hf_to_gguf.py: {done.stderr[-2000:]}")
        last = model.logits.reshape(PROMPTS, LENGTH, -1)[:, -1]
        for kind, ftype in (("f32", None), ("tq1_0", 36), ("tq2_0", 37)):
            file = first
            if ftype:
                file = self.work / f"{model.spec.name}-theirs-{kind}.gguf"
                self.run("quantize", first, file, ftype)
            error = rms(self.trine_logits(file, model) - last) / model.sigma
            ids = self.trine_ids(file) == self.trine_ids(model.folder)
            print(f"{file.name}, by Trine: rms {error:.2%} of σ from transformers, ids equal: {ids}", flush=True)
            assert error <= SAME and ids

    def trine_ids(self, path: Path) -> list[str]:
        lines = [line for line in tokenizer.PROBES + tokenizer.TEXT.splitlines() if line]
        run = lambda line: subprocess.run([self.trine, "tokenize", "--model", path, line], capture_output=True, check=True)
        return [run(line).stdout for line in lines]


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def nll(model: Model, logits: np.ndarray) -> float:
    """Mean of -ln p of each prompt's next token."""
    rows = torch.from_numpy(logits.reshape(PROMPTS, LENGTH, -1)[:, :-1].astype(np.float64)).flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(rows, torch.tensor(model.prompts)[:, 1:].flatten()))


def scales_of_one(spec: Spec, file: Path) -> bytes:
    """Every `.scale` tensor, or the scale at the end of I2_S, says 1."""
    layout, data = Gguf(file), bytearray(file.read_bytes())
    for name, (shape, kind, offset) in layout.tensors.items():
        at = layout.start + offset + (int(np.prod(shape)) // 4 if kind == I2_S else 0)
        if kind == I2_S or name.endswith(".scale"):
            data[at : at + 4] = struct.pack("<f", 1.0)
    return bytes(data)


def other_order(spec: Spec, file: Path) -> bytes:
    """Rows of q and k with the halves of a head apart, as under `bitnet`, or the other way about."""
    layout, data = Gguf(file), bytearray(file.read_bytes())
    for name, (shape, kind, offset) in layout.tensors.items():
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            rows, cols = shape
            size = rows * (cols // 4 if kind == I2_S else cols // 256 * 66)
            pairs = (spec.head_dim // 2, 2) if spec.family == "llama" else (2, spec.head_dim // 2)
            start = layout.start + offset
            heads = np.frombuffer(data[start : start + size], np.uint8).reshape(-1, *pairs, size // rows)
            data[start : start + size] = heads.swapaxes(1, 2).tobytes()
    return bytes(data)


if __name__ == "__main__":
    main()
