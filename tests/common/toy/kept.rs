//! The arguments of an op as a recording keeps them: handles of buffers, and the reference's own
//! structs made of their contents while an op runs. And how an output is made wrong.

use std::sync::{RwLockReadGuard, RwLockWriteGuard};

use trine::backend::ops;
use trine::backend::reference::Reference;

use super::control::Control;
use super::{Shared, Toy};

impl<T> Shared<T> {
    pub(super) fn get(&self) -> RwLockReadGuard<'_, T> {
        self.data.read().unwrap()
    }
    pub(super) fn get_mut(&self) -> RwLockWriteGuard<'_, T> {
        self.data.write().unwrap()
    }
}

/// A struct of buffers, as handles that a recording keeps and as the reference's own struct.
pub(super) trait Group: Sized {
    type Host;
    fn handles(&self) -> Self;
    fn arguments(&self) -> String;
    /// Moves the contents out of the device's memory and back.
    fn with<R>(&self, work: impl FnOnce(&mut Self::Host) -> R) -> R;
}

macro_rules! group {
    ($name:ident { $($buffer:ident),* } { $($number:ident),* }) => {
        impl Group for ops::$name<Toy> {
            type Host = ops::$name<Reference>;
            fn handles(&self) -> Self {
                Self { $($buffer: self.$buffer.clone(),)* $($number: self.$number,)* }
            }
            fn arguments(&self) -> String {
                let ids = [$(self.$buffer.id),*];
                let numbers: &[usize] = &[$(self.$number),*];
                format!("{} {ids:?} {numbers:?}", stringify!($name))
            }
            fn with<R>(&self, work: impl FnOnce(&mut Self::Host) -> R) -> R {
                let mut host = ops::$name {
                    $($buffer: std::mem::take(&mut *self.$buffer.get_mut()),)*
                    $($number: self.$number,)*
                };
                let result = work(&mut host);
                $(*self.$buffer.get_mut() = host.$buffer;)*
                result
            }
        }
    };
}
group!(Batch {
    tokens, positions, sequences, slots, query_starts, kv_lens, page_table, lanes, logit_rows,
    targets, sample_rows, bias_tokens, bias_values
} { max_pages });
group!(Lanes { history, sampled } { context });
group!(Quantized { values, scales, sums } {});
group!(Samples { tokens, logprobs, top_tokens, top_logprobs } {});

/// A norm's gain and eps, kept.
#[derive(Clone)]
pub(super) struct KeptNorm {
    pub(super) gain: Shared<Vec<f32>>,
    pub(super) eps: f32,
}

impl KeptNorm {
    pub(super) fn of(norm: ops::Norm<'_, Toy>) -> Self {
        Self { gain: norm.gain.clone(), eps: norm.eps }
    }
    pub(super) fn arguments(norm: Option<&Self>) -> String {
        norm.map_or("none".into(), |norm| format!("{} eps {}", norm.gain.id, norm.eps))
    }
}

/// Calls `work` with the reference's form of a norm.
pub(super) fn with_norm<R>(
    norm: Option<&KeptNorm>,
    work: impl FnOnce(Option<ops::Norm<'_, Reference>>) -> R,
) -> R {
    match norm {
        None => work(None),
        Some(norm) => work(Some(ops::Norm { gain: &norm.gain.get(), eps: norm.eps })),
    }
}

/// An element that can be made wrong by more than any tolerance.
pub(super) trait Wrong: Copy {
    fn wrong(self) -> Self;
}
impl Wrong for f32 {
    fn wrong(self) -> Self {
        self + self.abs() + 1.0
    }
}
impl Wrong for i8 {
    fn wrong(self) -> Self {
        if self > 0 { self - 2 } else { self + 2 }
    }
}
impl Wrong for i32 {
    fn wrong(self) -> Self {
        self + 1
    }
}
impl Wrong for u32 {
    fn wrong(self) -> Self {
        self ^ 1
    }
}

pub(super) fn spoil<T: Wrong>(control: &Control, op: &str, output: &str, values: &mut [T]) {
    if let Some(element) = control.spoiled(op, output) {
        values[element] = values[element].wrong();
    }
}

pub(super) fn spoil_quantized(
    control: &Control,
    op: &str,
    quantized: &mut ops::Quantized<Reference>,
) {
    spoil(control, op, "values", &mut quantized.values);
    spoil(control, op, "scales", &mut quantized.scales);
    spoil(control, op, "sums", &mut quantized.sums);
}
