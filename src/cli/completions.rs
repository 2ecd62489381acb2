//! `trine completions`: what a shell needs to complete flags.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::output;

/// Print a script that lets a shell complete commands and flags
#[derive(Args)]
#[command(after_help = "\
Example:
  trine completions bash > ~/.local/share/bash-completion/completions/trine")]
pub(crate) struct Completions {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

impl Completions {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        // Into memory first: the generator panics when stdout is closed.
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut super::Cli::command(), "trine", &mut script);
        output::text(&String::from_utf8(script)?)
    }
}
