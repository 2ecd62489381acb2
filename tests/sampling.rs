//! What sampling options mean, through a session on the reference. The logits are chosen by the
//! tests, so that each case has one right answer or one right set of them.

mod common;

use std::collections::BTreeSet;

use common::markov::{Markov, TOKENS};
use common::model::{roomy, small_model};
use common::run::{generate, ids, load, part, sample_last, sampled_part, session, step};
use trine::backend::ops::SampleRow;
use trine::backend::reference::Reference;
use trine::engine::score::ScoreRequest;
use trine::engine::session::{Event, FinishReason};
use trine::engine::{SamplingParams, Session};
use trine::error::RunError;
use trine::model::batch::{Purpose, RowOptions};

/// Too low to be drawn, and finite.
const NEVER: f32 = -60.0;

fn open(model: &Markov) -> Session {
    session(Reference::new(), model, roomy())
}

/// Logits of a few tokens; the rest are never drawn.
fn logits(of: &[(usize, f32)]) -> [f32; TOKENS] {
    let mut logits = [NEVER; TOKENS];
    of.iter().for_each(|&(token, logit)| logits[token] = logit);
    logits
}

/// Tokens 0 to 4 with probabilities of 40, 30, 15, 10 and 5 %.
fn five() -> [f32; TOKENS] {
    let shares = [0.4f32, 0.3, 0.15, 0.1, 0.05];
    logits(&shares.map(f32::ln).into_iter().enumerate().collect::<Vec<_>>())
}

fn greedy() -> SamplingParams {
    SamplingParams::default()
}

fn warm() -> SamplingParams {
    SamplingParams { temperature: 1.0, ..greedy() }
}

fn answer(
    session: &mut Session,
    prompt: &[u32],
    tokens: usize,
    params: &SamplingParams,
) -> Vec<u32> {
    let params = SamplingParams { max_tokens: Some(tokens), ..params.clone() };
    ids(&generate(session, prompt, &params).unwrap())
}

/// How often each token is drawn as the first of an answer, over seeds.
fn counts(logits: [f32; TOKENS], draws: u64, params: &SamplingParams) -> [usize; TOKENS] {
    let mut session = open(&Markov::constant(logits));
    let mut counts = [0; TOKENS];
    for seed in 0..draws {
        let params = SamplingParams { seed: Some(seed), ..params.clone() };
        counts[answer(&mut session, &[9], 1, &params)[0] as usize] += 1;
    }
    counts
}

/// The tokens that are ever drawn. Every token of the tests' sets has a share of 4 % at least, so
/// that missing one in 600 draws has a chance of 1 in 10^10.
fn drawn(logits: [f32; TOKENS], params: &SamplingParams) -> BTreeSet<usize> {
    let counts = counts(logits, 600, params);
    (0..TOKENS).filter(|&token| counts[token] > 0).collect()
}

#[test]
fn the_model_gives_the_logits_that_were_chosen() {
    let chosen: Vec<[f32; TOKENS]> =
        (0..TOKENS).map(|t| std::array::from_fn(|v| (t * 31 + v * 7) as f32 / 8.0 - 9.3)).collect();
    let mut session = open(&Markov::new(chosen.clone()));
    for (token, expected) in chosen.iter().enumerate() {
        let request =
            ScoreRequest { ids: vec![3, token as u32], logits: true, ..ScoreRequest::default() };
        assert_eq!(session.score(&[request]).unwrap()[0].logits, expected);
    }
}

#[test]
fn temperature_zero_takes_the_highest_and_the_lowest_among_equals() {
    let mut session = open(&Markov::constant(logits(&[(2, 1.0), (5, 3.0), (6, 3.0), (11, 3.0)])));
    assert_eq!(answer(&mut session, &[0], 3, &greedy()), [5, 5, 5]);
    // What narrows the choice changes nothing, whatever the seed.
    let narrowed =
        SamplingParams { top_k: 2, top_p: 0.1, min_p: 0.9, seed: Some(4), choice: 3, ..greedy() };
    assert_eq!(answer(&mut session, &[0], 3, &narrowed), [5, 5, 5]);
    // Ties that a bias makes, or breaks.
    for (bias, expected) in [((2, 2.0), 2), ((2, 1.9), 5), ((5, -0.1), 6), ((11, 0.1), 11)] {
        let biased = SamplingParams { logit_bias: vec![bias], ..greedy() };
        assert_eq!(answer(&mut session, &[0], 1, &biased), [expected], "{bias:?}");
    }
    // The twin: with a temperature all three are drawn.
    let ties = logits(&[(2, 1.0), (5, 3.0), (6, 3.0), (11, 3.0)]);
    assert!(drawn(ties, &warm()).is_superset(&BTreeSet::from([5, 6, 11])));
}

/// Σ (observed − expected)² / expected over the tokens of `of`, relative to softmax(x / t).
fn chi_square(counts: &[usize], x: &[f32], temperature: f32, of: &[usize]) -> f64 {
    let weight = |token: usize| f64::from(x[token] / temperature).exp();
    let total: f64 = of.iter().map(|&token| weight(token)).sum();
    let draws = of.iter().map(|&token| counts[token]).sum::<usize>() as f64;
    of.iter()
        .map(|&token| {
            let expected = draws * weight(token) / total;
            (counts[token] as f64 - expected).powi(2) / expected
        })
        .sum()
}

#[test]
fn frequencies_are_those_of_softmax() {
    let x: [f32; TOKENS] = std::array::from_fn(|v| ((v * 5) % 16) as f32 / 4.0);
    let all: Vec<usize> = (0..TOKENS).collect();
    // The 99.99th percentile of chi-square with 15 degrees of freedom is 44.
    for temperature in [0.7, 1.0, 2.0] {
        let counts = counts(x, 4000, &SamplingParams { temperature, ..warm() });
        let fit = chi_square(&counts, &x, temperature, &all);
        assert!(fit < 44.0, "temperature {temperature}: {fit}, {counts:?}");
        let misfit = chi_square(&counts, &x, temperature * 1.4, &all);
        assert!(misfit > 100.0, "another temperature would not be noticed: {misfit}");
    }
    // What is left of the options shares the whole among itself.
    let counts = counts(x, 2000, &SamplingParams { top_k: 4, ..warm() });
    let kept: Vec<usize> = (0..TOKENS).filter(|&token| counts[token] > 0).collect();
    assert_eq!(kept, [3, 6, 9, 12], "those of the highest logits");
    let fit = chi_square(&counts, &x, 1.0, &kept);
    assert!(fit < 21.0, "99.99 % of 3 degrees of freedom: {fit}");
}

#[test]
fn top_k_top_p_and_min_p_keep_their_sets() {
    let set = |params: SamplingParams| drawn(five(), &params);
    let first = |count: usize| (0..count).collect::<BTreeSet<usize>>();
    assert_eq!(set(warm()), first(5));
    for (top_k, kept) in [(1, 1), (3, 3), (4, 4), (0, 5), (100, 5)] {
        assert_eq!(set(SamplingParams { top_k, ..warm() }), first(kept), "top-k {top_k}");
    }
    // Shares add up to 40, 70, 85, 95 and 100 %; the one that crosses the line is kept.
    for (top_p, kept) in
        [(0.01, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.94, 4), (1.0, 5)]
    {
        assert_eq!(set(SamplingParams { top_p, ..warm() }), first(kept), "top-p {top_p}");
    }
    // Against the highest share they are 1, 0.75, 0.375, 0.25 and 0.125.
    for (min_p, kept) in [(1.0, 1), (0.76, 1), (0.74, 2), (0.36, 3), (0.13, 4), (0.12, 5), (0.0, 5)]
    {
        assert_eq!(set(SamplingParams { min_p, ..warm() }), first(kept), "min-p {min_p}");
    }
    // Equal ones by lowest token.
    let equal = logits(&[(3, 1.0), (4, 0.5), (8, 0.5), (12, 0.5)]);
    let two = drawn(equal, &SamplingParams { top_k: 3, ..warm() });
    assert_eq!(two, BTreeSet::from([3, 4, 8]));
    let all = drawn(equal, &SamplingParams { min_p: 0.6, ..warm() });
    assert_eq!(all, BTreeSet::from([3, 4, 8, 12]));
}

/// Each case keeps another set, or picks another token, where two of the options change places.
#[test]
fn options_apply_in_their_order() {
    let first = |count: usize| (0..count).collect::<BTreeSet<usize>>();
    // min-p, then top-p: of 40, 30 and 15 % two make 81 % of what is left; of all it takes three.
    let params = SamplingParams { min_p: 0.3, top_p: 0.81, ..warm() };
    assert_eq!(drawn(five(), &params), first(2));
    assert_eq!(drawn(five(), &SamplingParams { top_p: 0.81, ..warm() }), first(3));
    // top-k, then top-p: of the best two the first has 57 %.
    let params = SamplingParams { top_k: 2, top_p: 0.55, ..warm() };
    assert_eq!(drawn(five(), &params), first(1));
    assert_eq!(drawn(five(), &SamplingParams { top_p: 0.55, ..warm() }), first(2));
    // Temperature, then min-p: the root of 0.375 is 0.61.
    let params = SamplingParams { temperature: 2.0, min_p: 0.55, ..warm() };
    assert_eq!(drawn(five(), &params), first(3));
    assert_eq!(drawn(five(), &SamplingParams { min_p: 0.55, ..warm() }), first(2));
    // Temperature, then top-p: flatter shares need more tokens.
    let params = SamplingParams { temperature: 2.0, top_p: 0.69, ..warm() };
    assert_eq!(drawn(five(), &params), first(3));
    // Bias, then temperature: 2 counts as 1, which is within a factor of e^1.5 of the others.
    let min_p = (-1.5f32).exp();
    let bias = SamplingParams { temperature: 2.0, min_p, logit_bias: vec![(3, 2.0)], ..warm() };
    assert_eq!(drawn([0.0; TOKENS], &bias).len(), TOKENS);
    let undivided = SamplingParams { temperature: 1.0, ..bias };
    assert_eq!(drawn([0.0; TOKENS], &undivided), BTreeSet::from([3]));

    // Bias, then repetition penalty: 1 − 2 is negative, so it is doubled to −2; the other way round
    // it would be 1/2 − 2.
    let mut biased = open(&Markov::constant(logits(&[(3, 1.0), (7, -1.75)])));
    let params =
        SamplingParams { logit_bias: vec![(3, -2.0)], repetition_penalty: 2.0, ..greedy() };
    assert_eq!(answer(&mut biased, &[3], 1, &params), [7]);
    assert_eq!(answer(&mut biased, &[0], 1, &params), [3], "not penalised: −1");
    // Repetition, then presence: 4/2 − 1, not (4 − 1)/2.
    let mut chain = vec![logits(&[(4, 9.0)]); TOKENS];
    chain[4] = logits(&[(4, 4.0), (7, 1.25)]);
    let mut chain = open(&Markov::new(chain));
    let params = SamplingParams { repetition_penalty: 2.0, presence_penalty: 1.0, ..greedy() };
    assert_eq!(answer(&mut chain, &[0], 2, &params), [4, 7]);
    let less = SamplingParams { presence_penalty: 0.7, ..params };
    assert_eq!(answer(&mut chain, &[0], 2, &less), [4, 4], "4/2 − 0.7 is more than 1.25");
}

#[test]
fn penalties_count_prompt_and_answer_as_documented() {
    let mut session = open(&Markov::constant(logits(&[(3, 1.0), (5, 0.35)])));
    let prompts: [&[u32]; 2] = [&[0], &[3, 3, 3, 3, 0]];
    for prompt in prompts {
        // Once per occurrence in the answer, whatever the prompt holds.
        let frequency = SamplingParams { frequency_penalty: 0.2, ..greedy() };
        assert_eq!(answer(&mut session, prompt, 7, &frequency), [3, 3, 3, 3, 5, 3, 5]);
        // Once, however often it occurs.
        let presence = SamplingParams { presence_penalty: 0.7, ..greedy() };
        assert_eq!(answer(&mut session, prompt, 4, &presence), [3, 5, 3, 3]);
        assert_eq!(answer(&mut session, prompt, 4, &greedy()), [3, 3, 3, 3]);
    }
    // In the prompt or in the answer, once.
    let repetition = SamplingParams { repetition_penalty: 4.0, ..greedy() };
    assert_eq!(answer(&mut session, &[0], 3, &repetition), [3, 5, 3]);
    assert_eq!(answer(&mut session, &[3, 3, 3, 0], 3, &repetition), [5, 3, 3]);
    // Below 1 it encourages; negative penalties do too.
    let encouraged = SamplingParams { repetition_penalty: 0.1, ..greedy() };
    assert_eq!(answer(&mut session, &[5, 0], 1, &encouraged), [5]);
    // Negative logits are multiplied.
    let mut negative = open(&Markov::constant(logits(&[(3, -1.0), (5, -1.5)])));
    let double = SamplingParams { repetition_penalty: 2.0, ..greedy() };
    assert_eq!(answer(&mut negative, &[0], 1, &double), [3]);
    assert_eq!(answer(&mut negative, &[3, 0], 1, &double), [5]);
}

#[test]
fn a_bias_forces_and_forbids() {
    let biased = |bias: &[(u32, f32)], params: SamplingParams| {
        drawn(five(), &SamplingParams { logit_bias: bias.to_vec(), ..params })
    };
    assert_eq!(biased(&[(12, 200.0)], warm()), BTreeSet::from([12]));
    assert_eq!(biased(&[(0, -200.0), (2, -200.0)], warm()), BTreeSet::from([1, 3, 4]));
    assert_eq!(biased(&[(12, 200.0)], greedy()), BTreeSet::from([12]));
    assert_eq!(biased(&[(0, -200.0)], greedy()), BTreeSet::from([1]));
    // Several biases of one token add up.
    assert_eq!(biased(&[(0, -100.0), (0, 100.0)], greedy()), BTreeSet::from([0]));
}

#[test]
fn a_seed_gives_one_answer_and_its_parts_all_count() {
    let mut session = open(&Markov::constant([0.0; TOKENS]));
    let seeded = |seed, choice| SamplingParams { seed: Some(seed), choice, ..warm() };
    let base = answer(&mut session, &[1, 2], 12, &seeded(7, 0));
    assert_eq!(answer(&mut session, &[1, 2], 12, &seeded(7, 0)), base);
    assert_eq!(
        answer(&mut open(&Markov::constant([0.0; TOKENS])), &[1, 2], 12, &seeded(7, 0)),
        base
    );
    // All logits are equal, so the draws are noise alone: of seed, choice and position.
    assert_ne!(answer(&mut session, &[1, 2], 12, &seeded(8, 0)), base);
    assert_ne!(answer(&mut session, &[1, 2], 12, &seeded(7 | 1 << 32, 0)), base);
    assert_ne!(answer(&mut session, &[1, 2], 12, &seeded(7, 1)), base);
    assert!(base.iter().collect::<BTreeSet<_>>().len() > 4, "positions draw differently: {base:?}");
    // By position in the sequence, not in the answer.
    assert_eq!(answer(&mut session, &[1, 2, 3], 11, &seeded(7, 0)), base[1..]);

    // Without a seed every answer has one of its own, which is reported and can be used again.
    let unseeded = |session: &mut Session| {
        let params = SamplingParams { max_tokens: Some(12), ..warm() };
        let mut tokens = Vec::new();
        for event in session.generate(&[1, 2], &params).unwrap() {
            match event.unwrap() {
                Event::Token(token) => tokens.push(token.id),
                Event::Prompt { .. } => {}
                Event::Done { usage, .. } => return (usage.seed, tokens),
                other => panic!("{other:?}"),
            }
        }
        panic!("an answer ends with Done");
    };
    let (seed, tokens) = unseeded(&mut session);
    assert_ne!(unseeded(&mut session), (seed, tokens.clone()));
    assert_eq!(answer(&mut session, &[1, 2], 12, &seeded(seed, 0)), tokens);
}

#[test]
fn a_seed_gives_the_same_answer_in_a_batch() {
    let model = small_model();
    let prompt = [5, 6, 7];
    let params = SamplingParams { seed: Some(3 << 32 | 9), choice: 2, top_k: 30, ..warm() };
    let mut alone = session(Reference::new(), &model, roomy());
    let expected = answer(&mut alone, &prompt, 6, &params);

    let row = SampleRow {
        prompt: 3,
        temperature: 1.0,
        top_k: 30,
        top_p: 1.0,
        repetition_penalty: 1.0,
        seed_low: 9,
        seed_high: 3,
        choice: 2,
        ..SampleRow::default()
    };
    let options = |lane: usize| {
        let row = if lane == 1 { row } else { SampleRow { seed_low: lane as u32, ..row } };
        RowOptions { row, biases: vec![] }
    };
    let mut executor = load(Reference::new(), &model, roomy());
    let mut found: Vec<Vec<u32>> = vec![vec![]; 3];
    for n in 0..6 {
        let parts = (0..3)
            .map(|lane| {
                let pages = [lane as u32];
                let part = match n {
                    0 => part(lane, 0, &prompt, &pages),
                    _ => sampled_part(lane, prompt.len() + n - 1, &pages),
                };
                sample_last(part, &options(lane))
            })
            .collect();
        let output = step(&mut executor, parts, Purpose::Sample { logprobs: false }).unwrap();
        found.iter_mut().zip(output.tokens).for_each(|(found, token)| found.push(token));
    }
    assert_eq!(found[1], expected);
    assert!(found[0] != expected && found[2] != expected);
}

#[test]
fn logprobs_are_those_of_the_unmodified_logits() {
    let chain: Vec<[f32; TOKENS]> = (0..TOKENS)
        .map(|t| std::array::from_fn(|v| ((t * 7 + v * 11) % 17) as f32 / 4.0))
        .collect();
    let mut session = open(&Markov::new(chain.clone()));
    let params = SamplingParams {
        temperature: 1.7,
        top_k: 9,
        repetition_penalty: 1.5,
        frequency_penalty: 0.5,
        logit_bias: vec![(3, 2.0), (0, -1.0)],
        seed: Some(1),
        logprobs: Some(5),
        max_tokens: Some(10),
        ..greedy()
    };
    let tokens = generate(&mut session, &[2], &params).unwrap();
    let mut last = 2;
    for token in &tokens {
        let x = &chain[last];
        let log_sum = x.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        let logprob = |token: u32| (f64::from(x[token as usize]) - log_sum) as f32;
        assert!((token.logprob.unwrap() - logprob(token.id)).abs() < 1e-6);
        let mut order: Vec<u32> = (0..TOKENS as u32).collect();
        order.sort_by(|&a, &b| x[b as usize].total_cmp(&x[a as usize]).then(a.cmp(&b)));
        assert_eq!(token.top.len(), 5);
        for (&(top, found), expected) in token.top.iter().zip(order) {
            assert_eq!(top, expected);
            assert!((found - logprob(top)).abs() < 1e-6);
        }
        last = token.id as usize;
    }
    // They change nothing about the answer, and come as they were asked for.
    let shape = |session: &mut Session, logprobs| {
        let params = SamplingParams { logprobs, ..params.clone() };
        let found = generate(session, &[2], &params).unwrap();
        assert_eq!(ids(&found), ids(&tokens));
        (found[0].logprob.is_some(), found[0].top.len())
    };
    assert_eq!(shape(&mut session, None), (false, 0));
    assert_eq!(shape(&mut session, Some(0)), (true, 0));
    assert_eq!(
        shape(&mut session, Some(20)),
        (true, TOKENS),
        "there are no more tokens than these"
    );
}

#[test]
fn logits_that_are_not_finite_are_an_error_and_leave_no_trace() {
    let mut model = Markov::constant(five());
    model.spoiled = Some(6);
    let mut session = open(&model);
    let good = answer(&mut session, &[1, 2, 3], 3, &greedy());
    for params in [greedy(), warm(), SamplingParams { logprobs: Some(1), ..greedy() }] {
        for prompt in [&[6][..], &[1, 6], &[1, 6, 2]] {
            let error = generate(&mut session, prompt, &params).unwrap_err();
            assert!(matches!(error, RunError::NonFinite { .. }), "{prompt:?}: {error}");
            assert_eq!(answer(&mut session, &[1, 2, 3], 3, &greedy()), good);
        }
    }
    let request = |ids: &[u32], logits, score_from| ScoreRequest {
        ids: ids.to_vec(),
        logits,
        score_from,
        greedy: 0,
    };
    for bad in [request(&[6, 1], false, Some(1)), request(&[6], true, None)] {
        let error = session.score(&[bad]).unwrap_err();
        assert!(matches!(error, RunError::NonFinite { .. }), "{error}");
    }
    assert_eq!(session.score(&[request(&[1, 2], true, Some(1))]).unwrap()[0].logprobs.len(), 1);
}

#[test]
fn a_stop_token_ends_the_answer_and_is_not_part_of_it() {
    // 1 → 2 → 3 → 4 → …
    let chain = (0..TOKENS).map(|t| logits(&[((t + 1) % TOKENS, 5.0)])).collect();
    let mut session = open(&Markov::new(chain));
    let run = |session: &mut Session, params: &SamplingParams| {
        let mut tokens = Vec::new();
        let mut end = None;
        for event in session.generate(&[1], params).unwrap() {
            match event.unwrap() {
                Event::Token(token) => tokens.push(token.id),
                Event::Prompt { .. } => {}
                Event::Done { reason, usage } => end = Some((reason, usage.generated)),
                other => panic!("{other:?}"),
            }
        }
        (tokens, end.unwrap())
    };
    let length = SamplingParams { max_tokens: Some(4), ..greedy() };
    assert_eq!(run(&mut session, &length), (vec![2, 3, 4, 5], (FinishReason::Length, 4)));
    let stop = SamplingParams { stop_tokens: vec![9, 4], ..length };
    assert_eq!(run(&mut session, &stop), (vec![2, 3], (FinishReason::StopToken(4), 3)));
    let last = SamplingParams { stop_tokens: vec![5], ..stop };
    assert_eq!(run(&mut session, &last), (vec![2, 3, 4], (FinishReason::StopToken(5), 4)));
}
