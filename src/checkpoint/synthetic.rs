//! Random models of any shape, to measure speed without a download.
//!
//! Nothing is stored: codes come from a hash of (seed, tensor, row, place) whenever they are read,
//! so that the matrices of an 8B model cost no memory and the same arguments give the same model
//! on every machine. The text that such a model writes is noise; the work it takes is that of a
//! trained model of its shape, except that
//!
//! - codes are independent, with 40 % zeros (77, 102 and 77 of 256 are −1, 0 and +1) in every
//!   row: trained models have 30 to 45 % zeros, and no kernel here depends on them;
//! - table entries are uniform and not normal, with the same standard deviation.
//!
//! Sizes are set so that activations stay near what trained models have: every projection's scale
//! brings its output to a chosen standard deviation, gains lie in 0.75 to 1.25, those of the final
//! norm with random signs (so that a tied head does not always prefer the token it was given), and
//! logits have a standard deviation of about 3.

use crate::backend::ops::{Activation, Heads};
use crate::error::LoadError;
use crate::model::config::{Attention, Family, ModelConfig, NormRole, Projection};
use crate::model::weights::WeightSource;
use crate::tensor::{FloatType, HostTable, SharedBytes};
use crate::ternary::TernaryRows;

/// A published shape.
struct Shape {
    name: &'static str,
    family: Family,
    /// Hidden size, width of the feed-forward network, layers, vocabulary.
    sizes: [usize; 4],
    /// Query heads, key/value heads, width of a head.
    heads: [usize; 3],
    context: usize,
    rope_theta: f64,
    rms_eps: f32,
    activation: Activation,
    tied_head: bool,
}

/// 2B4T; what most others differ from in sizes alone.
const BASE: Shape = Shape {
    name: "2b4t",
    family: Family::BitNet,
    sizes: [2560, 6912, 30, 128_256],
    heads: [20, 5, 128],
    context: 4096,
    rope_theta: 500_000.0,
    rms_eps: 1e-5,
    activation: Activation::Relu2,
    tied_head: true,
};

/// The 1bitLLM models, and with other sizes those that bitnet.cpp's papers measured: SiLU, sub-norms,
/// as many key/value heads as query heads, a tied head.
const fn one_bit(
    name: &'static str,
    [hidden, ffn, layers]: [usize; 3],
    [n, dim]: [usize; 2],
) -> Shape {
    Shape {
        name,
        sizes: [hidden, ffn, layers, 32_002],
        heads: [n, n, dim],
        context: 2048,
        rope_theta: 10_000.0,
        activation: Activation::Silu,
        ..BASE
    }
}

/// Llama's shape: SiLU, no sub-norms, a head of its own.
const fn llama(name: &'static str, sizes: [usize; 4], heads: [usize; 3]) -> Shape {
    Shape {
        name,
        family: Family::Llama,
        sizes,
        heads,
        context: 8192,
        activation: Activation::Silu,
        tied_head: false,
        ..BASE
    }
}

const fn falcon3(
    name: &'static str,
    sizes: [usize; 4],
    heads: [usize; 3],
    context: usize,
) -> Shape {
    Shape { context, rope_theta: 1_000_042.0, rms_eps: 1e-6, ..llama(name, sizes, heads) }
}

const fn falcon_e(name: &'static str, sizes: [usize; 4]) -> Shape {
    Shape { context: 32_768, rope_theta: 1e6, ..llama(name, sizes, [16, 2, 128]) }
}

/// Checkpoints first, then the models of arXiv 2410.16144 and 2502.11880, whose weights were random
/// there too (microsoft/BitNet, `utils/generate-dummy-bitnet-model.py`).
const SHAPES: &[Shape] = &[
    BASE,
    one_bit("0.7b", [1536, 4096, 24], [16, 96]),
    one_bit("1.3b", [2048, 5460, 24], [32, 64]),
    one_bit("3b", [3200, 8640, 26], [32, 100]),
    llama("8b", [4096, 14_336, 32, 128_256], [32, 8, 128]),
    falcon3("falcon3-1b", [2048, 8192, 18, 131_072], [8, 4, 256], 8192),
    falcon3("falcon3-3b", [3072, 9216, 22, 131_072], [12, 4, 256], 4096),
    falcon3("falcon3-7b", [3072, 23_040, 28, 131_072], [12, 4, 256], 8192),
    falcon3("falcon3-10b", [3072, 23_040, 40, 131_072], [12, 4, 256], 32_768),
    falcon_e("falcon-e-1b", [2048, 9216, 24, 32_768]),
    falcon_e("falcon-e-3b", [2048, 13_312, 32, 32_768]),
    Shape {
        name: "embedding-0.6b",
        family: Family::Qwen3,
        sizes: [1024, 3072, 28, 151_936],
        heads: [16, 8, 128],
        context: 32_768,
        rope_theta: 1e6,
        rms_eps: 1e-6,
        activation: Activation::Silu,
        ..BASE
    },
    Shape {
        name: "embedding-270m",
        family: Family::Gemma3,
        sizes: [640, 2048, 18, 262_144],
        heads: [4, 1, 256],
        context: 32_768,
        rope_theta: 1e4,
        rms_eps: 1e-6,
        activation: Activation::GeluTanh,
        ..BASE
    },
    one_bit("125m", [768, 3072, 11], [12, 64]),
    one_bit("350m", [1024, 3072, 24], [16, 64]),
    one_bit("1b", [2048, 3584, 24], [32, 64]),
    one_bit("1.5b", [1536, 9216, 28], [32, 48]),
    one_bit("2.7b", [3072, 7680, 24], [32, 96]),
    one_bit("3.8b", [3840, 8192, 24], [32, 120]),
    one_bit("7b", [4096, 12_032, 32], [32, 128]),
    one_bit("13b", [5120, 13_824, 40], [40, 128]),
    one_bit("30b", [6656, 16_384, 60], [52, 128]),
    one_bit("70b", [8192, 24_576, 80], [64, 128]),
    one_bit("100b", [8192, 45_568, 72], [64, 128]),
];

/// Names of the published shapes that [`published`] knows.
pub const PUBLISHED: &[&str] = &{
    let mut names = [""; SHAPES.len()];
    let mut index = 0;
    while index < names.len() {
        names[index] = SHAPES[index].name;
        index += 1;
    }
    names
};

/// The config of a published model, by a name of [`PUBLISHED`].
///
/// - `2b4t`: microsoft/bitnet-b1.58-2B-4T. ReLU², sub-norms, tied head.
/// - `0.7b`, `1.3b`, `3b`: 1bitLLM/bitnet_b1_58-{large, xl, 3B}. The arithmetic of the same family with
///   SiLU for ReLU², as their configs say; of the 3B the head dimension is 100.
/// - `8b`: HF1BitLLM/Llama3-8B-1.58. SiLU, no sub-norms, a head of its own.
/// - `falcon3-1b` to `falcon3-10b`, `falcon-e-1b` and `-3b`: tiiuae's, of the same shape. The sizes of
///   Falcon-E are not from its configs, which could not be read.
/// - `embedding-0.6b`, `embedding-270m`: microsoft/bitnet-embedding, with a norm before each
///   projection; the smaller without a sliding window.
/// - `125m` to `100b`: the models that bitnet.cpp's papers measured speed with. None of them was ever
///   trained.
pub fn published(name: &str) -> Option<ModelConfig> {
    let shape = SHAPES.iter().find(|shape| shape.name == name)?;
    let ([hidden, ffn, layers, vocabulary], [query, kv, dim]) = (shape.sizes, shape.heads);
    Some(ModelConfig {
        family: shape.family,
        hidden,
        ffn,
        layers,
        heads: Heads { query, kv, dim },
        vocabulary,
        context: shape.context,
        rms_eps: shape.rms_eps,
        rope_theta: shape.rope_theta,
        activation: shape.activation,
        tied_head: shape.tied_head,
        attention: Attention::default(),
    })
}

/// A random model. The embedding table, and the head where it is not tied, are bf16 and made when
/// they are asked for; the caller holds them.
#[derive(Debug, Clone)]
pub struct SyntheticModel {
    config: ModelConfig,
    seed: u64,
}

impl SyntheticModel {
    /// A model of the given shape. The same config and seed give the same weights.
    pub fn new(config: ModelConfig, seed: u64) -> Result<Self, LoadError> {
        config.validate().map_err(|(field, expected, found)| LoadError::Option {
            option: field.to_owned(),
            expected,
            found,
        })?;
        Ok(Self { config, seed })
    }

    /// The hash key of a tensor.
    fn key(&self, tensor: Tensor) -> u64 {
        let (kind, layer) = match tensor {
            Tensor::Embedding => (0, 0),
            Tensor::Head => (1, 0),
            Tensor::Norm(NormRole::Final) => (2, 0),
            Tensor::Norm(NormRole::Attention(layer)) => (3, layer),
            Tensor::Norm(NormRole::AttentionSub(layer)) => (4, layer),
            Tensor::Norm(NormRole::Ffn(layer)) => (5, layer),
            Tensor::Norm(NormRole::FfnSub(layer)) => (6, layer),
            Tensor::Norm(NormRole::QueryHead(layer)) => (16, layer),
            Tensor::Norm(NormRole::KeyHead(layer)) => (17, layer),
            Tensor::Norm(NormRole::PostAttention(layer)) => (18, layer),
            Tensor::Norm(NormRole::PostFfn(layer)) => (19, layer),
            Tensor::Norm(NormRole::Projection(layer, projection)) => {
                (24 + projection as u64, layer)
            }
            Tensor::Ternary(layer, projection) => (8 + projection as u64, layer),
        };
        mix(self.seed ^ mix(kind << 32 | layer as u64))
    }

    /// The standard deviation of the table's entries, and with it of the logits (3, the norm
    /// before the head having brought its rows to unit size) and of the residual stream.
    fn table_deviation(&self) -> f32 {
        3.0 / (self.config.hidden as f32).sqrt()
    }

    fn table(&self, tensor: Tensor) -> HostTable {
        let (rows, cols) = (self.config.vocabulary, self.config.hidden);
        let key = self.key(tensor);
        // A uniform distribution on ±a has standard deviation a / √3.
        let step = self.table_deviation() * 3f32.sqrt() / 32_768.0;
        let row_bytes = cols * 2;
        let mut bytes = vec![0u8; rows * row_bytes];
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(rows);
        let part = rows.div_ceil(threads);
        std::thread::scope(|scope| {
            for (index, part_bytes) in bytes.chunks_mut(part * row_bytes).enumerate() {
                scope.spawn(move || {
                    for (offset, row) in part_bytes.chunks_mut(row_bytes).enumerate() {
                        fill_random(mix(key ^ (index * part + offset) as u64), row);
                        for element in row.as_chunks_mut::<2>().0 {
                            let uniform = f32::from(i16::from_le_bytes(*element)) + 0.5;
                            *element = half::bf16::from_f32(uniform * step).to_le_bytes();
                        }
                    }
                });
            }
        });
        HostTable { rows, cols, float: FloatType::Bf16, bytes: SharedBytes::new(bytes) }
    }

    /// The standard deviation that a projection's output is brought to, and that of its input.
    fn deviations(&self, projection: Projection) -> (f32, f32) {
        let sub_norm = self.config.projection_norm(0, projection).is_some();
        match projection {
            // Scores `q·k / √dim` get a standard deviation of 2: attention that is neither flat
            // nor on one key.
            Projection::Query | Projection::Key => (2f32.sqrt(), 1.0),
            Projection::Value | Projection::Gate | Projection::Up => (1.0, 1.0),
            // Every layer adds to the residual stream half of what the embedding put there.
            Projection::Output => (0.5 * self.table_deviation(), if sub_norm { 1.0 } else { 0.5 }),
            // The root mean square of silu(g)·u for normal g and u is 0.6.
            Projection::Down => (0.5 * self.table_deviation(), if sub_norm { 1.0 } else { 0.6 }),
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Tensor {
    Embedding,
    Head,
    Norm(NormRole),
    Ternary(usize, Projection),
}

impl WeightSource for SyntheticModel {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn ternary(
        &self,
        layer: usize,
        projection: Projection,
    ) -> Result<Box<dyn TernaryRows + '_>, LoadError> {
        let (rows, cols) = self.config.shape(projection);
        let (output, input) = self.deviations(projection);
        let scale = output / (input * (NON_ZERO * cols as f32).sqrt());
        Ok(Box::new(SyntheticRows {
            rows,
            cols,
            scale,
            key: self.key(Tensor::Ternary(layer, projection)),
        }))
    }

    fn norm(&self, role: NormRole) -> Result<Vec<f32>, LoadError> {
        let mut bytes = vec![0u8; self.config.norm_width(role) * 2];
        fill_random(self.key(Tensor::Norm(role)), &mut bytes);
        let gains = bytes.as_chunks::<2>().0.iter().map(|b| {
            let random = u16::from_le_bytes(*b);
            let gain = 0.75 + f32::from(random >> 1) / 65_536.0;
            if role == NormRole::Final && random & 1 == 1 { -gain } else { gain }
        });
        Ok(gains.collect())
    }

    fn embedding(&self) -> Result<HostTable, LoadError> {
        Ok(self.table(Tensor::Embedding))
    }

    fn head(&self) -> Result<HostTable, LoadError> {
        Ok(self.table(if self.config.tied_head { Tensor::Embedding } else { Tensor::Head }))
    }
}

/// Random bytes below this are code 0, as many at the top code 2.
const THRESHOLD: u8 = 77;
/// The share of weights that are not 0.
const NON_ZERO: f32 = 2.0 * THRESHOLD as f32 / 256.0;

struct SyntheticRows {
    rows: usize,
    cols: usize,
    scale: f32,
    key: u64,
}

impl TernaryRows for SyntheticRows {
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    fn scale(&self) -> f32 {
        self.scale
    }
    fn read_codes(&self, row: usize, codes: &mut [u8]) {
        fill_random(mix(self.key ^ row as u64), codes);
        for code in codes {
            *code = u8::from(*code >= THRESHOLD) + u8::from(*code > 255 - THRESHOLD);
        }
    }
}

/// Fills `out` with random bytes that depend on the key alone. One 128-bit product for eight bytes
/// (the mixing step of wyhash, public domain).
fn fill_random(key: u64, out: &mut [u8]) {
    let word = |index: usize| {
        let a = key.wrapping_add((index as u64 + 1).wrapping_mul(0xa076_1d64_78bd_642f));
        let product = u128::from(a) * u128::from(a ^ 0xe703_7ed1_a0b4_28db);
        ((product >> 64) as u64 ^ product as u64).to_le_bytes()
    };
    let (words, rest) = out.as_chunks_mut::<8>();
    let count = words.len();
    for (index, eight) in words.iter_mut().enumerate() {
        *eight = word(index);
    }
    let last = word(count);
    rest.copy_from_slice(&last[..rest.len()]);
}

/// The finaliser of splitmix64 (public domain), a bijection.
fn mix(key: u64) -> u64 {
    let mut z = key.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> ModelConfig {
        let mut config = published("2b4t").expect("a published shape");
        config.vocabulary = 300;
        config.hidden = 130;
        config.ffn = 515;
        config.layers = 2;
        config.heads = Heads { query: 4, kv: 2, dim: 34 };
        config
    }

    #[test]
    fn published_shapes_are_valid() {
        for name in PUBLISHED {
            published(name).expect(name).validate().expect(name);
        }
        assert!(published("4b").is_none());
        let invalid = ModelConfig { ffn: 0, ..small() };
        assert!(SyntheticModel::new(invalid, 1).is_err());
    }

    /// Counts of the safetensors indexes of the checkpoints that have been read, and for the papers'
    /// models the bytes of ternary weights that their sizes give.
    #[test]
    fn shapes_have_their_published_sizes() {
        for (name, parameters) in [
            ("2b4t", 2_412_820_480),
            ("0.7b", 728_842_752),
            ("1.3b", 1_273_583_584),
            ("3b", 3_324_387_840),
            ("8b", 8_030_261_248),
            ("falcon3-1b", 1_669_408_768),
            ("falcon3-3b", 3_227_655_168),
            ("falcon3-7b", 7_455_550_464),
            ("falcon3-10b", 10_305_653_760),
            ("falcon-e-1b", 1_719_764_992),
            ("falcon-e-3b", 3_053_586_432),
        ] {
            assert_eq!(published(name).expect(name).parameters(), parameters, "{name}");
        }
        for (name, bytes) in [
            ("embedding-0.6b", 110_100_480),
            ("embedding-270m", 25_067_520),
            ("125m", 25_952_256),
            ("350m", 81_788_928),
            ("1b", 232_783_872),
            ("1.5b", 363_331_584),
            ("2.7b", 651_165_696),
            ("3.8b", 920_125_440),
            ("7b", 1_719_664_640),
            ("13b", 3_171_942_400),
            ("30b", 7_565_475_840),
            ("70b", 17_448_304_640),
            ("100b", 24_989_663_232),
        ] {
            assert_eq!(published(name).expect(name).ternary_parameters() / 4, bytes, "{name}");
        }
    }

    #[test]
    fn codes_are_deterministic_and_distributed_as_documented() {
        let model = SyntheticModel::new(small(), 7).expect("valid");
        let other = SyntheticModel::new(small(), 8).expect("valid");
        let read = |model: &SyntheticModel, layer, projection| -> Vec<Vec<u8>> {
            let rows = model.ternary(layer, projection).expect("generated");
            (0..rows.rows())
                .map(|row| {
                    let mut codes = vec![9; rows.cols()];
                    rows.read_codes(row, &mut codes);
                    codes
                })
                .collect()
        };
        let gate = read(&model, 0, Projection::Gate);
        assert_eq!(gate, read(&model, 0, Projection::Gate));
        assert_ne!(gate, read(&other, 0, Projection::Gate));
        assert_ne!(gate, read(&model, 1, Projection::Gate));
        assert_ne!(gate, read(&model, 0, Projection::Up));
        assert_ne!(gate[0], gate[1]);
        let all = gate.concat();
        let share = |code| all.iter().filter(|c| **c == code).count() as f64 / all.len() as f64;
        for (code, expected) in [(0, 77.0 / 256.0), (1, 102.0 / 256.0), (2, 77.0 / 256.0)] {
            assert!((share(code) - expected).abs() < 0.01, "code {code}: {}", share(code));
        }
    }

    #[test]
    fn tables_have_the_documented_deviation_whatever_the_threads() {
        let model = SyntheticModel::new(small(), 7).expect("valid");
        let table = model.embedding().expect("generated");
        let mut values = vec![0.0; table.rows * table.cols];
        table.float.decode(&table.bytes, &mut values);
        let square: f64 = values.iter().map(|v| f64::from(v * v)).sum();
        let deviation = (square / values.len() as f64).sqrt() * (table.cols as f64).sqrt();
        assert!((deviation - 3.0).abs() < 0.05, "{deviation}");
        assert_eq!(*model.head().expect("tied").bytes, *table.bytes);
        // Row 299 as one thread would make it.
        let mut row = vec![0u8; table.cols * 2];
        fill_random(mix(model.key(Tensor::Embedding) ^ 299), &mut row);
        let first = f32::from(i16::from_le_bytes([row[0], row[1]])) + 0.5;
        let step = model.table_deviation() * 3f32.sqrt() / 32_768.0;
        assert_eq!(table.row(299)[..2], half::bf16::from_f32(first * step).to_le_bytes());
    }

    #[test]
    fn gains_are_near_one_and_those_before_the_head_have_both_signs() {
        let model = SyntheticModel::new(small(), 7).expect("valid");
        for role in [NormRole::Attention(0), NormRole::AttentionSub(1), NormRole::FfnSub(0)] {
            assert!(model.norm(role).expect("gains").iter().all(|g| (0.75..1.25).contains(g)));
        }
        assert_eq!(model.norm(NormRole::AttentionSub(0)).expect("gains").len(), 136);
        let last = model.norm(NormRole::Final).expect("gains");
        let negative = last.iter().filter(|gain| **gain < 0.0).count();
        assert!((30..100).contains(&negative), "{negative} of 130");
    }
}
