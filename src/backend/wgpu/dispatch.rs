//! A dispatch: a kernel, what it is bound to, its numbers, and its grid.

use super::adapters::IMMEDIATE_BYTES;
use super::kernel::Kernel;
use super::memory::Raw;

/// A dispatch as an op asks for it.
pub(super) struct Dispatch {
    pub(super) kernel: Kernel,
    pub(super) bindings: Vec<Raw>,
    pub(super) immediates: Immediates,
    pub(super) groups: [u32; 3],
}

/// The numbers of a dispatch, its `Params` struct in the shader.
#[derive(Clone, Copy)]
pub(super) struct Immediates {
    bytes: [u8; IMMEDIATE_BYTES as usize],
    len: usize,
}

impl Dispatch {
    /// `bindings` in the order of the shader's `@binding` numbers.
    pub(super) fn new<T: bytemuck::NoUninit>(
        kernel: Kernel,
        bindings: &[&Raw],
        params: &T,
        groups: [u32; 3],
    ) -> Self {
        let params = bytemuck::bytes_of(params);
        let mut bytes = [0; IMMEDIATE_BYTES as usize];
        bytes[..params.len()].copy_from_slice(params);
        debug_assert_eq!(kernel.access.len(), bindings.len(), "{}", kernel.file);
        Self {
            kernel,
            bindings: bindings.iter().map(|&raw| raw.clone()).collect(),
            immediates: Immediates { bytes, len: params.len() },
            groups,
        }
    }
}

/// A dispatch that is ready to go.
pub(super) struct Resolved {
    pub(super) pipeline: wgpu::ComputePipeline,
    pub(super) bind_group: wgpu::BindGroup,
    pub(super) immediates: Immediates,
    pub(super) groups: [u32; 3],
}

impl Resolved {
    pub(super) fn encode(&self, pass: &mut wgpu::ComputePass<'_>) {
        let [x, y, z] = self.groups;
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.bind_group, &[]);
        pass.set_immediates(0, &self.immediates.bytes[..self.immediates.len]);
        pass.dispatch_workgroups(x, y, z);
    }
}
