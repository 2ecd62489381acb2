//! [`TernaryMatmul`]: matrix-vector products for few rows, tiles for many, and the form that norms
//! and quantises its input itself.

use super::Wgpu;
use super::adapters::WORKGROUP_BYTES;
use super::dispatch::Dispatch;
use super::gate_norm_quantize::activation_code;
use super::kernel::{Kernel, ROWS, WORKGROUP};
use super::memory::Raw;
use super::packed::{BLOCK, MatrixPart, TILE};
use super::record::{Gain, QuantizedRows};
use super::rms_norm_quantize::check_quantized;
use crate::backend::ops::{Activation, Epilogue, TernaryMatmul, check_len};
use crate::backend::quantized_stride;
use crate::error::RunError;

/// Rows of a tile of the tiled form, and features.
pub(super) const TILED: usize = 64;

/// Rows up to which matrix-vector products are used. Each group of 8 rows reads the weights anew,
/// which the cache answers; above, half of a tile would do work that counts.
const FEW: usize = 32;

/// Features above which a workgroup takes two tiles of the matrix: there are enough workgroups.
const MANY_FEATURES: usize = 4096;

/// Workgroup memory that the fused form has for its rows. The reductions take
/// `2 · 4 · WORKGROUP` bytes, and 256 are left for what is small.
const STAGED_BYTES: usize = (WORKGROUP_BYTES - 8 * WORKGROUP - 256) as usize;

/// Vectors of 16 int8 that rows may take in the fused form, as compiled: sizes in steps, so that
/// small models do not keep memory from other workgroups.
const STAGED: [usize; 3] = [192, 512, STAGED_BYTES / 16];

const FEW_ROWS: Kernel = Kernel::new("ternary_matmul", "rrrrrw");
const MANY_ROWS: Kernel = Kernel::new("ternary_matmul_tiled", "rrrrrw");
const FUSED: Kernel = Kernel::new("ternary_matmul_fused", "rrrrw");

fn few_rows(rows: usize, lanes: usize) -> Kernel {
    FEW_ROWS.with("ROWS", rows as u32).with("LANES", lanes as u32)
}

fn fused(rows: usize, lanes: usize, gate: bool, staged: usize) -> Kernel {
    FUSED
        .with("ROWS", rows as u32)
        .with("LANES", lanes as u32)
        .with("GATE", u32::from(gate))
        .with("STAGED", 4 * staged as u32)
}

pub(super) fn kernels() -> Vec<Kernel> {
    let mut kernels = vec![MANY_ROWS];
    for rows in ROWS {
        for lanes in [TILE, 2 * TILE] {
            kernels.push(few_rows(rows, lanes));
            // Rows that the fused form is used for.
            for staged in STAGED.into_iter().filter(|_| rows <= FUSED_ROWS) {
                kernels.push(fused(rows, lanes, false, staged));
                if lanes == 2 * TILE {
                    kernels.push(fused(rows, lanes, true, staged));
                }
            }
        }
    }
    kernels
}

/// Rows up to which norms are fused: each workgroup does all of them anew.
const FUSED_ROWS: usize = 4;

/// Where a product goes.
#[derive(Clone)]
pub(super) struct Output {
    pub(super) raw: Raw,
    pub(super) stride: usize,
    pub(super) column: usize,
    pub(super) add: bool,
}

/// The op, kept.
pub(super) struct Matmul {
    pub(super) rows: usize,
    pub(super) width: usize,
    pub(super) input: QuantizedRows,
    pub(super) weight: Vec<MatrixPart>,
    pub(super) output: Output,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Params {
    rows: u32,
    features: u32,
    first: u32,
    blocks: u32,
    stride: u32,
    column: u32,
    add: u32,
}

impl Matmul {
    pub(super) fn new(op: &TernaryMatmul<'_, Wgpu>) -> Result<Self, RunError> {
        const OP: &str = "ternary_matmul";
        let TernaryMatmul { rows, width, features, input, weight, output, .. } = op;
        let (rows, width, features) = (*rows, *width, *features);
        let shape = |argument, expected: String, found: String| RunError::Shape {
            op: OP,
            argument,
            expected,
            found,
        };
        if (weight.rows(), weight.cols()) != (features, width) {
            let of = |rows, cols| format!("{rows} × {cols}");
            return Err(shape("weight", of(features, width), of(weight.rows(), weight.cols())));
        }
        check_quantized(OP, rows, width, input)?;
        if op.column + features > op.stride {
            let most = format!("at most {}", op.stride.saturating_sub(features));
            return Err(shape("column", most, op.column.to_string()));
        }
        let end = rows.checked_sub(1).map_or(0, |last| last * op.stride + op.column + features);
        check_len(OP, "output", end, output.len())?;
        Ok(Self {
            rows,
            width,
            input: QuantizedRows::of(input),
            weight: weight.parts(),
            output: Output {
                raw: output.raw().clone(),
                stride: op.stride,
                column: op.column,
                add: op.epilogue == Epilogue::Add,
            },
        })
    }

    pub(super) fn dispatches(&self) -> Vec<Dispatch> {
        let tiled = self.rows > FEW;
        let rows = ROWS.into_iter().find(|&rows| rows >= self.rows).unwrap_or(ROWS[3]);
        let of = |part: &MatrixPart| {
            let params = Params {
                rows: self.rows as u32,
                features: part.rows as u32,
                first: part.first as u32,
                blocks: (quantized_stride(self.width) / BLOCK) as u32,
                stride: self.output.stride as u32,
                column: self.output.column as u32,
                add: u32::from(self.output.add),
            };
            let bindings = [
                &self.input.values,
                &self.input.scales,
                &self.input.sums,
                &part.codes,
                &part.scales,
                &self.output.raw,
            ];
            let lanes = lanes(part.rows);
            let (kernel, x, y) = if tiled {
                (MANY_ROWS, part.rows.div_ceil(TILED), self.rows.div_ceil(TILED))
            } else {
                (few_rows(rows, lanes), part.rows.div_ceil(lanes), self.rows.div_ceil(rows))
            };
            Dispatch::new(kernel, &bindings, &params, [x as u32, y as u32, 1])
        };
        let some = self.rows > 0 && self.width > 0;
        self.weight.iter().filter(|_| some).map(of).collect()
    }
}

fn lanes(features: usize) -> usize {
    if features > MANY_FEATURES { 2 * TILE } else { TILE }
}

/// A product whose input is normed and quantised in the same kernel, and where `gate` is set the
/// activation of a gated network behind it.
pub(super) struct FusedMatmul {
    pub(super) rows: usize,
    pub(super) width: usize,
    pub(super) input: Raw,
    pub(super) norm: Option<Gain>,
    pub(super) weight: Vec<MatrixPart>,
    pub(super) output: Output,
    pub(super) gate: Option<Activation>,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct FusedParams {
    width: u32,
    has_norm: u32,
    eps: f32,
    features: u32,
    first: u32,
    blocks: u32,
    stride: u32,
    column: u32,
    add: u32,
    activation: u32,
}

impl FusedMatmul {
    /// Whether rows of this number and width can be quantised in workgroup memory.
    pub(super) fn fits(rows: usize, width: usize) -> bool {
        let compiled = ROWS.contains(&rows) && rows <= FUSED_ROWS;
        compiled && width > 0 && rows * quantized_stride(width) <= STAGED_BYTES
    }

    pub(super) fn dispatches(&self, wgpu: &mut Wgpu) -> Result<Vec<Dispatch>, RunError> {
        let unread = wgpu.nothing_to_read()?;
        let vectors = self.rows * quantized_stride(self.width) / 16;
        let staged = STAGED.into_iter().find(|&most| most >= vectors).unwrap_or(STAGED[2]);
        let of = |part: &MatrixPart| {
            let features = if self.gate.is_some() { part.rows / 2 } else { part.rows };
            let params = FusedParams {
                width: self.width as u32,
                has_norm: u32::from(self.norm.is_some()),
                eps: self.norm.as_ref().map_or(0.0, |norm| norm.eps),
                features: features as u32,
                first: part.first as u32,
                blocks: (quantized_stride(self.width) / BLOCK) as u32,
                stride: self.output.stride as u32,
                column: self.output.column as u32,
                add: u32::from(self.output.add),
                activation: self.gate.map_or(0, activation_code),
            };
            let bindings = [
                &self.input,
                self.norm.as_ref().map_or(&unread, |norm| &norm.gain),
                &part.codes,
                &part.scales,
                &self.output.raw,
            ];
            let (lanes, per_group) = if self.gate.is_some() {
                (2 * TILE, TILE)
            } else {
                (lanes(features), lanes(features))
            };
            let kernel = fused(self.rows, lanes, self.gate.is_some(), staged);
            Dispatch::new(kernel, &bindings, &params, [features.div_ceil(per_group) as u32, 1, 1])
        };
        Ok(self.weight.iter().map(of).collect())
    }
}
