//! Flags of recording: what a process writes so that `cluster replay` can make its decisions again.

use crate::size::parse_bytes;
use clap::Args;
use ridge_kvtransfer::shell::record::RecordOptions;
use std::path::PathBuf;

/// Whether and where decisions are recorded.
#[derive(Args, Debug, Clone)]
pub struct RecordArgs {
    /// Record every decision in this folder, for `cluster replay`: a file per machine and life of its process, readable for
    /// its owner alone, because users' prompts and answers are in it (as tokens).
    #[arg(long, env = "RIDGE_RECORD", value_name = "DIR")]
    pub record: Option<PathBuf>,
    /// Size at which a recording ends, such as 500MiB. Serving goes on.
    #[arg(long, env = "RIDGE_RECORD_LIMIT", value_name = "SIZE", value_parser = parse_bytes, default_value = "4GiB")]
    pub record_limit: u64,
}

impl RecordArgs {
    /// As the roles take it.
    pub fn options(&self) -> Option<RecordOptions> {
        self.record.clone().map(|folder| RecordOptions { folder, limit_bytes: self.record_limit })
    }

    /// The same as flags, for a child process.
    pub fn flags(&self) -> Vec<String> {
        let Some(folder) = &self.record else { return Vec::new() };
        vec![format!("--record={}", folder.display()), format!("--record-limit={}", self.record_limit)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        record: RecordArgs,
    }

    #[test]
    fn children_get_the_same_settings() {
        for flags in [&["x"][..], &["x", "--record", "some where"], &["x", "--record=r", "--record-limit", "5MiB"]] {
            let given = Line::try_parse_from(flags).expect("good flags").record;
            let again = Line::try_parse_from([vec!["x".to_owned()], given.flags()].concat()).expect("flags").record;
            assert_eq!(given.options(), again.options());
        }
        let given = Line::try_parse_from(["x", "--record=r", "--record-limit", "5MiB"]).expect("good flags").record;
        assert_eq!(given.options(), Some(RecordOptions { folder: "r".into(), limit_bytes: 5 << 20 }));
    }
}
