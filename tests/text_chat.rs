//! Chat templates, against what transformers renders (`tools/make_text_golden.py`), and the limits
//! that they run in.

use std::path::Path;

use serde_json::Value;
use trine::error::{LoadError, SubmitError};
use trine::text::{ChatOptions, ChatTemplate, Message};

fn golden() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/text/chat_golden.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn template(source: &str) -> Result<ChatTemplate, LoadError> {
    ChatTemplate::new(Path::new("dir/chat_template.jinja"), source, Some("<s>"), Some("</s>"))
}

fn render(source: &str) -> Result<String, SubmitError> {
    let messages = [Message::new("user", "hi")];
    template(source).unwrap().render(&messages, &ChatOptions::default())
}

#[test]
fn templates_render_as_in_transformers() {
    let golden = golden();
    let now: chrono::NaiveDateTime = golden["now"].as_str().unwrap().parse().unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 130);
    let mut wrong = Vec::new();
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let conversation = case["conversation"].as_str().unwrap();
        let described = &golden["templates"][name];
        let template = ChatTemplate::with_clock(
            Path::new(name),
            described["source"].as_str().unwrap(),
            described["bos_token"].as_str(),
            described["eos_token"].as_str(),
            move || now,
        )
        .unwrap();
        let messages: Vec<Message> =
            serde_json::from_value(golden["conversations"][conversation].clone()).unwrap();
        let options = ChatOptions {
            add_generation_prompt: case["generation"].as_bool().unwrap(),
            tools: case["tools"].as_bool().unwrap().then(|| golden["tools"].clone()),
            ..Default::default()
        };
        let rendered = template.render(&messages, &options);
        match (case["text"].as_str(), rendered) {
            (Some(expected), Ok(text)) if text == expected => {}
            (Some(expected), Ok(text)) => {
                let differs = expected.lines().zip(text.lines()).find(|(a, b)| a != b);
                wrong.push(format!("{name}, {conversation}: {differs:?}"));
            }
            (None, Err(error)) => {
                let expected = case["error"].as_str().unwrap();
                let message = error.to_string();
                if case["raised"].as_bool().unwrap() && !message.ends_with(expected) {
                    wrong.push(format!("{name}, {conversation}: {message} instead of {expected}"));
                }
            }
            (expected, found) => {
                wrong.push(format!("{name}, {conversation}: {found:?} instead of {expected:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn broken_templates_are_sentences() {
    for source in
        ["{% if %}", "a\n{{ x", "{% for a in b %}", "{{ 1 + }}", "{% nonsense %}", "{% endif %}"]
    {
        let message = template(source).map(|_| ()).expect_err(source).to_string();
        assert!(
            message.starts_with("dir/chat_template.jinja: chat_template: expected"),
            "{message}"
        );
        assert!(message.contains("line "), "{message}");
    }
    for source in [
        "{{ messages.absent.deeper }}",
        "{{ nothing() }}",
        "{{ 'a' + 1 }}",
        "{{ 1 // 0 }}",
        "{{ 'a' | no_such_filter }}",
        "{{ strftime_now('%') }}",
        "{{ strftime_now('%!') }}",
        "{{ 'x'.rsplit('') }}",
        "{{ messages | tojson(width=3) }}",
        "{{ nothing | tojson }}",
        "{{ raise_exception() }}",
    ] {
        let message = render(source).expect_err(source).to_string();
        assert!(message.starts_with("messages: expected"), "{message}");
    }
    let message = render("a\n\n{{ raise_exception('Be polite.') }}").unwrap_err().to_string();
    assert!(message.ends_with(": Be polite."), "{message}");
    assert!(ChatTemplate::missing().to_string().contains("chat template"));
    // minijinja 3.0.5 panics here.
    let _: Result<String, SubmitError> = render("{{ ''[::-1] }}|{{ [][::-1] | list }}");
}

#[test]
fn templates_run_in_bounds() {
    let doubling = "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}";
    let unrolled = format!("{{% set s = 'xx' %}}{}", "{% set s = s + s %}".repeat(99));
    let lists = format!("{{% set s = ['xx'] %}}{}{{{{ s }}}}", "{% set s = [s, s] %}".repeat(99));
    let maps = format!(
        "{{% set s = 1 %}}{}{{{{ s | tojson }}}}",
        "{% set s = {'a': s, 'b': s} %}".repeat(99)
    );
    let with = format!("{{% set s = 'xx' %}}{}", "{% with s = s ~ s %}".repeat(60))
        + &"{% endwith %}".repeat(60);
    let literal = format!(
        "{{% set x %}}{{% for i in range(100000) %}}{}{{% endfor %}}{{% endset %}}",
        "y".repeat(100_000)
    );
    let body = format!(
        "{{% macro f() %}}{}{{% endmacro %}}{{% for i in range(100000) %}}{{% set x = f() %}}{{% endfor %}}",
        "y".repeat(100_000)
    );
    let variables: String = (0..100).map(|i| format!("{{% set x{i} = 'x' * 4000000 %}}")).collect();
    for source in [
        doubling,
        &unrolled,
        &lists,
        &maps,
        &with,
        &literal,
        &body,
        "{% set x = 'x' * 10**9 %}",
        "{{ 'x' * 10**9 }}",
        "{{ 'x' * 90000000 }}",
        "{{ range(10**9) | list }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}y{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'y' * 1000 }}{% endfor %}",
        "{% set x %}{% for a in range(99999) %}{{ 'y' * 10000 }}{% endfor %}{% endset %}",
        "{% macro f(s) %}{{ f(s) }}{% endmacro %}{{ f('x') }}",
        "{% macro f(s) %}{{ f(s ~ s) }}{% endmacro %}{{ f('xxxxxxxxxxxxxxxxxxxxxxxxxx') }}",
        "{% macro f(s) %}{% set s = s.replace('x', 'xxxxxxxxxxx') %}{{ f(s) }}{% endmacro %}{{ f('xxxxxx') }}",
        "{% for a in ['x'] recursive %}{{ loop([a, a, a]) }}{% endfor %}",
        "{{ '%999999999d' | format(1) }}",
        "{{ '%*d' | format(999999999, 1) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 999999999) }}",
        "{{ 'a\\nb\\nc' | indent(999999999) }}",
        "{{ 'a\\nb\\nc' | indent(width=999999999) }}",
        "{{ (range(99999) | list) | join('x' * 99999) }}",
        "{{ ('x' * 99999).join(range(99999)) }}",
        "{{ ('x' * 99999) | replace('x', 'x' * 99999) }}",
        "{{ ('x' * 99999).replace('x', 'x' * 99999) }}",
        "{{ [1] | slice(999999999) | list }}",
        "{{ [1] | batch(999999999, 'x') | list }}",
        // What one expression builds on the way.
        "{{ ('x' * 90000000) | length }}",
        "{{ (90000000 * 'x') | length }}",
        "{% set x = 'x' * 1000 %}{{ (x * 1000 * 1000) | length }}",
        "{% set x = 'x' * 4000000 %}{{ (x ~ x ~ x ~ x) | length }}",
        "{% set x = 'x' * 4000000 %}{{ (x + x + x + x) | length }}",
        "{% set x = 'x' * 4000000 %}{{ [x, x, x, x] | length }}",
        "{% set x = 'x' * 4000000 %}{{ ([x] * 4) | length }}",
        "{% set x = 'x' * 4000000 %}{{ (x | list) | length }}",
        "{% set x = 'x' * 4000000 %}{{ (x | sort) | length }}",
        "{% set x = 'x ' * 2000000 %}{{ x.split() | length }}",
        "{{ (['x' * 1000000] * 100) | map('upper') | list | length }}",
        "{{ (['x' * 1000] * 1000) | map('replace', 'x', 'x' * 1000) | list | length }}",
        "{{ debug() }}",
        &variables,
        // What costs time and builds nothing.
        "{% set x = 'x' * 4000000 %}{% set y = 'x' * 4000000 %}{% for i in range(99999) %}\
         {% for j in range(99) %}{% if x == y and y == x and x <= y %}{% endif %}{% endfor %}\
         {% endfor %}",
    ] {
        let start = std::time::Instant::now();
        let shown = &source[..source.len().min(120)];
        let message = match render(source) {
            Ok(text) => panic!("{shown} rendered {} bytes", text.len()),
            Err(error) => error.to_string(),
        };
        assert!(message.len() < 500, "{shown}: {message}");
        assert!(start.elapsed().as_secs() < 120, "{shown}: {:?}", start.elapsed());
    }
    assert_eq!(
        render("{{ '%3d|%s' | format(7, 'x') }}{{ '{:>3}|{a}{{}}'.format(7, a='y') }}").unwrap(),
        "  7|x  7|y{}"
    );
    let deep = format!("{}1{}", "(".repeat(100_000), ")".repeat(100_000));
    assert!(template(&format!("{{{{ {deep} }}}}")).is_err());
    assert!(template(&"{% if x %}".repeat(50_000)).is_err());
    assert!(template(&"x".repeat(2 << 20)).is_err());
    // The parser and the compiler of minijinja recurse on these without a limit.
    for source in [
        format!("{{{{ {}1 }}}}", "-".repeat(100_000)),
        format!("{{{{ {}a }}}}", "not ".repeat(100_000)),
        format!("{{{{ a{} }}}}", " ~ a".repeat(100_000)),
        format!("{{{{ a{} }}}}", ".a".repeat(100_000)),
        format!("{{{{ a{} }}}}", "|trim".repeat(100_000)),
        format!("{{{{ a{} }}}}", " if a else a".repeat(50_000)),
        format!("{{% if a %}}{}{{% endif %}}", "{% elif a %}".repeat(50_000)),
        format!("{{% filter trim{} %}}{{% endfilter %}}", "|trim".repeat(100_000)),
        format!("{{% set x | trim{} %}}{{% endset %}}", "|trim".repeat(100_000)),
        format!("{{% for a in b if {}c %}}{{% endfor %}}", "not ".repeat(100_000)),
        format!("{{% macro f(a={}1) %}}{{% endmacro %}}", "-".repeat(100_000)),
        format!("{{% call f({}1) %}}{{% endcall %}}", "-".repeat(100_000)),
        format!("{{% do f({}1) %}}", "-".repeat(100_000)),
        format!("{{% include {}1 %}}", "-".repeat(100_000)),
    ] {
        let message = template(&source).map(|_| ()).expect_err(&source[..40]).to_string();
        assert!(
            message.ends_with("line 1: an expression that is too long or too deep"),
            "{message}"
        );
    }
    // A long conversation is far from the limits.
    let golden = golden();
    let source = golden["templates"]["llama3-tools"]["source"].as_str().unwrap();
    let messages: Vec<Message> =
        (0..2000).map(|_| Message::new("user", "word ".repeat(200))).collect();
    let text = template(source).unwrap().render(&messages, &ChatOptions::generate()).unwrap();
    assert!(text.len() > 1_900_000);
}
