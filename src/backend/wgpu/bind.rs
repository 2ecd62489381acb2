//! Bind groups, made once for each kernel's layout and set of buffers.

use std::collections::HashMap;

use super::dispatch::{Dispatch, Resolved};
use super::gpu::Gpu;

/// The layout's access, and the numbers of the buffers.
type Key = (&'static str, Vec<u64>);

/// The bind groups that were made so far.
#[derive(Default)]
pub(super) struct Binder {
    groups: HashMap<Key, wgpu::BindGroup>,
}

impl Binder {
    /// A dispatch with its pipeline and bind group. An `Err` says why its kernel does not compile.
    pub(super) fn resolve(&mut self, gpu: &Gpu, dispatch: &Dispatch) -> Result<Resolved, String> {
        let compiled = gpu.0.kernels.get(&dispatch.kernel)?;
        let ids = dispatch.bindings.iter().map(|raw| raw.id).collect();
        let group = self.groups.entry((dispatch.kernel.access, ids)).or_insert_with(|| {
            let entries: Vec<_> = (dispatch.bindings.iter().enumerate())
                .map(|(binding, raw)| wgpu::BindGroupEntry {
                    binding: binding as u32,
                    resource: raw.buffer.as_entire_binding(),
                })
                .collect();
            gpu.0.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(dispatch.kernel.file),
                layout: &compiled.layout,
                entries: &entries,
            })
        });
        Ok(Resolved {
            pipeline: compiled.pipeline,
            bind_group: group.clone(),
            immediates: dispatch.immediates,
            groups: dispatch.groups,
        })
    }

    /// Lets go of bind groups of buffers that are gone; whether there were any.
    pub(super) fn forget(&mut self, dropped: &[u64]) -> bool {
        let before = self.groups.len();
        self.groups.retain(|(_, ids), _| !ids.iter().any(|id| dropped.contains(id)));
        self.groups.len() < before
    }
}
