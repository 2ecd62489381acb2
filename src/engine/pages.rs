//! Page numbers of the KV cache: which are free, which belong to a sequence. No device memory.

use crate::backend::PAGE_TOKENS;
use crate::error::RunError;

/// The free pages of a cache.
#[derive(Debug)]
pub struct PagePool {
    free: Vec<u32>,
    total: usize,
}

impl PagePool {
    /// All of `pages` are free.
    pub fn new(pages: usize) -> Self {
        // Taken from the end, so that the first sequence gets the first pages.
        Self { free: (0..pages as u32).rev().collect(), total: pages }
    }

    /// Pages that are free.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// All pages.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Extends `pages` until it holds `tokens` positions; takes nothing if it cannot.
    pub fn grow(&mut self, pages: &mut Vec<u32>, tokens: usize) -> Result<(), RunError> {
        let missing = tokens.div_ceil(PAGE_TOKENS).saturating_sub(pages.len());
        if missing > self.free.len() {
            return Err(RunError::Exhausted {
                what: "free KV pages",
                asked: missing,
                reserved: self.free.len(),
            });
        }
        pages.extend(self.free.drain(self.free.len() - missing..).rev());
        Ok(())
    }

    /// Gives back the pages beyond those that `tokens` positions need.
    pub fn shrink(&mut self, pages: &mut Vec<u32>, tokens: usize) {
        let keep = tokens.div_ceil(PAGE_TOKENS).min(pages.len());
        self.free.extend(pages.drain(keep..).rev());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_taken_in_order_and_come_back() {
        let mut pool = PagePool::new(3);
        let mut pages = Vec::new();
        pool.grow(&mut pages, 33).unwrap();
        assert_eq!((pages.as_slice(), pool.free()), ([0, 1].as_slice(), 1));
        pool.grow(&mut pages, 64).unwrap();
        assert_eq!(pages, [0, 1], "64 tokens fit in two pages");
        assert!(pool.grow(&mut pages, 97).is_err());
        assert_eq!(pool.free(), 1, "a failed growth takes nothing");
        pool.shrink(&mut pages, 1);
        assert_eq!((pages.as_slice(), pool.free()), ([0].as_slice(), 2));
        pool.shrink(&mut pages, 0);
        assert_eq!((pool.free(), pool.total()), (3, 3));
    }
}
