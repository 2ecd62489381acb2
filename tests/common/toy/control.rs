//! What tests do to a toy from outside: count, hold it up, make it fail, make it wrong.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};

use trine::backend::Element;
use trine::error::RunError;

use super::{Shared, device_error};

/// Buffers that outlive a step by contract. All others are overwritten with garbage between steps.
const KEPT: [&str; 6] =
    ["norm", "RoPE cosines", "RoPE sines", "history", "sampled tokens", "test values"];

/// What a toy has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Stats {
    /// Keys prepared at load.
    pub(crate) prepared: usize,
    /// Calls of `record`.
    pub(crate) recorded: usize,
    /// Steps run.
    pub(crate) runs: usize,
    /// Of these, without a call of `record`.
    pub(crate) replayed: usize,
    /// Of these, with a recording compared to the one kept.
    pub(crate) compared: usize,
    /// The most copies that were under way at once.
    pub(crate) most_pending: usize,
    /// Buffers overwritten with garbage.
    pub(crate) poisoned: usize,
}

/// One wrong element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Spoil {
    pub(crate) op: &'static str,
    pub(crate) output: &'static str,
    pub(crate) element: usize,
    /// Ops of this name that are right before one is wrong.
    pub(crate) skip: usize,
}

#[derive(Default)]
pub(crate) struct Control {
    ids: AtomicUsize,
    stats: Mutex<Stats>,
    poison: Mutex<Vec<Box<dyn Fn() + Send>>>,
    closed: Mutex<bool>,
    opened: Condvar,
    fail: Mutex<Option<usize>>,
    spoil: Mutex<Option<Spoil>>,
}

impl Control {
    pub(crate) fn stats(&self) -> MutexGuard<'_, Stats> {
        self.stats.lock().unwrap()
    }

    pub(super) fn next_id(&self) -> usize {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn allocated<T: Element>(&self, name: &str, buffer: &Shared<Vec<T>>) {
        if KEPT.contains(&name) {
            return;
        }
        // As f32 this is NaN, as an index it is far out of range.
        let buffer = buffer.clone();
        self.poison.lock().unwrap().push(Box::new(move || {
            bytemuck::cast_slice_mut::<T, u8>(&mut buffer.data.write().unwrap()).fill(0xFF);
        }));
    }

    pub(crate) fn poison(&self) {
        let poison = self.poison.lock().unwrap();
        poison.iter().for_each(|poison| poison());
        self.stats().poisoned += poison.len();
    }

    /// Holds up the next step until [`open`](Self::open).
    pub(crate) fn close(&self) {
        *self.closed.lock().unwrap() = true;
    }

    pub(crate) fn open(&self) {
        *self.closed.lock().unwrap() = false;
        self.opened.notify_all();
    }

    pub(super) fn pass_gate(&self) {
        let closed = self.closed.lock().unwrap();
        drop(self.opened.wait_while(closed, |closed| *closed).unwrap());
    }

    /// Lets the op after the next `ops` ones fail, once.
    pub(crate) fn fail_after(&self, ops: usize) {
        *self.fail.lock().unwrap() = Some(ops);
    }

    /// Whether a fault that was planted is still to come.
    pub(crate) fn fault_is_planted(&self) -> bool {
        self.fail.lock().unwrap().is_some() || self.spoil.lock().unwrap().is_some()
    }

    /// The planted fault, when its turn has come.
    pub(super) fn fault(&self, op: &str) -> Result<(), RunError> {
        let mut fail = self.fail.lock().unwrap();
        match fail.take() {
            Some(0) => return Err(device_error(op, "a planted fault")),
            Some(left) => *fail = Some(left - 1),
            None => (),
        }
        Ok(())
    }

    pub(crate) fn plant(&self, spoil: Spoil) {
        *self.spoil.lock().unwrap() = Some(spoil);
    }

    /// The element of this output to spoil, when its turn has come.
    pub(super) fn spoiled(&self, op: &str, output: &str) -> Option<usize> {
        let mut planted = self.spoil.lock().unwrap();
        let spoil = planted.as_mut().filter(|spoil| spoil.op == op && spoil.output == output)?;
        if spoil.skip > 0 {
            spoil.skip -= 1;
            return None;
        }
        planted.take().map(|spoil| spoil.element)
    }
}
