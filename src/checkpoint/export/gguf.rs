//! A GGUF file, version 3: a header of keys and tensors, then the tensors.
//!
//! Source of the container: `docs/gguf.md` of ggml-org/ggml. Keys and names of tensors:
//! `src/llama-arch.cpp` of llama.cpp and `3rdparty/llama.cpp` of microsoft/BitNet; what each
//! architecture does with them is in [`GgufArch`](super::GgufArch).

use std::path::Path;

use half::f16;

use super::destination::{self, NewFile};
use super::encode::{I2_S_TAIL, TableType, TernaryLayout};
use super::gguf_arch::architecture;
use super::gguf_header::header;
use super::stream::Stream;
use super::vocabulary;
use super::{ExportOptions, Exported, Progress, Source, Table, own_type, threads, write_table};
use crate::checkpoint::gguf::weights::norm_name;
use crate::error::ExportError;
use crate::model::config::{Family, ModelConfig, NormRole, Projection};

/// Tensors begin at multiples of this.
pub(super) const ALIGNMENT: u64 = 32;

/// Type ids of ggml. 36 is bitnet.cpp's; llama.cpp gave it up.
fn ternary_id(layout: TernaryLayout) -> u32 {
    match layout {
        TernaryLayout::Tq1 => 34,
        TernaryLayout::Tq2 => 35,
        TernaryLayout::I2S => 36,
    }
}

const F32_ID: u32 = 0;

fn table_id(kind: TableType) -> u32 {
    match kind {
        TableType::F32 => F32_ID,
        TableType::F16 => 1,
        TableType::Q8_0 => 8,
        TableType::Q6K => 14,
        TableType::Bf16 => 30,
    }
}

/// A tensor to be written.
pub(super) struct Tensor {
    pub(super) name: String,
    /// The fastest first, as ggml has them.
    pub(super) shape: Vec<usize>,
    pub(super) id: u32,
    pub(super) bytes: u64,
    data: Data,
}

enum Data {
    Norm(NormRole),
    /// `in_blocks` is the scale that stands in each block, where the layout has one there.
    Ternary {
        layer: usize,
        projection: Projection,
        in_blocks: f16,
    },
    /// One f32, for a scale that f16 does not hold.
    Scale(f32),
    Table(Table, TableType),
}

/// Writes a file.
pub(super) fn write(
    source: &Source<'_>,
    path: &Path,
    layout: TernaryLayout,
    options: &ExportOptions,
    progress: Progress<'_>,
) -> Result<Exported, ExportError> {
    let config = source.weights.config();
    let mut notes = Vec::new();
    let arch = architecture(config, layout, options.arch, &mut notes)?;
    check_columns(config, layout)?;
    let vocabulary = vocabulary::read(source)?;
    // Before the tensors are looked at, which can take a while.
    let mut new = NewFile::create(path, options.overwrite)?;
    let tensors = plan(source, layout, options.tables, &mut *progress)?;
    let header = header(source, arch, layout, vocabulary.as_ref(), &tensors);

    let scales = tensors.iter().filter(|t| matches!(t.data, Data::Scale(_))).count();
    if scales > 0 {
        notes.push(format!(
            "{scales} scales are no f16 numbers and are kept exact in tensors of their own \
             (.scale), which recent versions of llama.cpp read"
        ));
    }
    if source.embeds && source.pooled().is_none() {
        notes.push(format!("GGUF has no name for the model's pooling, {}", source.pooling));
    }
    match vocabulary {
        Some(vocabulary) => notes.extend(vocabulary.notes),
        None => notes.push("the model has no tokenizer, and neither has the file".into()),
    }

    let aligned = |bytes: u64| bytes.next_multiple_of(ALIGNMENT);
    let total = aligned(header.len() as u64)
        + tensors.iter().map(|tensor| aligned(tensor.bytes)).sum::<u64>();
    let failed = destination::write(path);
    let mut stream = Stream {
        out: &mut new.file,
        failed: &failed,
        progress,
        threads: threads(options),
        done: 0,
        total,
    };
    stream.write(&header)?;
    stream.pad(ALIGNMENT)?;
    for tensor in &tensors {
        write_tensor(&mut stream, source, layout, tensor)?;
        stream.pad(ALIGNMENT)?;
    }
    debug_assert_eq!(stream.done, total);
    new.keep()?;
    Ok(Exported { bytes: total, tensors: tensors.len(), notes })
}

/// Whether every matrix has columns in whole blocks.
fn check_columns(config: &ModelConfig, layout: TernaryLayout) -> Result<(), ExportError> {
    let block = layout.block();
    for projection in Projection::ALL {
        let (_, cols) = config.shape(projection);
        if cols.is_multiple_of(block) {
            continue;
        }
        let others = match layout {
            TernaryLayout::I2S => "--type hf holds",
            _ if Projection::ALL.iter().all(|p| config.shape(*p).1.is_multiple_of(128)) => {
                "--type i2_s and --type hf hold"
            }
            _ => "--type hf holds",
        };
        return Err(ExportError::Unfit {
            what: tensor_name(0, projection),
            reason: format!(
                "its rows have {cols} weights, and {} holds them in blocks of {block} that may not \
                 straddle rows",
                layout.name()
            ),
            instead: format!("{others} it"),
        });
    }
    Ok(())
}

/// Every tensor of the file, in order.
fn plan(
    source: &Source<'_>,
    layout: TernaryLayout,
    tables: Option<TableType>,
    progress: Progress<'_>,
) -> Result<Vec<Tensor>, ExportError> {
    let config = source.weights.config();
    let mut tensors = vec![table(source, Table::Embedding, tables)?];
    for layer in 0..config.layers {
        // Scales of master weights are known when all of them have been read.
        if !progress(0, 1) {
            return Err(ExportError::Cancelled);
        }
        for role in config.layer_norms(layer) {
            tensors.push(norm(source, role)?);
        }
        for projection in Projection::ALL {
            let (rows, cols) = config.shape(projection);
            let name = tensor_name(layer, projection);
            let mut scale = None;
            let mut in_blocks = f16::ONE;
            if layout != TernaryLayout::I2S {
                let exact = source.weights.ternary(layer, projection)?.scale();
                if f16::from_f32(exact).to_f32() == exact {
                    in_blocks = f16::from_f32(exact);
                } else {
                    scale = Some(Tensor {
                        name: name.replace(".weight", ".scale"),
                        shape: vec![1],
                        id: F32_ID,
                        bytes: 4,
                        data: Data::Scale(exact),
                    });
                }
            }
            let tail = if layout == TernaryLayout::I2S { I2_S_TAIL } else { 0 };
            tensors.push(Tensor {
                name,
                shape: vec![cols, rows],
                id: ternary_id(layout),
                bytes: (layout.row_bytes(cols) * rows + tail) as u64,
                data: Data::Ternary { layer, projection, in_blocks },
            });
            tensors.extend(scale);
        }
    }
    tensors.push(norm(source, NormRole::Final)?);
    if !config.tied_head {
        tensors.push(table(source, Table::Head, tables)?);
    }
    Ok(tensors)
}

fn table(
    source: &Source<'_>,
    table: Table,
    kind: Option<TableType>,
) -> Result<Tensor, ExportError> {
    let name = match table {
        Table::Embedding => "token_embd.weight",
        Table::Head => "output.weight",
    };
    let host = source.table(table)?;
    let kind = kind.unwrap_or(own_type(host.float));
    if !host.cols.is_multiple_of(kind.block()) {
        return Err(ExportError::Unfit {
            what: name.to_owned(),
            reason: format!(
                "its rows have {} values, and {} holds them in blocks of {}",
                host.cols,
                kind.name(),
                kind.block()
            ),
            instead: "--head f16, bf16 and f32 hold it".into(),
        });
    }
    Ok(Tensor {
        name: name.to_owned(),
        shape: vec![host.cols, host.rows],
        id: table_id(kind),
        bytes: (kind.row_bytes(host.cols) * host.rows) as u64,
        data: Data::Table(table, kind),
    })
}

fn norm(source: &Source<'_>, role: NormRole) -> Result<Tensor, ExportError> {
    let name = norm_name(role);
    let width = source.weights.norm(role)?.len();
    let bytes = 4 * width as u64;
    Ok(Tensor { name, shape: vec![width], id: F32_ID, bytes, data: Data::Norm(role) })
}

fn tensor_name(layer: usize, projection: Projection) -> String {
    let part = match projection {
        Projection::Query => "attn_q",
        Projection::Key => "attn_k",
        Projection::Value => "attn_v",
        Projection::Output => "attn_output",
        Projection::Gate => "ffn_gate",
        Projection::Up => "ffn_up",
        Projection::Down => "ffn_down",
    };
    format!("blk.{layer}.{part}.weight")
}

fn write_tensor(
    stream: &mut Stream<'_>,
    source: &Source<'_>,
    layout: TernaryLayout,
    tensor: &Tensor,
) -> Result<(), ExportError> {
    match tensor.data {
        Data::Scale(scale) => stream.write(&scale.to_le_bytes()),
        Data::Norm(role) => {
            let gain = source.weights.norm(role)?;
            stream.write(&gain.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())
        }
        Data::Table(table, kind) => write_table(stream, &source.table(table)?, kind, &tensor.name),
        Data::Ternary { layer, projection, in_blocks } => {
            let matrix = source.weights.ternary(layer, projection)?;
            let (count, cols) = (matrix.rows(), matrix.cols());
            let row_bytes = layout.row_bytes(cols);
            let interleave = interleaved(source.weights.config(), projection);
            stream.rows(count, row_bytes, |first, bytes| {
                let mut codes = vec![0; cols];
                for (row, out) in bytes.chunks_exact_mut(row_bytes).enumerate() {
                    matrix.read_codes(interleave(first + row), &mut codes);
                    layout.encode(&codes, in_blocks, out);
                }
                Ok(())
            })?;
            stream.write(&layout.tail(matrix.scale()))
        }
    }
}

/// Which row of the model is the given row of the file. RoPE turns pairs of rows of a head: in the
/// model those that are half a head apart, in a file of the architecture `llama` neighbours
/// (`LlamaModel.permute` in `conversion/llama.py` of llama.cpp).
fn interleaved(config: &ModelConfig, projection: Projection) -> impl Fn(usize) -> usize + Sync {
    let dim = config.heads.dim;
    let turns =
        config.family == Family::Llama && matches!(projection, Projection::Query | Projection::Key);
    move |row| {
        if !turns {
            return row;
        }
        let within = row % dim;
        row - within + within % 2 * (dim / 2) + within / 2
    }
}
