//! The tokenizer, the special tokens and the chat template in the metadata of a GGUF file.
//!
//! Keys: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>; what readers take for granted where
//! a key is missing: `src/llama-vocab.cpp` of <https://github.com/ggml-org/llama.cpp>. Kinds `gpt2` and
//! `llama` are read; see [`crate::text::vocabulary`] for what they are.
//!
//! Converters have made mistakes that are known and that the files do not let anyone see. They are
//! put right here, and [`TokenizerFiles::notes`] says so:
//!
//! - The published BitNet 2B4T names no split of the text (its converter knew of none), and has a
//!   chat template that its converter made up.
//! - bitnet.cpp calls the SentencePiece vocabulary of a Gemma embedding model `gpt2`.

use std::borrow::Cow;
use std::sync::Arc;

use super::metadata::Metadata;
use crate::checkpoint::generation_config::GenerationDefaults;
use crate::checkpoint::tokenizer_files::TokenizerFiles;
use crate::error::{LoadError, shown};
use crate::text::split::{self, Split};
use crate::text::tokenizer::{MAX_VOCABULARY, Tokenizer, TokenizerOptions};
use crate::text::vocabulary::{Alphabet, Merges, TokenEntry, TokenKind, Vocabulary};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const UNKNOWN: &str = "tokenizer.ggml.unknown_token_id";
const TEMPLATE: &str = "tokenizer.chat_template";

/// Architectures of BitNet 2B4T.
const BITNET_2B4T: [&str; 2] = ["bitnet-25", "bitnet-b1.58"];

/// Merges that a vocabulary may have for each of its tokens; published ones have up to 3.
const MERGES_PER_TOKEN: usize = 16;

/// What only the made-up template says.
const MADE_UP: &str = "BITNETAssistant";

/// The format of BitNet 2B4T: `Role: text<|eot_id|>`, as its model card on Hugging Face has it.
const BITNET_TEMPLATE: &str = "{% for message in messages %}{{ message['role'] | capitalize }}: \
    {{ message['content'] | trim }}<|eot_id|>{% endfor %}\
    {% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}";

/// A tokenizer that is still in the metadata of its file.
#[derive(Debug, Clone)]
pub(crate) struct GgufTokenizer {
    metadata: Arc<Metadata>,
    kind: Kind,
    space: Option<bool>,
    options: TokenizerOptions,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    ByteLevel(&'static Split),
    /// SentencePiece with scores.
    Scored,
    /// SentencePiece with merges.
    Listed,
}

/// Reads what there is; a file need not have any of it. The vocabulary stays where it is.
pub(crate) fn read(metadata: &Arc<Metadata>) -> Result<TokenizerFiles, LoadError> {
    let mut files =
        TokenizerFiles { tokenizer_path: metadata.file.to_path_buf(), ..TokenizerFiles::default() };
    files.chat_template = metadata.string(TEMPLATE)?.map(str::to_owned);
    if let Some(names) = metadata.strings("tokenizer.chat_templates")? {
        for name in names {
            let name = name?;
            if let Some(template) = metadata.string(&format!("{TEMPLATE}.{name}"))? {
                files.named_chat_templates.push((name.to_owned(), template.to_owned()));
            }
        }
    }
    let Some(vocabulary) = Scan::read(metadata)? else { return Ok(files) };
    let kind = kind(metadata, &vocabulary, &mut files.notes)?;
    put_template_right(metadata, &vocabulary, &mut files)?;

    let add_bos = match kind {
        Kind::ByteLevel(split) => split.add_bos,
        Kind::Scored | Kind::Listed => true,
    };
    files.bos_token = vocabulary.text(metadata, vocabulary.bos)?;
    files.eos_token = vocabulary.text(metadata, vocabulary.eos)?;
    let add_bos = add_bos && files.bos_token.is_some();
    files.add_bos_token =
        Some(metadata.boolean("tokenizer.ggml.add_bos_token")?.unwrap_or(add_bos));
    files.add_eos_token = metadata.boolean("tokenizer.ggml.add_eos_token")?;
    files.gguf = Some(GgufTokenizer {
        metadata: Arc::clone(metadata),
        kind,
        space: metadata.boolean("tokenizer.ggml.add_space_prefix")?,
        options: TokenizerOptions {
            bos_token: files.bos_token.clone(),
            eos_token: files.eos_token.clone(),
            add_bos_token: files.add_bos_token,
        },
    });
    Ok(files)
}

/// The tokens that begin a text and end an answer, as `generation_config.json` has them.
pub(crate) fn generation(metadata: &Metadata) -> Result<GenerationDefaults, LoadError> {
    let mut defaults = GenerationDefaults::default();
    if let Some(vocabulary) = Scan::read(metadata)? {
        defaults.bos_token_id = vocabulary.bos;
        for end in [vocabulary.eos, vocabulary.eot, vocabulary.eom].into_iter().flatten() {
            if !defaults.eos_token_ids.contains(&end) {
                defaults.eos_token_ids.push(end);
            }
        }
    }
    Ok(defaults)
}

/// What one look at the vocabulary shows.
struct Scan {
    model: String,
    bos: Option<u32>,
    eos: Option<u32>,
    eot: Option<u32>,
    eom: Option<u32>,
    /// It has the control tokens of Llama 3.
    llama3: bool,
    /// It has a token for each byte, written as SentencePiece writes it.
    byte_tokens: bool,
}

impl Scan {
    /// `None` for a file without a tokenizer.
    fn read(metadata: &Metadata) -> Result<Option<Self>, LoadError> {
        let model = match metadata.string(MODEL)? {
            None | Some("none" | "no_vocab") => return Ok(None),
            Some(model) => model.to_owned(),
        };
        let tokens = metadata.strings(TOKENS)?;
        let tokens = tokens.ok_or_else(|| metadata.wrong(TOKENS, "an array of strings"))?;
        let count = tokens.len();
        if count > MAX_VOCABULARY as usize {
            return Err(metadata.wrong(TOKENS, format!("up to {MAX_VOCABULARY} tokens")));
        }
        let (mut begin, mut end_of_turn) = (false, false);
        let mut bytes = [false; 256];
        for token in tokens {
            match token? {
                "<|begin_of_text|>" => begin = true,
                "<|eot_id|>" => end_of_turn = true,
                token => {
                    if let Some(byte) = byte_of(token) {
                        bytes[usize::from(byte)] = true;
                    }
                }
            }
        }
        let id = |name: &str, otherwise: Option<u32>| -> Result<Option<u32>, LoadError> {
            let key = format!("tokenizer.ggml.{name}_token_id");
            match metadata.integer(&key, 0..=u64::MAX)? {
                None => Ok(otherwise.filter(|id| (*id as usize) < count)),
                // How llama.cpp writes that there is none.
                Some(none) if none == u64::from(u32::MAX) => Ok(None),
                Some(id) if id < count as u64 => Ok(u32::try_from(id).ok()),
                Some(_) => {
                    let expected = format!("the id of one of the {count} tokens");
                    Err(metadata.wrong(&key, expected))
                }
            }
        };
        let sentencepiece = model == "llama";
        Ok(Some(Self {
            bos: id("bos", sentencepiece.then_some(1))?,
            eos: id("eos", sentencepiece.then_some(2))?,
            eot: id("eot", None)?,
            eom: id("eom", None)?,
            model,
            llama3: begin && end_of_turn,
            byte_tokens: bytes.iter().all(|found| *found),
        }))
    }

    /// The text of a token.
    fn text(&self, metadata: &Metadata, id: Option<u32>) -> Result<Option<String>, LoadError> {
        let (Some(id), Some(mut tokens)) = (id, metadata.strings(TOKENS)?) else {
            return Ok(None);
        };
        let text = tokens.nth(id as usize).transpose()?.unwrap_or_default();
        if text.is_empty() {
            let field = format!("{TOKENS}[{id}]");
            return Err(LoadError::invalid(
                &metadata.file,
                field,
                "the text of a special token",
                "none",
            ));
        }
        Ok(Some(text.to_owned()))
    }
}

/// The byte that a token such as `<0x0A>` stands for.
fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let upper = digits.len() == 2 && !digits.contains(|c: char| !c.is_ascii_hexdigit());
    if upper { u8::from_str_radix(digits, 16).ok() } else { None }
}

fn kind(metadata: &Metadata, scan: &Scan, notes: &mut Vec<String>) -> Result<Kind, LoadError> {
    let architecture = metadata.string("general.architecture")?.unwrap_or_default();
    match scan.model.as_str() {
        "llama" => return Ok(Kind::Scored),
        "gpt2" => {}
        _ => return Err(metadata.unsupported(MODEL, "gpt2, llama")),
    }
    let pre = metadata.string(PRE)?.filter(|name| *name != "default");
    if let Some(name) = pre {
        return Split::named(name)
            .map(Kind::ByteLevel)
            .ok_or_else(|| metadata.unsupported(PRE, Split::all_names()));
    }
    if scan.byte_tokens {
        notes.push(format!(
            "{MODEL} is \"gpt2\", but the vocabulary is SentencePiece's: it is read as such"
        ));
        return Ok(Kind::Listed);
    }
    let unnamed = match metadata.string(PRE)? {
        None => format!("{PRE} is missing"),
        Some(name) => format!("{PRE} is {name:?}"),
    };
    if BITNET_2B4T.contains(&architecture) || scan.llama3 {
        let why = match scan.llama3 {
            true => "the vocabulary is Llama 3's".to_owned(),
            false => format!("the architecture is {architecture}"),
        };
        notes.push(format!("{unnamed}: text is split as for llama-bpe, because {why}"));
        return Ok(Kind::ByteLevel(&split::LLAMA3));
    }
    let doubt = format!(
        "{unnamed}: text is split as llama.cpp does then, and tokens may not be those that the \
         model was trained with"
    );
    tracing::warn!("{}: {doubt}", shown(&metadata.file));
    notes.push(doubt);
    Ok(Kind::ByteLevel(&split::DEFAULT))
}

fn put_template_right(
    metadata: &Metadata,
    scan: &Scan,
    files: &mut TokenizerFiles,
) -> Result<(), LoadError> {
    let architecture = metadata.string("general.architecture")?.unwrap_or_default();
    let made_up = architecture.starts_with("bitnet")
        && files.chat_template.as_ref().is_some_and(|template| template.contains(MADE_UP));
    let is_2b4t = scan.llama3 && BITNET_2B4T.contains(&architecture);
    let what = match &files.chat_template {
        Some(_) if made_up => "the chat template in the file was made up by its converter",
        None if is_2b4t => "the file has no chat template",
        _ => return Ok(()),
    };
    if scan.llama3 {
        files.chat_template = Some(BITNET_TEMPLATE.to_owned());
        files.notes.push(format!("{what}: that of BitNet 2B4T is used (\"User: …<|eot_id|>\")"));
    } else {
        files.chat_template = None;
        files.notes.push(format!("{what}: it is not used"));
    }
    Ok(())
}

impl GgufTokenizer {
    /// Builds the tokenizer.
    pub(crate) fn build(&self) -> Result<Tokenizer, LoadError> {
        let metadata = &*self.metadata;
        let mut tokens = self.tokens()?;
        let unknown = match metadata.integer(UNKNOWN, 0..=u64::MAX)? {
            Some(id) if id < tokens.len() as u64 => Some(id as u32),
            Some(id) if id != u64::from(u32::MAX) => {
                let expected = format!("the id of one of the {} tokens", tokens.len());
                return Err(metadata.wrong(UNKNOWN, expected));
            }
            _ => self.first_unknown()?,
        };
        let (merges, alphabet) = match self.kind {
            Kind::ByteLevel(split) => {
                let space = self.space.unwrap_or(false);
                (Merges::Listed(self.merges()?), Alphabet::ByteLevel { split, space })
            }
            Kind::Scored => {
                let space = self.space.unwrap_or(true);
                (self.scores(&tokens)?, Alphabet::SentencePiece { space })
            }
            Kind::Listed => {
                let space = self.space.unwrap_or(false);
                (Merges::Listed(self.merges()?), Alphabet::SentencePiece { space })
            }
        };
        if matches!(alphabet, Alphabet::SentencePiece { space: false }) {
            // Converters write spaces for the marks in these tokens, and in nothing else.
            for token in &mut tokens {
                if token.kind == TokenKind::UserDefined && token.text.contains(' ') {
                    token.text = Cow::Owned(token.text.replace(' ', "▁"));
                }
            }
        }
        let vocabulary = Vocabulary { tokens, merges, alphabet, unknown };
        vocabulary.build(&metadata.file, &self.options)
    }

    fn tokens(&self) -> Result<Vec<TokenEntry<'_>>, LoadError> {
        let metadata = &*self.metadata;
        let texts = metadata.strings(TOKENS)?;
        let texts = texts.ok_or_else(|| metadata.wrong(TOKENS, "an array of strings"))?;
        let count = texts.len();
        let mut types = metadata.integers(TYPES)?;
        if types.as_ref().is_some_and(|types| types.len() != count) {
            return Err(metadata.wrong(TYPES, format!("a type for each of the {count} tokens")));
        }
        let mut tokens = Vec::with_capacity(count);
        for (id, text) in texts.enumerate() {
            let text = text?;
            let kind = match types.as_mut().and_then(Iterator::next) {
                // The files of a time before types have nothing but these.
                None if byte_of(text).is_some() => TokenKind::Byte,
                None | Some(0 | 1) => TokenKind::Normal,
                Some(2 | 3) => TokenKind::Control,
                Some(4) => TokenKind::UserDefined,
                Some(5) => TokenKind::Unused,
                Some(6) => TokenKind::Byte,
                Some(other) => {
                    let field = format!("{TYPES}[{id}]");
                    let expected = "a type of token from 0 to 6";
                    return Err(LoadError::invalid(
                        &metadata.file,
                        field,
                        expected,
                        other.to_string(),
                    ));
                }
            };
            let text = if is_padding(text, id, kind) { "" } else { text };
            tokens.push(TokenEntry { text: Cow::Borrowed(text), kind });
        }
        Ok(tokens)
    }

    /// The token that a file without `unknown_token_id` means.
    fn first_unknown(&self) -> Result<Option<u32>, LoadError> {
        let mut types = self.metadata.integers(TYPES)?;
        let typed = types.as_mut().and_then(|types| types.position(|kind| kind == 2));
        if typed.is_some() || matches!(self.kind, Kind::ByteLevel(_)) {
            return Ok(typed.map(|id| id as u32));
        }
        let mut tokens = self.metadata.strings(TOKENS)?;
        let named =
            tokens.as_mut().and_then(|all| all.position(|text| matches!(text, Ok("<unk>"))));
        Ok(named.map(|id| id as u32))
    }

    fn merges(&self) -> Result<Vec<(&str, &str)>, LoadError> {
        let metadata = &*self.metadata;
        let merges = metadata.strings(MERGES)?;
        let merges = merges.ok_or_else(|| metadata.wrong(MERGES, "an array of strings"))?;
        let tokens = metadata.strings(TOKENS)?.map_or(0, |tokens| tokens.len());
        if merges.len() > MERGES_PER_TOKEN * tokens {
            let expected = format!("at most {MERGES_PER_TOKEN} for each of the {tokens} tokens");
            return Err(metadata.wrong(MERGES, expected));
        }
        merges
            .enumerate()
            .map(|(index, merge)| {
                let merge = merge?;
                // A token may begin with a space.
                let mut spaces = merge.char_indices().skip(1).filter(|(_, c)| *c == ' ');
                spaces.next().map(|(at, _)| (&merge[..at], &merge[at + 1..])).ok_or_else(|| {
                    let field = format!("{MERGES}[{index}]");
                    let expected = "two tokens with a space between";
                    LoadError::invalid(&metadata.file, field, expected, format!("{merge:.40?}"))
                })
            })
            .collect()
    }

    /// Scores as they are; ids where all scores are the same, which is how converters write that
    /// they had none.
    fn scores(&self, tokens: &[TokenEntry<'_>]) -> Result<Merges<'static>, LoadError> {
        let metadata = &*self.metadata;
        let scores: Vec<f32> = match metadata.integers(SCORES) {
            Ok(None) => return Ok(Merges::Ids),
            Ok(Some(scores)) => scores.map(|score| score as f32).collect(),
            Err(_) => metadata.floats(SCORES)?.into_iter().flatten().map(|s| s as f32).collect(),
        };
        if scores.len() != tokens.len() {
            let expected = format!("a score for each of the {} tokens", tokens.len());
            return Err(metadata.wrong(SCORES, expected));
        }
        let normal =
            tokens.iter().zip(&scores).filter(|(token, _)| token.kind == TokenKind::Normal);
        let mut normal = normal.map(|(_, score)| *score);
        let first = normal.next();
        let same = normal.all(|score| Some(score) == first);
        Ok(if same { Merges::Ids } else { Merges::Scores(scores) })
    }
}

/// Whether converters wrote this to fill the vocabulary up to the rows of the embedding table.
fn is_padding(text: &str, id: usize, kind: TokenKind) -> bool {
    let number = text.strip_prefix("[PAD").and_then(|rest| rest.strip_suffix(']'));
    let number = number.and_then(|digits| digits.parse::<usize>().ok());
    match kind {
        TokenKind::Unused => number.is_some(),
        TokenKind::UserDefined => number == Some(id),
        _ => false,
    }
}
