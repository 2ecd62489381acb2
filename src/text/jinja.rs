//! Rewrites the source of a template before it is compiled, for two reasons.
//!
//! - `{% generation %}` is an extension of transformers that marks what the assistant said, for
//!   training. It becomes `{% with %}`, which prints its body and nothing else.
//! - minijinja counts instructions but not memory, and one instruction can double a string. So what
//!   a template can *keep* goes through a filter that looks at its size ([`BOUNDED`]), and literal
//!   text that is printed repeatedly is paid for by the loop or macro that repeats it ([`LOOP`],
//!   [`FRAME`]), because minijinja does not show literal text to anyone when it is captured.
//!
//! Nothing is printed, no line is added and whitespace control is kept, so a template renders as
//! before and an error names the right line. What cannot be understood is left as it is: the
//! compiler will say what is wrong with it.

/// Filter: returns its value, or an error if that is too large.
pub(super) const BOUNDED: &str = "trine_bounded";
/// Filter over the items of a loop: [`BOUNDED`], and pays for the literal text of the body.
pub(super) const LOOP: &str = "trine_loop";
/// Filter over the arguments of a macro: the same for a call.
pub(super) const FRAME: &str = "trine_frame";

/// The rewritten template.
pub(super) fn rewrite(source: &str) -> String {
    let mut writer = Writer { pieces: Vec::new(), open: Vec::new() };
    let mut rest = source;
    while let Some(start) = rest.find('{') {
        let (text, tag) = rest.split_at(start);
        writer.text(text);
        rest = match tag.as_bytes().get(1) {
            Some(b'#') => writer.copy(tag, tag.find("#}").map(|end| end + 2)),
            Some(b'{') => writer.copy(tag, end_of(&tag[2..], "}}").map(|end| end + 4)),
            Some(b'%') => match end_of(&tag[2..], "%}") {
                Some(end) => writer.statement(tag, end + 2),
                None => writer.copy(tag, None),
            },
            _ => {
                writer.text("{");
                &tag[1..]
            }
        };
    }
    writer.text(rest);
    while !writer.open.is_empty() {
        writer.close();
    }
    writer.pieces.concat()
}

struct Writer {
    pieces: Vec<String>,
    open: Vec<Open>,
}

/// A loop or macro whose body is being read.
struct Open {
    /// The piece that takes the number of bytes of literal text.
    piece: usize,
    literal: usize,
}

impl Writer {
    fn text(&mut self, text: &str) {
        if let Some(open) = self.open.last_mut() {
            open.literal += text.len();
        }
        self.pieces.push(text.to_owned());
    }

    /// Copies a tag up to `end`, or everything if it does not end.
    fn copy<'s>(&mut self, tag: &'s str, end: Option<usize>) -> &'s str {
        let (copied, rest) = tag.split_at(end.unwrap_or(tag.len()));
        self.pieces.push(copied.to_owned());
        rest
    }

    fn open(&mut self) {
        self.open.push(Open { piece: self.pieces.len(), literal: 0 });
        self.pieces.push(String::new());
    }

    fn close(&mut self) {
        if let Some(open) = self.open.pop() {
            self.pieces[open.piece] = open.literal.to_string();
        }
    }

    fn piece(&mut self, text: &str) {
        self.pieces.push(text.to_owned());
    }

    /// Writes `{% … %}`; `end` is where its `%}` is.
    fn statement<'s>(&mut self, tag: &'s str, end: usize) -> &'s str {
        let rest = &tag[end + 2..];
        let mut inner = &tag[2..end];
        let mut head = String::from("{%");
        if let Some(sign) = inner.chars().next().filter(|c| matches!(c, '-' | '+')) {
            head.push(sign);
            inner = &inner[1..];
        }
        let mut tail = String::from("%}");
        if let Some(sign) = inner.chars().last().filter(|c| matches!(c, '-' | '+')) {
            tail.insert(0, sign);
            inner = &inner[..inner.len() - 1];
        }
        let trimmed = inner.trim_start();
        let word_end = trimmed.find(|c: char| !is_word(c)).unwrap_or(trimmed.len());
        let (word, body) = trimmed.split_at(word_end);
        let before = &inner[..inner.len() - trimmed.len()];
        self.piece(&head);
        match word {
            "generation" if body.trim().is_empty() => self.piece(" with "),
            "endgeneration" if body.trim().is_empty() => self.piece(" endwith "),
            "raw" => {
                self.piece(inner);
                self.piece(&tail);
                let body = end_of_raw(rest).unwrap_or(rest.len());
                self.text(&rest[..body]);
                return &rest[body..];
            }
            "set" => match find_top(body, |at| is_assignment(body, at)) {
                Some(at) => self.piece(&format!("{before}set{}", bounded(body, at))),
                None => self.piece(inner),
            },
            "with" => {
                let parts: Vec<String> = split_top(body)
                    .into_iter()
                    .map(|part| match find_top(part, |at| is_assignment(part, at)) {
                        Some(at) => bounded(part, at),
                        None => part.to_owned(),
                    })
                    .collect();
                self.piece(&format!("{before}with{}", parts.join(",")));
            }
            "for" => match find_top(body, |at| is_keyword(body, at, "in")) {
                Some(at) => {
                    let (target, items) = body.split_at(at + 2);
                    let stop =
                        |at| is_keyword(items, at, "if") || is_keyword(items, at, "recursive");
                    let (items, condition) =
                        items.split_at(find_top(items, stop).unwrap_or(items.len()));
                    self.piece(&format!("{before}for{target} ({items})|{LOOP}("));
                    self.open();
                    self.piece(&format!(") {condition}"));
                }
                None => self.piece(inner),
            },
            "macro" | "call" => {
                self.piece(inner);
                self.piece(&tail);
                // A second tag directly behind takes over how whitespace is treated.
                let names = parameters(body);
                self.piece(&format!("{{% set trine_frame_arguments = ({names})|{FRAME}("));
                self.open();
                self.piece(") ");
            }
            "endfor" | "endmacro" | "endcall" => {
                self.close();
                self.piece(inner);
            }
            _ => self.piece(inner),
        }
        self.piece(&tail);
        rest
    }
}

/// `target = value` with the value bounded; `at` is where the `=` is.
fn bounded(assignment: &str, at: usize) -> String {
    let (target, value) = assignment.split_at(at);
    format!("{target}= ({})|{BOUNDED} ", &value[1..])
}

/// The names of the parameters of a macro or call block as a tuple of variables.
fn parameters(body: &str) -> String {
    let Some(start) = body.find('(') else { return "none".to_owned() };
    // `call f(x)` has arguments and no parameters; `call(x) f()` and `macro f(x)` have.
    let Some(end) = end_of(&body[start + 1..], ")") else { return "none".to_owned() };
    let mut names = String::new();
    for part in split_top(&body[start + 1..start + 1 + end]) {
        let name = part.split('=').next().unwrap_or("").trim();
        if name.is_empty()
            || !name.chars().all(is_word)
            || name.starts_with(|c: char| c.is_numeric())
        {
            return "none".to_owned();
        }
        names.push_str(name);
        names.push(',');
    }
    if names.is_empty() { "none".to_owned() } else { names }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn is_assignment(text: &str, at: usize) -> bool {
    let bytes = text.as_bytes();
    let around = |at: Option<usize>| at.and_then(|at| bytes.get(at)).copied().unwrap_or(b' ');
    bytes[at] == b'='
        && around(Some(at + 1)) != b'='
        && !matches!(around(at.checked_sub(1)), b'=' | b'!' | b'<' | b'>')
}

fn is_keyword(text: &str, at: usize, keyword: &str) -> bool {
    text[at..].starts_with(keyword)
        && !text[..at].ends_with(is_word)
        && !text[at + keyword.len()..].starts_with(is_word)
}

/// Where `end` stands outside strings and brackets.
fn end_of(text: &str, end: &str) -> Option<usize> {
    find_top(text, |at| text[at..].starts_with(end))
}

fn end_of_raw(text: &str) -> Option<usize> {
    text.match_indices("{%").map(|(at, _)| at).find(|&at| {
        text[at + 2..].trim_start_matches(['-', '+']).trim_start().starts_with("endraw")
    })
}

fn split_top(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some(at) = find_top(rest, |at| rest[at..].starts_with(',')) {
        parts.push(&rest[..at]);
        rest = &rest[at + 1..];
    }
    if !rest.trim().is_empty() {
        parts.push(rest);
    }
    parts
}

/// The first place outside strings and brackets where `found` holds.
fn find_top(text: &str, found: impl Fn(usize) -> bool) -> Option<usize> {
    let mut depth = 0_usize;
    let mut quote = None;
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        if let Some(open) = quote {
            match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                c if c == open => quote = None,
                _ => {}
            }
            continue;
        }
        if depth == 0 && found(at) {
            return Some(at);
        }
        match c {
            '\'' | '"' => quote = Some(c),
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rewrites_what_it_should_and_nothing_else() {
        let cases = [
            ("a { b", "a { b"),
            ("{{ '}}' }}{# {% generation %} #}", "{{ '}}' }}{# {% generation %} #}"),
            ("{%- generation -%}x{% endgeneration %}", "{%- with -%}x{% endwith %}"),
            ("{% raw %}{% generation %}{% endraw %}", "{% raw %}{% generation %}{% endraw %}"),
            ("{% set x %}", "{% set x %}"),
            ("{% set x = a == b -%}", "{% set x = ( a == b )|trine_bounded -%}"),
            (
                "{% set n.x = ',=' if a else f(b=1) %}",
                "{% set n.x = ( ',=' if a else f(b=1) )|trine_bounded %}",
            ),
            (
                "{% for a, b in x.items() if 'in' in a %}12{% endfor %}",
                "{% for a, b in ( x.items() )|trine_loop(2) if 'in' in a %}12{% endfor %}",
            ),
            (
                "{% macro f(a, b='(') -%} x {%- endmacro %}",
                "{% macro f(a, b='(') -%}{% set trine_frame_arguments = (a,b,)|trine_frame(3) -%} x \
                 {%- endmacro %}",
            ),
            (
                "{% with a = 1, b = [2, 3] %}",
                "{% with a = ( 1)|trine_bounded , b = ( [2, 3] )|trine_bounded %}",
            ),
            ("{% if x", "{% if x"),
            ("{{ {'a': {'b': 1}} }}", "{{ {'a': {'b': 1}} }}"),
        ];
        for (source, expected) in cases {
            assert_eq!(rewrite(source), expected, "{source}");
        }
    }
}
