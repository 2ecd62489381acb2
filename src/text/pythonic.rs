//! What chat templates expect of Python and minijinja does not have: `tojson` as `json.dumps`
//! writes it, `strftime`, and a few string methods.

use std::fmt::Write as _;

use chrono::NaiveDateTime;
use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};

fn invalid(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, detail.into())
}

/// Writes a value as Python's `json.dumps` does with the defaults of transformers' `tojson`:
/// characters as they are, `", "` and `": "` between items, keys in their order, no HTML escapes.
/// The options are those of that function: `ensure_ascii`, `indent`, `separators`, `sort_keys`.
pub(super) fn to_json(value: &Value, kwargs: &Kwargs, limit: usize) -> Result<String, Error> {
    let indent = match kwargs.get::<Option<Value>>("indent")? {
        Some(indent) if indent.is_none() => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => {
                let width = usize::try_from(indent).map_err(|_| invalid("tojson: indent"))?;
                " ".repeat(width.min(64))
            }
        }),
        None => None,
    };
    let separators = match kwargs.get::<Option<Value>>("separators")? {
        Some(pair) if !pair.is_none() => {
            let part = |at: usize| Ok::<_, Error>(pair.get_item_by_index(at)?.to_string());
            (part(0)?, part(1)?)
        }
        _ if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        _ => (", ".to_owned(), ": ".to_owned()),
    };
    let mut writer = Json {
        out: String::new(),
        ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sorted: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent,
        separators,
        limit,
    };
    kwargs.assert_all_used()?;
    writer.value(value, 0)?;
    Ok(writer.out)
}

struct Json {
    out: String,
    ascii: bool,
    sorted: bool,
    indent: Option<String>,
    separators: (String, String),
    limit: usize,
}

impl Json {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if self.out.len() > self.limit || depth > 128 {
            return Err(invalid("tojson: the value is too large"));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => {
                let _ = write!(self.out, "{value}");
            }
            ValueKind::Number => {
                let number = f64::try_from(value.clone()).map_err(|_| invalid("tojson: number"))?;
                self.out.push_str(&python_float(number));
            }
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?;
                let mut any = false;
                self.out.push('[');
                for item in items {
                    self.separate(any, depth + 1);
                    any = true;
                    self.value(&item, depth + 1)?;
                }
                self.end(any, depth, ']');
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort();
                }
                let mut any = false;
                self.out.push('{');
                for key in keys {
                    self.separate(any, depth + 1);
                    any = true;
                    match key.kind() {
                        ValueKind::String => self.string(key.as_str().unwrap_or_default()),
                        ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                            self.out.push('"');
                            self.value(&key, depth + 1)?;
                            self.out.push('"');
                        }
                        kind => return Err(invalid(format!("tojson: a key of kind {kind}"))),
                    }
                    self.out.push_str(&self.separators.1);
                    self.value(&value.get_item(&key)?, depth + 1)?;
                }
                self.end(any, depth, '}');
            }
            kind => return Err(invalid(format!("tojson: {kind} has no JSON form"))),
        }
        Ok(())
    }

    fn separate(&mut self, any: bool, depth: usize) {
        if any {
            self.out.push_str(&self.separators.0);
        }
        self.line(depth);
    }

    fn end(&mut self, any: bool, depth: usize, close: char) {
        if any {
            self.line(depth);
        }
        self.out.push(close);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{C}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ascii && !matches!(c, ' '..='~')) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// `repr` of a Python float: the shortest digits that read back the same, an exponent outside
/// 1e-4 to 1e16.
fn python_float(number: f64) -> String {
    if number.is_nan() {
        return "NaN".to_owned();
    }
    if number.is_infinite() {
        return if number > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    // Rust's `{:?}` has the same thresholds and writes the exponent as `e16` and `e-5`.
    let text = format!("{number:?}");
    match text.split_once('e') {
        Some((mantissa, exponent)) => {
            let exponent: i32 = exponent.parse().unwrap_or(0);
            let mantissa = mantissa.strip_suffix(".0").unwrap_or(mantissa);
            format!("{mantissa}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
        }
        None => text,
    }
}

/// `datetime.strftime` of a time without a zone. Where chrono and Python differ, Python is right:
/// `%f` has six digits and zones are empty.
pub(super) fn strftime(now: NaiveDateTime, format: &str) -> Result<String, Error> {
    let mut native = String::with_capacity(format.len());
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        native.push(c);
        if c == '%' {
            match chars.next() {
                Some('f') => native.push_str("6f"),
                Some('z' | 'Z') => {
                    native.pop();
                }
                Some(c) => native.push(c),
                None => {}
            }
        }
    }
    let mut out = String::new();
    // Chrono reports a bad format as a formatting error, which `to_string` would panic on.
    write!(out, "{}", now.format(&native))
        .map_err(|_| invalid(format!("strftime_now: {format:?} is no time format")))?;
    Ok(out)
}

/// Python methods that neither minijinja nor its `pycompat` has.
pub(super) fn method(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        match method {
            "removeprefix" => {
                let (prefix,): (&str,) = from_args(args)?;
                return Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)));
            }
            "removesuffix" => {
                let (suffix,): (&str,) = from_args(args)?;
                return Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)));
            }
            "partition" | "rpartition" => {
                let (by,): (&str,) = from_args(args)?;
                if by.is_empty() {
                    return Err(invalid(format!("{method}: empty separator")));
                }
                let last = method == "rpartition";
                let parts = match if last { text.rsplit_once(by) } else { text.split_once(by) } {
                    Some((before, after)) => [before, by, after],
                    None if last => ["", "", text],
                    None => [text, "", ""],
                };
                return Ok(Value::from(Tuple::from(parts.map(Value::from).to_vec())));
            }
            "rsplit" => {
                let (by, most): (Option<&str>, Option<i64>) = from_args(args)?;
                return rsplit(text, by, most);
            }
            "index" => {
                let (what,): (&str,) = from_args(args)?;
                let at = text.find(what).ok_or_else(|| invalid("index: substring not found"))?;
                return Ok(Value::from(text[..at].chars().count()));
            }
            _ => {}
        }
    }
    if value.kind() == ValueKind::Map && method == "copy" {
        let () = from_args(args)?;
        return Ok(value.clone());
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

fn rsplit(text: &str, by: Option<&str>, most: Option<i64>) -> Result<Value, Error> {
    let most = most.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX);
    let mut parts = Vec::new();
    let mut rest = text;
    match by {
        Some("") => return Err(invalid("rsplit: empty separator")),
        Some(by) => {
            while let Some((before, after)) = rest.rsplit_once(by).filter(|_| parts.len() < most) {
                parts.push(after);
                rest = before;
            }
            parts.push(rest);
        }
        None => {
            rest = rest.trim_end();
            while !rest.is_empty() {
                let word = rest.rfind(char::is_whitespace).filter(|_| parts.len() < most);
                let start =
                    word.map_or(0, |at| at + rest[at..].chars().next().map_or(0, char::len_utf8));
                parts.push(&rest[start..]);
                rest = rest[..start].trim_end();
            }
        }
    }
    parts.reverse();
    Ok(parts.into_iter().map(Value::from).collect())
}
