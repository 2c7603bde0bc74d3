//! From what was typed to what the library takes: paths made absolute, mounts taken apart, the
//! image unpacked.

use std::{
    collections::BTreeMap,
    env, io,
    path::{self, Path, PathBuf},
};

use shim::{
    cgroup::HostLimits,
    image::{Cancel, Image, ImageDefaults},
    name::SandboxName,
    passthrough::Function,
    paths,
    plan::{
        ContainerConfig, ContainerLimits, Contents, Disk, NetworkConfig, SandboxConfig,
        SandboxPlan, Volume, inputs, inputs::HostFacts, process::ProcessConfig,
    },
    registry::Registry,
};

use crate::{
    args::{Process, Run},
    failure::Failure,
};

/// A mount that can't be understood.
#[derive(Debug, thiserror::Error)]
#[error("`{given}` is no {what}")]
pub(crate) struct Malformed {
    given: String,
    what: &'static str,
}

/// A run with all its paths absolute, so that the working folder no longer matters.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) name: SandboxName,
    pub(crate) registry: PathBuf,
    pub(crate) programs: PathBuf,
    cache: PathBuf,
    volumes: Vec<Volume>,
    disks: Vec<Disk>,
    passthrough: Vec<Function>,
    pub(crate) run: Run,
}

impl Request {
    /// Takes the arguments apart.
    pub(crate) fn new(mut run: Run) -> Result<Self, Failure> {
        let working_folder = |error: io::Error| Failure::setup("the working folder", error);
        run.kernel = path::absolute(&run.kernel).map_err(working_folder)?;
        run.initramfs = path::absolute(&run.initramfs).map_err(working_folder)?;
        for given in [&mut run.rootfs, &mut run.image, &mut run.bin_dir].into_iter().flatten() {
            *given = path::absolute(&*given).map_err(working_folder)?;
        }
        let name = match run.name.take() {
            Some(name) => name,
            None => SandboxName::random().map_err(|error| Failure::setup("no name", error))?,
        };
        let programs = match &run.bin_dir {
            Some(folder) => folder.clone(),
            None => paths::own_folder().map_err(|error| Failure::setup("no programs", error))?,
        };
        Ok(Self {
            name,
            registry: path::absolute(paths::state_root()).map_err(working_folder)?,
            cache: path::absolute(paths::cache_root()).map_err(working_folder)?,
            programs,
            volumes: run.volume.iter().map(|given| volume(given)).collect::<Result<_, _>>()?,
            disks: run.disk.iter().map(|given| disk(given)).collect::<Result<_, _>>()?,
            passthrough: run.device.iter().map(|given| given.parse()).collect::<Result<_, _>>()?,
            run,
        })
    }

    /// Opens the registry.
    pub(crate) fn open_registry(&self) -> Result<Registry, Failure> {
        Ok(Registry::open(self.registry.clone())?)
    }

    /// The root file system, unpacked if it is an image. Takes as long as that takes.
    fn rootfs(&self, cancel: Cancel) -> Result<(PathBuf, ImageDefaults), Failure> {
        match (&self.run.image, &self.run.rootfs) {
            (Some(image), _) => {
                let image = Image::open(image, cancel)?;
                Ok((image.unpack(&self.cache)?, image.defaults))
            }
            (None, rootfs) => {
                let rootfs = rootfs.clone().unwrap_or_else(|| PathBuf::from("/"));
                Ok((rootfs, ImageDefaults::default()))
            }
        }
    }

    /// The whole plan. Reads files and unpacks images, and starts nothing.
    pub(crate) fn plan(&self, cancel: Cancel, verbose: bool) -> Result<SandboxPlan, Failure> {
        let (rootfs, image) = self.rootfs(cancel)?;
        let run = &self.run;
        let mut process = ProcessConfig::from_image(&image, run.command.clone());
        apply(&run.process, &mut process);
        let container = ContainerConfig {
            rootfs: rootfs.clone(),
            writable_rootfs: run.writable_rootfs,
            volumes: self.volumes.clone(),
            disks: self.disks.clone(),
            process,
            limits: ContainerLimits { memory: run.memory_limit, pids: run.pids_limit },
        };
        let config = SandboxConfig {
            name: self.name.clone(),
            kernel: run.kernel.clone(),
            initramfs: run.initramfs.clone(),
            kernel_arguments: run.kernel_args.clone(),
            verbose_kernel: verbose,
            cpus: run.cpus,
            max_cpus: run.max_cpus,
            memory: run.memory,
            max_memory: run.max_memory,
            passthrough: self.passthrough.clone(),
            network: if run.net { NetworkConfig::Own } else { NetworkConfig::None },
            hostname: run.hostname.clone(),
            sysctls: BTreeMap::new(),
            contents: Contents::Container(Box::new(container)),
            host_limits: HostLimits {
                memory: run.host_memory_limit,
                pids: run.host_pids_limit,
                cpus: run.host_cpu_limit,
            },
        };
        inputs::check(&config)?;
        let facts = HostFacts::gather(Some(&rootfs))?;
        Ok(SandboxPlan::new(config, &facts)?)
    }
}

/// Applies what was typed about a program to `config`.
pub(crate) fn apply(typed: &Process, config: &mut ProcessConfig) {
    config.env.extend(typed.env.iter().filter_map(|variable| from_here(variable)));
    if let Some(user) = &typed.user {
        config.user.clone_from(user);
    }
    if let Some(workdir) = &typed.workdir {
        config.working_dir.clone_from(workdir);
    }
    config.terminal = typed.tty;
    config.stdin = typed.interactive;
}

/// A variable without a value has the one of this program's environment, if there is one.
fn from_here(variable: &str) -> Option<String> {
    if variable.contains('=') {
        return Some(variable.to_owned());
    }
    env::var(variable).ok().map(|value| format!("{variable}={value}"))
}

pub(crate) fn volume(given: &str) -> Result<Volume, Failure> {
    let malformed = || Malformed {
        given: given.to_owned(),
        what: "volume: HOST:GUEST or HOST:GUEST:ro is expected",
    };
    let parts: Vec<&str> = given.split(':').collect();
    let (host, guest, read_only) = match parts[..] {
        [host, guest] | [host, guest, "rw"] => (host, guest, false),
        [host, guest, "ro"] => (host, guest, true),
        _ => return Err(malformed().into()),
    };
    if host.is_empty() || guest.is_empty() {
        return Err(malformed().into());
    }
    Ok(Volume { host: absolute(host)?, guest: PathBuf::from(guest), read_only })
}

pub(crate) fn disk(given: &str) -> Result<Disk, Failure> {
    let (path, read_only) = match given.strip_suffix(":ro") {
        Some(path) => (path, true),
        None => (given, false),
    };
    if path.is_empty() {
        return Err(Malformed { given: given.to_owned(), what: "disk: a file is expected" }.into());
    }
    Ok(Disk { path: absolute(path)?, read_only })
}

fn absolute(path: &str) -> Result<PathBuf, Failure> {
    path::absolute(Path::new(path)).map_err(|error| Failure::setup("the working folder", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_taken_apart() {
        let parsed = volume("/a:/b:ro").unwrap();
        let expected = Volume { host: "/a".into(), guest: "/b".into(), read_only: true };
        assert_eq!(parsed, expected);
        assert!(volume("a:/b").unwrap().host.is_absolute());
        for given in ["/a", ":/b", "/a:", "/a:/b:xx", "/a:/b:ro:ro"] {
            assert!(volume(given).is_err(), "{given}");
        }
    }

    #[test]
    fn disks_are_taken_apart() {
        assert_eq!(disk("/d:ro").unwrap(), Disk { path: "/d".into(), read_only: true });
        assert_eq!(disk("/d").unwrap(), Disk { path: "/d".into(), read_only: false });
        assert!(disk("").is_err() && disk(":ro").is_err());
    }

    #[test]
    fn a_variable_without_a_value_comes_from_here() {
        assert_eq!(from_here("A=b").unwrap(), "A=b");
        assert_eq!(from_here("NACRE_NO_SUCH_VARIABLE"), None);
        assert!(from_here("PATH").unwrap().starts_with("PATH="));
    }
}
