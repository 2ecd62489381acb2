#!/usr/bin/env python3
"""Make tests/fixtures: small random checkpoints and what transformers computes from them.

    python tools/make_fixtures.py [--out tests/fixtures] [--only NAME ...] [--check]

For each fixture: write the checkpoint as published ones are written, load the folder back with
transformers in f32, search the prompts, write reference.json. Then check the result with a second forward
pass written independently (float64, numpy), and plant faults in that one: every fault must fail a strict case.
`--check` skips the making and only runs both checks on what is there. The packages are those of
tools/requirements.txt. Same machine, same files, byte for byte; another CPU may move the last digits.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import fixtures  # before torch: it sets how torch runs
import tokenizers
import torch
import transformers
from fixtures import checks, config_styles, tokenizer
from fixtures.checkpoint import rename_as_published, write_checkpoint
from fixtures.oracle import Oracle
from fixtures.reference import embeddings, make_cases, multipliers
from fixtures.specs import SPECS, Spec

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    args = parse_args()
    specs = [spec for spec in SPECS if not args.only or spec.name in args.only]
    if not args.check:
        for spec in specs:
            started = time.monotonic()
            make(spec, args.out / spec.name)
            print(f"made {spec.name} in {time.monotonic() - started:.0f} s", flush=True)
    folders = [args.out / spec.name for spec in specs]
    checks.check_agreement(folders)
    table, missed = checks.plant_faults(folders)
    print(table)
    if args.only:
        print("not caught by these fixtures alone:", ", ".join(missed) or "none")
        return
    (args.out / "faults.md").write_text(table)
    if missed:
        raise SystemExit(f"faults that no strict case catches: {', '.join(missed)}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [spec.name for spec in SPECS]
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "fixtures", help="where the folders go")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="some of: " + ", ".join(names))
    parser.add_argument("--check", action="store_true", help="make nothing, check what is there")
    return parser.parse_args()


def make(spec: Spec, folder: Path) -> None:
    # transformers has no class for these forms: it computes the reference from the same tensors under its own
    # names, and the folder is rewritten afterwards.
    foreign = spec.config_style in config_styles.FOREIGN
    write_checkpoint(dataclasses.replace(spec, config_style="as_written") if foreign else spec, folder)
    oracle = Oracle(folder)
    reference = {
        "about": spec.about,
        "made_with": {
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "multipliers": multipliers(oracle),
        "cases": make_cases(spec, oracle, folder),
    }
    if spec.tokenizer:
        tokenizer.write_tokenizer(folder, spec.vocab, spec.tokenizer)
        reference["tokenizer"] = tokenizer.tokenizer_cases(folder)
        if spec.tokenizer in tokenizer.EMBEDDING:
            wide = Oracle(folder, torch.float64)
            reference["embeddings"] = embeddings(oracle, wide, tokenizer.embedding_texts(folder))
    if foreign:
        rename_as_published(folder, spec.config_style)
        getattr(config_styles, spec.config_style)(folder / "config.json")
    (folder / "reference.json").write_text(compact_json(reference))


def compact_json(reference: dict) -> str:
    """One line per case: compact, and a change shows in a diff as the case it belongs to."""
    dump = lambda value: json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    cases = ",\n".join(dump(case) for case in reference["cases"])
    parts = [f'"{key}":{dump(value)}' for key, value in reference.items() if key != "cases"]
    return "{" + ",\n".join(parts) + f',\n"cases":[\n{cases}\n]}}\n'


if __name__ == "__main__":
    main()
