//! How close the kernels of an NVIDIA GPU come to its limits, at the shapes of BitNet b1.58 2B4T:
//!
//! ```text
//! cargo bench --bench cuda -- [--device cuda:0] [--rows 1,4,8] [--only qkv] [--unfused] [--quick]
//!     [--json]
//! ```
//!
//! What a line means is said in `common/ops.rs`.

mod common;

use common::ops::{Plan, run};
use common::{Arguments, Failure, bandwidth, hardware};
use trine::backend::cuda::{Cuda, CudaOptions, choose};
use trine::backend::select::DeviceName;

fn main() -> Result<(), Failure> {
    let flags = ["--quick", "--json", "--unfused"];
    let arguments = Arguments::new(&flags, &["--device", "--rows", "--only", "--repetitions"])?;
    let device = match arguments.value("--device") {
        Some(device) => device.to_owned(),
        // `cargo test` and `cargo bench` run every bench, on machines without a GPU too.
        None => match hardware(Some("CUDA")) {
            Some(device) => device,
            None => {
                eprintln!("nothing to measure: there is no NVIDIA GPU; trine devices says why");
                return Ok(());
            }
        },
    };
    let DeviceName::Cuda(ordinal) = device.parse()? else {
        return Err(format!("--device: expected cuda or cuda:N, found {device:?}").into());
    };
    let gpu = choose(ordinal)?;
    let copy = bandwidth(&gpu.name())?;
    eprintln!("{}: copies {:.1} GB/s (read and written)", gpu.description(), copy / 1e9);
    let quick = arguments.has("--quick");
    let rows: &[usize] = if quick { &[1, 8] } else { &[1, 4, 8, 16, 32, 64, 512, 2048] };
    let mut plan = Plan::new(quick, arguments.numbers("--rows", rows)?)?;
    plan.repetitions = arguments.number("--repetitions", plan.repetitions)?;
    plan.only = arguments.value("--only").map(str::to_owned);
    plan.json = arguments.has("--json");
    let options = CudaOptions::default().fused(!arguments.has("--unfused"));
    run(Cuda::new(gpu, options)?, copy, &plan)
}
