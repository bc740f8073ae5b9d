//! What is decided before the first process starts: model, certificates, and each role's command line.
//!
//! Read [`Launch`]. After it is built nothing can go wrong for want of a file, a port or a certificate.

use super::plan::Member;
use super::progress::human_bytes;
use super::relay::Relays;
use crate::cli::{HttpArgs, HugePagesArg, KvCacheDtype, UpArgs, WeightsCache};
use crate::{demo, dirs};
use anyhow::{Context, bail};
use clap::ValueEnum;
use ridge_kvtransfer::shell::ca::ClusterCa;
use ridge_model::checkpoint::{LoadOptions, LoadProgress, ModelSource, load};
use ridge_model::memory::machine::MachineMemory;
use ridge_protocol::Role;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

/// A model that is on this machine.
#[derive(Debug)]
pub struct Model {
    /// What the roles get as `--model`.
    pub path: String,
    /// The name under which it is served if the user gave none.
    pub name: String,
    /// Where it came from.
    pub from: Source,
}

/// Where a model came from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// Out of this binary.
    BuiltIn,
    /// A folder or file that the user named.
    Local,
    /// The hub's cache.
    Hub,
}

/// Everything needed to start any member, again and again.
#[derive(Debug)]
pub struct Launch {
    /// This binary.
    pub program: PathBuf,
    /// What is served.
    pub model: Model,
    /// Names of the model in the API, at least one.
    pub names: Vec<String>,
    /// Folder with one certificate folder per member.
    run_dir: dirs::RunDir,
    /// Bytes for all nodes together, known before the first of them takes any: a node that starts later, or again, must
    /// not count as gone what its siblings have.
    memory: Option<u64>,
    args: UpArgs,
}

impl Launch {
    /// Finds the model, checks the port, makes folders and certificates.
    pub fn prepare(args: UpArgs, members: &[Member]) -> anyhow::Result<Self> {
        if let Some(reason) = args.prefill_kv.refusal(&args.engine) {
            bail!("{reason}; see --prefill-kv-cache-dtype");
        }
        check_port(&args.http)?;
        let model = find_model(args.model.as_deref())?;
        let names = match &args.http.served_model_name[..] {
            [] => vec![model.name.clone()],
            names => names.to_vec(),
        };
        if let Some(folder) = &args.log_dir {
            std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        if let Some(folder) = &args.record.record {
            dirs::create_private(folder)?;
            eprintln!("note: recordings in {} hold users' prompts and answers", folder.display());
        }
        let data = match &args.data_dir {
            Some(folder) => folder.clone(),
            None => dirs::data()?,
        };
        dirs::create_private(&data)?;
        let run_dir = dirs::RunDir::create(&data)?;
        issue_certificates(&data, run_dir.path(), members)?;
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let machine = args.memory.map_or_else(MachineMemory::read, MachineMemory::given);
        let memory = machine.known.then_some(machine.bytes);
        Ok(Self { program, model, names, run_dir, memory, args })
    }

    /// The arguments of `member`. `router` is the address that the router reported, `http` its HTTP address: a
    /// router that is started again must come back where nodes and clients look for it. With `relays`, nodes find each
    /// other through those.
    pub fn arguments(
        &self,
        member: &Member,
        router: Option<SocketAddr>,
        http: Option<SocketAddr>,
        relays: Option<&Relays>,
    ) -> Vec<String> {
        let mut line = Line(vec![member.role.name().to_owned(), "--stop-on-stdin-eof".into()]);
        line.flag("--name", &member.name);
        line.flag("--tls-dir", &self.run_dir.path().join(&member.name).display());
        line.flag("--model", &self.model.path);
        line.0.extend(self.args.network.flags());
        line.0.extend(self.args.record.flags());
        let engine = match member.role {
            Role::Prefill => self.args.prefill_kv.over(&self.args.engine),
            _ => self.args.engine.clone(),
        };
        line.option("--max-model-len", engine.max_model_len);
        if member.role == Role::Router {
            line.option("--listen", router);
            line.flag("--host", &self.args.http.host);
            line.flag("--port", &http.map_or(self.args.http.port, |http| http.port()));
            self.names.iter().for_each(|name| line.flag("--served-model-name", name));
            line.0.extend(self.args.http.resume.flags());
            if self.args.prefill == 0 {
                line.0.push("--decode-only".into());
            }
            return line.0;
        }
        let router = relays.and_then(|relays| relays.front("router")).or(router);
        line.flag("--router", &router.expect("nodes start after the router"));
        line.option("--advertise", relays.and_then(|relays| relays.front(&member.name)));
        line.flag("--threads", &member.threads);
        line.option("--cores", member.cores.as_ref());
        if member.nice > 0 {
            line.flag("--nice", &member.nice);
        }
        if member.shared {
            line.0.push("--shared-cores".into());
        }
        line.option("--memory", self.memory);
        line.flag("--memory-nodes", &(self.args.prefill + self.args.decode));
        if engine.huge_pages == HugePagesArg::Off {
            line.flag("--huge-pages", &"off");
        }
        line.0.extend(self.args.device_flags(member.role));
        line.flag("--block-size", &engine.block_size);
        if engine.kv_cache_dtype != KvCacheDtype::Auto {
            let name = engine.kv_cache_dtype.to_possible_value().expect("no type is skipped");
            line.flag("--kv-cache-dtype", &name.get_name());
        }
        line.option("--kv-memory", engine.kv_memory);
        if engine.weights_cache != WeightsCache::Auto {
            line.flag("--weights-cache", &engine.weights_cache);
        }
        match member.role {
            Role::Prefill => {
                line.option("--max-num-batched-tokens", self.args.max_num_batched_tokens);
                line.option("--chaos-corrupt-pages", self.args.chaos_corrupt_pages);
            }
            _ => line.option("--max-num-seqs", self.args.max_num_seqs),
        }
        line.0
    }

    /// Variables of `member`: what other users must not read goes to the router alone, and not as an argument.
    pub fn environment(&self, member: &Member) -> Vec<(&'static str, String)> {
        let for_router = |keys: Vec<String>| if member.role == Role::Router { keys.join(",") } else { String::new() };
        let mut env = vec![
            ("RIDGE_API_KEY", for_router(self.keys())),
            ("RIDGE_ADMIN_KEY", for_router(self.args.http.admin_keys())),
        ];
        if self.model.from == Source::Hub {
            // Every process must read the same revision, whatever is uploaded meanwhile.
            env.push(("HF_HUB_OFFLINE", "1".to_owned()));
        }
        if std::env::var_os("RUST_LOG").is_none_or(|filter| filter.is_empty()) {
            // What a node's memory goes to is worth seeing at every start.
            let filter = if self.args.log_dir.is_some() { "info" } else { "warn,ridge_model::memory=info" };
            env.push(("RUST_LOG", filter.to_owned()));
        }
        env
    }

    /// The keys that clients must send one of.
    pub fn keys(&self) -> Vec<String> {
        self.args.http.keys()
    }

    /// Where `member`'s log goes, if not to stderr.
    pub fn log_file(&self, member: &Member) -> Option<PathBuf> {
        Some(self.args.log_dir.as_ref()?.join(format!("{}.log", member.name)))
    }
}

impl HttpArgs {
    /// The keys that were really given: an empty variable means none.
    pub fn keys(&self) -> Vec<String> {
        self.api_key.iter().filter(|key| !key.is_empty()).cloned().collect()
    }

    /// As [`keys`](Self::keys), of admins.
    pub fn admin_keys(&self) -> Vec<String> {
        self.admin_key.iter().filter(|key| !key.is_empty()).cloned().collect()
    }
}

/// A command line in the making.
struct Line(Vec<String>);

impl Line {
    fn flag(&mut self, name: &str, value: &impl ToString) {
        self.0.extend([name.to_owned(), value.to_string()]);
    }

    fn option(&mut self, name: &str, value: Option<impl ToString>) {
        if let Some(value) = value {
            self.flag(name, &value);
        }
    }
}

/// Tells a taken port before anything is started. The router binds it for good.
fn check_port(http: &HttpArgs) -> anyhow::Result<()> {
    let addr = SocketAddr::new(http.host, http.port);
    match TcpListener::bind(addr) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => bail!(
            "port {} on {} is in use; stop what listens there, or choose another with --port (0 takes a free one)",
            http.port,
            http.host
        ),
        Err(error) => Err(error).with_context(|| format!("cannot listen on {addr}")),
    }
}

/// Makes sure that the model is here, so that every process maps the same files.
pub fn find_model(argument: Option<&str>) -> anyhow::Result<Model> {
    let Some(argument) = argument else {
        let folder = demo::unpack(&dirs::cache()?)?;
        return Ok(Model { path: text(&folder)?, name: demo::NAME.into(), from: Source::BuiltIn });
    };
    let (path, name) = match ModelSource::parse(argument)? {
        ModelSource::Hub(id) => {
            // Loaded here once, with progress; the children then find it in the hub's cache.
            load(&ModelSource::Hub(id.clone()), &LoadOptions::default(), &mut report_download)?;
            let name = id.split('@').next().unwrap_or(&id).to_owned();
            return Ok(Model { path: id, name, from: Source::Hub });
        }
        ModelSource::Folder(path) => {
            let path = absolute(&path)?;
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
            (path, name.unwrap_or_else(|| "model".into()))
        }
        ModelSource::Gguf(path) | ModelSource::Llama2c(path) => {
            let path = absolute(&path)?;
            let name = path.file_stem().map(|name| name.to_string_lossy().into_owned());
            (path, name.unwrap_or_else(|| "model".into()))
        }
    };
    Ok(Model { path: text(&path)?, name, from: Source::Local })
}

fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    path.canonicalize().with_context(|| format!("cannot find {}", path.display()))
}

fn text(path: &Path) -> anyhow::Result<String> {
    Ok(path.to_str().with_context(|| format!("{} is not valid UTF-8", path.display()))?.to_owned())
}

fn report_download(progress: LoadProgress) {
    if let LoadProgress::Download { file, done, total } = progress {
        let total = if total == 0 { "?".into() } else { human_bytes(total) };
        eprintln!("downloading {file}: {} of {total}", human_bytes(done));
    }
}

fn issue_certificates(data: &Path, run: &Path, members: &[Member]) -> anyhow::Result<()> {
    let ca = ClusterCa::load_or_create(&data.join("ca")).context("cannot open the cluster's CA")?;
    for member in members {
        crate::ca::issue(&ca, &member.name, member.role, &run.join(&member.name))?;
    }
    Ok(())
}
