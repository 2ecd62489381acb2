//! Fusion: ops that follow each other in a step become one launch where that gives the same bits.
//!
//! A step of few rows is bound by the number of its launches, not by what they do. So
//!
//! - a norm with quantisation goes into the product that reads it;
//! - the activation of a gated network goes behind the product of gate and up, and its norm with
//!   quantisation into the product after it;
//! - the rotation and the append to the cache go into attention, where every sequence brings one
//!   token.
//!
//! Quantised rows that only the fused product reads never reach memory.

use std::collections::VecDeque;
use std::rc::Rc;

use super::gate_norm_quantize::Gate;
use super::memory::Owned;
use super::record::Op;
use super::rms_norm_quantize::Quantize;
use super::ternary_matmul::{FusedMatmul, Output};
use crate::backend::StepKey;

/// Fuses what can be.
pub(super) fn fuse(ops: Vec<Op>, key: &StepKey) -> Vec<Op> {
    let mut fused: Vec<Op> = Vec::with_capacity(ops.len());
    let mut rest = VecDeque::from(ops);
    while let Some(op) = rest.pop_front() {
        match op {
            Op::Quantize(quantize) if norm_goes_into(&quantize, &rest) => {
                let Some(Op::Matmul(matmul)) = rest.pop_front() else { continue };
                fused.push(Op::FusedMatmul(FusedMatmul {
                    rows: quantize.rows,
                    width: quantize.width,
                    input: quantize.input,
                    norm: quantize.norm,
                    weight: matmul.weight,
                    output: matmul.output,
                    gate: None,
                }));
            }
            Op::Gate(gate) if gate_goes_into(&gate, fused.last(), &rest) => {
                let Some(Op::Matmul(down)) = rest.pop_front() else { continue };
                // The product of gate and up then holds what the gate lets through, in rows of
                // half the length.
                if let Some(Op::FusedMatmul(gate_up)) = fused.last_mut() {
                    gate_up.gate = Some(gate.activation);
                    gate_up.output.stride = gate.width;
                }
                fused.push(Op::FusedMatmul(FusedMatmul {
                    rows: gate.rows,
                    width: gate.width,
                    input: gate.gate_up,
                    norm: gate.norm,
                    weight: down.weight,
                    output: down.output,
                    gate: None,
                }));
            }
            Op::Rope(rope) if key.queries == 1 && rope.goes_into(rest.front()) => {
                let Some(Op::Attention(mut attention)) = rest.pop_front() else { continue };
                attention.rope = Some(rope);
                fused.push(Op::Attention(attention));
            }
            other => fused.push(other),
        }
    }
    fused
}

/// Whether a norm can be part of the op after it, which alone reads what it writes.
fn norm_goes_into(quantize: &Quantize, rest: &VecDeque<Op>) -> bool {
    let Some(Op::Matmul(matmul)) = rest.front() else { return false };
    quantize.normed.is_none()
        && !read_again(&quantize.quantized.values, rest)
        && same(&quantize.quantized.values, &matmul.input.values)
        && (quantize.rows, quantize.width) == (matmul.rows, matmul.width)
        && FusedMatmul::fits(quantize.rows, quantize.width)
        && !same(&quantize.input, &matmul.output.memory)
}

/// Whether an activation can be part of the product before it, and its norm of the one after.
fn gate_goes_into(gate: &Gate, before: Option<&Op>, rest: &VecDeque<Op>) -> bool {
    let (Some(Op::FusedMatmul(gate_up)), Some(Op::Matmul(down))) = (before, rest.front()) else {
        return false;
    };
    let Output { memory, stride, column, add } = &gate_up.output;
    gate.normed.is_none()
        && !read_again(&gate.quantized.values, rest)
        && gate_up.gate.is_none()
        && gate_up.weight.rows() == 2 * gate.width
        && FusedMatmul::gates(gate.width)
        && same(memory, &gate.gate_up)
        && (*stride, *column, *add) == (2 * gate.width, 0, false)
        && gate_up.rows == gate.rows
        && same(&gate.quantized.values, &down.input.values)
        && (gate.rows, gate.width) == (down.rows, down.width)
        && FusedMatmul::fits(gate.rows, gate.width)
        && !same(&gate.gate_up, &down.output.memory)
}

/// Whether quantised rows are read by a product after the next one, before others take their place.
fn read_again(values: &Rc<Owned>, rest: &VecDeque<Op>) -> bool {
    for op in rest.iter().skip(1) {
        match op {
            Op::Matmul(matmul) if same(&matmul.input.values, values) => return true,
            Op::Quantize(Quantize { quantized, .. }) | Op::Gate(Gate { quantized, .. })
                if same(&quantized.values, values) =>
            {
                return false;
            }
            _ => {}
        }
    }
    false
}

fn same(a: &Rc<Owned>, b: &Rc<Owned>) -> bool {
    Rc::ptr_eq(a, b)
}
