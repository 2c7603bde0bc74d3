//! The table's beginning: empty for a new mount, or as a predecessor left it.

use std::collections::HashMap;

use super::{Gone, Node, Place, ROOT, Table};
use crate::layout::{self, INIT_WORDS};
use crate::ledger::{Ledger, LedgerError, Writes};
use crate::record;

/// The arguments of the INIT request that began the guest's mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Session(Vec<u8>);

impl Session {
    /// As much of them as has a meaning.
    pub(crate) fn new(mut arguments: Vec<u8>) -> Self {
        arguments.truncate(8 * INIT_WORDS);
        Self(arguments)
    }

    /// The arguments.
    pub(crate) fn arguments(&self) -> &[u8] {
        &self.0
    }
}

impl Table {
    /// Takes up what is in the ledger.
    ///
    /// # Errors
    ///
    /// Fails if it does not add up.
    pub(crate) fn load(ledger: Ledger) -> Result<Self, LedgerError> {
        let serial = ledger.load(layout::AT_SERIAL);
        let nodes = vec![None, Some(Node::new(ROOT, (0, libc::S_IFDIR), Place::Inner(ROOT)))];
        let mut table = Self {
            ledger,
            nodes,
            free_nodes: Vec::new(),
            handles: Vec::new(),
            free_handles: Vec::new(),
            by_inner: HashMap::from([(ROOT, ROOT)]),
            unknown: Vec::new(),
            serial,
        };
        if table.session().is_some() {
            table.load_nodes()?;
            table.load_handles()?;
        }
        Ok(table)
    }

    fn load_nodes(&mut self) -> Result<(), LedgerError> {
        let end = usize::try_from(self.ledger.load(layout::AT_NODES_END)).ok();
        let end = end.filter(|end| *end <= layout::node_slots(self.ledger.words()));
        let end = end.ok_or(LedgerError::Damaged { what: "it has more nodes than room" })?;
        for slot in self.nodes.len()..end {
            let node = Node::read(slot, &self.ledger);
            match &node {
                Some(node) => self.unknown.push((node.inode, node.id)),
                None => self.free_nodes.push(slot),
            }
            self.nodes.push(node);
        }
        self.unknown.sort_unstable();
        for slot in 2..self.nodes.len() {
            let Some((id, parent)) = self.nodes[slot].as_ref().map(|node| (node.id, node.parent))
            else {
                continue;
            };
            if let Some(parent) = self.node_mut(parent) {
                parent.children += 1;
            } else if let Some(node) = self.node_mut(id) {
                node.parent = 0;
            }
        }
        Ok(())
    }

    fn load_handles(&mut self) -> Result<(), LedgerError> {
        let end = usize::try_from(self.ledger.load(layout::AT_HANDLES_END)).ok();
        let end = end.filter(|end| *end <= layout::handle_slots(self.ledger.words()));
        let end = end.ok_or(LedgerError::Damaged { what: "it has more open files than room" })?;
        for slot in 0..end {
            let handle = self.read_handle(slot);
            let handle = handle.filter(|handle| self.node(handle.node).is_some());
            match &handle {
                Some(handle) => {
                    let node = self.node_mut(handle.node);
                    node.into_iter().for_each(|node| node.opens += 1);
                }
                None => self.free_handles.push(slot),
            }
            self.handles.push(handle);
        }
        Ok(())
    }

    /// Removes all nodes that the guest was never told of.
    pub(crate) fn drop_untold(&mut self) -> Vec<Gone> {
        let ids: Vec<u64> = self.nodes.iter().flatten().map(|node| node.id).collect();
        ids.into_iter().flat_map(|id| self.drop_unused(id)).collect()
    }

    /// The guest's mount, if there is one.
    pub(crate) fn session(&self) -> Option<Session> {
        let len = usize::try_from(self.ledger.load(layout::AT_INIT_BYTES)).ok()?;
        let words = (0..INIT_WORDS).map(|index| self.ledger.load(layout::AT_INIT + index));
        let mut arguments: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        arguments.truncate(len);
        (!arguments.is_empty()).then_some(Session(arguments))
    }

    /// A mount has begun.
    pub(crate) fn begin(&mut self, session: &Session) {
        let mut writes = Writes::new();
        for (index, part) in session.0.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            writes.push((layout::AT_INIT + index, u64::from_le_bytes(word)));
        }
        writes.push((layout::AT_INIT_BYTES, session.0.len() as u64));
        self.ledger.commit(&writes);
    }

    /// Forgets everything: the mount is over. Gives the nodes whose files are in the store.
    pub(crate) fn clear(&mut self) -> Vec<u64> {
        let kept = self.nodes.iter().flatten().filter(|node| node.is_kept);
        let kept = kept.map(|node| node.id).collect();
        let mut writes = vec![
            (layout::AT_INIT_BYTES, 0),
            (layout::AT_NODES_END, 2),
            (layout::AT_HANDLES_END, 0),
        ];
        (0..layout::RECORDS).for_each(|queue| record::erase(queue, &mut writes));
        self.ledger.commit(&writes);
        self.nodes.truncate(1);
        self.nodes.push(Some(Node::new(ROOT, (0, libc::S_IFDIR), Place::Inner(ROOT))));
        self.free_nodes.clear();
        self.handles.clear();
        self.free_handles.clear();
        self.by_inner = HashMap::from([(ROOT, ROOT)]);
        self.unknown.clear();
        kept
    }
}
