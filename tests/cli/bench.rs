//! bench: llama-bench's names in every format.

use super::run::{line, parsed};

/// Fields that tools which read llama-bench look for, and ours.
const FIELDS: [&str; 40] = [
    "build_commit",
    "build_number",
    "cpu_info",
    "gpu_info",
    "backends",
    "model_filename",
    "model_type",
    "model_size",
    "model_n_params",
    "n_batch",
    "n_ubatch",
    "n_threads",
    "type_k",
    "type_v",
    "devices",
    "n_prompt",
    "n_gen",
    "n_depth",
    "test_time",
    "avg_ns",
    "stddev_ns",
    "avg_ts",
    "stddev_ts",
    "samples_ns",
    "samples_ts",
    "median_ts",
    "bandwidth_bytes_per_second",
    "bandwidth_of",
    "bandwidth_share",
    "int8_share",
    "dispatches_per_token",
    "submits_per_token",
    "host_ms_per_token",
    "joules_per_token",
    "watts",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "celsius",
    "throttled",
    "peak_memory_bytes",
];

#[test]
fn json_has_the_names_of_llama_bench() {
    let text = line("bench --device cpu -p 8,16 -n 4 -d 0,8 -r 2 -t 1 -o json").good();
    let value = parsed(&text);
    let rows = value.as_array().unwrap();
    assert_eq!(rows.len(), 6);
    for row in rows {
        for field in FIELDS {
            assert!(row.get(field).is_some(), "{field} in {row}");
        }
        assert_eq!(row["n_threads"], 1);
        assert_eq!(row["samples_ns"].as_array().unwrap().len(), 2);
        assert!(row["avg_ts"].as_f64().unwrap() > 0.0);
    }
    let decode = rows.iter().find(|row| row["n_gen"] == 4).unwrap();
    assert!(decode["bandwidth_share"].as_f64().unwrap() > 0.0 && decode["int8_share"].is_null());
}

#[test]
fn tables_have_a_row_for_each_test() {
    let ran = line("bench --device cpu -p 8 -n 4 -r 1 -o md");
    assert!(ran.stderr.contains("pp8: 1 of 1"), "{ran:?}");
    let text = ran.good();
    assert!(
        text.lines().count() == 4 && text.contains("| pp8 ") && text.contains("| tg4 "),
        "{text}"
    );
    let csv = line("bench --device cpu -p 8 -n 0 -r 1 -o csv --no-warmup").good();
    let rows: Vec<&str> = csv.lines().collect();
    assert!(rows.len() == 2 && rows[0].starts_with("build_commit,build_number,"), "{csv}");
    let lines = line("bench --device cpu -p 8 -n 4 -r 1 -o jsonl --no-warmup").good();
    assert!(lines.lines().map(parsed).all(|row| row["avg_ns"].as_u64().unwrap() > 0));
}
