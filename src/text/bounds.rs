//! The limits on what a template can build, and on its time.
//!
//! minijinja counts instructions and has no limit on memory, so everything that can build
//! something large goes through here: what is printed or captured, what expressions build
//! ([`expression`] puts the functions and filters of this module there), and the filters and methods
//! whose result can be far larger than their arguments. All of it is counted and never given back,
//! so that the sum of what is alive is bounded too.

use std::cell::Cell;
use std::io;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use minijinja::formatting::FormatStyle;
use minijinja::value::{Kwargs, Rest, StringInput, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior, Value};

use super::{expression, jinja, pythonic};

/// Bytes of the rendered text, and of any one value as it would be printed. A context of 128 k
/// tokens is about 0.5 MB.
pub(super) const MAX_BYTES: usize = 8 << 20;
/// Bytes that one rendering builds, prints and captures in all.
const MAX_BUILT: usize = 4 * MAX_BYTES;
/// The longest time that a rendering takes; usual ones take milliseconds.
const MAX_TIME: Duration = Duration::from_secs(10);
/// Bytes of memory that a value takes in a list or a mapping.
const VALUE: usize = 24;
/// Digits that a width or a precision in a format may have.
const MAX_FORMAT_DIGITS: usize = 4;

thread_local! {
    /// Bytes built, printed or captured by the rendering that runs on this thread.
    static BUILT: Cell<usize> = const { Cell::new(0) };
    /// When it began.
    static BEGUN: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Puts the limits into an environment.
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(|state, value, method, args| {
        check_method(value, method, args)?;
        pythonic::method(state, value, method, args)
    });
    environment.set_formatter(|out, _, value| {
        let mut printing = Printing(out);
        std::fmt::Write::write_fmt(&mut printing, format_args!("{value}"))
            .map_err(|_| tick(()).and_then(|()| build(0)).err().unwrap_or_else(too_large))
    });
    // It prints all variables, which is no use to a chat and has no bound.
    environment.remove_global("debug");
    environment.add_function(expression::JOINED, joined);
    environment.add_function(expression::ADDED, added);
    environment.add_function(expression::MULTIPLIED, multiplied);
    environment.add_filter(expression::MADE, made);
    environment.add_filter(expression::TICK, tick::<Value>);
    environment.add_filter(expression::ITEMS, items);
    environment.add_filter("map", map);
    environment.add_filter("replace", replace);
    environment.add_filter("join", join);
    environment.add_filter("indent", indent);
    environment.add_filter("format", |text: &str, args: Rest<Value>| {
        check_format(text, '%', &args)?;
        minijinja::formatting::format(FormatStyle::Printf, text, &args)
    });
    environment.add_filter("batch", batch);
    environment.add_filter("slice", slice);
    environment.add_filter(jinja::LOOP, |items: Value, literal: usize| {
        let items = self::items(items)?;
        let count = items.len().unwrap_or_else(|| items.try_iter().map_or(0, Iterator::count));
        build(count.saturating_mul(literal))?;
        measure(&items, &mut { MAX_BYTES }, 0)?;
        Ok::<_, Error>(items)
    });
    environment.add_filter(jinja::FRAME, |arguments: Value, literal: usize| {
        build(literal)?;
        tick(arguments)
    });
}

pub(super) fn fail(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, detail.into())
}

fn too_large() -> Error {
    fail(format!("the template builds more text than is allowed ({MAX_BYTES} bytes)"))
}

fn check_size(bytes: usize) -> Result<(), Error> {
    if bytes > MAX_BYTES { Err(too_large()) } else { Ok(()) }
}

/// Counts bytes that are about to be built, printed or captured.
fn build(bytes: usize) -> Result<(), Error> {
    let built = BUILT.get().saturating_add(bytes);
    BUILT.set(built);
    if built > MAX_BUILT { Err(too_large()) } else { Ok(()) }
}

/// Lets a value pass while there is time.
fn tick<T>(value: T) -> Result<T, Error> {
    match BEGUN.get() {
        Some(begun) if begun.elapsed() > MAX_TIME => {
            Err(fail(format!("the template runs longer than {} s", MAX_TIME.as_secs())))
        }
        _ => Ok(value),
    }
}

/// Counts a value that has been built: the text, or the list without what is in it, which has been
/// counted before.
fn made(value: Value) -> Result<Value, Error> {
    build(own_size(&value))?;
    measure(&value, &mut { MAX_BYTES }, 0)?;
    tick(value)
}

fn own_size(value: &Value) -> usize {
    match value.as_str() {
        Some(text) => text.len(),
        None => value.len().unwrap_or(0).saturating_mul(VALUE),
    }
}

/// Counts the characters of a string over which a filter goes one by one.
fn items(value: Value) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        build(text.len().saturating_mul(VALUE))?;
    }
    tick(value)
}

/// `a ~ b ~ …`
fn joined(parts: Rest<Value>) -> Result<String, Error> {
    let mut left = MAX_BYTES;
    for part in parts.iter() {
        measure(part, &mut left, 0)?;
    }
    build(MAX_BYTES - left)?;
    let mut text = String::new();
    for part in parts.iter() {
        match part.as_str() {
            Some(part) => text.push_str(part),
            None => text.push_str(&part.to_string()),
        }
    }
    tick(text)
}

/// `a + b + …`, from the left.
fn added(parts: Rest<Value>) -> Result<Value, Error> {
    let bytes = parts.iter().fold(0_usize, |sum, part| sum.saturating_add(own_size(part)));
    check_size(bytes)?;
    build(bytes)?;
    if let Some(texts) = parts.iter().map(Value::as_str).collect::<Option<Vec<&str>>>() {
        return tick(Value::from(texts.concat()));
    }
    let mut parts = parts.iter();
    let mut sum = parts.next().cloned().unwrap_or_default();
    for part in parts {
        sum = match (sum.is_integer(), i64::try_from(sum.clone()), i64::try_from(part.clone())) {
            (true, Ok(a), Ok(b)) if part.is_integer() && a.checked_add(b).is_some() => {
                Value::from(a + b)
            }
            _ => evaluate("a + b", sum, part.clone())?,
        };
    }
    measure(&sum, &mut { MAX_BYTES }, 0)?;
    tick(sum)
}

/// `a * b`
fn multiplied(a: Value, b: Value) -> Result<Value, Error> {
    // Of two numbers the result is a number.
    let (size, count) = match own_size(&a) {
        0 => (own_size(&b), &a),
        size => (size, &b),
    };
    let bytes = size.saturating_mul(usize::try_from(count.clone()).unwrap_or(0));
    check_size(bytes)?;
    build(bytes)?;
    let product = evaluate("a * b", a, b)?;
    measure(&product, &mut { MAX_BYTES }, 0)?;
    tick(product)
}

/// What minijinja makes of an operator.
fn evaluate(expression: &str, a: Value, b: Value) -> Result<Value, Error> {
    static PLAIN: OnceLock<Environment<'static>> = OnceLock::new();
    let environment = PLAIN.get_or_init(|| {
        let mut environment = Environment::empty();
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment
    });
    environment.compile_expression(expression)?.eval(minijinja::context! { a, b })
}

/// One item at a time, because what is made of each can be large.
fn map(state: &mut State, list: Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let mut mapped = Vec::new();
    for item in list.try_iter()? {
        let args = Rest(args.to_vec());
        for value in minijinja::filters::map(state, Value::from(vec![item]), args)? {
            build(VALUE + own_size(&value))?;
            mapped.push(value);
        }
        tick(())?;
    }
    Ok(Value::from(mapped))
}

/// Subtracts the size of a value, counted as often as it would be printed.
fn measure(value: &Value, left: &mut usize, depth: usize) -> Result<(), Error> {
    let size = VALUE + value.as_str().map_or(0, str::len);
    *left = left.checked_sub(size).ok_or_else(too_large)?;
    // A namespace can hold itself; no template prints what is this deep.
    if depth > 64 {
        return Ok(());
    }
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            for item in value.try_iter()? {
                measure(&item, left, depth + 1)?;
            }
        }
        ValueKind::Map => {
            for key in value.try_iter()? {
                measure(&key, left, depth + 1)?;
                measure(&value.get_item(&key)?, left, depth + 1)?;
            }
        }
        _ => {}
    }
    Ok(())
}

fn check_replace(text: &str, from: &str, to: &str) -> Result<(), Error> {
    let grown = text.matches(from).count().saturating_mul(to.len());
    check_size(grown.saturating_add(text.len()))
}

fn check_join(items: &Value, joiner: &str) -> Result<(), Error> {
    let mut left = MAX_BYTES;
    measure(items, &mut left, 0)?;
    let count = items.try_iter().map_or(0, Iterator::count);
    check_size((MAX_BYTES - left).saturating_add(count.saturating_mul(joiner.len())))
}

/// A format can ask for any width, in its text or through an argument.
fn check_format(text: &str, mark: char, args: &[Value]) -> Result<(), Error> {
    let mut digits = 0;
    for c in text.chars() {
        digits = if c.is_ascii_digit() { digits + 1 } else { 0 };
        if digits > MAX_FORMAT_DIGITS {
            return Err(fail("format: a width or a number in it is too long"));
        }
    }
    let indirect = match mark {
        '%' => text.contains('*'),
        _ => text.split('{').any(|part| part.contains(':') && !part.contains('}')),
    };
    if indirect {
        return Err(fail("format: a width from an argument is not supported"));
    }
    let mut left = MAX_BYTES;
    for arg in args {
        measure(arg, &mut left, 0)?;
    }
    let fields = text.matches(mark).count();
    check_size(fields.saturating_mul(MAX_BYTES - left).saturating_add(text.len()))
}

fn check_method(value: &Value, method: &str, args: &[Value]) -> Result<(), Error> {
    let Some(text) = value.as_str() else { return Ok(()) };
    let string = |at: usize| args.get(at).and_then(Value::as_str);
    match (method, string(0), string(1)) {
        ("replace", Some(from), Some(to)) => check_replace(text, from, to),
        ("join", _, _) if !args.is_empty() => check_join(&args[0], text),
        ("format", _, _) => check_format(text, '{', args),
        ("split" | "rsplit", Some(by), _) if !by.is_empty() => {
            build(text.matches(by).count().saturating_mul(VALUE).saturating_add(text.len()))
        }
        ("split" | "rsplit" | "splitlines", _, _) => {
            let spaces = text.chars().filter(|c| c.is_whitespace()).count();
            build(spaces.saturating_mul(VALUE).saturating_add(text.len()))
        }
        _ => Ok(()),
    }
}

fn replace(
    state: &mut State,
    value: StringInput<'_>,
    from: StringInput<'_>,
    to: StringInput<'_>,
) -> Result<Value, Error> {
    check_replace(value.as_str(), from.as_str(), to.as_str())?;
    minijinja::filters::replace(state, value, from, to)
}

fn join(
    state: &mut State,
    value: &Value,
    joiner: Option<StringInput<'_>>,
    attribute: Option<&str>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let named = kwargs.peek::<Option<&str>>("d").ok().flatten();
    let by = joiner.as_ref().map_or(named.unwrap_or(""), |joiner| joiner.as_str());
    check_join(value, by)?;
    minijinja::filters::join(state, value, joiner, attribute, kwargs)
}

fn indent(
    value: StringInput<'_>,
    width: Option<usize>,
    first: Option<bool>,
    blank: Option<bool>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let columns = width.or(kwargs.peek::<Option<usize>>("width").ok().flatten()).unwrap_or(4);
    let lines = value.as_str().lines().count() + 1;
    check_size(lines.saturating_mul(columns).saturating_add(value.as_str().len()))?;
    minijinja::filters::indent(value, width, first, blank, kwargs)
}

fn batch(state: &State, value: Value, count: usize, fill: Option<Value>) -> Result<Value, Error> {
    check_size(count.saturating_mul(32))?;
    minijinja::filters::batch(state, value, count, fill)
}

fn slice(state: &State, value: Value, count: usize, fill: Option<Value>) -> Result<Value, Error> {
    check_size(count.saturating_mul(32))?;
    minijinja::filters::slice(state, value, count, fill)
}

/// The output, up to its limit.
pub(super) struct Limited(Vec<u8>);

impl Limited {
    /// The output of a rendering that begins on this thread.
    pub(super) fn start() -> Self {
        BUILT.set(0);
        BEGUN.set(Some(Instant::now()));
        Self(Vec::new())
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

impl io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len().saturating_add(bytes.len()) > MAX_BYTES {
            return Err(io::Error::other("the rendered text is too large"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What the formatter prints into; captures go through it too.
struct Printing<'o, 'w>(&'o mut minijinja::Output<'w>);

impl std::fmt::Write for Printing<'_, '_> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        build(text.len()).and_then(tick).map_err(|_| std::fmt::Error)?;
        self.0.write_str(text)
    }
}
