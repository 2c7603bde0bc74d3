//! The beginning of a process that has a predecessor: which announced changes were made?
//!
//! It is decided before anything is served, so that names in the table and in the share agree. As
//! long as nobody but the guest changes the share, what there is says what was done: a name that
//! was free and is taken now was taken by the request, and so on. If somebody else does change it,
//! this is a good guess.

use std::io;
use std::os::fd::OwnedFd;

use super::{Core, Inner, Lasting};
use crate::layout::RECORDS;
use crate::ledger::Writes;
use crate::record::{self, Intent, Spot, Stage};

/// Where nodes are from now on.
type Places = Vec<(u64, Option<Spot>)>;

impl<F: Inner> Lasting<F> {
    /// Takes up what a predecessor left; `held` is what it left in the store. The file server has
    /// to be mounted.
    pub(crate) fn recover(&self, held: Vec<(u64, OwnedFd)>) {
        let core = &self.0;
        let is_open = |queue: &usize| {
            let record = core.table().record(*queue);
            matches!(
                record,
                Some((
                    _,
                    Stage::Begun(Intent::Make { .. } | Intent::Remove { .. } | Intent::Move(_))
                ))
            )
        };
        let mut open: Vec<usize> = (0..RECORDS).filter(is_open).collect();
        // A folder that was being renamed is found only when that is decided: as long as one
        // decision makes another one possible, go on.
        loop {
            let before = open.len();
            open.retain(|queue| core.decide(*queue).is_err());
            if open.len() == before {
                break;
            }
        }
        for queue in open {
            log::warn!("queue {queue}: cannot tell whether its last request was carried out");
            core.table().erase_record(queue);
        }
        core.take_over(held);
    }
}

impl<F> Lasting<F> {
    /// Lets go of files that were left to a mount that is over.
    pub(crate) fn discard(&self, held: &[(u64, OwnedFd)]) {
        self.0.keep.take_over(held.len());
        held.iter().for_each(|(node, _file)| self.0.keep.remove(*node));
    }
}

impl<F: Inner> Core<F> {
    fn decide(&self, queue: usize) -> io::Result<()> {
        let Some((key, Stage::Begun(intent))) = self.table().record(queue) else { return Ok(()) };
        let Some(outcome) = self.outcome(&intent)? else {
            self.table().erase_record(queue);
            return Ok(());
        };
        let mut writes = Writes::new();
        record::write(queue, key, &Stage::Carried(intent), &mut writes);
        let left = self.table().rename(&outcome, writes);
        self.bury(left);
        Ok(())
    }

    /// Where nodes are by what was announced, if it was carried out.
    fn outcome(&self, intent: &Intent) -> io::Result<Option<Places>> {
        let inode_at = |spot: &Spot| {
            let folder = self.folder(spot.parent)?;
            Ok::<_, io::Error>(self.see(folder, &spot.name)?.map(|seen| seen.inode))
        };
        Ok(match intent {
            Intent::Make { spot, inode } => {
                let now = inode_at(spot)?;
                let is_it = now.is_some() && inode.is_none_or(|inode| now == Some(inode));
                is_it.then(Vec::new)
            }
            Intent::Remove { spot, inode, node } => {
                let is_gone = inode_at(spot)? != Some(*inode);
                is_gone.then(|| node.iter().map(|node| (*node, None)).collect())
            }
            Intent::Move(change) => {
                let (from, to) = (inode_at(&change.from)?, inode_at(&change.to)?);
                let is_left = match change.target {
                    Some((target, _)) if change.exchanges => from == Some(target),
                    _ => from != Some(change.inode),
                };
                (is_left && to == Some(change.inode)).then(|| change.outcome())
            }
            Intent::Append { .. } | Intent::Attribute { .. } => None,
        })
    }

    /// Takes over the files without a name, and lets go of what nobody needs any more.
    fn take_over(&self, held: Vec<(u64, OwnedFd)>) {
        self.keep.take_over(held.len());
        for (node, file) in held {
            if !self.table().keep(node, file) {
                self.keep.remove(node);
            }
        }
        let gone = self.table().drop_untold();
        self.bury(gone);
    }
}
