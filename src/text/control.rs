//! The texts of control tokens, and how they are kept from becoming tokens in what users wrote.

use serde_json::Value;
use tokenizers::NormalizedString;
use tokenizers::normalizer::Range;

/// Noncharacters: Unicode reserves them for use inside a program, so no text may hold them and
/// dropping them from a message loses nothing.
const OPEN: char = '\u{FDD0}';
const CLOSE: char = '\u{FDD1}';

/// A set of texts, found by their first byte.
#[derive(Debug)]
pub(super) struct ControlTexts {
    /// By first byte, longest first.
    texts: Vec<Vec<String>>,
    count: usize,
}

impl ControlTexts {
    pub(super) fn new<'a>(all: impl Iterator<Item = &'a str>) -> Self {
        let mut texts = vec![Vec::new(); 256];
        let mut count = 0;
        for text in all {
            if let Some(&first) = text.as_bytes().first() {
                texts[usize::from(first)].push(text.to_owned());
                count += 1;
            }
        }
        texts.iter_mut().for_each(|list| list.sort_by_key(|text| std::cmp::Reverse(text.len())));
        Self { texts, count }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The longest control text that `text` starts with.
    fn at_start<'t>(&self, text: &'t str) -> Option<&'t str> {
        let list = &self.texts[usize::from(*text.as_bytes().first()?)];
        let found = list.iter().find(|control| text.starts_with(control.as_str()))?;
        Some(&text[..found.len()])
    }

    /// Wraps the control texts in every string of a JSON value in marks, which survive a template.
    /// Returns whether there were any.
    pub(super) fn wrap_all(&self, value: &mut Value) -> bool {
        match value {
            Value::String(text) => match self.wrap(text) {
                Some(wrapped) => {
                    *text = wrapped;
                    true
                }
                None => false,
            },
            Value::Array(items) => items.iter_mut().fold(false, |any, v| self.wrap_all(v) | any),
            Value::Object(map) => map.values_mut().fold(false, |any, v| self.wrap_all(v) | any),
            _ => false,
        }
    }

    fn wrap(&self, text: &str) -> Option<String> {
        // Marks in the text itself could forge or undo a wrapping.
        let clean: String = text.chars().filter(|&c| c != OPEN && c != CLOSE).collect();
        let mut out = String::with_capacity(clean.len());
        let mut rest = clean.as_str();
        let mut wrapped = clean.len() != text.len();
        while let Some(c) = rest.chars().next() {
            match self.at_start(rest) {
                Some(control) => {
                    out.extend([OPEN]);
                    out.push_str(control);
                    out.push(CLOSE);
                    rest = &rest[control.len()..];
                    wrapped = true;
                }
                None => {
                    out.push(c);
                    rest = &rest[c.len_utf8()..];
                }
            }
        }
        wrapped.then_some(out)
    }

    /// Puts a mark after every character of the wrapped texts, so that no part of one can match.
    /// Marks that a template has torn apart stay as they are: they still divide the text.
    pub(super) fn seal(&self, rendered: &str) -> String {
        let mut out = String::with_capacity(rendered.len());
        let mut rest = rendered;
        while let Some(c) = rest.chars().next() {
            out.push(c);
            rest = &rest[c.len_utf8()..];
            if c == OPEN
                && let Some(control) = self.at_start(rest)
                && rest[control.len()..].starts_with(CLOSE)
            {
                for c in control.chars() {
                    out.extend([c, OPEN]);
                }
                rest = &rest[control.len()..];
            }
        }
        out
    }

    pub(super) fn remove_marks(piece: &mut NormalizedString) {
        if piece.get().contains([OPEN, CLOSE]) {
            piece.filter(|c| c != OPEN && c != CLOSE);
        }
    }

    /// Cuts a piece after the first character of every control text in it.
    pub(super) fn cut(&self, piece: NormalizedString) -> Vec<NormalizedString> {
        let text = piece.get();
        let cuts = text.char_indices().filter(|&(at, _)| self.at_start(&text[at..]).is_some());
        let mut cuts: Vec<usize> = cuts.map(|(at, c)| at + c.len_utf8()).collect();
        if cuts.is_empty() {
            return vec![piece];
        }
        cuts.push(text.len());
        let mut from = 0;
        let mut parts = Vec::with_capacity(cuts.len());
        for to in cuts {
            parts.extend((from < to).then(|| piece.slice(Range::Normalized(from..to))).flatten());
            from = to;
        }
        parts
    }
}
