#!/usr/bin/env python3
"""Run every command of a README as it is written there.

Each line of each ```sh block is run by `bash -eu` in the folder of the README, block by block; a
line that fails or takes more than ten minutes fails the whole. Standard input is empty.

    python3 tools/run_readme.py README.md [--done COMMAND]

`--done` names a command of the README that has run already and is passed by; one that the README
does not have is an error.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

LIMIT_SECONDS = 600


def commands(markdown: str) -> list[str]:
    """The commands of the ```sh blocks; lines that end in a backslash go on."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", markdown, re.M | re.S):
        joined = block.replace("\\\n", " ")
        found += [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Run every command of a README.")
    parser.add_argument("readme", type=Path)
    parser.add_argument("--done", action="append", default=[], metavar="COMMAND")
    args = parser.parse_args()
    readme = args.readme
    todo = commands(readme.read_text())
    if not todo:
        print(f"{readme}: no ```sh block found, expected the commands that users are told to run")
        return 1
    for done in args.done:
        if done not in todo:
            print(f"{readme}: it does not have the command {done!r} that --done names")
            return 1
    for command in todo:
        print(f"$ {command}", flush=True)
        if command in args.done:
            print("  (has run)")
            continue
        started = time.monotonic()
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=readme.resolve().parent,
            stdin=subprocess.DEVNULL,
            timeout=LIMIT_SECONDS,
            stdout=subprocess.PIPE,
            text=True,
        )
        lines = done.stdout.splitlines()
        print("\n".join(lines[:12] + (["…"] if len(lines) > 12 else [])))
        print(f"  ({time.monotonic() - started:.1f} s)", flush=True)
        if done.returncode != 0:
            print(f"README command failed with status {done.returncode}: {command}")
            return 1
    print(f"{len(todo)} commands of {readme} ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
