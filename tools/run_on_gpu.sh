#!/usr/bin/env bash
# Correctness and speed on a machine that has a GPU and no Rust.
#
#   tools/run_on_gpu.sh build FOLDER             where Rust is: builds what `run` needs into FOLDER
#   tools/run_on_gpu.sh run FOLDER RESULTS       where the GPU is, in a copy of this repository:
#                                                writes RESULTS/*.json and RESULTS/*.log
#
# Environment of `run`: DEVICE, the device to test (default wgpu:0).
set -euo pipefail
cd "$(dirname "$0")/.."

TESTS=(ops checked seam ragged wgpu_attention wgpu_sample wgpu_fuse wgpu_model wgpu_pieces wgpu_faults)

build() {
    local folder=$1
    mkdir -p "$folder"
    TRINE_COMMIT=$(git rev-parse --short=10 HEAD)
    export TRINE_COMMIT
    echo "$TRINE_COMMIT" > "$folder/commit"
    local targets=(--bin trine --bench wgpu)
    for test in "${TESTS[@]}"; do targets+=(--test "$test"); done
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
}

run() {
    local folder results device failed=0
    folder=$(realpath "$1")
    mkdir -p "$2"
    results=$(realpath "$2")
    device=${DEVICE:-wgpu:0}
    # A test that finds no GPU fails.
    export TRINE_REQUIRE_ADAPTERS=1
    {
        date -u +%Y-%m-%dT%H:%M:%SZ
        cat "$folder/commit"
        nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.draw --format=csv || true
        uname -srm
    } > "$results/machine.log" 2>&1
    "$folder/trine" devices --json > "$results/devices.json" 2> "$results/devices.log" || failed=1
    "$folder/trine" devices --test > "$results/devices-test.log" 2>&1 || failed=1
    for test in "${TESTS[@]}"; do
        if timeout 300 "$folder/$test" --test-threads=4 > "$results/test-$test.log" 2>&1; then
            echo "ok     $test"
        else
            echo "FAILED $test"
            failed=1
        fi
    done | tee "$results/tests.log"
    grep -q FAILED "$results/tests.log" && failed=1
    "$folder/trine" bench --synthetic 2b4t --device "$device" -p 512 -n 128 -r 5 -o json \
        > "$results/bench-2b4t.json" 2> "$results/bench-2b4t.log" || failed=1
    "$folder/trine" bench --synthetic 2b4t --device "$device" -p 2048 -n 64 -d 0,1024,3968 -r 3 -o json \
        > "$results/bench-2b4t-deep.json" 2> "$results/bench-2b4t-deep.log" || failed=1
    "$folder/bench_wgpu" --device "$device" --json \
        > "$results/bench-ops.jsonl" 2> "$results/bench-ops.log" || failed=1
    return "$failed"
}

case "${1:-} $#" in
    "build 2") build "$2" ;;
    "run 3") run "$2" "$3" ;;
    *)
        sed -n '2,9p' "$0" >&2
        exit 2
        ;;
esac
