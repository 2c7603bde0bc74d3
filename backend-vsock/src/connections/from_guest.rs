//! Packets of the guest: the TX ring. The guest is hostile; nothing it writes is an error here.

use std::io;
use std::os::fd::AsFd;

use backend_daemon::device::{DeviceError, Interest, Rings, Sources};
use backend_daemon::ring::Chain;

use super::{BUDGET, Connections, RESETS_MAX, Stop};
use crate::connection::{Connection, Effect, Event};
use crate::death;
use crate::device::TX;
use crate::keep::Origin;
use crate::ledger::Word;
use crate::packet::{HEADER_BYTES, HOST_CID, Header, Op, Ports, TYPE_STREAM};

impl Connections {
    /// Takes packets until the ring is empty.
    pub(super) fn take_packets(&mut self, rings: &mut Rings<'_>) -> Result<Stop, DeviceError> {
        for _ in 0..BUDGET {
            // One packet makes one reset at most.
            if self.ledger.resets() == RESETS_MAX {
                return Ok(Stop::Resets);
            }
            let Some(ring) = rings.ring(TX) else { return Ok(Stop::Idle) };
            let Some(chain) = ring.pop()? else { return Ok(Stop::Idle) };
            let done = ring.next_avail();
            let mut slot = None;
            if self.ledger.position(Word::TxDone) != done {
                slot = self.take_packet(&chain, rings.sources());
                if let Some(slot) = slot {
                    self.save(slot);
                }
                self.ledger.set(Word::TxDone, done);
                self.ledger.commit();
            }
            self.forget_spare();
            if let Some(ring) = rings.ring(TX) {
                ring.push(chain, 0)?;
                death::reach();
            }
            if let Some(slot) = slot {
                self.flush(slot)?;
                self.settle(slot, rings.sources())?;
            }
        }
        Ok(Stop::Budget)
    }

    /// Deals with a packet, as far as it does not show outside. Gives the connection that it
    /// changed.
    fn take_packet(&mut self, chain: &Chain, sources: &mut dyn Sources) -> Option<usize> {
        let mut bytes = [0; HEADER_BYTES];
        if chain.read_at(0, &mut bytes).is_err() {
            self.faults.note("a packet is shorter than its header");
            return None;
        }
        let header = Header::from_bytes(&bytes);
        if header.src_cid != self.guest {
            // There is nobody to answer.
            self.faults.note("a packet has another sender");
            return None;
        }
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            self.faults.note("a packet is for another machine, or no stream");
            self.refuse(&header);
            return None;
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        match self.table.find(ports) {
            Some(slot) => {
                self.take_known(slot, &header, chain);
                Some(slot)
            }
            None if header.op == Op::Request.number() => {
                let slot = self.connect(ports, &header, sources);
                if let Err(error) = &slot {
                    log::debug!("cannot connect the guest to host port {}: {error}", ports.host);
                    self.refuse(&header);
                }
                slot.ok()
            }
            None => {
                self.refuse(&header);
                None
            }
        }
    }

    fn take_known(&mut self, slot: usize, header: &Header, chain: &Chain) {
        let Some(entry) = self.table.get(slot) else { return };
        let payload_bytes = chain.readable_len() - HEADER_BYTES as u64;
        let effect = match Op::from_number(header.op) {
            Some(op) if op != Op::Data || u64::from(header.len_bytes) <= payload_bytes => {
                entry.machine.note_credit(header);
                let (flags, len_bytes) = (header.flags, header.len_bytes);
                entry.machine.apply(Event::Packet { op, flags, len_bytes })
            }
            Some(_) | None => {
                self.faults.note("a packet is longer than its chain, or for nothing known");
                entry.machine.apply(Event::Nonsense)
            }
        };
        match effect {
            Effect::None => {}
            Effect::Discard => entry.machine.credit.forward(header.len_bytes),
            Effect::Greet => self.greet(slot),
            Effect::Deliver => self.deliver(slot, chain, header.len_bytes),
        }
    }

    /// The guest asks for a connection to a host program.
    fn connect(
        &mut self,
        ports: Ports,
        request: &Header,
        sources: &mut dyn Sources,
    ) -> io::Result<usize> {
        let (old_key, stream) = match self.spare.take() {
            Some((key, stream)) => (Some(key), stream),
            None => (None, self.host.socket()?),
        };
        let admitted = self.admit(Origin::Guest, stream);
        let key = admitted.as_ref().ok().map(|(place, _)| place.key(Origin::Guest).encode());
        if let Some(old_key) = old_key.filter(|old_key| Some(*old_key) != key) {
            self.keep.remove(old_key);
        }
        let (place, mut socket) = admitted?;
        let connected = self
            .host
            .connect(socket.as_fd(), ports.host)
            .inspect(|()| death::reach())
            .and_then(|()| socket.watch(place.token(), Interest::Nothing, sources));
        if let Err(error) = connected {
            self.keep.remove(place.key(Origin::Guest).encode());
            return Err(error);
        }
        Ok(self.table.insert(place, Connection::accepting(request), Some(ports), socket))
    }

    /// Answers with a reset, unless the packet is one.
    fn refuse(&mut self, header: &Header) {
        if header.op != Op::Reset.number() {
            self.ledger.owe_reset(&header.reset());
        }
    }
}
