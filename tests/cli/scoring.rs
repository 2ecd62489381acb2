//! score and perplexity, against transformers and against each other.

use serde_json::{Value, json};

use super::run::{fixture, line, parsed, trine, with_input};

fn listed(ids: &Value) -> String {
    let ids: Vec<String> = ids.as_array().unwrap().iter().map(ToString::to_string).collect();
    ids.join(",")
}

fn lines(args: &[&str], requests: &[Value]) -> Vec<Value> {
    let input: Vec<String> = requests.iter().map(ToString::to_string).collect();
    let args = ["score", "--jsonl"].iter().chain(args);
    with_input(args, input.join("\n").as_bytes()).good().lines().map(parsed).collect()
}

#[test]
fn one_request_is_the_same_on_the_command_line_and_as_a_line() {
    let one = line("score --ids 1,2,3,4 --greedy 5 --logits --nll --json").json();
    assert_eq!(one["tokens"].as_array().unwrap().len(), 5);
    assert_eq!(one["logits"].as_array().unwrap().len(), 1024);
    assert!(one["mean_nll"].as_f64().unwrap() > 0.0);
    let request = json!({"ids": [1, 2, 3, 4], "greedy": 5, "logits": true, "nll": true});
    assert_eq!(lines(&[], &[request]), [one]);
    let bare = line("score --ids 1 --nll --json").json();
    assert_eq!(bare, json!({"tokens": [], "logits": [], "mean_nll": null}));
    let text = line("score --ids 1,2 --greedy 2 --nll").good();
    assert!(text.contains("tokens: ") && text.contains("mean_nll: "), "{text}");
}

/// Several prompts as one ragged batch give, to the bit, what each gives alone.
#[test]
fn a_ragged_batch_is_its_prompts_alone() {
    let prompts =
        [json!([1, 2, 3]), json!([700]), json!((0..90).collect::<Vec<_>>()), json!([9, 8])];
    let request = |key: &str, value: Value| {
        let mut request = json!({"greedy": 6, "logits": true, "nll": true});
        request[key] = value;
        request
    };
    let alone: Vec<Value> = prompts.iter().map(|ids| request("ids", ids.clone())).collect();
    let together = request("prompts", json!(prompts));
    let answers = lines(&[], &[alone, vec![together]].concat());
    assert_eq!(answers[4]["results"], json!(answers[..4]));
    // More prompts than run at a time.
    let many = request("prompts", json!(vec![json!([5, 6, 7]); 40]));
    let results = lines(&[], &[many]).remove(0);
    let results = results["results"].as_array().unwrap();
    assert!(results.len() == 40 && results.iter().all(|result| *result == results[0]));
}

#[test]
fn a_bad_line_is_answered_with_an_error_and_the_rest_go_on() {
    let input = "{\"ids\":[1,2],\"nll\":true}\n\n{\"ids\":[1,9999]}\n{\"ids\":[-1]}\nnonsense\n\
                 {\"ids\":[1],\"prompts\":[[1]]}\n{\"prompts\":[]}\n{\"ids\":[1],\"n\":1}\n{}\n\
                 {\"ids\":[1,2],\"nll\":true}";
    let ran = with_input(["score", "--jsonl"], input.as_bytes());
    assert_eq!(ran.code, Some(2));
    ran.sentence(&["7 of 9 requests"]);
    let answers: Vec<Value> = ran.stdout.lines().map(parsed).collect();
    assert_eq!(answers.len(), 9);
    assert_eq!(answers[0], answers[8]);
    for (answer, part) in answers[1..8].iter().zip([
        "line 3: ids: expected tokens below the vocabulary, 1024, found 9999",
        "line 4: expected",
        "line 5: expected",
        "line 6: expected either ids or prompts",
        "line 7: prompts: expected at least one",
        "line 8: expected",
        "line 9: expected either ids or prompts",
    ]) {
        let error = answer["error"].as_str().unwrap();
        assert!(error.contains(part), "{part} in {error}");
    }
}

/// Greedy tokens, logits and likelihoods of every strict case that transformers has computed.
#[test]
fn strict_cases_agree_with_transformers() {
    for name in ["bitnet_packed", "bitnet_master_f32", "llama_bitlinear"] {
        let folder = fixture(name);
        let reference = parsed(&std::fs::read_to_string(folder.join("reference.json")).unwrap());
        for case in reference["cases"].as_array().unwrap() {
            if case["kind"] != "strict" {
                continue;
            }
            let greedy = case["greedy"].as_array().unwrap().len().to_string();
            let got = trine([
                "score",
                "--model",
                folder.to_str().unwrap(),
                "--ids",
                &listed(&case["ids"]),
                "--greedy",
                &greedy,
                "--logits",
                "--nll",
                "--json",
            ])
            .json();
            assert_eq!(got["tokens"], case["greedy"], "{name} {}", case["name"]);
            let nll = got["mean_nll"].as_f64().unwrap() - case["nll_mean"].as_f64().unwrap();
            assert!(nll.abs() < 2e-3, "{name}: {nll}");
            let expected = case["logits"].as_array().unwrap().iter().map(Value::as_f64);
            let worst = got["logits"].as_array().unwrap().iter().map(Value::as_f64).zip(expected);
            let worst = worst.map(|(a, b)| (a.unwrap() - b.unwrap()).abs()).fold(0.0, f64::max);
            assert!(worst < 2e-3, "{name} {}: logits differ by {worst}", case["name"]);
        }
    }
}

#[test]
fn perplexity_of_one_window_is_that_of_score() {
    let text = "Now is the winter of our discontent made glorious summer by this sun of York.";
    let value = with_input(["perplexity", "--json", "-"], text.as_bytes()).json();
    let ids = trine(["tokenize", "--json", "--plain", text]).json();
    let scored = trine(["score", "--nll", "--json", "--ids", &listed(&ids["ids"])]).json();
    let mean = value["mean_nll"].as_f64().unwrap();
    assert!((mean - scored["mean_nll"].as_f64().unwrap()).abs() < 1e-12);
    assert!((value["perplexity"].as_f64().unwrap() - mean.exp()).abs() < 1e-9);
    let tokens = value["tokens"].as_f64().unwrap();
    assert_eq!(tokens as usize, ids["ids"].as_array().unwrap().len() - 1);
    let bits = mean * tokens / std::f64::consts::LN_2 / text.len() as f64;
    assert!((value["bits_per_byte"].as_f64().unwrap() - bits).abs() < 1e-9);
    let plain = with_input(["perplexity", "-"], text.as_bytes()).good();
    assert!(plain.contains("perplexity") && plain.contains("bits per byte"));
}

#[test]
fn windows_score_each_token_once() {
    let text = "O, that this too too solid flesh would melt, thaw and resolve itself into a dew! ";
    let text = text.repeat(12);
    let mut counts = Vec::new();
    for args in [["-c", "256", "--stride", "128"], ["-c", "64", "--stride", "7"]] {
        let args = ["perplexity", "--json", "-"].into_iter().chain(args);
        counts.push(with_input(args, text.as_bytes()).json()["tokens"].clone());
    }
    let ids = with_input(["tokenize", "--json", "--plain", "--no-special"], text.as_bytes()).json();
    let count = json!(ids["ids"].as_array().unwrap().len());
    assert_eq!(counts, [count.clone(), count]);
    with_input(["perplexity", "-"], b"").refused(&["a token to score"]);
}
