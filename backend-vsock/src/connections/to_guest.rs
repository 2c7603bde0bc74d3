//! Packets for the guest: the RX ring. A chain is taken only when there is something to say, and
//! put back if there turns out to be nothing.

use backend_daemon::device::{DeviceError, Rings, Sources};
use backend_daemon::ring::{self, Chain, Segment};

use super::{BUDGET, Connections, Stop, limit};
use crate::connection::{Event, Packet};
use crate::device::RX;
use crate::packet::{HEADER_BYTES, HOST_CID, Header, TYPE_STREAM};
use crate::socket::Received;

/// The longest payload of one packet, in bytes: a long one must not keep others waiting.
const PAYLOAD_BYTES: u32 = 64 * 1024;

impl Connections {
    /// Gives packets until there is nothing to say or no chain to say it in.
    pub(super) fn give_packets(&mut self, rings: &mut Rings<'_>) -> Result<Stop, DeviceError> {
        for _ in 0..BUDGET {
            if self.resets.is_empty() && !self.table.has_turns() {
                return Ok(Stop::Idle);
            }
            let Some(ring) = rings.ring(RX) else { return Ok(Stop::Idle) };
            let Some(chain) = ring.pop()? else { return Ok(Stop::Idle) };
            if chain.writable_len() <= HEADER_BYTES as u64 {
                self.faults.note("a buffer has no room for a packet");
                ring.push(chain, 0)?;
                continue;
            }
            let len_bytes = match self.reset_into(&chain) {
                Some(len_bytes) => Some(len_bytes),
                None => self.turn_into(&chain, rings.sources())?,
            };
            let Some(ring) = rings.ring(RX) else { return Ok(Stop::Idle) };
            match len_bytes {
                Some(len_bytes) => ring.push(chain, len_bytes)?,
                None => ring.unpop(chain),
            }
        }
        Ok(Stop::Budget)
    }

    fn reset_into(&mut self, chain: &Chain) -> Option<u32> {
        let header = self.resets.pop_front()?;
        write_header(chain, header)
    }

    /// Lets the connections whose turn it is speak until one has said something. Gives the
    /// packet's length.
    fn turn_into(
        &mut self,
        chain: &Chain,
        sources: &mut dyn Sources,
    ) -> Result<Option<u32>, DeviceError> {
        while let Some(slot) = self.table.take_turn() {
            let said = self.say(slot, chain);
            self.settle(slot, sources)?;
            if said.is_some() {
                return Ok(said);
            }
        }
        Ok(None)
    }

    fn say(&mut self, slot: usize, chain: &Chain) -> Option<u32> {
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
                    let received =
                        entry.socket.as_ref().map_or(Received::Eof, |it| it.receive(&into));
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
            return write_header(chain, header);
        }
    }
}

/// Writes a header to the front of a chain, and gives the packet's length. The chain was found to
/// have room for it.
fn write_header(chain: &Chain, header: Header) -> Option<u32> {
    let written = chain.write_at(0, &header.to_bytes());
    debug_assert!(written.is_ok(), "the chain has room for a header");
    u32::try_from(HEADER_BYTES).ok()?.checked_add(header.len_bytes)
}

/// Where the payload goes: behind the header, at most so many bytes.
fn payload(chain: &Chain, len_bytes: u32) -> Vec<Segment> {
    let segments = ring::skip(chain.writable(), HEADER_BYTES as u64);
    limit(segments, len_bytes as usize)
}
