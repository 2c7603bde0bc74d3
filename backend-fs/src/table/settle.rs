//! The end of a request: what the guest is told of, and what it gave back, counts from here on.

use super::{Gone, Handle, Opened, Table};
use crate::layout;
use crate::ledger::Writes;
use crate::record::{self, Key, Stage};

const ID: usize = 0;
const NODE: usize = 1;
/// The flags in the lower half, whether it is a folder in the upper one.
const FLAGS: usize = 2;

/// How many nodes are counted in one change of the ledger.
const AT_ONCE: usize = 256;

/// What one request tells the guest of, and what the guest gives back by it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Told {
    /// Nodes, each as often as it is told of; they are pinned.
    pub(crate) found: Vec<u64>,
    /// Files that were opened for it.
    pub(crate) opened: Vec<u64>,
    /// Files that it closed.
    pub(crate) closed: Vec<u64>,
    /// Nodes that it forgot so many times.
    pub(crate) forgotten: Vec<(u64, u64)>,
}

impl Told {
    /// Whether nothing has to be settled.
    pub(crate) fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

impl Table {
    /// Settles a request whose answer is written; `skipped` of the forgotten nodes were settled by
    /// a predecessor. Gives the nodes that are no more.
    ///
    /// A readdir tells of a bounded number of nodes: all of them fit into one change. What is
    /// forgotten need not, and is recorded in parts.
    pub(crate) fn settle(
        &mut self,
        queue: usize,
        key: Key,
        told: &Told,
        (written_bytes, skipped): (u32, usize),
    ) -> Vec<Gone> {
        let mut writes = Writes::new();
        for id in &told.found {
            let Some(node) = self.node_mut(*id) else { continue };
            node.pins -= 1;
            node.count = node.count.saturating_add(1);
            node.write_count(&mut writes);
        }
        for id in &told.opened {
            let handle = self.handles.get(layout::slot(*id)).and_then(Option::as_ref);
            handle.into_iter().for_each(|handle| write_handle(handle, &mut writes));
        }
        if !told.opened.is_empty() {
            writes.push((layout::AT_HANDLES_END, self.handles.len() as u64));
        }
        for id in &told.closed {
            writes.push((layout::handle(layout::slot(*id)) + ID, 0));
        }
        let mut left = told.forgotten.get(skipped..).unwrap_or_default();
        while left.len() > AT_ONCE {
            let part = left.split_off(..AT_ONCE).unwrap_or_default();
            self.forget(part, &mut writes);
            let changes = told.forgotten.len() - left.len();
            record::write(queue, key, &Stage::Part { changes }, &mut writes);
            self.ledger.commit(&writes);
            writes.clear();
        }
        self.forget(left, &mut writes);
        record::write(queue, key, &Stage::Done { written_bytes }, &mut writes);
        self.ledger.commit(&writes);
        let closed: Vec<u64> = told.closed.iter().filter_map(|id| self.close(*id)).collect();
        let ended = told.found.iter().chain(told.forgotten.iter().map(|(id, _count)| id));
        let ended: Vec<u64> = ended.copied().chain(closed).collect();
        ended.into_iter().flat_map(|id| self.drop_unused(id)).collect()
    }

    fn forget(&mut self, nodes: &[(u64, u64)], writes: &mut Writes) {
        for (id, count) in nodes {
            if let Some(node) = self.node_mut(*id) {
                // A guest that forgets more than it was told of has nothing left.
                node.count = node.count.saturating_sub(*count);
                node.write_count(writes);
            }
        }
    }

    /// Undoes what a request would have told the guest of: it is answered with an error.
    ///
    /// Gives the nodes that are no more, and the handles of the file server to close.
    pub(crate) fn take_back(&mut self, told: &Told) -> (Vec<Gone>, Vec<(u64, Handle)>) {
        let mut ended = Vec::new();
        for id in &told.found {
            self.node_mut(*id).into_iter().for_each(|node| node.pins -= 1);
            ended.push(*id);
        }
        let mut closed = Vec::new();
        for id in &told.opened {
            let handle = self.handles.get(layout::slot(*id)).cloned().flatten();
            ended.extend(self.close(*id));
            closed.extend(handle.map(|handle| (*id, handle)));
        }
        let gone = ended.into_iter().flat_map(|id| self.drop_unused(id)).collect();
        (gone, closed)
    }

    /// Takes one pin away again, of a node that the guest is not told of after all.
    pub(crate) fn unpin(&mut self, id: u64) -> Vec<Gone> {
        self.node_mut(id).into_iter().for_each(|node| node.pins -= 1);
        self.drop_unused(id)
    }

    /// Gives the node that was open.
    fn close(&mut self, id: u64) -> Option<u64> {
        let slot = layout::slot(id);
        let handle = self.handles.get_mut(slot)?.take_if(|handle| handle.id == id)?;
        self.free_handles.push(slot);
        self.node_mut(handle.node).into_iter().for_each(|node| node.opens -= 1);
        Some(handle.node)
    }

    /// The handle in a slot, as a predecessor left it.
    pub(super) fn read_handle(&self, slot: usize) -> Option<Handle> {
        let place = layout::handle(slot);
        let id = self.ledger.load(place + ID);
        let flags = self.ledger.load(place + FLAGS);
        Some(Handle {
            id: Some(id).filter(|id| *id != 0 && layout::slot(*id) == slot)?,
            node: self.ledger.load(place + NODE),
            flags: u32::try_from(flags & 0xffff_ffff).ok()?,
            is_folder: flags >> 32 != 0,
            opened: Opened::NotYet,
        })
    }
}

fn write_handle(handle: &Handle, writes: &mut Writes) {
    let place = layout::handle(layout::slot(handle.id));
    let flags = u64::from(handle.flags) | u64::from(handle.is_folder) << 32;
    writes.extend([(place + NODE, handle.node), (place + FLAGS, flags), (place + ID, handle.id)]);
}
