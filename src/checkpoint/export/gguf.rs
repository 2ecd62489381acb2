//! A GGUF file, version 3: a header of keys and tensors, then the tensors.
//!
//! Source of the container: `docs/gguf.md` of ggml-org/ggml. Keys and names of tensors:
//! `src/llama-arch.cpp` of llama.cpp and `3rdparty/llama.cpp` of microsoft/BitNet; what each
//! architecture does with them is in [`GgufArch`].

use std::path::Path;

use half::f16;

use super::destination::{self, NewFile};
use super::encode::{I2_S_TAIL, TableType, TernaryLayout};
use super::stream::Stream;
use super::vocabulary::{self, Vocabulary};
use super::{
    ExportOptions, Exported, GgufArch, Progress, Source, Table, own_type, threads, write_table,
};
use crate::backend::ops::Activation;
use crate::checkpoint::gguf::weights::norm_name;
use crate::checkpoint::pooling::Pooling;
use crate::error::ExportError;
use crate::model::config::{Attention, Family, ModelConfig, NormRole, Projection};

/// Tensors begin at multiples of this.
const ALIGNMENT: u64 = 32;

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

/// `general.file_type`: what most of the tensors are. 40 is bitnet.cpp's number; llama.cpp has
/// given it to another type since, and prints it only.
fn file_type(layout: TernaryLayout) -> u32 {
    match layout {
        TernaryLayout::Tq1 => 36,
        TernaryLayout::Tq2 => 37,
        TernaryLayout::I2S => 40,
    }
}

/// A tensor to be written.
struct Tensor {
    name: String,
    /// The fastest first, as ggml has them.
    shape: Vec<usize>,
    id: u32,
    bytes: u64,
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

/// The architecture whose engines compute what the model does.
fn architecture(
    config: &ModelConfig,
    layout: TernaryLayout,
    wish: Option<GgufArch>,
    notes: &mut Vec<String>,
) -> Result<&'static str, ExportError> {
    let refuse = |what: &str, reason: String| {
        let instead = "--type hf keeps the model as it is".to_owned();
        Err(ExportError::Unfit { what: what.to_owned(), reason, instead })
    };
    let activation = config.activation;
    let row = config.family.row();
    if config.attention != Attention::default() && config.family != Family::Gemma3 {
        let reason = "it has a scale or windows of its own, which the architecture has no key for";
        return refuse("the model's attention", reason.into());
    }
    if let Family::Llama | Family::Qwen3 = config.family {
        let arch = if config.family == Family::Llama { "llama" } else { "qwen3" };
        if wish.is_some() {
            let reason = format!("it is for the BitNet family, and this is {}", row.name);
            return refuse("--arch", reason);
        }
        if activation != Activation::Silu {
            let reason = format!("engines compute SiLU for {arch}, and this model {activation:?}");
            return refuse("the activation", reason);
        }
        if row.projection_norms {
            notes.push(
                "of other engines bitnet.cpp alone reads the norms before projections, since 2026"
                    .into(),
            );
        }
        return Ok(arch);
    }
    if config.family != Family::BitNet {
        return refuse("the model's family", format!("GGUF is not written for {}", row.name));
    }
    let arch = match (activation, wish) {
        (Activation::Relu2, None) => GgufArch::BitNetB158,
        (Activation::Silu, None) => GgufArch::BitNet,
        (Activation::Silu, Some(GgufArch::BitNetB158)) => {
            let reason = "engines compute ReLU² for bitnet-b1.58, and this model SiLU".into();
            return refuse("--arch", reason);
        }
        (Activation::Relu2 | Activation::Silu, Some(arch)) => arch,
        (other, _) => {
            let reason = format!("no engine computes {other:?} for this family");
            return refuse("the activation", reason);
        }
    };
    if activation == Activation::Relu2 && arch == GgufArch::BitNet {
        notes.push(
            "engines that do not read bitnet.hidden_activation compute SiLU where this model has \
             ReLU², and write nonsense"
                .into(),
        );
    } else if arch == GgufArch::BitNetB158 && layout != TernaryLayout::I2S {
        notes.push(
            "llama.cpp itself does not know the architecture bitnet-b1.58; --arch bitnet writes \
             what its newest versions read"
                .into(),
        );
    }
    Ok(arch.name())
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

/// Everything before the tensors' bytes, not padded.
fn header(
    source: &Source<'_>,
    arch: &str,
    layout: TernaryLayout,
    vocabulary: Option<&Vocabulary>,
    tensors: &[Tensor],
) -> Vec<u8> {
    let mut keys = Keys::default();
    model_keys(&mut keys, source, arch, layout);
    match vocabulary {
        Some(vocabulary) => vocabulary_keys(&mut keys, source, vocabulary),
        // What llama.cpp's converter writes for a model without one.
        None => keys.text("tokenizer.ggml.model", "no_vocab"),
    }
    let mut header = b"GGUF".to_vec();
    header.extend(3u32.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend(keys.count.to_le_bytes());
    header.append(&mut keys.bytes);
    let mut offset = 0u64;
    for tensor in tensors {
        put_text(&mut header, &tensor.name);
        header.extend((tensor.shape.len() as u32).to_le_bytes());
        for &size in &tensor.shape {
            header.extend((size as u64).to_le_bytes());
        }
        header.extend(tensor.id.to_le_bytes());
        header.extend(offset.to_le_bytes());
        offset += tensor.bytes.next_multiple_of(ALIGNMENT);
    }
    header
}

fn model_keys(keys: &mut Keys, source: &Source<'_>, arch: &str, layout: TernaryLayout) {
    let config = source.weights.config();
    let of_arch = |key: &str| format!("{arch}.{key}");
    keys.text("general.architecture", arch);
    keys.text("general.type", "model");
    keys.text("general.name", source.name);
    keys.integer("general.file_type", file_type(layout));
    keys.integer("general.quantization_version", 2);
    for (key, size) in [
        ("vocab_size", config.vocabulary),
        ("context_length", config.context),
        ("embedding_length", config.hidden),
        ("block_count", config.layers),
        ("feed_forward_length", config.ffn),
        ("rope.dimension_count", config.heads.dim),
        ("attention.head_count", config.heads.query),
        ("attention.head_count_kv", config.heads.kv),
        ("attention.key_length", config.heads.dim),
        ("attention.value_length", config.heads.dim),
    ] {
        keys.integer(&of_arch(key), size as u32);
    }
    keys.float(&of_arch("attention.layer_norm_rms_epsilon"), config.rms_eps);
    keys.float(&of_arch("rope.freq_base"), config.rope_theta as f32);
    if let Some(pooling) = source.pooled() {
        let kind = match pooling {
            Pooling::Mean => 1,
            Pooling::Cls => 2,
            Pooling::Last => 3,
        };
        keys.integer(&of_arch("pooling_type"), kind);
    }
    if config.family == Family::BitNet {
        let activations = config.family.row().activations.iter();
        let name = activations.clone().find(|(_, known)| *known == config.activation);
        keys.text(&of_arch("hidden_activation"), name.map_or("silu", |(name, _)| name));
    }
}

fn vocabulary_keys(keys: &mut Keys, source: &Source<'_>, vocabulary: &Vocabulary) {
    let of = |key: &str| format!("tokenizer.ggml.{key}");
    keys.text(&of("model"), vocabulary.kind);
    keys.text(&of("pre"), vocabulary.pre);
    keys.texts(&of("tokens"), &vocabulary.tokens);
    if !vocabulary.scores.is_empty() {
        keys.array(&of("scores"), FLOAT, vocabulary.scores.iter().map(|s| s.to_le_bytes()));
    }
    keys.array(&of("token_type"), SIGNED, vocabulary.types.iter().map(|t| t.to_le_bytes()));
    if vocabulary.kind == "gpt2" {
        keys.texts(&of("merges"), &vocabulary.merges);
    }
    for (key, id) in [
        ("bos_token_id", vocabulary.bos),
        ("eos_token_id", vocabulary.eos),
        ("eot_token_id", vocabulary.eot),
        ("unknown_token_id", vocabulary.unknown),
        ("padding_token_id", vocabulary.pad),
    ] {
        if let Some(id) = id {
            keys.integer(&of(key), id);
        }
    }
    keys.boolean(&of("add_bos_token"), vocabulary.add_bos);
    keys.boolean(&of("add_eos_token"), vocabulary.add_eos);
    if let Some(prefix) = vocabulary.add_space_prefix {
        keys.boolean(&of("add_space_prefix"), prefix);
    }
    if let Some(template) = &source.tokenizer.chat_template {
        keys.text("tokenizer.chat_template", template);
    }
    let named: Vec<_> = source.tokenizer.named_chat_templates.iter().collect();
    let named = named.iter().filter(|(name, _)| name != "default");
    let names: Vec<String> = named.clone().map(|(name, _)| name.clone()).collect();
    for (name, template) in named {
        keys.text(&format!("tokenizer.chat_template.{name}"), template);
    }
    if !names.is_empty() {
        keys.texts("tokenizer.chat_templates", &names);
    }
}

/// Types of values.
const UNSIGNED: u32 = 4;
const SIGNED: u32 = 5;
const FLOAT: u32 = 6;
const BOOLEAN: u32 = 7;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// Keys and values as bytes.
#[derive(Default)]
struct Keys {
    count: u64,
    bytes: Vec<u8>,
}

impl Keys {
    fn key(&mut self, key: &str, kind: u32) {
        self.count += 1;
        put_text(&mut self.bytes, key);
        self.bytes.extend(kind.to_le_bytes());
    }

    fn integer(&mut self, key: &str, value: u32) {
        self.key(key, UNSIGNED);
        self.bytes.extend(value.to_le_bytes());
    }

    fn float(&mut self, key: &str, value: f32) {
        self.key(key, FLOAT);
        self.bytes.extend(value.to_le_bytes());
    }

    fn boolean(&mut self, key: &str, value: bool) {
        self.key(key, BOOLEAN);
        self.bytes.push(u8::from(value));
    }

    fn text(&mut self, key: &str, value: &str) {
        self.key(key, TEXT);
        put_text(&mut self.bytes, value);
    }

    fn texts(&mut self, key: &str, values: &[String]) {
        self.key(key, ARRAY);
        self.bytes.extend(TEXT.to_le_bytes());
        self.bytes.extend((values.len() as u64).to_le_bytes());
        for value in values {
            put_text(&mut self.bytes, value);
        }
    }

    fn array(&mut self, key: &str, kind: u32, values: impl ExactSizeIterator<Item = [u8; 4]>) {
        self.key(key, ARRAY);
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend((values.len() as u64).to_le_bytes());
        self.bytes.extend(values.flatten());
    }
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}
