//! The file of what was measured, which all processes of a machine read, and the right to write it.

use super::Key;
use crate::cuda::device::Properties;
use crate::cuda::ops::gemm::{Operands, Variant};
use crate::cuda::source::{HEADERS, SOURCES};
use crate::lock_file;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A choice as the file has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Choice {
    pub key: Key,
    pub name: String,
    pub halves: bool,
    pub variant: Variant,
}

/// By everything that a choice depends on: the device, what there is to choose from, the library's version, our kernels, and how many
/// rows were measured.
pub fn file_name(device: &Properties, (names, version): (&[&str], usize), rows: usize) -> PathBuf {
    let mut hash = blake3::Hasher::new();
    let numbers = [device.sm as usize, device.multiprocessors as usize, version, rows].map(|n| n.to_string());
    let sources = SOURCES.iter().chain(HEADERS).map(|source| source.text());
    let parts = std::iter::once(device.name.as_str()).chain(names.iter().copied());
    for part in parts.chain(numbers.iter().map(String::as_str)) {
        hash.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    sources.for_each(|text| {
        hash.update(text.as_bytes());
    });
    format!("products-sm_{}-{}.txt", device.sm, &hash.finalize().to_hex()[..16]).into()
}

/// The right to measure and to write down what was found: one process has it at a time, and loses it when it ends, however it ends.
pub fn lock(path: &Path, patience: Duration) -> std::io::Result<File> {
    std::fs::create_dir_all(path.parent().expect("a file in a folder"))?;
    lock_file(path, patience, || tracing::info!("another process measures products: waiting for what it finds"))
}

/// `BF16 4096 14336 plain cublasLt whole` and the eight words of the variant.
pub fn line(choice: &Choice) -> String {
    let Choice { key: Key { operands, n, k, gated }, name, halves, variant } = choice;
    let (gated, halves) = (if *gated { "gated" } else { "plain" }, if *halves { "halves" } else { "whole" });
    let words: Vec<String> = variant.0.iter().map(|word| format!("{word:x}")).collect();
    format!("{} {n} {k} {gated} {name} {halves} {}", operands.name(), words.join(" "))
}

/// The choices of a file; a line that is none is left out, and no file is none.
pub fn read(path: &Path) -> Vec<Choice> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(parse).collect()
}

fn parse(line: &str) -> Option<Choice> {
    let words: Vec<&str> = line.split(' ').collect();
    let [operands, n, k, gated, name, halves, rest @ ..] = words.as_slice() else { return None };
    let operands = Operands::ALL.into_iter().find(|known| known.name() == *operands)?;
    let one_of = |word: &str, [no, yes]: [&str; 2]| match word {
        _ if word == no => Some(false),
        _ if word == yes => Some(true),
        _ => None,
    };
    let key = Key { operands, n: n.parse().ok()?, k: k.parse().ok()?, gated: one_of(gated, ["plain", "gated"])? };
    let variant: Vec<u64> = rest.iter().map(|word| u64::from_str_radix(word, 16).ok()).collect::<Option<_>>()?;
    let halves = one_of(halves, ["whole", "halves"])?;
    Some(Choice { key, name: (*name).into(), halves, variant: Variant(variant.try_into().ok()?) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use std::time::Instant;

    /// One has it at a time; who waits gets it when it is let go of, or gives up.
    #[test]
    fn the_right_to_measure_is_one_processs() {
        let folder = std::env::temp_dir().join(format!("ridge-right-{}", std::process::id()));
        let path = folder.join("below/products.lock");
        let right = lock(&path, Duration::ZERO).unwrap();
        let begun = Instant::now();
        assert!(lock(&path, Duration::from_millis(50)).is_err());
        assert!(begun.elapsed() >= Duration::from_millis(50));
        let waiting = std::thread::spawn({
            let path = path.clone();
            move || lock(&path, Duration::from_secs(60)).map(|_| Instant::now())
        });
        std::thread::sleep(Duration::from_millis(60));
        let released = Instant::now();
        drop(right);
        assert!(waiting.join().unwrap().unwrap() >= released);
        std::fs::remove_dir_all(folder).unwrap();
    }

    /// Another library, device or number of rows is another file.
    #[test]
    fn files_are_named_by_what_choices_depend_on() {
        let device = Properties {
            name: "test".into(),
            sm: 90,
            multiprocessors: 132,
            shared_per_block: 227 << 10,
            memory_bytes: 1 << 34,
            l2_bytes: 1 << 25,
        };
        let name = file_name(&device, (&["own", "cublasLt"], 120_903), 2048);
        assert!(name.to_string_lossy().starts_with("products-sm_90-"), "{}", name.display());
        assert_eq!(name, file_name(&device.clone(), (&["own", "cublasLt"], 120_903), 2048));
        for other in [
            file_name(&Properties { name: "another".into(), ..device.clone() }, (&["own", "cublasLt"], 120_903), 2048),
            file_name(&device, (&["own"], 120_903), 2048),
            file_name(&device, (&["own", "cublasLt"], 130_101), 2048),
            file_name(&device, (&["own", "cublasLt"], 120_903), 1024),
        ] {
            assert_ne!(name, other);
        }
    }

    #[test]
    fn choices_are_written_and_read() {
        let key = Key { operands: Operands::Plain(DType::BF16), n: 4096, k: 14336, gated: false };
        let choice =
            Choice { key, name: "cublasLt".into(), halves: false, variant: Variant([0, 1, 2, 3, 4, 5, 6, 255]) };
        assert_eq!(line(&choice), "BF16 4096 14336 plain cublasLt whole 0 1 2 3 4 5 6 ff");
        assert_eq!(parse(&line(&choice)), Some(choice.clone()));
        let gated = Choice { key: Key { gated: true, ..key }, halves: true, ..choice };
        assert_eq!(parse(&line(&gated)), Some(gated.clone()));
        for operands in Operands::ALL {
            let other = Choice { key: Key { operands, ..key }, ..gated.clone() };
            assert_eq!(parse(&line(&other)), Some(other));
        }
        for bad in [
            "",
            "BF16 1 2 plain own whole",
            "Q4_K 1 2 plain own whole 0 0 0 0 0 0 0 0",
            "BF16 x 2 plain own whole 0 0 0 0 0 0 0 0",
            "FP8 1 2 plain own whole 0 0 0 0 0 0 0",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
