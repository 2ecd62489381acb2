#!/usr/bin/env python3
"""Compiles kernels/*.cu into kernels/prebuilt/, with a pinned NVRTC and no GPU.

    tools/build_kernels.py            writes PTX for compute_80, cubins for sm_80 and sm_90a, and the budget
    tools/build_kernels.py --check    fails where what it would write differs from what is there

The budget (kernels/prebuilt/budget.json) has what ptxas says of each kernel: registers, static
shared memory, stack, spills. A kernel that spills, or that needs more than its budget, fails the
check; one that spills fails without it too.

The compiler comes from two wheels of PyPI, installed into target/; --wheels says where they lie, if
they are not to be downloaded. The same source gives the same bytes in any directory.
"""

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
PREBUILT = KERNELS / "prebuilt"
VENV = ROOT / "target" / "kernels-venv"
WHEELS = ["nvidia-cuda-nvrtc-cu12==12.4.127", "nvidia-cuda-nvcc-cu12==12.4.131"]

# No contraction: a fused multiply-add is where a kernel writes one.
OPTIONS = ["--std=c++17", "--fmad=false"]
# The PTX of the first is kept too, for the driver to compile.
ARCHITECTURES = ["sm_80", "sm_90a"]
BUDGET = PREBUILT / "budget.json"
FIELDS = ["registers", "shared", "stack", "spills"]


def fail(message):
    sys.exit(f"build_kernels: {message}")


def installed(wheels):
    """The folder of the compilers, which it installs first if it must."""

    def found():
        return next(VENV.glob("lib/python*/site-packages/nvidia"), None)

    stamp = VENV / "wheels"
    if not stamp.is_file() or stamp.read_text() != "\n".join(WHEELS):
        venv.create(VENV, with_pip=True, clear=True)
        pip = [VENV / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
        if wheels:
            pip += ["--no-index", "--find-links", wheels]
        subprocess.run([*pip, *WHEELS], check=True, stdout=sys.stderr)
        stamp.write_text("\n".join(WHEELS))
    folder = found()
    # Wheels lose the mark.
    ptxas = folder / "cuda_nvcc" / "bin" / "ptxas"
    if not os.access(ptxas, os.X_OK):
        ptxas.chmod(0o755)
    return folder


class Nvrtc:
    def __init__(self, folder):
        lib = folder / "cuda_nvrtc" / "lib"
        # The builtins are looked up by name when the first program is compiled.
        ctypes.CDLL(str(next(lib.glob("libnvrtc-builtins.so.*"))), ctypes.RTLD_GLOBAL)
        self.lib = ctypes.CDLL(str(next(lib.glob("libnvrtc.so.*"))))
        self.lib.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(self, name, *args):
        result = getattr(self.lib, name)(*args)
        if result:
            raise RuntimeError(f"{name}: {self.lib.nvrtcGetErrorString(result).decode()}")

    def text(self, program, what):
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, data)
        return data.raw

    def compile(self, name, source, headers, architecture):
        """The PTX of a source. No path goes in: names are those of the files alone."""
        program = ctypes.c_void_p()
        names = (ctypes.c_char_p * len(headers))(*[n.encode() for n in headers])
        texts = (ctypes.c_char_p * len(headers))(*headers.values())
        self.call(
            "nvrtcCreateProgram", ctypes.byref(program), source, name.encode(), len(headers), texts, names
        )
        options = [f"--gpu-architecture={architecture}", *OPTIONS]
        try:
            self.call(
                "nvrtcCompileProgram",
                program,
                len(options),
                (ctypes.c_char_p * len(options))(*[o.encode() for o in options]),
            )
        except RuntimeError as error:
            log = self.text(program, "ProgramLog").rstrip(b"\0").decode()
            fail(f"{name} for {architecture}: {error}\n{log}")
        log = self.text(program, "ProgramLog").rstrip(b"\0").decode().strip()
        if log:
            print(log, file=sys.stderr)
        return self.text(program, "PTX").rstrip(b"\0")


def assemble(ptxas, ptx, architecture):
    """The machine code of some PTX, and what ptxas says of each of its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        # Names without a folder, since the machine code may hold them.
        (Path(folder) / "kernel.ptx").write_bytes(ptx)
        done = subprocess.run(
            [ptxas, "-v", f"--gpu-name={architecture}", "--output-file", "kernel.cubin", "kernel.ptx"],
            capture_output=True,
            text=True,
            cwd=folder,
        )
        if done.returncode:
            fail(f"ptxas for {architecture}: {done.stderr}")
        cubin = (Path(folder) / "kernel.cubin").read_bytes()
    kernels, name = {}, None
    for line in done.stderr.splitlines():
        if match := re.search(r"Function properties for (\w+)", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, match.groups())
            kernels.setdefault(name, {}).update(stack=stack, spills=stores + loads)
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            kernels.setdefault(name, {}).update(
                registers=int(match[1]), shared=int(shared[1]) if shared else 0
            )
    for kernel, found in kernels.items():
        if set(found) != set(FIELDS):
            fail(f"ptxas says of {kernel} only {found}: {done.stderr}")
    return cubin, {k: {f: kernels[k][f] for f in FIELDS} for k in sorted(kernels)}


def build(nvrtc, folder, source):
    """Outputs of one file by name, and its kernels' usage by architecture."""
    headers = {h.name: h.read_bytes() for h in sorted(KERNELS.glob("*.cuh"))}
    outputs, used = {}, {}
    ptxas = folder / "cuda_nvcc" / "bin" / "ptxas"
    for architecture in ARCHITECTURES:
        virtual = architecture.replace("sm_", "compute_")
        ptx = nvrtc.compile(source.name, source.read_bytes(), headers, virtual)
        if architecture == ARCHITECTURES[0]:
            outputs[f"{source.stem}.ptx"] = ptx
        cubin, used[architecture] = assemble(ptxas, ptx, architecture)
        outputs[f"{source.stem}.{architecture}.cubin"] = cubin
    return outputs, used


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--wheels", metavar="DIR", help="where the wheels lie (default: they are downloaded)")
    parser.add_argument("--output", metavar="DIR", type=Path, default=PREBUILT, help="instead of kernels/prebuilt")
    parser.add_argument("files", nargs="*", type=Path, help="only these .cu files; the budget keeps the rest")
    args = parser.parse_args()
    if args.check and args.files:
        parser.error("--check looks at all files")

    sources = sorted(KERNELS.glob("*.cu"))
    if args.files:
        wanted = {f.stem for f in args.files}
        if missing := wanted - {s.stem for s in sources}:
            fail(f"no kernels/{sorted(missing)[0]}.cu")
        sources = [s for s in sources if s.stem in wanted]
    folder = installed(args.wheels)
    nvrtc = Nvrtc(folder)
    with ThreadPoolExecutor(2) as pool:
        built = list(pool.map(lambda source: build(nvrtc, folder, source), sources))

    budget_path = args.output / BUDGET.name
    old_budget = json.loads(budget_path.read_text()) if budget_path.is_file() else {}
    budget, outputs = {}, {}
    for source, (files, used) in zip(sources, built):
        outputs.update(files)
        budget[source.stem] = used

    problems = []
    for file, architectures in budget.items():
        for architecture, kernels in architectures.items():
            for kernel, used in kernels.items():
                name = f"{kernel} ({architecture})"
                print(f"{name:56} " + ", ".join(f"{used[f]} {f}" for f in FIELDS), file=sys.stderr)
                if used["spills"]:
                    problems.append(f"{name} spills {used['spills']} bytes")
                allowed = old_budget.get(file, {}).get(architecture, {}).get(kernel)
                if args.check and allowed is None:
                    problems.append(f"{name} has no budget")
                for field in FIELDS if args.check and allowed else []:
                    if used[field] > allowed[field]:
                        problems.append(f"{name} needs {used[field]} {field}, the budget is {allowed[field]}")

    if args.check:
        there = {p.name for p in args.output.glob("*") if p.suffix in (".ptx", ".cubin")}
        problems += [f"kernels/prebuilt/{name} belongs to no kernel" for name in sorted(there - set(outputs))]
        for name, data in outputs.items():
            path = args.output / name
            if not path.is_file():
                problems.append(f"kernels/prebuilt/{name} is missing")
            elif path.read_bytes() != data:
                problems.append(f"kernels/prebuilt/{name} differs from what its source gives")
        if problems:
            problems.append("run tools/build_kernels.py and commit what it writes")
    else:
        args.output.mkdir(parents=True, exist_ok=True)
        if args.files:
            budget = {**old_budget, **budget}
        else:
            for path in args.output.glob("*"):
                if path.suffix in (".ptx", ".cubin") and path.name not in outputs:
                    path.unlink()
        for name, data in outputs.items():
            (args.output / name).write_bytes(data)
        budget_path.write_text(json.dumps(budget, indent=1, sort_keys=True) + "\n")
    if problems:
        fail("\n  ".join(["", *problems]).strip())


if __name__ == "__main__":
    main()
