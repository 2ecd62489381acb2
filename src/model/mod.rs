//! A model on a device: its configuration, weights and activations, and the one file that knows a
//! layer.

pub mod config;
pub mod weights;
