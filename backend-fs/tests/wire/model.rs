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
const EBADF: Errno = 9;
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
    /// How often the guest was told of each node.
    told: BTreeMap<u64, u64>,
    /// The folder itself, open for reading.
    handle: u64,
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
    Find,
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
        match (dice.roll(21), file, folder, open) {
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
            (19, ..) => Step::Find,
            (20, ..) => Step::List,
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
            Step::Find => Call::new(Op::Lookup, ROOT).name(&self.name),
            Step::List => {
                let read = Call::new(Op::Readdirplus, self.node).long(self.handle).long(0);
                read.word(32 << 10).word(0).long(0).long(0).room(32 << 10)
            }
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
                let (node, handle) = (self.tell(&answer), long(&answer, 128));
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
                let node = self.tell(&answer.unwrap());
                self.folders.insert(name, node);
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
            Step::Find => assert_eq!(self.tell(&answer.unwrap()), self.node),
            Step::List => self.check_list(&answer.unwrap()),
        }
    }

    /// The guest is told of a node.
    fn tell(&mut self, entry: &[u8]) -> u64 {
        let node = Entry::parse(entry).node;
        *self.told.entry(node).or_default() += 1;
        node
    }

    fn check_list(&mut self, answer: &[u8]) {
        let mut listed = BTreeMap::new();
        let mut rest = answer;
        while !rest.is_empty() {
            let len = word(rest, 144) as usize;
            let name = String::from_utf8(rest[152..152 + len].to_vec()).unwrap();
            if name != "." && name != ".." {
                listed.insert(name, self.tell(rest));
            }
            rest = &rest[(152 + len).next_multiple_of(8)..];
        }
        let mut expected = self.files.clone();
        expected.extend(self.folders.clone());
        assert_eq!(listed, expected);
    }

    /// A node that the guest was told of more than once, to be forgotten all but once.
    fn forget_some(&mut self, dice: &mut Dice) -> Option<Call> {
        let index = usize::try_from(dice.roll(self.told.len() as u64)).unwrap();
        let (node, count) = self.told.iter_mut().nth(index)?;
        let more = *count - 1;
        *count = 1;
        (more > 0).then(|| Call::new(Op::Forget, *node).long(more))
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

/// Lets time pass, and not much more.
fn pass(time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        thread::yield_now();
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
            let answer = guest.call(&mkdir).unwrap();
            let mut folder = Folder { name, ..Folder::default() };
            folder.node = folder.tell(&answer);
            let open = Call::new(Op::Opendir, folder.node).word(0).word(0);
            folder.handle = long(&guest.call(&open).unwrap(), 0);
            folder
        })
        .collect();
    for round in 0..ROUNDS {
        let mut sent: Vec<(Step, Sent)> = Vec::new();
        for (queue, folder) in (1..).zip(&mut folders) {
            let mut step = folder.step(&mut dice);
            if let Step::Release { file } = &step
                && folder.files.values().any(|node| node == file)
            {
                step = Step::Find;
            }
            let call = folder.call(&step);
            sent.push((step, guest.send(queue, &call)));
        }
        let forget = folders[0].forget_some(&mut dice).map(|call| guest.send(0, &call));
        if round % 3 == 0 {
            // The time in which three requests are served.
            pass(Duration::from_micros(dice.roll(250)));
            keeper.restart();
            if round % 4 == 0 {
                // The successor dies as well, on its way or as it begins to serve.
                pass(Duration::from_micros(dice.roll(12_000)));
                keeper.restart();
            }
            guest.driver.reconnect(&keeper.daemon().socket());
        }
        for (folder, (step, sent)) in folders.iter_mut().zip(sent) {
            let answer = guest.answer(sent);
            folder.check(step, answer);
        }
        forget.into_iter().for_each(|sent| guest.taken(sent));
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
    assert!(keeper.held().len() >= nameless);
    forget_all(&mut keeper, &mut guest, &folders);
}

/// Once everything is closed and forgotten as often as it was told of, nothing is left.
fn forget_all(keeper: &mut Keeper, guest: &mut Guest, folders: &[Folder]) {
    for folder in folders {
        let open = folder.open.values().map(|open| (Op::Release, open.node, open.handle));
        for (op, node, handle) in open.chain([(Op::Releasedir, folder.node, folder.handle)]) {
            guest.call(&Call::new(op, node).long(handle).long(0).long(0)).unwrap();
        }
    }
    for (round, (node, count)) in folders.iter().flat_map(|folder| &folder.told).enumerate() {
        assert!(guest.attributes(*node).is_ok());
        let sent = guest.send(0, &Call::new(Op::Forget, *node).long(*count));
        if round % 16 == 0 {
            keeper.restart();
            guest.driver.reconnect(&keeper.daemon().socket());
        }
        guest.taken(sent);
    }
    for node in folders.iter().flat_map(|folder| folder.told.keys()) {
        assert_eq!(guest.attributes(*node).map(drop), Err(EBADF));
    }
    keeper.kill();
    assert_eq!(keeper.held(), [0_u64; 0]);
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
