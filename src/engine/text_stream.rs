//! Tokens to text as they come: partial UTF-8 and possible stop strings are held back.

use super::session::{Event, FinishReason, Generation, Token, Usage};
use crate::error::RunError;
use crate::text::{Detokenizer, StopMatcher, Tokenizer};

/// An answer as text: a blocking iterator of [`TextEvent`]s that ends after [`TextEvent::Done`] or
/// the first error. Dropping it ends the work.
///
/// Text is passed on as soon as it is certain: bytes of an unfinished character wait for the rest
/// of it, and text that may be the beginning of a stop string waits until it is not. The texts of
/// all events together are the answer; special tokens have no text.
pub struct TextStream<'s> {
    generation: Generation<'s>,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    stop: Vec<String>,
    state: State,
}

enum State {
    Running,
    /// A stop string is complete; the end is not reported yet.
    Stopped,
    /// The text that was held back is out; this is left.
    Ending(TextEvent),
    Ended,
}

/// One item of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum TextEvent {
    /// The answer goes on.
    Text {
        /// The text that is certain now and was not before; often empty.
        text: String,
        /// The token that was sampled; `None` while a long prompt runs, part by part, and for text
        /// that was held back until the end.
        token: Option<Token>,
    },
    /// The end, exactly once and last.
    Done {
        /// Why.
        reason: FinishReason,
        /// The stop string, if the reason is [`FinishReason::StopText`].
        stop: Option<String>,
        /// At what cost.
        usage: Usage,
    },
}

impl TextEvent {
    /// The text that this event adds to the answer.
    pub fn text(&self) -> &str {
        match self {
            Self::Text { text, .. } => text,
            Self::Done { .. } => "",
        }
    }
}

impl<'s> TextStream<'s> {
    /// Turns the tokens of `generation` into text that ends before the first string of `stop`.
    pub fn new(generation: Generation<'s>, tokenizer: &Tokenizer, stop: &[String]) -> Self {
        Self {
            generation,
            detokenizer: tokenizer.detokenizer(true),
            stops: StopMatcher::new(stop.to_vec()),
            stop: stop.to_vec(),
            state: State::Running,
        }
    }

    /// The cost so far.
    pub fn usage(&self) -> Usage {
        self.generation.usage()
    }

    fn token(&mut self, token: Token) -> TextEvent {
        let piece = self.detokenizer.push(token.id).unwrap_or_default();
        let step = self.stops.push(&piece);
        if step.stopped.is_some() {
            self.state = State::Stopped;
        }
        TextEvent::Text { text: step.text, token: Some(token) }
    }

    /// The end: what was held back is certain now, unless it completes a stop string.
    fn done(&mut self, reason: FinishReason, usage: Usage) -> TextEvent {
        let rest = self.detokenizer.finish().unwrap_or_default();
        let mut text = self.stops.push(&rest).text;
        text += &self.stops.finish();
        let stop = self.stops.stopped().and_then(|index| self.stop.get(index)).cloned();
        let reason = if stop.is_some() { FinishReason::StopText } else { reason };
        let done = TextEvent::Done { reason, stop, usage };
        if text.is_empty() {
            return done;
        }
        self.state = State::Ending(done);
        TextEvent::Text { text, token: None }
    }
}

impl Iterator for TextStream<'_> {
    type Item = Result<TextEvent, RunError>;

    fn next(&mut self) -> Option<Self::Item> {
        // Ended, unless something below finds otherwise.
        let event = match std::mem::replace(&mut self.state, State::Ended) {
            State::Running => self.generation.next()?,
            State::Stopped => Ok(self.generation.finish(FinishReason::StopText)),
            State::Ending(done) => return Some(Ok(done)),
            State::Ended => return None,
        };
        Some(event.map(|event| match event {
            Event::Prompt { .. } => {
                self.state = State::Running;
                TextEvent::Text { text: String::new(), token: None }
            }
            Event::Token(token) => {
                self.state = State::Running;
                self.token(token)
            }
            Event::Done { reason, usage } => self.done(reason, usage),
        }))
    }
}
