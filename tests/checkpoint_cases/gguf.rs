//! Broken GGUF files: each case has one defect and the sentence that it must produce, whole but for
//! `m.gguf: ` before it. A `*` stands for numbers that depend on the rest of the file.

use crate::gguf_file::{
    F16, F32, FFN, File, HIDDEN, I2_S, Q8_0, TQ1_0, TQ2_0, array_value, f16s, f32_value, f32s, i2s,
    i32_value, string, string_value, tq, u32_value,
};

pub(crate) type Case = (&'static str, fn(&mut File), &'static str);

/// An array of arrays, so many deep.
fn nested(depth: usize) -> Vec<u8> {
    let mut items =
        [4u32.to_le_bytes().as_slice(), &1u64.to_le_bytes(), &7u32.to_le_bytes()].concat();
    for _ in 1..depth {
        items = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes(), &items].concat();
    }
    [9u32.to_le_bytes().to_vec(), items].concat()
}

pub(crate) const CONTAINER: &[Case] = &[
    (
        "a file that is empty",
        |file| file.cut = file.bytes().len(),
        "magic: expected 4 bytes at offset 0, found 0 bytes to the end of the file",
    ),
    ("an older format", |file| file.magic = *b"GGJT", "magic: expected \"GGUF\", found \"GGJT\""),
    (
        "version 1",
        |file| file.version = [1, 0, 0, 0],
        "version: 1, of August 2023 is not supported; supported: 2 and 3, little-endian",
    ),
    (
        "a version to come",
        |file| file.version = [4, 0, 0, 0],
        "version: 4 is not supported; supported: 2 and 3, little-endian",
    ),
    (
        "big-endian",
        |file| file.version = [0, 0, 0, 3],
        "version: 3, big-endian is not supported; supported: 2 and 3, little-endian",
    ),
    (
        "more tensors than bytes",
        |file| file.tensor_count = Some(1 << 60),
        "number of tensors: expected at most *, for * bytes to the end of the file, found \
         1152921504606846976",
    ),
    (
        "more keys than bytes",
        |file| file.key_count = Some(u64::MAX),
        "number of metadata keys: expected at most *, for * bytes to the end of the file, found \
         18446744073709551615",
    ),
    ("a tensor more than there are", |file| file.tensor_count = Some(14), "*: expected *, found *"),
    (
        "a key without a name",
        |file| file.keys.insert(0, (Vec::new(), u32_value(1))),
        "metadata key 0: expected a name in UTF-8 without control characters, found \"\"",
    ),
    (
        "a long key",
        |file| file.keys.insert(0, (vec![b'k'; 70_000], u32_value(1))),
        "metadata key 0: expected a name of at most 65535 bytes, found 70000 bytes",
    ),
    (
        "a key that is not UTF-8",
        |file| file.keys.push((vec![b'a', 0xff], u32_value(1))),
        "metadata key 13: expected a name in UTF-8 without control characters, found \"a\u{fffd}\"",
    ),
    (
        "a key that clears the screen",
        |file| file.keys.push((b"\x1b[2J".to_vec(), u32_value(1))),
        "metadata key 13: expected a name in UTF-8 without control characters, found \
         \"\\u{1b}[2J\"",
    ),
    (
        "a key twice",
        |file| file.keys.push((b"general.architecture".to_vec(), string_value(b"llama"))),
        "general.architecture: expected one value, found the key a second time",
    ),
    (
        "a value of no type",
        |file| file.set("a", 13u32.to_le_bytes().into()),
        "a: expected a value type from 0 to 12, found 13",
    ),
    (
        "a string past the end",
        |file| file.set("a", [&8u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat()),
        "a: expected 18446744073709551615 bytes at offset *, found * bytes to the end of the file",
    ),
    (
        "an array of 2^62 numbers",
        |file| file.set("a", array_value(12, 1 << 62, &[])),
        "a: length: expected at most *, for * bytes to the end of the file, found \
         4611686018427387904",
    ),
    (
        "an array of 2^40 strings",
        |file| file.set("a", array_value(8, 1 << 40, &string(b"one"))),
        "a: length: expected at most *, for * bytes to the end of the file, found 1099511627776",
    ),
    (
        "an array of nothing known",
        |file| file.set("a", array_value(99, 1, &[0; 8])),
        "a: expected a value type from 0 to 12, found 99",
    ),
    (
        "arrays five deep",
        |file| file.set("a", nested(5)),
        "a: an array more than 4 deep is not supported; supported: up to 4",
    ),
    (
        "arrays a thousand deep",
        |file| file.set("a", nested(1000)),
        "a: an array more than 4 deep is not supported; supported: up to 4",
    ),
    (
        "a bool that is 2",
        |file| file.set("a", [7u32.to_le_bytes().to_vec(), vec![2]].concat()),
        "a: expected a bool of 0 or 1, found 2",
    ),
    (
        "a bool in an array that is 7",
        |file| file.set("a", array_value(7, 3, &[0, 1, 7])),
        "a: expected a bool of 0 or 1, found 7",
    ),
    (
        "an alignment of 0",
        |file| file.set("general.alignment", u32_value(0)),
        "general.alignment: expected a power of two up to 2097152, found 0 (u32)",
    ),
    (
        "an alignment of 48",
        |file| file.set("general.alignment", u32_value(48)),
        "general.alignment: expected a power of two up to 2097152, found 48 (u32)",
    ),
    (
        "an alignment of 2^31",
        |file| file.set("general.alignment", u32_value(1 << 31)),
        "general.alignment: expected a power of two up to 2097152, found 2147483648 (u32)",
    ),
    (
        "an alignment in words",
        |file| file.set("general.alignment", string_value(b"thirty-two")),
        "general.alignment: expected an integer from 0 to 18446744073709551615, found \
         \"thirty-two\"",
    ),
    (
        "one part of several",
        |file| file.set("split.count", u32_value(3)),
        "split.count: 3 (u32) is not supported; supported: a model in one file (`llama-gguf-split \
         --merge` joins the parts of one)",
    ),
    (
        "a tensor's name that is too long",
        |file| file.tensors[0].name = vec![b't'; 2000],
        "name of tensor 0: expected a name of at most 1000 bytes, found 2000 bytes",
    ),
    (
        "a tensor's name that is not UTF-8",
        |file| file.tensors[0].name = vec![0xc3, 0x28],
        "name of tensor 0: expected a name in UTF-8 without control characters, found \"\u{fffd}(\"",
    ),
    (
        "a tensor twice",
        |file| file.tensors.push(file.tensors[0].clone()),
        "token_embd.weight: expected one tensor of this name, found two",
    ),
    (
        "a tensor without dimensions",
        |file| file.tensors[0].ne.clear(),
        "token_embd.weight: expected 1 to 4 dimensions, found 0",
    ),
    (
        "a tensor of five dimensions",
        |file| file.tensors[0].ne = vec![1; 5],
        "token_embd.weight: expected 1 to 4 dimensions, found 5",
    ),
    (
        "a dimension of 0",
        |file| file.tensors[0].ne = vec![256, 0],
        "token_embd.weight: expected dimensions of at least 1, below 2^56 elements, found [256] and 0",
    ),
    (
        "dimensions whose product leaves 64 bits",
        |file| file.tensors[0].ne = vec![1 << 40, 1 << 40],
        "token_embd.weight: expected dimensions of at least 1, below 2^56 elements, found \
         [1099511627776] and 1099511627776",
    ),
    (
        "an offset that is not aligned",
        |file| file.tensors[1].offset = Some(3073),
        "blk.0.attn_q.weight: expected an offset that is a multiple of 32, found 3073",
    ),
    (
        "an offset past the end",
        |file| file.tensors[1].offset = Some(1 << 62),
        "blk.0.attn_q.weight: expected an offset within the * bytes of data in the file, found \
         4611686018427387904",
    ),
    (
        "two tensors in one place",
        |file| file.tensors[1].offset = Some(0),
        "*: expected * bytes for *, found 0 bytes to the next tensor",
    ),
    (
        "a tensor that begins within another",
        |file| file.tensors[1].offset = Some(3040),
        "token_embd.weight: expected 3072 bytes for F32 [256, 3], found 3040 bytes to the next tensor",
    ),
    (
        "a file whose end is missing",
        |file| file.cut = 1,
        "output_norm.weight: expected 1024 bytes for F32 [256], found 1023 bytes to the end of the \
         file",
    ),
    (
        "a file that ends before its tensors",
        |file| file.cut = file.bytes().len() - 1200,
        "*: expected *, found *",
    ),
    (
        "rows that are not of whole blocks",
        |file| file.add("x", &[33, 2], Q8_0, vec![0; 68]),
        "x: expected rows of a multiple of 32 elements, since it is Q8_0, found rows of 33",
    ),
    (
        "a quantised tensor that is too short",
        |file| file.add("x", &[256, 2], TQ1_0, vec![0; 54]),
        "x: expected 108 bytes for TQ1_0 [256, 2], found 64 bytes to the end of the file",
    ),
];

pub(crate) const CONFIG: &[Case] = &[
    (
        "no architecture",
        |file| file.unset("general.architecture"),
        "general.architecture: expected bitnet, bitnet-25, bitnet-b1.58, llama*, found nothing",
    ),
    (
        "an architecture that is not read",
        |file| file.set("general.architecture", string_value(b"rwkv7")),
        "general.architecture: \"rwkv7\" is not supported; supported: bitnet, bitnet-25, \
         bitnet-b1.58, llama*",
    ),
    (
        "an architecture that is a number",
        |file| file.set("general.architecture", u32_value(7)),
        "general.architecture: expected a string, found 7 (u32)",
    ),
    (
        "an architecture that is not UTF-8",
        |file| file.set("general.architecture", string_value(b"bit\xffnet")),
        "general.architecture: expected UTF-8 text, found byte 0xff at offset 3 of the string",
    ),
    (
        "no hidden size",
        |file| file.unset("bitnet-b1.58.embedding_length"),
        "bitnet-b1.58.embedding_length: expected an integer from 1 to 16777216, found nothing",
    ),
    (
        "a hidden size of 0",
        |file| file.of("embedding_length", u32_value(0)),
        "bitnet-b1.58.embedding_length: expected an integer from 1 to 16777216, found 0 (u32)",
    ),
    (
        "a negative number of layers",
        |file| file.of("block_count", i32_value(-1)),
        "bitnet-b1.58.block_count: expected an integer from 1 to 16777216, found -1 (i32)",
    ),
    (
        "a context that is a float",
        |file| file.of("context_length", f32_value(32.0)),
        "bitnet-b1.58.context_length: expected an integer from 1 to 16777216, found 32 (f32)",
    ),
    (
        "a width of the FFN per layer",
        |file| file.of("feed_forward_length", array_value(4, 1, &8u32.to_le_bytes())),
        "bitnet-b1.58.feed_forward_length: expected an integer from 1 to 16777216, found an array \
         of 1 u32",
    ),
    (
        "more layers than the file has",
        |file| file.of("block_count", u32_value(16_777_216)),
        "blk.1.attn_q.weight: expected a tensor, found none of that name",
    ),
    (
        "key heads that do not divide the query heads",
        |file| {
            file.of("attention.head_count", u32_value(3));
            file.of("attention.head_count_kv", u32_value(2));
        },
        "bitnet-b1.58.attention.head_count_kv: expected a divisor of num_attention_heads, 3, found 2",
    ),
    (
        "heads that do not divide the hidden size",
        |file| {
            file.of("attention.head_count", u32_value(3));
            file.unset("bitnet-b1.58.attention.key_length");
        },
        "bitnet-b1.58.embedding_length: expected a multiple of bitnet-b1.58.attention.head_count, \
         3, since bitnet-b1.58.attention.key_length is absent, found 256 (u32)",
    ),
    (
        "values of another width than keys",
        |file| file.of("attention.value_length", u32_value(4)),
        "bitnet-b1.58.attention.value_length: 4 (u32) is not supported; supported: 2, the length of \
         a key",
    ),
    (
        "a rotation of a part of each head",
        |file| {
            file.of("attention.key_length", u32_value(4));
            file.of("attention.value_length", u32_value(4));
        },
        "bitnet-b1.58.rope.dimension_count: 2 (u32) is not supported; supported: 4, the dimensions \
         of a head",
    ),
    (
        "a rotation that is scaled",
        |file| file.of("rope.scaling.type", string_value(b"yarn")),
        "bitnet-b1.58.rope.scaling.type: \"yarn\" is not supported; supported: none",
    ),
    (
        "a rotation with a factor",
        |file| file.of("rope.scaling.factor", f32_value(8.0)),
        "bitnet-b1.58.rope.scaling.factor: 8 (f32) is not supported; supported: 1",
    ),
    (
        "a base that is not a number",
        |file| file.of("rope.freq_base", f32_value(f32::NAN)),
        "bitnet-b1.58.rope.freq_base: expected a positive number, found NaN (f32)",
    ),
    (
        "no eps",
        |file| file.unset("bitnet-b1.58.attention.layer_norm_rms_epsilon"),
        "bitnet-b1.58.attention.layer_norm_rms_epsilon: expected a positive number, found nothing",
    ),
    (
        "an eps of 0",
        |file| file.of("attention.layer_norm_rms_epsilon", f32_value(0.0)),
        "bitnet-b1.58.attention.layer_norm_rms_epsilon: expected a positive number, found 0 (f32)",
    ),
    (
        "experts",
        |file| file.of("expert_count", u32_value(8)),
        "bitnet-b1.58.expert_count: 8 (u32) is not supported; supported: 0",
    ),
    (
        "a sliding window",
        |file| file.of("attention.sliding_window", u32_value(16)),
        "bitnet-b1.58.attention.sliding_window: 16 (u32) is not supported; supported: 0 or at least \
         32, the context",
    ),
    (
        "attention to what comes after",
        |file| file.of("attention.causal", [7u32.to_le_bytes().to_vec(), vec![0]].concat()),
        "bitnet-b1.58.attention.causal: false is not supported; supported: true",
    ),
    (
        "an activation of another kind",
        |file| file.of("hidden_activation", string_value(b"swiglu")),
        "bitnet-b1.58.hidden_activation: \"swiglu\" is not supported; supported: relu2, silu, \
         gelu_pytorch_tanh",
    ),
    (
        "an activation that is a number",
        |file| file.of("hidden_activation", u32_value(2)),
        "bitnet-b1.58.hidden_activation: expected a string, found 2 (u32)",
    ),
    (
        "a vocabulary of another size than the table",
        |file| file.of("vocab_size", u32_value(4)),
        "token_embd.weight: expected F32, F16, BF16, Q8_0, Q6_K, Q5_0, Q5_1, Q4_0 or Q4_K [4,256], \
         found F32 [3,256]",
    ),
    (
        "an end token that is negative",
        |file| file.set("tokenizer.ggml.eos_token_id", i32_value(-1)),
        "tokenizer.ggml.eos_token_id: expected an integer from 0 to 4294967295, found -1 (i32)",
    ),
];

/// Blocks of 64 weights: columns whose inputs are off are zeros in them, and not in blocks of 128.
fn blocks_of_64(file: &mut File) {
    let off = |col: usize| col < 16;
    let gains: Vec<f32> = (0..FFN).map(|col| if off(col) { 1e-34 } else { 1.0 }).collect();
    file.store("blk.0.ffn_sub_norm.weight", F32, f32s(&gains));
    let mut data = vec![0; HIDDEN * FFN / 4];
    for element in 0..HIDDEN * FFN {
        let code = if off(element % FFN) { 1 } else { 2 };
        data[element / 64 * 16 + element % 16] |= code << (6 - 2 * (element % 64 / 16));
    }
    data.extend([0.5f32.to_le_bytes().to_vec(), vec![0; 28]].concat());
    file.store("blk.0.ffn_down.weight", I2_S, data);
}

const QUERY: &str = "blk.0.attn_q.weight";

fn f16_query(file: &mut File, values: impl Fn(usize) -> f32) {
    file.store(QUERY, F16, f16s(&(0..2 * HIDDEN).map(values).collect::<Vec<_>>()));
}

pub(crate) const TENSORS: &[Case] = &[
    (
        "no embedding table",
        |file| file.remove("token_embd.weight"),
        "token_embd.weight: expected a tensor, found none of that name",
    ),
    (
        "no projection",
        |file| file.remove("blk.0.ffn_up.weight"),
        "blk.0.ffn_up.weight: expected a tensor, found none of that name",
    ),
    (
        "no sub-norm",
        |file| file.remove("blk.0.ffn_sub_norm.weight"),
        "blk.0.ffn_sub_norm.weight: expected a tensor, found none of that name",
    ),
    (
        "a projection on its side",
        |file| file.tensor(QUERY).ne = vec![2, 256],
        "blk.0.attn_q.weight: expected I2_S, TQ1_0, TQ2_0, F32, F16, BF16 or Q8_0 [2,256], found \
         I2_S [256,2]",
    ),
    (
        "a projection of a type for heads",
        |file| file.store(QUERY, 12, vec![0; 288]),
        "blk.0.attn_q.weight: expected I2_S, TQ1_0, TQ2_0, F32, F16, BF16 or Q8_0 [2,256], found \
         Q4_K [2,256]",
    ),
    (
        "TL1",
        |file| file.tensor(QUERY).kind = 38,
        "blk.0.attn_q.weight: expected * [2,256], found type 38, TL1 of bitnet.cpp, whose layout \
         depends on the program that wrote it [2,256]",
    ),
    (
        "TL2",
        |file| file.tensor(QUERY).kind = 39,
        "blk.0.attn_q.weight: expected * [2,256], found type 39, TL2 of bitnet.cpp, whose layout \
         depends on the program that wrote it [2,256]",
    ),
    (
        "MXFP4, which has the id of TL2",
        |file| file.store(QUERY, 39, vec![0; 2 * HIDDEN / 32 * 17]),
        "blk.0.attn_q.weight: expected * [2,256], found type 39, MXFP4 [2,256]",
    ),
    (
        "a withdrawn type that has the id of I2_S",
        |file| file.store(QUERY, I2_S, vec![0; 2 * HIDDEN / 32 * 18]),
        "blk.0.attn_q.weight: expected * [2,256], found type 36, IQ4_NL_4_4 (withdrawn from ggml, \
         its id now used for I2_S) [2,256]",
    ),
    (
        "I8_S",
        |file| file.tensor(QUERY).kind = 37,
        "blk.0.attn_q.weight: expected * [2,256], found type 37, I8_S of bitnet.cpp or the withdrawn \
         IQ4_NL_4_8 [2,256]",
    ),
    (
        "a type of ik_llama.cpp",
        |file| file.tensor(QUERY).kind = 135,
        "blk.0.attn_q.weight: expected * [2,256], found type 135, IQ2_BN of ik_llama.cpp [2,256]",
    ),
    (
        "a type that nobody knows",
        |file| file.tensor(QUERY).kind = 9999,
        "blk.0.attn_q.weight: expected * [2,256], found type 9999 [2,256]",
    ),
    (
        "a scale of 0",
        |file| file.store(QUERY, I2_S, i2s(2 * HIDDEN, 0.0)),
        "blk.0.attn_q.weight: expected a scale that is a positive number, found 0",
    ),
    (
        "a scale that is not a number",
        |file| file.store(QUERY, I2_S, i2s(2 * HIDDEN, f32::NAN)),
        "blk.0.attn_q.weight: expected a scale that is a positive number, found NaN",
    ),
    (
        "a negative scale",
        |file| file.store(QUERY, TQ2_0, tq(2, 66, -0.5)),
        "blk.0.attn_q.weight: expected a scale that is a positive number, found -0.5",
    ),
    (
        "code 3 in I2_S",
        |file| file.tensor(QUERY).data[32 + 5] |= 3 << 2,
        "blk.0.attn_q.weight: expected codes 0, 1 and 2, found code 3 at row 0, column 197",
    ),
    (
        "code 3 in TQ2_0",
        |file| {
            file.store(QUERY, TQ2_0, tq(2, 66, 0.5));
            file.tensor(QUERY).data[66 + 32 + 7] = 0b01_11_01_01;
        },
        "blk.0.attn_q.weight: expected codes 0, 1 and 2, found code 3 at row 1, column 199",
    ),
    (
        "blocks of TQ2_0 with different scales",
        |file| {
            let data = [tq(1, 66, 0.5), tq(1, 66, 0.75)].concat();
            file.store(QUERY, TQ2_0, data);
        },
        "blk.0.attn_q.weight: expected one scale for the whole matrix, 0.5 as in its first block, \
         or 0 for blocks of zeros, found 0.75 in block 0 of row 1",
    ),
    (
        "blocks of TQ1_0 with different scales",
        |file| {
            let data = [tq(1, 54, 0.5), tq(1, 54, f32::INFINITY)].concat();
            file.store(QUERY, TQ1_0, data);
        },
        "blk.0.attn_q.weight: expected one scale for the whole matrix, 0.5 as in its first block, \
         or 0 for blocks of zeros, found inf in block 0 of row 1",
    ),
    (
        "blocks of 64 weights",
        blocks_of_64,
        "blk.0.ffn_down.weight: I2_S in blocks of 64 weights, as bitnet.cpp writes it on ARM since \
         November 2025, is not supported; supported: blocks of 128 weights: convert the model on x86",
    ),
    (
        "NaN among master weights",
        |file| f16_query(file, |i| if i == 300 { f32::NAN } else { i as f32 }),
        "blk.0.attn_q.weight: expected finite numbers, found NaN at row 1, column 44",
    ),
    (
        "a separate scale of 0",
        |file| file.add("blk.0.attn_q.scale", &[1], F32, f32s(&[0.0])),
        "blk.0.attn_q.scale: expected a positive number, found 0",
    ),
    (
        "a separate scale per row",
        |file| file.add("blk.0.attn_q.scale", &[2], F32, f32s(&[1.0, 1.0])),
        "blk.0.attn_q.scale: expected F32, F16 or BF16 [1], found F32 [2]",
    ),
    (
        "a separate scale of master weights",
        |file| {
            f16_query(file, |i| i as f32);
            file.add("blk.0.attn_q.scale", &[1], F32, f32s(&[1.0]));
        },
        "blk.0.attn_q.scale: expected no scale beside weights that are quantised when they are \
         loaded, found F32 [1]",
    ),
    (
        "scales whose product is infinite",
        |file| {
            file.store(QUERY, I2_S, i2s(2 * HIDDEN, 1e30));
            file.add("blk.0.attn_q.scale", &[1], F32, f32s(&[1e30]));
        },
        "blk.0.attn_q.weight: expected a scale whose product with the separate one is positive and \
         finite, found inf",
    ),
    (
        "NaN in a norm",
        |file| file.store("blk.0.attn_sub_norm.weight", F32, f32s(&[1.0, f32::NAN])),
        "blk.0.attn_sub_norm.weight: expected finite numbers, found NaN at element 1",
    ),
    (
        "a norm that is quantised",
        |file| file.store("blk.0.attn_norm.weight", Q8_0, vec![0; HIDDEN / 32 * 34]),
        "blk.0.attn_norm.weight: expected F32, F16 or BF16 [256], found Q8_0 [256]",
    ),
    (
        "a norm of another width",
        |file| file.tensor("blk.0.attn_norm.weight").ne = vec![128],
        "blk.0.attn_norm.weight: expected F32, F16 or BF16 [256], found F32 [128]",
    ),
    (
        "infinity in the table",
        |file| {
            file.store(
                "token_embd.weight",
                F16,
                f16s(&[&[1.0; 700][..], &[f32::INFINITY; 68]].concat()),
            )
        },
        "token_embd.weight: expected finite numbers, found inf at row 2, column 188",
    ),
    (
        "infinity in a quantised table",
        |file| {
            let mut data = vec![1; 3 * HIDDEN / 32 * 34];
            data[34 * 9..34 * 9 + 2].copy_from_slice(&f16s(&[f32::INFINITY]));
            file.store("token_embd.weight", Q8_0, data);
        },
        "token_embd.weight: expected finite numbers, found inf at row 1, column 32",
    ),
    (
        "a table of a ternary type",
        |file| file.store("token_embd.weight", TQ2_0, tq(3, 66, 1.0)),
        "token_embd.weight: expected F32, F16, BF16, Q8_0, Q6_K, Q5_0, Q5_1, Q4_0 or Q4_K [3,256], \
         found TQ2_0 [3,256]",
    ),
    (
        "a head of another width",
        |file| file.add("output.weight", &[128, 3], F32, f32s(&[0.0; 384])),
        "output.weight: expected F32, F16, BF16, Q8_0, Q6_K, Q5_0, Q5_1, Q4_0 or Q4_K [3,256], found \
         F32 [3,128]",
    ),
    (
        "a bias",
        |file| file.add("blk.0.attn_q.bias", &[2], F32, f32s(&[0.0; 2])),
        "blk.0.attn_q.bias: a bias is not supported; supported: projections and norms without bias",
    ),
    (
        "norms of query heads",
        |file| file.add("blk.0.attn_q_norm.weight", &[2], F32, f32s(&[1.0; 2])),
        "blk.0.attn_q_norm.weight: a tensor with no place in the model's family is not supported; \
         supported: none here",
    ),
    (
        "a layer too many",
        |file| file.add("blk.1.attn_q.weight", &[256, 2], I2_S, i2s(512, 1.0)),
        "blk.1.attn_q.weight: a tensor of layer 1 is not supported; supported: layers 0 to 0, as \
         block_count says",
    ),
    (
        "a factor per frequency",
        |file| file.add("rope_freqs.weight", &[1], F32, f32s(&[8.0])),
        "rope_freqs.weight: rotation with a factor per frequency is not supported; supported: one \
         without, or all of them 1",
    ),
];

/// Of files whose architecture is `llama`, which need not be ternary.
pub(crate) const LLAMA: &[Case] = &[
    (
        "a model that is not ternary",
        |file| f16_query(file, |i| i as f32),
        "blk.0.attn_q.weight: F16 of more than three values in the architecture llama is not \
         supported; supported: ternary weights: this is a model of another kind, or one that was \
         not quantised before it was converted",
    ),
    (
        "NaN among ternary floats",
        |file| f16_query(file, |i| if i == 1 { f32::NAN } else { 0.0 }),
        "blk.0.attn_q.weight: expected a scale that is a positive number, found NaN",
    ),
];

/// Of files whose architecture is `gemma3`, which has windows.
pub(crate) const GEMMA3: &[Case] = &[
    (
        "a window that is no number of keys",
        |file| file.set("gemma3.attention.sliding_window", f32_value(8.0)),
        "gemma3.attention.sliding_window: expected an integer from 0 to 16777216, found 8 (f32)",
    ),
    (
        "a negative window",
        |file| file.set("gemma3.attention.sliding_window", i32_value(-1)),
        "gemma3.attention.sliding_window: expected an integer from 0 to 16777216, found -1 (i32)",
    ),
    (
        "a window past all sizes",
        |file| file.set("gemma3.attention.sliding_window", u32_value(u32::MAX)),
        "gemma3.attention.sliding_window: expected an integer from 0 to 16777216, found \
         4294967295 (u32)",
    ),
    (
        "a pattern of another type",
        |file| file.set("gemma3.attention.sliding_window_pattern", string_value(b"LLLLLG")),
        "gemma3.attention.sliding_window_pattern: expected a number, or 1 booleans, one for each \
         layer, found \"LLLLLG\"",
    ),
    (
        "a pattern of more layers than there are",
        |file| {
            file.set("gemma3.attention.sliding_window_pattern", array_value(7, 2, &[1, 0]));
        },
        "gemma3.attention.sliding_window_pattern: expected a number, or 1 booleans, one for each \
         layer, found *",
    ),
    (
        "a pattern of numbers",
        |file| {
            let items = 1u32.to_le_bytes();
            file.set("gemma3.attention.sliding_window_pattern", array_value(4, 1, &items));
        },
        "gemma3.attention.sliding_window_pattern: expected a number, or 1 booleans, one for each \
         layer, found *",
    ),
    (
        "a negative pattern",
        |file| file.set("gemma3.attention.sliding_window_pattern", i32_value(-6)),
        "gemma3.attention.sliding_window_pattern: expected a number, or 1 booleans, one for each \
         layer, found -6 (i32)",
    ),
    (
        "a base of the windows that is not positive",
        |file| file.set("gemma3.rope.freq_base_swa", f32_value(0.0)),
        "gemma3.rope.freq_base_swa: expected a positive number, found 0 (f32)",
    ),
    (
        "no length of a key",
        |file| {
            file.unset("gemma3.attention.key_length");
            file.unset("gemma3.attention.value_length");
            file.unset("gemma3.rope.dimension_count");
        },
        "blk.0.attn_q.weight: expected * [256,256], found I2_S [2,256]",
    ),
    (
        "capped logits",
        |file| file.set("gemma3.final_logit_softcapping", f32_value(30.0)),
        "gemma3.final_logit_softcapping: 30 (f32) is not supported; supported: none",
    ),
    (
        "no norm behind attention",
        |file| file.remove("blk.0.post_attention_norm.weight"),
        "blk.0.post_attention_norm.weight: *",
    ),
    (
        "no norm before a projection, as in a Gemma 3 of another kind",
        |file| file.remove("blk.0.ffn_down_norm_in.weight"),
        "blk.0.ffn_down_norm_in.weight: *",
    ),
    (
        "layers behind the last norm",
        |file| file.add("dense_2.weight", &[256, 2], F32, f32s(&[0.0; 512])),
        "dense_2.weight: a projection of embeddings is not supported; supported: embeddings as the \
         last norm gives them",
    ),
];
