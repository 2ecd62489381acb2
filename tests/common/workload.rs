//! What a session is asked, again and again, on one backend and another.

use trine::backend::ops::SampleRow;
use trine::engine::score::{ScoreRequest, Scored};
use trine::engine::session::Token;
use trine::engine::{SamplingParams, Session};

use super::rng::Rng;
use super::run::generate;

pub(crate) fn sampled(max_tokens: usize) -> SamplingParams {
    SamplingParams {
        temperature: 0.8,
        top_k: 20,
        repetition_penalty: 1.2,
        frequency_penalty: 0.3,
        logit_bias: vec![(1, 0.5)],
        seed: Some(11),
        logprobs: Some(3),
        max_tokens: Some(max_tokens),
        ..SamplingParams::default()
    }
}

pub(crate) fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams { max_tokens: Some(max_tokens), ..SamplingParams::default() }
}

/// Prompts of several lengths, greedy and sampled, some of which share a prefix, then scores.
pub(crate) fn workload(session: &mut Session) -> (Vec<Vec<Token>>, Vec<Scored>) {
    let vocabulary = session.config().vocabulary;
    let prompt = Rng::new(5).tokens(90, vocabulary);
    let answers = [(5, greedy(6)), (40, sampled(8)), (90, greedy(3)), (37, sampled(4))]
        .into_iter()
        .map(|(len, params)| generate(session, &prompt[..len], &params).unwrap())
        .collect();
    let requests: Vec<ScoreRequest> = [1, 2, 31, 33, 70]
        .map(|len| ScoreRequest {
            ids: prompt[..len].to_vec(),
            greedy: 2,
            logits: true,
            score_from: Some(1),
        })
        .into();
    (answers, session.score(&requests).unwrap())
}

/// Options of a row that is plainly greedy.
pub(crate) fn greedy_row() -> SampleRow {
    SampleRow { repetition_penalty: 1.0, top_p: 1.0, ..SampleRow::default() }
}
