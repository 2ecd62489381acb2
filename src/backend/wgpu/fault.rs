//! What goes wrong on a GPU without anybody being there to answer: kept until someone asks.

use std::sync::{Arc, Mutex, PoisonError};

/// The first fault of a device, or its loss. All later work on it is refused with it.
#[derive(Debug, Clone, Default)]
pub(super) struct Faults(Arc<Mutex<Option<String>>>);

impl Faults {
    /// Listens to a device. Without a listener of our own, wgpu panics on a validation error.
    pub(super) fn of(device: &wgpu::Device) -> Self {
        let faults = Self::default();
        let errors = faults.clone();
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            errors.set(sentence(&error));
        }));
        let lost = faults.clone();
        device.set_device_lost_callback(move |reason, message| {
            let why = match reason {
                wgpu::DeviceLostReason::Destroyed => "it was destroyed",
                _ => "the driver reset it, or it is gone",
            };
            lost.lost(format!("the device was lost: {why}: {}", one_line(&message)));
        });
        faults
    }

    /// Takes note of a fault, unless there was one before it.
    pub(super) fn set(&self, fault: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(fault);
    }

    /// Takes note of a loss, of which whatever was reported before it may be a consequence.
    fn lost(&self, fault: String) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault);
    }

    /// The first fault, if any.
    pub(super) fn get(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// An error of wgpu in one line.
pub(super) fn sentence(error: &wgpu::Error) -> String {
    match error {
        wgpu::Error::OutOfMemory { .. } => "out of device memory".into(),
        other => one_line(&other.to_string()),
    }
}

fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}
