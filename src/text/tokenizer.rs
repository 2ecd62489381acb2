//! A tokenizer read from `tokenizer.json` or built from the parts in a GGUF file, over the
//! `tokenizers` crate.
//!
//! Three things are decided here and not left to the file:
//!
//! - **Who writes control tokens.** The text of a control token (`<|eot_id|>`) in a user's text is
//!   plain text unless the caller asks for it to be parsed ([`Special::parse`]), and
//!   [`Tokenizer::encode_chat`] parses those that the template writes and not those in messages.
//!   Control tokens are the added tokens that are marked special, and those that look like one
//!   (`<…>` or `[…]`), because checkpoints exist that forget the mark.
//! - **The beginning of a text.** See [`Special::add`].
//! - **Truncation and padding** in the file are ignored: a prompt is never cut silently.

use std::path::Path;
use std::sync::Arc;

use tokenizers::{
    AddedToken, AddedVocabulary, Encoding, Model, OffsetReferential, OffsetType, PostProcessor,
    PreTokenizer, Token,
};

use super::chat::{ChatOptions, ChatTemplate, Message};
use super::control::ControlTexts;
use super::declared::{Declared, DeclaredToken};
use super::decoder::{self, Detokenizer, Stage};
use crate::caught::caught;
use crate::error::{LoadError, SubmitError};

/// Ids from here on are refused. The largest vocabularies in use are below 2²⁰, and tables of
/// logits are as long as the largest id.
pub(crate) const MAX_VOCABULARY: u32 = 1 << 24;

/// White space in a row that is accepted. A split expression such as Llama 3's backtracks over such
/// a run; after a million steps the expression library gives up, the `tokenizers` crate takes
/// that for the end of the matches, and the rest of the text would silently get other ids.
const MAX_WHITE_SPACE: usize = 1 << 18;

/// How special tokens are treated when a text is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Special {
    /// Put the beginning-of-sequence token (BOS) first, if this tokenizer wants one:
    ///
    /// | [`TokenizerOptions::add_bos_token`] | post-processor in the file | result |
    /// |---|---|---|
    /// | not given | adds tokens before the text | those tokens |
    /// | not given | adds none | nothing |
    /// | `true` | adds BOS | one BOS |
    /// | `true` | does not | BOS |
    /// | `false` | any | nothing |
    ///
    /// Whatever the table says, nothing is added when the text begins with BOS itself, which only a
    /// parsed text can ([`Special::parse`]): most chat templates write it, and two of them
    /// derail a model. What a post-processor puts *after* the text is always left out: a prompt
    /// is there to be continued.
    pub add: bool,
    /// Parse the text of control tokens as those tokens. Without it they are plain text.
    pub parse: bool,
}

impl Special {
    /// A prompt from a user: BOS is added, and control tokens in it are plain text.
    pub const PROMPT: Self = Self { add: true, parse: false };
    /// A text with control tokens, as a chat template renders it: BOS is added unless it is there.
    pub const MARKUP: Self = Self { add: true, parse: true };
    /// A piece of text, for instance to be put between other ids.
    pub const NONE: Self = Self { add: false, parse: false };
}

/// What `tokenizer_config.json` (or a GGUF header) says beside the tokenizer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenizerOptions {
    /// Text of the beginning-of-sequence token.
    pub bos_token: Option<String>,
    /// Text of the end-of-sequence token.
    pub eos_token: Option<String>,
    /// Whether a text begins with BOS; not given, the post-processor decides.
    pub add_bos_token: Option<bool>,
}

/// A tokenizer. Clones share it.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    tokenizer: tokenizers::Tokenizer,
    /// The added vocabulary without its control tokens.
    plain: AddedVocabulary,
    /// Texts of the control tokens.
    control: ControlTexts,
    /// Those that the model itself could also produce from plain text.
    in_model: ControlTexts,
    stages: Arc<[Stage]>,
    special: Vec<u32>,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    vocabulary: usize,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`. `file` is only for messages.
    ///
    /// # Errors
    ///
    /// A [`LoadError`] that names the file, the key and what was expected: for a file that is no
    /// tokenizer, for ids that contradict each other, and for parts that cannot be run (a decoder
    /// that cannot be streamed, random merges).
    pub fn from_json(file: &Path, bytes: &[u8]) -> Result<Self, LoadError> {
        Self::from_json_with(file, bytes, &TokenizerOptions::default())
    }

    /// [`Tokenizer::from_json`] with what `tokenizer_config.json` says.
    ///
    /// # Errors
    ///
    /// Those of [`Tokenizer::from_json`], and a BOS or EOS token that the vocabulary lacks.
    pub fn from_json_with(
        file: &Path,
        bytes: &[u8],
        options: &TokenizerOptions,
    ) -> Result<Self, LoadError> {
        let bad = |error: String| {
            LoadError::invalid(file, "tokenizer", "a tokenizer.json of version 1.0", error)
        };
        let declared: Declared =
            serde_json::from_slice(bytes).map_err(|error| bad(error.to_string()))?;
        declared.check(file)?;
        // The crate indexes and unwraps in places (merges longer than any token, for one), so a
        // hostile file can make it panic. Nothing of its state survives the panic.
        let read = caught(|| tokenizers::Tokenizer::from_bytes(bytes));
        let tokenizer = match read {
            Ok(Ok(tokenizer)) => tokenizer,
            Ok(Err(error)) => return Err(bad(error.to_string())),
            Err(_) => return Err(bad("contents that contradict each other".to_owned())),
        };

        check_declared(file, &tokenizer, &declared.added_tokens)?;
        let stages = decoder::stages(file, declared.decoder.as_ref())?;
        Self::assemble(file, tokenizer, stages, options)
    }

    /// Puts together what is ours around a tokenizer of the crate, whose own decoder is not used.
    pub(super) fn assemble(
        file: &Path,
        mut tokenizer: tokenizers::Tokenizer,
        stages: Arc<[Stage]>,
        options: &TokenizerOptions,
    ) -> Result<Self, LoadError> {
        let bos = named(file, &mut tokenizer, "bos_token", options.bos_token.as_deref())?;
        let eos = named(file, &mut tokenizer, "eos_token", options.eos_token.as_deref())?;
        let vocabulary = check_ids(file, &tokenizer)?;
        let (prefix, suffix) = around(file, &tokenizer, bos, options.add_bos_token)?;

        let added = tokenizer.get_added_vocabulary();
        let mut special = Vec::new();
        let mut control = Vec::new();
        for (&id, token) in added.get_added_tokens_decoder() {
            if added.is_special_token(&token.content) {
                special.push(id);
            }
            if added.is_special_token(&token.content) || looks_like_control(&token.content) {
                control.push(token.clone());
            }
        }
        special.sort_unstable();
        let in_model = control
            .iter()
            .map(|token| token.content.as_str())
            .filter(|text| tokenizer.get_model().token_to_id(text).is_some());
        let in_model = ControlTexts::new(in_model);
        let texts = ControlTexts::new(control.iter().map(|token| token.content.as_str()));
        let mut plain = added.clone();
        let marked = control.into_iter().map(|token| token.special(true));
        plain.add_tokens(marked, tokenizer.get_model(), tokenizer.get_normalizer()).map_err(
            |error| LoadError::invalid(file, "added_tokens", "tokens", error.to_string()),
        )?;
        plain.set_encode_special_tokens(true);

        let inner = Inner {
            plain,
            control: texts,
            in_model,
            stages,
            special,
            bos: bos.or_else(|| prefix.first().copied()),
            prefix,
            suffix,
            eos,
            vocabulary,
            tokenizer,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// As a `tokenizer.json`, with a post-processor that begins texts as this tokenizer does.
    pub(crate) fn to_json(&self) -> Result<Vec<u8>, String> {
        let mut json =
            serde_json::to_value(&self.inner.tokenizer).map_err(|error| error.to_string())?;
        let texts: Option<Vec<String>> =
            self.inner.prefix.iter().map(|&id| self.token_text(id)).collect();
        let texts = texts.ok_or("a text begins with a token that has no text")?;
        if !texts.is_empty() {
            let begin = |sequence: &str, kind: u32| -> Vec<serde_json::Value> {
                let special = texts.iter().map(
                    |text| serde_json::json!({ "SpecialToken": { "id": text, "type_id": kind } }),
                );
                let rest = serde_json::json!({ "Sequence": { "id": sequence, "type_id": kind } });
                special.chain([rest]).collect()
            };
            let known = texts.iter().zip(&self.inner.prefix).map(|(text, id)| {
                let token = serde_json::json!({ "id": text, "ids": [id], "tokens": [text] });
                (text.clone(), token)
            });
            let pair = [begin("A", 0), begin("B", 1)].concat();
            json["post_processor"] = serde_json::json!({
                "type": "TemplateProcessing",
                "single": begin("A", 0),
                "pair": pair,
                "special_tokens": known.collect::<serde_json::Map<_, _>>(),
            });
        }
        serde_json::to_vec(&json).map_err(|error| error.to_string())
    }

    /// The ids of a text.
    ///
    /// # Errors
    ///
    /// A text that the vocabulary cannot express (no byte fallback and no unknown token), or a
    /// quarter of a million white-space characters in a row.
    pub fn encode(&self, text: &str, special: Special) -> Result<Vec<u32>, SubmitError> {
        self.encode_sealed(text, special, false)
    }

    /// Renders a conversation with the template and encodes it: the template's control tokens
    /// become those tokens, the same text inside a message, a tool or a document does not.
    ///
    /// BOS is added by the rule of [`Special::add`]. (transformers adds none when it renders and
    /// encodes in one call; a template without BOS then starts a 2B4T prompt in a way that the
    /// model was not trained on, and its model card renders first and encodes second.)
    ///
    /// # Errors
    ///
    /// Those of [`ChatTemplate::render`] and of [`Tokenizer::encode`].
    pub fn encode_chat(
        &self,
        template: &ChatTemplate,
        messages: &[Message],
        options: &ChatOptions,
    ) -> Result<Vec<u32>, SubmitError> {
        let control = &self.inner.control;
        let mut messages = messages.to_vec();
        let mut options = options.clone();
        let mut sealed = false;
        for message in &mut messages {
            message.0.values_mut().for_each(|value| sealed |= control.wrap_all(value));
        }
        for value in options.tools.iter_mut().chain(&mut options.documents) {
            sealed |= control.wrap_all(value);
        }
        options.extra.values_mut().for_each(|value| sealed |= control.wrap_all(value));
        let mut text = template.render(&messages, &options)?;
        if sealed {
            text = control.seal(&text);
        }
        self.encode_sealed(&text, Special::MARKUP, sealed)
    }

    fn encode_sealed(
        &self,
        text: &str,
        special: Special,
        sealed: bool,
    ) -> Result<Vec<u32>, SubmitError> {
        let refuse = |found: String| {
            SubmitError::invalid("text", "a text that the tokenizer can express", found)
        };
        if white_space(text) > MAX_WHITE_SPACE {
            let expected = format!("at most {MAX_WHITE_SPACE} white-space characters in a row");
            return Err(SubmitError::invalid("text", expected, white_space(text)));
        }
        let ids = caught(|| self.inner.body(text, special.parse, sealed));
        let mut ids = match ids {
            Ok(Ok(ids)) => ids,
            Ok(Err(error)) => return Err(refuse(error.to_string())),
            Err(_) => return Err(refuse("one that makes its library fail".to_owned())),
        };
        let prefix = &self.inner.prefix;
        if special.add && !prefix.is_empty() {
            let begun = special.parse
                && (ids.starts_with(prefix)
                    || ids.first().is_some_and(|&id| Some(id) == self.inner.bos));
            if !begun {
                ids.splice(0..0, prefix.iter().copied());
            }
        }
        Ok(ids)
    }

    /// The text of these ids, without special tokens if asked. Ids that the vocabulary lacks add
    /// nothing. Equal to the `tokenizers` crate except where byte tokens are invalid UTF-8 (see
    /// [`Detokenizer`], which this is a run of).
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut stream = self.detokenizer(skip_special);
        let mut text: String = ids.iter().filter_map(|&id| stream.push(id)).collect();
        text.extend(stream.finish());
        text
    }

    /// A decoder that takes one id at a time.
    pub fn detokenizer(&self, skip_special: bool) -> Detokenizer {
        Detokenizer::new(self.clone(), skip_special)
    }

    /// How the vocabulary writes a token, for instance `Ġthe` or `<0x0A>`.
    pub fn token_text(&self, id: u32) -> Option<String> {
        self.inner.tokenizer.id_to_token(id)
    }

    /// The bytes that a token adds in the middle of a text.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let text = self.token_text(id)?;
        Some(decoder::token_bytes(&self.inner.stages, &text))
    }

    /// The id of a token as the vocabulary writes it.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.inner.tokenizer.token_to_id(text)
    }

    /// The largest id plus one. There may be ids below it that no token has.
    pub fn vocabulary_size(&self) -> usize {
        self.inner.vocabulary
    }

    /// The ids of special tokens, in ascending order.
    pub fn special_ids(&self) -> &[u32] {
        &self.inner.special
    }

    /// Whether a token is special.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.special.binary_search(&id).is_ok()
    }

    /// What the post-processor puts after a text, which encoding leaves out: a prompt is there to be
    /// continued, and a text to be embedded ends with it.
    pub fn suffix(&self) -> &[u32] {
        &self.inner.suffix
    }

    /// The beginning-of-sequence token: the one named in the options, else the first that the
    /// post-processor adds.
    pub fn bos_id(&self) -> Option<u32> {
        self.inner.bos
    }

    /// The end-of-sequence token named in the options.
    pub fn eos_id(&self) -> Option<u32> {
        self.inner.eos
    }

    pub(super) fn stages(&self) -> &Arc<[Stage]> {
        &self.inner.stages
    }
}

impl Inner {
    fn body(&self, text: &str, parse: bool, sealed: bool) -> tokenizers::Result<Vec<u32>> {
        let tokenizer = &self.tokenizer;
        let added = if parse { tokenizer.get_added_vocabulary() } else { &self.plain };
        let mut pieces = added.extract_and_normalize(tokenizer.get_normalizer(), text);
        if sealed {
            // The marks have kept control texts from matching; the model must not see them.
            pieces.normalize(|piece| {
                ControlTexts::remove_marks(piece);
                Ok(())
            })?;
        }
        if let Some(pre_tokenizer) = tokenizer.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces)?;
        }
        if !self.in_model.is_empty() {
            // What is still text here must stay text, and this model would make `</s>` of it.
            pieces.split(|_, piece| Ok(self.in_model.cut(piece)))?;
        }
        tokenizer.get_model().tokenize_in_pretokenized(&mut pieces, None)?;
        let splits = pieces.get_splits(OffsetReferential::Normalized, OffsetType::None);
        Ok(splits.iter().flat_map(|(_, _, tokens)| tokens.iter().flatten().map(|t| t.id)).collect())
    }
}

/// The longest run of white space.
fn white_space(text: &str) -> usize {
    let mut longest = 0;
    let mut run = 0;
    for c in text.chars() {
        run = if c.is_whitespace() { run + 1 } else { 0 };
        longest = longest.max(run);
    }
    longest
}

fn looks_like_control(text: &str) -> bool {
    let inside = |open, close| text.starts_with(open) && text.ends_with(close);
    text.len() > 2 && (inside('<', '>') || inside('[', ']'))
}

/// The id of BOS or EOS, which is made special if the file forgot to.
fn named(
    file: &Path,
    tokenizer: &mut tokenizers::Tokenizer,
    field: &str,
    text: Option<&str>,
) -> Result<Option<u32>, LoadError> {
    let Some(text) = text else { return Ok(None) };
    let absent = || {
        let found = format!("{text:?}, which the vocabulary lacks");
        LoadError::invalid(file, field, "a token of the vocabulary", found)
    };
    let id = tokenizer.token_to_id(text).ok_or_else(absent)?;
    if !tokenizer.get_added_vocabulary().is_special_token(text) {
        let token = AddedToken::from(text.to_owned(), true);
        tokenizer.add_special_tokens([token]).map_err(|_| absent())?;
    }
    Ok(Some(id))
}

/// Checks that added tokens have the ids that the file says.
fn check_declared(
    file: &Path,
    tokenizer: &tokenizers::Tokenizer,
    declared: &[DeclaredToken],
) -> Result<(), LoadError> {
    for token in declared.iter().filter(|token| !token.content.is_empty()) {
        // The crate numbers added tokens itself and only warns when the file says otherwise.
        let id = tokenizer.token_to_id(&token.content);
        if id != Some(token.id) {
            let field = format!("added_tokens, {:?}", token.content);
            let expected = match id {
                Some(id) => format!("id {id}, the next one that is free or the model's own"),
                None => "a token".to_owned(),
            };
            return Err(LoadError::invalid(file, field, expected, format!("id {}", token.id)));
        }
    }
    Ok(())
}

/// Checks that ids are bounded and unambiguous, and returns the largest plus one.
fn check_ids(file: &Path, tokenizer: &tokenizers::Tokenizer) -> Result<usize, LoadError> {
    let mut ids: Vec<u32> = tokenizer.get_vocab(true).into_values().collect();
    ids.sort_unstable();
    if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
        let found = format!("two tokens with id {}", pair[0]);
        return Err(LoadError::invalid(file, "model.vocab", "one token for each id", found));
    }
    match ids.last() {
        None => Err(LoadError::invalid(file, "model.vocab", "at least one token", "none")),
        Some(&last) if last >= MAX_VOCABULARY => {
            let expected = format!("ids below {MAX_VOCABULARY}");
            Err(LoadError::invalid(file, "model.vocab", expected, format!("id {last}")))
        }
        Some(&last) => Ok(last as usize + 1),
    }
}

/// What goes before and after a text: found by processing one token that no vocabulary has.
fn around(
    file: &Path,
    tokenizer: &tokenizers::Tokenizer,
    bos: Option<u32>,
    add_bos: Option<bool>,
) -> Result<(Vec<u32>, Vec<u32>), LoadError> {
    let bad =
        |expected: &str, found: String| LoadError::invalid(file, "post_processor", expected, found);
    let (mut prefix, mut suffix) = (Vec::new(), Vec::new());
    if let Some(processor) = tokenizer.get_post_processor() {
        let probe = u32::MAX;
        let encoding = Encoding::from_tokens(vec![Token::new(probe, String::new(), (0, 0))], 0);
        let processed = caught(|| processor.process(encoding, None, true));
        let ids = match processed {
            Ok(Ok(processed)) => processed.get_ids().to_vec(),
            Ok(Err(error)) => return Err(bad("one that can be run", error.to_string())),
            Err(_) => return Err(bad("one that can be run", "contradictions".to_owned())),
        };
        if ids.iter().filter(|&&id| id == probe).count() != 1 {
            let found = "one that drops or repeats it".to_owned();
            return Err(bad("a template that holds the text once", found));
        }
        prefix.extend(ids.iter().take_while(|&&id| id != probe));
        suffix.extend(ids[prefix.len() + 1..].iter());
        if let Some(id) =
            prefix.iter().chain(&suffix).find(|&&id| tokenizer.id_to_token(id).is_none())
        {
            return Err(bad("tokens of the vocabulary", format!("id {id}")));
        }
    }
    match (add_bos, bos) {
        (None, _) => {}
        (Some(false), _) => prefix.clear(),
        (Some(true), Some(bos)) if prefix.contains(&bos) => {}
        (Some(true), Some(bos)) => prefix.insert(0, bos),
        (Some(true), None) if !prefix.is_empty() => {}
        (Some(true), None) => {
            let expected = "a bos_token, because add_bos_token is true";
            return Err(LoadError::invalid(file, "bos_token", expected, "none"));
        }
    }
    Ok((prefix, suffix))
}
