//! Packets of the guest: the TX ring. The guest is hostile; nothing it writes is an error here.

use backend_daemon::device::{DeviceError, Interest, Rings, Sources};
use backend_daemon::ring::{self, Chain};

use super::{BUDGET, Connections, RESETS_MAX, Stop, limit};
use crate::connection::{Connection, Effect, Event};
use crate::device::TX;
use crate::packet::{HEADER_BYTES, HOST_CID, Header, Op, Ports, TYPE_STREAM};
use crate::socket::Socket;

impl Connections {
    /// Takes packets until the ring is empty.
    pub(super) fn take_packets(&mut self, rings: &mut Rings<'_>) -> Result<Stop, DeviceError> {
        for _ in 0..BUDGET {
            // One packet makes one reset at most.
            if self.resets.len() == RESETS_MAX {
                return Ok(Stop::Resets);
            }
            let Some(ring) = rings.ring(TX) else { return Ok(Stop::Idle) };
            let Some(chain) = ring.pop()? else { return Ok(Stop::Idle) };
            self.take_packet(&chain, rings.sources())?;
            if let Some(ring) = rings.ring(TX) {
                ring.push(chain, 0)?;
            }
        }
        Ok(Stop::Budget)
    }

    fn take_packet(&mut self, chain: &Chain, sources: &mut dyn Sources) -> Result<(), DeviceError> {
        let mut bytes = [0; HEADER_BYTES];
        if chain.read_at(0, &mut bytes).is_err() {
            self.faults.note("a packet is shorter than its header");
            return Ok(());
        }
        let header = Header::from_bytes(&bytes);
        if header.src_cid != self.guest {
            // There is nobody to answer.
            self.faults.note("a packet has another sender");
            return Ok(());
        }
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            self.faults.note("a packet is for another machine, or no stream");
            self.refuse(&header);
            return Ok(());
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        match self.table.find(ports) {
            Some(slot) => self.take_known(slot, &header, chain, sources),
            None if header.op == Op::Request.number() => self.connect(ports, &header, sources),
            None => {
                self.refuse(&header);
                Ok(())
            }
        }
    }

    fn take_known(
        &mut self,
        slot: usize,
        header: &Header,
        chain: &Chain,
        sources: &mut dyn Sources,
    ) -> Result<(), DeviceError> {
        let Some(entry) = self.table.get(slot) else { return Ok(()) };
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
            Effect::Discard => entry.forwarded(header.len_bytes as usize),
            Effect::Greet => {
                let greeted = match (&entry.socket, entry.ports) {
                    (Some(socket), Some(ports)) => socket.greet(ports.host),
                    _ => false,
                };
                if !greeted {
                    entry.deafen();
                }
            }
            Effect::Deliver => self.deliver(slot, chain, header.len_bytes as usize),
        }
        self.settle(slot, sources)
    }

    /// Passes payload on: what the host program takes now straight from the guest's memory, the
    /// rest later from a copy.
    fn deliver(&mut self, slot: usize, chain: &Chain, len: usize) {
        let Some(entry) = self.table.get(slot) else { return };
        let Some(socket) = &mut entry.socket else { return };
        let payload = limit(ring::skip(chain.readable(), HEADER_BYTES as u64), len);
        let Ok(sent) = socket.send(&payload) else {
            entry.forwarded(len);
            entry.deafen();
            return;
        };
        if sent < len {
            // The credit allowed this much: the copy is no larger than the guest's share.
            let mut rest = vec![0; len - sent];
            if chain.read_at((HEADER_BYTES + sent) as u64, &mut rest).is_ok() {
                socket.keep(&rest);
            }
        }
        entry.forwarded(sent);
    }

    /// The guest asks for a connection to a host program.
    fn connect(
        &mut self,
        ports: Ports,
        request: &Header,
        sources: &mut dyn Sources,
    ) -> Result<(), DeviceError> {
        if self.table.is_full() {
            log::debug!("too many connections: refused one to host port {}", ports.host);
            self.refuse(request);
            return Ok(());
        }
        let stream = match self.host.connect(ports.host) {
            Ok(stream) => stream,
            Err(error) => {
                log::debug!("cannot connect the guest to host port {}: {error}", ports.host);
                self.refuse(request);
                return Ok(());
            }
        };
        let machine = Connection::accepting(request);
        let inserted = self.table.insert(machine, Some(ports), |token| {
            Socket::watch(stream, token, Interest::Nothing, sources)
        });
        match inserted {
            Ok(Some(slot)) => self.settle(slot, sources),
            Ok(None) => {
                self.refuse(request);
                Ok(())
            }
            Err(error) => {
                log::warn!("cannot poll a host program: {error}");
                self.refuse(request);
                Ok(())
            }
        }
    }

    /// Answers with a reset, unless the packet is one.
    fn refuse(&mut self, header: &Header) {
        if header.op != Op::Reset.number() && self.resets.len() < RESETS_MAX {
            self.resets.push_back(header.reset());
        }
    }
}
