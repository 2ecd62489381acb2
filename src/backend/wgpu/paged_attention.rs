//! [`PagedAttention`].

use super::Wgpu;
use super::dispatch::Dispatch;
use super::kernel::Kernel;
use super::rope_append_kv::Rope;
use crate::backend::StepKey;
use crate::backend::ops::PagedAttention;
use crate::error::RunError;

pub(super) fn kernels() -> Vec<Kernel> {
    vec![]
}

/// The op, kept.
pub(super) struct Attention {
    /// The rotation and the append before it, where they are fused into it.
    pub(super) rope: Option<Rope>,
}

impl Attention {
    pub(super) fn new(_op: &PagedAttention<'_, Wgpu>) -> Result<Self, RunError> {
        unimplemented!()
    }
    pub(super) fn dispatches(
        &self,
        _wgpu: &mut Wgpu,
        _key: &StepKey,
    ) -> Result<Vec<Dispatch>, RunError> {
        unimplemented!()
    }
}
