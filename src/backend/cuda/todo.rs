//! What is still to come.
use std::rc::Rc;

use super::device::Device;
use crate::error::{LoadError, RunError};
use crate::tensor::HostTable;
use crate::ternary::TernaryRows;

pub struct TernaryMatrix;
pub struct Table;

fn not_yet<T>(what: &str) -> Result<T, LoadError> {
    Err(LoadError::Device { device: "cuda".into(), reason: format!("{what} is not there yet") })
}
impl TernaryMatrix {
    pub(super) fn new(_: &Rc<Device>, _: &[&dyn TernaryRows]) -> Result<Self, LoadError> {
        not_yet("pack_ternary")
    }
}
impl Table {
    pub(super) fn new(_: &Rc<Device>, _: &HostTable) -> Result<Self, LoadError> {
        not_yet("load_table")
    }
}
pub(super) fn op(name: &str) -> Result<(), RunError> {
    Err(RunError::Device { device: "cuda".into(), doing: name.into(), reason: "not yet".into() })
}
