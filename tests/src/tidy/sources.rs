//! What no source file may contain, and what each must.

use super::{Tree, code_only};

/// The only files outside `kernels/` with unsafe code: owners of mapped memory, who asks how it is mapped, and those that name a
/// device's memory by addresses. Adding one is a decision.
const OWNERS_OF_MEMORY: [&str; 9] = [
    "model/src/kv.rs",
    "model/src/checkpoint/map.rs",
    "model/src/checkpoint/pagemap.rs",
    "model/src/cuda/pages.rs",
    "model/src/cuda/attending.rs",
    "model/src/cuda/graphs.rs",
    "model/src/cuda/pass.rs",
    "model/src/cuda/sampler.rs",
    "model/tests/cuda_sampling.rs",
];
/// Longest source file, in lines. Most should have 100 to 300.
const LINES_MAX: usize = 800;

/// Unsafe code lives in kernels and with the named owners of memory; every other crate forbids it.
pub fn unsafe_code(tree: &Tree) -> Vec<String> {
    let mut complaints = Vec::new();
    for (path, text) in tree.rust().filter(|(path, _)| !path.starts_with("kernels/")) {
        if OWNERS_OF_MEMORY.contains(&path) {
            continue;
        }
        let code = code_only(text);
        if let Some(line) = first_line(&code, |line| has_word(line, "unsafe")) {
            complaints.push(format!("{path}:{line}: unsafe code outside kernels and the owners of memory"));
        }
    }
    for member in tree.members().iter().filter(|member| *member != "kernels") {
        let owns = OWNERS_OF_MEMORY.iter().any(|path| path.starts_with(&format!("{member}/")));
        let wanted = if owns { "deny(unsafe_code)" } else { "forbid(unsafe_code)" };
        for root in ["lib.rs", "main.rs"].map(|root| format!("{member}/src/{root}")) {
            if tree.files.get(&root).is_some_and(|text| !code_only(text).contains(&format!("#![{wanted}]"))) {
                complaints.push(format!("{root} does not say #![{wanted}]"));
            }
        }
    }
    complaints
}

/// Nothing unfinished, no debugging, no test that is switched off.
pub fn unfinished(tree: &Tree) -> Vec<String> {
    let mut complaints = Vec::new();
    for (path, text) in tree.rust() {
        let code = code_only(text);
        for banned in ["todo!", "unimplemented!", "dbg!", "#[ignore"] {
            let holds = |line: &str| match banned.strip_suffix('!') {
                Some(name) => line.contains(banned) && has_word(line, name),
                None => line.contains(banned),
            };
            if let Some(line) = first_line(&code, holds) {
                complaints.push(format!("{path}:{line}: {banned}"));
            }
        }
    }
    complaints
}

/// Every queue has a limit.
pub fn unbounded(tree: &Tree) -> Vec<String> {
    let mut complaints = Vec::new();
    let shipped = |path: &str| !path.contains("/tests/") && !path.contains("/examples/");
    for (path, text) in tree.rust().filter(|(path, _)| shipped(path)) {
        let code = code_only(text);
        if let Some(line) =
            first_line(&code, |line| has_word(line, "unbounded_channel") || line.contains("mpsc::channel()"))
        {
            complaints.push(format!("{path}:{line}: an unbounded channel"));
        }
    }
    complaints
}

/// A file that is too long to be read is too long.
pub fn long_files(tree: &Tree) -> Vec<String> {
    tree.rust()
        .map(|(path, text)| (path, text.lines().count()))
        .filter(|(_, lines)| *lines > LINES_MAX)
        .map(|(path, lines)| format!("{path} has {lines} lines; {LINES_MAX} is the limit"))
        .collect()
}

/// Every file says first what it is for.
pub fn headers(tree: &Tree) -> Vec<String> {
    tree.rust()
        .filter(|(_, text)| !text.starts_with("//! "))
        .map(|(path, _)| format!("{path} does not open with //!"))
        .collect()
}

/// Number of the first line that fits, from 1.
fn first_line(code: &str, fits: impl Fn(&str) -> bool) -> Option<usize> {
    code.lines().position(fits).map(|index| index + 1)
}

fn has_word(line: &str, word: &str) -> bool {
    let part_of_word = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word)
        .any(|(at, _)| !line[..at].ends_with(part_of_word) && !line[at + word.len()..].starts_with(part_of_word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(rule: fn(&Tree) -> Vec<String>, path: &str, text: &str, want: usize) {
        let found = rule(&Tree::of(&[(path, text)]));
        assert_eq!(found.len(), want, "{path} {text}: {found:?}");
    }

    #[test]
    fn unsafe_code_is_found() {
        check(unsafe_code, "router/src/x.rs", "fn f() { unsafe { g() } }", 1);
        check(unsafe_code, "router/src/x.rs", "unsafe impl Send for X {}", 1);
        check(unsafe_code, "kernels/src/x.rs", "fn f() { unsafe { g() } }", 0);
        check(unsafe_code, "model/src/kv.rs", "fn f() { unsafe { g() } }", 0);
        check(unsafe_code, "router/src/x.rs", "// unsafe would be faster\n#![forbid(unsafe_code)]", 0);
        let root = |member: &str, text: &str| {
            let manifest = format!("members = [\"{member}\"]");
            unsafe_code(&Tree::of(&[("Cargo.toml", &manifest), (&format!("{member}/src/lib.rs"), text)])).len()
        };
        assert_eq!(root("router", "//! A router.\n"), 1);
        assert_eq!(root("router", "#![deny(unsafe_code)]"), 1);
        assert_eq!(root("router", "#![forbid(unsafe_code)]"), 0);
        assert_eq!(root("model", "#![deny(unsafe_code)]"), 0);
        assert_eq!(root("kernels", ""), 0);
    }

    #[test]
    fn unfinished_work_is_found() {
        check(unfinished, "a/src/x.rs", "fn f() { todo!() }", 1);
        check(unfinished, "a/src/x.rs", "unimplemented!();", 1);
        check(unfinished, "a/src/x.rs", "dbg!(x)", 1);
        check(unfinished, "a/tests/x.rs", "#[test]\n#[ignore = \"slow\"]\nfn t() {}", 1);
        check(unfinished, "a/src/x.rs", "// todo!()\nlet s = \"dbg!\"; my_dbg!(x)", 0);
    }

    #[test]
    fn unbounded_channels_are_found() {
        check(unbounded, "a/src/x.rs", "let c = mpsc::unbounded_channel();", 1);
        check(unbounded, "a/src/x.rs", "let c = mpsc::channel();", 1);
        check(unbounded, "a/src/x.rs", "let c = mpsc::channel(16);", 0);
    }

    #[test]
    fn long_and_headless_files_are_found() {
        check(long_files, "a/src/x.rs", &"x\n".repeat(801), 1);
        check(long_files, "a/src/x.rs", &"x\n".repeat(800), 0);
        check(headers, "a/src/x.rs", "fn f() {}", 1);
        check(headers, "a/src/x.rs", "//! What f is for.\nfn f() {}", 0);
    }
}
