//! A containerd of the test's own, out of a release of Debian: its folders, its socket, its
//! configuration with `runc` and `nacre` as runtimes, and `ctr` to talk to it.
//!
//! Nothing of a containerd that the host may run itself is touched, but `/run/containerd`, where
//! shims have their sockets and pipes whichever daemon they belong to.

pub mod cases;
pub mod cri;
mod grpc;
pub mod pods;
pub mod table;
pub mod traces;

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tempfile::TempDir;

use crate::artifacts;
use crate::image::{Layer, Layout, archive};
use crate::nacre::{Answer, finish};
use crate::process::{Process, until};

/// The image with busybox, as containers name it.
pub const BUSYBOX: &str = "nacre.test/busybox:1";
/// The image of a pod's first container, as containerd is configured.
pub const PAUSE: &str = "nacre.test/pause:1";
/// containerd's namespace for what `ctr` makes here, and so the name of its cgroups.
pub const NAMESPACE: &str = "nacre-test";

/// A release of Debian, for the containerd in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// Debian 12, with containerd 1.6.
    Bookworm,
    /// Debian 13, with containerd 1.7.
    Trixie,
    /// Debian's rolling release, with containerd 2.
    Sid,
}

impl Release {
    fn folder(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
            Self::Sid => "sid",
        }
    }
}

/// A runtime that containerd runs containers by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// The reference.
    Runc,
    /// Ours.
    Nacre,
}

impl Runtime {
    /// As containerd's configuration and users of `ctr` name it.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Runc => "io.containerd.runc.v2",
            Self::Nacre => "io.containerd.nacre.v2",
        }
    }

    /// As a pod names it, and people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Nacre => "nacre",
        }
    }
}

/// A containerd that runs; killed when dropped.
#[derive(Debug)]
pub struct Containerd {
    folder: TempDir,
    programs: PathBuf,
    release: Release,
    process: Option<Process>,
}

impl Containerd {
    /// Starts it with nothing in it, and imports the images.
    ///
    /// # Errors
    ///
    /// Fails if it is not there, or does not serve in time.
    pub fn start(release: Release) -> Result<Self> {
        let all = artifacts::containerd()?;
        let programs = all.join(release.folder());
        let folder = tempfile::tempdir()?;
        let mut daemon = Self { folder, programs, release, process: None };
        let plugins = all.join("cni");
        fs::write(daemon.path("config.toml"), daemon.configuration(&plugins))?;
        fs::create_dir(daemon.path("net.d"))?;
        fs::write(daemon.path("net.d/10-test.conflist"), network(&daemon.path("addresses")))?;
        daemon.launch()?;
        for (name, program) in [(BUSYBOX, ["/bin/sh", "-i"]), (PAUSE, ["/bin/sleep", "2000000000"])]
        {
            let archive = daemon.image(name, &program)?;
            for namespace in [NAMESPACE, "k8s.io"] {
                let import = daemon.ctr_in(namespace, &["images", "import"], &[&archive])?;
                import.code(0).with_context(|| format!("importing {name}"))?;
            }
        }
        Ok(daemon)
    }

    /// Its version, as it says.
    ///
    /// # Errors
    ///
    /// Fails if it can't be started.
    pub fn version(&self) -> Result<String> {
        let said = finish(Command::new(self.programs.join("containerd")).arg("--version"))?;
        let version = said.out.split_whitespace().nth(2).unwrap_or_default();
        Ok(version.split(['~', '+']).next().unwrap_or_default().to_owned())
    }

    /// Which release of Debian it is of.
    #[must_use]
    pub fn release(&self) -> Release {
        self.release
    }

    /// A place in its folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.path("containerd.sock")
    }

    /// `ctr ARGS...` in the tests' namespace, not yet started.
    #[must_use]
    pub fn ctr_command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        self.command(NAMESPACE, args)
    }

    /// `ctr ARGS...` in the tests' namespace, run to its end.
    ///
    /// # Errors
    ///
    /// Fails if it can't be started or does not end.
    pub fn ctr<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<Answer> {
        finish(&mut self.ctr_command(args))
    }

    /// Ends the daemon and starts it again, as an upgrade does; what it runs goes on.
    ///
    /// # Errors
    ///
    /// Fails if it does not end or does not serve again in time.
    pub fn restart(&mut self) -> Result<()> {
        self.end()?;
        self.launch()
    }

    /// Ends the daemon; gives what it said.
    ///
    /// # Errors
    ///
    /// Fails if it does not end when it is told to.
    pub fn stop(mut self) -> Result<String> {
        let said = self.end()?;
        Ok(said)
    }

    fn end(&mut self) -> Result<String> {
        let process = self.process.take().context("containerd runs")?;
        process.terminate()?;
        let (status, said) = process.wait()?;
        ensure!(status.success(), "containerd ended with {status}: {said}");
        Ok(said)
    }

    fn launch(&mut self) -> Result<()> {
        let program = self.programs.join("containerd");
        let mut command = Command::new(&program);
        command.arg("--config").arg(self.path("config.toml"));
        command.env("PATH", self.search_path()?).stdin(Stdio::null()).stdout(Stdio::null());
        let mut process = Process::start(&program, &mut command)?;
        let socket = self.socket();
        let served = until("containerd's socket", || {
            ensure!(process.is_running()?, "containerd ended");
            Ok(UnixStream::connect(&socket).is_ok())
        });
        if let Err(error) = served {
            drop(process.terminate());
            let (status, said) = process.wait()?;
            return Err(error).context(format!("{status}: {said}"));
        }
        self.process = Some(process);
        Ok(())
    }

    /// Shims and `runc` are found by it.
    fn search_path(&self) -> Result<OsString> {
        let system = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from);
        let mut folders = vec![self.programs.clone(), artifacts::bin_dir()?];
        folders.extend(system);
        Ok(env::join_paths(folders)?)
    }

    fn ctr_in(&self, namespace: &str, args: &[&str], paths: &[&Path]) -> Result<Answer> {
        finish(self.command(namespace, args).args(paths))
    }

    fn command<S: AsRef<OsStr>>(&self, namespace: &str, args: &[S]) -> Command {
        let mut command = Command::new(self.programs.join("ctr"));
        command.arg("--address").arg(self.socket()).args(["--namespace", namespace]);
        command.args(args).stdin(Stdio::null());
        command
    }

    fn image(&self, name: &str, program: &[&str]) -> Result<PathBuf> {
        let layout = tempfile::tempdir()?;
        let rootfs = Layer::of_folder(&artifacts::busybox_rootfs()?)?;
        let config = json!({"Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": program});
        Layout::new(layout.path())?.named(name).layer(&rootfs)?.finish(&config)?;
        let to = self.path("image.tar");
        archive(layout.path(), &to)?;
        Ok(to)
    }

    fn configuration(&self, plugins: &Path) -> String {
        let folder = self.folder.path().display();
        let plugins = plugins.display();
        let cri = "plugins.'io.containerd.grpc.v1.cri'";
        let (runc, nacre) = (Runtime::Runc.kind(), Runtime::Nacre.kind());
        format!(
            "version = 2
root = '{folder}/root'
state = '{folder}/state'
[grpc]
address = '{folder}/containerd.sock'
[ttrpc]
address = '{folder}/containerd.sock.ttrpc'
[plugins.'io.containerd.internal.v1.opt']
path = '{folder}/opt'
[plugins.'io.containerd.nri.v1.nri']
disable = true
[{cri}]
sandbox_image = '{PAUSE}'
[{cri}.cni]
bin_dir = '{plugins}'
conf_dir = '{folder}/net.d'
[{cri}.containerd]
default_runtime_name = 'runc'
[{cri}.containerd.runtimes.runc]
runtime_type = '{runc}'
[{cri}.containerd.runtimes.nacre]
runtime_type = '{nacre}'
"
        )
    }
}

/// A bridge of the tests' own; addresses that were given out are kept in `addresses`.
fn network(addresses: &Path) -> String {
    let plugins = json!([
        {
            "type": "bridge", "bridge": "nacre-cni", "isGateway": true, "ipMasq": false,
            "ipam": {
                "type": "host-local", "dataDir": addresses,
                "ranges": [[{"subnet": "10.88.77.0/24"}], [{"subnet": "fd88:77::/64"}]],
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
            },
        },
        {"type": "portmap", "capabilities": {"portMappings": true}, "backend": "nftables"},
    ]);
    json!({"cniVersion": "1.0.0", "name": "nacre-test", "plugins": plugins}).to_string()
}
