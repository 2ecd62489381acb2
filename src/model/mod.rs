//! A model on a device: its configuration, weights and activations, the forward pass, which is the
//! one file that knows a layer, and the [`executor`] that runs its steps.

pub mod activations;
pub mod batch;
pub mod config;
pub mod executor;
mod forward;
mod memory;
pub mod open;
mod staging;
pub mod weights;
