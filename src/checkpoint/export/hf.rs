//! A Hugging Face folder: `config.json`, packed safetensors, and the files of the tokenizer.
//!
//! The form is that of microsoft/bitnet-b1.58-2B-4T: `autobitlinear`, `offline`, where a matrix is
//! multiplied by its `weight_scale`. It is written for Llamas too: the scale of the other form,
//! `bitlinear`, divides, and not every f32 has a reciprocal that gives it back.
//!
//! The container is written here and not by the safetensors crate, which wants all tensors at once
//! or, through its `View`, without a way to fail or to be stopped.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use half::{bf16, f16};
use serde_json::{Map, Value, json};

use super::destination::{self, NewFolder};
use super::encode::{TableType, pack_rows};
use super::hf_texts::texts;
use super::stream::Stream;
use super::{ExportOptions, Exported, Progress, Source, Table, own_type, threads, write_table};
use crate::checkpoint::hf::form::{FORMS, Form};
use crate::checkpoint::hf::weights::PROJECTIONS as NAMES;
use crate::checkpoint::safetensors::{INDEX, SINGLE};
use crate::error::ExportError;
use crate::model::config::{NormRole, Projection};
use crate::tensor::FloatType;

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// The most bytes of tensors in a file, as transformers has it, unless one tensor has more.
const SHARD: u64 = 5_000_000_000;

/// A tensor to be written.
struct Tensor {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: u64,
    data: Data,
}

enum Data {
    Norm(NormRole, FloatType),
    Packed { layer: usize, projection: Projection },
    Scale { layer: usize, projection: Projection, float: FloatType },
    Table(Table, TableType),
}

/// Writes a folder.
pub(super) fn write(
    source: &Source<'_>,
    path: &Path,
    options: &ExportOptions,
    progress: Progress<'_>,
) -> Result<Exported, ExportError> {
    if options.arch.is_some() {
        return Err(ExportError::Unfit {
            what: "--arch".into(),
            reason: "it names the architecture of a GGUF file".into(),
            instead: "--type hf does without".into(),
        });
    }
    let config = source.weights.config();
    let mut forms = FORMS.iter().filter(|form| form.family == config.family);
    // Of a family that both embeds and writes, the class that does what the model does.
    let alike = forms.clone().find(|form| form.embeds == source.embeds);
    let form = alike.or_else(|| forms.next()).ok_or_else(|| ExportError::Unfit {
        what: "the model's family".into(),
        reason: format!("transformers has no class for {}", config.family.row().name),
        instead: "there is no other format".into(),
    })?;
    let folder = NewFolder::create(path, options.overwrite)?;
    let tensors = plan(source, form, options.tables, &mut *progress)?;
    let shards = shards(&tensors, SHARD);
    let headers: Vec<Vec<u8>> = shards.iter().map(|shard| header(shard)).collect();
    let total = headers.iter().map(|header| header.len() as u64).sum::<u64>()
        + tensors.iter().map(|tensor| tensor.bytes).sum::<u64>();

    let embedding = tensors.iter().find(|tensor| tensor.name == EMBEDDING);
    for (name, bytes) in texts(source, form, embedding.map_or("", |tensor| tensor.dtype))? {
        write_file(&folder, path, &name, &bytes)?;
    }
    if shards.len() > 1 {
        write_file(&folder, path, INDEX, index(&shards).to_string().as_bytes())?;
    }
    let mut done = 0;
    for (number, (shard, header)) in shards.iter().zip(&headers).enumerate() {
        let name = shard_name(number, shards.len());
        let file = folder.path().join(&name);
        // Messages name the place that the user knows.
        let failed = destination::write(&path.join(&name));
        let mut out = BufWriter::new(File::create_new(&file).map_err(&failed)?);
        let mut stream = Stream {
            out: &mut out,
            failed: &failed,
            progress: &mut *progress,
            threads: threads(options),
            done,
            total,
        };
        stream.write(header)?;
        for tensor in *shard {
            write_tensor(&mut stream, source, form, tensor)?;
        }
        done = stream.done;
        let file = out.into_inner().map_err(|error| failed(error.into_error()))?;
        file.sync_all().map_err(&failed)?;
    }
    folder.keep()?;
    let mut notes = Vec::new();
    if source.tokenizer()?.is_none() {
        notes.push("the model has no tokenizer, and neither has the folder".into());
    }
    Ok(Exported { bytes: total, tensors: tensors.len(), notes })
}

/// Every tensor. Types of large elements first, so that each tensor is aligned to its own.
fn plan(
    source: &Source<'_>,
    form: &Form,
    tables: Option<TableType>,
    progress: Progress<'_>,
) -> Result<Vec<Tensor>, ExportError> {
    let config = source.weights.config();
    let mut tensors = vec![table(source, Table::Embedding, tables)?];
    if !config.tied_head {
        tensors.push(table(source, Table::Head, tables)?);
    }
    tensors.push(norm(source, form, NormRole::Final)?);
    for layer in 0..config.layers {
        // Scales of master weights are known when all of them have been read.
        if !progress(0, 1) {
            return Err(ExportError::Cancelled);
        }
        for role in config.layer_norms(layer) {
            tensors.push(norm(source, form, role)?);
        }
        for projection in Projection::ALL {
            tensors.extend(matrix(source, layer, projection)?);
        }
    }
    tensors.sort_by_key(|tensor| match tensor.dtype {
        "F32" => 0,
        "U8" => 2,
        _ => 1,
    });
    Ok(tensors)
}

fn table(
    source: &Source<'_>,
    table: Table,
    kind: Option<TableType>,
) -> Result<Tensor, ExportError> {
    let name = match table {
        Table::Embedding => EMBEDDING,
        Table::Head => HEAD,
    };
    let host = source.table(table)?;
    let kind = kind.unwrap_or(own_type(host.float));
    if matches!(kind, TableType::Q8_0 | TableType::Q6K) {
        return Err(ExportError::Unfit {
            what: name.to_owned(),
            reason: format!("safetensors has no {}", kind.name()),
            instead: "--head f16, bf16 or f32 goes with --type hf".into(),
        });
    }
    Ok(Tensor {
        name: name.to_owned(),
        dtype: kind.name(),
        shape: vec![host.rows, host.cols],
        bytes: (kind.row_bytes(host.cols) * host.rows) as u64,
        data: Data::Table(table, kind),
    })
}

fn norm(source: &Source<'_>, form: &Form, role: NormRole) -> Result<Tensor, ExportError> {
    let in_layer = |layer: usize, part: &str| format!("model.layers.{layer}.{part}.weight");
    let name = match role {
        NormRole::Attention(layer) => in_layer(layer, "input_layernorm"),
        NormRole::AttentionSub(layer) => in_layer(layer, form.attention_sub_norm),
        NormRole::Ffn(layer) => in_layer(layer, form.ffn_norm),
        NormRole::FfnSub(layer) => in_layer(layer, form.ffn_sub_norm),
        NormRole::QueryHead(layer) => in_layer(layer, "self_attn.q_norm"),
        NormRole::KeyHead(layer) => in_layer(layer, "self_attn.k_norm"),
        NormRole::PostAttention(layer) => in_layer(layer, "post_attention_layernorm"),
        NormRole::PostFfn(layer) => in_layer(layer, "post_feedforward_layernorm"),
        // The name that transformers' own class of linear layers has for it.
        NormRole::Projection(layer, projection) => {
            in_layer(layer, &format!("{}.rms_norm", NAMES[projection as usize].1))
        }
        NormRole::Final => "model.norm.weight".to_owned(),
    };
    let gain = stored_gain(source, form, role, &name)?;
    let float = smallest(&gain);
    Ok(Tensor {
        name,
        dtype: dtype(float),
        shape: vec![gain.len()],
        bytes: (gain.len() * float.size()) as u64,
        data: Data::Norm(role, float),
    })
}

/// The gains of a norm as its class stores them: less what it adds when it runs.
fn stored_gain(
    source: &Source<'_>,
    form: &Form,
    role: NormRole,
    name: &str,
) -> Result<Vec<f32>, ExportError> {
    let mut gain = source.weights.norm(role)?;
    let offset = form.offset(role);
    for stored in &mut gain {
        let value = *stored;
        *stored -= offset;
        if *stored + offset != value {
            return Err(ExportError::Unfit {
                what: name.to_owned(),
                reason: format!(
                    "its class adds {offset} to what is stored, and no f32 gives {value}"
                ),
                instead: "GGUF stores gains as they are".into(),
            });
        }
    }
    Ok(gain)
}

fn matrix(
    source: &Source<'_>,
    layer: usize,
    projection: Projection,
) -> Result<[Tensor; 2], ExportError> {
    let part = NAMES.iter().find(|(known, _)| *known == projection).map_or("", |(_, name)| name);
    let name = format!("model.layers.{layer}.{part}.weight");
    let matrix = source.weights.ternary(layer, projection)?;
    let (rows, cols) = (matrix.rows(), matrix.cols());
    if !rows.is_multiple_of(4) {
        return Err(ExportError::Unfit {
            what: name,
            reason: format!("it has {rows} rows, and transformers packs four to a byte"),
            instead: "GGUF (--type i2_s, tq2_0, tq1_0) holds any number of rows".into(),
        });
    }
    let float = smallest(&[matrix.scale()]);
    Ok([
        Tensor {
            name: format!("{name}_scale"),
            dtype: dtype(float),
            shape: vec![1],
            bytes: float.size() as u64,
            data: Data::Scale { layer, projection, float },
        },
        Tensor {
            name,
            dtype: "U8",
            shape: vec![rows / 4, cols],
            bytes: (rows / 4 * cols) as u64,
            data: Data::Packed { layer, projection },
        },
    ])
}

/// The shortest type that holds these values: what a checkpoint's values came from, as a rule.
fn smallest(values: &[f32]) -> FloatType {
    if values.iter().all(|value| bf16::from_f32(*value).to_f32() == *value) {
        FloatType::Bf16
    } else if values.iter().all(|value| f16::from_f32(*value).to_f32() == *value) {
        FloatType::F16
    } else {
        FloatType::F32
    }
}

fn dtype(float: FloatType) -> &'static str {
    own_type(float).name()
}

fn encode(values: &[f32], float: FloatType) -> Vec<u8> {
    match float {
        FloatType::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        FloatType::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        FloatType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

fn write_tensor(
    stream: &mut Stream<'_>,
    source: &Source<'_>,
    form: &Form,
    tensor: &Tensor,
) -> Result<(), ExportError> {
    match tensor.data {
        Data::Norm(role, float) => {
            stream.write(&encode(&stored_gain(source, form, role, &tensor.name)?, float))
        }
        Data::Scale { layer, projection, float } => {
            let scale = source.weights.ternary(layer, projection)?.scale();
            stream.write(&encode(&[scale], float))
        }
        Data::Table(table, kind) => write_table(stream, &source.table(table)?, kind, &tensor.name),
        Data::Packed { layer, projection } => {
            let matrix = source.weights.ternary(layer, projection)?;
            let (stored, cols) = (matrix.rows() / 4, matrix.cols());
            stream.rows(stored, cols, |first, bytes| {
                let mut codes = vec![0; 4 * cols];
                for (row, out) in bytes.chunks_exact_mut(cols).enumerate() {
                    for (quarter, codes) in codes.chunks_exact_mut(cols).enumerate() {
                        matrix.read_codes(quarter * stored + first + row, codes);
                    }
                    pack_rows(std::array::from_fn(|k| &codes[k * cols..][..cols]), out);
                }
                Ok(())
            })
        }
    }
}

/// Consecutive tensors that together have no more than `most` bytes.
fn shards(tensors: &[Tensor], most: u64) -> Vec<&[Tensor]> {
    let mut shards = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (at, tensor) in tensors.iter().enumerate() {
        if at > start && bytes + tensor.bytes > most {
            shards.push(&tensors[start..at]);
            (start, bytes) = (at, 0);
        }
        bytes += tensor.bytes;
    }
    shards.push(&tensors[start..]);
    shards
}

fn shard_name(number: usize, count: usize) -> String {
    if count == 1 {
        return SINGLE.to_owned();
    }
    format!("model-{:05}-of-{count:05}.safetensors", number + 1)
}

fn index(shards: &[&[Tensor]]) -> Value {
    let mut map = Map::new();
    let mut bytes = 0;
    for (number, shard) in shards.iter().enumerate() {
        for tensor in *shard {
            map.insert(tensor.name.clone(), shard_name(number, shards.len()).into());
            bytes += tensor.bytes;
        }
    }
    json!({ "metadata": { "total_size": bytes }, "weight_map": map })
}

/// The header of a file: its length, JSON, and spaces up to a multiple of 8.
fn header(tensors: &[Tensor]) -> Vec<u8> {
    let mut map = Map::new();
    // transformers refuses files without it.
    map.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.bytes;
        let entry = json!({
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [offset, end],
        });
        map.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let mut text = Value::Object(map).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.append(&mut text);
    header
}

/// Writes a file of the folder; `path` is where the folder will be, for messages.
fn write_file(
    folder: &NewFolder,
    path: &Path,
    name: &str,
    bytes: &[u8],
) -> Result<(), ExportError> {
    let failed = destination::write(&path.join(name));
    let place = folder.path().join(name);
    // Modules have folders of their own.
    std::fs::create_dir_all(place.parent().unwrap_or(folder.path())).map_err(&failed)?;
    let mut file = File::create_new(place).map_err(&failed)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(&failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_keep_the_order_and_the_limit() {
        let tensor = |bytes: u64| Tensor {
            name: bytes.to_string(),
            dtype: "F32",
            shape: vec![],
            bytes,
            data: Data::Norm(NormRole::Final, FloatType::F32),
        };
        let tensors: Vec<Tensor> = [3, 4, 5, 20, 1, 1].into_iter().map(tensor).collect();
        let sizes = |most| {
            let sizes = |shard: &&[Tensor]| shard.iter().map(|t| t.bytes).collect::<Vec<_>>();
            shards(&tensors, most).iter().map(sizes).collect::<Vec<_>>()
        };
        assert_eq!(sizes(100), [vec![3, 4, 5, 20, 1, 1]]);
        assert_eq!(sizes(8), [vec![3, 4], vec![5], vec![20], vec![1, 1]]);
        let index = index(&shards(&tensors, 8));
        assert_eq!(index["weight_map"]["20"], "model-00003-of-00004.safetensors");
    }
}
