//! Files that people have and that are something else: their names, by their first bytes. Asked only
//! where a file has been found to be wrong, so that no good file can be mistaken.

/// Bytes that are looked at.
pub(crate) const HEAD: usize = 512;

const PICKLE: &str = "a Python pickle, as old PyTorch files are, which can run code when it is read; convert it \
                      to safetensors with the library that made it";
const ZIP: &str = "a ZIP archive, as PyTorch's .bin, .pt and .pth files are, whose pickle can run code when it \
                   is read; convert it to safetensors with the library that made it";
const GGML: &str = "a GGML file from before GGUF (August 2023), which nobody writes any more; convert the \
                    original model again";
const POINTER: &str =
    "a Git LFS pointer, not the file that it stands for; fetch that with `git lfs pull`";
const HTML: &str = "an HTML page, as servers send instead of a file that is not there or needs a login; \
                    download it again";

/// Names at the very start of a file. GGML's magic is a number, so its letters stand backwards.
const STARTS: &[(&[u8], &str)] = &[
    (b"PK\x03\x04", ZIP),
    (b"\x80\x02", PICKLE),
    (b"\x80\x03", PICKLE),
    (b"\x80\x04", PICKLE),
    (b"\x80\x05", PICKLE),
    (b"lmgg", GGML),
    (b"fmgg", GGML),
    (b"tjgg", GGML),
    (b"algg", GGML),
    (b"GGUF", "a GGUF file; its name must end in .gguf"),
    (b"FUGG", "a GGUF file whose bytes are in the wrong order"),
    (b"version https://git-lfs", POINTER),
    (b"Entry not found", "the answer of a server that has no such file; download it again"),
    (b"\x89HDF", "an HDF5 file, as Keras writes"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive; unpack it first"),
];

/// What a file is whose first bytes these are, if that is known.
pub(crate) fn name(head: &[u8]) -> Option<&'static str> {
    let head = &head[..head.len().min(HEAD)];
    let at = |at: usize, part: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(part));
    if head.is_empty() {
        return Some("an empty file");
    }
    // A header's length, which can begin as any other format does, then the header.
    if at(8, b"{\"") {
        return Some("a safetensors file; its name must end in .safetensors");
    }
    if let Some((_, name)) = STARTS.iter().find(|(start, _)| head.starts_with(start)) {
        return Some(name);
    }
    let text = head.trim_ascii_start();
    let page = |tag: &[u8]| text.get(..tag.len()).is_some_and(|t| t.eq_ignore_ascii_case(tag));
    match () {
        () if page(b"<!doctype html") || page(b"<html") => Some(HTML),
        () if page(b"<?xml") => Some("an XML document"),
        () if at(4, b"TFL3") => Some("a TensorFlow Lite file"),
        () if at(257, b"ustar") => Some("a tar archive; unpack it first"),
        // A protobuf of ONNX: the version of its format, then the name of its producer.
        () if at(0, &[0x08]) && at(2, &[0x12]) && matches!(head[1], 1..=15) => Some("an ONNX file"),
        () if head.iter().all(|&byte| byte == 0) => Some("nothing but zeros"),
        () => None,
    }
}
