//! What a table holds, for tests to compare.

use std::ffi::CString;

use super::Table;

/// A node's inode number, name, how often the guest knows of it, and how often it is open.
pub(crate) type Line = (u64, Option<CString>, u64, u32);

impl Table {
    /// All nodes, and how many files are open.
    pub(crate) fn census(&self) -> (Vec<Line>, usize) {
        let nodes = self.nodes.iter().flatten();
        let mut lines: Vec<Line> = nodes
            .map(|node| {
                let name = self.name(node.id);
                assert_eq!(node.pins, 0, "somebody is still about to tell of {}", node.id);
                (node.inode, name, node.count, node.opens)
            })
            .collect();
        lines.sort();
        (lines, self.handles.iter().flatten().count())
    }
}
