//! Device memory: buffers, uploads at load, a step's inputs, and copies back to the host.

use std::cell::Cell;
use std::ffi::c_void;
use std::marker::PhantomData;
use std::rc::Rc;
use std::time::{Duration, Instant};

use cudarc::driver::{DriverError, result, sys};

use super::device::{Device, sentence};
use crate::backend::Element;
use crate::error::LoadError;

/// A piece of device memory.
pub(super) struct Owned {
    address: u64,
    bytes: u64,
    device: Rc<Device>,
}

impl Owned {
    /// Reserves `bytes` bytes, all zero, on an address that any vector type may view.
    pub(super) fn new(device: &Rc<Device>, name: &str, bytes: u64) -> Result<Rc<Self>, LoadError> {
        // Of no bytes there is no address.
        let bytes = bytes.max(16);
        let refuse = |reason| LoadError::Device { device: device.info.name(), reason };
        if let Some(fault) = device.fault() {
            return Err(refuse(fault));
        }
        let no_memory = |free: Option<(usize, usize)>| LoadError::OutOfMemory {
            device: device.info.name(),
            arithmetic: match free {
                Some((free, total)) => format!(
                    "{name} needs {bytes} bytes, and {free} of {total} are free; a shorter \
                     --context makes the KV cache smaller"
                ),
                None => format!("{name} needs {bytes} bytes"),
            },
        };
        let Ok(size) = usize::try_from(bytes) else { return Err(no_memory(None)) };
        // SAFETY: whoever gets the address gets zeros.
        let allocated = device.try_call(|| unsafe { result::malloc_sync(size) });
        let address = match allocated {
            Ok(address) => address,
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                return Err(no_memory(device.try_call(result::mem_get_info).ok()));
            }
            Err(error) => return Err(refuse(sentence(error))),
        };
        let owned = Rc::new(Self { address, bytes, device: Rc::clone(device) });
        let stream = device.stream.cu_stream();
        // SAFETY: the memory was just reserved, `size` bytes of it.
        let zeroed = device.call(|| unsafe { result::memset_d8_async(address, 0, size, stream) });
        zeroed.map_err(refuse)?;
        Ok(owned)
    }

    /// Where it is on the device.
    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// How much it is.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Copies `bytes` to `offset`; the host's bytes may change afterwards.
    pub(super) fn upload(&self, offset: u64, bytes: &[u8]) -> Result<(), LoadError> {
        let device = &self.device;
        let refuse = |reason| LoadError::Device { device: device.info.name(), reason };
        if offset.checked_add(bytes.len() as u64).is_none_or(|end| end > self.bytes) {
            return Err(refuse(format!(
                "{} bytes at {offset} do not fit into {} bytes of device memory",
                bytes.len(),
                self.bytes
            )));
        }
        let stream = device.stream.cu_stream();
        let copied = device.call(|| {
            // SAFETY: the bytes lie within the piece, checked above. The wait makes sure that the
            // host's bytes were read.
            unsafe {
                result::memcpy_htod_async(self.address + offset, bytes, stream)?;
                result::stream::synchronize(stream)
            }
        });
        copied.map_err(refuse)
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // With a fault the whole context goes, memory and all; a device that hangs would not answer.
        if self.device.fault().is_some() {
            return;
        }
        // SAFETY: it was reserved by `new` and is freed once; the driver waits for work that uses
        // it. An error is one of earlier work, and told to whoever waits for that.
        let _ = self.device.try_call(|| unsafe { result::free_sync(self.address) });
    }
}

/// Device memory of `len` elements.
pub struct Buffer<T> {
    memory: Rc<Owned>,
    len: usize,
    element: PhantomData<fn() -> T>,
}

impl<T: Element> Buffer<T> {
    pub(super) fn new(
        device: &Rc<Device>,
        name: &'static str,
        len: usize,
    ) -> Result<Self, LoadError> {
        let bytes = (len as u64).saturating_mul(size_of::<T>() as u64);
        Ok(Self { memory: Owned::new(device, name, bytes)?, len, element: PhantomData })
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn memory(&self) -> &Rc<Owned> {
        &self.memory
    }
}

/// Memory of the host that the device reads and writes by itself.
pub(super) struct Pinned {
    address: *mut c_void,
    bytes: usize,
    /// When the device is done with it.
    event: sys::CUevent,
    /// Whether the device may still be at it.
    busy: Cell<bool>,
    device: Rc<Device>,
}

impl Pinned {
    pub(super) fn new(device: &Rc<Device>, bytes: usize) -> Result<Self, String> {
        let event = device
            .call(|| result::event::create(sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING))?;
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: the memory is not read before it is written, by `bytes_mut` or by a copy.
        let reserved = device.try_call(|| unsafe { result::malloc_host(bytes, flags) });
        match reserved {
            Ok(address) => {
                let device = Rc::clone(device);
                Ok(Self { address, bytes, event, busy: Cell::new(false), device })
            }
            Err(error) => {
                // SAFETY: it was just made, and nothing waits for it.
                let _ = device.try_call(|| unsafe { result::event::destroy(event) });
                let error = sentence(error);
                Err(format!("{bytes} bytes of the host's memory could not be pinned: {error}"))
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        self.bytes
    }

    /// Where the device finds it: under unified addressing, where the host does.
    pub(super) fn address(&self) -> u64 {
        self.address as u64
    }

    /// The bytes, once the device is done with them.
    pub(super) fn bytes(&self) -> Result<&[u8], String> {
        self.wait()?;
        // SAFETY: `bytes` bytes are reserved, were written before, and the device is done.
        Ok(unsafe { std::slice::from_raw_parts(self.address.cast(), self.bytes) })
    }

    /// The same, to be written.
    pub(super) fn bytes_mut(&mut self) -> Result<&mut [u8], String> {
        self.wait()?;
        // SAFETY: as above, and this is the only reference.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.address.cast(), self.bytes) })
    }

    /// Copies the first `bytes` bytes of a piece of device memory here, in the stream's order.
    pub(super) fn copy_from(&self, memory: &Owned, bytes: usize) -> Result<(), String> {
        if bytes > self.bytes || bytes as u64 > memory.bytes {
            return Err(format!("a copy of {bytes} bytes does not fit"));
        }
        let stream = self.device.stream.cu_stream();
        self.device.call(|| {
            // SAFETY: both sides have `bytes` bytes, checked above; nothing looks at the host's
            // side before the event.
            unsafe {
                sys::cuMemcpyDtoHAsync_v2(self.address, memory.address, bytes, stream).result()
            }
        })?;
        self.in_use()
    }

    /// Says that all that is enqueued so far may use this memory.
    pub(super) fn in_use(&self) -> Result<(), String> {
        let stream = self.device.stream.cu_stream();
        // SAFETY: event and stream live as long as `self`.
        self.device.call(|| unsafe { result::event::record(self.event, stream) })?;
        self.busy.set(true);
        Ok(())
    }

    /// Waits until the device is done with it. A device that does not answer counts as lost.
    fn wait(&self) -> Result<(), String> {
        /// No step takes longer, and a GPU without a display has nobody who resets it.
        const PATIENCE: Duration = Duration::from_secs(120);
        let started = Instant::now();
        while self.busy.get() {
            // SAFETY: the event lives as long as `self`.
            let done = self.device.call(|| match unsafe { result::event::query(self.event) } {
                Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
                other => other.map(|()| true),
            })?;
            if done {
                self.busy.set(false);
                break;
            }
            match started.elapsed() {
                // A step of a small batch: the thread stays awake for it.
                waited if waited < Duration::from_millis(5) => std::hint::spin_loop(),
                waited if waited < PATIENCE => std::thread::sleep(Duration::from_micros(50)),
                _ => return Err(self.device.lost("it has not answered for two minutes")),
            }
        }
        Ok(())
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // With a fault the whole context goes, as for device memory.
        if self.wait().is_err() || self.device.fault().is_some() {
            return;
        }
        let _ = self.device.try_call(|| {
            // SAFETY: both were made by `new` and go once; the device is done with them.
            unsafe {
                result::event::destroy(self.event)?;
                result::free_host(self.address)
            }
        });
    }
}
