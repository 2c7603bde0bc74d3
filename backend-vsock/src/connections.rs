//! The engine: moves packets between the rings, the connections and the host programs.
//!
//! ```text
//!   TX ring --from_guest--> Connection (pure) --> Socket --> host program
//!   RX ring <--to_guest---- turns <-- Table <---- Socket <-- host program
//! ```
//!
//! What is bounded, and what happens at the bound:
//!
//! - Packets for the guest are not queued: a connection knows what it owes and says it when its
//!   turn comes, so a guest without free buffers costs nothing. Host programs are not read
//!   meanwhile.
//! - Resets that belong to no connection are queued, [`RESETS_MAX`] of them; beyond that no
//!   packet of the guest is taken (virtio 1.3, section 5.10.6.1.1, allows it).
//! - Bytes for a host program that does not read: the guest's credit.
//! - Connections and greetings: see `table.rs`.

mod from_guest;
mod programs;
mod to_guest;

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use backend_daemon::device::{DeviceError, Rings, Sources};
use backend_daemon::ring::Segment;

use crate::connection::Event;
use crate::fault::Faults;
use crate::host::Host;
use crate::packet::{Cid, Header};
use crate::table::Table;

/// The most resets that wait for room in the RX ring.
pub const RESETS_MAX: usize = 256;
/// The most packets of one direction in one call of the worker.
const BUDGET: usize = 512;

/// All connections, and where they come from.
#[derive(Debug)]
pub struct Connections {
    guest: Cid,
    host: Host,
    table: Table,
    /// Answers to packets that fit no connection.
    resets: VecDeque<Header>,
    /// Whether the listening socket is polled.
    listening: bool,
    faults: Faults,
}

/// Why a loop over a ring ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// There is nothing left to do, or no buffer to do it with; an event will say when.
    Idle,
    /// It was enough for one call.
    Budget,
    /// There are as many resets as may wait.
    Resets,
}

impl Connections {
    /// None yet.
    #[must_use]
    pub fn new(guest: Cid, host: Host) -> Self {
        Self {
            guest,
            host,
            table: Table::new(),
            resets: VecDeque::with_capacity(RESETS_MAX),
            listening: true,
            faults: Faults::default(),
        }
    }

    /// The socket that host programs connect to.
    #[must_use]
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.host.listener()
    }

    /// Moves packets until nothing moves any more. Says whether it stopped before that, so that
    /// others have their turn.
    ///
    /// # Errors
    ///
    /// Fails if the guest broke a ring, or the host can't poll.
    pub fn pump(&mut self, rings: &mut Rings<'_>) -> Result<bool, DeviceError> {
        loop {
            let taken = self.take_packets(rings)?;
            let given = self.give_packets(rings)?;
            if taken == Stop::Budget || given == Stop::Budget {
                return Ok(true);
            }
            if taken == Stop::Idle || self.resets.len() == RESETS_MAX {
                return Ok(false);
            }
        }
    }

    /// The guest that knew these connections is no more: ends them all. Bytes that it sent are
    /// still delivered, and host programs that it has not heard of yet may meet the next one.
    ///
    /// # Errors
    ///
    /// Fails if the host can't poll.
    pub fn forget_guest(&mut self, sources: &mut dyn Sources) -> Result<(), DeviceError> {
        self.resets.clear();
        for slot in self.table.slots() {
            if let Some(entry) = self.table.get(slot) {
                entry.machine.apply(Event::GuestGone);
            }
            self.settle(slot, sources)?;
        }
        Ok(())
    }

    fn settle(&mut self, slot: usize, sources: &mut dyn Sources) -> Result<(), DeviceError> {
        self.table.settle(slot, sources).map_err(cannot_poll)
    }
}

fn cannot_poll(source: io::Error) -> DeviceError {
    DeviceError::Host { what: "cannot poll a host program's socket", source }
}

/// The first `len` bytes of `segments`.
fn limit(segments: impl Iterator<Item = Segment>, len: usize) -> Vec<Segment> {
    let mut left = len;
    let cut = segments.map_while(|segment| {
        let head = segment.head(left);
        left -= head.len();
        (!head.is_empty()).then_some(head)
    });
    cut.collect()
}
