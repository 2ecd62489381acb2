//! The rate at which a GPU copies its own memory, which the speed of decoding is held against, and
//! how much of its memory is free.

use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::{CudaContext, DriverError, result, sys};

use super::GpuInfo;
use super::device::sentence;
use crate::error::LoadError;

/// Bytes that are copied at a time: far more than any cache holds.
const BYTES: usize = 256 << 20;

/// The same where a CPU imitates the GPU.
const EMULATED_BYTES: usize = 4 << 20;

/// Measurements, of which the median counts.
const ROUNDS: usize = 7;

/// Bytes read and written per second by copies within device memory, back and forth between two
/// pieces of 256 MiB, sixteen in a round; the median of several rounds by the host's clock. Takes
/// twice the memory of a copy while it measures.
///
/// # Errors
///
/// No memory for it, or a device that fails.
pub fn copy_bandwidth(gpu: &GpuInfo) -> Result<f64, LoadError> {
    let emulated = gpu.is_emulated();
    let (bytes, copies) = if emulated { (EMULATED_BYTES, 2) } else { (BYTES, 16) };
    let context = open(gpu)?;
    let pieces = [Piece::new(gpu, &context, bytes)?, Piece::new(gpu, &context, bytes)?];
    let stream = context.new_stream().map_err(|error| refuse(gpu, error))?;
    let stream = stream.cu_stream();
    let round = || -> Result<f64, DriverError> {
        let started = Instant::now();
        for copy in 0..copies {
            // Back and forth, so that no copy repeats the one before it.
            let (from, to) = (pieces[copy % 2].address, pieces[1 - copy % 2].address);
            // SAFETY: both pieces have `bytes` bytes and live until the wait below is over, also
            // where it fails: freeing waits for work that uses them.
            unsafe { result::memcpy_dtod_async(to, from, bytes, stream)? };
        }
        // SAFETY: the stream lives until the end of this function.
        unsafe { result::stream::synchronize(stream)? };
        Ok((2 * copies * bytes) as f64 / started.elapsed().as_secs_f64())
    };
    // The first round makes clocks rise.
    let rates: Result<Vec<f64>, DriverError> = (0..=ROUNDS).map(|_| round()).skip(1).collect();
    let mut rates = rates.map_err(|error| refuse(gpu, error))?;
    rates.sort_by(f64::total_cmp);
    Ok(rates[rates.len() / 2])
}

/// Bytes of device memory that no program has reserved.
///
/// # Errors
///
/// A device that fails.
pub fn free_memory(gpu: &GpuInfo) -> Result<u64, LoadError> {
    let _context = open(gpu)?;
    let (free, _) = result::mem_get_info().map_err(|error| refuse(gpu, error))?;
    Ok(free as u64)
}

/// The context that all backends on this GPU share, made current for this thread.
fn open(gpu: &GpuInfo) -> Result<Arc<CudaContext>, LoadError> {
    crate::caught::caught(|| CudaContext::new(gpu.ordinal))
        .map_err(|_| "the driver lacks functions of CUDA 12; update it".to_owned())
        .and_then(|context| context.map_err(sentence))
        .map_err(|reason| LoadError::Device { device: gpu.name(), reason })
}

fn refuse(gpu: &GpuInfo, error: DriverError) -> LoadError {
    LoadError::Device { device: gpu.name(), reason: sentence(error) }
}

/// Device memory for as long as a measurement takes.
struct Piece {
    address: sys::CUdeviceptr,
    context: Arc<CudaContext>,
}

impl Piece {
    fn new(gpu: &GpuInfo, context: &Arc<CudaContext>, bytes: usize) -> Result<Self, LoadError> {
        // SAFETY: what it holds does not matter.
        match unsafe { result::malloc_sync(bytes) } {
            Ok(address) => Ok(Self { address, context: Arc::clone(context) }),
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                let free = result::mem_get_info().map_or(0, |(free, _)| free);
                let arithmetic = format!(
                    "measuring the memory needs twice {bytes} bytes, and {free} bytes were free"
                );
                Err(LoadError::OutOfMemory { device: gpu.name(), arithmetic })
            }
            Err(error) => Err(refuse(gpu, error)),
        }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: it was reserved by `new` and is freed once; the driver waits for work that
            // uses it. A device that fails has nothing to free.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}
