//! Results of `trine bench` in llama-bench's formats: its columns and field names, then ours.

use std::time::Duration;

use serde_json::{Map, Value, json};
use trine::backend::cpu::{Cpu, CpuOptions};
use trine::backend::{Head, KvType};
use trine::engine::open::STEP_TOKENS;
use trine::engine::{LoadedModel, ModelFiles};
use trine::error::LoadError;

use super::bench::Format;
use super::bench_power::{Meter, Power, PowerSummary};
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

/// One run of a test.
pub(crate) struct Sample {
    pub(crate) time: Duration,
    /// What the host did for the device, where that is counted.
    pub(crate) host: Option<Host>,
    /// What the device used, where it has a meter.
    pub(crate) power: Option<Power>,
}

/// What the host did for a device.
#[derive(Default)]
pub(crate) struct Host {
    pub(crate) dispatches: u64,
    pub(crate) submits: u64,
    pub(crate) seconds: f64,
}

impl Host {
    /// The same per token: dispatches, submissions, milliseconds.
    fn per_token(samples: &[Sample], test: Test) -> Option<[f64; 3]> {
        let mut sum = Self::default();
        for sample in samples {
            let host = sample.host.as_ref()?;
            sum.dispatches += host.dispatches;
            sum.submits += host.submits;
            sum.seconds += host.seconds;
        }
        let tokens = (samples.len() * test.tokens()) as f64;
        let all = [sum.dispatches as f64, sum.submits as f64, sum.seconds * 1e3];
        (tokens > 0.0).then(|| all.map(|value| value / tokens))
    }
}

/// A model as the report describes it.
pub(crate) struct About {
    path: String,
    name: String,
    parameters: u64,
    /// Multiplications by ternary weights per token.
    products: u64,
    bytes: Bytes,
    kv_type: KvType,
}

impl About {
    pub(crate) fn new(files: &ModelFiles, path: String, kv_type: KvType, head: Head) -> Self {
        let config = files.config();
        Self {
            path,
            name: format!("{} {}", config.family.row().name, output::count(config.parameters())),
            parameters: config.parameters(),
            products: config.ternary_parameters(),
            bytes: Bytes::of(files).with_head(head, config),
            kv_type,
        }
    }

    /// Bytes that a token of this test reads on average; `None` for a prompt, which reads the
    /// weights once for many tokens.
    fn bytes_per_token(&self, test: Test) -> Option<u64> {
        let positions = test.depth + test.decode.div_ceil(2);
        let kv = self.bytes.kv_per_token(self.kv_type) * positions as u64;
        (test.decode > 0).then(|| self.bytes.per_token() + kv)
    }
}

/// A model on a device, and what that device can do at best.
pub(crate) struct Loaded {
    device: String,
    description: String,
    threads: Option<usize>,
    /// Bytes per second at which all threads read memory, or a GPU copies its own.
    bandwidth: Option<f64>,
    /// Int8 products per second of all threads.
    int8: Option<f64>,
    time: Duration,
    peak: Peak,
    pub(crate) meter: Meter,
}

impl Loaded {
    /// Takes note of a model that was loaded in `time`, and measures its device.
    pub(crate) fn new(
        model: &LoadedModel,
        threads: Option<usize>,
        time: Duration,
    ) -> Result<Self, LoadError> {
        let device = model.session.executor().device();
        let mut loaded = Self {
            device: device.name.clone(),
            description: device.description.clone(),
            threads: None,
            bandwidth: None,
            int8: None,
            time,
            peak: Peak::default(),
            meter: Meter::new(&device.name),
        };
        let some = |rate: f64| Some(rate).filter(|rate| rate.is_finite() && *rate > 0.0);
        if loaded.is_cpu() {
            output::note("measuring memory and int8 rate");
            loaded.peak = Peak::before_measuring();
            let mut options = CpuOptions::default();
            options.threads = threads;
            let cpu = Cpu::new(options)?;
            loaded.threads = Some(cpu.threads());
            loaded.bandwidth = some(cpu.read_bandwidth());
            loaded.int8 = some(cpu.int8_rate());
            loaded.peak.after_measuring();
        } else {
            output::note(format_args!("measuring the memory of {}", device.name));
            loaded.peak = Peak::before_measuring();
            match copy_bandwidth(&device.name) {
                Ok(rate) => loaded.bandwidth = rate.and_then(some),
                // There may be no room left for it beside the model.
                Err(error) => output::note(format_args!("no share of the limit: {error}")),
            }
            loaded.peak.after_measuring();
        }
        Ok(loaded)
    }

    pub(crate) fn is_cpu(&self) -> bool {
        self.device == "cpu"
    }
}

/// Bytes read and written per second when a GPU copies its own memory.
fn copy_bandwidth(device: &str) -> Result<Option<f64>, LoadError> {
    #[cfg(feature = "cuda")]
    if let Some(number) = device.strip_prefix("cuda:").and_then(|number| number.parse().ok()) {
        use trine::backend::cuda::{choose, copy_bandwidth};
        return copy_bandwidth(&choose(number)?).map(Some);
    }
    #[cfg(feature = "wgpu")]
    if let Some(which) = device.strip_prefix("wgpu:") {
        use trine::backend::wgpu::{Gpu, GpuOptions};
        return Gpu::open(Some(which), GpuOptions::default())?.copy_bandwidth().map(Some);
    }
    let _ = device; // in a build without GPUs
    Ok(None)
}

/// The most memory that this process has had, without what measuring the machine took.
#[derive(Debug, Default)]
struct Peak {
    before: u64,
    /// The system could not be told to forget what measuring took.
    unknown: bool,
}

impl Peak {
    fn before_measuring() -> Self {
        Self { before: high_water_mark().unwrap_or(0), unknown: false }
    }

    fn after_measuring(&mut self) {
        // Linux: makes the high-water mark what is resident now.
        self.unknown = std::fs::write("/proc/self/clear_refs", "5").is_err();
    }

    fn bytes(&self) -> Option<u64> {
        let now = high_water_mark().filter(|_| !self.unknown)?;
        Some(now.max(self.before))
    }
}

/// The most memory that was resident, where the system says so.
fn high_water_mark() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kb| kb * 1024)
}

/// The result of a test.
pub(crate) struct Row {
    /// llama-bench's fields in its order, then ours.
    fields: Map<String, Value>,
    markdown: [String; 8],
    /// Columns that only devices with a host of their own have.
    host: Option<[String; 3]>,
    /// Columns that only devices with meters have.
    power: Option<[String; 3]>,
}

impl Row {
    pub(crate) fn new(about: &About, loaded: &Loaded, test: Test, samples: &[Sample]) -> Self {
        let ns: Vec<f64> = samples.iter().map(|sample| sample.time.as_nanos() as f64).collect();
        let rates: Vec<f64> =
            ns.iter().map(|ns| test.tokens() as f64 * 1e9 / ns.max(1.0)).collect();
        let (mean, deviation) = mean_and_deviation(&rates);
        let (mean_ns, deviation_ns) = mean_and_deviation(&ns);
        let bytes_per_token = about.bytes_per_token(test);
        let bytes_per_second = bytes_per_token.map(|bytes| bytes as f64 * mean);
        let of_bandwidth =
            bytes_per_second.zip(loaded.bandwidth).map(|(reached, most)| reached / most);
        let products = about.products as f64 * mean;
        let of_int8 = loaded.int8.filter(|_| test.decode == 0).map(|most| products / most);
        let host = Host::per_token(samples, test);
        let runs: Vec<_> =
            samples.iter().map(|run| (run.power.as_ref(), run.time.as_secs_f64())).collect();
        let measured = PowerSummary::of(&runs, test.tokens());
        let is_cpu = loaded.is_cpu();
        let only = |here: bool| if here { loaded.description.as_str() } else { "" };
        let of = |index: usize| host.map(|host| host[index]);
        let kv = about.kv_type.name();
        let fields = json!({
            "build_commit": option_env!("TRINE_COMMIT").unwrap_or("unknown"),
            "build_number": 0,
            "cpu_info": only(is_cpu),
            "gpu_info": only(!is_cpu),
            "backends": loaded.device,
            "model_filename": about.path,
            "model_type": about.name,
            "model_size": about.bytes.model(),
            "model_n_params": about.parameters,
            "n_batch": STEP_TOKENS,
            "n_ubatch": STEP_TOKENS,
            "n_threads": loaded.threads,
            "type_k": kv,
            "type_v": kv,
            "devices": loaded.device,
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
            "bytes_per_second": bytes_per_second,
            "bandwidth_bytes_per_second": loaded.bandwidth,
            "bandwidth_of": loaded.bandwidth.map(|_| if is_cpu { "read" } else { "copy" }),
            "bandwidth_share": of_bandwidth,
            "int8_products_per_second": loaded.int8,
            "int8_share": of_int8,
            "dispatches_per_token": of(0),
            "submits_per_token": of(1),
            "host_ms_per_token": of(2),
            "peak_memory_bytes": loaded.peak.bytes(),
            "load_ns": loaded.time.as_nanos() as u64,
        });
        let percent = |share: Option<f64>, of: &str| {
            share.map(|share| format!("{:.0} % of {of}", share * 100.0))
        };
        let share = percent(of_bandwidth, if is_cpu { "memory" } else { "copy" })
            .or(percent(of_int8, "int8"));
        let markdown = [
            about.name.clone(),
            output::bytes(about.bytes.model()),
            output::count(about.parameters),
            loaded.device.clone(),
            loaded.threads.map_or("-".into(), |threads| threads.to_string()),
            test.name(),
            format!("{mean:.2} ± {deviation:.2}"),
            share.unwrap_or_else(|| "-".into()),
        ];
        let mut fields = if let Value::Object(fields) = fields { fields } else { Map::new() };
        PowerSummary::add_to(measured.as_ref(), &mut fields);
        Self {
            fields,
            markdown,
            host: host.map(|[dispatches, submits, ms]| {
                [format!("{dispatches:.1}"), format!("{submits:.2}"), format!("{ms:.3}")]
            }),
            power: measured.map(|power| power.cells()),
        }
    }

    /// The cells of a table, with what only GPUs have where it is wanted.
    fn cells(&self, columns: usize) -> Vec<String> {
        let mut cells = self.markdown.to_vec();
        for more in [&self.host, &self.power] {
            cells.extend(more.clone().unwrap_or_else(|| [(); 3].map(|()| "-".to_owned())));
        }
        cells.truncate(columns);
        cells
    }
}

const HEADING: [&str; 14] = [
    "model",
    "size",
    "params",
    "backend",
    "threads",
    "test",
    "t/s",
    "share of limit",
    // Where there is a GPU.
    "dispatches/t",
    "submits/t",
    "host ms/t",
    // Where there is one through CUDA.
    "J/t",
    "SM MHz",
    "throttled",
];
const WIDTHS: [usize; 14] = [28, 10, 10, 10, 7, 15, 20, 15, 12, 9, 9, 8, 6, 9];

/// Prints rows as they come, or all at the end where the format asks for it.
pub(crate) struct Report {
    format: Format,
    /// With those that only GPUs have, or only GPUs through CUDA.
    columns: usize,
    rows: Vec<Value>,
}

impl Report {
    /// `gpus` and `cuda` say which devices were named.
    pub(crate) fn new(format: Format, gpus: bool, cuda: bool) -> Self {
        let columns = match (gpus, cuda) {
            (_, true) => 14,
            (true, false) => 11,
            (false, false) => 8,
        };
        Self { format, columns, rows: Vec::new() }
    }

    pub(crate) fn add(&mut self, row: Row) -> anyhow::Result<()> {
        let first = self.rows.is_empty();
        match self.format {
            Format::Md => {
                if first {
                    // `auto` may have found a GPU.
                    let found = [(row.host.is_some(), 11), (row.power.is_some(), 14)];
                    let found = found.into_iter().filter(|&(is, _)| is).map(|(_, columns)| columns);
                    self.columns = found.fold(self.columns, usize::max);
                    output::line(markdown(&HEADING.map(str::to_owned)[..self.columns]))?;
                    output::line(rule(self.columns))?;
                }
                output::line(markdown(&row.cells(self.columns)))?;
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

fn markdown(cells: &[String]) -> String {
    let cells = cells.iter().zip(WIDTHS).enumerate().map(|(column, (cell, width))| {
        // Numbers to the right.
        if is_number(column) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
    });
    format!("| {} |", cells.collect::<Vec<_>>().join(" | "))
}

fn is_number(column: usize) -> bool {
    !matches!(column, 0 | 3 | 5 | 13)
}

fn rule(columns: usize) -> String {
    let cells = WIDTHS[..columns].iter().enumerate().map(|(column, &width)| {
        if is_number(column) { format!("{}:", "-".repeat(width - 1)) } else { "-".repeat(width) }
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
