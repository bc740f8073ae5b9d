//! NVIDIA's libraries where PyTorch's packages keep them: NVRTC and cuBLASLt are often on a machine and nowhere that a program looks.
//!
//! Read [`find`].

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Asks Python where its packages keep shared libraries of NVIDIA's.
const ASK: &str = "
import glob, os, sysconfig
for name in ('libnvrtc.so.*', 'libcublasLt.so.*'):
    found = []
    for base in {sysconfig.get_path('purelib'), sysconfig.get_path('platlib')}:
        found += glob.glob(os.path.join(base, 'nvidia', '**', name), recursive=True)
    found = sorted(path for path in found if 'alt' not in os.path.basename(path))
    print(found[-1] if found else '')
";

/// What phases are told.
#[derive(Clone, Debug, Default)]
pub struct Libraries {
    nvrtc: Option<PathBuf>,
    /// A folder in which cuBLASLt has the plain name that is looked for.
    folder: Option<PathBuf>,
}

/// Looks for what Python's packages have.
pub fn find(python: &Path, work: &Path) -> Libraries {
    let asked = Command::new(python).args(["-c", ASK]).output();
    let text = asked.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let mut paths = text.lines().map(|line| Some(PathBuf::from(line.trim())).filter(|path| path.is_file()));
    let (nvrtc, blas) = (paths.next().flatten(), paths.next().flatten());
    let set = std::env::var_os("RIDGE_NVRTC").is_some_and(|path| !path.is_empty());
    let folder = blas.and_then(|blas| {
        let folder = work.join("libraries");
        std::fs::create_dir_all(&folder).ok()?;
        let link = folder.join("libcublasLt.so");
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(&blas, &link).ok()?;
        Some(folder)
    });
    Libraries { nvrtc: nvrtc.filter(|_| !set), folder }
}

impl Libraries {
    /// Puts them where a process looks: cuBLASLt behind what the loader would have found anyway, NVRTC before it, unless the user has
    /// named one, because its table of built-in functions lies beside it.
    pub fn show_to(&self, command: &mut Command) {
        if let Some(nvrtc) = &self.nvrtc {
            command.env("RIDGE_NVRTC", nvrtc);
        }
        if let Some(folder) = &self.folder {
            let mut path = std::env::var_os("LD_LIBRARY_PATH").filter(|path| !path.is_empty()).unwrap_or_default();
            if !path.is_empty() {
                path.push(OsString::from(":"));
            }
            path.push(folder);
            command.env("LD_LIBRARY_PATH", path);
        }
    }
}

/// compute-sanitizer, on the path or where toolkits are installed.
pub fn sanitizer() -> Option<String> {
    let home = std::env::var_os("CUDA_HOME").map(PathBuf::from);
    let places = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).collect::<Vec<_>>();
    let toolkits = [home, Some("/usr/local/cuda".into())].into_iter().flatten().map(|place| place.join("bin"));
    let found = places.into_iter().chain(toolkits).map(|place| place.join("compute-sanitizer"));
    found.filter(|path| path.is_file()).map(|path| path.to_string_lossy().into_owned()).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_python_nothing_is_found_and_nothing_said() {
        let folder = tempfile::tempdir().expect("a folder");
        let libraries = find(Path::new("ridge-no-such-python"), folder.path());
        assert!(libraries.nvrtc.is_none() && libraries.folder.is_none(), "{libraries:?}");
        let mut command = Command::new("true");
        libraries.show_to(&mut command);
        assert_eq!(command.get_envs().count(), 0);
    }
}
