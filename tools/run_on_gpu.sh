#!/usr/bin/env bash
# Correctness and speed on a machine that has a GPU and neither Rust nor a network.
#
#   tools/run_on_gpu.sh build FOLDER                    where Rust is: builds what `run` needs
#   tools/run_on_gpu.sh run FOLDER RESULTS [PART...]    where the GPU is, in a copy of this repository:
#                                                       writes RESULTS/*.json, *.jsonl and *.log
#
# Parts, all of them if none is named; each stays below ten minutes on an H100-class GPU:
#   tests       `trine devices --test`, the test binaries
#   sanitizer   compute-sanitizer on the op tests (CUDA); memcheck and racecheck are its halves
#   bench       each op; decode steps of 1 to 256 sequences, prompts; `trine bench`
#   soak        logits alone and among 1 to 256 others; 10,000 decode steps and what memory does
#   peers       PyTorch on the same GPU (tools/bench_gpu_peers.py)
# A part that fails does not stop the others; what failed is said at the end, and in RESULTS/summary.json.
#
# Environment of `run`:
#   DEVICE   the device: cuda:0 where there is an NVIDIA driver, else wgpu:0
#   W2A8     libbitnet.so of microsoft/BitNet's folder gpu, for the part peers
#   SOAK     decode steps of the part soak (10000)
set -uo pipefail
cd "$(dirname "$0")/.."

# The tests of every backend, those of CUDA and of wgpu, and the modules of `cuda` that test single ops.
GENERIC=(ops checked seam ragged)
CUDA=(cuda cuda_faults)
CUDA_OPS=(attention head matmul sample screen)
WGPU=(wgpu wgpu_model wgpu_pieces wgpu_faults)
PARTS=(tests sanitizer bench soak peers)
HALVES=(memcheck racecheck)

build() (
    set -e
    local folder=$1
    mkdir -p "$folder"
    TRINE_COMMIT=$(git rev-parse --short=10 HEAD)
    export TRINE_COMMIT
    echo "$TRINE_COMMIT" > "$folder/commit"
    # Tests look for their files below the folder that they were built in.
    pwd > "$folder/built_in"
    local targets=(--bin trine --bench cuda --bench steps --bench wgpu)
    for test in "${GENERIC[@]}" "${CUDA[@]}" "${WGPU[@]}"; do targets+=(--test "$test"); done
    # The path of each executable is in cargo's messages.
    cargo build --release "${targets[@]}" --message-format=json |
        python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable"):
        print(message["target"]["name"], message["target"]["kind"][0], message["executable"])
' | while read -r name kind executable; do
        [ "$kind" = bench ] && name="bench_$name"
        cp "$executable" "$folder/$name"
        strip "$folder/$name"
    done
    ls -l "$folder"
)

# One step of a part: `try NAME SECONDS OUTPUT COMMAND...` sends standard output to RESULTS/OUTPUT
# and the rest to RESULTS/NAME.log.
try() {
    local name=$1 limit=$2 output=$3 started=$SECONDS rc=0
    shift 3
    timeout -k 10 "$limit" "$@" > "$results/$output" 2> "$results/$name.log" || rc=$?
    local verdict=ok
    [ "$rc" = 0 ] || verdict=FAILED
    [ "$rc" = 124 ] && verdict="FAILED (took more than $limit s)"
    printf '%-32s %s (%s s)\n' "$name" "$verdict" "$((SECONDS - started))"
    printf '{"name": "%s", "ok": %s, "rc": %s, "seconds": %s}\n' \
        "$name" "$([ "$rc" = 0 ] && echo true || echo false)" "$rc" "$((SECONDS - started))" >> "$results/summary.jsonl"
    return 0
}

# What this machine does not have is not a failure, and said.
skip() {
    printf '%-32s not run: %s\n' "$1" "$2"
    printf '{"name": "%s", "ok": null, "reason": "%s"}\n' "$1" "$2" >> "$results/summary.jsonl"
}

is_cuda() { [[ $device == cuda* ]]; }

machine() {
    date -u +%Y-%m-%dT%H:%M:%SZ
    echo "commit $(cat "$folder/commit")"
    uname -srm
    nvidia-smi --query-gpu=name,uuid,driver_version,vbios_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,mig.mode.current,ecc.mode.current --format=csv || true
    nvidia-smi || true
}

part_tests() {
    try devices 60 devices.json "$folder/trine" devices --json
    try devices-test 200 devices-test.txt "$folder/trine" devices --test
    local tests=("${GENERIC[@]}")
    if is_cuda; then tests+=("${CUDA[@]}"); else tests+=("${WGPU[@]}"); fi
    for test in "${tests[@]}"; do
        # A test that finds no GPU fails.
        if is_cuda; then
            try "test-$test" 300 "test-$test.txt" env TRINE_REQUIRE_CUDA=1 "$folder/$test" --test-threads=4
        else
            try "test-$test" 300 "test-$test.txt" env TRINE_REQUIRE_ADAPTERS=1 "$folder/$test" --test-threads=4
        fi
    done
}

part_sanitizer() {
    part_memcheck
    part_racecheck
}
part_memcheck() { sanitize memcheck --leak-check no; }
part_racecheck() { sanitize racecheck; }

# A tool of compute-sanitizer with its options.
sanitize() {
    local tool=$1
    if ! is_cuda; then
        skip "$tool" "$device is not a CUDA device"
        return
    fi
    local sanitizer
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2> /dev/null | head -n 1)
    if [ -z "$sanitizer" ]; then
        skip "$tool" "compute-sanitizer is not on this machine"
        return
    fi
    local options=(--tool "$@" --error-exitcode 86 --print-limit 20)
    # Every op at small shapes, as graphs.
    try "$tool-bench" 60 "$tool-bench.txt" "$sanitizer" "${options[@]}" \
        "$folder/bench_cuda" --device "$device" --quick --repetitions 1
    # Tests of single ops; the tool makes kernels some ten to a hundred times slower.
    for op in "${CUDA_OPS[@]}"; do
        try "$tool-$op" 100 "$tool-$op.txt" env TRINE_REQUIRE_CUDA=1 \
            "$sanitizer" "${options[@]}" "$folder/cuda" --test-threads=1 "$op::"
    done
}

part_bench() {
    if is_cuda; then
        try bench-ops 120 bench-ops.jsonl "$folder/bench_cuda" --device "$device" --json
    else
        try bench-ops 120 bench-ops.jsonl "$folder/bench_wgpu" --device "$device" --json
    fi
    try bench-steps 180 bench-steps.jsonl "$folder/bench_steps" --device "$device"
    try bench-steps-1k 80 bench-steps-1k.jsonl "$folder/bench_steps" --device "$device" --context 1024 \
        --batches 1,8,64 --prompts ,
    if is_cuda; then
        for head in screened int8; do
            try "bench-steps-$head" 60 "bench-steps-$head.jsonl" "$folder/bench_steps" --device "$device" \
                --head "$head" --batches 1,4,8 --prompts ,
        done
    fi
    try bench-2b4t 90 bench-2b4t.json "$folder/trine" bench --synthetic 2b4t --device "$device" \
        -p 512,2048 -n 128 -r 5 -o json
    try bench-2b4t-deep 90 bench-2b4t-deep.json "$folder/trine" bench --synthetic 2b4t --device "$device" \
        -p 0 -n 64 -d 128,1024,3968 -r 3 -o json
}

part_soak() {
    try invariance 280 invariance.jsonl "$folder/bench_steps" --device "$device" --invariance
    try soak 280 soak.jsonl "$folder/bench_steps" --device "$device" --soak "${SOAK:-10000}"
}

part_peers() {
    if ! is_cuda; then
        skip peers "$device is not a CUDA device"
    elif ! python3 -c 'import torch' 2> /dev/null; then
        skip peers "PyTorch is not on this machine"
    else
        local more=()
        [ -n "${W2A8:-}" ] && more=(--w2a8 "$W2A8")
        try peers 570 peers.jsonl python3 tools/bench_gpu_peers.py ${more[@]+"${more[@]}"}
    fi
}

# Makes the tests find their files where they were built in another folder than this one.
at_home() {
    local home
    home=$(cat "$folder/built_in" 2> /dev/null) || return 0
    if [ -n "$home" ] && [ ! -e "$home" ]; then
        mkdir -p "$(dirname "$home")" && ln -s "$PWD" "$home" ||
            echo "tests of whole models will not find their files: no link at the folder they were built in"
    fi
}

run() {
    local folder results device
    folder=$(realpath "$1")
    mkdir -p "$2"
    results=$(realpath "$2")
    shift 2
    for part in "$@"; do
        if [[ " ${PARTS[*]} ${HALVES[*]} " != *" $part "* ]]; then
            echo "there is no part $part; there are ${PARTS[*]}" >&2
            exit 2
        fi
    done
    device=${DEVICE:-}
    if [ -z "$device" ]; then
        device=wgpu:0
        # libcuda comes with the driver, and so does nvidia-smi.
        if ldconfig -p 2> /dev/null | grep -q 'libcuda\.so\.1' || command -v nvidia-smi > /dev/null; then device=cuda:0; fi
    fi
    echo "device $device, commit $(cat "$folder/commit")"
    at_home
    touch "$results/summary.jsonl"
    [ $# -gt 0 ] || set -- "${PARTS[@]}"
    local before
    before=$(wc -l < "$results/summary.jsonl")
    machine > "$results/machine.log" 2>&1
    for part in "$@"; do "part_$part"; done
    # All calls so far, as one document.
    python3 - "$results/summary.jsonl" "$results/summary.json" <<'PYTHON' || true
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
json.dump(list({line["name"]: line for line in lines}.values()), open(sys.argv[2], "w"), indent=1)
PYTHON
    local failed
    failed=$(tail -n +"$((before + 1))" "$results/summary.jsonl" | grep '"ok": false' | cut -d '"' -f 4)
    if [ -n "$failed" ]; then
        printf 'FAILED: %s\n' "$(echo "$failed" | tr '\n' ' ')"
        return 1
    fi
    echo "all that could be run passed"
}

case "${1:-} $#" in
    "build 2") build "$2" ;;
    run\ [3-9]) shift; run "$@" ;;
    *)
        sed -n '2,19p' "$0" >&2
        exit 2
        ;;
esac
