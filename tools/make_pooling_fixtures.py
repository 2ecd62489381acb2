#!/usr/bin/env python3
"""Make tests/fixtures/pooling: what sentence-transformers writes and computes of pooling.

    python tools/make_pooling_fixtures.py [--out tests/fixtures/pooling]

Each folder holds `modules.json` and the configs of the modules that it names, as `SentenceTransformer.save` of the
installed version writes them for a model that pools in one way: `vN_MODE`, N the version's major number. They
were made by 6.2.0, which has one key for the mode, and by 3.4.1, which has one for each (this script is run
once under each). The transformer before the pooling is a tiny one, and its files are left out: the test puts those
of tests/fixtures/qwen3_embedding there.

`reference.json`, which version 6 writes, has the vectors of that model's texts: its rows after the final norm, as
transformers computes them, through the modules `Pooling` and `Normalize`. Needs tools/requirements.txt and
sentence-transformers. Same versions, same files.
"""

import argparse
import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import fixtures  # before torch: it sets how torch runs
import sentence_transformers
import torch
from fixtures import tokenizer
from fixtures.checkpoint import write_checkpoint
from fixtures.oracle import Oracle
from fixtures.reference import numbers
from fixtures.specs import SPECS
from make_fixtures import compact_json
from sentence_transformers import SentenceTransformer, models
from transformers import Qwen3Config, Qwen3Model

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
BASE = "qwen3_embedding"
MAJOR = int(sentence_transformers.__version__.split(".")[0])
# What the modules are: pooling alone, or with Normalize behind it.
SAVED = {
    "lasttoken": True, "mean": True, "cls": True, "max": True, "mean_sqrt_len_tokens": False, "weightedmean": True,
    # Several, one after the other.
    "mean+lasttoken": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FIXTURES / "pooling", help="where the folders go")
    out = parser.parse_args().out
    for mode, normalize in SAVED.items():
        save(mode, normalize, out / f"v{MAJOR}_{mode}")
    if MAJOR >= 6:
        (out / "reference.json").write_text(compact_json(reference()))


def pooling(mode: str, width: int) -> torch.nn.Module:
    if "+" not in mode:
        return models.Pooling(width, pooling_mode=mode)
    if MAJOR >= 6:
        return models.Pooling(width, pooling_mode=tuple(mode.split("+")))
    return models.Pooling(width, pooling_mode_mean_tokens=True, pooling_mode_lasttoken=True)


def save(mode: str, normalize: bool, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        plain, whole = Path(place) / "plain", Path(place) / "whole"
        config = Qwen3Config(
            vocab_size=307, hidden_size=68, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, head_dim=4,
        )
        Qwen3Model(config).save_pretrained(plain)
        tokenizer.write_tokenizer(plain, 307, "embedding")
        modules = [models.Transformer(str(plain)), pooling(mode, 68)] + [models.Normalize()] * normalize
        SentenceTransformer(modules=modules, device="cpu").save(str(whole), create_model_card=False)
        shutil.rmtree(folder, ignore_errors=True)
        for module in json.loads((whole / "modules.json").read_text()):
            print(f"{folder.name}: {module['type']} in {module['path']!r}")
            if module["path"]:
                shutil.copytree(whole / module["path"], folder / module["path"])
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(whole / "modules.json", folder)


@torch.no_grad()
def reference() -> dict:
    spec = next(spec for spec in SPECS if spec.name == BASE)
    expected = json.loads((FIXTURES / BASE / "reference.json").read_text())["embeddings"]
    cases = []
    with tempfile.TemporaryDirectory() as place:
        write_checkpoint(dataclasses.replace(spec, config_style="as_written"), Path(place))
        oracle = Oracle(Path(place))
        for case in expected:
            run = oracle.run(torch.tensor([case["ids"]]))
            rows = {"token_embeddings": run.final_hidden, "attention_mask": torch.ones(1, len(case["ids"]))}
            vectors = {}
            for mode in ("lasttoken", "mean", "cls"):
                pooled = models.Normalize()(pooling(mode, spec.hidden)(dict(rows)))
                vectors[mode] = numbers(pooled["sentence_embedding"][0])
            # Written by another hand before.
            for mode, name in (("lasttoken", "last"), ("mean", "mean")):
                assert torch.allclose(torch.tensor(vectors[mode]), torch.tensor(case[name]), atol=1e-6)
            cases.append({"text": case["text"], "ids": case["ids"]} | vectors)
    return {
        "about": f"what sentence-transformers' Pooling and Normalize make of the rows of {BASE}",
        "made_with": {
            "sentence_transformers": sentence_transformers.__version__,
            "torch": torch.__version__.split("+")[0],
        },
        "cases": cases,
    }


if __name__ == "__main__":
    main()
