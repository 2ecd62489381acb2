//! What goes wrong on an NVIDIA GPU ends in an error for the one who waits, and the program can open
//! a device after. The emulated driver provokes it; on a GPU these tests have nothing to do.
#![cfg(feature = "cuda")]

mod common;

use std::sync::{Mutex, MutexGuard, PoisonError};

use common::cuda::{gpu, open};
use common::model::{awkward_models, roomy};
use common::run::{generate, session};
use common::workload::greedy;
use trine::backend::cuda::{Cuda, CudaOptions};
use trine::backend::{Backend, KvLayout, KvType};
use trine::error::{LoadError, RunError};

/// The emulated driver. One test at a time: a fault is the process's next launch, whoever makes it.
struct Emulator {
    library: libloading::Library,
    _alone: MutexGuard<'static, ()>,
}

impl Emulator {
    fn get() -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        if !gpu()?.is_emulated() {
            return None;
        }
        // SAFETY: it is the driver that is loaded already.
        let library = unsafe { libloading::Library::new("libcuda.so.1") }.expect("the emulator");
        Some(Self { library, _alone: alone })
    }

    /// The next launch ends with this error of the driver.
    fn fail_next_launch(&self, error: i32) {
        // SAFETY: the emulator declares it so.
        unsafe {
            let fail: libloading::Symbol<'_, unsafe extern "C" fn(i32)> =
                self.library.get(b"trine_emulator_fail_next_launch").expect("a function");
            fail(error);
        }
    }

    /// Bytes of device memory that are in use.
    fn allocated(&self) -> usize {
        // SAFETY: the emulator declares it so.
        unsafe {
            let allocated: libloading::Symbol<'_, unsafe extern "C" fn() -> usize> =
                self.library.get(b"trine_emulator_allocated_bytes").expect("a function");
            allocated()
        }
    }
}

const ILLEGAL_ADDRESS: i32 = 700;
const LAUNCH_FAILED: i32 = 719;

fn cuda() -> Cuda {
    open(CudaOptions::default()).expect("the emulator is there")
}

/// The reason of an error of the device.
fn reason<T: std::fmt::Debug>(result: Result<T, RunError>) -> String {
    match result {
        Err(RunError::Device { device, reason, .. }) => {
            assert_eq!(device, "cuda:0");
            assert!(!reason.is_empty());
            reason
        }
        other => panic!("not an error of the device: {other:?}"),
    }
}

#[test]
fn a_fault_ends_an_answer_and_another_device_can_be_opened_after() {
    let Some(emulator) = Emulator::get() else { return };
    let model = &awkward_models()[0];
    for error in [ILLEGAL_ADDRESS, LAUNCH_FAILED] {
        for options in [CudaOptions::default(), CudaOptions::default().replay(false)] {
            let device = open(options).expect("the emulator is there");
            let mut session = session(device, model, roomy());
            let before = generate(&mut session, &[1, 2, 3], &greedy(4)).expect("all is well");
            let mut answer = session.generate(&[5, 6], &greedy(20)).expect("starts");
            answer.next().expect("a token").expect("all is well");
            emulator.fail_next_launch(error);
            let fault = answer.by_ref().find_map(Result::err).expect("an error");
            let named = reason::<()>(Err(fault));
            assert!(answer.next().is_none(), "an answer ends with its error");
            drop(answer);
            // It stays, word for word, and nothing hangs.
            let mut later = session.generate(&[1, 2, 3], &greedy(4)).expect("starts");
            let again = reason(later.next().expect("an error"));
            assert!(again.contains(&named) || named.contains(&again), "{again}, {named}");
            drop(later);
            drop(session);
            let mut after = common::run::session(cuda(), model, roomy());
            let tokens = generate(&mut after, &[1, 2, 3], &greedy(4)).expect("a new device");
            assert_eq!(common::run::ids(&tokens), common::run::ids(&before));
        }
    }
}

#[test]
fn all_memory_is_given_back() {
    let Some(emulator) = Emulator::get() else { return };
    let before = emulator.allocated();
    let model = &awkward_models()[0];
    let mut session = session(cuda(), model, roomy());
    generate(&mut session, &[1, 2, 3], &greedy(40)).expect("generates");
    let loaded = emulator.allocated();
    assert!(loaded > before);
    for _ in 0..3 {
        generate(&mut session, &[3, 2, 1], &greedy(40)).expect("generates");
        assert_eq!(emulator.allocated(), loaded, "a step takes no memory");
    }
    drop(session);
    assert_eq!(emulator.allocated(), before);
}

#[test]
fn what_is_too_large_is_refused_with_the_numbers() {
    let Some(emulator) = Emulator::get() else { return };
    let before = emulator.allocated();
    let cuda = cuda();
    let refused = |result: Result<(), LoadError>, number: &str| match result {
        Err(LoadError::OutOfMemory { device, arithmetic }) => {
            assert_eq!(device, "cuda:0");
            assert!(arithmetic.contains(number), "{number}: {arithmetic}");
        }
        other => panic!("another answer: {other:?}"),
    };
    refused(cuda.allocate::<f32>("something", 1 << 40).map(drop), &(4u64 << 40).to_string());
    refused(cuda.allocate::<f32>("something", usize::MAX).map(drop), "bytes");
    let (kv_heads, head_dim, kv_type) = (8, 128, KvType::F16);
    for pages in [1 << 30, usize::MAX] {
        let layout = KvLayout { layers: 4, pages, kv_heads, head_dim, kv_type };
        refused(cuda.allocate_kv(layout).map(drop), "KV");
    }
    drop(cuda);
    assert_eq!(emulator.allocated(), before);
}
