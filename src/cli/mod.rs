//! The command line: one file per subcommand.
//!
//! Text and data go to stdout; progress, notes and errors to stderr. An error is one sentence, and
//! the exit code says whose fault it is: 2 for bad input, 1 for a failure while running.

mod args;
mod argv;
mod bench;
mod bench_power;
mod bench_report;
mod chat;
mod completions;
mod convert;
mod device_test;
mod devices;
mod embed;
mod failure;
mod fit;
mod generate;
mod inspect;
mod output;
mod parse;
mod perplexity;
mod score;
mod tokenize;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};

/// Runs BitNet b1.58 language models: ternary weights, int8 activations.
#[derive(Parser)]
#[command(name = "trine", version, after_help = AFTER_HELP, max_term_width = 100)]
#[command(subcommand_required = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Without --model the demo model runs, which is part of this program.

Examples:
  trine generate \"Shall I compare thee\"
  trine chat --model models/bitnet-b1.58-2B-4T
  trine bench --synthetic 2b4t

Text and data go to stdout, all else to stderr. TRINE_LOG=debug logs more.

Exit codes:
  0  it worked (also when the reader of stdout went away)
  1  it failed while running: the device, memory, an op that --check caught
  2  bad input: a flag, a path, a file, a token id
  130  ended by Ctrl-C";

#[derive(Subcommand)]
enum Command {
    Generate(generate::Generate),
    Chat(chat::Chat),
    Inspect(inspect::Inspect),
    Devices(devices::Devices),
    Tokenize(tokenize::Tokenize),
    Embed(embed::Embed),
    Score(score::Score),
    Perplexity(perplexity::Perplexity),
    Bench(bench::Bench),
    Convert(convert::Convert),
    Completions(completions::Completions),
}

impl Command {
    fn run(&self) -> anyhow::Result<()> {
        match self {
            Self::Generate(command) => command.run(),
            Self::Chat(command) => command.run(),
            Self::Inspect(command) => command.run(),
            Self::Devices(command) => command.run(),
            Self::Tokenize(command) => command.run(),
            Self::Embed(command) => command.run(),
            Self::Score(command) => command.run(),
            Self::Perplexity(command) => command.run(),
            Self::Bench(command) => command.run(),
            Self::Convert(command) => command.run(),
            Self::Completions(command) => command.run(),
        }
    }
}

/// Runs the program and says how it ended.
pub(crate) fn main() -> ExitCode {
    quieten_vulkan();
    print_only_real_panics();
    log_to_stderr();
    let result = parse(std::env::args_os().collect()).and_then(|cli| match cli {
        Some(cli) => cli.command.run(),
        None => Ok(()),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(&error),
    }
}

/// `None` if all there was to do was to print help.
fn parse(args: Vec<OsString>) -> anyhow::Result<Option<Cli>> {
    let args = argv::translate(args, &Cli::command())?;
    let error = match Cli::try_parse_from(args) {
        Ok(cli) => return Ok(Some(cli)),
        Err(error) => error,
    };
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            error.print()?;
            Ok(None)
        }
        _ => Err(failure::from_clap(&error)),
    }
}

/// Where there is no desktop, Mesa's layer that sorts GPUs looks for one all the same and writes to
/// stderr that it found none. Devices are sorted here in any case, so the layer is told to stay
/// away, unless the user has a wish that it carries out.
fn quieten_vulkan() {
    let set = |name: &str| std::env::var_os(name).is_some();
    if cfg!(target_os = "linux")
        && !["XDG_RUNTIME_DIR", "NODEVICE_SELECT", "MESA_VK_DEVICE_SELECT"].into_iter().any(set)
    {
        // SAFETY: this is the first thing that the program does, and no other thread is there yet.
        unsafe { std::env::set_var("NODEVICE_SELECT", "1") };
    }
}

/// Keeps off stderr what the library is about to turn into an error.
fn print_only_real_panics() {
    let standard = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !trine::text::catching_panics() {
            standard(panic);
        }
    }));
}

fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("TRINE_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colours)
        .without_time()
        .init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }
}
