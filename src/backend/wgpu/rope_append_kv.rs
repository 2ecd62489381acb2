//! [`RopeAppendKv`].

use super::Wgpu;
use super::dispatch::Dispatch;
use super::kernel::Kernel;
use super::record::Op;
use crate::backend::ops::RopeAppendKv;
use crate::error::RunError;

pub(super) fn kernels() -> Vec<Kernel> {
    vec![]
}

/// The op, kept.
pub(super) struct Rope {}

impl Rope {
    pub(super) fn new(_op: &RopeAppendKv<'_, Wgpu>) -> Result<Self, RunError> {
        unimplemented!()
    }
    /// Whether attention can do it: the same rows, layer and cache, and no norms of heads.
    pub(super) fn goes_into(&self, _next: Option<&Op>) -> bool {
        false
    }
    pub(super) fn dispatch(&self, _wgpu: &mut Wgpu) -> Result<Dispatch, RunError> {
        unimplemented!()
    }
}
