//! Text in and text out: tokenizers, streaming decode, stop strings and chat templates.
//!
//! Nothing here knows a model or a device. [`Tokenizer`] turns text into ids and back,
//! [`Detokenizer`] does the way back one id at a time, [`StopMatcher`] finds stop strings in what
//! comes out, and [`ChatTemplate`] turns a conversation into the text that a model was trained on.

mod bounds;
pub mod chat;
mod control;
mod declared;
mod decoder;
mod expression;
mod expression_tokens;
mod jinja;
mod pythonic;
pub(crate) mod split;
mod stop;
pub mod tokenizer;
pub(crate) mod vocabulary;

pub use crate::caught::catching_panics;
pub use chat::{ChatOptions, ChatTemplate, Message};
pub use decoder::Detokenizer;
pub use stop::{StopMatcher, StopStep};
pub use tokenizer::{Special, Tokenizer, TokenizerOptions};
