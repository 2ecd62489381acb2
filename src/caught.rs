//! Panics of libraries that must end in an error: those that read files, where the file is hostile,
//! and wgpu, where the device is lost.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static CATCHING: Cell<bool> = const { Cell::new(false) };
}

/// Whether a panic of this thread, now, would be turned into an error by this crate.
///
/// The standard panic hook prints before anyone can catch. A program that installs a hook can ask
/// this in it and stay silent, as the `trine` program does; a library must not install one.
pub fn catching_panics() -> bool {
    CATCHING.get()
}

/// Runs `read`, which works on values that nobody sees again if it panics.
pub(crate) fn caught<T>(read: impl FnOnce() -> T) -> Result<T, Box<dyn Any + Send>> {
    let outer = CATCHING.replace(true);
    let result = catch_unwind(AssertUnwindSafe(read));
    CATCHING.set(outer);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error_and_the_mark_is_taken_back() {
        assert!(!catching_panics());
        assert!(caught(catching_panics).is_ok_and(|inside| inside));
        assert!(caught(|| [0][std::hint::black_box(1)]).is_err());
        assert!(!catching_panics());
    }
}
