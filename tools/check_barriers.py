#!/usr/bin/env python3
"""Whether each barrier of kernels/ is needed: without it, some test of the CUDA backend must fail.

    tools/check_barriers.py begin FILE     before the tests, which then run with TRINE_EMULATOR_BARRIERS=FILE
    tools/check_barriers.py end FILE       lists each barrier and what missed it; fails where nothing did
    tools/check_barriers.py run [CARGO'S OPTIONS]      both, and the tests of tests/cuda between them (minutes)
    tools/check_barriers.py quick [CARGO'S OPTIONS]    the same of a few kernels, by tests that are soon done

While the tests run, the emulated driver (tests/cuda_emulator/barriers.h) repeats launches with one
barrier left out: `__syncthreads`, `__syncwarp`, or a wait for asynchronous copies. Needs no GPU.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
CALL = re.compile(r"\b(__syncthreads|__syncwarp|copy_async_wait)\s*(?:<\w+>)?\(\s*\)\s*;")

# What no result can miss, by file and code, and why it is there.
KEPT = {
    ("paged_attention_mma.cu", "if (AHEAD > 0 && CHUNKS > 2) __syncwarp();"): "orders nothing but the compiler's loads",
    ("paged_attention_mma.cu", "__syncwarp(); // all lanes have read these values"):
        "the lanes have met in `mma.sync`, which PTX does not call a barrier of memory",
    ("paged_attention_mma.cu", "__syncwarp(); // the sums"):
        "the lanes have met in `mma.sync`, which PTX does not call a barrier of memory",
}

# Tests, and the kernels whose barriers they all miss.
QUICK = {
    "tests": ["matmul::a_fused_network", "screen::close"],
    "kernels": {"lm_head.cu", "sample_greedy.cu", "ternary_matmul_fused.cu"},
}


def barriers():
    """(file, line) -> (name, why it is kept or None)."""
    found, used = {}, set()
    for path in sorted([*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh")]):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            calls = CALL.findall(line.split("//")[0])
            if not calls:
                continue
            if len(calls) > 1:
                sys.exit(f"check_barriers: {path.name}:{number}: two barriers on a line cannot be told apart")
            kept = [key for key in KEPT if key[0] == path.name and line.strip().startswith(key[1])]
            used.update(kept)
            found[path.name, number] = (calls[0], KEPT[kept[0]] if kept else None)
    if stale := set(KEPT) - used:
        sys.exit(f"check_barriers: there is no such barrier: {sorted(stale)}")
    return found


def begin(file):
    # Those that are kept count as missed, so that nobody tries them.
    lines = [
        f"{name}\t{line}\t{what}\t0\t0\t{why}\n" for (name, line), (what, why) in barriers().items() if why is not None
    ]
    Path(file).write_text("".join(lines))


def end(file, kernels=None):
    tried, missed = {}, {}
    for text in Path(file).read_text().splitlines():
        name, line, what, _, without, by = text.split("\t")
        place = name, int(line)
        tried[place] = tried.get(place, 0) + int(without)
        if by:
            missed.setdefault(place, by)
    counts = {"missed": 0, "kept": 0}
    wrong = []
    for place, (what, why) in barriers().items():
        if kernels is not None and place[0] not in kernels:
            continue
        name = f"kernels/{place[0]}:{place[1]} {what}"
        if why is not None:
            counts["kept"] += 1
            print(f"kept    {name}: {why}")
        elif place in missed:
            counts["missed"] += 1
            print(f"missed  {name}: {missed[place][:160]}")
        elif place in tried:
            wrong.append(f"{name}: nothing missed it in the {tried[place]} launches that it was left out of")
        else:
            wrong.append(f"{name}: no launch came to it")
    for text in wrong:
        print(f"NOT     {text}")
    print(f"{counts['missed']} barriers are missed, {counts['kept']} are kept for another reason, {len(wrong)} are not missed")
    if wrong:
        sys.exit("check_barriers: take these barriers away, or add a test that needs them")


def run(options, tests, kernels):
    emulator = subprocess.run([ROOT / "tools" / "build_cuda_emulator.sh"], check=True, stdout=subprocess.PIPE, text=True)
    file = ROOT / "target" / "barriers"
    begin(file)
    environment = dict(os.environ, TRINE_REQUIRE_CUDA="1", TRINE_EMULATOR_BARRIERS=str(file))
    path = [emulator.stdout.strip(), environment.get("LD_LIBRARY_PATH", "")]
    environment["LD_LIBRARY_PATH"] = ":".join(filter(None, path))
    command = ["cargo", "test", "--test", "cuda", *options, "--", *tests]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    end(file, kernels)


match sys.argv[1:]:
    case ["begin", file]:
        begin(file)
    case ["end", file]:
        end(file)
    case ["run", *options]:
        run(options, [], None)
    case ["quick", *options]:
        run(options, QUICK["tests"], QUICK["kernels"])
    case _:
        sys.exit(__doc__)
