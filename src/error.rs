//! The errors of the library: loading, exporting, submitting, running.
//!
//! Each message is a sentence that says what was being done, what was found, what was expected, and
//! where there is something to do about it, what to do.

use std::path::{Path, PathBuf};

/// Why a checkpoint, a tokenizer or a device could not be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// A file could not be opened or read.
    #[error("{}: cannot be read: {source}", shown(file))]
    Read {
        /// The file.
        file: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A field of a file has a value that it may not have.
    #[error("{}: {field}: expected {expected}, found {found}", shown(file))]
    Invalid {
        /// The file.
        file: PathBuf,
        /// The key, tensor or section.
        field: String,
        /// What would have been accepted.
        expected: String,
        /// What the file holds.
        found: String,
    },
    /// A file asks for something that is well formed and not supported.
    #[error("{}: {field}: {found} is not supported; supported: {supported}", shown(file))]
    Unsupported {
        /// The file.
        file: PathBuf,
        /// The key, tensor or section.
        field: String,
        /// What the file asks for.
        found: String,
        /// What would have worked.
        supported: String,
    },
    /// A device cannot be used.
    #[error("device {device}: {reason}")]
    Device {
        /// The device as the user named it.
        device: String,
        /// Why not, and what to do.
        reason: String,
    },
    /// The model does not fit; the message holds the arithmetic.
    #[error("not enough memory on {device}: {arithmetic}")]
    OutOfMemory {
        /// The device.
        device: String,
        /// The sum: what is needed for what, and what there is.
        arithmetic: String,
    },
    /// An option has a value that it may not have.
    #[error("option {option}: expected {expected}, found {found}")]
    Option {
        /// The option.
        option: String,
        /// What would have been accepted.
        expected: String,
        /// What was given.
        found: String,
    },
    /// Preparing the loaded model on its device failed.
    #[error("preparing the model: {0}")]
    Prepare(#[from] RunError),
}

impl LoadError {
    pub(crate) fn read(file: &Path, source: std::io::Error) -> Self {
        Self::Read { file: file.to_owned(), source }
    }

    pub(crate) fn invalid(
        file: &Path,
        field: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Self::Invalid {
            file: file.to_owned(),
            field: fit(field.into(), MAX_NAME),
            expected: fit(expected.into(), MAX_QUOTE),
            found: fit(found.into(), MAX_QUOTE),
        }
    }

    pub(crate) fn unsupported(
        file: &Path,
        field: impl Into<String>,
        found: impl Into<String>,
        supported: impl Into<String>,
    ) -> Self {
        Self::Unsupported {
            file: file.to_owned(),
            field: fit(field.into(), MAX_NAME),
            found: fit(found.into(), MAX_QUOTE),
            supported: fit(supported.into(), MAX_QUOTE),
        }
    }
}

/// Characters of a field's name in a message: a tensor's name and what of it is wrong.
const MAX_NAME: usize = 1100;
/// Characters of each other part of a message.
const MAX_QUOTE: usize = 2000;

/// A part of a message, which may quote a file, made fit for a terminal.
fn fit(text: String, limit: usize) -> String {
    if text.len() <= limit && !text.contains(char::is_control) { text } else { quote(&text, limit) }
}

/// A path as messages have it: the names of files that were found in a folder are somebody else's, too.
pub(crate) fn shown(path: &Path) -> String {
    quote(&path.display().to_string(), usize::MAX)
}

/// Text from a file as messages quote it: at most `limit` characters, and none that a terminal
/// would obey.
pub(crate) fn quote(text: &str, limit: usize) -> String {
    let mut quoted = String::new();
    for (index, c) in text.chars().enumerate() {
        if index == limit {
            quoted.push('…');
            break;
        }
        if c.is_control() { quoted.extend(c.escape_default()) } else { quoted.push(c) }
    }
    quoted
}

/// Why a model could not be written to files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The model could not be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Something is there already and may not be replaced.
    #[error("{}: it is there already; --force replaces it", shown(path))]
    Exists {
        /// Where the model was to be written.
        path: PathBuf,
    },
    /// What is there is of another kind.
    #[error("{}: expected {expected}, found something else there", shown(path))]
    Kind {
        /// Where the model was to be written.
        path: PathBuf,
        /// What may be there.
        expected: &'static str,
    },
    /// A folder that was to be replaced holds a file that is not of a checkpoint.
    #[error(
        "{}: is not replaced, since {} is no file of a checkpoint; move it, or name another folder",
        shown(path),
        shown(file)
    )]
    Foreign {
        /// Where the model was to be written.
        path: PathBuf,
        /// The file.
        file: PathBuf,
    },
    /// The format has no place for something.
    #[error("{what}: {reason}; {instead}")]
    Unfit {
        /// The tensor, or what else.
        what: String,
        /// What is in the way.
        reason: String,
        /// What would work.
        instead: String,
    },
    /// A file could not be written.
    #[error("{}: cannot be written: {}", shown(file), in_words(source))]
    Write {
        /// The file.
        file: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The caller stopped it.
    #[error("the conversion was stopped; nothing was written")]
    Cancelled,
}

/// What the operating system said, and what to do if that is known.
fn in_words(error: &std::io::Error) -> String {
    use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    match error.kind() {
        StorageFull | QuotaExceeded => {
            format!("the disk is full ({error}); what was written is removed")
        }
        FileTooLarge => format!("files there may not be that large ({error})"),
        _ => error.to_string(),
    }
}

/// Why a request was refused before any work was done for it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// The prompt leaves no room for an answer.
    #[error(
        "the prompt has {prompt} tokens and the context holds {context}: \
         shorten the prompt or load the model with a longer context"
    )]
    TooLong {
        /// Tokens in the prompt.
        prompt: usize,
        /// Tokens that fit.
        context: usize,
    },
    /// A field of the request has a value that it may not have.
    #[error("{field}: expected {expected}, found {found}")]
    Invalid {
        /// The field of the request.
        field: String,
        /// What would have been accepted.
        expected: String,
        /// What was given.
        found: String,
    },
}

impl SubmitError {
    pub(crate) fn invalid(
        field: impl Into<String>,
        expected: impl Into<String>,
        found: impl std::fmt::Display,
    ) -> Self {
        Self::Invalid { field: field.into(), expected: expected.into(), found: found.to_string() }
    }
}

/// Why work that had been accepted failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The device failed; nothing is known of the step's results.
    #[error("device {device} failed while {doing}: {reason}")]
    Device {
        /// The device.
        device: String,
        /// What was being done.
        doing: String,
        /// What the device said.
        reason: String,
    },
    /// An argument of an op does not fit its shape.
    #[error("{op}: {argument}: expected {expected}, found {found}")]
    Shape {
        /// The op.
        op: &'static str,
        /// The argument.
        argument: &'static str,
        /// What the shape asks for.
        expected: String,
        /// What was given.
        found: String,
    },
    /// NaN or infinity reached the logits.
    #[error(
        "the logits of {request} are not finite: the checkpoint or the device is at fault, \
         run again with --check to find the first op that goes wrong"
    )]
    NonFinite {
        /// Which request, in words.
        request: String,
    },
    /// An op disagreed with the reference (only when every op is checked).
    #[error(
        "op {op} number {index} of the step disagrees with the reference in {output}[{element}]: \
         expected {expected}, found {found}, tolerance {tolerance}"
    )]
    Disagrees {
        /// The op.
        op: &'static str,
        /// Its place in the step, from 0.
        index: usize,
        /// Which output.
        output: &'static str,
        /// Which element of it.
        element: usize,
        /// What the reference computed.
        expected: f64,
        /// What the device computed.
        found: f64,
        /// How far apart the two may be.
        tolerance: f64,
    },
    /// More work was asked for than was reserved at load.
    #[error("{what}: {asked} asked for, {reserved} reserved when the model was loaded")]
    Exhausted {
        /// What ran out.
        what: &'static str,
        /// How many were asked for.
        asked: usize,
        /// How many there are.
        reserved: usize,
    },
    /// A request that had been accepted turned out to be impossible.
    #[error(transparent)]
    Submit(#[from] SubmitError),
}
