//! A guest that works on files in three folders at a time while `nacre-fs` is killed at random: what
//! it is answered, and what is in the share, is what a model of it says.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::fuse::{Call, Entry, Errno, Guest, Op, ROOT, Sent, can_sandbox, long, word};
use crate::keeper::Keeper;
use crate::restart::options;

const ENOENT: Errno = 2;
const EEXIST: Errno = 17;
const O_RDWR_EXCL_APPEND: u32 = 2 | 0o200 | 0o2000;
const O_APPEND: u32 = 0o2000;

/// Rounds, of a request in each folder; every third one is answered by a successor.
const ROUNDS: u32 = 400;

/// A seeded generator (xorshift64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// A file that the guest has open; it may have lost its name.
struct Open {
    node: u64,
    handle: u64,
    contents: Vec<u8>,
}

/// What is in a folder of the share, and what the guest has open of it.
#[derive(Default)]
struct Folder {
    node: u64,
    name: String,
    /// By name: the node and the number of an open file, or a folder or link of this node.
    files: BTreeMap<String, u64>,
    folders: BTreeMap<String, u64>,
    open: BTreeMap<u64, Open>,
    next: u64,
}

/// A request, and how the model changes if it is answered as it should be.
enum Step {
    Create { name: String, exists: bool },
    Append { file: u64, data: Vec<u8> },
    Read { file: u64 },
    Rename { from: String, to: String },
    Unlink { name: String, exists: bool },
    Mkdir { name: String, exists: bool },
    Rmdir { name: String },
    RenameFolder { from: String, to: String },
    Release { file: u64 },
    List,
}

impl Folder {
    fn pick<'a, V>(map: &'a BTreeMap<String, V>, dice: &mut Dice) -> Option<&'a String> {
        let len = map.len() as u64;
        let index = if len == 0 { return None } else { dice.roll(len) };
        map.keys().nth(usize::try_from(index).unwrap())
    }

    fn fresh(&mut self) -> String {
        self.next += 1;
        format!("name-{}", self.next)
    }

    fn step(&mut self, dice: &mut Dice) -> Step {
        let file = Self::pick(&self.files, dice).cloned();
        let folder = Self::pick(&self.folders, dice).cloned();
        let index = usize::try_from(dice.roll(self.open.len().max(1) as u64)).unwrap();
        let open = self.open.keys().nth(index).copied();
        match (dice.roll(20), file, folder, open) {
            (0 | 1, Some(name), ..) => Step::Create { name, exists: true },
            (2..=4, ..) => Step::Create { name: self.fresh(), exists: false },
            (5..=8, _, _, Some(file)) => {
                let len = usize::try_from(1 + dice.roll(20_000)).unwrap();
                let data = (0..len).map(|_| u8::try_from(dice.roll(256)).unwrap()).collect();
                Step::Append { file, data }
            }
            (9, _, _, Some(file)) => Step::Read { file },
            (10, Some(from), ..) => Step::Rename { from, to: self.fresh() },
            (11, Some(from), ..) => {
                let to = Self::pick(&self.files, dice).unwrap().clone();
                Step::Rename { from, to }
            }
            (12 | 13, Some(name), ..) => Step::Unlink { name, exists: true },
            (14, ..) => Step::Unlink { name: self.fresh(), exists: false },
            (15, _, Some(name), _) => Step::Mkdir { name, exists: true },
            (16, _, Some(name), _) => Step::Rmdir { name },
            (17, _, Some(from), _) => Step::RenameFolder { from, to: self.fresh() },
            (18, _, _, Some(file)) if self.open.len() > 4 => Step::Release { file },
            (19, ..) => Step::List,
            _ => Step::Mkdir { name: self.fresh(), exists: false },
        }
    }

    fn call(&self, step: &Step) -> Call {
        let rename = |from: &str, to: &str| {
            Call::new(Op::Rename, self.node).long(self.node).name(from).name(to)
        };
        match step {
            Step::Create { name, .. } => Call::new(Op::Create, self.node)
                .word(O_RDWR_EXCL_APPEND)
                .word(0o100_644)
                .word(0)
                .word(0)
                .name(name),
            Step::Append { file, data } => {
                let Open { node, handle, contents } = &self.open[file];
                let len = u32::try_from(data.len()).unwrap();
                let write = Call::new(Op::Write, *node).long(*handle).long(contents.len() as u64);
                write.word(len).word(0).long(0).word(O_APPEND).word(0).data(data)
            }
            Step::Read { file } => {
                let Open { node, handle, contents } = &self.open[file];
                let len = u32::try_from(contents.len()).unwrap() + 10;
                let read = Call::new(Op::Read, *node).long(*handle).long(0).word(len).word(0);
                read.long(0).long(0).room(len)
            }
            Step::Rename { from, to } | Step::RenameFolder { from, to } => rename(from, to),
            Step::Unlink { name, .. } => Call::new(Op::Unlink, self.node).name(name),
            Step::Mkdir { name, .. } => {
                Call::new(Op::Mkdir, self.node).word(0o755).word(0).name(name)
            }
            Step::Rmdir { name } => Call::new(Op::Rmdir, self.node).name(name),
            Step::Release { file } => {
                let Open { node, handle, .. } = &self.open[file];
                Call::new(Op::Release, *node).long(*handle).long(0).long(0)
            }
            Step::List => Call::new(Op::Lookup, ROOT).name(&self.name),
        }
    }

    fn check(&mut self, step: Step, answer: Result<Vec<u8>, Errno>) {
        match step {
            Step::Create { exists: true, .. } | Step::Mkdir { exists: true, .. } => {
                assert_eq!(answer, Err(EEXIST));
            }
            Step::Unlink { exists: false, .. } => assert_eq!(answer, Err(ENOENT)),
            Step::Create { name, .. } => {
                let answer = answer.unwrap();
                let (node, handle) = (Entry::parse(&answer).node, long(&answer, 128));
                self.open.insert(node, Open { node, handle, contents: Vec::new() });
                self.files.insert(name, node);
            }
            Step::Append { file, data } => {
                assert_eq!(word(&answer.unwrap(), 0) as usize, data.len());
                self.open.get_mut(&file).unwrap().contents.extend(data);
            }
            Step::Read { file } => assert!(answer.unwrap() == self.open[&file].contents),
            Step::Rename { from, to } => {
                answer.unwrap();
                let moved = self.files.remove(&from).unwrap();
                self.files.insert(to, moved);
            }
            Step::RenameFolder { from, to } => {
                answer.unwrap();
                let moved = self.folders.remove(&from).unwrap();
                self.folders.insert(to, moved);
            }
            Step::Unlink { name, .. } => {
                answer.unwrap();
                self.files.remove(&name);
            }
            Step::Mkdir { name, .. } => {
                self.folders.insert(name, Entry::parse(&answer.unwrap()).node);
            }
            Step::Rmdir { name } => {
                answer.unwrap();
                self.folders.remove(&name);
            }
            Step::Release { file } => {
                answer.unwrap();
                // Only files without a name are closed, so that the contents of others are known.
                self.open.remove(&file);
                self.files.retain(|_name, node| *node != file);
            }
            Step::List => assert_eq!(Entry::parse(&answer.unwrap()).node, self.node),
        }
    }

    /// Compares with the folder itself.
    fn compare(&self, folder: &Path) {
        let mut files = BTreeMap::new();
        let mut folders = Vec::new();
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if path.is_dir() {
                folders.push(name);
            } else {
                files.insert(name, fs::read(&path).unwrap());
            }
        }
        folders.sort();
        assert_eq!(folders, self.folders.keys().cloned().collect::<Vec<_>>());
        assert!(files.keys().eq(self.files.keys()), "{:?}", files.keys());
        for (name, node) in &self.files {
            assert!(files[name] == self.open[node].contents, "{name}");
        }
    }
}

fn torture(seed: u64) {
    let share = tempfile::tempdir().unwrap();
    let mut keeper = Keeper::start(share.path(), &[]);
    let mut guest = Guest::mount_with(keeper.daemon(), &options());
    let mut dice = Dice(seed);
    let mut folders: Vec<Folder> = (0..3)
        .map(|number| {
            let name = format!("folder-{number}");
            let mkdir = Call::new(Op::Mkdir, ROOT).word(0o755).word(0).name(&name);
            let node = Entry::parse(&guest.call(&mkdir).unwrap()).node;
            Folder { node, name, ..Folder::default() }
        })
        .collect();
    for round in 0..ROUNDS {
        let mut sent: Vec<(Step, Sent)> = Vec::new();
        for (queue, folder) in (1..).zip(&mut folders) {
            let mut step = folder.step(&mut dice);
            if let Step::Release { file } = &step
                && folder.files.values().any(|node| node == file)
            {
                step = Step::List;
            }
            let call = folder.call(&step);
            sent.push((step, guest.send(queue, &call)));
        }
        if round % 3 == 0 {
            // The time in which three requests are served.
            let death = Instant::now() + Duration::from_micros(dice.roll(250));
            while Instant::now() < death {
                thread::yield_now();
            }
            keeper.restart();
            guest.driver.reconnect(&keeper.daemon().socket());
        }
        for (folder, (step, sent)) in folders.iter_mut().zip(sent) {
            let answer = guest.answer(sent);
            folder.check(step, answer);
        }
        if round % 40 == 0 {
            folders.iter().for_each(|folder| folder.compare(&share.path().join(&folder.name)));
        }
    }
    for folder in &folders {
        folder.compare(&share.path().join(&folder.name));
        // Open files have their contents, with or without a name.
        for open in folder.open.values() {
            let len = u32::try_from(open.contents.len()).unwrap() + 1;
            let read = guest.read(open.node, open.handle, 0, len).unwrap();
            assert!(read == open.contents);
        }
    }
    let nameless = folders.iter().flat_map(|folder| {
        let named = |node| folder.files.values().any(|other| other == node);
        folder.open.keys().filter(move |node| !named(*node))
    });
    let nameless = nameless.count();
    assert!(nameless > 10, "only {nameless} files have lost their names");
}

#[test]
fn no_answer_is_false_and_nothing_is_done_twice_however_often_the_process_is_killed() {
    if can_sandbox() {
        torture(0x5eed_0001);
    }
}

#[test]
fn nor_with_other_requests_at_other_moments() {
    if can_sandbox() {
        torture(0x5eed_0002);
    }
}
