//! How checkpoints of each family are written: what a config calls them, what their norms are called,
//! and how their projections are stored.
//!
//! Sources: those of [`config`](super::config).

use crate::checkpoint::json::{Fields, quote};
use crate::error::LoadError;
use crate::model::config::{Family, NormRole};

/// A way in which checkpoints of a family are written: what the config calls it and what the
/// sub-norms are called.
#[derive(Debug)]
pub(crate) struct Form {
    /// The only entry of `architectures`.
    pub(crate) architecture: &'static str,
    /// Whether another name may stand there, and a class that derives from this one.
    derived: bool,
    pub(crate) model_type: &'static str,
    pub(crate) family: Family,
    /// Tensor names of the sub-norms within a layer, where the family has them.
    pub(crate) attention_sub_norm: &'static str,
    pub(crate) ffn_sub_norm: &'static str,
    /// Name within a layer of the norm before the feed-forward network.
    pub(crate) ffn_norm: &'static str,
    /// See [`Form::offset`].
    gain_offset: f32,
    /// Whether the model answers a text's embedding and has no head.
    pub(crate) embeds: bool,
    /// What the form says about quantisation where it has no `quantization_config`.
    pub(super) without: Without,
}

impl Form {
    /// What is added to the stored gains of a norm: nothing to those of norms before projections, which
    /// are of another class than the model's own.
    pub(crate) fn offset(&self, role: NormRole) -> f32 {
        if matches!(role, NormRole::Projection(..)) { 0.0 } else { self.gain_offset }
    }
}

/// What it means that a config has no `quantization_config`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Without {
    /// That there are no ternary weights.
    Refuse,
    /// Master weights; `weight_bits` and `input_bits` say so.
    Bits,
    /// Master weights: what makes them ternary is known by the norms before projections.
    Norms,
}

/// What most forms have in common.
const COMMON: Form = Form {
    architecture: "",
    derived: false,
    model_type: "",
    family: Family::Llama,
    attention_sub_norm: "",
    ffn_sub_norm: "",
    ffn_norm: "post_attention_layernorm",
    gain_offset: 0.0,
    embeds: false,
    without: Without::Refuse,
};

/// microsoft/bitnet-embedding-0.6b: what microsoft/BitNet's
/// `utils/convert-bitnet-embedding-to-gguf.py` reads.
const QWEN3: Form = Form {
    architecture: "Qwen3Model",
    derived: true,
    model_type: "qwen3",
    family: Family::Qwen3,
    embeds: true,
    without: Without::Norms,
    ..COMMON
};

/// microsoft/bitnet-embedding-270m, by the same source.
const GEMMA3: Form = Form {
    architecture: "Gemma3TextModel",
    model_type: "gemma3_text",
    family: Family::Gemma3,
    ffn_norm: "pre_feedforward_layernorm",
    gain_offset: 1.0,
    ..QWEN3
};

/// The first form of a family is the one whose config has no `architectures`.
pub(crate) const FORMS: &[Form] = &[
    Form {
        architecture: "BitNetForCausalLM",
        model_type: "bitnet",
        family: Family::BitNet,
        attention_sub_norm: "self_attn.attn_sub_norm",
        ffn_sub_norm: "mlp.ffn_sub_norm",
        ..COMMON
    },
    Form { architecture: "LlamaForCausalLM", model_type: "llama", ..COMMON },
    // 1bitLLM/bitnet_b1_58-{large,xl,3B}: the arithmetic of the BitNet family, float master
    // weights, and the model_type of Llama, whose config class its code reuses.
    Form {
        architecture: "BitnetForCausalLM",
        model_type: "llama",
        family: Family::BitNet,
        attention_sub_norm: "self_attn.inner_attn_ln",
        ffn_sub_norm: "mlp.ffn_layernorm",
        without: Without::Bits,
        ..COMMON
    },
    QWEN3,
    Form { architecture: "Qwen3ForCausalLM", derived: false, embeds: false, ..QWEN3 },
    GEMMA3,
    Form { architecture: "Gemma3ForCausalLM", derived: false, embeds: false, ..GEMMA3 },
];

/// How the projections are stored and what their scales mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Quantization {
    /// `linear_class` `bitlinear`, or none: packed, `weight_scale` divides.
    BitLinear,
    /// `autobitlinear`, `offline`: packed, or floats of −1, 0 and +1; `weight_scale` multiplies.
    AutoOffline,
    /// `autobitlinear`, `online`: float master weights, quantised by absmean when they are loaded.
    Master,
}

impl Quantization {
    /// In words, for people.
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::BitLinear => "bitlinear: packed weights, divided by weight_scale",
            Self::AutoOffline => "autobitlinear, offline: ternary weights times weight_scale",
            Self::Master => "float master weights, quantised by absmean when loaded",
        }
    }
}

/// The form of a checkpoint, by `model_type` and `architectures`.
pub(super) fn form(
    fields: &Fields<'_>,
    assumed: &mut Vec<String>,
) -> Result<&'static Form, LoadError> {
    let list = |names: Vec<&str>| names.join(", ");
    let known_types: Vec<&str> = {
        let mut types: Vec<&str> = FORMS.iter().map(|form| form.model_type).collect();
        types.dedup();
        types.sort_unstable();
        types.dedup();
        types
    };
    let model_type = fields
        .string("model_type")?
        .ok_or_else(|| fields.absent("model_type", list(known_types.clone())))?;
    if !known_types.contains(&model_type) {
        return Err(fields.unsupported("model_type", model_type, list(known_types)));
    }
    let architectures = fields.strings("architectures")?.unwrap_or_default();
    match architectures[..] {
        [] => {
            let form = FORMS.iter().find(|form| form.model_type == model_type);
            let form = form.ok_or_else(|| fields.absent("architectures", "a list"))?;
            assumed.push(format!("architectures: {}, from model_type", form.architecture));
            Ok(form)
        }
        [architecture] => {
            let derived =
                || FORMS.iter().find(|form| form.derived && form.model_type == model_type);
            let form = FORMS.iter().find(|form| form.architecture == architecture);
            let form = form.or_else(derived).ok_or_else(|| {
                let supported = FORMS.iter().map(|form| form.architecture).collect();
                fields.unsupported("architectures", architecture, list(supported))
            })?;
            if form.architecture != architecture {
                let name = quote(architecture, 100);
                let as_this = form.architecture;
                assumed.push(format!("architectures: {name} as {as_this}, from model_type"));
            }
            if form.model_type != model_type {
                return Err(LoadError::invalid(
                    fields.file,
                    "model_type",
                    format!("{:?}, since architectures is {architecture}", form.model_type),
                    format!("{model_type:?}"),
                ));
            }
            Ok(form)
        }
        _ => Err(LoadError::invalid(
            fields.file,
            "architectures",
            "one name",
            quote(&list(architectures), 100),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_agree_with_the_table_of_families() {
        for family in [Family::BitNet, Family::Llama, Family::Qwen3, Family::Gemma3] {
            let form = FORMS.iter().find(|form| form.family == family).expect("a form");
            let row = family.row();
            assert_eq!(form.architecture, row.hf_architecture);
            assert_eq!(form.model_type, row.hf_model_type);
            assert_eq!(!form.attention_sub_norm.is_empty(), row.attention_sub_norm);
            assert_eq!(!form.ffn_sub_norm.is_empty(), row.ffn_sub_norm);
        }
    }
}
