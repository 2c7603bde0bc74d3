//! Death at every single store of every request: what is answered in the end, what is in the share
//! and what the guest holds are the same as if nobody had died.

mod bench;

use std::ffi::CString;

use virtiofsd::filesystem::{DirectoryIterator, Extensions, FileSystem, SetxattrFlags};

use self::bench::{Bench, Data, Fs, Outcome, name};
use super::nobody;
use crate::ticket;

const O_RDWR: u32 = 2;
const O_EXCL: u32 = 0o200;
const O_TRUNC: u32 = 0o1000;
const O_APPEND: u32 = 0o2000;

/// Runs a request with death at each of its stores, and again with death at some of its successor's.
fn survives(
    what: &str,
    prepare: impl Fn(&Fs) -> Outcome,
    act: impl Fn(&Fs, &Outcome) -> std::io::Result<Outcome>,
) {
    let mut whole = Bench::new();
    let before = whole.prepare(&prepare);
    let outcome = whole.serve(1, false, |fs| act(fs, &before));
    let expected = whole.conclude(outcome);
    for first in 0.. {
        let mut stores = 0;
        let mut bench = Bench::new();
        let before = bench.prepare(&prepare);
        let (is_dead, answer) = bench.serve_until(first, false, |fs| act(fs, &before));
        bench.succeed();
        let outcome = bench.serve_again(answer, |fs| act(fs, &before));
        assert_eq!(bench.conclude(outcome), expected, "{what}: death at store {first}");
        if !is_dead {
            break;
        }
        // And once more, at some of the successor's stores.
        loop {
            let mut bench = Bench::new();
            let before = bench.prepare(&prepare);
            let (_, answer) = bench.serve_until(first, false, |fs| act(fs, &before));
            let (is_dead, answer) = bench.succeed_until(stores, answer, |fs| act(fs, &before));
            bench.succeed();
            let outcome = bench.serve_again(answer, |fs| act(fs, &before));
            let concluded = bench.conclude(outcome);
            assert_eq!(concluded, expected, "{what}: death at store {first}, then at {stores}");
            if !is_dead {
                break;
            }
            stores += 47;
        }
    }
}

fn nothing(_fs: &Fs) -> Outcome {
    Outcome::default()
}

/// A file with a handle.
fn open_file(fs: &Fs) -> Outcome {
    let created = fs.create(nobody(), 1, &name("file"), 0o644, false, O_RDWR, 0, none());
    let (entry, handle, _) = created.unwrap();
    let handle = handle.unwrap();
    let data = Data(b"begun ");
    fs.write(nobody(), entry.inode, handle, data, 6, 0, None, false, false, 0).unwrap();
    Outcome { nodes: vec![entry.inode], handles: vec![(entry.inode, handle)] }
}

/// A folder.
fn folder(fs: &Fs) -> Outcome {
    let entry = fs.mkdir(nobody(), 1, &name("folder"), 0o755, 0, none()).unwrap();
    Outcome { nodes: vec![entry.inode], handles: Vec::new() }
}

/// Both, and a file in the folder.
fn both(fs: &Fs) -> Outcome {
    let mut all = open_file(fs);
    let folder = folder(fs).nodes[0];
    let entry = fs.mknod(nobody(), folder, &name("other"), 0o100_644, 0, 0, none()).unwrap();
    all.nodes.extend([folder, entry.inode]);
    all
}

fn none() -> Extensions {
    Extensions::default()
}

fn node(inode: u64) -> Outcome {
    Outcome { nodes: vec![inode], handles: Vec::new() }
}

#[test]
fn a_file_is_made_once() {
    for flags in [O_RDWR | O_EXCL, O_RDWR | O_TRUNC] {
        survives("create", nothing, |fs, _| {
            let made = fs.create(nobody(), 1, &name("new"), 0o644, false, flags, 0, none())?;
            let handles = vec![(made.0.inode, made.1.unwrap())];
            Ok(Outcome { nodes: vec![made.0.inode], handles })
        });
    }
    survives("create what is there", open_file, |fs, _| {
        let made = fs.create(nobody(), 1, &name("file"), 0o644, false, O_RDWR, 0, none())?;
        Ok(Outcome { nodes: vec![made.0.inode], handles: vec![(made.0.inode, made.1.unwrap())] })
    });
    survives("mkdir", nothing, |fs, _| {
        Ok(node(fs.mkdir(nobody(), 1, &name("new"), 0o755, 0, none())?.inode))
    });
    survives("mknod", nothing, |fs, _| {
        Ok(node(fs.mknod(nobody(), 1, &name("new"), 0o100_644, 0, 0, none())?.inode))
    });
    survives("symlink", nothing, |fs, _| {
        Ok(node(fs.symlink(nobody(), &name("target"), 1, &name("new"), none())?.inode))
    });
    survives("link", open_file, |fs, before| {
        Ok(node(fs.link(nobody(), before.nodes[0], 1, &name("another"))?.inode))
    });
}

#[test]
fn what_is_refused_is_refused_again() {
    survives("create exclusively", open_file, |fs, _| {
        let flags = O_RDWR | O_EXCL;
        fs.create(nobody(), 1, &name("file"), 0o644, false, flags, 0, none()).map(|_| nothing(fs))
    });
    survives("mkdir", open_file, |fs, _| {
        fs.mkdir(nobody(), 1, &name("file"), 0o755, 0, none()).map(|_| nothing(fs))
    });
    survives("unlink", nothing, |fs, _| {
        fs.unlink(nobody(), 1, &name("file")).map(|()| nothing(fs))
    });
    survives("rmdir", both, |fs, _| fs.rmdir(nobody(), 1, &name("folder")).map(|()| nothing(fs)));
    survives("rename", both, |fs, _| {
        fs.rename(nobody(), 1, &name("file"), 1, &name("folder"), 0).map(|()| nothing(fs))
    });
}

#[test]
fn a_name_goes_once_and_the_file_stays_while_it_is_open() {
    survives("unlink", open_file, |fs, before| {
        fs.unlink(nobody(), 1, &name("file"))?;
        Ok(before.clone())
    });
    survives("unlink unopened", both, |fs, before| {
        fs.unlink(nobody(), before.nodes[1], &name("other"))?;
        Ok(before.clone())
    });
    survives("rmdir", folder, |fs, before| {
        fs.rmdir(nobody(), 1, &name("folder"))?;
        Ok(before.clone())
    });
}

#[test]
fn a_name_changes_once() {
    survives("rename", both, |fs, before| {
        fs.rename(nobody(), 1, &name("file"), before.nodes[1], &name("moved"), 0)?;
        Ok(before.clone())
    });
    survives("rename over another", both, |fs, before| {
        fs.rename(nobody(), before.nodes[1], &name("other"), 1, &name("file"), 0)?;
        Ok(before.clone())
    });
    survives("rename a folder", both, |fs, before| {
        fs.rename(nobody(), 1, &name("folder"), 1, &name("renamed"), 0)?;
        Ok(before.clone())
    });
    survives("exchange", both, |fs, before| {
        let exchange = libc::RENAME_EXCHANGE;
        fs.rename(nobody(), 1, &name("file"), before.nodes[1], &name("other"), exchange)?;
        Ok(before.clone())
    });
    survives("rename to the same file", open_file, |fs, before| {
        fs.rename(nobody(), 1, &name("file"), 1, &name("file"), 0)?;
        Ok(before.clone())
    });
}

#[test]
fn data_are_appended_once() {
    survives("append", open_file, |fs, before| {
        let (node, handle) = before.handles[0];
        let data = Data(b"appended");
        let written = fs.write(nobody(), node, handle, data, 8, 0, None, false, false, O_APPEND)?;
        assert_eq!(written, 8);
        Ok(before.clone())
    });
}

#[test]
fn an_attribute_is_made_and_removed_once() {
    let attribute = CString::new("user.test").unwrap();
    let set = |fs: &Fs, node, flags| {
        fs.setxattr(nobody(), node, &attribute, b"value", flags, SetxattrFlags::empty())
    };
    survives("setxattr", open_file, |fs, before| {
        set(fs, before.nodes[0], 1)?;
        Ok(before.clone())
    });
    let with_attribute = |fs: &Fs| {
        let before = open_file(fs);
        set(fs, before.nodes[0], 0).unwrap();
        before
    };
    survives("setxattr again", with_attribute, |fs, before| {
        set(fs, before.nodes[0], 1)?;
        Ok(before.clone())
    });
    survives("removexattr", with_attribute, |fs, before| {
        fs.removexattr(nobody(), before.nodes[0], &attribute)?;
        Ok(before.clone())
    });
}

#[test]
fn what_the_guest_is_told_of_counts_once() {
    survives("lookup", both, |fs, _| Ok(node(fs.lookup(nobody(), 1, &name("file"))?.inode)));
    survives("open", both, |fs, before| {
        let handle = fs.open(nobody(), before.nodes[0], false, O_RDWR)?.0.unwrap();
        Ok(Outcome { nodes: Vec::new(), handles: vec![(before.nodes[0], handle)] })
    });
    survives("release", open_file, |fs, before| {
        let (node, handle) = before.handles[0];
        fs.release(nobody(), node, 0, handle, false, false, None)?;
        Ok(Outcome::default())
    });
    survives("forget", both, |fs, before| {
        fs.forget(nobody(), before.nodes[2], 1);
        fs.forget(nobody(), before.nodes[1], 1);
        Ok(Outcome::default())
    });
    survives("forget a removed file", both, |fs, before| {
        fs.forget(nobody(), before.nodes[2], 1);
        Ok(Outcome::default())
    });
}

#[test]
fn a_listing_tells_of_what_it_has_room_for() {
    survives("readdirplus", both, |fs, before| {
        ticket::with(|ticket| ticket.is_plus = true);
        let opened = fs.lookup(nobody(), 1, &name("folder"))?.inode;
        assert_eq!(opened, before.nodes[1]);
        let found = fs.lookup(nobody(), opened, &name("other"))?;
        // There is no room for this one.
        let other = fs.lookup(nobody(), 1, &name("file"))?.inode;
        fs.forget(nobody(), other, 1);
        Ok(node(found.inode))
    });
}

#[test]
fn many_are_forgotten_each_once() {
    let mut bench = Bench::new();
    let mut before = Outcome::default();
    for number in 0..600 {
        let file = name(&format!("file-{number}"));
        let made = bench.prepare(|fs| {
            node(fs.mknod(nobody(), 1, &file, 0o100_644, 0, 0, none()).unwrap().inode)
        });
        before.nodes.extend(made.nodes);
    }
    let act = |fs: &Fs| {
        fs.batch_forget(nobody(), before.nodes.iter().map(|node| (*node, 1)).collect());
        Ok(Outcome::default())
    };
    let mut answer = None;
    for stores in [600, 700, 800, 3000, 900] {
        let (_, given) = bench.serve_until(stores, stores != 600, act);
        answer = given.or(answer);
        bench.succeed();
    }
    let outcome = bench.serve_again(answer, act);
    assert_eq!(bench.conclude(outcome).census.0.len(), 1, "the root is left");
}

#[test]
fn an_answer_has_a_bounded_number_of_entries() {
    let mut bench = Bench::new();
    for number in 0..300 {
        let file = name(&format!("file-{number}"));
        bench.prepare(|fs| {
            node(fs.mknod(nobody(), 1, &file, 0o100_644, 0, 0, none()).unwrap().inode)
        });
    }
    bench.prepare(|fs| {
        let handle = fs.opendir(nobody(), 1, 0).unwrap().0.unwrap();
        let mut entries = fs.readdir(nobody(), 1, handle, 1 << 20, 0).unwrap();
        let mut count = 0;
        while entries.next().is_some() {
            count += 1;
        }
        assert_eq!(count, 256);
        Outcome::default()
    });
}
