//! Pods: sandboxes whose containers come and go, as a task of containerd's holds them.

mod place;

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nacre_tests::process::kill_child_of;
use place::{Place, Veth};
use shim::agent::ProcessId;
use shim::pod::ErrorKind;

/// Counts until it is told to end, in a file of the root and in one of the volume.
const WORK: &str = "set -e; n=0; exec 3>>/volume/held; echo up; \
    while [ ! -e /volume/enough ]; do n=$((n + 1)); echo $n >&3; echo $n >/root-$n; rm /root-$n; \
    done; echo done $n";

#[tokio::test]
async fn containers_of_a_pod_share_what_is_the_pod_s_and_come_and_go_in_one_vm() -> Result<()> {
    let place = Place::new()?;
    let pod = place.start("pod", None).await?;
    let vmm = pod.vmm_pid();
    // The first has the pod's id, as containerd's own container of a pod has.
    place.create(&pod, "pod", "sleep 1000", &[]).await?;
    place.run_on(&pod, "pod").await?;
    let ours = place.namespaces(&pod, "first", false).await?;
    let shared = place.namespaces(&pod, "second", true).await?;
    let again = place.namespaces(&pod, "third", true).await?;
    ensure!(shared == again, "ipc and uts of the pod: {shared:?} and {again:?}");
    ensure!(shared[0] != ours[0] && shared[1] != ours[1], "their own: {ours:?}, {shared:?}");
    // The same container once more.
    for round in 0..2 {
        let script = format!("echo round {round}; echo {round} >/kept; exit {}", 7 + round);
        let (said, end) = place.run(&pod, "again", &script, &[]).await?;
        ensure!((said.as_str(), end.code) == (&*format!("round {round}\n"), 7 + round), "{said}");
        ensure!(!end.out_of_memory);
        ensure!(
            fs::read_to_string(place.rootfs("again").join("kept"))?.trim() == round.to_string()
        );
    }
    ensure!(pod.vmm_pid() == vmm);
    let unknown = ProcessId { container: "nobody".to_owned(), exec: String::new() };
    let error = pod.start_process(&unknown).await.err().context("it runs")?;
    ensure!(error.kind() == ErrorKind::NotFound, "{error:?}");
    pod.stop().await;
    ensure!(pod.died().await.was_stopped);
    place.leaves_nothing()
}

#[tokio::test]
async fn a_pod_goes_on_when_the_process_of_its_share_dies_and_volumes_come_later() -> Result<()> {
    let place = Place::new()?;
    let pod = place.start("killed", None).await?;
    let volume = place.folder("volume")?;
    place.create(&pod, "worker", WORK, &[("/volume", &volume)]).await?;
    let worker = place.run_on(&pod, "worker").await?;
    place.until_said("worker", "up").await?;
    let file = place.folder("file")?.join("hosts");
    fs::write(&file, "before")?;
    for round in 0..4 {
        kill_child_of(std::process::id(), "nacre-fs")?;
        // What comes after that is seen by a process that was not there when the pod was made.
        let script = format!("cat /etc/hosts; echo {round} >/etc/hosts");
        let name = format!("after-{round}");
        let (said, end) = place.run(&pod, &name, &script, &[("/etc/hosts", &file)]).await?;
        let expected = if round == 0 { "before".to_owned() } else { format!("{}\n", round - 1) };
        ensure!(said == expected && end.code == 0, "{said:?} {end:?}");
    }
    fs::write(volume.join("enough"), "")?;
    let end = pod.wait(&worker).await?;
    let said = place.said("worker", end).await?;
    ensure!(end.code == 0, "{said}");
    let lines = fs::read_to_string(volume.join("held"))?;
    let counted = lines.lines().zip(1..).all(|(line, number)| line == number.to_string());
    ensure!(counted && said.ends_with(&format!("done {}\n", lines.lines().count())), "{said}");
    pod.delete(&worker).await?;
    ensure!(fs::read_dir(place.shared("killed"))?.next().is_none(), "something stays shared");
    pod.stop().await;
    ensure!(volume.join("held").exists() && place.rootfs("worker").join("bin").exists());
    place.leaves_nothing()
}

#[tokio::test]
async fn a_pod_is_as_large_as_its_containers_are_allowed() -> Result<()> {
    let place = Place::new()?;
    let pod = place.start("sized", None).await?;
    let size = async |name: &str| {
        let (said, _end) = place.run(&pod, name, "nproc; grep MemTotal /proc/meminfo", &[]).await?;
        let numbers = said.split_whitespace().filter_map(|word| word.parse::<u64>().ok());
        anyhow::Ok(numbers.collect::<Vec<_>>())
    };
    let before = size("before").await?;
    ensure!(before[0] == 1, "{before:?}");
    place.create_limited(&pod, "large", "sleep 1000", 256 << 20).await?;
    let during = size("during").await?;
    ensure!(during[0] == 2 && during[1] > before[1] + 200_000, "{before:?} {during:?}");
    let large = place.run_on(&pod, "large").await?;
    pod.signal(&large, 9, true).await?;
    ensure!(pod.wait(&large).await?.code == 137);
    pod.delete(&large).await?;
    let after = size("after").await?;
    ensure!(after[0] == 1, "{after:?}");
    pod.stop().await;
    place.leaves_nothing()
}

#[tokio::test]
async fn a_pod_has_the_address_of_its_namespace() -> Result<()> {
    let place = Place::new()?;
    let veth = Veth::new()?;
    let pod = place.start("wired", Some(veth.path())).await?;
    let script = format!("ip -o -4 addr show eth0; ping -c 2 -W 20 {}", Veth::HOST);
    let (said, end) = place.run(&pod, "ping", &script, &[]).await?;
    ensure!(
        end.code == 0 && said.contains(Veth::POD) && said.contains("2 packets received"),
        "{said}"
    );
    pod.stop().await;
    ensure!(!veth.is_redirected()?);
    place.leaves_nothing()
}

#[tokio::test]
async fn the_death_of_a_pod_is_told_to_whoever_waits_for_it() -> Result<()> {
    let place = Place::new()?;
    let pod = place.start("dead", None).await?;
    place.create(&pod, "main", "sleep 1000", &[]).await?;
    let main = place.run_on(&pod, "main").await?;
    kill_child_of(std::process::id(), "nacre-vmm")?;
    let death = tokio::time::timeout(Duration::from_secs(60), pod.died()).await?;
    ensure!(!death.was_stopped && death.reason.contains("signal 9"), "{death:?}");
    let error = pod.wait(&main).await.err().context("it still runs")?;
    ensure!(error.kind() == ErrorKind::Unavailable, "{error:?}");
    ensure!(place.rootfs("main").join("bin").exists());
    place.leaves_nothing()
}
