//! `trine chat`: a conversation, a line a turn.

use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::Args;
use rustyline::error::ReadlineError;
use rustyline::{Behavior, Config, DefaultEditor};
use trine::backend::KvType;
use trine::engine::{LoadedModel, SamplingParams};
use trine::text::{ChatTemplate, Message};

use super::args::{ContextArgs, DeviceArgs, ModelArgs, SamplingArgs, load};
use super::failure::{self, INTERRUPTED, Partly, bad_input};
use super::generate::Answer;
use super::output;
use super::parse::{self, Limit};

/// Talk with a model
///
/// The conversation is kept, rendered with the checkpoint's chat template, and computed only from
/// where it differs from the last turn. Ctrl-C stops an answer; at the prompt, Ctrl-C twice or
/// Ctrl-D ends the program. Where standard input is not a terminal, each line is a turn, and the exit
/// code tells whether one was refused or failed.
#[derive(Args)]
#[command(after_help = "\
Sampling options are those of trine generate.

Commands in a conversation:
  /reset  forget the conversation and keep the system prompt
  /help   list the commands
  /exit   end the program

Examples:
  trine chat --model models/bitnet-b1.58-2B-4T --system \"Answer in one sentence.\"
  printf 'Hello\\nWho are you?\\n' | trine chat --max-tokens 64")]
pub(crate) struct Chat {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    context: ContextArgs,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    system: Option<String>,
    /// The most tokens of an answer; -1 for as many as fit [default: the checkpoint's
    /// max_new_tokens, else as many as fit]
    #[arg(short = 'n', long, alias = "n-predict", alias = "predict", value_name = "N")]
    #[arg(value_parser = parse::limit, allow_negative_numbers = true)]
    max_tokens: Option<Limit>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Print a JSON object for each turn, as trine generate does
    #[arg(long)]
    json: bool,
}

const HELP: &str = "\
/reset  forget the conversation and keep the system prompt
/help   this list
/exit   end the program (or Ctrl-D)
Ctrl-C stops an answer. Anything else is said to the model.";

/// Ctrl-Cs (or requests to end) since the answer in progress began; [`IDLE`] between answers.
static INTERRUPTS: AtomicUsize = AtomicUsize::new(IDLE);
const IDLE: usize = usize::MAX;

/// The first Ctrl-C during an answer stops it; the second, and any outside an answer, the program.
fn on_interrupt() {
    let count = INTERRUPTS.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |count| {
        (count != IDLE).then_some(count + 1)
    });
    if count != Ok(0) {
        std::process::exit(INTERRUPTED.into());
    }
}

/// What the user said, or did.
enum Input {
    Line(String),
    Interrupt,
    End,
}

/// Where turns come from.
enum Turns {
    Terminal(Box<DefaultEditor>),
    Pipe { lines: io::Lines<io::StdinLock<'static>>, number: usize },
}

impl Turns {
    fn open() -> anyhow::Result<Self> {
        if io::stdin().is_terminal() {
            // The terminal itself and not stdout, which may be a file.
            let config = Config::builder().behavior(Behavior::PreferTerm).auto_add_history(true);
            return Ok(Self::Terminal(Box::new(DefaultEditor::with_config(config.build())?)));
        }
        Ok(Self::Pipe { lines: io::stdin().lines(), number: 0 })
    }

    fn next(&mut self) -> anyhow::Result<Input> {
        match self {
            Self::Terminal(editor) => match editor.readline("> ") {
                Ok(line) => Ok(Input::Line(line)),
                Err(ReadlineError::Interrupted) => Ok(Input::Interrupt),
                Err(ReadlineError::Eof) => Ok(Input::End),
                Err(error) => Err(error.into()),
            },
            Self::Pipe { lines, number } => {
                *number += 1;
                let line = lines.next().transpose().map_err(|error| {
                    bad_input(format!("standard input, line {number}: cannot be read: {error}"))
                })?;
                Ok(line.map_or(Input::End, Input::Line))
            }
        }
    }

    fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal(_))
    }
}

/// The conversation so far.
struct Conversation {
    model: LoadedModel,
    params: SamplingParams,
    messages: Vec<Message>,
    /// How many of the messages stay after `/reset`.
    kept: usize,
    json: bool,
}

impl Chat {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let options = self.device.options(self.context.context, KvType::F16);
        let files = self.model.open()?;
        files.check_writes()?;
        let model = load(files, &options)?;
        if model.chat.is_none() {
            return Err(ChatTemplate::missing().into());
        }
        let vocabulary = model.session.config().vocabulary;
        let params = self.sampling.params(&model.defaults(), self.max_tokens, vocabulary)?;
        let messages: Vec<Message> =
            self.system.iter().map(|text| Message::new("system", text.as_str())).collect();
        let kept = messages.len();
        ctrlc::set_handler(on_interrupt)?;
        let mut turns = Turns::open()?;
        if turns.is_terminal() {
            output::note(format_args!(
                "{} on {}; /help lists the commands",
                model.name,
                model.session.executor().device().name
            ));
        }
        Conversation { model, params, messages, kept, json: self.json }.run(&mut turns)
    }
}

impl Conversation {
    fn run(&mut self, turns: &mut Turns) -> anyhow::Result<()> {
        let (mut asked, mut failed, mut bad) = (0, 0, true);
        let mut interrupted = false;
        loop {
            let line = match turns.next()? {
                Input::Line(line) => line,
                Input::End => break,
                Input::Interrupt if interrupted => std::process::exit(INTERRUPTED.into()),
                Input::Interrupt => {
                    interrupted = true;
                    output::note("Ctrl-C again, or Ctrl-D, ends the program");
                    continue;
                }
            };
            interrupted = false;
            match line.trim() {
                "" => {}
                "/exit" | "/quit" => break,
                "/help" => output::note(HELP),
                "/reset" => {
                    self.messages.truncate(self.kept);
                    output::note("the conversation is forgotten");
                }
                word if word.starts_with('/') && !word[1..].contains(['/', ' ']) => {
                    output::note(format_args!("there is no command {word}; /help lists them"));
                }
                text => {
                    asked += 1;
                    if let Err(error) = self.turn(text) {
                        if error.is::<io::Error>() {
                            return Err(error);
                        }
                        failed += 1;
                        bad &= failure::is_bad_input(&error);
                        output::note(format_args!("error: {}", failure::sentence(&error)));
                    }
                }
            }
        }
        if failed == 0 || turns.is_terminal() {
            return Ok(());
        }
        let message = format!("{failed} of {asked} turns failed");
        Err(Partly { message, bad_input: bad }.into())
    }

    /// One turn. A turn that fails is forgotten, so that the next one can be shorter.
    fn turn(&mut self, text: &str) -> anyhow::Result<()> {
        self.messages.push(Message::new("user", text));
        INTERRUPTS.store(0, Ordering::SeqCst);
        let answered = self.answer();
        INTERRUPTS.store(IDLE, Ordering::SeqCst);
        match answered {
            Ok(answer) => {
                self.messages.push(Message::new("assistant", answer.text));
                Ok(())
            }
            Err(error) => {
                self.messages.pop();
                Err(error)
            }
        }
    }

    fn answer(&mut self) -> anyhow::Result<Answer> {
        let mut answer = Answer::default();
        let mut stream = self.model.generate_chat(&self.messages, &self.params)?;
        while INTERRUPTS.load(Ordering::SeqCst) == 0 {
            let Some(event) = stream.next() else { break };
            let text = answer.add(event?);
            if !self.json {
                output::text(&text)?;
            }
        }
        if answer.reason.is_none() {
            answer.usage = stream.usage();
        }
        drop(stream);
        if self.json {
            output::json(&answer.json())?;
        } else if !answer.text.ends_with('\n') {
            output::text("\n")?;
        }
        match answer.reason() {
            "interrupted" => output::note("(stopped)"),
            "context" => output::note(format_args!(
                "(the context of {} tokens is full: /reset, or a longer --context)",
                self.model.session.context()
            )),
            _ => {}
        }
        Ok(answer)
    }
}
