//! Rewrites a Jinja expression so that a check stands before and behind everything it builds.
//!
//! minijinja has no limit on memory, and an expression can build much: `x ~ x ~ x ~ …` of a text
//! of a megabyte, lists of lists, a filter mapped over many. So concatenation, addition and
//! multiplication become calls of functions that look before they build ([`JOINED`], [`ADDED`],
//! [`MULTIPLIED`]), what filters, calls, slices and literals build passes a filter ([`MADE`]), and
//! what only reads passes one that looks at the clock ([`TICK`]). The value is the same.
//!
//! The grammar is the one of minijinja's parser, with limits on depth and length: it recurses
//! without one for signs and `not`, and its compiler for long chains.

use super::expression_tokens::{Kind, Token, tokens};

/// Function: `a ~ b ~ …`.
pub(super) const JOINED: &str = "trine_joined";
/// Function: `a + b + …`.
pub(super) const ADDED: &str = "trine_added";
/// Function: `a * b`.
pub(super) const MULTIPLIED: &str = "trine_multiplied";
/// Filter: returns its value, which has been built, or an error if that was too much.
pub(super) const MADE: &str = "trine_made";
/// Filter: returns its value, or an error if the template has run too long.
pub(super) const TICK: &str = "trine_tick";
/// Filter: returns its value, over which a filter will go item by item.
pub(super) const ITEMS: &str = "trine_items";

/// Filters that make a list of the characters of a string.
const OVER_ITEMS: [&str; 20] = [
    "batch",
    "chain",
    "dictsort",
    "groupby",
    "items",
    "lines",
    "list",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "reverse",
    "select",
    "selectattr",
    "slice",
    "sort",
    "split",
    "unique",
    "zip",
];

/// Operators, filters, calls and subscripts of one expression; the longest in published templates
/// have about 40.
const MAX_OPERATIONS: usize = 300;
/// Nesting of brackets, signs, `not` and `else`.
const MAX_DEPTH: usize = 40;

/// Why an expression is not rewritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// It is no expression.
    Unclear,
    /// It is longer or deeper than the limits.
    TooLarge,
}

/// Rewrites an expression, or several that commas separate.
pub(super) fn rewrite(text: &str) -> Result<String, Refused> {
    let mut parser = Parser::new(text)?;
    let mut out = parser.expression()?;
    while parser.accept(&mut out, ",") {
        if parser.at < parser.tokens.len() {
            out += &parser.expression()?;
        }
    }
    parser.end(out)
}

/// Rewrites an expression that must stay a call, as `{% call %}` and `{% do %}` have it.
pub(super) fn rewrite_call(text: &str) -> Result<String, Refused> {
    let mut parser = Parser::new(text)?;
    let (out, _) = parser.chain()?;
    parser.end(out)
}

struct Parser<'s> {
    tokens: Vec<Token<'s>>,
    /// White space behind the last token.
    trailing: &'s str,
    at: usize,
    depth: usize,
    operations: usize,
}

impl<'s> Parser<'s> {
    fn new(text: &'s str) -> Result<Self, Refused> {
        let (tokens, trailing) = tokens(text).ok_or(Refused::Unclear)?;
        Ok(Self { tokens, trailing, at: 0, depth: 0, operations: 0 })
    }

    fn end(self, mut out: String) -> Result<String, Refused> {
        if self.at < self.tokens.len() {
            return Err(Refused::Unclear);
        }
        out += self.trailing;
        Ok(out)
    }

    fn peek(&self, ahead: usize) -> &'s str {
        match self.tokens.get(self.at + ahead) {
            // A string in quotes is never a word or a sign.
            Some(token) if token.kind != Kind::Text => token.text,
            _ => "",
        }
    }

    fn kind(&self) -> Option<Kind> {
        self.tokens.get(self.at).map(|token| token.kind)
    }

    fn accept(&mut self, out: &mut String, text: &str) -> bool {
        let there = self.peek(0) == text;
        if there {
            out.push_str(self.tokens[self.at].whole);
            self.at += 1;
        }
        there
    }

    fn expect(&mut self, out: &mut String, text: &str) -> Result<(), Refused> {
        if self.accept(out, text) { Ok(()) } else { Err(Refused::Unclear) }
    }

    fn take(&mut self, out: &mut String, kind: Kind) -> Result<&'s str, Refused> {
        let token = self.tokens.get(self.at).filter(|token| token.kind == kind);
        let token = token.ok_or(Refused::Unclear)?;
        out.push_str(token.whole);
        self.at += 1;
        Ok(token.text)
    }

    fn operation(&mut self) -> Result<(), Refused> {
        self.operations += 1;
        if self.operations > MAX_OPERATIONS { Err(Refused::TooLarge) } else { Ok(()) }
    }

    fn deeper<T>(
        &mut self,
        inner: impl FnOnce(&mut Self) -> Result<T, Refused>,
    ) -> Result<T, Refused> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(Refused::TooLarge);
        }
        let result = inner(self);
        self.depth -= 1;
        result
    }

    fn expression(&mut self) -> Result<String, Refused> {
        self.deeper(|parser| {
            let mut out = parser.or()?;
            while parser.accept(&mut out, "if") {
                parser.operation()?;
                out += &parser.or()?;
                if parser.accept(&mut out, "else") {
                    out += &parser.expression()?;
                }
            }
            Ok(out)
        })
    }

    fn or(&mut self) -> Result<String, Refused> {
        let mut out = self.not()?;
        // `and` binds tighter; what stands between the two is the same text either way.
        while self.accept(&mut out, "or") || self.accept(&mut out, "and") {
            self.operation()?;
            out += &self.not()?;
        }
        Ok(out)
    }

    fn not(&mut self) -> Result<String, Refused> {
        let mut out = String::new();
        if !self.accept(&mut out, "not") {
            return self.comparison();
        }
        self.operation()?;
        out += &self.deeper(Self::not)?;
        Ok(out)
    }

    fn comparison(&mut self) -> Result<String, Refused> {
        let mut out = self.sum()?;
        let mut any = false;
        loop {
            let compares = ["==", "!=", "<", "<=", ">", ">=", "in"]
                .into_iter()
                .any(|operator| self.accept(&mut out, operator));
            if !compares {
                if !(self.peek(0) == "not" && self.peek(1) == "in") {
                    break;
                }
                self.accept(&mut out, "not");
                self.accept(&mut out, "in");
            }
            self.operation()?;
            out += &self.sum()?;
            any = true;
        }
        Ok(if any { filtered(&out, TICK) } else { out })
    }

    fn sum(&mut self) -> Result<String, Refused> {
        let mut out = self.operands("+", ADDED, Self::joined)?;
        while self.accept(&mut out, "-") {
            self.operation()?;
            out += &self.joined()?;
            if self.peek(0) == "+" {
                out = self.call(ADDED, "+", out, Self::joined)?;
            }
        }
        Ok(out)
    }

    fn joined(&mut self) -> Result<String, Refused> {
        self.operands("~", JOINED, Self::product)
    }

    /// Operands of one operator, which become the arguments of a function.
    fn operands(
        &mut self,
        operator: &str,
        function: &str,
        operand: fn(&mut Self) -> Result<String, Refused>,
    ) -> Result<String, Refused> {
        let first = operand(self)?;
        self.call(function, operator, first, operand)
    }

    fn call(
        &mut self,
        function: &str,
        operator: &str,
        first: String,
        operand: fn(&mut Self) -> Result<String, Refused>,
    ) -> Result<String, Refused> {
        if self.peek(0) != operator {
            return Ok(first);
        }
        let mut out = format!(" {function}({first}");
        let mut sign = String::new();
        while self.accept(&mut sign, operator) {
            self.operation()?;
            // The white space before the operator may hold lines, which messages count.
            out += &sign[..sign.len() - operator.len()];
            out.push(',');
            sign.clear();
            out += &operand(self)?;
        }
        out.push(')');
        Ok(out)
    }

    fn product(&mut self) -> Result<String, Refused> {
        let mut out = self.power()?;
        loop {
            let mut sign = String::new();
            if self.accept(&mut sign, "*") {
                let right = self.power()?;
                out = format!(" {MULTIPLIED}({out}{},{right})", &sign[..sign.len() - 1]);
            } else if ["/", "//", "%"].into_iter().any(|sign| self.accept(&mut out, sign)) {
                out += &self.power()?;
            } else {
                return Ok(out);
            }
            self.operation()?;
        }
    }

    fn power(&mut self) -> Result<String, Refused> {
        let mut out = self.filters()?;
        while self.accept(&mut out, "**") {
            self.operation()?;
            out += &self.filters()?;
        }
        Ok(out)
    }

    fn filters(&mut self) -> Result<String, Refused> {
        let mut out = self.signed()?;
        loop {
            if self.accept(&mut out, "|") {
                let bar = out.len() - 1;
                let name = self.name(&mut out)?;
                if OVER_ITEMS.contains(&&*name) {
                    out.insert_str(bar, &format!("|{ITEMS}"));
                }
                if self.peek(0) == "(" {
                    self.arguments(&mut out)?;
                }
                out += &format!("|{MADE}");
            } else if self.accept(&mut out, "is") {
                self.accept(&mut out, "not");
                self.name(&mut out)?;
                if self.peek(0) == "(" {
                    self.arguments(&mut out)?;
                } else if self.is_operand() {
                    out += &self.signed()?;
                }
                out += &format!("|{TICK}");
            } else {
                return Ok(out);
            }
            self.operation()?;
        }
    }

    /// Whether an argument of a test follows that has no brackets around it.
    fn is_operand(&self) -> bool {
        match self.kind() {
            Some(Kind::Word) => !matches!(self.peek(0), "and" | "or" | "else" | "is"),
            Some(Kind::Number | Kind::Text) => true,
            _ => matches!(self.peek(0), "-" | "[" | "{"),
        }
    }

    /// The name of a filter or test, which may have dots.
    fn name(&mut self, out: &mut String) -> Result<String, Refused> {
        let mut name = self.take(out, Kind::Word)?.to_owned();
        while self.accept(out, ".") {
            name.push('.');
            name += self.take(out, Kind::Word)?;
        }
        Ok(name)
    }

    fn signed(&mut self) -> Result<String, Refused> {
        let mut out = String::new();
        if !self.accept(&mut out, "-") {
            let (chain, filter) = self.chain()?;
            return Ok(filter.map_or(chain.clone(), |filter| filtered(&chain, filter)));
        }
        self.operation()?;
        out += &self.deeper(Self::signed)?;
        Ok(out)
    }

    /// A value and what is called, looked up or cut out of it; the filter is for the last of these.
    fn chain(&mut self) -> Result<(String, Option<&'static str>), Refused> {
        let looped = self.peek(0) == "loop";
        let start = self.at;
        let (mut out, mut filter) = self.primary()?;
        loop {
            let next = self.peek(0);
            if !matches!(next, "." | "[" | "(") {
                return Ok((out, filter));
            }
            self.operation()?;
            if let Some(filter) = filter.take() {
                out = filtered(&out, filter);
            }
            match next {
                "." => {
                    self.expect(&mut out, ".")?;
                    let kind = self.kind().filter(|kind| [Kind::Word, Kind::Number].contains(kind));
                    self.take(&mut out, kind.ok_or(Refused::Unclear)?)?;
                }
                "[" => filter = Some(self.subscript(&mut out)?),
                _ => {
                    // A recursive loop is called by a name that must stay as it is.
                    let recursion = looped && self.at == start + 1;
                    self.arguments(&mut out)?;
                    filter = (!recursion).then_some(MADE);
                }
            }
        }
    }

    fn subscript(&mut self, out: &mut String) -> Result<&'static str, Refused> {
        self.expect(out, "[")?;
        let mut slice = false;
        loop {
            if self.accept(out, "]") {
                return Ok(if slice { MADE } else { TICK });
            }
            if self.accept(out, ":") {
                slice = true;
            } else {
                *out += &self.expression()?;
            }
        }
    }

    fn arguments(&mut self, out: &mut String) -> Result<(), Refused> {
        self.expect(out, "(")?;
        while !self.accept(out, ")") {
            if !self.accept(out, "**") {
                self.accept(out, "*");
            }
            if self.kind() == Some(Kind::Word) && self.peek(1) == "=" {
                self.take(out, Kind::Word)?;
                self.expect(out, "=")?;
            }
            *out += &self.expression()?;
            if self.peek(0) != ")" {
                self.expect(out, ",")?;
            }
        }
        Ok(())
    }

    fn primary(&mut self) -> Result<(String, Option<&'static str>), Refused> {
        let mut out = String::new();
        match (self.kind(), self.peek(0)) {
            (Some(Kind::Word), _) => drop(self.take(&mut out, Kind::Word)?),
            (Some(Kind::Number), _) => drop(self.take(&mut out, Kind::Number)?),
            (Some(Kind::Text), _) => {
                while self.kind() == Some(Kind::Text) {
                    self.take(&mut out, Kind::Text)?;
                }
            }
            (_, "(") => return self.list(out, "(", ")"),
            (_, "[") => return self.list(out, "[", "]"),
            (_, "{") => return self.list(out, "{", "}"),
            _ => return Err(Refused::Unclear),
        }
        Ok((out, None))
    }

    /// A list, a tuple, a mapping or an expression in brackets.
    fn list(
        &mut self,
        mut out: String,
        open: &str,
        close: &str,
    ) -> Result<(String, Option<&'static str>), Refused> {
        self.expect(&mut out, open)?;
        let mut plain = open == "(";
        while !self.accept(&mut out, close) {
            out += &self.expression()?;
            if open == "{" {
                self.expect(&mut out, ":")?;
                out += &self.expression()?;
            }
            if self.peek(0) != close {
                self.expect(&mut out, ",")?;
                plain = false;
            }
        }
        Ok((out, (!plain).then_some(MADE)))
    }
}

/// In brackets, so that it stays one operand.
fn filtered(expression: &str, filter: &str) -> String {
    format!("(({expression})|{filter})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_builds_is_checked_and_nothing_else() {
        let cases = [
            ("a", "a"),
            (" a.b[0].c ", "(( a.b[0])|trine_tick).c "),
            ("a ~ 'b'\n~ c", " trine_joined(a , 'b'\n, c)"),
            ("a + b - c + 1", " trine_added( trine_added(a , b) - c , 1)"),
            ("-a * b ** 2", " trine_multiplied(-a , b ** 2)"),
            ("a % 2 == 0", "((a % 2 == 0)|trine_tick)"),
            ("not a in b and c", "not(( a in b)|trine_tick) and c"),
            ("a not in b", "((a not in b)|trine_tick)"),
            ("a is not string and b", "a is not string|trine_tick and b"),
            ("a is eq 'b' or c", "a is eq 'b'|trine_tick or c"),
            ("a | trim", "a | trim|trine_made"),
            ("a|list|length", "a|trine_items|list|trine_made|length|trine_made"),
            ("f(x, *y, z=1)", "((f(x, *y, z=1))|trine_made)"),
            ("loop(x)", "loop(x)"),
            ("loop.cycle(x)", "((loop.cycle(x))|trine_made)"),
            ("a[1:]", "((a[1:])|trine_made)"),
            ("a[::-1][0]", "((((a[::-1])|trine_made)[0])|trine_tick)"),
            ("[]", "(([])|trine_made)"),
            ("(a)", "(a)"),
            ("(a, b)", "(((a, b))|trine_made)"),
            ("{'a': b}.c", "(({'a': b})|trine_made).c"),
            ("a if b else c if d", "a if b else c if d"),
            ("1.5e-3 + 0x1F", " trine_added(1.5e-3 , 0x1F)"),
            ("a.0.1", "a.0.1"),
            ("'\\'|' \"b\"", "'\\'|' \"b\""),
        ];
        for (source, expected) in cases {
            assert_eq!(rewrite(source).as_deref(), Ok(expected), "{source}");
        }
        assert_eq!(rewrite_call("f(a ~ b)").as_deref(), Ok("f( trine_joined(a , b))"));
        for source in ["", "a b", "(a", "a |", "1 +", "'a", "a ? b", "[1 2]", "{1}"] {
            assert_eq!(rewrite(source), Err(Refused::Unclear), "{source}");
        }
        for source in [
            "-".repeat(100_000) + "1",
            "not ".repeat(100_000) + "a",
            "(".repeat(100_000),
            "a".to_owned() + &"~a".repeat(100_000),
            "a".to_owned() + &".a".repeat(100_000),
            "a".to_owned() + &"[0]".repeat(100_000),
            "a".to_owned() + &"|trim".repeat(100_000),
            "a".to_owned() + &" if a else a".repeat(100_000),
            "a is ".repeat(100_000) + "a",
        ] {
            assert_eq!(rewrite(&source), Err(Refused::TooLarge), "{}", &source[..20]);
        }
    }
}
