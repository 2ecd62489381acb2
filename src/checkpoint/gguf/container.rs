//! The GGUF container, versions 2 and 3: one mapped file to metadata and named tensors.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. The reader is our own because
//! no published one knows Microsoft's I2_S, whose size does not follow from a block size. All that
//! a file claims is checked before it is used: memory is bounded by the bytes of the header.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::metadata::{self, Metadata, Reader};
use super::types::{Meaning, meaning};
use crate::checkpoint::files::{Files, missing};
use crate::checkpoint::foreign;
use crate::error::LoadError;
use crate::tensor::SharedBytes;

/// The first bytes of a file.
const MAGIC: &[u8; 4] = b"GGUF";

/// The most tensors that a file may have; the largest published ternary models have about 500.
const MAX_TENSORS: u64 = 100_000;

/// The longest name of a tensor; ggml's own limit is 63 bytes.
const MAX_NAME: u64 = 1000;

/// The least bytes of a tensor's entry: an empty name, one dimension.
const LEAST_TENSOR: usize = 8 + 4 + 8 + 4 + 8;

/// The most dimensions of a tensor, as in ggml.
const MAX_DIMS: u32 = 4;

/// Where tensors begin if the file does not say.
const DEFAULT_ALIGNMENT: u64 = 32;

/// The largest alignment that is believed: a page of the largest kind in common use.
const MAX_ALIGNMENT: u64 = 1 << 21;

/// A GGUF file.
#[derive(Debug)]
pub(crate) struct Gguf {
    pub(crate) file: Arc<Path>,
    /// Version of the format: 2 or 3.
    pub(crate) version: u32,
    pub(crate) metadata: Metadata,
    /// The tensors by name.
    pub(crate) tensors: BTreeMap<String, GgufTensor>,
    /// Bytes of the file.
    pub(crate) file_bytes: u64,
}

/// A tensor of a file, its bytes where the file is mapped.
#[derive(Debug, Clone)]
pub(crate) struct GgufTensor {
    pub(crate) name: String,
    /// The id of its type, and what that means here.
    pub(crate) type_id: u32,
    pub(crate) meaning: Meaning,
    /// Dimensions as GGUF writes them, the fastest first: columns, rows.
    pub(crate) ne: Vec<usize>,
    /// Its data; up to the next tensor where its type does not tell its size.
    pub(crate) bytes: SharedBytes,
    pub(crate) file: Arc<Path>,
}

impl GgufTensor {
    /// The error of a tensor that is not what it should be.
    pub(crate) fn wrong(&self, expected: impl Into<String>, found: impl Into<String>) -> LoadError {
        LoadError::invalid(&self.file, &*self.name, expected, found)
    }

    /// The name of the type, for people.
    pub(crate) fn type_name(&self) -> String {
        match self.meaning.name {
            "" => format!("type {}", self.type_id),
            name if self.meaning.read.is_some() => name.to_owned(),
            name => format!("type {}, {name}", self.type_id),
        }
    }

    /// The shape as the rest of the crate writes it: rows, columns.
    pub(crate) fn shape(&self) -> Vec<usize> {
        self.ne.iter().rev().copied().collect()
    }
}

impl Gguf {
    /// Opens one file of a set.
    pub(crate) fn open(files: &Files, name: &str) -> Result<Self, LoadError> {
        let file: Arc<Path> = files.path(name).into();
        let Some(bytes) = files.map(name)? else {
            return Err(missing(&file));
        };
        Self::read(file, bytes)
    }

    /// Reads the header and checks that all data that it speaks of are there.
    pub(crate) fn read(file: Arc<Path>, bytes: SharedBytes) -> Result<Self, LoadError> {
        let mut reader = Reader { file: &file, bytes: &bytes, at: 0 };
        let magic = reader.take(4, "magic")?;
        if bytes[magic.clone()] != *MAGIC {
            let found = match foreign::name(&bytes) {
                Some(name) => name.to_owned(),
                None => format!("{:?}", String::from_utf8_lossy(&bytes[magic])),
            };
            return Err(LoadError::invalid(&file, "magic", "\"GGUF\"", found));
        }
        let version = version(&mut reader)?;
        let tensor_count = reader.count("number of tensors", MAX_TENSORS, LEAST_TENSOR)?;
        let key_count = metadata::read_count(&mut reader)?;
        let metadata = metadata::read(&mut reader, key_count, &file, &bytes)?;
        refuse_parts(&metadata)?;
        let alignment = alignment(&metadata)?;

        let mut entries = Vec::new();
        for index in 0..tensor_count {
            entries.push(Entry::read(&mut reader, index)?);
        }
        let data_start = (reader.at as u64).next_multiple_of(alignment);
        let data = Data { file: &file, bytes: &bytes, start: data_start, alignment };
        let tensors = data.place(entries)?;
        let file_bytes = bytes.len() as u64;
        Ok(Self { version, metadata, tensors, file_bytes, file })
    }

    /// A tensor, or the error that it is missing.
    pub(crate) fn tensor(&self, name: &str) -> Result<&GgufTensor, LoadError> {
        self.tensors
            .get(name)
            .ok_or_else(|| LoadError::invalid(&self.file, name, "a tensor", "none of that name"))
    }
}

fn version(reader: &mut Reader<'_>) -> Result<u32, LoadError> {
    let version = reader.u32("version")?;
    if matches!(version, 2 | 3) {
        return Ok(version);
    }
    let found = match version {
        1 => "1, of August 2023".into(),
        _ if matches!(version.swap_bytes(), 1..=3) => {
            format!("{}, big-endian", version.swap_bytes())
        }
        _ => version.to_string(),
    };
    Err(LoadError::unsupported(reader.file, "version", found, "2 and 3, little-endian"))
}

fn refuse_parts(metadata: &Metadata) -> Result<(), LoadError> {
    let key = "split.count";
    if metadata.integer(key, 0..=u64::MAX)?.is_some_and(|parts| parts > 1) {
        return Err(metadata.unsupported(
            key,
            "a model in one file (`llama-gguf-split --merge` joins the parts of one)",
        ));
    }
    Ok(())
}

fn alignment(metadata: &Metadata) -> Result<u64, LoadError> {
    let key = "general.alignment";
    let Some(alignment) = metadata.integer(key, 0..=u64::MAX)? else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    if alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT {
        return Ok(alignment);
    }
    Err(metadata.wrong(key, format!("a power of two up to {MAX_ALIGNMENT}")))
}

/// What the header says of a tensor.
struct Entry {
    name: String,
    ne: Vec<usize>,
    elements: u64,
    type_id: u32,
    offset: u64,
}

impl Entry {
    fn read(reader: &mut Reader<'_>, index: u64) -> Result<Self, LoadError> {
        let name = reader.name(&format!("name of tensor {index}"), MAX_NAME)?;
        let dims = reader.u32(&name)?;
        let invalid = |file: &Path, expected: String, found: String| {
            Err(LoadError::invalid(file, &*name, expected, found))
        };
        if !(1..=MAX_DIMS).contains(&dims) {
            return invalid(reader.file, format!("1 to {MAX_DIMS} dimensions"), dims.to_string());
        }
        let mut ne = Vec::new();
        let mut elements = 1u64;
        for _ in 0..dims {
            let n = reader.u64(&name)?;
            // No sum of sizes further on can leave 64 bits below this.
            let product = elements.checked_mul(n).filter(|product| *product < 1 << 56);
            match (product, usize::try_from(n)) {
                (Some(product), Ok(n)) if n > 0 => {
                    elements = product;
                    ne.push(n);
                }
                _ => {
                    let expected = "dimensions of at least 1, below 2^56 elements";
                    return invalid(reader.file, expected.into(), format!("{ne:?} and {n}"));
                }
            }
        }
        let type_id = reader.u32(&name)?;
        let offset = reader.u64(&name)?;
        Ok(Self { ne, elements, type_id, offset, name })
    }
}

/// The part of a file that holds tensors.
struct Data<'a> {
    file: &'a Arc<Path>,
    bytes: &'a SharedBytes,
    start: u64,
    alignment: u64,
}

impl Data<'_> {
    /// Finds the bytes of every tensor and checks that no two share any.
    fn place(&self, mut entries: Vec<Entry>) -> Result<BTreeMap<String, GgufTensor>, LoadError> {
        entries.sort_by_key(|entry| entry.offset);
        let mut tensors = BTreeMap::new();
        let length = (self.bytes.len() as u64).saturating_sub(self.start);
        let ends: Vec<u64> =
            entries.iter().skip(1).map(|next| next.offset).chain([length]).collect();
        for (index, entry) in entries.into_iter().enumerate() {
            let tensor = self.tensor(entry, ends[index], length)?;
            if let Some(first) = tensors.insert(tensor.name.clone(), tensor) {
                return Err(first.wrong("one tensor of this name", "two"));
            }
        }
        Ok(tensors)
    }

    /// A tensor; `end` is where the next begins, or the end of the data.
    fn tensor(&self, entry: Entry, end: u64, length: u64) -> Result<GgufTensor, LoadError> {
        let Entry { name, ne, elements, type_id, offset } = entry;
        let invalid = |expected: String, found: String| {
            Err(LoadError::invalid(self.file, &*name, expected, found))
        };
        if !offset.is_multiple_of(self.alignment) {
            let expected = format!("an offset that is a multiple of {}", self.alignment);
            return invalid(expected, offset.to_string());
        }
        if offset > length {
            let expected = format!("an offset within the {length} bytes of data in the file");
            return invalid(expected, offset.to_string());
        }
        let space = end.min(length) - offset;
        let meaning = match meaning(type_id, ne[0] as u64, elements, space, self.alignment) {
            Ok(meaning) => meaning,
            Err((kind, block)) => {
                let expected =
                    format!("rows of a multiple of {block} elements, since it is {kind}");
                return invalid(expected, format!("rows of {}", ne[0]));
            }
        };
        let size = match meaning.bytes {
            Some(size) if size <= space => size,
            Some(size) => {
                let whose =
                    if end < length { "to the next tensor" } else { "to the end of the file" };
                return invalid(
                    format!("{size} bytes for {} {ne:?}", meaning.name),
                    format!("{space} bytes {whose}"),
                );
            }
            None => space,
        };
        let start = (self.start + offset) as usize;
        let Some(bytes) = self.bytes.slice(start..start + size as usize) else {
            return invalid("data within the file".into(), format!("{size} bytes at {start}"));
        };
        Ok(GgufTensor { type_id, meaning, ne, bytes, file: Arc::clone(self.file), name })
    }
}

#[cfg(test)]
mod tests {
    use super::super::metadata::Value;
    use super::*;

    fn string(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }

    /// A file of two tensors: 4 values of F32 at 0, and I2_S of 128 × 2 at 32.
    fn file() -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(3u32.to_le_bytes());
        file.extend(2u64.to_le_bytes());
        file.extend(4u64.to_le_bytes());
        file.extend([string("a.text"), 8u32.to_le_bytes().into(), string("grün")].concat());
        file.extend([string("an.integer"), 5u32.to_le_bytes().into()].concat());
        file.extend((-7i32).to_le_bytes());
        file.extend([string("strings"), 9u32.to_le_bytes().into()].concat());
        file.extend([&8u32.to_le_bytes()[..], &2u64.to_le_bytes(), &string("one")].concat());
        file.extend([&1u64.to_le_bytes()[..], b"\xff"].concat());
        file.extend([string("deep"), 9u32.to_le_bytes().into()].concat());
        file.extend([&9u32.to_le_bytes()[..], &2u64.to_le_bytes()].concat());
        file.extend([&4u32.to_le_bytes()[..], &1u64.to_le_bytes(), &9u32.to_le_bytes()].concat());
        file.extend([&7u32.to_le_bytes()[..], &2u64.to_le_bytes(), &[0, 1]].concat());
        for (name, ne, kind, offset) in
            [("floats", vec![4u64], 0u32, 0u64), ("codes", vec![128, 2], 36, 32)]
        {
            file.extend([string(name), (ne.len() as u32).to_le_bytes().into()].concat());
            file.extend(ne.iter().flat_map(|n| n.to_le_bytes()));
            file.extend([&kind.to_le_bytes()[..], &offset.to_le_bytes()].concat());
        }
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend([1.0f32, 2.0, 3.0, 4.0].iter().flat_map(|x| x.to_le_bytes()));
        file.extend([0; 16]);
        file.extend([0x55; 64]);
        file.extend([0; 32]);
        file
    }

    fn read(bytes: Vec<u8>) -> Result<Gguf, LoadError> {
        Gguf::read(Path::new("m.gguf").into(), SharedBytes::new(bytes))
    }

    #[test]
    fn values_and_tensors_are_found() {
        let gguf = read(file()).unwrap_or_else(|e| panic!("{e}"));
        let metadata = &gguf.metadata;
        assert_eq!(metadata.string("a.text").expect("a string"), Some("grün"));
        assert_eq!(metadata.get("an.integer"), Some(Value::Integer(-7)));
        assert_eq!(
            metadata.integer("an.integer", 0..=9).expect_err("negative").to_string(),
            "m.gguf: an.integer: expected an integer from 0 to 9, found -7 (i32)"
        );
        let mut strings = metadata.strings("strings").expect("strings").expect("there");
        assert_eq!(strings.len(), 2);
        assert_eq!(strings.next().expect("one").expect("UTF-8"), "one");
        assert_eq!(
            strings.next().expect("two").expect_err("not UTF-8").to_string(),
            "m.gguf: strings[1]: expected UTF-8 text, found byte 0xff at offset 0 of the string"
        );
        let Some(Value::Array(deep)) = metadata.get("deep") else { panic!("an array") };
        let items: Vec<Vec<Value<'_>>> = deep
            .iter()
            .map(|item| if let Value::Array(item) = item { item.iter().collect() } else { vec![] })
            .collect();
        let expected = [vec![Value::Integer(9)], vec![Value::Bool(false), Value::Bool(true)]];
        assert_eq!(items, expected);

        let floats = gguf.tensor("floats").expect("there");
        assert_eq!((floats.type_name(), floats.shape()), ("F32".into(), vec![4]));
        assert_eq!(floats.bytes[12..], 4.0f32.to_le_bytes());
        let codes = gguf.tensor("codes").expect("there");
        assert_eq!((codes.shape(), codes.bytes.len()), (vec![2, 128], 96));
    }

    #[test]
    fn every_cut_is_an_error() {
        let file = file();
        for cut in 0..file.len() {
            let error = read(file[..cut].to_vec()).expect_err("cut").to_string();
            assert!(error.starts_with("m.gguf: "), "cut at {cut}: {error}");
        }
    }

    #[test]
    fn flipped_bits_are_no_panic() {
        let file = file();
        for at in 0..8 * file.len() {
            let mut file = file.clone();
            file[at / 8] ^= 1 << (at % 8);
            if let Ok(gguf) = read(file) {
                assert_eq!(gguf.metadata.described().count(), 4);
            }
        }
    }
}
