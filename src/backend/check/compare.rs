//! How far a device may be from the reference, output by output.

use crate::error::RunError;

/// Where a comparison stands, for its message.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub op: &'static str,
    pub index: usize,
    pub output: &'static str,
}

impl Place {
    fn disagrees(self, element: usize, expected: f64, found: f64, tolerance: f64) -> RunError {
        let Self { op, index, output } = self;
        RunError::Disagrees { op, index, output, element, expected, found, tolerance }
    }

    /// Floats of rows of `width`: each within `relative` of the largest magnitude of its row, which
    /// is what the error of a sum scales with.
    pub(super) fn floats(
        self,
        width: usize,
        relative: f64,
        expected: &[f32],
        found: &[f32],
    ) -> Result<(), RunError> {
        for (row, (expected, found)) in
            expected.chunks(width.max(1)).zip(found.chunks(width.max(1))).enumerate()
        {
            let largest = expected.iter().fold(0f32, |max, x| max.max(x.abs()));
            let tolerance = relative * f64::from(largest) + f64::from(f32::MIN_POSITIVE);
            for (i, (&e, &f)) in expected.iter().zip(found).enumerate() {
                let same = (e.is_nan() && f.is_nan()) || e == f;
                let difference = (f64::from(e) - f64::from(f)).abs();
                if !same && (difference.is_nan() || difference > tolerance) {
                    return Err(self.disagrees(row * width + i, e.into(), f.into(), tolerance));
                }
            }
        }
        Ok(())
    }

    /// Integers that must be equal.
    pub(super) fn integers<T: Copy + PartialEq + Into<f64>>(
        self,
        expected: &[T],
        found: &[T],
    ) -> Result<(), RunError> {
        match expected.iter().zip(found).position(|(e, f)| e != f) {
            None => Ok(()),
            Some(i) => Err(self.disagrees(i, expected[i].into(), found[i].into(), 0.0)),
        }
    }

    /// Quantised values: off by at most one, and that in at most one of 64 values of a row (and
    /// one more), where a float that lay close to a boundary was rounded the other way.
    pub(super) fn quantized(
        self,
        stride: usize,
        expected: &[i8],
        found: &[i8],
    ) -> Result<(), RunError> {
        for (row, (expected, found)) in
            expected.chunks(stride).zip(found.chunks(stride)).enumerate()
        {
            let mut others = 0;
            for (i, (&e, &f)) in expected.iter().zip(found).enumerate() {
                others += usize::from(e != f);
                if e.abs_diff(f) > 1 || others > stride / 64 + 1 {
                    let tolerance = if e.abs_diff(f) > 1 { 1.0 } else { 0.0 };
                    return Err(self.disagrees(row * stride + i, e.into(), f.into(), tolerance));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place = Place { op: "op", index: 0, output: "output" };

    #[test]
    fn floats_are_judged_by_their_row() {
        assert!(PLACE.floats(2, 1e-3, &[1.0, 0.0], &[1.0, 0.0009]).is_ok());
        assert!(PLACE.floats(2, 1e-3, &[1.0, 0.0], &[1.0, 0.0011]).is_err());
        assert!(PLACE.floats(1, 1e-3, &[1.0, 0.0], &[1.0, 0.0009]).is_err());
        assert!(PLACE.floats(1, 1e-3, &[1.0], &[f32::NAN]).is_err());
        assert!(PLACE.floats(1, 1e-3, &[f32::NAN], &[f32::NAN]).is_ok());
    }

    #[test]
    fn a_few_roundings_are_forgiven() {
        assert!(PLACE.quantized(4, &[1, 2, 3, 4], &[1, 2, 4, 4]).is_ok());
        assert!(PLACE.quantized(4, &[1, 2, 3, 4], &[1, 2, 5, 4]).is_err());
        assert!(PLACE.quantized(4, &[1, 2, 3, 4], &[1, 3, 4, 4]).is_err());
    }
}
