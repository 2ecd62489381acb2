//! A model on a device: its configuration, weights and activations, and the one file that knows a
//! layer, [`executor`].

pub mod activations;
pub mod batch;
pub mod config;
pub mod executor;
pub mod open;
mod staging;
pub mod weights;
