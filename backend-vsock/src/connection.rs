//! One connection between a host program and a guest's socket, as a state machine. Pure: no
//! descriptors, no buffers, no rings; its owner does what the machine says.
//!
//! The protocol in ten lines (virtio 1.3, section 5.10.6):
//!
//! - A side that wants a connection sends REQUEST; the other answers RESPONSE, or RST to refuse.
//! - RW carries bytes; the receiver's buffer bounds what may be on its way (`credit.rs`), and
//!   CREDIT_UPDATE tells of room when there is nothing else to say. CREDIT_REQUEST asks for it.
//! - SHUTDOWN says which directions its sender is done with, for good: bit 0, it will receive no
//!   more; bit 1, it will send no more. Either alone is a half-close.
//! - After a SHUTDOWN of both, the other side finishes and sends RST. Any RST ends the connection
//!   at once; it is never answered. A packet that fits no connection is answered with RST.
//!
//! ```text
//!    host program connects                                guest sends REQUEST
//!             |                                                    |
//!             v                                                    v
//!         Greeting --CONNECT--> Requesting --REQUEST sent--> Requested      Accepting
//!             |                     |                         |    |            |
//!             |                     |            RST, gone    |    | RESPONSE   | RESPONSE sent
//!             |   host hangs up     |  <----------------------'    v            v
//!             '-------> Gone <------'                             Open <--------'
//!                        ^                                         |
//!                        |                          guest is done both ways and all its bytes
//!                        |                          are with the host; or it broke the protocol
//!                        |                                         v
//!                        '------- RST sent, or RST came ------- Resetting
//! ```
//!
//! Gone and Resetting speak of the guest's side. Bytes that the guest sent before are still the
//! owner's to deliver: the host program's socket stays open until it has them.

use crate::credit::{Credit, Overrun};
use crate::packet::{Header, Op, Shut};

/// Where a connection stands. See the module's picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A host program is connected and has not said yet to which port.
    Greeting,
    /// It has; the guest is yet to be asked.
    Requesting,
    /// The guest was asked.
    Requested,
    /// The guest asked, a host program was found, the answer is yet to be sent.
    Accepting,
    /// Bytes flow.
    Open,
    /// The guest is yet to be told that it is over.
    Resetting,
    /// The guest knows of no connection (any more).
    Gone,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The host program named its port.
    Named,
    /// The guest sent a packet; what it says about credit is noted already.
    Packet {
        /// What for.
        op: Op,
        /// The header's flags.
        flags: u32,
        /// Length of the payload, in bytes.
        len_bytes: u32,
    },
    /// The guest sent a packet for this connection that makes no sense in itself.
    Nonsense,
    /// The packet that [`Connection::next`] chose is in the guest's memory.
    Sent(Packet),
    /// The host program will send no more; all it sent is read.
    HostEof,
    /// The host program will receive no more.
    HostDeaf,
    /// The host program closed its socket. What it sent before may be unread yet.
    HostGone,
    /// All bytes that the guest sent have left our buffer.
    Flushed,
    /// The guest that knew this connection is no more, or knows it no more.
    GuestGone,
}

/// What the owner has to do for an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// Tell the host program that it is connected.
    Greet,
    /// Pass the packet's payload on to the host program.
    Deliver,
    /// Count the payload as passed on: the host program does not want it.
    Discard,
}

/// The packet to send next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packet {
    /// Ask the guest.
    Request,
    /// Answer the guest.
    Response,
    /// End it.
    Reset,
    /// Tell which directions the host program is done with.
    Shutdown(Shut),
    /// At most so many bytes of the host program; at least one.
    Data(u32),
    /// Tell of credit.
    CreditUpdate,
    /// Ask for credit.
    CreditRequest,
}

impl Packet {
    /// Its operation.
    #[must_use]
    pub fn op(self) -> Op {
        match self {
            Self::Request => Op::Request,
            Self::Response => Op::Response,
            Self::Reset => Op::Reset,
            Self::Shutdown(_) => Op::Shutdown,
            Self::Data(_) => Op::Data,
            Self::CreditUpdate => Op::CreditUpdate,
            Self::CreditRequest => Op::CreditRequest,
        }
    }
}

/// One connection.
#[derive(Clone, Debug)]
pub struct Connection {
    phase: Phase,
    /// Both directions' flow control. The owner counts what leaves the buffer.
    pub credit: Credit,
    /// What the guest is done with.
    guest: Shut,
    /// What the host program is done with.
    host: Shut,
    /// What the guest was told of `host`.
    told: Shut,
    /// The guest asked for a credit update.
    owes_credit: bool,
    /// We asked the guest for credit and have had none since.
    asked_credit: bool,
}

impl Connection {
    /// A connection that a host program opens.
    #[must_use]
    pub fn greeting() -> Self {
        Self::new(Phase::Greeting)
    }

    /// A connection that the guest opened with `request`.
    #[must_use]
    pub fn accepting(request: &Header) -> Self {
        let mut connection = Self::new(Phase::Accepting);
        connection.note_credit(request);
        connection
    }

    fn new(phase: Phase) -> Self {
        Self {
            phase,
            credit: Credit::default(),
            guest: Shut::default(),
            host: Shut::default(),
            told: Shut::default(),
            owes_credit: false,
            asked_credit: false,
        }
    }

    /// Where it stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// What the guest is done with.
    #[must_use]
    pub fn guest_shut(&self) -> Shut {
        self.guest
    }

    /// Whether the host program's bytes are still wanted, now or later.
    #[must_use]
    pub fn wants_host_bytes(&self) -> bool {
        self.phase == Phase::Open && !self.host.send && !self.guest.receive
    }

    /// Takes note of the credit that every packet of the guest carries.
    pub fn note_credit(&mut self, header: &Header) {
        self.credit.update(header.buf_alloc, header.fwd_cnt);
        if self.credit.available() > 0 {
            self.asked_credit = false;
        }
    }

    /// Moves on. Every phase answers every event; what makes no sense changes nothing.
    pub fn apply(&mut self, event: Event) -> Effect {
        match event {
            Event::Packet { op, flags, len_bytes } => return self.packet(op, flags, len_bytes),
            Event::Nonsense => self.nonsense(),
            Event::Named if self.phase == Phase::Greeting => self.phase = Phase::Requesting,
            Event::Named => {}
            Event::Sent(packet) => self.sent(packet),
            Event::HostEof => self.host.send = true,
            Event::HostDeaf => self.host.receive = true,
            Event::HostGone => self.host_gone(),
            Event::Flushed if self.phase == Phase::Open && self.guest.is_both() => {
                self.phase = Phase::Resetting;
            }
            Event::Flushed => {}
            Event::GuestGone => match self.phase {
                // The guest was never told: the next one may answer.
                Phase::Greeting | Phase::Requesting => {}
                Phase::Requested
                | Phase::Accepting
                | Phase::Open
                | Phase::Resetting
                | Phase::Gone => self.phase = Phase::Gone,
            },
        }
        Effect::None
    }

    fn packet(&mut self, op: Op, flags: u32, len_bytes: u32) -> Effect {
        match (self.phase, op) {
            // Nothing of the guest's reaches these: it does not know of them.
            (Phase::Greeting | Phase::Requesting | Phase::Gone, _) => {}
            (_, Op::Reset) => self.phase = Phase::Gone,
            (Phase::Resetting, _) => {}
            (Phase::Requested, Op::Response) => {
                self.phase = Phase::Open;
                return Effect::Greet;
            }
            (Phase::Open, Op::Data) => return self.data(len_bytes),
            (Phase::Open | Phase::Accepting, Op::Shutdown) => {
                self.guest = self.guest.union(Shut::from_flags(flags));
            }
            (Phase::Open | Phase::Accepting, Op::CreditUpdate) => {}
            (Phase::Open | Phase::Accepting, Op::CreditRequest) => self.owes_credit = true,
            // A second REQUEST, an answer nobody asked for, or bytes before one.
            (Phase::Requested | Phase::Accepting | Phase::Open, _) => {
                self.phase = Phase::Resetting;
            }
        }
        Effect::None
    }

    fn nonsense(&mut self) {
        match self.phase {
            Phase::Requested | Phase::Accepting | Phase::Open => self.phase = Phase::Resetting,
            Phase::Greeting | Phase::Requesting | Phase::Resetting | Phase::Gone => {}
        }
    }

    fn data(&mut self, len_bytes: u32) -> Effect {
        if self.guest.send || self.credit.receive(len_bytes) == Err(Overrun) {
            self.phase = Phase::Resetting;
            return Effect::None;
        }
        if self.host.receive { Effect::Discard } else { Effect::Deliver }
    }

    fn sent(&mut self, packet: Packet) {
        match packet {
            Packet::Request => self.phase = Phase::Requested,
            Packet::Response => self.phase = Phase::Open,
            Packet::Reset => self.phase = Phase::Gone,
            Packet::Shutdown(shut) => self.told = shut,
            Packet::Data(len_bytes) => self.credit.send(len_bytes),
            Packet::CreditUpdate => {}
            Packet::CreditRequest => self.asked_credit = true,
        }
        // Every packet tells of credit.
        self.owes_credit = false;
    }

    fn host_gone(&mut self) {
        match self.phase {
            Phase::Greeting | Phase::Requesting => self.phase = Phase::Gone,
            Phase::Requested => self.phase = Phase::Resetting,
            Phase::Accepting | Phase::Open => {
                self.host.receive = true;
                self.host.send |= self.guest.receive;
            }
            Phase::Resetting | Phase::Gone => {}
        }
    }

    /// The packet to send next, if there is one. `readable`: the host program may have sent
    /// something that is not read yet.
    #[must_use]
    pub fn next(&self, readable: bool) -> Option<Packet> {
        match self.phase {
            Phase::Greeting | Phase::Requested | Phase::Gone => None,
            Phase::Requesting => Some(Packet::Request),
            Phase::Accepting => Some(Packet::Response),
            Phase::Resetting => Some(Packet::Reset),
            Phase::Open => self.next_open(readable && self.wants_host_bytes()),
        }
    }

    fn next_open(&self, readable: bool) -> Option<Packet> {
        let room_bytes = self.credit.available();
        if readable && room_bytes > 0 {
            return Some(Packet::Data(room_bytes));
        }
        if self.owes_credit || (self.credit.update_is_due() && !self.guest.send) {
            return Some(Packet::CreditUpdate);
        }
        if self.host != self.told && !self.guest.is_both() {
            return Some(Packet::Shutdown(self.host));
        }
        (readable && !self.asked_credit).then_some(Packet::CreditRequest)
    }
}

mod saved;
#[cfg(test)]
mod tests;
