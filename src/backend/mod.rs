//! The seam between the model and the devices.
//!
//! A [`Backend`] owns memory of fixed size and address, packs ternary matrices into the order its
//! kernels read, and runs fused [ops]. [`model`](crate::model) knows nothing else of a device, so
//! whoever adds one implements [`Backend`] and [`Record`] and touches nothing above them.
//!
//! # A step
//!
//! Work is enqueued, not called. The model writes the step's inputs ([`Backend::write`]), then runs
//! the step ([`Backend::run`]) by recording ops, then asks for a host copy of its results
//! ([`Backend::fetch`]) and may go on to enqueue the next step before it [waits](Backend::wait) for
//! that copy. Writes, runs and fetches take effect in the order of the calls.
//!
//! What a step records depends on its [`StepKey`] and on nothing else, so a backend may keep the
//! recording of a key (a captured graph, a resolved dispatch list) and replay it without calling
//! `record` again. Everything that changes from step to step lives in buffers. Sizes in a key are
//! rounded up; the rows added by that are marked by [`NONE`] and are no-ops in every op.
//!
//! # Rows and layouts
//!
//! All float buffers are f32 and row-major. Quantised rows start [`quantized_stride`] apart and are
//! zero beyond their width.

pub mod check;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod ops;
pub mod random;
pub mod reference;
pub mod select;
#[cfg(feature = "wgpu")]
pub mod wgpu;

use crate::error::{LoadError, RunError};
use crate::tensor::HostTable;
use crate::ternary::TernaryRows;

/// Marks an index that stands for nothing: a padding token, a slot that is not to be written, a
/// token that could not be sampled.
pub const NONE: u32 = u32::MAX;

/// Set in an entry of [`ops::Batch::tokens`] whose low bits are not a token but a lane: the input
/// is the token last sampled for that lane, which may not have reached the host yet.
pub const FROM_LANE: u32 = 1 << 31;

/// Tokens per page of the KV cache.
pub const PAGE_TOKENS: usize = 32;

/// Keys per block of attention. Blocks are aligned to absolute positions, so that a query's
/// arithmetic does not depend on how the prompt was cut.
pub const KEY_BLOCK: usize = 256;

/// The most alternatives that [`ops::Sample`] reports per row.
pub const MAX_LOGPROBS: usize = 20;

/// Elements between the starts of quantised rows of `width`: a multiple of 256, the largest unit
/// that any kernel consumes at once, so that kernels need no tail. The padding holds zeros.
pub fn quantized_stride(width: usize) -> usize {
    width.next_multiple_of(256)
}

/// A type that buffers hold.
pub trait Element: bytemuck::Pod + PartialEq + Default + Send + Sync + std::fmt::Debug {}
impl Element for f32 {}
impl Element for i8 {}
impl Element for i32 {}
impl Element for u32 {}
impl Element for ops::SampleRow {}

/// What kind of device this is, for people and for choosing.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// How a user names it: `cpu`, `cuda:0`.
    pub name: String,
    /// What it is: the model of the processor and the variant of the kernels.
    pub description: String,
    /// Bytes of memory that may be reserved, where that is known.
    pub memory: Option<u64>,
    /// Whether `run` returns before the step is done, so that enqueueing ahead gains something.
    pub asynchronous: bool,
    /// Steps that may be enqueued before the first of them is waited for: 2, or more where several
    /// steps go to the device at a time.
    pub steps_ahead: usize,
    /// Whether this is a GPU that a CPU imitates: right, but slower than the CPU backend.
    pub software: bool,
}

/// What a backend has done since it was opened, for benchmarks.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct Stats {
    /// Steps run.
    pub steps: u64,
    /// Kernels launched.
    pub dispatches: u64,
    /// Times that work was sent to the device.
    pub submits: u64,
    /// Time that the host spent on enqueueing, in seconds; waiting is not in it.
    pub host_seconds: f64,
}

impl DeviceInfo {
    /// A device of this name and description, synchronous, memory unknown.
    pub fn new(name: impl Into<String>, description: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            description: description.into(),
            memory: None,
            asynchronous: false,
            steps_ahead: 2,
            software: false,
        }
    }
}

/// How the output head is computed. All backends have [`Head::Full`], CUDA has all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Head {
    /// All logits, from the table in the type that the checkpoint has.
    #[default]
    Full,
    /// The best tokens of up to 8 rows, where a step wants nothing else: by bounds on all logits,
    /// from a copy of the table in int8, and the logits that may be the highest. The tokens are
    /// those of the full head, which does all other steps; what is read is about half. The copy
    /// takes half of the table's memory once more, beside embeddings that are a table of their own
    /// too. Not for tables of f32.
    Screened,
    /// All logits from a copy of the table in int8, with a scale for each of its rows, times rows
    /// of 15 bits; the sums are exact. The logits differ from those of the full head, and a row's
    /// are its own in any step. Memory as for a screened head. More than 8 rows read the copy
    /// again for every 8.
    Int8,
}

/// The element type of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KvType {
    /// Single precision: the mode of the exact tests.
    F32,
    /// Half precision, rounded to nearest even.
    F16,
    /// Eight bits, with a scale for the key and one for the value of each token and key/value head:
    /// the formula is at [`ops::RopeAppendKv`].
    Int8,
}

impl KvType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
            Self::Int8 => 1,
        }
    }

    /// Bytes of the scale of a key or of a value of one head; 0 where there is none.
    pub fn scale_size(self) -> usize {
        match self {
            Self::F32 | Self::F16 => 0,
            Self::Int8 => size_of::<f32>(),
        }
    }

    /// What a user calls it: `f32`, `f16`, `int8`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Int8 => "int8",
        }
    }
}

/// Shape of a paged KV cache: for each layer, `pages` pages of [`PAGE_TOKENS`] slots; slot `s` lies
/// in page `s / PAGE_TOKENS` and holds `kv_heads × head_dim` keys and as many values. The order
/// within a page is the backend's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// Layers of the model.
    pub layers: usize,
    /// Pages per layer; a page number means the same page in every layer.
    pub pages: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Element type.
    pub kv_type: KvType,
}

impl KvLayout {
    /// Bytes of the whole cache, `None` if that is beyond `usize`.
    pub fn bytes(&self) -> Option<usize> {
        let head = self.head_dim.checked_mul(self.kv_type.size())?;
        let head = head.checked_add(self.kv_type.scale_size())?;
        [2, self.pages, PAGE_TOKENS, self.kv_heads, head]
            .into_iter()
            .try_fold(self.layers, usize::checked_mul)
    }
}

/// The least magnitude that the scale of an int8 key or value is made of. See
/// [`ops::RopeAppendKv`].
pub const KV_FLOOR: f32 = 1e-30;

/// The sizes and options that a step is recorded for. Sizes are rounded up to buckets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StepKey {
    /// Rows of tokens.
    pub tokens: usize,
    /// Sequences.
    pub sequences: usize,
    /// Tokens that one sequence may bring: a bound for grids. With 1, token `t` is that of sequence
    /// `t`.
    pub queries: usize,
    /// Pages that the longest sequence may span: a bound for grids, not a row length.
    pub pages: usize,
    /// Rows that go through the output head.
    pub logit_rows: usize,
    /// What is done with the logits.
    pub logits: LogitUse,
    /// Whether the final-norm rows that go into the head are wanted on the host.
    pub hidden: bool,
}

/// What a step does with its logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LogitUse {
    /// They stay in their buffer (the last pass of them).
    Keep,
    /// There are none: rows are normed for the head and go no further.
    Absent,
    /// The highest logit wins; no options apply.
    Greedy,
    /// Sampled by the rows' options.
    Sample,
    /// Sampled by the rows' options, with log-probabilities.
    SampleLogprobs,
    /// Log-probabilities of given tokens.
    Score,
}

/// A device that runs the model. See the [module's documentation](self) for the contract.
pub trait Backend: Sized + 'static {
    /// Device memory of fixed size and address, freed on drop.
    type Buffer<T: Element>;
    /// A packed ternary matrix.
    type TernaryMatrix;
    /// An embedding table or output head, in the type of its checkpoint.
    type Table;
    /// A paged KV cache.
    type KvCache;
    /// A host copy that is on its way.
    type Pending<T: Element>;
    /// What records the ops of a step.
    type Recorder<'r>: Record<Self>;

    /// What this device is.
    fn info(&self) -> &DeviceInfo;

    /// What was done so far, where that is counted.
    fn stats(&self) -> Option<Stats> {
        None
    }

    /// What a size is rounded up to in a [`StepKey`]. A backend that keeps recordings answers the
    /// next of a few buckets; one that runs ops as they are recorded gains nothing from padding,
    /// which is the default.
    fn bucket(&self, size: usize) -> usize {
        size
    }

    /// Reserves `len` elements, all zero. `name` is for messages.
    fn allocate<T: Element>(
        &self,
        name: &'static str,
        len: usize,
    ) -> Result<Self::Buffer<T>, LoadError>;

    /// Elements of a buffer.
    fn len<T: Element>(&self, buffer: &Self::Buffer<T>) -> usize;

    /// Packs matrices of equal width into one, their rows below each other; each keeps its scale.
    fn pack_ternary(&self, parts: &[&dyn TernaryRows]) -> Result<Self::TernaryMatrix, LoadError>;

    /// Takes an embedding table or output head; a backend that shares memory with the host leaves
    /// the bytes where they are.
    fn load_table(&self, table: HostTable) -> Result<Self::Table, LoadError>;

    /// Reserves a KV cache.
    fn allocate_kv(&self, layout: KvLayout) -> Result<Self::KvCache, LoadError>;

    /// Sets the first `values.len()` elements, after all work enqueued so far.
    fn write<T: Element>(
        &mut self,
        buffer: &mut Self::Buffer<T>,
        values: &[T],
    ) -> Result<(), RunError>;

    /// Makes ready to run steps of this key (captures a graph, resolves dispatches). Called at
    /// load for the keys of decoding; the default does nothing. `record` may be called any number
    /// of times; ops recorded here must leave no trace that a later step could see.
    fn prepare(
        &mut self,
        key: &StepKey,
        record: &mut RecordStep<'_, Self>,
    ) -> Result<(), RunError> {
        let _ = (key, record);
        Ok(())
    }

    /// Enqueues a step. `record` records ops that depend on `key` alone; a backend that keeps the
    /// recording of a key need not call it.
    fn run(&mut self, key: &StepKey, record: &mut RecordStep<'_, Self>) -> Result<(), RunError>;

    /// Enqueues a copy of the first `len` elements to the host.
    fn fetch<T: Element>(
        &mut self,
        buffer: &Self::Buffer<T>,
        len: usize,
    ) -> Result<Self::Pending<T>, RunError>;

    /// Waits for a copy. Faults of earlier work surface here at the latest.
    fn wait<T: Element>(&mut self, pending: Self::Pending<T>) -> Result<Vec<T>, RunError>;

    /// [`fetch`](Self::fetch) and [`wait`](Self::wait) in one.
    fn read<T: Element>(
        &mut self,
        buffer: &Self::Buffer<T>,
        len: usize,
    ) -> Result<Vec<T>, RunError> {
        let pending = self.fetch(buffer, len)?;
        self.wait(pending)
    }
}

/// Records one step into a backend's recorder.
pub type RecordStep<'a, B> =
    dyn for<'r> FnMut(&mut <B as Backend>::Recorder<'r>) -> Result<(), RunError> + 'a;

/// The ops of a step, in the order they take effect. The formula of each is at its argument
/// struct in [`ops`]; [`reference`](mod@reference) is the same as code.
///
/// An op whose arguments do not fit each other answers [`RunError::Shape`]; the check is each
/// argument struct's `check` where there is one.
pub trait Record<B: Backend> {
    /// See [`ops::Embed`].
    fn embed(&mut self, op: ops::Embed<'_, B>) -> Result<(), RunError>;
    /// See [`ops::RmsNorm`].
    fn rms_norm(&mut self, op: ops::RmsNorm<'_, B>) -> Result<(), RunError>;
    /// See [`ops::RmsNormQuantize`].
    fn rms_norm_quantize(&mut self, op: ops::RmsNormQuantize<'_, B>) -> Result<(), RunError>;
    /// See [`ops::TernaryMatmul`].
    fn ternary_matmul(&mut self, op: ops::TernaryMatmul<'_, B>) -> Result<(), RunError>;
    /// See [`ops::LowRank`].
    fn low_rank(&mut self, op: ops::LowRank<'_, B>) -> Result<(), RunError>;
    /// See [`ops::RopeAppendKv`].
    fn rope_append_kv(&mut self, op: ops::RopeAppendKv<'_, B>) -> Result<(), RunError>;
    /// See [`ops::PagedAttention`].
    fn paged_attention(&mut self, op: ops::PagedAttention<'_, B>) -> Result<(), RunError>;
    /// See [`ops::GateNormQuantize`].
    fn gate_norm_quantize(&mut self, op: ops::GateNormQuantize<'_, B>) -> Result<(), RunError>;
    /// See [`ops::LmHead`].
    fn lm_head(&mut self, op: ops::LmHead<'_, B>) -> Result<(), RunError>;
    /// See [`ops::Sample`].
    fn sample(&mut self, op: ops::Sample<'_, B>) -> Result<(), RunError>;
    /// See [`ops::Score`].
    fn score(&mut self, op: ops::Score<'_, B>) -> Result<(), RunError>;
}
