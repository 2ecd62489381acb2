//! The limits on what a template can build.
//!
//! minijinja counts instructions and has no limit on memory, so everything that can multiply a
//! size goes through here: what is printed or captured, what is kept ([`jinja`] puts the filters
//! there), and the filters and methods whose result can be far larger than their arguments.

use std::cell::Cell;
use std::io;

use minijinja::formatting::FormatStyle;
use minijinja::value::{Kwargs, Rest, StringInput, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::{jinja, pythonic};

/// Bytes of the rendered text, and of any one value. A context of 128 k tokens is about 0.5 MB.
pub(super) const MAX_BYTES: usize = 16 << 20;
/// Bytes printed or captured in all.
const MAX_PRINTED: usize = 8 * MAX_BYTES;
/// Digits that a width or a precision in a format may have.
const MAX_FORMAT_DIGITS: usize = 4;

thread_local! {
    /// Bytes printed or captured by the rendering that runs on this thread.
    static PRINTED: Cell<usize> = const { Cell::new(0) };
}

/// Puts the limits into an environment.
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(|state, value, method, args| {
        check_method(value, method, args)?;
        bound(pythonic::method(state, value, method, args)?)
    });
    environment.set_formatter(|out, _, value| {
        let mut printing = Printing(out);
        std::fmt::Write::write_fmt(&mut printing, format_args!("{value}")).map_err(|_| too_large())
    });
    environment.add_filter("replace", replace);
    environment.add_filter("join", join);
    environment.add_filter("indent", indent);
    environment.add_filter("format", |text: &str, args: Rest<Value>| {
        check_format(text, '%', &args)?;
        minijinja::formatting::format(FormatStyle::Printf, text, &args)
    });
    environment.add_filter("batch", batch);
    environment.add_filter("slice", slice);
    environment.add_filter(jinja::BOUNDED, bound);
    environment.add_filter(jinja::LOOP, |items: Value, literal: usize| {
        let count = items.len().unwrap_or_else(|| items.try_iter().map_or(0, Iterator::count));
        print(count.saturating_mul(literal))?;
        bound(items)
    });
    environment.add_filter(jinja::FRAME, |arguments: Value, literal: usize| {
        print(literal)?;
        bound(arguments)
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

/// Counts bytes that are about to be printed or captured.
fn print(bytes: usize) -> Result<(), Error> {
    let printed = PRINTED.get().saturating_add(bytes);
    PRINTED.set(printed);
    if printed > MAX_PRINTED { Err(too_large()) } else { Ok(()) }
}

/// Lets a value pass that is not too large.
fn bound(value: Value) -> Result<Value, Error> {
    measure(&value, &mut { MAX_BYTES }, 0)?;
    Ok(value)
}

/// Subtracts the size of a value, counted as often as it would be printed.
fn measure(value: &Value, left: &mut usize, depth: usize) -> Result<(), Error> {
    let size = 8 + value.as_str().map_or(0, str::len);
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
        PRINTED.set(0);
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
        print(text.len()).map_err(|_| std::fmt::Error)?;
        self.0.write_str(text)
    }
}
