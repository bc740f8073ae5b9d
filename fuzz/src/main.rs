//! Writes the corpus that libFuzzer starts from, and repeats what it found.

#![forbid(unsafe_code)]

use ridge_fuzz::targets::{TARGETS, find};
use std::path::Path;
use std::process::ExitCode;

const USAGE: &str = "usage: ridge-fuzz                     list the targets
       ridge-fuzz corpus DIR          write good inputs into DIR/TARGET/
       ridge-fuzz run TARGET FILE...  run a target on files";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match arguments.as_slice() {
        [] => {
            TARGETS.iter().for_each(|target| println!("{:20} {}", target.name, target.input));
            Ok(())
        }
        ["corpus", folder] => corpus(Path::new(folder)),
        ["run", target, files @ ..] => run(target, files),
        _ => Err(USAGE.to_owned()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn corpus(folder: &Path) -> Result<(), String> {
    for target in TARGETS {
        let place = folder.join(target.name);
        std::fs::create_dir_all(&place).map_err(|e| format!("{}: {e}", place.display()))?;
        for (index, seed) in (target.seeds)().into_iter().enumerate() {
            let file = place.join(format!("seed-{index:02}"));
            std::fs::write(&file, seed).map_err(|e| format!("{}: {e}", file.display()))?;
        }
    }
    Ok(())
}

fn run(target: &str, files: &[&str]) -> Result<(), String> {
    let target = find(target).ok_or_else(|| format!("there is no target '{target}'; without arguments I list them"))?;
    for file in files {
        let bytes = std::fs::read(file).map_err(|e| format!("{file}: {e}"))?;
        (target.run)(&bytes);
        println!("{file}: no defect");
    }
    Ok(())
}
