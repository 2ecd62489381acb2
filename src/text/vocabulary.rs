//! A tokenizer built from its parts: tokens by id, merges or scores, and how a text is split.
//!
//! That is what GGUF files hold instead of a `tokenizer.json`. Two kinds are built, both as the BPE
//! model of the `tokenizers` crate, so that one implementation of encoding and of streaming serves
//! all files:
//!
//! - **Byte-level** (GPT-2's): tokens are written in GPT-2's alphabet of bytes, merges are listed.
//! - **SentencePiece**: `▁` stands for a space, bytes without a token are `<0x..>` tokens. A file has
//!   scores instead of merges; the merges follow from them: any two pieces whose concatenation is a
//!   piece can be merged, the best score first. That is how transformers makes a `tokenizer.json`
//!   of a SentencePiece BPE (`generate_merges`), and on the test lines SentencePiece itself agrees
//!   unless the text has a `▁` of its own.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, Merges as Pairs, Vocab};
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper};

use super::declared::check_token;
use super::decoder;
use super::split::Split;
use super::tokenizer::{MAX_VOCABULARY, Tokenizer, TokenizerOptions};
use crate::caught::caught;
use crate::error::LoadError;

/// Bytes of one SentencePiece piece that may take part in merges; published ones have up to 96. All
/// ways to cut a piece in two are tried.
const MAX_PIECE: usize = 256;

/// Bytes of all added tokens; the most that is known to us is 75 kB. They are searched for by an
/// automaton, which takes a hundred times as much.
const MAX_ADDED: usize = 1 << 20;

/// Bytes of merges derived from scores, for each byte of the pieces and beyond [`SPARE_MERGES`];
/// published vocabularies have 1 to 3. Pieces can be chosen so that nearly all cuts are merges.
const MERGED: usize = 16;
const SPARE_MERGES: usize = 1 << 20;

/// What a token is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TokenKind {
    /// Made by merging.
    Normal,
    /// Written by templates and the engine; special.
    Control,
    /// Found in a text before anything else is done to it.
    UserDefined,
    /// One byte, as `<0x0A>`.
    Byte,
    /// Part of the vocabulary and never in an encoded text.
    Unused,
}

/// A token; its id is its place.
#[derive(Debug, Clone)]
pub(crate) struct TokenEntry<'a> {
    /// How the vocabulary writes it; empty for an id that no token has.
    pub(crate) text: Cow<'a, str>,
    pub(crate) kind: TokenKind,
}

/// Which two tokens are merged first.
#[derive(Debug)]
pub(crate) enum Merges<'a> {
    /// Pairs, the first first.
    Listed(Vec<(&'a str, &'a str)>),
    /// The pair whose concatenation has the highest score; one finite number for each token.
    Scores(Vec<f32>),
    /// The pair whose concatenation has the lowest id.
    Ids,
}

/// How a text becomes the characters that are merged.
#[derive(Debug)]
pub(crate) enum Alphabet {
    /// Pieces of a text, each byte as a character of GPT-2's; perhaps after a space of its own.
    ByteLevel { split: &'static Split, space: bool },
    /// The whole text with `▁` for each space; perhaps after one more.
    SentencePiece { space: bool },
}

/// A tokenizer in parts.
#[derive(Debug)]
pub(crate) struct Vocabulary<'a> {
    pub(crate) tokens: Vec<TokenEntry<'a>>,
    pub(crate) merges: Merges<'a>,
    pub(crate) alphabet: Alphabet,
    /// Stands for what no token can express.
    pub(crate) unknown: Option<u32>,
}

impl Vocabulary<'_> {
    /// Builds the tokenizer. `file` is only for messages.
    ///
    /// # Errors
    ///
    /// A [`LoadError`] that names the token or merge: for two tokens of one text, a merge of or into
    /// tokens that are not there, a score that is no number, and sizes that no vocabulary has.
    pub(crate) fn build(
        self,
        file: &Path,
        options: &TokenizerOptions,
    ) -> Result<Tokenizer, LoadError> {
        let longest = self.tokens.iter().map(|token| token.text.len()).max();
        check_token(file, "vocabulary", longest.unwrap_or(0))?;
        let added = self.added(file)?;
        let (model, outside) = self.model_size();
        let ids = self.ids(file, model)?;
        let merges = self.pairs(file, &ids)?;
        let mut builder = BPE::builder().fuse_unk(true);
        let normalizer;
        let mut pre_tokenizer = None;
        let decoder = match &self.alphabet {
            Alphabet::ByteLevel { split, space } => {
                builder = builder.ignore_merges(split.whole_words);
                normalizer = split.normalizer();
                pre_tokenizer = Some(split.pre_tokenizer(*space));
                json!({
                    "type": "ByteLevel",
                    "add_prefix_space": true,
                    "trim_offsets": true,
                    "use_regex": true,
                })
            }
            Alphabet::SentencePiece { space } => {
                let unknown = self.unknown.and_then(|id| self.tokens.get(id as usize));
                match unknown.filter(|token| !token.text.is_empty()) {
                    Some(token) => builder = builder.unk_token(token.text.clone().into_owned()),
                    // The crate would leave such characters out without a word.
                    None if !self.has_bytes(&ids) => {
                        let expected =
                            "a token for what no token can express, or one for each byte";
                        return Err(LoadError::invalid(file, "vocabulary", expected, "neither"));
                    }
                    None => {}
                }
                builder = builder.byte_fallback(true);
                normalizer = Some(spaces(*space));
                sentencepiece_decoder(*space)
            }
        };
        let vocab: Vocab = ids.iter().map(|(text, id)| ((*text).to_owned(), *id)).collect();
        drop(ids);
        let bad = |found: String| LoadError::invalid(file, "vocabulary", "a tokenizer", found);
        let built = caught(|| -> tokenizers::Result<_> {
            let model = builder.vocab_and_merges(vocab, merges).build()?;
            let mut tokenizer = tokenizers::Tokenizer::new(model);
            tokenizer.with_normalizer(part::<NormalizerWrapper>(normalizer)?)?;
            tokenizer.with_pre_tokenizer(part::<PreTokenizerWrapper>(pre_tokenizer)?);
            // Not run here, where text is streamed; a file that is made of the tokenizer needs it.
            tokenizer.with_decoder(part::<DecoderWrapper>(Some(decoder.clone()))?);
            tokenizer.add_tokens(added)?;
            Ok(tokenizer)
        });
        let tokenizer = match built {
            Ok(Ok(tokenizer)) => tokenizer,
            Ok(Err(error)) => return Err(bad(error.to_string())),
            Err(_) => return Err(bad("contents that contradict each other".to_owned())),
        };
        // The crate numbers what its model lacks by itself.
        for (id, token) in self.tokens.iter().enumerate().skip(model).take(outside) {
            if tokenizer.token_to_id(&token.text) != Some(id as u32) {
                return Err(bad(format!("{:?} at another place than {id}", token.text)));
            }
        }
        Tokenizer::assemble(file, tokenizer, decoder::stages(file, Some(&decoder))?, options)
    }

    fn has_bytes(&self, ids: &HashMap<&str, u32>) -> bool {
        (0..=u8::MAX).all(|byte| ids.contains_key(format!("<{byte:#04X}>").as_str()))
    }

    /// The added tokens in the order of their ids.
    fn added(&self, file: &Path) -> Result<Vec<AddedToken>, LoadError> {
        let mut bytes = 0;
        let mut added = Vec::new();
        for token in &self.tokens {
            let special = match token.kind {
                TokenKind::Control => true,
                TokenKind::UserDefined => false,
                _ => continue,
            };
            bytes += token.text.len();
            if bytes > MAX_ADDED {
                let expected = format!("control and user-defined tokens of {MAX_ADDED} bytes");
                return Err(LoadError::invalid(file, "vocabulary", expected, "more"));
            }
            added.push(AddedToken::from(&*token.text, special).normalized(false));
        }
        Ok(added)
    }

    /// How many tokens are in the model, and how many follow that are added tokens alone.
    ///
    /// Where the added tokens of a byte-level vocabulary come last, they stay out of the model, as in
    /// published `tokenizer.json` files; the crate then gives them the next ids. (In the model,
    /// the text of a control token would have to be kept from becoming that token.)
    fn model_size(&self) -> (usize, usize) {
        let filled = self.tokens.iter().rposition(|token| !token.text.is_empty());
        let end = filled.map_or(0, |last| last + 1);
        let is_added = |token: &TokenEntry<'_>| {
            matches!(token.kind, TokenKind::Control | TokenKind::UserDefined)
        };
        let model = self.tokens[..end].iter().rposition(|token| !is_added(token));
        let model = model.map_or(0, |last| last + 1);
        let whole = self.tokens[..end].iter().all(|token| !token.text.is_empty());
        let byte_level = matches!(self.alphabet, Alphabet::ByteLevel { .. });
        if byte_level && whole { (model, end - model) } else { (end, 0) }
    }

    /// Ids by text, of the first `model` tokens.
    fn ids(&self, file: &Path, model: usize) -> Result<HashMap<&str, u32>, LoadError> {
        if self.tokens.len() > MAX_VOCABULARY as usize {
            let found = format!("{} tokens", self.tokens.len());
            let expected = format!("up to {MAX_VOCABULARY} tokens");
            return Err(LoadError::invalid(file, "vocabulary", expected, found));
        }
        let filled = self.tokens.iter().filter(|token| !token.text.is_empty()).count();
        let mut ids = HashMap::with_capacity(filled);
        for (id, token) in self.tokens.iter().enumerate() {
            if token.text.is_empty() {
                continue;
            }
            if let Some(other) = ids.insert(&*token.text, id as u32) {
                let found = format!("{} as {other} and as {id}", quoted(&token.text));
                return Err(LoadError::invalid(file, "vocabulary", "tokens that differ", found));
            }
        }
        ids.retain(|_, id| (*id as usize) < model);
        Ok(ids)
    }

    /// The merges, the first first.
    fn pairs(&self, file: &Path, ids: &HashMap<&str, u32>) -> Result<Pairs, LoadError> {
        match &self.merges {
            Merges::Listed(pairs) => listed(file, pairs, ids),
            Merges::Scores(scores) => self.derived(file, ids, Some(scores)),
            Merges::Ids => self.derived(file, ids, None),
        }
    }

    /// Whether a user-defined token is a run of spaces. Hugging Face's tokenizer finds such a token in
    /// the marks of a text only, and leaves spaces to merges.
    fn is_run(&self, token: &TokenEntry<'_>) -> bool {
        token.kind == TokenKind::UserDefined
            && matches!(self.alphabet, Alphabet::SentencePiece { space: false })
            && token.text.chars().all(|c| c == '▁')
    }

    fn derived(
        &self,
        file: &Path,
        ids: &HashMap<&str, u32>,
        scores: Option<&[f32]>,
    ) -> Result<Pairs, LoadError> {
        let merged = |token: &TokenEntry<'_>| token.kind == TokenKind::Normal || self.is_run(token);
        let is_merged = |id: &u32| merged(&self.tokens[*id as usize]);
        let mut room = SPARE_MERGES;
        let mut found: Vec<Derived<'_>> = Vec::new();
        for (id, token) in self.tokens.iter().enumerate() {
            let text = &*token.text;
            if !merged(token) || text.is_empty() {
                continue;
            }
            if text.len() > MAX_PIECE {
                let expected = format!("pieces of up to {MAX_PIECE} bytes");
                let field = format!("token {id}");
                let bytes = format!("{} bytes", text.len());
                return Err(LoadError::invalid(file, field, expected, bytes));
            }
            let score = scores.and_then(|scores| scores.get(id)).copied().unwrap_or(0.0);
            // What user-defined pieces have in SentencePiece; converters write another score.
            let score = if token.kind == TokenKind::Normal { score } else { 0.0 };
            if !score.is_finite() {
                let field = format!("score of token {id}");
                return Err(LoadError::invalid(file, field, "a number", score.to_string()));
            }
            room = room.saturating_add(MERGED * text.len());
            let characters = text.chars().count() as u32;
            for (left, (at, _)) in text.char_indices().enumerate().skip(1) {
                let (a, b) = text.split_at(at);
                let whole = ids.get(a).is_some_and(is_merged) && ids.get(b).is_some_and(is_merged);
                if !whole {
                    continue;
                }
                room = room.checked_sub(text.len()).ok_or_else(|| {
                    let expected = "a vocabulary with few ways to make each piece";
                    let found = format!("too many up to {} (token {id})", quoted(text));
                    LoadError::invalid(file, "vocabulary", expected, found)
                })?;
                let left = left as u32;
                // Zeros of both signs are equal.
                let score = score + 0.0;
                found.push(Derived { a, b, id: id as u32, score, left, right: characters - left });
            }
        }
        match scores {
            // Equal scores of different pieces stay in the order of ids: the sort is stable.
            Some(_) => found.sort_by(|x, y| {
                y.score.total_cmp(&x.score).then(y.left.cmp(&x.left)).then(y.right.cmp(&x.right))
            }),
            None => found.sort_by_key(|merge| (merge.id, merge.left, merge.right)),
        }
        Ok(found.into_iter().map(|merge| (merge.a.to_owned(), merge.b.to_owned())).collect())
    }
}

/// A merge that scores or ids imply.
struct Derived<'a> {
    a: &'a str,
    b: &'a str,
    /// Of the concatenation, as the score.
    id: u32,
    score: f32,
    /// Characters of each part.
    left: u32,
    right: u32,
}

fn listed(
    file: &Path,
    pairs: &[(&str, &str)],
    ids: &HashMap<&str, u32>,
) -> Result<Pairs, LoadError> {
    let mut whole = String::new();
    for (index, (a, b)) in pairs.iter().enumerate() {
        whole.clear();
        whole.push_str(a);
        whole.push_str(b);
        if let Some(lacking) = [*a, *b, &whole].into_iter().find(|text| !ids.contains_key(text)) {
            let found = format!("{}, which the vocabulary lacks", quoted(lacking));
            let expected = "two tokens whose concatenation is a token";
            return Err(LoadError::invalid(file, format!("merge {index}"), expected, found));
        }
    }
    Ok(pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect())
}

/// A text as messages quote it.
fn quoted(text: &str) -> String {
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// A part of a tokenizer from its place in a `tokenizer.json`.
fn part<T: DeserializeOwned>(json: Option<Value>) -> tokenizers::Result<Option<T>> {
    Ok(json.map(serde_json::from_value).transpose()?)
}

fn spaces(prefix: bool) -> Value {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    if !prefix {
        return replace;
    }
    json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]})
}

fn sentencepiece_decoder(prefix: bool) -> Value {
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({"type": "Sequence", "decoders": decoders})
}
