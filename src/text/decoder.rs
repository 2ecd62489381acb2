//! From tokens to text, one token at a time.
//!
//! The `decoder` of a `tokenizer.json` is a list of stages, each a function from a list of strings
//! to a list of strings. Read as streams, the stages that generative checkpoints use need at most a
//! few bytes of state each. So there is one implementation, the streaming one, and decoding a
//! whole list of ids is defined as streaming it: the two cannot disagree.
//!
//! The result equals that of the `tokenizers` crate with one exception. A run of byte tokens
//! (`<0xE5>`) that is partly valid UTF-8 becomes replacement characters from end to end there, which
//! cannot be known before the run ends; here, as in SentencePiece itself, its valid characters are
//! kept and each invalid byte becomes one replacement character.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::tokenizer::Tokenizer;
use crate::error::LoadError;

const SUPPORTED: &str = "ByteLevel, Replace, ByteFallback, Fuse, Strip, Metaspace and Sequences of \
                         them in an order that can be streamed";
const REPLACEMENT: &str = "\u{FFFD}";

/// Published tokenizers have up to 5.
const MAX_STAGES: usize = 32;
/// Decoders that each make a token longer multiply.
const MAX_GROWTH: usize = 256;

/// One stage. `fused` means that all text before it counts as one token.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Stage {
    /// No decoder: tokens are joined by spaces.
    Join,
    Replace {
        from: String,
        to: String,
    },
    ByteFallback,
    ByteLevel,
    Strip {
        content: char,
        start: usize,
        stop: usize,
        fused: bool,
    },
    /// `drops`: the replacement character vanishes from the first token instead of becoming a space.
    Metaspace {
        replacement: char,
        drops: bool,
        fused: bool,
    },
}

/// Reads the `decoder` of a `tokenizer.json`.
pub(super) fn stages(file: &Path, decoder: Option<&Value>) -> Result<Arc<[Stage]>, LoadError> {
    let mut out = Vec::new();
    match decoder {
        None | Some(Value::Null) => out.push(Stage::Join),
        Some(decoder) => read_stage(file, decoder, &mut false, &mut out, 0)?,
    }
    let growth = out.iter().fold(1_usize, |growth, stage| match stage {
        Stage::Replace { from, to } => growth.saturating_mul(to.len().div_ceil(from.len()).max(1)),
        _ => growth,
    });
    if out.len() > MAX_STAGES || growth > MAX_GROWTH {
        let expected = format!(
            "at most {MAX_STAGES} decoders, that make a token at most {MAX_GROWTH} times longer"
        );
        let found = format!("{}, that can make it {growth} times longer", out.len());
        return Err(LoadError::invalid(file, "decoder", expected, found));
    }
    Ok(out.into())
}

fn read_stage(
    file: &Path,
    json: &Value,
    fused: &mut bool,
    out: &mut Vec<Stage>,
    depth: usize,
) -> Result<(), LoadError> {
    let kind = json.get("type").and_then(Value::as_str).unwrap_or("without a type");
    let refuse =
        || Err(LoadError::unsupported(file, "decoder", format!("a decoder {kind}"), SUPPORTED));
    let wrong = |field: &str, expected: &str| {
        let found = json.get(field).map_or("nothing".to_owned(), brief);
        LoadError::invalid(file, format!("decoder {kind}, {field}"), expected, found)
    };
    let char_of = |field: &str| {
        let mut chars = json.get(field).and_then(Value::as_str).unwrap_or("").chars();
        match (chars.next(), chars.next()) {
            (Some(c), None) => Ok(c),
            _ => Err(wrong(field, "one character")),
        }
    };
    let count_of = |field: &str| {
        let count = json.get(field).and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok());
        count.map(|n| n as usize).ok_or_else(|| wrong(field, "a number of characters"))
    };
    match kind {
        "Sequence" if depth < 8 => {
            let parts = json.get("decoders").and_then(Value::as_array);
            for part in parts.ok_or_else(|| wrong("decoders", "a list of decoders"))? {
                read_stage(file, part, fused, out, depth + 1)?;
            }
        }
        "ByteLevel" if !*fused => {
            out.push(Stage::ByteLevel);
            *fused = true;
        }
        "ByteFallback" if !*fused => out.push(Stage::ByteFallback),
        "Fuse" => *fused = true,
        "Replace" => {
            let pattern = json.get("pattern").and_then(|p| p.get("String")).and_then(Value::as_str);
            let from = pattern.ok_or_else(|| wrong("pattern", "{\"String\": …}"))?.to_owned();
            let content = json.get("content").and_then(Value::as_str);
            let to = content.ok_or_else(|| wrong("content", "a string"))?.to_owned();
            // In fused text a longer pattern could lie across two tokens.
            if from.is_empty() || (*fused && from.chars().count() > 1) {
                return refuse();
            }
            out.push(Stage::Replace { from, to });
        }
        "Strip" => out.push(Stage::Strip {
            content: char_of("content")?,
            start: count_of("start")?,
            stop: count_of("stop")?,
            fused: *fused,
        }),
        "Metaspace" => {
            let scheme = json.get("prepend_scheme").and_then(Value::as_str).unwrap_or("always");
            // Files from before `prepend_scheme` say it with `add_prefix_space`.
            let legacy = json.get("add_prefix_space").and_then(Value::as_bool) == Some(false);
            out.push(Stage::Metaspace {
                replacement: char_of("replacement")?,
                drops: scheme != "never" && !legacy,
                fused: *fused,
            });
        }
        _ => return refuse(),
    }
    Ok(())
}

/// A JSON value cut to a length that fits a message.
pub(super) fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Turns ids into text as they arrive.
///
/// The pieces returned, put one after another, are exactly [`Tokenizer::decode`] of all the ids. Text
/// that a later id could still change (an incomplete UTF-8 sequence, a trailing space that the
/// decoder may strip) is held back: a few bytes, whatever the length of the text.
///
/// ```no_run
/// # fn demo(tokenizer: &trine::text::Tokenizer, ids: &[u32]) {
/// let mut stream = tokenizer.detokenizer(true);
/// for &id in ids {
///     if let Some(text) = stream.push(id) {
///         print!("{text}");
///     }
/// }
/// print!("{}", stream.finish().unwrap_or_default());
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special: bool,
    run: Run,
}

impl Detokenizer {
    pub(super) fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        let run = Run::new(tokenizer.stages().clone());
        Self { tokenizer, skip_special, run }
    }

    /// Takes the next id and returns the text that is now certain, if there is any. An id that the
    /// vocabulary lacks adds nothing, as in the `tokenizers` crate.
    pub fn push(&mut self, id: u32) -> Option<String> {
        if !(self.skip_special && self.tokenizer.is_special(id))
            && let Some(token) = self.tokenizer.token_text(id)
        {
            self.run.feed(0, &token);
        }
        self.run.take()
    }

    /// Ends the text and returns what was held back; an incomplete UTF-8 sequence becomes a
    /// replacement character. The detokenizer is then ready for another text.
    pub fn finish(&mut self) -> Option<String> {
        self.run.finish();
        let rest = self.run.take();
        self.run = Run::new(self.tokenizer.stages().clone());
        rest
    }
}

#[derive(Debug, Clone)]
struct Run {
    stages: Arc<[Stage]>,
    states: Vec<State>,
    out: String,
}

/// What one stage remembers; each kind of stage uses its own fields.
#[derive(Debug, Clone, Default)]
struct State {
    /// Something has passed already.
    begun: bool,
    /// Bytes that are not yet a whole character.
    bytes: Vec<u8>,
    /// `Strip`, fused: how many characters have been stripped from the start, and whether more may.
    stripped: usize,
    /// `Strip`, fused: how many strippable characters the text so far ends in, at most `stop`.
    trailing: usize,
}

impl Run {
    fn new(stages: Arc<[Stage]>) -> Self {
        let states = vec![State::default(); stages.len()];
        Self { stages, states, out: String::new() }
    }

    fn take(&mut self) -> Option<String> {
        (!self.out.is_empty()).then(|| std::mem::take(&mut self.out))
    }

    fn feed(&mut self, at: usize, piece: &str) {
        let Some(stage) = self.stages.get(at).cloned() else {
            self.out.push_str(piece);
            return;
        };
        let state = &mut self.states[at];
        let begun = std::mem::replace(&mut state.begun, true);
        match stage {
            Stage::Join => {
                if begun {
                    self.feed(at + 1, " ");
                }
                self.feed(at + 1, piece);
            }
            Stage::Replace { from, to } => self.feed(at + 1, &piece.replace(&from, &to)),
            Stage::ByteLevel => {
                byte_level_bytes(piece, &mut state.bytes);
                let text = drain_lossy(&mut state.bytes);
                self.feed_unless_empty(at + 1, &text);
            }
            Stage::ByteFallback => match byte_token(piece) {
                Some(byte) => {
                    state.bytes.push(byte);
                    let text = drain_bytes(&mut state.bytes);
                    self.feed_unless_empty(at + 1, &text);
                }
                None => {
                    self.flush(at);
                    self.feed(at + 1, piece);
                }
            },
            Stage::Metaspace { replacement, drops, fused } => {
                let first = drops && (fused || !begun);
                let text: String = piece
                    .chars()
                    .filter_map(|c| match c == replacement {
                        true if first => None,
                        true => Some(' '),
                        false => Some(c),
                    })
                    .collect();
                self.feed(at + 1, &text);
            }
            Stage::Strip { content, start, stop, fused: false } => {
                let text = strip_prefix(piece, content, start);
                let kept = strip_suffix(text, content, stop);
                self.feed(at + 1, kept);
            }
            Stage::Strip { content, start, stop, fused: true } => {
                let left = start.saturating_sub(state.stripped);
                let text = strip_prefix(piece, content, left);
                // Once any other character has passed, nothing at the start can be stripped.
                state.stripped = match text.is_empty() {
                    true => state.stripped + piece.chars().count(),
                    false => start,
                };
                let body = strip_suffix(text, content, usize::MAX);
                let run = text[body.len()..].chars().count();
                let run = if body.is_empty() { state.trailing + run } else { run };
                let mut sure = String::new();
                if !body.is_empty() {
                    sure.extend(std::iter::repeat_n(content, state.trailing));
                    sure.push_str(body);
                }
                state.trailing = run.min(stop);
                sure.extend(std::iter::repeat_n(content, run - run.min(stop)));
                self.feed_unless_empty(at + 1, &sure);
            }
        }
    }

    /// Bytes that are not yet a character make no token of their own.
    fn feed_unless_empty(&mut self, at: usize, piece: &str) {
        if !piece.is_empty() {
            self.feed(at, piece);
        }
    }

    fn flush(&mut self, at: usize) {
        let bytes = std::mem::take(&mut self.states[at].bytes);
        if !bytes.is_empty() {
            let text = match self.stages[at] {
                // An incomplete sequence is one replacement character here,
                Stage::ByteLevel => String::from_utf8_lossy(&bytes).into_owned(),
                // and one for each of its bytes here.
                _ => REPLACEMENT.repeat(bytes.len()),
            };
            self.feed(at + 1, &text);
        }
    }

    fn finish(&mut self) {
        for at in 0..self.stages.len() {
            self.flush(at);
        }
    }
}

/// The start of `bytes` that is certain, as `from_utf8_lossy` reads it: one replacement character
/// for each maximal invalid part.
fn drain_lossy(bytes: &mut Vec<u8>) -> String {
    drain(bytes, |invalid| (invalid, 1))
}

/// The same as SentencePiece reads it: one replacement character for each invalid byte.
fn drain_bytes(bytes: &mut Vec<u8>) -> String {
    drain(bytes, |_| (1, 1))
}

fn drain(bytes: &mut Vec<u8>, invalid: impl Fn(usize) -> (usize, usize)) -> String {
    let mut text = String::new();
    let mut at = 0;
    loop {
        match std::str::from_utf8(&bytes[at..]) {
            Ok(rest) => {
                text.push_str(rest);
                at = bytes.len();
                break;
            }
            Err(error) => {
                let valid = at + error.valid_up_to();
                text.push_str(&String::from_utf8_lossy(&bytes[at..valid]));
                at = valid;
                let Some(length) = error.error_len() else { break };
                let (skip, count) = invalid(length);
                text.push_str(&REPLACEMENT.repeat(count));
                at += skip;
            }
        }
    }
    bytes.drain(..at);
    text
}

/// The byte that a token such as `<0xE5>` stands for, by the rule of the `tokenizers` crate.
fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// Undoes GPT-2's mapping of bytes to printable characters. A token with any other character in
/// it stands for its own UTF-8, as in the `tokenizers` crate.
fn byte_level_bytes(token: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for c in token.chars() {
        match byte_level_byte(c) {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(start);
                out.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

/// The printable bytes of Latin-1 stand for themselves; the other 68 bytes, in order, are the
/// characters from U+0100.
fn byte_level_byte(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// The bytes that a token adds in the middle of a text.
pub(super) fn token_bytes(stages: &[Stage], token: &str) -> Vec<u8> {
    let mut text = token.to_owned();
    for stage in stages {
        match stage {
            Stage::ByteLevel => {
                let mut bytes = Vec::new();
                byte_level_bytes(&text, &mut bytes);
                return bytes;
            }
            Stage::ByteFallback => {
                if let Some(byte) = byte_token(&text) {
                    return vec![byte];
                }
            }
            Stage::Replace { from, to } => text = text.replace(from, to),
            Stage::Metaspace { replacement, .. } => text = text.replace(*replacement, " "),
            Stage::Join | Stage::Strip { .. } => {}
        }
    }
    text.into_bytes()
}

fn strip_prefix(mut text: &str, content: char, at_most: usize) -> &str {
    for _ in 0..at_most {
        match text.strip_prefix(content) {
            Some(rest) => text = rest,
            None => break,
        }
    }
    text
}

fn strip_suffix(mut text: &str, content: char, at_most: usize) -> &str {
    for _ in 0..at_most {
        match text.strip_suffix(content) {
            Some(rest) => text = rest,
            None => break,
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_level_is_a_bijection() {
        let mut seen: Vec<u8> =
            (0..0x200).filter_map(char::from_u32).filter_map(byte_level_byte).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..=255).collect::<Vec<u8>>());
        assert_eq!(byte_level_byte('Ġ'), Some(b' '));
        assert_eq!(byte_level_byte('Ċ'), Some(b'\n'));
    }

    #[test]
    fn fused_strip_follows_the_whole_text() {
        let stage = Stage::Strip { content: ' ', start: 1, stop: 2, fused: true };
        for pieces in [vec![" ", " a ", " ", " b", "  ", " "], vec![" "], vec![""], vec!["a", " "]]
        {
            let mut run = Run::new(vec![stage.clone()].into());
            let mut text = String::new();
            for piece in &pieces {
                run.feed(0, piece);
                text.extend(run.take());
            }
            run.finish();
            text.extend(run.take());
            let whole = pieces.concat();
            assert_eq!(text, strip_suffix(strip_prefix(&whole, ' ', 1), ' ', 2), "{pieces:?}");
        }
    }
}
