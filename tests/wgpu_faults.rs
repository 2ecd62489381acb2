//! What goes wrong on a GPU ends in an error for the one who waits: no panic, no hang, and nothing
//! for whoever uses another device. On every adapter.
#![cfg(feature = "wgpu")]

mod common;

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use common::host::HostQuantized;
use common::model::{awkward_models, roomy};
use common::ops::garbage;
use common::run::{self, generate, run_ops, upload};
use common::wgpu::adapters;
use common::workload::greedy;
use trine::backend::ops::{self, Quantized};
use trine::backend::wgpu::{Adapter, Buffer, Gpu, GpuOptions, Wgpu, WgpuOptions};
use trine::backend::{Backend, KvLayout, KvType, Record};
use trine::error::{LoadError, RunError};
use trine::tensor::{FloatType, HostTable, SharedBytes};

/// Runs a test on every adapter, each time in a thread that must come to an end.
fn on_every_adapter(test: fn(Adapter)) {
    for adapter in adapters() {
        let name = adapter.description();
        let (done, ended) = channel();
        let thread = std::thread::spawn(move || {
            test(adapter);
            let _ = done.send(());
        });
        match ended.recv_timeout(Duration::from_secs(120)) {
            Err(RecvTimeoutError::Timeout) => panic!("{name}: it hangs"),
            // A panic of the test is the panic of the thread.
            _ => thread.join().unwrap_or_else(|_| panic!("{name}: see above")),
        }
    }
}

fn open(adapter: &Adapter) -> Gpu {
    Gpu::of(adapter.clone(), GpuOptions::default()).unwrap_or_else(|error| panic!("{error}"))
}

/// Some work, prepared.
struct Work {
    wgpu: Wgpu,
    input: Buffer<f32>,
    quantized: Quantized<Wgpu>,
}

const WIDTH: usize = 300;
const ROWS: usize = 5;

impl Work {
    fn new(gpu: &Gpu) -> Self {
        let mut wgpu = Wgpu::new(gpu, WgpuOptions::default());
        let input = upload(&mut wgpu, &rows());
        let quantized = garbage(ROWS, WIDTH).upload(&mut wgpu);
        Self { wgpu, input, quantized }
    }

    fn run(&mut self) -> Result<(), RunError> {
        let Self { wgpu, input, quantized } = self;
        run_ops(wgpu, &mut |r| {
            r.rms_norm_quantize(ops::RmsNormQuantize {
                rows: ROWS,
                width: WIDTH,
                input,
                norm: None,
                quantized,
                normed: None,
            })
        })
    }

    fn fetch(&mut self) -> Result<<Wgpu as Backend>::Pending<f32>, RunError> {
        self.wgpu.fetch(&self.quantized.scales, ROWS)
    }

    fn whole(&mut self) -> Result<Vec<f32>, RunError> {
        self.run()?;
        let pending = self.fetch()?;
        self.wgpu.wait(pending)
    }
}

fn rows() -> Vec<f32> {
    (0..ROWS * WIDTH).map(|i| (i as f32 * 0.37).sin()).collect()
}

fn check(scales: &[f32]) {
    assert_eq!(scales, HostQuantized::of(&rows(), WIDTH).scales);
}

/// The reason of an error of the device.
fn reason<T: std::fmt::Debug>(result: Result<T, RunError>) -> String {
    match result {
        Err(RunError::Device { device, reason, .. }) => {
            assert!(device.starts_with("wgpu:"), "{device}");
            assert!(!reason.is_empty());
            reason
        }
        other => panic!("not an error of the device: {other:?}"),
    }
}

#[test]
fn a_device_that_is_lost_before_a_step_refuses_it() {
    on_every_adapter(|adapter| {
        let (gpu, neighbour) = (open(&adapter), open(&adapter));
        let (mut work, mut second) = (Work::new(&gpu), Work::new(&gpu));
        let mut other = Work::new(&neighbour);
        check(&work.whole().expect("nothing is wrong yet"));
        other.run().expect("nothing is wrong yet");
        let pending = other.fetch().expect("nothing is wrong yet");
        gpu.device().destroy();
        let lost = reason(work.whole());
        assert!(lost.contains("lost") || lost.contains("destroyed"), "{lost}");
        assert_eq!(reason(work.whole()), lost, "it stays lost");
        // All that share the device are told, and so is who asks for memory.
        reason(second.whole());
        match work.wgpu.allocate::<f32>("more", 100) {
            Err(LoadError::Device { .. }) => {}
            Err(error) => panic!("{error}"),
            Ok(_) => panic!("memory of a device that is lost"),
        }
        check(&other.wgpu.wait(pending).expect("another device goes on"));
        check(&other.whole().expect("another device goes on"));
        check(&Work::new(&open(&adapter)).whole().expect("a device that is opened after"));
    });
}

#[test]
fn a_device_that_is_lost_during_a_step_says_so_to_the_one_who_waits() {
    on_every_adapter(|adapter| {
        let gpu = open(&adapter);
        let mut work = Work::new(&gpu);
        work.run().expect("nothing is wrong yet");
        let pending = work.fetch().expect("nothing is wrong yet");
        gpu.device().destroy();
        reason(work.wgpu.wait(pending));
        reason(work.whole());
    });
}

#[test]
fn a_device_that_is_lost_with_two_steps_in_flight_says_so_to_both() {
    on_every_adapter(|adapter| {
        for waits_between in [false, true] {
            let gpu = open(&adapter);
            let mut work = Work::new(&gpu);
            let mut step = || {
                work.run().expect("nothing is wrong yet");
                work.fetch().expect("nothing is wrong yet")
            };
            let mut pending = vec![step(), step()];
            if waits_between {
                // Both are submitted by this.
                check(&work.wgpu.wait(pending.remove(0)).expect("nothing is wrong yet"));
            }
            gpu.device().destroy();
            for pending in pending {
                // What had reached the host before may be answered.
                match work.wgpu.wait(pending) {
                    Ok(scales) if waits_between => check(&scales),
                    other => drop(reason(other)),
                }
            }
            reason(work.whole());
        }
    });
}

#[test]
fn dropping_what_is_in_flight_on_a_lost_device_comes_to_an_end() {
    on_every_adapter(|adapter| {
        let gpu = open(&adapter);
        let mut work = Work::new(&gpu);
        work.run().expect("nothing is wrong yet");
        let pending = work.fetch().expect("nothing is wrong yet");
        work.run().expect("nothing is wrong yet");
        gpu.device().destroy();
        drop(work);
        drop(pending);
        drop(gpu);
    });
}

/// The caller of a whole model hears of it in the middle of an answer, and at each later request;
/// nothing waits for the steps that were ahead, and a model on another device goes on.
#[test]
fn a_device_that_is_lost_under_a_session_ends_its_answers() {
    on_every_adapter(|adapter| {
        let gpu = open(&adapter);
        let model = &awkward_models()[0];
        // Several steps in flight, and several in a submission.
        let device = Wgpu::new(&gpu, WgpuOptions::default().burst(3));
        let mut session = run::session(device, model, roomy());
        let mut answer = session.generate(&[1, 2, 3], &greedy(20)).expect("starts");
        for _ in 0..2 {
            answer.next().expect("a token").expect("nothing is wrong yet");
        }
        gpu.device().destroy();
        // Tokens that had reached the host before may still come.
        let late = answer.by_ref().take_while(Result::is_ok).count();
        assert!(late < 18, "an answer without an end: {late}");
        assert!(answer.next().is_none(), "an answer ends with its error");
        drop(answer);
        for _ in 0..2 {
            let mut answer = session.generate(&[1, 2, 3], &greedy(20)).expect("starts");
            reason(answer.next().expect("an error"));
            assert!(answer.next().is_none());
            assert_eq!(answer.usage().generated, 0);
        }
        assert_eq!(session.executor().in_flight(), 0);
        let other = Wgpu::new(&open(&adapter), WgpuOptions::default());
        let mut other = run::session(other, model, roomy());
        let tokens = generate(&mut other, &[1, 2, 3], &greedy(4)).expect("another device");
        assert_eq!(tokens.len(), 4);
    });
}

#[test]
fn an_error_that_another_user_of_the_device_provokes_is_named() {
    on_every_adapter(|adapter| {
        let gpu = open(&adapter);
        let mut work = Work::new(&gpu);
        check(&work.whole().expect("nothing is wrong yet"));
        work.run().expect("nothing is wrong yet");
        let pending = work.fetch().expect("nothing is wrong yet");
        let _ = gpu.device().create_buffer(&wgpu::BufferDescriptor {
            label: Some("planted"),
            size: 64,
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::STORAGE,
            mapped_at_creation: false,
        });
        let named = reason(work.wgpu.wait(pending));
        assert!(named.contains("planted"), "{named}");
        assert_eq!(reason(work.whole()), named);
        assert!(!named.contains('\n'), "{named}");
        check(&Work::new(&open(&adapter)).whole().expect("a device that is opened after"));
    });
}

/// Bytes of memory that this process has, where the system says so.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = status.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.unwrap_or(0) * 4096
}

#[test]
fn what_is_too_large_is_refused_with_the_numbers() {
    on_every_adapter(|adapter| {
        let gpu = open(&adapter);
        let wgpu = Wgpu::new(&gpu, WgpuOptions::default());
        let limits = gpu.limits();
        let most = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
        let before = resident();
        let too_large = |result: Result<(), LoadError>, numbers: &[u64]| match result {
            Err(LoadError::OutOfMemory { device, arithmetic }) => {
                assert!(device.starts_with("wgpu:"), "{device}");
                for number in numbers {
                    assert!(arithmetic.contains(&number.to_string()), "{number}: {arithmetic}");
                }
            }
            Err(other) => panic!("another error: {other}"),
            Ok(()) => panic!("it was not refused"),
        };
        let buffer = |len: usize| wgpu.allocate::<f32>("something", len).map(drop);
        let one_more = (most / 16 + 1) * 16;
        too_large(buffer((one_more / 4) as usize), &[one_more, most]);
        too_large(buffer(1 << 40), &[4 << 40, most]);
        too_large(buffer(usize::MAX / 4), &[most]);
        too_large(buffer(usize::MAX), &[most]);
        let cache = |layers, pages| {
            let (kv_heads, head_dim, kv_type) = (8, 128, KvType::F16);
            wgpu.allocate_kv(KvLayout { layers, pages, kv_heads, head_dim, kv_type }).map(drop)
        };
        let page = 32 * 8 * 128 * 2;
        let pages = most / page + 1;
        too_large(cache(2, pages as usize), &[pages * page, most]);
        too_large(cache(1, usize::MAX), &[most]);
        let grown = resident().saturating_sub(before);
        assert!(grown < 100 << 20, "what was refused took {grown} bytes");
        // A refusal is no fault of the device.
        check(&Work::new(&gpu).whole().expect("the device goes on"));
    });
}

#[test]
fn variants_are_what_was_asked_for_or_refused() {
    on_every_adapter(|adapter| {
        let has = |feature| adapter.features().contains(feature);
        let gpu = open(&adapter);
        assert_eq!(gpu.variant().packed_dot, adapter.packed_dot());
        // Both are asked of the device, and a probe may find that subgroups are of no use.
        let asked = [
            (GpuOptions::default().f16(true), has(wgpu::Features::SHADER_F16), "f16"),
            (GpuOptions::default().subgroups(true), gpu.variant().subgroups, "subgroups"),
        ];
        for (options, there, name) in asked {
            match Gpu::of(adapter.clone(), options) {
                Ok(gpu) => {
                    assert!(there, "{name}");
                    assert!(gpu.description().contains(name), "{}", gpu.description());
                }
                Err(LoadError::Device { reason, .. }) => {
                    assert!(!there && reason.contains(name), "{name}: {reason}");
                }
                Err(other) => panic!("another error: {other}"),
            }
        }
        // Mesa's and SwiftShader's are in order; of other drivers it is not known.
        if adapter.is_software() {
            assert_eq!(gpu.variant().subgroups, has(wgpu::Features::SUBGROUP));
        }
        let plain = GpuOptions::default().subgroups(false).packed_dot(false).f16(false);
        let variant = Gpu::of(adapter.clone(), plain).expect("nothing is asked for").variant();
        assert!(!variant.subgroups && !variant.packed_dot && !variant.f16);
    });
}

#[test]
fn a_row_that_no_piece_can_hold_is_refused() {
    on_every_adapter(|adapter| {
        let options = GpuOptions::default().binding_limit(1000);
        let gpu = Gpu::of(adapter, options).expect("opens");
        let wgpu = Wgpu::new(&gpu, WgpuOptions::default());
        let (rows, cols) = (3, 251);
        let bytes = SharedBytes::new(vec![0u8; 4 * rows * cols]);
        let table = HostTable { rows, cols, float: FloatType::F32, bytes };
        match wgpu.load_table(table) {
            Err(LoadError::OutOfMemory { arithmetic, .. }) => {
                assert!(arithmetic.contains("1004") && arithmetic.contains("1000"), "{arithmetic}");
            }
            Err(error) => panic!("another error: {error}"),
            Ok(_) => panic!("it was not refused"),
        }
    });
}
