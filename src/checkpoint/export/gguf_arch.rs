//! Which architecture of GGUF is written for a model, if engines compute the same for one.
//!
//! What they compute: `src/models/*.cpp` of llama.cpp, and `3rdparty/llama.cpp` of microsoft/BitNet.

use super::GgufArch;
use super::encode::TernaryLayout;
use crate::backend::ops::Activation;
use crate::checkpoint::gguf::config::{every_sixth, gemma_scale};
use crate::error::ExportError;
use crate::model::config::{Attention, Family, ModelConfig};

/// The architecture whose engines compute what the model does.
pub(super) fn architecture(
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
    if config.family == Family::Gemma3 {
        let (scale, expected) = (config.attention_scale(), gemma_scale(config));
        if scale != expected {
            let reason = format!("it multiplies scores by {scale}, and engines by {expected}");
            return refuse("the model's attention", reason);
        }
        if let Some(local) = &config.attention.local
            && local.layers != every_sixth(config.layers)
        {
            notes.push(
                "engines that do not read gemma3.attention.sliding_window_pattern have whole \
                 attention in every sixth layer, and this model in others"
                    .into(),
            );
        }
    } else if config.attention != Attention::default() {
        let reason = "it has a scale or windows of its own, which the architecture has no key for";
        return refuse("the model's attention", reason.into());
    }
    let fixed = match config.family {
        Family::BitNet => None,
        Family::Llama => Some(("llama", Activation::Silu)),
        Family::Qwen3 => Some(("qwen3", Activation::Silu)),
        Family::Gemma3 => Some(("gemma3", Activation::GeluTanh)),
    };
    if let Some((arch, computed)) = fixed {
        if wish.is_some() {
            let reason = format!("it is for the BitNet family, and this is {}", row.name);
            return refuse("--arch", reason);
        }
        if activation != computed {
            let reason =
                format!("engines compute {computed:?} for {arch}, and this model {activation:?}");
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
