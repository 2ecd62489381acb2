//! Tokenizers in GGUF files, against the Hugging Face tokenizers that the files were made from
//! (`tools/make_gguf_tokenizer_fixtures.py`): over ten thousand lines for each kind.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use trine::checkpoint::{TokenizerFiles, open_tokenizer};
use trine::text::{ChatOptions, ChatTemplate, Message, Special, Tokenizer};

use super::{PARSED, json};

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gguf_tokenizer").join(name)
}

fn files(name: &str) -> TokenizerFiles {
    open_tokenizer(&path(&format!("{name}.gguf"))).unwrap()
}

fn tokenizer(name: &str) -> Tokenizer {
    files(name).tokenizer().unwrap().unwrap()
}

#[derive(Deserialize)]
struct Expected {
    lines: ExpectedLines,
    /// In the order of `ids.bin`.
    order: Vec<String>,
    tokenizers: BTreeMap<String, ExpectedIds>,
}

#[derive(Deserialize)]
struct ExpectedLines {
    count: usize,
    hash: String,
}

#[derive(Deserialize)]
struct ExpectedIds {
    hash: String,
    /// Of the texts that the library makes of the ids.
    decoded: String,
    with_special: Vec<u32>,
    lines: BTreeMap<String, Vec<u32>>,
}

fn expected() -> Expected {
    serde_json::from_slice(&std::fs::read(path("expected.json")).unwrap()).unwrap()
}

// ------------------------------------------------------------------------------ the recipe of lines

const COUNT: usize = 10240;
const JOINERS: [&str; 12] = ["", "", " ", " ", " ", "  ", "\n", "\t", "\r\n", ", ", "'", "-"];
const RUNS: [&str; 24] = [
    " ", "\n", "\t", "\r", "=", "-", "*", "a", "0", "9", ".", "'", "\u{a0}", "\u{3000}", "▁", "Ġ",
    "😀", "é", "的", "\u{301}", "#", "ab", "\r\n", "  \n",
];
const MARKS: [&str; 20] = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<s>",
    "</s>",
    "<unk>",
    "<bos>",
    "<eos>",
    "<pad>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<0x0A>",
    "<0xE5>",
    "<table>",
    "[PAD7]",
    "<|tool|>",
    "[INST]",
];
const RANGES: [(u32, u32); 10] = [
    (0, 0x7F),
    (0x80, 0x24F),
    (0x250, 0x6FF),
    (0x700, 0x1FFF),
    (0x2000, 0x2BFF),
    (0x3000, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0xE000, 0xFFFF),
    (0x10000, 0x1F9FF),
    (0xE0000, 0xE01FF),
];

/// The twin of `Lines` in the tool.
struct Lines {
    state: u64,
    seeds: Vec<Vec<char>>,
}

impl Lines {
    fn next(&mut self, below: usize) -> usize {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = self.state;
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 32) as usize % below
    }

    fn piece(&mut self) -> String {
        let kind = self.next(16);
        match kind {
            0..9 => {
                let seed = self.next(self.seeds.len());
                let start = self.next(self.seeds[seed].len() + 1);
                let length = 1 + self.next(24);
                self.seeds[seed][start..].iter().take(length).collect()
            }
            9..11 => {
                let (low, high) = RANGES[self.next(RANGES.len())];
                let count = 1 + self.next(6);
                let points = (0..count).map(|_| low + self.next((high - low + 1) as usize) as u32);
                points.filter_map(char::from_u32).collect()
            }
            11..13 => {
                let run = RUNS[self.next(RUNS.len())];
                run.repeat(1 + self.next(40))
            }
            13..15 => (0..1 + self.next(4)).map(|_| self.next(1000).to_string()).collect(),
            _ => MARKS[self.next(MARKS.len())].to_owned(),
        }
    }

    fn line(&mut self) -> String {
        let mut text = String::new();
        for _ in 0..1 + self.next(6) {
            text += &self.piece();
            text += JOINERS[self.next(JOINERS.len())];
        }
        if self.next(8) != 0 {
            return text;
        }
        let mut data = text.into_bytes();
        for _ in 0..1 + self.next(3) {
            if !data.is_empty() {
                let at = self.next(data.len());
                if self.next(2) == 1 {
                    data[at] = self.next(256) as u8;
                } else {
                    data.remove(at);
                }
            }
        }
        String::from_utf8_lossy(&data).into_owned()
    }
}

fn all_lines() -> Vec<String> {
    let golden = json("tokenizer_golden.json");
    let seeds = golden["lines"].as_array().unwrap().iter().map(|line| line.as_str().unwrap());
    let mut lines: Vec<String> = seeds.map(str::to_owned).collect();
    let seeds = lines.iter().map(|line| line.chars().collect()).collect();
    let mut recipe = Lines { state: 0x7E1E, seeds };
    lines.extend((0..COUNT).map(|_| recipe.line()));
    lines
}

fn fold(values: impl IntoIterator<Item = u64>, start: u64) -> u64 {
    values.into_iter().fold(start, |hash, value| (hash ^ value).wrapping_mul(0x100_0000_01B3))
}

const START: u64 = 0xCBF2_9CE4_8422_2325;

// ------------------------------------------------------------------------------------------- tests

/// Runs a check of each tokenizer, on as many threads.
fn for_each(check: impl Fn(&str, &Tokenizer, usize) + Sync) {
    std::thread::scope(|scope| {
        for (place, name) in expected().order.into_iter().enumerate() {
            let check = &check;
            scope.spawn(move || check(&name, &tokenizer(&name), place));
        }
    });
}

#[test]
fn ids_and_texts_are_those_of_the_hugging_face_tokenizer() {
    let expected = expected();
    let lines = all_lines();
    assert!(lines.len() >= 10_000 && expected.order.len() >= 10);
    assert_eq!(lines.len(), expected.lines.count);
    let bytes = lines.iter().flat_map(|line| line.bytes().chain([b'\n'])).map(u64::from);
    assert_eq!(format!("{:016x}", fold(bytes, START)), expected.lines.hash, "the lines differ");
    let hashes = std::fs::read(path("ids.bin")).unwrap();
    assert_eq!(hashes.len(), 2 * lines.len() * expected.order.len());
    for_each(|name, tokenizer, place| {
        let expected = &expected.tokenizers[name];
        for (line, ids) in &expected.lines {
            assert_eq!(&tokenizer.encode(line, PARSED).unwrap(), ids, "{name}: {line:?}");
        }
        assert_eq!(tokenizer.encode("a b", Special::PROMPT).unwrap(), expected.with_special);
        let hashes = &hashes[2 * lines.len() * place..][..2 * lines.len()];
        let (mut total, mut decoded) = (START, START);
        let mut wrong = Vec::new();
        for (line, hash) in lines.iter().zip(hashes.chunks_exact(2)) {
            let ids = tokenizer.encode(line, PARSED).unwrap();
            let words = || ids.iter().map(|&id| u64::from(id));
            if (fold(words(), START) >> 48) as u16 != u16::from_le_bytes([hash[0], hash[1]]) {
                wrong.push((line, ids.clone()));
            }
            total = fold(words().chain([u64::from(u32::MAX)]), total);
            let text = tokenizer.decode(&ids, false);
            decoded = fold(text.bytes().chain([b'\n']).map(u64::from), decoded);
        }
        let first = wrong.first();
        assert!(wrong.is_empty(), "{name}: {} of {} lines, {first:?}", wrong.len(), lines.len());
        assert_eq!(format!("{total:016x}"), expected.hash, "{name}");
        assert_eq!(format!("{decoded:016x}"), expected.decoded, "{name}");
    });
}

#[test]
fn decoding_gives_the_text_back() {
    let lines = all_lines();
    for_each(|name, tokenizer, _| {
        let sentencepiece =
            name.starts_with("llama") && name != "llama_bpe" || name.starts_with("gemma");
        for line in lines.iter().step_by(5) {
            // What SentencePiece cannot tell apart, and characters without a token.
            if sentencepiece && line.contains('▁') || name == "llama_no_bytes" {
                continue;
            }
            let ids = tokenizer.encode(line, Special::NONE).unwrap();
            let mut expected = tokenizers::NormalizedString::from(line.as_str());
            if name == "qwen2" {
                expected.nfc();
            }
            assert_eq!(tokenizer.decode(&ids, false), expected.get(), "{name}: {line:?} {ids:?}");
        }
    });
}

#[test]
fn control_tokens_stay_text_where_they_are_not_parsed() {
    for_each(|name, tokenizer, _| {
        for &id in tokenizer.special_ids() {
            let text = tokenizer.token_text(id).unwrap();
            let line = format!("a{text}b {text}");
            let parsed = tokenizer.encode(&line, PARSED).unwrap();
            assert_eq!(parsed.iter().filter(|&&other| other == id).count(), 2, "{name}: {text}");
            let plain = tokenizer.encode(&line, Special::NONE).unwrap();
            assert!(name == "llama_no_bytes" || !plain.contains(&id), "{name}: {text}");
        }
    });
}

#[test]
fn special_tokens_come_from_their_keys() {
    let bitnet = files("bitnet_2b4t");
    assert_eq!(bitnet.bos_token.as_deref(), Some("<|begin_of_text|>"));
    assert_eq!(bitnet.eos_token.as_deref(), Some("<|end_of_text|>"));
    assert_eq!(bitnet.add_bos_token, Some(true));
    let qwen = files("qwen2");
    assert_eq!((qwen.add_bos_token, qwen.add_eos_token), (Some(false), Some(true)));
    assert_eq!(qwen.eos_token.as_deref(), Some("<|endoftext|>"));
    // Neither file says so; SentencePiece models have a beginning, GPT-2's do not.
    assert_eq!(files("llama_no_bytes").add_bos_token, Some(true));
    assert_eq!(files("gpt2").add_bos_token, Some(false));
    // Fillers are no tokens.
    let llama = tokenizer("llama_bpe");
    assert_eq!(llama.token_id("[PAD905]"), None);
    assert_eq!(llama.vocabulary_size(), llama.token_id("  \n").unwrap() as usize + 1);
}

#[test]
fn mistakes_of_converters_are_put_right_and_said() {
    let files = files("bitnet_2b4t");
    assert_eq!(files.notes.len(), 2, "{:?}", files.notes);
    assert!(
        files.notes[0].starts_with("tokenizer.ggml.pre is missing: text is split as for llama-bpe")
    );
    assert!(files.notes[1].contains("made up by its converter"), "{:?}", files.notes);
    let template = files.chat_template.as_deref().unwrap();
    let template = ChatTemplate::new(Path::new("f"), template, files.bos_token.as_deref(), None);
    let messages =
        [Message::new("user", " hi "), Message::new("assistant", "ho"), Message::new("user", "x")];
    let text = template.unwrap().render(&messages, &ChatOptions::generate()).unwrap();
    assert_eq!(text, "User: hi<|eot_id|>Assistant: ho<|eot_id|>User: x<|eot_id|>Assistant: ");
    // The chat template of the reference is the one that the tests of templates call by this name.
    let golden = json("chat_golden.json");
    let source = golden["templates"]["bitnet-2b4t"]["source"].as_str().unwrap();
    assert_eq!(files.chat_template.as_deref(), Some(source));

    let gemma = self::files("gemma_as_gpt2");
    assert_eq!(gemma.notes.len(), 1);
    assert!(gemma.notes[0].contains("SentencePiece"), "{:?}", gemma.notes);
    for name in ["llama_bpe", "gpt2", "smollm", "qwen2", "llama", "gemma"] {
        assert_eq!(self::files(name).notes, [""; 0], "{name}");
    }
    assert!(self::files("llama_bpe").chat_template.is_some());
}
