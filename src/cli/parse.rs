//! Values of flags. An error is the rest of the sentence "--flag: …, found …".

use std::ffi::OsStr;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use trine::backend::select::DeviceName;

use super::failure::bad_input;

pub(crate) fn number(text: &str) -> Result<f32, String> {
    let number = text.trim().parse().ok().filter(|number: &f32| number.is_finite());
    number.ok_or_else(|| "expected a number such as 0.7".into())
}

/// A whole number of at least 1.
pub(crate) fn positive(text: &str) -> Result<usize, String> {
    let number = text.trim().parse().ok().filter(|&number| number > 0);
    number.ok_or_else(|| "expected a whole number of at least 1".into())
}

/// A number of threads. Far more than any machine has would only fail to start.
pub(crate) fn threads(text: &str) -> Result<usize, String> {
    let number = text.trim().parse().ok().filter(|number| (1..=1024).contains(number));
    number.ok_or_else(|| "expected a whole number of 1 to 1024".into())
}

pub(crate) fn whole<T: FromStr>(text: &str) -> Result<T, String> {
    text.trim().parse().map_err(|_| "expected a whole number of at least 0".into())
}

/// A limit: a whole number of at least 1, or -1 for none.
pub(crate) fn limit(text: &str) -> Result<Limit, String> {
    match text.trim().parse() {
        Ok(-1) => Ok(Limit(None)),
        Ok(number @ 1..) => Ok(Limit(Some(number as usize))),
        _ => Err("expected a whole number of at least 1, or -1 for no limit".into()),
    }
}

/// What [`limit`] read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limit(pub(crate) Option<usize>);

pub(crate) fn device(text: &str) -> Result<DeviceName, String> {
    let expected = "expected auto, cpu, cuda, cuda:N, wgpu, wgpu:N or wgpu:NAME";
    text.parse().map_err(|_| expected.to_owned())
}

/// A seed; -1, as in llama.cpp, is a random one.
pub(crate) fn seed(text: &str) -> Result<Seed, String> {
    match text.trim() {
        "-1" => Ok(Seed(None)),
        text => match text.parse() {
            Ok(seed) => Ok(Seed(Some(seed))),
            Err(_) => Err(format!("expected a whole number of 0 to {}", u64::MAX)),
        },
    }
}

/// What [`seed`] read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seed(pub(crate) Option<u64>);

/// `TOKEN=BIAS`, or llama.cpp's `TOKEN+BIAS` and `TOKEN-BIAS`.
pub(crate) fn bias(text: &str) -> Result<(u32, f32), String> {
    let expected = "expected TOKEN=BIAS such as 15=-2.5";
    let read = || {
        let (token, bias) = text.split_at(text.find(['=', '+', '-'])?);
        let bias = number(bias.strip_prefix('=').unwrap_or(bias)).ok()?;
        Some((token.trim().parse().ok()?, bias))
    };
    read().ok_or_else(|| expected.into())
}

/// An adapter and how much of it is applied.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct AdapterArg {
    pub(crate) path: PathBuf,
    pub(crate) scale: f32,
}

/// `PATH`, or `PATH:SCALE` where what follows the last colon is a number.
pub(crate) fn adapter(text: &str) -> Result<AdapterArg, String> {
    let scaled = text.rsplit_once(':').and_then(|(path, scale)| Some((path, number(scale).ok()?)));
    // A path of that name is meant as it stands.
    let (path, scale) = scaled.filter(|_| !Path::new(text).exists()).unwrap_or((text, 1.0));
    if path.is_empty() {
        return Err("expected the folder of an adapter, or FOLDER:SCALE".into());
    }
    Ok(AdapterArg { path: path.into(), scale })
}

/// Token ids with commas or spaces between them.
#[derive(Debug, Clone)]
pub(crate) struct Ids(pub(crate) Vec<u32>);

pub(crate) fn ids(text: &str) -> Result<Ids, String> {
    let parts = text.split(|c: char| c == ',' || c.is_whitespace()).filter(|part| !part.is_empty());
    let ids: Result<Vec<u32>, _> = parts.map(str::parse).collect();
    ids.map(Ids).map_err(|_| "expected token ids such as 1,2,3".into())
}

/// The whole of a file, or of stdin for `-`, as text.
pub(crate) fn read_text(path: &Path) -> anyhow::Result<String> {
    let (name, bytes) = if path.as_os_str() == OsStr::new("-") {
        let mut bytes = Vec::new();
        let read = std::io::stdin().lock().read_to_end(&mut bytes).map(|_| bytes);
        ("standard input".to_owned(), read)
    } else {
        (path.display().to_string(), std::fs::read(path))
    };
    let bytes = bytes.map_err(|error| bad_input(format!("{name}: cannot be read: {error}")))?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        bad_input(format!("{name}: expected UTF-8 text, found another byte at offset {at}"))
    })
}

/// A text without the line break that an editor or `echo` put at its end.
pub(crate) fn without_line_break(mut text: String) -> String {
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn biases() {
        assert_eq!(bias("15=-2.5"), Ok((15, -2.5)));
        assert_eq!(bias("15+1"), Ok((15, 1.0)));
        assert_eq!(bias("15-1"), Ok((15, -1.0)));
        for bad in ["15", "=1", "15=", "x=1", "15=nan", ""] {
            assert!(bias(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn adapters() {
        let of = |path: &str, scale| Ok(AdapterArg { path: path.into(), scale });
        assert_eq!(adapter("a/b"), of("a/b", 1.0));
        assert_eq!(adapter("a/b:0.5"), of("a/b", 0.5));
        assert_eq!(adapter("a:-1"), of("a", -1.0));
        assert_eq!(adapter("C:a"), of("C:a", 1.0));
        assert!(adapter(":1").is_err() && adapter("").is_err());
    }

    #[test]
    fn only_the_last_line_break_goes() {
        for (text, expected) in [("a\n", "a"), ("a\r\n", "a"), ("a\n\n", "a\n"), ("a", "a")] {
            assert_eq!(without_line_break(text.into()), expected);
        }
    }
}
