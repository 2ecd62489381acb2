//! Tensors to a file, batch of rows by batch of rows.

use std::io::Write;
use std::sync::Mutex;

use super::Progress;
use crate::error::ExportError;

/// Bytes that are encoded at a time, more only if a row has more.
const BATCH: usize = 1 << 20;

/// Where the bytes of an export go, and who is told.
pub(super) struct Stream<'a> {
    pub(super) out: &'a mut dyn Write,
    /// The error of a write that failed.
    pub(super) failed: &'a dyn Fn(std::io::Error) -> ExportError,
    pub(super) progress: Progress<'a>,
    pub(super) threads: usize,
    pub(super) done: u64,
    pub(super) total: u64,
}

impl Stream<'_> {
    /// Writes bytes, unless the export was cancelled.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), ExportError> {
        self.out.write_all(bytes).map_err(self.failed)?;
        self.done += bytes.len() as u64;
        if (self.progress)(self.done, self.total) { Ok(()) } else { Err(ExportError::Cancelled) }
    }

    /// Zeros up to a multiple of `alignment`, counted from the first byte of the stream.
    pub(super) fn pad(&mut self, alignment: u64) -> Result<(), ExportError> {
        let zeros = self.done.next_multiple_of(alignment) - self.done;
        self.write(&vec![0; zeros as usize])
    }

    /// Writes `count` rows of `row_bytes` each. `encode` writes the rows from the given one on, as
    /// many as its buffer holds; several threads ask it for different parts.
    pub(super) fn rows(
        &mut self,
        count: usize,
        row_bytes: usize,
        encode: impl Fn(usize, &mut [u8]) -> Result<(), ExportError> + Sync,
    ) -> Result<(), ExportError> {
        let batch = (BATCH / row_bytes.max(1)).clamp(1, count.max(1));
        let mut buffer = vec![0; batch * row_bytes];
        let part = batch.div_ceil(self.threads.max(1));
        for first in (0..count).step_by(batch) {
            let bytes = &mut buffer[..batch.min(count - first) * row_bytes];
            let error = Mutex::new(None);
            let run = |index: usize, bytes: &mut [u8]| {
                if let Err(failure) = encode(first + index * part, bytes) {
                    error.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(failure);
                }
            };
            std::thread::scope(|scope| {
                let mut parts = bytes.chunks_mut(part * row_bytes).enumerate();
                let own = parts.next();
                for (index, bytes) in parts {
                    let run = &run;
                    scope.spawn(move || run(index, bytes));
                }
                if let Some((index, bytes)) = own {
                    run(index, bytes);
                }
            });
            if let Some(failure) = error.into_inner().unwrap_or_else(|e| e.into_inner()) {
                return Err(failure);
            }
            self.write(bytes)?;
        }
        Ok(())
    }
}
