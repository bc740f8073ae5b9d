//! Where and when a benchmark ran, for the heads of reports.

use std::path::Path;

/// The processor's name as the system tells it.
pub fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("model name"));
    let name = line.and_then(|line| line.split_once(':')).map(|(_, name)| name.trim());
    name.filter(|name| !name.is_empty()).unwrap_or(std::env::consts::ARCH).to_owned()
}

/// Cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Today, in UTC, as `2026-11-20`.
pub fn date() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%d").to_string()
}

/// The command line, without folders and keys: a report says what ran, not where its author keeps files.
pub fn command() -> String {
    without_secrets(std::env::args_os().map(|arg| arg.to_string_lossy().into_owned())).join(" ")
}

/// Arguments as a report may show them: files without their folders, and no API key.
pub fn without_secrets(arguments: impl Iterator<Item = String>) -> Vec<String> {
    const KEY: &str = "--api-key";
    let mut key_follows = false;
    let mut show = |argument: String| match argument.split_once('=') {
        _ if std::mem::replace(&mut key_follows, argument == KEY) => "KEY".into(),
        Some((KEY, _)) => format!("{KEY}=KEY"),
        _ => without_folders(&argument),
    };
    arguments.map(&mut show).collect()
}

fn without_folders(argument: &str) -> String {
    let (flag, value) = match argument.split_once('=') {
        Some((flag, value)) if flag.starts_with("--") => (format!("{flag}="), value),
        _ => (String::new(), argument),
    };
    if value.contains("://") {
        return argument.to_owned();
    }
    let name = Path::new(value).file_name().map_or(value.into(), |name| name.to_string_lossy());
    format!("{flag}{name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_name_no_folders() {
        let check = |argument, want| assert_eq!(without_folders(argument), want);
        check("target/release/cluster", "cluster");
        check("/somewhere/models/llama-1b/", "llama-1b");
        check("--model=/models/a.gguf", "--model=a.gguf");
        check("--json", "--json");
        check("1,4,8", "1,4,8");
        check("http://localhost:8000/v1", "http://localhost:8000/v1");
        check("--url=http://localhost:8000/v1", "--url=http://localhost:8000/v1");
    }

    #[test]
    fn commands_hold_no_keys() {
        let line = ["/bin/cluster", "--api-key", "a", "--json", "--api-key=b"].map(str::to_owned);
        assert_eq!(without_secrets(line.into_iter()).join(" "), "cluster --api-key KEY --json --api-key=KEY");
    }

    #[test]
    fn dates_sort() {
        let date = date();
        assert!(date.len() == 10 && date.as_str() > "2025-01-01", "{date}");
    }
}
