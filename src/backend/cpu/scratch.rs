//! Memory that a kernel needs only while it runs: one vector for each thread, which grows to the
//! largest size asked for and is then kept.

use std::cell::RefCell;

thread_local! {
    static FLOATS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with `len` floats of any value. Not to be nested.
pub(super) fn with<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    FLOATS.with_borrow_mut(|floats| {
        if floats.len() < len {
            floats.resize(len, 0.0);
        }
        f(&mut floats[..len])
    })
}
