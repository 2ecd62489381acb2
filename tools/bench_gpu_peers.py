#!/usr/bin/env python3
"""What others reach on this GPU at the shapes of BitNet b1.58 2B4T. Needs PyTorch with CUDA.

    python3 tools/bench_gpu_peers.py [--part NAME ...] [--w2a8 libbitnet.so] > peers.jsonl

A JSON object per line on standard output, times in microseconds, medians. Weights are cold: each
measurement rotates over copies that no L2 cache holds, in one CUDA graph, so that no time of the
host is in it. A part that cannot run says why in a line of its own, and the others go on; the exit
code is 1 only if none could.

Parts:
  copy          the rate at which the GPU copies its own memory, bytes read and written counted
  bf16          cuBLAS, bf16 in and out, f32 accumulators: each shape at several rows, and the sum
                over the matrices of a token, head included
  int8          torch._int_mm at the rows of prompts: int8 weights, unpacked
  transformers  BitNetForCausalLM with packed random weights: generate, eager and compiled
  w2a8          Microsoft's kernel (microsoft/BitNet, folder gpu), from a library that its
                compile.sh built; called through its C entry point
"""

import argparse
import ctypes
import json
import statistics
import sys
import time

HIDDEN, FFN, LAYERS, VOCABULARY = 2560, 6912, 30, 128256
# Name, features, width.
LAYER = [("qkv", 3840, HIDDEN), ("output", HIDDEN, HIDDEN), ("gate and up", 2 * FFN, HIDDEN), ("down", HIDDEN, FFN)]
HEAD = ("head", VOCABULARY, HIDDEN)
COLD_BYTES = 512 << 20
ROUNDS = 21


def say(part: str, **fields) -> None:
    print(json.dumps({"part": part, **fields}), flush=True)


def graph_time(torch, calls: list) -> float:
    """Seconds of one of `calls`, of which each is captured once; the median of several replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for number in range(ROUNDS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if number >= 3:
            times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def copies(bytes_of_one: int) -> int:
    return max(2, -(-COLD_BYTES // bytes_of_one))


def copy_rate(torch) -> float:
    """Bytes per second, as `trine bench` measures it: 256 MiB back and forth."""
    size = 256 << 20
    pieces = [torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(2)]

    def call(number: int):
        return lambda: pieces[number % 2].copy_(pieces[1 - number % 2])

    return 2 * size / graph_time(torch, [call(number) for number in range(16)])


def part_copy(torch, args, copy: float) -> None:
    say("copy", bytes_per_second=copy)


def products(torch, copy: float, part: str, rows_of: list, element: float, make, shapes: list) -> None:
    for rows in rows_of:
        sums = {}
        for name, features, width in shapes:
            if name == "head" and rows > 256:
                continue
            try:
                seconds = graph_time(torch, make(rows, features, width))
            except Exception as error:  # a shape that this version does not take
                say(part, op=name, rows=rows, error=f"{type(error).__name__}: {error}"[:300])
                continue
            finally:
                torch.cuda.empty_cache()
            sums[name] = seconds
            size = int(features * width * element)
            rate = size / seconds
            say(
                part, op=name, features=features, width=width, rows=rows, microseconds=seconds * 1e6, bytes=size,
                bytes_per_second=rate, copy_share=rate / copy, products_per_second=rows * features * width / seconds,
            )
        layers = [name for name, _, _ in LAYER]
        if all(name in sums for name in layers):
            step = LAYERS * sum(sums[name] for name in layers)
            say(part, op="all layers", rows=rows, microseconds=step * 1e6, rows_per_second=rows / step)
            if "head" in sums:
                step += sums["head"]
                say(part, op="all layers and head", rows=rows, microseconds=step * 1e6, rows_per_second=rows / step)


def part_bf16(torch, args, copy: float) -> None:
    def make(rows, features, width):
        x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
        y = torch.empty(rows, features, device="cuda", dtype=torch.bfloat16)
        count = copies(2 * features * width)
        weights = [torch.randn(features, width, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        return [lambda w=w: torch.mm(x, w.t(), out=y) for w in weights]

    products(torch, copy, "bf16", args.rows, 2, make, [*LAYER, HEAD])


def part_int8(torch, args, copy: float) -> None:
    def make(rows, features, width):
        x = torch.randint(-127, 128, (rows, width), device="cuda", dtype=torch.int8)
        count = copies(features * width)
        weights = [torch.randint(-1, 2, (features, width), device="cuda", dtype=torch.int8) for _ in range(count)]
        return [lambda w=w: torch._int_mm(x, w.t()) for w in weights]

    # It takes no fewer than 17 rows.
    rows = [rows for rows in args.rows if rows > 16]
    products(torch, copy, "int8", rows, 1, make, LAYER)


def part_w2a8(torch, args, copy: float) -> None:
    if not args.w2a8:
        raise RuntimeError("no library was named; --w2a8 libbitnet.so names one")
    library = ctypes.CDLL(args.w2a8)
    entry = library.bitlinear_int8xint2
    entry.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int] * 3 + [ctypes.c_void_p]
    entry.restype = None

    def make(rows, features, width):
        x = torch.randint(-127, 128, (rows, width), device="cuda", dtype=torch.int8)
        y = torch.zeros(rows, features, device="cuda", dtype=torch.bfloat16)
        of_rows = torch.ones(rows, 1, device="cuda", dtype=torch.bfloat16)
        of_weights = torch.ones(4, device="cuda", dtype=torch.bfloat16)
        count = copies(features * width // 4)
        shape = (features, width // 4)
        weights = [torch.randint(-128, 128, shape, device="cuda", dtype=torch.int8) for _ in range(count)]

        def call(w):
            stream = torch.cuda.current_stream().cuda_stream
            pointers = [t.data_ptr() for t in (x, w, y, of_rows, of_weights)]
            entry(*pointers, rows, features, width, stream)

        # A shape that is not in its list leaves the output as it is, and says so on standard output.
        call(weights[0])
        torch.cuda.synchronize()
        if not bool(y.any()):
            raise RuntimeError("the kernel wrote nothing: this shape is not one of its own")
        return [lambda w=w: call(w) for w in weights]

    products(torch, copy, "w2a8", [1], 0.25, make, LAYER)


def packed_model(torch):
    """A random 2B4T whose layers are transformers' own BitLinear with packed weights."""
    import transformers
    from transformers import BitNetConfig, BitNetForCausalLM
    from transformers.integrations import replace_with_bitnet_linear
    from transformers.utils.quantization_config import BitNetQuantConfig

    config = BitNetConfig()  # its defaults are 2B4T's
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = BitNetForCausalLM(config)
            model = replace_with_bitnet_linear(
                model, modules_to_not_convert=["lm_head"], quantization_config=BitNetQuantConfig()
            )
        finally:
            torch.set_default_dtype(torch.float32)
    model = model.to("cuda").eval()
    packed = 0
    for name, buffer in model.named_buffers():
        if buffer.dtype == torch.uint8:
            codes = [torch.randint(0, 3, buffer.shape, device="cuda", dtype=torch.uint8) for _ in range(4)]
            buffer.copy_(codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6)
            packed += 1
        elif "scale" in name:
            buffer.fill_(1.0)
    if packed == 0:
        raise RuntimeError("replace_with_bitnet_linear left no packed weights")
    return model, {"transformers": transformers.__version__, "packed_matrices": packed}


def generate_time(torch, model, prompt, count: int, **options) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=count, max_new_tokens=count,
            pad_token_id=0, **options,
        )
    torch.cuda.synchronize()
    return time.perf_counter() - started


def part_transformers(torch, args, copy: float) -> None:
    model, about = packed_model(torch)
    prompt = torch.randint(0, VOCABULARY, (1, 128), device="cuda")
    short, long = 8, 40
    for name in ["eager", "compiled"]:
        try:
            options = {}
            if name == "compiled":
                options["cache_implementation"] = "static"
                model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
            for count in (short, long):
                generate_time(torch, model, prompt, count, **options)
            times = []
            for _ in range(5):
                few = generate_time(torch, model, prompt, short, **options)
                times.append((generate_time(torch, model, prompt, long, **options) - few) / (long - short))
            token = statistics.median(times)
            say("transformers", form=name, prompt=128, microseconds=token * 1e6, tokens_per_second=1 / token, **about)
        except Exception as error:
            say("transformers", form=name, error=f"{type(error).__name__}: {error}"[:500], **about)


PARTS = {
    "copy": part_copy,
    "bf16": part_bf16,
    "int8": part_int8,
    "w2a8": part_w2a8,
    "transformers": part_transformers,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=sorted(PARTS), help="only this; may be repeated")
    parser.add_argument("--rows", type=lambda text: [int(rows) for rows in text.split(",")], default=[1, 8, 64, 512, 2048])
    parser.add_argument("--w2a8", metavar="LIB", help="the library of microsoft/BitNet's GPU kernel")
    args = parser.parse_args()
    try:
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("PyTorch sees no CUDA device")
        properties = torch.cuda.get_device_properties(0)
        capability = f"{properties.major}.{properties.minor}"
        say("machine", gpu=properties.name, capability=capability, torch=torch.__version__, cuda=torch.version.cuda)
        copy = copy_rate(torch)
    except Exception as error:
        say("machine", error=f"{type(error).__name__}: {error}"[:500])
        return 1
    ran = 0
    for name in args.part or list(PARTS):
        print(f"{name}:", file=sys.stderr, flush=True)
        try:
            PARTS[name](torch, args, copy)
            ran += 1
        except Exception as error:
            say(name, error=f"{type(error).__name__}: {error}"[:500])
        torch.cuda.empty_cache()
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
