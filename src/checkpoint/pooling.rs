//! Which rows of a text become its embedding, and what a checkpoint says of it.
//!
//! Folders of sentence-transformers have `modules.json`, a list of the modules that a text goes
//! through, and the config of each in a folder of its own (`sentence_transformers/models/Pooling.py`;
//! since version 6 `sentence_transformer/modules/pooling.py`). GGUF files have `{arch}.pooling_type`
//! (`enum llama_pooling_type` in `include/llama.h` of llama.cpp).

use std::fmt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::files::{Files, missing};
use super::gguf::metadata::Metadata;
use super::json::{Fields, describe, parse_array, parse_object, quote};
use super::tokenizer_files::TokenizerFiles;
use crate::error::{LoadError, shown};
use crate::model::config::Family;
use crate::text::Tokenizer;

/// Which of a text's rows, after the final norm, become its embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Pooling {
    /// That of the last token, which in a causal model has seen all others.
    #[default]
    Last,
    /// The mean of all.
    Mean,
    /// That of the first token.
    Cls,
}

impl Pooling {
    /// As `trine embed --pooling` calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Last => "last",
            Self::Mean => "mean",
            Self::Cls => "cls",
        }
    }
}

/// What a checkpoint says of pooling: what is in force where a caller names none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum DeclaredPooling {
    /// Nothing. [`Pooling::Last`] is in force, as the model cards of BitNet-embedding have it.
    #[default]
    Nothing,
    /// A pooling.
    Declared {
        /// Which.
        pooling: Pooling,
        /// The file that says so.
        file: PathBuf,
        /// Its field.
        field: String,
    },
    /// One that is not implemented here. The checkpoint can be used for everything else, and with a
    /// pooling that the caller names.
    Unsupported {
        /// What the file asks for.
        found: String,
        /// The file.
        file: PathBuf,
        /// Its field.
        field: String,
    },
}

/// What there is beside the one that a checkpoint asks for.
const SUPPORTED: &str = "last, mean and cls, one of which can be named instead (--pooling)";

impl DeclaredPooling {
    /// What there is to say of the pooling of a GGUF file that only embeds.
    pub(crate) fn doubt(&self) -> Option<&'static str> {
        let mean = matches!(self, Self::Declared { pooling: Pooling::Mean, .. });
        mean.then_some(
            "pooling: mean, as the file says; bitnet.cpp's converter writes that, too, where a model \
             came without 1_Pooling, and the model cards of BitNet-embedding ask for last",
        )
    }

    /// The pooling that is in force.
    ///
    /// # Errors
    ///
    /// A sentence that names the pooling that the checkpoint asks for, where it is not implemented.
    pub fn in_force(&self) -> Result<Pooling, LoadError> {
        match self {
            Self::Nothing => Ok(Pooling::default()),
            Self::Declared { pooling, .. } => Ok(*pooling),
            Self::Unsupported { found, file, field } => {
                Err(LoadError::unsupported(file, field, found, SUPPORTED))
            }
        }
    }
}

/// The pooling and where it comes from.
impl fmt::Display for DeclaredPooling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => write!(f, "{}, since nothing says another", Pooling::default().name()),
            Self::Declared { pooling, file, field } => {
                write!(f, "{}, by {field} in {}", pooling.name(), shown(file))
            }
            Self::Unsupported { found, file, field } => write!(
                f,
                "{}, by {field} in {}, which is not supported",
                quote(found, 100),
                shown(file)
            ),
        }
    }
}

/// Tokens that end a text to be embedded, whose rows have seen all of it: what the post-processor puts
/// there, else EOS if `tokenizer_config.json` asks for it. A Qwen3 embedder was trained with
/// `<|endoftext|>` there, which is not its EOS (microsoft/BitNet,
/// `utils/convert-bitnet-embedding-to-gguf.py`), so it comes last whatever the files say.
pub(crate) fn embedding_end(
    family: Family,
    embeds: bool,
    files: &TokenizerFiles,
    tokenizer: &Tokenizer,
) -> Vec<u32> {
    if !tokenizer.suffix().is_empty() || !embeds {
        return tokenizer.suffix().to_vec();
    }
    let eos = tokenizer.eos_id();
    let end = match family {
        Family::Qwen3 => tokenizer.token_id("<|endoftext|>").or(eos),
        _ => eos.filter(|_| files.add_eos_token == Some(true)),
    };
    end.into_iter().collect()
}

/// Names the modules of a folder.
pub(crate) const MODULES: &str = "modules.json";
/// Where the config of pooling is, if no list of modules says.
const USUAL: &str = "1_Pooling";
/// The most bytes that these files may have; published ones have below 2000.
const LIMIT: usize = 1 << 20;

/// A way to pool as sentence-transformers knows it: its name, the key that older versions have for
/// it, and what it is here.
struct Mode {
    name: &'static str,
    key: &'static str,
    pooling: Option<Pooling>,
}

/// In the order in which sentence-transformers puts several next to each other.
const MODES: [Mode; 6] = [
    Mode { name: "cls", key: "pooling_mode_cls_token", pooling: Some(Pooling::Cls) },
    Mode { name: "max", key: "pooling_mode_max_tokens", pooling: None },
    Mode { name: "mean", key: "pooling_mode_mean_tokens", pooling: Some(Pooling::Mean) },
    Mode { name: "mean_sqrt_len_tokens", key: "pooling_mode_mean_sqrt_len_tokens", pooling: None },
    Mode { name: "weightedmean", key: "pooling_mode_weightedmean_tokens", pooling: None },
    Mode { name: "lasttoken", key: "pooling_mode_lasttoken", pooling: Some(Pooling::Last) },
];

/// Reads what a folder says.
///
/// # Errors
///
/// Files that are not what they should be; a module that would change the embedding and is not
/// implemented.
pub(crate) fn of_folder(files: &Files) -> Result<DeclaredPooling, LoadError> {
    let folder = match text(files, MODULES)? {
        Some(modules) => pooling_module(&files.path(MODULES), &modules)?,
        None => {
            let there = files.has(&format!("{USUAL}/config.json"));
            there.then(|| USUAL.to_owned())
        }
    };
    let Some(folder) = folder else { return Ok(DeclaredPooling::Nothing) };
    let name =
        if folder.is_empty() { "config.json".into() } else { format!("{folder}/config.json") };
    let file = files.path(&name);
    let Some(text) = text(files, &name)? else { return Err(missing(&file)) };
    let map = parse_object(&file, &text)?;
    modes(&Fields { file: &file, prefix: "", map: &map })
}

/// Names of the files that say it: the list of modules, and the config of each in a folder of its own.
pub(crate) fn files_of_modules(files: &Files) -> Result<Vec<String>, LoadError> {
    let mut names = Vec::new();
    if let Some(text) = text(files, MODULES)? {
        names.push(MODULES.to_owned());
        let list = parse_array(&files.path(MODULES), &text)?;
        let paths = list.iter().filter_map(|module| module.get("path")?.as_str());
        let paths = paths.filter(|path| !path.is_empty() && is_within(path));
        names.extend(paths.map(|path| format!("{path}/config.json")));
    } else {
        names.push(format!("{USUAL}/config.json"));
    }
    names.push("config_sentence_transformers.json".into());
    names.push("sentence_bert_config.json".into());
    Ok(names)
}

/// The files that say a pooling to all versions of sentence-transformers, for rows of a width.
pub(crate) fn modules(pooling: Pooling, width: usize) -> [(&'static str, Value); 2] {
    let class = |name: &str| format!("sentence_transformers.models.{name}");
    let module = |index: usize, path: &str, name: &str| json!({ "idx": index, "name": index.to_string(), "path": path, "type": class(name) });
    let mut config = json!({ "word_embedding_dimension": width, "include_prompt": true });
    for mode in &MODES {
        config[mode.key] = (mode.pooling == Some(pooling)).into();
    }
    let list = [
        module(0, "", "Transformer"),
        module(1, USUAL, "Pooling"),
        module(2, "2_Normalize", "Normalize"),
    ];
    [(MODULES, list.to_vec().into()), ("1_Pooling/config.json", config)]
}

/// A small file.
fn text(files: &Files, name: &str) -> Result<Option<String>, LoadError> {
    match files.text(name)? {
        Some(text) if text.len() > LIMIT => {
            let (expected, found) = (format!("at most {LIMIT} bytes"), text.len().to_string());
            Err(LoadError::invalid(&files.path(name), "size", expected, found))
        }
        text => Ok(text),
    }
}

/// The folder of the module that pools, if there is one.
fn pooling_module(file: &Path, text: &str) -> Result<Option<String>, LoadError> {
    let mut folder = None;
    for module in parse_array(file, text)? {
        let Value::Object(map) = &module else {
            return Err(LoadError::invalid(file, "modules", "objects", describe(&module)));
        };
        let fields = Fields { file, prefix: "module.", map };
        let class = fields.string("type")?.ok_or_else(|| fields.absent("type", "a class"))?;
        let path = fields.string("path")?.unwrap_or_default();
        match class.rsplit('.').next() {
            // Vectors have length 1 here whether or not a module says so; nothing drops out of a model
            // that only runs.
            Some("Normalize" | "Dropout") => {}
            Some("Transformer") if path.is_empty() => {}
            Some("Transformer") => {
                let found = format!("a model in {:?}", quote(path, 100));
                return Err(fields.unsupported("path", found, "one in the folder itself"));
            }
            Some("Pooling") if folder.is_some() => {
                return Err(fields.unsupported("type", "a second Pooling", "one"));
            }
            Some("Pooling") => folder = Some(within(&fields, path)?),
            _ => {
                let supported = "Transformer, Pooling and Normalize: others change the embedding";
                return Err(fields.unsupported("type", class, supported));
            }
        }
    }
    Ok(folder)
}

/// A path that leads to a folder in this one and nowhere else.
fn within(fields: &Fields<'_>, path: &str) -> Result<String, LoadError> {
    if is_within(path) {
        return Ok(path.to_owned());
    }
    let found = quote(&format!("{path:?}"), 100);
    Err(LoadError::invalid(fields.file, "module.path", "a folder in this one", found))
}

fn is_within(path: &str) -> bool {
    let plain = |part: &str| !matches!(part, "" | "." | "..") && !part.contains(['\\', ':', '\0']);
    path.is_empty() || (path.len() <= 255 && path.split('/').all(plain))
}

/// The pooling in a module's config: `pooling_mode`, a name or a list of them, or of older versions a
/// key for each that is true; the mean where none is.
fn modes(fields: &Fields<'_>) -> Result<DeclaredPooling, LoadError> {
    const KEY: &str = "pooling_mode";
    let mut named: Vec<&Mode> = Vec::new();
    let mut field = KEY;
    if let Some(value) = fields.get(KEY) {
        let names = match value {
            Value::String(name) => vec![name.as_str()],
            _ => fields
                .strings(KEY)
                .map_err(|_| fields.wrong(KEY, "the name of a pooling or a list of names", value))?
                .unwrap_or_default(),
        };
        if names.is_empty() || names.len() > MODES.len() {
            return Err(fields.wrong(KEY, "the name of a pooling or a list of names", value));
        }
        for name in names {
            let Some(mode) = MODES.iter().find(|mode| mode.name == name) else {
                let names: Vec<&str> = MODES.iter().map(|mode| mode.name).collect();
                return Err(fields.wrong(KEY, names.join(", "), value));
            };
            named.push(mode);
        }
    } else {
        for mode in &MODES {
            if fields.boolean(mode.key)? == Some(true) {
                field = mode.key;
                named.push(mode);
            }
        }
        if named.is_empty() {
            field = "pooling_mode_*";
            named.extend(MODES.iter().filter(|mode| mode.name == "mean"));
        }
    }
    let (file, field) = (fields.file.to_owned(), field.to_owned());
    Ok(match named[..] {
        [Mode { pooling: Some(pooling), .. }] => {
            DeclaredPooling::Declared { pooling: *pooling, file, field }
        }
        _ => {
            let names: Vec<&str> = named.iter().map(|mode| mode.name).collect();
            DeclaredPooling::Unsupported { found: names.join(" beside "), file, field }
        }
    })
}

/// The key of a GGUF file, behind the name of its architecture.
pub(crate) const KEY: &str = "pooling_type";

/// Reads what a GGUF file of an architecture says.
///
/// # Errors
///
/// A value that is no integer.
pub(crate) fn of_gguf(metadata: &Metadata, arch: &str) -> Result<DeclaredPooling, LoadError> {
    let field = format!("{arch}.{KEY}");
    let Some(kind) = metadata.integer(&field, 0..=u64::from(u32::MAX))? else {
        return Ok(DeclaredPooling::Nothing);
    };
    let file = metadata.file.to_path_buf();
    let pooling = match kind {
        1 => Pooling::Mean,
        2 => Pooling::Cls,
        3 => Pooling::Last,
        other => {
            let found = match other {
                0 => "0, a vector for each token,".to_owned(),
                4 => "4, a rank and no vector,".to_owned(),
                other => other.to_string(),
            };
            return Ok(DeclaredPooling::Unsupported { found, file, field });
        }
    };
    Ok(DeclaredPooling::Declared { pooling, file, field })
}
