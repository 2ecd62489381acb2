//! `--device cuda` on drivers and GPUs of every kind, by way of the emulated driver, which plays
//! what the environment asks for. Without it there is nothing to test but a machine without CUDA.

use super::run::{Ran, command, parsed};

/// The program with these arguments, on the driver that `environment` describes.
fn on(environment: &[(&str, &str)], args: &str) -> Ran {
    let output = command()
        .args(args.split_whitespace())
        .envs(environment.iter().copied())
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// Whether the driver on this machine is the emulated one.
fn is_emulated() -> bool {
    let devices = parsed(&on(&[], "devices --json").good());
    let emulated = (devices.as_array().unwrap().iter())
        .any(|device| device["name"] == "cuda:0" && device["gpu"]["software"] == true);
    let required = std::env::var_os("TRINE_REQUIRE_CUDA").is_some();
    let real = devices.as_array().unwrap().iter().any(|device| device["name"] == "cuda:0");
    assert!(emulated || real || !required, "no CUDA device is here: {devices}");
    emulated
}

const GENERATE: &str = "generate --device cuda --max-tokens 4 --seed 1 hello";

#[test]
fn a_driver_or_gpu_that_cannot_is_refused_with_the_reason() {
    if !is_emulated() {
        return;
    }
    for (name, value, parts) in [
        ("TRINE_EMULATOR_DEVICES", "0", ["cuda:0", "the NVIDIA driver sees no GPU"]),
        ("TRINE_EMULATOR_DRIVER", "11080", ["CUDA 11.8", "update the driver"]),
        ("TRINE_EMULATOR_CC", "7.5", ["compute capability 7.5", "8.0 or newer"]),
    ] {
        on(&[(name, value)], GENERATE).refused(&parts);
        // In a list it is a line with the reason, and other devices are as they were.
        let devices = on(&[(name, value)], "devices --json").good();
        assert!(devices.contains("\"cpu\""), "{devices}");
    }
    let little = on(&[("TRINE_EMULATOR_MEMORY", "1000000")], GENERATE);
    assert_eq!(little.code, Some(1), "{little:?}");
    little.sentence(&["not enough memory on cuda:0", "available 1 MB"]);
    on(&[], "generate --device cuda:3 hello").refused(&["cuda:3", "there is one GPU"]);
    let two = [("TRINE_EMULATOR_DEVICES", "2")];
    on(&two, "generate --device cuda:2 hello").refused(&["there are 2 GPUs", "cuda:1"]);
}

#[test]
fn a_machine_without_a_driver_says_so() {
    // Nothing is found where the emulated driver is not on the path, unless there is a real one.
    let ran = on(&[("LD_LIBRARY_PATH", "")], GENERATE);
    if ran.code != Some(0) {
        ran.refused(&["cuda:0", "no NVIDIA driver"]);
        let devices = parsed(&on(&[("LD_LIBRARY_PATH", "")], "devices --json").good());
        assert_eq!(devices[0]["name"], "cuda");
        assert_eq!(devices[0]["available"], false);
    }
}

#[test]
fn a_fault_while_running_is_a_sentence() {
    if !is_emulated() {
        return;
    }
    // While the model is loaded, and while it answers: four tokens are some 190 launches.
    for launch in ["50", "150"] {
        let ran = on(&[("TRINE_EMULATOR_FAIL_LAUNCH", launch)], GENERATE);
        assert_eq!(ran.code, Some(1), "{ran:?}");
        let last = ran.stderr.lines().last().unwrap_or_default();
        for part in ["error: ", "device cuda:0 failed while", "illegal memory access"] {
            assert!(last.contains(part), "{part:?} in {ran:?}");
        }
        assert!(!ran.stderr.contains("panicked"), "{ran:?}");
    }
}

#[test]
fn every_generation_of_gpu_gives_the_same_text() {
    if !is_emulated() {
        return;
    }
    // Machine code for 8.x and 9.0; the driver compiles PTX for what came later.
    let expected = on(&[("TRINE_EMULATOR_CC", "9.0")], GENERATE).good();
    for capability in ["8.0", "8.9", "12.0"] {
        assert_eq!(on(&[("TRINE_EMULATOR_CC", capability)], GENERATE).good(), expected);
    }
    let two = [("TRINE_EMULATOR_DEVICES", "2")];
    let second = GENERATE.replace("cuda", "cuda:1");
    assert_eq!(on(&two, &second).good(), expected);
}

#[test]
fn an_emulated_gpu_is_listed_as_software_and_passes_its_test() {
    if !is_emulated() {
        return;
    }
    let devices = parsed(&on(&[], "devices --test --json").good());
    let gpu = devices.as_array().unwrap().iter().find(|device| device["name"] == "cuda:0").unwrap();
    assert_eq!(gpu["available"], true, "{gpu}");
    assert_eq!((&gpu["gpu"]["kind"], &gpu["gpu"]["api"]), (&"software".into(), &"CUDA".into()));
    assert_eq!(gpu["test"]["ok"], true, "{gpu}");
}

/// Greedy text is that of the full head where it is screened; the int8 head has its own logits.
#[test]
fn heads_are_used_or_refused() {
    if is_emulated() {
        let greedy = format!("{GENERATE} --temperature 0");
        let expected = on(&[], &greedy).good();
        assert_eq!(on(&[], &format!("{greedy} --head screened")).good(), expected);
        assert!(!on(&[], &format!("{greedy} --head int8")).good().is_empty());
        on(&[], &format!("{greedy} --head int8 --check")).refused(&["head", "int8", "full head's"]);
    }
    assert!(!on(&[], "generate --device cpu --head full --max-tokens 2 hello").good().is_empty());
    let refused = on(&[], "generate --device cpu --head int8 --max-tokens 2 hello");
    refused.refused(&["head", "full on cpu", "int8"]);
}

#[test]
fn a_bench_says_why_there_is_no_energy() {
    if !is_emulated() {
        return;
    }
    let bench = "bench --device cuda,cpu -p 4 -n 2 -r 1 --no-warmup -o";
    let ran = on(&[], &format!("{bench} json"));
    assert!(ran.stderr.contains("no energy and no clocks: an emulated GPU"), "{ran:?}");
    for row in parsed(&ran.good()).as_array().unwrap() {
        let on_gpu = row["devices"] == "cuda:0";
        assert_eq!(row["bandwidth_of"], if on_gpu { "copy" } else { "read" }, "{row}");
        assert_eq!(row["dispatches_per_token"].is_f64(), on_gpu, "{row}");
        for field in ["joules_per_token", "sm_clock_mhz", "throttled"] {
            assert!(row[field].is_null(), "{field} in {row}");
        }
    }
    let table = on(&[], &format!("{bench} md")).good();
    let columns: Vec<usize> = table.lines().map(|line| line.matches('|').count()).collect();
    assert_eq!(columns, [15; 6], "{table}");
    assert!(table.contains("| throttled |"), "{table}");
}
