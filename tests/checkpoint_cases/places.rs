//! Paths and files that are something else than what is asked for, for everything that opens files.

use std::fs;
use std::path::Path;

use crate::checkpoint_base::{Base, container};
use crate::fault;

/// The sentence for a path, the temporary folder's own path taken out.
fn sentence(folder: &Path, path: &Path) -> String {
    let error = fault(path).map_or("no error".into(), |error| error.to_string());
    error.replace(&format!("{}", folder.display()), "FOLDER")
}

const PICKLE: &str = "a Python pickle, as old PyTorch files are, which can run code when it is \
                      read; convert it to safetensors with the library that made it";
const ZIP: &str = "a ZIP archive, as PyTorch's .bin, .pt and .pth files are, whose pickle can run \
                   code when it is read; convert it to safetensors with the library that made it";
const GGML: &str = "a GGML file from before GGUF (August 2023), which nobody writes any more; \
                    convert the original model again";
const POINTER: &str = "a Git LFS pointer, not the file that it stands for; fetch that with `git \
                       lfs pull`";
const HTML: &str = "an HTML page, as servers send instead of a file that is not there or needs a \
                    login; download it again";

/// The beginnings of files of other formats, as their specifications have them, and their names.
const FORMATS: &[(&[u8], &str)] = &[
    (b"PK\x03\x04\0\0\x08\x08\0\0\0\0\0\0\0\0archive/data.pkl", ZIP),
    (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", PICKLE),
    (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}\x94.", PICKLE),
    (b"lmgg\0\x7d\0\0\0\x10\0\0 and more", GGML),
    (b"tjgg\x03\0\0\0\0\x7d\0\0 and more", GGML),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1180000000\n", POINTER),
    (b"<!DOCTYPE html>\n<html><head><title>401</title></head></html>", HTML),
    (b"\n<html lang=\"en\">", HTML),
    (b"Entry not found", "the answer of a server that has no such file; download it again"),
    (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\x80\x01", "an ONNX file"),
    (b"\x89HDF\r\n\x1a\n\0\0\0\0\0\x08\x08\0", "an HDF5 file, as Keras writes"),
    (b"\x1c\0\0\0TFL3\x14\0 \0\x1c\0\x18\0\x14\0", "a TensorFlow Lite file"),
    (b"\x93NUMPY\x01\0v\0{'descr': '<f4'}", "a NumPy array"),
    (b"\x1f\x8b\x08\0\0\0\0\0\0\x03 and more", "a gzip archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd\x04\x58 and more bytes", "a Zstandard archive; unpack it first"),
    (b"", "an empty file"),
    (&[0; 4096], "nothing but zeros"),
];

#[test]
fn files_of_other_formats_are_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name);
    let write = |name: &str, bytes: &[u8]| fs::write(path(name), bytes).expect("written");
    let mut wrong = Vec::new();
    let mut check = |name: &str, at: &Path, expected: String| {
        let found = sentence(folder.path(), at);
        if !found.starts_with(&expected) {
            wrong.push(format!("{name}\n  expected {expected}\n     found {found}"));
        }
    };
    Base::bitnet().write(folder.path());
    for (bytes, name) in FORMATS {
        write("model.bin", bytes);
        let expected = format!("FOLDER/model.bin: format: {name} is not supported; supported: ");
        check(name, &path("model.bin"), expected);

        write("model.safetensors", bytes);
        let expected = match bytes {
            [] => "FOLDER/model.safetensors: header length: expected 8 bytes, found a file of 0 \
                   bytes"
                .to_owned(),
            _ => format!(
                "FOLDER/model.safetensors: format: {name} is not supported; supported: safetensors"
            ),
        };
        check(name, folder.path(), expected.clone());
        check(name, &path("model.safetensors"), expected);
        Base::bitnet().write(folder.path());

        write("config.json", bytes);
        let (field, expected) = match std::str::from_utf8(bytes) {
            Ok(_) => ("JSON", "an object"),
            Err(_) => ("encoding", "UTF-8 text"),
        };
        let expected = format!("FOLDER/config.json: {field}: expected {expected}, found {name}");
        check(name, folder.path(), expected);
        Base::bitnet().write(folder.path());

        write("m.gguf", bytes);
        let found = match bytes {
            [] => "4 bytes at offset 0, found 0 bytes to the end of the file".to_owned(),
            _ => format!("\"GGUF\", found {name}"),
        };
        check(name, &path("m.gguf"), format!("FOLDER/m.gguf: magic: expected {found}"));
    }
    // Names that do not say what is in a file.
    write("weights", &container(&Base::bitnet().tensors));
    let expected = "FOLDER/weights: format: a safetensors file; its name must end in .safetensors \
                    is not supported; supported: ";
    check("safetensors without a name", &path("weights"), expected.into());
    write("weights", b"GGUF\x03\0\0\0 and more");
    let expected = "FOLDER/weights: format: a GGUF file; its name must end in .gguf is not \
                    supported; supported: ";
    check("GGUF without a name", &path("weights"), expected.into());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Things of a file system that are no files. Opening one must neither wait nor read without end.
#[cfg(unix)]
#[test]
fn what_is_no_file_is_refused_before_it_is_opened() {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    let make_pipe = |path: &Path| {
        let made = std::process::Command::new("mkfifo").arg(path).status().expect("mkfifo");
        assert!(made.success());
    };
    let make_socket = |path: &Path| drop(UnixListener::bind(path).expect("a socket"));
    let make_loop = |path: &Path| symlink(path, path).expect("a link");
    let make_dangling = |path: &Path| symlink("/no/such/file", path).expect("a link");
    let make_device = |path: &Path| symlink("/dev/zero", path).expect("a link");
    let make_folder = |path: &Path| fs::create_dir(path).expect("a folder");
    let os = |code: i32| std::io::Error::from_raw_os_error(code).to_string();
    let looped = os(if cfg!(target_os = "linux") { 40 } else { 62 });
    let special = "kind: expected a file, found a pipe, socket or device";

    /// A thing's name, how it is made, and the sentence for it as a file of a folder.
    type Thing<'a> = (&'a str, &'a dyn Fn(&Path), String);
    let things: [Thing<'_>; 6] = [
        ("a pipe", &make_pipe, special.into()),
        ("a socket", &make_socket, special.into()),
        ("a device", &make_device, special.into()),
        ("a folder", &make_folder, "kind: expected a file, found a folder".into()),
        ("a loop of links", &make_loop, format!("cannot be read: {looped}")),
        (
            "a link to nothing",
            &make_dangling,
            "kind: expected a file, found a link to /no/such/file, which is not there".into(),
        ),
    ];
    for (what, make, expected) in &things {
        // As a file of a folder: those that must be there and those that may.
        for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
        {
            let folder = tempfile::tempdir().expect("a temporary folder");
            Base::bitnet().write(folder.path());
            let path = folder.path().join(name);
            let _ = fs::remove_file(&path);
            make(&path);
            let found = sentence(folder.path(), folder.path());
            let expected = format!("FOLDER/{name}: {expected}");
            assert!(found.starts_with(&expected), "{what} as {name}: {found}");
        }
        // By its own path.
        for name in ["m.gguf", "m.safetensors", "m.bin", "m"] {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let path = folder.path().join(name);
            make(&path);
            let found = sentence(folder.path(), &path);
            let expected = match *what {
                // A folder is opened whatever its name is.
                "a folder" => {
                    format!("FOLDER/{name}/config.json: cannot be read: there is no such")
                }
                "a loop of links" | "a link to nothing" => format!("FOLDER/{name}: {expected}"),
                _ => format!(
                    "FOLDER/{name}: kind: expected a file or a folder, found a pipe, socket or \
                     device"
                ),
            };
            assert!(found.starts_with(&expected), "{what} as {name}: {found}");
        }
    }
    // A path through a file.
    let folder = tempfile::tempdir().expect("a temporary folder");
    fs::write(folder.path().join("file"), b"").expect("written");
    let found = sentence(folder.path(), &folder.path().join("file/m.gguf"));
    assert_eq!(found, format!("FOLDER/file/m.gguf: cannot be read: {}", os(20)));
}

/// A file that may not be read; root may read every file.
#[cfg(unix)]
#[test]
fn a_file_that_may_not_be_read_says_so() {
    use std::os::unix::fs::PermissionsExt;

    for name in ["config.json", "model.safetensors", "generation_config.json"] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut base = Base::bitnet();
        base.generation = Some(serde_json::json!({}));
        base.write(folder.path());
        let path = folder.path().join(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).expect("set");
        let found = sentence(folder.path(), folder.path());
        match fs::File::open(&path) {
            Ok(_) => assert_eq!(found, "no error"),
            Err(error) => assert_eq!(found, format!("FOLDER/{name}: cannot be read: {error}")),
        }
    }
}

/// A folder's GGUF file is found by listing it, so that its name is as foreign as what is in it.
#[cfg(unix)]
#[test]
fn the_name_of_a_file_that_was_found_cannot_steer_a_terminal() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fs::write(folder.path().join("\x1b[2J\r\n.gguf"), b"GGML").expect("written");
    let found = sentence(folder.path(), folder.path());
    assert_eq!(found, r#"FOLDER/\u{1b}[2J\r\n.gguf: magic: expected "GGUF", found "GGML""#);
}
