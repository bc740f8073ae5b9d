//! The built-in model: what `cluster up --local` serves when it is told nothing, asked what its banner suggests.

mod support;

use ridge_tests::cluster::Cluster;
use serde_json::{Value, json};
use std::process::Command;
use std::sync::Arc;
use support::binary;

/// Exactly the README's command, but for the port and the folders.
fn demo() -> Cluster {
    let data = Arc::new(tempfile::tempdir().expect("a temp dir"));
    let mut command = Command::new(binary());
    command.args(["up", "--local", "--port", "0", "--drain-timeout", "5", "--data-dir"]).arg(data.path());
    command.env("XDG_CACHE_HOME", data.path().join("cache"));
    Cluster::spawn(command, data)
}

fn ask(cluster: &Cluster, question: &str) -> String {
    let request = json!({"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 200});
    let answer = cluster.client.post("/v1/chat/completions", &request).expect("an answer").ok();
    answer["choices"][0]["message"]["content"].as_str().expect("has content").to_owned()
}

#[test]
fn the_demo_model_answers_its_questions() {
    let cluster = demo();
    assert_eq!(cluster.model, "ridge-demo");
    let questions = include_str!("../../model/demo/questions.jsonl");
    let questions: Vec<Value> =
        questions.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect();
    assert!(questions.len() >= 40, "only {} questions", questions.len());
    for question in &questions {
        let asked = question["question"].as_str().expect("a question");
        let answer = ask(&cluster, asked);
        for fact in question["must_contain"].as_array().expect("facts") {
            let fact = fact.as_str().expect("a word");
            assert!(answer.to_lowercase().contains(&fact.to_lowercase()), "{asked}: {answer:?} lacks {fact:?}");
        }
    }
    cluster.wait_idle();
}

/// The `openai` client from the package index, if this machine has it.
#[test]
fn the_openai_client_streams_a_chat() {
    let python = std::env::var("RIDGE_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let has_client = Command::new(&python).args(["-c", "import openai"]).output().is_ok_and(|o| o.status.success());
    if !has_client {
        eprintln!("skipped: {python} has no module openai (pip install openai, or set RIDGE_TEST_PYTHON)");
        return;
    }
    let cluster = demo();
    let script = format!(
        r#"
from openai import OpenAI
client = OpenAI(base_url="http://{}/v1", api_key="none")
stream = client.chat.completions.create(
    model="ridge-demo", temperature=0, stream=True, stream_options={{"include_usage": True}},
    messages=[{{"role": "user", "content": "What is prefill?"}}])
pieces, usage = [], None
for chunk in stream:
    if chunk.choices:
        pieces.append(chunk.choices[0].delta.content or "")
    usage = chunk.usage or usage
assert len(pieces) > 5, pieces
assert usage.completion_tokens > 5, usage
print("".join(pieces))
"#,
        cluster.addr
    );
    let output = Command::new(&python).args(["-c", &script]).output().expect("python runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), ask(&cluster, "What is prefill?"));
}
