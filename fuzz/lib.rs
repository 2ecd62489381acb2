//! What the fuzz targets share.
//!
//! The property that every target checks: no input makes the reader panic, run for more than the
//! seconds that libFuzzer is given (`-timeout`) or take more memory than it is given
//! (`-rss_limit_mb`), and every refusal is a message that is fit for a terminal.

use std::fmt::Display;

/// Panics of libraries that the crate catches and turns into errors are no findings. The hook
/// of libFuzzer's wrapper, which is in place when a target begins, ends the process at any panic.
pub fn let_caught_panics_pass() {
    let abort = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !trine::text::catching_panics() {
            abort(info);
        }
    }));
}

/// A message must not be as long as the file that it is about, nor steer a terminal.
pub fn check_message(error: &impl Display) {
    let message = error.to_string();
    assert!(message.len() < 8000, "a message of {} bytes", message.len());
    assert!(!message.contains(|c: char| c.is_control()), "control characters: {message:?}");
}

/// The two parts of an input: up to the first byte 0xFF, which is in no UTF-8 text, and after it.
pub fn halves(data: &[u8]) -> (&[u8], &[u8]) {
    let at = data.iter().position(|&byte| byte == 0xFF);
    at.map_or((data, &[]), |at| (&data[..at], &data[at + 1..]))
}
