//! The request that this thread serves: what the file server is not told, and what it leaves to do.
//!
//! virtiofsd calls the file system with a request's arguments alone. What else belongs to the
//! request is put down here before and picked up behind.

use std::cell::RefCell;

use crate::record::{Intent, Key};
use crate::table::Told;

/// What a predecessor did of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Past {
    /// Nothing that matters.
    #[default]
    Nothing,
    /// It may have done this or not.
    Begun(Intent),
    /// It has made the change, but not told of it.
    Carried,
    /// It has settled so many changes.
    Part(usize),
}

/// One request.
#[derive(Debug)]
pub(crate) struct Ticket {
    /// The queue that it is of.
    pub(crate) queue: usize,
    pub(crate) key: Key,
    pub(crate) past: Past,
    pub(crate) told: Told,
    /// Whether the queue's record is this request's.
    pub(crate) is_recorded: bool,
    /// Whether it is a READDIRPLUS: what does not fit into its answer is forgotten again.
    pub(crate) is_plus: bool,
    /// Whether it is an INIT that the file server took.
    pub(crate) has_mounted: bool,
}

impl Ticket {
    pub(crate) fn new(queue: usize, key: Key, past: Past) -> Self {
        let is_recorded = past != Past::Nothing;
        let told = Told::default();
        Self { queue, key, past, told, is_recorded, is_plus: false, has_mounted: false }
    }
}

thread_local! {
    static CURRENT: RefCell<Option<Ticket>> = const { RefCell::new(None) };
}

/// The thread serves this from now on.
pub(crate) fn set(ticket: Ticket) {
    CURRENT.set(Some(ticket));
}

/// The thread serves it no longer.
pub(crate) fn take() -> Option<Ticket> {
    CURRENT.take()
}

/// Asks or changes the ticket; nothing happens if the thread serves no request.
pub(crate) fn with<T: Default>(act: impl FnOnce(&mut Ticket) -> T) -> T {
    CURRENT.with_borrow_mut(|current| current.as_mut().map(act).unwrap_or_default())
}

/// Whether a predecessor has made the change that the request asks for.
pub(crate) fn is_carried() -> bool {
    with(|ticket| ticket.past == Past::Carried)
}

/// What a predecessor may have done.
pub(crate) fn begun() -> Option<Intent> {
    with(|ticket| match &ticket.past {
        Past::Begun(intent) => Some(intent.clone()),
        _ => None,
    })
}

/// The answer tells of a node, which is pinned.
pub(crate) fn found(node: u64) {
    with(|ticket| ticket.told.found.push(node));
}

/// The answer tells of an open file.
pub(crate) fn opened(handle: u64) {
    with(|ticket| ticket.told.opened.push(handle));
}
