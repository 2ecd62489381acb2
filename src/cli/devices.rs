//! `trine devices`: what a model can run on here.

use clap::Args;
use serde_json::{Value, json};
use trine::backend::select::{DeviceStatus, devices};
use trine::engine::ModelOptions;

use super::args::AnyModelArgs;
use super::device_test::Reference;
use super::failure::Partly;
use super::fit::Needed;
use super::output;

/// List the devices of this machine, and why others cannot be used
///
/// NVIDIA GPUs are found through CUDA, and all GPUs through wgpu: discrete ones first, then integrated
/// and virtual ones, then software adapters, which imitate a GPU on the CPU: right, but slower than the
/// device cpu, and used only when they are named.
///
/// With a model, it says of each device whether the model fits on it. With --test, the model (the
/// demo if none is named) is loaded on every device, and the 20 likeliest tokens after a prompt are
/// compared with those of the CPU. They may differ only where the CPU's two highest logits are less
/// than 0.8 apart: there devices may round differently. The exit code is 1 if a device fails.
#[derive(Args)]
#[command(after_help = "\
Examples:
  trine devices --json
  trine devices --synthetic 2b4t
  trine devices --test")]
pub(crate) struct Devices {
    #[command(flatten)]
    model: AnyModelArgs,
    /// Load the model on every device and compare its tokens with the CPU's
    #[arg(long)]
    test: bool,
    /// Print a JSON array
    #[arg(long)]
    json: bool,
}

impl Devices {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let model = if self.model.is_named() {
            let files = self.model.open()?;
            let needed = Needed::of(&files, &ModelOptions::default().reserve(files.config())?);
            Some((files.name, needed))
        } else {
            None
        };
        let devices = devices();
        let mut values: Vec<Value> = devices.iter().map(as_json).collect();
        if let Some((_, needed)) = &model {
            for (device, value) in devices.iter().zip(&mut values) {
                value["model"] = needed.json(device);
            }
        }
        let failed = if self.test { self.test(&devices, &mut values)? } else { 0 };
        if self.json {
            output::json(&values)?;
        } else if !self.test {
            output::text(&output::columns(&table(&devices)))?;
            if let Some((name, needed)) = &model {
                let rows = output::columns(&who_runs(name, needed, &devices));
                output::text(&format!("\n{rows}"))?;
            }
        }
        if failed == 0 {
            return Ok(());
        }
        let there = devices.iter().filter(|device| device.state.is_ok()).count();
        let message = format!("{failed} of {there} devices failed; their lines say why");
        Err(Partly { message, bad_input: false }.into())
    }

    /// Tests every device. How many failed.
    fn test(&self, devices: &[DeviceStatus], values: &mut [Value]) -> anyhow::Result<usize> {
        let mut failed = 0;
        let width = devices.iter().map(|device| device.name.len()).max().unwrap_or(0);
        let reference = Reference::new(&self.model)?;
        for (device, value) in devices.iter().zip(values) {
            let name = &device.name;
            let result = match &device.state {
                Ok(_) => {
                    output::note(format_args!("testing {name}"));
                    Some(reference.test(&self.model, device))
                }
                Err(_) => None,
            };
            let (word, rest) = match (&result, &device.state) {
                (Some(Ok(tested)), _) => ("ok", tested.to_string()),
                (Some(Err(reason)), _) => ("FAILED", reason.clone()),
                (None, state) => {
                    ("-", format!("not available: {}", state.clone().err().unwrap_or_default()))
                }
            };
            if !self.json {
                output::line(format_args!("{name:width$}  {word:6}  {rest}"))?;
            }
            if let Some(result) = result {
                failed += usize::from(result.is_err());
                value["test"] = match result {
                    Ok(tested) => tested.json(),
                    Err(reason) => json!({ "ok": false, "reason": reason }),
                };
            }
        }
        Ok(failed)
    }
}

/// A line for each device that a model may run on.
fn who_runs(name: &str, needed: &Needed, devices: &[DeviceStatus]) -> Vec<Vec<String>> {
    let row = |name: &str, value: String| vec![name.to_owned(), value];
    let mut rows = vec![row("MODEL", name.to_owned()), row("memory", needed.arithmetic())];
    let there = devices.iter().filter(|device| device.state.is_ok());
    rows.extend(there.map(|device| {
        let memory = device.memory.map_or("unknown".into(), output::bytes);
        let verdict = match needed.fits(device) {
            Ok(()) => format!("yes: {} of {memory}", output::bytes(needed.sum())),
            Err(reason) => format!("no: {reason}"),
        };
        row(&device.name, verdict)
    }));
    rows
}

/// A line for each device.
fn table(devices: &[DeviceStatus]) -> Vec<Vec<String>> {
    let heading = ["DEVICE", "MEMORY", "BINDING", "SUBGROUP", "F16", "INT8 DOT", "WHAT IT IS"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    rows.extend(devices.iter().map(|device| {
        let of = |show: &dyn Fn(&trine::backend::select::GpuDetails) -> String| {
            device.gpu.as_ref().map_or("-".into(), show)
        };
        vec![
            device.name.clone(),
            device.memory.map_or("-".into(), output::bytes),
            of(&|gpu| output::bytes(gpu.binding_bytes)),
            of(&|gpu| match gpu.subgroup_sizes {
                Some([least, most]) if least == most => most.to_string(),
                Some([least, most]) => format!("{least}-{most}"),
                None => "no".into(),
            }),
            of(&|gpu| if gpu.f16 { "yes" } else { "no" }.into()),
            of(&|gpu| if gpu.packed_dot { "yes" } else { "no" }.into()),
            match &device.state {
                Ok(description) => description.clone(),
                Err(reason) => format!("not available: {reason}"),
            },
        ]
    }));
    rows
}

/// A device as JSON.
pub(crate) fn as_json(device: &DeviceStatus) -> Value {
    json!({
        "name": device.name,
        "available": device.state.is_ok(),
        "description": device.state.as_ref().ok(),
        "reason": device.state.as_ref().err(),
        "memory_bytes": device.memory,
        "gpu": device.gpu.as_ref().map(|gpu| json!({
            "model": gpu.model,
            "kind": gpu.kind,
            "api": gpu.api,
            "driver": gpu.driver,
            "software": gpu.software,
            "subgroup_sizes": gpu.subgroup_sizes,
            "f16": gpu.f16,
            "packed_dot": gpu.packed_dot,
            "binding_bytes": gpu.binding_bytes,
            "buffer_bytes": gpu.buffer_bytes,
            "workgroup_bytes": gpu.workgroup_bytes,
            "storage_buffers": gpu.storage_buffers,
        })),
    })
}
