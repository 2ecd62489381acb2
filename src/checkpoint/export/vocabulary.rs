//! A `tokenizer.json` as the vocabulary of a GGUF file.
//!
//! GGUF has no room for a tokenizer's parts; it names a kind, and each engine builds in what that
//! kind does. Two kinds are written (`src/llama-vocab.cpp` of llama.cpp has both):
//!
//! - `gpt2`: byte-level BPE, with `tokenizer.ggml.pre` for the expressions that split a text;
//! - `llama`: SentencePiece's BPE with byte fallback, with a score per token in place of merges.

use std::collections::{HashMap, HashSet};

use serde::Deserialize;
use serde_json::Value;

use super::Source;
use crate::checkpoint::json::quote;
use crate::checkpoint::pooling::embedding_end;
use crate::error::{ExportError, LoadError};
use crate::text::Special;

/// Token types, as `llama.h` numbers them.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// The score of a token that no merge makes, as converters write it.
const ADDED_SCORE: f32 = -1000.0;

/// What `tokenizer.ggml.*` says.
pub(super) struct Vocabulary {
    pub(super) kind: &'static str,
    pub(super) pre: &'static str,
    pub(super) tokens: Vec<String>,
    pub(super) types: Vec<i32>,
    /// Of the kind `llama`.
    pub(super) scores: Vec<f32>,
    /// Of the kind `gpt2`.
    pub(super) merges: Vec<String>,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    /// The token that ends a turn, where it is another.
    pub(super) eot: Option<u32>,
    pub(super) pad: Option<u32>,
    pub(super) unknown: Option<u32>,
    pub(super) add_bos: bool,
    /// Whether [`eos`](Self::eos) comes after a text that is embedded.
    pub(super) add_eos: bool,
    /// Of the kind `llama`: whether a text begins with a space.
    pub(super) add_space_prefix: Option<bool>,
    /// What other engines may do otherwise than the tokenizer.
    pub(super) notes: Vec<String>,
}

#[derive(Deserialize)]
struct Json {
    #[serde(default)]
    added_tokens: Vec<Added>,
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    model: Model,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum Model {
    #[serde(rename = "BPE")]
    Bpe(Bpe),
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
struct Bpe {
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
    unk_token: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    /// Parted by the only space.
    Text(String),
}

impl Merge {
    fn pair(&self) -> Option<(&str, &str)> {
        match self {
            Self::Pair(left, right) => Some((left, right)),
            Self::Text(text) => text.split_once(' '),
        }
    }
}

/// Reads the tokenizer of a source; `None` if it has none.
pub(super) fn read(source: &Source<'_>) -> Result<Option<Vocabulary>, ExportError> {
    let files = source.tokenizer;
    let rows = source.weights.config().vocabulary;
    // Reading it as a tokenizer has checked the file: what follows need not.
    let Some((tokenizer, bytes)) = source.tokenizer()? else { return Ok(None) };
    if tokenizer.vocabulary_size() > rows {
        return Err(LoadError::invalid(
            &files.tokenizer_path,
            "model.vocab",
            format!("token ids below the {rows} rows of the embedding table"),
            format!("id {}", tokenizer.vocabulary_size() - 1),
        )
        .into());
    }
    let json: Json = serde_json::from_slice(&bytes).map_err(|error| {
        let found = quote(&error.to_string(), 400);
        LoadError::invalid(&files.tokenizer_path, "tokenizer", "a tokenizer.json", found)
    })?;
    let unfit = |reason: String| ExportError::Unfit {
        what: files.tokenizer_path.display().to_string(),
        reason,
        instead: "--type hf keeps the file as it is".into(),
    };
    let Model::Bpe(bpe) = &json.model else {
        return Err(unfit("GGUF has a place for BPE tokenizers alone".into()));
    };

    let generation = source.generation;
    let below = |id: &u32| (*id as usize) < rows;
    let bos = tokenizer.bos_id().or(generation.bos_token_id).filter(below);
    let eos = tokenizer.eos_id().or(generation.eos_token_ids.first().copied()).filter(below);
    // Of models that embed, EOS is what comes after a text; the token that a tokenizer's file calls so
    // ends a turn then, if it is another.
    let family = source.weights.config().family;
    let end = embedding_end(family, source.embeds, source.tokenizer, &tokenizer);
    let end = Some(end).filter(|_| source.embeds).unwrap_or_default();
    let (eos, turn) = match end[..] {
        [end] => (Some(end), eos.filter(|&eos| eos != end)),
        _ => (eos, None),
    };
    let id_of = |text: &Option<String>| text.as_deref().and_then(|text| tokenizer.token_id(text));
    let prefix = tokenizer.encode("", Special::PROMPT).unwrap_or_default();
    let mut vocabulary = Vocabulary {
        kind: "gpt2",
        pre: "",
        tokens: Vec::new(),
        types: Vec::new(),
        scores: Vec::new(),
        merges: Vec::new(),
        bos,
        eos,
        eot: turn.or(generation
            .eos_token_ids
            .iter()
            .copied()
            .filter(below)
            .find(|id| Some(*id) != eos)),
        pad: id_of(&files.pad_token),
        unknown: id_of(&bpe.unk_token),
        add_bos: !prefix.is_empty(),
        add_eos: end.len() == 1,
        add_space_prefix: None,
        notes: Vec::new(),
    };
    if prefix.len() > 1 || (prefix.len() == 1 && prefix.first().copied() != bos) {
        vocabulary.notes.push(format!(
            "the tokenizer begins a text with tokens {prefix:?}, of which GGUF can say only BOS"
        ));
    }
    if end.len() > 1 {
        vocabulary.notes.push(format!(
            "a text to be embedded ends with tokens {end:?}, of which GGUF can say only EOS"
        ));
    }
    vocabulary.list(&json, bpe, rows);
    if bpe.byte_fallback {
        vocabulary.sentence_piece(&json, bpe).map_err(unfit)?;
    } else {
        vocabulary.byte_level(&json, bpe).map_err(unfit)?;
    }
    Ok(Some(vocabulary))
}

impl Vocabulary {
    /// Texts and types by id. Rows of the table without a token get a name that no text has.
    fn list(&mut self, json: &Json, bpe: &Bpe, rows: usize) {
        self.tokens = (0..rows).map(|id| format!("[PAD{id}]")).collect();
        self.types = vec![UNUSED; rows];
        for (text, &id) in &bpe.vocab {
            self.tokens[id as usize].clone_from(text);
            let byte = bpe.byte_fallback && is_byte(text);
            self.types[id as usize] = if byte { BYTE } else { NORMAL };
        }
        for added in &json.added_tokens {
            self.tokens[added.id as usize].clone_from(&added.content);
            self.types[added.id as usize] = if added.special { CONTROL } else { USER_DEFINED };
        }
        if let Some(unknown) = self.unknown.filter(|_| bpe.byte_fallback) {
            self.types[unknown as usize] = UNKNOWN;
        }
    }

    fn byte_level(&mut self, json: &Json, bpe: &Bpe) -> Result<(), String> {
        let steps = steps(json.pre_tokenizer.as_ref());
        self.pre = pre_tokenizer(&steps, bpe.ignore_merges).ok_or_else(|| {
            let found = quote(&Value::from(steps).to_string(), 300);
            format!("tokenizer.ggml.pre has no name for its pre-tokenizer, {found}")
        })?;
        if let Some(normalizer) = json.normalizer.as_ref().filter(|value| !value.is_null()) {
            if normalizer["type"] != "NFC" {
                let found = quote(&normalizer.to_string(), 200);
                return Err(format!("GGUF cannot say its normalizer, {found}"));
            }
            self.notes.push("other engines read no NFC normalizer from GGUF".into());
        }
        for merge in &bpe.merges {
            let (left, right) = merge.pair().ok_or("a merge is not of two parts")?;
            self.merges.push(format!("{left} {right}"));
        }
        Ok(())
    }

    fn sentence_piece(&mut self, json: &Json, bpe: &Bpe) -> Result<(), String> {
        self.kind = "llama";
        self.pre = "default";
        self.add_space_prefix = Some(space_prefix(json)?);
        // A merge's rank goes over to the token that it makes: SentencePiece merges the pair of the
        // highest score, and of equals the leftmost.
        let mut rank: HashMap<String, usize> = HashMap::new();
        let mut last = String::new();
        let mut scattered = false;
        let mut pairs = HashSet::new();
        for merge in &bpe.merges {
            let (left, right) = merge.pair().ok_or("a merge is not of two parts")?;
            let made = format!("{left}{right}");
            let next = rank.len();
            let new = *rank.entry(made.clone()).or_insert(next) == next;
            scattered |= !new && made != last;
            pairs.insert((left, right));
            last = made;
        }
        let in_vocabulary = |text: &str| bpe.vocab.contains_key(text);
        let missing = rank.keys().any(|made| {
            made.char_indices().skip(1).any(|(at, _)| {
                let (left, right) = made.split_at(at);
                in_vocabulary(left) && in_vocabulary(right) && !pairs.contains(&(left, right))
            })
        });
        if scattered || missing {
            self.notes.push(
                "the tokenizer was not made from a SentencePiece model: the scores that GGUF has \
                 for its merges split some words in another way"
                    .into(),
            );
        }
        let mut other = rank.len();
        for (token, kind) in self.tokens.iter().zip(&self.types) {
            self.scores.push(match (*kind, rank.get(token)) {
                (NORMAL, Some(rank)) => -(*rank as f32),
                (NORMAL, None) => {
                    other += 1;
                    -(other as f32)
                }
                (UNKNOWN | CONTROL | BYTE, _) => 0.0,
                _ => ADDED_SCORE,
            });
        }
        Ok(())
    }
}

/// `<0x0A>` and its like.
fn is_byte(text: &str) -> bool {
    let hex = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    hex.is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok())
}

/// The steps of a pre-tokenizer or normalizer, sequences opened.
fn steps(value: Option<&Value>) -> Vec<Value> {
    match value {
        None | Some(Value::Null) => Vec::new(),
        Some(sequence) if sequence["type"] == "Sequence" => {
            let list = sequence.get("pretokenizers").or_else(|| sequence.get("normalizers"));
            let list = list.and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            list.iter().flat_map(|step| steps(Some(step))).collect()
        }
        Some(step) => vec![step.clone()],
    }
}

const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The name of a pre-tokenizer in `llama_vocab::impl::load` of `src/llama-vocab.cpp`. Of the two
/// names for Llama 3's expression, `llama-bpe` also takes a word that is a token for that token
/// whatever the merges say, and `smaug-bpe` does not.
fn pre_tokenizer(steps: &[Value], ignore_merges: bool) -> Option<&'static str> {
    let bytes = |step: &Value, regex: bool| {
        step["type"] == "ByteLevel"
            && step["add_prefix_space"] == false
            && step["use_regex"].as_bool().unwrap_or(true) == regex
    };
    let split = |step: &Value, regex: &str| {
        step["type"] == "Split"
            && step["pattern"]["Regex"] == regex
            && step["behavior"] == "Isolated"
            && step["invert"] == false
    };
    match steps {
        [one] if bytes(one, true) && !ignore_merges => Some("gpt-2"),
        [one, two] if split(one, LLAMA_3) && bytes(two, false) => {
            Some(if ignore_merges { "llama-bpe" } else { "smaug-bpe" })
        }
        [one, two]
            if one["type"] == "Digits"
                && one["individual_digits"] == true
                && bytes(two, true)
                && !ignore_merges =>
        {
            Some("smollm")
        }
        [one, two] if split(one, QWEN_2) && bytes(two, false) && !ignore_merges => Some("qwen2"),
        _ => None,
    }
}

/// Whether the parts around a SentencePiece model put a space in front of a text, or why they are
/// not those of such a model.
fn space_prefix(json: &Json) -> Result<bool, String> {
    let mut prefix = false;
    let mut replaced = false;
    let both =
        steps(json.normalizer.as_ref()).into_iter().chain(steps(json.pre_tokenizer.as_ref()));
    for step in both {
        match step["type"].as_str() {
            Some("Prepend") if step["prepend"] == "▁" => prefix = true,
            Some("Replace") if step["pattern"]["String"] == " " && step["content"] == "▁" => {
                replaced = true;
            }
            // Gemma's, which comes when no space is left to split at.
            Some("Split") if replaced && step["pattern"]["String"] == " " => {}
            Some("Metaspace") if step["replacement"] == "▁" => {
                replaced = true;
                prefix |= match step["prepend_scheme"].as_str() {
                    Some(scheme) => scheme != "never",
                    None => step["add_prefix_space"].as_bool().unwrap_or(true),
                };
            }
            _ => {
                let found = quote(&step.to_string(), 200);
                return Err(format!("GGUF cannot say this step of it: {found}"));
            }
        }
    }
    if replaced { Ok(prefix) } else { Err("it has byte fallback and keeps spaces".into()) }
}
