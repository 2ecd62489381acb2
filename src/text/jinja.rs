//! Rewrites the source of a template before it is compiled, for two reasons.
//!
//! - `{% generation %}` is an extension of transformers that marks what the assistant said, for
//!   training. It becomes `{% with %}`, which prints its body and nothing else.
//! - minijinja counts instructions but neither memory nor time, and one instruction can double a
//!   string. So every expression is rewritten to pass checks ([`expression`]), and literal text that
//!   is printed repeatedly is paid for by the loop or macro that repeats it ([`LOOP`], [`FRAME`]),
//!   because minijinja does not show literal text to anyone when it is captured.
//!
//! Nothing is printed, no line is added and whitespace control is kept, so a template renders as
//! before and an error names the right line. What cannot be understood is left as it is and marked:
//! the compiler will say what is wrong with it, and if it does not, the template is refused.

use super::expression::{self, Refused};

/// Filter over the items of a loop: checks their size and pays for the literal text of the body.
pub(super) const LOOP: &str = "trine_loop";
/// Filter over the arguments of a macro: the same for a call.
pub(super) const FRAME: &str = "trine_frame";

/// Branches of all `{% if %}`, on each of which the parser recurses.
const MAX_ELIF: usize = 300;
/// Characters that can be operators in a statement that is left as it is.
const MAX_SIGNS: usize = 100;

/// A rewritten template.
pub(super) struct Rewritten {
    pub(super) source: String,
    /// The first expression that was left as it is: its line and why.
    pub(super) refused: Option<(usize, Refused)>,
}

/// Rewrites a template.
pub(super) fn rewrite(source: &str) -> Rewritten {
    let mut writer =
        Writer { pieces: Vec::new(), open: Vec::new(), elifs: 0, line: 1, refused: None };
    let mut rest = source;
    while let Some(start) = rest.find('{') {
        let (text, tag) = rest.split_at(start);
        writer.text(text);
        writer.line += text.matches('\n').count();
        let before = tag.len();
        rest = match tag.as_bytes().get(1) {
            Some(b'#') => writer.copy(tag, tag.find("#}").map(|end| end + 2)),
            Some(b'{') => match end_of(&tag[2..], "}}") {
                Some(end) => writer.print(tag, end + 2),
                None => writer.copy(tag, None),
            },
            Some(b'%') => match end_of(&tag[2..], "%}") {
                Some(end) => writer.statement(tag, end + 2),
                None => writer.copy(tag, None),
            },
            _ => {
                writer.text("{");
                &tag[1..]
            }
        };
        let read = &source[source.len() - before..source.len() - rest.len()];
        writer.line += read.matches('\n').count();
    }
    writer.text(rest);
    while !writer.open.is_empty() {
        writer.close();
    }
    Rewritten { source: writer.pieces.concat(), refused: writer.refused }
}

struct Writer {
    pieces: Vec<String>,
    open: Vec<Open>,
    elifs: usize,
    line: usize,
    refused: Option<(usize, Refused)>,
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

    /// An expression with its checks; as it is if it cannot be rewritten.
    fn checked(
        &mut self,
        rewrite: fn(&str) -> Result<String, Refused>,
        expression: &str,
    ) -> String {
        rewrite(expression).unwrap_or_else(|refused| {
            self.refused.get_or_insert((self.line, refused));
            expression.to_owned()
        })
    }

    fn expression(&mut self, expression: &str) -> String {
        self.checked(expression::rewrite, expression)
    }

    /// `target = value` with the value checked; `at` is where the `=` is.
    fn assignment(&mut self, assignment: &str, at: usize) -> String {
        let (target, value) = assignment.split_at(at);
        format!("{target}={}", self.expression(&value[1..]))
    }

    /// Assignments and names that commas separate.
    fn assignments(&mut self, list: &str) -> String {
        let parts: Vec<String> = split_top(list)
            .into_iter()
            .map(|part| match find_top(part, |at| is_assignment(part, at)) {
                Some(at) => self.assignment(part, at),
                None => part.to_owned(),
            })
            .collect();
        parts.join(",")
    }

    /// Writes `{{ … }}`; `end` is where its `}}` is.
    fn print<'s>(&mut self, tag: &'s str, end: usize) -> &'s str {
        let (head, inner, tail) = signs(&tag[2..end]);
        let inner = self.expression(inner);
        self.piece(&format!("{{{{{head}{inner}{tail}}}}}"));
        &tag[end + 2..]
    }

    /// Writes `{% … %}`; `end` is where its `%}` is.
    fn statement<'s>(&mut self, tag: &'s str, end: usize) -> &'s str {
        let rest = &tag[end + 2..];
        let (sign, inner, tail) = signs(&tag[2..end]);
        let head = format!("{{%{sign}");
        let tail = format!("{tail}%}}");
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
                Some(at) => {
                    let assignment = self.assignment(body, at);
                    self.piece(&format!("{before}set{assignment}"));
                }
                None => self.unknown(inner),
            },
            "with" => {
                let assignments = self.assignments(body);
                self.piece(&format!("{before}with{assignments}"));
            }
            "if" | "elif" => {
                self.elifs += usize::from(word == "elif");
                if self.elifs > MAX_ELIF {
                    self.refused.get_or_insert((self.line, Refused::TooLarge));
                }
                let condition = self.expression(body);
                self.piece(&format!("{before}{word}{condition}"));
            }
            "for" => match find_top(body, |at| is_keyword(body, at, "in")) {
                Some(at) => {
                    let (target, items) = body.split_at(at + 2);
                    let stop =
                        |at| is_keyword(items, at, "if") || is_keyword(items, at, "recursive");
                    let (items, mut condition) =
                        items.split_at(find_top(items, stop).unwrap_or(items.len()));
                    let items = self.expression(items);
                    self.piece(&format!("{before}for{target} ({items})|{LOOP}("));
                    self.open();
                    self.piece(") ");
                    if let Some(test) = condition.strip_prefix("if") {
                        let end = find_top(test, |at| is_keyword(test, at, "recursive"));
                        let (test, recursive) = test.split_at(end.unwrap_or(test.len()));
                        let test = self.expression(test);
                        self.piece(&format!("if{test}"));
                        condition = recursive;
                    }
                    self.piece(condition);
                }
                None => self.unknown(inner),
            },
            "macro" | "call" => {
                let open =
                    body.find('(').filter(|&at| word == "macro" || body[..at].trim().is_empty());
                let close = open.and_then(|at| Some(at + 1 + end_of(&body[at + 1..], ")")?));
                let (list, called) = match (open, close) {
                    (Some(open), Some(close)) => {
                        let defaults = self.assignments(&body[open + 1..close]);
                        (format!("{}({defaults})", &body[..open]), &body[close + 1..])
                    }
                    _ => (String::new(), body),
                };
                let called = match word {
                    "call" => self.checked(expression::rewrite_call, called),
                    _ => called.to_owned(),
                };
                self.piece(&format!("{before}{word}{list}{called}"));
                self.piece(&tail);
                // A second tag directly behind takes over how whitespace is treated.
                let names = parameters(body);
                self.piece(&format!("{{% set trine_frame_arguments = ({names})|{FRAME}("));
                self.open();
                self.piece(") ");
            }
            "do" => {
                let called = self.checked(expression::rewrite_call, body);
                self.piece(&format!("{before}do{called}"));
            }
            "endfor" | "endmacro" | "endcall" => {
                self.close();
                self.piece(inner);
            }
            _ => self.unknown(inner),
        }
        self.piece(&tail);
        rest
    }

    /// A statement that is left as it is.
    fn unknown(&mut self, inner: &str) {
        let signs = inner.bytes().filter(|b| b"|.~+-*([<".contains(b)).count();
        if signs + inner.matches("not").count() > MAX_SIGNS {
            self.refused.get_or_insert((self.line, Refused::TooLarge));
        }
        self.piece(inner);
    }
}

/// The signs for whitespace control around the inside of a tag, and what is between them.
fn signs(inner: &str) -> (&str, &str, &str) {
    let sign = |c: char| matches!(c, '-' | '+');
    let (head, inner) = inner.split_at(usize::from(inner.starts_with(sign)));
    let (inner, tail) = inner.split_at(inner.len() - usize::from(inner.ends_with(sign)));
    (head, inner, tail)
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
            ("{{- a ~ b -}}", "{{- trine_joined( a , b) -}}"),
            ("{%- generation -%}x{% endgeneration %}", "{%- with -%}x{% endwith %}"),
            ("{% raw %}{% generation %}{% endraw %}", "{% raw %}{% generation %}{% endraw %}"),
            ("{% set x %}", "{% set x %}"),
            ("{% set x = a == b -%}", "{% set x =(( a == b)|trine_tick) -%}"),
            ("{% set n.x = ',=' if a else b %}", "{% set n.x = ',=' if a else b %}"),
            ("{% set a, b = 1, 2 %}", "{% set a, b = 1, 2 %}"),
            ("{% if a|trim %}{% elif b %}", "{% if a|trim|trine_made %}{% elif b %}"),
            (
                "{% for a, b in x.items() if 'in' in a recursive %}12{% endfor %}",
                "{% for a, b in ((( x.items())|trine_made) )|trine_loop(2) \
                 if(( 'in' in a)|trine_tick) recursive %}12{% endfor %}",
            ),
            (
                "{% macro f(a, b='(' ~ a) -%} x {%- endmacro %}",
                "{% macro f(a, b= trine_joined('(' , a)) -%}\
                 {% set trine_frame_arguments = (a,b,)|trine_frame(3) -%} x {%- endmacro %}",
            ),
            (
                "{% call(x) f(1 + 2) %}y{% endcall %}",
                "{% call(x) f( trine_added(1 , 2)) %}\
                 {% set trine_frame_arguments = (x,)|trine_frame(1) %}y{% endcall %}",
            ),
            ("{% with a = 1, b = [2, 3] %}", "{% with a = 1, b =(( [2, 3])|trine_made) %}"),
            ("{% if x", "{% if x"),
            ("{{ {'a': {'b': 1}}.a }}", "{{(( {'a':(( {'b': 1})|trine_made)})|trine_made).a }}"),
        ];
        for (source, expected) in cases {
            let rewritten = rewrite(source);
            assert_eq!(rewritten.source, expected, "{source}");
            assert_eq!(rewritten.refused, None, "{source}");
        }
        assert_eq!(rewrite("a\n{{ b c }}").refused, Some((2, Refused::Unclear)));
        let branches = "{% elif a %}".repeat(1000);
        assert_eq!(rewrite(&branches).refused, Some((1, Refused::TooLarge)));
        let filters = format!("{{% filter {} %}}", "trim|".repeat(1000));
        assert_eq!(rewrite(&filters).refused, Some((1, Refused::TooLarge)));
    }
}
