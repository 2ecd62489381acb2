//! The element types of GGUF tensors: names, block sizes, and ids that forks give other meanings.
//!
//! Sources: ggml's `ggml.h` and `ggml-common.h` (mainline ids up to 42), microsoft/BitNet's fork
//! (I2_S, I8_S, TL1, TL2), ik_llama.cpp (ids from 134).

/// A type whose bytes this crate reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TensorType {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q6K,
    Tq1_0,
    Tq2_0,
    /// Microsoft's: 2-bit codes, one scale for the whole tensor behind them.
    I2S,
}

/// What an id means: a name, values to a block and bytes of it. Types without a `read` are known
/// so that their sizes can be checked and messages can name them.
struct Row {
    id: u32,
    name: &'static str,
    block: u64,
    bytes: u64,
    read: Option<TensorType>,
}

const fn row(id: u32, name: &'static str, block: u64, bytes: u64) -> Row {
    Row { id, name, block, bytes, read: None }
}

const fn read(id: u32, name: &'static str, block: u64, bytes: u64, kind: TensorType) -> Row {
    Row { id, name, block, bytes, read: Some(kind) }
}

/// Ids with one meaning.
const TYPES: &[Row] = &[
    read(0, "F32", 1, 4, TensorType::F32),
    read(1, "F16", 1, 2, TensorType::F16),
    read(2, "Q4_0", 32, 18, TensorType::Q4_0),
    row(3, "Q4_1", 32, 20),
    read(6, "Q5_0", 32, 22, TensorType::Q5_0),
    read(7, "Q5_1", 32, 24, TensorType::Q5_1),
    read(8, "Q8_0", 32, 34, TensorType::Q8_0),
    row(10, "Q2_K", 256, 84),
    row(11, "Q3_K", 256, 110),
    read(12, "Q4_K", 256, 144, TensorType::Q4K),
    row(13, "Q5_K", 256, 176),
    read(14, "Q6_K", 256, 210, TensorType::Q6K),
    row(15, "Q8_K", 256, 292),
    row(16, "IQ2_XXS", 256, 66),
    row(17, "IQ2_XS", 256, 74),
    row(18, "IQ3_XXS", 256, 98),
    row(19, "IQ1_S", 256, 50),
    row(20, "IQ4_NL", 32, 18),
    row(21, "IQ3_S", 256, 110),
    row(22, "IQ2_S", 256, 82),
    row(23, "IQ4_XS", 256, 136),
    row(24, "I8", 1, 1),
    row(25, "I16", 1, 2),
    row(26, "I32", 1, 4),
    row(27, "I64", 1, 8),
    row(28, "F64", 1, 8),
    row(29, "IQ1_M", 256, 56),
    read(30, "BF16", 1, 2, TensorType::Bf16),
    read(34, "TQ1_0", 256, 54, TensorType::Tq1_0),
    read(35, "TQ2_0", 256, 66, TensorType::Tq2_0),
];

/// Ids whose tensors cannot be read: of other forks, withdrawn, or new.
const OTHERS: &[(u32, &str)] = &[
    (4, "Q4_2 (withdrawn from ggml)"),
    (5, "Q4_3 (withdrawn from ggml)"),
    (9, "Q8_1"),
    (31, "Q4_0_4_4 (withdrawn from ggml)"),
    (32, "Q4_0_4_8 (withdrawn from ggml)"),
    (33, "Q4_0_8_8 (withdrawn from ggml)"),
    (37, "I8_S of bitnet.cpp or the withdrawn IQ4_NL_4_8"),
    (38, "TL1 of bitnet.cpp, whose layout depends on the program that wrote it"),
    (40, "NVFP4"),
    (41, "Q1_0"),
    (42, "Q2_0"),
    (134, "IQ1_BN of ik_llama.cpp"),
    (135, "IQ2_BN of ik_llama.cpp"),
    (335, "IQ2_BN_R4 of ik_llama.cpp"),
];

pub(crate) const I2_S: u32 = 36;
const TL2: u32 = 39;

/// What a tensor's id means, found out from the tensor where the id alone does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Meaning {
    /// `None` of a type that is not read.
    pub(crate) read: Option<TensorType>,
    pub(crate) name: &'static str,
    /// Bytes that the tensor has by its shape; `None` if its type does not say.
    pub(crate) bytes: Option<u64>,
}

/// What an id means for a tensor of `elements` values in rows of `row`, with `space` bytes to the
/// next tensor or the end of the file. An `Err` holds the block that rows must be made of.
pub(crate) fn meaning(
    id: u32,
    row: u64,
    elements: u64,
    space: u64,
    alignment: u64,
) -> Result<Meaning, (&'static str, u64)> {
    let of_blocks = |block: u64, bytes: u64| (elements / block).checked_mul(bytes);
    // Whether a tensor of so many bytes fills the space up to the padding.
    let fills = |bytes: Option<u64>| bytes.is_some_and(|b| b <= space && space - b < alignment);
    match id {
        I2_S => {
            let bytes = elements.div_ceil(4).checked_add(32);
            let withdrawn = of_blocks(32, 18);
            // The withdrawn type has more than twice the bytes, so both fill the space only if it
            // is tiny; then it is I2_S, which is the type that is in use.
            if !fills(bytes) && row.is_multiple_of(32) && fills(withdrawn) {
                let name = "IQ4_NL_4_4 (withdrawn from ggml, its id now used for I2_S)";
                return Ok(Meaning { read: None, name, bytes: withdrawn });
            }
            Ok(Meaning { read: Some(TensorType::I2S), name: "I2_S", bytes })
        }
        TL2 => {
            let mxfp4 = of_blocks(32, 17);
            if row.is_multiple_of(32) && fills(mxfp4) {
                return Ok(Meaning { read: None, name: "MXFP4", bytes: mxfp4 });
            }
            let name = "TL2 of bitnet.cpp, whose layout depends on the program that wrote it";
            Ok(Meaning { read: None, name, bytes: None })
        }
        _ => {
            let Some(known) = TYPES.iter().find(|known| known.id == id) else {
                let name = OTHERS.iter().find(|(other, _)| *other == id).map_or("", |(_, n)| n);
                return Ok(Meaning { read: None, name, bytes: None });
            };
            if !row.is_multiple_of(known.block) {
                return Err((known.name, known.block));
            }
            let bytes = of_blocks(known.block, known.bytes);
            Ok(Meaning { read: known.read, name: known.name, bytes })
        }
    }
}
