//! Strict reading of JSON objects: a field is absent, right, or an error that names it.

use std::ops::RangeInclusive;
use std::path::Path;

use serde_json::{Map, Value};

use super::foreign;
use crate::error::LoadError;
pub(crate) use crate::error::quote;

/// Parses a file that must hold one JSON object. Of a key that is there twice the last value
/// counts, as in Python: published configs have `quantization_config` twice.
pub(crate) fn parse_object(file: &Path, text: &str) -> Result<Map<String, Value>, LoadError> {
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(LoadError::invalid(file, "JSON", "an object", describe(&other))),
        Err(e) => {
            let foreign = foreign::name(text.as_bytes()).map(str::to_owned);
            let found = foreign.unwrap_or_else(|| parser_error(&e));
            Err(LoadError::invalid(file, "JSON", "an object", found))
        }
    }
}

/// Parses a file that must hold one JSON array.
pub(crate) fn parse_array(file: &Path, text: &str) -> Result<Vec<Value>, LoadError> {
    match serde_json::from_str(text) {
        Ok(Value::Array(list)) => Ok(list),
        Ok(other) => Err(LoadError::invalid(file, "JSON", "an array", describe(&other))),
        Err(e) => Err(LoadError::invalid(file, "JSON", "an array", parser_error(&e))),
    }
}

/// A JSON value as messages quote it.
pub(crate) fn describe(value: &Value) -> String {
    quote(&value.to_string(), 60)
}

/// What a parser says, which may quote the file.
pub(crate) fn parser_error(error: &serde_json::Error) -> String {
    quote(&error.to_string(), 400)
}

/// An object of a file, and where in the file it stands.
pub(crate) struct Fields<'a> {
    pub(crate) file: &'a Path,
    /// Precedes the names of fields in messages: empty, or such as `quantization_config.`.
    pub(crate) prefix: &'static str,
    pub(crate) map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// A field; `None` if it is absent or null, between which no checkpoint distinguishes.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// The error of a field that is there with another value than it may have.
    pub(crate) fn wrong(&self, key: &str, expected: impl Into<String>, found: &Value) -> LoadError {
        LoadError::invalid(self.file, format!("{}{key}", self.prefix), expected, describe(found))
    }

    /// The error of a field that must be there.
    pub(crate) fn absent(&self, key: &str, expected: impl Into<String>) -> LoadError {
        LoadError::invalid(self.file, format!("{}{key}", self.prefix), expected, "nothing")
    }

    /// The error of a field whose value has a meaning that is not implemented.
    pub(crate) fn unsupported(
        &self,
        key: &str,
        found: impl AsRef<str>,
        supported: impl Into<String>,
    ) -> LoadError {
        let found = quote(found.as_ref(), 100);
        LoadError::unsupported(self.file, format!("{}{key}", self.prefix), found, supported)
    }

    /// An object within this one.
    pub(crate) fn object(
        &self,
        key: &str,
        prefix: &'static str,
    ) -> Result<Option<Fields<'a>>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields { file: self.file, prefix, map })),
            Some(other) => Err(self.wrong(key, "an object", other)),
        }
    }

    /// An integer; a float is refused even if it has no fraction.
    pub(crate) fn integer(
        &self,
        key: &str,
        range: RangeInclusive<u64>,
    ) -> Result<Option<u64>, LoadError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().filter(|integer| range.contains(integer)) {
            Some(integer) => Ok(Some(integer)),
            None => Err(self.wrong(key, integers(&range), value)),
        }
    }

    /// An integer that must be there.
    pub(crate) fn required_integer(
        &self,
        key: &str,
        range: RangeInclusive<u64>,
    ) -> Result<u64, LoadError> {
        self.integer(key, range.clone())?.ok_or_else(|| self.absent(key, integers(&range)))
    }

    /// A number, integer or float, that `accept` accepts; `expected` says which those are.
    pub(crate) fn number(
        &self,
        key: &str,
        expected: &str,
        accept: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, LoadError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64().filter(|number| number.is_finite() && accept(*number)) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(key, expected, value)),
        }
    }

    /// A boolean.
    pub(crate) fn boolean(&self, key: &str) -> Result<Option<bool>, LoadError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(key, "true or false", value))
    }

    /// A string.
    pub(crate) fn string(&self, key: &str) -> Result<Option<&'a str>, LoadError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(key, "a string", value))
    }

    /// A list of strings.
    pub(crate) fn strings(&self, key: &str) -> Result<Option<Vec<&'a str>>, LoadError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value
            .as_array()
            .and_then(|list| list.iter().map(Value::as_str).collect())
            .map(Some)
            .ok_or_else(|| self.wrong(key, "a list of strings", value))
    }
}

fn integers(range: &RangeInclusive<u64>) -> String {
    match (range.start(), range.end()) {
        (low, high) if low == high => format!("the integer {low}"),
        (low, high) => format!("an integer from {low} to {high}"),
    }
}
