//! Runs the program.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// How a run ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    /// Asserts success and returns what went to stdout.
    #[track_caller]
    pub(crate) fn good(self) -> String {
        assert_eq!(self.code, Some(0), "stdout {:?}, stderr {:?}", self.stdout, self.stderr);
        self.stdout
    }

    /// Asserts success and reads stdout as JSON.
    #[track_caller]
    pub(crate) fn json(self) -> Value {
        let text = self.good();
        assert_eq!(text.trim_end().lines().count(), 1, "one line of JSON: {text:?}");
        parsed(&text)
    }

    /// Asserts that bad input was refused: exit code 2, nothing on stdout, and on stderr one
    /// sentence with all of `parts` in it.
    #[track_caller]
    pub(crate) fn refused(&self, parts: &[&str]) {
        assert_eq!(self.code, Some(2), "exit code of {self:?}");
        assert_eq!(self.stdout, "", "stdout of {self:?}");
        self.sentence(parts);
    }

    /// Asserts that stderr is one sentence with all of `parts` in it.
    #[track_caller]
    pub(crate) fn sentence(&self, parts: &[&str]) {
        let lines: Vec<&str> = self.stderr.lines().collect();
        assert_eq!(lines.len(), 1, "one line of stderr in {self:?}");
        assert!(lines[0].starts_with("error: "), "{self:?}");
        assert!(!self.stderr.contains("panicked"), "{self:?}");
        for part in parts {
            assert!(lines[0].contains(part), "{part:?} in {:?}", lines[0]);
        }
    }
}

#[track_caller]
pub(crate) fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error} in {text:?}"))
}

/// The program with these arguments and an empty standard input.
pub(crate) fn trine<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Ran {
    with_input(args, b"")
}

/// The program with these arguments, split at spaces.
pub(crate) fn line(args: &str) -> Ran {
    trine(args.split_whitespace())
}

/// The program with these arguments and this standard input.
pub(crate) fn with_input<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>, input: &[u8]) -> Ran {
    let mut child = command()
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // The program may end without reading all of it.
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    writer.join().unwrap();
    Ran {
        code: status.code(),
        stdout: String::from_utf8(stdout).unwrap(),
        stderr: String::from_utf8(stderr).unwrap(),
    }
}

pub(crate) fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trine"));
    command.env_remove("TRINE_LOG").env_remove("TRINE_ISA");
    command
}

/// A checkpoint that transformers wrote.
pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A copy of a folder, to be spoilt.
pub(crate) fn copy(folder: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    copy_into(folder, copy.path());
    copy
}

/// Copies what is in a folder into another.
pub(crate) fn copy_into(folder: &Path, to: &Path) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            std::fs::create_dir(&to).unwrap();
            copy_into(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// The demo model as a folder.
pub(crate) fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo")
}
