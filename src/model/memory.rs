//! The arithmetic of a model's memory.

use super::activations::Reserve;
use super::config::ModelConfig;
use super::weights::AdapterSizes;
use crate::backend::DeviceInfo;
use crate::error::LoadError;

/// Refuses a model that cannot fit, with the arithmetic, before anything is reserved.
pub(super) fn check_memory(
    device: &DeviceInfo,
    config: &ModelConfig,
    reserve: &Reserve,
    adapters: &AdapterSizes,
) -> Result<(), LoadError> {
    const MB: f64 = 1e6;
    // 2 bits a weight; padding of rows adds a few per cent at most.
    let ternary = config.ternary_parameters() / 4;
    let kv = reserve.kv_layout(config).bytes();
    let activations = reserve.activation_bytes(config);
    let adapters = adapters.bytes(reserve.step_tokens);
    // A device of its own also holds the tables, at 16 bits an element or more; the CPU reads them
    // where their file is mapped.
    let tables = if config.tied_head { 2 } else { 4 } * config.embedding_parameters();
    let tables = Some(tables).filter(|_| device.asynchronous);
    let needed = kv
        .zip(activations)
        .and_then(|(kv, activations)| (kv as u64).checked_add(activations as u64))
        .and_then(|sum| sum.checked_add(ternary))
        .and_then(|sum| sum.checked_add(tables.unwrap_or(0)))
        .and_then(|sum| sum.checked_add(adapters?));
    if let (Some(needed), Some(memory)) = (needed, device.memory) {
        if needed <= memory {
            return Ok(());
        }
    } else if needed.is_some() {
        return Ok(());
    }
    let show = |bytes: Option<usize>| {
        bytes.map_or("more than 2^64 B".into(), |b| format!("{:.0} MB", b as f64 / MB))
    };
    let tables = tables.map_or(String::new(), |bytes| {
        format!(" + embedding and head {:.0} MB or more", bytes as f64 / MB)
    });
    let adapters = match adapters {
        Some(0) => String::new(),
        bytes => format!(" + adapters {}", show(bytes.map(|bytes| bytes as usize))),
    };
    let available =
        device.memory.map_or("unknown".into(), |memory| format!("{:.0} MB", memory as f64 / MB));
    Err(LoadError::OutOfMemory {
        device: device.name.clone(),
        arithmetic: format!(
            "ternary weights {:.0} MB{tables}{adapters} + KV cache for {} tokens {} + activations {}; available {}; \
             a shorter --context makes the KV cache smaller",
            ternary as f64 / MB,
            reserve.kv_pages * crate::backend::PAGE_TOKENS,
            show(kv),
            show(activations),
            available,
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::synthetic::published;
    use crate::engine::ModelOptions;

    /// Whether a shape fits into 24 GB, the CPU's or a GPU's own.
    fn fits(name: &str, own: bool) -> Result<(), String> {
        let config = published(name).expect(name);
        let reserve = ModelOptions::default().reserve(&config).expect("the defaults");
        let mut device = DeviceInfo::new("cpu", "a machine of 24 GB");
        (device.memory, device.asynchronous) = (Some(24_000_000_000), own);
        check_memory(&device, &config, &reserve, &AdapterSizes::default())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_100b_model_is_refused_on_24_gb_with_the_arithmetic() {
        let error = fits("100b", false).expect_err("25 GB of weights");
        for part in ["ternary weights 24990 MB", "KV cache for 2048 tokens", "available 24000 MB"] {
            assert!(error.contains(part), "{part} in {error}");
        }
        assert!(fits("100b", true).expect_err("more yet").contains("embedding and head 524 MB"));
        assert_eq!(fits("70b", false), Ok(()));
        assert_eq!(fits("70b", true), Ok(()));
    }
}
