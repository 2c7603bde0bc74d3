//! Frames and headers, and a guest's driver that sends and receives them.

use backend_daemon::testing::{Buffer, Daemon, Driver, Options, Request};

pub(crate) const RECEIVE: u16 = 0;
pub(crate) const TRANSMIT: u16 = 1;
pub(crate) const HEADER_BYTES: usize = 12;

pub(crate) const NEEDS_CSUM: u8 = 1;
pub(crate) const GSO_TCPV4: u8 = 1;

/// A `virtio_net_hdr`; the packet socket's is the same without the number of buffers.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Header {
    pub(crate) flags: u8,
    pub(crate) gso_type: u8,
    pub(crate) hdr_len: u16,
    pub(crate) gso_size: u16,
    pub(crate) csum_start: u16,
    pub(crate) csum_offset: u16,
}

impl Header {
    /// Of a TCP packet that is to be cut into segments.
    pub(crate) const SEGMENTS: Self = Self {
        flags: NEEDS_CSUM,
        gso_type: GSO_TCPV4,
        hdr_len: 54,
        gso_size: 1448,
        csum_start: 34,
        csum_offset: 16,
    };

    pub(crate) fn bytes(self) -> Vec<u8> {
        let mut bytes = vec![self.flags, self.gso_type];
        for word in [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, 0] {
            bytes.extend(word.to_le_bytes());
        }
        bytes
    }
}

/// A frame of a protocol that nobody speaks, with bytes that tell frames apart.
pub(crate) fn frame(number: u8, payload_bytes: usize) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, number]);
    frame.extend([0x88, 0xb5]);
    frame.extend((0..payload_bytes).map(|at| (at % 251) as u8 ^ number));
    frame
}

/// A TCP packet of one connection, its checksum not complete.
pub(crate) fn tcp(source_port: u16, payload_bytes: usize) -> Vec<u8> {
    let mut frame = frame(1, 0);
    frame.truncate(12);
    frame.extend([8, 0]);
    let total = u16::try_from(40 + payload_bytes).unwrap().to_be_bytes();
    let mut ip = vec![0x45, 0, total[0], total[1], 0, 0, 0x40, 0, 64, 6, 0, 0];
    ip.extend([10, 0, 0, 1, 10, 0, 0, 2]);
    let sum = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum: u32 = sum;
    let folded = u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    ip[10..12].copy_from_slice(&(!folded).to_be_bytes());
    frame.extend(ip);
    frame.extend(source_port.to_be_bytes());
    frame.extend([0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    frame.extend((0..payload_bytes).map(|at| (at % 253) as u8));
    frame
}

/// A driver with `queues` queues.
pub(crate) fn connect(daemon: &Daemon, queues: u16) -> Driver {
    Driver::connect(&daemon.socket(), &Options { queues, ..Options::default() })
}

/// Sends a frame on `queue`; gives once the device is done with it.
pub(crate) fn send_on(driver: &mut Driver, queue: u16, header: Header, frame: &[u8]) {
    let header = header.bytes();
    let request = driver.submit(queue, &[Buffer::Out(&header), Buffer::Out(frame)]);
    assert_eq!(driver.wait(queue, request).written_bytes, 0);
}

pub(crate) fn send(driver: &mut Driver, header: Header, frame: &[u8]) {
    send_on(driver, TRANSMIT, header, frame);
}

/// Makes buffers available and kicks.
pub(crate) fn offer(driver: &mut Driver, queue: u16, count: usize, bytes: u32) -> Vec<Request> {
    let requests = (0..count).map(|_| driver.offer(queue, &[Buffer::In(bytes)])).collect();
    driver.kick(queue);
    requests
}

/// Takes one frame out of as many buffers as its header says; gives it with its header.
pub(crate) fn take(driver: &mut Driver, buffers: &mut Vec<Request>) -> (Vec<u8>, Vec<u8>) {
    let first = driver.wait(RECEIVE, buffers.remove(0));
    let mut bytes = first.bytes[..first.written_bytes as usize].to_vec();
    let count = u16::from_le_bytes([bytes[10], bytes[11]]);
    assert!(count >= 1, "a frame lies in one buffer at least");
    for _ in 1..count {
        let more = driver.wait(RECEIVE, buffers.remove(0));
        bytes.extend(&more.bytes[..more.written_bytes as usize]);
    }
    let frame = bytes.split_off(HEADER_BYTES);
    (bytes, frame)
}
