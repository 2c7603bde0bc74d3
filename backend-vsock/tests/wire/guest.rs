//! A guest's socket driver: packets over the test driver's queues, and streams over packets.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use backend_daemon::testing::{Answer, Buffer, DEADLINE, Driver, Options, Request};
use backend_vsock::packet::{Cid, HEADER_BYTES, HOST_CID, Header, Op, Ports, TYPE_STREAM};

use crate::program::{CID, noise};

const RX: u16 = 0;
const TX: u16 = 1;
pub const EVENT: u16 = 2;

/// How long to wait for what must not come.
pub const SILENCE: Duration = Duration::from_millis(200);
/// How much payload each of the guest's buffers takes, in bytes.
pub const RX_BYTES: u32 = 4096;

/// A packet as the guest got it.
#[derive(Debug)]
pub struct Packet {
    pub header: Header,
    pub payload: Vec<u8>,
}

impl Packet {
    pub fn op(&self) -> Op {
        Op::from_number(self.header.op).unwrap()
    }

    pub fn ports(&self) -> Ports {
        Ports { host: self.header.src_port, guest: self.header.dst_port }
    }
}

/// A guest with a socket driver.
pub struct Guest {
    pub driver: Driver,
    posted: VecDeque<Request>,
    /// How many buffers are kept in the RX ring.
    keep: usize,
}

impl Guest {
    /// With buffers for what comes.
    pub fn connect(socket: &Path) -> Self {
        let mut guest = Self::starved(socket);
        guest.feed(32);
        guest
    }

    /// Without any buffers.
    pub fn starved(socket: &Path) -> Self {
        // A frontend that can replace the device's process.
        let options = Options { queues: 3, inflight: true, ..Options::default() };
        Self { driver: Driver::connect(socket, &options), posted: VecDeque::new(), keep: 0 }
    }

    /// Keeps so many buffers in the RX ring from now on.
    pub fn feed(&mut self, keep: usize) {
        self.keep = keep;
        while self.posted.len() < keep {
            let bytes = u32::try_from(HEADER_BYTES).unwrap() + RX_BYTES;
            self.posted.push_back(self.driver.submit(RX, &[Buffer::In(bytes)]));
        }
    }

    /// Forgets what was posted: the rings are empty.
    pub fn forget_posted(&mut self) {
        self.posted.clear();
    }

    /// The next packet.
    pub fn next(&mut self) -> Packet {
        self.next_for(DEADLINE).unwrap_or_else(|| panic!("no packet in time"))
    }

    /// The next packet, if it comes within `limit`.
    pub fn next_for(&mut self, limit: Duration) -> Option<Packet> {
        let request = *self.posted.front()?;
        let Answer { written_bytes, mut bytes } = self.driver.wait_for(RX, request, limit)?;
        self.posted.pop_front();
        self.feed(self.keep);
        bytes.truncate(usize::try_from(written_bytes).unwrap());
        let payload = bytes.split_off(HEADER_BYTES);
        let header = Header::from_bytes(&bytes.try_into().unwrap());
        assert_eq!(payload.len(), header.len_bytes as usize);
        assert_eq!(header.dst_cid, Cid(CID));
        Some(Packet { header, payload })
    }

    /// The next packet, which has to be this.
    pub fn expect(&mut self, op: Op) -> Packet {
        let packet = self.next();
        assert_eq!(packet.op(), op, "{:?}", packet.header);
        packet
    }

    /// Checks that nothing comes for a while.
    pub fn expect_silence(&mut self) {
        if let Some(packet) = self.next_for(SILENCE) {
            panic!("unexpected {:?}", packet.header);
        }
    }

    /// Sends a packet, without waiting until the device has taken it.
    pub fn post(&mut self, header: Header, payload: &[u8]) -> Request {
        self.driver.submit(TX, &[Buffer::Out(&header.to_bytes()), Buffer::Out(payload)])
    }

    /// Sends a packet.
    pub fn send(&mut self, header: Header, payload: &[u8]) {
        let request = self.post(header, payload);
        self.taken(request);
    }

    /// Waits until the device has taken a packet.
    pub fn taken(&mut self, request: Request) {
        assert_eq!(self.driver.wait(TX, request).written_bytes, 0);
    }

    /// Sends bytes that need not be a packet.
    pub fn send_raw(&mut self, buffers: &[&[u8]]) {
        let buffers: Vec<Buffer<'_>> = buffers.iter().map(|bytes| Buffer::Out(bytes)).collect();
        let request = self.driver.submit(TX, &buffers);
        assert_eq!(self.driver.wait(TX, request).written_bytes, 0);
    }

    /// Grants the connection that a host program asks for next.
    pub fn grant(&mut self, buffer_bytes: u32) -> Stream {
        let request = self.expect(Op::Request);
        let mut stream = Stream::new(request.ports(), buffer_bytes);
        stream.hear(&request.header);
        self.send(stream.header(Op::Response, 0), &[]);
        stream
    }

    /// Asks for a connection to the host; gives it once it is granted.
    pub fn dial(&mut self, host_port: u32, guest_port: u32, buffer_bytes: u32) -> Stream {
        let ports = Ports { host: host_port, guest: guest_port };
        let mut stream = Stream::new(ports, buffer_bytes);
        self.send(stream.header(Op::Request, 0), &[]);
        let response = self.expect(Op::Response);
        assert_eq!(response.ports(), ports);
        stream.hear(&response.header);
        stream
    }
}

/// A connection as the guest sees it.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    pub ports: Ports,
    buffer_bytes: u32,
    /// What the guest's program has read, in bytes.
    forwarded: u32,
    /// What was sent to the host, in bytes.
    sent: u32,
    host_alloc: u32,
    host_forwarded: u32,
}

impl Stream {
    fn new(ports: Ports, buffer_bytes: u32) -> Self {
        let (host_alloc, host_forwarded) = (0, 0);
        Self { ports, buffer_bytes, forwarded: 0, sent: 0, host_alloc, host_forwarded }
    }

    /// One that a packet of the host asks for.
    pub fn asked(request: &Header, buffer_bytes: u32) -> Self {
        let ports = Ports { host: request.src_port, guest: request.dst_port };
        let mut stream = Self::new(ports, buffer_bytes);
        stream.hear(request);
        stream
    }

    /// One that the guest asks for.
    pub fn asking(host_port: u32, guest_port: u32, buffer_bytes: u32) -> Self {
        Self::new(Ports { host: host_port, guest: guest_port }, buffer_bytes)
    }

    pub fn header(&self, op: Op, flags: u32) -> Header {
        Header {
            src_cid: Cid(CID),
            dst_cid: HOST_CID,
            src_port: self.ports.guest,
            dst_port: self.ports.host,
            len_bytes: 0,
            kind: TYPE_STREAM,
            op: op.number(),
            flags,
            buf_alloc: self.buffer_bytes,
            fwd_cnt: self.forwarded,
        }
    }

    /// Takes note of what a packet says of the host's buffer, and of payload that is read now.
    pub fn hear(&mut self, header: &Header) {
        (self.host_alloc, self.host_forwarded) = (header.buf_alloc, header.fwd_cnt);
        self.forwarded = self.forwarded.wrapping_add(header.len_bytes);
    }

    /// How much may be sent now, in bytes.
    pub fn credit(&self) -> u32 {
        self.host_alloc - self.sent.wrapping_sub(self.host_forwarded)
    }

    /// The guest gives its program a buffer of another size.
    pub fn resize(&mut self, buffer_bytes: u32) {
        self.buffer_bytes = buffer_bytes;
    }

    /// The header of a packet with this payload.
    pub fn data(&mut self, payload: &[u8]) -> Header {
        let len_bytes = u32::try_from(payload.len()).unwrap();
        self.sent = self.sent.wrapping_add(len_bytes);
        Header { len_bytes, ..self.header(Op::Data, 0) }
    }

    /// Sends bytes for which there is credit.
    pub fn send(&mut self, guest: &mut Guest, bytes: &[u8]) {
        for payload in bytes.chunks(16 << 10) {
            let header = self.data(payload);
            guest.send(header, payload);
        }
    }

    /// Sends a packet without payload.
    pub fn say(&self, guest: &mut Guest, op: Op, flags: u32) {
        guest.send(self.header(op, flags), &[]);
    }

    /// Sends as much as the device takes while the program reads nothing: both the program's socket
    /// and the device's buffer are full then.
    pub fn fill(&mut self, guest: &mut Guest) -> Vec<u8> {
        let mut bytes = Vec::new();
        loop {
            while self.credit() > 0 {
                let len = usize::try_from(self.credit()).unwrap().min(16 << 10);
                let next = noise(len, bytes.len() as u64 + 1);
                self.send(guest, &next);
                bytes.extend(next);
            }
            match guest.next_for(SILENCE) {
                Some(packet) if packet.op() == Op::CreditUpdate => self.hear(&packet.header),
                Some(packet) => panic!("unexpected {:?}", packet.header),
                None => return bytes,
            }
        }
    }

    /// Reads so many bytes, and tells of the room after each packet.
    pub fn read(&mut self, guest: &mut Guest, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            let packet = guest.next();
            assert_eq!(packet.ports(), self.ports);
            self.hear(&packet.header);
            bytes.extend(&packet.payload);
            match packet.op() {
                Op::Data | Op::CreditRequest => self.say(guest, Op::CreditUpdate, 0),
                Op::CreditUpdate => {}
                other => panic!("unexpected {other:?} after {} bytes", bytes.len()),
            }
        }
        assert_eq!(bytes.len(), len);
        bytes
    }
}
