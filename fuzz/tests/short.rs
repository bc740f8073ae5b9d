//! Every target on inputs made of good ones: the short form of fuzzing, for every change.

use peak_alloc::PeakAlloc;
use ridge_fuzz::mutate::Mutator;
use ridge_fuzz::targets::{TARGETS, Target};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// What the latest panic said. Panics that the program catches are no findings, so none is printed.
static LATEST_PANIC: Mutex<String> = Mutex::new(String::new());

/// What one input may take: far above what any good one does, far below what would hurt a small machine.
const MAX_MEMORY: usize = 256 << 20;
/// An input that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(60);

fn number(variable: &str, default: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|e| panic!("{variable}={text}: {e}")),
        Err(_) => default,
    }
}

/// One test for all, because the memory in use is counted for the whole process.
#[test]
fn no_input_panics_hangs_or_takes_much_memory() {
    let (seed, times) = (number("RIDGE_FUZZ_SEED", 1), number("RIDGE_FUZZ_TIMES", 1));
    let only = std::env::var("RIDGE_FUZZ_TARGET").ok();
    std::panic::set_hook(Box::new(|panic| {
        *LATEST_PANIC.lock().expect("nothing panics while it is held") = panic.to_string();
    }));
    let mut findings = Vec::new();
    for target in TARGETS.iter().filter(|target| only.as_ref().is_none_or(|name| name == target.name)) {
        findings.extend(campaign(target, seed, u64::from(target.cases) * times));
    }
    drop(std::panic::take_hook());
    assert!(findings.is_empty(), "{} targets have defects:\n{}", findings.len(), findings.join("\n"));
}

/// Runs a target on a thread of its own until its first defect, which is described.
fn campaign(target: &'static Target, seed: u64, cases: u64) -> Option<String> {
    let (say, hear) = sync_channel(0);
    let began = std::time::Instant::now();
    let worker = std::thread::spawn(move || {
        let mut mutator = Mutator::new(seed, (target.seeds)(), target.shape);
        for case in 0..cases {
            let input = mutator.next_input();
            // Who listens has given up only if this input hung.
            let _ = say.send(input.clone());
            MEMORY.reset_peak_usage();
            let before = MEMORY.current_usage();
            if catch_unwind(AssertUnwindSafe(|| (target.run)(&input))).is_err() {
                let said = LATEST_PANIC.lock().expect("nothing panics while it is held").clone();
                return Some(format!("{} panics on case {case}: {}\n{said}", target.name, shown(&input)));
            }
            let taken = MEMORY.peak_usage().saturating_sub(before);
            if taken > MAX_MEMORY {
                return Some(format!("{} takes {taken} bytes for case {case}: {}", target.name, shown(&input)));
            }
        }
        None
    });
    let mut last = Vec::new();
    loop {
        match hear.recv_timeout(PATIENCE) {
            Ok(input) => last = input,
            Err(RecvTimeoutError::Timeout) => return Some(format!("{} hangs on {}", target.name, shown(&last))),
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    println!("{:20} {cases} inputs in {} ms", target.name, began.elapsed().as_millis());
    worker.join().expect("defects are caught")
}

/// The input as it can be pasted into a test.
fn shown(input: &[u8]) -> String {
    const MOST: usize = 2000;
    let more = if input.len() > MOST { format!("… ({} bytes)", input.len()) } else { String::new() };
    format!("b\"{}\"{more}", input[..input.len().min(MOST)].escape_ascii())
}

/// libFuzzer's targets are files; the table is what they are made from.
#[test]
fn libfuzzer_has_every_target() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("libfuzzer");
    let manifest = std::fs::read_to_string(folder.join("Cargo.toml")).expect("a manifest");
    for target in TARGETS {
        let file = folder.join("fuzz_targets").join(format!("{}.rs", target.name));
        let source = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        assert!(source.contains(&format!("run(\"{}\", bytes)", target.name)), "{}: {source}", file.display());
        assert!(
            manifest.contains(&format!("path = \"fuzz_targets/{}.rs\"", target.name)),
            "{} is not built",
            target.name
        );
    }
    let files = std::fs::read_dir(folder.join("fuzz_targets")).expect("a folder").count();
    assert_eq!(files, TARGETS.len(), "a file without a target");
}
