//! Flags as users of llama.cpp and bitnet.cpp type them, before clap sees them.
//!
//! clap would read `-temp 0.7` as `-t emp 0.7`. Flags that mean the same here are renamed; others
//! are refused with the name of what does the job.

use std::ffi::{OsStr, OsString};

use clap::Command;

use super::failure::bad_input;

/// What becomes of a foreign flag.
enum Fate {
    /// It has this name here.
    Rename(&'static str),
    /// What it asks for is the case anyway.
    Drop,
    /// What to do instead.
    Instead(&'static str),
}

use Fate::{Drop, Instead, Rename};

const CHAT: Fate = Instead("a conversation is a command of its own: trine chat");
const DEVICE: Fate = Instead("a model runs on one device as a whole: --device picks it");
const KV: Fate = Instead("keys and values have one type: --kv f16 or --kv f32");
const BATCH: Fate = Instead("steps have a fixed size here; leave it out");
const DOWNLOAD: Fate = Instead("models are not downloaded: --model takes the path of a folder");

/// Flags, the commands they are looked at for (all if empty), and their fate.
const FOREIGN: &[(&[&str], &[&str], Fate)] = &[
    (&["-temp"], &[], Rename("--temperature")),
    (&["-cnv", "--conversation", "-i", "--interactive", "--chat"], &["chat"], Drop),
    (&["-cnv", "--conversation", "-i", "--interactive"], &[], CHAT),
    (&["-no-cnv", "--no-conversation"], &["generate"], Drop),
    (&["-sys", "--system-prompt"], &["chat"], Rename("--system")),
    (&["-r", "--reverse-prompt"], &["generate", "chat"], Rename("--stop")),
    (&["-p", "--prompt"], &["chat"], Instead("the system prompt is --system; prompts are typed")),
    (&["--perplexity"], &[], Instead("a command of its own: trine perplexity FILE")),
    (&["-ngl", "--n-gpu-layers", "--gpu-layers", "-sm", "-mg", "-ts", "-dev"], &[], DEVICE),
    (&["-ctk", "-ctv", "--cache-type-k", "--cache-type-v"], &[], KV),
    (&["-b", "--batch-size", "-ub", "--ubatch-size"], &[], BATCH),
    (&["-tb", "--threads-batch"], &[], Instead("--threads is for prompts and answers alike")),
    (&["-fa", "--flash-attn", "-nkvo", "-no-mmap", "--no-mmap", "--mlock"], &[], BATCH),
    (&["-hf", "-hfr", "--hf-repo", "-hff", "--hf-file", "-mu", "--model-url"], &[], DOWNLOAD),
    (&["-pg"], &["bench"], Instead("prompts and answers are measured apart: -p and -n")),
];

/// Renames foreign flags or refuses them.
pub(crate) fn translate(args: Vec<OsString>, cli: &Command) -> anyhow::Result<Vec<OsString>> {
    let name = args.get(1).and_then(|arg| arg.to_str()).unwrap_or_default().to_owned();
    if name.starts_with('-') && !["-h", "--help", "-V", "--version", "--"].contains(&name.as_str())
    {
        let chat = args.iter().any(|arg| arg == "-cnv" || arg == "--conversation");
        let command = if chat { "trine chat" } else { "trine generate" };
        return Err(bad_input(format!("the command comes first: {command} {name} …")));
    }
    let Some(command) = cli.find_subcommand(&name) else { return Ok(args) };
    let mut translated: Vec<OsString> = Vec::with_capacity(args.len());
    let mut args = args.into_iter();
    translated.extend(args.by_ref().take(2));
    let mut is_value = false;
    for arg in args.by_ref() {
        if arg == "--" {
            translated.push(arg);
            break;
        }
        let fate = if is_value { None } else { fate(&name, &arg) };
        is_value = false;
        let arg = match fate {
            Some((_, Drop)) => continue,
            Some((flag, Instead(what))) => return Err(bad_input(format!("{flag}: {what}"))),
            Some((flag, Rename(own))) => {
                let rest = arg.to_str().and_then(|arg| arg.strip_prefix(flag)).unwrap_or_default();
                OsString::from(format!("{own}{rest}"))
            }
            None => arg,
        };
        is_value = takes_value(command, &arg);
        translated.push(arg);
    }
    translated.extend(args);
    Ok(translated)
}

/// The foreign flag that this argument is, alone or as `FLAG=VALUE`.
fn fate(command: &str, arg: &OsStr) -> Option<(&'static str, &'static Fate)> {
    let name = arg.to_str()?;
    let name = name.split_once('=').map_or(name, |(name, _)| name);
    FOREIGN.iter().find_map(|(flags, commands, fate)| {
        let flag = flags.iter().find(|flag| **flag == name)?;
        (commands.is_empty() || commands.contains(&command)).then_some((*flag, fate))
    })
}

/// Whether the next argument is the value of this one.
fn takes_value(command: &Command, arg: &OsStr) -> bool {
    let Some(arg) = arg.to_str() else { return false };
    command.get_arguments().filter(|known| known.get_action().takes_values()).any(|known| {
        let short = known.get_short().is_some_and(|short| {
            arg.strip_prefix('-').is_some_and(|rest| rest.chars().eq([short]))
        });
        let long = arg.strip_prefix("--").is_some_and(|name| {
            known.get_long() == Some(name)
                || known.get_all_aliases().is_some_and(|aliases| aliases.contains(&name))
        });
        short || long
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn translated(line: &[&str]) -> Result<Vec<String>, String> {
        let args = std::iter::once("trine").chain(line.iter().copied()).map(OsString::from);
        let args = translate(args.collect(), &crate::cli::Cli::command());
        let args = args.map_err(|error| error.to_string())?;
        Ok(args.into_iter().skip(1).map(|arg| arg.into_string().unwrap()).collect())
    }

    #[test]
    fn flags_are_renamed_and_values_are_not() {
        for (line, expected) in [
            (["generate", "-temp", "0.7"], ["generate", "--temperature", "0.7"]),
            (["generate", "-p", "-temp"], ["generate", "-p", "-temp"]),
            (["generate", "--prompt", "-cnv"], ["generate", "--prompt", "-cnv"]),
            (["generate", "--", "-cnv"], ["generate", "--", "-cnv"]),
            (["chat", "-sys", "-cnv"], ["chat", "--system", "-cnv"]),
        ] {
            assert_eq!(translated(&line).unwrap(), expected);
        }
        assert_eq!(translated(&["generate", "-temp=1"]).unwrap(), ["generate", "--temperature=1"]);
        assert_eq!(translated(&["chat", "-cnv"]).unwrap(), ["chat"]);
    }

    #[test]
    fn equivalents_are_named() {
        for (line, part) in [
            (["generate", "-cnv"], "trine chat"),
            (["generate", "-ngl"], "--device"),
            (["generate", "-ctk"], "--kv"),
            (["-m", "model"], "trine generate"),
            (["-cnv", "-m"], "trine chat"),
        ] {
            let error = translated(&line).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    /// A foreign flag must not shadow one of the command's own.
    #[test]
    fn no_own_flag_is_foreign() {
        let cli = crate::cli::Cli::command();
        for command in cli.get_subcommands() {
            for argument in command.get_arguments() {
                let long = argument.get_long().map(|long| format!("--{long}"));
                let short = argument.get_short().map(|short| format!("-{short}"));
                for flag in long.into_iter().chain(short) {
                    let foreign = fate(command.get_name(), OsStr::new(&flag)).is_some();
                    assert!(!foreign, "{} {flag}", command.get_name());
                }
            }
        }
    }
}
