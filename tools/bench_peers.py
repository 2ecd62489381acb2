#!/usr/bin/env python3
"""Time `trine bench` and llama.cpp's `llama-bench` in turn, and write what both said.

    python tools/make_peer_gguf.py --out 2b4t.gguf
    python tools/bench_peers.py --trine target/release/trine --peer path/to/llama-bench \
        --peer-model 2b4t.gguf --rounds 3 --out benches/results/cpu-NAME.json

Both run random weights of the 2B4T shape: `--synthetic 2b4t` here, TQ2_0 with a head in f16 there.
Each round runs both programs once, in turn, so that a machine that slows down slows both; the
figures to quote are the medians over the rounds and the ratio of the medians.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
from pathlib import Path


def bench(command: list[str]) -> list[dict]:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    rows = json.loads(done.stdout)
    for row in rows:
        row["model_filename"] = Path(row["model_filename"]).name
    return rows


def key(row: dict) -> str:
    test = f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}"
    return f"{test} t={row['n_threads']}"


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trine", required=True)
    parser.add_argument("--peer", required=True, help="llama-bench")
    parser.add_argument("--peer-model", required=True)
    parser.add_argument("--prompt", default="512")
    parser.add_argument("--generate", default="64")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    tests = ["-p", args.prompt, "-n", args.generate, "-t", args.threads, "-r", "1", "-o", "json"]
    ours = [args.trine, "bench", "--synthetic", "2b4t", *tests]
    theirs = [args.peer, "-m", args.peer_model, *tests]
    raw = {"trine": [], "peer": []}
    for number in range(args.rounds):
        for name, command in (("trine", ours), ("peer", theirs)):
            print(f"round {number + 1} of {args.rounds}: {name}", flush=True)
            raw[name].append(bench(command))

    speeds: dict[str, dict[str, list[float]]] = {}
    for name, rounds in raw.items():
        for row in (row for rows in rounds for row in rows):
            speeds.setdefault(key(row), {}).setdefault(name, []).append(row["avg_ts"])
    summary = {}
    for test, by_name in speeds.items():
        median = {name: statistics.median(values) for name, values in by_name.items()}
        summary[test] = {"samples": by_name, "median": median, "ratio": median["trine"] / median["peer"]}
        print(f"{test:12} trine {median['trine']:8.2f}  peer {median['peer']:8.2f}  ratio {summary[test]['ratio']:.2f}")

    commit = subprocess.run(["git", "rev-parse", "HEAD"], stdout=subprocess.PIPE, text=True).stdout.strip()
    result = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "commit": commit,
        "commands": {"trine": ["trine", *ours[1:]], "peer": ["llama-bench", "-m", Path(args.peer_model).name, *tests]},
        "summary": summary,
        "raw": raw,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
