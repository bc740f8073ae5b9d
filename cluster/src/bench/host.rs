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

/// The command line, without folders: a report says what ran, not where its author keeps files.
pub fn command() -> String {
    let arguments: Vec<String> = std::env::args_os().map(|arg| without_folders(&arg.to_string_lossy())).collect();
    arguments.join(" ")
}

fn without_folders(argument: &str) -> String {
    let (flag, value) = match argument.split_once('=') {
        Some((flag, value)) if flag.starts_with("--") => (format!("{flag}="), value),
        _ => (String::new(), argument),
    };
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
        check("/home/someone/models/llama-1b/", "llama-1b");
        check("--model=/models/a.gguf", "--model=a.gguf");
        check("--json", "--json");
        check("1,4,8", "1,4,8");
    }

    #[test]
    fn dates_sort() {
        let date = date();
        assert!(date.len() == 10 && date.as_str() > "2025-01-01", "{date}");
    }
}
