//! How a failure is told: one sentence on stderr and an exit code.

use std::fmt;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use trine::error::{ExportError, LoadError, RunError, SubmitError};

/// Exit code after Ctrl-C, as shells have it.
pub(crate) const INTERRUPTED: u8 = 130;

/// What the user gave is wrong, in a sentence.
#[derive(Debug)]
pub(crate) struct BadInput(pub(crate) String);

impl fmt::Display for BadInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadInput {}

/// Some items of a stream of input failed, each of which was told when it did.
#[derive(Debug)]
pub(crate) struct Partly {
    pub(crate) message: String,
    pub(crate) bad_input: bool,
}

impl fmt::Display for Partly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Partly {}

/// An error of bad input.
pub(crate) fn bad_input(message: impl Into<String>) -> anyhow::Error {
    BadInput(message.into()).into()
}

/// Whether what the user gave is to blame.
pub(crate) fn is_bad_input(error: &anyhow::Error) -> bool {
    if let Some(error) = error.downcast_ref::<LoadError>() {
        return !matches!(error, LoadError::OutOfMemory { .. } | LoadError::Prepare(_));
    }
    if let Some(error) = error.downcast_ref::<ExportError>() {
        return !matches!(error, ExportError::Write { .. } | ExportError::Cancelled);
    }
    error.is::<BadInput>()
        || error.is::<SubmitError>()
        || matches!(error.downcast_ref(), Some(RunError::Submit(_)))
        || error.downcast_ref::<Partly>().is_some_and(|partly| partly.bad_input)
}

/// Prints the error and returns the exit code. A reader of stdout that went away is no failure.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    if matches!(error.downcast_ref::<io::Error>(), Some(e) if e.kind() == io::ErrorKind::BrokenPipe)
    {
        return ExitCode::SUCCESS;
    }
    super::output::note(format_args!("error: {}", sentence(error)));
    if matches!(error.downcast_ref(), Some(ExportError::Cancelled)) {
        return ExitCode::from(INTERRUPTED);
    }
    ExitCode::from(if is_bad_input(error) { 2 } else { 1 })
}

/// The error in one line, its options being flags.
pub(crate) fn sentence(error: &anyhow::Error) -> String {
    one_line(&match error.downcast_ref() {
        Some(LoadError::Option { option, expected, found }) => {
            format!("--{}: expected {expected}, found {found}", option.replace('_', "-"))
        }
        _ => error.to_string(),
    })
}

/// A message without line breaks or other control characters, which names in files may hold.
pub(crate) fn one_line(message: &str) -> String {
    let mut line = String::with_capacity(message.len());
    for c in message.chars() {
        if c.is_control() {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}

/// clap's message as one sentence: what is wrong, and what may have been meant.
pub(crate) fn from_clap(error: &clap::Error) -> anyhow::Error {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        Some(ContextValue::Strings(texts)) => Some(texts.join(", ")),
        Some(ContextValue::StyledStr(text)) => Some(text.to_string()),
        Some(ContextValue::StyledStrs(texts)) => {
            Some(texts.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
        }
        _ => None,
    };
    // `--kv <TYPE>` is one word to a reader.
    let flag = |text: String| match text.strip_prefix("--") {
        Some(_) => text.split(' ').next().unwrap_or_default().to_owned(),
        None => text,
    };
    let argument = flag(context(ContextKind::InvalidArg).unwrap_or_default());
    let value = context(ContextKind::InvalidValue).unwrap_or_default();
    let similar = [ContextKind::SuggestedArg, ContextKind::SuggestedSubcommand];
    let similar = similar.into_iter().find_map(context);
    let suggested = similar.is_some();
    let mut message = match error.kind() {
        ErrorKind::UnknownArgument if argument.starts_with('-') => {
            format!("there is no flag {argument}")
        }
        // A model is what people name without a flag most.
        ErrorKind::UnknownArgument if Path::new(&argument).exists() => {
            format!("{argument:?} is one argument too many; --model names a model")
        }
        ErrorKind::UnknownArgument => format!("{argument:?} is one argument too many"),
        ErrorKind::InvalidSubcommand => {
            let name = context(ContextKind::InvalidSubcommand).unwrap_or_default();
            let commands = if suggested { "" } else { "; trine help lists those there are" };
            format!("there is no command {name:?}{commands}")
        }
        ErrorKind::MissingRequiredArgument => format!("missing: {argument}"),
        ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            "no command given; trine generate \"Shall I compare thee\" is one".to_owned()
        }
        ErrorKind::InvalidValue if value.is_empty() => format!("{argument}: a value is missing"),
        ErrorKind::InvalidValue => {
            let valid = context(ContextKind::ValidValue).unwrap_or_default();
            format!("{argument}: expected one of {valid}, found {value:?}")
        }
        ErrorKind::ValueValidation => {
            let source = std::error::Error::source(error).map(ToString::to_string);
            format!("{argument}: {}, found {value:?}", source.unwrap_or_default())
        }
        ErrorKind::ArgumentConflict => match context(ContextKind::PriorArg).map(flag) {
            Some(prior) if prior == argument => format!("{argument} may be given only once"),
            Some(prior) => format!("{argument} cannot be used with {prior}"),
            None => format!("{argument} cannot be used with the other flags"),
        },
        ErrorKind::InvalidUtf8 => "an argument is not UTF-8; only paths may be any bytes".into(),
        _ => {
            let text = error.render().to_string();
            let first = text.split("\n\n").next().unwrap_or_default();
            let words: Vec<&str> = first.split_whitespace().collect();
            words.join(" ").trim_start_matches("error: ").to_owned()
        }
    };
    if let Some(similar) = similar {
        message += &format!("; did you mean {similar}?");
    } else if let Some(suggested) = context(ContextKind::Suggested) {
        message += &format!("; {suggested}");
    }
    bad_input(message)
}
