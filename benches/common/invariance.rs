//! Whether a sequence's logits depend on what else is in the step, or on how its prompt was cut.

use serde_json::json;

use crate::common::{Failure, line, print};
use crate::{Bench, Executor, any_token, greedy, pages, sampling};
use trine::backend::PAGE_TOKENS;
use trine::engine::open::STEP_TOKENS;
use trine::error::RunError;
use trine::model::batch::{Batch, BatchSequence, LogitRow, Purpose};

/// The most other sequences.
const OTHERS: usize = 256;

/// Positions of the watched token: within the first block of attention, and in the second.
const WATCHED: [usize; 2] = [40, 300];

/// Positions that each other sequence may take.
const OTHER_CONTEXT: usize = 96;

/// How the prompt is cut.
const CUTS: [usize; 6] = [STEP_TOKENS, 128, 100, 64, 33, 7];

struct Watch {
    executor: Executor,
    /// Its lane, the last one: it has the last row of the step, which is in the head's last pass.
    lane: usize,
    vocabulary: usize,
}

impl Watch {
    fn pages(&self, lane: usize) -> Vec<u32> {
        let each = OTHER_CONTEXT / PAGE_TOKENS;
        if lane < self.lane {
            return pages(lane, each);
        }
        let first = self.lane * each;
        (first..first + WATCHED[1].div_ceil(PAGE_TOKENS) + 1).map(|page| page as u32).collect()
    }

    /// Some tokens of a lane that follow what it has already; the last one goes through the head.
    fn part(&self, lane: usize, start: usize, count: usize) -> BatchSequence {
        BatchSequence {
            lane,
            start,
            tokens: (start..start + count).map(|at| any_token(lane, at, self.vocabulary)).collect(),
            pages: self.pages(lane),
            logits: vec![LogitRow { sample: None, ..greedy(count - 1) }],
        }
    }

    fn step(&mut self, sequences: Vec<BatchSequence>) -> Result<(), RunError> {
        let batch = Batch { sequences, purpose: Purpose::Score, hidden: false };
        self.executor.submit(&batch)?;
        self.executor.collect().map(|_| ())
    }

    /// Bits of the last row's logits, of a step of `rows` rows.
    fn last_logits(&mut self, rows: usize) -> Result<Vec<u32>, RunError> {
        let pass = self.executor.reserve().logit_rows(self.executor.config());
        let rows = (rows - 1) % pass + 1;
        let logits = self.executor.read_logits(rows)?;
        Ok(logits[(rows - 1) * self.vocabulary..].iter().map(|x| x.to_bits()).collect())
    }

    /// Tokens `from .. to` of the watched sequence, `cut` at a time; the last row's logits.
    fn prompt(&mut self, from: usize, to: usize, cut: usize) -> Result<Vec<u32>, RunError> {
        for start in (from..to).step_by(cut) {
            let part = self.part(self.lane, start, cut.min(to - start));
            self.step(vec![part])?;
        }
        self.last_logits(1)
    }

    /// How much of its context another sequence has: anything from nothing to all but a token.
    fn length(lane: usize) -> usize {
        lane * 37 % (OTHER_CONTEXT - 1)
    }

    /// The logits, and the token taken greedily, of the watched token at `position` among others.
    fn among(&mut self, position: usize, others: usize) -> Result<(Vec<u32>, u32), RunError> {
        let mut parts: Vec<BatchSequence> =
            (0..others).map(|lane| self.part(lane, Self::length(lane), 1)).collect();
        parts.push(self.part(self.lane, position, 1));
        for part in &mut parts {
            part.logits = vec![greedy(0)];
        }
        self.executor.submit(&sampling(parts.clone()))?;
        let token = self.executor.collect()?.tokens.last().copied().unwrap_or(u32::MAX);
        for part in &mut parts {
            part.logits[0].sample = None;
        }
        self.step(parts)?;
        Ok((self.last_logits(others + 1)?, token))
    }

    /// The same with prompts of other sequences in the step, as long as the step allows.
    fn among_prompts(&mut self, position: usize, others: usize) -> Result<Vec<u32>, RunError> {
        let room = self.executor.reserve().step_tokens - 1;
        let each = (room / others.max(1)).clamp(1, OTHER_CONTEXT);
        let mut parts: Vec<BatchSequence> =
            (0..others).map(|lane| self.part(lane, 0, each)).collect();
        parts.push(self.part(self.lane, position, 1));
        self.step(parts)?;
        self.last_logits(others + 1)
    }
}

pub(crate) fn run(bench: &Bench) -> Result<(), Failure> {
    // Reserves more for the others than they use, so that the watched one has room.
    let context = WATCHED[1] + PAGE_TOKENS;
    let executor = bench.load(context, OTHERS + 1, STEP_TOKENS.max(OTHERS + 1))?;
    let device = executor.device().clone();
    let few: Vec<usize> = [1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256].into();
    let all: Vec<usize> = (1..=OTHERS).collect();
    let others = bench.arguments.numbers("--others", if device.software { &few } else { &all })?;
    let vocabulary = executor.config().vocabulary;
    let mut watch = Watch { executor, lane: OTHERS, vocabulary };
    let most = others.iter().copied().max().unwrap_or(0).min(OTHERS);
    for lane in 0..most {
        let part = watch.part(lane, 0, Watch::length(lane).max(1));
        watch.step(vec![part])?;
    }
    let mut wrong = Vec::new();
    let mut from = 0;
    for position in WATCHED {
        watch.prompt(from, position, STEP_TOKENS)?;
        from = position;
        let (alone, token) = watch.among(position, 0)?;
        for &others in others.iter().filter(|&&others| others <= OTHERS) {
            let (logits, sampled) = watch.among(position, others)?;
            if logits != alone || sampled != token {
                wrong.push(json!({ "position": position, "others": others }));
            }
            // The prompts overwrite what the others had, with the same.
            if others.is_power_of_two() && watch.among_prompts(position, others)? != alone {
                wrong.push(json!({ "position": position, "others_with_prompts": others }));
            }
        }
    }
    let whole = watch.prompt(0, WATCHED[1], CUTS[0])?;
    for cut in CUTS {
        if watch.prompt(0, WATCHED[1], cut)? != whole {
            wrong.push(json!({ "cut": cut }));
        }
    }
    print(line(
        "invariance",
        &device.name,
        json!({
            "description": device.description,
            "model": bench.model,
            "positions": WATCHED,
            "others": others,
            "cuts": CUTS,
            "equal": wrong.is_empty(),
            "differ": wrong,
        }),
    ));
    if wrong.is_empty() { Ok(()) } else { Err("logits depend on what else is in the step".into()) }
}
