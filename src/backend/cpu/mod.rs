//! The backend for processors.
//!
//! An op runs when it is recorded: its rows, features or tokens are split over a pool of threads,
//! and each part runs a kernel that is written once over a small vocabulary and compiled for
//! every [instruction set](Isa). Neither the number of threads, nor the instruction set, nor what
//! else is in a batch changes a bit of any result.

mod embed;
mod exp;
mod gate_norm_quantize;
mod isa;
mod kv;
mod lm_head;
mod low_rank;
mod memory;
mod packed;
mod paged_attention;
mod pool;
mod probe;
mod rms_norm;
mod rms_norm_quantize;
mod rope_append_kv;
mod sample;
mod score;
mod scratch;
mod simd;
mod softmax;
mod table;
mod ternary_matmul;

pub use isa::Isa;
pub use kv::KvCache;
pub use memory::Buffer;
pub use packed::TernaryMatrix;
pub use table::Table;

use super::{Backend, DeviceInfo, Element, KvLayout, Record, RecordStep, StepKey, ops};
use crate::error::{LoadError, RunError};
use crate::tensor::HostTable;
use crate::ternary::TernaryRows;
use isa::Token;
use pool::Pool;

/// Elements below which an op on floats stays on the calling thread: about 5 µs of work, which is
/// what waking another and waiting for it may cost.
const SMALL: usize = 1 << 14;

/// The most threads that may be asked for: more than any machine has cores, and few enough that an
/// operating system can start them.
pub const MAX_THREADS: usize = 1024;

/// How to run on the CPU; the default leaves every choice to the machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CpuOptions {
    /// Threads, the caller's included; one for each physical core that this process may use, if
    /// absent.
    pub threads: Option<usize>,
    /// Instruction set; if absent, what the environment variable `TRINE_ISA` names (`scalar`,
    /// `avx2`, `avx512vnni`), else the best.
    pub isa: Option<Isa>,
}

impl CpuOptions {
    /// This number of threads.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// This instruction set.
    pub fn isa(mut self, isa: Isa) -> Self {
        self.isa = Some(isa);
        self
    }
}

/// The processor as a device.
pub struct Cpu {
    info: DeviceInfo,
    isa: Isa,
    token: Token,
    pool: Pool,
    /// Tokens of the step, as [`ops::Embed`] finds them.
    tokens: Vec<u32>,
    /// Tiles of [`ops::PagedAttention`], and the states of their blocks.
    tiles: Vec<paged_attention::Tile>,
    states: Vec<f32>,
}

impl Cpu {
    /// Starts the threads.
    pub fn new(options: CpuOptions) -> Result<Self, LoadError> {
        let (isa, token) = Token::choose(options.isa)?;
        let threads = match options.threads {
            Some(threads) if !(1..=MAX_THREADS).contains(&threads) => {
                return Err(LoadError::Option {
                    option: "threads".to_owned(),
                    expected: format!("1 to {MAX_THREADS}"),
                    found: threads.to_string(),
                });
            }
            Some(threads) => threads,
            None => probe::cores(),
        };
        let pool = Pool::new(threads).map_err(|error| LoadError::Device {
            device: "cpu".to_owned(),
            reason: format!("{threads} threads could not be started: {error}"),
        })?;
        let plural = if threads == 1 { "thread" } else { "threads" };
        let description = format!("{}, {threads} {plural}, {isa}", probe::brand());
        let mut info = DeviceInfo::new("cpu", description);
        info.memory = memory::available();
        Ok(Self {
            info,
            isa,
            token,
            pool,
            tokens: Vec::new(),
            tiles: Vec::new(),
            states: Vec::new(),
        })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads in use, the caller's included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }
}

impl Backend for Cpu {
    type Buffer<T: Element> = Buffer<T>;
    type TernaryMatrix = TernaryMatrix;
    type Table = Table;
    type KvCache = KvCache;
    type Pending<T: Element> = Vec<T>;
    type Recorder<'r> = Recorder<'r>;

    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn allocate<T: Element>(&self, name: &'static str, len: usize) -> Result<Buffer<T>, LoadError> {
        Buffer::new(name, len)
    }

    fn len<T: Element>(&self, buffer: &Self::Buffer<T>) -> usize {
        buffer.len()
    }

    fn pack_ternary(&self, parts: &[&dyn TernaryRows]) -> Result<TernaryMatrix, LoadError> {
        self.pack(parts)
    }

    fn load_table(&self, table: HostTable) -> Result<Table, LoadError> {
        Ok(Table(table))
    }

    fn allocate_kv(&self, layout: KvLayout) -> Result<KvCache, LoadError> {
        KvCache::new(layout)
    }

    fn write<T: Element>(&mut self, buffer: &mut Buffer<T>, values: &[T]) -> Result<(), RunError> {
        ops::check_len("write", "buffer", values.len(), buffer.len())?;
        buffer[..values.len()].copy_from_slice(values);
        Ok(())
    }

    fn run(&mut self, _key: &StepKey, record: &mut RecordStep<'_, Self>) -> Result<(), RunError> {
        record(&mut Recorder { cpu: self })
    }

    fn fetch<T: Element>(&mut self, buffer: &Buffer<T>, len: usize) -> Result<Vec<T>, RunError> {
        ops::check_len("fetch", "buffer", len, buffer.len())?;
        Ok(buffer[..len].to_vec())
    }

    fn wait<T: Element>(&mut self, pending: Vec<T>) -> Result<Vec<T>, RunError> {
        Ok(pending)
    }
}

/// Runs each op as it is recorded.
pub struct Recorder<'r> {
    cpu: &'r mut Cpu,
}

impl Record<Cpu> for Recorder<'_> {
    fn embed(&mut self, op: ops::Embed<'_, Cpu>) -> Result<(), RunError> {
        self.cpu.embed(op)
    }
    fn rms_norm(&mut self, op: ops::RmsNorm<'_, Cpu>) -> Result<(), RunError> {
        self.cpu.rms_norm(op)
    }
    fn rms_norm_quantize(&mut self, op: ops::RmsNormQuantize<'_, Cpu>) -> Result<(), RunError> {
        self.cpu.rms_norm_quantize(op)
    }
    fn ternary_matmul(&mut self, op: ops::TernaryMatmul<'_, Cpu>) -> Result<(), RunError> {
        self.cpu.ternary_matmul(op)
    }
    fn low_rank(&mut self, op: ops::LowRank<'_, Cpu>) -> Result<(), RunError> {
        self.cpu.low_rank(op)
    }
    fn rope_append_kv(&mut self, op: ops::RopeAppendKv<'_, Cpu>) -> Result<(), RunError> {
        self.cpu.rope_append_kv(op)
    }
    fn paged_attention(&mut self, op: ops::PagedAttention<'_, Cpu>) -> Result<(), RunError> {
        self.cpu.paged_attention(op)
    }
    fn gate_norm_quantize(&mut self, op: ops::GateNormQuantize<'_, Cpu>) -> Result<(), RunError> {
        self.cpu.gate_norm_quantize(op)
    }
    fn lm_head(&mut self, op: ops::LmHead<'_, Cpu>) -> Result<(), RunError> {
        self.cpu.lm_head(op)
    }
    fn sample(&mut self, op: ops::Sample<'_, Cpu>) -> Result<(), RunError> {
        self.cpu.sample(op)
    }
    fn score(&mut self, op: ops::Score<'_, Cpu>) -> Result<(), RunError> {
        self.cpu.score(op)
    }
}
