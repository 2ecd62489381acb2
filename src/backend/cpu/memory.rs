//! Memory of fixed size and address, zeroed and aligned to a cache line.

use crate::backend::Element;
use crate::error::LoadError;
use bytemuck::Pod;
use memmap2::MmapMut;

/// What starts on a cache line of its own.
#[repr(C, align(64))]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Line([u8; 64]);

/// From here on memory comes in pages straight from the system: zeroed when first touched, and
/// huge where the system has such, which saves a fault per 4 KiB while weights are packed.
const MAPPED: usize = 1 << 20;

enum Owner {
    Lines(Box<[Line]>),
    Map(MmapMut),
}

/// `len` elements.
pub(super) struct Memory<T> {
    owner: Owner,
    len: usize,
    element: std::marker::PhantomData<T>,
}

impl<T: Pod> Memory<T> {
    /// Reserves `len` zeros. `what` is for the message.
    pub(super) fn new(what: &str, len: usize) -> Result<Self, LoadError> {
        let refuse = |needed: String| LoadError::OutOfMemory {
            device: "cpu".to_owned(),
            arithmetic: match available() {
                Some(bytes) => format!("{what} needs {needed}, {} MiB are free", bytes >> 20),
                None => format!("{what} needs {needed}"),
            },
        };
        let bytes = len
            .checked_mul(size_of::<T>())
            .filter(|&bytes| bytes <= isize::MAX as usize - size_of::<Line>())
            .ok_or_else(|| refuse(format!("{len} elements of {} bytes", size_of::<T>())))?;
        let too_much = || refuse(format!("{} MiB", bytes.div_ceil(1 << 20)));
        let owner = if bytes < MAPPED {
            let lines = bytes.div_ceil(size_of::<Line>());
            Owner::Lines(
                bytemuck::allocation::try_zeroed_slice_box(lines).map_err(|()| too_much())?,
            )
        } else {
            // The system promises more than it has and kills whoever takes it at its word.
            if available().is_some_and(|available| bytes as u64 > available) {
                return Err(too_much());
            }
            let map = MmapMut::map_anon(bytes).map_err(|_| too_much())?;
            // Advice: without huge pages everything works as well.
            #[cfg(target_os = "linux")]
            let _ = map.advise(memmap2::Advice::HugePage);
            Owner::Map(map)
        };
        Ok(Self { owner, len, element: std::marker::PhantomData })
    }
}

impl<T: Pod> std::ops::Deref for Memory<T> {
    type Target = [T];
    #[inline]
    fn deref(&self) -> &[T] {
        let bytes = match &self.owner {
            Owner::Lines(lines) => bytemuck::cast_slice(lines),
            Owner::Map(map) => &map[..],
        };
        bytemuck::cast_slice(&bytes[..self.len * size_of::<T>()])
    }
}

impl<T: Pod> std::ops::DerefMut for Memory<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        let bytes = match &mut self.owner {
            Owner::Lines(lines) => bytemuck::cast_slice_mut(lines),
            Owner::Map(map) => &mut map[..],
        };
        bytemuck::cast_slice_mut(&mut bytes[..self.len * size_of::<T>()])
    }
}

/// A buffer of the CPU: ordinary memory.
pub struct Buffer<T: Element>(Memory<T>);

impl<T: Element> Buffer<T> {
    pub(super) fn new(name: &str, len: usize) -> Result<Self, LoadError> {
        Memory::new(name, len).map(Self)
    }
}

impl<T: Element> std::ops::Deref for Buffer<T> {
    type Target = [T];
    #[inline]
    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T: Element> std::ops::DerefMut for Buffer<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
}

/// Bytes that could be reserved without swapping, where the system says so.
pub(super) fn available() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zero_aligned_and_of_the_length_asked_for() {
        for len in [0, 1, 3, 100, 1 << 20] {
            let mut memory = Memory::<f32>::new("test", len).unwrap();
            assert_eq!(memory.len(), len);
            assert!(memory.iter().all(|&x| x == 0.0));
            assert_eq!(memory.as_ptr() as usize % 64, 0);
            memory.fill(1.0);
        }
    }

    #[test]
    fn absurd_sizes_are_refused_with_the_arithmetic() {
        for len in [usize::MAX, usize::MAX / 4, 1 << 50] {
            let error = Memory::<f32>::new("the cache", len).err().unwrap().to_string();
            assert!(error.contains("the cache needs"), "{error}");
        }
    }
}
