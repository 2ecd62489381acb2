//! [`Score`].

use super::Wgpu;
use super::dispatch::Dispatch;
use super::kernel::Kernel;
use crate::backend::ops::Score;
use crate::error::RunError;

pub(super) fn kernels() -> Vec<Kernel> {
    vec![]
}

pub(super) fn dispatches(_op: &Score<'_, Wgpu>) -> Result<Vec<Dispatch>, RunError> {
    unimplemented!()
}
