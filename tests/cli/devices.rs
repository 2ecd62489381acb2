//! `trine devices`, and what runs on a GPU through wgpu that is named; `cuda.rs` has the rest. GPUs that a CPU imitates are enough for
//! all of it, and where there are none of any kind, only what needs none is tested. With
//! `TRINE_REQUIRE_ADAPTERS` set to a number, fewer adapters than that are a failure.

use serde_json::Value;

use super::run::{Ran, line, trine};

fn devices() -> Vec<Value> {
    match line("devices --json").json() {
        Value::Array(devices) => devices,
        other => panic!("an array: {other}"),
    }
}

/// Whether a device is a GPU through wgpu.
fn is_adapter(device: &Value) -> bool {
    device["gpu"].is_object() && name(device).starts_with("wgpu:")
}

/// The adapters that can be used.
fn gpus() -> Vec<Value> {
    let usable = |device: &Value| is_adapter(device) && device["available"] == true;
    let found: Vec<Value> = devices().into_iter().filter(usable).collect();
    let required = std::env::var("TRINE_REQUIRE_ADAPTERS").ok();
    let required = required.map_or(0, |number| number.parse().expect("a number of adapters"));
    assert!(found.len() >= required, "{} of {required} adapters are usable", found.len());
    found
}

/// One GPU, for what is the same on all: Mesa's, which compiles fastest, if it is here.
fn gpu() -> Option<Value> {
    let mut gpus = gpus();
    let mesa = |gpu: &Value| gpu["gpu"]["model"].as_str().unwrap().contains("llvmpipe");
    let index = gpus.iter().position(mesa).unwrap_or(0);
    (!gpus.is_empty()).then(|| gpus.swap_remove(index))
}

fn name(device: &Value) -> &str {
    device["name"].as_str().unwrap()
}

#[test]
fn every_adapter_is_described() {
    let devices = devices();
    let adapters: Vec<&Value> = devices.iter().filter(|device| is_adapter(device)).collect();
    for (number, device) in adapters.iter().enumerate() {
        let gpu = &device["gpu"];
        assert_eq!(name(device), format!("wgpu:{number}"));
        assert_eq!(device["reason"].is_null(), device["available"] == true, "{device}");
        for field in ["model", "kind", "api"] {
            assert!(!gpu[field].as_str().unwrap().is_empty(), "{field} in {device}");
        }
        for field in ["binding_bytes", "buffer_bytes", "workgroup_bytes", "storage_buffers"] {
            assert!(gpu[field].as_u64().unwrap() > 0, "{field} in {device}");
        }
        assert!(gpu["f16"].is_boolean() && gpu.get("packed_dot").is_some(), "{device}");
        if let Some(sizes) = gpu["subgroup_sizes"].as_array() {
            assert!(sizes[0].as_u64() <= sizes[1].as_u64(), "{device}");
        }
    }
    // What imitates a GPU comes after what is one.
    assert!(adapters.is_sorted_by_key(|device| device["gpu"]["software"] == true));
    let table = line("devices").good();
    assert!(devices.iter().all(|device| table.contains(name(device))), "{table}");
}

#[test]
fn a_model_fits_or_not_with_the_numbers() {
    let value = line("devices --json --synthetic 8b").json();
    for device in value.as_array().unwrap() {
        let model = &device["model"];
        assert!(model["needed_bytes"].as_u64().unwrap() > 3_000_000_000, "{device}");
        assert_eq!(model["fits"] == true, model["reason"].is_null(), "{device}");
        let memory = device["memory_bytes"].as_u64();
        if memory.is_some_and(|memory| memory < 3_000_000_000) && device["available"] == true {
            assert!(model["reason"].as_str().unwrap().contains("GiB"), "{device}");
        }
    }
    let text = line("devices --model models/demo").good();
    assert!(text.contains("models/demo") && text.contains("KV cache for"), "{text}");
    let cpu = text.lines().rfind(|line| line.starts_with("cpu")).unwrap();
    assert!(cpu.contains("yes"), "{text}");
}

#[test]
fn every_device_gives_the_tokens_of_the_cpu() {
    let required = gpus().len();
    let value = line("devices --test --json").json();
    let mut passed = 0;
    for device in value.as_array().unwrap() {
        let test = &device["test"];
        if device["available"] != true {
            assert!(test.is_null(), "{device}");
            continue;
        }
        assert_eq!(test["ok"], true, "{device}");
        assert_eq!(test["tokens"], 20, "{device}");
        let ties = test["near_ties"].as_array().unwrap().len() as u64;
        assert_eq!(test["tokens_equal"].as_u64().unwrap() + ties, 20, "{device}");
        assert!(test["decode_per_second"].as_f64().unwrap() > 0.0, "{device}");
        if device["name"] == "cpu" {
            assert_eq!(ties, 0, "{device}");
        } else {
            passed += usize::from(is_adapter(device));
        }
    }
    assert_eq!(passed, required);
}

fn generate(device: &str, more: &[&str]) -> Ran {
    let args = ["generate", "--device", device, "-n", "6", "--temperature", "0", "--json"];
    trine(args.iter().chain(more).chain(&["Shall I compare thee"]))
}

#[test]
fn a_gpu_is_found_by_number_and_by_name() {
    if let Some(gpu) = gpu() {
        let model = gpu["gpu"]["model"].as_str().unwrap();
        let by_number = generate(name(&gpu), &[]);
        let software = gpu["gpu"]["software"] == true;
        assert_eq!(by_number.stderr.contains("a software adapter"), software, "{by_number:?}");
        let by_number = by_number.json();
        assert_eq!(by_number["device"], gpu["name"]);
        // The first whose name holds this may be another API's view of the same GPU.
        let part = model.split([' ', ',']).next().unwrap().to_uppercase();
        let by_name = generate(&format!("wgpu:{part}"), &[]).json();
        assert!(by_name["device"].as_str().unwrap().starts_with("wgpu:"), "{by_name}");
        for flags in [&["--eager"][..], &["--unfused"], &["--eager", "--unfused"]] {
            let other = generate(name(&gpu), flags).json();
            assert_eq!(other["tokens"], by_number["tokens"], "{flags:?} on {gpu}");
        }
    }
}

#[test]
fn every_op_of_a_gpu_is_checked_on_demand() {
    if let Some(gpu) = gpu() {
        let checked = generate(name(&gpu), &["--check"]).json();
        assert_eq!(checked["device"], gpu["name"]);
    }
}

#[test]
fn auto_never_takes_what_imitates_a_gpu() {
    let answer = generate("auto", &[]);
    let device = answer.json()["device"].as_str().unwrap().to_owned();
    let is_hardware = |device: &Value| {
        device["available"] == true && device["gpu"]["software"] == Value::Bool(false)
    };
    let hardware = devices().iter().any(is_hardware);
    assert_eq!(device == "cpu", !hardware, "{device}");
}

#[test]
fn benches_count_what_the_host_does_for_a_gpu() {
    if let Some(gpu) = gpu() {
        let devices = format!("{},cpu", name(&gpu));
        let args = ["bench", "--device", &devices, "-p", "8", "-n", "4", "-r", "1", "-o"];
        let value = trine(args.iter().chain(&["json"])).good();
        let value = super::run::parsed(&value);
        let rows = value.as_array().unwrap();
        assert_eq!(rows.len(), 4);
        for row in rows {
            let on_gpu = row["devices"] == gpu["name"];
            assert!(on_gpu || row["devices"] == "cpu", "{row}");
            for field in ["dispatches_per_token", "submits_per_token", "host_ms_per_token"] {
                let number = row[field].as_f64();
                assert_eq!(number.is_some_and(|number| number > 0.0), on_gpu, "{field} in {row}");
            }
            assert_eq!(row["bandwidth_of"], if on_gpu { "copy" } else { "read" });
            assert_eq!(row["gpu_info"] != "", on_gpu, "{row}");
            assert_eq!(row["bandwidth_share"].is_f64(), row["n_gen"] == 4, "{row}");
        }
        let table = trine(args.iter().chain(&["md"])).good();
        let widths: Vec<usize> = table.lines().map(|line| line.matches('|').count()).collect();
        assert_eq!(widths, [12; 6], "{table}");
        assert!(table.contains("| host ms/t |"), "{table}");
    }
}
