//! What a `tokenizer.json` may ask for, decided before the `tokenizers` crate builds it.
//!
//! The crate runs whatever a file describes. Steps that each double a text, a template that holds
//! the text twice, a regular expression with repetitions of repetitions: a file of a kilobyte can
//! ask for any amount of memory. The steps that published tokenizers consist of stay far below the
//! limits here, which are on the product of what all steps can do.

use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use crate::error::LoadError;

/// Normalizers, or pre-tokenizers, or post-processors, of which published files have up to 6.
const MAX_STEPS: usize = 32;
/// How many times longer than the text its normalized form may be: the character map of
/// SentencePiece makes 33 bytes of 3, and `▁` for a space 3 of 1.
const MAX_GROWTH: u64 = 256;
/// The product of all repetition counts in a regular expression, which the expression library
/// writes out. `{1,3}` is what published expressions have.
const MAX_REPEATS: u64 = 10_000;
/// The longest regular expression, in bytes; published ones have up to 500.
const MAX_REGEX: usize = 8192;
/// Tokens that a post-processor may add.
const MAX_ADDED: usize = 256;
/// Bytes of all added tokens, for which the crate builds an automaton a hundred times as large; the
/// most that is known to us is 75 kB.
const MAX_ADDED_BYTES: usize = 1 << 20;
/// The longest token, in bytes; the longest known to us are 512 spaces.
const MAX_TOKEN: usize = 4096;
/// WordPiece tries every part of a word, so its time is the cube of this; files have 100.
const MAX_WORD: u64 = 1000;

/// The parts of the file that the crate does not show or does not check.
#[derive(Deserialize)]
pub(super) struct Declared {
    #[serde(default)]
    pub(super) added_tokens: Vec<DeclaredToken>,
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    post_processor: Option<Value>,
    pub(super) decoder: Option<Value>,
    model: DeclaredModel,
}

#[derive(Deserialize)]
pub(super) struct DeclaredToken {
    pub(super) id: u32,
    pub(super) content: String,
}

#[derive(Deserialize)]
struct DeclaredModel {
    dropout: Option<f64>,
    continuing_subword_prefix: Option<String>,
    max_input_chars_per_word: Option<u64>,
    #[serde(default)]
    vocab: LongestToken,
}

impl Declared {
    /// Refuses what would explode.
    pub(super) fn check(&self, file: &Path) -> Result<(), LoadError> {
        self.model.check(file)?;
        let longest = self.added_tokens.iter().map(|token| token.content.len()).max();
        check_token(file, "added_tokens", longest.unwrap_or(0))?;
        let bytes: usize = self.added_tokens.iter().map(|token| token.content.len()).sum();
        if bytes > MAX_ADDED_BYTES {
            let expected = format!("at most {MAX_ADDED_BYTES} bytes of tokens");
            return Err(LoadError::invalid(file, "added_tokens", expected, bytes.to_string()));
        }
        let mut normalizer = Steps { file, field: "normalizer", count: 0, growth: 1, added: 0 };
        normalizer.walk(self.normalizer.as_ref())?;
        Steps { field: "pre_tokenizer", count: 0, ..normalizer }
            .walk(self.pre_tokenizer.as_ref())?;
        Steps { file, field: "post_processor", count: 0, growth: 1, added: 0 }
            .walk(self.post_processor.as_ref())
    }
}

impl DeclaredModel {
    fn check(&self, file: &Path) -> Result<(), LoadError> {
        if self.dropout.is_some_and(|dropout| dropout != 0.0) {
            let found = "random merges (dropout)".to_owned();
            return Err(LoadError::unsupported(file, "model.dropout", found, "null or 0"));
        }
        // WordPiece has a prefix too, and no decoder for it is supported; in BPE the crate cuts a
        // prefix off merges without looking whether it is there.
        if self.continuing_subword_prefix.as_deref().is_some_and(|prefix| !prefix.is_empty()) {
            let found = "a prefix for continued words".to_owned();
            let field = "model.continuing_subword_prefix";
            return Err(LoadError::unsupported(file, field, found, "null or an empty string"));
        }
        if let Some(most) = self.max_input_chars_per_word.filter(|&most| most > MAX_WORD) {
            let expected = format!("at most {MAX_WORD}");
            let field = "model.max_input_chars_per_word";
            return Err(LoadError::invalid(file, field, expected, most.to_string()));
        }
        check_token(file, "model.vocab", self.vocab.0)
    }
}

pub(super) fn check_token(file: &Path, field: &str, longest: usize) -> Result<(), LoadError> {
    if longest <= MAX_TOKEN {
        return Ok(());
    }
    let expected = format!("tokens of at most {MAX_TOKEN} bytes");
    Err(LoadError::invalid(file, field, expected, format!("one of {longest}")))
}

/// The bytes of the longest token of a vocabulary: an object of ids or a list of scores by token.
#[derive(Default)]
struct LongestToken(usize);

impl<'de> Deserialize<'de> for LongestToken {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(LongestToken(0))
    }
}

impl<'de> Visitor<'de> for LongestToken {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("tokens and their ids or scores")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
        let mut longest = 0;
        while let Some((token, _)) = map.next_entry::<String, IgnoredAny>()? {
            longest = longest.max(token.len());
        }
        Ok(Self(longest))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self, A::Error> {
        let mut longest = 0;
        while let Some((token, _)) = list.next_element::<(String, IgnoredAny)>()? {
            longest = longest.max(token.len());
        }
        Ok(Self(longest))
    }
}

/// The steps of one part of the file and what they can do together.
struct Steps<'a> {
    file: &'a Path,
    field: &'static str,
    count: usize,
    growth: u64,
    added: usize,
}

impl Steps<'_> {
    fn wrong(&self, expected: String, found: impl Into<String>) -> LoadError {
        LoadError::invalid(self.file, self.field, expected, found)
    }

    fn walk(&mut self, step: Option<&Value>) -> Result<(), LoadError> {
        let Some(step) = step.filter(|step| !step.is_null()) else { return Ok(()) };
        let parts = ["normalizers", "pretokenizers", "processors"]
            .into_iter()
            .find_map(|key| step.get(key)?.as_array());
        if let Some(parts) = parts {
            // Objects are nested at most 128 deep, or they would not have been parsed.
            return parts.iter().try_for_each(|part| self.walk(Some(part)));
        }
        self.count += 1;
        if self.count > MAX_STEPS {
            return Err(self.wrong(format!("at most {MAX_STEPS} steps"), "more"));
        }
        let length = |key: &str| step.get(key).and_then(Value::as_str).map_or(0, str::len) as u64;
        // What a character can become at most, in characters of one byte.
        let growth = match step.get("type").and_then(Value::as_str).unwrap_or_default() {
            "Replace" => {
                let pattern = step.get("pattern").and_then(|p| p.get("String"));
                let pattern = pattern.and_then(Value::as_str).map_or(0, str::len) as u64;
                match pattern {
                    // An expression can match what is empty, so it can also insert.
                    0 => 1 + length("content"),
                    pattern => length("content").div_ceil(pattern),
                }
            }
            "Prepend" => 1 + length("prepend"),
            "Metaspace" => 1 + length("replacement"),
            "Precompiled" => self.longest_replacement(step)?,
            "ByteLevel" | "BertNormalizer" if self.field != "post_processor" => 2,
            _ => 1,
        };
        self.growth = self.growth.saturating_mul(growth.max(1));
        if self.growth > MAX_GROWTH {
            let expected = format!("steps that make a text at most {MAX_GROWTH} times longer");
            return Err(self.wrong(expected, "steps that could make more of it"));
        }
        if let Some(regex) = step.get("pattern").and_then(|p| p.get("Regex")?.as_str()) {
            self.regex(regex)?;
        }
        self.template(step)
    }

    fn regex(&self, regex: &str) -> Result<(), LoadError> {
        if regex.len() > MAX_REGEX {
            let expected = format!("regular expressions of at most {MAX_REGEX} bytes");
            return Err(self.wrong(expected, format!("one of {}", regex.len())));
        }
        // The largest number in each pair of braces; `\p{L}` and the like have none.
        let repeats = regex.split('{').skip(1).filter_map(|rest| {
            let (braces, _) = rest.split_once('}')?;
            braces.split(',').map(|number| number.trim().parse::<u64>().ok()).max().flatten()
        });
        let product = repeats.fold(1_u64, |product, count| product.saturating_mul(count.max(1)));
        if product > MAX_REPEATS {
            let expected = format!("repetitions whose product is at most {MAX_REPEATS}");
            return Err(self.wrong(expected, format!("the expression {regex:?}")));
        }
        Ok(())
    }

    /// A template of a post-processor: its text once, and few tokens around it.
    fn template(&mut self, step: &Value) -> Result<(), LoadError> {
        let Some(pieces) = step.get("single").and_then(Value::as_array) else { return Ok(()) };
        let texts = pieces.iter().filter(|piece| piece.get("Sequence").is_some()).count();
        if texts > 1 {
            let expected = "a template that holds the text once".to_owned();
            return Err(self.wrong(expected, "one that drops or repeats it"));
        }
        for piece in pieces {
            let id = piece.get("SpecialToken").and_then(|token| token.get("id")?.as_str());
            let token = id.and_then(|id| step.get("special_tokens")?.get(id));
            let ids = token.and_then(|token| token.get("ids")?.as_array()).map_or(0, Vec::len);
            self.added = self.added.saturating_add(ids);
            if self.added > MAX_ADDED {
                return Err(self.wrong(format!("at most {MAX_ADDED} added tokens"), "more"));
            }
        }
        Ok(())
    }

    /// The bytes of the longest text that SentencePiece's character map puts for another. The map
    /// is the length of a table, the table, and texts that end in zeros.
    fn longest_replacement(&self, step: &Value) -> Result<u64, LoadError> {
        let text = step.get("precompiled_charsmap").and_then(Value::as_str).unwrap_or_default();
        let map = base64(text);
        let texts = map
            .first_chunk()
            .map(|length| u32::from_le_bytes(*length) as usize)
            .and_then(|length| map.get(4..)?.get(length / 4 * 4..));
        let Some(texts) = texts else {
            let expected = "a precompiled_charsmap that is as long as it says".to_owned();
            return Err(self.wrong(expected, format!("{} bytes", map.len())));
        };
        Ok(texts.split(|&byte| byte == 0).map(<[u8]>::len).max().unwrap_or(0) as u64)
    }
}

/// The bytes of a text in base 64 up to the first character that is none of its digits. That the
/// text is well formed is for the `tokenizers` crate to see.
fn base64(text: &str) -> Vec<u8> {
    let (mut bytes, mut bits, mut held) = (Vec::with_capacity(text.len() / 4 * 3 + 3), 0_u32, 0);
    for digit in text.bytes() {
        let digit = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => break,
        };
        bits = bits << 6 | u32::from(digit);
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
        }
    }
    bytes
}
