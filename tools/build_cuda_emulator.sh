#!/usr/bin/env bash
# Builds the CUDA emulator, a libcuda.so.1 that runs the kernels on the CPU, and prints its folder.
#
#   tools/build_cuda_emulator.sh           what has changed is compiled, with two jobs
#   tools/build_cuda_emulator.sh --test    and its own tests are run
#   ... --checked                          one that finds races of a block's threads, and is far slower
#
# A program that loads the CUDA driver finds it through LD_LIBRARY_PATH. Needs g++ and make.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=$PWD/target/cuda_emulator
checked=
test=
for argument in "$@"; do
    case $argument in
        --checked) checked=1 out=$PWD/target/cuda_emulator_checked ;;
        --test) test=test ;;
        *) echo "unknown argument: $argument" >&2; exit 2 ;;
    esac
done
mkdir -p "$out"
# Instructions that the emulator's own machine has; the bits are the same with and without.
machine=
flags=$(grep -m 1 '^flags' /proc/cpuinfo 2> /dev/null || true)
if [[ $flags == *" avx2 "* && $flags == *" fma "* ]]; then machine="-mavx2 -mfma"; fi

make --silent --directory tests/cuda_emulator --jobs 2 OUT="$out" MACHINE="$machine" ${checked:+CHECKED=1} all $test >&2
printf '%s\n' "$out"
