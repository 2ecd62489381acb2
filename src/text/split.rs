//! How byte-level tokenizers split a text before they merge: the names that GGUF files give the ways.
//!
//! `tokenizer.ggml.pre` names a way that llama.cpp knows by heart. Only those are here whose
//! `tokenizer.json` is known too, because the ids must be those of the Hugging Face tokenizer: a split
//! that is nearly right gives ids that are silently wrong.

use serde_json::{Value, json};

/// What a text is split into before merging, and what else goes with the name.
#[derive(Debug, PartialEq)]
pub(crate) struct Split {
    /// The names that files use.
    pub(crate) names: &'static [&'static str],
    /// Regular expressions applied one after another: matches and what lies between become pieces.
    patterns: &'static [&'static str],
    /// Each numeral is a piece, before anything else.
    numerals: bool,
    /// GPT-2's own expression is applied last.
    gpt2: bool,
    /// Texts are put into Unicode's form NFC.
    nfc: bool,
    /// A piece that is a token is that token, whatever the merges say.
    pub(crate) whole_words: bool,
    /// Texts begin with BOS unless the file says otherwise.
    pub(crate) add_bos: bool,
}

const PLAIN: Split = Split {
    names: &[],
    patterns: &[],
    numerals: false,
    gpt2: false,
    nfc: false,
    whole_words: false,
    add_bos: false,
};

const LLAMA3_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Llama 3, and with it BitNet 2B4T, Falcon 3 and Falcon-E.
pub(crate) static LLAMA3: Split = Split {
    names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon_e"],
    patterns: &[LLAMA3_PATTERN],
    whole_words: true,
    add_bos: true,
    ..PLAIN
};

/// Llama 3's expression where merges come before whole words (`src/llama-vocab.cpp` has both names with
/// the expression of Llama 3 and without its `ignore_merges`). What `trine convert` names such a
/// tokenizer.
static SMAUG: Split = Split { names: &["smaug-bpe", "dbrx"], patterns: &[LLAMA3_PATTERN], ..PLAIN };

static QWEN2: Split = Split {
    names: &["qwen2"],
    patterns: &[
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
    nfc: true,
    ..PLAIN
};

static GPT2: Split = Split { names: &["gpt-2", "phi-2"], gpt2: true, ..PLAIN };

static SMOLLM: Split =
    Split { names: &["smollm", "starcoder", "refact"], numerals: true, gpt2: true, ..PLAIN };

/// What llama.cpp does where a file names nothing. No model was trained with it.
pub(crate) static DEFAULT: Split = Split {
    names: &["default"],
    patterns: &[
        r"[\p{P}$+<=>^~|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    ],
    ..PLAIN
};

static ALL: [&Split; 6] = [&LLAMA3, &SMAUG, &QWEN2, &GPT2, &SMOLLM, &DEFAULT];

impl Split {
    /// The way that a name stands for.
    pub(crate) fn named(name: &str) -> Option<&'static Self> {
        ALL.into_iter().find(|split| split.names.contains(&name))
    }

    /// All names, for messages.
    pub(crate) fn all_names() -> String {
        ALL.iter().flat_map(|split| split.names).copied().collect::<Vec<_>>().join(", ")
    }

    /// As the `normalizer` of a `tokenizer.json`.
    pub(crate) fn normalizer(&self) -> Option<Value> {
        self.nfc.then(|| json!({"type": "NFC"}))
    }

    /// As the `pre_tokenizer` of a `tokenizer.json`. `space` puts a space before the text.
    pub(crate) fn pre_tokenizer(&self, space: bool) -> Value {
        let mut steps = Vec::new();
        if self.numerals {
            steps.push(json!({"type": "Digits", "individual_digits": true}));
        }
        for pattern in self.patterns {
            steps.push(json!({
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": false,
            }));
        }
        steps.push(json!({
            "type": "ByteLevel",
            "add_prefix_space": space,
            "trim_offsets": true,
            "use_regex": self.gpt2,
        }));
        json!({"type": "Sequence", "pretokenizers": steps})
    }
}
