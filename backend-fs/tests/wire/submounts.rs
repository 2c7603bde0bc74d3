//! Other file systems below the share, which the host mounts and unmounts while it is served.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount,
};
use tempfile::TempDir;

use crate::fuse::{Call, Entry, Guest, Op, ROOT, can_sandbox, word};
use crate::keeper::Keeper;
use crate::restart::options;

const EXDEV: i32 = 18;
const ESTALE: i32 = 116;
/// Where the flags of `struct fuse_attr` are in `struct fuse_entry_out`, and the one for the root of
/// another file system.
const FLAGS: (usize, u32) = (40 + 84, 1);

/// A share in which the host may mount something.
struct Share {
    folder: TempDir,
    mounted: Vec<PathBuf>,
}

impl Share {
    fn make() -> Self {
        let folder = tempfile::tempdir().unwrap();
        mount_bind(folder.path(), folder.path()).unwrap();
        mount_change(folder.path(), MountPropagationFlags::PRIVATE).unwrap();
        mount_change(folder.path(), MountPropagationFlags::SHARED).unwrap();
        let mounted = vec![folder.path().to_owned()];
        Self { folder, mounted }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A new file system with one file in it.
    fn mount(&mut self, name: &str) -> PathBuf {
        let point = self.path().join(name);
        fs::create_dir(&point).unwrap();
        mount("tmpfs", &point, "tmpfs", MountFlags::empty(), None).unwrap();
        self.mounted.push(point.clone());
        fs::write(point.join("file"), name).unwrap();
        point
    }

    /// As a supervisor does it: whoever uses it keeps what is in use.
    fn unmount(&mut self, point: &Path) {
        self.mounted.retain(|mounted| mounted != point);
        unmount(point, UnmountFlags::DETACH).unwrap();
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        for point in self.mounted.iter().rev() {
            unmount(point, UnmountFlags::DETACH).unwrap();
        }
    }
}

fn restart(keeper: &mut Keeper, guest: &mut Guest) {
    keeper.restart();
    guest.driver.reconnect(&keeper.daemon().socket());
}

fn begin() -> Option<(Share, Keeper, Guest)> {
    can_sandbox().then(|| {
        let share = Share::make();
        let mut keeper = Keeper::start(share.path(), &["--announce-submounts"]);
        let guest = Guest::mount_with(keeper.daemon(), &options());
        (share, keeper, guest)
    })
}

/// The node of a folder, and whether the guest is told that it is the root of another file system.
fn find(guest: &mut Guest, name: &str) -> (u64, bool) {
    let answer = guest.call(&Call::new(Op::Lookup, ROOT).name(name)).unwrap();
    let (at, flag) = FLAGS;
    (Entry::parse(&answer).node, word(&answer, at) & flag != 0)
}

/// Which mounts the process that serves has below its root, by their names.
fn seen(keeper: &mut Keeper) -> Vec<(u64, String)> {
    let text = fs::read_to_string(format!("/proc/{}/mountinfo", keeper.daemon().id())).unwrap();
    let fields = text.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let points = fields.map(|fields| (fields[0].parse().unwrap(), fields[4].to_owned()));
    points.filter(|(_id, point)| point != "/").collect()
}

/// Whether the process has something open of a mount.
fn has_open(keeper: &mut Keeper, mount: u64) -> bool {
    let folder = format!("/proc/{}/fdinfo", keeper.daemon().id());
    let mut files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let line = format!("mnt_id:\t{mount}\n");
    // One that was closed in the meantime is none.
    files.any(|file| fs::read_to_string(file).is_ok_and(|text| text.contains(&line)))
}

#[test]
fn two_file_systems_with_equal_inode_numbers_stay_apart_through_kill_after_kill() {
    let Some((mut share, mut keeper, mut guest)) = begin() else { return };
    fs::create_dir(share.path().join("plain")).unwrap();
    assert!(!find(&mut guest, "plain").1);
    let points = ["one", "two"].map(|name| share.mount(name));
    let roots = ["one", "two"].map(|name| find(&mut guest, name));
    assert!(roots.iter().all(|(_node, is_submount)| *is_submount), "{roots:?}");
    let roots = roots.map(|(node, _is_submount)| node);
    let files = roots.map(|root| guest.lookup(root, "file").unwrap());
    assert_eq!(files[0].inode, files[1].inode, "the test shows nothing");
    assert_ne!(files[0].node, files[1].node);
    let handles = files.map(|file| guest.open(file.node, 2).unwrap());

    for round in 0..3_u64 {
        restart(&mut keeper, &mut guest);
        assert_eq!(seen(&mut keeper).len(), 2, "a successor has the mounts");
        // In another order than they were found in.
        for turn in [1, 0] {
            let (file, handle) = (files[turn], handles[turn]);
            assert_eq!(guest.lookup(roots[turn], "file").unwrap().node, file.node);
            assert_eq!(guest.write(file.node, handle, 3 + round, b"+"), Ok(1));
            let expected = format!(
                "{}{}",
                ["one", "two"][turn],
                "+".repeat(usize::try_from(round).unwrap() + 1)
            );
            assert_eq!(guest.read(file.node, handle, 0, 100).unwrap(), expected.as_bytes());
            assert_eq!(fs::read(points[turn].join("file")).unwrap(), expected.as_bytes());
        }
        assert_eq!(guest.rename((roots[0], "file"), (roots[1], "new")), Err(EXDEV));
    }
    // One loses its name, the other one, of the same number, does not.
    guest.unlink(roots[0], "file").unwrap();
    restart(&mut keeper, &mut guest);
    assert_eq!(guest.read(files[0].node, handles[0], 0, 100).unwrap(), b"one+++");
    assert_eq!(guest.read(files[1].node, handles[1], 0, 100).unwrap(), b"two+++");
    assert_eq!(guest.lookup(roots[1], "file").unwrap().node, files[1].node);
    assert_eq!(keeper.held(), [files[0].node]);
}

#[test]
fn a_file_system_that_the_host_takes_away_is_let_go_of_and_the_rest_goes_on() {
    let Some((mut share, mut keeper, mut guest)) = begin() else { return };
    let (gone, stays) = (share.mount("gone"), share.mount("stays"));
    let roots = ["gone", "stays"].map(|name| find(&mut guest, name).0);
    let files = roots.map(|root| guest.lookup(root, "file").unwrap().node);
    let handles = files.map(|file| guest.open(file, 0).unwrap());
    let mounts = seen(&mut keeper);
    let mount = mounts.iter().find(|(_id, point)| point == "/gone").unwrap().0;
    assert!(has_open(&mut keeper, mount));

    share.unmount(&gone);
    assert_eq!(seen(&mut keeper).len(), 1, "the process that serves has it no more");
    // What is open goes on, and a name leads to what was below.
    assert_eq!(guest.read(files[0], handles[0], 0, 100).unwrap(), b"gone");
    assert!(!find(&mut guest, "gone").1);
    // Once the guest has forgotten it, nobody has it.
    guest.call(&Call::new(Op::Release, files[0]).long(handles[0]).long(0).long(0)).unwrap();
    for node in [files[0], roots[0]] {
        let sent = guest.send(0, &Call::new(Op::Forget, node).long(1));
        guest.taken(sent);
    }
    assert!(!has_open(&mut keeper, mount));

    // A guest that forgets nothing keeps nothing either, beyond this process.
    let mount = mounts.iter().find(|(_id, point)| point == "/stays").unwrap().0;
    share.unmount(&stays);
    assert!(has_open(&mut keeper, mount));
    restart(&mut keeper, &mut guest);
    assert_eq!(seen(&mut keeper), []);
    assert_eq!(guest.read(files[1], handles[1], 0, 100), Err(ESTALE));
    assert!(guest.create(ROOT, "new", 0).is_ok());
}
