//! [`Sample`].

use super::Wgpu;
use super::dispatch::Dispatch;
use super::kernel::Kernel;
use crate::backend::ops::Sample;
use crate::error::RunError;

pub(super) fn kernels() -> Vec<Kernel> {
    vec![]
}

pub(super) fn dispatches(
    _wgpu: &mut Wgpu,
    _op: &Sample<'_, Wgpu>,
) -> Result<Vec<Dispatch>, RunError> {
    unimplemented!()
}
