//! How close the kernels of a GPU come to its limits through wgpu, at the shapes of BitNet b1.58
//! 2B4T:
//!
//! ```text
//! cargo bench --bench wgpu -- [--device wgpu:0] [--rows 1,4,8] [--only qkv] [--unfused] [--quick]
//!     [--json]
//! ```
//!
//! What a line means is said in `common/ops.rs`.

mod common;

use common::ops::{Plan, run};
use common::{Arguments, Failure};
use trine::backend::wgpu::{Gpu, GpuOptions, Wgpu, WgpuOptions};

fn main() -> Result<(), Failure> {
    let flags = ["--quick", "--json", "--unfused"];
    let arguments = Arguments::new(&flags, &["--device", "--rows", "--only", "--repetitions"])?;
    let device = arguments.value("--device");
    let which = device.map(|device| device.trim_start_matches("wgpu").trim_start_matches(':'));
    let gpu = match Gpu::open(which.filter(|which| !which.is_empty()), GpuOptions::default()) {
        Ok(gpu) => gpu,
        // `cargo test` and `cargo bench` run every bench, on machines without a GPU too.
        Err(error) if device.is_none() => {
            eprintln!("nothing to measure: {error}");
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    if gpu.adapter().is_software() && device.is_none() {
        eprintln!("nothing to measure: {} is named with --device only", gpu.description());
        return Ok(());
    }
    let copy = gpu.copy_bandwidth()?;
    eprintln!("{}: copies {:.1} GB/s (read and written)", gpu.description(), copy / 1e9);
    let quick = arguments.has("--quick");
    let rows: &[usize] = if quick { &[1, 8] } else { &[1, 2, 4, 8, 16, 32, 64, 128, 256, 512] };
    let mut plan = Plan::new(quick, arguments.numbers("--rows", rows)?)?;
    plan.repetitions = arguments.number("--repetitions", plan.repetitions)?;
    plan.only = arguments.value("--only").map(str::to_owned);
    plan.json = arguments.has("--json");
    run(Wgpu::new(&gpu, WgpuOptions::default().fused(!arguments.has("--unfused"))), copy, &plan)
}
