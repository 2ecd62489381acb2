//! The wgpu backend on every adapter of this machine, in the variants that each can run.
//!
//! Adapters are opened once for each test binary. Where `TRINE_REQUIRE_ADAPTERS` is set to a
//! number, fewer adapters than that fail the test instead of passing it by.

use std::sync::OnceLock;

use trine::backend::wgpu::{Adapter, Gpu, GpuOptions, WgpuOptions};

/// An adapter, opened in one of its variants.
pub(crate) struct Opened {
    pub(crate) name: String,
    pub(crate) gpu: Gpu,
    /// Whether all variants are off.
    pub(crate) plain: bool,
    /// Whether it takes a hundred times longer than others: tests of the whole model do less on it.
    pub(crate) slow: bool,
}

/// SwiftShader runs the threads of a workgroup in turns, and changes turns at every barrier.
fn is_slow(adapter: &Adapter) -> bool {
    adapter.info().name.contains("SwiftShader")
}

/// Every adapter; fewer than are required fail the test.
pub(crate) fn adapters() -> Vec<Adapter> {
    let adapters = trine::backend::wgpu::adapters();
    let required = std::env::var("TRINE_REQUIRE_ADAPTERS").ok();
    let required = required.map_or(0, |number| number.parse().expect("a number of adapters"));
    assert!(adapters.len() >= required, "{} of {required} adapters are here", adapters.len());
    adapters
}

/// Every adapter, in every variant that makes a difference.
pub(crate) fn opened() -> &'static [Opened] {
    static OPENED: OnceLock<Vec<Opened>> = OnceLock::new();
    OPENED.get_or_init(|| {
        let adapters = adapters();
        let plain = GpuOptions::default().subgroups(false).packed_dot(false).f16(false);
        let variants = |options| {
            let adapters = adapters.clone();
            adapters.into_iter().map(move |adapter| {
                let name = format!("{} {options:?}", adapter.description());
                let gpu = Gpu::of(adapter, options).unwrap_or_else(|error| panic!("{error}"));
                let slow = is_slow(gpu.adapter());
                Opened { name, gpu, plain: options == plain, slow }
            })
        };
        variants(GpuOptions::default()).chain(variants(plain)).collect()
    })
}

/// The backends that generic tests run on: each adapter fused, and the plain variants unfused.
pub(crate) fn backends(slow: bool) -> impl Iterator<Item = (&'static str, Gpu, WgpuOptions)> {
    opened().iter().filter(move |opened| slow || !opened.slow).map(|opened| {
        (opened.name.as_str(), opened.gpu.clone(), WgpuOptions::default().fused(!opened.plain))
    })
}
