//! `trine convert`: what it leaves behind, when it works and when it does not.
//!
//! That the files are right is for `tools/check_converted.py` to say, which decodes them with other
//! people's code.

use std::fs;
use std::path::Path;

use super::run::{copy, demo, fixture, trine};

/// What is in a folder.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_converted_folder_says_what_the_demo_says() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("copy");
    let ran = trine(["convert", text(&demo()), text(&out), "--type", "hf"]);
    assert!(ran.stderr.contains("wrote") && ran.stderr.contains("92 tensors"), "{ran:?}");
    assert_eq!(ran.good(), "");
    let expected = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names(&out), expected);
    assert_eq!(names(folder.path()), ["copy"]);
    let generate = ["generate", "-n", "8", "--seed", "3", "Good-morrow"];
    let copied = trine(generate.into_iter().chain(["--model", text(&out)])).good();
    assert_eq!(copied, trine(generate).good());

    let demo = demo();
    let again = ["convert", text(&demo), text(&out), "--type", "hf"];
    trine(again).refused(&["copy", "there already", "--force"]);
    trine(again.into_iter().chain(["--force"])).good();
    assert_eq!(names(&out), expected);
    fs::write(out.join("notes.txt"), "mine").unwrap();
    trine(again.into_iter().chain(["--force"])).refused(&["notes.txt", "not replaced"]);
    assert_eq!(fs::read_to_string(out.join("notes.txt")).unwrap(), "mine");
    assert_eq!(names(folder.path()), ["copy"]);
}

#[test]
fn a_file_is_replaced_only_if_asked() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("demo.gguf");
    fs::write(&out, "mine").unwrap();
    let demo = demo();
    let args = ["convert", text(&demo), text(&out), "--type", "i2_s", "--head", "q8_0"];
    trine(args).refused(&["demo.gguf", "there already", "--force"]);
    assert_eq!(fs::read_to_string(&out).unwrap(), "mine");
    trine(args.into_iter().chain(["--force"])).good();
    assert_eq!(&fs::read(&out).unwrap()[..8], b"GGUF\x03\0\0\0");
    assert_eq!(names(folder.path()), ["demo.gguf"]);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let other = folder.path().join("other");
        fs::write(&other, "").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&out), mode(&other), "as any new file");
    }
    trine(["convert", text(&demo), text(folder.path()), "--type", "i2_s", "--force"])
        .refused(&["expected a file"]);
    trine(["convert", text(&demo), text(&out), "--type", "hf", "--force"])
        .refused(&["demo.gguf", "expected a folder"]);
}

#[test]
fn what_does_not_fit_is_refused_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let demo = demo();
    let long = fixture("bitnet_long");
    let llama = fixture("llama_bitlinear");
    for (input, flags, parts) in [
        (&demo, "--type tq2_0", &["blk.0.ffn_down.weight", "640", "256", "--type i2_s"][..]),
        (&demo, "--type tq1_0", &["blk.0.ffn_down.weight", "640", "256"]),
        (&long, "--type i2_s", &["blk.0.attn_q.weight", "192", "128", "--type hf"]),
        (&demo, "--type hf --head q6_k", &["embed_tokens", "Q6_K", "bf16"]),
        (&demo, "--type hf --arch bitnet", &["--arch", "GGUF"]),
        (&llama, "--type i2_s --arch bitnet", &["--arch", "Llama"]),
    ] {
        let args = ["convert", text(input), text(&out)];
        let ran = trine(args.into_iter().chain(flags.split(' ')));
        println!("{flags}: {}", ran.stderr);
        ran.refused(parts);
        assert!(names(folder.path()).is_empty(), "{flags}");
    }
    // 1e30 is a bf16 number and no f16 number.
    let spoilt = copy(&demo);
    let weights = spoilt.path().join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let entries: serde_json::Value = serde_json::from_slice(&bytes[8..header]).unwrap();
    let at = entries["model.embed_tokens.weight"]["data_offsets"][0].as_u64().unwrap() as usize;
    let place = header + at + 2 * (3 * 256 + 5);
    bytes[place..place + 2].copy_from_slice(&0x714a_u16.to_le_bytes());
    fs::write(weights, bytes).unwrap();
    for (head, part) in [("f16", "F16"), ("q6_k", "Q6_K"), ("q8_0", "Q8_0")] {
        let args = ["convert", text(spoilt.path()), text(&out), "--type", "i2_s", "--head", head];
        trine(args).refused(&["token_embd.weight", "row 3, column 5", part, "bf16"]);
        assert!(names(folder.path()).is_empty(), "{head}");
    }
}

#[test]
fn places_that_are_none_are_refused() {
    let no_folder = ["convert", "models/demo", "no/such/folder/out.gguf", "--type", "i2_s"];
    let ran = trine(no_folder);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    ran.sentence(&["out.gguf", "cannot be written", "no folder no/such/folder"]);
    trine(["convert", "no/such/model", "x.gguf", "--type", "i2_s"]).refused(&["no/such/model"]);
    trine(["convert", "models/demo", "", "--type", "i2_s"]).refused(&["OUT", "value"]);
    trine(["convert", "models/demo", "x.gguf"]).refused(&["--type"]);
    trine(["convert", "models/demo", "x.gguf", "--type", "q4"]).refused(&["i2_s, tq2_0", "q4"]);
}

/// A limit on the size of files stands for a full disk: both are errors of a write.
#[cfg(target_os = "linux")]
#[test]
fn a_write_that_fails_is_a_sentence_and_leaves_nothing() {
    use std::process::Command;

    for (kind, name) in [("i2_s", "out.gguf"), ("hf", "out")] {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join(name);
        // Without the trap the signal of the limit would end the program.
        let script = "trap '' XFSZ; ulimit -f 200; exec \"$@\"";
        let done = Command::new("sh")
            .args(["-c", script, "sh", env!("CARGO_BIN_EXE_trine"), "convert"])
            .args([text(&demo()), text(&out), "--type", kind])
            .output()
            .unwrap();
        let stderr = String::from_utf8(done.stderr).unwrap();
        assert_eq!(done.status.code(), Some(1), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(stderr.contains("cannot be written") && stderr.contains(text(&out)), "{stderr}");
        assert!(names(folder.path()).is_empty(), "{:?}", names(folder.path()));
    }
}
