//! Device memory: buffers, uploads at load, and copies back to the host.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::fault::sentence;
use super::gpu::{Dropped, Gpu};
use crate::backend::Element;
use crate::error::LoadError;

/// Bytes that are uploaded before the host waits, which bounds the memory of the staging copies.
const UPLOAD: usize = 32 << 20;

/// A piece of device memory with a number of its own, by which bind groups are found again.
#[derive(Clone)]
pub(super) struct Raw {
    pub(super) buffer: wgpu::Buffer,
    pub(super) id: u64,
    pub(super) bytes: u64,
}

/// Memory whose bind groups are forgotten when it is dropped.
pub(super) struct Owned {
    pub(super) raw: Raw,
    dropped: Dropped,
}

impl Drop for Owned {
    fn drop(&mut self) {
        if let Ok(mut dropped) = self.dropped.lock() {
            dropped.push(self.raw.id);
        }
    }
}

impl Gpu {
    /// Reserves `bytes` bytes, all zero, and a multiple of 16 so that any vector type may view them.
    pub(super) fn reserve(&self, name: &str, bytes: u64) -> Result<Owned, LoadError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let inner = &self.0;
        let device = || self.adapter().name();
        let bytes = bytes.max(16).checked_next_multiple_of(16).unwrap_or(u64::MAX);
        let most = inner.limits.max_storage_buffer_binding_size.min(inner.limits.max_buffer_size);
        if bytes > most {
            return Err(LoadError::OutOfMemory {
                device: device(),
                arithmetic: format!(
                    "{name} needs {bytes} bytes in one piece, and this device binds {most} at most"
                ),
            });
        }
        let memory = inner.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let other = inner.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let buffer = inner.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(name),
            size: bytes,
            usage: wgpu::BufferUsages::STORAGE
                | wgpu::BufferUsages::COPY_SRC
                | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let other = pollster::block_on(other.pop());
        if pollster::block_on(memory.pop()).is_some() {
            return Err(LoadError::OutOfMemory {
                device: device(),
                arithmetic: format!(
                    "{name} needs {bytes} bytes, and the driver has no more; a shorter --context \
                     makes the KV cache smaller"
                ),
            });
        }
        let reason = match other {
            // A device that is lost explains more than what failed on it.
            Some(error) => self.fault().or_else(|| Some(sentence(&error))),
            None => inner.faults.get(),
        };
        if let Some(reason) = reason {
            return Err(LoadError::Device { device: device(), reason });
        }
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Ok(Owned { raw: Raw { buffer, id, bytes }, dropped: Dropped::clone(&self.1) })
    }

    /// Copies `bytes` to `offset`, piece by piece. Both are multiples of 4.
    pub(super) fn upload(&self, to: &Raw, offset: u64, bytes: &[u8]) -> Result<(), LoadError> {
        let inner = &self.0;
        for (piece, bytes) in bytes.chunks(UPLOAD).enumerate() {
            inner.queue.write_buffer(&to.buffer, offset + (piece * UPLOAD) as u64, bytes);
            if bytes.len() == UPLOAD {
                // Sends what is staged on its way, and frees it.
                let index = inner.queue.submit([]);
                self.wait_for(&index, || true).map_err(|reason| LoadError::Device {
                    device: self.adapter().name(),
                    reason,
                })?;
            }
        }
        match inner.faults.get() {
            None => Ok(()),
            Some(reason) => Err(LoadError::Device { device: self.adapter().name(), reason }),
        }
    }

    /// The fault of the device, if any, after asking for it: wgpu reports what follows from a loss
    /// at once, and the loss itself when it is polled.
    pub(super) fn fault(&self) -> Option<String> {
        let _ = crate::caught::caught(|| self.0.device.poll(wgpu::PollType::Poll));
        self.0.faults.get()
    }

    /// Waits for a submission, and until `done` says that what was to come of it came. A device
    /// that does not answer counts as lost.
    pub(super) fn wait_for(
        &self,
        index: &wgpu::SubmissionIndex,
        done: impl Fn() -> bool,
    ) -> Result<(), String> {
        // Drivers reset a GPU that hangs after seconds; a software adapter may take minutes for a
        // long prompt.
        let minutes = if self.adapter().is_software() { 30 } else { 2 };
        let started = Instant::now();
        loop {
            let index = Some(index.clone());
            let second = Some(Duration::from_secs(1));
            let wait = wgpu::PollType::Wait { submission_index: index, timeout: second };
            if self.poll(wait)? && done() {
                return Ok(());
            }
            if started.elapsed() > Duration::from_secs(60 * minutes) {
                let fault = format!("the device has not answered for {minutes} minutes");
                self.0.faults.set(fault.clone());
                return Err(fault);
            }
        }
    }

    /// Lets wgpu do what is due. An `Err` says what is wrong with the device.
    pub(super) fn poll(&self, poll: wgpu::PollType) -> Result<bool, String> {
        if let Some(fault) = self.0.faults.get() {
            return Err(fault);
        }
        // wgpu 30 panics in `poll` where the driver reports a lost device.
        let polled = crate::caught::caught(|| self.0.device.poll(poll));
        match polled {
            Ok(Ok(status)) => Ok(status.wait_finished()),
            Ok(Err(wgpu::PollError::Timeout)) => Ok(false),
            // The index of a submission that failed cannot be waited for: a loss is a reason for that.
            Ok(Err(error)) => Err(self.fault().unwrap_or_else(|| {
                self.0.faults.set(error.to_string());
                error.to_string()
            })),
            Err(_) => {
                let lost = "the device was lost: the driver reset it, or it is gone";
                self.0.faults.set(lost.into());
                Err(self.0.faults.get().unwrap_or_default())
            }
        }
    }
}

/// Device memory of `len` elements.
pub struct Buffer<T> {
    pub(super) owned: Owned,
    len: usize,
    element: PhantomData<fn() -> T>,
}

impl<T: Element> Buffer<T> {
    pub(super) fn new(gpu: &Gpu, name: &'static str, len: usize) -> Result<Self, LoadError> {
        let bytes = (len as u64).saturating_mul(size_of::<T>() as u64);
        Ok(Self { owned: gpu.reserve(name, bytes)?, len, element: PhantomData })
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn raw(&self) -> &Raw {
        &self.owned.raw
    }
}

/// A piece of host memory that the device copies into; used again and again.
pub(super) struct Readback {
    pub(super) buffer: wgpu::Buffer,
    pub(super) bytes: u64,
    /// 0: being copied, 1: readable, 2: failed.
    pub(super) state: Arc<AtomicU8>,
    /// The submission that holds the copy, and its number, when it has gone out.
    pub(super) submission: RefCell<Option<(u64, wgpu::SubmissionIndex)>>,
}

impl Readback {
    /// Asks for the memory once the copy is done; the copy must have been submitted.
    pub(super) fn map(&self) {
        let state = Arc::clone(&self.state);
        self.buffer.map_async(wgpu::MapMode::Read, 0..self.bytes, move |mapped| {
            state.store(if mapped.is_ok() { 1 } else { 2 }, Ordering::Release);
        });
    }

    pub(super) fn state(&self) -> u8 {
        self.state.load(Ordering::Acquire)
    }
}

/// Host memory for copies, which grows to what is in flight at once and stays.
#[derive(Default)]
pub(super) struct Readbacks {
    free: Vec<Rc<Readback>>,
}

impl Readbacks {
    /// A free piece of at least `bytes` bytes.
    pub(super) fn take(&mut self, device: &wgpu::Device, bytes: u64) -> Rc<Readback> {
        let fits = |readback: &Rc<Readback>| readback.bytes >= bytes;
        let smallest = (self.free.iter().enumerate())
            .filter(|(_, readback)| fits(readback))
            .min_by_key(|(_, readback)| readback.bytes)
            .map(|(index, _)| index);
        if let Some(index) = smallest {
            let readback = self.free.swap_remove(index);
            readback.state.store(0, Ordering::Release);
            readback.submission.replace(None);
            return readback;
        }
        let bytes = bytes.next_power_of_two().max(256);
        let buffer = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("readback"),
            size: bytes,
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        Rc::new(Readback { buffer, bytes, state: Arc::default(), submission: RefCell::default() })
    }

    /// Gives a piece back that is not mapped any more.
    pub(super) fn give(&mut self, readback: Rc<Readback>) {
        self.free.push(readback);
    }
}
