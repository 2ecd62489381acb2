#!/usr/bin/env python3
"""Load what `trine convert --type hf` writes in transformers, and compare it with what went in.

    pip install -r tools/requirements.txt
    python tools/check_converted_hf.py --trine target/release/trine

Takes the demo model and every fixture that transformers has a class for through the conversion, and runs
both in f32. Logits must be equal bit for bit where the checkpoint says the same thing in the same way. Where
the form changes (master weights, and scales that divide, become codes with a scale that multiplies: another
order of roundings), an int8 activation can round the other way, so there the rms difference may be 6 % of
their standard deviation, as between devices (docs/numerics.md). Token ids and chats must be equal.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch
import transformers
from fixtures.oracle import load
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
# Classes whose published checkpoints transformers does not read as they are: the folder written from one it does.
PUBLISHED = ["Qwen3Model", "Gemma3TextModel"]
TEXTS = ["Shall I compare thee to a summer's day?", "  two\n\nlines\t", "naïve 12345 🙂 שלום", "<|eot_id|>"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trine", type=Path, default=ROOT / "target/release/trine")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    fixtures = sorted(path.parent for path in (ROOT / "tests/fixtures").glob("*/config.json"))
    checked = 0
    for source in [ROOT / "models/demo", *fixtures]:
        config = json.loads((source / "config.json").read_text())
        # 1bitLLM's class is in its own repository; Trine writes it as transformers' own.
        own = config["architectures"][0] in ("BitNetForCausalLM", "LlamaForCausalLM")
        if not own and config["architectures"][0] not in PUBLISHED:
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            subprocess.run([args.trine.resolve(), "convert", source, out, "--type", "hf"], check=True, capture_output=True)
            words = compare(source, out, config) if own else compare_reference(source, out)
            print(f"{source.name}: {words}", flush=True)
            checked += 1
    assert checked >= 8, checked


def compare_reference(source: Path, out: Path) -> str:
    """The strict cases of a fixture, which transformers computed from the same tensors under its own names."""
    model = load(out, torch.float32)
    cases = [case for case in json.loads((source / "reference.json").read_text())["cases"] if case["kind"] == "strict"]
    worst = 0.0
    for case in cases:
        with torch.no_grad():
            logits = model(torch.tensor([case["ids"]])).logits[0, -1]
        worst = max(worst, (logits - torch.tensor(case["logits"])).abs().max().item())
    assert cases and worst < 2e-3, f"{source}: {worst}"
    return f"{len(cases)} cases, logits within {worst:.1e}"


def compare(source: Path, out: Path, config: dict) -> str:
    torch.manual_seed(0)
    ids = torch.randint(0, config["vocab_size"], (2, 24))
    with torch.no_grad():
        before, after = (load(folder, torch.float32)(ids).logits for folder in (source, out))
    quantization = config["quantization_config"]
    same = quantization.get("linear_class") == "autobitlinear" and quantization.get("quantization_mode") != "online"
    error = ((before - after).square().mean().sqrt() / before.std()).item()
    assert error <= (0 if same else 0.06), f"{source}: {error}"
    words = "logits equal" if error == 0 else f"logits differ by {error:.1e} of their deviation"
    if (source / "tokenizer.json").exists():
        old, new = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(out)
        assert [old(text).input_ids for text in TEXTS] == [new(text).input_ids for text in TEXTS]
        chat = [{"role": "user", "content": "hi"}]
        assert old.apply_chat_template(chat, tokenize=False) == new.apply_chat_template(chat, tokenize=False)
        words += ", token ids equal"
    return words


if __name__ == "__main__":
    main()
