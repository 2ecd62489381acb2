//! Chat templates: a conversation into the text that a checkpoint was trained on.
//!
//! A template is a Jinja program in the checkpoint, written for `apply_chat_template` of
//! transformers, whose rendering is the reference here (`tests/text/chat_golden.json`). It is
//! also somebody else's program, so it runs in bounds: see [`ChatTemplate::render`].

use std::path::Path;
use std::sync::Arc;

use chrono::NaiveDateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Serde, ValueKind};
use minijinja::{AutoEscape, Environment, Error, UndefinedBehavior, Value};
use serde::{Deserialize, Serialize};
use serde_json::Map;

use super::bounds::{self, MAX_BYTES, fail};
use super::expression::Refused;
use super::{jinja, pythonic};
use crate::caught::caught;
use crate::error::{LoadError, SubmitError};

/// Instructions that one rendering may execute: a few hundred per message are usual, and templates
/// that look at all messages for each message need their square. Ten million take about a second.
const FUEL: u64 = 10_000_000;
/// Depth of macros (each counts about ten) and blocks. minijinja's own limit of 500 assumes
/// the stack of a main thread.
const MAX_RECURSION: usize = 200;
/// The longest template in use known to us has 30 kB.
const MAX_SOURCE: usize = 1 << 20;

/// One message: an object with at least `role` and, usually, `content`. Other keys (`tool_calls`,
/// `name`) are passed to the template as they are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Message(pub Map<String, serde_json::Value>);

impl Message {
    /// A message with a text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let mut map = Map::new();
        map.insert("role".to_owned(), role.into().into());
        map.insert("content".to_owned(), content.into().into());
        Self(map)
    }

    /// Who speaks, if that is a string.
    pub fn role(&self) -> Option<&str> {
        self.0.get("role")?.as_str()
    }

    /// The text, if it is a plain string.
    pub fn content(&self) -> Option<&str> {
        self.0.get("content")?.as_str()
    }
}

/// What is rendered beside the messages.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ChatOptions {
    /// End the text where the assistant begins to speak.
    pub add_generation_prompt: bool,
    /// Tools as JSON schemas; `None` for none.
    pub tools: Option<serde_json::Value>,
    /// Documents to answer from; `None` for none.
    pub documents: Option<serde_json::Value>,
    /// Any other variables that the template knows.
    pub extra: Map<String, serde_json::Value>,
}

impl ChatOptions {
    /// For an answer to be generated.
    pub fn generate() -> Self {
        Self { add_generation_prompt: true, ..Self::default() }
    }
}

type Clock = Arc<dyn Fn() -> NaiveDateTime + Send + Sync>;

/// A compiled chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

impl ChatTemplate {
    /// Compiles a template. `file` is only for messages; the tokens are their texts.
    ///
    /// # Errors
    ///
    /// A [`LoadError`] with the line and what is wrong there.
    pub fn new(
        file: &Path,
        source: &str,
        bos_token: Option<&str>,
        eos_token: Option<&str>,
    ) -> Result<Self, LoadError> {
        Self::with_clock(file, source, bos_token, eos_token, || chrono::Local::now().naive_local())
    }

    /// [`ChatTemplate::new`] with another clock behind `strftime_now`.
    ///
    /// # Errors
    ///
    /// Those of [`ChatTemplate::new`].
    pub fn with_clock(
        file: &Path,
        source: &str,
        bos_token: Option<&str>,
        eos_token: Option<&str>,
        clock: impl Fn() -> NaiveDateTime + Send + Sync + 'static,
    ) -> Result<Self, LoadError> {
        let bad = |found: String| {
            LoadError::invalid(
                file,
                "chat_template",
                "a template in the Jinja of transformers",
                found,
            )
        };
        if source.len() > MAX_SOURCE {
            return Err(bad(format!("{} bytes, more than {MAX_SOURCE}", source.len())));
        }
        let rewritten = caught(|| jinja::rewrite(source));
        let Ok(jinja::Rewritten { source, refused }) = rewritten else {
            return Err(bad("a template that makes the compiler fail".to_owned()));
        };
        if let Some((line, Refused::TooLarge)) = refused {
            return Err(bad(format!("line {line}: an expression that is too long or too deep")));
        }
        let compiled = caught(|| {
            let mut environment = environment(Arc::new(clock));
            environment.add_template_owned("chat_template", source).map(|()| environment)
        });
        if let (Ok(Ok(_)), Some((line, _))) = (&compiled, refused) {
            return Err(bad(format!("line {line}: an expression that cannot be checked")));
        }
        match compiled {
            Ok(Ok(environment)) => Ok(Self {
                environment: Arc::new(environment),
                bos_token: bos_token.map(str::to_owned),
                eos_token: eos_token.map(str::to_owned),
            }),
            Ok(Err(error)) => Err(bad(explain(&error))),
            Err(_) => Err(bad("a template that makes the compiler fail".to_owned())),
        }
    }

    /// The error for a conversation with a checkpoint that has no chat template.
    pub fn missing() -> SubmitError {
        SubmitError::invalid(
            "messages",
            "a checkpoint with a chat template (use a plain prompt, or give a template)",
            "a checkpoint that has none",
        )
    }

    /// Renders a conversation.
    ///
    /// The template runs within limits, so that a broken one ends in an error: 10 million
    /// instructions and 10 seconds; 8 MiB for the text and for each value that an expression builds;
    /// 32 MiB built, printed or captured in all; a recursion limit.
    ///
    /// # Errors
    ///
    /// What the template raises (`raise_exception`), in its words; a limit; or anything that fails
    /// in it, with the line.
    pub fn render(
        &self,
        messages: &[Message],
        options: &ChatOptions,
    ) -> Result<String, SubmitError> {
        let mut context = options.extra.clone();
        for (name, token) in [("bos_token", &self.bos_token), ("eos_token", &self.eos_token)] {
            if let Some(token) = token {
                context.insert(name.to_owned(), token.as_str().into());
            }
        }
        // Without tools the variables are there and none, as transformers passes them.
        let absent = serde_json::Value::Null;
        context.insert("tools".to_owned(), options.tools.clone().unwrap_or(absent.clone()));
        context.insert("documents".to_owned(), options.documents.clone().unwrap_or(absent));
        context.insert("add_generation_prompt".to_owned(), options.add_generation_prompt.into());
        let messages = messages.iter().map(|message| message.0.clone().into()).collect();
        context.insert("messages".to_owned(), serde_json::Value::Array(messages));

        let mut out = bounds::Limited::start();
        let rendered = caught(|| {
            let template = self.environment.get_template("chat_template")?;
            template.render_captured_to(Value::from(Serde(&context)), &mut out).map(|_| ())
        });
        let failed = |found: String| {
            let expected = "a conversation that the checkpoint's chat template can render";
            SubmitError::invalid("messages", expected, found)
        };
        match rendered {
            Ok(Ok(())) => {
                String::from_utf8(out.into_bytes()).map_err(|_| failed("invalid UTF-8".to_owned()))
            }
            Ok(Err(error)) => Err(match raised(&error) {
                Some(message) => failed(format!("one that it refuses: {message}")),
                None => failed(format!("an error of the template: {}", explain(&error))),
            }),
            Err(_) => Err(failed("a failure of the template engine".to_owned())),
        }
    }
}

fn environment(clock: Clock) -> Environment<'static> {
    let mut environment = Environment::new();
    // The settings of `_compile_jinja_template` in transformers. These builders fail only for
    // delimiters, which stay as they are.
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        environment.set_syntax(syntax);
    }
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(MAX_RECURSION);
    bounds::install(&mut environment);
    environment.add_filter(
        "tojson",
        |value: Value, ascii: Rest<Value>, kwargs: Kwargs| match ascii.is_empty() {
            true => pythonic::to_json(&value, &kwargs, MAX_BYTES),
            false => Err(fail("tojson: options are given by name")),
        },
    );
    // In Python strings and mappings have a length and can be indexed, and so can what is undefined.
    environment.add_test("sequence", |value: &Value| match value.kind() {
        ValueKind::Iterable => value.len().is_some(),
        ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Undefined => true,
        _ => false,
    });
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(fail("the template raised an exception").with_source(Raised(message)))
    });
    environment
        .add_function("strftime_now", move |format: &str| pythonic::strftime(clock(), format));
    environment
}

/// Carries what `raise_exception` said through the engine.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raised(error: &Error) -> Option<String> {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if let Some(raised) = error.downcast_ref::<Raised>() {
            return Some(raised.0.clone());
        }
        source = error.source();
    }
    None
}

fn explain(error: &Error) -> String {
    let line = error.line().map(|line| format!("line {line}: ")).unwrap_or_default();
    match error.detail() {
        Some(detail) => format!("{line}{}: {detail}", error.kind()),
        None => format!("{line}{}", error.kind()),
    }
}
