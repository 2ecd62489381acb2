//! A backend that checks another one: every op runs on the device and in the reference, from the
//! device's own inputs, and the first op whose outputs disagree is named.
//!
//! Since each op starts from what the device holds, errors do not build up, and tolerances can be
//! tight: exact for integers, for the rest what a different order of sums explains.

mod compare;
mod record;

use super::ops;
use super::reference::{Reference, ReferenceKv, ReferenceMatrix};
use super::{Backend, DeviceInfo, Element, KvLayout, RecordStep, StepKey};
use crate::error::{LoadError, RunError};
use crate::tensor::HostTable;
use crate::ternary::TernaryRows;

pub use record::CheckedRecorder;

/// Checks every op of `B` against the reference.
pub struct Checked<B: Backend> {
    device: B,
    reference: Reference,
    info: DeviceInfo,
}

impl<B: Backend> Checked<B> {
    /// Checks `device`, which must run every step as it is recorded (always eager): each op is a
    /// step of its own here.
    pub fn new(device: B) -> Self {
        let mut info = device.info().clone();
        info.description.push_str(", every op checked against the reference");
        info.asynchronous = false;
        Self { device, reference: Reference::new(), info }
    }
}

/// A thing that only its backend can read, and the reference's own.
pub struct Both<D, R> {
    device: D,
    reference: R,
}

impl<B: Backend> Backend for Checked<B> {
    type Buffer<T: Element> = B::Buffer<T>;
    type TernaryMatrix = Both<B::TernaryMatrix, ReferenceMatrix>;
    type Table = Both<B::Table, HostTable>;
    type KvCache = Both<B::KvCache, ReferenceKv>;
    type Pending<T: Element> = B::Pending<T>;
    type Recorder<'r> = CheckedRecorder<'r, B>;

    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn allocate<T: Element>(
        &self,
        name: &'static str,
        len: usize,
    ) -> Result<B::Buffer<T>, LoadError> {
        self.device.allocate(name, len)
    }

    fn len<T: Element>(&self, buffer: &B::Buffer<T>) -> usize {
        self.device.len(buffer)
    }

    fn pack_ternary(&self, parts: &[&dyn TernaryRows]) -> Result<Self::TernaryMatrix, LoadError> {
        Ok(Both {
            device: self.device.pack_ternary(parts)?,
            reference: self.reference.pack_ternary(parts)?,
        })
    }

    fn load_table(&self, table: HostTable) -> Result<Self::Table, LoadError> {
        Ok(Both { device: self.device.load_table(table.clone())?, reference: table })
    }

    fn allocate_kv(&self, layout: KvLayout) -> Result<Self::KvCache, LoadError> {
        Ok(Both {
            device: self.device.allocate_kv(layout)?,
            reference: self.reference.allocate_kv(layout)?,
        })
    }

    fn write<T: Element>(
        &mut self,
        buffer: &mut B::Buffer<T>,
        values: &[T],
    ) -> Result<(), RunError> {
        self.device.write(buffer, values)
    }

    fn run(&mut self, key: &StepKey, record: &mut RecordStep<'_, Self>) -> Result<(), RunError> {
        record(&mut CheckedRecorder { device: &mut self.device, key: *key, index: 0 })
    }

    fn fetch<T: Element>(
        &mut self,
        buffer: &B::Buffer<T>,
        len: usize,
    ) -> Result<B::Pending<T>, RunError> {
        self.device.fetch(buffer, len)
    }

    fn wait<T: Element>(&mut self, pending: B::Pending<T>) -> Result<Vec<T>, RunError> {
        self.device.wait(pending)
    }
}

/// Views a struct of a checked backend's buffers as one of the device's.
trait AsDevice<B: Backend> {
    type Device;
    fn as_device(&self) -> &Self::Device;
    fn as_device_mut(&mut self) -> &mut Self::Device;
}

macro_rules! as_device {
    ($($name:ident),*) => {$(
        impl<B: Backend> AsDevice<B> for ops::$name<Checked<B>> {
            type Device = ops::$name<B>;
            fn as_device(&self) -> &ops::$name<B> {
                // SAFETY: the struct is repr(C) and made of buffers and numbers alone, and
                // `Checked<B>::Buffer<T>` is `B::Buffer<T>`, so both types have the same fields.
                unsafe { &*std::ptr::from_ref(self).cast() }
            }
            fn as_device_mut(&mut self) -> &mut ops::$name<B> {
                // SAFETY: as above.
                unsafe { &mut *std::ptr::from_mut(self).cast() }
            }
        }
    )*};
}
as_device!(Batch, Lanes, Quantized, Samples);
