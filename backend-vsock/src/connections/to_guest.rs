//! Packets for the guest: the RX ring. A chain is taken only when there is something to say, and
//! put back if there turns out to be nothing.

use backend_daemon::device::{DeviceError, Rings, Sources};
use backend_daemon::ring::{self, Chain, Segment};

use super::{BUDGET, Connections, Stop, limit};
use crate::connection::{Event, Packet};
use crate::death;
use crate::device::RX;
use crate::ledger::{Word, low};
use crate::packet::{HEADER_BYTES, HOST_CID, Header, TYPE_STREAM};
use crate::socket::Received;

/// [`HEADER_BYTES`], as packets are counted.
const HEADER_LEN: u32 = 44;
/// The longest payload of one packet, in bytes: a long one must not keep others waiting.
const PAYLOAD_BYTES: u32 = 64 * 1024;

impl Connections {
    /// Gives packets until there is nothing to say or no chain to say it in.
    pub(super) fn give_packets(&mut self, rings: &mut Rings<'_>) -> Result<Stop, DeviceError> {
        for _ in 0..BUDGET {
            if self.ledger.resets() == 0 && !self.table.has_turns() {
                return Ok(Stop::Idle);
            }
            let Some(ring) = rings.ring(RX) else { return Ok(Stop::Idle) };
            let Some(chain) = ring.pop()? else { return Ok(Stop::Idle) };
            let done = ring.next_avail();
            if chain.writable_len() <= HEADER_BYTES as u64 {
                self.faults.note("a buffer has no room for a packet");
                self.given(done, 0);
                self.ledger.commit();
                ring.push(chain, 0)?;
                continue;
            }
            let len_bytes = match self.reset_into(&chain, done) {
                Some(len_bytes) => Some(len_bytes),
                None => self.turn_into(&chain, done, rings.sources())?,
            };
            let Some(ring) = rings.ring(RX) else { return Ok(Stop::Idle) };
            match len_bytes {
                Some(len_bytes) => ring.push(chain, len_bytes)?,
                None => ring.unpop(chain),
            }
            death::reach();
        }
        Ok(Stop::Budget)
    }

    /// Gives back the chain that a predecessor had filled, if it got no further.
    ///
    /// # Errors
    ///
    /// Fails if the guest broke the ring.
    pub fn finish_giving(&mut self, rings: &mut Rings<'_>) -> Result<(), DeviceError> {
        let Some(ring) = rings.ring(RX) else { return Ok(()) };
        let Some(chain) = ring.pop()? else { return Ok(()) };
        if self.ledger.position(Word::RxDone) == ring.next_avail() {
            ring.push(chain, low(self.ledger.get(Word::RxLen)))?;
        } else {
            ring.unpop(chain);
        }
        Ok(())
    }

    /// Stages that the chain before position `done` is filled.
    fn given(&mut self, done: u16, len_bytes: u32) {
        self.ledger.set(Word::RxDone, done);
        self.ledger.set(Word::RxLen, len_bytes);
    }

    fn reset_into(&mut self, chain: &Chain, done: u16) -> Option<u32> {
        let header = self.ledger.oldest_reset()?;
        let len_bytes = write_header(chain, header)?;
        self.ledger.reset_sent();
        self.given(done, len_bytes);
        self.ledger.commit();
        Some(len_bytes)
    }

    /// Lets the connections whose turn it is speak until one has said something. Gives the
    /// packet's length.
    fn turn_into(
        &mut self,
        chain: &Chain,
        done: u16,
        sources: &mut dyn Sources,
    ) -> Result<Option<u32>, DeviceError> {
        while let Some(slot) = self.table.take_turn() {
            let said = self.say(slot, chain);
            if let Some(header) = said {
                self.given(done, packet_bytes(header));
                self.save(slot);
                if header.len_bytes > 0 {
                    self.take_peeked(slot, header.len_bytes);
                } else {
                    self.ledger.commit();
                }
            }
            self.settle(slot, sources)?;
            if let Some(header) = said {
                return Ok(Some(packet_bytes(header)));
            }
        }
        Ok(None)
    }

    /// Puts a connection's next packet into the chain, and gives its header.
    fn say(&mut self, slot: usize, chain: &Chain) -> Option<Header> {
        let guest = self.guest;
        let entry = self.table.get(slot)?;
        let ports = entry.ports?;
        loop {
            let packet = entry.machine.next(entry.readable)?;
            let (mut len_bytes, mut flags) = (0, 0);
            match packet {
                Packet::Shutdown(shut) => flags = shut.flags(),
                Packet::Data(room_bytes) => {
                    let into = payload(chain, room_bytes.min(PAYLOAD_BYTES));
                    let received = entry.socket.as_ref().map_or(Received::Eof, |it| it.peek(&into));
                    death::reach();
                    match received {
                        Received::Bytes(len) => len_bytes = len,
                        Received::Nothing => {
                            entry.readable = false;
                            continue;
                        }
                        Received::Eof => {
                            entry.readable = false;
                            entry.machine.apply(Event::HostEof);
                            continue;
                        }
                    }
                }
                Packet::Request
                | Packet::Response
                | Packet::Reset
                | Packet::CreditUpdate
                | Packet::CreditRequest => {}
            }
            let sent = if let Packet::Data(_) = packet { Packet::Data(len_bytes) } else { packet };
            entry.machine.apply(Event::Sent(sent));
            let (buf_alloc, fwd_cnt) = entry.machine.credit.tell();
            let header = Header {
                src_cid: HOST_CID,
                dst_cid: guest,
                src_port: ports.host,
                dst_port: ports.guest,
                len_bytes,
                kind: TYPE_STREAM,
                op: packet.op().number(),
                flags,
                buf_alloc,
                fwd_cnt,
            };
            return write_header(chain, header).map(|_len_bytes| header);
        }
    }
}

/// Writes a header to the front of a chain, and gives the packet's length. The chain was found to
/// have room for it.
fn write_header(chain: &Chain, header: Header) -> Option<u32> {
    let written = chain.write_at(0, &header.to_bytes());
    debug_assert!(written.is_ok(), "the chain has room for a header");
    written.is_ok().then(|| packet_bytes(header))
}

/// A packet's whole length: its payload is far shorter than 2^32.
fn packet_bytes(header: Header) -> u32 {
    header.len_bytes.saturating_add(HEADER_LEN)
}

/// Where the payload goes: behind the header, at most so many bytes.
fn payload(chain: &Chain, len_bytes: u32) -> Vec<Segment> {
    let segments = ring::skip(chain.writable(), HEADER_BYTES as u64);
    limit(segments, len_bytes as usize)
}
