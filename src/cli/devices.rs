//! `trine devices`: what a model can run on here.

use clap::Args;
use serde_json::{Value, json};
use trine::backend::select::{DeviceStatus, devices};

use super::output;

/// List the devices of this machine, and why others cannot be used
#[derive(Args)]
#[command(after_help = "\
Example:
  trine devices --json")]
pub(crate) struct Devices {
    /// Print a JSON array
    #[arg(long)]
    json: bool,
}

impl Devices {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let devices = devices();
        if self.json {
            return output::json(&devices.iter().map(as_json).collect::<Vec<_>>());
        }
        let mut rows = vec![["DEVICE", "MEMORY", "WHAT IT IS"].map(str::to_owned).to_vec()];
        rows.extend(devices.iter().map(|device| {
            let memory = device.memory.map_or("-".into(), output::bytes);
            let state = match &device.state {
                Ok(description) => description.clone(),
                Err(reason) => format!("not available: {reason}"),
            };
            vec![device.name.clone(), memory, state]
        }));
        output::text(&output::columns(&rows))
    }
}

/// A device as JSON.
pub(crate) fn as_json(device: &DeviceStatus) -> Value {
    json!({
        "name": device.name,
        "available": device.state.is_ok(),
        "description": device.state.as_ref().ok(),
        "reason": device.state.as_ref().err(),
        "memory_bytes": device.memory,
    })
}
