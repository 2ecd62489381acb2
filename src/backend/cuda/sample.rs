//! [`Sample`]: greedy by many blocks for each row, else a block for each row; then the
//! log-probabilities, where they are wanted.

use std::rc::Rc;

use super::Cuda;
use super::launch::{Kernel, Launch, grid};
use super::memory::Owned;
use crate::backend::MAX_LOGPROBS;
use crate::backend::ops::{Sample, check_len};
use crate::error::RunError;

const OP: &str = "sample";

/// Threads that a row's block has in `sample.cu` and `score.cu`.
pub(super) const ROW_THREADS: u32 = 512;

const GREEDY: Kernel = Kernel::new::<GreedyArgs>("sample_greedy", 256);
const OPTIONS: Kernel = Kernel::new::<OptionsArgs>("sample", ROW_THREADS);
const LOGPROBS: Kernel =
    Kernel::new::<LogprobsArgs>("sample", ROW_THREADS).named("sample_logprobs");

pub(super) const KERNELS: &[Kernel] = &[GREEDY, OPTIONS, LOGPROBS];

/// Tokens of a row that a greedy block looks at; 8 for each thread.
pub(super) const PIECE: usize = 8 * 256;

/// The longest row whose sums the search for a cut can hold; see `sample.cu`.
const MOST: usize = 1 << 23;

/// `SampleGreedyArgs` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct GreedyArgs {
    logits: u64,
    options: u64,
    bests: u64,
    done: u64,
    tokens: u64,
    sampled: u64,
    logprobs: u64,
    first: u32,
    vocabulary: u32,
    pieces: u32,
    lanes: u32,
}

/// `SampleArgs` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct OptionsArgs {
    logits: u64,
    options: u64,
    bias_tokens: u64,
    bias_values: u64,
    history: u64,
    changed: u64,
    counts: u64,
    tokens: u64,
    sampled: u64,
    logprobs: u64,
    first: u32,
    vocabulary: u32,
    biases: u32,
    context: u32,
    histories: u32,
    lanes: u32,
}

/// `SampleLogprobsArgs` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct LogprobsArgs {
    logits: u64,
    options: u64,
    tokens: u64,
    logprobs: u64,
    top_tokens: u64,
    top_logprobs: u64,
    first: u32,
    vocabulary: u32,
}

/// Checks the op's arguments.
pub(super) fn check(op: &Sample<'_, Cuda>) -> Result<(), RunError> {
    let (rows, vocabulary, end) = (op.rows, op.vocabulary, op.first + op.rows);
    check_len(OP, "logits", rows * vocabulary, op.logits.len())?;
    check_len(OP, "sample_rows", end, op.batch.sample_rows.len())?;
    check_len(OP, "tokens", end, op.samples.tokens.len())?;
    check_len(OP, "logprobs", end, op.samples.logprobs.len())?;
    if op.logprobs {
        check_len(OP, "top_tokens", end * MAX_LOGPROBS, op.samples.top_tokens.len())?;
        check_len(OP, "top_logprobs", end * MAX_LOGPROBS, op.samples.top_logprobs.len())?;
    }
    if vocabulary > MOST {
        return Err(RunError::Shape {
            op: OP,
            argument: "vocabulary",
            expected: format!("at most {MOST} tokens"),
            found: vocabulary.to_string(),
        });
    }
    Ok(())
}

pub(super) fn launches(cuda: &mut Cuda, op: &Sample<'_, Cuda>) -> Result<Vec<Launch>, RunError> {
    check(op)?;
    if op.rows == 0 {
        return Ok(Vec::new());
    }
    let mut launches = vec![if op.greedy { greedy(cuda, op)? } else { with_options(cuda, op)? }];
    if op.logprobs {
        launches.push(logprobs(op));
    }
    Ok(launches)
}

/// Memory for the bests of pieces, and for how many of them are done.
pub(super) fn pieces(
    cuda: &mut Cuda,
    rows: usize,
    count: usize,
) -> Result<(Rc<Owned>, Rc<Owned>), RunError> {
    let bests = cuda.scratch("the best tokens of pieces", 8 * (rows * count) as u64)?;
    let done = cuda.scratch("the pieces that are done", 4 * rows as u64)?;
    Ok((bests, done))
}

fn greedy(cuda: &mut Cuda, op: &Sample<'_, Cuda>) -> Result<Launch, RunError> {
    let Sample { rows, batch, lanes, samples, .. } = op;
    let count = op.vocabulary.div_ceil(PIECE).max(1);
    let (bests, done) = pieces(cuda, *rows, count)?;
    let args = GreedyArgs {
        logits: op.logits.memory().address(),
        options: batch.sample_rows.memory().address(),
        bests: bests.address(),
        done: done.address(),
        tokens: samples.tokens.memory().address(),
        sampled: lanes.sampled.memory().address(),
        logprobs: samples.logprobs.memory().address(),
        first: op.first as u32,
        vocabulary: op.vocabulary as u32,
        pieces: count as u32,
        lanes: lanes.sampled.len() as u32,
    };
    let memory = [
        op.logits.memory(),
        batch.sample_rows.memory(),
        &bests,
        &done,
        samples.tokens.memory(),
        lanes.sampled.memory(),
        samples.logprobs.memory(),
    ];
    Ok(Launch::new(GREEDY, grid(rows * count), &args, &memory))
}

fn with_options(cuda: &mut Cuda, op: &Sample<'_, Cuda>) -> Result<Launch, RunError> {
    let Sample { batch, lanes, samples, .. } = op;
    let bytes = 4 * (op.rows * op.vocabulary) as u64;
    let changed = cuda.scratch("rows to sample from", bytes)?;
    let counts = cuda.scratch("counts of tokens", bytes)?;
    let args = OptionsArgs {
        logits: op.logits.memory().address(),
        options: batch.sample_rows.memory().address(),
        bias_tokens: batch.bias_tokens.memory().address(),
        bias_values: batch.bias_values.memory().address(),
        history: lanes.history.memory().address(),
        changed: changed.address(),
        counts: counts.address(),
        tokens: samples.tokens.memory().address(),
        sampled: lanes.sampled.memory().address(),
        logprobs: samples.logprobs.memory().address(),
        first: op.first as u32,
        vocabulary: op.vocabulary as u32,
        biases: batch.bias_tokens.len().min(batch.bias_values.len()) as u32,
        context: lanes.context as u32,
        histories: (lanes.history.len() / lanes.context.max(1)) as u32,
        lanes: lanes.sampled.len() as u32,
    };
    let memory = [
        op.logits.memory(),
        batch.sample_rows.memory(),
        batch.bias_tokens.memory(),
        batch.bias_values.memory(),
        lanes.history.memory(),
        &changed,
        &counts,
        samples.tokens.memory(),
        lanes.sampled.memory(),
        samples.logprobs.memory(),
    ];
    Ok(Launch::new(OPTIONS, grid(op.rows), &args, &memory))
}

fn logprobs(op: &Sample<'_, Cuda>) -> Launch {
    let Sample { batch, samples, .. } = op;
    let args = LogprobsArgs {
        logits: op.logits.memory().address(),
        options: batch.sample_rows.memory().address(),
        tokens: samples.tokens.memory().address(),
        logprobs: samples.logprobs.memory().address(),
        top_tokens: samples.top_tokens.memory().address(),
        top_logprobs: samples.top_logprobs.memory().address(),
        first: op.first as u32,
        vocabulary: op.vocabulary as u32,
    };
    let memory = [
        op.logits.memory(),
        batch.sample_rows.memory(),
        samples.tokens.memory(),
        samples.logprobs.memory(),
        samples.top_tokens.memory(),
        samples.top_logprobs.memory(),
    ];
    Launch::new(LOGPROBS, grid(op.rows), &args, &memory)
}
