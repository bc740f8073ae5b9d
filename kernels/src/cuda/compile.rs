//! Kernels for a device: NVRTC, found at run time, and a folder of what it made.
//!
//! NVRTC is no part of the driver. It is looked for under `RIDGE_NVRTC` (the library's path), where the system's loader looks,
//! and where toolkits are installed; [`cubin`] says what to do if it is nowhere. It gets every header in memory, so no toolkit's
//! headers are needed. What it makes is kept by the hash of everything that went into it.

use super::device::CudaError;
use super::source::{HEADERS, Source};
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// What every kernel is compiled with, besides its architecture.
pub const OPTIONS: [&str; 2] = ["--std=c++17", "--extra-device-vectorization"];
/// Environment variable that names the library.
pub const NVRTC_VARIABLE: &str = "RIDGE_NVRTC";

/// NVRTC's name for the architecture of a device: from 9.0 on with the features of that architecture alone, such as wgmma.
pub fn target(sm: u32) -> String {
    if sm >= 90 { format!("sm_{sm}a") } else { format!("sm_{sm}") }
}

/// Machine code of a source for a device of compute capability `sm / 10`, from the folder `cache` if it is there.
///
/// # Errors
///
/// [`CudaError::Unavailable`] without NVRTC, [`CudaError::Compile`] with its log.
pub fn cubin(source: &'static str, sm: u32, cache: Option<&Path>) -> Result<Vec<u8>, CudaError> {
    let target = target(sm);
    let failed = |log: String| CudaError::Compile { file: source.into(), target: target.clone(), log };
    let main = Source::find(source).ok_or_else(|| failed("there is no such source".into()))?;
    let files: Vec<(&str, _)> = [main].into_iter().chain(HEADERS).map(|file| (file.name, file.text())).collect();
    let mut hash = blake3::Hasher::new();
    for part in OPTIONS.iter().chain([&&*target]).copied().chain(files.iter().flat_map(|(name, text)| [*name, text])) {
        hash.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    let name = format!("{}-{target}-{}.cubin", source.trim_end_matches(".cu"), &hash.finalize().to_hex()[..16]);
    let kept = cache.map(|folder| folder.join(&name));
    if let Some(bytes) = kept.as_ref().and_then(|path| std::fs::read(path).ok()) {
        return Ok(bytes);
    }
    let started = std::time::Instant::now();
    let code = Nvrtc::get()?.compile(&files, &target).map_err(failed)?;
    tracing::info!(source, target, ms = started.elapsed().as_millis() as u64, bytes = code.len(), "kernels compiled");
    if let Some(path) = kept
        && let Err(error) = keep(&path, &code)
    {
        tracing::warn!("compiled kernels are not kept: {}: {error}", path.display());
    }
    Ok(code)
}

/// Writes a file that is either there in full or not at all.
pub(super) fn keep(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(path.parent().expect("a file in a folder"))?;
    let partial = path.with_extension(format!("{}", std::process::id()));
    std::fs::write(&partial, bytes)?;
    std::fs::rename(partial, path)
}

type Program = *mut c_void;

/// The library and those of its functions that are used.
struct Nvrtc {
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    code_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    code: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    error: unsafe extern "C" fn(c_int) -> *const c_char,
    /// The functions live as long as it does.
    _library: Library,
}

impl Nvrtc {
    /// The process's one NVRTC.
    fn get() -> Result<&'static Self, CudaError> {
        static NVRTC: OnceLock<Result<Nvrtc, String>> = OnceLock::new();
        NVRTC.get_or_init(Self::open).as_ref().map_err(|reason| CudaError::Unavailable(reason.clone()))
    }

    fn open() -> Result<Self, String> {
        let mut tried = Vec::new();
        for path in candidates() {
            preload_builtins(&path);
            // SAFETY: NVRTC's initialisers are those of a plain C++ library.
            match unsafe { Library::new(&path) } {
                Ok(library) => {
                    return Self::with(library).map_err(|error| format!("{} is no NVRTC: {error}", path.display()));
                }
                Err(error) => tried.push(format!("{} ({error})", path.display())),
            }
        }
        Err(format!(
            "the kernels must be compiled for this device, and NVRTC (libnvrtc) is not on this machine: install the CUDA toolkit, or \
             `pip install nvidia-cuda-nvrtc` and set {NVRTC_VARIABLE} to the path of its libnvrtc.so.*; tried {}",
            tried.join(", ")
        ))
    }

    fn with(library: Library) -> Result<Self, libloading::Error> {
        // SAFETY: the signatures are those of nvrtc.h, the same in versions 12 and 13.
        unsafe {
            Ok(Self {
                create: *library.get(b"nvrtcCreateProgram\0")?,
                compile: *library.get(b"nvrtcCompileProgram\0")?,
                code_size: *library.get(b"nvrtcGetCUBINSize\0")?,
                code: *library.get(b"nvrtcGetCUBIN\0")?,
                log_size: *library.get(b"nvrtcGetProgramLogSize\0")?,
                log: *library.get(b"nvrtcGetProgramLog\0")?,
                destroy: *library.get(b"nvrtcDestroyProgram\0")?,
                error: *library.get(b"nvrtcGetErrorString\0")?,
                _library: library,
            })
        }
    }

    /// Compiles the first of `files`; the others are what it may include. The error is the compiler's log.
    fn compile(&self, files: &[(&str, impl AsRef<str>)], target: &str) -> Result<Vec<u8>, String> {
        let text = |text: &str| CString::new(text).map_err(|_| "a source with a NUL".to_owned());
        let names = files.iter().map(|(name, _)| text(name)).collect::<Result<Vec<_>, _>>()?;
        let texts = files.iter().map(|(_, body)| text(body.as_ref())).collect::<Result<Vec<_>, _>>()?;
        let options = OPTIONS.iter().map(|option| text(option)).chain([text(&format!("--gpu-architecture={target}"))]);
        let options = options.collect::<Result<Vec<_>, _>>()?;
        let pointers = |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let (include_names, include_texts, options) =
            (pointers(&names[1..]), pointers(&texts[1..]), pointers(&options));
        let mut program: Program = std::ptr::null_mut();
        // SAFETY: every pointer is to a string or an array that lives until the call is over, with the lengths given.
        let made = unsafe {
            (self.create)(
                &raw mut program,
                texts[0].as_ptr(),
                names[0].as_ptr(),
                include_names.len() as c_int,
                include_texts.as_ptr(),
                include_names.as_ptr(),
            )
        };
        self.check(made)?;
        // SAFETY: `program` was created and is destroyed below; the options live as above.
        let compiled = unsafe { (self.compile)(program, options.len() as c_int, options.as_ptr()) };
        let result = match self.check(compiled) {
            Ok(()) => self.read(program, self.code_size, self.code),
            Err(error) => Err(match self.read(program, self.log_size, self.log) {
                Ok(log) => format!("{error}\n{}", String::from_utf8_lossy(&log).trim_end_matches('\0')),
                Err(_) => error,
            }),
        };
        // SAFETY: created above, and not used after this.
        unsafe { (self.destroy)(&raw mut program) };
        result
    }

    /// Reads one of a program's byte strings.
    fn read(
        &self,
        program: Program,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        get: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>, String> {
        let mut bytes = 0;
        // SAFETY: `program` exists, and `bytes` is where the size goes.
        self.check(unsafe { size(program, &raw mut bytes) })?;
        let mut out = vec![0u8; bytes];
        // SAFETY: as many bytes as it said.
        self.check(unsafe { get(program, out.as_mut_ptr().cast()) })?;
        Ok(out)
    }

    fn check(&self, code: c_int) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: it takes any number and returns a static string.
        Err(unsafe { CStr::from_ptr((self.error)(code)) }.to_string_lossy().into_owned())
    }
}

/// Where NVRTC may be, best first.
fn candidates() -> Vec<PathBuf> {
    const NAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
    if let Some(path) = std::env::var_os(NVRTC_VARIABLE).filter(|path| !path.is_empty()) {
        return vec![path.into()];
    }
    let mut places = vec![PathBuf::new()];
    places.extend(std::env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("lib64")));
    places.push("/usr/local/cuda/lib64".into());
    places.iter().flat_map(|place| NAMES.map(|name| place.join(name))).collect()
}

/// NVRTC opens its table of built-in functions by name, which the loader does not find beside it; one that is open already it does.
fn preload_builtins(nvrtc: &Path) {
    let Some(folder) = nvrtc.parent().filter(|folder| !folder.as_os_str().is_empty()) else { return };
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with("libnvrtc-builtins.so") {
            // SAFETY: a library of data and plain functions. It is never closed: NVRTC uses it.
            if let Ok(library) = unsafe { Library::new(entry.path()) } {
                std::mem::forget(library);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_named() {
        assert_eq!([80, 89, 90, 100].map(target), ["sm_80", "sm_89", "sm_90a", "sm_100a"]);
    }

    /// Where NVRTC is, the self-test compiles for every architecture, and is found in the folder the second time. All other sources
    /// are compiled by `kernels/cuda/check/check.py`.
    #[test]
    fn the_selftest_compiles_for_every_architecture() {
        if let Err(error) = Nvrtc::get() {
            println!("skipped: {error}");
            return;
        }
        let folder = std::env::temp_dir().join(format!("ridge-cubins-{}", std::process::id()));
        for sm in [80, 89, 90, 100] {
            let code = cubin("selftest.cu", sm, Some(&folder)).unwrap_or_else(|error| panic!("{error}"));
            assert!(code.starts_with(b"\x7fELF"), "for {sm}");
            assert_eq!(
                std::fs::read_dir(&folder)
                    .unwrap()
                    .flatten()
                    .filter(|e| std::fs::read(e.path()).unwrap() == code)
                    .count(),
                1
            );
            assert_eq!(cubin("selftest.cu", sm, Some(&folder)).unwrap(), code);
        }
        let wrong = Nvrtc::get().unwrap().compile(&[("wrong.cu", "this is no C++")], "sm_80").unwrap_err();
        assert!(wrong.contains("error"), "{wrong}");
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_source_that_does_not_exist_is_an_error() {
        let error = cubin("nothing.cu", 90, None).unwrap_err();
        assert!(error.to_string().contains("nothing.cu does not compile for sm_90a"), "{error}");
    }
}
