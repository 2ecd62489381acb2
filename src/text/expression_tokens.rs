//! The tokens of a Jinja expression, as minijinja's lexer cuts them.

/// A token of an expression.
#[derive(Clone, Copy)]
pub(super) struct Token<'s> {
    /// With the white space before it.
    pub(super) whole: &'s str,
    pub(super) text: &'s str,
    pub(super) kind: Kind,
}

/// What a token is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Word,
    Number,
    Text,
    Sign,
}

/// The tokens of an expression, and the white space behind the last; nothing if it has others.
pub(super) fn tokens(text: &str) -> Option<(Vec<Token<'_>>, &str)> {
    let (mut tokens, mut rest, mut after_dot) = (Vec::new(), text, false);
    loop {
        let body = rest.trim_start();
        let space = rest.len() - body.len();
        if body.is_empty() {
            return Some((tokens, rest));
        }
        let (length, kind) = token(body, after_dot)?;
        let text = &body[..length];
        tokens.push(Token { whole: &rest[..space + length], text, kind });
        after_dot = text == ".";
        rest = &body[length..];
    }
}

/// The length and kind of the token that a text begins with.
fn token(text: &str, after_dot: bool) -> Option<(usize, Kind)> {
    let bytes = text.as_bytes();
    let first = text.chars().next()?;
    let span = |accept: fn(u8) -> bool| bytes.iter().take_while(|&&byte| accept(byte)).count();
    match first {
        'a'..='z' | 'A'..='Z' | '_' => {
            Some((span(|b| b.is_ascii_alphanumeric() || b == b'_'), Kind::Word))
        }
        '0'..='9' => {
            let mut length = span(|b| b.is_ascii_alphanumeric() || b == b'_');
            let digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
            let radix = matches!(bytes.get(1), Some(b'b' | b'B' | b'o' | b'O' | b'x' | b'X'));
            if !radix && !after_dot {
                let more = |from: usize| {
                    let rest = &bytes[from..];
                    rest.iter().take_while(|b| b.is_ascii_alphanumeric() || **b == b'_').count()
                };
                if bytes.get(length) == Some(&b'.') && digit(length + 1) {
                    length += 1 + more(length + 1);
                }
                let exponent = matches!(bytes[length - 1], b'e' | b'E');
                if exponent && matches!(bytes.get(length), Some(b'+' | b'-')) && digit(length + 1) {
                    length += 1 + more(length + 1);
                }
            }
            Some((length, Kind::Number))
        }
        '\'' | '"' => {
            let mut escaped = false;
            let end = text.char_indices().skip(1).find(|&(_, c)| {
                let ends = !escaped && c == first;
                escaped = !escaped && c == '\\';
                ends
            });
            end.map(|(at, _)| (at + 1, Kind::Text))
        }
        _ if ["**", "//", "==", "!=", "<=", ">="].iter().any(|sign| text.starts_with(sign)) => {
            Some((2, Kind::Sign))
        }
        '+' | '-' | '*' | '/' | '%' | '~' | '|' | '.' | ',' | ':' | '<' | '>' | '=' | '(' | ')'
        | '[' | ']' | '{' | '}' => Some((1, Kind::Sign)),
        _ => None,
    }
}
