//! [`RmsNorm`]: a workgroup for each row.

use super::dispatch::Dispatch;
use super::kernel::Kernel;
use super::record::Gain;
use super::{Wgpu, grid};
use crate::backend::ops::{Epilogue, RmsNorm, check_len};
use crate::error::RunError;

const KERNEL: Kernel = Kernel::new("rms_norm", "rrrw");

pub(super) fn kernels() -> Vec<Kernel> {
    vec![KERNEL]
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Params {
    rows: u32,
    width: u32,
    has_norm: u32,
    has_gather: u32,
    first: u32,
    inputs: u32,
    eps: f32,
    add: u32,
}

pub(super) fn dispatch(wgpu: &mut Wgpu, op: &RmsNorm<'_, Wgpu>) -> Result<Dispatch, RunError> {
    let RmsNorm { rows, width, input, gather, first, norm, output, epilogue } = op;
    let (rows, width) = (*rows, *width);
    check_len("rms_norm", "output", rows * width, output.len())?;
    match gather {
        Some(gather) => check_len("rms_norm", "gather", first + rows, gather.len())?,
        None => check_len("rms_norm", "input", rows * width, input.len())?,
    }
    let gain = Gain::of("rms_norm", Some(*norm), width)?;
    let nothing = wgpu.nothing_to_read()?;
    let params = Params {
        rows: rows as u32,
        width: width as u32,
        has_norm: u32::from(gain.is_some()),
        has_gather: u32::from(gather.is_some()),
        first: *first as u32,
        inputs: (input.len() / width.max(1)) as u32,
        eps: norm.eps,
        add: u32::from(*epilogue == Epilogue::Add),
    };
    let bindings = [
        input.raw(),
        norm.gain.raw(),
        gather.map_or(&nothing, |gather| gather.raw()),
        output.raw(),
    ];
    Ok(Dispatch::new(KERNEL, &bindings, &params, grid(rows)))
}
