#!/usr/bin/env python3
"""Make the LoRA adapters of tests/fixtures, and what PEFT computes with them.

    python tools/make_lora_fixtures.py [--out tests/fixtures] [--only NAME ...]

Each folder is an adapter as PEFT saves it, for a base that is another folder of tests/fixtures, and a
reference.json as the bases have it: prompts far from rounding boundaries (tools/fixtures/clearance.py), with the
adapter, and where a fixture asks for it with a second one or after `merge_and_unload`. The packages are those of
tools/requirements.txt. Same machine, same files, byte for byte.
"""

import argparse
import dataclasses
import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import fixtures  # before torch: it sets how torch runs
import numpy as np
import peft
import torch
import transformers
from fixtures import config_styles, tokenizer
from fixtures.checkpoint import rename_as_published, write_checkpoint
from fixtures.clearance import least
from fixtures.oracle import Oracle
from fixtures.prompts import Search
from fixtures.reference import embeddings, make_case, number
from fixtures.specs import SPECS as BASES
from make_fixtures import compact_json
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
# What an adapter adds to a projection, in parts of what is there.
SHARE = 0.8


@dataclass(frozen=True)
class Spec:
    name: str
    about: str
    seed: int
    base: str
    config: dict  # of peft.LoraConfig
    dtype: torch.dtype = torch.float32
    second: str | None = None  # another adapter of the same base, for cases with both
    merged: bool = False  # cases after merge_and_unload
    embeds: bool = False  # vectors of texts
    strict: tuple[tuple[int, int], ...] = field(default=((24, 8), (8, 8)))


SPECS = [
    Spec(
        name="lora_packed",
        about="rank 32, alpha 64 on all seven projections of a packed BitNet model",
        seed=201, base="bitnet_silu", config=dict(r=32, lora_alpha=64, target_modules=ALL),
    ),
    Spec(
        name="lora_master",
        about="rank 32, alpha 64 on all seven projections of a Llama model with master weights; bf16; also merged",
        seed=202, base="llama_master_f16", config=dict(r=32, lora_alpha=64, target_modules=ALL),
        dtype=torch.bfloat16, merged=True, strict=((20, 6), (8, 8)),
    ),
    Spec(
        name="lora_patterns",
        about="three projections of ranks and alphas of their own, rank-stabilised; also together with lora_packed",
        seed=203, base="bitnet_silu", second="lora_packed",
        config=dict(
            r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True,
            rank_pattern={"v_proj": 7, "layers.0.mlp.down_proj": 1}, alpha_pattern={"down_proj": 3},
        ),
    ),
    Spec(
        name="lora_1bitllm",
        about="rank 8, alpha 16 on q, v, up and down of a model in the 1bitLLM form, which is also there as GGUF; merged",
        seed=206, base="bitnet_1bitllm",
        config=dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]),
        merged=True, strict=((16, 6), (8, 8)),
    ),
    # The adapter is beside the layer that holds the norm, and reads what that layer reads: x before the norm.
    Spec(
        name="lora_qwen3",
        about="rank 8, alpha 16 on all seven projections of an embedding model with a norm before each of them",
        seed=204, base="qwen3_embedding", config=dict(r=8, lora_alpha=16, target_modules=ALL), embeds=True,
        strict=((16, 6), (8, 6)),
    ),
    Spec(
        name="lora_gemma3",
        about="rank 8, alpha 16 on all seven projections of one with norms after attention and FFN, too; bf16",
        seed=205, base="gemma3_embedding", config=dict(r=8, lora_alpha=16, target_modules=ALL), embeds=True,
        dtype=torch.bfloat16, strict=((12, 5), (7, 6)),
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "fixtures", help="where the folders go")
    parser.add_argument("--only", nargs="+", choices=[spec.name for spec in SPECS], help="some of them")
    args = parser.parse_args()
    for spec in SPECS:
        if args.only and spec.name not in args.only:
            continue
        make(spec, args.out)
        print(f"made {spec.name}", flush=True)


def make(spec: Spec, out: Path) -> None:
    folder = out / spec.name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        bases = readable_bases(spec, out, Path(place))
        make_in(spec, out, folder, bases)


def readable_bases(spec: Spec, out: Path, place: Path) -> Path:
    """The folder that the base is in, in a form that transformers reads."""
    base = next(base for base in BASES if base.name == spec.base)
    if base.config_style not in config_styles.FOREIGN:
        return out
    write_checkpoint(dataclasses.replace(base, config_style="as_written"), place / base.name)
    # The same tensors as those of the fixture, under transformers' names.
    check = place / "renamed"
    shutil.copytree(place / base.name, check)
    rename_as_published(check, base.config_style)
    ours, fixtures = (load_file(folder / "model.safetensors") for folder in (check, out / base.name))
    assert ours.keys() == fixtures.keys()
    assert all(torch.equal(ours[name], fixtures[name]) for name in ours)
    return place


def make_in(spec: Spec, out: Path, folder: Path, bases: Path) -> None:
    write_adapter(spec, bases / spec.base, folder)
    reference = {
        "about": spec.about,
        "made_with": {
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "cases": cases(spec, bases, 1, lambda model: adapted(model, [folder])),
    }
    if spec.embeds:
        oracle, wide = (
            Oracle(bases / spec.base, dtype, lambda model: adapted(model, [folder]))
            for dtype in (torch.float32, torch.float64)
        )
        texts = tokenizer.embedding_texts(out / spec.base)
        reference["embeddings"] = embeddings(oracle, wide, texts)
    if spec.second:
        both = [folder, out / spec.second]
        reference["both"] = cases(spec, bases, 2, lambda model: adapted(model, both))
    if spec.merged:
        reference["merged"] = cases(spec, bases, 3, lambda model: merged(model, folder))
    lists = {key: value for key, value in reference.items() if isinstance(value, list)}
    text = compact_json({**{k: v for k, v in reference.items() if k not in lists}, "cases": lists.pop("cases")})
    for key, value in lists.items():
        rows = ",\n".join(json.dumps(case, separators=(",", ":")) for case in value)
        text = f'{text.removesuffix("}" + chr(10))},\n"{key}":[\n{rows}\n]}}\n'
    assert json.loads(text).keys() == reference.keys()
    (folder / "reference.json").write_text(text)


def write_adapter(spec: Spec, base: Path, folder: Path) -> None:
    """Random matrices, of such a size that every projection is changed noticeably."""
    rng = np.random.default_rng(spec.seed)
    oracle = Oracle(base)
    # The inputs and outputs of the projections, over a random prompt.
    sizes = {}
    for name, module in oracle.model.named_modules():
        if name.endswith("_proj"):
            keep = lambda _, args, output, name=name: sizes.update({name: (rms(args[0]), rms(output))})
            module.register_forward_hook(keep)
    oracle.run(torch.from_numpy(rng.integers(oracle.vocab, size=(1, 64))))
    config = peft.LoraConfig(bias="none", task_type="CAUSAL_LM", **spec.config)
    model = peft.get_peft_model(oracle.model, config)
    for name, module in model.base_model.model.named_modules():
        if not isinstance(module, peft.tuners.lora.Linear):
            continue
        down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
        (rank, width), (before, after) = down.shape, sizes[name]
        draw = lambda shape, std: torch.from_numpy(rng.normal(0.0, std, shape)).float()
        with torch.no_grad():
            down.copy_(draw(down.shape, 1.0 / (before * width**0.5)))
            up.copy_(draw(up.shape, SHARE * after / (module.scaling["default"] * rank**0.5)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(spec.dtype)
    # Where the base is, seen from the adapter.
    model.peft_config["default"].base_model_name_or_path = f"../{spec.base}"
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    # PEFT writes a set, in any order.
    written = json.loads((folder / "adapter_config.json").read_text())
    written["target_modules"].sort()
    (folder / "adapter_config.json").write_text(json.dumps(written, indent=2) + "\n")
    (folder / "adapter_model.safetensors").chmod(0o644)


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def adapted(model: torch.nn.Module, folders: list[Path]) -> torch.nn.Module:
    """The model with the adapters in it, all of them active."""
    dtype = next(model.parameters()).dtype
    wrapped = peft.PeftModel.from_pretrained(model, folders[0], adapter_name="0")
    for index, folder in enumerate(folders[1:], 1):
        wrapped.load_adapter(folder, adapter_name=str(index))
    wrapped.base_model.set_adapter([str(index) for index in range(len(folders))])
    torch.nn.Module.to(model, dtype)
    found = {tuple(m.active_adapters) for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert found == {tuple(str(index) for index in range(len(folders)))}
    return model.eval()


def merged(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """The model after PEFT has added the adapter to its master weights, which it then ternarises by absmean."""
    dtype = next(model.parameters()).dtype
    wrapped = peft.PeftModel.from_pretrained(model, folder)
    torch.nn.Module.to(model, dtype)
    return wrapped.merge_and_unload().eval()


def cases(spec: Spec, bases: Path, kind: int, wrap) -> list[dict]:
    base = bases / spec.base
    oracle, wide = (Oracle(base, dtype, wrap) for dtype in (torch.float32, torch.float64))
    plain = Oracle(base)
    result = []
    for length, steps in spec.strict:
        rng = np.random.default_rng([spec.seed, kind, length])
        prompt = Search(oracle, wide, rng).strict(length, steps)
        run = oracle.run(torch.tensor([prompt.ids + prompt.greedy[:-1]]))
        facts = {"kind": "strict", "clearance": number(least(run, False), digits=4)}
        case = make_case(oracle, f"strict-{length}", prompt, residual=False) | facts
        # The adapter matters: without it the logits are others.
        without = plain.run(torch.tensor([prompt.ids])).logits[0, -1]
        change = rms(without - torch.tensor(case["logits"])) / case["sigma"]
        print(f"{spec.name} {case['name']}: logits change by {change:.2f} of their deviation")
        assert change > 0.1
        result.append(case)
    return result


if __name__ == "__main__":
    main()
