//! Host tensors as a checkpoint holds them: bytes that stay where they are (usually in a memory
//! map), and what they mean.

use std::ops::Range;
use std::sync::Arc;

/// A part of some shared bytes: a memory-mapped file, an embedded one, a vector.
#[derive(Clone)]
pub struct SharedBytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
}

impl SharedBytes {
    /// All the bytes of `owner`.
    pub fn new(owner: impl AsRef<[u8]> + Send + Sync + 'static) -> Self {
        let range = 0..owner.as_ref().len();
        Self { owner: Arc::new(owner), range }
    }

    /// A part of these bytes, `None` where the range does not lie within them.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        let (start, end) =
            (self.range.start.checked_add(range.start)?, self.range.start.checked_add(range.end)?);
        (start <= end && end <= self.range.end)
            .then(|| Self { owner: Arc::clone(&self.owner), range: start..end })
    }
}

impl std::ops::Deref for SharedBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }
}

impl std::fmt::Debug for SharedBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SharedBytes({} bytes)", self.len())
    }
}

/// The element type of a float tensor on the host; all are little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FloatType {
    /// bfloat16: the upper half of an f32.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
}

impl FloatType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// The name as files and tables write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }

    /// Decodes little-endian `bytes` into `out`; both hold the same number of elements.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        debug_assert_eq!(bytes.len(), out.len() * self.size());
        match self {
            Self::Bf16 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *o = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
                }
            }
            Self::F16 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *o = half::f16::from_le_bytes([b[0], b[1]]).to_f32();
                }
            }
            Self::F32 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
        }
    }
}

/// A row-major float matrix on the host: an embedding table or an output head.
///
/// The bytes need not be aligned to the element size: safetensors does not promise it.
#[derive(Debug, Clone)]
pub struct HostTable {
    /// Rows: the vocabulary.
    pub rows: usize,
    /// Columns: the hidden size.
    pub cols: usize,
    /// Type of the elements.
    pub float: FloatType,
    /// `rows × cols` elements.
    pub bytes: SharedBytes,
}

impl HostTable {
    /// The bytes of one row.
    pub fn row(&self, row: usize) -> &[u8] {
        let stride = self.cols * self.float.size();
        &self.bytes[row * stride..][..stride]
    }

    /// Decodes one row into `out` (`cols` elements).
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        self.float.decode(self.row(row), out);
    }
}
