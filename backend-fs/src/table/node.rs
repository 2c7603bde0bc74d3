//! One node, and when it ends.

use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::{ROOT, Table};
use crate::layout;
use crate::ledger::{Ledger, Writes};

const ID: usize = 0;
const COUNT: usize = 1;
const PARENT: usize = 2;
const INODE: usize = 3;
/// The type in the lower half, the name's length in the upper one.
const KIND: usize = 4;
const NAME: usize = 5;

/// What a node is to the file server.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    /// To be found by its name.
    Unknown,
    /// The file server's inode.
    Inner(u64),
    /// It has no name any more; this is the file.
    Kept(Arc<OwnedFd>),
}

/// A file, folder or whatever that the guest knows.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) id: u64,
    /// The folder that it is in; zero without a name. The name itself is in the ledger only.
    pub(crate) parent: u64,
    /// Its inode number.
    pub(crate) inode: u64,
    /// Its type, as in `st_mode`.
    pub(crate) kind: u32,
    pub(crate) place: Place,
    /// Whether a copy of it is in the supervisor's store.
    pub(crate) is_kept: bool,
    /// How often the guest was told of it, less how often it forgot.
    pub(super) count: u64,
    /// How often it is about to be told of it.
    pub(super) pins: u32,
    pub(super) children: u32,
    pub(super) opens: u32,
}

/// A node that is no more: what there is to be given back.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Gone {
    pub(crate) id: u64,
    /// The file server's inode, if it has one.
    pub(crate) inner: Option<u64>,
    pub(crate) is_kept: bool,
}

impl Node {
    pub(super) fn new(id: u64, (inode, kind): (u64, u32), place: Place) -> Self {
        Self {
            id,
            parent: 0,
            inode,
            kind: kind & libc::S_IFMT,
            place,
            is_kept: false,
            count: 0,
            pins: 0,
            children: 0,
            opens: 0,
        }
    }

    /// All of it, with a name for it.
    pub(super) fn write(&self, name: Option<&CStr>, writes: &mut Writes) {
        let place = layout::node(layout::slot(self.id));
        let name_bytes = name.map_or(0, |name| name.to_bytes().len() as u64);
        writes.extend([
            (place + PARENT, self.parent),
            (place + INODE, self.inode),
            (place + KIND, u64::from(self.kind) | name_bytes << 32),
            (place + COUNT, self.count),
            (place + ID, self.id),
        ]);
        if let Some(name) = name {
            layout::write_name(place + NAME, name, writes);
        }
    }

    pub(super) fn write_count(&self, writes: &mut Writes) {
        writes.push((layout::node(layout::slot(self.id)) + COUNT, self.count));
    }

    /// The node in a slot; nothing if there is none, or it makes no sense.
    pub(super) fn read(slot: usize, ledger: &Ledger) -> Option<Self> {
        let place = layout::node(slot);
        let id = ledger.load(place + ID);
        if id == 0 || layout::slot(id) != slot {
            return None;
        }
        let kind = ledger.load(place + KIND);
        let low = u32::try_from(kind & 0xffff_ffff).ok()?;
        let mut node = Self::new(id, (ledger.load(place + INODE), low), Place::Unknown);
        node.count = ledger.load(place + COUNT);
        node.parent = ledger.load(place + PARENT);
        if kind >> 32 == 0 {
            node.parent = 0;
        }
        Some(node)
    }

    /// Whether it can be found by a name.
    pub(crate) fn is_named(&self) -> bool {
        self.parent != 0
    }

    pub(super) fn is_unused(&self) -> bool {
        self.id != ROOT && (self.count, self.pins, self.children, self.opens) == (0, 0, 0, 0)
    }
}

impl Table {
    /// A node's name in its folder, if it has one.
    pub(crate) fn name(&self, id: u64) -> Option<CString> {
        self.node(id).filter(|node| node.is_named())?;
        let place = layout::node(layout::slot(id));
        let name_bytes = self.ledger.load(place + KIND) >> 32;
        layout::read_name(place + NAME, name_bytes, |at| self.ledger.load(at))
    }

    /// Removes a node if nobody needs it, and then its folder, and so on.
    pub(crate) fn drop_unused(&mut self, id: u64) -> Vec<Gone> {
        let mut gone = Vec::new();
        let mut next = id;
        while let Some(node) = self.node(next).filter(|node| node.is_unused()) {
            let (id, parent, inode, is_kept) = (node.id, node.parent, node.inode, node.is_kept);
            let inner = match node.place {
                Place::Inner(inner) => Some(inner),
                Place::Unknown | Place::Kept(_) => None,
            };
            let slot = layout::slot(id);
            self.ledger.commit(&[(layout::node(slot) + ID, 0)]);
            self.nodes[slot] = None;
            self.free_nodes.push(slot);
            if let Some(inner) = inner {
                self.by_inner.remove(&inner);
            }
            self.not_unknown(inode, id);
            self.node_mut(parent).into_iter().for_each(|parent| parent.children -= 1);
            gone.push(Gone { id, inner, is_kept });
            next = parent;
        }
        gone
    }
}
