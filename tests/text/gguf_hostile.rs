//! Tokenizers in GGUF files that contradict themselves or ask for too much: each is refused in one
//! sentence, and none makes anything panic.

use std::path::Path;

use trine::checkpoint::open_tokenizer;
use trine::text::{Special, Tokenizer};

/// The metadata of a file: keys with the type and the bytes of their values.
#[derive(Clone, Default)]
struct Metadata(Vec<(&'static str, Vec<u8>)>);

impl Metadata {
    fn set(mut self, key: &'static str, value: Vec<u8>) -> Self {
        self.0.retain(|(other, _)| *other != key);
        self.0.push((key, value));
        self
    }

    fn without(mut self, key: &str) -> Self {
        self.0.retain(|(other, _)| *other != key);
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend(0u64.to_le_bytes());
        out.extend((self.0.len() as u64).to_le_bytes());
        for (key, value) in &self.0 {
            out.extend(text(key.as_bytes()));
            out.extend(value);
        }
        out
    }

    fn open(&self) -> Result<Option<Tokenizer>, String> {
        let folder = tempfile::tempdir().unwrap();
        open(folder.path(), &self.bytes())
    }
}

fn open(folder: &Path, bytes: &[u8]) -> Result<Option<Tokenizer>, String> {
    let file = folder.join("t.gguf");
    std::fs::write(&file, bytes).unwrap();
    let files = open_tokenizer(&file).map_err(|error| error.to_string())?;
    files.tokenizer().map_err(|error| error.to_string())
}

fn text(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u64).to_le_bytes()[..], bytes].concat()
}

fn array<T>(kind: u32, items: &[T], bytes: impl Fn(&T) -> Vec<u8>) -> Vec<u8> {
    let mut out = [9u32.to_le_bytes(), kind.to_le_bytes()].concat();
    out.extend((items.len() as u64).to_le_bytes());
    items.iter().for_each(|item| out.extend(bytes(item)));
    out
}

fn string(value: impl AsRef<[u8]>) -> Vec<u8> {
    [&8u32.to_le_bytes()[..], &text(value.as_ref())].concat()
}

fn strings<S: AsRef<[u8]>>(values: &[S]) -> Vec<u8> {
    array(8, values, |value| text(value.as_ref()))
}

fn ints(values: &[i32]) -> Vec<u8> {
    array(5, values, |value| value.to_le_bytes().to_vec())
}

fn floats(values: &[f32]) -> Vec<u8> {
    array(6, values, |value| value.to_le_bytes().to_vec())
}

fn id(value: u32) -> Vec<u8> {
    [4u32.to_le_bytes(), value.to_le_bytes()].concat()
}

fn boolean(value: bool) -> Vec<u8> {
    [&7u32.to_le_bytes()[..], &[u8::from(value)]].concat()
}

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: &str = "tokenizer.ggml.eos_token_id";
const UNKNOWN: &str = "tokenizer.ggml.unknown_token_id";

fn gpt2() -> Metadata {
    Metadata::default()
        .set(MODEL, string("gpt2"))
        .set(PRE, string("llama-bpe"))
        .set(TOKENS, strings(&["a", "b", "ab", "<e>"]))
        .set(TYPES, ints(&[1, 1, 1, 3]))
        .set(MERGES, strings(&["a b"]))
        .set(EOS, id(3))
}

fn llama() -> Metadata {
    Metadata::default()
        .set(MODEL, string("llama"))
        .set(TOKENS, strings(&["<unk>", "<s>", "</s>", "▁", "a", "▁a"]))
        .set(TYPES, ints(&[2, 3, 3, 1, 1, 1]))
        .set(SCORES, floats(&[0.0, 0.0, 0.0, -2.0, -3.0, -1.0]))
}

#[test]
fn the_files_that_the_cases_change_are_right() {
    let tokenizer = gpt2().open().unwrap().unwrap();
    assert_eq!(tokenizer.encode("abba<e>", Special::MARKUP).unwrap(), [2, 1, 0, 3]);
    let tokenizer = llama().open().unwrap().unwrap();
    assert_eq!(tokenizer.encode("a aax", Special::PROMPT).unwrap(), [1, 5, 5, 4, 0]);
    // No tokenizer is no error until one is asked for.
    assert!(gpt2().without(MODEL).open().unwrap().is_none());
    assert!(gpt2().set(MODEL, string("none")).open().unwrap().is_none());
    // A missing id, as llama.cpp writes it.
    let none = gpt2().set(EOS, id(u32::MAX)).set(BOS, id(u32::MAX));
    assert_eq!(none.open().unwrap().unwrap().eos_id(), None);
    // An id without a token.
    let gap = gpt2().set(TOKENS, strings(&["a", "", "b", "<e>"])).set(MERGES, strings(&[""; 0]));
    let tokenizer = gap.open().unwrap().unwrap();
    assert_eq!(tokenizer.encode("ab<e>", Special::MARKUP).unwrap(), [0, 2, 3]);
    assert_eq!(tokenizer.decode(&[0, 1, 2, 77], false), "ab");
}

#[test]
fn defects_are_sentences() {
    let runs: Vec<String> = (1..=250).map(|n| "a".repeat(n)).collect();
    let (types, scores) = (vec![1; runs.len()], vec![-1.0; runs.len()]);
    let exploding = llama()
        .set(TOKENS, strings(&runs))
        .set(TYPES, ints(&types))
        .set(SCORES, floats(&scores))
        .set(BOS, id(u32::MAX));
    let added: Vec<String> = (0..300).map(|n| format!("<{n:04000}>")).collect();
    let endless = gpt2().set(TOKENS, strings(&added)).set(TYPES, ints(&[4; 300])).without(EOS);
    let long = "x".repeat(300);
    let cases: Vec<(Metadata, &str)> = vec![
        (
            gpt2().set(MODEL, string("t5")),
            r#"tokenizer.ggml.model: "t5" is not supported; supported: gpt2, llama"#,
        ),
        (gpt2().set(MODEL, id(3)), "tokenizer.ggml.model: expected a string, found 3 (u32)"),
        (
            gpt2().set(PRE, string("mystery")),
            "is not supported; supported: llama-bpe, llama3, llama-v3, falcon3, falcon_e, smaug-bpe, dbrx, \
             qwen2",
        ),
        (
            gpt2().without(TOKENS),
            "tokenizer.ggml.tokens: expected an array of strings, found nothing",
        ),
        (
            gpt2().set(TOKENS, ints(&[1, 2, 3, 4])),
            "tokenizer.ggml.tokens: expected an array of strings, found an array of 4 i32",
        ),
        (
            gpt2().set(TOKENS, strings(&[""; 0])).without(EOS),
            "tokenizer.ggml.token_type: expected a type for each of the 0 tokens",
        ),
        (
            gpt2().set(TOKENS, strings(&[&b"a"[..], b"b", b"\xff", b"c"])),
            "tokenizer.ggml.tokens[2]: expected UTF-8 text, found byte 0xff",
        ),
        (
            gpt2().set(TOKENS, strings(&["a", "b", "a", "c"])),
            r#"expected tokens that differ, found "a" as 0 and as 2"#,
        ),
        (
            gpt2().set(TOKENS, strings(&["a", "b", "ab", ""])),
            "tokenizer.ggml.tokens[3]: expected the text of a special token, found none",
        ),
        (
            gpt2().set(TYPES, ints(&[1, 1, 1])),
            "tokenizer.ggml.token_type: expected a type for each of the 4 tokens, found an array of 3 i32",
        ),
        (
            gpt2().set(TYPES, ints(&[1, 1, 9, 3])),
            "tokenizer.ggml.token_type[2]: expected a type of token from 0 to 6, found 9",
        ),
        (
            gpt2().set(TYPES, ints(&[1, 1, -1, 3])),
            "tokenizer.ggml.token_type[2]: expected a type of token from 0 to 6, found -1",
        ),
        (
            gpt2().set(TYPES, floats(&[1.0; 4])),
            "tokenizer.ggml.token_type: expected an array of integers",
        ),
        (
            gpt2().without(MERGES),
            "tokenizer.ggml.merges: expected an array of strings, found nothing",
        ),
        (gpt2().set(MERGES, ints(&[1])), "tokenizer.ggml.merges: expected an array of strings"),
        (
            gpt2().set(MERGES, strings(&["a b", "ab"])),
            r#"tokenizer.ggml.merges[1]: expected two tokens with a space between, found "ab""#,
        ),
        (
            gpt2().set(MERGES, strings(&["a b", ""])),
            "tokenizer.ggml.merges[1]: expected two tokens with a space between",
        ),
        (
            gpt2().set(MERGES, strings(&["a c"])),
            r#"merge 0: expected two tokens whose concatenation is a token, found "c", which the vocabulary lacks"#,
        ),
        (
            gpt2().set(MERGES, strings(&["a b", "ab a"])),
            r#"merge 1: expected two tokens whose concatenation is a token, found "aba""#,
        ),
        (
            gpt2().set(MERGES, strings(&["a <e>"])),
            "merge 0: expected two tokens whose concatenation is a token",
        ),
        (
            gpt2().set(BOS, id(4)),
            "tokenizer.ggml.bos_token_id: expected the id of one of the 4 tokens, found 4 (u32)",
        ),
        (gpt2().set(EOS, string("<e>")), "tokenizer.ggml.eos_token_id: expected an integer"),
        (
            gpt2().set("tokenizer.ggml.eot_token_id", id(99)),
            "tokenizer.ggml.eot_token_id: expected the id of one of the 4 tokens",
        ),
        (
            gpt2().set("tokenizer.ggml.add_bos_token", boolean(true)),
            "bos_token: expected a bos_token, because add_bos_token is true, found none",
        ),
        (
            gpt2().set("tokenizer.ggml.add_bos_token", id(1)),
            "tokenizer.ggml.add_bos_token: expected true or false",
        ),
        (
            gpt2().set("tokenizer.ggml.add_space_prefix", string("no")),
            "tokenizer.ggml.add_space_prefix: expected true or false",
        ),
        (
            gpt2().set("tokenizer.chat_template", id(1)),
            "tokenizer.chat_template: expected a string",
        ),
        (
            gpt2().set("tokenizer.chat_template", string(b"\xff")),
            "tokenizer.chat_template: expected UTF-8 text",
        ),
        (
            gpt2().set("tokenizer.chat_templates", string("x")),
            "tokenizer.chat_templates: expected an array of strings",
        ),
        (
            gpt2().set(TOKENS, strings(&["a", "b", "ab", &"<".repeat(5000)])),
            "vocabulary: expected tokens of at most 4096 bytes, found one of 5000",
        ),
        (endless, "expected control and user-defined tokens of 1048576 bytes, found more"),
        (
            llama().set(SCORES, floats(&[0.0; 5])),
            "tokenizer.ggml.scores: expected a score for each of the 6 tokens",
        ),
        (
            llama().set(SCORES, strings(&["1"; 6])),
            "tokenizer.ggml.scores: expected an array of floats",
        ),
        (
            llama().set(SCORES, floats(&[0.0, 0.0, 0.0, -2.0, f32::NAN, -1.0])),
            "score of token 4: expected a number, found NaN",
        ),
        (
            llama().set(SCORES, floats(&[0.0, 0.0, 0.0, -2.0, -1.0, f32::INFINITY])),
            "score of token 5: expected a number, found inf",
        ),
        (
            llama().set(UNKNOWN, id(6)),
            "tokenizer.ggml.unknown_token_id: expected the id of one of the 6 tokens",
        ),
        (
            llama().set(TOKENS, strings(&["<unk>", "<s>", "</s>", "▁", "a", &long])),
            "token 5: expected pieces of up to 256 bytes, found 300 bytes",
        ),
        (
            llama()
                .set(TYPES, ints(&[1, 3, 3, 1, 1, 1]))
                .set(TOKENS, strings(&["x", "<s>", "</s>", "▁", "a", "▁a"])),
            "expected a token for what no token can express",
        ),
        (
            exploding,
            "expected a vocabulary with few ways to make each piece, found too many up to \"aaaa",
        ),
    ];
    let mut wrong = Vec::new();
    for (metadata, sentence) in cases {
        match metadata.open() {
            Err(error)
                if error.contains("t.gguf: ") && error.contains(sentence) && error.len() < 600 => {}
            Err(error) => wrong.push(format!("expected {sentence:?}, found {error:?}")),
            Ok(_) => wrong.push(format!("nothing was refused, expected {sentence:?}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Flips bytes of real files; a file is then refused or read, and what is read can be used.
#[test]
fn no_damaged_file_makes_anything_panic() {
    let folder = tempfile::tempdir().unwrap();
    let mut state = 1u64;
    let mut next = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize % below
    };
    let mut read = 0;
    for name in ["bitnet_2b4t", "llama_no_bytes"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gguf_tokenizer");
        let whole = std::fs::read(path.join(format!("{name}.gguf"))).unwrap();
        for _ in 0..100 {
            let mut bytes = whole.clone();
            for _ in 0..1 + next(4) {
                let at = next(bytes.len());
                bytes[at] = [0, 1, 0xFF, bytes[at] ^ 1, bytes[at].wrapping_add(1)][next(5)];
            }
            if next(4) == 0 {
                bytes.truncate(next(whole.len()));
            }
            if let Ok(Some(tokenizer)) = open(folder.path(), &bytes) {
                let ids = tokenizer.encode("Où est <s> 1234  x\n", Special::MARKUP).unwrap();
                tokenizer.decode(&ids, false);
                read += 1;
            }
        }
    }
    assert!(read > 10, "{read}");
}
