//! What a pod is made and watched with: root file systems, specifications, what was printed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nacre_tests::artifacts;
use nacre_tests::leftovers::Leftovers;
use nacre_tests::process::until;
use serde_json::{Value, json};
use shim::agent::{ProcessEnd, ProcessId};
use shim::pod::{NewContainer, Pod, PodConfig};
use shim::registry::Registry;
use shim::size::ByteSize;
use shim::stdio::Outputs;
use shim::streams::{Ends, Streams};

/// How long a call to the agent may take on an emulated host.
const PATIENCE: Duration = Duration::from_secs(120);

/// A folder for a test, and what was there before.
pub(super) struct Place {
    folder: tempfile::TempDir,
    before: Leftovers,
    /// Of processes that run. Locked for map operations only.
    streams: Mutex<BTreeMap<String, Streams>>,
}

impl Place {
    pub(super) fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let before = Leftovers::now(&folder.path().join("state"))?;
        Ok(Self { folder, before, streams: Mutex::default() })
    }

    fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    pub(super) fn shared(&self, pod: &str) -> PathBuf {
        self.state().join(pod).join("shared")
    }

    pub(super) fn folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.folder.path().join(name);
        fs::create_dir(&path)?;
        Ok(path)
    }

    pub(super) fn rootfs(&self, container: &str) -> PathBuf {
        self.folder.path().join(format!("rootfs-{container}"))
    }

    /// Starts a pod.
    pub(super) async fn start(&self, id: &str, netns: Option<PathBuf>) -> Result<Pod> {
        let config = PodConfig {
            id: id.to_owned(),
            cpus: 1,
            max_cpus: Some(2),
            memory: ByteSize(256 << 20),
            max_memory: Some(ByteSize(512 << 20)),
            netns,
            hostname: Some("host-of-pod".to_owned()),
            nameservers: Vec::new(),
            sysctls: BTreeMap::new(),
            programs: artifacts::bin_dir()?,
            kernel: artifacts::kernel()?,
            initramfs: std::env::var_os("NACRE_INITRAMFS").context("no NACRE_INITRAMFS")?.into(),
            kernel_arguments: Vec::new(),
            registry: Registry::open(self.state())?,
            log_level: log::LevelFilter::Info,
            agent_timeout: PATIENCE,
        };
        Pod::start(config).await.with_context(|| format!("pod {id}"))
    }

    /// Makes a container that runs `script`, with folders and files of the host's in it.
    pub(super) async fn create(
        &self,
        pod: &Pod,
        id: &str,
        script: &str,
        volumes: &[(&str, &Path)],
    ) -> Result<()> {
        let mut spec = specification(script);
        for (at, from) in volumes {
            let mount = json!({"destination": at, "type": "bind", "source": from,
                "options": ["rbind", "rprivate", "rw"]});
            spec["mounts"].as_array_mut().context("mounts")?.push(mount);
        }
        self.create_of(pod, id, spec).await
    }

    /// The same with a limit of memory, in bytes, and of one processor.
    pub(super) async fn create_limited(
        &self,
        pod: &Pod,
        id: &str,
        script: &str,
        memory_bytes: u64,
    ) -> Result<()> {
        let mut spec = specification(script);
        spec["linux"]["resources"] = json!({"memory": {"limit": memory_bytes},
            "cpu": {"quota": 100_000, "period": 100_000}});
        self.create_of(pod, id, spec).await
    }

    async fn create_of(&self, pod: &Pod, id: &str, spec: Value) -> Result<()> {
        let rootfs = self.rootfs(id);
        if !rootfs.exists() {
            let mut copy = Command::new("cp");
            copy.arg("-a").arg(artifacts::busybox_rootfs()?).arg(&rootfs);
            ensure!(copy.status()?.success(), "{copy:?}");
        }
        let spec = serde_json::from_value(spec)?;
        let id = id.to_owned();
        let new = NewContainer { id, spec, rootfs, terminal: false, stdin: false };
        Ok(pod.create(new).await?)
    }

    /// Lets a container's program run.
    pub(super) async fn run_on(&self, pod: &Pod, id: &str) -> Result<ProcessId> {
        let process = ProcessId { container: id.to_owned(), exec: String::new() };
        let output = File::create(self.output(id))?;
        let outputs = Outputs::to_files(output.try_clone()?, output)?;
        let ends = Ends { input: None, outputs, terminal: false, size: None };
        let streams = pod.connect_streams(&process, ends).await?;
        self.streams.lock().expect("no test panics with it").insert(id.to_owned(), streams);
        ensure!(pod.start_process(&process).await? > 0);
        Ok(process)
    }

    fn output(&self, id: &str) -> PathBuf {
        self.folder.path().join(format!("output-{id}"))
    }

    pub(super) async fn until_said(&self, id: &str, text: &str) -> Result<()> {
        for _ in 0..1200 {
            if fs::read_to_string(self.output(id))?.contains(text) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        anyhow::bail!("`{id}` never says {text}")
    }

    /// All that an ended process printed.
    pub(super) async fn said(&self, id: &str, _end: ProcessEnd) -> Result<String> {
        let streams = self.streams.lock().expect("no test panics with it").remove(id);
        streams.context("it does not run")?.finish(PATIENCE).await;
        Ok(fs::read_to_string(self.output(id))?)
    }

    /// A container from its beginning to its end.
    pub(super) async fn run(
        &self,
        pod: &Pod,
        id: &str,
        script: &str,
        volumes: &[(&str, &Path)],
    ) -> Result<(String, ProcessEnd)> {
        self.create(pod, id, script, volumes).await?;
        let process = self.run_on(pod, id).await?;
        let end = pod.wait(&process).await?;
        let said = self.said(id, end).await?;
        pod.delete(&process).await?;
        Ok((said, end))
    }

    /// Which namespaces a container has: ipc and uts, of its own or the pod's.
    pub(super) async fn namespaces(
        &self,
        pod: &Pod,
        id: &str,
        are_shared: bool,
    ) -> Result<Vec<String>> {
        let mut spec = specification("readlink /proc/self/ns/ipc; readlink /proc/self/ns/uts");
        if are_shared {
            spec["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "mount"},
                {"type": "ipc", "path": "/proc/7/ns/ipc"}, {"type": "uts", "path": "/proc/7/ns/uts"},
                {"type": "network", "path": "/proc/7/ns/net"}]);
        }
        self.create_of(pod, id, spec).await?;
        let process = self.run_on(pod, id).await?;
        let end = pod.wait(&process).await?;
        let said = self.said(id, end).await?;
        pod.delete(&process).await?;
        ensure!(said.lines().count() == 2, "{said}");
        Ok(said.lines().map(str::to_owned).collect())
    }

    /// Nothing is left of any pod.
    pub(super) fn leaves_nothing(&self) -> Result<()> {
        self.before.and_nothing_more(&self.state())
    }
}

/// As containerd makes one for `sh -c SCRIPT`.
fn specification(script: &str) -> Value {
    let mount = |kind: &str, at: &str, options: &[&str]| json!({"destination": at, "type": kind, "source": kind, "options": options});
    json!({
        "ociVersion": "1.2.0",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["sh", "-c", script], "cwd": "/",
            "env": ["PATH=/bin:/sbin:/usr/bin:/usr/sbin"],
            "capabilities": {"bounding": ["CAP_NET_RAW"], "effective": ["CAP_NET_RAW"],
                "permitted": ["CAP_NET_RAW"]}},
        "root": {"path": "rootfs", "readonly": false},
        "mounts": [
            mount("proc", "/proc", &["nosuid", "noexec", "nodev"]),
            mount("tmpfs", "/dev", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("sysfs", "/sys", &["nosuid", "noexec", "nodev", "ro"]),
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "network"}],
            "cgroupsPath": "/default/test",
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
        },
    })
}

/// A network namespace as a CNI plugin leaves it, wired to the host's.
pub(super) struct Veth(Child);

impl Veth {
    pub(super) const HOST: &'static str = "10.97.0.1";
    pub(super) const POD: &'static str = "10.97.0.2";

    pub(super) fn new() -> Result<Self> {
        let holder = Command::new("unshare").args(["--net", "sleep", "1000"]).spawn()?;
        let veth = Self(holder);
        let own = fs::read_link("/proc/self/ns/net")?;
        until("a namespace", || Ok(fs::read_link(veth.path())? != own))?;
        let pid = veth.0.id();
        let inside = format!("nsenter --net=/proc/{pid}/ns/net ip");
        for line in [
            format!("ip link add veth-pod type veth peer name eth0 netns {pid}"),
            format!("ip addr add {}/24 dev veth-pod", Self::HOST),
            "ip link set veth-pod up".to_owned(),
            format!("{inside} addr add {}/24 dev eth0", Self::POD),
            format!("{inside} link set eth0 mtu 1400 up"),
            format!("{inside} route add default via {}", Self::HOST),
        ] {
            let mut words = line.split(' ');
            let mut command = Command::new(words.next().context("no program")?);
            ensure!(command.args(words).status()?.success(), "{line}");
        }
        Ok(veth)
    }

    pub(super) fn path(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.0.id()).into()
    }

    /// Whether its frames still go somewhere else.
    pub(super) fn is_redirected(&self) -> Result<bool> {
        let net = format!("--net={}", self.path().display());
        let said =
            Command::new("nsenter").args([&net, "tc", "qdisc", "show", "dev", "eth0"]).output()?;
        Ok(String::from_utf8_lossy(&said.stdout).contains("ingress"))
    }
}

impl Drop for Veth {
    fn drop(&mut self) {
        // The pair of interfaces goes with the namespace.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}
