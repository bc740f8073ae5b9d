//! Chat templates of real models, read in place, against what transformers renders.
//!
//! `goldens/template_goldens.json` has hashes of transformers' output; `goldens/make_template_goldens.py` made it.

mod common;

use common::shared;
use ridge_model::template::{ChatTemplate, RenderOptions, TemplateError};
use serde_json::Value;

/// Templates that mix `|safe` with plain strings by `+`, on which Python HTML-escapes the plain ones (even in a prompt).
const ESCAPED_BY_PYTHON: [(&str, usize); 1] = [("llama.cpp/meetkai-functionary-medium-v3.1.jinja", 4)];

/// FNV-1a, which needs no library here or in the script.
fn hash(text: &str) -> String {
    let step = |state: u64, byte: u8| (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    format!("{:016x}", text.bytes().fold(0xcbf2_9ce4_8422_2325, step))
}

#[test]
fn templates_render_as_in_transformers() {
    let Some(folder) = shared("templates") else { return };
    let goldens = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/goldens/template_goldens.json"));
    let goldens: Value = serde_json::from_str(&goldens.expect("goldens are in the repository")).expect("JSON");
    let now = goldens["now"].as_str().expect("a time").parse().expect("a civil time");
    let (mut equal, mut refused, mut escaped, mut failures) = (0, 0, 0, Vec::new());
    for (name, results) in goldens["templates"].as_object().expect("templates") {
        let Ok(source) = std::fs::read_to_string(folder.join(name)) else {
            println!("skipped: {name} is not here");
            continue;
        };
        let template = match ChatTemplate::new(&source, "<s>", "</s>") {
            Ok(template) => template,
            Err(error) => {
                failures.push(format!("{name}: {error}"));
                continue;
            }
        };
        for case in goldens["cases"].as_array().expect("cases") {
            let case_name = case["name"].as_str().expect("a name");
            let options = RenderOptions {
                add_generation_prompt: case["add_generation_prompt"] == true,
                tools: Some(&case["tools"]).filter(|t| !t.is_null()),
                extra: case["extra"].as_object(),
                now: Some(now),
            };
            let rendered = template.render(&case["messages"], &options);
            let expected = &results[case_name];
            if std::env::var("RIDGE_DUMP_TEMPLATE").is_ok_and(|dump| dump == format!("{name}:{case_name}")) {
                println!("{}", rendered.as_deref().unwrap_or("an error"));
            }
            match (&rendered, expected["fnv1a"].as_str(), expected["raised"].as_str()) {
                (Ok(text), Some(golden), _) if hash(text) == golden => equal += 1,
                (Err(TemplateError::Raised(message)), _, Some(golden)) if message == golden => equal += 1,
                // Python could not run the template on this conversation: there is nothing to be equal to.
                (_, None, None) => refused += 1,
                (Ok(_), Some(_), _) if ESCAPED_BY_PYTHON.iter().any(|(known, _)| known == name) => escaped += 1,
                _ => failures.push(format!("{name}, {case_name}: wanted {expected}, got {rendered:?}")),
            }
        }
    }
    let different = failures.len();
    println!(
        "{equal} equal, {escaped} escaped by Python, {refused} that Python itself fails on, {different} different"
    );
    assert_eq!(escaped, ESCAPED_BY_PYTHON.iter().map(|(_, cases)| cases).sum::<usize>());
    let shown: Vec<String> = failures.iter().map(|f| f.chars().take(500).collect()).collect();
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), shown.join("\n"));
}
