//! The metadata of a GGUF file: typed values by key, read where they lie in the file.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. Reading keeps keys and the
//! places of values, never the values, so that a vocabulary of 256k strings costs nothing until it
//! is asked for.

use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};
use std::path::Path;
use std::sync::Arc;

use crate::checkpoint::files::TEXT_LIMIT;
use crate::checkpoint::json::quote;
use crate::error::LoadError;
use crate::tensor::SharedBytes;

/// The most keys that a file may have; published ones have below 100.
const MAX_KEYS: u64 = 1 << 16;

/// The most strings that an array may have: a vocabulary has below 2²⁰, its merges not many more, and
/// each is walked over when a file is opened.
const MAX_STRINGS: u64 = 1 << 26;

/// How deep arrays may be nested: an array of arrays is 2. Published files have 1.
const MAX_DEPTH: usize = 4;

/// The least bytes of a key and its value: an empty key of a type of one byte.
const LEAST_ENTRY: usize = 8 + 4 + 1;

/// The type of a value, by the id that the format gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    /// All types, at the place of their id.
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    fn of_id(id: u32) -> Option<Self> {
        Self::ALL.get(usize::try_from(id).ok()?).copied()
    }

    /// Bytes of one value; `None` where they depend on the value.
    fn size(self) -> Option<usize> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::String | Self::Array => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::U16 => "u16",
            Self::I16 => "i16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::F32 => "f32",
            Self::Bool => "bool",
            Self::String => "string",
            Self::Array => "array",
            Self::U64 => "u64",
            Self::I64 => "i64",
            Self::F64 => "f64",
        }
    }
}

/// A value. Which width an integer or a float was written with has no meaning to any reader:
/// writers differ.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Value<'a> {
    Integer(i128),
    Float(f64),
    Bool(bool),
    /// Not yet checked to be UTF-8.
    String(&'a [u8]),
    Array(Array<'a>),
}

/// An array: its items have one type.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Array<'a> {
    pub(crate) item: ValueType,
    pub(crate) len: usize,
    /// The items as they lie in the file; whole, as reading the file has checked.
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// The items, first to last.
    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = Value<'a>> + use<'a> {
        let Self { item, bytes, len } = *self;
        let mut at = 0;
        (0..len).map(move |_| {
            let value = decode(item, bytes, at);
            at = value.1;
            value.0
        })
    }
}

/// A value of checked bytes and where the next begins.
fn decode(kind: ValueType, bytes: &[u8], at: usize) -> (Value<'_>, usize) {
    fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
        let mut out = [0; N];
        out.copy_from_slice(&bytes[at..at + N]);
        out
    }
    let (bytes1, bytes2, bytes4, bytes8) =
        (|| array::<1>(bytes, at), || array(bytes, at), || array(bytes, at), || array(bytes, at));
    let value = match kind {
        ValueType::U8 => Value::Integer(bytes1()[0].into()),
        ValueType::I8 => Value::Integer((bytes1()[0] as i8).into()),
        ValueType::Bool => Value::Bool(bytes1()[0] != 0),
        ValueType::U16 => Value::Integer(u16::from_le_bytes(bytes2()).into()),
        ValueType::I16 => Value::Integer(i16::from_le_bytes(bytes2()).into()),
        ValueType::U32 => Value::Integer(u32::from_le_bytes(bytes4()).into()),
        ValueType::I32 => Value::Integer(i32::from_le_bytes(bytes4()).into()),
        ValueType::F32 => Value::Float(f32::from_le_bytes(bytes4()).into()),
        ValueType::U64 => Value::Integer(u64::from_le_bytes(bytes8()).into()),
        ValueType::I64 => Value::Integer(i64::from_le_bytes(bytes8()).into()),
        ValueType::F64 => Value::Float(f64::from_le_bytes(bytes8())),
        ValueType::String => {
            let start = at + 8;
            let end = start + u64::from_le_bytes(bytes8()) as usize;
            return (Value::String(&bytes[start..end]), end);
        }
        ValueType::Array => {
            let item = ValueType::of_id(u32::from_le_bytes(bytes4()));
            let item = item.unwrap_or(ValueType::U8);
            let len = u64::from_le_bytes(array(bytes, at + 4)) as usize;
            let start = at + 12;
            let end = match item.size() {
                Some(size) => start + len * size,
                None => (0..len).fold(start, |at, _| decode(item, bytes, at).1),
            };
            return (Value::Array(Array { item, len, bytes: &bytes[start..end] }), end);
        }
    };
    (value, at + kind.size().unwrap_or(0))
}

/// Reads a file front to back; nothing is read that is not there.
pub(crate) struct Reader<'a> {
    pub(crate) file: &'a Path,
    pub(crate) bytes: &'a [u8],
    pub(crate) at: usize,
}

impl Reader<'_> {
    pub(crate) fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The place of the next `size` bytes, or the error that they are not there.
    pub(crate) fn take(&mut self, size: u64, field: &str) -> Result<Range<usize>, LoadError> {
        let left = self.left();
        match usize::try_from(size) {
            Ok(size) if size <= left => {
                let start = self.at;
                self.at += size;
                Ok(start..self.at)
            }
            _ => Err(LoadError::invalid(
                self.file,
                field,
                format!("{size} bytes at offset {}", self.at),
                format!("{left} bytes to the end of the file"),
            )),
        }
    }

    fn fixed<const N: usize>(&mut self, field: &str) -> Result<[u8; N], LoadError> {
        let range = self.take(N as u64, field)?;
        let mut out = [0; N];
        out.copy_from_slice(&self.bytes[range]);
        Ok(out)
    }

    pub(crate) fn u32(&mut self, field: &str) -> Result<u32, LoadError> {
        self.fixed(field).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, field: &str) -> Result<u64, LoadError> {
        self.fixed(field).map(u64::from_le_bytes)
    }

    /// A count of things of at least `least` bytes each, of which `most` are read.
    pub(crate) fn count(&mut self, field: &str, most: u64, least: usize) -> Result<u64, LoadError> {
        let count = self.u64(field)?;
        let fit = (self.left() / least) as u64;
        if count > fit {
            return Err(LoadError::invalid(
                self.file,
                field,
                format!("at most {fit}, for {} bytes to the end of the file", self.left()),
                count.to_string(),
            ));
        }
        if count > most {
            return Err(LoadError::unsupported(
                self.file,
                field,
                count.to_string(),
                format!("up to {most}"),
            ));
        }
        Ok(count)
    }

    /// A name: short UTF-8 text that messages can quote.
    pub(crate) fn name(&mut self, field: &str, most: u64) -> Result<String, LoadError> {
        let length = self.u64(field)?;
        if length > most {
            return Err(LoadError::invalid(
                self.file,
                field,
                format!("a name of at most {most} bytes"),
                format!("{length} bytes"),
            ));
        }
        let range = self.take(length, field)?;
        match std::str::from_utf8(&self.bytes[range.clone()]) {
            Ok(name) if !name.is_empty() && !name.contains(char::is_control) => Ok(name.to_owned()),
            _ => Err(LoadError::invalid(
                self.file,
                field,
                "a name in UTF-8 without control characters",
                quote(&format!("{:?}", String::from_utf8_lossy(&self.bytes[range])), 100),
            )),
        }
    }

    fn value_type(&mut self, field: &str) -> Result<ValueType, LoadError> {
        let id = self.u32(field)?;
        ValueType::of_id(id).ok_or_else(|| {
            LoadError::invalid(self.file, field, "a value type from 0 to 12", id.to_string())
        })
    }

    /// Walks over a value and checks that it is whole.
    fn skip(&mut self, kind: ValueType, field: &str, depth: usize) -> Result<(), LoadError> {
        match kind {
            ValueType::String => {
                let length = self.u64(field)?;
                self.take(length, field)?;
            }
            ValueType::Array => {
                if depth == MAX_DEPTH {
                    return Err(LoadError::unsupported(
                        self.file,
                        field,
                        format!("an array more than {MAX_DEPTH} deep"),
                        format!("up to {MAX_DEPTH}"),
                    ));
                }
                let item = self.value_type(field)?;
                // An item that is an array has its type and its length.
                let least =
                    item.size().unwrap_or(if item == ValueType::String { 8 } else { 4 + 8 });
                let most = if item == ValueType::String { MAX_STRINGS } else { u64::MAX };
                let count = self.count(&format!("{field}: length"), most, least)?;
                match item.size() {
                    Some(size) => {
                        let range = self.take(count * size as u64, field)?;
                        if item == ValueType::Bool {
                            self.booleans(range, field)?;
                        }
                    }
                    None => {
                        for _ in 0..count {
                            self.skip(item, field, depth + 1)?;
                        }
                    }
                }
            }
            _ => {
                let range = self.take(kind.size().unwrap_or(0) as u64, field)?;
                if kind == ValueType::Bool {
                    self.booleans(range, field)?;
                }
            }
        }
        Ok(())
    }

    fn booleans(&self, range: Range<usize>, field: &str) -> Result<(), LoadError> {
        match self.bytes[range].iter().find(|byte| **byte > 1) {
            None => Ok(()),
            Some(byte) => {
                Err(LoadError::invalid(self.file, field, "a bool of 0 or 1", byte.to_string()))
            }
        }
    }
}

/// The metadata of a file.
#[derive(Debug, Clone)]
pub(crate) struct Metadata {
    pub(crate) file: Arc<Path>,
    bytes: SharedBytes,
    entries: BTreeMap<String, (ValueType, usize)>,
}

/// Reads `count` keys. Every value is known to be whole then.
pub(crate) fn read(
    reader: &mut Reader<'_>,
    count: u64,
    file: &Arc<Path>,
    bytes: &SharedBytes,
) -> Result<Metadata, LoadError> {
    let mut entries = BTreeMap::new();
    for index in 0..count {
        let key = reader.name(&format!("metadata key {index}"), u64::from(u16::MAX))?;
        let field = quote(&key, 100);
        let kind = reader.value_type(&field)?;
        let at = reader.at;
        reader.skip(kind, &field, 0)?;
        if entries.insert(key, (kind, at)).is_some() {
            return Err(LoadError::invalid(file, field, "one value", "the key a second time"));
        }
    }
    Ok(Metadata { file: Arc::clone(file), bytes: bytes.clone(), entries })
}

/// Reads the number of keys.
pub(crate) fn read_count(reader: &mut Reader<'_>) -> Result<u64, LoadError> {
    reader.count("number of metadata keys", MAX_KEYS, LEAST_ENTRY)
}

impl Metadata {
    /// A value.
    pub(crate) fn get(&self, key: &str) -> Option<Value<'_>> {
        let (kind, at) = *self.entries.get(key)?;
        Some(decode(kind, &self.bytes, at).0)
    }

    /// The keys in alphabetical order, their values as messages quote them.
    pub(crate) fn described(&self) -> impl Iterator<Item = (String, String)> {
        self.entries.keys().filter_map(|key| {
            self.get(key).map(|value| (quote(key, 100), self.describe(key, value)))
        })
    }

    /// The error of a value that is not what it must be.
    pub(crate) fn wrong(&self, key: &str, expected: impl Into<String>) -> LoadError {
        let found = self.get(key).map_or("nothing".into(), |value| self.describe(key, value));
        LoadError::invalid(&self.file, key, expected, found)
    }

    /// The error of a value whose meaning is not implemented.
    pub(crate) fn unsupported(&self, key: &str, supported: impl Into<String>) -> LoadError {
        let found = self.get(key).map_or("nothing".into(), |value| self.describe(key, value));
        LoadError::unsupported(&self.file, key, found, supported)
    }

    /// A value as messages quote it.
    fn describe(&self, key: &str, value: Value<'_>) -> String {
        let kind = self.entries.get(key).map_or("", |(kind, _)| kind.name());
        match value {
            Value::Integer(integer) => format!("{integer} ({kind})"),
            Value::Float(float) => format!("{float} ({kind})"),
            Value::Bool(boolean) => boolean.to_string(),
            Value::String(bytes) => {
                quote(&format!("{:?}", String::from_utf8_lossy(&bytes[..bytes.len().min(400)])), 60)
            }
            Value::Array(array) => format!("an array of {} {}", array.len, array.item.name()),
        }
    }

    fn text<'a>(&self, field: String, bytes: &'a [u8]) -> Result<&'a str, LoadError> {
        if bytes.len() as u64 > TEXT_LIMIT {
            let (expected, found) = (format!("at most {TEXT_LIMIT} bytes of text"), bytes.len());
            return Err(LoadError::invalid(&self.file, field, expected, format!("{found}")));
        }
        std::str::from_utf8(bytes).map_err(|e| {
            let at = e.valid_up_to();
            let found = format!("byte 0x{:02x} at offset {at} of the string", bytes[at]);
            LoadError::invalid(&self.file, field, "UTF-8 text", found)
        })
    }

    /// A string, which is UTF-8.
    pub(crate) fn string(&self, key: &str) -> Result<Option<&str>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(bytes)) => self.text(key.to_owned(), bytes).map(Some),
            Some(_) => Err(self.wrong(key, "a string")),
        }
    }

    /// An integer of any width within a range.
    pub(crate) fn integer(
        &self,
        key: &str,
        range: RangeInclusive<u64>,
    ) -> Result<Option<u64>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Integer(integer)) => match u64::try_from(integer) {
                Ok(integer) if range.contains(&integer) => Ok(Some(integer)),
                _ => Err(self.wrong(key, integers(&range))),
            },
            Some(_) => Err(self.wrong(key, integers(&range))),
        }
    }

    /// An integer that must be there.
    pub(crate) fn required_integer(
        &self,
        key: &str,
        range: RangeInclusive<u64>,
    ) -> Result<u64, LoadError> {
        self.integer(key, range.clone())?.ok_or_else(|| self.wrong(key, integers(&range)))
    }

    /// A finite number, integer or float, that `accept` accepts; `expected` says which those are.
    pub(crate) fn number(
        &self,
        key: &str,
        expected: &str,
        accept: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, LoadError> {
        let number = match self.get(key) {
            None => return Ok(None),
            Some(Value::Integer(integer)) => integer as f64,
            Some(Value::Float(float)) => float,
            Some(_) => f64::NAN,
        };
        if number.is_finite() && accept(number) {
            Ok(Some(number))
        } else {
            Err(self.wrong(key, expected))
        }
    }

    /// A boolean.
    pub(crate) fn boolean(&self, key: &str) -> Result<Option<bool>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(boolean)) => Ok(Some(boolean)),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    fn array(
        &self,
        key: &str,
        accept: impl Fn(ValueType) -> bool,
        expected: &str,
    ) -> Result<Option<Array<'_>>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(array)) if accept(array.item) => Ok(Some(array)),
            Some(_) => Err(self.wrong(key, expected)),
        }
    }

    /// The strings of an array; of one that is not UTF-8 the error says which it is.
    pub(crate) fn strings(
        &self,
        key: &str,
    ) -> Result<Option<impl ExactSizeIterator<Item = Result<&str, LoadError>>>, LoadError> {
        let is_string = |item| item == ValueType::String;
        let array = self.array(key, is_string, "an array of strings")?;
        let key = key.to_owned();
        Ok(array.map(|array| {
            array.iter().enumerate().map(move |(index, value)| match value {
                Value::String(bytes) => self.text(format!("{key}[{index}]"), bytes),
                _ => Ok(""),
            })
        }))
    }

    /// The numbers of an array of integers of any width.
    pub(crate) fn integers(
        &self,
        key: &str,
    ) -> Result<Option<impl ExactSizeIterator<Item = i128>>, LoadError> {
        use ValueType::{I8, I16, I32, I64, U8, U16, U32, U64};
        let is_integer = |item| [U8, I8, U16, I16, U32, I32, U64, I64].contains(&item);
        let array = self.array(key, is_integer, "an array of integers")?;
        Ok(array.map(|array| {
            array.iter().map(|value| if let Value::Integer(integer) = value { integer } else { 0 })
        }))
    }

    /// The numbers of an array of floats, which need not be finite.
    pub(crate) fn floats(
        &self,
        key: &str,
    ) -> Result<Option<impl ExactSizeIterator<Item = f64>>, LoadError> {
        let is_float = |item| matches!(item, ValueType::F32 | ValueType::F64);
        let array = self.array(key, is_float, "an array of floats")?;
        Ok(array.map(|array| {
            array.iter().map(|value| if let Value::Float(float) = value { float } else { 0.0 })
        }))
    }
}

fn integers(range: &RangeInclusive<u64>) -> String {
    match (range.start(), range.end()) {
        (low, high) if low == high => format!("the integer {low}"),
        (low, high) => format!("an integer from {low} to {high}"),
    }
}
