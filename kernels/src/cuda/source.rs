//! The texts of the kernels. Every back end compiles these and nothing else: NVRTC for a device, the host's C++ compiler for
//! the emulator.

/// A file below `kernels/cuda/`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Source {
    /// Its path there, such as `emulate/block.h`.
    pub name: &'static str,
    #[cfg(not(test))]
    text: &'static str,
}

/// In unit tests the files are read when they are asked for, so that changing a kernel does not mean compiling this crate again.
#[cfg(not(test))]
macro_rules! sources {
    ($($name:literal),* $(,)?) => {
        &[$(Source { name: $name, text: include_str!(concat!("../../cuda/", $name)) }),*]
    };
}
#[cfg(test)]
macro_rules! sources {
    ($($name:literal),* $(,)?) => { &[$(Source { name: $name }),*] };
}

impl Source {
    /// Its text.
    #[cfg(not(test))]
    pub fn text(&self) -> std::borrow::Cow<'static, str> {
        self.text.into()
    }

    /// Its text.
    #[cfg(test)]
    pub fn text(&self) -> std::borrow::Cow<'static, str> {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda").join(self.name);
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).into()
    }

    /// The file of this name.
    pub fn find(name: &str) -> Option<&'static Source> {
        SOURCES.iter().chain(HEADERS).chain(EMULATOR).find(|source| source.name == name)
    }
}

/// What is compiled, a unit each. Sorted.
pub const SOURCES: &[Source] = sources![
    "attention_decode.cu",
    "attention_prefill.cu",
    "attention_simt.cu",
    "attention_wgmma.cu",
    "dequant.cu",
    "gemm_fp8.cu",
    "gemm_mma.cu",
    "gemm_simt.cu",
    "gemm_wgmma.cu",
    "gemv_float.cu",
    "gemv_quant.cu",
    "gemv_quant_k.cu",
    "gemv_scaled.cu",
    "pack.cu",
    "pages.cu",
    "rows.cu",
    "sampling.cu",
    "selftest.cu",
];

/// What the units include. Sorted.
pub const HEADERS: &[Source] = sources![
    "attention.cuh",
    "attention_tile.cuh",
    "blocks.cuh",
    "common.cuh",
    "elements.cuh",
    "finish.cuh",
    "gemm_mma.cuh",
    "gemv.cuh",
    "hopper.cuh",
    "planes.cuh",
    "ptx.cuh",
    "wgmma_turned.cuh",
];

/// The emulator: CUDA's language and execution for a host compiler.
pub const EMULATOR: &[Source] = sources![
    "emulate/block.h",
    "emulate/fiber.h",
    "emulate/language.h",
    "emulate/launch.h",
    "emulate/numbers.h",
    "emulate/warp.h",
    "emulate/wrong.cu",
];

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that is not listed would be missing from the program.
    #[test]
    fn every_file_is_listed() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
        for folder in ["", "emulate/"] {
            for entry in std::fs::read_dir(root.join(folder)).expect("a folder") {
                let name = format!("{folder}{}", entry.expect("an entry").file_name().to_string_lossy());
                let is_source = [".cu", ".cuh", ".h"].iter().any(|end| name.ends_with(end));
                assert!(!is_source || Source::find(&name).is_some(), "{name} is not listed");
            }
        }
        for list in [SOURCES, HEADERS, EMULATOR] {
            assert!(list.is_sorted_by_key(|source| source.name));
            assert!(list.iter().all(|source| !source.text().is_empty()));
        }
    }
}
