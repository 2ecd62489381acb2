//! Results of `trine bench` in llama-bench's formats: its columns and field names, then ours.

use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value, json};
use trine::backend::KvType;
use trine::engine::open::STEP_TOKENS;
use trine::engine::{LoadedModel, ModelFiles};

use super::bench::Format;
use super::inspect::Bytes;
use super::output;

/// One test.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Test {
    pub(crate) prompt: usize,
    pub(crate) decode: usize,
    pub(crate) depth: usize,
}

impl Test {
    /// `pp512`, `tg128 @ d1024`.
    pub(crate) fn name(&self) -> String {
        let name = match self.prompt {
            0 => format!("tg{}", self.decode),
            prompt => format!("pp{prompt}"),
        };
        if self.depth > 0 { format!("{name} @ d{}", self.depth) } else { name }
    }

    /// Tokens that are counted.
    pub(crate) fn tokens(&self) -> usize {
        self.prompt + self.decode
    }
}

/// What is the same for all tests of a load.
pub(crate) struct Machine {
    path: String,
    model: String,
    parameters: u64,
    bytes: Bytes,
    kv_type: KvType,
    threads: usize,
    device: String,
    description: String,
    bandwidth: Option<f64>,
    load: Duration,
}

impl Machine {
    pub(crate) fn new(files: &ModelFiles, path: &Path, threads: usize, kv_type: KvType) -> Self {
        let config = files.config();
        Self {
            path: path.display().to_string(),
            model: format!("{} {}", config.family.row().name, output::count(config.parameters())),
            parameters: config.parameters(),
            bytes: Bytes::of(files),
            kv_type,
            threads,
            device: String::new(),
            description: String::new(),
            bandwidth: None,
            load: Duration::ZERO,
        }
    }

    /// Takes note of the device and measures its bandwidth.
    pub(crate) fn loaded(&mut self, model: &LoadedModel, load: Duration) {
        let device = model.session.executor().device();
        self.device = device.name.clone();
        self.description = device.description.clone();
        self.bandwidth = bandwidth(self.threads);
        self.load = load;
    }
}

/// Bytes per second at which this many threads read memory.
fn bandwidth(threads: usize) -> Option<f64> {
    let _ = threads;
    None
}

/// The result of a test.
pub(crate) struct Row {
    test: String,
    model: String,
    size: u64,
    parameters: u64,
    device: String,
    threads: usize,
    /// In llama-bench's order, then ours.
    fields: Map<String, Value>,
    mean: f64,
    deviation: f64,
    share: Option<f64>,
}

impl Row {
    pub(crate) fn new(machine: &Machine, test: Test, samples: Vec<Duration>) -> Self {
        let ns: Vec<f64> = samples.iter().map(|time| time.as_nanos() as f64).collect();
        let rates: Vec<f64> =
            ns.iter().map(|ns| test.tokens() as f64 * 1e9 / ns.max(1.0)).collect();
        let (mean, deviation) = mean_and_deviation(&rates);
        let (mean_ns, deviation_ns) = mean_and_deviation(&ns);
        // A prompt reads weights once for many tokens: its limit is arithmetic.
        let bytes_per_token = (test.decode > 0).then(|| {
            let read = test.depth + test.decode.div_ceil(2);
            machine.bytes.per_token() + machine.bytes.kv_per_token(machine.kv_type) * read as u64
        });
        let reached = bytes_per_token.map(|bytes| bytes as f64 * mean);
        let share = reached.zip(machine.bandwidth).map(|(reached, limit)| reached / limit);
        let kv = format!("{:?}", machine.kv_type).to_lowercase();
        let fields = json!({
            "build_commit": option_env!("TRINE_COMMIT").unwrap_or("unknown"),
            "build_number": 0,
            "cpu_info": machine.description,
            "gpu_info": "",
            "backends": machine.device,
            "model_filename": machine.path,
            "model_type": machine.model,
            "model_size": machine.bytes.model(),
            "model_n_params": machine.parameters,
            "n_batch": STEP_TOKENS,
            "n_ubatch": STEP_TOKENS,
            "n_threads": machine.threads,
            "type_k": kv,
            "type_v": kv,
            "devices": machine.device,
            "n_prompt": test.prompt,
            "n_gen": test.decode,
            "n_depth": test.depth,
            "test_time": chrono::Utc::now().format("%Y-%m-%dT%H:%M:%SZ").to_string(),
            "avg_ns": mean_ns.round() as u64,
            "stddev_ns": deviation_ns.round() as u64,
            "avg_ts": mean,
            "stddev_ts": deviation,
            "samples_ns": ns.iter().map(|&ns| ns as u64).collect::<Vec<_>>(),
            "samples_ts": rates,
            "test": test.name(),
            "median_ts": median(&rates),
            "build_version": env!("CARGO_PKG_VERSION"),
            "bytes_per_token": bytes_per_token,
            "bytes_per_second": reached,
            "bandwidth_bytes_per_second": machine.bandwidth,
            "bandwidth_share": share,
            "peak_memory_bytes": peak_memory(),
            "load_ns": machine.load.as_nanos() as u64,
        });
        Self {
            test: test.name(),
            model: machine.model.clone(),
            size: machine.bytes.model(),
            parameters: machine.parameters,
            device: machine.device.clone(),
            threads: machine.threads,
            fields: if let Value::Object(fields) = fields { fields } else { Map::new() },
            mean,
            deviation,
            share,
        }
    }

    fn markdown(&self) -> [String; 8] {
        [
            self.model.clone(),
            output::bytes(self.size),
            output::count(self.parameters),
            self.device.clone(),
            self.threads.to_string(),
            self.test.clone(),
            format!("{:.2} ± {:.2}", self.mean, self.deviation),
            self.share.map_or("-".into(), |share| format!("{:.0} %", share * 100.0)),
        ]
    }
}

const HEADING: [&str; 8] =
    ["model", "size", "params", "backend", "threads", "test", "t/s", "of bandwidth"];
const WIDTHS: [usize; 8] = [28, 10, 10, 10, 7, 15, 20, 12];

/// Prints rows as they come, or all at the end where the format asks for it.
pub(crate) struct Report {
    format: Format,
    rows: Vec<Value>,
}

impl Report {
    pub(crate) fn new(format: Format) -> Self {
        Self { format, rows: Vec::new() }
    }

    pub(crate) fn add(&mut self, row: Row) -> anyhow::Result<()> {
        let first = self.rows.is_empty();
        match self.format {
            Format::Md => {
                if first {
                    output::line(markdown(&HEADING.map(str::to_owned)))?;
                    output::line(rule())?;
                }
                output::line(markdown(&row.markdown()))?;
            }
            Format::Csv => {
                let plain = row.fields.iter().filter(|(_, value)| !value.is_array());
                if first {
                    let names: Vec<&str> = plain.clone().map(|(name, _)| name.as_str()).collect();
                    output::line(names.join(","))?;
                }
                output::line(plain.map(|(_, value)| csv(value)).collect::<Vec<_>>().join(","))?;
            }
            Format::Jsonl => output::json(&row.fields)?,
            Format::Json => {}
        }
        self.rows.push(Value::Object(row.fields));
        Ok(())
    }

    pub(crate) fn finish(&self) -> anyhow::Result<()> {
        match self.format {
            Format::Json => output::line(serde_json::to_string_pretty(&self.rows)?),
            _ => Ok(()),
        }
    }
}

fn markdown(cells: &[String; 8]) -> String {
    let cells = cells.iter().zip(WIDTHS).enumerate().map(|(column, (cell, width))| {
        // Numbers to the right.
        if matches!(column, 1 | 2 | 4 | 6 | 7) {
            format!("{cell:>width$}")
        } else {
            format!("{cell:<width$}")
        }
    });
    format!("| {} |", cells.collect::<Vec<_>>().join(" | "))
}

fn rule() -> String {
    let cells = WIDTHS.iter().enumerate().map(|(column, &width)| match column {
        1 | 2 | 4 | 6 | 7 => format!("{}:", "-".repeat(width - 1)),
        _ => "-".repeat(width),
    });
    format!("| {} |", cells.collect::<Vec<_>>().join(" | "))
}

fn csv(value: &Value) -> String {
    match value {
        Value::String(text) => format!("\"{}\"", text.replace('"', "\"\"")),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

/// Mean and sample standard deviation.
fn mean_and_deviation(samples: &[f64]) -> (f64, f64) {
    let count = samples.len().max(1) as f64;
    let mean = samples.iter().sum::<f64>() / count;
    let squares: f64 = samples.iter().map(|sample| (sample - mean).powi(2)).sum();
    (mean, (squares / (count - 1.0).max(1.0)).sqrt())
}

fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        count if count.is_multiple_of(2) => (sorted[middle - 1] + sorted[middle]) / 2.0,
        _ => sorted[middle],
    }
}

/// The most memory that this process has had, where the system says so.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kb| kb * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics() {
        assert_eq!(mean_and_deviation(&[1.0, 2.0, 3.0]), (2.0, 1.0));
        assert_eq!(mean_and_deviation(&[5.0]), (5.0, 0.0));
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn names_are_those_of_llama_bench() {
        let test = |prompt, decode, depth| Test { prompt, decode, depth }.name();
        assert_eq!(test(512, 0, 0), "pp512");
        assert_eq!(test(0, 128, 1024), "tg128 @ d1024");
    }

    #[test]
    fn csv_quotes() {
        assert_eq!(csv(&json!("a \"b\", c")), "\"a \"\"b\"\", c\"");
        assert_eq!(csv(&json!(1.5)), "1.5");
        assert_eq!(csv(&Value::Null), "");
    }
}
