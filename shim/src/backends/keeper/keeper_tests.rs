//! A keeper with programs that do nothing, and a VMM that only talks.

use std::{fs, os::unix::fs::PermissionsExt, sync::Arc};

use nacre_proto::vmm::{self, Command, Event, Outcome, Reply, Request, Told};
use rustix::process::{Pid, kill_process};
use tempfile::TempDir;
use tokio::{sync::Notify, task::JoinHandle};

use super::*;
use crate::{
    backends::{Condition, DeviceHandle, Surroundings, View, kind::Role, process::ready},
    packets::Packets,
    paths::SandboxFiles,
    plan::DevicePlan,
    vmm::pair,
};

const LIMIT: Duration = Duration::from_secs(60);
/// Finds the descriptor to be ready at, says so, and stays.
const GOOD: &str = "while [ $# -gt 1 ]; do [ $1 = --ready-fd ] && ready=$2; shift; done
    echo ready >/proc/self/fd/$ready; exec sleep 1000";

struct Ground {
    folder: TempDir,
    vmm: Packets,
    handle: DeviceHandle,
    kept: JoinHandle<Result<(), BackendError>>,
    _listening: JoinHandle<()>,
}

/// A kept disk whose first process serves, and which has failed so often in a row before.
async fn ground(failures: u32) -> Ground {
    let folder = tempfile::tempdir().unwrap();
    write(&folder, "nacre-blk", GOOD);
    let files = SandboxFiles::new(folder.path().to_owned());
    let surroundings = Surroundings::new(folder.path().to_owned(), files, log::LevelFilter::Info);
    let (serial, path) = ("disk-0".to_owned(), "/disk.img".into());
    let device = DevicePlan::Disk { serial, path, read_only: false };
    let blueprint = Blueprint::new(&device, surroundings, None).unwrap();
    let estate = Estate::new("test", 4096).unwrap();
    let (mut process, _socket) =
        blueprint.start(&blueprint.program(), &estate, Role::First).unwrap();
    let (link, listener, theirs) = pair(&["disk-0"]).unwrap();
    let view = View {
        condition: Condition::Serving,
        process: process.child.record(),
        program: blueprint.program(),
        restarts: 0,
    };
    let changed = Arc::new(Notify::new());
    let (handle, desk) = DeviceHandle::new(device, view, changed);
    ready(&process.child, &mut process.ready, LIMIT).await.unwrap();
    let mut keeper = Keeper::new(blueprint, estate, link, desk);
    for _ in 0..failures {
        keeper.patience.on_end(Instant::now(), Duration::ZERO, Cause::Own).unwrap();
    }
    let kept = tokio::spawn(keeper.keep(process));
    let _listening = tokio::spawn(listener.listen());
    Ground { folder, vmm: Packets::new(theirs).unwrap(), handle, kept, _listening }
}

fn write(folder: &TempDir, name: &str, script: &str) -> PathBuf {
    let (path, new) = (folder.path().join(name), folder.path().join("new"));
    fs::write(&new, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(&new, &path).unwrap();
    path
}

impl Ground {
    fn kill(&self) {
        let pid = Pid::from_raw(self.handle.view().process.pid).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
    }

    async fn lose(&self) {
        let (device, reason) = ("disk-0".to_owned(), "hung up".to_owned());
        self.tell(&Told::Event(Event::DeviceLost { device, reason })).await;
    }

    async fn tell(&self, told: &Told) {
        self.vmm.send(&vmm::encode(told).unwrap(), &[]).await.unwrap();
    }

    /// Waits for a request and gives its id, if it is as expected.
    async fn asked(&self, expected: Command) -> u64 {
        let mut buffer = vec![0; vmm::MAX_BYTES];
        let received = timeout(LIMIT, self.vmm.receive(&mut buffer)).await.unwrap().unwrap();
        let request: Request = vmm::decode(&buffer[..received.len_bytes]).unwrap();
        let needs_socket = matches!(expected, Command::Reconnect { .. });
        assert_eq!(request.command, expected);
        let beside = usize::from(needs_socket);
        assert_eq!(received.fds.len(), beside);
        request.id
    }

    async fn answer(&self, expected: Command, outcome: Outcome) {
        let id = self.asked(expected).await;
        self.tell(&Told::Reply(Reply { id, outcome })).await;
    }

    async fn serving(&self, restarts: u64) {
        let serves =
            |view: &View| view.condition == Condition::Serving && view.restarts == restarts;
        let mut view = self.handle.watch();
        timeout(LIMIT, view.wait_for(serves)).await.unwrap().unwrap();
    }
}

fn reconnect() -> Command {
    Command::Reconnect { device: "disk-0".to_owned() }
}

fn quiesce() -> Command {
    Command::Quiesce { device: "disk-0".to_owned() }
}

#[tokio::test]
async fn a_killed_process_is_replaced_and_the_vmm_told() {
    let ground = ground(0).await;
    let before = ground.handle.view().process.pid;
    for restarts in 1..4 {
        ground.kill();
        ground.lose().await;
        ground.answer(reconnect(), Outcome::Done).await;
        ground.serving(restarts).await;
    }
    assert_ne!(ground.handle.view().process.pid, before);
    drop(ground.vmm);
    ground.kept.await.unwrap().unwrap();
}

#[tokio::test]
async fn one_that_the_vmm_has_cut_off_is_ended_and_replaced() {
    let ground = ground(0).await;
    ground.lose().await;
    ground.answer(reconnect(), Outcome::Done).await;
    ground.serving(1).await;
}

#[tokio::test]
async fn a_refusal_and_a_death_on_the_way_are_tried_again() {
    let ground = ground(0).await;
    ground.kill();
    ground.lose().await;
    ground.answer(reconnect(), Outcome::Refused("features".to_owned())).await;
    let id = ground.asked(reconnect()).await;
    ground.kill();
    ground.tell(&Told::Reply(Reply { id, outcome: Outcome::Refused("gone".to_owned()) })).await;
    ground.answer(reconnect(), Outcome::Done).await;
    ground.serving(1).await;
}

#[tokio::test]
async fn a_device_is_given_up_with_the_last_words_of_its_last_process() {
    let ground = ground(10).await;
    write(&ground.folder, "nacre-blk", "echo broken disk >&2; exit 3");
    ground.kill();
    ground.lose().await;
    let error = error_chain(&timeout(LIMIT, ground.kept).await.unwrap().unwrap().unwrap_err());
    let told = "nacre-blk of `disk-0` is given up after 12 failures in a row: \
        nacre-blk of `disk-0` ended with code 3; its last words: broken disk";
    assert_eq!(error, told);
}

#[tokio::test]
async fn an_upgrade_is_what_later_processes_are_started_from() {
    let ground = ground(0).await;
    let new = write(&ground.folder, "other", GOOD);
    let upgrade = tokio::spawn({
        let (handle, new) = (ground.handle.clone(), new.clone());
        async move { handle.replace(Some(new)).await }
    });
    let id = ground.asked(quiesce()).await;
    assert_eq!(ground.handle.replace(None).await, Err(ReplaceError::Busy));
    ground.tell(&Told::Reply(Reply { id, outcome: Outcome::Done })).await;
    ground.answer(reconnect(), Outcome::Done).await;
    upgrade.await.unwrap().unwrap();
    fs::remove_file(ground.folder.path().join("nacre-blk")).unwrap();
    ground.kill();
    ground.lose().await;
    ground.answer(reconnect(), Outcome::Done).await;
    ground.serving(2).await;
    assert_eq!(ground.handle.view().program, new);
}

#[tokio::test]
async fn an_upgrade_that_does_not_serve_falls_back_to_the_old_program() {
    let ground = ground(0).await;
    let bad = write(&ground.folder, "bad", "echo unreadable state >&2; exit 6");
    let old = ground.handle.view().program;
    let replace = ground.handle.replace(Some(bad));
    let answering = async {
        ground.answer(quiesce(), Outcome::Done).await;
        ground.answer(reconnect(), Outcome::Done).await;
    };
    let (replaced, ()) = tokio::join!(replace, answering);
    let Err(ReplaceError::FellBack(why)) = replaced else { panic!("{replaced:?}") };
    assert!(why.ends_with("ended with code 6; its last words: unreadable state"), "{why}");
    assert_eq!(ground.handle.view().program, old);
}

#[tokio::test]
async fn a_device_that_can_not_be_quiesced_keeps_its_process() {
    let ground = ground(0).await;
    let before = ground.handle.view().process;
    let answering = ground.answer(quiesce(), Outcome::Refused("busy".to_owned()));
    let (replaced, ()) = tokio::join!(ground.handle.replace(None), answering);
    assert_eq!(replaced, Err(ReplaceError::Kept("busy".to_owned())));
    assert_eq!(ground.handle.view().process, before);
}

#[tokio::test]
async fn a_device_without_a_process_is_upgraded_at_once() {
    let ground = ground(9).await;
    let new = write(&ground.folder, "other", GOOD);
    write(&ground.folder, "nacre-blk", "exit 3");
    ground.kill();
    ground.lose().await;
    let lost = |view: &View| view.condition == Condition::Lost;
    timeout(LIMIT, ground.handle.watch().wait_for(lost)).await.unwrap().unwrap();
    let answering = ground.answer(reconnect(), Outcome::Done);
    let (replaced, ()) = tokio::join!(ground.handle.replace(Some(new)), answering);
    replaced.unwrap();
    ground.serving(1).await;
}

#[tokio::test]
async fn what_can_be_no_program_is_refused_before_anything_is_done() {
    let ground = ground(0).await;
    for (path, why) in [("/no/program", "no such program"), ("/etc", "not an executable file")] {
        let error = ground.handle.replace(Some(path.into())).await.unwrap_err();
        assert!(error.to_string().ends_with(why), "{error}");
    }
}

#[tokio::test]
async fn nobody_waits_for_a_successor_once_the_vmm_is_gone() {
    let ground = ground(0).await;
    write(&ground.folder, "nacre-blk", "exec sleep 1000");
    ground.kill();
    ground.lose().await;
    let starting = |view: &View| view.condition == Condition::Starting;
    timeout(LIMIT, ground.handle.watch().wait_for(starting)).await.unwrap().unwrap();
    drop(ground.vmm);
    let error = timeout(LIMIT, ground.kept).await.unwrap().unwrap().unwrap_err();
    assert_eq!(error.end(), Some(End::Signal(9)));
}

#[tokio::test]
async fn a_disk_that_is_gone_gets_a_stand_in() {
    let ground = ground(10).await;
    let script = format!("case $* in *--stand-in*) ;; *) exit 3;; esac\n{GOOD}");
    write(&ground.folder, "nacre-blk", &script);
    ground.kill();
    ground.lose().await;
    ground.answer(reconnect(), Outcome::Done).await;
    let fails = |view: &View| view.condition == Condition::Failing;
    timeout(LIMIT, ground.handle.watch().wait_for(fails)).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_device_that_is_removed_ends_with_its_process_in_every_state() {
    let removed = || Told::Event(Event::DeviceRemoved { device: "disk-0".to_owned() });
    // Serving.
    let ground_one = ground(0).await;
    ground_one.tell(&removed()).await;
    timeout(LIMIT, ground_one.kept).await.unwrap().unwrap().unwrap();
    ground_one.handle.ended().await;
    // Lost, with a program that never serves: no failure of the sandbox.
    let ground_two = ground(0).await;
    write(&ground_two.folder, "nacre-blk", "sleep 0.1; exit 1");
    ground_two.kill();
    ground_two.lose().await;
    let mut view = ground_two.handle.watch();
    timeout(LIMIT, view.wait_for(|view| view.condition == Condition::Lost)).await.unwrap().unwrap();
    ground_two.tell(&removed()).await;
    timeout(LIMIT, ground_two.kept).await.unwrap().unwrap().unwrap();
}
