"""Writes tests/gguf_tokenizer/: GGUF files that hold a tokenizer, one with a small random model, and the ids that others' libraries give.

Run: python tools/make_gguf_tokenizer_fixtures.py [--check] (needs gguf 0.19, tokenizers 0.23, sentencepiece 0.2, transformers 5)

The vocabularies are trained here, by `tokenizers` and by SentencePiece. The files are written with the `gguf` package, each in
the way of one converter (the functions say which). The ids are those of the Hugging Face tokenizer that the file was made from,
for some ten thousand lines which this script and tests/text/gguf.rs make by the same recipe (`Lines`); `ids.bin` holds 16 bits of a hash
of the ids of each line, and `expected.json` 64 bits over all lines, what some lines are in full, and the special tokens.
"""

import io
import json
import pathlib
import shutil
import struct
import sys
import tempfile
from types import SimpleNamespace

import gguf
import numpy
import sentencepiece
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import GemmaConverter, LlamaConverter
from transformers.tokenization_utils_base import generate_merges

ROOT = pathlib.Path(__file__).resolve().parent.parent
HERE = ROOT / "tests" / "gguf_tokenizer"
SEEDS = json.loads((ROOT / "tests" / "text" / "tokenizer_golden.json").read_text(encoding="utf-8"))["lines"]

# ------------------------------------------------------------------------------------------ lines

COUNT = 10240
MASK = (1 << 64) - 1
JOINERS = ["", "", " ", " ", " ", "  ", "\n", "\t", "\r\n", ", ", "'", "-"]
RUNS = [" ", "\n", "\t", "\r", "=", "-", "*", "a", "0", "9", ".", "'", "\u00a0", "\u3000", "▁", "Ġ", "😀", "é", "的", "\u0301", "#", "ab", "\r\n", "  \n"]
MARKS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<unk>", "<bos>",
         "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>", "<0x0A>", "<0xE5>", "<table>", "[PAD7]", "<|tool|>", "[INST]"]
RANGES = [(0, 0x7F), (0x80, 0x24F), (0x250, 0x6FF), (0x700, 0x1FFF), (0x2000, 0x2BFF), (0x3000, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xFFFF),
          (0x10000, 0x1F9FF), (0xE0000, 0xE01FF)]


class Lines:
    """The recipe. Its twin is in tests/text/gguf.rs; the hash in expected.json proves that they agree."""

    def __init__(self):
        self.state = 0x7E1E

    def next(self, below):
        """splitmix64, the upper half, modulo `below`."""
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return ((z ^ (z >> 31)) >> 32) % below

    def piece(self):
        kind = self.next(16)
        if kind < 9:
            seed = SEEDS[self.next(len(SEEDS))]
            start = self.next(len(seed) + 1)
            return seed[start : start + 1 + self.next(24)]
        if kind < 11:
            low, high = RANGES[self.next(len(RANGES))]
            points = [low + self.next(high - low + 1) for _ in range(1 + self.next(6))]
            return "".join(chr(point) for point in points if not 0xD800 <= point <= 0xDFFF)
        if kind < 13:
            return RUNS[self.next(len(RUNS))] * (1 + self.next(40))
        if kind < 15:
            return "".join(str(self.next(1000)) for _ in range(1 + self.next(4)))
        return MARKS[self.next(len(MARKS))]

    def line(self):
        text = ""
        for _ in range(1 + self.next(6)):
            text += self.piece() + JOINERS[self.next(len(JOINERS))]
        if self.next(8) == 0:
            data = bytearray(text.encode())
            for _ in range(1 + self.next(3)):
                if data:
                    at = self.next(len(data))
                    if self.next(2):
                        data[at] = self.next(256)
                    else:
                        del data[at]
            text = data.decode(errors="replace")
        return text


def all_lines():
    recipe = Lines()
    return SEEDS + [recipe.line() for _ in range(COUNT)]


def fold(values, start=0xCBF29CE484222325):
    """FNV-1a over words instead of bytes."""
    for value in values:
        start = ((start ^ value) * 0x100000001B3) & MASK
    return start


# ---------------------------------------------------------------------------------------- training

# The splits of Llama 3 and of Qwen 2, as their tokenizer.json has them.
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def corpus():
    shakespeare = (ROOT / "tools" / "data" / "tinyshakespeare.txt").read_text(encoding="utf-8")[:60_000].splitlines()
    return [line for line in SEEDS if line.strip()] * 4 + shakespeare + [" " * n + "x = {}" for n in range(1, 20)] * 4


def byte_level(split, specials, added=(), size=1500, bos=None, normalizer=None, ignore_merges=False):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return tokenizer


def regex(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def sentencepieces(**options):
    model = io.BytesIO()
    settings = dict(model_type="bpe", vocab_size=2000, byte_fallback=True, character_coverage=0.985, normalization_rule_name="identity",
                    remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True, add_dummy_prefix=True,
                    hard_vocab_limit=False, minloglevel=2)
    text = [line.replace("\0", " ") for line in corpus()]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=model, **(settings | options))
    return model.getvalue()


# --------------------------------------------------------------------------------------- converters


def writer(name, architecture):
    out = gguf.GGUFWriter(HERE / f"{name}.gguf", architecture)
    out.add_name(name)
    return out


def finish(out):
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def special_vocab(tokenizer, config, load_merges):
    """What the gguf package itself finds in the folder of a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        if tokenizer:
            tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key.endswith("_id")}))
        return gguf.SpecialVocab(folder, load_merges=load_merges)


def by_id(tokenizer):
    return {index: text for text, index in tokenizer.get_vocab(True).items()}


def write_gpt2(name, architecture, tokenizer, pre, config, padding=0, add_eos=None, list_kind="gpt2"):
    """As convert_hf_to_gguf.py of llama.cpp and bitnet.cpp write a byte-level BPE; the same way is bitnet.cpp's for its embedding models."""
    out = writer(name, architecture)
    tokens, types = [], []
    texts, added = by_id(tokenizer), tokenizer.get_added_tokens_decoder()
    for index in range(max(texts) + 1 + padding):
        if index not in texts:
            tokens.append(f"[PAD{index}]")
            types.append(TokenType.UNUSED)
        elif index in added:
            text = texts[index]
            if not added[index].normalized:
                text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
            if not added[index].special:
                text = text.replace("▁", " ")
            tokens.append(text)
            types.append(TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED)
        else:
            tokens.append(texts[index])
            types.append(TokenType.NORMAL)
    out.add_tokenizer_model(list_kind)
    if pre:
        out.add_tokenizer_pre(pre)
    out.add_token_list(tokens)
    out.add_token_types(types)
    special_vocab(tokenizer, config, True).add_to_gguf(out, quiet=True)
    if add_eos is not None:
        out.add_add_eos_token(add_eos)
    finish(out)


WRONG_TEMPLATE = "{% for m in messages %}{{ bos_token }}Human: {{ m['content'] }}\n\nBITNETAssistant: {{ eos_token }}{% endfor %}"


def write_2b4t(name, tokenizer, config):
    """As convert-ms-to-gguf-bitnet.py wrote bitnet-b1.58-2B-4T: no name of a split, scores, added tokens CONTROL, another chat template."""
    out = writer(name, "bitnet-b1.58")
    out.add_add_bos_token(True)
    texts, added = by_id(tokenizer), tokenizer.get_added_tokens_decoder()
    ids = range(max(texts) + 1)
    out.add_tokenizer_model("gpt2")
    out.add_token_list([texts[index].encode() for index in ids])
    out.add_token_scores([-1000.0 if index in added else 0.0 for index in ids])
    out.add_token_types([TokenType.CONTROL if index in added else TokenType.NORMAL for index in ids])
    special = special_vocab(tokenizer, config, True)
    special.add_special_token = {}  # that of the package of the time, which read tokenizer_config.json alone
    special.chat_template = WRONG_TEMPLATE
    special.add_to_gguf(out, quiet=True)
    add_model(out, len(ids))
    finish(out)


def add_model(out, vocabulary, hidden=32, ffn=64):
    """One layer of random ternary weights in f16, as --outtype f16 writes them: for commands to run."""
    rng = numpy.random.default_rng(20261121)
    out.add_vocab_size(vocabulary)
    out.add_context_length(256)
    out.add_embedding_length(hidden)
    out.add_block_count(1)
    out.add_feed_forward_length(ffn)
    out.add_rope_dimension_count(hidden)
    out.add_head_count(1)
    out.add_head_count_kv(1)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(500000.0)
    out.add_tensor("token_embd.weight", rng.normal(size=(vocabulary, hidden)).astype(numpy.float16))
    shapes = {"attn_q": (hidden, hidden), "attn_k": (hidden, hidden), "attn_v": (hidden, hidden), "attn_output": (hidden, hidden),
              "ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden), "ffn_down": (hidden, ffn)}
    for name, shape in shapes.items():
        out.add_tensor(f"blk.0.{name}.weight", rng.choice([-0.5, 0.0, 0.5], size=shape).astype(numpy.float16))
    for name, size in {"attn_norm": hidden, "attn_sub_norm": hidden, "ffn_norm": hidden, "ffn_sub_norm": ffn}.items():
        out.add_tensor(f"blk.0.{name}.weight", rng.uniform(0.5, 1.5, size=size).astype(numpy.float32))
    out.add_tensor("output_norm.weight", rng.uniform(0.5, 1.5, size=hidden).astype(numpy.float32))


def write_sentencepiece(name, architecture, model, config, added=(), size=None, prefix=None, user_defined=False):
    """As _set_vocab_sentencepiece of llama.cpp and bitnet.cpp: pieces with scores; `user_defined` as the newer one, which reads the added
    tokens of tokenizer_config.json and writes the spaces in them as spaces."""
    out = writer(name, architecture)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens, scores, types = [], [], []
    for index in range(pieces.GetPieceSize()):
        kind = TokenType.NORMAL
        if pieces.IsUnknown(index):
            kind = TokenType.UNKNOWN
        elif pieces.IsControl(index):
            kind = TokenType.CONTROL
        elif pieces.IsUnused(index):
            kind = TokenType.UNUSED
        elif pieces.IsByte(index):
            kind = TokenType.BYTE
        text, score = pieces.IdToPiece(index), pieces.GetScore(index)
        if user_defined and text in user_defined:
            text, score, kind = text.replace("▁", " "), -1000.0, TokenType.USER_DEFINED
        tokens.append(text.encode())
        scores.append(score)
        types.append(kind)
    for text in added:
        tokens.append(text.encode())
        scores.append(-1000.0)
        types.append(TokenType.USER_DEFINED)
    for index in range(1, (size or 0) - len(tokens) + 1):
        tokens.append(f"[PAD{index}]".encode())
        scores.append(-1000.0)
        types.append(TokenType.UNUSED)
    out.add_tokenizer_model("llama")
    out.add_tokenizer_pre("default")
    out.add_token_list(tokens)
    out.add_token_scores(scores)
    out.add_token_types(types)
    special_vocab(None, config, False).add_to_gguf(out, quiet=True)
    if prefix is not None:
        out.add_add_space_prefix(prefix)
    finish(out)


def write_flat(name, architecture, tokenizer, config):
    """As LlamaHfVocab writes a SentencePiece BPE of which there is only tokenizer.json: all scores are the same."""
    out = writer(name, architecture)
    texts, added = by_id(tokenizer), tokenizer.get_added_tokens_decoder()
    ids = range(max(texts) + 1)

    def kind(index):
        text = texts[index]
        if len(text) == 6 and text.startswith("<0x"):
            return TokenType.BYTE
        if index in added:
            return TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED
        return TokenType.NORMAL

    out.add_tokenizer_model("llama")
    out.add_tokenizer_pre("default")
    out.add_token_list([texts[index].encode() for index in ids])
    out.add_token_scores([-1000.0 for _ in ids])
    out.add_token_types([kind(index) for index in ids])
    special_vocab(tokenizer, config, False).add_to_gguf(out, quiet=True)
    finish(out)


# ---------------------------------------------------------------------------- Hugging Face's reading


def hugging_face(model, converter, specials, **attributes):
    """The tokenizer.json that transformers makes of a SentencePiece model."""
    with tempfile.NamedTemporaryFile(suffix=".model") as file:
        file.write(model)
        file.flush()
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        original = SimpleNamespace(vocab_file=file.name, convert_ids_to_tokens=pieces.IdToPiece, legacy=True, **attributes)
        converter.SpmExtractor.extract = extract_by_score
        tokenizer = converter(original).converted()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    bos = "<bos>" if "<bos>" in specials else "<s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return tokenizer


def extract_by_score(self, vocab_scores=None):
    """What the extractors did in transformers 4: published tokenizer.json files were made by that."""
    vocab = {piece.piece: index for index, piece in enumerate(self.proto.pieces)}
    if vocab_scores is None:
        return vocab, generate_merges(vocab)
    return vocab, generate_merges(vocab, vocab_scores)


# ------------------------------------------------------------------------------------------- fixtures

LLAMA3_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GEMMA_USER = ["\n" * n for n in range(2, 8)] + ["▁" * n for n in range(2, 12)] + ["<table>", "[INST]"]


def make():
    """Name -> the tokenizer that the file was made from."""
    made = {}

    made["bitnet_2b4t"] = tokenizer = byte_level(regex(LLAMA3), LLAMA3_SPECIALS, size=900, bos=LLAMA3_SPECIALS[0], ignore_merges=True)
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|end_of_text|>"}
    write_2b4t("bitnet_2b4t", tokenizer, config)

    made["llama_bpe"] = tokenizer = byte_level(regex(LLAMA3), LLAMA3_SPECIALS, ["<|tool|>", "<table>", "  \n"], 900, LLAMA3_SPECIALS[0], ignore_merges=True)
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": "{{ bos_token }}{{ messages[0]['content'] }}"}
    write_gpt2("llama_bpe", "llama", tokenizer, "llama-bpe", config, padding=8)

    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made["gpt2"] = tokenizer = byte_level(split, ["<|endoftext|>"], size=1200)
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    write_gpt2("gpt2", "llama", tokenizer, "gpt-2", config)

    digits = pre_tokenizers.Digits(individual_digits=True)
    split = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    made["smollm"] = tokenizer = byte_level(split, CHATML_SPECIALS, size=900)
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": False}
    write_gpt2("smollm", "llama", tokenizer, "smollm", config)

    made["qwen2"] = tokenizer = byte_level(regex(QWEN2), CHATML_SPECIALS, ["<|tool|>"], 1200, normalizer=normalizers.NFC())
    config = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "add_bos_token": False}
    write_gpt2("qwen2", "qwen3", tokenizer, "qwen2", config, padding=4, add_eos=True)

    specials = ["<unk>", "<s>", "</s>"]
    model = sentencepieces()
    made["llama"] = tokenizer = hugging_face(model, LlamaConverter, specials, add_prefix_space=True)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<pad>", "<|tool|>")])
    config = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.token_to_id("<pad>"), "add_bos_token": True, "add_eos_token": False}
    write_sentencepiece("llama", "bitnet", model, config, ["<pad>", "<|tool|>"], size=tokenizer.get_vocab_size() + 6)
    compare(model, tokenizer)

    model = sentencepieces(vocab_size=1400)
    made["llama_flat"] = tokenizer = hugging_face(model, LlamaConverter, specials, add_prefix_space=True)
    write_flat("llama_flat", "bitnet", tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})
    compare(model, tokenizer)

    model = sentencepieces(vocab_size=900, byte_fallback=False)
    made["llama_no_bytes"] = tokenizer = hugging_face(model, LlamaConverter, specials, add_prefix_space=True)
    write_sentencepiece("llama_no_bytes", "bitnet", model, {"bos_token_id": 1, "eos_token_id": 2})
    compare(model, tokenizer)

    model = sentencepieces(vocab_size=1800, add_dummy_prefix=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
                           bos_piece="<bos>", control_symbols=["<start_of_turn>", "<end_of_turn>"], user_defined_symbols=GEMMA_USER)
    named = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    made["gemma"] = made["gemma_as_gpt2"] = tokenizer = hugging_face(model, GemmaConverter, specials, **named)
    ids = {"bos_token_id": 2, "eos_token_id": 1, "unk_token_id": 3, "pad_token_id": 0, "add_bos_token": True}
    write_sentencepiece("gemma", "gemma3", model, ids, prefix=False, user_defined=GEMMA_USER)
    write_gpt2("gemma_as_gpt2", "gemma3", tokenizer, "default", named)
    compare(model, tokenizer)

    # bigcode/starcoder and smallcloudai/Refact-1_6B: StarCoder's split is SmolLM's.
    split = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    fill = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"]
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    for name, specials in (("starcoder", ["<|endoftext|>", *fill]), ("refact", [*fill, "<|endoftext|>", "<empty_output>"])):
        made[name] = tokenizer = byte_level(split, specials, size=600 if name == "starcoder" else 500)
        write_gpt2(name, "llama", tokenizer, name, config)

    # microsoft/phi-2: GPT-2's split, and tokens for runs of spaces and tabs that are no special ones.
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made["phi_2"] = tokenizer = byte_level(split, ["<|endoftext|>"], size=600)
    runs = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=True) for text in runs])
    write_gpt2("phi_2", "llama", tokenizer, "phi-2", config, padding=5)

    # No model's: what llama.cpp does where a file names no split (LLAMA_VOCAB_PRE_TYPE_DEFAULT in src/llama-vocab.cpp).
    steps = [r"[\p{P}\$\+<=>\^~\|]+", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)", r"\p{N}+", "[0-9][0-9][0-9]"]
    steps = [pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    split = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made["default"] = tokenizer = byte_level(split, ["<|endoftext|>"], size=600)
    write_gpt2("default", "llama", tokenizer, "default", config)
    return made


def compare(model, tokenizer):
    """Says on how many lines SentencePiece itself differs from Hugging Face's reading of its model."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    lines = [line for line in all_lines() if not any(mark in line for mark in MARKS) and "\0" not in line and "\ufffd" not in line and "▁" not in line]
    different = [line for line in lines if pieces.EncodeAsIds(line) != tokenizer.encode(line, add_special_tokens=False).ids]
    print(f"SentencePiece differs on {len(different)} of {len(lines)} lines", [line for line in different[:3]])


def expected(made):
    lines = all_lines()
    text = fold(byte for line in lines for byte in line.encode() + b"\n")
    out = {"lines": {"count": len(lines), "hash": f"{text:016x}"}, "order": list(made), "tokenizers": {}}
    hashes = b""
    for name, tokenizer in made.items():
        total = decoded = 0xCBF29CE484222325
        for line in lines:
            ids = tokenizer.encode(line, add_special_tokens=False).ids
            hashes += struct.pack("<H", fold(ids) >> 48)
            total = fold(ids + [0xFFFFFFFF], total)
            decoded = fold(tokenizer.decode(ids, skip_special_tokens=False).encode() + b"\n", decoded)
        some = {line: tokenizer.encode(line, add_special_tokens=False).ids for line in lines[60 :: len(lines) // 12]}
        out["tokenizers"][name] = {"hash": f"{total:016x}", "decoded": f"{decoded:016x}", "with_special": tokenizer.encode("a b").ids, "lines": some}
    return out, hashes


def main():
    global HERE
    kept, HERE = HERE, pathlib.Path(tempfile.mkdtemp())
    out, hashes = expected(make())
    (HERE / "ids.bin").write_bytes(hashes)
    (HERE / "expected.json").write_text(json.dumps(out, ensure_ascii=True, separators=(",", ":")) + "\n", encoding="utf-8")
    for file in sorted(HERE.iterdir()):
        if "--check" not in sys.argv:
            kept.mkdir(exist_ok=True)
            shutil.copyfile(file, kept / file.name)
        elif file.read_bytes() != (kept / file.name).read_bytes():
            sys.exit(f"{kept / file.name} differs from what the installed libraries make")
    shutil.rmtree(HERE)


if __name__ == "__main__":
    main()
