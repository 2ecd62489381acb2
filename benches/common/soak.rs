//! Many steps, and whether anything is left behind by them.

use serde_json::json;

use crate::common::{Failure, free_memory, line, print, resident_memory};
use crate::{Bench, decode_step, drain, run_prompt};
use trine::backend::ops::SampleRow;
use trine::model::batch::{Batch, TokenSource};

/// Bytes by which memory may differ from one look to the next. A driver gives memory out in pieces
/// of 2 MiB, so a step that keeps any takes at least that in the end.
const DEVICE_DRIFT: u64 = 1 << 20;

/// The host's allocator is less exact; over 10,000 steps this is 400 bytes each.
const HOST_DRIFT: u64 = 4 << 20;

/// Looks at the memory.
const LOOKS: usize = 10;

/// Positions of a sequence before it starts again: several pages, and two blocks of attention.
const CONTEXT: usize = 320;

/// Runs `steps` decode steps.
pub(crate) fn run(bench: &Bench, steps: usize) -> Result<(), Failure> {
    let sequences = bench.arguments.numbers("--batches", &[8])?.into_iter().max().unwrap_or(1);
    let mut executor = bench.load(CONTEXT, sequences, sequences.max(64))?;
    let device = executor.device().name.clone();
    let each = executor.reserve().max_pages();
    let look = || (free_memory(&device), resident_memory());
    let (mut done, mut position, mut looks) = (0, CONTEXT, Vec::new());
    // A first part warms up: every page count was met, and every other kind of step.
    let warm = steps / LOOKS;
    let mut next_look = warm;
    while done < steps {
        if position == CONTEXT {
            // Starts again, with a prompt.
            position = 32;
            (0..sequences).try_for_each(|lane| run_prompt(&mut *executor, lane, position))?;
        }
        let count = (steps - done).min(CONTEXT - position).min(next_look.max(done + 1) - done);
        for step in 0..count {
            let mut batch = decode_step(sequences, position, each, &|_| TokenSource::Sampled);
            // Now and then with sampling options.
            if (done + step).is_multiple_of(97) {
                sample(&mut batch);
            }
            if executor.in_flight() >= executor.device().steps_ahead {
                executor.collect()?;
            }
            executor.submit(&batch)?;
            position += 1;
        }
        drain(&mut *executor)?;
        done += count;
        if done >= next_look {
            let (free, resident) = look();
            eprintln!("{done} of {steps} steps: {free:?} bytes free, {resident:?} bytes resident");
            looks.push((done, free, resident));
            next_look += warm.max(1);
        }
    }
    let (_, free, resident) = *looks.first().ok_or("there was no step")?;
    let lost = |now: Option<u64>| Some(free?.saturating_sub(now?));
    let grown = |now: Option<u64>| Some(now?.saturating_sub(resident?));
    let lost = looks.iter().filter_map(|&(_, free, _)| lost(free)).max();
    let grown = looks.iter().filter_map(|&(_, _, resident)| grown(resident)).max();
    let steady = lost.unwrap_or(0) <= DEVICE_DRIFT && grown.unwrap_or(0) <= HOST_DRIFT;
    print(line(
        "soak",
        &device,
        json!({
            "model": bench.model,
            "steps": steps,
            "sequences": sequences,
            "device_bytes_lost": lost,
            "host_bytes_grown": grown,
            "steady": steady,
            "looks": looks.iter().map(|&(steps, free, resident)| json!({
                "steps": steps, "device_bytes_free": free, "host_bytes_resident": resident,
            })).collect::<Vec<_>>(),
        }),
    ));
    if steady { Ok(()) } else { Err("memory drifts: its figures are in the line above".into()) }
}

fn sample(batch: &mut Batch) {
    for sequence in &mut batch.sequences {
        for options in sequence.logits.iter_mut().filter_map(|row| row.sample.as_mut()) {
            options.row = SampleRow {
                temperature: 0.8,
                top_k: 40,
                seed_low: sequence.lane as u32,
                ..options.row
            };
        }
    }
}
