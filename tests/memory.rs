//! Loading peaks at no more than 1.15 × (packed weights + KV cache) + 64 MB of memory that is not
//! mapped from the file, and a request takes nothing that grows with the model.
#![cfg(target_os = "linux")] // The kernel tells how much memory is anonymous.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use trine::backend::KvType;
use trine::backend::select::DeviceName;
use trine::checkpoint;
use trine::engine::Session;
use trine::engine::{LoadedModel, ModelOptions, SamplingParams};
use trine::model::open::{DeviceOptions, open};

/// Counts what is allocated on the heap.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is handed to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(NOW.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(NOW.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Held by each test: what is measured is the whole process.
static ALONE: Mutex<()> = Mutex::new(());

/// Bytes of this process's memory that no file backs, heap and anonymous maps alike.
fn anonymous() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("RssAnon");
    let kib = line.trim().trim_end_matches("kB").trim();
    kib.parse::<usize>().expect("a number") * 1024
}

/// What `work` answers, and the most anonymous memory that was seen, every millisecond, while it
/// ran, beyond what there was before.
fn peak_of<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let (before, done) = (anonymous(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut peak = before;
            while !done.load(Relaxed) {
                peak = peak.max(anonymous());
                std::thread::sleep(Duration::from_millis(1));
            }
            peak
        });
        let result = work();
        let last = anonymous();
        done.store(true, Relaxed);
        (result, watcher.join().expect("the watcher").max(last) - before)
    })
}

const HIDDEN: usize = 2048;
const FFN: usize = 5632;
const LAYERS: usize = 6;
const KV: usize = 512;
const VOCABULARY: usize = 16384;

/// Writes a packed checkpoint of some 68 MB of ternary weights and a head of 67 MB, all weights 0.
fn write_checkpoint(folder: &Path) -> std::io::Result<usize> {
    let config = format!(
        r#"{{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": {HIDDEN}, "intermediate_size": {FFN}, "num_hidden_layers": {LAYERS},
        "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": {VOCABULARY},
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "quantization_config": {{"quant_method": "bitnet"}}}}"#
    );
    std::fs::write(folder.join("config.json"), config)?;
    let mut tensors: Vec<(String, &str, Vec<usize>)> =
        vec![("model.embed_tokens.weight".into(), "BF16", vec![VOCABULARY, HIDDEN])];
    tensors.push(("model.norm.weight".into(), "BF16", vec![HIDDEN]));
    let mut ternary = 0;
    for layer in 0..LAYERS {
        for (name, rows, cols) in [
            ("self_attn.q_proj", HIDDEN, HIDDEN),
            ("self_attn.k_proj", KV, HIDDEN),
            ("self_attn.v_proj", KV, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HIDDEN),
            ("mlp.gate_proj", FFN, HIDDEN),
            ("mlp.up_proj", FFN, HIDDEN),
            ("mlp.down_proj", HIDDEN, FFN),
        ] {
            ternary += rows * cols / 4;
            let name = format!("model.layers.{layer}.{name}.weight");
            tensors.push((format!("{name}_scale"), "BF16", vec![1]));
            tensors.push((name, "U8", vec![rows / 4, cols]));
        }
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensors.push((format!("model.layers.{layer}.{norm}.weight"), "BF16", vec![HIDDEN]));
        }
    }
    let size = |kind: &str, shape: &[usize]| {
        shape.iter().product::<usize>() * if kind == "U8" { 1 } else { 2 }
    };
    let mut offset = 0;
    let header: Vec<String> = tensors
        .iter()
        .map(|(name, kind, shape)| {
            let end = offset + size(kind, shape);
            let entry = format!(
                r#""{name}":{{"dtype":"{kind}","shape":{shape:?},"data_offsets":[{offset},{end}]}}"#
            );
            offset = end;
            entry
        })
        .collect();
    let header = format!("{{{}}}", header.join(","));
    let mut file = BufWriter::new(File::create(folder.join("model.safetensors"))?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    for (_, kind, shape) in &tensors {
        // 0x55 is four codes of 1, four weights of zero; 0x3F80 is a bfloat16 1.
        let bytes: &[u8] = if *kind == "U8" { &[0x55] } else { &[0x80, 0x3F] };
        let mut left = size(kind, shape);
        let block = bytes.repeat(1 << 15);
        while left > 0 {
            let count = left.min(block.len());
            file.write_all(&block[..count])?;
            left -= count;
        }
    }
    file.flush()?;
    Ok(ternary)
}

/// Not on a GPU that this machine may have: it is the host's memory that is watched.
fn on_cpu() -> DeviceOptions {
    DeviceOptions { device: DeviceName::Cpu, ..DeviceOptions::default() }
}

#[test]
fn loading_and_running_stay_within_what_was_promised() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let ternary = write_checkpoint(folder.path()).expect("a checkpoint");
    let (context, kv_type) = (1024, KvType::F16);
    let kv = 2 * LAYERS * context * KV * kv_type.size();
    let options = ModelOptions::default().context(Some(context)).kv_type(kv_type);

    let checkpoint = checkpoint::open(folder.path()).expect("opens");
    let reserve = options.reserve(checkpoint.config()).expect("fits");
    let (mut session, peak) = peak_of(|| {
        let device = on_cpu();
        Session::new(open(&device, &checkpoint, reserve, &mut |_, _| {}).expect("loads"))
    });
    let limit = (ternary + kv) * 115 / 100 + 64_000_000;
    assert!(peak <= limit, "loading peaked at {peak} B, the limit is {limit} B");
    assert!(peak >= ternary, "{peak} B cannot hold {ternary} B of weights: was it measured?");

    // The first request grows what is sized lazily; after it, steps leave the heap as it was.
    let params = SamplingParams { max_tokens: Some(4), ..SamplingParams::default() };
    let mut run = |prompt: &[u32]| {
        let events = session.generate(prompt, &params).expect("accepted");
        events.for_each(|event| drop(event.expect("runs")))
    };
    run(&[1, 2, 3]);
    PEAK.store(NOW.load(Relaxed), Relaxed);
    let before = NOW.load(Relaxed);
    run(&[4; 300]);
    let grown = PEAK.load(Relaxed) - before;
    assert!(grown <= 1_000_000, "a request took {grown} B beside what was reserved at load");
}

/// A model that does not fit is refused at load with the arithmetic.
#[test]
fn what_does_not_fit_is_refused_with_the_numbers() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let model = trine::checkpoint::synthetic::published("2b4t").expect("published");
    let huge = trine::model::config::ModelConfig { layers: 30_000, ..model };
    let source = trine::checkpoint::synthetic::SyntheticModel::new(huge, 1);
    let Ok(source) = source else { panic!("only the shape is huge") };
    let reserve = ModelOptions::default()
        .reserve(trine::model::weights::WeightSource::config(&source))
        .expect("a valid context");
    let result = open(&on_cpu(), &source, reserve, &mut |_, _| {});
    let Err(error) = result else { panic!("521 GB of weights cannot fit") };
    let error = error.to_string();
    assert!(error.contains("ternary weights 521") && error.contains("available"), "{error}");
}

/// The type that users hold can be opened from a path.
#[test]
fn a_missing_path_is_an_error_and_not_the_demo() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let error = LoadedModel::open("no/such/checkpoint", &ModelOptions::default());
    let Err(error) = error else { panic!("nothing is there") };
    assert!(error.to_string().contains("no/such/checkpoint"), "{error}");
}

/// The most bytes on the heap while `work` ran, beyond what there was before.
fn heap_of<T>(work: impl FnOnce() -> T) -> usize {
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    drop(work());
    PEAK.load(Relaxed) - before
}

/// A GGUF file of metadata alone.
fn metadata(keys: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend([0u64.to_le_bytes(), (keys.len() as u64).to_le_bytes()].concat());
    for (key, value) in keys {
        bytes.extend((key.len() as u64).to_le_bytes());
        bytes.extend([key.as_bytes(), value].concat());
    }
    bytes
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

fn text_value(text: &str) -> Vec<u8> {
    [8u32.to_le_bytes().to_vec(), string(text)].concat()
}

/// The head of an array of strings that says how many there are.
fn strings_value(count: u64) -> Vec<u8> {
    [&9u32.to_le_bytes()[..], &8u32.to_le_bytes(), &count.to_le_bytes()].concat()
}

/// A tokenizer in a GGUF file takes no more than 64 MB and 16 bytes for each of the vocabulary's, and
/// what claims more than there is, or has what no vocabulary has, 64 MB.
#[test]
fn tokenizers_of_gguf_files_take_what_they_justify() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("t.gguf");
    let open = || {
        let files = checkpoint::open_tokenizer(&path)?;
        files.tokenizer().map(|tokenizer| tokenizer.expect("one"))
    };
    let byte_level = |tokens: Vec<u8>, merges: Vec<u8>| {
        metadata(&[
            ("general.architecture", text_value("bitnet")),
            ("tokenizer.ggml.model", text_value("gpt2")),
            ("tokenizer.ggml.pre", text_value("llama-bpe")),
            ("tokenizer.ggml.merges", merges),
            ("tokenizer.ggml.tokens", tokens),
        ])
    };

    // As large as Llama 3's, its tokens as short as they can be: 256 letters, all pairs of them, and
    // pairs of a pair and a letter, each made by one merge.
    let letters: Vec<char> = ('\u{100}'..).take(256).collect();
    let mut texts: Vec<String> = letters.iter().map(char::to_string).collect();
    let mut merges = Vec::new();
    for count in [65_536, 62_464] {
        let before = texts[texts.len() - count / 256..].to_vec();
        for (a, b) in before.iter().flat_map(|a| letters.iter().map(move |b| (a, b))) {
            merges.push(format!("{a} {b}"));
            texts.push(format!("{a}{b}"));
        }
    }
    let all = |texts: &[String]| {
        let items = texts.iter().flat_map(|text| string(text));
        strings_value(texts.len() as u64).into_iter().chain(items).collect::<Vec<u8>>()
    };
    let bytes = byte_level(all(&texts), all(&merges));
    std::fs::write(&path, &bytes).expect("written");
    let peak = heap_of(|| {
        let tokenizer = open().expect("a tokenizer");
        assert_eq!(tokenizer.vocabulary_size(), texts.len());
        tokenizer
    });
    let limit = 64_000_000 + 16 * bytes.len();
    println!("{} tokens in {} B: {peak} B, limit {limit} B", texts.len(), bytes.len());
    assert!(peak <= limit, "{peak} B for {} B of vocabulary, the limit is {limit} B", bytes.len());
    assert!(peak >= bytes.len(), "{peak} B: was it measured?");

    // What cannot be is refused before anything is made of it. The rest of each file is zeros.
    let empty = || strings_value(0);
    let one = [strings_value(1), string("a")].concat();
    let million = |text: &str| [strings_value(1_000_000), string(text).repeat(1_000_000)].concat();
    let sized = |bytes: Vec<u8>, length: u64| (bytes, length);
    for (what, (bytes, length), expected) in [
        (
            "a token more than there may be",
            sized(byte_level(strings_value((1 << 24) + 1), empty()), 135 << 20),
            "tokenizer.ggml.tokens: expected up to 16777216 tokens",
        ),
        (
            "12 billion tokens",
            sized(byte_level(strings_value(12 << 30), empty()), 100 << 30),
            "tokenizer.ggml.tokens: length: 12884901888 is not supported",
        ),
        (
            "a million merges of one token",
            sized(byte_level(one.clone(), million("a a")), 0),
            "tokenizer.ggml.merges: expected at most 16 for each of the 1 tokens",
        ),
        (
            "a million tokens that are the same",
            sized(byte_level(million("a"), empty()), 0),
            "expected tokens that differ",
        ),
        (
            "a token of a gigabyte",
            sized(
                byte_level(
                    [strings_value(1), (1u64 << 30).to_le_bytes().to_vec()].concat(),
                    empty(),
                ),
                1 << 31,
            ),
            "tokenizer.ggml.tokens[0]: expected at most 16777216 bytes of text",
        ),
        (
            "a template of ten gigabytes",
            sized(
                metadata(&[
                    ("tokenizer.ggml.model", text_value("gpt2")),
                    (
                        "tokenizer.chat_template",
                        [&8u32.to_le_bytes()[..], &(10u64 << 30).to_le_bytes()].concat(),
                    ),
                ]),
                11 << 30,
            ),
            "tokenizer.chat_template: expected at most 16777216 bytes of text",
        ),
        (
            "a kind of tokenizer with a name of a gigabyte",
            sized(
                metadata(&[(
                    "tokenizer.ggml.model",
                    [&8u32.to_le_bytes()[..], &(1u64 << 30).to_le_bytes()].concat(),
                )]),
                1 << 31,
            ),
            "tokenizer.ggml.model: expected at most 16777216 bytes of text",
        ),
    ] {
        let mut file = File::create(&path).expect("created");
        file.write_all(&bytes).expect("written");
        let length = length.max(bytes.len() as u64);
        file.set_len(length).expect("a sparse file");
        let ((heap, error), peak) = peak_of(|| {
            let mut error = String::new();
            let heap = heap_of(|| error = open().expect_err(what).to_string());
            (heap, error)
        });
        assert!(error.contains(expected), "{what}: {error}");
        // Some of these have a vocabulary of megabytes.
        let limit = 64_000_000 + 4 * bytes.len();
        assert!(heap <= limit && peak <= limit, "{what}: {heap} B, {peak} B");
    }
}

/// A kilobyte that claims gigabytes, a template or tokenizer that multiplies, a file of 100 GB of
/// zeros: none makes its reader take more than 64 MB.
#[test]
fn hostile_files_take_little_memory() {
    use trine::text::{ChatOptions, ChatTemplate, Message, Special, Tokenizer};

    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut peaks: Vec<(String, usize)> = Vec::new();

    let x = "{% set x = 'x' * 4000000 %}";
    for source in [
        "{{ 'x' * 90000000 }}".to_owned(),
        "{{ (90000000 * 'x') | length }}".into(),
        format!("{x}{{{{ x{} }}}}", " ~ x".repeat(250)),
        format!("{x}{{{{ x{} }}}}", " + x".repeat(250)),
        format!("{x}{{{{ [x{}] | string | length }}}}", ", x".repeat(1000)),
        format!("{x}{{{{ (x | list) | length }}}}"),
        format!("{x}{{{{ x | upper | lower | title | tojson }}}}"),
        format!("{x}{{{{ (x | replace('x', '\\u0001')) | pprint }}}}"),
        format!("{x}{{{{ [x] | pprint }}}}"),
        (0..1000).map(|i| format!("{{% set x{i} = 'x' * 4000000 %}}")).collect(),
        "{{ ([['x' * 1000000] * 100]) | map('upper') | list | length }}".into(),
        "{% for i in range(99999) %}{% set x %}{{ 'y' * 10000 }}{% endset %}{% endfor %}".into(),
        "{% set n = namespace(l=[]) %}{% for i in range(99999) %}{% set n.l = n.l + ['y' * 100] %}\
         {% endfor %}"
            .into(),
        "{{ (range(99999) | list) | join('x' * 99999) }}".into(),
        "{{ '%999999999d' | format(1) }}".into(),
        "{{ ('x' * 99999) | replace('x', 'x' * 99999) }}".into(),
    ] {
        let work = || {
            let template =
                ChatTemplate::new(Path::new("t"), &source, None, None).expect("compiles");
            template.render(&[Message::new("user", "hi")], &ChatOptions::default())
        };
        peaks.push((source[..source.len().min(80)].to_owned(), heap_of(work)));
    }

    let tokenizer = |normalizer: &str, decoder: &str, split: &str| {
        format!(
            r#"{{"version": "1.0", "normalizer": {normalizer}, "decoder": {decoder},
            "pre_tokenizer": {{"type": "Split", "pattern": {{"Regex": "{split}"}},
            "behavior": "Isolated", "invert": false}},
            "model": {{"type": "WordLevel", "vocab": {{"a": 0}}, "unk_token": "a"}}}}"#
        )
    };
    let double = r#"{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}"#;
    let doubles = [double; 40].join(",");
    let normalizers = format!(r#"{{"type": "Sequence", "normalizers": [{doubles}]}}"#);
    let decoders = format!(r#"{{"type": "Sequence", "decoders": [{doubles}]}}"#);
    let map = r#"{"type": "Precompiled", "precompiled_charsmap": "/////wAA"}"#;
    for (what, json) in [
        ("normalizers", tokenizer(&normalizers, "null", "a")),
        ("decoders", tokenizer("null", &decoders, "a")),
        ("a character map", tokenizer(map, "null", "a")),
        ("repetitions", tokenizer("null", "null", "((((?=a)a){900}){900}){900}")),
        ("classes", tokenizer("null", "null", r"(\\p{L}{100}){100}")),
    ] {
        let work = || {
            let tokenizer = Tokenizer::from_json(Path::new("t"), json.as_bytes()).ok()?;
            Some(tokenizer.decode(&tokenizer.encode("aaaa", Special::NONE).ok()?, false))
        };
        peaks.push((what.to_owned(), heap_of(work)));
    }

    // Headers that claim more than there is, and files that hold nothing but are long.
    let header = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let gguf = |tensors: u64, keys: u64, rest: &[u8]| {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend([tensors.to_le_bytes(), keys.to_le_bytes()].concat());
        bytes.extend(rest);
        bytes
    };
    let array = |kind: u32, count: u64| {
        let key = [&1u64.to_le_bytes()[..], b"a", &9u32.to_le_bytes()].concat();
        [&key[..], &kind.to_le_bytes(), &count.to_le_bytes(), &[0; 64]].concat()
    };
    let folder = tempfile::tempdir().expect("a temporary folder");
    write_checkpoint(folder.path()).expect("a checkpoint");
    let aside = folder.path().join("aside");
    let config = std::fs::read_to_string(folder.path().join("config.json")).expect("written");
    let shape = format!("[{}1]", "1,".repeat(10_000));
    for (name, bytes) in [
        ("model.safetensors", u64::MAX.to_le_bytes().to_vec()),
        ("model.safetensors", 99_999_999u64.to_le_bytes().to_vec()),
        (
            "model.safetensors",
            header(r#"{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,1]}}"#),
        ),
        (
            "model.safetensors",
            header(&format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,4]}}}}"#)),
        ),
        ("config.json", b"[".repeat(1 << 20)),
        (
            "config.json",
            config.replace(&format!("layers\": {LAYERS}"), "layers\": 16777216").into(),
        ),
        ("m.gguf", gguf(u64::MAX, 0, &[])),
        ("m.gguf", gguf(0, u64::MAX, &[])),
        ("m.gguf", gguf(1 << 40, 1, &array(8, 1 << 40))),
        ("m.gguf", gguf(0, 1, &array(8, u64::MAX))),
        ("m.gguf", gguf(0, 1, &array(9, 1 << 62))),
        ("m.gguf", gguf(0, 1, &array(12, 1 << 61))),
    ] {
        let path = folder.path().join(name);
        let _ = std::fs::rename(&path, &aside);
        std::fs::write(&path, &bytes).expect("written");
        let at = if name == "m.gguf" { &path } else { folder.path() };
        let peak = heap_of(|| {
            checkpoint::open(at).and_then(|c| c.verify()).expect_err("a hostile file").to_string()
        });
        peaks.push((format!("{name}: {:?}", &bytes[..bytes.len().min(60)]), peak));
        std::fs::remove_file(&path).expect("removed");
        let _ = std::fs::rename(&aside, &path);
    }
    for name in ["config.json", "tokenizer_config.json", "model.safetensors", "m.gguf", "model.bin"]
    {
        let path = folder.path().join(name);
        let _ = std::fs::rename(&path, &aside);
        File::create(&path).and_then(|file| file.set_len(100 << 30)).expect("a sparse file");
        let own = ["m.gguf", "model.bin"].contains(&name);
        let at = if own { &path } else { folder.path() };
        let (_, peak) =
            peak_of(|| checkpoint::open(at).map(|_| ()).expect_err("zeros").to_string());
        peaks.push((format!("100 GB of zeros as {name}"), peak));
        std::fs::remove_file(&path).expect("removed");
        let _ = std::fs::rename(&aside, &path);
    }
    let over: Vec<String> = peaks
        .iter()
        .filter(|(_, peak)| *peak > 64_000_000)
        .map(|(what, peak)| format!("{peak} B: {what}"))
        .collect();
    assert!(over.is_empty(), "over 64 MB:\n{}", over.join("\n"));
    // The measure measures: something of all this took a few megabytes.
    assert!(peaks.iter().any(|(_, peak)| *peak > 4_000_000), "{peaks:?}");
}
