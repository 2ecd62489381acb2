//! What the benches of devices share: their command line, the limit that a device is held against,
//! and its meters.

// No bench uses all of it.
#![allow(dead_code)]

pub(crate) mod ops;

use std::str::FromStr;

use serde_json::{Map, Value, json};
use trine::backend::cpu::Cpu;
use trine::backend::select::devices;
use trine::error::LoadError;

pub(crate) type Failure = Box<dyn std::error::Error>;

/// The command line: flags, and options that are followed by a value.
pub(crate) struct Arguments(Vec<String>);

impl Arguments {
    /// Those of this process. A word that is neither in `flags`, nor in `options`, nor after one of
    /// these, is refused.
    pub(crate) fn new(flags: &[&str], options: &[&str]) -> Result<Self, Failure> {
        let all: Vec<String> = std::env::args().skip(1).collect();
        let mut words = all.iter();
        while let Some(word) = words.next() {
            if options.contains(&word.as_str()) {
                words.next().ok_or_else(|| format!("{word}: a value is missing"))?;
            } else if !flags.contains(&word.as_str()) && word != "--bench" && word != "--test" {
                let known = [flags, options].concat().join(" ");
                return Err(format!("there is no flag {word}; there are {known}").into());
            }
        }
        Ok(Self(all))
    }

    pub(crate) fn has(&self, flag: &str) -> bool {
        self.0.iter().any(|word| word == flag)
    }

    /// The value of an option.
    pub(crate) fn value(&self, option: &str) -> Option<&str> {
        let at = self.0.iter().position(|word| word == option)?;
        self.0.get(at + 1).map(String::as_str)
    }

    pub(crate) fn number<T: FromStr>(&self, option: &str, otherwise: T) -> Result<T, Failure> {
        match self.value(option) {
            Some(text) => {
                text.parse().map_err(|_| format!("{option}: {text:?} is not a number").into())
            }
            None => Ok(otherwise),
        }
    }

    /// Numbers with commas between them.
    pub(crate) fn numbers(&self, option: &str, otherwise: &[usize]) -> Result<Vec<usize>, Failure> {
        let Some(text) = self.value(option) else { return Ok(otherwise.to_vec()) };
        let number = |part: &str| {
            part.parse().map_err(|_| format!("{option}: {part:?} is not a number").into())
        };
        text.split(',').filter(|part| !part.is_empty()).map(number).collect()
    }
}

/// The GPU that is measured where no device is named: never one that a CPU imitates.
pub(crate) fn hardware(api: Option<&str>) -> Option<String> {
    let is_one = |gpu: &trine::backend::select::GpuDetails| {
        !gpu.software && api.is_none_or(|api| gpu.api == api)
    };
    let found = devices()
        .into_iter()
        .find(|device| device.state.is_ok() && device.gpu.as_ref().is_some_and(is_one));
    found.map(|device| device.name)
}

/// Bytes per second that a device reads and writes when it copies its own memory; on the CPU, that
/// all threads read.
pub(crate) fn bandwidth(device: &str) -> Result<f64, LoadError> {
    #[cfg(feature = "cuda")]
    if let Some(number) = device.strip_prefix("cuda:").and_then(|number| number.parse().ok()) {
        use trine::backend::cuda::{choose, copy_bandwidth};
        return copy_bandwidth(&choose(number)?);
    }
    #[cfg(feature = "wgpu")]
    if let Some(which) = device.strip_prefix("wgpu:") {
        use trine::backend::wgpu::{Gpu, GpuOptions};
        return Gpu::open(Some(which), GpuOptions::default())?.copy_bandwidth();
    }
    let _ = device; // in a build without GPUs
    Ok(Cpu::new(Default::default())?.read_bandwidth())
}

/// Free memory of a device, where its driver tells.
pub(crate) fn free_memory(device: &str) -> Option<u64> {
    #[cfg(feature = "cuda")]
    if let Some(number) = device.strip_prefix("cuda:").and_then(|number| number.parse().ok()) {
        use trine::backend::cuda::{choose, free_memory};
        return choose(number).and_then(|gpu| free_memory(&gpu)).ok();
    }
    let _ = device; // in a build without CUDA
    None
}

/// Bytes of this process that are in memory, where the system says so.
pub(crate) fn resident_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kb| kb * 1024)
}

/// A GPU's meters, where it has any.
pub(crate) struct Meter {
    #[cfg(feature = "cuda")]
    meter: Option<trine::backend::cuda::PowerMeter>,
}

impl Meter {
    /// Says on standard error why a CUDA device has no meters.
    pub(crate) fn new(device: &str) -> Self {
        #[cfg(feature = "cuda")]
        {
            use trine::backend::cuda::{PowerMeter, choose};
            let number = device.strip_prefix("cuda:").and_then(|number| number.parse().ok());
            let meter = number.map(|number| {
                let gpu = choose(number).map_err(|error| error.to_string())?;
                PowerMeter::new(&gpu)
            });
            if let Some(Err(reason)) = &meter {
                eprintln!("no energy and no clocks: {reason}");
            }
            Self { meter: meter.and_then(Result::ok) }
        }
        #[cfg(not(feature = "cuda"))]
        {
            let _ = device;
            Self {}
        }
    }

    /// Joules used so far.
    pub(crate) fn joules(&self) -> Option<f64> {
        #[cfg(feature = "cuda")]
        return self.meter.as_ref()?.read().joules;
        #[cfg(not(feature = "cuda"))]
        None
    }

    /// Adds what `tokens` tokens took since the meter said `before`, and how the GPU is.
    pub(crate) fn add_to(&self, result: &mut Map<String, Value>, before: Option<f64>, tokens: f64) {
        #[cfg(feature = "cuda")]
        if let Some(meter) = &self.meter {
            let now = meter.read();
            let joules = now.joules.zip(before).map(|(now, before)| now - before);
            let joules = joules.filter(|&joules| joules > 0.0);
            result.insert("joules_per_token".into(), json!(joules.map(|joules| joules / tokens)));
            result.insert("sm_clock_mhz".into(), json!(now.sm_mhz));
            result.insert("memory_clock_mhz".into(), json!(now.memory_mhz));
            result.insert("watts".into(), json!(now.watts));
            result.insert("celsius".into(), json!(now.celsius));
            let throttled = now.throttling.map(|reasons| match reasons.as_slice() {
                [] => "no".to_owned(),
                reasons => reasons.join(", "),
            });
            result.insert("throttled".into(), json!(throttled));
        }
        let _ = (result, before, tokens); // in a build without CUDA
    }
}

/// A line of results: an object that says what was measured on what, and at which commit.
pub(crate) fn line(what: &str, device: &str, fields: Value) -> Map<String, Value> {
    let mut line = Map::new();
    line.insert("what".into(), json!(what));
    line.insert("device".into(), json!(device));
    line.insert("commit".into(), json!(option_env!("TRINE_COMMIT").unwrap_or("unknown")));
    if let Value::Object(fields) = fields {
        line.extend(fields);
    }
    line
}

/// Prints a line of results.
pub(crate) fn print(line: Map<String, Value>) {
    println!("{}", Value::Object(line));
}

pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
