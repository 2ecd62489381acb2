//! Threads that wait for small jobs.
//!
//! A step of a small model is hundreds of jobs of some tens of microseconds, so a job must start
//! within one or two. Waiting threads therefore watch a word of memory for a while before they
//! sleep, and the caller works too: where the others are busy elsewhere (more threads than cores),
//! it does the whole job by itself and waits for none of them.
//!
//! A job is cut into parts. One word holds the number of the job, the next part that nobody has
//! taken, and the number of parts; a part is taken by a compare-and-swap of that word. So a thread
//! that wakes late cannot take a part of a job that is over, and whoever has taken one knows that
//! the job, and all that it borrows, lives until that part is done.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Condvar, Mutex, PoisonError, TryLockError};
use std::thread::JoinHandle;

/// How often a waiting thread looks before it offers its core to others: about 20 µs, which
/// covers the gaps between the ops of a step.
const SPINS: u32 = 500;
/// How often it then yields before it sleeps: some 50 µs on an idle machine, so that the host's
/// work between two steps is bridged.
const YIELDS: u32 = 100;

/// The most parts of a job: what fits the word.
const MAX_PARTS: usize = (1 << 16) - 1;

type Job<'a> = dyn Fn(usize) + Sync + 'a;

/// Some threads, and the caller's.
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held while a job runs: one at a time.
    running: Mutex<()>,
}

struct Shared {
    /// `job << 32 | next << 16 | parts`; nothing is left to take where `next == parts`.
    word: AtomicU64,
    /// What to call with the number of a part. Written while no part can be taken, read by whoever
    /// has taken one.
    job: UnsafeCell<Option<&'static Job<'static>>>,
    /// Parts done.
    done: AtomicUsize,
    stop: AtomicBool,
    /// Threads asleep; changed under the mutex only.
    asleep: AtomicUsize,
    mutex: Mutex<()>,
    wake: Condvar,
    /// The first panic of a part.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is the one field that is not Sync. It is written by the thread that holds
// `Pool::running`, between the end of one job and the publication of the next in `word`; it is read
// only after a part has been taken from `word`, which happens after that publication and before
// that part is counted in `done`, for which the writer waits.
unsafe impl Sync for Shared {}
// SAFETY: the job may be called from any thread, as it is Sync.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `threads` threads, the caller's included.
    pub(super) fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            word: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            done: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            asleep: AtomicUsize::new(0),
            mutex: Mutex::new(()),
            wake: Condvar::new(),
            panic: Mutex::new(None),
        });
        let mut pool = Self { shared, workers: Vec::new(), running: Mutex::new(()) };
        for index in 1..threads.max(1) {
            let shared = Arc::clone(&pool.shared);
            let worker = std::thread::Builder::new()
                .name(format!("trine-cpu-{index}"))
                .spawn(move || shared.work())?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Threads, the caller's included.
    pub(super) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `job` with each of `0 .. parts`, on whichever threads are free, and returns when all
    /// are done. A panic in a part is raised again here, after the others have finished. Called
    /// from within a job, it runs all parts on the calling thread.
    pub(super) fn run(&self, parts: usize, job: impl Fn(usize) + Sync) {
        let running = match self.running.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        if parts <= 1 || parts > MAX_PARTS || self.workers.is_empty() || running.is_none() {
            (0..parts).for_each(job);
            return;
        }
        let shared = &*self.shared;
        let job: &Job<'_> = &job;
        // SAFETY: only the lifetime changes. The reference is read by those who have taken a part,
        // and this function does not return before all parts are done.
        let job = unsafe { std::mem::transmute::<&Job<'_>, &'static Job<'static>>(job) };
        // SAFETY: all parts of the job before are taken and done, so nobody reads; `running` keeps
        // other writers away.
        unsafe { *shared.job.get() = Some(job) };
        shared.done.store(0, Relaxed);
        let number = (shared.word.load(Relaxed) >> 32) as u32;
        shared.word.store(u64::from(number.wrapping_add(1)) << 32 | parts as u64, SeqCst);
        if shared.asleep.load(SeqCst) > 0 {
            let _guard = shared.mutex.lock().unwrap_or_else(PoisonError::into_inner);
            shared.wake.notify_all();
        }

        while shared.take_part() {}
        let mut waited = 0;
        while shared.done.load(Acquire) < parts {
            waited += 1;
            if waited < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Only now may another job begin: a panic of it must not be taken for one of this.
        drop(running);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Cuts `0 .. items` into ranges of multiples of `grain` (the last may be shorter) and calls
    /// `job` with each: one range where `work` (any unit) is below `least`, else some for each
    /// thread, so that one that is slowed down by other programs holds up little.
    pub(super) fn split(
        &self,
        items: usize,
        grain: usize,
        (work, least): (usize, usize),
        job: impl Fn(std::ops::Range<usize>) + Sync,
    ) {
        const RANGES_PER_THREAD: usize = 4;
        let grains = items.div_ceil(grain);
        let threads = self.threads();
        // No range below half of `least`: two of that size are worth two threads.
        let most = (work / (least / 2).max(1)).clamp(1, threads * RANGES_PER_THREAD);
        let parts = if threads == 1 { 1 } else { most.min(grains) };
        if parts <= 1 {
            job(0..items);
            return;
        }
        self.run(parts, |part| {
            let start = grains * part / parts * grain;
            let end = (grains * (part + 1) / parts * grain).min(items);
            if start < end {
                job(start..end);
            }
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        {
            let _guard = self.shared.mutex.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker catches the panics of jobs, so there is no other to report.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn has_part(word: u64) -> bool {
        (word >> 16 & 0xFFFF) < (word & 0xFFFF)
    }

    /// Takes and does a part; false if there is none to take.
    fn take_part(&self) -> bool {
        let mut word = self.word.load(Acquire);
        loop {
            if !Self::has_part(word) {
                return false;
            }
            match self.word.compare_exchange_weak(word, word + (1 << 16), AcqRel, Acquire) {
                Ok(_) => break,
                Err(now) => word = now,
            }
        }
        let part = (word >> 16 & 0xFFFF) as usize;
        // SAFETY: a part has been taken and is not done, see `impl Sync`.
        let job = unsafe { *self.job.get() };
        let call = AssertUnwindSafe(|| {
            if let Some(job) = job {
                job(part);
            }
        });
        if let Err(panic) = catch_unwind(call) {
            let mut first = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert(panic);
        }
        self.done.fetch_add(1, Release);
        true
    }

    /// The life of a worker.
    fn work(&self) {
        let mut waited = 0;
        while !self.stop.load(Relaxed) {
            if self.take_part() {
                waited = 0;
                continue;
            }
            waited += 1;
            if waited < SPINS {
                std::hint::spin_loop();
            } else if waited < SPINS + YIELDS {
                std::thread::yield_now();
            } else {
                self.sleep();
                waited = 0;
            }
        }
    }

    fn sleep(&self) {
        let mut guard = self.mutex.lock().unwrap_or_else(PoisonError::into_inner);
        self.asleep.fetch_add(1, SeqCst);
        // Whoever publishes looks at `asleep` after it has written `word`, and this looks at `word`
        // after it has written `asleep`: one of the two sees the other.
        while !Self::has_part(self.word.load(SeqCst)) && !self.stop.load(SeqCst) {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.asleep.fetch_sub(1, SeqCst);
    }
}

/// A slice that the parts of a job write to, each its own elements.
pub(super) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    slice: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: it hands out what `&mut [T]` would, to threads that share nothing of it.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: std::marker::PhantomData }
    }

    /// The elements of a range; panics beyond the end.
    ///
    /// # Safety
    /// While the result lives, no other part asks for a range that overlaps this one.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "that is the purpose, and the safety condition")]
    pub(super) unsafe fn range(&self, range: std::ops::Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "a range beyond the slice");
        // SAFETY: within the slice, and by the caller's word nobody else's.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn every_part_is_called_once() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads).unwrap();
            for parts in [0, 1, 2, 3, 7, 100] {
                for _ in 0..50 {
                    let calls: Vec<AtomicU32> = (0..parts).map(|_| AtomicU32::new(0)).collect();
                    pool.run(parts, |part| {
                        calls[part].fetch_add(1, Relaxed);
                    });
                    assert!(calls.iter().all(|c| c.load(Relaxed) == 1), "{threads} {parts}");
                }
            }
        }
    }

    #[test]
    fn ranges_cover_all_items_in_grains() {
        let pool = Pool::new(3).unwrap();
        for items in [0, 1, 15, 16, 17, 1000] {
            let mut seen = vec![0u8; items];
            let shared = Disjoint::new(&mut seen);
            pool.split(items, 16, (1 << 20, 1), |range| {
                assert!(range.start % 16 == 0);
                // SAFETY: ranges of a split do not overlap.
                unsafe { shared.range(range) }.iter_mut().for_each(|n| *n += 1);
            });
            assert!(seen.iter().all(|&n| n == 1), "{items}: {seen:?}");
        }
    }

    #[test]
    fn a_panic_comes_back_and_the_pool_lives_on() {
        let pool = Pool::new(3).unwrap();
        for bad in 0..8 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(8, |part| assert_ne!(part, bad, "planted"));
            }));
            assert!(result.is_err());
            pool.run(8, |_| {});
        }
    }

    #[test]
    fn jobs_within_jobs_and_sleeping_threads() {
        let (a, b) = (Pool::new(2).unwrap(), Pool::new(2).unwrap());
        let count = AtomicU32::new(0);
        for _ in 0..20 {
            std::thread::sleep(std::time::Duration::from_millis(1));
            a.run(4, |_| {
                a.run(3, |_| {
                    count.fetch_add(1, Relaxed);
                });
                b.run(2, |_| {
                    count.fetch_add(1, Relaxed);
                });
            });
        }
        assert_eq!(count.load(Relaxed), 20 * 4 * 5);
    }
}
