//! The CPU backend: every instruction set and number of threads gives the same bits.

mod common;

mod matmul;
mod ops;
mod sample;
