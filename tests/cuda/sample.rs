//! Sampling and scoring on CUDA.

use crate::common::sample_tests;
use trine::backend::cuda::{Cuda, CudaOptions};

/// A backend on the first GPU, kept from pass to pass with its scratch memory.
fn backends() -> Vec<(&'static str, Cuda)> {
    crate::common::cuda::open(CudaOptions::default())
        .map(|cuda| ("cuda", cuda))
        .into_iter()
        .collect()
}

#[test]
fn draws_are_the_references_but_for_rounding() {
    sample_tests::draws_are_the_references_but_for_rounding(&mut backends());
}

#[test]
fn half_of_a_million_equal_tokens_is_half() {
    sample_tests::half_of_a_million_equal_tokens_is_half(&mut backends());
}

#[test]
fn greedy_is_exact() {
    sample_tests::greedy_is_exact(&mut backends());
}

#[test]
fn what_is_not_finite_is_found_anywhere() {
    sample_tests::what_is_not_finite_is_found_anywhere(&mut backends());
}

#[test]
fn the_noise_is_the_references() {
    sample_tests::the_noise_is_the_references(&mut backends());
}

#[test]
fn frequencies_approach_softmax() {
    sample_tests::frequencies_approach_softmax(&mut backends());
}

#[test]
fn options_out_of_range_do_no_harm() {
    sample_tests::options_out_of_range_do_no_harm(&mut backends());
}

#[test]
fn scores_are_the_references() {
    sample_tests::scores_are_the_references(&mut backends());
}

#[test]
fn buffers_that_are_too_short_are_refused() {
    sample_tests::buffers_that_are_too_short_are_refused(&mut backends());
}

#[test]
fn a_row_depends_on_itself_alone() {
    sample_tests::a_row_depends_on_itself_alone(&mut backends());
}
