//! What the demo model says on the CPU, and how far other devices must say the same.

use std::path::Path;

use trine::backend::cpu::{Cpu, CpuOptions};
use trine::backend::{KvType, PAGE_TOKENS};
use trine::checkpoint::{self, Checkpoint};
use trine::model::activations::Reserve;

use super::run::{generate, ids, keep_last, load, part, session, step_logits};
use super::workload::greedy;

/// Logits closer than this may change places between devices: an activation that rounds the other
/// way moves them by 0.1 to 0.5.
const NEAR_TIE: f32 = 0.8;

/// The greedy answer of the CPU to a prompt.
pub(crate) struct DemoText {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) reserve: Reserve,
    pub(crate) prompt: Vec<u32>,
    pub(crate) answer: Vec<u32>,
    /// Tokens in front of the first near-tie.
    pub(crate) sure: usize,
}

pub(crate) fn demo_text() -> DemoText {
    let checkpoint = checkpoint::open(Path::new("models/demo")).expect("opens");
    let reserve = Reserve {
        context: 128,
        sequences: 1,
        step_tokens: 128,
        kv_pages: 128 / PAGE_TOKENS,
        kv_type: KvType::F16,
    };
    let cpu = || Cpu::new(CpuOptions::default()).expect("a CPU");
    let prompt: Vec<u32> = (0..24).map(|i| 40 + i * 17 % 200).collect();
    let answer = generate(&mut session(cpu(), &checkpoint, reserve), &prompt, &greedy(64));
    let answer = ids(&answer.expect("generates"));
    // The margin at each token of the answer.
    let mut executor = load(cpu(), &checkpoint, reserve);
    let all: Vec<u32> = prompt.iter().chain(&answer).copied().collect();
    let pages: Vec<u32> = (0..reserve.kv_pages as u32).collect();
    let near_tie = (0..answer.len()).find(|&n| {
        let tokens = &all[..prompt.len() + n];
        let mut logits = step_logits(&mut executor, vec![keep_last(part(0, 0, tokens, &pages))]);
        logits.sort_by(|a, b| b.total_cmp(a));
        logits[0] - logits[1] < NEAR_TIE
    });
    let sure = near_tie.unwrap_or(answer.len());
    DemoText { checkpoint, reserve, prompt, answer, sure }
}
