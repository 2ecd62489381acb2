//! Conversations through a pipe.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use super::run::{command, parsed, with_input};

fn turns(args: &[&str], input: &str) -> Vec<Value> {
    let args = ["chat", "--json", "-n", "12", "--temperature", "0"].iter().chain(args);
    with_input(args, input.as_bytes()).good().lines().map(parsed).collect()
}

#[test]
fn a_line_is_a_turn_and_history_is_kept() {
    let answers = turns(&[], "Hello\nWho are you?\n");
    assert_eq!(answers.len(), 2);
    assert_eq!(answers[0]["usage"]["cached_tokens"], 0);
    let alone = turns(&[], "Who are you?");
    let prompt = |answer: &Value| answer["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(prompt(&answers[1]) > prompt(&alone[0]), "the second turn holds the first");
    assert!(answers[1]["usage"]["cached_tokens"].as_u64().unwrap() > prompt(&answers[0]) / 2);
}

#[test]
fn reset_forgets() {
    let answers = turns(&[], "Hello\n/reset\nHello\n/exit\nnever\n");
    assert_eq!(answers.len(), 2);
    assert_eq!(answers[0]["tokens"], answers[1]["tokens"]);
    assert_eq!(answers[0]["usage"]["prompt_tokens"], answers[1]["usage"]["prompt_tokens"]);
    // The system prompt stays.
    let with_system = turns(&["-sys", "Be brief."], "Hello\n/reset\nHello\n");
    assert_eq!(with_system[0]["usage"]["prompt_tokens"], with_system[1]["usage"]["prompt_tokens"]);
    assert_ne!(with_system[0]["usage"]["prompt_tokens"], answers[0]["usage"]["prompt_tokens"]);
}

#[test]
fn a_pipe_gets_the_answers_and_nothing_else() {
    let json = turns(&[], "Hello\n");
    let args = ["chat", "-n", "12", "--temperature", "0"];
    let plain = with_input(args, b"/help\n\nHello\n/nonsense\n");
    assert!(plain.stderr.contains("/reset") && plain.stderr.contains("no command /nonsense"));
    assert!(!plain.stderr.contains('\u{1b}'));
    assert_eq!(
        plain.good().trim_end_matches('\n'),
        json[0]["text"].as_str().unwrap().trim_end_matches('\n')
    );
    assert_eq!(with_input(["chat"], b"").good(), "");
}

#[test]
fn a_turn_that_does_not_fit_is_refused_and_the_next_one_answered() {
    let long = "Alas, poor Yorick! ".repeat(60);
    let ran = with_input(["chat", "-n", "4", "-c", "64"], format!("{long}\nHello\n").as_bytes());
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("the context holds 64"), "{ran:?}");
    assert!(ran.stderr.contains("1 of 2 turns failed"), "{ran:?}");
    assert!(!ran.stdout.is_empty());
    let odd = with_input(["chat", "-n", "2"], b"caf\xe9\n");
    odd.refused(&["standard input, line 1", "UTF-8"]);
    let full = with_input(["chat", "-c", "48", "--ignore-eos"], b"Hello\n");
    assert!(full.stderr.contains("context of 48 tokens is full"), "{full:?}");
}

#[cfg(unix)]
fn interrupt(child: &Child) {
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
}

/// Every op is checked, which makes an answer of 200 tokens take seconds.
#[cfg(unix)]
fn slow_chat() -> Child {
    command()
        .args(["chat", "--check", "--ignore-eos", "-n", "200"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

#[cfg(unix)]
#[test]
fn an_interrupt_stops_the_answer_and_not_the_program() {
    let mut child = slow_chat();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"Hello\n").unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0]).unwrap();
    interrupt(&child);
    stdin.write_all(b"/help\n/exit\n").unwrap();
    drop(stdin);
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert!(stderr.contains("(stopped)") && stderr.contains("/reset"), "{stderr}");
    assert!(rest.len() < 300, "{rest}");
}

#[cfg(unix)]
#[test]
fn a_second_interrupt_ends_the_program() {
    let mut child = slow_chat();
    let mut stdout = child.stdout.take().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"Hello\n").unwrap();
    stdout.read_exact(&mut [0]).unwrap();
    // One stops the answer, the other finds the program waiting; or both find it answering.
    interrupt(&child);
    std::thread::sleep(std::time::Duration::from_millis(50));
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
}
