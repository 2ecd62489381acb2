//! The safetensors container: one mapped file, or shards and their index, to named tensors.
//!
//! The header is read here and not by the safetensors crate, whose reader (0.8.0) keeps the last
//! of two tensors of one name in silence, adds offsets without a check (a panic where overflow is
//! checked), and does not say which offset was expected. The types of an entry are the crate's.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use safetensors::tensor::{Dtype, TensorInfo};
use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, Visitor};

use super::files::{Files, missing};
use super::foreign;
use super::json::{describe, parser_error, quote};
use crate::error::LoadError;
use crate::tensor::{FloatType, SharedBytes};

/// A checkpoint in one file.
pub(crate) const SINGLE: &str = "model.safetensors";
/// What lists the shards of a checkpoint in several.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// The longest header that the format allows.
const MAX_HEADER: u64 = 100_000_000;

/// The longest name of a tensor; those of published models are below 100 bytes.
const MAX_NAME: usize = 1000;

/// A tensor of a checkpoint, its bytes where the file is mapped.
#[derive(Debug, Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: SharedBytes,
    pub(crate) file: Arc<Path>,
}

impl Tensor {
    /// The float type, `None` for anything else.
    pub(crate) fn float(&self) -> Option<FloatType> {
        match self.dtype {
            Dtype::BF16 => Some(FloatType::Bf16),
            Dtype::F16 => Some(FloatType::F16),
            Dtype::F32 => Some(FloatType::F32),
            _ => None,
        }
    }

    /// The error of a tensor that is not what it should be.
    pub(crate) fn wrong(&self, expected: impl Into<String>, found: impl Into<String>) -> LoadError {
        LoadError::invalid(&self.file, &*self.name, expected, found)
    }
}

/// The tensors of a checkpoint by name.
#[derive(Debug)]
pub(crate) struct Tensors {
    /// What a message about a missing tensor names: the file or the index.
    pub(crate) listing: PathBuf,
    pub(crate) map: BTreeMap<String, Tensor>,
    /// Bytes of all files.
    pub(crate) file_bytes: u64,
}

impl Tensors {
    /// Reads the headers of a checkpoint's weights: `single` if it is named, else
    /// [`SINGLE`], else the shards that [`INDEX`] lists.
    pub(crate) fn open(files: &Files, single: Option<&str>) -> Result<Self, LoadError> {
        if let Some(name) = single.or_else(|| files.has(SINGLE).then_some(SINGLE)) {
            let file: Arc<Path> = files.path(name).into();
            let Some(bytes) = files.map(name)? else {
                return Err(missing(&file));
            };
            let mut tensors =
                Self { listing: file.to_path_buf(), map: BTreeMap::new(), file_bytes: 0 };
            tensors.add(&file, &bytes)?;
            return Ok(tensors);
        }
        let listing = files.path(INDEX);
        let Some(text) = files.text(INDEX)? else { return Err(no_weights(files)) };
        let index: Index = serde_json::from_str(&text).map_err(|e| {
            LoadError::invalid(&listing, "JSON", "an object with weight_map", parser_error(&e))
        })?;
        let shards: BTreeSet<&str> = index.weight_map.values().map(String::as_str).collect();
        let mut tensors = Self { listing, map: BTreeMap::new(), file_bytes: 0 };
        for shard in shards {
            if !stays_inside(shard) {
                return Err(LoadError::invalid(
                    &tensors.listing,
                    "weight_map",
                    "names of files in the same folder",
                    quote(&format!("{shard:?}"), 100),
                ));
            }
            let file: Arc<Path> = files.path(shard).into();
            let Some(bytes) = files.map(shard)? else {
                return Err(LoadError::invalid(
                    &tensors.listing,
                    "weight_map",
                    format!("{} beside it", quote(shard, 100)),
                    "no such file",
                ));
            };
            tensors.add(&file, &bytes)?;
        }
        for (name, shard) in &index.weight_map {
            let held = tensors.map.get(name).is_some_and(|t| *t.file == files.path(shard));
            if !held {
                return Err(LoadError::invalid(
                    &tensors.listing,
                    format!("weight_map.{}", quote(name, 100)),
                    format!("a tensor of {shard}"),
                    "no tensor of that name there",
                ));
            }
        }
        Ok(tensors)
    }

    /// Whether the folder's index lists this file.
    pub(crate) fn is_shard(files: &Files, name: &str) -> Result<bool, LoadError> {
        let Some(text) = files.text(INDEX)? else { return Ok(false) };
        // A broken index is not this function's to report: the file can be opened without it.
        let index: Option<Index> = serde_json::from_str(&text).ok();
        Ok(index.is_some_and(|index| index.weight_map.values().any(|shard| shard == name)))
    }

    fn add(&mut self, file: &Arc<Path>, bytes: &SharedBytes) -> Result<(), LoadError> {
        let tensors = read_header(file, bytes).map_err(|error| {
            match foreign::name(bytes).filter(|_| !bytes.is_empty() && bytes.get(8) != Some(&b'{'))
            {
                Some(name) => LoadError::unsupported(file, "format", name, "safetensors"),
                None => error,
            }
        })?;
        for tensor in tensors {
            if let Some(first) = self.map.get(&tensor.name) {
                return Err(tensor.wrong(
                    "one tensor of this name",
                    format!("another in {}", first.file.display()),
                ));
            }
            self.map.insert(tensor.name.clone(), tensor);
        }
        self.file_bytes += bytes.len() as u64;
        Ok(())
    }

    /// A tensor, or the error that it is missing.
    pub(crate) fn get(&self, name: &str) -> Result<&Tensor, LoadError> {
        self.map
            .get(name)
            .ok_or_else(|| LoadError::invalid(&self.listing, name, "a tensor", "none of that name"))
    }
}

fn no_weights(files: &Files) -> LoadError {
    let found = ["pytorch_model.bin", "pytorch_model.bin.index.json"]
        .into_iter()
        .find(|name| files.has(name))
        .map_or("neither".into(), |name| {
            format!("only {name}, which can run code when it is read")
        });
    LoadError::invalid(files.location(), "weights", format!("{SINGLE} or {INDEX}"), found)
}

/// Whether a file name of an index is one of a file in the index's folder or below it.
fn stays_inside(name: &str) -> bool {
    let mut components = Path::new(name).components().peekable();
    components.peek().is_some()
        && components.all(|component| matches!(component, Component::Normal(_)))
        // Read as separators and drives by Windows only; no published name has them.
        && !name.contains(['\\', ':'])
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The tensors of one file. Memory is bounded by the bytes that the header has in the file.
fn read_header(file: &Arc<Path>, bytes: &SharedBytes) -> Result<Vec<Tensor>, LoadError> {
    let invalid = |field: &str, expected: String, found: String| {
        Err(LoadError::invalid(file, field, expected, found))
    };
    let Some(length) = bytes.first_chunk().map(|first| u64::from_le_bytes(*first)) else {
        let found = format!("a file of {} bytes", bytes.len());
        return invalid("header length", "8 bytes".into(), found);
    };
    let most = (bytes.len() as u64 - 8).min(MAX_HEADER);
    if length > most {
        return invalid(
            "header length",
            format!("at most {most} (the file has {} bytes)", bytes.len()),
            length.to_string(),
        );
    }
    let data_start = 8 + length as usize;
    let text = match std::str::from_utf8(&bytes[8..data_start]) {
        Ok(text) => text,
        Err(e) => {
            return invalid(
                "header",
                "UTF-8 text".into(),
                format!("another byte at offset {}", e.valid_up_to()),
            );
        }
    };
    let Header(mut entries) = match serde_json::from_str(text) {
        Ok(header) => header,
        Err(e) => return invalid("header", "a JSON object of tensors".into(), parser_error(&e)),
    };

    // The format has no holes and no overlaps: in order, each tensor begins where the last ended.
    entries.sort_by_key(|(_, info)| info.data_offsets);
    let data = bytes.len() - data_start;
    let mut end = 0;
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, TensorInfo { dtype, shape, data_offsets: (from, to) }) in entries {
        // Messages quote names, and one could be as long as the header.
        if name.len() > MAX_NAME || name.contains(char::is_control) {
            let expected = format!("names of at most {MAX_NAME} bytes, no control characters");
            return invalid("header", expected, quote(&name, 100));
        }
        let offsets = format!("{name}: data_offsets");
        if to > data {
            let expected = format!("an end of at most {data}, the bytes of data in the file");
            return invalid(&offsets, expected, to.to_string());
        }
        if from != end {
            let expected = format!("a start of {end}, where the tensor before it ends");
            return invalid(&offsets, expected, from.to_string());
        }
        let size = shape
            .iter()
            .try_fold(dtype.bitsize(), |bits, &n| bits.checked_mul(n))
            .filter(|bits| bits.is_multiple_of(8))
            .map(|bits| bits / 8);
        if to < from || size != Some(to - from) {
            let expected = match size {
                Some(size) => format!("{size} bytes for {dtype} {shape:?}"),
                None => format!("a shape of whole bytes, fewer than 2^61, not {dtype} {shape:?}"),
            };
            return invalid(&offsets, expected, format!("{from} to {to}"));
        }
        end = to;
        let Some(view) = bytes.slice(data_start + from..data_start + to) else {
            return invalid(&offsets, "offsets within the file".into(), format!("{from} to {to}"));
        };
        tensors.push(Tensor { name, dtype, shape, bytes: view, file: Arc::clone(file) });
    }
    if end != data {
        return invalid(
            "data",
            format!("{end} bytes, where the last tensor ends"),
            format!("{data} bytes"),
        );
    }
    Ok(tensors)
}

/// The entries of a header, in its order.
struct Header(Vec<(String, TensorInfo)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        use serde::de::Error;
        let mut names = BTreeSet::new();
        let mut entries = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            if !names.insert(name.clone()) {
                return Err(A::Error::custom(format!("two tensors named {}", quote(&name, 100))));
            }
            let info = map
                .next_value()
                .map_err(|e| A::Error::custom(format!("tensor {}: {e}", quote(&name, 100))))?;
            entries.push((name, info));
        }
        Ok(Header(entries))
    }
}

/// A shape as messages write it.
pub(crate) fn shape_text(shape: &[usize]) -> String {
    describe(&serde_json::json!(shape))
}
