//! What the guest holds of the share: its nodes and its open files, in memory and in the ledger.
//!
//! A node is where it was found: a name in a folder, which is a node itself. That is what a
//! successor finds it by; what the file server knows it as (`Place`) is each process's own affair.
//!
//! Invariants. A node's name and folder are in the ledger as soon as they are here. How often the
//! guest was told of a node, and that a file is open, gets there together with the record that
//! says that the request was answered (`settle`), so that a request that is served again counts
//! once. A node that nobody was told of is nobody's: a successor forgets it.

#[cfg(test)]
mod census;
mod load;
mod node;
mod settle;

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

pub(crate) use self::load::Session;
pub(crate) use self::node::{Gone, Node, Place};
pub(crate) use self::settle::Told;
use crate::keep::MOST_KEPT;
use crate::layout;
use crate::ledger::{Ledger, Writes};
use crate::record::{self, Key, Spot, Stage};

/// The share's own node (`FUSE_ROOT_ID`).
pub(crate) const ROOT: u64 = 1;
/// Slots that only a file that was just made may take: it is too late to refuse it then. Each
/// queue makes one at a time.
const MARGIN: usize = 128;

/// The table is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full;

/// What an open file is to the file server.
#[derive(Clone, Debug)]
pub(crate) enum Opened {
    /// A predecessor had it open.
    NotYet,
    /// The file server's handle.
    Inner(u64),
    /// Of a file that has no name any more.
    Kept(Arc<File>),
}

/// An open file or folder.
#[derive(Clone, Debug)]
pub(crate) struct Handle {
    pub(crate) id: u64,
    pub(crate) node: u64,
    /// As the guest opened it.
    pub(crate) flags: u32,
    pub(crate) is_folder: bool,
    pub(crate) opened: Opened,
}

/// All nodes and open files.
pub(crate) struct Table {
    ledger: Ledger,
    /// By slot.
    nodes: Vec<Option<Node>>,
    free_nodes: Vec<usize>,
    handles: Vec<Option<Handle>>,
    free_handles: Vec<usize>,
    /// By the file server's inode.
    by_inner: HashMap<u64, u64>,
    /// Nodes of a predecessor that the file server does not know: inode numbers and ids, sorted.
    /// Those that it learns of stay here without an id.
    unknown: Vec<(u64, u64)>,
    serial: u64,
}

impl Table {
    /// A node.
    pub(crate) fn node(&self, id: u64) -> Option<&Node> {
        self.nodes.get(layout::slot(id))?.as_ref().filter(|node| node.id == id)
    }

    fn node_mut(&mut self, id: u64) -> Option<&mut Node> {
        self.nodes.get_mut(layout::slot(id))?.as_mut().filter(|node| node.id == id)
    }

    /// The node that the file server knows as `inner`.
    pub(crate) fn by_inner(&self, inner: u64) -> Option<&Node> {
        self.node(*self.by_inner.get(&inner)?)
    }

    /// Nodes with this inode number that the file server does not know.
    pub(crate) fn unknown(&self, inode: u64) -> Vec<u64> {
        let first = self.unknown.partition_point(|(other, _id)| *other < inode);
        let same = self.unknown[first..].iter().take_while(|(other, _id)| *other == inode);
        same.map(|(_inode, id)| *id).filter(|id| *id != 0).collect()
    }

    /// Whether a new file can still be told of.
    pub(crate) fn has_room(&self) -> bool {
        let free_handles = layout::handle_slots(self.ledger.words()) - self.handles.len();
        self.has_node_room() && free_handles + self.free_handles.len() > MARGIN
    }

    fn has_node_room(&self) -> bool {
        let free = layout::node_slots(self.ledger.words()).saturating_sub(self.nodes.len());
        free + self.free_nodes.len() > MARGIN
    }

    /// Adds a node that was found at `spot`, and pins it.
    pub(crate) fn add(
        &mut self,
        spot: &Spot,
        (inode, kind): (u64, u32),
        inner: u64,
        is_made: bool,
    ) -> Result<u64, Full> {
        let slots = layout::node_slots(self.ledger.words());
        if !is_made && !self.has_node_room() {
            return Err(Full);
        }
        let mut writes = Writes::new();
        let slot = match self.free_nodes.pop() {
            Some(slot) => slot,
            None if self.nodes.len() < slots => {
                self.nodes.push(None);
                writes.push((layout::AT_NODES_END, self.nodes.len() as u64));
                self.nodes.len() - 1
            }
            None => return Err(Full),
        };
        let id = self.next_id(slot, &mut writes);
        let node = Node::new(id, (inode, kind), Place::Inner(inner));
        self.nodes[slot] = Some(node);
        self.by_inner.insert(inner, id);
        self.put_at(id, Some(spot), &mut writes);
        self.ledger.commit(&writes);
        self.pin(id);
        Ok(id)
    }

    fn next_id(&mut self, slot: usize, writes: &mut Writes) -> u64 {
        self.serial += 1;
        writes.push((layout::AT_SERIAL, self.serial));
        layout::id(self.serial, slot)
    }

    /// A node is about to be told of: it stays until that is settled.
    pub(crate) fn pin(&mut self, id: u64) {
        if let Some(node) = self.node_mut(id) {
            node.pins += 1;
        }
    }

    /// Says where nodes are from now on; nowhere, if only open files and the guest's memory of
    /// them are left. All of it happens at once, together with `more`.
    ///
    /// Gives which nodes lost their last user by it.
    pub(crate) fn rename(&mut self, moves: &[(u64, Option<Spot>)], more: Writes) -> Vec<Gone> {
        let mut writes = more;
        let mut left = Vec::new();
        for (id, spot) in moves {
            left.extend(self.node(*id).map(|node| node.parent));
            self.put_at(*id, spot.as_ref(), &mut writes);
        }
        self.ledger.commit(&writes);
        left.into_iter().flat_map(|parent| self.drop_unused(parent)).collect()
    }

    fn put_at(&mut self, id: u64, spot: Option<&Spot>, writes: &mut Writes) {
        let Some(before) = self.node(id).map(|node| node.parent) else { return };
        // A folder that the guest does not know can't be one's place.
        let spot = spot.filter(|spot| self.node(spot.parent).is_some());
        if let Some(spot) = spot {
            self.node_mut(spot.parent).into_iter().for_each(|parent| parent.children += 1);
        }
        self.node_mut(before).into_iter().for_each(|parent| parent.children -= 1);
        if let Some(node) = self.node_mut(id) {
            node.parent = spot.map_or(0, |spot| spot.parent);
            node.write(spot.map(|spot| &*spot.name), writes);
        }
    }

    /// Whether the guest knows a node as being at this very place.
    pub(crate) fn is_at(&self, id: u64, parent: u64, name: &CStr) -> bool {
        self.node(id).is_some_and(|node| node.parent == parent)
            && self.name(id).as_deref() == Some(name)
    }

    /// The file server knows a node as `inner` from now on. Gives false if it is known already.
    pub(crate) fn learn(&mut self, id: u64, inner: u64) -> bool {
        let Some(node) = self.node_mut(id) else { return false };
        if matches!(node.place, Place::Inner(_)) {
            return false;
        }
        node.place = Place::Inner(inner);
        let inode = node.inode;
        self.by_inner.insert(inner, id);
        self.not_unknown(inode, id);
        true
    }

    /// A node without a name is this file.
    pub(crate) fn keep(&mut self, id: u64, file: OwnedFd) -> bool {
        let Some(node) = self.node_mut(id) else { return false };
        if node.is_named() || id == ROOT {
            return false;
        }
        node.place = Place::Kept(Arc::new(file));
        node.is_kept = true;
        true
    }

    /// A copy of a node's file is, or is no longer, in the supervisor's store.
    pub(crate) fn set_kept(&mut self, id: u64, is_kept: bool) {
        if let Some(node) = self.node_mut(id) {
            node.is_kept = is_kept;
        }
    }

    /// An open file of the guest's, if it is one of this node.
    pub(crate) fn handle(&self, id: u64, node: u64) -> Option<&Handle> {
        let handle = self.handles.get(layout::slot(id))?.as_ref();
        handle.filter(|handle| handle.id == id && handle.node == node)
    }

    /// A predecessor's handle is open again; gives false if it was in the meantime.
    pub(crate) fn reopen(&mut self, id: u64, opened: Opened) -> bool {
        if !self.may_open(&opened) {
            return false;
        }
        let handle = self.handles.get_mut(layout::slot(id)).and_then(Option::as_mut);
        let handle = handle.filter(|handle| matches!(handle.opened, Opened::NotYet));
        handle.is_some_and(|handle| {
            handle.opened = opened;
            true
        })
    }

    /// Files without a name are open in this process beside what the file server may open.
    fn may_open(&self, opened: &Opened) -> bool {
        let is_kept = |opened: &Opened| matches!(opened, Opened::Kept(_));
        let kept = || self.handles.iter().flatten().filter(|handle| is_kept(&handle.opened));
        !is_kept(opened) || kept().count() < MOST_KEPT
    }

    /// A file was opened; it gets to the ledger when that is settled.
    pub(crate) fn open(
        &mut self,
        node: u64,
        flags: u32,
        is_folder: bool,
        opened: Opened,
    ) -> Result<u64, Full> {
        let slots = layout::handle_slots(self.ledger.words());
        if !self.may_open(&opened) {
            return Err(Full);
        }
        let slot = match self.free_handles.pop() {
            Some(slot) => slot,
            None if self.handles.len() < slots => {
                self.handles.push(None);
                self.handles.len() - 1
            }
            None => return Err(Full),
        };
        let mut writes = Writes::new();
        let id = self.next_id(slot, &mut writes);
        self.ledger.commit(&writes);
        self.handles[slot] = Some(Handle { id, node, flags, is_folder, opened });
        self.node_mut(node).into_iter().for_each(|node| node.opens += 1);
        Ok(id)
    }

    /// Writes a queue's record.
    pub(crate) fn write_record(&self, queue: usize, key: Key, stage: &Stage) {
        let mut writes = Writes::new();
        record::write(queue, key, stage, &mut writes);
        self.ledger.commit(&writes);
    }

    /// Takes a queue's record back.
    pub(crate) fn erase_record(&self, queue: usize) {
        let mut writes = Writes::new();
        record::erase(queue, &mut writes);
        self.ledger.commit(&writes);
    }

    /// A queue's record.
    pub(crate) fn record(&self, queue: usize) -> Option<(Key, Stage)> {
        record::read(queue, &self.ledger)
    }

    fn not_unknown(&mut self, inode: u64, id: u64) {
        let first = self.unknown.partition_point(|(other, _id)| *other < inode);
        let mut same = self.unknown[first..].iter_mut().take_while(|(other, _id)| *other == inode);
        if let Some((_inode, known)) = same.find(|(_inode, other)| *other == id) {
            *known = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;

    use super::*;
    use crate::ledger::fault;

    const KEY: Key = Key { unique: 2, head: 0 };
    const FILE: u32 = libc::S_IFREG;

    fn table(nodes: usize) -> Table {
        let ledger = Ledger::open(fault::state(layout::node(nodes) * 8)).unwrap();
        let mut table = Table::load(ledger).unwrap();
        table.begin(&Session::new(vec![1; 8]));
        table
    }

    fn spot(parent: u64, name: &str) -> Spot {
        Spot::new(parent, &CString::new(name).unwrap())
    }

    #[test]
    fn a_full_table_refuses_what_is_found_and_takes_what_is_made_already() {
        let mut table = table(2 + MARGIN + 10);
        for inner in 10..20 {
            table.add(&spot(ROOT, "found"), (inner, FILE), inner, false).unwrap();
        }
        assert!(!table.has_room());
        assert_eq!(table.add(&spot(ROOT, "found"), (9, FILE), 9, false), Err(Full));
        let mut last = 0;
        for inner in 100..100 + MARGIN as u64 {
            last = table.add(&spot(ROOT, "made"), (inner, FILE), inner, true).unwrap();
        }
        assert_eq!(table.add(&spot(ROOT, "made"), (9, FILE), 9, true), Err(Full));
        // A slot that is free again holds another node.
        let gone = table.unpin(last);
        assert_eq!(gone.len(), 1);
        let next = table.add(&spot(ROOT, "made"), (9, FILE), 9, true).unwrap();
        assert_eq!(layout::slot(next), layout::slot(last));
        assert!(next != last && table.node(last).is_none() && table.node(next).is_some());
    }

    #[test]
    fn a_folder_stays_as_long_as_something_is_known_by_it() {
        let mut table = table(1000);
        let outer = table.add(&spot(ROOT, "outer"), (10, libc::S_IFDIR), 10, false).unwrap();
        let inner = table.add(&spot(outer, "inner"), (11, libc::S_IFDIR), 11, false).unwrap();
        let file = table.add(&spot(inner, "file"), (12, FILE), 12, false).unwrap();
        let told = Told { found: vec![outer, inner, file], ..Told::default() };
        assert_eq!(table.settle(0, KEY, &told, (0, 0)), []);
        let forgotten = vec![(outer, 1), (inner, 5)];
        let told = Told { forgotten, ..Told::default() };
        assert_eq!(table.settle(0, KEY, &told, (0, 0)), []);
        let told = Told { forgotten: vec![(file, u64::MAX)], ..Told::default() };
        let gone: Vec<u64> =
            table.settle(0, KEY, &told, (0, 0)).into_iter().map(|gone| gone.id).collect();
        assert_eq!(gone, [file, inner, outer]);
    }

    #[test]
    fn no_id_of_another_mount_and_no_made_up_one_is_anything() {
        let mut table = table(1000);
        let node = table.add(&spot(ROOT, "file"), (10, FILE), 10, false).unwrap();
        let handle = table.open(node, 0, false, Opened::Inner(1)).unwrap();
        assert!(table.handle(handle, node).is_some());
        assert!(table.handle(handle, ROOT).is_none());
        for made_up in [0, 2, node + 1, node ^ 1 << 40, u64::MAX] {
            assert!(table.node(made_up).is_none(), "{made_up}");
            assert!(table.handle(made_up, node).is_none(), "{made_up}");
        }
        assert!(table.clear().is_empty());
        assert!(table.node(node).is_none() && table.handle(handle, node).is_none());
        assert!(table.node(ROOT).is_some());
    }
}
