//! Stop strings, found in text that arrives in pieces.

/// What [`StopMatcher::push`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub struct StopStep {
    /// Text that no stop string can claim any more: it is safe to show.
    pub text: String,
    /// Which stop string ended the text, by its place in the list given to [`StopMatcher::new`].
    pub stopped: Option<usize>,
}

/// Finds stop strings in streamed text and holds back whatever may turn out to be one.
///
/// The stop string that is *complete* first wins, as it does when text is generated one token at a
/// time; among several that end at the same character, the longest. The result does not depend on
/// how the text was cut into pieces. Neither the stop string nor anything after it is emitted.
///
/// Each stop string is followed by a Knuth-Morris-Pratt automaton, so a character costs the same
/// however much text is held back.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<Stop>,
    held: String,
    stopped: Option<usize>,
}

#[derive(Debug, Clone)]
struct Stop {
    index: usize,
    bytes: Vec<u8>,
    /// For each length of matched prefix, the longest shorter prefix that is also its suffix.
    failure: Vec<usize>,
    matched: usize,
}

impl StopMatcher {
    /// A matcher for these strings. Empty strings are ignored: they would stop before any text.
    pub fn new(stops: Vec<String>) -> Self {
        let stops = stops
            .into_iter()
            .enumerate()
            .filter(|(_, stop)| !stop.is_empty())
            .map(|(index, stop)| Stop::new(index, stop.into_bytes()))
            .collect();
        Self { stops, held: String::new(), stopped: None }
    }

    /// Takes the next piece of text. After a stop string has matched, every piece is swallowed.
    pub fn push(&mut self, piece: &str) -> StopStep {
        if self.stopped.is_some() {
            return StopStep { text: String::new(), stopped: self.stopped };
        }
        let before = self.held.len();
        self.held.push_str(piece);
        for (at, &byte) in piece.as_bytes().iter().enumerate() {
            let mut longest: Option<(usize, usize)> = None;
            for stop in &mut self.stops {
                if stop.advance(byte) && longest.is_none_or(|(len, _)| stop.bytes.len() > len) {
                    longest = Some((stop.bytes.len(), stop.index));
                }
            }
            if let Some((len, index)) = longest {
                // Both the text and the stop string are UTF-8, so the match starts and ends
                // between characters.
                self.held.truncate(before + at + 1 - len);
                self.stopped = Some(index);
                return StopStep { text: std::mem::take(&mut self.held), stopped: self.stopped };
            }
        }
        // The longest prefix of any stop string that the text ends in, again whole characters.
        let keep = self.stops.iter().map(|stop| stop.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        StopStep { text: std::mem::replace(&mut self.held, rest), stopped: None }
    }

    /// The text ended without a stop string: returns what was held back.
    pub fn finish(&mut self) -> String {
        for stop in &mut self.stops {
            stop.matched = 0;
        }
        std::mem::take(&mut self.held)
    }

    /// Which stop string has matched, if one has.
    pub fn stopped(&self) -> Option<usize> {
        self.stopped
    }
}

impl Stop {
    fn new(index: usize, bytes: Vec<u8>) -> Self {
        let mut failure = vec![0; bytes.len() + 1];
        let mut length = 0;
        for at in 1..bytes.len() {
            while length > 0 && bytes[at] != bytes[length] {
                length = failure[length];
            }
            if bytes[at] == bytes[length] {
                length += 1;
            }
            failure[at + 1] = length;
        }
        Self { index, bytes, failure, matched: 0 }
    }

    /// Whether this byte completes the stop string.
    fn advance(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.failure[self.matched];
        }
        if self.bytes[self.matched] == byte {
            self.matched += 1;
        }
        self.matched == self.bytes.len()
    }
}
