//! LoRA adapters as PEFT saves them: a folder with `adapter_config.json` and
//! `adapter_model.safetensors`. (arXiv 2106.09685; the fields are those of PEFT's `LoraConfig`,
//! <https://huggingface.co/docs/peft/package_reference/lora>.)
//!
//! An adapter adds `scale · B A x` to what a projection answers, with `x` the projection's input
//! before quantisation; `A` is `[rank, in]`, `B` is `[out, rank]`, and the scale is `alpha / rank`,
//! or `alpha / √rank` where the config says `use_rslora`. Where a norm is part of the projection, as
//! in BitNet-embedding, `x` is what the norm reads: PEFT puts the adapter beside the whole layer
//! (`peft/tuners/lora/layer.py`, `Linear.forward`). What is not plain LoRA is refused: an adapter that
//! is applied in part answers text that looks right.

mod config;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use self::config::{Config, Targets};
use crate::checkpoint::files::{self, Files, missing};
use crate::checkpoint::hf::weights::{PROJECTIONS, check_finite};
use crate::checkpoint::json::{self, quote};
use crate::checkpoint::safetensors::{self, Tensor, Tensors, shape_text};
use crate::error::{LoadError, shown};
use crate::model::config::{MAX_SIZE, ModelConfig, Projection};

/// What PEFT calls the config of an adapter.
pub(crate) const CONFIG: &str = "adapter_config.json";
/// What PEFT calls its weights.
pub(crate) const WEIGHTS: &str = "adapter_model.safetensors";

/// An adapter, read and checked by itself; [`Adapter::check`] checks that it fits a model.
#[derive(Debug)]
pub struct Adapter {
    folder: PathBuf,
    config_file: PathBuf,
    /// `base_model_name_or_path`.
    base: Option<String>,
    /// How much of it is applied: 1 unless the user says otherwise.
    strength: f32,
    targets: Targets,
    modules: BTreeMap<Module, Pair>,
}

/// A projection of a layer.
type Module = (usize, Projection);

/// The two matrices of a module, and what their product is multiplied by.
#[derive(Debug)]
pub(crate) struct Pair {
    /// `A`, `[rank, in]`.
    pub(crate) down: Tensor,
    /// `B`, `[out, rank]`.
    pub(crate) up: Tensor,
    pub(crate) scale: f64,
}

impl Pair {
    pub(crate) fn rank(&self) -> usize {
        self.down.shape[0]
    }

    /// Weights of both matrices.
    fn parameters(&self) -> u64 {
        [&self.down, &self.up]
            .map(|matrix| matrix.shape.iter().product::<usize>() as u64)
            .iter()
            .sum()
    }
}

/// Whether a path is an adapter and not a model: a folder with an adapter's config and without a
/// model, or an adapter's weights.
pub fn is_adapter(path: &Path) -> bool {
    if path.is_dir() {
        let has = |name: &str| path.join(name).exists();
        let model = has("config.json") && (has(safetensors::SINGLE) || has(safetensors::INDEX));
        return has(CONFIG) && !model;
    }
    path.file_name().is_some_and(|name| name == WEIGHTS)
}

impl Adapter {
    /// Opens an adapter: its folder, or the weights in it. `strength` multiplies what it adds.
    ///
    /// The files are memory-mapped, as [`open`](super::open) says of a checkpoint's.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the files, or is not plain LoRA, in a sentence that names the field or
    /// the tensor.
    pub fn open(path: &Path, strength: f32) -> Result<Self, LoadError> {
        let metadata = std::fs::metadata(path).map_err(|e| files::unreachable_file(path, e))?;
        let folder = match (metadata.is_dir(), path.parent()) {
            (true, _) => path.to_owned(),
            (false, Some(folder)) if path.file_name().is_some_and(|name| name == WEIGHTS) => {
                let here = Path::new(".");
                if folder.as_os_str().is_empty() { here.to_owned() } else { folder.to_owned() }
            }
            _ => {
                let supported = format!("a folder with {CONFIG} and {WEIGHTS}, as PEFT saves one");
                return Err(LoadError::unsupported(path, "adapter", "this file", supported));
            }
        };
        if !strength.is_finite() {
            return Err(LoadError::Option {
                option: format!("scale of the adapter {}", shown(path)),
                expected: "a finite number".into(),
                found: strength.to_string(),
            });
        }
        let files = Files::Folder(folder.clone());
        let config_file = files.path(CONFIG);
        let Some(text) = files.text(CONFIG)? else { return Err(missing(&config_file)) };
        let map = json::parse_object(&config_file, &text)?;
        let config = Config::parse(&config_file, &map)?;
        if !files.has(WEIGHTS) && files.has("adapter_model.bin") {
            return Err(LoadError::invalid(
                &folder,
                "weights",
                WEIGHTS,
                "only adapter_model.bin, which can run code when it is read",
            ));
        }
        let tensors = Tensors::open(&files, Some(WEIGHTS))?;
        let modules = modules_of(&config, &tensors)?;
        let Config { base, targets, .. } = config;
        Ok(Self { folder, config_file, base, strength, targets, modules })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What the adapter says it was made for: a path, or a name on the Hugging Face hub.
    pub fn base(&self) -> Option<&str> {
        self.base.as_deref()
    }

    /// How much of the adapter is applied.
    pub fn strength(&self) -> f32 {
        self.strength
    }

    /// Projections that it changes, over all layers.
    pub fn modules(&self) -> usize {
        self.modules.len()
    }

    /// Weights of the adapter.
    pub fn parameters(&self) -> u64 {
        self.pairs().map(|pair| pair.parameters()).sum()
    }

    /// Ranks of its matrices: the lowest and the highest.
    pub fn ranks(&self) -> (usize, usize) {
        let ranks = self.pairs().map(Pair::rank);
        ranks.fold((usize::MAX, 0), |(low, high), rank| (low.min(rank), high.max(rank)))
    }

    /// Names of the projections that it changes in some layer, as its base calls them.
    pub fn projections(&self) -> Vec<&'static str> {
        let has = |projection| self.modules.keys().any(|&(_, other)| other == projection);
        PROJECTIONS
            .iter()
            .filter(|(projection, _)| has(*projection))
            .map(|(_, name)| *name)
            .collect()
    }

    fn pairs(&self) -> impl Iterator<Item = &Pair> {
        self.modules.values()
    }

    pub(crate) fn pair(&self, layer: usize, projection: Projection) -> Option<&Pair> {
        self.modules.get(&(layer, projection))
    }

    /// The base on this machine, where `base_model_name_or_path` is a path: beside the adapter's
    /// folder's files, else from where the program runs.
    ///
    /// # Errors
    ///
    /// A sentence that names the base, where there is no such path.
    pub fn find_base(&self) -> Result<PathBuf, LoadError> {
        const FIELD: &str = "base_model_name_or_path";
        let advice =
            "a path on this machine; give the base with --model and the adapter with --lora";
        let Some(base) = self.base.as_deref().filter(|base| !base.is_empty()) else {
            return Err(LoadError::invalid(&self.config_file, FIELD, advice, "nothing"));
        };
        let found = [self.folder.join(base), PathBuf::from(base)];
        let Some(path) = found.into_iter().find(|path| path.exists()) else {
            let found = quote(&format!("{base:?}"), 200);
            return Err(LoadError::invalid(&self.config_file, FIELD, advice, found));
        };
        if is_adapter(&path) {
            let found = format!("{}, which is an adapter itself", shown(&path));
            return Err(LoadError::invalid(&self.config_file, FIELD, "a model", found));
        }
        Ok(path)
    }

    /// Checks that the adapter fits a model: its layers, and the shapes of all its matrices.
    ///
    /// # Errors
    ///
    /// A sentence that names the tensor.
    pub fn check(&self, config: &ModelConfig) -> Result<(), LoadError> {
        for (&(layer, projection), pair) in &self.modules {
            if layer >= config.layers {
                let expected = format!("a layer below {}, those of the base", config.layers);
                return Err(pair.down.wrong(expected, format!("layer {layer}")));
            }
            let (features, width) = config.shape(projection);
            let rank = pair.rank();
            for (tensor, shape) in [(&pair.down, [rank, width]), (&pair.up, [features, rank])] {
                if tensor.shape != shape {
                    let expected = format!("{}, as the base asks for", shape_text(&shape));
                    return Err(tensor.wrong(expected, shape_text(&tensor.shape)));
                }
            }
        }
        let Targets { everywhere, layers } = &self.targets;
        for &projection in everywhere {
            let (_, name) = PROJECTIONS[projection as usize];
            let needed = |layer: &usize| layers.as_ref().is_none_or(|some| some.contains(layer));
            let lacks = |layer: &usize| !self.modules.contains_key(&(*layer, projection));
            if let Some(layer) = (0..config.layers).filter(needed).find(lacks) {
                return Err(LoadError::invalid(
                    &self.config_file,
                    "target_modules",
                    format!("matrices for {name} of all {} layers of the base", config.layers),
                    format!("none for layer {layer} in {WEIGHTS}"),
                ));
            }
        }
        Ok(())
    }
}

/// The matrices of every module, by the names of the tensors.
fn modules_of(config: &Config<'_>, tensors: &Tensors) -> Result<BTreeMap<Module, Pair>, LoadError> {
    let mut halves: BTreeMap<Module, [Option<&Tensor>; 2]> = BTreeMap::new();
    for tensor in tensors.map.values() {
        let Some((module, half)) = module_of(&tensor.name) else {
            return Err(LoadError::unsupported(
                &tensor.file,
                "tensor",
                &tensor.name,
                "lora_A.weight and lora_B.weight of the projections of attention and \
                 feed-forward network: base_model.model.model.layers.N.self_attn.q_proj and so on",
            ));
        };
        let place = &mut halves.entry(module).or_default()[half];
        if let Some(other) = place.replace(tensor) {
            let expected = "one such matrix of a projection";
            return Err(tensor.wrong(expected, format!("another, {}", other.name)));
        }
    }
    if halves.is_empty() {
        let expected = "matrices lora_A and lora_B";
        return Err(LoadError::invalid(&tensors.listing, "tensors", expected, "none"));
    }
    let mut modules = BTreeMap::new();
    for (module, halves) in halves {
        let pair = match halves {
            [Some(down), Some(up)] => pair_of(config, module, down, up)?,
            [Some(one), None] => return Err(one.wrong("lora_B beside it", "none")),
            [_, Some(one)] => return Err(one.wrong("lora_A beside it", "none")),
            [None, None] => continue,
        };
        modules.insert(module, pair);
    }
    Ok(modules)
}

fn pair_of(
    config: &Config<'_>,
    module: Module,
    down: &Tensor,
    up: &Tensor,
) -> Result<Pair, LoadError> {
    for tensor in [down, up] {
        let Some(float) = tensor.float() else {
            return Err(tensor.wrong("bf16, f16 or f32", tensor.dtype.to_string()));
        };
        if tensor.shape.len() != 2 || tensor.shape.contains(&0) {
            return Err(tensor.wrong("a matrix", shape_text(&tensor.shape)));
        }
        check_finite(tensor, float)?;
    }
    let (layer, projection) = module;
    let name = format!("model.layers.{layer}.{}", PROJECTIONS[projection as usize].1);
    let (rank, scale) = config.rank_and_scale(&name)?;
    for (tensor, found) in [(down, down.shape[0]), (up, up.shape[1])] {
        if found != rank {
            let expected = format!("rank {rank}, which {CONFIG} says in r or rank_pattern");
            return Err(tensor.wrong(expected, format!("{found}")));
        }
    }
    if config.targets.layers.as_ref().is_some_and(|layers| !layers.contains(&layer)) {
        let expected = "tensors of the layers in layers_to_transform";
        return Err(down.wrong(expected, format!("layer {layer}")));
    }
    Ok(Pair { down: down.clone(), up: up.clone(), scale })
}

/// The projection that a tensor belongs to, and which of its matrices it is: 0 for `A`, 1 for `B`.
fn module_of(name: &str) -> Option<(Module, usize)> {
    let name = name.strip_prefix("base_model.model.")?;
    let name = name.strip_prefix("model.").unwrap_or(name).strip_prefix("layers.")?;
    let (layer, name) = name.split_once('.')?;
    let layer = Some(layer).filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()))?;
    let layer: usize = layer.parse().ok().filter(|&layer| layer <= MAX_SIZE)?;
    let of = |(projection, module): &(Projection, &str)| {
        let half = match name.strip_prefix(module)? {
            ".lora_A.weight" | ".lora_A.default.weight" => 0,
            ".lora_B.weight" | ".lora_B.default.weight" => 1,
            _ => return None,
        };
        Some(((layer, *projection), half))
    };
    PROJECTIONS.iter().find_map(of)
}
